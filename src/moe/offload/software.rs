//! A device for tests: memory of its own, the CPU's kernels, and faults on demand.

use super::{Device, Fault, Product, Share};
use crate::gguf::Bytes;
use crate::moe::Machine;
use crate::moe::linear::{Input, Job, Weight, matmul};
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
    /// What was called: `make`, `unmake`, `fill`, `filled`, `start`, `multiply`, `finish`.
    pub(super) calls: Vec<&'static str>,
    /// Rows that it computed.
    pub(super) rows: usize,
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
        let weights = Vec::new();
        self.slots.insert(self.next, Slot { bytes, weights });
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
        let m = &self.machine;
        self.out.clear();
        for share in shares {
            let on_its_way = self.coming.iter().any(|(s, _)| *s == share.slot);
            assert!(!on_its_way, "only what has arrived is used");
            let [gate, up, down] = &self.slots[&share.slot].weights[..] else {
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
            matmul(
                m,
                &mut [Job {
                    w: down,
                    x: &inner,
                    pick: &all,
                    y: &mut y,
                }],
            );
            self.out.extend(y);
        }
        Ok(())
    }

    fn multiply(&mut self, input: &Input, products: &[Product<'_>]) -> Result<(), Fault> {
        self.call("multiply")?;
        self.out.clear();
        for Product { slot, weight, pick } in products {
            assert!(self.coming.iter().all(|(s, _)| s != slot));
            let [w] = &self.slots[slot].weights[..] else {
                panic!("it was filled with one matrix");
            };
            assert_eq!(*w.bytes, *weight.bytes);
            let (x, mut y) = (input, vec![0.0; pick.len() * w.n_out]);
            let y = &mut y[..];
            matmul(
                &self.machine,
                &mut [Job {
                    w,
                    x,
                    pick,
                    y: &mut *y,
                }],
            );
            self.out.extend_from_slice(y);
        }
        Ok(())
    }

    fn finish(&mut self, out: &mut [f32]) -> Result<(), Fault> {
        self.call("finish")?;
        out.copy_from_slice(&self.out);
        Ok(())
    }
}
