//! The KV cache: keys and values of the tokens so far.
//!
//! It grows by blocks of [`KV_BLOCK`] positions, so memory follows the conversation and not the
//! context limit. Block `b` holds positions `64 b ..`, which are also the blocks of attention. Sequences that
//! begin alike share blocks ([`Kv::fork`]) until one of them writes to one.

use super::Config;
use crate::error::{Error, Result};
use crate::quant::Encode;
use crate::quant::q8_0::Q8_0;
use crate::quant::search::Plain;
pub use crate::simd::float::KV_BLOCK;
use bytemuck::Zeroable;
use half::f16;
use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Element type of the cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvType {
    /// 2 bytes, the default: 128 KiB a token for 8x7B.
    F16,
    /// 4 bytes.
    F32,
    /// int8 with an f16 scale for 32 elements of a head, as in Q8_0: 68 KiB a token for 8x7B.
    Q8,
}

impl KvType {
    /// All of them.
    pub const ALL: [KvType; 3] = [KvType::F16, KvType::Q8, KvType::F32];

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            KvType::F16 => "f16",
            KvType::F32 => "f32",
            KvType::Q8 => "q8_0",
        }
    }

    /// Bytes of one position's keys (or values) in a head of `d_head` elements.
    fn row_bytes(self, d_head: usize) -> usize {
        match self {
            KvType::F16 => 2 * d_head,
            KvType::F32 => 4 * d_head,
            KvType::Q8 => d_head + 2 * (d_head / QUANT),
        }
    }
}

/// Elements of a head that share a scale.
pub(super) const QUANT: usize = 32;

/// Keys, `(n_kv, d_head, KV_BLOCK)`, or values, `(n_kv, KV_BLOCK, d_head)`, of one layer and block: keys lie so
/// that neighbouring positions are neighbours, because attention works them side by side.
#[derive(Clone)]
pub(super) enum Plane {
    /// f16 elements.
    F16(Vec<f16>),
    /// f32 elements.
    F32(Vec<f32>),
    /// int8 elements and their scales. These lie as the elements do, one for 32 of them along the head: keys'
    /// `(n_kv, d_head / 32, KV_BLOCK)`, values' `(n_kv, KV_BLOCK, d_head / 32)`.
    Q8(Vec<i8>, Vec<f16>),
}

impl Plane {
    fn new(kind: KvType, len: usize) -> Plane {
        match kind {
            KvType::F16 => Plane::F16(vec![f16::ZERO; len]),
            KvType::F32 => Plane::F32(vec![0.0; len]),
            KvType::Q8 => Plane::Q8(vec![0; len], vec![f16::ZERO; len / QUANT]),
        }
    }

    /// The arrays that it is made of, each with the bytes that a position has side by side there; `what`, `d_head`: as in
    /// [`Plane::write`].
    pub(super) fn arrays(&self, what: What, d_head: usize) -> Vec<(&[u8], usize)> {
        let together = what.together(d_head);
        match self {
            Plane::F16(p) => vec![(bytemuck::cast_slice(p), 2 * together)],
            Plane::F32(p) => vec![(bytemuck::cast_slice(p), 4 * together)],
            Plane::Q8(q, d) => vec![
                (bytemuck::cast_slice(q), together),
                (bytemuck::cast_slice(d), 2 * what.together(d_head / QUANT)),
            ],
        }
    }

    /// The same, to be overwritten: any bytes are elements.
    pub(super) fn arrays_mut(&mut self, what: What, d_head: usize) -> Vec<(&mut [u8], usize)> {
        let together = what.together(d_head);
        match self {
            Plane::F16(p) => vec![(bytemuck::cast_slice_mut(p), 2 * together)],
            Plane::F32(p) => vec![(bytemuck::cast_slice_mut(p), 4 * together)],
            Plane::Q8(q, d) => vec![
                (bytemuck::cast_slice_mut(q), together),
                (
                    bytemuck::cast_slice_mut(d),
                    2 * what.together(d_head / QUANT),
                ),
            ],
        }
    }

    /// Stores `x (d_head)` of one head and position of a block.
    fn write(&mut self, what: What, head: usize, pos: usize, x: &[f32]) {
        // Where element 0 lies among planes of `n` elements a position, and how far element 1 is from it.
        let place = |n: usize| {
            let plane = head * KV_BLOCK * n;
            match what {
                What::Keys => (plane + pos, KV_BLOCK),
                What::Values => (plane + pos * n, 1),
            }
        };
        let (at, step) = place(x.len());
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
            Plane::Q8(q, d) => {
                let mut at = at;
                let (scale, scale_step) = place(x.len() / QUANT);
                for (x, d) in x
                    .chunks_exact(QUANT)
                    .zip(d[scale..].iter_mut().step_by(scale_step))
                {
                    let mut block = [Q8_0::zeroed()];
                    Q8_0::encode_row::<Plain>(x, None, &mut block);
                    *d = block[0].d;
                    for (q, new) in q[at..].iter_mut().step_by(step).zip(block[0].qs) {
                        *q = new;
                    }
                    at += QUANT * step;
                }
            }
        }
    }
}

