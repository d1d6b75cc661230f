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
//! A plain SentencePiece BPE in the tests below is the oracle.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use serde_json::Value;
use tokenizers::Model;
use tokenizers::models::bpe::{BPE, Vocab as BpeVocab};

use crate::bounded;
use crate::error::{Error, Result};

/// What SentencePiece writes for a space.
pub(super) const SPACE: &str = "\u{2581}";
/// What SentencePiece prints for the unknown piece (its default `unk_surface`).
const UNKNOWN_SURFACE: &str = " \u{2047} ";
/// Three times Mixtral's pieces. A piece may be two bytes of a file and takes some 600 in memory.
const MAX_PIECES: usize = 100_000;
/// The longest piece in bytes. Published vocabularies stay under 200; rebuilding merges is quadratic in it.
const MAX_PIECE_BYTES: usize = 512;
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

/// A vocabulary as a file holds it: plain data, not checked. [`Tokenizer::new`] checks.
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
fn read_bounded(file: &Path) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(file)
        .map_err(Error::io(file, "open"))?
        .take(MAX_FILE_BYTES + 1)
        .read_to_end(&mut bytes)
        .map_err(Error::io(file, "read"))?;
    if bytes.len() as u64 > MAX_FILE_BYTES {
        return Err(Error::invalid(
            file,
            "the tokenizer file",
            format!("at most {MAX_FILE_BYTES} bytes"),
            "a larger file",
        ));
    }
    Ok(bytes)
}

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

