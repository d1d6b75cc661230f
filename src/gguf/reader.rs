//! An open model: its headers are read and checked when it is opened, its weights stay where they are.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::bytes::Bytes;
use super::header::{Entry, Header, sorted};
use super::source::Source;
use super::value::{Array, Value};
use super::{Tensor, shown};
use crate::error::{Error, Result};

/// An open model: one GGUF file, or all files of a split one.
pub struct Gguf {
    path: PathBuf,
    shards: Vec<Shard>,
    tensors: Vec<Tensor>,
    /// Places in `tensors`, by name.
    by_name: Vec<u32>,
}

/// One mapped file and where its metadata is.
struct Shard {
    source: Arc<Source>,
    version: u32,
    entries: Vec<Entry>,
    /// Places in `entries`, by key.
    by_key: Vec<u32>,
}

impl fmt::Debug for Gguf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (path, n) = (self.path.display(), self.tensors.len());
        write!(f, "Gguf({path}, {n} tensors)")
    }
}

impl Gguf {
    /// Opens a model: one file, or every file of a split model when given any one of them.
    ///
    /// Reads and checks the header of each file and touches no weight.
    ///
    /// # Errors
    /// If a file cannot be opened and mapped, is no GGUF file, ends too early, or has anything in
    /// its header that breaks the specification; if a file of a split model is missing or does not
    /// belong to the others.
    pub fn open(path: &Path) -> Result<Gguf> {
        let (given, given_tensors) = Shard::open(path)?;
        let (shards, mut tensors) = match given.split()? {
            None => (vec![given], given_tensors),
            Some(split) => open_all(split, given, given_tensors)?,
        };
        tensors.shrink_to_fit();
        let by_name = sorted(tensors.len(), |i| tensors[i].name.as_bytes()).map_err(|i| {
            Error::invalid(
                shards[tensors[i].shard].path(),
                format!("tensor {}", shown(&tensors[i].name)),
                "each name once",
                "a second tensor of that name",
            )
        })?;
        Ok(Gguf {
            path: path.to_path_buf(),
            shards,
            tensors,
            by_name,
        })
    }

    /// The path that was given to [`Gguf::open`].
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The version of the format: 1, 2 or 3.
    pub fn version(&self) -> u32 {
        self.shards[0].version
    }

    /// All metadata, in file order. In a split model the first file has it.
    pub fn metadata(&self) -> impl Iterator<Item = (&str, Value<'_>)> {
        let shard = &self.shards[0];
        shard.entries.iter().filter_map(|e| {
            let key = std::str::from_utf8(shard.key(e)).ok()?;
            Some((key, shard.value(e)?))
        })
    }

