//! Conversations on disk: nothing is lost, nothing is believed that is damaged, nothing is computed twice.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use octet::chat::conversation::Conversation;
use octet::chat::message::{Message, Role};
use octet::chat::saved::{ModelId, Saved, Shelf, kv_path};
use octet::chat::session::Session;
use octet::error::{Error, Result};
use octet::gguf::Gguf;
use octet::moe::kv_file::{KvFile, Loaded};
use octet::moe::{Kv, KvType, Machine, Model, Run, Scratch, Want};
use serde_json::Value;
use tempfile::TempDir;

use crate::program::{DEMO, Home, PATIENCE, closing};

fn demo() -> (Model, [u8; 32]) {
    let file = Gguf::open(DEMO.as_ref()).unwrap();
    let model = Model::open(&file, Machine::new(1, None).unwrap()).unwrap();
    (model, file.identity())
}

/// Adds tokens to a cache; gives the bits of the logits after the last.
fn feed(model: &Model, kv: &mut Kv, tokens: &[u32]) -> Vec<u32> {
    let mut scratch = Scratch::default();
    let run = Run {
        kv,
        tokens,
        want: Want::Last,
    };
    let logits = model.forward(&mut [run], &mut scratch).unwrap();
    logits.iter().map(|l| l.to_bits()).collect()
}

/// A cache of these tokens, kept in a file.
fn kept(path: &Path, model: &Model, identity: &[u8; 32], kind: KvType, tokens: &[u32]) -> Kv {
    let mut kv = Kv::new(&model.config, kind, 200);
    feed(model, &mut kv, tokens);
    let mut file = KvFile::open(path, &kv, identity).unwrap();
    file.save(&kv, tokens).unwrap();
    kv
}

/// Some tokens of the demo model's vocabulary.
fn tokens(n: usize) -> Vec<u32> {
    (0..n as u32).map(|i| 300 + i * 7919 % 3000).collect()
}

fn load(
    path: &Path,
    model: &Model,
    identity: &[u8; 32],
    kind: KvType,
    ctx: usize,
) -> Result<(Kv, Loaded)> {
    let mut kv = Kv::new(&model.config, kind, ctx);
    let loaded = KvFile::open(path, &kv, identity)?.load(&mut kv)?;
    assert_eq!(kv.len(), loaded.tokens.len());
    Ok((kv, loaded))
}

// ---------------------------------------------------------------------------------------------
// The KV cache

#[test]
fn a_cache_from_disk_gives_the_same_bits() {
    let (model, identity) = demo();
    let folder = TempDir::new().unwrap();
    for kind in KvType::ALL {
        for n in [1, 63, 64, 65, 130] {
            let path = folder.path().join(format!("{n}{kind:?}"));
            let all = tokens(n + 1);
            let mut kv = kept(&path, &model, &identity, kind, &all[..n]);
            let want = feed(&model, &mut kv, &all[n..]);

            let (mut kv, loaded) = load(&path, &model, &identity, kind, 200).unwrap();
            assert_eq!((&loaded.tokens[..], &loaded.refused), (&all[..n], &None));
            assert_eq!(feed(&model, &mut kv, &all[n..]), want, "{n} {kind:?}");
            // A smaller context takes the blocks that fit.
            let (_, loaded) = load(&path, &model, &identity, kind, 100).unwrap();
            let fits = if n <= 100 { n } else { 64 };
            assert_eq!((&loaded.tokens[..], loaded.refused), (&all[..fits], None));
        }
    }
}