impl Tokenizer {
    /// A tokenizer from a vocabulary; `source` names the file in errors.
    ///
    /// Of pieces with the same text the lowest id is used for encoding; empty pieces are never produced.
    /// [`Error::Invalid`]: no pieces or absurdly many, a piece of more than 512 bytes, a score that is not a number, a Byte
    /// piece that is not `<0xNN>`, a special id outside the vocabulary, or a vocabulary that has neither
    /// an unknown piece nor all 256 bytes (so that some text could not be encoded).
    pub fn new(mut vocab: Vocab, source: &Path) -> Result<Tokenizer> {
        let invalid = |what: &str, expected: String, found: String| {
            Error::invalid(source, format!("the vocabulary: {what}"), expected, found)
        };
        let n = vocab.pieces.len();
        if n == 0 || n > MAX_PIECES {
            return Err(invalid(
                "its size",
                format!("1 to {MAX_PIECES} pieces"),
                n.to_string(),
            ));
        }
        let specials = [("bos", vocab.bos), ("eos", vocab.eos), ("unk", vocab.unk)];
        let stops = vocab.stop.iter().map(|&id| ("stop", Some(id)));
        for (name, id) in specials.into_iter().chain(stops) {
            if let Some(id) = id.filter(|&id| id as usize >= n) {
                return Err(invalid(
                    &format!("the {name} id"),
                    format!("less than {n}"),
                    id.to_string(),
                ));
            }
        }
        let mut ids = BpeVocab::with_capacity(n);
        let mut bytes = HashMap::new();
        for (id, piece) in vocab.pieces.iter().enumerate() {
            if piece.text.len() > MAX_PIECE_BYTES {
                return Err(invalid(
                    &format!("piece {id}"),
                    format!("at most {MAX_PIECE_BYTES} bytes"),
                    format!("{} bytes", piece.text.len()),
                ));
            }
            if piece.score.is_nan() {
                return Err(invalid(
                    &format!("the score of piece {id}"),
                    "a number".into(),
                    "NaN".into(),
                ));
            }
            if piece.kind == PieceKind::Byte {
                let byte = parse_byte(&piece.text).ok_or_else(|| {
                    invalid(
                        &format!("byte piece {id}"),
                        "<0xNN>".into(),
                        format!("{:?}", piece.text),
                    )
                })?;
                bytes.insert(id as u32, byte);
            }
            if !piece.text.is_empty() {
                ids.entry(piece.text.clone()).or_insert(id as u32);
            }
        }
        let unknown = vocab
            .pieces
            .iter()
            .position(|p| p.kind == PieceKind::Unknown);
        vocab.unk = vocab.unk.or(unknown.map(|id| id as u32));
        let all_bytes = bytes.values().collect::<HashSet<_>>().len() == 256;
        if vocab.unk.is_none() && !all_bytes {
            return Err(invalid(
                "its coverage",
                "an unknown piece or all 256 bytes".into(),
                "neither".into(),
            ));
        }
        let user = Matcher::new(&vocab.pieces);
        let bpe = build_bpe(&vocab, all_bytes).map_err(|e| {
            invalid(
                "its merges",
                "pieces that the BPE model takes".into(),
                e.to_string(),
            )
        })?;
        Ok(Tokenizer {
            vocab,
            source: source.to_path_buf(),
            bpe,
            ids,
            bytes,
            user,
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

    /// The ids of `text` as the continuation of other text: no dummy prefix.
    pub fn encode_continuing(&self, text: &str) -> Vec<u32> {
        self.encode_with(text, false, true)
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
        // The model can fail only for an unknown piece that it does not hold; `build_bpe` gives it one.
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
        let mut surface = Surface::new(self, false);
        surface.at_start = false;
        let mut out = Vec::new();
        surface.push(id, &mut out);
        out
    }

    /// A stream that turns the ids of an answer into text as they come; the answer is a text of its own (its dummy
    /// space is removed).
    pub fn stream(&self) -> Stream<'_> {
        Stream {
            surface: Surface::new(self, false),
            pending: Vec::new(),
        }
    }

    /// A stream for ids that continue a text already printed: the first space is kept.
    pub fn stream_continuing(&self) -> Stream<'_> {
        let mut stream = self.stream();
        stream.surface.at_start = false;
        stream
    }

    /// A stream like [`Tokenizer::stream`] that prints control pieces by name.
    pub fn stream_showing_control(&self) -> Stream<'_> {
        let mut stream = self.stream();
        stream.surface.show_control = true;
        stream
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

/// `<0x0A>` -> 10.
fn parse_byte(text: &str) -> Option<u8> {
    let digits = text.strip_prefix("<0x")?.strip_suffix('>')?;
    // from_str_radix would take a sign.
    (digits.len() == 2 && digits.bytes().all(|b| b.is_ascii_hexdigit()))
        .then(|| u8::from_str_radix(digits, 16).ok())?
}

/// The crate's BPE model with merges rebuilt from the scores.
fn build_bpe(vocab: &Vocab, byte_fallback: bool) -> tokenizers::Result<BPE> {
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

/// Finds pieces of a set in text, the longest at each place.
pub(super) struct Matcher {
    ids: HashMap<String, u32>,
    /// By first byte (256 of them), the lengths in bytes that occur, longest first.
    lengths: Vec<Vec<usize>>,
}

impl Matcher {
    /// The user-defined pieces, for normalized text.
    fn new(pieces: &[Piece]) -> Matcher {
        Matcher::from_texts(
            (0u32..)
                .zip(pieces)
                .filter(|(_, piece)| piece.kind == PieceKind::UserDefined)
                // GGUF and Hugging Face files may write a plain space where SentencePiece writes ▁.
                .map(|(id, piece)| (piece.text.replace(' ', SPACE), id)),
        )
    }

    /// Of equal texts the first is kept; empty ones are left out.
    pub(super) fn from_texts(texts: impl Iterator<Item = (String, u32)>) -> Matcher {
        let mut matcher = Matcher {
            ids: HashMap::new(),
            lengths: vec![Vec::new(); 256],
        };
        for (text, id) in texts.filter(|(text, _)| !text.is_empty()) {
            let lengths = &mut matcher.lengths[usize::from(text.as_bytes()[0])];
            if let Err(place) = lengths.binary_search_by(|have| text.len().cmp(have)) {
                lengths.insert(place, text.len());
            }
            matcher.ids.entry(text).or_insert(id);
        }
        matcher
    }

    fn is_empty(&self) -> bool {
        self.ids.is_empty()
    }

    /// The longest piece that starts at byte `at`: (id, bytes).
    pub(super) fn longest_at(&self, text: &str, at: usize) -> Option<(u32, usize)> {
        let lengths = &self.lengths[usize::from(text.as_bytes()[at])];
        lengths.iter().find_map(|&len| {
            let id = self.ids.get(text.get(at..at + len)?)?;
            Some((*id, len))
        })
    }
}

/// Prints pieces one after the other; knows only whether the dummy space is still to come.
struct Surface<'a> {
    tokenizer: &'a Tokenizer,
    show_control: bool,
    at_start: bool,
}

impl<'a> Surface<'a> {
    fn new(tokenizer: &'a Tokenizer, show_control: bool) -> Surface<'a> {
        Surface {
            tokenizer,
            show_control,
            at_start: tokenizer.vocab.add_space_prefix,
        }
    }

    fn push(&mut self, id: u32, out: &mut Vec<u8>) {
        let Some(piece) = self.tokenizer.piece(id) else {
            return;
        };
        match piece.kind {
            PieceKind::Control => {
                if self.show_control {
                    out.extend_from_slice(piece.text.as_bytes());
                }
                return; // the dummy space of the text after a leading control piece is still to come
            }
            PieceKind::Unknown => out.extend_from_slice(UNKNOWN_SURFACE.as_bytes()),
            PieceKind::Byte => out.extend(self.tokenizer.bytes.get(&id)),
            PieceKind::Normal | PieceKind::UserDefined | PieceKind::Unused => {
                let text = match piece.text.strip_prefix(SPACE) {
                    Some(rest) if self.at_start => rest,
                    _ => piece.text.as_str(),
                };
                out.extend_from_slice(text.replace(SPACE, " ").as_bytes());
            }
        }
        self.at_start = false;
    }
}

/// Turns ids into text as they come and never yields half a character.
///
/// Bytes that cannot become a character are given as U+FFFD, as soon as that is certain.
pub struct Stream<'a> {
    surface: Surface<'a>,
    /// The start of a character whose end has not come yet: at most 3 bytes between calls.
    pending: Vec<u8>,
}

impl Stream<'_> {
    /// The text that became whole with this id; may be empty.
    pub fn push(&mut self, id: u32) -> String {
        self.surface.push(id, &mut self.pending);
        let mut text = String::new();
        let mut at = 0;
        while at < self.pending.len() {
            match std::str::from_utf8(&self.pending[at..]) {
                Ok(whole) => {
                    text.push_str(whole);
                    at = self.pending.len();
                }
                Err(e) => {
                    let valid = at + e.valid_up_to();
                    text.push_str(&String::from_utf8_lossy(&self.pending[at..valid]));
                    at = valid;
                    match e.error_len() {
                        Some(bad) => {
                            text.push(char::REPLACEMENT_CHARACTER);
                            at += bad;
                        }
                        None => break, // an unfinished character: wait
                    }
                }
            }
        }
        self.pending.drain(..at);
        text
    }

    /// The end of the text: U+FFFD if a character was left unfinished, else nothing.
    pub fn flush(&mut self) -> String {
        let rest = String::from_utf8_lossy(&self.pending).into_owned();
        self.pending.clear();
        rest
    }
}

/// What a terminal should be given of a model's text: byte tokens can spell escape sequences, which are
/// shown instead of obeyed. Line breaks and tabs pass.
pub fn for_terminal(text: &str) -> std::borrow::Cow<'_, str> {
    let bad = |c: char| c.is_control() && c != '\n' && c != '\t';
    if !text.contains(bad) {
        return text.into();
    }
    let escaped = text.chars().flat_map(|c| match bad(c) {
        true => c.escape_default().collect::<Vec<_>>(),
        false => vec![c],
    });
    escaped.collect::<String>().into()
}

