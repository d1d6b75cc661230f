//! What the bytes of a weight mean.
//!
//! Here every weight format has its definition: the layout of its block, how a block decodes to
//! floats, and the exact integer dot product with int8 activations. No SIMD, no files, no threads:
//! `simd/` says the same things faster and is tested against this, bit for bit.
//!
//! # The canonical arithmetic
//!
//! A row of `k` weights is a sequence of blocks. For formats with integer weights the activations
//! are int8 too ([`act`]), so that everything inside a block is exact in `i32`; what is left is one
//! float step per block, in ascending order, into one accumulator:
//!
//! ```text
//! acc = fma(d_w·d_x, isum, acc)          isum = Σ (sub-scale · q_w · q_x)   exact
//! acc = fma(m_w·d_x, msum, acc)          msum = Σ (sub-min · Σ q_x)         exact, formats with a minimum
//! ```
//!
//! Any way of computing `isum` and `msum` gives the same bits, which is how all CPU tiers agree.
//! Float formats (F32, F16, BF16) use [`float::dot`]: 16 partial sums and a fixed tree.
//!
//! # Encoding
//!
//! [`Format::encode`] makes the bytes that llama.cpp's quantizer makes, with and without importance
//! weights, on every CPU. Nearly all its time goes to searching for scales ([`search`]), which
//! faster tiers can do too ([`Search`]).

pub mod act;
pub mod bits;
pub mod float;
pub mod iq4_nl;
pub mod iq4_xs;
pub mod lanes;
pub mod q2_k;
pub mod q3_k;
pub mod q4_0;
pub mod q4_1;
pub mod q4_k;
pub mod q5_0;
pub mod q5_1;
pub mod q5_k;
pub mod q6_k;
pub mod q8_0;
#[cfg(test)]
pub(crate) mod random;
pub mod recipe;
pub mod search;

#[cfg(test)]
mod tests;

pub use act::{Act, ActKind, IntAct};
pub use search::Search;

/// One block of a weight format, exactly as it lies in a file (little-endian).
pub trait Block: bytemuck::Pod + Send + Sync {
    /// Weights in a block.
    const WEIGHTS: usize;

    /// Writes the block's weights, as floats, to `out` (length [`Block::WEIGHTS`]).
    ///
    /// The order of float operations is the reference's (llama.cpp's `dequantize_row_*`), so that
    /// decoded values are equal to it bit for bit.
    fn decode(&self, out: &mut [f32]);

    /// The scalar dot product of a row with one token's activations: the definition of truth.
    ///
    /// `row`: `k / WEIGHTS` blocks. `x`: activations of length `k`, of the format's [`ActKind`].
    fn dot(row: &[Self], x: Act<'_>) -> f32;
}

/// A block that can be made from floats.
pub trait Encode: Block {
    /// Quantizes a row, byte for byte as the reference does (llama.cpp's `quantize_*`, built for the
    /// x86-64 baseline, where nothing is fused).
    ///
    /// `x`: `(k)`. `importance`: `(k)`, how much an error in each column matters (an "imatrix"), not
    /// negative; formats that have no choice to make ignore it. `out`: `(k / WEIGHTS)`.
    ///
    /// Without importance blocks do not know of each other, so that `x` may be any number of whole
    /// blocks. With it, some formats judge a weight by the mean square of its row.
    ///
    /// `S` is who does the searching: any gives the same bytes.
    fn encode_row<S: Search>(x: &[f32], importance: Option<&[f32]>, out: &mut [Self]);
}

/// A block of integer weights, whose product with int8 activations is exact in `i32`.
///
/// Weight `i` is `scale · sub(i / SUB).0 · ints[i] + min · sub(i / SUB).1`. The scalar dot product below and
/// the tiles of `simd/` are both made from these parts.
pub trait IntBlock: bytemuck::Pod + Send + Sync {
    /// `[i8; 32]` or `[i8; 256]`.
    type Ints: AsRef<[i8]>;
    /// Weights that share a sub-scale, 16 or 32; 32 in blocks of 32, which have none.
    const SUB: usize;
    /// Whether there are minimums.
    const HAS_MIN: bool = false;
    /// Added to the integers, makes all of them 0 or more, for instructions that want unsigned weights.
    const OFFSET: i32 = 0;
    /// Bits of an integer, so that tiers know how many products they may add up in 16 bits.
    const BITS: u32;

