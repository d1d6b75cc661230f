//! The routed feed-forward part of a layer: tokens are gathered per expert, so an expert's bytes are
//! read once for all tokens that chose it, and no other expert is touched.

use super::linear::{Input, Job, matmul};
use super::offload::Absent;
use super::router::{self, Choice};
use super::store::{Chosen, Store};
use super::weights::{Expert, Layer};
use super::{Config, Machine};
use crate::error::Result;
use std::ops::Range;
use std::sync::Arc;

/// Rows (token × rank) that are worked at once, which bounds the scratch memory.
const WAVE: usize = 512;

/// From so many rows of a wave on their activations are copied together: that costs less than it saves when experts' tokens then follow
/// each other.
const SIDE_BY_SIDE: usize = 32;

/// Why there is something left to split off.
const ROOM: &str = "buffers have room for all rows of a wave";

/// The tokens of one expert.
struct Bucket {
    expert: usize,
    /// In [`ExpertScratch::bucket`].
    range: Range<usize>,
}

impl Chosen for Bucket {
    fn expert(&self) -> usize {
        self.expert
    }
}

/// An expert with some of its tokens.
struct Piece {
    which: usize,
    expert: Arc<Expert>,
    /// In [`ExpertScratch::bucket`].
    range: Range<usize>,
}

/// What is worked at once: as many pieces as fit.
type Wave = Vec<Piece>;

/// Buffers of [`experts`], reused from layer to layer.
#[derive(Default)]
pub(super) struct ExpertScratch {
    /// `(n_tok, n_expert)`
    logits: Vec<f32>,
    /// `(n_tok, n_used)`
    pub(super) choices: Vec<Choice>,
    /// `(n_tok · n_used)` token indices, grouped by expert.
    bucket: Vec<u32>,
    /// `(n_tok · n_used)` where each bucket entry's result goes: `token · n_used + rank`.
    home: Vec<u32>,
    /// `(rows of a wave, d_ff)`
    gate: Vec<f32>,
    up: Vec<f32>,
    /// `(rows of a wave, d_model)`
    down: Vec<f32>,
    /// `(n_tok · n_used, d_model)`
    result: Vec<f32>,
    /// `(rows that a GPU computed, d_model)`
    returned: Vec<f32>,
    /// Tokens of a wave's experts, side by side.
    outer: Input,
    inner: Input,
    /// `0 ..` rows of a wave.
    all: Vec<u32>,
}

/// `x[t] += Σ_rank weight[t][rank] · expert[t][rank](h[t])`, ranks in order.
///
/// `h`: `(n_tok, d_model)` normalised, already prepared as `input`; `x`: `(n_tok, d_model)`.
/// `choices` are made already. `see` is shown each expert's input of `down`, `(n, d_ff)`. Returns the bytes of expert
/// weights that were read.
///
/// Experts that a GPU has are computed there, at the same time as the others here ([`super::offload`]).
///
/// # Errors
/// If the store cannot read an expert.
pub(super) fn experts(
    machine: &Machine,
    config: &Config,
    store: &Store,
    layer: usize,
    input: &Input,
    x: &mut [f32],
    s: &mut ExpertScratch,
    mut see: impl FnMut(usize, &[f32]),
) -> Result<u64> {
    let (n_used, d) = (config.n_used, config.d_model);
    s.result.resize(s.choices.len() * d, 0.0);
    let mut bytes = 0;
    let mut rest = s.buckets(config);
    let mut elsewhere = store.offload().and_then(|gpu| {
        let bucket = &s.bucket;
        let pick = |b: &Bucket| &bucket[b.range.clone()];
        gpu.start(layer, x.len() / d, input, &mut rest, pick)
    });
    loop {
        let here = std::mem::take(&mut rest);
        bytes += run(machine, config, store, layer, input, here, s, &mut see)?;
        let Some(gpu) = elsewhere.take() else { break };
        match gpu.finish(d, &mut s.returned) {
            Ok(buckets) => s.take_in(&buckets, d),
            // It failed: they are computed here after all.
            Err(buckets) => rest = buckets,
        }
    }

    let (choices, result) = (&s.choices, &s.result);
    machine.pool.rows(x, d, |t, x| {
        for slot in t * n_used..(t + 1) * n_used {
            machine
                .kernels
                .add_scaled(choices[slot].weight, &result[slot * d..][..d], x);
        }
    });
    Ok(bytes)
}

