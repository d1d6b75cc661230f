//! Batches: the scheduler beside single sessions, and `octet batch` as its users see it — killed, continued,
//! given bad lines.

use std::fs;
use std::ops::ControlFlow;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use octet::chat::batch::{Batch, Done, Room, Totals};
use octet::chat::sampler::{Sampler, SamplerOptions};
use octet::chat::session::{Limits, Session};
use octet::gguf::Gguf;
use octet::moe::{Kv, KvType, Machine, Model};
use serde_json::{Value, json};

use crate::program::{DEMO, Home, Output, PATIENCE, finish, wait};
use crate::reference;
use crate::scripted;
use crate::small_model::Small;

// ---------------------------------------------------------------------------------------------
// The scheduler

/// Prompts and how they are answered: greedy and with luck, short and long, alike and different.
fn requests() -> Vec<(Vec<u32>, SamplerOptions, Limits)> {
    let prompts: Vec<Vec<u32>> = reference()
        .iter()
        .map(|p| serde_json::from_value(p["ids"].clone()).unwrap())
        .collect();
    let long: Vec<u32> = prompts.iter().flatten().copied().take(90).collect();
    let mut all = Vec::new();
    for i in 0..14usize {
        let prompt = match i % 3 {
            0 => prompts[i % prompts.len()].clone(),
            // A beginning in common that ends inside a block, and one that is all of the prompt.
            1 => [&long[..70], &prompts[i % prompts.len()]].concat(),
            _ => long[..80].to_vec(),
        };
        let sampling = SamplerOptions {
            temp: if i % 2 == 0 { 0.0 } else { 0.9 },
            seed: Some(i as u64),
            ..SamplerOptions::default()
        };
        let limits = Limits {
            max_tokens: Some(i * 5 % 23),
            stop: vec![2],
            logprobs: i % 3,
        };
        all.push((prompt, sampling, limits));
    }
    all
}

/// All requests at once; the answers in the order of the requests.
fn together(model: &Model, room: Room) -> (Vec<Done>, Totals) {
    let mut batch = Batch::new(model, room);
    for (i, (prompt, sampling, limits)) in requests().into_iter().enumerate() {
        batch
            .add(i as u64, prompt, Sampler::new(sampling), limits)
            .unwrap();
    }
    let mut done = Vec::new();
    while !batch.is_empty() {
        done.extend(batch.step(|_, _| ControlFlow::Continue(())).unwrap());
    }
    done.sort_by_key(|done| done.id);
    (done, batch.totals().clone())
}

#[test]
fn neighbours_memory_and_threads_change_no_answer() {
    let file = Gguf::open(Path::new(DEMO)).unwrap();
    let model = |threads| Model::open(&file, Machine::new(threads, None).unwrap()).unwrap();
    let one = model(1);
    let block = Kv::new(&one.config, KvType::F16, 512).block_bytes();
    let want: Vec<_> = requests()
        .into_iter()
        .map(|(prompt, sampling, limits)| {
            let mut session = Session::new(&one, KvType::F16, 512, 512);
            let go = |_| ControlFlow::Continue(());
            session
                .answer(&prompt, &mut Sampler::new(sampling), &limits, go)
                .unwrap()
        })
        .collect();
    for (threads, sequences, ubatch, blocks) in [
        (1, 1, 512, 1000),
        (2, 3, 64, 1000),
        (3, 8, 512, 1000),
        (2, 14, 7, 1000),
        // Too little memory: caches are thrown away and computed again.
        (2, 14, 64, 6),
        (2, 8, 512, 0),
    ] {
        let (got, totals) = together(
            &model(threads),
            Room {
                kv: KvType::F16,
                ctx: 512,
                ubatch,
                sequences,
                kv_bytes: blocks * block,
            },
        );
        assert_eq!(got.len(), want.len());
        for (got, want) in got.iter().zip(&want) {
            let how = format!("{sequences} sequences, request {}", got.id);
            let got = got.answer.as_ref().unwrap();
            assert_eq!(got.tokens, want.tokens, "{how}");
            assert_eq!(got.finish, want.finish, "{how}");
            assert_eq!(got.stats.hash, want.stats.hash, "{how}");
            assert_eq!((&got.logprobs, &got.top), (&want.logprobs, &want.top));
        }
        let answers: usize = want.iter().map(|a| a.tokens.len()).sum();
        assert_eq!(totals.answer_tokens, answers);
        if blocks == 1000 {
            // Of 9 prompts with a long beginning one was computed; nobody waits for its last 15 tokens.
            let prompts: usize = requests().iter().map(|(p, ..)| p.len()).sum();
            assert!(totals.shared_tokens >= 8 * 55, "{totals:?}");
            assert!(totals.prompt_tokens + totals.shared_tokens <= prompts);
        }
    }
}

