//! Every place where bytes from outside come in, as a function of bytes, with small valid inputs to begin from. The mutation
//! run (`tests/mutate.rs`) and the fuzz targets (`fuzz/`) share this file.
//!
//! An entry takes any bytes and returns; what it was given is either read or refused with one short line.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock};

use octet::chat::constraint::{Compiler, Form};
use octet::chat::conversation::Conversation;
use octet::chat::jinja::JinjaTemplate;
use octet::chat::message::{Message, Role};
use octet::chat::request::{Defaults, Line, Request};
use octet::chat::sampler::SamplerOptions;
use octet::chat::saved::{ModelId, Saved};
use octet::chat::session::Session;
use octet::chat::template::Template;
use octet::chat::tokenizer::{Tokenizer, Vocab};
use octet::chat::tools::read_tools;
use octet::cli::batch::journal::{Journal, Mode};
use octet::error::{Error, Result};
use octet::gguf::imatrix::{Form as ImatrixForm, Importance};
use octet::gguf::{Gguf, Imatrix, Safetensors, Writer, safetensors};
use octet::moe::kv_file::KvFile;
use octet::moe::{Config, Kv, KvType, Machine, Model, Profile, Run, Scratch, Want};
use octet::quant::Format;
use serde_json::{Value, json};
use tempfile::TempDir;

/// A way in.
pub(crate) struct Entry {
    /// What comes in here; the fuzz target has this name.
    pub(crate) name: &'static str,
    /// Takes any bytes.
    pub(crate) run: fn(&[u8]),
    /// Small valid inputs.
    pub(crate) seeds: fn() -> Vec<Vec<u8>>,
    /// How many mutations the test suite tries: some two seconds' worth.
    pub(crate) tries: u32,
}

/// All of them.
pub(crate) const ENTRIES: &[Entry] = &[
    entry("gguf", gguf, gguf_seeds, 60_000),
    entry("safetensors", safetensors, safetensors_seeds, 60_000),
    entry("safetensors_index", index, index_seeds, 40_000),
    entry("tokenizer_model", tokenizer_model, spm_seeds, 20_000),
    entry("tokenizer_json", tokenizer_json, hf_seeds, 20_000),
    entry("chat_template", chat_template, template_seeds, 6_000),
    entry("batch_line", batch_line, batch_seeds, 30_000),
    entry("batch_results", batch_results, results_seeds, 20_000),
    entry("tools", tools, tools_seeds, 40_000),
    entry("session", session, session_seeds, 10_000),
    entry("kv_cache", kv_cache, kv_seeds, 10_000),
    entry("imatrix", imatrix, imatrix_seeds, 60_000),
    entry("profile", profile, profile_seeds, 60_000),
    entry("json_schema", json_schema, schema_seeds, 1_000),
    entry("grammar", grammar, grammar_seeds, 1_000),
    entry("regex", regex, regex_seeds, 1_000),
];

const fn entry(
    name: &'static str,
    run: fn(&[u8]),
    seeds: fn() -> Vec<Vec<u8>>,
    tries: u32,
) -> Entry {
    Entry {
        name,
        run,
        seeds,
        tries,
    }
}

/// The entry of this name.
pub(crate) fn named(name: &str) -> &'static Entry {
    let found = ENTRIES.iter().find(|entry| entry.name == name);
    found.unwrap_or_else(|| panic!("no entry is called {name}"))
}

/// What was refused is refused with one line that can be read.
fn refused(e: &Error) {
    let line = e.to_string();
    assert!(!line.contains(char::is_control), "{line:?}");
    assert!(line.len() < 4096, "{} bytes: {line:.200}", line.len());
}

fn check<T>(result: Result<T>) -> Option<T> {
    result.inspect_err(refused).ok()
}

