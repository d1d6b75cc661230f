//! Which expert should make room? Each layer has its share of the slots, and the expert that a layer's tokens choose
//! least gives way.
//!
//! A pass goes through the layers in turn, so that the expert used longest ago is the one wanted next: "least recently
//! used" over all layers is the worst rule there is. Within a layer it is not bad, and counting is a little better: on
//! choices made like Mixtral's (nearly even, but repeated by two tokens of three) half of the experts hold 60% of the
//! choices when the least popular of the layer goes, 58% with the least recent of the layer, 51% with the least recent
//! of all, 55% with the least popular of all.

/// How much one token counts: the past fades by this share.
const FADE: f32 = 1.0 / 64.0;

/// For every expert of every layer the share of tokens that take it, the latest counting most.
pub(super) struct Popularity {
    n_expert: usize,
    /// `(n_layer, n_expert)`, each 0 to 1; a layer's sum is about the experts that a token takes.
    share: Vec<f32>,
}

impl Popularity {
    /// Every expert is as likely as its `share (n_layer, n_expert)` says.
    pub(super) fn new(n_expert: usize, share: Vec<f32>) -> Popularity {
        assert!(share.len().is_multiple_of(n_expert));
        Popularity { n_expert, share }
    }

    /// The share of tokens that take expert `key`: `layer · n_expert + expert`.
    pub(super) fn share(&self, key: usize) -> f32 {
        self.share[key]
    }

    /// Takes in that `n` tokens went through `layer`, `counts[e]` of them to expert `e`.
    pub(super) fn learn(&mut self, layer: usize, counts: &[usize], n: usize) {
        let kept = (1.0 - FADE).powf(n as f32);
        let shares = &mut self.share[layer * self.n_expert..][..self.n_expert];
        for (share, count) in shares.iter_mut().zip(counts) {
            *share = kept * *share + (1.0 - kept) * *count as f32 / n as f32;
        }
    }

    /// Slots that `layer` may keep of `slots`; an even part. Where there are too few for what one token wants of each
    /// layer, `moving` of them belong to no layer.
    pub(super) fn quota(&self, layer: usize, slots: usize, moving: usize) -> usize {
        let n_layer = self.share.len() / self.n_expert;
        let used = moving / 2;
        let slots = match slots < n_layer * used {
            true => slots.saturating_sub(moving),
            false => slots,
        };
        (layer + 1) * slots / n_layer - layer * slots / n_layer
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_tokens_at_once_count_like_one_by_one() {
        let even = || Popularity::new(2, vec![0.5; 4]);
        let (mut a, mut b) = (even(), even());
        for _ in 0..50 {
            a.learn(1, &[1, 0], 1);
        }
        b.learn(1, &[50, 0], 50);
        assert!((a.share(2) - b.share(2)).abs() < 1e-5 && a.share(2) > 0.7);
        assert_eq!(a.share(0), 0.5);
    }

    #[test]
    fn all_slots_are_shared_out() {
        let p = Popularity::new(8, vec![0.25; 32 * 8]);
        for (slots, kept) in [(256, 256), (100, 100), (64, 64), (63, 59), (4, 0), (0, 0)] {
            let quotas: Vec<_> = (0..32).map(|l| p.quota(l, slots, 4)).collect();
            assert_eq!(quotas.iter().sum::<usize>(), kept);
            let (least, most) = (quotas.iter().min().unwrap(), quotas.iter().max().unwrap());
            assert!(most - least <= 1);
        }
    }
}
