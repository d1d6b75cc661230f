//! Q5_1: 32 weights of 5 bits, an f16 scale and an f16 minimum. `w = d · q + m`.
//!
//! The bits lie as in [`super::q5_0`] (llama.cpp, `block_q5_1`).

use super::bits::idot;
use super::{Act, Block, IntBlock, Terms, int_dot, q5_0};
use half::f16;

/// The block.
#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub struct Q5_1 {
    /// Scale.
    pub d: f16,
    /// Minimum.
    pub m: f16,
    /// Fifth bits.
    pub qh: [u8; 4],
    /// Nibbles.
    pub qs: [u8; 16],
}
const _: () = assert!(size_of::<Q5_1>() == 24);

impl Q5_1 {
    /// The weights' integers, 0..=31.
    #[inline(always)]
    pub fn quants(&self) -> [i8; 32] {
        q5_0::quants(self.qh, &self.qs)
    }
}

impl Block for Q5_1 {
    const WEIGHTS: usize = 32;

    fn decode(&self, out: &mut [f32]) {
        let (d, m) = (self.d.to_f32_const(), self.m.to_f32_const());
        for (out, q) in out.iter_mut().zip(self.quants()) {
            *out = q as f32 * d + m;
        }
    }

    #[inline(always)]
    fn dot(row: &[Self], x: Act<'_>) -> f32 {
        int_dot(row, x.int())
    }
}

impl IntBlock for Q5_1 {
    const HAS_MIN: bool = true;

    /// `|isum| ≤ 32 · 31 · 127`, `|msum| ≤ 32 · 127`.
    #[inline(always)]
    fn terms(&self, x: &[i8], sums: &[i16]) -> Terms {
        Terms {
            scale: self.d.to_f32_const(),
            isum: idot(&self.quants(), x),
            min: self.m.to_f32_const(),
            msum: sums.iter().map(|&s| s as i32).sum(),
        }
    }
}
