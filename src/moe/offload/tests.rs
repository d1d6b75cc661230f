//! The split by equality: wherever experts are computed, the logits are the same bits.

mod kernels;
mod whole;

use super::driver::Driver;
use super::emulated::Emulated;
use super::gpu::Gpu;
use super::software::{Script, Software};
use super::{Device, Fault, Plan, Product, Share};
use crate::gguf::{Bytes, Gguf};
use crate::moe::linear::{Input, Weight};
use crate::moe::weights::Expert;
use crate::moe::{Kv, KvType, Machine, Model, Ram, Run, Scratch, Want};
use crate::quant::Format;
use crate::quant::random::Random;
use crate::quant::search::Plain;
use memmap2::MmapMut;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

fn demo(threads: usize, ram: Ram) -> Model {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/demo-Q4_K_M.gguf");
    let file = Gguf::open(&path).unwrap();
    Model::open_in(&file, Machine::new(threads, None).unwrap(), ram).unwrap()
}

/// Bytes of the model's experts.
fn expert_bytes(model: &Model) -> u64 {
    let layers = model.weights.layers.iter();
    layers.flat_map(|l| &l.experts).map(|e| e.bytes()).sum()
}

/// Bytes of everything else that a device takes: all that is not floats.
fn dense_bytes(model: &Model) -> u64 {
    let dense = model.weights.dense();
    let integers = dense
        .iter()
        .skip(1)
        .filter(|w| w.format.block_weights() > 1);
    integers.map(|w| w.bytes.len() as u64).sum()
}

const PROMPT: usize = 24;

/// The logits of a prompt and of some tokens after it, each the likeliest.
fn answer(model: &Model, prompt: usize, tokens: usize) -> Vec<u32> {
    let mut random = Random(7);
    let mut next: Vec<u32> = (0..prompt)
        .map(|_| 3 + random.next() as u32 % 1000)
        .collect();
    let mut kv = Kv::new(&model.config, KvType::F16, 256);
    let mut scratch = Scratch::default();
    let mut bits = Vec::new();
    for _ in 0..=tokens {
        let run = Run {
            kv: &mut kv,
            tokens: &next,
            want: Want::Last,
        };
        let logits = model.forward(&mut [run], &mut scratch).unwrap();
        bits.extend(logits.iter().map(|x| x.to_bits()));
        let best = logits.iter().enumerate();
        let best = best.max_by(|a, b| a.1.total_cmp(b.1)).unwrap().0;
        next = vec![best as u32];
    }
    bits
}

/// Says what it hears.
type Heard = Arc<Mutex<Vec<String>>>;

fn plan(device: Box<dyn Device>, memory: u64) -> (Plan, Heard) {
    let heard = Heard::default();
    let said = Arc::clone(&heard);
    let plan = Plan {
        device,
        memory,
        shares: None,
        context: None,
        tell: Box::new(move |line| said.lock().unwrap().push(line)),
    };
    (plan, heard)
}

fn scripted(script: Script) -> (Box<Software>, Arc<Mutex<Script>>) {
    let script = Arc::new(Mutex::new(script));
    (Box::new(Software::new(&script)), script)
}

