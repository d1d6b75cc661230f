//! Encoding with a tier's instructions: the same bodies as in `quant/`, compiled again.
//!
//! Unlike matrix products, encoders need no code of their own for a tier: their searches work on 32 groups
//! side by side, which a compiler spreads over the lanes of whatever registers it may use. So each
//! tier is a set of doors, functions that allow the compiler its instructions, in front of the one generic
//! body. Nothing is fused (rustc never does so by itself), so that the bytes are the same.

use super::{Tier, available};
use crate::quant::Format;
use crate::quant::search::Plain;
use half::f16;
use half::slice::HalfFloatSliceExt;

type Encode = unsafe fn(Format, &[f32], Option<&[f32]>, &mut [u8]);
type Decode = unsafe fn(Format, &[u8], &mut [f32]);

/// Encodes and decodes rows with the instructions of a tier.
#[derive(Clone, Copy)]
pub struct Encoder {
    encode: Encode,
    decode: Decode,
}

impl Encoder {
    /// The encoder of `tier`, or of the best lower tier that this CPU has.
    pub fn of(tier: Tier) -> Encoder {
        let plain = Encoder {
            encode: |format, x, importance, out| format.encode::<Plain>(x, importance, out),
            decode: |format, bytes, out| format.decode(bytes, out),
        };
        // Ascending, so the last that fits is the best; what a tier has no doors for, the baseline does.
        available()
            .into_iter()
            .filter(|t| *t <= tier)
            .filter_map(|tier| match tier {
                #[cfg(target_arch = "x86_64")]
                Tier::Avx2 => Some(Encoder {
                    encode: avx2::encode,
                    decode: avx2::decode,
                }),
                #[cfg(target_arch = "x86_64")]
                Tier::Avx512Bw => Some(Encoder {
                    encode: avx512bw::encode,
                    decode: avx512bw::decode,
                }),
                _ => None,
            })
            .next_back()
            .unwrap_or(plain)
    }

    /// [`Format::encode`], for one row if there is importance, else for any whole blocks.
    ///
    /// # Panics
    /// If the lengths do not belong together.
    pub fn encode(&self, format: Format, x: &[f32], importance: Option<&[f32]>, out: &mut [u8]) {
        if format == Format::F16
            && let Ok(out) = bytemuck::try_cast_slice_mut::<u8, f16>(out)
        {
            // The half crate asks once for a whole slice whether the CPU converts.
            return out.convert_from_f32_slice(x);
        }
        // SAFETY: `of` takes a tier's functions only when the CPU has the tier; apart from its
        // instructions they are safe.
        unsafe { (self.encode)(format, x, importance, out) }
    }

    /// [`Format::decode`].
    ///
    /// # Panics
    /// If the lengths do not belong together, or `bytes` is not aligned as the format's blocks are.
    pub fn decode(&self, format: Format, bytes: &[u8], out: &mut [f32]) {
        if format == Format::F16 {
            return bytemuck::cast_slice::<u8, f16>(bytes).convert_to_f32_slice(out);
        }
        // SAFETY: as above.
        unsafe { (self.decode)(format, bytes, out) }
    }
}

