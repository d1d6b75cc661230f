//! `octet perplexity`: how well a model predicts a text.

use super::load::load;
use super::options::{MachineOptions, ModelOptions};
use super::report::closing_line;
use super::score::{Chunks, Scorer};
use crate::chat::repl::show;
use crate::error::Result;
use serde_json::json;
use std::path::PathBuf;

/// Measure how well a model predicts a text.
#[derive(clap::Args, Clone, Debug)]
#[command(
    mut_arg("ctx", |arg| arg.help("Tokens of a chunk [default: 512]")),
    after_help = "By llama.cpp's definition: the text is cut into chunks of --ctx tokens, each begins with BOS, and the second half \
        of each is scored."
)]
pub struct Args {
    /// The text; - is standard input
    #[arg(short, long, value_name = "FILE")]
    pub file: PathBuf,
    /// One JSON document on standard output
    #[arg(long)]
    pub json: bool,
    /// Which model.
    #[command(flatten)]
    pub model: ModelOptions,
    /// What it runs on.
    #[command(flatten)]
    pub machine: MachineOptions,
}

/// Runs the command.
///
/// # Errors
/// If the model or the text cannot be read, or the text is shorter than one chunk.
pub fn run(args: &Args) -> Result<()> {
    let loaded = load(&args.model, &args.machine)?;
    let chunks = Chunks::read(&args.file, &loaded, &args.model)?;
    let mut scorer = Scorer::new(
        &loaded.model,
        &chunks,
        &args.model,
        &args.machine,
        "scoring",
    );
    while scorer.next(false, &mut (), || false)? {}
    let (nll, stats) = (scorer.nll(), scorer.stats());
    let count = stats.scored_tokens;
    if args.json {
        show(&format!(
            "{}\n",
            json!({ "ppl": nll.exp(), "nll": nll, "tokens": count })
        ))?;
    } else {
        show(&format!(
            "perplexity {:.4} over {count} tokens in {} chunks of {}\n",
            nll.exp(),
            chunks.count(),
            chunks.size,
        ))?;
    }
    closing_line(&stats, loaded.model.machine());
    Ok(())
}
