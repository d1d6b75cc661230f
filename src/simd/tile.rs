//! Products of weights with many tokens: the kernel of prefill, written once.
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
//! accumulator: the canonical arithmetic of `quant`. Unpacking is paid once for all tokens; tokens go
//! through a panel a few at a time, so that accumulators stay in registers.
//!
//! ```text
//! for panel in rows / ROWS:  for chunk in k / 256:  unpack;  for tokens / TOKENS:  tile
//! ```

use super::{Rows, Tokens};
use crate::pool::Stripe;
use crate::quant::act::SUM;
use crate::quant::{IntBlock, blocks};

/// The few instructions that a tier brings. Lanes are rows.
///
/// # Safety
/// Of every function: the tier's features are enabled, and pointers lead to as many elements as said.
pub(super) trait Tile: Copy {
    /// Rows of a panel.
    const ROWS: usize;
    /// Tokens that share a pass over a panel.
    const TOKENS: usize;
    /// Four weights of each row.
    type W: Copy;
    /// An `i32` per row.
    type I: Copy;
    /// An `f32` per row.
    type F: Copy;

    /// What is added to the integers of a format with this [`IntBlock::OFFSET`] when a panel is made.
    fn bias(offset: i32) -> i32;
    /// Four weights of each row, from `ROWS · 4` bytes.
    unsafe fn weights(q: *const u8) -> Self::W;
    /// All lanes the same.
    unsafe fn splat(x: i32) -> Self::I;
    /// `acc + Σ_4 w · x`, `x`: 4 activations. `BYTE`: the weights are signed and use all 8 bits.
    unsafe fn dot4<const BYTE: bool>(acc: Self::I, w: Self::W, x: *const i8) -> Self::I;
    /// `acc + a · b`, `b`: `ROWS` integers.
    unsafe fn mul_add(acc: Self::I, a: Self::I, b: *const i32) -> Self::I;
    /// `acc + m[r][0] · x[0] + m[r][1] · x[1]`, `m`: `(ROWS, 2)`, `x`: `(2)`.
    unsafe fn pair(acc: Self::I, m: *const i16, x: *const i16) -> Self::I;
    /// `a - b · c`.
    unsafe fn mul_sub(a: Self::I, b: Self::I, c: i32) -> Self::I;
    /// `ROWS` floats.
    unsafe fn load(y: *const f32) -> Self::F;
    /// `ROWS` floats.
    unsafe fn store(y: *mut f32, acc: Self::F);
    /// The float step: `fma(d · dx, sum, acc)`, `d`: `ROWS` floats.
    unsafe fn step(acc: Self::F, d: *const f32, dx: f32, sum: Self::I) -> Self::F;
    /// Interleaves 16 bytes of each row: `rows[r]` is at `rows + r · CHUNK`, register `i` goes to
    /// `out + i · ROWS · 4`.
    unsafe fn interleave(rows: *const i8, out: *mut u8);
}

/// Weights of a row in a panel.
const CHUNK: usize = 256;
/// Most rows of a panel in any tier.
const MAX_ROWS: usize = 16;
/// Tokens that share the unpacking of a panel; more than this come in several passes.
const BATCH: usize = 512;

/// Some rows × 256 weights, interleaved. Of each array the first [`Tile::ROWS`] columns are in use.
#[repr(C, align(64))]
struct Panel {
    /// `(CHUNK / 4, ROWS, 4)`, packed to the tier's number of rows.
    q: [u8; CHUNK * MAX_ROWS],
    /// Blocks' scales: one row for 256 weights, or one for every 32.
    scale: [[f32; MAX_ROWS]; CHUNK / 32],
    /// Blocks' minimums.
    min: [[f32; MAX_ROWS]; CHUNK / 32],
    /// Sub-blocks' scales.
    sub: [[i32; MAX_ROWS]; CHUNK / 16],
    /// What the sums of activations are multiplied with, a pair for two sums of 16: sub-blocks'
    /// minimums, or their scales where a bias must leave again.
    pairs: [[[i16; 2]; MAX_ROWS]; CHUNK / 32],
}

