//! A file of a model as it lies on the disk: mapped, and read past the page cache.

use super::mistaken;
use crate::error::{Error, Result};
use memmap2::{Mmap, MmapOptions};
use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

/// Reads past the page cache begin at multiples of this in the file and in memory, and have such lengths: no disk that
/// is in use has larger blocks.
pub const PAGE: usize = 4096;

/// A failing read is tried this often, with a pause between.
const TRIES: u32 = 4;
/// The first pause; each is twice the one before.
const PAUSE: Duration = Duration::from_millis(20);

/// Bytes that [`Source::fetch`] asks for at a time, and how many such requests are on their way.
#[cfg(unix)]
const FETCH: usize = 8 << 20;
#[cfg(unix)]
const FETCHES: usize = 3;

/// An open file that does not change while it is used.
pub struct Source {
    path: PathBuf,
    file: File,
    /// The same file past the page cache, where the system and the file system offer that.
    direct: Option<File>,
    /// The file system has refused such a read after all.
    refused: AtomicBool,
    map: Mmap,
    modified: Option<SystemTime>,
}

impl Source {
    /// Opens and maps a file.
    ///
    /// # Errors
    /// If it is no file, is empty, or cannot be opened and mapped.
    pub(super) fn open(path: &Path) -> Result<Source> {
        let wrong = |found: &str| Error::invalid(path, "the model file", "a GGUF file", found);
        // Asked before opening, as opening a pipe waits for a writer.
        let meta = fs::metadata(path).map_err(|e| {
            let hint = match e.kind() {
                ErrorKind::NotFound | ErrorKind::NotADirectory => mistaken::missing(path),
                _ => None,
            };
            Error::io(path, "open")(e).hint(hint)
        })?;
        if meta.is_dir() {
            return Err(wrong("a folder").hint(mistaken::folder(path)));
        }
        if !meta.is_file() {
            return Err(wrong("a pipe or a device"));
        }
        let file = File::open(path).map_err(Error::io(path, "open"))?;
        let meta = file.metadata().map_err(Error::io(path, "open"))?;
        if meta.len() == 0 {
            return Err(wrong("an empty file"));
        }
        let map = map(&file, meta.len()).map_err(Error::io(path, "map"))?;
        watch(path);
        Ok(Source {
            path: path.to_path_buf(),
            direct: direct(&file),
            refused: AtomicBool::new(false),
            file,
            map,
            modified: meta.modified().ok(),
        })
    }

    /// Where it was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// All of its bytes, as they were when it was opened.
    pub fn map(&self) -> &Mmap {
        &self.map
    }

    /// Whether the file is what it was when it was opened. One that another has replaced under its name is: the one that
    /// is open lives on.
    ///
    /// # Errors
    /// If it was cut short or written to since: what is mapped has changed with it.
    pub fn unchanged(&self) -> Result<()> {
        let meta = self.file.metadata();
        let meta = meta.map_err(Error::io(&self.path, "look at"))?;
        let expected = self.map.len() as u64;
        let what = "the model file, while it was in use,";
        if meta.len() < expected {
            let found = format!("{}: it was cut short", meta.len());
            let expected = format!("{expected} bytes");
            return Err(Error::invalid(&self.path, what, expected, found));
        }
        if meta.modified().ok() != self.modified {
            let (expected, found) = ("no change", "that something wrote to it");
            return Err(Error::invalid(&self.path, what, expected, found));
        }
        Ok(())
    }