/// Runs some experts of a layer over some tokens of `input`: `out (rows, d_model)` for those of each of `absent`, in their order.
/// Returns the bytes of expert weights that were read.
///
/// # Errors
/// If the store cannot read an expert.
pub(super) fn some_experts(
    machine: &Machine,
    config: &Config,
    store: &Store,
    layer: usize,
    input: &Input,
    absent: &[Absent],
    s: &mut ExpertScratch,
    out: &mut [f32],
) -> Result<u64> {
    s.bucket.clear();
    let mut rest = Vec::new();
    for Absent { expert, pick } in absent {
        let range = s.bucket.len()..s.bucket.len() + pick.len();
        s.bucket.extend(pick);
        let expert = *expert;
        rest.push(Bucket { expert, range });
    }
    s.home.clear();
    s.home.extend(0..s.bucket.len() as u32);
    s.result.resize(out.len(), 0.0);
    let see = &mut |_, _: &[f32]| ();
    let bytes = run(machine, config, store, layer, input, rest, s, see)?;
    out.copy_from_slice(&s.result);
    Ok(bytes)
}

/// Runs the experts of `buckets` as they are there. Returns the bytes of expert weights that were read.
fn run(
    machine: &Machine,
    config: &Config,
    store: &Store,
    layer: usize,
    input: &Input,
    mut buckets: Vec<Bucket>,
    s: &mut ExpertScratch,
    see: &mut impl FnMut(usize, &[f32]),
) -> Result<u64> {
    let mut bytes = 0;
    while !buckets.is_empty() {
        for wave in waves(store.ready(layer, &mut buckets)?) {
            run_wave(machine, config, input, &wave, s, see);
            bytes += wave.iter().map(|piece| piece.expert.bytes()).sum::<u64>();
        }
    }
    Ok(bytes)
}

impl ExpertScratch {
    /// Buckets the tokens by expert, once for the layer.
    fn buckets(&mut self, config: &Config) -> Vec<Bucket> {
        self.bucket.clear();
        self.home.clear();
        let mut buckets = Vec::new();
        for expert in 0..config.n_expert {
            let start = self.bucket.len();
            for (i, c) in self.choices.iter().enumerate() {
                if c.expert == expert as u32 {
                    self.bucket.push((i / config.n_used) as u32);
                    self.home.push(i as u32);
                }
            }
            let range = start..self.bucket.len();
            if !range.is_empty() {
                buckets.push(Bucket { expert, range });
            }
        }
        buckets
    }

    /// Puts the rows that came back for some buckets where they belong.
    fn take_in(&mut self, buckets: &[Bucket], d: usize) {
        let homes = buckets.iter().flat_map(|b| &self.home[b.range.clone()]);
        for (row, home) in self.returned.chunks_exact(d).zip(homes) {
            self.result[*home as usize * d..][..d].copy_from_slice(row);
        }
    }

    /// How many tokens chose each expert, `(n_expert)`.
    pub(super) fn counts(&self, config: &Config) -> Vec<usize> {
        let mut counts = vec![0; config.n_expert];
        for c in &self.choices {
            counts[c.expert as usize] += 1;
        }
        counts
    }

    /// Bytes that one token takes of the buffers that grow with a pass.
    pub(super) fn token_bytes(config: &Config) -> usize {
        let ranks = config.n_used * (size_of::<Choice>() + 8 + 4 * config.d_model);
        ranks + 4 * config.n_expert
    }

    /// Bytes that the buffers of a wave take.
    pub(super) fn wave_bytes(config: &Config, n_tok: usize) -> usize {
        let rows = WAVE.min(n_tok * config.n_used);
        // gate, up, down; gate and what goes in once more, quantized.
        4 * rows * (3 * config.d_ff + 2 * config.d_model)
    }

    /// Bytes that the buffers hold.
    pub(super) fn bytes(&self) -> usize {
        let floats = [
            &self.logits,
            &self.gate,
            &self.up,
            &self.down,
            &self.result,
            &self.returned,
        ];
        let floats: usize = floats.iter().map(|v| 4 * v.capacity()).sum();
        floats + self.outer.bytes() + self.inner.bytes()
    }
}

