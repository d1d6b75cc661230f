//! Reads GGUF files with octet's reader and with the independent gguf-rs crate and compares all that
//! both of them say.
//!
//! ```text
//! gguf_oracle [FILE…]
//! gguf_oracle --time FILE…      how long each of the two takes to open a file (build with --release)
//! ```
//!
//! Compared are the version, every metadata key and value, and every tensor's name, type, shape and
//! place in the file. gguf-rs gives values as JSON, without their types, does not know nested arrays, and
//! has wrong sizes for some types, so that these are not compared. Besides the files that are given,
//! some are written by octet's writer and compared too. Prints one line per file; at the first
//! difference it says what differs and exits with 1.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use octet::gguf::{Gguf, Value, Writer};
use octet::quant::type_info;
use serde_json::Value as Json;

type Result<T> = std::result::Result<T, String>;

fn main() -> ExitCode {
    let mut given: Vec<PathBuf> = std::env::args_os().skip(1).map(PathBuf::from).collect();
    let result = if given
        .first()
        .is_some_and(|first| first.as_os_str() == "--time")
    {
        given.remove(0);
        given.iter().try_for_each(|path| time(path))
    } else {
        check_all(&given)
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(difference) => {
            println!("DIFFERENT {difference}");
            ExitCode::FAILURE
        }
    }
}

fn check_all(given: &[PathBuf]) -> Result<()> {
    let folder = tempfile::tempdir().map_err(|e| e.to_string())?;
    let written = write_all(folder.path())?;
    for path in given.iter().chain(&written) {
        let (keys, tensors) = compare(path).map_err(|e| format!("{}: {e}", path.display()))?;
        println!("OK {}: {keys} keys, {tensors} tensors", path.display());
    }
    Ok(())
}

/// Prints the median time that each reader takes to open a file that is in the page cache.
fn time(path: &Path) -> Result<()> {
    let median = |open: &dyn Fn() -> Result<()>| -> Result<f64> {
        let mut times = Vec::new();
        for _ in 0..51 {
            let start = Instant::now();
            open()?;
            times.push(start.elapsed().as_secs_f64() * 1e3);
        }
        times.sort_by(f64::total_cmp);
        Ok(times[25])
    };
    let ours = median(&|| open_ours(path).map(drop))?;
    let theirs = median(&|| open_theirs(path).map(drop))?;
    let path = path.display();
    println!("{path}: octet {ours:.2} ms, gguf-rs {theirs:.2} ms");
    Ok(())
}

fn open_ours(path: &Path) -> Result<Gguf> {
    Gguf::open(path).map_err(|e| format!("octet: {e}"))
}

fn open_theirs(path: &Path) -> Result<gguf_rs::GGUFModel> {
    let name = path.to_str().ok_or("the path is not UTF-8")?;
    gguf_rs::get_gguf_container_array_size(name, u64::MAX)
        .and_then(|mut container| container.decode())
        .map_err(|e| format!("gguf-rs: {e}"))
}

/// Compares what both readers say of a file; the number of keys and of tensors that are equal.
fn compare(path: &Path) -> Result<(usize, usize)> {
    let ours = open_ours(path)?;
    let theirs = open_theirs(path)?;

    same(
        "version",
        format!("v{}", ours.version()),
        theirs.get_version(),
    )?;

    let mut keys = 0;
    for (key, value) in ours.metadata() {
        let theirs = theirs.metadata().get(key);
        let theirs = theirs.ok_or_else(|| format!("{key}: gguf-rs does not have it"))?;
        equal(&value, theirs).map_err(|e| format!("{key}: {e}"))?;
        keys += 1;
    }
    same("number of keys", keys, theirs.metadata().len())?;

    for (ours, t) in ours.tensors().iter().zip(theirs.tensors()) {
        let name = &ours.name;
        let at = |what: &str| format!("{what} of tensor {name}");
        same(&at("name"), name, &t.name)?;
        same(&at("type"), ours.type_id, t.kind)?;
        let type_name = gguf_rs::GGMLType::try_from(t.kind).map_err(|e| e.to_string())?;
        same(&at("type's name"), ours.type_name(), &type_name.to_string())?;
        same(&at("shape"), &ours.shape, &t.shape)?;
        same(&at("place"), ours.offset, theirs.data_offset() + t.offset)?;
    }
    let tensors = ours.tensors().len();
    same("number of tensors", tensors, theirs.tensors().len())?;
    Ok((keys, tensors))
}

fn same<T: PartialEq + std::fmt::Debug>(what: &str, ours: T, theirs: T) -> Result<()> {
    if ours == theirs {
        Ok(())
    } else {
        Err(format!("{what}: octet has {ours:?}, gguf-rs {theirs:?}"))
    }
}

/// Whether a value and its JSON form are the same, floats to the last bit.
fn equal(ours: &Value<'_>, theirs: &Json) -> Result<()> {
    let is_equal = match *ours {
        Value::Bool(v) => theirs.as_bool() == Some(v),
        Value::Str(v) => theirs.as_str() == Some(v),
        // JSON has no word for these.
        Value::F32(v) if !v.is_finite() => theirs.is_null(),
        Value::F64(v) if !v.is_finite() => theirs.is_null(),
        // Parsed in their own width, as the text is the shortest one of that width.
        Value::F32(v) => theirs.to_string().parse() == Ok(v),
        Value::F64(v) => theirs.to_string().parse() == Ok(v),
        Value::U64(v) => theirs.as_u64() == Some(v),
        Value::Array(array) => {
            let items = theirs.as_array().ok_or("gguf-rs has no array")?;
            same("number of items", array.len(), items.len())?;
            for (i, (ours, theirs)) in array.iter().zip(items).enumerate() {
                equal(&ours, theirs).map_err(|e| format!("item {i}: {e}"))?;
            }
            true
        }
        _ => ours.as_i64().is_some() && theirs.as_i64() == ours.as_i64(),
    };
    if is_equal {
        Ok(())
    } else {
        Err(format!("octet has {ours}, gguf-rs {theirs}"))
    }
}

