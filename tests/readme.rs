//! The commands that the documentation shows: they are run as a reader would type them, and what is shown as their output is
//! compared with what they print.
//!
//! A block of a page is a session (`$ command`, then what it prints), or commands, one a line, or else something to read. Commands of
//! octet and quantize are run, in a folder that has the repository's models and data. One that names a model which the repository
//! does not have (`mixtral….gguf`) must fail by just that, exit code 1 and "No such file", so that its options are right at least; what
//! is shown as its output cannot be compared. Speeds, the CPU tier and the number of threads differ between machines and are not
//! compared; texts, tokens and hashes of logits are. Lines of standard error may be left out of what is shown.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use regex::Regex;
use tempfile::TempDir;

use crate::program::{Home, Output, finish};

/// Commands that read a whole text take half a minute: `every_command_of_the_documentation` runs them, and is run by itself.
const LONG: &[&str] = &["-f tests/data/valid.txt", "-f a.txt", "-f b.txt"];

/// Commands beside octet's own that a session may have.
const SMALL: &[&str] = &["cat", "echo", "head", "ls", "printf", "sed", "tail"];

/// The pages.
fn pages() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let docs = fs::read_dir(root.join("docs")).unwrap();
    let mut pages: Vec<PathBuf> = docs.map(|entry| entry.unwrap().path()).collect();
    pages.retain(|path| path.extension().is_some_and(|e| e == "md"));
    pages.extend([root.join("README.md"), root.join("models/README.md")]);
    pages.sort();
    pages
}

/// A command, the line it is on, and what is shown as its output; `None`: nothing is.
#[derive(Debug, PartialEq)]
struct Shown {
    line: usize,
    command: String,
    output: Option<Vec<String>>,
}

/// The program of a command line.
fn program(line: &str) -> &str {
    let word = line.split(' ').next().unwrap_or_default();
    word.strip_prefix("target/release/").unwrap_or(word)
}

fn is_ours(line: &str) -> bool {
    ["octet", "quantize"].contains(&program(line)) || line.contains("| octet ")
}

/// The commands of a page.
fn commands(text: &str) -> Vec<Shown> {
    let mut all = Vec::new();
    let mut block: Option<Vec<(usize, &str)>> = None;
    for (i, line) in text.lines().enumerate() {
        match (&mut block, line.trim_start().starts_with("```")) {
            (None, true) => block = Some(Vec::new()),
            (Some(lines), false) => lines.push((i + 1, line)),
            (Some(_), true) => of_block(&block.take().unwrap(), &mut all),
            (None, false) => {}
        }
    }
    assert!(block.is_none(), "a block has no end");
    all
}

fn of_block(lines: &[(usize, &str)], all: &mut Vec<Shown>) {
    let session = lines.iter().any(|(_, line)| line.starts_with("$ "));
    for &(at, line) in lines {
        let shown = |command: &str, output| Shown {
            line: at,
            command: command.to_string(),
            output,
        };
        match (session, line.strip_prefix("$ ")) {
            (true, Some(command)) => all.push(shown(command, Some(Vec::new()))),
            (true, None) => {
                let last = all.last_mut().expect("output before a command");
                last.output.as_mut().unwrap().push(line.to_string());
            }
            (false, _) if is_ours(line) || SMALL.contains(&program(line)) => {
                all.push(shown(line, None))
            }
            (false, _) => {}
        }
    }
}

/// A folder like a checkout, in which commands may write.
fn checkout() -> TempDir {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let folder = TempDir::new().unwrap();
    for part in ["models", "tests/data"] {
        fs::create_dir_all(folder.path().join(part)).unwrap();
        for entry in fs::read_dir(root.join(part)).unwrap() {
            let entry = entry.unwrap();
            let to = folder.path().join(part).join(entry.file_name());
            match part {
                // What commands write over.
                "models" => drop(fs::copy(entry.path(), to).unwrap()),
                _ => std::os::unix::fs::symlink(entry.path(), to).unwrap(),
            }
        }
    }
    folder
}

