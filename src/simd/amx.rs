//! AMX: what [`super::avx512`] does, but for many tokens. A register is a matrix, and one instruction multiplies two.
//!
//! A panel (see [`tile`]) is what the instruction takes as its right side; activations are rows of its left side:
//!
//! ```text
//! 32 weights:   sums[t][r] = Σ_k x[t][k] · q[k][r]
//! 256 weights:  sums[t][r] = Σ_k x[t][k] · (scale · q)[k][r]
//! ```
//!
//! Sub-blocks' scales are multiplied into the weights before, so that sums leave the unit once for 256 weights. Such a weight
//! takes two bytes, each of which is summed up by itself. All of it is exact, so the bits are those of the other tiers.
//!
//! Rust has no stable names for these instructions yet: they are written as assembly. The compiler knows nothing of the registers and
//! leaves them alone; sums do not stay in them from one block of assembly to the next, only their shapes do.

// Every `unsafe fn` of this file has one contract: the caller has this tier's features enabled and
// passes pointers that lead to as much as the trait says.
#![allow(unsafe_op_in_unsafe_fn)]

use super::avx512bw::Zmm;
use super::tile::{self, Accs, BATCH, Ends, MAX_ROWS, Subs, Tile, tile_doors};
use super::unpack::{Sink, Unpack};
use super::x86::Vnni;
use super::{Kernels, Rows, TOGETHER, Tokens};
use crate::pool::Stripe;
use crate::quant::act::{Acts, CHUNK, Chunk};
use crate::quant::{self, Block, IntBlock};
use std::arch::asm;
use std::arch::x86_64::*;
use std::marker::PhantomData;
use std::mem::{MaybeUninit, offset_of};
use std::ops::Range;

/// Tokens of a matrix, at most: rows of a register.
const M: usize = 16;
/// Bytes of a register's row, and so from one row of a panel to the next.
const ROW: usize = 64;

/// Whether the CPU has everything this file is compiled with, and the system lets this process use it.
pub(super) fn detect() -> bool {
    super::avx512::detect() && has_tiles() && permitted()
}

/// Whether the CPU has the registers and the products of bytes (CPUID 7.0, EDX bits 24 and 25), and the system keeps the
/// registers (XCR0 bits 17 and 18).
fn has_tiles() -> bool {
    let tiles = |edx: u32| edx >> 24 & 3 == 3;
    // SAFETY: with AVX-512, leaf 7 and `xgetbv` are there.
    __cpuid(0).eax >= 7 && tiles(__cpuid_count(7, 0).edx) && unsafe { xcr0() } >> 17 & 3 == 3
}

/// What state the system keeps.
#[target_feature(enable = "xsave")]
fn xcr0() -> u64 {
    // SAFETY: the feature is this function's; register 0 is always there.
    unsafe { _xgetbv(0) }
}

/// Asks Linux for the registers, which take 8 KiB for each thread that uses them: `arch_prctl(ARCH_REQ_XCOMP_PERM,
/// XFEATURE_XTILEDATA)`, since 5.16. It holds for all threads.
fn permitted() -> bool {
    #[cfg(target_os = "linux")]
    {
        const ARCH_REQ_XCOMP_PERM: libc::c_int = 0x1023;
        const XTILEDATA: libc::c_ulong = 18;
        // SAFETY: touches no memory of ours.
        unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XTILEDATA) == 0 }
    }
    #[cfg(not(target_os = "linux"))]
    false
}

