//! The kernels through NVRTC, without a GPU: they compile for every instruction set that octet supports, and, where ptxas is to be
//! had, find room in a GPU's registers.

use super::kernels::{OPTIONS, SOURCE, kernels};
use std::ffi::{CStr, CString, OsStr, c_char, c_int, c_void};
use std::io::Write;
use std::process::Command;

/// Where NVRTC is looked for: what `OCTET_NVRTC` names, then as any library.
pub(super) fn library() -> Option<*mut c_void> {
    let named = std::env::var("OCTET_NVRTC").ok();
    let usual = ["libnvrtc.so", "libnvrtc.so.13", "libnvrtc.so.12"];
    let names = named.into_iter().chain(usual.map(String::from));
    let toolkit = "/usr/local/cuda/lib64/libnvrtc.so".to_string();
    names.chain([toolkit]).find_map(|name| {
        let name = CString::new(name).ok()?;
        // SAFETY: NVRTC may be loaded at any time, and stays.
        let handle = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW) };
        (!handle.is_null()).then_some(handle)
    })
}

/// A function of the library.
///
/// # Safety
/// `F` is its type.
unsafe fn function<F: Copy>(library: *mut c_void, name: &CStr) -> F {
    // SAFETY: the library is loaded; the caller vouches for the type.
    unsafe {
        let at = libc::dlsym(library, name.as_ptr());
        assert!(!at.is_null(), "{name:?}");
        std::mem::transmute_copy(&at)
    }
}

type Program = *mut c_void;
type Create = unsafe extern "C" fn(
    *mut Program,
    *const c_char,
    *const c_char,
    c_int,
    *const *const c_char,
    *const *const c_char,
) -> c_int;
type Compile = unsafe extern "C" fn(Program, c_int, *const *const c_char) -> c_int;
type Size = unsafe extern "C" fn(Program, *mut usize) -> c_int;
type Text = unsafe extern "C" fn(Program, *mut c_char) -> c_int;
type Version = unsafe extern "C" fn(*mut c_int, *mut c_int) -> c_int;
type Destroy = unsafe extern "C" fn(*mut Program) -> c_int;

/// The PTX of the kernels.
fn compiled(library: *mut c_void, arch: &str) -> String {
    let source = CString::new(SOURCE).unwrap();
    let arch = format!("--gpu-architecture=compute_{arch}");
    let options = [&OPTIONS[..], &[&arch]].concat();
    let options: Vec<_> = options.iter().map(|o| CString::new(*o).unwrap()).collect();
    let pointers: Vec<_> = options.iter().map(|o| o.as_ptr()).collect();
    // SAFETY: types and use are those of nvrtc.h; all strings outlive the calls, and texts have the size that was told.
    unsafe {
        let f = |name: &CStr| function::<Text>(library, name);
        let text = |size: &CStr, text: &CStr, program| {
            let mut n = 0;
            assert_eq!(function::<Size>(library, size)(program, &mut n), 0);
            let mut out = vec![0u8; n];
            assert_eq!(f(text)(program, out.as_mut_ptr().cast()), 0);
            String::from_utf8_lossy(&out)
                .trim_end_matches('\0')
                .to_string()
        };
        let mut program = std::ptr::null_mut();
        let (none, name) = (std::ptr::null(), c"offload.cu".as_ptr());
        let create = function::<Create>(library, c"nvrtcCreateProgram");
        assert_eq!(
            create(&mut program, source.as_ptr(), name, 0, none, none),
            0
        );
        let compile = function::<Compile>(library, c"nvrtcCompileProgram");
        let done = compile(program, pointers.len() as c_int, pointers.as_ptr());
        let log = text(c"nvrtcGetProgramLogSize", c"nvrtcGetProgramLog", program);
        assert_eq!(done, 0, "{arch}: {log}");
        let ptx = text(c"nvrtcGetPTXSize", c"nvrtcGetPTX", program);
        assert_eq!(
            function::<Destroy>(library, c"nvrtcDestroyProgram")(&mut program),
            0
        );
        ptx
    }
}

