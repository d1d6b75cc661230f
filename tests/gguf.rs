//! GGUF files: what is written is read, the real file opens, and a hostile one is refused with a
//! word, never with a panic or a great deal of memory.

use std::fs::{self, File};
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

use octet::error::Result;
use octet::gguf::writer::Put;
use octet::gguf::{Gguf, Kind, Value, Writer};
use proptest::prelude::*;
use proptest::test_runner::RngSeed;
use tempfile::TempDir;

use crate::alloc::peak;
use crate::program::DEMO;

const F32: u32 = 0;
const Q4_0: u32 = 2;
const Q8_0: u32 = 8;
const Q4_K: u32 = 12;
const I8: u32 = 24;

/// A folder for a test's files.
struct Folder(TempDir);

impl Folder {
    fn new() -> Folder {
        Folder(TempDir::new().unwrap())
    }

    fn file(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.0.path().join(name);
        fs::write(&path, bytes).unwrap();
        path
    }

    /// Opens these bytes as a file.
    fn open(&self, bytes: &[u8]) -> Result<Gguf> {
        Gguf::open(&self.file("test.gguf", bytes))
    }

    /// The error that these bytes give.
    fn error(&self, bytes: &[u8]) -> String {
        self.open(bytes).unwrap_err().to_string()
    }
}

/// Asserts that an error says all of these.
#[track_caller]
fn says(error: &str, words: &[&str]) {
    for word in words {
        assert!(error.contains(word), "`{word}` is not in: {error}");
    }
    assert!(!error.contains('\n'), "{error}");
}

/// Reads everything a model offers.
fn read_all(g: &Gguf) {
    for (key, value) in g.metadata() {
        assert!(g.get(key).is_some());
        let _ = (value.to_string(), value.to_json());
        let _ = (g.get_u32(key), g.get_u64(key), g.get_f32(key));
        let _ = (g.get_bool(key), g.get_str(key));
        if let Some(a) = value.as_array() {
            assert_eq!(a.iter().count(), a.len());
        }
    }
    for t in g.tensors() {
        assert_eq!(g.tensor(&t.name), Some(t));
        assert_eq!(g.bytes(t).len() as u64, t.bytes);
        let _ = g
            .bytes(t)
            .iter()
            .fold(0, |sum, &b| u64::wrapping_add(sum, b.into()));
        let _ = (t.elements(), t.format(), t.type_name());
    }
}

/// A small file with metadata of every type and several tensors: its bytes and its header's size.
fn small() -> (Vec<u8>, usize) {
    let mut w = Writer::new();
    w.put("general.architecture", "llama")
        .put("a.u8", 200u8)
        .put("a.i8", -100i8)
        .put("a.u16", 60_000u16)
        .put("a.i16", -30_000i16)
        .put("a.u32", 4_000_000_000u32)
        .put("a.i32", -2_000_000_000i32)
        .put("a.u64", u64::MAX)
        .put("a.i64", i64::MIN)
        .put("a.f32", 1e-5f32)
        .put("a.f64", 1e-300)
        .put("a.bool", true)
        .put("a.str", "Märchen \u{1F98A}")
        .put("b.strs", ["<unk>", "<s>", "", "▁the"])
        .put("b.f32s", [0.5f32, -1.0, f32::NAN])
        .put("b.i32s", vec![1, -2, 3])
        .put("b.u32s", &[1u32, 2][..])
        .put("b.u8s", [1u8, 2, 3])
        .put("b.bools", [true, false])
        .put("b.none", Vec::<u64>::new())
        .put("b.nested", vec![vec![vec![1u16, 2], vec![]], vec![vec![3]]])
        .put("b.words", [["a", "b"], ["c", "d"]]);
    w.tensor("token_embd.weight", Q4_K, &[256, 3])
        .tensor("norm.weight", F32, &[5])
        .tensor("experts.weight", Q4_0, &[32, 2, 2])
        .tensor("bytes", I8, &[3, 1, 1, 2]);
    let mut stream = w.start("small", Vec::new()).unwrap();
    let header = stream.plan().header_bytes as usize;
    let mut byte = 0u8;
    while let Some(t) = stream.current() {
        let data: Vec<u8> = std::iter::repeat_with(|| {
            byte = byte.wrapping_add(1);
            byte
        })
        .take(t.bytes as usize)
        .collect();
        stream.write(&data).unwrap();
    }
    (stream.finish().unwrap(), header)
}

