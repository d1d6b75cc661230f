//! Every format against the reference's numbers and against plain arithmetic.

use super::act::{Acts, CHUNK, Slots, quantize};
use super::bits::{idot, unpack};
use super::random::Random;
use super::search::Plain;
use super::*;

/// Reads the records that tools/make_quant_vectors.py writes.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn bytes(&mut self, n: usize) -> &'a [u8] {
        let (head, tail) = self.0.split_at(n);
        self.0 = tail;
        head
    }

    fn u32(&mut self) -> usize {
        u32::from_le_bytes(self.bytes(4).try_into().unwrap()) as usize
    }

    fn floats(&mut self, n: usize) -> Vec<f32> {
        self.bytes(4 * n)
            .chunks_exact(4)
            .map(|b| f32::from_le_bytes(b.try_into().unwrap()))
            .collect()
    }
}

/// Bytes at an address that is aligned for every block, as a GGUF's tensors are.
struct Aligned {
    words: Vec<u64>,
    len: usize,
}

impl Aligned {
    fn new(bytes: &[u8]) -> Aligned {
        let mut words = vec![0u64; bytes.len().div_ceil(8)];
        bytemuck::cast_slice_mut(&mut words)[..bytes.len()].copy_from_slice(bytes);
        Aligned {
            words,
            len: bytes.len(),
        }
    }

    fn bytes(&self) -> &[u8] {
        &bytemuck::cast_slice(&self.words)[..self.len]
    }
}

/// `(format, blocks, decoded)` of every record of decode.bin.
fn decode_vectors() -> Vec<(Format, Aligned, Vec<f32>)> {
    let mut r = Reader(include_bytes!("../../tests/data/quant/decode.bin"));
    let mut all = Vec::new();
    while !r.0.is_empty() {
        let (id, bytes, floats) = (r.u32(), r.u32(), r.u32());
        let format = Format::from_id(id as u32).expect("a known format");
        all.push((format, Aligned::new(r.bytes(bytes)), r.floats(floats)));
    }
    all
}

fn acts(format: Format, x: &[f32]) -> Acts {
    let mut acts = Acts::default();
    match acts.reset(format.act(), 1, x.len()) {
        Slots::F32(out) => out.copy_from_slice(x),
        Slots::Int(chunks) => {
            for (x, out) in x.chunks(CHUNK).zip(chunks) {
                quantize(format.act().block(), x, out);
            }
        }
    }
    acts
}

#[test]
fn table() {
    // FACTS of the file format: (id, weights, bytes).
    let sizes = [
        (0, 1, 4),
        (1, 1, 2),
        (2, 32, 18),
        (3, 32, 20),
        (6, 32, 22),
        (7, 32, 24),
        (8, 32, 34),
        (10, 256, 84),
        (11, 256, 110),
        (12, 256, 144),
        (13, 256, 176),
        (14, 256, 210),
        (20, 32, 18),
        (23, 256, 136),
        (30, 1, 2),
    ];
    assert_eq!(sizes.len(), Format::COUNT);
    for (id, weights, bytes) in sizes {
        let f = Format::from_id(id).unwrap();
        assert_eq!(
            (f as u32, f.block_weights(), f.block_bytes()),
            (id, weights, bytes)
        );
        assert_eq!(f.row_bytes(512), 512 / weights * bytes);
        assert_eq!(Format::ALL[f.index()], f);
        assert_eq!(type_info(id).unwrap().name, f.name());
        if f.act() != ActKind::F32 {
            assert_eq!(
                f.act().block(),
                weights,
                "one activation block a weight block"
            );
        }
    }
    for &(id, name, ..) in OTHERS {
        assert_eq!(Format::from_id(id), None, "{name} is computed with");
        assert_eq!(type_info(id).unwrap().name, name);
    }
    assert_eq!(type_info(4), None);
    assert_eq!(type_info(u32::MAX), None);
}