#[test]
fn only_what_is_new_is_written() {
    let (model, identity) = demo();
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("kv");
    let all = tokens(300);
    let mut kv = Kv::new(&model.config, KvType::F16, 400);
    let mut file = KvFile::open(&path, &kv, &identity).unwrap();
    feed(&model, &mut kv, &all[..200]);
    file.save(&kv, &all[..200]).unwrap();
    let one = fs::read(&path).unwrap();

    // The same again, more, less, and another end.
    file.save(&kv, &all[..200]).unwrap();
    assert_eq!(fs::read(&path).unwrap(), one);
    feed(&model, &mut kv, &all[200..]);
    file.save(&kv, &all).unwrap();
    let two = fs::read(&path).unwrap();
    let full = (one.len() - 88) / 200 * 192; // three full blocks, nearly
    assert!(two.len() > one.len() && two[..full] == one[..full]);
    let mut other = all[..140].to_vec();
    other.extend([5, 6, 7, 8]);
    kv.truncate(140);
    let want = feed(&model, &mut kv, &other[140..]);
    file.save(&kv, &other).unwrap();
    let three = fs::read(&path).unwrap();
    assert!(three.len() < one.len());
    drop(file);
    let (mut kv, loaded) = load(&path, &model, &identity, KvType::F16, 400).unwrap();
    assert_eq!(loaded.tokens, other);
    kv.truncate(140);
    assert_eq!(feed(&model, &mut kv, &other[140..]), want);

    // A block of one conversation behind those of another is none of it, though it is whole.
    let mut mixed = three.clone();
    mixed.extend(&two[three.len()..]);
    fs::write(&path, &mixed).unwrap();
    let (_, loaded) = load(&path, &model, &identity, KvType::F16, 400).unwrap();
    assert_eq!(loaded.tokens, other);
    let block = (two.len() - 88) / 300 * 64;
    let mut mixed = two.clone();
    mixed[block * 2..three.len()].copy_from_slice(&three[block * 2..]);
    fs::write(&path, &mixed).unwrap();
    let (_, loaded) = load(&path, &model, &identity, KvType::F16, 400).unwrap();
    assert!(loaded.tokens.len() <= 144, "{}", loaded.tokens.len());
}

#[test]
fn damage_is_seen_and_what_is_before_it_is_used() {
    let (model, identity) = demo();
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("kv");
    let all = tokens(150);
    kept(&path, &model, &identity, KvType::F16, &all);
    let bytes = fs::read(&path).unwrap();
    let check = |case: &str, loaded: Result<(Kv, Loaded)>, whole: bool| {
        let Ok((_, loaded)) = loaded else {
            return; // No cache of octet's any more.
        };
        let n = loaded.tokens.len();
        assert!([0, 64, 128, 150].contains(&n), "{case}: {n}");
        assert_eq!(loaded.tokens, all[..n], "{case}");
        assert_eq!(loaded.refused.is_none(), whole || n == 150, "{case}");
    };
    for at in (0..88).chain((88..bytes.len()).step_by(991)) {
        let mut bad = bytes.clone();
        bad[at] ^= 0x10;
        fs::write(&path, &bad).unwrap();
        let loaded = load(&path, &model, &identity, KvType::F16, 200);
        if let Ok((_, loaded)) = &loaded {
            assert!(loaded.tokens.len() < 150, "{at}");
        }
        check(&format!("byte {at}"), loaded, false);
    }
    // Within the second block.
    let block = (bytes.len() - 88) / 150 * 64 + 200;
    let ends = [
        0,
        1,
        7,
        8,
        87,
        88,
        89,
        100,
        block,
        2 * block,
        bytes.len() - 1,
    ];
    for end in ends {
        fs::write(&path, &bytes[..end]).unwrap();
        let loaded = load(&path, &model, &identity, KvType::F16, 200);
        // A file that ends behind its head, or is empty, has no cache, and nothing is wrong with it.
        check(&format!("end {end}"), loaded, end == 0 || end == 88);
    }
    // Longer than any disk, and empty behind the head.
    fs::write(&path, &bytes[..88]).unwrap();
    fs::File::options()
        .write(true)
        .open(&path)
        .unwrap()
        .set_len(1 << 40)
        .unwrap();
    let (_, loaded) = load(&path, &model, &identity, KvType::F16, 200).unwrap();
    assert_eq!(loaded.refused.unwrap(), "it is damaged from position 0 on");
}

