//! Importance files ("imatrix"): how much an error in each column of each matrix matters.
//!
//! Importance is the mean square of what a column was multiplied with while the model read some text.
//! Two forms exist, both of the reference (llama.cpp, `tools/imatrix`, `common/imatrix-loader.cpp`):
//!
//! - a GGUF with, for every matrix, `NAME.in_sum2` (sums of squares, `(columns, experts)`, F32) and
//!   `NAME.counts` (how many inputs were summed, `(1, experts)`, F32);
//! - older, little-endian without a magic: `i32` entries; per entry an `i32`-counted name, `i32` calls, an
//!   `i32`-counted list of `f32` (sums over calls); then, perhaps, `i32` chunks and an
//!   `i32`-counted name of the text.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Write};
use std::path::Path;

use super::{Gguf, MAGIC, MAX_NAME, Tensor, Writer, shown};
use crate::error::{Error, Result};
use crate::quant::Format;

/// What is known of one matrix.
#[derive(Clone, Debug, PartialEq)]
pub struct Importance {
    /// Sums of squares, one a column, expert after expert: finite, not negative.
    pub sums: Vec<f32>,
    /// How many inputs each expert had; one number for a matrix that all inputs go through, and in the old
    /// form, which does not tell.
    pub counts: Vec<u64>,
}

impl Importance {
    /// One number a column: the mean square. The columns of an expert that saw nothing count as
    /// equally important, as they do in the reference.
    pub fn columns(&self) -> Vec<f32> {
        let width = self.sums.len() / self.counts.len();
        let experts = self.sums.chunks_exact(width).zip(&self.counts);
        let mean = |sum: &f32, n: u64| if n > 0 { sum / n as f32 } else { 1.0 };
        experts
            .flat_map(|(sums, n)| sums.iter().map(move |sum| mean(sum, *n)))
            .collect()
    }
}

/// The form of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// A GGUF.
    Gguf,
    /// The older one.
    Dat,
}

/// An importance file.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Imatrix {
    /// By the name of the matrix, such as `blk.0.ffn_down_exps.weight`.
    pub entries: BTreeMap<String, Importance>,
    /// The texts that it was made from.
    pub datasets: Vec<String>,
    /// Chunks of text that were read; 0 if the file does not say.
    pub chunks: u32,
    /// Tokens of a chunk; 0 if the file does not say.
    pub chunk_size: u32,
}

/// An old file may have this many bytes; that of 8x22B has 30 MB.
const MAX_FILE: u64 = 1 << 31;

const SUMS: &str = ".in_sum2";
const COUNTS: &str = ".counts";

impl Imatrix {
    /// Reads an importance file of either form.
    ///
    /// # Errors
    /// If it cannot be read, is no such file, or holds numbers that are not finite or are negative.
    pub fn read(path: &Path) -> Result<Imatrix> {
        let mut start = Vec::new();
        let file = File::open(path).map_err(Error::io(path, "open"))?;
        (&file)
            .take(MAGIC.len() as u64)
            .read_to_end(&mut start)
            .map_err(Error::io(path, "read"))?;
        let found = if start == MAGIC {
            Imatrix::from_gguf(&Gguf::open(path)?)?
        } else {
            let len = file.metadata().map_err(Error::io(path, "read"))?.len();
            if len > MAX_FILE {
                let expected = format!("at most {MAX_FILE} bytes");
                return Err(Error::invalid(path, "the importance file", expected, len));
            }
            let mut bytes = start;
            (&file)
                .take(MAX_FILE)
                .read_to_end(&mut bytes)
                .map_err(Error::io(path, "read"))?;
            Imatrix::from_old(path, &bytes)?
        };
        if found.entries.is_empty() {
            let expected = "at least one matrix";
            return Err(Error::invalid(
                path,
                "the importance file",
                expected,
                "none",
            ));
        }
        for (name, entry) in &found.entries {
            let bad = |x: &&f32| !x.is_finite() || **x < 0.0;
            if let Some(bad) = entry.sums.iter().find(bad) {
                let what = format!("the importance of {}", shown(name));
                return Err(Error::invalid(path, what, "numbers of 0 or more", bad));
            }
        }
        Ok(found)
    }

    /// The importance of a tensor's columns: `(columns · experts)`, or `None` if nothing is known of it.
    ///
    /// An embedding, which is looked up rather than multiplied, may be without; so may one whose entry
    /// has another size, as an output matrix that it shares may have been measured.
    ///
    /// # Errors
    /// If what is known has another size than the tensor.
    pub fn of(&self, file: &Path, name: &str, shape: &[u64]) -> Result<Option<Vec<f32>>> {
        let Some(entry) = self.entries.get(name) else {
            return Ok(None);
        };
        let experts = shape.get(2).copied().unwrap_or(1);
        let want = shape.first().and_then(|k| k.checked_mul(experts));
        if want == Some(entry.sums.len() as u64) {
            return Ok(Some(entry.columns()));
        }
        if name == "token_embd.weight" {
            return Ok(None);
        }
        Err(Error::invalid(
            file,
            format!("the importance of {}", shown(name)),
            format!("{} numbers, one a column and expert", want.unwrap_or(0)),
            entry.sums.len(),
        ))
    }