    /// The value of a key.
    pub fn get(&self, key: &str) -> Option<Value<'_>> {
        self.shards[0].get(key)
    }

    /// An unsigned 32-bit value; every integer type that fits will do.
    ///
    /// # Errors
    /// If the key's value is of another type or does not fit.
    pub fn get_u32(&self, key: &str) -> Result<Option<u32>> {
        let convert = |v: Value<'_>| v.as_u64().and_then(|v| u32::try_from(v).ok());
        self.shards[0].get_as(key, "an integer of 0 to 4294967295", convert)
    }

    /// An unsigned 64-bit value; every integer type that fits will do.
    ///
    /// # Errors
    /// If the key's value is of another type or negative.
    pub fn get_u64(&self, key: &str) -> Result<Option<u64>> {
        self.shards[0].get_u64(key)
    }

    /// A float; double precision is rounded to single.
    ///
    /// # Errors
    /// If the key's value is of another type.
    pub fn get_f32(&self, key: &str) -> Result<Option<f32>> {
        self.shards[0].get_as(key, "a float", |v| v.as_f32())
    }

    /// A truth value.
    ///
    /// # Errors
    /// If the key's value is of another type.
    pub fn get_bool(&self, key: &str) -> Result<Option<bool>> {
        self.shards[0].get_as(key, "true or false", |v| v.as_bool())
    }

    /// A string.
    ///
    /// # Errors
    /// If the key's value is of another type.
    pub fn get_str(&self, key: &str) -> Result<Option<&str>> {
        self.shards[0].get_as(key, "a string", |v| v.as_str())
    }

    /// An array.
    ///
    /// # Errors
    /// If the key's value is of another type.
    pub fn get_array(&self, key: &str) -> Result<Option<Array<'_>>> {
        self.shards[0].get_as(key, "an array", |v| v.as_array())
    }

    /// All tensors, in file order, shard after shard.
    pub fn tensors(&self) -> &[Tensor] {
        &self.tensors
    }

    /// The tensor of this name.
    pub fn tensor(&self, name: &str) -> Option<&Tensor> {
        let by = |&i: &u32| self.tensors[i as usize].name.as_str().cmp(name);
        let at = self.by_name.binary_search_by(by).ok()?;
        Some(&self.tensors[self.by_name[at] as usize])
    }

    /// A tensor's bytes, in the mapped file.
    ///
    /// # Panics
    /// If the tensor is not one of this model's.
    pub fn bytes(&self, t: &Tensor) -> Bytes {
        let source = &self.shards[t.shard].source;
        // An open file's tensors lie inside its map, whose length is a usize.
        let (start, end) = (t.offset as usize, (t.offset + t.bytes) as usize);
        assert!(
            end <= source.map().len(),
            "tensor {} is of another file",
            t.name
        );
        Bytes::in_file(source, start..end)
    }

    /// Bytes of all files together.
    pub fn file_bytes(&self) -> u64 {
        self.sources().map(|s| s.map().len() as u64).sum()
    }

    /// Everything before the first tensor of each file.
    pub(super) fn headers(&self) -> impl Iterator<Item = &[u8]> {
        self.shards.iter().enumerate().map(|(i, shard)| {
            let starts = self
                .tensors
                .iter()
                .filter(|t| t.shard == i)
                .map(|t| t.offset);
            // An open file's tensors lie inside its map.
            let map = shard.source.map();
            let end = starts.min().map_or(map.len(), |at| at as usize);
            &map[..end]
        })
    }

    /// The paths of all files, in order; [`Tensor::shard`] counts these.
    pub fn shards(&self) -> impl ExactSizeIterator<Item = &Path> {
        self.shards.iter().map(|s| s.source.path())
    }

    /// All files, in order.
    pub fn sources(&self) -> impl ExactSizeIterator<Item = &Arc<Source>> {
        self.shards.iter().map(|s| &s.source)
    }
}

/// What a file says about the split model that it is a part of.
struct Split {
    /// This file's number, from 0.
    no: usize,
    /// How many files there are.
    count: usize,
}

const SPLIT_COUNT: &str = "split.count";
const SPLIT_NO: &str = "split.no";
const SPLIT_TENSORS: &str = "split.tensors.count";

