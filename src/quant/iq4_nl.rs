//! IQ4_NL: 32 weights, each one of 16 unevenly spaced values, and one f16 scale. `w = d · VALUES[q]`.
//!
//! Byte `j` of `qs` holds weight `j` in its low and weight `j + 16` in its high nibble
//! (llama.cpp, `block_iq4_nl`).

use super::bits::{pack, unpack};
use super::lanes::Lanes;
use super::search::{self, Groups, Search, WIDE, groups};
use super::{Encode, IntBlock};
use half::f16;

/// What the 16 codes of IQ4_NL and IQ4_XS stand for: denser around zero, where weights are
/// (llama.cpp, `kvalues_iq4nl`).
pub const VALUES: [i8; 16] = [
    -127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113,
];

/// The block.
#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub struct Iq4Nl {
    /// Scale.
    pub d: f16,
    /// Codes.
    pub qs: [u8; 16],
}
const _: () = assert!(size_of::<Iq4Nl>() == 18);

/// Looks 32 codes up.
#[inline(always)]
pub(super) fn values(codes: &[u8], out: &mut [i8]) {
    unpack::<4>(codes, 0, out);
    for q in out {
        *q = VALUES[*q as usize & 15];
    }
}

impl IntBlock for Iq4Nl {
    type Ints = [i8; 32];
    const SUB: usize = 32;
    const OFFSET: i32 = 128;
    const BITS: u32 = 8;

    /// The weights' integers, -127..=113.
    #[inline(always)]
    fn ints(&self) -> [i8; 32] {
        let mut q = [0; 32];
        values(&self.qs, &mut q);
        q
    }

    #[inline(always)]
    fn scale(&self) -> f32 {
        self.d.to_f32_const()
    }
}

impl Encode for Iq4Nl {
    fn encode_row<S: Search>(x: &[f32], importance: Option<&[f32]>, out: &mut [Self]) {
        search::in_runs::<32, _>(x, importance, out, |x, importance, out| {
            let d = scales::<S>(x, importance, 32);
            for ((x, d), out) in x.chunks_exact(32).zip(d.0).zip(out) {
                out.d = f16::from_f32_const(d);
                code(x, d, &mut out.qs);
            }
        });
    }
}

/// The scales of groups of 32, [`WIDE`] at most, in blocks of `block` weights.
pub(super) fn scales<S: Search>(
    x: &[f32],
    importance: Option<&[f32]>,
    block: usize,
) -> Lanes<WIDE> {
    let xs = groups::<32, WIDE>(x);
    let w = match importance {
        None => search::squares(&xs),
        Some(columns) => {
            let s = search::energy::<32, WIDE>(x, block, 2.0 / block as f32);
            search::weigh(&xs, &groups(columns), s)
        }
    };
    S::values(&xs, &w)
}

/// Finds the scale of each group for the 16 values, with importance `w`.
///
/// The first try aims the value of largest magnitude at 127 of its own sign, the others turn it to the
/// longer, negative end and aim at slightly different places there.
#[inline(always)]
pub fn fit<const N: usize, const G: usize>(x: &Groups<N, G>, w: &Groups<N, G>) -> Lanes<G> {
    let (peak, size) = search::peak(x);
    let (mut scale, mut best) = (Lanes::ZERO, Lanes::ZERO);
    // In this order, which decides between equals.
    for t in std::iter::once(None).chain((-7..=7).map(Some)) {
        let longest = VALUES[0] as f32;
        let inv = match t {
            None => Lanes::all(1.0) / (peak / Lanes::all(-longest)),
            Some(t) => Lanes::all(t as f32 + longest) / peak,
        };
        let (mut sum_xq, mut sum_qq) = (Lanes::ZERO, Lanes::ZERO);
        for (&x, &w) in x.iter().zip(w) {
            let q = nearest_value(inv * x);
            sum_xq = sum_xq + w * q * x;
            sum_qq = sum_qq + w * q * q;
        }
        let s = sum_xq / sum_qq;
        let mut better = sum_qq.gt(Lanes::ZERO);
        if t.is_some() {
            better = better & (sum_xq * sum_xq).gt(best * sum_qq);
        }
        scale = better.select(s, scale);
        best = better.select(s * sum_xq, best);
    }
    size.lt(Lanes::all(search::TINY)).select(Lanes::ZERO, scale)
}

/// The value nearest to each `x`, the larger one if two are.
///
/// The reference compares the distances to both neighbours. Near the middle of two neighbours these
/// differences are exact, so that comparing with the middle is the same. (Compared for every float
/// of magnitude from 0.25 to 160.)
#[inline(always)]
fn nearest_value<const G: usize>(x: Lanes<G>) -> Lanes<G> {
    climb(x, VALUES[0] as f32, |low, high| high - low)
}

/// The code of [`nearest_value`].
#[inline(always)]
fn nearest_code<const G: usize>(x: Lanes<G>) -> Lanes<G> {
    climb(x, 0.0, |_, _| 1.0)
}

/// Climbs the values for as long as `x` is not below the middle of this and the next, and adds a step
/// for each.
#[inline(always)]
fn climb<const G: usize>(x: Lanes<G>, start: f32, step: impl Fn(f32, f32) -> f32) -> Lanes<G> {
    let mut at = Lanes::all(start);
    for pair in VALUES.windows(2) {
        let (low, high) = (pair[0] as f32, pair[1] as f32);
        let below = x.lt(Lanes::all((low + high) / 2.0));
        at = at + below.select(Lanes::ZERO, Lanes::all(step(low, high)));
    }
    at
}

/// Codes a group of 32 under scale `d`.
pub(super) fn code(x: &[f32], d: f32, qs: &mut [u8]) {
    let inv = Lanes::all(search::inverse(d));
    let mut q = [0; 32];
    search::ungroup(&groups::<8, 4>(x).map(|x| nearest_code(inv * x)), &mut q);
    pack::<4>(&q, 0, qs);
}
