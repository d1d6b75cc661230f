//! Models larger than memory: the real program with budgets too small for all experts.

use crate::program::{DEMO, Home, Output};
use crate::small_model::{Layout, Small};
use octet::gguf::{Gguf, Writer};
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::process::Stdio;

const ASK: [&str; 10] = [
    "run",
    "--raw",
    "-p",
    "Once upon a time there was a little girl who",
    "-n",
    "24",
    "--temp",
    "0",
    "--json",
    "--ram",
];

fn ask(home: &Home, model: &str, ram: &str, more: &[&str]) -> Output {
    home.octet(&[&ASK[..], &[ram, "-m", model], more].concat())
}

/// The least budget that the program says it needs, in bytes.
#[track_caller]
fn least(home: &Home, model: &str) -> u64 {
    let out = ask(home, model, "1M", &[]);
    let line = out.error(2);
    let gb = line.split("expected at least ").nth(1).expect(line);
    let gb: f64 = gb.split(' ').next().unwrap().parse().unwrap();
    (gb * 1e9) as u64
}

/// The demo model with its experts in tensors of their own, in three files; returns the first.
fn old_and_split(home: &Home) -> String {
    let demo = Gguf::open(DEMO.as_ref()).unwrap();
    let mut tensors = Vec::new();
    for t in demo.tensors() {
        let bytes = demo.bytes(t);
        match t.name.split_once("_exps") {
            None => tensors.push((t.name.clone(), t.type_id, t.shape.clone(), bytes)),
            Some((begin, end)) => {
                let n = t.shape[2] as usize;
                let size = bytes.len() / n;
                for e in 0..n {
                    let name = format!("{begin}.{e}{end}");
                    let bytes = bytes.slice(e * size..(e + 1) * size);
                    tensors.push((name, t.type_id, t.shape[..2].to_vec(), bytes));
                }
            }
        }
    }
    let name = |i: usize| home.path(&format!("old-{:05}-of-00003.gguf", i + 1));
    for (i, part) in tensors.chunks(tensors.len().div_ceil(3)).enumerate() {
        let mut writer = Writer::new();
        if i == 0 {
            writer.put_all(&demo);
        }
        writer.put("split.no", i as u16);
        writer.put("split.count", 3u16);
        writer.put("split.tensors.count", tensors.len() as i32);
        for (name, type_id, shape, _) in part {
            writer.tensor(name, *type_id, shape);
        }
        let file = fs::File::create(name(i)).unwrap();
        let mut out = writer.start(name(i), file).unwrap();
        for (name, _, _, bytes) in part {
            out.write_tensor(name, bytes).unwrap();
        }
        out.finish().unwrap();
    }
    name(0).to_str().unwrap().to_string()
}

#[test]
fn the_same_bits_in_any_memory() {
    let home = Home::new();
    let split = old_and_split(&home);
    let mapped = ask(&home, DEMO, "all", &[]).json();
    let least = least(&home, DEMO);
    for model in [DEMO, &split] {
        for (room, threads) in [(0, "1"), (4 << 20, "3"), (1 << 30, "2")] {
            // What the process takes beside the model differs by a few megabytes from run to run.
            let ram = (least + (12 << 20) + room).to_string();
            let paged = ask(&home, model, &ram, &["-t", threads, "--draft", "off"]);
            let line = paged.stderr.lines().last().unwrap();
            assert!(line.contains("% of experts in memory"), "{line}");
            let paged = paged.json();
            for key in ["tokens", "text", "logits_hash"] {
                assert_eq!(paged[key], mapped[key], "{ram} {threads}");
            }
        }
    }
}

