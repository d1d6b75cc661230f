//! What `octet run` makes of its options: samplers, ends, prompts shown.

use crate::program::Home;
use serde_json::{Value, json};

/// `octet run --raw --json` on the demo model, with more arguments.
fn run(home: &Home, args: &[&str]) -> Value {
    home.octet(&[&["run", "--raw", "--json"], args].concat())
        .json()
}

#[test]
fn the_same_seed_gives_the_same_text_on_every_tier_and_thread_count() {
    let home = Home::new();
    let chains: [&[&str]; 3] = [
        &[
            "--dry-multiplier",
            "0.8",
            "--xtc-probability",
            "0.5",
            "--top-n-sigma",
            "1.5",
            "--typical",
            "0.9",
            "--dynatemp-range",
            "0.5",
            "--repeat-penalty",
            "1.1",
        ],
        &["--mirostat", "2"],
        &["--samplers", "temperature;top_k", "--temp", "2"],
    ];
    let mut texts = Vec::new();
    for chain in chains {
        let common = ["-p", "Once upon a time", "-n", "40", "--seed"];
        let doc =
            |seed: &str, more: &[&str]| run(&home, &[&common[..], &[seed], chain, more].concat());
        let want = doc("11", &[]);
        for tier in octet::simd::available() {
            for threads in ["1", "3"] {
                let got = doc("11", &["--isa", tier.name(), "-t", threads]);
                assert_eq!(
                    got["tokens"], want["tokens"],
                    "{chain:?} {tier:?} {threads}"
                );
            }
        }
        assert_ne!(doc("12", &[])["tokens"], want["tokens"]);
        texts.push(want["text"].clone());
    }
    texts.dedup();
    assert_eq!(texts.len(), 3, "each chain has its own text");
}

#[test]
fn dry_and_its_breakers_change_what_is_repeated() {
    let home = Home::new();
    let prompt = "said the old man. said the old man. said the old";
    let text = |args: &[&str]| {
        let all = [&["-p", prompt, "-n", "8", "--temp", "0"], args].concat();
        run(&home, &all)["text"].as_str().unwrap().to_string()
    };
    let free = text(&[]);
    assert!(free.starts_with(" man"), "{free}");
    let dry = ["--dry-multiplier", "10", "--dry-sequence-breaker"];
    assert!(!text(&[&dry[..], &["none"]].concat()).starts_with(" man"));
    // Where every repetition is broken, none is found.
    let broken = ["a", "--dry-sequence-breaker", "e"];
    assert_eq!(text(&[&dry[..], &broken].concat()), free);
}

#[test]
fn a_stop_text_ends_an_answer_and_is_not_shown() {
    let home = Home::new();
    let common = ["-p", "Once upon a time", "-n", "40", "--temp", "0"];
    let whole = run(&home, &common);
    let whole = whole["text"].as_str().unwrap();
    // Any part of the text, across the borders of tokens, ends it there.
    let chars: Vec<char> = whole.chars().collect();
    for at in [3, 11, 20, 31] {
        let stop: String = chars[at..at + 9].iter().collect();
        let want = &whole[..whole.find(&stop).unwrap()];
        let args = [&common[..], &["--stop", "never said", "--stop", &stop]].concat();
        let doc = run(&home, &args);
        assert_eq!(
            (&doc["text"], &doc["finish"]),
            (&json!(want), &json!("stop"))
        );
        let out = home.octet(&[&["run", "--raw"], &args[..]].concat());
        assert_eq!(out.text(), format!("{want}\n"));
    }
    let doc = run(&home, &[&common[..], &["--stop", "never said"]].concat());
    assert_eq!(
        (&doc["text"], &doc["finish"]),
        (&json!(whole), &json!("length"))
    );
    for bad in ["", "\\d", "\\"] {
        let out = home.octet(&["run", "-p", "x", "--stop", bad]);
        assert_eq!(out.code, Some(2), "{bad}");
    }
}

#[test]
fn ignore_eos_goes_on() {
    let home = Home::new();
    let tokens = |args: &[&str]| {
        // A bias makes the end (2) the likeliest token.
        let common = ["-p", "Once", "-n", "5", "--temp", "0", "-l", "2+100"];
        run(&home, &[&common[..], args].concat())["tokens"]
            .as_array()
            .unwrap()
            .len()
    };
    assert_eq!((tokens(&[]), tokens(&["--ignore-eos"])), (0, 5));
}

#[test]
fn prompts_come_from_several_files_and_an_option() {
    let home = Home::new();
    let (one, two) = (home.write("1.txt", "One"), home.write("2.txt", "Two\n"));
    let prompt = |args: &[&str]| {
        let all = [&["run", "--raw", "--show-prompt", "--json"], args].concat();
        home.octet(&all).json()["prompt_tokens"].clone()
    };
    let want = prompt(&["-p", "One\nTwo\nWhat are these?"]);
    assert_eq!(
        prompt(&["-f", &one, "-f", &two, "-p", "What are these?"]),
        want
    );
    assert_eq!(prompt(&["-f", &one]), prompt(&["-p", "One"]));
    assert_ne!(
        prompt(&["-f", &two, "-f", &one]),
        prompt(&["-f", &one, "-f", &two])
    );
}

#[test]
fn show_prompt_explains_every_token() {
    let home = Home::new();
    let out = home.octet(&["run", "--show-prompt", "-p", "Hi\n"]);
    let lines: Vec<Vec<&str>> = out
        .text()
        .lines()
        .map(|l| l.split_whitespace().collect())
        .collect();
    let doc = home
        .octet(&["run", "--show-prompt", "--json", "-p", "Hi\n"])
        .json();
    let answered = home
        .octet(&["run", "--json", "-p", "Hi\n", "-n", "1"])
        .json();
    assert_eq!(doc["prompt_tokens"], answered["prompt_tokens"]);
    let pieces = doc["pieces"].as_array().unwrap();
    assert_eq!(lines.len(), pieces.len());
    for (line, (id, piece)) in lines
        .iter()
        .zip(doc["prompt_tokens"].as_array().unwrap().iter().zip(pieces))
    {
        assert_eq!(
            (line[0], line[1]),
            (id.to_string().as_str(), piece.as_str().unwrap())
        );
    }
    assert_eq!(lines[0], ["1", "<s>", "control"]);
    assert!(
        lines.iter().any(|l| l[1..] == ["<0x0A>", "byte"]),
        "{lines:?}"
    );
    let n = lines.len();
    assert_eq!(
        out.stderr,
        format!("octet: {n} tokens of a context of 2048; prompt format Mistral V1\n")
    );
}

#[test]
fn logprobs_are_a_table_to_read() {
    let home = Home::new();
    let args = [
        "run",
        "--raw",
        "-p",
        "Once upon a time",
        "-n",
        "4",
        "--temp",
        "0",
        "--logprobs",
        "2",
    ];
    let out = home.octet(&args);
    let doc = home.octet(&[&args[..], &["--json"]].concat()).json();
    let mut text = String::new();
    for (line, top) in out.text().lines().zip(doc["top"].as_array().unwrap()) {
        let percent = 100.0 * top[0][1].as_f64().unwrap().exp();
        assert!(
            line.trim_start().starts_with(&format!("{percent:.1}%")),
            "{line}"
        );
        // Greedy: the token itself is the first of the likeliest.
        let quoted: Vec<&str> = line.split('"').collect();
        assert_eq!((quoted.len(), quoted[1]), (7, quoted[3]), "{line}");
        text += quoted[1];
    }
    assert_eq!(out.text().lines().count(), 4);
    assert_eq!(text, doc["text"].as_str().unwrap());
}
