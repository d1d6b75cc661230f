//! `octet bench`: how fast this machine runs a model.

use super::load::{machine, model_path};
use super::options::{MachineOptions, ModelOptions};
use super::report::bandwidth;
use crate::chat::repl::show;
use crate::error::{Error, Result};
use crate::gguf::Gguf;
use crate::moe::{Kv, Model, Run, Scratch, Want};
use serde_json::json;
use std::time::Instant;

/// Measure prefill and decode speed: median and spread of several rounds after a warm-up.
#[derive(clap::Args, Clone, Debug)]
pub struct Args {
    /// Prompt tokens
    #[arg(short, long, value_name = "TOKENS", default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..))]
    pub prompt: u32,
    /// Generated tokens
    #[arg(short = 'n', long, value_name = "TOKENS", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..))]
    pub predict: u32,
    /// Rounds
    #[arg(short, long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub repetitions: u32,
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

/// One round's speeds.
struct Round {
    prefill_tok_s: f64,
    decode_tok_s: f64,
    gb_s: f64,
}

/// Runs the command.
///
/// # Errors
/// If the model cannot be loaded or its context is too short.
pub fn run(args: &Args) -> Result<()> {
    let (path, _) = model_path(&args.model)?;
    let model = Model::open(&Gguf::open(&path)?, machine(&args.machine)?)?;
    let most = args
        .model
        .ctx
        .map_or(model.config.n_ctx, |n| n as usize)
        .min(model.config.n_ctx);
    let want = args.prompt as usize + args.predict as usize;
    if want > most {
        return Err(Error::ContextFull { limit: most, want });
    }
    let mut scratch = Scratch::default();
    round(&model, args, &mut scratch)?;
    let mut rounds = Vec::new();
    for _ in 0..args.repetitions {
        rounds.push(round(&model, args, &mut scratch)?);
    }
    let (prefill, decode, gb_s) = (
        spread(&rounds, |r| r.prefill_tok_s),
        spread(&rounds, |r| r.decode_tok_s),
        spread(&rounds, |r| r.gb_s),
    );
    let limit = bandwidth(&model.machine().pool, gb_s[2] * 1e9) / 1e9;
    let (tier, threads) = (
        model.machine().kernels.tier().name(),
        model.machine().pool.threads(),
    );
    if args.json {
        let result = json!({
            "p": args.prompt, "n": args.predict, "depth": 0, "threads": threads,
            "prefill_tok_s": prefill[1], "decode_tok_s": decode[1], "gb_s": gb_s[1],
            "prefill_min": prefill[0], "prefill_max": prefill[2],
            "decode_min": decode[0], "decode_max": decode[2],
        });
        let machine = json!({ "isa": tier, "threads": threads, "read_gb_s": limit });
        return show(&format!(
            "{}\n",
            json!({ "machine": machine, "results": [result] })
        ));
    }
    show(&format!(
        "prefill {:>5} tokens: {:8.1} tok/s ({:.1} to {:.1})\ndecode  {:>5} tokens: {:8.1} tok/s ({:.1} to {:.1})\n",
        args.prompt,
        prefill[1],
        prefill[0],
        prefill[2],
        args.predict,
        decode[1],
        decode[0],
        decode[2],
    ))?;
    show(&format!(
        "weights read in decode: {:.1} GB/s, {:.0}% of the {limit:.1} GB/s that {threads} threads read; {tier}\n",
        gb_s[1],
        100.0 * gb_s[1] / limit,
    ))
}

/// One prompt and its continuation. Tokens are spread over the vocabulary, so that every expert gets
/// its share; what they mean does not matter.
fn round(model: &Model, args: &Args, scratch: &mut Scratch) -> Result<Round> {
    let n_vocab = model.config.n_vocab;
    // Fibonacci hashing: consecutive numbers land far apart (Knuth, TAOCP 3, 6.4).
    let token =
        |i: usize| ((i as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 33) as u32 % n_vocab as u32;
    let (p, n) = (args.prompt as usize, args.predict as usize);
    let mut kv = Kv::new(&model.config, args.model.kv, p + n);
    let prompt: Vec<u32> = (0..p).map(token).collect();
    let started = Instant::now();
    for tokens in prompt.chunks(args.machine.ubatch as usize) {
        model.forward(
            &mut [Run {
                kv: &mut kv,
                tokens,
                want: Want::Last,
            }],
            scratch,
        )?;
    }
    let prefill = started.elapsed().as_secs_f64();
    let before = scratch.weight_bytes;
    let started = Instant::now();
    for i in 0..n {
        model.forward(
            &mut [Run {
                kv: &mut kv,
                tokens: &[token(p + i)],
                want: Want::Last,
            }],
            scratch,
        )?;
    }
    let decode = started.elapsed().as_secs_f64();
    Ok(Round {
        prefill_tok_s: p as f64 / prefill,
        decode_tok_s: n as f64 / decode,
        gb_s: (scratch.weight_bytes - before) as f64 / decode / 1e9,
    })
}

/// Smallest, median and largest of some figure.
fn spread(rounds: &[Round], figure: impl Fn(&Round) -> f64) -> [f64; 3] {
    let mut all: Vec<f64> = rounds.iter().map(figure).collect();
    all.sort_by(f64::total_cmp);
    [all[0], all[all.len() / 2], all[all.len() - 1]]
}
