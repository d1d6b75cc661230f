//! The results of a batch on disk: each of them once and whole, in the order of the lines, whatever ends the
//! program.
//!
//! A result is appended and synced before it counts. Its id says which line, of which text, under which
//! settings it answers, so that a later run can tell what is done and that it is the same work. Results that
//! come before their turn wait in a second file, `OUT.ahead`, and lose no work either.

use super::lines::{BoundedLines, LineEnd};
use crate::disk::{self, WholeFile};
use crate::error::{Error, Result};
use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{BufReader, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

/// What a result answers; its text is the result's `id`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Id {
    /// Hash of the model and of all settings that change answers.
    pub settings: u64,
    /// The line's number, from 1.
    pub line: u64,
    /// Hash of the line's bytes.
    pub text: u64,
}

impl Id {
    /// The hashes' bits that the id says.
    pub const BITS: u64 = (1 << 48) - 1;
    /// What a result begins with.
    const START: &str = r#"{"id":"batch_req_"#;

    /// The id at the beginning of a result.
    fn find(head: &[u8]) -> Option<Id> {
        let head = std::str::from_utf8(head).ok()?;
        let (id, _) = head.strip_prefix(Id::START)?.split_once('"')?;
        let mut parts = id.split('_');
        let found = Id {
            settings: u64::from_str_radix(parts.next()?, 16).ok()?,
            line: parts.next()?.parse().ok()?,
            text: u64::from_str_radix(parts.next()?, 16).ok()?,
        };
        (found.to_string() == id).then_some(found)
    }
}

/// Without the prefix of its kind, such as `batch_req_`.
impl fmt::Display for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:012x}_{}_{:012x}", self.settings, self.line, self.text)
    }
}

/// The end of a result that is no error.
const FINE: &[u8] = br#""error":null}"#;

/// A result that a file holds.
struct Held {
    id: Id,
    failed: bool,
    at: u64,
    bytes: u64,
}

/// The results in `file`, one after the other; returns the bytes that whole results take. What follows them, a line
/// that was being written when the program ended, is no result.
fn read_results(
    path: &Path,
    file: &mut File,
    mut each: impl FnMut(Held) -> Result<()>,
) -> Result<u64> {
    let failed = || Error::io(path, "read");
    file.rewind().map_err(failed())?;
    let mut lines = BoundedLines::new(BufReader::with_capacity(1 << 16, file), 128);
    let (mut head, mut at, mut number) = (Vec::new(), 0, 0);
    while let Some(end) = lines.next(&mut head).map_err(failed())? {
        number += 1;
        let LineEnd { bytes, tail, fed } = end;
        if !fed {
            break;
        }
        let Some(id) = Id::find(&head).filter(|_| tail.ends_with(b"}")) else {
            return Err(Error::invalid(
                path,
                format!("line {number}"),
                "a result of octet batch",
                "something else",
            ));
        };
        each(Held {
            id,
            failed: !tail.ends_with(FINE),
            at,
            bytes: bytes + 1,
        })?;
        at += bytes + 1;
    }
    Ok(at)
}

/// Which lines an earlier run has done. It takes a bit for each line of the input.
#[derive(Default)]
pub struct Finished {
    bits: Vec<u64>,
    /// How many.
    pub lines: u64,
    /// How many of them failed.
    pub failed: u64,
    /// Shows whether the lines are still the same.
    sum: LineSum,
}

/// A sum over lines, their numbers and texts, in any order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LineSum(u64);

impl LineSum {
    /// Adds a line with this hash of its text.
    pub fn add(&mut self, line: u64, text: u64) {
        // A factor for each place, so that lines that changed places change the sum.
        let place = line ^ 0x9e37_79b9_7f4a_7c15;
        self.0 = self.0.wrapping_add(text.wrapping_mul(place));
    }
}

impl Finished {
    /// Whether a line is done.
    pub fn has(&self, line: u64) -> bool {
        let word = self.bits.get((line / 64) as usize);
        word.is_some_and(|word| word >> (line % 64) & 1 == 1)
    }

    fn add(&mut self, held: &Held) {
        let at = (held.id.line / 64) as usize;
        self.bits.resize(self.bits.len().max(at + 1), 0);
        self.bits[at] |= 1 << (held.id.line % 64);
        self.lines += 1;
        self.failed += u64::from(held.failed);
        self.sum.add(held.id.line, held.id.text);
    }

    /// Whether so many lines with this sum are those that are done.
    pub fn are(&self, lines: u64, sum: LineSum) -> bool {
        (self.lines, self.sum) == (lines, sum)
    }
}

