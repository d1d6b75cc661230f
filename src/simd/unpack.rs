//! From packed blocks to bytes: where the bits of every format lie, for many rows at once.
//!
//! [`Source::columns`] fetches 16 bytes of every row and transposes them: each register then has the same
//! 4 bytes of all rows. From there on unpacking is shifts and masks of whole registers, and its result is
//! already interleaved as products want it. The layouts are those of `quant/`, whose files say where
//! they come from.

use super::tile::{self, Tile};
use crate::quant::IntBlock;
use crate::quant::act::CHUNK;
use crate::quant::iq4_nl::{self, Iq4Nl};
use crate::quant::iq4_xs::Iq4Xs;
use crate::quant::q2_k::Q2_K;
use crate::quant::q3_k::Q3_K;
use crate::quant::q4_0::Q4_0;
use crate::quant::q4_1::Q4_1;
use crate::quant::q4_k::Q4_K;
use crate::quant::q5_0::Q5_0;
use crate::quant::q5_1::Q5_1;
use crate::quant::q5_k::Q5_K;
use crate::quant::q6_k::Q6_K;
use crate::quant::q8_0::Q8_0;
use std::marker::PhantomData;
use std::mem::offset_of;

/// A format that can be unpacked, one block of every row at a time.
pub(super) trait Unpack: IntBlock {
    /// Unpacks one block of every row: its scales first, then its weights, in pieces of any order.
    ///
    /// # Safety
    /// The tier's features are enabled, and `rows` leads to whole blocks of this format.
    unsafe fn unpack<T: Tile, S: Sink<T>>(rows: Source<T>, to: &mut S);
}

/// Who takes what a block is made of.
///
/// # Safety
/// Of every function: the tier's features are enabled; indices are inside a block.
pub(super) trait Sink<T: Tile> {
    /// The block's scale.
    unsafe fn scale(&mut self, d: T::F);
    /// The block's minimum, [`IntBlock::min`].
    unsafe fn min(&mut self, m: T::F);
    /// The scale of sub-block `s`.
    unsafe fn sub(&mut self, s: usize, scale: T::I);
    /// The minimums of the sub-blocks `2 p` and `2 p + 1`, a pair of i16.
    unsafe fn min_pair(&mut self, p: usize, mins: T::I);
    /// 16 weights of every row from weight `first` on, raised by the tier's bias.
    unsafe fn weights(&mut self, first: usize, q: [T::I; 4]);
}

/// One block of every row of a panel.
#[derive(Clone, Copy)]
pub(super) struct Source<T> {
    at: *const u8,
    stride: usize,
    tile: PhantomData<T>,
}

// Vectors are made in loops here and not in closures: a closure has none of the tier's features where it is not inlined,
// and a large one is not (decode of Q3_K was ten times slower).
//
// Every `unsafe fn` from here on has the contract of `Unpack::unpack`: the tier's features are enabled,
// and offsets stay inside a block.

impl<T: Tile> Source<T> {
    /// The blocks at `at + r · stride`.
    #[inline(always)]
    pub(super) fn new(at: *const u8, stride: usize) -> Source<T> {
        Source {
            at,
            stride,
            tile: PhantomData,
        }
    }

    /// 4 bytes of every block.
    #[inline(always)]
    unsafe fn column(self, offset: usize) -> T::I {
        // SAFETY: the caller's.
        unsafe { T::column(self.at.add(offset), self.stride) }
    }

    /// 16 bytes of every block.
    #[inline(always)]
    unsafe fn columns(self, offset: usize) -> [T::I; 4] {
        // SAFETY: the caller's.
        unsafe { T::columns(self.at.add(offset), self.stride) }
    }
}

/// The low byte of `x` four times.
fn bytes(x: i32) -> i32 {
    i32::from_ne_bytes([x as u8; 4])
}

/// The bits of `mask`, a byte, of every byte of `x >> at`.
#[inline(always)]
unsafe fn bits<T: Tile>(x: T::I, at: i32, mask: i32) -> T::I {
    // SAFETY: the caller's.
    unsafe { field::<T>(x, at, bytes(mask)) }
}

/// The bits of `mask` of every lane of `x >> at`.
#[inline(always)]
unsafe fn field<T: Tile>(x: T::I, at: i32, mask: i32) -> T::I {
    // SAFETY: the caller's.
    unsafe { T::and(T::shr(x, at), T::splat(mask)) }
}

