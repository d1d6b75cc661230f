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
//! shifts of whole registers, cheap enough for a single token, and is paid once for all tokens; these
//! go through a panel a few at a time, so that accumulators stay in registers.
//!
//! ```text
//! for panel in rows / ROWS:  for chunk in k / 256:  unpack;  for tokens / TOKENS:  tile
//! ```

use super::unpack::{Source, Unpack};
use super::{Rows, Tokens};
use crate::pool::Stripe;
use crate::quant::IntBlock;
use crate::quant::act::{CHUNK, Chunk, SUM};
use std::mem::MaybeUninit;

/// The few instructions that a tier brings. Lanes are rows.
///
/// # Safety
/// Of every function: the tier's features are enabled, and pointers lead to as much as is said.
pub(super) trait Tile: Copy {
    /// Rows of a panel.
    const ROWS: usize;
    /// Tokens that share a pass over a panel, at most 8.
    const TOKENS: usize;
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

    /// `sums[t] += Σ_16 w · x[t]`. `w`: 16 weights of each row, four registers of a panel, of at most `BITS`
    /// bits; `x[t]`: 16 activations.
    unsafe fn dot16<const N: usize, const BITS: u32>(
        sums: &mut [Self::I; N],
        w: *const u8,
        x: &[*const i8; N],
    );
    /// `acc + m[r][0] · x[0] + m[r][1] · x[1]`; `m`: a pair of i16 in every lane, `x`: two i16.
    unsafe fn pair(acc: Self::I, m: Self::I, x: *const i16) -> Self::I;

    /// The f16 in the low half of every lane.
    unsafe fn halves(x: Self::I) -> Self::F;
    /// [`Tile::ROWS`] floats.
    unsafe fn load_floats(x: *const f32) -> Self::F;
    /// [`Tile::ROWS`] floats.
    unsafe fn store_floats(to: *mut f32, x: Self::F);
    /// The float step: `fma(d · dx, sum, acc)`.
    unsafe fn step(acc: Self::F, d: Self::F, dx: f32, sum: Self::I) -> Self::F;
}

/// Most rows of a panel in any tier.
pub(super) const MAX_ROWS: usize = 16;
/// Tokens that share the unpacking of a panel; more than this come in several passes.
const BATCH: usize = 512;

/// Some rows × 256 weights, interleaved. Of each array the first [`Tile::ROWS`] columns are in use.
#[repr(C, align(64))]
pub(super) struct Panel {
    /// `(CHUNK / 4, ROWS, 4)`, packed to the tier's number of rows.
    pub(super) q: [u8; CHUNK * MAX_ROWS],
    /// Blocks' scales: one row for 256 weights, or one for every 32.
    pub(super) scale: [[f32; MAX_ROWS]; CHUNK / 32],
    /// Blocks' minimums.
    pub(super) min: [[f32; MAX_ROWS]; CHUNK / 32],
    /// Sub-blocks' scales.
    pub(super) sub: [[i32; MAX_ROWS]; CHUNK / 16],
    /// What the sums of activations are multiplied with, a pair of i16 for two sums of 16: sub-blocks'
    /// minimums, or their scales where a bias must leave again.
    pub(super) pairs: [[i32; MAX_ROWS]; CHUNK / 32],
}

