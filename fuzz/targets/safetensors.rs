#![no_main]

#[path = "target.rs"]
mod target;
use target::target;

target!("safetensors", safetensors, safetensors_seeds);