#[test]
fn caches_that_share_a_beginning_go_their_own_ways() {
    let file = Gguf::open(Path::new(DEMO)).unwrap();
    let model = Model::open(&file, Machine::new(2, None).unwrap()).unwrap();
    let tokens = requests()[1].0.clone();
    let run = |kv: &mut Kv, tokens: &[u32]| crate::model::logits(&model, kv, tokens, 512);
    let new = || Kv::new(&model.config, KvType::F16, 512);
    for len in [1, 63, 64, 65, 70] {
        let mut first = new();
        run(&mut first, &tokens[..70]);
        let mut second = first.fork(len);
        assert_eq!(second.len(), len);
        assert_eq!(Kv::bytes_together([&first, &second]), first.bytes());
        let own = second.growth(20);
        let got = run(&mut second, &tokens[10..30]);
        assert_eq!(Kv::bytes_together([&first, &second]), first.bytes() + own);
        let mut alone = new();
        run(&mut alone, &tokens[..len]);
        assert_eq!(got, run(&mut alone, &tokens[10..30]), "{len}");
        // The first one was not touched.
        let mut alone = new();
        run(&mut alone, &tokens[..70]);
        let (got, want) = (
            run(&mut first, &tokens[30..40]),
            run(&mut alone, &tokens[30..40]),
        );
        assert_eq!(got, want, "{len}");
    }
}

// ---------------------------------------------------------------------------------------------
// The command

/// A file of lines, some of which take longer than others.
fn input(lines: usize) -> String {
    let mut text = String::new();
    for i in 0..lines {
        let line = match i % 5 {
            0 => json!({"prompt": "Once upon a time", "raw": true, "predict": 3 + i % 7}),
            1 => json!({
                "custom_id": format!("id-{i}"), "method": "POST", "url": "/v1/chat/completions",
                "body": {
                    "model": "any", "max_tokens": 12, "temperature": 0.7, "seed": i,
                    "messages": [
                        {"role": "system", "content": "You are an old man who tells stories to children."},
                        {"role": "user", "content": format!("Tell me story {i}.")},
                    ],
                    "logprobs": true, "top_logprobs": 2,
                },
            }),
            2 => {
                json!({"messages": [{"role": "user", "content": "Hello"}], "predict": 40, "temp": 0})
            }
            3 => {
                json!({"prompt": "The fox", "raw": true, "predict": 25, "stop": [" the"], "logprobs": 1})
            }
            _ => json!({
                "custom_id": format!("id-{i}"), "url": "/v1/completions",
                "body": {"prompt": "She said", "max_tokens": 9, "repeat_penalty": 1.2},
            }),
        };
        text += &format!("{line}\n");
    }
    text
}

/// The results of a run that must have worked.
#[track_caller]
fn results(home: &Home, args: &[&str]) -> Vec<u8> {
    let out = batch(home, args);
    assert_eq!(out.code, Some(0), "{}", out.stderr);
    fs::read(home.path("out.jsonl")).unwrap()
}

/// `octet batch in.jsonl -o out.jsonl` in the home's folder, with more arguments.
fn command(home: &Home, args: &[&str]) -> Command {
    let (input, output) = (home.path("in.jsonl"), home.path("out.jsonl"));
    let files = [
        "batch",
        input.to_str().unwrap(),
        "-o",
        output.to_str().unwrap(),
    ];
    home.command(&[&files[..], args].concat())
}

fn batch(home: &Home, args: &[&str]) -> Output {
    finish(command(home, args), "")
}

fn json_lines(bytes: &[u8]) -> Vec<Value> {
    let text = std::str::from_utf8(bytes).unwrap();
    assert!(text.is_empty() || text.ends_with('\n'));
    text.lines()
        .map(|l| serde_json::from_str(l).unwrap())
        .collect()
}

