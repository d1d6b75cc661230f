//! Whole passes by equality: the same bits as on the CPU, in logits and in the cache, whatever happens to sequences and devices.

use super::*;
use crate::error::Error;
use crate::moe::Observer;
use crate::moe::kv::KV_BLOCK;
use crate::moe::offload::small_at;
use std::ops::ControlFlow;

fn small_bytes(model: &Model) -> u64 {
    let c = &model.config;
    4 * (small_at(c, c.n_layer)[0] + c.d_model) as u64
}

/// Memory of a device that has `percent` of the experts, and the least part for keys and values: an eighth.
fn memory_for(model: &Model, percent: u64) -> u64 {
    let weights = dense_bytes(model) + expert_bytes(model) * percent / 100;
    small_bytes(model) + weights * 8 / 7 + 8
}

fn whole(memory: u64) -> Script {
    Script {
        memory,
        whole: true,
        ..Script::default()
    }
}

fn called(script: &Mutex<Script>, what: &str) -> usize {
    let script = script.lock().unwrap();
    script.calls.iter().filter(|c| **c == what).count()
}

/// The same steps on a model, which may have a device, and on one without: all logits and all caches must be the same.
struct Pair {
    alone: Model,
    model: Model,
    kvs: Vec<[Kv; 2]>,
    scratch: [Scratch; 2],
    random: Random,
}

impl Pair {
    fn new(model: Model) -> Pair {
        Pair {
            alone: demo(2, Ram::Mapped),
            model,
            kvs: Vec::new(),
            scratch: Default::default(),
            random: Random(99),
        }
    }

    /// A new sequence; returns its number.
    fn begin(&mut self, kind: KvType) -> usize {
        let new = || Kv::new(&self.alone.config, kind, 1024);
        self.kvs.push([new(), new()]);
        self.kvs.len() - 1
    }

    fn truncate(&mut self, sequence: usize, len: usize) {
        self.kvs[sequence]
            .iter_mut()
            .for_each(|kv| kv.truncate(len));
    }

    fn fork(&mut self, sequence: usize, len: usize) -> usize {
        let forks = self.kvs[sequence].each_ref().map(|kv| kv.fork(len));
        self.kvs.push(forks);
        self.kvs.len() - 1
    }

    /// So many tokens for each of some sequences.
    fn step(&mut self, parts: &[(usize, usize, Want)]) {
        self.step_seen(parts, &mut ());
    }

    fn step_seen(&mut self, parts: &[(usize, usize, Want)], observer: &mut dyn Observer) {
        let random = &mut self.random;
        let tokens: Vec<Vec<u32>> = parts
            .iter()
            .map(|(_, n, _)| (0..*n).map(|_| 3 + random.next() as u32 % 4000).collect())
            .collect();
        let mut logits = Vec::new();
        for side in 0..2 {
            let mut kvs: Vec<Option<&mut Kv>> = Vec::new();
            kvs.extend(self.kvs.iter_mut().map(|pair| Some(&mut pair[side])));
            let mut runs: Vec<Run<'_>> = (parts.iter().zip(&tokens))
                .map(|((i, _, want), tokens)| Run {
                    kv: kvs[*i].take().unwrap(),
                    tokens,
                    want: *want,
                })
                .collect();
            let scratch = &mut self.scratch[side];
            let rows = match side {
                0 => self.alone.forward(&mut runs, scratch),
                _ => self.model.observe(&mut runs, scratch, observer),
            };
            let bits = rows.unwrap().iter().map(|x| x.to_bits());
            logits.push(bits.collect::<Vec<_>>());
        }
        assert!(logits[0] == logits[1], "{parts:?}");
        for (i, _, _) in parts {
            self.same_caches(*i);
        }
    }

    fn same_caches(&self, sequence: usize) {
        let [a, b] = &self.kvs[sequence];
        assert_eq!(a.len(), b.len());
        for layer in 0..self.alone.config.n_layer {
            for pos in 0..a.len() {
                let rows = [a, b].map(|kv| position(kv, layer, pos));
                assert!(rows[0] == rows[1], "sequence {sequence}, {layer}, {pos}");
            }
        }
    }
}

