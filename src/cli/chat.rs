//! `octet chat`: talk with a model.

use super::folders::state_folder;
use super::interrupt::hear_interrupts;
use super::load::{Loaded, load};
use super::options::{AnswerOptions, DraftOptions, count};
use super::progress::Progress;
use super::report::{closing_line, draft_line, note};
use crate::chat::repl::{Exec, Repl, Talked, show};
use crate::chat::saved::{ModelId, Shelf};
use crate::chat::tools::read_tools;
use crate::error::{Error, Result};
use std::ffi::OsString;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};

/// Talk with a model. Without a terminal it answers standard input line by line.
#[derive(clap::Args, Clone, Debug)]
#[command(mut_arg("predict", |arg| arg.value_parser(some)))]
pub struct Args {
    /// Go on with the conversation in this file, and save it there after each answer
    #[arg(long, value_name = "FILE")]
    pub session: Option<PathBuf>,
    /// Tools that the model may call: a JSON list in the shape of OpenAI's `tools`
    #[arg(long, value_name = "FILE")]
    pub tools: Option<PathBuf>,
    /// Run the model's calls with this command, after you have confirmed each: CMD NAME, arguments as JSON on standard input
    #[arg(long, value_name = "CMD", requires = "tools")]
    pub tool_exec: Option<OsString>,
    /// Run the model's calls without asking
    #[arg(long, requires = "tool_exec")]
    pub yes: bool,
    /// Do not keep the lines that are typed
    #[arg(long)]
    pub no_history: bool,
    /// The answers.
    #[command(flatten)]
    pub answer: AnswerOptions,
    /// How answers are found.
    #[command(flatten)]
    pub draft: DraftOptions,
}

/// Most tokens of an answer of the demo model, which otherwise rambles on: its tales were short.
const DEMO_ANSWER: usize = 160;

/// A number of tokens, but not 0: a conversation without answers is none.
fn some(text: &str) -> Result<u32, String> {
    match count(text)? {
        0 => Err("expected at least 1".to_string()),
        n => Ok(n),
    }
}

/// Runs the command.
///
/// # Errors
/// If the model cannot be loaded, or standard input or output fail.
pub fn run(args: &Args) -> Result<()> {
    let loaded = load(&args.answer.model, &args.answer.machine)?;
    let tools = args.tools.as_deref().map_or(Ok(Vec::new()), read_tools)?;
    if !tools.is_empty() && !loaded.template.shows_tools() {
        note(format!(
            "{}: warning: the model's prompt format has no tools; it will not see those of --tools",
            loaded.path.display()
        ));
    }
    let terminal = std::io::stdin().is_terminal() && std::io::stdout().is_terminal();
    let interrupted = hear_interrupts(None)?;
    if terminal {
        greet(&loaded)?;
    }
    let mut progress = Progress::new("reading");
    let repl = Repl {
        session: args.draft.session(&loaded, &args.answer),
        tokenizer: &loaded.tokenizer,
        template: &loaded.template,
        sampling: args.answer.sampling.sampler(loaded.model.config.n_vocab)?,
        constraint: args
            .answer
            .form
            .constraint(&loaded, false, args.answer.machine.verbose)?,
        system: args.answer.system.clone(),
        max_tokens: args
            .answer
            .predict
            .map(|n| n as usize)
            .or(loaded.demo.then_some(DEMO_ANSWER)),
        history: state_folder()
            .filter(|_| !args.no_history)
            .map(|dir| dir.join("history")),
        lines: if terminal {
            None
        } else {
            Some(Box::new(super::input::lines()))
        },
        progress: Box::new(move |done, total| progress.set(done, total)),
        interrupted,
        tools,
        exec: args.tool_exec.clone().map(|command| Exec {
            command,
            asks: !args.yes,
        }),
        saved: args.session.clone(),
        shelf: state_folder().map(|dir| Shelf(dir.join("sessions"))),
        model: Box::new(|| ModelId {
            name: file_name(&loaded.path),
            hash: loaded.file.identity(),
        }),
    };
    let Talked {
        stats,
        lines,
        failed,
    } = repl.run()?;
    if stats.prompt_tokens > 0 {
        if args.answer.machine.verbose {
            draft_line(&stats);
        }
        closing_line(&stats, loaded.model.machine());
    }
    // A person has seen it; a script looks at the exit code.
    match failed {
        1.. if !terminal => Err(Error::Lines {
            file: "<stdin>".into(),
            failed,
            of: lines,
            reasons: "it is said above why",
        }),
        _ => Ok(()),
    }
}

/// Says who is there and what to do.
fn greet(loaded: &Loaded) -> Result<()> {
    let c = &loaded.model.config;
    let experts = match c.routed {
        true => format!("{} experts, {} for each token", c.n_expert, c.n_used),
        false => "dense".to_string(),
    };
    let machine = loaded.model.machine();
    show(&format!(
        "octet {} · {}\n{} layers, {experts} · context {} · {}, {} threads\n",
        env!("CARGO_PKG_VERSION"),
        file_name(&loaded.path),
        c.n_layer,
        loaded.ctx,
        machine.kernels.tier().name(),
        machine.pool.threads(),
    ))?;
    if loaded.demo {
        show(
            "A small demo model: its tales make little sense.\n\
             Try: Tell me a story about a fox.\n\
             For a real Mixtral: octet chat --model FILE.gguf\n",
        )?;
    }
    show("/help lists commands, Ctrl-D leaves.\n")
}

/// A file's name without its folder.
fn file_name(path: &Path) -> String {
    let name = path.file_name().unwrap_or(path.as_os_str());
    name.to_string_lossy().into_owned()
}
