//! Tokenizers, prompts and samplers against what the official implementations give (tests/data).

use octet::chat::message::Message;
use octet::chat::template::Template;
use octet::chat::tokenizer::Tokenizer;
use octet::error::Error;
use serde_json::Value;

use crate::{data, ids};

fn lines(name: &str) -> Vec<Value> {
    let text = std::fs::read_to_string(data(name)).unwrap();
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
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

#[test]
fn demo_prompts_and_answers_have_the_reference_ids_and_text() {
    let tok = Tokenizer::from_path(&data("tokenizers/demo.tokenizer.model")).unwrap();
    let lines = lines("golden/demo_prompts.jsonl");
    assert_eq!(lines.len(), 10);
    for line in lines {
        let text = line["text"].as_str().unwrap();
        let mut got: Vec<u32> = tok.bos().into_iter().collect();
        got.extend(tok.encode(text));
        assert_eq!(got, ids(&line["ids"]), "{text:?}");
        let answer = ids(&line["greedy"]);
        let want = line["greedy_text"].as_str().unwrap();
        assert_eq!(String::from_utf8(tok.decode(&answer)).unwrap(), want);
        let mut stream = tok.stream();
        let mut streamed: String = answer.iter().map(|&id| stream.push(id)).collect();
        streamed += &stream.flush();
        assert_eq!(streamed, want);
    }
}
