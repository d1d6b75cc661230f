//! Pieces that are cut out of a text whole.

use super::SPACE;
use super::vocab::{Piece, PieceKind};
use std::collections::HashMap;

/// Finds pieces of a set in text, the longest at each place.
pub(in crate::chat) struct Matcher {
    ids: HashMap<String, u32>,
    /// By first byte (256 of them), the lengths in bytes that occur, longest first.
    lengths: Vec<Vec<usize>>,
}

impl Matcher {
    /// The user-defined pieces, for normalized text.
    pub(super) fn new(pieces: &[Piece]) -> Matcher {
        Matcher::from_texts(
            (0u32..)
                .zip(pieces)
                .filter(|(_, piece)| piece.kind == PieceKind::UserDefined)
                // GGUF and Hugging Face files may write a plain space where SentencePiece writes ▁.
                .map(|(id, piece)| (piece.text.replace(' ', SPACE), id)),
        )
    }

    /// Of equal texts the first is kept; empty ones are left out.
    pub(in crate::chat) fn from_texts(texts: impl Iterator<Item = (String, u32)>) -> Matcher {
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

    pub(super) fn is_empty(&self) -> bool {
        self.ids.is_empty()
    }

    /// The longest piece that starts at byte `at`: (id, bytes).
    pub(in crate::chat) fn longest_at(&self, text: &str, at: usize) -> Option<(u32, usize)> {
        let lengths = &self.lengths[usize::from(text.as_bytes()[at])];
        lengths.iter().find_map(|&len| {
            let id = self.ids.get(text.get(at..at + len)?)?;
            Some((*id, len))
        })
    }
}
