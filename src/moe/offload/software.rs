//! A device for tests: memory of its own, the CPU's kernels, and faults on demand.

use super::{Absent, Back, Device, Fault, Host, Pace, Pass, Product, Seat, Share, small_at};
use crate::gguf::Bytes;
use crate::moe::attention::{Place, attend};
use crate::moe::kv::{KV_BLOCK, Plane};
use crate::moe::linear::{Input, Job, Weight, matmul};
use crate::moe::router::{Choice, route};
use crate::moe::weights::Expert;
use crate::moe::{Config, Kv, KvType, Machine};
use crate::quant::float::{LANES, dots};
use half::f16;
use memmap2::MmapMut;
use std::collections::{HashMap, VecDeque};
use std::ops::Range;
use std::sync::{Arc, Mutex};

/// What a test sees of a device, and does to it.
#[derive(Default)]
pub(super) struct Script {
    /// Bytes that it may give out.
    pub(super) memory: u64,
    /// Bytes that it says it has, if that is not true.
    pub(super) says: Option<u64>,
    /// Calls of `filled` that go by before a copy has ended.
    pub(super) slowness: usize,
    /// Calls until it is lost.
    pub(super) lives: Option<usize>,
    /// The next calls of `start` find no memory for their rows.
    pub(super) no_room: usize,
    /// It takes whole passes.
    pub(super) whole: bool,
    /// How fast weights come to it.
    pub(super) link: Pace,
    /// What was called: `make`, `unmake`, `fill`, `filled`, `start`, `multiply`, `finish`, `put`, `pass`.
    pub(super) calls: Vec<&'static str>,
    /// Rows that it computed.
    pub(super) rows: usize,
    /// Experts that passed through.
    pub(super) streamed: usize,
    /// Bytes that were put into slots.
    pub(super) put: usize,
}

/// The device.
pub(super) struct Software {
    script: Arc<Mutex<Script>>,
    machine: Machine,
    slots: HashMap<usize, Slot>,
    next: usize,
    /// Slots on their way, and for how long.
    coming: VecDeque<(usize, usize)>,
    out: Vec<f32>,
}

struct Slot {
    bytes: u64,
    weights: Vec<Weight>,
    /// What was put there.
    raw: Vec<u8>,
}

impl Software {
    pub(super) fn new(script: &Arc<Mutex<Script>>) -> Software {
        Software {
            script: Arc::clone(script),
            machine: Machine::new(1, None).unwrap(),
            slots: HashMap::new(),
            next: 0,
            coming: VecDeque::new(),
            out: Vec::new(),
        }
    }

    /// Notes a call; fails if the device is lost.
    fn call(&self, what: &'static str) -> Result<(), Fault> {
        let mut script = self.script.lock().unwrap();
        script.calls.push(what);
        match &mut script.lives {
            Some(0) => return Err(Fault::Lost("the test took it away".into())),
            Some(lives) => *lives -= 1,
            None => {}
        }
        Ok(())
    }

    /// The next call that needs memory for its rows finds none, if the test says so.
    fn room(&self) -> Result<(), Fault> {
        let mut script = self.script.lock().unwrap();
        match script.no_room {
            0 => Ok(()),
            _ => {
                script.no_room -= 1;
                Err(Fault::Full)
            }
        }
    }

    /// The rows of an expert.
    fn expert(&self, input: &Input, share: &Share<'_>) -> Vec<f32> {
        let m = &self.machine;
        let [gate, up, down] = self.filled_with(share.slot) else {
            panic!("it was filled with an expert");
        };
        assert_eq!(*gate.bytes, *share.expert.gate.bytes);
        let (n, pick) = (share.pick.len(), share.pick);
        self.script.lock().unwrap().rows += n;
        let mut g = vec![0.0; n * gate.n_out];
        let mut u = vec![0.0; n * up.n_out];
        let mut y = vec![0.0; n * down.n_out];
        let job = |w, y| Job {
            w,
            x: input,
            pick,
            y,
        };
        matmul(m, &mut [job(gate, &mut g), job(up, &mut u)]);
        m.kernels.silu_mul(&mut g, &u);
        let mut inner = Input::default();
        inner.prepare(m, &g, down.n_in, [down]);
        let all: Vec<u32> = (0..n as u32).collect();
        let (w, x, pick) = (down, &inner, &all[..]);
        let out = &mut y[..];
        matmul(m, &mut [Job { w, x, pick, y: out }]);
        y
    }

