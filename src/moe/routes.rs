//! What the router did: how often each layer chose each expert.

use super::Config;
use super::observe::Observer;
use super::router::Choice;

/// An [`Observer`] that counts choices.
#[derive(Clone, Debug)]
pub struct Routes {
    n_expert: usize,
    /// `(n_layer, n_expert)`
    counts: Vec<u64>,
}

impl Observer for Routes {
    fn sees_rows(&self) -> bool {
        false
    }

    fn routed(&mut self, layer: usize, _: &[f32], choices: &[Choice]) {
        let counts = &mut self.counts[layer * self.n_expert..][..self.n_expert];
        for choice in choices {
            counts[choice.expert as usize] += 1;
        }
    }
}

impl Routes {
    /// Nothing was chosen yet.
    pub fn new(config: &Config) -> Routes {
        Routes {
            n_expert: config.n_expert,
            counts: vec![0; config.n_layer * config.n_expert],
        }
    }

    /// Forgets what was counted.
    pub fn clear(&mut self) {
        self.counts.fill(0);
    }

    /// The counts of each layer, `(n_expert)`.
    pub fn layers(&self) -> impl ExactSizeIterator<Item = &[u64]> {
        self.counts.chunks_exact(self.n_expert)
    }
}
