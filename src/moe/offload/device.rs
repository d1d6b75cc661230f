//! What a device is: slots for weights, and what it computes with them. Experts or matrices of one layer, while the CPU does the
//! others; or whole passes.

use crate::moe::Config;
use crate::moe::linear::{Input, Weight};
use crate::moe::router::Choice;
use crate::moe::weights::{Expert, Weights};
use half::f16;
use std::ops::ControlFlow;

/// Why a device did not do something.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// It has no memory for it. What was asked for was not done; everything else is as before.
    Full,
    /// It cannot be used any more; the driver's word.
    Lost(String),
}

/// What an expert on the device is to do.
pub struct Share<'a> {
    /// Its slot.
    pub slot: usize,
    /// The expert as the file has it: its formats and shapes.
    pub expert: &'a Expert,
    /// The tokens of the input that go through it.
    pub pick: &'a [u32],
}

/// A matrix on the device that is to be multiplied with some tokens.
pub struct Product<'a> {
    /// Its slot.
    pub slot: usize,
    /// The matrix as the file has it.
    pub weight: &'a Weight,
    /// The tokens of the input.
    pub pick: &'a [u32],
}

/// How fast something goes, by what was done of late.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Pace {
    done: f64,
    seconds: f64,
}

impl Pace {
    /// So much was done in so long. What is older counts less once there is `much`.
    pub fn add(&mut self, done: f64, seconds: f64, much: f64) {
        self.done += done;
        self.seconds += seconds;
        if self.done > much {
            (self.done, self.seconds) = (self.done / 2.0, self.seconds / 2.0);
        }
    }

    /// What is done in a second, if at least `enough` was.
    pub fn rate(&self, enough: f64) -> Option<f64> {
        (self.done >= enough && self.seconds > 0.0).then(|| self.done / self.seconds)
    }
}

/// Something that has memory for weights and computes beside the CPU.
///
/// Slots are numbers that it gives out. All calls come from one thread at a time.
pub trait Device: Send {
    /// For people.
    fn name(&self) -> String;

    /// Bytes of memory that are free.
    ///
    /// # Errors
    /// If it is lost.
    fn free(&mut self) -> Result<u64, Fault>;

    /// Bytes that it takes beside the slots, for passes of usual length of a model with such experts.
    fn scratch(&self, d_model: usize, d_ff: usize) -> u64;

    /// How fast bytes of weights have come.
    fn link(&self) -> Pace;

    /// Bytes of a slot for an expert (gate, up, down) or another matrix; nothing if it has no kernels for it.
    fn bytes(&self, weights: &[&Weight]) -> Option<u64>;

    /// A new slot.
    ///
    /// # Errors
    /// [`Fault::Full`] if there is no memory for it; if it is lost.
    fn make(&mut self, bytes: u64) -> Result<usize, Fault>;

    /// Takes a slot that is not being filled back.
    fn unmake(&mut self, slot: usize);

    /// Begins to copy an expert or a matrix into a slot that is large enough, and returns. Nobody uses the slot meanwhile.
    ///
    /// # Errors
    /// If it is lost.
    fn fill(&mut self, slot: usize, weights: &[&Weight]) -> Result<(), Fault>;

    /// The slots whose copies have ended since the last call; `wait`: after all have.
    ///
    /// # Errors
    /// If it is lost.
    fn filled(&mut self, wait: bool) -> Result<Vec<usize>, Fault>;

