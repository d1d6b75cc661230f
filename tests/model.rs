//! The model against the reference implementation, and against itself (promise 1).

use crate::{data, ids, reference};
use octet::gguf::Gguf;
use octet::moe::{Kv, KvType, Machine, Model, Run, Scratch, Want};
use octet::simd::{self, Tier};

fn open(file: &str, threads: usize, cap: Option<Tier>) -> Model {
    Model::open(
        &Gguf::open(&data(file)).unwrap(),
        Machine::new(threads, cap).unwrap(),
    )
    .unwrap()
}

/// Logits after every token, computed in batches of at most `ubatch`.
pub(crate) fn logits(model: &Model, kv: &mut Kv, tokens: &[u32], ubatch: usize) -> Vec<f32> {
    let mut scratch = Scratch::default();
    let mut all = Vec::new();
    for tokens in tokens.chunks(ubatch) {
        let run = Run {
            kv,
            tokens,
            want: Want::All,
        };
        all.extend_from_slice(model.forward(&mut [run], &mut scratch).unwrap());
    }
    all
}

fn argmax(logits: &[f32]) -> u32 {
    (0..logits.len()).fold(0, |best, i| if logits[i] > logits[best] { i } else { best }) as u32
}

#[test]
fn logits_agree_with_the_reference() {
    let model = open("demo-BF16.gguf", 0, None);
    let n_vocab = model.config.n_vocab;
    for prompt in reference() {
        let tokens = ids(&prompt["ids"]);
        let mut kv = Kv::new(&model.config, KvType::F32, model.config.n_ctx);
        let all = logits(&model, &mut kv, &tokens, 512);
        let last = &all[all.len() - n_vocab..];

        let limit = 1e-3 * prompt["max_abs_logit"].as_f64().unwrap();
        let mut order: Vec<u32> = (0..n_vocab as u32).collect();
        order.sort_by(|a, b| last[*b as usize].total_cmp(&last[*a as usize]));
        for (rank, pair) in prompt["last_top10"].as_array().unwrap().iter().enumerate() {
            let (id, want) = (pair[0].as_u64().unwrap() as u32, pair[1].as_f64().unwrap());
            assert_eq!(order[rank], id, "rank {rank} of {:?}", prompt["text"]);
            let got = last[id as usize] as f64;
            assert!(
                (got - want).abs() <= limit,
                "{got} for {want} of {:?}",
                prompt["text"]
            );
        }

        let nll: f64 = tokens
            .windows(2)
            .zip(all.chunks(n_vocab))
            .map(|(pair, row)| {
                let max = row.iter().copied().fold(f32::MIN, f32::max) as f64;
                let sum: f64 = row.iter().map(|l| (*l as f64 - max).exp()).sum();
                max + sum.ln() - row[pair[1] as usize] as f64
            })
            .sum::<f64>()
            / (tokens.len() - 1) as f64;
        let want = prompt["mean_nll"].as_f64().unwrap();
        assert!((nll - want).abs() < 1e-3 * want, "nll {nll} for {want}");

        let greedy = ids(&prompt["greedy"]);
        let (mut next, mut out) = (argmax(last), Vec::new());
        while out.len() < greedy.len() {
            out.push(next);
            next = argmax(&logits(&model, &mut kv, &[next], 1));
        }
        assert_eq!(out, greedy, "{:?}", prompt["text"]);
    }
}

/// Promise 1: tiers, threads and batch splits change no bit.
#[test]
fn one_answer() {
    let text: Vec<u32> = reference()
        .iter()
        .flat_map(|p| ids(&p["ids"]))
        .take(150)
        .collect();
    for file in ["demo-BF16.gguf", "../../models/demo-Q4_K_M.gguf"] {
        for kind in KvType::ALL {
            let run = |threads: usize, cap: Option<Tier>, ubatch: usize| {
                let model = open(file, threads, cap);
                let mut kv = Kv::new(&model.config, kind, model.config.n_ctx);
                logits(&model, &mut kv, &text, ubatch)
                    .iter()
                    .map(|l| l.to_bits())
                    .collect::<Vec<_>>()
            };
            let want = run(1, None, 512);
            for tier in simd::available() {
                assert!(run(2, Some(tier), 512) == want, "{file} {kind:?} {tier:?}");
            }
            for threads in [2, 3, 8] {
                assert!(
                    run(threads, None, 32) == want,
                    "{file} {kind:?} {threads} threads"
                );
            }
            for ubatch in [1, 7, 32] {
                assert!(
                    run(2, None, ubatch) == want,
                    "{file} {kind:?} ubatch {ubatch}"
                );
            }
        }
    }
}

/// The bits do not depend on the machine either: this hash was computed on x86-64 with AVX-512, and
/// every other machine, tier and compiler must find it again.
#[test]
fn the_same_bits_on_every_machine() {
    let model = open("../../models/demo-Q4_K_M.gguf", 0, None);
    let tokens = ids(&reference()[2]["ids"]);
    let mut kv = Kv::new(&model.config, KvType::F16, 512);
    let all = logits(&model, &mut kv, &tokens, 512);
    let hash = all.iter().fold(0xcbf2_9ce4_8422_2325u64, |h, l| {
        (h ^ l.to_bits() as u64).wrapping_mul(0x100_0000_01b3)
    });
    assert_eq!(format!("{hash:016x}"), "780da64635e48c2d");
}

/// Sequences that share a batch do not see each other.
#[test]
fn neighbours_in_a_batch_change_nothing() {
    let model = open("../../models/demo-Q4_K_M.gguf", 2, None);
    let prompts: Vec<Vec<u32>> = reference().iter().map(|p| ids(&p["ids"])).collect();
    let alone: Vec<Vec<f32>> = prompts
        .iter()
        .map(|p| {
            logits(
                &model,
                &mut Kv::new(&model.config, KvType::F16, 512),
                p,
                512,
            )
        })
        .collect();
    let mut kvs: Vec<Kv> = prompts
        .iter()
        .map(|_| Kv::new(&model.config, KvType::F16, 512))
        .collect();
    let mut runs: Vec<Run<'_>> = kvs
        .iter_mut()
        .zip(&prompts)
        .map(|(kv, tokens)| Run {
            kv,
            tokens,
            want: Want::All,
        })
        .collect();
    let mut scratch = Scratch::default();
    let together = model.forward(&mut runs, &mut scratch).unwrap();
    assert!(
        together
            .iter()
            .map(|l| l.to_bits())
            .eq(alone.concat().iter().map(|l| l.to_bits()))
    );
}
