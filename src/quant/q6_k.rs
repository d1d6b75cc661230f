//! Q6_K: 256 weights of 6 bits in 16 sub-blocks of 16, each with an 8-bit scale.
//! `w = d · sc · (q - 32)`.
//!
//! In two halves of 128 weights: 64 bytes of `ql` hold the low nibbles (weights 0..64 low, 64..128
//! high), 32 bytes of `qh` the upper 2 bits, laid out as in [`super::q2_k`] (llama.cpp, `block_q6_K`).

use super::bits::{nearest, pack, unpack};
use super::search::{self, Search, WIDE, groups};
use super::{Encode, IntBlock};
use half::f16;

/// The block.
#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub struct Q6_K {
    /// Low 4 bits.
    pub ql: [u8; 128],
    /// Upper 2 bits.
    pub qh: [u8; 64],
    /// Sub-blocks' scales.
    pub scales: [i8; 16],
    /// Scale of the scales.
    pub d: f16,
}
const _: () = assert!(size_of::<Q6_K>() == 210);

impl IntBlock for Q6_K {
    type Ints = [i8; 256];
    const SUB: usize = 16;
    const OFFSET: i32 = 32;
    const BITS: u32 = 6;

    /// The weights' integers, less the offset: -32..=31.
    #[inline(always)]
    fn ints(&self) -> [i8; 256] {
        let mut q = [0; 256];
        for (half, q) in q.chunks_exact_mut(128).enumerate() {
            unpack::<4>(&self.ql[64 * half..][..64], 0, q);
            unpack::<2>(&self.qh[32 * half..][..32], 4, q);
        }
        q.map(|q| q - 32)
    }

    #[inline(always)]
    fn scale(&self) -> f32 {
        self.d.to_f32_const()
    }

    #[inline(always)]
    fn sub(&self, s: usize) -> (i32, i32) {
        (self.scales[s] as i32, 0)
    }
}

impl Encode for Q6_K {
    fn encode_row<S: Search>(x: &[f32], importance: Option<&[f32]>, out: &mut [Self]) {
        search::in_runs::<16, _>(x, importance, out, encode::<S>);
    }
}

/// Encodes blocks of [`WIDE`] sub-blocks in all, or less.
fn encode<S: Search>(x: &[f32], importance: Option<&[f32]>, out: &mut [Q6_K]) {
    // Each sub-block's scale. Importance is taken as it is: with 6 bits, how large a weight is
    // matters little.
    let xs = groups::<16, WIDE>(x);
    let w = match importance {
        None => search::squares(&xs),
        Some(columns) => groups(columns),
    };
    let (scales, codes) = S::symmetric(&xs, &w, 32);
    let mut q = [0; 16 * WIDE];
    search::ungroup(&codes, &mut q);

    for (b, (x, out)) in x.chunks_exact(256).zip(out).enumerate() {
        // The scales' own scale and 8-bit codes.
        let scales = scales.part::<16>(b);
        let peak = search::peak_of(&scales);
        if peak.abs() < search::TINY {
            *out = bytemuck::Zeroable::zeroed();
            continue;
        }
        let inv = -128.0 / peak;
        out.d = f16::from_f32_const(1.0 / inv);
        out.scales = scales.map(|s| nearest(inv * s).min(127) as i8);

        // The scales were rounded: round the weights again, to what will be decoded.
        let q = &mut q[256 * b..][..256];
        let d = out.d.to_f32_const();
        let subs = q.chunks_exact_mut(16).zip(x.chunks_exact(16));
        for ((q, x), sc) in subs.zip(out.scales) {
            search::round_symmetric(x, d * sc as f32, 32, q);
        }
        for (half, q) in q.chunks_exact(128).enumerate() {
            pack::<4>(q, 0, &mut out.ql[64 * half..][..64]);
            pack::<2>(q, 4, &mut out.qh[32 * half..][..32]);
        }
    }
}
