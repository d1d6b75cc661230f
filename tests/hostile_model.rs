//! Model files with one thing wrong, and unusual ones with nothing wrong: the first get one clear
//! error and never a panic, the second the right logits.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use octet::chat::sampler::{Sampler, SamplerOptions};
use octet::chat::session::{Answer, Event, Finish, Limits, Session};
use octet::chat::tokenizer::Tokenizer;
use octet::error::{Error, Result};
use octet::gguf::Gguf;
use octet::moe::{Kv, KvType, Machine, Model, Run, Scratch, Want};
use octet::quant::Format;
use octet::quant::search::Plain;
use octet::simd::{self, Tier};
use tempfile::TempDir;

use crate::small_model::{File, Layout, N_VOCAB, Part, Small, encode, vocabulary, weights};

/// Some tokens of the vocabulary, one of them twice.
const TOKENS: [u32; 9] = [1, 259, 270, 17, 299, 280, 259, 2, 0];

/// A folder for model files.
struct Folder(TempDir);

impl Folder {
    fn new() -> Folder {
        Folder(TempDir::new().unwrap())
    }

    fn write(&self, file: &File) -> PathBuf {
        let path = self.0.path().join("small.gguf");
        // A new file each time: an older one may still be mapped.
        let _ = std::fs::remove_file(&path);
        std::fs::write(&path, file.part(0, 1)).unwrap();
        path
    }

    /// Everything that a program does with a model file: the logits after each of [`TOKENS`].
    fn try_run(&self, file: &File) -> Result<Vec<f32>> {
        run(&self.write(file), None)
    }

    /// The logits of a file that must work.
    fn run(&self, file: &File) -> Vec<f32> {
        self.try_run(file).unwrap()
    }

    /// The error of a file that must not; it has one line that names the file.
    #[track_caller]
    fn error(&self, file: &File) -> String {
        let error = match self.try_run(file) {
            Ok(_) => panic!("this model should be refused"),
            Err(e) => e.to_string(),
        };
        assert!(!error.contains('\n'), "{error}");
        error
    }

    /// Asserts that the file is refused with these words, or works if there are none.
    #[track_caller]
    fn expect(&self, what: &str, file: &File, words: &str) {
        match (self.try_run(file), words) {
            (Ok(logits), "") => assert!(logits.iter().all(|l| l.is_finite()), "{what}"),
            (Ok(_), words) => panic!("{what}: works, but should be refused with {words:?}"),
            (Err(e), "") => panic!("{what}: {e}"),
            (Err(e), words) => {
                let e = e.to_string();
                assert!(e.contains(words), "{what}: {words:?} is not in: {e}");
                assert!(!e.contains('\n'), "{what}: {e}");
                assert!(
                    e.contains("small.gguf") || e.contains("the context is full"),
                    "{what}: {e}"
                );
            }
        }
    }
}

fn run(path: &Path, cap: Option<Tier>) -> Result<Vec<f32>> {
    let file = Gguf::open(path)?;
    let tokenizer = Tokenizer::from_gguf(&file)?;
    let model = Model::open(&file, Machine::new(1, cap)?)?;
    // A file that is accepted must also survive being used.
    let mut sampler = Sampler::new(SamplerOptions {
        seed: Some(1),
        ..SamplerOptions::default()
    });
    let logits = forward(&model, &TOKENS, TOKENS.len())?;
    for row in logits.chunks(model.config.n_vocab) {
        let id = sampler.sample(row, &TOKENS)?;
        assert!((id as usize) < model.config.n_vocab);
        let _ = tokenizer.decode(&[id]);
    }
    Ok(logits)
}

/// Logits after every token, in batches of at most `ubatch`.
fn forward(model: &Model, tokens: &[u32], ubatch: usize) -> Result<Vec<f32>> {
    let mut kv = Kv::new(&model.config, KvType::F32, model.config.n_ctx);
    let mut scratch = Scratch::default();
    let mut all = Vec::new();
    for tokens in tokens.chunks(ubatch) {
        let run = Run {
            kv: &mut kv,
            tokens,
            want: Want::All,
        };
        all.extend_from_slice(model.forward(&mut [run], &mut scratch)?);
    }
    Ok(all)
}

fn bits(logits: &[f32]) -> Vec<u32> {
    logits.iter().map(|l| l.to_bits()).collect()
}

/// Asserts that logits are those of the definition, but for the rounding of f32.
#[track_caller]
fn close(what: &str, got: &[f32], want: &[f64]) {
    assert_eq!(got.len(), want.len(), "{what}");
    let size = want.iter().fold(0.0f64, |m, l| m.max(l.abs()));
    assert!(size > 0.1, "{what}: logits of nothing");
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        let off = (*got as f64 - want).abs();
        assert!(off <= 2e-5 * size, "{what}: {got} for {want} at {i}");
    }
}