#[test]
fn results_are_those_of_single_runs() {
    let home = Home::new();
    let text = input(10);
    home.write("in.jsonl", &text);
    let want = results(&home, &["--parallel", "1", "-t", "1"]);
    for args in [
        ["--parallel", "3", "-t", "2"],
        ["--parallel", "8", "-t", "3"],
        ["--parallel", "8", "--kv-ram", "1M"],
        ["--parallel", "8", "--ubatch", "5"],
    ] {
        assert!(
            results(&home, &[&args[..], &["--force"]].concat()) == want,
            "{args:?}"
        );
    }
    assert!(!home.path("out.jsonl.ahead").exists());

    let results = json_lines(&want);
    assert_eq!(results.len(), 10);
    for (line, result) in json_lines(text.as_bytes()).iter().zip(&results) {
        assert_eq!(result["custom_id"], line["custom_id"]);
        assert_eq!(result["error"], Value::Null);
        assert_eq!(result["response"]["status_code"], 200);
        let body = &result["response"]["body"];
        let (choice, ask) = (&body["choices"][0], line.get("body").unwrap_or(line));
        let chat = ask.get("messages").is_some();
        let said = |role: &str| {
            let messages = ask["messages"].as_array().into_iter().flatten();
            let mut said = messages.filter(|m| m["role"] == role);
            said.next().map(|m| m["content"].as_str().unwrap())
        };
        let k = ask.get("top_logprobs").or(ask.get("logprobs"));
        let mut args: Vec<String> = ["run", "--json", "--seed", "--logprobs"]
            .map(String::from)
            .into();
        args.insert(3, body["octet"]["seed"].to_string());
        args.push(k.map_or("0".into(), Value::to_string));
        let text = match chat {
            true => {
                args.extend(["-p".into(), said("user").unwrap().into()]);
                args.extend(
                    said("system")
                        .into_iter()
                        .flat_map(|s| ["-s".into(), s.into()]),
                );
                &choice["message"]["content"]
            }
            false => {
                args.extend([
                    "--raw".into(),
                    "-p".into(),
                    ask["prompt"].as_str().unwrap().into(),
                ]);
                &choice["text"]
            }
        };
        for (key, option) in [
            ("predict", "-n"),
            ("max_tokens", "-n"),
            ("temp", "--temp"),
            ("temperature", "--temp"),
            ("repeat_penalty", "--repeat-penalty"),
        ] {
            if let Some(value) = ask.get(key) {
                args.extend([option.into(), value.to_string()]);
            }
        }
        if let Some(stop) = ask["stop"][0].as_str() {
            args.extend(["--stop".into(), stop.into()]);
        }
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        let single = home.octet(&args).json();
        assert_eq!(text, &single["text"], "{args:?}");
        assert_eq!(choice["finish_reason"], single["finish"], "{args:?}");
        assert_eq!(body["octet"]["logits_hash"], single["logits_hash"]);
        let usage = &body["usage"];
        assert_eq!(
            usage["prompt_tokens"],
            single["prompt_tokens"].as_array().unwrap().len()
        );
        assert_eq!(
            usage["completion_tokens"],
            single["tokens"].as_array().unwrap().len()
        );
        let probabilities = |place: &Value| -> Vec<Vec<Value>> {
            let places = place.as_array().unwrap().iter();
            let of = |top: &Value| match top {
                Value::Object(top) => top.values().cloned().collect(),
                top => {
                    let of = |t: &Value| t.get("logprob").unwrap_or(&t[1]).clone();
                    top.as_array().unwrap().iter().map(of).collect()
                }
            };
            places.map(of).collect()
        };
        match (
            &choice["logprobs"]["content"],
            &choice["logprobs"]["top_logprobs"],
        ) {
            (Value::Array(content), _) => {
                let tops = content.iter().map(|t| t["top_logprobs"].clone()).collect();
                assert_eq!(probabilities(&tops), probabilities(&single["top"]));
                let tokens = content.iter().map(|t| t["token"].as_str().unwrap());
                assert_eq!(
                    tokens.collect::<String>().trim_start(),
                    text.as_str().unwrap()
                );
            }
            (_, tops @ Value::Array(_)) => {
                assert_eq!(probabilities(tops), probabilities(&single["top"]));
            }
            _ => assert!(single.get("top").is_none()),
        }
    }
}

