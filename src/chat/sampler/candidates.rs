//! The tokens that may come next, and what each sampler does to them.
//!
//! Every sampler is one method here, with the numbers that it needs as arguments: nothing else goes in, and nothing but
//! the list comes out. Sums run in one order and `exp` and `log` are the crate `libm`'s, so that the
//! result is the same on every machine.

use libm::{exp, log, log2, pow};
use std::cmp::Ordering;
use std::collections::HashMap;

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

/// A logit without NaN and without negative zero.
fn clean(logit: f32) -> f32 {
    if logit.is_nan() {
        f32::NEG_INFINITY
    } else {
        logit + 0.0
    }
}

/// The list itself.
impl Candidates {
    /// All tokens that are `allowed`. NaN counts as minus infinity; -0 as 0, so that the order of equal logits is the order of ids.
    pub(super) fn fill(&mut self, logits: &[f32], allowed: impl Fn(u32) -> bool) {
        self.sorted = false;
        self.list.clear();
        let all = (0u32..).zip(logits).filter(|(id, _)| allowed(*id));
        self.list.extend(all.map(|(id, &logit)| Candidate {
            id,
            logit: clean(logit),
        }));
    }

    /// The candidates.
    pub fn list(&self) -> &[Candidate] {
        &self.list
    }

    fn sort(&mut self) {
        if !self.sorted {
            self.list.sort_unstable_by(likelier);
            self.sorted = true;
        }
    }

    /// The likeliest `k`, in order, without sorting the rest.
    pub(super) fn keep_top(&mut self, k: usize) {
        if k < self.list.len() && !self.sorted {
            self.list.select_nth_unstable_by(k, likelier);
        }
        self.list.truncate(k);
        self.sort();
    }

    /// The likeliest.
    pub(super) fn best(&self) -> Option<Candidate> {
        match self.sorted {
            true => self.list.first().copied(),
            false => self.list.iter().copied().min_by(likelier),
        }
    }

    /// Changes logits.
    fn change(&mut self, logit: impl Fn(&Candidate) -> f32) {
        for c in &mut self.list {
            c.logit = clean(logit(c));
        }
        self.sorted = false;
    }

