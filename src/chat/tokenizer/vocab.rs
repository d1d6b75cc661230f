//! A vocabulary as files hold it: its pieces, and where to find one.

use super::{hf, spm};
use crate::disk;
use crate::error::{Error, Result};
use std::path::Path;

/// The largest tokenizer file that is read, in bytes (a Hugging Face `tokenizer.json` has about 20 MB).
const MAX_FILE_BYTES: u64 = 256 << 20;

/// What a piece is for. The numbers are those of SentencePiece and of GGUF's `tokenizer.ggml.token_type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum PieceKind {
    /// A piece of text.
    Normal = 1,
    /// Stands for what the vocabulary cannot say.
    Unknown = 2,
    /// A mark such as `<s>` or `[INST]`: never read from text, prints as nothing.
    Control = 3,
    /// A piece of text that is always cut out whole.
    UserDefined = 4,
    /// Not in use: never produced by encoding.
    Unused = 5,
    /// One byte, written `<0xNN>`.
    Byte = 6,
}

impl PieceKind {
    /// The kind with this number in GGUF's `token_type` or SentencePiece's `type`, or `None`.
    pub fn from_number(number: u32) -> Option<PieceKind> {
        Some(match number {
            1 => PieceKind::Normal,
            2 => PieceKind::Unknown,
            3 => PieceKind::Control,
            4 => PieceKind::UserDefined,
            5 => PieceKind::Unused,
            6 => PieceKind::Byte,
            _ => return None,
        })
    }
}

/// One entry of a vocabulary; its id is its place in [`Vocab::pieces`].
#[derive(Clone, Debug, PartialEq)]
pub struct Piece {
    /// The text, with `▁` for a space and `<0xNN>` for a byte.
    pub text: String,
    /// The larger, the earlier the piece is joined (BPE: minus the merge's rank).
    pub score: f32,
    /// What the piece is for.
    pub kind: PieceKind,
}

/// A vocabulary as a file holds it: plain data, not checked. [`Tokenizer::new`](super::Tokenizer::new) checks.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Vocab {
    /// The pieces; a piece's id is its index.
    pub pieces: Vec<Piece>,
    /// Begin of sequence (`<s>`).
    pub bos: Option<u32>,
    /// End of sequence (`</s>`): generation stops here.
    pub eos: Option<u32>,
    /// The unknown piece; where absent, the first piece of kind [`PieceKind::Unknown`].
    pub unk: Option<u32>,
    /// Further ids at which generation stops (such as `<|im_end|>`).
    pub stop: Vec<u32>,
    /// Whether a raw prompt begins with `bos`.
    pub add_bos: bool,
    /// Whether a text begins with SentencePiece's dummy space.
    pub add_space_prefix: bool,
    /// The chat template (Jinja) that came with the vocabulary.
    pub chat_template: Option<String>,
}

impl Vocab {
    /// Reads a SentencePiece model (`tokenizer.model`, a protobuf `ModelProto`).
    ///
    /// `path` names the file in errors. Errors: [`Error::Truncated`], [`Error::Invalid`] for bytes that are no such
    /// file, [`Error::Unsupported`] for SentencePiece features that Mixtral's vocabularies do not use
    /// (unigram models, text normalization).
    pub fn from_spm(bytes: &[u8], path: &Path) -> Result<Vocab> {
        spm::read(bytes, path)
    }

    /// Reads a Hugging Face `tokenizer.json` that holds a SentencePiece-like BPE (merges, byte fallback).
    ///
    /// Merges become scores: a piece scores minus the rank of the first merge that makes it. Errors:
    /// [`Error::Invalid`] for bytes that are no such file, [`Error::Unsupported`] for other kinds of tokenizers.
    pub fn from_hf_json(bytes: &[u8], path: &Path) -> Result<Vocab> {
        hf::read(bytes, path)
    }

    /// Reads a vocabulary from a `tokenizer.model`, a `tokenizer.json`, or a folder that holds one of them
    /// and perhaps a `tokenizer_config.json` (for `add_bos_token`, `chat_template` and the special tokens' names).
    ///
    /// Errors: [`Error::Io`], [`Error::Missing`] for a folder without a tokenizer, and those of
    /// [`Vocab::from_spm`] and [`Vocab::from_hf_json`].
    pub fn from_path(path: &Path) -> Result<Vocab> {
        let file = if path.is_dir() {
            ["tokenizer.model", "tokenizer.json"]
                .iter()
                .map(|name| path.join(name))
                .find(|p| p.is_file())
                .ok_or_else(|| {
                    Error::missing(
                        path,
                        "a tokenizer",
                        "expected tokenizer.model or tokenizer.json in the folder",
                    )
                })?
        } else {
            path.to_path_buf()
        };
        let bytes = read_bounded(&file)?;
        // A protobuf ModelProto starts with field 1 or 2 (0x0A, 0x12); JSON with a brace.
        let first = bytes.iter().find(|b| !b.is_ascii_whitespace());
        let mut vocab = if first == Some(&b'{') {
            Vocab::from_hf_json(&bytes, &file)?
        } else {
            Vocab::from_spm(&bytes, &file)?
        };
        if path.is_dir() {
            hf::apply_config(&mut vocab, path)?;
        }
        Ok(vocab)
    }
}

/// The whole file, refused beyond [`MAX_FILE_BYTES`].
pub(super) fn read_bounded(file: &Path) -> Result<Vec<u8>> {
    disk::read(file, MAX_FILE_BYTES)
}

/// `<0x0A>` -> 10.
pub(super) fn parse_byte(text: &str) -> Option<u8> {
    let digits = text.strip_prefix("<0x")?.strip_suffix('>')?;
    // from_str_radix would take a sign.
    (digits.len() == 2 && digits.bytes().all(|b| b.is_ascii_hexdigit()))
        .then(|| u8::from_str_radix(digits, 16).ok())?
}
