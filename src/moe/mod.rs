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
pub use observe::{Observer, Site};
pub use offload::Held;
pub use profile::Profile;
pub use routes::Routes;
pub use store::{Reads, Store};

use crate::error::Result;
use crate::pool::{Pool, Threads};
use crate::simd::{Kernels, Tier, best};
use std::hint::black_box;
use std::time::Instant;

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
        let threads = Threads {
            n: threads,
            ..Threads::default()
        };
        Machine::with(threads, cap)
    }

    /// Such threads and the best tier that this CPU has, at most `cap`.
    ///
    /// # Errors
    /// If the threads cannot be started.
    pub fn with(threads: Threads, cap: Option<Tier>) -> Result<Machine> {
        Ok(Machine {
            pool: Pool::with(threads)?,
            kernels: Kernels::of(best(cap)),
        })
    }

    /// Products of int8 per second that the machine can do at most with its threads for batches, as its kernels do
    /// them: the best of some passes over weights in the L1 cache ([`Kernels::products`]). Takes about 0.1 s.
    pub fn int8_peak(&self) -> f64 {
        const W: usize = 32 << 10;
        let (w, x) = ([7u8; W], [[5i8; 4]; 8]);
        let tasks = 16 * self.pool.batch_threads();
        let calls = |n: usize| {
            let started = Instant::now();
            self.pool.tasks(tasks, |_| {
                for _ in 0..n {
                    black_box(self.kernels.products(black_box(&w), black_box(&x)));
                }
            });
            let macs = tasks * n * 8 * W;
            (
                macs as f64 / started.elapsed().as_secs_f64(),
                started.elapsed(),
            )
        };
        self.pool.enter_batch(|| {
            // So many that a pass takes some milliseconds in any tier.
            let mut n = 1;
            while calls(n).1.as_millis() < 5 {
                n *= 2;
            }
            (0..8).map(|_| calls(n).0).fold(0.0, f64::max)
        })
    }
}
