//! A device for tests: memory of its own, the CPU's kernels, and faults on demand.

use super::{Absent, Back, Device, Fault, Host, Pass, Product, Share, small_at};
use crate::gguf::Bytes;
use crate::moe::attention::{Place, attend};
use crate::moe::kv::{KV_BLOCK, Plane};
use crate::moe::linear::{Input, Job, Weight, matmul};
use crate::moe::router::{Choice, route};
use crate::moe::{Config, Kv, KvType, Machine};
use crate::quant::float::{LANES, dots};
use half::f16;
use memmap2::MmapMut;
use std::collections::{HashMap, VecDeque};
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
}

impl Software {
    /// The rows of an expert.
    fn expert(&self, input: &Input, share: &Share<'_>) -> Vec<f32> {
        let m = &self.machine;
        let [gate, up, down] = self.filled_with(share.slot) else {
            panic!("it was filled with an expert");
        };
        assert_eq!(*gate.bytes, *share.expert.gate.bytes);
        let (n, pick) = (share.pick.len(), share.pick);
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
        {
            let mut script = self.script.lock().unwrap();
            if script.no_room > 0 {
                script.no_room -= 1;
                return Err(Fault::Full);
            }
            script.rows += shares.iter().map(|s| s.pick.len()).sum::<usize>();
        }
        let out: Vec<f32> = shares.iter().flat_map(|s| self.expert(input, s)).collect();
        self.out = out;
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
        {
            let mut script = self.script.lock().unwrap();
            if script.no_room > 0 {
                script.no_room -= 1;
                return Err(Fault::Full);
            }
        }
        let c = pass.config;
        let (n, d, n_used) = (pass.seats.len(), c.d_model, c.n_used);
        let (d_q, d_kv, half) = (c.n_head * c.d_head, c.n_kv * c.d_head, c.n_rot / 2);
        let small = self.slots[&pass.small].raw.as_chunks().0;
        let small: Vec<f32> = small.iter().map(|b| f32::from_le_bytes(*b)).collect();
        let all: Vec<u32> = (0..n as u32).collect();
        let mut x = pass.x.to_vec();
        let (mut h, mut heads) = (vec![0.0; n * d], vec![0.0; n * d_q]);
        let mut input = Input::default();

        // The sequences: their first tokens, their blocks, and a cache for each.
        let new = |t: &usize| *t == 0 || pass.seats[*t].first != pass.seats[*t - 1].first;
        let firsts: Vec<usize> = (0..n).filter(new).collect();
        let mut sequences = Vec::new();
        for (i, first) in firsts.iter().enumerate() {
            let end = firsts.get(i + 1).copied().unwrap_or(n);
            let (seat, last) = (pass.seats[*first], pass.seats[end - 1]);
            assert_eq!((last.pos - seat.pos) as usize, end - 1 - first);
            let blocks = &pass.blocks[seat.first as usize..];
            let blocks = &blocks[..last.pos as usize / KV_BLOCK + 1];
            let kv = self.cache(c, blocks, seat.pos as usize, end - first);
            sequences.push((*first..end, blocks, kv));
        }

        let words = back.room(c, n, pass.wanted.len());
        let (mut fresh, mut chosen) = (Vec::new(), Vec::new());
        for (i, slots) in pass.layers.iter().enumerate() {
            let weights = &pass.weights.layers[i];
            let [attn_norm, ffn_norm, router] = small_at(c, i);
            let norm = |x: &[f32], w: usize, h: &mut [f32], m: &Machine| {
                for (x, h) in x.chunks_exact(d).zip(h.chunks_exact_mut(d)) {
                    m.kernels.rms_norm(x, &small[w..w + d], c.rms_eps, h);
                }
            };
            norm(&x, attn_norm, &mut h, &self.machine);
            let m = &self.machine;
            input.prepare(m, &h, d, [&weights.q, &weights.k, &weights.v]);
            let [q, k, v, o] = slots.attention;
            let mut q = self.product(q, &weights.q, &input, &all);
            let mut k = self.product(k, &weights.k, &input, &all);
            let v = self.product(v, &weights.v, &input, &all);
            for t in 0..n {
                let (cos, sin) = (&pass.cos[t * half..], &pass.sin[t * half..]);
                let q = q[t * d_q..][..d_q].chunks_exact_mut(c.d_head);
                for head in q.chain(k[t * d_kv..][..d_kv].chunks_exact_mut(c.d_head)) {
                    m.kernels
                        .rope(&mut head[..c.n_rot], &cos[..half], &sin[..half]);
                }
            }
            for (tokens, _, kv) in &mut sequences {
                for t in tokens.clone() {
                    let (pos, row) = (pass.seats[t].pos as usize, t * d_kv..(t + 1) * d_kv);
                    kv.write(i, pos, &k[row.clone()], &v[row]);
                }
            }
            let narrow = |x: &f32| f16::from_f32_const(*x);
            fresh.extend(k.iter().chain(&v).map(narrow));
            let places = sequences.iter().flat_map(|(tokens, _, kv)| {
                tokens.clone().map(|t| Place {
                    kv,
                    pos: pass.seats[t].pos as usize,
                })
            });
            let places: Vec<_> = places.collect();
            attend(m, c, i, &places, &mut q, &mut heads);
            input.prepare(m, &heads, d_q, [&weights.o]);
            let o = self.product(o, &weights.o, &input, &all);
            m.kernels.add(&o, &mut x);
            norm(&x, ffn_norm, &mut h, m);

            let mut choices = vec![Choice::default(); n * n_used];
            for (h, choices) in h.chunks_exact(d).zip(choices.chunks_exact_mut(n_used)) {
                let rows = small[router..router + c.n_expert * d].chunks_exact(d);
                let dot = |row| dots::<[f32; LANES], f32, 1>([row], h)[0];
                let logits: Vec<f32> = rows.map(dot).collect();
                route(&logits, choices);
            }
            let used = weights.experts.iter().flat_map(|e| [&e.gate, &e.up]);
            input.prepare(m, &h, d, used);
            let mut rows = vec![f32::NAN; n * n_used * d];
            let (mut absent, mut homes) = (Vec::new(), Vec::new());
            for (e, slot) in slots.experts.iter().enumerate() {
                let its = choices.iter().enumerate();
                let its = its.filter(|(_, c)| c.expert as usize == e);
                let its: Vec<usize> = its.map(|(at, _)| at).collect();
                let pick: Vec<u32> = its.iter().map(|at| (at / n_used) as u32).collect();
                match slot {
                    _ if its.is_empty() => {}
                    Some(slot) => {
                        let share = Share {
                            slot: *slot,
                            expert: &weights.experts[e],
                            pick: &pick,
                        };
                        let computed = self.expert(&input, &share);
                        self.script.lock().unwrap().rows += its.len();
                        for (row, at) in computed.chunks_exact(d).zip(its) {
                            rows[at * d..][..d].copy_from_slice(row);
                        }
                    }
                    None if pick.len() >= pass.stream_from => {
                        // Slots by turns, filled and used before the next one comes.
                        let expert = &weights.experts[e];
                        let slot =
                            pass.ring[self.script.lock().unwrap().streamed % pass.ring.len()];
                        self.script.lock().unwrap().streamed += 1;
                        let into = self.slots.get_mut(&slot).expect("a slot that there is");
                        assert!(expert.bytes() <= into.bytes);
                        into.weights = expert.weights().map(copied).into();
                        let share = Share {
                            slot,
                            expert,
                            pick: &pick,
                        };
                        let computed = self.expert(&input, &share);
                        self.script.lock().unwrap().rows += its.len();
                        for (row, at) in computed.chunks_exact(d).zip(its) {
                            rows[at * d..][..d].copy_from_slice(row);
                        }
                    }
                    None => {
                        absent.push(Absent { expert: e, pick });
                        homes.extend(its);
                    }
                }
            }
            let mut theirs = vec![f32::NAN; homes.len() * d];
            if !absent.is_empty() && !host.experts(i, &h, &absent, &mut theirs) {
                return Ok(false);
            }
            for (row, at) in theirs.chunks_exact(d).zip(homes) {
                rows[at * d..][..d].copy_from_slice(row);
            }
            for (at, (row, choice)) in rows.chunks_exact(d).zip(&choices).enumerate() {
                let x = &mut x[at / n_used * d..][..d];
                m.kernels.add_scaled(choice.weight, row, x);
            }
            chosen.extend(choices);
            if host.passed(i).is_break() {
                return Ok(false);
            }
        }
        let last = small.len() - d;
        for (x, h) in x.chunks_exact(d).zip(h.chunks_exact_mut(d)) {
            let (m, w) = (&self.machine, &small[last..]);
            m.kernels.rms_norm(x, w, c.rms_eps, h);
        }
        let head = &pass.weights.head;
        input.prepare(&self.machine, &h, d, [head]);
        let logits = self.product(pass.head, head, &input, pass.wanted);
        let (kv, rest) = words.split_at_mut(fresh.len() / 2);
        let (choices, out) = rest.split_at_mut(2 * chosen.len());
        bytemuck::cast_slice_mut::<f32, f16>(kv).copy_from_slice(&fresh);
        bytemuck::cast_slice_mut::<f32, Choice>(choices).copy_from_slice(&chosen);
        out.copy_from_slice(&logits);
        for (_, blocks, kv) in sequences {
            self.keep(c, blocks, &kv);
        }
        Ok(true)
    }
}
