//! Q5_0: 32 weights of 5 bits, one f16 scale. `w = d · (q - 16)`.
//!
//! Byte `j` of `qs` holds the low 4 bits of weight `j` in its low and of weight `j + 16` in its high
//! nibble; bit `i` of `qh`, read as a little-endian number, is the fifth bit of weight `i`
//! (llama.cpp, `block_q5_0`).

use super::bits::{idot, unpack};
use super::{Act, Block, IntBlock, Terms, int_dot};
use half::f16;

/// The block.
#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub struct Q5_0 {
    /// Scale.
    pub d: f16,
    /// Fifth bits.
    pub qh: [u8; 4],
    /// Nibbles.
    pub qs: [u8; 16],
}
const _: () = assert!(size_of::<Q5_0>() == 22);

/// The 5-bit integers of Q5_0 and Q5_1, 0..=31.
#[inline(always)]
pub(super) fn quants(qh: [u8; 4], qs: &[u8; 16]) -> [i8; 32] {
    let mut q = [0; 32];
    unpack::<4>(qs, 0, &mut q);
    let qh = u32::from_le_bytes(qh);
    for (i, q) in q.iter_mut().enumerate() {
        *q |= ((qh >> i & 1) << 4) as i8;
    }
    q
}

impl Q5_0 {
    /// The weights' integers, less the offset: -16..=15.
    #[inline(always)]
    pub fn quants(&self) -> [i8; 32] {
        quants(self.qh, &self.qs).map(|q| q - 16)
    }
}

impl Block for Q5_0 {
    const WEIGHTS: usize = 32;

    fn decode(&self, out: &mut [f32]) {
        let d = self.d.to_f32_const();
        for (out, q) in out.iter_mut().zip(self.quants()) {
            *out = q as f32 * d;
        }
    }

    #[inline(always)]
    fn dot(row: &[Self], x: Act<'_>) -> f32 {
        int_dot(row, x.int())
    }
}

impl IntBlock for Q5_0 {
    const HAS_MIN: bool = false;

    /// `|isum| ≤ 32 · 16 · 127`.
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
