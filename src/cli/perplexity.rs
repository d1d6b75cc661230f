//! `octet perplexity`: how well a model predicts a text.

use super::input::read_text;
use super::load::load;
use super::options::{MachineOptions, ModelOptions};
use super::report::{Progress, closing_line};
use crate::chat::repl::show;
use crate::chat::session::{LogitsHash, Stats};
use crate::error::{Error, Result};
use crate::moe::{Kv, Run, Scratch, Want};
use serde_json::json;
use std::path::PathBuf;
use std::time::Instant;

/// Measure the perplexity of a text, by the reference's definition: chunks of CTX tokens, each
/// beginning with BOS, the second half of each scored.
#[derive(clap::Args, Clone, Debug)]
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

/// Tokens of a chunk when `--ctx` does not say; the reference's default.
const CHUNK: usize = 512;

/// Runs the command.
///
/// # Errors
/// If the model or the text cannot be read, or the text is shorter than one chunk.
pub fn run(args: &Args) -> Result<()> {
    let text = read_text(Some(&args.file))?;
    let loaded = load(&args.model, &args.machine)?;
    let (model, tokenizer) = (&loaded.model, &loaded.tokenizer);
    let chunk = args.model.ctx.map_or(CHUNK.min(loaded.ctx), |n| n as usize);
    if chunk < 4 {
        return Err(Error::Usage(format!(
            "--ctx {chunk}: too short to score (expected at least 4)"
        )));
    }
    let bos = tokenizer.bos().filter(|_| tokenizer.add_bos());
    let tokens: Vec<u32> = bos.into_iter().chain(tokenizer.encode(&text)).collect();
    let chunks = tokens.len() / chunk;
    if chunks == 0 {
        let expected = format!("at least {chunk} tokens");
        return Err(Error::invalid(
            &args.file,
            "the text",
            expected,
            tokens.len(),
        ));
    }

    let mut kv = Kv::new(&model.config, args.model.kv, chunk);
    let mut scratch = Scratch::default();
    let mut progress = Progress::new("scoring");
    let (mut sum, mut count) = (0.0f64, 0usize);
    let mut hash = LogitsHash::default();
    let started = Instant::now();
    for (i, tokens) in tokens.chunks_exact(chunk).enumerate() {
        kv.truncate(0);
        let mut input = tokens.to_vec();
        if let Some(bos) = bos {
            input[0] = bos;
        }
        // Positions `first ..` score the token that follows them.
        let first = chunk / 2;
        let mut pos = 0;
        while pos < chunk {
            // A batch ends where scoring begins, so that no logits are computed in vain.
            let (limit, want) = if pos < first {
                (first, Want::Nothing)
            } else {
                (chunk, Want::All)
            };
            let end = limit.min(pos + args.machine.ubatch as usize);
            let run = Run {
                kv: &mut kv,
                tokens: &input[pos..end],
                want,
            };
            let logits = model.forward(&mut [run], &mut scratch)?;
            for (row, p) in logits.chunks_exact(model.config.n_vocab).zip(pos..) {
                if p + 1 < chunk {
                    hash.update(row);
                    sum += negative_log_likelihood(row, tokens[p + 1]);
                    count += 1;
                }
            }
            pos = end;
        }
        progress.set((i + 1) * chunk, chunks * chunk);
    }
    let stats = Stats {
        prompt_tokens: chunks * chunk,
        prompt_time: started.elapsed(),
        weight_bytes: scratch.weight_bytes,
        scored_tokens: count,
        hash,
        ..Stats::default()
    };
    let nll = sum / count as f64;
    if args.json {
        show(&format!(
            "{}\n",
            json!({ "ppl": nll.exp(), "nll": nll, "tokens": count })
        ))?;
    } else {
        show(&format!(
            "perplexity {:.4} over {count} tokens in {chunks} chunks of {chunk}\n",
            nll.exp()
        ))?;
    }
    closing_line(&stats, model.machine());
    Ok(())
}

/// `-ln softmax(logits)[token]`, in f64.
fn negative_log_likelihood(logits: &[f32], token: u32) -> f64 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max) as f64;
    let sum: f64 = logits.iter().map(|l| libm::exp(*l as f64 - max)).sum();
    max + libm::log(sum) - logits[token as usize] as f64
}
