//! `octet imatrix` against the reference's numbers, and what may go wrong on the way to a file.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use octet::gguf::Imatrix;
use serde_json::Value;

use crate::data;
use crate::program::{Home, signal, wait};

/// The start of a text that has more than four chunks of 64 tokens.
fn text(home: &Home) -> String {
    let text = fs::read_to_string(data("valid.txt")).unwrap();
    let start: String = text.chars().take(1200).collect();
    home.write("text.txt", start)
}

fn demo() -> String {
    data("demo-BF16.gguf").to_str().unwrap().to_string()
}

/// Makes `output` of four chunks of the text with the BF16 model, as the reference's numbers were made.
fn make(home: &Home, output: &str, more: &[&str]) -> Imatrix {
    make_with(&demo(), home, output, more)
}

fn make_with(model: &str, home: &Home, output: &str, more: &[&str]) -> Imatrix {
    let (text, path) = (text(home), home.path(output));
    let four = [
        "imatrix", "-m", model, "-f", &text, "-c", "64", "--kv", "f32",
    ];
    let rest = ["--chunks", "4", "-o", path.to_str().unwrap()];
    home.octet(&[&four[..], &rest, more].concat()).text();
    Imatrix::read(&path).unwrap()
}

#[test]
fn sums_are_the_references() {
    let home = Home::new();
    let made = make(&home, "made.gguf", &["--process-output"]);
    let reference = fs::read(data("imatrix-reference.json")).unwrap();
    let reference: serde_json::Map<String, Value> = serde_json::from_slice(&reference).unwrap();
    assert!(made.entries.keys().eq(reference.keys()));
    for (name, expected) in &reference {
        let found = &made.entries[name];
        let numbers = |key: &str| -> Vec<f64> {
            let list = expected[key].as_array().unwrap().iter();
            list.map(|x| x.as_f64().unwrap()).collect()
        };
        let counts: Vec<f64> = found.counts.iter().map(|n| *n as f64).collect();
        assert_eq!(counts, numbers("counts"), "{name}");
        let width = found.sums.len() / counts.len();
        for (e, columns) in found.sums.chunks_exact(width).enumerate() {
            let close = |x: f64, y: f64| (x - y).abs() <= 1e-4 * y;
            let sum: f64 = columns.iter().map(|x| f64::from(*x)).sum();
            assert!(close(sum, numbers("sums")[e]), "{name} expert {e}: {sum}");
            let last = f64::from(columns[width - 1]);
            assert!(close(last, numbers("last")[e]), "{name} expert {e}: {last}");
        }
    }
    assert_eq!((made.chunks, made.chunk_size), (4, 64));
    assert!(made.datasets[0].ends_with("text.txt"));
}

#[test]
fn one_file_for_every_machine_and_layout() {
    let home = Home::new();
    make(&home, "made.gguf", &["--threads", "1"]);
    let made = fs::read(home.path("made.gguf")).unwrap();
    let file = |name: &str| fs::read(home.path(name)).unwrap();
    make(&home, "other.gguf", &["--threads", "3", "--ubatch", "7"]);
    assert!(file("other.gguf") == made, "batches");
    make(&home, "other.gguf", &["--isa", "scalar"]);
    assert!(file("other.gguf") == made, "tiers");

    // One tensor an expert, as files of December 2023 have it.
    let old = home.path("old.gguf");
    let out = Command::new(env!("CARGO_BIN_EXE_quantize"))
        .args([demo().as_ref(), old.as_os_str()])
        .args(["COPY", "--split-experts"])
        .output();
    assert!(out.unwrap().status.success());
    make_with(old.to_str().unwrap(), &home, "other.gguf", &[]);
    assert!(file("other.gguf") == made, "layouts");
}

#[test]
fn the_older_form_says_the_same() {
    let home = Home::new();
    let new = make(&home, "made.gguf", &[]);
    let old = make(&home, "made.dat", &[]);
    assert!(
        !fs::read(home.path("made.dat"))
            .unwrap()
            .starts_with(b"GGUF")
    );
    assert_eq!((old.chunks, &old.datasets), (new.chunks, &new.datasets));
    assert!(old.entries.keys().eq(new.entries.keys()));
    assert!(!old.entries.contains_key("output.weight"), "not asked for");
    for (name, entry) in &new.entries {
        let pairs = entry.columns().into_iter().zip(old.entries[name].columns());
        let mut pairs = pairs.enumerate();
        let far = pairs.find(|(_, (new, old))| (new - old).abs() > 1e-6 * new);
        assert_eq!(far, None, "{name}");
    }
    make(&home, "named.dat", &["--output-format", "gguf"]);
    make(&home, "named.gguf", &["--output-format", "dat"]);
    let same = |a, b| fs::read(home.path(a)).unwrap() == fs::read(home.path(b)).unwrap();
    assert!(same("named.dat", "made.gguf") && same("named.gguf", "made.dat"));
}

