//! AVX2 with FMA and F16C: 8 rows at a time, by the same plan as [`super::avx512`].
//!
//! Products go through `maddubs` (u8 × i8, pairs added in i16): every format keeps the pair within
//! i16, so nothing saturates and the sums are exact.

// Every `unsafe fn` of this file has one contract: the caller has this tier's features enabled and
// passes pointers to whole blocks (and 64 bytes of activations where a block has them).
#![allow(unsafe_op_in_unsafe_fn)]

use super::float::float_doors;
use super::tile::{Tile, tile_doors};
use super::{RowGroup, matmul_groups};
use crate::quant::Format;
use crate::quant::act::IntAct;
use crate::quant::float::Lanes;
use crate::quant::{iq4_nl, iq4_xs, q2_k, q3_k, q4_0, q4_1, q4_k, q5_0, q5_1, q5_k, q6_k, q8_0};
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

float_doors!(Pair, #[target_feature(enable = "avx2,fma,f16c")]);

/// [`Tile`] with `vpmaddubsw`.
#[derive(Clone, Copy)]
struct Maddubs;

impl Tile for Maddubs {
    const ROWS: usize = 8;
    const TOKENS: usize = 4;
    type W = __m256i;
    type I = __m256i;
    type F = __m256;

    /// 8-bit weights stay signed: as unsigned ones they would saturate.
    #[inline(always)]
    fn bias(offset: i32) -> i32 {
        if offset == 128 { 0 } else { offset }
    }
    #[inline(always)]
    unsafe fn weights(q: *const u8) -> __m256i {
        _mm256_loadu_si256(q.cast())
    }
    #[inline(always)]
    unsafe fn splat(x: i32) -> __m256i {
        _mm256_set1_epi32(x)
    }
    #[inline(always)]
    unsafe fn dot4<const BYTE: bool>(acc: __m256i, w: __m256i, x: *const i8) -> __m256i {
        let x = _mm256_set1_epi32(x.cast::<i32>().read_unaligned());
        // 63 · 127 · 2 fits i16, and so does 128 · 127 · 2.
        let p = match BYTE {
            true => _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w)),
            false => _mm256_maddubs_epi16(w, x),
        };
        _mm256_add_epi32(acc, widen_pairs(p))
    }
    #[inline(always)]
    unsafe fn mul_add(acc: __m256i, a: __m256i, b: *const i32) -> __m256i {
        _mm256_add_epi32(acc, _mm256_mullo_epi32(a, _mm256_loadu_si256(b.cast())))
    }
    #[inline(always)]
    unsafe fn pair(acc: __m256i, m: *const i16, x: *const i16) -> __m256i {
        let x = _mm256_set1_epi32(x.cast::<i32>().read_unaligned());
        _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_loadu_si256(m.cast()), x))
    }
    #[inline(always)]
    unsafe fn mul_sub(a: __m256i, b: __m256i, c: i32) -> __m256i {
        _mm256_sub_epi32(a, _mm256_mullo_epi32(b, _mm256_set1_epi32(c)))
    }
    #[inline(always)]
    unsafe fn load(y: *const f32) -> __m256 {
        _mm256_loadu_ps(y)
    }
    #[inline(always)]
    unsafe fn store(y: *mut f32, acc: __m256) {
        _mm256_storeu_ps(y, acc)
    }
    #[inline(always)]
    unsafe fn step(acc: __m256, d: *const f32, dx: f32, sum: __m256i) -> __m256 {
        let d = _mm256_mul_ps(_mm256_loadu_ps(d), _mm256_set1_ps(dx));
        _mm256_fmadd_ps(d, _mm256_cvtepi32_ps(sum), acc)
    }
    #[inline(always)]
    unsafe fn interleave(rows: *const i8, out: *mut u8) {
        // Half `h` of `z(i)` is row `4h + i`, as in the AVX-512 tier.
        let row = |r: usize| _mm_loadu_si128(rows.add(256 * r).cast());
        let z = |i: usize| _mm256_set_m128i(row(i + 4), row(i));
        let (a, b, c, d) = (z(0), z(1), z(2), z(3));
        let (ab, cd) = (_mm256_unpacklo_epi32(a, b), _mm256_unpacklo_epi32(c, d));
        let (ef, gh) = (_mm256_unpackhi_epi32(a, b), _mm256_unpackhi_epi32(c, d));
        let out = out.cast::<__m256i>();
        _mm256_storeu_si256(out, _mm256_unpacklo_epi64(ab, cd));
        _mm256_storeu_si256(out.add(1), _mm256_unpackhi_epi64(ab, cd));
        _mm256_storeu_si256(out.add(2), _mm256_unpacklo_epi64(ef, gh));
        _mm256_storeu_si256(out.add(3), _mm256_unpackhi_epi64(ef, gh));
    }
}