/// A folder in memory, where the system has such a thing: one for each thread.
fn scratch(name: &str) -> PathBuf {
    thread_local! {
        static FOLDER: TempDir = {
            let memory = Path::new("/dev/shm");
            match memory.is_dir() {
                true => TempDir::new_in(memory).unwrap(),
                false => TempDir::new().unwrap(),
            }
        };
    }
    FOLDER.with(|folder| folder.path().join(name))
}

/// A file with these bytes. Nobody has the one before still open: it is written over, which takes half the time of a new one.
fn file(name: &str, bytes: &[u8]) -> PathBuf {
    let path = scratch(name);
    let mut options = fs::OpenOptions::new();
    options.write(true).create(true).truncate(false);
    let mut file = options.open(&path).unwrap();
    file.write_all(bytes).unwrap();
    file.set_len(bytes.len() as u64).unwrap();
    path
}

// ---------------------------------------------------------------------------------------------
// Models

pub(crate) fn gguf(bytes: &[u8]) {
    let path = file("model.gguf", bytes);
    let Some(model) = check(Gguf::open(&path)) else {
        return;
    };
    for (i, (key, value)) in model.metadata().enumerate() {
        assert!(model.get(key).is_some());
        let _ = (value.to_string(), value.to_json());
        // One of them each time: refusing most keys five times would be most of the work.
        match i % 6 {
            0 => drop(check(model.get_u32(key))),
            1 => drop(check(model.get_u64(key))),
            2 => drop(check(model.get_f32(key))),
            3 => drop(check(model.get_str(key))),
            4 => drop(check(model.get_bool(key))),
            _ => drop(check(model.get_array(key))),
        }
    }
    for t in model.tensors() {
        assert_eq!(model.bytes(t).len() as u64, t.bytes);
        let _ = model.bytes(t).iter().map(|b| u64::from(*b)).sum::<u64>();
    }
    if let Some(config) = check(Config::read(&model)) {
        let _ = config.warnings();
        check(octet::moe::weights::Weights::load(&model, &config));
    }
    check(Tokenizer::from_gguf(&model));
}

pub(crate) fn gguf_seeds() -> Vec<Vec<u8>> {
    // Every type of value, and tensors of several types.
    let mut w = Writer::new();
    w.put("general.architecture", "llama")
        .put("a.u8", 200u8)
        .put("a.i16", -30_000i16)
        .put("a.u64", u64::MAX)
        .put("a.f32", 1e-5f32)
        .put("a.f64", 1e-300)
        .put("a.bool", true)
        .put("b.strs", ["<unk>", "<s>", "", "\u{2581}the"])
        .put("b.i32s", vec![1, -2, 3])
        .put("b.none", Vec::<u64>::new())
        .put("b.nested", vec![vec![vec![1u16, 2], vec![]], vec![vec![3]]]);
    w.tensor("token_embd.weight", Format::Q4_K as u32, &[256, 2])
        .tensor("norm.weight", Format::F32 as u32, &[5])
        .tensor("experts.weight", Format::Q4_0 as u32, &[32, 2, 2]);
    vec![zeros(w), small_model(), in_pieces(0), in_pieces(1)]
}

/// A file of these tensors, with nothing in them.
fn zeros(w: Writer) -> Vec<u8> {
    let mut stream = w.start("seed", Vec::new()).unwrap();
    while let Some(t) = stream.current() {
        let bytes = vec![0; t.bytes as usize];
        stream.write(&bytes).unwrap();
    }
    stream.finish().unwrap()
}

/// One of two files of a split model.
fn in_pieces(no: u16) -> Vec<u8> {
    let mut w = Writer::new();
    w.put("split.no", no)
        .put("split.count", 2u16)
        .put("split.tensors.count", 2i32);
    w.tensor(&format!("t{no}"), Format::F32 as u32, &[1]);
    zeros(w)
}