#[test]
fn the_same_bits_for_any_split() {
    let alone = answer(&demo(2, Ram::Mapped), PROMPT, 8);
    for (percent, threads) in [(0, 2), (25, 1), (50, 3), (100, 2)] {
        let mut model = demo(threads, Ram::Mapped);
        // The dense part comes first.
        let experts = expert_bytes(&model) * percent / 100;
        let memory = dense_bytes(&model) + experts;
        let (device, script) = scripted(Script {
            memory,
            ..Script::default()
        });
        let (plan, heard) = plan(device, memory);
        model.offload_to(plan);
        model.settle();
        assert!(answer(&model, PROMPT, 8) == alone, "{percent}%");
        let c = &model.config;
        let held = model.store().reads().gpu;
        let choices = ((PROMPT + 8) * c.n_layer * c.n_used) as u64;
        assert_eq!(held.choices, choices);
        let rows = script.lock().unwrap().rows as u64;
        assert_eq!(held.there, rows);
        let share = 100 * rows / choices;
        assert!(
            share.abs_diff(percent) <= 15,
            "{share}% of choices with {percent}%"
        );
        assert!(percent != 100 || rows == choices);
        let of = (c.n_layer * c.n_expert) as u64;
        assert_eq!((held.of, held.dense), (of, dense_bytes(&model)));
        assert!((100 * held.experts / of).abs_diff(percent) <= 5);
        assert!(held.bytes <= experts && (percent != 100 || held.bytes == experts));
        let calls = &script.lock().unwrap().calls;
        let multiplied = calls.iter().filter(|c| **c == "multiply").count();
        assert_eq!(multiplied, 9 * (2 * c.n_layer + 1), "qkv, o, and the head");
        assert!(heard.lock().unwrap().is_empty());
    }
}

#[test]
fn experts_are_used_when_they_have_arrived_and_nobody_waits_for_them() {
    let alone = answer(&demo(2, Ram::Mapped), PROMPT, 8);
    let mut model = demo(2, Ram::Mapped);
    let memory = expert_bytes(&model) + dense_bytes(&model);
    let (device, script) = scripted(Script {
        memory,
        slowness: 4,
        ..Script::default()
    });
    model.offload_to(plan(device, memory).0);
    assert!(answer(&model, PROMPT, 8) == alone);
    let script = script.lock().unwrap();
    let calls: Vec<_> = script.calls.iter().filter(|c| **c != "free").collect();
    let position = |what: &str| calls.iter().position(|c| **c == what).unwrap();
    // Filled between passes only: the first three passes find nothing there.
    let looks = calls[..position("start")]
        .iter()
        .filter(|c| ***c == "filled");
    assert_eq!(looks.count(), 4);
    let last_fill = calls.iter().rposition(|c| **c == "fill").unwrap();
    assert!(last_fill < position("start"));
    let c = &model.config;
    assert_eq!(
        script.rows,
        6 * c.n_layer * c.n_used,
        "all of the six passes that were left"
    );
}

#[test]
fn a_device_with_less_memory_than_it_says_holds_fewer() {
    let alone = answer(&demo(2, Ram::Mapped), PROMPT, 4);
    let mut model = demo(2, Ram::Mapped);
    let all = expert_bytes(&model) + dense_bytes(&model);
    let third = dense_bytes(&model) + expert_bytes(&model) / 3;
    let (device, script) = scripted(Script {
        memory: third,
        says: Some(all),
        no_room: 5,
        ..Script::default()
    });
    let (plan, heard) = plan(device, all);
    model.offload_to(plan);
    model.settle();
    let before = model.store().reads().gpu;
    assert!(before.experts > 0 && before.bytes <= expert_bytes(&model) / 3);
    assert!(answer(&model, PROMPT, 4) == alone);
    // Five times there was no memory for the rows, and an expert went each time.
    let after = model.store().reads().gpu;
    assert_eq!(after.experts, before.experts - 5);
    assert!(after.bytes < before.bytes && after.there > 0);
    assert_eq!(heard.lock().unwrap().len(), 6, "{heard:?}");
    let unmade = |script: &Script| script.calls.iter().filter(|c| **c == "unmake").count();
    assert_eq!(unmade(&script.lock().unwrap()), 5);
}

