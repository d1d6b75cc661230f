//! Passes that stay on the device from the first layer to the last: what they need there, and which keys and values are there.
//!
//! The host's cache ([`Kv`]) is the one that counts: what a pass adds comes back with the logits, 128 KiB a token for Mixtral
//! 8x7B, and sessions, forks and the CPU find everything where it always is. The device has a copy of it, in blocks of the same 64
//! positions. How much of the copy is right is noted at the cache itself, where changes are made (`Kv::mirror`); what is
//! not, goes up before the next pass. So a device that is lost takes nothing with it, and a pass that it does not finish
//! is done again by the CPU.
//!
//! An eighth of the memory is for keys and values, or what a context of known length takes, or whatever all weights leave; weights that
//! every token reads come before, experts after them. For a sequence that finds no block left, the
//! others that were used least recently give theirs back; if there is nobody else, its attention is the CPU's.

use super::{
    Absent, Back, Device, Fault, Host, MOST_OUT, Offload, Pace, Pass, Seat, Slots, State, small_at,
};
use crate::moe::kv::{KV_BLOCK, KvType, Plane};
use crate::moe::linear::Weight;
use crate::moe::offload::placement::Where;
use crate::moe::weights::{Expert, Layer, Weights};
use crate::moe::{Config, Run};
use half::f16;
use std::collections::HashMap;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

/// The part of the memory that is for keys and values, where nobody says how long contexts become.
const KV_PART: u64 = 8;
/// Slots that experts pass through, if not all are there: one is filled while the one before it is computed with, and one more, as
/// they do not take equally long.
const RING: usize = 3;
/// Bytes that come to a device a second, and products of int8 that a thread of the CPU does a second, until that was measured: about
/// what PCI Express 4.0 with 16 lanes and one copying thread give, and half of what a core with AVX-512 VNNI does at best.
const LINK: f64 = 12e9;
const THREAD: f64 = 150e9;
/// Bytes and products from which on they say how fast both are, and behind which what is older counts half.
const ENOUGH_BYTES: f64 = 1e9;
const ENOUGH_PRODUCTS: f64 = 50e9;
const MUCH_PRODUCTS: f64 = 1e13;
/// Tokens that a tile of the device's product is worth for.
const LEAST_STREAM: usize = 8;
/// Most tokens of a pass: blocks in the second dimension of a grid.
const MOST_TOKENS: usize = 65535;
/// Most experts of a layer that a device's router chooses from.
const MOST_EXPERTS: usize = 64;

/// What a device has and keeps for whole passes.
pub(super) struct Whole {
    /// The slot of norms and routers, once it is there.
    small: Option<usize>,
    small_bytes: u64,
    /// Bytes that the device computes with.
    scratch: u64,
    /// Bytes of a block of keys and values, that all blocks may take, and that they do take.
    block: u64,
    room: u64,
    taken: u64,
    /// Slots that experts pass through, each of so many bytes: as large as the largest. None, if all have a place.
    ring: Vec<usize>,
    ring_slot: u64,
    /// By the address of the cache's mark.
    copies: HashMap<usize, CacheCopy>,
    /// Passes so far.
    clock: u64,
    /// That there is no room was said.
    told: bool,
    /// How fast the host computes experts that have many tokens, in products.
    host: Pace,
}

/// A cache's copy on the device.
struct CacheCopy {
    /// The cache's mark: positions that are right. Nobody else holds it when the cache is gone.
    mark: Arc<AtomicUsize>,
    /// Slots.
    blocks: Vec<usize>,
    /// When it was used.
    used: u64,
}

/// Where the tokens of a pass stand, and the slots of their blocks.
type Seated = (Vec<Seat>, Vec<usize>);

