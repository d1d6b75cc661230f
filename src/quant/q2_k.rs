//! Q2_K: 256 weights of 2 bits in 16 sub-blocks of 16, each with a 4-bit scale and a 4-bit minimum.
//! `w = d·sc · q - dmin·m`.
//!
//! Each 32 bytes of `qs` hold 128 weights: weight `i` in byte `i % 32`, at bit `2 · (i / 32)`. Byte `s`
//! of `scales` is the scale of sub-block `s` in its low and the minimum in its high nibble
//! (llama.cpp, `block_q2_K`).

use super::bits::{idot, unpack};
use super::{Act, Block, IntBlock, Terms, int_dot};
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
    /// The weights' integers, 0..=3.
    #[inline(always)]
    pub fn quants(&self) -> [i8; 256] {
        let mut q = [0; 256];
        for (bytes, q) in self.qs.chunks_exact(32).zip(q.chunks_exact_mut(128)) {
            unpack::<2>(bytes, 0, q);
        }
        q
    }

    /// Sub-block `s`'s scale and minimum, 0..=15.
    #[inline(always)]
    pub fn scale_min(&self, s: usize) -> (u8, u8) {
        (self.scales[s] & 15, self.scales[s] >> 4)
    }
}

impl Block for Q2_K {
    const WEIGHTS: usize = 256;

    fn decode(&self, out: &mut [f32]) {
        let (d, dmin) = (self.d.to_f32_const(), self.dmin.to_f32_const());
        let q = self.quants();
        for (s, (out, q)) in out.chunks_exact_mut(16).zip(q.chunks_exact(16)).enumerate() {
            let (sc, m) = self.scale_min(s);
            let (d, m) = (d * sc as f32, dmin * m as f32);
            for (out, q) in out.iter_mut().zip(q) {
                *out = d * *q as f32 - m;
            }
        }
    }

    #[inline(always)]
    fn dot(row: &[Self], x: Act<'_>) -> f32 {
        int_dot(row, x.int())
    }
}

impl IntBlock for Q2_K {
    const HAS_MIN: bool = true;

    /// `|isum| ≤ 256 · 15 · 3 · 127 < 2²¹`, `|msum| ≤ 256 · 15 · 127 < 2¹⁹`.
    #[inline(always)]
    fn terms(&self, x: &[i8], sums: &[i16]) -> Terms {
        let (mut isum, mut msum) = (0, 0);
        let q = self.quants();
        for (s, (q, x)) in q.chunks_exact(16).zip(x.chunks_exact(16)).enumerate() {
            let (sc, m) = self.scale_min(s);
            isum += sc as i32 * idot(q, x);
            msum += m as i32 * sums[s] as i32;
        }
        Terms {
            scale: self.d.to_f32_const(),
            isum,
            min: -self.dmin.to_f32_const(),
            msum,
        }
    }
}
