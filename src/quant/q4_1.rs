//! Q4_1: 32 weights of 4 bits, an f16 scale and an f16 minimum. `w = d · q + m`.
//!
//! Byte `j` of `qs` holds weight `j` in its low and weight `j + 16` in its high nibble
//! (llama.cpp, `block_q4_1`).

use super::bits::{pack, unpack};
use super::search::{self, Search};
use super::{Encode, IntBlock};
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

impl IntBlock for Q4_1 {
    type Ints = [i8; 32];
    const SUB: usize = 32;
    const HAS_MIN: bool = true;
    const BITS: u32 = 4;

    /// The weights' integers, 0..=15.
    #[inline(always)]
    fn ints(&self) -> [i8; 32] {
        let mut q = [0; 32];
        unpack::<4>(&self.qs, 0, &mut q);
        q
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

impl Encode for Q4_1 {
    fn encode_row<S: Search>(x: &[f32], importance: Option<&[f32]>, out: &mut [Self]) {
        search::encode_affine::<S, _>(x, importance, 15, out, block);
    }
}

#[inline(always)]
fn block(d: f32, m: f32, q: &[u8; 32]) -> Q4_1 {
    let mut qs = [0; 16];
    pack::<4>(q, 0, &mut qs);
    Q4_1 {
        d: f16::from_f32_const(d),
        m: f16::from_f32_const(m),
        qs,
    }
}
