//! How threads are made and woken. The only file that knows.
//!
//! Work is split over things that do not depend on each other (rows, experts, heads, tokens), never
//! over a sum, so that results do not depend on the number of threads. Every function here hands each
//! piece of work out exactly once, in small dynamic shares, and returns when all are done.

mod cores;

use crate::error::{Error, Result};
use cores::Cores;
use rayon::iter::{IndexedParallelIterator, IntoParallelIterator, ParallelIterator};
use std::fmt::Display;
use std::marker::PhantomData;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

/// How many threads a [`Pool`] has, and where.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Threads {
    /// Threads; 0 means one for each core ([`default_threads`]).
    pub n: usize,
    /// Threads of [`Pool::enter_batch`]; 0 means the same ones.
    pub batch: usize,
    /// Whether each stays on a core of its own: where there are enough cores, and nobody keeps this process from some of
    /// the machine. (Who keeps it from them knows more than we do.)
    pub pin: bool,
}

/// A fixed number of threads, or two: one for what waits for the memory and one for what waits for the arithmetic.
pub struct Pool {
    crew: Crew,
    batch: Option<Crew>,
}

/// Threads that work together.
struct Crew {
    threads: usize,
    rayon: rayon::ThreadPool,
}

impl Crew {
    fn new(threads: usize, pin: bool) -> Result<Crew> {
        let cpus = Cores::here().filter(|c| pin && c.free && threads <= c.cpus.len());
        let rayon = build(threads, "octet", |builder| match cpus {
            Some(Cores { cpus, .. }) => builder.start_handler(move |i| cores::stay_on(cpus[i])),
            None => builder,
        })?;
        Ok(Crew { threads, rayon })
    }
}

impl Pool {
    /// A pool of `threads` threads; 0 means one for each core ([`default_threads`]).
    ///
    /// # Errors
    /// If the operating system refuses to start them.
    pub fn new(threads: usize) -> Result<Pool> {
        Pool::with(Threads {
            n: threads,
            ..Threads::default()
        })
    }

    /// A pool of such threads.
    ///
    /// # Errors
    /// If the operating system refuses to start them.
    pub fn with(threads: Threads) -> Result<Pool> {
        let n = match threads.n {
            0 => default_threads(),
            n => n,
        };
        let batch = Some(threads.batch).filter(|batch| ![0, n].contains(batch));
        Ok(Pool {
            crew: Crew::new(n, threads.pin)?,
            batch: batch.map(|n| Crew::new(n, threads.pin)).transpose()?,
        })
    }

    /// Threads in the pool.
    pub fn threads(&self) -> usize {
        self.crew.threads
    }

    /// Threads for [`Pool::enter_batch`].
    pub fn batch_threads(&self) -> usize {
        self.batch.as_ref().unwrap_or(&self.crew).threads
    }

    /// Runs `f` on one of the pool's threads. Parallel calls inside it then start faster than from outside.
    pub fn enter<R: Send>(&self, f: impl FnOnce() -> R + Send) -> R {
        self.crew.rayon.install(f)
    }

    /// The same for many tokens at once, which wait for the arithmetic and may want another number of threads: parallel
    /// calls inside it use these.
    pub fn enter_batch<R: Send>(&self, f: impl FnOnce() -> R + Send) -> R {
        self.batch.as_ref().unwrap_or(&self.crew).rayon.install(f)
    }

    /// The threads that this is called on, if they are the pool's.
    fn here(&self) -> &Crew {
        let inside = |crew: &&Crew| crew.rayon.current_thread_index().is_some();
        self.batch.as_ref().filter(inside).unwrap_or(&self.crew)
    }

    /// Calls `f(0)` … `f(n - 1)`, each once, on any thread, in any order.
    ///
    /// Every thread begins with a range of its own, in ascending order, so that what it fetches ahead of its
    /// work is for itself; one that has finished helps the others.
    pub fn tasks(&self, n: usize, f: impl Fn(usize) + Sync) {
        let crew = self.here();
        if crew.threads == 1 || n <= 1 {
            (0..n).for_each(f);
            return;
        }
        let ranges = crew.threads.min(MAX_RANGES);
        let start = |r: usize| r * n / ranges;
        let next: [Line; MAX_RANGES] =
            std::array::from_fn(|r| Line(AtomicUsize::new(start(r.min(ranges)))));
        let work = |first: usize| {
            for r in 0..ranges {
                let r = (first + r) % ranges;
                loop {
                    let i = next[r].0.fetch_add(1, Ordering::Relaxed);
                    if i >= start(r + 1) {
                        break;
                    }
                    f(i);
                }
            }
        };
        // Not a broadcast, which waits until every thread has come: on a busy machine that takes long. What
        // nobody has come for, this thread does itself.
        let work = &work;
        crew.rayon.scope(|scope| {
            for first in 1..crew.threads {
                scope.spawn(move |_| work(first % ranges));
            }
            work(0);
        });
    }

