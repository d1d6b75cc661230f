//! Tokenizers, prompts and samplers against what the official implementations give (tests/data).

use std::path::{Path, PathBuf};

use octet::chat::template::{Message, Template};
use octet::chat::tokenizer::Tokenizer;
use octet::error::Error;
use serde_json::Value;

fn data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/data")
        .join(name)
}

fn lines(name: &str) -> Vec<Value> {
    let text = std::fs::read_to_string(data(name)).unwrap();
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

fn ids(value: &Value) -> Vec<u32> {
    serde_json::from_value(value.clone()).unwrap()
}

fn official() -> [(&'static str, Tokenizer); 2] {
    let load = |name: &str| Tokenizer::from_path(&data("tokenizers").join(name)).unwrap();
    [
        ("v1", load("mixtral-8x7b.tokenizer.model")),
        ("v3", load("mixtral-8x22b-instruct.tokenizer.model")),
    ]
}

#[test]
fn every_text_has_sentencepieces_ids() {
    let lines = lines("golden/tokenize.jsonl");
    assert!(lines.len() > 100);
    for (version, tok) in official() {
        for line in &lines {
            let text = line["text"].as_str().unwrap();
            assert_eq!(tok.encode(text), ids(&line[version]), "{version} {text:?}");
        }
    }
}

/// Checks one file of conversations; gives how many were compared and how many of those are refusals.
fn check_conversations(name: &str) -> (usize, usize) {
    let (mut compared, mut refused) = (0, 0);
    for (version, tok) in official() {
        let template = Template::choose(&tok, None).unwrap();
        for line in lines(name) {
            let want = &line[version];
            if want.is_null() {
                continue;
            }
            let tools = line["tools"].as_array().map(Vec::as_slice);
            let got = Message::list_from_json(&line["messages"])
                .and_then(|messages| template.encode(&tok, &messages, tools));
            compared += 1;
            let case = format!("{version} {}", line["name"]);
            if want["error"].is_string() {
                refused += 1;
                let error = got.expect_err(&case);
                assert!(matches!(error, Error::Prompt { .. }), "{case}: {error}");
            } else {
                assert_eq!(got.expect(&case), ids(&want["tokens"]), "{case}");
            }
        }
    }
    (compared, refused)
}

#[test]
fn every_conversation_has_the_official_ids() {
    let (compared, _) = check_conversations("golden/chat.jsonl");
    assert!(compared > 10, "{compared}");
}

#[test]
fn more_conversations_have_the_official_ids_or_are_refused() {
    let (compared, refused) = check_conversations("chat_more.jsonl");
    assert!(compared > 100 && refused > 20, "{compared} {refused}");
}

#[test]
fn a_demo_prompt_is_v1_by_its_template() {
    let tok = Tokenizer::from_path(&data("tokenizers/demo.tokenizer.model")).unwrap();
    let config = std::fs::read_to_string(data("tokenizers/demo.tokenizer_config.json")).unwrap();
    let config: Value = serde_json::from_str(&config).unwrap();
    let template = Template::choose(&tok, config["chat_template"].as_str()).unwrap();
    assert!(matches!(template, Template::V1));
}
