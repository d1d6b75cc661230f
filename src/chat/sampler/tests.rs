//! Each sampler on distributions that can be worked out by hand, and the draws by how often they come.

use super::*;
use std::collections::HashMap;

fn candidates(logits: &[f32]) -> Candidates {
    let mut c = Candidates::default();
    c.fill(logits, |_| true);
    c
}

fn logits(c: &Candidates) -> Vec<f32> {
    c.list().iter().map(|c| c.logit).collect()
}

fn ids(c: &Candidates) -> Vec<u32> {
    c.list().iter().map(|c| c.id).collect()
}

/// Logits of the probabilities 0.5, 0.25, 0.125, 0.125 in scrambled order (ids 2, 0, 1, 3).
fn halves() -> Candidates {
    candidates(&[0.25f32.ln(), 0.125f32.ln(), 0.5f32.ln(), 0.125f32.ln()])
}

#[test]
fn top_k_keeps_the_likeliest_in_order() {
    let mut c = candidates(&[1.0, 3.0, 2.0, 3.0, -1.0]);
    c.top_k(3);
    assert_eq!(ids(&c), [1, 3, 2]);
    c.top_k(0);
    assert_eq!(ids(&c), [1, 3, 2]);
    c.top_k(99);
    assert_eq!(ids(&c), [1, 3, 2]);
    c.top_k(1);
    assert_eq!(ids(&c), [1]);
}

#[test]
fn partial_selection_is_the_head_of_a_full_sort() {
    let mut rng = Rng::new(1);
    // Few different values, so that ties cross the border.
    let logits: Vec<f32> = (0..5000).map(|_| (rng.next() % 97) as f32).collect();
    for k in [1, 2, 40, 51, 52, 4999, 5000, 6000] {
        let mut sorted = candidates(&logits);
        sorted.keep_top(usize::MAX);
        let mut c = candidates(&logits);
        c.top_k(k);
        assert_eq!(ids(&c), ids(&sorted)[..k.min(5000)], "k = {k}");
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
        c.top_p(p);
        assert_eq!(ids(&c), want, "p = {p}");
    }
    for p in [1.0, 2.0, f32::NAN] {
        let mut c = halves();
        c.top_p(p);
        assert_eq!(c.list().len(), 4, "p = {p}");
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
        c.min_p(p);
        assert_eq!(ids(&c), want, "p = {p}");
    }
}

#[test]
fn temperature_scales_and_zero_takes_the_best() {
    let mut c = candidates(&[1.0, -2.0]);
    c.temperature(0.5);
    assert_eq!(c.list()[0].logit, 2.0);
    assert_eq!(c.list()[1].logit, -4.0);
    for temp in [0.0, -1.0, f32::NAN] {
        let mut c = candidates(&[1.0, 5.0, 5.0]);
        c.temperature(temp);
        assert_eq!(ids(&c), [1], "temp = {temp}");
    }
}

#[test]
fn penalties_count_the_recent_tokens_only() {
    let mut c = candidates(&[4.0, -4.0, 4.0, 4.0]);
    c.penalties(&[1, 0, 0], 2.0, 0.5, 0.25);
    // 0 twice: 4/2 - 2*0.25 - 0.5; 1 once: -4*2 - 0.25 - 0.5; 2 and 3 never
    assert_eq!(logits(&c), [1.0, -8.75, 4.0, 4.0]);
    c.penalties(&[], 2.0, 0.5, 0.25);
    assert_eq!(logits(&c), [1.0, -8.75, 4.0, 4.0]);

    let choose = |last_n: usize| {
        let mut s = Sampler::new(SamplerOptions {
            temp: 0.0,
            presence_penalty: 100.0,
            repeat_last_n: last_n,
            ..Default::default()
        });
        s.sample(&[4.0, 3.0, 2.0], &[0, 1]).unwrap()
    };
    assert_eq!(
        (choose(0), choose(1), choose(2), choose(usize::MAX)),
        (0, 0, 2, 2)
    );
}

#[test]
fn dry_grows_with_the_length_of_the_repetition() {
    let mut c = candidates(&[1.0, 1.0, 1.0]);
    let repeats = HashMap::from([(0, 1), (1, 2), (2, 4)]);
    c.dry(&repeats, 0.5, 2.0, 2);
    assert_eq!(logits(&c), [1.0, 1.0 - 0.5, 1.0 - 0.5 * 4.0]);
    c.dry(&HashMap::from([(1, 1_000_000)]), 1.0, 2.0, 2);
    assert!(logits(&c)[1] < -1e38);
    // "0 1 2" came before: after "0 1" comes anything but 2.
    let mut s = Sampler::new(SamplerOptions {
        temp: 0.0,
        dry_multiplier: 10.0,
        ..Default::default()
    });
    assert_eq!(s.sample(&[0.0, 1.0, 5.0], &[0, 1, 2, 0, 1]).unwrap(), 1);
    assert_eq!(s.sample(&[0.0, 1.0, 5.0], &[0, 1, 2, 1]).unwrap(), 2);
    s.options.dry_penalty_last_n = 4;
    assert_eq!(s.sample(&[0.0, 1.0, 5.0], &[0, 1, 2, 0, 1]).unwrap(), 2);
}