/// The demo model's experts are so small that all of them fit into what a process takes more or less from run to run.
/// Those of this one do not: slots change hands in every pass.
#[test]
fn the_same_bits_where_experts_make_room() {
    let home = Home::new();
    for layout in [Layout::Fused, Layout::Single] {
        let shape = Small {
            n_layer: 3,
            n_expert: 8,
            d_ff: 4096,
            layout,
            ..Small::default()
        };
        let model = home.write("large.gguf", shape.file().part(0, 1));
        let more = ["--ignore-eos", "--draft", "off"];
        let mapped = ask(&home, &model, "all", &more).json();
        let least = least(&home, &model);
        for (room, threads) in [(10 << 20, "1"), (28 << 20, "3")] {
            let ram = (least + room).to_string();
            let out = ask(&home, &model, &ram, &[&more[..], &["-t", threads]].concat());
            assert!(out.stderr.contains(" of 24 experts stay"), "{}", out.stderr);
            let paged = out.json();
            for key in ["tokens", "logits_hash"] {
                assert_eq!(paged[key], mapped[key], "{ram} {threads}");
            }
        }
    }
}

#[test]
fn a_budget_that_is_too_small_says_what_would_do() {
    let home = Home::new();
    let out = ask(&home, DEMO, "1M", &[]);
    assert!(out.error(2).contains("expected at least"), "{}", out.stderr);
    for (bad, why) in [("little", "500M"), ("0", "500M"), ("1.2.3G", "500M")] {
        let out = ask(&home, DEMO, bad, &[]);
        assert_eq!(out.code, Some(2));
        assert!(out.stderr.contains(why), "{}", out.stderr);
    }
}

/// No budget, and one in which the demo model's experts are read into slots.
fn mapped_and_paged() -> [String; 2] {
    let paged = least(&Home::new(), DEMO) + (16 << 20);
    ["all".to_string(), paged.to_string()]
}

/// Starts a long answer, waits for its beginning, does something to the file and returns what the program says.
fn while_it_runs(ram: &str, tokens: &str, then: impl FnOnce(&std::path::Path)) -> Output {
    let home = Home::new();
    let model = home.write("model.gguf", fs::read(DEMO).unwrap());
    let args = [
        "run",
        "--raw",
        "-p",
        "Once",
        "-n",
        tokens,
        "--ignore-eos",
        "--ram",
        ram,
        "-m",
        &model,
        "-c",
        "2048",
        "--isa",
        "scalar",
        "--draft",
        "off",
    ];
    let mut command = home.command(&args);
    command.stdin(Stdio::null()).stdout(Stdio::piped());
    let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
    let mut out = BufReader::new(child.stdout.take().unwrap());
    let mut begun = [0; 8];
    out.read_exact(&mut begun).unwrap();
    then(model.as_ref());
    std::io::copy(&mut out, &mut std::io::sink()).unwrap();
    let mut stderr = String::new();
    let mut said = BufReader::new(child.stderr.take().unwrap());
    while said.read_line(&mut stderr).unwrap() > 0 {}
    Output {
        code: child.wait().unwrap().code(),
        stdout: Vec::new(),
        stderr,
    }
}

#[test]
fn a_file_that_is_cut_short_is_an_error() {
    for ram in mapped_and_paged() {
        let out = while_it_runs(&ram, "2000", |model| {
            let file = fs::OpenOptions::new().write(true).open(model).unwrap();
            file.set_len(100_000).unwrap();
        });
        assert_eq!(out.code, Some(1), "{}", out.stderr);
        let line = out.stderr.lines().last().unwrap();
        assert!(line.contains("cut short"), "{}", out.stderr);
    }
}

#[test]
fn a_file_that_is_written_to_is_an_error() {
    let out = while_it_runs("all", "2000", |model| {
        let mut file = fs::OpenOptions::new().append(true).open(model).unwrap();
        file.write_all(b"more").unwrap();
    });
    assert_eq!(out.code, Some(1), "{}", out.stderr);
    assert!(out.stderr.contains("wrote to it"), "{}", out.stderr);
}

#[test]
fn a_file_that_is_replaced_or_deleted_is_still_there() {
    for ram in mapped_and_paged() {
        let out = while_it_runs(&ram, "60", |model| {
            let other = model.with_extension("other");
            fs::write(&other, "not a model").unwrap();
            fs::rename(&other, model).unwrap();
        });
        assert_eq!(out.code, Some(0), "{}", out.stderr);
        let out = while_it_runs(&ram, "60", |model| fs::remove_file(model).unwrap());
        assert_eq!(out.code, Some(0), "{}", out.stderr);
    }
}
