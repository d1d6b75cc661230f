//! A tensor's bytes, wherever they are.

use super::source::Source;
use memmap2::MmapMut;
use std::fmt;
use std::ops::{Deref, Range};
use std::sync::Arc;

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
    /// A part of a mapped file, inside of it.
    pub(super) fn in_file(source: &Arc<Source>, range: Range<usize>) -> Bytes {
        Bytes {
            holder: Holder::File(Arc::clone(source)),
            range,
        }
    }

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
