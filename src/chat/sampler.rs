//! Logits to the next token.
//!
//! The chain, its names, meanings, defaults and order are llama.cpp's, because users bring their settings from there: penalties, top-k,
//! top-p, min-p, temperature, then one draw. Each step is a small function over the [`Candidates`] and one row of `CHAIN`; a
//! new sampler is one more row.
//!
//! The same logits, history, options and seed give the same token on every machine: the random numbers are our own and
//! the sums run in one order.

use std::cmp::Ordering;
use std::time::{SystemTime, UNIX_EPOCH};

/// How to choose. The defaults are llama.cpp's.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplerOptions {
    /// Temperature; 0 (or less) always takes the likeliest token.
    pub temp: f32,
    /// Keep this many of the likeliest tokens; 0 keeps all.
    pub top_k: usize,
    /// Keep the likeliest tokens until their probabilities sum to this; 1 keeps all.
    pub top_p: f32,
    /// Keep tokens at least this likely relative to the likeliest; 0 keeps all.
    pub min_p: f32,
    /// Divides positive and multiplies negative logits of recent tokens; 1 does nothing.
    pub repeat_penalty: f32,
    /// How many recent tokens the penalties look at; 0 turns them off.
    pub repeat_last_n: usize,
    /// Subtracted from the logit of every recent token.
    pub presence_penalty: f32,
    /// Subtracted from a recent token's logit once per occurrence.
    pub frequency_penalty: f32,
    /// Seed of the random numbers; `None` takes one from the clock.
    pub seed: Option<u64>,
    /// Added to single tokens' logits before everything else; minus infinity bans a token.
    pub logit_bias: Vec<(u32, f32)>,
}

impl Default for SamplerOptions {
    fn default() -> SamplerOptions {
        SamplerOptions {
            temp: 0.8,
            top_k: 40,
            top_p: 0.95,
            min_p: 0.05,
            repeat_penalty: 1.0,
            repeat_last_n: 64,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            seed: None,
            logit_bias: Vec::new(),
        }
    }
}

/// A token that may come next.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Candidate {
    /// The token.
    pub id: u32,
    /// Its logit; never NaN.
    pub logit: f32,
}

/// The tokens that may come next; never empty between steps.
#[derive(Clone, Debug, Default)]
pub struct Candidates {
    list: Vec<Candidate>,
    /// Whether `list` is ordered, likeliest first (equal logits: lowest id first).
    sorted: bool,
}

/// The likelier first; of equal ones the lower id.
fn likelier(a: &Candidate, b: &Candidate) -> Ordering {
    b.logit.total_cmp(&a.logit).then(a.id.cmp(&b.id))
}

impl Candidates {
    /// All tokens. NaN counts as minus infinity; -0 as 0, so that the order of equal logits is the order of ids.
    fn fill(&mut self, logits: &[f32]) {
        self.sorted = false;
        self.list.clear();
        self.list
            .extend((0u32..).zip(logits).map(|(id, &logit)| Candidate {
                id,
                logit: clean(logit),
            }));
    }

    fn sort(&mut self) {
        if !self.sorted {
            self.list.sort_unstable_by(likelier);
            self.sorted = true;
        }
    }

    /// The likeliest `k`, in order, without sorting the rest.
    fn keep_top(&mut self, k: usize) {
        if k < self.list.len() && !self.sorted {
            self.list.select_nth_unstable_by(k, likelier);
        }
        self.list.truncate(k);
        self.sort();
    }

    /// The likeliest.
    fn best(&self) -> Option<Candidate> {
        self.list.iter().copied().min_by(likelier)
    }

    /// Probabilities (softmax), in the order of `list`. With an infinite logit, the tokens that have it share everything.
    fn probabilities(&self) -> Vec<f64> {
        let max = self.best().map_or(0.0, |best| best.logit);
        let weight = |c: &Candidate| {
            if c.logit == max {
                1.0
            } else {
                f64::from(c.logit - max).exp()
            }
        };
        let mut weights: Vec<f64> = self.list.iter().map(weight).collect();
        let sum: f64 = weights.iter().sum();
        weights.iter_mut().for_each(|w| *w /= sum);
        weights
    }