/// Hands on 16 weights of every row, from weight `first` on; `stored` is what they have been raised by in
/// the file, to be replaced by the tier's bias.
#[inline(always)]
unsafe fn put<T: Tile, B: IntBlock>(
    to: &mut impl Sink<T>,
    first: usize,
    q: [T::I; 4],
    stored: i32,
) {
    let raise = T::bias(B::OFFSET) - stored;
    let mut q = q;
    // SAFETY: the caller's.
    unsafe {
        if raise != 0 {
            for q in &mut q {
                *q = T::add_bytes(*q, T::splat(bytes(raise)));
            }
        }
        to.weights(first, q);
    }
}

/// The two planes of nibbles, the low ones first.
#[inline(always)]
unsafe fn nibbles<T: Tile>(bytes: [T::I; 4]) -> [[T::I; 4]; 2] {
    let mut planes = [bytes; 2];
    for (plane, q) in planes.iter_mut().enumerate() {
        for q in q {
            // SAFETY: the caller's.
            *q = unsafe { bits::<T>(*q, 4 * plane as i32, 15) };
        }
    }
    planes
}

/// [`put`] for two planes of weights, one from weight `first[0]`, one from `first[1]` on.
#[inline(always)]
unsafe fn put_planes<T: Tile, B: IntBlock>(
    to: &mut impl Sink<T>,
    first: [usize; 2],
    planes: [[T::I; 4]; 2],
    stored: i32,
) {
    for (first, q) in first.into_iter().zip(planes) {
        // SAFETY: the caller's.
        unsafe { put::<T, B>(to, first, q, stored) };
    }
}

/// One value for each sub-block of 256 weights, of which the first `CHUNK / IntBlock::SUB` count.
type Subs<T> = [<T as Tile>::I; CHUNK / 16];

/// Hands on the scales of all sub-blocks, and the minimums where there are any: none is below 0.
#[inline(always)]
unsafe fn put_subs<T: Tile, B: IntBlock>(
    to: &mut impl Sink<T>,
    scales: &Subs<T>,
    mins: Option<&Subs<T>>,
) {
    // SAFETY: the caller's.
    unsafe {
        for (s, scale) in scales[..CHUNK / B::SUB].iter().enumerate() {
            to.sub(s, tile::factor::<T, B>(*scale));
        }
        if let Some(mins) = mins {
            for p in 0..CHUNK / B::SUB / 2 {
                to.min_pair(p, T::or(mins[2 * p], T::shl(mins[2 * p + 1], 16)));
            }
        }
    }
}

// ---- Blocks of 32 ----------------------------------------------------------------------------

impl Unpack for Q4_0 {
    #[inline(always)]
    unsafe fn unpack<T: Tile, S: Sink<T>>(rows: Source<T>, to: &mut S) {
        // SAFETY: the caller's.
        unsafe {
            to.scale(T::halves(rows.column(offset_of!(Q4_0, d))));
            let qs = rows.columns(offset_of!(Q4_0, qs));
            put_planes::<T, Q4_0>(to, [0, 16], nibbles::<T>(qs), 8);
        }
    }
}

impl Unpack for Q4_1 {
    #[inline(always)]
    unsafe fn unpack<T: Tile, S: Sink<T>>(rows: Source<T>, to: &mut S) {
        // SAFETY: the caller's.
        unsafe {
            let head = rows.column(offset_of!(Q4_1, d));
            to.scale(T::halves(head));
            to.min(T::halves(T::shr(head, 16)));
            let qs = rows.columns(offset_of!(Q4_1, qs));
            put_planes::<T, Q4_1>(to, [0, 16], nibbles::<T>(qs), 0);
        }
    }
}

/// Adds the fifth bits of the formats with 5 bits and blocks of 32: bit `i` of `qh` belongs to weight `i`.
#[inline(always)]
unsafe fn add_fifth_bits<T: Tile>(planes: &mut [[T::I; 4]; 2], qh: T::I) {
    for (plane, q) in planes.iter_mut().enumerate() {
        for (i, q) in q.iter_mut().enumerate() {
            // SAFETY: the caller's.
            unsafe {
                // Four bits, spread over the four bytes by a product without carries, and moved to bit 4.
                let four = field::<T>(qh, (16 * plane + 4 * i) as i32, 15);
                let spread = T::and(T::mul(four, T::splat(0x0020_4081)), T::splat(0x0101_0101));
                *q = T::or(*q, T::shl(spread, 4));
            }
        }
    }
}

