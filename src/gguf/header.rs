//! The header of one file: read and checked before anything else is.
//!
//! Every length, count and offset of a header is an outsider's claim. Each is checked against the
//! bytes that are really there before anything is read or allocated by it, so that opening takes at
//! most a small multiple of the header's size in memory and never touches a weight.

use std::fmt::Display;
use std::path::Path;

use super::mistaken;
use super::value::{Fault, Kind, MAX_DEPTH, Scan, Value};
use super::{
    ALIGNMENT_KEY, DEFAULT_ALIGNMENT, MAGIC, MAX_DIMS, MAX_NAME, Tensor, align_up, shown,
    tensor_bytes, valid_alignment,
};
use crate::error::{Error, Result};

/// Where a key and its value are in the file. 24 bytes in memory, 14 or more in the file: this is
/// what bounds the memory that a file of nothing but keys takes.
#[derive(Clone, Copy)]
pub(super) struct Entry {
    key_at: usize,
    /// End of the value, which starts after the key and four bytes of type.
    end: usize,
    key_len: u16,
    kind: Kind,
}

impl Entry {
    pub(super) fn key<'a>(&self, data: &'a [u8]) -> &'a [u8] {
        let end = self.key_at + usize::from(self.key_len);
        data.get(self.key_at..end).unwrap_or_default()
    }

    /// The value. `wide`: whether counts have 64 bits. `None` cannot come of a file that stays as it was when it was opened.
    pub(super) fn value<'a>(&self, data: &'a [u8], wide: bool) -> Option<Value<'a>> {
        let start = self.key_at + usize::from(self.key_len) + 4;
        let mut scan = Scan::new(data.get(start..self.end)?, wide);
        match self.kind {
            // Not checked once more: that would walk over all strings of a vocabulary.
            Kind::Array => scan.checked_array().ok().map(Value::Array),
            kind => scan.value(kind, 0).ok(),
        }
    }
}

/// The places `0..n` sorted by their bytes, or a place whose bytes are there twice.
pub(super) fn sorted<'a>(n: usize, bytes: impl Fn(usize) -> &'a [u8]) -> Result<Vec<u32>, usize> {
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

/// Reads the header of one file.
pub(super) struct Header<'a> {
    path: &'a Path,
    scan: Scan<'a>,
    data: &'a [u8],
}

/// A header as it was read: version, metadata, the order of the keys, tensors.
pub(super) type Read = (u32, Vec<Entry>, Vec<u32>, Vec<Tensor>);

/// Bytes of the fixed part of a header, version 2 and 3: magic, version, two counts.
const FIXED: u64 = 24;

impl<'a> Header<'a> {
    /// Of a file with these bytes; `path` names it in errors.
    pub(super) fn new(path: &'a Path, data: &'a [u8]) -> Header<'a> {
        Header {
            path,
            scan: Scan::new(data, true),
            data,
        }
    }

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

    /// Reads and checks all of it.
    pub(super) fn read(mut self) -> Result<Read> {
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
