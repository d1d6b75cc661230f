//! Where an expert's bytes are right now: in the mapped file, or in a slot of memory that was read from it.
//!
//! A model that memory can hold is used where it is mapped; the store only hands out references then. With a budget,
//! what every token reads is read into memory once and the rest of the budget becomes slots, each for one expert.
//! A pass says which experts its layer wants (`Store::want`), works on those that are there (`Store::ready`) while
//! the others are read, and says which the next layer will probably want (`Store::foresee`): those are read when the
//! disk has nothing more urgent to do. Which slot gives way, `store/popularity.rs` says. Reads go past the page cache,
//! in large pieces, several at a time (`store/reads.rs`).
//!
//! The bytes are the same wherever they are, and so are the results.

mod popularity;
mod reads;

use super::Config;
use super::offload::{Held, Offload, Plan};
use super::weights::{Expert, Weights};
use crate::error::{Error, Result};
use crate::gguf::Source;
use crate::memory;
use crate::pool::{Background, apart};
use memmap2::MmapMut;
use popularity::Popularity;
use reads::InSlot;
use std::collections::VecDeque;
use std::ops::AddAssign;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

/// Threads that read what a pass waits for: enough pieces on their way to keep a disk busy.
const READERS: usize = 8;
/// Threads that read ahead.
const AHEAD: usize = 4;
/// What is kept free of the budget, for what nobody counts.
const MARGIN: u64 = 24 << 20;
/// When less than this is left for all programs of the machine, slots are given back.
const RESERVE: u64 = 384 << 20;
/// How often the machine's memory is looked at.
const LOOK: Duration = Duration::from_millis(200);

/// The experts of a model.
pub struct Store {
    sources: Vec<Arc<Source>>,
    /// As they lie in the file, `(n_layer, n_expert)`.
    experts: Vec<Arc<Expert>>,
    n_expert: usize,
    pager: Option<Pager>,
    /// A GPU that has some of them too, and computes with those.
    offload: Option<Offload>,
}

/// What the store did, since the program began.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Reads {
    /// Experts that passes wanted, one for each layer and expert that any of its tokens chose.
    pub wanted: u64,
    /// Those that were in memory when they were wanted.
    pub hits: u64,
    /// Bytes read from the disk.
    pub bytes: u64,
    /// Time in which the disk was reading.
    pub busy: Duration,
    /// Time that passes waited for it.
    pub stalled: Duration,
    /// Experts that single tokens wanted, where a guess was made …
    pub foreseeable: u64,
    /// … and those that were guessed.
    pub foreseen: u64,
    /// What a GPU has and did; nothing without one.
    pub gpu: Held,
}

impl AddAssign for Reads {
    fn add_assign(&mut self, other: Reads) {
        self.wanted += other.wanted;
        self.hits += other.hits;
        self.bytes += other.bytes;
        self.busy += other.busy;
        self.stalled += other.stalled;
        self.foreseeable += other.foreseeable;
        self.foreseen += other.foreseen;
        self.gpu = Held {
            choices: self.gpu.choices + other.gpu.choices,
            there: self.gpu.there + other.gpu.there,
            ..other.gpu
        };
    }
}

impl Reads {
    /// For people: how many of the experts that were wanted were in memory, what was read from the disk and how fast, how long
    /// that was waited for, and how many of single tokens' experts were foreseen; and what the GPU did. Nothing for a model in
    /// memory and without a GPU.
    pub fn told(&self) -> Option<String> {
        let both = [self.disk_told(), self.gpu.told()];
        let told: Vec<String> = both.into_iter().flatten().collect();
        (!told.is_empty()).then(|| told.join("; "))
    }

    fn disk_told(&self) -> Option<String> {
        if self.wanted == 0 {
            return None;
        }
        let percent = |part: u64, all: u64| 100.0 * part as f64 / all as f64;
        let mut line = format!(
            "{:.0}% of experts in memory, {:.1} GB read at {:.2} GB/s, {:.1} s waited",
            percent(self.hits, self.wanted),
            self.bytes as f64 / 1e9,
            self.bytes as f64 / 1e9 / self.busy.as_secs_f64().max(1e-9),
            self.stalled.as_secs_f64(),
        );
        if self.foreseeable > 0 {
            let percent = percent(self.foreseen, self.foreseeable);
            line += &format!(", {percent:.0}% foreseen");
        }
        Some(line)
    }

