//! The router: which experts a token takes, and with what weight.

use super::Machine;
use super::linear::{Input, Job, Weight, matmul};
use crate::simd::float::exp;

/// One of a token's experts.
#[derive(Clone, Copy, Debug, Default, PartialEq, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub struct Choice {
    /// The expert.
    pub expert: u32,
    /// Its share; a token's shares sum to 1.
    pub weight: f32,
}

/// The choices of all tokens by the router `w`. `x`: prepared for `w`; `out`: `(n_tok, n_used)`; `logits` is scratch.
pub(super) fn choose(
    machine: &Machine,
    w: &Weight,
    x: &Input,
    all: &[u32],
    logits: &mut Vec<f32>,
    out: &mut [Choice],
) {
    logits.resize(all.len() * w.n_out, 0.0);
    matmul(
        machine,
        &mut [Job {
            w,
            x,
            pick: all,
            y: logits,
        }],
    );
    let n_used = out.len() / all.len().max(1);
    for (t, logits) in logits.chunks_exact(w.n_out).enumerate() {
        route(logits, &mut out[t * n_used..][..n_used]);
    }
}

/// Softmax over all experts, the `out.len()` largest, renormalised to sum 1 (Mixtral, Jiang et al.
/// 2024, section 2.1). Equal probabilities: the lower index first. Not-a-number counts as smallest.
///
/// `logits`: `(n_expert)`; `out`: `(n_used)`, by rank, at most `n_expert` long.
pub(super) fn route(logits: &[f32], out: &mut [Choice]) {
    let max = logits
        .iter()
        .fold(f32::NEG_INFINITY, |m, &l| if l > m { l } else { m });
    // One sum for all choices: a common divisor of softmax would cancel in the renormalisation, but
    // the reference divides twice, and so do its roundings.
    let total: f32 = logits.iter().map(|&l| weight(l, max)).sum();
    for rank in 0..out.len() {
        let mut best: Option<(usize, f32)> = None;
        for (e, &l) in logits.iter().enumerate() {
            let p = weight(l, max);
            let taken = out[..rank].iter().any(|c| c.expert == e as u32);
            if !taken && best.is_none_or(|(_, b)| p > b) {
                best = Some((e, p));
            }
        }
        let (expert, p) = best.expect("there are at least as many experts as ranks");
        out[rank] = Choice {
            expert: expert as u32,
            weight: p / total,
        };
    }
    let sum: f32 = out.iter().map(|c| c.weight).sum();
    for c in out {
        c.weight /= sum;
    }
}

/// `e^(l - max)`, 0 for a logit that is not a number.
fn weight(l: f32, max: f32) -> f32 {
    if l.is_nan() || max == f32::NEG_INFINITY {
        0.0
    } else {
        exp(l - max)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn top2(logits: &[f32]) -> [Choice; 2] {
        let mut out = [Choice::default(); 2];
        route(logits, &mut out);
        out
    }

    #[test]
    fn takes_the_two_largest_and_renormalises() {
        // By hand: e^2 / (e^2 + e^1) = 0.7310586, e^1 / (e^2 + e^1) = 0.26894143.
        let [a, b] = top2(&[0.0, 2.0, -1.0, 1.0, 0.5, 0.0, 0.0, 0.0]);
        assert_eq!((a.expert, b.expert), (1, 3));
        assert!((a.weight - 0.731_058_6).abs() < 1e-6 && (b.weight - 0.268_941_43).abs() < 1e-6);
    }

    #[test]
    fn ties_go_to_the_lower_index() {
        let [a, b] = top2(&[1.0; 8]);
        assert_eq!((a.expert, b.expert), (0, 1));
        assert_eq!((a.weight, b.weight), (0.5, 0.5));
    }

    #[test]
    fn always_two_different_experts() {
        for logits in [
            [f32::NAN; 4],
            [f32::INFINITY; 4],
            [f32::NEG_INFINITY; 4],
            [f32::NAN, 1.0, f32::NAN, 2.0],
        ] {
            let [a, b] = top2(&logits);
            assert_ne!(a.expert, b.expert);
        }
    }
}
