//! The list of unsafe code in `docs/decisions.md` is complete.

use std::collections::BTreeMap;
use std::path::Path;

/// How often the word stands in the code of a text.
fn count(text: &str) -> usize {
    let code = text.lines().map(|line| line.split("//").next().unwrap());
    let words = code.flat_map(|line| line.split(|c: char| !c.is_alphanumeric() && c != '_'));
    words.filter(|word| *word == "unsafe").count()
}

fn look(path: &Path, root: &Path, found: &mut BTreeMap<String, usize>) {
    if path.is_dir() {
        for entry in std::fs::read_dir(path).unwrap() {
            look(&entry.unwrap().path(), root, found);
        }
    } else if path.extension().is_some_and(|e| e == "rs") {
        let n = count(&std::fs::read_to_string(path).unwrap());
        let name = path.strip_prefix(root).unwrap().display().to_string();
        found.extend((n > 0).then_some((name, n)));
    }
}

#[test]
fn every_file_with_unsafe_code_is_listed_with_its_reason() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut found = BTreeMap::new();
    look(&root.join("src"), root, &mut found);
    look(&root.join("tools/quantize"), root, &mut found);
    let page = std::fs::read_to_string(root.join("docs/decisions.md")).unwrap();
    // | `src/pool.rs` | 7 | reason |
    let row = |line: &str| {
        let mut cells = line.strip_prefix("| `")?.split(" | ");
        let name = cells.next()?.strip_suffix('`')?.to_string();
        let n = cells.next()?.parse().ok()?;
        let reason = cells.next()?;
        assert!(reason.len() > 40, "{name} has no reason");
        Some((name, n))
    };
    let listed: BTreeMap<String, usize> = page.lines().filter_map(row).collect();
    assert!(!listed.is_empty());
    assert_eq!(
        listed, found,
        "docs/decisions.md lists (left) other counts of `unsafe` than the source has (right)"
    );
}
