//! What of a model fits into a budget of memory, and how fast it can run then. Arithmetic alone: what the machine
//! can do is measured elsewhere.

use super::kv::KV_BLOCK;
use super::weights::Weights;
use super::{Config, Kv, KvType};
use crate::gguf::Gguf;
use crate::quant::recipe::{Chooser, Recipe, Traits, fitting};

/// What a model takes: bytes, and products of weights and activations.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Parts {
    /// Layers.
    pub n_layer: usize,
    /// Experts in a layer.
    pub n_expert: usize,
    /// Experts that a token takes.
    pub n_used: usize,
    /// Bytes of everything but experts.
    pub dense: u64,
    /// Bytes of all experts.
    pub experts: u64,
    /// Bytes of the largest expert: what a slot must hold.
    pub slot: u64,
    /// Bytes of keys and values of a token.
    pub kv_token: u64,
    /// Bytes that every token reads besides its experts.
    pub dense_read: u64,
    /// Products that a token of a prompt takes.
    pub macs: u64,
}

/// Elements of a float, in bytes.
const F32: u64 = 4;

impl Parts {
    /// What this model takes, with such a cache.
    pub fn of(file: &Gguf, config: &Config, weights: &Weights, kv: KvType) -> Parts {
        let all: u64 = file.tensors().iter().map(|t| t.bytes).sum();
        let each = || weights.layers.iter().flat_map(|l| &l.experts);
        let experts = each().map(|e| e.bytes()).sum();
        Parts {
            n_layer: config.n_layer,
            n_expert: config.n_expert,
            n_used: config.n_used,
            dense: all - experts,
            experts,
            slot: each().map(|e| e.bytes()).max().unwrap_or(0),
            kv_token: (Kv::new(config, kv, 0).block_bytes() / KV_BLOCK) as u64,
            dense_read: weights.dense_bytes(),
            macs: config.macs(),
        }
    }

    /// The same model with its experts in another type.
    pub fn with(&self, config: &Config, recipe: Recipe) -> Parts {
        let traits = Traits {
            n_layer: config.n_layer,
            n_head: config.n_head,
            n_kv: config.n_kv,
            n_expert: config.n_expert,
            tied: false,
            n_attn_v: config.n_layer,
            importance: false,
        };
        let mut chooser = Chooser::new(recipe, traits, None);
        let (d, d_ff) = (config.d_model, config.d_ff);
        let mut layer = |i: usize| -> u64 {
            [("down", d_ff, d), ("gate", d, d_ff), ("up", d, d_ff)]
                .map(|(part, n_in, n_out)| {
                    let name = format!("blk.{i}.ffn_{part}_exps.weight");
                    let format = fitting(chooser.next(&name, n_in as u64), n_in as u64);
                    (format.row_bytes(n_in) * n_out) as u64
                })
                .iter()
                .sum()
        };
        let slots: Vec<u64> = (0..config.n_layer).map(&mut layer).collect();
        Parts {
            experts: slots.iter().sum::<u64>() * config.n_expert as u64,
            slot: slots.into_iter().max().unwrap_or(0),
            ..*self
        }
    }

    /// All experts of all layers.
    pub fn n_slots(&self) -> usize {
        self.n_layer * self.n_expert
    }

    /// Bytes of the experts that a token takes, in all layers.
    pub fn used(&self) -> f64 {
        self.experts as f64 * self.n_used as f64 / self.n_expert as f64
    }

    /// Where a budget goes, for `ctx` tokens of context and `scratch` bytes for computing.
    ///
    /// # Errors
    /// The smallest budget that will do, if this one will not.
    pub fn fit(&self, budget: u64, ctx: usize, scratch: u64) -> Result<Fit, u64> {
        let kv = self.kv_token * (ctx.next_multiple_of(KV_BLOCK)) as u64;
        let fixed = self.dense + kv + scratch;
        // A layer's experts may not make way for the next one's while it computes.
        let least = self.n_slots().min(2 * self.n_used);
        let minimum = fixed + self.slot * least as u64;
        if budget < minimum {
            return Err(minimum);
        }
        let slots = match fixed + self.experts <= budget {
            true => self.n_slots(),
            false => ((budget - fixed) / self.slot.max(1)) as usize,
        };
        Ok(Fit { kv, scratch, slots })
    }