    /// What was done since `before`.
    pub fn since(&self, before: &Reads) -> Reads {
        Reads {
            wanted: self.wanted - before.wanted,
            hits: self.hits - before.hits,
            bytes: self.bytes - before.bytes,
            busy: self.busy - before.busy,
            stalled: self.stalled - before.stalled,
            foreseeable: self.foreseeable - before.foreseeable,
            foreseen: self.foreseen - before.foreseen,
            gpu: Held {
                choices: self.gpu.choices - before.gpu.choices,
                there: self.gpu.there - before.gpu.there,
                ..self.gpu
            },
        }
    }
}

/// What a budget pays for, in bytes.
#[derive(Clone, Copy, Debug)]
pub struct Budget {
    /// All of it.
    pub total: u64,
    /// What every token reads.
    pub dense: u64,
    /// One slot: the largest expert, with what surrounds it in its pages.
    pub slot: u64,
    /// Slots that are needed at least.
    pub least_slots: u64,
}

impl Budget {
    /// The least that will do, beside what the process takes anyway.
    pub fn least(&self) -> u64 {
        self.dense + self.least_slots * self.slot + MARGIN
    }
}

struct Pager {
    shared: Arc<Shared>,
    budget: Budget,
}

impl Drop for Pager {
    fn drop(&mut self) {
        self.shared.lock().closing = true;
        self.shared.changed.notify_all();
    }
}

/// What the threads that read share with the one that computes.
struct Shared {
    /// Bytes of a slot.
    slot: usize,
    experts: Vec<Arc<Expert>>,
    state: Mutex<State>,
    /// An expert has arrived, or there is something to read.
    changed: Condvar,
    /// Loads that a pass waits for; those ahead stand back meanwhile.
    pressing: AtomicUsize,
}

struct State {
    places: Vec<Place>,
    /// Slots there are, with those that are still to be made; those whose memory is taken; how many there may be.
    slots: usize,
    made: usize,
    limit: usize,
    /// Slots that nothing is read into: what was to be read there is not wanted any more.
    spare: Vec<MmapMut>,
    popularity: Popularity,
    n_expert: usize,
    /// The layer that the pass works on, and whether it has so many tokens that all experts ahead are wanted.
    layer: usize,
    wide: bool,
    /// What is to be read, for each [`Line`].
    queues: [VecDeque<Job>; 2],
    /// Nobody wants anything any more.
    closing: bool,
    /// Loads on their way, and since when there was one.
    loading: usize,
    busy_since: Instant,
    /// When the machine's memory was last looked at.
    looked: Option<Instant>,
    reads: Reads,
}

/// Who reads.
#[derive(Clone, Copy)]
enum Line {
    /// What a pass waits for.
    Wanted,
    /// What one will probably wait for. Stands back while there is anything of the other kind.
    Foreseen,
}

/// An expert to be read into a slot.
struct Job {
    key: usize,
    /// None: a new one is to be made.
    slot: Option<MmapMut>,
    /// Nobody asked for it; it fills a slot that is still to be made.
    warming: bool,
    /// A pass waits for it, from the beginning or since then.
    pressing: Arc<AtomicBool>,
}

/// Where one expert is, and whether it is spoken for.
struct Place {
    at: At,
    /// Wanted by this layer and not handed out yet, or probably by the next: its slot must not go.
    claim: Claim,
    /// Single tokens: a guess was made for its layer, and this was it.
    guessed: bool,
}

#[derive(Clone, Copy, PartialEq)]
enum Claim {
    None,
    Foreseen,
    Wanted,
}

enum At {
    /// In the file.
    Disk,
    /// On its way. `pressing`: a pass waits for it.
    Loading { pressing: Arc<AtomicBool> },
    /// In memory.
    Here {
        expert: Arc<Expert>,
        slot: Arc<MmapMut>,
    },
    /// It could not be read.
    Lost(Error),
}

/// Experts and the tokens that chose them.
pub(super) trait Chosen {
    /// Which expert.
    fn expert(&self) -> usize;
}