/// The smallest Mixtral that can be opened: small inputs are tried faster.
fn small_model() -> Vec<u8> {
    const D: u64 = 4;
    let mut w = Writer::new();
    w.put("general.architecture", "llama")
        .put("llama.context_length", 64u32)
        .put("llama.embedding_length", D as u32)
        .put("llama.block_count", 1u32)
        .put("llama.feed_forward_length", D as u32)
        .put("llama.attention.head_count", 2u32)
        .put("llama.attention.head_count_kv", 1u32)
        .put("llama.attention.layer_norm_rms_epsilon", 1e-5f32)
        .put("llama.expert_count", 2u32)
        .put("llama.expert_used_count", 1u32)
        .put("tokenizer.ggml.model", "llama")
        .put("tokenizer.ggml.tokens", ["<unk>", "<s>", "</s>", "a"])
        .put("tokenizer.ggml.scores", [0f32, 0.0, 0.0, -1.0])
        .put("tokenizer.ggml.token_type", [2i32, 3, 3, 1])
        .put("tokenizer.chat_template", "{{ messages[0].content }}");
    let mut tensor = |name: &str, shape: &[u64]| {
        w.tensor(&format!("{name}.weight"), Format::F32 as u32, shape);
    };
    tensor("token_embd", &[D, 4]);
    for (name, shape) in [
        ("attn_norm", &[D][..]),
        ("attn_q", &[D, D]),
        ("attn_k", &[D, D / 2]),
        ("attn_v", &[D, D / 2]),
        ("attn_output", &[D, D]),
        ("ffn_norm", &[D]),
        ("ffn_gate_inp", &[D, 2]),
        ("ffn_gate_exps", &[D, D, 2]),
        ("ffn_up_exps", &[D, D, 2]),
        ("ffn_down_exps", &[D, D, 2]),
    ] {
        tensor(&format!("blk.0.{name}"), shape);
    }
    tensor("output_norm", &[D]);
    zeros(w)
}

#[test]
fn the_small_model_is_one() {
    let path = file("small.gguf", &small_model());
    let model = Gguf::open(&path).unwrap();
    let config = Config::read(&model).unwrap();
    octet::moe::weights::Weights::load(&model, &config).unwrap();
    Tokenizer::from_gguf(&model).unwrap();
}

pub(crate) fn safetensors(bytes: &[u8]) {
    let path = file("model.safetensors", bytes);
    if let Some(all) = check(Safetensors::open(&path)) {
        let len = bytes.len() as u64;
        for entry in all.tensors().values() {
            assert!(entry.offset + entry.bytes <= len);
        }
    }
}

fn shard(header: &Value, data: usize) -> Vec<u8> {
    let header = header.to_string();
    let mut out = (header.len() as u64).to_le_bytes().to_vec();
    out.extend_from_slice(header.as_bytes());
    out.resize(out.len() + data, 1);
    out
}

pub(crate) fn safetensors_seeds() -> Vec<Vec<u8>> {
    let some = json!({
        "__metadata__": {"format": "pt"},
        "model.norm.weight": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
        "lm_head.weight": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [16, 28]},
    });
    vec![shard(&some, 28), shard(&json!({}), 0)]
}

pub(crate) fn index(bytes: &[u8]) {
    let folder = scratch("folder");
    fs::create_dir_all(&folder).unwrap();
    fs::write(folder.join(safetensors::INDEX), bytes).unwrap();
    let shard_file = folder.join("model-00001-of-00001.safetensors");
    if !shard_file.is_file() {
        fs::write(shard_file, &safetensors_seeds()[0]).unwrap();
    }
    check(Safetensors::open_folder(&folder));
}

pub(crate) fn index_seeds() -> Vec<Vec<u8>> {
    let shard = "model-00001-of-00001.safetensors";
    let all = json!({"metadata": {"total_size": 28}, "weight_map": {
        "model.norm.weight": shard, "lm_head.weight": shard,
    }});
    let other = json!({"weight_map": {"model.norm.weight": "other.safetensors"}});
    vec![all.to_string().into(), other.to_string().into()]
}

