//! AVX-512 without VNNI: 16 rows at a time.

// Every `unsafe fn` of this file has one contract: the caller has this tier's features enabled and
// passes pointers that lead to as much as the trait says.
#![allow(unsafe_op_in_unsafe_fn)]

use super::float::float_doors;
use super::tile::{Dot, Kind, Tile, tile_doors};
use super::x86::{Maddubs, Pairs, Register};
use crate::quant::float::Lanes;
use half::{bf16, f16};
use std::arch::x86_64::*;
use std::marker::PhantomData;

/// Whether the CPU has everything this file is compiled with.
pub(super) fn detect() -> bool {
    super::avx2::detect()
        && is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512dq")
}

/// [`Lanes`] in one register.
#[derive(Clone, Copy)]
struct One(__m512);

// SAFETY of the blocks below: only this tier's functions use this type, and they are installed after
// `detect`; loads and stores stay inside their arrays of 16; f16 and bf16 are transparent u16.
impl Lanes for One {
    const WIDE: bool = true;

    #[inline(always)]
    fn splat(x: f32) -> Self {
        // SAFETY: see above.
        unsafe { One(_mm512_set1_ps(x)) }
    }
    #[inline(always)]
    fn load(x: &[f32; 16]) -> Self {
        // SAFETY: see above.
        unsafe { One(_mm512_loadu_ps(x.as_ptr())) }
    }
    #[inline(always)]
    fn load_f16(x: &[f16; 16]) -> Self {
        // SAFETY: see above.
        unsafe { One(_mm512_cvtph_ps(_mm256_loadu_si256(x.as_ptr().cast()))) }
    }
    #[inline(always)]
    fn load_bf16(x: &[bf16; 16]) -> Self {
        // SAFETY: see above.
        unsafe {
            let h = _mm512_cvtepu16_epi32(_mm256_loadu_si256(x.as_ptr().cast()));
            One(_mm512_castsi512_ps(_mm512_slli_epi32(h, 16)))
        }
    }
    #[inline(always)]
    fn store(self, x: &mut [f32; 16]) {
        // SAFETY: see above.
        unsafe { _mm512_storeu_ps(x.as_mut_ptr(), self.0) }
    }
    #[inline(always)]
    fn mul_add(self, b: Self, c: Self) -> Self {
        // SAFETY: see above.
        unsafe { One(_mm512_fmadd_ps(self.0, b.0, c.0)) }
    }
    #[inline(always)]
    fn max(self, other: Self) -> Self {
        // SAFETY: see above. The second operand is what remains unless the first one is larger.
        unsafe { One(_mm512_max_ps(other.0, self.0)) }
    }
    #[inline(always)]
    fn fold_max(self) -> f32 {
        // SAFETY: see above.
        unsafe {
            let upper = _mm512_extractf32x8_ps(self.0, 1);
            super::avx2::fold_max_8(_mm256_max_ps(upper, _mm512_castps512_ps256(self.0)))
        }
    }
    #[inline(always)]
    fn fetch(at: *const u8) {
        // SAFETY: see above; any address will do.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(at.cast()) }
    }
    #[inline(always)]
    fn fold(self) -> f32 {
        // SAFETY: see above.
        unsafe {
            let upper = _mm512_extractf32x8_ps(self.0, 1);
            super::avx2::fold_8(_mm256_add_ps(_mm512_castps512_ps256(self.0), upper))
        }
    }
}