/// `y[t][r] = Σ_k w[r][k] · x[t][k]`, see [`super::Kernels::matmul`].
///
/// # Safety
/// The tier's features are enabled. Shapes belong together (`Kernels::matmul` asserts them).
#[inline(always)]
pub(super) unsafe fn matmul<T: Tile, B: Unpack>(w: Rows<'_>, x: Tokens<'_>, y: &mut Stripe<'_>) {
    let stride = w.row_bytes();
    let panels = w.len() / T::ROWS;
    let mut panel = Panel {
        q: [0; CHUNK * MAX_ROWS],
        scale: [[0.0; MAX_ROWS]; CHUNK / 32],
        min: [[0.0; MAX_ROWS]; CHUNK / 32],
        sub: [[0; MAX_ROWS]; CHUNK / 16],
        pairs: [[0; MAX_ROWS]; CHUNK / 32],
    };
    let mut acc = [const { MaybeUninit::<[f32; MAX_ROWS]>::uninit() }; BATCH];
    for (batch, pick) in x.pick.chunks(BATCH).enumerate() {
        let acc = &mut acc[..pick.len()];
        for p in 0..panels {
            for acc in acc.iter_mut() {
                acc.write([0.0; MAX_ROWS]);
            }
            // SAFETY: all of them have just been written.
            let acc = unsafe {
                std::slice::from_raw_parts_mut(
                    acc.as_mut_ptr().cast::<[f32; MAX_ROWS]>(),
                    acc.len(),
                )
            };
            let rows = w.bytes[p * T::ROWS * stride..].as_ptr();
            for k in (0..w.k).step_by(CHUNK) {
                let width = CHUNK.min(w.k - k);
                let at = k / B::WEIGHTS * size_of::<B>();
                let bytes = width / B::WEIGHTS * size_of::<B>();
                // SAFETY: chunk `k` of `ROWS` rows is inside `w.bytes`; the features are enabled by the caller.
                unsafe {
                    for b in 0..width / B::WEIGHTS {
                        let source = Source::<T>::new(rows.add(at + b * size_of::<B>()), stride);
                        B::unpack(source, b, &mut panel);
                    }
                    // The next panel's rows lie behind these: while this chunk is worked, the share of them
                    // that keeps pace is fetched, in the order of memory.
                    let ahead = rows.wrapping_add(T::ROWS * (stride + at));
                    for line in (0..T::ROWS * bytes).step_by(64) {
                        T::prefetch(ahead.wrapping_add(line));
                    }
                }
                let chunks = x.acts.chunks(k / CHUNK);
                let mut t = 0;
                while t < pick.len() {
                    let (pick, acc) = (&pick[t..], &mut acc[t..]);
                    // SAFETY: the features are enabled by the caller.
                    t += unsafe {
                        match pick.len().min(T::TOKENS) {
                            8.. => tile::<T, B, 8>(&panel, chunks, pick, acc, width),
                            4.. => tile::<T, B, 4>(&panel, chunks, pick, acc, width),
                            2.. => tile::<T, B, 2>(&panel, chunks, pick, acc, width),
                            _ => tile::<T, B, 1>(&panel, chunks, pick, acc, width),
                        }
                    };
                }
            }
            for (t, acc) in acc.iter().enumerate() {
                y.row(batch * BATCH + t)[p * T::ROWS..][..T::ROWS].copy_from_slice(&acc[..T::ROWS]);
            }
        }
    }
    super::matmul_rest(w, panels * T::ROWS, x, y);
}

/// One panel × the first N picked tokens: `acc[t][r] += Σ_k w[r][k] · x[t][k]` over the panel's chunk.
#[inline(always)]
unsafe fn tile<T: Tile, B: IntBlock, const N: usize>(
    panel: &Panel,
    chunks: &[Chunk],
    pick: &[u32],
    acc: &mut [[f32; MAX_ROWS]],
    width: usize,
) -> usize {
    let x: [&Chunk; N] = std::array::from_fn(|t| &chunks[pick[t] as usize]);
    let acc: &mut [[f32; MAX_ROWS]; N] = (&mut acc[..N]).try_into().expect("N tokens");
    // SAFETY: the features are enabled by the caller; the panel's arrays and the chunks are as long as
    // their documentation says.
    unsafe {
        let mut y = [T::load_floats(acc[0].as_ptr()); N];
        for t in 1..N {
            y[t] = T::load_floats(acc[t].as_ptr());
        }
        match B::WEIGHTS {
            CHUNK => block_of_256::<T, B, N>(panel, &x, &mut y),
            _ => (0..width / 32).for_each(|b| block_of_32::<T, B, N>(panel, b, &x, &mut y)),
        }
        for t in 0..N {
            T::store_floats(acc[t].as_mut_ptr(), y[t]);
        }
    }
    N
}

