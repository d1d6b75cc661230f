//! Whole passes with CUDA's kernels: which run in which order from the embedding to the logits.
//!
//! **Few tokens** (an answer's, mostly) are never looked at by the host on their way: the router's kernel writes the table of
//! rows from the addresses of the experts that are there. Nothing in a launch depends on the pass, only what the buffers hold, so
//! launches are recorded once and replayed. Where all experts are there, one record is the whole pass. Else each layer is one, and some are launched
//! ahead: a layer that lacks an expert stops those behind it (`stopped` in offload.cu), the host computes what is missing, and it
//! goes on from there. How many go ahead depends on how many layers in a row have lately had everything.
//!
//! **Many tokens** (a prompt's) are gathered by expert, for which the host reads what the router chose, once for each layer.

mod few;
mod many;

use super::driver::Arg::Long;
use super::driver::{CHOSEN, Driver, Launch, THREADS, float, int};
use super::gpu::{ALIGN, For, Gpu, Row, parts, slot_bytes};
use super::kernels::{Activations, FEW, Stop, Tokens, dense, gemm, quantize};
use super::{Back, Fault, Host, Pass, Seat, small_at};
use crate::moe::Config;
use crate::moe::kv::KV_BLOCK;
use crate::moe::linear::Weight;
use crate::moe::router::Choice;
use crate::moe::weights::Expert;
use crate::quant::act::{ActKind, CHUNK, Chunk};
use many::Stream;
use std::sync::Arc;

/// Bytes of scores that a kernel of attention writes at most: more tokens than those have room for go one group after the other.
const SCORES: usize = 64 << 20;
/// Blocks of the cache that a record is good for at least; then twice as many, and so on.
const LEAST_BLOCKS: usize = 16;
/// Tokens of a pass of usual length.
const USUAL: usize = 2048;
/// Most blocks in the second dimension of a grid.
const MOST_Y: usize = 65535;

/// What lasts from pass to pass.
#[derive(Default)]
pub(super) struct Lasting {
    /// The addresses that [`For::Experts`] holds, and how often buffers had moved then.
    experts: (Vec<u64>, u64),
    /// Of passes of few tokens.
    few: few::Lasting,
    /// The thread that brings experts of many tokens through the device.
    stream: Option<Stream>,
}

/// Where everything is in a pass.
struct Layout {
    n_tok: usize,
    wanted: usize,
    /// Positions that a row of scores has room for, and tokens that have room for scores.
    room: usize,
    part: usize,
    stop: u64,
    x: u64,
    cos: u64,
    sin: u64,
    seats: u64,
    picks: u64,
    list: u64,
    normed: u64,
    q: u64,
    k: u64,
    v: u64,
    heads: u64,
    added: u64,
    q8: u64,
    q8k: u64,
    scores: u64,
    rows: u64,
    experts: u64,
    out: u64,
    fresh: u64,
    choices: u64,
    logits: u64,
}

impl Layout {
    /// Activations for `w` of so many tokens.
    fn acts(&self, w: &Weight, n_tok: usize) -> Activations {
        let at = match w.format.act() {
            ActKind::Q8 => self.q8,
            _ => self.q8k,
        };
        Activations { at, n_tok }
    }
}

/// The experts that a layer's kernels are for: all on the device are of the formats of the first that could be there.
fn pattern<'p>(pass: &Pass<'p>, layer: usize) -> Option<&'p Expert> {
    let experts = &pass.weights.layers[layer].experts;
    let mut experts = experts.iter().map(|e| &**e);
    experts.find(|e| slot_bytes(&e.weights()).is_some())
}

/// Bytes of the buffers of this file.
pub(super) fn whole_scratch(c: &Config) -> u64 {
    let (d, d_q, d_kv) = (c.d_model, c.n_head * c.d_head, c.n_kv * c.d_head);
    let rows = 4 * (3 * d + 2 * d_q + 2 * d_kv + c.n_rot + c.n_used * d);
    let acts = 2 * d.max(d_q).div_ceil(CHUNK) * size_of::<Chunk>();
    let back = c.n_layer * (4 * d_kv + 8 * c.n_used);
    (SCORES + USUAL * (rows + acts + back)) as u64
}

