//! One sequence of tokens and what comes next: prefill, sampling, the end.

use super::draft::{Draft, Drafter};
use super::sampler::{Sampler, SamplerOptions, logprob, logprobs};
use crate::error::{Error, Result};
use crate::moe::router::Choice;
use crate::moe::{Kv, KvType, Model, Observer, Reads, Routes, Run, Scratch, Want};
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

/// A sequence with its KV cache. Feeding it a prompt computes only what differs from what it holds.
pub struct Session<'m> {
    model: &'m Model,
    kv: Kv,
    /// What the cache holds.
    tokens: Vec<u32>,
    scratch: Scratch,
    ubatch: usize,
    drafter: Drafter,
    /// What the router chose in the last pass.
    pass: Pass,
    /// What the router did with tokens of answers, until somebody clears it.
    pub routes: Routes,
}

/// When an answer ends and what is recorded on the way.
#[derive(Clone, Debug, Default)]
pub struct Limits {
    /// Most tokens of an answer; `None`: as many as the context holds.
    pub max_tokens: Option<usize>,
    /// Tokens that end an answer; they are not part of it.
    pub stop: Vec<u32>,
    /// Likeliest tokens to record for each token of the answer.
    pub logprobs: usize,
}

impl Limits {
    /// Lets answers go on where the model would end them.
    pub fn ignore_ends(&mut self, options: &mut SamplerOptions) {
        let ends = self.stop.drain(..);
        let banned = ends.map(|id| (id, f32::NEG_INFINITY));
        options.logit_bias.extend(banned);
    }
}

/// What a session tells while it works; the answer `Break` stops it.
#[derive(Clone, Copy, Debug)]
pub enum Event {
    /// Tokens of the prompt that are done, and that have to be done.
    Prompt {
        /// Done so far.
        done: usize,
        /// To be computed for this prompt.
        total: usize,
    },
    /// The next token of the answer.
    Token(u32),
}

/// Why an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// The model ended it.
    Stop,
    /// It reached the limit that was set.
    Length,
    /// The context is full.
    ContextFull,
    /// The event handler asked for it.
    Interrupted,
}

/// An answer.
#[derive(Clone, Debug)]
pub struct Answer {
    /// Its tokens, without the one that ended it.
    pub tokens: Vec<u32>,
    /// Why it ended.
    pub finish: Finish,
    /// The natural log of each token's probability, if the likeliest were asked for.
    pub logprobs: Vec<f32>,
    /// For each token the likeliest `(id, natural log of probability)`, if asked for.
    pub top: Vec<Vec<(u32, f32)>>,
    /// What the machine did.
    pub stats: Stats,
}

impl Answer {
    /// No token yet.
    pub(super) fn new() -> Answer {
        Answer {
            tokens: Vec::new(),
            finish: Finish::Length,
            logprobs: Vec::new(),
            top: Vec::new(),
            stats: Stats::default(),
        }
    }

    /// Each token with its probability and the likeliest in its place, if they were asked for.
    pub fn each(&self) -> impl Iterator<Item = (u32, f32, &[(u32, f32)])> {
        let told = self.logprobs.iter().zip(&self.top);
        let ids = self.tokens.iter();
        ids.zip(told)
            .map(|(id, (logprob, top))| (*id, *logprob, top.as_slice()))
    }

    /// Whether the answer ends before its next token: by its limit, or because a cache of `ctx` tokens
    /// cannot take the last of `sequence`.
    pub(super) fn ended(&self, sequence: usize, limits: &Limits, ctx: usize) -> Option<Finish> {
        if limits.max_tokens.is_some_and(|n| self.tokens.len() >= n) {
            Some(Finish::Length)
        } else if sequence > ctx {
            Some(Finish::ContextFull)
        } else {
            None
        }
    }

    /// Chooses the token after `sequence`, whose logits these are, and appends it to both. The token may
    /// instead be the end.
    pub(super) fn grow(
        &mut self,
        sequence: &mut Vec<u32>,
        logits: &[f32],
        sampler: &mut Sampler,
        limits: &Limits,
    ) -> Result<Option<Finish>> {
        self.stats.hash.update(logits);
        let token = sampler.sample(logits, sequence)?;
        if limits.stop.contains(&token) {
            return Ok(Some(Finish::Stop));
        }
        if limits.logprobs > 0 {
            self.logprobs.push(logprob(logits, token));
            self.top.push(logprobs(logits, limits.logprobs));
        }
        sequence.push(token);
        self.tokens.push(token);
        self.stats.answer_tokens += 1;
        Ok(None)
    }
}

/// What the router chose for the tokens of a pass, by layer: guesses that were wrong do not count.
struct Pass(Vec<Vec<Choice>>);

