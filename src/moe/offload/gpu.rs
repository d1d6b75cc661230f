//! A device with CUDA's kernels (`offload.cu`): where its slots and buffers are, and which kernels run in which order for experts
//! and matrices of one layer. Whole passes are in `offload/layers.rs`.

use super::driver::{Driver, Launch};
use super::kernels::{
    Activations, FEW, FORMATS, Rows, Stop, Tokens, expert_up, gemm, gemv, quantize, silu_mul,
};
use super::layers::Lasting;
use super::{Back, Device, Fault, Host, MOST_OUT, Pace, Pass, Product, Share};
use crate::gguf::Bytes;
use crate::moe::Config;
use crate::moe::linear::{Input, Weight};
use crate::moe::weights::Expert;
use crate::pool::apart;
use crate::quant::act::{Acts, CHUNK, Chunk};
use bytemuck::{Pod, Zeroable};
use std::collections::HashMap;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

/// Rows that go through the device's buffers together.
pub(super) const WAVE: usize = 1024;
/// Matrices of a slot begin at multiples of this.
pub(super) const ALIGN: usize = 256;

/// `Row` of offload.cu.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(super) struct Row {
    gate: u64,
    up: u64,
    down: u64,
    token: u32,
    inner: u32,
}

/// A device of some driver.
pub(super) struct Gpu<D: Driver> {
    pub(super) driver: Arc<D>,
    slots: HashMap<usize, Slot>,
    next: usize,
    pub(super) buffers: Buffers,
    /// What goes to the device in one copy.
    pub(super) host: Vec<u8>,
    /// What whole passes keep.
    pub(super) lasting: Lasting,
    /// Where the rows of the last start are.
    out: u64,
    copies: Sender<Filling>,
    copied: Receiver<(usize, Result<(), Fault>)>,
    /// Copies on their way.
    copying: usize,
    /// Nobody wants what is on its way any more.
    closing: Arc<AtomicBool>,
    pub(super) link: Arc<Link>,
}

/// How fast weights come to the device.
#[derive(Default)]
pub(super) struct Link(Mutex<Pace>);

/// Bytes of weights behind which what is older counts half: what comes from the disk at first is in memory later.
const MUCH: f64 = (4u64 << 30) as f64;

impl Link {
    /// Copies an expert or a matrix into its slot, by its parts.
    pub(super) fn copy(
        &self,
        driver: &impl Driver,
        mut parts: impl Iterator<Item = (u64, Bytes)>,
    ) -> Result<(), Fault> {
        let begun = Instant::now();
        let mut n = 0;
        parts.try_for_each(|(at, bytes)| {
            n += bytes.len();
            driver.stage(at, &bytes)
        })?;
        let mut pace = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        pace.add(n as f64, begun.elapsed().as_secs_f64(), MUCH);
        Ok(())
    }
}

/// Memory for an expert.
#[derive(Clone, Copy)]
struct Slot {
    at: u64,
    bytes: u64,
}

/// Matrices on their way into a slot, and where each goes.
struct Filling {
    slot: usize,
    parts: Vec<(u64, Bytes)>,
}

/// Buffers that grow when they have to.
#[derive(Default)]
pub(super) struct Buffers {
    all: [(u64, usize); For::Back as usize + 1],
    /// How often one has moved.
    pub(super) moves: u64,
}

/// What [`Buffers`] are for.
#[derive(Clone, Copy)]
pub(super) enum For {
    /// What comes with a job ([`Sent`]).
    Input,
    /// `(rows of a wave, d_ff)`
    Gate,
    Up,
    /// The same as activations.
    Inner,
    /// `(rows, d_model)`
    Out,
    /// What comes with a whole pass, its residual stream among it.
    Ask,
    /// `(n_tok, d_model)`, normalised.
    Normed,
    /// `(n_tok, heads · d_head)`
    Q,
    K,
    V,
    Heads,
    /// `(n_tok, d_model)`: what attention adds.
    Added,
    /// Activations of either kind.
    Q8,
    Q8K,
    /// `(n_part, n_head, room)`
    Scores,
    /// [`Row`]s that the device makes itself.
    Rows,
    /// `(n_layer, n_expert, 3)` addresses.
    Experts,
    /// What goes back to the host.
    Back,
}

impl Buffers {
    /// Where a buffer is that room was made in.
    pub(super) fn at(&self, what: For) -> u64 {
        self.all[what as usize].0
    }

