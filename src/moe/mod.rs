//! The Mixtral model, all of it; named for its heart.
//!
//! `forward.rs` is the spine: read it first. It knows tokens and logits, no text.

pub mod attention;
pub mod budget;
pub mod config;
pub mod experts;
pub mod forward;
pub mod importance;
pub mod kv;
pub mod kv_file;
pub mod linear;
pub mod machine;
pub mod observe;
pub mod offload;
pub mod profile;
pub mod router;
pub mod routes;
pub mod store;
pub mod weights;

pub use config::Config;
pub use forward::{Model, Ram, Run, Scratch, Want};
pub use importance::Collector;
pub use kv::{Kv, KvType};
pub use machine::Machine;
pub use observe::{Observer, Site};
pub use offload::Held;
pub use profile::Profile;
pub use routes::Routes;
pub use store::{Reads, Store};
