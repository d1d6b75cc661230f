//! From a file's named tensors to the model's typed views. Both expert layouts end here.

use super::Config;
use super::linear::Weight;
use crate::error::{Error, Result};
use crate::gguf::{Gguf, Tensor};
use crate::quant::Format;
use std::collections::HashSet;
use std::sync::Arc;

/// All weights of a model. The large ones stay in the mapped file, unless a budget has them read into memory ([`super::store`]);
/// norms are copied (a few KiB).
pub struct Weights {
    /// Token embedding, `(n_vocab, d_model)`.
    pub embed: Weight,
    /// The layers.
    pub layers: Vec<Layer>,
    /// Final norm, `(d_model)`.
    pub norm: Vec<f32>,
    /// Output head, `(n_vocab, d_model)`; the embedding where the file ties them.
    pub head: Weight,
    /// RoPE frequency divisors, `(n_rot / 2)`, in files that have them.
    pub rope_factors: Option<Vec<f32>>,
}

/// One transformer layer.
pub struct Layer {
    /// `(d_model)`
    pub attn_norm: Vec<f32>,
    /// Query projection, `(n_head · d_head, d_model)`.
    pub q: Weight,
    /// Key projection, `(n_kv · d_head, d_model)`.
    pub k: Weight,
    /// Value projection, `(n_kv · d_head, d_model)`.
    pub v: Weight,
    /// Attention output, `(d_model, n_head · d_head)`.
    pub o: Weight,
    /// `(d_model)`
    pub ffn_norm: Vec<f32>,
    /// `(n_expert, d_model)`; none in a dense model.
    pub router: Option<Weight>,
    /// `(n_expert)`; one in a dense model.
    pub experts: Vec<Arc<Expert>>,
}

/// One expert's feed-forward network: `down · (silu(gate · x) · up · x)`.
pub struct Expert {
    /// `(d_ff, d_model)`
    pub gate: Weight,
    /// `(d_ff, d_model)`
    pub up: Weight,
    /// `(d_model, d_ff)`
    pub down: Weight,
}

impl Expert {
    /// Its matrices.
    pub fn weights(&self) -> [&Weight; 3] {
        [&self.gate, &self.up, &self.down]
    }

    /// Bytes of its three matrices.
    pub fn bytes(&self) -> u64 {
        self.weights().iter().map(|w| w.bytes.len() as u64).sum()
    }
}

impl Weights {
    /// Finds and checks every tensor; reads none but the norms.
    ///
    /// # Errors
    /// If a tensor is missing, has another shape than the metadata says, has a format that octet does
    /// not compute with, or is one that this model has no use for (leaving it out would change the answer).
    pub fn load(file: &Gguf, config: &Config) -> Result<Weights> {
        let mut finder = Finder {
            file,
            used: HashSet::new(),
        };
        let c = config;
        let (d, q, kv) = (c.d_model, c.n_head * c.d_head, c.n_kv * c.d_head);
        let embed = finder.matrix("token_embd.weight", d, c.n_vocab)?;
        let head = match file.tensor("output.weight") {
            Some(_) => finder.matrix("output.weight", d, c.n_vocab)?,
            None => embed.clone(),
        };
        let norm = finder.vector("output_norm.weight", d)?;
        let rope_factors = match file.tensor("rope_freqs.weight") {
            Some(_) => Some(finder.vector("rope_freqs.weight", c.n_rot / 2)?),
            None => None,
        };
        // Angles are divided by them.
        let bad = rope_factors
            .iter()
            .flatten()
            .find(|f| !(f.is_finite() && **f > 0.0));
        if let Some(bad) = bad {
            return Err(Error::invalid(
                file.path(),
                "tensor rope_freqs.weight",
                "positive numbers",
                bad,
            ));
        }
        let mut layers = Vec::new();
        for i in 0..c.n_layer {
            let name = |part: &str| format!("blk.{i}.{part}.weight");
            layers.push(Layer {
                attn_norm: finder.vector(&name("attn_norm"), d)?,
                q: finder.matrix(&name("attn_q"), d, q)?,
                k: finder.matrix(&name("attn_k"), d, kv)?,
                v: finder.matrix(&name("attn_v"), d, kv)?,
                o: finder.matrix(&name("attn_output"), q, d)?,
                ffn_norm: finder.vector(&name("ffn_norm"), d)?,
                router: match c.routed {
                    true => Some(finder.matrix(&name("ffn_gate_inp"), d, c.n_expert)?),
                    false => None,
                },
                experts: finder.experts(i, c)?,
            });
        }
        finder.nothing_left()?;
        Ok(Weights {
            embed,
            layers,
            norm,
            head,
            rope_factors,
        })
    }

    /// Bytes that every token reads: all but the experts, and one row of the embedding for the table.
    pub fn dense_bytes(&self) -> u64 {
        let dense = self.dense().into_iter().skip(1);
        dense.map(|w| w.bytes.len() as u64).sum()
    }

    /// All matrices but the experts': the embedding first, the head (which may be the same) last.
    pub fn dense(&self) -> Vec<&Weight> {
        let layers = self.layers.iter().flat_map(|l| {
            let attention = [&l.q, &l.k, &l.v, &l.o];
            attention.into_iter().chain(&l.router)
        });
        let first = [&self.embed].into_iter();
        first.chain(layers).chain([&self.head]).collect()
    }

