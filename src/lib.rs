//! `octet`: a quantized, CPU-first local runner for Mixtral.

pub mod chat;
pub mod cli;
pub mod error;
pub mod gguf;
pub mod moe;
pub mod pool;
pub mod quant;
pub mod simd;
