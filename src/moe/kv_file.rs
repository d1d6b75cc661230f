//! A KV cache on disk, so that a conversation goes on without its prompt being read again.
//!
//! ```text
//! head (88 bytes)   magic, version, element type, shape, identity of the model, version of the program, checksum
//! block 0           n, checksum, n ids of tokens, then per layer: keys (n_kv, d_head, n), values (n_kv, n, d_head);
//!                   where elements have scales, those of the keys behind the keys, of the values behind the values
//! block 1           … at a fixed distance, as if every block before it were full; only the last may be shorter
//! ```
//!
//! All numbers are little-endian. **Only what is new is written**: a block whose tokens are the same as before (and those
//! of all blocks before it, on which its keys and values depend) is left alone. Blocks are overwritten in place
//! and not flushed to the disk, because nothing is lost with them but time: each
//! block's checksum goes on from that of the block before, so whatever a crash leaves is a valid beginning and then
//! something that is seen to be none.
//!
//! Elements are kept as they are in memory. They are the same bits on every machine, so a file may move.

use super::kv::{KV_BLOCK, Kv, KvType, What};
use crate::disk;
use crate::error::{Error, Result};
use std::fs::File;
use std::io::{self, ErrorKind, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

const MAGIC: &[u8; 8] = b"octet KV";
// Version 1 had all planes by position.
const VERSION: u32 = 2;
const HEAD: usize = 88;
/// `n` and the checksum.
const BLOCK_HEAD: usize = 4 + 8;

/// An open file, locked for this process.
pub struct KvFile {
    path: PathBuf,
    file: File,
    head: [u8; HEAD],
    /// Bytes of a token's keys (or values) in one head of one layer.
    row: usize,
    /// Elements of a head.
    d_head: usize,
    /// `[layers, heads of keys and values]`
    planes: [usize; 2],
    /// The tokens and checksums of the blocks in the file that are good; `None`: not even the head is.
    blocks: Option<Vec<(Vec<u32>, u64)>>,
}

/// What was found in a file.
#[derive(Debug, Default)]
pub struct Loaded {
    /// The tokens whose keys and values are in the cache now.
    pub tokens: Vec<u32>,
    /// Why the rest of the file is of no use, if it is: for the user.
    pub refused: Option<String>,
}

impl KvFile {
    /// Opens or makes the file for caches like `kv`, of the model with this identity ([`crate::gguf::Gguf::identity`]).
    ///
    /// # Errors
    /// If it cannot be opened, is in use by another process, or is a file of another kind.
    pub fn open(path: &Path, kv: &Kv, identity: &[u8; 32]) -> Result<KvFile> {
        let mut file = disk::private()
            .read(true)
            .create(true)
            .truncate(false)
            .open(path)
            .map_err(Error::io(path, "open"))?;
        if !disk::lock(&file) {
            let source = io::Error::other("another octet is using it");
            return Err(Error::io(path, "open")(source));
        }
        let mut magic = Vec::new();
        let read = (&mut file).take(MAGIC.len() as u64).read_to_end(&mut magic);
        read.map_err(Error::io(path, "read"))?;
        if !MAGIC.starts_with(&magic) {
            let expected = "a KV cache of octet's";
            return Err(Error::invalid(path, "the file", expected, "something else"));
        }
        let [layers, heads, d_head] = kv.shape();
        Ok(KvFile {
            path: path.to_path_buf(),
            file,
            head: head(kv, identity),
            row: kv.row_bytes(),
            d_head,
            planes: [layers, heads],
            blocks: None,
        })
    }

    /// Fills an empty cache with what the file has and the cache can take. Whatever is in the file, this reads no more at a time than one block of
    /// such a cache.
    ///
    /// # Errors
    /// If the file cannot be read.
    pub fn load(&mut self, kv: &mut Kv) -> Result<Loaded> {
        debug_assert!(kv.is_empty());
        let failed = Error::io(&self.path, "read");
        self.blocks = None;
        let mut loaded = Loaded::default();
        let mut found = [0; HEAD];
        match read_at(&mut self.file, 0, &mut found) {
            Ok(0) => return Ok(loaded), // Just made.
            Ok(HEAD) if found == self.head => {}
            Ok(n) => {
                loaded.refused = Some(refusal(&found[..n], &self.head));
                return Ok(loaded);
            }
            Err(e) => return Err(failed(e)),
        }
        let blocks = self.blocks.insert(Vec::new());
        let mut sum = disk::checksum(0, &self.head);
        let mut body = Vec::new();
        while loaded.tokens.len() == blocks.len() * KV_BLOCK {
            let at = HEAD + blocks.len() * slot(self.planes, self.row);
            let mut start = [0; BLOCK_HEAD];
            let read = match read_at(&mut self.file, at, &mut start) {
                Ok(0) => break,
                Ok(read) => read,
                Err(e) => return Err(failed(e)),
            };
            let n = u32::from_le_bytes(start[..4].try_into().expect("4 bytes")) as usize;
            let good = read == BLOCK_HEAD && (1..=KV_BLOCK).contains(&n);
            if good && kv.reserve(n).is_err() {
                break; // A smaller context than it was written with.
            }
            if good {
                body.resize(n * (4 + token_bytes(self.planes, self.row)), 0);
            }
            let good = good
                && match self.file.read_exact(&mut body) {
                    Ok(()) => true,
                    Err(e) if e.kind() == ErrorKind::UnexpectedEof => false,
                    Err(e) => return Err(failed(e)),
                };
            let said = u64::from_le_bytes(start[4..].try_into().expect("8 bytes"));
            if !good || disk::checksum(sum, &body) != said {
                let at = loaded.tokens.len();
                loaded.refused = Some(format!("it is damaged from position {at} on"));
                break;
            }
            sum = said;
            let (ids, rows) = body.split_at(4 * n);
            let (ids, _) = ids.as_chunks();
            let ids: Vec<u32> = ids.iter().map(|id| u32::from_le_bytes(*id)).collect();
            let mut rest = rows;
            for layer in 0..self.planes[0] {
                let (keys, values) = kv.block_mut(layer, blocks.len());
                let keys = keys.arrays_mut(What::Keys, self.d_head);
                let values = values.arrays_mut(What::Values, self.d_head);
                for (to, together) in keys.into_iter().chain(values) {
                    for to in to.chunks_exact_mut(KV_BLOCK * together) {
                        let (from, later) = rest.split_at(n * together);
                        to[..from.len()].copy_from_slice(from);
                        rest = later;
                    }
                }
            }
            kv.advance(n);
            loaded.tokens.extend(&ids);
            blocks.push((ids, sum));
        }
        Ok(loaded)
    }

    /// Makes the file hold `kv`, whose tokens are `tokens`.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn save(&mut self, kv: &Kv, tokens: &[u32]) -> Result<()> {
        debug_assert_eq!(kv.len(), tokens.len());
        self.write(kv, tokens)
            .map_err(Error::io(&self.path, "write"))
    }

    /// Empties the file.
    ///
    /// # Errors
    /// If the system refuses.
    pub fn clear(&mut self) -> Result<()> {
        self.blocks = None;
        let emptied = self.file.set_len(0);
        emptied.map_err(Error::io(&self.path, "write"))
    }

    fn write(&mut self, kv: &Kv, tokens: &[u32]) -> io::Result<()> {
        if self.blocks.is_none() {
            self.file.set_len(0)?;
            write_at(&mut self.file, 0, &self.head)?;
        }
        let blocks = self.blocks.get_or_insert_default();
        let same = blocks.iter().zip(tokens.chunks(KV_BLOCK));
        let same = same.take_while(|((old, _), new)| old == new).count();
        blocks.truncate(same);
        let slot = slot(self.planes, self.row);
        let mut bytes = Vec::new();
        for ids in tokens.chunks(KV_BLOCK).skip(same) {
            bytes.clear();
            bytes.extend((ids.len() as u32).to_le_bytes());
            bytes.extend([0; 8]);
            bytes.extend(ids.iter().flat_map(|id| id.to_le_bytes()));
            for layer in 0..self.planes[0] {
                let (keys, values) = &*kv.blocks(layer)[blocks.len()];
                let keys = keys.arrays(What::Keys, self.d_head);
                let values = values.arrays(What::Values, self.d_head);
                for (from, together) in keys.into_iter().chain(values) {
                    for from in from.chunks_exact(KV_BLOCK * together) {
                        bytes.extend_from_slice(&from[..ids.len() * together]);
                    }
                }
            }
            let before = blocks.last().map(|(_, sum)| *sum);
            let before = before.unwrap_or_else(|| disk::checksum(0, &self.head));
            let sum = disk::checksum(before, &bytes[BLOCK_HEAD..]);
            bytes[4..BLOCK_HEAD].copy_from_slice(&sum.to_le_bytes());
            write_at(&mut self.file, HEAD + blocks.len() * slot, &bytes)?;
            blocks.push((ids.to_vec(), sum));
        }
        let last = tokens.len() % KV_BLOCK;
        let end = HEAD + tokens.len() / KV_BLOCK * slot;
        let rest = match last {
            0 => 0,
            n => BLOCK_HEAD + n * (4 + token_bytes(self.planes, self.row)),
        };
        self.file.set_len((end + rest) as u64)
    }
}