    /// The weights' integers.
    fn ints(&self) -> Self::Ints;

    /// `d_w`: the block's scale.
    fn scale(&self) -> f32;

    /// `m_w`: the scale of the minimums, negated where the format subtracts them.
    fn min(&self) -> f32 {
        0.0
    }

    /// The integer scale and minimum of sub-block `s`.
    fn sub(&self, _s: usize) -> (i32, i32) {
        (1, 1)
    }

    /// The exact part of the dot product with one block of activations.
    ///
    /// `x`: `WEIGHTS` int8 values in -127..=127. `sums`: the sum of every 16 of them. In every format
    /// `|isum| < 2^27` and `|msum| < 2^21`: the largest is 256 · 128 · 32 · 127 (Q6_K).
    #[inline(always)]
    fn terms(&self, x: &[i8], sums: &[i16]) -> Terms {
        let q = self.ints();
        let (mut isum, mut msum) = (0, 0);
        let q = q.as_ref().chunks_exact(Self::SUB);
        let parts = q.zip(x.chunks_exact(Self::SUB));
        for (s, ((q, x), sums)) in parts
            .zip(sums.chunks_exact(Self::SUB / act::SUM))
            .enumerate()
        {
            let (scale, min) = self.sub(s);
            isum += scale * bits::idot(q, x);
            if Self::HAS_MIN {
                msum += min * sums.iter().map(|&s| s as i32).sum::<i32>();
            }
        }
        Terms {
            scale: self.scale(),
            isum,
            min: self.min(),
            msum,
        }
    }
}

/// What a block contributes to a dot product; see the module's canonical arithmetic.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Terms {
    /// `d_w`: the block's scale.
    pub scale: f32,
    /// `Σ sub-scale · q_w · q_x`.
    pub isum: i32,
    /// `m_w`: the scale of the minimums, negated where the format subtracts them; 0 without minimums.
    pub min: f32,
    /// `Σ sub-min · Σ q_x`; 0 without minimums.
    pub msum: i32,
}

impl<B: IntBlock> Block for B {
    const WEIGHTS: usize = size_of::<B::Ints>();

    fn decode(&self, out: &mut [f32]) {
        let q = self.ints();
        let (scale, min) = (self.scale(), self.min());
        let parts = out.chunks_exact_mut(B::SUB);
        for (s, (out, q)) in parts.zip(q.as_ref().chunks_exact(B::SUB)).enumerate() {
            let (sub_scale, sub_min) = self.sub(s);
            let (d, m) = (scale * sub_scale as f32, min * sub_min as f32);
            for (out, q) in out.iter_mut().zip(q) {
                *out = d * *q as f32;
                if B::HAS_MIN {
                    *out += m;
                }
            }
        }
    }

    /// The exact terms of each block, one float step per block.
    #[inline(always)]
    fn dot(row: &[B], x: Act<'_>) -> f32 {
        let (x, mut acc) = (x.int(), 0.0f32);
        for (b, block) in row.iter().enumerate() {
            let (qs, sums, d) = x.block(b, B::WEIGHTS);
            let t = block.terms(qs, sums);
            acc = (t.scale * d).mul_add(t.isum as f32, acc);
            if B::HAS_MIN {
                acc = (t.min * d).mul_add(t.msum as f32, acc);
            }
        }
        acc
    }
}

/// The bytes of whole blocks as blocks.
///
/// # Panics
/// If `bytes` is not a whole number of blocks, or not aligned for them (4 bytes at most; tensors in
/// a GGUF are aligned to 8 or more, which the reader checks).
pub fn blocks<B: Block>(bytes: &[u8]) -> &[B] {
    bytemuck::cast_slice(bytes)
}