float_doors!(One, #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq")]);

/// [`Tile`] in registers of 512 bits.
#[derive(Clone, Copy)]
pub(super) struct Zmm<D>(PhantomData<D>);

impl<D: Dot<__m512i>> Tile for Zmm<D> {
    const ROWS: usize = 16;
    const TOKENS: usize = D::TOKENS;
    const PANELS: usize = D::PANELS;
    const NARROW: bool = D::NARROW;
    const HALVES: bool = D::HALVES;
    type I = __m512i;
    type F = __m512;

    #[inline(always)]
    fn bias(offset: i32) -> i32 {
        D::bias(offset)
    }
    #[inline(always)]
    unsafe fn splat(x: i32) -> __m512i {
        _mm512_set1_epi32(x)
    }
    #[inline(always)]
    unsafe fn load(x: *const i32) -> __m512i {
        _mm512_loadu_si512(x.cast())
    }
    #[inline(always)]
    unsafe fn store(to: *mut i32, x: __m512i) {
        _mm512_storeu_si512(to.cast(), x)
    }
    #[inline(always)]
    unsafe fn and(a: __m512i, b: __m512i) -> __m512i {
        _mm512_and_si512(a, b)
    }
    #[inline(always)]
    unsafe fn or(a: __m512i, b: __m512i) -> __m512i {
        _mm512_or_si512(a, b)
    }
    #[inline(always)]
    unsafe fn shl(x: __m512i, by: i32) -> __m512i {
        _mm512_sllv_epi32(x, _mm512_set1_epi32(by))
    }
    #[inline(always)]
    unsafe fn shr(x: __m512i, by: i32) -> __m512i {
        _mm512_srlv_epi32(x, _mm512_set1_epi32(by))
    }
    #[inline(always)]
    unsafe fn add(a: __m512i, b: __m512i) -> __m512i {
        _mm512_add_epi32(a, b)
    }
    #[inline(always)]
    unsafe fn mul(a: __m512i, b: __m512i) -> __m512i {
        _mm512_mullo_epi32(a, b)
    }
    #[inline(always)]
    unsafe fn add_bytes(a: __m512i, b: __m512i) -> __m512i {
        _mm512_add_epi8(a, b)
    }
    #[inline(always)]
    unsafe fn lookup(table: &[i8; 16], codes: __m512i) -> __m512i {
        let table = _mm512_broadcast_i32x4(_mm_loadu_si128(table.as_ptr().cast()));
        _mm512_shuffle_epi8(table, codes)
    }
    #[inline(always)]
    unsafe fn column(at: *const u8, stride: usize) -> __m512i {
        let rows = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        let offsets = _mm512_mullo_epi32(rows, _mm512_set1_epi32(stride as i32));
        _mm512_i32gather_epi32::<1>(offsets, at.cast())
    }
    #[inline(always)]
    unsafe fn columns(at: *const u8, stride: usize) -> [__m512i; 4] {
        // Quarter `q` of `z(i)` is row `4q + i`; a 4 × 4 transposition of dwords within quarters
        // brings four rows' dwords together. Loads that broadcast under a mask leave the shuffle port free.
        let row = |r: usize| _mm_loadu_si128(at.add(stride * r).cast());
        let z = |i: usize| {
            let z = _mm512_castsi128_si512(row(i));
            let z = _mm512_mask_broadcast_i32x4(z, 0x00f0, row(i + 4));
            let z = _mm512_mask_broadcast_i32x4(z, 0x0f00, row(i + 8));
            _mm512_mask_broadcast_i32x4(z, 0xf000, row(i + 12))
        };
        let (a, b, c, d) = (z(0), z(1), z(2), z(3));
        let (ab, cd) = (_mm512_unpacklo_epi32(a, b), _mm512_unpacklo_epi32(c, d));
        let (ef, gh) = (_mm512_unpackhi_epi32(a, b), _mm512_unpackhi_epi32(c, d));
        [
            _mm512_unpacklo_epi64(ab, cd),
            _mm512_unpackhi_epi64(ab, cd),
            _mm512_unpacklo_epi64(ef, gh),
            _mm512_unpackhi_epi64(ef, gh),
        ]
    }
    #[inline(always)]
    unsafe fn prefetch(at: *const u8) {
        _mm_prefetch::<_MM_HINT_T1>(at.cast())
    }
    #[inline(always)]
    unsafe fn prefetch_near(at: *const u8) {
        _mm_prefetch::<_MM_HINT_T0>(at.cast())
    }
    #[inline(always)]
    unsafe fn dot<K: Kind, const N: usize, const R: usize, const C: usize>(
        sums: &mut [[__m512i; N]; R],
        w: [[__m512i; C]; R],
        x: [*const i8; N],
    ) {
        D::dot::<K, N, R, C>(sums, w, x)
    }
    #[inline(always)]
    unsafe fn pair(acc: __m512i, a: __m512i, b: __m512i) -> __m512i {
        D::pair(acc, a, b)
    }
    #[inline(always)]
    unsafe fn halves(x: __m512i) -> __m512 {
        _mm512_cvtph_ps(_mm512_cvtepi32_epi16(x))
    }
    #[inline(always)]
    unsafe fn load_floats(x: *const f32) -> __m512 {
        _mm512_loadu_ps(x)
    }
    #[inline(always)]
    unsafe fn store_floats(to: *mut f32, x: __m512) {
        _mm512_storeu_ps(to, x)
    }
    #[inline(always)]
    unsafe fn step(acc: __m512, d: __m512, dx: f32, sum: __m512i) -> __m512 {
        let d = _mm512_mul_ps(d, _mm512_set1_ps(dx));
        _mm512_fmadd_ps(d, _mm512_cvtepi32_ps(sum), acc)
    }
}

impl Register for __m512i {
    #[inline(always)]
    unsafe fn spread(x: *const u8) -> __m512i {
        _mm512_set1_epi32(x.cast::<i32>().read_unaligned())
    }
}

impl Pairs for __m512i {
    const TOKENS: usize = 8;

    #[inline(always)]
    unsafe fn maddubs(w: __m512i, x: __m512i) -> __m512i {
        _mm512_maddubs_epi16(w, x)
    }
    #[inline(always)]
    unsafe fn signed(w: __m512i, x: __m512i) -> __m512i {
        // |w| · (x with the sign of w); -128 becomes 128 as a u8.
        let x = _mm512_mask_sub_epi8(x, _mm512_movepi8_mask(w), _mm512_setzero_si512(), x);
        _mm512_maddubs_epi16(_mm512_abs_epi8(w), x)
    }
    #[inline(always)]
    unsafe fn add_i16(a: __m512i, b: __m512i) -> __m512i {
        _mm512_add_epi16(a, b)
    }
    #[inline(always)]
    unsafe fn madd(sum: __m512i, a: __m512i, b: __m512i) -> __m512i {
        _mm512_add_epi32(sum, _mm512_madd_epi16(a, b))
    }
}

tile_doors!(Zmm<Maddubs>, #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq")]);

/// Overlays what this tier does better.
pub(super) fn install(k: &mut Kernels) {
    install_common(k);
    install_tiles(k);
}