    /// What gives the natural logarithm of a candidate's probability among these; nothing, if there are none.
    fn log_probability(&self) -> Option<impl Fn(&Candidate) -> f32 + use<>> {
        let max = self.best()?.logit;
        let part = move |logit: f32| {
            if logit == max {
                0.0
            } else {
                f64::from(logit - max)
            }
        };
        let log_sum = self.list.iter().map(|c| part(c.logit).exp()).sum::<f64>();
        let log_sum = log_sum.ln();
        Some(move |c: &Candidate| (part(c.logit) - log_sum) as f32)
    }
}

/// A logit without NaN and without negative zero.
fn clean(logit: f32) -> f32 {
    if logit.is_nan() {
        f32::NEG_INFINITY
    } else {
        logit + 0.0
    }
}

/// One step of the chain.
struct Step {
    /// llama.cpp's name.
    name: &'static str,
    apply: fn(&SamplerOptions, &mut Candidates, &[u32]),
}

/// The chain, in llama.cpp's order.
const CHAIN: &[Step] = &[
    Step {
        name: "penalties",
        apply: penalties,
    },
    Step {
        name: "top_k",
        apply: |o, c, _| top_k(c, o.top_k),
    },
    Step {
        name: "top_p",
        apply: |o, c, _| top_p(c, o.top_p),
    },
    Step {
        name: "min_p",
        apply: |o, c, _| min_p(c, o.min_p),
    },
    Step {
        name: "temperature",
        apply: |o, c, _| temperature(c, o.temp),
    },
];

/// The names of the chain's steps, in order.
pub fn chain_names() -> impl Iterator<Item = &'static str> {
    CHAIN.iter().map(|step| step.name)
}

/// Makes recent tokens less likely (repeat penalty after Keskar et al. 2019, CTRL, section 4.1; presence and frequency
/// as in OpenAI's API).
fn penalties(options: &SamplerOptions, candidates: &mut Candidates, history: &[u32]) {
    let recent = &history[history.len().saturating_sub(options.repeat_last_n)..];
    let off = options.repeat_penalty == 1.0
        && options.presence_penalty == 0.0
        && options.frequency_penalty == 0.0;
    if off || recent.is_empty() {
        return;
    }
    let mut counts = std::collections::HashMap::new();
    for id in recent {
        *counts.entry(*id).or_insert(0u32) += 1;
    }
    for c in &mut candidates.list {
        if let Some(&count) = counts.get(&c.id) {
            // Dividing a negative logit would make the token likelier.
            let logit = if c.logit <= 0.0 {
                c.logit * options.repeat_penalty
            } else {
                c.logit / options.repeat_penalty
            };
            c.logit =
                clean(logit - count as f32 * options.frequency_penalty - options.presence_penalty);
        }
    }
    candidates.sorted = false;
}

/// Keeps the `k` likeliest; 0 keeps all.
fn top_k(candidates: &mut Candidates, k: usize) {
    if k > 0 {
        candidates.keep_top(k);
    }
}

/// Keeps the smallest set of likeliest tokens whose probability reaches `p` (Holtzman et al. 2019), at least one.
fn top_p(candidates: &mut Candidates, p: f32) {
    if p.is_nan() || p >= 1.0 {
        return;
    }
    candidates.sort();
    let mut sum = 0.0;
    let reached = candidates.probabilities().iter().position(|w| {
        sum += w;
        sum >= f64::from(p)
    });
    if let Some(last) = reached {
        candidates.list.truncate(last + 1);
    }
}

/// Keeps tokens whose probability is at least `p` times the best one's (Nguyen et al. 2024), at least one.
fn min_p(candidates: &mut Candidates, p: f32) {
    let Some(best) = candidates.best().filter(|_| p > 0.0) else {
        return;
    };
    // p_i / p_max >= p  <=>  logit_i >= logit_max + ln p
    let least = best.logit + p.ln();
    candidates
        .list
        .retain(|c| c.logit >= least || c.id == best.id);
}

/// Divides logits by the temperature; at 0 or less only the likeliest stays.
fn temperature(candidates: &mut Candidates, temp: f32) {
    if temp > 0.0 {
        for c in &mut candidates.list {
            c.logit = clean(c.logit / temp);
        }
    } else if let Some(best) = candidates.best() {
        candidates.list = vec![best];
        candidates.sorted = true;
    }
}

/// Chooses tokens by its options; holds the random numbers and the scratch memory.
#[derive(Clone, Debug)]
pub struct Sampler {
    options: SamplerOptions,
    rng: Rng,
    seed: u64,
    candidates: Candidates,
}

