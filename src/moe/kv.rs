//! The KV cache: keys and values of the tokens so far.
//!
//! It grows by blocks of [`KV_BLOCK`] positions, so memory follows the conversation and not the
//! context limit. Block `b` holds positions `64 b ..`, which are also the blocks of attention.

use super::Config;
use crate::error::{Error, Result};
pub use crate::simd::float::KV_BLOCK;
use half::f16;

/// Element type of the cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvType {
    /// 2 bytes, the default: 128 KiB a token for 8x7B.
    F16,
    /// 4 bytes.
    F32,
}

/// Keys or values of one layer and block: `(n_kv, KV_BLOCK, d_head)`.
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

    fn write(&mut self, at: usize, x: &[f32]) {
        match self {
            // The rounding of `from_f32_const` (half to even) does not depend on the CPU.
            Plane::F16(p) => {
                for (p, x) in p[at..].iter_mut().zip(x) {
                    *p = f16::from_f32_const(*x);
                }
            }
            Plane::F32(p) => p[at..][..x.len()].copy_from_slice(x),
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
    /// `layers[layer][block]` = keys, values.
    layers: Vec<Vec<(Plane, Plane)>>,
}

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

    /// Bytes allocated.
    pub fn bytes(&self) -> usize {
        let element = match self.kind {
            KvType::F16 => 2,
            KvType::F32 => 4,
        };
        let blocks: usize = self.layers.iter().map(Vec::len).sum();
        2 * blocks * self.n_kv * KV_BLOCK * self.d_head * element
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
                layer.push((Plane::new(self.kind, plane), Plane::new(self.kind, plane)));
            }
        }
        Ok(())
    }

    /// Stores one token's keys and values, each `(n_kv, d_head)`, at a reserved position.
    pub(super) fn write(&mut self, layer: usize, pos: usize, k: &[f32], v: &[f32]) {
        let (keys, values) = &mut self.layers[layer][pos / KV_BLOCK];
        for head in 0..self.n_kv {
            let from = head * self.d_head..(head + 1) * self.d_head;
            let at = (head * KV_BLOCK + pos % KV_BLOCK) * self.d_head;
            keys.write(at, &k[from.clone()]);
            values.write(at, &v[from]);
        }
    }

    /// Counts `n` written tokens in.
    pub(super) fn advance(&mut self, n: usize) {
        self.len += n;
    }

    /// A reserved block of a layer.
    pub(super) fn block_mut(&mut self, layer: usize, block: usize) -> &mut (Plane, Plane) {
        &mut self.layers[layer][block]
    }

    /// Layers, heads of keys and values, elements of a head.
    pub(super) fn shape(&self) -> [usize; 3] {
        [self.layers.len(), self.n_kv, self.d_head]
    }

    /// Bytes of one position's keys (or values) in a head of a plane.
    pub(super) fn row_bytes(&self) -> usize {
        Plane::new(self.kind, self.d_head).bytes().len()
    }

    /// A layer's blocks, in order of position.
    pub(super) fn blocks(&self, layer: usize) -> &[(Plane, Plane)] {
        &self.layers[layer]
    }
}
