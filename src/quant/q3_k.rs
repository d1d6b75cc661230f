//! Q3_K: 256 weights of 3 bits in 16 sub-blocks of 16, each with a 6-bit scale.
//! `w = d·(sc - 32) · (q - 4)`.
//!
//! The low 2 bits of the weights lie in `qs` as in [`super::q2_k`]; bit `i / 32` of `hmask[i % 32]` is the
//! third bit of weight `i`. The low 4 bits of scale `s` are a nibble of `scales[s % 8]`, low for
//! `s < 8`; the high 2 bits are in `scales[8 + s % 4]`, at bit `2 · (s / 4)`
//! (llama.cpp, `block_q3_K`).

use super::bits::{idot, pack, unpack};
use super::search::{self, groups, nearest};
use super::{Act, Block, Encode, IntBlock, Terms, int_dot, parts};
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
    /// The weights' integers, less the offset: -4..=3.
    #[inline(always)]
    pub fn quants(&self) -> [i8; 256] {
        let mut q = [0; 256];
        for (bytes, q) in self.qs.chunks_exact(32).zip(q.chunks_exact_mut(128)) {
            unpack::<2>(bytes, 0, q);
        }
        unpack::<1>(&self.hmask, 2, &mut q);
        q.map(|q| q - 4)
    }

    /// The sub-blocks' scales, less the offset: -32..=31.
    #[inline(always)]
    pub fn sub_scales(&self) -> [i8; 16] {
        let mut sc = [0; 16];
        unpack::<4>(&self.scales[..8], 0, &mut sc);
        unpack::<2>(&self.scales[8..], 4, &mut sc);
        sc.map(|sc| sc - 32)
    }
}

impl Block for Q3_K {
    const WEIGHTS: usize = 256;

    fn decode(&self, out: &mut [f32]) {
        let d = self.d.to_f32_const();
        let (q, sc) = (self.quants(), self.sub_scales());
        for ((out, q), sc) in out.chunks_exact_mut(16).zip(q.chunks_exact(16)).zip(sc) {
            let d = d * sc as f32;
            for (out, q) in out.iter_mut().zip(q) {
                *out = d * *q as f32;
            }
        }
    }

    #[inline(always)]
    fn dot(row: &[Self], x: Act<'_>) -> f32 {
        int_dot(row, x.int())
    }
}

impl IntBlock for Q3_K {
    const HAS_MIN: bool = false;

    /// `|isum| ≤ 256 · 32 · 4 · 127 < 2²²`.
    #[inline(always)]
    fn terms(&self, x: &[i8], _sums: &[i16]) -> Terms {
        let mut isum = 0;
        let (q, sc) = (self.quants(), self.sub_scales());
        for ((q, x), sc) in q.chunks_exact(16).zip(x.chunks_exact(16)).zip(sc) {
            isum += sc as i32 * idot(q, x);
        }
        Terms {
            scale: self.d.to_f32_const(),
            isum,
            min: 0.0,
            msum: 0,
        }
    }
}

impl Encode for Q3_K {
    #[inline(always)]
    fn encode_row(x: &[f32], importance: Option<&[f32]>, out: &mut [Self]) {
        for ((x, importance), out) in parts(x, importance, Self::WEIGHTS).zip(out) {
            *out = encode(x, importance);
        }
    }
}

#[inline(always)]
fn encode(x: &[f32], importance: Option<&[f32]>) -> Q3_K {
    let xs = groups::<16, 16>(x);
    // Each sub-block's scale, then the scales' own scale and 6-bit codes (plus 32).
    let (d, sc, codes);
    match importance {
        None => {
            let scales;
            (scales, codes) = search::descend(&xs, 4);
            let ([peak], _) = search::peak(&groups::<16, 1>(&scales));
            if peak != 0.0 {
                let inv = -32.0 / peak;
                d = 1.0 / inv;
                sc = scales.map(|s| ((nearest(inv * s) as i8).clamp(-32, 31) + 32) as u8);
            } else {
                (d, sc) = (0.0, [0; 16]);
            }
        }
        Some(columns) => {
            let s = 2.0 * search::sum_of_squares(x) / 256.0;
            let w = search::weigh(&xs, &groups(columns), s);
            let scales;
            (scales, codes) = search::symmetric(&xs, &w, 4);
            let w = groups::<16, 1>(&search::sums(&w));
            let (scale, code) = search::symmetric(&groups::<16, 1>(&scales), &w, 32);
            d = scale[0];
            sc = code.map(|[code]| code);
        }
    }
    let mut block = Q3_K {
        hmask: [0; 32],
        qs: [0; 64],
        scales: [0; 12],
        d: f16::from_f32_const(d),
    };
    pack::<4>(&sc.map(|s| s & 15), 0, &mut block.scales[..8]);
    pack::<2>(&sc, 4, &mut block.scales[8..]);

    // The scales were rounded: round the weights again, to what will be decoded.
    let mut q = [0; 256];
    search::ungroup(&codes, &mut q);
    let d = block.d.to_f32_const();
    let subs = q.chunks_exact_mut(16).zip(x.chunks_exact(16));
    for ((q, x), sc) in subs.zip(block.sub_scales()) {
        search::round_symmetric(x, d * sc as f32, 4, q);
    }
    for (q, bytes) in q.chunks_exact(128).zip(block.qs.chunks_exact_mut(32)) {
        pack::<2>(q, 0, bytes);
    }
    pack::<1>(&q, 2, &mut block.hmask);
    block
}
