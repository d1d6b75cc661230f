//! From a Hugging Face folder: its names and row order become GGUF's, its JSON files the metadata (`import/metadata.rs`).
//!
//! Names, order of keys and the treatment of special tokens are those of the reference's converter
//! (llama.cpp, `conversion/`), so that the result is what people are used to.

mod metadata;

use std::collections::HashSet;
use std::path::Path;

use octet::error::{Error, Result};
use octet::gguf::safetensors::{Entry, Safetensors, read_json};
use octet::quant::Format;
use serde_json::Value;

use crate::source::{Piece, Source, SourceFile, SourceTensor};
use metadata::metadata;

/// JSON files of a model may have this many bytes; a tokenizer.json of 32,000 pieces has 2 MB.
const MAX_JSON: u64 = 64 << 20;

/// What `config.json` says of the shape.
struct Config {
    n_layer: u64,
    d_model: u64,
    d_ff: u64,
    n_head: u64,
    n_kv: u64,
    d_head: u64,
    n_vocab: u64,
    n_expert: u64,
    n_used: u64,
    n_ctx: u64,
    rms_eps: f64,
    rope_base: f64,
    /// `head_dim`, if the file names it.
    head_dim: Option<u64>,
    tied: bool,
}

/// Opens a folder with `config.json`, weights and a tokenizer, or one file of such a folder.
///
/// # Errors
/// If a file is missing, is not what it should be, or if a tensor's shape disagrees with `config.json`.
pub(crate) fn open(path: &Path) -> Result<Source> {
    let (folder, weights) = if path.is_dir() {
        (path, Safetensors::open_folder(path)?)
    } else {
        let parent = path.parent().filter(|p| *p != Path::new(""));
        (parent.unwrap_or(Path::new(".")), Safetensors::open(path)?)
    };
    let config_path = folder.join("config.json");
    if !config_path.is_file() {
        let hint = "a Hugging Face model has it beside its weights";
        return Err(Error::missing(folder, "config.json", hint));
    }
    let json = read_json(&config_path, MAX_JSON)?;
    let config = Config::read(&json, &config_path)?;
    let mut notes = Vec::new();
    let tensors = tensors(&config, &weights, path, &mut notes)?;
    let metadata = metadata(&config, &json, &tensors, folder, &mut notes)?;
    let files: Result<Vec<SourceFile>> = weights
        .files()
        .iter()
        .map(|f| SourceFile::open(f))
        .collect();
    let mut source = Source {
        path: path.to_path_buf(),
        files: files?,
        metadata,
        from_gguf: false,
        shards: weights.files().len(),
        tensors,
        n_layer: config.n_layer as usize,
        n_head: config.n_head as usize,
        n_kv: config.n_kv as usize,
        n_expert: config.n_expert as usize,
        notes,
    };
    source.sort();
    Ok(source)
}

