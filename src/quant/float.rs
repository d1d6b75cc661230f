//! Float weights (F32, F16, BF16) and the one float dot product of the program.

use super::{Act, Block, Encode};
use half::{bf16, f16};

/// Partial sums of a float reduction. Element `i` goes to lane `i % 16`, so AVX-512 (one register),
/// AVX2 (two), NEON (four) and scalar code add in the same order.
pub const LANES: usize = 16;

/// Folds partial sums in the fixed tree 16 → 8 → 4 → 2 → 1, always upper half onto lower half.
#[inline(always)]
pub fn fold(mut s: [f32; LANES]) -> f32 {
    for half in [8, 4, 2, 1] {
        for i in 0..half {
            s[i] += s[i + half];
        }
    }
    s[0]
}

/// `Σ a[i]·b[i]`: fused into 16 partial sums, then [`fold`]ed. A tail of fewer than 16 elements goes
/// to the first lanes, as if padded with nothing.
///
/// # Panics
/// If `b` is shorter than `a`.
#[inline(always)]
pub fn dot(a: &[f32], b: &[f32]) -> f32 {
    dot_with(a, b, |c| *c, |x| x)
}

/// [`dot`] of any element type that widens to `f32` exactly: `wide` converts 16 elements, `one` a
/// single one of the tail.
#[inline(always)]
pub fn dot_with<T: Copy>(
    a: &[T],
    b: &[f32],
    wide: impl Fn(&[T; LANES]) -> [f32; LANES],
    one: impl Fn(T) -> f32,
) -> f32 {
    let b = &b[..a.len()];
    let mut s = [0.0f32; LANES];
    let (a16, a_tail) = a.as_chunks::<LANES>();
    let (b16, b_tail) = b.as_chunks::<LANES>();
    for (a, b) in a16.iter().zip(b16) {
        let a = wide(a);
        for i in 0..LANES {
            s[i] = a[i].mul_add(b[i], s[i]);
        }
    }
    for (i, (a, b)) in a_tail.iter().zip(b_tail).enumerate() {
        s[i] = one(*a).mul_add(*b, s[i]);
    }
    fold(s)
}

impl Block for f32 {
    const WEIGHTS: usize = 1;

    fn decode(&self, out: &mut [f32]) {
        out[0] = *self;
    }

    #[inline(always)]
    fn dot(row: &[f32], x: Act<'_>) -> f32 {
        dot(row, x.floats())
    }
}

impl Block for f16 {
    const WEIGHTS: usize = 1;

    fn decode(&self, out: &mut [f32]) {
        out[0] = self.to_f32_const();
    }

    #[inline(always)]
    fn dot(row: &[f16], x: Act<'_>) -> f32 {
        dot_with(
            row,
            x.floats(),
            |h| h.map(f16::to_f32_const),
            f16::to_f32_const,
        )
    }
}

impl Block for bf16 {
    const WEIGHTS: usize = 1;

    fn decode(&self, out: &mut [f32]) {
        out[0] = self.to_f32_const();
    }

    #[inline(always)]
    fn dot(row: &[bf16], x: Act<'_>) -> f32 {
        dot_with(row, x.floats(), |h| h.map(widen_bf16), widen_bf16)
    }
}

impl Encode for f32 {
    #[inline(always)]
    fn encode_row(x: &[f32], _importance: Option<&[f32]>, out: &mut [f32]) {
        out.copy_from_slice(x);
    }
}

impl Encode for f16 {
    #[inline(always)]
    fn encode_row(x: &[f32], _importance: Option<&[f32]>, out: &mut [f16]) {
        for (x, out) in x.iter().zip(out) {
            *out = f16::from_f32_const(*x);
        }
    }
}

impl Encode for bf16 {
    #[inline(always)]
    fn encode_row(x: &[f32], _importance: Option<&[f32]>, out: &mut [bf16]) {
        for (x, out) in x.iter().zip(out) {
            *out = bf16::from_f32_const(*x);
        }
    }
}

/// BF16 is the upper half of an F32.
#[inline(always)]
pub fn widen_bf16(h: bf16) -> f32 {
    f32::from_bits((h.to_bits() as u32) << 16)
}