#[test]
fn a_bad_line_is_an_error_result_and_the_rest_goes_on() {
    let home = Home::new();
    let long = "word ".repeat(3000);
    let lines: [(Vec<u8>, &str, &str); 22] = [
        (br#"{"prompt":"Hi","predict":1}"#.into(), "", ""),
        (b"{".into(), "invalid_json", "it is no JSON"),
        (b"nonsense".into(), "invalid_json", "at column 2"),
        (
            b"[1]".into(),
            "invalid_request",
            "expected an object, found [1]",
        ),
        (
            b"{\"prompt\":\"\xff\"}".into(),
            "invalid_utf8",
            "byte 0xff at offset 11",
        ),
        (
            br#"{}"#.into(),
            "invalid_request",
            "expected messages or prompt, found none",
        ),
        (
            br#"{"prompt":"a","wat":1}"#.into(),
            "invalid_request",
            "found \"wat\"",
        ),
        (
            br#"{"prompt":"a","temp":"hot"}"#.into(),
            "invalid_request",
            "temp (expected a number",
        ),
        (
            br#"{"prompt":"a","predict":1.5}"#.into(),
            "invalid_request",
            "expected a number of tokens",
        ),
        (
            br#"{"prompt":"a","messages":[]}"#.into(),
            "invalid_request",
            "found both",
        ),
        (
            br#"{"prompt":[1,99999]}"#.into(),
            "invalid_request",
            "outside the vocabulary",
        ),
        (
            br#"{"prompt":[1,-1]}"#.into(),
            "invalid_request",
            "text or token ids",
        ),
        (
            br#"{"messages":[]}"#.into(),
            "invalid_request",
            "at least one message",
        ),
        (
            br#"{"messages":[{"role":"wizard","content":"a"}]}"#.into(),
            "invalid_request",
            "wizard",
        ),
        (
            format!("{{\"prompt\":\"{long}\"}}").into(),
            "context_length_exceeded",
            "at most 512 tokens",
        ),
        (
            br#"{"custom_id":7,"prompt":"a"}"#.into(),
            "invalid_request",
            "custom_id (expected a string",
        ),
        (
            br#"{"custom_id":"u","url":"/v1/embeddings","body":{}}"#.into(),
            "invalid_request",
            "/v1/embeddings",
        ),
        (
            br#"{"custom_id":"v","url":"/v1/completions","body":{"prompt":"a","n":2}}"#.into(),
            "invalid_request",
            "n (expected 1, found 2)",
        ),
        (
            br#"{"custom_id":"w","url":"/v1/completions","body":{"prompt":"a","raw":true}}"#.into(),
            "invalid_request",
            "\"raw\"",
        ),
        (
            br#"{"custom_id":"x","url":"/v1/completions","body":{"messages":[]}}"#.into(),
            "invalid_request",
            "expected prompt",
        ),
        (
            br#"{"prompt":"a","logit_bias":{"99999":1}}"#.into(),
            "invalid_request",
            "no such token",
        ),
        // The last line need not end.
        (
            br#"{"prompt":"Hi","predict":1,"logit_bias":{"5":-100}}"#.into(),
            "",
            "",
        ),
    ];
    // Empty lines ask for nothing but count.
    let bytes: Vec<Vec<u8>> = lines.iter().map(|(line, ..)| line.clone()).collect();
    home.write("in.jsonl", bytes.join(&b"\n \r\n"[..]));
    let out = batch(&home, &["-c", "512"]);
    assert_eq!(out.code, Some(1), "{}", out.stderr);
    assert!(
        out.stderr
            .ends_with("in.jsonl: 20 of 22 lines failed; their results say why\n"),
        "{}",
        out.stderr
    );
    let results = json_lines(&fs::read(home.path("out.jsonl")).unwrap());
    assert_eq!(results.len(), lines.len());
    for (i, ((line, code, words), result)) in lines.iter().zip(&results).enumerate() {
        let error = &result["error"];
        if code.is_empty() {
            assert_eq!(
                (error, &result["response"]["status_code"]),
                (&Value::Null, &json!(200))
            );
            continue;
        }
        assert_eq!(error["code"], *code, "{}", String::from_utf8_lossy(line));
        assert_eq!(error["line"], 2 * i + 1);
        let message = error["message"].as_str().unwrap();
        assert!(
            message.starts_with(&format!("line {}: ", 2 * i + 1)),
            "{message}"
        );
        assert!(message.contains(words), "{words:?} is not in {message}");
        assert_eq!(result["response"]["status_code"], 400);
        assert_eq!(result["response"]["body"]["error"]["message"], message);
    }
    assert_eq!(results[16]["custom_id"], "u");
    // What failed fails again: a run that has nothing to do says so, and that it was not all well.
    let out = batch(&home, &["-c", "512", "--resume"]);
    assert_eq!(out.code, Some(1));
    assert!(
        out.stderr.contains("nothing left to do: all 22 prompts"),
        "{}",
        out.stderr
    );
}

#[test]
fn an_enormous_line_takes_no_memory() {
    let home = Home::new();
    let mut text = b"{\"prompt\":\"Hi\",\"predict\":1}\n".to_vec();
    text.extend(
        b"{\"prompt\":\""
            .iter()
            .chain(&[b'x'; 40 << 20])
            .chain(b"\"}\n"),
    );
    text.extend(b"{\"prompt\":\"Hi\",\"predict\":1}\n");
    home.write("in.jsonl", &text);
    let out = batch(&home, &[]);
    assert_eq!(out.code, Some(1), "{}", out.stderr);
    let results = json_lines(&fs::read(home.path("out.jsonl")).unwrap());
    let codes: Vec<&Value> = results.iter().map(|r| &r["error"]["code"]).collect();
    assert_eq!(codes, [&Value::Null, &json!("line_too_long"), &Value::Null]);
    let message = results[1]["error"]["message"].as_str().unwrap();
    assert!(
        message.contains("at most 16777216 bytes, found 41943053"),
        "{message}"
    );
}

/// Some numbers between 0 and 1, the same in every run.
fn luck(seed: u64) -> impl Iterator<Item = f64> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    std::iter::repeat_with(move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 11) as f64 / (1u64 << 53) as f64
    })
}

