//! Makes GGUF files (version 3): the header first, then the tensors' bytes as they come.
//!
//! ```
//! # fn main() -> octet::error::Result<()> {
//! use octet::gguf::Writer;
//!
//! let mut w = Writer::new();
//! w.put("general.architecture", "llama").put("llama.block_count", 32u32);
//! w.tensor("output_norm.weight", 0, &[4]);
//! let mut stream = w.start("norm.gguf", Vec::new())?;
//! stream.write(&[0; 6])?; // in pieces of any size,
//! stream.write(&[0; 10])?; // so that a tensor may be larger than memory
//! let file = stream.finish()?;
//! # assert_eq!(file.len() % 32, 0);
//! # Ok(())
//! # }
//! ```
//!
//! The same calls give the same bytes. Tensors lie in the order of their entries, each padded with
//! zeros to the alignment, the last one too, as the reference writes them.

use std::collections::{HashMap, HashSet};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use super::value::Scan;
use super::{
    ALIGNMENT_KEY, Array, DEFAULT_ALIGNMENT, Gguf, Kind, MAGIC, MAX_NAME, Tensor, Value, align_up,
    shown, tensor_bytes, valid_alignment,
};
use crate::error::{Error, Result};

/// Something that can be a metadata value: numbers, `bool`, strings, arrays of them (nested ones
/// too), and values of another file.
pub trait Put {
    /// The type of the value.
    fn kind(&self) -> Kind;

    /// Appends the value's bytes, without its type, as a version 3 file has them.
    fn encode(&self, out: &mut Vec<u8>);
}

/// Something that can be an item of a metadata array.
pub trait Item: Put {
    /// The type of every such value.
    const KIND: Kind;
}

macro_rules! numbers {
    ($( $type:ty = $kind:ident; )*) => { $(
        impl Put for $type {
            fn kind(&self) -> Kind {
                Kind::$kind
            }
            fn encode(&self, out: &mut Vec<u8>) {
                out.extend_from_slice(&self.to_le_bytes());
            }
        }
        impl Item for $type {
            const KIND: Kind = Kind::$kind;
        }
    )* };
}

numbers! {
    u8 = U8; i8 = I8; u16 = U16; i16 = I16; u32 = U32; i32 = I32; u64 = U64; i64 = I64;
    f32 = F32; f64 = F64;
}

impl Put for bool {
    fn kind(&self) -> Kind {
        Kind::Bool
    }
    fn encode(&self, out: &mut Vec<u8>) {
        out.push((*self).into());
    }
}

impl Item for bool {
    const KIND: Kind = Kind::Bool;
}

impl Put for str {
    fn kind(&self) -> Kind {
        Kind::Str
    }
    fn encode(&self, out: &mut Vec<u8>) {
        (self.len() as u64).encode(out);
        out.extend_from_slice(self.as_bytes());
    }
}

impl Item for str {
    const KIND: Kind = Kind::Str;
}

impl Put for String {
    fn kind(&self) -> Kind {
        Kind::Str
    }
    fn encode(&self, out: &mut Vec<u8>) {
        self.as_str().encode(out);
    }
}

impl Item for String {
    const KIND: Kind = Kind::Str;
}

impl<T: Item> Put for [T] {
    fn kind(&self) -> Kind {
        Kind::Array
    }
    fn encode(&self, out: &mut Vec<u8>) {
        (T::KIND as u32).encode(out);
        (self.len() as u64).encode(out);
        for item in self {
            item.encode(out);
        }
    }
}

impl<T: Item> Item for [T] {
    const KIND: Kind = Kind::Array;
}

impl<T: Item> Put for Vec<T> {
    fn kind(&self) -> Kind {
        Kind::Array
    }
    fn encode(&self, out: &mut Vec<u8>) {
        self.as_slice().encode(out);
    }
}

impl<T: Item> Item for Vec<T> {
    const KIND: Kind = Kind::Array;
}

impl<T: Item, const N: usize> Put for [T; N] {
    fn kind(&self) -> Kind {
        Kind::Array
    }
    fn encode(&self, out: &mut Vec<u8>) {
        self.as_slice().encode(out);
    }
}

impl<T: Item, const N: usize> Item for [T; N] {
    const KIND: Kind = Kind::Array;
}