impl Sampler {
    /// A sampler; without a seed in the options it takes one from the clock ([`Sampler::seed`] tells which).
    pub fn new(options: SamplerOptions) -> Sampler {
        let clock = || {
            SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .map_or(0, |d| d.as_nanos() as u64)
        };
        let seed = options.seed.unwrap_or_else(clock);
        Sampler {
            rng: Rng::new(seed),
            seed,
            candidates: Candidates::default(),
            options,
        }
    }

    /// The options.
    pub fn options(&self) -> &SamplerOptions {
        &self.options
    }

    /// The seed in use: given as an option, it repeats the run.
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// The next token. `logits`: one per token of the vocabulary; `history`: the tokens so far, oldest first (the
    /// penalties look at its end). NaN is taken as minus infinity. Without any logits the answer is 0.
    pub fn sample(&mut self, logits: &[f32], history: &[u32]) -> u32 {
        let candidates = &mut self.candidates;
        candidates.fill(logits);
        for &(id, bias) in &self.options.logit_bias {
            if let Some(c) = candidates.list.get_mut(id as usize) {
                c.logit = clean(c.logit + bias);
            }
        }
        for step in CHAIN {
            (step.apply)(&self.options, candidates, history);
        }
        if let [only] = candidates.list.as_slice() {
            return only.id;
        }
        let mut left = self.rng.unit();
        for (candidate, probability) in candidates.list.iter().zip(candidates.probabilities()) {
            left -= probability;
            if left < 0.0 {
                return candidate.id;
            }
        }
        // Rounding left a crumb: the likeliest takes it.
        candidates.best().map_or(0, |best| best.id)
    }
}

/// The `k` likeliest tokens and the natural logarithm of their probabilities (softmax of the raw logits over the whole
/// vocabulary), likeliest first; equal ones by id. NaN counts as minus infinity.
pub fn logprobs(logits: &[f32], k: usize) -> Vec<(u32, f32)> {
    let mut candidates = Candidates::default();
    candidates.fill(logits);
    let Some(log) = candidates.log_probability() else {
        return Vec::new();
    };
    candidates.keep_top(k);
    candidates.list.iter().map(|c| (c.id, log(c))).collect()
}

/// The natural logarithm of one token's probability, as [`logprobs`] has it; minus infinity for a token without logit.
pub fn logprob(logits: &[f32], id: u32) -> f32 {
    let mut candidates = Candidates::default();
    candidates.fill(logits);
    let log = candidates.log_probability();
    log.zip(candidates.list.get(id as usize))
        .map_or(f32::NEG_INFINITY, |(log, c)| log(c))
}

/// xoshiro256++ 1.0 by Blackman and Vigna (2019, <https://prng.di.unimi.it/>), seeded by splitmix64 as they advise.
#[derive(Clone, Debug)]
struct Rng([u64; 4]);

impl Rng {
    fn new(seed: u64) -> Rng {
        let mut state = seed;
        Rng(std::array::from_fn(|_| {
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let z = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            z ^ (z >> 31)
        }))
    }

    fn next(&mut self) -> u64 {
        let s = &mut self.0;
        let result = s[0].wrapping_add(s[3]).rotate_left(23).wrapping_add(s[0]);
        let t = s[1] << 17;
        s[2] ^= s[0];
        s[3] ^= s[1];
        s[1] ^= s[2];
        s[0] ^= s[3];
        s[2] ^= t;
        s[3] = s[3].rotate_left(45);
        result
    }

    /// Evenly in [0, 1): the upper 53 bits.
    fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn candidates(logits: &[f32]) -> Candidates {
        let mut c = Candidates::default();
        c.fill(logits);
        c
    }

    fn ids(c: &Candidates) -> Vec<u32> {
        c.list.iter().map(|c| c.id).collect()
    }

    /// Logits of the probabilities 0.5, 0.25, 0.125, 0.125 in scrambled order (ids 2, 0, 1, 3).
    fn halves() -> Candidates {
        candidates(&[0.25f32.ln(), 0.125f32.ln(), 0.5f32.ln(), 0.125f32.ln()])
    }

    #[test]
    fn top_k_keeps_the_likeliest_in_order() {
        let mut c = candidates(&[1.0, 3.0, 2.0, 3.0, -1.0]);
        top_k(&mut c, 3);
        assert_eq!(ids(&c), [1, 3, 2]);
        top_k(&mut c, 0);
        assert_eq!(ids(&c), [1, 3, 2]);
        top_k(&mut c, 99);
        assert_eq!(ids(&c), [1, 3, 2]);
        top_k(&mut c, 1);
        assert_eq!(ids(&c), [1]);
    }