impl Unpack for Q5_0 {
    #[inline(always)]
    unsafe fn unpack<T: Tile, S: Sink<T>>(rows: Source<T>, to: &mut S) {
        // SAFETY: the caller's.
        unsafe {
            to.scale(T::halves(rows.column(offset_of!(Q5_0, d))));
            let qh = rows.column(offset_of!(Q5_0, qh));
            let qs = rows.columns(offset_of!(Q5_0, qs));
            let mut planes = nibbles::<T>(qs);
            add_fifth_bits::<T>(&mut planes, qh);
            put_planes::<T, Q5_0>(to, [0, 16], planes, 16);
        }
    }
}

impl Unpack for Q5_1 {
    #[inline(always)]
    unsafe fn unpack<T: Tile, S: Sink<T>>(rows: Source<T>, to: &mut S) {
        // SAFETY: the caller's.
        unsafe {
            let head = rows.column(offset_of!(Q5_1, d));
            to.scale(T::halves(head));
            to.min(T::halves(T::shr(head, 16)));
            let qh = rows.column(offset_of!(Q5_1, qh));
            let qs = rows.columns(offset_of!(Q5_1, qs));
            let mut planes = nibbles::<T>(qs);
            add_fifth_bits::<T>(&mut planes, qh);
            put_planes::<T, Q5_1>(to, [0, 16], planes, 0);
        }
    }
}

impl Unpack for Q8_0 {
    #[inline(always)]
    unsafe fn unpack<T: Tile, S: Sink<T>>(rows: Source<T>, to: &mut S) {
        // SAFETY: the caller's.
        unsafe {
            to.scale(T::halves(rows.column(offset_of!(Q8_0, d))));
            for half in [0, 16] {
                let qs = rows.columns(offset_of!(Q8_0, qs) + half);
                put::<T, Q8_0>(to, half, qs, 0);
            }
        }
    }
}

/// The values of 4-bit codes.
#[inline(always)]
unsafe fn look_up<T: Tile>(planes: &mut [[T::I; 4]; 2]) {
    for q in planes.as_flattened_mut() {
        // SAFETY: the caller's.
        *q = unsafe { T::lookup(&iq4_nl::VALUES, *q) };
    }
}

impl Unpack for Iq4Nl {
    #[inline(always)]
    unsafe fn unpack<T: Tile, S: Sink<T>>(rows: Source<T>, to: &mut S) {
        // SAFETY: the caller's.
        unsafe {
            to.scale(T::halves(rows.column(offset_of!(Iq4Nl, d))));
            let qs = rows.columns(offset_of!(Iq4Nl, qs));
            let mut planes = nibbles::<T>(qs);
            look_up::<T>(&mut planes);
            put_planes::<T, Iq4Nl>(to, [0, 16], planes, 0);
        }
    }
}

// ---- Blocks of 256 ---------------------------------------------------------------------------

/// `(scale, minimum)` of sub-block `s` in the 12 bytes that Q4_K and Q5_K pack them into
/// ([`crate::quant::q4_k::scale_min`]).
#[inline(always)]
unsafe fn scale_min<T: Tile>([a, b, c]: [T::I; 3], s: usize) -> (T::I, T::I) {
    let at = 8 * (s % 4) as i32;
    // SAFETY: the caller's.
    unsafe {
        if s < 4 {
            return (field::<T>(a, at, 63), field::<T>(b, at, 63));
        }
        let upper = |x| T::shl(field::<T>(x, at + 6, 3), 4);
        (
            T::or(field::<T>(c, at, 15), upper(a)),
            T::or(field::<T>(c, at + 4, 15), upper(b)),
        )
    }
}

/// The first 16 bytes of Q4_K and Q5_K: both f16 scales, and those of the sub-blocks.
#[inline(always)]
unsafe fn put_head<T: Tile, B: IntBlock>(to: &mut impl Sink<T>, [d, a, b, c]: [T::I; 4]) {
    // SAFETY: the caller's.
    unsafe {
        put_two_scales::<T>(to, d);
        let (mut scales, mut mins) = ([T::splat(0); CHUNK / 16], [T::splat(0); CHUNK / 16]);
        for s in 0..CHUNK / B::SUB {
            (scales[s], mins[s]) = scale_min::<T>([a, b, c], s);
        }
        put_subs::<T, B>(to, &scales, Some(&mins));
    }
}

