//! Grouped-query attention over the KV cache.

use super::kv::{Kv, Plane};
use super::{Config, Machine};
use crate::pool::Part;
use crate::simd::Kernels;
use crate::simd::float::{KV_BLOCK, Pane, Query, Running};

/// Cosines and sines of the angles by which RoPE rotates (Su et al. 2021).
pub struct Rope {
    /// Radians per position for each pair, `(n_rot / 2)`.
    freqs: Vec<f64>,
}

impl Rope {
    /// `theta^(-2i / n_rot)`, divided by the file's factors where it has them.
    pub fn new(config: &Config, factors: Option<&[f32]>) -> Rope {
        let n = config.n_rot;
        let freqs = (0..n / 2)
            .map(|i| {
                let freq = libm::pow(config.rope_base as f64, -((2 * i) as f64) / n as f64);
                freq / factors.map_or(1.0, |f| f[i] as f64)
            })
            .collect();
        Rope { freqs }
    }

    /// `cos (n_rot / 2)` and `sin (n_rot / 2)` of position `pos`.
    ///
    /// In f64 by a library of our own choosing, not the platform's: the same bits on every machine.
    pub fn angles(&self, pos: usize, cos: &mut [f32], sin: &mut [f32]) {
        for ((freq, cos), sin) in self.freqs.iter().zip(cos).zip(sin) {
            let (s, c) = libm::sincos(pos as f64 * freq);
            (*cos, *sin) = (c as f32, s as f32);
        }
    }
}

/// Where one row of a batch stands.
#[derive(Clone, Copy)]
pub struct Place<'a> {
    /// Its sequence's cache.
    pub kv: &'a Kv,
    /// Its position in it.
    pub pos: usize,
}

/// Tokens that go through the cache's blocks together, so that these are read once for all of them.
const TOGETHER: usize = 16;

/// So many queries work on f16 as it is; for more it pays to widen a block once for all of them.
const FEW: usize = 8;