/// Writes a file of every kind that both readers know.
fn write_all(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut paths = Vec::new();
    let mut write = |name: &str, version: u8, w: &Writer| -> Result<()> {
        let mut stream = w.start(name, Vec::new()).map_err(|e| e.to_string())?;
        while let Some(t) = stream.current() {
            let bytes = vec![0; t.bytes as usize];
            stream.write(&bytes).map_err(|e| e.to_string())?;
        }
        let mut bytes = stream.finish().map_err(|e| e.to_string())?;
        // Version 2 differs in nothing but the number.
        bytes[4] = version;
        let path = folder.join(name);
        std::fs::write(&path, bytes).map_err(|e| e.to_string())?;
        paths.push(path);
        Ok(())
    };

    let values = values();
    write("values.gguf", 3, &values)?;
    write("values-v2.gguf", 2, &values)?;
    write("types.gguf", 3, &types())?;
    write(
        "types-aligned.gguf",
        3,
        types().put("general.alignment", 128u32),
    )?;
    write("experts-fused.gguf", 3, &experts(true))?;
    write("experts-old.gguf", 3, &experts(false))?;
    write("empty.gguf", 3, &Writer::new())?;
    Ok(paths)
}

/// Metadata of every type.
fn values() -> Writer {
    let mut w = Writer::new();
    w.put("general.architecture", "llama")
        .put("u8", u8::MAX)
        .put("i8", i8::MIN)
        .put("u16", u16::MAX)
        .put("i16", i16::MIN)
        .put("u32", u32::MAX)
        .put("i32", i32::MIN)
        .put("u64", u64::MAX)
        .put("i64", i64::MIN)
        .put("f32", 1e-5f32)
        .put("f32.least", f32::from_bits(1))
        .put("f32.infinite", f32::INFINITY)
        .put("f64", std::f64::consts::PI)
        .put("f64.most", f64::MAX)
        .put("true", true)
        .put("false", false)
        .put("text", "Märchen\n\u{1F98A}")
        .put("text.empty", "")
        .put("Ключ", 1u32)
        .put("a.u8", [0u8, 255])
        .put("a.i8", [-128i8, 127])
        .put("a.u16", [0u16, 65535])
        .put("a.i16", [-32768i16, 32767])
        .put("a.u32", [0u32, u32::MAX])
        .put("a.i32", [i32::MIN, i32::MAX])
        .put("a.u64", [0u64, u64::MAX])
        .put("a.i64", [i64::MIN, i64::MAX])
        .put("a.f32", [0.1f32, -0.0, f32::NAN, f32::MIN_POSITIVE])
        .put("a.f64", [0.1f64, -1e300])
        .put("a.bool", [true, false, true])
        .put("a.text", ["<unk>", "▁the", ""])
        .put("a.empty", Vec::<u32>::new())
        .put(
            "tokenizer.ggml.tokens",
            (0..5000).map(|i| format!("▁{i}")).collect::<Vec<_>>(),
        )
        .put(
            "tokenizer.ggml.scores",
            (0..5000).map(|i| -(i as f32) / 3.0).collect::<Vec<_>>(),
        );
    w
}

/// A tensor of every type and of every number of dimensions.
fn types() -> Writer {
    let mut w = Writer::new();
    // The types that gguf-rs 0.1.8 knows; it panics at 40.
    for info in (0..40).filter_map(type_info) {
        let (id, row) = (info.id, info.block_weights * 3);
        for rest in 0..4 {
            let shape = [&[row][..], &[2, 3, 5][..rest]].concat();
            w.tensor(&format!("t{id}.{rest}.weight"), id, &shape);
        }
    }
    w
}

/// A tiny Mixtral, with the experts in one tensor or, as in the first files, each in its own.
fn experts(fused: bool) -> Writer {
    const Q4_0: u32 = 2;
    let mut w = Writer::new();
    w.put("general.architecture", "llama")
        .put("llama.block_count", 2u32)
        .put("llama.expert_count", 8u32)
        .put("llama.expert_used_count", 2u32);
    w.tensor("token_embd.weight", Q4_0, &[64, 10]);
    for layer in 0..2 {
        w.tensor(&format!("blk.{layer}.attn_norm.weight"), 0, &[64]);
        w.tensor(&format!("blk.{layer}.ffn_gate_inp.weight"), 1, &[64, 8]);
        for (part, shape) in [("gate", [64, 96]), ("down", [96, 64]), ("up", [64, 96])] {
            let name = format!("blk.{layer}.ffn_{part}");
            if fused {
                w.tensor(
                    &format!("{name}_exps.weight"),
                    Q4_0,
                    &[shape[0], shape[1], 8],
                );
            } else {
                for x in 0..8 {
                    w.tensor(&format!("{name}.{x}.weight"), Q4_0, &shape);
                }
            }
        }
    }
    w
}
