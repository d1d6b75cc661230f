//! Bounds for what strangers hand in: programs, which may run for ever or ask for all memory, and JSON, a small text of
//! which can be a large tree.
//!
//! A program runs on a thread of its own, with a deadline, a budget of memory and a deep stack ([`run`]). A thread cannot be ended
//! from outside. One that exceeds its budget is stopped inside the allocator and stays there; one that exceeds its time runs on.
//! Whoever waited for it is told either way, and too many of them are not begun. The budget of memory holds in programs
//! whose allocator is [`Allocator`], as it is in `octet`; elsewhere there is only the deadline.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

/// No budget.
const ANY: usize = usize::MAX;

thread_local! {
    // Constant and without destructors, so that the allocator may use them at any time.
    /// Bytes that this thread may still allocate.
    static LEFT: Cell<usize> = const { Cell::new(ANY) };
    /// Where it says that it wanted more.
    static OVER: Cell<Option<&'static AtomicBool>> = const { Cell::new(None) };
}

/// The system's allocator, with a budget for the threads that [`run`] makes.
pub struct Allocator;

/// Takes bytes from the thread's budget. If there are too few, never returns.
fn take(bytes: usize) {
    let left = LEFT.get();
    if left == ANY {
        return;
    }
    match left.checked_sub(bytes) {
        Some(left) => LEFT.set(left),
        None => {
            // An allocator must neither unwind nor fail without ending the program, but it may take its time.
            if let Some(over) = OVER.get() {
                over.store(true, Ordering::Release);
            }
            loop {
                thread::sleep(Duration::from_secs(3600));
            }
        }
    }
}

fn give(bytes: usize) {
    let left = LEFT.get();
    if left != ANY {
        LEFT.set(left.saturating_add(bytes).min(ANY - 1));
    }
}

// SAFETY: every call goes on to the system's allocator with the caller's own arguments; what is done beside that neither
// allocates nor panics.
unsafe impl GlobalAlloc for Allocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        take(layout.size());
        // SAFETY: the caller's promise, handed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        take(layout.size());
        // SAFETY: the caller's promise, handed on.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        give(layout.size());
        // SAFETY: the caller's promise, handed on.
        unsafe { System.dealloc(ptr, layout) }
    }

    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // The system may have to hold both for a moment.
        take(size);
        give(layout.size());
        // SAFETY: the caller's promise, handed on.
        unsafe { System.realloc(ptr, layout, size) }
    }
}

/// What a piece of work may take.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// From its beginning to its end.
    pub time: Duration,
    /// Bytes that it holds at any time.
    pub memory: usize,
    /// Bytes of its stack, of which the system gives only what is used.
    pub stack: usize,
}

/// Why a piece of work has no result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exceeded {
    /// It took too long.
    Time,
    /// It wanted too much memory.
    Memory,
    /// It panicked.
    Panic,
    /// It was not begun: others have exceeded their limits before, or the system has no thread.
    Refused,
}

/// Most threads that stay behind because they exceeded a limit: each may hold its budget of memory, or a core.
const MOST_STUCK: usize = 8;

static STUCK: AtomicUsize = AtomicUsize::new(0);

/// Flags that no thread uses. They live for ever, so that a stopped thread can never point to nothing.
static FLAGS: Mutex<Vec<&'static AtomicBool>> = Mutex::new(Vec::new());

/// How often the flag of a running thread is looked at.
const LOOK: Duration = Duration::from_millis(5);

/// Runs `work` on a thread of its own, within limits.
///
/// # Errors
/// Which limit it exceeded.
pub fn run<T: Send + 'static>(
    limits: Limits,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Exceeded> {
    if STUCK.load(Ordering::Relaxed) >= MOST_STUCK {
        return Err(Exceeded::Refused);
    }
    let flags = || FLAGS.lock().unwrap_or_else(|e| e.into_inner());
    let flag = flags().pop();
    let over = flag.unwrap_or_else(|| Box::leak(Box::new(AtomicBool::new(false))));
    let (send, receive) = sync_channel(0);
    let begun = Instant::now();
    let thread = thread::Builder::new()
        .stack_size(limits.stack)
        .spawn(move || {
            OVER.set(Some(over));
            LEFT.set(limits.memory);
            let result = work();
            LEFT.set(ANY);
            // Without room in the channel, this fails if nobody waits any more.
            if send.send(result).is_err() {
                STUCK.fetch_sub(1, Ordering::Relaxed);
            }
        });
    let Ok(thread) = thread else {
        flags().push(over);
        return Err(Exceeded::Refused);
    };
    loop {
        let left = limits.time.saturating_sub(begun.elapsed());
        match receive.recv_timeout(left.min(LOOK)) {
            Ok(result) => {
                // So that its stack is gone, too.
                let _ = thread.join();
                flags().push(over);
                return Ok(result);
            }
            Err(RecvTimeoutError::Disconnected) => {
                flags().push(over);
                return Err(Exceeded::Panic);
            }
            Err(RecvTimeoutError::Timeout) if over.load(Ordering::Acquire) => {
                STUCK.fetch_add(1, Ordering::Relaxed);
                return Err(Exceeded::Memory);
            }
            Err(RecvTimeoutError::Timeout) if left.is_zero() => {
                STUCK.fetch_add(1, Ordering::Relaxed);
                return Err(Exceeded::Time);
            }
            Err(RecvTimeoutError::Timeout) => {}
        }
    }
}

