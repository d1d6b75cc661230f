//! SentencePiece's protobuf, as far as BPE models need it. Field numbers are those of `sentencepiece_model.proto`.

use super::MAX_PIECES;
use super::vocab::{Piece, PieceKind, Vocab};
use crate::error::{Error, Result};
use std::path::Path;

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

/// What of the trainer's and the normalizer's settings decides whether the vocabulary can be used here.
struct Settings {
    /// The kind of model.
    kind: u64,
    keeps_spaces: bool,
    /// Text stays as it is but for `▁` in place of spaces, in front of words.
    plain: bool,
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
    let mut settings = Settings {
        kind: 1,
        keeps_spaces: false,
        plain: true,
    };
    let mut fields = Fields {
        bytes,
        at: 0,
        base: 0,
        path,
    };
    while let Some(field) = fields.next()? {
        let (number, Field::Bytes(bytes, base)) = field else {
            continue;
        };
        let inner = Fields {
            bytes,
            at: 0,
            base,
            path,
        };
        match number {
            1 if vocab.pieces.len() == MAX_PIECES => {
                let most = format!("at most {MAX_PIECES}");
                return Err(fields.wrong("the list of pieces", &most, "more"));
            }
            1 => vocab.pieces.push(piece(inner)?),
            2 => trainer(inner, &mut vocab, &mut settings)?,
            3 => normalizer(inner, &mut vocab, &mut settings)?,
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
    if settings.kind != 2 {
        return Err(Error::unsupported(
            path,
            "the SentencePiece model type",
            "2 (BPE)",
            settings.kind,
        ));
    }
    if !settings.plain || !settings.keeps_spaces {
        return Err(Error::unsupported(
            path,
            "the SentencePiece normalizer",
            "one that leaves text and spaces as they are",
            "one that changes them",
        ));
    }
    Ok(vocab)
}

fn trainer(mut fields: Fields<'_>, vocab: &mut Vocab, settings: &mut Settings) -> Result<()> {
    // Ids are int32; a negative one (ten bytes) says that there is no such piece.
    let id = |v: u64| u32::try_from(v as i64).ok();
    while let Some(field) = fields.next()? {
        match field {
            (3, Field::Varint(v)) => settings.kind = v,
            (24, Field::Varint(v)) => settings.plain &= v == 0, // whitespace as suffix
            (40, Field::Varint(v)) => vocab.unk = id(v),
            (41, Field::Varint(v)) => vocab.bos = id(v),
            (42, Field::Varint(v)) => vocab.eos = id(v),
            _ => {}
        }
    }
    Ok(())
}

fn normalizer(mut fields: Fields<'_>, vocab: &mut Vocab, settings: &mut Settings) -> Result<()> {
    while let Some(field) = fields.next()? {
        match field {
            (2, Field::Bytes(map, _)) => settings.plain &= map.is_empty(),
            (3, Field::Varint(v)) => vocab.add_space_prefix = v != 0,
            (4, Field::Varint(v)) => settings.keeps_spaces = v == 0,
            (5, Field::Varint(v)) => settings.plain &= v != 0, // escape spaces
            _ => {}
        }
    }
    Ok(())
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
