//! AVX-512 with VNNI: 16 rows at a time.
//!
//! A matrix is worked in groups of 16 rows. For each block, every row's partial sums (16 lanes of
//! i32, exact) are transposed and added until lane `r` holds the integer sum of row `r`; then one
//! float step serves all 16 rows, in block order, which is the canonical arithmetic.
//!
//! Weights are multiplied as unsigned bytes `q + OFFSET`; the offset leaves through the sums of the
//! activations, `Σ (q + o)·x - o·Σ x`, which is exact too.

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
    super::avx2::detect()
        && is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vnni")
}

/// [`Lanes`] in one register.
#[derive(Clone, Copy)]
struct One(__m512);

// SAFETY of the blocks below: only this tier's functions use this type, and they are installed after
// `detect`; loads and stores stay inside their arrays of 16; f16 and bf16 are transparent u16.
impl Lanes for One {
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
    fn fold(self) -> f32 {
        // SAFETY: see above.
        unsafe {
            let upper = _mm512_extractf32x8_ps(self.0, 1);
            super::avx2::fold_8(_mm256_add_ps(_mm512_castps512_ps256(self.0), upper))
        }
    }
}

float_doors!(One, #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]);

/// [`Tile`] with `vpdpbusd`.
#[derive(Clone, Copy)]
struct Vnni;

impl Tile for Vnni {
    const ROWS: usize = 16;
    const TOKENS: usize = 8;
    type W = __m512i;
    type I = __m512i;
    type F = __m512;

    #[inline(always)]
    fn bias(offset: i32) -> i32 {
        offset
    }
    #[inline(always)]
    unsafe fn weights(q: *const u8) -> __m512i {
        _mm512_loadu_si512(q.cast())
    }
    #[inline(always)]
    unsafe fn splat(x: i32) -> __m512i {
        _mm512_set1_epi32(x)
    }
    #[inline(always)]
    unsafe fn dot4<const BYTE: bool>(acc: __m512i, w: __m512i, x: *const i8) -> __m512i {
        _mm512_dpbusd_epi32(acc, w, _mm512_set1_epi32(x.cast::<i32>().read_unaligned()))
    }
    #[inline(always)]
    unsafe fn mul_add(acc: __m512i, a: __m512i, b: *const i32) -> __m512i {
        _mm512_add_epi32(acc, _mm512_mullo_epi32(a, _mm512_loadu_si512(b.cast())))
    }
    #[inline(always)]
    unsafe fn pair(acc: __m512i, m: *const i16, x: *const i16) -> __m512i {
        let x = _mm512_set1_epi32(x.cast::<i32>().read_unaligned());
        _mm512_dpwssd_epi32(acc, _mm512_loadu_si512(m.cast()), x)
    }
    #[inline(always)]
    unsafe fn mul_sub(a: __m512i, b: __m512i, c: i32) -> __m512i {
        _mm512_sub_epi32(a, _mm512_mullo_epi32(b, _mm512_set1_epi32(c)))
    }
    #[inline(always)]
    unsafe fn load(y: *const f32) -> __m512 {
        _mm512_loadu_ps(y)
    }
    #[inline(always)]
    unsafe fn store(y: *mut f32, acc: __m512) {
        _mm512_storeu_ps(y, acc)
    }
    #[inline(always)]
    unsafe fn step(acc: __m512, d: *const f32, dx: f32, sum: __m512i) -> __m512 {
        let d = _mm512_mul_ps(_mm512_loadu_ps(d), _mm512_set1_ps(dx));
        _mm512_fmadd_ps(d, _mm512_cvtepi32_ps(sum), acc)
    }
    #[inline(always)]
    unsafe fn interleave(rows: *const i8, out: *mut u8) {
        // Quarter `q` of `z(i)` is row `4q + i`; a 4 × 4 transposition of dwords within quarters
        // brings four rows' dwords together.
        let row = |r: usize| _mm_loadu_si128(rows.add(256 * r).cast());
        let z = |i: usize| {
            let low = _mm256_set_m128i(row(i + 4), row(i));
            let high = _mm256_set_m128i(row(i + 12), row(i + 8));
            _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1)
        };
        let (a, b, c, d) = (z(0), z(1), z(2), z(3));
        let (ab, cd) = (_mm512_unpacklo_epi32(a, b), _mm512_unpacklo_epi32(c, d));
        let (ef, gh) = (_mm512_unpackhi_epi32(a, b), _mm512_unpackhi_epi32(c, d));
        let out = out.cast::<__m512i>();
        _mm512_storeu_si512(out, _mm512_unpacklo_epi64(ab, cd));
        _mm512_storeu_si512(out.add(1), _mm512_unpackhi_epi64(ab, cd));
        _mm512_storeu_si512(out.add(2), _mm512_unpacklo_epi64(ef, gh));
        _mm512_storeu_si512(out.add(3), _mm512_unpackhi_epi64(ef, gh));
    }
}

