//! Lines from a terminal: keys, completion, texts of several lines, history, and the user's own editor for long ones.

use super::commands::{COMMANDS, Completes, command};
use crate::chat::sampler::settings;
use crate::chat::saved::Shelf;
use crate::disk;
use crate::error::{Error, Result};
use rustyline::completion::{Completer, FilenameCompleter, Pair};
use rustyline::error::ReadlineError;
use rustyline::history::FileHistory;
use rustyline::validate::{ValidationContext, ValidationResult, Validator};
use rustyline::{
    Cmd, CompletionType, ConditionalEventHandler, Config, Context, Editor, Event as Key,
    EventContext, EventHandler, Helper, Highlighter, Hinter, KeyCode, KeyEvent, Modifiers,
    RepeatCount,
};
use serde_json::json;
use std::ffi::{OsStr, OsString};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// Lines that are remembered.
const HISTORY: usize = 1000;

/// The keys, for `/help`.
pub(super) const KEYS: &[(&str, &str)] = &[
    ("Ctrl-C", "stops an answer; at the prompt it drops the line"),
    ("Ctrl-D", "on an empty line leaves"),
    ("Alt-Enter", "begins a new line within a text"),
    ("\"\"\"", "begins and ends a text of several lines"),
    ("Ctrl-X Ctrl-E", "writes on in $VISUAL or $EDITOR"),
    ("Tab", "completes commands, files, sessions and options"),
];

/// What a person did at a prompt.
pub(super) enum Line {
    /// Entered a text.
    Text(String),
    /// Dropped it (Ctrl-C).
    Dropped,
    /// Ended the input (Ctrl-D).
    End,
}

/// The person's end of the conversation.
pub(super) struct Terminal {
    editor: Editor<Assistant, FileHistory>,
    /// Where the lines typed so far are kept; `None`: nowhere.
    history: Option<PathBuf>,
    /// Set by the keys that ask for the user's own editor.
    wanted: Arc<AtomicBool>,
}

impl Terminal {
    /// Takes the terminal over. `shelf`: the sessions whose names are completed.
    pub(super) fn new(history: Option<PathBuf>, shelf: Option<Shelf>) -> Result<Terminal> {
        let config = Config::builder()
            .max_history_size(HISTORY)
            .map_err(failed)?
            // As in a shell: what all have in common, then the list of all.
            .completion_type(CompletionType::List)
            .completion_show_all_if_ambiguous(true)
            .build();
        let mut editor = Editor::with_config(config).map_err(failed)?;
        let wanted = Arc::new(AtomicBool::new(false));
        editor.set_helper(Some(Assistant {
            files: FilenameCompleter::new(),
            shelf,
            wanted: Arc::clone(&wanted),
        }));
        // Not Ctrl-J: a line that is typed while an answer is written ends with one.
        editor.bind_sequence(
            Key::from(KeyEvent(KeyCode::Enter, Modifiers::ALT)),
            Cmd::Newline,
        );
        editor.bind_sequence(
            Key::KeySeq(vec![KeyEvent::ctrl('X'), KeyEvent::ctrl('E')]),
            EventHandler::Conditional(Box::new(Want(Arc::clone(&wanted)))),
        );
        if let Some(file) = &history {
            // There is none the first time.
            let _ = editor.load_history(file);
        }
        Ok(Terminal {
            editor,
            history,
            wanted,
        })
    }

    /// A text, typed after `prompt`; `text` stands there to be changed.
    pub(super) fn read(&mut self, prompt: &str, text: &str, calm: &AtomicBool) -> Result<Line> {
        let mut text = text.to_string();
        loop {
            match self.editor.readline_with_initial(prompt, (&text, "")) {
                Ok(line) if self.wanted.swap(false, Ordering::Relaxed) => {
                    text = match edited(&line, calm) {
                        Ok(text) => text,
                        Err(e) => {
                            super::note(format!("octet: {e}"));
                            line
                        }
                    };
                }
                Ok(line) => return Ok(Line::Text(line)),
                Err(ReadlineError::Interrupted) => return Ok(Line::Dropped),
                Err(ReadlineError::Eof) => return Ok(Line::End),
                Err(e) => return Err(failed(e)),
            }
        }
    }

