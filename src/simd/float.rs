//! The float helpers, written once.
//!
//! Each is a plain loop that a compiler vectorizes. A tier compiles the same body with its own
//! instructions (the `float_doors!` macro below), so all tiers do the same operations in the same
//! order: elementwise helpers are unfused, reductions go through 16 partial sums and a fixed tree
//! ([`Lanes`], held in the tier's registers), and nothing calls the platform's math library.

use crate::quant::float::{Element, LANES, Lanes, axpy, dot, dots};
use half::f16;

/// `e^x`, for x in -87..=88 within 2 ulp; below that 0, above that `e^88`.
///
/// Range reduction by ln 2 in two parts and the degree-6 polynomial of Cephes `expf` (S. Moshier),
/// unfused. The rounding constant is 1.5·2²³, see [`crate::quant::act::quantize`].
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0;
    let clamped = if x > 88.0 { 88.0 } else { x };
    let clamped = if clamped < -87.0 { -87.0 } else { clamped };
    let rounded = clamped * std::f32::consts::LOG2_E + ROUND;
    let n = rounded - ROUND;
    let r = (clamped - n * 0.693_359_4) - n * -2.121_944_4e-4;
    let mut p = 1.987_569_2e-4;
    for c in [
        1.398_2e-3,
        8.333_452e-3,
        4.166_579_6e-2,
        1.666_666_5e-1,
        0.5,
    ] {
        p = p * r + c;
    }
    let y = (p * (r * r) + r) + 1.0;
    let scale = f32::from_bits((rounded.to_bits() << 23).wrapping_add(0x3f80_0000)); // 2^n
    if x < -87.0 { 0.0 } else { y * scale }
}

/// `y = x / sqrt(mean(x²) + eps) · w`. All `(n)`.
#[inline(always)]
pub fn rms_norm<L: Lanes>(x: &[f32], w: &[f32], eps: f32, y: &mut [f32]) {
    let mean = dot::<L, f32>(x, x) / x.len() as f32;
    let scale = 1.0 / (mean + eps).sqrt();
    for ((y, x), w) in y.iter_mut().zip(x).zip(w) {
        *y = x * scale * w;
    }
}

/// `y += x`. Both `(n)`.
#[inline(always)]
pub fn add(x: &[f32], y: &mut [f32]) {
    for (y, x) in y.iter_mut().zip(x) {
        *y += x;
    }
}

/// `y += a·x`, unfused. `x`, `y`: `(n)`.
#[inline(always)]
pub fn add_scaled(a: f32, x: &[f32], y: &mut [f32]) {
    for (y, x) in y.iter_mut().zip(x) {
        *y += a * x;
    }
}

/// `gate = silu(gate) · up`, `silu(g) = g / (1 + e^-g)`. Both `(n)`.
#[inline(always)]
pub fn silu_mul(gate: &mut [f32], up: &[f32]) {
    for (g, u) in gate.iter_mut().zip(up) {
        *g = *g / (1.0 + exp(-*g)) * u;
    }
}

/// Rotates the interleaved pairs `(x[2i], x[2i + 1])` of one head by angle `i`.
///
/// `x`: `(n_rot)`; `cos`, `sin`: `(n_rot / 2)`.
#[inline(always)]
pub fn rope(x: &mut [f32], cos: &[f32], sin: &[f32]) {
    for ((pair, c), s) in x.chunks_exact_mut(2).zip(cos).zip(sin) {
        let (a, b) = (pair[0], pair[1]);
        pair[0] = a * c - b * s;
        pair[1] = a * s + b * c;
    }
}

/// Running softmax of one query head: the largest score so far and the sum of the weights.
#[derive(Clone, Copy, Debug)]
pub struct Running {
    /// Largest score.
    pub max: f32,
    /// Sum of `e^(score - max)`.
    pub sum: f32,
}

impl Running {
    /// Before any key.
    pub const START: Running = Running {
        max: f32::NEG_INFINITY,
        sum: 0.0,
    };
}

