//! The conversation at the terminal: read a line, answer, again.
//!
//! Given lines from elsewhere (a pipe on standard input), the same loop answers them one by one.

use super::constraint::Constraint;
use super::sampler::{Sampler, SamplerOptions};
use super::session::{Event, Finish, Limits, Session, Stats};
use super::template::{Message, Role, Template};
use super::tokenizer::{Tokenizer, for_terminal};
use crate::error::{Error, Result};
use rustyline::completion::Completer;
use rustyline::error::ReadlineError;
use rustyline::validate::{ValidationContext, ValidationResult, Validator};
use rustyline::{
    Cmd, Context, Editor, Event as Key, Helper, Highlighter, Hinter, KeyCode, KeyEvent, Modifiers,
};
use std::io::{IsTerminal, Write};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

/// What a conversation needs.
pub struct Repl<'a> {
    /// The sequence of tokens behind it.
    pub session: Session<'a>,
    /// The model's vocabulary.
    pub tokenizer: &'a Tokenizer,
    /// The model's prompt format.
    pub template: &'a Template,
    /// How tokens are chosen.
    pub sampling: SamplerOptions,
    /// The form that each answer must have, if any.
    pub constraint: Option<Constraint>,
    /// The system text, if any.
    pub system: Option<String>,
    /// Most tokens of an answer.
    pub max_tokens: Option<usize>,
    /// Where the lines typed so far are kept; `None`: nowhere.
    pub history: Option<PathBuf>,
    /// Lines that come from elsewhere than the terminal.
    pub lines: Option<Box<dyn Iterator<Item = Result<String>> + 'a>>,
    /// Told how many tokens of a prompt are done, and how many there are.
    pub progress: Box<dyn FnMut(usize, usize) + 'a>,
    /// Set by Ctrl-C while an answer is written.
    pub interrupted: &'a AtomicBool,
}

/// A command of the conversation: a line that begins with `/`.
struct Command {
    name: &'static str,
    argument: &'static str,
    help: &'static str,
    run: fn(&mut Talk<'_>, &str) -> Result<ControlFlow<()>>,
}

/// One row per command; the table also writes `/help` and completes names.
const COMMANDS: &[Command] = &[
    Command {
        name: "/help",
        argument: "",
        help: "show this list",
        run: help,
    },
    Command {
        name: "/clear",
        argument: "",
        help: "forget the conversation, keep the system text",
        run: clear,
    },
    Command {
        name: "/system",
        argument: "[TEXT]",
        help: "set the system text, or take it away; starts afresh",
        run: system,
    },
    Command {
        name: "/exit",
        argument: "",
        help: "leave (so does Ctrl-D)",
        run: exit,
    },
];

/// The running conversation.
struct Talk<'a> {
    repl: Repl<'a>,
    messages: Vec<Message>,
    sampler: Sampler,
    stats: Stats,
}

impl Repl<'_> {
    /// Talks until the input ends or `/exit`. Returns what the machine did.
    ///
    /// # Errors
    /// If standard input or output fail. A prompt that cannot be answered is reported on stderr and
    /// the conversation goes on.
    pub fn run(self) -> Result<Stats> {
        let mut talk = Talk {
            messages: Vec::new(),
            sampler: Sampler::for_text(self.sampling.clone(), self.tokenizer),
            stats: Stats::default(),
            repl: self,
        };
        talk.sampler.constrain(talk.repl.constraint.take());
        match talk.repl.lines.take() {
            Some(lines) => talk.talk_over_lines(lines)?,
            None => talk.talk_at_terminal()?,
        }
        Ok(talk.stats)
    }
}

