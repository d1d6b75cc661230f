//! Strangers' programs and documents get no more time, memory and stack than they may have.

use std::path::Path;
use std::time::{Duration, Instant};

use octet::bounded::{self, Exceeded, Limits};
use octet::chat::jinja::JinjaTemplate;
use octet::chat::tokenizer::{Tokenizer, Vocab};
use octet::error::Error;
use octet::gguf::Safetensors;
use octet::moe::Profile;

use crate::alloc::peak;
use crate::data;
use crate::program::Home;

#[test]
fn work_that_wants_too_much_memory_is_stopped() {
    let limits = Limits {
        time: Duration::from_secs(60),
        memory: 1 << 20,
        stack: 256 << 10,
    };
    // What is given back may be taken again.
    let enough = || (0..100).map(|i| vec![i as u8; 512 << 10][i]).sum::<u8>();
    assert!(bounded::run(limits, enough).is_ok());
    let too_much = bounded::run(limits, || vec![0u8; 2 << 20].len());
    assert_eq!(too_much, Err(Exceeded::Memory));
    let slowly = bounded::run(limits, || {
        let mut all = Vec::new();
        (0..u64::MAX).for_each(|i| all.push(i));
        all.len()
    });
    assert_eq!(slowly, Err(Exceeded::Memory));
}

/// Templates that no count of instructions stops, with a word of the error that they get; none where that depends on the machine
/// or on the engine.
const HOSTILE: &[(&str, &str)] = &[
    // Doubling a text, which takes few steps.
    (
        "{% set ns = namespace(x='0123456789') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x | length }}",
        "memory",
    ),
    (
        "{% set ns = namespace(x='0123456789') %}{% for i in range(60) %}{% set ns.x = ns.x | replace('0', ns.x) %}{% endfor %}",
        "memory",
    ),
    // Lists that contain each other: few values, and no end of what is in them.
    (
        "{% set ns = namespace(x=[1], y=[1]) %}{% for i in range(34) %}{% set ns.x = [ns.x, ns.x] %}{% set ns.y = [ns.y, ns.y] %}{% endfor %}\
         {{ ns.x == ns.y }}",
        "",
    ),
    (
        "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x | tojson }}",
        "memory",
    ),
    (
        "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
        "at most",
    ),
    // Depth, which takes stack when it is written, and when it is dropped.
    (
        "{% set ns = namespace(x=[]) %}{% for i in range(90000) %}{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x | length }}",
        "",
    ),
    (
        "{% set ns = namespace(x=[]) %}{% for j in range(9) %}{% for i in range(90000) %}{% set ns.x = [ns.x] %}{% endfor %}{% endfor %}{{ ns.x }}",
        "",
    ),
    (
        "{% set ns = namespace(x=[]) %}{% for i in range(90000) %}{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x | tojson }}",
        "",
    ),
    // Numbers that are lengths.
    ("{{ 'ab' * 9223372036854775807 }}", ""),
    ("{{ ('ab' * 100000000) | length }}", ""),
    ("{{ 'a' | indent(9223372036854775807) }}", ""),
    (
        "{{ 'a'.ljust(9999999999999) }}{{ 'a'.center(9999999999999) }}{{ 'a'.zfill(9999999999999) }}",
        "",
    ),
    ("{{ [1, 2] | batch(9223372036854775807, 0) | list }}", ""),
    ("{{ range(0, 9223372036854775807) | list | length }}", ""),
    (
        "{{ '%999999999999d' % 1 }}{{ '%999999999999d' | format(1) }}",
        "",
    ),
    ("{{ '{:>999999999999}'.format(1) }}", ""),
    ("{{ [[1]] | tojson(indent=9223372036854775807) }}", ""),
    // Functions that call themselves.
    (
        "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
        "recursion limit",
    ),
    (
        "{% macro f(x) %}{% if x %}{{ f(x - 1) }}{{ f(x - 1) }}{% endif %}{% endmacro %}{{ f(100) }}",
        "recursion limit",
    ),
    (
        "{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}",
        "",
    ),
    (
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "steps",
    ),
];