// ---------------------------------------------------------------------------------------------
// Unusual models that work

#[test]
fn shapes_of_every_kind_give_the_logits_of_the_definition() {
    let base = Small::default();
    let mut shapes = vec![
        ("plain", base.clone()),
        (
            "one layer",
            Small {
                n_layer: 1,
                ..base.clone()
            },
        ),
        (
            "one head",
            Small {
                n_head: 1,
                n_kv: 1,
                d_head: 64,
                n_rot: 64,
                ..base.clone()
            },
        ),
        (
            "one KV head",
            Small {
                n_kv: 1,
                ..base.clone()
            },
        ),
        (
            "as many KV heads",
            Small {
                n_kv: 4,
                ..base.clone()
            },
        ),
        (
            "heads of 20",
            Small {
                d_head: 20,
                n_rot: 20,
                ..base.clone()
            },
        ),
        (
            "heads of 8",
            Small {
                d_head: 8,
                n_rot: 8,
                n_head: 8,
                ..base.clone()
            },
        ),
        (
            "heads of 2",
            Small {
                d_head: 2,
                n_rot: 2,
                ..base.clone()
            },
        ),
        (
            "heads of 33",
            Small {
                d_head: 33,
                n_rot: 32,
                ..base.clone()
            },
        ),
        (
            "half a head turned",
            Small {
                n_rot: 8,
                ..base.clone()
            },
        ),
        (
            "two dimensions turned",
            Small {
                n_rot: 2,
                ..base.clone()
            },
        ),
        (
            "odd widths",
            Small {
                d_model: 37,
                d_ff: 51,
                d_head: 10,
                n_rot: 10,
                ..base.clone()
            },
        ),
        (
            "narrow",
            Small {
                d_model: 4,
                d_ff: 1,
                d_head: 4,
                n_rot: 4,
                ..base.clone()
            },
        ),
        (
            "all experts",
            Small {
                n_used: 4,
                ..base.clone()
            },
        ),
        (
            "one of the experts",
            Small {
                n_used: 1,
                ..base.clone()
            },
        ),
        (
            "dense",
            Small {
                layout: Layout::Dense,
                ..base.clone()
            },
        ),
        (
            "single experts",
            Small {
                layout: Layout::Single,
                ..base.clone()
            },
        ),
        (
            "tied",
            Small {
                tied: true,
                ..base.clone()
            },
        ),
    ];
    for n_expert in 1..=9 {
        let n_used = n_expert.min(2);
        shapes.push((
            "some experts",
            Small {
                n_expert,
                n_used,
                ..base.clone()
            },
        ));
    }
    let folder = Folder::new();
    for (name, shape) in shapes {
        let what = format!("{name}: {shape:?}");
        let path = folder.write(&shape.file());
        let want = bits(&run(&path, None).expect(&what));
        close(&what, &run(&path, None).unwrap(), &shape.logits(&TOKENS));
        assert!(
            bits(&run(&path, Some(Tier::Scalar)).unwrap()) == want,
            "{what}: scalar"
        );
        let model = Model::open(&Gguf::open(&path).unwrap(), Machine::new(3, None).unwrap());
        let model = model.unwrap();
        for ubatch in [1, 2, 4] {
            assert!(
                bits(&forward(&model, &TOKENS, ubatch).unwrap()) == want,
                "{what}: ubatch {ubatch}"
            );
        }
    }
}

#[test]
fn every_format_gives_one_answer_near_the_definition() {
    // Rows of 256 and more, so that every format has whole blocks.
    let base = Small {
        d_model: 256,
        d_ff: 256,
        d_head: 64,
        n_rot: 64,
        // All experts: a rounding that makes the router choose another one is no error of the format.
        n_used: 4,
        ..Small::default()
    };
    let want = base.logits(&TOKENS);
    let size = (want.iter().map(|l| l * l).sum::<f64>() / want.len() as f64).sqrt();
    let folder = Folder::new();
    let mut errors = std::collections::BTreeMap::new();
    for &format in Format::ALL {
        let shape = Small {
            format,
            ..base.clone()
        };
        let path = folder.write(&shape.file());
        let got = run(&path, None).unwrap();
        for tier in simd::available() {
            assert!(
                bits(&run(&path, Some(tier)).unwrap()) == bits(&got),
                "{format:?} {tier:?}"
            );
        }
        assert!(got.iter().all(|l| l.is_finite()), "{format:?}");
        let off: f64 = got
            .iter()
            .zip(&want)
            .map(|(g, w)| (*g as f64 - w).powi(2))
            .sum();
        errors.insert(format.name(), (off / want.len() as f64).sqrt() / size);
    }
    // The error of the logits, relative to their size; about half of these is normal. Random
    // weights make it large for few bits; noise would have about 1.4.
    for (format, most) in [
        ("F32", 1e-5),
        ("F16", 1.5e-3),
        ("BF16", 1e-2),
        ("Q8_0", 4e-2),
        ("Q6_K", 0.1),
        ("Q5_K", 0.2),
        ("Q5_1", 0.2),
        ("Q5_0", 0.2),
        ("Q4_K", 0.4),
        ("Q4_1", 0.4),
        ("Q4_0", 0.4),
        ("IQ4_NL", 0.4),
        ("IQ4_XS", 0.4),
        ("Q3_K", 0.7),
        ("Q2_K", 1.0),
    ] {
        let off = errors.remove(format).unwrap();
        assert!(off < most, "{format}: {off}");
    }
    assert!(errors.is_empty(), "formats without a limit: {errors:?}");
}

