#![no_main]

#[path = "target.rs"]
mod target;
use target::target;

target!("batch_line", batch_line, batch_seeds);
