//! Files that survive a crash: they appear whole or not at all, written under another name, flushed to the disk, then
//! renamed. And files for their owner's eyes alone.

use crate::error::{Error, Result};
use std::ffi::OsString;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// A file that is being written as `NAME.part`. It gets its name in [`WholeFile::finish`]; until then a
/// file of that name stays as it is. Dropped before, it leaves nothing.
pub struct WholeFile {
    path: PathBuf,
    /// `None` once the file has its name.
    out: Option<BufWriter<File>>,
}

impl WholeFile {
    /// Begins the file.
    ///
    /// # Errors
    /// If it cannot be created.
    pub fn create(path: impl AsRef<Path>) -> Result<WholeFile> {
        let path = path.as_ref().to_path_buf();
        if path.is_dir() {
            let what = "the destination";
            return Err(Error::invalid(
                &path,
                what,
                "the name of a file",
                "a folder",
            ));
        }
        let file = File::create(part(&path)).map_err(Error::io(&path, "create"))?;
        let out = Some(BufWriter::new(file));
        Ok(WholeFile { path, out })
    }

    /// Begins a file that only its owner may read. A link at `path` stays one: what it points to is replaced.
    ///
    /// # Errors
    /// If it cannot be created.
    pub fn create_private(path: &Path) -> Result<WholeFile> {
        let path = fs::canonicalize(path).unwrap_or_else(|_| path.to_path_buf());
        // A part that an interrupted run left may have anybody's permissions.
        let _ = fs::remove_file(part(&path));
        let file = private().create_new(true).open(part(&path));
        let out = Some(BufWriter::new(file.map_err(Error::io(&path, "create"))?));
        Ok(WholeFile { path, out })
    }

    /// Flushes it to the disk and gives it its name.
    ///
    /// # Errors
    /// If the system refuses; then nothing is left.
    pub fn finish(mut self) -> Result<()> {
        let written = |e| Error::io(&self.path, "write")(e);
        let out = self.out.as_mut().expect("finish consumes it");
        out.flush().map_err(written)?;
        out.get_ref().sync_all().map_err(written)?;
        rename_part(&self.path)?;
        self.out = None;
        sync_folder(&self.path);
        Ok(())
    }
}

impl Write for WholeFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.out.as_mut().expect("not finished").write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.as_mut().expect("not finished").flush()
    }
}

impl Drop for WholeFile {
    fn drop(&mut self) {
        if self.out.is_some() {
            let _ = fs::remove_file(part(&self.path));
        }
    }
}

/// The name of a file while it is written: `NAME.part`.
pub fn part(path: &Path) -> PathBuf {
    beside(path, ".part")
}

/// `path` with something behind its name.
pub fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(suffix);
    name.into()
}

/// The folder that a file is in.
pub fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if folder != Path::new("") => folder,
        _ => Path::new("."),
    }
}

/// Gives `NAME.part` its name. [`sync_folder`] makes that last.
///
/// # Errors
/// If the system refuses.
pub fn rename_part(path: &Path) -> Result<()> {
    fs::rename(part(path), path).map_err(Error::io(path, "rename to"))
}

/// Makes a rename last; not every system can, and the file itself is on the disk already.
pub fn sync_folder(path: &Path) {
    if let Ok(folder) = File::open(folder_of(path)) {
        let _ = folder.sync_all();
    }
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

/// Takes a file for this process alone, until it is closed. `false`: another has it, and still has after a moment:
/// one that is just ending, or a child of this one that has not begun its own program, soon lets go.
pub fn lock(file: &File) -> bool {
    for _ in 0..20 {
        match file.try_lock() {
            Ok(()) => return true,
            Err(TryLockError::WouldBlock) => std::thread::sleep(Duration::from_millis(10)),
            // Some network file systems have no locks.
            Err(TryLockError::Error(_)) => return true,
        }
    }
    false
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_or_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        fs::write(&path, "old").unwrap();
        let mut file = WholeFile::create(&path).unwrap();
        file.write_all(b"new").unwrap();
        drop(file);
        assert_eq!(fs::read(&path).unwrap(), b"old");
        let mut file = WholeFile::create(&path).unwrap();
        file.write_all(b"new").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"old", "not yet");
        file.finish().unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"new");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        assert_eq!(folder_of(Path::new("a")), Path::new("."));
        assert_eq!(folder_of(Path::new("a/b")), Path::new("a"));
    }
}
