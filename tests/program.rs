//! Running the real programs: a home of their own, what they say, signals.

use std::fs;
use std::path::PathBuf;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;

/// Longer than anything takes on a slow and busy machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(180);

pub(crate) const DEMO: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/models/demo-Q4_K_M.gguf");

/// A home of its own for the program, so that no test sees the user's files or another test's.
pub(crate) struct Home(TempDir);

/// What a run gave.
#[derive(Debug)]
pub(crate) struct Output {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: Vec<u8>,
    pub(crate) stderr: String,
}

impl Home {
    pub(crate) fn new() -> Home {
        let home = Home(TempDir::new().unwrap());
        // The machine's bandwidth is measured once; tests that do not look at it need not wait.
        fs::create_dir_all(home.path("cache/octet")).unwrap();
        for threads in 1..=64 {
            fs::write(
                home.path(&format!("cache/octet/bandwidth-{threads}")),
                "1e10\n",
            )
            .unwrap();
        }
        home
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub(crate) fn write(&self, name: &str, bytes: impl AsRef<[u8]>) -> String {
        let path = self.path(name);
        fs::write(&path, bytes).unwrap();
        path.to_str().unwrap().to_string()
    }

    /// The program, ready to be started.
    pub(crate) fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_octet"));
        command
            .args(args)
            .env("HOME", self.0.path())
            .env("XDG_CACHE_HOME", self.path("cache"))
            .env("XDG_STATE_HOME", self.path("state"))
            .env("TERM", "xterm")
            .env_remove("OCTET_MODEL")
            .env_remove("OCTET_ISA")
            .current_dir(env!("CARGO_MANIFEST_DIR"));
        command
    }

    /// Runs the program to its end, with `input` on standard input.
    pub(crate) fn octet_with(&self, args: &[&str], input: impl AsRef<[u8]>) -> Output {
        finish(self.command(args), input)
    }

    pub(crate) fn octet(&self, args: &[&str]) -> Output {
        self.octet_with(args, "")
    }
}

pub(crate) fn finish(command: Command, input: impl AsRef<[u8]>) -> Output {
    let mut command = assert_cmd::Command::from_std(command);
    command.timeout(PATIENCE).write_stdin(input.as_ref());
    let out = command.output().unwrap();
    Output {
        code: out.status.code(),
        stdout: out.stdout,
        stderr: String::from_utf8(out.stderr).unwrap(),
    }
}

impl Output {
    /// Standard output of a run that must have worked.
    #[track_caller]
    pub(crate) fn text(&self) -> &str {
        assert_eq!(self.code, Some(0), "{}", self.stderr);
        std::str::from_utf8(&self.stdout).unwrap()
    }

    /// Its only JSON document.
    #[track_caller]
    pub(crate) fn json(&self) -> Value {
        let text = self.text();
        let document = serde_json::from_str(text).unwrap_or_else(|e| panic!("{e}: {text}"));
        assert!(
            text.ends_with('\n') && text.matches('\n').count() == 1,
            "{text}"
        );
        document
    }

    /// Its JSON documents, one a line.
    #[track_caller]
    pub(crate) fn json_lines(&self) -> Vec<Value> {
        let text = std::str::from_utf8(&self.stdout).unwrap();
        text.lines()
            .map(|l| serde_json::from_str(l).unwrap())
            .collect()
    }

    /// The one line that a failed run says; nothing is on standard output.
    #[track_caller]
    pub(crate) fn error(&self, code: i32) -> &str {
        assert_eq!(self.code, Some(code), "{}", self.stderr);
        assert!(self.stdout.is_empty());
        let line = self.stderr.strip_suffix('\n').unwrap();
        assert!(
            line.starts_with("octet: ") && !line.contains('\n'),
            "{line}"
        );
        line
    }
}

/// The closing line, taken apart.
#[derive(Debug)]
pub(crate) struct Closing {
    pub(crate) prompt_tokens: u64,
    pub(crate) answer_tokens: u64,
    pub(crate) tier: String,
    pub(crate) threads: u64,
    pub(crate) hash: String,
}

/// Reads the closing line: `prompt N tokens at X tok/s; answer N tokens at X tok/s; X GB/s of weights
/// (P% of X); TIER, N threads; logits HASH`.
#[track_caller]
pub(crate) fn closing(stderr: &str) -> Closing {
    let line = stderr
        .lines()
        .find(|l| l.contains("; logits "))
        .expect(stderr);
    let parts: Vec<&str> = line
        .strip_prefix("octet: ")
        .expect(line)
        .split("; ")
        .collect();
    let [prompt, answer, bytes, machine, hash] = parts[..] else {
        panic!("{line}")
    };
    let number = |s: &str| {
        s.parse::<f64>()
            .unwrap_or_else(|_| panic!("{s:?} in {line}"))
    };
    let speed = |part: &str, what: &str| {
        let words: Vec<&str> = part.split(' ').collect();
        assert_eq!(words[0], what, "{line}");
        assert_eq!(
            words[2],
            if words[1] == "1" { "token" } else { "tokens" },
            "{line}"
        );
        match words[3..] {
            [] => {}
            ["at", speed, "tok/s"] => assert!(number(speed) > 0.0, "{line}"),
            _ => panic!("{line}"),
        }
        words[1].parse().unwrap()
    };
    let (used, rest) = bytes.split_once(" GB/s of weights (").expect(line);
    let (share, limit) = rest.split_once("% of ").expect(line);
    assert!(number(used) >= 0.0 && number(share) >= 0.0, "{line}");
    assert!(number(limit.strip_suffix(')').unwrap()) > 0.0, "{line}");
    let (tier, threads) = machine.split_once(", ").unwrap();
    let hash = hash.strip_prefix("logits ").unwrap();
    assert!(
        hash.len() == 16 && u64::from_str_radix(hash, 16).is_ok(),
        "{line}"
    );
    Closing {
        prompt_tokens: speed(prompt, "prompt"),
        answer_tokens: speed(answer, "answer"),
        tier: tier.into(),
        threads: threads.strip_suffix(" threads").unwrap().parse().unwrap(),
        hash: hash.into(),
    }
}

/// Sends a signal as the shell's own `kill` does: a small system has no program of that name.
#[cfg(unix)]
pub(crate) fn signal(child: &Child, name: &str) {
    let ok = Command::new("sh")
        .args(["-c", "kill -s \"$0\" \"$1\"", name, &child.id().to_string()])
        .status()
        .unwrap();
    assert!(ok.success());
}

/// Waits for the end of a process, but not for ever.
pub(crate) fn wait(child: &mut Child) -> std::process::ExitStatus {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match child.try_wait().unwrap() {
            Some(status) => return status,
            None if Instant::now() > deadline => {
                child.kill().unwrap();
                panic!("the program does not end");
            }
            None => std::thread::sleep(Duration::from_millis(5)),
        }
    }
}
