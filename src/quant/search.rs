//! The search for a group's scale, shared by the encoders.
//!
//! An encoder maps a group of 16 or 32 floats to small integers under one scale (and perhaps one
//! minimum). Rounding to the obvious scale is not the best one can do: the searches here try
//! several, and keep the one with the least weighted square error. Which ones are tried, and in
//! what order floats are added, is the reference's (llama.cpp, `ggml-quants.c`, in a build without
//! fused multiply-add), because people compare files byte for byte.
//!
//! That order is sequential within a group, so a group cannot be spread over the lanes of a
//! register. Groups can: every search works on `G` groups at once, transposed ([`Groups`]), one lane
//! each, with selections instead of branches. Encoders gather [`WIDE`] groups, of several blocks.

use super::Block;
use super::bits::{nearest, truncate};
use super::iq4_nl;
use super::lanes::Lanes;

/// `G` groups of `N` values, transposed: lane `g` of `x[i]` is value `i` of group `g`.
pub type Groups<const N: usize, const G: usize> = [Lanes<G>; N];

/// Groups that encoders search at once. With 8 or 16 a compiler unrolls the loops over lanes, and then
/// vectorizes only some of them; 64 no longer fit into the first-level cache. Measured for
/// [`affine`] with 8, 16, 32 and 64 groups of 32: 20, 42, 51 and 39 million weights a second on SSE2,
/// 36, 63, 119 and 63 on AVX2.
pub const WIDE: usize = 32;

/// A group whose largest magnitude is below this counts as zeros.
pub const TINY: f32 = 1e-15;

/// Transposes groups that lie one after the other. What `x` lacks is zero.
#[inline(always)]
pub fn groups<const N: usize, const G: usize>(x: &[f32]) -> Groups<N, G> {
    let mut out = [Lanes::ZERO; N];
    for (g, x) in x.chunks_exact(N).enumerate() {
        for (out, x) in out.iter_mut().zip(x) {
            out.0[g] = *x;
        }
    }
    out
}

/// Hands a row to `encode` in runs of blocks that have [`WIDE`] groups of `N` in all, the last perhaps fewer: their floats, the
/// importance of their columns, and the blocks to be filled.
#[inline(always)]
pub fn in_runs<const N: usize, B: Block>(
    x: &[f32],
    importance: Option<&[f32]>,
    out: &mut [B],
    mut encode: impl FnMut(&[f32], Option<&[f32]>, &mut [B]),
) {
    let n = N * WIDE;
    let starts = (0..).step_by(n);
    let runs = x.chunks(n).zip(out.chunks_mut(n / B::WEIGHTS));
    for ((x, out), at) in runs.zip(starts) {
        encode(x, importance.map(|w| &w[at..at + x.len()]), out);
    }
}

/// `scale · Σ x²` of each block, in the lanes of its groups of `N`.
#[inline(always)]
pub fn energy<const N: usize, const G: usize>(x: &[f32], block: usize, scale: f32) -> Lanes<G> {
    let mut out = Lanes::ZERO;
    for (out, x) in out.0.chunks_mut(block / N).zip(x.chunks_exact(block)) {
        out.fill(scale * sum_of_squares(x));
    }
    out
}

/// The inverse of [`groups`], for codes.
///
/// # Panics
/// If `out` is longer than `N · G`.
#[inline(always)]
pub fn ungroup<const N: usize, const G: usize>(q: &Groups<N, G>, out: &mut [u8]) {
    for (g, out) in out.chunks_exact_mut(N).enumerate() {
        for (out, q) in out.iter_mut().zip(q) {
            // Through i32: a cast of a float straight to u8 checks more than is needed.
            *out = q.0[g] as i32 as u8;
        }
    }
}

/// `Σ x²`, in order.
#[inline(always)]
fn sum_of_squares(x: &[f32]) -> f32 {
    let mut sum = 0.0;
    for x in x {
        sum += x * x;
    }
    sum
}

/// Importance of each value, from its column's importance and its own size: `c · √(s + x²)`, where
/// `s` is a mean square that keeps small values from being worth nothing.
#[inline(always)]
pub fn weigh<const N: usize, const G: usize>(
    x: &Groups<N, G>,
    columns: &Groups<N, G>,
    s: Lanes<G>,
) -> Groups<N, G> {
    let mut w = *columns;
    for (w, &x) in w.iter_mut().zip(x) {
        *w = *w * (s + x * x).sqrt();
    }
    w
}