impl Store {
    /// A store that uses what is mapped.
    pub fn mapped(sources: Vec<Arc<Source>>, weights: &Weights) -> Store {
        let layers = weights.layers.iter();
        Store {
            sources,
            experts: layers.flat_map(|l| l.experts.iter().cloned()).collect(),
            n_expert: weights.layers.first().map_or(1, |l| l.experts.len()),
            pager: None,
            offload: None,
        }
    }

    /// Has a device compute with what it has memory for: what every token reads first, then experts; they come in the
    /// background.
    pub(super) fn offload_to(&mut self, plan: Plan, config: &Config, weights: &Weights) {
        let experts = self.experts.clone();
        self.offload = Some(Offload::new(plan, config, weights, experts));
    }

    /// The device.
    pub(super) fn offload(&self) -> Option<&Offload> {
        self.offload.as_ref()
    }

    /// Bytes of what every token reads that a device reads instead of the CPU.
    pub(super) fn dense_elsewhere(&self) -> u64 {
        self.offload.as_ref().map_or(0, Offload::dense)
    }

    /// Whether a device has this expert, so that no other memory has to.
    fn elsewhere(&self, layer: usize, expert: usize) -> bool {
        let offload = self.offload.as_ref();
        offload.is_some_and(|offload| offload.holds(layer, expert))
    }

    /// A store that keeps this process within `total` bytes of memory: reads what every token needs of `weights` into
    /// memory and makes slots of the rest. `shares (n_layer, n_expert)`: how often a token takes each expert, where
    /// that is known.
    ///
    /// # Errors
    /// [`Error::Usage`] if the budget is too small; if the file cannot be read.
    pub fn within(
        total: u64,
        sources: Vec<Arc<Source>>,
        weights: &mut Weights,
        config: &Config,
        shares: Option<Vec<f32>>,
    ) -> Result<Store> {
        let budget = Store::budget(total, weights, config);
        let taken = memory::resident().unwrap_or(0);
        let least = taken + budget.least();
        if total < least {
            return Err(too_small(total, least, &budget));
        }
        let readers = Background::new(READERS, "read")?;
        readers.run(|| reads::make_resident(weights))?;
        let store = Store::mapped(sources, weights);
        let even = config.n_used as f32 / config.n_expert as f32;
        let shares = shares.unwrap_or_else(|| vec![even; store.experts.len()]);
        let popularity = Popularity::new(config.n_expert, shares);
        let state = State::new(store.experts.len(), config.n_expert, popularity);
        let shared = Arc::new(Shared {
            slot: budget.slot as usize,
            experts: store.experts.clone(),
            state: Mutex::new(state),
            changed: Condvar::new(),
            pressing: AtomicUsize::new(0),
        });
        let pager = Pager { shared, budget };
        let lines = [
            (Line::Wanted, readers),
            (Line::Foreseen, Background::new(AHEAD, "ahead")?),
        ];
        for (line, threads) in lines {
            let shared = Arc::clone(&pager.shared);
            apart("octet-store", move || shared.serve(line, &threads))?;
        }
        let mut state = pager.shared.lock();
        pager.resize(&mut state, 0)?;
        pager.warm_up(&mut state);
        drop(state);
        Ok(Store {
            pager: Some(pager),
            ..store
        })
    }

    /// What `total` bytes would pay for.
    pub fn budget(total: u64, weights: &Weights, config: &Config) -> Budget {
        let experts = weights.layers.iter().flat_map(|l| &l.experts);
        Budget {
            total,
            dense: reads::resident_bytes(weights),
            slot: experts.map(|e| reads::slot_bytes(e)).max().unwrap_or(0) as u64,
            least_slots: 2 * config.n_used as u64,
        }
    }

    /// Whether it reads experts from the disk.
    pub fn is_paged(&self) -> bool {
        self.pager.is_some()
    }

    /// Slots that the last pass could have, and experts that there are.
    pub fn slots(&self) -> Option<(usize, usize)> {
        let pager = self.pager.as_ref()?;
        Some((pager.shared.lock().limit, self.experts.len()))
    }

