//! AVX2 with FMA and F16C: 8 rows at a time.

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
    is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("fma")
        && is_x86_feature_detected!("f16c")
}

/// [`Lanes`] in two registers.
#[derive(Clone, Copy)]
struct Pair([__m256; 2]);

// SAFETY of the blocks below: only this tier's functions use this type, and they are installed after
// `detect`; loads and stores stay inside their arrays of 16; f16 and bf16 are transparent u16.
impl Lanes for Pair {
    #[inline(always)]
    fn splat(x: f32) -> Self {
        // SAFETY: see above.
        unsafe { Pair([_mm256_set1_ps(x); 2]) }
    }
    #[inline(always)]
    fn load(x: &[f32; 16]) -> Self {
        let at = x.as_ptr();
        // SAFETY: see above.
        unsafe { Pair([_mm256_loadu_ps(at), _mm256_loadu_ps(at.add(8))]) }
    }
    #[inline(always)]
    fn load_f16(x: &[f16; 16]) -> Self {
        let at = x.as_ptr().cast::<__m128i>();
        // SAFETY: see above.
        unsafe {
            Pair([
                _mm256_cvtph_ps(_mm_loadu_si128(at)),
                _mm256_cvtph_ps(_mm_loadu_si128(at.add(1))),
            ])
        }
    }
    #[inline(always)]
    fn load_bf16(x: &[bf16; 16]) -> Self {
        let at = x.as_ptr().cast::<__m128i>();
        // SAFETY: see above.
        unsafe {
            let widen = |h| _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
            Pair([
                widen(_mm_loadu_si128(at)),
                widen(_mm_loadu_si128(at.add(1))),
            ])
        }
    }
    #[inline(always)]
    fn store(self, x: &mut [f32; 16]) {
        let at = x.as_mut_ptr();
        // SAFETY: see above.
        unsafe {
            _mm256_storeu_ps(at, self.0[0]);
            _mm256_storeu_ps(at.add(8), self.0[1]);
        }
    }
    #[inline(always)]
    fn mul_add(self, b: Self, c: Self) -> Self {
        // SAFETY: see above.
        unsafe { Pair([0, 1].map(|i| _mm256_fmadd_ps(self.0[i], b.0[i], c.0[i]))) }
    }
    #[inline(always)]
    fn max(self, other: Self) -> Self {
        // SAFETY: see above. The second operand is what remains unless the first one is larger.
        unsafe { Pair([0, 1].map(|i| _mm256_max_ps(other.0[i], self.0[i]))) }
    }
    #[inline(always)]
    fn fold_max(self) -> f32 {
        // SAFETY: see above.
        unsafe { fold_max_8(_mm256_max_ps(self.0[1], self.0[0])) }
    }
    #[inline(always)]
    fn fetch(at: *const u8) {
        // SAFETY: see above; any address will do.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(at.cast()) }
    }
    #[inline(always)]
    fn fold(self) -> f32 {
        // SAFETY: see above.
        unsafe { fold_8(_mm256_add_ps(self.0[0], self.0[1])) }
    }
}

/// The last three steps of [`Lanes::fold`].
#[inline(always)]
pub(super) unsafe fn fold_8(s: __m256) -> f32 {
    // SAFETY: AVX, enabled by the caller.
    let s = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
    let s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)))
}

/// The last three steps of [`Lanes::fold_max`].
#[inline(always)]
pub(super) unsafe fn fold_max_8(s: __m256) -> f32 {
    // SAFETY: AVX, enabled by the caller.
    let s = _mm_max_ps(_mm256_extractf128_ps(s, 1), _mm256_castps256_ps128(s));
    let s = _mm_max_ps(_mm_movehl_ps(s, s), s);
    _mm_cvtss_f32(_mm_max_ss(_mm_movehdup_ps(s), s))
}