/// A pass, as the forward pass asks for it.
pub(in crate::moe) struct Ask<'a> {
    pub(in crate::moe) config: &'a Config,
    pub(in crate::moe) weights: &'a Weights,
    /// As in [`Pass`].
    pub(in crate::moe) x: &'a [f32],
    pub(in crate::moe) cos: &'a [f32],
    pub(in crate::moe) sin: &'a [f32],
    pub(in crate::moe) wanted: &'a [u32],
    /// Threads of the CPU.
    pub(in crate::moe) threads: usize,
}

/// Products of a token with an expert.
fn products(expert: &Expert) -> f64 {
    let sizes = expert.weights().map(|w| w.n_in as f64 * w.n_out as f64);
    sizes.iter().sum()
}

/// Tokens from which on an expert that is not there comes up sooner than the CPU has computed with it: its bytes take `bytes /
/// link`, a token `products / host`.
fn stream_from(expert: &Expert, threads: usize, link: Pace, host: Pace) -> usize {
    let link = link.rate(ENOUGH_BYTES).unwrap_or(LINK);
    let host = host.rate(ENOUGH_PRODUCTS);
    let host = host.unwrap_or(THREAD * threads as f64);
    let tokens = expert.bytes() as f64 / link * host / products(expert).max(1.0);
    // A float that is too large becomes the largest number.
    (tokens as usize).max(LEAST_STREAM)
}

/// A host whose work with many tokens is timed.
struct Timed<'a> {
    host: &'a mut dyn Host,
    /// Products of a token.
    each: f64,
    pace: Pace,
}

impl Host for Timed<'_> {
    fn experts(&mut self, layer: usize, h: &[f32], absent: &[Absent], out: &mut [f32]) -> bool {
        let begun = Instant::now();
        let goes_on = self.host.experts(layer, h, absent, out);
        let rows: usize = absent.iter().map(|a| a.pick.len()).sum();
        // Few tokens wait for the memory, which many do not.
        if rows >= LEAST_STREAM * absent.len() {
            let done = rows as f64 * self.each;
            let seconds = begun.elapsed().as_secs_f64();
            self.pace.add(done, seconds, MUCH_PRODUCTS);
        }
        goes_on
    }

    fn passed(&mut self, layer: usize) -> ControlFlow<()> {
        self.host.passed(layer)
    }
}

/// Bytes of keys, or values, of a block in one layer.
fn plane_bytes(c: &Config) -> u64 {
    (c.n_kv * c.d_head * KV_BLOCK * size_of::<f16>()) as u64
}

impl Whole {
    /// Divides `room` bytes of a device among keys and values and weights; nothing if it cannot do whole passes of this model.
    /// `scratch`: bytes that it computes with, if it takes such passes; `bytes`: of a matrix there; `experts`: of each; `context`: as in
    /// [`super::Plan`].
    pub(super) fn plan(
        scratch: Option<u64>,
        bytes: impl Fn(&[&Weight]) -> Option<u64>,
        c: &Config,
        weights: &Weights,
        experts: &[Option<u64>],
        context: Option<usize>,
        room: u64,
    ) -> Option<Whole> {
        let floats = |l: &Layer| {
            let router = l.router.as_ref();
            router.is_some_and(|r| r.format.block_weights() == 1)
        };
        if c.n_expert > MOST_EXPERTS || !weights.layers.iter().all(floats) {
            return None;
        }
        let scratch = scratch?;
        let layers = weights.layers.iter();
        let dense = layers.flat_map(|l| [&l.q, &l.k, &l.v, &l.o]);
        let dense = dense.chain([&weights.head]).map(|w| bytes(&[w]));
        let dense: u64 = dense.sum::<Option<u64>>()?;
        let all: u64 = experts.iter().flatten().sum();
        let small_bytes = 4 * (small_at(c, c.n_layer)[0] + c.d_model) as u64;
        let room = room.checked_sub(scratch + small_bytes)?;
        let block = 2 * c.n_layer as u64 * plane_bytes(c);
        let wanted = match context {
            Some(tokens) => block.saturating_mul(tokens.div_ceil(KV_BLOCK) as u64),
            None => room / KV_PART,
        };
        let most = room.saturating_sub(dense);
        let kv = wanted.min(most).max(most.saturating_sub(all));
        let weights_fit = room - kv >= dense + all;
        let largest = experts.iter().flatten().max().copied().unwrap_or(0);
        let ring = if weights_fit { 0 } else { largest };
        // Without room for what every token reads, and some experts, the ring is not worth it.
        let left = room.checked_sub(kv + dense)?;
        let ring_slot = if left >= 4 * RING as u64 * ring {
            ring
        } else {
            0
        };
        (kv >= block).then_some(Whole {
            small: None,
            small_bytes,
            scratch,
            block,
            room: kv,
            taken: 0,
            ring: Vec::new(),
            ring_slot,
            copies: HashMap::new(),
            clock: 0,
            told: false,
            host: Pace::default(),
        })
    }