#[test]
fn a_cache_of_another_model_is_refused() {
    let (model, identity) = demo();
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("kv");
    let all = tokens(10);
    let kv = kept(&path, &model, &identity, KvType::F16, &all);
    let (_, loaded) = load(&path, &model, &[7; 32], KvType::F16, 100).unwrap();
    assert_eq!(loaded.refused.unwrap(), "it is of another model");
    let (_, loaded) = load(&path, &model, &identity, KvType::F32, 100).unwrap();
    assert_eq!(
        loaded.refused.unwrap(),
        "its elements are of another type (--kv)"
    );
    // In use.
    let _held = KvFile::open(&path, &kv, &identity).unwrap();
    let error = load(&path, &model, &identity, KvType::F16, 100)
        .err()
        .unwrap();
    assert!(
        error
            .to_string()
            .ends_with("kv: cannot open: another octet is using it"),
        "{error}"
    );
    // Somebody else's file.
    let path = folder.path().join("other");
    fs::write(&path, "GGUF and more").unwrap();
    let error = load(&path, &model, &identity, KvType::F16, 100)
        .err()
        .unwrap();
    assert!(matches!(error, Error::Invalid { .. }));
    assert_eq!(fs::read(&path).unwrap(), b"GGUF and more");
}

// ---------------------------------------------------------------------------------------------
// The text

fn conversation() -> Conversation {
    let mut c = Conversation::new(Some("Be \u{1b}[31mbrief.\n".into()));
    for (role, text) in [
        (Role::User, "A fox?"),
        (Role::Assistant, "A fox.\n```\n\"x\"\n```"),
        (Role::User, "Ünd \u{0}?"),
        (Role::Assistant, "No."),
    ] {
        c.messages.push(Message::new(role, text));
    }
    c.from = 2;
    c
}

#[test]
fn whatever_happens_to_a_session_its_text_is_recovered_or_it_is_refused() {
    let (model, identity) = demo();
    let id = ModelId {
        name: "demo".into(),
        hash: identity,
    };
    let mut session = Session::new(&model, KvType::F16, 100, 8);
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("s");
    let (mut saved, new) = Saved::open(&path, &mut session, &id).unwrap();
    assert!(!new.found && new.notes.is_empty());
    saved.save(&conversation(), &session).unwrap();
    drop(saved);
    let bytes = fs::read(&path).unwrap();
    let mut open = |bytes: &[u8]| {
        fs::write(&path, bytes).unwrap();
        let opened = Saved::open(&path, &mut session, &id).map(|(_, resumed)| resumed);
        let copies: Vec<PathBuf> = fs::read_dir(folder.path())
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .filter(|p| p.to_string_lossy().contains(".damaged"))
            .collect();
        for copy in &copies {
            assert_eq!(fs::read(copy).unwrap(), bytes, "a damaged file is kept");
            fs::remove_file(copy).unwrap();
        }
        (opened, copies.len())
    };
    let (whole, copies) = open(&bytes);
    let whole = whole.unwrap();
    assert_eq!(
        (whole.conversation, whole.found, copies),
        (conversation(), true, 0)
    );
    for at in 0..bytes.len() {
        for flip in [1, 0x80] {
            let mut bad = bytes.clone();
            bad[at] ^= flip;
            let (opened, copies) = open(&bad);
            let resumed = opened.unwrap_or_else(|e| panic!("byte {at}: {e}"));
            let kept = &resumed.conversation.messages;
            if copies == 0 {
                assert_eq!(resumed.conversation, conversation(), "byte {at}");
            } else {
                assert!(
                    resumed.notes[0].contains("the session is damaged"),
                    "{:?}",
                    resumed.notes
                );
                // Without the line break between them, two messages are none.
                assert!(kept.len() >= 2, "byte {at}: {} messages", kept.len());
            }
        }
    }
    for end in 0..bytes.len() {
        let (opened, copies) = open(&bytes[..end]);
        match opened {
            Err(e) => assert!(
                end < 18 && e.to_string().contains("a session of octet's"),
                "{end}: {e}"
            ),
            Ok(resumed) => {
                assert!(copies == 1 || end + 1 == bytes.len(), "{end}");
                let kept = resumed.conversation.messages;
                let all = conversation().messages;
                assert!(
                    kept.len() <= all.len() && kept == all[..kept.len()],
                    "{end}"
                );
            }
        }
    }
}

