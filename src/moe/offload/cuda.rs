//! The driver of an NVIDIA GPU, by way of cudarc: libraries are looked for at run time, so that this builds and starts where
//! there are none.

use super::driver::{Arg, Driver, MARKS, THREADS};
use super::gpu::Gpu;
use super::kernels::{OPTIONS, SOURCE, kernels};
use super::{Device, Fault};
use crate::disk::{self, WholeFile};
use crate::error::Error;
use crate::gguf::hex;
use cudarc::driver::result::{self, DriverError, event, launch_kernel, module, stream};
use cudarc::driver::{CudaContext, sys};
use cudarc::nvrtc::{self, CompileOptions};
use sha2::{Digest, Sha256};
use std::collections::{HashMap, HashSet};
use std::ffi::CString;
use std::io::Write;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

/// Bytes of one of the pinned buffers that weights go through, and how many there are.
const STAGE: usize = 8 << 20;
const STAGES: usize = 4;
/// The kernels as PTX are smaller.
const MOST_PTX: u64 = 64 << 20;
/// Instruction sets that the kernels are compiled for, if a device's own is too new for the compiler.
const ARCHS: [i32; 3] = [90, 80, 70];

/// Opens GPU `ordinal`. `cache`: a folder where compiled kernels are kept.
///
/// # Errors
/// Why there is none, for people.
pub fn open(ordinal: usize, cache: Option<&Path>) -> Result<Box<dyn Device>, String> {
    // Asked first: cudarc panics where a library is missing.
    // SAFETY: looks for a library and loads it.
    if !unsafe { sys::is_culib_present() } {
        return Err("no NVIDIA driver was found (libcuda)".to_string());
    }
    let cuda = Cuda::open(ordinal, cache)?;
    match Gpu::new(cuda) {
        Ok(gpu) => Ok(Box::new(gpu)),
        Err(Fault::Full) => Err("it has no memory left".to_string()),
        Err(Fault::Lost(why)) => Err(why),
    }
}

/// An open GPU.
struct Cuda {
    context: Arc<CudaContext>,
    name: String,
    module: sys::CUmodule,
    functions: HashMap<String, sys::CUfunction>,
    /// Kernels and what they read and write.
    compute: sys::CUstream,
    /// What is allocated.
    memory: Mutex<HashSet<u64>>,
    staging: Mutex<Staging>,
    /// What was recorded; nothing, once it is forgotten.
    graphs: Mutex<Vec<Option<Graph>>>,
    /// Behind kernels of `compute`.
    marks: [sys::CUevent; MARKS],
    /// What is fetched while those run.
    beside: sys::CUstream,
}

/// A record, and what it became to be run.
#[derive(Clone, Copy)]
struct Graph(sys::CUgraph, sys::CUgraphExec);

/// Pinned buffers by turns: one is filled while the others are on their way.
struct Staging {
    stream: sys::CUstream,
    buffers: [(*mut u8, sys::CUevent); STAGES],
}

// SAFETY: handles and pinned memory belong to the process, not to a thread; each call makes the context current on its own
// thread first, and what changes is behind locks.
unsafe impl Send for Cuda {}
// SAFETY: as above.
unsafe impl Sync for Cuda {}

/// The driver's word, for people.
fn word(what: &str, e: DriverError) -> String {
    let name = e
        .error_name()
        .ok()
        .map(|n| n.to_string_lossy().into_owned());
    format!("{what}: {}", name.unwrap_or_else(|| format!("{:?}", e.0)))
}

fn lost(what: &'static str) -> impl Fn(DriverError) -> Fault {
    move |e| match e.0 {
        sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => Fault::Full,
        _ => Fault::Lost(word(what, e)),
    }
}

