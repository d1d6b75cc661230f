//! What is read: named tensors whose rows lie somewhere in some files, and the metadata of the new file.
//!
//! Weights are read with positioned reads rather than through a map: a worker copies the rows that it
//! encodes next into its own scratch. That costs less than the page faults of a first pass over a map,
//! keeps memory bounded by what is being worked on, and turns a source that someone cuts short meanwhile into
//! an error instead of a SIGBUS.

use std::fs::{File, Metadata};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use octet::error::{Error, Result};
use octet::gguf::{Gguf, Tensor, Writer};
use octet::moe::config::ARCHS;
use octet::quant::{self, Format, recipe};

/// Consecutive rows of a tensor: the whole of it, or one expert.
#[derive(Clone, Debug)]
pub(crate) struct Piece {
    /// Which of [`Source::files`] holds it.
    pub(crate) file: usize,
    /// Where it starts there.
    pub(crate) offset: u64,
    /// The GGUF type of its bytes.
    pub(crate) type_id: u32,
}

/// A tensor as it will be called, and where its bytes are now.
#[derive(Clone, Debug)]
pub(crate) struct SourceTensor {
    /// Its name in the new file.
    pub(crate) name: String,
    /// Elements in each dimension, innermost first.
    pub(crate) shape: Vec<u64>,
    /// Its rows in order, in equal parts.
    pub(crate) pieces: Vec<Piece>,
    /// In queries and keys of a Hugging Face model: heads whose rows are to be interleaved.
    pub(crate) heads: Option<u64>,
    /// The GGUF type that it gets if it is not quantized.
    pub(crate) kept: u32,
}

impl SourceTensor {
    /// Weights in a row.
    pub(crate) fn columns(&self) -> u64 {
        self.shape[0]
    }

    /// Rows of all pieces.
    pub(crate) fn rows(&self) -> u64 {
        self.shape[1..].iter().product()
    }

    /// Weights.
    pub(crate) fn elements(&self) -> u64 {
        self.columns() * self.rows()
    }

    /// The type of all pieces, if it is one.
    pub(crate) fn type_id(&self) -> Option<u32> {
        let first = self.pieces[0].type_id;
        self.pieces
            .iter()
            .all(|p| p.type_id == first)
            .then_some(first)
    }

    /// Bytes of one row of a piece.
    pub(crate) fn row_bytes(&self, piece: &Piece) -> u64 {
        type_bytes(piece.type_id, self.columns())
    }

    /// Bytes that are read for it.
    pub(crate) fn bytes(&self) -> u64 {
        let rows = self.rows() / self.pieces.len() as u64;
        self.pieces.iter().map(|p| self.row_bytes(p) * rows).sum()
    }

    /// The row of the source that becomes row `r`.
    ///
    /// GGUF's rotary embedding turns neighbours (2i, 2i + 1), Hugging Face's turns halves (i, i + n/2): rows of
    /// a head are interleaved on the way.
    pub(crate) fn source_row(&self, r: u64) -> u64 {
        match self.heads {
            None => r,
            Some(heads) => {
                let size = self.rows() / heads;
                let (head, within) = (r / size, r % size);
                head * size + (within % 2) * (size / 2) + within / 2
            }
        }
    }
}

/// Bytes of `n` elements of a type that is known.
pub(crate) fn type_bytes(type_id: u32, n: u64) -> u64 {
    let t = quant::type_info(type_id).expect("the readers know every type they let pass");
    n / t.block_weights * t.block_bytes
}

/// The name of a type.
pub(crate) fn type_name(type_id: u32) -> &'static str {
    quant::type_info(type_id).map_or("?", |t| t.name)
}

/// A file of the source, open, with what it was like when it was opened.
#[derive(Debug)]
pub(crate) struct SourceFile {
    /// Where it is.
    pub(crate) path: PathBuf,
    file: File,
    len: u64,
    modified: Option<SystemTime>,
}

impl SourceFile {
    /// Opens it.
    ///
    /// # Errors
    /// If that fails.
    pub(crate) fn open(path: &Path) -> Result<SourceFile> {
        let file = File::open(path).map_err(Error::io(path, "open"))?;
        let meta = file.metadata().map_err(Error::io(path, "read"))?;
        Ok(SourceFile {
            path: path.to_path_buf(),
            file,
            len: meta.len(),
            modified: meta.modified().ok(),
        })
    }