    /// What was copied into a slot: not before it has arrived.
    fn filled_with(&self, slot: usize) -> &[Weight] {
        let on_its_way = self.coming.iter().any(|(s, _)| *s == slot);
        assert!(!on_its_way, "only what has arrived is used");
        &self.slots[&slot].weights
    }

    /// `w · x` for the tokens of `pick`.
    fn product(&self, slot: usize, weight: &Weight, input: &Input, pick: &[u32]) -> Vec<f32> {
        let [w] = self.filled_with(slot) else {
            panic!("it was filled with one matrix");
        };
        assert_eq!(*w.bytes, *weight.bytes);
        let (x, mut y) = (input, vec![0.0; pick.len() * w.n_out]);
        let out = &mut y[..];
        matmul(&self.machine, &mut [Job { w, x, pick, y: out }]);
        y
    }

    /// A cache of `len` positions and more, as the blocks of a sequence have it.
    fn cache(&self, c: &Config, blocks: &[usize], len: usize, more: usize) -> Kv {
        let mut kv = Kv::new(c, KvType::F16, blocks.len() * KV_BLOCK);
        kv.reserve(len + more).unwrap();
        let plane = 2 * c.n_kv * c.d_head * KV_BLOCK;
        for (b, slot) in blocks.iter().enumerate() {
            let raw = &self.slots[slot].raw;
            for (layer, raw) in raw.chunks_exact(2 * plane).enumerate() {
                let (Plane::F16(k), Plane::F16(v)) = kv.block_mut(layer, b) else {
                    unreachable!();
                };
                let (keys, values) = raw.split_at(plane);
                bytemuck::cast_slice_mut::<f16, u8>(k).copy_from_slice(keys);
                bytemuck::cast_slice_mut::<f16, u8>(v).copy_from_slice(values);
            }
        }
        kv.advance(len);
        kv
    }

    /// The blocks of a sequence as a cache has them.
    fn keep(&mut self, c: &Config, blocks: &[usize], kv: &Kv) {
        for (b, slot) in blocks.iter().enumerate() {
            let slot = self.slots.get_mut(slot).unwrap();
            slot.raw.clear();
            for layer in 0..c.n_layer {
                let (Plane::F16(k), Plane::F16(v)) = &*kv.blocks(layer)[b] else {
                    unreachable!();
                };
                slot.raw.extend_from_slice(bytemuck::cast_slice(k));
                slot.raw.extend_from_slice(bytemuck::cast_slice(v));
            }
            assert!(slot.raw.len() as u64 <= slot.bytes);
        }
    }

