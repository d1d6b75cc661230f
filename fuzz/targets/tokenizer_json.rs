#![no_main]

#[path = "target.rs"]
mod target;
use target::target;

target!("tokenizer_json", tokenizer_json, hf_seeds);