    /// Calls `f(i, &mut items[i])` for every item, each once.
    pub fn each<T: Send>(&self, items: &mut [T], f: impl Fn(usize, &mut T) + Sync) {
        let base = Shared(items.as_mut_ptr());
        self.tasks(items.len(), |i| {
            // SAFETY: `i` is inside the slice and `tasks` hands out each `i` once, so this is the only
            // reference to the item; `items` is borrowed until `tasks` returns.
            f(i, unsafe { &mut *base.get().add(i) });
        });
    }

    /// Calls `f(i, row i)` for every row of a matrix `(n, width)`, each once.
    ///
    /// # Panics
    /// If `width` is 0.
    pub fn rows<T: Send>(
        &self,
        matrix: &mut [T],
        width: usize,
        f: impl Fn(usize, &mut [T]) + Sync,
    ) {
        assert!(width > 0);
        let n = matrix.len() / width;
        let base = Shared(matrix.as_mut_ptr());
        self.tasks(n, |i| {
            // SAFETY: row `i` is inside the matrix and `tasks` hands out each `i` once, so this is the only
            // reference to it; `matrix` is borrowed until `tasks` returns.
            f(i, unsafe {
                std::slice::from_raw_parts_mut(base.get().add(i * width), width)
            });
        });
    }

    /// Fills column stripes of several matrices in one go.
    ///
    /// Part `p` is a matrix `(n, width)`; its columns are cut into stripes of `grain` (the last one may
    /// be narrower) and `f(p, columns, stripe)` is called once for each.
    ///
    /// # Panics
    /// If a part's length is not a multiple of its width, or its grain is 0.
    pub fn stripes(
        &self,
        parts: &mut [Part<'_>],
        f: impl Fn(usize, Range<usize>, Stripe<'_>) + Sync,
    ) {
        for part in parts.iter() {
            assert!(part.width > 0 && part.grain > 0 && part.out.len().is_multiple_of(part.width));
        }
        let shares = |width: usize, grain: usize| width.div_ceil(grain);
        let total = parts.iter().map(|p| shares(p.width, p.grain)).sum();
        let base = Shared(parts.as_mut_ptr());
        let n_parts = parts.len();
        self.tasks(total, |mut i| {
            for p in 0..n_parts {
                // SAFETY: the parts outlive this call and nobody changes them meanwhile. `out` is looked through without making a
                // reference: through a shared one nothing may be written, and an exclusive one would be for one task alone.
                let (out, width, grain) = unsafe {
                    let part = base.get().add(p);
                    (&raw mut *(*part).out, (*part).width, (*part).grain)
                };
                let n = shares(width, grain);
                if i < n {
                    let columns = i * grain..width.min((i + 1) * grain);
                    let stripe = Stripe {
                        // SAFETY: `columns.start < width`, inside the matrix.
                        base: unsafe { out.cast::<f32>().add(columns.start) },
                        width: columns.len(),
                        stride: width,
                        rows: out.len() / width,
                        matrix: PhantomData,
                    };
                    return f(p, columns, stripe);
                }
                i -= n;
            }
        });
    }
}

/// Threads that wait for a disk beside those of a [`Pool`], which compute. They do one thing after the other, all of them
/// together.
pub struct Background(rayon::ThreadPool);

impl Background {
    /// Starts `threads` threads; `name` is what a process viewer shows.
    ///
    /// # Errors
    /// If the operating system refuses to start them.
    pub fn new(threads: usize, name: &'static str) -> Result<Background> {
        build(threads, name, |builder| builder).map(Background)
    }

    /// Runs `f` on one of the threads, where [`try_each`] uses them all, and waits for it.
    pub fn run<R: Send>(&self, f: impl FnOnce() -> R + Send) -> R {
        self.0.install(f)
    }
}

/// Runs `f` on a thread of its own, apart from those that compute. Nobody waits for it.
///
/// # Errors
/// If the operating system refuses to start it.
pub fn apart(name: &'static str, f: impl FnOnce() + Send + 'static) -> Result<()> {
    let thread = std::thread::Builder::new().name(name.to_string());
    thread.spawn(f).map_err(no_threads(1))?;
    Ok(())
}

/// Calls `f` for every item on the threads that this is called on, in their order as far as there is one, until one fails.
///
/// # Errors
/// The first that `f` gives.
pub fn try_each<T: Send>(items: Vec<T>, f: impl Fn(T) -> Result<()> + Sync + Send) -> Result<()> {
    items.into_par_iter().with_max_len(1).try_for_each(f)
}

fn build(
    threads: usize,
    name: &'static str,
    more: impl FnOnce(rayon::ThreadPoolBuilder) -> rayon::ThreadPoolBuilder,
) -> Result<rayon::ThreadPool> {
    let builder = rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .thread_name(move |i| format!("{name}-{i}"));
    more(builder).build().map_err(no_threads(threads))
}

fn no_threads<E: Display>(threads: usize) -> impl FnOnce(E) -> Error {
    move |e| {
        let why = format!("cannot start {threads} threads: {e}; a smaller --threads helps");
        Error::Usage(why)
    }
}

/// Most ranges that [`Pool::tasks`] makes; threads beyond help the first ones.
const MAX_RANGES: usize = 64;

/// A counter in a cache line of its own.
#[repr(align(64))]
struct Line(AtomicUsize);

/// A matrix to be filled by [`Pool::stripes`].
pub struct Part<'a> {
    /// `(n, width)`, row-major.
    pub out: &'a mut [f32],
    /// Columns.
    pub width: usize,
    /// Columns of a stripe.
    pub grain: usize,
}

/// Some columns of a matrix, owned by one task: every row's piece can be written, nothing else.
pub struct Stripe<'a> {
    base: *mut f32,
    width: usize,
    stride: usize,
    rows: usize,
    matrix: PhantomData<&'a mut [f32]>,
}