impl<T: Put + ?Sized> Put for &T {
    fn kind(&self) -> Kind {
        (**self).kind()
    }
    fn encode(&self, out: &mut Vec<u8>) {
        (**self).encode(out);
    }
}

impl<T: Item + ?Sized> Item for &T {
    const KIND: Kind = T::KIND;
}

impl Put for Array<'_> {
    fn kind(&self) -> Kind {
        Kind::Array
    }
    fn encode(&self, out: &mut Vec<u8>) {
        (self.item() as u32).encode(out);
        (self.len() as u64).encode(out);
        for item in self.iter() {
            item.encode(out);
        }
    }
}

impl Put for Value<'_> {
    fn kind(&self) -> Kind {
        Value::kind(self)
    }
    fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Value::U8(v) => v.encode(out),
            Value::I8(v) => v.encode(out),
            Value::U16(v) => v.encode(out),
            Value::I16(v) => v.encode(out),
            Value::U32(v) => v.encode(out),
            Value::I32(v) => v.encode(out),
            Value::U64(v) => v.encode(out),
            Value::I64(v) => v.encode(out),
            Value::F32(v) => v.encode(out),
            Value::F64(v) => v.encode(out),
            Value::Bool(v) => v.encode(out),
            Value::Str(v) => v.encode(out),
            Value::Array(v) => v.encode(out),
        }
    }
}

/// What a GGUF file is going to hold: metadata, and the names, types and shapes of its tensors.
#[derive(Clone, Debug, Default)]
pub struct Writer {
    metadata: Vec<Entry>,
    /// Places in `metadata`, by key.
    by_key: HashMap<String, usize>,
    /// Name, type, shape.
    tensors: Vec<(String, u32, Vec<u64>)>,
}

#[derive(Clone, Debug)]
struct Entry {
    key: String,
    kind: Kind,
    value: Vec<u8>,
}

/// Where everything of a file will be, before a byte of it is written.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The tensors, with their final offsets and sizes.
    pub tensors: Vec<Tensor>,
    /// Bytes before the first tensor, padding included.
    pub header_bytes: u64,
    /// Bytes of the whole file.
    pub file_bytes: u64,
    alignment: u64,
    /// The header without its padding.
    header: Vec<u8>,
}

impl Plan {
    /// Writes the header with its padding: everything before the first tensor.
    ///
    /// # Errors
    /// If `out` cannot be written.
    pub fn write_header(&self, mut out: impl Write) -> io::Result<()> {
        out.write_all(&self.header)?;
        pad(&mut out, self.header_bytes - self.header.len() as u64)
    }

    /// Writes the zeros that follow tensor `i`, up to the next one or the end of the file.
    ///
    /// # Errors
    /// If `out` cannot be written.
    ///
    /// # Panics
    /// If there is no tensor `i`.
    pub fn write_padding(&self, i: usize, mut out: impl Write) -> io::Result<()> {
        let end = self.tensors[i].offset + self.tensors[i].bytes;
        let next = self.tensors.get(i + 1);
        let next = next.map_or(self.file_bytes, |t| t.offset);
        pad(&mut out, next - end)
    }
}

impl Writer {
    /// A file without metadata and tensors.
    pub fn new() -> Writer {
        Writer::default()
    }

    /// Sets a metadata value. A key that is there already keeps its place and gets the new value.
    ///
    /// `general.alignment` also sets the alignment of the tensors, which is 32 bytes without it.
    pub fn put(&mut self, key: &str, value: impl Put) -> &mut Writer {
        let kind = value.kind();
        let mut bytes = Vec::new();
        value.encode(&mut bytes);
        let entry = Entry {
            key: key.to_string(),
            kind,
            value: bytes,
        };
        match self.by_key.get(key) {
            Some(&at) => self.metadata[at] = entry,
            None => {
                self.by_key.insert(key.to_string(), self.metadata.len());
                self.metadata.push(entry);
            }
        }
        self
    }

    /// Sets all metadata of another file, in its order, but for what it says of being split.
    pub fn put_all(&mut self, from: &Gguf) -> &mut Writer {
        for (key, value) in from.metadata() {
            if !key.starts_with("split.") {
                self.put(key, value);
            }
        }
        self
    }

