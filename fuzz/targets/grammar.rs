#![no_main]

#[path = "target.rs"]
mod target;
use target::target;

target!("grammar", grammar, grammar_seeds);