/// `x²`, the importance where no other is known: large values matter most.
#[inline(always)]
pub fn squares<const N: usize, const G: usize>(x: &Groups<N, G>) -> Groups<N, G> {
    x.map(|x| x * x)
}

/// The sum of each group's values, in order.
#[inline(always)]
pub fn sums<const N: usize, const G: usize>(x: &Groups<N, G>) -> Lanes<G> {
    x.iter().fold(Lanes::ZERO, |sum, &x| sum + x)
}

/// The value of largest magnitude of each group (the first, if several), and that magnitude.
#[inline(always)]
pub fn peak<const N: usize, const G: usize>(x: &Groups<N, G>) -> (Lanes<G>, Lanes<G>) {
    let (mut peak, mut size) = (Lanes::ZERO, Lanes::ZERO);
    for &x in x {
        let up = x.abs().gt(size);
        size = up.select(x.abs(), size);
        peak = up.select(x, peak);
    }
    (peak, size)
}

/// The largest magnitude.
///
/// `x`: `(8 · n)`, so that eight running maxima need no remainder.
#[inline(always)]
pub fn size_of(x: &[f32]) -> f32 {
    let mut size = [0.0f32; 8];
    for x in x.as_chunks::<8>().0 {
        for i in 0..8 {
            let a = x[i].abs();
            size[i] = if a > size[i] { a } else { size[i] };
        }
    }
    size.iter().fold(0.0, |m, &a| if a > m { a } else { m })
}

/// [`peak`] of values in a row.
///
/// `x`: `(8 · n)`.
#[inline(always)]
pub fn peak_of(x: &[f32]) -> f32 {
    let size = size_of(x);
    if size > 0.0 {
        // Where nothing is a number, or all are zero, there is none.
        first(x, |x| x.abs() == size)
    } else {
        0.0
    }
}

/// The smallest and the largest value. Of two zeros, the first is the smallest.
///
/// `x`: `(8 · n)`.
#[inline(always)]
fn range_of(x: &[f32]) -> (f32, f32) {
    let (mut low, mut high) = ([f32::MAX; 8], [f32::MIN; 8]);
    for x in x.as_chunks::<8>().0 {
        for i in 0..8 {
            low[i] = if x[i] < low[i] { x[i] } else { low[i] };
            high[i] = if x[i] > high[i] { x[i] } else { high[i] };
        }
    }
    let low = low.iter().fold(f32::MAX, |m, &x| if x < m { x } else { m });
    let high = high
        .iter()
        .fold(f32::MIN, |m, &x| if x > m { x } else { m });
    let low = if low == 0.0 {
        first(x, |x| x == 0.0)
    } else {
        low
    };
    (low, high)
}

#[inline(always)]
fn first(x: &[f32], is: impl Fn(f32) -> bool) -> f32 {
    x.iter().copied().find(|&x| is(x)).unwrap_or(0.0)
}

/// `1 / d`, but 0 for 0.
#[inline(always)]
pub fn inverse(d: f32) -> f32 {
    if d != 0.0 { 1.0 / d } else { 0.0 }
}

/// Where an encoder's time goes: four searches over groups of values.
///
/// [`Plain`] compiles them for the CPU that the program is compiled for. The same bodies, compiled
/// for a better one, are a better `Search` with the same answers.
pub trait Search {
    /// [`affine`].
    fn affine<const N: usize, const G: usize>(
        x: &Groups<N, G>,
        w: &Groups<N, G>,
        top: i32,
        tries: Tries,
    ) -> Affine<N, G>;

    /// [`symmetric`].
    fn symmetric<const N: usize, const G: usize>(
        x: &Groups<N, G>,
        w: &Groups<N, G>,
        half: i32,
    ) -> (Lanes<G>, Groups<N, G>);

    /// [`descend`].
    fn descend<const N: usize, const G: usize>(
        x: &Groups<N, G>,
        half: i32,
    ) -> (Lanes<G>, Groups<N, G>);

