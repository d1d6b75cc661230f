//! What people get wrong in their first hour, and the line that puts them right.

use std::fs;
use std::path::Path;
use std::process::Command;

use crate::program::{DEMO, Home, Output, finish};

/// Standard error, which is one line.
#[track_caller]
fn line(out: &Output, code: i32) -> &str {
    assert_eq!(out.code, Some(code), "{}", out.stderr);
    assert!(out.stdout.is_empty());
    let line = out.stderr.strip_suffix('\n').unwrap();
    assert!(!line.contains('\n'), "{line}");
    line
}

fn quantize(home: &Home, args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_quantize"));
    command.args(args).current_dir(home.path(""));
    finish(command, "")
}

/// Runs octet in the home.
fn octet(home: &Home, args: &[&str]) -> Output {
    let mut command = home.command(args);
    command.current_dir(home.path(""));
    finish(command, "")
}

/// Every way in for a model says the same.
#[track_caller]
fn model_says(home: &Home, path: &str, words: &[&str]) {
    for args in [
        &["run", "-p", "x", "-m", path][..],
        &["chat", "-m", path],
        &["bench", "-m", path],
        &["tokenize", "-m", path],
        &["inspect", path],
        &["plan", path],
    ] {
        let out = octet(home, args);
        let said = out.error(1);
        for word in words {
            assert!(said.contains(word), "{args:?}: `{word}` is not in: {said}");
        }
    }
    let said = quantize(home, &[path, "out.gguf", "Q8_0"]);
    let said = line(&said, 1);
    for word in words {
        assert!(said.contains(word), "quantize: `{word}` is not in: {said}");
    }
}

#[test]
fn a_model_that_is_not_there() {
    let home = Home::new();
    fs::create_dir_all(home.path("models")).unwrap();
    fs::create_dir_all(home.path("many")).unwrap();
    for name in [
        "mixtral-8x7b.Q4_K_M.gguf",
        "tales-00001-of-00002.gguf",
        "tales-00002-of-00002.gguf",
    ] {
        home.write(&format!("models/{name}"), "");
    }
    home.write("models/big.gguf.part", "");
    for i in 0..9 {
        home.write(&format!("many/{}.gguf", i * 11111), "");
    }
    let missing = "cannot open: No such file or directory (os error 2); ";
    for (path, hint) in [
        (
            "models/mixtral-8x7b.Q4_KM.gguf",
            "did you mean models/mixtral-8x7b.Q4_K_M.gguf?",
        ),
        (
            "models/mixtral-8x7b.q4_k_m",
            "did you mean models/mixtral-8x7b.Q4_K_M.gguf?",
        ),
        (
            "models/mixtral-8x7b",
            "did you mean models/mixtral-8x7b.Q4_K_M.gguf?",
        ),
        (
            "models/tales.gguf",
            "did you mean models/tales-00001-of-00002.gguf?",
        ),
        ("modles/tales.gguf", "there is no folder modles"),
        (
            "models/big.gguf",
            "models/big.gguf.part is there: a download that has not ended",
        ),
        (
            "models/zzz.gguf",
            "GGUF files in that folder: mixtral-8x7b.Q4_K_M.gguf, tales-0000",
        ),
        (
            "https://example.org/mixtral.gguf",
            "octet fetches nothing: download the GGUF file",
        ),
        (
            "mixtral.gguf",
            "docs/getting-started.md says where Mixtral can be had",
        ),
    ] {
        let out = octet(&home, &["inspect", path]);
        let want = format!("octet: {path}: {missing}{hint}");
        assert!(out.error(1).starts_with(&want), "{want}\n{}", out.stderr);
    }
    model_says(
        &home,
        "models/mixtral-8x7b.Q4KM.gguf",
        &["did you mean models/mixtral-8x7b.Q4_K_M.gguf?"],
    );
    // Too many to be named, and none alike.
    let out = octet(&home, &["inspect", "many/x.gguf"]);
    assert!(out.error(1).ends_with("(os error 2)"), "{}", out.stderr);
}

