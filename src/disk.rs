//! Files that appear whole or not at all: written under another name, flushed to the disk, then renamed.

use crate::error::{Error, Result};
use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

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
    let mut name = path.as_os_str().to_os_string();
    name.push(".part");
    PathBuf::from(name)
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
    let folder = match path.parent() {
        Some(folder) if folder != Path::new("") => folder,
        _ => Path::new("."),
    };
    if let Ok(folder) = File::open(folder) {
        let _ = folder.sync_all();
    }
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
    }
}