#[test]
fn hostile_templates_are_refused_in_time() {
    // By the program, as only its own allocator counts, and as a template that is stopped stays where it is.
    let home = Home::new();
    let folder = home.path("model");
    std::fs::create_dir(&folder).unwrap();
    std::fs::copy(
        data("tokenizers/demo.tokenizer.model"),
        folder.join("tokenizer.model"),
    )
    .unwrap();
    let args = [
        "tokenize",
        "--chat",
        "--json",
        "-m",
        folder.to_str().unwrap(),
    ];
    for (template, word) in HOSTILE {
        std::fs::write(folder.join("chat_template.jinja"), template).unwrap();
        let started = Instant::now();
        let line = "{\"messages\":[{\"role\":\"user\",\"content\":\"Hi\"}]}\n";
        let out = home.octet_with(&args, line);
        let took = started.elapsed();
        assert!(took < Duration::from_secs(20), "{took:?}: {template}");
        assert!(
            matches!(out.code, Some(0 | 1)),
            "{template}: {}",
            out.stderr
        );
        assert_eq!(
            out.stdout.iter().filter(|b| **b == b'\n').count(),
            1,
            "{template}"
        );
        assert!(out.stderr.contains(word), "{template}: {}", out.stderr);
        assert!(
            out.code == Some(1) || word.is_empty(),
            "{template} gives a prompt"
        );
    }
    let tokenizer = Tokenizer::from_path(&data("tokenizers/demo.tokenizer.model")).unwrap();
    // Depth in the text itself.
    for part in [
        "{% if a %}",
        "{% for a in b %}",
        "{{ (",
        "{{ [",
        "{{ {1:",
        "{{ not ",
        "{{ -",
        "{{ a.",
        "{{ a|a(",
        "{{ 1 + ",
    ] {
        let template = part.repeat((1 << 20) / part.len());
        assert!(JinjaTemplate::new(&template, &tokenizer).is_err(), "{part}");
    }
}

/// Large inputs that are made to take as much memory as they can, each with what reads it.
#[test]
fn memory_stays_in_proportion_to_documents() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("file");
    let check = |what: &str, bytes: &[u8], read: &dyn Fn(&[u8]) -> Option<Error>| {
        let (e, most) = peak(|| read(bytes));
        eprintln!(
            "{what}: {} bytes in, {most} at most: {:?}",
            bytes.len(),
            e.map(|e| e.to_string())
        );
        assert!(most <= (64 << 20) + 4 * bytes.len(), "{what}: {most} bytes");
    };
    const LEN: usize = 6 << 20;
    let fill = |start: &str, part: &str, end: &str| {
        let parts = part.repeat(LEN / part.len());
        format!("{start}{}{end}", &parts[..parts.len() - 1]).into_bytes()
    };
    for (what, json) in [
        ("zeros", fill("[", "0,", "]")),
        ("lists", fill("[", "[],", "]")),
        ("lists of one", fill("[", "[0],", "]")),
        ("objects of one", fill("[", "{\"\":0},", "]")),
        ("text", fill("[\"", "0,", "\"]")),
        ("names", {
            let names: Vec<String> = (0..LEN / 10).map(|i| format!("\"{i}\":0")).collect();
            format!("{{{}}}", names.join(",")).into_bytes()
        }),
    ] {
        check(what, &json, &|bytes| {
            Vocab::from_hf_json(bytes, Path::new("x")).err()
        });
        check(what, &json, &|bytes| {
            let len = (bytes.len() as u64).to_le_bytes();
            std::fs::write(&path, [&len, bytes].concat()).unwrap();
            Safetensors::open(&path).err()
        });
        check(what, &json, &|bytes| {
            std::fs::write(&path, bytes).unwrap();
            Profile::read(&path).err()
        });
    }
    let spm = |piece: &dyn Fn(u32) -> Vec<u8>, n: u32| {
        let mut bytes: Vec<u8> = (0..n)
            .flat_map(|i| [&[0x0a, piece(i).len() as u8][..], &piece(i)].concat())
            .collect();
        // Byte-pair encoding, and no normalization.
        bytes.extend([0x12, 2, 0x18, 2, 0x1a, 6, 0x18, 1, 0x20, 0, 0x28, 1]);
        bytes
    };
    let read = |bytes: &[u8]| {
        let vocab = Vocab::from_spm(bytes, Path::new("x"));
        vocab
            .and_then(|vocab| Tokenizer::new(vocab, Path::new("x")))
            .err()
    };
    check("empty pieces", &spm(&|_| vec![], 4 << 20), &read);
    let text = |i: u32| {
        let text = format!("{i:x}");
        [&[0x0a, text.len() as u8][..], text.as_bytes()].concat()
    };
    check("short pieces", &spm(&text, 1 << 20), &read);
    check("as many pieces as may be", &spm(&text, 100_000), &read);
}