    #[test]
    fn partial_selection_is_the_head_of_a_full_sort() {
        let mut rng = Rng::new(1);
        // Few different values, so that ties cross the border.
        let logits: Vec<f32> = (0..5000).map(|_| (rng.next() % 97) as f32).collect();
        for k in [1, 2, 40, 51, 52, 4999, 5000, 6000] {
            let mut sorted = candidates(&logits);
            sorted.sort();
            sorted.list.truncate(k);
            let mut c = candidates(&logits);
            top_k(&mut c, k);
            assert_eq!(ids(&c), ids(&sorted), "k = {k}");
        }
    }

    #[test]
    fn top_p_keeps_until_the_sum_is_reached() {
        for (p, want) in [
            (0.4, &[2u32][..]),
            (0.6, &[2, 0]),
            (0.8, &[2, 0, 1]),
            (0.9, &[2, 0, 1, 3]),
            (0.0, &[2]),
            (-1.0, &[2]),
        ] {
            let mut c = halves();
            top_p(&mut c, p);
            assert_eq!(ids(&c), want, "p = {p}");
        }
        for p in [1.0, 2.0, f32::NAN] {
            let mut c = halves();
            top_p(&mut c, p);
            assert_eq!(c.list.len(), 4, "p = {p}");
        }
    }

    #[test]
    fn min_p_is_relative_to_the_best() {
        for (p, want) in [
            (0.0, &[0u32, 1, 2, 3][..]),
            (0.2, &[0, 1, 2, 3]),
            (0.3, &[0, 2]),
            (0.6, &[2]),
            (2.0, &[2]),
        ] {
            let mut c = halves();
            min_p(&mut c, p);
            assert_eq!(ids(&c), want, "p = {p}");
        }
    }

    #[test]
    fn temperature_scales_and_zero_takes_the_best() {
        let mut c = candidates(&[1.0, -2.0]);
        temperature(&mut c, 0.5);
        assert_eq!(c.list[0].logit, 2.0);
        assert_eq!(c.list[1].logit, -4.0);
        for temp in [0.0, -1.0, f32::NAN] {
            let mut c = candidates(&[1.0, 5.0, 5.0]);
            temperature(&mut c, temp);
            assert_eq!(ids(&c), [1], "temp = {temp}");
        }
    }

    #[test]
    fn penalties_count_the_recent_tokens_only() {
        let mut o = SamplerOptions {
            repeat_penalty: 2.0,
            repeat_last_n: 3,
            ..Default::default()
        };
        (o.presence_penalty, o.frequency_penalty) = (0.5, 0.25);
        let mut c = candidates(&[4.0, -4.0, 4.0, 4.0]);
        penalties(&o, &mut c, &[3, 1, 0, 0]);
        let logits: Vec<f32> = c.list.iter().map(|c| c.logit).collect();
        // 0 twice: 4/2 - 2*0.25 - 0.5; 1 once: -4*2 - 0.25 - 0.5; 2 never; 3 too long ago
        assert_eq!(logits, [1.0, -8.75, 4.0, 4.0]);
        o.repeat_last_n = 0;
        let mut c = candidates(&[4.0]);
        penalties(&o, &mut c, &[0]);
        assert_eq!(c.list[0].logit, 4.0);
    }

    #[test]
    fn the_defaults_and_the_order_are_llama_cpps() {
        let names: Vec<_> = chain_names().collect();
        assert_eq!(
            names,
            ["penalties", "top_k", "top_p", "min_p", "temperature"]
        );
        let o = SamplerOptions::default();
        assert_eq!(
            (o.temp, o.top_k, o.top_p, o.min_p, o.repeat_last_n),
            (0.8, 40, 0.95, 0.05, 64)
        );
    }

    #[test]
    fn greedy_takes_the_lowest_of_equals_and_needs_no_luck() {
        let options = SamplerOptions {
            temp: 0.0,
            ..Default::default()
        };
        let mut s = Sampler::new(options);
        for _ in 0..10 {
            assert_eq!(s.sample(&[0.0, 7.0, -0.0, 7.0], &[]), 1);
        }
        assert_eq!(s.sample(&[-0.0, 0.0], &[]), 0);
    }

