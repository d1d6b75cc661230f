//! Every format, every available tier, awkward sizes: the same bits as scalar.

use super::*;
use crate::quant::Format;
use crate::quant::act::{CHUNK, Slots};
use crate::quant::float::Element;
use crate::quant::random::Random;
use float::{KV_BLOCK, Running};

fn floats(random: &mut Random, n: usize) -> Vec<f32> {
    (0..n).map(|_| random.float()).collect()
}

/// Random blocks whose floats are all finite, and so are sums of their products.
fn blocks(random: &mut Random, format: Format, n: usize) -> Vec<u8> {
    let mut bytes: Vec<u8> = (0..n).map(|_| random.next() as u8).collect();
    let odd_scale = format == Format::Q6_K || format == Format::Q3_K;
    for block in bytes.chunks_exact_mut(format.block_bytes()) {
        let len = block.len();
        // Scales are at the start or the end of a block; keep them in f16's middle range.
        let scales: &[usize] = match format {
            Format::F32 => &[2],
            Format::F16 | Format::BF16 => &[0],
            Format::Q2_K => &[80, 82],
            _ if odd_scale => &[len - 2],
            _ => &[0, 2],
        };
        for &at in scales {
            block[at + 1] = (block[at + 1] & 0x83) | 0x2c;
        }
    }
    bytes
}

/// Bytes in words: a tensor in a mapped file is aligned, a vector of bytes need not be.
fn aligned(bytes: &[u8]) -> Vec<u64> {
    let mut out = vec![0u64; bytes.len().div_ceil(8)];
    bytemuck::cast_slice_mut(&mut out)[..bytes.len()].copy_from_slice(bytes);
    out
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

/// All tiers of this machine but scalar, with which each is compared.
fn others() -> Vec<&'static Kernels> {
    available()
        .into_iter()
        .filter(|t| *t != Tier::Scalar)
        .map(Kernels::of)
        .collect()
}

fn prepare(kernels: &Kernels, format: Format, x: &[f32], k: usize) -> Acts {
    let mut acts = Acts::default();
    let n_tok = x.len() / k;
    match acts.reset(format.act(), n_tok, k) {
        Slots::F32(out) => out.copy_from_slice(x),
        Slots::Int(chunks) => {
            for (i, out) in chunks.chunks_mut(n_tok).enumerate() {
                for (x, out) in x.chunks_exact(k).zip(out) {
                    let part = &x[CHUNK * i..k.min(CHUNK * (i + 1))];
                    kernels.quantize(format.act(), part, out);
                }
            }
        }
    }
    acts
}

/// `y` starts as NaN, so that an element that was never written shows.
fn product(
    kernels: &Kernels,
    format: Format,
    bytes: &[u8],
    n: usize,
    k: usize,
    acts: &Acts,
    pick: &[u32],
) -> Vec<f32> {
    let mut y = vec![f32::NAN; pick.len() * n];
    let w = Rows { format, bytes, k };
    kernels.matmul(w, Tokens { acts, pick }, &mut Stripe::whole(&mut y, n));
    y
}

#[test]
fn matmul_is_the_same_in_every_tier() {
    let mut random = Random(1);
    for &format in Format::ALL {
        let block = format.block_weights();
        for k in [block, 2 * block, 3 * block, 5 * block, 1024] {
            for n in [1, 3, 4, 7, 8, 15, 16, 17, 33] {
                for n_tok in [1, 2, 5, 13, 21] {
                    same_product(&mut random, format, [n, k], n_tok);
                }
            }
        }
    }
}

/// With many tokens, many rows go together: whole groups of them, parts of one, and more tokens than share a pass.
#[test]
fn matmul_of_many_tokens_is_the_same_in_every_tier() {
    let mut random = Random(2);
    for &format in Format::ALL {
        for n in [64, 97, 135] {
            for (n_tok, blocks) in [(31, 2), (32, 3), (45, 2), (515, 1)] {
                same_product(
                    &mut random,
                    format,
                    [n, blocks * format.block_weights()],
                    n_tok,
                );
            }
        }
    }
}

