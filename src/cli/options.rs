//! Groups of options that several commands share, each defined once.

use crate::chat::sampler::SamplerOptions;
use crate::error::{Error, Result};
use crate::moe::KvType;
use crate::simd::{TIERS, Tier};
use std::path::PathBuf;

/// Which model, and how much of its context.
#[derive(clap::Args, Clone, Debug)]
#[command(next_help_heading = "Model")]
pub struct ModelOptions {
    /// A Mixtral, Mistral or Llama GGUF file [default: $OCTET_MODEL, else the demo model]
    #[arg(short, long, value_name = "FILE")]
    pub model: Option<PathBuf>,
    /// Most tokens of the conversation [default: what the model was trained for]
    #[arg(short, long, value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(1..))]
    pub ctx: Option<u32>,
    /// Element type of the KV cache
    #[arg(long, value_name = "TYPE", value_parser = parse_kv, default_value = "f16")]
    pub kv: KvType,
}

/// What it runs on.
#[derive(clap::Args, Clone, Debug)]
#[command(next_help_heading = "Machine")]
pub struct MachineOptions {
    /// CPU threads [default: one for each core]
    #[arg(short, long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub threads: Option<u16>,
    /// Highest CPU tier to use: scalar, avx2 or avx512, on aarch64 scalar or neon [default: $OCTET_ISA, else the best there is]
    #[arg(long, value_name = "TIER", value_parser = parse_tier)]
    pub isa: Option<Tier>,
    /// Prompt tokens that go through the layers together
    #[arg(long, value_name = "TOKENS", default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..=65536))]
    pub ubatch: u32,
    /// Tell more on stderr
    #[arg(short, long)]
    pub verbose: bool,
}

/// How the next token is chosen; names, meanings and defaults are llama.cpp's.
#[derive(clap::Args, Clone, Debug)]
#[command(next_help_heading = "Sampling")]
pub struct SamplingOptions {
    /// Temperature; 0 always takes the likeliest token
    #[arg(long, value_name = "T", default_value_t = 0.8, value_parser = finite, allow_negative_numbers = true)]
    pub temp: f32,
    /// Keep this many of the likeliest tokens; 0 keeps all
    #[arg(long, value_name = "N", default_value_t = 40)]
    pub top_k: usize,
    /// Keep the likeliest tokens until their probabilities sum to this
    #[arg(long, value_name = "P", default_value_t = 0.95, value_parser = finite)]
    pub top_p: f32,
    /// Keep tokens at least this likely relative to the likeliest
    #[arg(long, value_name = "P", default_value_t = 0.05, value_parser = finite)]
    pub min_p: f32,
    /// Divide the logits of recent tokens by this
    #[arg(long, value_name = "X", default_value_t = 1.0, value_parser = finite)]
    pub repeat_penalty: f32,
    /// Recent tokens that the penalties look at; -1: all
    #[arg(long, value_name = "N", default_value = "64", value_parser = count, allow_negative_numbers = true)]
    pub repeat_last_n: u32,
    /// Subtract this from the logit of every recent token
    #[arg(long, value_name = "X", default_value_t = 0.0, value_parser = finite, allow_negative_numbers = true)]
    pub presence_penalty: f32,
    /// Subtract this from a recent token's logit once per occurrence
    #[arg(long, value_name = "X", default_value_t = 0.0, value_parser = finite, allow_negative_numbers = true)]
    pub frequency_penalty: f32,
    /// Seed of the random numbers; the same seed gives the same text; -1 takes one from the clock
    #[arg(long, value_name = "N", default_value_t = -1, allow_negative_numbers = true)]
    pub seed: i64,
    /// Change a token's logit: ID+BIAS or ID-BIAS; may be repeated
    #[arg(short = 'l', long, value_name = "ID±B", value_parser = parse_bias)]
    pub logit_bias: Vec<(u32, f32)>,
}

impl SamplingOptions {
    /// As the sampler wants them, for a vocabulary of `n_vocab` tokens.
    ///
    /// # Errors
    /// [`Error::Usage`] for the bias of a token that the vocabulary does not have.
    pub fn sampler(&self, n_vocab: usize) -> Result<SamplerOptions> {
        if let Some((id, _)) = self
            .logit_bias
            .iter()
            .find(|(id, _)| *id as usize >= n_vocab)
        {
            return Err(Error::Usage(format!(
                "--logit-bias {id}: no such token (expected ids below {n_vocab}, found {id})"
            )));
        }
        Ok(SamplerOptions {
            temp: self.temp,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            repeat_penalty: self.repeat_penalty,
            repeat_last_n: self.repeat_last_n as usize,
            presence_penalty: self.presence_penalty,
            frequency_penalty: self.frequency_penalty,
            seed: u64::try_from(self.seed).ok(),
            logit_bias: self.logit_bias.clone(),
        })
    }
}

/// A float that is a number: `nan` and `inf` parse as f32 but make no sense as a setting.
fn finite(text: &str) -> std::result::Result<f32, String> {
    match text.parse::<f32>() {
        Ok(x) if x.is_finite() => Ok(x),
        _ => Err("expected a number".to_string()),
    }
}

/// A number of tokens; -1 is "all there are" in llama.cpp, and here.
///
/// # Errors
/// If the text is neither.
pub fn count(text: &str) -> std::result::Result<u32, String> {
    match text {
        "-1" => Ok(u32::MAX),
        _ => text
            .parse()
            .map_err(|_| "expected a number of tokens, or -1 for all".to_string()),
    }
}

/// A cache's element type.
///
/// # Errors
/// If no type has this name.
pub fn parse_kv(text: &str) -> std::result::Result<KvType, String> {
    match text {
        "f16" => Ok(KvType::F16),
        "f32" => Ok(KvType::F32),
        _ => Err("expected f16 or f32".to_string()),
    }
}

/// A tier's name.
///
/// # Errors
/// If no tier has this name.
pub fn parse_tier(text: &str) -> std::result::Result<Tier, String> {
    let names: Vec<_> = TIERS.iter().map(|row| row.name).collect();
    TIERS
        .iter()
        .find(|row| row.name == text)
        .map(|row| row.tier)
        .ok_or_else(|| format!("expected one of {}", names.join(", ")))
}

fn parse_bias(text: &str) -> std::result::Result<(u32, f32), String> {
    let bad = || "expected ID+BIAS or ID-BIAS, such as 29871-1.5".to_string();
    let at = text.find(['+', '-']).ok_or_else(bad)?;
    let id = text[..at].parse().map_err(|_| bad())?;
    let bias: f32 = text[at..].parse().map_err(|_| bad())?;
    if bias.is_nan() {
        Err(bad())
    } else {
        Ok((id, bias))
    }
}
