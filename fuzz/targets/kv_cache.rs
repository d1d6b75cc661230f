#![no_main]

#[path = "target.rs"]
mod target;
use target::target;

target!("kv_cache", kv_cache, kv_seeds);
