//! The spine: a batch of tokens through all layers.

use super::attention::{Place, Rope, attend};
use super::experts::{ExpertScratch, choose, experts, some_experts};
use super::kv::Kv;
use super::linear::{Input, Job, matmul};
use super::observe::{Observer, Site};
use super::offload::{Absent, Ask, Back, Host, Plan, take_in};
use super::router::{self, Choice};
use super::store::Store;
use super::weights::{Layer, Weights};
use super::{Config, Machine};
use crate::error::{Error, Result};
use crate::gguf::Gguf;
use crate::quant::act::{CHUNK, Chunk};
use std::ops::{ControlFlow, Range};

/// A model that is ready to run.
pub struct Model {
    /// Its shape.
    pub config: Config,
    /// Its weights.
    pub weights: Weights,
    store: Store,
    rope: Rope,
    machine: Machine,
}

/// How much memory a model may take.
#[derive(Clone, Debug, Default)]
pub enum Ram {
    /// The system decides: weights stay where they are mapped.
    #[default]
    Mapped,
    /// At most so many bytes for the whole process: see [`super::store`].
    Within {
        /// The budget.
        bytes: u64,
        /// How often a token takes each expert, `(n_layer, n_expert)`, if that is known.
        shares: Option<Vec<f32>>,
    },
}

/// Which logits a run wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Want {
    /// None: the tokens only enter the cache.
    Nothing,
    /// Those after the last token.
    Last,
    /// Those after every token.
    All,
}

/// The next tokens of one sequence. Several runs, each with a cache of its own, make a batch.
pub struct Run<'a> {
    /// The sequence so far; grows by `tokens`.
    pub kv: &'a mut Kv,
    /// What comes next.
    pub tokens: &'a [u32],
    /// Which logits to compute.
    pub want: Want,
}

/// Tokens that attention works on at once, which bounds its buffers; a pass may have more.
const PART: usize = 512;
/// Most tokens of a pass whose experts are read from the disk.
const LONGEST_PASS: usize = 8192;
/// Tokens of a pass whose experts come through a GPU: an expert of Mixtral gets a quarter of them, for which it comes up once.
const STREAMED_PASS: usize = 2048;

/// Buffers of [`Model::forward`], reused from call to call.
#[derive(Default)]
pub struct Scratch {
    /// Residual stream, `(n_tok, d_model)`.
    x: Vec<f32>,
    /// Normalised input of a block, `(n_tok, d_model)`.
    h: Vec<f32>,
    /// `(n_part, n_head · d_head)`, where a part has at most [`PART`] tokens.
    q: Vec<f32>,
    /// `(n_part, n_kv · d_head)`
    k: Vec<f32>,
    v: Vec<f32>,
    /// `(n_part, n_head · d_head)`
    heads: Vec<f32>,
    /// `(n_part, d_model)`
    o: Vec<f32>,
    /// `(n_tok, n_rot / 2)`
    cos: Vec<f32>,
    sin: Vec<f32>,
    /// `(rows wanted, n_vocab)`
    logits: Vec<f32>,
    /// `0..n_tok`
    all: Vec<u32>,
    input: Input,
    experts: ExpertScratch,
    /// A look ahead: the next layer's router, its normalised input `(n_tok, d_model)` and logits `(n_tok, n_expert)`.
    ahead_h: Vec<f32>,
    ahead_input: Input,
    ahead_logits: Vec<f32>,
    /// What comes back from a pass on a device.
    back: Back,
    /// Bytes of weights that the calls so far have read.
    pub weight_bytes: u64,
}

impl Scratch {
    /// The logits of the last [`Model::forward`], `(rows wanted, n_vocab)`.
    pub fn logits(&self) -> &[f32] {
        &self.logits
    }

