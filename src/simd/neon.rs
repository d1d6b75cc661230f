//! aarch64 with NEON: 4 rows at a time.

// Every `unsafe fn` of this file has one contract: the caller has this tier's features enabled and
// passes pointers that lead to as much as the trait says.
#![allow(unsafe_op_in_unsafe_fn)]

use super::float::float_doors;
use super::tile::{Dot, Kind, Tile, tile_doors};
use crate::quant::float::Lanes;
use half::{bf16, f16};
use std::arch::aarch64::*;
use std::arch::asm;
use std::marker::PhantomData;

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
        // SAFETY: see above; f16 is a transparent u16.
        Quads::make(|i| unsafe { widen_4(vld1_u16(x.as_ptr().cast::<u16>().add(4 * i))) })
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
    #[inline(always)]
    fn max(self, other: Self) -> Self {
        // SAFETY: see above.
        Quads::make(|i| unsafe {
            vbslq_f32(vcgtq_f32(other.0[i], self.0[i]), other.0[i], self.0[i])
        })
    }
}

/// Four f16, exactly. (The intrinsic, `vcvt_f32_f16`, wants a type that is not stable.)
#[inline(always)]
unsafe fn widen_4(h: uint16x4_t) -> float32x4_t {
    let x: float32x4_t;
    asm!(
        "fcvtl {x:v}.4s, {h:v}.4h",
        x = lateout(vreg) x,
        h = in(vreg) h,
        options(pure, nomem, nostack, preserves_flags)
    );
    x
}

