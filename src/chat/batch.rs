//! Many sequences at once; new ones enter as others end (continuous batching).
//!
//! In each step every sequence that is answering gives its newest token, and the prompts that are being read
//! fill what is left of the ubatch. All go through the layers together, so that an expert's bytes are
//! read once for all the tokens that chose it. A beginning that several prompts have in common is computed once.
//!
//! An answer does not depend on its neighbours (promise 1): who runs beside whom, who waits, and whose
//! cache was thrown away and computed again are matters of speed alone.

use super::sampler::Sampler;
use super::session::{Answer, Finish, Limits, LogitsHash, check_prompt, common, rate};
use crate::error::Result;
use crate::moe::kv::KV_BLOCK;
use crate::moe::{Kv, KvType, Model, Reads, Run, Scratch, Want};
use std::collections::VecDeque;
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

/// A common beginning shorter than this is computed again: to wait for it would take longer.
const MIN_SHARED: usize = 16;
/// Prompts that are kept, memory permitting: files often go round several long beginnings.
const MAX_KEPT: usize = 64;

/// How much a batch may take.
#[derive(Clone, Copy, Debug)]
pub struct Room {
    /// Element type of the caches.
    pub kv: KvType,
    /// Most tokens of a sequence.
    pub ctx: usize,
    /// Most tokens of one forward pass, unless more sequences than that are answering.
    pub ubatch: usize,
    /// Most sequences that run at once.
    pub sequences: usize,
    /// Most bytes of all caches. One sequence may always run.
    pub kv_bytes: usize,
}

/// Sequences that are being answered.
pub struct Batch<'m> {
    model: &'m Model,
    room: Room,
    scratch: Scratch,
    /// The oldest first.
    running: Vec<Sequence>,
    /// Those for which there is no room yet, or no longer; the oldest first.
    waiting: VecDeque<Sequence>,
    /// Prompts whose answers have ended, for new ones that begin like them; the longest unused first.
    kept: VecDeque<Kept>,
    totals: Totals,
}

/// A prompt and its answer so far.
struct Sequence {
    id: u64,
    prompt_tokens: usize,
    /// Prompt and answer; the cache holds the beginning.
    tokens: Vec<u32>,
    kv: Kv,
    /// Whether it may still take its beginning from another cache.
    fresh: bool,
    sampler: Sampler,
    limits: Limits,
    answer: Answer,
    end: Option<Result<Finish>>,
}

struct Kept {
    tokens: Vec<u32>,
    kv: Kv,
}

/// A sequence that has ended.
#[derive(Debug)]
pub struct Done {
    /// What [`Batch::add`] was told.
    pub id: u64,
    /// Tokens of its prompt.
    pub prompt_tokens: usize,
    /// What followed, or why nothing more could.
    pub answer: Result<Answer>,
}

/// What a batch has done so far.
#[derive(Clone, Debug, Default)]
pub struct Totals {
    /// Tokens that were computed to read prompts.
    pub prompt_tokens: usize,
    /// Tokens of prompts that were taken from other sequences.
    pub shared_tokens: usize,
    /// Tokens that were generated.
    pub answer_tokens: usize,
    /// Forward passes.
    pub steps: usize,
    /// Time that they and the choice of tokens took.
    pub time: Duration,
    /// Bytes of weights that were read.
    pub weight_bytes: u64,
    /// What was read from the disk, if the model is larger than memory.
    pub reads: Reads,
    /// Of all sequences that have ended, whatever their order.
    pub hash: LogitsHash,
}

impl Totals {
    /// Generated tokens per second, of the time that prompts took, too; 0 before there were any.
    pub fn answer_rate(&self) -> f64 {
        rate(self.answer_tokens as f64, self.time)
    }

    /// Bytes of weights read per second.
    pub fn bandwidth(&self) -> f64 {
        rate(self.weight_bytes as f64, self.time)
    }
}

impl Sequence {
    /// Tokens that the cache does not hold yet.
    fn pending(&self) -> &[u32] {
        &self.tokens[self.kv.len()..]
    }

    /// Takes the logits after its last token in.
    fn grow(&mut self, logits: &[f32], ctx: usize) {
        let (answer, tokens) = (&mut self.answer, &mut self.tokens);
        self.end = answer
            .grow(tokens, logits, &mut self.sampler, &self.limits)
            .map(|end| end.or_else(|| answer.ended(tokens.len(), &self.limits, ctx)))
            .transpose();
    }
}

/// What other caches have of a sequence's tokens.
#[derive(Default)]
struct Beginning {
    /// The most that one of them holds now.
    len: usize,
    /// Which one: a number among the kept prompts, then the running sequences.
    from: usize,
    /// The most that one of them will hold.
    soon: usize,
}

