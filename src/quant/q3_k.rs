//! Q3_K: 256 weights of 3 bits in 16 sub-blocks of 16, each with a 6-bit scale.
//! `w = d·(sc - 32) · (q - 4)`.
//!
//! The low 2 bits of the weights lie in `qs` as in [`super::q2_k`]; bit `i / 32` of `hmask[i % 32]` is the
//! third bit of weight `i`. The low 4 bits of scale `s` are a nibble of `scales[s % 8]`, low for
//! `s < 8`; the high 2 bits are in `scales[8 + s % 4]`, at bit `2 · (s / 4)`
//! (llama.cpp, `block_q3_K`).

use super::bits::{idot, unpack};
use super::{Act, Block, IntBlock, Terms, int_dot};
use half::f16;

/// The block.
#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub struct Q3_K {
    /// Third bits.
    pub hmask: [u8; 32],
    /// Low 2 bits.
    pub qs: [u8; 64],
    /// 6-bit scales.
    pub scales: [u8; 12],
    /// Scale of the scales.
    pub d: f16,
}
const _: () = assert!(size_of::<Q3_K>() == 110);

impl Q3_K {
    /// The weights' integers, less the offset: -4..=3.
    #[inline(always)]
    pub fn quants(&self) -> [i8; 256] {
        let mut q = [0; 256];
        for (bytes, q) in self.qs.chunks_exact(32).zip(q.chunks_exact_mut(128)) {
            unpack::<2>(bytes, 0, q);
        }
        unpack::<1>(&self.hmask, 2, &mut q);
        q.map(|q| q - 4)
    }

    /// The sub-blocks' scales, less the offset: -32..=31.
    #[inline(always)]
    pub fn sub_scales(&self) -> [i8; 16] {
        let mut sc = [0; 16];
        unpack::<4>(&self.scales[..8], 0, &mut sc);
        unpack::<2>(&self.scales[8..], 4, &mut sc);
        sc.map(|sc| sc - 32)
    }
}

impl Block for Q3_K {
    const WEIGHTS: usize = 256;

    fn decode(&self, out: &mut [f32]) {
        let d = self.d.to_f32_const();
        let (q, sc) = (self.quants(), self.sub_scales());
        for ((out, q), sc) in out.chunks_exact_mut(16).zip(q.chunks_exact(16)).zip(sc) {
            let d = d * sc as f32;
            for (out, q) in out.iter_mut().zip(q) {
                *out = d * *q as f32;
            }
        }
    }

    #[inline(always)]
    fn dot(row: &[Self], x: Act<'_>) -> f32 {
        int_dot(row, x.int())
    }
}

impl IntBlock for Q3_K {
    const HAS_MIN: bool = false;

    /// `|isum| ≤ 256 · 32 · 4 · 127 < 2²²`.
    #[inline(always)]
    fn terms(&self, x: &[i8], _sums: &[i16]) -> Terms {
        let mut isum = 0;
        let (q, sc) = (self.quants(), self.sub_scales());
        for ((q, x), sc) in q.chunks_exact(16).zip(x.chunks_exact(16)).zip(sc) {
            isum += sc as i32 * idot(q, x);
        }
        Terms {
            scale: self.d.to_f32_const(),
            isum,
            min: 0.0,
            msum: 0,
        }
    }
}
