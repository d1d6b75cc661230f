//! A GPU beside the CPU: what every token reads and the most popular experts are there, the others where they were, and both
//! work at once.
//!
//! A layer's tokens are gathered by expert (`experts.rs`); those of experts on the device go there (`Offload::start`),
//! the CPU computes the others meanwhile, and the rows that come back (`Running::finish`) are added up where all rows are:
//! on the CPU, in the order of the ranks. Weights move only in the background, while nobody waits for them, and are used
//! from the pass on that follows their arrival; which ones, `offload/placement.rs` says.
//!
//! A device that has all that every token reads, and room for keys and values, takes whole passes (`offload/whole.rs`): what goes up
//! are the tokens, what comes back are logits and the new keys and values, and the CPU is asked for the experts that are not there.
//!
//! [`Device`] (`offload/device.rs`) is all that is known of a device. One with CUDA is `offload/gpu.rs`: where its slots and buffers
//! are, and, with `offload/layers.rs` for whole passes, in which order kernels (`offload/kernels.rs`) run, over the few calls of a
//! driver (`offload/driver.rs`); `offload/cuda.rs` (feature `cuda`) makes those calls. `offload/software.rs` is a device for tests.
//!
//! A device that runs out of memory gets a smaller set, and one that fails is let go: its rows are computed by the CPU, in
//! the same pass. The kernels keep the order of operations of the CPU's, so that an answer does not depend on where its
//! experts were.

#[cfg(feature = "cuda")]
pub mod cuda;
mod device;
#[cfg(any(all(test, unix), feature = "cuda"))]
mod driver;
#[cfg(all(test, unix))]
mod emulated;
#[cfg(any(all(test, unix), feature = "cuda"))]
pub mod forecast;
#[cfg(any(all(test, unix), feature = "cuda"))]
mod gpu;
#[cfg(any(all(test, unix), feature = "cuda"))]
mod kernels;
#[cfg(any(all(test, unix), feature = "cuda"))]
mod layers;
#[cfg(all(test, unix))]
mod nvrtc;
mod placement;
#[cfg(all(test, unix))]
mod software;
#[cfg(all(test, unix))]
mod tests;
mod whole;

use super::linear::{Input, Job, Weight, matmul};
use super::store::Chosen;
use super::weights::{Expert, Weights};
use super::{Config, Machine};
use device::MOST_OUT;
pub use device::{
    Absent, Back, Device, Fault, Host, Pace, Pass, Product, Seat, Share, Slots, small_at,
};
use placement::{Placement, Step, Where};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, TryLockError};
use whole::Whole;
pub(super) use whole::{Ask, take_in};

/// Who hears of what happened to the device: one line, for people.
pub type Tell = Box<dyn Fn(String) + Send + Sync>;

/// What a device is to be used for.
pub struct Plan {
    /// The device.
    pub device: Box<dyn Device>,
    /// Bytes of its memory to use at most, with what it needs to compute.
    pub memory: u64,
    /// How often a token takes each expert, `(n_layer, n_expert)`, if that is known.
    pub shares: Option<Vec<f32>>,
    /// Tokens whose keys and values there is to be room for, before experts; nothing: for as many as an eighth of the memory
    /// holds.
    pub context: Option<usize>,
    /// Who hears of it.
    pub tell: Tell,
}

/// What is on the device, and what it did.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Held {
    /// Choices of tokens that were to be computed, since the program began …
    pub choices: u64,
    /// … and those that the device computed.
    pub there: u64,
    /// Experts on the device now …
    pub experts: u64,
    /// … of so many …
    pub of: u64,
    /// … which take so many bytes there.
    pub bytes: u64,
    /// Bytes of matrices there that every token reads.
    pub dense: u64,
}

impl Held {
    /// For people; nothing where no choice was made.
    pub fn told(&self) -> Option<String> {
        (self.choices > 0).then(|| {
            format!(
                "GPU: {:.1} GB that every token reads, {} of {} experts in {:.1} GB, {:.0}% of choices",
                self.dense as f64 / 1e9,
                self.experts,
                self.of,
                self.bytes as f64 / 1e9,
                100.0 * self.there as f64 / self.choices as f64,
            )
        })
    }
}

