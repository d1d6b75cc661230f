//! `octet`: a quantized, CPU-first local runner for Mixtral.

pub mod chat;
pub mod error;
pub mod gguf;
pub mod quant;