impl Config {
    fn read(json: &Value, path: &Path) -> Result<Config> {
        let known = [
            "MixtralForCausalLM",
            "MistralForCausalLM",
            "LlamaForCausalLM",
        ];
        let arch = json["architectures"][0].as_str().unwrap_or_default();
        if !known.contains(&arch) {
            let what = "this architecture";
            let found = format!("{arch:?}");
            return Err(Error::unsupported(path, what, known.join(", "), found));
        }
        if !json["quantization_config"].is_null() {
            return Err(Error::unsupported(
                path,
                "a model that is quantized already (quantization_config)",
                "F32, F16 or BF16 weights",
                &json["quantization_config"]["quant_method"],
            ));
        }
        // Up to a size at which products of any two still fit.
        let optional = |key: &str| match &json[key] {
            Value::Null => Ok(None),
            value => match value.as_u64().filter(|n| (1..1 << 31).contains(n)) {
                Some(n) => Ok(Some(n)),
                None => Err(Error::invalid(path, key, "a number of 1 or more", value)),
            },
        };
        let number = |key: &str| {
            optional(key)?.ok_or_else(|| Error::missing(path, format!("{key} in config.json"), ""))
        };
        let float = |value: &Value, key: &str, default: f64| match value {
            Value::Null => Ok(default),
            value => match value.as_f64().filter(|x| x.is_finite() && *x > 0.0) {
                Some(x) => Ok(x),
                None => Err(Error::invalid(path, key, "a positive number", value)),
            },
        };
        // Newer files have it inside, older ones at the top.
        let rope = match &json["rope_parameters"] {
            Value::Null => &json["rope_scaling"],
            inside => inside,
        };
        let kind = rope["rope_type"].as_str().or(rope["type"].as_str());
        if let Some(kind) = kind.filter(|kind| *kind != "default") {
            let found = format!("{kind:?}");
            return Err(Error::unsupported(path, "this RoPE scaling", "none", found));
        }
        let theta = match &rope["rope_theta"] {
            Value::Null => &json["rope_theta"],
            inside => inside,
        };
        let moe = arch == "MixtralForCausalLM";
        let (d_model, n_head) = (number("hidden_size")?, number("num_attention_heads")?);
        let head_dim = optional("head_dim")?;
        let d_head = head_dim.unwrap_or(d_model / n_head);
        let n_kv = optional("num_key_value_heads")?.unwrap_or(n_head);
        if d_head == 0 || !d_head.is_multiple_of(2) {
            let found = format!("{d_model} / {n_head}");
            return Err(Error::invalid(
                path,
                "the size of a head",
                "an even number",
                found,
            ));
        }
        if !n_head.is_multiple_of(n_kv) {
            let expected = format!("a divisor of {n_head} heads");
            return Err(Error::invalid(path, "num_key_value_heads", expected, n_kv));
        }
        let n_layer = number("num_hidden_layers")?;
        let n_expert = if moe { number("num_local_experts")? } else { 0 };
        for (key, n, most) in [
            ("num_hidden_layers", n_layer, 4096),
            ("num_local_experts", n_expert, 4096),
        ] {
            if n > most {
                return Err(Error::invalid(path, key, format!("at most {most}"), n));
            }
        }
        Ok(Config {
            n_layer,
            d_model,
            d_ff: number("intermediate_size")?,
            n_head,
            n_kv,
            d_head,
            n_vocab: number("vocab_size")?,
            n_expert,
            n_used: if moe {
                number("num_experts_per_tok")?
            } else {
                0
            },
            n_ctx: number("max_position_embeddings")?,
            rms_eps: float(&json["rms_norm_eps"], "rms_norm_eps", 1e-6)?,
            rope_base: float(theta, "rope_theta", if moe { 1e6 } else { 1e4 })?,
            head_dim,
            tied: json["tie_word_embeddings"] == true,
        })
    }
}

/// Takes the tensors out of the files, each under its new name, and checks that none is left.
fn tensors(
    c: &Config,
    weights: &Safetensors,
    path: &Path,
    notes: &mut Vec<String>,
) -> Result<Vec<SourceTensor>> {
    let mut take = Take {
        weights,
        path,
        taken: HashSet::new(),
    };
    let mut out = Vec::new();
    let (q, kv) = (c.n_head * c.d_head, c.n_kv * c.d_head);
    let embedding = ["model.embed_tokens.weight"];
    out.push(take.matrix("token_embd", &embedding, &[c.n_vocab, c.d_model])?);
    out.push(take.vector("output_norm", "model.norm.weight", c.d_model)?);
    let head = "lm_head.weight";
    match (c.tied, weights.tensors().contains_key(head)) {
        (false, _) => out.push(take.matrix("output", &[head], &[c.n_vocab, c.d_model])?),
        (true, true) => {
            notes.push(format!(
                "{head} is left out: tie_word_embeddings says that it is the embedding"
            ));
            take.taken.insert(head.to_string());
        }
        (true, false) => {}
    }
    for l in 0..c.n_layer {
        let hf = |rest: &str| format!("model.layers.{l}.{rest}.weight");
        let to = |rest: &str| format!("blk.{l}.{rest}");
        let norms = [
            ("attn_norm", "input_layernorm"),
            ("ffn_norm", "post_attention_layernorm"),
        ];
        for (name, from) in norms {
            out.push(take.vector(&to(name), &hf(from), c.d_model)?);
        }
        let attention = [
            ("attn_q", "self_attn.q_proj", [q, c.d_model], Some(c.n_head)),
            ("attn_k", "self_attn.k_proj", [kv, c.d_model], Some(c.n_kv)),
            ("attn_v", "self_attn.v_proj", [kv, c.d_model], None),
            ("attn_output", "self_attn.o_proj", [c.d_model, q], None),
        ];
        for (name, from, shape, heads) in attention {
            let mut t = take.matrix(&to(name), &[hf(from)], &shape)?;
            t.heads = heads;
            out.push(t);
        }
        if c.n_expert == 0 {
            let parts = [
                ("ffn_gate", "mlp.gate_proj", [c.d_ff, c.d_model]),
                ("ffn_up", "mlp.up_proj", [c.d_ff, c.d_model]),
                ("ffn_down", "mlp.down_proj", [c.d_model, c.d_ff]),
            ];
            for (name, from, shape) in parts {
                out.push(take.matrix(&to(name), &[hf(from)], &shape)?);
            }
            continue;
        }
        let router = [hf("block_sparse_moe.gate")];
        let mut t = take.matrix(&to("ffn_gate_inp"), &router, &[c.n_expert, c.d_model])?;
        t.kept = Format::F32 as u32;
        out.push(t);
        let parts = [
            ("ffn_gate_exps", "w1", [c.d_ff, c.d_model]),
            ("ffn_down_exps", "w2", [c.d_model, c.d_ff]),
            ("ffn_up_exps", "w3", [c.d_ff, c.d_model]),
        ];
        for (name, w, shape) in parts {
            let of = |e| hf(&format!("block_sparse_moe.experts.{e}.{w}"));
            let from: Vec<String> = (0..c.n_expert).map(of).collect();
            let mut t = take.matrix(&to(name), &from, &shape)?;
            t.shape.push(c.n_expert);
            out.push(t);
        }
    }
    take.rest()?;
    Ok(out)
}

