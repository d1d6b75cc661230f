//! The kernels of whole passes one by one, by equality with the CPU's, in shapes that the demo model does not have.

use super::*;
use crate::moe::attention::{Place, attend};
use crate::moe::kv::{KV_BLOCK, Plane};
use crate::moe::offload::driver::Arg::{self, Int, Long};
use crate::moe::offload::driver::{float, int};
use crate::moe::router::{Choice, route};
use crate::moe::{Config, offload::Seat};
use crate::quant::act::{ActKind, CHUNK, Chunk};
use crate::quant::float::{LANES, dots};
use bytemuck::{Pod, Zeroable};
use half::f16;

/// Kernels with their arguments made of slices.
struct Bench {
    driver: Emulated,
}

impl Bench {
    /// Both ways of running them; none without a C++ compiler.
    fn all() -> Vec<Bench> {
        let both = [false, true].into_iter().filter_map(|reverse| {
            let driver = Emulated::new(false)?;
            driver.reverse.store(reverse, Ordering::Relaxed);
            Some(Bench { driver })
        });
        both.collect()
    }

    fn put<T: Pod>(&self, x: &[T]) -> u64 {
        let bytes = bytemuck::cast_slice(x);
        let at = self.driver.alloc(bytes.len()).unwrap();
        self.driver.write(at, bytes).unwrap();
        at
    }

    fn get<T: Pod>(&self, at: u64, n: usize) -> Vec<T> {
        let mut out = vec![T::zeroed(); n];
        let bytes = bytemuck::cast_slice_mut(&mut out);
        self.driver.read(at, bytes).unwrap();
        out
    }

