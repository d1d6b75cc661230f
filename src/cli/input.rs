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
pub fn read_text(file: Option<&Path>) -> Result<String> {
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

/// Lines of any length in bounded memory.
pub struct BoundedLines<R> {
    reader: R,
    most: usize,
}

/// What is known of a line besides its beginning.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct LineEnd {
    /// Bytes of the whole line, without the line feed.
    pub bytes: u64,
    /// Its last bytes, as many as [`LineEnd::TAIL`].
    pub tail: Vec<u8>,
    /// Whether a line feed ended it; else the file did.
    pub fed: bool,
}

impl LineEnd {
    /// Bytes of a line's end that are told however long it is.
    pub const TAIL: usize = 16;
}

impl<R: BufRead> BoundedLines<R> {
    /// Lines of `reader`, of each of them `most` bytes.
    pub fn new(reader: R, most: usize) -> BoundedLines<R> {
        BoundedLines { reader, most }
    }

    /// Puts the beginning of the next line into `head`. `None`: there is none.
    ///
    /// # Errors
    /// If the reader fails.
    pub fn next(&mut self, head: &mut Vec<u8>) -> std::io::Result<Option<LineEnd>> {
        head.clear();
        let mut end = LineEnd::default();
        let mut any = false;
        while !end.fed {
            let part = match self.reader.fill_buf() {
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => continue,
                part => part?,
            };
            if part.is_empty() {
                break;
            }
            any = true;
            let feed = part.iter().position(|b| *b == b'\n');
            let text = &part[..feed.unwrap_or(part.len())];
            head.extend_from_slice(&text[..text.len().min(self.most - head.len())]);
            end.tail
                .extend_from_slice(&text[text.len().saturating_sub(LineEnd::TAIL)..]);
            end.tail
                .drain(..end.tail.len().saturating_sub(LineEnd::TAIL));
            end.bytes += text.len() as u64;
            end.fed = feed.is_some();
            let used = text.len() + usize::from(end.fed);
            self.reader.consume(used);
        }
        Ok(any.then_some(end))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_bounded() {
        let text = b"ab\n\r\n\n0123456789abcdefghijklmnopqrstuvwxyz\nend";
        for buffer in [1, 3, 100] {
            let reader = std::io::BufReader::with_capacity(buffer, &text[..]);
            let mut lines = BoundedLines::new(reader, 5);
            let mut head = Vec::new();
            for (want, bytes, tail, fed) in [
                ("ab", 2, "ab", true),
                ("\r", 1, "\r", true),
                ("", 0, "", true),
                ("01234", 36, "klmnopqrstuvwxyz", true),
                ("end", 3, "end", false),
            ] {
                let end = lines.next(&mut head).unwrap().unwrap();
                assert_eq!(head, want.as_bytes());
                let tail = tail.as_bytes().to_vec();
                assert_eq!(end, LineEnd { bytes, tail, fed });
            }
            assert_eq!(lines.next(&mut head).unwrap(), None);
        }
    }
}