#[test]
fn names_stay_on_the_shelf() {
    let shelf = Shelf("/shelf".into());
    assert_eq!(shelf.path("fox").unwrap(), Path::new("/shelf/fox.chat"));
    assert_eq!(shelf.path("./fox").unwrap(), Path::new("./fox"));
    assert_eq!(shelf.name(Path::new("/shelf/fox.chat")), "fox");
    assert_eq!(shelf.name(Path::new("/other/fox.chat")), "/other/fox.chat");
    for bad in ["", ".", "..", "-m", "a\nb"] {
        assert!(matches!(shelf.path(bad), Err(Error::Usage(_))), "{bad:?}");
    }
}

// ---------------------------------------------------------------------------------------------
// The program

const CHAT: [&str; 5] = ["chat", "--temp", "0", "-n", "6"];

fn chat(home: &Home, session: &str, more: &[&str], input: &str) -> (String, String) {
    let args = [&CHAT[..], &["--session", session], more].concat();
    let out = home.octet_with(&args, input);
    (out.text().to_string(), out.stderr.clone())
}

/// The messages of a session's file.
fn messages(path: &str) -> Vec<Value> {
    let Ok(text) = fs::read_to_string(path) else {
        return Vec::new();
    };
    let lines = text.lines().map(|line| serde_json::from_str(line).unwrap());
    lines
        .filter(|line: &Value| line["role"].is_string())
        .collect()
}

#[test]
fn a_resumed_conversation_is_the_same_and_reads_only_what_is_new() {
    let home = Home::new();
    let file = home.path("s").to_str().unwrap().to_string();
    let questions = [
        "Tell me a story about a fox who met a king.",
        "And then?",
        "Why?",
    ];
    let long = "It was a long and cold winter in the forest. ".repeat(20);
    let first = format!("{long}{}\n", questions[0]);
    let whole = home.octet_with(
        &CHAT,
        format!("{first}{}\n{}\n", questions[1], questions[2]),
    );

    let mut said = String::new();
    for (i, input) in [
        first,
        format!("{}\n", questions[1]),
        format!("{}\n", questions[2]),
    ]
    .iter()
    .enumerate()
    {
        let (text, stderr) = chat(&home, &file, &[], input);
        said += &text;
        let read = closing(&stderr).prompt_tokens;
        assert!(if i == 0 { read > 200 } else { read < 40 }, "{i}: {read}");
        assert_eq!(messages(&file).len(), 2 * (i + 1));
    }
    assert_eq!(said, whole.text());
    #[cfg(unix)]
    for file in [&file, &format!("{file}.kv")] {
        use std::os::unix::fs::PermissionsExt;
        assert_eq!(
            fs::metadata(file).unwrap().permissions().mode() & 0o777,
            0o600
        );
    }

    // Without its cache the text is read again, and with a damaged one as much as is needed: the same words.
    let kv = kv_path(file.as_ref());
    for damage in [true, false] {
        let kept = [fs::read(&file).unwrap(), fs::read(&kv).unwrap()];
        if damage {
            let mut bad = kept[1].clone();
            let end = bad.len() - 5;
            bad[end] ^= 1;
            fs::write(&kv, bad).unwrap();
        } else {
            fs::remove_file(&kv).unwrap();
        }
        let (text, stderr) = chat(&home, &file, &[], "And?\n");
        assert_eq!(
            stderr.contains("it is damaged from position 256 on"),
            damage,
            "{stderr}"
        );
        let read = closing(&stderr).prompt_tokens;
        assert!(
            if damage {
                (40..120).contains(&read)
            } else {
                read > 200
            },
            "{read}"
        );
        for (path, bytes) in [Path::new(&file), &kv].iter().zip(kept) {
            fs::write(path, bytes).unwrap();
        }
        let (again, _) = chat(&home, &file, &["--isa", "scalar"], "And?\n");
        assert_eq!(again, text);
        // Take that back.
        chat(&home, &file, &[], "/undo\n");
        assert_eq!(messages(&file).len(), 6);
    }
    // Another model goes on with the text.
    let other = crate::data("demo-BF16.gguf");
    let (_, stderr) = chat(&home, &file, &["-m", other.to_str().unwrap()], "/regen\n");
    assert!(
        stderr.contains("it is of another model; it is computed again"),
        "{stderr}"
    );
    assert!(
        stderr.contains("made with another model, demo-Q4_K_M.gguf"),
        "{stderr}"
    );
    assert_eq!(messages(&file).len(), 6);
}

