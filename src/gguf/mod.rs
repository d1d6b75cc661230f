//! The containers of weights: GGUF, and safetensors to read from.

pub mod reader;
pub mod value;
