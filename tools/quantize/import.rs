//! From a Hugging Face folder: its names and row order become GGUF's, its JSON files the metadata.
//!
//! Names, order of keys and the treatment of special tokens are those of the reference's converter
//! (llama.cpp, `conversion/`), so that the result is what people are used to.

use std::collections::HashSet;
use std::path::Path;

use octet::chat::tokenizer::{Piece, PieceKind, Vocab};
use octet::error::{Error, Result};
use octet::gguf::Writer;
use octet::gguf::safetensors::{Entry, Safetensors, read_json};
use octet::quant::Format;
use serde_json::Value;

use crate::source::{Piece as Part, Source, SourceFile, SourceTensor};

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
            pieces.push(Part {
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
        let pieces = vec![Part {
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

fn metadata(
    c: &Config,
    json: &Value,
    tensors: &[SourceTensor],
    folder: &Path,
    notes: &mut Vec<String>,
) -> Result<Writer> {
    let read = |name: &str| -> Result<Value> {
        let path = folder.join(name);
        match path.is_file() {
            true => read_json(&path, MAX_JSON),
            false => Ok(Value::Null),
        }
    };
    let mut w = Writer::new();
    w.put("general.architecture", "llama");
    w.put("general.type", "model");
    let generation = read("generation_config.json")?;
    for (from, key) in [
        ("top_k", "top_k"),
        ("top_p", "top_p"),
        ("min_p", "min_p"),
        ("temperature", "temp"),
    ] {
        let key = format!("general.sampling.{key}");
        match &generation[from] {
            Value::Number(n) if from == "top_k" => {
                if let Some(n) = n.as_i64().and_then(|n| i32::try_from(n).ok()) {
                    w.put(&key, n);
                }
            }
            Value::Number(n) => {
                if let Some(x) = n.as_f64() {
                    w.put(&key, x as f32);
                }
            }
            _ => {}
        }
    }
    let name = std::path::absolute(folder).unwrap_or_else(|_| folder.to_path_buf());
    let name = name.file_name().and_then(|n| n.to_str()).unwrap_or("model");
    w.put("general.name", title(name));
    w.put("general.size_label", size_label(c, tensors));
    let number = |n: u64| u32::try_from(n).unwrap_or(u32::MAX);
    for (key, n) in [
        ("block_count", c.n_layer),
        ("context_length", c.n_ctx),
        ("embedding_length", c.d_model),
        ("feed_forward_length", c.d_ff),
        ("attention.head_count", c.n_head),
        ("attention.head_count_kv", c.n_kv),
    ] {
        w.put(&format!("llama.{key}"), number(n));
    }
    w.put("llama.rope.freq_base", c.rope_base as f32);
    w.put("llama.attention.layer_norm_rms_epsilon", c.rms_eps as f32);
    if c.n_expert > 0 {
        w.put("llama.expert_count", number(c.n_expert));
        w.put("llama.expert_used_count", number(c.n_used));
    }
    if let Some(n) = c.head_dim {
        w.put("llama.attention.key_length", number(n));
        w.put("llama.attention.value_length", number(n));
    }
    // Their values depend on the recipe; here is where a float file has them.
    w.put("general.file_type", 0u32);
    w.put("llama.vocab_size", number(c.n_vocab));
    w.put("llama.rope.dimension_count", number(c.d_head));
    w.put("general.quantization_version", 0u32);
    vocabulary(&mut w, c, json, folder, &read, notes)?;
    Ok(w)
}

/// `tokenizer.*`.
fn vocabulary(
    w: &mut Writer,
    c: &Config,
    config: &Value,
    folder: &Path,
    read: &dyn Fn(&str) -> Result<Value>,
    notes: &mut Vec<String>,
) -> Result<()> {
    let settings = read("tokenizer_config.json")?;
    let tokenizer = read("tokenizer.json")?;
    let vocab = Vocab::from_path(folder)?;
    let n = c.n_vocab as usize;
    if vocab.pieces.len() > n {
        notes.push(format!(
            "{} pieces of the vocabulary are left out: config.json has a vocab_size of {n}",
            vocab.pieces.len() - n
        ));
    }
    // A model may have rows for tokens that its vocabulary has not.
    let most = vocab.pieces.len() + (1 << 20);
    if n > most {
        let path = folder.join("config.json");
        let expected = format!("at most {most} with this vocabulary");
        return Err(Error::invalid(path, "vocab_size", expected, n));
    }
    let mut pieces: Vec<Piece> = vocab.pieces.into_iter().take(n).collect();
    for id in pieces.len()..n {
        pieces.push(Piece {
            text: format!("[PAD{id}]"),
            score: -10_000.0,
            kind: PieceKind::Unused,
        });
    }
    let added = read("added_tokens.json")?;
    for (text, id) in added.as_object().into_iter().flatten() {
        let id = id.as_u64().and_then(|id| usize::try_from(id).ok());
        if let Some(piece) = id.and_then(|id| pieces.get_mut(id)) {
            *piece = Piece {
                text: text.clone(),
                score: -1000.0,
                kind: PieceKind::UserDefined,
            };
        }
    }
    let decoder = settings["added_tokens_decoder"].as_object();
    for (id, token) in decoder.into_iter().flatten() {
        let (Ok(id), Some(text)) = (id.parse::<usize>(), token["content"].as_str()) else {
            continue;
        };
        let Some(piece) = pieces.get_mut(id) else {
            continue;
        };
        let special = token["special"] == true || looks_special(text);
        *piece = Piece {
            text: match special {
                true => text.to_string(),
                // User-defined pieces are matched in text, which has spaces.
                false => text.replace('\u{2581}', " "),
            },
            score: -1000.0,
            kind: match special {
                true => PieceKind::Control,
                false => PieceKind::UserDefined,
            },
        };
    }
    w.put("tokenizer.ggml.model", "llama");
    w.put("tokenizer.ggml.pre", "default");
    let texts: Vec<&str> = pieces.iter().map(|p| p.text.as_str()).collect();
    w.put("tokenizer.ggml.tokens", texts);
    let scores: Vec<f32> = pieces.iter().map(|p| p.score).collect();
    w.put("tokenizer.ggml.scores", scores);
    let kinds: Vec<i32> = pieces.iter().map(|p| p.kind as i32).collect();
    w.put("tokenizer.ggml.token_type", kinds);

    // The special tokens: by their text in tokenizer.json, or else by their number in config.json.
    let listed = tokenizer["added_tokens"].as_array();
    let by_text = |text: &str| {
        let mut listed = listed.into_iter().flatten();
        listed.find(|t| t["content"] == text)?["id"].as_u64()
    };
    for (name, key) in [
        ("bos", "bos"),
        ("eos", "eos"),
        ("unk", "unknown"),
        ("sep", "seperator"),
        ("pad", "padding"),
    ] {
        let text = &settings[format!("{name}_token")];
        let text = text.as_str().or(text["content"].as_str());
        let in_config = config[format!("{name}_token_id")].as_u64();
        let id = text.and_then(by_text).or(in_config);
        if let Some(id) = id.filter(|id| *id < c.n_vocab) {
            w.put(&format!("tokenizer.ggml.{key}_token_id"), id as u32);
        }
    }
    for name in ["bos", "eos"] {
        if let Some(add) = settings[format!("add_{name}_token")].as_bool() {
            w.put(&format!("tokenizer.ggml.add_{name}_token"), add);
        }
    }
    let template = match &settings["chat_template"] {
        Value::Null => chat_template(folder, read)?,
        own => own.clone(),
    };
    match &template {
        Value::String(text) => {
            w.put("tokenizer.chat_template", text.as_str());
        }
        // Several, of which one is for chatting and the others for tools and the like.
        Value::Array(several) => {
            let named: Vec<(&str, &str)> = several
                .iter()
                .filter_map(|t| Some((t["name"].as_str()?, t["template"].as_str()?)))
                .collect();
            let others: Vec<&str> = named
                .iter()
                .map(|t| t.0)
                .filter(|n| *n != "default")
                .collect();
            for (name, text) in &named {
                match *name {
                    "default" => w.put("tokenizer.chat_template", *text),
                    name => w.put(&format!("tokenizer.chat_template.{name}"), *text),
                };
            }
            if !others.is_empty() {
                w.put("tokenizer.chat_templates", others);
            }
        }
        _ => notes.push("the folder has no chat template".to_string()),
    }
    Ok(())
}

/// The template of newer folders, in a file of its own.
fn chat_template(folder: &Path, read: &dyn Fn(&str) -> Result<Value>) -> Result<Value> {
    let path = folder.join("chat_template.jinja");
    if path.is_file() {
        let size = std::fs::metadata(&path)
            .map_err(Error::io(&path, "read"))?
            .len();
        if size > MAX_JSON {
            let expected = format!("at most {MAX_JSON} bytes");
            return Err(Error::invalid(&path, "the template", expected, size));
        }
        let text = std::fs::read_to_string(&path).map_err(Error::io(&path, "read"))?;
        return Ok(Value::String(text));
    }
    Ok(read("chat_template.json")?["chat_template"].clone())
}

/// Whether a token that is not marked as special is one after all, by the reference's rules.
fn looks_special(text: &str) -> bool {
    let between = |open: &str, close: &str| text.starts_with(open) && text.ends_with(close);
    matches!(text, "<pad>" | "<mask>" | "<2mass>" | "[@BOS@]")
        || between("<|", "|>")
        || between("<｜", "｜>")
        || (between("<unused", ">"))
}

/// A folder's name as a title: `demo-model` is "Demo Model".
fn title(name: &str) -> String {
    let word = |w: &str| {
        let version = w.strip_prefix('v').unwrap_or(w);
        let numeric = version.starts_with(|c: char| c.is_ascii_digit());
        let lower = w.chars().any(char::is_lowercase) && !w.chars().any(char::is_uppercase);
        let mut chars = w.chars();
        match chars.next() {
            Some(first) if lower && !numeric => first.to_uppercase().chain(chars).collect(),
            _ => w.to_string(),
        }
    };
    let words: Vec<String> = name
        .trim()
        .replace('-', " ")
        .split_whitespace()
        .map(word)
        .collect();
    words.join(" ")
}

/// `8x7B`: the experts, and the weights of the model with only one of them.
fn size_label(c: &Config, tensors: &[SourceTensor]) -> String {
    let of = |t: &SourceTensor| match t.name.contains("_exps.") {
        true => t.elements() / c.n_expert.max(1),
        false => t.elements(),
    };
    let n = tensors.iter().map(of).sum::<u64>() as f64;
    let (size, unit) = match n {
        n if n > 1e12 => (n * 1e-12, "T"),
        n if n > 1e9 => (n * 1e-9, "B"),
        n if n > 1e6 => (n * 1e-6, "M"),
        n => (n * 1e-3, "K"),
    };
    // At least two digits.
    let digits = format!("{}", size.round_ties_even());
    let digits = 2usize.saturating_sub(digits.trim_start_matches('0').len());
    let size = format!("{size:.digits$}{unit}");
    match c.n_expert {
        0 => size,
        n => format!("{n}x{size}"),
    }
}