/// The experts of a model and a device that has some of them.
pub(super) struct Offload {
    n_expert: usize,
    /// As they lie in the file, `(n_layer, n_expert)`.
    experts: Vec<Arc<Expert>>,
    tell: Tell,
    /// Held from the start of some work on the device to its end. Passes may come from several threads: one that finds the
    /// device taken leaves it, as a thread of the pool that waits here could be the one that is waited for. `state` is held for
    /// moments, and never while the CPU computes.
    turn: Mutex<()>,
    state: Mutex<State>,
}

struct State {
    /// Nothing, once it is lost, and while a whole pass has it.
    device: Option<Box<dyn Device>>,
    /// A whole pass has it.
    lent: bool,
    /// Whole passes, if the device takes them.
    whole: Option<Whole>,
    /// What every token reads, by the address of its bytes.
    dense: HashMap<usize, Dense>,
    placement: Placement,
    choices: u64,
    there: u64,
}

impl State {
    /// The device is not lost.
    fn alive(&self) -> bool {
        self.device.is_some() || self.lent
    }
}

/// A matrix that every token reads.
struct Dense {
    slot: usize,
    /// Bytes in the file, and of the slot.
    in_file: u64,
    bytes: u64,
    /// It has arrived.
    here: bool,
}

/// Rows that the device works on.
pub(super) struct Running<'a, T> {
    offload: &'a Offload,
    _turn: MutexGuard<'a, ()>,
    chosen: Vec<T>,
    rows: usize,
}

/// A device works on the experts of a layer together, which have the same formats in all usual files: of those that it has kernels
/// for, those that differ from the first stay with the CPU.
fn leave_out_others(bytes: &mut [Option<u64>], experts: &[Arc<Expert>]) {
    let formats = |e: &Expert| e.weights().map(|w| w.format);
    let first = bytes.iter().zip(experts).find(|(bytes, _)| bytes.is_some());
    let Some(first) = first.map(|(_, e)| formats(e)) else {
        return;
    };
    for (bytes, expert) in bytes.iter_mut().zip(experts) {
        if formats(expert) != first {
            *bytes = None;
        }
    }
}

/// Divides `room` bytes of a device: what whole passes take, if it can do those, and the places of weights. `shares`, `context`: as
/// in [`Plan`]; `whole`, `bytes`: what [`Device::whole`] and [`Device::bytes`] say.
fn divide(
    room: u64,
    config: &Config,
    weights: &Weights,
    experts: &[Arc<Expert>],
    shares: Option<Vec<f32>>,
    context: Option<usize>,
    whole: Option<u64>,
    bytes: impl Fn(&[&Weight]) -> Option<u64>,
) -> (Placement, Option<Whole>) {
    let n_expert = config.n_expert;
    let mut of_experts: Vec<_> = experts.iter().map(|e| bytes(&e.weights())).collect();
    let layers = of_experts.chunks_mut(n_expert);
    for (bytes, experts) in layers.zip(experts.chunks(n_expert)) {
        leave_out_others(bytes, experts);
    }
    let even = config.n_used as f32 / n_expert as f32;
    let shares = shares.unwrap_or_else(|| vec![even; experts.len()]);
    let whole = Whole::plan(whole, bytes, config, weights, &of_experts, context, room);
    let room = room - whole.as_ref().map_or(0, Whole::set_aside);
    (Placement::new(n_expert, of_experts, shares, room), whole)
}

