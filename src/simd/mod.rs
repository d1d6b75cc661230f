//! Faster ways to say what `quant/` says.
//!
//! A [`Tier`] is a set of CPU instructions; [`TIERS`] has one row for each. The [`Kernels`] table of a
//! tier starts as the scalar one and is overlaid by every lower tier that the CPU has, so a tier
//! holds only what it does better. All tables give the same bits (`check.rs`).

#[cfg(target_arch = "x86_64")]
mod amx;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "x86_64")]
mod avx512bw;
#[cfg(target_arch = "x86_64")]
mod avxvnni;
#[cfg(test)]
mod check;
#[cfg(target_arch = "aarch64")]
mod dotprod;
pub mod encode;
pub mod float;
#[cfg(target_arch = "aarch64")]
mod neon;
mod scalar;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
mod tile;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
mod unpack;
#[cfg(target_arch = "x86_64")]
mod x86;

use crate::pool::Stripe;
use crate::quant::Format;
use crate::quant::act::{Act, ActKind, Acts, Chunk};
use float::{Pane, Query};
use half::f16;
use std::sync::OnceLock;

/// Most rows that go through a chunk of activations together, in any tier.
const TOGETHER: usize = 64;
/// With fewer tokens all their activations stay in the near caches, and rows are best read a few after the others.
const MANY: usize = 32;

/// What rows of a task are best a multiple of for so many tokens: those that share what is done for a chunk of activations.
pub fn rows_together(n_tok: usize) -> usize {
    match n_tok {
        ..MANY => TOGETHER / 2,
        _ => TOGETHER,
    }
}

/// A set of CPU instructions, slower ones first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Tier {
    /// Whatever the compiler's baseline is.
    Scalar,
    /// x86-64 with AVX2, FMA and F16C (2013 and later).
    Avx2,
    /// The same with AVX-VNNI (Alder Lake, Zen 5 and later).
    AvxVnni,
    /// x86-64 with AVX-512 F, BW, VL and DQ (Skylake-X).
    Avx512Bw,
    /// The same with VNNI (Cascade Lake, Ice Lake, Zen 4 and later).
    Avx512,
    /// The same with AMX for int8 (Sapphire Rapids and later), on Linux.
    Amx,
    /// aarch64.
    Neon,
    /// The same with DotProd (ARMv8.2: Cortex-A75, Neoverse N1, Apple M1 and later).
    DotProd,
}

/// What [`TIERS`] says of a tier.
pub struct TierRow {
    /// The tier.
    pub tier: Tier,
    /// Its name for `--isa` and for people.
    pub name: &'static str,
    /// Asks the CPU.
    detect: fn() -> bool,
    /// Overlays the table with what this tier does better.
    install: fn(&mut Kernels),
}

/// One row per tier that this program was compiled with, in ascending order.
pub const TIERS: &[TierRow] = &[
    TierRow {
        tier: Tier::Scalar,
        name: "scalar",
        detect: || true,
        install: scalar::install,
    },
    #[cfg(target_arch = "x86_64")]
    TierRow {
        tier: Tier::Avx2,
        name: "avx2",
        detect: avx2::detect,
        install: avx2::install,
    },
    #[cfg(target_arch = "x86_64")]
    TierRow {
        tier: Tier::AvxVnni,
        name: "avxvnni",
        detect: avxvnni::detect,
        install: avxvnni::install,
    },
    #[cfg(target_arch = "x86_64")]
    TierRow {
        tier: Tier::Avx512Bw,
        name: "avx512bw",
        detect: avx512bw::detect,
        install: avx512bw::install,
    },
    #[cfg(target_arch = "x86_64")]
    TierRow {
        tier: Tier::Avx512,
        name: "avx512",
        detect: avx512::detect,
        install: avx512::install,
    },
    #[cfg(target_arch = "x86_64")]
    TierRow {
        tier: Tier::Amx,
        name: "amx",
        detect: amx::detect,
        install: amx::install,
    },
    #[cfg(target_arch = "aarch64")]
    TierRow {
        tier: Tier::Neon,
        name: "neon",
        detect: neon::detect,
        install: neon::install,
    },
    #[cfg(target_arch = "aarch64")]
    TierRow {
        tier: Tier::DotProd,
        name: "dotprod",
        detect: dotprod::detect,
        install: dotprod::install,
    },
];

/// The tiers that this CPU has, in ascending order; `Scalar` is always there.
pub fn available() -> Vec<Tier> {
    TIERS
        .iter()
        .filter(|row| (row.detect)())
        .map(|row| row.tier)
        .collect()
}

/// The best tier that this CPU has, at most `cap`.
pub fn best(cap: Option<Tier>) -> Tier {
    let tiers = available();
    tiers
        .iter()
        .copied()
        .filter(|t| cap.is_none_or(|cap| *t <= cap))
        .max()
        .unwrap_or(Tier::Scalar)
}