/// A file put together by hand, so that it may be of any version and wrong in any way.
struct Raw {
    version: u32,
    metadata: Vec<(&'static [u8], u32, Vec<u8>)>,
    tensors: Vec<(&'static [u8], u32, Vec<u64>, u64)>,
    /// Bytes after the aligned header.
    data: usize,
}

impl Raw {
    fn new(version: u32) -> Raw {
        Raw {
            version,
            metadata: Vec::new(),
            tensors: Vec::new(),
            data: 1024,
        }
    }

    fn put(mut self, key: &'static str, kind: u32, value: impl Into<Vec<u8>>) -> Raw {
        self.metadata.push((key.as_bytes(), kind, value.into()));
        self
    }

    fn tensor(mut self, name: &'static str, type_id: u32, shape: &[u64], offset: u64) -> Raw {
        self.tensors
            .push((name.as_bytes(), type_id, shape.to_vec(), offset));
        self
    }

    /// A length or a count.
    fn count(&self, n: usize) -> Vec<u8> {
        (n as u64).to_le_bytes()[..if self.version == 1 { 4 } else { 8 }].to_vec()
    }

    /// A string value, or the bytes of one.
    fn text(&self, s: &[u8]) -> Vec<u8> {
        [self.count(s.len()), s.to_vec()].concat()
    }

    /// An array value.
    fn array(&self, kind: u32, items: &[Vec<u8>]) -> Vec<u8> {
        [
            kind.to_le_bytes().to_vec(),
            self.count(items.len()),
            items.concat(),
        ]
        .concat()
    }

    fn bytes(&self) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(self.version.to_le_bytes());
        out.extend(self.count(self.tensors.len()));
        out.extend(self.count(self.metadata.len()));
        for (key, kind, value) in &self.metadata {
            out.extend(self.text(key));
            out.extend(kind.to_le_bytes());
            out.extend(value);
        }
        for (name, type_id, shape, offset) in &self.tensors {
            out.extend(self.text(name));
            out.extend((shape.len() as u32).to_le_bytes());
            for &dim in shape {
                out.extend(self.count(dim as usize));
            }
            out.extend(type_id.to_le_bytes());
            out.extend(offset.to_le_bytes());
        }
        out.resize(out.len().next_multiple_of(32), 0);
        out.extend((0..self.data).map(|i| i as u8));
        out
    }
}

/// Two keys and two tensors in the given version.
fn by_hand(version: u32) -> Vec<u8> {
    let raw = Raw::new(version);
    let strings = raw.array(8, &[raw.text(b"a"), raw.text(b"")]);
    let numbers = raw.array(3, &[(-7i16).to_le_bytes().to_vec()]);
    let nested = raw.array(9, &[strings, numbers]);
    let name = raw.text("Märchen".as_bytes());
    raw.put("name", 8, name)
        .put("nested", 9, nested)
        .tensor("w", F32, &[3, 2], 0)
        .tensor("q", Q8_0, &[64], 32)
        .bytes()
}

#[test]
fn every_version_reads_the_same() {
    let folder = Folder::new();
    for version in 1..=3 {
        let g = folder.open(&by_hand(version)).unwrap();
        read_all(&g);
        assert_eq!(g.version(), version);
        assert_eq!(g.get_str("name").unwrap(), Some("Märchen"));
        assert_eq!(
            g.get("nested").unwrap().to_json(),
            serde_json::json!([["a", ""], [-7]])
        );
        let w = g.tensor("w").unwrap();
        assert_eq!((w.shape.as_slice(), w.bytes), (&[3, 2][..], 24));
        assert_eq!(g.bytes(w)[..], (0..24).collect::<Vec<u8>>()[..]);
        let q = g.tensor("q").unwrap();
        assert_eq!((q.type_name(), q.bytes, q.elements()), ("Q8_0", 68, 64));
        assert_eq!(g.bytes(q)[..], (32..100).collect::<Vec<u8>>()[..]);
        assert_eq!(g.bytes(q).slice(1..3)[..], [33, 34]);
        assert!(g.tensor("x").is_none() && g.get("x").is_none());
        // A copy has the newest version and equal values.
        let mut w = Writer::new();
        let copy = w.put_all(&g).start("copy", Vec::new()).unwrap();
        let folder = Folder::new();
        let copy = folder.open(&copy.finish().unwrap()).unwrap();
        assert_eq!(copy.version(), 3);
        assert!(copy.metadata().eq(g.metadata()));
    }
}

#[test]
fn every_type_of_value() {
    let folder = Folder::new();
    let g = folder.open(&small().0).unwrap();
    read_all(&g);
    let keys: Vec<&str> = g.metadata().map(|(key, _)| key).collect();
    assert_eq!(keys[..3], ["general.architecture", "a.u8", "a.i8"]);
    assert_eq!(keys.len(), 22);
    assert_eq!(g.get("a.u8"), Some(Value::U8(200)));
    assert_eq!(g.get("a.i8"), Some(Value::I8(-100)));
    assert_eq!(g.get("a.u16"), Some(Value::U16(60_000)));
    assert_eq!(g.get("a.i16"), Some(Value::I16(-30_000)));
    assert_eq!(g.get("a.u32"), Some(Value::U32(4_000_000_000)));
    assert_eq!(g.get("a.i32"), Some(Value::I32(-2_000_000_000)));
    assert_eq!(g.get("a.u64"), Some(Value::U64(u64::MAX)));
    assert_eq!(g.get("a.i64"), Some(Value::I64(i64::MIN)));
    assert_eq!(g.get("a.f32"), Some(Value::F32(1e-5)));
    assert_eq!(g.get("a.f64"), Some(Value::F64(1e-300)));
    assert_eq!(g.get("a.bool"), Some(Value::Bool(true)));
    assert_eq!(g.get("a.str"), Some(Value::Str("Märchen \u{1F98A}")));
    let array = |key| g.get_array(key).unwrap().unwrap();
    let strs: Vec<&str> = array("b.strs").strs().unwrap().collect();
    assert_eq!(strs, ["<unk>", "<s>", "", "▁the"]);
    let f32s: Vec<f32> = array("b.f32s").f32s().unwrap().collect();
    assert_eq!(f32s[..2], [0.5, -1.0]);
    assert!(f32s[2].is_nan());
    let i32s: Vec<i32> = array("b.i32s").i32s().unwrap().collect();
    assert_eq!(i32s, [1, -2, 3]);
    let u32s: Vec<u32> = array("b.u32s").u32s().unwrap().collect();
    assert_eq!(u32s, [1, 2]);
    assert!(array("b.u32s").i32s().is_none() && array("b.u32s").strs().is_none());
    assert!(array("b.none").is_empty());
    assert_eq!(array("b.none").item(), Kind::U64);
    assert_eq!(
        g.get("b.nested").unwrap().to_json(),
        serde_json::json!([[[1, 2], []], [[3]]])
    );
    assert_eq!(
        g.get("b.f32s").unwrap().to_json(),
        serde_json::json!([0.5, -1.0, null])
    );
    assert_eq!(
        g.get("b.words").unwrap().to_string(),
        "[[2 × string], [2 × string]]"
    );
}

#[test]
fn getters_convert_what_fits_and_refuse_the_rest() {
    let folder = Folder::new();
    let g = folder.open(&small().0).unwrap();
    assert_eq!(g.get_u32("a.u8").unwrap(), Some(200));
    assert_eq!(g.get_u32("a.u16").unwrap(), Some(60_000));
    assert_eq!(g.get_u64("a.u64").unwrap(), Some(u64::MAX));
    assert_eq!(g.get_f32("a.f64").unwrap(), Some(0.0));
    assert_eq!(g.get_bool("a.bool").unwrap(), Some(true));
    assert_eq!(g.get_u32("absent").unwrap(), None);
    says(
        &g.get_u32("a.u64").unwrap_err().to_string(),
        &[
            "test.gguf",
            "metadata `a.u64`",
            "4294967295",
            "found u64 1844",
        ],
    );
    says(
        &g.get_u64("a.i8").unwrap_err().to_string(),
        &["`a.i8`", "an integer of 0 or more", "found i8 -100"],
    );
    says(
        &g.get_f32("a.u8").unwrap_err().to_string(),
        &["`a.u8`", "a float", "u8 200"],
    );
    says(
        &g.get_str("b.i32s").unwrap_err().to_string(),
        &["`b.i32s`", "a string", "array [1, -2, 3]"],
    );
    assert!(g.get_bool("a.u8").is_err() && g.get_array("a.u8").is_err());
}

#[test]
fn the_demo_opens_and_is_written_again_byte_for_byte() {
    // Written by the reference implementation.
    let g = Gguf::open(Path::new(DEMO)).unwrap();
    read_all(&g);
    assert_eq!(g.get_str("general.architecture").unwrap(), Some("llama"));
    assert_eq!(g.get_u32("llama.expert_count").unwrap(), Some(8));
    assert_eq!(g.tensors().len(), 43);
    assert_eq!(g.shards().len(), 1);
    let mut w = Writer::new();
    w.put_all(&g);
    for t in g.tensors() {
        w.tensor(&t.name, t.type_id, &t.shape);
    }
    let mut stream = w.start("copy", Vec::new()).unwrap();
    assert_eq!(stream.plan().tensors, g.tensors());
    assert_eq!(stream.plan().file_bytes, g.file_bytes());
    for t in g.tensors() {
        for chunk in g.bytes(t).chunks(1000) {
            stream.write(chunk).unwrap();
        }
    }
    assert!(stream.finish().unwrap() == fs::read(DEMO).unwrap());
}

// Split files

/// The parts of a model of six tensors in three files.
fn parts() -> Vec<Vec<u8>> {
    (0..3u16)
        .map(|no| {
            let mut w = Writer::new();
            if no == 0 {
                w.put("general.architecture", "llama");
            }
            w.put("split.no", no)
                .put("split.count", 3u16)
                .put("split.tensors.count", 6i32);
            let names = [format!("t{no}.a"), format!("t{no}.b")];
            for name in &names {
                w.tensor(name, I8, &[10]);
            }
            let mut stream = w.start("part", Vec::new()).unwrap();
            for name in &names {
                stream.write_tensor(name, &[no as u8; 10]).unwrap();
            }
            stream.finish().unwrap()
        })
        .collect()
}

/// Writes the parts, but for one, and gives their paths.
fn write_parts(folder: &Folder, parts: &[Vec<u8>], without: Option<usize>) -> Vec<PathBuf> {
    (0..3)
        .map(|i| {
            let name = format!("m-0000{}-of-00003.gguf", i + 1);
            match without {
                Some(w) if w == i => folder.0.path().join(name),
                _ => folder.file(&name, &parts[i]),
            }
        })
        .collect()
}

/// The first place of some bytes.
fn find(bytes: &[u8], what: &[u8]) -> usize {
    bytes.windows(what.len()).position(|w| w == what).unwrap()
}

#[test]
fn a_split_model_opens_by_any_of_its_files() {
    let folder = Folder::new();
    let paths = write_parts(&folder, &parts(), None);
    for path in &paths {
        let g = Gguf::open(path).unwrap();
        read_all(&g);
        assert_eq!(g.path(), path);
        assert!(g.shards().eq(paths.iter().map(PathBuf::as_path)));
        assert_eq!(g.get_str("general.architecture").unwrap(), Some("llama"));
        let names: Vec<&str> = g.tensors().iter().map(|t| t.name.as_str()).collect();
        assert_eq!(names, ["t0.a", "t0.b", "t1.a", "t1.b", "t2.a", "t2.b"]);
        for t in g.tensors() {
            assert_eq!(g.bytes(t)[..], [t.shard as u8; 10]);
        }
        let size: u64 = paths.iter().map(|p| fs::metadata(p).unwrap().len()).sum();
        assert_eq!(g.file_bytes(), size);
    }
}

#[test]
fn a_split_model_that_does_not_fit_together_is_refused() {
    let folder = Folder::new();
    let good = parts();
    let no_at = |part: &[u8]| find(part, b"split.no") + 8 + 4;
    let count_at = |part: &[u8]| find(part, b"split.count") + 11 + 4;
    let total_at = |part: &[u8]| find(part, b"split.tensors.count") + 19 + 4;
    let error = |parts: &[Vec<u8>], without| {
        let paths = write_parts(&folder, parts, without);
        let error = Gguf::open(&paths[0]).unwrap_err().to_string();
        for path in paths {
            let _ = fs::remove_file(path);
        }
        error
    };
    for (i, missing) in ["m-00002-of-00003.gguf", "m-00003-of-00003.gguf"]
        .iter()
        .enumerate()
    {
        let file = format!("file {} of 3 of the split model is missing", i + 2);
        says(&error(&good, Some(i + 1)), &[missing, &file, "one folder"]);
    }
    let mut bad = good.clone();
    bad[1][no_at(&good[1])] = 2;
    says(
        &error(&bad, None),
        &["m-00002", "file 2 of 3", "file 3 of 3"],
    );
    bad[1][no_at(&good[1])] = 200;
    says(&error(&bad, None), &["m-00002", "`split.no`", "200"]);
    let mut bad = good.clone();
    bad[2][count_at(&good[2])] = 4;
    says(
        &error(&bad, None),
        &["m-00003", "file 3 of 3", "file 3 of 4"],
    );
    bad[2][count_at(&good[2])] = 1;
    says(
        &error(&bad, None),
        &["m-00003", "file 3 of 3", "file 1 of 1"],
    );
    let mut bad = good.clone();
    bad[0][total_at(&good[0])] = 7;
    says(&error(&bad, None), &["m-00001", "6 tensors", "found 7"]);
    // One part twice, under two names.
    let mut bad = good.clone();
    bad[1] = bad[2].clone();
    bad[1][no_at(&good[2])] = 1;
    says(&error(&bad, None), &["t2.a", "each name once"]);
    // A name that does not say what the file says.
    let path = folder.file("other.gguf", &good[0]);
    says(
        &Gguf::open(&path).unwrap_err().to_string(),
        &["file 1 of 3", "-00001-of-00003.gguf", "`other.gguf`"],
    );
    let path = folder.file("m-00002-of-00003.gguf", &good[0]);
    assert!(Gguf::open(&path).is_err());
}

// Things that are not files, and files that are not GGUF

#[test]
fn what_is_no_gguf_file_is_named() {
    let folder = Folder::new();
    for (start, word) in [
        (
            &b"\x10\0\0\0\0\0\0\0{\"__metadata__\":{}"[..],
            "safetensors",
        ),
        (b"PK\x03\x04rest of a zip", "PyTorch or zip"),
        (b"\x80\x02\x8a\x0al\xfc", "pickle"),
        (b"lmgg\x01\0\0\0", "GGML"),
        (b"fmgg\x01\0\0\0", "GGMF"),
        (b"tjgg\x03\0\0\0", "GGJT"),
        (b"ggjt\x03\0\0\0", "GGJT"),
        (b"algg\x01\0\0\0", "GGLA"),
        (b"FUGG\0\0\0\x03", "big-endian"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git-lfs"),
        (b"<!DOCTYPE html>", "web page"),
        (b"{\"architectures\": []}", "JSON"),
        (b"\x1f\x8b\x08", "gzip"),
        (b"abcdefgh", "a text; it begins \"abcdefgh\""),
        (b"\xff\xfeefgh", "[ff, fe, 65, 66]"),
        (b"x", "[78]"),
    ] {
        says(&folder.error(start), &["test.gguf", "a GGUF file", word]);
    }
    says(&folder.error(b""), &["a GGUF file", "an empty file"]);
    for n in 1..24 {
        let error = folder.error(&b"GGUF\x03\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0"[..n]);
        says(&error, &["inside the header", "24 bytes", &n.to_string()]);
    }
}

#[test]
fn what_is_no_file_is_named() {
    let folder = Folder::new();
    let error = |path: &Path| Gguf::open(path).unwrap_err().to_string();
    says(&error(folder.0.path()), &["a GGUF file", "a folder"]);
    let absent = folder.0.path().join("absent.gguf");
    says(
        &error(&absent),
        &["absent.gguf", "cannot open", "No such file"],
    );
    if cfg!(unix) {
        says(&error(Path::new("/dev/zero")), &["a pipe or a device"]);
        let pipe = folder.0.path().join("pipe");
        if Command::new("mkfifo")
            .arg(&pipe)
            .status()
            .is_ok_and(|s| s.success())
        {
            says(&error(&pipe), &["a pipe or a device"]);
        }
    }
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        let path = folder.file("secret.gguf", &small().0);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o0)).unwrap();
        // Nothing is forbidden to root.
        if File::open(&path).is_err() {
            says(&error(&path), &["cannot open", "denied"]);
        }
    }
}

