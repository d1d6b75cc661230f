//! Answers that must have a form, from the demo model at a high temperature.

use crate::program::{DEMO, Home};
use octet::chat::constraint::{Compiler, Constraint, Form};
use octet::chat::sampler::{Sampler, SamplerOptions};
use octet::chat::session::{Finish, Limits, Session};
use octet::chat::tokenizer::Tokenizer;
use octet::gguf::Gguf;
use octet::moe::{KvType, Machine, Model};
use serde_json::Value;
use std::ops::ControlFlow;
use std::sync::Arc;

struct Demo {
    model: Model,
    tokenizer: Arc<Tokenizer>,
    compiler: Compiler,
}

impl Demo {
    fn new() -> Demo {
        let file = Gguf::open(DEMO.as_ref()).unwrap();
        let tokenizer = Arc::new(Tokenizer::from_gguf(&file).unwrap());
        Demo {
            model: Model::open(&file, Machine::new(2, None).unwrap()).unwrap(),
            compiler: Compiler::new(&tokenizer, &tokenizer.stop_ids()).unwrap(),
            tokenizer,
        }
    }

    /// Answers of the form, each with its text, how it ended and whether it was complete.
    fn answers(&self, form: Form, source: &str, n: usize) -> Vec<(String, Finish, bool)> {
        let mut session = Session::new(&self.model, KvType::F16, 2048, 512);
        let limits = Limits {
            max_tokens: Some(n),
            stop: self.tokenizer.stop_ids(),
            ..Limits::default()
        };
        let prompt = [vec![1], self.tokenizer.encode("Once upon a time there was")].concat();
        (0..6)
            .map(|seed| {
                let options = SamplerOptions {
                    temp: 1.5,
                    seed: Some(seed),
                    // The model would like to end its answer at once, half of the times.
                    logit_bias: if seed % 2 == 0 {
                        vec![(2, 50.0)]
                    } else {
                        vec![]
                    },
                    ..SamplerOptions::default()
                };
                // An answer may continue its prompt or be a text of its own.
                let continuing = seed < 3;
                let constraint = self.compiler.compile(form, "test", source, continuing);
                let mut sampler = Sampler::for_text(options, &self.tokenizer);
                sampler.constrain(Some(constraint.unwrap()));
                let mut text = match continuing {
                    true => self.tokenizer.stream_continuing(),
                    false => self.tokenizer.stream(),
                };
                let go_on = |_| ControlFlow::Continue(());
                let answer = session
                    .answer(&prompt, &mut sampler, &limits, go_on)
                    .unwrap();
                let mut said: String = answer.tokens.iter().map(|&id| text.push(id)).collect();
                said += &text.flush();
                (
                    said,
                    answer.finish,
                    sampler.constraint().unwrap().is_complete(),
                )
            })
            .collect()
    }
}

#[test]
fn constrained_json_always_parses() {
    let demo = Demo::new();
    let text = |v: &Value, most: usize| v.as_str().is_some_and(|s| s.chars().count() <= most);
    type Check = Box<dyn Fn(&Value) -> bool>;
    let cases: [(&str, Check); 4] = [
        (
            r#"{"type":"object","properties":{"name":{"type":"string","maxLength":12},"age":{"type":"integer","minimum":0,"maximum":150}},
                "required":["name","age"],"additionalProperties":false}"#,
            Box::new(move |v| {
                let age = v["age"].as_i64();
                v.as_object().unwrap().len() == 2
                    && text(&v["name"], 12)
                    && age.is_some_and(|a| (0..=150).contains(&a))
            }),
        ),
        (
            r#"{"type":"array","minItems":2,"maxItems":4,"items":{"enum":["red","green",7,null]}}"#,
            Box::new(|v| {
                let list = v.as_array().unwrap();
                let known = |v: &Value| v.is_null() || v == 7 || v == "red" || v == "green";
                (2..=4).contains(&list.len()) && list.iter().all(known)
            }),
        ),
        (
            r##"{"$defs":{"tree":{"type":"object","properties":{"leaf":{"type":"boolean"},"next":{"anyOf":[{"$ref":"#/$defs/tree"},{"type":"null"}]}},
                "required":["leaf","next"],"additionalProperties":false}},"$ref":"#/$defs/tree"}"##,
            Box::new(|v| {
                let mut v = v;
                while let Some(map) = v.as_object() {
                    assert!(map.len() == 2 && map["leaf"].is_boolean());
                    v = &map["next"];
                }
                v.is_null()
            }),
        ),
        (
            r#"{"type":"string","pattern":"^[A-Z][a-z]{2,5}-[0-9]{2}$"}"#,
            Box::new(|v| {
                let whole = regex::Regex::new("^[A-Z][a-z]{2,5}-[0-9]{2}$").unwrap();
                whole.is_match(v.as_str().unwrap())
            }),
        ),
    ];
    for (schema, check) in cases {
        for (text, finish, complete) in demo.answers(Form::JsonSchema, schema, 400) {
            assert_eq!((finish, complete), (Finish::Stop, true), "{text}");
            let value: Value =
                serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}"));
            assert!(check(&value), "{text}");
        }
    }
}

