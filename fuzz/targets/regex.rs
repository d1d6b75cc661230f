#![no_main]

#[path = "target.rs"]
mod target;
use target::target;

target!("regex", regex, regex_seeds);
