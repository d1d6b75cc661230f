//! Passes of few tokens: recorded once and replayed, some layers ahead of what is known of their experts.

use super::{Layout, pattern};
use crate::moe::offload::driver::{CHOSEN, Driver};
use crate::moe::offload::gpu::{For, Gpu};
use crate::moe::offload::kernels::{Activations, Rows, Stop, expert_up, gemv, quantize};
use crate::moe::offload::{Absent, Fault, Host, Pass, Slots};
use crate::moe::router::Choice;
use crate::moe::weights::Expert;
use std::collections::HashMap;
use std::ops::{ControlFlow, Range};
use std::sync::Arc;

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
    /// The share of layers that had all experts of their tokens.
    share: f32,
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
    parts: Parts,
}

/// What of some layers a segment does.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum Parts {
    /// Attention and router.
    Choose,
    /// The experts that were chosen.
    Experts,
    /// All of it.
    Both,
    /// The same, and the head.
    Head,
}

impl<D: Driver> Gpu<D> {
    /// A segment: layers of few tokens, or parts of one, as far as nothing stops them.
    fn segment(
        &self,
        pass: &Pass<'_>,
        lay: &Layout,
        layers: Range<usize>,
        parts: Parts,
    ) -> Result<(), Fault> {
        for layer in layers {
            if parts != Parts::Experts {
                self.attention(pass, lay, layer, true)?;
            }
            if parts != Parts::Choose {
                self.few_experts(pass, lay, layer)?;
                self.combine(pass, lay, layer, 0, lay.stop)?;
            }
        }
        match parts {
            Parts::Head => self.head(pass, lay, lay.stop),
            _ => Ok(()),
        }
    }

    /// A layer's experts, by the table that the router made: those that are there. Their input is there since the norm.
    fn few_experts(&self, pass: &Pass<'_>, lay: &Layout, layer: usize) -> Result<(), Fault> {
        let Some(Expert { gate, up: _, down }) = pattern(pass, layer) else {
            return Ok(());
        };
        let (d_ff, n) = (gate.n_out, lay.n_tok);
        // Of a layer that has stopped the pass these run all the same.
        let stop = Stop {
            at: lay.stop,
            layer: layer + 1,
        };
        let rows = Rows {
            at: lay.rows,
            n: n * pass.config.n_used,
        };
        let x = lay.acts(gate, n);
        let gates = self.buffers.at(For::Gate);
        let inner = Activations {
            at: self.buffers.at(For::Inner),
            n_tok: rows.n,
        };
        // SAFETY: as in `attention`; experts on the device are of these formats (`leave_out_others`), and rows of those that are
        // not have no addresses.
        unsafe {
            self.begin([
                expert_up(gate, rows, x, gates, stop),
                quantize(down.format.act(), gates, rows.n, d_ff, inner.at, stop),
                gemv(down, rows, inner, lay.out, stop),
            ])
        }
    }

    /// A segment, which is recorded the first time.
    fn replayed(
        &mut self,
        pass: &Pass<'_>,
        lay: &Layout,
        layers: Range<usize>,
        parts: Parts,
    ) -> Result<(), Fault> {
        let driver = Arc::clone(&self.driver);
        if self.lasting.few.moves != self.buffers.moves {
            // What was recorded leads to where buffers were.
            self.lasting
                .few
                .records
                .drain()
                .for_each(|(_, graph)| driver.forget(graph));
            self.lasting.few.moves = self.buffers.moves;
        }
        let record = Record {
            n_tok: lay.n_tok,
            wanted: lay.wanted,
            room: lay.room,
            from: layers.start,
            to: layers.end,
            parts,
        };
        if let Some(graph) = self.lasting.few.records.get(&record) {
            return driver.replay(*graph);
        }
        if self.lasting.few.plain || driver.record().is_err() {
            self.lasting.few.plain = true;
            return self.segment(pass, lay, layers, parts);
        }
        let launched = self.segment(pass, lay, layers.clone(), parts);
        match (launched, driver.recorded()) {
            (Ok(()), Ok(graph)) => {
                self.lasting.few.records.insert(record, graph);
                driver.replay(graph)
            }
            // A driver that does not record does it one by one; one that is lost will say so.
            _ => {
                self.lasting.few.plain = true;
                self.segment(pass, lay, layers, parts)
            }
        }
    }

    /// All layers and the head; false if the host has ended it.
    pub(super) fn few(
        &mut self,
        pass: &Pass<'_>,
        lay: &Layout,
        host: &mut dyn Host,
    ) -> Result<bool, Fault> {
        let c = pass.config;
        let n = c.n_layer;
        let here = |slots: &Slots| slots.experts.iter().all(Option::is_some);
        if pass.layers.iter().all(here) {
            self.replayed(pass, lay, 0..n, Parts::Head)?;
        } else {
            let mut layer = 0;
            loop {
                if layer == n {
                    // The host has ended the last one.
                    self.replayed(pass, lay, n..n, Parts::Head)?;
                    break;
                }
                // So many layers in a row will have everything, if they are like those of late.
                let share = self.lasting.few.share;
                let ahead = (share / (1.0 - share).max(1e-3)) as usize;
                let end = n.min(layer + ahead.max(1));
                let last = end - 1;
                for layer in layer..last {
                    self.replayed(pass, lay, layer..layer + 1, Parts::Both)?;
                }
                // The host learns what the last of them chose while the device's experts of it run.
                self.replayed(pass, lay, last..end, Parts::Choose)?;
                self.driver.mark(CHOSEN)?;
                self.replayed(pass, lay, last..end, Parts::Experts)?;
                if end == n {
                    self.replayed(pass, lay, n..n, Parts::Head)?;
                }
                let mut stop = [0u32];
                let out = bytemuck::cast_slice_mut(&mut stop);
                self.driver.fetch(CHOSEN, lay.stop, out)?;
                let stopped = (stop[0] > 0).then(|| stop[0] as usize - 1);
                for _ in layer..stopped.unwrap_or(end) {
                    self.lasting.few.share += FADE * (1.0 - self.lasting.few.share);
                }
                match stopped {
                    None if end == n => break,
                    None => layer = end,
                    Some(at) => {
                        self.lasting.few.share -= FADE * self.lasting.few.share;
                        if !self.helped(pass, lay, at, host)? {
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
        lay: &Layout,
        layer: usize,
        host: &mut dyn Host,
    ) -> Result<bool, Fault> {
        let d = pass.config.d_model;
        let mut choices = vec![Choice::default(); lay.n_tok * pass.config.n_used];
        let at = lay.choices + (size_of::<Choice>() * layer * choices.len()) as u64;
        let out = bytemuck::cast_slice_mut(&mut choices);
        self.driver.fetch(CHOSEN, at, out)?;
        let (absent, homes) = lacking(&choices, pass.config.n_used, &pass.layers[layer]);
        let h = self.normed(lay, d)?;
        let mut rows = vec![0.0; homes.len() * d];
        if !host.experts(layer, &h, &absent, &mut rows) {
            return Ok(false);
        }
        for (row, home) in rows.chunks_exact(d).zip(homes) {
            let at = lay.out + (4 * home as usize * d) as u64;
            self.driver.write(at, bytemuck::cast_slice(row))?;
        }
        self.driver.write(lay.stop, &[0; 4])?;
        self.combine(pass, lay, layer, 0, lay.stop)?;
        Ok(true)
    }
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
