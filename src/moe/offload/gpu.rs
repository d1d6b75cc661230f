//! A device with CUDA's kernels (`offload.cu`): where its buffers are, and which kernels run in which order.

use super::layers::Lasting;
use super::{Back, Device, Fault, Host, MOST_OUT, Pass, Product, Share};
use crate::gguf::Bytes;
use crate::moe::Config;
use crate::moe::linear::{Input, Weight};
use crate::moe::weights::Expert;
use crate::pool::apart;
use crate::quant::Format;
use crate::quant::act::{ActKind, Acts, CHUNK, Chunk};
use bytemuck::{Pod, Zeroable};
use std::collections::HashMap;
use std::ffi::c_void;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};

/// The kernels.
pub(super) const SOURCE: &str = include_str!("../offload.cu");
/// Without these their results are not the CPU's.
pub(super) const OPTIONS: [&str; 2] = ["--fmad=false", "--std=c++17"];
/// Threads of a block, in every kernel.
pub(super) const THREADS: u32 = 128;

/// Experts with fewer tokens than this go token by token, which reads their weights for each (from the device's cache after the
/// first), others tile by tile.
pub(super) const FEW: usize = 8;
/// Rows that go through the device's buffers together.
pub(super) const WAVE: usize = 1024;
/// Marks of a driver: experts on their way through the device at a time.
pub(super) const MARKS: usize = 3;
/// Matrices of a slot begin at multiples of this.
pub(super) const ALIGN: usize = 256;
/// Outputs of a block: rows of `expert_up` and `gemv`, rows and tokens of `gemm`, chunks of `quantize`.
pub(super) const ROWS: usize = 16;
pub(super) const TILE: usize = 64;
pub(super) const CHUNKS: usize = 4;

/// The calls that a device takes. Those that return at once happen in the order in which they were made.
pub(super) trait Driver: Send + Sync + 'static {
    /// For people.
    fn name(&self) -> String;

    /// Bytes of memory that are free.
    fn free(&self) -> Result<u64, Fault>;

    /// Memory; stays valid until it is given back, or all of the driver ends.
    fn alloc(&self, bytes: usize) -> Result<u64, Fault>;

    /// Gives memory back that nothing uses.
    fn dealloc(&self, at: u64);

    /// Copies to the device. May return before that has happened, but is done with `bytes` then.
    fn write(&self, at: u64, bytes: &[u8]) -> Result<(), Fault>;

    /// Runs a kernel of `offload.cu`; may return before that has happened. `grid`: blocks.
    ///
    /// # Safety
    /// `args` are those of the kernel, and what it reads and writes lies in memory of this driver.
    unsafe fn launch(&self, kernel: &str, grid: [u32; 2], args: &[Arg]) -> Result<(), Fault>;

    /// Copies from the device, after everything before.
    fn read(&self, at: u64, out: &mut [u8]) -> Result<(), Fault>;

    /// Launches of this thread are noted from now on and not done, until `recorded`.
    fn record(&self) -> Result<(), Fault>;

    /// Ends what `record` began. Returns what it was, for `replay`.
    fn recorded(&self) -> Result<u64, Fault>;

    /// Does what was recorded, with the same arguments and whatever the memory holds now.
    fn replay(&self, graph: u64) -> Result<(), Fault>;

    /// Lets a record go that is not used any more.
    fn forget(&self, graph: u64);

    /// Sets mark `i`, one of [`MARKS`], behind everything that was begun.
    fn mark(&self, i: usize) -> Result<(), Fault>;

    /// Waits until everything before mark `i` has ended; not at all, if it was never set.
    fn reached(&self, i: usize) -> Result<(), Fault>;

    /// Copies to the device beside all of the above, which go on meanwhile, and waits for it. Called from a thread of its own.
    fn stage(&self, at: u64, bytes: &[u8]) -> Result<(), Fault>;
}

/// A kernel that is to run.
pub(super) struct Launch {
    pub(super) kernel: String,
    pub(super) grid: [u32; 2],
    pub(super) args: Vec<Arg>,
}

/// An argument of a kernel.
#[derive(Clone, Copy, Debug)]
pub(super) enum Arg {
    /// A pointer, or a long number.
    Long(u64),
    /// A number.
    Int(i32),
}

impl Arg {
    /// Where the arguments are, as drivers want to know it: pointers to values that live as long as `args`.
    pub(super) fn pointers(args: &[Arg]) -> Vec<*mut c_void> {
        let pointer = |arg: &Arg| match arg {
            Arg::Long(x) => std::ptr::from_ref(x) as *mut c_void,
            Arg::Int(x) => std::ptr::from_ref(x) as *mut c_void,
        };
        args.iter().map(pointer).collect()
    }
}

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
    copies: Sender<Copy>,
    copied: Receiver<(usize, Result<(), Fault>)>,
    /// Copies on their way.
    copying: usize,
    /// Nobody wants what is on its way any more.
    closing: Arc<AtomicBool>,
}

/// Memory for an expert.
#[derive(Clone, Copy)]
struct Slot {
    at: u64,
    bytes: u64,
}

