//! Faults while the program runs, and machines that are not as usual: full disks, no home, odd names, Windows line ends,
//! narrow and dumb terminals, signals at any moment. (Model files that change are in `paging.rs`, killed conversations and
//! batches in `sessions.rs` and `batch.rs`.)
#![cfg(unix)]

use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::program::{DEMO, Home, Output, finish, signal, wait};

const CHAT: [&str; 5] = ["chat", "--temp", "0", "-n", "6"];

/// How often programs are killed: `OCTET_KILLS`, or a few times.
pub(crate) fn kills(few: usize) -> usize {
    std::env::var("OCTET_KILLS").map_or(few, |n| n.parse().unwrap())
}

/// Ends a program by SIGKILL or SIGTERM, in turns.
pub(crate) fn end(child: &mut std::process::Child, turn: usize) {
    if child.try_wait().unwrap().is_some() {
        return;
    }
    match turn % 2 {
        0 => child.kill().unwrap(),
        _ => signal(child, "TERM"),
    }
    wait(child);
}

/// The program under a shell that lets no file grow beyond `blocks` of 512 bytes: what a full disk looks like, without filling one.
fn on_a_full_disk(home: &Home, program: &str, args: &[&str], blocks: usize) -> Command {
    let usual = home.command(&[]);
    let mut command = Command::new("sh");
    command
        .arg("-c")
        .arg(format!(
            "trap '' XFSZ; ulimit -f {blocks}; exec \"$0\" \"$@\""
        ))
        .arg(program)
        .args(args)
        .current_dir(usual.get_current_dir().unwrap());
    for (name, value) in usual.get_envs() {
        match value {
            Some(value) => command.env(name, value),
            None => command.env_remove(name),
        };
    }
    command
}

const OCTET: &str = env!("CARGO_BIN_EXE_octet");

/// The text of a conversation is worth more than its cache.
#[test]
fn a_conversation_is_saved_without_its_cache_where_there_is_no_room() {
    let home = Home::new();
    let file = home.path("s").to_str().unwrap().to_string();
    let args = [&CHAT[..], &["--session", &file]].concat();
    let input: String = (0..6).map(|i| format!("Question {i}?\n")).collect();
    let want = home.octet_with(&CHAT, &input);
    let out = finish(on_a_full_disk(&home, OCTET, &args, 100), &input);
    assert_eq!(out.text(), want.text());
    assert_eq!(
        out.stderr.matches("without its KV cache").count(),
        1,
        "{}",
        out.stderr
    );
    assert!(!out.stderr.contains("is not saved"), "{}", out.stderr);
    assert_eq!(fs::metadata(home.path("s.kv")).unwrap().len(), 0);
    // All turns are there, and with room again the cache is, too.
    let out = home.octet_with(&args, "And?\n");
    assert!(out.stderr.contains("6 turns in"), "{}", out.stderr);
    assert_eq!(out.code, Some(0));
    assert!(fs::metadata(home.path("s.kv")).unwrap().len() > 51_200);
}

/// Where not even the text has room, the conversation goes on, and says so.
#[test]
fn a_conversation_that_cannot_be_saved_goes_on() {
    let home = Home::new();
    let file = home.path("s").to_str().unwrap().to_string();
    let args = [&CHAT[..], &["--session", &file]].concat();
    let out = finish(on_a_full_disk(&home, OCTET, &args, 0), "One?\nTwo?\n");
    assert_eq!(out.code, Some(1), "{}", out.stderr);
    let want = home.octet_with(&CHAT, "One?\nTwo?\n");
    assert_eq!(String::from_utf8_lossy(&out.stdout), want.text());
    let said = out.stderr.matches("the conversation is not saved").count();
    assert_eq!(said, 2, "{}", out.stderr);
    assert!(!home.path("s.part").exists());
}

#[test]
fn a_batch_whose_disk_is_full_goes_on_when_there_is_room() {
    let home = Home::new();
    let line =
        |i: usize| format!("{{\"prompt\":\"Tale {i}\",\"max_tokens\":8,\"temperature\":0}}\n");
    let input = home.write("in.jsonl", (0..24).map(line).collect::<String>());
    let path = |name: &str| home.path(name).to_str().unwrap().to_string();
    let (whole, out) = (path("whole.jsonl"), path("out.jsonl"));
    assert_eq!(home.octet(&["batch", &input, "-o", &whole]).code, Some(0));
    let whole = fs::read(whole).unwrap();
    assert!(whole.len() > 4096);
    let args = ["batch", &input, "-o", &out];
    let full = finish(on_a_full_disk(&home, OCTET, &args, 8), "");
    assert_eq!(full.code, Some(1), "{}", full.stderr);
    let said: Vec<_> = full.stderr.lines().collect();
    assert!(
        said.iter().any(|l| l.contains("--resume goes on")),
        "{said:?}"
    );
    assert!(
        said.last().unwrap().contains("out.jsonl: cannot write"),
        "{said:?}"
    );
    assert!(whole.starts_with(&fs::read(&out).unwrap()));
    let on = home.octet(&[&args[..], &["--resume"]].concat());
    assert_eq!(on.code, Some(0), "{}", on.stderr);
    assert!(fs::read(&out).unwrap() == whole);
}

