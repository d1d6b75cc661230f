//! A driver without a device: `offload.cu`, compiled for the CPU by a C++ compiler (`offload/emulated.h`).

use super::Fault;
use super::driver::{Arg, CHOSEN, Driver, MARKS, THREADS};
use std::collections::HashMap;
use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_void};
use std::ops::Range;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock};

type Launch = unsafe extern "C" fn(
    name: *const c_char,
    x: c_uint,
    y: c_uint,
    z: c_uint,
    threads: c_uint,
    args: *mut *mut c_void,
    reverse: c_int,
) -> c_int;

/// The kernels without and with tensor cores' instructions; they have one set of fibers each, hence the lock.
static KERNELS: [OnceLock<Option<Mutex<Launch>>>; 2] = [const { OnceLock::new() }; 2];

/// Memory in words of 64 bytes.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Line(#[allow(dead_code)] [u8; 64]);

/// The driver.
pub(super) struct Emulated {
    launch: &'static Mutex<Launch>,
    memory: Mutex<HashMap<u64, Vec<Line>>>,
    /// Lanes and warps run in the opposite order.
    pub(super) reverse: AtomicBool,
    /// Bytes that may be taken.
    pub(super) room: AtomicUsize,
    /// Calls until it is lost.
    pub(super) lives: AtomicUsize,
    /// What is being recorded, and what was.
    recording: Mutex<Option<Graph>>,
    graphs: Mutex<Vec<Option<Graph>>>,
    /// Records that were replayed.
    pub(super) replays: AtomicUsize,
    /// Copies that came beside the kernels.
    pub(super) staged: AtomicUsize,
    /// Copies back that waited for everything, and those that waited for a mark.
    pub(super) reads: AtomicUsize,
    pub(super) fetched: AtomicUsize,
    order: Mutex<Order>,
    /// Whatever has been fetched before, by place and length, as it was at the mark `CHOSEN`.
    chosen: Mutex<HashMap<(u64, usize), Vec<u8>>>,
}

/// Who uses which memory, as far as a device would know: kernels here end at once, on a device they do not.
#[derive(Default)]
struct Order {
    /// Addresses that kernels read since the last mark, and those before each mark that nobody has waited for.
    unmarked: Vec<u64>,
    marked: [Vec<u64>; MARKS],
    /// Where a copy goes that has not ended.
    coming: Vec<Range<u64>>,
}

/// Launches: kernel, grid, arguments.
type Graph = Vec<(String, [u32; 2], Vec<Arg>)>;

/// Compiles the kernels; nothing where there is no C++ compiler, which is said.
fn compiled(tensor_cores: bool) -> Option<Mutex<Launch>> {
    let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".to_string());
    if Command::new(&compiler).arg("--version").output().is_err() {
        // Said past the test harness, which hides what a test prints.
        let word = "SKIPPED: offload.cu was not run on the CPU: no C++ compiler (CXX names one)\n";
        std::io::Write::write_all(&mut std::io::stderr(), word.as_bytes()).unwrap();
        return None;
    }
    let folder = tempfile::tempdir().unwrap();
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/moe");
    let library = folder.path().join("kernels.so");
    let options = "-std=c++17 -O2 -ffp-contract=off -U_FORTIFY_SOURCE -shared -fPIC -fvisibility=hidden -DEMULATED";
    // A device faults where an address is not aligned to what is read from it; so does this.
    let strict = "-fsanitize=alignment,bounds,shift -fsanitize-undefined-trap-on-error";
    let mut command = Command::new(&compiler);
    command.args(options.split(' ')).args(strict.split(' '));
    if tensor_cores {
        command.arg("-DMMA");
    }
    // `fmaf` in one instruction, where there is one.
    if cfg!(target_arch = "x86_64") && crate::simd::best(None) > crate::simd::Tier::Scalar {
        command.arg("-mfma");
    }
    command.arg("-include");
    command.arg(source.join("offload/emulated.h"));
    command.args(["-x", "c++"]).arg(source.join("offload.cu"));
    let out = command.arg("-o").arg(&library).output().unwrap();
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{compiler}: {said}");
    let library = CString::new(library.to_str().unwrap()).unwrap();
    // SAFETY: the library was just made of our own sources; its function has this type (emulated.h), and it stays loaded.
    let launch = unsafe {
        let handle = libc::dlopen(library.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL);
        assert!(!handle.is_null(), "{:?}", CStr::from_ptr(libc::dlerror()));
        let launch = libc::dlsym(handle, c"octet_launch".as_ptr());
        assert!(!launch.is_null());
        std::mem::transmute::<*mut c_void, Launch>(launch)
    };
    Some(Mutex::new(launch))
}