impl Observer for Pass {
    fn sees_rows(&self) -> bool {
        false
    }

    fn routed(&mut self, layer: usize, _: &[f32], choices: &[Choice]) {
        self.0[layer].extend_from_slice(choices);
    }
}

impl Pass {
    /// Counts the first `kept` of `n` tokens.
    fn count(&self, kept: usize, n: usize, routes: &mut Routes) {
        for (layer, choices) in self.0.iter().enumerate() {
            routes.routed(layer, &[], &choices[..choices.len() / n * kept]);
        }
    }
}

/// Tells about the last token; whether that ends the answer.
fn told(
    sequence: &[u32],
    on_event: &mut (impl FnMut(Event) -> ControlFlow<()> + Send),
) -> Option<Finish> {
    let token = *sequence.last()?;
    let ended = on_event(Event::Token(token)).is_break();
    ended.then_some(Finish::Interrupted)
}

/// Whether a cache for `ctx` tokens can take a prompt and one token of an answer.
///
/// # Errors
/// [`Error::ContextFull`], or [`Error::Prompt`] for a prompt without tokens.
pub(super) fn check_prompt(prompt: &[u32], ctx: usize) -> Result<()> {
    if prompt.is_empty() {
        Err(Error::prompt("it is empty", "at least one token", "none"))
    } else if prompt.len() >= ctx {
        let want = prompt.len() + 1;
        Err(Error::ContextFull { limit: ctx, want })
    } else {
        Ok(())
    }
}