#[test]
fn measurements_that_cannot_be_written_leave_nothing() {
    let home = Home::new();
    let text = home.write("text", "Once upon a time there was a fox. ".repeat(200));
    for command in ["imatrix", "profile"] {
        let out = home.path("out").to_str().unwrap().to_string();
        let args = [command, "-f", &text, "-o", &out];
        let full = finish(on_a_full_disk(&home, OCTET, &args, 0), "");
        assert_eq!(full.code, Some(1), "{}", full.stderr);
        assert!(full.stderr.contains("out: cannot write"), "{}", full.stderr);
        assert!(!home.path("out").exists() && !home.path("out.part").exists());
    }
}

/// Killed or terminated at any moment, `quantize` leaves the old file as it is, and goes on to the same bytes.
#[test]
fn quantize_is_ended_at_any_moment() {
    let home = Home::new();
    let (whole, dst) = (home.path("whole.gguf"), home.path("out.gguf"));
    let run = |dst: &Path, more: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_quantize"));
        command.args([Path::new(DEMO), dst]);
        command
            .args(["Q8_0", "--allow-requantize", "--threads", "1"])
            .args(more);
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        command
    };
    let started = std::time::Instant::now();
    assert!(run(&whole, &[]).status().unwrap().success());
    let (took, whole) = (started.elapsed(), fs::read(whole).unwrap());
    fs::write(&dst, "old").unwrap();
    let mut ended = 0;
    let unfinished = || home.path("out.gguf.resume").exists();
    for turn in 0..kills(6) {
        // Goes on, or begins anew over what is there.
        let more: &[&str] = if unfinished() && turn % 3 != 0 {
            &["--resume"]
        } else {
            &[]
        };
        let mut child = run(&dst, more).spawn().unwrap();
        std::thread::sleep(took.mul_f64(turn as f64 * 0.618 % 1.0));
        if child.try_wait().unwrap().is_none() {
            ended += 1;
        }
        end(&mut child, turn);
        let found = fs::read(&dst).unwrap();
        assert!(
            found == b"old" || found == whole,
            "turn {turn}: {} bytes",
            found.len()
        );
        fs::write(&dst, "old").unwrap();
    }
    assert!(ended > 0);
    let more: &[&str] = if unfinished() { &["--resume"] } else { &[] };
    assert!(run(&dst, more).status().unwrap().success());
    assert!(fs::read(&dst).unwrap() == whole);
    assert!(!home.path("out.gguf.part").exists() && !unfinished());
    println!("ended {ended} times");
}

/// What one process writes, another does not.
#[test]
fn outputs_are_for_one_process_at_a_time() {
    let home = Home::new();
    let input = home.write("in.jsonl", "{\"prompt\":\"Once\",\"max_tokens\":2}\n");
    let (out, dst) = (home.path("out.jsonl"), home.path("out.gguf"));
    // As another octet has them.
    let lock = |name: &str| {
        let file = fs::File::create(home.path(name)).unwrap();
        file.lock().unwrap();
        file
    };
    let (batch, quantize) = (lock("out.jsonl"), lock("out.gguf.resume"));
    let refused = home.octet(&["batch", &input, "-o", out.to_str().unwrap(), "--force"]);
    let said = refused.error(2);
    assert!(
        said.contains("another octet is writing this file"),
        "{said}"
    );
    let run = || {
        let mut command = Command::new(env!("CARGO_BIN_EXE_quantize"));
        command
            .args([Path::new(DEMO), &dst])
            .args(["Q8_0", "--allow-requantize"]);
        command.output().unwrap()
    };
    let refused = run();
    let said = String::from_utf8(refused.stderr).unwrap();
    assert_eq!(refused.status.code(), Some(2), "{said}");
    assert!(
        said.contains("another quantize is writing this file"),
        "{said}"
    );
    drop((batch, quantize));
    let out = home.octet(&["batch", &input, "-o", out.to_str().unwrap(), "--force"]);
    assert_eq!(out.code, Some(0), "{}", out.stderr);
    assert!(run().status.success());
}

/// A name that is no UTF-8.
fn odd(home: &Home, name: &str) -> PathBuf {
    let name = [b"\xff\xfe ", name.as_bytes()].concat();
    home.path("").join(OsString::from_vec(name))
}

fn octet(home: &Home, args: &[&OsStr], input: &str) -> Output {
    let mut command = home.command(&[]);
    command.args(args);
    finish(command, input)
}

