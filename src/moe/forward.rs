//! The spine: a batch of tokens through all layers.

use super::attention::{Place, Rope, attend};
use super::experts::{ExpertScratch, experts};
use super::kv::Kv;
use super::linear::{Input, Job, matmul};
use super::observe::{Observer, Site};
use super::weights::Weights;
use super::{Config, Machine};
use crate::error::{Error, Result};
use crate::gguf::Gguf;

/// A model that is ready to run.
pub struct Model {
    /// Its shape.
    pub config: Config,
    /// Its weights.
    pub weights: Weights,
    rope: Rope,
    machine: Machine,
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

/// Buffers of [`Model::forward`], reused from call to call.
#[derive(Default)]
pub struct Scratch {
    /// Residual stream, `(n_tok, d_model)`.
    x: Vec<f32>,
    /// Normalised input of a block, `(n_tok, d_model)`.
    h: Vec<f32>,
    /// `(n_tok, n_head · d_head)`
    q: Vec<f32>,
    /// `(n_tok, n_kv · d_head)`
    k: Vec<f32>,
    v: Vec<f32>,
    /// `(n_tok, n_head · d_head)`
    heads: Vec<f32>,
    /// `(n_tok, d_model)`
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
    /// Bytes of weights that the calls so far have read.
    pub weight_bytes: u64,
}

impl Scratch {
    /// The logits of the last [`Model::forward`], `(rows wanted, n_vocab)`.
    pub fn logits(&self) -> &[f32] {
        &self.logits
    }
}

impl Model {
    /// Opens a model file's weights.
    ///
    /// # Errors
    /// See [`Config::read`] and [`Weights::load`].
    pub fn open(file: &Gguf, machine: Machine) -> Result<Model> {
        let config = Config::read(file)?;
        let weights = Weights::load(file, &config)?;
        let rope = Rope::new(&config, weights.rope_factors.as_deref());
        Ok(Model {
            config,
            weights,
            rope,
            machine,
        })
    }

    /// The first layer alone, with as many experts as a token takes, as a model of its own: what it does soon tells
    /// what all of them will do.
    pub fn first_layer(mut self) -> Model {
        let n = self.config.n_used;
        (self.config.n_layer, self.config.n_expert) = (1, n);
        self.weights.layers.truncate(1);
        for layer in &mut self.weights.layers {
            layer.experts.truncate(n);
            layer.router = layer.router.as_ref().map(|router| router.first_rows(n));
        }
        self
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
    /// the vocabulary; no cache has changed then.
    pub fn forward<'s>(&self, runs: &mut [Run<'_>], scratch: &'s mut Scratch) -> Result<&'s [f32]> {
        self.observe(runs, scratch, &mut ())
    }

    /// [`Model::forward`] while `observer` looks on.
    ///
    /// # Errors
    /// As for [`Model::forward`].
    pub fn observe<'s>(
        &self,
        runs: &mut [Run<'_>],
        scratch: &'s mut Scratch,
        observer: &mut dyn Observer,
    ) -> Result<&'s [f32]> {
        for run in runs.iter() {
            self.check_tokens(run.tokens)?;
        }
        for run in runs.iter_mut() {
            run.kv.reserve(run.tokens.len())?;
        }
        self.machine
            .pool
            .enter(|| self.layers(runs, scratch, observer));
        Ok(&scratch.logits)
    }

