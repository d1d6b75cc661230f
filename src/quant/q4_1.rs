//! Q4_1: 32 weights of 4 bits, an f16 scale and an f16 minimum. `w = d · q + m`.
//!
//! Byte `j` of `qs` holds weight `j` in its low and weight `j + 16` in its high nibble
//! (llama.cpp, `block_q4_1`).

use super::bits::{pack, truncate, unpack};
use super::lanes::Lanes;
use super::search::{self, Search, WEIGHTED, WIDE, groups};
use super::{Act, Block, Encode, IntBlock, int_dot};
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
    const SUB: usize = 32;
    const HAS_MIN: bool = true;
    const BITS: u32 = 4;

    #[inline(always)]
    fn ints(&self, out: &mut [i8]) {
        out.copy_from_slice(&self.quants());
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
        let Some(columns) = importance else {
            for (x, out) in x.chunks_exact(32).zip(out) {
                *out = plain(x);
            }
            return;
        };
        let mean_square = Lanes::all(search::sum_of_squares(x) / x.len() as f32);
        let parts = x.chunks(32 * WIDE).zip(columns.chunks(32 * WIDE));
        for ((x, columns), out) in parts.zip(out.chunks_mut(WIDE)) {
            let x = groups::<32, WIDE>(x);
            let w = search::weigh(&x, &groups(columns), mean_square);
            let fit = S::affine(&x, &w, 15, WEIGHTED);
            let mut q = [0; 32 * WIDE];
            search::ungroup(&fit.q, &mut q);
            let q = q.as_chunks().0.iter();
            for (((q, d), m), out) in q.zip(fit.scale.0).zip(fit.min.0).zip(out) {
                *out = block(d, m, q);
            }
        }
    }
}

/// Without importance: the smallest value becomes 0, the largest 15, the others are rounded.
#[inline(always)]
fn plain(x: &[f32]) -> Q4_1 {
    let (min, max) = search::range_of(x);
    let d = (max - min) / 15.0;
    let inv = search::inverse(d);
    let mut q = [0; 32];
    for (q, x) in q.iter_mut().zip(x) {
        *q = (truncate((x - min) * inv + 0.5) as i8).min(15) as u8;
    }
    block(d, min, &q)
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
