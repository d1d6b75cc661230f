//! The integration tests, one binary.

mod chat;
