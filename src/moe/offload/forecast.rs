//! What of a model could lie on a GPU, and what would with so much memory: arithmetic, for which none is needed.

use super::divide;
use super::gpu::{scratch, slot_bytes};
use super::kernels::FORMATS;
use super::layers::whole_scratch;
use super::placement::{Step, Where};
use super::whole::Whole;
use crate::moe::Config;
use crate::moe::linear::Weight;
use crate::moe::weights::{Expert, Weights};
use crate::quant::Format;
use std::sync::Arc;

/// What would lie on a GPU, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Forecast {
    /// What it computes with.
    pub scratch: u64,
    /// Keys and values, and the tokens that there is room for; none where passes do not stay there.
    pub kv: u64,
    /// Those tokens.
    pub kv_tokens: u64,
    /// What every token reads, norms and routers not counted.
    pub dense: u64,
    /// Experts …
    pub experts: usize,
    /// … of so many …
    pub of: usize,
    /// … in so many bytes.
    pub bytes: u64,
    /// Share of choices that find their expert there.
    pub hits: f64,
    /// Bytes of weights that the CPU still reads for a token.
    pub left: f64,
}

/// What would lie on a GPU of which octet may use `memory` bytes. `shares`, `context`: as in [`super::Plan`].
pub fn forecast(
    c: &Config,
    weights: &Weights,
    memory: u64,
    shares: Option<Vec<f32>>,
    context: Option<usize>,
) -> Forecast {
    let layers = weights.layers.iter();
    let experts: Vec<Arc<Expert>> = layers.flat_map(|l| l.experts.iter().cloned()).collect();
    let room = memory.saturating_sub(scratch(c.d_model, c.d_ff));
    let extra = Some(whole_scratch(c));
    let (mut placement, whole) = divide(
        room, c, weights, &experts, shares, context, extra, slot_bytes,
    );
    let aside = whole.as_ref().map_or(0, Whole::set_aside);
    let mut seen = Vec::new();
    let (mut dense, mut in_file) = (0, 0);
    for w in &weights.dense()[1..] {
        let key = w.bytes.as_ptr();
        let Some(bytes) = slot_bytes(&[w]) else {
            continue;
        };
        if !seen.contains(&key) && placement.reserve(bytes) {
            seen.push(key);
            dense += bytes;
            in_file += w.bytes.len() as u64;
        }
    }
    // Shares are of tokens: a layer's sum is the experts that a token takes.
    let (mut n, mut found) = (0, 0.0);
    while let Some(Step::Add(key)) = placement.next() {
        placement.begun(Step::Add(key), n);
        placement.arrived(n);
        n += 1;
        found += f64::from(placement.share(key));
    }
    let share = |key: usize| f64::from(placement.share(key));
    let all = (0..experts.len()).map(share).sum::<f64>().max(1e-9);
    let away = (0..experts.len()).filter(|key| placement.place(*key) == Where::Away);
    let left = away.map(|key| share(key) * experts[key].bytes() as f64);
    let left: f64 = left.sum();
    let (kv, kv_tokens) = whole.as_ref().map_or((0, 0), Whole::kv);
    let dense_left = match whole {
        Some(_) => 0,
        None => weights.dense_bytes() - in_file,
    };
    Forecast {
        scratch: memory.min(scratch(c.d_model, c.d_ff) + aside - kv),
        kv,
        kv_tokens,
        dense,
        experts: n,
        of: experts.len(),
        bytes: placement.taken() - dense,
        hits: found / all,
        left: left + dense_left as f64,
    }
}

/// What of a model could lie on a GPU, however much memory that has, in bytes.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Needs {
    /// What it computes with.
    pub scratch: u64,
    /// What every token reads: matrices, norms and routers.
    pub dense: u64,
    /// Keys and values of a token, if passes can stay there.
    pub kv_token: Option<u64>,
    /// Experts that could be there …
    pub experts: usize,
    /// … of so many …
    pub of: usize,
    /// … in so many bytes.
    pub bytes: u64,
    /// Formats of matrices that stay with the CPU, as there are no kernels for them; each once, in their order.
    pub without: Vec<Format>,
}

/// What of a model could lie on a GPU.
pub fn needs(c: &Config, weights: &Weights) -> Needs {
    let layers = weights.layers.iter();
    let experts: Vec<Arc<Expert>> = layers.flat_map(|l| l.experts.iter().cloned()).collect();
    let extra = Some(whole_scratch(c));
    // As much memory as nobody has, so that all of it finds room.
    let (placement, whole) = divide(1 << 60, c, weights, &experts, None, None, extra, slot_bytes);
    let places = (0..experts.len()).filter_map(|key| placement.bytes(key));
    let places: Vec<u64> = places.collect();
    let layers = weights.layers.iter();
    let dense = layers.flat_map(|l| [&l.q, &l.k, &l.v, &l.o]);
    let dense: Vec<&Weight> = dense.chain([&weights.head]).collect();
    let of_experts = experts.iter().flat_map(|e| e.weights());
    let mut without: Vec<Format> = (dense.iter().copied().chain(of_experts))
        .map(|w| w.format)
        .filter(|format| !FORMATS.contains(format))
        .collect();
    without.sort_by_key(|format| format.index());
    without.dedup();
    let matrices: u64 = dense.iter().filter_map(|w| slot_bytes(&[w])).sum();
    let small = whole.as_ref().map_or(0, Whole::small);
    Needs {
        scratch: scratch(c.d_model, c.d_ff) + whole.as_ref().map_or(0, |_| whole_scratch(c)),
        dense: matrices + small,
        kv_token: whole.as_ref().map(Whole::token),
        experts: places.len(),
        of: experts.len(),
        bytes: places.iter().sum(),
        without,
    }
}
