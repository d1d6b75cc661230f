//! A GGUF file: its header is read and checked when it is opened, its weights stay where they are.
//!
//! Every length, count and offset of a header is an outsider's claim. Each is checked against the
//! bytes that are really there before anything is read or allocated by it, so that opening takes at
//! most a small multiple of the header's size in memory and never touches a weight.

use std::fmt::{self, Display};
use std::ops::{Deref, Range};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use memmap2::MmapMut;

use super::mistaken;
use super::source::Source;
use super::value::{Array, Fault, Kind, MAX_DEPTH, Scan, Value};
use super::{
    ALIGNMENT_KEY, DEFAULT_ALIGNMENT, MAGIC, MAX_DIMS, MAX_NAME, Tensor, align_up, shown,
    tensor_bytes, valid_alignment,
};
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

/// Where a key and its value are in the file. 24 bytes in memory, 14 or more in the file: this is
/// what bounds the memory that a file of nothing but keys takes.
#[derive(Clone, Copy)]
struct Entry {
    key_at: usize,
    /// End of the value, which starts after the key and four bytes of type.
    end: usize,
    key_len: u16,
    kind: Kind,
}

/// A tensor's bytes (or a part of them): in the mapped file, or in memory that was filled from it. Cloning is
/// cheap, and what holds the bytes lives for as long as any of these do.
#[derive(Clone)]
pub struct Bytes {
    holder: Holder,
    range: Range<usize>,
}

#[derive(Clone)]
enum Holder {
    File(Arc<Source>),
    Memory(Arc<MmapMut>),
}

impl Bytes {
    /// A part of what was read into memory.
    ///
    /// # Panics
    /// If the range is not inside.
    pub fn in_memory(memory: &Arc<MmapMut>, range: Range<usize>) -> Bytes {
        assert!(range.start <= range.end && range.end <= memory.len());
        Bytes {
            holder: Holder::Memory(Arc::clone(memory)),
            range,
        }
    }

    /// The file they lie in and their place in it; nothing for those in memory.
    pub fn place(&self) -> Option<(&Arc<Source>, Range<usize>)> {
        match &self.holder {
            Holder::File(source) => Some((source, self.range.clone())),
            Holder::Memory(_) => None,
        }
    }

    /// A part of these bytes.
    ///
    /// # Panics
    /// If the range ends after these bytes do.
    pub fn slice(&self, range: Range<usize>) -> Bytes {
        assert!(range.start <= range.end && range.end <= self.range.len());
        Bytes {
            holder: self.holder.clone(),
            range: self.range.start + range.start..self.range.start + range.end,
        }
    }
}

impl Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        let all: &[u8] = match &self.holder {
            Holder::File(source) => source.map(),
            Holder::Memory(memory) => memory,
        };
        &all[self.range.clone()]
    }
}

impl AsRef<[u8]> for Bytes {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl fmt::Debug for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Bytes({:?})", self.range)
    }
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
        self.shards[0].get_as(key, "an integer of 0 or more", |v| v.as_u64())
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
        Bytes {
            holder: Holder::File(Arc::clone(source)),
            range: start..end,
        }
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

/// The places `0..n` sorted by their bytes, or a place whose bytes are there twice.
fn sorted<'a>(n: usize, bytes: impl Fn(usize) -> &'a [u8]) -> Result<Vec<u32>, usize> {
    // Counts were checked to fit `u32`.
    let mut order: Vec<u32> = (0..n as u32).collect();
    order.sort_unstable_by(|&a, &b| (bytes(a as usize), a).cmp(&(bytes(b as usize), b)));
    match order
        .windows(2)
        .find(|w| bytes(w[0] as usize) == bytes(w[1] as usize))
    {
        Some(twice) => Err(twice[1] as usize),
        None => Ok(order),
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
        Header {
            path,
            scan: Scan::new(source.map(), true),
            data: source.map(),
        }
        .read()
        .map(|(version, entries, by_key, tensors)| {
            let shard = Shard {
                source: Arc::new(source),
                version,
                entries,
                by_key,
            };
            (shard, tensors)
        })
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

impl Entry {
    fn key<'a>(&self, data: &'a [u8]) -> &'a [u8] {
        let end = self.key_at + usize::from(self.key_len);
        data.get(self.key_at..end).unwrap_or_default()
    }

    /// The value. `None` cannot come of a file that stays as it was when it was opened.
    fn value<'a>(&self, data: &'a [u8], wide: bool) -> Option<Value<'a>> {
        let start = self.key_at + usize::from(self.key_len) + 4;
        let mut scan = Scan::new(data.get(start..self.end)?, wide);
        match self.kind {
            // Not checked once more: that would walk over all strings of a vocabulary.
            Kind::Array => scan.checked_array().ok().map(Value::Array),
            kind => scan.value(kind, 0).ok(),
        }
    }
}

/// Reads the header of one file.
struct Header<'a> {
    path: &'a Path,
    scan: Scan<'a>,
    data: &'a [u8],
}