pub(crate) fn imatrix(bytes: &[u8]) {
    let path = file("imatrix", bytes);
    let Some(found) = check(Imatrix::read(&path)) else {
        return;
    };
    for (name, entry) in &found.entries {
        assert_eq!(entry.columns().len(), entry.sums.len());
        check(found.of(&path, name, &[entry.sums.len() as u64]));
    }
    assert!(found.unseen().count() < bytes.len());
}

pub(crate) fn imatrix_seeds() -> Vec<Vec<u8>> {
    let mut some = Imatrix {
        datasets: vec!["text".into()],
        chunks: 2,
        chunk_size: 8,
        ..Imatrix::default()
    };
    let (sums, counts) = (vec![1.0, 2.0, 0.5, 4.0], vec![3, 5]);
    let entry = |sums: Vec<f32>, counts| Importance { sums, counts };
    some.entries
        .insert("blk.0.ffn_up_exps.weight".into(), entry(sums, counts));
    some.entries
        .insert("output.weight".into(), entry(vec![0.0, 9.0], vec![8]));
    [ImatrixForm::Gguf, ImatrixForm::Dat]
        .map(|form| {
            let mut out = Vec::new();
            some.write(form, Path::new("seed"), &mut out).unwrap();
            out
        })
        .into()
}

pub(crate) fn profile(bytes: &[u8]) {
    let path = file("profile.json", bytes);
    if let Some(profile) = check(Profile::read(&path)) {
        assert_eq!(profile.shares().len(), profile.n_layer * profile.n_expert);
        let _ = (
            profile.held(1.5),
            profile.mean_reuse(),
            profile.mean_recall(),
        );
        let _ = profile.to_json();
    }
}

pub(crate) fn profile_seeds() -> Vec<Vec<u8>> {
    let some = json!({
        "format": "octet-profile", "version": 1, "model": "00ff", "name": "m.gguf",
        "n_layer": 2, "n_expert": 3, "n_used": 2, "tokens": 4,
        "counts": [[4, 4, 0], [2, 3, 3]], "reuse": [1.0, 0.5], "recall": [null, 0.75],
    });
    vec![some.to_string().into()]
}

// ---------------------------------------------------------------------------------------------
// Vocabularies

fn use_vocabulary(vocab: Result<Vocab>) {
    let tokenizer = vocab.and_then(|vocab| Tokenizer::new(vocab, Path::new("tokenizer")));
    let Some(tokenizer) = check(tokenizer) else {
        return;
    };
    for text in [
        "",
        " the cat",
        "a\u{0}\u{FFFD}\u{1F98A} <s>[INST]",
        "\n\n  the",
    ] {
        let ids = tokenizer.raw_prompt(text);
        assert!(ids.iter().all(|id| (*id as usize) < tokenizer.len()));
        let _ = tokenizer.decode(&ids);
        let mut stream = tokenizer.stream();
        let said: String = ids.iter().map(|id| stream.push(*id)).collect();
        let _ = said + &stream.flush();
    }
    let _ = (tokenizer.stop_ids(), tokenizer.decode(&[u32::MAX]));
}

pub(crate) fn tokenizer_model(bytes: &[u8]) {
    use_vocabulary(Vocab::from_spm(bytes, Path::new("tokenizer.model")));
}

pub(crate) fn tokenizer_json(bytes: &[u8]) {
    use_vocabulary(Vocab::from_hf_json(bytes, Path::new("tokenizer.json")));
}

/// Pieces with their kinds (2 unknown, 3 control, 4 user-defined, 6 byte).
const PIECES: &[(&str, u8)] = &[
    ("<unk>", 2),
    ("<s>", 3),
    ("</s>", 3),
    ("<0x41>", 6),
    ("\u{2581}", 1),
    ("t", 1),
    ("h", 1),
    ("e", 1),
    ("th", 1),
    ("the", 1),
    ("\u{2581}the", 1),
    ("\n\n", 4),
];

