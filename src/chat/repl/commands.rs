//! The commands of a conversation: lines that begin with `/`.

use super::editor::{KEYS, edited};
use super::{Draft, Talk, note, put, show, turns};
use crate::chat::message::Role;
use crate::chat::sampler::{SamplerOptions, no_such_setting, settings};
use crate::chat::saved::{Saved, Shelf};
use crate::chat::session::Stats;
use crate::disk;
use crate::error::{Error, Result};
use crate::readable::bytes;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// A command.
pub(super) struct Command {
    pub(super) name: &'static str,
    pub(super) argument: &'static str,
    help: &'static str,
    pub(super) completes: Completes,
    pub(super) run: fn(&mut Talk<'_>, &str) -> Result<()>,
}

/// What the Tab key completes after a command.
#[derive(Clone, Copy)]
pub(super) enum Completes {
    Nothing,
    Files,
    Sessions,
    Settings,
}

/// One row per command; the table also writes `/help` and completes names.
pub(super) const COMMANDS: &[Command] = &[
    Command {
        name: "/help",
        argument: "",
        help: "show this list",
        completes: Completes::Nothing,
        run: help,
    },
    Command {
        name: "/system",
        argument: "[TEXT]",
        help: "show or set the system text; none takes it away",
        completes: Completes::Nothing,
        run: system,
    },
    Command {
        name: "/regen",
        argument: "",
        help: "answer the last message again",
        completes: Completes::Nothing,
        run: regen,
    },
    Command {
        name: "/undo",
        argument: "",
        help: "take the last message and its answer back",
        completes: Completes::Nothing,
        run: undo,
    },
    Command {
        name: "/edit",
        argument: "[TEXT]",
        help: "change the last message (to TEXT) and answer it again",
        completes: Completes::Nothing,
        run: edit,
    },
    Command {
        name: "/editor",
        argument: "[TEXT]",
        help: "write a message in $VISUAL or $EDITOR",
        completes: Completes::Nothing,
        run: editor,
    },
    Command {
        name: "/read",
        argument: "FILE",
        help: "attach a text file to the next message",
        completes: Completes::Files,
        run: read,
    },
    Command {
        name: "/copy",
        argument: "",
        help: "copy the last answer to the terminal's clipboard",
        completes: Completes::Nothing,
        run: copy,
    },
    Command {
        name: "/save",
        argument: "[NAME]",
        help: "keep the conversation from now on, after each answer",
        completes: Completes::Nothing,
        run: save,
    },
    Command {
        name: "/load",
        argument: "NAME",
        help: "go on with a conversation that was kept",
        completes: Completes::Sessions,
        run: load,
    },
    Command {
        name: "/fork",
        argument: "[NAME]",
        help: "go on in a copy; the original stays as it is",
        completes: Completes::Nothing,
        run: fork,
    },
    Command {
        name: "/sessions",
        argument: "",
        help: "list the conversations that were kept",
        completes: Completes::Nothing,
        run: sessions,
    },
    Command {
        name: "/set",
        argument: "[NAME [VALUE]]",
        help: "show or change how tokens are chosen",
        completes: Completes::Settings,
        run: set,
    },
    Command {
        name: "/stats",
        argument: "",
        help: "what the conversation takes, and how fast it was",
        completes: Completes::Nothing,
        run: stats,
    },
    Command {
        name: "/experts",
        argument: "",
        help: "which experts the router chose in the last answer",
        completes: Completes::Nothing,
        run: experts,
    },
    Command {
        name: "/clear",
        argument: "",
        help: "forget the conversation, keep the system text",
        completes: Completes::Nothing,
        run: clear,
    },
    Command {
        name: "/exit",
        argument: "",
        help: "leave",
        completes: Completes::Nothing,
        run: exit,
    },
];

/// What other programs call some of them.
const ALSO: &[(&str, &str)] = &[
    ("/?", "/help"),
    ("/bye", "/exit"),
    ("/q", "/exit"),
    ("/quit", "/exit"),
];

/// The command of a name.
pub(super) fn command(name: &str) -> Option<&'static Command> {
    let also = ALSO.iter().find(|(also, _)| *also == name);
    let name = also.map_or(name, |(_, ours)| ours);
    COMMANDS.iter().find(|c| c.name == name)
}