tile_doors! {
    Maddubs, #[target_feature(enable = "avx2,fma,f16c")];
    matmul_q4_0 = Q4_0, q4_0::Q4_0, matmul_groups::<By32<Nibbles>>, below 16;
    matmul_q4_1 = Q4_1, q4_1::Q4_1;
    matmul_q5_0 = Q5_0, q5_0::Q5_0;
    matmul_q5_1 = Q5_1, q5_1::Q5_1;
    matmul_q8_0 = Q8_0, q8_0::Q8_0, matmul_groups::<By32<Bytes>>, below 16;
    matmul_q2_k = Q2_K, q2_k::Q2_K;
    matmul_q3_k = Q3_K, q3_k::Q3_K;
    matmul_q4_k = Q4_K, q4_k::Q4_K, matmul_groups::<By256<K4>>, below 16;
    matmul_q5_k = Q5_K, q5_k::Q5_K;
    matmul_q6_k = Q6_K, q6_k::Q6_K, matmul_groups::<By256<K6>>, below 16;
    matmul_iq4_nl = IQ4_NL, iq4_nl::Iq4Nl;
    matmul_iq4_xs = IQ4_XS, iq4_xs::Iq4Xs;
}

/// Overlays what this tier does better.
pub(super) fn install(k: &mut Kernels) {
    install_common(k);
    install_tiles(k);
}

/// Rows in a group: one lane each.
const GROUP: usize = 8;

// ---- Formats of 32 weights -------------------------------------------------------------------

/// One block of 32 weights.
trait Of32 {
    /// Bytes of a block; its f16 scale comes first.
    const BYTES: usize;
    /// What is added to the weights to make them unsigned; leaves through the sums of `x`.
    const OFFSET: i32;
    /// 8 lanes whose sum is `Σ (q + OFFSET) · x`.
    unsafe fn products(block: *const u8, x: __m256i) -> __m256i;
}

/// Adds neighbouring i16 into i32.
#[inline(always)]
unsafe fn widen_pairs(p: __m256i) -> __m256i {
    _mm256_madd_epi16(p, _mm256_set1_epi16(1))
}

/// Q4_0.
struct Nibbles;

impl Of32 for Nibbles {
    const BYTES: usize = 18;
    const OFFSET: i32 = 8;

    #[inline(always)]
    unsafe fn products(block: *const u8, x: __m256i) -> __m256i {
        let q = _mm_loadu_si128(block.add(2).cast());
        let both = _mm256_set_m128i(_mm_srli_epi16(q, 4), q);
        // 15 · 127 · 2 fits i16.
        widen_pairs(_mm256_maddubs_epi16(
            _mm256_and_si256(both, _mm256_set1_epi8(15)),
            x,
        ))
    }
}

/// Q8_0.
struct Bytes;

impl Of32 for Bytes {
    const BYTES: usize = 34;
    const OFFSET: i32 = 0;

    #[inline(always)]
    unsafe fn products(block: *const u8, x: __m256i) -> __m256i {
        let q = _mm256_loadu_si256(block.add(2).cast());
        // |q| · (x with the sign of q): 128 · 127 · 2 fits i16. -128 becomes 128 as a u8.
        widen_pairs(_mm256_maddubs_epi16(
            _mm256_abs_epi8(q),
            _mm256_sign_epi8(x, q),
        ))
    }
}

/// [`Of32`] by groups of rows.
struct By32<F>(PhantomData<F>);

impl<F: Of32> RowGroup for By32<F> {
    const ROWS: usize = GROUP;

    #[inline(always)]
    unsafe fn dots(rows: *const u8, stride: usize, x: IntAct<'_>, y: *mut f32) {
        _mm256_storeu_ps(y, group_of_32::<F>(rows, stride, x));
    }
}

/// 8 dot products: rows at `base + r·stride`.
#[inline(always)]
unsafe fn group_of_32<F: Of32>(base: *const u8, stride: usize, x: IntAct<'_>) -> __m256 {
    // SAFETY: block `b` of each of the 8 rows; `qs` is 32 bytes.
    let mut acc = _mm256_setzero_ps();
    for (b, d) in x.d.iter().enumerate() {
        let (qs, sums) = x.block(b, 32);
        let first = base.add(b * F::BYTES);
        let xs = _mm256_loadu_si256(qs.as_ptr().cast());
        let mut p = [_mm256_setzero_si256(); GROUP];
        for r in 0..GROUP {
            p[r] = F::products(first.add(r * stride), xs);
        }
        let offset = F::OFFSET * (sums[0] as i32 + sums[1] as i32);
        let isum = _mm256_sub_epi32(sum_all(p), _mm256_set1_epi32(offset));
        let d = _mm256_mul_ps(halves(first, stride), _mm256_set1_ps(*d));
        acc = _mm256_fmadd_ps(d, _mm256_cvtepi32_ps(isum), acc);
    }
    acc
}

