//! Text to token ids and back, as SentencePiece's BPE does it.
//!
//! The rules (SentencePiece, "BPE" models with byte fallback, as Llama and Mistral use them):
//!
//! 1. every space becomes `▁` (U+2581), and one `▁` is put in front of the whole text (the *dummy
//!    prefix*);
//! 2. user-defined pieces are cut out first, longest match, left to right; they never merge;
//! 3. what lies between is split into characters, and the two neighbours whose union has the best
//!    score are joined until no union is in the vocabulary; of equal scores the leftmost wins;
//! 4. a character that is no piece is written as its UTF-8 bytes (`<0x0A>`).
//!
//! Control pieces (`<s>`, `[INST]`) are never read from text: only the prompt templates write them.
//!
//! **Who does the merging.** Step 3 is the `tokenizers` crate's BPE model. It wants *merges* (which two
//! pieces may join, by rank) where a SentencePiece vocabulary has scores, so the merges are rebuilt: for
//! every NORMAL piece every cut into two NORMAL pieces, ordered by the score of the union and then by
//! the longer left part. Only the model is used, without the crate's normalizers and added tokens:
//! those prepend the dummy prefix once per segment between user-defined pieces, SentencePiece once per text.
//! The ids were SentencePiece's in all of 60,000 random comparisons with Mixtral's two vocabularies (whose
//! runs of spaces share one score), and the oracle's in all small random vocabularies whose scores differ, as a
//! trained BPE's do. In made-up vocabularies with equal scores, ties may be resolved differently.
//! Construction takes 60 to 80 ms for 32k pieces on a busy 2-core machine (`build_time` in the tests prints it).
//!
//! A plain SentencePiece BPE in `tokenizer/tests.rs` is the oracle.

mod gguf;
mod hf;
mod matcher;
mod merges;
mod spm;
mod surface;
mod vocab;

#[cfg(test)]
mod tests;

pub(super) use matcher::Matcher;
pub use surface::Stream;
pub use vocab::{Piece, PieceKind, Vocab};

use std::collections::{HashMap, HashSet};
use std::fmt::Display;
use std::path::{Path, PathBuf};

use tokenizers::Model;
use tokenizers::models::bpe::{BPE, Vocab as BpeVocab};

use crate::error::{Error, Result};
use surface::Surface;

/// What SentencePiece writes for a space.
pub(super) const SPACE: &str = "\u{2581}";
/// Three times Mixtral's pieces. A piece may be two bytes of a file and takes some 600 in memory.
const MAX_PIECES: usize = 100_000;
/// The longest piece in bytes. Published vocabularies stay under 200; rebuilding merges is quadratic in it.
const MAX_PIECE_BYTES: usize = 512;

/// Encodes and decodes with one vocabulary.
pub struct Tokenizer {
    vocab: Vocab,
    source: PathBuf,
    bpe: BPE,
    /// Piece text to id, for every kind; of equal texts the lowest id.
    ids: BpeVocab,
    /// The byte of a Byte piece, by id.
    bytes: HashMap<u32, u8>,
    user: Matcher,
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer")
            .field("source", &self.source)
            .field("pieces", &self.vocab.pieces.len())
            .finish_non_exhaustive()
    }
}

/// Sizes, scores and special ids that can be right.
fn check(vocab: &Vocab, source: &Path) -> Result<()> {
    let n = vocab.pieces.len();
    if n == 0 || n > MAX_PIECES {
        let expected = format!("1 to {MAX_PIECES} pieces");
        return Err(wrong(source, "its size", expected, n));
    }
    let specials = [("bos", vocab.bos), ("eos", vocab.eos), ("unk", vocab.unk)];
    let stops = vocab.stop.iter().map(|&id| ("stop", Some(id)));
    for (name, id) in specials.into_iter().chain(stops) {
        if let Some(id) = id.filter(|&id| id as usize >= n) {
            let what = format!("the {name} id");
            return Err(wrong(source, what, format!("less than {n}"), id));
        }
    }
    for (id, piece) in vocab.pieces.iter().enumerate() {
        let bytes = piece.text.len();
        if bytes > MAX_PIECE_BYTES {
            let expected = format!("at most {MAX_PIECE_BYTES} bytes");
            let found = format!("{bytes} bytes");
            return Err(wrong(source, format!("piece {id}"), expected, found));
        }
        if piece.score.is_nan() {
            let what = format!("the score of piece {id}");
            return Err(wrong(source, what, "a number", "NaN"));
        }
    }
    Ok(())
}

