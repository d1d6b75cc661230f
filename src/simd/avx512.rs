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
use std::arch::x86_64::*;

/// Whether the CPU has everything this file is compiled with.
pub(super) fn detect() -> bool {
    super::avx512bw::detect() && is_x86_feature_detected!("avx512vnni")
}

impl Fused for __m512i {
    /// With two panels, all sums that lead to the results have a register, and so have those of a sub-block.
    const TOKENS: usize = 6;
    const PANELS: usize = 2;

    #[inline(always)]
    unsafe fn dpbusd(sum: __m512i, w: __m512i, x: __m512i) -> __m512i {
        _mm512_dpbusd_epi32(sum, w, x)
    }
    #[inline(always)]
    unsafe fn dpwssd(sum: __m512i, a: __m512i, b: __m512i) -> __m512i {
        _mm512_dpwssd_epi32(sum, a, b)
    }
}

tile_doors!(Zmm<Vnni>, #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]);

/// Overlays what this tier does better.
pub(super) fn install(k: &mut Kernels) {
    install_tiles(k);
}
