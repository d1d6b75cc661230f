//! The conversation at a real (pseudo) terminal.

use std::fs;
use std::time::{Duration, Instant};

use crate::program::{Home, PATIENCE, closing};
use expectrl::process::unix::WaitStatus;
use expectrl::session::OsSession;
use expectrl::{Eof, Expect, Needle, Session};
use std::os::unix::fs::PermissionsExt;

/// The line editor says this when it begins to read a line (bracketed paste on) …
const READS: &str = "\x1b[?2004h";
/// … and this when it has one.
const HAS_READ: &str = "\x1b[?2004l";

/// A person at a terminal.
pub(crate) struct Person(OsSession);

impl Person {
    /// Starts a chat and waits for the first prompt; gives what was said before it.
    pub(crate) fn new(home: &Home, args: &[&str]) -> (Person, String) {
        let mut person = Person(Session::spawn(home.command(args)).unwrap());
        let greeting = person.until(READS);
        (person, greeting)
    }

    /// Waits for `needle`; gives what came before it. `expect` of the session would keep a whole
    /// core busy, which the program needs.
    #[track_caller]
    pub(crate) fn until<N: Needle + Copy + std::fmt::Debug>(&mut self, needle: N) -> String {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let found = self.0.check(needle).unwrap();
            if !found.is_empty() {
                return String::from_utf8_lossy(found.before()).into_owned();
            }
            assert!(Instant::now() < deadline, "{needle:?} does not come");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    pub(crate) fn type_keys(&mut self, keys: &str) {
        self.0.send(keys).unwrap();
    }

    /// Types a line; gives what was said before the next prompt.
    #[track_caller]
    pub(crate) fn line(&mut self, text: &str) -> String {
        self.type_keys(&format!("{text}\r"));
        self.until(HAS_READ);
        self.until(READS)
    }

    /// Waits for the end; gives the last words and the exit code.
    #[track_caller]
    pub(crate) fn end(mut self) -> (String, i32) {
        let deadline = Instant::now() + PATIENCE;
        let mut said = String::new();
        loop {
            match self.0.check(Eof) {
                Ok(found) if !found.is_empty() => {
                    said += &String::from_utf8_lossy(found.as_bytes());
                    break;
                }
                Ok(_) => std::thread::sleep(Duration::from_millis(5)),
                Err(expectrl::Error::Eof) => break,
                Err(e) => panic!("{e}"),
            }
            assert!(
                Instant::now() < deadline,
                "the program does not end: {said}"
            );
        }
        match self.0.get_process().wait().unwrap() {
            WaitStatus::Exited(_, code) => (said, code),
            other => panic!("{other:?}"),
        }
    }
}

/// What `octet run` says, as a terminal shows it.
fn answer(home: &Home, args: &[&str]) -> String {
    let out = home.octet(&[&["run", "--temp", "0", "-n", "8"], args].concat());
    out.text().replace('\n', "\r\n")
}

/// A chat whose answers are `answer`'s.
const CHAT: [&str; 5] = ["chat", "--temp", "0", "-n", "8"];

#[test]
fn a_conversation() {
    let home = Home::new();
    let (mut person, greeting) = Person::new(&home, &CHAT);
    for words in [
        "octet 0.",
        "demo-Q4_K_M.gguf",
        "8 experts, 2 for each token",
        "context 2048",
        "/help",
        "Ctrl-D",
        "small demo model",
    ] {
        assert!(greeting.contains(words), "{words}: {greeting}");
    }
    // It fits a usual terminal.
    let columns = greeting.lines().map(|line| line.chars().count()).max();
    assert!(columns <= Some(80), "{greeting}");
    assert!(person.until("> ").len() < 20);

    let hello = answer(&home, &["-p", "Hello"]);
    assert_eq!(
        person.line("Hello").trim_start_matches("\r\n"),
        hello.trim_start_matches("\r\n")
    );
    let help = person.line("/help");
    for command in ["/help", "/clear", "/system [TEXT]", "/exit"] {
        assert!(
            help.contains(&format!("\n{command} ")) || help.starts_with(command),
            "{command}: {help}"
        );
    }
    assert!(
        person
            .line("/frobnicate")
            .contains("/frobnicate: no such command; /help lists them")
    );
    assert!(!person.line("/clear").contains("octet:"));
    assert!(person.line("Hello").ends_with(&hello));

    person.line("/system You are a king.");
    let king = answer(&home, &["-s", "You are a king.", "-p", "Hello"]);
    assert_ne!(king, hello);
    // The conversation stays, and the text is for its next answers.
    assert!(person.line("/stats").contains("1 turn;"));
    assert!(person.line("/regen").ends_with(&king));
    person.line("/clear");
    assert!(
        person.line("Hello").ends_with(&king),
        "/clear keeps the system text"
    );
    assert!(person.line("/system").ends_with("You are a king.\r\n"));
    person.line("/system none");
    assert!(
        person
            .line("/system")
            .contains("octet: there is nothing set; /system TEXT sets it")
    );
    assert!(person.line("/regen").ends_with(&hello));
    person.line("/clear");

    // A text of several lines: the editor goes on until it is closed.
    person.type_keys("\"\"\"Tell me\r");
    person.type_keys("a story.\"\"\"\r");
    person.until(HAS_READ);
    let said = person.until(READS);
    assert!(
        said.ends_with(&answer(&home, &["-p", "Tell me\na story."])),
        "{said}"
    );
    // Alt-Enter does the same.
    person.line("/clear");
    person.type_keys("Tell me\x1b\ra story.\r");
    person.until(HAS_READ);
    assert!(person.until(READS).ends_with(&said));

    // Half a command and the Tab key.
    assert!(person.line("/he\t").contains("/system [TEXT]"));
    // What may be meant is listed; what all have in common is there already.
    for (keys, listed) in [
        ("/\t", &["/help", "/regen", "/set", "/exit"][..]),
        ("/se\t", &["/sessions", "/set"]),
        ("/set dyn\t", &["dynatemp-exp", "dynatemp-range"]),
        ("/set mirostat \t", &["0", "2"]),
        ("/set samplers top_k;t\t", &["top_k", "top_p", "typ_p"]),
    ] {
        person.type_keys(keys);
        // The line is drawn again below the list.
        person.until("\n");
        let list = person.until("> /");
        let words: Vec<_> = list.split_whitespace().collect();
        for name in listed {
            assert!(words.contains(name), "{keys:?}: {list:?}");
        }
        assert_eq!(words.contains(&"/undo"), keys == "/\t", "{list:?}");
        person.type_keys("\x03");
        person.until(READS);
    }
    // A space behind what goes on.
    assert!(
        person
            .line("/set mirostat-l\t0.2")
            .contains("* mirostat-lr          0.2")
    );
    assert!(
        person
            .line("/set samplers temp\t")
            .contains("* samplers             temperature")
    );
    assert!(
        person
            .line("/set samplers no\t")
            .contains("samplers             none")
    );

    person.type_keys("\x04");
    let (last, code) = person.end();
    assert_eq!(code, 0, "{last}");
    assert!(
        closing(&last.replace("\r\n", "\n")).answer_tokens > 30,
        "{last}"
    );
}

#[test]
fn control_c_stops_an_answer_and_not_the_program() {
    let home = Home::new();
    // Answers that do not end by themselves before a busy machine has seen and typed.
    let endless = ["chat", "--temp", "0", "-l", "2-1000", "-n", "900"];
    let (mut person, _) = Person::new(&home, &endless);
    // At the prompt it drops the line.
    person.type_keys("abc\x03");
    person.until(READS);
    person.type_keys("\x03");
    person.until(READS);
    for question in ["Tell me a long story.", "And then?"] {
        person.type_keys(&format!("{question}\r"));
        person.until(HAS_READ);
        person.until(" the ");
        person.type_keys("\x03");
        let said = person.until("[stopped]");
        assert!(
            !said.contains("context") && !said.contains("panicked"),
            "{said}"
        );
        person.until(READS);
    }
    // It is alive, and hears the next question out.
    assert!(person.line("/help").contains("/clear"));
    person.type_keys("/exit\r");
    let (last, code) = person.end();
    assert_eq!(code, 0, "{last}");
}

/// What is typed while an answer is written does not stand in the midst of it, and is not lost.
#[test]
fn what_is_typed_ahead_waits_for_the_prompt() {
    let home = Home::new();
    let (mut person, _) = Person::new(&home, &["chat", "--temp", "0", "-l", "2-1000", "-n", "200"]);
    person.type_keys("Tell me a story.\r");
    person.until(HAS_READ);
    person.until(" the ");
    person.type_keys("/help\rzebra");
    let answer = person.until(READS);
    assert!(answer.len() > 100, "{answer}");
    assert!(
        !answer.contains("/help") && !answer.contains("zebra"),
        "{answer}"
    );
    // The line is entered as it is, and the beginning of another stands in the next.
    let shown = person.until(READS);
    assert!(
        shown.contains("/help") && shown.contains("Ctrl-D"),
        "{shown}"
    );
    person.until("zebra");
    person.type_keys("\x03");
    person.until(READS);
    // What is typed at the prompt, and after the end, is shown as ever.
    person.type_keys("/exit\r");
    let (last, code) = person.end();
    assert_eq!(code, 0, "{last}");
    assert!(last.contains("/exit"), "{last}");
}

#[test]
fn the_history_is_kept_for_its_owner() {
    let home = Home::new();
    let (mut person, _) = Person::new(&home, &CHAT);
    let hello = person.line("Hello fox");
    person.line("/clear");
    person.type_keys("\x04");
    assert_eq!(person.end().1, 0);
    let file = home.path("state/octet/history");
    let mode = fs::metadata(&file).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let folder = fs::metadata(home.path("state/octet")).unwrap();
    assert_eq!(folder.permissions().mode() & 0o777, 0o700);
    let kept = fs::read_to_string(&file).unwrap();
    assert!(kept.contains("Hello fox\n/clear\n"), "{kept}");

    // Two steps back, in another run.
    let (mut person, _) = Person::new(&home, &CHAT);
    person.type_keys("\x1b[A\x1b[A\r");
    let typed = person.until(HAS_READ);
    assert!(typed.contains("Hello fox"), "{typed:?}");
    assert_eq!(person.until(READS), hello);
    person.type_keys("/exit\r");
    assert_eq!(person.end().1, 0);
    // Without a place for it, there is none, and nobody minds.
    fs::remove_dir_all(home.path("state")).unwrap();
    fs::write(home.path("state"), "a file").unwrap();
    let (mut person, _) = Person::new(&home, &CHAT);
    assert!(person.line("Hello fox").ends_with(&hello));
    person.type_keys("\x04");
    assert_eq!(person.end().1, 0);
}

/// The greedy answer to `text` as the last of a conversation's lines.
fn after(home: &Home, lines: &[&str]) -> String {
    let input: String = lines.iter().map(|line| format!("{line}\n")).collect();
    let out = home.octet_with(&CHAT, input);
    let answer = out.text().lines().last().unwrap();
    format!("{answer}\r\n")
}

/// What the last answer took of the prompt, by `/stats`.
fn read(person: &mut Person) -> usize {
    let stats = person.line("/stats");
    let last = stats.split("last answer").nth(1).unwrap();
    last.split_whitespace().next().unwrap().parse().unwrap()
}

#[test]
fn turns_are_answered_again_changed_and_taken_back() {
    let home = Home::new();
    let (mut person, _) = Person::new(&home, &CHAT);
    assert!(
        person
            .line("/regen")
            .contains("octet: there is nothing to answer again")
    );
    assert!(
        person
            .line("/undo")
            .contains("octet: there is nothing to take back")
    );
    assert!(
        person
            .line("/edit")
            .contains("octet: there is nothing to change")
    );
    assert!(
        person
            .line("/copy")
            .contains("octet: there is nothing to copy")
    );
    assert!(
        person
            .line("/experts")
            .contains("octet: there is nothing to show")
    );
    let long = "Tell me a story about a fox who went a long way through the forest.";
    let fox = person.line(long);
    let king = person.line("And the king?");
    assert!(king.ends_with(&after(&home, &[long, "And the king?"])));
    // Only the last token of the prompt is computed again.
    assert_eq!(person.line("/regen"), king);
    assert_eq!(read(&mut person), 1);
    assert!(person.line("/experts").contains("each of 8 experts"));
    assert!(person.line("/undo").contains("took back: And the king?"));
    assert_eq!(person.line("And the king?"), king);
    assert_eq!(read(&mut person), 1);
    // Another end of the message: what is before it is kept.
    let pig = person.line("/edit And the pig?");
    assert!(pig.ends_with(&after(&home, &[long, "And the pig?"])));
    assert!((2..12).contains(&read(&mut person)));
    // The message stands in the line, to be changed there.
    person.type_keys("/edit\r");
    person.until(HAS_READ);
    person.until(READS);
    person.until("And the pig?");
    person.type_keys("\x7f\x7f\x7f\x7fking?\r");
    person.until(HAS_READ);
    assert_eq!(person.until(READS), king);
    // Dropped, it changes nothing; so does a command.
    for keys in ["\x03", "\x15/stats\r"] {
        person.type_keys("/edit\r");
        person.until(HAS_READ);
        person.until(READS);
        person.type_keys(keys);
        person.until(READS);
    }
    assert!(person.line("/stats").contains("2 turns;"));
    let copied = person.line("/copy");
    let start = copied.find("\x1b]52;c;").unwrap() + 7;
    let end = copied.find('\x07').unwrap();
    assert!(
        end > start + 8 && (end - start).is_multiple_of(4),
        "{copied:?}"
    );
    // Back to the beginning.
    person.line("/undo");
    person.line("/undo");
    assert_eq!(person.line(long), fox);
    person.type_keys("/exit\r");
    assert_eq!(person.end().1, 0);
}

#[test]
fn long_texts_come_by_keys_paste_file_and_editor() {
    let home = Home::new();
    // An editor that adds a line to what it gets.
    let script = "#!/bin/sh\ntext=$(cat \"$1\")\nprintf '%s\\na story.\\n' \"$text\" > \"$1\"\n";
    let editor = home.write("editor.sh", script);
    let mut command = home.command(&CHAT);
    command
        .env("VISUAL", format!("sh {editor}"))
        .env("EDITOR", "false");
    let mut person = Person(Session::spawn(command).unwrap());
    person.until(READS);
    let told = answer(&home, &["-p", "Tell me\na story."]);
    let mut says = |keys: &str, edited: bool, end: &str| {
        person.type_keys(keys);
        if edited {
            person.until(HAS_READ);
            person.until(READS);
        }
        person.type_keys(end);
        person.until(HAS_READ);
        let said = person.until(READS);
        assert!(said.ends_with(&told), "{keys:?}: {said:?}");
        person.line("/clear");
    };
    says("Tell me\x1b\ra story.", false, "\r"); // Alt-Enter
    says("\x1b[200~Tell me\ra story.\x1b[201~", false, "\r"); // pasted
    says("Tell me\x1b\r\x18\x05", true, "\r"); // Ctrl-X Ctrl-E
    says("\"\"\"Tell me\r\x18\x05", true, "\"\"\"\r"); // before the quotes are closed
    says("/editor Tell me\r", true, "\r");

    home.write("a tale.txt", "Once `x`\n");
    let path = home.path("a tale.txt");
    let attached = person.line(&format!("/read {}", path.display()));
    assert!(attached.contains("attached a tale.txt: "), "{attached}");
    // The Tab key finishes the name, with a backslash for the space.
    let half = path
        .to_str()
        .unwrap()
        .strip_suffix("ale.txt")
        .unwrap()
        .replace(' ', "\\ ");
    assert!(
        person
            .line(&format!("/read {half}\t"))
            .contains("attached a tale.txt: ")
    );
    let text = "a tale.txt:\n```\nOnce `x`\n```\n\n";
    let said = person.line("Go on.");
    let want = answer(&home, &["-p", &format!("{text}{text}Go on.")]);
    assert!(said.ends_with(&want), "{said:?}");
    person.line("/clear");
    // Attached once.
    assert!(
        person
            .line("Hello")
            .ends_with(&answer(&home, &["-p", "Hello"]))
    );
    home.write("binary", [0xff, 0xfe]);
    home.write("long", "fox ".repeat(5000));
    for (name, why) in [
        ("binary", "valid UTF-8"),
        ("long", "the context is full"),
        ("missing", "No such file"),
        ("", "folder"),
    ] {
        let said = person.line(&format!("/read {}", home.path(name).display()));
        assert!(said.contains("octet: ") && said.contains(why), "{said}");
    }
    assert!(person.line("/read").contains("expected the name of a file"));
    person.type_keys("/exit\r");
    assert_eq!(person.end().1, 0);
    let left = fs::read_dir(std::env::temp_dir()).unwrap().flatten();
    let ours = |name: &str| name.starts_with("octet-") && name.ends_with(".md");
    assert!(
        !left
            .into_iter()
            .any(|f| ours(&f.file_name().to_string_lossy()))
    );
}

#[test]
fn conversations_are_kept_under_names() {
    let home = Home::new();
    let (mut person, _) = Person::new(&home, &CHAT);
    // Without a name it gets one.
    assert!(person.line("/save").contains("sessions/chat-1.chat, and"));
    person.line("/clear");
    assert!(person.line("/save").contains("sessions/chat-2.chat, and"));
    assert!(person.line("/save").contains("it is kept in "));
    person.line("/clear");
    for name in ["chat-1", "chat-2"] {
        for end in ["chat", "chat.kv"] {
            fs::remove_file(home.path(&format!("state/octet/sessions/{name}.{end}"))).unwrap();
        }
    }
    assert!(person.line("/save -").contains("expected a name"));
    assert!(person.line("/fork").contains("/save NAME makes one"));
    assert!(
        person
            .line("/sessions")
            .contains("there are no sessions in")
    );
    assert!(person.line("/load fox").contains("the session is missing"));
    let hello = person.line("Hello fox");
    assert!(
        person
            .line("/load fox")
            .contains("this conversation is not saved")
    );
    assert!(
        person
            .line("/save fox")
            .contains("sessions/fox.chat, and again after each answer")
    );
    let king = person.line("And the king?");
    assert!(
        person
            .line("/save pig")
            .contains("/fork pig goes on in a copy")
    );
    assert!(person.line("/fork").contains("fox-2.chat"));
    person.line("/undo");
    assert!(
        person
            .line("/fork fox")
            .contains("there is a session fox already")
    );
    let list = person.line("/sessions");
    assert!(
        list.contains("* fox-2 ") && list.contains("  fox "),
        "{list}"
    );
    assert!(
        list.contains("1 turn ") && list.contains("2 turns ") && list.contains("Hello fox"),
        "{list}"
    );
    // Another conversation does not touch them.
    assert!(person.line("/clear").contains("fox-2 stays as it is"));
    person.line("Good day");
    person.line("/clear");
    // Tab completes the name; the end of the conversation is shown.
    let loaded = person.line("/load fox-\t");
    assert!(
        loaded.contains("octet: 1 turn in ") && loaded.contains("> Hello fox"),
        "{loaded}"
    );
    assert!(
        loaded.ends_with(hello.trim_start_matches("\r\n")),
        "{loaded}"
    );
    person.line("/load fox");
    assert_eq!(person.line("/regen"), king);
    assert_eq!(read(&mut person), 1);
    // A process of its own finds them, and this one keeps its session to itself.
    let (mut other, _) = Person::new(&home, &CHAT);
    assert!(
        other
            .line("/load fox")
            .contains("another octet is using it")
    );
    assert!(other.line("/load fox-2").contains("1 turn in"));
    for person in [person, other] {
        let mut person = person;
        person.type_keys("\x04");
        assert_eq!(person.end().1, 0);
    }
    let mode = |name: &str| fs::metadata(home.path(name)).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode("state/octet/sessions"), 0o700);
    assert_eq!(mode("state/octet/sessions/fox.chat"), 0o600);
    assert_eq!(mode("state/octet/sessions/fox.chat.kv"), 0o600);
}

