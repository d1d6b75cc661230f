//! The KV cache: keys and values of the tokens so far.
//!
//! It grows by blocks of [`KV_BLOCK`] positions, so memory follows the conversation and not the
//! context limit. Block `b` holds positions `64 b ..`, which are also the blocks of attention. Sequences that
//! begin alike share blocks ([`Kv::fork`]) until one of them writes to one.

use super::Config;
use crate::error::{Error, Result};
pub use crate::simd::float::KV_BLOCK;
use half::f16;
use std::collections::HashSet;
use std::sync::Arc;

/// Element type of the cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvType {
    /// 2 bytes, the default: 128 KiB a token for 8x7B.
    F16,
    /// 4 bytes.
    F32,
}

impl KvType {
    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            KvType::F16 => "f16",
            KvType::F32 => "f32",
        }
    }
}

/// Keys, `(n_kv, d_head, KV_BLOCK)`, or values, `(n_kv, KV_BLOCK, d_head)`, of one layer and block: keys lie so
/// that neighbouring positions are neighbours, because attention works them side by side.
#[derive(Clone)]
pub enum Plane {
    /// f16 elements.
    F16(Vec<f16>),
    /// f32 elements.
    F32(Vec<f32>),
}

impl Plane {
    fn new(kind: KvType, len: usize) -> Plane {
        match kind {
            KvType::F16 => Plane::F16(vec![f16::ZERO; len]),
            KvType::F32 => Plane::F32(vec![0.0; len]),
        }
    }

    /// All of it, as it lies in memory.
    pub(super) fn bytes(&self) -> &[u8] {
        match self {
            Plane::F16(p) => bytemuck::cast_slice(p),
            Plane::F32(p) => bytemuck::cast_slice(p),
        }
    }

    /// All of it, to be overwritten: any bytes are elements.
    pub(super) fn bytes_mut(&mut self) -> &mut [u8] {
        match self {
            Plane::F16(p) => bytemuck::cast_slice_mut(p),
            Plane::F32(p) => bytemuck::cast_slice_mut(p),
        }
    }

    /// Stores `x` at `at`, `at + step` …
    fn write(&mut self, at: usize, step: usize, x: &[f32]) {
        match self {
            // The rounding of `from_f32_const` (half to even) does not depend on the CPU.
            Plane::F16(p) => {
                for (p, x) in p[at..].iter_mut().step_by(step).zip(x) {
                    *p = f16::from_f32_const(*x);
                }
            }
            Plane::F32(p) => {
                for (p, x) in p[at..].iter_mut().step_by(step).zip(x) {
                    *p = *x;
                }
            }
        }
    }
}

/// The cache of one sequence.
pub struct Kv {
    kind: KvType,
    n_kv: usize,
    d_head: usize,
    limit: usize,
    len: usize,
    /// `layers[layer][block]`
    layers: Vec<Vec<Block>>,
}

/// Keys and values of one layer and block, perhaps of several caches: whoever writes gets a copy of its own.
pub(super) type Block = Arc<(Plane, Plane)>;

impl Kv {
    /// An empty cache for at most `limit` positions.
    pub fn new(config: &Config, kind: KvType, limit: usize) -> Kv {
        let layers = (0..config.n_layer).map(|_| Vec::new()).collect();
        Kv {
            kind,
            n_kv: config.n_kv,
            d_head: config.d_head,
            limit,
            len: 0,
            layers,
        }
    }

    /// Tokens in the cache: the position of the next one.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether no token is in the cache.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Positions it may hold.
    pub fn limit(&self) -> usize {
        self.limit
    }

    /// Element type.
    pub fn kind(&self) -> KvType {
        self.kind
    }

    /// Forgets all tokens from position `len` on; memory is kept for what comes next.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }

    /// A cache that holds the first `len` tokens of this one. It shares their blocks, so that it takes no
    /// memory and no time until it goes its own way.
    pub fn fork(&self, len: usize) -> Kv {
        let len = len.min(self.len);
        let blocks = len.div_ceil(KV_BLOCK);
        let share = |layer: &Vec<Block>| layer[..blocks].to_vec();
        Kv {
            len,
            layers: self.layers.iter().map(share).collect(),
            ..*self
        }
    }

