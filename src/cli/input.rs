//! Text that comes from files and pipes.

use crate::disk::utf8;
use crate::error::{Error, Result};
use std::io::{BufRead, IsTerminal, Read, Write};
use std::path::Path;

/// A file's text, or standard input's for `None` or `-`.
///
/// # Errors
/// If it cannot be read or is not UTF-8.
pub fn read_text(file: Option<&Path>) -> Result<String> {
    let (name, bytes) = match file {
        Some(path) if path != Path::new("-") => {
            (path, std::fs::read(path).map_err(Error::io(path, "read"))?)
        }
        _ => {
            let name = Path::new("<stdin>");
            if std::io::stdin().is_terminal() {
                note("reading from the terminal; Ctrl-D ends the text");
            }
            let mut bytes = Vec::new();
            std::io::stdin()
                .lock()
                .read_to_end(&mut bytes)
                .map_err(Error::io(name, "read"))?;
            (name, bytes)
        }
    };
    utf8(name, bytes)
}

/// Standard input's lines without their ends (`\n` or `\r\n`), one at a time.
///
/// # Errors
/// Each line, if it cannot be read or is not UTF-8.
pub fn lines() -> impl Iterator<Item = Result<String>> {
    let name = Path::new("<stdin>");
    std::io::stdin().lock().split(b'\n').map(move |line| {
        let mut line = line.map_err(Error::io(name, "read"))?;
        if line.last() == Some(&b'\r') {
            line.pop();
        }
        utf8(name, line)
    })
}

/// Tells the user something on standard error. Where nobody can read it, nothing is lost: `eprintln!`
/// would panic there.
pub fn note(text: impl std::fmt::Display) {
    let _ = writeln!(std::io::stderr().lock(), "octet: {text}");
}