/// SentencePiece's protobuf, as far as BPE models need it. Field numbers are those of `sentencepiece_model.proto`.
mod spm {
    use super::*;

    /// Walks one message; every length is checked against what is there.
    struct Fields<'a> {
        bytes: &'a [u8],
        at: usize,
        /// Where `bytes` starts in the file, for errors.
        base: usize,
        path: &'a Path,
    }

    enum Field<'a> {
        Varint(u64),
        Fixed32([u8; 4]),
        Bytes(&'a [u8], usize),
        Fixed64,
    }

    impl<'a> Fields<'a> {
        fn take(&mut self, len: u64, what: &str) -> Result<&'a [u8]> {
            let have = (self.bytes.len() - self.at) as u64;
            if len > have {
                return Err(Error::Truncated {
                    file: self.path.to_path_buf(),
                    what: what.to_string(),
                    at: (self.base + self.at) as u64,
                    want: len,
                    have,
                });
            }
            let taken = &self.bytes[self.at..self.at + len as usize];
            self.at += len as usize;
            Ok(taken)
        }

        fn varint(&mut self) -> Result<u64> {
            let mut value = 0u64;
            for shift in (0..64).step_by(7) {
                let byte = self.take(1, "a number of the SentencePiece model")?[0];
                value |= u64::from(byte & 0x7f) << shift;
                if byte & 0x80 == 0 {
                    return Ok(value);
                }
            }
            Err(self.wrong("a number", "at most 10 bytes", "more"))
        }

        fn wrong(&self, what: &str, expected: &str, found: impl std::fmt::Display) -> Error {
            let what = format!(
                "{what} before byte {} of the SentencePiece model",
                self.base + self.at
            );
            Error::invalid(self.path, what, expected, found)
        }

        fn next(&mut self) -> Result<Option<(u64, Field<'a>)>> {
            if self.at == self.bytes.len() {
                return Ok(None);
            }
            let key = self.varint()?;
            let field = match key & 7 {
                0 => Field::Varint(self.varint()?),
                1 => self
                    .take(8, "a field of the SentencePiece model")
                    .map(|_| Field::Fixed64)?,
                2 => {
                    let len = self.varint()?;
                    let start = self.base + self.at;
                    Field::Bytes(self.take(len, "a field of the SentencePiece model")?, start)
                }
                5 => {
                    let b = self.take(4, "a field of the SentencePiece model")?;
                    Field::Fixed32([b[0], b[1], b[2], b[3]])
                }
                wire => return Err(self.wrong("a field", "wire type 0, 1, 2 or 5", wire)),
            };
            if key >> 3 == 0 {
                return Err(self.wrong("a field's number", "at least 1", 0));
            }
            Ok(Some((key >> 3, field)))
        }
    }

    pub(super) fn read(bytes: &[u8], path: &Path) -> Result<Vocab> {
        let mut vocab = Vocab {
            bos: Some(1),
            eos: Some(2),
            unk: Some(0),
            add_bos: true,
            add_space_prefix: true,
            ..Vocab::default()
        };
        // proto2 defaults: unigram, and a normalizer that drops extra spaces.
        let (mut model, mut keeps_spaces, mut plain) = (1, false, true);
        let mut fields = Fields {
            bytes,
            at: 0,
            base: 0,
            path,
        };
        while let Some(field) = fields.next()? {
            match field {
                (1, Field::Bytes(bytes, base)) => {
                    if vocab.pieces.len() == MAX_PIECES {
                        return Err(fields.wrong(
                            "the list of pieces",
                            &format!("at most {MAX_PIECES}"),
                            "more",
                        ));
                    }
                    vocab.pieces.push(piece(Fields {
                        bytes,
                        at: 0,
                        base,
                        path,
                    })?);
                }
                (2, Field::Bytes(bytes, base)) => {
                    let mut trainer = Fields {
                        bytes,
                        at: 0,
                        base,
                        path,
                    };
                    // Ids are int32; a negative one (ten bytes) says that there is no such piece.
                    let id = |v: u64| u32::try_from(v as i64).ok();
                    while let Some(field) = trainer.next()? {
                        match field {
                            (3, Field::Varint(v)) => model = v,
                            (24, Field::Varint(v)) => plain &= v == 0, // whitespace as suffix
                            (40, Field::Varint(v)) => vocab.unk = id(v),
                            (41, Field::Varint(v)) => vocab.bos = id(v),
                            (42, Field::Varint(v)) => vocab.eos = id(v),
                            _ => {}
                        }
                    }
                }
                (3, Field::Bytes(bytes, base)) => {
                    let mut normalizer = Fields {
                        bytes,
                        at: 0,
                        base,
                        path,
                    };
                    while let Some(field) = normalizer.next()? {
                        match field {
                            (2, Field::Bytes(map, _)) => plain &= map.is_empty(),
                            (3, Field::Varint(v)) => vocab.add_space_prefix = v != 0,
                            (4, Field::Varint(v)) => keeps_spaces = v == 0,
                            (5, Field::Varint(v)) => plain &= v != 0, // escape spaces
                            _ => {}
                        }
                    }
                }
                _ => {}
            }
        }
        if vocab.pieces.is_empty() {
            return Err(Error::invalid(
                path,
                "the file",
                "a SentencePiece model",
                "no pieces in it",
            ));
        }
        if model != 2 {
            return Err(Error::unsupported(
                path,
                "the SentencePiece model type",
                "2 (BPE)",
                model,
            ));
        }
        if !plain || !keeps_spaces {
            return Err(Error::unsupported(
                path,
                "the SentencePiece normalizer",
                "one that leaves text and spaces as they are",
                "one that changes them",
            ));
        }
        Ok(vocab)
    }

    fn piece(mut fields: Fields<'_>) -> Result<Piece> {
        let mut piece = Piece {
            text: String::new(),
            score: 0.0,
            kind: PieceKind::Normal,
        };
        while let Some(field) = fields.next()? {
            match field {
                (1, Field::Bytes(text, _)) => match std::str::from_utf8(text) {
                    Ok(text) => piece.text = text.to_string(),
                    Err(e) => return Err(fields.wrong("a piece", "UTF-8", e)),
                },
                (2, Field::Fixed32(score)) => piece.score = f32::from_le_bytes(score),
                (3, Field::Varint(kind)) => {
                    piece.kind = u32::try_from(kind)
                        .ok()
                        .and_then(PieceKind::from_number)
                        .ok_or_else(|| fields.wrong("a piece's type", "1 to 6", kind))?;
                }
                _ => {}
            }
        }
        Ok(piece)
    }
}

