//! Float weights (F32, F16, BF16) and the one float dot product of the program.

use super::search::Search;
use super::{Act, Block, Encode};
use half::{bf16, f16};

/// Partial sums of a float reduction. Element `i` goes to lane `i % 16`, so AVX-512 (one register),
/// AVX2 (two), NEON (four) and scalar code add in the same order.
pub const LANES: usize = 16;

/// Sixteen floats as a tier holds them. Implementations differ in instructions, never in a bit.
pub trait Lanes: Copy {
    /// Whether it is one register of 32 that a tier has, so that much can be kept in registers.
    const WIDE: bool = false;

    /// All lanes the same.
    fn splat(x: f32) -> Self;
    /// From 16 floats.
    fn load(x: &[f32; LANES]) -> Self;
    /// From 16 f16, widened (exact).
    fn load_f16(x: &[f16; LANES]) -> Self;
    /// From 16 bf16, widened (exact).
    fn load_bf16(x: &[bf16; LANES]) -> Self;
    /// To 16 floats.
    fn store(self, x: &mut [f32; LANES]);
    /// `self · b + c`, rounded once.
    fn mul_add(self, b: Self, c: Self) -> Self;
    /// The larger of each two lanes: `other`'s where it is larger.
    fn max(self, other: Self) -> Self;
    /// The largest lane, in the tree of [`Lanes::fold`].
    #[inline(always)]
    fn fold_max(self) -> f32 {
        let mut s = [0.0; LANES];
        self.store(&mut s);
        fold_max(s)
    }
    /// Brings memory nearer that will be wanted soon. May do nothing; any address will do.
    #[inline(always)]
    fn fetch(_at: *const u8) {}
    /// The sum of all lanes in the fixed tree 16 → 8 → 4 → 2 → 1, always upper half onto lower half.
    #[inline(always)]
    fn fold(self) -> f32 {
        let mut s = [0.0; LANES];
        self.store(&mut s);
        fold(s)
    }
}

/// The definition of [`Lanes::fold`].
#[inline(always)]
pub fn fold(mut s: [f32; LANES]) -> f32 {
    for half in [8, 4, 2, 1] {
        for i in 0..half {
            s[i] += s[i + half];
        }
    }
    s[0]
}

/// The definition of [`Lanes::fold_max`].
#[inline(always)]
pub fn fold_max(mut s: [f32; LANES]) -> f32 {
    for half in [8, 4, 2, 1] {
        for i in 0..half {
            let other = s[i + half];
            s[i] = if other > s[i] { other } else { s[i] };
        }
    }
    s[0]
}

/// The definition of [`Lanes`].
impl Lanes for [f32; LANES] {
    #[inline(always)]
    fn splat(x: f32) -> Self {
        [x; LANES]
    }
    #[inline(always)]
    fn load(x: &[f32; LANES]) -> Self {
        *x
    }
    #[inline(always)]
    fn load_f16(x: &[f16; LANES]) -> Self {
        x.map(Element::widen)
    }
    #[inline(always)]
    fn load_bf16(x: &[bf16; LANES]) -> Self {
        x.map(Element::widen)
    }
    #[inline(always)]
    fn store(self, x: &mut [f32; LANES]) {
        *x = self;
    }
    #[inline(always)]
    fn mul_add(mut self, b: Self, c: Self) -> Self {
        for i in 0..LANES {
            self[i] = self[i].mul_add(b[i], c[i]);
        }
        self
    }
    #[inline(always)]
    fn max(mut self, other: Self) -> Self {
        for i in 0..LANES {
            self[i] = if other[i] > self[i] {
                other[i]
            } else {
                self[i]
            };
        }
        self
    }
}

/// A type of numbers that widens to `f32` exactly.
pub trait Element: Copy + Send + Sync {
    /// One number.
    fn widen(self) -> f32;
    /// Sixteen.
    fn load<L: Lanes>(x: &[Self; LANES]) -> L;
}

impl Element for f32 {
    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }
    #[inline(always)]
    fn load<L: Lanes>(x: &[f32; LANES]) -> L {
        L::load(x)
    }
}

