//! One error type for the whole program.
//!
//! Every variant says *what* is wrong, *where*, what was *expected* and what was *found*, so that
//! `main.rs` can print one useful line and choose an exit code. A hint may say what to do next.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

/// `Result` with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Everything that can go wrong outside our own bugs.
#[derive(Debug)]
pub enum Error {
    /// The operating system refused: `file: cannot {action}: {source}`.
    Io {
        /// The file (or `<stdin>`, `<stdout>`).
        file: PathBuf,
        /// What was tried, as in "cannot *open*".
        action: &'static str,
        /// The system's own word.
        source: io::Error,
    },
    /// The file ends before a thing that it announces.
    Truncated {
        /// The file.
        file: PathBuf,
        /// The thing that was being read.
        what: String,
        /// Byte offset at which the thing starts.
        at: u64,
        /// Bytes that the thing needs from there.
        want: u64,
        /// Bytes that are there.
        have: u64,
    },
    /// The file holds something that cannot be right.
    Invalid {
        /// The file.
        file: PathBuf,
        /// The thing, as a user would name it.
        what: String,
        /// What would have been right.
        expected: String,
        /// What is there.
        found: String,
    },
    /// A thing that must be there is not.
    Missing {
        /// The file (or folder).
        file: PathBuf,
        /// The thing.
        what: String,
        /// What to do about it; may be empty.
        hint: String,
    },
    /// A valid thing that this program does not do.
    Unsupported {
        /// The file.
        file: PathBuf,
        /// The thing.
        what: String,
        /// What is supported.
        expected: String,
        /// What is there.
        found: String,
    },
    /// The conversation cannot be put into the model's prompt format.
    Prompt {
        /// Which rule is broken.
        what: String,
        /// What the format allows.
        expected: String,
        /// What was given.
        found: String,
    },
    /// A request asks for something in a way that cannot be right.
    Request {
        /// The field.
        what: String,
        /// What it may be.
        expected: String,
        /// What it is.
        found: String,
    },
    /// Some lines of what was asked have no answers.
    Lines {
        /// Where the lines are.
        file: PathBuf,
        /// How many.
        failed: u64,
        /// Of how many.
        of: u64,
        /// Where the reasons are.
        reasons: &'static str,
    },
    /// The tokens do not fit into the context.
    ContextFull {
        /// Tokens the context holds.
        limit: usize,
        /// Tokens that are wanted.
        want: usize,
    },
    /// Wrong use of the command line (exit code 2).
    Usage(String),
    /// The user pressed Ctrl-C (exit code 130).
    Interrupted,
}

impl Error {
    /// An [`Error::Io`] for `map_err`.
    pub fn io(file: impl AsRef<Path>, action: &'static str) -> impl FnOnce(io::Error) -> Error {
        let file = file.as_ref().to_path_buf();
        move |source| Error::Io {
            file,
            action,
            source,
        }
    }

    /// An [`Error::Invalid`].
    pub fn invalid(
        file: impl AsRef<Path>,
        what: impl fmt::Display,
        expected: impl fmt::Display,
        found: impl fmt::Display,
    ) -> Error {
        Error::Invalid {
            file: file.as_ref().to_path_buf(),
            what: what.to_string(),
            expected: expected.to_string(),
            found: found.to_string(),
        }
    }

    /// An [`Error::Missing`].
    pub fn missing(
        file: impl AsRef<Path>,
        what: impl fmt::Display,
        hint: impl fmt::Display,
    ) -> Error {
        Error::Missing {
            file: file.as_ref().to_path_buf(),
            what: what.to_string(),
            hint: hint.to_string(),
        }
    }

    /// An [`Error::Unsupported`].
    pub fn unsupported(
        file: impl AsRef<Path>,
        what: impl fmt::Display,
        expected: impl fmt::Display,
        found: impl fmt::Display,
    ) -> Error {
        Error::Unsupported {
            file: file.as_ref().to_path_buf(),
            what: what.to_string(),
            expected: expected.to_string(),
            found: found.to_string(),
        }
    }

    /// An [`Error::Prompt`].
    pub fn prompt(
        what: impl fmt::Display,
        expected: impl fmt::Display,
        found: impl fmt::Display,
    ) -> Error {
        Error::Prompt {
            what: what.to_string(),
            expected: expected.to_string(),
            found: found.to_string(),
        }
    }

    /// An [`Error::Request`].
    pub fn request(
        what: impl fmt::Display,
        expected: impl fmt::Display,
        found: impl fmt::Display,
    ) -> Error {
        Error::Request {
            what: what.to_string(),
            expected: expected.to_string(),
            found: found.to_string(),
        }
    }

    /// The process exit code: 1 the work failed, 2 wrong usage, 130 interrupted.
    pub fn exit_code(&self) -> u8 {
        match self {
            Error::Usage(_) => 2,
            Error::Interrupted => 130,
            _ => 1,
        }
    }
}

/// One line, whatever a file's own strings contain.
impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let line = match self {
            Error::Io {
                file,
                action,
                source,
            } => format!("{}: cannot {action}: {source}", file.display()),
            Error::Truncated {
                file,
                what,
                at,
                want,
                have,
            } => format!(
                "{}: the file ends inside {what} at byte {at} (expected {want} bytes, found {have}); \
                 the download may be incomplete",
                file.display()
            ),
            Error::Invalid {
                file,
                what,
                expected,
                found,
            } => {
                format!(
                    "{}: {what} is wrong (expected {expected}, found {found})",
                    file.display()
                )
            }
            Error::Missing { file, what, hint } if hint.is_empty() => {
                format!("{}: {what} is missing", file.display())
            }
            Error::Missing { file, what, hint } => {
                format!("{}: {what} is missing; {hint}", file.display())
            }
            Error::Unsupported {
                file,
                what,
                expected,
                found,
            } => {
                format!(
                    "{}: {what} is not supported (expected {expected}, found {found})",
                    file.display()
                )
            }
            Error::Prompt {
                what,
                expected,
                found,
            } => {
                format!("the prompt: {what} (expected {expected}, found {found})")
            }
            Error::Request {
                what,
                expected,
                found,
            } => {
                format!("the request: {what} (expected {expected}, found {found})")
            }
            Error::Lines {
                file,
                failed,
                of,
                reasons,
            } => format!(
                "{}: {failed} of {of} lines failed; {reasons}",
                file.display()
            ),
            Error::ContextFull { limit, want } => format!(
                "the context is full (expected at most {limit} tokens, found {want}); \
                 a shorter text helps, or a larger --ctx where the model allows it"
            ),
            Error::Usage(what) => what.clone(),
            Error::Interrupted => "interrupted".to_string(),
        };
        // Names inside a hostile file may hold line breaks or terminal escapes.
        for c in line.chars() {
            if c.is_control() {
                write!(f, "{}", c.escape_default())?
            } else {
                write!(f, "{c}")?
            }
        }
        Ok(())
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Error::Io { source, .. } => Some(source),
            _ => None,
        }
    }
}