tile_doors! {
    Vnni, #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")];
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
const GROUP: usize = 16;

// ---- Formats of 32 weights -------------------------------------------------------------------

/// Two consecutive blocks of 32 weights in one register.
trait Of32 {
    /// Bytes of a block; its f16 scale comes first.
    const BYTES: usize;
    /// What is added to the weights to make them unsigned.
    const OFFSET: i32;
    /// Whether the first block fills lanes 0-7 (else every other four lanes).
    const HALVES: bool;
    /// The weights of the blocks at `first` and `second`, as unsigned bytes.
    unsafe fn unpack(first: *const u8, second: *const u8) -> __m512i;
    /// The 64 activations of both blocks in the order of [`Of32::unpack`].
    unsafe fn order(x: __m512i) -> __m512i;
}

/// Q4_0.
struct Nibbles;

impl Of32 for Nibbles {
    const BYTES: usize = 18;
    const OFFSET: i32 = 8;
    const HALVES: bool = false;

    #[inline(always)]
    unsafe fn unpack(first: *const u8, second: *const u8) -> __m512i {
        // Low nibbles of both blocks, then the high ones: quarters a0 b0 a1 b1.
        let a = _mm_loadu_si128(first.add(2).cast());
        let b = _mm_loadu_si128(second.add(2).cast());
        let ab = _mm256_inserti128_si256(_mm256_castsi128_si256(a), b, 1);
        let both = _mm512_inserti64x4(_mm512_castsi256_si512(ab), _mm256_srli_epi16(ab, 4), 1);
        _mm512_and_si512(both, _mm512_set1_epi8(15))
    }

    #[inline(always)]
    unsafe fn order(x: __m512i) -> __m512i {
        _mm512_shuffle_i64x2(x, x, 0b11_01_10_00)
    }
}

/// Q8_0.
struct Bytes;

impl Of32 for Bytes {
    const BYTES: usize = 34;
    const OFFSET: i32 = 128;
    const HALVES: bool = true;

    #[inline(always)]
    unsafe fn unpack(first: *const u8, second: *const u8) -> __m512i {
        let a = _mm256_loadu_si256(first.add(2).cast());
        let b = _mm256_loadu_si256(second.add(2).cast());
        let ab = _mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1);
        _mm512_xor_si512(ab, _mm512_set1_epi8(-128))
    }

    #[inline(always)]
    unsafe fn order(x: __m512i) -> __m512i {
        x
    }
}

/// [`Of32`] by groups of rows.
struct By32<F>(PhantomData<F>);

impl<F: Of32> RowGroup for By32<F> {
    const ROWS: usize = GROUP;

    #[inline(always)]
    unsafe fn dots(rows: *const u8, stride: usize, x: IntAct<'_>, y: *mut f32) {
        _mm512_storeu_ps(y, group_of_32::<F>(rows, stride, x));
    }
}

