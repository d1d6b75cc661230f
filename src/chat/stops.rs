//! The text of an answer as it comes, up to the first text that ends it.

use super::tokenizer::Stream;
use std::borrow::Cow;

/// Turns tokens into text and holds back what may be the beginning of a stop text, so that nothing of one is
/// ever shown, in however many tokens it arrives.
pub struct AnswerText<'a> {
    stream: Stream<'a>,
    stops: Cow<'a, [String]>,
    held: String,
    stopped: bool,
}

impl<'a> AnswerText<'a> {
    /// An answer that ends before any of `stops`; empty ones end nothing.
    pub fn new(stream: Stream<'a>, stops: impl Into<Cow<'a, [String]>>) -> AnswerText<'a> {
        AnswerText {
            stream,
            stops: stops.into(),
            held: String::new(),
            stopped: false,
        }
    }

    /// The text that became certain with this token; may be empty.
    pub fn push(&mut self, id: u32) -> String {
        let text = self.stream.push(id);
        self.held.push_str(&text);
        self.release(false)
    }

    /// The rest of the text, when no more tokens come.
    pub fn flush(&mut self) -> String {
        let text = self.stream.flush();
        self.held.push_str(&text);
        self.release(true)
    }

    /// Whether a stop text has come: nothing after it is given.
    pub fn stopped(&self) -> bool {
        self.stopped
    }

    fn release(&mut self, end: bool) -> String {
        let stops = || self.stops.iter().filter(|stop| !stop.is_empty());
        if self.stopped {
            self.held.clear();
        }
        if let Some(at) = stops().filter_map(|stop| self.held.find(stop)).min() {
            self.stopped = true;
            self.held.truncate(at);
            return std::mem::take(&mut self.held);
        }
        let begins = |at: &usize| stops().any(|stop| stop.starts_with(&self.held[*at..]));
        let places = || self.held.char_indices().map(|(at, _)| at);
        let keep = match end {
            true => None,
            false => places().find(begins),
        };
        let rest = self.held.split_off(keep.unwrap_or(self.held.len()));
        std::mem::replace(&mut self.held, rest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chat::tokenizer::Tokenizer;
    use std::path::Path;

    /// What is shown of a text that comes a character at a time, and whether it was stopped.
    fn shown(text: &str, stops: &[&str]) -> (Vec<String>, bool) {
        let path = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("tests/data/tokenizers/demo.tokenizer.model");
        let tokenizer = Tokenizer::from_path(&path).unwrap();
        let stops: Vec<String> = stops.iter().map(|s| s.to_string()).collect();
        let mut answer = AnswerText::new(tokenizer.stream_continuing(), &stops);
        let mut parts = Vec::new();
        for c in text.chars() {
            for id in tokenizer.encode_with(&c.to_string(), false, false) {
                parts.push(answer.push(id));
            }
        }
        parts.push(answer.flush());
        (parts, answer.stopped())
    }

    #[test]
    fn nothing_of_a_stop_text_is_shown() {
        for (text, stops, want) in [
            ("one two three", &["two"][..], ("one ", true)),
            ("one two three", &["three", "two"], ("one ", true)),
            ("aaab", &["aab"], ("a", true)),
            ("abcabd", &["abd"], ("abc", true)),
            ("abcabd", &["abd", "bcab"], ("a", true)),
            ("half a sto", &["stop"], ("half a sto", false)),
            ("nothing", &["", "x"], ("nothing", false)),
            ("süß und ß", &["ß u"], ("sü", true)),
        ] {
            let (parts, stopped) = shown(text, stops);
            assert_eq!((parts.concat().as_str(), stopped), want, "{text} {stops:?}");
        }
    }

    #[test]
    fn text_waits_no_longer_than_it_must() {
        let (parts, _) = shown("astonish", &["stop"]);
        assert_eq!(parts[..5], ["a", "", "", "", "ston"]);
        let (parts, _) = shown("plain", &[]);
        assert_eq!(parts[..5], ["p", "l", "a", "i", "n"]);
    }
}