#[test]
fn grammars_and_expressions_hold_for_the_whole_answer() {
    let demo = Demo::new();
    let regex = "[a-z]{3,8} (yes|no)!|ÄÖ+";
    let whole = regex::Regex::new(&format!("^(?:{regex})$")).unwrap();
    for (text, finish, complete) in demo.answers(Form::Regex, regex, 200) {
        assert!(whole.is_match(&text) && complete, "{text:?} {finish:?}");
    }
    let lark = "start: \"(\" (start | WORD) \")\"\nWORD: /[a-z]{1,6}/\n";
    let mut depths = Vec::new();
    for (text, finish, complete) in demo.answers(Form::Grammar, lark, 400) {
        if finish == Finish::Stop {
            let word = text.trim_matches(['(', ')']);
            let depth = text.matches('(').count();
            assert_eq!(
                text,
                format!("{}{word}{}", "(".repeat(depth), ")".repeat(depth))
            );
            depths.push(depth);
        }
        assert_eq!(complete, finish == Finish::Stop);
    }
    assert!(!depths.is_empty());
}

/// Which an independent way to the same grammar says: the one in Lark that has nothing but the expression.
#[test]
fn an_expression_allows_what_its_grammar_allows() {
    let demo = Demo::new();
    let n = demo.tokenizer.len() as u32;
    let mut steps = 0;
    for regex in [
        "(yes|no)( [a-z]{1,5})?",
        r"\d{4}-[01]\d-\d\d(T\d\d:\d\d)?",
        r"(?i:[^\W_]+)(\s+\S+){0,3}\.?",
        "[^a]*ä?|b{2,}",
        "(the |a )*",
        "a\nb?\t*",
    ] {
        let compile = |form, text: &str| demo.compiler.compile(form, "test", text, true).unwrap();
        let mut direct = compile(Form::Regex, regex);
        let mut lark = compile(
            Form::Grammar,
            &format!("start: /{}/", regex.replace('\n', "\\n")),
        );
        for step in 0..12 {
            let allowed = |constraint: &mut Constraint| {
                let mask = constraint.mask().unwrap();
                (0..n).filter(|&id| mask.is_allowed(id)).collect::<Vec<_>>()
            };
            let ids = allowed(&mut direct);
            assert_eq!(ids, allowed(&mut lark), "{regex} after {step} tokens");
            assert_eq!(direct.is_complete(), lark.is_complete(), "{regex}");
            assert_eq!(direct.forced(), lark.forced(), "{regex}");
            let id = ids[step * 977 % ids.len()];
            direct.accept(id).unwrap();
            lark.accept(id).unwrap();
            steps += 1;
            if demo.tokenizer.stop_ids().contains(&id) {
                break;
            }
        }
    }
    assert!(steps >= 30, "{steps}");
}

impl Demo {
    /// Whether a grammar takes a text, token by token, as a whole.
    fn takes(&self, grammar: &str, text: &str) -> bool {
        let constraint = self.compiler.compile(Form::Grammar, "test", grammar, true);
        let mut constraint = constraint.unwrap();
        let tokens = self.tokenizer.encode_with(text, false, true);
        let all = tokens.iter().all(|&id| {
            let allowed = constraint.mask().unwrap().is_allowed(id);
            allowed && constraint.accept(id).is_ok()
        });
        all && constraint.is_complete()
    }
}

/// In GBNF a text fits if there is any way to read it, whatever the longest word would be.
#[test]
fn gbnf_is_followed_by_the_character() {
    let demo = Demo::new();
    for (gbnf, good, bad) in [
        (
            r#"root ::= [a-z]+ "x" "ab"{2}"#,
            &["axabab", "xxabab", "xababxabab"][..],
            &["xabab", "axab", "axabab!", ""][..],
        ),
        (
            r#"root ::= "ab" [c-d] | [a-z] "b" [x-z]+ "!""#,
            &["abc", "abd", "abx!", "qbzz!"],
            &["ab", "abe", "abx", "abc!"],
        ),
        (
            "root ::= item (\",\" item)*\nitem ::= [^,\\n] .? | \"(\" root \")\" # nested\n",
            &["a,b", "(a,(b,cä)),d", "a\n"],
            &["", "ab,", "abc", ",a", "\n"],
        ),
    ] {
        for text in good {
            assert!(demo.takes(gbnf, text), "{gbnf}: {text:?}");
        }
        for text in bad {
            assert!(!demo.takes(gbnf, text), "{gbnf}: {text:?}");
        }
    }
    let json = "root ::= \"{\" ws pair (\",\" ws pair)? \"}\"\npair ::= word \":\" ws num ws\n\
                word ::= \"\\\"\" [^\"\\\\\\x00-\\x1F]{1,9} \"\\\"\"\nnum ::= \"-\"? [1-9] [0-9]{0,2}\nws ::= [ \\n]?\n";
    for (text, finish, complete) in demo.answers(Form::Grammar, json, 300) {
        assert_eq!((finish, complete), (Finish::Stop, true), "{text}");
        serde_json::from_str::<Value>(&text).unwrap_or_else(|e| panic!("{e}: {text}"));
    }
}

