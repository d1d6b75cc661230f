//! safetensors files and folders of them, read only: where each tensor's bytes are.
//!
//! A file is a u64 length, a JSON header of that length with `{"name": {"dtype", "shape",
//! "data_offsets"}}`, then the data. A large model is a folder of such shards, with a
//! `model.safetensors.index.json` that says which shard has which tensor. Like the GGUF reader this
//! believes nothing: lengths and offsets are checked against the file, and the data is not touched.
//! Data may start at any address, so that whoever reads it must not view it as wider numbers in place.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::shown;
use crate::bounded;
use crate::disk;
use crate::error::{Error, Result};
use crate::quant::Format;

/// The name of the file that says which shard has which tensor.
pub const INDEX: &str = "model.safetensors.index.json";

/// Headers may have this many bytes, as in the safetensors library.
const MAX_HEADER: u64 = 100_000_000;

/// An index may have this many bytes; that of 8x22B has 200 KB.
const MAX_INDEX: u64 = 100_000_000;

/// A tensor's place in a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The element type: F32, F16 or BF16.
    pub format: Format,
    /// Elements in each dimension, outermost first, as everywhere but in GGUF.
    pub shape: Vec<u64>,
    /// Which of [`Safetensors::files`] holds it.
    pub file: usize,
    /// Where the bytes start in that file.
    pub offset: u64,
    /// How many bytes there are.
    pub bytes: u64,
}

/// The tensors of one safetensors file or of all shards of a folder.
#[derive(Debug, Default)]
pub struct Safetensors {
    files: Vec<PathBuf>,
    tensors: BTreeMap<String, Entry>,
}

impl Safetensors {
    /// Opens one file.
    ///
    /// # Errors
    /// If it cannot be read, ends too early, or has a header that is not right.
    pub fn open(path: &Path) -> Result<Safetensors> {
        let mut all = Safetensors::default();
        all.add(path)?;
        Ok(all)
    }

    /// Opens every shard of a folder: those that its index names, or else its `.safetensors` files.
    ///
    /// # Errors
    /// As for [`Safetensors::open`]; if there is no such file, a shard is missing, or a shard has not the
    /// tensors that the index says.
    pub fn open_folder(folder: &Path) -> Result<Safetensors> {
        let index = folder.join(INDEX);
        match index.is_file() {
            true => Safetensors::open_indexed(folder, &read_index(&index)?),
            false => Safetensors::open_listed(folder),
        }
    }

    /// `index`: which shard has which tensor.
    fn open_indexed(folder: &Path, index: &BTreeMap<String, String>) -> Result<Safetensors> {
        let shards: BTreeSet<&str> = index.values().map(String::as_str).collect();
        let absent: Vec<&str> = shards
            .iter()
            .copied()
            .filter(|name| !folder.join(name).is_file())
            .collect();
        if let Some(first) = absent.first() {
            return Err(Error::missing(
                folder.join(first),
                format!("this shard ({} of {})", absent.len(), shards.len()),
                format!("{INDEX} names it; download it again"),
            ));
        }
        let mut all = Safetensors::default();
        for name in &shards {
            all.add(&folder.join(name))?;
        }
        for (tensor, shard) in index {
            let found = all.tensors.get(tensor).map(|t| &all.files[t.file]);
            if found.and_then(|f| f.file_name()?.to_str()) != Some(shard) {
                return Err(Error::missing(
                    folder.join(shard),
                    format!("tensor {}", shown(tensor)),
                    format!("{INDEX} says that it is in this shard"),
                ));
            }
        }
        Ok(all)
    }

    fn open_listed(folder: &Path) -> Result<Safetensors> {
        let mut paths = Vec::new();
        for entry in std::fs::read_dir(folder).map_err(Error::io(folder, "open"))? {
            let path = entry.map_err(Error::io(folder, "read"))?.path();
            if path.extension().is_some_and(|e| e == "safetensors") {
                paths.push(path);
            }
        }
        paths.sort();
        if paths.is_empty() {
            return Err(Error::missing(
                folder,
                "a .safetensors file",
                "a folder must hold model.safetensors or shards with an index",
            ));
        }
        // Without an index the names themselves may say how many shards there are.
        if let Some(count) = paths.iter().find_map(|p| shard_of(p)).map(|(_, n)| n)
            && paths.len() != count
        {
            return Err(Error::missing(
                folder,
                format!("a shard ({} of {count} are there)", paths.len()),
                "download the rest",
            ));
        }
        let mut all = Safetensors::default();
        for path in &paths {
            all.add(path)?;
        }
        Ok(all)
    }

    /// The files, in the order in which they were opened.
    pub fn files(&self) -> &[PathBuf] {
        &self.files
    }

    /// All tensors, by name.
    pub fn tensors(&self) -> &BTreeMap<String, Entry> {
        &self.tensors
    }

    fn add(&mut self, path: &Path) -> Result<()> {
        let file = self.files.len();
        self.files.push(path.to_path_buf());
        for (name, entry) in read_header(path, file)? {
            if let Some(other) = self.tensors.insert(name.clone(), entry) {
                return Err(Error::invalid(
                    path,
                    format!("tensor {}", shown(&name)),
                    "each name once",
                    format!("another in {}", self.files[other.file].display()),
                ));
            }
        }
        Ok(())
    }
}

/// `model-00001-of-00019.safetensors`: (1, 19).
fn shard_of(path: &Path) -> Option<(usize, usize)> {
    let stem = path.file_name()?.to_str()?.strip_suffix(".safetensors")?;
    let (rest, count) = stem.rsplit_once("-of-")?;
    let (_, no) = rest.rsplit_once('-')?;
    Some((no.parse().ok()?, count.parse().ok()?))
}

