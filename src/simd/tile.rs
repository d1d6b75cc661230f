//! Products of integer weights with activations: the one kernel, written once.
//!
//! A *panel* is some rows (one per lane of a tier's registers) × 256 weights, unpacked to bytes and
//! interleaved so that four consecutive weights of every row lie side by side:
//!
//! ```text
//! q[k/4][row][4]        one register: 4 weights of each row
//! dot4: lane r += Σ_4 q[k/4][r][i] · x[k + i]      4 activations, the same for all lanes
//! ```
//!
//! So row sums appear in lanes, without a horizontal addition, and every row of the panel has its one
//! accumulator: the canonical arithmetic of `quant`. Unpacking (`unpack.rs`) is a transposition and a few
//! shifts of whole registers and is paid once for all tokens; these go through a panel a few at a time, so
//! that accumulators stay in registers. A tier with many registers takes two panels side by side: an activation is
//! fetched once for both. With many tokens several panels are unpacked before these go through them, so that activations
//! come from the nearest cache for all but the first. For a single token nothing is stored: what is unpacked is
//! multiplied at once.
//!
//! ```text
//! for rows / (64 or ROWS · PANELS):  for chunk in k / 256:  unpack;  for tokens / TOKENS:  for PANELS:  tile
//! ```

use super::unpack::{Sink, Source, Unpack};
use super::{MANY, Rows, TOGETHER, Tokens};
use crate::pool::Stripe;
use crate::quant::act::{Acts, CHUNK, Chunk, HALF, SUM};
use crate::quant::{Block, IntBlock};
use std::hint::black_box;
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::ops::Range;

/// The few instructions that a tier brings. Lanes are rows.
///
/// # Safety
/// Of every function: the tier's features are enabled, and pointers lead to as much as is said.
pub(super) trait Tile: Copy {
    /// Rows of a panel.
    const ROWS: usize;
    /// Tokens that share a pass over a panel, at most 8.
    const TOKENS: usize;
    /// Panels that share a pass over those tokens, 1 or 2.
    const PANELS: usize;
    /// Whether a sum that fits 16 bits meets its sub-block's scale more cheaply, by [`Tile::pair`].
    const NARROW: bool;
    /// Whether such a sum stays in two halves of a lane, each of every other pair of products, until it does: [`Tile::pair`] adds
    /// them up.
    const HALVES: bool;
    /// 32 bits of every row.
    type I: Copy;
    /// An `f32` of every row.
    type F: Copy;

    /// What the integers of a format with this [`IntBlock::OFFSET`] have been raised by in a panel: all of
    /// it for instructions that want unsigned weights, or nothing.
    fn bias(offset: i32) -> i32;

    /// All lanes the same.
    unsafe fn splat(x: i32) -> Self::I;
    /// [`Tile::ROWS`] integers.
    unsafe fn load(x: *const i32) -> Self::I;
    /// [`Tile::ROWS`] integers.
    unsafe fn store(to: *mut i32, x: Self::I);
    /// Bitwise.
    unsafe fn and(a: Self::I, b: Self::I) -> Self::I;
    /// Bitwise.
    unsafe fn or(a: Self::I, b: Self::I) -> Self::I;
    /// Lanes shifted left, by less than 32.
    unsafe fn shl(x: Self::I, by: i32) -> Self::I;
    /// Lanes shifted right, zeros from above, by less than 32.
    unsafe fn shr(x: Self::I, by: i32) -> Self::I;
    /// The sum of lanes.
    unsafe fn add(a: Self::I, b: Self::I) -> Self::I;
    /// The low 32 bits of the product of lanes.
    unsafe fn mul(a: Self::I, b: Self::I) -> Self::I;
    /// The wrapping sum of bytes.
    unsafe fn add_bytes(a: Self::I, b: Self::I) -> Self::I;
    /// `table[code]` for every byte; codes are below 16.
    unsafe fn lookup(table: &[i8; 16], codes: Self::I) -> Self::I;

    /// The 4 bytes at `at + r · stride` of every row.
    unsafe fn column(at: *const u8, stride: usize) -> Self::I;
    /// The 16 bytes at `at + r · stride` of every row, as four columns.
    unsafe fn columns(at: *const u8, stride: usize) -> [Self::I; 4];
    /// Brings memory nearer that will be wanted soon. May do nothing; any address will do.
    unsafe fn prefetch(_at: *const u8) {}
    /// The same, into the nearest cache.
    unsafe fn prefetch_near(_at: *const u8) {}

    /// `sums[r][t] += Σ w[r] · x[t]`. `w[r]`: `4 C` weights of each row of panel `r`, of at most [`Kind::BITS`]; `x[t]`: `4 C`
    /// activations; C: 2 or 4.
    unsafe fn dot<K: Kind, const N: usize, const R: usize, const C: usize>(
        sums: &mut [[Self::I; N]; R],
        w: [[Self::I; C]; R],
        x: [*const i8; N],
    );
    /// `acc + a[0] · b[0] + a[1] · b[1]` of pairs of i16 in every lane.
    unsafe fn pair(acc: Self::I, a: Self::I, b: Self::I) -> Self::I;

    /// The f16 in the low half of every lane.
    unsafe fn halves(x: Self::I) -> Self::F;
    /// [`Tile::ROWS`] floats.
    unsafe fn load_floats(x: *const f32) -> Self::F;
    /// [`Tile::ROWS`] floats.
    unsafe fn store_floats(to: *mut f32, x: Self::F);
    /// The float step: `fma(d · dx, sum, acc)`.
    unsafe fn step(acc: Self::F, d: Self::F, dx: f32, sum: Self::I) -> Self::F;
}