    /// The sequences of a pass.
    fn sequences<'p>(&self, pass: &Pass<'p>) -> Vec<Sequence<'p>> {
        let seats = pass.seats.iter().enumerate().collect::<Vec<_>>();
        let same = |a: &(usize, &Seat), b: &(usize, &Seat)| a.1.first == b.1.first;
        let sequence = |seats: &[(usize, &Seat)]| {
            let ((start, seat), (end, last)) = (seats[0], seats[seats.len() - 1]);
            assert_eq!((last.pos - seat.pos) as usize, end - start);
            let blocks = &pass.blocks[seat.first as usize..];
            let blocks = &blocks[..last.pos as usize / KV_BLOCK + 1];
            let kv = self.cache(pass.config, blocks, seat.pos as usize, end + 1 - start);
            Sequence {
                tokens: start..end + 1,
                blocks,
                kv,
            }
        };
        seats.chunk_by(same).map(sequence).collect()
    }

    fn norm(&self, c: &Config, x: &[f32], w: &[f32]) -> Vec<f32> {
        let d = c.d_model;
        let mut h = vec![0.0; x.len()];
        for (x, h) in x.chunks_exact(d).zip(h.chunks_exact_mut(d)) {
            self.machine.kernels.rms_norm(x, &w[..d], c.rms_eps, h);
        }
        h
    }

    /// `x += o · attend(q · h, …)` of a layer; returns the keys and values of the tokens, `(2, n_tok, d_kv)`.
    fn attention(
        &self,
        pass: &Pass<'_>,
        layer: usize,
        h: &[f32],
        sequences: &mut [Sequence<'_>],
        x: &mut [f32],
    ) -> Vec<f16> {
        let (c, m) = (pass.config, &self.machine);
        let (n, half) = (pass.seats.len(), c.n_rot / 2);
        let (d_q, d_kv) = (c.n_head * c.d_head, c.n_kv * c.d_head);
        let weights = &pass.weights.layers[layer];
        let all: Vec<u32> = (0..n as u32).collect();
        let mut input = Input::default();
        input.prepare(m, h, c.d_model, [&weights.q, &weights.k, &weights.v]);
        let [q, k, v, o] = pass.layers[layer].attention;
        let mut q = self.product(q, &weights.q, &input, &all);
        let mut k = self.product(k, &weights.k, &input, &all);
        let v = self.product(v, &weights.v, &input, &all);
        for t in 0..n {
            let (cos, sin) = (&pass.cos[t * half..], &pass.sin[t * half..]);
            let q = q[t * d_q..][..d_q].chunks_exact_mut(c.d_head);
            for head in q.chain(k[t * d_kv..][..d_kv].chunks_exact_mut(c.d_head)) {
                let head = &mut head[..c.n_rot];
                m.kernels.rope(head, &cos[..half], &sin[..half]);
            }
        }
        let pos = |t: usize| pass.seats[t].pos as usize;
        for sequence in &mut *sequences {
            for t in sequence.tokens.clone() {
                let row = t * d_kv..(t + 1) * d_kv;
                sequence.kv.write(layer, pos(t), &k[row.clone()], &v[row]);
            }
        }
        let places = sequences.iter().flat_map(|Sequence { tokens, kv, .. }| {
            tokens.clone().map(move |t| Place { kv, pos: pos(t) })
        });
        let mut heads = vec![0.0; n * d_q];
        attend(m, c, layer, &places.collect::<Vec<_>>(), &mut q, &mut heads);
        input.prepare(m, &heads, d_q, [&weights.o]);
        let o = self.product(o, &weights.o, &input, &all);
        m.kernels.add(&o, x);
        let narrow = |x: &f32| f16::from_f32_const(*x);
        k.iter().chain(&v).map(narrow).collect()
    }

    /// The row of each choice, `(n_tok · n_used, d_model)`: experts that are there, those that pass through, and the host's.
    /// Nothing, if it ends the pass.
    fn experts(
        &mut self,
        pass: &Pass<'_>,
        layer: usize,
        h: &[f32],
        choices: &[Choice],
        host: &mut dyn Host,
    ) -> Option<Vec<f32>> {
        let (d, n_used) = (pass.config.d_model, pass.config.n_used);
        let experts = &pass.weights.layers[layer].experts;
        let mut input = Input::default();
        let used = experts.iter().flat_map(|e| [&e.gate, &e.up]);
        input.prepare(&self.machine, h, d, used);
        let mut rows = vec![f32::NAN; choices.len() * d];
        let (mut absent, mut homes) = (Vec::new(), Vec::new());
        for (e, slot) in pass.layers[layer].experts.iter().enumerate() {
            let its = choices.iter().enumerate();
            let its = its.filter(|(_, c)| c.expert as usize == e);
            let its: Vec<usize> = its.map(|(at, _)| at).collect();
            let pick: Vec<u32> = its.iter().map(|at| (at / n_used) as u32).collect();
            if its.is_empty() {
                continue;
            }
            let slot = match slot {
                Some(slot) => *slot,
                None if pick.len() >= pass.stream_from => self.pass_through(pass, &experts[e]),
                None => {
                    absent.push(Absent { expert: e, pick });
                    homes.extend(its);
                    continue;
                }
            };
            let (expert, pick) = (&*experts[e], &pick[..]);
            let computed = self.expert(&input, &Share { slot, expert, pick });
            for (row, at) in computed.chunks_exact(d).zip(its) {
                rows[at * d..][..d].copy_from_slice(row);
            }
        }
        let mut theirs = vec![f32::NAN; homes.len() * d];
        if !absent.is_empty() && !host.experts(layer, h, &absent, &mut theirs) {
            return None;
        }
        for (row, at) in theirs.chunks_exact(d).zip(homes) {
            rows[at * d..][..d].copy_from_slice(row);
        }
        Some(rows)
    }

    /// Fills one of the slots that experts pass through, by turns: it is used before the next one comes. Returns the slot.
    fn pass_through(&mut self, pass: &Pass<'_>, expert: &Expert) -> usize {
        let mut script = self.script.lock().unwrap();
        let slot = pass.ring[script.streamed % pass.ring.len()];
        script.streamed += 1;
        let into = self.slots.get_mut(&slot).expect("a slot that there is");
        assert!(expert.bytes() <= into.bytes);
        into.weights = expert.weights().map(copied).into();
        slot
    }
}