fn help(_: &mut Talk<'_>, _: &str) -> Result<()> {
    let commands = COMMANDS
        .iter()
        .map(|c| (format!("{} {}", c.name, c.argument), c.help));
    let keys = KEYS.iter().map(|(key, help)| (key.to_string(), *help));
    let row = |(name, help): (String, &str)| format!("{name:<20} {help}\n");
    let rows: String = commands.map(row).collect();
    show(&format!("{rows}\n{}", keys.map(row).collect::<String>()))
}

/// The conversation stays: nobody expects to lose it here.
fn system(talk: &mut Talk<'_>, text: &str) -> Result<()> {
    match text {
        "" => match &talk.conversation.system {
            Some(text) => return show(&format!("{text}\n")),
            None => return nothing("set; /system TEXT sets it"),
        },
        "none" => talk.conversation.system = None,
        text => talk.conversation.system = Some(text.to_string()),
    }
    if talk.saved.is_some() {
        talk.save();
    }
    Ok(())
}

fn clear(talk: &mut Talk<'_>, _: &str) -> Result<()> {
    if let Some(saved) = talk.saved.take() {
        let name = name(talk, saved.path());
        note(format!("{name} stays as it is; /save keeps what comes now"));
    }
    talk.conversation.messages.clear();
    talk.conversation.from = 0;
    talk.attached.clear();
    Ok(())
}

fn regen(talk: &mut Talk<'_>, _: &str) -> Result<()> {
    let before = talk.conversation.clone();
    let Some(turn) = talk.conversation.take_back() else {
        return nothing("to answer again");
    };
    // Only the user's own words of the turn stay.
    let own = turn.into_iter().take_while(|m| m.role == Role::User);
    talk.conversation.messages.extend(own);
    talk.answer(before)
}

fn undo(talk: &mut Talk<'_>, _: &str) -> Result<()> {
    match talk.conversation.take_back() {
        Some(turn) => {
            note(format!("took back: {}", brief(&turn[0].content)));
            talk.save();
            Ok(())
        }
        None => nothing("to take back"),
    }
}

fn edit(talk: &mut Talk<'_>, text: &str) -> Result<()> {
    let Some(last) = talk.conversation.last_question() else {
        return nothing("to change");
    };
    if !text.is_empty() {
        return talk.replace(text.to_string());
    }
    if talk.terminal.is_none() {
        return Err(Error::Usage("/edit: expected the new TEXT".into()));
    }
    let text = last.to_string();
    talk.draft = Some(Draft {
        text,
        replaces: true,
    });
    Ok(())
}

fn editor(talk: &mut Talk<'_>, text: &str) -> Result<()> {
    if talk.terminal.is_none() {
        return Err(Error::Usage("/editor: there is no terminal".into()));
    }
    let text = edited(text, talk.repl.interrupted)?;
    talk.draft = Some(Draft {
        text,
        replaces: false,
    });
    Ok(())
}

fn exit(talk: &mut Talk<'_>, _: &str) -> Result<()> {
    talk.done = true;
    Ok(())
}

/// Says that there is nothing to do a thing with.
fn nothing(what: &str) -> Result<()> {
    note(format!("octet: there is nothing {what}"));
    Ok(())
}

/// A text's beginning, on one line.
pub(super) fn brief(text: &str) -> String {
    let mut words = text.split_whitespace();
    let mut out = words.next().unwrap_or_default().to_string();
    for word in words {
        if out.chars().count() + word.chars().count() > 60 {
            return out + " …";
        }
        out = out + " " + word;
    }
    out
}

/// The largest file that is read as a text, in bytes: far more than any context holds.
const MAX_FILE: u64 = 16 << 20;

