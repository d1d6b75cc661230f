//! From people to tokens and back.

pub mod tokenizer;
