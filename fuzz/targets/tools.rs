#![no_main]

#[path = "target.rs"]
mod target;
use target::target;

target!("tools", tools, tools_seeds);