fn read(talk: &mut Talk<'_>, argument: &str) -> Result<()> {
    if argument.is_empty() {
        return Err(Error::Usage("/read: expected the name of a file".into()));
    }
    let path = path(argument);
    let text = disk::utf8(&path, disk::read(&path, MAX_FILE)?)?;
    let (tokens, limit) = (
        talk.repl.tokenizer.encode(&text).len(),
        talk.repl.session.limit(),
    );
    if tokens >= limit {
        return Err(Error::ContextFull {
            limit,
            want: tokens,
        });
    }
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    // A fence that no fence in the text can close.
    let longest = text.split(|c| c != '`').map(str::len).max().unwrap_or(0);
    let fence = "`".repeat(longest.max(2) + 1);
    let end = if text.ends_with('\n') { "" } else { "\n" };
    talk.attached += &format!("{name}:\n{fence}\n{text}{end}{fence}\n\n");
    note(format!(
        "attached {name}: {tokens} tokens, to go with your next message"
    ));
    Ok(())
}

/// A file as people name it: with `~`, in quotes, or with the backslashes that completion puts in.
fn path(text: &str) -> PathBuf {
    let quoted = |q| text.strip_prefix(q)?.strip_suffix(q);
    let text = quoted('"').or(quoted('\'')).unwrap_or(text);
    if let Some(rest) = text.strip_prefix("~/")
        && let Some(home) = std::env::var_os("HOME")
    {
        return path(&Path::new(&home).join(rest).to_string_lossy());
    }
    match Path::new(text).exists() {
        true => text.into(),
        false => PathBuf::from(&*rustyline::completion::unescape(text, Some('\\'))),
    }
}

fn copy(talk: &mut Talk<'_>, _: &str) -> Result<()> {
    let Some(text) = talk.conversation.last_answer() else {
        return nothing("to copy");
    };
    if !std::io::stdout().is_terminal() {
        return Err(Error::Usage("/copy: there is no terminal".into()));
    }
    // Operating system command 52: the terminal, also a distant one, keeps the text.
    put(&format!("\x1b]52;c;{}\x07", base64(text.as_bytes())))?;
    note(format!(
        "gave {} characters to the terminal's clipboard",
        text.chars().count()
    ));
    Ok(())
}

/// RFC 4648, section 4.
fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let group = |three: &[u8]| {
        let bits = (0..3).fold(0, |bits, i| {
            bits << 8 | u32::from(*three.get(i).unwrap_or(&0))
        });
        let digit = |i: usize| char::from(DIGITS[(bits >> (18 - 6 * i)) as usize % 64]);
        [0, 1, 2, 3].map(|i| if i <= three.len() { digit(i) } else { '=' })
    };
    bytes.chunks(3).flat_map(group).collect()
}

/// The shelf of sessions, where the system has a place for one.
fn shelf<'a>(talk: &'a Talk<'_>) -> Result<&'a Shelf> {
    talk.repl.shelf.as_ref().ok_or_else(|| {
        Error::Usage(
            "there is no folder for sessions: neither XDG_STATE_HOME nor HOME is set".into(),
        )
    })
}

/// What a session is called.
fn name(talk: &Talk<'_>, path: &Path) -> String {
    match &talk.repl.shelf {
        Some(shelf) => shelf.name(path),
        None => path.display().to_string(),
    }
}

/// Saves the conversation at `path` from now on, where nothing may be yet.
fn save_to(talk: &mut Talk<'_>, path: &Path) -> Result<()> {
    if path.exists() {
        let name = name(talk, path);
        return Err(Error::Usage(format!(
            "there is a session {name} already; choose another name, or /load it"
        )));
    }
    if let Some(folder) = path.parent().filter(|folder| *folder != Path::new("")) {
        disk::private_folder(folder)?;
    }
    let model = (talk.repl.model)();
    let mut saved = Saved::create(path, &talk.repl.session, &model)?;
    if let Some(e) = saved.save(&talk.conversation, &talk.repl.session)? {
        note(format!("without its KV cache: {e}"));
    }
    note(format!(
        "saved to {}, and again after each answer",
        path.display()
    ));
    talk.saved = Some(saved);
    Ok(())
}