impl Cuda {
    fn open(ordinal: usize, cache: Option<&Path>) -> Result<Cuda, String> {
        let failed = |what: &'static str| move |e: DriverError| word(what, e);
        let count = CudaContext::device_count().map_err(failed("starting CUDA"))?;
        if ordinal >= count.max(0) as usize {
            return Err(format!(
                "there is no GPU {ordinal} (the driver has {count})"
            ));
        }
        let context = CudaContext::new(ordinal).map_err(failed("opening the GPU"))?;
        let name = context.name().map_err(failed("asking the GPU"))?;
        let (major, minor) = context
            .compute_capability()
            .map_err(failed("asking the GPU"))?;
        if major < 7 {
            return Err(format!(
                "{name} is too old (expected compute capability 7.0 or later, found {major}.{minor})"
            ));
        }
        let ptx = ptx(10 * major + minor, cache, compiler())?;
        let image = CString::new(ptx).map_err(|_| "the kernels hold a 0 byte".to_string())?;
        // SAFETY: the context is current since it was made; the image is a text that ends with 0; each handle is used as
        // what it was returned as, and freed once, in `drop`.
        unsafe {
            let module = module::load_data(image.as_ptr().cast()).map_err(failed(
                "loading the kernels (a driver older than NVRTC refuses them)",
            ))?;
            let mut functions = HashMap::new();
            for kernel in kernels() {
                let name = CString::new(kernel.as_str()).expect("names of kernels");
                let function = module::get_function(module, name);
                functions.insert(kernel, function.map_err(failed("finding a kernel"))?);
            }
            let stream = || stream::create(stream::StreamKind::NonBlocking);
            let buffer = || -> Result<_, DriverError> {
                let memory = result::malloc_host(STAGE, 0)?;
                let event = event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING)?;
                Ok((memory.cast(), event))
            };
            let pinned = failed("making pinned memory");
            let staging = Staging {
                stream: stream().map_err(failed("making a stream"))?,
                buffers: [
                    buffer().map_err(&pinned)?,
                    buffer().map_err(&pinned)?,
                    buffer().map_err(&pinned)?,
                    buffer().map_err(&pinned)?,
                ],
            };
            let event = || event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING);
            let event = || event().map_err(failed("making an event"));
            let marks = [event()?, event()?, event()?, event()?];
            Ok(Cuda {
                name,
                module,
                functions,
                compute: stream().map_err(failed("making a stream"))?,
                memory: Mutex::default(),
                staging: Mutex::new(staging),
                graphs: Mutex::default(),
                marks,
                beside: stream().map_err(failed("making a stream"))?,
                context,
            })
        }
    }

    /// Every call on a thread begins so.
    fn here(&self) -> Result<(), Fault> {
        let bound = self.context.bind_to_thread();
        bound.map_err(lost("using the GPU"))
    }
}

/// The version of NVRTC; nothing, where it is not to be had.
fn compiler() -> Option<(i32, i32)> {
    let (mut major, mut minor) = (0, 0);
    // SAFETY: looks for a library and loads it; cudarc panics where it is missing, so that this is asked first. The function
    // writes two numbers.
    let done = unsafe {
        nvrtc::sys::is_culib_present()
            && nvrtc::sys::nvrtcVersion(&mut major, &mut minor)
                .result()
                .is_ok()
    };
    done.then_some((major, minor))
}

/// What the names of kept kernels for a device of compute capability `arch` begin with.
fn kept_as(arch: i32) -> String {
    let mut hash = Sha256::new();
    hash.update(SOURCE);
    hash.update(OPTIONS.concat());
    hash.update(arch.to_string());
    format!("kernels-{}-", &hex(&hash.finalize())[..16])
}

/// Kept kernels, if nothing happened to them.
fn kept(file: &Path) -> Option<String> {
    let text = String::from_utf8(disk::read(file, MOST_PTX).ok()?).ok()?;
    let (sum, ptx) = text.strip_prefix("// ")?.split_once('\n')?;
    (sum == hex(&Sha256::digest(ptx))).then(|| ptx.to_string())
}

/// Keeps kernels for their owner, who runs them: nobody else may write there.
fn keep(file: &Path, ptx: &str) -> Result<(), Error> {
    disk::private_folder(disk::folder_of(file))?;
    let mut out = WholeFile::create_private(file)?;
    let text = format!("// {}\n{ptx}", hex(&Sha256::digest(ptx)));
    out.write_all(text.as_bytes())
        .map_err(Error::io(file, "write"))?;
    out.finish()
}

/// The kernels for a device of compute capability `arch`, from the cache or compiled. What another version of NVRTC made is used
/// only where there is none: a driver that is older than its NVRTC refuses what that makes, and another one helps.
fn ptx(arch: i32, cache: Option<&Path>, compiler: Option<(i32, i32)>) -> Result<String, String> {
    let name = kept_as(arch);
    let file = match (cache, compiler) {
        (Some(folder), Some((major, minor))) => {
            Some(folder.join(format!("{name}{major}.{minor}.ptx")))
        }
        _ => None,
    };
    let known = match (cache, &file) {
        (_, Some(file)) => kept(file),
        (Some(folder), None) => {
            let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
            let its = entries.filter(|entry| {
                let file = entry.file_name();
                let file = file.to_string_lossy();
                file.starts_with(&name) && file.ends_with(".ptx")
            });
            let mut files: Vec<_> = its.map(|entry| entry.path()).collect();
            files.sort();
            files.iter().rev().find_map(|file| kept(file))
        }
        (None, None) => None,
    };
    if let Some(ptx) = known {
        return Ok(ptx);
    }
    let ptx = compile(arch)?;
    if let Some(file) = file {
        // Without a cache they are compiled again next time; no reason to trouble the user.
        let _ = keep(&file, &ptx);
    }
    Ok(ptx)
}

