//! Activations: the other side of a weight's dot product.
//!
//! Integer weights want int8 activations: a block of 32 ([`ActKind::Q8`]) or 256 ([`ActKind::Q8K`])
//! values shares one float scale, and the sum of every 16 values is kept so that an offset or a
//! minimum of the weights leaves the inner loop. Float weights take the floats themselves.

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

/// Values per entry of [`IntAct::sums`]: the smallest sub-block that has a minimum (Q2_K).
pub const SUM: usize = 16;

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
    /// `(k)` values in -127..=127.
    pub qs: &'a [i8],
    /// `(k / block)` scales.
    pub d: &'a [f32],
    /// `(k / 16)` sums of 16 values each.
    pub sums: &'a [i16],
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
    /// The values and sums of block `b`, `per` values a block.
    pub fn block(&self, b: usize, per: usize) -> (&'a [i8], &'a [i16]) {
        (
            &self.qs[b * per..][..per],
            &self.sums[b * per / SUM..][..per / SUM],
        )
    }
}

/// The activations of a batch of tokens, in one kind; buffers are reused from call to call.
#[derive(Debug, Default)]
pub struct Acts {
    kind: Option<ActKind>,
    /// Values per token.
    k: usize,
    n_tok: usize,
    floats: Vec<f32>,
    qs: Vec<i8>,
    d: Vec<f32>,
    sums: Vec<i16>,
}

/// One token's slots in [`Acts`], to be filled.
#[derive(Debug)]
pub enum ActMut<'a> {
    /// `(k)` floats.
    F32(&'a mut [f32]),
    /// int8 blocks of the kind's size.
    Int {
        /// `(k)`
        qs: &'a mut [i8],
        /// `(k / block)`
        d: &'a mut [f32],
        /// `(k / 16)`
        sums: &'a mut [i16],
    },
}

impl Acts {
    /// Makes room for `n_tok` tokens of `k` values; what was there is lost.
    ///
    /// # Panics
    /// If `k` is not a whole number of the kind's blocks.
    pub fn reset(&mut self, kind: ActKind, n_tok: usize, k: usize) {
        assert!(
            k.is_multiple_of(kind.block()),
            "{k} values are no whole blocks of {}",
            kind.block()
        );
        (self.kind, self.k, self.n_tok) = (Some(kind), k, n_tok);
        let n = n_tok * k;
        match kind {
            ActKind::F32 => grow(&mut self.floats, n),
            ActKind::Q8 | ActKind::Q8K => {
                grow(&mut self.qs, n);
                grow(&mut self.d, n / kind.block());
                grow(&mut self.sums, n / SUM);
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
        let (k, kind) = (self.k, self.kind());
        match kind {
            ActKind::F32 => Act::F32(&self.floats[t * k..][..k]),
            ActKind::Q8 | ActKind::Q8K => Act::Int(IntAct {
                qs: &self.qs[t * k..][..k],
                d: &self.d[t * k / kind.block()..][..k / kind.block()],
                sums: &self.sums[t * k / SUM..][..k / SUM],
            }),
        }
    }

    /// Every token's slots, to be filled (possibly in parallel).
    pub fn tokens_mut(&mut self) -> Vec<ActMut<'_>> {
        let (k, n, kind) = (self.k, self.n_tok, self.kind());
        match kind {
            ActKind::F32 => self.floats[..n * k]
                .chunks_exact_mut(k)
                .map(ActMut::F32)
                .collect(),
            ActKind::Q8 | ActKind::Q8K => self.qs[..n * k]
                .chunks_exact_mut(k)
                .zip(self.d.chunks_exact_mut(k / kind.block()))
                .zip(self.sums.chunks_exact_mut(k / SUM))
                .map(|((qs, d), sums)| ActMut::Int { qs, d, sums })
                .collect(),
        }
    }
}

fn grow<T: Clone + Default>(v: &mut Vec<T>, n: usize) {
    if v.len() < n {
        v.resize(n, T::default());
    }
}

/// 1.5·2²³: adding it to a float of magnitude below 2²² rounds that to an integer, half to even, and
/// leaves the integer in the low bits. The same on every CPU, and one addition in SIMD.
const ROUND: f32 = 12_582_912.0;

/// Quantizes one token's activations: `d = max|x| / 127`, `q = round_half_even(x · 127 / max|x|)`.
///
/// `x`: `(k)`; `qs`: `(k)`; `d`: `(k / block)`; `sums`: `(k / 16)`.
///
/// Written so that a compiler vectorizes it; maxima and integer sums do not depend on order, so every
/// tier that compiles this body gives the same bits.
#[inline(always)]
pub fn quantize(block: usize, x: &[f32], qs: &mut [i8], d: &mut [f32], sums: &mut [i16]) {
    for (((x, qs), d), sums) in x
        .chunks_exact(block)
        .zip(qs.chunks_exact_mut(block))
        .zip(d)
        .zip(sums.chunks_exact_mut(block / SUM))
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
        for ((x, qs), sum) in x.chunks_exact(SUM).zip(qs.chunks_exact_mut(SUM)).zip(sums) {
            let mut s = 0i16;
            for i in 0..SUM {
                // Wraps to the low byte on purpose: that is where ROUND puts the integer.
                qs[i] = (x[i] * inv + ROUND).to_bits() as i8;
                s += qs[i] as i16;
            }
            *sum = s;
        }
    }
}