#[test]
fn a_device_that_is_lost_at_any_time_changes_no_bit() {
    let alone = answer(&demo(2, Ram::Mapped), 3, 3);
    let run = |lives: Option<usize>, ram: Ram| {
        let mut model = demo(2, ram);
        let memory = dense_bytes(&model) + expert_bytes(&model) / 2;
        let (device, script) = scripted(Script {
            memory,
            lives,
            ..Script::default()
        });
        let (plan, heard) = plan(device, memory);
        model.offload_to(plan);
        model.settle();
        assert!(answer(&model, 3, 3) == alone, "lost after {lives:?} calls");
        let heard = heard.lock().unwrap();
        match lives {
            None => assert!(heard.is_empty()),
            Some(_) => {
                assert_eq!(heard.len(), 1, "said once: {heard:?}");
                assert!(heard[0].contains("the test took it away"), "{heard:?}");
                let held = model.store().reads().gpu;
                assert_eq!((held.experts, held.bytes, held.dense), (0, 0, 0));
            }
        }
        script.lock().unwrap().calls.len()
    };
    let calls = run(None, Ram::Mapped);
    for lives in 0..calls {
        run(Some(lives), Ram::Mapped);
    }
    // What the device had was not in memory: it is read then.
    let within = || Ram::Within {
        bytes: crate::memory::resident().unwrap() + (1 << 30),
        shares: None,
    };
    run(None, within());
    for lives in (0..calls).rev().take(8) {
        run(Some(lives), within());
    }
}

/// What a device has, no other memory has to hold; what it has not, is read from the disk.
#[test]
fn a_device_and_a_budget_of_memory() {
    let alone = answer(&demo(2, Ram::Mapped), PROMPT, 4);
    for percent in [30, 100] {
        let ram = Ram::Within {
            bytes: crate::memory::resident().unwrap() + (1 << 30),
            shares: None,
        };
        let mut model = demo(2, ram);
        let memory = dense_bytes(&model) + expert_bytes(&model) * percent / 100;
        let (device, _) = scripted(Script {
            memory,
            ..Script::default()
        });
        model.offload_to(plan(device, memory).0);
        model.settle();
        assert!(answer(&model, PROMPT, 4) == alone, "{percent}%");
        let reads = model.store().reads();
        let rest = reads.gpu.choices - reads.gpu.there;
        assert_eq!(rest == 0, percent == 100);
        assert!(reads.wanted <= rest, "{reads:?}");
        assert!(reads.told().unwrap().contains("GPU: "));
    }
}

/// Two threads, one device: whoever finds it taken does without.
#[test]
fn passes_from_several_threads_share_a_device() {
    let alone = answer(&demo(2, Ram::Mapped), PROMPT, 4);
    let mut model = demo(2, Ram::Mapped);
    let memory = dense_bytes(&model) + expert_bytes(&model) / 2;
    let (device, _) = scripted(Script {
        memory,
        ..Script::default()
    });
    model.offload_to(plan(device, memory).0);
    let (model, alone) = (&model, &alone);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(move || assert!(answer(model, PROMPT, 4) == *alone));
        }
    });
}

/// The profile says which experts to begin with.
#[test]
fn the_hottest_by_a_profile_come_first() {
    let mut model = demo(1, Ram::Mapped);
    let c = model.config.clone();
    let all = expert_bytes(&model);
    let hot = |key: usize| key % c.n_expert == 5;
    let experts = c.n_layer * c.n_expert;
    let shares = (0..experts)
        .map(|k| if hot(k) { 0.9 } else { 0.1 })
        .collect();
    let (device, _) = scripted(Script {
        memory: 2 * all,
        ..Script::default()
    });
    // One expert of each layer, and a little more.
    let memory = dense_bytes(&model) + all / c.n_expert as u64 + 100;
    let plan = Plan {
        shares: Some(shares),
        ..plan(device, memory).0
    };
    model.offload_to(plan);
    model.settle();
    let offload = model.store().offload().unwrap();
    for layer in 0..c.n_layer {
        for e in 0..c.n_expert {
            assert_eq!(offload.holds(layer, e), e == 5, "{layer} {e}");
        }
    }
}

/// A matrix of random weights.
fn weight(format: Format, n_out: usize, n_in: usize, random: &mut Random) -> Weight {
    let row = format.row_bytes(n_in);
    let mut memory = MmapMut::map_anon(n_out * row).unwrap();
    let mut x = vec![0.0; n_in];
    for out in memory.chunks_exact_mut(row) {
        x.fill_with(|| random.float());
        format.encode::<Plain>(&x, None, out);
    }
    Weight {
        name: "w".into(),
        format,
        n_in,
        n_out,
        bytes: Bytes::in_memory(&Arc::new(memory), 0..n_out * row),
    }
}