/// Compiles the kernels for `arch`, or for the newest older one that the compiler knows.
fn compile(arch: i32) -> Result<String, String> {
    if compiler().is_none() {
        return Err(
            "NVRTC, CUDA's compiler at run time, was not found (libnvrtc); it comes with the CUDA toolkit, or as the Python \
             package nvidia-cuda-nvrtc-cu12, whose folder lib then belongs into LD_LIBRARY_PATH"
                .to_string(),
        );
    }
    let older = ARCHS.into_iter().filter(|older| *older < arch);
    let mut first = None;
    for arch in std::iter::once(arch).chain(older) {
        let mut options = OPTIONS.map(str::to_string).to_vec();
        options.push(format!("--gpu-architecture=compute_{arch}"));
        let options = CompileOptions {
            options,
            name: Some("offload.cu".to_string()),
            ..CompileOptions::default()
        };
        match nvrtc::compile_ptx_with_opts(SOURCE, options) {
            Ok(ptx) => return Ok(ptx.to_src()),
            Err(e) => first = first.or(Some(e)),
        }
    }
    Err(format!("NVRTC does not compile the kernels: {first:?}"))
}

impl Driver for Cuda {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn free(&self) -> Result<u64, Fault> {
        self.here()?;
        let (free, _) = result::mem_get_info().map_err(lost("asking for memory"))?;
        Ok(free as u64)
    }

    fn alloc(&self, bytes: usize) -> Result<u64, Fault> {
        self.here()?;
        // SAFETY: whoever gets the memory writes before reading.
        let at = unsafe { result::malloc_sync(bytes) }.map_err(lost("taking memory"))?;
        let mut memory = self.memory.lock().unwrap_or_else(PoisonError::into_inner);
        memory.insert(at);
        Ok(at)
    }

    fn dealloc(&self, at: u64) {
        let mut memory = self.memory.lock().unwrap_or_else(PoisonError::into_inner);
        if memory.remove(&at) && self.here().is_ok() {
            // SAFETY: it was allocated here and not freed since; the driver waits for kernels that run. A lost device has
            // nothing to give back.
            let _ = unsafe { result::free_sync(at) };
        }
    }

    fn write(&self, at: u64, bytes: &[u8]) -> Result<(), Fault> {
        self.here()?;
        // SAFETY: the memory is this driver's. Pageable memory has been copied when the call returns (CUDA Driver API,
        // "API synchronization behavior").
        let copied = unsafe { result::memcpy_htod_async(at, bytes, self.compute) };
        copied.map_err(lost("writing to the GPU"))
    }

    unsafe fn launch(&self, kernel: &str, grid: [u32; 2], args: &[Arg]) -> Result<(), Fault> {
        self.here()?;
        let function = self.functions[kernel];
        let mut args = Arg::pointers(args);
        let [x, y] = grid;
        // SAFETY: the caller's promise; the arguments are copied before the call returns.
        let launched = unsafe {
            launch_kernel(
                function,
                (x, y, 1),
                (THREADS, 1, 1),
                0,
                self.compute,
                &mut args,
            )
        };
        launched.map_err(lost("starting a kernel"))
    }

    fn record(&self) -> Result<(), Fault> {
        self.here()?;
        // Of this thread alone: weights are copied by another one meanwhile, in a stream of their own.
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream lives as long as this.
        let begun = unsafe { stream::begin_capture(self.compute, mode) };
        begun.map_err(lost("recording kernels"))
    }

    fn recorded(&self) -> Result<u64, Fault> {
        self.here()?;
        let failed = lost("recording kernels");
        // SAFETY: the capture was begun in `record`; what it gave is destroyed once, here or in `release`.
        let graph = unsafe {
            let graph = stream::end_capture(self.compute).map_err(&failed)?;
            if graph.is_null() {
                return Err(Fault::Lost("recording kernels: nothing came of it".into()));
            }
            match result::graph::instantiate(graph, sys::CUgraphInstantiate_flags(0)) {
                Ok(exec) => Graph(graph, exec),
                Err(e) => {
                    let _ = result::graph::destroy(graph);
                    return Err(failed(e));
                }
            }
        };
        let mut graphs = self.graphs.lock().unwrap_or_else(PoisonError::into_inner);
        graphs.push(Some(graph));
        Ok(graphs.len() as u64 - 1)
    }