/// The two planes of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum What {
    Keys,
    Values,
}

impl What {
    /// How many of a position's `n` elements in a head lie side by side.
    fn together(self, n: usize) -> usize {
        match self {
            What::Keys => 1,
            What::Values => n,
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
    /// How many of the first positions a device that knows this cache by this pointer has as they are here. Only tokens of one
    /// model may enter a cache, so there is one such device at most ([`super::offload`]).
    mirror: Arc<AtomicUsize>,
}

/// Keys and values of one layer and block, perhaps of several caches: whoever writes gets a copy of its own.
pub(super) type Block = Arc<(Plane, Plane)>;

impl Kv {
    /// An empty cache for at most `limit` positions. [`Config::check_kv`] says whether `kind` will do.
    pub fn new(config: &Config, kind: KvType, limit: usize) -> Kv {
        let layers = (0..config.n_layer).map(|_| Vec::new()).collect();
        Kv {
            kind,
            n_kv: config.n_kv,
            d_head: config.d_head,
            limit,
            len: 0,
            layers,
            mirror: Arc::default(),
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
        self.changed(self.len);
    }

    /// Positions from `pos` on are not what they were.
    fn changed(&mut self, pos: usize) {
        self.mirror.fetch_min(pos, Ordering::Relaxed);
    }

    /// Where a device notes how many of the first positions it has.
    pub(super) fn mirror(&self) -> &Arc<AtomicUsize> {
        &self.mirror
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
            mirror: Arc::default(),
            ..*self
        }
    }

    /// Bytes of [`KV_BLOCK`] positions in all layers.
    pub fn block_bytes(&self) -> usize {
        2 * self.layers.len() * self.n_kv * KV_BLOCK * self.row_bytes()
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
    pub fn reserve(&mut self, n: usize) -> Result<()> {
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
    ///
    /// # Panics
    /// If it is not reserved, or there are fewer numbers.
    pub fn write(&mut self, layer: usize, pos: usize, k: &[f32], v: &[f32]) {
        self.changed(pos);
        let (keys, values) = Arc::make_mut(&mut self.layers[layer][pos / KV_BLOCK]);
        for head in 0..self.n_kv {
            let (from, pos) = (head * self.d_head..(head + 1) * self.d_head, pos % KV_BLOCK);
            keys.write(What::Keys, head, pos, &k[from.clone()]);
            values.write(What::Values, head, pos, &v[from]);
        }
    }

    /// Stores what a device has computed and keeps, too: one token's keys and values, each `(n_kv, d_head)`, at a reserved
    /// position of a cache of f16.
    pub(super) fn take_in(&mut self, layer: usize, pos: usize, k: &[f16], v: &[f16]) {
        let d = self.d_head;
        let (Plane::F16(keys), Plane::F16(values)) =
            Arc::make_mut(&mut self.layers[layer][pos / KV_BLOCK])
        else {
            unreachable!("devices keep caches of f16 only")
        };
        let pos = pos % KV_BLOCK;
        for (head, (k, v)) in k.chunks_exact(d).zip(v.chunks_exact(d)).enumerate() {
            let plane = head * d * KV_BLOCK;
            for (to, k) in keys[plane + pos..].iter_mut().step_by(KV_BLOCK).zip(k) {
                *to = *k;
            }
            values[plane + pos * d..][..d].copy_from_slice(v);
        }
    }

    /// Counts `n` written tokens in.
    pub fn advance(&mut self, n: usize) {
        self.len += n;
    }

    /// A reserved block of a layer.
    pub(super) fn block_mut(&mut self, layer: usize, block: usize) -> &mut (Plane, Plane) {
        self.changed(block * KV_BLOCK);
        Arc::make_mut(&mut self.layers[layer][block])
    }

    /// Layers, heads of keys and values, elements of a head.
    pub(super) fn shape(&self) -> [usize; 3] {
        [self.layers.len(), self.n_kv, self.d_head]
    }

    /// Bytes of one position's keys (or values) in one head of one layer.
    pub(super) fn row_bytes(&self) -> usize {
        self.kind.row_bytes(self.d_head)
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
