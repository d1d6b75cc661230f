//! What will be written: the format of every tensor, the metadata, the files and their sizes.

use std::path::{Path, PathBuf};

use octet::error::{Error, Result};
use octet::gguf::writer::{Plan as FilePlan, Writer};
use octet::gguf::{Imatrix, Tensor};
use octet::near::did_you_mean;
use octet::quant::recipe::{self, Chooser, Recipe, Role, Traits};
use octet::quant::{self, Format};
use regex::Regex;

use crate::source::{Source, SourceTensor, is_float, type_bytes, type_name};

/// What to make of a source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Every tensor as it is.
    Copy,
    /// A mixture of formats.
    Recipe(Recipe),
}

impl Kind {
    /// Its name on the command line.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Kind::Copy => "COPY",
            Kind::Recipe(recipe) => recipe.name(),
        }
    }
}

/// How the new file is cut into several.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shards {
    /// Not at all.
    One,
    /// Into this many, of about equal size.
    Count(usize),
    /// Into as many as it takes for the tensors of each to have at most this many bytes.
    Bytes(u64),
}

/// The user's wishes.
#[derive(Debug)]
pub(crate) struct Options {
    /// Formats by name: the first expression that is found in a tensor's name decides.
    pub(crate) by_name: Vec<(Regex, Format)>,
    /// The format of `output.weight`.
    pub(crate) output: Option<Format>,
    /// The format of `token_embd.weight`.
    pub(crate) embedding: Option<Format>,
    /// No mixture: the base format everywhere.
    pub(crate) pure: bool,
    /// Whether quantized weights may be quantized again.
    pub(crate) requantize: bool,
    /// How the files are cut.
    pub(crate) shards: Shards,
}

/// One of the files to be written, or all shards of it.
#[derive(Debug)]
pub(crate) struct Output {
    /// What it is made by.
    pub(crate) kind: Kind,
    /// The format of each tensor, in the order of [`Source::tensors`].
    pub(crate) types: Vec<u32>,
    /// The files.
    pub(crate) files: Vec<OutputFile>,
    /// Things that the user should know.
    pub(crate) notes: Vec<String>,
}

/// One file.
#[derive(Debug)]
pub(crate) struct OutputFile {
    /// Its final path.
    pub(crate) path: PathBuf,
    /// Where everything is in it.
    pub(crate) plan: FilePlan,
    /// The number of its first tensor.
    pub(crate) first: usize,
}

impl Output {
    /// Bytes of all files.
    pub(crate) fn bytes(&self) -> u64 {
        self.files.iter().map(|f| f.plan.file_bytes).sum()
    }

    /// Bytes of tensor `i`.
    pub(crate) fn tensor_bytes(&self, i: usize) -> u64 {
        let (file, at) = self.place(i);
        self.files[file].plan.tensors[at].bytes
    }

    /// Which file tensor `i` is in, and its number there.
    pub(crate) fn place(&self, i: usize) -> (usize, usize) {
        let file = self.files.partition_point(|f| f.first <= i) - 1;
        (file, i - self.files[file].first)
    }
}

/// Decides everything about one output. `path` is that of the file, before it is cut.
///
/// # Errors
/// If a tensor is of a type that octet cannot decode, or is quantized already and may not be again, or if
/// the file could not be read back.
pub(crate) fn output(
    source: &Source,
    kind: Kind,
    path: &Path,
    imatrix: Option<&ImatrixFile>,
    options: &Options,
) -> Result<Output> {
    let mut notes = Vec::new();
    let types = match kind {
        Kind::Copy => copies(source)?,
        Kind::Recipe(recipe) => formats(source, recipe, imatrix.is_some(), options, &mut notes)?,
    };
    if let (Some(file), Kind::Recipe(_)) = (imatrix, kind) {
        note_missing(source, &types, file, &mut notes);
    }
    let mut head = source.metadata.clone();
    finish_metadata(&mut head, source, kind, &types, imatrix);
    let files = cut(source, &types, &head, path, options.shards)?;
    Ok(Output {
        kind,
        types,
        files,
        notes,
    })
}

fn copies(source: &Source) -> Result<Vec<u32>> {
    let copy = |t: &SourceTensor| {
        if t.heads.is_some() || is_float(t.kept) {
            return Ok(t.kept);
        }
        t.type_id().ok_or_else(|| {
            let of: Vec<_> = t.pieces.iter().map(|p| type_name(p.type_id)).collect();
            Error::unsupported(
                &source.path,
                format!("copying the experts of {} into one tensor", t.name),
                "one type for all of them; name a TYPE instead of COPY",
                of.join(", "),
            )
        })
    };
    source.tensors.iter().map(copy).collect()
}

