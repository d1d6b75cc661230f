//! The tokenizer against a plain SentencePiece BPE, the oracle, and against hostile files.

use std::cmp::Ordering;
use std::collections::BinaryHeap;
use std::sync::LazyLock;
use std::time::Instant;

use proptest::prelude::*;

use super::*;
use serde_json::Value;

fn data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/data/tokenizers")
        .join(name)
}

const NAMES: [&str; 3] = [
    "mixtral-8x7b.tokenizer.model",
    "demo.tokenizer.model",
    "mixtral-8x22b-instruct.tokenizer.model",
];

static REAL: LazyLock<Vec<(Tokenizer, Oracle)>> = LazyLock::new(|| {
    let load = |name: &&str| {
        let tok = Tokenizer::from_path(&crate::chat::vocabulary(name)?).unwrap();
        let oracle = Oracle::new(tok.pieces());
        Some((tok, oracle))
    };
    NAMES.iter().filter_map(load).collect()
});

/// SentencePiece's BPE written down plainly: scores, a queue, the leftmost of equal scores first.
struct Oracle {
    ids: HashMap<String, (u32, f32, PieceKind)>,
}

#[derive(PartialEq)]
struct Candidate {
    score: f32,
    left: usize,
    right: usize,
    len: usize,
}

impl Eq for Candidate {}
impl PartialOrd for Candidate {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Candidate {
    fn cmp(&self, other: &Self) -> Ordering {
        self.score
            .total_cmp(&other.score)
            .then(other.left.cmp(&self.left))
    }
}

impl Oracle {
    fn new(pieces: &[Piece]) -> Oracle {
        let mut ids = HashMap::new();
        for (id, p) in pieces.iter().enumerate() {
            ids.entry(p.text.clone())
                .or_insert((id as u32, p.score, p.kind));
        }
        Oracle { ids }
    }

