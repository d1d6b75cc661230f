//! The commands as their users see them: the real program, its standard output, standard error and
//! exit codes.

use std::fs;
use std::io::{Read, Write};
use std::path::Path;
use std::process::Stdio;

use octet::chat::message::{Message, Role};
use octet::chat::template::Template;
use octet::chat::tokenizer::Tokenizer;
use octet::gguf::{Gguf, Writer};
use octet::moe::{Kv, KvType, Machine, Model, Run, Scratch, Want};
use octet::quant::Format;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

#[cfg(unix)]
use crate::program::signal;
use crate::program::{DEMO, Home, closing, finish, wait};
use crate::small_model::{File, Layout, Small, encode};
use crate::{data, ids, reference};

fn bf16() -> String {
    data("demo-BF16.gguf").to_str().unwrap().to_string()
}

// ---------------------------------------------------------------------------------------------
// run

#[test]
fn run_gives_the_reference_tokens_and_every_documented_key() {
    let home = Home::new();
    let prompts = reference();
    assert_eq!(prompts.len(), 10);
    for prompt in prompts {
        let text = prompt["text"].as_str().unwrap();
        let out = home.octet(&[
            "run",
            "--raw",
            "-p",
            text,
            "--temp",
            "0",
            "--json",
            "-m",
            &bf16(),
            "--kv",
            "f32",
            "-n",
            "48",
            "--logprobs",
            "5",
        ]);
        let doc = out.json();
        assert_eq!(doc["prompt_tokens"], prompt["ids"], "{text}");
        assert_eq!(doc["tokens"], prompt["greedy"], "{text}");
        // A continuation keeps the space that a text of its own has not.
        let said = doc["text"].as_str().unwrap();
        assert_eq!(
            said.strip_prefix(' ').unwrap_or(said),
            prompt["greedy_text"].as_str().unwrap()
        );
        assert_eq!(doc["finish"], "length");
        assert!(doc["prompt_tok_s"].as_f64().unwrap() > 0.0);
        assert!(doc["tok_s"].as_f64().unwrap() > 0.0);
        let keys: Vec<&str> = doc
            .as_object()
            .unwrap()
            .keys()
            .map(String::as_str)
            .collect();
        assert_eq!(
            keys,
            [
                "prompt_tokens",
                "tokens",
                "text",
                "finish",
                "prompt_tok_s",
                "tok_s",
                "logits_hash",
                "top"
            ]
        );

        let line = closing(&out.stderr);
        assert_eq!(
            line.prompt_tokens as usize,
            ids(&doc["prompt_tokens"]).len()
        );
        assert_eq!(line.answer_tokens, 48);
        assert_eq!(doc["logits_hash"], line.hash.as_str());

        // The likeliest tokens at each step: K of them, in order, and the greedy choice first.
        let top: Vec<Vec<(u32, f64)>> = serde_json::from_value(doc["top"].clone()).unwrap();
        assert_eq!(top.len(), 48);
        for (list, id) in top.iter().zip(ids(&doc["tokens"])) {
            assert_eq!((list.len(), list[0].0), (5, id));
            assert!(list.windows(2).all(|w| w[0].1 >= w[1].1) && list[0].1 <= 0.0);
            assert!(list.iter().map(|(_, p)| p.exp()).sum::<f64>() <= 1.0 + 1e-6);
        }
        // Differences of log probabilities are differences of logits, which the reference has.
        let want: Vec<(u32, f64)> = serde_json::from_value(prompt["last_top10"].clone()).unwrap();
        for (got, want) in top[0].windows(2).zip(want.windows(2)) {
            assert_eq!(got[1].0, want[1].0);
            let (got, want) = (got[0].1 - got[1].1, want[0].1 - want[1].1);
            assert!((got - want).abs() < 0.02, "{got} for {want} after {text:?}");
        }
    }
}

#[test]
fn run_gives_one_answer_on_every_tier_thread_count_and_batch() {
    let home = Home::new();
    for model in [DEMO, &bf16()] {
        let hash = |args: &[&str]| {
            let all = [
                &[
                    "run",
                    "--json",
                    "-p",
                    "Tell me a story about a fox.",
                    "--temp",
                    "0",
                    "-n",
                    "12",
                    "-m",
                    model,
                ][..],
                args,
            ]
            .concat();
            let out = home.octet(&all);
            let doc = out.json();
            let line = closing(&out.stderr);
            assert_eq!(doc["logits_hash"], line.hash.as_str());
            (doc["logits_hash"].clone(), doc["tokens"].clone(), line)
        };
        let (want, tokens, line) = hash(&[]);
        assert_eq!(line.tier, octet::simd::best(None).name());
        for tier in octet::simd::available() {
            let (hash, same, line) = hash(&["--isa", tier.name()]);
            assert_eq!((&hash, &same), (&want, &tokens), "{tier:?}");
            assert_eq!(line.tier, tier.name());
        }
        for n in ["1", "2", "3"] {
            let (hash, _, line) = hash(&["-t", n]);
            assert_eq!(hash, want, "{n} threads");
            assert_eq!(line.threads.to_string(), n);
        }
        for n in ["1", "7", "512"] {
            assert_eq!(hash(&["--ubatch", n]).0, want, "ubatch {n}");
        }
        // The hash covers the logits: another cache type or prompt has another.
        let [f32, q8_0] = ["f32", "q8_0"].map(|kv| hash(&["--kv", kv]).0);
        assert!(f32 != want && q8_0 != want && f32 != q8_0);
        assert_ne!(hash(&["-s", "Be brief."]).0, want);
    }
}

#[test]
fn the_prompt_comes_from_an_option_a_file_or_standard_input() {
    let home = Home::new();
    let prompt = "Tell me a story\nabout a Märchenkönig.\n";
    let file = home.write("prompt.txt", prompt);
    let common = ["--temp", "0", "-n", "10"];
    let run = |args: &[&str], input: &str| {
        let out = home.octet_with(&[&["run"], args, &common].concat(), input);
        (out.text().to_string(), closing(&out.stderr).hash)
    };
    let (text, hash) = run(&["-p", prompt], "");
    assert!(!text.is_empty());
    for (args, input) in [
        (&["-f", &file][..], "something else"),
        (&["--file", &file], ""),
        (&["-f", "-"], prompt),
        (&[], prompt),
        (&["--prompt", prompt], "something else"),
    ] {
        assert_eq!(run(args, input), (text.clone(), hash.clone()), "{args:?}");
    }
    let doc = home
        .octet(&["run", "--json", "-p", prompt, "--temp", "0", "-n", "10"])
        .json();
    assert_eq!(doc["text"], text.trim_end_matches('\n'));
    assert_eq!(doc["logits_hash"], hash.as_str());
    assert!(doc.get("top").is_none(), "only with --logprobs");
    // A prompt may look like an option.
    assert_eq!(
        home.octet(&["run", "-p", "--help", "-n", "1"]).code,
        Some(0)
    );
    // Raw and chat prompts of the same text differ.
    assert_ne!(run(&["--raw", "-p", prompt], "").1, hash);
}

#[test]
fn the_system_text_is_in_the_prompt() {
    let home = Home::new();
    let doc = home
        .octet(&[
            "run",
            "--json",
            "-s",
            "Talk like a king.",
            "-p",
            "Who is there?",
            "-n",
            "1",
        ])
        .json();
    let line = json!({"messages": [
        {"role": "system", "content": "Talk like a king."},
        {"role": "user", "content": "Who is there?"},
    ]});
    let out = home.octet_with(&["tokenize", "--chat", "--json"], line.to_string());
    assert_eq!(out.json_lines()[0]["ids"], doc["prompt_tokens"]);
    let tokenizer = Tokenizer::from_gguf(&Gguf::open(Path::new(DEMO)).unwrap()).unwrap();
    let template = Template::choose(&tokenizer, tokenizer.chat_template()).unwrap();
    let messages = [
        Message::new(Role::System, "Talk like a king."),
        Message::new(Role::User, "Who is there?"),
    ];
    let want = template.encode(&tokenizer, &messages, None).unwrap();
    assert_eq!(ids(&doc["prompt_tokens"]), want);
}

