//! Looking on while a model reads a text, for a [`Profile`].

use super::{FORMAT, Profile, VERSION};
use crate::gguf::{Gguf, hex};
use crate::moe::linear::Input;
use crate::moe::observe::Observer;
use crate::moe::router::{Choice, choose};
use crate::moe::{Model, Routes};

/// An [`Observer`] that makes a profile of one sequence after the other.
pub struct Recorder<'m> {
    model: &'m Model,
    routes: Routes,
    layers: Vec<Layer>,
    /// `(n_tok, d_model)`
    h: Vec<f32>,
    input: Input,
    /// `(n_tok, n_expert)`
    logits: Vec<f32>,
    /// `0..n_tok`
    all: Vec<u32>,
}

/// What is known of a layer.
#[derive(Clone, Default)]
struct Layer {
    /// The choices of the last token, `(n_used)`; empty where a sequence begins.
    last: Vec<Choice>,
    /// Choices that the layer before expects of the tokens that come, `(n_tok, n_used)`; empty in the first layer.
    expected: Vec<Choice>,
    reuse: Hits,
    recall: Hits,
}

/// How many of some choices were among others.
#[derive(Clone, Default)]
struct Hits {
    hits: u64,
    of: u64,
}

impl Hits {
    fn count(&mut self, choices: &[Choice], among: &[Choice]) {
        let among = |c: &&Choice| among.iter().any(|other| other.expert == c.expert);
        self.hits += choices.iter().filter(among).count() as u64;
        self.of += choices.len() as u64;
    }

    fn share(&self) -> Option<f64> {
        (self.of > 0).then(|| self.hits as f64 / self.of as f64)
    }
}

impl<'m> Recorder<'m> {
    /// A recorder that has seen nothing.
    pub fn new(model: &'m Model) -> Recorder<'m> {
        Recorder {
            model,
            routes: Routes::new(&model.config),
            layers: vec![Layer::default(); model.config.n_layer],
            h: Vec::new(),
            input: Input::default(),
            logits: Vec::new(),
            all: Vec::new(),
        }
    }

    /// The next token begins a sequence: no token is before it.
    pub fn begin(&mut self) {
        self.layers.iter_mut().for_each(|l| l.last.clear());
    }

    /// What was seen so far.
    pub fn profile(&self, file: &Gguf) -> Profile {
        let c = &self.model.config;
        let counts: Vec<_> = self.routes.layers().map(<[u64]>::to_vec).collect();
        let choices: u64 = counts.iter().take(1).flatten().sum();
        let layers = self.layers.iter();
        Profile {
            format: FORMAT.to_string(),
            version: VERSION,
            model: hex(&file.identity()),
            name: file_name(file),
            n_layer: c.n_layer,
            n_expert: c.n_expert,
            n_used: c.n_used,
            tokens: choices / c.n_used as u64,
            counts,
            reuse: (layers.clone().map(|l| l.reuse.share().unwrap_or(0.0))).collect(),
            recall: layers.map(|l| l.recall.share()).collect(),
        }
    }
}

impl Observer for Recorder<'_> {
    /// Asks the next layer's router what it would choose now.
    fn residual(&mut self, layer: usize, rows: &[f32]) {
        let (model, c) = (self.model, &self.model.config);
        let Some(next) = model.weights.layers.get(layer + 1) else {
            return;
        };
        let Some(router) = &next.router else { return };
        let n_tok = rows.len() / c.d_model;
        self.h.resize(rows.len(), 0.0);
        model.norm(rows, &next.ffn_norm, &mut self.h);
        let machine = model.machine();
        self.input.prepare(machine, &self.h, c.d_model, [router]);
        self.all.clear();
        self.all.extend(0..n_tok as u32);
        let expected = &mut self.layers[layer + 1].expected;
        expected.resize(n_tok * c.n_used, Choice::default());
        let (input, logits) = (&self.input, &mut self.logits);
        choose(machine, router, input, &self.all, logits, expected);
    }

    fn routed(&mut self, layer: usize, rows: &[f32], choices: &[Choice]) {
        self.routes.routed(layer, rows, choices);
        let n_used = self.model.config.n_used;
        let layer = &mut self.layers[layer];
        for token in choices.chunks_exact(n_used) {
            if !layer.last.is_empty() {
                layer.reuse.count(token, &layer.last);
            }
            layer.last.clear();
            layer.last.extend_from_slice(token);
        }
        let expected = layer.expected.chunks_exact(n_used);
        for (token, expected) in choices.chunks_exact(n_used).zip(expected) {
            layer.recall.count(token, expected);
        }
    }
}

/// A model's name without its folder.
fn file_name(file: &Gguf) -> String {
    let name = file.path().file_name().unwrap_or_default();
    name.to_string_lossy().into_owned()
}