/// Registers' shapes, as `ldtilecfg` reads them.
#[repr(C, align(64))]
struct Shapes {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

impl Shapes {
    /// Sums in registers 0 to 3, activations of `m` tokens in 4, weights in the others, `k` of both.
    fn new(m: usize, k: usize) -> Shapes {
        let mut shapes = Shapes {
            palette: 1,
            start_row: 0,
            reserved: [0; 14],
            row_bytes: [0; 16],
            rows: [0; 16],
        };
        for register in 0..8 {
            let (rows, bytes) = match register {
                0..4 => (m, ROW),
                4 => (m, k),
                _ => (k / 4, ROW),
            };
            shapes.rows[register] = rows as u8;
            shapes.row_bytes[register] = bytes as u16;
        }
        shapes
    }
}

/// How many tokens go through a panel at once: as equal parts as can be.
fn tokens_at_once(n_tok: usize) -> usize {
    n_tok.div_ceil(n_tok.div_ceil(M))
}

/// Tokens that follow each other.
fn side_by_side(pick: &[u32]) -> Option<Range<usize>> {
    let first = *pick.first()? as usize;
    let mut all = pick.iter().zip(first..);
    all.all(|(token, next)| *token as usize == next)
        .then(|| first..first + pick.len())
}

/// The tier below, which unpacks and ends sums, and multiplies few tokens.
type T = Zmm<Vnni>;
type F = <T as Tile>::F;
type I = <T as Tile>::I;

/// 16 rows × 256 weights as the unit takes them, see [`tile`].
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Panel {
    /// `(256 / 4, 16, 4)`: weights, or the lower bytes of those with their scales.
    lower: [u8; CHUNK * MAX_ROWS],
    /// The upper bytes.
    upper: [u8; CHUNK * MAX_ROWS],
    ends: Ends,
}

impl Panel {
    const EMPTY: Panel = Panel {
        lower: [0; CHUNK * MAX_ROWS],
        upper: [0; CHUNK * MAX_ROWS],
        ends: Ends::EMPTY,
    };
}

/// How a weight times its scale is two bytes: `2^SHIFT · upper + lower`.
struct Split<B>(PhantomData<B>);

impl<B: IntBlock> Split<B> {
    /// Whether both bytes are the weight times some bits of its scale, which is below 64: a multiplication each, as
    /// no byte overflows into its neighbour (31 · 7 = 217).
    const BY_BITS: bool = B::OFFSET == 0 && B::BITS <= 5;
    /// What the upper byte counts.
    const SHIFT: i32 = if Self::BY_BITS { 3 } else { 8 };
    /// Fewer tokens than this are multiplied faster as in the tier below (measured: `cargo bench --bench kernels`).
    const FEW: usize = if B::WEIGHTS == CHUNK && !Self::BY_BITS {
        16
    } else {
        8
    };

    /// The bytes of four weights of each row with their scales. `q`: without bias; `scale`: twice in every lane, as i16.
    #[inline(always)]
    unsafe fn bytes(q: I, scale: I) -> [I; 2] {
        if Self::BY_BITS {
            let low = _mm512_and_si512(scale, _mm512_set1_epi16(7));
            let high = _mm512_srli_epi16(scale, 3);
            return [_mm512_mullo_epi16(q, low), _mm512_mullo_epi16(q, high)];
        }
        let even = _mm512_mullo_epi16(_mm512_srai_epi16(_mm512_slli_epi16(q, 8), 8), scale);
        let odd = _mm512_mullo_epi16(_mm512_srai_epi16(q, 8), scale);
        const ODD: u64 = 0xaaaa_aaaa_aaaa_aaaa;
        [
            _mm512_mask_blend_epi8(ODD, even, _mm512_slli_epi16(odd, 8)),
            _mm512_mask_blend_epi8(ODD, _mm512_srli_epi16(even, 8), odd),
        ]
    }
}

/// A block of a panel, to be filled.
struct Slot<'a, B> {
    panel: &'a mut Panel,
    b: usize,
    subs: [I; CHUNK / 16],
    format: PhantomData<B>,
}

