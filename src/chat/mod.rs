//! From people to tokens and back.

pub mod gguf_vocab;
pub mod session;
pub mod tokenizer;
