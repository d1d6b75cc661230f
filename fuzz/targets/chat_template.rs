#![no_main]

#[path = "target.rs"]
mod target;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| target::run("chat_template", bytes));