/// One token's activations.
#[derive(Clone, Copy)]
struct X {
    qs: *const i8,
    d: *const f32,
    sums: *const i16,
}

/// `y[t][r] = Σ_k w[r][k] · x[t][k]`, see [`super::Kernels::matmul`].
///
/// # Safety
/// The tier's features are enabled. Shapes belong together (`Kernels::matmul` asserts them).
#[inline(always)]
pub(super) unsafe fn matmul<T: Tile, B: IntBlock>(w: Rows<'_>, x: Tokens<'_>, y: &mut Stripe<'_>) {
    let panels = w.len() / T::ROWS;
    let mut xs = [X {
        qs: std::ptr::null(),
        d: std::ptr::null(),
        sums: std::ptr::null(),
    }; BATCH];
    let mut acc = [[0.0f32; MAX_ROWS]; BATCH];
    let mut panel = Panel {
        q: [0; CHUNK * MAX_ROWS],
        scale: [[0.0; MAX_ROWS]; CHUNK / 32],
        min: [[0.0; MAX_ROWS]; CHUNK / 32],
        sub: [[0; MAX_ROWS]; CHUNK / 16],
        pairs: [[[0; 2]; MAX_ROWS]; CHUNK / 32],
    };
    for first in (0..x.len()).step_by(BATCH) {
        let n = BATCH.min(x.len() - first);
        for (t, slot) in xs[..n].iter_mut().enumerate() {
            let x = x.token(first + t).int();
            *slot = X {
                qs: x.qs.as_ptr(),
                d: x.d.as_ptr(),
                sums: x.sums.as_ptr(),
            };
        }
        for p in 0..panels {
            let rows = &w.bytes[p * T::ROWS * w.row_bytes()..][..T::ROWS * w.row_bytes()];
            acc[..n].fill([0.0; MAX_ROWS]);
            for k in (0..w.k).step_by(CHUNK) {
                let width = CHUNK.min(w.k - k);
                // SAFETY: chunk `k` is inside the rows; every pointer of `xs` leads to all activations of
                // its token; the features are enabled by the caller.
                unsafe {
                    unpack::<T, B>(rows, k, width, &mut panel);
                    let mut t = 0;
                    while t < n {
                        let left = n - t;
                        let (xs, acc) = (&xs[t..n], &mut acc[t..n]);
                        if left >= 8 && T::TOKENS >= 8 {
                            tile::<T, B, 8>(&panel, xs, acc, k, width);
                            t += 8;
                        } else if left >= 4 {
                            tile::<T, B, 4>(&panel, xs, acc, k, width);
                            t += 4;
                        } else {
                            tile::<T, B, 1>(&panel, xs, acc, k, width);
                            t += 1;
                        }
                    }
                }
            }
            for (t, acc) in acc[..n].iter().enumerate() {
                y.row(first + t)[p * T::ROWS..][..T::ROWS].copy_from_slice(&acc[..T::ROWS]);
            }
        }
    }
    super::matmul_rest(w, panels * T::ROWS, x, y);
}