/// `d` in the low and `dmin`, which is subtracted, in the high half.
#[inline(always)]
unsafe fn put_two_scales<T: Tile>(to: &mut impl Sink<T>, both: T::I) {
    // SAFETY: the caller's.
    unsafe {
        to.scale(T::halves(both));
        // Only the sign differs, and the low half is not looked at: a sum with bit 31 alone flips it.
        let negated = T::add(both, T::splat(i32::MIN));
        to.min(T::halves(T::shr(negated, 16)));
    }
}

impl Unpack for Q4_K {
    #[inline(always)]
    unsafe fn unpack<T: Tile, S: Sink<T>>(rows: Source<T>, to: &mut S) {
        // SAFETY: the caller's.
        unsafe {
            put_head::<T, Q4_K>(to, rows.columns(offset_of!(Q4_K, d)));
            for part in 0..8 {
                let qs = rows.columns(offset_of!(Q4_K, qs) + 16 * part);
                let low = 64 * (part / 2) + 16 * (part % 2);
                put_planes::<T, Q4_K>(to, [low, low + 32], nibbles::<T>(qs), 0);
            }
        }
    }
}

impl Unpack for Q5_K {
    #[inline(always)]
    unsafe fn unpack<T: Tile, S: Sink<T>>(rows: Source<T>, to: &mut S) {
        // SAFETY: the caller's.
        unsafe {
            put_head::<T, Q5_K>(to, rows.columns(offset_of!(Q5_K, d)));
            for half in 0..2 {
                // Bit `s` of byte `j` belongs to weight `32 s + j`.
                let qh = rows.columns(offset_of!(Q5_K, qh) + 16 * half);
                for pair in 0..4 {
                    let qs = rows.columns(offset_of!(Q5_K, qs) + 32 * pair + 16 * half);
                    let low = 64 * pair + 16 * half;
                    let mut planes = nibbles::<T>(qs);
                    for (plane, q) in planes.iter_mut().enumerate() {
                        for (q, qh) in q.iter_mut().zip(qh) {
                            let fifth = bits::<T>(qh, (2 * pair + plane) as i32, 1);
                            *q = T::or(*q, T::shl(fifth, 4));
                        }
                    }
                    put_planes::<T, Q5_K>(to, [low, low + 32], planes, 0);
                }
            }
        }
    }
}

/// The signed byte `i` of every lane.
#[inline(always)]
unsafe fn signed_byte<T: Tile>(x: T::I, i: usize) -> T::I {
    // SAFETY: the caller's.
    unsafe {
        // Raised by 128 with the byte's wrapping, lowered again with the lane's.
        let raised = T::add_bytes(x, T::splat(bytes(128)));
        T::add(field::<T>(raised, 8 * i as i32, 0xff), T::splat(-128))
    }
}

impl Unpack for Q6_K {
    #[inline(always)]
    unsafe fn unpack<T: Tile, S: Sink<T>>(rows: Source<T>, to: &mut S) {
        // SAFETY: the caller's; `d` is the block's last field, so it is read from 2 bytes before.
        unsafe {
            let d = T::shr(rows.column(offset_of!(Q6_K, d) - 2), 16);
            to.scale(T::halves(d));
            let scales = rows.columns(offset_of!(Q6_K, scales));
            let mut subs = [T::splat(0); CHUNK / 16];
            for (s, sub) in subs.iter_mut().enumerate() {
                *sub = signed_byte::<T>(scales[s / 4], s % 4);
            }
            put_subs::<T, Q6_K>(to, &subs, None);
            for half in 0..2 {
                for part in 0..2 {
                    // 16 bytes of upper bits serve four groups of 32 weights, lower bits two.
                    let at = 32 * half + 16 * part;
                    let qh = rows.columns(offset_of!(Q6_K, qh) + at);
                    for group in 0..2 {
                        let ql =
                            rows.columns(offset_of!(Q6_K, ql) + 64 * half + 32 * group + 16 * part);
                        let low = 128 * half + 32 * group + 16 * part;
                        let mut planes = nibbles::<T>(ql);
                        for (plane, q) in planes.iter_mut().enumerate() {
                            for (q, qh) in q.iter_mut().zip(qh) {
                                let two = bits::<T>(qh, (2 * group + 4 * plane) as i32, 3);
                                *q = T::or(*q, T::shl(two, 4));
                            }
                        }
                        put_planes::<T, Q6_K>(to, [low, low + 64], planes, 32);
                    }
                }
            }
        }
    }
}

