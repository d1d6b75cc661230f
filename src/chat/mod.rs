//! From people to tokens and back.

pub mod jinja;
mod json;
pub mod sampler;
mod schema;
pub mod template;
pub mod tokenizer;
