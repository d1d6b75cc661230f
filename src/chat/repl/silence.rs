//! Silence at the keyboard: while the model reads and answers, what is typed is not shown, as it would stand in the middle of the
//! progress bar or of the answer. The terminal keeps it, and the next prompt shows it.

use std::sync::Mutex;

#[cfg(unix)]
use rustix::termios::{LocalModes, OptionalActions, Termios, tcgetattr, tcsetattr};

#[cfg(not(unix))]
type Termios = ();

/// How the terminal was before; nothing while what is typed is shown.
static BEFORE: Mutex<Option<Termios>> = Mutex::new(None);

/// Lasts for as long as this does.
pub(super) struct Silence;

impl Silence {
    /// Begins it, where standard input is a terminal that can be silent.
    pub(super) fn begin() -> Silence {
        #[cfg(unix)]
        if let Ok(before) = tcgetattr(std::io::stdin()) {
            let mut silent = before.clone();
            silent.local_modes.remove(LocalModes::ECHO);
            let mut kept = BEFORE.lock().unwrap_or_else(|e| e.into_inner());
            if tcsetattr(std::io::stdin(), OptionalActions::Now, &silent).is_ok() {
                *kept = Some(before);
            }
        }
        Silence
    }
}

impl Drop for Silence {
    fn drop(&mut self) {
        end_silence();
    }
}

/// Ends silence, if there is any. Whoever ends the program from another thread than the conversation's has to: the terminal
/// would stay silent.
pub fn end_silence() {
    let before = BEFORE.lock().unwrap_or_else(|e| e.into_inner()).take();
    if let Some(before) = before {
        #[cfg(unix)]
        let _ = tcsetattr(std::io::stdin(), OptionalActions::Now, &before);
        #[cfg(not(unix))]
        let () = before;
    }
}