// Headers that are wrong in one way

#[test]
fn versions_and_byte_orders() {
    let folder = Folder::new();
    let mut bytes = small().0;
    for version in [0u32, 4, 255, u32::MAX] {
        bytes[4..8].copy_from_slice(&version.to_le_bytes());
        let found = format!("found {version}");
        says(&folder.error(&bytes), &["version", "1, 2 or 3", &found]);
    }
    for version in 1..=3u32 {
        bytes[4..8].copy_from_slice(&version.to_be_bytes());
        says(&folder.error(&bytes), &["little-endian", "big-endian"]);
    }
}

#[test]
fn metadata_that_is_wrong_is_named() {
    let folder = Folder::new();
    let raw = || Raw::new(3);
    let word = |n: u32| n.to_le_bytes().to_vec();
    let text = |s: &[u8]| raw().text(s);
    let mut deep = raw().array(4, &[word(1)]);
    for depth in 2..=8 {
        deep = raw().array(9, &[deep]);
        let g = folder.open(&raw().put("deep", 9, deep.clone()).bytes());
        assert!(g.is_ok(), "{depth}: {g:?}");
        read_all(&g.unwrap());
    }
    let deeper = raw().array(9, std::slice::from_ref(&deep));
    let long_key: &'static str = "k".repeat(65536).leak();
    for (raw, words) in [
        (raw().put("deep", 9, deeper), ["`deep`", "8 deep", "more"]),
        (
            raw().put("twice", 4, word(1)).put("twice", 4, word(2)),
            ["`twice`", "once", "second"],
        ),
        (raw().put("flag", 7, [2]), ["`flag`", "0 or 1", "2"]),
        (
            raw().put("flags", 9, raw().array(7, &[vec![1], vec![9]])),
            ["`flags`", "0 or 1", "9"],
        ),
        (raw().put("odd", 13, [0; 16]), ["`odd`", "0 to 12", "13"]),
        (
            raw().put("odds", 9, raw().array(99, &[])),
            ["`odds`", "0 to 12", "99"],
        ),
        (
            raw().put("word", 8, text(b"\xff\xfe")),
            ["`word`", "UTF-8", "bytes at 48"],
        ),
        (
            raw().put("words", 9, raw().array(8, &[text(b"a"), text(b"\xc3")])),
            ["`words`", "UTF-8", "bytes at"],
        ),
        (
            raw().put(long_key, 4, word(1)),
            ["entry 1", "65535", "65536"],
        ),
        (
            raw().put("general.alignment", 4, word(0)),
            ["`general.alignment`", "power of two", "found 0"],
        ),
        (
            raw().put("general.alignment", 4, word(4)),
            ["`general.alignment`", "multiple of 8", "found 4"],
        ),
        (
            raw().put("general.alignment", 4, word(24)),
            ["`general.alignment`", "power of two", "found 24"],
        ),
        (
            raw().put("general.alignment", 8, text(b"32")),
            ["`general.alignment`", "power of two", "found \"32\""],
        ),
    ] {
        says(&folder.error(&raw.bytes()), &words);
    }
    let mut raw = raw().put("", 4, word(1));
    raw.metadata[0].0 = b"\xff";
    says(&folder.error(&raw.bytes()), &["entry 1", "UTF-8"]);
}

