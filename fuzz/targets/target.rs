//! What all targets do: they begin with the small valid inputs of the entry of their name, which takes the bytes, and may allocate
//! no more than 64 MiB and four times their length.

#[path = "../../tests/alloc.rs"]
mod alloc;
#[allow(dead_code, reason = "the mutation run uses more of it")]
#[path = "../../tests/entries.rs"]
mod entries;

use std::path::Path;
use std::sync::OnceLock;

static ENTRY: OnceLock<&entries::Entry> = OnceLock::new();

/// Before the corpus is read: writes the small valid inputs there.
pub(crate) fn begin(name: &str) {
    let entry = ENTRY.get_or_init(|| entries::named(name));
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(name);
    std::fs::create_dir_all(&folder).unwrap();
    for (i, seed) in (entry.seeds)().iter().enumerate() {
        std::fs::write(folder.join(format!("seed{i}")), seed).unwrap();
        // What is made once and kept is not counted later.
        (entry.run)(seed);
    }
}

pub(crate) fn run(bytes: &[u8]) {
    let entry = ENTRY.get().unwrap();
    let (_, most) = alloc::peak(|| (entry.run)(bytes));
    assert!(most <= (64 << 20) + 4 * bytes.len(), "{most} bytes");
}