#[test]
fn top_n_sigma_measures_in_standard_deviations() {
    // Mean 3, deviations -3 -1 1 3, variance 5.
    let values = [0.0, 2.0, 4.0, 6.0];
    for (n, want) in [
        (-1.0, &[0u32, 1, 2, 3][..]),
        (0.0, &[0, 1, 2, 3]),
        (0.5, &[3]),
        (1.0, &[2, 3]),
        (2.0, &[1, 2, 3]),
        (3.0, &[0, 1, 2, 3]),
    ] {
        let mut c = candidates(&values);
        c.top_n_sigma(n);
        assert_eq!(ids(&c), want, "n = {n}");
    }
    // Banned tokens do not count.
    let mut c = candidates(&[0.0, 2.0, 4.0, 6.0, f32::NEG_INFINITY]);
    c.top_n_sigma(1.0);
    assert_eq!(ids(&c), [2, 3]);
}

#[test]
fn typical_keeps_what_surprises_as_expected() {
    // Entropy of 1/2 1/4 1/8 1/8 is 1.75 bits; the surprises are 1 2 3 3: the order is 0 (id of 1/4), 2, 1, 3.
    for (p, want) in [
        (0.0, &[0u32][..]),
        (0.2, &[0]),
        (0.3, &[2, 0]),
        (0.7, &[2, 0]),
        (0.8, &[2, 0, 1]),
        (0.9, &[2, 0, 1, 3]),
        (1.0, &[0, 1, 2, 3]),
    ] {
        let mut c = halves();
        c.typical(p);
        assert_eq!(ids(&c), want, "p = {p}");
    }
}

#[test]
fn xtc_leaves_the_last_of_the_top_choices() {
    for (threshold, want) in [
        (0.6, &[2u32, 0, 1, 3][..]),
        (0.4, &[2, 0, 1, 3]),
        (0.2, &[0, 1, 3]),
        (0.1, &[3]),
    ] {
        let mut c = halves();
        c.xtc(threshold);
        assert_eq!(ids(&c), want, "threshold = {threshold}");
    }
}

#[test]
fn xtc_happens_as_often_as_asked() {
    let share = |probability: f32, threshold: f32| {
        let mut s = Sampler::new(SamplerOptions {
            temp: 0.0,
            xtc_probability: probability,
            xtc_threshold: threshold,
            seed: Some(5),
            ..Default::default()
        });
        let values = [0.6f32.ln(), 0.4f32.ln()];
        let second = (0..10_000)
            .filter(|_| s.sample(&values, &[]).unwrap() == 1)
            .count();
        second as f64 / 10_000.0
    };
    assert_eq!(
        (share(0.0, 0.1), share(1.0, 0.1), share(1.0, 0.51)),
        (0.0, 1.0, 0.0)
    );
    assert!((share(0.3, 0.1) - 0.3).abs() < 0.025);
}

#[test]
fn dynamic_temperature_follows_the_entropy() {
    // Four equals: as uncertain as can be, so the highest temperature.
    let mut c = candidates(&[2.0; 4]);
    c.dynamic_temperature(1.0, 0.5, 1.0);
    assert_eq!(logits(&c), [2.0f32 / 1.5; 4]);
    // 1.75 of 2 bits: 0.5 + 1 * 0.875 (squared: 0.765625).
    for (exponent, part) in [(1.0, 0.875f32), (2.0, 0.765625)] {
        let mut c = halves();
        c.dynamic_temperature(1.0, 0.5, exponent);
        for (got, was) in logits(&c).iter().zip(logits(&halves())) {
            assert!((got - was / (0.5 + part)).abs() < 1e-5, "{got}");
        }
    }
    // Certain: the lowest, here 0, takes the best. A range of 0 is the plain temperature.
    let mut c = candidates(&[0.0, 1e9]);
    c.dynamic_temperature(0.5, 1.0, 1.0);
    assert_eq!(ids(&c), [1]);
    let mut c = candidates(&[1.0, 3.0]);
    c.dynamic_temperature(2.0, 0.0, 1.0);
    assert_eq!(logits(&c), [0.5, 1.5]);
}

