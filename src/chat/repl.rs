//! The conversation at the terminal: read a line, answer, again.
//!
//! Given lines from elsewhere (a pipe on standard input), the same loop answers them one by one. Lines that begin
//! with `/` are commands (`repl/commands.rs`); keys and completion are in `repl/editor.rs`; answers appear by `repl/screen.rs`, rendered by
//! `repl/markdown.rs`, and what is typed meanwhile waits (`repl/silence.rs`).

mod commands;
mod editor;
mod markdown;
mod screen;
mod silence;

pub use screen::{put, show, styled};
pub use silence::end_silence;

use super::constraint::{Constraint, INCOMPLETE};
use super::conversation::Conversation;
use super::message::{Message, Role, ToolCall};
use super::sampler::{Sampler, SamplerOptions};
use super::saved::{ModelId, Saved, Shelf};
use super::session::{Event, Finish, Limits, Session, Stats};
use super::template::Template;
use super::tokenizer::Tokenizer;
use crate::error::{Error, Result};
use crate::near::did_you_mean;
use crate::readable::for_terminal;
use commands::{COMMANDS, brief, command};
use editor::{Line, Terminal, run_tool, unquoted};
use screen::{Screen, note};
use serde_json::{Value, json};
use silence::Silence;
use std::ffi::OsString;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

/// Times that a model may call tools in one turn.
const MAX_ROUNDS: usize = 16;

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
    /// Told how many tokens of a prompt are done, and how many there are; 0 of 0 when the prompt matters no more.
    pub progress: Box<dyn FnMut(usize, usize) + Send + 'a>,
    /// Set by Ctrl-C while an answer is written.
    pub interrupted: &'a AtomicBool,
    /// Tools that the model may call, in OpenAI's shape.
    pub tools: Vec<Value>,
    /// What runs them.
    pub exec: Option<Exec>,
    /// The session to go on with, and to save to.
    pub saved: Option<PathBuf>,
    /// Where sessions that have names lie, if there is such a place.
    pub shelf: Option<Shelf>,
    /// What tells the model from others; asked only when a session is opened.
    pub model: Box<dyn Fn() -> ModelId + 'a>,
}

/// A command that runs tools: it gets the tool's name as its argument and the call's arguments, JSON, on standard input.
pub struct Exec {
    /// For the system's shell.
    pub command: OsString,
    /// Whether a person is asked before each call; without one, nothing is run then.
    pub asks: bool,
}

/// What became of a conversation.
pub struct Talked {
    /// What the machine did.
    pub stats: Stats,
    /// Messages and commands.
    pub lines: u64,
    /// How many of them could not be answered or done.
    pub failed: u64,
}

/// The running conversation.
struct Talk<'a> {
    repl: Repl<'a>,
    conversation: Conversation,
    /// Where it is saved after each turn.
    saved: Option<Saved>,
    sampler: Sampler,
    screen: Screen,
    /// The person who types the lines, if they do not come from elsewhere.
    terminal: Option<Terminal>,
    /// Texts that go with the next message.
    attached: String,
    /// What stands in the next line already.
    draft: Option<Draft>,
    /// Lines that were read, and those that came to nothing.
    lines: u64,
    failed: u64,
    /// Of all answers, and of the last one.
    stats: Stats,
    last: Stats,
    /// Somebody wants to leave.
    done: bool,
}

/// A text that a command puts into the next line.
struct Draft {
    text: String,
    /// It takes the place of the last turn.
    replaces: bool,
}

impl Repl<'_> {
    /// Talks until the input ends or `/exit`.
    ///
    /// # Errors
    /// If standard input or output fail. A prompt that cannot be answered is reported on stderr and
    /// the conversation goes on.
    pub fn run(mut self) -> Result<Talked> {
        let lines = self.lines.take();
        let mut talk = Talk {
            conversation: Conversation::new(self.system.take()),
            saved: None,
            sampler: Sampler::for_text(self.sampling.clone(), self.tokenizer),
            screen: Screen::new(),
            terminal: None,
            attached: String::new(),
            draft: None,
            lines: 0,
            failed: 0,
            stats: Stats::default(),
            last: Stats::default(),
            done: false,
            repl: self,
        };
        talk.sampler.constrain(talk.repl.constraint.take());
        if lines.is_none() {
            let history = talk.repl.history.take();
            talk.terminal = Some(Terminal::new(history, talk.repl.shelf.clone())?);
        }
        if let Some(path) = talk.repl.saved.take() {
            let given = talk.conversation.system.clone();
            talk.open(&path, given)?;
        }
        match lines {
            Some(lines) => talk.talk_over_lines(lines)?,
            None => talk.talk_at_terminal()?,
        }
        Ok(Talked {
            stats: talk.stats,
            lines: talk.lines,
            failed: talk.failed,
        })
    }
}