impl<B: IntBlock> Sink<T> for Slot<'_, B> {
    #[inline(always)]
    unsafe fn scale(&mut self, d: F) {
        self.panel.ends.set_scale::<T>(self.b, d)
    }
    #[inline(always)]
    unsafe fn min(&mut self, m: F) {
        self.panel.ends.set_min::<T>(self.b, m)
    }
    #[inline(always)]
    unsafe fn sub(&mut self, s: usize, scale: I) {
        // The low half of a lane in both.
        self.subs[s] = _mm512_mask_blend_epi16(0xaaaa_aaaa, scale, _mm512_slli_epi32(scale, 16));
    }
    #[inline(always)]
    unsafe fn min_pair(&mut self, p: usize, mins: I) {
        self.panel.ends.set_min_pair::<T>(p, mins)
    }
    #[inline(always)]
    unsafe fn weights(&mut self, first: usize, q: [I; 4]) {
        let bias = _mm512_set1_epi8(B::OFFSET as i8);
        let at = (32 * self.b + first) * MAX_ROWS;
        let lower = self.panel.lower[at..][..16 * MAX_ROWS]
            .as_mut_ptr()
            .cast::<I>();
        if B::WEIGHTS != CHUNK {
            for (i, q) in q.into_iter().enumerate() {
                _mm512_store_si512(lower.add(i), _mm512_sub_epi8(q, bias));
            }
            return;
        }
        let upper = self.panel.upper[at..][..16 * MAX_ROWS]
            .as_mut_ptr()
            .cast::<I>();
        let scale = self.subs[first / B::SUB];
        for (i, q) in q.into_iter().enumerate() {
            let [low, high] = Split::<B>::bytes(_mm512_sub_epi8(q, bias), scale);
            _mm512_store_si512(lower.add(i), low);
            _mm512_store_si512(upper.add(i), high);
        }
    }
}

/// `y[t][r] = Σ_k w[r][k] · x[t][k]`, see [`super::Kernels::matmul`]. `U`: the tier below, which takes few tokens, and those that lie
/// apart: matrices of activations are read from where these are.
#[inline(always)]
unsafe fn matmul<U: Tile, B: Unpack>(w: Rows<'_>, x: Tokens<'_>, y: &mut Stripe<'_>) {
    let tokens = match side_by_side(x.pick) {
        Some(tokens) if tokens.len() >= Split::<B>::FEW => tokens,
        _ => return tile::matmul::<U, B>(w, x, y),
    };
    for done in (0..tokens.len()).step_by(BATCH) {
        let first = tokens.start + done;
        let batch = first..tokens.end.min(first + BATCH);
        many::<B>(w, x.acts, batch, y, done);
    }
    super::matmul_rest(w, w.len() / MAX_ROWS * MAX_ROWS, x, y);
}

/// [`matmul`] of whole panels with at most [`BATCH`] `tokens` of `acts`, whose results go to `y` from row `done` on.
#[inline(always)]
unsafe fn many<B: Unpack>(
    w: Rows<'_>,
    acts: &Acts,
    tokens: Range<usize>,
    y: &mut Stripe<'_>,
    done: usize,
) {
    let stride = w.row_bytes();
    let n_tok = tokens.len();
    let m = tokens_at_once(n_tok);
    let rows = w.len() / MAX_ROWS * MAX_ROWS;
    let step = super::rows_together(n_tok);
    let mut panels = [const { MaybeUninit::<Panel>::uninit() }; TOGETHER / MAX_ROWS];
    let pairs = |rows: usize| rows.div_ceil(2 * MAX_ROWS);
    let mut acc = [const { MaybeUninit::<Accs>::uninit() }; BATCH];
    let panels = tile::filled(&mut panels[..2 * pairs(step.min(rows))], Panel::EMPTY);
    let mut room = Room::EMPTY;
    begin(m, if B::WEIGHTS == CHUNK { ROW } else { 32 });
    for first in (0..rows).step_by(step) {
        let rows = first..rows.min(first + step);
        let panels = &mut panels[..2 * pairs(rows.len())];
        let acc = tile::filled(&mut acc[..n_tok], [0.0; TOGETHER]);
        for k in (0..w.k).step_by(CHUNK) {
            let width = CHUNK.min(w.k - k);
            for (row, panel) in rows.clone().step_by(MAX_ROWS).zip(panels.iter_mut()) {
                let row = w.bytes[row * stride..].as_ptr();
                for b in 0..width / B::WEIGHTS {
                    let mut slot = Slot::<B> {
                        panel: &mut *panel,
                        b,
                        subs: [T::splat(0); CHUNK / 16],
                        format: PhantomData,
                    };
                    tile::unpack::<T, B>(row, stride, k / B::WEIGHTS + b, &mut slot);
                }
            }
            let x = &acts.chunks(k / CHUNK)[tokens.clone()];
            for (pass, acc) in acc.chunks_mut(m).enumerate() {
                let now = pass * m..pass * m + acc.len();
                fetch_next::<B>(w, &rows, k, now.clone(), n_tok);
                // The last tokens' matrix begins among those before them, where they do not fill one.
                let x: &[Chunk] = &x[now.end - m..now.end];
                self::pass::<B>(panels, x, acc, width, &mut room);
            }
        }
        for (t, acc) in acc.iter().enumerate() {
            let out = y.row(done + t)[rows.clone()].as_chunks_mut::<MAX_ROWS>().0;
            for (out, acc) in out.iter_mut().zip(acc.as_chunks().0) {
                *out = *acc;
            }
        }
    }
    end();
}