#[test]
fn a_temperature_of_0_or_less_takes_the_likeliest() {
    let home = Home::new();
    let text = |temp: &str| {
        let out = home.octet(&["run", "-p", "A story", "-n", "12", "--temp", temp]);
        out.text().to_string()
    };
    assert_eq!(text("-1"), text("0"));
    assert_eq!(text("0"), text("0"));
}

#[test]
fn the_same_seed_gives_the_same_text() {
    let home = Home::new();
    let text = |seed: &str| {
        let out = home.octet(&[
            "run", "-p", "A story", "--temp", "1.5", "--top-k", "0", "-n", "16", "--seed", seed,
        ]);
        out.text().to_string()
    };
    assert_eq!(text("7"), text("7"));
    assert_ne!(text("7"), text("8"));
    assert_ne!(text("-1"), text("-1"));
}

#[test]
fn an_answer_ends_by_length_or_by_the_model() {
    let home = Home::new();
    let run = |args: &[&str]| {
        home.octet(
            &[
                &[
                    "run",
                    "--json",
                    "--logprobs",
                    "2",
                    "-p",
                    "Hello",
                    "--temp",
                    "0",
                ],
                args,
            ]
            .concat(),
        )
    };
    let none = run(&["-n", "0"]);
    let doc = none.json();
    assert_eq!(
        (&doc["tokens"], &doc["text"], &doc["top"]),
        (&json!([]), &json!(""), &json!([]))
    );
    assert_eq!(
        (&doc["finish"], doc["tok_s"].as_f64()),
        (&json!("length"), Some(0.0))
    );
    assert_eq!(closing(&none.stderr).answer_tokens, 0);

    // The likeliest token is the end.
    let doc = run(&["-l", "2+1000"]).json();
    assert_eq!(
        (&doc["finish"], &doc["tokens"], &doc["text"]),
        (&json!("stop"), &json!([]), &json!(""))
    );
    // Never: it goes on until the context is full, which is a length, and says so.
    let out = run(&["-l", "2-1000", "-c", "40"]);
    let doc = out.json();
    assert_eq!(doc["finish"], "length");
    let n = ids(&doc["prompt_tokens"]).len() + ids(&doc["tokens"]).len();
    // The last token need not be read.
    assert_eq!(n, 41);
    assert!(
        out.stderr.contains("the context of 40 tokens is full"),
        "{}",
        out.stderr
    );
    let all = run(&["-l", "2-1000", "-c", "40", "-n", "-1"]);
    assert_eq!(all.json()["tokens"], doc["tokens"]);
    for n in [1usize, 2, 5] {
        let doc = run(&["-l", "2-1000", "-n", &n.to_string()]).json();
        assert_eq!(
            (ids(&doc["tokens"]).len(), &doc["finish"]),
            (n, &json!("length"))
        );
    }
}

#[test]
fn a_bias_and_the_penalties_reach_the_sampler() {
    let home = Home::new();
    let tokens = |args: &[&str]| {
        let all = [
            &[
                "run", "--raw", "--json", "-p", "Once", "--temp", "0", "-n", "24",
            ],
            args,
        ]
        .concat();
        ids(&home.octet(&all).json()["tokens"])
    };
    assert_eq!(tokens(&["-l", "300+1000"]), [300; 24]);
    assert_eq!(
        tokens(&["--logit-bias", "300+1000", "-l", "300-2000"]),
        tokens(&[])
    );
    // Negative penalties are settings, too, and -1 tokens are all there are.
    let prompt = home.octet_with(&["tokenize", "--bos", "--json"], "\"Once\"");
    let prompt = ids(&prompt.json_lines()[0]["ids"]);
    let repeated = tokens(&["--presence-penalty", "-1000"]);
    assert!(
        repeated.iter().all(|id| prompt.contains(id)),
        "{repeated:?}"
    );
    let all = ["--repeat-last-n", "-1", "--frequency-penalty", "5"];
    let most = ["--repeat-last-n", "2048", "--frequency-penalty", "5"];
    assert_eq!(tokens(&all), tokens(&most));
    assert_ne!(
        tokens(&all),
        tokens(&["--repeat-last-n", "0", "--frequency-penalty", "5"])
    );
    let mut unique = tokens(&["--frequency-penalty", "1000"]);
    unique.sort();
    unique.dedup();
    assert_eq!(unique.len(), 24);
}

#[test]
fn the_environment_names_a_model_and_a_tier() {
    let tiers: Vec<_> = octet::simd::TIERS.iter().map(|row| row.name).collect();
    let home = Home::new();
    let once = "run --json --raw -p Once -n 1 --temp 0";
    let once: Vec<&str> = once.split(' ').collect();
    let mut command = home.command(&once);
    command
        .env("OCTET_MODEL", bf16())
        .env("OCTET_ISA", "scalar");
    let out = finish(command, "");
    assert_eq!(closing(&out.stderr).tier, "scalar");
    let named = home.octet(&[&once[..], &["-m", &bf16()]].concat());
    assert_eq!(out.json()["logits_hash"], named.json()["logits_hash"]);
    let demo = home.octet(&once);
    assert_ne!(out.json()["logits_hash"], demo.json()["logits_hash"]);

    // Empty is not set; an option goes before; a command that needs neither does not look.
    let with = |model: &str, isa: &str, args: &[&str]| {
        let mut command = home.command(args);
        command.env("OCTET_MODEL", model).env("OCTET_ISA", isa);
        finish(command, "x")
    };
    let args = ["run", "-n", "1"];
    let best = octet::simd::best(None).name();
    assert_eq!(closing(&with("", "", &args).stderr).tier, best);
    let named = [&args[..], &["-m", DEMO, "--isa", "scalar"]].concat();
    assert_eq!(
        closing(&with("nowhere", "mmx", &named).stderr).tier,
        "scalar"
    );
    assert_eq!(
        with("", "mmx", &args).error(2),
        format!("octet: OCTET_ISA=mmx: expected one of {}", tiers.join(", "))
    );
    for command in [&args[..], &["tokenize"], &["detokenize"], &[]] {
        assert!(
            with("nowhere", "", command)
                .error(1)
                .starts_with("octet: nowhere: cannot open")
        );
    }
    assert_eq!(with("nowhere", "mmx", &["inspect", DEMO]).code, Some(0));
}

#[test]
fn verbose_tells_more_on_standard_error_only() {
    let home = Home::new();
    let args = ["run", "-p", "Hello", "-n", "6", "--temp", "1.5"];
    let quiet = home.octet(&args);
    assert_eq!(quiet.stderr.lines().count(), 1, "{}", quiet.stderr);
    let out = home.octet(&[&args[..], &["-v"]].concat());
    for words in [
        "demo-Q4_K_M.gguf: ",
        "9.22 MiB",
        "Mistral V1",
        "context 2048",
        "KV cache f16",
    ] {
        assert!(out.stderr.contains(words), "{words}: {}", out.stderr);
    }
    // The seed that it tells repeats the run.
    let seed = out
        .stderr
        .lines()
        .find_map(|l| l.strip_prefix("octet: seed "))
        .unwrap();
    let again = home.octet(&[&args[..], &["--seed", seed]].concat());
    assert_eq!(again.text(), out.text());
    assert_eq!(closing(&again.stderr).hash, closing(&out.stderr).hash);
}

#[test]
fn the_bandwidth_is_measured_once() {
    let home = Home::new();
    let file = home.path("cache/octet/bandwidth-2");
    fs::remove_file(&file).unwrap();
    let run = || {
        let out = home.octet(&["run", "-p", "x", "-n", "2", "-t", "2"]);
        closing(&out.stderr);
        fs::read_to_string(&file).unwrap()
    };
    let measured = run();
    assert!(measured.trim().parse::<f64>().unwrap() > 1e6, "{measured}");
    // What is remembered is used, unless more than that was reached: which the demo model may do on a busy machine.
    fs::write(&file, "1e15\n").unwrap();
    assert_eq!(run(), "1e15\n");
    // What is no number is measured again.
    fs::write(&file, "NaN\n").unwrap();
    assert!(run().trim().parse::<f64>().unwrap() > 1e6);
}