fn decode_row<B: Block>(bytes: &[u8], out: &mut [f32]) {
    for (block, out) in blocks::<B>(bytes)
        .iter()
        .zip(out.chunks_exact_mut(B::WEIGHTS))
    {
        block.decode(out);
    }
}

fn encode_row<B: Encode, S: Search>(x: &[f32], importance: Option<&[f32]>, out: &mut [u8]) {
    if let Ok(blocks) = bytemuck::try_cast_slice_mut(out) {
        B::encode_row::<S>(x, importance, blocks);
    } else {
        // Bytes at an odd address.
        let mut blocks = vec![B::zeroed(); out.len() / size_of::<B>()];
        B::encode_row::<S>(x, importance, &mut blocks);
        out.copy_from_slice(bytemuck::cast_slice(&blocks));
    }
}

/// Makes [`Format`] and everything that depends on a format's block type from one table.
macro_rules! formats {
    ($( $variant:ident = $id:literal, $name:literal, $block:ty, $act:ident; )*) => {
        /// A weight format that octet computes with. The number is the GGUF tensor type.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[allow(non_camel_case_types)]
        #[repr(u32)]
        pub enum Format { $(
            #[doc = $name]
            $variant = $id,
        )* }

        impl Format {
            /// Every format, in the order of [`Format::index`].
            pub const ALL: &'static [Format] = &[$(Format::$variant),*];

            /// The format with this GGUF tensor type, if octet computes with it.
            pub fn from_id(id: u32) -> Option<Format> {
                match id { $( $id => Some(Format::$variant), )* _ => None }
            }

            /// The format's name as in the field, for example `Q4_K`.
            pub fn name(self) -> &'static str {
                match self { $( Format::$variant => $name, )* }
            }

            /// Weights in a block: 1 for floats, 32 or 256.
            pub fn block_weights(self) -> usize {
                match self { $( Format::$variant => <$block as Block>::WEIGHTS, )* }
            }

            /// Bytes of a block.
            pub fn block_bytes(self) -> usize {
                match self { $( Format::$variant => size_of::<$block>(), )* }
            }

            /// What the other side of a dot product with this format must be.
            pub fn act(self) -> ActKind {
                match self { $( Format::$variant => ActKind::$act, )* }
            }

            /// Decodes whole blocks to floats.
            ///
            /// # Panics
            /// If the lengths do not belong together.
            pub fn decode(self, bytes: &[u8], out: &mut [f32]) {
                assert_eq!(bytes.len(), self.row_bytes(out.len()));
                match self { $( Format::$variant => decode_row::<$block>(bytes, out), )* }
            }

            /// Quantizes a row of weights ([`Encode::encode_row`]), with [`Plain`](search::Plain) or
            /// a faster [`Search`].
            ///
            /// `x`: `(k)`; `importance`: `(k)`, one weight a column; `out`: the row's bytes.
            ///
            /// # Panics
            /// If the lengths do not belong together.
            pub fn encode<S: Search>(self, x: &[f32], importance: Option<&[f32]>, out: &mut [u8]) {
                assert_eq!(out.len(), self.row_bytes(x.len()));
                assert!(importance.is_none_or(|w| w.len() == x.len()));
                match self { $( Format::$variant => encode_row::<$block, S>(x, importance, out), )* }
            }

            /// The scalar dot product of one row with one token's activations ([`Block::dot`]).
            #[inline(always)]
            pub fn dot(self, row: &[u8], x: Act<'_>) -> f32 {
                match self { $( Format::$variant => <$block as Block>::dot(blocks(row), x), )* }
            }
        }
    };
}

