//! Q4_0: 32 weights of 4 bits, one f16 scale. `w = d · (q - 8)`.
//!
//! Byte `j` of `qs` holds weight `j` in its low and weight `j + 16` in its high nibble
//! (llama.cpp, `block_q4_0`).

use super::{Act, Block, IntBlock, Terms, int_dot};
use half::f16;

/// The block.
#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub struct Q4_0 {
    /// Scale.
    pub d: f16,
    /// Nibbles.
    pub qs: [u8; 16],
}
const _: () = assert!(size_of::<Q4_0>() == 18);

impl Block for Q4_0 {
    const WEIGHTS: usize = 32;

    fn decode(&self, out: &mut [f32]) {
        let d = self.d.to_f32_const();
        for (j, q) in self.qs.iter().enumerate() {
            out[j] = ((q & 15) as i32 - 8) as f32 * d;
            out[j + 16] = ((q >> 4) as i32 - 8) as f32 * d;
        }
    }

    #[inline(always)]
    fn dot(row: &[Self], x: Act<'_>) -> f32 {
        int_dot(row, x.int())
    }
}

impl IntBlock for Q4_0 {
    const HAS_MIN: bool = false;

    #[inline(always)]
    fn terms(&self, x: &[i8], _sums: &[i16]) -> Terms {
        let mut isum = 0;
        for (j, q) in self.qs.iter().enumerate() {
            isum += ((q & 15) as i32 - 8) * x[j] as i32;
            isum += ((q >> 4) as i32 - 8) * x[j + 16] as i32;
        }
        Terms {
            scale: self.d.to_f32_const(),
            isum,
            min: 0.0,
            msum: 0,
        }
    }
}
