//! The `quantize` command against the reference's files, and against what may go wrong.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use octet::gguf::{Gguf, Writer};
use octet::quant::Format;
use octet::quant::search::Plain;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tempfile::TempDir;

use crate::data;

/// Runs `quantize` with these arguments.
fn quantize(args: &[&dyn AsRef<std::ffi::OsStr>]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_quantize"));
    command.env_remove("OCTET_ISA");
    command
        .args(args.iter().map(|a| a.as_ref()))
        .output()
        .unwrap()
}

/// Runs `quantize`, which must succeed; returns what it printed.
#[track_caller]
fn ok(args: &[&dyn AsRef<std::ffi::OsStr>]) -> String {
    let out = quantize(args);
    let error = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{error}");
    String::from_utf8(out.stdout).unwrap()
}

/// Runs `quantize`, which must fail with one line that says all of these; returns the exit code.
#[track_caller]
fn fails(args: &[&dyn AsRef<std::ffi::OsStr>], words: &[&str]) -> i32 {
    let out = quantize(args);
    let error = String::from_utf8_lossy(&out.stderr);
    assert!(!out.status.success());
    assert_eq!(error.lines().count(), 1, "{error}");
    for word in words {
        assert!(error.contains(word), "`{word}` is not in: {error}");
    }
    out.status.code().unwrap()
}

fn demo() -> PathBuf {
    data("demo-BF16.gguf")
}

/// `{recipe: {"file_bytes", "tensors": {name: [type, sha256]}}}`, by the reference's quantizer.
fn golden() -> serde_json::Map<String, Value> {
    let text = fs::read(data("quant_hashes.json")).unwrap();
    serde_json::from_slice(&text).unwrap()
}

fn hash(bytes: &[u8]) -> String {
    let hash = Sha256::digest(bytes);
    hash.iter().map(|b| format!("{b:02x}")).collect()
}

/// Type and hash of every tensor of a file.
fn contents(path: &Path) -> BTreeMap<String, (String, String)> {
    let file = Gguf::open(path).unwrap();
    let tensors = file.tensors().iter().map(|t| {
        let hash = hash(&file.bytes(t));
        (t.name.clone(), (t.type_name().to_string(), hash))
    });
    tensors.collect()
}

/// A file like `from` with only the tensors that `keep` names, and other metadata.
fn part_of(
    from: &Path,
    to: &Path,
    keep: impl Fn(&str) -> bool,
    change: impl Fn(&mut Writer),
    bytes: impl Fn(&str, &mut Vec<u8>),
) {
    let file = Gguf::open(from).unwrap();
    let mut writer = Writer::new();
    writer.put_all(&file);
    change(&mut writer);
    let kept: Vec<_> = file.tensors().iter().filter(|t| keep(&t.name)).collect();
    for t in &kept {
        writer.tensor(&t.name, t.type_id, &t.shape);
    }
    let mut stream = writer.start(to, fs::File::create(to).unwrap()).unwrap();
    for t in kept {
        let mut data = file.bytes(t).to_vec();
        bytes(&t.name, &mut data);
        stream.write_tensor(&t.name, &data).unwrap();
    }
    stream.finish().unwrap();
}

fn all_types(golden: &serde_json::Map<String, Value>) -> String {
    let names: Vec<&str> = golden.keys().map(String::as_str).collect();
    names.join(",")
}

#[test]
fn every_recipe_has_the_references_types_and_sizes() {
    let golden = golden();
    assert_eq!(golden.len(), 18);
    let dir = TempDir::new().unwrap();
    let dst = dir.path().join("{type}.gguf");
    let text = ok(&[&demo(), &dst, &all_types(&golden), &"--dry-run"]);
    let mut tables = text.split("tensor ").skip(1);
    for (recipe, expected) in &golden {
        let table = tables.next().unwrap();
        let found: BTreeMap<&str, &str> = table
            .lines()
            .filter_map(|line| {
                let mut words = line.split_whitespace();
                let (name, _from, to) = (words.next()?, words.next()?, words.next()?);
                name.ends_with(".weight").then_some((name, to))
            })
            .collect();
        let tensors = expected["tensors"].as_object().unwrap();
        assert_eq!(found.len(), tensors.len());
        for (name, of) in tensors {
            assert_eq!(found[name.as_str()], of[0], "{recipe} {name}");
        }
        assert!(table.contains(&format!(" {} bytes", expected["file_bytes"])));
    }
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "a dry run");
}

