//! Whole passes with CUDA's kernels: which run in which order from the embedding to the logits.
//!
//! **Few tokens** (an answer's, mostly) are never looked at by the host on their way: the router's kernel writes the table of
//! rows from the addresses of the experts that are there. Nothing in a launch depends on the pass, only what the buffers hold, so
//! launches are recorded once and replayed. Where all experts are there, one record is the whole pass. Else each layer is one, and some are launched
//! ahead: a layer that lacks an expert stops those behind it (`stopped` in offload.cu), the host computes what is missing, and it
//! goes on from there. How many go ahead depends on how many layers in a row have lately had everything.
//!
//! **Many tokens** (a prompt's) are gathered by expert, for which the host reads what the router chose, once for each layer.

use super::gpu::{
    ALIGN, Arg, CHUNKS, Driver, FEW, For, Gpu, Launch, MARKS, ROWS, Row, Sent, THREADS, TILE,
    begin, blocks, parts, quantize, slot_bytes,
};
use super::{Absent, Back, Fault, Host, Pass, Seat, Share, Slots, small_at};
use crate::gguf::Bytes;
use crate::moe::Config;
use crate::moe::kv::KV_BLOCK;
use crate::moe::linear::Weight;
use crate::moe::router::Choice;
use crate::moe::weights::Expert;
use crate::pool::apart;
use crate::quant::act::{ActKind, CHUNK, Chunk};
use std::collections::HashMap;
use std::ops::{ControlFlow, Range};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

use Arg::{Int, Long};

/// Bytes of scores that a kernel of attention writes at most: more tokens than those have room for go one group after the other.
const SCORES: usize = 64 << 20;
/// Blocks of the cache that a record is good for at least; then twice as many, and so on.
const LEAST_BLOCKS: usize = 16;
/// Tokens of a pass of usual length.
const USUAL: usize = 2048;
/// Most blocks in the second dimension of a grid.
const MOST_Y: usize = 65535;
/// How much one layer counts in the share of those that had everything.
const FADE: f32 = 1.0 / 64.0;

/// What lasts from pass to pass.
#[derive(Default)]
pub(super) struct Lasting {
    /// Records by what they are of, for buffers that have moved so often.
    records: HashMap<Record, u64>,
    moves: u64,
    /// The driver does not record.
    plain: bool,
    /// The addresses that [`For::Experts`] holds, and how often buffers had moved then.
    experts: (Vec<u64>, u64),
    /// The share of layers that had all experts of few tokens.
    share: f32,
    /// The thread that brings experts of many tokens through the device.
    stream: Option<Stream>,
}

/// A thread that copies one expert after the other into slots by turns, and begins what is to be done with each when it has
/// arrived. A slot is not written before the kernels of whoever was there have ended.
struct Stream {
    jobs: Sender<Passing>,
    done: Receiver<Result<(), Fault>>,
}

/// An expert that passes through the device.
struct Passing {
    /// Which of the slots.
    turn: usize,
    parts: Vec<(u64, Bytes)>,
    launches: Vec<Launch>,
}

impl Stream {
    fn new<D: Driver>(driver: Arc<D>) -> Result<Stream, Fault> {
        let (jobs, passing) = channel::<Passing>();
        let (said, done) = channel();
        let run = move || {
            for job in passing {
                let Passing {
                    turn,
                    parts,
                    launches,
                } = job;
                let mut parts = parts.into_iter();
                let done = driver
                    .reached(turn)
                    .and_then(|()| parts.try_for_each(|(at, bytes)| driver.stage(at, &bytes)))
                    // SAFETY: `many` made them for this expert in this slot, where it is now; it launches nothing itself until
                    // it has heard of all.
                    .and_then(|()| unsafe { begin(&*driver, &launches) })
                    .and_then(|()| driver.mark(turn));
                if said.send(done).is_err() {
                    return;
                }
            }
        };
        apart("octet-gpu-stream", run).map_err(|e| Fault::Lost(e.to_string()))?;
        Ok(Stream { jobs, done })
    }
}