/// Fills the panel with the weights `k .. k + width` of [`Tile::ROWS`] rows.
#[inline(always)]
unsafe fn unpack<T: Tile, B: IntBlock>(rows: &[u8], k: usize, width: usize, panel: &mut Panel) {
    let row_bytes = rows.len() / T::ROWS;
    let bias = T::bias(B::OFFSET) as i8;
    let mut ints = [[0i8; CHUNK]; MAX_ROWS];
    for (r, (row, ints)) in rows.chunks_exact(row_bytes).zip(&mut ints).enumerate() {
        let row = &blocks::<B>(row)[k / B::WEIGHTS..][..width / B::WEIGHTS];
        for (b, (block, ints)) in row
            .iter()
            .zip(ints.chunks_exact_mut(B::WEIGHTS))
            .enumerate()
        {
            block.ints(ints);
            // Wraps to an unsigned byte where the bias is 128.
            ints.iter_mut().for_each(|q| *q = q.wrapping_add(bias));
            panel.scale[b][r] = block.scale();
            if B::HAS_MIN {
                panel.min[b][r] = block.min();
            }
            if B::WEIGHTS == CHUNK {
                for s in 0..CHUNK / B::SUB {
                    let (scale, min) = block.sub(s);
                    panel.sub[s][r] = scale;
                    let factor = if B::HAS_MIN { min } else { scale } as i16;
                    match B::SUB {
                        16 => panel.pairs[s / 2][r][s % 2] = factor,
                        _ => panel.pairs[s][r] = [factor; 2],
                    }
                }
            }
        }
    }
    for part in (0..width).step_by(16) {
        // SAFETY: 16 bytes of each row; 4 registers of the panel, which has `CHUNK / 4` of them.
        unsafe {
            T::interleave(
                ints[0].as_ptr().add(part),
                panel.q.as_mut_ptr().add(part * T::ROWS),
            )
        };
    }
}

/// One panel × N tokens: `acc[t][r] += Σ_k w[r][k] · x[t][k]` over the panel's chunk.
#[inline(always)]
unsafe fn tile<T: Tile, B: IntBlock, const N: usize>(
    panel: &Panel,
    xs: &[X],
    acc: &mut [[f32; MAX_ROWS]],
    k: usize,
    width: usize,
) {
    let xs: &[X; N] = xs[..N].try_into().expect("N tokens");
    let acc: &mut [[f32; MAX_ROWS]; N] = (&mut acc[..N]).try_into().expect("N tokens");
    // SAFETY: as `matmul`; the panel's arrays are as long as its documentation says.
    unsafe {
        if B::WEIGHTS == CHUNK {
            tile_of_256::<T, B, N>(panel, xs, acc, k);
        } else {
            tile_of_32::<T, B, N>(panel, xs, acc, k, width);
        }
    }
}

/// Blocks of 32: a float step after every 32 weights.
#[inline(always)]
unsafe fn tile_of_32<T: Tile, B: IntBlock, const N: usize>(
    panel: &Panel,
    xs: &[X; N],
    acc: &mut [[f32; MAX_ROWS]; N],
    k: usize,
    width: usize,
) {
    let bias = T::bias(B::OFFSET);
    // SAFETY: as `tile`.
    unsafe {
        let mut y = [T::load(acc[0].as_ptr()); N];
        for t in 1..N {
            y[t] = T::load(acc[t].as_ptr());
        }
        for b in 0..width / 32 {
            let at = k + 32 * b;
            let mut total = [0; N];
            let mut isum = [T::splat(0); N];
            if bias != 0 || B::HAS_MIN {
                for t in 0..N {
                    let sums = xs[t].sums.add(at / SUM);
                    total[t] = *sums as i32 + *sums.add(1) as i32;
                }
            }
            if bias != 0 {
                for t in 0..N {
                    isum[t] = T::splat(-bias * total[t]);
                }
            }
            sum_of_products::<T, B, N, 32>(panel, 32 * b, xs, at, &mut isum);
            for t in 0..N {
                let dx = *xs[t].d.add(at / 32);
                y[t] = T::step(y[t], panel.scale[b].as_ptr(), dx, isum[t]);
                if B::HAS_MIN {
                    y[t] = T::step(y[t], panel.min[b].as_ptr(), dx, T::splat(total[t]));
                }
            }
        }
        for t in 0..N {
            T::store(acc[t].as_mut_ptr(), y[t]);
        }
    }
}