/// Runs a line as a shell does; both of its outputs, as they came.
fn run(home: &Home, folder: &Path, line: &str) -> Output {
    let octet = Path::new(env!("CARGO_BIN_EXE_octet"));
    let path = std::env::var("PATH").unwrap_or_default();
    let mut shell = Command::new("sh");
    let line = line.replace("target/release/", "");
    shell.args(["-c", &format!("{{ {line}\n}} 2>&1")]);
    for (name, value) in home.command(&[]).get_envs() {
        match value {
            Some(value) => shell.env(name, value),
            None => shell.env_remove(name),
        };
    }
    let programs = octet.parent().unwrap().display();
    shell.env("PATH", format!("{programs}:{path}"));
    shell.current_dir(folder);
    finish(shell, "")
}

/// The file that a command names and does not find, where nobody could have it: a path of the repository must be there.
fn not_there<'a>(folder: &Path, command: &'a str, said: &str) -> Option<&'a str> {
    let words = command
        .split([' ', '='])
        .map(|word| word.trim_matches(['\'', '"']));
    words
        .filter(|word| !word.is_empty() && !word.contains('/') && !folder.join(word).exists())
        .find(|word| {
            ["open", "read"]
                .iter()
                .any(|action| said.contains(&format!(": {word}: cannot {action}: No such file")))
        })
}

/// A line without what differs from machine to machine and from run to run.
fn masked(command: &str, line: &str) -> String {
    let tiers = octet::simd::TIERS.iter().map(|row| row.name);
    let tiers = tiers.collect::<Vec<_>>().join("|");
    let others = "scalar|avx2|avxvnni|avx512bw|avx512|amx|neon|dotprod";
    let tier = format!(r"\b({tiers}|{others})\b");
    let mut masks: Vec<(String, &str)> = vec![
        (tier, "TIER"),
        // A speed is left out where the clock saw no time pass.
        (r" at [\d.]+ tok/s".into(), ""),
        (r"[\d.]+ GB/s".into(), "N GB/s"),
        (r"\(\d+% of [\d.]+\)".into(), "(N% of N)"),
        (r"\d+ threads".into(), "N threads"),
        (r" in [\d.]+ s\b".into(), " in N s"),
    ];
    match program(command) {
        "octet" if command.starts_with("octet bench") => {
            masks.extend([
                (r"[\d.]+%?".into(), "N"),
                ("^ +".into(), ""),
                (" +".into(), " "),
            ]);
        }
        // Who owns a file, and since when; and its size, which grows with speeds in a session's text.
        "ls" => masks.push((r"^(\S+) .* (\S+)$".into(), "$1 $2")),
        _ => {}
    }
    let line = line.trim_end().to_string();
    masks.iter().fold(line, |line, (pattern, mask)| {
        let mask: &str = mask;
        Regex::new(pattern)
            .unwrap()
            .replace_all(&line, mask)
            .into_owned()
    })
}

/// What differs between the output that is shown and what was printed; lines of standard error may be left out.
fn difference(command: &str, shown: &[String], printed: &str) -> Option<String> {
    let mask = |line: &str| masked(command, line);
    let mut printed = printed.trim_end().lines().map(mask).peekable();
    for line in shown {
        let line = mask(line);
        while printed
            .peek()
            .is_some_and(|said| *said != line && said.starts_with("octet: "))
        {
            printed.next();
        }
        let said = printed.next().unwrap_or_default();
        if said != line {
            return Some(format!("shown:   {line}\nprinted: {said}"));
        }
    }
    printed
        .find(|said| !said.starts_with("octet: "))
        .map(|said| format!("not shown: {said}"))
}

/// What became of commands.
#[derive(Default, Debug)]
struct Done {
    worked: usize,
    compared: usize,
    without_model: usize,
    faults: Vec<String>,
}