#[test]
fn tensors_that_are_wrong_are_named() {
    let folder = Folder::new();
    let t = |type_id, shape: &[u64], offset| Raw::new(3).tensor("t", type_id, shape, offset);
    let huge = 1u64 << 62;
    for (raw, words) in [
        (t(200, &[1], 0), ["type of tensor `t`", "knows", "id 200"]),
        (t(4, &[32], 0), ["type of tensor `t`", "knows", "id 4"]),
        (t(F32, &[], 0), ["shape of tensor `t`", "1 to 4", "found 0"]),
        (
            t(F32, &[1; 5], 0),
            ["shape of tensor `t`", "1 to 4", "found 5"],
        ),
        (
            t(F32, &[1, 0], 0),
            ["shape of tensor `t`", "of 0", "[1, 0]"],
        ),
        (t(Q4_0, &[33], 0), ["shape of tensor `t`", "of 32", "[33]"]),
        (
            t(Q4_K, &[128, 2], 0),
            ["shape of tensor `t`", "of 256", "[128"],
        ),
        (t(F32, &[huge, 4], 0), ["shape of tensor `t`", "2^63", "["]),
        (t(F32, &[huge], 0), ["shape of tensor `t`", "2^63", "["]),
        (
            t(F32, &[4], 4),
            ["offset of tensor `t`", "of 32", "found 4"],
        ),
        (
            t(F32, &[4], 1024),
            ["inside tensor `t`", "16 bytes", "found 0"],
        ),
        (
            t(F32, &[257], 0),
            ["inside tensor `t`", "1028", "found 1024"],
        ),
        (
            t(F32, &[4], u64::MAX - 31),
            ["inside tensor `t`", "16", "found 0"],
        ),
        (
            t(F32, &[9], 0).tensor("u", F32, &[1], 32),
            ["offset of tensor `u`", "the end of `t`", "found 128"],
        ),
        (
            t(F32, &[1], 32).tensor("u", F32, &[9], 0),
            ["offset of tensor `t`", "the end of `u`", "found"],
        ),
        (
            t(F32, &[1], 0).tensor("u", F32, &[1], 0),
            ["offset of tensor", "the end of", "found"],
        ),
        (
            t(F32, &[1], 0).tensor("t", F32, &[1], 32),
            ["tensor `t`", "once", "second"],
        ),
    ] {
        says(&folder.error(&raw.bytes()), &words);
    }
    let mut raw = t(F32, &[1], 0);
    raw.tensors[0].0 = b"\xff";
    says(&folder.error(&raw.bytes()), &["name of tensor 1", "UTF-8"]);
    // Gaps, any order and the very end of the file are fine.
    let raw = t(F32, &[128], 512).tensor("u", F32, &[1], 0);
    read_all(&folder.open(&raw.bytes()).unwrap());
    // A larger alignment holds for all.
    let aligned = |offset| {
        let n = 64u32.to_le_bytes();
        let raw = t(F32, &[1], offset).put("general.alignment", 4, n);
        folder.open(&raw.bytes())
    };
    assert!(aligned(64).is_ok() && aligned(32).is_err());
}