/// Opens the other files of a split model and puts all of them in order.
fn open_all(
    split: Split,
    given: Shard,
    given_tensors: Vec<Tensor>,
) -> Result<(Vec<Shard>, Vec<Tensor>)> {
    let Split { no, count } = split;
    let suffix = |no: usize| format!("-{:05}-of-{count:05}.gguf", no + 1);
    let name = given.path().file_name().and_then(|n| n.to_str());
    let Some(stem) = name.and_then(|n| n.strip_suffix(&suffix(no))) else {
        return Err(Error::invalid(
            given.path(),
            format!("the name of file {} of {count} of a split model", no + 1),
            format!("a name that ends in {}", suffix(no)),
            name.map_or_else(|| "a name that is not UTF-8".to_string(), shown),
        ));
    };
    let stem = stem.to_string();
    let path = given.path().to_path_buf();
    let mut given = Some((given, given_tensors));
    let mut shards = Vec::new();
    let mut tensors = Vec::new();
    for i in 0..count {
        let (shard, its) = match given.take_if(|_| i == no) {
            Some(given) => given,
            None => {
                let path = path.with_file_name(format!("{stem}{}", suffix(i)));
                if !path.exists() {
                    return Err(Error::missing(
                        &path,
                        format!("file {} of {count} of the split model", i + 1),
                        format!("all {count} files must lie in one folder"),
                    ));
                }
                Shard::open(&path)?
            }
        };
        let found = shard.split()?;
        let found = found.map_or((0, 1), |s| (s.no, s.count));
        if found != (i, count) {
            return Err(Error::invalid(
                shard.path(),
                "its place in the split model",
                format!("file {} of {count}", i + 1),
                format!("file {} of {}", found.0 + 1, found.1),
            ));
        }
        shards.push(shard);
        tensors.extend(its.into_iter().map(|t| Tensor { shard: i, ..t }));
    }
    for shard in &shards {
        let said = shard.get_u64(SPLIT_TENSORS)?;
        if let Some(said) = said.filter(|&n| n != tensors.len() as u64) {
            return Err(Error::invalid(
                shard.path(),
                format!("metadata `{SPLIT_TENSORS}`"),
                format!("{} tensors, as all files together have", tensors.len()),
                said,
            ));
        }
    }
    Ok((shards, tensors))
}

impl Shard {
    fn path(&self) -> &Path {
        self.source.path()
    }

    /// Opens, maps and checks one file.
    fn open(path: &Path) -> Result<(Shard, Vec<Tensor>)> {
        let source = Source::open(path)?;
        let (version, entries, by_key, tensors) = Header::new(path, source.map()).read()?;
        let shard = Shard {
            source: Arc::new(source),
            version,
            entries,
            by_key,
        };
        Ok((shard, tensors))
    }

    fn key(&self, e: &Entry) -> &[u8] {
        e.key(self.source.map())
    }

    fn value(&self, e: &Entry) -> Option<Value<'_>> {
        e.value(self.source.map(), self.version >= 2)
    }

    fn get(&self, key: &str) -> Option<Value<'_>> {
        let by = |&i: &u32| self.key(&self.entries[i as usize]).cmp(key.as_bytes());
        let at = self.by_key.binary_search_by(by).ok()?;
        self.value(&self.entries[self.by_key[at] as usize])
    }

    fn get_as<'a, T>(
        &'a self,
        key: &str,
        expected: &str,
        convert: impl Fn(Value<'a>) -> Option<T>,
    ) -> Result<Option<T>> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        match convert(value) {
            Some(v) => Ok(Some(v)),
            None => Err(Error::invalid(
                self.path(),
                format!("metadata {}", shown(key)),
                expected,
                format!("{} {value}", value.kind().name()),
            )),
        }
    }

    fn get_u64(&self, key: &str) -> Result<Option<u64>> {
        self.get_as(key, "an integer of 0 or more", |v| v.as_u64())
    }

    /// Which part of a split model this file is; `None` for a whole one.
    fn split(&self) -> Result<Option<Split>> {
        // The specification's type for both is u16.
        let small = |v: Value<'_>| v.as_u64().and_then(|v| u16::try_from(v).ok());
        let count = self.get_as(SPLIT_COUNT, "an integer of 0 to 65535", small)?;
        // One file of one, or a left-over 0, is a whole model.
        let Some(count) = count.filter(|&n| n > 1) else {
            return Ok(None);
        };
        let below = |v: Value<'_>| small(v).filter(|&no| no < count);
        let expected = format!("an integer of 0 to {}", count - 1);
        let no = self
            .get_as(SPLIT_NO, &expected, below)?
            .ok_or_else(|| Error::missing(self.path(), format!("metadata `{SPLIT_NO}`"), ""))?;
        Ok(Some(Split {
            no: no.into(),
            count: count.into(),
        }))
    }
}