    /// [`iq4_nl::fit`].
    fn values<const N: usize, const G: usize>(x: &Groups<N, G>, w: &Groups<N, G>) -> Lanes<G>;
}

/// The searches as they are. Never inlined: a compiler that knows the number of tries unrolls them
/// all, and takes minutes for it.
#[derive(Clone, Copy, Debug)]
pub struct Plain;

impl Search for Plain {
    #[inline(never)]
    fn affine<const N: usize, const G: usize>(
        x: &Groups<N, G>,
        w: &Groups<N, G>,
        top: i32,
        tries: Tries,
    ) -> Affine<N, G> {
        affine(x, w, top, tries)
    }

    #[inline(never)]
    fn symmetric<const N: usize, const G: usize>(
        x: &Groups<N, G>,
        w: &Groups<N, G>,
        half: i32,
    ) -> (Lanes<G>, Groups<N, G>) {
        symmetric(x, w, half)
    }

    #[inline(never)]
    fn descend<const N: usize, const G: usize>(
        x: &Groups<N, G>,
        half: i32,
    ) -> (Lanes<G>, Groups<N, G>) {
        descend(x, half)
    }

    #[inline(never)]
    fn values<const N: usize, const G: usize>(x: &Groups<N, G>, w: &Groups<N, G>) -> Lanes<G> {
        iq4_nl::fit(x, w)
    }
}

/// What to try in [`affine`].
#[derive(Clone, Copy, Debug)]
pub struct Tries {
    /// Added to the number of steps that the range is divided into, in the first try.
    pub from: f32,
    /// Added for each further try.
    pub by: f32,
    /// Tries after the first.
    pub more: usize,
    /// Whether the error is `Σ w·|e|` rather than `Σ w·e²`.
    pub absolute: bool,
}

/// The tries when importance is known.
pub const WEIGHTED: Tries = Tries {
    from: -0.9,
    by: 0.05,
    more: 36,
    absolute: false,
};

/// What a search found for each group: `x ≈ scale · q + min`.
#[derive(Clone, Copy, Debug)]
pub struct Affine<const N: usize, const G: usize> {
    /// Scale; 0 for a group of one single value.
    pub scale: Lanes<G>,
    /// Minimum, never above 0.
    pub min: Lanes<G>,
    /// Codes, `0..=top`.
    pub q: Groups<N, G>,
}

/// Finds a scale and a minimum for codes `0..=top`, with importance `w`.
///
/// Each try divides the range into a slightly different number of steps, rounds, and solves the
/// weighted least-squares problem of these codes for scale and minimum.
#[inline(always)]
pub fn affine<const N: usize, const G: usize>(
    x: &Groups<N, G>,
    w: &Groups<N, G>,
    top: i32,
    tries: Tries,
) -> Affine<N, G> {
    let (mut low, mut high) = (x[0], x[0]);
    let (mut sum_w, mut sum_x) = (Lanes::ZERO, Lanes::ZERO);
    for (&x, &w) in x.iter().zip(w) {
        low = x.lt(low).select(x, low);
        high = x.gt(high).select(x, high);
        sum_w = sum_w + w;
        sum_x = sum_x + w * x;
    }
    // Zero is always in the range.
    low = low.gt(Lanes::ZERO).select(Lanes::ZERO, low);
    let flat = high.eq(low);

    let mut inv = Lanes::all(top as f32) / (high - low);
    let (mut scale, mut min) = (Lanes::all(1.0) / inv, low);
    let mut q = [Lanes::ZERO; N];
    affine_codes(x, min, inv, top, &mut q);
    let mut best = affine_error(x, w, &q, scale, min, tries.absolute);
    // What the best codes were rounded with.
    let (mut best_inv, mut best_low) = (inv, low);

    for t in 0..=tries.more {
        // The range is counted from the best minimum so far, not from the smallest value.
        let steps = tries.from + tries.by * t as f32 + top as f32;
        inv = Lanes::all(steps) / (high - min);
        affine_codes(x, min, inv, top, &mut q);
        let (mut sum_q, mut sum_qq, mut sum_xq) = (Lanes::ZERO, Lanes::ZERO, Lanes::ZERO);
        for i in 0..N {
            let wq = w[i] * q[i];
            sum_q = sum_q + wq;
            sum_qq = sum_qq + wq * q[i];
            sum_xq = sum_xq + wq * x[i];
        }
        let det = sum_w * sum_qq - sum_q * sum_q;
        let s = (sum_w * sum_xq - sum_x * sum_q) / det;
        let m = (sum_qq * sum_x - sum_q * sum_xq) / det;
        let above = m.gt(Lanes::ZERO);
        let s = above.select(sum_xq / sum_qq, s);
        let m = above.select(Lanes::ZERO, m);
        let error = affine_error(x, w, &q, s, m, tries.absolute);

        let better = det.gt(Lanes::ZERO) & error.lt(best);
        best = better.select(error, best);
        best_inv = better.select(inv, best_inv);
        best_low = better.select(min, best_low);
        scale = better.select(s, scale);
        min = better.select(m, min);
    }

    affine_codes(x, best_low, best_inv, top, &mut q);
    Affine {
        scale: flat.select(Lanes::ZERO, scale),
        min: flat.select(low, min),
        q: q.map(|q| flat.select(Lanes::ZERO, q)),
    }
}