/// Where results go.
enum Out {
    /// A file, synced after each step.
    File(File),
    /// What nobody can continue: a pipe, a terminal, a device.
    Stream(Box<dyn Write>),
}

/// The output of a batch.
pub struct Journal {
    path: PathBuf,
    out: Out,
    written: bool,
    /// What waits for its turn; `None`: there are no turns.
    turns: Option<Turns>,
}

/// Results that came before those of earlier lines.
struct Turns {
    path: PathBuf,
    file: File,
    /// Where the next one goes.
    end: u64,
    /// So many bytes are few enough.
    most: u64,
    /// By line: the id, and where the result is.
    held: HashMap<u64, Held>,
    /// The lines whose results are still to be written, in order.
    order: VecDeque<u64>,
    written: bool,
}

/// How to open the output.
#[derive(Clone, Copy, Debug)]
pub struct Mode {
    /// Continue what is there.
    pub resume: bool,
    /// Write over what is there.
    pub force: bool,
    /// Write results as they come.
    pub unordered: bool,
    /// The hash of the settings, which what is there must have, too.
    pub settings: u64,
    /// The largest line number that can be.
    pub most_lines: u64,
}

impl Journal {
    /// Opens the output, `-` for standard output, and says what is done already.
    ///
    /// # Errors
    /// [`Error::Usage`] if the output is there and may not be continued or written over, or another process is
    /// writing it; [`Error::Invalid`] if it is the output of something else.
    pub fn open(path: &Path, mode: Mode) -> Result<(Journal, Finished)> {
        if let Some(stream) = stream(path)? {
            let turns = match mode.unordered {
                true => None,
                false => Some(Turns::nameless()?),
            };
            let journal = Journal {
                path: path.to_path_buf(),
                out: Out::Stream(stream),
                written: false,
                turns,
            };
            return Ok((journal, Finished::default()));
        }
        let mut file = open_file(path, mode.resume || mode.force)?;
        if !disk::lock(&file) {
            let why = format!("{}: another octet is writing this file", path.display());
            return Err(Error::Usage(why));
        }
        let (mut finished, mut last, mut keep) = (Finished::default(), 0, 0);
        if mode.resume {
            keep = read_results(path, &mut file, |held| {
                check(path, &held, &mode)?;
                let turn = mode.unordered || held.id.line > last;
                if !turn || finished.has(held.id.line) {
                    let expected = match mode.unordered {
                        true => "one result for each line",
                        false => "results in the order of the lines",
                    };
                    let found = format!("line {} after line {last}", held.id.line);
                    return Err(Error::invalid(path, "the file", expected, found));
                }
                last = held.id.line;
                finished.add(&held);
                Ok(())
            })?;
        }
        file.set_len(keep)
            .and_then(|()| file.seek(SeekFrom::Start(keep)))
            .and_then(|_| file.sync_all())
            .map_err(Error::io(path, "write"))?;
        disk::sync_folder(path);
        let turns = match mode.unordered {
            true => None,
            false => Some(Turns::open(path, &mode, last)?),
        };
        let journal = Journal {
            path: path.to_path_buf(),
            out: Out::File(file),
            written: false,
            turns,
        };
        Ok((journal, finished))
    }

    /// Says that a line's result will come, in the order of the lines. If it is there already, from an
    /// earlier run, says whether that one failed.
    ///
    /// # Errors
    /// If the output cannot be written.
    pub fn expect(&mut self, id: Id) -> Result<Option<bool>> {
        let Some(turns) = &mut self.turns else {
            return Ok(None);
        };
        turns.order.push_back(id.line);
        match turns.held.get(&id.line) {
            Some(held) if held.id == id => {
                let failed = held.failed;
                self.take_turns()?;
                Ok(Some(failed))
            }
            Some(_) => {
                turns.held.remove(&id.line);
                Ok(None)
            }
            None => Ok(None),
        }
    }

    /// Results that wait for their turn.
    pub fn waiting(&self) -> usize {
        self.turns.as_ref().map_or(0, |turns| turns.held.len())
    }