impl Emulated {
    /// A driver; nothing where there is no C++ compiler. `tensor_cores`: with those instructions.
    pub(super) fn new(tensor_cores: bool) -> Option<Emulated> {
        let kernels = &KERNELS[usize::from(tensor_cores)];
        let launch = kernels.get_or_init(|| compiled(tensor_cores)).as_ref()?;
        Some(Emulated {
            launch,
            memory: Mutex::default(),
            reverse: AtomicBool::new(false),
            room: AtomicUsize::new(usize::MAX),
            lives: AtomicUsize::new(usize::MAX),
            recording: Mutex::default(),
            graphs: Mutex::default(),
            replays: AtomicUsize::new(0),
            staged: AtomicUsize::new(0),
            reads: AtomicUsize::new(0),
            fetched: AtomicUsize::new(0),
            order: Mutex::default(),
            chosen: Mutex::default(),
        })
    }

    /// Records that are kept.
    pub(super) fn records(&self) -> usize {
        self.graphs.lock().unwrap().iter().flatten().count()
    }

    /// Every call begins so.
    fn call(&self) -> Result<(), Fault> {
        let (get, set) = (Ordering::Relaxed, Ordering::Relaxed);
        let left = self.lives.fetch_update(set, get, |n| n.checked_sub(1));
        let gone = |_| Fault::Lost("the test took it away".into());
        left.map(|_| ()).map_err(gone)
    }

    /// The memory behind an address: what it belongs to must have `len` bytes from there on.
    fn inside(&self, at: u64, len: usize) -> *mut u8 {
        assert!(self.has(at, len), "{len} bytes at {at:x} are outside");
        at as *mut u8
    }

    /// Whether these bytes are within some memory.
    fn has(&self, at: u64, len: usize) -> bool {
        let memory = self.memory.lock().unwrap();
        memory.iter().any(|(start, lines)| {
            *start <= at && at + len as u64 <= start + 64 * lines.len() as u64
        })
    }
}

impl Driver for Emulated {
    fn name(&self) -> String {
        "a CPU".to_string()
    }

    fn free(&self) -> Result<u64, Fault> {
        Ok(self.room.load(Ordering::Relaxed) as u64)
    }