/// Blocks of 256: sub-blocks' sums times their integer scales, one float step.
#[inline(always)]
unsafe fn tile_of_256<T: Tile, B: IntBlock, const N: usize>(
    panel: &Panel,
    xs: &[X; N],
    acc: &mut [[f32; MAX_ROWS]; N],
    k: usize,
) {
    let bias = T::bias(B::OFFSET);
    // SAFETY: as `tile`.
    unsafe {
        let mut total = [T::splat(0); N];
        for s in 0..CHUNK / B::SUB {
            let mut isum = [T::splat(0); N];
            match B::SUB {
                16 => sum_of_products::<T, B, N, 16>(panel, 16 * s, xs, k + 16 * s, &mut isum),
                _ => sum_of_products::<T, B, N, 32>(panel, 32 * s, xs, k + 32 * s, &mut isum),
            }
            for t in 0..N {
                total[t] = T::mul_add(total[t], isum[t], panel.sub[s].as_ptr());
            }
        }
        // Sums of activations times minimums, or times scales where the bias has to leave.
        let mut other = [T::splat(0); N];
        if B::HAS_MIN || bias != 0 {
            for (p, pairs) in panel.pairs.iter().enumerate() {
                for t in 0..N {
                    other[t] = T::pair(
                        other[t],
                        pairs.as_ptr().cast(),
                        xs[t].sums.add(k / SUM + 2 * p),
                    );
                }
            }
        }
        for t in 0..N {
            if bias != 0 {
                total[t] = T::mul_sub(total[t], other[t], bias);
            }
            let dx = *xs[t].d.add(k / CHUNK);
            let mut y = T::load(acc[t].as_ptr());
            y = T::step(y, panel.scale[0].as_ptr(), dx, total[t]);
            if B::HAS_MIN {
                y = T::step(y, panel.min[0].as_ptr(), dx, other[t]);
            }
            T::store(acc[t].as_mut_ptr(), y);
        }
    }
}

/// `isum[t] += Σ w · x[t]` over L weights of the panel from `first` on, activations from `at` on.
#[inline(always)]
unsafe fn sum_of_products<T: Tile, B: IntBlock, const N: usize, const L: usize>(
    panel: &Panel,
    first: usize,
    xs: &[X; N],
    at: usize,
    isum: &mut [T::I; N],
) {
    // SAFETY: as `tile`; `first + L` is inside the panel's chunk.
    unsafe {
        for j in (0..L).step_by(4) {
            let w = T::weights(panel.q.as_ptr().add((first + j) * T::ROWS));
            for t in 0..N {
                let x = xs[t].qs.add(at + j);
                isum[t] = if B::OFFSET == 128 {
                    T::dot4::<true>(isum[t], w, x)
                } else {
                    T::dot4::<false>(isum[t], w, x)
                };
            }
        }
    }
}

/// One function of a tier per integer format, and `install_tiles(k)`, which puts them into the table.
/// A format with a kernel of its own for few tokens (`$few`) takes the tile from `$from` tokens on.
macro_rules! tile_doors {
    ($tile:ty, #[$tier:meta]; $($name:ident = $format:ident, $block:ty $(, $few:path, below $from:literal)?;)*) => {
        $(
            #[$tier]
            fn $name(w: Rows<'_>, x: Tokens<'_>, y: &mut Stripe<'_>) {
                $(
                    if x.len() < $from {
                        // SAFETY: the features that the body needs are enabled here; its pointers stay
                        // inside `w.bytes`, whole blocks (`Kernels::matmul` asserts the shapes).
                        return unsafe { $few(w, x, y) };
                    }
                )?
                // SAFETY: as above.
                unsafe { $crate::simd::tile::matmul::<$tile, $block>(w, x, y) }
            }
        )*

        /// Puts the integer formats' kernels into the table.
        fn install_tiles(k: &mut Kernels) {
            $( k.matmul[Format::$format.index()] = $name; )*
        }
    };
}
pub(super) use tile_doors;