/// All recipes over `source`, of which every tensor must be the reference's.
fn check_bytes(source: &Path, whole: bool) {
    let golden = golden();
    let dir = TempDir::new().unwrap();
    let dst = dir.path().join("{type}.gguf");
    ok(&[&source, &dst, &all_types(&golden)]);
    for (recipe, expected) in &golden {
        let path = dir.path().join(format!("{recipe}.gguf"));
        let found = contents(&path);
        for (name, (kind, hash)) in &found {
            let of = &expected["tensors"][name];
            assert_eq!(
                (&of[0], &of[1]),
                (&json!(kind), &json!(hash)),
                "{recipe} {name}"
            );
        }
        if whole {
            assert_eq!(found.len(), expected["tensors"].as_object().unwrap().len());
            assert_eq!(fs::metadata(&path).unwrap().len(), expected["file_bytes"]);
        }
    }
    if whole {
        let shipped = concat!(env!("CARGO_MANIFEST_DIR"), "/models/demo-Q4_K_M.gguf");
        let made = fs::read(dir.path().join("Q4_K_M.gguf")).unwrap();
        assert!(made == fs::read(shipped).unwrap(), "the shipped model");
    }
}

#[test]
fn bytes_are_the_references() {
    // One of each kind of tensor: without optimization encoders take their time.
    let dir = TempDir::new().unwrap();
    let small = dir.path().join("small.gguf");
    let keep = |name: &str| {
        let layer = name.starts_with("blk.2.") && !name.contains("_exps");
        layer
            || name == "blk.3.ffn_down_exps.weight"
            || name == "output_norm.weight"
            || name == "output.weight"
    };
    part_of(&demo(), &small, keep, |_| {}, |_, _| {});
    check_bytes(&small, false);
}

#[test]
#[cfg_attr(debug_assertions, ignore = "takes minutes without optimization")]
fn every_byte_is_the_references() {
    check_bytes(&demo(), true);
}

#[test]
fn threads_and_tiers_make_no_difference() {
    let dir = TempDir::new().unwrap();
    let small = dir.path().join("small.gguf");
    part_of(
        &demo(),
        &small,
        |n| n.starts_with("blk.1.attn"),
        |_| {},
        |_, _| {},
    );
    let mut files = Vec::new();
    for (threads, tier) in [
        ("1", "avx512"),
        ("3", "avx512"),
        ("2", "avx2"),
        ("2", "scalar"),
    ] {
        let dst = dir.path().join(format!("{threads}-{tier}.gguf"));
        ok(&[
            &small,
            &dst,
            &"Q3_K_M",
            &"--threads",
            &threads,
            &"--isa",
            &tier,
        ]);
        files.push(fs::read(dst).unwrap());
    }
    assert!(files.iter().all(|f| *f == files[0]));
}

// ---------------------------------------------------------------- Hugging Face folders

/// The demo model's tensors as a Hugging Face folder has them: name, shape (outermost first), BF16.
fn hugging_face() -> Vec<(String, Vec<u64>, Vec<u8>)> {
    let file = Gguf::open(&demo()).unwrap();
    let mut out = Vec::new();
    for t in file.tensors() {
        let mut bytes = file.bytes(t).to_vec();
        if t.format() == Some(Format::F32) {
            // The converter made F32 of BF16: nothing is lost on the way back.
            let words = bytes.as_chunks::<4>().0.iter();
            bytes = words
                .flat_map(|w| {
                    assert_eq!(w[..2], [0, 0]);
                    [w[2], w[3]]
                })
                .collect();
        }
        let mut shape = t.shape.clone();
        shape.reverse();
        let mut parts = t.name.strip_suffix(".weight").unwrap().split('.');
        let name = match (parts.next().unwrap(), parts.next(), parts.next()) {
            ("token_embd", ..) => "model.embed_tokens".to_string(),
            ("output_norm", ..) => "model.norm".to_string(),
            ("output", ..) => "lm_head".to_string(),
            ("blk", Some(l), Some(part)) => {
                let w = match part {
                    "ffn_gate_exps" => Some("w1"),
                    "ffn_down_exps" => Some("w2"),
                    "ffn_up_exps" => Some("w3"),
                    _ => None,
                };
                if let Some(w) = w {
                    for (e, bytes) in bytes.chunks_exact(bytes.len() / 8).enumerate() {
                        let name =
                            format!("model.layers.{l}.block_sparse_moe.experts.{e}.{w}.weight");
                        out.push((name, shape[1..].to_vec(), bytes.to_vec()));
                    }
                    continue;
                }
                let part = match part {
                    "attn_norm" => "input_layernorm",
                    "ffn_norm" => "post_attention_layernorm",
                    "attn_q" => "self_attn.q_proj",
                    "attn_k" => "self_attn.k_proj",
                    "attn_v" => "self_attn.v_proj",
                    "attn_output" => "self_attn.o_proj",
                    "ffn_gate_inp" => "block_sparse_moe.gate",
                    other => panic!("{other}"),
                };
                if part.ends_with("q_proj") || part.ends_with("k_proj") {
                    // Of the rows of a head (32), the even ones first.
                    let row = 2 * shape[1] as usize;
                    let rows: Vec<&[u8]> = bytes.chunks_exact(row).collect();
                    let heads = rows.chunks_exact(32).flat_map(|head| {
                        let even = head.iter().step_by(2);
                        even.chain(head.iter().skip(1).step_by(2)).copied()
                    });
                    bytes = heads.flatten().copied().collect();
                }
                format!("model.layers.{l}.{part}")
            }
            other => panic!("{other:?}"),
        };
        out.push((format!("{name}.weight"), shape, bytes));
    }
    out
}

