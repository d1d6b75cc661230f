//! `octet run`: one prompt, its answer on standard output.

use super::input::read_text;
use super::interrupt::hear_interrupts;
use super::load::{Loaded, load};
use super::options::{AnswerOptions, DraftOptions, PromptOptions};
use super::progress::Progress;
use super::report::{closing_line, draft_line, note};
use crate::chat::constraint::{Constraint, INCOMPLETE};
use crate::chat::message::{Message, Role};
use crate::chat::repl::show;
use crate::chat::sampler::Sampler;
use crate::chat::session::{Answer, Event, Finish, Limits};
use crate::chat::stops::AnswerText;
use crate::chat::tokenizer::{Piece, PieceKind, Tokenizer};
use crate::error::{Error, Result};
use serde_json::json;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::atomic::Ordering;

/// Answer one prompt: text on standard output, nothing else there.
#[derive(clap::Args, Clone, Debug)]
pub struct Args {
    /// The prompt [default: standard input]
    #[arg(short, long, value_name = "TEXT", allow_hyphen_values = true)]
    pub prompt: Option<String>,
    /// A file with the prompt; - is standard input; may be repeated, and --prompt comes after it
    #[arg(short, long, value_name = "FILE")]
    pub file: Vec<PathBuf>,
    /// Show the token ids and pieces of the prompt instead of answering it
    #[arg(long)]
    pub show_prompt: bool,
    /// One JSON document on standard output instead of text
    #[arg(long)]
    pub json: bool,
    /// Show each token with its probability and the K likeliest, a line for each
    #[arg(long, value_name = "K", default_value_t = 0, hide_default_value = true)]
    pub logprobs: usize,
    /// The answer.
    #[command(flatten)]
    pub answer: AnswerOptions,
    /// What the prompt is, and where the answer ends.
    #[command(flatten)]
    pub request: PromptOptions,
    /// How the answer is found.
    #[command(flatten)]
    pub draft: DraftOptions,
}

/// The files in order, then the prompt, each on lines of its own.
fn prompt_text(args: &Args) -> Result<String> {
    let mut texts = Vec::new();
    for file in &args.file {
        texts.push(read_text(Some(file))?);
    }
    texts.extend(args.prompt.clone());
    if texts.is_empty() {
        texts.push(read_text(None)?);
    }
    let last = texts.len() - 1;
    for text in &mut texts[..last] {
        if !text.ends_with('\n') {
            text.push('\n');
        }
    }
    Ok(texts.concat())
}

/// The tokens of a text: as it is, or as a user's message after the system text.
fn prompt(args: &Args, loaded: &Loaded, text: &str) -> Result<Vec<u32>> {
    let tokenizer = &loaded.tokenizer;
    if args.request.raw {
        return Ok(tokenizer.raw_prompt(text));
    }
    let system = args.answer.system.iter();
    let system = system.map(|s| Message::new(Role::System, s));
    let messages: Vec<_> = system.chain([Message::new(Role::User, text)]).collect();
    loaded.template.encode(tokenizer, &messages, None)
}

/// Runs the command.
///
/// # Errors
/// If the model cannot be loaded, the prompt cannot be read or does not fit; [`Error::Interrupted`] after Ctrl-C.
pub fn run(args: &Args) -> Result<()> {
    let text = prompt_text(args)?;
    let loaded = load(&args.answer.model, &args.answer.machine)?;
    let tokenizer = &loaded.tokenizer;
    let prompt = prompt(args, &loaded, &text)?;
    if args.show_prompt {
        return show_prompt(args, &loaded, &prompt);
    }
    let constraint =
        args.answer
            .form
            .constraint(&loaded, args.request.raw, args.answer.machine.verbose)?;
    let interrupted = hear_interrupts(None)?;
    let mut session = args.draft.session(&loaded, &args.answer);
    let mut limits = Limits {
        max_tokens: args.answer.predict.map(|n| n as usize),
        stop: tokenizer.stop_ids(),
        logprobs: args.logprobs,
    };
    let mut options = args.answer.sampling.sampler(loaded.model.config.n_vocab)?;
    if args.request.ignore_eos {
        limits.ignore_ends(&mut options);
    }
    let mut sampler = Sampler::for_text(options, tokenizer);
    sampler.constrain(constraint);
    if args.answer.machine.verbose {
        note(format!("seed {}", sampler.seed()));
    }
    // A chat answer begins anew; raw text goes on where the prompt ends, so its first space counts.
    let stream = match args.request.raw {
        true => tokenizer.stream_continuing(),
        false => tokenizer.stream(),
    };
    let mut answer_text = AnswerText::new(stream, &args.request.stop);
    let mut said = String::new();
    let mut progress = Progress::new("reading the prompt");
    let mut failed = None;
    let streamed = !args.json && args.logprobs == 0;
    let mut say = |text: String| {
        let result = if streamed { show(&text) } else { Ok(()) };
        said.push_str(&text);
        match result {
            Ok(()) => ControlFlow::Continue(()),
            Err(e) => {
                failed = Some(e);
                ControlFlow::Break(())
            }
        }
    };
    let mut answer = session.answer(&prompt, &mut sampler, &limits, |event| {
        match event {
            Event::Prompt { done, total } => progress.set(done, total),
            Event::Token(id) => say(answer_text.push(id))?,
        }
        if interrupted.load(Ordering::Relaxed) || answer_text.stopped() {
            ControlFlow::Break(())
        } else {
            ControlFlow::Continue(())
        }
    })?;
    // Ctrl-C may have left it.
    progress.clear();
    let _ = say(answer_text.flush());
    if let Some(e) = failed {
        return Err(e);
    }
    if answer_text.stopped() {
        answer.finish = Finish::Stop;
    }
    if args.json {
        let document = document(&prompt, &answer, &said, args.logprobs > 0);
        show(&format!("{document}\n"))?;
    } else if args.logprobs > 0 {
        show_logprobs(tokenizer, &answer)?;
    } else if !said.is_empty() && !said.ends_with('\n') {
        // As texts end, in a file and before what stderr says now.
        show("\n")?;
    }
    tell(args, &loaded, &answer, sampler.constraint());
    if answer.finish == Finish::Interrupted {
        Err(Error::Interrupted)
    } else {
        Ok(())
    }
}

