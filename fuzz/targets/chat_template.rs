#![no_main]

#[path = "target.rs"]
mod target;

libfuzzer_sys::fuzz_target!(init: target::begin("chat_template"), |bytes: &[u8]| target::run(bytes));