#[inline(always)]
fn affine_codes<const N: usize, const G: usize>(
    x: &Groups<N, G>,
    low: Lanes<G>,
    inv: Lanes<G>,
    top: i32,
    q: &mut Groups<N, G>,
) {
    for (q, &x) in q.iter_mut().zip(x) {
        *q = (inv * (x - low)).round_within(0, top);
    }
}

#[inline(always)]
fn affine_error<const N: usize, const G: usize>(
    x: &Groups<N, G>,
    w: &Groups<N, G>,
    q: &Groups<N, G>,
    scale: Lanes<G>,
    min: Lanes<G>,
    absolute: bool,
) -> Lanes<G> {
    let mut error = Lanes::ZERO;
    for i in 0..N {
        let e = scale * q[i] + min - x[i];
        error = error + w[i] * if absolute { e.abs() } else { e * e };
    }
    error
}

/// Finds a scale for codes `-half..half`, with importance `w`: scales and codes plus `half`.
///
/// Each try aims the value of largest magnitude at a slightly different place near `-half`, the
/// longer end of the range.
#[inline(always)]
pub fn symmetric<const N: usize, const G: usize>(
    x: &Groups<N, G>,
    w: &Groups<N, G>,
    half: i32,
) -> (Lanes<G>, Groups<N, G>) {
    let (peak, size) = peak(x);
    let (mut scale, mut best, mut best_inv) = (Lanes::ZERO, Lanes::ZERO, Lanes::ZERO);
    // The plain aim first, then 18 others: the order decides between equals.
    for t in std::iter::once(0).chain(-9..0).chain(1..=9) {
        let inv = Lanes::all(-(half as f32 + 0.1 * t as f32)) / peak;
        let (mut sum_xq, mut sum_qq) = (Lanes::ZERO, Lanes::ZERO);
        for (&x, &w) in x.iter().zip(w) {
            let q = (inv * x).round_within(-half, half - 1);
            sum_xq = sum_xq + w * x * q;
            sum_qq = sum_qq + w * q * q;
        }
        let s = sum_xq / sum_qq;
        if t == 0 {
            scale = sum_qq.eq(Lanes::ZERO).select(Lanes::ZERO, s);
            best = scale * sum_xq;
            best_inv = inv;
        } else {
            let better = sum_qq.gt(Lanes::ZERO) & (sum_xq * sum_xq).gt(best * sum_qq);
            scale = better.select(s, scale);
            best = better.select(s * sum_xq, best);
            best_inv = better.select(inv, best_inv);
        }
    }

    let zero = size.lt(Lanes::all(TINY));
    let code = |x: Lanes<G>| {
        let q = (best_inv * x).round_within(-half, half - 1);
        zero.select(Lanes::ZERO, q + Lanes::all(half as f32))
    };
    (zero.select(Lanes::ZERO, scale), x.map(code))
}

