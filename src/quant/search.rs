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
//! each, with selections instead of branches. The loops over `g` are what a compiler vectorizes.

/// `G` groups of `N` values, transposed: `x[i][g]` is value `i` of group `g`.
pub type Groups<const N: usize, const G: usize> = [[f32; G]; N];

/// Largest magnitude that counts as a group of zeros.
pub const TINY: f32 = 1e-15;

/// Transposes groups that lie one after the other. What `x` lacks is zero.
#[inline(always)]
pub fn groups<const N: usize, const G: usize>(x: &[f32]) -> Groups<N, G> {
    let mut out = [[0.0; G]; N];
    for (g, x) in x.chunks_exact(N).enumerate() {
        for (i, x) in x.iter().enumerate() {
            out[i][g] = *x;
        }
    }
    out
}

/// The inverse of [`groups`], for codes; stops where `out` does.
#[inline(always)]
pub fn ungroup<const N: usize, const G: usize>(q: &[[u8; G]; N], out: &mut [u8]) {
    for (g, out) in out.chunks_exact_mut(N).enumerate() {
        for (i, out) in out.iter_mut().enumerate() {
            *out = q[i][g];
        }
    }
}

/// `Σ x²`, in order.
#[inline(always)]
pub fn sum_of_squares(x: &[f32]) -> f32 {
    let mut sum = 0.0;
    for x in x {
        sum += x * x;
    }
    sum
}

/// The integer nearest to `x`, halves to even, for `|x| < 2²²`; what else comes out is arbitrary, but
/// the same as the reference's and in `-2²²..2²²`.
#[inline(always)]
pub fn nearest(x: f32) -> i32 {
    // 1.5·2²³ leaves the integer in the low mantissa bits, with an offset of 2²².
    ((x + 12_582_912.0).to_bits() & 0x7f_ffff) as i32 - 0x40_0000
}

/// Importance of each value, from its column's importance and its own size: `c · √(s + x²)`, where
/// `s` is a mean square that keeps small values from being worth nothing.
#[inline(always)]
pub fn weigh<const N: usize, const G: usize>(
    x: &Groups<N, G>,
    columns: &Groups<N, G>,
    s: f32,
) -> Groups<N, G> {
    let mut w = [[0.0; G]; N];
    for i in 0..N {
        for g in 0..G {
            w[i][g] = columns[i][g] * (s + x[i][g] * x[i][g]).sqrt();
        }
    }
    w
}

/// `x²` as importance: large values matter most.
#[inline(always)]
pub fn squares<const N: usize, const G: usize>(x: &Groups<N, G>) -> Groups<N, G> {
    let mut w = [[0.0; G]; N];
    for i in 0..N {
        for g in 0..G {
            w[i][g] = x[i][g] * x[i][g];
        }
    }
    w
}

/// The sum of each group's values, in order.
#[inline(always)]
pub fn sums<const N: usize, const G: usize>(x: &Groups<N, G>) -> [f32; G] {
    let mut sum = [0.0; G];
    for x in x {
        for g in 0..G {
            sum[g] += x[g];
        }
    }
    sum
}