/// Hugging Face's `tokenizer.json` and `tokenizer_config.json`.
mod hf {
    use super::*;

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
}

#[cfg(test)]
mod tests {
    use std::cmp::Ordering;
    use std::collections::BinaryHeap;
    use std::sync::LazyLock;
    use std::time::Instant;

    use proptest::prelude::*;

    use super::*;

    fn data(name: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("tests/data/tokenizers")
            .join(name)
    }

    const NAMES: [&str; 3] = [
        "mixtral-8x7b.tokenizer.model",
        "demo.tokenizer.model",
        "mixtral-8x22b-instruct.tokenizer.model",
    ];

    static REAL: LazyLock<Vec<(Tokenizer, Oracle)>> = LazyLock::new(|| {
        let load = |name: &&str| {
            let tok = Tokenizer::from_path(&crate::chat::vocabulary(name)?).unwrap();
            let oracle = Oracle::new(tok.pieces());
            Some((tok, oracle))
        };
        NAMES.iter().filter_map(load).collect()
    });

    /// SentencePiece's BPE written down plainly: scores, a queue, the leftmost of equal scores first.
    struct Oracle {
        ids: HashMap<String, (u32, f32, PieceKind)>,
    }

    #[derive(PartialEq)]
    struct Candidate {
        score: f32,
        left: usize,
        right: usize,
        len: usize,
    }