/// One query head of one token, on its way through the blocks of a cache.
pub struct Query<'a> {
    /// `(dim)`, already scaled.
    pub q: &'a [f32],
    /// How many of the present block's keys it sees, `1..=KV_BLOCK`.
    pub n: usize,
    /// The softmax so far.
    pub run: Running,
    /// The weighted sum of values so far, `(dim)`.
    pub acc: &'a mut [f32],
}

/// The keys and values of one KV head in one block of a cache, `E` an element or a byte of one.
#[derive(Clone, Copy)]
pub struct Pane<'a, E> {
    /// `(dim, KV_BLOCK)`
    pub k: &'a [E],
    /// `(KV_BLOCK, dim)`
    pub v: &'a [E],
}

impl<E> Pane<'_, E> {
    /// Nothing.
    pub const EMPTY: Self = Pane { k: &[], v: &[] };
}

/// One block of attention for queries that share a KV head (FlashAttention's update, Dao et al. 2022): the
/// block's scores, the running softmax, the weighted sum of values.
///
/// A score is one chain of `fma`s over `dim`, and so is an element of the sum over the keys; lanes are keys
/// there and elements here, so that nothing is added across lanes. Blocks start at fixed absolute
/// positions and come in order, so the result for a query depends on its keys alone and not on how the
/// tokens were batched.
///
/// Whatever lies behind a query's `n` keys is not looked at. `ahead`: what comes next, in any type, to be brought nearer
/// meanwhile: a head's panes lie apart, each a few pages long, so that a CPU does not see by itself where this is going.
#[inline(always)]
pub fn attend<L: Lanes, E: Element>(
    queries: &mut [Query<'_>],
    pane: Pane<'_, E>,
    ahead: Pane<'_, u8>,
) {
    let (mut rest, mut ahead) = (queries, ahead);
    while let [first, ..] = rest {
        let len = first.q.len() * KV_BLOCK;
        let pane = Pane {
            k: &pane.k[..len],
            v: &pane.v[..len],
        };
        let (now, later) = match rest.len() {
            8.. if L::WIDE => rest.split_at_mut(8),
            4.. => rest.split_at_mut(4),
            _ => rest.split_at_mut(1),
        };
        // Accumulators that a tier's registers hold, beside what they are made from.
        match (L::WIDE, now.len()) {
            (true, 8) => group::<L, E, 8, 2>(now, pane, ahead),
            (true, 4) => group::<L, E, 4, 4>(now, pane, ahead),
            (true, _) => group::<L, E, 1, 4>(now, pane, ahead),
            (false, 4) => group::<L, E, 4, 1>(now, pane, ahead),
            (false, _) => group::<L, E, 1, 1>(now, pane, ahead),
        }
        // Once is enough.
        (rest, ahead) = (later, Pane::EMPTY);
    }
}

/// [`attend`] for R queries, 16 C keys or elements at a time.
#[inline(always)]
fn group<L: Lanes, E: Element, const R: usize, const C: usize>(
    queries: &mut [Query<'_>],
    pane: Pane<'_, E>,
    ahead: Pane<'_, u8>,
) {
    let queries: &mut [Query<'_>; R] = queries.try_into().expect("R queries");
    let most = queries.iter().fold(0, |n, query| n.max(query.n));
    let mut p = [[0.0; KV_BLOCK]; R];
    scores::<L, E, R, C>(queries, pane.k, ahead.k, most, &mut p);
    let keep = softmax::<L, R>(queries, &mut p);
    for (query, keep) in queries.iter_mut().zip(keep) {
        query.acc.iter_mut().for_each(|a| *a *= keep);
    }
    values::<L, E, R, C>(queries, pane.v, ahead.v, &p);
}

/// `p[r][i] = q[r] · k[i]` for the first `n` keys, and perhaps some more; 16 C keys at a time.
#[inline(always)]
fn scores<L: Lanes, E: Element, const R: usize, const C: usize>(
    queries: &[Query<'_>; R],
    k: &[E],
    ahead: &[u8],
    n: usize,
    p: &mut [[f32; KV_BLOCK]; R],
) {
    // Slices of one length, so that one comparison serves for all of them.
    let dim = k.len() / KV_BLOCK;
    let mut q: [&[f32]; R] = [&[]; R];
    for r in 0..R {
        q[r] = &queries[r].q[..dim];
    }
    for first in (0..n).step_by(LANES * C) {
        let mut sums = [[L::splat(0.0); C]; R];
        for d in 0..dim {
            if first == 0 {
                fetch::<L>(ahead, d, dim);
            }
            let keys = k[d * KV_BLOCK..][..KV_BLOCK][first..][..LANES * C]
                .as_chunks()
                .0;
            for c in 0..C {
                let keys = E::load::<L>(&keys[c]);
                for r in 0..R {
                    sums[r][c] = L::splat(q[r][d]).mul_add(keys, sums[r][c]);
                }
            }
        }
        for r in 0..R {
            let out = p[r][first..][..LANES * C].as_chunks_mut().0;
            for c in 0..C {
                sums[r][c].store(&mut out[c]);
            }
        }
    }
}

/// Has memory bring part `i` of `n`.
#[inline(always)]
fn fetch<L: Lanes>(ahead: &[u8], i: usize, n: usize) {
    let len = ahead.len() / n;
    for line in (0..len).step_by(64) {
        L::fetch(ahead.as_ptr().wrapping_add(i * len + line));
    }
}

/// Takes each query's first `n` scores into its running softmax: `p` becomes `e^(score - max)`, and 0 from `n` on. Returns what
/// everything before has to be multiplied with. What there is one of for each query is worked side by side, too.
#[inline(always)]
fn softmax<L: Lanes, const R: usize>(
    queries: &mut [Query<'_>; R],
    p: &mut [[f32; KV_BLOCK]; R],
) -> [f32; R] {
    let (mut old, mut max) = ([0.0; R], [0.0; R]);
    for r in 0..R {
        let p = &mut p[r];
        p[queries[r].n..].fill(f32::NEG_INFINITY);
        old[r] = queries[r].run.max;
        let mut top = L::splat(old[r]);
        for p in p.as_chunks().0 {
            top = top.max(L::load(p));
        }
        max[r] = top.fold_max();
    }
    let mut keep = [0.0; R];
    for r in 0..R {
        keep[r] = exp(old[r] - max[r]);
    }
    for r in 0..R {
        let mut sums = [0.0f32; LANES];
        for p in p[r].as_chunks_mut::<LANES>().0 {
            for i in 0..LANES {
                p[i] = exp(p[i] - max[r]);
                sums[i] += p[i];
            }
        }
        let run = &mut queries[r].run;
        run.sum = run.sum * keep[r] + L::load(&sums).fold();
        run.max = max[r];
    }
    keep
}

/// `acc[r] += Σ_i p[r][i] · v[i]` over each query's keys; 16 C elements at a time.
#[inline(always)]
fn values<L: Lanes, E: Element, const R: usize, const C: usize>(
    queries: &mut [Query<'_>; R],
    v: &[E],
    ahead: &[u8],
    p: &[[f32; KV_BLOCK]; R],
) {
    let dim = queries[0].q.len();
    let all = queries.iter().fold(KV_BLOCK, |n, query| n.min(query.n));
    let whole = dim / (LANES * C) * (LANES * C);
    for first in (0..whole).step_by(LANES * C) {
        let mut acc = [[L::splat(0.0); C]; R];
        for r in 0..R {
            for c in 0..C {
                acc[r][c] = L::load(&queries[r].acc[first..].as_chunks().0[c]);
            }
        }
        for (i, v) in v.chunks_exact(dim).take(all).enumerate() {
            if first == 0 {
                fetch::<L>(ahead, i, KV_BLOCK);
            }
            let v = v[first..][..LANES * C].as_chunks().0;
            for c in 0..C {
                let v = E::load::<L>(&v[c]);
                for r in 0..R {
                    acc[r][c] = L::splat(p[r][i]).mul_add(v, acc[r][c]);
                }
            }
        }
        for r in 0..R {
            for c in 0..C {
                acc[r][c].store(&mut queries[r].acc[first..].as_chunks_mut().0[c]);
            }
        }
    }
    // The rest: elements that fill no registers, and keys that not all of the queries see.
    for (query, p) in queries.iter_mut().zip(p) {
        let tail = if whole < dim { 0..all } else { 0..0 };
        for i in tail {
            let v = &v[i * dim..][..dim];
            axpy::<L, E>(p[i], &v[whole..], &mut query.acc[whole..]);
        }
        for i in all..query.n {
            axpy::<L, E>(p[i], &v[i * dim..][..dim], query.acc);
        }
    }
}

/// `out[i] = x[i]`. Exact.
#[inline(always)]
pub fn widen<L: Lanes>(x: &[f16], out: &mut [f32]) {
    for (x, out) in x.as_chunks().0.iter().zip(out.as_chunks_mut().0) {
        L::load_f16(x).store(out);
    }
    let whole = x.len() / LANES * LANES;
    for (x, out) in x.iter().zip(out).skip(whole) {
        *out = x.widen();
    }
}

/// Keys of a block, `(dim, KV_BLOCK)`, from int8 and the scales of 32 elements of a key, `(dim / 32, KV_BLOCK)`. Exact: 8 bits
/// times 11.
#[inline(always)]
pub fn widen_keys(q: &[i8], d: &[f16], out: &mut [f32]) {
    let mut scales = [0.0; KV_BLOCK];
    for (row, (q, out)) in q
        .chunks_exact(KV_BLOCK)
        .zip(out.chunks_exact_mut(KV_BLOCK))
        .enumerate()
    {
        if row % 32 == 0 {
            for (scale, d) in scales.iter_mut().zip(&d[row / 32 * KV_BLOCK..]) {
                *scale = d.widen();
            }
        }
        for i in 0..KV_BLOCK {
            out[i] = q[i] as f32 * scales[i];
        }
    }
}

/// Values of a block, `(KV_BLOCK, dim)`, from int8 and the scales of 32 elements of a value, `(KV_BLOCK, dim / 32)`.
#[inline(always)]
pub fn widen_values(q: &[i8], d: &[f16], out: &mut [f32]) {
    for ((q, out), d) in q
        .as_chunks::<32>()
        .0
        .iter()
        .zip(out.as_chunks_mut::<32>().0)
        .zip(d)
    {
        let scale = d.widen();
        for i in 0..32 {
            out[i] = q[i] as f32 * scale;
        }
    }
}

/// Positions in a block of the KV cache.
pub const KV_BLOCK: usize = 64;

/// The loop nest of the float formats: four rows at once, so that four chains of additions overlap.
#[inline(always)]
pub(super) fn matmul<L: Lanes, E: Element>(
    w: &[E],
    x: super::Tokens<'_>,
    y: &mut crate::pool::Stripe<'_>,
) {
    let k = x.acts.k();
    for (g, rows) in w.chunks(4 * k).enumerate() {
        for t in 0..x.len() {
            let x = x.token(t).floats();
            let out = &mut y.row(t)[4 * g..];
            if rows.len() == 4 * k {
                let rows = [0, 1, 2, 3].map(|r| &rows[r * k..][..k]);
                out[..4].copy_from_slice(&dots::<L, E, 4>(rows, x));
            } else {
                for (out, row) in out.iter_mut().zip(rows.chunks_exact(k)) {
                    *out = dot::<L, E>(row, x);
                }
            }
        }
    }
}

/// Compiles every helper of this file, and the definition of every weight format, for one tier: plain
/// functions with the tier's `#[target_feature]`, and `install_common(k)`, which puts them into a
/// [`super::Kernels`] table. A format's own kernel, where a tier has one, is installed after it.
macro_rules! float_doors {
    ($lanes:ty $(, #[$tier:meta])?) => {
        use $crate::quant::{self, act};
        use $crate::simd::float::{self, Pane, Query};
        use $crate::simd::{self, Kernels, MatMul, Rows, Tokens};
        use $crate::pool::Stripe;

        $(#[$tier])?
        fn quantize(block: usize, x: &[f32], out: &mut act::Chunk) {
            act::quantize(block, x, out)
        }
        $(#[$tier])?
        fn rms_norm(x: &[f32], w: &[f32], eps: f32, y: &mut [f32]) {
            float::rms_norm::<$lanes>(x, w, eps, y)
        }
        $(#[$tier])?
        fn add(x: &[f32], y: &mut [f32]) {
            float::add(x, y)
        }
        $(#[$tier])?
        fn add_scaled(a: f32, x: &[f32], y: &mut [f32]) {
            float::add_scaled(a, x, y)
        }
        $(#[$tier])?
        fn silu_mul(gate: &mut [f32], up: &[f32]) {
            float::silu_mul(gate, up)
        }
        $(#[$tier])?
        fn rope(x: &mut [f32], cos: &[f32], sin: &[f32]) {
            float::rope(x, cos, sin)
        }
        $(#[$tier])?
        fn attend_f32(
            queries: &mut [Query<'_>],
            pane: Pane<'_, f32>,
            ahead: Pane<'_, u8>,
        ) {
            float::attend::<$lanes, f32>(queries, pane, ahead)
        }
        $(#[$tier])?
        fn attend_f16(
            queries: &mut [Query<'_>],
            pane: Pane<'_, half::f16>,
            ahead: Pane<'_, u8>,
        ) {
            float::attend::<$lanes, half::f16>(queries, pane, ahead)
        }
        $(#[$tier])?
        fn widen(x: &[half::f16], out: &mut [f32]) {
            float::widen::<$lanes>(x, out)
        }
        $(#[$tier])?
        fn widen_keys(q: &[i8], d: &[half::f16], out: &mut [f32]) {
            float::widen_keys(q, d, out)
        }
        $(#[$tier])?
        fn widen_values(q: &[i8], d: &[half::f16], out: &mut [f32]) {
            float::widen_values(q, d, out)
        }
        $(#[$tier])?
        fn matmul_defined(w: Rows<'_>, x: Tokens<'_>, y: &mut Stripe<'_>) {
            simd::matmul_rows(w, x, y, |row, x| w.format.dot(row, x))
        }
        $(#[$tier])?
        fn matmul_f32(w: Rows<'_>, x: Tokens<'_>, y: &mut Stripe<'_>) {
            float::matmul::<$lanes, f32>(quant::blocks(w.bytes), x, y)
        }
        $(#[$tier])?
        fn matmul_f16(w: Rows<'_>, x: Tokens<'_>, y: &mut Stripe<'_>) {
            float::matmul::<$lanes, half::f16>(quant::blocks(w.bytes), x, y)
        }
        $(#[$tier])?
        fn matmul_bf16(w: Rows<'_>, x: Tokens<'_>, y: &mut Stripe<'_>) {
            float::matmul::<$lanes, half::bf16>(quant::blocks(w.bytes), x, y)
        }

        /// Puts this tier's float helpers, and the definition of every weight format, into the table.
        fn install_common(k: &mut Kernels) {
            k.quantize = quantize;
            k.rms_norm = rms_norm;
            k.add = add;
            k.add_scaled = add_scaled;
            k.silu_mul = silu_mul;
            k.rope = rope;
            k.attend_f32 = attend_f32;
            k.attend_f16 = attend_f16;
            k.widen = widen;
            k.widen_keys = widen_keys;
            k.widen_values = widen_values;
            k.matmul = [matmul_defined as MatMul; quant::Format::COUNT];
            k.matmul[quant::Format::F32.index()] = matmul_f32;
            k.matmul[quant::Format::F16.index()] = matmul_f16;
            k.matmul[quant::Format::BF16.index()] = matmul_bf16;
        }
    };
}
pub(super) use float_doors;