/// A sequence of a pass.
struct Sequence<'p> {
    /// Its tokens among those of the pass.
    tokens: Range<usize>,
    blocks: &'p [usize],
    /// What is in the blocks.
    kv: Kv,
}

/// A copy of a matrix.
fn copied(w: &Weight) -> Weight {
    let mut memory = MmapMut::map_anon(w.bytes.len()).unwrap();
    memory.copy_from_slice(&w.bytes);
    Weight {
        bytes: Bytes::in_memory(&Arc::new(memory), 0..w.bytes.len()),
        ..w.clone()
    }
}

impl Device for Software {
    fn name(&self) -> String {
        "software".to_string()
    }

    fn free(&mut self) -> Result<u64, Fault> {
        self.call("free")?;
        let script = self.script.lock().unwrap();
        let used: u64 = self.slots.values().map(|slot| slot.bytes).sum();
        Ok(script.says.unwrap_or(script.memory - used))
    }

    fn scratch(&self, _: usize, _: usize) -> u64 {
        0
    }

    fn link(&self) -> Pace {
        self.script.lock().unwrap().link
    }

    fn bytes(&self, weights: &[&Weight]) -> Option<u64> {
        // As a device that has no kernels for floats.
        let integers = weights.iter().all(|w| w.format.block_weights() > 1);
        integers.then(|| weights.iter().map(|w| w.bytes.len() as u64).sum())
    }

    fn make(&mut self, bytes: u64) -> Result<usize, Fault> {
        self.call("make")?;
        let used: u64 = self.slots.values().map(|slot| slot.bytes).sum();
        if used + bytes > self.script.lock().unwrap().memory {
            return Err(Fault::Full);
        }
        self.next += 1;
        let (weights, raw) = (Vec::new(), Vec::new());
        let slot = Slot {
            bytes,
            weights,
            raw,
        };
        self.slots.insert(self.next, slot);
        Ok(self.next)
    }

    fn unmake(&mut self, slot: usize) {
        self.script.lock().unwrap().calls.push("unmake");
        assert!(self.coming.iter().all(|(s, _)| *s != slot));
        self.slots.remove(&slot).expect("a slot that there is");
    }

    fn fill(&mut self, slot: usize, weights: &[&Weight]) -> Result<(), Fault> {
        self.call("fill")?;
        assert!(self.coming.iter().all(|(s, _)| *s != slot));
        let into = self.slots.get_mut(&slot).expect("a slot that there is");
        assert!(weights.iter().map(|w| w.bytes.len() as u64).sum::<u64>() <= into.bytes);
        into.weights = weights.iter().map(|w| copied(w)).collect();
        let slowness = self.script.lock().unwrap().slowness;
        self.coming.push_back((slot, slowness));
        Ok(())
    }

    fn filled(&mut self, wait: bool) -> Result<Vec<usize>, Fault> {
        self.call("filled")?;
        for (_, calls) in &mut self.coming {
            *calls = if wait { 0 } else { calls.saturating_sub(1) };
        }
        let here = self.coming.iter().take_while(|(_, calls)| *calls == 0);
        let n = here.count();
        Ok(self.coming.drain(..n).map(|(slot, _)| slot).collect())
    }

