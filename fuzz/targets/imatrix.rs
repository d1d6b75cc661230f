#![no_main]

#[path = "target.rs"]
mod target;
use target::target;

target!("imatrix", imatrix, imatrix_seeds);