/// While the tokens `now` of `n_tok` go through some rows' weights from `k` on, as large a part of what is unpacked next comes
/// nearer: the same rows' next chunk, or the first one of the rows behind them. CPUs do not find it by themselves, as rows lie
/// apart.
#[inline(always)]
unsafe fn fetch_next<B: Block>(
    w: Rows<'_>,
    rows: &Range<usize>,
    k: usize,
    now: Range<usize>,
    n_tok: usize,
) {
    let (first, k) = match k + CHUNK < w.k {
        true => (rows.start, k + CHUNK),
        false => (rows.end, 0),
    };
    let bytes = CHUNK / B::WEIGHTS * size_of::<B>();
    for row in rows.len() * now.start / n_tok..rows.len() * now.end / n_tok {
        let at = (first + row) * w.row_bytes() + k / B::WEIGHTS * size_of::<B>();
        for line in (0..bytes + 63).step_by(64) {
            T::prefetch(w.bytes.as_ptr().wrapping_add(at + line));
        }
    }
}

/// A matrix of sums: a row of every token.
type Product = [[i32; MAX_ROWS]; M];

/// What a pass needs besides its panels.
#[repr(C, align(64))]
struct Room {
    /// Sums of every block of 32, or of the lower and upper bytes of two panels.
    products: [Product; CHUNK / 32],
    subs: [Subs; M],
}

impl Room {
    const EMPTY: Room = Room {
        products: [[[0; MAX_ROWS]; M]; CHUNK / 32],
        subs: [Subs::EMPTY; M],
    };
}

/// Panels × the tokens of a matrix `x`; the last of them, as many as `acc` has, get results.
#[inline(always)]
unsafe fn pass<B: IntBlock>(
    panels: &[Panel],
    x: &[Chunk],
    acc: &mut [Accs],
    width: usize,
    room: &mut Room,
) {
    let before = x.len() - acc.len();
    if B::HAS_MIN {
        for (x, subs) in x.iter().zip(&mut room.subs).skip(before) {
            *subs = Subs::of::<B>(x);
        }
    }
    for (pair, panels) in panels.as_chunks::<2>().0.iter().enumerate() {
        if B::WEIGHTS == CHUNK {
            multiply_256::<B>(x, panels, &mut room.products);
        }
        for (p, panel) in panels.iter().enumerate() {
            if B::WEIGHTS != CHUNK {
                multiply_32(x, panel, &mut room.products);
            }
            for (acc, t) in acc.iter_mut().zip(before..) {
                let acc = acc[(2 * pair + p) * MAX_ROWS..][..MAX_ROWS].as_mut_ptr();
                let y = T::load_floats(acc);
                let (x, subs, products) = (&x[t], &room.subs[t], &room.products);
                let y = match B::WEIGHTS {
                    CHUNK => ended_256::<B>(panel, x, subs, &products[2 * p..], t, y),
                    _ => ended_32::<B>(panel, x, subs, products, t, y, width / 32),
                };
                T::store_floats(acc, y);
            }
        }
    }
}

/// A token's results with its sums of a block of 256.
#[inline(always)]
unsafe fn ended_256<B: IntBlock>(
    panel: &Panel,
    x: &Chunk,
    subs: &Subs,
    products: &[Product],
    t: usize,
    y: F,
) -> F {
    let lower = T::load(products[0][t].as_ptr());
    let upper = T::load(products[1][t].as_ptr());
    let isum = T::add(lower, T::shl(upper, Split::<B>::SHIFT));
    let [msum] = panel.ends.minimums::<T, B, 1>([subs]);
    tile::ended_256::<T, B>(y, isum, msum, panel.ends.of_block::<T>(0), x)
}