    /// Fills `out` with the file's bytes from `at` on, without the page cache where that can be had. Where the file ends,
    /// `out` stays as it is; its first `want` bytes must be there. A read that fails is tried again.
    ///
    /// `at`, the address and the length of `out`: multiples of [`PAGE`].
    ///
    /// # Errors
    /// The system's, and [`ErrorKind::UnexpectedEof`].
    pub fn read(&self, at: u64, out: &mut [u8], want: usize) -> io::Result<()> {
        let (mut done, mut tries) = (0, 0);
        while done < want {
            let direct = self
                .direct
                .as_ref()
                .filter(|_| !self.refused.load(Ordering::Relaxed));
            let file = direct.unwrap_or(&self.file);
            match read_at(file, &mut out[done..], at + done as u64) {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(n) => done += n,
                // Only where the file ends does a read leave the grid.
                Err(_) if !done.is_multiple_of(PAGE) => {
                    return Err(ErrorKind::UnexpectedEof.into());
                }
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) if e.kind() == ErrorKind::InvalidInput && direct.is_some() => {
                    self.refused.store(true, Ordering::Relaxed);
                }
                Err(e) => {
                    tries += 1;
                    if tries == TRIES {
                        return Err(e);
                    }
                    std::thread::sleep(PAUSE * (1 << (tries - 1)));
                }
            }
        }
        Ok(())
    }

    /// Has the system read all of the file into its page cache, as far as it is not there, and returns when the last part is on
    /// its way. For a file that is in use meanwhile: what is looked at was asked for before, in larger pieces than looking at
    /// it would ask for. Of one that is in the cache this takes some milliseconds for each gigabyte.
    pub fn fetch(&self) {
        #[cfg(unix)]
        for start in (0..self.map.len()).step_by(FETCH) {
            let len = FETCH.min(self.map.len() - start);
            // Not all at once: what somebody waits for should not have to queue up behind a whole file. Looking at a byte
            // waits for its page.
            if let Some(before) = start.checked_sub(FETCHES * FETCH) {
                std::hint::black_box(self.map[before]);
            }
            if self
                .map
                .advise_range(memmap2::Advice::WillNeed, start, len)
                .is_err()
            {
                return;
            }
        }
    }
}

/// What to say if a mapped page is gone, and the file that it is said of: the first one that was opened.
#[cfg(unix)]
static GONE: std::sync::OnceLock<String> = std::sync::OnceLock::new();

/// Lets the program end with a clear word when a mapped file is cut short by somebody else and the page that is looked at is
/// gone. (Before every pass, [`Source::unchanged`] finds that out in time to say it as an error; this is for what happens
/// during a pass.)
#[cfg(unix)]
fn watch(path: &Path) {
    extern "C" fn gone(_: libc::c_int) {
        let line = GONE
            .get()
            .map_or("octet: a mapped file was cut short\n", |l| l);
        // SAFETY: `write` and `_exit` may be called in a signal handler; the line is not changed after it was set.
        unsafe {
            libc::write(2, line.as_ptr().cast(), line.len());
            libc::_exit(1);
        }
    }
    let mut first = false;
    GONE.get_or_init(|| {
        first = true;
        let error = Error::invalid(
            path,
            "the model file, while it was in use,",
            "all of its bytes",
            "that it was cut short, or that its disk fails",
        );
        format!("octet: {error}\n")
    });
    if first {
        // SAFETY: the handler only does what a handler may. Nothing else in this program wants this signal, which otherwise
        // ends it without a word.
        unsafe { libc::signal(libc::SIGBUS, gone as *const () as libc::sighandler_t) };
    }
}

#[cfg(not(unix))]
fn watch(_: &Path) {}

/// Maps a file of `len` bytes.
fn map(file: &File, len: u64) -> io::Result<Mmap> {
    let len = usize::try_from(len).map_err(|_| io::Error::from(io::ErrorKind::FileTooLarge))?;
    // SAFETY: mapped bytes can change when another program writes to the file, and the language
    // has no word for that; every program that maps its weights lives with it. What holds here:
    // the map is read-only and octet itself never writes into a file that it maps; `len` is the
    // size that the file had when it was opened; nothing that is read is trusted later on, since
    // each access checks its bounds (and strings their UTF-8) anew, and any bits are a weight.
    // If someone cuts the file short, reading past its end is a SIGBUS, which `watch` turns into a clear end.
    let map = unsafe { MmapOptions::new().len(len).map(file) }?;
    // Weights are read all over the file: with pages of 4 KiB, looking them up costs a quarter of decode. Where the file system
    // can (Linux from 6.16 on: ext4, XFS, btrfs), what comes from the disk comes in pages of 2 MiB; elsewhere nothing happens.
    #[cfg(target_os = "linux")]
    let _ = map.advise(memmap2::Advice::HugePage);
    Ok(map)
}