/// Bytes of one token's keys and values.
fn token_bytes(planes: [usize; 2], row: usize) -> usize {
    2 * planes[0] * planes[1] * row
}

/// Bytes of a full block.
fn slot(planes: [usize; 2], row: usize) -> usize {
    BLOCK_HEAD + KV_BLOCK * (4 + token_bytes(planes, row))
}

/// Where in a head its fields begin.
const KIND: usize = 12;
const SHAPE: usize = 16;
const IDENTITY: usize = 32;
const PROGRAM: usize = 64;
const SUM: usize = 80;

fn head(kv: &Kv, identity: &[u8; 32]) -> [u8; HEAD] {
    // As GGUF numbers its types.
    let kind: u32 = match kv.kind() {
        KvType::F32 => 0,
        KvType::F16 => 1,
        KvType::Q8 => 8,
    };
    let [layers, heads, d_head] = kv.shape();
    let mut head = [0; HEAD];
    let mut put = |at: usize, bytes: &[u8]| head[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, MAGIC);
    put(MAGIC.len(), &VERSION.to_le_bytes());
    put(KIND, &kind.to_le_bytes());
    for (i, n) in [layers, heads, d_head, KV_BLOCK].into_iter().enumerate() {
        put(SHAPE + 4 * i, &(n as u32).to_le_bytes());
    }
    put(IDENTITY, identity);
    let program = env!("CARGO_PKG_VERSION").as_bytes();
    put(PROGRAM, &program[..program.len().min(SUM - PROGRAM)]);
    let sum = disk::checksum(0, &head[..SUM]);
    head[SUM..].copy_from_slice(&sum.to_le_bytes());
    head
}

/// Why a head is not the one that is wanted.
fn refusal(found: &[u8], wanted: &[u8; HEAD]) -> String {
    let differs = |from: usize, to: usize| found[from..to] != wanted[from..to];
    if found.len() < HEAD || disk::checksum(0, &found[..SUM]).to_le_bytes() != found[SUM..] {
        "its head is damaged"
    } else if differs(MAGIC.len(), KIND) || differs(PROGRAM, SUM) {
        "another version of octet wrote it"
    } else if differs(IDENTITY, PROGRAM) {
        "it is of another model"
    } else {
        "its elements are of another type (--kv)"
    }
    .to_string()
}

/// Reads up to the end of `out` or of the file.
fn read_at(file: &mut File, at: usize, out: &mut [u8]) -> io::Result<usize> {
    file.seek(SeekFrom::Start(at as u64))?;
    let mut read = 0;
    while read < out.len() {
        match file.read(&mut out[read..]) {
            Ok(0) => break,
            Ok(n) => read += n,
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(read)
}

fn write_at(file: &mut File, at: usize, bytes: &[u8]) -> io::Result<()> {
    file.seek(SeekFrom::Start(at as u64))?;
    file.write_all(bytes)
}