    impl Eq for Candidate {}
    impl PartialOrd for Candidate {
        fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
            Some(self.cmp(other))
        }
    }
    impl Ord for Candidate {
        fn cmp(&self, other: &Self) -> Ordering {
            self.score
                .total_cmp(&other.score)
                .then(other.left.cmp(&self.left))
        }
    }

    impl Oracle {
        fn new(pieces: &[Piece]) -> Oracle {
            let mut ids = HashMap::new();
            for (id, p) in pieces.iter().enumerate() {
                ids.entry(p.text.clone())
                    .or_insert((id as u32, p.score, p.kind));
            }
            Oracle { ids }
        }

        fn encode(&self, text: &str) -> Vec<u32> {
            if text.is_empty() {
                return Vec::new();
            }
            let text = format!("\u{2581}{}", text.replace(' ', "\u{2581}"));
            // Symbols: (text, frozen); an empty text was merged away.
            let mut symbols: Vec<(&str, bool)> = Vec::new();
            let mut rest = text.as_str();
            while let Some(c) = rest.chars().next() {
                let longest = rest
                    .char_indices()
                    .map(|(i, c)| &rest[..i + c.len_utf8()])
                    .take(64)
                    .filter(|s| {
                        self.ids
                            .get(*s)
                            .is_some_and(|p| p.2 == PieceKind::UserDefined)
                    })
                    .last();
                let symbol = longest.unwrap_or(&rest[..c.len_utf8()]);
                symbols.push((symbol, longest.is_some()));
                rest = &rest[symbol.len()..];
            }
            let mut queue = BinaryHeap::new();
            let at = |s: &str| s.as_ptr() as usize - text.as_ptr() as usize;
            let try_pair =
                |queue: &mut BinaryHeap<_>, symbols: &[(&str, bool)], left: usize, right: usize| {
                    let ((a, fa), (b, fb)) = (symbols[left], symbols[right]);
                    let both = &text[at(a)..at(b) + b.len()];
                    let found = self.ids.get(both).filter(|p| p.2 == PieceKind::Normal);
                    if let (false, false, Some(p)) = (fa, fb, found) {
                        queue.push(Candidate {
                            score: p.1,
                            left,
                            right,
                            len: both.len(),
                        });
                    }
                };
            for right in 1..symbols.len() {
                try_pair(&mut queue, &symbols, right - 1, right);
            }
            let n = symbols.len();
            let mut next: Vec<usize> = (1..=n).collect();
            let mut prev: Vec<usize> = (0..n).map(|i| i.wrapping_sub(1)).collect();
            while let Some(c) = queue.pop() {
                let (a, b) = (symbols[c.left].0, symbols[c.right].0);
                if a.is_empty() || b.is_empty() || a.len() + b.len() != c.len {
                    continue;
                }
                symbols[c.left].0 = &text[at(a)..at(a) + c.len];
                symbols[c.right].0 = "";
                next[c.left] = next[c.right];
                if next[c.left] < n {
                    prev[next[c.left]] = c.left;
                    try_pair(&mut queue, &symbols, c.left, next[c.left]);
                }
                if prev[c.left] < n {
                    try_pair(&mut queue, &symbols, prev[c.left], c.left);
                }
            }
            let byte = |b| self.ids[&format!("<0x{b:02X}>")].0;
            let mut out = Vec::new();
            for (symbol, _) in symbols.iter().filter(|s| !s.0.is_empty()) {
                match self.ids.get(*symbol) {
                    Some(p) if matches!(p.2, PieceKind::Normal | PieceKind::UserDefined) => {
                        out.push(p.0)
                    }
                    _ => out.extend(symbol.bytes().map(byte)),
                }
            }
            out
        }
    }

    fn same_as_oracle(text: &str) {
        for (tok, oracle) in REAL.iter() {
            assert_eq!(
                tok.encode(text),
                oracle.encode(text),
                "{text:?} with {:?}",
                tok.source()
            );
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(300))]

        #[test]
        fn any_string_is_encoded_as_the_oracle_does(text in any::<String>()) {
            same_as_oracle(&text);
        }

        #[test]
        fn runs_and_marks_are_encoded_as_the_oracle_does(
            parts in proptest::collection::vec(
                (prop_oneof![
                    Just(" "), Just("a"), Just("e"), Just("\u{2581}"), Just("="), Just("-"), Just("\n"), Just("\t"),
                    Just("0"), Just("aa"), Just("the "), Just("[INST]"), Just("<s>"), Just("[REFERENCE_DOC_1]"),
                    Just("[REFERENCE_DOC_1"), Just("é"), Just("字"), Just("😀"), Just("\0"), Just("."), Just("/"),
                    Just("#"), Just("*"), Just("l"), Just("o"), Just("n"), Just("i"),
                ], 1usize..40),
                0..30,
            )
        ) {
            let text: String = parts.iter().map(|(s, n)| s.repeat(*n)).collect();
            same_as_oracle(&text);
        }

        #[test]
        fn small_vocabularies_with_different_scores_encode_as_the_oracle_does(
            words in proptest::collection::hash_set("[ab\u{2581}]{2,5}", 0..25),
            scores in Just((0u8..30).collect::<Vec<_>>()).prop_shuffle(),
            text in "[ab ]{0,40}",
        ) {
            let letters = ["a", "b", "\u{2581}"].map(String::from);
            let mut pieces = vec![piece("<unk>", 0.0, PieceKind::Unknown)];
            for (text, score) in letters.into_iter().chain(words).zip(scores) {
                pieces.push(piece(&text, -f32::from(score), PieceKind::Normal));
            }
            let oracle = Oracle::new(&pieces);
            let vocab = Vocab { pieces, add_space_prefix: true, ..Vocab::default() };
            let tok = Tokenizer::new(vocab, Path::new("v")).unwrap();
            prop_assert_eq!(tok.encode(&text), oracle.encode(&text));
        }

        #[test]
        fn decoding_gives_the_text_back(text in any::<String>()) {
            for (tok, _) in REAL.iter() {
                // A literal ▁ prints as a space: SentencePiece has one sign for both.
                let want = text.replace('\u{2581}', " ");
                let ids = tok.encode(&text);
                prop_assert_eq!(String::from_utf8(tok.decode(&ids)).unwrap(), want.clone());
                let mut stream = tok.stream();
                let mut got: String = ids.iter().map(|&id| stream.push(id)).collect();
                got += &stream.flush();
                prop_assert_eq!(got, want);
            }
        }

        #[test]
        fn any_ids_decode(ids in proptest::collection::vec(any::<u32>(), 0..50)) {
            for (tok, _) in REAL.iter() {
                let ids: Vec<u32> = ids.iter().map(|id| id % (tok.len() as u32 + 3)).collect();
                let whole = String::from_utf8_lossy(&tok.decode(&ids)).into_owned();
                let mut stream = tok.stream();
                let mut got: String = ids.iter().map(|&id| stream.push(id)).collect();
                got += &stream.flush();
                prop_assert_eq!(got, whole);
            }
        }
    }

    #[test]
    fn books_are_encoded_as_the_oracle_does() {
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/golden/tokenize.jsonl");
        let lines = std::fs::read_to_string(file).unwrap();
        let texts: Vec<String> = lines
            .lines()
            .map(|l| {
                serde_json::from_str::<Value>(l).unwrap()["text"]
                    .as_str()
                    .unwrap()
                    .to_string()
            })
            .collect();
        same_as_oracle(&texts.join("\n"));
        same_as_oracle(&texts.concat());
    }

    #[test]
    fn long_input_takes_linear_time() {
        for (piece, n) in [
            ("The quick brown fox. ", 50_000),
            ("a", 100_000),
            (" ", 100_000),
            ("字a", 100_000),
            ("\0", 100_000),
        ] {
            let (tenth, text) = (piece.repeat(n / 10), piece.repeat(n));
            // With the small vocabulary it is over too soon to be timed.
            for (tok, _) in REAL.iter().filter(|(tok, _)| tok.len() > 30_000) {
                let time = |text: &str| {
                    let start = Instant::now();
                    (tok.encode(text), start.elapsed())
                };
                // A quadratic method takes 100 times as long for all of it as for a tenth, every time; others do so only
                // when the machine is busy with something else.
                let linear = (0..10).any(|_| time(&text).1 < 30 * time(&tenth).1);
                assert!(linear, "{n} times {piece:?}");
                assert_eq!(tok.decode(&time(&text).0), text.as_bytes());
            }
        }
    }

    #[test]
    fn decoding_follows_sentencepiece_at_the_borders() {
        let tok = &REAL[0].0;
        let text = |ids: &[u32]| String::from_utf8_lossy(&tok.decode(ids)).into_owned();
        // Each answer is sentencepiece 0.2's.
        assert_eq!(text(&[28705, 28705, 22557]), "  Hello");
        assert_eq!(text(&[1, 22557]), "Hello");
        assert_eq!(text(&[1, 22557, 2, 22557]), "Hello Hello");
        assert_eq!(text(&[28705]), "");
        assert_eq!(text(&[1, 28705, 28705]), " ");
        assert_eq!(text(&[0, 5]), " \u{2047} \u{2}");
        assert_eq!(text(&[13, 22557]), "\n Hello");
        assert_eq!(text(&[230, 22557]), "\u{FFFD} Hello");
        assert_eq!(tok.decode_with(&[1, 22557, 2], true), b"<s>Hello</s>");
        assert_eq!(text(&[u32::MAX, 22557]), "Hello");
    }

    #[test]
    fn a_stream_waits_for_whole_characters() {
        let tok = &REAL[0].0;
        let byte = |b: u8| u32::from(b) + 3;
        let mut stream = tok.stream();
        assert_eq!(stream.push(byte(0xF0)), "");
        assert_eq!(stream.push(byte(0x9F)), "");
        assert_eq!(stream.push(byte(0x98)), "");
        assert_eq!(stream.push(byte(0x80)), "😀");
        assert_eq!(stream.push(byte(0xE5)), "");
        assert_eq!(stream.push(22557), "\u{FFFD} Hello");
        assert_eq!(stream.push(byte(0xFF)), "\u{FFFD}");
        assert_eq!(stream.push(byte(0xC3)), "");
        assert_eq!(stream.flush(), "\u{FFFD}");
        assert_eq!(stream.flush(), "");
        assert_eq!(tok.stream_continuing().push(22557), " Hello");
        assert_eq!(tok.stream().push(22557), "Hello");
        assert_eq!(tok.stream().push(2), "");
        assert_eq!(tok.stream_showing_control().push(2), "</s>");
    }

    fn piece(text: &str, score: f32, kind: PieceKind) -> Piece {
        Piece {
            text: text.into(),
            score,
            kind,
        }
    }

    fn small() -> Vocab {
        let mut pieces = vec![
            piece("<unk>", 0.0, PieceKind::Unknown),
            piece("<s>", 0.0, PieceKind::Control),
        ];
        for (i, text) in ["\u{2581}", "a", "b", "ab", "\u{2581}ab"]
            .iter()
            .enumerate()
        {
            pieces.push(piece(text, -(i as f32), PieceKind::Normal));
        }
        Vocab {
            pieces,
            bos: Some(1),
            add_space_prefix: true,
            ..Vocab::default()
        }
    }

    #[test]
    fn a_vocabulary_without_bytes_falls_back_to_unknown() {
        let tok = Tokenizer::new(small(), Path::new("v")).unwrap();
        assert_eq!(tok.encode("ab"), [6]);
        // A run of unknown characters is one unknown piece, as in SentencePiece.
        assert_eq!(tok.encode("xyab"), [2, 0, 5]);
        assert_eq!(tok.unk(), Some(0));
        assert_eq!(tok.encode("<s>"), [2, 0]);
        assert_eq!(tok.control("<s>"), Some(1));
        assert_eq!(tok.control("ab"), None);
    }

    #[test]
    fn hostile_vocabularies_are_refused_or_survived() {
        let refuse = |change: &dyn Fn(&mut Vocab), word: &str| {
            let mut vocab = small();
            change(&mut vocab);
            let error = Tokenizer::new(vocab, Path::new("bad.gguf"))
                .unwrap_err()
                .to_string();
            assert!(
                error.starts_with("bad.gguf: ") && error.contains(word),
                "{error}"
            );
        };
        refuse(&|v| v.pieces.clear(), "size");
        refuse(&|v| v.bos = Some(7), "bos");
        refuse(&|v| v.eos = Some(u32::MAX), "eos");
        refuse(&|v| v.unk = Some(7), "unk");
        refuse(&|v| v.stop = vec![0, 9], "stop");
        refuse(&|v| v.pieces[3].score = f32::NAN, "score of piece 3");
        refuse(&|v| v.pieces[3].text = "x".repeat(513), "piece 3");
        refuse(&|v| v.pieces[3].kind = PieceKind::Byte, "byte piece 3");
        refuse(&|v| v.pieces[0].kind = PieceKind::Unused, "coverage");

        let mut vocab = small();
        vocab.pieces.push(piece("ab", 9.0, PieceKind::Normal)); // a second "ab": the first keeps the text
        vocab.pieces.push(piece("", 9.0, PieceKind::Normal));
        vocab.pieces.push(piece("", 9.0, PieceKind::UserDefined));
        vocab
            .pieces
            .push(piece("b", f32::INFINITY, PieceKind::UserDefined));
        vocab.pieces.push(piece("<0x41>", 0.0, PieceKind::Byte)); // one byte of 256: no byte fallback
        let tok = Tokenizer::new(vocab, Path::new("v")).unwrap();
        assert_eq!(tok.encode("ab"), [2, 3, 10]);
        assert_eq!(tok.encode_with("ab", true, false), [6]);
        assert_eq!(tok.encode_with("ab", false, false), [5]);
        assert_eq!(tok.encode("A"), [2, 0]);
        assert_eq!(tok.decode(&[8, 9, 11]), b"A");
    }

    #[test]
    fn user_defined_pieces_are_cut_out_longest_first() {
        let mut vocab = small();
        for text in ["<x>", "<x>b", "\u{2581}<"] {
            vocab.pieces.push(piece(text, 0.0, PieceKind::UserDefined));
        }
        let tok = Tokenizer::new(vocab, Path::new("v")).unwrap();
        assert_eq!(tok.encode("a<x>ba"), [2, 3, 8, 3]);
        assert_eq!(tok.encode("<x>b"), [9, 0, 4]); // "▁<" comes first, "x>" is unknown
        assert_eq!(tok.encode("a<x>ab"), [2, 3, 7, 5]);
    }

    #[test]
    fn every_truncation_of_a_model_is_an_error_or_a_smaller_vocabulary() {
        let bytes = std::fs::read(data(NAMES[1])).unwrap();
        let path = Path::new("cut.model");
        let full = Vocab::from_spm(&bytes, path).unwrap();
        // The head (its pieces) and the tail (trainer and normalizer) byte by byte.
        let cuts = (0..3000).chain(bytes.len() - 3000..bytes.len());
        for cut in cuts {
            if let Ok(vocab) = Vocab::from_spm(&bytes[..cut], path) {
                assert!(vocab.pieces.len() <= full.pieces.len());
                assert!(cut > bytes.len() - 1000, "cut at {cut}"); // without the trainer it would be unigram
            }
        }
        let error = Vocab::from_spm(&bytes[..100], path).unwrap_err();
        assert!(matches!(error, Error::Truncated { .. }), "{error}");
    }

    #[test]
    fn every_changed_byte_of_a_model_is_survived() {
        let bytes = std::fs::read(data(NAMES[1])).unwrap();
        let places = (0..400).chain(bytes.len() - 400..bytes.len());
        for place in places {
            for value in [0x00, 0x7f, 0x80, 0xff, bytes[place] ^ 1] {
                let mut bad = bytes.clone();
                bad[place] = value;
                // Nothing to assert but that it returns: some changes are harmless.
                let _ = Vocab::from_spm(&bad, Path::new("bad.model"));
            }
        }
    }

    #[test]
    fn models_of_other_kinds_are_named() {
        let path = Path::new("x.model");
        let unigram = b"\x0a\x03\x0a\x01a"; // one piece "a", no trainer
        let error = Vocab::from_spm(unigram, path).unwrap_err();
        assert!(matches!(error, Error::Unsupported { .. }), "{error}");
        for (bytes, word) in [
            (&b""[..], "no pieces"),
            (b"\x0a\x03\x0a\x01\xff", "UTF-8"),
            (b"\x0a\x02\x18\x09", "type"),
            (b"\x07", "wire type"),
            (b"\x02\x00", "number"),
            (b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff", "10 bytes"),
        ] {
            let error = Vocab::from_spm(bytes, path).unwrap_err().to_string();
            assert!(
                error.starts_with("x.model: ") && error.contains(word),
                "{error}"
            );
        }
    }

    /// A `tokenizer.json` such as the Hugging Face converter writes for a SentencePiece vocabulary.
    fn hf_json(tok: &Tokenizer) -> Value {
        let mut merges = Vec::new();
        for p in tok.pieces().iter().filter(|p| p.kind == PieceKind::Normal) {
            for (cut, _) in p.text.char_indices().skip(1) {
                let (l, r) = p.text.split_at(cut);
                let normal = |s| {
                    tok.id(s)
                        .is_some_and(|id| tok.piece(id).unwrap().kind == PieceKind::Normal)
                };
                if normal(l) && normal(r) {
                    merges.push((p.score, l, r));
                }
            }
        }
        merges.sort_by(|a, b| b.0.total_cmp(&a.0).then(b.1.len().cmp(&a.1.len())));
        let special = |p: &Piece| !matches!(p.kind, PieceKind::Normal | PieceKind::Byte);
        let added: Vec<Value> = (0..tok.len())
            .filter(|&id| special(&tok.pieces()[id]))
            .map(|id| {
                let p = &tok.pieces()[id];
                serde_json::json!({"id": id, "content": p.text, "special": p.kind != PieceKind::UserDefined})
            })
            .collect();
        let vocab: serde_json::Map<String, Value> = tok
            .pieces()
            .iter()
            .enumerate()
            .map(|(id, p)| (p.text.clone(), id.into()))
            .collect();
        let merges: Vec<String> = merges.iter().map(|m| format!("{} {}", m.1, m.2)).collect();
        serde_json::json!({
            "added_tokens": added,
            "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
            "pre_tokenizer": null,
            "model": {"type": "BPE", "unk_token": "<unk>", "byte_fallback": true, "vocab": vocab, "merges": merges},
        })
    }

    #[test]
    fn a_hugging_face_file_encodes_as_the_sentencepiece_file() {
        let tok = &REAL[1].0;
        let folder = tempfile::tempdir().unwrap();
        let json = folder.path().join("tokenizer.json");
        std::fs::write(&json, hf_json(tok).to_string()).unwrap();
        std::fs::copy(
            data("demo.tokenizer_config.json"),
            folder.path().join("tokenizer_config.json"),
        )
        .unwrap();
        let hf = Tokenizer::from_path(folder.path()).unwrap();
        assert_eq!(
            (hf.bos(), hf.eos(), hf.unk(), hf.len()),
            (tok.bos(), tok.eos(), tok.unk(), tok.len())
        );
        assert!(hf.chat_template().unwrap().contains("[INST]") && hf.add_bos());
        for text in [
            "Once upon a time, there was a  wolf.\n\t¡Hola! «été» 字😀 <s> [INST] ",
            "a",
            " ",
            "aaaaaaaaaa",
        ] {
            assert_eq!(hf.encode(text), tok.encode(text), "{text:?}");
        }
        let kinds = |t: &Tokenizer| t.pieces().iter().map(|p| p.kind).collect::<Vec<_>>();
        assert_eq!(kinds(&hf), kinds(tok));
    }

    #[test]
    fn odd_hugging_face_files_are_named() {
        let path = Path::new("tokenizer.json");
        let good = || hf_json(&Tokenizer::new(small(), path).unwrap());
        let mut cases: Vec<(Value, &str)> = Vec::new();
        let mut case = |change: &dyn Fn(&mut Value), word| {
            let mut v = good();
            change(&mut v);
            cases.push((v, word));
        };
        case(&|v| v["model"]["vocab"] = 3.into(), "model.vocab");
        case(&|v| v["model"]["merges"] = 3.into(), "model.merges");
        case(
            &|v| v["model"]["merges"] = serde_json::json!([3]),
            "merge 0",
        );
        case(
            &|v| v["model"]["merges"] = serde_json::json!([["a", "b", "c"]]),
            "merge 0",
        );
        case(
            &|v| v["model"]["byte_fallback"] = false.into(),
            "byte_fallback",
        );
        case(
            &|v| v["pre_tokenizer"] = serde_json::json!({"type": "ByteLevel"}),
            "byte_fallback",
        );
        case(&|v| v["model"]["vocab"]["a"] = (-1).into(), "the id of");
        case(
            &|v| v["model"]["vocab"]["a"] = 4_000_000_000u64.into(),
            "the id of",
        );
        for (json, word) in cases {
            let error = Vocab::from_hf_json(json.to_string().as_bytes(), path)
                .unwrap_err()
                .to_string();
            assert!(error.contains(word), "{error}");
        }
        assert!(Vocab::from_hf_json(b"{", path).is_err());
        assert!(Vocab::from_hf_json(b"[]", path).is_err());
    }

    #[test]
    fn a_folder_without_a_tokenizer_says_so() {
        let folder = tempfile::tempdir().unwrap();
        let error = Tokenizer::from_path(folder.path()).unwrap_err();
        assert!(matches!(error, Error::Missing { .. }), "{error}");
        let error = Tokenizer::from_path(&folder.path().join("none")).unwrap_err();
        assert!(matches!(error, Error::Io { .. }), "{error}");
    }

    /// Prints how long construction takes: `cargo test --release --lib -- --ignored build_time --nocapture`.
    #[test]
    #[ignore = "a measurement"]
    fn build_time() {
        for name in NAMES {
            let vocab = Vocab::from_path(&data(name)).unwrap();
            let mut times: Vec<f64> = (0..9)
                .map(|_| {
                    let vocab = vocab.clone();
                    let start = Instant::now();
                    Tokenizer::new(vocab, Path::new(name)).unwrap();
                    start.elapsed().as_secs_f64() * 1e3
                })
                .collect();
            times.sort_by(f64::total_cmp);
            println!("{name}: median {:.1} ms, best {:.1} ms", times[4], times[0]);
            let tok = Tokenizer::new(vocab, Path::new(name)).unwrap();
            for text in ["The quick brown fox. ".repeat(50_000), "a".repeat(1 << 20)] {
                let start = Instant::now();
                let n = tok.encode(&text).len();
                println!(
                    "  {} bytes -> {n} ids in {:.0} ms",
                    text.len(),
                    start.elapsed().as_secs_f64() * 1e3
                );
            }
        }
    }

    #[test]
    fn a_terminal_gets_no_escape_sequences() {
        let text = "é\ttwo\nlines \u{1b}[31mred\u{7}\u{9b}2J";
        let shown = "é\ttwo\nlines \\u{1b}[31mred\\u{7}\\u{9b}2J";
        assert_eq!(for_terminal(text), shown);
    }
}