    /// Remembers a line, for its owner's eyes. A read-only home is no reason to end a conversation.
    pub(super) fn remember(&mut self, line: &str) {
        if !self.editor.add_history_entry(line).unwrap_or(false) {
            return;
        }
        let Some(file) = &self.history else { return };
        let _ = file.parent().map(disk::private_folder);
        // Appends, so that two conversations at a time keep each other's lines.
        let _ = self.editor.append_history(file);
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            let _ = std::fs::set_permissions(file, std::fs::Permissions::from_mode(0o600));
        }
    }
}

fn failed(e: ReadlineError) -> Error {
    Error::Io {
        file: "<terminal>".into(),
        action: "read",
        source: std::io::Error::other(e),
    }
}

/// The keys that end a line because its text shall go to the user's editor.
struct Want(Arc<AtomicBool>);

impl ConditionalEventHandler for Want {
    fn handle(&self, _: &Key, _: RepeatCount, _: bool, _: &EventContext<'_>) -> Option<Cmd> {
        self.0.store(true, Ordering::Relaxed);
        Some(Cmd::AcceptLine)
    }
}

/// `text` as the user's editor leaves it.
///
/// # Errors
/// If there is no such editor, it fails, or the text is no UTF-8 then.
pub(super) fn edited(text: &str, calm: &AtomicBool) -> Result<String> {
    let file = std::env::temp_dir().join(format!("octet-{}.md", std::process::id()));
    let result = edited_in(&file, text, calm);
    let _ = std::fs::remove_file(&file);
    result
}

fn edited_in(file: &Path, text: &str, calm: &AtomicBool) -> Result<String> {
    let failed = |action| Error::io(file, action);
    // A file or link that somebody put there before is not followed.
    let mut out = disk::private()
        .create_new(true)
        .open(file)
        .map_err(failed("create"))?;
    out.write_all(text.as_bytes()).map_err(failed("write"))?;
    drop(out);
    let program = own_editor();
    let name = program.to_string_lossy().into_owned();
    let status = shell(&program, file.as_os_str())
        .spawn()
        .and_then(|child| wait(child, calm))
        .map_err(Error::io(&name, "run"))?;
    if !status.success() {
        return Err(Error::invalid(
            name,
            "the editor's end",
            "exit status: 0",
            status,
        ));
    }
    let bytes = std::fs::read(file).map_err(failed("read"))?;
    let text = disk::utf8(file, bytes)?;
    Ok(text.trim_end().to_string())
}

fn own_editor() -> OsString {
    let set = |name| std::env::var_os(name).filter(|value| !value.is_empty());
    let usual = if cfg!(windows) { "notepad" } else { "vi" };
    set("VISUAL")
        .or_else(|| set("EDITOR"))
        .unwrap_or_else(|| usual.into())
}

/// A command line of the user's with one more argument, as the system's shell understands it.
fn shell(line: &OsString, argument: &OsStr) -> Command {
    if cfg!(windows) {
        let mut command = Command::new("cmd");
        command.arg("/C").arg(line).arg(argument);
        return command;
    }
    let mut script = line.clone();
    script.push(" \"$1\"");
    let mut command = Command::new("sh");
    command.arg("-c").arg(script).arg("sh").arg(argument);
    command
}

/// Waits for a program that has the terminal. Keys that interrupt are for that program: `calm`, which
/// they set here too, is set back.
fn wait(mut child: Child, calm: &AtomicBool) -> std::io::Result<ExitStatus> {
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        calm.store(false, Ordering::Relaxed);
        std::thread::sleep(Duration::from_millis(20));
    };
    calm.store(false, Ordering::Relaxed);
    Ok(status)
}

/// Bytes of a tool's output that are taken.
const MAX_OUTPUT: u64 = 1 << 20;

