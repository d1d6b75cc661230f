//! `octet run`: one prompt, its answer on standard output.

use super::chat::hear_interrupts;
use super::input::{note, read_text};
use super::load::load;
use super::options::{MachineOptions, ModelOptions, SamplingOptions, count};
use super::report::{Progress, closing_line};
use crate::chat::repl::show;
use crate::chat::sampler::Sampler;
use crate::chat::session::{Answer, Event, Finish, Limits, Session};
use crate::chat::template::{Message, Role};
use crate::error::{Error, Result};
use serde_json::json;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::atomic::Ordering;

/// Answer one prompt: text on standard output, nothing else there.
#[derive(clap::Args, Clone, Debug)]
pub struct Args {
    /// The prompt [default: standard input]
    #[arg(
        short,
        long,
        value_name = "TEXT",
        conflicts_with = "file",
        allow_hyphen_values = true
    )]
    pub prompt: Option<String>,
    /// A file with the prompt; - is standard input
    #[arg(short, long, value_name = "FILE")]
    pub file: Option<PathBuf>,
    /// System text: how the model should behave
    #[arg(short, long, value_name = "TEXT", conflicts_with = "raw")]
    pub system: Option<String>,
    /// Most tokens of the answer [default: as many as the context holds]
    #[arg(short = 'n', long, value_name = "TOKENS", value_parser = count, allow_negative_numbers = true)]
    pub predict: Option<u32>,
    /// Continue the text itself, without the model's chat format
    #[arg(long)]
    pub raw: bool,
    /// One JSON document on standard output instead of text
    #[arg(long)]
    pub json: bool,
    /// With --json: the K likeliest tokens and their log probabilities at each step
    #[arg(long, value_name = "K", requires = "json", default_value_t = 0)]
    pub logprobs: usize,
    /// Which model.
    #[command(flatten)]
    pub model: ModelOptions,
    /// What it runs on.
    #[command(flatten)]
    pub machine: MachineOptions,
    /// How tokens are chosen.
    #[command(flatten)]
    pub sampling: SamplingOptions,
}

/// Runs the command.
///
/// # Errors
/// If the model cannot be loaded, the prompt cannot be read or does not fit; [`Error::Interrupted`] after Ctrl-C.
pub fn run(args: &Args) -> Result<()> {
    let text = match &args.prompt {
        Some(text) => text.clone(),
        None => read_text(args.file.as_deref())?,
    };
    let loaded = load(&args.model, &args.machine)?;
    let tokenizer = &loaded.tokenizer;
    let prompt = match args.raw {
        true => {
            let bos = tokenizer.bos().filter(|_| tokenizer.add_bos());
            bos.into_iter().chain(tokenizer.encode(&text)).collect()
        }
        false => {
            let system = args.system.iter().map(|s| Message::new(Role::System, s));
            let messages: Vec<_> = system.chain([Message::new(Role::User, &text)]).collect();
            loaded.template.encode(tokenizer, &messages, None)?
        }
    };
    let interrupted = hear_interrupts()?;
    let mut session = Session::new(
        &loaded.model,
        args.model.kv,
        loaded.ctx,
        args.machine.ubatch as usize,
    );
    let limits = Limits {
        max_tokens: args.predict.map(|n| n as usize),
        stop: loaded.template.stop_ids(tokenizer),
        logprobs: args.logprobs,
    };
    // A chat answer begins anew; raw text goes on where the prompt ends, so its first space counts.
    let mut stream = if args.raw {
        tokenizer.stream_continuing()
    } else {
        tokenizer.stream()
    };
    let mut answer_text = String::new();
    let mut progress = Progress::new("reading the prompt");
    let mut failed = None;
    let mut say = |text: String| {
        let result = if args.json { Ok(()) } else { show(&text) };
        answer_text.push_str(&text);
        match result {
            Ok(()) => ControlFlow::Continue(()),
            Err(e) => {
                failed = Some(e);
                ControlFlow::Break(())
            }
        }
    };
    let options = args.sampling.sampler(loaded.model.config.n_vocab)?;
    let mut sampler = Sampler::for_text(options, tokenizer);
    if args.machine.verbose {
        note(format!("seed {}", sampler.seed()));
    }
    let answer = session.answer(&prompt, &mut sampler, &limits, |event| {
        match event {
            Event::Prompt { done, total } => progress.set(done, total),
            Event::Token(id) => say(stream.push(id))?,
        }
        if interrupted.load(Ordering::Relaxed) {
            ControlFlow::Break(())
        } else {
            ControlFlow::Continue(())
        }
    })?;
    let _ = say(stream.flush());
    if let Some(e) = failed {
        return Err(e);
    }
    if args.json {
        show(&format!(
            "{}\n",
            document(&prompt, &answer, &answer_text, args.logprobs > 0)
        ))?;
    } else if std::io::IsTerminal::is_terminal(&std::io::stdout()) {
        show("\n")?;
    }
    if answer.finish == Finish::ContextFull {
        note(format!(
            "the context of {} tokens is full; a larger --ctx helps where the model allows it",
            session.limit()
        ));
    }
    closing_line(&answer.stats, loaded.model.machine());
    if answer.finish == Finish::Interrupted {
        Err(Error::Interrupted)
    } else {
        Ok(())
    }
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