#[test]
fn decodes_like_the_reference() {
    let vectors = decode_vectors();
    assert_eq!(
        vectors.len(),
        Format::COUNT - 1,
        "every format but F32 has vectors"
    );
    for (format, raw, want) in vectors {
        let mut got = vec![f32::NAN; want.len()];
        format.decode(raw.bytes(), &mut got);
        for (i, (got, want)) in got.iter().zip(&want).enumerate() {
            assert_eq!(
                got.to_bits(),
                want.to_bits(),
                "{} weight {i}: {got} for {want}",
                format.name()
            );
        }
    }
}

#[test]
fn encodes_like_the_reference() {
    let mut r = Reader(include_bytes!("../../tests/data/quant/encode.bin"));
    let mut seen = [false; Format::COUNT];
    while !r.0.is_empty() {
        let (n, k, types) = (r.u32(), r.u32(), r.u32());
        let (rows, importance) = (r.floats(n * k), r.floats(k));
        for _ in 0..types {
            let format = Format::from_id(r.u32() as u32).expect("a known format");
            let bytes = r.u32();
            seen[format.index()] = true;
            for importance in [None, Some(&importance[..])] {
                let want = r.bytes(bytes);
                let per_row = format.row_bytes(k);
                // One byte further on in every row, so that unaligned rows are met as well.
                let mut got = vec![0; n + per_row];
                for (i, want) in want.chunks_exact(per_row).enumerate() {
                    let got = &mut got[i..][..per_row];
                    format.encode::<Plain>(&rows[i * k..][..k], importance, got);
                    assert_eq!(
                        got,
                        want,
                        "{} row {i} of {k}, importance: {}",
                        format.name(),
                        importance.is_some()
                    );
                }
            }
        }
    }
    seen[Format::F32.index()] = true;
    assert_eq!(seen, [true; Format::COUNT], "every format has vectors");
}

#[test]
fn no_floats_are_too_bad_to_encode() {
    let bad = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MAX, -0.0];
    let mut random = Random(3);
    for &format in Format::ALL {
        for bad in bad {
            for some in [false, true] {
                let x: Vec<f32> = (0..512)
                    .map(|i| {
                        if some && i % 7 != 0 {
                            random.float()
                        } else {
                            bad
                        }
                    })
                    .collect();
                let mut out = vec![0; format.row_bytes(512)];
                format.encode::<Plain>(&x, None, &mut out);
                format.encode::<Plain>(&x, Some(&x), &mut out);
                format.encode::<Plain>(&x, Some(&[1.0; 512]), &mut out);
                format.encode::<Plain>(&x, Some(&[0.0; 512]), &mut out);
            }
        }
    }
}

#[test]
fn encode_inverts_decode() {
    // What was decoded encodes to itself, or at least decodes to nearly the same again.
    for (format, _, w) in decode_vectors() {
        let w = &w[..w.len() / 14 * 6]; // the random blocks, not the edges
        let mut raw = vec![0; format.row_bytes(w.len())];
        format.encode::<Plain>(w, None, &mut raw);
        let raw = Aligned::new(&raw);
        let mut again = vec![0.0; w.len()];
        format.decode(raw.bytes(), &mut again);
        let norm = |x: &mut dyn Iterator<Item = f32>| x.map(|x| x as f64 * x as f64).sum::<f64>();
        let error = norm(&mut w.iter().zip(&again).map(|(a, b)| a - b));
        let size = norm(&mut w.iter().copied());
        assert!(error < 0.03 * size, "{}: {error} of {size}", format.name());
    }
}

#[test]
fn dot_is_what_the_decoded_weights_say() {
    let mut random = Random(7);
    for (format, raw, w) in decode_vectors() {
        let x: Vec<f32> = (0..w.len()).map(|_| random.float()).collect();
        let acts = acts(format, &x);
        let (mut want, mut size) = (0.0f64, 0.0f64);
        for (i, &w) in w.iter().enumerate() {
            let x = match acts.token(0) {
                Act::F32(x) => x[i] as f64,
                Act::Int(x) => {
                    let per = format.act().block();
                    let (qs, _, d) = x.block(i / per, per);
                    qs[i % per] as f64 * d as f64
                }
            };
            want += w as f64 * x;
            size += (w as f64 * x).abs();
        }
        let got = format.dot(raw.bytes(), acts.token(0)) as f64;
        // A minimum may cancel most of a weight, so the terms can be larger than their sum; the sum
        // of magnitudes, times some roundings of 2^-24, bounds what floats lose.
        assert!(
            (got - want).abs() <= 2e-5 * size,
            "{}: {got} for {want}",
            format.name()
        );
    }
}