pub(crate) fn spm_seeds() -> Vec<Vec<u8>> {
    // A protobuf: pieces (field 1), the trainer's model type (2: 3 = BPE), the normalizer (3).
    let field = |number: u8, bytes: &[u8]| [&[number << 3 | 2, bytes.len() as u8], bytes].concat();
    let mut out = Vec::new();
    for (i, (text, kind)) in PIECES.iter().enumerate() {
        let score = -(i as f32);
        let parts = [
            field(1, text.as_bytes()),
            [&[0x15][..], &score.to_le_bytes()].concat(),
            vec![0x18, *kind],
        ];
        out.extend(field(1, &parts.concat()));
    }
    out.extend(field(2, &[0x18, 2]));
    out.extend(field(3, &[0x18, 1, 0x20, 0, 0x28, 1]));
    vec![out]
}

pub(crate) fn hf_seeds() -> Vec<Vec<u8>> {
    let ids = PIECES.iter().enumerate();
    let vocab: serde_json::Map<String, Value> = ids
        .map(|(i, (text, _))| (text.to_string(), i.into()))
        .collect();
    let with = |merges: Value| {
        let all = json!({
            "added_tokens": [
                {"id": 0, "content": "<unk>", "special": true},
                {"id": 1, "content": "<s>", "special": true},
                {"id": 2, "content": "</s>", "special": true},
                {"id": 11, "content": "\n\n", "special": false},
            ],
            "normalizer": {"type": "Sequence", "normalizers": [
                {"type": "Prepend", "prepend": "\u{2581}"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "\u{2581}"},
            ]},
            "pre_tokenizer": null,
            "model": {
                "type": "BPE", "unk_token": "<unk>", "byte_fallback": true, "vocab": vocab, "merges": merges,
            },
        });
        all.to_string().into_bytes()
    };
    vec![
        with(json!(["t h", "th e", "\u{2581} the"])),
        with(json!([["t", "h"], ["th", "e"], ["\u{2581}", "the"]])),
    ]
}

// ---------------------------------------------------------------------------------------------
// What needs a model's vocabulary, or its shape

// Apart from each other, so that a fuzz target links what it needs.

/// The demo model that ships with the program.
static FILE: LazyLock<Gguf> = LazyLock::new(|| {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let folders = [here, here.parent().unwrap_or(here)];
    let models = folders.map(|folder| folder.join("models/demo-Q4_K_M.gguf"));
    let path = models.iter().find(|path| path.is_file());
    Gguf::open(path.unwrap_or_else(|| panic!("the demo model is not in {models:?}"))).unwrap()
});

static IDENTITY: LazyLock<[u8; 32]> = LazyLock::new(|| FILE.identity());

static MODEL: LazyLock<Model> =
    LazyLock::new(|| Model::open(&FILE, Machine::new(1, None).unwrap()).unwrap());

static TOKENIZER: LazyLock<Arc<Tokenizer>> =
    LazyLock::new(|| Arc::new(Tokenizer::from_gguf(&FILE).unwrap()));

static TEMPLATE: LazyLock<Template> = LazyLock::new(|| Template::choose(&TOKENIZER, None).unwrap());

static COMPILER: LazyLock<Compiler> =
    LazyLock::new(|| Compiler::new(&TOKENIZER, &TOKENIZER.stop_ids()).unwrap());

/// A conversation with everything that templates look at.
static TALK: LazyLock<(Vec<Message>, Vec<Value>)> = LazyLock::new(|| {
    let call = json!({"id": "abcdefghi", "type": "function",
        "function": {"name": "add", "arguments": "{\"a\": 1}"}});
    let messages = json!([
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "</s> what is <s>?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "3", "tool_call_id": "abcdefghi"},
        {"role": "assistant", "content": "Three."},
        {"role": "user", "content": "Thanks"},
    ]);
    let tools = serde_json::from_str(&tools_text()).unwrap();
    (Message::list_from_json(&messages).unwrap(), tools)
});