// Hostile bytes

/// Memory that opening may take: far above what these small files need, far below any count in them.
const SMALL_PEAK: usize = 256 << 10;

/// One file for many hostile variants. Its bytes are changed in place, as making a file anew for
/// each would keep the disk busy.
struct Hostile {
    folder: Folder,
    file: File,
    len: usize,
}

impl Hostile {
    fn new() -> Hostile {
        let folder = Folder::new();
        let path = folder.file("hostile.gguf", &[]);
        let file = File::options().write(true).open(path).unwrap();
        Hostile {
            folder,
            file,
            len: 0,
        }
    }

    /// Opens these bytes: an error or a model that can be read, in little memory.
    fn survives(&mut self, bytes: &[u8]) -> bool {
        if self.len != bytes.len() {
            self.file.set_len(bytes.len() as u64).unwrap();
            self.len = bytes.len();
        }
        self.file.seek(SeekFrom::Start(0)).unwrap();
        self.file.write_all(bytes).unwrap();
        let path = self.folder.0.path().join("hostile.gguf");
        let (g, peak) = peak(|| Gguf::open(&path));
        assert!(peak <= SMALL_PEAK, "{peak} bytes");
        match g {
            Ok(g) => {
                read_all(&g);
                true
            }
            Err(e) => {
                assert!(!e.to_string().contains('\n'));
                false
            }
        }
    }
}

#[test]
fn cut_anywhere_a_file_is_refused() {
    let mut hostile = Hostile::new();
    // The last tensor ends before the file does; what follows is padding that nobody needs.
    let by_hand = |version| (by_hand(version), 1024 - 32 - 68);
    for (bytes, padding) in [by_hand(1), by_hand(2), by_hand(3), (small().0, 32 - 6)] {
        let end = bytes.len() - padding;
        assert!(hostile.survives(&bytes[..end]));
        for n in (0..end).rev() {
            assert!(!hostile.survives(&bytes[..n]), "{n} bytes");
        }
    }
}