/// The open file once more, read past the page cache: by its number, as another may have its name by now.
#[cfg(target_os = "linux")]
fn direct(file: &File) -> Option<File> {
    use std::os::fd::AsRawFd;
    use std::os::unix::fs::OpenOptionsExt;
    fs::OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_DIRECT)
        .open(format!("/proc/self/fd/{}", file.as_raw_fd()))
        .ok()
}

#[cfg(not(target_os = "linux"))]
fn direct(_: &File) -> Option<File> {
    None
}

#[cfg(unix)]
fn read_at(file: &File, out: &mut [u8], at: u64) -> io::Result<usize> {
    std::os::unix::fs::FileExt::read_at(file, out, at)
}

#[cfg(windows)]
fn read_at(file: &File, out: &mut [u8], at: u64) -> io::Result<usize> {
    std::os::windows::fs::FileExt::seek_read(file, out, at)
}

/// An open file like the one at `path`, every read of which fails as on a disk that is broken (`EIO`).
#[cfg(all(test, target_os = "linux"))]
pub(crate) fn broken(path: &Path) -> Source {
    Source {
        // Nothing can be mapped at address 0 of a process, and reading there is an input/output error.
        direct: File::open("/proc/self/mem").ok(),
        ..Source::open(path).unwrap()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use memmap2::MmapMut;

    #[test]
    fn reads_what_is_there_and_says_what_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        let bytes: Vec<u8> = (0..3 * PAGE + 100).map(|i| (i % 251) as u8).collect();
        fs::write(&path, &bytes).unwrap();
        let source = Source::open(&path).unwrap();
        let mut out = MmapMut::map_anon(3 * PAGE).unwrap();
        source
            .read(PAGE as u64, &mut out[..], 2 * PAGE + 100)
            .unwrap();
        assert_eq!(out[..2 * PAGE + 100], bytes[PAGE..]);
        let e = source
            .read(PAGE as u64, &mut out[..], 2 * PAGE + 101)
            .unwrap_err();
        assert_eq!(e.kind(), ErrorKind::UnexpectedEof);
        source.unchanged().unwrap();
        let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
        file.set_len(100).unwrap();
        let said = source.unchanged().unwrap_err().to_string();
        assert!(said.contains("cut short"), "{said}");
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn a_disk_that_fails_is_asked_again_and_then_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        fs::write(&path, [1; PAGE]).unwrap();
        let mut out = MmapMut::map_anon(PAGE).unwrap();
        let begun = std::time::Instant::now();
        let e = broken(&path).read(0, &mut out[..], PAGE).unwrap_err();
        assert_eq!(e.raw_os_error(), Some(libc::EIO));
        assert!(
            begun.elapsed() >= PAUSE * ((1 << (TRIES - 1)) - 1),
            "it was not tried again"
        );
    }

    /// In a process of its own, which is this program with this one test.
    #[test]
    #[cfg(unix)]
    fn a_mapped_page_that_is_gone_ends_the_program_with_a_word() {
        const CUT: &str = "OCTET_TEST_CUT";
        if let Some(path) = std::env::var_os(CUT) {
            let source = Source::open(path.as_ref()).unwrap();
            let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
            file.set_len(1).unwrap();
            let gone = std::hint::black_box(source.map()[PAGE]);
            panic!("read {gone} where nothing is");
        }
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        fs::write(&path, [1; 2 * PAGE]).unwrap();
        let name = "gguf::source::tests::a_mapped_page_that_is_gone_ends_the_program_with_a_word";
        let out = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", name, "--nocapture"])
            .env(CUT, &path)
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&out.stderr);
        assert_eq!(out.status.code(), Some(1), "{said}");
        let line = format!("octet: {}: ", path.display());
        assert!(said.contains(&line) && said.contains("cut short"), "{said}");
    }

    #[test]
    fn a_replaced_file_lives_on() {
        let folder = tempfile::tempdir().unwrap();
        let (path, other) = (folder.path().join("file"), folder.path().join("other"));
        fs::write(&path, [1; PAGE]).unwrap();
        fs::write(&other, [2; 10]).unwrap();
        let source = Source::open(&path).unwrap();
        fs::rename(&other, &path).unwrap();
        source.unchanged().unwrap();
        let mut out = MmapMut::map_anon(PAGE).unwrap();
        source.read(0, &mut out[..], PAGE).unwrap();
        assert!(out.iter().all(|b| *b == 1));
    }
}