#[test]
fn files_of_others_are_not_touched() {
    let home = Home::new();
    let notes = home.write("notes", "my notes\n");
    let run = home.octet(&["chat", "--session", &notes]);
    assert!(
        run.error(1)
            .contains("notes: the file is wrong (expected a session of octet's")
    );
    assert_eq!(fs::read_to_string(&notes).unwrap(), "my notes\n");
    assert!(!kv_path(notes.as_ref()).exists());
    let folder = home.path("");
    let run = home.octet(&["chat", "--session", folder.to_str().unwrap()]);
    run.error(1);
    let huge = home.write("huge", "");
    fs::File::options()
        .write(true)
        .open(&huge)
        .unwrap()
        .set_len(1 << 40)
        .unwrap();
    let run = home.octet(&["chat", "--session", &huge]);
    assert!(
        run.error(1).contains("at most 67108864 bytes"),
        "{}",
        run.stderr
    );
    let run = home.octet(&["chat", "--session", "/no/such/folder/s"]);
    run.error(1);
    let new = home.path("new").to_str().unwrap().to_string();
    home.write("new.kv", "my own file");
    assert!(
        home.octet(&["chat", "--session", &new])
            .error(1)
            .contains("new.kv: ")
    );
    assert_eq!(fs::read(home.path("new.kv")).unwrap(), b"my own file");
}

/// A file of another kind in the cache's place costs the cache, not the conversation.
#[test]
fn a_conversation_goes_on_without_its_cache() {
    let home = Home::new();
    let file = home.path("s").to_str().unwrap().to_string();
    chat(&home, &file, &[], "Hello\n");
    home.write("s.kv", "something else");
    let (_, stderr) = chat(&home, &file, &[], "And?\n");
    assert!(
        stderr.contains("s.kv: it is no KV cache of octet's and is kept as ")
            && stderr.contains("octet: 1 turn in "),
        "{stderr}"
    );
    assert_eq!(messages(&file).len(), 4);
    let kept = fs::read(home.path("s.kv.damaged1")).unwrap();
    assert_eq!(kept, b"something else");
    // From then on there is a cache again.
    let (_, stderr) = chat(&home, &file, &[], "And?\n");
    assert!(!stderr.contains("0 tokens are in the KV cache"), "{stderr}");
}

/// What was recovered from a damaged text is saved at once: looking at it and leaving loses nothing.
#[test]
fn what_was_recovered_is_recovered_once() {
    let home = Home::new();
    let file = home.path("s").to_str().unwrap().to_string();
    chat(&home, &file, &[], "Hello\nAnd?\n");
    let text = fs::read_to_string(&file).unwrap();
    let damaged = text.replacen("\"role\":\"user\",", "\"rule\":\"user\",", 1);
    assert_ne!(text, damaged);
    fs::write(&file, &damaged).unwrap();
    let (_, stderr) = chat(&home, &file, &[], "/stats\n");
    assert!(stderr.contains("3 messages could be read"), "{stderr}");
    let copy = fs::read_to_string(home.path("s.damaged1")).unwrap();
    assert_eq!(copy, damaged);
    let (_, stderr) = chat(&home, &file, &[], "More\n");
    assert!(
        stderr.contains(" in ") && !stderr.contains("a new session") && !stderr.contains("damaged"),
        "{stderr}"
    );
    assert_eq!(messages(&file).len(), 5);
}

#[test]
fn a_session_is_for_one_process_at_a_time() {
    let home = Home::new();
    let file = home.path("s").to_str().unwrap().to_string();
    chat(&home, &file, &[], "Hello\n");
    let mut command = home.command(&["chat", "--session", &file]);
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    let mut first = command.spawn().unwrap();
    let deadline = Instant::now() + PATIENCE;
    loop {
        let second = home.octet(&["chat", "--session", &file]);
        if second.code == Some(1) {
            assert!(
                second
                    .error(1)
                    .ends_with("s.kv: cannot open: another octet is using it")
            );
            break;
        }
        // The first has not come so far.
        assert!(Instant::now() < deadline);
    }
    drop(first.stdin.take());
    assert!(first.wait().unwrap().success());
    chat(&home, &file, &[], "And?\n");
    assert_eq!(messages(&file).len(), 4);
}

