//! What was probably meant: the nearest of some words, the nearest file of a folder.

use crate::disk::folder_of;
use std::path::{Path, PathBuf};

/// From here on two words are alike: one letter of five is wrong, or a beginning is all there is.
const ALIKE: f64 = 0.8;

/// The one of `words` that is most like `word`, whatever the case; the first of several. Nothing, if none is alike.
pub fn nearest<'a>(word: &str, words: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let word = word.to_lowercase();
    let mut best = None;
    let mut most = ALIKE;
    for other in words {
        let alike = strsim::jaro_winkler(&word, &other.to_lowercase());
        if alike >= most && (best.is_none() || alike > most) {
            (best, most) = (Some(other), alike);
        }
    }
    best
}

/// `did you mean …?`, if one of `words` is alike.
pub fn did_you_mean<'a>(word: &str, words: impl IntoIterator<Item = &'a str>) -> Option<String> {
    nearest(word, words).map(|other| format!("did you mean {other}?"))
}

/// The names in a folder that `wanted` wants, in order; of a very large one some.
pub fn names(folder: &Path, wanted: impl Fn(&str) -> bool) -> Vec<String> {
    const MOST: usize = 10_000;
    let entries = std::fs::read_dir(folder).into_iter().flatten().take(MOST);
    let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let mut names: Vec<String> = names.filter(|name| wanted(name)).collect();
    names.sort();
    names
}

/// The file beside a missing one that has the name most like its own.
pub fn file(path: &Path) -> Option<PathBuf> {
    let name = path.file_name()?.to_str()?;
    let names = names(folder_of(path), |name| !name.starts_with('.'));
    let near = nearest(name, names.iter().map(String::as_str))?;
    Some(path.with_file_name(near))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_that_are_alike() {
        let words = ["Q4_0", "Q4_K_S", "Q4_K_M", "Q8_0", "temperature", "top_k"];
        for (word, near) in [
            ("q4_k_m", Some("Q4_K_M")),
            ("Q4KM", Some("Q4_K_M")),
            ("Q4", Some("Q4_0")),
            ("temp", Some("temperature")),
            ("tempreature", Some("temperature")),
            ("top-k", Some("top_k")),
            ("luck", None),
            ("", None),
        ] {
            assert_eq!(nearest(word, words), near, "{word}");
        }
        assert_eq!(nearest("x", []), None);
        let said = did_you_mean("Q8-0", words);
        assert_eq!(said.as_deref(), Some("did you mean Q8_0?"));
    }

    #[test]
    fn the_nearest_file_beside_a_missing_one() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["prompt.txt", "notes.md", ".prompt.txz"] {
            std::fs::write(folder.path().join(name), "").unwrap();
        }
        let near = |name: &str| file(&folder.path().join(name));
        assert_eq!(near("promt.txt"), Some(folder.path().join("prompt.txt")));
        assert_eq!(near("zebra"), None);
    }
}