// ---------------------------------------------------------------------------------------------
// chat without a terminal

#[test]
fn chat_answers_standard_input_line_by_line() {
    let home = Home::new();
    let answer = |args: &[&str]| {
        let all = [&["run", "--temp", "0", "-n", "8"], args].concat();
        home.octet(&all).text().to_string()
    };
    let chat = |args: &[&str], input: &str| {
        let out = home.octet_with(&[args, &["--temp", "0", "-n", "8"]].concat(), input);
        (out.text().to_string(), out.stderr)
    };
    let hello = answer(&["-p", "Hello"]);
    let (text, err) = chat(&["chat"], "Hello\n");
    assert_eq!(text, hello);
    assert_eq!(closing(&err).answer_tokens, 8);
    // No newline at the end, Windows line ends, empty lines, and after /clear the same again.
    assert_eq!(chat(&["chat"], "Hello").0, hello);
    assert_eq!(chat(&["chat"], "\r\n\n   \nHello\r\n").0, hello);
    assert_eq!(chat(&["chat"], "Hello\n/clear\nHello\n").0, hello.repeat(2));
    // Without /clear, the second answer knows the first turn.
    let (text, err) = chat(&["chat"], "Hello\nAnd then?\n");
    let line = json!({"messages": [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": hello.trim_end_matches('\n')},
        {"role": "user", "content": "And then?"},
    ]});
    let prompt = home.octet_with(&["tokenize", "--chat", "--json"], line.to_string());
    let first = closing(&chat(&["chat"], "Hello\n").1).prompt_tokens;
    let whole = ids(&prompt.json_lines()[0]["ids"]).len() as u64;
    // What the cache holds is not read again: the first prompt and its answer but for the last token.
    let second = closing(&err).prompt_tokens - first;
    assert!(
        second < whole - first && text.starts_with(&hello),
        "{second} of {whole}"
    );
    // `octet` is `octet chat`.
    assert_eq!(chat(&[], "Hello\n").0, hello);
    assert_eq!(
        home.octet_with(&[], "/help\n").text(),
        home.octet_with(&["chat"], "/help\n").text()
    );

    let king = answer(&["-p", "Hello", "-s", "You are a king."]);
    assert_ne!(king, hello);
    assert_eq!(chat(&["chat", "-s", "You are a king."], "Hello\n").0, king);
    assert_eq!(
        chat(
            &["chat"],
            "/system You are a king.\nHello\n/clear\n/system\n/system none\nHello\n"
        )
        .0,
        king + "You are a king.\n" + &hello
    );
}

#[test]
fn chat_ends_cleanly() {
    let home = Home::new();
    for input in [
        "",
        "\n",
        "\n\n  \n",
        "/exit\n",
        "/exit\nHello\n",
        "/bye\nHello\n",
        "/quit\nHello\n",
        "/q\nHello\n",
    ] {
        let out = home.octet_with(&["chat"], input);
        assert_eq!((out.text(), out.stderr.as_str()), ("", ""), "{input:?}");
    }
    let out = home.octet_with(&[], "");
    assert_eq!((out.text(), out.stderr.as_str()), ("", ""));
    let out = home.octet_with(&["chat", "-n", "2"], "/nope\n/help me\n/helpme\nHello\n");
    assert!(
        out.stderr
            .contains("octet: /nope: no such command; /help lists them\n")
    );
    assert!(out.stderr.contains("/helpme: no such command"));
    let failed = "octet: <stdin>: 2 of 4 lines failed; it is said above why\n";
    assert!(out.code == Some(1) && out.stderr.ends_with(failed));
    let said = String::from_utf8(out.stdout).unwrap();
    for command in ["/help", "/clear", "/system", "/exit"] {
        assert!(said.lines().any(|l| l.starts_with(command)), "{command}");
    }
    // What is no command is said to the model.
    let out = home.octet_with(&["chat", "-n", "2", "--temp", "0"], "//comment\n /help\n");
    assert_eq!(closing(&out.stderr).answer_tokens, 4);
}

#[test]
fn a_line_that_cannot_be_answered_does_not_end_a_chat() {
    let home = Home::new();
    let long = "word ".repeat(200);
    let input = format!("{long}\nHello\n{long}\n");
    let out = home.octet_with(&["chat", "--temp", "0", "-n", "4", "-c", "64"], input);
    let hello = home.octet(&["run", "-p", "Hello", "--temp", "0", "-n", "4"]);
    let said = String::from_utf8(out.stdout).unwrap();
    assert_eq!(said, hello.text());
    let full = "octet: the context is full (expected at most 64 tokens, found ";
    assert_eq!(out.stderr.matches(full).count(), 2, "{}", out.stderr);
    // Whoever does not read that looks at the exit code.
    let failed = "octet: <stdin>: 2 of 3 lines failed; it is said above why\n";
    let before = out.stderr.strip_suffix(failed).unwrap();
    assert_eq!((out.code, closing(before).answer_tokens), (Some(1), 4));
}

#[test]
fn an_empty_answer_does_not_break_the_conversation() {
    let home = Home::new();
    // The model ends every answer at once.
    let out = home.octet_with(
        &["chat", "--temp", "0", "-l", "2+1000"],
        "Hello\nAgain\nAnd again\n",
    );
    assert_eq!(out.text(), "\n\n\n");
    assert_eq!(out.stderr.lines().count(), 1, "{}", out.stderr);
}

#[test]
fn a_line_that_is_no_text_is_an_error() {
    let home = Home::new();
    // The others are answered.
    let out = home.octet_with(&["chat", "-n", "1"], b"Hello \xff\nHello\n");
    assert_eq!(out.code, Some(1));
    assert!(out.stderr.starts_with(
        "octet: <stdin>: the text is wrong (expected valid UTF-8, found byte 0xff at offset 6)\n"
    ));
    assert!(out.stderr.contains("answer 1 token;"), "{}", out.stderr);
    let failed = "octet: <stdin>: 1 of 2 lines failed; it is said above why\n";
    assert!(out.stderr.ends_with(failed), "{}", out.stderr);
}

// ---------------------------------------------------------------------------------------------
// Signals and broken pipes

/// An answer that goes on for as long as the context does.
const ENDLESS: [&str; 8] = [
    "run",
    "-p",
    "Hello",
    "--temp",
    "0",
    "-l",
    "2-1000",
    "--ubatch=64",
];

/// An answer in a file is a text of whole lines, and the closing line has a line of its own.
#[test]
fn an_answer_ends_its_last_line_once() {
    let home = Home::new();
    let run = |args: &[&str]| {
        home.octet(&[&["run", "--raw", "--temp", "0", "-p", "Once"], args].concat())
    };
    let text = |args: &[&str]| run(args).text().to_string();
    let said = |args: &[&str]| run(&[args, &["--json"]].concat()).json()["text"].clone();
    let short = ["-n", "5"];
    assert_eq!(
        text(&short),
        format!("{}\n", said(&short).as_str().unwrap())
    );
    assert!(!said(&short).as_str().unwrap().ends_with('\n'));
    // A line break that the model wrote is enough.
    let breaks = ["-n", "3", "--regex", "a\n"];
    assert_eq!(
        (text(&breaks).as_str(), said(&breaks)),
        ("a\n", json!("a\n"))
    );
    // No answer is no line.
    assert_eq!(text(&["-n", "0"]), "");
}

