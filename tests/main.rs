//! The integration tests, one binary.

mod alloc;
mod gguf;