#[cfg(target_arch = "x86_64")]
macro_rules! doors {
    ($module:ident, $features:literal) => {
        mod $module {
            use crate::quant::Format;
            use crate::quant::iq4_nl;
            use crate::quant::lanes::Lanes;
            use crate::quant::search::{self, Affine, Groups, Search, Tries};

            /// The searches with this tier's instructions. Only [`encode`] uses it, so that the CPU has
            /// them. Never inlined, for the reason that [`search::Plain`] gives.
            struct Doors;

            // SAFETY of the blocks below: see above.
            impl Search for Doors {
                #[inline(always)]
                fn affine<const N: usize, const G: usize>(
                    x: &Groups<N, G>,
                    w: &Groups<N, G>,
                    top: i32,
                    tries: Tries,
                ) -> Affine<N, G> {
                    #[target_feature(enable = $features)]
                    #[inline(never)]
                    fn go<const N: usize, const G: usize>(
                        x: &Groups<N, G>,
                        w: &Groups<N, G>,
                        top: i32,
                        tries: Tries,
                    ) -> Affine<N, G> {
                        search::affine(x, w, top, tries)
                    }
                    // SAFETY: see above.
                    unsafe { go(x, w, top, tries) }
                }

                #[inline(always)]
                fn symmetric<const N: usize, const G: usize>(
                    x: &Groups<N, G>,
                    w: &Groups<N, G>,
                    half: i32,
                ) -> (Lanes<G>, Groups<N, G>) {
                    #[target_feature(enable = $features)]
                    #[inline(never)]
                    fn go<const N: usize, const G: usize>(
                        x: &Groups<N, G>,
                        w: &Groups<N, G>,
                        half: i32,
                    ) -> (Lanes<G>, Groups<N, G>) {
                        search::symmetric(x, w, half)
                    }
                    // SAFETY: see above.
                    unsafe { go(x, w, half) }
                }

                #[inline(always)]
                fn descend<const N: usize, const G: usize>(
                    x: &Groups<N, G>,
                    half: i32,
                ) -> (Lanes<G>, Groups<N, G>) {
                    #[target_feature(enable = $features)]
                    #[inline(never)]
                    fn go<const N: usize, const G: usize>(
                        x: &Groups<N, G>,
                        half: i32,
                    ) -> (Lanes<G>, Groups<N, G>) {
                        search::descend(x, half)
                    }
                    // SAFETY: see above.
                    unsafe { go(x, half) }
                }

                #[inline(always)]
                fn values<const N: usize, const G: usize>(
                    x: &Groups<N, G>,
                    w: &Groups<N, G>,
                ) -> Lanes<G> {
                    #[target_feature(enable = $features)]
                    #[inline(never)]
                    fn go<const N: usize, const G: usize>(
                        x: &Groups<N, G>,
                        w: &Groups<N, G>,
                    ) -> Lanes<G> {
                        iq4_nl::fit(x, w)
                    }
                    // SAFETY: see above.
                    unsafe { go(x, w) }
                }
            }

            #[target_feature(enable = $features)]
            pub(super) fn encode(
                format: Format,
                x: &[f32],
                importance: Option<&[f32]>,
                out: &mut [u8],
            ) {
                format.encode::<Doors>(x, importance, out)
            }

            #[target_feature(enable = $features)]
            pub(super) fn decode(format: Format, bytes: &[u8], out: &mut [f32]) {
                format.decode(bytes, out)
            }
        }
    };
}

// What the tiers' `detect` ask for, as far as a compiler uses it by itself.
#[cfg(target_arch = "x86_64")]
doors!(avx2, "avx2,f16c");
#[cfg(target_arch = "x86_64")]
doors!(avx512bw, "avx2,f16c,avx512f,avx512bw,avx512vl,avx512dq");

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quant::random::Random;

    /// Every tier encodes and decodes to the scalar tier's bits: blocks of ordinary weights, of zeros, of
    /// one value, of tiny and of huge ones, with and without importance.
    #[test]
    fn tiers_agree() {
        let mut random = Random(0x9e37_79b9_7f4a_7c15);
        let scales = [0.02, 0.0, 1e-20, 3e4, 0.02, 1.0, 0.02];
        let mut x: Vec<f32> = Vec::new();
        for scale in scales {
            x.extend((0..256).map(|_| scale * random.float()));
        }
        x.extend([0.75; 256]);
        let importance: Vec<f32> = (0..x.len()).map(|_| random.float().max(0.0)).collect();
        let plain = Encoder::of(Tier::Scalar);
        for tier in available() {
            let encoder = Encoder::of(tier);
            for &format in Format::ALL {
                for n in [256, 512, x.len()] {
                    for w in [None, Some(&importance[..n])] {
                        let mut expected = vec![0; format.row_bytes(n)];
                        let mut found = expected.clone();
                        plain.encode(format, &x[..n], w, &mut expected);
                        encoder.encode(format, &x[..n], w, &mut found);
                        assert_eq!(found, expected, "{format:?} on {tier:?}, {n} weights");
                        let (mut y, mut z) = (vec![0.0; n], vec![0.0; n]);
                        plain.decode(format, &found, &mut y);
                        encoder.decode(format, &found, &mut z);
                        let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
                        assert_eq!(bits(&z), bits(&y), "{format:?} on {tier:?}");
                    }
                }
            }
        }
    }
}
