//! The metadata of a GGUF from the JSON files of a Hugging Face folder.

use std::path::Path;

use octet::chat::tokenizer::{Piece, PieceKind, Vocab};
use octet::error::{Error, Result};
use octet::gguf::Writer;
use octet::gguf::safetensors::read_json;
use serde_json::Value;

use super::{Config, MAX_JSON};
use crate::source::SourceTensor;

pub(super) fn metadata(
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
    let mut pieces = pieces(c, folder, notes)?;
    change_pieces(&mut pieces, &read("added_tokens.json")?, &settings);
    w.put("tokenizer.ggml.model", "llama");
    w.put("tokenizer.ggml.pre", "default");
    let texts: Vec<&str> = pieces.iter().map(|p| p.text.as_str()).collect();
    w.put("tokenizer.ggml.tokens", texts);
    let scores: Vec<f32> = pieces.iter().map(|p| p.score).collect();
    w.put("tokenizer.ggml.scores", scores);
    let kinds: Vec<i32> = pieces.iter().map(|p| p.kind as i32).collect();
    w.put("tokenizer.ggml.token_type", kinds);
    special_tokens(w, c, config, &settings, &tokenizer);
    let template = match &settings["chat_template"] {
        Value::Null => chat_template(folder, read)?,
        own => own.clone(),
    };
    templates(w, &template, notes);
    Ok(())
}

/// The pieces of the vocabulary, as many as the model has rows for.
fn pieces(c: &Config, folder: &Path, notes: &mut Vec<String>) -> Result<Vec<Piece>> {
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
    Ok(pieces)
}

/// What `added_tokens.json` and `tokenizer_config.json` say of pieces goes before what the vocabulary says.
fn change_pieces(pieces: &mut [Piece], added: &Value, settings: &Value) {
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
}

/// The special tokens: by their text in tokenizer.json, or else by their number in config.json.
fn special_tokens(w: &mut Writer, c: &Config, config: &Value, settings: &Value, tokenizer: &Value) {
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
}

/// One template for chatting, or several, of which one is for that and the others for tools and the like.
fn templates(w: &mut Writer, template: &Value, notes: &mut Vec<String>) {
    match template {
        Value::String(text) => {
            w.put("tokenizer.chat_template", text.as_str());
        }
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