impl Element for f16 {
    /// Without branches: the exponent is moved up by a multiplication, which also normalises
    /// subnormals; infinity and NaN get the full exponent back.
    #[inline(always)]
    fn widen(self) -> f32 {
        let bits = self.to_bits() as u32;
        let magnitude = (bits & 0x7fff) << 13;
        let scaled = f32::from_bits(magnitude) * f32::from_bits(0x7780_0000); // 2^112
        let special = if magnitude >= 0x0f80_0000 {
            0x7f80_0000
        } else {
            0
        };
        f32::from_bits(scaled.to_bits() | special | (bits & 0x8000) << 16)
    }
    #[inline(always)]
    fn load<L: Lanes>(x: &[f16; LANES]) -> L {
        L::load_f16(x)
    }
}

impl Element for bf16 {
    /// BF16 is the upper half of an F32.
    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from_bits((self.to_bits() as u32) << 16)
    }
    #[inline(always)]
    fn load<L: Lanes>(x: &[bf16; LANES]) -> L {
        L::load_bf16(x)
    }
}

/// `Σ rows[r][i] · x[i]` for N rows at once (so that N chains of additions hide each other's latency):
/// fused into 16 partial sums, then folded. A tail of fewer than 16 elements goes to the first lanes.
///
/// # Panics
/// If a row is shorter than `x`.
#[inline(always)]
pub fn dots<L: Lanes, E: Element, const N: usize>(rows: [&[E]; N], x: &[f32]) -> [f32; N] {
    let mut s = [L::splat(0.0); N];
    let (x16, x_tail) = x.as_chunks::<LANES>();
    let rows16 = rows.map(|row| &row[..x.len()].as_chunks::<LANES>().0[..x16.len()]);
    for (i, x) in x16.iter().enumerate() {
        let x = L::load(x);
        for r in 0..N {
            s[r] = E::load::<L>(&rows16[r][i]).mul_add(x, s[r]);
        }
    }
    let mut out = [0.0; N];
    for r in 0..N {
        if !x_tail.is_empty() {
            let mut lanes = [0.0; LANES];
            s[r].store(&mut lanes);
            let tail = &rows[r][x.len() - x_tail.len()..];
            for (i, (w, x)) in tail.iter().zip(x_tail).enumerate() {
                lanes[i] = w.widen().mul_add(*x, lanes[i]);
            }
            s[r] = L::load(&lanes);
        }
        out[r] = s[r].fold();
    }
    out
}

/// [`dots`] of one row.
#[inline(always)]
pub fn dot<L: Lanes, E: Element>(row: &[E], x: &[f32]) -> f32 {
    dots::<L, E, 1>([row], x)[0]
}

/// `y = fma(a, x, y)`. `x`, `y`: `(n)`.
#[inline(always)]
pub fn axpy<L: Lanes, E: Element>(a: f32, x: &[E], y: &mut [f32]) {
    let (x16, x_tail) = x.as_chunks::<LANES>();
    let (y16, y_tail) = y.as_chunks_mut::<LANES>();
    for (x, y) in x16.iter().zip(y16) {
        L::splat(a).mul_add(E::load::<L>(x), L::load(y)).store(y);
    }
    for (x, y) in x_tail.iter().zip(y_tail) {
        *y = a.mul_add(x.widen(), *y);
    }
}

/// Float formats: a block is one weight, and the definition of the dot product is [`dot`] over plain arrays.
macro_rules! float_blocks {
    ($($float:ty)*) => { $(
        impl Block for $float {
            const WEIGHTS: usize = 1;

            fn decode(&self, out: &mut [f32]) {
                out[0] = self.widen();
            }

            #[inline(always)]
            fn dot(row: &[$float], x: Act<'_>) -> f32 {
                dot::<[f32; LANES], $float>(row, x.floats())
            }
        }
    )* };
}
float_blocks!(f32 f16 bf16);

impl Encode for f32 {
    fn encode_row<S: Search>(x: &[f32], _importance: Option<&[f32]>, out: &mut [f32]) {
        out.copy_from_slice(x);
    }
}

impl Encode for f16 {
    fn encode_row<S: Search>(x: &[f32], _importance: Option<&[f32]>, out: &mut [f16]) {
        for (x, out) in x.iter().zip(out) {
            *out = f16::from_f32_const(*x);
        }
    }
}

impl Encode for bf16 {
    fn encode_row<S: Search>(x: &[f32], _importance: Option<&[f32]>, out: &mut [bf16]) {
        for (x, out) in x.iter().zip(out) {
            *out = bf16::from_f32_const(*x);
        }
    }
}