/// What [`Tile::dot`] adds up.
pub(super) trait Kind {
    /// Bits of a weight, at most.
    const BITS: u32;
    /// Whether sums are of 32 bits; else they stay in halves, where [`Tile::HALVES`] says so: no tier of NEON does.
    #[cfg_attr(target_arch = "aarch64", allow(dead_code))]
    const WHOLE: bool;
}

/// A [`Kind`] by its numbers.
struct Sum<const BITS: u32, const WHOLE: bool>;

impl<const BITS: u32, const WHOLE: bool> Kind for Sum<BITS, WHOLE> {
    const BITS: u32 = BITS;
    const WHOLE: bool = WHOLE;
}

/// What differs in a [`Tile`] between CPUs with the same registers: how they multiply bytes. `I`: [`Tile::I`].
///
/// # Safety
/// Of every function: as of [`Tile`]'s.
pub(super) trait Dot<I>: Copy {
    /// [`Tile::TOKENS`].
    const TOKENS: usize;
    /// [`Tile::PANELS`].
    const PANELS: usize = 1;
    /// [`Tile::NARROW`]
    const NARROW: bool = false;
    /// [`Tile::HALVES`]
    const HALVES: bool = false;
    /// [`Tile::bias`]: nothing, where both sides may be signed.
    #[inline(always)]
    fn bias(_offset: i32) -> i32 {
        0
    }
    /// [`Tile::dot`].
    unsafe fn dot<K: Kind, const N: usize, const R: usize, const C: usize>(
        sums: &mut [[I; N]; R],
        w: [[I; C]; R],
        x: [*const i8; N],
    );
    /// [`Tile::pair`].
    unsafe fn pair(acc: I, a: I, b: I) -> I;
}

/// Fewest and most rows of a panel in any tier.
const MIN_ROWS: usize = 4;
pub(super) const MAX_ROWS: usize = 16;
/// Most panels side by side in any tier.
const MAX_PANELS: usize = 2;
/// Rows of a task are whole panels, as many as lie side by side, in any tier ([`super::rows_together`]).
const _: () = assert!((TOGETHER / 2).is_multiple_of(MAX_PANELS * MAX_ROWS));
/// Tokens that share the unpacking of a panel; more than this come in several passes.
pub(super) const BATCH: usize = 512;

/// Some rows × 256 weights, interleaved. Of each array the first [`Tile::ROWS`] columns are in use.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Panel {
    /// `(CHUNK / 4, ROWS, 4)`, packed to the tier's number of rows.
    q: [u8; CHUNK * MAX_ROWS],
    /// Sub-blocks' scales.
    sub: [[i32; MAX_ROWS]; CHUNK / 16],
    ends: Ends,
}

impl Panel {
    const EMPTY: Panel = Panel {
        q: [0; CHUNK * MAX_ROWS],
        sub: [[0; MAX_ROWS]; CHUNK / 16],
        ends: Ends::EMPTY,
    };
}

/// What makes results of some rows' integer sums over 256 weights. Of each array the first [`Tile::ROWS`] columns are in use.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Ends {
    /// Blocks' scales: one row for 256 weights, or one for every 32.
    scale: [[f32; MAX_ROWS]; CHUNK / 32],
    /// Blocks' minimums.
    min: [[f32; MAX_ROWS]; CHUNK / 32],
    /// Sub-blocks' minimums, a pair of i16 for two.
    min_pairs: [[i32; MAX_ROWS]; CHUNK / 32],
}

/// # Safety
/// Of every function: the tier's features are enabled.
impl Ends {
    pub(super) const EMPTY: Ends = Ends {
        scale: [[0.0; MAX_ROWS]; CHUNK / 32],
        min: [[0.0; MAX_ROWS]; CHUNK / 32],
        min_pairs: [[0; MAX_ROWS]; CHUNK / 32],
    };

    /// The scale of block `b`, [`Sink::scale`].
    #[inline(always)]
    pub(super) unsafe fn set_scale<T: Tile>(&mut self, b: usize, d: T::F) {
        // SAFETY: the caller's; one row, here and below.
        unsafe { T::store_floats(self.scale[b].as_mut_ptr(), d) }
    }

    /// Its minimum, [`Sink::min`].
    #[inline(always)]
    pub(super) unsafe fn set_min<T: Tile>(&mut self, b: usize, m: T::F) {
        // SAFETY: as above.
        unsafe { T::store_floats(self.min[b].as_mut_ptr(), m) }
    }

    /// Two sub-blocks' minimums, [`Sink::min_pair`].
    #[inline(always)]
    pub(super) unsafe fn set_min_pair<T: Tile>(&mut self, p: usize, mins: T::I) {
        // SAFETY: as above.
        unsafe { T::store(self.min_pairs[p].as_mut_ptr(), mins) }
    }

    /// Scale and minimum of block `b`.
    #[inline(always)]
    pub(super) unsafe fn of_block<T: Tile>(&self, b: usize) -> [T::F; 2] {
        // SAFETY: as above.
        unsafe {
            let d = T::load_floats(self.scale[b].as_ptr());
            [d, T::load_floats(self.min[b].as_ptr())]
        }
    }