#[test]
fn both_layouts_of_experts_give_the_same_bits() {
    let folder = Folder::new();
    for format in [Format::F32, Format::F16, Format::Q8_0, Format::Q4_0] {
        let logits = |layout| {
            let shape = Small {
                format,
                layout,
                ..Small::default()
            };
            bits(&folder.run(&shape.file()))
        };
        assert!(
            logits(Layout::Fused) == logits(Layout::Single),
            "{format:?}"
        );
    }
}

#[test]
fn experts_may_have_different_formats() {
    let mut file = Small {
        layout: Layout::Single,
        ..Small::default()
    }
    .file();
    let plain = folder_logits(&file);
    for (e, format) in [Format::F16, Format::Q8_0, Format::BF16, Format::Q5_1]
        .iter()
        .enumerate()
    {
        for part in ["gate", "up", "down"] {
            let seed = format!("blk.1.ffn_{part}.{e}");
            let t = file.tensor(&format!("{seed}.weight"));
            let shape = [t.shape[0] as usize, t.shape[1] as usize];
            t.type_id = *format as u32;
            t.bytes = encode(*format, &weights(&seed, &shape), shape[0]);
        }
    }
    let mixed = folder_logits(&file);
    assert!(bits(&mixed) != bits(&plain));
    let size = plain.iter().fold(0.0f32, |m, l| m.max(l.abs()));
    for (a, b) in mixed.iter().zip(&plain) {
        assert!((a - b).abs() < 0.1 * size, "{a} {b}");
    }
}

fn folder_logits(file: &File) -> Vec<f32> {
    Folder::new().run(file)
}

#[test]
fn a_router_in_f16_or_quantized_works() {
    let want = Small::default().logits(&TOKENS);
    let size = want.iter().fold(0.0f64, |m, l| m.max(l.abs()));
    for router in [Format::F16, Format::BF16, Format::Q8_0] {
        let shape = Small {
            router,
            ..Small::default()
        };
        let got = folder_logits(&shape.file());
        for (got, want) in got.iter().zip(&want) {
            assert!(
                (*got as f64 - want).abs() < 0.1 * size,
                "{router:?}: {got} {want}"
            );
        }
    }
}

#[test]
fn versions_and_shards_give_the_same_bits() {
    let folder = Folder::new();
    let file = Small {
        format: Format::Q8_0,
        ..Small::default()
    }
    .file();
    let want = bits(&folder.run(&file));
    // Version 2 has the same layout as version 3.
    let mut bytes = file.part(0, 1);
    bytes[4..8].copy_from_slice(&2u32.to_le_bytes());
    let path = folder.0.path().join("v2.gguf");
    std::fs::write(&path, bytes).unwrap();
    assert_eq!(Gguf::open(&path).unwrap().version(), 2);
    assert!(bits(&run(&path, None).unwrap()) == want);

    let paths: Vec<PathBuf> = (0..3)
        .map(|no| {
            let path = folder
                .0
                .path()
                .join(format!("m-0000{}-of-00003.gguf", no + 1));
            std::fs::write(&path, file.part(no, 3)).unwrap();
            path
        })
        .collect();
    for path in &paths {
        assert!(bits(&run(path, None).unwrap()) == want, "{path:?}");
    }
    std::fs::remove_file(&paths[1]).unwrap();
    let error = run(&paths[0], None).unwrap_err().to_string();
    assert!(error.contains("m-00002-of-00003.gguf"), "{error}");
}

#[test]
fn trailing_dimensions_of_one_may_be_written_or_left_out() {
    let folder = Folder::new();
    let shape = Small {
        n_expert: 1,
        n_used: 1,
        ..Small::default()
    };
    let mut file = shape.file();
    let want = bits(&folder.run(&file));
    for t in &mut file.tensors {
        match t.shape.as_slice() {
            [n_in, n_out, 1] => t.shape = vec![*n_in, *n_out],
            [n] => t.shape = vec![*n, 1],
            [n_in, 1] => t.shape = vec![*n_in],
            _ => t.shape.push(1),
        }
    }
    assert!(bits(&folder.run(&file)) == want);
}