/// 16 dot products: rows at `base + r·stride`.
#[inline(always)]
unsafe fn group_of_32<F: Of32>(base: *const u8, stride: usize, x: IntAct<'_>) -> __m512 {
    let n = x.d.len();
    // SAFETY: AVX-512F, enabled by the caller.
    let mut acc = _mm512_setzero_ps();
    for b in (0..n).step_by(2) {
        let pair = b + 1 < n;
        // SAFETY: blocks `b` and, if it exists, `b + 1` of each of the 16 rows; without a second block
        // the first is read twice and meets zeros.
        let first = base.add(b * F::BYTES);
        let next = if pair { F::BYTES } else { 0 };
        let xs = if pair {
            _mm512_loadu_si512(x.qs[b * 32..][..64].as_ptr().cast())
        } else {
            _mm512_zextsi256_si512(_mm256_loadu_si256(x.qs[b * 32..][..32].as_ptr().cast()))
        };
        let xs = F::order(xs);
        let mut p = [_mm512_setzero_si512(); GROUP];
        for r in 0..GROUP {
            let row = first.add(r * stride);
            p[r] = _mm512_dpbusd_epi32(p[r], F::unpack(row, row.add(next)), xs);
        }
        let [s0, s1] = sum_two::<F>(p);
        acc = step_32::<F>(acc, s0, first, stride, x, b);
        if pair {
            acc = step_32::<F>(acc, s1, first.add(next), stride, x, b + 1);
        }
    }
    acc
}

/// The float step of block `b` for 16 rows: `acc = fma(d_w·d_x, isum, acc)`.
#[inline(always)]
unsafe fn step_32<F: Of32>(
    acc: __m512,
    sums: __m512i,
    block: *const u8,
    stride: usize,
    x: IntAct<'_>,
    b: usize,
) -> __m512 {
    let offset = F::OFFSET * (x.sums[2 * b] as i32 + x.sums[2 * b + 1] as i32);
    // SAFETY: the f16 scale is at the start of each row's block.
    let isum = _mm512_sub_epi32(sums, _mm512_set1_epi32(offset));
    let d = _mm512_mul_ps(scales(block, stride), _mm512_set1_ps(x.d[b]));
    _mm512_fmadd_ps(d, _mm512_cvtepi32_ps(isum), acc)
}

