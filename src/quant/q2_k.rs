//! Q2_K: 256 weights of 2 bits in 16 sub-blocks of 16, each with a 4-bit scale and a 4-bit minimum.
//! `w = d·sc · q - dmin·m`.
//!
//! Each 32 bytes of `qs` hold 128 weights: weight `i` in byte `i % 32`, at bit `2 · (i / 32)`. Byte `s`
//! of `scales` is the scale of sub-block `s` in its low and the minimum in its high nibble
//! (llama.cpp, `block_q2_K`).

use super::bits::{idot, pack, unpack};
use super::search::{self, Tries, WEIGHTED, groups, nearest};
use super::{Act, Block, Encode, IntBlock, Terms, int_dot, parts};
use half::f16;

/// The block.
#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub struct Q2_K {
    /// Scales (low nibbles) and minimums (high nibbles).
    pub scales: [u8; 16],
    /// 2-bit weights.
    pub qs: [u8; 64],
    /// Scale of the scales.
    pub d: f16,
    /// Scale of the minimums.
    pub dmin: f16,
}
const _: () = assert!(size_of::<Q2_K>() == 84);

impl Q2_K {
    /// The weights' integers, 0..=3.
    #[inline(always)]
    pub fn quants(&self) -> [i8; 256] {
        let mut q = [0; 256];
        for (bytes, q) in self.qs.chunks_exact(32).zip(q.chunks_exact_mut(128)) {
            unpack::<2>(bytes, 0, q);
        }
        q
    }

    /// Sub-block `s`'s scale and minimum, 0..=15.
    #[inline(always)]
    pub fn scale_min(&self, s: usize) -> (u8, u8) {
        (self.scales[s] & 15, self.scales[s] >> 4)
    }
}

impl Block for Q2_K {
    const WEIGHTS: usize = 256;

    fn decode(&self, out: &mut [f32]) {
        let (d, dmin) = (self.d.to_f32_const(), self.dmin.to_f32_const());
        let q = self.quants();
        for (s, (out, q)) in out.chunks_exact_mut(16).zip(q.chunks_exact(16)).enumerate() {
            let (sc, m) = self.scale_min(s);
            let (d, m) = (d * sc as f32, dmin * m as f32);
            for (out, q) in out.iter_mut().zip(q) {
                *out = d * *q as f32 - m;
            }
        }
    }

    #[inline(always)]
    fn dot(row: &[Self], x: Act<'_>) -> f32 {
        int_dot(row, x.int())
    }
}

impl IntBlock for Q2_K {
    const HAS_MIN: bool = true;

    /// `|isum| ≤ 256 · 15 · 3 · 127 < 2²¹`, `|msum| ≤ 256 · 15 · 127 < 2¹⁹`.
    #[inline(always)]
    fn terms(&self, x: &[i8], sums: &[i16]) -> Terms {
        let (mut isum, mut msum) = (0, 0);
        let q = self.quants();
        for (s, (q, x)) in q.chunks_exact(16).zip(x.chunks_exact(16)).enumerate() {
            let (sc, m) = self.scale_min(s);
            isum += sc as i32 * idot(q, x);
            msum += m as i32 * sums[s] as i32;
        }
        Terms {
            scale: self.d.to_f32_const(),
            isum,
            min: -self.dmin.to_f32_const(),
            msum,
        }
    }
}

/// What the search tries without importance.
const PLAIN: Tries = Tries {
    from: -0.5,
    by: 0.1,
    more: 15,
    absolute: true,
};

impl Encode for Q2_K {
    #[inline(always)]
    fn encode_row(x: &[f32], importance: Option<&[f32]>, out: &mut [Self]) {
        for ((x, importance), out) in parts(x, importance, Self::WEIGHTS).zip(out) {
            *out = encode(x, importance);
        }
    }
}

#[inline(always)]
fn encode(x: &[f32], importance: Option<&[f32]>) -> Q2_K {
    let xs = groups::<16, 16>(x);
    // Each sub-block's scale and minimum, then these numbers' own scales and 4-bit codes.
    let (d, dmin, sc, m, fit);
    match importance {
        None => {
            let w = xs.map(|x| x.map(f32::abs));
            fit = search::affine(&xs, &w, 3, PLAIN);
            (d, sc) = scale_codes(&fit.scale);
            (dmin, m) = scale_codes(&fit.min.map(|m| -m));
        }
        Some(columns) => {
            let w = search::weigh(&xs, &groups(columns), search::sum_of_squares(x) / 256.0);
            fit = search::affine(&xs, &w, 3, WEIGHTED);
            let w = search::sums(&w);
            (d, sc) = search::positive(&fit.scale, &w, 15);
            (dmin, m) = search::positive(&fit.min.map(|m| -m), &w, 15);
        }
    }
    let mut block = Q2_K {
        scales: std::array::from_fn(|s| sc[s] | m[s] << 4),
        qs: [0; 64],
        d: f16::from_f32_const(d),
        dmin: f16::from_f32_const(dmin),
    };

    // The scales were rounded: round the weights again, to what will be decoded.
    let mut q = [0; 256];
    search::ungroup(&fit.q, &mut q);
    let (d, dmin) = (block.d.to_f32_const(), block.dmin.to_f32_const());
    for (s, (q, x)) in q.chunks_exact_mut(16).zip(x.chunks_exact(16)).enumerate() {
        let (sc, m) = block.scale_min(s);
        search::round_affine(x, d * sc as f32, dmin * m as f32, 3, q);
    }
    for (q, bytes) in q.chunks_exact(128).zip(block.qs.chunks_exact_mut(32)) {
        pack::<2>(q, 0, bytes);
    }
    block
}

/// The scale that maps the largest value to 15, and the codes.
#[inline(always)]
fn scale_codes(x: &[f32; 16]) -> (f32, [u8; 16]) {
    let max = x.iter().fold(0.0, |m, &x| if x > m { x } else { m });
    if max > 0.0 {
        let inv = 15.0 / max;
        (max / 15.0, x.map(|x| nearest(inv * x) as u8))
    } else {
        (0.0, [0; 16])
    }
}