#[test]
fn the_demo_cut_anywhere_is_refused() {
    let folder = Folder::new();
    let path = folder.0.path().join("demo.gguf");
    fs::copy(DEMO, &path).unwrap();
    let header = Gguf::open(&path).unwrap().tensors()[0].offset;
    let file = File::options().write(true).open(&path).unwrap();
    let mut cuts: Vec<u64> = (0..4096).chain((4096..header).step_by(97)).collect();
    cuts.extend([header, header + 1, file.metadata().unwrap().len() - 4096]);
    cuts.sort_unstable();
    for &n in cuts.iter().rev() {
        file.set_len(n).unwrap();
        let (g, peak) = peak(|| Gguf::open(&path));
        assert!(g.is_err(), "{n} bytes");
        assert!(peak <= SMALL_PEAK, "{peak} bytes");
    }
}

#[test]
fn any_byte_of_a_header_may_be_anything() {
    let mut hostile = Hostile::new();
    let (bytes, header) = small();
    for (mut bytes, header) in [(bytes, header), (by_hand(1), 192), (by_hand(2), 256)] {
        for at in 0..header {
            let was = bytes[at];
            for value in [
                0,
                1,
                0x7f,
                0x80,
                0xff,
                was ^ 1,
                was ^ 0x80,
                was.wrapping_add(1),
            ] {
                bytes[at] = value;
                hostile.survives(&bytes);
            }
            bytes[at] = was;
        }
    }
}

/// Writes every awkward number over every place of a header, whatever is there: among them all
/// lengths, counts, dimensions, types and offsets.
#[test]
fn any_number_of_a_header_may_be_anything() {
    let mut hostile = Hostile::new();
    let (bytes, header) = small();
    for (mut bytes, header) in [(bytes, header), (by_hand(1), 192)] {
        let len = bytes.len() as u64;
        for at in 0..header - 8 {
            let was: [u8; 8] = bytes[at..at + 8].try_into().unwrap();
            let left = len - at as u64;
            for value in [
                0,
                1,
                left - 8,
                left - 7,
                left + 1,
                len,
                u64::MAX,
                u64::MAX - 1,
            ]
            .into_iter()
            .chain([i64::MAX as u64, 1 << 32, u32::MAX.into(), 1 << 60, 1 << 61])
            {
                for width in [4, 8] {
                    let number = &value.to_le_bytes()[..width];
                    bytes[at..at + width].copy_from_slice(number);
                    hostile.survives(&bytes);
                    bytes[at..at + 8].copy_from_slice(&was);
                }
            }
        }
    }
}

#[test]
fn memory_stays_in_proportion_to_the_file() {
    let folder = Folder::new();
    let limit = |bytes: &[u8]| 4 * bytes.len() + (1 << 20);
    // Nothing but tiny metadata.
    let mut raw = Raw::new(3);
    for i in 0..100_000 {
        raw = raw.put(format!("{i:x}").leak(), 0, [0]);
    }
    let bytes = raw.bytes();
    let path = folder.file("keys.gguf", &bytes);
    let (g, most) = peak(|| Gguf::open(&path).unwrap());
    assert_eq!(g.metadata().count(), 100_000);
    assert!(most < limit(&bytes), "{most} for {}", bytes.len());
    // Nothing but tiny tensors.
    let mut raw = Raw::new(3).put("general.alignment", 4, 8u32.to_le_bytes());
    for i in 0..50_000 {
        raw = raw.tensor(format!("{i:x}").leak(), I8, &[1], i * 8);
    }
    raw.data = 50_000 * 8;
    let bytes = raw.bytes();
    let path = folder.file("tensors.gguf", &bytes);
    let (g, most) = peak(|| Gguf::open(&path).unwrap());
    assert_eq!(g.tensors().len(), 50_000);
    assert!(most < limit(&bytes), "{most} for {}", bytes.len());
    // Nothing but empty arrays in an array, and a count that promises as many bytes as there are.
    let empty = Raw::new(3).array(4, &[]);
    let raw = Raw::new(3);
    let array = raw.array(9, &vec![empty; 100_000]);
    let mut bytes = raw.put("a", 9, array).bytes();
    let path = folder.file("arrays.gguf", &bytes);
    let (g, most) = peak(|| Gguf::open(&path).unwrap());
    assert_eq!(g.get("a").unwrap().as_array().unwrap().len(), 100_000);
    assert!(most < 1 << 20, "{most}");
    let count = (bytes.len() as u64 - 24) / 32;
    bytes[8..16].copy_from_slice(&count.to_le_bytes());
    let path = folder.file("counts.gguf", &bytes);
    let (g, most) = peak(|| Gguf::open(&path));
    assert!(g.is_err());
    assert!(most < limit(&bytes), "{most} for {}", bytes.len());
}

/// A file much larger than memory opens, as no weight is read.
#[cfg(target_pointer_width = "64")]
#[test]
fn a_file_larger_than_memory_opens() {
    let folder = Folder::new();
    let mut w = Writer::new();
    w.tensor("big", Q8_0, &[1 << 15, 1 << 20, 32]);
    let plan = w.plan("big").unwrap();
    assert!(plan.file_bytes > 1 << 40);
    // The header, then a hole where the file system has such.
    let path = folder.file("big.gguf", &[]);
    w.start(&path, File::create(&path).unwrap()).unwrap();
    let file = File::options().write(true).open(&path).unwrap();
    if file.set_len(plan.file_bytes).is_ok() {
        let g = Gguf::open(&path).unwrap();
        assert_eq!(g.tensors(), plan.tensors);
        assert_eq!(g.bytes(&g.tensors()[0]).len() as u64, plan.tensors[0].bytes);
    }
}

// The writer