/// Matrices on their way, and where to.
struct Copy {
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

/// What is launched together: rows of one large share, or of several small ones, one behind the other.
struct Group {
    rows: Range<usize>,
    /// The slot and the first row of a large share in the list of picks.
    large: Option<usize>,
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

/// Formats that there are kernels for; experts of others stay with the CPU.
const FORMATS: [Format; 5] = [
    Format::Q4_0,
    Format::Q8_0,
    Format::Q4_K,
    Format::Q5_K,
    Format::Q6_K,
];

/// The names of all kernels.
pub(super) fn kernels() -> Vec<String> {
    let plain = [
        "quantize_32",
        "quantize_256",
        "silu_mul_all",
        "norm_rows",
        "rotate_heads",
        "score_keys",
        "attend_values",
        "route_tokens",
        "combine_rows",
    ];
    let by_format = ["expert_up", "gemv", "dense", "gemm"];
    let of = |kernel: &&str| FORMATS.map(|format| format!("{kernel}_{}", format.name()));
    let all = by_format.iter().flat_map(of);
    plain.map(String::from).into_iter().chain(all).collect()
}

/// Blocks for `n` outputs.
pub(super) fn blocks(n: usize, of: usize) -> u32 {
    n.div_ceil(of) as u32
}

impl<D: Driver> Gpu<D> {
    /// A device without slots.
    pub(super) fn new(driver: D) -> Result<Gpu<D>, Fault> {
        let driver = Arc::new(driver);
        let (copies, jobs) = channel::<Copy>();
        let (done, copied) = channel();
        let closing = Arc::new(AtomicBool::new(false));
        let (its_driver, its_closing) = (Arc::clone(&driver), Arc::clone(&closing));
        // One after the other: what is most wanted comes first, and the CPU has other things to do.
        let copy = move || {
            for job in jobs {
                if its_closing.load(Ordering::Relaxed) {
                    return;
                }
                let Copy { slot, parts } = job;
                let mut parts = parts.into_iter();
                let copied = parts.try_for_each(|(at, bytes)| its_driver.stage(at, &bytes));
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

    /// # Safety
    /// As for [`Driver::launch`].
    pub(super) unsafe fn launch(
        &self,
        kernel: &str,
        format: Format,
        grid: [u32; 2],
        args: &[Arg],
    ) -> Result<(), Fault> {
        let kernel = format!("{kernel}_{}", format.name());
        // SAFETY: the caller's promise, handed on.
        unsafe { self.driver.launch(&kernel, grid, args) }
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
    /// activations of `n_tok` tokens; `out`: `(rows, d_model)`.
    pub(super) fn launches(
        &self,
        shares: &[Share<'_>],
        table: &[Row],
        sent: &Sent,
        x: u64,
        n_tok: usize,
        out: u64,
    ) -> Vec<Launch> {
        let Expert { gate, down, .. } = shares[0].expert;
        let (d, d_ff) = (gate.n_in, gate.n_out);
        let (up_format, down_format) = (gate.format, down.format);
        for share in shares {
            let Expert { gate, up, down } = share.expert;
            assert!(gate.format == up_format && up.format == up_format);
            assert!(down.format == down_format && (gate.n_in, down.n_in) == (d, d_ff));
        }
        let inner_chunks = d_ff.div_ceil(CHUNK);
        let mut launches = Vec::new();
        let mut launch = |kernel: &str, format: Option<Format>, grid, args: &[Arg]| {
            let suffix = format.map_or(String::new(), |f| format!("_{}", f.name()));
            launches.push(Launch {
                kernel: format!("{kernel}{suffix}"),
                grid,
                args: args.to_vec(),
            });
        };
        let [gate, up, inner] = [For::Gate, For::Up, For::Inner].map(|what| self.buffers.at(what));
        let (rows, pick) = (sent.table, sent.picks);

        use Arg::{Int, Long};
        let int = |n: usize| Int(i32::try_from(n).expect("sizes of a model"));
        let at = |base: u64, elements: usize, size: usize| Long(base + (elements * size) as u64);
        for wave in waves(shares) {
            let Some((first, last)) = wave.first().zip(wave.last()) else {
                continue;
            };
            let (base, n) = (first.rows.start, last.rows.end - first.rows.start);
            for Group { rows: r, large } in &wave {
                let (inside, count) = (r.start - base, r.len());
                let table_row = at(rows, r.start, size_of::<Row>());
                let inner_row = at(gate, inside * d_ff, 4);
                match large {
                    None => {
                        let args = [
                            table_row,
                            Long(x),
                            inner_row,
                            int(n_tok),
                            int(d),
                            int(d_ff),
                            Long(0),
                            Int(0),
                        ];
                        let grid = [blocks(d_ff, ROWS), count as u32];
                        launch("expert_up", Some(up_format), grid, &args);
                    }
                    Some(_) => {
                        let weights = table[r.start];
                        let grid = [blocks(d_ff, TILE), blocks(count, TILE)];
                        let up_row = at(up, inside * d_ff, 4);
                        for (w, y) in [(weights.gate, inner_row), (weights.up, up_row)] {
                            let (m, k) = (int(d_ff), int(d));
                            let (x, pick) = (Long(x), at(pick, r.start, 4));
                            let args = [Long(w), x, pick, Int(0), y, int(n_tok), int(count), m, k];
                            launch("gemm", Some(up_format), grid, &args);
                        }
                        let n = count * d_ff;
                        let args = [inner_row, up_row, Long(n as u64)];
                        let grid = [blocks(n, 8 * THREADS as usize), 1];
                        launch("silu_mul_all", None, grid, &args);
                    }
                }
            }
            let quantize = quantize(down_format.act());
            let args = [Long(gate), Long(inner), int(n), int(d_ff), Long(0), Int(0)];
            let grid = [blocks(inner_chunks, CHUNKS), n as u32];
            launch(quantize, None, grid, &args);
            for Group { rows: r, large } in &wave {
                let (inside, count) = (r.start - base, r.len());
                let y = at(out, r.start * d, 4);
                match large {
                    None => {
                        let table_row = at(rows, r.start, size_of::<Row>());
                        let args = [
                            table_row,
                            Long(inner),
                            y,
                            int(n),
                            int(d_ff),
                            int(d),
                            Long(0),
                            Int(0),
                        ];
                        let grid = [blocks(d, ROWS), count as u32];
                        launch("gemv", Some(down_format), grid, &args);
                    }
                    Some(_) => {
                        let w = Long(table[r.start].down);
                        let (m, k) = (int(d), int(d_ff));
                        let (x, base) = (Long(inner), int(inside));
                        let args = [w, x, Long(0), base, y, int(n), int(count), m, k];
                        let grid = [blocks(d, TILE), blocks(count, TILE)];
                        launch("gemm", Some(down_format), grid, &args);
                    }
                }
            }
        }
        launches
    }
}

/// Begins all of `launches`.
///
/// # Safety
/// As for [`Driver::launch`].
pub(super) unsafe fn begin(driver: &impl Driver, launches: &[Launch]) -> Result<(), Fault> {
    launches.iter().try_for_each(|launch| {
        // SAFETY: the caller's promise, handed on.
        unsafe { driver.launch(&launch.kernel, launch.grid, &launch.args) }
    })
}

/// The kernel that makes activations.
pub(super) fn quantize(kind: ActKind) -> &'static str {
    match kind {
        ActKind::Q8 => "quantize_32",
        _ => "quantize_256",
    }
}

/// Cuts rows into waves of groups: small shares together, large ones apart and in parts if they have to be.
fn waves(shares: &[Share<'_>]) -> Vec<Vec<Group>> {
    let mut waves: Vec<Vec<Group>> = Vec::new();
    let (mut row, mut room) = (0, 0);
    for share in shares {
        let end = row + share.pick.len();
        let large = (share.pick.len() >= FEW).then_some(share.slot);
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
                Some(last) if large.is_none() && last.large.is_none() => last.rows.end = rows.end,
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
            .send(Copy { slot, parts })
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
        let (x, n_tok) = (sent.inputs[0], acts.n_tok());
        let launches = self.launches(shares, &table, &sent, x, n_tok, out);
        // SAFETY: as `launches` says; all buffers were made large enough above.
        unsafe { begin(&*self.driver, &launches) }
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

        use Arg::{Int, Long};
        let int = |n: usize| Int(i32::try_from(n).expect("sizes of a model"));
        let (mut row, mut y) = (0, out);
        for Product {
            weight: w,
            pick: its,
            ..
        } in products
        {
            let input = inputs.iter().position(|acts| acts.kind() == w.format.act());
            let input = input.expect("one of each kind was sent");
            let (x, n_tok) = (sent.inputs[input], inputs[input].n_tok());
            let (count, m, k) = (its.len(), w.n_out, w.n_in);
            let table_row = sent.table + (row * size_of::<Row>()) as u64;
            // SAFETY: the arguments are those of `offload.cu`; the slot holds this weight, tokens are below `n_tok`, and the
            // buffers were made large enough above.
            unsafe {
                if count < FEW {
                    let args = [
                        Long(table_row),
                        Long(x),
                        Long(y),
                        int(n_tok),
                        int(k),
                        int(m),
                        Long(0),
                        Int(0),
                    ];
                    let grid = [blocks(m, ROWS), count as u32];
                    self.launch("gemv", w.format, grid, &args)?;
                } else {
                    let (weights, pick) =
                        (Long(table[row].down), Long(sent.picks + 4 * row as u64));
                    let sizes = [int(n_tok), int(count), int(m), int(k)];
                    let args = [&[weights, Long(x), pick, Int(0), Long(y)][..], &sizes].concat();
                    let grid = [blocks(m, TILE), blocks(count, TILE)];
                    self.launch("gemm", w.format, grid, &args)?;
                }
            }
            row += count;
            y += (4 * count * m) as u64;
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

#[cfg(test)]
impl<D: Driver> Gpu<D> {
    /// For tests.
    pub(super) fn driver(&self) -> &D {
        &self.driver
    }
}
