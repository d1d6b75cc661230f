//! Activations: the other side of a weight's dot product.
//!
//! Integer weights want int8 activations: a block of 32 ([`ActKind::Q8`]) or 256 ([`ActKind::Q8K`])
//! values shares one float scale, and the sums of 16 and of 8 values are kept so that an offset or a
//! minimum of the weights leaves the inner loop. Float weights take the floats themselves.

use super::bits::ROUND;

/// The kind of activations that a weight format is multiplied with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ActKind {
    /// Plain floats.
    F32,
    /// int8, one scale for 32 values.
    Q8,
    /// int8, one scale for 256 values.
    Q8K,
}

impl ActKind {
    /// Values that share a scale.
    pub const fn block(self) -> usize {
        match self {
            ActKind::F32 => 1,
            ActKind::Q8 => 32,
            ActKind::Q8K => 256,
        }
    }
}

/// Values per entry of [`Chunk::sums`]: the smallest sub-block that has a minimum (Q2_K).
pub const SUM: usize = 16;
/// Values per entry of [`Chunk::halves`]: as many as have a sum of 16 bits with weights of 6 bits (Q6_K, in `simd/tile.rs`).
pub const HALF: usize = 8;
/// Values in a [`Chunk`]: the longest block of any format.
pub const CHUNK: usize = 256;

/// Up to 256 consecutive int8 activations of one token, with all that belongs to them: six cache lines, of which the last
/// is seldom wanted.
#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C, align(64))]
pub struct Chunk {
    /// Values in -127..=127.
    pub qs: [i8; CHUNK],
    /// Scales: one for every 32 values ([`ActKind::Q8`]), or the first for all ([`ActKind::Q8K`]).
    pub d: [f32; CHUNK / 32],
    /// Sums of [`SUM`] values each.
    pub sums: [i16; CHUNK / SUM],
    /// Sums of [`HALF`] values each.
    pub halves: [i16; CHUNK / HALF],
}

const EMPTY: Chunk = Chunk {
    qs: [0; CHUNK],
    d: [0.0; CHUNK / 32],
    sums: [0; CHUNK / SUM],
    halves: [0; CHUNK / HALF],
};

/// One token's activations, ready for a dot product.
#[derive(Clone, Copy, Debug)]
pub enum Act<'a> {
    /// `(k)` floats.
    F32(&'a [f32]),
    /// int8 blocks.
    Int(IntAct<'a>),
}

/// One token's int8 activations.
#[derive(Clone, Copy, Debug)]
pub struct IntAct<'a> {
    /// The token's first chunk and all that lie behind it.
    chunks: &'a [Chunk],
    /// From one of the token's chunks to its next.
    step: usize,
}

impl<'a> Act<'a> {
    /// The floats.
    ///
    /// # Panics
    /// If these are not [`ActKind::F32`].
    pub fn floats(self) -> &'a [f32] {
        match self {
            Act::F32(x) => x,
            Act::Int(_) => panic!("float weights need float activations"),
        }
    }

    /// The int8 blocks.
    ///
    /// # Panics
    /// If these are [`ActKind::F32`].
    pub fn int(self) -> IntAct<'a> {
        match self {
            Act::Int(x) => x,
            Act::F32(_) => panic!("integer weights need int8 activations"),
        }
    }
}

impl<'a> IntAct<'a> {
    /// The values `256 i ..`.
    pub fn chunk(&self, i: usize) -> &'a Chunk {
        &self.chunks[i * self.step]
    }

    /// The values, sums and scale of block `b`, `per` values a block (32 or 256).
    pub fn block(&self, b: usize, per: usize) -> (&'a [i8], &'a [i16], f32) {
        let chunk = self.chunk(b * per / CHUNK);
        let at = b * per % CHUNK;
        (
            &chunk.qs[at..][..per],
            &chunk.sums[at / SUM..][..per / SUM],
            chunk.d[at / per],
        )
    }
}

/// The activations of a batch of tokens, in one kind; buffers are reused from call to call.
///
/// Chunks lie as `(k / 256, n_tok)`: work that takes a piece of every token in turn then walks through
/// memory, where rows of a power of two would fall on the same few cache sets.
#[derive(Debug, Default)]
pub struct Acts {
    kind: Option<ActKind>,
    /// Values per token.
    k: usize,
    n_tok: usize,
    floats: Vec<f32>,
    chunks: Vec<Chunk>,
}