#[cfg(unix)]
#[test]
fn interrupted_a_run_keeps_its_text_and_exits_130() {
    let home = Home::new();
    let beginning = home.octet(&[&ENDLESS[..], &["-n", "8"]].concat());
    let beginning = beginning.text().trim_end_matches('\n');
    let mut child = home
        .command(&ENDLESS)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // The first bytes are there: it is generating.
    let mut stdout = child.stdout.take().unwrap();
    let mut text = vec![0; 4];
    stdout.read_exact(&mut text).unwrap();
    signal(&child, "INT");
    stdout.read_to_end(&mut text).unwrap();
    let status = wait(&mut child);
    let mut stderr = String::new();
    child
        .stderr
        .take()
        .unwrap()
        .read_to_string(&mut stderr)
        .unwrap();
    assert_eq!(status.code(), Some(130), "{stderr}");
    let text = String::from_utf8(text).unwrap();
    let text = text.strip_suffix('\n').expect("a line that ends");
    let n = text.len().min(beginning.len());
    assert_eq!(text[..n], beginning[..n]);
    assert!((1..2000).contains(&closing(&stderr).answer_tokens));
    assert_eq!(stderr.lines().last(), Some("octet: interrupted"));
}

#[cfg(unix)]
#[test]
fn interrupted_while_it_waits_for_a_line_chat_ends() {
    use std::os::unix::process::ExitStatusExt;
    let home = Home::new();
    for (name, code, signal_number) in [("INT", Some(130), None), ("TERM", None, Some(15))] {
        let mut child = home
            .command(&["chat", "-n", "2"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut stdin = child.stdin.take().unwrap();
        let mut stdout = child.stdout.take().unwrap();
        stdin.write_all(b"Hello\n/help\n").unwrap();
        // The answer and the help are done when the help's last words have come.
        let mut text = Vec::new();
        while !text.ends_with(b"and options\n") {
            let mut byte = [0];
            stdout.read_exact(&mut byte).unwrap();
            text.push(byte[0]);
        }
        // Whether it waits for the next line already or not, one signal is enough.
        signal(&child, name);
        let status = wait(&mut child);
        assert_eq!((status.code(), status.signal()), (code, signal_number));
        drop(stdin);
    }
}

#[cfg(unix)]
#[test]
fn a_reader_that_has_seen_enough_is_no_error() {
    let home = Home::new();
    let head = home.write("one-line.txt", "\"x\"\n".repeat(20_000));
    let tokenizer = data("tokenizers/mixtral-8x7b.tokenizer.model");
    for (args, input) in [
        (&ENDLESS[..], None),
        (&["inspect", DEMO, "--tensors", "--hash"], None),
        (
            &["tokenize", "--json", "-m", tokenizer.to_str().unwrap()],
            Some(&head),
        ),
    ] {
        let input = input.map_or_else(Stdio::null, |f| fs::File::open(f).unwrap().into());
        let mut child = home
            .command(args)
            .stdin(input)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut stdout = child.stdout.take().unwrap();
        stdout.read_exact(&mut [0; 3]).unwrap();
        drop(stdout);
        let status = wait(&mut child);
        let mut stderr = String::new();
        child
            .stderr
            .take()
            .unwrap()
            .read_to_string(&mut stderr)
            .unwrap();
        assert_eq!((status.code(), stderr.as_str()), (Some(0), ""), "{args:?}");
    }
}

#[cfg(target_os = "linux")]
#[test]
fn outputs_that_cannot_be_written() {
    let home = Home::new();
    let full = || {
        fs::OpenOptions::new()
            .write(true)
            .open("/dev/full")
            .unwrap()
    };
    let args = ["run", "-p", "Hello", "--temp", "0", "-n", "4"];
    // Standard error is for people: where nobody can read it, the work is done all the same.
    let text = home.octet(&args).text().to_string();
    let out = home
        .command(&args)
        .stdin(Stdio::null())
        .stderr(full())
        .output()
        .unwrap();
    assert_eq!(
        (out.status.code(), String::from_utf8(out.stdout).unwrap()),
        (Some(0), text)
    );
    let out = home
        .command(&["run", "-m", "nowhere"])
        .stdin(Stdio::null())
        .stderr(full())
        .output();
    assert_eq!(out.unwrap().status.code(), Some(1));
    // Standard output is the work.
    for args in [
        &args[..],
        &["inspect", DEMO],
        &["run", "-p", "x", "-n", "1", "--json"],
    ] {
        let out = home
            .command(args)
            .stdin(Stdio::null())
            .stdout(full())
            .output()
            .unwrap();
        let stderr = String::from_utf8(out.stderr).unwrap();
        assert_eq!(out.status.code(), Some(1), "{stderr}");
        assert!(
            stderr.starts_with("octet: <stdout>: cannot write: No space left"),
            "{stderr}"
        );
        assert_eq!(stderr.lines().count(), 1, "{stderr}");
    }
}

// ---------------------------------------------------------------------------------------------
// tokenize, detokenize

fn golden(name: &str) -> Vec<Value> {
    let text = fs::read_to_string(data("golden").join(name)).unwrap();
    text.lines()
        .map(|l| serde_json::from_str(l).unwrap())
        .collect()
}

const TOKENIZERS: [(&str, &str); 2] = [
    ("v1", "tokenizers/mixtral-8x7b.tokenizer.model"),
    ("v3", "tokenizers/mixtral-8x22b-instruct.tokenizer.model"),
];

#[test]
fn tokenize_gives_the_official_ids_line_by_line() {
    let home = Home::new();
    let lines = golden("tokenize.jsonl");
    let input: String = lines.iter().map(|l| format!("{}\n", l["text"])).collect();
    for (version, model) in TOKENIZERS {
        let model = data(model).to_str().unwrap().to_string();
        let out = home.octet_with(&["tokenize", "--json", "-m", &model], &input);
        out.text();
        let got = out.json_lines();
        assert_eq!(got.len(), lines.len());
        for (got, line) in got.iter().zip(&lines) {
            assert_eq!(
                *got,
                json!({ "ids": line[version] }),
                "{version} {}",
                line["text"]
            );
        }
    }
}

#[test]
fn tokenize_chat_gives_the_official_ids_or_says_why_not() {
    let home = Home::new();
    let lines = golden("chat.jsonl");
    for (version, model) in TOKENIZERS {
        let asked: Vec<&Value> = lines.iter().filter(|l| !l[version].is_null()).collect();
        let input: String = asked
            .iter()
            .map(|l| {
                format!(
                    "{}\n",
                    json!({"messages": l["messages"], "tools": l["tools"]})
                )
            })
            .collect();
        let model = data(model).to_str().unwrap().to_string();
        let out = home.octet_with(&["tokenize", "--chat", "--json", "-m", &model], input);
        // Conversations that the format refuses are answers: the exit code stays 0.
        out.text();
        let got = out.json_lines();
        assert_eq!(got.len(), asked.len());
        for (got, line) in got.iter().zip(asked) {
            match line[version].get("error") {
                Some(_) => assert!(got["error"].is_string(), "{version} {}", line["name"]),
                None => assert_eq!(
                    *got,
                    json!({ "ids": line[version]["tokens"] }),
                    "{version} {}",
                    line["name"]
                ),
            }
        }
    }
}

#[test]
fn tokenize_reads_every_kind_of_model() {
    let home = Home::new();
    let text = "Once upon a time there was a Märchenkönig. 你好 🦊\n\tEnd";
    let tokenizer = Tokenizer::from_gguf(&Gguf::open(Path::new(DEMO)).unwrap()).unwrap();
    let plain: Vec<String> = tokenizer.encode(text).iter().map(u32::to_string).collect();
    let plain = plain.join(" ");
    fs::create_dir(home.path("folder")).unwrap();
    for (from, to) in [
        ("demo.tokenizer.model", "tokenizer.model"),
        ("demo.tokenizer_config.json", "tokenizer_config.json"),
    ] {
        fs::copy(data("tokenizers").join(from), home.path("folder").join(to)).unwrap();
    }
    let folder = home.path("folder").to_str().unwrap().to_string();
    let file = data("tokenizers/demo.tokenizer.model")
        .to_str()
        .unwrap()
        .to_string();
    for model in [
        &[][..],
        &["-m", DEMO],
        &["-m", &file],
        &["-m", &folder],
        &["--model", &bf16()],
    ] {
        let run = |args: &[&str], input: &str| {
            home.octet_with(&[&["tokenize"], args, model].concat(), input)
                .text()
                .to_string()
        };
        assert_eq!(run(&[], text), format!("{plain}\n"), "{model:?}");
        assert_eq!(run(&["--bos"], text), format!("1 {plain}\n"), "{model:?}");
        assert_eq!(run(&[], ""), "\n");
        assert_eq!(run(&["--bos"], ""), "1\n");
        let list: Vec<u32> = plain.split(' ').map(|id| id.parse().unwrap()).collect();
        let line = format!("{}\n\n  \n{}", json!(text), json!(""));
        assert_eq!(
            run(&["--json"], &line),
            format!("{}\n{{\"ids\":[]}}\n", json!({ "ids": list }))
        );
        let chat = run(&["--chat"], "Hello");
        let json = run(
            &["--chat", "--json"],
            r#"{"messages":[{"role":"user","content":"Hello"}],"tools":null}"#,
        );
        let json: Value = serde_json::from_str(&json).unwrap();
        let words: Vec<u32> = chat
            .split_whitespace()
            .map(|w| w.parse().unwrap())
            .collect();
        assert_eq!(words[0], 1);
        assert_eq!(words, ids(&json["ids"]));
    }
}

#[test]
fn detokenize_is_the_way_back() {
    let home = Home::new();
    for text in [
        "Hello there",
        "  two  spaces ",
        "Märchen\n\n你好\t🦊\r\n",
        "<s> [INST] 1 2 3",
        "\u{0}\u{7f}",
    ] {
        let ids = home.octet_with(&["tokenize"], text);
        assert_eq!(home.octet_with(&["detokenize"], ids.text()).text(), text);
        let json = home.octet_with(&["tokenize", "--json"], json!(text).to_string());
        let list = json.json_lines()[0]["ids"].to_string();
        assert_eq!(home.octet_with(&["detokenize"], list).text(), text);
    }
    assert_eq!(home.octet_with(&["detokenize"], "1 2\n").text(), "");
    assert_eq!(
        home.octet_with(&["detokenize", "--special"], "1 2").text(),
        "<s></s>"
    );
    assert_eq!(home.octet_with(&["detokenize"], "").text(), "");
    // Bytes that are no text by themselves come out as they are.
    let ids = home.octet_with(&["tokenize"], "🦊");
    let ids: Vec<&str> = ids.text().split_whitespace().collect();
    let half = home.octet_with(&["detokenize"], ids[..ids.len() - 1].join(" "));
    assert!(
        "🦊".as_bytes().starts_with(&half.stdout) && std::str::from_utf8(&half.stdout).is_err()
    );
}

#[test]
fn tokenize_names_what_it_cannot_read() {
    let home = Home::new();
    for bad in ["4096", "99999999999999999999", "-1", "1.5", "x", "1 2 {3}"] {
        let out = home.octet_with(&["detokenize"], bad);
        let word = bad.rsplit(' ').next().unwrap();
        let want = format!(
            "octet: <stdin>: an id is wrong (expected token ids from 0 to 4095, found {word:?})"
        );
        assert_eq!(out.error(1), want);
    }
    for command in ["tokenize", "detokenize"] {
        let out = home.octet_with(&[command], b"1 2 \xc3(");
        assert!(
            out.error(1)
                .contains("valid UTF-8, found byte 0xc3 at offset 4")
        );
    }
    // A bad line has an answer of its own; the others are answered, and the exit code tells.
    let out = home.octet_with(&["tokenize", "--json"], "\"a\"\n{\n3\n\"b\"\n");
    assert_eq!(out.code, Some(1));
    let lines = out.json_lines();
    assert_eq!(lines.len(), 4);
    for (i, word) in [(1, "line 2"), (2, "line 3")] {
        assert!(
            lines[i]["error"].as_str().unwrap().contains(word),
            "{}",
            lines[i]
        );
    }
    assert!(lines[0]["ids"].is_array() && lines[3]["ids"].is_array());
    assert_eq!(out.stderr.lines().count(), 1, "{}", out.stderr);

    for (line, word) in [
        ("[]", "messages"),
        ("\"x\"", "messages"),
        (r#"{"messages":[],"tools":3}"#, "tools"),
        ("{\"messages\":", "JSON"),
    ] {
        let out = home.octet_with(&["tokenize", "--chat", "--json"], line);
        assert_eq!(out.code, Some(1), "{line}");
        assert!(
            out.json_lines()[0]["error"]
                .as_str()
                .unwrap()
                .contains(word),
            "{line}"
        );
    }
    for line in [
        r#"{"messages":[]}"#,
        r#"{"messages":3}"#,
        r#"{"messages":[{"role":"king","content":"x"}]}"#,
    ] {
        let out = home.octet_with(&["tokenize", "--chat", "--json"], line);
        assert_eq!(out.code, Some(0), "{line}: {}", out.stderr);
        assert!(out.json_lines()[0]["error"].is_string());
    }
    let empty = home.path("empty");
    fs::create_dir(&empty).unwrap();
    let config = data("tokenizers/demo.tokenizer_config.json");
    for (model, word) in [
        (empty.to_str().unwrap(), "tokenizer.model"),
        ("nowhere", "No such file"),
        (config.to_str().unwrap(), "tokenizer_config.json"),
        (data("valid.txt").to_str().unwrap(), "valid.txt"),
    ] {
        let out = home.octet(&["tokenize", "-m", model]);
        let error = out.error(1);
        assert!(error.contains(model) && error.contains(word), "{error}");
    }
}

// ---------------------------------------------------------------------------------------------
// inspect

fn recipes() -> Value {
    serde_json::from_slice(&fs::read(data("quant_hashes.json")).unwrap()).unwrap()
}

fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes)
        .iter()
        .map(|b| format!("{b:02x}"))
        .collect()
}

#[test]
fn inspect_hashes_are_the_reference_quantizers() {
    let home = Home::new();
    let recipes = recipes();
    for (recipe, file) in [("Q4_K_M", DEMO.to_string()), ("BF16", bf16())] {
        let doc = home.octet(&["inspect", "--hash", "--json", &file]).json();
        let want = recipes[recipe]["tensors"].as_object().unwrap();
        let tensors = doc["tensors"].as_array().unwrap();
        assert_eq!(tensors.len(), want.len());
        let bytes = fs::read(&file).unwrap();
        for t in tensors {
            let keys: Vec<&str> = t.as_object().unwrap().keys().map(String::as_str).collect();
            assert_eq!(keys, ["name", "type", "shape", "offset", "bytes", "sha256"]);
            let name = t["name"].as_str().unwrap();
            assert_eq!(
                json!([t["type"], t["sha256"]]),
                want[name],
                "{recipe} {name}"
            );
            // The offset counts from the start of the file.
            let at = t["offset"].as_u64().unwrap() as usize;
            let data = &bytes[at..][..t["bytes"].as_u64().unwrap() as usize];
            assert_eq!(t["sha256"], sha256(data).as_str(), "{name}");
        }
        let embed = tensors
            .iter()
            .find(|t| t["name"] == "token_embd.weight")
            .unwrap();
        assert_eq!(embed["shape"], json!([256, 4096]));
        let meta = &doc["metadata"];
        assert_eq!(meta["general.architecture"], "llama");
        assert_eq!(meta["llama.expert_count"], 8);
        assert_eq!(meta["llama.rope.freq_base"], 1e6);
        assert_eq!(meta["tokenizer.ggml.add_bos_token"], true);
        assert_eq!(
            meta["tokenizer.ggml.tokens"].as_array().unwrap().len(),
            4096
        );
        assert_eq!(
            bytes.len() as u64,
            recipes[recipe]["file_bytes"].as_u64().unwrap()
        );
        // Without --hash there are none, and nothing else changes.
        let mut plain = home.octet(&["inspect", "--json", &file]).json();
        for (t, with) in plain["tensors"]
            .as_array_mut()
            .unwrap()
            .iter_mut()
            .zip(tensors)
        {
            assert!(t.get("sha256").is_none());
            t["sha256"] = with["sha256"].clone();
        }
        assert_eq!(plain, doc);
    }
}

#[test]
fn inspect_is_readable() {
    let home = Home::new();
    let out = home.octet(&["inspect", DEMO]);
    let text = out.text();
    for words in [
        "GGUF version 3, 43 tensors, 9.22 MiB",
        "  general.architecture = \"llama\"\n",
        "  llama.expert_count = 8\n",
        "  experts         12 tensors     7.27 MiB    4.84 bits/weight\n",
        "  router           4 tensors",
    ] {
        assert!(text.contains(words), "{words}: {text}");
    }
    assert!(!text.contains("attn_q"));
    assert!(
        text.lines().all(|l| l.chars().count() < 250),
        "a line for a screen"
    );
    let tensors = home.octet(&["inspect", DEMO, "--tensors"]);
    let line = tensors
        .text()
        .lines()
        .find(|l| l.contains("blk.0.ffn_gate_exps.weight"))
        .unwrap();
    let words: Vec<&str> = line.split_whitespace().collect();
    assert_eq!(words[1..7], ["Q4_K", "256", "x", "512", "x", "8"]);
    assert!(!tensors.text().contains("3a9d002aa2f5"));
    let hash = home.octet(&["inspect", DEMO, "--hash"]);
    assert!(
        hash.text()
            .contains("  3a9d002aa2f523e9d9e271f2b1e5129b86bcaea202297f1b3d3455732c99f6c5\n")
    );
    // A file may hold anything: nothing of it reaches the terminal as a command.
    let mut file = Small::default().file();
    file.set("general.name", "\u{1b}]0;title\u{7}\nnext")
        .set("a\u{1b}[2Jb", 1u32);
    let path = home.write("escape.gguf", file.part(0, 1));
    let out = home.octet(&["inspect", &path, "--tensors"]);
    assert!(!out.text().contains('\u{1b}') && !out.text().contains('\u{7}'));
    // Both layouts of experts are counted as experts.
    let file = Small {
        layout: Layout::Single,
        ..Small::default()
    }
    .file();
    let path = home.write("single.gguf", file.part(0, 1));
    assert!(
        home.octet(&["inspect", &path])
            .text()
            .contains("  experts         24 tensors")
    );
}

#[test]
fn inspect_reads_a_split_model_by_any_part() {
    let home = Home::new();
    let file = Small::default().file();
    let names: Vec<String> = (1..=3)
        .map(|n| format!("m-0000{n}-of-00003.gguf"))
        .collect();
    for (no, name) in names.iter().enumerate() {
        home.write(name, file.part(no, 3));
    }
    for name in &names {
        let path = home.path(name).to_str().unwrap().to_string();
        let doc = home.octet(&["inspect", "--json", "--hash", &path]).json();
        let tensors = doc["tensors"].as_array().unwrap();
        assert_eq!(tensors.len(), file.tensors.len());
        for (t, want) in tensors.iter().zip(&file.tensors) {
            assert_eq!(t["name"], want.name.as_str());
            assert_eq!(t["sha256"], sha256(&want.bytes).as_str());
            let shard = fs::read(home.path(&names[t["shard"].as_u64().unwrap() as usize])).unwrap();
            let at = t["offset"].as_u64().unwrap() as usize;
            assert_eq!(shard[at..][..want.bytes.len()], want.bytes);
        }
        assert_eq!(doc["metadata"]["llama.block_count"], 2);
        assert!(
            home.octet(&["inspect", &path])
                .text()
                .contains(&format!("{} tensors", file.tensors.len()))
        );
    }
    // A split model runs, too.
    let path = home.path(&names[1]).to_str().unwrap().to_string();
    assert_eq!(
        home.octet(&["run", "-p", "x", "-n", "2", "-m", &path]).code,
        Some(0)
    );
    fs::remove_file(home.path(&names[2])).unwrap();
    let out = home.octet(&["inspect", &path]);
    assert!(out.error(1).contains("m-00003-of-00003.gguf"));
}

// ---------------------------------------------------------------------------------------------
// perplexity

/// Perplexity of the whole of valid.txt in chunks of 256, as scored by the reference.
fn perplexity(model: &str, args: &[&str], want: f64, share: f64) {
    let home = Home::new();
    let text = data("valid.txt").to_str().unwrap().to_string();
    let all = [
        &[
            "perplexity",
            "-f",
            &text,
            "-c",
            "256",
            "--json",
            "-m",
            model,
        ],
        args,
    ]
    .concat();
    let out = home.octet(&all);
    let doc = out.json();
    let (ppl, nll) = (doc["ppl"].as_f64().unwrap(), doc["nll"].as_f64().unwrap());
    assert!((ppl / want - 1.0).abs() < share, "{ppl} for {want}");
    assert!((nll.exp() / ppl - 1.0).abs() < 1e-9);
    assert_eq!(doc["tokens"], 186 * 127);
    assert!(
        out.stderr.contains("; scored 23622 tokens; "),
        "{}",
        out.stderr
    );
}

#[test]
#[cfg_attr(
    debug_assertions,
    ignore = "a minute without optimization; cargo test --release runs it"
)]
fn perplexity_of_bf16_is_the_references() {
    perplexity(&bf16(), &["--kv", "f32"], 77.1773, 0.001);
}

