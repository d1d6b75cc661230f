//! IQ4_XS: 256 weights in 8 sub-blocks of 32, coded as in [`super::iq4_nl`], each with a 6-bit scale.
//! `w = d·(sc - 32) · VALUES[q]`.
//!
//! Each 16 bytes of `qs` hold a sub-block. The low 4 bits of scale `s` are a nibble of
//! `scales_l[s / 2]`, low for even `s`; the upper 2 bits are in `scales_h`, at bit `2 · s`
//! (llama.cpp, `block_iq4_xs`).

use super::bits::nearest;
use super::search::{self, Search};
use super::{Encode, IntBlock, iq4_nl};
use half::f16;

/// The block.
#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub struct Iq4Xs {
    /// Scale of the scales.
    pub d: f16,
    /// Upper 2 bits of the scales.
    pub scales_h: u16,
    /// Low 4 bits of the scales.
    pub scales_l: [u8; 4],
    /// Codes.
    pub qs: [u8; 128],
}
const _: () = assert!(size_of::<Iq4Xs>() == 136);

impl Iq4Xs {
    /// Sub-block `s`'s scale, less the offset: -32..=31.
    #[inline(always)]
    pub fn sub_scale(&self, s: usize) -> i8 {
        let low = self.scales_l[s / 2] >> (4 * (s % 2)) & 15;
        let high = (self.scales_h >> (2 * s) & 3) as u8;
        (low | high << 4) as i8 - 32
    }
}

impl IntBlock for Iq4Xs {
    type Ints = [i8; 256];
    const SUB: usize = 32;
    const OFFSET: i32 = 128;
    const BITS: u32 = 8;

    /// The weights' integers, -127..=113.
    #[inline(always)]
    fn ints(&self) -> [i8; 256] {
        let mut q = [0; 256];
        for (codes, q) in self.qs.chunks_exact(16).zip(q.chunks_exact_mut(32)) {
            iq4_nl::values(codes, q);
        }
        q
    }

    #[inline(always)]
    fn scale(&self) -> f32 {
        self.d.to_f32_const()
    }

    #[inline(always)]
    fn sub(&self, s: usize) -> (i32, i32) {
        (self.sub_scale(s) as i32, 0)
    }
}

impl Encode for Iq4Xs {
    fn encode_row<S: Search>(x: &[f32], importance: Option<&[f32]>, out: &mut [Self]) {
        search::in_runs::<32, _>(x, importance, out, encode::<S>);
    }
}

/// Encodes blocks of [`WIDE`](search::WIDE) sub-blocks in all, or less.
fn encode<S: Search>(x: &[f32], importance: Option<&[f32]>, out: &mut [Iq4Xs]) {
    let scales = iq4_nl::scales::<S>(x, importance, 256);
    for (b, (x, out)) in x.chunks_exact(256).zip(out).enumerate() {
        let scales = scales.part::<8>(b);
        let d = -search::peak_of(&scales) / 32.0;
        let inv = search::inverse(d);
        out.d = f16::from_f32_const(d);
        (out.scales_h, out.scales_l) = (0, [0; 4]);
        let subs = x.chunks_exact(32).zip(out.qs.chunks_exact_mut(16));
        for (s, (x, qs)) in subs.enumerate() {
            let sc = nearest(inv * scales[s]).clamp(-32, 31);
            // Under the float scale, not under its f16 as in the K formats: the reference does so.
            iq4_nl::code(x, d * sc as f32, qs);
            let sc = (sc + 32) as u8;
            out.scales_l[s / 2] |= (sc & 15) << (4 * (s % 2));
            out.scales_h |= (sc as u16 >> 4) << (2 * s);
        }
    }
}
