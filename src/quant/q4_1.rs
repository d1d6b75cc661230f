//! Q4_1: 32 weights of 4 bits, an f16 scale and an f16 minimum. `w = d · q + m`.
//!
//! Byte `j` of `qs` holds weight `j` in its low and weight `j + 16` in its high nibble
//! (llama.cpp, `block_q4_1`).

use super::bits::{idot, unpack};
use super::{Act, Block, IntBlock, Terms, int_dot};
use half::f16;

/// The block.
#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub struct Q4_1 {
    /// Scale.
    pub d: f16,
    /// Minimum.
    pub m: f16,
    /// Nibbles.
    pub qs: [u8; 16],
}
const _: () = assert!(size_of::<Q4_1>() == 20);

impl Q4_1 {
    /// The weights' integers, 0..=15.
    #[inline(always)]
    pub fn quants(&self) -> [i8; 32] {
        let mut q = [0; 32];
        unpack::<4>(&self.qs, 0, &mut q);
        q
    }
}

impl Block for Q4_1 {
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

impl IntBlock for Q4_1 {
    const HAS_MIN: bool = true;

    /// `|isum| ≤ 32 · 15 · 127`, `|msum| ≤ 32 · 127`.
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
