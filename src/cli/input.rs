//! Text that comes from files and pipes.

use super::report::note;
use crate::disk::utf8;
use crate::error::{Error, Result};
use crate::gguf::MAGIC;
use crate::near;
use std::io::{BufRead, IsTerminal, Read};
use std::path::Path;

/// A file's text, or standard input's for `None` or `-`.
///
/// # Errors
/// If it cannot be read or is not UTF-8.
pub(super) fn read_text(file: Option<&Path>) -> Result<String> {
    let (name, bytes) = match file {
        Some(path) if path != Path::new("-") => (path, read_file(path)?),
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

/// A file's bytes, unless it is a model: that is no text, and may be larger than the memory.
fn read_file(path: &Path) -> Result<Vec<u8>> {
    let mut file = std::fs::File::open(path).map_err(|e| {
        let near = match e.kind() {
            std::io::ErrorKind::NotFound => near::file(path),
            _ => None,
        };
        let hint = near.map(|near| format!("did you mean {}?", near.display()));
        Error::io(path, "read")(e).hint(hint)
    })?;
    let mut bytes = Vec::new();
    let start = MAGIC.len() as u64;
    let read = Read::by_ref(&mut file).take(start).read_to_end(&mut bytes);
    read.map_err(Error::io(path, "read"))?;
    if bytes == MAGIC {
        let found = "a GGUF file; a model belongs behind --model";
        return Err(Error::invalid(path, "the text", "text", found));
    }
    file.read_to_end(&mut bytes)
        .map_err(Error::io(path, "read"))?;
    Ok(bytes)
}

/// Standard input's lines without their ends (`\n` or `\r\n`), one at a time.
///
/// # Errors
/// Each line, if it cannot be read or is not UTF-8.
pub(super) fn lines() -> impl Iterator<Item = Result<String>> {
    let name = Path::new("<stdin>");
    std::io::stdin().lock().split(b'\n').map(move |line| {
        let mut line = line.map_err(Error::io(name, "read"))?;
        if line.last() == Some(&b'\r') {
            line.pop();
        }
        utf8(name, line)
    })
}