/// Finds a scale for codes `-half..half` by descent, with importance `x²`: scales and codes plus
/// `half`.
///
/// Starts from rounded codes and, up to five times, moves each code to where the best scale of all
/// the others wants it, if that lessens the error.
#[inline(always)]
pub fn descend<const N: usize, const G: usize>(
    x: &Groups<N, G>,
    half: i32,
) -> (Lanes<G>, Groups<N, G>) {
    let (peak, size) = peak(x);
    let inv = Lanes::all(-half as f32) / peak;
    let mut q = x.map(|x| (inv * x).round_within(-half, half - 1));
    let (mut sum_xq, mut sum_qq) = (Lanes::ZERO, Lanes::ZERO);
    for (&x, &q) in x.iter().zip(&q) {
        sum_xq = sum_xq + x * x * x * q;
        sum_qq = sum_qq + x * x * q * q;
    }
    for _ in 0..5 {
        let mut moved = false;
        for (&x, q) in x.iter().zip(&mut q) {
            let (w, old) = (x * x, *q);
            let xq = sum_xq - w * x * old;
            let qq = sum_qq - w * old * old;
            let new = (x * qq / xq).round_within(-half, half - 1);
            let new_xq = xq + w * x * new;
            let new_qq = qq + w * new * new;
            let better = xq.gt(Lanes::ZERO)
                & new.ne(old)
                & new_qq.gt(Lanes::ZERO)
                & (new_xq * new_xq * sum_qq).gt(sum_xq * sum_xq * new_qq);
            *q = better.select(new, old);
            sum_xq = better.select(new_xq, sum_xq);
            sum_qq = better.select(new_qq, sum_qq);
            moved |= better.any();
        }
        // A group that did not move in one round does not in the next: nothing changed for it.
        if !moved {
            break;
        }
    }

    let zero = size.lt(Lanes::all(TINY));
    let code = |q: Lanes<G>| zero.select(Lanes::ZERO, q + Lanes::all(half as f32));
    let scale = sum_qq.gt(Lanes::ZERO).select(sum_xq / sum_qq, Lanes::ZERO);
    (zero.select(Lanes::ZERO, scale), q.map(code))
}

/// Rounds a group to codes `0..=top` of `d·q - m`. With a scale of 0 the codes stay as they are.
#[inline(always)]
pub fn round_affine(x: &[f32], d: f32, m: f32, top: i32, q: &mut [u8]) {
    if d != 0.0 {
        for (q, x) in q.iter_mut().zip(x) {
            *q = nearest((x + m) / d).min(top).max(0) as u8;
        }
    }
}

/// Rounds a group to codes `-half..half` of `d·q`, plus `half`. With a scale of 0 the codes stay as they
/// are.
#[inline(always)]
pub fn round_symmetric(x: &[f32], d: f32, half: i32, q: &mut [u8]) {
    if d != 0.0 {
        for (q, x) in q.iter_mut().zip(x) {
            *q = (nearest(x / d).min(half - 1).max(-half) + half) as u8;
        }
    }
}

/// Finds a scale for non-negative values (the scales or minimums of a block's groups, with the
/// groups' importance) in codes `0..=top`: the scale and the codes.
///
/// Where importance is zero, [`affine`] may find a negative scale after all. Its code wraps around and
/// exceeds `top`, as in the reference.
pub fn positive<const N: usize>(x: &[f32; N], w: &[f32; N], top: i32) -> (f32, [u8; N]) {
    let max = x.iter().fold(0.0, |m, &x| if m > x { m } else { x });
    if max < TINY {
        return (0.0, [0; N]);
    }
    // Which divisor rounds best?
    let (mut inv, mut best) = (0.0, 0.0);
    for t in std::iter::once(0).chain(-4..0).chain(1..=4) {
        let this_inv = (0.1 * t as f32 + top as f32) / max;
        let scale = 1.0 / this_inv;
        let mut error = 0.0;
        for (x, w) in x.iter().zip(w) {
            let q = nearest(this_inv * x);
            // As the reference has it: a byte in the first try, capped in the others.
            let q = if t == 0 { q as u8 as i32 } else { q.min(top) };
            let e = x - scale * q as f32;
            error += w * e * e;
        }
        if t == 0 || error < best {
            (best, inv) = (error, this_inv);
        }
    }
    // Then descend from there, as in `descend`.
    let mut q = [0u8; N];
    let (mut sum_xq, mut sum_qq) = (0.0, 0.0);
    for i in 0..N {
        let code = nearest(inv * x[i]).min(top);
        q[i] = code as u8;
        sum_xq += w[i] * x[i] * code as f32;
        sum_qq += w[i] * code as f32 * code as f32;
    }
    for _ in 0..5 {
        let mut moved = false;
        for i in 0..N {
            let (x, w, old) = (x[i], w[i], q[i] as f32);
            let xq = sum_xq - w * x * old;
            let qq = sum_qq - w * old * old;
            if xq > 0.0 && qq > 0.0 {
                let code = nearest(x * qq / xq).min(top);
                let new = code as f32;
                let new_xq = xq + w * x * new;
                let new_qq = qq + w * new * new;
                if new != old && new_xq * new_xq * sum_qq > sum_xq * sum_xq * new_qq {
                    (q[i], sum_xq, sum_qq) = (code as u8, new_xq, new_qq);
                    moved = true;
                }
            }
        }
        if !moved {
            break;
        }
    }
    (if sum_qq > 0.0 { sum_xq / sum_qq } else { 0.0 }, q)
}

