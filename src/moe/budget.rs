//! What of a model fits into a budget of memory, and how fast it can run then. Arithmetic alone: what the machine
//! can do is measured elsewhere.

use super::kv::KV_BLOCK;
use super::weights::Weights;
use super::{Config, Kv, KvType, Store};
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
    /// Bytes of the program itself, with what nobody counts.
    pub program: u64,
    /// Bytes of all experts.
    pub experts: u64,
    /// Bytes of the largest expert: what a slot must hold.
    pub slot: u64,
    /// Slots that are needed at least.
    pub least_slots: u64,
    /// Bytes of keys and values of a token.
    pub kv_token: u64,
    /// Bytes that every token reads besides its experts.
    pub dense_read: u64,
    /// Products that a token of a prompt takes.
    pub macs: u64,
}

impl Parts {
    /// What this model takes, with such a cache, in a program that has `program` bytes without it.
    pub fn of(config: &Config, weights: &Weights, kv: KvType, program: u64) -> Parts {
        let store = Store::budget(0, weights, config);
        let experts = weights.layers.iter().flat_map(|l| &l.experts);
        Parts {
            n_layer: config.n_layer,
            n_expert: config.n_expert,
            n_used: config.n_used,
            dense: store.dense,
            program: program + store.least() - store.dense - store.least_slots * store.slot,
            experts: experts.map(|e| e.bytes()).sum(),
            slot: store.slot,
            least_slots: store.least_slots,
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
        let kv = self.kv_token * ctx.next_multiple_of(KV_BLOCK) as u64;
        let fixed = self.dense + self.program + kv + scratch;
        let all = self.n_slots() as u64;
        let minimum = fixed + self.slot * self.least_slots.min(all);
        if budget < minimum {
            return Err(minimum);
        }
        let slots = ((budget - fixed) / self.slot.max(1)).min(all) as usize;
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
        dense: 40,
        program: 10,
        experts: 800,
        slot: 100,
        least_slots: 4,
        kv_token: 2,
        dense_read: 40,
        macs: 1000,
    };

    #[test]
    fn slots_are_what_is_left() {
        // 64 tokens of context are 128 bytes, 63 as well.
        let fit = |budget| PARTS.fit(budget, 63, 22);
        let slots = |budget: u64| fit(budget).unwrap().slots;
        assert_eq!(
            fit(599),
            Err(600),
            "dense 40, program 10, KV 128, scratch 22, 4 slots"
        );
        assert_eq!((slots(600), slots(699), slots(700)), (4, 4, 5));
        assert_eq!((slots(999), slots(1000), slots(u64::MAX)), (7, 8, 8));
        assert_eq!(fit(600).unwrap().kv, 128);
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
        assert_eq!(half.first.seconds, 8.4, "the whole file");
        // All in memory: nothing is read.
        let all = PARTS.predict(&speeds, 8, 1.0, 0.0, 8);
        assert_eq!((all.decode.seconds, all.decode.bytes), (1.0, 0.0));
        assert!(!all.prefill.waits() && all.first.waits());
    }

    /// Mixtral 8x7B: 24.6 GiB at Q4_0, 26.5 at Q4_K_M, of which experts are 96%.
    #[test]
    fn types_of_mixtral() {
        let config = Config::MIXTRAL_8X7B;
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
    }
}
