//! AVX-512 with VNNI: 16 rows at a time.
//!
//! A matrix is worked in groups of 16 rows. For each block, every row's partial sums (16 lanes of
//! i32, exact) are transposed and added until lane `r` holds the integer sum of row `r`; then one
//! float step serves all 16 rows, in block order, which is the canonical arithmetic.

use super::float::{Half, float_doors};
use crate::quant::Format;
use crate::quant::act::IntAct;
use crate::quant::{q4_0::Q4_0, q8_0::Q8_0};
use half::f16;
use std::arch::x86_64::*;

/// Whether the CPU has everything this file is compiled with.
pub(super) fn detect() -> bool {
    super::avx2::detect()
        && is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vnni")
}

/// [`Half`] with `vcvtph2ps`.
struct Vcvt;

impl Half for Vcvt {
    #[inline(always)]
    fn widen(h: &[f16; 16]) -> [f32; 16] {
        // SAFETY: only called from this tier's functions, which are installed after `detect`; f16 is a
        // transparent u16 and the load is unaligned.
        unsafe { std::mem::transmute(_mm512_cvtph_ps(_mm256_loadu_si256(h.as_ptr().cast()))) }
    }
}

float_doors!(Vcvt, #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]);

/// Overlays what this tier does better.
pub(super) fn install(k: &mut Kernels) {
    install_floats(k);
    k.matmul[Format::Q4_0.index()] = matmul_q4_0;
    k.matmul[Format::Q8_0.index()] = matmul_q8_0;
}
