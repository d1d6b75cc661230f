//! Hugging Face's `tokenizer.json` and `tokenizer_config.json`.

use super::MAX_PIECES;
use super::vocab::{Piece, PieceKind, Vocab, parse_byte, read_bounded};
use crate::bounded;
use crate::error::{Error, Result};
use serde_json::Value;
use std::collections::HashMap;
use std::path::Path;

fn parse(bytes: &[u8], path: &Path) -> Result<Value> {
    bounded::json(bytes).map_err(|e| Error::invalid(path, "the file", "JSON", e))
}

/// Whether any object inside `value` (a normalizer, perhaps a sequence of them) has this type; `Some(object)`.
fn find<'a>(value: &'a Value, kind: &str) -> Option<&'a Value> {
    if value["type"] == kind {
        return Some(value);
    }
    ["normalizers", "pretokenizers"]
        .iter()
        .filter_map(|key| value[key].as_array())
        .flatten()
        .find(|v| v["type"] == kind)
}

pub(super) fn read(bytes: &[u8], path: &Path) -> Result<Vocab> {
    let json = parse(bytes, path)?;
    let model = &json["model"];
    let invalid =
        |what: &str, expected: &str, found: &str| Error::invalid(path, what, expected, found);
    let texts = model["vocab"].as_object().ok_or_else(|| {
        invalid(
            "model.vocab",
            "an object of pieces and ids",
            "something else",
        )
    })?;
    let merges = model["merges"]
        .as_array()
        .ok_or_else(|| invalid("model.merges", "a list", "something else"))?;
    if model["byte_fallback"] != true || find(&json["pre_tokenizer"], "ByteLevel").is_some() {
        return Err(Error::unsupported(
            path,
            "the tokenizer",
            "a SentencePiece-like BPE with byte_fallback",
            "another kind",
        ));
    }
    let metaspace = find(&json["pre_tokenizer"], "Metaspace");
    let space_prefix = find(&json["normalizer"], "Prepend").is_some()
        || metaspace.is_some_and(|m| match m["prepend_scheme"].as_str() {
            Some(scheme) => scheme != "never",
            None => m["add_prefix_space"] != false,
        });
    let added = json["added_tokens"]
        .as_array()
        .map(Vec::as_slice)
        .unwrap_or(&[]);
    let count = texts.len() + added.len();
    // Ids may leave gaps, but not wide ones: the list must stay about as large as the file.
    let limit = count.saturating_mul(2).saturating_add(1024).min(MAX_PIECES);
    let mut pieces: Vec<Piece> = Vec::with_capacity(count.min(limit));
    let mut set = |id: Option<u64>, text: &str, kind: Option<PieceKind>| -> Result<()> {
        let id = id
            .and_then(|id| usize::try_from(id).ok())
            .filter(|&id| id < limit)
            .ok_or_else(|| {
                invalid(
                    &format!("the id of {text:?}"),
                    &format!("a number below {limit}"),
                    "another",
                )
            })?;
        if id >= pieces.len() {
            let gap = Piece {
                text: String::new(),
                score: 0.0,
                kind: PieceKind::Unused,
            };
            pieces.resize(id + 1, gap);
        }
        let kind = kind.unwrap_or(match parse_byte(text) {
            Some(_) => PieceKind::Byte,
            None => PieceKind::Normal,
        });
        pieces[id] = Piece {
            text: text.to_string(),
            score: 0.0,
            kind,
        };
        Ok(())
    };
    for (text, id) in texts {
        set(id.as_u64(), text, None)?;
    }
    let unk = model["unk_token"].as_str();
    for token in added {
        let text = token["content"].as_str().unwrap_or_default();
        let kind = match token["special"].as_bool() {
            _ if unk == Some(text) => PieceKind::Unknown,
            Some(true) => PieceKind::Control,
            _ => PieceKind::UserDefined,
        };
        set(token["id"].as_u64(), text, Some(kind))?;
    }
    let mut rank: HashMap<String, usize> = HashMap::with_capacity(merges.len());
    for (i, merge) in merges.iter().enumerate() {
        let pair = match (merge.as_str(), merge.as_array().map(Vec::as_slice)) {
            (Some(pair), _) => pair.split_once(' '),
            (_, Some([left, right])) => left.as_str().zip(right.as_str()),
            _ => None,
        };
        let (left, right) =
            pair.ok_or_else(|| invalid(&format!("merge {i}"), "two pieces", "something else"))?;
        rank.entry(format!("{left}{right}")).or_insert(i);
    }
    for piece in pieces.iter_mut().filter(|p| p.kind == PieceKind::Normal) {
        match rank.get(&piece.text) {
            Some(&rank) => piece.score = -(rank as f32),
            // More than one character and no merge: nothing can make it, as text it is its parts.
            None if piece.text.chars().nth(1).is_some() => piece.kind = PieceKind::Unused,
            None => {}
        }
    }
    let id_of = |text: &str| {
        pieces
            .iter()
            .position(|p| p.text == text)
            .map(|id| id as u32)
    };
    Ok(Vocab {
        bos: id_of("<s>"),
        eos: id_of("</s>"),
        unk: unk.and_then(id_of),
        add_bos: true,
        add_space_prefix: space_prefix,
        pieces,
        ..Vocab::default()
    })
}

/// `tokenizer_config.json` and `chat_template.jinja`, where the folder has them.
pub(super) fn apply_config(vocab: &mut Vocab, folder: &Path) -> Result<()> {
    let jinja = folder.join("chat_template.jinja");
    if jinja.is_file() {
        let text = String::from_utf8(read_bounded(&jinja)?)
            .map_err(|e| Error::invalid(&jinja, "the chat template", "UTF-8", e))?;
        vocab.chat_template = Some(text);
    }
    let path = folder.join("tokenizer_config.json");
    if !path.is_file() {
        return Ok(());
    }
    let config = parse(&read_bounded(&path)?, &path)?;
    if let Some(add) = config["add_bos_token"].as_bool() {
        vocab.add_bos = add;
    }
    if vocab.chat_template.is_none() {
        // Either one template or a list of named ones.
        let named = config["chat_template"].as_array().into_iter().flatten();
        let default = named
            .clone()
            .find(|t| t["name"] == "default")
            .or(named.clone().next());
        let template = config["chat_template"].as_str();
        vocab.chat_template = template
            .or(default.and_then(|t| t["template"].as_str()))
            .map(String::from);
    }
    // A token is written as its text or as an object around it.
    let id = |key: &str| {
        let token = &config[key];
        let text = token.as_str().or(token["content"].as_str())?;
        vocab
            .pieces
            .iter()
            .position(|p| p.text == text)
            .map(|id| id as u32)
    };
    let (bos, eos) = (id("bos_token"), id("eos_token"));
    vocab.bos = bos.or(vocab.bos);
    vocab.eos = eos.or(vocab.eos);
    Ok(())
}
