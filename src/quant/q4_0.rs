//! Q4_0: 32 weights of 4 bits, one f16 scale. `w = d · (q - 8)`.
//!
//! Byte `j` of `qs` holds weight `j` in its low and weight `j + 16` in its high nibble
//! (llama.cpp, `block_q4_0`).

use super::bits::{pack, unpack};
use super::search::{self, Search};
use super::{Encode, IntBlock};
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

impl IntBlock for Q4_0 {
    type Ints = [i8; 32];
    const SUB: usize = 32;
    const OFFSET: i32 = 8;
    const BITS: u32 = 4;

    /// The weights' integers, less the offset: -8..=7.
    #[inline(always)]
    fn ints(&self) -> [i8; 32] {
        let mut q = [0; 32];
        unpack::<4>(&self.qs, 0, &mut q);
        q.map(|q| q - 8)
    }

    #[inline(always)]
    fn scale(&self) -> f32 {
        self.d.to_f32_const()
    }
}

impl Encode for Q4_0 {
    fn encode_row<S: Search>(x: &[f32], importance: Option<&[f32]>, out: &mut [Self]) {
        search::encode_symmetric::<S, _>(x, importance, 8, out, block);
    }
}

#[inline(always)]
fn block(d: f32, q: &[u8; 32]) -> Q4_0 {
    let mut qs = [0; 16];
    pack::<4>(q, 0, &mut qs);
    Q4_0 {
        d: f16::from_f32_const(d),
        qs,
    }
}