/// Every tier's product of random weights `(n, k)` with random tokens has the bits of scalar's.
fn same_product(random: &mut Random, format: Format, [n, k]: [usize; 2], n_tok: usize) {
    let scalar = Kernels::of(Tier::Scalar);
    let bytes = blocks(random, format, n * format.row_bytes(k));
    let bytes = aligned(&bytes);
    let bytes = &bytemuck::cast_slice(&bytes)[..n * format.row_bytes(k)];
    let acts = prepare(scalar, format, &floats(random, (n_tok + 1) * k), k);
    // Side by side behind another token, and apart from each other.
    let behind = 1..=n_tok as u32;
    for pick in [behind.clone().collect::<Vec<_>>(), behind.rev().collect()] {
        let want = product(scalar, format, bytes, n, k, &acts, &pick);
        assert!(want.iter().all(|y| y.is_finite()), "{format:?} {k} {n}");
        for tier in others() {
            let got = product(tier, format, bytes, n, k, &acts, &pick);
            let tier = tier.tier();
            assert_eq!(
                bits(&got),
                bits(&want),
                "{format:?} {tier:?} k {k} n {n} tokens {pick:?}"
            );
        }
    }
}

#[test]
fn matmul_with_extreme_integers_is_exact() {
    let scalar = Kernels::of(Tier::Scalar);
    for &format in Format::ALL {
        let k = format.block_weights().max(16) * 4;
        for fill in [0x00u8, 0x7f, 0x80, 0xff] {
            for sign in [1.0f32, -1.0] {
                let n = 32;
                let mut bytes = vec![fill; n * format.row_bytes(k)];
                // A finite scale wherever one may be.
                let mut random = Random(7);
                let model = blocks(&mut random, format, bytes.len());
                for (b, m) in bytes
                    .chunks_exact_mut(format.block_bytes())
                    .zip(model.chunks_exact(format.block_bytes()))
                {
                    let len = b.len();
                    for at in [0, 2, len - 2, len.saturating_sub(4)]
                        .into_iter()
                        .filter(|at| at + 2 <= len)
                    {
                        if len <= 4 || matches!(format, Format::Q2_K) == (at >= 80) {
                            b[at..at + 2].copy_from_slice(&m[at..at + 2]);
                        }
                    }
                    if matches!(format, Format::Q3_K | Format::Q6_K) {
                        b[len - 2..].copy_from_slice(&m[len - 2..]);
                    }
                }
                let bytes = aligned(&bytes);
                let bytes = &bytemuck::cast_slice(&bytes)[..n * format.row_bytes(k)];
                // As many as take each of a tier's ways: alone, a few in registers, many in matrices.
                for n_tok in [1, 8, 16] {
                    let acts = prepare(scalar, format, &vec![sign; n_tok * k], k);
                    let pick: Vec<u32> = (0..n_tok as u32).collect();
                    let want = product(scalar, format, bytes, n, k, &acts, &pick);
                    for tier in others() {
                        let got = product(tier, format, bytes, n, k, &acts, &pick);
                        assert_eq!(
                            bits(&got),
                            bits(&want),
                            "{format:?} {:?} fill {fill:#x} tokens {n_tok}",
                            tier.tier()
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn float_helpers_are_the_same_in_every_tier() {
    let mut random = Random(2);
    let scalar = Kernels::of(Tier::Scalar);
    for n in [2, 16, 30, 32, 34, 64, 100, 128, 256, 1000, 4096] {
        let (x, w) = (floats(&mut random, n), floats(&mut random, n));
        let wide: Vec<f32> = x.iter().map(|x| x * 100.0).collect();
        for tier in others() {
            let both = |f: &dyn Fn(&Kernels) -> Vec<f32>| {
                assert_eq!(bits(&f(tier)), bits(&f(scalar)), "{:?} n {n}", tier.tier());
            };
            both(&|k| {
                let mut y = vec![f32::NAN; n];
                k.rms_norm(&x, &w, 1e-5, &mut y);
                y
            });
            both(&|k| {
                let mut y = w.clone();
                k.add(&x, &mut y);
                k.add_scaled(0.3, &wide, &mut y);
                y
            });
            both(&|k| {
                let mut y = wide.clone();
                k.silu_mul(&mut y, &w);
                y
            });
            both(&|k| {
                let mut y = wide.clone();
                k.rope(&mut y[..n / 2 * 2], &x[..n / 2], &w[..n / 2]);
                y
            });
        }
    }
}

#[test]
fn quantization_is_the_same_in_every_tier() {
    let mut random = Random(3);
    let scalar = Kernels::of(Tier::Scalar);
    for format in [Format::Q8_0, Format::Q4_K] {
        for scale in [1e-30f32, 1e-3, 1.0, 1e4, 1e30] {
            let mut x: Vec<f32> = floats(&mut random, 1024)
                .iter()
                .map(|x| x * scale)
                .collect();
            x[256..512].fill(0.0);
            // Halves, to be rounded to even: 127 · (i + 1/2) / 127.
            for (i, x) in x[512..768].iter_mut().enumerate() {
                *x = if i == 0 {
                    127.0
                } else {
                    (i % 100) as f32 + 0.5
                };
            }
            let want = prepare(scalar, format, &x, 1024);
            for tier in others() {
                let got = prepare(tier, format, &x, 1024);
                let (a, b) = (got.token(0).int(), want.token(0).int());
                for i in 0..1024 / CHUNK {
                    let (a, b) = (a.chunk(i), b.chunk(i));
                    assert_eq!(
                        (a.qs, bits(&a.d), a.sums),
                        (b.qs, bits(&b.d), b.sums),
                        "{:?}",
                        tier.tier()
                    );
                }
            }
        }
    }
}

#[test]
fn quantization_rounds_half_to_even() {
    let mut x = [0.0f32; 32];
    x[..5].copy_from_slice(&[127.0, 0.5, 1.5, 2.5, -2.5]);
    let acts = prepare(Kernels::of(Tier::Scalar), Format::Q8_0, &x, 32);
    let got = acts.token(0).int().chunk(0);
    assert_eq!(got.qs[..5], [127, 0, 2, 2, -2]);
    assert_eq!((got.d[0], got.sums[0]), (1.0, 129));
}

/// Attention in f16, or `wide`ned to f32 before, of `q (rows, dim)` over two blocks of `k (2, dim, KV_BLOCK)` and
/// `v (2, KV_BLOCK, dim)`; row `r` sees all of the first and `n[r]` of the second.
fn attention(
    kernels: &Kernels,
    q: &[f32],
    k: &[f32],
    v: &[f32],
    n: &[usize],
    wide: bool,
) -> Vec<f32> {
    let dim = q.len() / n.len();
    let half = |x: &[f32]| {
        x.iter()
            .map(|x| f16::from_f32_const(*x))
            .collect::<Vec<_>>()
    };
    let mut acc = vec![0.0; q.len()];
    let mut queries: Vec<_> = (q.chunks(dim).zip(acc.chunks_mut(dim)))
        .map(|(q, acc)| Query {
            q,
            n: KV_BLOCK,
            run: Running::START,
            acc,
        })
        .collect();
    for (b, (k, v)) in k
        .chunks(dim * KV_BLOCK)
        .zip(v.chunks(dim * KV_BLOCK))
        .enumerate()
    {
        for (query, n) in queries.iter_mut().zip(n) {
            query.n = if b == 0 { KV_BLOCK } else { *n };
        }
        let (k, v) = (&half(k)[..], &half(v)[..]);
        if !wide {
            kernels.attend_f16(&mut queries, Pane { k, v }, Pane::EMPTY);
            continue;
        }
        let widened = |x: &[f16]| {
            let mut out = vec![0.0; x.len()];
            kernels.widen(x, &mut out);
            out
        };
        let (k_wide, v_wide) = (widened(k), widened(v));
        let ahead = Pane {
            k: bytemuck::cast_slice(k),
            v: bytemuck::cast_slice(v),
        };
        let pane = Pane {
            k: &k_wide,
            v: &v_wide,
        };
        kernels.attend_f32(&mut queries, pane, ahead);
    }
    let runs: Vec<f32> = queries
        .iter()
        .flat_map(|x| [x.run.max, x.run.sum])
        .collect();
    acc.extend(runs);
    acc
}

#[test]
fn attention_is_the_same_in_every_tier() {
    let mut random = Random(4);
    let scalar = Kernels::of(Tier::Scalar);
    for dim in [8, 16, 32, 80, 128] {
        for n in [
            &[1, 1, 1, 1][..],
            &[17],
            &[64, 3, 9, 20, 21, 22, 23, 33, 60],
            &[63, 64, 1, 2, 17, 18, 40, 64, 33, 5, 6, 7, 8, 16],
        ] {
            let q: Vec<f32> = floats(&mut random, n.len() * dim)
                .iter()
                .map(|q| q * 3.0)
                .collect();
            let (k, mut v) = (
                floats(&mut random, 2 * dim * KV_BLOCK),
                floats(&mut random, 2 * dim * KV_BLOCK),
            );
            // What lies behind the last key must not be looked at.
            v[(KV_BLOCK + n.iter().max().unwrap()) * dim..].fill(f32::NAN);
            let want = attention(scalar, &q, &k, &v, n, false);
            assert!(want.iter().all(|x| x.is_finite()));
            for wide in [true, false] {
                for tier in others().into_iter().chain([scalar]) {
                    let got = attention(tier, &q, &k, &v, n, wide);
                    assert_eq!(
                        bits(&got),
                        bits(&want),
                        "{:?} dim {dim} n {n:?}",
                        tier.tier()
                    );
                    // And a query does not know of the others.
                    let last = &q[(n.len() - 1) * dim..];
                    let alone = attention(tier, last, &k, &v, &n[n.len() - 1..], wide);
                    let among = &got[(n.len() - 1) * dim..n.len() * dim];
                    assert_eq!(
                        bits(&alone[..dim]),
                        bits(among),
                        "{:?} dim {dim}",
                        tier.tier()
                    );
                }
            }
        }
    }
}

/// Softmax attention by the book, in f64.
#[test]
fn attention_is_attention() {
    let mut random = Random(5);
    let (dim, n) = (32, KV_BLOCK + 20);
    let q = floats(&mut random, dim);
    // What f16 holds, so that nothing is rounded on the way.
    let mut halves = || {
        let x = floats(&mut random, 2 * dim * KV_BLOCK);
        let rounded = x.iter().map(|x| f16::from_f32_const(*x).widen());
        rounded.collect::<Vec<_>>()
    };
    let (k, v) = (halves(), halves());
    let key = |i: usize, d: usize| k[(i / KV_BLOCK * dim + d) * KV_BLOCK + i % KV_BLOCK] as f64;
    let scores: Vec<f64> = (0..n)
        .map(|i| (0..dim).map(|d| key(i, d) * q[d] as f64).sum::<f64>().exp())
        .collect();
    let total: f64 = scores.iter().sum();
    let got = attention(Kernels::of(Tier::Scalar), &q, &k, &v, &[20], true);
    for d in 0..dim {
        let want: f64 = (0..n)
            .map(|i| scores[i] / total * v[i * dim + d] as f64)
            .sum();
        let got = got[d] / got[dim + 1];
        assert!((got as f64 - want).abs() < 1e-5, "{got} for {want}");
    }
}

#[test]
fn exp_is_within_two_ulp() {
    let mut worst = 0.0f64;
    for i in -870_000..=880_000 {
        let x = i as f32 * 1e-4;
        let want = (x as f64).exp();
        let ulp = (want as f32).max(f32::MIN_POSITIVE) as f64 * f32::EPSILON as f64;
        worst = worst.max((float::exp(x) as f64 - want).abs() / ulp);
    }
    assert!(worst < 2.0, "{worst} ulp");
    assert_eq!(
        (
            float::exp(0.0),
            float::exp(-88.0),
            float::exp(f32::NEG_INFINITY)
        ),
        (1.0, 0.0, 0.0)
    );
}

#[test]
fn widening_f16_is_exact() {
    for bits in 0..=u16::MAX {
        let h = f16::from_bits(bits);
        if !h.is_nan() {
            assert_eq!(h.widen().to_bits(), h.to_f32_const().to_bits(), "{bits:#x}");
        }
    }
}

/// A tier that this machine has must be what `--isa` would take, and a cap must be kept.
#[test]
fn tiers_fall_through() {
    assert_eq!(Kernels::of(Tier::Scalar).tier(), Tier::Scalar);
    for tier in available() {
        assert_eq!(Kernels::of(tier).tier(), tier);
        assert_eq!(best(Some(tier)), tier);
    }
}

#[test]
fn products_are_the_same_in_every_tier() {
    let mut random = Random(7);
    for n in [0, 256, 768, 1 << 15] {
        let w: Vec<u8> = (0..n).map(|_| random.next() as u8 & 15).collect();
        let x = std::array::from_fn(|_| std::array::from_fn(|_| random.next() as i8 | 1));
        let mut want = 0i64;
        for (i, w) in w.iter().enumerate() {
            for x in x {
                want += i64::from(*w) * i64::from(x[i % 4]);
            }
        }
        for tier in available() {
            let got = Kernels::of(tier).products(&w, &x);
            assert_eq!(i64::from(got), want, "{tier:?} {n}");
        }
    }
}