impl Offload {
    /// Begins to bring weights to the device: what every token reads, as far as there is room, then experts.
    pub(super) fn new(
        plan: Plan,
        config: &Config,
        weights: &Weights,
        experts: Vec<Arc<Expert>>,
    ) -> Offload {
        let Plan {
            mut device,
            memory,
            shares,
            context,
            tell,
        } = plan;
        let free = device.free();
        let room = free.clone().unwrap_or(0).min(memory);
        let room = room.saturating_sub(device.scratch(config.d_model, config.d_ff));
        let (placement, whole) = divide(
            room,
            config,
            weights,
            &experts,
            shares,
            context,
            device.whole(config),
            |weights| device.bytes(weights),
        );
        // Of the embedding a token reads one row.
        let all = weights.dense();
        let dense = &all[1..];
        let offload = Offload {
            n_expert: config.n_expert,
            experts,
            tell,
            turn: Mutex::new(()),
            state: Mutex::new(State {
                device: Some(device),
                lent: false,
                whole,
                dense: HashMap::new(),
                placement,
                choices: 0,
                there: 0,
            }),
        };
        let mut state = offload.lock();
        match free {
            Ok(_) => {
                offload.bring_small(&mut state, config, weights);
                offload.bring_ring(&mut state);
                offload.bring_dense(&mut state, dense);
                offload.bring(&mut state);
            }
            Err(fault) => offload.fault(&mut state, fault),
        }
        drop(state);
        offload
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state
            .lock()
            .unwrap_or_else(|broken| broken.into_inner())
    }

