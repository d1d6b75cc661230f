//! The float helpers, written once.
//!
//! Each is a plain loop that a compiler vectorizes. A tier compiles the same body with its own
//! instructions (the `float_doors!` macro below), so all tiers do the same operations in the same
//! order: elementwise helpers are unfused, reductions go through 16 partial sums and a fixed tree
//! ([`crate::quant::float`]), and nothing calls the platform's math library.

use crate::quant::float::{LANES, dot_with, fold};
use half::f16;

/// How a tier widens f16; exact, so every way gives the same bits (of numbers; not of NaN payloads).
pub trait Half {
    /// 16 values.
    fn widen(h: &[f16; LANES]) -> [f32; LANES];
}

/// [`Half`] with integer operations only.
pub struct Portable;

impl Half for Portable {
    #[inline(always)]
    fn widen(h: &[f16; LANES]) -> [f32; LANES] {
        h.map(widen)
    }
}

/// One f16 as f32, without branches: the exponent is moved up by a multiplication, which also
/// normalises subnormals; infinity and NaN get the full exponent back.
#[inline(always)]
pub fn widen(h: f16) -> f32 {
    let bits = h.to_bits() as u32;
    let magnitude = (bits & 0x7fff) << 13;
    let scaled = f32::from_bits(magnitude) * f32::from_bits(0x7780_0000); // 2^112
    let special = if magnitude >= 0x0f80_0000 { 0x7f80_0000 } else { 0 };
    f32::from_bits(scaled.to_bits() | special | (bits & 0x8000) << 16)
}

/// An element of the KV cache.
pub trait KvElement: Copy + Send + Sync {
    /// 16 elements as floats.
    fn widen16<H: Half>(e: &[Self; LANES]) -> [f32; LANES];
    /// One element as a float.
    fn widen1(self) -> f32;
}

impl KvElement for f32 {
    #[inline(always)]
    fn widen16<H: Half>(e: &[f32; LANES]) -> [f32; LANES] {
        *e
    }
    #[inline(always)]
    fn widen1(self) -> f32 {
        self
    }
}

impl KvElement for f16 {
    #[inline(always)]
    fn widen16<H: Half>(e: &[f16; LANES]) -> [f32; LANES] {
        H::widen(e)
    }
    #[inline(always)]
    fn widen1(self) -> f32 {
        widen(self)
    }
}

/// `e^x`, for x in -87..=88 within 2 ulp; below that 0, above that `e^88`.
///
/// Range reduction by ln 2 in two parts and the degree-6 polynomial of Cephes `expf` (S. Moshier),
/// unfused. The rounding constant is 1.5·2²³, see [`crate::quant::act::quantize`].
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0;
    let clamped = if x > 88.0 { 88.0 } else { x };
    let clamped = if clamped < -87.0 { -87.0 } else { clamped };
    let rounded = clamped * std::f32::consts::LOG2_E + ROUND;
    let n = rounded - ROUND;
    let r = (clamped - n * 0.693_359_4) - n * -2.121_944_4e-4;
    let mut p = 1.987_569_2e-4;
    for c in [1.398_2e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 5.000_000_1e-1] {
        p = p * r + c;
    }
    let y = (p * (r * r) + r) + 1.0;
    let scale = f32::from_bits((rounded.to_bits() << 23).wrapping_add(0x3f80_0000)); // 2^n
    if x < -87.0 { 0.0 } else { y * scale }
}

/// `y = x / sqrt(mean(x²) + eps) · w`. All `(n)`.
#[inline(always)]
pub fn rms_norm(x: &[f32], w: &[f32], eps: f32, y: &mut [f32]) {
    let mean = crate::quant::float::dot(x, x) / x.len() as f32;
    let scale = 1.0 / (mean + eps).sqrt();
    for ((y, x), w) in y.iter_mut().zip(x).zip(w) {
        *y = x * scale * w;
    }
}

/// `y += x`. Both `(n)`.
#[inline(always)]
pub fn add(x: &[f32], y: &mut [f32]) {
    for (y, x) in y.iter_mut().zip(x) {
        *y += x;
    }
}

/// `y += a·x`, unfused. `x`, `y`: `(n)`.
#[inline(always)]
pub fn add_scaled(a: f32, x: &[f32], y: &mut [f32]) {
    for (y, x) in y.iter_mut().zip(x) {
        *y += a * x;
    }
}

/// `gate = silu(gate) · up`, `silu(g) = g / (1 + e^-g)`. Both `(n)`.
#[inline(always)]
pub fn silu_mul(gate: &mut [f32], up: &[f32]) {
    for (g, u) in gate.iter_mut().zip(up) {
        *g = *g / (1.0 + exp(-*g)) * u;
    }
}

/// Rotates the interleaved pairs `(x[2i], x[2i + 1])` of one head by angle `i`.
///
/// `x`: `(n_rot)`; `cos`, `sin`: `(n_rot / 2)`.
#[inline(always)]
pub fn rope(x: &mut [f32], cos: &[f32], sin: &[f32]) {
    for ((pair, c), s) in x.chunks_exact_mut(2).zip(cos).zip(sin) {
        let (a, b) = (pair[0], pair[1]);
        pair[0] = a * c - b * s;
        pair[1] = a * s + b * c;
    }
}

/// Running softmax of one query head: the largest score so far and the sum of the weights.
#[derive(Clone, Copy, Debug)]
pub struct Running {
    /// Largest score.
    pub max: f32,
    /// Sum of `e^(score - max)`.
    pub sum: f32,
}

impl Running {
    /// Before any key.
    pub const START: Running = Running { max: f32::NEG_INFINITY, sum: 0.0 };
}

