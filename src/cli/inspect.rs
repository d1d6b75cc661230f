//! `octet inspect`: what is in a GGUF file.

use super::gpu::inspected;
use crate::chat::repl::show;
use crate::error::Result;
use crate::gguf::{Gguf, Tensor, hex};
use crate::pool::Pool;
use crate::readable::{bytes, one_line};
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};
use std::path::PathBuf;

/// Show what is in a GGUF file: metadata, tensors, sizes.
#[derive(clap::Args, Clone, Debug)]
pub struct Args {
    /// The file (of a split model: any part)
    pub file: PathBuf,
    /// List every tensor
    #[arg(long)]
    pub tensors: bool,
    /// Compute the SHA-256 of every tensor's stored bytes
    #[arg(long)]
    pub hash: bool,
    /// One JSON document on standard output; "offset" counts from the start of the tensor's file
    #[arg(long)]
    pub json: bool,
}

/// Runs the command.
///
/// # Errors
/// If the file cannot be read.
pub fn run(args: &Args) -> Result<()> {
    let file = Gguf::open(&args.file)?;
    let hashes = if args.hash {
        hashes(&file)?
    } else {
        vec![None; file.tensors().len()]
    };
    if args.json {
        return show(&format!("{}\n", document(&file, &hashes)));
    }
    let mut out = format!(
        "{}: GGUF version {}, {} tensors, {}\n\nMetadata\n",
        file.path().display(),
        file.version(),
        file.tensors().len(),
        bytes(file.file_bytes()),
    );
    for (key, value) in file.metadata() {
        out.push_str(&format!(
            "  {} = {}\n",
            one_line(key),
            one_line(&value.to_string())
        ));
    }
    out.push_str("\nSize by part\n");
    for (part, n, size, elements) in parts(&file) {
        let bits = size as f64 * 8.0 / elements as f64;
        out.push_str(&format!(
            "  {part:<12} {n:>5} tensors {:>12} {bits:>7.2} bits/weight\n",
            bytes(size)
        ));
    }
    let on_gpu = inspected(&file);
    if !on_gpu.is_empty() {
        out.push_str("\nOn a GPU\n");
    }
    for (name, text) in on_gpu {
        out.push_str(&format!("  {name:<20} {text}\n"));
    }
    if args.tensors || args.hash {
        out.push_str("\nTensors\n");
        for (t, hash) in file.tensors().iter().zip(&hashes) {
            let shape: Vec<_> = t.shape.iter().map(u64::to_string).collect();
            out.push_str(&format!(
                "  {:<32} {:<7} {:<20} {:>12}{}\n",
                one_line(&t.name),
                t.type_name(),
                shape.join(" x "),
                bytes(t.bytes),
                hash.as_ref().map_or(String::new(), |h| format!("  {h}")),
            ));
        }
    }
    show(&out)
}

/// SHA-256 of every tensor, as many at once as there are cores.
fn hashes(file: &Gguf) -> Result<Vec<Option<String>>> {
    let pool = Pool::new(0)?;
    let mut hashes = vec![None; file.tensors().len()];
    pool.enter(|| {
        pool.each(&mut hashes, |i, hash| {
            let digest = Sha256::digest(&*file.bytes(&file.tensors()[i]));
            *hash = Some(hex(&digest));
        });
    });
    Ok(hashes)
}

fn document(file: &Gguf, hashes: &[Option<String>]) -> Value {
    let metadata: Map<String, Value> = file
        .metadata()
        .map(|(k, v)| (k.to_string(), v.to_json()))
        .collect();
    let tensors: Vec<Value> = file
        .tensors()
        .iter()
        .zip(hashes)
        .map(|(t, hash)| {
            let mut tensor = json!({
                "name": t.name, "type": t.type_name(), "shape": t.shape, "offset": t.offset, "bytes": t.bytes,
            });
            if let Some(hash) = hash {
                tensor["sha256"] = json!(hash);
            }
            if file.shards().len() > 1 {
                tensor["shard"] = json!(t.shard);
            }
            tensor
        })
        .collect();
    json!({ "metadata": metadata, "tensors": tensors })
}

/// `(part, tensors, bytes, elements)` for each part of a model that the file has.
fn parts(file: &Gguf) -> Vec<(&'static str, usize, u64, u64)> {
    let part_of = |t: &Tensor| match t.name.as_str() {
        name if name.contains("norm") => "norms",
        name if name.contains(".attn_") => "attention",
        name if name.contains(".ffn_gate_inp") => "router",
        name if name.contains("_exps.") || is_old_expert(name) => "experts",
        name if name.contains(".ffn_") => "feed-forward",
        name if name.starts_with("token_embd") => "embedding",
        name if name.starts_with("output") => "output",
        _ => "other",
    };
    let order = [
        "embedding",
        "attention",
        "router",
        "experts",
        "feed-forward",
        "norms",
        "output",
        "other",
    ];
    order
        .into_iter()
        .filter_map(|part| {
            let of: Vec<&Tensor> = file
                .tensors()
                .iter()
                .filter(|t| part_of(t) == part)
                .collect();
            let (size, elements) = (
                of.iter().map(|t| t.bytes).sum(),
                of.iter().map(|t| t.elements()).sum(),
            );
            (!of.is_empty()).then_some((part, of.len(), size, elements))
        })
        .collect()
}

/// `blk.N.ffn_gate.X.weight`: one expert of the old layout.
fn is_old_expert(name: &str) -> bool {
    name.contains(".ffn_") && name.split('.').filter(|p| p.parse::<u32>().is_ok()).count() == 2
}