fn save(talk: &mut Talk<'_>, argument: &str) -> Result<()> {
    let path = match &talk.saved {
        Some(saved) if argument.is_empty() || shelf(talk)?.path(argument)? == saved.path() => {
            note(format!("it is kept in {}", saved.path().display()));
            talk.save();
            return Ok(());
        }
        Some(saved) => {
            let name = name(talk, saved.path());
            return Err(Error::Usage(format!(
                "the conversation is kept in {name} already; /fork {argument} goes on in a copy"
            )));
        }
        None if argument.is_empty() => shelf(talk)?.free(),
        None => shelf(talk)?.path(argument)?,
    };
    save_to(talk, &path)
}

fn fork(talk: &mut Talk<'_>, argument: &str) -> Result<()> {
    let Some(saved) = &talk.saved else {
        return Err(Error::Usage(
            "a fork needs an original that stays; /save NAME makes one".into(),
        ));
    };
    let path = match argument {
        "" => {
            let original = saved.path().with_extension("");
            let end = saved
                .path()
                .extension()
                .unwrap_or_default()
                .to_string_lossy();
            let end = if end.is_empty() {
                String::new()
            } else {
                format!(".{end}")
            };
            (2..)
                .map(|i| disk::beside(&original, &format!("-{i}{end}")))
                .find(|path| !path.exists())
                .expect("some number is free")
        }
        name => shelf(talk)?.path(name)?,
    };
    save_to(talk, &path)
}

fn load(talk: &mut Talk<'_>, argument: &str) -> Result<()> {
    let path = shelf(talk)?.path(argument)?;
    if talk
        .saved
        .as_ref()
        .is_some_and(|saved| saved.path() == path)
    {
        note("it is this one");
        return Ok(());
    }
    if talk.saved.is_none() && !talk.conversation.is_empty() {
        return Err(Error::Usage(
            "this conversation is not saved; /save NAME keeps it, /clear drops it".into(),
        ));
    }
    if !path.exists() {
        let hint = "/sessions lists what there is";
        return Err(Error::missing(&path, "the session", hint));
    }
    talk.open(&path, None)
}

fn sessions(talk: &mut Talk<'_>, _: &str) -> Result<()> {
    let shelf = shelf(talk)?;
    let current = talk.saved.as_ref().map(|saved| saved.path().to_path_buf());
    let mut rows = String::new();
    for entry in shelf.entries() {
        let here = current == shelf.path(&entry.name).ok();
        let (what, first) = match &entry.content {
            Some((n, first)) => (turns(*n), brief(first)),
            None => ("?".to_string(), "it cannot be read".to_string()),
        };
        rows += &format!(
            "{} {:<16} {what:>9} {:>11} {:>8}  {first}\n",
            if here { '*' } else { ' ' },
            entry.name,
            bytes(entry.bytes),
            ago(entry.saved),
        );
    }
    if rows.is_empty() {
        note(format!("there are no sessions in {}", shelf.0.display()));
    }
    show(&rows)
}

/// How long ago something was, in the largest unit that fits.
fn ago(then: SystemTime) -> String {
    let seconds = then.elapsed().unwrap_or_default().as_secs();
    let units = [("d", 86_400), ("h", 3600), ("min", 60)];
    match units.iter().find(|(_, unit)| seconds >= *unit) {
        Some((name, unit)) => format!("{} {name}", seconds / unit),
        None => "now".to_string(),
    }
}

fn set(talk: &mut Talk<'_>, argument: &str) -> Result<()> {
    let (name, value) = argument
        .split_once(char::is_whitespace)
        .unwrap_or((argument, ""));
    let mut options = talk.sampler.options().clone();
    let usual = SamplerOptions::default();
    if !value.trim().is_empty() {
        let setting = settings().find(|setting| setting.is_called(name));
        // As on the command line, the first entry takes the place of a list's usual ones.
        if let Some(list) = setting.filter(|s| s.is_list() && s.get(&options) == s.get(&usual)) {
            options.set(list.name, "none")?;
        }
        options.set(name, value.trim())?;
        options.check(talk.repl.session.n_vocab())?;
        talk.sampler.configure(options.clone(), talk.repl.tokenizer);
        // A seed that is set again begins again.
        if setting.is_some_and(|setting| setting.name == "seed") {
            talk.sampler.reseed();
        }
    } else if !name.is_empty() && !settings().any(|setting| setting.is_called(name)) {
        return Err(match no_such_setting(name) {
            guess @ Error::Hint { .. } => guess,
            e => e.hint(Some("/set lists them")),
        });
    }
    let mut rows = String::new();
    for setting in settings().filter(|s| name.is_empty() || s.is_called(name)) {
        let value = setting.get(&options);
        let mark = if value == setting.get(&usual) {
            ' '
        } else {
            '*'
        };
        rows += &format!("{mark} {:<20} {value}\n", setting.name);
        if !name.is_empty() {
            rows += &format!("  {}\n", setting.help);
        }
    }
    if name.is_empty() {
        rows += "\n* is not as usual. /set NAME explains one, /set NAME VALUE changes it.\n";
    }
    show(&rows)
}