    /// The sums of N tokens' activations times minimums; zero where there are none.
    #[inline(always)]
    pub(super) unsafe fn minimums<T: Tile, B: IntBlock, const N: usize>(
        &self,
        subs: [&Subs; N],
    ) -> [T::I; N] {
        // SAFETY: as above.
        unsafe {
            let mut msum = [T::splat(0); N];
            if B::HAS_MIN {
                for (p, mins) in self.min_pairs[..CHUNK / B::SUB / 2].iter().enumerate() {
                    let mins = T::load(mins.as_ptr());
                    for t in 0..N {
                        msum[t] = T::pair(msum[t], mins, subs[t].pair::<T>(p));
                    }
                }
            }
            msum
        }
    }
}

/// One token's results so far, for the rows that go together.
pub(super) type Accs = [f32; TOGETHER];

/// A block of a panel, to be filled.
struct Slot<'a> {
    panel: &'a mut Panel,
    b: usize,
}

impl<T: Tile> Sink<T> for Slot<'_> {
    #[inline(always)]
    unsafe fn scale(&mut self, d: T::F) {
        // SAFETY: the caller's, here and below.
        unsafe { self.panel.ends.set_scale::<T>(self.b, d) }
    }
    #[inline(always)]
    unsafe fn min(&mut self, m: T::F) {
        // SAFETY: as above.
        unsafe { self.panel.ends.set_min::<T>(self.b, m) }
    }
    #[inline(always)]
    unsafe fn sub(&mut self, s: usize, scale: T::I) {
        // SAFETY: as above; a row of the panel.
        unsafe { T::store(self.panel.sub[s].as_mut_ptr(), scale) }
    }
    #[inline(always)]
    unsafe fn min_pair(&mut self, p: usize, mins: T::I) {
        // SAFETY: as above.
        unsafe { self.panel.ends.set_min_pair::<T>(p, mins) }
    }
    #[inline(always)]
    unsafe fn weights(&mut self, first: usize, q: [T::I; 4]) {
        for (i, q) in q.into_iter().enumerate() {
            let at = (32 * self.b + first + 4 * i) * T::ROWS;
            // SAFETY: the caller's; a register of the panel.
            unsafe { T::store(self.panel.q[at..].as_mut_ptr().cast(), q) };
        }
    }
}

/// `y[t][r] = Σ_k w[r][k] · x[t][k]`, see [`super::Kernels::matmul`].
///
/// # Safety
/// The tier's features are enabled. Shapes belong together (`Kernels::matmul` asserts them).
#[inline(always)]
pub(super) unsafe fn matmul<T: Tile, B: Unpack>(w: Rows<'_>, x: Tokens<'_>, y: &mut Stripe<'_>) {
    let panels = w.len() / T::ROWS;
    // SAFETY: the caller's.
    unsafe {
        match x.pick {
            [token] => one::<T, B>(w, x.acts, *token, y),
            _ => many::<T, B>(w, x, y),
        }
    }
    super::matmul_rest(w, panels * T::ROWS, x, y);
}

/// [`matmul`] of whole panels with many tokens.
#[inline(always)]
unsafe fn many<T: Tile, B: Unpack>(w: Rows<'_>, x: Tokens<'_>, y: &mut Stripe<'_>) {
    let mut sums = [Sums::EMPTY; 8];
    let mut panels = [const { MaybeUninit::<Panel>::uninit() }; TOGETHER / MIN_ROWS];
    let mut acc = [const { MaybeUninit::<Accs>::uninit() }; BATCH];
    let step = match x.len() {
        ..MANY => T::PANELS * T::ROWS,
        _ => TOGETHER,
    };
    let rows = w.len() / T::ROWS * T::ROWS;
    let panels = filled(&mut panels[..step.min(rows) / T::ROWS], Panel::EMPTY);
    for (batch, pick) in x.pick.chunks(BATCH).enumerate() {
        let x = Tokens { pick, ..x };
        for first in (0..rows).step_by(step) {
            let rows = first..rows.min(first + step);
            let acc = filled(&mut acc[..pick.len()], [0.0; TOGETHER]);
            // SAFETY: the caller's; rows of whole panels.
            unsafe { together::<T, B>(w, rows.clone(), x, panels, &mut sums, acc) };
            for (t, acc) in acc.iter().enumerate() {
                let out = y.row(batch * BATCH + t)[rows.clone()].chunks_exact_mut(T::ROWS);
                for (out, acc) in out.zip(acc.chunks_exact(T::ROWS)) {
                    out.copy_from_slice(acc);
                }
            }
        }
    }
}

/// As many copies: what is not used is not touched.
pub(super) fn filled<X: Copy>(room: &mut [MaybeUninit<X>], x: X) -> &mut [X] {
    for one in room.iter_mut() {
        one.write(x);
    }
    // SAFETY: all of them have just been written.
    unsafe { std::slice::from_raw_parts_mut(room.as_mut_ptr().cast(), room.len()) }
}