impl Tier {
    /// The tier's name.
    pub fn name(self) -> &'static str {
        TIERS
            .iter()
            .find(|row| row.tier == self)
            .map_or("", |row| row.name)
    }
}

/// Some rows of a weight matrix: `(n, k)` in one format, as they lie in the file.
#[derive(Clone, Copy)]
pub struct Rows<'a> {
    /// The format.
    pub format: Format,
    /// `n · row_bytes(k)` bytes.
    pub bytes: &'a [u8],
    /// Weights in a row.
    pub k: usize,
}

impl<'a> Rows<'a> {
    /// Bytes of a row.
    pub fn row_bytes(&self) -> usize {
        self.format.row_bytes(self.k)
    }

    /// Rows.
    pub fn len(&self) -> usize {
        self.bytes.len() / self.row_bytes()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }
}

/// The tokens of a product: rows of some activations, picked by index, so that a few tokens of an expert need not be copied
/// together. Many are better side by side, one index after the other.
#[derive(Clone, Copy)]
pub struct Tokens<'a> {
    /// All activations.
    pub acts: &'a Acts,
    /// Which of them.
    pub pick: &'a [u32],
}

impl<'a> Tokens<'a> {
    /// Tokens.
    pub fn len(&self) -> usize {
        self.pick.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.pick.is_empty()
    }

    /// The `i`-th picked token.
    pub fn token(&self, i: usize) -> Act<'a> {
        self.acts.token(self.pick[i] as usize)
    }
}