    /// What a machine of these speeds does with that many slots. `hits`: the share of choices that find their expert in
    /// memory; `recall`: the share of the others that are known a layer ahead.
    pub fn predict(
        &self,
        speeds: &Speeds,
        slots: usize,
        hits: f64,
        recall: f64,
        prompt: usize,
    ) -> Prediction {
        let decode = (self.dense_read as f64 + self.used()) / speeds.weights;
        let read = (1.0 - hits) * self.used();
        let prefill = prompt as f64 * self.macs as f64 / speeds.macs;
        // A whole prompt comes by every expert.
        let away = (self.n_slots() - slots) as f64 / self.n_slots() as f64;
        let file = (self.dense + self.experts) as f64;
        Prediction {
            decode: Phase::new(decode, read, speeds.disk, recall),
            prefill: Phase::new(prefill, away * self.experts as f64, speeds.disk, 1.0),
            first: Phase::new(prefill, file, speeds.disk, 1.0),
        }
    }
}

/// Bytes of the buffers of [`super::Model::forward`] for `n_tok` tokens at once.
pub fn scratch(c: &Config, n_tok: usize) -> u64 {
    /// Bytes of 256 int8 activations with their scales and sums.
    const CHUNK: usize = size_of::<crate::quant::act::Chunk>();
    let (d, q, kv) = (c.d_model, c.n_head * c.d_head, c.n_kv * c.d_head);
    // Residual stream, its norm, attention's output; queries and heads; keys and values; each rank's result.
    let floats = 3 * d + 2 * q + 2 * kv + c.n_rot + c.n_used * d;
    // At worst one expert has all tokens: gate, up, down.
    let expert = 2 * c.d_ff + d;
    let acts = (d.max(q).div_ceil(256) + c.d_ff.div_ceil(256)) * CHUNK;
    n_tok as u64 * (F32 * (floats + expert) as u64 + acts as u64) + F32 * c.n_vocab as u64
}

/// Where a budget goes besides everything but experts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fit {
    /// Bytes of keys and values.
    pub kv: u64,
    /// Bytes for computing.
    pub scratch: u64,
    /// Experts that are kept in memory.
    pub slots: usize,
}

/// What a machine can do, a second.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Speeds {
    /// Bytes from disk.
    pub disk: f64,
    /// Bytes of weights that decode works through in memory.
    pub weights: f64,
    /// Products of a long prompt.
    pub macs: f64,
}

/// What is to be expected.
#[derive(Clone, Debug, PartialEq)]
pub struct Prediction {
    /// A token of an answer.
    pub decode: Phase,
    /// The prompt, with the slots full.
    pub prefill: Phase,
    /// The prompt when nothing is in memory yet.
    pub first: Phase,
}

/// Computing and reading that go on at once.
#[derive(Clone, Debug, PartialEq)]
pub struct Phase {
    /// Seconds for both.
    pub seconds: f64,
    /// Seconds of computing.
    pub compute: f64,
    /// Bytes from disk.
    pub bytes: f64,
    /// Seconds of reading them.
    pub disk: f64,
}

impl Phase {
    /// `overlap`: the share of the shorter one that goes on behind the longer one.
    fn new(compute: f64, bytes: f64, speed: f64, overlap: f64) -> Phase {
        let disk = bytes / speed;
        Phase {
            seconds: compute.max(disk) + (1.0 - overlap) * compute.min(disk),
            compute,
            bytes,
            disk,
        }
    }

