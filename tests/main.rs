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
mod program;
mod quantize;
#[cfg(unix)]
mod readme;
mod safety;
mod scripted;
mod sessions;
mod small_model;
#[cfg(unix)]
mod terminal;

use serde_json::Value;
use std::path::PathBuf;

/// A file of `tests/data`.
fn data(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("tests/data")
        .join(name)
}

/// What the reference implementation makes of ten prompts with the demo model's BF16 weights.
fn reference() -> Vec<Value> {
    let bytes = std::fs::read(data("demo-reference.json")).unwrap();
    let mut value: Value = serde_json::from_slice(&bytes).unwrap();
    serde_json::from_value(value["prompts"].take()).unwrap()
}

/// Token ids of a JSON list.
fn ids(v: &Value) -> Vec<u32> {
    serde_json::from_value(v.clone()).unwrap()
}