/// The whole of a JSON file of at most `limit` bytes.
///
/// # Errors
/// If it cannot be read, is larger, or is not JSON.
pub fn read_json(path: &Path, limit: u64) -> Result<Value> {
    let bytes = disk::read(path, limit)?;
    bounded::json(&bytes).map_err(|e| Error::invalid(path, "the file", "JSON", e))
}

fn read_index(path: &Path) -> Result<BTreeMap<String, String>> {
    let json = read_json(path, MAX_INDEX)?;
    let map = json["weight_map"].as_object().ok_or_else(|| {
        Error::invalid(
            path,
            "weight_map",
            "an object",
            kind_of(&json["weight_map"]),
        )
    })?;
    map.iter()
        .map(|(tensor, shard)| {
            // A name, not a path: an index must not lead out of its folder.
            let plain = |s: &&str| {
                !s.is_empty() && *s != "." && *s != ".." && !s.contains(['/', '\\', ':', '\0'])
            };
            match shard.as_str().filter(plain) {
                Some(shard) => Ok((tensor.clone(), shard.to_string())),
                None => Err(Error::invalid(
                    path,
                    format!("the shard of tensor {}", shown(tensor)),
                    "the name of a file in this folder",
                    shown(&shard.to_string()),
                )),
            }
        })
        .collect()
}

fn kind_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "nothing",
        Value::Bool(_) => "a truth value",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

/// The tensors of a file, which is number `file`.
fn read_header(path: &Path, file: usize) -> Result<Vec<(String, Entry)>> {
    let meta = std::fs::metadata(path).map_err(Error::io(path, "open"))?;
    if !meta.is_file() {
        let expected = "a safetensors file";
        return Err(Error::invalid(path, "the source", expected, "no file"));
    }
    let mut input = File::open(path).map_err(Error::io(path, "open"))?;
    let size = meta.len();
    if size < 8 {
        return Err(truncated(path, "the header's length", 0, 8, size));
    }
    let mut length = [0; 8];
    input
        .read_exact(&mut length)
        .map_err(Error::io(path, "read"))?;
    let length = u64::from_le_bytes(length);
    if length > MAX_HEADER {
        return Err(Error::invalid(
            path,
            "the header's length",
            format!("at most {MAX_HEADER} bytes, as in a safetensors file"),
            length,
        ));
    }
    if length > size - 8 {
        return Err(truncated(path, "the header", 8, length, size));
    }
    let mut header = Vec::new();
    input
        .take(length)
        .read_to_end(&mut header)
        .map_err(Error::io(path, "read"))?;
    let json = bounded::json(&header).map_err(|e| Error::invalid(path, "the header", "JSON", e))?;
    let object = json
        .as_object()
        .ok_or_else(|| Error::invalid(path, "the header", "an object", kind_of(&json)))?;
    let data = 8 + length;
    let tensors = object.iter().filter(|(name, _)| *name != "__metadata__");
    let entry = |(name, value): (&String, &Value)| {
        let entry = entry(path, name, value)?;
        let end = entry.offset + entry.bytes;
        if end > size - data {
            let what = format!("tensor {}", shown(name));
            return Err(truncated(path, &what, data, end, size));
        }
        let offset = data + entry.offset;
        let entry = Entry {
            file,
            offset,
            ..entry
        };
        Ok((name.clone(), entry))
    };
    tensors.map(entry).collect()
}

/// The file of `size` bytes ends before the `want` bytes from `at` on that a thing needs.
fn truncated(path: &Path, what: &str, at: u64, want: u64, size: u64) -> Error {
    Error::Truncated {
        file: path.to_path_buf(),
        what: what.to_string(),
        at,
        want,
        have: size.saturating_sub(at),
    }
}

/// What the header says of a tensor: its offset is that within the data.
fn entry(path: &Path, name: &str, value: &Value) -> Result<Entry> {
    let what = |part: &str| format!("the {part} of tensor {}", shown(name));
    let invalid = |part: &str, expected: String, found: String| {
        Error::invalid(path, what(part), expected, found)
    };
    let dtype = value["dtype"].as_str().unwrap_or_default();
    let format = match dtype {
        "F32" => Format::F32,
        "F16" => Format::F16,
        "BF16" => Format::BF16,
        _ => {
            let expected = "F32, F16 or BF16";
            return Err(Error::unsupported(
                path,
                what("dtype"),
                expected,
                shown(dtype),
            ));
        }
    };
    let numbers = |value: &Value| -> Option<Vec<u64>> {
        value.as_array()?.iter().map(Value::as_u64).collect()
    };
    let shape = numbers(&value["shape"])
        .filter(|s| s.len() <= 8)
        .ok_or_else(|| {
            let found = shown(&value["shape"].to_string());
            invalid("shape", "a list of at most 8 sizes".into(), found)
        })?;
    let offsets = numbers(&value["data_offsets"]);
    let Some(&[start, end]) = offsets.as_deref() else {
        let found = shown(&value["data_offsets"].to_string());
        return Err(invalid("data_offsets", "a start and an end".into(), found));
    };
    let bytes = shape
        .iter()
        .try_fold(format.block_bytes() as u64, |n, &d| n.checked_mul(d));
    let Some(bytes) = bytes.filter(|bytes| end.checked_sub(start) == Some(*bytes)) else {
        let expected = format!("{} bytes for {dtype} {shape:?}", bytes.unwrap_or(u64::MAX));
        return Err(invalid("size", expected, format!("{start} to {end}")));
    };
    Ok(Entry {
        format,
        shape,
        file: 0,
        offset: start,
        bytes,
    })
}
