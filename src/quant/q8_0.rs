//! Q8_0: 32 weights of 8 bits, one f16 scale. `w = d · q` (llama.cpp, `block_q8_0`).

use super::bits::truncate;
use super::search::{self, Search};
use super::{Encode, IntBlock};
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

impl IntBlock for Q8_0 {
    type Ints = [i8; 32];
    const SUB: usize = 32;
    const OFFSET: i32 = 128;
    const BITS: u32 = 8;

    #[inline(always)]
    fn ints(&self) -> [i8; 32] {
        self.qs
    }

    #[inline(always)]
    fn scale(&self) -> f32 {
        self.d.to_f32_const()
    }
}

impl Encode for Q8_0 {
    fn encode_row<S: Search>(x: &[f32], _importance: Option<&[f32]>, out: &mut [Self]) {
        for (x, out) in x.chunks_exact(32).zip(out) {
            let d = search::size_of(x) / 127.0;
            let inv = search::inverse(d);
            let mut qs = [0; 32];
            for (q, x) in qs.iter_mut().zip(x) {
                *q = truncate(round(x * inv)) as i8;
            }
            *out = Q8_0 {
                d: f16::from_f32_const(d),
                qs,
            };
        }
    }
}

/// `x.round()`, halves away from zero, up to the fraction that [`truncate`] drops, for `|x| < 2²²`. A
/// call of `round` would keep the loop from being vectorized; the largest float below a half
/// carries a half over the next integer but nothing less than a half. (Compared with `round` for every
/// float of magnitude up to 128.)
#[inline(always)]
fn round(x: f32) -> f32 {
    x + 0.499_999_97_f32.copysign(x)
}
