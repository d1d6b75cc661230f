//! What all targets do: the entry of that name takes the bytes, and may allocate no more than 64 MiB and four times their length.

#[path = "../../tests/alloc.rs"]
mod alloc;
#[path = "../../tests/entries.rs"]
mod entries;

use std::sync::OnceLock;

static ENTRY: OnceLock<&entries::Entry> = OnceLock::new();

pub(crate) fn run(name: &str, bytes: &[u8]) {
    let entry = ENTRY.get_or_init(|| {
        let entry = entries::named(name);
        // What is made once and kept is not counted.
        (entry.seeds)().iter().for_each(|seed| (entry.run)(seed));
        entry
    });
    let (_, most) = alloc::peak(|| (entry.run)(bytes));
    assert!(most <= (64 << 20) + 4 * bytes.len(), "{most} bytes");
}
