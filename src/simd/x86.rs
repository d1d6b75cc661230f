//! Products of bytes on x86-64, written once for registers of 256 and of 512 bits: with the instructions made for
//! them ([`Vnni`]), and without ([`Maddubs`]).

// Every `unsafe fn` of this file has the contract of `Tile`: the features of the tier are enabled, and pointers
// lead to as much as is said.
#![allow(unsafe_op_in_unsafe_fn)]

use super::tile::{Dot, Kind};

/// A register.
///
/// # Safety
/// See above.
pub(super) trait Register: Copy {
    /// The 4 bytes at `x` in every lane.
    unsafe fn spread(x: *const u8) -> Self;
}

/// Registers whose bytes `vpdpbusd` multiplies: unsigned ones with signed ones, four products added to a lane, without
/// saturation.
///
/// # Safety
/// See above.
pub(super) trait Fused: Register {
    /// [`Dot::TOKENS`]
    const TOKENS: usize;
    /// [`Dot::PANELS`]: two where there is room for twice as many sums.
    const PANELS: usize;
    /// `sum + Σ_4 w · x`; `w`: u8, `x`: i8.
    unsafe fn dpbusd(sum: Self, w: Self, x: Self) -> Self;
    /// `sum + Σ_2 a · b`, of i16.
    unsafe fn dpwssd(sum: Self, a: Self, b: Self) -> Self;
}

/// Weights are the unsigned side, raised by their format's offset; it leaves through the sums of the activations,
/// `Σ (q + o)·x - o·Σ x`, which is exact too.
#[derive(Clone, Copy)]
pub(super) struct Vnni;

impl<I: Fused> Dot<I> for Vnni {
    const PANELS: usize = I::PANELS;
    const TOKENS: usize = I::TOKENS;
    /// One instruction, where a product of 32 bits takes three.
    const NARROW: bool = true;

    #[inline(always)]
    fn bias(offset: i32) -> i32 {
        offset
    }
    #[inline(always)]
    unsafe fn dot<K: Kind, const N: usize, const R: usize, const C: usize>(
        sums: &mut [[I; N]; R],
        w: [[I; C]; R],
        x: [*const i8; N],
    ) {
        for j in 0..C {
            for t in 0..N {
                let x = I::spread(x[t].cast::<u8>().add(4 * j));
                for r in 0..R {
                    sums[r][t] = I::dpbusd(sums[r][t], w[r][j], x);
                }
            }
        }
    }
    #[inline(always)]
    unsafe fn pair(acc: I, a: I, b: I) -> I {
        I::dpwssd(acc, a, b)
    }
}

/// Registers whose bytes `vpmaddubsw` multiplies: unsigned ones with signed ones, pairs of products added in i16, with
/// saturation.
///
/// # Safety
/// See above.
pub(super) trait Pairs: Register {
    /// [`Dot::TOKENS`]: how many sums of pairs there is room for.
    const TOKENS: usize;
    /// `Σ_2 w · x` in i16; `w`: u8, `x`: i8.
    unsafe fn maddubs(w: Self, x: Self) -> Self;
    /// `Σ_2 w · x` in i16; `w`: i8, -128 among them, `x`: i8 from -127 on.
    unsafe fn signed(w: Self, x: Self) -> Self;
    /// The sum of i16.
    unsafe fn add_i16(a: Self, b: Self) -> Self;
    /// `sum + Σ_2 a · b`, of i16.
    unsafe fn madd(sum: Self, a: Self, b: Self) -> Self;
}

/// As many pairs are added in i16 as fit, so that nothing saturates and the sums are exact. Where a scale follows them, its
/// multiplication adds the two of a lane up, which else needs one by 1.
#[derive(Clone, Copy)]
pub(super) struct Maddubs;

impl<I: Pairs> Dot<I> for Maddubs {
    const TOKENS: usize = I::TOKENS;
    const NARROW: bool = true;
    const HALVES: bool = true;

    /// 8-bit weights stay signed: as unsigned ones they would saturate.
    #[inline(always)]
    fn bias(offset: i32) -> i32 {
        if offset == 128 { 0 } else { offset }
    }
    #[inline(always)]
    unsafe fn dot<K: Kind, const N: usize, const R: usize, const C: usize>(
        sums: &mut [[I; N]; R],
        w: [[I; C]; R],
        x: [*const i8; N],
    ) {
        // Pairs that fit i16 together: 15 · 127 · 2 eight times, 63 · 127 · 2 twice, 128 · 127 · 2 once.
        let together = match K::BITS {
            ..=4 => 4,
            5..=6 => 2,
            _ => 1,
        };
        if !K::WHOLE {
            for (sums, w) in sums.iter_mut().zip(w) {
                for j in 0..C {
                    for t in 0..N {
                        let pairs = product::<I, K>(w[j], x[t].add(4 * j));
                        sums[t] = I::add_i16(sums[t], pairs);
                    }
                }
            }
            return;
        }
        let one = I::spread([1u8, 0, 1, 0].as_ptr());
        for (sums, w) in sums.iter_mut().zip(w) {
            for first in (0..C).step_by(together) {
                let mut pairs = [one; N];
                for t in 0..N {
                    pairs[t] = product::<I, K>(w[first], x[t].add(4 * first));
                }
                for j in first + 1..C.min(first + together) {
                    for t in 0..N {
                        pairs[t] = I::add_i16(pairs[t], product::<I, K>(w[j], x[t].add(4 * j)));
                    }
                }
                for t in 0..N {
                    sums[t] = I::madd(sums[t], pairs[t], one);
                }
            }
        }
    }
    #[inline(always)]
    unsafe fn pair(acc: I, a: I, b: I) -> I {
        I::madd(acc, a, b)
    }
}

/// The products of 4 activations, pairs of them added.
#[inline(always)]
unsafe fn product<I: Pairs, K: Kind>(w: I, x: *const i8) -> I {
    let x = I::spread(x.cast());
    match K::BITS {
        8 => I::signed(w, x),
        _ => I::maddubs(w, x),
    }
}
