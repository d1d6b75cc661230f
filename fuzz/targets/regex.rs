#![no_main]

#[path = "target.rs"]
mod target;

libfuzzer_sys::fuzz_target!(init: target::begin("regex"), |bytes: &[u8]| target::run(bytes));