    /// Takes a metadata value away, if it is there.
    pub fn remove(&mut self, key: &str) -> &mut Writer {
        if let Some(at) = self.by_key.remove(key) {
            self.metadata.remove(at);
            for place in self.by_key.values_mut().filter(|place| **place > at) {
                *place -= 1;
            }
        }
        self
    }

    /// Announces the next tensor: its GGUF type and its shape, innermost dimension first.
    pub fn tensor(&mut self, name: &str, type_id: u32, shape: &[u64]) -> &mut Writer {
        self.tensors
            .push((name.to_string(), type_id, shape.to_vec()));
        self
    }

    /// Says where everything will be. `file` is the name used in errors.
    ///
    /// # Errors
    /// If the file could not be read back: a key or a tensor name of more than 65535 bytes, an
    /// array nested too deep, an alignment that is no power of two from 8 on, a tensor name that is
    /// there twice, an unknown tensor type, a shape that does not fit the type.
    pub fn plan(&self, file: impl AsRef<Path>) -> Result<Plan> {
        let file = file.as_ref();
        let mut header = MAGIC.to_vec();
        3u32.encode(&mut header);
        (self.tensors.len() as u64).encode(&mut header);
        (self.metadata.len() as u64).encode(&mut header);
        for entry in &self.metadata {
            entry.check(file)?;
            entry.key.encode(&mut header);
            (entry.kind as u32).encode(&mut header);
            header.extend_from_slice(&entry.value);
        }
        let alignment = self.alignment(file)?;
        let mut tensors = Vec::with_capacity(self.tensors.len());
        let mut names = HashSet::new();
        let mut at = 0u64;
        for (name, type_id, shape) in &self.tensors {
            let invalid = |what: &str, expected: String, found: String| {
                let what = format!("the {what} of tensor {}", shown(name));
                Error::invalid(file, what, expected, found)
            };
            if name.len() > MAX_NAME {
                let expected = format!("at most {MAX_NAME} bytes");
                return Err(invalid("name", expected, name.len().to_string()));
            }
            if !names.insert(name.as_str()) {
                let found = "a second tensor of that name".to_string();
                return Err(invalid("name", "each name once".to_string(), found));
            }
            let bytes = tensor_bytes(*type_id, shape)
                .map_err(|bad| invalid(bad.what, bad.expected, bad.found))?;
            name.encode(&mut header);
            (shape.len() as u32).encode(&mut header);
            for dim in shape {
                dim.encode(&mut header);
            }
            type_id.encode(&mut header);
            at.encode(&mut header);
            tensors.push(Tensor {
                name: name.clone(),
                type_id: *type_id,
                shape: shape.clone(),
                shard: 0,
                offset: at,
                bytes,
            });
            at = end_of(at, bytes, alignment).ok_or_else(|| {
                let expected = "a file of fewer than 2^62 bytes".to_string();
                invalid("size", expected, format!("{bytes} bytes at {at}"))
            })?;
        }
        let header_bytes = (header.len() as u64).next_multiple_of(alignment);
        for t in &mut tensors {
            t.offset += header_bytes;
        }
        Ok(Plan {
            tensors,
            header_bytes,
            file_bytes: header_bytes + at,
            alignment,
            header,
        })
    }

    /// Writes the header to `out` and waits for the tensors' bytes, in the order of their
    /// announcement. `file` is the name used in errors.
    ///
    /// # Errors
    /// As for [`Writer::plan`], and if `out` cannot be written.
    pub fn start<W: Write>(&self, file: impl AsRef<Path>, mut out: W) -> Result<Stream<W>> {
        let file = file.as_ref();
        let mut plan = self.plan(file)?;
        plan.write_header(&mut out)
            .map_err(Error::io(file, "write"))?;
        plan.header = Vec::new();
        Ok(Stream {
            file: file.to_path_buf(),
            out,
            plan,
            next: 0,
            done: 0,
        })
    }

    fn alignment(&self, file: &Path) -> Result<u64> {
        let Some(&at) = self.by_key.get(ALIGNMENT_KEY) else {
            return Ok(DEFAULT_ALIGNMENT);
        };
        let Entry { kind, value, .. } = &self.metadata[at];
        let value = Scan::new(value, true).value(*kind, 0).ok();
        match value.and_then(|v| v.as_u64()) {
            // Up to the specification's type, u32, so that padding always has a sane size.
            Some(n) if valid_alignment(n) && u32::try_from(n).is_ok() => Ok(n),
            _ => Err(Error::invalid(
                file,
                format!("metadata `{ALIGNMENT_KEY}`"),
                "a power of two that is a multiple of 8",
                value.map_or_else(String::new, |v| v.to_string()),
            )),
        }
    }
}