#[test]
fn rope_factors_slow_the_rotation() {
    let folder = Folder::new();
    let mut file = Small::default().file();
    let want = bits(&folder.run(&file));
    let factors = |x: f32| Part {
        name: "rope_freqs.weight".into(),
        type_id: 0,
        shape: vec![8],
        bytes: [1.0, x, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
            .iter()
            .flat_map(|f: &f32| f.to_le_bytes())
            .collect(),
    };
    file.tensors.push(factors(1.0));
    assert!(bits(&folder.run(&file)) == want);
    *file.tensor("rope_freqs.weight") = factors(8.0);
    assert!(bits(&folder.run(&file)) != want);
    for bad in [0.0, -1.0, f32::NAN, f32::INFINITY] {
        *file.tensor("rope_freqs.weight") = factors(bad);
        folder.expect("rope_freqs", &file, "tensor rope_freqs.weight");
    }
}

// ---------------------------------------------------------------------------------------------
// Metadata that is wrong

/// Each number: what is said of 0, of 1, of the largest u32 and of its absence; "" where it works.
const NUMBERS: &[(&str, [&str; 4])] = &[
    (
        "llama.block_count",
        [
            "at least 1",
            "blk.1.",
            "tensor blk.2.attn_norm.weight",
            "missing",
        ],
    ),
    (
        "llama.context_length",
        ["at least 1", "the context is full", "", "missing"],
    ),
    (
        "llama.embedding_length",
        ["at least 1", "head_count", "head_count", "missing"],
    ),
    (
        "llama.feed_forward_length",
        ["at least 1", "ffn_gate_exps", "ffn_gate_exps", "missing"],
    ),
    (
        "llama.attention.head_count",
        ["at least 1", "head_count_kv", "head_count", "missing"],
    ),
    (
        "llama.attention.head_count_kv",
        [
            "head_count_kv",
            "attn_k.weight",
            "head_count_kv",
            "attn_k.weight",
        ],
    ),
    (
        "llama.expert_count",
        [
            "blk.0.ffn_gate.weight is missing",
            "expert_used_count",
            "ffn_gate_inp",
            "blk.0.ffn_gate.weight is missing",
        ],
    ),
    (
        "llama.expert_used_count",
        ["at least 1", "", "expert_used_count", "missing"],
    ),
    (
        "llama.rope.dimension_count",
        ["dimension_count", "dimension_count", "dimension_count", ""],
    ),
    (
        "llama.attention.key_length",
        ["key_length", "dimension_count", "attn_q.weight", ""],
    ),
    (
        "llama.attention.value_length",
        ["value_length", "value_length", "value_length", ""],
    ),
];

#[test]
fn numbers_at_the_edges_are_refused_with_a_word() {
    let folder = Folder::new();
    let file = Small::default().file();
    for (key, [zero, one, most, missing]) in NUMBERS {
        for (value, words) in [(0u32, zero), (1, one), (u32::MAX, most)] {
            folder.expect(&format!("{key} = {value}"), &file.with(key, value), words);
        }
        folder.expect(&format!("{key} missing"), &file.without(key), missing);
    }
}

#[test]
fn numbers_of_other_types_are_refused_by_name() {
    let folder = Folder::new();
    let file = Small::default().file();
    for (key, _) in NUMBERS {
        for (what, file) in [
            ("huge", file.with(key, u64::MAX)),
            ("just too large", file.with(key, 1u64 << 32)),
            ("negative", file.with(key, -1i32)),
            ("a float", file.with(key, 2.0f32)),
            ("NaN", file.with(key, f32::NAN)),
            ("a string", file.with(key, "2")),
            ("a truth value", file.with(key, true)),
            ("an array", file.with(key, [2u32, 2])),
        ] {
            folder.expect(&format!("{key}: {what}"), &file, key);
        }
    }
    // Every type of integer will do.
    for (key, value) in [
        ("llama.block_count", 2u8),
        ("llama.expert_used_count", 2),
        ("llama.attention.head_count_kv", 2),
    ] {
        folder.expect(key, &file.with(key, value), "");
        folder.expect(key, &file.with(key, i64::from(value)), "");
    }
}

#[test]
fn floats_that_are_no_use_are_refused_by_name() {
    let folder = Folder::new();
    let file = Small::default().file();
    for key in [
        "llama.attention.layer_norm_rms_epsilon",
        "llama.rope.freq_base",
    ] {
        for bad in [0.0f32, -1e-5, f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            folder.expect(&format!("{key} = {bad}"), &file.with(key, bad), key);
        }
        folder.expect(key, &file.with(key, 1e300f64), key);
        folder.expect(key, &file.with(key, 1u32), key);
        folder.expect(key, &file.with(key, "1e-5"), key);
        for good in [f32::MIN_POSITIVE, 1e-5, 1.0, f32::MAX] {
            folder.expect(&format!("{key} = {good}"), &file.with(key, good), "");
        }
        folder.expect(key, &file.without(key), "");
    }
}

#[test]
fn numbers_that_contradict_each_other_are_refused_by_name() {
    let folder = Folder::new();
    let file = Small::default().file();
    for (key, value, words) in [
        ("llama.attention.head_count", 3u32, "head_count"),
        (
            "llama.attention.head_count",
            5,
            "a divisor of the embedding length 64",
        ),
        ("llama.attention.head_count", 128, "head_count"),
        ("llama.attention.head_count_kv", 3, "a divisor of 4 heads"),
        ("llama.attention.head_count_kv", 8, "a divisor of 4 heads"),
        ("llama.expert_used_count", 5, "at most 4 experts"),
        ("llama.expert_count", 5, "ffn_gate_inp"),
        ("llama.expert_count", 3, "ffn_gate_inp"),
        (
            "llama.rope.dimension_count",
            7,
            "an even number from 2 to 16",
        ),
        (
            "llama.rope.dimension_count",
            18,
            "an even number from 2 to 16",
        ),
        ("llama.attention.value_length", 8, "16 as for keys"),
        ("llama.embedding_length", 60, "an even number from 2 to 15"),
        (
            "llama.embedding_length",
            128,
            "the shape of tensor token_embd.weight",
        ),
        ("llama.feed_forward_length", 95, "ffn_gate_exps"),
        ("llama.feed_forward_length", 97, "ffn_gate_exps"),
    ] {
        folder.expect(&format!("{key} = {value}"), &file.with(key, value), words);
    }
}

#[test]
fn settings_that_would_change_the_answer_are_refused() {
    let folder = Folder::new();
    let file = Small::default().file();
    let set = |key: &str, x: f32| file.with(key, x);
    let kind = |name: &'static str| file.with("llama.rope.scaling.type", name);
    folder.expect("none", &kind("none"), "");
    folder.expect("linear", &kind("linear"), "\"linear\"");
    folder.expect("yarn", &kind("yarn"), "\"yarn\"");
    for key in ["llama.rope.scaling.factor", "llama.rope.scale_linear"] {
        folder.expect(key, &set(key, 4.0), key);
        folder.expect(key, &set(key, f32::NAN), key);
        folder.expect(key, &set(key, 1.0), "");
        folder.expect(key, &set(key, 0.0), "");
        folder.expect(key, &kind("none").with(key, 4.0f32), "");
    }
}

#[test]
fn other_architectures_are_named() {
    let folder = Folder::new();
    let file = Small::default().file();
    let key = "general.architecture";
    for name in ["qwen2", "phi3", "", "Llama", "llama\n4", "clip"] {
        let error = folder.error(&file.with(key, name));
        assert!(
            error.contains("this architecture is not supported"),
            "{error}"
        );
        assert!(
            error.contains("Mixtral") && error.contains(&format!("{name:?}")),
            "{error}"
        );
    }
    folder.expect(key, &file.with(key, 4u32), key);
    folder.expect(key, &file.without(key), "general.architecture is missing");
}

// ---------------------------------------------------------------------------------------------
// Tensors that are wrong

/// Gives a tensor another shape, with bytes to fit.
fn reshape(file: &File, name: &str, shape: &[u64]) -> File {
    let mut file = file.clone();
    let t = file.tensor(name);
    t.shape = shape.to_vec();
    t.bytes
        .resize(shape.iter().product::<u64>() as usize * 4, 0);
    file
}

#[test]
fn shapes_that_are_off_by_one_are_refused_by_name() {
    let folder = Folder::new();
    let file = Small::default().file();
    let mut cases = 0;
    for t in &file.tensors {
        let mut shapes = Vec::new();
        for i in 0..t.shape.len() {
            for n in [t.shape[i] - 1, t.shape[i] + 1, 1] {
                let mut shape = t.shape.clone();
                shape[i] = n;
                shapes.push(shape);
            }
        }
        let mut swapped = t.shape.clone();
        swapped.reverse();
        let wider = [t.shape.as_slice(), &[2]].concat();
        shapes.extend([swapped, wider, vec![t.shape.iter().product()], vec![1]]);
        for shape in shapes.iter().filter(|s| **s != t.shape) {
            let changed = reshape(&file, &t.name, shape);
            let error = folder.error(&changed);
            // The rows of the embedding are the size of the vocabulary: the head is what differs.
            let named = error.contains(&t.name)
                || (t.name == "token_embd.weight" && error.contains("tensor output.weight"));
            assert!(named, "{} {shape:?}: {error}", t.name);
            cases += 1;
        }
    }
    assert!(cases > 150, "{cases}");
}

#[test]
fn a_missing_tensor_is_named() {
    let folder = Folder::new();
    for layout in [Layout::Fused, Layout::Single, Layout::Dense] {
        let shape = Small {
            layout,
            n_expert: 2,
            ..Small::default()
        };
        let file = shape.file();
        for i in 0..file.tensors.len() {
            let mut file = file.clone();
            let gone = file.tensors.remove(i);
            if gone.name == "output.weight" {
                // The embedding takes its place.
                let tied = Small {
                    tied: true,
                    ..shape.clone()
                };
                close("tied", &folder.run(&file), &tied.logits(&TOKENS));
                continue;
            }
            let words = format!("tensor {} is missing", gone.name);
            folder.expect(&gone.name, &file, &words);
        }
    }
    let mut none = Small::default().file();
    none.tensors.clear();
    folder.expect("no tensors", &none, "tensor token_embd.weight is missing");
}

#[test]
fn a_tensor_that_nobody_uses_is_named() {
    let folder = Folder::new();
    for name in [
        "blk.0.attn_q.bias",
        "blk.0.attn_q_norm.weight",
        "blk.2.attn_norm.weight",
        "blk.0.ffn_gate.0.weight",
        "blk.0.ffn_gate_shexp.weight",
        "position_embd.weight",
        "",
        "x\u{1b}[31m\ny",
    ] {
        let mut file = Small::default().file();
        file.tensors.push(Part {
            name: name.into(),
            type_id: 0,
            shape: vec![64],
            bytes: vec![0; 256],
        });
        let words = format!("found {}", name.escape_default());
        folder.expect(name, &file, &words);
    }
}

#[test]
fn types_that_octet_does_not_compute_with_are_named() {
    let folder = Folder::new();
    // Name, id, bytes of 256 weights.
    for (name, id, size) in [
        ("IQ2_XXS", 16, 66),
        ("IQ3_S", 21, 110),
        ("I8", 24, 256),
        ("F64", 28, 2048),
    ] {
        for tensor in [
            "token_embd.weight",
            "blk.1.attn_v.weight",
            "blk.0.ffn_up_exps.weight",
            "blk.0.attn_norm.weight",
        ] {
            let shape = Small {
                d_model: 256,
                d_ff: 256,
                d_head: 64,
                n_rot: 64,
                ..Small::default()
            };
            let mut file = shape.file();
            let t = file.tensor(tensor);
            t.type_id = id;
            let n = t.shape.iter().product::<u64>() as usize;
            t.bytes.resize(n / 256 * size, 0);
            t.bytes.truncate(n / 256 * size);
            let error = folder.error(&file);
            for word in [tensor, name, "Q4_K", "the type of tensor"] {
                assert!(error.contains(word), "{word}: {error}");
            }
        }
    }
}

#[test]
fn weights_that_are_no_numbers_break_nothing() {
    let folder = Folder::new();
    for format in [Format::F32, Format::F16, Format::Q8_0] {
        let file = Small {
            format,
            ..Small::default()
        }
        .file();
        for i in 0..file.tensors.len() {
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MAX] {
                for everywhere in [false, true] {
                    let mut file = file.clone();
                    let t = &mut file.tensors[i];
                    // The first value of a tensor, or its every value: an f32, an f16 or the scale of a block.
                    let (value, step) = match Format::from_id(t.type_id).unwrap() {
                        Format::F32 => (bad.to_le_bytes().to_vec(), 4),
                        Format::F16 => (half(bad), 2),
                        _ => (half(bad), 34),
                    };
                    let n = if everywhere { t.bytes.len() } else { step };
                    for at in (0..n).step_by(step) {
                        t.bytes[at..][..value.len()].copy_from_slice(&value);
                    }
                    // It must not panic, and a token must come out (`run` asserts that).
                    let path = folder.write(&file);
                    for cap in [None, Some(Tier::Scalar)] {
                        let logits = run(&path, cap).unwrap();
                        assert_eq!(logits.len(), N_VOCAB * TOKENS.len());
                    }
                }
            }
        }
    }
}