    #[test]
    fn strange_logits_are_survived() {
        const INF: f32 = f32::INFINITY;
        for temp in [0.0, 0.8, 1e-30, 1e30] {
            for top_k in [0, 1, 2] {
                let mut s = Sampler::new(SamplerOptions {
                    temp,
                    top_k,
                    seed: Some(1),
                    ..Default::default()
                });
                assert_eq!(s.sample(&[f32::NAN, 1.0, f32::NAN], &[]), 1);
                assert_eq!(s.sample(&[0.0, INF, 3.0], &[]), 1);
                assert_eq!(s.sample(&[-INF, -INF, 3.0], &[]), 2);
                assert!(s.sample(&[-INF, -INF], &[]) < 2);
                assert!(s.sample(&[f32::NAN; 3], &[0, 9]) < 3);
                assert!(s.sample(&[INF, INF], &[]) < 2);
                assert_eq!(s.sample(&[5.0], &[]), 0);
                assert_eq!(s.sample(&[], &[1]), 0);
            }
        }
        let mut s = Sampler::new(SamplerOptions {
            top_p: f32::NAN,
            min_p: f32::NAN,
            temp: f32::NAN,
            repeat_penalty: 0.0,
            frequency_penalty: f32::NAN,
            ..Default::default()
        });
        assert!(s.sample(&[1.0, 2.0], &[0, 1, 1]) < 2);
    }

    #[test]
    fn bias_adds_and_bans() {
        let mut options = SamplerOptions {
            temp: 0.0,
            logit_bias: vec![(0, 5.0), (9, 1.0)],
            ..Default::default()
        };
        assert_eq!(Sampler::new(options.clone()).sample(&[0.0, 3.0], &[]), 0);
        options.logit_bias = vec![(1, f32::NEG_INFINITY)];
        assert_eq!(Sampler::new(options).sample(&[0.0, 3.0], &[]), 0);
    }

    #[test]
    fn draws_follow_the_distribution_and_the_seed() {
        let options = SamplerOptions {
            temp: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            seed: Some(7),
            ..Default::default()
        };
        let logits = [0.5f32.ln(), 0.25f32.ln(), 0.25f32.ln()];
        let draw = |options: &SamplerOptions| {
            let mut s = Sampler::new(options.clone());
            (0..10_000)
                .map(|_| s.sample(&logits, &[]))
                .collect::<Vec<_>>()
        };
        let first = draw(&options);
        assert_eq!(first, draw(&options));
        assert_ne!(
            first,
            draw(&SamplerOptions {
                seed: Some(8),
                ..options.clone()
            })
        );
        for (id, p) in [(0, 0.5), (1, 0.25), (2, 0.25)] {
            let share = first.iter().filter(|&&got| got == id).count() as f64 / 10_000.0;
            // Five standard deviations are 0.025.
            assert!((share - p).abs() < 0.025, "token {id}: {share}");
        }
    }

    #[test]
    fn the_random_numbers_are_the_published_ones() {
        // The first output of xoshiro256++ from the state 1, 2, 3, 4 is rotl(1 + 4, 23) + 1.
        assert_eq!(Rng([1, 2, 3, 4]).next(), (5u64 << 23) + 1);
        // splitmix64's first outputs for seed 0.
        let Rng(state) = Rng::new(0);
        assert_eq!(state[..2], [0xe220_a839_7b1d_cdaf, 0x6e78_9e6a_a1b9_65f4]);
    }

    #[test]
    fn logprobs_are_logarithms_of_the_softmax() {
        let logits = [
            0.25f32.ln() + 3.0,
            0.125f32.ln() + 3.0,
            0.5f32.ln() + 3.0,
            0.125f32.ln() + 3.0,
        ];
        let got = logprobs(&logits, 3);
        assert_eq!(got.iter().map(|x| x.0).collect::<Vec<_>>(), [2, 0, 1]);
        for ((_, got), want) in got.iter().zip([0.5f32, 0.25, 0.125]) {
            assert!((got - want.ln()).abs() < 1e-6);
        }
        assert_eq!(logprobs(&[], 3), []);
        assert_eq!(logprobs(&[1.0], 0), []);
        assert_eq!(
            logprobs(&[f32::INFINITY, 0.0], 2),
            [(0, 0.0), (1, f32::NEG_INFINITY)]
        );
        assert_eq!(
            logprobs(&[f32::NAN, 2.0], 9),
            [(1, 0.0), (0, f32::NEG_INFINITY)]
        );
    }
}
