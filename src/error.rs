//! One error type for the whole program.
//!
//! Every variant says *what* is wrong, *where*, what was *expected* and what was *found*, so that
//! `main.rs` can print one useful line and choose an exit code. A hint may say what to do next.

use crate::readable::one_line;
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
    /// Another error, and what may help.
    Hint {
        /// The error.
        error: Box<Error>,
        /// What to do, or what was probably meant.
        hint: String,
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

    /// This error with a hint, if there is one.
    pub fn hint(self, hint: Option<impl fmt::Display>) -> Error {
        match hint {
            Some(hint) => Error::Hint {
                error: Box::new(self),
                hint: hint.to_string(),
            },
            None => self,
        }
    }

    /// The process exit code: 1 the work failed, 2 wrong usage, 130 interrupted.
    pub fn exit_code(&self) -> u8 {
        match self {
            Error::Usage(_) => 2,
            Error::Interrupted => 130,
            Error::Hint { error, .. } => error.exit_code(),
            _ => 1,
        }
    }
}

/// A part of a line, without line breaks and terminal escapes, which names inside a hostile file may hold; of a long
/// one its beginning and its end.
fn short(part: impl fmt::Display) -> String {
    const KEPT: usize = 300;
    let part = part.to_string();
    let line = one_line(&part);
    if line.len() <= 2 * KEPT {
        return line.into_owned();
    }
    let fits = |at: &usize| line.is_char_boundary(*at);
    let head = (0..=KEPT).rev().find(fits).unwrap_or(0);
    let tail = (line.len() - KEPT..line.len())
        .find(fits)
        .unwrap_or(line.len());
    format!("{}…{}", &line[..head], &line[tail..])
}

/// What was expected and what is there.
fn instead(expected: &str, found: &str) -> String {
    format!("(expected {}, found {})", short(expected), short(found))
}

/// One line that fits on a screen, whatever a file's own strings contain.
impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Io {
                file,
                action,
                source,
            } => {
                let (file, source) = (short(file.display()), short(source));
                write!(f, "{file}: cannot {action}: {source}")
            }
            Error::Truncated {
                file,
                what,
                at,
                want,
                have,
            } => {
                let (file, what) = (short(file.display()), short(what));
                write!(
                    f,
                    "{file}: the file ends inside {what} at byte {at} (expected {want} bytes, found {have}); \
                     the download may be incomplete"
                )
            }
            Error::Invalid {
                file,
                what,
                expected,
                found,
            } => {
                let (file, what) = (short(file.display()), short(what));
                write!(f, "{file}: {what} is wrong {}", instead(expected, found))
            }
            Error::Missing { file, what, hint } => {
                let (file, what, hint) = (short(file.display()), short(what), short(hint));
                match hint.is_empty() {
                    true => write!(f, "{file}: {what} is missing"),
                    false => write!(f, "{file}: {what} is missing; {hint}"),
                }
            }
            Error::Unsupported {
                file,
                what,
                expected,
                found,
            } => {
                let (file, what) = (short(file.display()), short(what));
                let instead = instead(expected, found);
                write!(f, "{file}: {what} is not supported {instead}")
            }
            Error::Prompt {
                what,
                expected,
                found,
            } => write!(
                f,
                "the prompt: {} {}",
                short(what),
                instead(expected, found)
            ),
            Error::Request {
                what,
                expected,
                found,
            } => write!(
                f,
                "the request: {} {}",
                short(what),
                instead(expected, found)
            ),
            Error::Lines {
                file,
                failed,
                of,
                reasons,
            } => {
                let file = short(file.display());
                write!(f, "{file}: {failed} of {of} lines failed; {reasons}")
            }
            Error::ContextFull { limit, want } => write!(
                f,
                "the context is full (expected at most {limit} tokens, found {want}); \
                 a shorter text helps, or a larger --ctx where the model allows it"
            ),
            Error::Hint { error, hint } => write!(f, "{error}; {}", short(hint)),
            Error::Usage(what) => write!(f, "{}", short(what)),
            Error::Interrupted => write!(f, "interrupted"),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Error::Io { source, .. } => Some(source),
            Error::Hint { error, .. } => Some(error),
            _ => None,
        }
    }
}