#[test]
fn mirostat_cuts_by_surprise_and_corrects_itself() {
    // Surprises of 1, 2, 3, 3 bits.
    for (mu, want) in [
        (0.0, &[2u32][..]),
        (1.5, &[2]),
        (2.5, &[2, 0]),
        (3.5, &[2, 0, 1, 3]),
    ] {
        let mut c = halves();
        c.mirostat(mu);
        assert_eq!(ids(&c), want, "mu = {mu}");
    }
    // 64 equals surprise by 6 bits. Aiming at 8 raises mu by a tenth of what is missing.
    let mut s = Sampler::new(SamplerOptions {
        temp: 1.0,
        top_k: 1,
        mirostat: true,
        mirostat_ent: 8.0,
        seed: Some(1),
        ..Default::default()
    });
    let first = s.sample(&[0.0; 64], &[]).unwrap();
    assert!((s.mu - 16.2).abs() < 1e-6, "{}", s.mu);
    // The chain is not in use: top-k 1 would always take token 0.
    assert!((0..50).any(|_| s.sample(&[0.0; 64], &[]).unwrap() != first));
    s.begin();
    assert_eq!(s.mu, 16.0);
    // In the long run the surprise is what was asked for.
    s.options.mirostat_ent = 3.0;
    s.begin();
    let values: Vec<f32> = (0..64).map(|i| -0.1 * i as f32).collect();
    let total: f64 = (0..4000)
        .map(|_| {
            let before = s.mu;
            s.sample(&values, &[]).unwrap();
            (before - s.mu) / 0.1 + 3.0
        })
        .sum();
    assert!((total / 4000.0 - 3.0).abs() < 0.05, "{}", total / 4000.0);
}