/// The nearest f16.
fn half(x: f32) -> Vec<u8> {
    let mut bytes = vec![0; 2];
    Format::F16.encode::<Plain>(&[x], None, &mut bytes);
    bytes
}

// ---------------------------------------------------------------------------------------------
// Vocabularies that are wrong

#[test]
fn vocabularies_that_do_not_fit_together_are_refused_by_name() {
    let folder = Folder::new();
    let file = Small::default().file();
    let (tokens, scores, kinds) = vocabulary();
    let key = |suffix: &str| format!("tokenizer.ggml.{suffix}");

    for suffix in ["model", "tokens", "scores", "token_type"] {
        let words = format!("{} is missing", key(suffix));
        folder.expect(suffix, &file.without(&key(suffix)), &words);
    }
    for (suffix, n) in [
        ("scores", 299),
        ("scores", 0),
        ("token_type", 299),
        ("token_type", 0),
    ] {
        let file = match suffix {
            "scores" => file.with(&key(suffix), scores[..n].to_vec()),
            _ => file.with(&key(suffix), kinds[..n].to_vec()),
        };
        let words = format!("expected 300 entries, one per token, found {n}");
        folder.expect(suffix, &file, &words);
    }
    let longer = file.with(&key("scores"), [scores.as_slice(), &[0.0]].concat());
    folder.expect("scores", &longer, "found 301");

    let numbers: Vec<u32> = (0..300).collect();
    let other = |suffix: &str| file.with(&key(suffix), numbers.clone());
    folder.expect("tokens of numbers", &other("tokens"), "strings");
    folder.expect("scores of integers", &other("scores"), "floats");
    folder.expect(
        "types of strings",
        &file.with(&key("token_type"), tokens.clone()),
        "integers from 1 to 6",
    );
    for (suffix, words) in [
        ("tokens", "tokens"),
        ("scores", "scores"),
        ("token_type", "token_type"),
    ] {
        folder.expect(suffix, &file.with(&key(suffix), 3u32), words);
    }
    for bad in [0, 7, -1, i32::MAX] {
        let mut kinds = kinds.clone();
        kinds[260] = bad;
        let words = format!("{bad} for token 260");
        folder.expect("kind", &file.with(&key("token_type"), kinds), &words);
    }
    let mut nan = scores.clone();
    nan[270] = f32::NAN;
    folder.expect(
        "NaN",
        &file.with(&key("scores"), nan),
        "the score of piece 270",
    );
    let mut byte = tokens.clone();
    byte[10] = "<0xZZ>".into();
    folder.expect("byte", &file.with(&key("tokens"), byte), "byte piece 10");
    for (suffix, name) in [
        ("bos_token_id", "bos"),
        ("eos_token_id", "eos"),
        ("unknown_token_id", "unk"),
        ("eot_token_id", "stop"),
    ] {
        for id in [300, u32::MAX] {
            let words = format!("the {name} id is wrong (expected less than 300, found {id})");
            folder.expect(suffix, &file.with(&key(suffix), id), &words);
        }
        folder.expect(suffix, &file.with(&key(suffix), "2"), &key(suffix));
        folder.expect(suffix, &file.with(&key(suffix), 299u32), "");
        folder.expect(suffix, &file.without(&key(suffix)), "");
    }
    for name in ["gpt2", "bert", "LLAMA"] {
        folder.expect(name, &file.with(&key("model"), name), &format!("{name:?}"));
    }
    folder.expect(
        "add_bos",
        &file.with(&key("add_bos_token"), 1u32),
        "add_bos_token",
    );
    // Texts that are odd but harmless: empty, and all the same.
    folder.expect(
        "same",
        &file.with(&key("tokens"), vec!["x"; 300]),
        "byte piece 3",
    );
    let mut odd = tokens;
    odd[261] = String::new();
    odd[262] = odd[263].clone();
    folder.expect("odd", &file.with(&key("tokens"), odd), "");
}

