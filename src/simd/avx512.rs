//! AVX-512 with VNNI: what [`super::avx512bw`] does, with `vpdpbusd`.

// Every `unsafe fn` of this file has one contract: the caller has this tier's features enabled and
// passes pointers that lead to as much as the trait says.
#![allow(unsafe_op_in_unsafe_fn)]

use super::avx512bw::Zmm;
use super::tile::tile_doors;
use super::x86::{Fused, Vnni};
use super::{Kernels, Rows, Tokens};
use crate::pool::Stripe;
use crate::quant;
use std::arch::asm;
use std::arch::x86_64::*;

/// Whether the CPU has everything this file is compiled with.
pub(super) fn detect() -> bool {
    super::avx512bw::detect() && is_x86_feature_detected!("avx512vnni")
}

impl Fused for __m512i {
    const TOKENS: usize = 8;
    const PANELS: usize = 2;

    #[inline(always)]
    unsafe fn dpbusd(sum: __m512i, w: __m512i, x: __m512i) -> __m512i {
        _mm512_dpbusd_epi32(sum, w, x)
    }
    #[inline(always)]
    unsafe fn dpwssd(sum: __m512i, a: __m512i, b: __m512i) -> __m512i {
        dpwssd(sum, a, b)
    }
}

/// `sum + Σ_2 a · b`. (The intrinsic is taken apart again by the compiler, into a product and a sum.)
#[inline]
#[target_feature(enable = "avx512f,avx512vnni")]
fn dpwssd(mut sum: __m512i, a: __m512i, b: __m512i) -> __m512i {
    // SAFETY: the instruction is one of this function's features and touches nothing but these registers.
    unsafe {
        asm!(
            "vpdpwssd {sum}, {a}, {b}",
            sum = inout(zmm_reg) sum,
            a = in(zmm_reg) a,
            b = in(zmm_reg) b,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    sum
}

tile_doors!(Zmm<Vnni>, #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]);

/// Overlays what this tier does better.
pub(super) fn install(k: &mut Kernels) {
    install_tiles(k);
}