/// A token's results with its sums of `blocks` of 32.
#[inline(always)]
unsafe fn ended_32<B: IntBlock>(
    panel: &Panel,
    x: &Chunk,
    subs: &Subs,
    products: &[Product; CHUNK / 32],
    t: usize,
    mut y: F,
    blocks: usize,
) -> F {
    for b in 0..blocks {
        let isum = T::load(products[b][t].as_ptr());
        y = tile::ended_32::<T, B>(y, isum, panel.ends.of_block::<T>(b), x, subs, b);
    }
    y
}

/// Shapes for `m` tokens and `k` bytes of a row of activations.
#[inline(always)]
unsafe fn begin(m: usize, k: usize) {
    let shapes = Shapes::new(m, k);
    asm!("ldtilecfg [{}]", in(reg) &shapes, options(nostack, preserves_flags, readonly));
}

/// Registers are empty again, so that the system need not keep them.
#[inline(always)]
unsafe fn end() {
    asm!("tilerelease", options(nostack, preserves_flags, nomem));
}

/// The products of 64 weights of two panels with their activations, by the instruction for lower and that for upper bytes.
macro_rules! multiply_64 {
    ($x:literal, $at:literal, $lower:literal, $upper:literal) => {
        concat!(
            "tileloadd tmm4, [{x} + 1*{chunk} + ",
            $x,
            "]\n",
            "tileloadd tmm5, [{panel} + 1*{row} + ",
            $at,
            "]\n",
            $lower,
            " tmm0, tmm4, tmm5\n",
            "tileloadd tmm6, [{panel} + 1*{row} + {upper} + ",
            $at,
            "]\n",
            $upper,
            " tmm1, tmm4, tmm6\n",
            "tileloadd tmm7, [{panel} + 1*{row} + {next} + ",
            $at,
            "]\n",
            $lower,
            " tmm2, tmm4, tmm7\n",
            "tileloadd tmm5, [{panel} + 1*{row} + {next} + {upper} + ",
            $at,
            "]\n",
            $upper,
            " tmm3, tmm4, tmm5",
        )
    };
}

/// All 256 of them.
macro_rules! multiply_256 {
    ($x:ident, $panels:ident, $sums:ident, $lower:literal, $upper:literal) => {
        asm!(
            "tilezero tmm0",
            "tilezero tmm1",
            "tilezero tmm2",
            "tilezero tmm3",
            multiply_64!("0", "0", $lower, $upper),
            multiply_64!("64", "1024", $lower, $upper),
            multiply_64!("128", "2048", $lower, $upper),
            multiply_64!("192", "3072", $lower, $upper),
            "tilestored [{sums} + 1*{row}], tmm0",
            "tilestored [{sums} + 1*{row} + 1024], tmm1",
            "tilestored [{sums} + 1*{row} + 2048], tmm2",
            "tilestored [{sums} + 1*{row} + 3072], tmm3",
            x = in(reg) $x.as_ptr(),
            panel = in(reg) $panels,
            sums = in(reg) $sums,
            chunk = in(reg) size_of::<Chunk>(),
            row = in(reg) ROW,
            upper = const offset_of!(Panel, upper),
            next = const size_of::<Panel>(),
            options(nostack, preserves_flags)
        )
    };
}

/// `sums[0] = x · lower`, `sums[1] = x · upper` of the first panel, then of the second.
#[inline(always)]
unsafe fn multiply_256<B: IntBlock>(
    x: &[Chunk],
    panels: &[Panel; 2],
    sums: &mut [Product; CHUNK / 32],
) {
    match Split::<B>::BY_BITS {
        true => multiply_256!(x, panels, sums, "tdpbsud", "tdpbsud"),
        false => multiply_256!(x, panels, sums, "tdpbsud", "tdpbssd"),
    }
}