/// Some rows × all picked tokens: `acc[t][r] += Σ_k w[rows.start + r][k] · x[t][k]`.
#[inline(always)]
unsafe fn together<T: Tile, B: Unpack>(
    w: Rows<'_>,
    rows: Range<usize>,
    x: Tokens<'_>,
    panels: &mut [Panel],
    sums: &mut [Sums; 8],
    acc: &mut [Accs],
) {
    let stride = w.row_bytes();
    let panels = &mut panels[..rows.len() / T::ROWS];
    for k in (0..w.k).step_by(CHUNK) {
        let width = CHUNK.min(w.k - k);
        for (row, panel) in rows.clone().step_by(T::ROWS).zip(panels.iter_mut()) {
            let row = w.bytes[row * stride..].as_ptr();
            for b in 0..width / B::WEIGHTS {
                let panel = &mut *panel;
                // SAFETY: this block of `ROWS` rows is inside `w.bytes`; the features are enabled by the caller.
                unsafe { unpack::<T, B>(row, stride, k / B::WEIGHTS + b, &mut Slot { panel, b }) };
            }
        }
        let chunks = x.acts.chunks(k / CHUNK);
        let mut t = 0;
        while t < x.len() {
            let (pick, acc) = (&x.pick[t..], &mut acc[t..]);
            // SAFETY: the features are enabled by the caller.
            t += unsafe {
                match pick.len().min(T::TOKENS) {
                    8.. => tiles::<T, B, 8>(panels, chunks, pick, acc, sums, width),
                    6.. => tiles::<T, B, 6>(panels, chunks, pick, acc, sums, width),
                    4.. => tiles::<T, B, 4>(panels, chunks, pick, acc, sums, width),
                    2.. => tiles::<T, B, 2>(panels, chunks, pick, acc, sums, width),
                    _ => tiles::<T, B, 1>(panels, chunks, pick, acc, sums, width),
                }
            };
        }
    }
}

/// Unpacks block `b` of every row.
///
/// CPUs fetch ahead along a row by themselves, but not beyond a page, and only once they have seen a few of its
/// cache lines. Where rows are shorter than a page, as many bytes of the next panel are fetched, which lies
/// behind this one: it arrives in the order of memory.
#[inline(always)]
pub(super) unsafe fn unpack<T: Tile, B: Unpack>(
    rows: *const u8,
    stride: usize,
    b: usize,
    to: &mut impl Sink<T>,
) {
    let size = size_of::<B>();
    // SAFETY: the caller's; prefetching takes any address.
    unsafe {
        if stride < PAGE {
            let ahead = rows.wrapping_add(T::ROWS * (stride + b * size));
            for line in (0..T::ROWS * size).step_by(64) {
                T::prefetch(ahead.wrapping_add(line));
            }
        }
        B::unpack(Source::new(rows.add(b * size), stride), to);
    }
}

/// Bytes of a page of memory.
const PAGE: usize = 4096;

/// Panels × the first N picked tokens: `acc[t][r] += Σ_k w[r][k] · x[t][k]` over the panels' chunk. Where there
/// are several, the next tokens are fetched meanwhile.
#[inline(always)]
unsafe fn tiles<T: Tile, B: IntBlock, const N: usize>(
    panels: &[Panel],
    chunks: &[Chunk],
    pick: &[u32],
    acc: &mut [Accs],
    sums: &mut [Sums; 8],
    width: usize,
) -> usize {
    let x: [&Chunk; N] = std::array::from_fn(|t| &chunks[pick[t] as usize]);
    let acc: &mut [Accs; N] = (&mut acc[..N]).try_into().expect("N tokens");
    let sums: &mut [Sums; N] = (&mut sums[..N]).try_into().expect("N tokens");
    for t in 0..N {
        sums[t].take::<T, B>(x[t], group::<T, B>());
    }
    if panels.len() > T::PANELS {
        for next in pick[N..].iter().take(N) {
            let next = std::ptr::from_ref(&chunks[*next as usize]).cast::<u8>();
            for line in (0..size_of::<Chunk>()).step_by(64) {
                // SAFETY: the caller's.
                unsafe { T::prefetch_near(next.add(line)) };
            }
        }
    }
    for i in (0..panels.len()).step_by(T::PANELS) {
        let at = i * T::ROWS;
        // SAFETY: the caller's.
        unsafe {
            match T::PANELS.min(panels.len() - i) {
                2 => tile::<T, B, N, 2>([&panels[i], &panels[i + 1]], x, acc, at, sums, width),
                _ => tile::<T, B, N, 1>([&panels[i]], x, acc, at, sums, width),
            }
        }
    }
    N
}

/// R panels × N tokens, their rows' results from `at` on.
#[inline(always)]
unsafe fn tile<T: Tile, B: IntBlock, const N: usize, const R: usize>(
    panels: [&Panel; R],
    x: [&Chunk; N],
    acc: &mut [Accs; N],
    at: usize,
    sums: &[Sums; N],
    width: usize,
) {
    assert!(at + R * T::ROWS <= TOGETHER);
    let acc = acc.as_mut_ptr().cast::<f32>();
    // SAFETY: the features are enabled by the caller; the panels' arrays and the chunks are as long as
    // their documentation says; these rows are among the results.
    unsafe {
        let acc = acc.add(at);
        let mut y = [[T::load_floats(acc); N]; R];
        for r in 0..R {
            for t in 0..N {
                y[r][t] = T::load_floats(acc.add(t * TOGETHER + r * T::ROWS));
            }
        }
        match B::WEIGHTS {
            CHUNK => tile_of_256::<T, B, N, R>(panels, x, sums, &mut y),
            _ => {
                // Compilers that know of 8 at most unroll them all: more than the cache of instructions holds.
                for b in 0..black_box(width / 32) {
                    tile_of_32::<T, B, N, R>(panels, b, x, sums, &mut y);
                }
            }
        }
        for r in 0..R {
            for t in 0..N {
                T::store_floats(acc.add(t * TOGETHER + r * T::ROWS), y[r][t]);
            }
        }
    }
}