#[test]
fn a_model_that_quantize_has_to_make() {
    let home = Home::new();
    let safetensors = b"\x10\0\0\0\0\0\0\0{\"__metadata__\":{}}        ";
    for folder in ["Mixtral-8x7B", "my models"] {
        fs::create_dir_all(home.path(folder)).unwrap();
        home.write(
            &format!("{folder}/model-00001-of-00002.safetensors"),
            safetensors,
        );
        home.write(&format!("{folder}/config.json"), "{}");
    }
    home.write("alone.safetensors", safetensors);
    let say = |args: &[&str]| octet(&home, args).error(1).to_string();
    let made = "`quantize Mixtral-8x7B Mixtral-8x7B-Q4_K_M.gguf Q4_K_M` makes a GGUF file of it";
    for path in [
        "Mixtral-8x7B",
        "Mixtral-8x7B/model-00001-of-00002.safetensors",
    ] {
        for args in [
            &["run", "-p", "x", "-m", path][..],
            &["chat", "-m", path],
            &["bench", "-m", path],
            &["inspect", path],
            &["plan", path],
            &["perplexity", "-f", "x", "-m", path],
        ] {
            let said = say(args);
            assert!(said.contains(made), "{args:?}: {said}");
        }
    }
    let said = say(&["chat", "-m", "my models"]);
    assert!(
        said.contains("`quantize 'my models' 'my models-Q4_K_M.gguf' Q4_K_M`"),
        "{said}"
    );
    let said = say(&["chat", "-m", "alone.safetensors"]);
    assert!(
        said.contains("a folder with this, the model's config.json and its tokenizer"),
        "{said}"
    );

    fs::create_dir_all(home.path("one")).unwrap();
    home.write("one/x.gguf", "");
    let said = say(&["chat", "-m", "one"]);
    assert!(
        said.ends_with("found a folder); did you mean one/x.gguf?"),
        "{said}"
    );
    home.write("one/y.gguf", "");
    let said = say(&["chat", "-m", "one"]);
    assert!(
        said.ends_with("name one of its 2 GGUF files, such as one/x.gguf"),
        "{said}"
    );
}

#[test]
fn what_a_download_leaves() {
    let home = Home::new();
    let demo = fs::read(DEMO).unwrap();
    for (name, bytes, words) in [
        (
            "page",
            b"\n<!DOCTYPE html><html>"[..].to_vec(),
            "a web page; the download went wrong",
        ),
        (
            "pointer",
            b"version https://git-lfs.github.com/spec/v1\noid".to_vec(),
            "`git lfs pull`",
        ),
        (
            "refused",
            b"Invalid username or password.".to_vec(),
            "a text; it begins \"Invalid username or password.\"",
        ),
        (
            "error",
            b"{\"error\":\"Repository not found\"}".to_vec(),
            "a JSON file; the download may have gone wrong",
        ),
        (
            "zeros",
            vec![0; 4096],
            "zeros; the download has not ended, or went wrong",
        ),
        (
            "gzip",
            b"\x1f\x8b\x08\0\0\0\0\0".to_vec(),
            "a gzip archive; unpack it",
        ),
        (
            "zip",
            b"PK\x03\x04\x14\0\0\0".to_vec(),
            "a PyTorch or zip archive; most models are also there as safetensors",
        ),
        (
            "pytorch_model.bin",
            b"\x80\x04\x95\0\0\0".to_vec(),
            "a PyTorch pickle; most models",
        ),
        (
            "ggml",
            b"lmgg\x01\0\0\0\0\0\0\0".to_vec(),
            "an old GGML file; look for a newer file",
        ),
        (
            "half",
            demo[..demo.len() / 2].to_vec(),
            "the download may be incomplete",
        ),
        ("empty", vec![], "an empty file"),
    ] {
        let path = home.write(&format!("{name}.gguf"), bytes);
        model_says(&home, &path, &[&path, words]);
    }
}