    /// What it read so far.
    pub fn reads(&self) -> Reads {
        let mut reads = self.pager.as_ref().map_or_else(Reads::default, |pager| {
            let state = pager.shared.lock();
            let mut reads = state.reads;
            if state.loading > 0 {
                reads.busy += state.busy_since.elapsed();
            }
            reads
        });
        reads.gpu = self
            .offload
            .as_ref()
            .map_or_else(Held::default, Offload::held);
        reads
    }

    /// Bytes of memory that this process may take; nothing says so where the model is mapped.
    pub fn total(&self) -> Option<u64> {
        Some(self.pager.as_ref()?.budget.total)
    }

    /// A pass of `n_tok` tokens begins, which will take `growth` bytes more than this process has.
    ///
    /// # Errors
    /// If the file has changed, or there is no memory for as many slots as a pass needs.
    pub(super) fn begin(&self, n_tok: usize, growth: u64) -> Result<()> {
        for source in &self.sources {
            source.unchanged()?;
        }
        if let Some(offload) = &self.offload {
            offload.begin();
        }
        let Some(pager) = &self.pager else {
            return Ok(());
        };
        let state = &mut *pager.shared.lock();
        state.layer = 0;
        state.wide = n_tok >= self.n_expert;
        pager.resize(state, growth)
    }

    /// The experts that `chosen` names are wanted for `n_tok` tokens of `layer`: reading begins.
    /// `counts (n_expert)`: tokens of each.
    pub(super) fn want(&self, layer: usize, counts: &[usize], n_tok: usize) {
        let Some(pager) = &self.pager else { return };
        let here = |(e, n): (usize, &usize)| if self.elsewhere(layer, e) { 0 } else { *n };
        let counts: Vec<usize> = counts.iter().enumerate().map(here).collect();
        let state = &mut *pager.shared.lock();
        state.layer = layer;
        let first = layer * self.n_expert;
        // What was foreseen for this layer and does not come is nobody's any more.
        let guessed = state.places[first..][..self.n_expert]
            .iter()
            .any(|p| p.guessed);
        for (e, count) in counts.iter().enumerate() {
            let place = &mut state.places[first + e];
            place.claim = match count {
                0 => Claim::None,
                _ => Claim::Wanted,
            };
            let hit = matches!(place.at, At::Here { .. });
            let right = std::mem::take(&mut place.guessed);
            if *count == 0 && right {
                state.forget(first + e);
            }
            if *count > 0 {
                state.reads.wanted += 1;
                state.reads.hits += u64::from(hit);
                state.reads.foreseeable += u64::from(guessed);
                state.reads.foreseen += u64::from(right);
            }
        }
        state.popularity.learn(layer, &counts, n_tok);
        pager.read_wanted(state);
    }

    /// `layer`, which comes next, will probably want these experts: read when nothing else is. `guess`: this may be
    /// wrong.
    pub(super) fn foresee(
        &self,
        layer: usize,
        experts: impl IntoIterator<Item = usize>,
        guess: bool,
    ) {
        if let Some(pager) = &self.pager {
            let experts = experts.into_iter().filter(|e| !self.elsewhere(layer, *e));
            pager.foresee(&mut pager.shared.lock(), layer, experts, guess);
        }
    }