/// The bytes of a position's keys and values in a layer, by head.
fn position(kv: &Kv, layer: usize, pos: usize) -> Vec<u8> {
    use crate::moe::kv::What;
    let [_, heads, d_head] = kv.shape();
    let (keys, values) = &*kv.blocks(layer)[pos / KV_BLOCK];
    let mut out = Vec::new();
    for (plane, what) in [(keys, What::Keys), (values, What::Values)] {
        for (bytes, together) in plane.arrays(what, d_head) {
            let places = bytes.chunks_exact(KV_BLOCK * together);
            for place in places {
                out.extend(&place[pos % KV_BLOCK * together..][..together]);
            }
        }
    }
    assert!(heads > 0 && !out.is_empty());
    out
}

/// The demo model with a device that has `memory` beside what it computes with, and everything there that there is room for.
fn demo_on(device: Box<dyn Device>, memory: u64) -> (Model, Heard) {
    let mut model = demo(2, Ram::Mapped);
    let (plan, heard) = plan_beside(device, memory, &model);
    model.offload_to(plan);
    model.settle();
    (model, heard)
}

/// A plan for a device that has `memory` beside what it computes with.
fn plan_beside(device: Box<dyn Device>, memory: u64, model: &Model) -> (Plan, Heard) {
    let c = &model.config;
    let more = device.scratch(c.d_model, c.d_ff) + device.whole(c).unwrap();
    plan(device, memory.saturating_add(more))
}

/// [`demo_on`] an emulated GPU, with its driver; nothing without a C++ compiler.
fn demo_emulated(tensor_cores: bool, memory: u64) -> Option<(Model, Heard, Arc<Emulated>)> {
    let gpu = Gpu::new(Emulated::new(tensor_cores)?).unwrap();
    let driver = Arc::clone(&gpu.driver);
    let (model, heard) = demo_on(Box::new(gpu), memory);
    Some((model, heard, driver))
}