impl Talk<'_> {
    fn talk_at_terminal(&mut self) -> Result<()> {
        let failed = |e: ReadlineError| Error::Io {
            file: "<terminal>".into(),
            action: "read",
            source: std::io::Error::other(e),
        };
        let mut editor = Editor::<Assistant, _>::new().map_err(failed)?;
        editor.set_helper(Some(Assistant));
        // Alt-Enter breaks a line without ending the text.
        editor.bind_sequence(
            Key::from(KeyEvent(KeyCode::Enter, Modifiers::ALT)),
            Cmd::Newline,
        );
        if let Some(file) = &self.repl.history {
            // There is none the first time.
            let _ = editor.load_history(file);
        }
        loop {
            match editor.readline("> ") {
                Ok(line) => {
                    // A Ctrl-C that came before this line was not meant for its answer.
                    self.repl.interrupted.store(false, Ordering::Relaxed);
                    let text = unquoted(&line);
                    if text.trim().is_empty() {
                        continue;
                    }
                    let _ = editor.add_history_entry(&line);
                    if let Some(file) = &self.repl.history {
                        save_history(&mut editor, file);
                    }
                    if self.line(&text)?.is_break() {
                        return Ok(());
                    }
                }
                // Ctrl-C at the prompt drops the line; Ctrl-D on an empty line leaves.
                Err(ReadlineError::Interrupted) => {}
                Err(ReadlineError::Eof) => return Ok(()),
                Err(e) => return Err(failed(e)),
            }
        }
    }

    fn talk_over_lines(&mut self, lines: impl Iterator<Item = Result<String>>) -> Result<()> {
        // While no answer is being written the flag stays set, as after a first Ctrl-C: nobody would
        // look at it before the next line comes, so one is enough to end the program then.
        self.repl.interrupted.store(true, Ordering::Relaxed);
        for line in lines {
            let line = line?;
            self.repl.interrupted.store(false, Ordering::Relaxed);
            if !line.trim().is_empty() && self.line(&line)?.is_break() {
                break;
            }
            if self.repl.interrupted.swap(true, Ordering::Relaxed) {
                return Err(Error::Interrupted);
            }
        }
        Ok(())
    }

    /// A command or something to answer.
    fn line(&mut self, text: &str) -> Result<ControlFlow<()>> {
        if let Some(rest) = text.strip_prefix('/')
            && !rest.starts_with('/')
        {
            let (name, argument) = text.split_once(char::is_whitespace).unwrap_or((text, ""));
            return match COMMANDS.iter().find(|c| c.name == name) {
                Some(command) => (command.run)(self, argument.trim()),
                None => {
                    note(format!("octet: {name}: no such command; /help lists them"));
                    Ok(ControlFlow::Continue(()))
                }
            };
        }
        match self.answer(text) {
            Ok(()) => Ok(ControlFlow::Continue(())),
            Err(e @ Error::Io { .. }) => Err(e),
            Err(e) => {
                note(format!("octet: {e}"));
                if matches!(e, Error::ContextFull { .. }) {
                    note("octet: /clear starts a new conversation");
                }
                Ok(ControlFlow::Continue(()))
            }
        }
    }

    /// Answers and remembers both sides; on an error the conversation is as before.
    fn answer(&mut self, text: &str) -> Result<()> {
        let mut messages = self.messages.clone();
        if messages.is_empty()
            && let Some(system) = &self.repl.system
        {
            messages.push(Message::new(Role::System, system));
        }
        messages.push(Message::new(Role::User, text));
        let prompt = self
            .repl
            .template
            .encode(self.repl.tokenizer, &messages, None)?;
        let limits = Limits {
            max_tokens: self.repl.max_tokens,
            stop: self.repl.template.stop_ids(self.repl.tokenizer),
            logprobs: 0,
        };
        let (interrupted, progress) = (self.repl.interrupted, &mut self.repl.progress);
        let mut stream = self.repl.tokenizer.stream();
        let mut said = String::new();
        let mut failed = None;
        let answer = self
            .repl
            .session
            .answer(&prompt, &mut self.sampler, &limits, |event| {
                match event {
                    Event::Prompt { done, total } => progress(done, total),
                    Event::Token(id) => {
                        let text = stream.push(id);
                        if let Err(e) = show(&text) {
                            failed = Some(e);
                            return ControlFlow::Break(());
                        }
                        said.push_str(&text);
                    }
                }
                match interrupted.load(Ordering::Relaxed) {
                    true => ControlFlow::Break(()),
                    false => ControlFlow::Continue(()),
                }
            })?;
        self.stats.add(&answer.stats);
        if let Some(e) = failed {
            return Err(e);
        }
        let rest = stream.flush();
        show(&rest)?;
        said.push_str(&rest);
        show("\n")?;
        match answer.finish {
            Finish::Stop | Finish::Length => {}
            Finish::ContextFull => note(format!(
                "octet: the context of {} tokens is full; /clear starts a new conversation",
                self.repl.session.limit()
            )),
            Finish::Interrupted => note("[stopped]"),
        }
        // A turn without an answer is not remembered: prompt formats have no place for an empty one.
        if !said.is_empty() {
            messages.push(Message::new(Role::Assistant, said));
            self.messages = messages;
        }
        Ok(())
    }
}