#[test]
fn settings_are_shown_and_changed() {
    let home = Home::new();
    let (mut person, _) = Person::new(&home, &["chat", "-n", "8", "--top-k", "7"]);
    let all = person.line("/set");
    assert!(
        all.contains("* top-k                7") && all.contains("  min-p                0.05"),
        "{all}"
    );
    assert!(
        person
            .line("/set temp")
            .contains("0 always takes the likeliest")
    );
    assert!(
        person
            .line("/set no-such")
            .contains("octet: no-such: no such setting")
    );
    assert!(
        person
            .line("/set temp hot")
            .contains("octet: temp hot: expected a number")
    );
    assert!(
        person
            .line("/set logit-bias 99999+1")
            .contains("no such token")
    );
    // The first breaker takes the place of the usual ones, others come to it.
    let breakers = |person: &mut Person, text: &str| {
        let said = person.line(&format!("/set dry-sequence-breaker {text}"));
        let row = said.split("dry-sequence-breaker ").last().unwrap();
        row.lines().next().unwrap().trim().to_string()
    };
    assert_eq!(breakers(&mut person, "x"), r#""x""#);
    assert_eq!(breakers(&mut person, "y"), r#""x" "y""#);
    assert_eq!(breakers(&mut person, "none"), "none");
    // The same seed, the same answer, however often it is set.
    person.line("/set seed 7");
    let lucky = person.line("Hello");
    assert_ne!(person.line("/regen"), lucky);
    person.line("/set seed 7");
    assert!(lucky.ends_with(person.line("/regen").trim_start()));
    person.line("/clear");
    assert!(
        person
            .line("/set tem\t 0")
            .contains("* temp                 0")
    );
    assert!(
        person
            .line("Hello")
            .ends_with(&answer(&home, &["-p", "Hello"]))
    );
    person.type_keys("\x04");
    assert_eq!(person.end().1, 0);
}

/// Twenty columns, a terminal that can do nothing, one of which nothing is known: the same conversation.
#[test]
fn narrow_dumb_and_unknown_terminals() {
    let home = Home::new();
    let want = answer(&home, &["-p", "Hello fox"]);
    for (term, columns) in [(Some("xterm"), 20), (Some("dumb"), 80), (None, 20)] {
        let mut command = home.command(&CHAT);
        match term {
            Some(term) => command.env("TERM", term),
            None => command.env_remove("TERM"),
        };
        let mut session = Session::spawn(command).unwrap();
        let process = session.get_process_mut();
        process.set_window_size(columns, 5).unwrap();
        let mut person = Person(session);
        let mut said = String::new();
        for line in ["Hello fox", "/help", "/stats", "/exit"] {
            said += &person.until("> ");
            person.type_keys(&format!("{line}\r"));
            // Narrow, the prompt is drawn again where a line goes on.
            said += &person.until("\n");
        }
        let (rest, code) = person.end();
        said += &rest;
        assert_eq!(code, 0, "{term:?}, {columns} columns: {said}");
        assert!(
            said.contains(want.trim()),
            "{term:?}, {columns} columns: {said}"
        );
        assert!(said.contains("conversation 1 turn"), "{said}");
        if term == Some("dumb") {
            assert!(!said.contains('\x1b'), "{said:?}");
        }
    }
}

#[test]
fn no_history_keeps_none() {
    let home = Home::new();
    let (mut person, _) = Person::new(&home, &[&CHAT[..], &["--no-history"]].concat());
    person.line("Hello fox");
    person.type_keys("\x04");
    assert_eq!(person.end().1, 0);
    assert!(!home.path("state").exists());
}

/// Says some Markdown, its marks split over tokens.
const MARKDOWN: &[(&str, &[&str])] = &[(
    "[/INST]",
    &[
        " A *", "*bo", "ld** `", "x` word", "\n`", "``rust\n", "let a;", "\n```", "\nEnd",
    ],
)];

#[test]
fn markdown_is_rendered_on_a_terminal_that_wants_it() {
    let home = Home::new();
    let model = home.write("model.gguf", crate::scripted::model(MARKDOWN));
    let args = ["chat", "-m", &model, "--temp", "0"];
    let plain = "A **bold** `x` word\n```rust\nlet a;\n```\nEnd\n";
    assert_eq!(home.octet_with(&args, "Hi\n").text(), plain);

    let (mut person, _) = Person::new(&home, &args);
    let said = person.line("Hi");
    let want = "A \x1b[1mbold\x1b[0m \x1b[36mx\x1b[0m word\r\n\x1b[2m```rust\x1b[0m\r\n\x1b[36mlet a;\x1b[0m\r\n\x1b[2m```\x1b[0m\r\nEnd\r\n";
    assert!(said.ends_with(want), "{said:?}");
    person.type_keys("\x04");
    assert_eq!(person.end().1, 0);

    for (name, value) in [("NO_COLOR", "1"), ("TERM", "dumb")] {
        let mut command = home.command(&args);
        command.env(name, value);
        let mut person = Person(Session::spawn(command).unwrap());
        person.until("leaves.");
        person.type_keys("Hi\r");
        let said = person.until("End");
        assert!(
            said.contains("A **bold** `x` word\r\n```rust\r\nlet a;"),
            "{name}: {said:?}"
        );
        // A dumb terminal is told nothing but the prompt.
        person.until(if name == "TERM" { "> " } else { READS });
        person.type_keys("\x04");
        assert_eq!(person.end().1, 0);
    }
}

#[test]
fn calls_are_confirmed_one_by_one() {
    let home = Home::new();
    let model = home.write("model.gguf", crate::scripted::model(crate::scripted::ADDS));
    let tools = home.write("tools.json", crate::scripted::tools());
    let adder = home.write("adder.sh", "#!/bin/sh\ncat > \"$0.log\"\necho 5\n");
    let exec = format!("sh {adder}");
    let common = ["chat", "-m", &model, "--temp", "0", "--tools", &tools];
    let log = home.path("adder.sh.log");

    let (mut person, _) = Person::new(&home, &[&common[..], &["--tool-exec", &exec]].concat());
    for (reply, runs) in [
        ("n\r", false),
        ("\r", false),
        ("\x03", false),
        ("\x04", false),
        ("y\r", true),
    ] {
        person.type_keys("2 + 3?\r");
        person.until(HAS_READ);
        let shown = person.until(READS);
        assert!(shown.contains("→ add {\"a\": 2, \"b\": 3}\r\n"), "{shown}");
        person.until("run sh ");
        person.type_keys(reply);
        person.until(HAS_READ);
        let said = person.until(READS);
        assert_eq!(log.exists(), runs, "{reply:?}");
        assert_eq!(said.contains("← 5"), runs, "{said}");
        assert_eq!(said.ends_with("It is five.\r\n"), runs, "{said}");
    }
    assert_eq!(fs::read_to_string(&log).unwrap(), "{\"a\": 2, \"b\": 3}");
    assert!(person.line("/undo").contains("took back: 2 + 3?"));
    person.type_keys("\x04");
    assert_eq!(person.end().1, 0);

    // Without a command the person may answer for the tool.
    let (mut person, _) = Person::new(&home, &common);
    person.type_keys("2 + 3?\r");
    person.until(HAS_READ);
    person.until("result of add (Enter: none)> ");
    person.type_keys("5\r");
    person.until(HAS_READ);
    assert!(person.until(READS).ends_with("It is five.\r\n"));
    person.type_keys("\x04");
    assert_eq!(person.end().1, 0);
}