/// The f16 at `at + r·stride` of 8 rows, as floats. Plain loads: the gathers of this tier's CPUs are no
/// faster, and some emulators get them wrong.
#[inline(always)]
unsafe fn halves(at: *const u8, stride: usize) -> __m256 {
    let mut h = [0u16; GROUP];
    for (r, h) in h.iter_mut().enumerate() {
        *h = at.add(r * stride).cast::<u16>().read_unaligned();
    }
    _mm256_cvtph_ps(_mm_loadu_si128(h.as_ptr().cast()))
}

// ---- Formats of 256 weights ------------------------------------------------------------------

/// One block of 256 weights.
trait Of256 {
    /// Bytes of a block.
    const BYTES: usize;
    /// Where the f16 scale lies.
    const D: usize;
    /// Whether there are minimums; their f16 scale lies behind `d`, to be subtracted.
    const MIN: bool;
    /// 8 lanes whose sum is `isum`; `x`: 256 activations, `sums`: their 16 sums.
    unsafe fn products(block: *const u8, x: *const i8, sums: __m256i) -> __m256i;
    /// 4 lanes whose sum is `msum`.
    unsafe fn minimums(block: *const u8, sums: __m256i) -> __m128i;
}

/// Copies i16 number `i` of each half of `v` all over that half.
#[inline(always)]
unsafe fn spread(v: __m256i, i: usize) -> __m256i {
    _mm256_shuffle_epi8(v, _mm256_set1_epi16(0x0100 + 0x0202 * i as i16))
}

/// Q4_K.
struct K4;

impl K4 {
    /// Eight scales and eight minimums, one byte each.
    #[inline(always)]
    unsafe fn scales(block: *const u8) -> (u64, u64) {
        // SAFETY: the 12 bytes at 4..16 of a block.
        q4_k::scales_mins(&*block.add(4).cast())
    }
}

impl Of256 for K4 {
    const BYTES: usize = 144;
    const D: usize = 0;
    const MIN: bool = true;

    #[inline(always)]
    unsafe fn products(block: *const u8, x: *const i8, _sums: __m256i) -> __m256i {
        let (scales, _) = K4::scales(block);
        let scales =
            _mm256_broadcastsi128_si256(_mm_cvtepu8_epi16(_mm_cvtsi64_si128(scales as i64)));
        let low = _mm256_set1_epi8(15);
        let mut acc = _mm256_setzero_si256();
        for i in 0..4 {
            let q = _mm256_loadu_si256(block.add(16 + 32 * i).cast());
            for high in 0..2 {
                let q = if high == 1 {
                    _mm256_srli_epi16(q, 4)
                } else {
                    q
                };
                let x = _mm256_loadu_si256(x.add(64 * i + 32 * high).cast());
                // 15 · 127 · 2 fits i16.
                let p = _mm256_maddubs_epi16(_mm256_and_si256(q, low), x);
                acc = _mm256_add_epi32(acc, _mm256_madd_epi16(p, spread(scales, 2 * i + high)));
            }
        }
        acc
    }

    #[inline(always)]
    unsafe fn minimums(block: *const u8, sums: __m256i) -> __m128i {
        let (_, mins) = K4::scales(block);
        let sums32 = _mm_hadd_epi16(
            _mm256_castsi256_si128(sums),
            _mm256_extracti128_si256(sums, 1),
        );
        _mm_madd_epi16(_mm_cvtepu8_epi16(_mm_cvtsi64_si128(mins as i64)), sums32)
    }
}

/// Q6_K.
struct K6;

impl Of256 for K6 {
    const BYTES: usize = 210;
    const D: usize = 208;
    const MIN: bool = false;