/// How many tokens two sequences have in common from the start.
pub(super) fn common(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

/// What the machine did, for the closing line.
#[derive(Clone, Debug, Default)]
pub struct Stats {
    /// Tokens of prompts that were computed, not taken from the cache.
    pub prompt_tokens: usize,
    /// Time that took.
    pub prompt_time: Duration,
    /// Tokens that were generated.
    pub answer_tokens: usize,
    /// Tokens that came out of forward passes after the prompt's (which gives the first one), the end of an answer among
    /// them.
    pub steps: usize,
    /// Those passes.
    pub passes: usize,
    /// Time of those passes.
    pub step_time: Duration,
    /// Tokens that were guessed.
    pub drafted: usize,
    /// Guesses that were right.
    pub accepted: usize,
    /// Bytes of weights that prompts and steps have read.
    pub weight_bytes: u64,
    /// Of those, bytes that the steps have read.
    pub step_bytes: u64,
    /// What was read from the disk, if the model is larger than memory.
    pub reads: Reads,
    /// Tokens whose probability was looked at instead.
    pub scored_tokens: usize,
    /// Over every row of logits that was sampled from or scored.
    pub hash: LogitsHash,
}

impl Stats {
    /// Prompt tokens per second; 0 before there were any.
    pub fn prompt_rate(&self) -> f64 {
        rate(self.prompt_tokens as f64, self.prompt_time)
    }

    /// Generated tokens per second; 0 before there were any.
    pub fn answer_rate(&self) -> f64 {
        rate(self.steps as f64, self.step_time)
    }

    /// Bytes of weights read per second while generating; while reading the prompt if nothing was generated.
    pub fn bandwidth(&self) -> f64 {
        match self.steps {
            0 => rate(self.weight_bytes as f64, self.prompt_time),
            _ => rate(self.step_bytes as f64, self.step_time),
        }
    }

    /// Adds a later answer's.
    pub fn add(&mut self, other: &Stats) {
        self.prompt_tokens += other.prompt_tokens;
        self.prompt_time += other.prompt_time;
        self.answer_tokens += other.answer_tokens;
        self.steps += other.steps;
        self.passes += other.passes;
        self.drafted += other.drafted;
        self.accepted += other.accepted;
        self.step_time += other.step_time;
        self.weight_bytes += other.weight_bytes;
        self.step_bytes += other.step_bytes;
        self.reads += other.reads;
        self.scored_tokens += other.scored_tokens;
        self.hash.0 = (self.hash.0 ^ other.hash.0).wrapping_mul(LogitsHash::PRIME);
    }
}

/// How many come in a second; 0 in no time.
pub fn rate(n: f64, time: Duration) -> f64 {
    if time.is_zero() {
        0.0
    } else {
        n / time.as_secs_f64()
    }
}

/// FNV-1a with 64 bits (Fowler, Noll, Vo) over the bit patterns of logits, a 32-bit word at a time:
/// two runs with the same hash have seen the same bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogitsHash(pub u64);

impl Default for LogitsHash {
    fn default() -> LogitsHash {
        LogitsHash(0xcbf2_9ce4_8422_2325)
    }
}

impl LogitsHash {
    const PRIME: u64 = 0x100_0000_01b3;

    /// Takes a row of logits in.
    pub fn update(&mut self, logits: &[f32]) {
        self.0 = logits.iter().fold(self.0, |h, l| {
            (h ^ l.to_bits() as u64).wrapping_mul(LogitsHash::PRIME)
        });
    }
}

impl std::fmt::Display for LogitsHash {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl<'m> Session<'m> {
    /// An empty sequence. `ctx`: most tokens it may hold; `ubatch`: most tokens of one forward pass.
    pub fn new(model: &'m Model, kind: KvType, ctx: usize, ubatch: usize) -> Session<'m> {
        Session {
            model,
            kv: Kv::new(&model.config, kind, ctx),
            tokens: Vec::new(),
            scratch: Scratch::default(),
            ubatch: model.pass_tokens(ubatch).max(1),
            drafter: Drafter::new(model),
            pass: Pass(vec![Vec::new(); model.config.n_layer]),
            routes: Routes::new(&model.config),
        }
    }

    /// Says how many tokens to guess ahead ([`Draft::Auto`] at first); the answers are the same.
    pub fn set_draft(&mut self, draft: Draft) {
        self.drafter.mode = draft;
    }

    /// Most tokens it may hold.
    pub fn limit(&self) -> usize {
        self.kv.limit()
    }

    /// Tokens it holds.
    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    /// Whether it holds none.
    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    /// Tokens of the model's vocabulary.
    pub fn n_vocab(&self) -> usize {
        self.model.config.n_vocab
    }

    /// Its KV cache and the tokens in it.
    pub fn cache(&self) -> (&Kv, &[u32]) {
        (&self.kv, &self.tokens)
    }

    /// Forgets everything; `fill` puts into the empty cache what it has, and gives the tokens of that.
    ///
    /// # Errors
    /// Those of `fill`; the session is empty then.
    pub fn refill(&mut self, fill: impl FnOnce(&mut Kv) -> Result<Vec<u32>>) -> Result<()> {
        self.tokens.clear();
        self.kv.truncate(0);
        match fill(&mut self.kv) {
            Ok(tokens) => {
                debug_assert_eq!(tokens.len(), self.kv.len());
                self.tokens = tokens;
                Ok(())
            }
            Err(e) => {
                self.kv.truncate(0);
                Err(e)
            }
        }
    }

    /// Reads `prompt` (all of the sequence so far, from its first token) and generates what follows.
    ///
    /// # Errors
    /// [`Error::ContextFull`] if the prompt leaves no room for one token, [`Error::Prompt`] if it is
    /// empty or has a token outside the vocabulary. The session can go on after an error.
    pub fn answer(
        &mut self,
        prompt: &[u32],
        sampler: &mut Sampler,
        limits: &Limits,
        mut on_event: impl FnMut(Event) -> ControlFlow<()> + Send,
    ) -> Result<Answer> {
        let mut answer = Answer::new();
        sampler.begin();
        let before = self.scratch.weight_bytes;
        let reads = self.model.store().reads();
        if !self.prefill(prompt, &mut answer.stats, &mut on_event)? {
            answer.finish = Finish::Interrupted;
            answer.stats.weight_bytes = self.scratch.weight_bytes - before;
            answer.stats.reads = self.model.store().reads().since(&reads);
            return Ok(answer);
        }
        let before_steps = self.scratch.weight_bytes;
        let mut sequence = prompt.to_vec();
        self.drafter.begin();
        answer.finish = loop {
            if let Some(finish) = answer.ended(sequence.len(), limits, self.limit()) {
                break finish;
            }
            let finish = match self.tokens.len() < sequence.len() {
                true => self.step(&mut sequence, &mut answer, sampler, limits, &mut on_event)?,
                false => {
                    let logits = self.scratch.logits();
                    let finish = answer.grow(&mut sequence, logits, sampler, limits)?;
                    finish.or_else(|| told(&sequence, &mut on_event))
                }
            };
            if let Some(finish) = finish {
                break finish;
            }
        };
        answer.stats.step_bytes = self.scratch.weight_bytes - before_steps;
        answer.stats.weight_bytes = self.scratch.weight_bytes - before;
        answer.stats.reads = self.model.store().reads().since(&reads);
        Ok(answer)
    }

    /// One forward pass over the last token of `sequence` and guesses at what follows; the tokens that come out of it.
    fn step(
        &mut self,
        sequence: &mut Vec<u32>,
        answer: &mut Answer,
        sampler: &mut Sampler,
        limits: &Limits,
        on_event: &mut (impl FnMut(Event) -> ControlFlow<()> + Send),
    ) -> Result<Option<Finish>> {
        let started = Instant::now();
        let before = sequence.len();
        // A pass gives one token more than it has guesses; all of them must be wanted, and fit.
        let wanted = limits.max_tokens.unwrap_or(usize::MAX) - answer.tokens.len();
        let room = (wanted - 1).min(self.limit() - before);
        let guess = self.drafter.guess(sequence, room, sampler.constraint());
        let mut batch = sequence[self.tokens.len()..].to_vec();
        batch.extend(&guess.tokens);
        self.forward(
            &batch,
            match guess.tokens.is_empty() {
                true => Want::Last,
                false => Want::All,
            },
        )?;
        let mut finish = None;
        let rows = self
            .scratch
            .logits()
            .chunks_exact(self.model.config.n_vocab);
        let mut guesses = guess.tokens.iter();
        for logits in rows {
            finish = answer.grow(sequence, logits, sampler, limits)?;
            answer.stats.steps += 1;
            finish = finish.or_else(|| told(sequence, on_event));
            let right = guesses.next() == sequence.last();
            answer.stats.accepted += usize::from(right && finish.is_none());
            if finish.is_some() || !right {
                break;
            }
        }
        // Guesses that were not drawn are forgotten. The last token was drawn and is not read yet, unless the end was drawn.
        let read = sequence.len() - usize::from(finish != Some(Finish::Stop));
        let kept = read + batch.len() - self.tokens.len();
        self.kv.truncate(read);
        self.tokens.truncate(read);
        self.pass.count(kept, batch.len(), &mut self.routes);
        let time = started.elapsed();
        answer.stats.passes += 1;
        answer.stats.drafted += guess.tokens.len();
        answer.stats.step_time += time;
        self.drafter.learn(&guess, sequence, before, time);
        Ok(finish)
    }

    /// Makes the cache hold `prompt` and computes the logits after it. `false`: interrupted.
    fn prefill(
        &mut self,
        prompt: &[u32],
        stats: &mut Stats,
        on_event: &mut (impl FnMut(Event) -> ControlFlow<()> + Send),
    ) -> Result<bool> {
        check_prompt(prompt, self.limit())?;
        // What the cache holds already is not computed again, but the last token is: it gives the logits.
        let keep = common(&self.tokens, prompt).min(prompt.len() - 1);
        self.kv.truncate(keep);
        self.tokens.truncate(keep);
        let started = Instant::now();
        let total = prompt.len() - keep;
        while self.tokens.len() < prompt.len() {
            let rest = &prompt[self.tokens.len()..];
            let part = &rest[..rest.len().min(self.ubatch)];
            let want = match part.len() == rest.len() {
                true => Want::Last,
                false => Want::Nothing,
            };
            let mut watch = Watch {
                done: self.tokens.len() - keep,
                part: part.len(),
                total,
                n_layer: self.model.config.n_layer,
                on_event,
            };
            let mut runs = [Run {
                kv: &mut self.kv,
                tokens: part,
                want,
            }];
            match self.model.observe(&mut runs, &mut self.scratch, &mut watch) {
                Err(Error::Interrupted) => return Ok(false),
                other => other?,
            };
            self.tokens.extend_from_slice(part);
            stats.prompt_tokens += part.len();
            stats.prompt_time = started.elapsed();
            let done = self.tokens.len() - keep;
            if on_event(Event::Prompt { done, total }).is_break() {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Runs the next tokens of an answer.
    fn forward(&mut self, tokens: &[u32], want: Want) -> Result<()> {
        self.pass.0.iter_mut().for_each(Vec::clear);
        let mut runs = [Run {
            kv: &mut self.kv,
            tokens,
            want,
        }];
        self.model
            .observe(&mut runs, &mut self.scratch, &mut self.pass)?;
        self.tokens.extend_from_slice(tokens);
        Ok(())
    }
}

/// Tells of a pass over a part of a prompt, layer by layer.
struct Watch<'a, F> {
    /// Tokens of the prompt that are done, that this pass works on, and all.
    done: usize,
    part: usize,
    total: usize,
    n_layer: usize,
    on_event: &'a mut F,
}

impl<F: FnMut(Event) -> ControlFlow<()> + Send> Observer for Watch<'_, F> {
    fn sees_rows(&self) -> bool {
        false
    }

    fn passed(&mut self, layer: usize) -> ControlFlow<()> {
        if layer + 1 == self.n_layer {
            return ControlFlow::Continue(());
        }
        (self.on_event)(Event::Prompt {
            done: self.done + self.part * (layer + 1) / self.n_layer,
            total: self.total,
        })
    }
}