/// Kills a conversation `times` times while it is saved, and goes on.
fn kill_and_go_on(times: usize) {
    let home = Home::new();
    let file = home.path("s").to_str().unwrap().to_string();
    let question = |i: usize| format!("Question {i}?\n");
    let mut turns = 0;
    for round in 0..times {
        let input: String = (turns..turns + 50).map(question).collect();
        let path = home.write("input", input);
        let args = [&CHAT[..], &["--session", &file]].concat();
        let mut command = home.command(&args);
        command
            .stdin(fs::File::open(path).unwrap())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let mut child = command.spawn().unwrap();
        // Some time after a turn was saved; which part of the next turn that is, differs.
        let deadline = Instant::now() + PATIENCE;
        while messages(&file).len() <= 2 * turns && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(1));
        }
        std::thread::sleep(Duration::from_micros(round as u64 * 7919 % 20_000));
        crate::faults::end(&mut child, round);
        let kept = messages(&file);
        let text = fs::read_to_string(&file).unwrap();
        assert!(text.ends_with("\"}\n") && kept.len().is_multiple_of(2) && kept.len() / 2 > turns);
        turns = kept.len() / 2;
        for (i, turn) in kept.chunks(2).enumerate() {
            assert_eq!(turn[0]["content"], question(i).trim_end());
        }
    }
    // It is the conversation that was never interrupted.
    let (_, stderr) = chat(&home, &file, &["--ctx", "2048"], "");
    assert!(!stderr.contains("session is damaged"), "{stderr}");
    if !stderr.contains("left out") {
        let other = home.path("t").to_str().unwrap().to_string();
        let input: String = (0..turns.min(60)).map(question).collect();
        chat(&home, &other, &[], &input);
        let (killed, whole) = (messages(&file), messages(&other));
        assert_eq!(killed[..whole.len()], whole);
    }
}

#[test]
fn killed_at_any_moment_a_session_has_every_answer() {
    kill_and_go_on(crate::faults::kills(20));
}

#[test]
fn a_full_context_goes_on_without_its_oldest_turns() {
    let home = Home::new();
    for kv in ["f16", "q8_0", "f32"] {
        let input: String = (0..12)
            .map(|i| format!("Question number {i} about a fox?\n"))
            .collect();
        let out = home.octet_with(
            &[
                &CHAT[..],
                &["-s", "You are a king.", "--ctx", "96", "--kv", kv],
            ]
            .concat(),
            input,
        );
        assert_eq!(
            out.text().lines().filter(|l| !l.is_empty()).count(),
            12,
            "{}",
            out.text()
        );
        assert!(
            out.stderr
                .contains("octet: the context of 96 tokens is full: the oldest"),
            "{}",
            out.stderr
        );
        assert!(out.stderr.contains("left out from here on"));
    }
    // Within an answer, too; and a turn that is too long by itself ends where the context does.
    let args = [
        "chat", "--temp", "0", "--ctx", "64", "-l", "2-1000", "-n", "100",
    ];
    let out = home.octet_with(&args, "Hello\n");
    assert!(
        out.stderr
            .contains("this turn alone fills the context of 64 tokens"),
        "{}",
        out.stderr
    );
    let args = [
        "chat", "--temp", "0", "--ctx", "96", "-l", "2-1000", "-n", "60",
    ];
    let out = home.octet_with(&args, "Hello\nAnd then?\n");
    assert!(
        out.stderr
            .contains("the oldest turn is left out from here on"),
        "{}",
        out.stderr
    );
    assert_eq!(closing(&out.stderr).answer_tokens, 120);
    // What does not fit at all changes nothing.
    let out = home.octet_with(&args, format!("Hello\n{}\n/stats\n", "fox ".repeat(100)));
    let said = String::from_utf8(out.stdout).unwrap();
    assert!(
        said.contains("1 turn;") && out.stderr.contains("the context is full"),
        "{}",
        out.stderr
    );
    assert_eq!(out.code, Some(1));
}