/// The exact terms of a block, in wide integers, from its parts.
fn same_terms<B: IntBlock>(block: &B, isum: i64, msum: i64, x: i8) {
    let sums = vec![16 * x as i16; B::WEIGHTS / 16];
    let t = block.terms(&vec![x; B::WEIGHTS], &sums);
    assert_eq!((t.isum as i64, t.msum as i64), (isum, msum));
}

#[test]
fn extremes_do_not_overflow() {
    let d = half::f16::MAX;
    for x in [127i8, -127] {
        let n = x as i64;
        same_terms(
            &q4_1::Q4_1 {
                d,
                m: d,
                qs: [255; 16],
            },
            32 * 15 * n,
            32 * n,
            x,
        );
        same_terms(
            &q5_0::Q5_0 {
                d,
                qh: [0; 4],
                qs: [0; 16],
            },
            32 * -16 * n,
            0,
            x,
        );
        same_terms(
            &q5_1::Q5_1 {
                d,
                m: d,
                qh: [255; 4],
                qs: [255; 16],
            },
            32 * 31 * n,
            32 * n,
            x,
        );
        same_terms(&q8_0::Q8_0 { d, qs: [-128; 32] }, 32 * -128 * n, 0, x);
        same_terms(
            &q2_k::Q2_K {
                scales: [255; 16],
                qs: [255; 64],
                d,
                dmin: d,
            },
            256 * 15 * 3 * n,
            256 * 15 * n,
            x,
        );
        same_terms(
            &q3_k::Q3_K {
                hmask: [0; 32],
                qs: [0; 64],
                scales: [0; 12],
                d,
            },
            256 * -32 * -4 * n,
            0,
            x,
        );
        same_terms(
            &q4_k::Q4_K {
                d,
                dmin: d,
                scales: [255; 12],
                qs: [255; 128],
            },
            256 * 63 * 15 * n,
            256 * 63 * n,
            x,
        );
        same_terms(
            &q5_k::Q5_K {
                d,
                dmin: d,
                scales: [255; 12],
                qh: [255; 32],
                qs: [255; 128],
            },
            256 * 63 * 31 * n,
            256 * 63 * n,
            x,
        );
        same_terms(
            &q6_k::Q6_K {
                ql: [0; 128],
                qh: [0; 64],
                scales: [-128; 16],
                d,
            },
            256 * -128 * -32 * n,
            0,
            x,
        );
        same_terms(&iq4_nl::Iq4Nl { d, qs: [0; 16] }, 32 * -127 * n, 0, x);
        same_terms(
            &iq4_xs::Iq4Xs {
                d,
                scales_h: 0,
                scales_l: [0; 4],
                qs: [0; 128],
            },
            256 * -32 * -127 * n,
            0,
            x,
        );
    }
    // And every format with every byte 255 or 0 answers, whatever it answers.
    for &format in Format::ALL {
        let x: Vec<f32> = (0..512)
            .map(|i| if i % 3 == 0 { 1.0 } else { -1.0 })
            .collect();
        for byte in [0, 127, 128, 255] {
            let raw = Aligned::new(&vec![byte; format.row_bytes(512)]);
            format.dot(raw.bytes(), acts(format, &x).token(0));
            format.decode(raw.bytes(), &mut vec![0.0; 512]);
        }
    }
}

#[test]
fn bit_planes() {
    let mut q = [0i8; 8];
    unpack::<2>(&[0b11_10_01_00, 0b00_01_10_11], 0, &mut q);
    assert_eq!(q, [0, 3, 1, 2, 2, 1, 3, 0]);
    unpack::<1>(&[0b1000_0001], 2, &mut q);
    assert_eq!(q, [4, 3, 1, 2, 2, 1, 3, 4]);
    assert_eq!(idot(&q, &[1, 2, 0, 0, -2, 0, 0, 127]), 4 + 6 - 4 + 508);
}