formats! {
    F32    = 0,  "F32",    f32,             F32;
    F16    = 1,  "F16",    half::f16,       F32;
    Q4_0   = 2,  "Q4_0",   q4_0::Q4_0,      Q8;
    Q4_1   = 3,  "Q4_1",   q4_1::Q4_1,      Q8;
    Q5_0   = 6,  "Q5_0",   q5_0::Q5_0,      Q8;
    Q5_1   = 7,  "Q5_1",   q5_1::Q5_1,      Q8;
    Q8_0   = 8,  "Q8_0",   q8_0::Q8_0,      Q8;
    Q2_K   = 10, "Q2_K",   q2_k::Q2_K,      Q8K;
    Q3_K   = 11, "Q3_K",   q3_k::Q3_K,      Q8K;
    Q4_K   = 12, "Q4_K",   q4_k::Q4_K,      Q8K;
    Q5_K   = 13, "Q5_K",   q5_k::Q5_K,      Q8K;
    Q6_K   = 14, "Q6_K",   q6_k::Q6_K,      Q8K;
    IQ4_NL = 20, "IQ4_NL", iq4_nl::Iq4Nl,   Q8;
    IQ4_XS = 23, "IQ4_XS", iq4_xs::Iq4Xs,   Q8K;
    BF16   = 30, "BF16",   half::bf16,      F32;
}

impl Format {
    /// Formats there are.
    pub const COUNT: usize = Format::ALL.len();

    /// This format's place in [`Format::ALL`].
    pub fn index(self) -> usize {
        Format::ALL
            .iter()
            .position(|f| *f == self)
            .expect("ALL lists every format")
    }

    /// Bytes of a row of `n` weights.
    ///
    /// # Panics
    /// If `n` is not a whole number of blocks.
    pub fn row_bytes(self, n: usize) -> usize {
        assert!(
            n.is_multiple_of(self.block_weights()),
            "{n} weights are no whole {} blocks",
            self.name()
        );
        n / self.block_weights() * self.block_bytes()
    }
}

/// A GGUF tensor type: what is needed to know where its bytes end, whether octet computes with it or not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TypeInfo {
    /// The number in the file.
    pub id: u32,
    /// The name in the field.
    pub name: &'static str,
    /// Elements in a block.
    pub block_weights: u64,
    /// Bytes of a block.
    pub block_bytes: u64,
}

/// Tensor types that exist in files but that octet does not compute with, from the GGUF
/// specification and the reference's type table: `(id, name, elements per block, bytes per block)`.
const OTHERS: &[(u32, &str, u64, u64)] = &[
    // Older tables say 40, from a time when both scales were f32.
    (9, "Q8_1", 32, 36),
    (15, "Q8_K", 256, 292),
    (16, "IQ2_XXS", 256, 66),
    (17, "IQ2_XS", 256, 74),
    (18, "IQ3_XXS", 256, 98),
    (19, "IQ1_S", 256, 50),
    (21, "IQ3_S", 256, 110),
    (22, "IQ2_S", 256, 82),
    (24, "I8", 1, 1),
    (25, "I16", 1, 2),
    (26, "I32", 1, 4),
    (27, "I64", 1, 8),
    (28, "F64", 1, 8),
    (29, "IQ1_M", 256, 56),
    (34, "TQ1_0", 256, 54),
    (35, "TQ2_0", 256, 66),
    (39, "MXFP4", 32, 17),
    (40, "NVFP4", 64, 36),
    (41, "Q1_0", 128, 18),
    (42, "Q2_0", 64, 18),
];

/// Looks a GGUF tensor type up, among all that are known.
pub fn type_info(id: u32) -> Option<TypeInfo> {
    if let Some(f) = Format::from_id(id) {
        return Some(TypeInfo {
            id,
            name: f.name(),
            block_weights: f.block_weights() as u64,
            block_bytes: f.block_bytes() as u64,
        });
    }
    OTHERS
        .iter()
        .find(|t| t.0 == id)
        .map(|&(id, name, block_weights, block_bytes)| TypeInfo {
            id,
            name,
            block_weights,
            block_bytes,
        })
}