/// A metadata value that owns itself.
#[derive(Clone, Debug, PartialEq)]
enum Owned {
    U8(u8),
    I8(i8),
    U16(u16),
    I16(i16),
    U32(u32),
    I32(i32),
    U64(u64),
    I64(i64),
    F32(u32),
    F64(u64),
    Bool(bool),
    Str(String),
    U8s(Vec<u8>),
    I64s(Vec<i64>),
    F32s(Vec<u32>),
    Bools(Vec<bool>),
    Strs(Vec<String>),
    Nested(Vec<Vec<String>>),
    Deep(Vec<Vec<Vec<i16>>>),
}

impl Owned {
    fn put(&self, w: &mut Writer, key: &str) {
        let floats = |v: &[u32]| v.iter().map(|&v| f32::from_bits(v)).collect::<Vec<_>>();
        match self {
            Owned::U8(v) => w.put(key, *v),
            Owned::I8(v) => w.put(key, *v),
            Owned::U16(v) => w.put(key, *v),
            Owned::I16(v) => w.put(key, *v),
            Owned::U32(v) => w.put(key, *v),
            Owned::I32(v) => w.put(key, *v),
            Owned::U64(v) => w.put(key, *v),
            Owned::I64(v) => w.put(key, *v),
            Owned::F32(v) => w.put(key, f32::from_bits(*v)),
            Owned::F64(v) => w.put(key, f64::from_bits(*v)),
            Owned::Bool(v) => w.put(key, *v),
            Owned::Str(v) => w.put(key, v),
            Owned::U8s(v) => w.put(key, v),
            Owned::I64s(v) => w.put(key, v),
            Owned::F32s(v) => w.put(key, floats(v)),
            Owned::Bools(v) => w.put(key, v),
            Owned::Strs(v) => w.put(key, v),
            Owned::Nested(v) => w.put(key, v),
            Owned::Deep(v) => w.put(key, v),
        };
    }

    /// The value as it is read, of the same variant as this one.
    fn read(&self, value: Value<'_>) -> Owned {
        match value {
            Value::U8(v) => Owned::U8(v),
            Value::I8(v) => Owned::I8(v),
            Value::U16(v) => Owned::U16(v),
            Value::I16(v) => Owned::I16(v),
            Value::U32(v) => Owned::U32(v),
            Value::I32(v) => Owned::I32(v),
            Value::U64(v) => Owned::U64(v),
            Value::I64(v) => Owned::I64(v),
            Value::F32(v) => Owned::F32(v.to_bits()),
            Value::F64(v) => Owned::F64(v.to_bits()),
            Value::Bool(v) => Owned::Bool(v),
            Value::Str(v) => Owned::Str(v.to_string()),
            Value::Array(a) => {
                let strs = |v: Value<'_>| -> Vec<String> {
                    let a = v.as_array().unwrap();
                    a.strs().unwrap().map(String::from).collect()
                };
                match self {
                    Owned::U8s(_) => {
                        Owned::U8s(a.iter().map(|v| v.as_u64().unwrap() as u8).collect())
                    }
                    Owned::I64s(_) => Owned::I64s(a.iter().map(|v| v.as_i64().unwrap()).collect()),
                    Owned::F32s(_) => Owned::F32s(a.f32s().unwrap().map(f32::to_bits).collect()),
                    Owned::Bools(_) => {
                        Owned::Bools(a.iter().map(|v| v.as_bool().unwrap()).collect())
                    }
                    Owned::Strs(_) => Owned::Strs(strs(value)),
                    Owned::Nested(_) => Owned::Nested(a.iter().map(strs).collect()),
                    Owned::Deep(_) => Owned::Deep(
                        a.iter()
                            .map(|v| {
                                let rows = v.as_array().unwrap();
                                rows.iter()
                                    .map(|v| {
                                        let row = v.as_array().unwrap();
                                        row.iter().map(|v| v.as_i64().unwrap() as i16).collect()
                                    })
                                    .collect()
                            })
                            .collect(),
                    ),
                    other => panic!("{other:?} was read as {a:?}"),
                }
            }
        }
    }
}

fn owned() -> impl Strategy<Value = Owned> {
    use proptest::collection::vec;
    prop_oneof![
        any::<u8>().prop_map(Owned::U8),
        any::<i8>().prop_map(Owned::I8),
        any::<u16>().prop_map(Owned::U16),
        any::<i16>().prop_map(Owned::I16),
        any::<u32>().prop_map(Owned::U32),
        any::<i32>().prop_map(Owned::I32),
        any::<u64>().prop_map(Owned::U64),
        any::<i64>().prop_map(Owned::I64),
        any::<u32>().prop_map(Owned::F32),
        any::<u64>().prop_map(Owned::F64),
        any::<bool>().prop_map(Owned::Bool),
        any::<String>().prop_map(Owned::Str),
        vec(any::<u8>(), 0..20).prop_map(Owned::U8s),
        vec(any::<i64>(), 0..20).prop_map(Owned::I64s),
        vec(any::<u32>(), 0..20).prop_map(Owned::F32s),
        vec(any::<bool>(), 0..20).prop_map(Owned::Bools),
        vec(any::<String>(), 0..8).prop_map(Owned::Strs),
        vec(vec(any::<String>(), 0..3), 0..4).prop_map(Owned::Nested),
        vec(vec(vec(any::<i16>(), 0..3), 0..3), 0..3).prop_map(Owned::Deep),
    ]
}

/// Tensors of every shape: type, how many blocks are in a row, the other dimensions, data.
fn tensor() -> impl Strategy<Value = (u32, Vec<u64>, u8)> {
    let types = prop::sample::select(vec![F32, 1, Q4_0, Q8_0, Q4_K, 14, 16, I8, 28, 30, 39]);
    (
        types,
        1..4u64,
        prop::collection::vec(1..4u64, 0..4),
        any::<u8>(),
    )
        .prop_map(|(type_id, blocks, mut rest, byte)| {
            let info = octet::quant::type_info(type_id).unwrap();
            rest.insert(0, blocks * info.block_weights);
            (type_id, rest, byte)
        })
}