impl Talk<'_> {
    fn talk_at_terminal(&mut self) -> Result<()> {
        while !self.done {
            let draft = self.draft.take();
            let text = draft.as_ref().map_or("", |draft| &draft.text);
            let line = match self.read("> ", text)? {
                Line::Text(line) => line,
                Line::Dropped => continue,
                Line::End => break,
            };
            // A Ctrl-C that came before this line was not meant for its answer.
            self.repl.interrupted.store(false, Ordering::Relaxed);
            let text = unquoted(&line);
            if text.trim().is_empty() {
                continue;
            }
            if let Some(terminal) = &mut self.terminal {
                terminal.remember(&line);
            }
            match draft {
                Some(draft) if draft.replaces && !is_command(&text) => self.replace(text)?,
                _ => self.line(&text)?,
            }
        }
        Ok(())
    }

    /// Reads a line from the person; where there is none, that is the end.
    fn read(&mut self, prompt: &str, text: &str) -> Result<Line> {
        match &mut self.terminal {
            Some(terminal) => terminal.read(prompt, text, self.repl.interrupted),
            None => Ok(Line::End),
        }
    }

    fn talk_over_lines(&mut self, lines: impl Iterator<Item = Result<String>>) -> Result<()> {
        // While no answer is being written the flag stays set, as after a first Ctrl-C: nobody would
        // look at it before the next line comes, so one is enough to end the program then.
        self.repl.interrupted.store(true, Ordering::Relaxed);
        for line in lines {
            self.repl.interrupted.store(false, Ordering::Relaxed);
            match line {
                Ok(line) if line.trim().is_empty() => {}
                Ok(line) => self.line(&line)?,
                // Bytes that are no text are one line that cannot be answered.
                Err(e) => {
                    self.lines += 1;
                    self.survive(Err(e))?;
                }
            }
            if self.done {
                break;
            }
            if self.repl.interrupted.swap(true, Ordering::Relaxed) {
                return Err(Error::Interrupted);
            }
        }
        Ok(())
    }

    /// Does what a line asks for: a command, or something to answer. What goes wrong is said, and the
    /// conversation goes on.
    fn line(&mut self, text: &str) -> Result<()> {
        self.lines += 1;
        if !is_command(text) {
            return self.ask(text);
        }
        let (name, argument) = text.split_once(char::is_whitespace).unwrap_or((text, ""));
        match command(name) {
            Some(command) => {
                let result = (command.run)(self, argument.trim());
                self.survive(result)
            }
            None => {
                self.failed += 1;
                let meant = did_you_mean(name, COMMANDS.iter().map(|c| c.name));
                let meant = meant.map_or(String::new(), |meant| format!("{meant} "));
                note(format!(
                    "octet: {name}: no such command; {meant}/help lists them"
                ));
                Ok(())
            }
        }
    }

    /// Says what went wrong. Only what ends the conversation stays an error: nobody who talks, or nobody who listens.
    fn survive(&mut self, result: Result<()>) -> Result<()> {
        let Err(e) = result else { return Ok(()) };
        if matches!(&e, Error::Io { file, .. } if file.to_string_lossy().starts_with('<')) {
            return Err(e);
        }
        self.failed += 1;
        note(format!("octet: {e}"));
        if matches!(e, Error::ContextFull { .. }) {
            note("octet: /clear starts a new conversation");
        }
        Ok(())
    }

    /// Answers a message.
    fn ask(&mut self, text: &str) -> Result<()> {
        let before = self.conversation.clone();
        let message = Message::new(Role::User, self.attached.clone() + text);
        self.conversation.messages.push(message);
        let answered = self.answer(before);
        if answered.is_ok() {
            self.attached.clear();
        }
        self.survive(answered)
    }

    /// Answers another message in place of the last one.
    fn replace(&mut self, text: String) -> Result<()> {
        let before = self.conversation.clone();
        self.conversation.take_back();
        let message = Message::new(Role::User, text);
        self.conversation.messages.push(message);
        let answered = self.answer(before);
        self.survive(answered)
    }

    /// Lets the model go on with the conversation. If it cannot, or says nothing, the conversation is `before` again: prompt formats have
    /// no place for an empty answer.
    fn answer(&mut self, before: Conversation) -> Result<()> {
        let answered = self.go_on();
        match answered {
            Ok(true) => self.save(),
            _ => self.conversation = before,
        }
        answered.map(drop)
    }

    /// Saves the conversation if it has a place. That it cannot be saved does not end it.
    fn save(&mut self) {
        let Some(saved) = &mut self.saved else { return };
        match saved.save(&self.conversation, &self.repl.session) {
            Ok(None) => {}
            Ok(Some(e)) => note(format!(
                "octet: from here on the conversation is saved without its KV cache: {e}"
            )),
            Err(e) => {
                self.failed += 1;
                note(format!("octet: the conversation is not saved: {e}"));
            }
        }
    }

    /// Goes on with the session at `path`, which may be new. If it cannot be opened, nothing has changed.
    /// `system`: a system text that takes the place of the one that was saved.
    fn open(&mut self, path: &Path, system: Option<String>) -> Result<()> {
        let model = (self.repl.model)();
        let (saved, resumed) = Saved::open(path, &mut self.repl.session, &model)?;
        for note in &resumed.notes {
            self::note(format!("octet: {note}"));
        }
        self.saved = Some(saved);
        self.attached.clear();
        if !resumed.found {
            note(format!("octet: a new session, {}", path.display()));
            return Ok(());
        }
        self.conversation = resumed.conversation;
        if system.is_some() {
            self.conversation.system = system;
        }
        note(format!(
            "octet: {} in {}; {} tokens are in the KV cache",
            turns(self.conversation.len()),
            path.display(),
            self.repl.session.len(),
        ));
        if resumed.damaged {
            // What was recovered shall not have to be recovered again.
            self.save();
        }
        self.recall()
    }

    /// Shows a person how the conversation ended the last time.
    fn recall(&mut self) -> Result<()> {
        if self.terminal.is_none() {
            return Ok(());
        }
        if let Some(question) = self.conversation.last_question() {
            show(&format!("> {question}\n"))?;
        }
        if let Some(answer) = self.conversation.last_answer() {
            self.screen.say(answer)?;
            self.screen.end("")?;
        }
        Ok(())
    }

    /// Lets the model speak until it has no more calls to make; `false`: it says nothing at all.
    fn go_on(&mut self) -> Result<bool> {
        self.last = Stats::default();
        self.repl.session.routes.clear();
        let said = self.message()?;
        for round in 0.. {
            let last = self.conversation.messages.last();
            let calls = last.map_or(Vec::new(), |m| m.tool_calls.clone());
            let run = round < MAX_ROUNDS;
            if calls.is_empty() || !self.call(&calls, run)? || !self.message()? {
                break;
            }
        }
        Ok(said)
    }

    /// The model's next message; `false`: it says nothing.
    fn message(&mut self) -> Result<bool> {
        let (template, tokenizer) = (self.repl.template, self.repl.tokenizer);
        let silence = self.terminal.is_some().then(Silence::begin);
        let most = self.repl.max_tokens.unwrap_or(usize::MAX);
        let mut stream = tokenizer.stream();
        let mut said = String::new();
        let mut tokens = Vec::new();
        let mut is_call = false;
        // When the context is full, the oldest turns are left out, and the answer goes on.
        let finish = loop {
            let before = self.conversation.left_out();
            let limit = self.repl.session.limit();
            let tools = Some(self.repl.tools.as_slice()).filter(|tools| !tools.is_empty());
            let prompt = self
                .conversation
                .prompt(template, tokenizer, tools, &tokens, limit);
            let prompt = match prompt {
                Err(Error::ContextFull { .. }) if !tokens.is_empty() => break Finish::ContextFull,
                prompt => prompt?,
            };
            self.tell_left_out(before, !tokens.is_empty());
            let limits = Limits {
                max_tokens: Some(most - tokens.len()),
                stop: tokenizer.stop_ids(),
                ..Limits::default()
            };
            let (interrupted, progress) = (self.repl.interrupted, &mut self.repl.progress);
            let screen = &mut self.screen;
            let mut failed = None;
            let session = &mut self.repl.session;
            let answer = session.answer(&prompt, &mut self.sampler, &limits, |event| {
                match event {
                    Event::Prompt { done, total } => progress(done, total),
                    Event::Token(id) => {
                        is_call |= said.is_empty() && template.begins_call(id);
                        let text = stream.push(id);
                        // A call is shown when it is whole.
                        if !is_call && let Err(e) = screen.say(&text) {
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
            });
            (self.repl.progress)(0, 0);
            let answer = answer?;
            self.last.add(&answer.stats);
            self.stats.add(&answer.stats);
            if let Some(e) = failed {
                return Err(e);
            }
            tokens.extend(answer.tokens);
            // A form that the answer must have cannot be taken up in the middle.
            if answer.finish != Finish::ContextFull || self.sampler.constraint().is_some() {
                break answer.finish;
            }
        };
        drop(silence);
        let rest = stream.flush();
        said.push_str(&rest);
        if !is_call {
            self.screen.end(&rest)?;
        }
        self.tell_end(finish);
        if said.is_empty() {
            return Ok(false);
        }
        let messages = &mut self.conversation.messages;
        let taken = messages.iter().map(|m| m.tool_calls.len()).sum();
        // A broken call is kept, and shown, as the text that it is.
        let text = || Message::new(Role::Assistant, &said);
        let message = match template.message(tokenizer, &tokens, &said, taken) {
            Ok(message) if finish == Finish::Stop => message,
            Ok(_) => text(),
            Err(e) => {
                note(format!("octet: {e}"));
                text()
            }
        };
        let broken = is_call && message.tool_calls.is_empty();
        messages.push(message);
        if broken {
            self.screen.end(&said)?;
        }
        Ok(true)
    }

    /// Says why an answer ended, where the model did not end it as it should.
    fn tell_end(&mut self, finish: Finish) {
        match finish {
            Finish::Stop | Finish::Length => {}
            Finish::ContextFull => note(format!(
                "octet: this turn alone fills the context of {} tokens; /undo takes it back, /clear starts anew",
                self.repl.session.limit()
            )),
            Finish::Interrupted => note("[stopped]"),
        }
        let cut = matches!(finish, Finish::Length | Finish::ContextFull);
        if cut && self.sampler.constraint().is_some_and(|c| !c.is_complete()) {
            note(format!("octet: {INCOMPLETE}"));
        }
    }

    /// Shows calls and gets their results, if they may `run`; `false`: none was run, so that the model has nothing to go on
    /// with. Prompts want a result for every call.
    fn call(&mut self, calls: &[ToolCall], run: bool) -> Result<bool> {
        let mut any = false;
        for call in calls {
            show(&format!("→ {} {}\n", call.name, call.arguments))?;
            let result = if run { self.result(call)? } else { None };
            any |= result.is_some();
            let result =
                result.unwrap_or_else(|| json!({"error": "the call was not run"}).to_string());
            note(for_terminal(&format!("← {}", brief(&result))));
            let mut message = Message::new(Role::Tool, result);
            message.tool_call_id = Some(call.id.clone());
            message.name = Some(call.name.clone());
            self.conversation.messages.push(message);
        }
        Ok(any)
    }

    /// What a call gives: by the command that runs tools, if somebody allows it; else what the person types for it.
    fn result(&mut self, call: &ToolCall) -> Result<Option<String>> {
        let Some(exec) = &self.repl.exec else {
            let typed = self.read(&format!("result of {} (Enter: none)> ", call.name), "")?;
            return Ok(match typed {
                Line::Text(text) if !text.trim().is_empty() => Some(unquoted(&text)),
                _ => None,
            });
        };
        let command = exec.command.clone();
        if exec.asks {
            if self.terminal.is_none() {
                note("octet: nobody can confirm the call here; with --yes it would be run");
                return Ok(None);
            }
            let prompt = format!("run {} {}? [y/N] ", command.display(), call.name);
            match self.read(&prompt, "")? {
                Line::Text(text) if matches!(text.trim(), "y" | "Y" | "yes") => {}
                _ => return Ok(None),
            }
            self.repl.interrupted.store(false, Ordering::Relaxed);
        }
        Ok(Some(run_tool(&command, &call.name, &call.arguments)))
    }

    /// Says that turns are left out which `before` were not.
    fn tell_left_out(&mut self, before: usize, within_answer: bool) {
        let turns = match self.conversation.left_out() - before {
            0 => return,
            1 => "the oldest turn is".to_string(),
            n => format!("the oldest {n} turns are"),
        };
        let limit = self.repl.session.limit();
        let start = if within_answer { "\n" } else { "" };
        note(format!(
            "{start}octet: the context of {limit} tokens is full: {turns} left out from here on"
        ));
    }
}

fn turns(n: usize) -> String {
    match n {
        1 => "1 turn".to_string(),
        n => format!("{n} turns"),
    }
}

/// Whether a line is a command: a text may begin with `//`.
fn is_command(text: &str) -> bool {
    text.starts_with('/') && !text.starts_with("//")
}