fn help(_: &mut Talk<'_>, _: &str) -> Result<ControlFlow<()>> {
    for c in COMMANDS {
        show(&format!(
            "{:<16} {}\n",
            format!("{} {}", c.name, c.argument),
            c.help
        ))?;
    }
    show(
        "\nCtrl-C stops an answer. \"\"\" begins and ends a text of several lines; so does Alt-Enter within one.\n",
    )?;
    Ok(ControlFlow::Continue(()))
}

fn clear(talk: &mut Talk<'_>, _: &str) -> Result<ControlFlow<()>> {
    talk.messages.clear();
    Ok(ControlFlow::Continue(()))
}

fn system(talk: &mut Talk<'_>, text: &str) -> Result<ControlFlow<()>> {
    talk.repl.system = (!text.is_empty()).then(|| text.to_string());
    talk.messages.clear();
    Ok(ControlFlow::Continue(()))
}

fn exit(_: &mut Talk<'_>, _: &str) -> Result<ControlFlow<()>> {
    Ok(ControlFlow::Break(()))
}

/// Writes to standard output at once, so that an answer appears as it comes; on a terminal without the
/// escape sequences that a model may spell.
///
/// # Errors
/// [`Error::Io`]; of kind `BrokenPipe` when the reader has gone.
pub fn show(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    let text = match out.is_terminal() {
        true => for_terminal(text),
        false => text.into(),
    };
    out.write_all(text.as_bytes())
        .and_then(|()| out.flush())
        .map_err(Error::io("<stdout>", "write"))
}

/// Tells the user something on standard error; nothing is lost where nobody can read it.
fn note(text: impl std::fmt::Display) {
    let _ = writeln!(std::io::stderr().lock(), "{text}");
}

/// Keeps the history for its owner's eyes. A read-only home is no reason to end a conversation.
fn save_history(editor: &mut Editor<Assistant, rustyline::history::DefaultHistory>, file: &Path) {
    let _ = file.parent().map(std::fs::create_dir_all);
    let _ = editor.save_history(file);
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        let _ = std::fs::set_permissions(file, std::fs::Permissions::from_mode(0o600));
    }
}

/// Marks the beginning and the end of a text of several lines.
const QUOTES: &str = "\"\"\"";

/// The text of a line that may be put in [`QUOTES`].
fn unquoted(line: &str) -> String {
    match line.trim().strip_prefix(QUOTES) {
        Some(rest) => rest
            .strip_suffix(QUOTES)
            .unwrap_or(rest)
            .trim_matches('\n')
            .to_string(),
        None => line.to_string(),
    }
}

/// Completes command names and asks for more lines inside [`QUOTES`].
#[derive(Helper, Highlighter, Hinter)]
struct Assistant;

impl Completer for Assistant {
    type Candidate = String;

    fn complete(
        &self,
        line: &str,
        pos: usize,
        _: &Context<'_>,
    ) -> rustyline::Result<(usize, Vec<String>)> {
        let typed = &line[..pos];
        let names = COMMANDS
            .iter()
            .map(|c| c.name)
            .filter(|n| typed.starts_with('/') && n.starts_with(typed));
        Ok((0, names.map(str::to_string).collect()))
    }
}

impl Validator for Assistant {
    fn validate(&self, context: &mut ValidationContext<'_>) -> rustyline::Result<ValidationResult> {
        let open = match context.input().trim().strip_prefix(QUOTES) {
            Some(rest) => !rest.ends_with(QUOTES),
            None => false,
        };
        Ok(if open {
            ValidationResult::Incomplete
        } else {
            ValidationResult::Valid(None)
        })
    }
}