/// `out[t] = softmax(q[t] · kᵀ / √d_head) · v` over positions `0..=pos` of each token's cache.
///
/// `q`: `(n_tok, n_head, d_head)`, scaled here by `1 / √d_head`; `out`: the same shape. Keys and
/// values of these tokens must be in the cache already.
///
/// # Panics
/// If they are not, or shapes do not belong together.
pub fn attend(
    machine: &Machine,
    config: &Config,
    layer: usize,
    places: &[Place<'_>],
    q: &mut [f32],
    out: &mut [f32],
) {
    let (d, width) = (config.d_head, config.n_head * config.d_head);
    let scale = 1.0 / (d as f32).sqrt();
    machine
        .pool
        .rows(q, width, |_, q| q.iter_mut().for_each(|q| *q *= scale));
    // Neighbours of one sequence go together; a task is some of them and one KV head.
    let same = |a: &Place<'_>, b: &Place<'_>| std::ptr::eq(a.kv, b.kv);
    let groups = places.chunk_by(same).flat_map(|run| run.chunks(TOGETHER));
    let (mut parts, mut inputs) = (Vec::new(), Vec::new());
    let (mut rest, mut first) = (out, 0);
    for places in groups {
        let (out, later) = rest.split_at_mut(places.len() * width);
        let grain = config.n_head / config.n_kv * d;
        parts.push(Part { out, width, grain });
        inputs.push((places, &q[first..first + places.len() * width]));
        (rest, first) = (later, first + places.len() * width);
    }
    machine.pool.stripes(&mut parts, |p, columns, mut stripe| {
        let (places, q) = inputs[p];
        let mut queries = Vec::with_capacity(places.len() * columns.len() / d);
        for (q, out) in q.chunks_exact(width).zip(stripe.iter_mut()) {
            out.fill(0.0);
            for (q, acc) in q[columns.clone()]
                .chunks_exact(d)
                .zip(out.chunks_exact_mut(d))
            {
                queries.push(Query {
                    q,
                    n: 0,
                    run: Running::START,
                    acc,
                });
            }
        }
        let kv_head = columns.start / columns.len();
        through_blocks(machine, layer, places, kv_head, &mut queries);
    });
}

/// The queries of some tokens of one sequence and one KV head, `(places.len(), heads)`, through its cache.
fn through_blocks(
    machine: &Machine,
    layer: usize,
    places: &[Place<'_>],
    kv_head: usize,
    queries: &mut [Query<'_>],
) {
    let heads = queries.len() / places.len();
    let (kv, kernels) = (places[0].kv, machine.kernels);
    let its = Head {
        index: kv_head,
        of: kv.heads(),
    };
    // A cache may have more: of the prompt's later tokens, or of some that were taken back.
    let last = places.last().map_or(0, |place| place.pos);
    let blocks = &kv.blocks(layer)[..=last / KV_BLOCK];
    let mut wide = Wide::default();
    for (b, block) in blocks.iter().enumerate() {
        // Tokens are in order of position: those that see any of this block are the last ones.
        let first = b * KV_BLOCK;
        let unseen = places.partition_point(|place| place.pos < first);
        let queries = &mut queries[unseen * heads..];
        for (queries, place) in queries.chunks_exact_mut(heads).zip(&places[unseen..]) {
            let n = (place.pos + 1 - first).min(KV_BLOCK);
            queries.iter_mut().for_each(|query| query.n = n);
        }
        let next = blocks.get(b + 1);
        let ahead = next.map_or(Pane::EMPTY, |block| Pane {
            k: its.bytes(&block.0),
            v: its.bytes(&block.1),
        });
        let (k, v) = &**block;
        match (k, v) {
            (Plane::F16(k), Plane::F16(v)) if queries.len() <= FEW => {
                kernels.attend_f16(queries, its.pane(k, v), ahead);
            }
            (Plane::F32(k), Plane::F32(v)) => {
                kernels.attend_f32(queries, its.pane(k, v), ahead);
            }
            _ => kernels.attend_f32(queries, wide.pane(kernels, its, k, v), ahead),
        }
    }
    for query in queries {
        query.acc.iter_mut().for_each(|x| *x /= query.run.sum);
    }
}

/// One of a cache's KV heads.
#[derive(Clone, Copy)]
struct Head {
    index: usize,
    of: usize,
}

impl Head {
    /// Its part of what lies head by head.
    fn part<E>(self, all: &[E]) -> &[E] {
        let len = all.len() / self.of;
        &all[self.index * len..][..len]
    }

    /// Its part of a block's elements.
    fn pane<'a, E>(self, k: &'a [E], v: &'a [E]) -> Pane<'a, E> {
        Pane {
            k: self.part(k),
            v: self.part(v),
        }
    }

    /// The bytes of its elements.
    fn bytes(self, plane: &Plane) -> &[u8] {
        match plane {
            Plane::F16(x) => bytemuck::cast_slice(self.part(x)),
            Plane::F32(x) => bytemuck::cast_slice(self.part(x)),
            Plane::Q8(x, _) => bytemuck::cast_slice(self.part(x)),
        }
    }
}

/// A head's keys and values of a block, widened to floats.
#[derive(Default)]
struct Wide {
    k: Vec<f32>,
    v: Vec<f32>,
}

impl Wide {
    fn pane(&mut self, kernels: &Kernels, head: Head, k: &Plane, v: &Plane) -> Pane<'_, f32> {
        match (k, v) {
            (Plane::F16(k), Plane::F16(v)) => {
                let (k, v) = (head.part(k), head.part(v));
                self.resize(k.len());
                kernels.widen(k, &mut self.k);
                kernels.widen(v, &mut self.v);
            }
            (Plane::Q8(k, dk), Plane::Q8(v, dv)) => {
                let (k, v) = (head.part(k), head.part(v));
                self.resize(k.len());
                kernels.widen_keys(k, head.part(dk), &mut self.k);
                kernels.widen_values(v, head.part(dv), &mut self.v);
            }
            _ => unreachable!("a cache has one element type, and floats are wide"),
        }
        let Wide { k, v } = self;
        Pane { k, v }
    }

    fn resize(&mut self, len: usize) {
        self.k.resize(len, 0.0);
        self.v.resize(len, 0.0);
    }
}