#[test]
fn an_answer_that_is_cut_is_said_to_be() {
    let home = Home::new();
    let schema = home.write(
        "s.json",
        r#"{"type":"object","properties":{"name":{"type":"string"}},"required":["name"]}"#,
    );
    let args = [
        "run",
        "-p",
        "x",
        "--json-schema",
        &schema,
        "--seed",
        "1",
        "-n",
    ];
    let out = home.octet(&[&args[..], &["3"]].concat());
    let cut = "octet: the answer was cut before it had the form that it must have\n";
    assert!(out.code == Some(0) && out.stderr.contains(cut), "{out:?}");
    let args = ["run", "-p", "x", "--regex", "(yes|no)"];
    let out = home.octet(&args);
    assert!(["yes\n", "no\n"].contains(&out.text()) && !out.stderr.contains(cut));
    let chat = ["chat", "-n", "3", "--regex", "[a-z]{60}"];
    let out = home.octet_with(&chat, "One?\n");
    assert!(out.code == Some(0) && out.stderr.contains(cut), "{out:?}");
    // Each answer of a conversation has the form.
    let out = home.octet_with(&["chat", "--regex", "(yes|no)"], "One?\nTwo?\n");
    let lines: Vec<&str> = out.text().lines().collect();
    assert!(
        lines.len() == 2 && lines.iter().all(|l| ["yes", "no"].contains(l)),
        "{lines:?}"
    );
}

#[test]
fn a_form_that_cannot_be_used_is_one_line_that_names_the_place() {
    let home = Home::new();
    let file = |name: &str, text: &str| home.write(name, text);
    for (option, value, want) in [
        (
            "--json-schema",
            r#"{"type":"objec"}"#.to_string(),
            "schema.type",
        ),
        (
            "--json-schema",
            "{\"type\":\n 7 7}".to_string(),
            "line 2 column 4",
        ),
        (
            "--json-schema",
            r#"{"$ref":"http://x.y/z"}"#.to_string(),
            "http://x.y/z",
        ),
        (
            "--json-schema",
            home.path("none.json").display().to_string(),
            "none.json: cannot read",
        ),
        (
            "--json-schema",
            format!("{}{}", r#"{"not":"#.repeat(500), "}".repeat(500)),
            "recursion limit",
        ),
        ("--regex", "(a".to_string(), "unclosed group"),
        ("--regex", "a(?=b)".to_string(), "look-ahead"),
        (
            "--regex",
            "((a{1000}){1000}){1000}".to_string(),
            "found 1000000000 bytes of letters, once repetitions are written out",
        ),
        (
            "--regex",
            "4d{927222}".to_string(),
            "found 927223 bytes of letters",
        ),
        (
            "--json-schema",
            r#"{"type":"object","properties":{"a":{"pattern":"^4d{927222}$"}}}"#.to_string(),
            "found 927223 bytes of letters",
        ),
        (
            "--json-schema",
            r#"{"type":"object","patternProperties":{"^4d{927222}$":{}}}"#.to_string(),
            "found 927223 bytes of letters",
        ),
        (
            "--grammar",
            file("0", "start: /((a{1000}){1000}){1000}/"),
            "too many expressions",
        ),
        (
            "--regex",
            "[^\\x00-\\x{10ffff}]".to_string(),
            "no token can say",
        ),
        (
            "--grammar",
            file("1", "start: \"a\"\n  b: (\n"),
            "line 2, column",
        ),
        (
            "--grammar",
            file("2", "start: foo"),
            "unknown name: \"foo\"",
        ),
        ("--grammar", file("3", ""), "no start rule"),
        ("--grammar", file("4", "start: /a(/"), "unclosed group"),
        (
            "--grammar",
            file("5", &format!("start: {}", "(".repeat(200_000))),
            "too deeply nested",
        ),
        (
            "--grammar",
            file("6", &format!("start: /{}/", "(".repeat(200_000))),
            "invalid regex",
        ),
        (
            "--grammar",
            file("7", "start: start start start | \"a\" |\n"),
            "",
        ),
        ("--grammar", file("8", "start: \"\u{1b}[31m"), ""),
    ] {
        let out = home.octet(&["run", "-p", "x", "-n", "4", option, &value]);
        if want.is_empty() {
            // Nothing is asked for but an end.
            assert!(matches!(out.code, Some(0 | 1)), "{out:?}");
            continue;
        }
        let line = out.error(1);
        assert!(line.contains(want) && line.len() < 500, "{line}");
    }
    let out = home.octet(&["run", "-p", "x", "--regex", "a", "--json-schema", "{}"]);
    assert_eq!(out.code, Some(2));
}