    /// Begins to run some experts of a layer, which are in their slots, and returns; `input` is not needed any more then.
    ///
    /// # Errors
    /// [`Fault::Full`] if there is no memory for the rows; if it is lost.
    fn start(&mut self, input: &Input, shares: &[Share<'_>]) -> Result<(), Fault>;

    /// Begins to multiply matrices, which are in their slots, with tokens of the same input, and returns; `input` is not needed
    /// any more then.
    ///
    /// # Errors
    /// As for [`Device::start`].
    fn multiply(&mut self, input: &Input, products: &[Product<'_>]) -> Result<(), Fault>;

    /// Waits for what was begun: share by share, or product by product, a row for each token in their order.
    ///
    /// # Errors
    /// If it is lost.
    fn finish(&mut self, out: &mut [f32]) -> Result<(), Fault>;

    /// Bytes that it takes besides to run passes of usual length through all layers of such a model; nothing if it cannot.
    fn whole(&self, config: &Config) -> Option<u64>;

    /// Writes into a slot, and returns when `bytes` are not needed any more; work that is begun later finds them there.
    ///
    /// # Errors
    /// If it is lost.
    fn put(&mut self, slot: usize, at: u64, bytes: &[u8]) -> Result<(), Fault>;

    /// Runs tokens through all layers. False if the host has ended that.
    ///
    /// # Errors
    /// [`Fault::Full`] if there is no memory for the rows; if it is lost. Nothing but what the pass itself would have written
    /// is changed then.
    fn pass(
        &mut self,
        pass: &Pass<'_>,
        host: &mut dyn Host,
        back: &mut Back,
    ) -> Result<bool, Fault>;
}

/// Tokens on their way through all layers.
pub struct Pass<'a> {
    /// The model's shape …
    pub config: &'a Config,
    /// … and weights, as the file has them.
    pub weights: &'a Weights,
    /// Where each layer's are.
    pub layers: &'a [Slots],
    /// The slot of the head.
    pub head: usize,
    /// The slot of norms and routers as floats: [`small_at`].
    pub small: usize,
    /// The residual stream, `(n_tok, d_model)`.
    pub x: &'a [f32],
    /// RoPE's angles, `(n_tok, n_rot / 2)` …
    pub cos: &'a [f32],
    /// … each.
    pub sin: &'a [f32],
    /// Where each token stands.
    pub seats: &'a [Seat],
    /// Slots of the caches' blocks, those of a sequence one behind the other.
    pub blocks: &'a [usize],
    /// Tokens whose logits are wanted.
    pub wanted: &'a [u32],
    /// Slots that experts which are not there may pass through, one after the other …
    pub ring: &'a [usize],
    /// … if they have so many tokens: fewer are sooner computed by the host.
    pub stream_from: usize,
}

/// The slots of a layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Slots {
    /// Query, key and value projections, attention output.
    pub attention: [usize; 4],
    /// Experts; nothing for one that is not there.
    pub experts: Vec<Option<usize>>,
}

/// Where a token stands in a pass. A block of the cache holds, for each layer, keys `(n_kv, d_head, 64)` and values `(n_kv, 64,
/// d_head)` as f16.
#[derive(Clone, Copy, Debug, PartialEq, Eq, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub struct Seat {
    /// Where its sequence's blocks begin in [`Pass::blocks`].
    pub first: u32,
    /// Its position.
    pub pos: u32,
}

/// Where a layer's norms of attention and of the feed-forward part, `(d_model)`, and its router, `(n_expert, d_model)`, lie among
/// the floats of norms and routers; behind those of the last layer, the final norm.
pub fn small_at(config: &Config, layer: usize) -> [usize; 3] {
    let d = config.d_model;
    let first = layer * (2 + config.n_expert) * d;
    [first, first + d, first + 2 * d]
}

/// Tokens of an expert that the device has not.
pub struct Absent {
    /// Which.
    pub expert: usize,
    /// The tokens.
    pub pick: Vec<u32>,
}

/// Who does what a device cannot, while tokens are there.
pub trait Host {
    /// Runs experts of a layer: `h (n_tok, d_model)`, normalised; `out`: a row for each token of each of `absent`, in their
    /// order. False if it cannot, which ends the pass.
    fn experts(&mut self, layer: usize, h: &[f32], absent: &[Absent], out: &mut [f32]) -> bool;

    /// All tokens have gone through `layer`; called for each, in their order. `Break` ends the pass.
    fn passed(&mut self, layer: usize) -> ControlFlow<()>;
}

/// What comes back from a pass.
#[derive(Default)]
pub struct Back {
    words: Vec<f32>,
    /// Words of keys and values, and of choices.
    parts: [usize; 2],
}

impl Back {
    /// Makes room for what comes back from `n_tok` tokens and `wanted` rows of logits. Returns it as a device writes it:
    /// [`Back::fresh`], [`Back::choices`], [`Back::logits`].
    pub fn room(&mut self, c: &Config, n_tok: usize, wanted: usize) -> &mut [f32] {
        // Two f16 a word, keys and values; two words a choice.
        self.parts = [
            c.n_layer * n_tok * c.n_kv * c.d_head,
            2 * c.n_layer * n_tok * c.n_used,
        ];
        let all = self.parts.iter().sum::<usize>() + wanted * c.n_vocab;
        self.words.resize(all, 0.0);
        &mut self.words
    }

    /// The tokens' keys and values, `(n_layer, 2, n_tok, n_kv · d_head)`.
    pub fn fresh(&self) -> &[f16] {
        bytemuck::cast_slice(&self.words[..self.parts[0]])
    }

    /// What the router chose, `(n_layer, n_tok, n_used)`.
    pub fn choices(&self) -> &[Choice] {
        bytemuck::cast_slice(&self.words[self.parts[0]..][..self.parts[1]])
    }

    /// `(wanted, n_vocab)`
    pub fn logits(&self) -> &[f32] {
        &self.words[self.parts[0] + self.parts[1]..]
    }
}

/// Most numbers that a product brings back: the logits of 512 tokens. What all tokens of a long text are to be
/// scored by would take the place of experts.
pub(super) const MOST_OUT: usize = 1 << 24;