    fn replay(&self, graph: u64) -> Result<(), Fault> {
        self.here()?;
        let graphs = self.graphs.lock().unwrap_or_else(PoisonError::into_inner);
        let Graph(_, exec) = graphs[graph as usize].expect("it is not forgotten");
        // SAFETY: it was made in `recorded` and not destroyed since; what its kernels read and write is the promise of whoever
        // recorded it.
        let launched = unsafe { result::graph::launch(exec, self.compute) };
        launched.map_err(lost("starting kernels"))
    }

    fn forget(&self, graph: u64) {
        let mut graphs = self.graphs.lock().unwrap_or_else(PoisonError::into_inner);
        let graph = graphs[graph as usize].take();
        if let Some(graph) = graph.filter(|_| self.here().is_ok()) {
            release(graph);
        }
    }

    fn read(&self, at: u64, out: &mut [u8]) -> Result<(), Fault> {
        self.here()?;
        // SAFETY: the memory is this driver's; `out` is not touched until the stream has come to its end.
        unsafe {
            let copied = result::memcpy_dtoh_async(out, at, self.compute);
            copied.map_err(lost("reading from the GPU"))?;
            stream::synchronize(self.compute).map_err(lost("waiting for the GPU"))
        }
    }

    fn mark(&self, i: usize) -> Result<(), Fault> {
        self.here()?;
        // SAFETY: stream and event live as long as this.
        let set = unsafe { event::record(self.marks[i], self.compute) };
        set.map_err(lost("marking kernels"))
    }

    fn fetch(&self, i: usize, at: u64, out: &mut [u8]) -> Result<(), Fault> {
        self.here()?;
        let wait = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
        // SAFETY: stream and event live as long as this, and the memory is this driver's; `out` is not touched until the stream has
        // come to its end.
        unsafe {
            let waits = stream::wait_event(self.beside, self.marks[i], wait);
            waits.map_err(lost("waiting for kernels"))?;
            let copied = result::memcpy_dtoh_async(out, at, self.beside);
            copied.map_err(lost("reading from the GPU"))?;
            stream::synchronize(self.beside).map_err(lost("waiting for the GPU"))
        }
    }

    fn reached(&self, i: usize) -> Result<(), Fault> {
        self.here()?;
        // SAFETY: the event lives as long as this; one that was never recorded has happened.
        let reached = unsafe { event::synchronize(self.marks[i]) };
        reached.map_err(lost("waiting for kernels"))
    }

    fn stage(&self, at: u64, bytes: &[u8]) -> Result<(), Fault> {
        self.here()?;
        let staging = self.staging.lock().unwrap_or_else(PoisonError::into_inner);
        let Staging { stream, buffers } = &*staging;
        for (i, piece) in bytes.chunks(STAGE).enumerate() {
            let (buffer, event) = buffers[i % STAGES];
            // SAFETY: the buffer has `STAGE` bytes and its last copy has ended once its event has happened (an event that was
            // never recorded has); nobody else uses it while the lock is held.
            unsafe {
                event::synchronize(event).map_err(lost("waiting for a copy"))?;
                std::ptr::copy_nonoverlapping(piece.as_ptr(), buffer, piece.len());
                let pinned = std::slice::from_raw_parts(buffer, piece.len());
                let to = at + (i * STAGE) as u64;
                let copied = result::memcpy_htod_async(to, pinned, *stream);
                copied.map_err(lost("copying weights"))?;
                event::record(event, *stream).map_err(lost("copying weights"))?;
            }
        }
        for (_, event) in buffers {
            // SAFETY: as above. What was copied may be used when all events have happened.
            unsafe { event::synchronize(*event) }.map_err(lost("copying weights"))?;
        }
        Ok(())
    }
}

/// Destroys a record that nobody has any more; one that runs goes on to its end.
fn release(Graph(graph, exec): Graph) {
    // SAFETY: both were made in `recorded`, and whoever calls this has taken them out of the list.
    unsafe {
        let _ = result::graph::exec_destroy(exec);
        let _ = result::graph::destroy(graph);
    }
}