proptest! {
    // The same cases in every run.
    #![proptest_config(ProptestConfig {
        rng_seed: RngSeed::Fixed(1),
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn what_is_written_is_read(
        metadata in prop::collection::vec((any::<String>(), owned()), 0..12),
        tensors in prop::collection::vec((any::<String>(), tensor()), 0..8),
        alignment in prop::option::of(3..9u32),
        chunk in 1..5000usize,
    ) {
        let mut w = Writer::new();
        let mut expected: Vec<(String, Owned)> = Vec::new();
        for (key, value) in metadata {
            value.put(&mut w, &key);
            match expected.iter_mut().find(|e| e.0 == key) {
                Some(e) => e.1 = value,
                None => expected.push((key, value)),
            }
        }
        if let Some(bits) = alignment {
            w.put("general.alignment", 1u32 << bits);
            expected.push(("general.alignment".to_string(), Owned::U32(1 << bits)));
        }
        let mut names = std::collections::HashSet::new();
        let tensors: Vec<_> = tensors.into_iter().filter(|t| names.insert(t.0.clone())).collect();
        for (name, (type_id, shape, _)) in &tensors {
            w.tensor(name, *type_id, shape);
        }
        let write = || {
            let mut stream = w.start("test", Vec::new()).unwrap();
            for (_, (_, _, byte)) in &tensors {
                let bytes = vec![*byte; stream.current().unwrap().bytes as usize];
                for chunk in bytes.chunks(chunk) {
                    stream.write(chunk).unwrap();
                }
            }
            let plan = stream.plan().clone();
            (stream.finish().unwrap(), plan)
        };
        let (bytes, plan) = write();
        prop_assert_eq!(bytes.len() as u64, plan.file_bytes);
        prop_assert!(bytes == write().0);
        let folder = Folder::new();
        let g = folder.open(&bytes).unwrap();
        let found: Vec<(String, Owned)> = g
            .metadata()
            .zip(&expected)
            .map(|((key, value), (_, like))| (key.to_string(), like.read(value)))
            .collect();
        prop_assert_eq!(&found, &expected);
        prop_assert_eq!(g.metadata().count(), expected.len());
        prop_assert_eq!(g.tensors(), plan.tensors);
        for (t, (name, (type_id, shape, byte))) in g.tensors().iter().zip(&tensors) {
            prop_assert_eq!((&t.name, t.type_id, &t.shape), (name, *type_id, shape));
            prop_assert!(g.bytes(t).iter().all(|b| b == byte));
        }
    }
}

#[test]
fn the_writer_refuses_what_could_not_be_read() {
    let error = |w: &Writer| w.plan("out.gguf").unwrap_err().to_string();
    let mut w = Writer::new();
    w.tensor("t", 200, &[1]);
    says(&error(&w), &["out.gguf", "type of tensor `t`", "id 200"]);
    let mut w = Writer::new();
    w.tensor("t", F32, &[1]).tensor("t", F32, &[1]);
    says(&error(&w), &["tensor `t`", "once"]);
    let mut w = Writer::new();
    w.tensor(&"n".repeat(65536), F32, &[1]);
    says(&error(&w), &["65535"]);
    let mut w = Writer::new();
    w.put(&"k".repeat(65536), 1u8);
    says(&error(&w), &["65535"]);
    let mut w = Writer::new();
    w.put("general.alignment", 12u32);
    says(&error(&w), &["general.alignment", "found 12"]);
    let mut w = Writer::new();
    w.tensor("t", I8, &[1 << 61]).tensor("u", I8, &[1 << 61]);
    says(&error(&w), &["size of tensor `u`", "2^62"]);

    /// Nine arrays around a number.
    struct Deep;
    impl Put for Deep {
        fn kind(&self) -> Kind {
            Kind::Array
        }
        fn encode(&self, out: &mut Vec<u8>) {
            for _ in 0..8 {
                out.extend(9u32.to_le_bytes());
                out.extend(1u64.to_le_bytes());
            }
            [1u32].encode(out);
        }
    }
    let mut w = Writer::new();
    w.put("deep", Deep);
    says(&error(&w), &["`deep`", "read back"]);
}

#[test]
fn the_writer_counts_the_bytes_of_tensors() {
    let mut w = Writer::new();
    w.tensor("t", F32, &[2]).tensor("u", F32, &[1]);
    let start = || w.start("out.gguf", Vec::new()).unwrap();
    let mut s = start();
    s.write(&[0; 5]).unwrap();
    says(
        &s.write(&[0; 4]).unwrap_err().to_string(),
        &["out.gguf", "tensor `t`", "3 bytes more", "found 4"],
    );
    says(
        &s.write_tensor("t", &[0; 8]).unwrap_err().to_string(),
        &["3 bytes of `t`", "8 bytes of `t`"],
    );
    s.write(&[0; 3]).unwrap();
    assert_eq!(s.current().unwrap().name, "u");
    says(
        &s.write_tensor("t", &[0; 4]).unwrap_err().to_string(),
        &["4 bytes of `u`", "4 bytes of `t`"],
    );
    s.write_tensor("u", &[0; 4]).unwrap();
    says(&s.write(&[1]).unwrap_err().to_string(), &["after the last"]);
    s.write(&[]).unwrap();
    assert!(s.current().is_none());
    assert!(s.finish().is_ok());
    says(
        &start().finish().unwrap_err().to_string(),
        &["the data of tensor `t` is missing"],
    );

    /// An output that is full.
    struct Full;
    impl std::io::Write for Full {
        fn write(&mut self, _: &[u8]) -> std::io::Result<usize> {
            Err(std::io::ErrorKind::StorageFull.into())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let error = w.start("out.gguf", Full).err().unwrap().to_string();
    says(&error, &["out.gguf", "cannot write"]);
}