    /// Fills `out` from `offset` on.
    ///
    /// # Errors
    /// If the file cannot be read or ends too early.
    pub(crate) fn read(&self, offset: u64, out: &mut [u8]) -> Result<()> {
        match read_at(&self.file, offset, out) {
            Ok(()) => Ok(()),
            Err(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => self.unchanged(),
            Err(e) => Err(Error::io(&self.path, "read")(e)),
        }
    }

    /// Refuses a file that is not what it was when it was opened.
    ///
    /// # Errors
    /// If its size or time of change differ.
    pub(crate) fn unchanged(&self) -> Result<()> {
        let now = std::fs::metadata(&self.path).map_err(Error::io(&self.path, "read"))?;
        let same = |m: &Metadata| m.len() == self.len && m.modified().ok() == self.modified;
        let open = self
            .file
            .metadata()
            .map_err(Error::io(&self.path, "read"))?;
        if same(&now) && same(&open) {
            return Ok(());
        }
        Err(Error::invalid(
            &self.path,
            "the source, which changed while it was read,",
            format!("{} bytes as at the start", self.len),
            format!("{} bytes, or a newer file", now.len()),
        ))
    }

    /// What tells this file from a later one of the same name.
    pub(crate) fn stamp(&self) -> String {
        let since = self
            .modified
            .and_then(|t| t.duration_since(SystemTime::UNIX_EPOCH).ok());
        let path = std::path::absolute(&self.path).unwrap_or_else(|_| self.path.clone());
        format!("{} {} {:?}", path.display(), self.len, since)
    }
}

#[cfg(unix)]
fn read_at(file: &File, offset: u64, out: &mut [u8]) -> std::io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, out, offset)
}

#[cfg(windows)]
fn read_at(file: &File, mut offset: u64, mut out: &mut [u8]) -> std::io::Result<()> {
    while !out.is_empty() {
        match std::os::windows::fs::FileExt::seek_read(file, out, offset)? {
            0 => return Err(std::io::ErrorKind::UnexpectedEof.into()),
            n => {
                out = &mut out[n..];
                offset += n as u64;
            }
        }
    }
    Ok(())
}

/// All that is read.
#[derive(Debug)]
pub(crate) struct Source {
    /// The path that was given.
    pub(crate) path: PathBuf,
    /// The files that hold the weights.
    pub(crate) files: Vec<SourceFile>,
    /// The metadata of the new file, except what depends on the recipe.
    pub(crate) metadata: Writer,
    /// Whether the metadata comes from a GGUF, so that a recipe's keys go to the end, as the reference has it.
    pub(crate) from_gguf: bool,
    /// How many files the source has.
    pub(crate) shards: usize,
    /// The tensors, in the order in which they are written.
    pub(crate) tensors: Vec<SourceTensor>,
    /// Layers.
    pub(crate) n_layer: usize,
    /// Query heads.
    pub(crate) n_head: usize,
    /// Key and value heads.
    pub(crate) n_kv: usize,
    /// Experts in a layer; 0 in a dense model.
    pub(crate) n_expert: usize,
    /// Things that the user should know.
    pub(crate) notes: Vec<String>,
}

impl Source {
    /// Opens a GGUF, of either layout of experts, whole or split.
    ///
    /// # Errors
    /// If it cannot be read, is of an architecture whose recipes are not known, or lacks an expert.
    pub(crate) fn gguf(path: &Path) -> Result<Source> {
        let file = Gguf::open(path)?;
        let name = file.get_str("general.architecture")?.unwrap_or_default();
        if !ARCHS.iter().any(|a| a.name == name) {
            let known: Vec<_> = ARCHS.iter().map(|a| a.name).collect();
            return Err(Error::unsupported(
                path,
                "this architecture",
                known.join(", "),
                format!("{name:?}"),
            ));
        }
        let number = |key: &str| -> Result<usize> {
            Ok(file.get_u32(&format!("{name}.{key}"))?.unwrap_or(0) as usize)
        };
        let n_head = number("attention.head_count")?;
        let n_kv = match number("attention.head_count_kv")? {
            0 => n_head,
            n => n,
        };
        let mut metadata = Writer::new();
        metadata.put_all(&file);
        let mut source = Source {
            path: path.to_path_buf(),
            files: Vec::new(),
            metadata,
            from_gguf: true,
            shards: file.shards().len(),
            tensors: file.tensors().iter().map(whole).collect(),
            n_layer: number("block_count")?,
            n_head,
            n_kv,
            n_expert: number("expert_count")?,
            notes: Vec::new(),
        };
        for shard in file.shards() {
            source.files.push(SourceFile::open(shard)?);
        }
        source.fuse()?;
        source.sort();
        Ok(source)
    }

    /// Puts the tensors into the order of files that the reference writes.
    pub(crate) fn sort(&mut self) {
        self.tensors.sort_by(|a, b| recipe::order(&a.name, &b.name));
    }

