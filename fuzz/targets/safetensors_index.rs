#![no_main]

#[path = "target.rs"]
mod target;
use target::target;

target!("safetensors_index", index, index_seeds);