impl<D: Driver> Gpu<D> {
    /// Runs tokens through all layers; false if the host has ended it.
    pub(super) fn through_layers(
        &mut self,
        pass: &Pass<'_>,
        host: &mut dyn Host,
        back: &mut Back,
    ) -> Result<bool, Fault> {
        let c = pass.config;
        let n_tok = pass.seats.len();
        let words = back.room(c, n_tok, pass.wanted.len());
        let lay = self.arrange(pass, 4 * words.len())?;
        self.know_experts(pass, &lay)?;
        let goes_on = match n_tok < FEW {
            true => self.few(pass, &lay, host)?,
            false => self.many(pass, &lay, host)?,
        };
        if goes_on {
            self.driver
                .read(lay.fresh, bytemuck::cast_slice_mut(words))?;
        }
        Ok(goes_on)
    }

    /// Finds a place for everything and brings what comes with the pass.
    fn arrange(&mut self, pass: &Pass<'_>, back: usize) -> Result<Layout, Fault> {
        let c = pass.config;
        let (n_tok, wanted) = (pass.seats.len(), pass.wanted.len());
        let (d, d_q, d_kv) = (c.d_model, c.n_head * c.d_head, c.n_kv * c.d_head);
        let most = pass
            .seats
            .iter()
            .map(|seat| seat.pos as usize / KV_BLOCK + 1);
        let most = most.max().unwrap_or(1);
        let most = match n_tok < FEW {
            true => most.next_power_of_two().max(LEAST_BLOCKS),
            false => most,
        };
        let room = most * KV_BLOCK;
        let part = (SCORES / (4 * c.n_head * room)).min(MOST_Y / c.n_kv);
        let part = part.clamp(1, n_tok);

        // The list of blocks comes last: it is the only part whose length changes from pass to pass.
        let list: Vec<u64> = pass.blocks.iter().map(|slot| self.at(*slot)).collect();
        let parts: [&[u8]; 7] = [
            &[0; 4],
            bytemuck::cast_slice(pass.x),
            bytemuck::cast_slice(pass.cos),
            bytemuck::cast_slice(pass.sin),
            bytemuck::cast_slice::<Seat, u8>(pass.seats),
            bytemuck::cast_slice(pass.wanted),
            bytemuck::cast_slice(&list),
        ];
        let mut host = std::mem::take(&mut self.host);
        host.clear();
        let starts = parts.map(|bytes| {
            host.resize(host.len().next_multiple_of(ALIGN), 0);
            host.extend_from_slice(bytes);
            (host.len() - bytes.len()) as u64
        });

        let driver = Arc::clone(&self.driver);
        let acts = |k: usize| n_tok * k.div_ceil(CHUNK) * size_of::<Chunk>();
        let rows = n_tok * c.n_used;
        let b = &mut self.buffers;
        let mut room_for = |what, bytes| b.room(&*driver, what, bytes);
        let ask = room_for(For::Ask, host.len())?;
        let [stop, x, cos, sin, seats, picks, list] = starts.map(|start| ask + start);
        let fresh = room_for(For::Back, back)?;
        let choices = fresh + (4 * c.n_layer * n_tok * d_kv) as u64;
        let lay = Layout {
            n_tok,
            wanted,
            room,
            part,
            stop,
            x,
            cos,
            sin,
            seats,
            picks,
            list,
            normed: room_for(For::Normed, 4 * n_tok * d)?,
            q: room_for(For::Q, 4 * n_tok * d_q)?,
            k: room_for(For::K, 4 * n_tok * d_kv)?,
            v: room_for(For::V, 4 * n_tok * d_kv)?,
            heads: room_for(For::Heads, 4 * n_tok * d_q)?,
            added: room_for(For::Added, 4 * n_tok * d)?,
            q8: room_for(For::Q8, acts(d.max(d_q)))?,
            q8k: room_for(For::Q8K, acts(d.max(d_q)))?,
            scores: room_for(For::Scores, 4 * part * c.n_head * room)?,
            rows: room_for(For::Rows, rows * size_of::<Row>())?,
            experts: room_for(For::Experts, 24 * c.n_layer * c.n_expert)?,
            out: room_for(For::Out, 4 * rows * d)?,
            fresh,
            choices,
            logits: choices + (8 * c.n_layer * rows) as u64,
        };
        self.room_inside(rows, c.d_ff)?;
        let written = self.driver.write(ask, &host);
        self.host = host;
        written?;
        Ok(lay)
    }

