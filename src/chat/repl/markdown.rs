//! Light rendering of Markdown while it streams: code fences, inline code and bold. All else passes as it is.
//!
//! Text is held back only while it is not certain what it is: a line that may be a fence until it ends, a mark until
//! its partner comes. So a mark that is split over tokens works, and one without a partner on its line is shown as the text it is.

/// Emphasis, as terminals take it (ECMA-48, select graphic rendition).
const BOLD: &str = "\x1b[1m";
/// The lines of a fence itself.
const DIM: &str = "\x1b[2m";
/// Code is cyan.
const CODE: &str = "\x1b[36m";
const PLAIN: &str = "\x1b[0m";

/// Bytes within which a mark must find its partner, and a line show that it is a fence. It bounds what is held back.
const SPAN: usize = 400;

/// The renderer of one answer.
#[derive(Default)]
pub(super) struct Markdown {
    /// What is not certain yet; begins on the line that is being read.
    pending: String,
    /// Whether something of this line has been given out.
    within_line: bool,
    /// Inside a code block: the backticks that opened it.
    fence: Option<usize>,
}

impl Markdown {
    /// The text that became certain with this piece.
    pub(super) fn push(&mut self, text: &str) -> String {
        self.pending.push_str(text);
        self.render(false)
    }

    /// The rest of the text.
    pub(super) fn flush(&mut self) -> String {
        let out = self.render(true);
        *self = Markdown::default();
        out
    }

    fn render(&mut self, ends: bool) -> String {
        let mut out = String::new();
        while !self.pending.is_empty() {
            let (line, whole) = match self.pending.find('\n') {
                Some(at) => (&self.pending[..at], true),
                None => (self.pending.as_str(), false),
            };
            let certain = whole || ends;
            let mut used = line.len();
            if !self.within_line && !certain && may_be_fence(line) {
                break;
            }
            if let Some(fence) = fence(line).filter(|_| !self.within_line) {
                match self.fence {
                    None => {
                        self.fence = Some(fence.ticks);
                        paint(&mut out, DIM, line);
                    }
                    Some(opened) if fence.ticks >= opened && fence.bare => {
                        self.fence = None;
                        paint(&mut out, DIM, line);
                    }
                    Some(_) => paint(&mut out, CODE, line),
                }
            } else if self.fence.is_some() {
                paint(&mut out, CODE, line);
            } else {
                used = prose(line, certain, &mut out);
            }
            self.within_line |= used > 0;
            if whole {
                out.push('\n');
                self.within_line = false;
                used += 1;
            } else if used == 0 {
                break;
            }
            self.pending.drain(..used);
        }
        out
    }
}

/// A line that opens or closes a code block.
struct Fence {
    ticks: usize,
    /// No language behind it: only such a fence can close.
    bare: bool,
}

/// The fence that a whole line is: at most three spaces, at least three backticks, no backtick behind them (CommonMark 0.31, section 4.5).
fn fence(line: &str) -> Option<Fence> {
    let text = line.trim_start_matches(' ');
    let ticks = run(text, '`');
    let info = text[ticks..].trim();
    let good = line.len() - text.len() <= 3 && line.len() <= SPAN;
    let good = good && ticks >= 3 && !info.contains('`');
    good.then_some(Fence {
        ticks,
        bare: info.is_empty(),
    })
}

/// Whether the beginning of a line may still become a fence.
fn may_be_fence(start: &str) -> bool {
    let text = start.trim_start_matches(' ');
    let ticks = run(text, '`');
    let rest = &text[ticks..];
    let open = rest.is_empty() || (ticks >= 3 && !rest.contains('`'));
    open && start.len() - text.len() <= 3 && start.len() <= SPAN
}

/// Renders what is certain of a line of prose; gives the bytes that it used.
fn prose(line: &str, ends: bool, out: &mut String) -> usize {
    let mut at = 0;
    while at < line.len() {
        let rest = &line[at..];
        let next = rest.find(['`', '*']).unwrap_or(rest.len());
        out.push_str(&rest[..next]);
        at += next;
        let rest = &rest[next..];
        let Some(mark) = rest.chars().next() else {
            break;
        };
        let n = run(rest, mark);
        match partner(rest, mark, n, ends) {
            Found::At(end) => {
                let inner = &rest[n..end];
                match mark {
                    '`' => paint(out, CODE, inner),
                    _ => {
                        out.push_str(BOLD);
                        let mut bold = String::new();
                        prose(inner, true, &mut bold);
                        // Code inside ends with everything plain; bold goes on behind it.
                        out.push_str(&bold.replace(PLAIN, &format!("{PLAIN}{BOLD}")));
                        out.push_str(PLAIN);
                    }
                }
                at += end + n;
            }
            Found::Later => return at,
            Found::Never => {
                out.push_str(&rest[..n]);
                at += n;
            }
        }
    }
    at
}

/// Where a mark's partner is.
enum Found {
    At(usize),
    /// It may come yet.
    Later,
    Never,
}

