//! Grouped-query attention over the KV cache.

use super::kv::{Kv, Plane};
use super::{Config, Machine};
use crate::simd::float::{KV_BLOCK, Running};

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

/// Where one row of a batch stands: its sequence's cache and its position in it.
#[derive(Clone, Copy)]
pub(super) struct Place<'a> {
    pub(super) kv: &'a Kv,
    pub(super) pos: usize,
}

/// `out[t] = softmax(q[t] · kᵀ / √d_head) · v` over positions `0..=pos` of each token's cache.
///
/// `q`: `(n_tok, n_head, d_head)`, scaled here by `1 / √d_head`; `out`: the same shape. Keys and
/// values of these tokens must be in the cache already.
pub(super) fn attend(
    machine: &Machine,
    config: &Config,
    layer: usize,
    places: &[Place<'_>],
    q: &mut [f32],
    out: &mut [f32],
) {
    let group = config.n_head / config.n_kv * config.d_head;
    let scale = 1.0 / (config.d_head as f32).sqrt();
    let mut tasks: Vec<_> = q
        .chunks_exact_mut(group)
        .zip(out.chunks_exact_mut(group))
        .collect();
    machine.pool.each(&mut tasks, |i, (q, out)| {
        let (t, kv_head) = (i / config.n_kv, i % config.n_kv);
        q.iter_mut().for_each(|q| *q *= scale);
        group_attend(machine, config, layer, places[t], kv_head, q, out);
    });
}

/// [`attend`] for one token and the query heads of one KV head: `q`, `out`: `(n_head / n_kv, d_head)`.
fn group_attend(
    machine: &Machine,
    config: &Config,
    layer: usize,
    place: Place<'_>,
    kv_head: usize,
    q: &[f32],
    out: &mut [f32],
) {
    let d = config.d_head;
    let mut run = vec![Running::START; q.len() / d];
    out.fill(0.0);
    for (b, block) in place.kv.blocks(layer).iter().enumerate() {
        let first = b * KV_BLOCK;
        if first > place.pos {
            break;
        }
        let n = (place.pos + 1 - first).min(KV_BLOCK);
        let part = kv_head * KV_BLOCK * d..(kv_head * KV_BLOCK + n) * d;
        match &**block {
            (Plane::F16(k), Plane::F16(v)) => {
                machine
                    .kernels
                    .attend_f16(q, &k[part.clone()], &v[part], d, &mut run, out);
            }
            (Plane::F32(k), Plane::F32(v)) => {
                machine
                    .kernels
                    .attend_f32(q, &k[part.clone()], &v[part], d, &mut run, out);
            }
            _ => unreachable!("a cache has one element type"),
        }
    }
    for (out, run) in out.chunks_exact_mut(d).zip(&run) {
        out.iter_mut().for_each(|x| *x /= run.sum);
    }
}