    fn alloc(&self, bytes: usize) -> Result<u64, Fault> {
        assert!(bytes > 0, "a device has no memory of no bytes");
        let taken = self
            .room
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |room| {
                room.checked_sub(bytes)
            });
        taken.map_err(|_| Fault::Full)?;
        // Not zero, which would hide what was never written.
        let mut lines = vec![Line([0xa5; 64]); bytes.div_ceil(64)];
        let at = lines.as_mut_ptr() as u64;
        self.memory.lock().unwrap().insert(at, lines);
        Ok(at)
    }

    fn dealloc(&self, at: u64) {
        let lines = self.memory.lock().unwrap().remove(&at);
        let bytes = 64 * lines.expect("memory that was taken").len();
        self.room.fetch_add(bytes, Ordering::Relaxed);
    }

    fn write(&self, at: u64, bytes: &[u8]) -> Result<(), Fault> {
        self.call()?;
        assert!(self.recording.lock().unwrap().is_none());
        // SAFETY: `inside` looked; kernels, which could read it, run in `launch` only.
        unsafe {
            let to = self.inside(at, bytes.len());
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len());
        }
        Ok(())
    }

    unsafe fn launch(&self, kernel: &str, grid: [u32; 2], args: &[Arg]) -> Result<(), Fault> {
        self.call()?;
        let [x, y] = grid;
        // A device refuses others.
        assert!(
            (1..1 << 31).contains(&x) && (1..1 << 16).contains(&y),
            "{kernel}: {grid:?}"
        );
        if let Some(graph) = &mut *self.recording.lock().unwrap() {
            graph.push((kernel.to_string(), grid, args.to_vec()));
            return Ok(());
        }
        {
            let mut order = self.order.lock().unwrap();
            for arg in args {
                if let Arg::Long(at) = arg {
                    let early = order.coming.iter().any(|range| range.contains(at));
                    assert!(!early, "{kernel} reads what has not arrived");
                    order.unmarked.push(*at);
                }
            }
        }
        let name = CString::new(kernel).unwrap();
        let mut args = Arg::pointers(args);
        let reverse = c_int::from(self.reverse.load(Ordering::Relaxed));
        let launch = self.launch.lock().unwrap();
        // SAFETY: the caller's promise about the arguments, which the callee only reads.
        let found = unsafe { launch(name.as_ptr(), x, y, 1, THREADS, args.as_mut_ptr(), reverse) };
        assert_eq!(found, 1, "no kernel {kernel}");
        Ok(())
    }

    fn record(&self) -> Result<(), Fault> {
        self.call()?;
        let before = self.recording.lock().unwrap().replace(Graph::new());
        assert!(before.is_none());
        Ok(())
    }

    fn recorded(&self) -> Result<u64, Fault> {
        // What has begun ends in any case.
        let graph = self.recording.lock().unwrap().take();
        self.call()?;
        let mut graphs = self.graphs.lock().unwrap();
        graphs.push(Some(graph.expect("it was begun")));
        Ok(graphs.len() as u64 - 1)
    }

    fn replay(&self, graph: u64) -> Result<(), Fault> {
        self.call()?;
        let graph = self.graphs.lock().unwrap()[graph as usize].clone();
        for (kernel, grid, args) in graph.expect("it is not forgotten") {
            // SAFETY: the promise that was made when it was recorded.
            unsafe { self.launch(&kernel, grid, &args)? };
        }
        self.replays.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn forget(&self, graph: u64) {
        let forgotten = self.graphs.lock().unwrap()[graph as usize].take();
        assert!(forgotten.is_some());
    }

    fn mark(&self, i: usize) -> Result<(), Fault> {
        self.call()?;
        let order = &mut *self.order.lock().unwrap();
        order.marked[i] = std::mem::take(&mut order.unmarked);
        if i == CHOSEN {
            let chosen = &mut *self.chosen.lock().unwrap();
            chosen.retain(|(at, len), _| self.has(*at, *len));
            for ((at, len), then) in chosen {
                // SAFETY: the memory has it, and kernels have ended.
                let now = unsafe { std::slice::from_raw_parts(*at as *const u8, *len) };
                then.copy_from_slice(now);
            }
        }
        Ok(())
    }

    fn fetch(&self, i: usize, at: u64, out: &mut [u8]) -> Result<(), Fault> {
        self.call()?;
        assert!(i == CHOSEN && self.recording.lock().unwrap().is_none());
        self.fetched.fetch_add(1, Ordering::Relaxed);
        // SAFETY: `inside` looked at it.
        let now = unsafe { std::slice::from_raw_parts(self.inside(at, out.len()), out.len()) };
        let mut chosen = self.chosen.lock().unwrap();
        let then = chosen.entry((at, out.len())).or_insert(now.to_vec());
        assert!(then == now, "what is behind the mark has written here");
        out.copy_from_slice(then);
        Ok(())
    }

    fn reached(&self, i: usize) -> Result<(), Fault> {
        self.call()?;
        self.order.lock().unwrap().marked[i].clear();
        Ok(())
    }

    fn read(&self, at: u64, out: &mut [u8]) -> Result<(), Fault> {
        self.call()?;
        self.reads.fetch_add(1, Ordering::Relaxed);
        // Everything before has ended.
        let mut order = self.order.lock().unwrap();
        order.unmarked.clear();
        order.marked.iter_mut().for_each(Vec::clear);
        drop(order);
        assert!(self.recording.lock().unwrap().is_none());
        // SAFETY: `inside` looked.
        unsafe {
            let from = self.inside(at, out.len());
            std::ptr::copy_nonoverlapping(from, out.as_mut_ptr(), out.len());
        }
        Ok(())
    }

    fn stage(&self, at: u64, bytes: &[u8]) -> Result<(), Fault> {
        let range = at..at + bytes.len() as u64;
        {
            let mut order = self.order.lock().unwrap();
            let reads = order.unmarked.iter().chain(order.marked.iter().flatten());
            let used = reads.into_iter().any(|at| range.contains(at));
            assert!(!used, "a kernel may still read what this overwrites");
            order.coming.push(range.clone());
        }
        self.staged.fetch_add(1, Ordering::Relaxed);
        // So that whoever does not wait is seen.
        std::thread::yield_now();
        let written = self.write(at, bytes);
        let mut order = self.order.lock().unwrap();
        order.coming.retain(|other| *other != range);
        written
    }
}