#[test]
fn the_defaults_and_the_order_are_llama_cpps() {
    let o = SamplerOptions::default();
    let table: Vec<_> = settings().map(|s| (s.name, s.get(&o))).collect();
    let want = [
        (
            "samplers",
            "penalties;dry;top_n_sigma;top_k;typ_p;top_p;min_p;xtc;temperature",
        ),
        ("seed", "-1"),
        ("logit-bias", "none"),
        ("mirostat", "0"),
        ("mirostat-lr", "0.1"),
        ("mirostat-ent", "5"),
        ("repeat-penalty", "1"),
        ("repeat-last-n", "64"),
        ("presence-penalty", "0"),
        ("frequency-penalty", "0"),
        ("dry-multiplier", "0"),
        ("dry-base", "1.75"),
        ("dry-allowed-length", "2"),
        ("dry-penalty-last-n", "64"),
        ("dry-sequence-breaker", r#""\n" ":" "\"" "*""#),
        ("top-n-sigma", "-1"),
        ("top-k", "40"),
        ("typical", "1"),
        ("top-p", "0.95"),
        ("min-p", "0.05"),
        ("xtc-probability", "0"),
        ("xtc-threshold", "0.1"),
        ("temp", "0.8"),
        ("dynatemp-range", "0"),
        ("dynatemp-exp", "1"),
    ];
    assert_eq!(table, want.map(|(name, value)| (name, value.to_string())));
}

#[test]
fn every_setting_reads_what_it_writes() {
    let mut o = SamplerOptions::default();
    for (name, text, shown) in [
        ("--top-k", "7", "7"),
        ("top_p", "0.5", "0.5"),
        ("repeat-last-n", "-1", "-1"),
        ("temperature", "-1.5", "-1.5"),
        ("seed", "18446744073709551615", "18446744073709551615"),
        ("seed", "-1", "-1"),
        ("mirostat", "2", "2"),
        ("samplers", "top-k;temp , min_p", "top_k;temperature;min_p"),
        ("samplers", "none", "none"),
        ("logit-bias", "5+1.5", "5+1.5"),
        ("logit-bias", "7-inf", "5+1.5 7-inf"),
        ("logit-bias", "none", "none"),
        ("dry-sequence-breaker", "none", "none"),
        ("dry-sequence-breaker", r"a\n\\", r#""a\n\\""#),
    ] {
        o.set(name, text).unwrap();
        let setting = settings().find(|s| s.is_called(name)).unwrap();
        assert_eq!(setting.get(&o), shown, "{name} {text}");
    }
    let before = o.clone();
    for (name, text, expected) in [
        (
            "top-k",
            "many",
            "top-k many: expected a number of tokens, or -1 for all",
        ),
        ("temp", "nan", "temp nan: expected a number"),
        ("mirostat", "1", "mirostat 1: expected 0 (off) or 2"),
        ("seed", "-2", "seed -2: expected a whole number, or -1"),
        (
            "logit-bias",
            "5",
            "logit-bias 5: expected ID+BIAS or ID-BIAS, such as 29871-1.5",
        ),
        (
            "dry-sequence-breaker",
            "",
            "dry-sequence-breaker : expected 1 to 40 bytes",
        ),
        ("colour", "red", "colour: no such setting"),
        (
            "samplers",
            "top_k;luck",
            "samplers top_k;luck: expected some of penalties;dry;top_n_sigma;top_k;typ_p;top_p;min_p;xtc;temperature \
             separated by ;, found luck",
        ),
    ] {
        assert_eq!(o.set(name, text).unwrap_err().to_string(), expected);
        assert_eq!(o, before);
    }
}

#[test]
fn samplers_run_in_the_order_that_is_asked_for() {
    let choose = |order: &str| {
        let mut o = SamplerOptions {
            xtc_probability: 1.0,
            xtc_threshold: 0.2,
            top_k: 1,
            ..Default::default()
        };
        o.set("samplers", order).unwrap();
        Sampler::new(o)
            .sample(&[0.6f32.ln(), 0.4f32.ln()], &[])
            .unwrap()
    };
    // XTC takes the best away, unless top-k has left nothing else.
    assert_eq!((choose("xtc;top_k"), choose("top_k;xtc")), (1, 0));
}

#[test]
fn greedy_takes_the_lowest_of_equals_and_needs_no_luck() {
    let options = SamplerOptions {
        temp: 0.0,
        ..Default::default()
    };
    let mut s = Sampler::new(options);
    for _ in 0..10 {
        assert_eq!(s.sample(&[0.0, 7.0, -0.0, 7.0], &[]).unwrap(), 1);
    }
    assert_eq!(s.sample(&[-0.0, 0.0], &[]).unwrap(), 0);
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
            assert_eq!(s.sample(&[f32::NAN, 1.0, f32::NAN], &[]).unwrap(), 1);
            assert_eq!(s.sample(&[0.0, INF, 3.0], &[]).unwrap(), 1);
            assert_eq!(s.sample(&[-INF, -INF, 3.0], &[]).unwrap(), 2);
            assert!(s.sample(&[-INF, -INF], &[]).unwrap() < 2);
            assert!(s.sample(&[f32::NAN; 3], &[0, 9]).unwrap() < 3);
            assert!(s.sample(&[INF, INF], &[]).unwrap() < 2);
            assert_eq!(s.sample(&[5.0], &[]).unwrap(), 0);
            assert_eq!(s.sample(&[], &[1]).unwrap(), 0);
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
    assert!(s.sample(&[1.0, 2.0], &[0, 1, 1]).unwrap() < 2);
}

#[test]
fn bias_adds_and_bans() {
    let mut options = SamplerOptions {
        temp: 0.0,
        logit_bias: vec![(0, 5.0), (9, 1.0)],
        ..Default::default()
    };
    assert_eq!(
        Sampler::new(options.clone())
            .sample(&[0.0, 3.0], &[])
            .unwrap(),
        0
    );
    options.logit_bias = vec![(1, f32::NEG_INFINITY)];
    assert_eq!(Sampler::new(options).sample(&[0.0, 3.0], &[]).unwrap(), 0);
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
            .map(|_| s.sample(&logits, &[]).unwrap())
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

/// Each sampler by itself leaves the distribution that is worked out by hand, seen by how often each token is drawn.
#[test]
fn what_a_sampler_leaves_is_drawn_as_often_as_it_should() {
    // The probabilities 1/4, 1/8, 1/2, 1/8 of the tokens 0 to 3, unless a row has its own.
    let halves = [0.25f32.ln(), 0.125f32.ln(), 0.5f32.ln(), 0.125f32.ln()];
    // Two logits e² apart.
    let far = 1.0 / (1.0 + 2.0f64.exp());
    // 1.75 of 2 bits: a temperature of 0.5 + 0.875.
    let warm = [0.25f64, 0.125, 0.5, 0.125].map(|p| p.powf(1.0 / 1.375));
    let warm = warm.map(|p| p / warm.iter().sum::<f64>());
    let ln2 = std::f32::consts::LN_2;
    type Row<'a> = (&'a str, &'a [(&'a str, f32)], [f32; 4], [f64; 4]);
    let rows: &[Row<'_>] = &[
        ("none", &[], halves, [0.25, 0.125, 0.5, 0.125]),
        // Token 2 came twice, token 0 once: a quarter of 1/2, a half of 1/4.
        (
            "penalties",
            &[("frequency-penalty", ln2)],
            halves,
            [0.25, 0.25, 0.25, 0.25],
        ),
        // Half of both.
        (
            "penalties",
            &[("presence-penalty", ln2)],
            halves,
            [0.2, 0.2, 0.4, 0.2],
        ),
        // Logits below 0 are doubled: 1/16, 1/8, 1/4, 1/8.
        (
            "penalties",
            &[("repeat-penalty", 2.0)],
            halves,
            [1.0 / 9.0, 2.0 / 9.0, 4.0 / 9.0, 2.0 / 9.0],
        ),
        // After "2" came 0 the last time: half of 1/4.
        (
            "dry",
            &[("dry-multiplier", ln2), ("dry-allowed-length", 1.0)],
            halves,
            [1.0 / 7.0, 1.0 / 7.0, 4.0 / 7.0, 1.0 / 7.0],
        ),
        (
            "top_n_sigma",
            &[("top-n-sigma", 1.0)],
            [0.0, 2.0, 4.0, 6.0],
            [0.0, 0.0, far, 1.0 - far],
        ),
        (
            "top_k",
            &[("top-k", 2.0)],
            halves,
            [1.0 / 3.0, 0.0, 2.0 / 3.0, 0.0],
        ),
        ("typ_p", &[("typical", 0.2)], halves, [1.0, 0.0, 0.0, 0.0]),
        (
            "typ_p",
            &[("typical", 0.7)],
            halves,
            [1.0 / 3.0, 0.0, 2.0 / 3.0, 0.0],
        ),
        (
            "top_p",
            &[("top-p", 0.8)],
            halves,
            [2.0 / 7.0, 1.0 / 7.0, 4.0 / 7.0, 0.0],
        ),
        (
            "min_p",
            &[("min-p", 0.3)],
            halves,
            [1.0 / 3.0, 0.0, 2.0 / 3.0, 0.0],
        ),
        // Half of the time all of them, else 1/2, 1/4, 1/4 without token 2.
        (
            "xtc",
            &[("xtc-probability", 0.5), ("xtc-threshold", 0.2)],
            halves,
            [0.375, 0.1875, 0.25, 0.1875],
        ),
        // Squares: 4, 1, 16, 1 of 22.
        (
            "temperature",
            &[("temp", 0.5)],
            halves,
            [4.0 / 22.0, 1.0 / 22.0, 16.0 / 22.0, 1.0 / 22.0],
        ),
        (
            "temperature",
            &[("temp", 1.0), ("dynatemp-range", 0.5)],
            halves,
            warm,
        ),
        // At a learning rate of 0 surprises of up to 2.5 bits pass: 1/2 and 1/4.
        (
            "temperature",
            &[
                ("mirostat", 2.0),
                ("temp", 1.0),
                ("mirostat-lr", 0.0),
                ("mirostat-ent", 1.25),
            ],
            halves,
            [1.0 / 3.0, 0.0, 2.0 / 3.0, 0.0],
        ),
    ];
    for step in STEPS {
        assert!(rows.iter().any(|row| row.0 == step.name), "{}", step.name);
    }
    const DRAWS: usize = 20_000;
    for (samplers, settings, logits, want) in rows {
        let mut options = SamplerOptions {
            seed: Some(3),
            ..Default::default()
        };
        options.set("samplers", samplers).unwrap();
        for (name, value) in *settings {
            options.set(name, &value.to_string()).unwrap();
        }
        let mut sampler = Sampler::new(options);
        let mut drawn = [0; 4];
        for _ in 0..DRAWS {
            sampler.begin();
            drawn[sampler.sample(logits, &[2, 0, 2]).unwrap() as usize] += 1;
        }
        for (id, (drawn, want)) in drawn.iter().zip(want).enumerate() {
            let share = f64::from(*drawn) / DRAWS as f64;
            // Five standard deviations, and none for what is certain.
            let may = 5.0 * (want * (1.0 - want) / DRAWS as f64).sqrt();
            assert!(
                (share - want).abs() <= may,
                "{samplers} {settings:?}: token {id} is drawn {share}, not {want}"
            );
        }
    }
}

#[test]
fn a_seed_that_is_set_again_begins_again() {
    let mut s = Sampler::new(SamplerOptions {
        seed: Some(5),
        ..Default::default()
    });
    let mut draws = |again: bool| {
        if again {
            s.reseed();
        }
        (0..20)
            .map(|_| s.sample(&[0.0; 64], &[]).unwrap())
            .collect::<Vec<_>>()
    };
    let first = draws(false);
    assert_ne!(draws(false), first);
    assert_eq!(draws(true), first);
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