pub(crate) fn chat_template(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else {
        return;
    };
    let Some(template) = check(JinjaTemplate::new(text, &TOKENIZER)) else {
        return;
    };
    let template = Template::Jinja(Box::new(template));
    let (messages, tools) = &*TALK;
    check(template.encode(&TOKENIZER, messages, Some(tools)));
    check(template.encode(&TOKENIZER, &messages[1..2], None));
}

pub(crate) fn template_seeds() -> Vec<Vec<u8>> {
    [
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}\
         {% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set system = messages[0].content | trim %}\
         {% set loop_messages = messages[1:] %}{% else %}{% set loop_messages = messages %}{% endif %}\
         {% for message in loop_messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\
         {{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}{{ eos_token ~ system }}",
        "{% macro show(x) -%}{% if x is mapping %}{% for k, v in x.items() %}{{ k }}={{ show(v) }};{% endfor %}\
         {% else %}{{ x | tojson(indent=2) }}{% endif %}{%- endmacro %}{{ show(tools[0]) }}{{ tools | tojson }}",
        "{% set ns = namespace(n=0, text='') %}{% for i in range(9) %}{% set ns.n = ns.n + i * 2 %}\
         {% set ns.text = ns.text ~ i ~ ',' %}{% if ns.n > 20 %}{% break %}{% endif %}{% endfor %}\
         {{ ns.text.split(',') | join('-') | replace('-', '+') | upper }}{{ '%s' % ns.n if false }}\
         {{ strftime_now('%d %b %Y') }}{% generation %}x{% endgeneration %}",
        "{{ messages | map(attribute='content') | list | length }}{{ messages | selectattr('role', 'equalto', 'user') \
         | list | tojson }}{{ 'a' * 3 }}{{ [1, 2] + [3] }}{{ {'a': 1}.get('a') }}{{ 'x'.strip().title().ljust(4) }}",
    ]
    .map(|text| text.as_bytes().to_vec())
    .into()
}

pub(crate) fn batch_line(bytes: &[u8]) {
    let defaults = Defaults {
        system: None,
        raw: false,
        max_tokens: None,
        stops: Vec::new(),
        ignore_ends: false,
        form: None,
        sampling: SamplerOptions::default(),
    };
    let Some(value) =
        check(octet::bounded::json(bytes).map_err(|e| Error::request("the line", "JSON", e)))
    else {
        return;
    };
    let line = Line::new(&value);
    let Some(body) = check(line.body) else { return };
    let n_vocab = TOKENIZER.len();
    check(Request::new(
        &body, &defaults, &TOKENIZER, &TEMPLATE, n_vocab,
    ));
}

pub(crate) fn batch_seeds() -> Vec<Vec<u8>> {
    [
        json!({"prompt": "Once", "temperature": 0, "max_tokens": 5, "seed": 7, "custom_id": "a", "raw": true,
               "stop": ["\n"], "logit_bias": {"5": -1, "6": 2.5}, "dry_sequence_breaker": ["x"]}),
        json!({"custom_id": "b", "method": "POST", "url": "/v1/chat/completions", "body": {
            "model": "m", "messages": [{"role": "user", "content": "Hi"}], "logprobs": true, "top_logprobs": 3,
            "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "integer"}}}}}),
        json!({"custom_id": "c", "method": "POST", "url": "/v1/completions", "body": {"prompt": [1, 5, 9], "n": 1}}),
        json!({"messages": [
            {"role": "system", "content": "s"},
            {"role": "user", "content": [{"type": "text", "text": "u"}]},
            {"role": "assistant", "content": "x", "prefix": true}], "top_k": 3, "samplers": "top_k;temperature"}),
    ]
    .map(|line| line.to_string().into_bytes())
    .into()
}

pub(crate) fn batch_results(bytes: &[u8]) {
    let path = file("out.jsonl", bytes);
    let _ = fs::remove_file(scratch("out.jsonl.ahead"));
    let mode = Mode {
        resume: true,
        force: false,
        unordered: false,
        settings: 0xabc,
        most_lines: 1 << 20,
    };
    if let Some((journal, finished)) = check(Journal::open(&path, mode)) {
        assert!(finished.lines <= bytes.len() as u64);
        drop(journal);
        // What is no whole result is cut off, and nothing else.
        assert!(bytes.starts_with(&fs::read(&path).unwrap()));
    }
}

pub(crate) fn results_seeds() -> Vec<Vec<u8>> {
    let line = |n: u64| {
        format!(
            "{{\"id\":\"batch_req_000000000abc_{n}_00000000000{n}\",\"custom_id\":null,\"response\":null,\"error\":null}}\n"
        )
    };
    vec![
        (line(1) + &line(3)).into(),
        (line(2) + "{\"id\":\"batch_req_0").into(),
    ]
}

pub(crate) fn tools(bytes: &[u8]) {
    check(read_tools(&file("tools.json", bytes)));
}

fn tools_text() -> String {
    json!([{"type": "function", "function": {
        "name": "add",
        "description": "Adds two numbers.",
        "parameters": {"type": "object", "properties": {"a": {"type": "number", "minimum": 0},
            "b": {"anyOf": [{"type": "string", "pattern": "^[a-z]+$"}, {"enum": [1, null]}]}}, "required": ["a"]}
    }}])
    .to_string()
}

pub(crate) fn tools_seeds() -> Vec<Vec<u8>> {
    vec![tools_text().into()]
}

fn model_id() -> ModelId {
    ModelId {
        name: "demo".into(),
        hash: *IDENTITY,
    }
}

/// Removes the session files that a try has left.
fn clear(prefix: &str) {
    let folder = scratch("");
    for entry in fs::read_dir(folder).unwrap().flatten() {
        if entry.file_name().to_string_lossy().starts_with(prefix) {
            let _ = fs::remove_file(entry.path());
        }
    }
}

pub(crate) fn session(bytes: &[u8]) {
    let mut session = Session::new(&MODEL, KvType::F16, 64, 8);
    let path = file("talk.chat", bytes);
    if let Some((mut saved, resumed)) = check(Saved::open(&path, &mut session, &model_id())) {
        assert!(resumed.conversation.left_out() <= resumed.conversation.len());
        check(saved.save(&resumed.conversation, &session));
    }
    clear("talk.chat");
}

pub(crate) fn session_seeds() -> Vec<Vec<u8>> {
    let mut conversation = Conversation::new(Some("Be brief.".into()));
    let mut call = Message::new(Role::Assistant, "");
    call.tool_calls = TALK.0[2].tool_calls.clone();
    conversation.messages = vec![
        Message::new(Role::User, "Hi \u{1F98A}\n"),
        call,
        Message::new(Role::User, "Go on"),
        Message::new(Role::Assistant, "Yes."),
    ];
    let mut session = Session::new(&MODEL, KvType::F16, 64, 8);
    let path = scratch("talk.chat");
    let (mut saved, _) = Saved::open(&path, &mut session, &model_id()).unwrap();
    saved.save(&conversation, &session).unwrap();
    let bytes = fs::read(&path).unwrap();
    clear("talk.chat");
    vec![bytes]
}

pub(crate) fn kv_cache(bytes: &[u8]) {
    let path = file("talk.kv", bytes);
    let mut kv = Kv::new(&MODEL.config, KvType::F16, 100);
    let opened = KvFile::open(&path, &kv, &IDENTITY);
    let Some(mut opened) = check(opened) else {
        return;
    };
    if let Some(loaded) = check(opened.load(&mut kv)) {
        assert_eq!(kv.len(), loaded.tokens.len());
        check(opened.save(&kv, &loaded.tokens));
    }
}

pub(crate) fn kv_seeds() -> Vec<Vec<u8>> {
    let model = &*MODEL;
    [1, 3]
        .map(|n| {
            let tokens: Vec<u32> = (5..5 + n).collect();
            let mut kv = Kv::new(&model.config, KvType::F16, 100);
            let run = Run {
                kv: &mut kv,
                tokens: &tokens,
                want: Want::Last,
            };
            model.forward(&mut [run], &mut Scratch::default()).unwrap();
            let path = file("seed.kv", b"");
            let mut file = KvFile::open(&path, &kv, &IDENTITY).unwrap();
            file.save(&kv, &tokens).unwrap();
            fs::read(&path).unwrap()
        })
        .into()
}

// ---------------------------------------------------------------------------------------------
// Forms of answers

fn follow(form: Form, bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else {
        return;
    };
    let compiled = COMPILER.compile(form, "the form", text, false);
    let Some(mut constraint) = check(compiled) else {
        return;
    };
    // Some tokens that are allowed, spread over the vocabulary.
    for step in 0..8u32 {
        let Some(mask) = check(constraint.mask()) else {
            return;
        };
        let n = TOKENIZER.len() as u32;
        let from = step * 977 % n;
        let Some(id) = (from..n).chain(0..from).find(|id| mask.is_allowed(*id)) else {
            return;
        };
        if check(constraint.accept(id)).is_none() || constraint.is_complete() {
            return;
        }
        let _ = constraint.forced();
    }
}

pub(crate) fn json_schema(bytes: &[u8]) {
    follow(Form::JsonSchema, bytes);
}

pub(crate) fn schema_seeds() -> Vec<Vec<u8>> {
    [
        json!({"type": "object", "properties": {"name": {"type": "string", "maxLength": 9, "pattern": "^[A-Z]"},
            "n": {"type": "integer", "minimum": 0, "maximum": 99}}, "required": ["name"], "additionalProperties": false}),
        json!({"type": "array", "items": {"anyOf": [{"enum": ["a", 1, null]}, {"$ref": "#/definitions/x"}]},
            "minItems": 1, "maxItems": 3, "definitions": {"x": {"type": "number", "multipleOf": 0.5}}}),
        json!({"allOf": [{"type": "string"}, {"format": "date-time"}]}),
    ]
    .map(|schema| schema.to_string().into_bytes())
    .into()
}

pub(crate) fn grammar(bytes: &[u8]) {
    follow(Form::Grammar, bytes);
}

pub(crate) fn grammar_seeds() -> Vec<Vec<u8>> {
    [
        "start: \"yes\" | \"no\" WORD\nWORD: /[a-z]{1,5}/\n",
        "start: item (\",\" item)* \nitem: NUMBER | \"(\" start \")\"\nNUMBER: /[0-9]+(\\.[0-9]+)?/\n%ignore / /\n",
        "root ::= object\nobject ::= \"{\" ws ( pair ( \",\" ws pair )* )? \"}\"\npair ::= string \":\" ws value\n\
         string ::= \"\\\"\" [^\"\\\\\\x00-\\x1f]{0,9} \"\\\"\"\nvalue ::= object | string | [0-9]+\nws ::= [ \\n\\t]*\n",
    ]
    .map(|text| text.as_bytes().to_vec())
    .into()
}

pub(crate) fn regex(bytes: &[u8]) {
    follow(Form::Regex, bytes);
}

pub(crate) fn regex_seeds() -> Vec<Vec<u8>> {
    [
        "(yes|no)( [a-z]{1,5})?",
        r"\d{4}-[01]\d-\d\d(T\d\d:\d\d)?",
        r"(?i:[^\W_]+)(\s+\S+){0,3}\.?",
    ]
    .map(|text| text.as_bytes().to_vec())
    .into()
}
