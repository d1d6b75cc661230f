//! Q5_K: 256 weights of 5 bits in 8 sub-blocks of 32, each with a 6-bit scale and a 6-bit minimum.
//! `w = d·sc · q - dmin·m`.
//!
//! Q4_K with one more bit: bit `i / 32` of `qh[i % 32]` is the fifth bit of weight `i`
//! (llama.cpp, `block_q5_K`).

use super::bits::{pack, unpack};
use super::search::{self, Search, Tries};
use super::{Encode, IntBlock, q4_k};
use half::f16;

/// The block.
#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub struct Q5_K {
    /// Scale of the scales.
    pub d: f16,
    /// Scale of the minimums.
    pub dmin: f16,
    /// 6-bit scales and minimums; see [`q4_k::scale_min`].
    pub scales: [u8; 12],
    /// Fifth bits.
    pub qh: [u8; 32],
    /// Nibbles.
    pub qs: [u8; 128],
}
const _: () = assert!(size_of::<Q5_K>() == 176);

impl IntBlock for Q5_K {
    type Ints = [i8; 256];
    const SUB: usize = 32;
    const HAS_MIN: bool = true;
    const BITS: u32 = 5;

    /// The weights' integers, 0..=31.
    #[inline(always)]
    fn ints(&self) -> [i8; 256] {
        let mut q = [0; 256];
        for (bytes, q) in self.qs.chunks_exact(32).zip(q.chunks_exact_mut(64)) {
            unpack::<4>(bytes, 0, q);
        }
        unpack::<1>(&self.qh, 4, &mut q);
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
        let (scale, min) = q4_k::scale_min(&self.scales, s);
        (scale as i32, min as i32)
    }
}

/// What the search tries without importance.
const PLAIN: Tries = Tries {
    from: -0.5,
    by: 0.1,
    more: 15,
    absolute: false,
};

impl Encode for Q5_K {
    fn encode_row<S: Search>(x: &[f32], importance: Option<&[f32]>, out: &mut [Self]) {
        search::in_runs::<32, _>(x, importance, out, |x, importance, out| {
            let parts = q4_k::encode::<S>(x, importance, 31, PLAIN);
            for (part, out) in parts.iter().zip(out) {
                (out.d, out.dmin, out.scales) = (part.d, part.dmin, part.scales);
                out.qs = part.nibbles();
                pack::<1>(&part.q, 4, &mut out.qh);
            }
        });
    }
}