/// Devices that run `offload.cu`: a CPU that takes itself for one, without and with tensor cores' instructions, its threads in
/// two orders, and a GPU where there is one. No CPU without a C++ compiler.
fn devices() -> Vec<(&'static str, Box<dyn Device>)> {
    let mut devices: Vec<(_, Box<dyn Device>)> = Vec::new();
    for (name, tensor_cores) in [("emulated", false), ("emulated with tensor cores", true)] {
        if let Some(driver) = Emulated::new(tensor_cores) {
            driver.reverse.store(tensor_cores, Ordering::Relaxed);
            devices.push((name, Box::new(Gpu::new(driver).unwrap())));
        }
    }
    #[cfg(feature = "cuda")]
    match super::cuda::open(0, None) {
        Ok(gpu) => devices.push(("GPU", gpu)),
        Err(why) => {
            // Said past the test harness, which hides what a test prints.
            let word = format!("SKIPPED: the kernels on a GPU: {why}\n");
            std::io::Write::write_all(&mut std::io::stderr(), word.as_bytes()).unwrap();
        }
    }
    devices
}

/// Runs experts on a device, `picks[i]` tokens on the `i`-th.
fn run_on(
    device: &mut dyn Device,
    experts: &[Arc<Expert>],
    input: &Input,
    picks: &[Vec<u32>],
) -> Vec<u32> {
    let mut slots = Vec::new();
    for expert in experts {
        let bytes = device.bytes(&expert.weights()).unwrap();
        let slot = device.make(bytes).unwrap();
        device.fill(slot, &expert.weights()).unwrap();
        slots.push(slot);
    }
    let mut filled = device.filled(true).unwrap();
    filled.sort();
    assert_eq!(filled, slots);
    let shares: Vec<_> = (slots.iter().zip(experts).zip(picks))
        .map(|((slot, expert), pick)| Share {
            slot: *slot,
            expert,
            pick,
        })
        .collect();
    let rows: usize = picks.iter().map(Vec::len).sum();
    let mut out = vec![f32::NAN; rows * experts[0].down.n_out];
    device.start(input, &shares).unwrap();
    device.finish(&mut out).unwrap();
    slots.into_iter().for_each(|slot| device.unmake(slot));
    out.iter().map(|x| x.to_bits()).collect()
}

/// The kernels, run on the CPU, against the CPU's own, by equality: every format, few and many tokens, tiles that are not
/// full, chunks that are not full, waves; with and without tensor cores' instructions, in two orders of threads.
#[test]
fn the_kernels_give_the_cpus_bits() {
    use Format::*;
    let shapes = [
        (Q4_K, Q6_K, 512, 1280),
        (Q5_K, Q4_K, 1280, 256),
        (Q6_K, Q5_K, 256, 512),
        (Q4_0, Q8_0, 96, 1184),
        (Q8_0, Q4_0, 1120, 160),
        (Q4_K, Q8_0, 256, 96),
    ];
    let machine = Machine::new(1, None).unwrap();
    let mut devices = devices();
    let mut random = Random(42);
    for (first, second, d, d_ff) in shapes {
        // Outputs that fill no tiles: 4 rows a warp, 64 a tile.
        let experts: Vec<_> = (0..3)
            .map(|_| {
                Arc::new(Expert {
                    gate: weight(first, d_ff, d, &mut random),
                    up: weight(first, d_ff, d, &mut random),
                    down: weight(second, d, d_ff, &mut random),
                })
            })
            .collect();
        let n_tok = 150;
        let x: Vec<f32> = (0..n_tok * d).map(|_| 3.0 * random.float()).collect();
        let mut input = Input::default();
        input.prepare(&machine, &x, d, [&experts[0].gate]);
        let mut pick = |n: usize| -> Vec<u32> {
            (0..n)
                .map(|_| random.next() as u32 % n_tok as u32)
                .collect()
        };
        let cases = [
            vec![pick(1)],
            vec![pick(1), pick(1)],
            vec![pick(7), pick(70), pick(2)],
            vec![pick(3), pick(1), pick(130)],
        ];
        for picks in &cases {
            let experts = &experts[..picks.len()];
            let script = Script {
                memory: 1 << 30,
                ..Script::default()
            };
            let want = run_on(&mut *scripted(script).0, experts, &input, picks);
            for (name, device) in &mut devices {
                let got = run_on(&mut **device, experts, &input, picks);
                let counts: Vec<_> = picks.iter().map(Vec::len).collect();
                let first_wrong = got.iter().zip(&want).position(|(a, b)| a != b);
                assert_eq!(
                    first_wrong, None,
                    "{name}: {first:?} {second:?} {d} {d_ff}, {counts:?} tokens"
                );
            }
        }
    }
}