/// The value of largest magnitude of each group (the first, if several) and that magnitude.
#[inline(always)]
pub fn peak<const N: usize, const G: usize>(x: &Groups<N, G>) -> ([f32; G], [f32; G]) {
    let (mut at, mut size) = ([0.0; G], [0.0; G]);
    for x in x {
        for g in 0..G {
            let a = x[g].abs();
            let up = a > size[g];
            size[g] = if up { a } else { size[g] };
            at[g] = if up { x[g] } else { at[g] };
        }
    }
    (at, size)
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

/// What a search found: `x ≈ scale · q + min`, of each group.
#[derive(Clone, Copy, Debug)]
pub struct Affine<const N: usize, const G: usize> {
    /// Scale; 0 for a group of one single value.
    pub scale: [f32; G],
    /// Minimum, never above 0.
    pub min: [f32; G],
    /// Codes, `0..=top`.
    pub q: [[u8; G]; N],
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
    let (mut sum_w, mut sum_x) = ([0.0; G], [0.0; G]);
    for i in 0..N {
        for g in 0..G {
            let (x, w) = (x[i][g], w[i][g]);
            low[g] = if x < low[g] { x } else { low[g] };
            high[g] = if x > high[g] { x } else { high[g] };
            sum_w[g] += w;
            sum_x[g] += w * x;
        }
    }
    for g in 0..G {
        // Zero is always in the range.
        low[g] = if low[g] > 0.0 { 0.0 } else { low[g] };
    }

    let (mut inv, mut scale, mut min) = ([0.0; G], [0.0; G], low);
    for g in 0..G {
        inv[g] = top as f32 / (high[g] - low[g]);
        scale[g] = 1.0 / inv[g];
    }
    let mut q = [[0.0; G]; N];
    affine_codes(x, &low, &inv, top, &mut q);
    let mut best = affine_error(x, w, &q, &scale, &min, tries.absolute);
    // What the best codes were rounded with.
    let (mut best_inv, mut best_low) = (inv, low);

    for t in 0..=tries.more {
        let steps = tries.from + tries.by * t as f32 + top as f32;
        // The range is counted from the best minimum so far, not from the smallest value.
        for g in 0..G {
            inv[g] = steps / (high[g] - min[g]);
        }
        affine_codes(x, &min, &inv, top, &mut q);
        let (mut sum_q, mut sum_qq, mut sum_xq) = ([0.0; G], [0.0; G], [0.0; G]);
        for i in 0..N {
            for g in 0..G {
                let wq = w[i][g] * q[i][g];
                sum_q[g] += wq;
                sum_qq[g] += wq * q[i][g];
                sum_xq[g] += wq * x[i][g];
            }
        }
        let (mut det, mut this_scale, mut this_min) = ([0.0; G], [0.0; G], [0.0; G]);
        for g in 0..G {
            det[g] = sum_w[g] * sum_qq[g] - sum_q[g] * sum_q[g];
            let s = (sum_w[g] * sum_xq[g] - sum_x[g] * sum_q[g]) / det[g];
            let m = (sum_qq[g] * sum_x[g] - sum_q[g] * sum_xq[g]) / det[g];
            let through_zero = sum_xq[g] / sum_qq[g];
            this_scale[g] = if m > 0.0 { through_zero } else { s };
            this_min[g] = if m > 0.0 { 0.0 } else { m };
        }
        let error = affine_error(x, w, &q, &this_scale, &this_min, tries.absolute);
        for g in 0..G {
            let better = det[g] > 0.0 && error[g] < best[g];
            best[g] = if better { error[g] } else { best[g] };
            best_low[g] = if better { min[g] } else { best_low[g] };
            scale[g] = if better { this_scale[g] } else { scale[g] };
            min[g] = if better { this_min[g] } else { min[g] };
            best_inv[g] = if better { inv[g] } else { best_inv[g] };
        }
    }

    affine_codes(x, &best_low, &best_inv, top, &mut q);
    let mut codes = [[0; G]; N];
    for i in 0..N {
        for g in 0..G {
            codes[i][g] = if high[g] == low[g] { 0 } else { q[i][g] as u8 };
        }
    }
    for g in 0..G {
        if high[g] == low[g] {
            (scale[g], min[g]) = (0.0, low[g]);
        }
    }
    Affine {
        scale,
        min,
        q: codes,
    }
}

#[inline(always)]
fn affine_codes<const N: usize, const G: usize>(
    x: &Groups<N, G>,
    low: &[f32; G],
    inv: &[f32; G],
    top: i32,
    q: &mut Groups<N, G>,
) {
    for i in 0..N {
        for g in 0..G {
            q[i][g] = nearest(inv[g] * (x[i][g] - low[g])).min(top).max(0) as f32;
        }
    }
}

#[inline(always)]
fn affine_error<const N: usize, const G: usize>(
    x: &Groups<N, G>,
    w: &Groups<N, G>,
    q: &Groups<N, G>,
    scale: &[f32; G],
    min: &[f32; G],
    absolute: bool,
) -> [f32; G] {
    let mut error = [0.0; G];
    for i in 0..N {
        for g in 0..G {
            let e = scale[g] * q[i][g] + min[g] - x[i][g];
            error[g] += w[i][g] * if absolute { e.abs() } else { e * e };
        }
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
) -> ([f32; G], [[u8; G]; N]) {
    let (peak, size) = peak(x);
    let mut inv = [0.0; G];
    let (mut scale, mut best, mut best_inv) = ([0.0; G], [0.0; G], [0.0; G]);
    // The plain aim first, then 18 others: the reference's order decides between equals.
    for t in std::iter::once(0).chain(-9..0).chain(1..=9) {
        let aim = -(half as f32 + 0.1 * t as f32);
        for g in 0..G {
            inv[g] = aim / peak[g];
        }
        let (mut sum_xq, mut sum_qq) = ([0.0; G], [0.0; G]);
        for i in 0..N {
            for g in 0..G {
                let q = symmetric_code(inv[g] * x[i][g], half) as f32;
                sum_xq[g] += w[i][g] * x[i][g] * q;
                sum_qq[g] += w[i][g] * q * q;
            }
        }
        for g in 0..G {
            let s = sum_xq[g] / sum_qq[g];
            let (better, s) = if t == 0 {
                (true, if sum_qq[g] == 0.0 { 0.0 } else { s })
            } else {
                let ahead = sum_xq[g] * sum_xq[g] > best[g] * sum_qq[g];
                (sum_qq[g] > 0.0 && ahead, s)
            };
            scale[g] = if better { s } else { scale[g] };
            best[g] = if better { s * sum_xq[g] } else { best[g] };
            best_inv[g] = if better { inv[g] } else { best_inv[g] };
        }
    }

    let mut codes = [[0; G]; N];
    for i in 0..N {
        for g in 0..G {
            let q = (symmetric_code(best_inv[g] * x[i][g], half) + half) as u8;
            codes[i][g] = if size[g] < TINY { 0 } else { q };
        }
    }
    for g in 0..G {
        scale[g] = if size[g] < TINY { 0.0 } else { scale[g] };
    }
    (scale, codes)
}

#[inline(always)]
fn symmetric_code(x: f32, half: i32) -> i32 {
    nearest(x).min(half - 1).max(-half)
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
) -> ([f32; G], [[u8; G]; N]) {
    let (peak, size) = peak(x);
    let (mut sum_xq, mut sum_qq) = ([0.0; G], [0.0; G]);
    let mut q = [[0.0; G]; N];
    for i in 0..N {
        for g in 0..G {
            let x = x[i][g];
            let inv = -half as f32 / peak[g];
            q[i][g] = symmetric_code(inv * x, half) as f32;
            sum_xq[g] += x * x * x * q[i][g];
            sum_qq[g] += x * x * q[i][g] * q[i][g];
        }
    }
    for _ in 0..5 {
        let mut moved = false;
        for i in 0..N {
            for g in 0..G {
                let (x, old) = (x[i][g], q[i][g]);
                let w = x * x;
                let xq = sum_xq[g] - w * x * old;
                let qq = sum_qq[g] - w * old * old;
                let new = symmetric_code(x * qq / xq, half) as f32;
                let new_xq = xq + w * x * new;
                let new_qq = qq + w * new * new;
                let better = xq > 0.0
                    && new != old
                    && new_qq > 0.0
                    && new_xq * new_xq * sum_qq[g] > sum_xq[g] * sum_xq[g] * new_qq;
                q[i][g] = if better { new } else { old };
                sum_xq[g] = if better { new_xq } else { sum_xq[g] };
                sum_qq[g] = if better { new_qq } else { sum_qq[g] };
                moved |= better;
            }
        }
        // A group that did not move in one round does not in the next: nothing changed for it.
        if !moved {
            break;
        }
    }

    let (mut scale, mut codes) = ([0.0; G], [[0; G]; N]);
    for g in 0..G {
        let fit = size[g] >= TINY && sum_qq[g] > 0.0;
        scale[g] = if fit { sum_xq[g] / sum_qq[g] } else { 0.0 };
        for i in 0..N {
            let code = (q[i][g] as i32 + half) as u8;
            codes[i][g] = if size[g] < TINY { 0 } else { code };
        }
    }
    (scale, codes)
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
            *q = (symmetric_code(x / d, half) + half) as u8;
        }
    }
}

/// Finds a scale for non-negative values (the scales or minimums of a block's groups, with the
/// groups' importance) in codes `0..=top`: the scale and the codes.
#[inline(always)]
pub fn positive<const N: usize>(x: &[f32; N], w: &[f32; N], top: i32) -> (f32, [u8; N]) {
    let max = x.iter().fold(0.0, |m, &x| if m > x { m } else { x });
    if max < TINY {
        return (0.0, [0; N]);
    }
    // Which divisor rounds best?
    let mut inv = top as f32 / max;
    let mut best = f32::NAN;
    for t in std::iter::once(0).chain(-4..0).chain(1..=4) {
        let this_inv = (0.1 * t as f32 + top as f32) / max;
        let scale = 1.0 / this_inv;
        let mut error = 0.0;
        for (x, w) in x.iter().zip(w) {
            let e = x - scale * nearest(this_inv * x).min(top) as f32;
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