// ---- How the parts of a block are summed up ----
//
// `Σ_s scale[s] · Σ_i q[s][i] · x[i]` over the sub-blocks is exact in whatever order. Sums of products start with
// `- bias · Σ x`, so that the bias of a panel's integers has left them at the end. Of few weights they fit 16 bits then:
// 16 · 15 · 127 = 30480 for 4 bits, and 8 · 32 · 127 = 32512 for 6 with a bias of 32. In two halves twice as many fit; but there
// is no bias to start with, as it would not fit into either.

/// Weights whose sum fits 16 bits.
fn fitting<T: Tile, B: IntBlock>() -> usize {
    match T::bias(B::OFFSET) {
        0 if !T::HALVES => 256 >> B::BITS,
        _ => 512 >> B::BITS,
    }
}

/// Whether sub-blocks are summed up in 16 bits, in one [`group`] or two: more would take as many products as one of 32 bits.
fn narrow<T: Tile, B: IntBlock>() -> bool {
    T::NARROW
        && B::WEIGHTS == CHUNK
        && 2 * fitting::<T, B>() >= B::SUB
        && !(T::HALVES && T::bias(B::OFFSET) != 0)
}

/// Weights that are summed up before they meet the scale of their sub-block, of which they are all or a half.
fn group<T: Tile, B: IntBlock>() -> usize {
    match narrow::<T, B>() {
        true => fitting::<T, B>().min(B::SUB),
        false => B::SUB,
    }
}

/// A sub-block's scale as its sums want it: [`Tile::pair`] takes an upper half into account.
#[inline(always)]
pub(super) unsafe fn factor<T: Tile, B: IntBlock>(scale: T::I) -> T::I {
    match narrow::<T, B>() {
        // SAFETY: the caller's.
        true => unsafe {
            let lower = T::and(scale, T::splat(0xffff));
            match T::HALVES {
                true => T::or(lower, T::shl(lower, 16)),
                false => lower,
            }
        },
        false => scale,
    }
}

/// `isum + sum · scale`; `scale`: of [`factor`].
#[inline(always)]
unsafe fn scaled<T: Tile, B: IntBlock>(isum: T::I, sum: T::I, scale: T::I) -> T::I {
    // SAFETY: the caller's.
    unsafe {
        match narrow::<T, B>() {
            true => T::pair(isum, sum, scale),
            false => T::add(isum, T::mul(sum, scale)),
        }
    }
}

/// What a chunk's activations add up to, as far as a format wants it; what else is in the arrays does not count.
#[derive(Clone, Copy)]
struct Sums {
    /// What the sums of each group start with, where a bias has to leave.
    starts: [i32; CHUNK / HALF],
    /// Over each sub-block, where there are minimums.
    subs: Subs,
}

/// What the activations of each sub-block add up to, where a format has minimums; only those of its sub-blocks count.
#[derive(Clone, Copy)]
#[repr(align(4))]
pub(super) struct Subs([i16; CHUNK / SUM]);

impl Subs {
    pub(super) const EMPTY: Subs = Subs([0; CHUNK / SUM]);

    /// The sums of a chunk.
    #[inline(always)]
    pub(super) fn of<B: IntBlock>(x: &Chunk) -> Subs {
        let mut subs = [0; CHUNK / SUM];
        match B::SUB {
            SUM => subs = x.sums,
            _ => subs[..CHUNK / 32].copy_from_slice(&of_32(x)),
        }
        Subs(subs)
    }

    /// The sums over sub-blocks `2 p` and `2 p + 1` in every lane.
    #[inline(always)]
    pub(super) unsafe fn pair<T: Tile>(&self, p: usize) -> T::I {
        let pairs: &[i32; CHUNK / SUM / 2] = bytemuck::cast_ref(&self.0);
        // SAFETY: the caller's.
        unsafe { T::splat(pairs[p]) }
    }
}

impl Sums {
    const EMPTY: Sums = Sums {
        starts: [0; CHUNK / HALF],
        subs: Subs::EMPTY,
    };

    /// The sums of a chunk, in groups of `group` weights.
    #[inline(always)]
    fn take<T: Tile, B: IntBlock>(&mut self, x: &Chunk, group: usize) {
        let bias = T::bias(B::OFFSET);
        if bias != 0 {
            match group {
                HALF => start(&mut self.starts, x.halves, bias),
                SUM => start(&mut self.starts, x.sums, bias),
                _ => start(&mut self.starts, of_32(x), bias),
            }
        }
        if B::HAS_MIN {
            self.subs = Subs::of::<B>(x);
        }
    }
}

/// `starts[i] = - bias · sums[i]`
#[inline(always)]
fn start<const N: usize>(starts: &mut [i32; CHUNK / HALF], sums: [i16; N], bias: i32) {
    for i in 0..N {
        starts[i] = -bias * sums[i] as i32;
    }
}

/// The sums of 32 activations each: at most 32 · 127.
#[inline(always)]
fn of_32(x: &Chunk) -> [i16; CHUNK / 32] {
    // Two sums as one integer: compilers make of a loop over pairs one over single numbers.
    let pairs: &[i32; CHUNK / 32] = bytemuck::cast_ref(&x.sums);
    let mut sums = [0; CHUNK / 32];
    for (sum, pair) in sums.iter_mut().zip(pairs) {
        *sum = ((pair << 16 >> 16) + (pair >> 16)) as i16;
    }
    sums
}

