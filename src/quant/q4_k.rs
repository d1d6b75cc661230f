//! Q4_K: 256 weights of 4 bits in 8 sub-blocks of 32, each with a 6-bit scale and a 6-bit minimum.
//! `w = d·sc · q - dmin·m`.
//!
//! Each 32 bytes of `qs` hold two sub-blocks, the first in the low and the second in the high nibbles.
//! The 6-bit numbers are packed as [`scale_min`] reads them (llama.cpp, `block_q4_K`).

use super::bits::{nearest, pack, unpack};
use super::lanes::Lanes;
use super::search::{self, Search, Tries, WEIGHTED, WIDE, groups};
use super::{Encode, IntBlock};
use half::f16;

/// The block.
#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub struct Q4_K {
    /// Scale of the scales.
    pub d: f16,
    /// Scale of the minimums.
    pub dmin: f16,
    /// 6-bit scales and minimums.
    pub scales: [u8; 12],
    /// Nibbles.
    pub qs: [u8; 128],
}
const _: () = assert!(size_of::<Q4_K>() == 144);

/// Sub-block `s`'s scale and minimum, 0..=63, in Q4_K and Q5_K.
///
/// Bytes 0..4 hold the scales and bytes 4..8 the minimums of sub-blocks 0..4, in 6 bits each. Bytes
/// 8..12 hold the low nibbles of sub-blocks 4..8 (scale low, minimum high), whose upper 2 bits fill
/// the 2 free bits of bytes 0..8.
#[inline(always)]
pub fn scale_min(scales: &[u8; 12], s: usize) -> (u8, u8) {
    if s < 4 {
        (scales[s] & 63, scales[s + 4] & 63)
    } else {
        (
            scales[s + 4] & 15 | scales[s - 4] >> 6 << 4,
            scales[s + 4] >> 4 | scales[s] >> 6 << 4,
        )
    }
}

impl IntBlock for Q4_K {
    type Ints = [i8; 256];
    const SUB: usize = 32;
    const HAS_MIN: bool = true;
    const BITS: u32 = 4;

    /// The weights' integers, 0..=15.
    #[inline(always)]
    fn ints(&self) -> [i8; 256] {
        let mut q = [0; 256];
        for (bytes, q) in self.qs.chunks_exact(32).zip(q.chunks_exact_mut(64)) {
            unpack::<4>(bytes, 0, q);
        }
        q
    }

    #[inline(always)]
    fn scale(&self) -> f32 {
        self.d.to_f32_const()
    }

    #[inline(always)]
    fn min(&self) -> f32 {
        -self.dmin.to_f32_const()
    }

    #[inline(always)]
    fn sub(&self, s: usize) -> (i32, i32) {
        let (scale, min) = scale_min(&self.scales, s);
        (scale as i32, min as i32)
    }
}

/// What the search tries without importance.
const PLAIN: Tries = Tries {
    from: -1.0,
    by: 0.1,
    more: 20,
    absolute: false,
};

impl Encode for Q4_K {
    fn encode_row<S: Search>(x: &[f32], importance: Option<&[f32]>, out: &mut [Self]) {
        search::in_runs::<32, _>(x, importance, out, |x, importance, out| {
            for (part, out) in encode::<S>(x, importance, 15, PLAIN).iter().zip(out) {
                (out.d, out.dmin, out.scales) = (part.d, part.dmin, part.scales);
                out.qs = part.nibbles();
            }
        });
    }
}

/// What Q4_K and Q5_K have in common, before the weights are packed.
#[derive(Clone, Copy)]
pub(super) struct Parts {
    pub(super) d: f16,
    pub(super) dmin: f16,
    pub(super) scales: [u8; 12],
    pub(super) q: [u8; 256],
}

impl Parts {
    /// The low 4 bits of the weights.
    pub(super) fn nibbles(&self) -> [u8; 128] {
        let mut qs = [0; 128];
        for (q, bytes) in self.q.chunks_exact(64).zip(qs.chunks_exact_mut(32)) {
            pack::<4>(q, 0, bytes);
        }
        qs
    }
}

/// Encodes Q4_K and Q5_K, whose weights go to `top`: blocks of [`WIDE`] sub-blocks in all, or less.
pub(super) fn encode<S: Search>(
    x: &[f32],
    importance: Option<&[f32]>,
    top: i32,
    plain: Tries,
) -> [Parts; WIDE / 8] {
    // Each sub-block's scale and minimum.
    let xs = groups::<32, WIDE>(x);
    let (fit, w) = match importance {
        None => {
            let mean = (search::sums(&search::squares(&xs)) / Lanes::all(32.0)).sqrt();
            let w = xs.map(|x| mean + x.abs());
            (S::affine(&xs, &w, top, plain), None)
        }
        Some(columns) => {
            let s = search::energy::<32, WIDE>(x, 256, 2.0 / 256.0);
            let w = search::weigh(&xs, &groups(columns), s);
            (S::affine(&xs, &w, top, WEIGHTED), Some(search::sums(&w)))
        }
    };
    let mut q = [0; 32 * WIDE];
    search::ungroup(&fit.q, &mut q);

    let mut parts = [Parts {
        d: f16::ZERO,
        dmin: f16::ZERO,
        scales: [0; 12],
        q: [0; 256],
    }; WIDE / 8];
    for (b, (x, part)) in x.chunks_exact(256).zip(&mut parts).enumerate() {
        // These numbers' own scales and 6-bit codes.
        let scales = fit.scale.part::<8>(b);
        let mins = fit.min.part::<8>(b).map(|m| -m);
        let ((d, mut sc), (dmin, m)) = match w {
            None => (scale_codes(&scales), scale_codes(&mins)),
            Some(w) => {
                let w = w.part(b);
                let positive = |x| search::positive(x, &w, 63);
                (positive(&scales), positive(&mins))
            }
        };
        if top > 15 {
            // The reference caps what wrapped around in Q5_K, but not in Q4_K.
            sc = sc.map(|sc| sc.min(63));
        }
        part.d = f16::from_f32_const(d);
        part.dmin = f16::from_f32_const(dmin);
        part.scales = pack_scale_min(&sc, &m);

        // The scales were rounded: round the weights again, to what will be decoded.
        part.q.copy_from_slice(&q[256 * b..][..256]);
        let (d, dmin) = (part.d.to_f32_const(), part.dmin.to_f32_const());
        let subs = part.q.chunks_exact_mut(32).zip(x.chunks_exact(32));
        for (s, (q, x)) in subs.enumerate() {
            let (sc, m) = scale_min(&part.scales, s);
            search::round_affine(x, d * sc as f32, dmin * m as f32, top, q);
        }
    }
    parts
}

/// The scale that maps the largest value to 63, and the codes.
fn scale_codes(x: &[f32; 8]) -> (f32, [u8; 8]) {
    let max = x.iter().fold(0.0, |m, &x| if x > m { x } else { m });
    let inv = if max > 0.0 { 63.0 / max } else { 0.0 };
    (max / 63.0, x.map(|x| (nearest(inv * x) as u8).min(63)))
}

/// The inverse of [`scale_min`].
fn pack_scale_min(sc: &[u8; 8], m: &[u8; 8]) -> [u8; 12] {
    let mut out = [0; 12];
    for s in 0..4 {
        out[s] = sc[s] | sc[s + 4] >> 4 << 6;
        out[s + 4] = m[s] | m[s + 4] >> 4 << 6;
        out[s + 8] = sc[s + 4] & 15 | m[s + 4] << 4;
    }
    out
}