/// Puts experts together into waves: whole buckets while they fit, and a large bucket in parts.
fn waves(ready: Vec<(Bucket, Arc<Expert>)>) -> Vec<Wave> {
    let mut waves: Vec<Wave> = Vec::new();
    let mut rows = WAVE;
    for (bucket, expert) in ready {
        for start in bucket.range.clone().step_by(WAVE) {
            let range = start..bucket.range.end.min(start + WAVE);
            if rows + range.len() > WAVE {
                waves.push(Vec::new());
                rows = 0;
            }
            rows += range.len();
            let wave = waves.last_mut().expect("one was just made");
            wave.push(Piece {
                which: bucket.expert,
                expert: Arc::clone(&expert),
                range,
            });
        }
    }
    waves
}

/// Fills `choices`; in a dense model every token takes the one expert there is.
///
/// `h`: `(n_tok, d_model)` normalised, already prepared as `input`; `all`: `0..n_tok`.
pub(super) fn choose(
    machine: &Machine,
    config: &Config,
    layer: &Layer,
    input: &Input,
    all: &[u32],
    s: &mut ExpertScratch,
) {
    s.choices.clear();
    s.choices.resize(
        all.len() * config.n_used,
        Choice {
            expert: 0,
            weight: 1.0,
        },
    );
    if let Some(router) = &layer.router {
        let (logits, choices) = (&mut s.logits, &mut s.choices);
        router::choose(machine, router, input, all, logits, choices);
    }
}

/// Runs some experts over their buckets and puts the rows where they belong in `result`.
fn run_wave(
    machine: &Machine,
    config: &Config,
    input: &Input,
    wave: &[Piece],
    s: &mut ExpertScratch,
    see: &mut impl FnMut(usize, &[f32]),
) {
    let (d, d_ff) = (config.d_model, config.d_ff);
    let rows = wave.iter().map(|piece| piece.range.len()).sum::<usize>();
    s.gate.resize(rows * d_ff, 0.0);
    s.up.resize(rows * d_ff, 0.0);
    s.down.resize(rows * d, 0.0);
    s.all.clear();
    s.all.extend(0..rows as u32);

    let picked = || wave.iter().map(|piece| &s.bucket[piece.range.clone()]);
    let side_by_side = rows >= SIDE_BY_SIDE;
    if side_by_side {
        let weights = wave.iter().flat_map(|p| [&p.expert.gate, &p.expert.up]);
        let picked: Vec<&[u32]> = picked().collect();
        s.outer.gather(machine, input, &picked.concat(), weights);
    }
    let (mut gates, mut ups) = (s.gate.as_mut_slice(), s.up.as_mut_slice());
    let mut all = s.all.as_slice();
    let mut jobs = Vec::with_capacity(2 * wave.len());
    for (Piece { expert, range, .. }, picked) in wave.iter().zip(picked()) {
        let here = all.split_off(..range.len()).expect(ROOM);
        let (x, pick) = match side_by_side {
            true => (&s.outer, here),
            false => (input, picked),
        };
        jobs.push(Job {
            w: &expert.gate,
            x,
            pick,
            y: gates.split_off_mut(..range.len() * d_ff).expect(ROOM),
        });
        jobs.push(Job {
            w: &expert.up,
            x,
            pick,
            y: ups.split_off_mut(..range.len() * d_ff).expect(ROOM),
        });
    }
    matmul(machine, &mut jobs);

    let mut pairs: Vec<_> = s
        .gate
        .chunks_exact_mut(d_ff)
        .zip(s.up.chunks_exact(d_ff))
        .collect();
    machine.pool.each(&mut pairs, |_, (gate, up)| {
        machine.kernels.silu_mul(gate, up)
    });
    let mut inner = s.gate.as_slice();
    for Piece { which, range, .. } in wave {
        let (rows, rest) = inner.split_at(range.len() * d_ff);
        see(*which, rows);
        inner = rest;
    }
    s.inner.prepare(
        machine,
        &s.gate,
        d_ff,
        wave.iter().map(|piece| &piece.expert.down),
    );

    let mut downs = s.down.as_mut_slice();
    let mut all = s.all.as_slice();
    let mut jobs = Vec::with_capacity(wave.len());
    for Piece { expert, range, .. } in wave {
        jobs.push(Job {
            w: &expert.down,
            x: &s.inner,
            pick: all.split_off(..range.len()).expect(ROOM),
            y: downs.split_off_mut(..range.len() * d).expect(ROOM),
        });
    }
    matmul(machine, &mut jobs);

    let homes = wave.iter().flat_map(|piece| &s.home[piece.range.clone()]);
    for (row, home) in s.down.chunks_exact(d).zip(homes) {
        s.result[*home as usize * d..][..d].copy_from_slice(row);
    }
}
