//! From the disk into memory: in large pieces, several at a time, past the page cache.

use crate::error::{Error, Result};
use crate::gguf::source::PAGE;
use crate::gguf::{Bytes, Source};
use crate::moe::linear::Weight;
use crate::moe::weights::{Expert, Weights};
use crate::pool::try_each;
use memmap2::MmapMut;
use std::io;
use std::ops::Range;
use std::sync::Arc;

/// Bytes of one read: large enough for a disk's full speed, small enough to stop for something more urgent.
const PIECE: usize = 1 << 20;

/// A tensor's part of a file, and the pages around it.
struct Window<'a> {
    name: &'a str,
    source: &'a Arc<Source>,
    /// The bytes in the file.
    bytes: Range<usize>,
}

impl<'a> Window<'a> {
    /// # Panics
    /// If the bytes are in no file.
    fn of(weight: &'a Weight) -> Window<'a> {
        let (source, bytes) = weight
            .bytes
            .place()
            .expect("weights as they lie in the file");
        Window {
            name: &weight.name,
            source,
            bytes,
        }
    }

    fn start(&self) -> usize {
        self.bytes.start / PAGE * PAGE
    }

    /// Length with the pages around it.
    fn len(&self) -> usize {
        self.bytes.end.next_multiple_of(PAGE) - self.start()
    }

    /// Where the bytes are in the window.
    fn inside(&self) -> Range<usize> {
        self.bytes.start - self.start()..self.bytes.end - self.start()
    }

    /// Cuts the window into pieces, each with its part of `memory`, which it takes off.
    fn pieces<'m>(&self, memory: &mut &'m mut [u8], out: &mut Vec<Piece<'a, 'm>>) {
        let (mine, rest) = std::mem::take(memory).split_at_mut(self.len());
        *memory = rest;
        let mut at = self.start();
        for part in mine.chunks_mut(PIECE) {
            let len = part.len();
            out.push(Piece {
                name: self.name,
                source: self.source,
                at,
                want: self.bytes.end.min(at + len) - at,
                out: part,
            });
            at += len;
        }
    }
}

/// One read.
struct Piece<'a, 'm> {
    name: &'a str,
    source: &'a Source,
    at: usize,
    /// Bytes that must be there; the file may end after them.
    want: usize,
    out: &'m mut [u8],
}

impl Piece<'_, '_> {
    fn read(self) -> Result<()> {
        let read = self.source.read(self.at as u64, self.out, self.want);
        read.map_err(|e| {
            let expected = format!("{} bytes at byte {}", self.want, self.at);
            let what = format!("reading tensor {}", self.name);
            // If the file has changed, that is why.
            let changed = self.source.unchanged().err();
            changed.unwrap_or_else(|| Error::invalid(self.source.path(), what, expected, e))
        })
    }
}

/// Memory to read into.
pub(super) fn memory(bytes: usize) -> io::Result<MmapMut> {
    let memory = MmapMut::map_anon(bytes)?;
    // Fewer, larger pages: less to look up, and less for a read past the page cache to hold on to.
    #[cfg(target_os = "linux")]
    let _ = memory.advise(memmap2::Advice::HugePage);
    Ok(memory)
}

/// Sees to it that full memory is never swapped out, where users may do that. (Locking makes all pages of empty memory, one after
/// the other, while the disk waits.)
pub(super) fn keep(memory: &MmapMut) {
    #[cfg(unix)]
    let _ = memory.lock();
    #[cfg(not(unix))]
    let _ = memory;
}

/// Reads several weights into one piece of memory, one behind the other, on the threads that this is called on.
/// Returns them as they are there. `pause` is called before each read.
fn read<const N: usize>(
    weights: [&Weight; N],
    memory: &mut [u8],
    pause: impl Fn() + Sync,
) -> Result<[Range<usize>; N]> {
    let windows = weights.map(Window::of);
    let mut pieces = Vec::new();
    let mut rest = memory;
    for window in &windows {
        window.pieces(&mut rest, &mut pieces);
    }
    try_each(pieces, |piece| {
        pause();
        piece.read()
    })?;
    let mut start = 0;
    Ok(windows.map(|window| {
        let inside = window.inside();
        let range = start + inside.start..start + inside.end;
        start += window.len();
        range
    }))
}

/// Bytes of memory that [`expert`] needs.
pub(super) fn slot_bytes(expert: &Expert) -> usize {
    expert.weights().iter().map(|w| Window::of(w).len()).sum()
}

/// An expert in a slot.
pub(super) struct InSlot {
    /// Its matrices, which lie in `slot`.
    pub(super) expert: Expert,
    pub(super) slot: Arc<MmapMut>,
    /// Bytes that were read for it.
    pub(super) bytes: u64,
}

/// Reads an expert into a slot, which is lost if that fails. `pause` is called before each piece.
pub(super) fn expert(
    expert: &Expert,
    mut slot: MmapMut,
    pause: impl Fn() + Sync,
) -> Result<InSlot> {
    let ranges = read(expert.weights(), &mut slot, pause)?;
    let slot = Arc::new(slot);
    let [gate, up, down] = ranges.map(|range| Bytes::in_memory(&slot, range));
    let here = |weight: &Weight, bytes| Weight {
        bytes,
        ..weight.clone()
    };
    Ok(InSlot {
        expert: Expert {
            gate: here(&expert.gate, gate),
            up: here(&expert.up, up),
            down: here(&expert.down, down),
        },
        slot,
        bytes: slot_bytes(expert) as u64,
    })
}

/// Bytes of memory that [`make_resident`] takes.
pub(super) fn resident_bytes(weights: &Weights) -> u64 {
    let mut dense = weights.dense();
    if is_tied(weights) {
        dense.pop();
    }
    dense.iter().map(|w| Window::of(w).len() as u64).sum()
}

/// Reads all but the experts into memory.
pub(super) fn make_resident(weights: &mut Weights) -> Result<()> {
    let tied = is_tied(weights);
    let mut dense = weights.dense_mut();
    if tied {
        dense.pop();
    }
    for weight in dense {
        let window = Window::of(weight);
        let kept = Error::io(window.source.path(), "keep in memory a part of");
        let mut memory = memory(window.len()).map_err(kept)?;
        let [range] = read([&*weight], &mut memory, || {})?;
        keep(&memory);
        weight.bytes = Bytes::in_memory(&Arc::new(memory), range);
    }
    if tied {
        weights.head = weights.embed.clone();
    }
    Ok(())
}

/// Whether the output head is the embedding.
fn is_tied(weights: &Weights) -> bool {
    weights.head.bytes.as_ptr() == weights.embed.bytes.as_ptr()
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;
    use crate::gguf::source::broken;

    #[test]
    fn a_read_that_fails_names_the_tensor() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.gguf");
        std::fs::write(&path, [1; 2 * PAGE]).unwrap();
        let mut memory = MmapMut::map_anon(PAGE).unwrap();
        let piece = Piece {
            name: "blk.3.ffn_up_exps.weight",
            source: &broken(&path),
            at: 0,
            want: 100,
            out: &mut memory,
        };
        let said = piece.read().unwrap_err().to_string();
        for word in [
            "model.gguf",
            "blk.3.ffn_up_exps.weight",
            "100 bytes at byte 0",
            "os error 5",
        ] {
            assert!(said.contains(word), "{said}");
        }
    }
}