#[test]
fn every_kernel_compiles_for_every_architecture() {
    let Some(library) = library() else {
        // Said past the test harness, which hides what a test prints.
        let word = "SKIPPED: offload.cu was not compiled to PTX: no NVRTC (OCTET_NVRTC names libnvrtc.so; the Python package \
                    nvidia-cuda-nvrtc-cu12 has one)\n";
        return std::io::stderr().write_all(word.as_bytes()).unwrap();
    };
    let (mut major, mut minor) = (0, 0);
    // SAFETY: the type is that of nvrtc.h.
    let version = unsafe { function::<Version>(library, c"nvrtcVersion")(&mut major, &mut minor) };
    assert_eq!(version, 0);
    for arch in ["70", "80", "90"] {
        // Volta was dropped in CUDA 13.
        if arch == "70" && major > 12 {
            let word = format!("SKIPPED: PTX for sm_70: NVRTC {major}.{minor} has dropped it\n");
            std::io::stderr().write_all(word.as_bytes()).unwrap();
            continue;
        }
        let ptx = compiled(library, arch);
        assert!(ptx.contains(&format!(".target sm_{arch}")));
        for kernel in kernels() {
            assert!(
                ptx.contains(&format!(".entry {kernel}(")),
                "{kernel} for {arch}"
            );
        }
        assert_eq!(ptx.matches(".entry").count(), kernels().len());
        // What the results depend on: tensor cores where they have int8, IEEE division, no flushing to zero, and no fused
        // operation but those that say so (`fmaf`; addresses and integers have their own, `mad`).
        assert_eq!(ptx.contains("mma.sync"), arch != "70");
        assert!(ptx.contains("div.rn.f32") && !ptx.contains(".ftz") && !ptx.contains("approx"));
        let silu = ptx.split(".entry silu_mul_all(").nth(1).unwrap();
        let silu = silu.split(".entry").next().unwrap();
        assert!(
            silu.contains("mul.rn.f32") && !silu.contains("fma.rn"),
            "fused in {arch}"
        );
        // Arrays in registers, not in memory.
        assert!(!ptx.contains(".local"), "{arch}");
        match std::env::var_os("OCTET_PTXAS") {
            Some(ptxas) => takes_what_there_is(&ptxas, arch, &ptx),
            None => {
                let word = "SKIPPED: registers and shared memory of the kernels: OCTET_PTXAS names no ptxas\n";
                std::io::stderr().write_all(word.as_bytes()).unwrap();
            }
        }
    }
}

/// Has ptxas assemble the kernels: none has to put registers into memory, or needs more shared memory than there is without asking
/// for it. Says what each takes.
fn takes_what_there_is(ptxas: &OsStr, arch: &str, ptx: &str) {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("offload.ptx");
    std::fs::write(&file, ptx).unwrap();
    let target = format!("-arch=sm_{arch}");
    let command = Command::new(ptxas)
        .args(["-v", &target, "-o"])
        .arg(folder.path().join("offload.cubin"))
        .arg(&file)
        .output();
    let done = command.expect("OCTET_PTXAS names a program");
    let said = String::from_utf8_lossy(&done.stderr);
    assert!(done.status.success(), "{said}");
    let mut seen = 0;
    for part in said.split("Compiling entry function '").skip(1) {
        let kernel = part.split('\'').next().unwrap();
        // The number in front of a word.
        let count = |word: &str| {
            let before = part.split(word).next().unwrap().trim_end();
            let number = before.rsplit(|c: char| !c.is_ascii_digit()).next().unwrap();
            part.contains(word)
                .then(|| number.parse::<usize>().unwrap())
        };
        let registers = count("registers").unwrap();
        let [stack, stores, loads] = ["bytes stack", "bytes spill stores", "bytes spill loads"]
            .map(|word| count(word).unwrap());
        let shared = count("bytes smem").unwrap_or(0);
        println!("sm_{arch} {kernel:16} {registers:3} registers, {shared:5} bytes shared");
        assert_eq!((stack, stores, loads), (0, 0, 0), "{kernel} for {arch}");
        assert!(shared <= 48 << 10, "{kernel} for {arch}");
        seen += 1;
    }
    assert_eq!(seen, kernels().len());
}