/// The f16 at `at + r·stride` of 16 rows, as floats; 4 bytes are read at each.
#[inline(always)]
unsafe fn scales(at: *const u8, stride: usize) -> __m512 {
    let rows = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    let offsets = _mm512_mullo_epi32(rows, _mm512_set1_epi32(stride as i32));
    let dwords = _mm512_i32gather_epi32::<1>(offsets, at.cast());
    _mm512_cvtph_ps(_mm512_cvtepi32_epi16(dwords))
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
    /// The activations of a block in the order that [`Of256::products`] wants.
    unsafe fn order(x: [__m512i; 4]) -> [__m512i; 4];
    /// 16 lanes whose sum is `isum`; `x` as ordered, `sums`: the block's 16 sums.
    unsafe fn products(block: *const u8, x: &[__m512i; 4], sums: __m256i) -> __m512i;
    /// 4 lanes whose sum is `msum`.
    unsafe fn minimums(block: *const u8, sums: __m256i) -> __m128i;
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
    unsafe fn order(x: [__m512i; 4]) -> [__m512i; 4] {
        // 64 bytes of nibbles hold the sub-blocks 0 2 (low) and 1 3 (high).
        [
            _mm512_shuffle_i64x2(x[0], x[1], 0b01_00_01_00),
            _mm512_shuffle_i64x2(x[0], x[1], 0b11_10_11_10),
            _mm512_shuffle_i64x2(x[2], x[3], 0b01_00_01_00),
            _mm512_shuffle_i64x2(x[2], x[3], 0b11_10_11_10),
        ]
    }

    #[inline(always)]
    unsafe fn products(block: *const u8, x: &[__m512i; 4], _sums: __m256i) -> __m512i {
        let (scales, _) = K4::scales(block);
        let scales = _mm512_broadcast_i32x4(_mm_cvtepu8_epi16(_mm_cvtsi64_si128(scales as i64)));
        let low = _mm512_set1_epi8(15);
        let mut acc = _mm512_setzero_si512();
        for half in 0..2 {
            let q = _mm512_loadu_si512(block.add(16 + 64 * half).cast());
            for high in 0..2 {
                let q = if high == 1 {
                    _mm512_srli_epi16(q, 4)
                } else {
                    q
                };
                // 15 · 127 · 2 fits i16.
                let p = _mm512_maddubs_epi16(_mm512_and_si512(q, low), x[2 * half + high]);
                // The scales of sub-blocks 4·half + high (lower half) and + 2 (upper half).
                let at = |sub: usize| (0x0101 * (2 * sub) as i16) + 0x0100;
                let s = 4 * half + high;
                let spread =
                    _mm512_inserti64x4(_mm512_set1_epi16(at(s)), _mm256_set1_epi16(at(s + 2)), 1);
                acc = _mm512_dpwssd_epi32(acc, p, _mm512_shuffle_epi8(scales, spread));
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
    unsafe fn order(x: [__m512i; 4]) -> [__m512i; 4] {
        x
    }

    #[inline(always)]
    unsafe fn products(block: *const u8, x: &[__m512i; 4], sums: __m256i) -> __m512i {
        let scales = _mm256_cvtepi8_epi16(_mm_loadu_si128(block.add(192).cast()));
        let spread = _mm512_castsi256_si512(scales);
        let (low, two) = (_mm512_set1_epi8(15), _mm512_set1_epi8(0x30));
        // The offset of 32: Σ scale · Σ x, once per sub-block.
        let offset = _mm256_slli_epi32(_mm256_madd_epi16(scales, sums), 5);
        let mut acc = _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_zextsi256_si512(offset));
        for half in 0..2 {
            let ql = _mm512_loadu_si512(block.add(64 * half).cast());
            let qh = _mm256_loadu_si256(block.add(128 + 32 * half).cast());
            // Upper bits: weights 0..32 | 32..64 of the half, and 4 bits further 64..96 | 96..128.
            let qh = _mm512_inserti64x4(_mm512_castsi256_si512(qh), _mm256_srli_epi16(qh, 2), 1);
            let first = _mm512_or_si512(
                _mm512_and_si512(ql, low),
                _mm512_and_si512(_mm512_slli_epi16(qh, 4), two),
            );
            let second = _mm512_or_si512(
                _mm512_and_si512(_mm512_srli_epi16(ql, 4), low),
                _mm512_and_si512(qh, two),
            );
            for (i, q) in [first, second].into_iter().enumerate() {
                // 63 · 127 · 2 fits i16. Each quarter of the register is one sub-block.
                let p = _mm512_maddubs_epi16(q, x[2 * half + i]);
                let s = 8 * half as i16 + 4 * i as i16;
                let lane = |l: i16| _mm_set1_epi16(s + l);
                let at = _mm512_inserti64x4(
                    _mm512_castsi256_si512(_mm256_set_m128i(lane(1), lane(0))),
                    _mm256_set_m128i(lane(3), lane(2)),
                    1,
                );
                acc = _mm512_dpwssd_epi32(acc, p, _mm512_permutexvar_epi16(at, spread));
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
        _mm512_storeu_ps(y, group_of_256::<F>(rows, stride, x));
    }
}

/// 16 dot products: rows at `base + r·stride`.
#[inline(always)]
unsafe fn group_of_256<F: Of256>(base: *const u8, stride: usize, x: IntAct<'_>) -> __m512 {
    // SAFETY: AVX-512F, enabled by the caller.
    let mut acc = _mm512_setzero_ps();
    for (b, d) in x.d.iter().enumerate() {
        let (qs, sums) = x.block(b, 256);
        // SAFETY: block `b` of each of the 16 rows; `qs` is 256 bytes and `sums` 16 times i16. A block's
        // scale is followed by at least 2 bytes of the block, or is read from 2 bytes before.
        let first = base.add(b * F::BYTES);
        let sums = _mm256_loadu_si256(sums.as_ptr().cast());
        let xs: [__m512i; 4] =
            [0, 1, 2, 3].map(|i| _mm512_loadu_si512(qs.as_ptr().add(64 * i).cast()));
        let xs = F::order(xs);
        let mut p = [_mm512_setzero_si512(); GROUP];
        for r in 0..GROUP {
            p[r] = F::products(first.add(r * stride), &xs, sums);
        }
        let isum = _mm512_cvtepi32_ps(sum_all(p));
        let dx = _mm512_set1_ps(*d);
        let (scale, min) = pair_of_scales::<F>(first, stride);
        acc = _mm512_fmadd_ps(_mm512_mul_ps(scale, dx), isum, acc);
        if F::MIN {
            let mut m = [_mm_setzero_si128(); GROUP];
            for r in 0..GROUP {
                m[r] = F::minimums(first.add(r * stride), sums);
            }
            let msum = _mm512_cvtepi32_ps(sum_quarters(m));
            // min is subtracted: -(min)·dx, the sign before the product changes no rounding.
            acc = _mm512_fnmadd_ps(_mm512_mul_ps(min, dx), msum, acc);
        }
    }
    acc
}

/// `d` and, behind it, `dmin` of 16 rows. Formats that end with `d` are read from 2 bytes before it.
#[inline(always)]
unsafe fn pair_of_scales<F: Of256>(block: *const u8, stride: usize) -> (__m512, __m512) {
    let rows = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    let offsets = _mm512_mullo_epi32(rows, _mm512_set1_epi32(stride as i32));
    let last = F::D + 4 > F::BYTES;
    let at = block.add(if last { F::D - 2 } else { F::D });
    let dwords = _mm512_i32gather_epi32::<1>(offsets, at.cast());
    let upper = _mm512_srli_epi32(dwords, 16);
    let (d, min) = if last {
        (upper, dwords)
    } else {
        (dwords, upper)
    };
    (
        _mm512_cvtph_ps(_mm512_cvtepi32_epi16(d)),
        _mm512_cvtph_ps(_mm512_cvtepi32_epi16(min)),
    )
}

// ---- Transposing sums ------------------------------------------------------------------------

/// Row sums within each quarter: quarter `q` of result `i` holds the sums of quarter `q` of rows
/// `4i .. 4i + 4`.
#[inline(always)]
unsafe fn sum_within_quarters(p: [__m512i; GROUP]) -> [__m512i; 4] {
    let mut out = [p[0]; 4];
    for i in 0..4 {
        // SAFETY: AVX-512F, enabled by the caller.
        let ab = add_pairs(p[4 * i], p[4 * i + 1]);
        let cd = add_pairs(p[4 * i + 2], p[4 * i + 3]);
        out[i] = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
    }
    out
}

#[inline(always)]
unsafe fn add_pairs(a: __m512i, b: __m512i) -> __m512i {
    _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b))
}

/// For two blocks in each row's register: the row sums of the first and of the second block.
#[inline(always)]
unsafe fn sum_two<F: Of32>(p: [__m512i; GROUP]) -> [__m512i; 2] {
    let [v0, v1, v2, v3] = sum_within_quarters(p);
    // After this, quarters are: rows 0-3 of the first block, of the second, rows 4-7 of both.
    let join = |a, b| {
        if F::HALVES {
            _mm512_add_epi32(
                _mm512_shuffle_i64x2(a, b, 0b10_00_10_00),
                _mm512_shuffle_i64x2(a, b, 0b11_01_11_01),
            )
        } else {
            _mm512_add_epi32(
                _mm512_shuffle_i64x2(a, b, 0b01_00_01_00),
                _mm512_shuffle_i64x2(a, b, 0b11_10_11_10),
            )
        }
    };
    let (w0, w1) = (join(v0, v1), join(v2, v3));
    [
        _mm512_shuffle_i64x2(w0, w1, 0b10_00_10_00),
        _mm512_shuffle_i64x2(w0, w1, 0b11_01_11_01),
    ]
}

/// Lane `r` is the sum of all lanes of `p[r]`.
#[inline(always)]
unsafe fn sum_all(p: [__m512i; GROUP]) -> __m512i {
    let [v0, v1, v2, v3] = sum_within_quarters(p);
    let join = |a, b| {
        _mm512_add_epi32(
            _mm512_shuffle_i64x2(a, b, 0b10_00_10_00),
            _mm512_shuffle_i64x2(a, b, 0b11_01_11_01),
        )
    };
    join(join(v0, v1), join(v2, v3))
}

/// Lane `r` is the sum of the 4 lanes of `m[r]`.
#[inline(always)]
unsafe fn sum_quarters(m: [__m128i; GROUP]) -> __m512i {
    // Quarter `q` of `z(i)` is row `4q + i`.
    let z = |i: usize| {
        let low = _mm256_set_m128i(m[i + 4], m[i]);
        let high = _mm256_set_m128i(m[i + 12], m[i + 8]);
        _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1)
    };
    let (ab, cd) = (add_pairs(z(0), z(1)), add_pairs(z(2), z(3)));
    _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd))
}