    fn start(&mut self, input: &Input, shares: &[Share<'_>]) -> Result<(), Fault> {
        self.call("start")?;
        self.room()?;
        self.out = shares.iter().flat_map(|s| self.expert(input, s)).collect();
        Ok(())
    }

    fn multiply(&mut self, input: &Input, products: &[Product<'_>]) -> Result<(), Fault> {
        self.call("multiply")?;
        self.out.clear();
        for Product { slot, weight, pick } in products {
            let y = self.product(*slot, weight, input, pick);
            self.out.extend(y);
        }
        Ok(())
    }

    fn finish(&mut self, out: &mut [f32]) -> Result<(), Fault> {
        self.call("finish")?;
        out.copy_from_slice(&self.out);
        Ok(())
    }

    fn whole(&self, _: &Config) -> Option<u64> {
        self.script.lock().unwrap().whole.then_some(0)
    }

    fn put(&mut self, slot: usize, at: u64, bytes: &[u8]) -> Result<(), Fault> {
        self.call("put")?;
        self.script.lock().unwrap().put += bytes.len();
        let slot = self.slots.get_mut(&slot).expect("a slot that there is");
        let end = at as usize + bytes.len();
        assert!(end as u64 <= slot.bytes);
        // Not zero, which would hide what was never written.
        slot.raw.resize(slot.bytes as usize, 0xa5);
        slot.raw[at as usize..end].copy_from_slice(bytes);
        Ok(())
    }

    fn pass(
        &mut self,
        pass: &Pass<'_>,
        host: &mut dyn Host,
        back: &mut Back,
    ) -> Result<bool, Fault> {
        self.call("pass")?;
        self.room()?;
        let c = pass.config;
        let (n, d, n_used) = (pass.seats.len(), c.d_model, c.n_used);
        let small = self.slots[&pass.small].raw.as_chunks().0;
        let small: Vec<f32> = small.iter().map(|b| f32::from_le_bytes(*b)).collect();
        let mut x = pass.x.to_vec();
        let mut sequences = self.sequences(pass);
        let words = back.room(c, n, pass.wanted.len());
        let (mut fresh, mut chosen) = (Vec::new(), Vec::new());
        for layer in 0..c.n_layer {
            let [attn_norm, ffn_norm, router] = small_at(c, layer);
            let h = self.norm(c, &x, &small[attn_norm..]);
            fresh.extend(self.attention(pass, layer, &h, &mut sequences, &mut x));
            let h = self.norm(c, &x, &small[ffn_norm..]);
            let mut choices = vec![Choice::default(); n * n_used];
            for (h, choices) in h.chunks_exact(d).zip(choices.chunks_exact_mut(n_used)) {
                let rows = small[router..router + c.n_expert * d].chunks_exact(d);
                let dot = |row| dots::<[f32; LANES], f32, 1>([row], h)[0];
                let logits: Vec<f32> = rows.map(dot).collect();
                route(&logits, choices);
            }
            let Some(rows) = self.experts(pass, layer, &h, &choices, host) else {
                return Ok(false);
            };
            for (at, (row, choice)) in rows.chunks_exact(d).zip(&choices).enumerate() {
                let x = &mut x[at / n_used * d..][..d];
                self.machine.kernels.add_scaled(choice.weight, row, x);
            }
            chosen.extend(choices);
            if host.passed(layer).is_break() {
                return Ok(false);
            }
        }
        let h = self.norm(c, &x, &small[small.len() - d..]);
        let head = &pass.weights.head;
        let mut input = Input::default();
        input.prepare(&self.machine, &h, d, [head]);
        let logits = self.product(pass.head, head, &input, pass.wanted);
        let (kv, rest) = words.split_at_mut(fresh.len() / 2);
        let (choices, out) = rest.split_at_mut(2 * chosen.len());
        bytemuck::cast_slice_mut::<f32, f16>(kv).copy_from_slice(&fresh);
        bytemuck::cast_slice_mut::<f32, Choice>(choices).copy_from_slice(&chosen);
        out.copy_from_slice(&logits);
        for Sequence { blocks, kv, .. } in sequences {
            self.keep(c, blocks, &kv);
        }
        Ok(true)
    }
}