impl<'m> Batch<'m> {
    /// A batch without sequences.
    pub fn new(model: &'m Model, room: Room) -> Batch<'m> {
        Batch {
            model,
            room,
            scratch: Scratch::default(),
            running: Vec::new(),
            waiting: VecDeque::new(),
            kept: VecDeque::new(),
            totals: Totals::default(),
        }
    }

    /// Whether one more sequence could run.
    pub fn has_room(&self) -> bool {
        self.running.len() + self.waiting.len() < self.room.sequences
    }

    /// Whether all sequences have ended.
    pub fn is_empty(&self) -> bool {
        self.running.is_empty() && self.waiting.is_empty()
    }

    /// What was done so far.
    pub fn totals(&self) -> &Totals {
        &self.totals
    }

    /// Adds a sequence; the next steps work on it.
    ///
    /// # Errors
    /// Those of [`Session::answer`](super::session::Session::answer).
    pub fn add(
        &mut self,
        id: u64,
        prompt: Vec<u32>,
        mut sampler: Sampler,
        limits: Limits,
    ) -> Result<()> {
        check_prompt(&prompt, self.room.ctx)?;
        self.model.check_tokens(&prompt)?;
        sampler.begin();
        let answer = Answer::new();
        self.waiting.push_back(Sequence {
            id,
            prompt_tokens: prompt.len(),
            end: answer.ended(prompt.len(), &limits, self.room.ctx).map(Ok),
            tokens: prompt,
            kv: self.empty_cache(),
            fresh: true,
            sampler,
            limits,
            answer,
        });
        Ok(())
    }

    /// One forward pass; returns the sequences that ended with it. `on_token` is told each sequence's new
    /// token; its answer `Break` ends that sequence.
    ///
    /// # Errors
    /// None that a caller could cause: [`Batch::add`] has checked what [`Model::forward`] checks.
    pub fn step(&mut self, on_token: impl FnMut(u64, u32) -> ControlFlow<()>) -> Result<Vec<Done>> {
        let started = Instant::now();
        self.admit();
        self.share();
        let takes = self.plan();
        self.forward(&takes)?;
        self.choose(on_token);
        let ended: Vec<_> = self.running.extract_if(.., |s| s.end.is_some()).collect();
        let done = ended.into_iter().map(|s| self.finish(s)).collect();
        self.totals.time += started.elapsed();
        self.totals.weight_bytes = self.scratch.weight_bytes;
        self.totals.reads = self.model.store().reads();
        Ok(done)
    }

    fn empty_cache(&self) -> Kv {
        Kv::new(&self.model.config, self.room.kv, self.room.ctx)
    }

    /// Lets waiting sequences run while there is memory for them, at the price of kept prompts.
    fn admit(&mut self) {
        while self.running.len() < self.room.sequences
            && let Some(next) = self.waiting.front()
        {
            let promised: usize = (0..self.running.len())
                .map(|i| self.growth(&self.running[i], i))
                .sum();
            let more = self.growth(next, self.running.len());
            if self.running.is_empty() || self.fits(promised + more) {
                self.running.extend(self.waiting.pop_front());
            } else if self.kept.pop_front().is_none() {
                break;
            }
        }
    }

    /// Bytes that a sequence still needs for what it has and one token, with `before` older ones running.
    fn growth(&self, s: &Sequence, before: usize) -> usize {
        let shared = match s.fresh {
            true => self.beginning(&s.tokens, before).soon / KV_BLOCK,
            false => 0,
        };
        let all = s.kv.growth(s.pending().len() + 1);
        all.saturating_sub(shared * s.kv.block_bytes())
    }

    /// Whether this many more bytes of caches may be allocated.
    fn fits(&self, more: usize) -> bool {
        let kept = self.kept.iter().map(|k| &k.kv);
        let caches = || self.running.iter().map(|s| &s.kv).chain(kept.clone());
        let most: usize = caches().map(Kv::bytes).sum();
        // The first figure is quick and counts what is shared more than once.
        most + more <= self.room.kv_bytes
            || Kv::bytes_together(caches()) + more <= self.room.kv_bytes
    }

    /// What kept prompts and the `before` oldest sequences have of `tokens`, the last of them excepted, which gives
    /// the logits. Only older ones count, so that no two wait for each other.
    fn beginning(&self, tokens: &[u32], before: usize) -> Beginning {
        let kept = self.kept.iter().map(|k| (&k.tokens, &k.kv));
        let running = self.running[..before].iter().map(|s| (&s.tokens, &s.kv));
        let mut found = Beginning::default();
        for (from, (others, kv)) in kept.chain(running).enumerate() {
            let soon = common(&tokens[..tokens.len() - 1], others);
            let len = soon.min(kv.len());
            found.soon = found.soon.max(soon);
            if len > found.len {
                (found.len, found.from) = (len, from);
            }
        }
        found
    }

    /// Gives new sequences the beginnings that others have computed.
    fn share(&mut self) {
        for i in 0..self.running.len() {
            if !self.running[i].fresh {
                continue;
            }
            let found = self.beginning(&self.running[i].tokens, i);
            if found.soon >= found.len + MIN_SHARED {
                continue; // It waits for more.
            }
            self.running[i].fresh = false;
            if found.len >= MIN_SHARED {
                self.running[i].kv = self.fork(&found);
                self.totals.shared_tokens += found.len;
            }
        }
    }

    fn fork(&mut self, found: &Beginning) -> Kv {
        if let Some(running) = found.from.checked_sub(self.kept.len()) {
            return self.running[running].kv.fork(found.len);
        }
        // The last one is the one used last.
        self.kept.make_contiguous()[found.from..].rotate_left(1);
        self.kept[self.kept.len() - 1].kv.fork(found.len)
    }

    /// How many tokens each running sequence gives to this step. Makes the memory that they need.
    fn plan(&mut self) -> Vec<usize> {
        loop {
            let takes = self.takes();
            let growth = |(s, n): (&Sequence, &usize)| s.kv.growth(*n);
            let growth: usize = self.running.iter().zip(&takes).map(growth).sum();
            if self.fits(growth) || !self.free() {
                return takes;
            }
        }
    }

    fn takes(&self) -> Vec<usize> {
        let answering = |s: &&Sequence| s.pending().len() == 1 && !s.fresh;
        let n = self.running.iter().filter(answering).count();
        let mut room = self.room.ubatch.saturating_sub(n).max(1);
        let take = |s: &Sequence| match s.pending().len() {
            _ if s.fresh || s.end.is_some() => 0,
            1 => 1,
            n => {
                let take = n.min(room);
                room -= take;
                take
            }
        };
        self.running.iter().map(take).collect()
    }

    /// Gives memory back: a kept prompt's, else the youngest sequence's, which will be computed again later.
    fn free(&mut self) -> bool {
        if self.kept.pop_front().is_some() {
            return true;
        }
        if self.running.len() < 2 {
            return false;
        }
        let empty = self.empty_cache();
        self.waiting.extend(self.running.pop().map(|s| Sequence {
            kv: empty,
            fresh: true,
            ..s
        }));
        self.waiting.rotate_right(1);
        true
    }

    fn forward(&mut self, takes: &[usize]) -> Result<()> {
        let mut runs = Vec::with_capacity(takes.len());
        for (s, n) in self.running.iter_mut().zip(takes) {
            let first = s.kv.len();
            let whole = first + n == s.tokens.len();
            if s.answer.tokens.is_empty() || *n > 1 {
                self.totals.prompt_tokens += n;
            }
            runs.push(Run {
                kv: &mut s.kv,
                tokens: &s.tokens[first..first + n],
                want: if whole { Want::Last } else { Want::Nothing },
            });
        }
        if takes.iter().any(|n| *n > 0) {
            self.model.forward(&mut runs, &mut self.scratch)?;
            self.totals.steps += 1;
        }
        Ok(())
    }

    /// The next token of every sequence whose logits were computed.
    fn choose(&mut self, mut on_token: impl FnMut(u64, u32) -> ControlFlow<()>) {
        let ctx = self.room.ctx;
        let mut rows = self
            .scratch
            .logits()
            .chunks_exact(self.model.config.n_vocab);
        let whole = |s: &&mut Sequence| s.pending().is_empty();
        let mut work: Vec<_> = self
            .running
            .iter_mut()
            .filter(whole)
            .filter_map(|s| Some((s, rows.next()?)))
            .collect();
        let pool = &self.model.machine().pool;
        pool.enter(|| pool.each(&mut work, |_, (s, row)| s.grow(row, ctx)));
        for (s, _) in work {
            if !matches!(s.end, Some(Err(_) | Ok(Finish::Stop)))
                && let Some(&token) = s.answer.tokens.last()
            {
                self.totals.answer_tokens += 1;
                if on_token(s.id, token).is_break() {
                    s.end = Some(Ok(Finish::Interrupted));
                }
            }
        }
    }

    /// Keeps the prompt of a sequence that has ended, if another may begin like it.
    fn finish(&mut self, mut s: Sequence) -> Done {
        self.totals.hash.0 = self.totals.hash.0.wrapping_add(s.answer.stats.hash.0);
        let prompt = &s.tokens[..s.prompt_tokens];
        let covered = |long: &[u32], short: &[u32]| common(long, short) == short.len();
        let useful = prompt.len() >= MIN_SHARED && s.kv.len() >= prompt.len();
        if useful && !self.kept.iter().any(|k| covered(&k.tokens, prompt)) {
            self.kept.retain(|k| !covered(prompt, &k.tokens));
            if self.kept.len() == MAX_KEPT {
                self.kept.pop_front();
            }
            self.kept.push_back(Kept {
                tokens: prompt.to_vec(),
                kv: s.kv.fork(prompt.len()),
            });
        }
        let end = s.end.expect("it has ended");
        Done {
            id: s.id,
            prompt_tokens: s.prompt_tokens,
            answer: end.map(|finish| {
                s.answer.finish = finish;
                s.answer
            }),
        }
    }
}
