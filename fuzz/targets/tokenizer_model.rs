#![no_main]

#[path = "target.rs"]
mod target;
use target::target;

target!("tokenizer_model", tokenizer_model, spm_seeds);