/// Looks for the mark that closes the `n` marks at the start of `text`. `ends`: no more text comes on this line.
fn partner(text: &str, mark: char, n: usize, ends: bool) -> Found {
    let inner = &text[n..];
    if inner.is_empty() {
        // More of the same mark may follow.
        return if ends { Found::Never } else { Found::Later };
    }
    // One star may be a list's or a product's; before a space, stars are no emphasis.
    if mark == '*' && (!(2..=3).contains(&n) || inner.starts_with([' ', '\t'])) {
        return Found::Never;
    }
    let mut at = n;
    while at <= n + SPAN {
        let rest = &text[at..];
        let Some(c) = rest.chars().next() else {
            return if ends { Found::Never } else { Found::Later };
        };
        let ticks = run(rest, c);
        if c == mark {
            let spaced = mark == '*' && text[..at].ends_with([' ', '\t']);
            if ticks == rest.len() && !ends {
                return Found::Later;
            }
            if ticks == n && !spaced {
                return Found::At(at);
            }
            at += ticks;
        } else if c == '`' {
            // Stars inside code are no marks.
            at += match partner(rest, c, ticks, ends) {
                Found::At(end) => end + ticks,
                Found::Later => return Found::Later,
                Found::Never => ticks,
            };
        } else {
            at += c.len_utf8();
        }
    }
    Found::Never
}

/// How many of `mark` the text begins with.
fn run(text: &str, mark: char) -> usize {
    text.len() - text.trim_start_matches(mark).len()
}

/// `text` in a style; nothing for nothing.
fn paint(out: &mut String, style: &str, text: &str) {
    if !text.is_empty() {
        out.extend([style, text, PLAIN]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Styles by letters: `{b:…}`, `{c:…}`, `{d:…}`; pieces of code in a row are one.
    fn readable(text: &str) -> String {
        let mut text = text.to_string();
        for style in [CODE, DIM] {
            text = text.replace(&format!("{PLAIN}{style}"), "");
        }
        text.replace(BOLD, "{b:")
            .replace(CODE, "{c:")
            .replace(DIM, "{d:")
            .replace(PLAIN, "}")
    }

    fn rendered(pieces: impl IntoIterator<Item = impl AsRef<str>>) -> String {
        let mut markdown = Markdown::default();
        let mut out = String::new();
        for piece in pieces {
            out += &markdown.push(piece.as_ref());
        }
        out += &markdown.flush();
        readable(&out)
    }

    const CASES: &[(&str, &str)] = &[
        ("plain * text_with_x * y", "plain * text_with_x * y"),
        ("a **bold** word", "a {b:bold} word"),
        ("***very*** bold", "{b:very} bold"),
        ("2 ** 3 and **kwargs, **", "2 ** 3 and **kwargs, **"),
        ("**not closed\n**bold**", "**not closed\n{b:bold}"),
        ("use `x` and ``a`b``", "use {c:x} and {c:a`b}"),
        ("a ` alone", "a ` alone"),
        ("**a `**` b**", "{b:a {c:**}{b: b}"),
        ("`**` **b**", "{c:**} {b:b}"),
        ("* item **one**\n* two", "* item {b:one}\n* two"),
        (
            "So:\n```rust\nlet **x** = `1`;\n\n  ```x\n```\nafter **b**\n",
            "So:\n{d:```rust}\n{c:let **x** = `1`;}\n\n{c:  ```x}\n{d:```}\nafter {b:b}\n",
        ),
        ("````\n```\n````\n`c`", "{d:````}\n{c:```}\n{d:````}\n{c:c}"),
        ("```one line``` of code", "{c:one line} of code"),
        ("   ```\nx", "{d:   ```}\n{c:x}"),
        ("    ``` indented", "    ``` indented"),
        ("```sh\nnever closed", "{d:```sh}\n{c:never closed}"),
        ("ä **ö** `ü` 日**本**", "ä {b:ö} {c:ü} 日{b:本}"),
    ];

    #[test]
    fn marks_become_styles_however_the_text_is_split() {
        for (text, want) in CASES {
            assert_eq!(rendered([text]), *want, "{text:?}");
            let each = text.chars().map(String::from);
            assert_eq!(rendered(each), *want, "{text:?} by characters");
            for (at, _) in text.char_indices() {
                assert_eq!(rendered([&text[..at], &text[at..]]), *want, "{text:?} {at}");
            }
        }
    }

    #[test]
    fn little_is_held_back() {
        for start in ["**", "`", "```", "a ``"] {
            let mut markdown = Markdown::default();
            let text = format!("{start}{}", "x".repeat(2000));
            let shown = text
                .chars()
                .map(|c| markdown.push(&c.to_string()).len())
                .sum::<usize>();
            assert_eq!(shown, text.len(), "{start}");
            assert_eq!(rendered([&text]), text);
        }
        // Nothing waits in ordinary text.
        assert_eq!(Markdown::default().push("Once upon"), "Once upon");
    }
}
