//! Ctrl-C.

use super::report::note;
use crate::chat::repl::end_silence;
use crate::error::{Error, Result};
use std::io::{IsTerminal, Write};
use std::sync::atomic::{AtomicBool, Ordering};

/// Set by Ctrl-C: whatever generates tokens looks at it after each one.
static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// Makes Ctrl-C stop an answer instead of the program; the second one, when the first was not heard,
/// ends the program. `said`: what is told at once, where it may take a while until the first is heard.
///
/// # Errors
/// If the system refuses to install the handler.
pub(super) fn hear_interrupts(said: Option<&'static str>) -> Result<&'static AtomicBool> {
    let handler = move || {
        if INTERRUPTED.swap(true, Ordering::Relaxed) {
            end_silence();
            std::process::exit(i32::from(Error::Interrupted.exit_code()));
        }
        if let Some(said) = said {
            // A progress bar stands in the line, and what the terminal shows of Ctrl-C.
            let mut stderr = std::io::stderr();
            if stderr.is_terminal() {
                let _ = stderr.write_all(b"\r\x1b[2K");
            }
            note(said);
        }
    };
    ctrlc::set_handler(handler).map_err(|e| Error::Io {
        file: "<signals>".into(),
        action: "handle",
        source: std::io::Error::other(e),
    })?;
    Ok(&INTERRUPTED)
}
