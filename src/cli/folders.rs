//! Where a user's own files lie.

use std::path::PathBuf;

/// `$XDG_CACHE_HOME/octet` or `~/.cache/octet`.
pub(super) fn cache_folder() -> Option<PathBuf> {
    user_folder("XDG_CACHE_HOME", ".cache")
}

/// `$XDG_STATE_HOME/octet` or `~/.local/state/octet`, where the history of the chat lies.
pub(super) fn state_folder() -> Option<PathBuf> {
    user_folder("XDG_STATE_HOME", ".local/state")
}

fn user_folder(variable: &str, below_home: &str) -> Option<PathBuf> {
    let set = |name: &str| {
        std::env::var_os(name)
            .filter(|v| !v.is_empty())
            .map(PathBuf::from)
    };
    let base = set(variable).filter(|p| p.is_absolute());
    let home = || set("HOME").or_else(|| set("USERPROFILE"));
    Some(
        base.or_else(|| Some(home()?.join(below_home)))?
            .join("octet"),
    )
}