/// A share as a bar, from none to the largest.
const BARS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
/// Layers on a line.
const LAYERS: usize = 4;

fn experts(talk: &mut Talk<'_>, _: &str) -> Result<()> {
    let layers: Vec<_> = talk.repl.session.routes.layers().collect();
    let choices: u64 = layers[0].iter().sum();
    let n_expert = layers[0].len();
    if n_expert < 2 {
        return nothing("to choose: the model is dense");
    }
    if choices == 0 {
        return nothing("to show: no answer yet, or one of a single token");
    }
    let share = |count: u64| count as f64 / choices as f64;
    let most = layers
        .iter()
        .flat_map(|l| l.iter())
        .max()
        .copied()
        .unwrap_or(0);
    let bar = |count: &u64| BARS[(count * 7).div_ceil(most.max(1)) as usize];
    let cell = |(i, layer): (usize, &&[u64])| {
        let bars: String = layer.iter().map(bar).collect();
        format!("{i:>4} {bars}")
    };
    let cells: Vec<_> = layers.iter().enumerate().map(cell).collect();
    let rows: String = cells
        .chunks(LAYERS)
        .map(|row| row.join("  ") + "\n")
        .collect();
    let all: Vec<_> = (0..n_expert)
        .map(|e| layers.iter().map(|l| share(l[e])).sum::<f64>() / layers.len() as f64)
        .map(|share| format!("{:.0}%", 100.0 * share))
        .collect();
    show(&format!(
        "layer, and how often it chose each of {n_expert} experts (█ is {:.0}%, even is {:.1}%)\n{rows}all  {}\n",
        100.0 * share(most),
        100.0 / n_expert as f64,
        all.join(" "),
    ))
}

fn stats(talk: &mut Talk<'_>, _: &str) -> Result<()> {
    let (session, c) = (&talk.repl.session, &talk.conversation);
    let (held, limit) = (session.len(), session.limit());
    let left_out = match c.left_out() {
        0 => String::new(),
        n => format!(" ({n} left out)"),
    };
    let speed = |what: &str, s: &Stats| {
        let disk = s.reads.told().map(|told| format!("{:<12} {told}\n", ""));
        format!(
            "{what:<12} {} tokens read at {:.1} tok/s, {} written at {:.1} tok/s\n{}",
            s.prompt_tokens,
            s.prompt_rate(),
            s.answer_tokens,
            s.answer_rate(),
            disk.unwrap_or_default(),
        )
    };
    show(&format!(
        "{:<12} {}{left_out}; {held} of {limit} tokens of context ({}%); KV cache {}\n{}{}",
        "conversation",
        turns(c.len()),
        100 * held / limit,
        bytes(session.cache().0.bytes() as u64),
        speed("last answer", &talk.last),
        speed("all answers", &talk.stats),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_is_the_standards() {
        // RFC 4648, section 10.
        for (text, want) in [
            ("", ""),
            ("f", "Zg=="),
            ("fo", "Zm8="),
            ("foo", "Zm9v"),
            ("foob", "Zm9vYg=="),
            ("fooba", "Zm9vYmE="),
            ("foobar", "Zm9vYmFy"),
        ] {
            assert_eq!(base64(text.as_bytes()), want);
        }
        assert_eq!(base64(&[0xff, 0xfe, 0xfd]), "//79");
    }
}