fn wrong(source: &Path, what: impl Display, expected: impl Display, found: impl Display) -> Error {
    Error::invalid(source, format!("the vocabulary: {what}"), expected, found)
}

impl Tokenizer {
    /// A tokenizer from a vocabulary; `source` names the file in errors.
    ///
    /// Of pieces with the same text the lowest id is used for encoding; empty pieces are never produced.
    /// [`Error::Invalid`]: no pieces or absurdly many, a piece of more than 512 bytes, a score that is not a number, a Byte
    /// piece that is not `<0xNN>`, a special id outside the vocabulary, or a vocabulary that has neither
    /// an unknown piece nor all 256 bytes (so that some text could not be encoded).
    pub fn new(mut vocab: Vocab, source: &Path) -> Result<Tokenizer> {
        check(&vocab, source)?;
        let mut ids = BpeVocab::with_capacity(vocab.pieces.len());
        let mut bytes = HashMap::new();
        for (id, piece) in (0u32..).zip(&vocab.pieces) {
            if piece.kind == PieceKind::Byte {
                let byte = vocab::parse_byte(&piece.text).ok_or_else(|| {
                    let found = format!("{:?}", piece.text);
                    wrong(source, format!("byte piece {id}"), "<0xNN>", found)
                })?;
                bytes.insert(id, byte);
            }
            if !piece.text.is_empty() {
                ids.entry(piece.text.clone()).or_insert(id);
            }
        }
        let mut kinds = vocab.pieces.iter().map(|p| p.kind);
        let unknown = kinds.position(|kind| kind == PieceKind::Unknown);
        vocab.unk = vocab.unk.or(unknown.map(|id| id as u32));
        let all_bytes = bytes.values().collect::<HashSet<_>>().len() == 256;
        if vocab.unk.is_none() && !all_bytes {
            let expected = "an unknown piece or all 256 bytes";
            return Err(wrong(source, "its coverage", expected, "neither"));
        }
        let bpe = merges::build_bpe(&vocab, all_bytes)
            .map_err(|e| wrong(source, "its merges", "pieces that the BPE model takes", e))?;
        Ok(Tokenizer {
            user: Matcher::new(&vocab.pieces),
            vocab,
            source: source.to_path_buf(),
            bpe,
            ids,
            bytes,
        })
    }

    /// [`Vocab::from_path`], then [`Tokenizer::new`].
    pub fn from_path(path: &Path) -> Result<Tokenizer> {
        Tokenizer::new(Vocab::from_path(path)?, path)
    }

    /// The ids of `text`, without BOS, with the dummy prefix if the vocabulary asks for it: what
    /// SentencePiece's `encode` gives. Time is about linear in the text's length.
    pub fn encode(&self, text: &str) -> Vec<u32> {
        self.encode_with(text, self.vocab.add_space_prefix, true)
    }

    /// The ids of a prompt that is text alone: BOS, if the vocabulary begins so, and the text.
    pub fn raw_prompt(&self, text: &str) -> Vec<u32> {
        let bos = self.bos().filter(|_| self.add_bos());
        bos.into_iter().chain(self.encode(text)).collect()
    }

    /// Encoding with each choice spelled out: `space_prefix` puts the dummy space in front (of text that is
    /// not empty), `user_defined` cuts user-defined pieces out (otherwise they are ordinary text).
    pub fn encode_with(&self, text: &str, space_prefix: bool, user_defined: bool) -> Vec<u32> {
        if text.is_empty() {
            return Vec::new();
        }
        let mut normal = String::with_capacity(text.len() + text.len() / 2 + SPACE.len());
        if space_prefix {
            normal.push_str(SPACE);
        }
        for c in text.chars() {
            if c == ' ' {
                normal.push_str(SPACE)
            } else {
                normal.push(c)
            }
        }
        let mut out = Vec::with_capacity(normal.len() / 3 + 1);
        let mut from = 0;
        let mut at = 0;
        while user_defined && !self.user.is_empty() && at < normal.len() {
            match self.user.longest_at(&normal, at) {
                Some((id, len)) => {
                    self.encode_plain(&normal[from..at], &mut out);
                    out.push(id);
                    at += len;
                    from = at;
                }
                // A byte inside a character is never the start of a piece, so bytes may be walked.
                None => at += 1,
            }
        }
        self.encode_plain(&normal[from..], &mut out);
        out
    }

