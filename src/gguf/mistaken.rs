//! What a path is that is no GGUF file, and what helps.

use crate::disk::folder_of;
use crate::near;
use std::path::Path;

/// How files are called that a download, or `quantize`, has not finished.
const UNFINISHED: [&str; 6] = [
    "part",
    "partial",
    "crdownload",
    "incomplete",
    "download",
    "aria2",
];

/// A few files are named; more are too many to choose from in a line.
const A_FEW: usize = 3;

/// Where there is none.
const GET: &str = "docs/getting-started.md says where Mixtral can be had as GGUF; `octet` by itself has a small demo model";

fn is_gguf(name: &str) -> bool {
    name.to_lowercase().ends_with(".gguf")
}

/// What may be meant by a file that is not there.
pub(super) fn missing(path: &Path) -> Option<String> {
    let folder = folder_of(path);
    let text = path.to_string_lossy();
    if ["https:", "http:", "hf:", "hf.co/", "huggingface.co/"]
        .iter()
        .any(|at| text.starts_with(at))
    {
        return Some("octet fetches nothing: download the GGUF file, then name it here".into());
    }
    if !folder.is_dir() {
        return Some(format!("there is no folder {}", folder.display()));
    }
    let name = path.file_name()?.to_str()?;
    for end in UNFINISHED {
        let other = path.with_file_name(format!("{name}.{end}"));
        if other.exists() {
            let other = other.display();
            return Some(format!(
                "{other} is there: a download that has not ended, or a file that `quantize … --resume` would go on with"
            ));
        }
    }
    // The extension, which all have, makes nothing alike.
    let stem = |name: &str| name[..name.rfind('.').unwrap_or(name.len())].to_string();
    let wanted = match is_gguf(name) {
        true => stem(name),
        false => name.to_string(),
    };
    let files = near::names(folder, is_gguf);
    let stems: Vec<String> = files.iter().map(|file| stem(file)).collect();
    if let Some(near) = near::nearest(&wanted, stems.iter().map(String::as_str)) {
        let at = stems.iter().position(|stem| stem == near)?;
        let other = path.with_file_name(&files[at]);
        return Some(format!("did you mean {}?", other.display()));
    }
    match files.len() {
        0 => Some(GET.into()),
        1..=A_FEW => Some(format!("GGUF files in that folder: {}", files.join(", "))),
        _ => None,
    }
}

/// What to do with a folder.
pub(super) fn folder(path: &Path) -> Option<String> {
    let is_part_of_model = |name: &str| name == "config.json" || name.ends_with(".safetensors");
    let files = near::names(path, |name| is_gguf(name) || is_part_of_model(name));
    let ggufs: Vec<&String> = files.iter().filter(|name| is_gguf(name)).collect();
    match ggufs[..] {
        [] if files.is_empty() => Some(GET.into()),
        [] => Some(format!("{} makes a GGUF file of it", quantize(path))),
        [only] => Some(format!("did you mean {}?", path.join(only).display())),
        [first, ..] => Some(format!(
            "name one of its {} GGUF files, such as {}",
            ggufs.len(),
            path.join(first).display()
        )),
    }
}

/// The command that makes a GGUF file of a Hugging Face folder.
fn quantize(folder: &Path) -> String {
    let whole = folder.canonicalize();
    let whole = whole.as_deref().unwrap_or(folder);
    let name = whole.file_name().and_then(|name| name.to_str());
    let file = format!("{}-Q4_K_M.gguf", name.unwrap_or("model"));
    let folder = folder.to_string_lossy();
    format!("`quantize {} {} Q4_K_M`", word(&folder), word(&file))
}

/// A word as a shell reads it.
fn word(text: &str) -> String {
    let plain = |c: char| c.is_alphanumeric() || "/._-+=:@%,\\".contains(c);
    match !text.is_empty() && !text.starts_with('-') && text.chars().all(plain) {
        true => text.to_string(),
        false => format!("'{}'", text.replace('\'', r"'\''")),
    }
}