/// `y[t][r] = Σ_k w[r][k] · x[t][k]`: `w (n, k)`, `x (n_tok, k)`, `y (n_tok, n)`.
///
/// Unsafe to call because it may need a tier's instructions; [`Kernels`] only ever holds those of a
/// tier that was detected.
pub type MatMul = unsafe fn(w: Rows<'_>, x: Tokens<'_>, y: &mut Stripe<'_>);

type Quantize = unsafe fn(block: usize, x: &[f32], out: &mut Chunk);
type Widen = unsafe fn(q: &[i8], d: &[f16], out: &mut [f32]);
type Attend<T> = unsafe fn(queries: &mut [Query<'_>], pane: Pane<'_, T>, ahead: Pane<'_, u8>);

/// The loop nest of what has no kernel of its own: rows outside, so that a row is read from memory
/// once. `dot` is a row's dot product with one token.
#[inline(always)]
fn matmul_rows(
    w: Rows<'_>,
    x: Tokens<'_>,
    y: &mut Stripe<'_>,
    dot: impl Fn(&[u8], Act<'_>) -> f32,
) {
    for (r, row) in w.bytes.chunks_exact(w.row_bytes()).enumerate() {
        for t in 0..x.len() {
            y.row(t)[r] = dot(row, x.token(t));
        }
    }
}

/// The last rows, from `first` on, of a kernel that works in groups: by the definition.
#[cfg_attr(
    not(any(target_arch = "x86_64", target_arch = "aarch64")),
    allow(dead_code)
)]
fn matmul_rest(w: Rows<'_>, first: usize, x: Tokens<'_>, y: &mut Stripe<'_>) {
    for (r, row) in w.bytes.chunks_exact(w.row_bytes()).enumerate().skip(first) {
        for t in 0..x.len() {
            y.row(t)[r] = w.format.dot(row, x.token(t));
        }
    }
}

/// The functions of a tier. Each field is described at the method that calls it.
#[derive(Clone)]
pub struct Kernels {
    tier: Tier,
    matmul: [MatMul; Format::COUNT],
    quantize: Quantize,
    rms_norm: unsafe fn(&[f32], &[f32], f32, &mut [f32]),
    add: unsafe fn(&[f32], &mut [f32]),
    add_scaled: unsafe fn(f32, &[f32], &mut [f32]),
    silu_mul: unsafe fn(&mut [f32], &[f32]),
    rope: unsafe fn(&mut [f32], &[f32], &[f32]),
    attend_f32: Attend<f32>,
    attend_f16: Attend<f16>,
    widen: unsafe fn(&[f16], &mut [f32]),
    widen_keys: Widen,
    widen_values: Widen,
    products: unsafe fn(&[u8], &[[i8; 4]; 16]) -> i32,
}

impl Kernels {
    /// The table of `tier`, or of the best lower tier that this CPU has.
    pub fn of(tier: Tier) -> &'static Kernels {
        static TABLES: OnceLock<Vec<Kernels>> = OnceLock::new();
        let tables = TABLES.get_or_init(|| {
            let mut table = scalar::table();
            TIERS
                .iter()
                .filter(|row| (row.detect)())
                .map(|row| {
                    (row.install)(&mut table);
                    table.tier = row.tier;
                    table.clone()
                })
                .collect()
        });
        tables
            .iter()
            .rev()
            .find(|k| k.tier <= tier)
            .expect("the scalar tier is always there")
    }

    /// The tier these are of.
    pub fn tier(&self) -> Tier {
        self.tier
    }

    // SAFETY of every `unsafe` below: `Kernels::of` overlays a tier's functions only after its
    // `detect` has found the instructions on this CPU; apart from instructions they are safe.

    /// `y[t][r] = Σ_k w[r][k] · x[t][k]`: `w (n, k)`, `x (n_tok, k)`, `y (n_tok, n)`.
    ///
    /// # Panics
    /// If shapes or the kind of activations do not belong together.
    pub fn matmul(&self, w: Rows<'_>, x: Tokens<'_>, y: &mut Stripe<'_>) {
        assert!(w.k == x.acts.k() && w.format.act() == x.acts.kind());
        assert!(
            w.len() == y.width() && w.len() * w.row_bytes() == w.bytes.len() && x.len() <= y.rows()
        );
        // SAFETY: see above.
        unsafe { (self.matmul[w.format.index()])(w, x, y) }
    }

    /// Quantizes up to 256 of a token's activations to int8 ([`crate::quant::act::quantize`]).
    ///
    /// # Panics
    /// If they are more.
    pub fn quantize(&self, kind: ActKind, x: &[f32], out: &mut Chunk) {
        assert!(x.len() <= out.qs.len());
        // SAFETY: see above.
        unsafe { (self.quantize)(kind.block(), x, out) }
    }

    /// [`float::rms_norm`].
    pub fn rms_norm(&self, x: &[f32], w: &[f32], eps: f32, y: &mut [f32]) {
        // SAFETY: see above.
        unsafe { (self.rms_norm)(x, w, eps, y) }
    }

    /// [`float::add`].
    pub fn add(&self, x: &[f32], y: &mut [f32]) {
        // SAFETY: see above.
        unsafe { (self.add)(x, y) }
    }

    /// [`float::add_scaled`].
    pub fn add_scaled(&self, a: f32, x: &[f32], y: &mut [f32]) {
        // SAFETY: see above.
        unsafe { (self.add_scaled)(a, x, y) }
    }

    /// [`float::silu_mul`].
    pub fn silu_mul(&self, gate: &mut [f32], up: &[f32]) {
        // SAFETY: see above.
        unsafe { (self.silu_mul)(gate, up) }
    }

    /// [`float::rope`].
    pub fn rope(&self, x: &mut [f32], cos: &[f32], sin: &[f32]) {
        // SAFETY: see above.
        unsafe { (self.rope)(x, cos, sin) }
    }

    /// [`float::attend`] over an f32 cache.
    pub fn attend_f32(&self, queries: &mut [Query<'_>], pane: Pane<'_, f32>, ahead: Pane<'_, u8>) {
        // SAFETY: see above.
        unsafe { (self.attend_f32)(queries, pane, ahead) }
    }

    /// [`float::attend`] over an f16 cache.
    pub fn attend_f16(&self, queries: &mut [Query<'_>], pane: Pane<'_, f16>, ahead: Pane<'_, u8>) {
        // SAFETY: see above.
        unsafe { (self.attend_f16)(queries, pane, ahead) }
    }

    /// [`float::widen`].
    ///
    /// # Panics
    /// If they are not as many.
    pub fn widen(&self, x: &[f16], out: &mut [f32]) {
        assert_eq!(x.len(), out.len());
        // SAFETY: see above.
        unsafe { (self.widen)(x, out) }
    }

    /// [`float::widen_keys`].
    ///
    /// # Panics
    /// If lengths do not belong together.
    pub fn widen_keys(&self, q: &[i8], d: &[f16], out: &mut [f32]) {
        assert!(q.len() == out.len() && q.len() == 32 * d.len());
        // SAFETY: see above.
        unsafe { (self.widen_keys)(q, d, out) }
    }

    /// [`float::widen_values`].
    ///
    /// # Panics
    /// If lengths do not belong together.
    pub fn widen_values(&self, q: &[i8], d: &[f16], out: &mut [f32]) {
        assert!(q.len() == out.len() && q.len() == 32 * d.len());
        // SAFETY: see above.
        unsafe { (self.widen_values)(q, d, out) }
    }

    /// `Σ_t Σ_i w[i] · x[t][i % 4]`, wrapping: the products that [`Kernels::matmul`] is made of, from the L1 cache and
    /// without unpacking, scales and stores. How fast this is, is the most that it could reach. Weights have
    /// at most 4 bits.
    ///
    /// # Panics
    /// If `w` is not a multiple of 256 bytes.
    pub fn products(&self, w: &[u8], x: &[[i8; 4]; 16]) -> i32 {
        assert!(w.len().is_multiple_of(256));
        // SAFETY: see above.
        unsafe { (self.products)(w, x) }
    }
}