    /// Merges one stretch of normalized text that holds no user-defined piece.
    fn encode_plain(&self, normal: &str, out: &mut Vec<u32>) {
        if normal.is_empty() {
            return;
        }
        // The model can fail only for an unknown piece that it does not hold; `merges::build_bpe` gives it one.
        let tokens = self.bpe.tokenize(normal).unwrap_or_default();
        out.extend(tokens.iter().map(|token| token.id));
    }

    /// The bytes that `ids` print, as SentencePiece's `decode` gives them: the dummy space of the first piece is
    /// removed, control pieces print nothing, ids outside the vocabulary are skipped. Bytes need not be UTF-8.
    pub fn decode(&self, ids: &[u32]) -> Vec<u8> {
        self.decode_with(ids, false)
    }

    /// [`Tokenizer::decode`], with control pieces printed by name if `show_control`.
    pub fn decode_with(&self, ids: &[u32], show_control: bool) -> Vec<u8> {
        let mut surface = Surface::new(self, show_control);
        let mut out = Vec::new();
        for &id in ids {
            surface.push(id, &mut out);
        }
        out
    }

    /// The bytes that one id prints inside a text; none for a control piece.
    pub fn piece_bytes(&self, id: u32) -> Vec<u8> {
        let mut out = Vec::new();
        Surface::continuing(self).push(id, &mut out);
        out
    }

    /// A stream that turns the ids of an answer into text as they come; the answer is a text of its own (its dummy
    /// space is removed).
    pub fn stream(&self) -> Stream<'_> {
        Stream::new(Surface::new(self, false))
    }

    /// A stream for ids that continue a text already printed: the first space is kept.
    pub fn stream_continuing(&self) -> Stream<'_> {
        Stream::new(Surface::continuing(self))
    }

    /// A stream like [`Tokenizer::stream`] that prints control pieces by name.
    pub fn stream_showing_control(&self) -> Stream<'_> {
        Stream::new(Surface::new(self, true))
    }

    /// Begin of sequence.
    pub fn bos(&self) -> Option<u32> {
        self.vocab.bos
    }

    /// End of sequence.
    pub fn eos(&self) -> Option<u32> {
        self.vocab.eos
    }

    /// The unknown piece.
    pub fn unk(&self) -> Option<u32> {
        self.vocab.unk
    }

    /// The ids at which generation stops: `eos` first, then the vocabulary's further ones.
    pub fn stop_ids(&self) -> Vec<u32> {
        let mut ids: Vec<u32> = self.vocab.eos.into_iter().collect();
        for &id in &self.vocab.stop {
            if !ids.contains(&id) {
                ids.push(id);
            }
        }
        ids
    }

    /// Whether a raw prompt begins with BOS.
    pub fn add_bos(&self) -> bool {
        self.vocab.add_bos
    }

    /// Whether a text begins with the dummy space.
    pub fn add_space_prefix(&self) -> bool {
        self.vocab.add_space_prefix
    }

    /// The chat template that came with the vocabulary.
    pub fn chat_template(&self) -> Option<&str> {
        self.vocab.chat_template.as_deref()
    }

    /// The file the vocabulary came from, for messages.
    pub fn source(&self) -> &Path {
        &self.source
    }

    /// The number of pieces; ids are below it.
    #[allow(clippy::len_without_is_empty)] // a tokenizer is never empty
    pub fn len(&self) -> usize {
        self.vocab.pieces.len()
    }

    /// The piece with this id.
    pub fn piece(&self, id: u32) -> Option<&Piece> {
        self.vocab.pieces.get(id as usize)
    }

    /// All pieces, in the order of their ids.
    pub fn pieces(&self) -> &[Piece] {
        &self.vocab.pieces
    }

    /// The id of the piece with exactly this text (of any kind), or `None`.
    pub fn id(&self, piece: &str) -> Option<u32> {
        self.ids.get(piece).copied()
    }

    /// The id of the control piece with exactly this text, or `None`.
    pub fn control(&self, piece: &str) -> Option<u32> {
        self.id(piece).filter(|&id| self.is_control(id))
    }

    /// Whether the id is a piece of text, not a byte or a mark.
    pub fn is_text(&self, id: u32) -> bool {
        let kind = self.piece(id).map(|p| p.kind);
        matches!(kind, Some(PieceKind::Normal | PieceKind::UserDefined))
    }

    /// Whether the id is a control piece.
    pub fn is_control(&self, id: u32) -> bool {
        self.piece(id).is_some_and(|p| p.kind == PieceKind::Control)
    }
}
