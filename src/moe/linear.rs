//! Matrix products with weights, many in one parallel region.

use super::Machine;
use crate::gguf::Bytes;
use crate::pool::Part;
use crate::quant::Format;
use crate::quant::act::{ActKind, Acts, CHUNK, Chunk, Slots};
use crate::simd::{Rows, Tokens, rows_together};
use std::ops::Range;
use std::sync::Arc;

/// A weight matrix `(n_out, n_in)`, in the mapped file or in memory that was read from it ([`super::store`]).
#[derive(Clone)]
pub struct Weight {
    /// The tensor that it is, or is a part of.
    pub name: Arc<str>,
    /// Its format.
    pub format: Format,
    /// Length of a row.
    pub n_in: usize,
    /// Rows.
    pub n_out: usize,
    /// The rows, as they lie in the file.
    pub bytes: Bytes,
}

impl Weight {
    /// Rows `r` of the matrix.
    pub fn rows(&self, r: Range<usize>) -> Rows<'_> {
        let n = self.format.row_bytes(self.n_in);
        Rows {
            format: self.format,
            bytes: &self.bytes[r.start * n..r.end * n],
            k: self.n_in,
        }
    }

    /// The first `n` rows as a matrix.
    pub(super) fn first_rows(&self, n: usize) -> Weight {
        Weight {
            n_out: n,
            bytes: self.bytes.slice(0..n * self.format.row_bytes(self.n_in)),
            ..self.clone()
        }
    }

    /// Row `r` as floats: `out (n_in)`.
    pub fn decode_row(&self, r: usize, out: &mut [f32]) {
        self.format.decode(self.rows(r..r + 1).bytes, out);
    }
}

/// One input in every kind of activations that its weights want; each kind is made once.
#[derive(Default)]
pub struct Input {
    f32: Acts,
    q8: Acts,
    q8k: Acts,
}

impl Input {
    /// Prepares `x (n_tok, k)` for all of `weights`.
    pub fn prepare<'w>(
        &mut self,
        machine: &Machine,
        x: &[f32],
        k: usize,
        weights: impl IntoIterator<Item = &'w Weight>,
    ) {
        for kind in kinds(weights) {
            match self.kind_mut(kind).reset(kind, x.len() / k, k) {
                Slots::F32(out) => out.copy_from_slice(x),
                Slots::Int(chunks) => quantize(machine, kind, x, k, chunks),
            }
        }
    }

    /// Brings the tokens `pick` of `from` side by side, for all of `weights`, for which `from` is prepared.
    pub(super) fn gather<'w>(
        &mut self,
        machine: &Machine,
        from: &Input,
        pick: &[u32],
        weights: impl IntoIterator<Item = &'w Weight>,
    ) {
        for kind in kinds(weights) {
            let from = from.kind(kind);
            match self.kind_mut(kind).reset(kind, pick.len(), from.k()) {
                Slots::F32(out) => machine.pool.rows(out, from.k(), |i, out| {
                    out.copy_from_slice(from.token(pick[i] as usize).floats());
                }),
                Slots::Int(chunks) => {
                    let mut rows: Vec<_> = chunks.chunks_mut(pick.len()).collect();
                    machine.pool.each(&mut rows, |i, out| {
                        let chunks = from.chunks(i);
                        for (out, token) in out.iter_mut().zip(pick) {
                            *out = chunks[*token as usize];
                        }
                    });
                }
            }
        }
    }

    /// Bytes that the buffers hold.
    pub(super) fn bytes(&self) -> usize {
        [&self.f32, &self.q8, &self.q8k]
            .iter()
            .map(|a| a.bytes())
            .sum()
    }

    /// The activations for weights of `format`, which were among those prepared for.
    pub(super) fn of(&self, format: Format) -> &Acts {
        self.kind(format.act())
    }

    fn kind(&self, kind: ActKind) -> &Acts {
        match kind {
            ActKind::F32 => &self.f32,
            ActKind::Q8 => &self.q8,
            ActKind::Q8K => &self.q8k,
        }
    }

    fn kind_mut(&mut self, kind: ActKind) -> &mut Acts {
        match kind {
            ActKind::F32 => &mut self.f32,
            ActKind::Q8 => &mut self.q8,
            ActKind::Q8K => &mut self.q8k,
        }
    }
}

/// The kinds of activations that some weights want, each once.
fn kinds<'w>(weights: impl IntoIterator<Item = &'w Weight>) -> impl Iterator<Item = ActKind> {
    let mut kinds = [None; 3];
    for w in weights {
        let kind = w.format.act();
        kinds[kind as usize] = Some(kind);
    }
    kinds.into_iter().flatten()
}

/// Fills `chunks (k / 256, n_tok)` from `x (n_tok, k)`.
fn quantize(machine: &Machine, kind: ActKind, x: &[f32], k: usize, chunks: &mut [Chunk]) {
    let n_tok = x.len() / k;
    let row = |i: usize, out: &mut [Chunk]| {
        for (x, out) in x.chunks_exact(k).zip(out) {
            let part = &x[CHUNK * i..k.min(CHUNK * (i + 1))];
            machine.kernels.quantize(kind, part, out);
        }
    };
    if n_tok < ALONE {
        chunks
            .chunks_mut(n_tok.max(1))
            .enumerate()
            .for_each(|(i, out)| row(i, out));
    } else {
        let mut rows: Vec<_> = chunks.chunks_mut(n_tok).collect();
        machine.pool.each(&mut rows, |i, out| row(i, out));
    }
}

/// Fewer tokens than this are quantized faster than other threads wake up.
const ALONE: usize = 4;

/// One product `y[i] = w · x[pick[i]]`.
pub struct Job<'a> {
    /// `(n_out, n_in)`
    pub w: &'a Weight,
    /// Prepared for `w`, `(n_tok, n_in)`.
    pub x: &'a Input,
    /// Which tokens of `x`, `(n)`.
    pub pick: &'a [u32],
    /// `(n, n_out)`
    pub y: &'a mut [f32],
}

/// Bytes of weights that one task reads: large enough to be worth a task, small enough to balance.
const TASK_BYTES: usize = 128 << 10;

/// Computes all jobs.
pub fn matmul(machine: &Machine, jobs: &mut [Job<'_>]) {
    let (mut parts, sources): (Vec<Part<'_>>, Vec<_>) = jobs
        .iter_mut()
        .map(|job| {
            let rows = TASK_BYTES / job.w.format.row_bytes(job.w.n_in);
            let group = rows_together(job.pick.len());
            let part = Part {
                out: &mut *job.y,
                width: job.w.n_out,
                grain: rows.next_multiple_of(group).max(group),
            };
            (
                part,
                (
                    job.w,
                    Tokens {
                        acts: job.x.of(job.w.format),
                        pick: job.pick,
                    },
                ),
            )
        })
        .unzip();
    machine.pool.stripes(&mut parts, |p, columns, mut stripe| {
        let (w, tokens) = sources[p];
        machine.kernels.matmul(w.rows(columns), tokens, &mut stripe);
    });
}
