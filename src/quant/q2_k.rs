//! Q2_K: 256 weights of 2 bits in 16 sub-blocks of 16, each with a 4-bit scale and a 4-bit minimum.
//! `w = d·sc · q - dmin·m`.
//!
//! Each 32 bytes of `qs` hold 128 weights: weight `i` in byte `i % 32`, at bit `2 · (i / 32)`. Byte `s`
//! of `scales` is the scale of sub-block `s` in its low and the minimum in its high nibble
//! (llama.cpp, `block_q2_K`).

use super::bits::{nearest, pack, unpack};
use super::lanes::Lanes;
use super::search::{self, Search, Tries, WEIGHTED, WIDE, groups};
use super::{Encode, IntBlock};
use half::f16;

/// The block.
#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub struct Q2_K {
    /// Scales (low nibbles) and minimums (high nibbles).
    pub scales: [u8; 16],
    /// 2-bit weights.
    pub qs: [u8; 64],
    /// Scale of the scales.
    pub d: f16,
    /// Scale of the minimums.
    pub dmin: f16,
}
const _: () = assert!(size_of::<Q2_K>() == 84);

impl Q2_K {
    /// Sub-block `s`'s scale and minimum, 0..=15.
    #[inline(always)]
    pub fn scale_min(&self, s: usize) -> (u8, u8) {
        (self.scales[s] & 15, self.scales[s] >> 4)
    }
}

impl IntBlock for Q2_K {
    type Ints = [i8; 256];
    const SUB: usize = 16;
    const HAS_MIN: bool = true;
    const BITS: u32 = 2;

    /// The weights' integers, 0..=3.
    #[inline(always)]
    fn ints(&self) -> [i8; 256] {
        let mut q = [0; 256];
        for (bytes, q) in self.qs.chunks_exact(32).zip(q.chunks_exact_mut(128)) {
            unpack::<2>(bytes, 0, q);
        }
        q
    }

    #[inline(always)]
    fn scale(&self) -> f32 {
        self.d.to_f32_const()
    }

    #[inline(always)]
    fn min(&self) -> f32 {
        -self.dmin.to_f32_const()
    }

    #[inline(always)]
    fn sub(&self, s: usize) -> (i32, i32) {
        let (scale, min) = self.scale_min(s);
        (scale as i32, min as i32)
    }
}

/// What the search tries without importance.
const PLAIN: Tries = Tries {
    from: -0.5,
    by: 0.1,
    more: 15,
    absolute: true,
};

impl Encode for Q2_K {
    fn encode_row<S: Search>(x: &[f32], importance: Option<&[f32]>, out: &mut [Self]) {
        search::in_runs::<16, _>(x, importance, out, encode::<S>);
    }
}

/// Encodes blocks of [`WIDE`] sub-blocks in all, or less.
fn encode<S: Search>(x: &[f32], importance: Option<&[f32]>, out: &mut [Q2_K]) {
    // Each sub-block's scale and minimum.
    let xs = groups::<16, WIDE>(x);
    let (fit, w) = match importance {
        None => (S::affine(&xs, &xs.map(Lanes::abs), 3, PLAIN), None),
        Some(columns) => {
            let s = search::energy::<16, WIDE>(x, 256, 1.0 / 256.0);
            let w = search::weigh(&xs, &groups(columns), s);
            (S::affine(&xs, &w, 3, WEIGHTED), Some(search::sums(&w)))
        }
    };
    let mut q = [0; 16 * WIDE];
    search::ungroup(&fit.q, &mut q);

    for (b, (x, out)) in x.chunks_exact(256).zip(out).enumerate() {
        // These numbers' own scales and 4-bit codes.
        let scales = fit.scale.part::<16>(b);
        let mins = fit.min.part::<16>(b).map(|m| -m);
        let ((d, sc), (dmin, m)) = match w {
            None => (scale_codes(&scales), scale_codes(&mins)),
            Some(w) => {
                let w = w.part(b);
                let positive = |x| search::positive(x, &w, 15);
                (positive(&scales), positive(&mins))
            }
        };
        out.scales = std::array::from_fn(|s| sc[s] | m[s] << 4);
        out.d = f16::from_f32_const(d);
        out.dmin = f16::from_f32_const(dmin);

        // The scales were rounded: round the weights again, to what will be decoded.
        let q = &mut q[256 * b..][..256];
        let (d, dmin) = (out.d.to_f32_const(), out.dmin.to_f32_const());
        for (s, (q, x)) in q.chunks_exact_mut(16).zip(x.chunks_exact(16)).enumerate() {
            let (sc, m) = out.scale_min(s);
            search::round_affine(x, d * sc as f32, dmin * m as f32, 3, q);
        }
        for (q, bytes) in q.chunks_exact(128).zip(out.qs.chunks_exact_mut(32)) {
            pack::<2>(q, 0, bytes);
        }
    }
}

/// The scale that maps the largest value to 15, and the codes.
#[inline(always)]
fn scale_codes(x: &[f32; 16]) -> (f32, [u8; 16]) {
    let max = x.iter().fold(0.0, |m, &x| if x > m { x } else { m });
    if max > 0.0 {
        let inv = 15.0 / max;
        (max / 15.0, x.map(|x| nearest(inv * x) as u8))
    } else {
        (0.0, [0; 16])
    }
}
