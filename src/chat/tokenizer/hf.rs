//! Hugging Face's `tokenizer.json` and `tokenizer_config.json`.

use super::MAX_PIECES;
use super::vocab::{Piece, PieceKind, Vocab, parse_byte, read_bounded};
use crate::bounded;
use crate::disk;
use crate::error::{Error, Result};
use serde_json::{Map, Value};
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
        |what: &str, expected: &str| Error::invalid(path, what, expected, "something else");
    let texts = model["vocab"]
        .as_object()
        .ok_or_else(|| invalid("model.vocab", "an object of pieces and ids"))?;
    let merges = model["merges"]
        .as_array()
        .ok_or_else(|| invalid("model.merges", "a list"))?;
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
    let added = json["added_tokens"].as_array();
    let added = added.map(Vec::as_slice).unwrap_or_default();
    let unk = model["unk_token"].as_str();
    let mut pieces = pieces(texts, added, unk, path)?;
    score(&mut pieces, merges, path)?;
    Ok(Vocab {
        bos: id_of(&pieces, "<s>"),
        eos: id_of(&pieces, "</s>"),
        unk: unk.and_then(|unk| id_of(&pieces, unk)),
        add_bos: true,
        add_space_prefix: space_prefix,
        pieces,
        ..Vocab::default()
    })
}

/// The pieces that `model.vocab` and `added_tokens` name, without scores.
fn pieces(
    texts: &Map<String, Value>,
    added: &[Value],
    unk: Option<&str>,
    path: &Path,
) -> Result<Vec<Piece>> {
    let count = texts.len() + added.len();
    // Ids may leave gaps, but not wide ones: the list must stay about as large as the file.
    let limit = count.saturating_mul(2).saturating_add(1024).min(MAX_PIECES);
    let mut pieces: Vec<Piece> = Vec::with_capacity(count.min(limit));
    let mut set = |id: Option<u64>, text: &str, kind: PieceKind| -> Result<()> {
        let id = id.and_then(|id| usize::try_from(id).ok());
        let id = id.filter(|&id| id < limit).ok_or_else(|| {
            let expected = format!("a number below {limit}");
            Error::invalid(path, format!("the id of {text:?}"), expected, "another")
        })?;
        let piece = |text: &str, kind| Piece {
            text: text.to_string(),
            score: 0.0,
            kind,
        };
        if id >= pieces.len() {
            pieces.resize(id + 1, piece("", PieceKind::Unused));
        }
        pieces[id] = piece(text, kind);
        Ok(())
    };
    for (text, id) in texts {
        let kind = match parse_byte(text) {
            Some(_) => PieceKind::Byte,
            None => PieceKind::Normal,
        };
        set(id.as_u64(), text, kind)?;
    }
    for token in added {
        let text = token["content"].as_str().unwrap_or_default();
        let kind = match token["special"].as_bool() {
            _ if unk == Some(text) => PieceKind::Unknown,
            Some(true) => PieceKind::Control,
            _ => PieceKind::UserDefined,
        };
        set(token["id"].as_u64(), text, kind)?;
    }
    Ok(pieces)
}

/// Gives each piece minus the rank of the first merge that makes it. What no merge makes is not in use.
fn score(pieces: &mut [Piece], merges: &[Value], path: &Path) -> Result<()> {
    let mut rank: HashMap<String, usize> = HashMap::with_capacity(merges.len());
    for (i, merge) in merges.iter().enumerate() {
        let pair = match (merge.as_str(), merge.as_array().map(Vec::as_slice)) {
            (Some(pair), _) => pair.split_once(' '),
            (_, Some([left, right])) => left.as_str().zip(right.as_str()),
            _ => None,
        };
        let (left, right) = pair.ok_or_else(|| {
            Error::invalid(path, format!("merge {i}"), "two pieces", "something else")
        })?;
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
    Ok(())
}

/// The first piece with this text.
fn id_of(pieces: &[Piece], text: &str) -> Option<u32> {
    let at = pieces.iter().position(|p| p.text == text)?;
    Some(at as u32)
}

/// `tokenizer_config.json` and `chat_template.jinja`, where the folder has them.
pub(super) fn apply_config(vocab: &mut Vocab, folder: &Path) -> Result<()> {
    let jinja = folder.join("chat_template.jinja");
    if jinja.is_file() {
        vocab.chat_template = Some(disk::utf8(&jinja, read_bounded(&jinja)?)?);
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
        id_of(&vocab.pieces, token.as_str().or(token["content"].as_str())?)
    };
    let (bos, eos) = (id("bos_token"), id("eos_token"));
    vocab.bos = bos.or(vocab.bos);
    vocab.eos = eos.or(vocab.eos);
    Ok(())
}