// ---------------------------------------------------------------------------------------------
// Limits

#[test]
fn a_prompt_may_fill_the_context_and_no_more() {
    let folder = Folder::new();
    let shape = Small {
        n_ctx: 8,
        ..Small::default()
    };
    let path = folder.write(&shape.file());
    let model = Model::open(&Gguf::open(&path).unwrap(), Machine::new(1, None).unwrap()).unwrap();
    let want = shape.logits(&TOKENS[..8]);
    for ubatch in [1, 3, 8] {
        close(
            "full",
            &forward(&model, &TOKENS[..8], ubatch).unwrap(),
            &want,
        );
        let error = forward(&model, &TOKENS, ubatch).unwrap_err();
        assert!(
            matches!(error, Error::ContextFull { limit: 8, want: 9 }),
            "{error}"
        );
    }
    // A refused batch leaves the cache as it was.
    let mut kv = Kv::new(&model.config, KvType::F32, 8);
    let mut scratch = Scratch::default();
    for (tokens, ok) in [
        (&TOKENS[..6], true),
        (&TOKENS[6..9], false),
        (&TOKENS[6..8], true),
    ] {
        let run = Run {
            kv: &mut kv,
            tokens,
            want: Want::All,
        };
        assert_eq!(model.forward(&mut [run], &mut scratch).is_ok(), ok);
    }
    assert_eq!(kv.len(), 8);
    close("after a refusal", scratch.logits(), &want[6 * N_VOCAB..]);

    // An answer needs room for one token; then it goes on until the context is full.
    let mut session = Session::new(&model, KvType::F32, 8, 4);
    let mut sampler = Sampler::new(SamplerOptions {
        temp: 0.0,
        ..SamplerOptions::default()
    });
    let mut answer = |n: usize, session: &mut Session<'_>| {
        session.answer(&TOKENS[..n], &mut sampler, &Limits::default(), |_| {
            std::ops::ControlFlow::Continue(())
        })
    };
    let error = answer(8, &mut session).unwrap_err();
    assert!(
        matches!(error, Error::ContextFull { limit: 8, want: 9 }),
        "{error}"
    );
    for n in [7, 1] {
        let answer = answer(n, &mut session).unwrap();
        assert_eq!(answer.finish, Finish::ContextFull);
        // The last token's own place is behind the context's end: it was sampled, not read.
        assert_eq!(answer.tokens.len(), 8 - n + 1);
        assert_eq!(session.len(), 8);
    }
}

