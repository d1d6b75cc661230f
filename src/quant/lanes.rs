//! `G` floats that are worked on side by side, as plain arrays.
//!
//! Every operation is a loop over the lanes and nothing else, the form that a compiler turns into
//! vector instructions of whatever CPU it compiles for. Each lane is computed as a scalar would be, bit
//! for bit: nothing is fused, nothing is summed across lanes.

use super::bits::nearest;
use std::ops::{Add, BitAnd, Div, Mul, Sub};

/// `G` floats.
#[derive(Clone, Copy, Debug, PartialEq)]
#[repr(C, align(16))]
pub struct Lanes<const G: usize>(pub [f32; G]);

/// A yes or no for each of `G` lanes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Mask<const G: usize>(pub [bool; G]);

impl<const G: usize> Lanes<G> {
    /// Zeros.
    pub const ZERO: Lanes<G> = Lanes([0.0; G]);

    /// The same in every lane.
    #[inline(always)]
    pub fn all(x: f32) -> Self {
        Lanes([x; G])
    }

    /// Lanes `P · b` to `P · (b + 1)`.
    ///
    /// # Panics
    /// If there are not so many.
    #[inline(always)]
    pub fn part<const P: usize>(self, b: usize) -> [f32; P] {
        self.0.as_chunks().0[b]
    }

    #[inline(always)]
    fn zip(self, other: Self, f: impl Fn(f32, f32) -> f32) -> Self {
        let mut out = [0.0; G];
        for g in 0..G {
            out[g] = f(self.0[g], other.0[g]);
        }
        Lanes(out)
    }

    #[inline(always)]
    fn map(self, f: impl Fn(f32) -> f32) -> Self {
        let mut out = [0.0; G];
        for g in 0..G {
            out[g] = f(self.0[g]);
        }
        Lanes(out)
    }

    #[inline(always)]
    fn compare(self, other: Self, f: impl Fn(f32, f32) -> bool) -> Mask<G> {
        let mut out = [false; G];
        for g in 0..G {
            out[g] = f(self.0[g], other.0[g]);
        }
        Mask(out)
    }

    /// `self < other`.
    #[inline(always)]
    pub fn lt(self, other: Self) -> Mask<G> {
        self.compare(other, |a, b| a < b)
    }

    /// `self > other`.
    #[inline(always)]
    pub fn gt(self, other: Self) -> Mask<G> {
        self.compare(other, |a, b| a > b)
    }

    /// `self == other`.
    #[inline(always)]
    pub fn eq(self, other: Self) -> Mask<G> {
        self.compare(other, |a, b| a == b)
    }

    /// `self != other`.
    #[inline(always)]
    pub fn ne(self, other: Self) -> Mask<G> {
        self.compare(other, |a, b| a != b)
    }

    /// Magnitudes.
    #[inline(always)]
    pub fn abs(self) -> Self {
        self.map(f32::abs)
    }

    /// Square roots.
    #[inline(always)]
    pub fn sqrt(self) -> Self {
        self.map(f32::sqrt)
    }

    /// The [`nearest`] integers within `low..=high`.
    #[inline(always)]
    pub fn round_within(self, low: i32, high: i32) -> Self {
        self.map(|x| nearest(x).min(high).max(low) as f32)
    }
}

impl<const G: usize> Mask<G> {
    /// `yes` where this holds, `no` elsewhere.
    #[inline(always)]
    pub fn select(self, yes: Lanes<G>, no: Lanes<G>) -> Lanes<G> {
        let mut out = [0.0; G];
        for g in 0..G {
            out[g] = if self.0[g] { yes.0[g] } else { no.0[g] };
        }
        Lanes(out)
    }

    /// Whether any lane holds.
    #[inline(always)]
    pub fn any(self) -> bool {
        self.0.iter().fold(false, |a, &b| a | b)
    }
}

impl<const G: usize> BitAnd for Mask<G> {
    type Output = Self;

    #[inline(always)]
    fn bitand(self, other: Self) -> Self {
        let mut out = [false; G];
        for g in 0..G {
            out[g] = self.0[g] & other.0[g];
        }
        Mask(out)
    }
}

macro_rules! elementwise {
    ($( $trait:ident $name:ident $op:tt; )*) => { $(
        impl<const G: usize> $trait for Lanes<G> {
            type Output = Self;

            #[inline(always)]
            fn $name(self, other: Self) -> Self {
                self.zip(other, |a, b| a $op b)
            }
        }
    )* };
}

elementwise! {
    Add add +;
    Sub sub -;
    Mul mul *;
    Div div /;
}