/// Runs a tool; gives the result for the model, which also learns what went wrong.
pub(super) fn run_tool(command: &OsString, name: &str, arguments: &str) -> String {
    let error = |what: &dyn std::fmt::Display| json!({"error": what.to_string()}).to_string();
    let child = shell(command, OsStr::new(name))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn();
    let mut child = match child {
        Ok(child) => child,
        Err(e) => return error(&e),
    };
    let (stdin, stdout) = (child.stdin.take(), child.stdout.take());
    let mut output = Vec::new();
    let read = std::thread::scope(|scope| {
        // A tool may ignore its arguments, or write before it has read them.
        scope.spawn(|| stdin.map(|mut stdin| stdin.write_all(arguments.as_bytes())));
        let mut stdout = stdout.expect("it was asked for").take(MAX_OUTPUT + 1);
        let read = stdout.read_to_end(&mut output);
        if output.len() as u64 > MAX_OUTPUT {
            let _ = child.kill();
        }
        read
    });
    let status = child.wait();
    let text = String::from_utf8_lossy(&output);
    match (read, status) {
        (Err(e), _) | (_, Err(e)) => error(&e),
        _ if output.len() as u64 > MAX_OUTPUT => {
            error(&format!("more than {MAX_OUTPUT} bytes of output"))
        }
        (_, Ok(status)) if !status.success() => {
            json!({"error": status.to_string(), "output": text.trim_end()}).to_string()
        }
        _ => text.trim_end().to_string(),
    }
}

/// Marks the beginning and the end of a text of several lines.
const QUOTES: &str = "\"\"\"";

/// The text of a line that may be put in [`QUOTES`].
pub(super) fn unquoted(line: &str) -> String {
    match line.trim().strip_prefix(QUOTES) {
        Some(rest) => rest
            .strip_suffix(QUOTES)
            .unwrap_or(rest)
            .trim_matches('\n')
            .to_string(),
        None => line.to_string(),
    }
}

/// Completes commands and their arguments, and asks for more lines inside [`QUOTES`].
#[derive(Helper, Highlighter, Hinter)]
struct Assistant {
    files: FilenameCompleter,
    shelf: Option<Shelf>,
    wanted: Arc<AtomicBool>,
}

impl Completer for Assistant {
    type Candidate = Pair;

    fn complete(
        &self,
        line: &str,
        pos: usize,
        _: &Context<'_>,
    ) -> rustyline::Result<(usize, Vec<Pair>)> {
        let typed = &line[..pos];
        // The names that go on with what was typed from `start` on; `more`: something follows.
        let matching = |start: usize, names: &mut dyn Iterator<Item = (&str, bool)>| {
            let whole = names.filter(|(name, _)| name.starts_with(&typed[start..]));
            let pair = |(name, more): (&str, bool)| Pair {
                display: name.to_string(),
                replacement: format!("{name}{}", if more { " " } else { "" }),
            };
            Ok((start, whole.map(pair).collect()))
        };
        if !typed.starts_with('/') {
            return Ok((pos, Vec::new()));
        }
        let Some((name, argument)) = typed.split_once(' ') else {
            let mut names = COMMANDS.iter().map(|c| (c.name, !c.argument.is_empty()));
            return matching(0, &mut names);
        };
        let start = name.len() + 1;
        let command = command(name);
        match command.map_or(Completes::Nothing, |c| c.completes) {
            Completes::Nothing => Ok((pos, Vec::new())),
            Completes::Files => self.files.complete_path(line, pos),
            Completes::Sessions => {
                let names = self.shelf.as_ref().map(Shelf::names).unwrap_or_default();
                matching(start, &mut names.iter().map(|name| (name.as_str(), false)))
            }
            Completes::Settings => {
                let Some((name, value)) = argument.split_once(' ') else {
                    return matching(start, &mut settings().map(|s| (s.name, true)));
                };
                // Of a list in one text, the last entry.
                let entry = value.rfind([' ', ';', ',']).map_or(0, |at| at + 1);
                let setting = settings().find(|s| s.is_called(name));
                let choices = setting.map_or(Vec::new(), |s| s.choices());
                let mut choices = choices.into_iter().map(|choice| (choice, false));
                matching(pos - value.len() + entry, &mut choices)
            }
        }
    }
}

impl Validator for Assistant {
    fn validate(&self, context: &mut ValidationContext<'_>) -> rustyline::Result<ValidationResult> {
        let open = match context.input().trim().strip_prefix(QUOTES) {
            Some(rest) => !rest.ends_with(QUOTES),
            None => false,
        };
        Ok(if open && !self.wanted.load(Ordering::Relaxed) {
            ValidationResult::Incomplete
        } else {
            ValidationResult::Valid(None)
        })
    }
}