#[test]
#[cfg_attr(
    debug_assertions,
    ignore = "a minute without optimization; cargo test --release runs it"
)]
fn a_cache_of_q8_0_hardly_changes_perplexity() {
    perplexity(&bf16(), &["--kv", "q8_0"], 77.1773, 0.002);
}

#[test]
#[cfg_attr(
    debug_assertions,
    ignore = "a minute without optimization; cargo test --release runs it"
)]
fn perplexity_of_q4_k_m_is_the_references() {
    perplexity(DEMO, &[], 77.3870, 0.005);
}

/// Writes the demo model in another recipe with the crate's own encoders.
fn requantize(recipe: &str, path: &Path) {
    let source = Gguf::open(&data("demo-BF16.gguf")).unwrap();
    let types = &recipes()[recipe]["tensors"];
    let format = |name: &str| {
        let want = types[name][0].as_str().unwrap();
        *Format::ALL.iter().find(|f| f.name() == want).unwrap()
    };
    let mut w = Writer::new();
    w.put_all(&source);
    for t in source.tensors() {
        w.tensor(&t.name, format(&t.name) as u32, &t.shape);
    }
    let mut stream = w.start(path, fs::File::create(path).unwrap()).unwrap();
    for t in source.tensors() {
        let mut weights = vec![0.0; t.elements() as usize];
        t.format().unwrap().decode(&source.bytes(t), &mut weights);
        let bytes = encode(format(&t.name), &weights, t.shape[0] as usize);
        assert_eq!(
            types[&t.name][1],
            sha256(&bytes).as_str(),
            "{recipe} {}",
            t.name
        );
        stream.write_tensor(&t.name, &bytes).unwrap();
    }
    stream.finish().unwrap();
}

