//! Looking on while tokens go through the layers: what the matrices are multiplied with, and which
//! experts the router chose.

use super::router::Choice;
use std::ops::ControlFlow;

/// Matrices that share an input. A layer's router, gate and up have their own call,
/// [`Observer::routed`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Site {
    /// `attn_q`, `attn_k` and `attn_v` of a layer.
    Attention {
        /// Which one.
        layer: usize,
    },
    /// `attn_output` of a layer.
    AttentionOutput {
        /// Which one.
        layer: usize,
    },
    /// `ffn_down` of one expert of a layer (of the only one in a dense model). Not shown where a GPU computes the expert.
    Down {
        /// Which layer.
        layer: usize,
        /// Which expert.
        expert: usize,
    },
    /// The output head.
    Head,
}

/// Somebody who looks on ([`super::Model::observe`]). What is shown are the same bits on every CPU tier and for
/// every number of threads; the rows of a site come in the order of the tokens.
pub trait Observer: Send {
    /// Whether it looks at rows. Who does not may be shown none of them, neither as inputs nor with the choices: then a pass may
    /// stay on a GPU, where nobody sees them.
    fn sees_rows(&self) -> bool {
        true
    }

    /// Rows `(n, n_in)`, floats as they were before any quantization, go through the matrices of `site`.
    fn input(&mut self, _site: Site, _rows: &[f32]) {}

    /// Rows `(n_tok, d_model)` are the residual stream as the feed-forward part of `layer` finds it.
    fn residual(&mut self, _layer: usize, _rows: &[f32]) {}

    /// Rows `(n_tok, d_model)` go through the router of `layer`, and row `t` through gate and up of the
    /// experts `choices[t]`; `choices`: `(n_tok, n_used)`, by rank. In a dense model they are all of expert 0.
    fn routed(&mut self, _layer: usize, _rows: &[f32], _choices: &[Choice]) {}

    /// All tokens of the pass have gone through `layer`. `Break` ends the pass: the caches stay as they were.
    fn passed(&mut self, _layer: usize) -> ControlFlow<()> {
        ControlFlow::Continue(())
    }
}

/// Nobody looks on.
impl Observer for () {
    fn sees_rows(&self) -> bool {
        false
    }
}