    /// Bytes that it has to grow by for a pass of `n_tok` tokens with `rows` rows of logits.
    fn growth(&self, c: &Config, n_tok: usize, rows: usize) -> u64 {
        let (part, d_q, d_kv) = (n_tok.min(PART), c.n_head * c.d_head, c.n_kv * c.d_head);
        let token = 2 * c.d_model + c.n_rot + 1;
        let quantized = c.d_model.max(d_q).div_ceil(CHUNK) * size_of::<Chunk>();
        let need = n_tok * (4 * token + quantized + ExpertScratch::token_bytes(c))
            + 4 * part * (2 * d_q + 2 * d_kv + c.d_model)
            + ExpertScratch::wave_bytes(c, n_tok)
            + 4 * rows * c.n_vocab;
        let floats = [
            &self.x,
            &self.h,
            &self.q,
            &self.k,
            &self.v,
            &self.heads,
            &self.o,
            &self.cos,
            &self.sin,
            &self.logits,
        ];
        let floats: usize = floats.iter().map(|v| 4 * v.capacity()).sum();
        need.saturating_sub(floats + self.input.bytes() + self.experts.bytes()) as u64
    }
}

impl Model {
    /// Opens a model file's weights, which stay in the file.
    ///
    /// # Errors
    /// See [`Config::read`] and [`Weights::load`].
    pub fn open(file: &Gguf, machine: Machine) -> Result<Model> {
        Model::open_in(file, machine, Ram::Mapped)
    }

    /// Opens a model file's weights in so much memory.
    ///
    /// # Errors
    /// See [`Config::read`], [`Weights::load`] and [`Store::within`].
    pub fn open_in(file: &Gguf, machine: Machine, ram: Ram) -> Result<Model> {
        let config = Config::read(file)?;
        let mut weights = Weights::load(file, &config)?;
        let sources = file.sources().cloned().collect();
        let store = match ram {
            Ram::Mapped => Store::mapped(sources, &weights),
            Ram::Within { bytes, shares } => {
                Store::within(bytes, sources, &mut weights, &config, shares)?
            }
        };
        let rope = Rope::new(&config, weights.rope_factors.as_deref());
        Ok(Model {
            config,
            weights,
            store,
            rope,
            machine,
        })
    }

    /// The first layer alone, with as many experts as a token takes, as a model of its own, which stays in the file: what
    /// it does soon tells what all of them will do.
    pub fn first_layer(mut self, file: &Gguf) -> Model {
        let n = self.config.n_used;
        (self.config.n_layer, self.config.n_expert) = (1, n);
        self.weights.layers.truncate(1);
        for layer in &mut self.weights.layers {
            layer.experts.truncate(n);
            layer.router = layer.router.as_ref().map(|router| router.first_rows(n));
        }
        self.store = Store::mapped(file.sources().cloned().collect(), &self.weights);
        self
    }

    /// Has a device compute with what it has memory for ([`super::offload`]): what every token reads, then the most popular
    /// experts. They come in the background.
    pub fn offload_to(&mut self, plan: Plan) {
        self.store.offload_to(plan, &self.config, &self.weights);
    }