// ---- Tiles ----

/// Block `b` of 32 weights of R panels.
#[inline(always)]
unsafe fn tile_of_32<T: Tile, B: IntBlock, const N: usize, const R: usize>(
    panels: [&Panel; R],
    b: usize,
    x: [&Chunk; N],
    sums: &[Sums; N],
    y: &mut [[T::F; N]; R],
) {
    // SAFETY: as `tile`.
    unsafe {
        let mut isum = starts::<T, B, N, R>(sums, b);
        for first in [0, 16] {
            dot_at::<T, B, N, R, 4>(&mut isum, panels, 32 * b + first, x);
        }
        for r in 0..R {
            let ends = panels[r].ends.of_block::<T>(b);
            end_of_32::<T, B, N>(isum[r], ends, x, sums, b, &mut y[r]);
        }
    }
}

/// The block of 256 weights of R panels.
#[inline(always)]
unsafe fn tile_of_256<T: Tile, B: IntBlock, const N: usize, const R: usize>(
    panels: [&Panel; R],
    x: [&Chunk; N],
    sums: &[Sums; N],
    y: &mut [[T::F; N]; R],
) {
    let group = group::<T, B>();
    // SAFETY: as `tile`.
    unsafe {
        let mut isum = [[T::splat(0); N]; R];
        for g in 0..CHUNK / group {
            let mut part = starts::<T, B, N, R>(sums, g);
            if group == 8 {
                dot_at::<T, B, N, R, 2>(&mut part, panels, 8 * g, x);
            } else {
                for first in (0..group).step_by(16) {
                    dot_at::<T, B, N, R, 4>(&mut part, panels, group * g + first, x);
                }
            }
            for r in 0..R {
                let scale = T::load(panels[r].sub[group * g / B::SUB].as_ptr());
                for t in 0..N {
                    isum[r][t] = scaled::<T, B>(isum[r][t], part[r][t], scale);
                }
            }
        }
        for r in 0..R {
            let subs: [&Subs; N] = std::array::from_fn(|t| &sums[t].subs);
            let msum = panels[r].ends.minimums::<T, B, N>(subs);
            let ends = panels[r].ends.of_block::<T>(0);
            end_of_256::<T, B, N>(isum[r], msum, ends, x, &mut y[r]);
        }
    }
}

/// What the sums of group `g` start with.
#[inline(always)]
unsafe fn starts<T: Tile, B: IntBlock, const N: usize, const R: usize>(
    sums: &[Sums; N],
    g: usize,
) -> [[T::I; N]; R] {
    // SAFETY: as `tile`.
    unsafe {
        let mut starts = [[T::splat(0); N]; R];
        if T::bias(B::OFFSET) != 0 {
            for t in 0..N {
                let start = T::splat(sums[t].starts[g]);
                for r in 0..R {
                    starts[r][t] = start;
                }
            }
        }
        starts
    }
}

/// Adds `4 C` weights from `first` on, of R panels, times those of N tokens.
#[inline(always)]
unsafe fn dot_at<T: Tile, B: IntBlock, const N: usize, const R: usize, const C: usize>(
    sums: &mut [[T::I; N]; R],
    panels: [&Panel; R],
    first: usize,
    x: [&Chunk; N],
) {
    // SAFETY: as `tile`; C registers.
    unsafe {
        let mut w = [[T::splat(0); C]; R];
        for r in 0..R {
            let from = panels[r].q[first * T::ROWS..][..4 * C * T::ROWS].as_ptr();
            for j in 0..C {
                w[r][j] = T::load(from.cast::<i32>().add(j * T::ROWS));
            }
        }
        let mut at = [std::ptr::null(); N];
        for t in 0..N {
            at[t] = x[t].qs[first..][..4 * C].as_ptr();
        }
        dot::<T, B, N, R, C>(sums, w, at);
    }
}

/// [`Tile::dot`] with the format's bits.
#[inline(always)]
unsafe fn dot<T: Tile, B: IntBlock, const N: usize, const R: usize, const C: usize>(
    sums: &mut [[T::I; N]; R],
    w: [[T::I; C]; R],
    x: [*const i8; N],
) {
    // SAFETY: as `tile`.
    unsafe {
        match (B::BITS, narrow::<T, B>()) {
            (..=4, false) => T::dot::<Sum<4, true>, N, R, C>(sums, w, x),
            (5..=6, false) => T::dot::<Sum<6, true>, N, R, C>(sums, w, x),
            (_, false) => T::dot::<Sum<8, true>, N, R, C>(sums, w, x),
            (..=6, true) => T::dot::<Sum<6, false>, N, R, C>(sums, w, x),
            (_, true) => T::dot::<Sum<8, false>, N, R, C>(sums, w, x),
        }
    }
}

/// The float steps of block `b` of 32 weights; `d`, `m`: its scale and minimum.
#[inline(always)]
unsafe fn end_of_32<T: Tile, B: IntBlock, const N: usize>(
    isum: [T::I; N],
    ends: [T::F; 2],
    x: [&Chunk; N],
    sums: &[Sums; N],
    b: usize,
    y: &mut [T::F; N],
) {
    for t in 0..N {
        // SAFETY: as `tile`.
        y[t] = unsafe { ended_32::<T, B>(y[t], isum[t], ends, x[t], &sums[t].subs, b) };
    }
}