/// A header as it was read: version, metadata, the order of the keys, tensors.
type Read = (u32, Vec<Entry>, Vec<u32>, Vec<Tensor>);

/// Bytes of the fixed part of a header, version 2 and 3: magic, version, two counts.
const FIXED: u64 = 24;

impl<'a> Header<'a> {
    /// Turns a fault into an error that names the thing.
    fn wrong(&self, fault: Fault, what: impl Display) -> Error {
        match fault {
            Fault::End { at, want, have } => Error::Truncated {
                file: self.path.to_path_buf(),
                what: what.to_string(),
                at: at as u64,
                want,
                have,
            },
            Fault::Utf8 { at } => Error::invalid(
                self.path,
                what,
                "UTF-8 text",
                format!("bytes at {at} that are not"),
            ),
            Fault::Bool { found } => Error::invalid(self.path, what, "0 or 1 for a bool", found),
            Fault::Kind { found } => Error::invalid(
                self.path,
                what,
                "a value type of 0 to 12",
                format!("type {found}"),
            ),
            Fault::Depth => Error::invalid(
                self.path,
                what,
                format!("arrays nested at most {MAX_DEPTH} deep"),
                "more",
            ),
        }
    }

    fn read(mut self) -> Result<Read> {
        let version = self.version()?;
        let n_tensors = self.fixed(Scan::count)?;
        let n_keys = self.fixed(Scan::count)?;
        let (entries, by_key) = self.metadata(n_keys)?;
        let alignment = self.alignment(&entries, &by_key)?;
        let tensors = self.tensors(n_tensors, alignment)?;
        Ok((version, entries, by_key, tensors))
    }

