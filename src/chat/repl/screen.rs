//! What appears: answers on standard output, as they come, and notes on standard error.

use super::markdown::Markdown;
use crate::error::{Error, Result};
use crate::readable::for_terminal;
use std::io::{IsTerminal, Write};

/// Where answers appear.
pub(super) struct Screen {
    terminal: bool,
    /// Only where the terminal knows styles and its user wants them (no-color.org).
    markdown: Option<Markdown>,
}

impl Screen {
    pub(super) fn new() -> Screen {
        Screen {
            terminal: std::io::stdout().is_terminal(),
            markdown: styled().then(Markdown::default),
        }
    }

    /// More of an answer.
    pub(super) fn say(&mut self, text: &str) -> Result<()> {
        if !self.terminal {
            return put(text);
        }
        let text = for_terminal(text);
        match &mut self.markdown {
            Some(markdown) => put(&markdown.push(&text)),
            None => put(&text),
        }
    }

    /// The last of an answer.
    pub(super) fn end(&mut self, text: &str) -> Result<()> {
        self.say(text)?;
        let rest = self.markdown.as_mut().map(Markdown::flush);
        put(&(rest.unwrap_or_default() + "\n"))
    }
}

/// Writes to standard output at once, so that an answer appears as it comes; on a terminal without the
/// escape sequences that a model may spell.
///
/// # Errors
/// [`Error::Io`]; of kind `BrokenPipe` when the reader has gone.
pub fn show(text: &str) -> Result<()> {
    match std::io::stdout().is_terminal() {
        true => put(&for_terminal(text)),
        false => put(text),
    }
}

/// Whether standard output is a terminal that knows styles and whose user wants them (no-color.org).
pub fn styled() -> bool {
    let set = |name| std::env::var_os(name).filter(|value| !value.is_empty());
    let plain = set("NO_COLOR").is_some() || set("TERM").is_none_or(|term| term == "dumb");
    std::io::stdout().is_terminal() && !plain
}

/// Writes to standard output as it is, at once.
///
/// # Errors
/// As for [`show`].
pub fn put(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes())
        .and_then(|()| out.flush())
        .map_err(Error::io("<stdout>", "write"))
}

/// Tells the user something on standard error; nothing is lost where nobody can read it.
pub(super) fn note(text: impl std::fmt::Display) {
    let _ = writeln!(std::io::stderr().lock(), "{text}");
}