#[test]
fn a_q8_0_file_made_here_has_the_references_bytes() {
    let home = Home::new();
    let path = home.path("q8_0.gguf");
    requantize("Q8_0", &path);
    let doc = home
        .octet(&["inspect", "--json", "--hash", path.to_str().unwrap()])
        .json();
    let recipes = recipes();
    for t in doc["tensors"].as_array().unwrap() {
        let want = &recipes["Q8_0"]["tensors"][t["name"].as_str().unwrap()];
        assert_eq!(json!([t["type"], t["sha256"]]), *want);
    }
    // Its answers begin as those of the weights it was made from.
    let tokens = |model: &str| {
        let args = [
            "run",
            "--raw",
            "--json",
            "-p",
            "Once upon a time",
            "--temp",
            "0",
            "-n",
            "8",
            "-m",
            model,
        ];
        home.octet(&args).json()["tokens"].clone()
    };
    assert_eq!(tokens(path.to_str().unwrap()), tokens(&bf16()));
}

#[test]
#[cfg_attr(
    debug_assertions,
    ignore = "a minute without optimization; cargo test --release runs it"
)]
fn perplexity_of_q8_0_is_the_references() {
    let home = Home::new();
    let path = home.path("q8_0.gguf");
    requantize("Q8_0", &path);
    perplexity(path.to_str().unwrap(), &[], 77.1857, 0.005);
}