/// Encodes a row in blocks of 32 with codes `-half..half` of `d·q`, plus `half`; `block` makes one from `d` and the codes.
///
/// Without importance the value of largest magnitude becomes `-half` exactly, the others are rounded.
#[inline(always)]
pub fn encode_symmetric<S: Search, B>(
    x: &[f32],
    importance: Option<&[f32]>,
    half: i32,
    out: &mut [B],
    block: impl Fn(f32, &[u8; 32]) -> B,
) {
    let mut q = [0; 32 * WIDE];
    let Some(columns) = importance else {
        for (x, out) in x.as_chunks().0.iter().zip(out) {
            let d = peak_of(x) / -(half as f32);
            *out = block(
                d,
                &round_up(x, 0.0, inverse(d), half as f32 + 0.5, 2 * half - 1),
            );
        }
        return;
    };
    let mean_square = Lanes::all(sum_of_squares(x) / x.len() as f32);
    let parts = x.chunks(32 * WIDE).zip(columns.chunks(32 * WIDE));
    for ((x, columns), out) in parts.zip(out.chunks_mut(WIDE)) {
        let x = groups::<32, WIDE>(x);
        let w = weigh(&x, &groups(columns), mean_square);
        let (d, codes) = S::symmetric(&x, &w, half);
        ungroup(&codes, &mut q);
        for ((q, d), out) in q.as_chunks().0.iter().zip(d.0).zip(out) {
            *out = block(d, q);
        }
    }
}

/// Encodes a row in blocks of 32 with codes `0..=top` of `d·q + m`; `block` makes one from `d`, `m` and the codes.
///
/// Without importance the smallest value becomes 0, the largest `top`, the others are rounded.
#[inline(always)]
pub fn encode_affine<S: Search, B>(
    x: &[f32],
    importance: Option<&[f32]>,
    top: i32,
    out: &mut [B],
    block: impl Fn(f32, f32, &[u8; 32]) -> B,
) {
    let mut q = [0; 32 * WIDE];
    let Some(columns) = importance else {
        for (x, out) in x.as_chunks().0.iter().zip(out) {
            let (min, max) = range_of(x);
            let d = (max - min) / top as f32;
            *out = block(d, min, &round_up(x, min, inverse(d), 0.5, top));
        }
        return;
    };
    let mean_square = Lanes::all(sum_of_squares(x) / x.len() as f32);
    let parts = x.chunks(32 * WIDE).zip(columns.chunks(32 * WIDE));
    for ((x, columns), out) in parts.zip(out.chunks_mut(WIDE)) {
        let x = groups::<32, WIDE>(x);
        let w = weigh(&x, &groups(columns), mean_square);
        let fit = S::affine(&x, &w, top, WEIGHTED);
        ungroup(&fit.q, &mut q);
        let q = q.as_chunks().0.iter();
        for (((q, d), m), out) in q.zip(fit.scale.0).zip(fit.min.0).zip(out) {
            *out = block(d, m, q);
        }
    }
}

/// `(x - min)·inv + up` without its fraction, `top` at most.
#[inline(always)]
fn round_up(x: &[f32; 32], min: f32, inv: f32, up: f32, top: i32) -> [u8; 32] {
    x.map(|x| (truncate((x - min) * inv + up) as i8).min(top as i8) as u8)
}
