//! Ids to text: what pieces print, one after the other, and as whole characters while they come.

use super::vocab::PieceKind;
use super::{SPACE, Tokenizer};

/// What SentencePiece prints for the unknown piece (its default `unk_surface`).
const UNKNOWN_SURFACE: &str = " \u{2047} ";

/// Prints pieces one after the other; knows only whether the dummy space is still to come.
pub(super) struct Surface<'a> {
    tokenizer: &'a Tokenizer,
    show_control: bool,
    at_start: bool,
}

impl<'a> Surface<'a> {
    /// Of a text of its own, perhaps with control pieces by name.
    pub(super) fn new(tokenizer: &'a Tokenizer, show_control: bool) -> Surface<'a> {
        Surface {
            tokenizer,
            show_control,
            at_start: tokenizer.vocab.add_space_prefix,
        }
    }

    /// Of what goes on in a text: the first space is kept.
    pub(super) fn continuing(tokenizer: &'a Tokenizer) -> Surface<'a> {
        Surface {
            tokenizer,
            show_control: false,
            at_start: false,
        }
    }

    /// Appends what a piece prints.
    pub(super) fn push(&mut self, id: u32, out: &mut Vec<u8>) {
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

impl<'a> Stream<'a> {
    pub(super) fn new(surface: Surface<'a>) -> Stream<'a> {
        Stream {
            surface,
            pending: Vec::new(),
        }
    }

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
