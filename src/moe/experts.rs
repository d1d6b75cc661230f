//! The routed feed-forward part of a layer: tokens are gathered per expert, so an expert's bytes are
//! read once for all tokens that chose it, and no other expert is touched.

use super::linear::{Input, Job, matmul};
use super::router::{self, Choice};
use super::weights::Layer;
use super::{Config, Machine};
use std::ops::Range;

/// Rows (token × rank) that are worked at once, which bounds the scratch memory; at least one whole
/// expert is always worked.
const WAVE: usize = 256;

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
    inner: Input,
    all: Vec<u32>,
}

/// `x[t] += Σ_rank weight[t][rank] · expert[t][rank](h[t])`, ranks in order.
///
/// `h`: `(n_tok, d_model)` normalised, already prepared as `input`; `x`: `(n_tok, d_model)`.
/// `see` is shown each expert's input of `down`, `(n, d_ff)`. Returns the bytes of expert weights that were read.
pub(super) fn experts(
    machine: &Machine,
    config: &Config,
    layer: &Layer,
    input: &Input,
    all: &[u32],
    x: &mut [f32],
    s: &mut ExpertScratch,
    mut see: impl FnMut(usize, &[f32]),
) -> u64 {
    let (n_tok, n_used, d) = (all.len(), config.n_used, config.d_model);
    choose(machine, config, layer, input, all, s);

    // Bucket the tokens by expert, once for the layer.
    s.bucket.clear();
    s.home.clear();
    let mut ranges: Vec<(usize, Range<usize>)> = Vec::new();
    for e in 0..config.n_expert {
        let start = s.bucket.len();
        for (i, c) in s.choices.iter().enumerate() {
            if c.expert == e as u32 {
                s.bucket.push((i / n_used) as u32);
                s.home.push(i as u32);
            }
        }
        if s.bucket.len() > start {
            ranges.push((e, start..s.bucket.len()));
        }
    }

    s.result.resize(n_tok * n_used * d, 0.0);
    let mut bytes = 0;
    let mut rest = ranges.as_slice();
    while !rest.is_empty() {
        let first = rest[0].1.start;
        let fits = rest
            .iter()
            .take_while(|(_, r)| r.end - first <= WAVE)
            .count()
            .max(1);
        let (wave, later) = rest.split_at(fits);
        run_wave(machine, config, layer, input, wave, s, &mut see);
        bytes += wave
            .iter()
            .map(|(e, _)| layer.experts[*e].bytes())
            .sum::<u64>();
        rest = later;
    }

    let (choices, result) = (&s.choices, &s.result);
    let mut rows: Vec<_> = x.chunks_exact_mut(d).collect();
    machine.pool.each(&mut rows, |t, x| {
        for slot in t * n_used..(t + 1) * n_used {
            machine
                .kernels
                .add_scaled(choices[slot].weight, &result[slot * d..][..d], x);
        }
    });
    bytes
}

/// Fills `choices`; in a dense model every token takes the one expert there is.
fn choose(
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
    layer: &Layer,
    input: &Input,
    wave: &[(usize, Range<usize>)],
    s: &mut ExpertScratch,
    see: &mut impl FnMut(usize, &[f32]),
) {
    let (d, d_ff) = (config.d_model, config.d_ff);
    let first = wave[0].1.start;
    let rows = wave[wave.len() - 1].1.end - first;
    s.gate.resize(rows * d_ff, 0.0);
    s.up.resize(rows * d_ff, 0.0);
    s.down.resize(rows * d, 0.0);
    s.all.clear();
    s.all.extend(0..rows as u32);

    let (mut gates, mut ups) = (s.gate.as_mut_slice(), s.up.as_mut_slice());
    let mut jobs = Vec::with_capacity(2 * wave.len());
    for (e, range) in wave {
        let expert = &layer.experts[*e];
        let pick = &s.bucket[range.clone()];
        jobs.push(Job {
            w: &expert.gate,
            x: input,
            pick,
            y: split(&mut gates, range.len() * d_ff),
        });
        jobs.push(Job {
            w: &expert.up,
            x: input,
            pick,
            y: split(&mut ups, range.len() * d_ff),
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
    for (e, range) in wave {
        see(
            *e,
            &s.gate[(range.start - first) * d_ff..(range.end - first) * d_ff],
        );
    }
    s.inner.prepare(
        machine,
        &s.gate,
        d_ff,
        wave.iter().map(|(e, _)| &layer.experts[*e].down),
    );

    let mut downs = s.down.as_mut_slice();
    let mut jobs = Vec::with_capacity(wave.len());
    for (e, range) in wave {
        let pick = &s.all[range.start - first..range.end - first];
        let y = split(&mut downs, range.len() * d);
        jobs.push(Job {
            w: &layer.experts[*e].down,
            x: &s.inner,
            pick,
            y,
        });
    }
    matmul(machine, &mut jobs);

    for (row, home) in s.down.chunks_exact(d).zip(&s.home[first..]) {
        s.result[*home as usize * d..][..d].copy_from_slice(row);
    }
}

/// Takes the first `n` elements off a slice.
fn split<'a>(rest: &mut &'a mut [f32], n: usize) -> &'a mut [f32] {
    let (head, tail) = std::mem::take(rest).split_at_mut(n);
    *rest = tail;
    head
}
