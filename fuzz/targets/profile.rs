#![no_main]

#[path = "target.rs"]
mod target;
use target::target;

target!("profile", profile, profile_seeds);