/// The demo model's last layers hardly use some experts.
#[test]
fn experts_that_were_hardly_seen_are_named() {
    let home = Home::new();
    let (text, path) = (text(&home), home.path("made.gguf"));
    let path = path.to_str().unwrap();
    let args = [
        "imatrix", "-f", &text, "-c", "64", "--chunks", "1", "-o", path,
    ];
    let out = home.octet(&args);
    let (table, made) = (out.text(), Imatrix::read(path.as_ref()).unwrap());
    let mut unseen = 0;
    for layer in 0..4 {
        let counts = &made.entries[&format!("blk.{layer}.ffn_down_exps.weight")].counts;
        assert_eq!(counts.iter().sum::<u64>(), 128, "two experts a token");
        let cells: String = counts.iter().map(|n| format!(" {n:>6}")).collect();
        assert!(table.contains(&format!("\n{layer:>5}{cells}\n")), "{table}");
        for e in (0..8).filter(|e| counts[*e] == 0) {
            unseen += 1;
            let name = format!("layer {layer} expert {e} (0)");
            assert!(unseen > 8 || out.stderr.contains(&name), "{}", out.stderr);
        }
    }
    assert!(unseen > 0 && made.unseen().count() == 3 * unseen);
    // They count as equally important: no number is 0, nor without meaning.
    for entry in made.entries.values() {
        assert!(entry.columns().iter().all(|x| x.is_finite() && *x > 0.0));
    }
}

fn nothing_unfinished(home: &Home) {
    let names = fs::read_dir(home.path("")).unwrap();
    let mut names = names.map(|f| f.unwrap().file_name().into_string().unwrap());
    assert_eq!(names.find(|n| n.contains(".part")), None);
}

#[test]
fn a_text_or_a_place_that_will_not_do() {
    let home = Home::new();
    let text = text(&home);
    let old = home.write("old.gguf", "what was there");
    let run = |args: &[&str]| home.octet(&[&["imatrix", "-f", &text, "-o", &old], args].concat());
    let short = run(&[]);
    assert!(short.error(1).contains("at least 512 tokens"));
    assert!(run(&["-c", "2"]).error(2).contains("--ctx 2"));
    let nowhere = home.path("no/such/folder.gguf");
    let place = ["imatrix", "-f", &text, "-o", nowhere.to_str().unwrap()];
    let place = home.octet(&[&place[..], &["-c", "64"]].concat());
    assert!(place.error(1).contains("cannot create"));
    let home_path = home.path("");
    let folder = ["imatrix", "-f", &text, "-o", home_path.to_str().unwrap()];
    let folder = home.octet(&[&folder[..], &["-c", "64"]].concat());
    assert!(folder.error(1).contains("found a folder"));
    assert_eq!(fs::read_to_string(&old).unwrap(), "what was there");
    nothing_unfinished(&home);
}

#[cfg(unix)]
#[test]
fn interrupted_it_leaves_what_was_there() {
    let home = Home::new();
    let valid = data("valid.txt").to_str().unwrap().to_string();
    // Too long to be read to its end while this test waits for something else.
    let long = fs::read_to_string(&valid).unwrap().repeat(4);
    let long = home.write("long.txt", long);
    let start = |output: &str, more: &[&str]| {
        let args = ["imatrix", "-f", &long, "-c", "128", "-o", output];
        let mut command = home.command(&[&args[..], more].concat());
        command.stdout(Stdio::null()).stderr(Stdio::null());
        command.spawn().unwrap()
    };
    // A file every chunk: when there is one, it is reading.
    let made = home.path("made.gguf");
    let mut child = start(made.to_str().unwrap(), &["--output-frequency", "1"]);
    while !made.exists() && child.try_wait().unwrap().is_none() {
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    let old = home.write("old.gguf", "what was there");
    let mut other = start(&old, &[]);
    signal(&child, "INT");
    assert_eq!(wait(&mut child).code(), Some(130));
    let chunks = Imatrix::read(Path::new(&made)).unwrap().chunks;
    assert!((1..400).contains(&chunks), "{chunks}");
    // Whether it reads already or not. Before it listens, a signal is lost where a shell's background job ignores it.
    let ended = (0..1000).find_map(|_| {
        signal(&other, "INT");
        std::thread::sleep(std::time::Duration::from_millis(20));
        other.try_wait().unwrap()
    });
    assert!(!ended.unwrap().success());
    assert_eq!(fs::read_to_string(&old).unwrap(), "what was there");
    nothing_unfinished(&home);
}