#[test]
fn names_need_not_be_text() {
    let home = Home::new();
    let [model, session, input, output, quantized] =
        ["m.gguf", "s", "in.jsonl", "out.jsonl", "q.gguf"].map(|name| odd(&home, name));
    fs::copy(DEMO, &model).unwrap();
    fs::write(&input, "{\"prompt\":\"Once\",\"max_tokens\":2}\n").unwrap();
    let arg = |text: &'static str| OsStr::new(text);
    let args = [
        arg("chat"),
        arg("-m"),
        model.as_ref(),
        arg("-n"),
        arg("3"),
        arg("--session"),
        session.as_ref(),
    ];
    for turns in 0..2 {
        let out = octet(&home, &args, "Hi\n");
        assert_eq!(out.code, Some(0), "{}", out.stderr);
        assert_eq!(
            out.stderr.contains("1 turn in"),
            turns == 1,
            "{}",
            out.stderr
        );
    }
    let args = [
        arg("batch"),
        arg("-m"),
        model.as_ref(),
        input.as_ref(),
        arg("-o"),
        output.as_ref(),
    ];
    assert_eq!(octet(&home, &args, "").code, Some(0));
    assert_eq!(fs::read_to_string(&output).unwrap().lines().count(), 1);
    for args in [
        &[arg("inspect"), model.as_ref(), arg("--json")][..],
        &[arg("plan"), model.as_ref()],
    ] {
        octet(&home, args, "").text();
    }
    let status = Command::new(env!("CARGO_BIN_EXE_quantize"))
        .args([&model, &quantized])
        .args(["Q8_0", "--allow-requantize"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    assert!(status.unwrap().success() && quantized.is_file());
    let missing = odd(&home, "none.gguf");
    let out = octet(
        &home,
        &[arg("run"), arg("-m"), missing.as_ref(), arg("-p"), arg("x")],
        "",
    );
    assert!(
        out.error(1).contains("none.gguf: cannot open"),
        "{}",
        out.stderr
    );
    // A prompt is text.
    let out = octet(
        &home,
        &[arg("run"), arg("-p"), OsStr::from_bytes(b"\xff")],
        "",
    );
    assert_eq!(out.code, Some(2), "{}", out.stderr);
}

/// Neither without a home nor with one in which nothing can be made is anything said or lost.
#[test]
fn a_home_is_not_needed() {
    let home = Home::new();
    let args = ["run", "--raw", "-p", "Once", "-n", "4", "--temp", "0"];
    let want = home.octet(&args).text().to_string();
    for set in [None, Some(""), Some("/dev/null"), Some("relative")] {
        for args in [&args[..], &CHAT] {
            let mut command = home.command(args);
            command
                .env_remove("XDG_CACHE_HOME")
                .env_remove("XDG_STATE_HOME");
            match set {
                Some(path) => command.env("HOME", path),
                None => command.env_remove("HOME"),
            };
            // A relative home is one below the current folder.
            command.current_dir(home.path("")).arg("-m").arg(DEMO);
            let out = finish(command, "Hi\n");
            let text = out.text();
            assert!(args[0] == "chat" || text == want, "{text}");
            assert_eq!(out.stderr.lines().count(), 1, "{}", out.stderr);
        }
    }
}

/// Texts from Windows are the same texts.
#[test]
fn windows_line_ends() {
    let home = Home::new();
    let ends = |text: &str| text.replace('\n', "\r\n");
    let run = |args: &[&str], input: &str| {
        let out = home.octet_with(args, input);
        assert_eq!(out.code, Some(0), "{}", out.stderr);
        out.text().to_string()
    };
    for (args, input) in [
        (&CHAT[..], "Hi\n/set\n\"\"\"\nsome\nlines\n\"\"\"\nBye\n"),
        (&["tokenize", "--json"], "\"ab\"\n\"c\"\n"),
        (
            &["tokenize", "--chat", "--json"],
            "{\"messages\":[{\"role\":\"user\",\"content\":\"x\"}]}\n",
        ),
        (&["detokenize"], "300 301\n302\n"),
    ] {
        let (plain, windows) = (run(args, input), run(args, &ends(input)));
        if args[0] != "chat" {
            assert_eq!(plain, windows);
        } else {
            // Line ends inside a text are the user's own.
            let count = |text: &str| text.lines().count();
            assert_eq!(count(&plain), count(&windows), "{plain}\n{windows}");
            assert_eq!(plain.lines().next(), windows.lines().next());
        }
    }
    let lines = "{\"prompt\":\"a\",\"max_tokens\":2,\"temperature\":0}\n\n{\"prompt\":\"b\",\"max_tokens\":2,\"temperature\":0}\n";
    let said = |text: &str| {
        let input = home.write("in.jsonl", text);
        let out = run(&["batch", &input, "-o", "-"], "");
        let text = |line: &str| {
            let line: serde_json::Value = serde_json::from_str(line).unwrap();
            line["response"]["body"]["choices"].to_string()
        };
        out.lines().map(text).collect::<Vec<_>>()
    };
    assert_eq!(said(lines), said(&ends(lines)));
    for grammar in ["root ::= \"ab\" |\n \"cd\"\n", "start: \"ab\"\n | \"cd\"\n"] {
        let file = home.write("grammar", ends(grammar));
        let said = run(
            &["run", "--raw", "-p", "x", "--temp", "0", "--grammar", &file],
            "",
        );
        assert!(["ab", "cd"].contains(&said.trim()), "{said:?}");
    }
}
