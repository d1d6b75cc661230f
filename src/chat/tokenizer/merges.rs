//! The merges that the `tokenizers` crate wants, from the scores that a vocabulary has.

use super::vocab::{PieceKind, Vocab, parse_byte};
use tokenizers::models::bpe::{BPE, Vocab as BpeVocab};

/// The crate's BPE model with merges rebuilt from the scores.
pub(super) fn build_bpe(vocab: &Vocab, byte_fallback: bool) -> tokenizers::Result<BPE> {
    // The crate's own map type hashes several times faster than std's, and half a million cuts are looked up here.
    let mut map = BpeVocab::with_capacity(vocab.pieces.len() + 257);
    let mut normal: Vec<u32> = Vec::with_capacity(vocab.pieces.len());
    for (id, piece) in (0u32..).zip(&vocab.pieces) {
        let usable = piece.kind == PieceKind::Normal && !piece.text.is_empty();
        if usable && !map.contains_key(&piece.text) {
            map.insert(piece.text.clone(), id);
            normal.push(id);
        }
    }
    // (id of the union, bytes of the left part)
    let mut merges: Vec<(u32, u32)> = Vec::with_capacity(2 * normal.len());
    for id in normal {
        let text = &vocab.pieces[id as usize].text;
        for (cut, _) in text.char_indices().skip(1) {
            if map.contains_key(&text[..cut]) && map.contains_key(&text[cut..]) {
                merges.push((id, cut as u32));
            }
        }
    }
    let score = |id: u32| vocab.pieces[id as usize].score;
    merges.sort_unstable_by(|a, b| {
        // The id last: a full order, the same everywhere.
        score(b.0)
            .total_cmp(&score(a.0))
            .then(b.1.cmp(&a.1))
            .then(a.0.cmp(&b.0))
    });
    let merges: Vec<(String, String)> = merges
        .into_iter()
        .map(|(id, cut)| {
            let (left, right) = vocab.pieces[id as usize].text.split_at(cut as usize);
            (left.to_string(), right.to_string())
        })
        .collect();
    if byte_fallback {
        for (id, piece) in vocab.pieces.iter().enumerate().rev() {
            if let Some(byte) = (piece.kind == PieceKind::Byte)
                .then(|| parse_byte(&piece.text))
                .flatten()
            {
                map.insert(format!("<{byte:#04X}>"), id as u32);
            }
        }
    }
    // The cache is for text that was split into words; ours is not.
    let mut builder = BPE::builder()
        .cache_capacity(0)
        .byte_fallback(byte_fallback);
    if let Some(id) = vocab.unk {
        // Text reaches the model's vocabulary one character at a time, so a key of two never matches it.
        let key = "\0\0unknown";
        map.insert(key.to_string(), id);
        builder = builder.unk_token(key.to_string()).fuse_unk(true);
    }
    builder.vocab_and_merges(map, merges).build()
}
