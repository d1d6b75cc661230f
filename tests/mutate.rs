//! A short run of mutated inputs through every place where bytes from outside come in: the same inputs every time. `fuzz/`
//! looks further, for hours.

use std::time::{Duration, Instant};

use crate::alloc::peak;
use crate::entries::{ENTRIES, named};

/// What a try may allocate, beside four times its input.
const MEMORY: usize = 64 << 20;
/// No try takes so long, even on a machine that has other work: fuzzing allows a second.
const TIME: Duration = Duration::from_secs(20);

/// Numbers without a pattern, the same in every run.
struct Dice(u64);

impl Dice {
    /// A number below `n`.
    fn roll(&mut self, n: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 16) as usize % n.max(1)
    }
}

/// Numbers at the edges of what programs expect.
const EDGES: [u64; 14] = [
    0,
    1,
    2,
    7,
    0x7f,
    0x80,
    0xff,
    0x7fff,
    0xffff,
    0x7fff_ffff,
    0x8000_0000,
    0xffff_ffff,
    0x7fff_ffff_ffff_ffff,
    u64::MAX,
];

/// What is put into texts.
const WORDS: [&str; 22] = [
    "null",
    "true",
    "-1",
    "0",
    "1e999",
    "18446744073709551616",
    "0.5",
    "\"\"",
    "[",
    "{",
    "]",
    "}",
    "\\",
    "\"",
    "\\ud800",
    "\u{0}",
    "\u{10FFFF}",
    "%",
    "{%",
    "{{",
    "*",
    "\n",
];

fn mutate(dice: &mut Dice, bytes: &mut Vec<u8>, other: &[u8]) {
    let at = dice.roll(bytes.len() + 1);
    let len = match dice.roll(3) {
        0 => 1,
        1 => dice.roll(9),
        _ => dice.roll(bytes.len() + 1),
    };
    let end = (at + len).min(bytes.len());
    match dice.roll(9) {
        0 if at < bytes.len() => bytes[at] ^= 1 << dice.roll(8),
        1 if at < bytes.len() => bytes[at] = dice.roll(256) as u8,
        2 => {
            let (edge, width) = (EDGES[dice.roll(EDGES.len())], 1 << dice.roll(4));
            let end = (at + width).min(bytes.len());
            bytes[at..end].copy_from_slice(&edge.to_le_bytes()[..end - at]);
        }
        3 => {
            bytes.drain(at..end);
        }
        4 => {
            let part = bytes[at..end].to_vec();
            let to = dice.roll(bytes.len() + 1);
            bytes.splice(to..to, part);
        }
        5 => bytes.truncate(at),
        6 => {
            let word = WORDS[dice.roll(WORDS.len())].bytes();
            bytes.splice(at..end.min(at + dice.roll(4)).max(at), word);
        }
        7 => {
            let from = dice.roll(other.len() + 1);
            let to = (from + len).min(other.len());
            bytes.splice(at..end, other[from..to].iter().copied());
        }
        _ => {
            // One thing many times over: depth, and long lists.
            let times = 1 << dice.roll(9);
            let part = bytes[at..end.min(at + 16)].repeat(times);
            bytes.splice(at..at, part);
        }
    }
    bytes.truncate(1 << 16);
}

fn survives(name: &str) {
    let entry = named(name);
    let seeds = (entry.seeds)();
    let mut dice = Dice(0x9e37_79b9_7f4a_7c15);
    let run = |bytes: &[u8], what: &dyn Fn() -> String| {
        let started = Instant::now();
        let (_, most) = peak(|| (entry.run)(bytes));
        let took = started.elapsed();
        assert!(most <= MEMORY + 4 * bytes.len(), "{}: {most} bytes", what());
        assert!(took < TIME, "{}: {took:?}", what());
    };
    // What is made once and kept is not counted.
    seeds.iter().for_each(|seed| (entry.run)(seed));
    for (i, seed) in seeds.iter().enumerate() {
        run(seed, &|| format!("seed {i}"));
    }
    for i in 0..entry.tries {
        let mut bytes = seeds[dice.roll(seeds.len())].clone();
        let other = &seeds[dice.roll(seeds.len())];
        for _ in 0..=dice.roll(6) {
            mutate(&mut dice, &mut bytes, other);
        }
        run(&bytes, &|| format!("mutation {i}"));
    }
}

/// A test for each entry, so that a failure names it and all cores work.
macro_rules! entries {
    ($($name:ident)*) => {
        $(#[test]
        fn $name() {
            survives(stringify!($name));
        })*

        #[test]
        fn every_entry_is_tried() {
            let names: Vec<_> = ENTRIES.iter().map(|entry| entry.name).collect();
            assert_eq!(names, [$(stringify!($name)),*]);
        }
    };
}

entries!(
    gguf safetensors safetensors_index tokenizer_model tokenizer_json chat_template batch_line batch_results tools
    session kv_cache imatrix profile json_schema grammar regex
);