    /// Takes those of `rest` whose experts are there, waiting until one is. The order of the others stays.
    ///
    /// # Errors
    /// If an expert cannot be read.
    pub(super) fn ready<T: Chosen>(
        &self,
        layer: usize,
        rest: &mut Vec<T>,
    ) -> Result<Vec<(T, Arc<Expert>)>> {
        let key = |chosen: &T| layer * self.n_expert + chosen.expert();
        let Some(pager) = &self.pager else {
            let experts = rest.drain(..);
            return Ok(experts
                .map(|c| {
                    let expert = Arc::clone(&self.experts[key(&c)]);
                    (c, expert)
                })
                .collect());
        };
        let mut state = pager.shared.lock();
        // A device that was to compute with some of them has failed: they were not wanted here until now.
        for chosen in rest.iter() {
            let place = &mut state.places[key(chosen)];
            place.claim = Claim::Wanted;
        }
        loop {
            pager.read_wanted(&mut state);
            let mut ready = Vec::new();
            for chosen in std::mem::take(rest) {
                let place = &mut state.places[key(&chosen)];
                match &place.at {
                    At::Here { expert, .. } => {
                        place.claim = Claim::None;
                        ready.push((chosen, Arc::clone(expert)));
                    }
                    At::Lost(_) => {
                        let At::Lost(e) = std::mem::replace(&mut place.at, At::Disk) else {
                            unreachable!("it was just looked at");
                        };
                        state.give_up();
                        return Err(e);
                    }
                    _ => rest.push(chosen),
                }
            }
            if state.wide && (layer + 1) * self.n_expert < self.experts.len() {
                let next = (0..self.n_expert).filter(|e| !self.elsewhere(layer + 1, *e));
                pager.foresee(&mut state, layer + 1, next, false);
            }
            if !ready.is_empty() {
                // Their slots may go when they have been used: others that are wanted get them then.
                return Ok(ready);
            }
            if state.loading == 0 {
                let budget = &pager.budget;
                return Err(too_small(budget.total, budget.total + budget.slot, budget));
            }
            let waiting = Instant::now();
            state = pager.shared.wait(state);
            state.reads.stalled += waiting.elapsed();
        }
    }
}

impl Pager {
    /// Begins to read what `layer` will probably want, as far as slots can be had for that.
    fn foresee(
        &self,
        state: &mut State,
        layer: usize,
        experts: impl IntoIterator<Item = usize>,
        guess: bool,
    ) {
        for e in experts {
            let key = layer * state.n_expert + e;
            let place = &mut state.places[key];
            place.claim = Claim::Foreseen;
            place.guessed = guess;
            // Without a slot it is claimed all the same: the next one may be in memory, and should stay there.
            if matches!(place.at, At::Disk)
                && let Some(slot) = self.slot(state, Claim::Foreseen, layer)
            {
                self.load(state, key, slot, Claim::Foreseen);
            }
        }
    }

    /// Begins to read what the layer of the pass wants, as far as there are slots.
    fn read_wanted(&self, state: &mut State) {
        let (layer, n_expert) = (state.layer, state.n_expert);
        for key in layer * n_expert..(layer + 1) * n_expert {
            let place = &state.places[key];
            if place.claim != Claim::Wanted {
                continue;
            }
            match &place.at {
                At::Disk => {
                    let Some(slot) = self.slot(state, Claim::Wanted, layer) else {
                        return;
                    };
                    self.load(state, key, slot, Claim::Wanted);
                }
                At::Loading { pressing } => {
                    if !pressing.swap(true, Ordering::Relaxed) {
                        self.shared.pressing.fetch_add(1, Ordering::Relaxed);
                        state.hasten(key);
                        self.shared.changed.notify_all();
                    }
                }
                At::Here { .. } | At::Lost(_) => {}
            }
        }
    }

    /// A slot for an expert of `layer` with this claim: a spare one, room for a new one, or another's.
    fn slot(&self, state: &mut State, claim: Claim, layer: usize) -> Option<Option<MmapMut>> {
        if let Some(slot) = state.spare.pop() {
            return Some(Some(slot));
        }
        if state.slots < state.limit {
            state.slots += 1;
            return Some(None);
        }
        if state.cancel().is_some() {
            return Some(None);
        }
        state.evict(claim, layer, self.moving()).map(Some)
    }

    /// Slots that move through the layers with a pass.
    fn moving(&self) -> usize {
        self.budget.least_slots as usize
    }

    /// Begins to read an expert into a slot, because somebody claims it, or to have the slot filled.
    fn load(&self, state: &mut State, key: usize, slot: Option<MmapMut>, claim: Claim) {
        let pressing = claim == Claim::Wanted;
        let flag = Arc::new(AtomicBool::new(pressing));
        state.places[key].at = At::Loading {
            pressing: Arc::clone(&flag),
        };
        if state.loading == 0 {
            state.busy_since = Instant::now();
        }
        state.loading += 1;
        let job = Job {
            key,
            slot,
            warming: claim == Claim::None,
            pressing: flag,
        };
        let [wanted, ahead] = &mut state.queues;
        match claim {
            Claim::Wanted => {
                self.shared.pressing.fetch_add(1, Ordering::Relaxed);
                wanted.push_back(job);
            }
            // Before what only warms the slots up.
            Claim::Foreseen => ahead.push_front(job),
            Claim::None => ahead.push_back(job),
        }
        self.shared.changed.notify_all();
    }

