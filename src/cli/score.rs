//! Reading a text in chunks and scoring how well the model predicts it, as the reference does.

use super::input::read_text;
use super::load::Loaded;
use super::options::{MachineOptions, ModelOptions};
use super::progress::Progress;
use crate::chat::session::{LogitsHash, Stats};
use crate::error::{Error, Result};
use crate::moe::{Kv, Model, Observer, Run, Scratch, Want};
use std::path::Path;
use std::time::{Duration, Instant};

/// Tokens of a chunk when `--ctx` does not say; the reference's default.
const CHUNK: usize = 512;

/// What is said at once when Ctrl-C comes.
pub(super) const STOPPING: &str = "stopping after these tokens; Ctrl-C once more ends at once";

/// A text's tokens in chunks of one length; the rest of the text is left out.
pub(super) struct Chunks {
    /// BOS first, where the model wants it.
    tokens: Vec<u32>,
    /// Tokens of a chunk.
    pub(super) size: usize,
    bos: Option<u32>,
}

impl Chunks {
    /// Cuts a file, or standard input for `-`, into chunks of `--ctx` tokens.
    ///
    /// # Errors
    /// If the text cannot be read or is shorter than one chunk; [`Error::Usage`] if chunks are too short.
    pub(super) fn read(file: &Path, loaded: &Loaded, options: &ModelOptions) -> Result<Chunks> {
        let text = read_text(Some(file))?;
        let tokenizer = &loaded.tokenizer;
        let size = options.ctx.map_or(CHUNK.min(loaded.ctx), |n| n as usize);
        if size < 4 {
            return Err(Error::Usage(format!(
                "--ctx {size}: too short to score (expected at least 4)"
            )));
        }
        let bos = tokenizer.bos().filter(|_| tokenizer.add_bos());
        let tokens: Vec<u32> = bos.into_iter().chain(tokenizer.encode(&text)).collect();
        if tokens.len() < size {
            let expected = format!("at least {size} tokens");
            return Err(Error::invalid(file, "the text", expected, tokens.len()));
        }
        Ok(Chunks { tokens, size, bos })
    }

    /// How many there are.
    pub(super) fn count(&self) -> usize {
        self.tokens.len() / self.size
    }

    /// Keeps the first `n`.
    pub(super) fn truncate(&mut self, n: usize) {
        self.tokens.truncate(n.saturating_mul(self.size));
    }
}

/// Reads chunks, one after the other, each by itself.
pub(super) struct Scorer<'a> {
    model: &'a Model,
    chunks: &'a Chunks,
    ubatch: usize,
    kv: Kv,
    scratch: Scratch,
    progress: Progress,
    /// Chunks that were read.
    done: usize,
    time: Duration,
    /// Over the scored tokens: `-ln` of the probability that the model gave them.
    sum: f64,
    count: usize,
    hash: LogitsHash,
}

impl<'a> Scorer<'a> {
    /// A scorer that has read nothing; `doing` names the work on the progress bar.
    pub(super) fn new(
        model: &'a Model,
        chunks: &'a Chunks,
        options: &ModelOptions,
        machine: &MachineOptions,
        doing: &'static str,
    ) -> Scorer<'a> {
        Scorer {
            model,
            chunks,
            ubatch: machine.ubatch as usize,
            kv: Kv::new(&model.config, options.kv, chunks.size),
            scratch: Scratch::default(),
            progress: Progress::new(doing),
            done: 0,
            time: Duration::ZERO,
            sum: 0.0,
            count: 0,
            hash: LogitsHash::default(),
        }
    }

    /// Reads the next chunk while `observer` looks on, and scores its second half. `head`: whether the output
    /// head is computed for the first half too. False when all chunks are read.
    ///
    /// # Errors
    /// [`Error::Interrupted`] if `stop` says so between two batches.
    pub(super) fn next(
        &mut self,
        head: bool,
        observer: &mut dyn Observer,
        stop: impl Fn() -> bool,
    ) -> Result<bool> {
        let size = self.chunks.size;
        let Some(tokens) = self.chunks.tokens.chunks_exact(size).nth(self.done) else {
            return Ok(false);
        };
        let started = Instant::now();
        self.kv.truncate(0);
        let mut input = tokens.to_vec();
        if let Some(bos) = self.chunks.bos {
            input[0] = bos;
        }
        // Positions `first ..` score the token that follows them.
        let first = size / 2;
        let mut pos = 0;
        while pos < size {
            if stop() {
                self.progress.clear();
                return Err(Error::Interrupted);
            }
            // A batch ends where scoring begins, so that no logits are computed in vain.
            let (limit, want) = if pos < first {
                (first, if head { Want::All } else { Want::Nothing })
            } else {
                (size, Want::All)
            };
            let end = limit.min(pos + self.ubatch);
            let run = Run {
                kv: &mut self.kv,
                tokens: &input[pos..end],
                want,
            };
            let logits = self
                .model
                .observe(&mut [run], &mut self.scratch, observer)?;
            if pos >= first {
                for (row, p) in logits.chunks_exact(self.model.config.n_vocab).zip(pos..) {
                    if p + 1 < size {
                        self.hash.update(row);
                        self.sum += negative_log_likelihood(row, tokens[p + 1]);
                        self.count += 1;
                    }
                }
            }
            pos = end;
        }
        self.done += 1;
        self.time += started.elapsed();
        self.progress
            .set(self.done * size, self.chunks.count() * size);
        Ok(true)
    }

    /// The mean of `-ln p` of the scored tokens.
    pub(super) fn nll(&self) -> f64 {
        self.sum / self.count as f64
    }

    /// What the machine did.
    pub(super) fn stats(&self) -> Stats {
        Stats {
            prompt_tokens: self.done * self.chunks.size,
            prompt_time: self.time,
            weight_bytes: self.scratch.weight_bytes,
            reads: self.model.store().reads(),
            scored_tokens: self.count,
            hash: self.hash,
            ..Stats::default()
        }
    }
}

/// `-ln softmax(logits)[token]`, in f64.
fn negative_log_likelihood(logits: &[f32], token: u32) -> f64 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max) as f64;
    let sum: f64 = logits.iter().map(|l| libm::exp(*l as f64 - max)).sum();
    max + libm::log(sum) - logits[token as usize] as f64
}
