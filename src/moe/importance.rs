//! How much an error in each column of each matrix matters: the mean square of what the column is
//! multiplied with while the model reads a text.

use super::Config;
use super::observe::{Observer, Site};
use super::router::Choice;
use crate::gguf::Imatrix;
use crate::gguf::imatrix::Importance;

/// Sums of squares of some rows' columns. In f64 and in the order of the tokens, so that they
/// do not depend on batches.
#[derive(Clone)]
struct Sums {
    /// `(n_in)`
    squares: Vec<f64>,
    rows: u64,
}

impl Sums {
    fn new(n_in: usize) -> Sums {
        Sums {
            squares: vec![0.0; n_in],
            rows: 0,
        }
    }

    fn add(&mut self, row: &[f32]) {
        for (sum, x) in self.squares.iter_mut().zip(row) {
            *sum += f64::from(*x) * f64::from(*x);
        }
        self.rows += 1;
    }

    fn add_all(&mut self, rows: &[f32]) {
        for row in rows.chunks_exact(self.squares.len()) {
            self.add(row);
        }
    }
}

/// The inputs of a layer's matrices.
struct Layer {
    attention: Sums,
    attention_output: Sums,
    router: Sums,
    /// Of each expert: gate and up, down.
    experts: Vec<(Sums, Sums)>,
}

/// An [`Observer`] that collects importance.
pub struct Collector {
    n_used: usize,
    routed: bool,
    layers: Vec<Layer>,
    head: Sums,
}

impl Observer for Collector {
    fn input(&mut self, site: Site, rows: &[f32]) {
        let sums = match site {
            Site::Attention { layer } => &mut self.layers[layer].attention,
            Site::AttentionOutput { layer } => &mut self.layers[layer].attention_output,
            Site::Down { layer, expert } => &mut self.layers[layer].experts[expert].1,
            Site::Head => &mut self.head,
        };
        sums.add_all(rows);
    }

    fn routed(&mut self, layer: usize, rows: &[f32], choices: &[Choice]) {
        let layer = &mut self.layers[layer];
        layer.router.add_all(rows);
        let rows = rows.chunks_exact(layer.router.squares.len());
        for (row, choices) in rows.zip(choices.chunks_exact(self.n_used)) {
            for choice in choices {
                layer.experts[choice.expert as usize].0.add(row);
            }
        }
    }
}

impl Collector {
    /// A collector that has seen nothing.
    pub fn new(config: &Config) -> Collector {
        let (d, heads) = (config.d_model, config.n_head * config.d_head);
        let layer = || Layer {
            attention: Sums::new(d),
            attention_output: Sums::new(heads),
            router: Sums::new(d),
            experts: vec![(Sums::new(d), Sums::new(config.d_ff)); config.n_expert],
        };
        Collector {
            n_used: config.n_used,
            routed: config.routed,
            layers: (0..config.n_layer).map(|_| layer()).collect(),
            head: Sums::new(d),
        }
    }

    /// How many tokens each expert of `layer` had: `(n_expert)`.
    pub fn tokens(&self, layer: usize) -> impl Iterator<Item = u64> {
        self.layers[layer].experts.iter().map(|(sums, _)| sums.rows)
    }

    /// What was collected, under the names that matrices have in files with fused experts. The output head is
    /// there only if `head` says so.
    pub fn imatrix(&self, head: bool) -> Imatrix {
        let mut found = Imatrix::default();
        let mut put = |name: String, sums: &[&Sums]| {
            let squares = sums.iter().flat_map(|s| &s.squares);
            let importance = Importance {
                sums: squares.map(|x| *x as f32).collect(),
                counts: sums.iter().map(|s| s.rows).collect(),
            };
            found.entries.insert(name, importance);
        };
        for (i, layer) in self.layers.iter().enumerate() {
            let name = |part: &str| format!("blk.{i}.{part}.weight");
            for part in ["attn_q", "attn_k", "attn_v"] {
                put(name(part), &[&layer.attention]);
            }
            put(name("attn_output"), &[&layer.attention_output]);
            let inputs: Vec<_> = layer.experts.iter().map(|(x, _)| x).collect();
            let inner: Vec<_> = layer.experts.iter().map(|(_, x)| x).collect();
            let fused = if self.routed { "_exps" } else { "" };
            put(name(&format!("ffn_gate{fused}")), &inputs);
            put(name(&format!("ffn_up{fused}")), &inputs);
            put(name(&format!("ffn_down{fused}")), &inner);
            if self.routed {
                put(name("ffn_gate_inp"), &[&layer.router]);
            }
        }
        if head {
            put("output.weight".to_string(), &[&self.head]);
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(n_expert: usize, n_used: usize) -> Config {
        Config {
            n_layer: 1,
            d_model: 2,
            n_head: 1,
            n_kv: 1,
            d_head: 2,
            d_ff: 1,
            n_expert,
            n_used,
            routed: n_expert > 1,
            n_vocab: 3,
            n_ctx: 8,
            rms_eps: 1e-5,
            rope_base: 1e4,
            n_rot: 2,
        }
    }

    fn chosen(experts: &[u32]) -> Vec<Choice> {
        let weight = 0.5;
        let choices = experts.iter().map(|&expert| Choice { expert, weight });
        choices.collect()
    }

    #[test]
    fn a_row_counts_for_the_experts_that_it_goes_to() {
        let mut seen = Collector::new(&config(3, 2));
        seen.routed(0, &[1.0, 2.0, 3.0, 4.0], &chosen(&[0, 2, 2, 0]));
        seen.routed(0, &[5.0, 6.0], &chosen(&[2, 0]));
        seen.input(
            Site::Down {
                layer: 0,
                expert: 2,
            },
            &[2.0, 3.0],
        );
        let found = seen.imatrix(false).entries;
        let gate = &found["blk.0.ffn_gate_exps.weight"];
        assert_eq!(gate.sums, [35.0, 56.0, 0.0, 0.0, 35.0, 56.0]);
        assert_eq!(gate.counts, [3, 0, 3]);
        assert_eq!(gate.columns()[2..4], [1.0, 1.0], "unseen");
        assert_eq!(found["blk.0.ffn_up_exps.weight"], *gate);
        assert_eq!(found["blk.0.ffn_gate_inp.weight"].sums, [35.0, 56.0]);
        assert_eq!(found["blk.0.ffn_down_exps.weight"].sums, [0.0, 0.0, 13.0]);
        assert!(seen.tokens(0).eq([3, 0, 3]));
    }

    #[test]
    fn a_dense_model_has_one_expert_and_no_router() {
        let mut seen = Collector::new(&config(1, 1));
        seen.routed(0, &[1.0, 2.0], &chosen(&[0]));
        seen.input(Site::Head, &[3.0, 4.0]);
        let found = seen.imatrix(true).entries;
        assert_eq!(found["blk.0.ffn_gate.weight"].sums, [1.0, 4.0]);
        assert_eq!(found["output.weight"].sums, [9.0, 16.0]);
        assert!(
            found
                .keys()
                .all(|k| !k.contains("exps") && !k.contains("inp"))
        );
    }
}
