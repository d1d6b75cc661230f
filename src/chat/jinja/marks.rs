//! The marks of a vocabulary: guarded in what was typed, ids where the template itself wrote them.

use crate::bounded;
use crate::chat::message::Message;
use crate::chat::tokenizer::{Matcher, PieceKind, Tokenizer};
use serde_json::Value;
use std::collections::HashSet;

/// The pieces that a template writes to mark turns.
pub(super) struct Marks {
    texts: Vec<String>,
    matcher: Matcher,
}

impl Marks {
    pub(super) fn new(tok: &Tokenizer) -> Marks {
        let marks: Vec<(String, u32)> = (0u32..)
            .zip(tok.pieces())
            .filter(|(_, p)| matches!(p.kind, PieceKind::Control | PieceKind::UserDefined))
            // A guard needs two characters to stand between; white space is layout and no mark.
            .map(|(id, p)| (p.text.replace('\u{2581}', " "), id))
            .filter(|(text, _)| text.chars().nth(1).is_some() && !text.trim().is_empty())
            .collect();
        let matcher = Matcher::from_texts(marks.iter().map(|(text, id)| (text.clone(), *id)));
        Marks {
            texts: marks.into_iter().map(|(text, _)| text).collect(),
            matcher,
        }
    }

    pub(super) fn guard_message(&self, message: &Message, guard: char) -> Value {
        let mut value = message.to_json();
        // Templates expect arguments as an object.
        if let Some(calls) = value.get_mut("tool_calls").and_then(Value::as_array_mut) {
            for arguments in calls
                .iter_mut()
                .filter_map(|c| c.pointer_mut("/function/arguments"))
            {
                let object = arguments
                    .as_str()
                    .and_then(|text| bounded::json(text.as_bytes()).ok());
                if let Some(object) = object.filter(Value::is_object) {
                    *arguments = object;
                }
            }
        }
        let role = value["role"].clone(); // ours, and compared by every template
        let mut value = self.guard_value(&value, guard);
        value["role"] = role;
        value
    }

    /// All strings inside a value, keys too.
    pub(super) fn guard_value(&self, value: &Value, guard: char) -> Value {
        match value {
            Value::String(text) => self.guard_text(text, guard).into(),
            Value::Array(items) => items.iter().map(|v| self.guard_value(v, guard)).collect(),
            Value::Object(map) => map
                .iter()
                .map(|(k, v)| (self.guard_text(k, guard), self.guard_value(v, guard)))
                .collect(),
            other => other.clone(),
        }
    }

    pub(super) fn guard_text(&self, text: &str, guard: char) -> String {
        // Byte offsets before which the guard goes.
        let mut places = HashSet::new();
        let after_first = |at: usize| at + text[at..].chars().next().map_or(0, char::len_utf8);
        for (at, _) in text.char_indices() {
            if self.matcher.longest_at(text, at).is_some() {
                places.insert(after_first(at));
            }
        }
        let (trimmed, left) = (text.trim_end(), text.len() - text.trim_start().len());
        for mark in &self.texts {
            for (cut, _) in mark.char_indices().skip(1) {
                let (head, tail) = mark.split_at(cut);
                for end in [text, trimmed] {
                    if end.ends_with(head) {
                        places.insert(after_first(end.len() - head.len()));
                    }
                }
                for start in [0, left] {
                    if text[start..].starts_with(tail) {
                        let last = tail.char_indices().next_back().map_or(0, |(i, _)| i);
                        places.insert(start + last);
                    }
                }
            }
        }
        if places.is_empty() {
            return text.to_string();
        }
        let mut out = String::with_capacity(text.len() + 4 * places.len());
        for (at, c) in text.char_indices() {
            if places.contains(&at) {
                out.push(guard);
            }
            out.push(c);
        }
        if places.contains(&text.len()) {
            out.push(guard);
        }
        out
    }

    /// The ids of a rendered prompt: whole marks are ids, the rest is text.
    pub(super) fn ids(&self, tok: &Tokenizer, rendered: &str, guard: char) -> Vec<u32> {
        let mut out = Vec::new();
        let text = |from: usize, to: usize, out: &mut Vec<u32>| {
            let text = rendered[from..to].replace(guard, "");
            out.extend(tok.encode_with(&text, tok.add_space_prefix(), false));
        };
        let (mut from, mut at) = (0, 0);
        while at < rendered.len() {
            match self.matcher.longest_at(rendered, at) {
                Some((id, len)) => {
                    text(from, at, &mut out);
                    out.push(id);
                    at += len;
                    from = at;
                }
                None => at += 1,
            }
        }
        text(from, at, &mut out);
        out
    }
}