impl Drop for Cuda {
    fn drop(&mut self) {
        if self.here().is_err() {
            return;
        }
        let staging = self
            .staging
            .get_mut()
            .unwrap_or_else(PoisonError::into_inner);
        let memory = self
            .memory
            .get_mut()
            .unwrap_or_else(PoisonError::into_inner);
        let graphs = self
            .graphs
            .get_mut()
            .unwrap_or_else(PoisonError::into_inner);
        graphs.drain(..).flatten().for_each(release);
        // SAFETY: nobody else has the driver any more; everything was made in `open` or `alloc` and is freed once. What a
        // device that is lost says to this is of no use to anybody.
        unsafe {
            let _ = stream::synchronize(self.compute);
            let _ = stream::synchronize(self.beside);
            let _ = stream::synchronize(staging.stream);
            for at in memory.drain() {
                let _ = result::free_sync(at);
            }
            for (buffer, event) in staging.buffers {
                let _ = event::destroy(event);
                let _ = result::free_host(buffer.cast());
            }
            for mark in self.marks {
                let _ = event::destroy(mark);
            }
            let _ = stream::destroy(self.compute);
            let _ = stream::destroy(self.beside);
            let _ = stream::destroy(staging.stream);
            let _ = module::unload(self.module);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Where there is no GPU this says why; where there is one it opens.
    #[test]
    fn a_machine_without_a_gpu_gets_a_word() {
        match open(0, None) {
            Ok(device) => assert!(!device.name().is_empty()),
            Err(why) => assert!(why.len() > 10 && !why.contains('\n'), "{why}"),
        }
        assert!(open(4096, None).is_err());
    }

    /// Without a compiler, which nothing here needs.
    #[test]
    fn kept_kernels_are_those_of_their_compiler_device_and_source() {
        let above = tempfile::tempdir().unwrap();
        let folder = above.path().join("cache");
        let file = |arch, version: &str| folder.join(format!("{}{version}.ptx", kept_as(arch)));
        for (arch, version, body) in [
            (80, "12.4", "older"),
            (80, "12.9", "newer"),
            (90, "12.9", "other"),
        ] {
            keep(&file(arch, version), body).unwrap();
        }
        let ptx = |arch, version| ptx(arch, Some(&folder), version).unwrap();
        assert_eq!(ptx(80, Some((12, 4))), "older");
        assert_eq!(ptx(80, Some((12, 9))), "newer");
        assert_eq!(ptx(90, Some((12, 9))), "other");
        assert_eq!(ptx(80, None), "newer");
        // Damaged in every way: as if it were not there.
        for damaged in ["", "// ", "//", "newer", "// 00\nnewer"] {
            std::fs::write(file(80, "12.9"), damaged).unwrap();
            assert_eq!(kept(&file(80, "12.9")), None, "{damaged:?}");
            assert_eq!(ptx(80, None), "older");
        }
        std::fs::write(file(80, "12.9"), [0xff; 100]).unwrap();
        assert_eq!(ptx(80, None), "older");
        // Written for the owner alone.
        #[cfg(unix)]
        for (path, mode) in [(&folder, 0o700), (&file(80, "12.4"), 0o600)] {
            use std::os::unix::fs::PermissionsExt;
            let found = std::fs::metadata(path).unwrap().permissions().mode();
            assert_eq!(found & 0o777, mode, "{}", path.display());
        }
        // Whole, or not there.
        assert!(!disk::part(&file(80, "12.4")).exists());
    }

    /// NVRTC through cudarc, where it is to be had.
    #[test]
    fn compiled_kernels_are_kept() {
        // A library that is loaded is found by its name alone, and the test of all architectures loads it, wherever it lies, at
        // some time: it is loaded here first, so that what is found does not depend on when.
        #[cfg(unix)]
        crate::moe::offload::nvrtc::library();
        let Some(version) = compiler() else {
            let word = "SKIPPED: compiling the kernels through cudarc: it finds no NVRTC (LD_LIBRARY_PATH)\n";
            std::io::stderr().write_all(word.as_bytes()).unwrap();
            assert!(compile(80).unwrap_err().contains("libnvrtc"));
            return;
        };
        let above = tempfile::tempdir().unwrap();
        let folder = above.path().join("cache");
        let ptx = |arch, version| ptx(arch, Some(&folder), version).unwrap();
        let first = ptx(80, Some(version));
        let entry = std::fs::read_dir(&folder).unwrap().next().unwrap().unwrap();
        // What is in the file is used, unless it is damaged.
        let mark = |body: &str| format!("// {}\n{body}", hex(&Sha256::digest(body)));
        std::fs::write(entry.path(), mark("kept")).unwrap();
        assert_eq!(ptx(80, Some(version)), "kept");
        std::fs::write(entry.path(), mark("kept").replace("kept", "cut")).unwrap();
        assert_eq!(ptx(80, Some(version)), first);
        assert_ne!(ptx(90, Some(version)), first);
        // A device of the future gets what the compiler knows.
        assert!(compile(999).is_ok());
    }
}