/// Finds tensors, checks their shapes, and counts them.
struct Take<'a> {
    weights: &'a Safetensors,
    path: &'a Path,
    taken: HashSet<String>,
}

impl Take<'_> {
    fn entry(&mut self, name: &str, shape: &[u64]) -> Result<&Entry> {
        let entry = self.weights.tensors().get(name).ok_or_else(|| {
            let hint = "config.json asks for it; is a shard missing?";
            Error::missing(self.path, format!("tensor {name}"), hint)
        })?;
        if entry.shape != shape {
            return Err(Error::invalid(
                &self.weights.files()[entry.file],
                format!("the shape of tensor {name}"),
                format!("{shape:?} by config.json"),
                format!("{:?}", entry.shape),
            ));
        }
        self.taken.insert(name.to_string());
        Ok(entry)
    }

    /// A matrix, or several of one shape (outermost dimension first) that become one tensor.
    fn matrix(
        &mut self,
        to: &str,
        from: &[impl AsRef<str>],
        shape: &[u64; 2],
    ) -> Result<SourceTensor> {
        let mut pieces = Vec::with_capacity(from.len());
        for name in from {
            let entry = self.entry(name.as_ref(), shape)?;
            pieces.push(Piece {
                file: entry.file,
                offset: entry.offset,
                type_id: entry.format as u32,
            });
        }
        Ok(SourceTensor {
            name: format!("{to}.weight"),
            shape: vec![shape[1], shape[0]],
            kept: pieces[0].type_id,
            pieces,
            heads: None,
        })
    }

    fn vector(&mut self, to: &str, from: &str, n: u64) -> Result<SourceTensor> {
        let entry = self.entry(from, &[n])?;
        let pieces = vec![Piece {
            file: entry.file,
            offset: entry.offset,
            type_id: entry.format as u32,
        }];
        Ok(SourceTensor {
            name: format!("{to}.weight"),
            shape: vec![n],
            kept: Format::F32 as u32,
            pieces,
            heads: None,
        })
    }

    /// Refuses tensors that have no place: leaving weights out would make another model.
    fn rest(&self) -> Result<()> {
        let ignored = |name: &str| {
            name.ends_with(".rotary_emb.inv_freq") || name.ends_with(".attention.masked_bias")
        };
        let mut names = self.weights.tensors().keys();
        let stray = |name: &&String| !ignored(name) && !self.taken.contains(name.as_str());
        match names.find(stray) {
            None => Ok(()),
            Some(stray) => Err(Error::unsupported(
                self.path,
                "a tensor that Mixtral has not",
                format!("the {} that config.json asks for", self.taken.len()),
                stray,
            )),
        }
    }
}
