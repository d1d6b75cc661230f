//! Q5_1: 32 weights of 5 bits, an f16 scale and an f16 minimum. `w = d · q + m`.
//!
//! The bits lie as in [`super::q5_0`] (llama.cpp, `block_q5_1`).

use super::search::{self, Search};
use super::{Encode, IntBlock, q5_0};
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

impl IntBlock for Q5_1 {
    type Ints = [i8; 32];
    const SUB: usize = 32;
    const HAS_MIN: bool = true;
    const BITS: u32 = 5;

    /// The weights' integers, 0..=31.
    #[inline(always)]
    fn ints(&self) -> [i8; 32] {
        q5_0::quants(self.qh, &self.qs)
    }

    #[inline(always)]
    fn scale(&self) -> f32 {
        self.d.to_f32_const()
    }

    #[inline(always)]
    fn min(&self) -> f32 {
        self.m.to_f32_const()
    }
}

impl Encode for Q5_1 {
    fn encode_row<S: Search>(x: &[f32], importance: Option<&[f32]>, out: &mut [Self]) {
        search::encode_affine::<S, _>(x, importance, 31, out, block);
    }
}

#[inline(always)]
fn block(d: f32, m: f32, q: &[u8; 32]) -> Q5_1 {
    let (qh, qs) = q5_0::pack5(q);
    Q5_1 {
        d: f16::from_f32_const(d),
        m: f16::from_f32_const(m),
        qh,
        qs,
    }
}