/// Devices that take whole passes of the demo model, with `percent` of its experts: one in software, the kernels on a CPU (with
/// tensor cores' instructions, where all experts are there), and a GPU if there is one.
fn whole_devices(percent: u64) -> Vec<(&'static str, Model, Heard)> {
    let mut all: Vec<(&'static str, Box<dyn Device>)> = Vec::new();
    let memory = memory_for(&demo(1, Ram::Mapped), percent);
    all.push(("software", scripted(whole(memory)).0));
    let slow = |name: &str| name.starts_with("emulated");
    let wanted = |name: &str| name.contains("tensor cores") == (percent == 100);
    let more = devices().into_iter();
    all.extend(more.filter(|(name, _)| !slow(name) || wanted(name)));
    let mut out = Vec::new();
    for (name, device) in all {
        let (model, heard) = demo_on(device, memory);
        out.push((name, model, heard));
    }
    out
}

#[test]
fn a_whole_pass_gives_the_same_bits_for_any_share_of_experts() {
    let alone = answer(&demo(2, Ram::Mapped), PROMPT, 8);
    for percent in [0, 40, 90, 100] {
        let mut model = demo(2, Ram::Mapped);
        let memory = memory_for(&model, percent);
        let (device, script) = scripted(whole(memory));
        let (plan, heard) = plan(device, memory);
        model.offload_to(plan);
        model.settle();
        assert!(answer(&model, PROMPT, 8) == alone, "{percent}%");
        assert_eq!(called(&script, "pass"), 9, "the prompt and 8 tokens");
        assert_eq!(called(&script, "start") + called(&script, "multiply"), 0);
        // Norms and routers went up, and no keys or values: all were computed there.
        assert_eq!(script.lock().unwrap().put as u64, small_bytes(&model));
        let (c, held) = (&model.config, model.store().reads().gpu);
        let choices = ((PROMPT + 8) * c.n_layer * c.n_used) as u64;
        let rows = script.lock().unwrap().rows as u64;
        assert_eq!((held.choices, held.there), (choices, rows));
        // Slots that experts of long prompts pass through take some of it.
        assert!((100 * rows / choices).abs_diff(percent) <= 22);
        assert!(heard.lock().unwrap().is_empty());
    }
    let alone = answer(&demo(2, Ram::Mapped), 12, 3);
    for percent in [60, 100] {
        for (name, model, heard) in whole_devices(percent) {
            assert!(answer(&model, 12, 3) == alone, "{name} {percent}%");
            let held = model.store().reads().gpu;
            assert_eq!(held.choices == held.there, percent == 100, "{name}");
            assert!(held.there > 0 && heard.lock().unwrap().is_empty());
        }
    }
}

/// Observers who look at rows are shown them, by the CPU.
struct Looks(usize);

impl Observer for Looks {
    fn residual(&mut self, _: usize, rows: &[f32]) {
        self.0 += rows.len();
    }
}

/// Growth over blocks, cuts, forks, batches of several sequences, passes of the CPU in between.
#[test]
fn caches_are_the_same_whatever_happens_to_sequences() {
    for percent in [70, 100] {
        for (_, model, heard) in whole_devices(percent) {
            let mut pair = Pair::new(model);
            let a = pair.begin(KvType::F16);
            pair.step(&[(a, 50, Want::Nothing)]);
            pair.step(&[(a, 20, Want::Last)]);
            pair.step(&[(a, 1, Want::Last)]);
            // Said again, from the middle of a block on.
            pair.truncate(a, 40);
            pair.step(&[(a, 3, Want::All)]);
            pair.step(&[(a, 30, Want::Last)]);
            let b = pair.fork(a, 65);
            let c = pair.fork(a, 20);
            let d = pair.begin(KvType::F16);
            pair.step(&[
                (a, 1, Want::Last),
                (b, 2, Want::All),
                (c, 1, Want::Nothing),
                (d, 1, Want::Last),
            ]);
            pair.step(&[(d, 9, Want::Last), (c, 1, Want::Last), (b, 12, Want::All)]);
            // The CPU's turn: somebody looks on.
            let mut looks = Looks(0);
            pair.step_seen(&[(b, 2, Want::Last), (a, 1, Want::Last)], &mut looks);
            assert!(looks.0 > 0);
            pair.step(&[(a, 1, Want::Last), (b, 1, Want::Last)]);
            pair.truncate(b, 0);
            pair.step(&[(b, 2, Want::Last)]);
            assert!(heard.lock().unwrap().is_empty());
        }
    }
}

/// Other types of cache, and what somebody looks at, do without whole passes; what a device has of the experts is still used.
#[test]
fn what_a_device_does_not_take_is_split() {
    let mut model = demo(2, Ram::Mapped);
    let memory = memory_for(&model, 100);
    let (device, script) = scripted(whole(memory));
    model.offload_to(plan(device, memory).0);
    model.settle();
    let mut pair = Pair::new(model);
    for kind in [KvType::Q8, KvType::F32] {
        let a = pair.begin(kind);
        pair.step(&[(a, 5, Want::Last)]);
        pair.step(&[(a, 1, Want::Last)]);
    }
    assert_eq!(called(&script, "pass"), 0);
    assert!(called(&script, "start") > 0);
    // One of them is enough.
    let (q, f) = (pair.begin(KvType::Q8), pair.begin(KvType::F16));
    pair.step(&[(q, 2, Want::Last), (f, 2, Want::Last)]);
    assert_eq!(called(&script, "pass"), 0);
    pair.step(&[(f, 2, Want::Last)]);
    assert_eq!(called(&script, "pass"), 1);
}

#[test]
fn a_device_that_is_lost_in_a_whole_pass_changes_no_bit() {
    let run = |lives: Option<usize>| {
        let mut model = demo(2, Ram::Mapped);
        let memory = memory_for(&model, 60);
        let script = Script {
            lives,
            ..whole(memory)
        };
        let (device, script) = scripted(script);
        let (plan, heard) = plan(device, memory);
        model.offload_to(plan);
        model.settle();
        let mut pair = Pair::new(model);
        let a = pair.begin(KvType::F16);
        pair.step(&[(a, 9, Want::Last)]);
        pair.step(&[(a, 1, Want::Last)]);
        let b = pair.fork(a, 8);
        pair.step(&[(b, 1, Want::Last), (a, 1, Want::Last)]);
        assert_eq!(heard.lock().unwrap().len(), usize::from(lives.is_some()));
        if lives.is_some() {
            let held = pair.model.store().reads().gpu;
            assert_eq!((held.experts, held.dense), (0, 0));
        }
        script.lock().unwrap().calls.len()
    };
    let calls = run(None);
    // Those at the beginning fill slots, each like the next.
    for lives in (0..calls.saturating_sub(40)).step_by(11) {
        run(Some(lives));
    }
    for lives in calls.saturating_sub(40)..calls {
        run(Some(lives));
    }
}

/// The driver fails in the middle of a pass, at one call after the other.
#[test]
fn a_driver_that_fails_in_a_whole_pass_changes_no_bit() {
    let run = |lives: usize| -> Option<usize> {
        let memory = memory_for(&demo(1, Ram::Mapped), 60);
        let (model, heard, handle) = demo_emulated(false, memory)?;
        let mut pair = Pair::new(model);
        let a = pair.begin(KvType::F16);
        pair.step(&[(a, 2, Want::Last)]);
        handle.lives.store(lives, Ordering::Relaxed);
        pair.step(&[(a, 1, Want::Last)]);
        let used = lives - handle.lives.load(Ordering::Relaxed);
        pair.step(&[(a, 1, Want::Last)]);
        assert!(heard.lock().unwrap().len() <= 1);
        Some(used)
    };
    let Some(calls) = run(usize::MAX) else { return };
    assert!(calls > 40, "{calls}");
    for lives in (0..calls).step_by(calls / 6) {
        run(lives);
    }
}

#[test]
fn keys_and_values_without_room_give_way_or_stay_with_the_cpu() {
    let mut model = demo(2, Ram::Mapped);
    let memory = memory_for(&model, 30);
    let (device, script) = scripted(whole(memory));
    let (plan, heard) = plan(device, memory);
    model.offload_to(plan);
    model.settle();
    let c = &model.config;
    let block = 4 * c.n_layer * c.n_kv * c.d_head * KV_BLOCK;
    let room = (memory - small_bytes(&model)) as usize / 8 / block;
    let mut pair = Pair::new(model);
    // Each takes most of the room: whoever comes makes the other go, and brings its own again.
    let most = (room - 1) * KV_BLOCK;
    assert!((2..8).contains(&room), "{room} blocks");
    let sequences = [(); 2].map(|()| pair.begin(KvType::F16));
    for a in sequences {
        pair.step(&[(a, most, Want::Nothing)]);
    }
    let before = script.lock().unwrap().put;
    pair.step(&[(sequences[0], 1, Want::Last)]);
    let brought = script.lock().unwrap().put - before;
    assert_eq!(brought, (room - 1) * block, "all of it went up again");
    pair.step(&[(sequences[0], 1, Want::Last)]);
    assert_eq!(script.lock().unwrap().put - before, brought);
    assert_eq!(called(&script, "pass"), 4);
    // A sequence that is gone makes room first.
    drop(pair.kvs.drain(..));
    let a = pair.begin(KvType::F16);
    pair.step(&[(a, most, Want::Nothing)]);
    assert!(heard.lock().unwrap().is_empty());
    // More than there is room for: said once, and done by the CPU.
    pair.step(&[(a, 2 * KV_BLOCK, Want::Last)]);
    pair.step(&[(a, 1, Want::Last)]);
    assert_eq!(called(&script, "pass"), 5);
    assert_eq!(heard.lock().unwrap().len(), 1, "{heard:?}");
    // Cut again, it fits; the device has what it had, up to there.
    pair.truncate(a, 10);
    pair.step(&[(a, 2, Want::Last)]);
    assert_eq!(called(&script, "pass"), 6);
}

#[test]
fn a_whole_pass_without_memory_for_its_rows_costs_an_expert() {
    let mut model = demo(2, Ram::Mapped);
    let memory = memory_for(&model, 100);
    let script = Script {
        no_room: 2,
        ..whole(memory)
    };
    let (device, script) = scripted(script);
    let (plan, heard) = plan(device, memory);
    model.offload_to(plan);
    model.settle();
    let experts = model.store().reads().gpu.experts;
    let mut pair = Pair::new(model);
    let a = pair.begin(KvType::F16);
    pair.step(&[(a, 4, Want::Last)]);
    pair.step(&[(a, 1, Want::Last)]);
    pair.step(&[(a, 1, Want::Last)]);
    assert_eq!(pair.model.store().reads().gpu.experts, experts - 2);
    assert_eq!((called(&script, "pass"), called(&script, "unmake")), (3, 2));
    assert_eq!(heard.lock().unwrap().len(), 2);
}

/// Whoever says how long contexts become gets room for just that, and experts get the rest; a longer one is the CPU's.
#[test]
fn keys_and_values_have_the_room_of_a_context() {
    let c = demo(1, Ram::Mapped).config;
    let block = 4 * c.n_layer * c.n_kv * c.d_head * KV_BLOCK;
    let on = |context: Option<usize>| {
        let mut model = demo(2, Ram::Mapped);
        let memory = memory_for(&model, 70);
        let (device, script) = scripted(whole(memory));
        let (plan, heard) = plan(device, memory);
        model.offload_to(Plan { context, ..plan });
        model.settle();
        let experts = model.store().reads().gpu.experts;
        (Pair::new(model), script, heard, experts)
    };
    let (_, _, _, by_default) = on(None);
    let (mut pair, script, heard, experts) = on(Some(KV_BLOCK + 1));
    assert!(
        experts > by_default,
        "{experts} {by_default}: two blocks ({block} bytes each) are less than an eighth"
    );
    let a = pair.begin(KvType::F16);
    pair.step(&[(a, 2 * KV_BLOCK - 2, Want::Last)]);
    pair.step(&[(a, 2, Want::Last)]);
    assert_eq!(called(&script, "pass"), 2);
    // The device has no weights of the CPU's attention to give: it goes on with experts and matrices.
    pair.step(&[(a, 1, Want::Last)]);
    pair.step(&[(a, 3, Want::Last)]);
    assert_eq!(called(&script, "pass"), 2);
    assert!(called(&script, "start") > 0);
    assert_eq!(heard.lock().unwrap().len(), 1, "{heard:?}");
    pair.truncate(a, KV_BLOCK);
    pair.step(&[(a, 3, Want::Last)]);
    assert_eq!(called(&script, "pass"), 3);

    // More than there is: what every token reads comes before, experts do without.
    let (mut pair, script, heard, experts) = on(Some(usize::MAX));
    assert_eq!(experts, 0);
    let a = pair.begin(KvType::F16);
    let room = script.lock().unwrap().memory as usize;
    let room = room - small_bytes(&pair.model) as usize - dense_bytes(&pair.model) as usize;
    assert!(room / block > 8);
    pair.step(&[(a, 9 * KV_BLOCK, Want::Last)]);
    pair.step(&[(a, 1, Want::Last)]);
    assert_eq!(called(&script, "pass"), 2);
    assert!(heard.lock().unwrap().is_empty());
}

#[test]
fn a_device_without_memory_for_whole_passes_gives_them_up() {
    let mut model = demo(2, Ram::Mapped);
    let memory = memory_for(&model, 20);
    let script = Script {
        no_room: 1000,
        ..whole(memory)
    };
    let (device, script) = scripted(script);
    let (plan, heard) = plan(device, memory);
    model.offload_to(plan);
    model.settle();
    let experts = model.store().reads().gpu.experts as usize;
    assert!(experts > 2);
    let mut pair = Pair::new(model);
    let a = pair.begin(KvType::F16);
    // Each costs an expert at least.
    for _ in 0..experts + 2 {
        pair.step(&[(a, 1, Want::Last)]);
    }
    let held = pair.model.store().reads().gpu;
    assert_eq!(held.experts, 0);
    assert_eq!(held.dense, dense_bytes(&pair.model), "these stay");
    assert_eq!(heard.lock().unwrap().len(), experts + 1, "{heard:?}");
    let tried = called(&script, "pass");
    // Small weights, blocks and slots that experts pass through went, too.
    assert!(called(&script, "unmake") > experts);
    pair.step(&[(a, 5, Want::Last)]);
    assert_eq!(called(&script, "pass"), tried);
    assert!(called(&script, "multiply") > 0);
}

/// Where some experts are there and some are not, the host waits for the device once: at the end. What it needs to compute its own
/// it fetches while the device's experts run.
#[test]
fn the_host_computes_while_the_devices_experts_run() {
    let memory = memory_for(&demo(1, Ram::Mapped), 60);
    let Some((model, _, handle)) = demo_emulated(false, memory) else {
        return;
    };
    let n_layer = model.config.n_layer;
    let counts = || [&handle.reads, &handle.fetched].map(|n| n.load(Ordering::Relaxed));
    let mut pair = Pair::new(model);
    let a = pair.begin(KvType::F16);
    pair.step(&[(a, 12, Want::Last)]);
    let [reads, fetched] = counts();
    assert_eq!(reads, n_layer + 1, "choices of each layer, and the end");
    assert!((1..=n_layer).contains(&fetched));
    for _ in 0..3 {
        let before = counts();
        pair.step(&[(a, 1, Want::Last)]);
        let now = counts();
        assert_eq!(now[0] - before[0], 1);
        assert!(now[1] - before[1] > 2);
    }
}

/// Ends a pass after some layers.
struct Impatient(usize);

impl Observer for Impatient {
    fn sees_rows(&self) -> bool {
        false
    }

    fn passed(&mut self, layer: usize) -> ControlFlow<()> {
        match layer + 1 == self.0 {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        }
    }
}

#[test]
fn a_whole_pass_that_is_ended_leaves_the_cache_as_it_was() {
    for (name, model, _) in whole_devices(70) {
        let mut pair = Pair::new(model);
        let a = pair.begin(KvType::F16);
        pair.step(&[(a, 9, Want::Nothing)]);
        for tokens in [&[5; 10][..], &[5; 2]] {
            let run = Run {
                kv: &mut pair.kvs[a][1],
                tokens,
                want: Want::Last,
            };
            let mut observer = Impatient(2);
            let ended = pair
                .model
                .observe(&mut [run], &mut pair.scratch[1], &mut observer);
            assert!(matches!(ended, Err(Error::Interrupted)), "{name}");
            pair.step(&[(a, 1, Want::Last)]);
        }
    }
}

/// An answer's tokens are replays of one record, as long as the cache has room in it.
#[test]
fn tokens_of_an_answer_are_replayed() {
    let Some((model, _, handle)) = demo_emulated(true, u64::MAX) else {
        return;
    };
    let mut pair = Pair::new(model);
    let a = pair.begin(KvType::F16);
    pair.step(&[(a, 9, Want::Last)]);
    assert_eq!(handle.replays.load(Ordering::Relaxed), 0);
    for token in 1..4 {
        pair.step(&[(a, 1, Want::Last)]);
        assert_eq!(handle.replays.load(Ordering::Relaxed), token);
        assert_eq!(handle.records(), 1);
    }
    // Two tokens, as when a guess is checked, are another record.
    pair.step(&[(a, 2, Want::All)]);
    assert_eq!(handle.records(), 2);
}

/// Experts that are not there come through the device where they have many tokens, in slots by turns: the same bits, each slot
/// written when the kernels of the one before have ended, and read when all of it has arrived (which `Emulated` looks at).
#[test]
fn experts_of_a_long_prompt_pass_through() {
    let steps = |pair: &mut Pair| {
        let a = pair.begin(KvType::F16);
        pair.step(&[(a, 110, Want::Nothing)]);
        pair.step(&[(a, 1, Want::Last)]);
    };
    let mut model = demo(2, Ram::Mapped);
    let memory = memory_for(&model, 50);
    let (device, script) = scripted(whole(memory));
    model.offload_to(plan(device, memory).0);
    model.settle();
    assert!(model.pass_tokens(512) > 512);
    let mut pair = Pair::new(model);
    steps(&mut pair);
    let streamed = script.lock().unwrap().streamed;
    assert!(streamed > 3, "{streamed}: more than there are slots");
    let held = pair.model.store().reads().gpu;
    assert_eq!(held.there, script.lock().unwrap().rows as u64);

    let Some((model, heard, handle)) = demo_emulated(false, memory) else {
        return;
    };
    let before = handle.staged.load(Ordering::Relaxed);
    let mut pair = Pair::new(model);
    steps(&mut pair);
    let staged = handle.staged.load(Ordering::Relaxed) - before;
    // Three matrices each. A slot is a little larger there than in software, so that not quite as many experts have one.
    assert_eq!(staged % 3, 0);
    assert!(staged / 3 > 3, "{staged}");
    assert!(heard.lock().unwrap().is_empty());
}

#[test]
fn a_forecast_is_what_happens() {
    use crate::moe::offload::forecast::{forecast, needs};
    let c = demo(1, Ram::Mapped).config;
    for percent in [0, 55, 100] {
        let mut model = demo(1, Ram::Mapped);
        let Some(driver) = Emulated::new(false) else {
            return;
        };
        let gpu = Box::new(Gpu::new(driver).unwrap());
        let (plan, _) = plan_beside(gpu, memory_for(&model, percent), &model);
        let memory = plan.memory;
        let told = forecast(&c, &model.weights, memory, None, None);
        let more = memory - memory_for(&model, percent);
        model.offload_to(plan);
        model.settle();
        let held = model.store().reads().gpu;
        assert_eq!(
            (told.experts, told.bytes),
            (held.experts as usize, held.bytes)
        );
        assert_eq!((told.dense, told.of as u64), (held.dense, held.of));
        assert!(told.kv > 0 && told.kv_tokens > 0 && told.scratch > more);
        assert!((told.hits - held.experts as f64 / held.of as f64).abs() < 1e-6);
        assert_eq!(told.left == 0.0, held.experts == held.of, "{told:?}");
        assert!(told.scratch + told.kv + told.dense + told.bytes <= memory);
    }
    // However much memory there is: what would lie there if it were enough.
    let weights = demo(1, Ram::Mapped).weights;
    let (all, needs) = (
        forecast(&c, &weights, 1 << 40, None, None),
        needs(&c, &weights),
    );
    assert_eq!(
        (needs.experts, needs.of, needs.bytes),
        (all.experts, all.of, all.bytes)
    );
    let small = 4 * (small_at(&c, c.n_layer)[0] + c.d_model) as u64;
    assert_eq!(needs.dense, all.dense + small);
    assert_eq!(needs.scratch + small, all.scratch);
    assert_eq!(
        needs.kv_token,
        Some((4 * c.n_layer * c.n_kv * c.d_head) as u64)
    );
    assert_eq!(needs.without, []);
    let none = forecast(&c, &weights, 0, None, None);
    assert_eq!(
        (none.dense, none.experts, none.scratch, none.kv),
        (0, 0, 0, 0)
    );
}