    /// Bytes of [`KV_BLOCK`] positions in all layers.
    pub fn block_bytes(&self) -> usize {
        let element = match self.kind {
            KvType::F16 => 2,
            KvType::F32 => 4,
        };
        2 * self.layers.len() * self.n_kv * KV_BLOCK * self.d_head * element
    }

    /// Bytes allocated, those that are shared with other caches too.
    pub fn bytes(&self) -> usize {
        self.first_layer().len() * self.block_bytes()
    }

    /// Bytes allocated by several caches of one model together: what they share counts once.
    pub fn bytes_together<'a>(caches: impl IntoIterator<Item = &'a Kv>) -> usize {
        let mut seen = HashSet::new();
        let mut bytes = 0;
        for kv in caches {
            let new = |block: &&Block| seen.insert(Arc::as_ptr(block));
            bytes += kv.first_layer().iter().filter(new).count() * kv.block_bytes();
        }
        bytes
    }

    /// Bytes that `n` more tokens will allocate.
    pub fn growth(&self, n: usize) -> usize {
        let (want, have) = ((self.len + n).div_ceil(KV_BLOCK), self.first_layer().len());
        let last = self.first_layer().get(self.len / KV_BLOCK);
        let copy = n > 0 && last.is_some_and(|block| Arc::strong_count(block) > 1);
        (want.saturating_sub(have) + usize::from(copy)) * self.block_bytes()
    }

    /// The first layer's blocks, which stand for all: the others have as many and share the same ones.
    fn first_layer(&self) -> &[Block] {
        self.layers.first().map_or(&[], Vec::as_slice)
    }

    /// Makes room for `n` more tokens.
    ///
    /// # Errors
    /// [`Error::ContextFull`] if they would pass the limit; nothing is changed then.
    pub(super) fn reserve(&mut self, n: usize) -> Result<()> {
        let want = self.len + n;
        if want > self.limit {
            return Err(Error::ContextFull {
                limit: self.limit,
                want,
            });
        }
        let plane = self.n_kv * KV_BLOCK * self.d_head;
        for layer in &mut self.layers {
            while layer.len() * KV_BLOCK < want {
                let new = || Plane::new(self.kind, plane);
                layer.push(Arc::new((new(), new())));
            }
        }
        Ok(())
    }

    /// Stores one token's keys and values, each `(n_kv, d_head)`, at a reserved position.
    pub(super) fn write(&mut self, layer: usize, pos: usize, k: &[f32], v: &[f32]) {
        let (keys, values) = Arc::make_mut(&mut self.layers[layer][pos / KV_BLOCK]);
        for head in 0..self.n_kv {
            let from = head * self.d_head..(head + 1) * self.d_head;
            let (plane, at) = (head * KV_BLOCK * self.d_head, pos % KV_BLOCK);
            keys.write(plane + at, KV_BLOCK, &k[from.clone()]);
            values.write(plane + at * self.d_head, 1, &v[from]);
        }
    }

    /// Counts `n` written tokens in.
    pub(super) fn advance(&mut self, n: usize) {
        self.len += n;
    }

    /// A reserved block of a layer.
    pub(super) fn block_mut(&mut self, layer: usize, block: usize) -> &mut (Plane, Plane) {
        Arc::make_mut(&mut self.layers[layer][block])
    }

    /// Layers, heads of keys and values, elements of a head.
    pub(super) fn shape(&self) -> [usize; 3] {
        [self.layers.len(), self.n_kv, self.d_head]
    }

    /// Bytes of one position's keys (or values) in one head of one layer.
    pub(super) fn row_bytes(&self) -> usize {
        self.block_bytes() / (2 * self.layers.len() * self.n_kv * KV_BLOCK)
    }

    /// Heads of keys and values.
    pub(super) fn heads(&self) -> usize {
        self.n_kv
    }

    /// A layer's blocks, in order of position.
    pub(super) fn blocks(&self, layer: usize) -> &[Block] {
        &self.layers[layer]
    }
}
