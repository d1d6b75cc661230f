//! A model whose every word is written down, to drive what real models do too seldom or too slowly: tool calls, Markdown.
//!
//! It is a real file of the usual kind. A token's embedding is a direction of its own, attention and experts
//! add nothing, and the output head points from each token to the one that follows it.

use octet::chat::message::{Message, Role};
use octet::chat::template::Template;
use octet::chat::tokenizer::Tokenizer;
use octet::gguf::Gguf;
use octet::quant::Format;
use serde_json::{Value, json};

use crate::program::Home;
use crate::small_model::{N_VOCAB, Small, encode};

/// The control pieces of the V3 format, as the last of the vocabulary.
const MARKS: [&str; 7] = [
    "[INST]",
    "[/INST]",
    "[TOOL_CALLS]",
    "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]",
    "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
];

/// The first id that scripts may name.
const FIRST: usize = 264;

/// A model that says, after each of these pieces, the pieces behind it, and then ends. No piece may be in two places.
pub(crate) fn model(script: &[(&str, &[&str])]) -> Vec<u8> {
    let small = Small {
        n_ctx: 2048,
        n_layer: 1,
        ..Small::default()
    };
    let d = small.d_model;
    let mut file = small.file();
    let mut pieces: Vec<String> = ["<unk>", "<s>", "</s>"].map(String::from).into();
    pieces.extend((0..256).map(|b| format!("<0x{b:02X}>")));
    pieces.push("\u{2581}".to_string());
    pieces.extend((pieces.len()..FIRST).map(|i| format!("unused{i}")));
    let said = script.iter().flat_map(|(_, says)| *says);
    pieces.extend(
        said.filter(|p| !MARKS.contains(p))
            .map(|p| p.replace(' ', "\u{2581}")),
    );
    assert!(pieces.len() <= N_VOCAB - MARKS.len());
    pieces.extend((pieces.len()..N_VOCAB - MARKS.len()).map(|i| format!("unused{i}")));
    pieces.extend(MARKS.map(String::from));
    let kind = |i: usize| match i {
        0 => 2,
        1 | 2 => 3,
        3..=258 => 6,
        i if i >= N_VOCAB - MARKS.len() => 3,
        _ => 1,
    };
    let kinds: Vec<i32> = (0..N_VOCAB).map(kind).collect();

    let mut embed = vec![0.0; N_VOCAB * d];
    let mut head = vec![0.0; N_VOCAB * d];
    let id = |piece: &str| {
        let piece = piece.replace(' ', "\u{2581}");
        pieces.iter().position(|p| *p == piece).unwrap()
    };
    let mut state = 0;
    for (start, says) in script {
        let mut last = id(start);
        for next in says.iter().map(|p| id(p)).chain([2]) {
            embed[last * d + state] = 1.0;
            head[next * d + state] = 1.0;
            state += 1;
            last = next;
        }
    }
    assert!(state <= d);
    file.set("llama.rope.freq_base", 1e6f32)
        .set("tokenizer.ggml.tokens", pieces)
        .set("tokenizer.ggml.token_type", kinds);
    for (name, weights) in [("token_embd.weight", embed), ("output.weight", head)] {
        file.tensor(name).bytes = encode(Format::F32, &weights, d);
    }
    for name in ["blk.0.attn_output.weight", "blk.0.ffn_down_exps.weight"] {
        file.tensor(name).bytes.fill(0);
    }
    file.part(0, 1)
}

/// Calls a tool that adds, and tells its result.
pub(crate) const ADDS: &[(&str, &[&str])] = &[
    (
        "[/INST]",
        &[
            "[TOOL_CALLS]",
            " [{\"name\": \"add\", ",
            "\"arguments\": {\"a\": 2, \"b\": 3}}]",
        ],
    ),
    ("[/TOOL_RESULTS]", &[" It is", " five."]),
];

/// The file that declares it.
pub(crate) fn tools() -> String {
    json!([{"type": "function", "function": {
        "name": "add",
        "description": "Adds two numbers.",
        "parameters": {"type": "object", "properties": {"a": {"type": "number"}, "b": {"type": "number"}}}
    }}])
    .to_string()
}