    fn run(&self, kernel: &str, grid: [usize; 2], args: &[Arg]) {
        let grid = grid.map(|n| n as u32);
        // SAFETY: each test passes what its kernel wants, in memory that it has made large enough.
        unsafe { self.driver.launch(kernel, grid, args) }.unwrap();
    }
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

#[test]
fn norms_of_any_width() {
    let kernels = Machine::new(1, None).unwrap().kernels;
    let mut random = Random(17);
    for d in [1, 15, 16, 96, 100, 129, 256, 1000, 1280] {
        let mut floats = |n: usize| -> Vec<f32> { (0..n).map(|_| 4.0 * random.float()).collect() };
        let (x, add, w) = (floats(3 * d), floats(2 * d), floats(d));
        // Row 2 and row 0, with something added.
        let picks = [2u32, 0];
        let (mut want_x, mut want) = (x.clone(), vec![0.0; 2 * d]);
        for (i, t) in picks.iter().enumerate() {
            let row = &mut want_x[*t as usize * d..][..d];
            kernels.add(&add[i * d..][..d], row);
            kernels.rms_norm(row, &w, 1e-5, &mut want[i * d..][..d]);
        }
        // The same as activations, of the kinds that have blocks in such a width.
        let kinds = [ActKind::Q8, ActKind::Q8K];
        let n_chunks = d.div_ceil(CHUNK);
        let want_chunks = kinds.map(|kind| {
            let mut chunks = vec![Chunk::zeroed(); 2 * n_chunks];
            for (at, chunk) in chunks.iter_mut().enumerate() {
                let row = &want[at % 2 * d..][..d];
                let part = &row[at / 2 * CHUNK..d.min((at / 2 + 1) * CHUNK)];
                kernels.quantize(kind, part, chunk);
            }
            chunks
        });
        for bench in Bench::all() {
            let at = bench.put(&x);
            let h = bench.put(&vec![f32::NAN; 2 * d]);
            let chunks = kinds.map(|kind| match d.is_multiple_of(kind.block()) {
                true => bench.put(&vec![Chunk::zeroed(); 2 * n_chunks]),
                false => 0,
            });
            let [add, picks, w] = [bench.put(&add), bench.put(&picks), bench.put(&w)];
            let [q8, q8k] = chunks.map(Long);
            let ends = [Long(w), float(1e-5), Long(h), q8, q8k, int(d), Long(0)];
            let args = [&[Long(at), Long(add), Long(picks)][..], &ends].concat();
            bench.run("norm_rows", [2, 1], &args);
            assert_eq!(bits(&bench.get(at, 3 * d)), bits(&want_x), "{d}");
            assert_eq!(bits(&bench.get(h, 2 * d)), bits(&want), "{d}");
            for (at, want) in chunks.iter().zip(&want_chunks).filter(|(at, _)| **at != 0) {
                let got: Vec<u8> = bench.get(*at, size_of_val(&want[..]));
                assert!(got == bytemuck::cast_slice::<_, u8>(want), "{d}");
            }
        }
    }
}

/// What becomes of a float as it enters the cache: every f16, the middle to the next one, and what is beside both.
#[test]
fn floats_are_narrowed_as_the_cpu_narrows_them() {
    let mut all = Vec::new();
    for h in 0..=u16::MAX {
        let x = f16::from_bits(h).to_f32().to_bits();
        // Half of what lies between two neighbours is at most 2^12 ulp of the float, for subnormal ones more.
        all.extend([0, 1, 0xfff, 0x1000, 0x1001].map(|more| x.wrapping_add(more)));
    }
    for exponent in 90..130u32 {
        for mantissa in [0, 1, 0x3fffff, 0x400000, 0x400001, 0x600000, 0x7fffff] {
            all.push(exponent << 23 | mantissa);
        }
    }
    let v: Vec<f32> = all.iter().map(|x| f32::from_bits(*x)).collect();
    let want: Vec<u16> = v
        .iter()
        .map(|x| f16::from_f32_const(*x).to_bits())
        .collect();
    let Some(bench) = Bench::all().pop() else {
        return;
    };
    let n = v.len();
    let block = bench.put(&vec![0u16; 2 * n * KV_BLOCK]);
    let fresh = bench.put(&vec![0u16; 2 * n]);
    let seat = bench.put(&[Seat { first: 0, pos: 3 }]);
    let [list, v] = [bench.put(&[block]), bench.put(&v)];
    let from = [v, v, v, v, v, seat, list, 0, fresh].map(Long);
    let sizes = [int(1), Int(0), Int(1), int(n), Int(0), float(1.0), Long(0)];
    bench.run("rotate_heads", [2, 1], &[&from[..], &sizes].concat());
    let got: Vec<u16> = bench.get(fresh, 2 * n);
    let wrong = got[n..].iter().zip(&want).position(|(a, b)| a != b);
    assert_eq!(wrong.map(|i| all[i]), None);
    let cached: Vec<u16> = bench.get(block, 2 * n * KV_BLOCK);
    assert!(cached[n * KV_BLOCK + 3 * n..][..n] == want);
}

#[test]
fn attention_of_any_shape() {
    let machine = Machine::new(1, None).unwrap();
    let base = demo(1, Ram::Mapped).config;
    let mut random = Random(23);
    for (n_head, n_kv, d_head, n_rot) in [
        (1, 1, 128, 128),
        (6, 2, 40, 32),
        (4, 4, 16, 6),
        (8, 1, 160, 160),
    ] {
        let c = Config {
            n_layer: 2,
            n_head,
            n_kv,
            d_head,
            n_rot,
            ..base.clone()
        };
        let (d_q, d_kv, half) = (n_head * d_head, n_kv * d_head, n_rot / 2);
        // Two sequences, of which the cache has something in layer 1.
        let lens = [61usize, 130];
        let news = [5usize, 2];
        let mut floats = |n: usize| -> Vec<f32> { (0..n).map(|_| 3.0 * random.float()).collect() };
        let mut kvs = lens.map(|_| Kv::new(&c, KvType::F16, 256));
        for ((kv, len), new) in kvs.iter_mut().zip(lens).zip(news) {
            kv.reserve(len + new).unwrap();
            for pos in 0..len {
                let (k, v) = (floats(d_kv), floats(d_kv));
                kv.write(1, pos, &k, &v);
            }
            kv.advance(len);
        }
        let n: usize = news.iter().sum();
        let (q, k, v) = (floats(n * d_q), floats(n * d_kv), floats(n * d_kv));
        let (cos, sin) = (floats(n * half), floats(n * half));

        // On the devices, first: they have the caches as they are now.
        let mut got = Vec::new();
        for bench in Bench::all() {
            let (mut list, mut seats) = (Vec::new(), Vec::new());
            for ((kv, len), new) in kvs.iter().zip(lens).zip(news) {
                let first = list.len() as u32;
                for b in 0..kv.blocks(1).len() {
                    let mut block = Vec::new();
                    for layer in 0..2 {
                        let (Plane::F16(k), Plane::F16(v)) = &*kv.blocks(layer)[b] else {
                            unreachable!();
                        };
                        block.extend_from_slice(k);
                        block.extend_from_slice(v);
                    }
                    list.push(bench.put(&block));
                }
                seats.extend((len..len + new).map(|pos| Seat {
                    first,
                    pos: pos as u32,
                }));
            }
            let room = 4 * KV_BLOCK;
            let at = Long((4 * d_kv * KV_BLOCK) as u64);
            let q = bench.put(&q);
            let fresh = bench.put(&vec![f16::NAN; 2 * n * d_kv]);
            let scores = bench.put(&vec![f32::NAN; n * n_head * room]);
            let out = bench.put(&vec![f32::NAN; n * d_q]);
            let [list, seats] = [bench.put(&list), bench.put(&seats)].map(Long);
            let [k, v, cos, sin] = [&k, &v, &cos, &sin].map(|x| Long(bench.put(x)));
            let scale = float(1.0 / (d_head as f32).sqrt());
            let from = [Long(q), k, v, cos, sin, seats, list, at, Long(fresh)];
            let sizes = [int(n), int(n_head), int(n_kv), int(d_head), int(n_rot)];
            let args = [&from[..], &sizes, &[scale, Long(0)]].concat();
            bench.run("rotate_heads", [n_head + 2 * n_kv, n], &args);
            let ends = [int(n_head), int(n_kv), int(d_head), int(room), Long(0)];
            let args = [&[Long(q), seats, list, at, Long(scores)][..], &ends].concat();
            bench.run("score_keys", [room / KV_BLOCK, n * n_kv], &args);
            let args = [&[Long(scores), seats, list, at, Long(out)][..], &ends].concat();
            bench.run("attend_values", [n_head, n], &args);
            let out: Vec<f32> = bench.get(out, n * d_q);
            let fresh: Vec<f16> = bench.get(fresh, 2 * n * d_kv);
            got.push((bits(&out), fresh));
        }

        let (mut q, mut k) = (q, k);
        for t in 0..n {
            let (cos, sin) = (&cos[t * half..][..half], &sin[t * half..][..half]);
            let q = q[t * d_q..][..d_q].chunks_exact_mut(d_head);
            for head in q.chain(k[t * d_kv..][..d_kv].chunks_exact_mut(d_head)) {
                machine.kernels.rope(&mut head[..n_rot], cos, sin);
            }
        }
        let mut t = 0;
        for ((kv, len), new) in kvs.iter_mut().zip(lens).zip(news) {
            for pos in len..len + new {
                let row = t * d_kv..(t + 1) * d_kv;
                kv.write(1, pos, &k[row.clone()], &v[row]);
                t += 1;
            }
        }
        let places = kvs.iter().zip(lens).zip(news);
        let places: Vec<_> = places
            .flat_map(|((kv, len), new)| (len..len + new).map(move |pos| Place { kv, pos }))
            .collect();
        let mut want = vec![0.0; n * d_q];
        attend(&machine, &c, 1, &places, &mut q, &mut want);
        let narrow = |x: &f32| f16::from_f32_const(*x);
        let fresh: Vec<f16> = k.iter().chain(&v).map(narrow).collect();
        for (out, its_fresh) in got {
            assert!(its_fresh == fresh, "{n_head} {n_kv} {d_head} {n_rot}");
            assert!(out == bits(&want), "{n_head} {n_kv} {d_head} {n_rot}");
        }
    }
}

#[test]
fn routers_of_any_size() {
    let mut random = Random(31);
    for (n_expert, n_used, d) in [(8, 2, 256), (8, 2, 100), (3, 1, 17), (64, 6, 33), (2, 2, 5)] {
        let n = 5;
        let mut floats = |n: usize| -> Vec<f32> { (0..n).map(|_| random.float()).collect() };
        let (mut w, h) = (floats(n_expert * d), floats(n * d));
        // Two that are equal.
        let (first, second) = w.split_at_mut(d);
        second[..d].copy_from_slice(first);
        let mut want = vec![Choice::default(); n * n_used];
        for (h, out) in h.chunks_exact(d).zip(want.chunks_exact_mut(n_used)) {
            let dot = |row| dots::<[f32; LANES], f32, 1>([row], h)[0];
            route(&w.chunks_exact(d).map(dot).collect::<Vec<_>>(), out);
        }
        // The expert that was chosen last is not there.
        let away = want[n * n_used - 1].expert as usize;
        let address = |e: usize, part: usize| ((e + 1) * 1000 + part) as u64;
        let addresses: Vec<u64> = (0..n_expert)
            .flat_map(|e| [0, 1, 2].map(|part| if e == away { 0 } else { address(e, part) }))
            .collect();
        for bench in Bench::all() {
            let choices = bench.put(&vec![Choice::default(); n * n_used]);
            let table = bench.put(&vec![[u64::MAX; 4]; n * n_used]);
            let stop = bench.put(&[0u32]);
            let [w, h, addresses] = [bench.put(&w), bench.put(&h), bench.put(&addresses)];
            let from = [w, h, choices, addresses, table, stop].map(Long);
            let sizes = [Int(9), int(d), int(n_expert), int(n_used)];
            let args = [&from[..], &sizes].concat();
            bench.run("route_tokens", [n, 1], &args);
            assert!(bench.get::<Choice>(choices, n * n_used) == want);
            assert_eq!(bench.get::<u32>(stop, 1), [9]);
            let table: Vec<[u64; 4]> = bench.get(table, n * n_used);
            for (i, (row, choice)) in table.iter().zip(&want).enumerate() {
                let e = choice.expert as usize;
                let parts = [0, 1, 2].map(|p| if e == away { 0 } else { address(e, p) });
                assert_eq!(row[..3], parts);
                assert_eq!(row[3], (i as u64) << 32 | (i / n_used) as u64);
            }
            // A pass that has stopped before does nothing more.
            let args = [&from[..], &[Int(10)], &sizes[1..]].concat();
            bench.driver.write(choices, &[0xff; 8]).unwrap();
            bench.run("route_tokens", [n, 1], &args);
            assert_eq!(bench.get::<u64>(choices, 1), [u64::MAX]);
            assert_eq!(bench.get::<u32>(stop, 1), [9]);
        }
    }
}