    /// Bytes that are not for weights.
    pub(super) fn set_aside(&self) -> u64 {
        self.scratch + self.small_bytes + self.room + RING as u64 * self.ring_slot
    }

    /// Bytes for keys and values, and the tokens that these are of.
    #[cfg(any(all(test, unix), feature = "cuda"))]
    pub(super) fn kv(&self) -> (u64, u64) {
        (self.room, self.room / self.block * KV_BLOCK as u64)
    }

    /// Bytes of keys and values of a token.
    #[cfg(any(all(test, unix), feature = "cuda"))]
    pub(super) fn token(&self) -> u64 {
        self.block / KV_BLOCK as u64
    }

    /// Bytes of norms and routers.
    #[cfg(any(all(test, unix), feature = "cuda"))]
    pub(super) fn small(&self) -> u64 {
        self.small_bytes
    }

    /// Gives everything back but what lies among weights.
    pub(super) fn end(self, device: &mut dyn Device) {
        let blocks = self.copies.into_values().flat_map(|copy| copy.blocks);
        let slots = blocks.chain(self.small).chain(self.ring);
        slots.for_each(|slot| device.unmake(slot));
    }

    /// Whether experts of long prompts pass through.
    pub(super) fn streams(&self) -> bool {
        !self.ring.is_empty()
    }

    /// Gives blocks back: those of a cache that is gone, else those of the cache that was used least recently and not in
    /// this pass. False if there was none.
    fn evict(&mut self, device: &mut dyn Device) -> bool {
        let gone = |copy: &CacheCopy| Arc::strong_count(&copy.mark) == 1;
        let idle = self.copies.iter().filter(|(_, c)| c.used < self.clock);
        let next = idle
            .min_by_key(|(_, c)| (!gone(c), c.used))
            .map(|(k, _)| *k);
        let Some(copy) = next.and_then(|key| self.copies.remove(&key)) else {
            return false;
        };
        copy.mark.store(0, Ordering::Relaxed);
        self.taken -= self.block * copy.blocks.len() as u64;
        copy.blocks.into_iter().for_each(|slot| device.unmake(slot));
        true
    }

    /// A slot for a block; nothing if there is no room for it.
    fn take(&mut self, device: &mut dyn Device) -> Result<Option<usize>, Fault> {
        loop {
            if self.taken + self.block <= self.room {
                match device.make(self.block) {
                    Ok(slot) => {
                        self.taken += self.block;
                        return Ok(Some(slot));
                    }
                    Err(Fault::Full) => self.room = self.taken,
                    Err(lost) => return Err(lost),
                }
            } else if !self.evict(device) {
                return Ok(None);
            }
        }
    }