/// The slots of [`Acts`], to be filled.
#[derive(Debug)]
pub enum Slots<'a> {
    /// `(n_tok, k)` floats.
    F32(&'a mut [f32]),
    /// `(k / 256, n_tok)`, the last row perhaps partly used.
    Int(&'a mut [Chunk]),
}

impl Acts {
    /// Makes room for `n_tok` tokens of `k` values; what was there is lost.
    ///
    /// # Panics
    /// If `k` is not a whole number of the kind's blocks.
    pub fn reset(&mut self, kind: ActKind, n_tok: usize, k: usize) -> Slots<'_> {
        assert!(
            k.is_multiple_of(kind.block()),
            "{k} values are no whole blocks of {}",
            kind.block()
        );
        (self.kind, self.k, self.n_tok) = (Some(kind), k, n_tok);
        match kind {
            ActKind::F32 => Slots::F32(room(&mut self.floats, n_tok * k, 0.0)),
            ActKind::Q8 | ActKind::Q8K => {
                Slots::Int(room(&mut self.chunks, n_tok * k.div_ceil(CHUNK), EMPTY))
            }
        }
    }

    /// The kind.
    ///
    /// # Panics
    /// Before the first [`Acts::reset`].
    pub fn kind(&self) -> ActKind {
        self.kind.expect("activations were prepared")
    }

    /// Values per token.
    pub fn k(&self) -> usize {
        self.k
    }

    /// Tokens.
    pub fn n_tok(&self) -> usize {
        self.n_tok
    }

    /// Token `t`'s activations.
    pub fn token(&self, t: usize) -> Act<'_> {
        assert!(t < self.n_tok);
        match self.kind() {
            ActKind::F32 => Act::F32(&self.floats[t * self.k..][..self.k]),
            ActKind::Q8 | ActKind::Q8K => Act::Int(IntAct {
                chunks: &self.chunks[t..],
                step: self.n_tok,
            }),
        }
    }

    /// Bytes that the buffers hold.
    pub fn bytes(&self) -> usize {
        4 * self.floats.capacity() + size_of::<Chunk>() * self.chunks.capacity()
    }

    /// All chunks, `(k / 256, n_tok)`.
    pub fn all_chunks(&self) -> &[Chunk] {
        &self.chunks[..self.k.div_ceil(CHUNK) * self.n_tok]
    }

    /// Chunk `i` of every token, `(n_tok)`.
    pub fn chunks(&self, i: usize) -> &[Chunk] {
        &self.chunks[i * self.n_tok..][..self.n_tok]
    }
}

/// The first `n` elements, which are made if there are fewer.
fn room<T: Clone>(v: &mut Vec<T>, n: usize, empty: T) -> &mut [T] {
    if v.len() < n {
        v.resize(n, empty);
    }
    &mut v[..n]
}

/// Quantizes up to 256 of a token's activations: `d = max|x| / 127`, `q = round_half_even(x · 127 / max|x|)`
/// for each `block` of them.
///
/// `x`: whole blocks, at most 256 values; `out`: as much of it is filled.
///
/// Written so that a compiler vectorizes it; maxima and integer sums do not depend on order, so every
/// tier that compiles this body gives the same bits.
#[inline(always)]
pub fn quantize(block: usize, x: &[f32], out: &mut Chunk) {
    for ((((x, qs), d), sums), halves) in x
        .chunks_exact(block)
        .zip(out.qs.chunks_exact_mut(block))
        .zip(&mut out.d)
        .zip(out.sums.chunks_exact_mut(block / SUM))
        .zip(out.halves.chunks_exact_mut(block / HALF))
    {
        let mut lanes = [0.0f32; 16];
        for x in x.chunks_exact(16) {
            for i in 0..16 {
                let a = x[i].abs();
                lanes[i] = if a > lanes[i] { a } else { lanes[i] };
            }
        }
        let max = lanes.iter().fold(0.0f32, |m, &a| if a > m { a } else { m });
        *d = max / 127.0;
        let inv = if max > 0.0 { 127.0 / max } else { 0.0 };
        for (((x, qs), sum), halves) in x
            .chunks_exact(SUM)
            .zip(qs.chunks_exact_mut(SUM))
            .zip(sums)
            .zip(halves.chunks_exact_mut(2))
        {
            let mut s = [0i16; 2];
            for i in 0..SUM {
                // Wraps to the low byte on purpose: that is where ROUND puts the integer.
                qs[i] = (x[i] * inv + ROUND).to_bits() as i8;
                s[i / HALF] += qs[i] as i16;
            }
            halves.copy_from_slice(&s);
            *sum = s[0] + s[1];
        }
    }
}