    /// The same, to be put elsewhere.
    pub(super) fn dense_mut(&mut self) -> Vec<&mut Weight> {
        let layers = self.layers.iter_mut().flat_map(|l| {
            let attention = [&mut l.q, &mut l.k, &mut l.v, &mut l.o];
            attention.into_iter().chain(&mut l.router)
        });
        let first = [&mut self.embed].into_iter();
        first.chain(layers).chain([&mut self.head]).collect()
    }
}

/// Looks tensors up and remembers which were used.
struct Finder<'a> {
    file: &'a Gguf,
    used: HashSet<String>,
}

impl Finder<'_> {
    /// A tensor with the given shape, innermost dimension first.
    fn tensor(&mut self, name: &str, shape: &[usize]) -> Result<(&Tensor, Format)> {
        let path = self.file.path();
        let tensor = self
            .file
            .tensor(name)
            .ok_or_else(|| Error::missing(path, format!("tensor {name}"), ""))?;
        // Trailing dimensions of 1 may be written or left out.
        let trim = |s: &[u64]| {
            s.iter()
                .rposition(|n| *n != 1)
                .map_or(Vec::new(), |i| s[..=i].to_vec())
        };
        let want: Vec<u64> = shape.iter().map(|n| *n as u64).collect();
        if trim(&tensor.shape) != trim(&want) {
            return Err(Error::invalid(
                path,
                format!("the shape of tensor {name}"),
                format!("{want:?}"),
                format!("{:?}", tensor.shape),
            ));
        }
        let format = tensor.format().ok_or_else(|| {
            let known: Vec<_> = Format::ALL.iter().map(|f| f.name()).collect();
            Error::unsupported(
                path,
                format!("the type of tensor {name}"),
                known.join(" "),
                tensor.type_name(),
            )
        })?;
        self.used.insert(name.to_string());
        Ok((tensor, format))
    }

    fn matrix(&mut self, name: &str, n_in: usize, n_out: usize) -> Result<Weight> {
        let file = self.file;
        let (tensor, format) = self.tensor(name, &[n_in, n_out])?;
        Ok(Weight {
            name: name.into(),
            format,
            n_in,
            n_out,
            bytes: file.bytes(tensor),
        })
    }

    fn vector(&mut self, name: &str, n: usize) -> Result<Vec<f32>> {
        let file = self.file;
        let (tensor, format) = self.tensor(name, &[n])?;
        let mut out = vec![0.0; n];
        format.decode(&file.bytes(tensor), &mut out);
        Ok(out)
    }

    /// The experts of layer `i`: fused (`ffn_gate_exps`: all in one tensor, the layout since early
    /// 2024), one tensor each (`ffn_gate.0` …, before that), or the one of a dense model (`ffn_gate`).
    fn experts(&mut self, i: usize, c: &Config) -> Result<Vec<Arc<Expert>>> {
        // Any of the three will do, so that a missing one is called by its name.
        let fused = ["gate", "up", "down"].iter().any(|part| {
            let name = format!("blk.{i}.ffn_{part}_exps.weight");
            self.file.tensor(&name).is_some()
        });
        let parts = [
            ("gate", c.d_model, c.d_ff),
            ("up", c.d_model, c.d_ff),
            ("down", c.d_ff, c.d_model),
        ];
        let mut columns = Vec::new();
        for (part, n_in, n_out) in parts {
            columns.push(if !c.routed {
                vec![self.matrix(&format!("blk.{i}.ffn_{part}.weight"), n_in, n_out)?]
            } else if fused {
                self.slices(
                    &format!("blk.{i}.ffn_{part}_exps.weight"),
                    n_in,
                    n_out,
                    c.n_expert,
                )?
            } else {
                (0..c.n_expert)
                    .map(|e| self.matrix(&format!("blk.{i}.ffn_{part}.{e}.weight"), n_in, n_out))
                    .collect::<Result<_>>()?
            });
        }
        let [gates, ups, downs] = columns.try_into().ok().expect("three parts");
        Ok(gates
            .into_iter()
            .zip(ups)
            .zip(downs)
            .map(|((gate, up), down)| Arc::new(Expert { gate, up, down }))
            .collect())
    }

    /// A fused tensor, one matrix per expert.
    fn slices(&mut self, name: &str, n_in: usize, n_out: usize, n: usize) -> Result<Vec<Weight>> {
        let file = self.file;
        let (tensor, format) = self.tensor(name, &[n_in, n_out, n])?;
        let bytes = file.bytes(tensor);
        let size = bytes.len() / n;
        let name = Arc::from(name);
        Ok((0..n)
            .map(|e| Weight {
                name: Arc::clone(&name),
                format,
                n_in,
                n_out,
                bytes: bytes.slice(e * size..(e + 1) * size),
            })
            .collect())
    }

    fn nothing_left(&self) -> Result<()> {
        match self
            .file
            .tensors()
            .iter()
            .find(|t| !self.used.contains(&t.name))
        {
            None => Ok(()),
            Some(t) => Err(Error::unsupported(
                self.file.path(),
                "a tensor of another kind of model",
                "only tensors of Mixtral, Mistral and Llama",
                &t.name,
            )),
        }
    }
}