    /// Has the device know what is in the caches of `runs` and have room for what comes. Returns where the tokens stand, and
    /// the blocks; nothing if there is no room.
    fn seat(
        &mut self,
        device: &mut dyn Device,
        c: &Config,
        runs: &[Run<'_>],
    ) -> Result<Option<Seated>, Fault> {
        self.clock += 1;
        let key = |run: &Run<'_>| Arc::as_ptr(run.kv.mirror()) as usize;
        for run in runs {
            let copy = self.copies.entry(key(run)).or_insert_with(|| {
                let mark = Arc::clone(run.kv.mirror());
                mark.store(0, Ordering::Relaxed);
                let blocks = Vec::new();
                CacheCopy {
                    mark,
                    blocks,
                    used: 0,
                }
            });
            copy.used = self.clock;
        }
        let (mut seats, mut blocks) = (Vec::new(), Vec::new());
        for run in runs {
            let (key, len) = (key(run), run.kv.len());
            let want = (len + run.tokens.len()).div_ceil(KV_BLOCK);
            while self.copies[&key].blocks.len() < want {
                let Some(slot) = self.take(device)? else {
                    return Ok(None);
                };
                let copy = self.copies.get_mut(&key);
                copy.expect("it was just made").blocks.push(slot);
            }
            let copy = &self.copies[&key];
            let right = copy.mark.load(Ordering::Relaxed).min(len);
            // Nothing, where all of it is there.
            let end = if right < len {
                len.div_ceil(KV_BLOCK)
            } else {
                0
            };
            for b in right / KV_BLOCK..end {
                for layer in 0..c.n_layer {
                    let (Plane::F16(k), Plane::F16(v)) = &*run.kv.blocks(layer)[b] else {
                        unreachable!("other caches were not let in");
                    };
                    let at = 2 * layer as u64 * plane_bytes(c);
                    device.put(copy.blocks[b], at, bytemuck::cast_slice(k))?;
                    device.put(copy.blocks[b], at + plane_bytes(c), bytemuck::cast_slice(v))?;
                }
            }
            copy.mark.store(len, Ordering::Relaxed);
            let first = blocks.len() as u32;
            seats.extend((len..len + run.tokens.len()).map(|pos| Seat {
                first,
                pos: pos as u32,
            }));
            blocks.extend(&copy.blocks[..want]);
        }
        Ok(Some((seats, blocks)))
    }
}

impl State {
    /// The slots of all layers and of the head; nothing while something that every token reads is not there.
    fn slots(&self, weights: &Weights) -> Option<(Vec<Slots>, usize)> {
        let dense = |w: &Weight| {
            let dense = self.dense.get(&(w.bytes.as_ptr() as usize))?;
            dense.here.then_some(dense.slot)
        };
        let mut key = 0;
        let layers = weights.layers.iter().map(|l| {
            let experts = (0..l.experts.len()).map(|_| {
                key += 1;
                match self.placement.place(key - 1) {
                    Where::Here(slot) => Some(slot),
                    _ => None,
                }
            });
            let experts = experts.collect();
            let attention = [dense(&l.q)?, dense(&l.k)?, dense(&l.v)?, dense(&l.o)?];
            Some(Slots { attention, experts })
        });
        Some((layers.collect::<Option<_>>()?, dense(&weights.head)?))
    }

