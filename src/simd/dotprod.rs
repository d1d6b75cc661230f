//! NEON with dot products (ARMv8.2's DotProd): what [`super::neon`] does, with `sdot`.

// Every `unsafe fn` of this file has one contract: the caller has this tier's features enabled and
// passes pointers that lead to as much as the trait says.
#![allow(unsafe_op_in_unsafe_fn)]

use super::neon::{Quad, pair};
use super::tile::{Dot, Kind, tile_doors};
use super::{Kernels, Rows, Tokens};
use crate::pool::Stripe;
use crate::quant;
use std::arch::aarch64::*;
use std::arch::asm;

/// Whether the CPU has everything this file is compiled with.
pub(super) fn detect() -> bool {
    super::neon::detect() && std::arch::is_aarch64_feature_detected!("dotprod")
}

/// Products are i8 × i8, four of them added to a lane: exact for all weights.
#[derive(Clone, Copy)]
struct Sdot;

impl Dot<int32x4_t> for Sdot {
    const TOKENS: usize = 8;

    #[inline(always)]
    unsafe fn dot<K: Kind, const N: usize, const R: usize, const C: usize>(
        sums: &mut [[int32x4_t; N]; R],
        w: [[int32x4_t; C]; R],
        x: [*const i8; N],
    ) {
        for t in 0..N {
            let x = match C {
                4 => vld1q_s8(x[t]),
                _ => vcombine_s8(vld1_s8(x[t]), vdup_n_s8(0)),
            };
            for (sums, w) in sums.iter_mut().zip(w) {
                for j in 0..C {
                    sums[t] = match j {
                        0 => sdot::<0>(sums[t], w[j], x),
                        1 => sdot::<1>(sums[t], w[j], x),
                        2 => sdot::<2>(sums[t], w[j], x),
                        _ => sdot::<3>(sums[t], w[j], x),
                    };
                }
            }
        }
    }
    #[inline(always)]
    unsafe fn pair(acc: int32x4_t, a: int32x4_t, b: int32x4_t) -> int32x4_t {
        pair(acc, a, b)
    }
}

/// `sum + Σ_4 w · x[4 J..]`, with four activations for all rows. (The intrinsic, `vdotq_laneq_s32`, is not stable.)
#[inline]
#[target_feature(enable = "neon,dotprod")]
fn sdot<const J: i32>(mut sum: int32x4_t, w: int32x4_t, x: int8x16_t) -> int32x4_t {
    // SAFETY: the instruction is one of this function's features and touches nothing but these registers.
    unsafe {
        asm!(
            "sdot {sum:v}.4s, {w:v}.16b, {x:v}.4b[{j}]",
            sum = inout(vreg) sum,
            w = in(vreg) w,
            x = in(vreg) x,
            j = const J,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    sum
}

tile_doors!(Quad<Sdot>, #[target_feature(enable = "neon,dotprod")]);

/// Overlays what this tier does better.
pub(super) fn install(k: &mut Kernels) {
    install_tiles(k);
}