const CONVERT: &str =
    "most models are also there as safetensors, which `quantize` reads, or as GGUF";
const OLD: &str = "look for a newer file of the model";

/// Files that people take for GGUF files: how they start, what they are and what to do.
const OTHER_FILES: &[(&[u8], &str, &str)] = &[
    (b"PK\x03\x04", "a PyTorch or zip archive", CONVERT),
    (b"\x80\x02", "a PyTorch pickle", CONVERT),
    (b"\x80\x03", "a PyTorch pickle", CONVERT),
    (b"\x80\x04", "a PyTorch pickle", CONVERT),
    (b"\x80\x05", "a PyTorch pickle", CONVERT),
    (b"lmgg", "an old GGML file", OLD),
    (b"fmgg", "an old GGMF file", OLD),
    (b"tjgg", "an old GGJT file", OLD),
    (b"algg", "an old GGLA adapter", OLD),
    (b"ggml", "an old GGML file", OLD),
    (b"ggmf", "an old GGMF file", OLD),
    (b"ggjt", "an old GGJT file", OLD),
    (b"ggla", "an old GGLA adapter", OLD),
    (
        b"FUGG",
        "a big-endian GGUF file",
        "the tool that wrote it can convert it",
    ),
    (
        b"version https://git-lfs",
        "a git-lfs pointer",
        "fetch the file itself with `git lfs pull`",
    ),
    (b"<", "a web page", "the download went wrong"),
    (b"{", "a JSON file", "the download may have gone wrong"),
    (b"\x1f\x8b", "a gzip archive", "unpack it"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive", "unpack it"),
    (b"\xfd7zXZ", "an xz archive", "unpack it"),
    (b"BZh", "a bzip2 archive", "unpack it"),
    (b"7z\xbc\xaf", "a 7-Zip archive", "unpack it"),
    (
        &[0; 4],
        "zeros",
        "the download has not ended, or went wrong",
    ),
];

/// What a file is that does not begin as GGUF does.
pub(super) fn identify(path: &Path, data: &[u8]) -> String {
    // safetensors: the length of a JSON header, then the header.
    if let Some((len, rest)) = data.split_first_chunk::<8>() {
        let len = u64::from_le_bytes(*len);
        if rest.starts_with(b"{") && len <= rest.len() as u64 {
            let folder = folder_of(path);
            let whole = folder.join("config.json").exists();
            return match whole {
                true => format!(
                    "a safetensors file; {} makes a GGUF file of it",
                    quantize(folder)
                ),
                false => "a safetensors file; `quantize` makes a GGUF file of a folder with this, the model's \
                     config.json and its tokenizer"
                    .to_string(),
            };
        }
    }
    // A page may begin with white space.
    let text = data.trim_ascii_start();
    let is = |start: &[u8]| data.starts_with(start) || text.starts_with(start);
    if let Some((_, what, hint)) = OTHER_FILES.iter().find(|(start, _, _)| is(start)) {
        return format!("{what}; {hint}");
    }
    const SHOWN: usize = 60;
    let start = &data[..data.len().min(SHOWN)];
    let start = start.utf8_chunks().next().map_or("", |chunk| chunk.valid());
    // The last character may be cut.
    let whole = start.len() >= 8 && start.len() + 4 > data.len().min(SHOWN);
    match whole && !start.contains(|c: char| c.is_control() && !c.is_whitespace()) {
        true => format!("a text; it begins {:?}", start.lines().next().unwrap_or("")),
        false => format!(
            "a file that starts with {:02x?}",
            &data[..data.len().min(4)]
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::word;

    #[test]
    fn words_for_a_shell() {
        for (text, want) in [
            ("models/x-1.gguf", "models/x-1.gguf"),
            ("my models", "'my models'"),
            ("it's", r"'it'\''s'"),
            ("$HOME", "'$HOME'"),
            ("-x", "'-x'"),
            ("", "''"),
            ("größe", "größe"),
        ] {
            assert_eq!(word(text), want);
        }
    }
}