/// The definition, on a text that is short enough for every build.
#[test]
fn perplexity_scores_the_second_half_of_each_chunk() {
    let home = Home::new();
    let text: String = fs::read_to_string(data("valid.txt"))
        .unwrap()
        .chars()
        .take(600)
        .collect();
    let file = home.write("text.txt", &text);
    let out = home.octet(&["perplexity", "-f", &file, "-c", "30", "--json"]);
    let doc = out.json();

    let gguf = Gguf::open(Path::new(DEMO)).unwrap();
    let tokenizer = Tokenizer::from_gguf(&gguf).unwrap();
    let model = Model::open(&gguf, Machine::new(2, None).unwrap()).unwrap();
    let tokens: Vec<u32> = [1].into_iter().chain(tokenizer.encode(&text)).collect();
    let (mut sum, mut n, mut scratch) = (0.0, 0, Scratch::default());
    for chunk in tokens.chunks_exact(30) {
        let input = [&[1], &chunk[1..]].concat();
        let mut kv = Kv::new(&model.config, KvType::F16, 30);
        let run = Run {
            kv: &mut kv,
            tokens: &input,
            want: Want::All,
        };
        let logits = model.forward(&mut [run], &mut scratch).unwrap();
        for p in 15..29 {
            let row = &logits[p * 4096..][..4096];
            let total: f64 = row.iter().map(|l| (*l as f64).exp()).sum();
            sum += total.ln() - row[chunk[p + 1] as usize] as f64;
            n += 1;
        }
    }
    assert!(n >= 56);
    assert_eq!(doc["tokens"], n);
    let nll = doc["nll"].as_f64().unwrap();
    assert!(
        (nll - sum / n as f64).abs() < 1e-9,
        "{nll} {}",
        sum / n as f64
    );
    assert!((doc["ppl"].as_f64().unwrap() - nll.exp()).abs() < 1e-9);

    // Batches change nothing, and the hash in the closing line says so.
    let hash = |stderr: &str| stderr.trim().rsplit(' ').next().unwrap().to_string();
    for ubatch in ["1", "7", "16"] {
        let other = home.octet(&[
            "perplexity",
            "-f",
            &file,
            "-c",
            "30",
            "--json",
            "--ubatch",
            ubatch,
        ]);
        assert_eq!(other.json(), doc);
        assert_eq!(hash(&other.stderr), hash(&out.stderr));
    }
    let piped = home.octet_with(&["perplexity", "-f", "-", "-c", "30"], &text);
    let chunks = tokens.len() / 30;
    let want = format!(
        "perplexity {:.4} over {n} tokens in {chunks} chunks of 30\n",
        nll.exp()
    );
    assert_eq!(piped.text(), want);

    let short = home.octet(&["perplexity", "-f", &file]);
    assert!(short.error(1).contains("expected at least 512 tokens"));
    assert!(
        home.octet(&["perplexity", "-f", &file, "-c", "3"])
            .error(2)
            .contains("--ctx 3")
    );
}

// ---------------------------------------------------------------------------------------------
// bench

#[test]
fn bench_has_its_documented_keys() {
    let home = Home::new();
    let out = home.octet(&[
        "bench", "--json", "-p", "8", "-n", "3", "-r", "2", "-t", "2",
    ]);
    let doc = out.json();
    assert_eq!(doc["machine"]["threads"], 2);
    assert_eq!(doc["machine"]["isa"], octet::simd::best(None).name());
    let [result] = doc["results"].as_array().unwrap().as_slice() else {
        panic!("{doc}")
    };
    for (key, want) in [("p", 8), ("n", 3), ("depth", 0), ("threads", 2)] {
        assert_eq!(result[key], want, "{key}");
    }
    for key in ["prefill_tok_s", "decode_tok_s", "gb_s"] {
        assert!(result[key].as_f64().unwrap() > 0.0, "{key}");
    }
    for part in ["prefill", "decode"] {
        let of = |suffix: &str| result[format!("{part}_{suffix}")].as_f64().unwrap();
        assert!(
            of("min") <= of("tok_s") && of("tok_s") <= of("max"),
            "{doc}"
        );
    }
    assert!(
        home.octet(&["bench", "-p", "2048", "-n", "1"])
            .error(1)
            .contains("expected at most 2048 tokens, found 2049")
    );
}

// ---------------------------------------------------------------------------------------------
// Errors and exit codes

#[test]
fn wrong_usage_exits_2() {
    let home = Home::new();
    for args in [
        &["frobnicate"][..],
        &["run", "--frobnicate"],
        &["run", "-p", "x", "--stop", ""],
        &["run", "-p", "x", "--raw", "-s", "y"],
        &["run", "-p", "x", "--logprobs", "-3"],
        &["run", "-p", "x", "-n", "-2"],
        &["run", "-p", "x", "--repeat-last-n", "1.5"],
        &["run", "-p", "x", "-n", "many"],
        &["run", "-p", "x", "--temp", "nan"],
        &["run", "-p", "x", "--top-p", "inf"],
        &["run", "-p", "x", "--isa", "mmx"],
        &["run", "-p", "x", "--kv", "q4"],
        &["run", "-p", "x", "-t", "0"],
        &["run", "-p", "x", "-c", "0"],
        &["run", "-p", "x", "--ubatch", "0"],
        &["run", "-p", "x", "-l", "3"],
        &["run", "-p", "x", "-l", "a+1"],
        &["run", "-p", "x", "-m"],
        &["chat", "-n", "0"],
        &["inspect"],
        &["perplexity"],
        &["bench", "-r", "0"],
        &["chat", "run"],
    ] {
        let out = home.octet(args);
        assert_eq!(
            (out.code, out.stdout.as_slice()),
            (Some(2), &b""[..]),
            "{args:?}"
        );
        assert!(
            out.stderr.starts_with("error: "),
            "{args:?}: {}",
            out.stderr
        );
    }
    let out = home.octet(&["run", "-p", "x", "-c", "2049"]);
    assert_eq!(
        out.error(2),
        "octet: --ctx 2049: the model was trained for 2048 positions (expected at most 2048, found 2049)"
    );
    for args in [
        &["--help"][..],
        &["--version"],
        &["run", "--help"],
        &["help", "chat"],
    ] {
        let out = home.octet(args);
        assert_eq!((out.code, out.stderr.as_str()), (Some(0), ""), "{args:?}");
    }
    assert!(home.octet(&["--version"]).text().starts_with("octet 0."));
}

#[test]
fn every_command_and_option_has_a_help_text() {
    let home = Home::new();
    let out = home.octet(&["--help"]);
    for command in [
        "chat",
        "run",
        "tokenize",
        "detokenize",
        "inspect",
        "perplexity",
        "bench",
        "batch",
        "plan",
        "imatrix",
        "profile",
        "completions",
        "man",
    ] {
        let line = out
            .text()
            .lines()
            .find(|l| l.trim_start().starts_with(&format!("{command} ")));
        assert!(
            line.is_some_and(|l| l.split_whitespace().count() > 3),
            "{command}: {}",
            out.text()
        );
        let help = home.octet(&[command, "-h"]);
        for line in help
            .text()
            .lines()
            // A help text that goes on in the next line may begin it with "-1".
            // So may the text below the options, which is not indented.
            .filter(|l| l.trim_start().starts_with('-'))
            .filter(|l| l.starts_with(' ') && !l.starts_with(&" ".repeat(12)))
        {
            // "-t, --threads <N>  What it does": something stands after the gap.
            assert!(line.trim().contains("  "), "{command}: {line}");
        }
    }
}

