//! Q3_K: 256 weights of 3 bits in 16 sub-blocks of 16, each with a 6-bit scale.
//! `w = d·(sc - 32) · (q - 4)`.
//!
//! The low 2 bits of the weights lie in `qs` as in [`super::q2_k`]; bit `i / 32` of `hmask[i % 32]` is the
//! third bit of weight `i`. The low 4 bits of scale `s` are a nibble of `scales[s % 8]`, low for
//! `s < 8`; the high 2 bits are in `scales[8 + s % 4]`, at bit `2 · (s / 4)`
//! (llama.cpp, `block_q3_K`).

use super::bits::{nearest, pack, unpack};
use super::search::{self, Search, WIDE, groups};
use super::{Encode, IntBlock};
use half::f16;

/// The block.
#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub struct Q3_K {
    /// Third bits.
    pub hmask: [u8; 32],
    /// Low 2 bits.
    pub qs: [u8; 64],
    /// 6-bit scales.
    pub scales: [u8; 12],
    /// Scale of the scales.
    pub d: f16,
}
const _: () = assert!(size_of::<Q3_K>() == 110);

impl Q3_K {
    /// Sub-block `s`'s scale, less the offset: -32..=31.
    #[inline(always)]
    pub fn sub_scale(&self, s: usize) -> i8 {
        let low = self.scales[s % 8] >> (4 * (s / 8)) & 15;
        let high = self.scales[8 + s % 4] >> (2 * (s / 4)) & 3;
        (low | high << 4) as i8 - 32
    }
}

impl IntBlock for Q3_K {
    type Ints = [i8; 256];
    const SUB: usize = 16;
    const OFFSET: i32 = 4;
    const BITS: u32 = 3;

    /// The weights' integers, less the offset: -4..=3.
    #[inline(always)]
    fn ints(&self) -> [i8; 256] {
        let mut q = [0; 256];
        for (bytes, q) in self.qs.chunks_exact(32).zip(q.chunks_exact_mut(128)) {
            unpack::<2>(bytes, 0, q);
        }
        unpack::<1>(&self.hmask, 2, &mut q);
        q.map(|q| q - 4)
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

impl Encode for Q3_K {
    fn encode_row<S: Search>(x: &[f32], importance: Option<&[f32]>, out: &mut [Self]) {
        search::in_runs::<16, _>(x, importance, out, encode::<S>);
    }
}

/// Encodes blocks of [`WIDE`] sub-blocks in all, or less.
fn encode<S: Search>(x: &[f32], importance: Option<&[f32]>, out: &mut [Q3_K]) {
    // Each sub-block's scale.
    let xs = groups::<16, WIDE>(x);
    let ((scales, codes), w) = match importance {
        None => (S::descend(&xs, 4), None),
        Some(columns) => {
            let s = search::energy::<16, WIDE>(x, 256, 2.0 / 256.0);
            let w = search::weigh(&xs, &groups(columns), s);
            (S::symmetric(&xs, &w, 4), Some(search::sums(&w)))
        }
    };
    let mut q = [0; 16 * WIDE];
    search::ungroup(&codes, &mut q);

    for (b, (x, out)) in x.chunks_exact(256).zip(out).enumerate() {
        // The scales' own scale and 6-bit codes, plus 32.
        let scales = scales.part::<16>(b);
        let (d, sc) = match w {
            None => scale_codes(&scales),
            Some(w) => {
                let w = groups::<16, 1>(&w.part::<16>(b));
                let (d, codes) = search::symmetric(&groups::<16, 1>(&scales), &w, 32);
                (d.0[0], codes.map(|code| code.0[0] as u8))
            }
        };
        out.d = f16::from_f32_const(d);
        pack::<4>(&sc.map(|s| s & 15), 0, &mut out.scales[..8]);
        pack::<2>(&sc, 4, &mut out.scales[8..]);

        // The scales were rounded: round the weights again, to what will be decoded.
        let q = &mut q[256 * b..][..256];
        let d = out.d.to_f32_const();
        for (s, (q, x)) in q.chunks_exact_mut(16).zip(x.chunks_exact(16)).enumerate() {
            search::round_symmetric(x, d * out.sub_scale(s) as f32, 4, q);
        }
        for (q, bytes) in q.chunks_exact(128).zip(out.qs.chunks_exact_mut(32)) {
            pack::<2>(q, 0, bytes);
        }
        pack::<1>(q, 2, &mut out.hmask);
    }
}

/// The scale that maps the scale of largest magnitude to -32, and the codes plus 32.
fn scale_codes(scales: &[f32; 16]) -> (f32, [u8; 16]) {
    let peak = search::peak_of(scales);
    if peak == 0.0 {
        return (0.0, [0; 16]);
    }
    let inv = -32.0 / peak;
    let code = |s| ((nearest(inv * s) as i8).clamp(-32, 31) + 32) as u8;
    (1.0 / inv, scales.map(code))
}
