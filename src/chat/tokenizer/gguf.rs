//! The vocabulary that a GGUF file carries.

use super::{Piece, PieceKind, Tokenizer, Vocab};
use crate::error::{Error, Result};
use crate::gguf::Gguf;

impl Vocab {
    /// Reads `tokenizer.ggml.*`.
    ///
    /// # Errors
    /// If there is none, it is of another kind than SentencePiece BPE (`llama`), or its arrays do not
    /// belong together.
    pub fn from_gguf(file: &Gguf) -> Result<Vocab> {
        let key = |suffix: &str| format!("tokenizer.ggml.{suffix}");
        let missing = |suffix: &str| {
            Error::missing(
                file.path(),
                format!("metadata key {}", key(suffix)),
                "the file has no usable vocabulary",
            )
        };
        let kind = file
            .get_str(&key("model"))?
            .ok_or_else(|| missing("model"))?;
        if kind != "llama" {
            let expected = "llama (SentencePiece BPE)";
            return Err(Error::unsupported(
                file.path(),
                "the tokenizer",
                expected,
                format!("{kind:?}"),
            ));
        }
        let array = |suffix: &str| file.get_array(&key(suffix))?.ok_or_else(|| missing(suffix));
        let wrong = |suffix: &str, expected: String, found: String| {
            Error::invalid(
                file.path(),
                format!("metadata key {}", key(suffix)),
                expected,
                found,
            )
        };
        let tokens = array("tokens")?;
        let n = tokens.len();
        let texts = tokens
            .strs()
            .ok_or_else(|| wrong("tokens", "strings".into(), tokens.item().name().into()))?;
        let scores = array("scores")?;
        let kinds = array("token_type")?;
        for (suffix, other) in [("scores", &scores), ("token_type", &kinds)] {
            if other.len() != n {
                return Err(wrong(
                    suffix,
                    format!("{n} entries, one per token"),
                    other.len().to_string(),
                ));
            }
        }
        let score = scores.f32s().ok_or_else(|| {
            wrong(
                "scores",
                "32-bit floats".into(),
                scores.item().name().into(),
            )
        })?;
        let mut pieces = Vec::with_capacity(n);
        for ((text, score), kind) in texts.zip(score).zip(kinds.iter()) {
            let number = kind.as_u64().and_then(|n| u32::try_from(n).ok());
            let kind = number.and_then(PieceKind::from_number).ok_or_else(|| {
                wrong(
                    "token_type",
                    "integers from 1 to 6".into(),
                    format!("{kind} for token {}", pieces.len()),
                )
            })?;
            pieces.push(Piece {
                text: text.to_string(),
                score,
                kind,
            });
        }
        if pieces.len() != n {
            return Err(wrong(
                "tokens",
                format!("{n} valid UTF-8 strings"),
                pieces.len().to_string(),
            ));
        }
        let id = |suffix: &str| file.get_u32(&key(suffix));
        Ok(Vocab {
            pieces,
            bos: id("bos_token_id")?.or(Some(1)),
            eos: id("eos_token_id")?.or(Some(2)),
            unk: id("unknown_token_id")?,
            stop: id("eot_token_id")?.into_iter().collect(),
            add_bos: file.get_bool(&key("add_bos_token"))?.unwrap_or(true),
            add_space_prefix: file.get_bool(&key("add_space_prefix"))?.unwrap_or(true),
            chat_template: file.get_str("tokenizer.chat_template")?.map(str::to_string),
        })
    }
}

impl Tokenizer {
    /// The tokenizer of a GGUF file.
    ///
    /// # Errors
    /// See [`Vocab::from_gguf`] and [`Tokenizer::new`].
    pub fn from_gguf(file: &Gguf) -> Result<Tokenizer> {
        Tokenizer::new(Vocab::from_gguf(file)?, file.path())
    }
}