    /// Counts what a whole pass chose.
    fn learn_all(&mut self, c: &Config, pass: &Pass<'_>, back: &Back) {
        let n_tok = pass.seats.len();
        let chosen = back.choices().chunks_exact(n_tok * c.n_used);
        for (layer, (slots, chosen)) in pass.layers.iter().zip(chosen).enumerate() {
            let mut counts = vec![0; c.n_expert];
            chosen.iter().for_each(|c| counts[c.expert as usize] += 1);
            self.placement.learn(layer, &counts, n_tok);
            for (e, n) in counts.into_iter().enumerate() {
                let key = layer * c.n_expert + e;
                let passes = n >= pass.stream_from && self.placement.bytes(key).is_some();
                if slots.experts[e].is_some() || passes {
                    self.there += n as u64;
                }
            }
            self.choices += chosen.len() as u64;
        }
    }
}

impl Offload {
    /// Brings norms and routers, which whole passes need.
    pub(super) fn bring_small(&self, state: &mut State, c: &Config, weights: &Weights) {
        let (Some(device), Some(whole)) = (&mut state.device, &mut state.whole) else {
            return;
        };
        let mut small = vec![0.0; whole.small_bytes as usize / 4];
        let d = c.d_model;
        for (i, layer) in weights.layers.iter().enumerate() {
            let [attn, ffn, router] = small_at(c, i);
            small[attn..attn + d].copy_from_slice(&layer.attn_norm);
            small[ffn..ffn + d].copy_from_slice(&layer.ffn_norm);
            // Widened, if they are narrower floats, which changes no product.
            if let Some(w) = &layer.router {
                let rows = small[router..router + c.n_expert * d].chunks_exact_mut(d);
                rows.enumerate().for_each(|(e, row)| w.decode_row(e, row));
            }
        }
        let norm = small.len() - d;
        small[norm..].copy_from_slice(&weights.norm);
        let slot = device.make(whole.small_bytes);
        let bytes = bytemuck::cast_slice(&small);
        match slot.and_then(|slot| device.put(slot, 0, bytes).map(|()| slot)) {
            Ok(slot) => whole.small = Some(slot),
            Err(Fault::Full) => state.whole = None,
            Err(lost) => self.fault(state, lost),
        }
    }

    /// Makes the slots that experts pass through; without memory for all of them there are none.
    pub(super) fn bring_ring(&self, state: &mut State) {
        let (Some(device), Some(whole)) = (&mut state.device, &mut state.whole) else {
            return;
        };
        while whole.ring_slot > 0 && whole.ring.len() < RING {
            match device.make(whole.ring_slot) {
                Ok(slot) => whole.ring.push(slot),
                Err(Fault::Full) => {
                    whole.ring.drain(..).for_each(|slot| device.unmake(slot));
                    whole.ring_slot = 0;
                }
                Err(lost) => return self.fault(state, lost),
            }
        }
    }

    /// Whether experts of long prompts pass through the device.
    pub(in crate::moe) fn streams(&self) -> bool {
        self.lock().whole.as_ref().is_some_and(Whole::streams)
    }

