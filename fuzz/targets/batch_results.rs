#![no_main]

#[path = "target.rs"]
mod target;
use target::target;

target!("batch_results", batch_results, results_seeds);
