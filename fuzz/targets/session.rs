#![no_main]

#[path = "target.rs"]
mod target;
use target::target;

target!("session", session, session_seeds);