impl<'a> Stripe<'a> {
    /// All of a matrix `(n, width)`.
    pub fn whole(matrix: &'a mut [f32], width: usize) -> Stripe<'a> {
        assert!(width > 0 && matrix.len().is_multiple_of(width));
        Stripe {
            base: matrix.as_mut_ptr(),
            width,
            stride: width,
            rows: matrix.len() / width,
            matrix: PhantomData,
        }
    }

    /// Rows of the matrix.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Columns of the stripe.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Row `i`'s piece, `(width)`.
    ///
    /// # Panics
    /// If there is no row `i`.
    pub fn row(&mut self, i: usize) -> &mut [f32] {
        assert!(i < self.rows);
        // SAFETY: row `i` exists, so its piece lies inside the matrix; stripes of one matrix do not
        // overlap, and `&mut self` allows one piece at a time.
        unsafe { std::slice::from_raw_parts_mut(self.base.add(i * self.stride), self.width) }
    }

    /// All rows' pieces, each `(width)`.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = &mut [f32]> {
        (0..self.rows).map(|i| {
            // SAFETY: as in `row`; each row's piece is handed out once, and `self` is borrowed by all.
            unsafe { std::slice::from_raw_parts_mut(self.base.add(i * self.stride), self.width) }
        })
    }
}

/// A pointer that may cross threads; each use says why that is sound.
struct Shared<T>(*mut T);

impl<T> Shared<T> {
    fn get(&self) -> *mut T {
        self.0
    }
}

// SAFETY: only used above, where tasks touch disjoint items or read plain data.
unsafe impl<T: Send> Sync for Shared<T> {}

/// Threads to use when nobody says: one for each large core that this process may run on, fewer where a control group
/// grants less CPU time. Where the system does not tell, as many as it has CPUs for this process.
pub fn default_threads() -> usize {
    let cpus = || std::thread::available_parallelism().map_or(1, |n| n.get());
    Cores::here().map_or_else(cpus, |cores| cores.threads)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_once() {
        for threads in [1, 2, 3, 8] {
            let pool = Pool::new(threads).unwrap();
            let mut hits = vec![0usize; 1000];
            pool.enter(|| pool.each(&mut hits, |i, h| *h += i + 1));
            assert!(hits.iter().enumerate().all(|(i, h)| *h == i + 1));
        }
    }

    /// Work for batches is done by their threads, all other by the others.
    #[test]
    fn batches_have_their_own_threads() {
        for (n, batch, want) in [(2, 3, 3), (3, 1, 1), (2, 0, 2), (2, 2, 2)] {
            let threads = Threads {
                n,
                batch,
                pin: true,
            };
            let pool = Pool::with(threads).unwrap();
            assert_eq!((pool.threads(), pool.batch_threads()), (n, want));
            let mut hits = vec![0usize; 100];
            let mut work = |inside: usize| {
                assert_eq!(rayon::current_num_threads(), inside);
                pool.each(&mut hits, |i, h| {
                    assert_eq!(rayon::current_num_threads(), inside);
                    *h += i + 1;
                });
            };
            pool.enter(|| work(n));
            pool.enter_batch(|| work(want));
            pool.each(&mut hits, |i, h| *h += i + 1);
            assert!(hits.iter().enumerate().all(|(i, h)| *h == 3 * (i + 1)));
        }
    }

    #[test]
    fn stripes_cover_every_element_once() {
        let pool = Pool::new(3).unwrap();
        let (mut a, mut b) = (vec![0.0f32; 5 * 37], vec![0.0f32; 64]);
        let mut parts = [
            Part {
                out: &mut a,
                width: 37,
                grain: 16,
            },
            Part {
                out: &mut b,
                width: 64,
                grain: 7,
            },
        ];
        pool.stripes(&mut parts, |p, columns, mut stripe| {
            assert_eq!(stripe.width(), columns.len());
            for r in 0..stripe.rows() {
                for (c, y) in columns.clone().zip(stripe.row(r)) {
                    *y += (1000 * p + 100 * r + c) as f32 + 1.0;
                }
            }
        });
        for (i, y) in a.iter().enumerate() {
            assert_eq!(*y, (100 * (i / 37) + i % 37) as f32 + 1.0);
        }
        for (i, y) in b.iter().enumerate() {
            assert_eq!(*y, (1000 + i) as f32 + 1.0);
        }
    }
}
