//! What is written for people: sizes, and texts from outside, which may hold what a terminal obeys.

use std::borrow::Cow;

/// A size.
pub fn bytes(n: u64) -> String {
    let units = [("GiB", 1u64 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)];
    match units.iter().find(|(_, size)| n >= *size) {
        Some((unit, size)) => format!("{:.2} {unit}", n as f64 / *size as f64),
        None => format!("{n} B"),
    }
}

/// A text on one line, its line breaks and terminal escapes shown instead of obeyed: names in a file may hold both.
pub fn one_line(text: &str) -> Cow<'_, str> {
    escaped(text, char::is_control)
}

/// What a terminal should be given of a model's text: byte tokens can spell escape sequences, which are shown instead of
/// obeyed. Line breaks and tabs pass.
pub fn for_terminal(text: &str) -> Cow<'_, str> {
    escaped(text, |c| c.is_control() && c != '\n' && c != '\t')
}

fn escaped(text: &str, bad: impl Fn(char) -> bool) -> Cow<'_, str> {
    if !text.contains(&bad) {
        return text.into();
    }
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match bad(c) {
            true => out.extend(c.escape_default()),
            false => out.push(c),
        }
    }
    out.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_terminal_gets_no_escape_sequences() {
        let text = "é\ttwo\nlines \u{1b}[31mred\u{7}\u{9b}2J";
        let shown = "é\ttwo\nlines \\u{1b}[31mred\\u{7}\\u{9b}2J";
        assert_eq!(for_terminal(text), shown);
        let line = "é\\ttwo\\nlines \\u{1b}[31mred\\u{7}\\u{9b}2J";
        assert_eq!(one_line(text), line);
    }

    #[test]
    fn sizes_have_the_largest_unit_that_fits() {
        assert_eq!(bytes(1023), "1023 B");
        assert_eq!(bytes(1024), "1.00 KiB");
        assert_eq!(bytes(26_442_000_000), "24.63 GiB");
    }
}
