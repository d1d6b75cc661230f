//! What a model runs on, and the most that this can do.

use crate::error::Result;
use crate::pool::{Pool, Threads};
use crate::simd::{Kernels, Tier, best};
use std::hint::black_box;
use std::sync::atomic::{AtomicU64, Ordering};
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

    /// Bytes per second that the threads can read from memory: the best of some passes over 256 MiB. Takes about 0.2 s, most
    /// of it to make the pages.
    pub fn read_bandwidth(&self) -> f64 {
        const CHUNK: usize = 1 << 17; // 1 MiB of u64
        let pool = &self.pool;
        let mut words = vec![0u64; 256 * CHUNK];
        let mut chunks: Vec<&mut [u64]> = words.chunks_exact_mut(CHUNK).collect();
        let total = AtomicU64::new(0);
        let best = pool.enter(|| {
            pool.each(&mut chunks, |i, chunk| chunk.fill(i as u64));
            let pass = |_| {
                let started = Instant::now();
                pool.tasks(chunks.len(), |i| {
                    // Eight sums, so that the additions do not wait for each other.
                    let mut lanes = [0u64; 8];
                    for words in chunks[i].as_chunks::<8>().0 {
                        for (lane, word) in lanes.iter_mut().zip(words) {
                            *lane = lane.wrapping_add(*word);
                        }
                    }
                    let sum = lanes.iter().fold(0u64, |s, l| s.wrapping_add(*l));
                    total.fetch_add(sum, Ordering::Relaxed);
                });
                started.elapsed().as_secs_f64()
            };
            (0..4).map(pass).fold(f64::INFINITY, f64::min)
        });
        black_box(total.into_inner());
        (256 * CHUNK * 8) as f64 / best
    }

    /// Products of int8 per second that the machine can do at most with its threads for batches, as its kernels do
    /// them: the best of some passes over weights in the L1 cache ([`Kernels::products`]). Takes about 0.1 s.
    pub fn int8_peak(&self) -> f64 {
        const W: usize = 32 << 10;
        /// As panels lie: no register crosses a cache line.
        #[repr(align(64))]
        struct Weights([u8; W]);
        let (w, x) = (Weights([7; W]), [[5i8; 4]; 16]);
        let tasks = 16 * self.pool.batch_threads();
        let seconds = |n: usize| {
            let started = Instant::now();
            self.pool.tasks(tasks, |_| {
                for _ in 0..n {
                    black_box(self.kernels.products(black_box(&w.0), black_box(&x)));
                }
            });
            started.elapsed().as_secs_f64()
        };
        self.pool.enter_batch(|| {
            // So many that a pass takes some milliseconds in any tier.
            let mut n = 1;
            while seconds(n) < 5e-3 {
                n *= 2;
            }
            let best = (0..8).map(|_| seconds(n)).fold(f64::INFINITY, f64::min);
            (tasks * n * 16 * W) as f64 / best
        })
    }
}
