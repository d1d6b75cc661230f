//! Q8_0: 32 weights of 8 bits, one f16 scale. `w = d · q` (llama.cpp, `block_q8_0`).

use super::{Act, Block, IntBlock, Terms, int_dot};
use half::f16;

/// The block.
#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub struct Q8_0 {
    /// Scale.
    pub d: f16,
    /// Weights.
    pub qs: [i8; 32],
}
const _: () = assert!(size_of::<Q8_0>() == 34);

impl Block for Q8_0 {
    const WEIGHTS: usize = 32;

    fn decode(&self, out: &mut [f32]) {
        let d = self.d.to_f32_const();
        for (out, q) in out.iter_mut().zip(self.qs) {
            *out = q as f32 * d;
        }
    }

    #[inline(always)]
    fn dot(row: &[Self], x: Act<'_>) -> f32 {
        int_dot(row, x.int())
    }
}

impl IntBlock for Q8_0 {
    const HAS_MIN: bool = false;

    #[inline(always)]
    fn terms(&self, x: &[i8], _sums: &[i16]) -> Terms {
        let isum = self
            .qs
            .iter()
            .zip(x)
            .map(|(&q, &x)| q as i32 * x as i32)
            .sum();
        Terms {
            scale: self.d.to_f32_const(),
            isum,
            min: 0.0,
            msum: 0,
        }
    }
}
