//! Files that must survive a crash: whole or not at all, and for their owner's eyes where they are private.

use crate::error::{Error, Result};
use std::borrow::Cow;
use std::ffi::OsString;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::Write;
use std::path::{Path, PathBuf};

/// `path` with something behind its name.
pub fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(suffix);
    name.into()
}

/// Options to write a file that only its owner may read, should it be made.
pub fn private() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.write(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    options
}

/// Makes a folder, with those above it, that only its owner may enter, if it is not there.
///
/// # Errors
/// If the system refuses.
pub fn private_folder(path: &Path) -> Result<()> {
    let mut builder = fs::DirBuilder::new();
    builder.recursive(true);
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    builder.create(path).map_err(Error::io(path, "create"))
}

/// Puts a private file in place of what is at `path`: written beside it, flushed to the disk, renamed. Whenever the program or the machine
/// ends, there is the old file or the new one. Only one process may do this to a path at a time ([`lock`]).
///
/// # Errors
/// If the system refuses; what was there is unchanged then.
pub fn replace(path: &Path, bytes: &[u8]) -> Result<()> {
    // A link stays one: what it points to is replaced.
    let path = fs::canonicalize(path).unwrap_or_else(|_| path.to_path_buf());
    let part = beside(&path, ".part");
    // A part that an interrupted run left may have anybody's permissions.
    let _ = fs::remove_file(&part);
    let written = private()
        .create_new(true)
        .open(&part)
        .and_then(|mut file| file.write_all(bytes).and_then(|()| file.sync_all()));
    if let Err(e) = written {
        let _ = fs::remove_file(&part);
        return Err(Error::io(&path, "write")(e));
    }
    fs::rename(&part, &path).map_err(Error::io(&path, "write"))?;
    sync_folder(&path);
    Ok(())
}

/// Makes the creation or renaming of a file last; not every system can, and the file itself is on the disk already.
pub fn sync_folder(path: &Path) {
    let folder = match path.parent() {
        Some(folder) if folder != Path::new("") => Cow::Borrowed(folder),
        _ => Cow::Owned(PathBuf::from(".")),
    };
    if let Ok(folder) = File::open(folder) {
        let _ = folder.sync_all();
    }
}

/// Takes a file for this process alone, until it is closed. `false`: another has it.
pub fn lock(file: &File) -> bool {
    match file.try_lock() {
        Ok(()) => true,
        Err(TryLockError::WouldBlock) => false,
        // Some network file systems have no locks.
        Err(TryLockError::Error(_)) => true,
    }
}

/// Folds bytes into a checksum: enough to tell bytes that reached the disk from those that did not.
pub fn checksum(seed: u64, bytes: &[u8]) -> u64 {
    // An odd number with bits all over it (the fraction of the golden ratio); four lanes hide its latency.
    const MIX: u64 = 0x9e37_79b9_7f4a_7c15;
    let step = |h: u64, word: u64| (h ^ word).wrapping_mul(MIX).rotate_left(29);
    let mut lanes = [seed, seed ^ 1, seed ^ 2, seed ^ 3];
    let (words, rest) = bytes.as_chunks::<32>();
    for words in words {
        for (lane, word) in lanes.iter_mut().zip(words.as_chunks::<8>().0) {
            *lane = step(*lane, u64::from_le_bytes(*word));
        }
    }
    let rest = rest.iter().fold(0, |h, &b| step(h, b.into()));
    lanes.into_iter().fold(step(rest, bytes.len() as u64), step)
}

/// A file's bytes, if it is a file and has at most `most`.
///
/// # Errors
/// If it cannot be read, is a folder or a device, or is longer.
pub fn read(path: &Path, most: u64) -> Result<Vec<u8>> {
    let about = fs::metadata(path).map_err(Error::io(path, "read"))?;
    if !about.is_file() {
        let expected = "an ordinary file";
        return Err(Error::invalid(
            path,
            "what to read",
            expected,
            "a folder or device",
        ));
    }
    if about.len() > most {
        let expected = format!("at most {most} bytes");
        return Err(Error::invalid(path, "its length", expected, about.len()));
    }
    fs::read(path).map_err(Error::io(path, "read"))
}

/// Bytes of `file` as text.
///
/// # Errors
/// [`Error::Invalid`] with the place of the first byte that is not UTF-8.
pub fn utf8(file: &Path, bytes: Vec<u8>) -> Result<String> {
    String::from_utf8(bytes).map_err(|e| {
        let at = e.utf8_error().valid_up_to();
        let found = format!("byte {:#04x} at offset {at}", e.as_bytes()[at]);
        Error::invalid(file, "the text", "valid UTF-8", found)
    })
}