    /// Begins to fill the slots while nobody asks for anything, the most popular experts of each layer first.
    fn warm_up(&self, state: &mut State) {
        let n_expert = state.n_expert;
        let mut keys = Vec::new();
        for layer in 0..state.places.len() / n_expert {
            let quota = state.popularity.quota(layer, state.limit, self.moving());
            let mut its: Vec<usize> = (layer * n_expert..(layer + 1) * n_expert).collect();
            let share = |key: &usize| state.popularity.share(*key);
            its.sort_by(|a, b| share(b).total_cmp(&share(a)));
            keys.extend(its.into_iter().take(quota));
        }
        for key in keys {
            state.slots += 1;
            self.load(state, key, None, Claim::None);
        }
    }

    /// Makes the number of slots fit the memory there is.
    fn resize(&self, state: &mut State, growth: u64) -> Result<()> {
        let slot = self.budget.slot;
        // What is in no slot. One that is being filled counts too.
        let others = memory::resident().map_or(self.budget.dense, |resident| {
            resident.saturating_sub(state.made as u64 * slot)
        });
        let room = self.budget.total.saturating_sub(others + growth + MARGIN);
        state.limit = (room / slot).min(state.places.len() as u64) as usize;
        if (state.limit as u64) < self.budget.least_slots {
            let least = others + growth + MARGIN + self.budget.least_slots * slot;
            return Err(too_small(self.budget.total, least, &self.budget));
        }
        self.yield_to_others(state);
        while state.slots > state.limit {
            if state.cancel().is_none() {
                let spare = state.spare.pop();
                let evict = || state.evict(Claim::Wanted, usize::MAX, self.moving());
                let Some(slot) = spare.or_else(evict) else {
                    break;
                };
                drop(slot);
                state.made -= 1;
            }
            state.slots -= 1;
        }
        Ok(())
    }

    /// Gives slots back when other programs want memory: rather read again than make the machine swap.
    fn yield_to_others(&self, state: &mut State) {
        let least = self.budget.least_slots as usize;
        if state.looked.is_some_and(|at| at.elapsed() < LOOK) {
            state.limit = state.limit.min(state.slots.max(least));
            return;
        }
        state.looked = Some(Instant::now());
        if let Some(available) = memory::available() {
            let most = slots_beside_others(available, state.slots, self.budget.slot);
            state.limit = state.limit.min(most.max(least));
        }
    }
}

/// How many slots of `slot` bytes there may be when there are `slots` and all programs together have `available` bytes left.
fn slots_beside_others(available: u64, slots: usize, slot: u64) -> usize {
    match available.checked_sub(RESERVE) {
        Some(room) => slots + (room / slot) as usize,
        None => slots.saturating_sub((RESERVE - available).div_ceil(slot) as usize),
    }
}

impl State {
    /// `n` experts, `n_expert` in a layer, none of them in memory.
    fn new(n: usize, n_expert: usize, popularity: Popularity) -> State {
        let place = |_| Place {
            at: At::Disk,
            claim: Claim::None,
            guessed: false,
        };
        State {
            places: (0..n).map(place).collect(),
            slots: 0,
            made: 0,
            limit: 0,
            spare: Vec::new(),
            popularity,
            n_expert,
            layer: 0,
            wide: false,
            queues: Default::default(),
            closing: false,
            loading: 0,
            busy_since: Instant::now(),
            looked: None,
            reads: Reads::default(),
        }
    }

    /// A pass ends with an error: nothing is claimed any more.
    fn give_up(&mut self) {
        for place in &mut self.places {
            place.claim = Claim::None;
        }
    }

    /// What was to be read ahead is wanted now: it changes over, unless it is being read already.
    fn hasten(&mut self, key: usize) {
        let ahead = &mut self.queues[Line::Foreseen as usize];
        let at = ahead.iter().position(|job| job.key == key);
        let job = at.and_then(|at| ahead.remove(at));
        self.queues[Line::Wanted as usize].extend(job);
    }

