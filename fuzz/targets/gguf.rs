#![no_main]

#[path = "target.rs"]
mod target;
use target::target;

target!("gguf", gguf, gguf_seeds);