    /// Takes the result of an expected line; `rest` is what follows its id, from the comma on.
    ///
    /// # Errors
    /// If the output cannot be written.
    pub fn put(&mut self, id: Id, rest: &str, failed: bool) -> Result<()> {
        let result = format!("{}{id}\"{rest}\n", Id::START);
        let Some(turns) = &mut self.turns else {
            return self.write(result.as_bytes());
        };
        if turns.order.front() == Some(&id.line) {
            turns.order.pop_front();
            self.write(result.as_bytes())?;
            return self.take_turns();
        }
        let failure = Error::io(&turns.path, "write");
        turns.file.write_all(result.as_bytes()).map_err(failure)?;
        let held = Held {
            id,
            failed,
            at: turns.end,
            bytes: result.len() as u64,
        };
        turns.end += held.bytes;
        turns.held.insert(id.line, held);
        turns.written = true;
        Ok(())
    }

    /// Makes everything so far outlast a power failure.
    ///
    /// # Errors
    /// If the output cannot be written.
    pub fn sync(&mut self) -> Result<()> {
        if std::mem::take(&mut self.written)
            && let Out::File(file) = &self.out
        {
            file.sync_data().map_err(Error::io(&self.path, "write"))?;
        }
        let Some(turns) = &mut self.turns else {
            return Ok(());
        };
        if turns.held.is_empty() && turns.end > 0 {
            turns.end = 0;
            turns.written = false;
            let emptied = turns.file.set_len(0);
            emptied.map_err(Error::io(&turns.path, "write"))?;
            return turns.seek_end();
        }
        if turns.end > turns.most {
            turns.written = false;
            return turns.shrink(matches!(self.out, Out::File(_)));
        }
        match std::mem::take(&mut turns.written) && matches!(self.out, Out::File(_)) {
            true => turns.file.sync_data(),
            false => Ok(()),
        }
        .map_err(Error::io(&turns.path, "write"))
    }

    /// Writes the held results whose turn it is.
    fn take_turns(&mut self) -> Result<()> {
        let mut result = Vec::new();
        while let Some(turns) = &mut self.turns
            && let Some(line) = turns.order.front()
            && let Some(held) = turns.held.remove(line)
        {
            turns.order.pop_front();
            turns.read(&held, &mut result)?;
            turns.seek_end()?;
            self.write(&result)?;
        }
        Ok(())
    }

    fn write(&mut self, result: &[u8]) -> Result<()> {
        self.written = true;
        match &mut self.out {
            Out::File(file) => file.write_all(result),
            Out::Stream(out) => out.write_all(result).and_then(|()| out.flush()),
        }
        .map_err(Error::io(&self.path, "write"))
    }
}

/// The file of results ahead of their turn goes when nothing is in it.
impl Drop for Turns {
    fn drop(&mut self) {
        if self.held.is_empty() {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

impl Turns {
    /// `last`: the last line whose result is in the output at `out`.
    fn open(out: &Path, mode: &Mode, last: u64) -> Result<Turns> {
        let path = disk::beside(out, ".ahead");
        // A run may have been killed while it shrank the file.
        let _ = std::fs::remove_file(disk::part(&path));
        let mut turns = Turns::new(open_file(&path, true)?, path.clone());
        if mode.resume {
            turns.end = read_results(&path, &mut turns.file, |result| {
                check(&path, &result, mode)?;
                if result.id.line > last {
                    turns.held.insert(result.id.line, result);
                }
                Ok(())
            })?;
        }
        let end = turns.end;
        let cut = turns.file.set_len(end);
        cut.map_err(Error::io(&path, "write"))?;
        turns.seek_end()?;
        Ok(turns)
    }

    fn seek_end(&mut self) -> Result<()> {
        let sought = self.file.seek(SeekFrom::Start(self.end));
        sought.map(drop).map_err(Error::io(&self.path, "write"))
    }

    fn read(&mut self, held: &Held, result: &mut Vec<u8>) -> Result<()> {
        result.resize(held.bytes as usize, 0);
        let sought = self.file.seek(SeekFrom::Start(held.at));
        let read = sought.and_then(|_| self.file.read_exact(result));
        read.map_err(Error::io(&self.path, "read"))
    }

    /// Writes the file anew with only what it holds still, and all of that synced. `named`: it keeps its name.
    fn shrink(&mut self, named: bool) -> Result<()> {
        let mut file = WholeFile::create_private(&self.path)?;
        let mut held: Vec<_> = std::mem::take(&mut self.held).into_iter().collect();
        held.sort_by_key(|(_, held)| held.at);
        let (mut result, mut end) = (Vec::new(), 0);
        for (_, held) in &mut held {
            self.read(held, &mut result)?;
            let written = file.write_all(&result);
            written.map_err(Error::io(&self.path, "write"))?;
            held.at = end;
            end += held.bytes;
        }
        file.finish()?;
        self.held = held.into_iter().collect();
        self.file = open_file(&self.path, true)?;
        if !named {
            let _ = std::fs::remove_file(&self.path);
        }
        self.end = end;
        // As much again may come before it is worth the trouble.
        self.most = (2 * end).max(Turns::ENOUGH);
        self.seek_end()
    }

    /// A file of so many bytes is never too large.
    const ENOUGH: u64 = 16 << 20;

    /// Beside a stream: a file that goes with the program, readable for its owner alone.
    fn nameless() -> Result<Turns> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let now = now.map_or(0, |d| d.as_nanos());
        let path = std::env::temp_dir().join(format!("octet-{}-{now}.ahead", std::process::id()));
        let mut options = disk::private();
        let options = options.read(true).create_new(true);
        let file = options.open(&path).map_err(Error::io(&path, "create"))?;
        // Where a file that is open cannot go, it goes at the end.
        let _ = std::fs::remove_file(&path);
        Ok(Turns::new(file, path))
    }

    fn new(file: File, path: PathBuf) -> Turns {
        Turns {
            path,
            file,
            end: 0,
            most: Turns::ENOUGH,
            held: HashMap::new(),
            order: VecDeque::new(),
            written: false,
        }
    }
}

/// Standard output for `-`, or what is there and is no regular file.
fn stream(path: &Path) -> Result<Option<Box<dyn Write>>> {
    if path == Path::new("-") {
        return Ok(Some(Box::new(std::io::stdout())));
    }
    match std::fs::metadata(path) {
        Ok(there) if !there.is_file() => {
            let file = OpenOptions::new().write(true).open(path);
            Ok(Some(Box::new(file.map_err(Error::io(path, "open"))?)))
        }
        _ => Ok(None),
    }
}

/// A new file, or the one that is there, if `there` allows it.
fn open_file(path: &Path, there: bool) -> Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true);
    match there {
        true => options.create(true),
        false => options.create_new(true),
    };
    options.open(path).map_err(|e| match e.kind() {
        std::io::ErrorKind::AlreadyExists => Error::Usage(format!(
            "{}: the file is there already; --resume continues it, --force writes over it",
            path.display()
        )),
        _ => Error::io(path, "create")(e),
    })
}

