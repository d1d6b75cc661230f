//! `docs/licences.md` has every crate that octet is built from, and all of them may be used as octet is.

use std::collections::BTreeSet;

/// Licences that ask for no more than to be named.
const PERMISSIVE: &[&str] = &[
    "0BSD",
    "Apache-2.0",
    "Apache-2.0 WITH LLVM-exception",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "BSL-1.0",
    "CC0-1.0",
    "ISC",
    "MIT",
    "MIT-0",
    "Unicode-3.0",
    "Unlicense",
    "Zlib",
];

/// Whether an SPDX expression lets one choose permissive licences only. Parentheses are around choices, as in `(A OR B) AND C`.
fn is_permissive(expression: &str) -> bool {
    let mut depth = 0;
    let mut parts = vec![String::new()];
    for word in expression.replace('(', "( ").replace(')', " )").split(' ') {
        depth += i32::from(word == "(") - i32::from(word == ")");
        match word {
            "AND" if depth == 0 => parts.push(String::new()),
            "(" | ")" => {}
            _ => {
                let part = parts.last_mut().unwrap();
                part.push_str(if part.is_empty() { "" } else { " " });
                part.push_str(word);
            }
        }
    }
    let choice = |part: &str| part.split(" OR ").any(|name| PERMISSIVE.contains(&name));
    // An AND within a choice is none of the names.
    parts.iter().all(|part| choice(part))
}

fn page() -> Vec<(&'static str, Vec<&'static str>)> {
    let lines = include_str!("../docs/licences.md").lines();
    let lines = lines.filter_map(|line| line.strip_prefix("- **")?.split_once("**: "));
    lines
        .map(|(licence, crates)| (licence, crates.split(", ").collect()))
        .collect()
}

#[test]
fn every_crate_has_a_permissive_licence() {
    let page = page();
    for (licence, crates) in &page {
        assert!(is_permissive(licence), "{licence}: {}", crates.join(", "));
    }
    let lock = include_str!("../Cargo.lock");
    let value = |entry: &str, key: &str| {
        let start = format!("{key} = \"");
        let line = entry.lines().find_map(|line| line.strip_prefix(&start));
        line.map(|line| line.trim_end_matches('"').to_string())
    };
    let locked: BTreeSet<String> = lock
        .split("[[package]]")
        .filter(|entry| value(entry, "source").is_some())
        .map(|entry| {
            let [name, version] = ["name", "version"].map(|key| value(entry, key).unwrap());
            format!("{name} {version}")
        })
        .collect();
    let listed: BTreeSet<String> = page
        .iter()
        .flat_map(|(_, crates)| crates.iter().map(|c| c.to_string()))
        .collect();
    assert!(locked.len() > 100, "{locked:?}");
    let stale: Vec<_> = locked.symmetric_difference(&listed).collect();
    assert!(
        stale.is_empty(),
        "docs/licences.md is out of date (tools/licences.py writes it): {stale:?}"
    );
}

#[test]
fn expressions() {
    for (expression, permissive) in [
        ("MIT", true),
        ("MIT OR Apache-2.0", true),
        ("MIT OR GPL-3.0-only", true),
        ("GPL-3.0-only", false),
        ("MIT AND GPL-3.0-only", false),
        ("(MIT OR GPL-2.0-only) AND Unicode-3.0", true),
        ("(MIT OR Apache-2.0) AND MPL-2.0", false),
        ("Apache-2.0 WITH LLVM-exception OR Apache-2.0", true),
        ("", false),
    ] {
        assert_eq!(is_permissive(expression), permissive, "{expression}");
    }
}