#[test]
fn tokens_outside_the_vocabulary_are_refused() {
    let folder = Folder::new();
    let path = folder.write(&Small::default().file());
    let model = Model::open(&Gguf::open(&path).unwrap(), Machine::new(1, None).unwrap()).unwrap();
    for id in [300, u32::MAX] {
        let error = forward(&model, &[1, id], 2).unwrap_err().to_string();
        assert!(
            error.contains("below 300") && error.contains(&id.to_string()),
            "{error}"
        );
    }
    assert!(forward(&model, &[299], 1).is_ok());
}

/// What a session holds from before changes no bit of what comes next.
#[test]
fn a_session_goes_on_after_anything() {
    let folder = Folder::new();
    let path = folder.write(&Small::default().file());
    let model = Model::open(&Gguf::open(&path).unwrap(), Machine::new(1, None).unwrap()).unwrap();
    let greedy = SamplerOptions {
        temp: 0.0,
        ..SamplerOptions::default()
    };
    let limits = Limits {
        max_tokens: Some(5),
        logprobs: 1,
        ..Limits::default()
    };
    let go_on = |_| ControlFlow::Continue(());
    let fresh = |prompt: &[u32]| {
        let mut session = Session::new(&model, KvType::F16, 64, 4);
        let mut sampler = Sampler::new(greedy.clone());
        session
            .answer(prompt, &mut sampler, &limits, go_on)
            .unwrap()
    };
    let mut session = Session::new(&model, KvType::F16, 64, 4);
    let mut sampler = Sampler::new(greedy.clone());
    let mut answer = |prompt: &[u32], stop: &(dyn Fn(Event) -> bool + Sync)| {
        session.answer(prompt, &mut sampler, &limits, |e| match stop(e) {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        })
    };
    let never = |_: Event| false;
    let same = |got: Answer, prompt: &[u32], computed: usize| {
        let want = fresh(prompt);
        assert_eq!((got.tokens, got.finish), (want.tokens, want.finish));
        assert_eq!((got.stats.hash, got.top), (want.stats.hash, want.top));
        assert_eq!(
            got.stats.prompt_tokens, computed,
            "tokens that were not in the cache"
        );
    };
    same(answer(&TOKENS, &never).unwrap(), &TOKENS, 9);
    // The same again, a longer one, one that leaves the path, a shorter one.
    same(answer(&TOKENS, &never).unwrap(), &TOKENS, 1);
    let longer = [&TOKENS[..], &[3, 4, 5]].concat();
    same(answer(&longer, &never).unwrap(), &longer, 3);
    let other = [&TOKENS[..5], &[7, 8]].concat();
    same(answer(&other, &never).unwrap(), &other, 2);
    same(answer(&TOKENS[..3], &never).unwrap(), &TOKENS[..3], 1);
    // Stopped after four tokens of the prompt, and after two of the answer.
    let stopped = answer(&TOKENS, &|e| matches!(e, Event::Prompt { done: 4.., .. })).unwrap();
    assert_eq!(
        (stopped.finish, stopped.tokens.len()),
        (Finish::Interrupted, 0)
    );
    same(answer(&TOKENS, &never).unwrap(), &TOKENS, 2);
    let count = AtomicUsize::new(0);
    let second =
        |e: Event| matches!(e, Event::Token(_)) && count.fetch_add(1, Ordering::Relaxed) == 1;
    let stopped = answer(&TOKENS, &second).unwrap();
    assert_eq!(
        (stopped.finish, stopped.tokens.len()),
        (Finish::Interrupted, 2)
    );
    assert_eq!(stopped.tokens, fresh(&TOKENS).tokens[..2]);
    same(answer(&TOKENS, &never).unwrap(), &TOKENS, 1);
    // Refused: empty, too long, outside the vocabulary.
    assert!(matches!(answer(&[], &never), Err(Error::Prompt { .. })));
    assert!(matches!(
        answer(&[1; 64], &never),
        Err(Error::ContextFull { .. })
    ));
    assert!(matches!(
        answer(&[1, 259, 300], &never),
        Err(Error::Prompt { .. })
    ));
    same(answer(&TOKENS, &never).unwrap(), &TOKENS, 7);
}