    fn fixed<T>(&mut self, read: impl FnOnce(&mut Scan<'a>) -> Result<T, Fault>) -> Result<T> {
        // Said of the whole fixed part, so that the message has a size which means something.
        read(&mut self.scan).map_err(|_| Error::Truncated {
            file: self.path.to_path_buf(),
            what: "the header".to_string(),
            at: 0,
            want: FIXED,
            have: self.data.len() as u64,
        })
    }

    fn version(&mut self) -> Result<u32> {
        if !self.data.starts_with(MAGIC) {
            if MAGIC.starts_with(self.data) {
                return self.fixed(|s| s.take(FIXED).map(|_| 0));
            }
            return Err(Error::unsupported(
                self.path,
                "this kind of file",
                "a GGUF file",
                mistaken::identify(self.path, self.data),
            ));
        }
        self.scan = self.scan.clone().at(MAGIC.len());
        let version = self.fixed(Scan::u32)?;
        if (1..=3).contains(&version.swap_bytes()) {
            return Err(Error::unsupported(
                self.path,
                "its byte order",
                "little-endian",
                "big-endian; the tool that wrote it can convert it",
            ));
        }
        if !(1..=3).contains(&version) {
            return Err(Error::unsupported(
                self.path,
                "its GGUF version",
                "1, 2 or 3",
                version,
            ));
        }
        self.scan = Scan::new(self.data, version >= 2).at(self.scan.position());
        Ok(version)
    }

    /// Whether `count` things of at least `min` bytes can still come, so that room for them may be
    /// made before they are read.
    fn room(&self, count: u64, min: u64, what: &str) -> Result<usize> {
        let want = count.saturating_mul(min);
        if want > self.scan.left() || u32::try_from(count).is_err() {
            let at = self.scan.position();
            let have = self.scan.left();
            let what = format!("the list of {count} {what}");
            return Err(self.wrong(Fault::End { at, want, have }, what));
        }
        Ok(count as usize)
    }

    /// A key or a name.
    fn name(&mut self, what: impl Display) -> Result<&str> {
        match self.scan.string() {
            Err(fault) => Err(self.wrong(fault, what)),
            Ok(name) if name.len() > MAX_NAME => Err(Error::invalid(
                self.path,
                what,
                format!("at most {MAX_NAME} bytes"),
                name.len(),
            )),
            Ok(name) => Ok(name),
        }
    }

    fn metadata(&mut self, count: u64) -> Result<(Vec<Entry>, Vec<u32>)> {
        // A key's length, its type, a value of a byte.
        let min = self.scan.count_width() + 4 + 1;
        let n = self.room(count, min, "metadata entries")?;
        let mut entries = Vec::with_capacity(n);
        for i in 0..n {
            let key_len = self
                .name(format_args!("the name of metadata entry {}", i + 1))?
                .len();
            let key_at = self.scan.position() - key_len;
            let mut scan = self.scan.clone();
            let value = scan.kind().and_then(|kind| {
                scan.value(kind, 0)?;
                Ok(kind)
            });
            let kind = value.map_err(|fault| {
                let key = String::from_utf8_lossy(&self.data[key_at..][..key_len]);
                self.wrong(fault, format_args!("metadata {}", shown(&key)))
            })?;
            self.scan = scan;
            entries.push(Entry {
                key_at,
                end: self.scan.position(),
                key_len: key_len as u16,
                kind,
            });
        }
        let by_key = sorted(n, |i| entries[i].key(self.data)).map_err(|i| {
            let key = String::from_utf8_lossy(entries[i].key(self.data));
            Error::invalid(
                self.path,
                format!("metadata {}", shown(&key)),
                "each key once",
                "a second entry of that key",
            )
        })?;
        Ok((entries, by_key))
    }

    fn alignment(&self, entries: &[Entry], by_key: &[u32]) -> Result<u64> {
        let by = |&i: &u32| {
            entries[i as usize]
                .key(self.data)
                .cmp(ALIGNMENT_KEY.as_bytes())
        };
        let Ok(at) = by_key.binary_search_by(by) else {
            return Ok(DEFAULT_ALIGNMENT);
        };
        let value = entries[by_key[at] as usize].value(self.data, self.scan.wide());
        match value.and_then(|v| v.as_u64()) {
            Some(alignment) if valid_alignment(alignment) => Ok(alignment),
            _ => Err(Error::invalid(
                self.path,
                format!("metadata `{ALIGNMENT_KEY}`"),
                "a power of two that is a multiple of 8",
                value.map_or_else(String::new, |v| v.to_string()),
            )),
        }
    }

    fn tensors(&mut self, count: u64, alignment: u64) -> Result<Vec<Tensor>> {
        // A name's length, the number of dimensions and one of them, type, offset.
        let min = 2 * self.scan.count_width() + 4 + 4 + 8;
        let n = self.room(count, min, "tensors")?;
        let mut tensors = Vec::with_capacity(n);
        for i in 0..n {
            tensors.push(self.tensor(i)?);
        }
        // Offsets are counted from here; a file without tensors may end before.
        let start = align_up(self.scan.position() as u64, alignment);
        for t in &mut tensors {
            self.place(t, start, alignment)?;
        }
        let mut order: Vec<u32> = (0..n as u32).collect();
        order.sort_unstable_by_key(|&i| tensors[i as usize].offset);
        for w in order.windows(2) {
            let (a, b) = (&tensors[w[0] as usize], &tensors[w[1] as usize]);
            if a.offset + a.bytes > b.offset {
                return Err(Error::invalid(
                    self.path,
                    format!("the offset of tensor {}", shown(&b.name)),
                    format!(
                        "{} or more, the end of {}",
                        a.offset + a.bytes,
                        shown(&a.name)
                    ),
                    b.offset,
                ));
            }
        }
        Ok(tensors)
    }

    /// One entry of the list of tensors; its offset is still relative.
    fn tensor(&mut self, i: usize) -> Result<Tensor> {
        let name = self
            .name(format_args!("the name of tensor {}", i + 1))?
            .to_string();
        let mut scan = self.scan.clone();
        let mut entry = || {
            let n_dims = scan.u32()?;
            if n_dims as usize > MAX_DIMS {
                return Ok(Err(n_dims));
            }
            let mut shape = Vec::with_capacity(n_dims as usize);
            for _ in 0..n_dims {
                shape.push(scan.count()?);
            }
            Ok(Ok((shape, scan.u32()?, scan.u64()?)))
        };
        let what = |part: &str| format!("the {part} of tensor {}", shown(&name));
        let (shape, type_id, offset) = match entry() {
            Err(fault) => return Err(self.wrong(fault, what("entry"))),
            Ok(Err(n_dims)) => {
                return Err(Error::invalid(
                    self.path,
                    what("shape"),
                    format!("1 to {MAX_DIMS} dimensions"),
                    n_dims,
                ));
            }
            Ok(Ok(entry)) => entry,
        };
        self.scan = scan;
        let bytes = tensor_bytes(type_id, &shape)
            .map_err(|bad| Error::invalid(self.path, what(bad.what), bad.expected, bad.found))?;
        Ok(Tensor {
            name,
            type_id,
            shape,
            shard: 0,
            offset,
            bytes,
        })
    }

    /// Makes a tensor's offset absolute and checks that its bytes are in the file.
    fn place(&self, t: &mut Tensor, start: Option<u64>, alignment: u64) -> Result<()> {
        if !t.offset.is_multiple_of(alignment) {
            return Err(Error::invalid(
                self.path,
                format!("the offset of tensor {}", shown(&t.name)),
                format!("a multiple of {alignment}"),
                t.offset,
            ));
        }
        let size = self.data.len() as u64;
        let at = start.and_then(|start| start.checked_add(t.offset));
        let end = at.and_then(|at| at.checked_add(t.bytes));
        match (at, end) {
            (Some(at), Some(end)) if end <= size => t.offset = at,
            _ => {
                let at = at.unwrap_or(u64::MAX);
                let fault = Error::Truncated {
                    file: self.path.to_path_buf(),
                    what: format!("tensor {}", shown(&t.name)),
                    at,
                    want: t.bytes,
                    have: size.saturating_sub(at),
                };
                return Err(fault);
            }
        }
        Ok(())
    }
}