/// The same for one token.
#[inline(always)]
pub(super) unsafe fn ended_32<T: Tile, B: IntBlock>(
    y: T::F,
    isum: T::I,
    [d, m]: [T::F; 2],
    x: &Chunk,
    subs: &Subs,
    b: usize,
) -> T::F {
    // SAFETY: as `tile`.
    unsafe {
        let y = T::step(y, d, x.d[b], isum);
        match B::HAS_MIN {
            true => T::step(y, m, x.d[b], T::splat(subs.0[b] as i32)),
            false => y,
        }
    }
}

/// The float steps of a block of 256 weights. `msum`: the sums of activations times minimums; `d`, `m`: the block's scale
/// and minimum.
#[inline(always)]
unsafe fn end_of_256<T: Tile, B: IntBlock, const N: usize>(
    isum: [T::I; N],
    msum: [T::I; N],
    ends: [T::F; 2],
    x: [&Chunk; N],
    y: &mut [T::F; N],
) {
    for t in 0..N {
        // SAFETY: as `tile`.
        y[t] = unsafe { ended_256::<T, B>(y[t], isum[t], msum[t], ends, x[t]) };
    }
}

/// The same for one token.
#[inline(always)]
pub(super) unsafe fn ended_256<T: Tile, B: IntBlock>(
    y: T::F,
    isum: T::I,
    msum: T::I,
    [d, m]: [T::F; 2],
    x: &Chunk,
) -> T::F {
    // SAFETY: as `tile`.
    unsafe {
        let y = T::step(y, d, x.d[0], isum);
        match B::HAS_MIN {
            true => T::step(y, m, x.d[0], msum),
            false => y,
        }
    }
}

/// [`matmul`] of whole panels with one token.
#[inline(always)]
unsafe fn one<T: Tile, B: Unpack>(w: Rows<'_>, acts: &Acts, token: u32, y: &mut Stripe<'_>) {
    let stride = w.row_bytes();
    let per_chunk = CHUNK / B::WEIGHTS;
    for (p, out) in y.row(0).chunks_exact_mut(T::ROWS).enumerate() {
        let rows = w.bytes[p * T::ROWS * stride..][..T::ROWS * stride].as_ptr();
        // SAFETY: the features are enabled by the caller; blocks are inside the panel's rows.
        unsafe {
            let zero = T::splat(0);
            let mut y = [T::halves(zero)];
            let mut sums = [Sums::EMPTY];
            for b in 0..w.k / B::WEIGHTS {
                let x = [&acts.chunks(b / per_chunk)[token as usize]];
                let at = b % per_chunk;
                if at == 0 {
                    sums[0].take::<T, B>(x[0], Product::<T, B>::group());
                }
                let mut block = Product::<T, B> {
                    x: x[0],
                    sums: &sums,
                    at: 32 * at,
                    isum: match B::WEIGHTS {
                        CHUNK => zero,
                        _ => starts::<T, B, 1, 1>(&sums, at)[0][0],
                    },
                    msum: zero,
                    scales: [y[0]; 2],
                    subs: [zero; CHUNK / 16],
                    format: PhantomData,
                };
                unpack::<T, B>(rows, stride, b, &mut block);
                let (isum, msum, scales) = (block.isum, block.msum, block.scales);
                match B::WEIGHTS {
                    CHUNK => end_of_256::<T, B, 1>([isum], [msum], scales, x, &mut y),
                    _ => end_of_32::<T, B, 1>([isum], scales, x, &sums, at, &mut y),
                }
            }
            T::store_floats(out.as_mut_ptr(), y[0]);
        }
    }
}

/// The integer sums of a block with one token's activations, made while it is unpacked.
struct Product<'a, T: Tile, B> {
    x: &'a Chunk,
    /// Of `x`, for groups of [`Product::group`].
    sums: &'a [Sums; 1],
    /// Where the block's activations begin in `x`.
    at: usize,
    isum: T::I,
    msum: T::I,
    /// Scale and minimum.
    scales: [T::F; 2],
    subs: [T::I; CHUNK / 16],
    format: PhantomData<B>,
}

impl<T: Tile, B: IntBlock> Product<'_, T, B> {
    /// As [`group`]; but blocks of 256 come in pieces of 16.
    #[inline(always)]
    fn group() -> usize {
        match B::WEIGHTS {
            CHUNK => group::<T, B>().min(16),
            _ => B::SUB,
        }
    }

    /// Adds `4 C` weights from weight `first` on.
    #[inline(always)]
    unsafe fn group_of<const C: usize>(&mut self, first: usize, q: [T::I; C]) {
        let x = [self.x.qs[first..][..4 * C].as_ptr()];
        // SAFETY: the caller's; `4 C` activations.
        unsafe {
            let mut sum = starts::<T, B, 1, 1>(self.sums, first / (4 * C));
            dot::<T, B, 1, 1, C>(&mut sum, [q], x);
            self.isum = scaled::<T, B>(self.isum, sum[0][0], self.subs[first / B::SUB]);
        }
    }
}