    /// [`matmul`] of jobs with one input, with a device's help where there is one.
    fn multiply<const N: usize>(&self, mut jobs: [Job<'_>; N]) {
        match self.store.offload() {
            Some(offload) => offload.multiply(&self.machine, jobs.into()),
            None => matmul(&self.machine, &mut jobs),
        }
    }

    /// Waits until everything that a device has memory for is there: for measurements.
    pub fn settle(&self) {
        if let Some(offload) = self.store.offload() {
            offload.settle();
        }
    }

    /// Bytes of the buffers for a pass of `n_tok` tokens.
    pub fn scratch_bytes(&self, n_tok: usize) -> u64 {
        Scratch::default().growth(&self.config, n_tok, 1)
    }

    /// Where its experts are.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// How many tokens of a prompt should go through the layers together, where `ubatch` would do for a model in memory: as
    /// many as may be if experts are read from the disk, so that each is read once for all of them; more, if they pass through
    /// a GPU.
    pub fn pass_tokens(&self, ubatch: usize) -> usize {
        let Some(ram) = self.store.total() else {
            let streams = self.store.offload().is_some_and(|gpu| gpu.streams());
            return if streams {
                ubatch.max(STREAMED_PASS)
            } else {
                ubatch
            };
        };
        let (one, two) = (1 << 12, 1 << 13);
        let growth = |n| Scratch::default().growth(&self.config, n, 0);
        let token = (growth(two) - growth(one)) / (two - one) as u64;
        // A sixteenth of the memory; the rest of it is better used for experts.
        let most = (ram / 16 / token.max(1)) as usize;
        ubatch.max(most.min(LONGEST_PASS))
    }

    /// Threads and kernels.
    pub fn machine(&self) -> &Machine {
        &self.machine
    }

    /// Whether the vocabulary has all of `tokens`.
    ///
    /// # Errors
    /// [`Error::Prompt`] if not.
    pub fn check_tokens(&self, tokens: &[u32]) -> Result<()> {
        let n_vocab = self.config.n_vocab;
        match tokens.iter().find(|id| **id as usize >= n_vocab) {
            None => Ok(()),
            Some(id) => Err(Error::prompt(
                "a token is outside the vocabulary",
                format!("ids below {n_vocab}"),
                id,
            )),
        }
    }

    /// Runs a batch and returns the wanted logits, `(rows wanted, n_vocab)`, in the order of the runs.
    ///
    /// The logits of a token depend on its sequence alone: the same bits for every batch, thread count
    /// and CPU tier.
    ///
    /// # Errors
    /// [`Error::ContextFull`] if a cache cannot take its tokens, [`Error::Prompt`] for a token outside
    /// the vocabulary; if the file has changed or cannot be read any more. No cache has changed then.
    pub fn forward<'s>(&self, runs: &mut [Run<'_>], scratch: &'s mut Scratch) -> Result<&'s [f32]> {
        self.observe(runs, scratch, &mut ())
    }