    #[inline(always)]
    unsafe fn products(block: *const u8, x: *const i8, sums: __m256i) -> __m256i {
        let bytes = _mm_loadu_si128(block.add(192).cast());
        let scales = _mm256_cvtepi8_epi16(bytes);
        // The offset of 32: Σ scale · Σ x, once per sub-block.
        let offset = _mm256_slli_epi32(_mm256_madd_epi16(scales, sums), 5);
        // Scales of even sub-blocks in the lower half, of odd ones in the upper: a register of 32
        // weights holds two sub-blocks.
        let apart = _mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
        let scales = _mm256_cvtepi8_epi16(_mm_shuffle_epi8(bytes, apart));
        let (low, two) = (_mm256_set1_epi8(15), _mm256_set1_epi8(0x30));
        let mut acc = _mm256_sub_epi32(_mm256_setzero_si256(), offset);
        for half in 0..2 {
            let qh = _mm256_loadu_si256(block.add(128 + 32 * half).cast());
            let ql = [0, 1].map(|i| _mm256_loadu_si256(block.add(64 * half + 32 * i).cast()));
            let upper = [
                _mm256_slli_epi16(qh, 4),
                _mm256_slli_epi16(qh, 2),
                qh,
                _mm256_srli_epi16(qh, 2),
            ];
            for i in 0..4 {
                let nibbles = if i < 2 {
                    ql[i]
                } else {
                    _mm256_srli_epi16(ql[i - 2], 4)
                };
                let q = _mm256_or_si256(
                    _mm256_and_si256(nibbles, low),
                    _mm256_and_si256(upper[i], two),
                );
                let x = _mm256_loadu_si256(x.add(128 * half + 32 * i).cast());
                // 63 · 127 · 2 fits i16.
                let p = _mm256_maddubs_epi16(q, x);
                acc = _mm256_add_epi32(acc, _mm256_madd_epi16(p, spread(scales, 4 * half + i)));
            }
        }
        acc
    }

    #[inline(always)]
    unsafe fn minimums(_block: *const u8, _sums: __m256i) -> __m128i {
        _mm_setzero_si128()
    }
}

/// [`Of256`] by groups of rows.
struct By256<F>(PhantomData<F>);

impl<F: Of256> RowGroup for By256<F> {
    const ROWS: usize = GROUP;

    #[inline(always)]
    unsafe fn dots(rows: *const u8, stride: usize, x: IntAct<'_>, y: *mut f32) {
        _mm256_storeu_ps(y, group_of_256::<F>(rows, stride, x));
    }
}

/// 8 dot products: rows at `base + r·stride`.
#[inline(always)]
unsafe fn group_of_256<F: Of256>(base: *const u8, stride: usize, x: IntAct<'_>) -> __m256 {
    // SAFETY: block `b` of each of the 8 rows; `qs` is 256 bytes and `sums` 16 times i16.
    let mut acc = _mm256_setzero_ps();
    for (b, d) in x.d.iter().enumerate() {
        let (qs, sums) = x.block(b, 256);
        let first = base.add(b * F::BYTES);
        let sums = _mm256_loadu_si256(sums.as_ptr().cast());
        let mut p = [_mm256_setzero_si256(); GROUP];
        for r in 0..GROUP {
            p[r] = F::products(first.add(r * stride), qs.as_ptr(), sums);
        }
        let dx = _mm256_set1_ps(*d);
        let scale = _mm256_mul_ps(halves(first.add(F::D), stride), dx);
        acc = _mm256_fmadd_ps(scale, _mm256_cvtepi32_ps(sum_all(p)), acc);
        if F::MIN {
            let mut m = [_mm_setzero_si128(); GROUP];
            for r in 0..GROUP {
                m[r] = F::minimums(first.add(r * stride), sums);
            }
            // min is subtracted: the sign before the product changes no rounding.
            let min = _mm256_mul_ps(halves(first.add(F::D + 2), stride), dx);
            acc = _mm256_fnmadd_ps(min, _mm256_cvtepi32_ps(sum_quarters(m)), acc);
        }
    }
    acc
}

// ---- Transposing sums ------------------------------------------------------------------------

#[inline(always)]
unsafe fn add_pairs(a: __m256i, b: __m256i) -> __m256i {
    _mm256_add_epi32(_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b))
}

/// The sums of four rows within each half.
#[inline(always)]
unsafe fn sum_within_halves(a: __m256i, b: __m256i, c: __m256i, d: __m256i) -> __m256i {
    let (ab, cd) = (add_pairs(a, b), add_pairs(c, d));
    _mm256_add_epi32(_mm256_unpacklo_epi64(ab, cd), _mm256_unpackhi_epi64(ab, cd))
}

/// Lane `r` is the sum of all lanes of `p[r]`.
#[inline(always)]
unsafe fn sum_all(p: [__m256i; GROUP]) -> __m256i {
    let v0 = sum_within_halves(p[0], p[1], p[2], p[3]);
    let v1 = sum_within_halves(p[4], p[5], p[6], p[7]);
    _mm256_add_epi32(
        _mm256_permute2x128_si256(v0, v1, 0x20),
        _mm256_permute2x128_si256(v0, v1, 0x31),
    )
}

/// Lane `r` is the sum of the 4 lanes of `m[r]`.
#[inline(always)]
unsafe fn sum_quarters(m: [__m128i; GROUP]) -> __m256i {
    let z = |i: usize| _mm256_set_m128i(m[i + 4], m[i]);
    sum_within_halves(z(0), z(1), z(2), z(3))
}
