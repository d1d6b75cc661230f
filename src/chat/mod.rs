//! From people to tokens and back.

pub mod batch;
pub mod constraint;
pub mod draft;
mod gbnf;
pub mod gguf_vocab;
pub mod jinja;
mod json;
pub mod repl;
pub mod request;
pub mod sampler;
mod schema;
pub mod session;
pub mod stops;
pub mod template;
pub mod tokenizer;