#[test]
fn a_model_that_cannot_be_used_is_one_clear_line() {
    let home = Home::new();
    let demo = fs::read(DEMO).unwrap();
    let small = |change: &dyn Fn(&mut File)| {
        let mut file = Small {
            format: Format::F32,
            ..Small::default()
        }
        .file();
        change(&mut file);
        file.part(0, 1)
    };
    let big_endian = {
        let mut bytes = demo.clone();
        bytes[4..8].reverse();
        bytes
    };
    let safetensors = b"\x10\0\0\0\0\0\0\0{\"__metadata__\":{}";
    let cases: Vec<(&str, Vec<u8>, &[&str])> = vec![
        (
            "empty",
            vec![],
            &["expected a GGUF file", "found an empty file"],
        ),
        (
            "text",
            b"Once upon a time".to_vec(),
            &["expected a GGUF file"],
        ),
        (
            "model.safetensors",
            safetensors.to_vec(),
            &["expected a GGUF file", "safetensors"],
        ),
        (
            "header",
            demo[..20].to_vec(),
            &[
                "the file ends inside the header",
                "expected 24 bytes",
                "found 20",
            ],
        ),
        (
            "half",
            demo[..demo.len() / 2].to_vec(),
            &["the file ends inside", "download may be incomplete"],
        ),
        (
            "short",
            demo[..demo.len() - 100_000].to_vec(),
            &["the file ends inside"],
        ),
        ("metadata", demo[..3000].to_vec(), &["the file ends inside"]),
        ("endian", big_endian, &["little-endian", "big-endian"]),
        (
            "qwen2",
            small(&|f| {
                f.set("general.architecture", "qwen2");
            }),
            &[
                "this architecture is not supported",
                "llama",
                "found \"qwen2\"",
            ],
        ),
        (
            "tensor",
            small(&|f| f.tensors.retain(|t| t.name != "blk.1.attn_k.weight")),
            &["tensor blk.1.attn_k.weight is missing"],
        ),
        (
            "key",
            small(&|f| *f = f.without("llama.context_length")),
            &["metadata key llama.context_length is missing"],
        ),
        (
            "shape",
            small(&|f| {
                let t = f.tensor("blk.0.attn_q.weight");
                t.shape = vec![64, 65];
                t.bytes.resize(64 * 65 * 4, 0);
            }),
            &[
                "the shape of tensor blk.0.attn_q.weight",
                "expected [64, 64]",
                "found [64, 65]",
            ],
        ),
        (
            "iq2",
            small(&|f| {
                let t = f.tensor("token_embd.weight");
                t.type_id = 16;
                t.shape = vec![64, 300];
                t.shape = vec![256, 75];
                t.bytes.resize(75 * 66, 0);
            }),
            &["tensor token_embd.weight"],
        ),
        (
            "vocabulary",
            small(&|f| {
                for name in ["token_embd.weight", "output.weight"] {
                    let t = f.tensor(name);
                    t.shape = vec![64, 299];
                    t.bytes.truncate(64 * 299 * 4);
                }
            }),
            &[
                "the vocabulary is wrong",
                "at most 299 tokens, the rows of token_embd.weight",
                "found 300",
            ],
        ),
        (
            "no-tokens",
            small(&|f| *f = f.without("tokenizer.ggml.tokens")),
            &["tokenizer.ggml.tokens is missing"],
        ),
    ];
    for (name, bytes, words) in &cases {
        let path = home.write(&format!("{name}.gguf"), bytes);
        for command in [
            &["run", "-p", "x", "-n", "1"][..],
            &["chat"],
            &["perplexity", "-f", "Cargo.toml"],
        ] {
            let out = home.octet(&[command, &["-m", &path]].concat());
            let error = out.error(1);
            for word in [&[path.as_str()], *words].concat() {
                assert!(error.contains(word), "{name}: `{word}` is not in: {error}");
            }
        }
    }

    // A type that exists but is not computed with, in a tensor of the right shape; and one that nobody knows.
    let shape = Small {
        d_model: 256,
        d_head: 64,
        n_rot: 64,
        ..Small::default()
    };
    let mut file = shape.file();
    let t = file.tensor("blk.0.attn_v.weight");
    t.type_id = 16;
    t.bytes.resize(128 * 66, 0);
    let bytes = file.part(0, 1);
    let out = home.octet(&["run", "-p", "x", "-m", &home.write("iq2_xxs.gguf", &bytes)]);
    let error = out.error(1);
    for word in [
        "iq2_xxs.gguf: the type of tensor blk.0.attn_v.weight is not supported",
        "Q4_K",
        "found IQ2_XXS",
    ] {
        assert!(error.contains(word), "{error}");
    }
    let name = b"blk.0.attn_v.weight";
    let at = bytes.windows(name.len()).position(|w| w == name).unwrap() + name.len() + 4 + 16;
    assert_eq!(bytes[at..at + 4], 16u32.to_le_bytes());
    let mut unknown = bytes.clone();
    unknown[at..at + 4].copy_from_slice(&999u32.to_le_bytes());
    let out = home.octet(&[
        "run",
        "-p",
        "x",
        "-m",
        &home.write("unknown.gguf", &unknown),
    ]);
    let error = out.error(1);
    for word in ["unknown.gguf", "blk.0.attn_v.weight", "999"] {
        assert!(error.contains(word), "{error}");
    }

    let folder = home.path("").to_str().unwrap().to_string();
    let nowhere = home.path("nowhere.gguf").to_str().unwrap().to_string();
    for command in ["run", "chat", "bench", "inspect", "tokenize", "detokenize"] {
        let run = |path: &str| match command {
            "inspect" => home.octet(&[command, path]),
            _ => home.octet(&[command, "-m", path]),
        };
        let out = run(&nowhere);
        assert_eq!(
            out.error(1),
            format!("octet: {nowhere}: cannot open: No such file or directory (os error 2)")
        );
        if !command.ends_with("tokenize") {
            assert!(
                run(&folder)
                    .error(1)
                    .contains("expected a GGUF file, found a folder")
            );
        }
    }
}

#[test]
fn a_prompt_that_cannot_be_used_is_one_clear_line() {
    let home = Home::new();
    let long = home.write("long.txt", "word ".repeat(3000));
    let out = home.octet(&["run", "-f", &long]);
    let error = out.error(1);
    assert!(
        error.starts_with("octet: the context is full (expected at most 2048 tokens, found "),
        "{error}"
    );
    let out = home.octet(&["run", "-p", "Hello", "-c", "4"]);
    assert!(out.error(1).contains("expected at most 4 tokens, found"));
    let latin = home.write("latin1.txt", b"M\xe4rchen");
    let out = home.octet(&["run", "-f", &latin]);
    let want = format!(
        "octet: {latin}: the text is wrong (expected valid UTF-8, found byte 0xe4 at offset 1)"
    );
    assert_eq!(out.error(1), want);
    let out = home.octet_with(&["run"], b"M\xe4rchen");
    assert!(
        out.error(1)
            .starts_with("octet: <stdin>: the text is wrong (expected valid UTF-8")
    );
    let out = home.octet(&["run", "-f", "nowhere.txt"]);
    assert!(
        out.error(1)
            .starts_with("octet: nowhere.txt: cannot read: No such file")
    );
    let out = home.octet(&["perplexity", "-f", "nowhere.txt"]);
    assert!(
        out.error(1)
            .starts_with("octet: nowhere.txt: cannot read: No such file")
    );
}

#[test]
fn a_bias_for_a_token_that_is_not_there_is_refused() {
    let run = Home::new().octet(&["run", "-p", "x", "-n", "1", "-l", "99999+5"]);
    assert_eq!(
        run.error(2),
        "octet: --logit-bias 99999: no such token (expected ids below 4096, found 99999)"
    );
}