    /// The device, if nobody else uses it just now.
    fn turn(&self) -> Option<MutexGuard<'_, ()>> {
        match self.turn.try_lock() {
            Ok(turn) => Some(turn),
            Err(TryLockError::Poisoned(broken)) => Some(broken.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    /// A pass begins: what has arrived is used from now on, and what is worth it is brought. Between two calls the set of
    /// experts on the device only becomes smaller.
    pub(super) fn begin(&self) {
        self.take_in(false);
    }

    /// Waits until everything that there is room for is on the device.
    pub(super) fn settle(&self) {
        self.take_in(true);
    }

    fn take_in(&self, wait: bool) {
        let Some(_turn) = self.turn() else { return };
        let mut guard = self.lock();
        let state = &mut *guard;
        let Some(device) = &mut state.device else {
            return;
        };
        match device.filled(wait) {
            Ok(slots) => {
                for slot in slots {
                    match state.dense.values_mut().find(|d| d.slot == slot) {
                        Some(dense) => dense.here = true,
                        None => state.placement.arrived(slot),
                    }
                }
                self.bring(state);
            }
            Err(fault) => self.fault(state, fault),
        }
    }

    /// Begins to bring what every token reads.
    fn bring_dense(&self, state: &mut State, weights: &[&Weight]) {
        for weight in weights {
            let Some(device) = &mut state.device else {
                return;
            };
            let key = weight.bytes.as_ptr() as usize;
            let Some(bytes) = device.bytes(&[weight]) else {
                continue;
            };
            // A tied head is the embedding, which may be there twice.
            if state.dense.contains_key(&key) || !state.placement.reserve(bytes) {
                continue;
            }
            let slot = device.make(bytes);
            match slot.and_then(|slot| device.fill(slot, &[weight]).map(|()| slot)) {
                Ok(slot) => {
                    let dense = Dense {
                        slot,
                        in_file: weight.bytes.len() as u64,
                        bytes,
                        here: false,
                    };
                    state.dense.insert(key, dense);
                }
                Err(fault) => {
                    state.placement.release(bytes);
                    return self.fault(state, fault);
                }
            }
        }
    }

    /// Computes `jobs`, which have one input: the device those whose weights it has, the CPU the others meanwhile.
    pub(super) fn multiply(&self, machine: &Machine, mut jobs: Vec<Job<'_>>) {
        let turn = self.turn();
        let mut there = match &turn {
            Some(_) => self.begin_products(&mut jobs),
            None => Vec::new(),
        };
        if !jobs.is_empty() {
            matmul(machine, &mut jobs);
        }
        if there.is_empty() || self.finish_products(&mut there) {
            return;
        }
        matmul(machine, &mut there);
    }

    /// Has the device begin with those of `jobs` that it has, takes them off and returns them.
    fn begin_products<'j>(&self, jobs: &mut Vec<Job<'j>>) -> Vec<Job<'j>> {
        let mut guard = self.lock();
        let state = &mut *guard;
        let Some(device) = &mut state.device else {
            return Vec::new();
        };
        let dense = &state.dense;
        let slot = |job: &Job<'_>| {
            let dense = dense.get(&(job.w.bytes.as_ptr() as usize))?;
            let worth = !job.pick.is_empty() && job.y.len() <= MOST_OUT;
            (dense.here && worth).then_some(dense.slot)
        };
        let products: Vec<Product<'_>> = jobs
            .iter()
            .filter_map(|job| {
                Some(Product {
                    slot: slot(job)?,
                    weight: job.w,
                    pick: job.pick,
                })
            })
            .collect();
        let Some(first) = jobs.first().filter(|_| !products.is_empty()) else {
            return Vec::new();
        };
        match device.multiply(first.x, &products) {
            Ok(()) => {
                let all = std::mem::take(jobs).into_iter();
                let (there, rest) = all.partition(|job| slot(job).is_some());
                *jobs = rest;
                return there;
            }
            // There is room for it the next time.
            Err(Fault::Full) => self.shrink(state),
            Err(lost) => self.fault(state, lost),
        }
        Vec::new()
    }

    /// Waits for the device and puts its results where they belong; false if it failed.
    fn finish_products(&self, there: &mut [Job<'_>]) -> bool {
        let mut state = self.lock();
        let Some(device) = &mut state.device else {
            return false;
        };
        let mut out = vec![0.0; there.iter().map(|job| job.y.len()).sum()];
        match device.finish(&mut out) {
            Ok(()) => {
                let mut out = &out[..];
                for job in there {
                    let (its, more) = out.split_at(job.y.len());
                    job.y.copy_from_slice(its);
                    out = more;
                }
                true
            }
            Err(fault) => {
                self.fault(&mut state, fault);
                false
            }
        }
    }

    /// Begins the steps that there are to do.
    fn bring(&self, state: &mut State) {
        while let Some(step) = state.placement.next() {
            let Some(device) = &mut state.device else {
                return;
            };
            let (key, slot) = match step {
                Step::Add(key) => (
                    key,
                    device.make(state.placement.bytes(key).expect("only what it runs")),
                ),
                Step::Exchange { comes, goes } => match state.placement.place(goes) {
                    Where::Here(slot) => (comes, Ok(slot)),
                    _ => unreachable!("only what is there can go"),
                },
            };
            let begun = slot.and_then(|slot| {
                device
                    .fill(slot, &self.experts[key].weights())
                    .map(|()| slot)
            });
            match begun {
                Ok(slot) => state.placement.begun(step, slot),
                Err(fault) => self.fault(state, fault),
            }
        }
    }

    /// Makes the best of it.
    fn fault(&self, state: &mut State, fault: Fault) {
        match fault {
            Fault::Full => {
                state.placement.full();
                let gb = state.placement.taken() as f64 / 1e9;
                (self.tell)(format!(
                    "the GPU has memory for {gb:.1} GB of weights only; the others stay with the CPU"
                ));
            }
            Fault::Lost(why) => {
                state.device = None;
                state.whole = None;
                (self.tell)(format!("the GPU is lost, the CPU goes on alone: {why}"));
            }
        }
    }

    /// What a device computes with matters more than one expert more: the least popular one goes. Where there is none, whole passes
    /// end, and what only they need.
    fn shrink(&self, state: &mut State) {
        let Some(device) = &mut state.device else {
            return;
        };
        if let Some(slot) = state.placement.shrink() {
            device.unmake(slot);
            self.fault(state, Fault::Full);
        } else if let Some(whole) = state.whole.take() {
            whole.end(&mut **device);
            let line =
                "the GPU has no memory for what passes need there: it multiplies matrices only";
            (self.tell)(line.to_string());
        }
    }

    /// Whether an expert will be computed by the device, unless it fails.
    pub(super) fn holds(&self, layer: usize, expert: usize) -> bool {
        let state = self.lock();
        let place = state.placement.place(layer * self.n_expert + expert);
        state.alive() && matches!(place, Where::Here(_))
    }

    /// Bytes of the file that every token reads, and that the device reads.
    pub(super) fn dense(&self) -> u64 {
        let state = self.lock();
        let here = state.dense.values().filter(|d| d.here && state.alive());
        here.map(|d| d.in_file).sum()
    }

    /// What is on the device, and what it did.
    pub(super) fn held(&self) -> Held {
        let state = self.lock();
        let (here, _) = state.placement.here();
        let lost = !state.alive();
        let here_too = state.dense.values().filter(|d| d.here && !lost);
        let dense = here_too.map(|d| d.bytes).sum();
        let reserved: u64 = state.dense.values().map(|d| d.bytes).sum();
        Held {
            dense,
            choices: state.choices,
            there: state.there,
            experts: if lost { 0 } else { here as u64 },
            of: self.experts.len() as u64,
            bytes: if lost {
                0
            } else {
                state.placement.taken() - reserved
            },
        }
    }

    /// Has the device begin with those of `rest` that it has, and takes them off. `n_tok` tokens go through `layer`, and
    /// `pick` says which of them an expert has.
    pub(super) fn start<'p, T: Chosen>(
        &self,
        layer: usize,
        n_tok: usize,
        input: &Input,
        rest: &mut Vec<T>,
        pick: impl Fn(&T) -> &'p [u32],
    ) -> Option<Running<'_, T>> {
        let turn = self.turn()?;
        let mut guard = self.lock();
        let state = &mut *guard;
        state.device.as_ref()?;
        let mut counts = vec![0; self.n_expert];
        for chosen in rest.iter() {
            counts[chosen.expert()] = pick(chosen).len();
        }
        state.placement.learn(layer, &counts, n_tok);
        state.choices += counts.iter().sum::<usize>() as u64;
        loop {
            let key = |chosen: &T| layer * self.n_expert + chosen.expert();
            let slot = |chosen: &T| match state.placement.place(key(chosen)) {
                Where::Here(slot) => Some(slot),
                _ => None,
            };
            let shares: Vec<Share<'_>> = rest
                .iter()
                .filter_map(|chosen| {
                    Some(Share {
                        slot: slot(chosen)?,
                        expert: &self.experts[key(chosen)],
                        pick: pick(chosen),
                    })
                })
                .collect();
            if shares.is_empty() {
                return None;
            }
            match state.device.as_mut()?.start(input, &shares) {
                Ok(()) => {
                    let rows = shares.iter().map(|s| s.pick.len()).sum();
                    let mut chosen = Vec::new();
                    for one in std::mem::take(rest) {
                        match slot(&one) {
                            Some(_) => chosen.push(one),
                            None => rest.push(one),
                        }
                    }
                    return Some(Running {
                        offload: self,
                        _turn: turn,
                        chosen,
                        rows,
                    });
                }
                Err(Fault::Full) => self.shrink(state),
                Err(fault) => {
                    self.fault(state, fault);
                    return None;
                }
            }
        }
    }
}

impl<T> Running<'_, T> {
    /// Waits for the device. Returns those whose rows `(rows, d)` are in `out` now, in their order.
    ///
    /// # Errors
    /// Those that the CPU has to compute after all.
    pub(super) fn finish(self, d: usize, out: &mut Vec<f32>) -> Result<Vec<T>, Vec<T>> {
        let Running {
            offload,
            _turn,
            chosen,
            rows,
        } = self;
        let mut state = offload.lock();
        out.resize(rows * d, 0.0);
        let Some(device) = &mut state.device else {
            return Err(chosen);
        };
        match device.finish(out) {
            Ok(()) => {
                state.there += rows as u64;
                Ok(chosen)
            }
            Err(fault) => {
                offload.fault(&mut state, fault);
                Err(chosen)
            }
        }
    }
}