    /// Experts that saw nothing: `(matrix, expert)`. Their columns count as equally important.
    pub fn unseen(&self) -> impl Iterator<Item = (&str, usize)> {
        self.entries.iter().flat_map(|(name, entry)| {
            let unseen = |(_, n): &(usize, &u64)| **n == 0;
            let experts = entry.counts.iter().enumerate().filter(unseen);
            experts.map(|(e, _)| (name.as_str(), e))
        })
    }

    fn from_gguf(file: &Gguf) -> Result<Imatrix> {
        let path = file.path();
        for key in [
            "imatrix.datasets",
            "imatrix.chunk_count",
            "imatrix.chunk_size",
        ] {
            if file.get(key).is_none() {
                let hint = "is this an importance file?";
                return Err(Error::missing(path, format!("metadata key {key}"), hint));
            }
        }
        let datasets = file.get_array("imatrix.datasets")?;
        let datasets = datasets.and_then(|a| Some(a.strs()?.map(str::to_string).collect()));
        let mut entries = BTreeMap::new();
        for sums in file.tensors() {
            let Some(name) = sums.name.strip_suffix(SUMS) else {
                continue;
            };
            let counts = format!("{name}{COUNTS}");
            let counts = file
                .tensor(&counts)
                .ok_or_else(|| Error::missing(path, format!("tensor {}", shown(&counts)), ""))?;
            let floats = |t: &Tensor| match t.format() {
                Some(Format::F32) => {
                    let bytes = file.bytes(t);
                    let floats = bytes.as_chunks::<4>().0.iter();
                    Ok(floats.map(|b| f32::from_le_bytes(*b)).collect::<Vec<_>>())
                }
                _ => Err(Error::invalid(
                    path,
                    format!("the type of tensor {}", shown(&t.name)),
                    "F32",
                    t.type_name(),
                )),
            };
            let (sums, counts) = (floats(sums)?, floats(counts)?);
            if counts.is_empty() || !sums.len().is_multiple_of(counts.len()) {
                return Err(Error::invalid(
                    path,
                    format!("the counts of {}", shown(name)),
                    format!("a divisor of {} sums", sums.len()),
                    counts.len(),
                ));
            }
            if let Some(bad) = counts.iter().find(|n| !(0.0..9e15).contains(*n)) {
                let what = format!("the counts of {}", shown(name));
                return Err(Error::invalid(path, what, "numbers of 0 or more", bad));
            }
            // Whole numbers, though stored as floats.
            let counts = counts.iter().map(|n| n.round() as u64).collect();
            entries.insert(name.to_string(), Importance { sums, counts });
        }
        Ok(Imatrix {
            entries,
            datasets: datasets.unwrap_or_default(),
            chunks: file.get_u32("imatrix.chunk_count")?.unwrap_or(0),
            chunk_size: file.get_u32("imatrix.chunk_size")?.unwrap_or(0),
        })
    }

    fn from_old(path: &Path, bytes: &[u8]) -> Result<Imatrix> {
        let mut at = 0usize;
        let mut take = |what: &str, n: usize| {
            let start = at;
            let taken = bytes.get(start..).and_then(|rest| rest.get(..n));
            at += taken.map_or(0, <[u8]>::len);
            taken.ok_or_else(|| Error::Truncated {
                file: path.to_path_buf(),
                what: what.to_string(),
                at: start as u64,
                want: n as u64,
                have: (bytes.len() - start) as u64,
            })
        };
        let count = |bytes: &[u8]| i32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        // A file of another kind mostly fails here.
        let sane = |what: &str, n: i32, low: usize, high: usize| match usize::try_from(n) {
            Ok(n) if (low..=high).contains(&n) => Ok(n),
            _ => Err(Error::invalid(
                path,
                format!("{what} of the importance file"),
                format!("{low} to {high}"),
                n,
            )),
        };
        let n = sane("the entries", count(take("the header", 4)?), 1, 1 << 20)?;
        let mut entries = BTreeMap::new();
        for i in 0..n {
            let what = format!("entry {i}");
            let len = sane("a name's length", count(take(&what, 4)?), 1, MAX_NAME)?;
            let name = String::from_utf8_lossy(take(&what, len)?).into_owned();
            let calls = sane("the calls", count(take(&what, 4)?), 0, i32::MAX as usize)?;
            let len = sane(
                "the columns",
                count(take(&what, 4)?),
                1,
                MAX_FILE as usize / 4,
            )?;
            let sums = take(&what, 4 * len)?.as_chunks::<4>().0.iter();
            let sums = sums.map(|b| f32::from_le_bytes(*b)).collect();
            let counts = vec![calls.max(1) as u64];
            entries.insert(name, Importance { sums, counts });
        }
        // What follows is missing in the oldest files.
        let mut chunks = 0;
        let mut datasets = Vec::new();
        if let Ok(n) = take("chunks", 4) {
            chunks = u32::try_from(count(n)).unwrap_or(0);
            if let Ok(len) = take("the name of the text", 4).map(count)
                && let Ok(name) = take("the name of the text", usize::try_from(len).unwrap_or(0))
                && !name.is_empty()
            {
                datasets.push(String::from_utf8_lossy(name).into_owned());
            }
        }
        Ok(Imatrix {
            entries,
            datasets,
            chunks,
            chunk_size: 0,
        })
    }