/// Files of the old layout may have experts of several formats in a layer.
#[test]
fn experts_of_another_format_stay_with_the_cpu() {
    let mut random = Random(3);
    let mut expert = |gate, down| {
        Arc::new(Expert {
            gate: weight(gate, 64, 32, &mut random),
            up: weight(gate, 64, 32, &mut random),
            down: weight(down, 32, 64, &mut random),
        })
    };
    use Format::*;
    let experts = [
        expert(Q5_0, Q8_0),
        expert(Q8_0, Q4_0),
        expert(Q4_0, Q4_0),
        expert(Q8_0, Q4_0),
        expert(Q8_0, Q8_0),
    ];
    // Nothing is known of the first.
    let mut bytes = [None, Some(1), Some(2), Some(1), Some(3)];
    super::leave_out_others(&mut bytes, &experts);
    assert_eq!(bytes, [None, Some(1), None, Some(1), None]);
    let mut none = [None; 5];
    super::leave_out_others(&mut none, &experts);
    assert_eq!(none, [None; 5]);
    for (name, device) in devices() {
        assert_eq!(device.bytes(&experts[0].weights()), None, "{name}");
        let parts = device.bytes(&experts[1].weights());
        assert_eq!(parts, Some(2 * 2304 + 1280), "{name}: in steps of 256");
    }
}

/// Matrices of several formats with the same tokens: a few, one by one, and many.
#[test]
fn products_give_the_cpus_bits() {
    use Format::*;
    let machine = Machine::new(1, None).unwrap();
    let mut random = Random(11);
    let d = 512;
    let formats = [Q4_K, Q8_0, Q6_K, Q5_K, Q4_0];
    let sizes = [70, 5, 256, 130, 33];
    let weights: Vec<_> = (formats.iter().zip(sizes))
        .map(|(format, n_out)| weight(*format, n_out, d, &mut random))
        .collect();
    let x: Vec<f32> = (0..100 * d).map(|_| random.float()).collect();
    let mut input = Input::default();
    input.prepare(&machine, &x, d, &weights);
    let mut pick = |n: usize| -> Vec<u32> { (0..n).map(|_| random.next() as u32 % 100).collect() };
    for n in [1, 3, 8, 75] {
        let picks = pick(n);
        let run = |device: &mut dyn Device| -> Vec<u32> {
            let mut products = Vec::new();
            for weight in &weights {
                let slot = device.make(device.bytes(&[weight]).unwrap()).unwrap();
                device.fill(slot, &[weight]).unwrap();
                let pick = &picks[..];
                products.push(Product { slot, weight, pick });
            }
            assert_eq!(device.filled(true).unwrap().len(), weights.len());
            device.multiply(&input, &products).unwrap();
            let mut out = vec![f32::NAN; n * sizes.iter().sum::<usize>()];
            device.finish(&mut out).unwrap();
            out.iter().map(|x| x.to_bits()).collect()
        };
        let script = Script {
            memory: 1 << 30,
            ..Script::default()
        };
        let want = run(&mut *scripted(script).0);
        for tensor_cores in [false, true] {
            let Some(driver) = Emulated::new(tensor_cores) else {
                return;
            };
            assert!(run(&mut Gpu::new(driver).unwrap()) == want, "{n}");
        }
    }
}