/// What is worth knowing of an answer, and the closing line.
fn tell(args: &Args, loaded: &Loaded, answer: &Answer, constraint: Option<&mut Constraint>) {
    if answer.finish == Finish::ContextFull {
        note(format!(
            "the context of {} tokens is full; a larger --ctx helps where the model allows it",
            loaded.ctx
        ));
    }
    let verbose = args.answer.machine.verbose;
    if let Some(constraint) = constraint {
        if verbose {
            let tokens = answer.tokens.len().max(1) as f64;
            let each = constraint.spent().as_secs_f64() * 1e6 / tokens;
            note(format!("the form of the answer took {each:.0} µs a token"));
        }
        if !constraint.is_complete() {
            note(INCOMPLETE);
        }
    }
    if verbose {
        draft_line(&answer.stats);
    }
    closing_line(&answer.stats, loaded.model.machine());
}

/// A line for each token of a prompt: its id and its piece.
fn show_prompt(args: &Args, loaded: &Loaded, prompt: &[u32]) -> Result<()> {
    let pieces = prompt.iter().map(|&id| loaded.tokenizer.piece(id));
    if args.json {
        let texts: Vec<_> = pieces.map(|piece| piece.map(|p| &p.text)).collect();
        return show(&format!(
            "{}\n",
            json!({ "prompt_tokens": prompt, "pieces": texts })
        ));
    }
    let mut lines = String::new();
    for (id, piece) in prompt.iter().zip(pieces) {
        let (text, kind) = match piece {
            Some(Piece { text, kind, .. }) => (text.as_str(), *kind),
            None => ("", PieceKind::Unused),
        };
        let kind = match kind {
            PieceKind::Normal => "",
            PieceKind::Control => "control",
            PieceKind::Byte => "byte",
            PieceKind::UserDefined => "user-defined",
            PieceKind::Unknown => "unknown",
            PieceKind::Unused => "unused",
        };
        let line = format!("{id:>6}  {:<16} {kind}", text.escape_debug().to_string());
        lines += line.trim_end();
        lines.push('\n');
    }
    show(&lines)?;
    note(format!(
        "{} tokens of a context of {}; {}",
        prompt.len(),
        loaded.ctx,
        match args.request.raw {
            true => "raw text".to_string(),
            false => format!("prompt format {}", loaded.template.name()),
        }
    ));
    Ok(())
}

/// A line for each token of an answer: its probability, its text, and those of the likeliest.
fn show_logprobs(tokenizer: &Tokenizer, answer: &Answer) -> Result<()> {
    let text = |id: u32| {
        let bytes = match tokenizer.is_control(id) {
            true => tokenizer.decode_with(&[id], true),
            false => tokenizer.piece_bytes(id),
        };
        format!("{:?}", String::from_utf8_lossy(&bytes))
    };
    let percent = |logprob: f32| 100.0 * logprob.exp();
    let mut lines = String::new();
    let chosen = answer.tokens.iter().zip(&answer.logprobs);
    for ((&id, &logprob), top) in chosen.zip(&answer.top) {
        let top = top
            .iter()
            .map(|&(id, p)| format!("{} {:.1}%", text(id), percent(p)));
        let top: Vec<_> = top.collect();
        lines += &format!(
            "{:>5.1}%  {:<16} of  {}\n",
            percent(logprob),
            text(id),
            top.join("  ")
        );
    }
    show(&lines)
}

fn document(prompt: &[u32], answer: &Answer, text: &str, top: bool) -> serde_json::Value {
    let mut document = json!({
        "prompt_tokens": prompt,
        "tokens": answer.tokens,
        "text": text,
        "finish": if answer.finish == Finish::Stop { "stop" } else { "length" },
        "prompt_tok_s": answer.stats.prompt_rate(),
        "tok_s": answer.stats.answer_rate(),
        "logits_hash": answer.stats.hash.to_string(),
    });
    if top {
        document["top"] = json!(answer.top);
    }
    document
}
