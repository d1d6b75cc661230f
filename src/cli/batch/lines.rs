//! The requests of a batch, a line each: of any length in bounded memory, from a file or from a pipe.

use super::journal::{Finished, LineSum};
use super::{Args, hash};
use crate::error::{Error, Result};
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::time::Duration;

/// The longest line that is read. OpenAI's own limit for a whole file is 200 MB.
pub(super) const MAX_LINE: usize = 16 << 20;

/// Lines of any length in bounded memory.
pub(super) struct BoundedLines<R> {
    reader: R,
    most: usize,
}

/// What is known of a line besides its beginning.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct LineEnd {
    /// Bytes of the whole line, without the line feed.
    pub bytes: u64,
    /// Its last bytes, as many as [`LineEnd::TAIL`].
    pub tail: Vec<u8>,
    /// Whether a line feed ended it; else the file did.
    pub fed: bool,
}

impl LineEnd {
    /// Bytes of a line's end that are told however long it is.
    pub(super) const TAIL: usize = 16;
}

impl<R: BufRead> BoundedLines<R> {
    /// Lines of `reader`, of each of them `most` bytes.
    pub(super) fn new(reader: R, most: usize) -> BoundedLines<R> {
        BoundedLines { reader, most }
    }

    /// Puts the beginning of the next line into `head`. `None`: there is none.
    ///
    /// # Errors
    /// If the reader fails.
    pub(super) fn next(&mut self, head: &mut Vec<u8>) -> std::io::Result<Option<LineEnd>> {
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

pub(super) fn is_blank(line: &[u8]) -> bool {
    line.trim_ascii().is_empty()
}

/// The hash of a line that may be longer than what is in memory of it.
pub(super) fn line_hash(line: &[u8], bytes: u64) -> u64 {
    match bytes > line.len() as u64 {
        false => hash(line.trim_ascii_end()),
        true => hash(&[line, &bytes.to_le_bytes()].concat()),
    }
}

/// The input.
pub(super) struct Lines<'a> {
    path: &'a Path,
    /// The file's size; `None`: it is a pipe, which can be read once.
    pub(super) bytes: Option<u64>,
}

impl<'a> Lines<'a> {
    /// Looks whether the input can be used at all, before a model is loaded.
    pub(super) fn check(args: &'a Args) -> Result<Lines<'a>> {
        let path = args.input.as_path();
        let bytes = match path == Path::new("-") {
            true => None,
            false => {
                let there = std::fs::metadata(path).map_err(Error::io(path, "open"))?;
                there.is_file().then_some(there.len())
            }
        };
        if bytes.is_none() && args.resume {
            return Err(Error::Usage(format!(
                "--resume compares the results with the requests, for which {} must be a file",
                path.display()
            )));
        }
        let same = |a: &Path, b: &Path| a.canonicalize().ok() == b.canonicalize().ok();
        if bytes.is_some() && args.output.exists() && same(path, &args.output) {
            return Err(Error::Usage(format!(
                "{}: the results would be written over the requests",
                path.display()
            )));
        }
        Ok(Lines { path, bytes })
    }

    pub(super) fn open(&self) -> Result<BoundedLines<BufReader<Box<dyn Read + Send>>>> {
        let reader: Box<dyn Read + Send> = match self.path == Path::new("-") {
            true => Box::new(std::io::stdin()),
            false => Box::new(File::open(self.path).map_err(Error::io(self.path, "open"))?),
        };
        let reader = BufReader::with_capacity(1 << 16, reader);
        Ok(BoundedLines::new(reader, MAX_LINE))
    }

    /// How many requests a file has. Those that are done must be the same as ever.
    pub(super) fn count(&self, finished: &Finished, args: &Args) -> Result<Option<u64>> {
        if self.bytes.is_none() {
            return Ok(None);
        }
        let mut lines = self.open()?;
        let (mut line, mut number, mut total) = (Vec::new(), 0, 0);
        let (mut same, mut sum) = (0, LineSum::default());
        while let Some(end) = lines
            .next(&mut line)
            .map_err(Error::io(self.path, "read"))?
        {
            number += 1;
            if is_blank(&line) {
                continue;
            }
            // In order, what is done comes first.
            if finished.has(number) && (args.unordered || same == total) {
                same += 1;
                sum.add(number, line_hash(&line, end.bytes));
            }
            total += 1;
        }
        if !finished.are(same, sum) {
            return Err(Error::invalid(
                &args.output,
                "the file",
                format!("results of {}", self.path.display()),
                "results of other requests; --force begins anew",
            ));
        }
        Ok(Some(total))
    }
}

/// Lines as they are wanted, from a file, or as they come, from a pipe: whoever writes there may take their time,
/// and what runs goes on meanwhile.
pub(super) enum Input {
    File(BoundedLines<BufReader<Box<dyn Read + Send>>>),
    Pipe(Receiver<std::io::Result<(Vec<u8>, u64)>>),
}

/// What an [`Input`] has.
pub(super) enum Next {
    /// A line of so many bytes.
    Line(u64),
    /// Nothing yet.
    NotYet,
    /// No more lines.
    End,
}

impl Input {
    pub(super) fn open(lines: &Lines<'_>) -> Result<Input> {
        let mut reader = lines.open()?;
        if lines.bytes.is_some() {
            return Ok(Input::File(reader));
        }
        let (send, receive) = sync_channel(2);
        std::thread::spawn(move || {
            loop {
                let mut line = Vec::new();
                let next = match reader.next(&mut line) {
                    Ok(Some(end)) => Ok((line, end.bytes)),
                    Ok(None) => break,
                    Err(e) => Err(e),
                };
                // Nobody listens any more, or nothing more can be read.
                let failed = next.is_err();
                if send.send(next).is_err() || failed {
                    break;
                }
            }
        });
        Ok(Input::Pipe(receive))
    }

    /// Puts the next line into `line`. `idle`: there is time to wait for it.
    pub(super) fn next(&mut self, line: &mut Vec<u8>, idle: bool) -> std::io::Result<Next> {
        match self {
            Input::File(lines) => Ok(lines
                .next(line)?
                .map_or(Next::End, |end| Next::Line(end.bytes))),
            Input::Pipe(lines) => {
                // Ctrl-C is heard in between.
                let patience = Duration::from_millis(if idle { 100 } else { 1 });
                match lines.recv_timeout(patience) {
                    Ok(next) => {
                        let (text, bytes) = next?;
                        *line = text;
                        Ok(Next::Line(bytes))
                    }
                    Err(RecvTimeoutError::Timeout) => Ok(Next::NotYet),
                    Err(RecvTimeoutError::Disconnected) => Ok(Next::End),
                }
            }
        }
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