fn formats(
    source: &Source,
    recipe: Recipe,
    importance: bool,
    options: &Options,
    notes: &mut Vec<String>,
) -> Result<Vec<u32>> {
    let is = |role: Role| move |t: &&SourceTensor| Role::of(&t.name) == role;
    let traits = Traits {
        n_layer: source.n_layer,
        n_head: source.n_head,
        n_kv: source.n_kv,
        n_expert: source.n_expert,
        tied: !source.tensors.iter().any(|t| is(Role::Output)(&t)),
        n_attn_v: source.tensors.iter().filter(is(Role::Value)).count(),
        importance,
    };
    let mut chooser = Chooser::new(recipe, traits, options.output);
    let mut types = Vec::with_capacity(source.tensors.len());
    for t in &source.tensors {
        if !recipe::is_quantizable(&t.name, &t.shape) {
            types.push(t.kept);
            continue;
        }
        let role = Role::of(&t.name);
        let named = || options.by_name.iter().find(|(re, _)| re.is_match(&t.name));
        let wanted = match (role, options.embedding, options.output) {
            (Role::Embedding, Some(format), _) => format,
            (Role::Output, _, Some(format)) => format,
            _ if !recipe.is_quantized() => recipe.base(),
            _ => match named() {
                Some((_, format)) => *format,
                None if options.pure => recipe.base(),
                None => chooser.next(&t.name, t.columns()),
            },
        };
        let format = recipe::fitting(wanted, t.columns());
        if format != wanted {
            notes.push(format!(
                "{}: rows of {} are no whole {} blocks; {} instead",
                t.name,
                t.columns(),
                wanted.name(),
                format.name()
            ));
        }
        check_source(source, t, format, options)?;
        types.push(format as u32);
    }
    Ok(types)
}

/// Whether `t` can and may become `format`.
fn check_source(
    source: &Source,
    t: &SourceTensor,
    format: Format,
    options: &Options,
) -> Result<()> {
    for piece in &t.pieces {
        if piece.type_id == format as u32 {
            continue;
        }
        let name = type_name(piece.type_id);
        if Format::from_id(piece.type_id).is_none() {
            let known: Vec<_> = Format::ALL.iter().map(|f| f.name()).collect();
            return Err(Error::unsupported(
                &source.path,
                format!("converting tensor {}", t.name),
                format!("one of {}", known.join(", ")),
                name,
            ));
        }
        if !is_float(piece.type_id) && format != Format::F32 && !options.requantize {
            return Err(Error::Usage(format!(
                "{}: tensor {} is quantized already (expected F32, F16 or BF16, found {name}); \
                 what its first quantizing lost is lost, so start from the float model, or insist \
                 with --allow-requantize",
                source.path.display(),
                t.name
            )));
        }
    }
    Ok(())
}

/// An importance file with the path it came from.
#[derive(Debug)]
pub(crate) struct ImatrixFile {
    /// Where it is, as the user wrote it.
    pub(crate) path: PathBuf,
    /// What it says.
    pub(crate) data: Imatrix,
}

impl ImatrixFile {
    /// The importance of a tensor's columns, expert after expert.
    ///
    /// Files know fused experts or single ones (those of old runners); either serves for either.
    ///
    /// # Errors
    /// If it has another size than the tensor.
    pub(crate) fn of(&self, t: &SourceTensor) -> Result<Option<Vec<f32>>> {
        if let Some(all) = self.data.of(&self.path, &t.name, &t.shape)? {
            return Ok(Some(all));
        }
        let k = t.columns() as usize;
        let mut parts: Vec<&str> = t.name.split('.').collect();
        if let Some(stem) = t.name.strip_suffix("_exps.weight") {
            let mut all = Vec::new();
            for e in 0..t.shape.get(2).copied().unwrap_or(0) {
                let name = format!("{stem}.{e}.weight");
                match self.data.of(&self.path, &name, &t.shape[..2])? {
                    Some(one) => all.extend(one),
                    None => return Ok(None),
                }
            }
            return Ok((!all.is_empty()).then_some(all));
        }
        if parts.len() == 5
            && let Ok(e) = parts[3].parse::<usize>()
        {
            let fused = format!("{}_exps", parts[2]);
            parts.remove(3);
            parts[2] = &fused;
            let entry = self.data.entries.get(&parts.join("."));
            return Ok(
                entry.and_then(|entry| entry.columns().chunks_exact(k).nth(e).map(<[f32]>::to_vec))
            );
        }
        Ok(None)
    }
}

fn note_missing(source: &Source, types: &[u32], file: &ImatrixFile, notes: &mut Vec<String>) {
    let uses = |type_id: u32| !is_float(type_id) && type_id != Format::Q8_0 as u32;
    let missing: Vec<&str> = source
        .tensors
        .iter()
        .zip(types)
        .filter(|(t, type_id)| {
            let looked_up = matches!(Role::of(&t.name), Role::Embedding | Role::Output);
            uses(**type_id) && !looked_up && matches!(file.of(t), Ok(None))
        })
        .map(|(t, _)| t.name.as_str())
        .collect();
    if let Some(first) = missing.first() {
        notes.push(format!(
            "{}: nothing is known of {} tensors, such as {first}",
            file.path.display(),
            missing.len()
        ));
    }
}

/// The reference's key for the version of the quantized formats, and its value since 2023.
const QUANT_VERSION: (&str, u32) = ("general.quantization_version", 2);
const FILE_TYPE: &str = "general.file_type";