/// A JSON tree may take this much memory, and three times the length of its text.
const TREE: usize = 64 << 20;
/// `serde_json`'s own bound.
const MOST_DEPTH: usize = 128;

/// Reads JSON from outside: `serde_json`, where the tree does not take much more memory than the text. A list of
/// zeros would take a hundred times as much.
///
/// # Errors
/// What is wrong with the text.
pub fn json(text: &[u8]) -> Result<Value, serde_json::Error> {
    if is_too_much(text) {
        return Err(serde::de::Error::custom(TOO_MUCH));
    }
    serde_json::from_slice(text)
}

/// Why JSON that is right is refused.
pub const TOO_MUCH: &str = "so many values in so short a text that they would take too much memory";

/// Whether a JSON text's values would take too much memory.
pub fn is_too_much(text: &[u8]) -> bool {
    // No byte of a text stands for more than that.
    text.len() > TREE / 512 && tree_bytes(text) > TREE + 3 * text.len()
}

/// About how many bytes the values of a JSON text take in memory, without the bytes of strings.
fn tree_bytes(text: &[u8]) -> usize {
    // An entry of an object has a key, a hash and a place in an index.
    const VALUE: usize = size_of::<Value>();
    const ENTRY: usize = VALUE + 24 + 8 + 24;
    // Lists grow by doubling, from four on.
    let list = |(entries, size): (usize, usize)| match entries {
        0 => 0,
        n => n.next_power_of_two().max(4) * size,
    };
    let word = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'+' | b'-' | b'.');
    let mut open: Vec<(usize, usize)> = Vec::new();
    let (mut total, mut largest, mut at) = (0, 0, 0);
    let mut close = |level: (usize, usize)| {
        total += list(level);
        largest = largest.max(list(level));
    };
    while let Some(&byte) = text.get(at) {
        at += 1;
        match byte {
            b'"' => {
                while let Some(&byte) = text.get(at) {
                    at += 1 + usize::from(byte == b'\\');
                    if byte == b'"' {
                        break;
                    }
                }
            }
            b'[' | b'{' if open.len() > MOST_DEPTH => break,
            b'[' => open.push((0, VALUE)),
            b'{' => open.push((0, ENTRY)),
            b']' | b'}' => {
                if let Some(level) = open.pop() {
                    close(level);
                }
                continue;
            }
            b',' | b' ' | b'\n' | b'\r' | b'\t' => continue,
            // What came before was a key, which is no value.
            b':' => {
                if let Some(level) = open.last_mut() {
                    level.0 = level.0.saturating_sub(1);
                }
                continue;
            }
            // The rest of a number or of a word.
            _ if word(byte) && at > 1 && word(text[at - 2]) => continue,
            _ => {}
        }
        // A value or a key began; an opening bracket is one of the level outside.
        let inside = usize::from(matches!(byte, b'[' | b'{'));
        let outside = open.len().checked_sub(1 + inside);
        if let Some(level) = outside.and_then(|level| open.get_mut(level)) {
            level.0 += 1;
        }
    }
    open.into_iter().for_each(&mut close);
    // While the largest list grows, its older half is there, too.
    total + largest / 2
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits {
        time: Duration::from_secs(20),
        memory: 1 << 20,
        stack: 256 << 10,
    };

    #[test]
    fn work_gives_its_result() {
        assert_eq!(run(LIMITS, || 6 * 7), Ok(42));
    }

    #[test]
    fn work_that_takes_too_long_is_left() {
        let limits = Limits {
            time: Duration::from_millis(30),
            ..LIMITS
        };
        let begun = Instant::now();
        let late = run(limits, || thread::sleep(Duration::from_millis(300)));
        assert_eq!(late, Err(Exceeded::Time));
        assert!(begun.elapsed() < Duration::from_millis(290));
    }

    #[test]
    fn trees_are_estimated() {
        let value = size_of::<Value>();
        assert_eq!(tree_bytes(b"[]"), 0);
        assert_eq!(
            tree_bytes(b"[1, 2.5e-3, \"a,[\\\"b\", null]"),
            4 * value + 2 * value
        );
        assert!(tree_bytes(b"[[],[],[],[],[") >= 8 * value);
        let zeros = format!("[{}0]", "0,".repeat(1 << 20));
        assert!(json(zeros.as_bytes()).is_err());
        assert!(json(&zeros.as_bytes()[..1 << 16]).is_err_and(|e| e.is_eof()));
        // As large as Mixtral's vocabulary.
        let pieces: Vec<String> = (0..32_768).map(|i| format!("\"piece{i}\":{i}")).collect();
        let merges = vec!["[\"a\",\"b\"]"; 61_000];
        let large = format!(
            "{{\"vocab\":{{{}}},\"merges\":[{}]}}",
            pieces.join(","),
            merges.join(",")
        );
        assert!(tree_bytes(large.as_bytes()) < TREE * 2 / 3);
        assert!(json(large.as_bytes()).is_ok());
        let plain = format!("{{\"a\": \"{}\"}}", "0,".repeat(1 << 20));
        assert!(json(plain.as_bytes()).is_ok());
    }
}
