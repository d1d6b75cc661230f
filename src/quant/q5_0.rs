//! Q5_0: 32 weights of 5 bits, one f16 scale. `w = d · (q - 16)`.
//!
//! Byte `j` of `qs` holds the low 4 bits of weight `j` in its low and of weight `j + 16` in its high
//! nibble; bit `i` of `qh`, read as a little-endian number, is the fifth bit of weight `i`
//! (llama.cpp, `block_q5_0`).

use super::bits::{pack, unpack};
use super::search::{self, Search};
use super::{Encode, IntBlock};
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

impl IntBlock for Q5_0 {
    type Ints = [i8; 32];
    const SUB: usize = 32;
    const OFFSET: i32 = 16;
    const BITS: u32 = 5;

    /// The weights' integers, less the offset: -16..=15.
    #[inline(always)]
    fn ints(&self) -> [i8; 32] {
        quants(self.qh, &self.qs).map(|q| q - 16)
    }

    #[inline(always)]
    fn scale(&self) -> f32 {
        self.d.to_f32_const()
    }
}

impl Encode for Q5_0 {
    fn encode_row<S: Search>(x: &[f32], importance: Option<&[f32]>, out: &mut [Self]) {
        search::encode_symmetric::<S, _>(x, importance, 16, out, block);
    }
}

#[inline(always)]
fn block(d: f32, q: &[u8; 32]) -> Q5_0 {
    let (qh, qs) = pack5(q);
    Q5_0 {
        d: f16::from_f32_const(d),
        qh,
        qs,
    }
}

/// The inverse of [`quants`].
#[inline(always)]
pub(super) fn pack5(q: &[u8; 32]) -> ([u8; 4], [u8; 16]) {
    let mut qs = [0; 16];
    pack::<4>(q, 0, &mut qs);
    let mut qh = 0u32;
    for (i, q) in q.iter().enumerate() {
        qh |= (*q as u32 >> 4 & 1) << i;
    }
    (qh.to_le_bytes(), qs)
}
