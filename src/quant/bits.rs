//! Small pieces that several formats share.
//!
//! Every format that splits its weights over bit planes does it the same way: `n` bytes hold
//! `n · 8 / BITS` weights, weight `i` in byte `i % n`, its bits at `BITS · (i / n)`. Neighbouring
//! weights are in neighbouring bytes, so unpacking is a shift and a mask of whole registers.

/// Adds one bit plane to unpacked weights: the `BITS` bits of weight `i`, shifted left by `lift`.
///
/// `bytes`: `(n)`; `out`: `(n · 8 / BITS)`, zero in the bits of this plane.
#[inline(always)]
pub fn unpack<const BITS: usize>(bytes: &[u8], lift: usize, out: &mut [i8]) {
    debug_assert_eq!(out.len() * BITS, bytes.len() * 8);
    let mask = (1u8 << BITS) - 1;
    for (j, out) in out.chunks_exact_mut(bytes.len()).enumerate() {
        for (q, b) in out.iter_mut().zip(bytes) {
            *q |= (((b >> (BITS * j)) & mask) << lift) as i8;
        }
    }
}

/// The inverse of [`unpack`]: the `BITS` bits of each weight from bit `lift` on.
///
/// `q`: `(n · 8 / BITS)`; `bytes`: `(n)`, overwritten.
#[inline(always)]
pub fn pack<const BITS: usize>(q: &[u8], lift: usize, bytes: &mut [u8]) {
    debug_assert_eq!(q.len() * BITS, bytes.len() * 8);
    let mask = (1u8 << BITS) - 1;
    bytes.fill(0);
    for (j, q) in q.chunks_exact(bytes.len()).enumerate() {
        for (b, q) in bytes.iter_mut().zip(q) {
            *b |= ((q >> lift) & mask) << (BITS * j);
        }
    }
}

/// 1.5·2²³: adding it to a float of magnitude below 2²² rounds that to an integer, half to even, and
/// leaves the integer in the low bits. The same on every CPU, and one addition in SIMD.
pub(super) const ROUND: f32 = 12_582_912.0;

/// The integer nearest to `x`, halves to even, for `|x| < 2²²`; what else comes out is arbitrary, but
/// the same as the reference's and in `-2²²..2²²`.
#[inline(always)]
pub fn nearest(x: f32) -> i32 {
    // In the low mantissa bits it has an offset of 2²².
    ((x + ROUND).to_bits() & 0x7f_ffff) as i32 - 0x40_0000
}

/// A float to an integer, toward zero. What does not fit gives `i32::MIN`, as the x86 instruction
/// does that the reference's casts compile to: tiny values, whose inverse scale is infinite, get there.
#[inline(always)]
pub fn truncate(x: f32) -> i32 {
    if x.abs() < 2_147_483_648.0 {
        x as i32
    } else {
        i32::MIN
    }
}

/// The exact dot product of int8 values.
///
/// At most 256 products of magnitude at most 128 · 127 each: far inside `i32`.
#[inline(always)]
pub fn idot(q: &[i8], x: &[i8]) -> i32 {
    q.iter().zip(x).map(|(&q, &x)| q as i32 * x as i32).sum()
}
