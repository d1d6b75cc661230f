//! aarch64 with NEON: 4 rows at a time, by the same plan as [`super::avx512`].
//!
//! Products are i8 × i8 widened to i16, two of them added at a time (128 · 127 · 2 fits), then
//! widened to i32.

// Every `unsafe fn` of this file has one contract: the caller has this tier's features enabled and
// passes pointers to whole blocks (and 64 bytes of activations where a block has them).
#![allow(unsafe_op_in_unsafe_fn)]

use super::float::float_doors;
use super::tile::{Tile, tile_doors};
use super::{RowGroup, matmul_groups};
use crate::quant::Format;
use crate::quant::act::IntAct;
use crate::quant::float::{Element, Lanes};
use crate::quant::{iq4_nl, iq4_xs, q2_k, q3_k, q4_0, q4_1, q4_k, q5_0, q5_1, q5_k, q6_k, q8_0};
use half::{bf16, f16};
use std::arch::aarch64::*;

/// NEON is part of aarch64's baseline.
pub(super) fn detect() -> bool {
    true
}

/// [`Lanes`] in four registers.
#[derive(Clone, Copy)]
struct Quads([float32x4_t; 4]);

impl Quads {
    #[inline(always)]
    fn make(f: impl Fn(usize) -> float32x4_t) -> Quads {
        Quads([f(0), f(1), f(2), f(3)])
    }
}

// SAFETY of the blocks below: NEON is there on every aarch64; loads and stores stay inside their arrays of 16.
impl Lanes for Quads {
    #[inline(always)]
    fn splat(x: f32) -> Self {
        // SAFETY: see above.
        Quads::make(|_| unsafe { vdupq_n_f32(x) })
    }
    #[inline(always)]
    fn load(x: &[f32; 16]) -> Self {
        // SAFETY: see above.
        Quads::make(|i| unsafe { vld1q_f32(x.as_ptr().add(4 * i)) })
    }
    #[inline(always)]
    fn load_f16(x: &[f16; 16]) -> Self {
        Quads::load(&x.map(Element::widen))
    }
    #[inline(always)]
    fn load_bf16(x: &[bf16; 16]) -> Self {
        // SAFETY: see above; bf16 is a transparent u16.
        Quads::make(|i| unsafe {
            vreinterpretq_f32_u32(vshll_n_u16::<16>(vld1_u16(
                x.as_ptr().cast::<u16>().add(4 * i),
            )))
        })
    }
    #[inline(always)]
    fn store(self, x: &mut [f32; 16]) {
        for i in 0..4 {
            // SAFETY: see above.
            unsafe { vst1q_f32(x.as_mut_ptr().add(4 * i), self.0[i]) }
        }
    }
    #[inline(always)]
    fn mul_add(self, b: Self, c: Self) -> Self {
        // SAFETY: see above.
        Quads::make(|i| unsafe { vfmaq_f32(c.0[i], self.0[i], b.0[i]) })
    }
}