float_doors!(Pair, #[target_feature(enable = "avx2,fma,f16c")]);

/// [`Tile`] in registers of 256 bits.
#[derive(Clone, Copy)]
pub(super) struct Ymm<D>(PhantomData<D>);

impl<D: Dot<__m256i>> Tile for Ymm<D> {
    const ROWS: usize = 8;
    const TOKENS: usize = D::TOKENS;
    const PANELS: usize = D::PANELS;
    const NARROW: bool = D::NARROW;
    const HALVES: bool = D::HALVES;
    type I = __m256i;
    type F = __m256;

    #[inline(always)]
    fn bias(offset: i32) -> i32 {
        D::bias(offset)
    }
    #[inline(always)]
    unsafe fn splat(x: i32) -> __m256i {
        _mm256_set1_epi32(x)
    }
    #[inline(always)]
    unsafe fn load(x: *const i32) -> __m256i {
        _mm256_loadu_si256(x.cast())
    }
    #[inline(always)]
    unsafe fn store(to: *mut i32, x: __m256i) {
        _mm256_storeu_si256(to.cast(), x)
    }
    #[inline(always)]
    unsafe fn and(a: __m256i, b: __m256i) -> __m256i {
        _mm256_and_si256(a, b)
    }
    #[inline(always)]
    unsafe fn or(a: __m256i, b: __m256i) -> __m256i {
        _mm256_or_si256(a, b)
    }
    #[inline(always)]
    unsafe fn shl(x: __m256i, by: i32) -> __m256i {
        _mm256_sllv_epi32(x, _mm256_set1_epi32(by))
    }
    #[inline(always)]
    unsafe fn shr(x: __m256i, by: i32) -> __m256i {
        _mm256_srlv_epi32(x, _mm256_set1_epi32(by))
    }
    #[inline(always)]
    unsafe fn add(a: __m256i, b: __m256i) -> __m256i {
        _mm256_add_epi32(a, b)
    }
    #[inline(always)]
    unsafe fn mul(a: __m256i, b: __m256i) -> __m256i {
        _mm256_mullo_epi32(a, b)
    }
    #[inline(always)]
    unsafe fn add_bytes(a: __m256i, b: __m256i) -> __m256i {
        _mm256_add_epi8(a, b)
    }
    #[inline(always)]
    unsafe fn lookup(table: &[i8; 16], codes: __m256i) -> __m256i {
        let table = _mm256_broadcastsi128_si256(_mm_loadu_si128(table.as_ptr().cast()));
        _mm256_shuffle_epi8(table, codes)
    }
    #[inline(always)]
    unsafe fn column(at: *const u8, stride: usize) -> __m256i {
        // No gather: on many CPUs of this tier it is slower than eight loads.
        let row = |r: usize| at.add(stride * r).cast::<i32>().read_unaligned();
        _mm256_setr_epi32(
            row(0),
            row(1),
            row(2),
            row(3),
            row(4),
            row(5),
            row(6),
            row(7),
        )
    }
    #[inline(always)]
    unsafe fn columns(at: *const u8, stride: usize) -> [__m256i; 4] {
        // Half `h` of `z(i)` is row `4h + i`; a 4 × 4 transposition of dwords within halves brings four
        // rows' dwords together.
        let row = |r: usize| _mm_loadu_si128(at.add(stride * r).cast());
        let z = |i: usize| _mm256_set_m128i(row(i + 4), row(i));
        let (a, b, c, d) = (z(0), z(1), z(2), z(3));
        let (ab, cd) = (_mm256_unpacklo_epi32(a, b), _mm256_unpacklo_epi32(c, d));
        let (ef, gh) = (_mm256_unpackhi_epi32(a, b), _mm256_unpackhi_epi32(c, d));
        [
            _mm256_unpacklo_epi64(ab, cd),
            _mm256_unpackhi_epi64(ab, cd),
            _mm256_unpacklo_epi64(ef, gh),
            _mm256_unpackhi_epi64(ef, gh),
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
        sums: &mut [[__m256i; N]; R],
        w: [[__m256i; C]; R],
        x: [*const i8; N],
    ) {
        D::dot::<K, N, R, C>(sums, w, x)
    }
    #[inline(always)]
    unsafe fn pair(acc: __m256i, a: __m256i, b: __m256i) -> __m256i {
        D::pair(acc, a, b)
    }
    #[inline(always)]
    unsafe fn halves(x: __m256i) -> __m256 {
        let x = _mm256_and_si256(x, _mm256_set1_epi32(0xffff));
        let (low, high) = (_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
        _mm256_cvtph_ps(_mm_packus_epi32(low, high))
    }
    #[inline(always)]
    unsafe fn load_floats(x: *const f32) -> __m256 {
        _mm256_loadu_ps(x)
    }
    #[inline(always)]
    unsafe fn store_floats(to: *mut f32, x: __m256) {
        _mm256_storeu_ps(to, x)
    }
    #[inline(always)]
    unsafe fn step(acc: __m256, d: __m256, dx: f32, sum: __m256i) -> __m256 {
        let d = _mm256_mul_ps(d, _mm256_set1_ps(dx));
        _mm256_fmadd_ps(d, _mm256_cvtepi32_ps(sum), acc)
    }
}

impl Register for __m256i {
    #[inline(always)]
    unsafe fn spread(x: *const u8) -> __m256i {
        _mm256_set1_epi32(x.cast::<i32>().read_unaligned())
    }
}

impl Pairs for __m256i {
    const TOKENS: usize = 4;

    #[inline(always)]
    unsafe fn maddubs(w: __m256i, x: __m256i) -> __m256i {
        _mm256_maddubs_epi16(w, x)
    }
    #[inline(always)]
    unsafe fn signed(w: __m256i, x: __m256i) -> __m256i {
        // |w| · (x with the sign of w); -128 becomes 128 as a u8.
        _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w))
    }
    #[inline(always)]
    unsafe fn add_i16(a: __m256i, b: __m256i) -> __m256i {
        _mm256_add_epi16(a, b)
    }
    #[inline(always)]
    unsafe fn madd(sum: __m256i, a: __m256i, b: __m256i) -> __m256i {
        _mm256_add_epi32(sum, _mm256_madd_epi16(a, b))
    }
}

tile_doors!(Ymm<Maddubs>, #[target_feature(enable = "avx2,fma,f16c")]);

/// Overlays what this tier does better.
pub(super) fn install(k: &mut Kernels) {
    install_common(k);
    install_tiles(k);
}