/// What was recorded: everything that its launches depend on.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Record {
    n_tok: usize,
    wanted: usize,
    room: usize,
    /// Layers, and whether the head follows.
    from: usize,
    to: usize,
    head: bool,
}

/// Where everything is in a pass.
struct Lie {
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

impl Lie {
    fn acts(&self, kind: ActKind) -> u64 {
        match kind {
            ActKind::Q8 => self.q8,
            _ => self.q8k,
        }
    }
}

fn int(n: usize) -> Arg {
    Int(i32::try_from(n).expect("sizes of a model"))
}

fn float(x: f32) -> Arg {
    Int(x.to_bits() as i32)
}

/// The experts that a layer's kernels are for: all on the device are of the formats of the first that could be there.
fn pattern<'p>(pass: &Pass<'p>, layer: usize) -> Option<&'p Expert> {
    let experts = &pass.weights.layers[layer].experts;
    let mut experts = experts.iter().map(|e| &**e);
    experts.find(|e| slot_bytes(&e.weights()).is_some())
}

/// What the host has to do of a layer: the experts that are not there, and where the row of each of their tokens belongs.
fn lacking(choices: &[Choice], n_used: usize, slots: &Slots) -> (Vec<Absent>, Vec<u32>) {
    let (mut absent, mut homes) = (Vec::new(), Vec::new());
    for (expert, slot) in slots.experts.iter().enumerate() {
        if slot.is_some() {
            continue;
        }
        let its = choices.iter().enumerate();
        let its = its.filter(|(_, c)| c.expert as usize == expert);
        let its: Vec<u32> = its.map(|(at, _)| at as u32).collect();
        if !its.is_empty() {
            let pick = its.iter().map(|at| at / n_used as u32).collect();
            absent.push(Absent { expert, pick });
            homes.extend(its);
        }
    }
    (absent, homes)
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
        let lie = self.arrange(pass, 4 * words.len())?;
        self.know_experts(pass, &lie)?;
        let goes_on = match n_tok < FEW {
            true => self.few(pass, &lie, host)?,
            false => self.many(pass, &lie, host)?,
        };
        if goes_on {
            self.driver
                .read(lie.fresh, bytemuck::cast_slice_mut(words))?;
        }
        Ok(goes_on)
    }

    /// Finds a place for everything and brings what comes with the pass.
    fn arrange(&mut self, pass: &Pass<'_>, back: usize) -> Result<Lie, Fault> {
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
        let lie = Lie {
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
        Ok(lie)
    }

    /// Has the device know where experts are.
    fn know_experts(&mut self, pass: &Pass<'_>, lie: &Lie) -> Result<(), Fault> {
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
                .write(lie.experts, bytemuck::cast_slice(&now.0))?;
            self.lasting.experts = now;
        }
        Ok(())
    }

    /// # Safety
    /// As for [`Driver::launch`].
    unsafe fn plain(&self, kernel: &str, grid: [usize; 2], args: &[Arg]) -> Result<(), Fault> {
        let grid = grid.map(|n| u32::try_from(n).expect("sizes of a model"));
        // SAFETY: the caller's promise, handed on.
        unsafe { self.driver.launch(kernel, grid, args) }
    }

    /// `h = norm(x + add) · w` of `n` tokens, those of `picks` if that is not 0; `small`: where `w` is among the small weights.
    fn norm(
        &self,
        pass: &Pass<'_>,
        lie: &Lie,
        add: u64,
        picks: u64,
        n: usize,
        small: usize,
        stop: u64,
    ) -> Result<(), Fault> {
        let w = self.at(pass.small) + 4 * small as u64;
        let (d, eps) = (int(pass.config.d_model), float(pass.config.rms_eps));
        let ends = [Long(w), eps, Long(lie.normed), d, Long(stop)];
        let args = [&[Long(lie.x), Long(add), Long(picks)][..], &ends].concat();
        // SAFETY: the arguments are those of `offload.cu`; `arrange` made the buffers large enough for all tokens, and what was
        // picked is among them.
        unsafe { self.plain("norm_rows", [n, 1], &args) }
    }

    /// Activations of `x (n, k)` for weights of `formats`, each kind once.
    fn activate<'w>(
        &self,
        lie: &Lie,
        x: u64,
        n: usize,
        weights: impl IntoIterator<Item = &'w Weight>,
        stop: u64,
    ) -> Result<(), Fault> {
        let mut done = Vec::new();
        for w in weights {
            let kind = w.format.act();
            if done.contains(&kind) {
                continue;
            }
            done.push(kind);
            let out = Long(lie.acts(kind));
            let args = [Long(x), out, int(n), int(w.n_in), Long(stop), Int(0)];
            let grid = [blocks(w.n_in.div_ceil(CHUNK), CHUNKS) as usize, n];
            // SAFETY: as in `norm`.
            unsafe { self.plain(quantize(kind), grid, &args)? };
        }
        Ok(())
    }

    /// `y (n, n_out) = w · x` of activations that were made of `n` tokens.
    fn dense(
        &self,
        lie: &Lie,
        slot: usize,
        w: &Weight,
        n: usize,
        y: u64,
        stop: u64,
    ) -> Result<(), Fault> {
        let (weights, x) = (Long(self.at(slot)), Long(lie.acts(w.format.act())));
        let (k, m, n_tok) = (int(w.n_in), int(w.n_out), int(n));
        // SAFETY: the arguments are those of `offload.cu`; the slot holds this weight, activations of `n` tokens were made for
        // it, and `y` has room for as many rows.
        unsafe {
            if n < FEW {
                let args = [weights, x, Long(y), n_tok, k, m, Long(stop)];
                let grid = [blocks(w.n_out, ROWS), n as u32];
                self.launch("dense", w.format, grid, &args)
            } else {
                let args = [weights, x, Long(0), Int(0), Long(y), n_tok, n_tok, m, k];
                let grid = [blocks(w.n_out, TILE), blocks(n, TILE)];
                self.launch("gemm", w.format, grid, &args)
            }
        }
    }

    /// Attention of a layer, and the router: from the residual stream to it, to its norm, and to choices. `few`: that the
    /// device makes the table of rows, and may stop.
    fn attention(&self, pass: &Pass<'_>, lie: &Lie, layer: usize, few: bool) -> Result<(), Fault> {
        let c = pass.config;
        let (n, stop) = (lie.n_tok, if few { lie.stop } else { 0 });
        let weights = &pass.weights.layers[layer];
        let [q, k, v, o] = pass.layers[layer].attention;
        let [attn_norm, ffn_norm, router] = small_at(c, layer);
        let d_kv = c.n_kv * c.d_head;
        self.norm(pass, lie, 0, 0, n, attn_norm, stop)?;
        let inputs = [&weights.q, &weights.k, &weights.v];
        self.activate(lie, lie.normed, n, inputs, stop)?;
        self.dense(lie, q, &weights.q, n, lie.q, stop)?;
        self.dense(lie, k, &weights.k, n, lie.k, stop)?;
        self.dense(lie, v, &weights.v, n, lie.v, stop)?;

        // Where the layer is in a block, and what goes back of it.
        let at = Long((4 * layer * d_kv * KV_BLOCK) as u64);
        let fresh = Long(lie.fresh + (4 * layer * n * d_kv) as u64);
        let (heads, kv, d_head) = (int(c.n_head), int(c.n_kv), int(c.d_head));
        let scale = float(1.0 / (c.d_head as f32).sqrt());
        let list = Long(lie.list);
        let from = [lie.q, lie.k, lie.v, lie.cos, lie.sin, lie.seats].map(Long);
        let sizes = [int(n), heads, kv, d_head, int(c.n_rot), scale, Long(stop)];
        let args = [&from[..], &[list, at, fresh], &sizes].concat();
        // SAFETY: as in `norm`; the blocks of each sequence are as many as its positions need.
        unsafe { self.plain("rotate_heads", [c.n_head + 2 * c.n_kv, n], &args)? };
        for first in (0..n).step_by(lie.part) {
            let part = lie.part.min(n - first);
            let row = |base: u64| Long(base + (4 * first * c.n_head * c.d_head) as u64);
            let seats = Long(lie.seats + (first * size_of::<Seat>()) as u64);
            let ends = [heads, kv, d_head, int(lie.room), Long(stop)];
            let (scores, most) = (Long(lie.scores), lie.room / KV_BLOCK);
            let score = [&[row(lie.q), seats, list, at, scores][..], &ends].concat();
            let attend = [&[scores, seats, list, at, row(lie.heads)][..], &ends].concat();
            // SAFETY: as above; scores have room for `part` tokens.
            unsafe {
                self.plain("score_keys", [most, part * c.n_kv], &score)?;
                self.plain("attend_values", [c.n_head, part], &attend)?;
            }
        }
        self.activate(lie, lie.heads, n, [&weights.o], stop)?;
        self.dense(lie, o, &weights.o, n, lie.added, stop)?;
        self.norm(pass, lie, lie.added, 0, n, ffn_norm, stop)?;

        let router = Long(self.at(pass.small) + 4 * router as u64);
        let choices = Long(lie.choices + (8 * layer * n * c.n_used) as u64);
        let experts = lie.experts + (24 * layer * c.n_expert) as u64;
        let (experts, rows) = match few {
            true => (Long(experts), Long(lie.rows)),
            false => (Long(0), Long(0)),
        };
        let sizes = [
            int(layer + 1),
            int(c.d_model),
            int(c.n_expert),
            int(c.n_used),
        ];
        let from = [router, Long(lie.normed), choices, experts, rows, Long(stop)];
        let args = [&from[..], &sizes].concat();
        // SAFETY: as above; rows have room for all ranks of all tokens.
        unsafe { self.plain("route_tokens", [n, 1], &args) }
    }

    /// A layer's experts for few tokens, by the table that the router made: those that are there.
    fn few_experts(&self, pass: &Pass<'_>, lie: &Lie, layer: usize) -> Result<(), Fault> {
        let Some(Expert { gate, up: _, down }) = pattern(pass, layer) else {
            return Ok(());
        };
        let (d, d_ff, n) = (gate.n_in, gate.n_out, lie.n_tok);
        let rows = n * pass.config.n_used;
        // Of a layer that has stopped the pass these run all the same.
        let [stop, own] = [Long(lie.stop), int(layer + 1)];
        let [up, inner] = [For::Gate, For::Inner].map(|what| Long(self.buffers.at(what)));
        let x = lie.acts(gate.format.act());
        let kind = gate.format.act();
        let args = [Long(lie.normed), Long(x), int(n), int(d), stop, own];
        let grid = |k: usize, n| [blocks(k.div_ceil(CHUNK), CHUNKS) as usize, n];
        // SAFETY: as in `attention`; experts on the device are of these formats (`leave_out_others`), and rows of those that are
        // not have no addresses.
        unsafe {
            self.plain(quantize(kind), grid(d, n), &args)?;
            let table = Long(lie.rows);
            let args = [table, Long(x), up, int(n), int(d), int(d_ff), stop, own];
            let by_row = |m| [blocks(m, ROWS), rows as u32];
            self.launch("expert_up", gate.format, by_row(d_ff), &args)?;
            let args = [up, inner, int(rows), int(d_ff), stop, own];
            let kind = down.format.act();
            self.plain(quantize(kind), grid(d_ff, rows), &args)?;
            let ends = [int(rows), int(d_ff), int(d), stop, own];
            let args = [&[table, inner, Long(lie.out)][..], &ends].concat();
            self.launch("gemv", down.format, by_row(d), &args)
        }
    }

    /// `x += Σ weight · row` over the ranks. `home`: where each choice's row is, or 0.
    fn combine(
        &self,
        pass: &Pass<'_>,
        lie: &Lie,
        layer: usize,
        home: u64,
        stop: u64,
    ) -> Result<(), Fault> {
        let c = pass.config;
        let choices = lie.choices + (8 * layer * lie.n_tok * c.n_used) as u64;
        let from = [lie.x, choices, lie.out, home].map(Long);
        let args = [&from[..], &[int(c.n_used), int(c.d_model), Long(stop)]].concat();
        let threads = THREADS as usize;
        // SAFETY: as in `attention`; `home` leads to rows that there are.
        unsafe {
            self.plain(
                "combine_rows",
                [c.d_model.div_ceil(threads), lie.n_tok],
                &args,
            )
        }
    }

    /// The logits that are wanted.
    fn head(&self, pass: &Pass<'_>, lie: &Lie, stop: u64) -> Result<(), Fault> {
        if lie.wanted == 0 {
            return Ok(());
        }
        let (c, n, w) = (pass.config, lie.wanted, &pass.weights.head);
        self.norm(pass, lie, 0, lie.picks, n, small_at(c, c.n_layer)[0], stop)?;
        self.activate(lie, lie.normed, n, [w], stop)?;
        self.dense(lie, pass.head, w, n, lie.logits, stop)
    }

    /// Layers of few tokens, and the head, as far as nothing stops them.
    fn segment(
        &self,
        pass: &Pass<'_>,
        lie: &Lie,
        layers: Range<usize>,
        head: bool,
    ) -> Result<(), Fault> {
        for layer in layers {
            self.attention(pass, lie, layer, true)?;
            self.few_experts(pass, lie, layer)?;
            self.combine(pass, lie, layer, 0, lie.stop)?;
        }
        match head {
            true => self.head(pass, lie, lie.stop),
            false => Ok(()),
        }
    }

    /// The same, recorded the first time.
    fn replayed(
        &mut self,
        pass: &Pass<'_>,
        lie: &Lie,
        layers: Range<usize>,
        head: bool,
    ) -> Result<(), Fault> {
        let driver = Arc::clone(&self.driver);
        if self.lasting.moves != self.buffers.moves {
            // What was recorded leads to where buffers were.
            self.lasting
                .records
                .drain()
                .for_each(|(_, graph)| driver.forget(graph));
            self.lasting.moves = self.buffers.moves;
        }
        let record = Record {
            n_tok: lie.n_tok,
            wanted: lie.wanted,
            room: lie.room,
            from: layers.start,
            to: layers.end,
            head,
        };
        if let Some(graph) = self.lasting.records.get(&record) {
            return driver.replay(*graph);
        }
        if self.lasting.plain || driver.record().is_err() {
            self.lasting.plain = true;
            return self.segment(pass, lie, layers, head);
        }
        let launched = self.segment(pass, lie, layers.clone(), head);
        match (launched, driver.recorded()) {
            (Ok(()), Ok(graph)) => {
                self.lasting.records.insert(record, graph);
                driver.replay(graph)
            }
            // A driver that does not record does it one by one; one that is lost will say so.
            _ => {
                self.lasting.plain = true;
                self.segment(pass, lie, layers, head)
            }
        }
    }

    fn few(&mut self, pass: &Pass<'_>, lie: &Lie, host: &mut dyn Host) -> Result<bool, Fault> {
        let c = pass.config;
        let n = c.n_layer;
        let here = |slots: &Slots| slots.experts.iter().all(Option::is_some);
        if pass.layers.iter().all(here) {
            self.replayed(pass, lie, 0..n, true)?;
        } else {
            let mut layer = 0;
            loop {
                // So many layers in a row will have everything, if they are like those of late.
                let share = self.lasting.share;
                let ahead = (share / (1.0 - share).max(1e-3)) as usize;
                let end = n.min(layer + ahead.max(1));
                for layer in layer..end {
                    self.replayed(pass, lie, layer..layer + 1, false)?;
                }
                if end == n {
                    self.replayed(pass, lie, n..n, true)?;
                }
                let mut stop = [0u32];
                self.driver
                    .read(lie.stop, bytemuck::cast_slice_mut(&mut stop))?;
                let stopped = (stop[0] > 0).then(|| stop[0] as usize - 1);
                for _ in layer..stopped.unwrap_or(end) {
                    self.lasting.share += FADE * (1.0 - self.lasting.share);
                }
                match stopped {
                    None if end == n => break,
                    None => layer = end,
                    Some(at) => {
                        self.lasting.share -= FADE * self.lasting.share;
                        if !self.helped(pass, lie, at, host)? {
                            return Ok(false);
                        }
                        layer = at + 1;
                    }
                }
            }
        }
        Ok((0..n).all(|layer| host.passed(layer) == ControlFlow::Continue(())))
    }

    /// Has the host do what is lacking in a layer at which a pass of few tokens has stopped, and ends the layer.
    fn helped(
        &mut self,
        pass: &Pass<'_>,
        lie: &Lie,
        layer: usize,
        host: &mut dyn Host,
    ) -> Result<bool, Fault> {
        let d = pass.config.d_model;
        let choices = self.choices(pass, lie, layer)?;
        let (absent, homes) = lacking(&choices, pass.config.n_used, &pass.layers[layer]);
        let h = self.normed(lie, d)?;
        let mut rows = vec![0.0; homes.len() * d];
        if !host.experts(layer, &h, &absent, &mut rows) {
            return Ok(false);
        }
        for (row, home) in rows.chunks_exact(d).zip(homes) {
            let at = lie.out + (4 * home as usize * d) as u64;
            self.driver.write(at, bytemuck::cast_slice(row))?;
        }
        self.driver.write(lie.stop, &[0; 4])?;
        self.combine(pass, lie, layer, 0, lie.stop)?;
        Ok(true)
    }

    /// What the router chose in a layer.
    fn choices(&self, pass: &Pass<'_>, lie: &Lie, layer: usize) -> Result<Vec<Choice>, Fault> {
        let n = lie.n_tok * pass.config.n_used;
        let mut choices = vec![Choice::default(); n];
        let at = lie.choices + (8 * layer * n) as u64;
        self.driver
            .read(at, bytemuck::cast_slice_mut(&mut choices))?;
        Ok(choices)
    }

    /// The normalised rows that the experts get.
    fn normed(&self, lie: &Lie, d: usize) -> Result<Vec<f32>, Fault> {
        let mut h = vec![0.0; lie.n_tok * d];
        self.driver
            .read(lie.normed, bytemuck::cast_slice_mut(&mut h))?;
        Ok(h)
    }

    fn many(&mut self, pass: &Pass<'_>, lie: &Lie, host: &mut dyn Host) -> Result<bool, Fault> {
        let c = pass.config;
        let (d, n) = (c.d_model, lie.n_tok);
        for layer in 0..c.n_layer {
            self.attention(pass, lie, layer, false)?;
            let choices = self.choices(pass, lie, layer)?;
            let mut homes: Vec<Vec<u32>> = vec![Vec::new(); c.n_expert];
            for (at, choice) in choices.iter().enumerate() {
                homes[choice.expert as usize].push(at as u32);
            }
            let token = |at: &u32| at / c.n_used as u32;
            let picks = homes.iter().map(|its| its.iter().map(token).collect());
            let picks: Vec<Vec<u32>> = picks.collect();

            // In this order: experts that are there, those that pass through, those of the host.
            let experts = &pass.weights.layers[layer].experts;
            let slots = &pass.layers[layer].experts;
            let formats = |e: &Expert| e.weights().map(|w| w.format);
            let known = pattern(pass, layer).map(formats);
            let place = |e: usize| match slots[e] {
                Some(slot) => (0, slot),
                None if picks[e].len() >= pass.stream_from
                    && known == Some(formats(&experts[e])) =>
                {
                    (1, 0)
                }
                None => (2, 0),
            };
            let mut order: Vec<usize> = (0..c.n_expert).collect();
            order.retain(|e| !picks[*e].is_empty());
            order.sort_by_key(|e| place(*e).0);
            let mut home = vec![0u32; n * c.n_used];
            for (row, at) in order.iter().flat_map(|e| &homes[*e]).enumerate() {
                home[*at as usize] = row as u32;
            }
            let (mut shares, mut absent, mut resident) = (Vec::new(), Vec::new(), 0);
            for e in order {
                let slot = match place(e) {
                    (0, slot) => {
                        resident += 1;
                        slot
                    }
                    (1, _) => pass.ring[(shares.len() - resident) % pass.ring.len()],
                    _ => {
                        let pick = picks[e].clone();
                        absent.push(Absent { expert: e, pick });
                        continue;
                    }
                };
                let (expert, pick) = (&*experts[e], &picks[e][..]);
                shares.push(Share { slot, expert, pick });
            }
            let table = self.rows(&shares);
            let sent = self.send(&table, n, &[], &home)?;
            let mut streamed = 0;
            if let Some(share) = shares.first() {
                let gate = &share.expert.gate;
                self.activate(lie, lie.normed, n, [gate], 0)?;
                let x = lie.acts(gate.format.act());
                let (here, passing) = shares.split_at(resident);
                let mut row = here.iter().map(|s| s.pick.len()).sum();
                if resident > 0 {
                    let launches = self.launches(here, &table[..row], &sent, x, n, lie.out);
                    // SAFETY: as `launches` says; `arrange` made room for all rows.
                    unsafe { begin(&*self.driver, &launches)? };
                }
                for (i, share) in passing.iter().enumerate() {
                    let rows = row..row + share.pick.len();
                    row = rows.end;
                    let its = Sent {
                        table: sent.table + (rows.start * size_of::<Row>()) as u64,
                        picks: sent.picks + 4 * rows.start as u64,
                        ..sent.clone()
                    };
                    let out = lie.out + (4 * rows.start * d) as u64;
                    let share = std::slice::from_ref(share);
                    let launches = self.launches(share, &table[rows], &its, x, n, out);
                    self.pass_through(i % pass.ring.len(), &share[0], launches)?;
                    streamed += 1;
                }
            }
            let goes_on =
                self.many_absent(pass, lie, layer, &absent, table.len(), streamed, host)?;
            if !goes_on {
                return Ok(false);
            }
            self.combine(pass, lie, layer, sent.homes, 0)?;
            if host.passed(layer).is_break() {
                return Ok(false);
            }
        }
        self.head(pass, lie, 0)?;
        Ok(true)
    }

    /// Has an expert brought into a slot, and `launches` begun then.
    fn pass_through(
        &mut self,
        turn: usize,
        share: &Share<'_>,
        launches: Vec<Launch>,
    ) -> Result<(), Fault> {
        assert!(turn < MARKS);
        let weights = share.expert.weights();
        let (starts, _) = parts(&weights);
        let at = self.at(share.slot);
        let parts = starts.iter().zip(weights);
        let parts = parts.map(|(start, w)| (at + start, w.bytes.clone()));
        let job = Passing {
            turn,
            parts: parts.collect(),
            launches,
        };
        if self.lasting.stream.is_none() {
            self.lasting.stream = Some(Stream::new(Arc::clone(&self.driver))?);
        }
        let stream = self.lasting.stream.as_ref().expect("it was just made");
        let gone = |_| Fault::Lost("the thread that copies has ended".into());
        stream.jobs.send(job).map_err(gone)
    }

    /// Has the host do the experts of many tokens that are `absent`, whose rows come behind the first `rows`, while `streamed`
    /// others come through the device, and waits for those. False if the host has ended the pass.
    fn many_absent(
        &mut self,
        pass: &Pass<'_>,
        lie: &Lie,
        layer: usize,
        absent: &[Absent],
        rows: usize,
        streamed: usize,
        host: &mut dyn Host,
    ) -> Result<bool, Fault> {
        let d = pass.config.d_model;
        let n: usize = absent.iter().map(|a| a.pick.len()).sum();
        let mut theirs = vec![0.0; n * d];
        let mut helped = Ok(true);
        if !absent.is_empty() {
            helped = self
                .normed(lie, d)
                .map(|h| host.experts(layer, &h, absent, &mut theirs));
        }
        // In any case: while one is on its way, nobody else may launch anything.
        for _ in 0..streamed {
            let stream = self.lasting.stream.as_ref().expect("jobs were sent");
            let ended = Fault::Lost("the thread that copies has ended".into());
            let done = stream.done.recv().unwrap_or(Err(ended));
            helped = helped.and_then(|goes_on| done.map(|()| goes_on));
        }
        let goes_on = helped?;
        if goes_on && n > 0 {
            let at = lie.out + (4 * rows * d) as u64;
            self.driver.write(at, bytemuck::cast_slice(&theirs))?;
        }
        Ok(goes_on)
    }
}
