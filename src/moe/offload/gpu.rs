//! A device with CUDA's kernels (`offload.cu`): where its buffers are, and which kernels run in which order.

use super::{Device, Fault, Share};
use crate::moe::linear::Input;
use crate::moe::weights::Expert;
use crate::pool::apart;
use crate::quant::Format;
use crate::quant::act::{ActKind, CHUNK, Chunk};
use bytemuck::{Pod, Zeroable};
use std::collections::HashMap;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::Arc;

/// The kernels.
pub(super) const SOURCE: &str = include_str!("../offload.cu");
/// Without these their results are not the CPU's.
#[cfg_attr(not(feature = "cuda"), allow(dead_code))]
pub(super) const OPTIONS: [&str; 2] = ["--fmad=false", "--std=c++17"];
/// Threads of a block, in every kernel.
pub(super) const THREADS: u32 = 128;

/// Experts with fewer tokens than this go token by token, which reads their weights for each (from the device's cache after the
/// first), others tile by tile.
const FEW: usize = 8;
/// Rows that go through the device's buffers together.
const WAVE: usize = 1024;
/// Matrices of a slot begin at multiples of this.
const ALIGN: usize = 256;
/// Outputs of a block: rows of `expert_up` and `expert_down`, rows and tokens of `gemm`, chunks of `quantize`.
const ROWS: usize = 16;
const TILE: usize = 64;
const CHUNKS: usize = 4;

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

    /// Copies to the device beside all of the above, which go on meanwhile, and waits for it. Called from a thread of its own.
    fn stage(&self, at: u64, bytes: &[u8]) -> Result<(), Fault>;
}

/// An argument of a kernel.
#[derive(Clone, Copy, Debug)]
pub(super) enum Arg {
    /// A pointer, or a long number.
    Long(u64),
    /// A number.
    Int(i32),
}

/// `Row` of offload.cu.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Row {
    gate: u64,
    up: u64,
    down: u64,
    token: u32,
    unused: u32,
}

/// A device of some driver.
pub(super) struct Gpu<D> {
    driver: Arc<D>,
    slots: HashMap<usize, Slot>,
    next: usize,
    buffers: Buffers,
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

/// An expert on its way.
struct Copy {
    slot: usize,
    at: u64,
    expert: Arc<Expert>,
}

/// Buffers that grow when they have to.
#[derive(Default)]
struct Buffers([(u64, usize); 8]);

/// What [`Buffers`] are for.
#[derive(Clone, Copy)]
enum For {
    /// Activations of the input.
    Input,
    /// [`Row`]s.
    Table,
    /// Tokens of each row.
    Pick,
    /// `(rows of a wave, d_ff)`
    Gate,
    Up,
    /// The same as activations.
    Inner,
    /// `(rows, d_model)`
    Out,
}

impl Buffers {
    /// A buffer of at least so many bytes; what was in it is lost if it has to grow.
    fn room(&mut self, driver: &impl Driver, what: For, bytes: usize) -> Result<u64, Fault> {
        let (at, have) = &mut self.0[what as usize];
        if *have < bytes {
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

/// What is launched together: rows of one large share, or of several small ones, one behind the other.
struct Group {
    rows: Range<usize>,
    /// The slot and the first row of a large share in the list of picks.
    large: Option<usize>,
}

/// Where a matrix of an expert is in its slot: gate, up, down.
fn parts(expert: &Expert) -> [u64; 3] {
    let [gate, up, _] = expert
        .weights()
        .map(|w| w.bytes.len().next_multiple_of(ALIGN) as u64);
    [0, gate, gate + up]
}

/// Whether there are kernels for a format.
fn runs(format: Format) -> bool {
    use Format::*;
    matches!(format, Q4_0 | Q8_0 | Q4_K | Q5_K | Q6_K)
}

fn blocks(n: usize, of: usize) -> u32 {
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
                let Copy { slot, at, expert } = job;
                let parts = expert.weights().into_iter().zip(parts(&expert));
                let copied = parts
                    .map(|(w, part)| its_driver.stage(at + part, &w.bytes))
                    .collect();
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
            out: 0,
            copies,
            copied,
            copying: 0,
            closing,
        })
    }