float_doors!(Quads, #[target_feature(enable = "neon")]);

/// [`Tile`] in registers of 128 bits.
#[derive(Clone, Copy)]
pub(super) struct Quad<D>(PhantomData<D>);

impl<D: Dot<int32x4_t>> Tile for Quad<D> {
    const ROWS: usize = 4;
    const TOKENS: usize = D::TOKENS;
    const PANELS: usize = D::PANELS;
    const NARROW: bool = D::NARROW;
    const HALVES: bool = D::HALVES;
    type I = int32x4_t;
    type F = float32x4_t;

    #[inline(always)]
    fn bias(offset: i32) -> i32 {
        D::bias(offset)
    }
    #[inline(always)]
    unsafe fn splat(x: i32) -> int32x4_t {
        vdupq_n_s32(x)
    }
    #[inline(always)]
    unsafe fn load(x: *const i32) -> int32x4_t {
        vld1q_s32(x)
    }
    #[inline(always)]
    unsafe fn store(to: *mut i32, x: int32x4_t) {
        vst1q_s32(to, x)
    }
    #[inline(always)]
    unsafe fn and(a: int32x4_t, b: int32x4_t) -> int32x4_t {
        vandq_s32(a, b)
    }
    #[inline(always)]
    unsafe fn or(a: int32x4_t, b: int32x4_t) -> int32x4_t {
        vorrq_s32(a, b)
    }
    #[inline(always)]
    unsafe fn shl(x: int32x4_t, by: i32) -> int32x4_t {
        vshlq_s32(x, vdupq_n_s32(by))
    }
    #[inline(always)]
    unsafe fn shr(x: int32x4_t, by: i32) -> int32x4_t {
        vreinterpretq_s32_u32(vshlq_u32(vreinterpretq_u32_s32(x), vdupq_n_s32(-by)))
    }
    #[inline(always)]
    unsafe fn add(a: int32x4_t, b: int32x4_t) -> int32x4_t {
        vaddq_s32(a, b)
    }
    #[inline(always)]
    unsafe fn mul(a: int32x4_t, b: int32x4_t) -> int32x4_t {
        vmulq_s32(a, b)
    }
    #[inline(always)]
    unsafe fn add_bytes(a: int32x4_t, b: int32x4_t) -> int32x4_t {
        vreinterpretq_s32_s8(vaddq_s8(vreinterpretq_s8_s32(a), vreinterpretq_s8_s32(b)))
    }
    #[inline(always)]
    unsafe fn lookup(table: &[i8; 16], codes: int32x4_t) -> int32x4_t {
        let codes = vreinterpretq_u8_s32(codes);
        vreinterpretq_s32_s8(vqtbl1q_s8(vld1q_s8(table.as_ptr()), codes))
    }
    #[inline(always)]
    unsafe fn column(at: *const u8, stride: usize) -> int32x4_t {
        let rows = [0, 1, 2, 3].map(|r| at.add(stride * r).cast::<i32>().read_unaligned());
        vld1q_s32(rows.as_ptr())
    }
    #[inline(always)]
    unsafe fn columns(at: *const u8, stride: usize) -> [int32x4_t; 4] {
        // A 4 × 4 transposition of dwords.
        let row = |r: usize| vreinterpretq_s32_u8(vld1q_u8(at.add(stride * r)));
        let (a, b, c, d) = (row(0), row(1), row(2), row(3));
        let wide = vreinterpretq_s64_s32;
        let (ab, cd) = (wide(vzip1q_s32(a, b)), wide(vzip1q_s32(c, d)));
        let (ef, gh) = (wide(vzip2q_s32(a, b)), wide(vzip2q_s32(c, d)));
        let narrow = vreinterpretq_s32_s64;
        [
            narrow(vzip1q_s64(ab, cd)),
            narrow(vzip2q_s64(ab, cd)),
            narrow(vzip1q_s64(ef, gh)),
            narrow(vzip2q_s64(ef, gh)),
        ]
    }
    #[inline(always)]
    unsafe fn dot<K: Kind, const N: usize, const R: usize, const C: usize>(
        sums: &mut [[int32x4_t; N]; R],
        w: [[int32x4_t; C]; R],
        x: [*const i8; N],
    ) {
        D::dot::<K, N, R, C>(sums, w, x)
    }
    #[inline(always)]
    unsafe fn pair(acc: int32x4_t, a: int32x4_t, b: int32x4_t) -> int32x4_t {
        D::pair(acc, a, b)
    }
    #[inline(always)]
    unsafe fn halves(x: int32x4_t) -> float32x4_t {
        widen_4(vmovn_u32(vreinterpretq_u32_s32(x)))
    }
    #[inline(always)]
    unsafe fn load_floats(x: *const f32) -> float32x4_t {
        vld1q_f32(x)
    }
    #[inline(always)]
    unsafe fn store_floats(to: *mut f32, x: float32x4_t) {
        vst1q_f32(to, x)
    }
    #[inline(always)]
    unsafe fn step(acc: float32x4_t, d: float32x4_t, dx: f32, sum: int32x4_t) -> float32x4_t {
        vfmaq_f32(acc, vmulq_n_f32(d, dx), vcvtq_f32_s32(sum))
    }
}

/// Products are i8 × i8, some of them added in i16, as many as fit, and then widened to i32.
#[derive(Clone, Copy)]
struct Widening;

impl Dot<int32x4_t> for Widening {
    const TOKENS: usize = 4;

    #[inline(always)]
    unsafe fn dot<K: Kind, const N: usize, const R: usize, const C: usize>(
        sums: &mut [[int32x4_t; N]; R],
        w: [[int32x4_t; C]; R],
        x: [*const i8; N],
    ) {
        // Products that fit i16 together: 32 · 127 eight times, 128 · 127 twice.
        let together = if K::BITS == 8 { 1 } else { 4 };
        for (sums, w) in sums.iter_mut().zip(w) {
            for first in (0..C).step_by(together) {
                for t in 0..N {
                    let (mut low, mut high) = (vdupq_n_s16(0), vdupq_n_s16(0));
                    for j in first..C.min(first + together) {
                        let w = vreinterpretq_s8_s32(w[j]);
                        let x = vdupq_n_s32(x[t].cast::<i32>().add(j).read_unaligned());
                        let x = vreinterpretq_s8_s32(x);
                        low = vmlal_s8(low, vget_low_s8(w), vget_low_s8(x));
                        high = vmlal_high_s8(high, w, x);
                    }
                    sums[t] = vpadalq_s16(sums[t], vpaddq_s16(low, high));
                }
            }
        }
    }
    #[inline(always)]
    unsafe fn pair(acc: int32x4_t, a: int32x4_t, b: int32x4_t) -> int32x4_t {
        pair(acc, a, b)
    }
}

/// [`Tile::pair`]
#[inline(always)]
pub(super) unsafe fn pair(acc: int32x4_t, a: int32x4_t, b: int32x4_t) -> int32x4_t {
    let acc = vmlal_s16(acc, vmovn_s32(a), vmovn_s32(b));
    vmlal_s16(acc, vshrn_n_s32::<16>(a), vshrn_n_s32::<16>(b))
}

tile_doors!(Quad<Widening>, #[target_feature(enable = "neon")]);

/// Overlays what this tier does better.
pub(super) fn install(k: &mut Kernels) {
    install_common(k);
    install_tiles(k);
}