/// Whatever the moment at which it is killed, the next run goes on from there, and the end is that of a run
/// that nobody killed. `OCTET_KILLS=200` tries it more often.
#[test]
fn killed_at_any_moment_nothing_is_lost_or_doubled() {
    let home = Home::new();
    home.write("in.jsonl", input(60));
    let options = ["--parallel", "6"];
    let started = std::time::Instant::now();
    let want = results(&home, &options);
    let whole = started.elapsed().as_secs_f64();
    let kills = crate::faults::kills(6);
    let mut luck = luck(1);
    let (mut killed, mut partly) = (0, 0);
    while killed < kills {
        let _ = fs::remove_file(home.path("out.jsonl"));
        let mut runs = 0;
        loop {
            let output = home.path("out.jsonl");
            let mut child = command(&home, &[&options[..], &["--resume"]].concat())
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
                .unwrap();
            // A line is torn in a moment that waiting seldom meets: the test tears one sometimes.
            std::thread::sleep(Duration::from_secs_f64(whole * 0.7 * luck.next().unwrap()));
            let ended = child.try_wait().unwrap();
            crate::faults::end(&mut child, runs);
            if let Some(status) = ended {
                assert_eq!(status.code(), Some(0));
                break;
            }
            killed += 1;
            runs += 1;
            if let Ok(bytes) = fs::read(&output) {
                let whole = bytes
                    .iter()
                    .rposition(|b| *b == b'\n')
                    .map_or(0, |at| at + 1);
                assert!(
                    want.starts_with(&bytes),
                    "a result differs, or is out of turn"
                );
                partly += usize::from(whole > 0 && whole < want.len());
                if luck.next().unwrap() < 0.5 && whole < bytes.len().max(want.len()) {
                    let torn = whole + (luck.next().unwrap() * 50.0) as usize;
                    fs::write(&output, &want[..torn.min(want.len() - 1)]).unwrap();
                }
            }
            if runs > 20 {
                assert!(results(&home, &[&options[..], &["--resume"]].concat()) == want);
                break;
            }
        }
        assert!(fs::read(home.path("out.jsonl")).unwrap() == want);
        assert!(!home.path("out.jsonl.ahead").exists());
    }
    println!("{killed} kills, {partly} with some results");
}