#[test]
fn a_model_where_text_belongs() {
    let home = Home::new();
    let out = home.path("out").to_str().unwrap().to_string();
    let text =
        "the text is wrong (expected text, found a GGUF file; a model belongs behind --model)";
    for args in [
        &["run", "-f", DEMO][..],
        &["perplexity", "-f", DEMO],
        &["imatrix", "-f", DEMO, "-o", &out],
        &["profile", "-f", DEMO, "-o", &out],
        &["run", "-p", "x", "--grammar", DEMO],
        &["run", "-p", "x", "--json-schema", DEMO],
    ] {
        let run = home.octet(args);
        assert_eq!(run.error(1), format!("octet: {DEMO}: {text}"), "{args:?}");
    }
    // These read line by line, or whole documents; nothing is made of it.
    for args in [
        &["batch", DEMO, "-o", &out][..],
        &["chat", "--tools", DEMO],
        &["chat", "--session", DEMO],
        &["profile", "show", DEMO],
        &["run", "-p", "x", "--profile", DEMO],
    ] {
        let copy = home.write("copy.gguf", fs::read(DEMO).unwrap());
        let args: Vec<&str> = args
            .iter()
            .map(|a| if *a == DEMO { copy.as_str() } else { a })
            .collect();
        let run = home.octet(&args);
        assert!(
            run.code == Some(1) && run.stderr.contains(&copy),
            "{args:?}: {run:?}"
        );
        assert!(
            run.stderr.lines().all(|l| l.starts_with("octet: ")),
            "{args:?}: {}",
            run.stderr
        );
        assert!(
            fs::read(&copy).unwrap() == fs::read(DEMO).unwrap(),
            "{args:?}"
        );
    }
    home.write("prompt.txt", "Hello");
    assert_eq!(
        octet(&home, &["run", "-f", "promt.txt"]).error(1),
        "octet: promt.txt: cannot read: No such file or directory (os error 2); did you mean prompt.txt?"
    );
}

#[test]
fn words_that_are_nearly_right() {
    let home = Home::new();
    for (args, tip) in [
        (&["chatt"][..], "tip: a similar subcommand exists: 'chat'"),
        (
            &["run", "--promt", "x"],
            "tip: a similar argument exists: '--prompt'",
        ),
        (
            &["run", "-p", "x", "--isa", "scaler"],
            "tip: a similar value exists: 'scalar'",
        ),
        (
            &["run", "-p", "x", "--kv", "q8"],
            "tip: a similar value exists: 'q8_0'",
        ),
        (
            &["run", "-p", "x", "--samplers", "top_k;temprature"],
            "did you mean temperature?",
        ),
        (
            &["model.gguf"],
            "tip: a model is named with '--model model.gguf'",
        ),
        (
            &["chat", "Model.GGUF"],
            "tip: a model is named with '--model Model.GGUF'",
        ),
        (
            &["run", "Tell me a story"],
            "tip: a prompt is given with 'octet run --prompt TEXT'",
        ),
        (
            &["Tell me a story"],
            "tip: a prompt is given with 'octet run --prompt TEXT'",
        ),
        (
            &["run", "hello"],
            "tip: a prompt is given with 'octet run --prompt TEXT'",
        ),
        (&["-p", "hello"], "tip: '-p' is an option of 'octet run'"),
        (&["pull", "mixtral"], "tip: octet fetches nothing; docs/"),
        (&["version"], "tip: 'octet --version' says it"),
        (
            &["completions", "bsh"],
            "tip: a similar value exists: 'bash'",
        ),
    ] {
        let out = home.octet(args);
        assert_eq!(out.code, Some(2), "{args:?}");
        assert!(out.stderr.contains(tip), "{args:?}: {}", out.stderr);
    }
    let mut command = home.command(&["run", "-p", "x"]);
    command.env("OCTET_ISA", "avx2x");
    let out = finish(command, "");
    assert!(
        out.error(2)
            .starts_with("octet: OCTET_ISA=avx2x: expected one of scalar, ")
    );

    for (args, tip) in [
        (&["a.gguf", "b.gguf", "Q4_KM"][..], "'Q4_K_M'"),
        (&["a.gguf", "b.gguf", "q4_k_m,Q8-0"], "'Q8_0'"),
        (
            &["a.gguf", "b.gguf", "Q8_0", "--tensor-type", "x=Q4K"],
            "did you mean Q4_K?",
        ),
        (
            &["a.gguf", "b.gguf", "Q8_0", "--output-tensor-type", "Q6K"],
            "did you mean Q6_K?",
        ),
        (
            &["a.gguf", "b.gguf", "Q8_0", "--imatix", "x"],
            "'--imatrix'",
        ),
    ] {
        let out = quantize(&home, args);
        assert_eq!(out.code, Some(2), "{args:?}: {}", out.stderr);
        assert!(out.stderr.contains(tip), "{args:?}: {}", out.stderr);
    }

    let out = home.octet_with(
        &["chat"],
        "/hlep\n/experst\n/zzz\n/set tmep\n/set zzz\n/set temprature 1\n",
    );
    assert_eq!(out.code, Some(1));
    for line in [
        "octet: /hlep: no such command; did you mean /help? /help lists them",
        "octet: /experst: no such command; did you mean /experts? /help lists them",
        "octet: /zzz: no such command; /help lists them",
        "octet: tmep: no such setting; did you mean temp?",
        "octet: zzz: no such setting; /set lists them",
        "octet: temprature: no such setting; did you mean temp?",
    ] {
        assert!(
            out.stderr.lines().any(|said| said == line),
            "{line}\n{}",
            out.stderr
        );
    }
}