    /// What the kernels of one layer need to know, and all rows as they want them.
    fn rows(&self, shares: &[Share<'_>]) -> (Vec<Row>, Vec<u32>) {
        let (mut table, mut picks) = (Vec::new(), Vec::new());
        for share in shares {
            let at = self.slots[&share.slot].at;
            let [gate, up, down] = parts(share.expert).map(|part| at + part);
            for token in share.pick {
                table.push(Row {
                    gate,
                    up,
                    down,
                    token: *token,
                    unused: 0,
                });
            }
            picks.extend_from_slice(share.pick);
        }
        (table, picks)
    }

    /// # Safety
    /// As for [`Driver::launch`].
    unsafe fn launch(
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
        // Gate, up, and gate as activations; input, output and what else there is of a few thousand rows; the kernels.
        let wave = WAVE * 10 * d_ff;
        let rows = 4096 * (6 * d_model + 64);
        (wave + rows + (64 << 20)) as u64
    }

    fn bytes(&self, expert: &Expert) -> Option<u64> {
        let Expert { gate, up, down } = expert;
        let known = gate.format == up.format && runs(gate.format) && runs(down.format);
        known.then(|| parts(expert)[2] + down.bytes.len().next_multiple_of(ALIGN) as u64)
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

    fn fill(&mut self, slot: usize, expert: &Arc<Expert>) -> Result<(), Fault> {
        let Slot { at, bytes } = self.slots[&slot];
        assert!(self.bytes(expert).is_some_and(|need| need <= bytes));
        let expert = Arc::clone(expert);
        self.copying += 1;
        self.copies
            .send(Copy { slot, at, expert })
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
        let Expert { gate, down, .. } = shares[0].expert;
        let (d, d_ff) = (gate.n_in, gate.n_out);
        let (up_format, down_format) = (gate.format, down.format);
        for share in shares {
            let Expert { gate, up, down } = share.expert;
            assert!(gate.format == up_format && up.format == up_format);
            assert!(down.format == down_format && (gate.n_in, down.n_in) == (d, d_ff));
        }
        let acts = input.of(up_format);
        let (n_tok, chunks) = (acts.n_tok(), acts.all_chunks());
        let (table, picks) = self.rows(shares);
        assert!(picks.iter().all(|t| (*t as usize) < n_tok));
        let n_rows = table.len();
        let wave = n_rows.min(WAVE);
        let inner_chunks = d_ff.div_ceil(CHUNK);

        let driver = Arc::clone(&self.driver);
        let driver = &*driver;
        let b = &mut self.buffers;
        let x = b.room(driver, For::Input, size_of_val(chunks))?;
        let rows = b.room(driver, For::Table, n_rows * size_of::<Row>())?;
        let pick = b.room(driver, For::Pick, 4 * n_rows)?;
        let gate = b.room(driver, For::Gate, 4 * wave * d_ff)?;
        let up = b.room(driver, For::Up, 4 * wave * d_ff)?;
        let inner = b.room(driver, For::Inner, wave * inner_chunks * size_of::<Chunk>())?;
        let out = b.room(driver, For::Out, 4 * n_rows * d)?;
        self.out = out;
        driver.write(x, bytemuck::cast_slice(chunks))?;
        driver.write(rows, bytemuck::cast_slice(&table))?;
        driver.write(pick, bytemuck::cast_slice(&picks))?;

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
                // SAFETY: the arguments are those of `offload.cu`. The table's addresses are of slots that hold experts of
                // these formats and shapes; its tokens are below `n_tok`; all buffers were made large enough above.
                unsafe {
                    match large {
                        None => {
                            let args =
                                [table_row, Long(x), inner_row, int(n_tok), int(d), int(d_ff)];
                            let grid = [blocks(d_ff, ROWS), count as u32];
                            self.launch("expert_up", up_format, grid, &args)?;
                        }
                        Some(_) => {
                            let weights = table[r.start];
                            let grid = [blocks(d_ff, TILE), blocks(count, TILE)];
                            let up_row = at(up, inside * d_ff, 4);
                            for (w, y) in [(weights.gate, inner_row), (weights.up, up_row)] {
                                let (m, k) = (int(d_ff), int(d));
                                let (x, pick) = (Long(x), at(pick, r.start, 4));
                                let args =
                                    [Long(w), x, pick, Int(0), y, int(n_tok), int(count), m, k];
                                self.launch("gemm", up_format, grid, &args)?;
                            }
                            let n = count * d_ff;
                            let args = [inner_row, up_row, Long(n as u64)];
                            let grid = [blocks(n, 8 * THREADS as usize), 1];
                            driver.launch("silu_mul_all", grid, &args)?;
                        }
                    }
                }
            }
            let quantize = match down_format.act() {
                ActKind::Q8 => "quantize_32",
                _ => "quantize_256",
            };
            let args = [Long(gate), Long(inner), int(n), int(d_ff)];
            let grid = [blocks(inner_chunks, CHUNKS), n as u32];
            // SAFETY: as above.
            unsafe { driver.launch(quantize, grid, &args)? };
            for Group { rows: r, large } in &wave {
                let (inside, count) = (r.start - base, r.len());
                let y = at(out, r.start * d, 4);
                // SAFETY: as above.
                unsafe {
                    match large {
                        None => {
                            let table_row = at(rows, r.start, size_of::<Row>());
                            let its_inner = at(inner, inside, size_of::<Chunk>());
                            let args = [table_row, its_inner, y, int(n), int(d_ff), int(d)];
                            let grid = [blocks(d, ROWS), count as u32];
                            self.launch("expert_down", down_format, grid, &args)?;
                        }
                        Some(_) => {
                            let w = Long(table[r.start].down);
                            let (m, k) = (int(d), int(d_ff));
                            let (x, base) = (Long(inner), int(inside));
                            let args = [w, x, Long(0), base, y, int(n), int(count), m, k];
                            let grid = [blocks(d, TILE), blocks(count, TILE)];
                            self.launch("gemm", down_format, grid, &args)?;
                        }
                    }
                }
            }
        }
        Ok(())
    }

    fn finish(&mut self, out: &mut [f32]) -> Result<(), Fault> {
        self.driver.read(self.out, bytemuck::cast_slice_mut(out))
    }
}

impl<D> Drop for Gpu<D> {
    fn drop(&mut self) {
        self.closing.store(true, Ordering::Relaxed);
    }
}

#[cfg(test)]
impl<D> Gpu<D> {
    /// For tests.
    pub(super) fn driver(&self) -> &D {
        &self.driver
    }
}