    fn encode(&self, text: &str) -> Vec<u32> {
        if text.is_empty() {
            return Vec::new();
        }
        let text = format!("\u{2581}{}", text.replace(' ', "\u{2581}"));
        // Symbols: (text, frozen); an empty text was merged away.
        let mut symbols: Vec<(&str, bool)> = Vec::new();
        let mut rest = text.as_str();
        while let Some(c) = rest.chars().next() {
            let longest = rest
                .char_indices()
                .map(|(i, c)| &rest[..i + c.len_utf8()])
                .take(64)
                .filter(|s| {
                    self.ids
                        .get(*s)
                        .is_some_and(|p| p.2 == PieceKind::UserDefined)
                })
                .last();
            let symbol = longest.unwrap_or(&rest[..c.len_utf8()]);
            symbols.push((symbol, longest.is_some()));
            rest = &rest[symbol.len()..];
        }
        let mut queue = BinaryHeap::new();
        let at = |s: &str| s.as_ptr() as usize - text.as_ptr() as usize;
        let try_pair =
            |queue: &mut BinaryHeap<_>, symbols: &[(&str, bool)], left: usize, right: usize| {
                let ((a, fa), (b, fb)) = (symbols[left], symbols[right]);
                let both = &text[at(a)..at(b) + b.len()];
                let found = self.ids.get(both).filter(|p| p.2 == PieceKind::Normal);
                if let (false, false, Some(p)) = (fa, fb, found) {
                    queue.push(Candidate {
                        score: p.1,
                        left,
                        right,
                        len: both.len(),
                    });
                }
            };
        for right in 1..symbols.len() {
            try_pair(&mut queue, &symbols, right - 1, right);
        }
        let n = symbols.len();
        let mut next: Vec<usize> = (1..=n).collect();
        let mut prev: Vec<usize> = (0..n).map(|i| i.wrapping_sub(1)).collect();
        while let Some(c) = queue.pop() {
            let (a, b) = (symbols[c.left].0, symbols[c.right].0);
            if a.is_empty() || b.is_empty() || a.len() + b.len() != c.len {
                continue;
            }
            symbols[c.left].0 = &text[at(a)..at(a) + c.len];
            symbols[c.right].0 = "";
            next[c.left] = next[c.right];
            if next[c.left] < n {
                prev[next[c.left]] = c.left;
                try_pair(&mut queue, &symbols, c.left, next[c.left]);
            }
            if prev[c.left] < n {
                try_pair(&mut queue, &symbols, prev[c.left], c.left);
            }
        }
        let byte = |b| self.ids[&format!("<0x{b:02X}>")].0;
        let mut out = Vec::new();
        for (symbol, _) in symbols.iter().filter(|s| !s.0.is_empty()) {
            match self.ids.get(*symbol) {
                Some(p) if matches!(p.2, PieceKind::Normal | PieceKind::UserDefined) => {
                    out.push(p.0)
                }
                _ => out.extend(symbol.bytes().map(byte)),
            }
        }
        out
    }
}

fn same_as_oracle(text: &str) {
    for (tok, oracle) in REAL.iter() {
        assert_eq!(
            tok.encode(text),
            oracle.encode(text),
            "{text:?} with {:?}",
            tok.source()
        );
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn any_string_is_encoded_as_the_oracle_does(text in any::<String>()) {
        same_as_oracle(&text);
    }

    #[test]
    fn runs_and_marks_are_encoded_as_the_oracle_does(
        parts in proptest::collection::vec(
            (prop_oneof![
                Just(" "), Just("a"), Just("e"), Just("\u{2581}"), Just("="), Just("-"), Just("\n"), Just("\t"),
                Just("0"), Just("aa"), Just("the "), Just("[INST]"), Just("<s>"), Just("[REFERENCE_DOC_1]"),
                Just("[REFERENCE_DOC_1"), Just("é"), Just("字"), Just("😀"), Just("\0"), Just("."), Just("/"),
                Just("#"), Just("*"), Just("l"), Just("o"), Just("n"), Just("i"),
            ], 1usize..40),
            0..30,
        )
    ) {
        let text: String = parts.iter().map(|(s, n)| s.repeat(*n)).collect();
        same_as_oracle(&text);
    }

    #[test]
    fn small_vocabularies_with_different_scores_encode_as_the_oracle_does(
        words in proptest::collection::hash_set("[ab\u{2581}]{2,5}", 0..25),
        scores in Just((0u8..30).collect::<Vec<_>>()).prop_shuffle(),
        text in "[ab ]{0,40}",
    ) {
        let letters = ["a", "b", "\u{2581}"].map(String::from);
        let mut pieces = vec![piece("<unk>", 0.0, PieceKind::Unknown)];
        for (text, score) in letters.into_iter().chain(words).zip(scores) {
            pieces.push(piece(&text, -f32::from(score), PieceKind::Normal));
        }
        let oracle = Oracle::new(&pieces);
        let vocab = Vocab { pieces, add_space_prefix: true, ..Vocab::default() };
        let tok = Tokenizer::new(vocab, Path::new("v")).unwrap();
        prop_assert_eq!(tok.encode(&text), oracle.encode(&text));
    }

    #[test]
    fn decoding_gives_the_text_back(text in any::<String>()) {
        for (tok, _) in REAL.iter() {
            // A literal ▁ prints as a space: SentencePiece has one sign for both.
            let want = text.replace('\u{2581}', " ");
            let ids = tok.encode(&text);
            prop_assert_eq!(String::from_utf8(tok.decode(&ids)).unwrap(), want.clone());
            let mut stream = tok.stream();
            let mut got: String = ids.iter().map(|&id| stream.push(id)).collect();
            got += &stream.flush();
            prop_assert_eq!(got, want);
        }
    }

    #[test]
    fn any_ids_decode(ids in proptest::collection::vec(any::<u32>(), 0..50)) {
        for (tok, _) in REAL.iter() {
            let ids: Vec<u32> = ids.iter().map(|id| id % (tok.len() as u32 + 3)).collect();
            let whole = String::from_utf8_lossy(&tok.decode(&ids)).into_owned();
            let mut stream = tok.stream();
            let mut got: String = ids.iter().map(|&id| stream.push(id)).collect();
            got += &stream.flush();
            prop_assert_eq!(got, whole);
        }
    }
}

#[test]
fn books_are_encoded_as_the_oracle_does() {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/golden/tokenize.jsonl");
    let lines = std::fs::read_to_string(file).unwrap();
    let texts: Vec<String> = lines
        .lines()
        .map(|l| {
            serde_json::from_str::<Value>(l).unwrap()["text"]
                .as_str()
                .unwrap()
                .to_string()
        })
        .collect();
    same_as_oracle(&texts.join("\n"));
    same_as_oracle(&texts.concat());
}

#[test]
fn long_input_takes_linear_time() {
    for (piece, n) in [
        ("The quick brown fox. ", 50_000),
        ("a", 100_000),
        (" ", 100_000),
        ("字a", 100_000),
        ("\0", 100_000),
    ] {
        let (tenth, text) = (piece.repeat(n / 10), piece.repeat(n));
        // With the small vocabulary it is over too soon to be timed.
        for (tok, _) in REAL.iter().filter(|(tok, _)| tok.len() > 30_000) {
            let time = |text: &str| {
                let start = Instant::now();
                (tok.encode(text), start.elapsed())
            };
            // A quadratic method takes 100 times as long for all of it as for a tenth, every time; others do so only
            // when the machine is busy with something else.
            let linear = (0..10).any(|_| time(&text).1 < 30 * time(&tenth).1);
            assert!(linear, "{n} times {piece:?}");
            assert_eq!(tok.decode(&time(&text).0), text.as_bytes());
        }
    }
}

#[test]
fn decoding_follows_sentencepiece_at_the_borders() {
    let tok = &REAL[0].0;
    let text = |ids: &[u32]| String::from_utf8_lossy(&tok.decode(ids)).into_owned();
    // Each answer is sentencepiece 0.2's.
    assert_eq!(text(&[28705, 28705, 22557]), "  Hello");
    assert_eq!(text(&[1, 22557]), "Hello");
    assert_eq!(text(&[1, 22557, 2, 22557]), "Hello Hello");
    assert_eq!(text(&[28705]), "");
    assert_eq!(text(&[1, 28705, 28705]), " ");
    assert_eq!(text(&[0, 5]), " \u{2047} \u{2}");
    assert_eq!(text(&[13, 22557]), "\n Hello");
    assert_eq!(text(&[230, 22557]), "\u{FFFD} Hello");
    assert_eq!(tok.decode_with(&[1, 22557, 2], true), b"<s>Hello</s>");
    assert_eq!(text(&[u32::MAX, 22557]), "Hello");
}

#[test]
fn a_stream_waits_for_whole_characters() {
    let tok = &REAL[0].0;
    let byte = |b: u8| u32::from(b) + 3;
    let mut stream = tok.stream();
    assert_eq!(stream.push(byte(0xF0)), "");
    assert_eq!(stream.push(byte(0x9F)), "");
    assert_eq!(stream.push(byte(0x98)), "");
    assert_eq!(stream.push(byte(0x80)), "😀");
    assert_eq!(stream.push(byte(0xE5)), "");
    assert_eq!(stream.push(22557), "\u{FFFD} Hello");
    assert_eq!(stream.push(byte(0xFF)), "\u{FFFD}");
    assert_eq!(stream.push(byte(0xC3)), "");
    assert_eq!(stream.flush(), "\u{FFFD}");
    assert_eq!(stream.flush(), "");
    assert_eq!(tok.stream_continuing().push(22557), " Hello");
    assert_eq!(tok.stream().push(22557), "Hello");
    assert_eq!(tok.stream().push(2), "");
    assert_eq!(tok.stream_showing_control().push(2), "</s>");
}

fn piece(text: &str, score: f32, kind: PieceKind) -> Piece {
    Piece {
        text: text.into(),
        score,
        kind,
    }
}

fn small() -> Vocab {
    let mut pieces = vec![
        piece("<unk>", 0.0, PieceKind::Unknown),
        piece("<s>", 0.0, PieceKind::Control),
    ];
    for (i, text) in ["\u{2581}", "a", "b", "ab", "\u{2581}ab"]
        .iter()
        .enumerate()
    {
        pieces.push(piece(text, -(i as f32), PieceKind::Normal));
    }
    Vocab {
        pieces,
        bos: Some(1),
        add_space_prefix: true,
        ..Vocab::default()
    }
}

#[test]
fn a_vocabulary_without_bytes_falls_back_to_unknown() {
    let tok = Tokenizer::new(small(), Path::new("v")).unwrap();
    assert_eq!(tok.encode("ab"), [6]);
    // A run of unknown characters is one unknown piece, as in SentencePiece.
    assert_eq!(tok.encode("xyab"), [2, 0, 5]);
    assert_eq!(tok.unk(), Some(0));
    assert_eq!(tok.encode("<s>"), [2, 0]);
    assert_eq!(tok.control("<s>"), Some(1));
    assert_eq!(tok.control("ab"), None);
}

#[test]
fn hostile_vocabularies_are_refused_or_survived() {
    let refuse = |change: &dyn Fn(&mut Vocab), word: &str| {
        let mut vocab = small();
        change(&mut vocab);
        let error = Tokenizer::new(vocab, Path::new("bad.gguf"))
            .unwrap_err()
            .to_string();
        assert!(
            error.starts_with("bad.gguf: ") && error.contains(word),
            "{error}"
        );
    };
    refuse(&|v| v.pieces.clear(), "size");
    refuse(&|v| v.bos = Some(7), "bos");
    refuse(&|v| v.eos = Some(u32::MAX), "eos");
    refuse(&|v| v.unk = Some(7), "unk");
    refuse(&|v| v.stop = vec![0, 9], "stop");
    refuse(&|v| v.pieces[3].score = f32::NAN, "score of piece 3");
    refuse(&|v| v.pieces[3].text = "x".repeat(513), "piece 3");
    refuse(&|v| v.pieces[3].kind = PieceKind::Byte, "byte piece 3");
    refuse(&|v| v.pieces[0].kind = PieceKind::Unused, "coverage");

    let mut vocab = small();
    vocab.pieces.push(piece("ab", 9.0, PieceKind::Normal)); // a second "ab": the first keeps the text
    vocab.pieces.push(piece("", 9.0, PieceKind::Normal));
    vocab.pieces.push(piece("", 9.0, PieceKind::UserDefined));
    vocab
        .pieces
        .push(piece("b", f32::INFINITY, PieceKind::UserDefined));
    vocab.pieces.push(piece("<0x41>", 0.0, PieceKind::Byte)); // one byte of 256: no byte fallback
    let tok = Tokenizer::new(vocab, Path::new("v")).unwrap();
    assert_eq!(tok.encode("ab"), [2, 3, 10]);
    assert_eq!(tok.encode_with("ab", true, false), [6]);
    assert_eq!(tok.encode_with("ab", false, false), [5]);
    assert_eq!(tok.encode("A"), [2, 0]);
    assert_eq!(tok.decode(&[8, 9, 11]), b"A");
}

#[test]
fn user_defined_pieces_are_cut_out_longest_first() {
    let mut vocab = small();
    for text in ["<x>", "<x>b", "\u{2581}<"] {
        vocab.pieces.push(piece(text, 0.0, PieceKind::UserDefined));
    }
    let tok = Tokenizer::new(vocab, Path::new("v")).unwrap();
    assert_eq!(tok.encode("a<x>ba"), [2, 3, 8, 3]);
    assert_eq!(tok.encode("<x>b"), [9, 0, 4]); // "▁<" comes first, "x>" is unknown
    assert_eq!(tok.encode("a<x>ab"), [2, 3, 7, 5]);
}

#[test]
fn every_truncation_of_a_model_is_an_error_or_a_smaller_vocabulary() {
    let bytes = std::fs::read(data(NAMES[1])).unwrap();
    let path = Path::new("cut.model");
    let full = Vocab::from_spm(&bytes, path).unwrap();
    // The head (its pieces) and the tail (trainer and normalizer) byte by byte.
    let cuts = (0..3000).chain(bytes.len() - 3000..bytes.len());
    for cut in cuts {
        if let Ok(vocab) = Vocab::from_spm(&bytes[..cut], path) {
            assert!(vocab.pieces.len() <= full.pieces.len());
            assert!(cut > bytes.len() - 1000, "cut at {cut}"); // without the trainer it would be unigram
        }
    }
    let error = Vocab::from_spm(&bytes[..100], path).unwrap_err();
    assert!(matches!(error, Error::Truncated { .. }), "{error}");
}

#[test]
fn every_changed_byte_of_a_model_is_survived() {
    let bytes = std::fs::read(data(NAMES[1])).unwrap();
    let places = (0..400).chain(bytes.len() - 400..bytes.len());
    for place in places {
        for value in [0x00, 0x7f, 0x80, 0xff, bytes[place] ^ 1] {
            let mut bad = bytes.clone();
            bad[place] = value;
            // Nothing to assert but that it returns: some changes are harmless.
            let _ = Vocab::from_spm(&bad, Path::new("bad.model"));
        }
    }
}

#[test]
fn models_of_other_kinds_are_named() {
    let path = Path::new("x.model");
    let unigram = b"\x0a\x03\x0a\x01a"; // one piece "a", no trainer
    let error = Vocab::from_spm(unigram, path).unwrap_err();
    assert!(matches!(error, Error::Unsupported { .. }), "{error}");
    for (bytes, word) in [
        (&b""[..], "no pieces"),
        (b"\x0a\x03\x0a\x01\xff", "UTF-8"),
        (b"\x0a\x02\x18\x09", "type"),
        (b"\x07", "wire type"),
        (b"\x02\x00", "number"),
        (b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff", "10 bytes"),
    ] {
        let error = Vocab::from_spm(bytes, path).unwrap_err().to_string();
        assert!(
            error.starts_with("x.model: ") && error.contains(word),
            "{error}"
        );
    }
}

/// A `tokenizer.json` such as the Hugging Face converter writes for a SentencePiece vocabulary.
fn hf_json(tok: &Tokenizer) -> Value {
    let mut merges = Vec::new();
    for p in tok.pieces().iter().filter(|p| p.kind == PieceKind::Normal) {
        for (cut, _) in p.text.char_indices().skip(1) {
            let (l, r) = p.text.split_at(cut);
            let normal = |s| {
                tok.id(s)
                    .is_some_and(|id| tok.piece(id).unwrap().kind == PieceKind::Normal)
            };
            if normal(l) && normal(r) {
                merges.push((p.score, l, r));
            }
        }
    }
    merges.sort_by(|a, b| b.0.total_cmp(&a.0).then(b.1.len().cmp(&a.1.len())));
    let special = |p: &Piece| !matches!(p.kind, PieceKind::Normal | PieceKind::Byte);
    let added: Vec<Value> = (0..tok.len())
        .filter(|&id| special(&tok.pieces()[id]))
        .map(|id| {
            let p = &tok.pieces()[id];
            serde_json::json!({"id": id, "content": p.text, "special": p.kind != PieceKind::UserDefined})
        })
        .collect();
    let vocab: serde_json::Map<String, Value> = tok
        .pieces()
        .iter()
        .enumerate()
        .map(|(id, p)| (p.text.clone(), id.into()))
        .collect();
    let merges: Vec<String> = merges.iter().map(|m| format!("{} {}", m.1, m.2)).collect();
    serde_json::json!({
        "added_tokens": added,
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
        "pre_tokenizer": null,
        "model": {"type": "BPE", "unk_token": "<unk>", "byte_fallback": true, "vocab": vocab, "merges": merges},
    })
}

#[test]
fn a_hugging_face_file_encodes_as_the_sentencepiece_file() {
    let tok = &REAL[1].0;
    let folder = tempfile::tempdir().unwrap();
    let json = folder.path().join("tokenizer.json");
    std::fs::write(&json, hf_json(tok).to_string()).unwrap();
    std::fs::copy(
        data("demo.tokenizer_config.json"),
        folder.path().join("tokenizer_config.json"),
    )
    .unwrap();
    let hf = Tokenizer::from_path(folder.path()).unwrap();
    assert_eq!(
        (hf.bos(), hf.eos(), hf.unk(), hf.len()),
        (tok.bos(), tok.eos(), tok.unk(), tok.len())
    );
    assert!(hf.chat_template().unwrap().contains("[INST]") && hf.add_bos());
    for text in [
        "Once upon a time, there was a  wolf.\n\t¡Hola! «été» 字😀 <s> [INST] ",
        "a",
        " ",
        "aaaaaaaaaa",
    ] {
        assert_eq!(hf.encode(text), tok.encode(text), "{text:?}");
    }
    let kinds = |t: &Tokenizer| t.pieces().iter().map(|p| p.kind).collect::<Vec<_>>();
    assert_eq!(kinds(&hf), kinds(tok));
}

#[test]
fn odd_hugging_face_files_are_named() {
    let path = Path::new("tokenizer.json");
    let good = || hf_json(&Tokenizer::new(small(), path).unwrap());
    let mut cases: Vec<(Value, &str)> = Vec::new();
    let mut case = |change: &dyn Fn(&mut Value), word| {
        let mut v = good();
        change(&mut v);
        cases.push((v, word));
    };
    case(&|v| v["model"]["vocab"] = 3.into(), "model.vocab");
    case(&|v| v["model"]["merges"] = 3.into(), "model.merges");
    case(
        &|v| v["model"]["merges"] = serde_json::json!([3]),
        "merge 0",
    );
    case(
        &|v| v["model"]["merges"] = serde_json::json!([["a", "b", "c"]]),
        "merge 0",
    );
    case(
        &|v| v["model"]["byte_fallback"] = false.into(),
        "byte_fallback",
    );
    case(
        &|v| v["pre_tokenizer"] = serde_json::json!({"type": "ByteLevel"}),
        "byte_fallback",
    );
    case(&|v| v["model"]["vocab"]["a"] = (-1).into(), "the id of");
    case(
        &|v| v["model"]["vocab"]["a"] = 4_000_000_000u64.into(),
        "the id of",
    );
    for (json, word) in cases {
        let error = Vocab::from_hf_json(json.to_string().as_bytes(), path)
            .unwrap_err()
            .to_string();
        assert!(error.contains(word), "{error}");
    }
    assert!(Vocab::from_hf_json(b"{", path).is_err());
    assert!(Vocab::from_hf_json(b"[]", path).is_err());
}

#[test]
fn a_folder_without_a_tokenizer_says_so() {
    let folder = tempfile::tempdir().unwrap();
    let error = Tokenizer::from_path(folder.path()).unwrap_err();
    assert!(matches!(error, Error::Missing { .. }), "{error}");
    let error = Tokenizer::from_path(&folder.path().join("none")).unwrap_err();
    assert!(matches!(error, Error::Io { .. }), "{error}");
}

/// Prints how long construction takes: `cargo test --release --lib -- --ignored build_time --nocapture`.
#[test]
#[ignore = "a measurement"]
fn build_time() {
    for name in NAMES {
        let vocab = Vocab::from_path(&data(name)).unwrap();
        let mut times: Vec<f64> = (0..9)
            .map(|_| {
                let vocab = vocab.clone();
                let start = Instant::now();
                Tokenizer::new(vocab, Path::new(name)).unwrap();
                start.elapsed().as_secs_f64() * 1e3
            })
            .collect();
        times.sort_by(f64::total_cmp);
        println!("{name}: median {:.1} ms, best {:.1} ms", times[4], times[0]);
        let tok = Tokenizer::new(vocab, Path::new(name)).unwrap();
        for text in ["The quick brown fox. ".repeat(50_000), "a".repeat(1 << 20)] {
            let start = Instant::now();
            let n = tok.encode(&text).len();
            println!(
                "  {} bytes -> {n} ids in {:.0} ms",
                text.len(),
                start.elapsed().as_secs_f64() * 1e3
            );
        }
    }
}