// ---------------------------------------------------------------------------------------------
// Help, completions, manual pages: all from one definition

#[test]
fn the_first_help_fits_on_a_screen() {
    let home = Home::new();
    let out = home.octet(&["--help"]);
    let help = out.text();
    assert!(help.lines().count() <= 40, "{help}");
    for word in [
        "chat ",
        "run ",
        "batch ",
        "plan ",
        "completions ",
        "man ",
        "--version",
    ] {
        assert!(help.contains(word), "{word}: {help}");
    }
    // Each command in one line.
    let commands = help.split("Commands:\n").nth(1).unwrap();
    let commands = commands.split("\n\n").next().unwrap();
    for line in commands.lines() {
        assert!(line.starts_with("  ") && !line.starts_with("   "), "{line}");
    }
    let help = quantize(&home, &["--help"]);
    assert!(help.text().starts_with("Turns a Hugging Face folder"));
}

#[test]
fn options_are_with_their_kind() {
    let home = Home::new();
    for (command, heading, option) in [
        ("chat", "Options", "--session"),
        ("chat", "Answer", "--system"),
        ("run", "Options", "--json"),
        ("run", "Answer", "--stop"),
        ("run", "Answer", "--predict"),
        ("run", "Machine", "--ram"),
        ("run", "Sampling", "--temp"),
        ("batch", "Answer", "--raw"),
        ("bench", "Options", "--json"),
        ("bench", "Machine", "--gpu"),
    ] {
        let out = home.octet(&[command, "--help"]);
        let part = out
            .text()
            .split(&format!("\n{heading}:\n"))
            .nth(1)
            .expect(heading);
        let part = part.split("\n\n").next().unwrap();
        assert!(
            part.lines()
                .any(|l| l.trim_start().contains(&format!("{option} "))
                    || l.trim_start().ends_with(option)),
            "{command} {heading} {option}:\n{part}"
        );
    }
}

#[test]
fn shells_complete_both_programs() {
    let home = Home::new();
    for shell in ["bash", "zsh", "fish", "powershell", "elvish"] {
        let octet = home.octet(&["completions", shell]);
        let octet = octet.text();
        // The last two complete no values.
        let words = match shell {
            "powershell" | "elvish" => &["perplexity", "top-n-sigma"][..],
            _ => &["perplexity", "top-n-sigma", "q8_0"],
        };
        for word in words {
            assert!(octet.contains(word), "{shell}: {word}");
        }
        let other = quantize(&home, &["--completions", shell]);
        assert!(
            other.text().contains("imatrix") && other.text().contains("dry-run"),
            "{shell}"
        );
    }
    // Where there is bash, it reads them.
    if Command::new("bash").arg("--version").output().is_ok() {
        let script = home.octet(&["completions", "bash"]);
        let file = home.write("octet.bash", script.text());
        let ask = "source \"$0\"; COMP_WORDS=(octet per); COMP_CWORD=1; _octet octet per octet; echo \"${COMPREPLY[@]}\"";
        let out = Command::new("bash")
            .args(["-c", ask, &file])
            .output()
            .unwrap();
        assert_eq!(String::from_utf8(out.stdout).unwrap(), "perplexity\n");
    }
}

#[test]
fn manual_pages_of_both_programs() {
    let home = Home::new();
    let folder = home.path("man/man1");
    let name = folder.to_str().unwrap();
    assert_eq!(home.octet(&["man", name]).text(), "");
    assert_eq!(quantize(&home, &["--man", name]).code, Some(0));
    let read = |page: &str| fs::read_to_string(folder.join(page)).expect(page);
    for page in [
        "octet.1",
        "octet-chat.1",
        "octet-run.1",
        "octet-profile-show.1",
        "quantize.1",
    ] {
        let text = read(page);
        assert!(text.contains(".TH ") && text.contains(".SH "), "{page}");
    }
    assert!(read("octet-run.1").contains("logprobs"));
    assert!(read("quantize.1").contains("Q4_K_M"));
    // A file in the place of the folder.
    let file = home.write("file", "");
    let said = home.octet(&["man", &file]);
    assert!(said.error(1).contains("cannot create"), "{}", said.stderr);
    assert!(Path::new(&file).is_file());
}