    /// Has the device run `runs` through all layers. `Some(false)` if the host has ended it; nothing if the device does not take
    /// it or failed: then nothing has changed.
    pub(in crate::moe) fn pass(
        &self,
        ask: &Ask<'_>,
        runs: &[Run<'_>],
        host: &mut dyn Host,
        back: &mut Back,
    ) -> Option<bool> {
        let c = ask.config;
        let n_tok = ask.x.len() / c.d_model;
        let fits = ask.wanted.len() * c.n_vocab <= MOST_OUT;
        let of_f16 = runs.iter().all(|run| run.kv.kind() == KvType::F16);
        if !(1..=MOST_TOKENS).contains(&n_tok) || !fits || !of_f16 {
            return None;
        }
        let _turn = self.turn()?;
        let mut guard = self.lock();
        let state = &mut *guard;
        let (layers, head) = state.slots(ask.weights)?;
        let (device, whole) = (state.device.as_mut()?, state.whole.as_mut()?);
        let small = whole.small?;
        let (seats, blocks) = match whole.seat(&mut **device, c, runs) {
            Ok(Some(seated)) => seated,
            Ok(None) => {
                if !std::mem::replace(&mut whole.told, true) {
                    let gb = whole.room as f64 / 1e9;
                    (self.tell)(format!(
                        "the GPU has {gb:.1} GB for keys and values, which are too few: the CPU does the attention of long contexts"
                    ));
                }
                return None;
            }
            Err(fault) => {
                self.fault(state, fault);
                return None;
            }
        };
        let ring = whole.ring.clone();
        let stream_from = match ring.is_empty() {
            true => usize::MAX,
            false => stream_from(&self.experts[0], ask.threads, device.link(), whole.host),
        };
        let mut host = Timed {
            host,
            each: products(&self.experts[0]),
            pace: whole.host,
        };
        let mut device = state.device.take()?;
        state.lent = true;
        drop(guard);
        let pass = Pass {
            config: c,
            weights: ask.weights,
            layers: &layers,
            head,
            small,
            x: ask.x,
            cos: ask.cos,
            sin: ask.sin,
            seats: &seats,
            blocks: &blocks,
            wanted: ask.wanted,
            ring: &ring,
            stream_from,
        };
        let done = device.pass(&pass, &mut host, back);
        let mut guard = self.lock();
        let state = &mut *guard;
        (state.device, state.lent) = (Some(device), false);
        if let Some(whole) = &mut state.whole {
            whole.host = host.pace;
        }
        match done {
            Ok(true) => {
                state.learn_all(c, &pass, back);
                Some(true)
            }
            Ok(false) => Some(false),
            // There is room for it the next time.
            Err(Fault::Full) => {
                self.shrink(state);
                None
            }
            Err(lost) => {
                self.fault(state, lost);
                None
            }
        }
    }
}

/// Takes what a pass has brought back into the caches, which know then that the device has it, too.
pub(in crate::moe) fn take_in(c: &Config, runs: &mut [Run<'_>], back: &Back) {
    let n_tok: usize = runs.iter().map(|run| run.tokens.len()).sum();
    let d_kv = c.n_kv * c.d_head;
    let planes: Vec<&[f16]> = back.fresh().chunks_exact(n_tok * d_kv).collect();
    let mut t = 0;
    for run in runs {
        let first = run.kv.len();
        for pos in first..first + run.tokens.len() {
            for (layer, kv) in planes.chunks_exact(2).enumerate() {
                let row = t * d_kv..(t + 1) * d_kv;
                run.kv.take_in(layer, pos, &kv[0][row.clone()], &kv[1][row]);
            }
            t += 1;
        }
        run.kv.advance(run.tokens.len());
        run.kv.mirror().store(run.kv.len(), Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gguf::Bytes;
    use crate::quant::Format;
    use memmap2::MmapMut;

    fn pace(rate: f64, done: f64) -> Pace {
        let mut pace = Pace::default();
        pace.add(done, done / rate, f64::MAX);
        pace
    }

    #[test]
    fn experts_come_up_where_that_is_sooner() {
        let memory = Arc::new(MmapMut::map_anon(1 << 16).unwrap());
        let weight = || {
            let (n_in, n_out, format) = (256, 64, Format::Q8_0);
            let bytes = Bytes::in_memory(&memory, 0..n_out * format.row_bytes(n_in));
            let name = "w".into();
            Weight {
                name,
                format,
                n_in,
                n_out,
                bytes,
            }
        };
        let (gate, up, down) = (weight(), weight(), weight());
        let expert = Expert { gate, up, down };
        // A byte and a sixteenth for each product.
        let unknown = Pace::default();
        let by = |link, host| stream_from(&expert, 2, link, host);
        assert_eq!(
            by(unknown, unknown),
            26,
            "300 G products and 12 GB a second"
        );
        assert_eq!(by(pace(1.2e9, 2e9), unknown), 265);
        assert_eq!(by(pace(12e9, 2e9), pace(600e9, 1e11)), 53);
        assert_eq!(
            by(pace(1.2e9, 1e8), pace(600e9, 1e9)),
            26,
            "too little was seen"
        );
        assert_eq!(by(pace(1e15, 2e9), pace(1e9, 1e11)), LEAST_STREAM);
        // What is older counts less.
        let mut host = pace(100e9, 1e13);
        host.add(1e13, 50.0, 1e13);
        host.add(1e13, 50.0, 1e13);
        assert!(host.rate(1.0).unwrap() > 140e9, "{host:?}");
    }
}