    /// Gives up filling a slot that is still to be made with an expert that nobody asked for.
    fn cancel(&mut self) -> Option<()> {
        let ahead = &self.queues[Line::Foreseen as usize];
        let unasked = |job: &Job| job.warming && self.places[job.key].claim == Claim::None;
        let at = ahead.iter().rposition(unasked)?;
        self.withdraw(at);
        Some(())
    }

    /// A guess was wrong: what was to be read for it is not, unless that has begun.
    fn forget(&mut self, key: usize) {
        let ahead = &self.queues[Line::Foreseen as usize];
        let its = |job: &Job| job.key == key && !job.warming;
        let Some(at) = ahead.iter().position(its) else {
            return;
        };
        match self.withdraw(at) {
            Some(slot) => self.spare.push(slot),
            None => self.slots -= 1,
        }
    }

    /// Takes back what stands at `at` of the queue of what is foreseen. Returns its slot, if that is made.
    fn withdraw(&mut self, at: usize) -> Option<MmapMut> {
        let ahead = &mut self.queues[Line::Foreseen as usize];
        let job = ahead.remove(at).expect("it was just found there");
        self.places[job.key].at = At::Disk;
        self.done();
        job.slot
    }

    /// One load less is on its way.
    fn done(&mut self) {
        self.loading -= 1;
        if self.loading == 0 {
            self.reads.busy += self.busy_since.elapsed();
        }
    }

    /// Takes the slot of an expert that is not used and whose claim is weaker, for one of `layer`. Unclaimed ones go
    /// first; of these, those of layers that have more slots than they should; of the others the layer's own; in a
    /// prompt, those of layers that it has passed; and then the least popular.
    fn evict(&mut self, claim: Claim, layer: usize, moving: usize) -> Option<MmapMut> {
        let free = |place: &Place| match &place.at {
            At::Here { expert, .. } => {
                let weaker = match place.claim {
                    Claim::None => true,
                    Claim::Foreseen => claim == Claim::Wanted,
                    Claim::Wanted => false,
                };
                weaker && Arc::strong_count(expert) == 1
            }
            _ => false,
        };
        let taken = |place: &&Place| !matches!(place.at, At::Disk | At::Lost(_));
        let crowded: Vec<bool> = self
            .places
            .chunks_exact(self.n_expert)
            .enumerate()
            .map(|(l, places)| {
                let quota = self.popularity.quota(l, self.limit, moving);
                places.iter().filter(taken).count() > quota
            })
            .collect();
        let rank = |key: usize| {
            let its = key / self.n_expert;
            (
                self.places[key].claim == Claim::None,
                crowded[its],
                its == layer,
                !self.wide || its <= self.layer,
            )
        };
        let last = (0..self.places.len())
            .filter(|key| free(&self.places[*key]))
            .max_by(|a, b| {
                let popular = |key: usize| self.popularity.share(key);
                rank(*a)
                    .cmp(&rank(*b))
                    .then(popular(*b).total_cmp(&popular(*a)))
            })?;
        let At::Here { expert, slot } = std::mem::replace(&mut self.places[last].at, At::Disk)
        else {
            unreachable!("only what is here was looked at");
        };
        // Its weights hold the slot too.
        drop(expert);
        Some(Arc::try_unwrap(slot).expect("nobody uses the expert"))
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state
            .lock()
            .unwrap_or_else(|broken| broken.into_inner())
    }