    /// Writes an importance file, as the reference does. `file` is the name used in errors.
    ///
    /// # Errors
    /// If a sum is not finite, or if `out` cannot be written.
    pub fn write(&self, form: Form, file: &Path, out: impl Write) -> Result<()> {
        for (name, entry) in &self.entries {
            if let Some(bad) = entry.sums.iter().find(|x| !x.is_finite()) {
                let what = format!("the input of {}", shown(name));
                return Err(Error::invalid(file, what, "finite numbers", bad));
            }
        }
        match form {
            Form::Gguf => self.write_gguf(file, out),
            Form::Dat => self.write_old(out).map_err(Error::io(file, "write")),
        }
    }

    fn write_gguf(&self, file: &Path, out: impl Write) -> Result<()> {
        let mut w = Writer::new();
        w.put("general.type", "imatrix")
            .put("imatrix.datasets", &self.datasets)
            .put("imatrix.chunk_count", self.chunks)
            .put("imatrix.chunk_size", self.chunk_size);
        let f32_id = Format::F32 as u32;
        for (name, entry) in &self.entries {
            let (n, experts) = (entry.sums.len() as u64, entry.counts.len() as u64);
            // A trailing dimension of 1 is left out.
            let rank = if experts > 1 { 2 } else { 1 };
            w.tensor(
                &format!("{name}{SUMS}"),
                f32_id,
                &[n / experts, experts][..rank],
            );
            w.tensor(&format!("{name}{COUNTS}"), f32_id, &[1, experts][..rank]);
        }
        let mut stream = w.start(file, out)?;
        for entry in self.entries.values() {
            stream.write(&bytes(&entry.sums))?;
            let counts: Vec<f32> = entry.counts.iter().map(|n| *n as f32).collect();
            stream.write(&bytes(&counts))?;
        }
        stream.finish().map(drop)
    }

    /// This form has one count for all experts: sums are scaled as if each had had as many calls as the
    /// busiest one. A matrix that saw nothing at all is left out.
    fn write_old(&self, mut out: impl Write) -> io::Result<()> {
        fn text(out: &mut impl Write, text: &str) -> io::Result<()> {
            out.write_all(&(text.len() as i32).to_le_bytes())?;
            out.write_all(text.as_bytes())
        }
        let most = |entry: &Importance| entry.counts.iter().copied().max().unwrap_or(0);
        let seen: Vec<_> = self.entries.iter().filter(|(_, e)| most(e) > 0).collect();
        out.write_all(&(seen.len() as i32).to_le_bytes())?;
        for (name, entry) in seen {
            let calls = most(entry).div_ceil(u64::from(self.chunk_size.max(1)));
            let columns = entry.columns();
            let sums: Vec<f32> = columns.iter().map(|mean| mean * calls as f32).collect();
            text(&mut out, name)?;
            out.write_all(&(calls as i32).to_le_bytes())?;
            out.write_all(&(sums.len() as i32).to_le_bytes())?;
            out.write_all(&bytes(&sums))?;
        }
        out.write_all(&(self.chunks as i32).to_le_bytes())?;
        text(&mut out, self.datasets.last().map_or("", String::as_str))
    }
}

fn bytes(floats: &[f32]) -> Vec<u8> {
    floats.iter().flat_map(|x| x.to_le_bytes()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_missing_tensor_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("imatrix.gguf");
        let mut writer = Writer::new();
        writer
            .put("imatrix.datasets", ["text"])
            .put("imatrix.chunk_count", 1u32)
            .put("imatrix.chunk_size", 8u32)
            .tensor("a.in_sum2", Format::F32 as u32, &[4]);
        let mut stream = writer.start(&path, Vec::new()).unwrap();
        stream.write(&[0; 16]).unwrap();
        std::fs::write(&path, stream.finish().unwrap()).unwrap();
        let said = Imatrix::read(&path).unwrap_err().to_string();
        assert!(said.ends_with("tensor `a.counts` is missing"), "{said}");
    }
}
