//! IQ4_NL: 32 weights, each one of 16 unevenly spaced values, and one f16 scale. `w = d · VALUES[q]`.
//!
//! Byte `j` of `qs` holds weight `j` in its low and weight `j + 16` in its high nibble
//! (llama.cpp, `block_iq4_nl`).

use super::bits::{idot, unpack};
use super::{Act, Block, IntBlock, Terms, int_dot};
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
