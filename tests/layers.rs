//! Imports point only downward (the table in `src/lib.rs`).

use std::path::{Path, PathBuf};

/// Each room and the rooms it may use.
const MAY_USE: &[(&str, &[&str])] = &[
    ("readable", &[]),
    ("error", &["readable"]),
    ("bounded", &[]),
    ("disk", &["error"]),
    ("near", &["disk"]),
    ("cgroup", &[]),
    ("memory", &["cgroup"]),
    ("pool", &["error", "cgroup"]),
    ("quant", &[]),
    ("simd", &["quant", "pool"]),
    ("gguf", &["quant", "error", "bounded", "disk", "near"]),
    (
        "moe",
        &[
            "error", "bounded", "disk", "memory", "pool", "quant", "simd", "gguf",
        ],
    ),
    (
        "chat",
        &[
            "error", "readable", "bounded", "near", "disk", "gguf", "moe",
        ],
    ),
    (
        "cli",
        &[
            "error", "readable", "bounded", "near", "disk", "memory", "pool", "quant", "simd",
            "gguf", "moe", "chat",
        ],
    ),
];

fn sources(dir: &Path, out: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, out);
        } else if path.extension().is_some_and(|e| e == "rs") {
            out.push(path);
        }
    }
}

/// Every room named as `crate::room` in a line of code (comments may point anywhere).
fn rooms_used(text: &str) -> Vec<&str> {
    text.lines()
        .filter(|line| !line.trim_start().starts_with("//"))
        .flat_map(|line| line.split("crate::").skip(1))
        .map(|rest| {
            let end = rest
                .find(|c: char| !c.is_alphanumeric() && c != '_')
                .unwrap_or(rest.len());
            &rest[..end]
        })
        .collect()
}

#[test]
fn imports_point_downward() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    sources(&src, &mut files);
    let mut seen = 0;
    for file in files {
        let inside = file.strip_prefix(&src).unwrap();
        let first = inside.components().next().unwrap().as_os_str();
        let room = first.to_str().unwrap().trim_end_matches(".rs");
        let Some((_, may_use)) = MAY_USE.iter().find(|(name, _)| *name == room) else {
            assert!(
                ["lib", "main"].contains(&room),
                "{room} is a room that the table does not have"
            );
            continue;
        };
        let text = std::fs::read_to_string(&file).unwrap();
        for used in rooms_used(&text) {
            let is_room = MAY_USE.iter().any(|(name, _)| *name == used);
            let allowed = used == room || may_use.contains(&used) || !is_room;
            assert!(allowed, "{} uses crate::{used}", inside.display());
            seen += 1;
        }
    }
    assert!(seen > 50, "the test found only {seen} uses");
}