impl<T: Tile, B: IntBlock> Sink<T> for Product<'_, T, B> {
    #[inline(always)]
    unsafe fn scale(&mut self, d: T::F) {
        self.scales[0] = d;
    }
    #[inline(always)]
    unsafe fn min(&mut self, m: T::F) {
        self.scales[1] = m;
    }
    #[inline(always)]
    unsafe fn sub(&mut self, s: usize, scale: T::I) {
        self.subs[s] = scale;
    }
    #[inline(always)]
    unsafe fn min_pair(&mut self, p: usize, mins: T::I) {
        // SAFETY: the caller's.
        unsafe { self.msum = T::pair(self.msum, mins, self.sums[0].subs.pair::<T>(p)) }
    }
    #[inline(always)]
    unsafe fn weights(&mut self, first: usize, q: [T::I; 4]) {
        // SAFETY: the caller's; 16 activations.
        unsafe {
            if B::WEIGHTS != CHUNK {
                let mut isum = [[self.isum]];
                let x = [self.x.qs[self.at + first..][..16].as_ptr()];
                dot::<T, B, 1, 1, 4>(&mut isum, [q], x);
                self.isum = isum[0][0];
            } else if Self::group() == 8 {
                self.group_of(first, [q[0], q[1]]);
                self.group_of(first + 8, [q[2], q[3]]);
            } else {
                self.group_of(first, q);
            }
        }
    }
}

/// The kernel's products and nothing else, see [`super::Kernels::products`].
///
/// # Safety
/// The tier's features are enabled.
#[inline(always)]
pub(super) unsafe fn products<T: Tile>(w: &[u8], x: &[[i8; 4]; 16]) -> i32 {
    // SAFETY: the caller's promise, handed on.
    unsafe {
        match T::TOKENS {
            8 => products_of_all::<T, 8>(w, x),
            _ => products_of_all::<T, 4>(w, x),
        }
    }
}

/// The same, N tokens at a time.
#[inline(always)]
unsafe fn products_of_all<T: Tile, const N: usize>(w: &[u8], x: &[[i8; 4]; 16]) -> i32 {
    let mut total = 0i32;
    for x in x.as_chunks::<N>().0 {
        // SAFETY: the caller's.
        total = total.wrapping_add(unsafe { products_of::<T, N>(w, x) });
    }
    total
}

/// The same for N tokens.
#[inline(always)]
unsafe fn products_of<T: Tile, const N: usize>(w: &[u8], x: &[[i8; 4]; N]) -> i32 {
    let x = x.map(|x| [x; 4]);
    let x: [*const i8; N] = std::array::from_fn(|t| x[t].as_ptr().cast());
    // SAFETY: 16 weights of each row, 16 activations of each token, at most `MAX_ROWS` lanes.
    unsafe {
        let mut sums = [[T::splat(0); N]];
        for w in w.chunks_exact(16 * T::ROWS) {
            let w = w.as_ptr().cast::<i32>();
            let w = [0, 1, 2, 3].map(|j| T::load(w.add(j * T::ROWS)));
            T::dot::<Sum<4, true>, N, 1, 4>(&mut sums, [w], x);
        }
        let mut total = 0i32;
        for sums in sums[0] {
            let mut lanes = [0; MAX_ROWS];
            T::store(lanes.as_mut_ptr(), sums);
            total = lanes.iter().fold(total, |s, l| s.wrapping_add(*l));
        }
        total
    }
}

/// One function of a tier per integer format, and `install_tiles(k)`, which puts them into the table. `$matmul`: another kernel than
/// [`matmul`], with its parameters.
macro_rules! tile_doors {
    ($tile:ty, #[$tier:meta]) => {
        use $crate::simd::tile::matmul as matmul_tiles;
        $crate::simd::tile::tile_doors!($tile, matmul_tiles, #[$tier]);
    };
    ($tile:ty, $matmul:ident, #[$tier:meta]) => {
        $crate::simd::tile::tile_doors! {
            $tile, $matmul, #[$tier];
            matmul_q4_0 = Q4_0, q4_0::Q4_0;
            matmul_q4_1 = Q4_1, q4_1::Q4_1;
            matmul_q5_0 = Q5_0, q5_0::Q5_0;
            matmul_q5_1 = Q5_1, q5_1::Q5_1;
            matmul_q8_0 = Q8_0, q8_0::Q8_0;
            matmul_q2_k = Q2_K, q2_k::Q2_K;
            matmul_q3_k = Q3_K, q3_k::Q3_K;
            matmul_q4_k = Q4_K, q4_k::Q4_K;
            matmul_q5_k = Q5_K, q5_k::Q5_K;
            matmul_q6_k = Q6_K, q6_k::Q6_K;
            matmul_iq4_nl = IQ4_NL, iq4_nl::Iq4Nl;
            matmul_iq4_xs = IQ4_XS, iq4_xs::Iq4Xs;
        }
    };
    ($tile:ty, $matmul:ident, #[$tier:meta]; $($name:ident = $format:ident, $module:ident::$block:ident;)*) => {
        $(
            #[$tier]
            fn $name(w: Rows<'_>, x: Tokens<'_>, y: &mut Stripe<'_>) {
                // SAFETY: the features that the body needs are enabled here; `Kernels::matmul` asserts the shapes.
                unsafe { $matmul::<$tile, quant::$module::$block>(w, x, y) }
            }
        )*

        #[$tier]
        fn products(w: &[u8], x: &[[i8; 4]; 16]) -> i32 {
            // SAFETY: as above.
            unsafe { $crate::simd::tile::products::<$tile>(w, x) }
        }

        /// Puts the integer formats' kernels into the table.
        fn install_tiles(k: &mut Kernels) {
            k.products = products;
            $( k.matmul[quant::Format::$format.index()] = $name; )*
        }
    };
}
pub(super) use tile_doors;