/// Runs the commands of a page, one after the other, in one folder.
fn try_page(page: &Path, wanted: impl Fn(&str) -> bool, done: &mut Done) {
    let (home, folder) = (Home::new(), checkout());
    // An answer that does not end its line ends it on a terminal only.
    let closing = Regex::new(r"(?m)(.)(octet: prompt \d+ tokens?\b)").unwrap();
    for shown in commands(&fs::read_to_string(page).unwrap()) {
        let command = &shown.command;
        if !(is_ours(command) || SMALL.contains(&program(command))) || !wanted(command) {
            continue;
        }
        let place = format!("{}:{}", page.display(), shown.line);
        // A file that a page shows is there for the commands after it.
        if let (Some(file), Some(lines)) = (command.strip_prefix("cat "), &shown.output)
            && !folder.path().join(file).exists()
        {
            fs::write(folder.path().join(file), lines.join("\n") + "\n").unwrap();
            continue;
        }
        let out = run(&home, folder.path(), command);
        let printed = String::from_utf8_lossy(&out.stdout);
        let printed = closing.replace_all(&printed, "$1\n$2");
        // A batch of which a line failed has done its work, and exits with 1.
        let expected = shown.output.as_ref().map(|lines| lines.join("\n"));
        let said = |what: &str| expected.as_ref().is_some_and(|e| e.contains(what));
        match out.code {
            Some(1) if not_there(folder.path(), command, &printed).is_some() => {
                done.without_model += 1;
                continue;
            }
            // Options of a GPU are for a build with the feature.
            Some(2) if !cfg!(feature = "cuda") && command.contains(" --gpu") => {
                assert!(printed.contains("built without CUDA"), "{place}: {printed}");
            }
            Some(0) => done.worked += 1,
            Some(1) if said("lines failed") => done.worked += 1,
            code => {
                let fault = format!("{place}: {command}\nexit code {code:?}: {printed}");
                done.faults.push(fault);
                continue;
            }
        }
        let Some(lines) = &shown.output else { continue };
        match difference(command, lines, &printed) {
            None => done.compared += 1,
            Some(what) => done.faults.push(format!("{place}: {command}\n{what}")),
        }
    }
}

fn try_all(wanted: impl Fn(&str) -> bool) -> Done {
    let mut done = Done::default();
    for page in pages() {
        try_page(&page, &wanted, &mut done);
    }
    let Done {
        worked,
        compared,
        without_model,
        faults,
    } = &done;
    println!(
        "{worked} commands worked, the outputs of {compared} were compared; {without_model} want a model that is not here"
    );
    assert!(faults.is_empty(), "{}", faults.join("\n\n"));
    done
}

#[test]
fn commands_of_the_documentation_work_and_print_what_is_shown() {
    let done = try_all(|command| !LONG.iter().any(|long| command.contains(long)));
    assert!(done.worked >= 15 && done.compared >= 10, "{done:?}");
    assert!(done.without_model >= 15, "{done:?}");
}

/// In `.ci/run`.
#[test]
#[ignore = "takes minutes"]
fn every_command_of_the_documentation() {
    let done = try_all(|_| true);
    assert!(done.worked >= 20 && done.compared >= 12, "{done:?}");
}

#[test]
fn blocks_are_understood() {
    let page = "text\n```\n$ octet run -p x\nanswer\n$ ls\n```\n```\noctet chat   # talk\ncargo build\noctet: said\n```\n";
    let shown = |line, command: &str, output: Option<&[&str]>| Shown {
        line,
        command: command.into(),
        output: output.map(|lines| lines.iter().map(|l| l.to_string()).collect()),
    };
    assert_eq!(
        commands(page),
        [
            shown(3, "octet run -p x", Some(&["answer"])),
            shown(5, "ls", Some(&[])),
            shown(8, "octet chat   # talk", None),
        ]
    );
}

#[test]
fn a_wrong_command_or_output_is_found() {
    let folder = TempDir::new().unwrap();
    let page = |block: &str| {
        let path = folder.path().join("page.md");
        fs::write(&path, format!("```\n{block}\n```\n")).unwrap();
        let mut done = Done::default();
        try_page(&path, |_| true, &mut done);
        done.faults.join("\n")
    };
    let run = "$ octet run --raw -p 'Once upon a time' -n 4 --temp 0";
    assert_eq!(page(&format!("{run}\n there was a little")), "");
    for (block, fault) in [
        (
            &*format!("{run}\n there was a big"),
            "shown:    there was a big",
        ),
        (&format!("{run}\n there was a little\nx"), "shown:   x"),
        (run, "not shown:  there was a little"),
        ("octet run --frobnicate", "exit code Some(2)"),
        ("octet run -p x -m models/mixtral.gguf", "exit code Some(1)"),
        (
            "octet inspect mixtral.gguf --frobnicate",
            "exit code Some(2)",
        ),
    ] {
        assert!(page(block).contains(fault), "{block}: {}", page(block));
    }
    assert_eq!(page("octet inspect mixtral.gguf --json"), "");
}