    /// Has the device know where experts are.
    fn know_experts(&mut self, pass: &Pass<'_>, lay: &Layout) -> Result<(), Fault> {
        let mut addresses = Vec::with_capacity(3 * pass.config.n_layer * pass.config.n_expert);
        for (slots, layer) in pass.layers.iter().zip(&pass.weights.layers) {
            for (slot, expert) in slots.experts.iter().zip(&layer.experts) {
                match slot {
                    None => addresses.extend([0; 3]),
                    Some(slot) => {
                        let (starts, _) = parts(&expert.weights());
                        addresses.extend(starts.iter().map(|start| self.at(*slot) + start));
                    }
                }
            }
        }
        let now = (addresses, self.buffers.moves);
        if self.lasting.experts != now {
            self.driver
                .write(lay.experts, bytemuck::cast_slice(&now.0))?;
            self.lasting.experts = now;
        }
        Ok(())
    }

    /// `h = norm(x + add) · w` of `n` tokens, those of `picks` if that is not 0, and activations of it for `weights`. `small`: where
    /// `w` is among the small weights.
    fn norm<'w>(
        &self,
        pass: &Pass<'_>,
        lay: &Layout,
        add: u64,
        picks: u64,
        n: usize,
        small: usize,
        weights: impl IntoIterator<Item = &'w Weight>,
        stop: u64,
    ) -> Result<(), Fault> {
        let w = self.at(pass.small) + 4 * small as u64;
        let (mut q8, mut q8k) = (0, 0);
        for weight in weights {
            match weight.format.act() {
                ActKind::Q8 => q8 = lay.q8,
                _ => q8k = lay.q8k,
            }
        }
        let (d, eps) = (int(pass.config.d_model), float(pass.config.rms_eps));
        let args = [
            Long(lay.x),
            Long(add),
            Long(picks),
            Long(w),
            eps,
            Long(lay.normed),
            Long(q8),
            Long(q8k),
            d,
            Long(stop),
        ];
        // SAFETY: the arguments are those of `offload.cu`; `arrange` made the buffers large enough for all tokens, and what was
        // picked is among them.
        unsafe { self.begin([Launch::new("norm_rows", [n, 1], &args)]) }
    }

    /// `y (n, n_out) = w · x` of activations that were made of `n` tokens.
    fn dense(
        &self,
        lay: &Layout,
        slot: usize,
        w: &Weight,
        n: usize,
        y: u64,
        stop: u64,
    ) -> Result<(), Fault> {
        let (at, x) = (self.at(slot), lay.acts(w, n));
        let launch = match n < FEW {
            true => dense(w, at, x, y, stop),
            false => gemm(w, at, x, Tokens::from(0, n), y),
        };
        // SAFETY: the slot holds this weight, activations of `n` tokens were made for it, and `y` has room for as many rows.
        unsafe { self.begin([launch]) }
    }

    /// Attention of a layer, and the router: from the residual stream to it, to its norm, and to choices. `few`: that the
    /// device makes the table of rows, and may stop.
    fn attention(
        &self,
        pass: &Pass<'_>,
        lay: &Layout,
        layer: usize,
        few: bool,
    ) -> Result<(), Fault> {
        let c = pass.config;
        let (n, stop) = (lay.n_tok, if few { lay.stop } else { 0 });
        let weights = &pass.weights.layers[layer];
        let [q, k, v, o] = pass.layers[layer].attention;
        let [attn_norm, ffn_norm, router] = small_at(c, layer);
        let d_kv = c.n_kv * c.d_head;
        let inputs = [&weights.q, &weights.k, &weights.v];
        self.norm(pass, lay, 0, 0, n, attn_norm, inputs, stop)?;
        self.dense(lay, q, &weights.q, n, lay.q, stop)?;
        self.dense(lay, k, &weights.k, n, lay.k, stop)?;
        self.dense(lay, v, &weights.v, n, lay.v, stop)?;

        // Where the layer is in a block, and what goes back of it.
        let at = Long((4 * layer * d_kv * KV_BLOCK) as u64);
        let fresh = Long(lay.fresh + (4 * layer * n * d_kv) as u64);
        let (heads, kv, d_head) = (int(c.n_head), int(c.n_kv), int(c.d_head));
        let scale = float(1.0 / (c.d_head as f32).sqrt());
        let list = Long(lay.list);
        let from = [lay.q, lay.k, lay.v, lay.cos, lay.sin, lay.seats].map(Long);
        let sizes = [int(n), heads, kv, d_head, int(c.n_rot), scale, Long(stop)];
        let args = [&from[..], &[list, at, fresh], &sizes].concat();
        // SAFETY: as in `norm`; the blocks of each sequence are as many as its positions need.
        unsafe {
            self.begin([Launch::new(
                "rotate_heads",
                [c.n_head + 2 * c.n_kv, n],
                &args,
            )])?
        };
        for first in (0..n).step_by(lay.part) {
            let part = lay.part.min(n - first);
            let row = |base: u64| Long(base + (4 * first * c.n_head * c.d_head) as u64);
            let seats = Long(lay.seats + (first * size_of::<Seat>()) as u64);
            let ends = [heads, kv, d_head, int(lay.room), Long(stop)];
            let (scores, most) = (Long(lay.scores), lay.room / KV_BLOCK);
            let score = [&[row(lay.q), seats, list, at, scores][..], &ends].concat();
            let attend = [&[scores, seats, list, at, row(lay.heads)][..], &ends].concat();
            // SAFETY: as above; scores have room for `part` tokens.
            unsafe {
                self.begin([Launch::new("score_keys", [most, part * c.n_kv], &score)])?;
                self.begin([Launch::new("attend_values", [c.n_head, part], &attend)])?;
            }
        }
        let (kind, x) = (weights.o.format.act(), lay.acts(&weights.o, n));
        let stopped = Stop { at: stop, layer: 0 };
        let quantize = quantize(kind, lay.heads, n, weights.o.n_in, x.at, stopped);
        // SAFETY: as in `norm`.
        unsafe { self.begin([quantize])? };
        self.dense(lay, o, &weights.o, n, lay.added, stop)?;
        let experts = pattern(pass, layer).map(|expert| &expert.gate);
        self.norm(pass, lay, lay.added, 0, n, ffn_norm, experts, stop)?;

        let router = Long(self.at(pass.small) + 4 * router as u64);
        let choices = Long(lay.choices + (8 * layer * n * c.n_used) as u64);
        let experts = lay.experts + (24 * layer * c.n_expert) as u64;
        let (experts, rows) = match few {
            true => (Long(experts), Long(lay.rows)),
            false => (Long(0), Long(0)),
        };
        let sizes = [
            int(layer + 1),
            int(c.d_model),
            int(c.n_expert),
            int(c.n_used),
        ];
        let from = [router, Long(lay.normed), choices, experts, rows, Long(stop)];
        let args = [&from[..], &sizes].concat();
        // SAFETY: as above; rows have room for all ranks of all tokens.
        unsafe { self.begin([Launch::new("route_tokens", [n, 1], &args)]) }
    }

    /// `x += Σ weight · row` over the ranks. `home`: where each choice's row is, or 0.
    fn combine(
        &self,
        pass: &Pass<'_>,
        lay: &Layout,
        layer: usize,
        home: u64,
        stop: u64,
    ) -> Result<(), Fault> {
        let c = pass.config;
        let choices = lay.choices + (8 * layer * lay.n_tok * c.n_used) as u64;
        let from = [lay.x, choices, lay.out, home].map(Long);
        let args = [&from[..], &[int(c.n_used), int(c.d_model), Long(stop)]].concat();
        let grid = [c.d_model.div_ceil(THREADS as usize), lay.n_tok];
        // SAFETY: as in `attention`; `home` leads to rows that there are.
        unsafe { self.begin([Launch::new("combine_rows", grid, &args)]) }
    }

    /// The logits that are wanted.
    fn head(&self, pass: &Pass<'_>, lay: &Layout, stop: u64) -> Result<(), Fault> {
        if lay.wanted == 0 {
            return Ok(());
        }
        let (c, n, w) = (pass.config, lay.wanted, &pass.weights.head);
        let norm = small_at(c, c.n_layer)[0];
        self.norm(pass, lay, 0, lay.picks, n, norm, [w], stop)?;
        self.dense(lay, pass.head, w, n, lay.logits, stop)
    }

    /// What the router chose in a layer, after everything that was begun.
    fn choices(&self, pass: &Pass<'_>, lay: &Layout, layer: usize) -> Result<Vec<Choice>, Fault> {
        let n = lay.n_tok * pass.config.n_used;
        let mut choices = vec![Choice::default(); n];
        let at = lay.choices + (8 * layer * n) as u64;
        self.driver
            .read(at, bytemuck::cast_slice_mut(&mut choices))?;
        Ok(choices)
    }

    /// The normalised rows that the experts get, as they were at the mark [`CHOSEN`]: the device's experts run meanwhile.
    fn normed(&self, lay: &Layout, d: usize) -> Result<Vec<f32>, Fault> {
        let mut h = vec![0.0; lay.n_tok * d];
        let out = bytemuck::cast_slice_mut(&mut h);
        self.driver.fetch(CHOSEN, lay.normed, out)?;
        Ok(h)
    }
}