    /// Makes one tensor of the experts of a layer, where each has its own (files of December 2023 to
    /// March 2024).
    fn fuse(&mut self) -> Result<()> {
        let n = self.n_expert;
        let mut fused: Vec<SourceTensor> = Vec::new();
        let mut experts = std::collections::BTreeMap::new();
        for t in std::mem::take(&mut self.tensors) {
            match old_expert(&t.name) {
                Some((name, expert)) if n > 1 => {
                    experts.insert((name, expert), t);
                }
                _ => fused.push(t),
            }
        }
        let names: std::collections::BTreeSet<String> =
            experts.keys().map(|(name, _)| name.clone()).collect();
        for name in names {
            let mut all: Vec<SourceTensor> = Vec::new();
            for e in 0..n {
                let t = experts.remove(&(name.clone(), e)).ok_or_else(|| {
                    let what = format!("expert {e} of {n} of {name}");
                    Error::missing(&self.path, what, "the file is not whole")
                })?;
                if let Some(first) = all.first()
                    && (first.shape != t.shape || t.shape.len() != 2)
                {
                    return Err(Error::invalid(
                        &self.path,
                        format!("the shape of tensor {}", t.name),
                        format!("{:?}, as that of the other experts", first.shape),
                        format!("{:?}", t.shape),
                    ));
                }
                all.push(t);
            }
            let mut shape = all[0].shape.clone();
            shape.push(n as u64);
            fused.push(SourceTensor {
                name,
                shape,
                kept: all[0].kept,
                pieces: all.into_iter().flat_map(|t| t.pieces).collect(),
                heads: None,
            });
        }
        if let Some((name, e)) = experts.keys().next() {
            return Err(Error::invalid(
                &self.path,
                format!("expert {e} of {name}"),
                format!("at most {n} experts"),
                "one more",
            ));
        }
        self.tensors = fused;
        Ok(())
    }

    /// Gives each expert its own tensor, as files of December 2023 have it.
    pub(crate) fn split_experts(&mut self) {
        let mut split = Vec::new();
        for t in std::mem::take(&mut self.tensors) {
            let stem = t.name.strip_suffix("_exps.weight");
            let shape = <[u64; 3]>::try_from(t.shape.as_slice()).ok();
            let Some((stem, [columns, rows, experts])) = stem.zip(shape) else {
                split.push(t);
                continue;
            };
            // Bytes of an expert, where all lie in one piece.
            let bytes = type_bytes(t.pieces[0].type_id, columns) * rows;
            for e in 0..experts {
                let mut piece = t.pieces[0].clone();
                match t.pieces.get(e as usize) {
                    Some(own) if t.pieces.len() > 1 => piece = own.clone(),
                    _ => piece.offset += e * bytes,
                }
                split.push(SourceTensor {
                    name: format!("{stem}.{e}.weight"),
                    shape: vec![columns, rows],
                    kept: piece.type_id,
                    pieces: vec![piece],
                    heads: None,
                });
            }
        }
        self.tensors = split;
        self.sort();
    }

    /// Refuses a source that is not what it was when it was opened.
    ///
    /// # Errors
    /// If a file changed.
    pub(crate) fn unchanged(&self) -> Result<()> {
        self.files.iter().try_for_each(SourceFile::unchanged)
    }
}

fn whole(t: &Tensor) -> SourceTensor {
    SourceTensor {
        name: t.name.clone(),
        shape: t.shape.clone(),
        pieces: vec![Piece {
            file: t.shard,
            offset: t.offset,
            type_id: t.type_id,
        }],
        heads: None,
        kept: t.type_id,
    }
}

/// `blk.N.ffn_gate.X.weight`: (`blk.N.ffn_gate_exps.weight`, X).
fn old_expert(name: &str) -> Option<(String, usize)> {
    let mut parts = name.split('.');
    let (blk, layer, part) = (parts.next()?, parts.next()?, parts.next()?);
    let (expert, weight) = (parts.next()?, parts.next()?);
    let right = blk == "blk"
        && weight == "weight"
        && parts.next().is_none()
        && ["ffn_gate", "ffn_up", "ffn_down"].contains(&part);
    let layer: usize = layer.parse().ok()?;
    let expert = expert.parse().ok()?;
    right.then(|| (format!("blk.{layer}.{part}_exps.weight"), expert))
}

/// Whether a type is one of the three floats.
pub(crate) fn is_float(type_id: u32) -> bool {
    Format::from_id(type_id).is_some_and(|f| f.block_weights() == 1)
}