/// More rows than go through the device's buffers together.
#[test]
fn rows_go_in_waves() {
    let machine = Machine::new(1, None).unwrap();
    let mut random = Random(5);
    let experts: Vec<_> = (0..3)
        .map(|_| {
            Arc::new(Expert {
                gate: weight(Format::Q8_0, 64, 32, &mut random),
                up: weight(Format::Q8_0, 64, 32, &mut random),
                down: weight(Format::Q4_0, 32, 64, &mut random),
            })
        })
        .collect();
    let x: Vec<f32> = (0..100 * 32).map(|_| random.float()).collect();
    let mut input = Input::default();
    input.prepare(&machine, &x, 32, [&experts[0].gate]);
    let mut pick = |n: usize| -> Vec<u32> { (0..n).map(|_| random.next() as u32 % 100).collect() };
    let picks = [pick(1000), pick(5), pick(1500)];
    let script = Script {
        memory: 1 << 30,
        ..Script::default()
    };
    let want = run_on(&mut *scripted(script).0, &experts, &input, &picks);
    for (name, mut device) in devices() {
        assert!(
            run_on(&mut *device, &experts, &input, &picks) == want,
            "{name}"
        );
    }
}

/// The whole way: the demo model with all of its weights on each.
#[test]
fn the_demo_model_on_a_device() {
    let alone = answer(&demo(2, Ram::Mapped), 40, 2);
    for (name, device) in devices() {
        let mut model = demo(2, Ram::Mapped);
        let (plan, heard) = plan(device, u64::MAX);
        model.offload_to(plan);
        model.settle();
        assert!(answer(&model, 40, 2) == alone, "{name}");
        let held = model.store().reads().gpu;
        assert_eq!(held.choices, held.there);
        assert!(held.dense >= dense_bytes(&model));
        assert!(heard.lock().unwrap().is_empty());
    }
}

#[test]
fn a_buffer_that_finds_no_memory_is_a_fault_and_no_more() {
    let Some(driver) = Emulated::new(false) else {
        return;
    };
    let machine = Machine::new(1, None).unwrap();
    let mut random = Random(9);
    let expert = Arc::new(Expert {
        gate: weight(Format::Q8_0, 64, 32, &mut random),
        up: weight(Format::Q8_0, 64, 32, &mut random),
        down: weight(Format::Q8_0, 32, 64, &mut random),
    });
    let x: Vec<f32> = (0..32).map(|_| random.float()).collect();
    let mut input = Input::default();
    input.prepare(&machine, &x, 32, [&expert.gate]);
    let mut gpu = Gpu::new(driver).unwrap();
    let slot = gpu.make(gpu.bytes(&expert.weights()).unwrap()).unwrap();
    gpu.fill(slot, &expert.weights()).unwrap();
    assert_eq!(gpu.filled(true).unwrap(), [slot]);
    let share = Share {
        slot,
        expert: &expert,
        pick: &[0],
    };
    let room = &gpu.driver.room;
    let all = room.swap(200 << 10, Ordering::Relaxed);
    assert_eq!(gpu.make(1 << 20), Err(Fault::Full));
    assert_eq!(gpu.start(&input, &[share]), Err(Fault::Full));
    gpu.driver.room.fetch_add(all / 2, Ordering::Relaxed);
    let share = Share {
        slot,
        expert: &expert,
        pick: &[0],
    };
    assert_eq!(gpu.start(&input, &[share]), Ok(()));
    let mut out = [f32::NAN; 32];
    gpu.finish(&mut out).unwrap();
    assert!(out.iter().all(|x| x.is_finite()));
    assert!(gpu.driver.free().unwrap() > 0);
}