    /// A buffer of at least so many bytes; what was in it is lost if it has to grow.
    pub(super) fn room(
        &mut self,
        driver: &impl Driver,
        what: For,
        bytes: usize,
    ) -> Result<u64, Fault> {
        let (at, have) = &mut self.all[what as usize];
        if *have < bytes {
            self.moves += 1;
            if *have > 0 {
                driver.dealloc(*at);
                (*at, *have) = (0, 0);
            }
            // Somewhat more, so that it need not grow again for the next token.
            let more = bytes.next_multiple_of(64 << 10);
            (*at, *have) = (driver.alloc(more)?, more);
        }
        Ok(*at)
    }
}

/// Where on the device the parts of a job are, which came in one copy: each copy takes some microseconds, however short.
#[derive(Clone)]
pub(super) struct Sent {
    /// [`Row`]s.
    pub(super) table: u64,
    /// The token of each row.
    pub(super) picks: u64,
    /// Where the row of each choice is.
    pub(super) homes: u64,
    /// Activations.
    pub(super) inputs: Vec<u64>,
}

impl Sent {
    /// Some rows of the table.
    fn rows(&self, rows: &Range<usize>) -> Rows {
        let at = self.table + (rows.start * size_of::<Row>()) as u64;
        Rows { at, n: rows.len() }
    }

    /// Their tokens.
    fn tokens(&self, rows: &Range<usize>) -> Tokens {
        Tokens {
            pick: self.picks + 4 * rows.start as u64,
            first: 0,
            n: rows.len(),
        }
    }

    /// The same without the first `n` rows.
    pub(super) fn behind(&self, n: usize) -> Sent {
        Sent {
            table: self.table + (n * size_of::<Row>()) as u64,
            picks: self.picks + 4 * n as u64,
            ..self.clone()
        }
    }
}

/// What is launched together: rows of one share, or of several small ones, one behind the other.
struct Group {
    rows: Range<usize>,
    /// Of a share with so many tokens that they go tile by tile.
    large: bool,
}

/// Where matrices are in their slot, one behind the other, and bytes of all.
pub(super) fn parts(weights: &[&Weight]) -> (Vec<u64>, u64) {
    let mut at = 0;
    let starts = weights.iter().map(|w| {
        let start = at;
        at += w.bytes.len().next_multiple_of(ALIGN) as u64;
        start
    });
    (starts.collect(), at)
}

/// [`Device::scratch`].
pub(super) fn scratch(d_model: usize, d_ff: usize) -> u64 {
    // Gate, up, and gate as activations; input, output and what else there is of a few thousand rows; logits; the kernels.
    let wave = WAVE * 10 * d_ff;
    let rows = 4096 * (6 * d_model + 64);
    (wave + rows + 4 * MOST_OUT + (64 << 20)) as u64
}

/// [`Device::bytes`].
pub(super) fn slot_bytes(weights: &[&Weight]) -> Option<u64> {
    // Sizes are `int` in the kernels.
    let small = |w: &&&Weight| w.n_in.max(w.n_out) <= i32::MAX as usize;
    let known = weights
        .iter()
        .filter(small)
        .filter(|w| FORMATS.contains(&w.format));
    let known = known.count() == weights.len();
    // Gate and up go through one kernel.
    let same = weights.len() < 2 || weights[0].format == weights[1].format;
    (known && same).then(|| parts(weights).1)
}

impl<D: Driver> Gpu<D> {
    /// A device without slots.
    pub(super) fn new(driver: D) -> Result<Gpu<D>, Fault> {
        let driver = Arc::new(driver);
        let (copies, jobs) = channel::<Filling>();
        let (done, copied) = channel();
        let closing = Arc::new(AtomicBool::new(false));
        let (its_driver, its_closing) = (Arc::clone(&driver), Arc::clone(&closing));
        let link = Arc::<Link>::default();
        let its_link = Arc::clone(&link);
        // One after the other: what is most wanted comes first, and the CPU has other things to do.
        let copy = move || {
            for job in jobs {
                if its_closing.load(Ordering::Relaxed) {
                    return;
                }
                let Filling { slot, parts } = job;
                let copied = its_link.copy(&*its_driver, parts.into_iter());
                if done.send((slot, copied)).is_err() {
                    return;
                }
            }
        };
        apart("octet-gpu", copy).map_err(|e| Fault::Lost(e.to_string()))?;
        Ok(Gpu {
            driver,
            slots: HashMap::new(),
            next: 0,
            buffers: Buffers::default(),
            host: Vec::new(),
            lasting: Lasting::default(),
            out: 0,
            copies,
            copied,
            copying: 0,
            closing,
            link,
        })
    }