    /// [`Model::forward`] while `observer` looks on.
    ///
    /// # Errors
    /// As for [`Model::forward`], and [`Error::Interrupted`] if the observer ends the pass.
    pub fn observe<'s>(
        &self,
        runs: &mut [Run<'_>],
        scratch: &'s mut Scratch,
        observer: &mut dyn Observer,
    ) -> Result<&'s [f32]> {
        for run in runs.iter() {
            self.check_tokens(run.tokens)?;
        }
        let n_tok = runs.iter().map(|r| r.tokens.len()).sum();
        let rows = wanted(runs).len();
        let caches: usize = runs.iter().map(|r| r.kv.growth(r.tokens.len())).sum();
        let growth = caches as u64 + scratch.growth(&self.config, n_tok, rows);
        self.store.begin(n_tok, growth)?;
        for run in runs.iter_mut() {
            run.kv.reserve(run.tokens.len())?;
        }
        let pool = &self.machine.pool;
        let layers = || self.layers(runs, n_tok, scratch, observer);
        match n_tok {
            ..=1 => pool.enter(layers),
            _ => pool.enter_batch(layers),
        }?;
        Ok(&scratch.logits)
    }

    fn layers(
        &self,
        runs: &mut [Run<'_>],
        n_tok: usize,
        s: &mut Scratch,
        observer: &mut dyn Observer,
    ) -> Result<()> {
        let d = self.config.d_model;
        s.x.resize(n_tok * d, 0.0);
        s.h.resize(n_tok * d, 0.0);
        s.all.clear();
        s.all.extend(0..n_tok as u32);
        self.embed(runs, s);
        if !observer.sees_rows() && self.on_device(runs, s, observer)? {
            return Ok(());
        }
        s.weight_bytes += self.weights.dense_bytes() - self.store.dense_elsewhere();
        for (i, layer) in self.weights.layers.iter().enumerate() {
            for start in (0..n_tok).step_by(PART) {
                let part = start..n_tok.min(start + PART);
                self.attention(i, layer, runs, part, s, observer);
            }
            self.feed_forward(i, layer, s, observer)?;
            if observer.passed(i).is_break() {
                return Err(Error::Interrupted);
            }
        }
        for run in runs.iter_mut() {
            run.kv.advance(run.tokens.len());
        }
        self.head(runs, s, observer);
        Ok(())
    }

    /// The same on a device that has what every token reads. False where there is none, or it does not take this pass.
    fn on_device(
        &self,
        runs: &mut [Run<'_>],
        s: &mut Scratch,
        observer: &mut dyn Observer,
    ) -> Result<bool> {
        let c = &self.config;
        // What is read from the disk is foreseen by the CPU's way through the layers.
        let offload = self.store.offload().filter(|_| !self.store.is_paged());
        let Some(offload) = offload else {
            return Ok(false);
        };
        let wanted = wanted(runs);
        let ask = Ask {
            config: c,
            weights: &self.weights,
            x: &s.x,
            cos: &s.cos,
            sin: &s.sin,
            wanted: &wanted,
            threads: self.machine.pool.batch_threads(),
        };
        let mut help = Help {
            model: self,
            input: &mut s.input,
            scratch: &mut s.experts,
            observer,
            read: 0,
            failed: None,
        };
        match offload.pass(&ask, runs, &mut help, &mut s.back) {
            None => return Ok(false),
            Some(false) => return Err(help.failed.unwrap_or(Error::Interrupted)),
            Some(true) => s.weight_bytes += help.read,
        }
        let chosen = s.back.choices().chunks_exact(s.all.len() * c.n_used);
        for (i, choices) in chosen.enumerate() {
            observer.routed(i, &[], choices);
        }
        take_in(c, runs, &s.back);
        s.logits.clear();
        s.logits.extend_from_slice(s.back.logits());
        Ok(true)
    }

    /// `x += o · attend(q · norm(x), …)` for some tokens of the pass. Those before them have been through here.
    fn attention(
        &self,
        i: usize,
        layer: &Layer,
        runs: &mut [Run<'_>],
        part: Range<usize>,
        s: &mut Scratch,
        observer: &mut dyn Observer,
    ) {
        let (c, m) = (&self.config, &self.machine);
        let (d, d_q, d_kv) = (c.d_model, c.n_head * c.d_head, c.n_kv * c.d_head);
        let n = part.len();
        s.q.resize(n * d_q, 0.0);
        s.k.resize(n * d_kv, 0.0);
        s.v.resize(n * d_kv, 0.0);
        s.heads.resize(n * d_q, 0.0);
        s.o.resize(n * d, 0.0);
        let x = &mut s.x[part.start * d..part.end * d];
        let h = &mut s.h[..n * d];
        let all = &s.all[..n];
        self.norm(x, &layer.attn_norm, h);
        observer.input(Site::Attention { layer: i }, h);
        s.input.prepare(m, h, d, [&layer.q, &layer.k, &layer.v]);
        let job = |w, y| Job {
            w,
            x: &s.input,
            pick: all,
            y,
        };
        self.multiply([
            job(&layer.q, &mut s.q),
            job(&layer.k, &mut s.k),
            job(&layer.v, &mut s.v),
        ]);
        let half = c.n_rot / 2;
        let angles = part.start * half..part.end * half;
        self.rotate(&s.cos[angles.clone()], &s.sin[angles], &mut s.q, &mut s.k);
        write(runs, i, part.clone(), &s.k, &s.v);
        attend(m, c, i, &places(runs, part), &mut s.q, &mut s.heads);
        observer.input(Site::AttentionOutput { layer: i }, &s.heads);
        s.input.prepare(m, &s.heads, d_q, [&layer.o]);
        let (w, x_o) = (&layer.o, &s.input);
        let (pick, y) = (all, s.o.as_mut_slice());
        self.multiply([Job { w, x: x_o, pick, y }]);
        self.add(&s.o, x);
    }

    /// `x += Σ weight · expert(norm(x))` over the experts that the router chose.
    fn feed_forward(
        &self,
        i: usize,
        layer: &Layer,
        s: &mut Scratch,
        observer: &mut dyn Observer,
    ) -> Result<()> {
        let (c, m, d) = (&self.config, &self.machine, self.config.d_model);
        observer.residual(i, &s.x);
        self.norm(&s.x, &layer.ffn_norm, &mut s.h);
        let used = layer.experts.iter().flat_map(|e| [&e.gate, &e.up]);
        let used = used.chain(&layer.router);
        s.input.prepare(m, &s.h, d, used);
        choose(m, c, layer, &s.input, &s.all, &mut s.experts);
        if self.store.is_paged() {
            let counts = s.experts.counts(c);
            self.store.want(i, &counts, s.all.len());
            self.look_ahead(i + 1, s);
        }
        let see = |expert, rows: &[f32]| observer.input(Site::Down { layer: i, expert }, rows);
        let (input, x) = (&s.input, &mut s.x);
        s.weight_bytes += experts(m, c, &self.store, i, input, x, &mut s.experts, see)?;
        observer.routed(i, &s.h, &s.experts.choices);
        Ok(())
    }

    /// Says which experts layer `next` will probably want: all, if there are many tokens; else those that its router would
    /// choose if the layer before it added nothing more, which is right nine times of ten.
    fn look_ahead(&self, next: usize, s: &mut Scratch) {
        let (c, m) = (&self.config, &self.machine);
        let Some(layer) = self.weights.layers.get(next) else {
            return;
        };
        let Some(router) = layer.router.as_ref().filter(|_| s.all.len() < c.n_expert) else {
            return self.store.foresee(next, 0..c.n_expert, false);
        };
        let n_tok = s.all.len();
        let (h, input) = (&mut s.ahead_h, &mut s.ahead_input);
        h.resize(n_tok * c.d_model, 0.0);
        self.norm(&s.x, &layer.ffn_norm, h);
        input.prepare(m, h, c.d_model, [router]);
        let mut choices = vec![Choice::default(); n_tok * c.n_used];
        let logits = &mut s.ahead_logits;
        router::choose(m, router, input, &s.all, logits, &mut choices);
        let experts = choices.iter().map(|c| c.expert as usize);
        self.store.foresee(next, experts, true);
    }

    /// Embedding rows and RoPE angles of every token.
    fn embed(&self, runs: &[Run<'_>], s: &mut Scratch) {
        let (d, half) = (self.config.d_model, self.config.n_rot / 2);
        s.cos.resize(s.all.len() * half, 0.0);
        s.sin.resize(s.all.len() * half, 0.0);
        let mut t = 0;
        for run in runs {
            for (i, id) in run.tokens.iter().enumerate() {
                self.weights
                    .embed
                    .decode_row(*id as usize, &mut s.x[t * d..][..d]);
                let at = t * half..(t + 1) * half;
                self.rope
                    .angles(run.kv.len() + i, &mut s.cos[at.clone()], &mut s.sin[at]);
                t += 1;
            }
        }
    }

    /// RoPE on every head of `q (n, n_head · d_head)` and `k (n, n_kv · d_head)`; `cos`, `sin`: `(n, n_rot / 2)`.
    fn rotate(&self, cos: &[f32], sin: &[f32], q: &mut [f32], k: &mut [f32]) {
        let (c, kernels) = (&self.config, self.machine.kernels);
        let half = c.n_rot / 2;
        for (x, heads) in [(q, c.n_head), (k, c.n_kv)] {
            self.machine.pool.rows(x, heads * c.d_head, |t, row| {
                for head in row.chunks_exact_mut(c.d_head) {
                    kernels.rope(
                        &mut head[..c.n_rot],
                        &cos[t * half..][..half],
                        &sin[t * half..][..half],
                    );
                }
            });
        }
    }

    /// RMSNorm of every row: `x`, `y`: `(n_tok, d_model)`.
    pub(super) fn norm(&self, x: &[f32], w: &[f32], y: &mut [f32]) {
        let d = self.config.d_model;
        self.machine.pool.rows(y, d, |t, y| {
            self.machine
                .kernels
                .rms_norm(&x[t * d..][..d], w, self.config.rms_eps, y);
        });
    }

    /// `y += x`: `(n_tok, d_model)`.
    fn add(&self, x: &[f32], y: &mut [f32]) {
        let d = self.config.d_model;
        self.machine
            .pool
            .rows(y, d, |t, y| self.machine.kernels.add(&x[t * d..][..d], y));
    }

    /// Final norm and output head of the rows that are wanted.
    fn head(&self, runs: &[Run<'_>], s: &mut Scratch, observer: &mut dyn Observer) {
        let (c, w, m) = (&self.config, &self.weights, &self.machine);
        let wanted = wanted(runs);
        s.logits.resize(wanted.len() * c.n_vocab, 0.0);
        if wanted.is_empty() {
            return;
        }
        self.norm(&s.x, &w.norm, &mut s.h);
        for t in &wanted {
            observer.input(Site::Head, &s.h[*t as usize * c.d_model..][..c.d_model]);
        }
        s.input.prepare(m, &s.h, c.d_model, [&w.head]);
        self.multiply([Job {
            w: &w.head,
            x: &s.input,
            pick: &wanted,
            y: &mut s.logits,
        }]);
    }
}

/// What the CPU does in a pass on a device.
struct Help<'a> {
    model: &'a Model,
    input: &'a mut Input,
    scratch: &'a mut ExpertScratch,
    observer: &'a mut dyn Observer,
    /// Bytes of weights that it has read.
    read: u64,
    /// Why it ended the pass.
    failed: Option<Error>,
}

impl Host for Help<'_> {
    fn experts(&mut self, layer: usize, h: &[f32], absent: &[Absent], out: &mut [f32]) -> bool {
        let Model {
            config,
            weights,
            store,
            machine,
            ..
        } = self.model;
        let its = |absent: &Absent| &weights.layers[layer].experts[absent.expert];
        let used = absent.iter().flat_map(|a| [&its(a).gate, &its(a).up]);
        self.input.prepare(machine, h, config.d_model, used);
        let (input, scratch) = (&*self.input, &mut *self.scratch);
        match some_experts(machine, config, store, layer, input, absent, scratch, out) {
            Ok(read) => self.read += read,
            Err(e) => self.failed = Some(e),
        }
        self.failed.is_none()
    }

    fn passed(&mut self, layer: usize) -> ControlFlow<()> {
        self.observer.passed(layer)
    }
}

/// The tokens of a pass whose logits are wanted.
fn wanted(runs: &[Run<'_>]) -> Vec<u32> {
    let mut wanted = Vec::new();
    let mut t = 0;
    for run in runs {
        let end = t + run.tokens.len();
        match run.want {
            Want::All => wanted.extend(t as u32..end as u32),
            Want::Last if end > t => wanted.push(end as u32 - 1),
            Want::Last | Want::Nothing => {}
        }
        t = end;
    }
    wanted
}

/// Puts the keys and values of some tokens of the pass, each `(n_part, d_kv)`, into the caches.
fn write(runs: &mut [Run<'_>], layer: usize, part: Range<usize>, k: &[f32], v: &[f32]) {
    let d_kv = k.len() / part.len();
    let mut first = 0;
    for run in runs {
        let end = first + run.tokens.len();
        for t in part.start.max(first)..part.end.min(end) {
            let row = (t - part.start) * d_kv..(t - part.start + 1) * d_kv;
            let pos = run.kv.len() + t - first;
            run.kv.write(layer, pos, &k[row.clone()], &v[row]);
        }
        first = end;
    }
}

/// Cache and position of some tokens of the pass.
fn places<'a>(runs: &'a [Run<'_>], part: Range<usize>) -> Vec<Place<'a>> {
    let all = runs.iter().flat_map(|run| {
        (0..run.tokens.len()).map(|i| Place {
            kv: run.kv,
            pos: run.kv.len() + i,
        })
    });
    all.skip(part.start).take(part.len()).collect()
}