/// A safetensors file, whose data starts at an odd address.
fn safetensors(tensors: &[(String, Vec<u64>, Vec<u8>)], dtype: &str) -> Vec<u8> {
    let mut header = serde_json::Map::new();
    header.insert("__metadata__".into(), json!({"format": "pt"}));
    let mut at = 0;
    for (name, shape, bytes) in tensors {
        let end = at + bytes.len();
        let entry = json!({"dtype": dtype, "shape": shape, "data_offsets": [at, end]});
        header.insert(name.clone(), entry);
        at = end;
    }
    let mut header = Value::Object(header).to_string();
    if header.len().is_multiple_of(2) {
        header.push(' ');
    }
    let mut out = (header.len() as u64).to_le_bytes().to_vec();
    out.extend_from_slice(header.as_bytes());
    tensors
        .iter()
        .for_each(|(_, _, bytes)| out.extend_from_slice(bytes));
    out
}

fn config() -> Value {
    json!({
        "architectures": ["MixtralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2,
        "hidden_size": 256, "intermediate_size": 512, "max_position_embeddings": 2048,
        "num_attention_heads": 8, "num_experts_per_tok": 2, "num_hidden_layers": 4,
        "num_key_value_heads": 2, "num_local_experts": 8, "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0, "sliding_window": null, "tie_word_embeddings": false,
        "vocab_size": 4096
    })
}

/// A folder as one downloads it: `demo-model`, in three shards with an index.
fn folder(dir: &Path) -> PathBuf {
    let folder = dir.join("demo-model");
    fs::create_dir(&folder).unwrap();
    fs::write(folder.join("config.json"), config().to_string()).unwrap();
    for name in ["tokenizer.model", "tokenizer_config.json"] {
        let from = data(&format!("tokenizers/demo.{name}"));
        fs::copy(from, folder.join(name)).unwrap();
    }
    let tensors = hugging_face();
    let mut map = serde_json::Map::new();
    // Experts of a layer are spread over shards, as they are in the real ones.
    for (no, tensors) in tensors.chunks(tensors.len().div_ceil(3)).enumerate() {
        let name = format!("model-{:05}-of-00003.safetensors", no + 1);
        fs::write(folder.join(&name), safetensors(tensors, "BF16")).unwrap();
        for (tensor, _, _) in tensors {
            map.insert(tensor.clone(), json!(name));
        }
    }
    let index = json!({"metadata": {}, "weight_map": map}).to_string();
    fs::write(folder.join("model.safetensors.index.json"), index).unwrap();
    folder
}

#[test]
fn a_folder_becomes_the_converters_file() {
    let dir = TempDir::new().unwrap();
    let folder = folder(dir.path());
    let made = dir.path().join("made-{type}.gguf");
    ok(&[&folder, &made, &"BF16,Q8_0,COPY"]);
    let path = |kind: &str| dir.path().join(format!("made-{kind}.gguf"));

    let (made, reference) = (
        Gguf::open(&path("BF16")).unwrap(),
        Gguf::open(&demo()).unwrap(),
    );
    assert_eq!(contents(&path("BF16")), contents(&demo()));
    assert_eq!(contents(&path("COPY")), contents(&demo()));
    let metadata = |file: &Gguf| -> Vec<(String, Value)> {
        file.metadata()
            .map(|(key, value)| (key.to_string(), value.to_json()))
            .collect()
    };
    assert_eq!(metadata(&made), metadata(&reference));

    let expected = &golden()["Q8_0"]["tensors"];
    for (name, (kind, hash)) in contents(&path("Q8_0")) {
        let of = &expected[&name];
        assert_eq!((&of[0], &of[1]), (&json!(kind), &json!(hash)), "{name}");
    }
    // In one step what the reference does in two.
    let two = dir.path().join("two.gguf");
    ok(&[&demo(), &two, &"Q8_0"]);
    assert!(fs::read(two).unwrap() == fs::read(path("Q8_0")).unwrap());
}

#[test]
fn one_file_in_other_floats() {
    let dir = TempDir::new().unwrap();
    let folder = folder(dir.path());
    let float = |bytes: &[u8]| -> Vec<u8> {
        let words = bytes.as_chunks::<2>().0.iter();
        words.flat_map(|w| [0, 0, w[0], w[1]]).collect()
    };
    let tensors: Vec<_> = hugging_face()
        .into_iter()
        .map(|(name, shape, bytes)| (name, shape, float(&bytes)))
        .collect();
    let file = folder.join("whole.safetensors");
    fs::write(&file, safetensors(&tensors, "F32")).unwrap();
    let dst = dir.path().join("out.gguf");
    ok(&[&file, &dst, &"BF16"]);
    assert_eq!(contents(&dst), contents(&demo()));
}

#[test]
fn folders_that_are_not_right() {
    let dir = TempDir::new().unwrap();
    let folder = folder(dir.path());
    let dst = dir.path().join("out.gguf");
    let set = |change: &dyn Fn(&mut Value)| {
        let mut json = config();
        change(&mut json);
        fs::write(folder.join("config.json"), json.to_string()).unwrap();
    };
    let check = |words: &[&str]| {
        assert_eq!(fails(&[&folder, &dst, &"F16"], words), 1);
        assert!(!dst.exists());
    };
    set(&|c| c["intermediate_size"] = json!(500));
    check(&[
        "shape of tensor model.layers.0.block_sparse_moe",
        "[500, 256]",
        "[512, 256]",
    ]);
    set(&|c| c["num_hidden_layers"] = json!(5));
    check(&["tensor model.layers.4.input_layernorm.weight is missing"]);
    set(&|c| c["num_hidden_layers"] = json!(3));
    check(&["a tensor that Mixtral has not", "model.layers.3."]);
    set(&|c| c["architectures"] = json!(["GPT2LMHeadModel"]));
    check(&[
        "architecture is not supported",
        "MixtralForCausalLM",
        "GPT2LMHeadModel",
    ]);
    set(&|c| c["num_attention_heads"] = json!(-8));
    check(&["num_attention_heads", "-8"]);
    set(&|c| c["vocab_size"] = json!(1u64 << 60));
    check(&["vocab_size"]);
    fs::remove_file(folder.join("config.json")).unwrap();
    check(&["config.json is missing"]);
    set(&|_| {});

    let shard = folder.join("model-00002-of-00003.safetensors");
    let bytes = fs::read(&shard).unwrap();
    fs::remove_file(&shard).unwrap();
    check(&["model-00002-of-00003", "shard (1 of 3) is missing"]);
    fs::write(&shard, &bytes[..bytes.len() - 1]).unwrap();
    check(&["model-00002-of-00003", "the file ends inside tensor"]);
    for cut in [0, 7, 8, 100] {
        fs::write(&shard, &bytes[..cut]).unwrap();
        check(&["the file ends inside"]);
    }
    let mut huge = bytes.clone();
    huge[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    fs::write(&shard, &huge).unwrap();
    check(&["the header's length"]);
    // Any byte of the header may be wrong: an answer or an error, never a panic.
    for at in (8..400).step_by(7) {
        let mut bad = bytes.clone();
        bad[at] ^= 0x15;
        fs::write(&shard, &bad).unwrap();
        let out = quantize(&[&folder, &dst, &"F16", &"--dry-run"]);
        assert!(matches!(out.status.code(), Some(0 | 1)), "byte {at}");
    }
    fs::write(&shard, &bytes).unwrap();

    // JSON files of any other shape: an answer or an error.
    for name in [
        "tokenizer_config.json",
        "generation_config.json",
        "added_tokens.json",
        "chat_template.json",
        "tokenizer.json",
        "config.json",
    ] {
        let path = folder.join(name);
        let before = fs::read(&path).ok();
        for text in ["[]", "3", "null", "{\"chat_template\": [1]}", "{", "\"x\""] {
            fs::write(&path, text).unwrap();
            let out = quantize(&[&folder, &dst, &"F16", &"--dry-run"]);
            assert!(matches!(out.status.code(), Some(0 | 1)), "{name} {text}");
        }
        match before {
            Some(bytes) => fs::write(&path, bytes).unwrap(),
            None => fs::remove_file(&path).unwrap(),
        }
    }

    let index = folder.join("model.safetensors.index.json");
    fs::write(
        &index,
        r#"{"weight_map": {"lm_head.weight": "../../etc/passwd"}}"#,
    )
    .unwrap();
    check(&["the shard of tensor `lm_head.weight`", "in this folder"]);
}

// ---------------------------------------------------------------- GGUF sources

#[test]
fn experts_apart_and_together() {
    let dir = TempDir::new().unwrap();
    let path = |name: &str| dir.path().join(name);
    let (together, apart, again) = (path("0.gguf"), path("1.gguf"), path("2.gguf"));
    let shipped = concat!(env!("CARGO_MANIFEST_DIR"), "/models/demo-Q4_K_M.gguf");
    ok(&[&shipped, &together, &"COPY"]);
    assert!(fs::read(&together).unwrap() == fs::read(shipped).unwrap());
    ok(&[&together, &apart, &"COPY", &"--split-experts"]);
    let file = Gguf::open(&apart).unwrap();
    assert_eq!(file.tensors().len(), 43 + 4 * 3 * 7);
    assert_eq!(
        file.tensor("blk.3.ffn_down.7.weight").unwrap().shape,
        [512, 256]
    );
    ok(&[&apart, &again, &"COPY"]);
    assert!(fs::read(&again).unwrap() == fs::read(shipped).unwrap());

    // An expert that is not there.
    let holed = path("holed.gguf");
    part_of(
        &apart,
        &holed,
        |n| n != "blk.1.ffn_up.5.weight",
        |_| {},
        |_, _| {},
    );
    fails(
        &[&holed, &again, &"COPY"],
        &["expert 5 of 8 of blk.1.ffn_up_exps.weight is missing"],
    );
}

#[test]
fn quantized_sources_need_a_word() {
    let dir = TempDir::new().unwrap();
    let (q8, dst) = (dir.path().join("q8.gguf"), dir.path().join("out.gguf"));
    ok(&[&demo(), &q8, &"Q8_0"]);
    let code = fails(
        &[&q8, &dst, &"Q4_0"],
        &["quantized already", "--allow-requantize"],
    );
    assert_eq!(code, 2);
    ok(&[&q8, &dst, &"Q4_0", &"--allow-requantize"]);
    let file = Gguf::open(&dst).unwrap();
    assert_eq!(
        file.tensor("blk.0.attn_q.weight").unwrap().type_name(),
        "Q4_0"
    );
    // Back to floats nothing more is lost.
    ok(&[&q8, &dst, &"F32"]);
}

#[test]
fn overrides() {
    let dir = TempDir::new().unwrap();
    let dst = dir.path().join("out.gguf");
    let types = |args: &[&str]| -> BTreeMap<String, String> {
        let mut command = Command::new(env!("CARGO_BIN_EXE_quantize"));
        let out = command
            .arg(demo())
            .arg(&dst)
            .args(args)
            .arg("--dry-run")
            .output()
            .unwrap();
        assert!(
            out.status.success(),
            "{}",
            String::from_utf8_lossy(&out.stderr)
        );
        let text = String::from_utf8(out.stdout).unwrap();
        let words = text
            .lines()
            .map(|l| l.split_whitespace().collect::<Vec<_>>());
        words
            .filter(|w| w.len() > 3 && w[0].ends_with(".weight"))
            .map(|w| (w[0].to_string(), w[2].to_string()))
            .collect()
    };
    let t = types(&["Q4_K_M", "--pure"]);
    assert_eq!(t["output.weight"], "Q4_K");
    assert_eq!(t["blk.0.attn_v.weight"], "Q4_K");
    assert_eq!(t["blk.0.ffn_gate_inp.weight"], "F32");
    let by = |re: &'static str| ["Q4_K_M", "--tensor-type", re];
    let t = types(&by("blk\\.[01]\\.ffn_down=Q5_K"));
    assert_eq!(t["blk.1.ffn_down_exps.weight"], "Q5_K");
    assert_eq!(t["blk.2.ffn_down_exps.weight"], "Q6_K");
    let t = types(&[
        "Q5_0",
        "--output-tensor-type",
        "f16",
        "--token-embedding-type",
        "Q8_0",
    ]);
    assert_eq!(t["output.weight"], "F16");
    assert_eq!(t["token_embd.weight"], "Q8_0");
    let code = fails(&[&demo(), &dst, &"Q4_0,Q8_0"], &["{type}"]);
    assert_eq!(code, 2);
}

#[test]
fn shards() {
    let dir = TempDir::new().unwrap();
    let dst = dir.path().join("out.gguf");
    let names = || {
        let mut names: Vec<String> = fs::read_dir(dir.path())
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    };
    ok(&[&demo(), &dst, &"COPY", &"--keep-split", &"3"]);
    let expected: Vec<String> = (1..=3)
        .map(|i| format!("out-{i:05}-of-00003.gguf"))
        .collect();
    assert_eq!(names(), expected);
    let first = dir.path().join(&expected[0]);
    assert_eq!(contents(&first), contents(&demo()));
    let sizes: Vec<u64> = expected
        .iter()
        .map(|n| fs::metadata(dir.path().join(n)).unwrap().len())
        .collect();
    assert!(
        sizes.iter().all(|s| (8_000_000..13_000_000).contains(s)),
        "{sizes:?}"
    );
    // From a split source into a whole file and into files of a size.
    let whole = dir.path().join("whole.gguf");
    ok(&[&first, &whole, &"COPY"]);
    assert_eq!(contents(&whole), contents(&demo()));
    let sized = dir.path().join("sized.gguf");
    ok(&[&whole, &sized, &"COPY", &"--split-size", &"5M"]);
    let first = names()
        .into_iter()
        .find(|n| n.starts_with("sized-00001"))
        .unwrap();
    assert_eq!(contents(&dir.path().join(first)), contents(&demo()));
    for name in names().iter().filter(|n| n.starts_with("sized")) {
        assert!(fs::metadata(dir.path().join(name)).unwrap().len() < 5_200_000);
    }
}

// ---------------------------------------------------------------- importance

/// Some numbers that are the same every time.
fn numbers(n: usize, seed: u32) -> Vec<f32> {
    let mut x = seed;
    let mut next = || {
        x = x.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (x >> 8) as f32 / (1 << 24) as f32
    };
    (0..n).map(|_| next()).collect()
}

#[test]
fn importance_of_either_form() {
    let dir = TempDir::new().unwrap();
    let path = |name: &str| dir.path().join(name);
    let source = path("source.gguf");
    let (query, down) = ("blk.0.attn_q.weight", "blk.0.ffn_down_exps.weight");
    part_of(
        &demo(),
        &source,
        |n| n == query || n == down,
        |_| {},
        |_, _| {},
    );
    let (of_query, of_down) = (numbers(256, 1), numbers(512 * 8, 2));
    let bytes = |x: &[f32]| -> Vec<u8> { x.iter().flat_map(|x| x.to_le_bytes()).collect() };

    // Expert 3 saw nothing.
    let counts = [7.0f32, 1.0, 3.0, 0.0, 5.0, 2.0, 9.0, 4.0];
    let mut w = Writer::new();
    w.put("general.type", "imatrix");
    w.put("imatrix.datasets", vec!["text.txt"]);
    w.put("imatrix.chunk_count", 5u32);
    w.put("imatrix.chunk_size", 512u32);
    let of = |what: &str| [format!("{down}{what}"), format!("{query}{what}")];
    let ([down_sums, query_sums], [down_counts, query_counts]) = (of(".in_sum2"), of(".counts"));
    w.tensor(&down_sums, 0, &[512, 8])
        .tensor(&down_counts, 0, &[1, 8]);
    w.tensor(&query_sums, 0, &[256, 1])
        .tensor(&query_counts, 0, &[1, 1]);
    let mut stream = w.start("imatrix", Vec::new()).unwrap();
    for data in [&of_down[..], &counts, &of_query, &[8.0]] {
        stream.write(&bytes(data)).unwrap();
    }
    fs::write(path("new.gguf"), stream.finish().unwrap()).unwrap();

    // What the sums mean.
    let mut mean = of_down.clone();
    for (x, n) in mean.chunks_exact_mut(512).zip(counts) {
        x.iter_mut()
            .for_each(|x| *x = if n > 0.0 { *x / n } else { 1.0 });
    }
    let query_mean: Vec<f32> = of_query.iter().map(|x| x / 8.0).collect();

    // The old form counts calls; two calls double the sums.
    let mut old = 2i32.to_le_bytes().to_vec();
    for (name, mean) in [(down, &mean), (query, &query_mean)] {
        old.extend((name.len() as i32).to_le_bytes());
        old.extend(name.as_bytes());
        old.extend(2i32.to_le_bytes());
        old.extend((mean.len() as i32).to_le_bytes());
        old.extend(mean.iter().flat_map(|x| (2.0 * x).to_le_bytes()));
    }
    let entries_end = old.len();
    old.extend(5i32.to_le_bytes());
    old.extend(8i32.to_le_bytes());
    old.extend(b"text.txt");
    fs::write(path("old.dat"), &old).unwrap();
    fs::write(path("oldest.dat"), &old[..entries_end]).unwrap();

    let expected = |name: &str, format: Format, importance: &[f32]| {
        let file = Gguf::open(&source).unwrap();
        let t = file.tensor(name).unwrap();
        let k = t.shape[0] as usize;
        let mut x = vec![0.0; t.elements() as usize];
        Format::BF16.decode(&file.bytes(t), &mut x);
        let rows = t.shape[1] as usize;
        let mut out = Vec::new();
        for (r, x) in x.chunks_exact(k).enumerate() {
            let mut row = vec![0; format.row_bytes(k)];
            let w = &importance[r / rows * k..][..k];
            format.encode::<Plain>(x, Some(w), &mut row);
            out.extend(row);
        }
        hash(&out)
    };
    for form in ["new.gguf", "old.dat", "oldest.dat"] {
        let dst = path("out.gguf");
        let args: [&dyn AsRef<std::ffi::OsStr>; 5] =
            [&source, &dst, &"Q4_0", &"--imatrix", &path(form)];
        let out = quantize(&args);
        let said = String::from_utf8(out.stderr).unwrap();
        assert!(out.status.success(), "{said}");
        assert_eq!(
            said.contains("layer 0 expert 3"),
            form == "new.gguf",
            "{said}"
        );
        let found = contents(&dst);
        assert_eq!(
            found[query].1,
            expected(query, Format::Q4_0, &query_mean),
            "{form}"
        );
        assert_eq!(found[down].1, expected(down, Format::Q4_0, &mean), "{form}");
        let file = Gguf::open(&dst).unwrap();
        let entries = file.get_u32("quantize.imatrix.entries_count").unwrap();
        assert_eq!(entries, Some(2));
        let chunks = file.get_u32("quantize.imatrix.chunks_count").unwrap();
        assert_eq!(chunks, (form != "oldest.dat").then_some(5));
    }

    // Cut anywhere it is an error or (between entries' end and the text's name) the whole.
    for cut in (0..entries_end).step_by(997) {
        fs::write(path("cut.dat"), &old[..cut]).unwrap();
        fails(
            &[
                &source,
                &path("out2.gguf"),
                &"Q4_0",
                &"--imatrix",
                &path("cut.dat"),
            ],
            &["cut.dat"],
        );
    }
    let mut bad = old.clone();
    bad[4 + 4 + down.len() + 8..][..4].copy_from_slice(&f32::NAN.to_le_bytes());
    fs::write(path("nan.dat"), &bad).unwrap();
    fails(
        &[
            &source,
            &path("out2.gguf"),
            &"Q4_0",
            &"--imatrix",
            &path("nan.dat"),
        ],
        &["the importance of `blk.0.ffn_down_exps.weight`", "NaN"],
    );
}

// ---------------------------------------------------------------- safe writing

#[test]
fn weights_that_are_no_numbers() {
    let dir = TempDir::new().unwrap();
    let (bad, dst) = (dir.path().join("bad.gguf"), dir.path().join("out.gguf"));
    let name = "blk.1.attn_v.weight";
    let spoil = |n: &str, bytes: &mut Vec<u8>| {
        if n == name {
            bytes[2 * 700..][..2].copy_from_slice(&[0xc0, 0x7f]); // NaN in BF16
        }
    };
    part_of(
        &demo(),
        &bad,
        |n| n.starts_with("blk.1.attn"),
        |_| {},
        spoil,
    );
    fs::write(&dst, "old").unwrap();
    for kind in ["Q8_0", "BF16", "COPY"] {
        let words = ["row 2, column 188", name, "NaN", "--force"];
        fails(&[&bad, &dst, &kind], &words);
    }
    assert_eq!(fs::read(&dst).unwrap(), b"old");
    assert_eq!(
        fs::read_dir(dir.path()).unwrap().count(),
        2,
        "nothing is left over"
    );
    ok(&[&bad, &dst, &"Q8_0", &"--force"]);
    assert_eq!(Gguf::open(&dst).unwrap().tensors().len(), 5);
}

/// A killed run leaves the old file and continues to the same bytes; so does one whose disk is full.
#[cfg(unix)]
#[test]
fn interrupted_and_resumed() {
    let dir = TempDir::new().unwrap();
    let path = |name: &str| dir.path().join(name);
    let (dst, whole) = (path("out.gguf"), path("whole.gguf"));
    ok(&[&demo(), &whole, &"Q8_0"]);
    let whole = fs::read(whole).unwrap();
    // The shell's limit is in blocks of 512 bytes: 5 of 16 MB. Without the trap its signal kills.
    for trap in ["", "trap '' XFSZ; "] {
        fs::write(&dst, "old").unwrap();
        let script = format!("{trap}ulimit -f 10000; exec \"$0\" \"$@\"");
        let run = |more: &[&str]| {
            let mut command = Command::new("sh");
            command.arg("-c").arg(&script);
            command
                .arg(env!("CARGO_BIN_EXE_quantize"))
                .arg(demo())
                .arg(&dst);
            command.arg("Q8_0").args(more).output().unwrap()
        };
        let out = run(&[]);
        assert!(!out.status.success());
        assert_eq!(out.status.code().is_none(), trap.is_empty(), "killed");
        assert_eq!(fs::read(&dst).unwrap(), b"old");
        assert!(path("out.gguf.part").exists());
        if !trap.is_empty() {
            let error = String::from_utf8(out.stderr).unwrap();
            assert!(error.contains("--resume continues"), "{error}");
            assert!(error.contains("out.gguf.part: cannot write"), "{error}");
        }

        // Other options do not fit.
        fails(
            &[&demo(), &dst, &"Q5_0", &"--resume"],
            &["what the unfinished file was made of"],
        );
        // Bytes that never reached the disk.
        if trap.is_empty() {
            let part = fs::read(path("out.gguf.part")).unwrap();
            let mut hurt = part.clone();
            let at = part.len() / 2;
            hurt[at..].fill(0);
            fs::write(path("out.gguf.part"), hurt).unwrap();
        }
        let out = quantize(&[&demo(), &dst, &"Q8_0", &"--resume"]);
        let said = String::from_utf8(out.stderr).unwrap();
        assert!(out.status.success(), "{said}");
        assert!(said.contains("tensors of an earlier run"), "{said}");
        assert!(fs::read(&dst).unwrap() == whole, "the same bytes");
        assert!(!path("out.gguf.part").exists() && !path("out.gguf.resume").exists());
    }
}

#[test]
fn hostile_sources() {
    let dir = TempDir::new().unwrap();
    let dst = dir.path().join("out.gguf");
    let text = dir.path().join("text.gguf");
    fs::write(&text, "no model").unwrap();
    fails(&[&text, &dst, &"Q8_0"], &["text.gguf"]);
    fails(
        &[&dir.path().join("absent"), &dst, &"Q8_0"],
        &["absent", "cannot open"],
    );
    fails(
        &[&dir.path(), &dst, &"Q8_0"],
        &["a .safetensors file is missing"],
    );
    fails(
        &[&demo(), &dir.path(), &"Q8_0"],
        &["the destination", "a folder"],
    );
    // Shapes that no recipe expects.
    let odd = dir.path().join("odd.gguf");
    let mut w = Writer::new();
    w.put("general.architecture", "llama")
        .put("llama.expert_count", u32::MAX);
    w.put("llama.block_count", 0u32);
    w.tensor("blk.999999999999999999999.ffn_down.weight", 0, &[33, 2]);
    w.tensor("blk.7.ffn_down_exps.weight", 0, &[1, 1, 1, 3]);
    w.tensor("blk.0.attn_v.weight", 0, &[1, 1]);
    w.tensor("x\n\u{1b}.weight", 0, &[256, 1]);
    let mut stream = w.start("odd", Vec::new()).unwrap();
    stream.write(&vec![0; 66 * 4]).unwrap();
    stream.write(&[0; 12]).unwrap();
    stream.write(&[0; 4]).unwrap();
    stream.write(&[0; 1024]).unwrap();
    fs::write(&odd, stream.finish().unwrap()).unwrap();
    for kind in ["Q4_K_M", "Q2_K", "F16", "COPY"] {
        let text = ok(&[&odd, &dst, &kind, &"--split-experts"]);
        assert!(!text.contains('\u{1b}'));
    }
}
