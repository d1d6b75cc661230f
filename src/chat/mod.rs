//! From people to tokens and back.

pub mod batch;
pub mod constraint;
pub mod conversation;
pub mod draft;
mod gbnf;
pub mod gguf_vocab;
pub mod jinja;
mod json;
pub mod repl;
pub mod request;
pub mod sampler;
pub mod saved;
mod schema;
pub mod session;
pub mod stops;
pub mod template;
pub mod tokenizer;
pub mod tools;