/// Whether a result that is there could be of this run.
fn check(path: &Path, held: &Held, mode: &Mode) -> Result<()> {
    if held.id.settings != mode.settings {
        let expected = "results of this model, these settings and this octet";
        return Err(Error::invalid(path, "the file", expected, "other results"));
    }
    if held.id.line > mode.most_lines {
        let found = format!("line {}", held.id.line);
        return Err(Error::invalid(
            path,
            "the file",
            "lines of this input",
            found,
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    /// While one line after the other is late, results that were written must not pile up beside the output.
    #[test]
    fn the_file_of_results_ahead_does_not_grow_without_bounds() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("out.jsonl");
        let ahead = folder.path().join("out.jsonl.ahead");
        let mode = Mode {
            resume: true,
            force: false,
            unordered: false,
            settings: 7,
            most_lines: 1000,
        };
        let id = |line: u64| Id {
            settings: 7,
            line,
            text: line,
        };
        let rest = format!(",\"text\":\"{}\",\"error\":null}}", "x".repeat(1 << 20));
        let (mut journal, _) = Journal::open(&path, mode).unwrap();
        for line in 1..=60 {
            assert_eq!(journal.expect(id(line)).unwrap(), None);
        }
        journal.put(id(2), &rest, false).unwrap();
        for line in (1..50).step_by(2) {
            // There is always one ahead when the late one comes.
            journal.put(id(line + 3), &rest, false).unwrap();
            journal.put(id(line), &rest, false).unwrap();
            journal.sync().unwrap();
            let bytes = fs::metadata(&ahead).unwrap().len();
            assert!(
                bytes < Turns::ENOUGH + (2 << 20),
                "{bytes} after line {line}"
            );
        }
        assert!(!disk::part(&ahead).exists());
        drop(journal);
        // What is left in it is not lost.
        let (mut journal, finished) = Journal::open(&path, mode).unwrap();
        assert_eq!((finished.lines, journal.waiting()), (50, 1));
        for line in 51..=60 {
            let there = journal.expect(id(line)).unwrap();
            assert_eq!(there.is_some(), line == 52);
        }
        for line in (51..=60).filter(|line| *line != 52) {
            journal.put(id(line), &rest, false).unwrap();
        }
        journal.sync().unwrap();
        drop(journal);
        let (_, finished) = Journal::open(&path, mode).unwrap();
        assert_eq!(finished.lines, 60);
    }
}