impl Unpack for Q2_K {
    #[inline(always)]
    unsafe fn unpack<T: Tile, S: Sink<T>>(rows: Source<T>, to: &mut S) {
        // SAFETY: the caller's.
        unsafe {
            put_two_scales::<T>(to, rows.column(offset_of!(Q2_K, d)));
            let scales = rows.columns(offset_of!(Q2_K, scales));
            let (mut subs, mut mins) = ([T::splat(0); CHUNK / 16], [T::splat(0); CHUNK / 16]);
            for s in 0..CHUNK / 16 {
                let at = 8 * (s % 4) as i32;
                subs[s] = field::<T>(scales[s / 4], at, 15);
                mins[s] = field::<T>(scales[s / 4], at + 4, 15);
            }
            put_subs::<T, Q2_K>(to, &subs, Some(&mins));
            for part in 0..4 {
                let qs = rows.columns(offset_of!(Q2_K, qs) + 16 * part);
                let first = 128 * (part / 2) + 16 * (part % 2);
                for group in 0..4 {
                    let mut q = qs;
                    for q in &mut q {
                        *q = bits::<T>(*q, 2 * group as i32, 3);
                    }
                    put::<T, Q2_K>(to, first + 32 * group, q, 0);
                }
            }
        }
    }
}

impl Unpack for Q3_K {
    #[inline(always)]
    unsafe fn unpack<T: Tile, S: Sink<T>>(rows: Source<T>, to: &mut S) {
        // SAFETY: the caller's; `d` is the block's last field, so it is read from 2 bytes before.
        unsafe {
            let d = T::shr(rows.column(offset_of!(Q3_K, d) - 2), 16);
            to.scale(T::halves(d));
            let at = offset_of!(Q3_K, scales);
            let low = [rows.column(at), rows.column(at + 4)];
            let high = rows.column(at + 8);
            let mut subs = [T::splat(0); CHUNK / 16];
            for (s, sub) in subs.iter_mut().enumerate() {
                let byte = 8 * (s % 4) as i32;
                let low = field::<T>(low[s / 4 % 2], byte + 4 * (s / 8) as i32, 15);
                let high = field::<T>(high, byte + 2 * (s / 4) as i32, 3);
                *sub = T::add(T::or(low, T::shl(high, 4)), T::splat(-32));
            }
            put_subs::<T, Q3_K>(to, &subs, None);
            for part in 0..2 {
                // Bit `i / 32` of byte `i % 32` is the third bit of weight `i`.
                let third = rows.columns(offset_of!(Q3_K, hmask) + 16 * part);
                for half in 0..2 {
                    let qs = rows.columns(offset_of!(Q3_K, qs) + 32 * half + 16 * part);
                    for group in 0..4 {
                        let mut q = qs;
                        for (q, third) in q.iter_mut().zip(third) {
                            let third = bits::<T>(third, (4 * half + group) as i32, 1);
                            *q = T::or(bits::<T>(*q, 2 * group as i32, 3), T::shl(third, 2));
                        }
                        put::<T, Q3_K>(to, 128 * half + 32 * group + 16 * part, q, 4);
                    }
                }
            }
        }
    }
}

impl Unpack for Iq4Xs {
    #[inline(always)]
    unsafe fn unpack<T: Tile, S: Sink<T>>(rows: Source<T>, to: &mut S) {
        // SAFETY: the caller's; `scales_h` lies behind `d`.
        unsafe {
            let head = rows.column(offset_of!(Iq4Xs, d));
            to.scale(T::halves(head));
            let low = rows.column(offset_of!(Iq4Xs, scales_l));
            let mut subs = [T::splat(0); CHUNK / 16];
            for s in 0..CHUNK / 32 {
                let high = T::shl(field::<T>(head, 16 + 2 * s as i32, 3), 4);
                let scale = T::or(field::<T>(low, 4 * s as i32, 15), high);
                subs[s] = T::add(scale, T::splat(-32));
            }
            put_subs::<T, Iq4Xs>(to, &subs, None);
            for part in 0..8 {
                let qs = rows.columns(offset_of!(Iq4Xs, qs) + 16 * part);
                let mut planes = nibbles::<T>(qs);
                look_up::<T>(&mut planes);
                put_planes::<T, Iq4Xs>(to, [32 * part, 32 * part + 16], planes, 0);
            }
        }
    }
}
