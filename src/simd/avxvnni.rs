//! AVX2 with AVX-VNNI: what [`super::avx2`] does, with `vpdpbusd`.

// Every `unsafe fn` of this file has one contract: the caller has this tier's features enabled and
// passes pointers that lead to as much as the trait says.
#![allow(unsafe_op_in_unsafe_fn)]

use super::avx2::Ymm;
use super::tile::tile_doors;
use super::x86::{Fused, Vnni};
use super::{Kernels, Rows, Tokens};
use crate::pool::Stripe;
use crate::quant;
use std::arch::x86_64::*;

/// Whether the CPU has everything this file is compiled with.
pub(super) fn detect() -> bool {
    super::avx2::detect() && is_x86_feature_detected!("avxvnni")
}

impl Fused for __m256i {
    /// Chains enough to hide how long a product takes, even where not all of them have a register.
    const TOKENS: usize = 8;
    const PANELS: usize = 1;

    #[inline(always)]
    unsafe fn dpbusd(sum: __m256i, w: __m256i, x: __m256i) -> __m256i {
        _mm256_dpbusd_avx_epi32(sum, w, x)
    }
    #[inline(always)]
    unsafe fn dpwssd(sum: __m256i, a: __m256i, b: __m256i) -> __m256i {
        _mm256_dpwssd_avx_epi32(sum, a, b)
    }
}

tile_doors!(Ymm<Vnni>, #[target_feature(enable = "avx2,fma,f16c,avxvnni")]);

/// Overlays what this tier does better.
pub(super) fn install(k: &mut Kernels) {
    install_tiles(k);
}