    /// Probabilities (softmax), in the order of the list. With an infinite logit, the tokens that have it share everything.
    pub(super) fn probabilities(&self) -> Vec<f64> {
        let max = self.best().map_or(0.0, |best| best.logit);
        let weight = |c: &Candidate| {
            if c.logit == max {
                1.0
            } else {
                exp(f64::from(c.logit - max))
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
        let part = move |logit: f32| match logit == max {
            true => 0.0,
            false => f64::from(logit - max),
        };
        let log_sum = log(self.list.iter().map(|c| exp(part(c.logit))).sum());
        Some(move |c: &Candidate| (part(c.logit) - log_sum) as f32)
    }

    /// One of them, by its probability; `luck` is evenly from [0, 1). Also says how probable it was.
    pub(super) fn draw(&self, luck: f64) -> Option<(u32, f64)> {
        let probabilities = self.probabilities();
        let mut left = luck;
        for (candidate, probability) in self.list.iter().zip(&probabilities) {
            left -= probability;
            if left < 0.0 {
                return Some((candidate.id, *probability));
            }
        }
        // Rounding left a crumb: the likeliest takes it.
        let best = self.best()?;
        let at = self.list.iter().position(|c| c.id == best.id)?;
        Some((best.id, probabilities[at]))
    }
}

/// Entropy in nats.
fn entropy(probabilities: &[f64]) -> f64 {
    let known = probabilities.iter().filter(|p| **p > 0.0);
    -known.map(|p| p * log(*p)).sum::<f64>()
}

/// The samplers.
impl Candidates {
    /// Adds to single tokens' logits; minus infinity bans a token.
    pub fn bias(&mut self, biases: &[(u32, f32)]) {
        for &(id, bias) in biases {
            // All tokens are there, in order, unless a grammar has thinned them.
            if let Ok(at) = self.list.binary_search_by_key(&id, |c| c.id) {
                self.list[at].logit = clean(self.list[at].logit + bias);
            }
        }
    }

    /// Makes recent tokens less likely: `repeat` divides positive and multiplies negative logits (Keskar et al. 2019, CTRL, section
    /// 4.1), `presence` is subtracted once and `frequency` for each occurrence (as in OpenAI's API).
    pub fn penalties(&mut self, recent: &[u32], repeat: f32, presence: f32, frequency: f32) {
        if (repeat, presence, frequency) == (1.0, 0.0, 0.0) || recent.is_empty() {
            return;
        }
        let mut counts = HashMap::new();
        for id in recent {
            *counts.entry(*id).or_insert(0u32) += 1;
        }
        self.change(|c| match counts.get(&c.id) {
            None => c.logit,
            Some(&count) => {
                // Dividing a negative logit would make the token likelier.
                let logit = match c.logit <= 0.0 {
                    true => c.logit * repeat,
                    false => c.logit / repeat,
                };
                logit - count as f32 * frequency - presence
            }
        });
    }

    /// Makes tokens less likely that would go on repeating a sequence (DRY, by p-e-w, 2024): `multiplier · base^(n - allowed)`
    /// is subtracted, where `n ≥ allowed` is the length of the repeated sequence. `repeats`: tokens and their `n`.
    pub fn dry(
        &mut self,
        repeats: &HashMap<u32, usize>,
        multiplier: f32,
        base: f32,
        allowed: usize,
    ) {
        if repeats.is_empty() {
            return;
        }
        // Beyond this the power is no f32 any more.
        let most = match base > 1.0 {
            true => log(f64::from(f32::MAX)) / log(f64::from(base)),
            false => f64::INFINITY,
        };
        self.change(|c| match repeats.get(&c.id) {
            Some(&n) if n >= allowed => {
                let exponent = ((n - allowed) as f64).min(most);
                c.logit - multiplier * pow(f64::from(base), exponent) as f32
            }
            _ => c.logit,
        });
    }

    /// Keeps tokens whose logit is at most `n` standard deviations below the best (Tang et al. 2024); 0 or less keeps all.
    pub fn top_n_sigma(&mut self, n: f32) {
        let Some(best) = self.best().filter(|b| n > 0.0 && b.logit.is_finite()) else {
            return;
        };
        let finite = || {
            let known = self.list.iter().filter(|c| c.logit.is_finite());
            known.map(|c| f64::from(c.logit))
        };
        let count = finite().count() as f64;
        let mean = finite().sum::<f64>() / count;
        let variance = finite().map(|l| (l - mean) * (l - mean)).sum::<f64>() / count;
        let least = f64::from(best.logit) - f64::from(n) * variance.sqrt();
        self.list
            .retain(|c| f64::from(c.logit) >= least || c.id == best.id);
    }

    /// Keeps the `k` likeliest; 0 keeps all.
    pub fn top_k(&mut self, k: usize) {
        if k > 0 {
            self.keep_top(k);
        }
    }

    /// Keeps the tokens that are about as surprising as expected (Meister et al. 2022), until their probability passes `p`; 1 keeps
    /// all.
    pub fn typical(&mut self, p: f32) {
        if p.is_nan() || p >= 1.0 {
            return;
        }
        self.sort();
        let probabilities = self.probabilities();
        let expected = entropy(&probabilities);
        // The least odd first; of equally odd ones the likelier.
        let mut order: Vec<(f64, usize)> = probabilities
            .iter()
            .enumerate()
            .map(|(i, p)| ((-log(*p) - expected).abs(), i))
            .collect();
        order.sort_by(|a, b| a.0.total_cmp(&b.0));
        let mut sum = 0.0;
        let mut kept: Vec<usize> = Vec::new();
        for (_, i) in order {
            sum += probabilities[i];
            kept.push(i);
            if sum > f64::from(p) {
                break;
            }
        }
        kept.sort_unstable();
        self.list = kept.into_iter().map(|i| self.list[i]).collect();
    }

    /// Keeps the smallest set of likeliest tokens whose probability reaches `p` (Holtzman et al. 2019), at least one; 1 keeps all.
    pub fn top_p(&mut self, p: f32) {
        if p.is_nan() || p >= 1.0 {
            return;
        }
        self.sort();
        let mut sum = 0.0;
        let reached = self.probabilities().iter().position(|w| {
            sum += w;
            sum >= f64::from(p)
        });
        if let Some(last) = reached {
            self.list.truncate(last + 1);
        }
    }

    /// Keeps tokens whose probability is at least `p` times the best one's (Nguyen et al. 2024), at least one.
    pub fn min_p(&mut self, p: f32) {
        let Some(best) = self.best().filter(|_| p > 0.0) else {
            return;
        };
        // p_i / p_max >= p  <=>  logit_i >= logit_max + ln p
        let least = best.logit + log(f64::from(p)) as f32;
        self.list.retain(|c| c.logit >= least || c.id == best.id);
    }

    /// Excludes top choices (p-e-w, 2024): of the tokens with a probability of at least `threshold` only the least likely stays.
    /// Whether it is done this time is the caller's `luck`.
    pub fn xtc(&mut self, threshold: f32) {
        self.sort();
        let good = |p: &&f64| **p >= f64::from(threshold);
        let top = self.probabilities().iter().take_while(good).count();
        self.list.drain(..top.saturating_sub(1));
    }

    /// Divides logits by the temperature; at 0 or less only the likeliest stays.
    pub fn temperature(&mut self, temp: f32) {
        if temp > 0.0 {
            let sorted = self.sorted;
            self.change(|c| c.logit / temp);
            self.sorted = sorted;
        } else if let Some(best) = self.best() {
            self.list = vec![best];
            self.sorted = true;
        }
    }

    /// [`Candidates::temperature`] between `temp - range` and `temp + range`: the higher, the less certain the choice is
    /// (entropy relative to its maximum, to the power of `exponent`).
    pub fn dynamic_temperature(&mut self, temp: f32, range: f32, exponent: f32) {
        if range <= 0.0 || self.list.len() < 2 {
            return self.temperature(temp);
        }
        let certain = entropy(&self.probabilities()) / log(self.list.len() as f64);
        let (least, most) = ((temp - range).max(0.0), temp + range);
        let part = pow(certain.clamp(0.0, 1.0), f64::from(exponent)) as f32;
        self.temperature(least + (most - least) * part);
    }

    /// Keeps tokens whose surprise is at most `mu` bits (mirostat 2, Basu et al. 2020), at least one.
    pub fn mirostat(&mut self, mu: f64) {
        self.sort();
        let fits = |p: &&f64| -log2(**p) <= mu;
        let kept = self.probabilities().iter().take_while(fits).count();
        self.list.truncate(kept.max(1));
    }
}

/// The `k` likeliest tokens and the natural logarithm of their probabilities (softmax of the raw logits over the whole
/// vocabulary), likeliest first; equal ones by id. NaN counts as minus infinity.
pub fn logprobs(logits: &[f32], k: usize) -> Vec<(u32, f32)> {
    let mut candidates = Candidates::default();
    candidates.fill(logits, |_| true);
    let Some(log) = candidates.log_probability() else {
        return Vec::new();
    };
    candidates.keep_top(k);
    candidates.list.iter().map(|c| (c.id, log(c))).collect()
}

/// The natural logarithm of one token's probability, as [`logprobs`] has it; minus infinity for a token without logit.
pub fn logprob(logits: &[f32], id: u32) -> f32 {
    let mut candidates = Candidates::default();
    candidates.fill(logits, |_| true);
    let log = candidates.log_probability();
    log.zip(candidates.list.get(id as usize))
        .map_or(f32::NEG_INFINITY, |(log, c)| log(c))
}
