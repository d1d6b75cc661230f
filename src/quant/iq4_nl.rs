//! IQ4_NL: 32 weights, each one of 16 unevenly spaced values, and one f16 scale. `w = d · VALUES[q]`.
//!
//! Byte `j` of `qs` holds weight `j` in its low and weight `j + 16` in its high nibble
//! (llama.cpp, `block_iq4_nl`).

use super::bits::{idot, pack, unpack};
use super::search::{self, Groups, groups};
use super::{Act, Block, Encode, IntBlock, Terms, int_dot};
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

impl Iq4Nl {
    /// The weights' integers, -127..=113.
    #[inline(always)]
    pub fn quants(&self) -> [i8; 32] {
        let mut q = [0; 32];
        values(&self.qs, &mut q);
        q
    }
}

impl Block for Iq4Nl {
    const WEIGHTS: usize = 32;

    fn decode(&self, out: &mut [f32]) {
        let d = self.d.to_f32_const();
        for (out, q) in out.iter_mut().zip(self.quants()) {
            *out = d * q as f32;
        }
    }

    #[inline(always)]
    fn dot(row: &[Self], x: Act<'_>) -> f32 {
        int_dot(row, x.int())
    }
}

impl IntBlock for Iq4Nl {
    const HAS_MIN: bool = false;

    /// `|isum| ≤ 32 · 127 · 127 < 2¹⁹`.
    #[inline(always)]
    fn terms(&self, x: &[i8], _sums: &[i16]) -> Terms {
        Terms {
            scale: self.d.to_f32_const(),
            isum: idot(&self.quants(), x),
            min: 0.0,
            msum: 0,
        }
    }
}

impl Encode for Iq4Nl {
    #[inline(always)]
    fn encode_row(x: &[f32], importance: Option<&[f32]>, out: &mut [Self]) {
        for (part, out) in out.chunks_mut(8).enumerate() {
            let n = 32 * out.len();
            let x = &x[8 * 32 * part..][..n];
            let xs = groups::<32, 8>(x);
            let w = match importance {
                None => search::squares(&xs),
                Some(columns) => {
                    let columns = groups::<32, 8>(&columns[8 * 32 * part..][..n]);
                    // `weigh`, with twice the block's own mean square.
                    let s = search::sums(&search::squares(&xs)).map(|s| s * (2.0 / 32.0));
                    let mut w = columns;
                    for i in 0..32 {
                        for g in 0..8 {
                            w[i][g] *= (s[g] + xs[i][g] * xs[i][g]).sqrt();
                        }
                    }
                    w
                }
            };
            let d = fit(&xs, &w);
            for (g, (x, out)) in x.chunks_exact(32).zip(out).enumerate() {
                out.d = f16::from_f32_const(d[g]);
                code(x, d[g], &mut out.qs);
            }
        }
    }
}

/// Finds the scale of each group for the 16 values, with importance `w`.
///
/// Each try aims the value of largest magnitude at a slightly different place near the longer end
/// of the values.
#[inline(always)]
pub(super) fn fit<const N: usize, const G: usize>(x: &Groups<N, G>, w: &Groups<N, G>) -> [f32; G] {
    let (peak, size) = search::peak(x);
    let (mut scale, mut best) = ([0.0; G], [0.0; G]);
    // The plain aim first, then 15 (one of them nearly the plain one, again): the reference's order.
    for t in std::iter::once(None).chain((-7..=7).map(Some)) {
        let mut inv = [0.0; G];
        for g in 0..G {
            inv[g] = match t {
                None => 1.0 / (-peak[g] / VALUES[0] as f32),
                Some(t) => (t + VALUES[0] as i32) as f32 / peak[g],
            };
        }
        let (mut sum_xq, mut sum_qq) = ([0.0; G], [0.0; G]);
        for i in 0..N {
            for g in 0..G {
                let q = VALUES[nearest_code(inv[g] * x[i][g]) as usize & 15] as f32;
                sum_xq[g] += w[i][g] * q * x[i][g];
                sum_qq[g] += w[i][g] * q * q;
            }
        }
        for g in 0..G {
            let ahead = sum_xq[g] * sum_xq[g] > best[g] * sum_qq[g];
            let better = t.is_none() || ahead;
            let s = sum_xq[g] / sum_qq[g];
            if sum_qq[g] > 0.0 && better {
                (scale[g], best[g]) = (s, s * sum_xq[g]);
            }
        }
    }
    for g in 0..G {
        scale[g] = if size[g] < search::TINY {
            0.0
        } else {
            scale[g]
        };
    }
    scale
}

/// The code of the value nearest to `x`, the larger one if two are.
///
/// The reference compares the distances to both neighbours. Near the middle of two neighbours these
/// differences are exact, so that comparing with the middle is the same.
#[inline(always)]
fn nearest_code(x: f32) -> u8 {
    let mut code = 0;
    for pair in VALUES.windows(2) {
        let middle = (pair[0] as f32 + pair[1] as f32) / 2.0;
        // Not `x >= middle`: what is no number gets the last code, as in the reference.
        code += !(x < middle) as u8;
    }
    code
}

/// Codes a group under scale `d`.
#[inline(always)]
pub(super) fn code(x: &[f32], d: f32, qs: &mut [u8]) {
    let inv = if d != 0.0 { 1.0 / d } else { 0.0 };
    let mut q = [0; 32];
    for (q, x) in q.iter_mut().zip(x) {
        *q = nearest_code(inv * x);
    }
    pack::<4>(&q, 0, qs);
}