/// A slow first line keeps no result of the others from being saved.
#[test]
fn results_ahead_of_their_turn_are_saved() {
    let home = Home::new();
    let slow =
        json!({"prompt": "Once", "raw": true, "predict": 300, "ignore_eos": true, "temp": 0});
    let quick = json!({"prompt": "Once", "raw": true, "predict": 2, "temp": 0});
    let mut lines = vec![slow];
    lines.extend(vec![quick; 12]);
    let text: String = lines.iter().map(|l| format!("{l}\n")).collect();
    home.write("in.jsonl", text);
    let output = home.path("out.jsonl");
    let mut child = command(&home, &["--parallel", "4"])
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let ahead = home.path("out.jsonl.ahead");
    let held = || {
        fs::read(&ahead)
            .unwrap_or_default()
            .iter()
            .filter(|b| **b == b'\n')
            .count()
    };
    let deadline = std::time::Instant::now() + PATIENCE;
    while held() < 12 {
        assert!(std::time::Instant::now() < deadline && child.try_wait().unwrap().is_none());
        std::thread::sleep(Duration::from_millis(5));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(fs::read(&output).unwrap().len(), 0);
    // Only the slow one is left to do.
    let out = batch(&home, &["--parallel", "4", "--resume"]);
    assert_eq!(out.code, Some(0), "{}", out.stderr);
    assert!(out.stderr.contains("answers 300 tokens"), "{}", out.stderr);
    let got = fs::read(&output).unwrap();
    assert_eq!(json_lines(&got).len(), 13);
    assert!(!ahead.exists());
    assert!(results(&home, &["--force", "--parallel", "13"]) == got);
}

#[test]
fn results_of_other_work_are_refused() {
    let home = Home::new();
    let text = input(6);
    home.write("in.jsonl", &text);
    let small = ["-n", "2", "--parallel", "2"];
    let want = results(&home, &small);
    let unchanged = || assert!(fs::read(home.path("out.jsonl")).unwrap() == want);
    let out = batch(&home, &small);
    assert!(out.error(2).ends_with(
        "out.jsonl: the file is there already; --resume continues it, --force writes over it"
    ));
    unchanged();
    for other in [
        &["-n", "3"][..],
        &["-n", "2", "--temp", "0.1"],
        &["-n", "2", "--seed", "5"],
        &["-n", "2", "--unordered"],
        &["-n", "2", "-c", "256"],
        &["-n", "2", "--kv", "f32"],
    ] {
        let out = batch(&home, &[other, &["--resume"]].concat());
        let line = out.error(1);
        assert!(
            line.contains(
                "expected results of this model, these settings and this octet, found other results"
            ),
            "{line}"
        );
        unchanged();
    }
    // Another line, one line less, lines in another order; one line more is more to do.
    let lines: Vec<&str> = text.lines().collect();
    let mut changed = lines.clone();
    changed[2] = r#"{"prompt":"other"}"#;
    let mut swapped = lines.clone();
    swapped.swap(0, 1);
    for other in [&changed[..], &lines[..5], &swapped] {
        home.write("in.jsonl", other.join("\n"));
        let out = batch(&home, &[&small[..], &["--resume"]].concat());
        let line = out.error(1);
        assert!(
            line.contains("results of other requests; --force begins anew"),
            "{line}"
        );
        unchanged();
    }
    home.write(
        "in.jsonl",
        [&lines[..], &[r#"{"prompt":"Hi"}"#]].concat().join("\n"),
    );
    assert!(results(&home, &[&small[..], &["--resume"]].concat()).starts_with(&want));
    assert!(results(&home, &[&small[..], &["--force"]].concat()).starts_with(&want));
    // Not a file of results at all.
    home.write("out.jsonl", "My diary\n");
    let out = batch(&home, &["--resume"]);
    assert!(
        out.error(1)
            .contains("line 1 is wrong (expected a result of octet batch")
    );
    assert_eq!(fs::read(home.path("out.jsonl")).unwrap(), b"My diary\n");
    // The requests themselves.
    let path = home.path("in.jsonl");
    let path = path.to_str().unwrap();
    let out = home.octet(&["batch", path, "-o", path, "--force"]);
    assert!(
        out.error(2)
            .contains("the results would be written over the requests")
    );
    assert!(
        home.octet(&["batch", "-", "-o", "x", "--resume"])
            .error(2)
            .contains("must be a file")
    );
    assert!(
        home.octet(&["batch", "/nowhere", "-o", "x"])
            .error(1)
            .contains("/nowhere: cannot open")
    );
}

#[test]
fn pipes_and_order() {
    let home = Home::new();
    let text = input(12);
    home.write("in.jsonl", &text);
    let want = results(&home, &["--parallel", "5"]);
    let out = home.octet_with(&["batch", "-", "-o", "-", "--parallel", "5"], &text);
    assert_eq!(out.code, Some(0), "{}", out.stderr);
    assert!(out.stdout == want);
    // As they come: the same results but for the settings that their ids tell.
    let out = home.octet_with(
        &["batch", "-", "-o", "-", "--parallel", "5", "--unordered"],
        &text,
    );
    let plain = |bytes: &[u8]| {
        let answer = |r: &Value| {
            (
                r["id"]
                    .as_str()
                    .unwrap()
                    .split('_')
                    .nth(3)
                    .unwrap()
                    .parse::<usize>()
                    .unwrap(),
                r["response"]["body"]["choices"].clone(),
            )
        };
        json_lines(bytes).iter().map(answer).collect::<Vec<_>>()
    };
    let mut got = plain(&out.stdout);
    assert_ne!(got, plain(&want), "short answers come first");
    got.sort_by_key(|(line, _)| *line);
    assert_eq!(got, plain(&want));
    // Unordered, killed and continued: the same lines in some order.
    let whole = results(&home, &["--parallel", "5", "--unordered", "--force"]);
    let half = whole
        .iter()
        .enumerate()
        .filter(|(_, b)| **b == b'\n')
        .nth(5)
        .unwrap()
        .0;
    home.write("out.jsonl", &whole[..half + 40]);
    let mut got = plain(&results(&home, &["--unordered", "--resume"]));
    got.sort_by_key(|(line, _)| *line);
    assert_eq!(got, plain(&want));
}

#[cfg(unix)]
#[test]
fn interrupted_it_says_how_to_go_on() {
    use crate::program::signal;
    use std::io::Read;
    let home = Home::new();
    let quick = json!({"prompt": "Once", "raw": true, "predict": 1});
    let slow = json!({"prompt": "Once", "raw": true, "predict": 500, "ignore_eos": true});
    let text = format!("{quick}\n{slow}\n{slow}\n{slow}\n");
    home.write("in.jsonl", text);
    let output = home.path("out.jsonl");
    let mut child = command(&home, &["--parallel", "2"])
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let deadline = std::time::Instant::now() + PATIENCE;
    while fs::read(&output).unwrap_or_default().is_empty() {
        assert!(std::time::Instant::now() < deadline);
        std::thread::sleep(Duration::from_millis(5));
    }
    signal(&child, "INT");
    assert_eq!(wait(&mut child).code(), Some(130));
    let mut said = String::new();
    child
        .stderr
        .take()
        .unwrap()
        .read_to_string(&mut said)
        .unwrap();
    // At once, before all that it says at the end.
    let heard = "octet: stopping after this step; Ctrl-C once more ends at once\n";
    assert!(said.starts_with(heard), "{said}");
    assert!(
        said.contains(
            "octet: 1 of 4 results are kept; the same command with --resume goes on from here\n"
        ),
        "{said}"
    );
    assert_eq!(json_lines(&results(&home, &["--resume"])).len(), 4);
}

/// Memory does not grow with the file: the peak of a long one is that of a short one.
#[cfg(target_os = "linux")]
#[test]
fn a_hundred_thousand_lines_in_bounded_memory() {
    let home = Home::new();
    let tiny = Small {
        d_model: 32,
        n_layer: 1,
        n_head: 1,
        n_kv: 1,
        d_head: 16,
        d_ff: 32,
        n_expert: 2,
        n_used: 1,
        ..Small::default()
    };
    let model = home.write("tiny.gguf", tiny.file().part(0, 1));
    let peak = |lines: usize| {
        home.write(
            "in.jsonl",
            "{\"prompt\":\"a\",\"raw\":true}\n".repeat(lines),
        );
        let args = ["--force", "-m", &model, "-n", "1", "-t", "2"];
        let mut child = command(&home, &[&args[..], &["--parallel", "64"]].concat())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let status = format!("/proc/{}/status", child.id());
        let mut peak = 0;
        let deadline = std::time::Instant::now() + PATIENCE;
        while child.try_wait().unwrap().is_none() {
            assert!(std::time::Instant::now() < deadline);
            let status = fs::read_to_string(&status).unwrap_or_default();
            let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"));
            let kib = line.and_then(|l| l.trim().strip_suffix(" kB")?.parse().ok());
            peak = peak.max(kib.unwrap_or(0));
            std::thread::sleep(Duration::from_millis(2));
        }
        assert_eq!(child.wait().unwrap().code(), Some(0));
        let text = fs::read_to_string(home.path("out.jsonl")).unwrap();
        assert_eq!(text.lines().count(), lines);
        for (i, line) in text.lines().enumerate().step_by(997) {
            let id = format!("_{}_", i + 1);
            assert!(
                line.contains(&id) && line.ends_with("\"error\":null}"),
                "{line}"
            );
        }
        peak
    };
    let short: u64 = peak(2_000);
    let long = peak(100_000);
    assert!(long < short + 4096, "{short} KiB, then {long} KiB");
}

/// A line's schema holds its answer, beside lines without; the same answer as alone.
#[test]
fn answers_have_the_form_that_their_lines_ask_for() {
    let home = Home::new();
    let schema = json!({
        "type": "object", "required": ["name", "age"], "additionalProperties": false,
        "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    });
    let ask = json!([{"role": "user", "content": "Who is there?"}]);
    let strict = json!({"type": "json_schema", "json_schema": {"name": "person", "schema": schema, "strict": true}});
    let lines = [
        json!({"url": "/v1/chat/completions", "body": {"messages": ask, "response_format": strict, "seed": 4}}),
        json!({"prompt": "Who is there?", "json_schema": schema, "seed": 4}),
        json!({"prompt": "Who is there?", "regex": "(yes|no), [a-z]{3}", "seed": 4}),
        json!({"prompt": "Once upon a time", "raw": true, "predict": 9}),
        json!({"prompt": "Who is there?", "json_schema": {"type": "nonsense"}}),
        json!({"prompt": "Who is there?", "regex": "a", "ignore_eos": true}),
        json!({"url": "/v1/chat/completions", "body": {"messages": ask, "response_format": {"type": "xml"}}}),
    ];
    home.write("in.jsonl", lines.map(|l| l.to_string()).join("\n"));
    let run = |parallel: &str| {
        let out = batch(&home, &["--parallel", parallel, "--force", "-n", "60"]);
        assert_eq!(out.code, Some(1), "{}", out.stderr);
        json_lines(&fs::read(home.path("out.jsonl")).unwrap())
    };
    let results = run("7");
    assert_eq!(run("1"), results);
    let choice = |i: usize| &results[i]["response"]["body"]["choices"][0];
    let text = |i: usize| choice(i)["message"]["content"].as_str().unwrap();
    let person: Value = serde_json::from_str(text(0)).unwrap();
    assert!(
        person["name"].is_string() && person["age"].as_u64().unwrap() < 100,
        "{person}"
    );
    assert_eq!(choice(0)["finish_reason"], "stop");
    assert_eq!(text(0), text(1));
    assert!(
        ["yes, ", "no, "].iter().any(|t| text(2).starts_with(t)),
        "{}",
        text(2)
    );
    let single = home
        .octet(&[
            "run",
            "--json",
            "-p",
            "Who is there?",
            "--seed",
            "4",
            "--json-schema",
            &schema.to_string(),
            "-n",
            "60",
        ])
        .json();
    assert_eq!(single["text"], text(1));
    assert_eq!(
        single["logits_hash"],
        results[1]["response"]["body"]["octet"]["logits_hash"]
    );
    assert!(choice(3)["text"].is_string());
    for (i, words) in [
        (4, "the JSON schema"),
        (5, "ignore_eos"),
        (6, "response_format"),
    ] {
        let message = results[i]["error"]["message"].as_str().unwrap();
        assert!(message.contains(words), "{message}");
    }
}

/// Tools reach the prompt, and calls come back as OpenAI's clients read them.
#[test]
fn lines_may_let_the_model_call_tools() {
    let home = Home::new();
    let model = home.write("model.gguf", scripted::model(scripted::ADDS));
    let tools: Value = serde_json::from_str(&scripted::tools()).unwrap();
    let ask = json!({"role": "user", "content": "2 + 3?"});
    let call = json!({
        "role": "assistant",
        "content": null,
        "tool_calls": [{"id": "call00000", "type": "function", "function": {
            "name": "add", "arguments": "{\"a\": 2, \"b\": 3}",
        }}],
        "refusal": null,
    });
    let five = json!({"role": "tool", "tool_call_id": "call00000", "content": "5"});
    let openai = |body: Value| json!({"url": "/v1/chat/completions", "body": body});
    let lines = [
        openai(json!({"messages": [ask], "tools": tools, "tool_choice": "auto"})),
        json!({"prompt": "2 + 3?", "tools": tools}),
        openai(json!({"messages": [ask, call, five], "tools": tools})),
        openai(json!({"messages": [ask, call, five, ask], "tools": tools})),
        openai(json!({"messages": [ask], "tools": tools, "max_tokens": 2})),
        openai(json!({"messages": [ask], "tools": tools, "tool_choice": "none"})),
        openai(json!({"messages": [ask], "tools": tools, "tool_choice": "required"})),
        openai(json!({"messages": [ask], "tools": {"a": 1}})),
        openai(json!({"messages": [ask], "tools": [{"function": {"name": "a b"}}]})),
        json!({"prompt": "2 + 3?", "raw": true, "tools": tools}),
        json!({"prompt": "2 + 3?", "regex": "a", "tools": tools}),
    ];
    home.write("in.jsonl", lines.map(|l| l.to_string()).join("\n"));
    let out = batch(&home, &["-m", &model, "--temp", "0"]);
    assert_eq!(out.code, Some(1), "{}", out.stderr);
    let results = json_lines(&fs::read(home.path("out.jsonl")).unwrap());
    let choice = |i: usize| &results[i]["response"]["body"]["choices"][0];
    for i in [0, 1] {
        assert_eq!(choice(i)["message"], call);
        assert_eq!(choice(i)["finish_reason"], "tool_calls");
    }
    assert_eq!(choice(2)["message"]["content"], "It is five.");
    assert_eq!(choice(2)["finish_reason"], "stop");
    // A later call has an id of its own.
    let id = &choice(3)["message"]["tool_calls"][0]["id"];
    assert_eq!(id, "call00001");
    // Half a call, and one that nobody asked for, are text.
    for (i, text, finish) in [
        (4, "[{\"name\": \"add\",", "length"),
        (
            5,
            "[{\"name\": \"add\", \"arguments\": {\"a\": 2, \"b\": 3}}]",
            "stop",
        ),
    ] {
        let said = choice(i)["message"]["content"].as_str().unwrap();
        assert_eq!(
            (said.trim(), &choice(i)["finish_reason"]),
            (text, &json!(finish))
        );
        assert!(choice(i)["message"].get("tool_calls").is_none());
    }
    let message = |i: usize| results[i]["error"]["message"].as_str().unwrap();
    for (i, words) in [
        (6, "tool_choice (expected auto or none, found \"required\")"),
        (7, "tools (expected a list of tools"),
        (8, "a function's name"),
        (9, "tools (expected none for a text"),
        (10, "tools (expected none beside"),
    ] {
        assert!(message(i).contains(words), "{}", message(i));
    }
    // The demo model's format has no tools.
    let out = batch(&home, &["--force", "-n", "1"]);
    assert_eq!(out.code, Some(1));
    let results = json_lines(&fs::read(home.path("out.jsonl")).unwrap());
    let message = results[0]["error"]["message"].as_str().unwrap();
    assert!(message.contains("found Mistral V1"), "{message}");
}

/// Whoever joins results to requests by their names must not get two for one, also after an interruption.
#[test]
fn a_name_is_given_once() {
    let home = Home::new();
    let line = |name: &str| format!("{{\"custom_id\":{name},\"prompt\":\"Once\",\"predict\":1}}\n");
    let names = [
        "\"a\"", "\"b\"", "\"a\"", "null", "null", "\"b\"", "\"c\"", "\"a\"",
    ];
    let text: String = names.iter().map(|name| line(name)).collect();
    home.write("in.jsonl", &text);
    let out = batch(&home, &["--parallel", "3"]);
    assert_eq!(out.code, Some(1), "{}", out.stderr);
    let whole = fs::read(home.path("out.jsonl")).unwrap();
    let results = json_lines(&whole);
    let failed = |r: &Value| r["error"]["message"].as_str().map(String::from);
    let same =
        |n: usize, first: usize| Some(format!("line {n}: line {first} has the same custom_id"));
    assert_eq!(
        results.iter().map(failed).collect::<Vec<_>>(),
        [
            None,
            None,
            same(3, 1),
            None,
            None,
            same(6, 2),
            None,
            same(8, 1)
        ]
    );
    assert_eq!(results[2]["custom_id"], "a");
    assert_eq!(results[2]["error"]["code"], "duplicate_custom_id");
    for done in [1, 2, 6] {
        let kept: Vec<_> = whole.split_inclusive(|b| *b == b'\n').take(done).collect();
        home.write("out.jsonl", kept.concat());
        assert_eq!(batch(&home, &["--resume"]).code, Some(1));
        assert!(fs::read(home.path("out.jsonl")).unwrap() == whole);
    }
}