/// One block of attention for the query heads that share a KV head (FlashAttention's update,
/// Dao et al. 2022): the block's scores, the running softmax, the weighted sum of values.
///
/// Blocks start at fixed absolute positions and come in order, so the result for a query depends on
/// its keys alone and not on how the tokens were batched.
///
/// `q`: `(heads, dim)`, already scaled; `k`, `v`: `(n, dim)`; `run`: `(heads)`; `acc`: `(heads, dim)`;
/// `n` is at most [`KV_BLOCK`].
#[inline(always)]
pub fn attend<H: Half, T: KvElement>(
    q: &[f32],
    k: &[T],
    v: &[T],
    dim: usize,
    run: &mut [Running],
    acc: &mut [f32],
) {
    for ((q, run), acc) in q.chunks_exact(dim).zip(run).zip(acc.chunks_exact_mut(dim)) {
        let n = k.len() / dim;
        let mut p = [0.0f32; KV_BLOCK];
        let p = &mut p[..n];
        let mut max = run.max;
        for (p, k) in p.iter_mut().zip(k.chunks_exact(dim)) {
            *p = dot_with(k, q, T::widen16::<H>, T::widen1);
            max = if *p > max { *p } else { max };
        }
        let keep = exp(run.max - max);
        let mut sums = [0.0f32; LANES];
        for (i, p) in p.iter_mut().enumerate() {
            *p = exp(*p - max);
            sums[i % LANES] += *p;
        }
        *run = Running { max, sum: run.sum * keep + fold(sums) };
        for a in acc.iter_mut() {
            *a *= keep;
        }
        for (p, v) in p.iter().zip(v.chunks_exact(dim)) {
            axpy::<H, T>(*p, v, acc);
        }
    }
}

/// Positions in a block of the KV cache.
pub const KV_BLOCK: usize = 64;

/// `y = fma(a, x, y)`. `x`, `y`: `(n)`.
#[inline(always)]
fn axpy<H: Half, T: KvElement>(a: f32, x: &[T], y: &mut [f32]) {
    let (x16, x_tail) = x.as_chunks::<LANES>();
    let (y16, y_tail) = y.as_chunks_mut::<LANES>();
    for (x, y) in x16.iter().zip(y16) {
        let x = T::widen16::<H>(x);
        for i in 0..LANES {
            y[i] = a.mul_add(x[i], y[i]);
        }
    }
    for (x, y) in x_tail.iter().zip(y_tail) {
        *y = a.mul_add(x.widen1(), *y);
    }
}

/// Compiles every helper of this file, and the definition of every weight format, for one tier: plain
/// functions with the tier's `#[target_feature]`, and `install_common(k)`, which puts them into a
/// [`super::Kernels`] table. A format's own kernel, where a tier has one, is installed after it.
macro_rules! float_doors {
    ($half:ty $(, #[$tier:meta])?) => {
        use $crate::quant::{self, act, float as weights};
        use $crate::simd::float::{self, Running};
        use $crate::simd::{self, Kernels, MatMul, Rows, Tokens};
        use $crate::pool::Stripe;

        $(#[$tier])?
        fn quantize(block: usize, x: &[f32], qs: &mut [i8], d: &mut [f32], sums: &mut [i16]) {
            act::quantize(block, x, qs, d, sums)
        }
        $(#[$tier])?
        fn rms_norm(x: &[f32], w: &[f32], eps: f32, y: &mut [f32]) {
            float::rms_norm(x, w, eps, y)
        }
        $(#[$tier])?
        fn add(x: &[f32], y: &mut [f32]) {
            float::add(x, y)
        }
        $(#[$tier])?
        fn add_scaled(a: f32, x: &[f32], y: &mut [f32]) {
            float::add_scaled(a, x, y)
        }
        $(#[$tier])?
        fn silu_mul(gate: &mut [f32], up: &[f32]) {
            float::silu_mul(gate, up)
        }
        $(#[$tier])?
        fn rope(x: &mut [f32], cos: &[f32], sin: &[f32]) {
            float::rope(x, cos, sin)
        }
        $(#[$tier])?
        fn attend_f32(q: &[f32], k: &[f32], v: &[f32], dim: usize, run: &mut [Running], acc: &mut [f32]) {
            float::attend::<$half, f32>(q, k, v, dim, run, acc)
        }
        $(#[$tier])?
        fn attend_f16(q: &[f32], k: &[half::f16], v: &[half::f16], dim: usize, run: &mut [Running], acc: &mut [f32]) {
            float::attend::<$half, half::f16>(q, k, v, dim, run, acc)
        }
        $(#[$tier])?
        fn matmul_defined(w: Rows<'_>, x: Tokens<'_>, y: &mut Stripe<'_>) {
            simd::matmul_rows(w, x, y, |row, x| w.format.dot(row, x))
        }
        $(#[$tier])?
        fn matmul_f16(w: Rows<'_>, x: Tokens<'_>, y: &mut Stripe<'_>) {
            simd::matmul_rows(w, x, y, |row, x| {
                weights::dot_with(quant::blocks(row), x.floats(), <$half as float::Half>::widen, float::widen)
            })
        }

        /// Puts this tier's float helpers, and the definition of every weight format, into the table.
        fn install_common(k: &mut Kernels) {
            k.quantize = quantize;
            k.rms_norm = rms_norm;
            k.add = add;
            k.add_scaled = add_scaled;
            k.silu_mul = silu_mul;
            k.rope = rope;
            k.attend_f32 = attend_f32;
            k.attend_f16 = attend_f16;
            k.matmul = [matmul_defined as MatMul; quant::Format::COUNT];
            k.matmul[quant::Format::F16.index()] = matmul_f16;
        }
    };
}
pub(super) use float_doors;
