//! What all targets do: they begin with the small valid inputs of the entry of their name, which takes the bytes, and may allocate
//! no more than 64 MiB and four times their length, and compute for no more than a second.

#[path = "../../tests/alloc.rs"]
mod alloc;
#[allow(dead_code, reason = "the mutation run uses more of it")]
#[path = "../../tests/entries.rs"]
pub(crate) mod entries;

use std::env;
use std::path::PathBuf;
use std::time::Duration;

/// A target: its name, what takes the bytes, and its small valid inputs. Only what these need is linked, because libFuzzer looks at
/// the counters of all code that is there after each execution.
macro_rules! target {
    ($name:literal, $run:ident, $seeds:ident) => {
        libfuzzer_sys::fuzz_target!(
            init: $crate::target::begin($name, $crate::target::entries::$run, $crate::target::entries::$seeds),
            |bytes: &[u8]| $crate::target::run($crate::target::entries::$run, bytes)
        );
    };
}
pub(crate) use target;

/// Before the corpus, the first folder on the command line, is read: writes the small valid inputs there.
pub(crate) fn begin(name: &str, run: fn(&[u8]), seeds: fn() -> Vec<Vec<u8>>) {
    let given = env::args().skip(1).find(|word| !word.starts_with('-'));
    // One file is a try to be done again.
    let given = given.map(PathBuf::from).filter(|path| !path.is_file());
    let folder = given.unwrap_or(PathBuf::from("corpus").join(name));
    std::fs::create_dir_all(&folder).unwrap();
    for (i, seed) in seeds().iter().enumerate() {
        std::fs::write(folder.join(format!("seed{i}")), seed).unwrap();
        // What is made once and kept is not counted later.
        run(seed);
    }
}

pub(crate) fn run(entry: fn(&[u8]), bytes: &[u8]) {
    let before = computed();
    let (_, most) = alloc::peak(|| entry(bytes));
    let took = computed() - before;
    assert!(most <= (64 << 20) + 4 * bytes.len(), "{most} bytes");
    assert!(took <= Duration::from_secs(1), "{took:?}");
}

/// How long this thread has computed: on a busy machine, and in a process that is stopped for a while, the clock on the wall says
/// nothing. (What waits for ever is found by libFuzzer's own clock; strangers' templates, on threads of their own, have a deadline.)
fn computed() -> Duration {
    let mut now = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the call fills in what it is given.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut now) };
    Duration::new(now.tv_sec as u64, now.tv_nsec as u32)
}
