//! The Mixtral model, all of it; named for its heart.
//!
//! `forward.rs` is the spine: read it first. It knows tokens and logits, no text.

pub mod attention;
pub mod config;
pub mod experts;
pub mod forward;
pub mod importance;
pub mod kv;
pub mod kv_file;
pub mod linear;
pub mod observe;
pub mod router;
pub mod routes;
pub mod weights;

pub use config::Config;
pub use forward::{Model, Run, Scratch, Want};
pub use importance::Collector;
pub use kv::{Kv, KvType};
pub use observe::{Observer, Site};
pub use routes::Routes;

use crate::error::Result;
use crate::pool::Pool;
use crate::simd::{Kernels, Tier, best};

/// What a model runs on: threads, and the kernels of a CPU tier.
pub struct Machine {
    /// The threads.
    pub pool: Pool,
    /// The kernels.
    pub kernels: &'static Kernels,
}

impl Machine {
    /// `threads` threads (0: one for each core) and the best tier that this CPU has, at most `cap`.
    ///
    /// # Errors
    /// If the threads cannot be started.
    pub fn new(threads: usize, cap: Option<Tier>) -> Result<Machine> {
        Ok(Machine {
            pool: Pool::new(threads)?,
            kernels: Kernels::of(best(cap)),
        })
    }
}
