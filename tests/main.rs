//! The integration tests, one binary.

mod alloc;
mod batch;
mod bench;
mod bounded;
mod chat;
mod cli;
mod constraint;
mod draft;
mod entries;
mod faults;
mod generation;
mod gguf;
mod gpu;
mod hostile_model;
mod imatrix;
mod layers;
mod licences;
mod mistakes;
mod model;
mod mutate;
mod paging;
mod privacy;
mod profile;
mod quantize;
#[cfg(unix)]
mod readme;
mod safety;
mod scripted;
mod sessions;
#[cfg(unix)]
mod terminal;

use std::path::PathBuf;

/// A file of `tests/data`.
fn data(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("tests/data")
        .join(name)
}
