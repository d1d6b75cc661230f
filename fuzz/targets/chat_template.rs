#![no_main]

#[path = "target.rs"]
mod target;
use target::target;

target!("chat_template", chat_template, template_seeds);