    /// Whether it waits for the disk.
    pub fn waits(&self) -> bool {
        self.disk > self.compute
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 2 layers of 4 experts of 100 bytes, 2 for each token.
    const PARTS: Parts = Parts {
        n_layer: 2,
        n_expert: 4,
        n_used: 2,
        dense: 50,
        experts: 800,
        slot: 100,
        kv_token: 2,
        dense_read: 40,
        macs: 1000,
    };

    #[test]
    fn slots_are_what_is_left() {
        // 64 tokens of context are 128 bytes, 63 as well.
        let fit = |budget| PARTS.fit(budget, 63, 22);
        let slots = |budget: u64| fit(budget).unwrap().slots;
        assert_eq!(fit(599), Err(600), "dense 50, KV 128, scratch 22, 4 slots");
        assert_eq!((slots(600), slots(699), slots(700)), (4, 4, 5));
        assert_eq!((slots(999), slots(1000), slots(u64::MAX)), (7, 8, 8));
        assert_eq!(fit(600).unwrap().kv, 128);
        // Experts of different sizes: slots are as large as the largest, but all of them may fit as they are.
        let uneven = Parts {
            experts: 600,
            ..PARTS
        };
        assert_eq!(uneven.fit(800, 64, 22).unwrap().slots, 8);
        assert_eq!(uneven.fit(799, 64, 22).unwrap().slots, 5);
    }

    #[test]
    fn what_overlaps_takes_the_longer_of_two() {
        let speeds = Speeds {
            disk: 100.0,
            weights: 440.0,
            macs: 2000.0,
        };
        // A token reads 40 + 4 · 100 bytes in a second of computing, of which half are on the disk: 2 seconds.
        let half = PARTS.predict(&speeds, 4, 0.5, 0.75, 8);
        assert_eq!((half.decode.compute, half.decode.disk), (1.0, 2.0));
        assert_eq!(half.decode.seconds, 2.0 + 0.25 * 1.0);
        assert!(half.decode.waits());
        // 8 tokens: 4 seconds of products, and half of the experts: 4 seconds of reading, behind the products.
        assert_eq!((half.prefill.compute, half.prefill.disk), (4.0, 4.0));
        assert_eq!(half.prefill.seconds, 4.0);
        assert_eq!(half.first.seconds, 8.5, "the whole file");
        // All in memory: nothing is read.
        let all = PARTS.predict(&speeds, 8, 1.0, 0.0, 8);
        assert_eq!((all.decode.seconds, all.decode.bytes), (1.0, 0.0));
        assert!(!all.prefill.waits() && all.first.waits());
    }

    /// Mixtral 8x7B: 24.6 GiB at Q4_0, 26.5 at Q4_K_M, of which experts are 96%.
    #[test]
    fn types_of_mixtral() {
        let config = Config {
            n_layer: 32,
            d_model: 4096,
            n_head: 32,
            n_kv: 8,
            d_head: 128,
            d_ff: 14336,
            n_expert: 8,
            n_used: 2,
            routed: true,
            n_vocab: 32000,
            n_ctx: 32768,
            rms_eps: 1e-5,
            rope_base: 1e6,
            n_rot: 128,
        };
        let weights = 3 * 4096 * 14336u64;
        let q4_0 = PARTS.with(&config, Recipe::Q4_0);
        assert_eq!(q4_0.slot, weights / 32 * 18);
        assert_eq!(q4_0.experts, 256 * q4_0.slot);
        // Downs of 16 of 32 layers in Q6_K, 210 bytes for 256 weights.
        let q4_k = PARTS.with(&config, Recipe::Q4_K_M);
        let (small, large) = (weights / 256 * 144, weights / 256 * (2 * 144 + 210) / 3);
        assert_eq!(q4_k.slot, large);
        assert_eq!(q4_k.experts, 8 * 16 * (small + large));
        assert_eq!(
            Kv::new(&config, KvType::F16, 0).block_bytes() / KV_BLOCK,
            128 << 10
        );
        let mib = scratch(&config, 512) >> 20;
        assert!((120..200).contains(&mib), "{mib}");
    }
}