/// Where the tensor after one of `bytes` bytes at `at` starts.
fn end_of(at: u64, bytes: u64, alignment: u64) -> Option<u64> {
    align_up(at.checked_add(bytes)?, alignment).filter(|&end| end < 1 << 62)
}

/// Writes `n` zeros, which need not be in memory at once: an alignment can be large.
fn pad(out: &mut impl Write, n: u64) -> io::Result<()> {
    io::copy(&mut io::repeat(0).take(n), out).map(|_| ())
}

impl Entry {
    /// Whether the reader takes it.
    fn check(&self, file: &Path) -> Result<()> {
        let what = || format!("metadata {}", shown(&self.key));
        if self.key.len() > MAX_NAME {
            let expected = format!("a key of at most {MAX_NAME} bytes");
            return Err(Error::invalid(file, what(), expected, self.key.len()));
        }
        match Scan::new(&self.value, true).value(self.kind, 0) {
            Ok(_) => Ok(()),
            Err(fault) => Err(Error::invalid(
                file,
                what(),
                "a value that can be read back",
                format!("{fault:?}"),
            )),
        }
    }
}

/// A file whose header is written: takes the tensors' bytes.
#[derive(Debug)]
pub struct Stream<W> {
    file: PathBuf,
    out: W,
    plan: Plan,
    /// The tensor whose bytes come next.
    next: usize,
    /// Bytes of it that are written.
    done: u64,
}

impl<W: Write> Stream<W> {
    /// Where everything is.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// The tensor whose bytes come next; `None` when all are written.
    pub fn current(&self) -> Option<&Tensor> {
        self.plan.tensors.get(self.next)
    }

    /// Writes the next bytes of the current tensor. When these were its last, padding follows and
    /// the next tensor becomes the current one.
    ///
    /// # Errors
    /// If the current tensor has fewer bytes left, or if the output cannot be written.
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        let Some(t) = self.plan.tensors.get(self.next) else {
            return Err(Error::invalid(
                &self.file,
                "the data after the last tensor",
                "none",
                format!("{} bytes", bytes.len()),
            ));
        };
        let left = t.bytes - self.done;
        if bytes.len() as u64 > left {
            return Err(Error::invalid(
                &self.file,
                format!("the data of tensor {}", shown(&t.name)),
                format!("at most {left} bytes more"),
                bytes.len(),
            ));
        }
        let failed = |e| Error::io(&self.file, "write")(e);
        self.out.write_all(bytes).map_err(failed)?;
        self.done += bytes.len() as u64;
        if self.done == t.bytes {
            let align = self.plan.alignment;
            let padding = t.bytes.next_multiple_of(align) - t.bytes;
            pad(&mut self.out, padding).map_err(failed)?;
            self.next += 1;
            self.done = 0;
        }
        Ok(())
    }

    /// Writes the whole of the current tensor, which must be the one of this name.
    ///
    /// # Errors
    /// If another tensor is the current one, if `bytes` has not its size, or if the output cannot
    /// be written.
    pub fn write_tensor(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        match self.current() {
            Some(t) if self.done == 0 && t.name == name && t.bytes == bytes.len() as u64 => {
                self.write(bytes)
            }
            t => Err(Error::invalid(
                &self.file,
                "the next tensor to write",
                t.map_or_else(
                    || "none".to_string(),
                    |t| format!("{} bytes of {}", t.bytes - self.done, shown(&t.name)),
                ),
                format!("{} bytes of {}", bytes.len(), shown(name)),
            )),
        }
    }

    /// Ends the file and gives the output back.
    ///
    /// # Errors
    /// If a tensor's bytes are missing, or if the output cannot be flushed.
    pub fn finish(mut self) -> Result<W> {
        if let Some(t) = self.current() {
            return Err(Error::missing(
                &self.file,
                format!("the data of tensor {}", shown(&t.name)),
                "",
            ));
        }
        self.out.flush().map_err(Error::io(&self.file, "write"))?;
        Ok(self.out)
    }
}