float_doors!(Quads, #[target_feature(enable = "neon")]);

/// [`Tile`] with widening multiplications.
#[derive(Clone, Copy)]
struct Widening;

impl Tile for Widening {
    const ROWS: usize = 4;
    const TOKENS: usize = 4;
    type W = int8x16_t;
    type I = int32x4_t;
    type F = float32x4_t;

    #[inline(always)]
    fn bias(_offset: i32) -> i32 {
        0
    }
    #[inline(always)]
    unsafe fn weights(q: *const u8) -> int8x16_t {
        vld1q_s8(q.cast())
    }
    #[inline(always)]
    unsafe fn splat(x: i32) -> int32x4_t {
        vdupq_n_s32(x)
    }
    #[inline(always)]
    unsafe fn dot4<const BYTE: bool>(acc: int32x4_t, w: int8x16_t, x: *const i8) -> int32x4_t {
        let x = vreinterpretq_s8_s32(vdupq_n_s32(x.cast::<i32>().read_unaligned()));
        let (low, high) = (
            vmull_s8(vget_low_s8(w), vget_low_s8(x)),
            vmull_high_s8(w, x),
        );
        // Two products of 128 · 127 fit i16.
        vpadalq_s16(acc, vpaddq_s16(low, high))
    }
    #[inline(always)]
    unsafe fn mul_add(acc: int32x4_t, a: int32x4_t, b: *const i32) -> int32x4_t {
        vmlaq_s32(acc, a, vld1q_s32(b))
    }
    #[inline(always)]
    unsafe fn pair(acc: int32x4_t, m: *const i16, x: *const i16) -> int32x4_t {
        let m = vld2_s16(m);
        vmlal_n_s16(vmlal_n_s16(acc, m.0, *x), m.1, *x.add(1))
    }
    #[inline(always)]
    unsafe fn mul_sub(a: int32x4_t, b: int32x4_t, c: i32) -> int32x4_t {
        vmlsq_n_s32(a, b, c)
    }
    #[inline(always)]
    unsafe fn load(y: *const f32) -> float32x4_t {
        vld1q_f32(y)
    }
    #[inline(always)]
    unsafe fn store(y: *mut f32, acc: float32x4_t) {
        vst1q_f32(y, acc)
    }
    #[inline(always)]
    unsafe fn step(acc: float32x4_t, d: *const f32, dx: f32, sum: int32x4_t) -> float32x4_t {
        vfmaq_f32(acc, vmulq_n_f32(vld1q_f32(d), dx), vcvtq_f32_s32(sum))
    }
    #[inline(always)]
    unsafe fn interleave(rows: *const i8, out: *mut u8) {
        // A 4 × 4 transposition of dwords.
        let row = |r: usize| vreinterpretq_s32_s8(vld1q_s8(rows.add(256 * r)));
        let (a, b, c, d) = (row(0), row(1), row(2), row(3));
        let wide = vreinterpretq_s64_s32;
        let (ab, cd) = (wide(vzip1q_s32(a, b)), wide(vzip1q_s32(c, d)));
        let (ef, gh) = (wide(vzip2q_s32(a, b)), wide(vzip2q_s32(c, d)));
        let all = [
            vzip1q_s64(ab, cd),
            vzip2q_s64(ab, cd),
            vzip1q_s64(ef, gh),
            vzip2q_s64(ef, gh),
        ];
        for (i, z) in all.into_iter().enumerate() {
            vst1q_s8(out.cast::<i8>().add(16 * i), vreinterpretq_s8_s64(z));
        }
    }
}

tile_doors! {
    Widening, #[target_feature(enable = "neon")];
    matmul_q4_0 = Q4_0, q4_0::Q4_0, matmul_groups::<Nibbles>, below 16;
    matmul_q4_1 = Q4_1, q4_1::Q4_1;
    matmul_q5_0 = Q5_0, q5_0::Q5_0;
    matmul_q5_1 = Q5_1, q5_1::Q5_1;
    matmul_q8_0 = Q8_0, q8_0::Q8_0, matmul_groups::<Bytes>, below 16;
    matmul_q2_k = Q2_K, q2_k::Q2_K;
    matmul_q3_k = Q3_K, q3_k::Q3_K;
    matmul_q4_k = Q4_K, q4_k::Q4_K, matmul_groups::<K4>, below 16;
    matmul_q5_k = Q5_K, q5_k::Q5_K;
    matmul_q6_k = Q6_K, q6_k::Q6_K, matmul_groups::<K6>, below 16;
    matmul_iq4_nl = IQ4_NL, iq4_nl::Iq4Nl;
    matmul_iq4_xs = IQ4_XS, iq4_xs::Iq4Xs;
}

/// Overlays what this tier does better.
pub(super) fn install(k: &mut Kernels) {
    install_common(k);
    install_tiles(k);
}

/// Rows in a group: one lane each.
const GROUP: usize = 4;

/// A format's block.
trait Blocks {
    /// Weights in a block.
    const WEIGHTS: usize;
    /// Bytes of a block.
    const BYTES: usize;
    /// Where the f16 scale lies.
    const D: usize;
    /// Whether there are minimums; their f16 scale lies behind `d`, to be subtracted.
    const MIN: bool;
    /// 4 lanes whose sum is `isum`.
    unsafe fn products(block: *const u8, x: *const i8) -> int32x4_t;
    /// 4 lanes whose sum is `msum`; `sums`: the block's sums of 16 activations.
    unsafe fn minimums(block: *const u8, sums: *const i16) -> int32x4_t;
}

/// `Σ q·x` of 16 weights in 4 lanes.
#[inline(always)]
unsafe fn dot16(q: int8x16_t, x: int8x16_t) -> int32x4_t {
    vpaddlq_s16(vmlal_high_s8(
        vmull_s8(vget_low_s8(q), vget_low_s8(x)),
        q,
        x,
    ))
}

/// The low nibbles of 16 bytes.
#[inline(always)]
unsafe fn low(q: uint8x16_t) -> int8x16_t {
    vreinterpretq_s8_u8(vandq_u8(q, vdupq_n_u8(15)))
}

/// The high nibbles of 16 bytes.
#[inline(always)]
unsafe fn high(q: uint8x16_t) -> int8x16_t {
    vreinterpretq_s8_u8(vshrq_n_u8(q, 4))
}

/// Q4_0.
struct Nibbles;

impl Blocks for Nibbles {
    const WEIGHTS: usize = 32;
    const BYTES: usize = 18;
    const D: usize = 0;
    const MIN: bool = false;

    #[inline(always)]
    unsafe fn products(block: *const u8, x: *const i8) -> int32x4_t {
        let q = vld1q_u8(block.add(2));
        let eight = vdupq_n_s8(8);
        let first = dot16(vsubq_s8(low(q), eight), vld1q_s8(x));
        vaddq_s32(first, dot16(vsubq_s8(high(q), eight), vld1q_s8(x.add(16))))
    }

    #[inline(always)]
    unsafe fn minimums(_block: *const u8, _sums: *const i16) -> int32x4_t {
        vdupq_n_s32(0)
    }
}

/// Q8_0.
struct Bytes;

impl Blocks for Bytes {
    const WEIGHTS: usize = 32;
    const BYTES: usize = 34;
    const D: usize = 0;
    const MIN: bool = false;

    #[inline(always)]
    unsafe fn products(block: *const u8, x: *const i8) -> int32x4_t {
        let q = block.add(2).cast::<i8>();
        let first = dot16(vld1q_s8(q), vld1q_s8(x));
        vaddq_s32(first, dot16(vld1q_s8(q.add(16)), vld1q_s8(x.add(16))))
    }

    #[inline(always)]
    unsafe fn minimums(_block: *const u8, _sums: *const i16) -> int32x4_t {
        vdupq_n_s32(0)
    }
}

/// Q4_K.
struct K4;

impl Blocks for K4 {
    const WEIGHTS: usize = 256;
    const BYTES: usize = 144;
    const D: usize = 0;
    const MIN: bool = true;

    #[inline(always)]
    unsafe fn products(block: *const u8, x: *const i8) -> int32x4_t {
        let scales = &*block.add(4).cast::<[u8; 12]>();
        let mut acc = vdupq_n_s32(0);
        for i in 0..4 {
            let at = block.add(16 + 32 * i);
            let q = [vld1q_u8(at), vld1q_u8(at.add(16))];
            let x = x.add(64 * i);
            let first = vaddq_s32(
                dot16(low(q[0]), vld1q_s8(x)),
                dot16(low(q[1]), vld1q_s8(x.add(16))),
            );
            let x = x.add(32);
            let second = vaddq_s32(
                dot16(high(q[0]), vld1q_s8(x)),
                dot16(high(q[1]), vld1q_s8(x.add(16))),
            );
            acc = vmlaq_n_s32(acc, first, q4_k::scale_min(scales, 2 * i).0 as i32);
            acc = vmlaq_n_s32(acc, second, q4_k::scale_min(scales, 2 * i + 1).0 as i32);
        }
        acc
    }

    #[inline(always)]
    unsafe fn minimums(block: *const u8, sums: *const i16) -> int32x4_t {
        let scales = &*block.add(4).cast::<[u8; 12]>();
        let mut m = [0i16; 8];
        for (s, m) in m.iter_mut().enumerate() {
            *m = q4_k::scale_min(scales, s).1 as i16;
        }
        let sums32 = vpaddq_s16(vld1q_s16(sums), vld1q_s16(sums.add(8)));
        let m = vld1q_s16(m.as_ptr());
        vmlal_high_s16(vmull_s16(vget_low_s16(m), vget_low_s16(sums32)), m, sums32)
    }
}

/// Q6_K.
struct K6;

impl Blocks for K6 {
    const WEIGHTS: usize = 256;
    const BYTES: usize = 210;
    const D: usize = 208;
    const MIN: bool = false;

    #[inline(always)]
    unsafe fn products(block: *const u8, x: *const i8) -> int32x4_t {
        let scales = block.add(192).cast::<i8>();
        let mut acc = vdupq_n_s32(0);
        let (two, offset) = (vdupq_n_u8(3), vdupq_n_s8(32));
        for half in 0..2 {
            for part in 0..2 {
                // 16 bytes of upper bits serve the weights 16·part + 32·i of this half.
                let qh = vld1q_u8(block.add(128 + 32 * half + 16 * part));
                let ql = [0, 1].map(|i| vld1q_u8(block.add(64 * half + 32 * i + 16 * part)));
                let lower = [low(ql[0]), low(ql[1]), high(ql[0]), high(ql[1])];
                let upper = [qh, vshrq_n_u8(qh, 2), vshrq_n_u8(qh, 4), vshrq_n_u8(qh, 6)];
                for i in 0..4 {
                    let bits = vreinterpretq_s8_u8(vshlq_n_u8(vandq_u8(upper[i], two), 4));
                    let q = vsubq_s8(vorrq_s8(lower[i], bits), offset);
                    let p = dot16(q, vld1q_s8(x.add(128 * half + 32 * i + 16 * part)));
                    acc = vmlaq_n_s32(acc, p, *scales.add(8 * half + 2 * i + part) as i32);
                }
            }
        }
        acc
    }

    #[inline(always)]
    unsafe fn minimums(_block: *const u8, _sums: *const i16) -> int32x4_t {
        vdupq_n_s32(0)
    }
}

impl<F: Blocks> RowGroup for F {
    const ROWS: usize = GROUP;

    #[inline(always)]
    unsafe fn dots(rows: *const u8, stride: usize, x: IntAct<'_>, y: *mut f32) {
        vst1q_f32(y, group::<F>(rows, stride, x));
    }
}

/// 4 dot products: rows at `base + r·stride`.
#[inline(always)]
unsafe fn group<F: Blocks>(base: *const u8, stride: usize, x: IntAct<'_>) -> float32x4_t {
    // SAFETY: block `b` of each of the 4 rows, as long as the format says; `qs` and `sums` likewise.
    let mut acc = vdupq_n_f32(0.0);
    for (b, d) in x.d.iter().enumerate() {
        let (qs, sums) = x.block(b, F::WEIGHTS);
        let first = base.add(b * F::BYTES);
        let mut p = [vdupq_n_s32(0); GROUP];
        for r in 0..GROUP {
            p[r] = F::products(first.add(r * stride), qs.as_ptr());
        }
        let scale = vmulq_n_f32(halves(first.add(F::D), stride), *d);
        acc = vfmaq_f32(acc, scale, vcvtq_f32_s32(sum_all(p)));
        if F::MIN {
            let mut m = [vdupq_n_s32(0); GROUP];
            for r in 0..GROUP {
                m[r] = F::minimums(first.add(r * stride), sums.as_ptr());
            }
            // min is subtracted: the sign before the product changes no rounding.
            let min = vmulq_n_f32(halves(first.add(F::D + 2), stride), *d);
            acc = vfmsq_f32(acc, min, vcvtq_f32_s32(sum_all(m)));
        }
    }
    acc
}

/// Lane `r` is the sum of the 4 lanes of `p[r]`.
#[inline(always)]
unsafe fn sum_all(p: [int32x4_t; GROUP]) -> int32x4_t {
    vpaddq_s32(vpaddq_s32(p[0], p[1]), vpaddq_s32(p[2], p[3]))
}

/// The f16 at `at + r·stride` of 4 rows, as floats.
#[inline(always)]
unsafe fn halves(at: *const u8, stride: usize) -> float32x4_t {
    let f = [0, 1, 2, 3].map(|r| at.add(r * stride).cast::<f16>().read_unaligned().widen());
    vld1q_f32(f.as_ptr())
}
