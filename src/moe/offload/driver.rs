//! The calls of a driver that a device takes: memory, copies, launches. `offload/cuda.rs` makes them; in tests, a CPU that takes
//! itself for a device.

use super::Fault;
use std::ffi::c_void;

/// Threads of a block, in every kernel.
pub(super) const THREADS: u32 = 128;
/// Experts on their way through the device at a time; each has a mark, by its turn.
pub(super) const TURNS: usize = 3;
/// The mark between a router and the experts that it chose: what is before it can be fetched while they run.
pub(super) const CHOSEN: usize = TURNS;
/// Marks of a driver.
pub(super) const MARKS: usize = TURNS + 1;

/// The calls that a device takes. Those that return at once happen in the order in which they were made.
pub(super) trait Driver: Send + Sync + 'static {
    /// For people.
    fn name(&self) -> String;

    /// Bytes of memory that are free.
    fn free(&self) -> Result<u64, Fault>;

    /// Memory; stays valid until it is given back, or all of the driver ends.
    fn alloc(&self, bytes: usize) -> Result<u64, Fault>;

    /// Gives memory back that nothing uses.
    fn dealloc(&self, at: u64);

    /// Copies to the device. May return before that has happened, but is done with `bytes` then.
    fn write(&self, at: u64, bytes: &[u8]) -> Result<(), Fault>;

    /// Runs a kernel of `offload.cu`; may return before that has happened. `grid`: blocks.
    ///
    /// # Safety
    /// `args` are those of the kernel, and what it reads and writes lies in memory of this driver.
    unsafe fn launch(&self, kernel: &str, grid: [u32; 2], args: &[Arg]) -> Result<(), Fault>;

    /// Copies from the device, after everything before.
    fn read(&self, at: u64, out: &mut [u8]) -> Result<(), Fault>;

    /// Launches of this thread are noted from now on and not done, until `recorded`.
    fn record(&self) -> Result<(), Fault>;

    /// Ends what `record` began. Returns what it was, for `replay`.
    fn recorded(&self) -> Result<u64, Fault>;

    /// Does what was recorded, with the same arguments and whatever the memory holds now.
    fn replay(&self, graph: u64) -> Result<(), Fault>;

    /// Lets a record go that is not used any more.
    fn forget(&self, graph: u64);

    /// Sets mark `i`, one of [`MARKS`], behind everything that was begun.
    fn mark(&self, i: usize) -> Result<(), Fault>;

    /// Copies from the device as soon as everything before mark `i` has ended, while what is behind it goes on. Nothing behind it
    /// writes there.
    fn fetch(&self, i: usize, at: u64, out: &mut [u8]) -> Result<(), Fault>;

    /// Waits until everything before mark `i` has ended; not at all, if it was never set.
    fn reached(&self, i: usize) -> Result<(), Fault>;

    /// Copies to the device beside all of the above, which go on meanwhile, and waits for it. Called from a thread of its own.
    fn stage(&self, at: u64, bytes: &[u8]) -> Result<(), Fault>;
}

/// A kernel that is to run.
pub(super) struct Launch {
    kernel: String,
    /// Blocks.
    grid: [u32; 2],
    args: Vec<Arg>,
}

impl Launch {
    pub(super) fn new(kernel: &str, grid: [usize; 2], args: &[Arg]) -> Launch {
        Launch {
            kernel: kernel.to_string(),
            grid: grid.map(|n| u32::try_from(n).expect("sizes of a model")),
            args: args.to_vec(),
        }
    }

    /// Begins it.
    ///
    /// # Safety
    /// As for [`Driver::launch`].
    pub(super) unsafe fn begin(&self, driver: &impl Driver) -> Result<(), Fault> {
        // SAFETY: the caller's promise, handed on.
        unsafe { driver.launch(&self.kernel, self.grid, &self.args) }
    }
}

/// An argument of a kernel.
#[derive(Clone, Copy, Debug)]
pub(super) enum Arg {
    /// A pointer, or a long number.
    Long(u64),
    /// A number.
    Int(i32),
}

impl Arg {
    /// Where the arguments are, as drivers want to know it: pointers to values that live as long as `args`.
    pub(super) fn pointers(args: &[Arg]) -> Vec<*mut c_void> {
        let pointer = |arg: &Arg| match arg {
            Arg::Long(x) => std::ptr::from_ref(x) as *mut c_void,
            Arg::Int(x) => std::ptr::from_ref(x) as *mut c_void,
        };
        args.iter().map(pointer).collect()
    }
}

/// A size, which is an `int` in the kernels.
pub(super) fn int(n: usize) -> Arg {
    Arg::Int(i32::try_from(n).expect("sizes of a model"))
}

/// A float, which goes as its bits.
pub(super) fn float(x: f32) -> Arg {
    Arg::Int(x.to_bits() as i32)
}