    fn layers(&self, runs: &mut [Run<'_>], s: &mut Scratch, observer: &mut dyn Observer) {
        let (c, w, m) = (&self.config, &self.weights, &self.machine);
        let n_tok: usize = runs.iter().map(|r| r.tokens.len()).sum();
        let (d, d_q, d_kv) = (c.d_model, c.n_head * c.d_head, c.n_kv * c.d_head);
        s.x.resize(n_tok * d, 0.0);
        s.h.resize(n_tok * d, 0.0);
        s.q.resize(n_tok * d_q, 0.0);
        s.k.resize(n_tok * d_kv, 0.0);
        s.v.resize(n_tok * d_kv, 0.0);
        s.heads.resize(n_tok * d_q, 0.0);
        s.o.resize(n_tok * d, 0.0);
        s.all.clear();
        s.all.extend(0..n_tok as u32);
        self.embed(runs, s);
        s.weight_bytes += w.dense_bytes();

        for (i, layer) in w.layers.iter().enumerate() {
            // Attention: x += o · attend(q · norm(x), …)
            self.norm(&s.x, &layer.attn_norm, &mut s.h);
            observer.input(Site::Attention { layer: i }, &s.h);
            s.input.prepare(m, &s.h, d, [&layer.q, &layer.k, &layer.v]);
            matmul(
                m,
                &mut [
                    Job {
                        w: &layer.q,
                        x: &s.input,
                        pick: &s.all,
                        y: &mut s.q,
                    },
                    Job {
                        w: &layer.k,
                        x: &s.input,
                        pick: &s.all,
                        y: &mut s.k,
                    },
                    Job {
                        w: &layer.v,
                        x: &s.input,
                        pick: &s.all,
                        y: &mut s.v,
                    },
                ],
            );
            self.rotate(s);
            store(runs, i, d_kv, &s.k, &s.v);
            let places: Vec<Place<'_>> = places(runs);
            attend(m, c, i, &places, &mut s.q, &mut s.heads);
            observer.input(Site::AttentionOutput { layer: i }, &s.heads);
            s.input.prepare(m, &s.heads, d_q, [&layer.o]);
            matmul(
                m,
                &mut [Job {
                    w: &layer.o,
                    x: &s.input,
                    pick: &s.all,
                    y: &mut s.o,
                }],
            );
            self.add(&s.o, &mut s.x);
            observer.residual(i, &s.x);

            // Feed-forward: x += Σ weight · expert(norm(x)) over the experts that the router chose
            self.norm(&s.x, &layer.ffn_norm, &mut s.h);
            let used = layer
                .experts
                .iter()
                .flat_map(|e| [&e.gate, &e.up])
                .chain(&layer.router);
            s.input.prepare(m, &s.h, d, used);
            let see = |expert, rows: &[f32]| observer.input(Site::Down { layer: i, expert }, rows);
            s.weight_bytes += experts(m, c, layer, &s.input, &s.all, &mut s.x, &mut s.experts, see);
            observer.routed(i, &s.h, &s.experts.choices);
        }
        for run in runs.iter_mut() {
            run.kv.advance(run.tokens.len());
        }
        self.head(runs, s, observer);
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

    /// RoPE on every head of `q` and `k`.
    fn rotate(&self, s: &mut Scratch) {
        let (c, k) = (&self.config, self.machine.kernels);
        let half = c.n_rot / 2;
        let (cos, sin) = (&s.cos, &s.sin);
        for (x, heads) in [(&mut s.q, c.n_head), (&mut s.k, c.n_kv)] {
            let mut rows: Vec<_> = x.chunks_exact_mut(heads * c.d_head).collect();
            self.machine.pool.each(&mut rows, |t, row| {
                for head in row.chunks_exact_mut(c.d_head) {
                    k.rope(
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
        let mut rows: Vec<_> = y.chunks_exact_mut(d).collect();
        self.machine.pool.each(&mut rows, |t, y| {
            self.machine
                .kernels
                .rms_norm(&x[t * d..][..d], w, self.config.rms_eps, y);
        });
    }

    /// `y += x`: `(n_tok, d_model)`.
    fn add(&self, x: &[f32], y: &mut [f32]) {
        let d = self.config.d_model;
        let mut rows: Vec<_> = y.chunks_exact_mut(d).collect();
        self.machine.pool.each(&mut rows, |t, y| {
            self.machine.kernels.add(&x[t * d..][..d], y)
        });
    }

    /// Final norm and output head of the rows that are wanted.
    fn head(&self, runs: &[Run<'_>], s: &mut Scratch, observer: &mut dyn Observer) {
        let (c, w, m) = (&self.config, &self.weights, &self.machine);
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
        s.logits.resize(wanted.len() * c.n_vocab, 0.0);
        if wanted.is_empty() {
            return;
        }
        self.norm(&s.x, &w.norm, &mut s.h);
        for t in &wanted {
            observer.input(Site::Head, &s.h[*t as usize * c.d_model..][..c.d_model]);
        }
        s.input.prepare(m, &s.h, c.d_model, [&w.head]);
        matmul(
            m,
            &mut [Job {
                w: &w.head,
                x: &s.input,
                pick: &wanted,
                y: &mut s.logits,
            }],
        );
    }
}

/// Puts the batch's keys and values, each `(n_tok, d_kv)`, into the caches.
fn store(runs: &mut [Run<'_>], layer: usize, d_kv: usize, k: &[f32], v: &[f32]) {
    let mut rows = k.chunks_exact(d_kv).zip(v.chunks_exact(d_kv));
    for run in runs {
        let first = run.kv.len();
        for i in 0..run.tokens.len() {
            let (k, v) = rows.next().expect("one row per token");
            run.kv.write(layer, first + i, k, v);
        }
    }
}

/// Every token's cache and position.
fn places<'a>(runs: &'a [Run<'_>]) -> Vec<Place<'a>> {
    runs.iter()
        .flat_map(|run| {
            (0..run.tokens.len()).map(|i| Place {
                kv: run.kv,
                pos: run.kv.len() + i,
            })
        })
        .collect()
}