    /// Waits until something has changed.
    fn wait<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        self.changed
            .wait(state)
            .unwrap_or_else(|broken| broken.into_inner())
    }

    /// Reads what is asked for, one expert after the other.
    fn serve(&self, line: Line, threads: &Background) {
        let mut state = self.lock();
        while !state.closing {
            match state.queues[line as usize].pop_front() {
                None => state = self.wait(state),
                Some(job) => {
                    drop(state);
                    threads.run(|| self.read(job));
                    state = self.lock();
                }
            }
        }
    }

    /// Reads an expert into a slot and says so.
    fn read(&self, job: Job) {
        let Job {
            key,
            slot,
            pressing,
            ..
        } = job;
        let stand_back = || {
            // Looked at without the lock first: most of the time nobody waits.
            if self.pressing.load(Ordering::Relaxed) == 0 {
                return;
            }
            let mut state = self.lock();
            while !pressing.load(Ordering::Relaxed)
                && self.pressing.load(Ordering::Relaxed) > 0
                && !state.closing
            {
                state = self.wait(state);
            }
        };
        let is_new = slot.is_none();
        let slot = slot.map_or_else(|| new_slot(self.slot), Ok);
        let read = slot.and_then(|slot| reads::expert(&self.experts[key], slot, stand_back));
        if let (true, Ok(read)) = (is_new, &read) {
            reads::keep(&read.slot);
        }
        let state = &mut *self.lock();
        if pressing.load(Ordering::Relaxed) {
            self.pressing.fetch_sub(1, Ordering::Relaxed);
        }
        state.done();
        state.places[key].at = match read {
            Ok(InSlot {
                expert,
                slot,
                bytes,
            }) => {
                state.reads.bytes += bytes;
                state.made += usize::from(is_new);
                let expert = Arc::new(expert);
                At::Here { expert, slot }
            }
            Err(e) => {
                state.slots -= 1;
                state.made -= usize::from(!is_new);
                At::Lost(e)
            }
        };
        self.changed.notify_all();
    }
}

/// Memory for a slot.
fn new_slot(bytes: usize) -> Result<MmapMut> {
    let what = |e| {
        Error::Usage(format!(
            "--ram: the system gives no memory for an expert: {e}"
        ))
    };
    reads::memory(bytes).map_err(what)
}

/// The budget will not do.
fn too_small(total: u64, least: u64, budget: &Budget) -> Error {
    let gb = |bytes: u64| bytes as f64 / 1e9;
    Error::Usage(format!(
        "--ram: {:.2} GB is too little (expected at least {:.2} GB: {:.2} that every token reads, {} experts of {:.3}, and what the \
         conversation takes); a smaller type of the model needs less",
        gb(total),
        // Rounded up, so that what is asked for will do.
        (gb(least) * 100.0).ceil() / 100.0,
        gb(budget.dense),
        budget.least_slots,
        gb(budget.slot),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two layers of four experts, and one slot, into which expert 5 is to be read ahead.
    fn waiting() -> State {
        let mut state = State::new(8, 4, Popularity::new(4, vec![0.5; 8]));
        (state.slots, state.made, state.limit, state.loading) = (1, 1, 1, 1);
        let pressing = Arc::new(AtomicBool::new(false));
        state.places[5].at = At::Loading {
            pressing: Arc::clone(&pressing),
        };
        state.queues[Line::Foreseen as usize].push_back(Job {
            key: 5,
            slot: Some(MmapMut::map_anon(1).unwrap()),
            warming: false,
            pressing,
        });
        state
    }

    #[test]
    fn a_wrong_guess_is_not_read() {
        let mut state = waiting();
        state.forget(4);
        assert_eq!((state.loading, state.spare.len()), (1, 0), "another one's");
        state.forget(5);
        assert!(state.queues[Line::Foreseen as usize].is_empty());
        assert!(matches!(state.places[5].at, At::Disk));
        assert_eq!(
            (state.loading, state.spare.len(), state.slots),
            (0, 1, 1),
            "the slot waits for what comes next"
        );
    }

    #[test]
    fn what_only_fills_a_slot_is_still_read() {
        let mut state = waiting();
        let ahead = &mut state.queues[Line::Foreseen as usize];
        (ahead[0].warming, ahead[0].slot) = (true, None);
        state.forget(5);
        assert_eq!(state.loading, 1);
        assert_eq!(state.cancel(), Some(()));
        assert_eq!(
            (state.loading, state.slots),
            (0, 1),
            "its slot is another's"
        );
    }

    #[test]
    fn slots_go_when_other_programs_want_memory() {
        const MB: u64 = 1 << 20;
        let slots = |available| slots_beside_others(available, 10, 100 * MB);
        assert_eq!(slots(RESERVE + 350 * MB), 13);
        assert_eq!(slots(RESERVE), 10);
        assert_eq!(slots(RESERVE - 1), 9, "too little is left: one goes");
        assert_eq!(slots(RESERVE - 250 * MB), 7);
        assert_eq!(slots_beside_others(0, 2, 100 * MB), 0);
    }
}