/// Block `b` of 32 weights: one float step.
#[inline(always)]
unsafe fn block_of_32<T: Tile, B: IntBlock, const N: usize>(
    panel: &Panel,
    b: usize,
    x: &[&Chunk; N],
    y: &mut [T::F; N],
) {
    let bias = T::bias(B::OFFSET);
    // SAFETY: as `tile`.
    unsafe {
        let zero = T::splat(0);
        let mut isum = [zero; N];
        if bias != 0 {
            // The bias leaves through the sums of the activations.
            let out = T::splat((-bias & 0xffff) | (-bias << 16));
            for t in 0..N {
                isum[t] = T::pair(zero, out, x[t].sums[32 * b / SUM..].as_ptr());
            }
        }
        dot::<T, B, N, 32>(panel, 32 * b, x, &mut isum);
        let d = T::load_floats(panel.scale[b].as_ptr());
        for t in 0..N {
            y[t] = T::step(y[t], d, x[t].d[b], isum[t]);
        }
        if B::HAS_MIN {
            let m = T::load_floats(panel.min[b].as_ptr());
            let one = T::splat(0x1_0001);
            for t in 0..N {
                let total = T::pair(zero, one, x[t].sums[32 * b / SUM..].as_ptr());
                y[t] = T::step(y[t], m, x[t].d[b], total);
            }
        }
    }
}

/// A block of 256 weights: sub-blocks' sums times their integer scales, one float step.
#[inline(always)]
unsafe fn block_of_256<T: Tile, B: IntBlock, const N: usize>(
    panel: &Panel,
    x: &[&Chunk; N],
    y: &mut [T::F; N],
) {
    let bias = T::bias(B::OFFSET);
    // SAFETY: as `tile`.
    unsafe {
        let zero = T::splat(0);
        let mut total = [zero; N];
        for s in 0..CHUNK / B::SUB {
            let mut isum = [zero; N];
            match B::SUB {
                16 => dot::<T, B, N, 16>(panel, 16 * s, x, &mut isum),
                _ => dot::<T, B, N, 32>(panel, 32 * s, x, &mut isum),
            }
            let scale = T::load(panel.sub[s].as_ptr());
            for t in 0..N {
                total[t] = T::add(total[t], T::mul(isum[t], scale));
            }
        }
        // Sums of activations times minimums, or times scales where the bias has to leave.
        let mut other = [zero; N];
        if B::HAS_MIN || bias != 0 {
            for (p, pairs) in panel.pairs.iter().enumerate() {
                let pairs = T::load(pairs.as_ptr());
                for t in 0..N {
                    other[t] = T::pair(other[t], pairs, x[t].sums[2 * p..].as_ptr());
                }
            }
        }
        let d = T::load_floats(panel.scale[0].as_ptr());
        let m = T::load_floats(panel.min[0].as_ptr());
        for t in 0..N {
            if bias != 0 {
                total[t] = T::add(total[t], T::mul(other[t], T::splat(-bias)));
            }
            y[t] = T::step(y[t], d, x[t].d[0], total[t]);
            if B::HAS_MIN {
                y[t] = T::step(y[t], m, x[t].d[0], other[t]);
            }
        }
    }
}

/// `isum[t] += Σ w · x[t]` over the L weights from `first` on of the panel.
#[inline(always)]
unsafe fn dot<T: Tile, B: IntBlock, const N: usize, const L: usize>(
    panel: &Panel,
    first: usize,
    x: &[&Chunk; N],
    isum: &mut [T::I; N],
) {
    for k in (first..first + L).step_by(16) {
        let x = x.map(|x| x.qs[k..].as_ptr());
        let w = panel.q[k * T::ROWS..].as_ptr();
        // SAFETY: as `tile`; a panel's bits are the format's.
        unsafe {
            match B::BITS {
                ..=4 => T::dot16::<N, 4>(isum, w, &x),
                5..=6 => T::dot16::<N, 6>(isum, w, &x),
                _ => T::dot16::<N, 8>(isum, w, &x),
            }
        }
    }
}

/// One function of a tier per integer format, and `install_tiles(k)`, which puts them into the table.
macro_rules! tile_doors {
    ($tile:ty, #[$tier:meta]) => {
        $crate::simd::tile::tile_doors! {
            $tile, #[$tier];
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
    ($tile:ty, #[$tier:meta]; $($name:ident = $format:ident, $module:ident::$block:ident;)*) => {
        $(
            #[$tier]
            fn $name(w: Rows<'_>, x: Tokens<'_>, y: &mut Stripe<'_>) {
                // SAFETY: the features that the body needs are enabled here; `Kernels::matmul` asserts the shapes.
                unsafe { $crate::simd::tile::matmul::<$tile, quant::$module::$block>(w, x, y) }
            }
        )*

        /// Puts the integer formats' kernels into the table.
        fn install_tiles(k: &mut Kernels) {
            $( k.matmul[quant::Format::$format.index()] = $name; )*
        }
    };
}
pub(super) use tile_doors;