fn finish_metadata(
    head: &mut Writer,
    source: &Source,
    kind: Kind,
    types: &[u32],
    imatrix: Option<&ImatrixFile>,
) {
    let recipe = match kind {
        Kind::Recipe(recipe) => recipe,
        Kind::Copy if source.from_gguf => return,
        // A copy of a Hugging Face model: the type of most of its weights.
        Kind::Copy => {
            let of = |f: Format| types.iter().filter(|t| **t == f as u32).count();
            [Recipe::F16, Recipe::BF16]
                .into_iter()
                .filter(|r| of(r.base()) > 0)
                .max_by_key(|r| of(r.base()))
                .unwrap_or(Recipe::F32)
        }
    };
    // The reference's converter writes float files, and its quantizer moves these keys to the end.
    if source.from_gguf || recipe.is_quantized() {
        head.remove(QUANT_VERSION.0).remove(FILE_TYPE);
    }
    head.put(QUANT_VERSION.0, QUANT_VERSION.1);
    head.put(FILE_TYPE, recipe.file_type());
    let Some(file) = imatrix.filter(|_| kind != Kind::Copy) else {
        return;
    };
    let cut = |text: &str| {
        // The reference's strings end at 127 bytes.
        let mut end = text.len().min(127);
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        text[..end].to_string()
    };
    head.put(
        "quantize.imatrix.file",
        cut(&file.path.display().to_string()),
    );
    if let Some(dataset) = file.data.datasets.first() {
        head.put("quantize.imatrix.dataset", cut(dataset));
    }
    let entries = u32::try_from(file.data.entries.len()).unwrap_or(u32::MAX);
    head.put("quantize.imatrix.entries_count", entries);
    if file.data.chunks > 0 {
        head.put("quantize.imatrix.chunks_count", file.data.chunks);
    }
}

/// Distributes the tensors over files.
fn cut(
    source: &Source,
    types: &[u32],
    head: &Writer,
    path: &Path,
    shards: Shards,
) -> Result<Vec<OutputFile>> {
    let sizes: Vec<u64> = source
        .tensors
        .iter()
        .zip(types)
        .map(|(t, id)| type_bytes(*id, t.elements()).next_multiple_of(32))
        .collect();
    let total: u64 = sizes.iter().sum();
    let mut starts = vec![0];
    let mut here = 0u64;
    let mut before = 0u64;
    for (i, size) in sizes.iter().enumerate().skip(1) {
        here += sizes[i - 1];
        before += sizes[i - 1];
        let full = match shards {
            Shards::One => false,
            Shards::Bytes(most) => here + size > most,
            Shards::Count(n) => {
                let left = sizes.len() - i;
                let missing = n.saturating_sub(starts.len());
                let due =
                    u128::from(before) * n as u128 >= u128::from(total) * starts.len() as u128;
                missing > 0 && (due || left <= missing)
            }
        };
        if full {
            starts.push(i);
            here = 0;
        }
    }
    let n = starts.len();
    if n > usize::from(u16::MAX) {
        return Err(Error::Usage(format!(
            "{n} shards are too many (expected at most {}); a larger --split-size helps",
            u16::MAX
        )));
    }
    let stem = path.with_extension("");
    let mut files = Vec::with_capacity(n);
    for (no, &first) in starts.iter().enumerate() {
        let end = starts.get(no + 1).copied().unwrap_or(types.len());
        let mut writer = match no {
            0 => head.clone(),
            _ => Writer::new(),
        };
        let mut path = path.to_path_buf();
        if n > 1 {
            writer.put("split.no", no as u16);
            writer.put("split.count", n as u16);
            writer.put("split.tensors.count", types.len() as i32);
            let mut name = stem.clone().into_os_string();
            name.push(format!("-{:05}-of-{n:05}.gguf", no + 1));
            path = PathBuf::from(name);
        }
        for (t, id) in source.tensors.iter().zip(types).take(end).skip(first) {
            writer.tensor(&t.name, *id, &t.shape);
        }
        let plan = writer.plan(&path)?;
        files.push(OutputFile { path, plan, first });
    }
    Ok(files)
}

/// Bits per weight of some tensors.
pub(crate) fn bits_per_weight<'a>(tensors: impl Iterator<Item = &'a Tensor>) -> f64 {
    let (bytes, weights) = tensors.fold((0, 0), |(b, w), t| (b + t.bytes, w + t.elements()));
    bytes as f64 * 8.0 / weights as f64
}

/// A format that a file may have, by its name in any case.
pub(crate) fn parse_format(name: &str) -> Result<Format, String> {
    let known = || Format::ALL.iter().copied();
    known()
        .find(|f| f.name().eq_ignore_ascii_case(name))
        .ok_or_else(|| {
            let names: Vec<_> = known().map(quant::Format::name).collect();
            let meant = did_you_mean(name, names.iter().copied());
            let meant = meant.map_or(String::new(), |meant| format!("; {meant}"));
            let names = names.join(", ");
            format!("{name} is no format (expected one of {names}){meant}")
        })
}