/// `sums[b] = x · w` over block `b` of 32 weights.
#[inline(always)]
unsafe fn multiply_32(x: &[Chunk], panel: &Panel, sums: &mut [Product; CHUNK / 32]) {
    for b in (0..CHUNK / 32).step_by(4) {
        asm!(
            "tilezero tmm0",
            "tileloadd tmm4, [{x} + 1*{chunk}]",
            "tileloadd tmm5, [{w} + 1*{row}]",
            "tdpbssd tmm0, tmm4, tmm5",
            "tilezero tmm1",
            "tileloadd tmm4, [{x} + 1*{chunk} + 32]",
            "tileloadd tmm6, [{w} + 1*{row} + 512]",
            "tdpbssd tmm1, tmm4, tmm6",
            "tilezero tmm2",
            "tileloadd tmm4, [{x} + 1*{chunk} + 64]",
            "tileloadd tmm7, [{w} + 1*{row} + 1024]",
            "tdpbssd tmm2, tmm4, tmm7",
            "tilezero tmm3",
            "tileloadd tmm4, [{x} + 1*{chunk} + 96]",
            "tileloadd tmm5, [{w} + 1*{row} + 1536]",
            "tdpbssd tmm3, tmm4, tmm5",
            "tilestored [{sums} + 1*{row}], tmm0",
            "tilestored [{sums} + 1*{row} + 1024], tmm1",
            "tilestored [{sums} + 1*{row} + 2048], tmm2",
            "tilestored [{sums} + 1*{row} + 3072], tmm3",
            x = in(reg) x.as_ptr().cast::<i8>().add(32 * b),
            w = in(reg) panel.lower.as_ptr().add(32 * MAX_ROWS * b),
            sums = in(reg) sums.as_mut_ptr().add(b),
            chunk = in(reg) size_of::<Chunk>(),
            row = in(reg) ROW,
            options(nostack, preserves_flags)
        );
    }
}

tile_doors!(T, matmul, #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]);

/// Weights that [`products_of`] takes at once: four registers.
const FOUR: usize = 4 * ROW * MAX_ROWS;

/// [`Kernels::products`].
fn products_of_matrices(w: &[u8], x: &[[i8; 4]; M]) -> i32 {
    let (whole, rest) = w.as_chunks::<FOUR>();
    let mut last = [[0; FOUR]];
    last[0][..rest.len()].copy_from_slice(rest);
    let last = &last[..rest.len().min(1)];
    // Each token's four activations fill a row.
    let x = x.map(|x| [x; ROW / 4]);
    // SAFETY: the tier is there.
    unsafe { products_of(whole, &x).wrapping_add(products_of(last, &x)) }
}

/// The products of some weights, from one block of assembly: see above.
unsafe fn products_of(w: &[[u8; FOUR]], x: &[[[i8; 4]; ROW / 4]; M]) -> i32 {
    if w.is_empty() {
        return 0;
    }
    let mut sums: [Product; 4] = [[[0; MAX_ROWS]; M]; 4];
    begin(M, ROW);
    asm!(
        "tilezero tmm0",
        "tilezero tmm1",
        "tilezero tmm2",
        "tilezero tmm3",
        "tileloadd tmm4, [{x} + 1*{row}]",
        "2:",
        "tileloadd tmm5, [{w} + 1*{row}]",
        "tdpbssd tmm0, tmm4, tmm5",
        "tileloadd tmm6, [{w} + 1*{row} + 1024]",
        "tdpbssd tmm1, tmm4, tmm6",
        "tileloadd tmm7, [{w} + 1*{row} + 2048]",
        "tdpbssd tmm2, tmm4, tmm7",
        "tileloadd tmm5, [{w} + 1*{row} + 3072]",
        "tdpbssd tmm3, tmm4, tmm5",
        "add {w}, 4096",
        "dec {n}",
        "jnz 2b",
        "tilestored [{sums} + 1*{row}], tmm0",
        "tilestored [{sums} + 1*{row} + 1024], tmm1",
        "tilestored [{sums} + 1*{row} + 2048], tmm2",
        "tilestored [{sums} + 1*{row} + 3072], tmm3",
        w = inout(reg) w.as_ptr() => _,
        n = inout(reg) w.len() => _,
        x = in(reg) x,
        sums = in(reg) &mut sums,
        row = in(reg) ROW,
        options(nostack)
    );
    end();
    sums.as_flattened()
        .as_flattened()
        .iter()
        .fold(0, |total, sum| total.wrapping_add(*sum))
}

/// Overlays what this tier does better.
pub(super) fn install(k: &mut Kernels) {
    install_tiles(k);
    k.products = products_of_matrices;
}