    /// What the kernels of one layer need to know of each row; where a wave begins, its inner rows begin.
    pub(super) fn rows(&self, shares: &[Share<'_>]) -> Vec<Row> {
        let mut table: Vec<Row> = Vec::new();
        for share in shares {
            let at = self.slots[&share.slot].at;
            let (starts, _) = parts(&share.expert.weights());
            for token in share.pick {
                table.push(Row {
                    gate: at + starts[0],
                    up: at + starts[1],
                    down: at + starts[2],
                    token: *token,
                    inner: (table.len() % WAVE) as u32,
                });
            }
        }
        table
    }

    /// The address of a slot.
    pub(super) fn at(&self, slot: usize) -> u64 {
        self.slots[&slot].at
    }

    /// Brings rows and activations to the device. Tokens of rows are below `n_tok`.
    pub(super) fn send(
        &mut self,
        table: &[Row],
        n_tok: usize,
        inputs: &[&Acts],
        homes: &[u32],
    ) -> Result<Sent, Fault> {
        assert!(table.iter().all(|row| (row.token as usize) < n_tok));
        let picks: Vec<u32> = table.iter().map(|row| row.token).collect();
        let host = &mut self.host;
        host.clear();
        let mut put = |bytes: &[u8]| {
            host.resize(host.len().next_multiple_of(align_of::<Chunk>()), 0);
            host.extend_from_slice(bytes);
            (host.len() - bytes.len()) as u64
        };
        let table = put(bytemuck::cast_slice(table));
        let picks = put(bytemuck::cast_slice(&picks));
        let homes = put(bytemuck::cast_slice(homes));
        let input = inputs
            .iter()
            .map(|acts| put(bytemuck::cast_slice(acts.all_chunks())));
        let inputs: Vec<u64> = input.collect();
        let at = self
            .buffers
            .room(&*self.driver, For::Input, self.host.len())?;
        self.driver.write(at, &self.host)?;
        Ok(Sent {
            table: at + table,
            picks: at + picks,
            homes: at + homes,
            inputs: inputs.into_iter().map(|input| at + input).collect(),
        })
    }

    /// Begins all of `launches`.
    ///
    /// # Safety
    /// As for [`Driver::launch`].
    pub(super) unsafe fn begin(
        &self,
        launches: impl IntoIterator<Item = Launch>,
    ) -> Result<(), Fault> {
        let mut launches = launches.into_iter();
        // SAFETY: the caller's promise, handed on.
        launches.try_for_each(|launch| unsafe { launch.begin(&*self.driver) })
    }

    /// Room for what experts have inside.
    pub(super) fn room_inside(&mut self, rows: usize, d_ff: usize) -> Result<(), Fault> {
        let (driver, wave) = (Arc::clone(&self.driver), rows.min(WAVE));
        let inner = wave * d_ff.div_ceil(CHUNK) * size_of::<Chunk>();
        for (what, bytes) in [
            (For::Gate, 4 * wave * d_ff),
            (For::Up, 4 * wave * d_ff),
            (For::Inner, inner),
        ] {
            self.buffers.room(&*driver, what, bytes)?;
        }
        Ok(())
    }

    /// What runs experts, for which there is room: `table` are the rows of `shares`, which were sent with their tokens; `x`:
    /// activations of theirs; `out`: `(rows, d_model)`.
    pub(super) fn launches(
        &self,
        shares: &[Share<'_>],
        table: &[Row],
        sent: &Sent,
        x: Activations,
        out: u64,
    ) -> Vec<Launch> {
        let Expert { gate, down, .. } = shares[0].expert;
        let (d, d_ff) = (gate.n_in, gate.n_out);
        for share in shares {
            let its = share.expert;
            assert!(its.gate.format == gate.format && its.up.format == gate.format);
            assert!(its.down.format == down.format && (its.gate.n_in, its.down.n_in) == (d, d_ff));
        }
        let mut launches = Vec::new();
        for wave in waves(shares) {
            let (first, last) = (&wave[0].rows, &wave[wave.len() - 1].rows);
            let (start, n) = (first.start, last.end - first.start);
            for group in &wave {
                launches.extend(self.up(gate, table, sent, x, group, start));
            }
            let [gates, inner] = [For::Gate, For::Inner].map(|what| self.buffers.at(what));
            let kind = down.format.act();
            launches.push(quantize(kind, gates, n, d_ff, inner, Stop::NEVER));
            let inner = Activations {
                at: inner,
                n_tok: n,
            };
            let down = |group| self.down(down, table, sent, inner, group, start, out);
            launches.extend(wave.iter().map(down));
        }
        launches
    }

    /// `silu(gate · x) · (up · x)` of a group, into the buffer of its wave, whose rows begin at `start`.
    fn up(
        &self,
        gate: &Weight,
        table: &[Row],
        sent: &Sent,
        x: Activations,
        Group { rows, large }: &Group,
        start: usize,
    ) -> Vec<Launch> {
        let d_ff = gate.n_out;
        let inside = (4 * (rows.start - start) * d_ff) as u64;
        let [gates, ups] = [For::Gate, For::Up].map(|what| self.buffers.at(what) + inside);
        if !large {
            return vec![expert_up(gate, sent.rows(rows), x, gates, Stop::NEVER)];
        }
        let its = table[rows.start];
        let product = |w, y| gemm(gate, w, x, sent.tokens(rows), y);
        vec![
            product(its.gate, gates),
            product(its.up, ups),
            silu_mul(gates, ups, rows.len() * d_ff),
        ]
    }

    /// `down · inner` of a group, to its place in `out`. `inner`: of the wave, whose rows begin at `start`.
    fn down(
        &self,
        down: &Weight,
        table: &[Row],
        sent: &Sent,
        inner: Activations,
        Group { rows, large }: &Group,
        start: usize,
        out: u64,
    ) -> Launch {
        let y = out + (4 * rows.start * down.n_out) as u64;
        match large {
            false => gemv(down, sent.rows(rows), inner, y, Stop::NEVER),
            true => {
                let tokens = Tokens::from(rows.start - start, rows.len());
                gemm(down, table[rows.start].down, inner, tokens, y)
            }
        }
    }
}

/// Cuts rows into waves of groups: small shares together, large ones apart and in parts if they have to be. No wave is empty.
fn waves(shares: &[Share<'_>]) -> Vec<Vec<Group>> {
    let mut waves: Vec<Vec<Group>> = Vec::new();
    let (mut row, mut room) = (0, 0);
    for share in shares {
        let end = row + share.pick.len();
        let large = share.pick.len() >= FEW;
        while row < end {
            if room == 0 {
                waves.push(Vec::new());
                room = WAVE;
            }
            let rows = row..end.min(row + room);
            room -= rows.len();
            row = rows.end;
            let wave = waves.last_mut().expect("one was just made");
            match wave.last_mut() {
                Some(last) if !large && !last.large => last.rows.end = rows.end,
                _ => wave.push(Group { rows, large }),
            }
        }
    }
    waves
}

impl<D: Driver> Device for Gpu<D> {
    fn name(&self) -> String {
        self.driver.name()
    }

    fn free(&mut self) -> Result<u64, Fault> {
        self.driver.free()
    }

    fn scratch(&self, d_model: usize, d_ff: usize) -> u64 {
        scratch(d_model, d_ff)
    }

    fn link(&self) -> Pace {
        *self.link.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn bytes(&self, weights: &[&Weight]) -> Option<u64> {
        slot_bytes(weights)
    }

    fn make(&mut self, bytes: u64) -> Result<usize, Fault> {
        let at = self.driver.alloc(bytes as usize)?;
        self.next += 1;
        self.slots.insert(self.next, Slot { at, bytes });
        Ok(self.next)
    }

    fn unmake(&mut self, slot: usize) {
        if let Some(slot) = self.slots.remove(&slot) {
            self.driver.dealloc(slot.at);
        }
    }

    fn fill(&mut self, slot: usize, weights: &[&Weight]) -> Result<(), Fault> {
        let Slot { at, bytes } = self.slots[&slot];
        let (starts, need) = parts(weights);
        assert!(need <= bytes);
        let to = |(start, w): (u64, &&Weight)| (at + start, w.bytes.clone());
        let parts = starts.into_iter().zip(weights).map(to).collect();
        self.copying += 1;
        self.copies
            .send(Filling { slot, parts })
            .map_err(|_| Fault::Lost("the thread that copies has ended".into()))
    }

    fn filled(&mut self, wait: bool) -> Result<Vec<usize>, Fault> {
        let mut slots = Vec::new();
        while self.copying > 0 {
            let next = match wait {
                true => self.copied.recv().ok(),
                false => self.copied.try_recv().ok(),
            };
            let Some((slot, copied)) = next else { break };
            copied?;
            self.copying -= 1;
            slots.push(slot);
        }
        Ok(slots)
    }

    fn start(&mut self, input: &Input, shares: &[Share<'_>]) -> Result<(), Fault> {
        let table = self.rows(shares);
        let Expert { gate, down, .. } = shares[0].expert;
        let (driver, rows) = (Arc::clone(&self.driver), table.len());
        self.room_inside(rows, gate.n_out)?;
        let out = self
            .buffers
            .room(&*driver, For::Out, 4 * rows * down.n_out)?;
        self.out = out;
        let acts = input.of(gate.format);
        let sent = self.send(&table, acts.n_tok(), &[acts], &[])?;
        let (at, n_tok) = (sent.inputs[0], acts.n_tok());
        let x = Activations { at, n_tok };
        let launches = self.launches(shares, &table, &sent, x, out);
        // SAFETY: as `launches` says; all buffers were made large enough above.
        unsafe { self.begin(launches) }
    }

    fn multiply(&mut self, input: &Input, products: &[Product<'_>]) -> Result<(), Fault> {
        let mut table = Vec::new();
        let mut outs = 0;
        for Product { slot, weight, pick } in products {
            let down = self.slots[slot].at;
            table.extend(pick.iter().map(|token| Row {
                gate: 0,
                up: 0,
                down,
                token: *token,
                inner: *token,
            }));
            outs += pick.len() * weight.n_out;
        }
        let mut inputs: Vec<&Acts> = Vec::new();
        for Product { weight, .. } in products {
            let acts = input.of(weight.format);
            if inputs.iter().all(|known| known.kind() != acts.kind()) {
                inputs.push(acts);
            }
        }
        let out = self.buffers.room(&*self.driver, For::Out, 4 * outs)?;
        let n_tok = inputs.iter().map(|acts| acts.n_tok()).min().unwrap_or(0);
        let sent = self.send(&table, n_tok, &inputs, &[])?;
        self.out = out;

        let (mut row, mut y) = (0, out);
        for Product { weight, pick, .. } in products {
            let its = |acts: &&Acts| acts.kind() == weight.format.act();
            let input = inputs.iter().position(its);
            let input = input.expect("one of each kind was sent");
            let (at, n_tok) = (sent.inputs[input], inputs[input].n_tok());
            let x = Activations { at, n_tok };
            let rows = row..row + pick.len();
            let launch = match pick.len() < FEW {
                true => gemv(weight, sent.rows(&rows), x, y, Stop::NEVER),
                false => gemm(weight, table[row].down, x, sent.tokens(&rows), y),
            };
            // SAFETY: the slot holds this weight, tokens are below `n_tok`, and the buffers were made large enough above.
            unsafe { self.begin([launch])? };
            row = rows.end;
            y += (4 * pick.len() * weight.n_out) as u64;
        }
        Ok(())
    }

    fn finish(&mut self, out: &mut [f32]) -> Result<(), Fault> {
        self.driver.read(self.out, bytemuck::cast_slice_mut(out))
    }

    fn whole(&self, config: &Config) -> Option<u64> {
        Some(super::layers::whole_scratch(config))
    }

    fn put(&mut self, slot: usize, at: u64, bytes: &[u8]) -> Result<(), Fault> {
        let slot = &self.slots[&slot];
        assert!(at + bytes.len() as u64 <= slot.bytes);
        self.driver.write(slot.at + at, bytes)
    }

    fn pass(
        &mut self,
        pass: &Pass<'_>,
        host: &mut dyn Host,
        back: &mut Back,
    ) -> Result<bool, Fault> {
        self.through_layers(pass, host, back)
    }
}

impl<D: Driver> Drop for Gpu<D> {
    fn drop(&mut self) {
        self.closing.store(true, Ordering::Relaxed);
    }
}