#[test]
fn calls_are_read_from_tokens() {
    let path = crate::data("tokenizers/mixtral-8x22b-instruct.tokenizer.model");
    let tok = Tokenizer::from_path(&path).unwrap();
    let template = Template::choose(&tok, None).unwrap();
    let mark = tok.control("[TOOL_CALLS]").unwrap();
    let answer = |text: &str| {
        let mut ids = vec![mark];
        ids.extend(tok.encode(text));
        ids
    };
    let calls = |text: &str| template.calls(&tok, &answer(text), 7);
    let two = calls(r#"[{"name": "add", "arguments": {"a": 1.50, "b": [2]}}, {"name": "f-2", "arguments": "{}", "id": "x"}]"#).unwrap();
    assert_eq!(two.len(), 2);
    assert_eq!((two[0].name.as_str(), two[1].name.as_str()), ("add", "f-2"));
    assert_eq!(two[0].arguments, r#"{"a": 1.5, "b": [2]}"#);
    assert_eq!(
        (two[0].id.as_str(), two[1].id.as_str()),
        ("call00007", "call00008")
    );
    // One call without its list, and one without arguments.
    assert_eq!(calls(r#"{"name": "f"}"#).unwrap()[0].arguments, "{}");
    for broken in [
        "",
        "[]",
        "[",
        "hello",
        "3",
        "[3]",
        r#"[{"arguments": {}}]"#,
        r#"[{"name": "no such name"}]"#,
        r#"[{"name": "f", "arguments": [1]}]"#,
        r#"[{"name": "f", "arguments": {}}"#,
    ] {
        let error = calls(broken).unwrap_err().to_string();
        assert!(error.starts_with("the prompt: "), "{broken}: {error}");
    }
    // The same text without the mark is text, also if somebody typed the mark's name.
    let typed = tok.encode(r#"[TOOL_CALLS] [{"name": "add"}]"#);
    assert!(template.calls(&tok, &typed, 0).unwrap().is_empty());
    assert!(template.calls(&tok, &[], 0).unwrap().is_empty());
    // What was read makes a prompt that the format takes.
    let mut message = Message::new(Role::Assistant, "");
    message.tool_calls = two.clone();
    let mut messages = vec![Message::new(Role::User, "2 + 3?"), message];
    for call in &two {
        let mut result = Message::new(Role::Tool, "5");
        result.tool_call_id = Some(call.id.clone());
        messages.push(result);
    }
    template.encode(&tok, &messages, None).unwrap();
}

#[test]
fn marked_calls_of_finetunes_are_read() {
    let path = crate::data("tokenizers/mixtral-8x7b.tokenizer.model");
    let tok = Tokenizer::from_path(&path).unwrap();
    let text = "<|im_start|>{{ tools }}{% for m in messages %}{{ m.content }}{% endfor %}";
    let template = Template::choose(&tok, Some(text)).unwrap();
    let calls = |text: &str| template.calls(&tok, &tok.encode(text), 0);
    let said = "I add.\n<tool_call>\n{\"name\": \"add\", \"arguments\": {\"a\": 2}}\n</tool_call>\n<tool_call>{\"name\": \"f\"}";
    let found = calls(said).unwrap();
    assert_eq!(found.len(), 2);
    assert_eq!(
        (found[0].name.as_str(), found[0].arguments.as_str()),
        ("add", "{\"a\": 2}")
    );
    assert_eq!(found[1].id, "call00001");
    assert!(calls("no call").unwrap().is_empty());
    assert!(calls("<tool_call>broken").is_err());
}

/// A command that adds, as `--tool-exec` takes it.
fn adder(home: &Home) -> String {
    let script = "#!/bin/sh\nread -r line\necho \"$1 $line\" >> \"$0.log\"\necho '{\"sum\": 5}'\n";
    format!("sh {}", home.write("adder.sh", script))
}

#[test]
fn calls_run_only_when_that_was_asked_for() {
    let home = Home::new();
    let model = home.write("model.gguf", model(ADDS));
    let tools = home.write("tools.json", tools());
    let exec = adder(&home);
    let common = ["chat", "-m", &model, "--temp", "0", "--tools", &tools];
    let call = "→ add {\"a\": 2, \"b\": 3}\n";

    let run = home.octet_with(
        &[&common[..], &["--tool-exec", &exec, "--yes"]].concat(),
        "2 + 3?\nAgain?\n",
    );
    assert_eq!(run.text(), format!("{call}It is five.\n").repeat(2));
    assert!(run.stderr.contains("← {\"sum\": 5}"), "{}", run.stderr);
    let log = std::fs::read_to_string(home.path("adder.sh.log")).unwrap();
    assert_eq!(log, "add {\"a\": 2, \"b\": 3}\n".repeat(2));
    std::fs::remove_file(home.path("adder.sh.log")).unwrap();

    // The prompt with a call's result goes on where the one with the call ended: no token is read twice but the last
    // ones of two messages, which give the logits.
    let run = home.octet_with(
        &[&common[..], &["--tool-exec", &exec, "--yes"]].concat(),
        "2 + 3?\n/stats\n",
    );
    std::fs::remove_file(home.path("adder.sh.log")).unwrap();
    let said = run.text().replace([';', '\n'], " ");
    let before = |words: &str| -> usize {
        let number = said.split(words).next().unwrap().split_whitespace();
        number.last().unwrap().parse().unwrap()
    };
    let (held, read) = (before(" of "), before(" tokens read"));
    let written = before(" written");
    assert!((held - 2..=held + 2).contains(&(read + written)), "{said}");

    // Nobody is there to confirm; nobody said what runs tools. The conversation goes on.
    for more in [&["--tool-exec", exec.as_str()][..], &[]] {
        let run = home.octet_with(&[&common[..], more].concat(), "2 + 3?\nAgain?\n");
        assert_eq!(run.text(), call.repeat(2));
        assert!(
            run.stderr.contains("the call was not run"),
            "{}",
            run.stderr
        );
        assert!(!home.path("adder.sh.log").exists());
    }

    // What goes wrong with a tool is for the model to know, and for the user to see.
    for (exec, want) in [
        ("false", "exit status: 1"),
        ("no-such-program-here", "exit status: 127"),
        ("yes", "more than 1048576 bytes of output"),
    ] {
        let run = home.octet_with(
            &[&common[..], &["--tool-exec", exec, "--yes"]].concat(),
            "2 + 3?\n",
        );
        assert_eq!(run.text(), format!("{call}It is five.\n"));
        assert!(run.stderr.contains(want), "{}", run.stderr);
    }
}

#[test]
fn files_of_tools_are_checked() {
    let home = Home::new();
    let model = home.write("model.gguf", model(ADDS));
    for (text, want) in [
        ("", "list of tools"),
        ("{}", "list of tools"),
        ("[3]", "a tool"),
        (r#"[{"function": {"name": "a b"}}]"#, "a function's name"),
        (
            r#"[{"function": {"name": "f", "parameters": {"type": "int"}}}]"#,
            "JSON Schema",
        ),
    ] {
        let tools = home.write("tools.json", text);
        let run = home.octet_with(&["chat", "-m", &model, "--tools", &tools], "");
        let error = run.error(1);
        assert!(
            error.contains("tools.json: ") && error.contains(want),
            "{error}"
        );
    }
    // The demo model's format has no tools.
    let tools = home.write("tools.json", tools());
    let run = home.octet_with(&["chat", "--tools", &tools], "");
    assert!(
        run.text().is_empty() && run.stderr.contains("has no tools"),
        "{}",
        run.stderr
    );
}

#[test]
fn the_scripted_model_is_a_valid_file() {
    let home = Home::new();
    let path = home.write("model.gguf", model(ADDS));
    let file = Gguf::open(path.as_ref()).unwrap();
    let tok = Tokenizer::from_gguf(&file).unwrap();
    assert!(matches!(
        Template::choose(&tok, None).unwrap(),
        Template::V3(_)
    ));
    let shown = home.octet(&["inspect", &path, "--json"]).json();
    assert_eq!(shown["metadata"]["llama.block_count"], Value::from(1));
}
