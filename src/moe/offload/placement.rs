//! Which experts should be on the device? Arithmetic alone.
//!
//! A token costs as much as the experts that it does not find there, so the set that is chosen most often is the best one,
//! whatever their layers. Where shares are equal, layers are served in turn. When the memory is full, an expert that has
//! become clearly more popular than one that is there takes its place: one at a time, with a pause between, as a copy
//! takes longer than what it saves for many tokens.

/// A share is the mean of the last so many tokens …
const MEMORY: f32 = 4096.0;
/// … with what was thought before the first one, which counts like so many.
const PRIOR: f32 = 256.0;
/// How much larger the share of an expert must really be than that of the one whose place it takes …
const WORTH: f32 = 0.03;
/// … and how many standard deviations of a share more, as the largest and the smallest of many are compared.
const DOUBT: f32 = 5.0;
/// Tokens between two exchanges.
const PAUSE: usize = 64;

/// Where an expert is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Where {
    /// Not on the device.
    Away,
    /// On its way into this slot.
    Coming(usize),
    /// In this slot.
    Here(usize),
}

/// What to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Bring an expert into a new slot.
    Add(usize),
    /// Bring an expert into the slot of another, which goes.
    Exchange {
        /// The one that comes.
        comes: usize,
        /// The one that goes.
        goes: usize,
    },
}

/// The experts of a model, `layer · n_expert + expert`, and where they are.
pub(super) struct Placement {
    n_expert: usize,
    /// Bytes of each on the device; nothing for those that it does not run.
    bytes: Vec<Option<u64>>,
    /// The share of tokens that take each, the latest counting most; a layer's sum is the experts that a token takes.
    share: Vec<f32>,
    places: Vec<Where>,
    /// Bytes that slots may take, and do take.
    room: u64,
    taken: u64,
    /// Tokens that the shares are made of, and tokens since the last exchange.
    seen: f32,
    since: usize,
}

impl Placement {
    /// None is on the device, which has `room` bytes for those of `bytes`. `share`: how often a token takes each.
    pub(super) fn new(
        n_expert: usize,
        bytes: Vec<Option<u64>>,
        share: Vec<f32>,
        room: u64,
    ) -> Placement {
        assert_eq!(bytes.len(), share.len());
        Placement {
            n_expert,
            places: vec![Where::Away; bytes.len()],
            bytes,
            share,
            room,
            taken: 0,
            seen: PRIOR,
            since: 0,
        }
    }

    /// Where an expert is.
    pub(super) fn place(&self, key: usize) -> Where {
        self.places[key]
    }

    /// Bytes of an expert that the device runs.
    pub(super) fn bytes(&self, key: usize) -> Option<u64> {
        self.bytes[key]
    }

    /// The share of tokens that take an expert.
    #[cfg(any(all(test, unix), feature = "cuda"))]
    pub(super) fn share(&self, key: usize) -> f32 {
        self.share[key]
    }

    /// Bytes that slots take.
    pub(super) fn taken(&self) -> u64 {
        self.taken
    }

    /// Experts on the device, and experts that it could run.
    pub(super) fn here(&self) -> (usize, usize) {
        let here = |p: &&Where| matches!(p, Where::Here(_));
        (
            self.places.iter().filter(here).count(),
            self.bytes.iter().flatten().count(),
        )
    }

    /// Sets room aside for something else than experts; false if there is not so much left.
    pub(super) fn reserve(&mut self, bytes: u64) -> bool {
        let fits = bytes <= self.room.saturating_sub(self.taken);
        if fits {
            self.taken += bytes;
        }
        fits
    }

    /// Gives back what was reserved.
    pub(super) fn release(&mut self, bytes: u64) {
        self.taken -= bytes;
    }

    /// Takes in that `n` tokens went through `layer`, `counts[e]` of them to expert `e`.
    pub(super) fn learn(&mut self, layer: usize, counts: &[usize], n: usize) {
        let kept = (1.0 - 1.0 / self.seen).powf(n as f32);
        let shares = &mut self.share[layer * self.n_expert..][..self.n_expert];
        for (share, count) in shares.iter_mut().zip(counts) {
            *share = kept * *share + (1.0 - kept) * *count as f32 / n as f32;
        }
        // After the last layer, so that all of them count alike.
        if (layer + 1) * self.n_expert == self.places.len() {
            self.seen = MEMORY.min(self.seen + n as f32);
            self.since = self.since.saturating_add(n);
        }
    }

    /// The next step: more experts while there is room, then an exchange where one is worth it and none is on its way.
    pub(super) fn next(&self) -> Option<Step> {
        self.add().map(Step::Add).or_else(|| self.exchange())
    }

    fn add(&self) -> Option<usize> {
        let left = self.room.saturating_sub(self.taken);
        let held: Vec<usize> = self
            .places
            .chunks(self.n_expert)
            .map(|layer| layer.iter().filter(|p| **p != Where::Away).count())
            .collect();
        let fits = |key: &usize| {
            self.places[*key] == Where::Away && self.bytes[*key].is_some_and(|b| b <= left)
        };
        (0..self.places.len()).filter(fits).max_by(|a, b| {
            let fewer = held[b / self.n_expert].cmp(&held[a / self.n_expert]);
            let hotter = self.share[*a].total_cmp(&self.share[*b]);
            hotter.then(fewer).then(b.cmp(a))
        })
    }

    /// How much larger a share must be for an exchange. The variance of a choice is at most a quarter; of a mean that fades,
    /// half of that for each token.
    fn margin(&self) -> f32 {
        WORTH + DOUBT * (0.25 / (2.0 * self.seen)).sqrt()
    }

    fn exchange(&self) -> Option<Step> {
        let on_its_way = |p: &Where| matches!(p, Where::Coming(_));
        if self.since < PAUSE || self.places.iter().any(on_its_way) {
            return None;
        }
        let share = |key: &usize| self.share[*key];
        let away = |key: &usize| self.places[*key] == Where::Away && self.bytes[*key].is_some();
        // The most popular that would find a slot of its size.
        let mut coming: Vec<usize> = (0..self.places.len()).filter(away).collect();
        coming.sort_by(|a, b| share(b).total_cmp(&share(a)));
        coming.into_iter().find_map(|comes| {
            let fits = |key: &usize| {
                matches!(self.places[*key], Where::Here(_)) && self.bytes[*key] == self.bytes[comes]
            };
            let goes = (0..self.places.len())
                .filter(fits)
                .min_by(|a, b| share(a).total_cmp(&share(b)))?;
            (share(&comes) > share(&goes) + self.margin()).then_some(Step::Exchange { comes, goes })
        })
    }

    /// A step was begun: the expert is on its way into `slot`.
    pub(super) fn begun(&mut self, step: Step, slot: usize) {
        match step {
            Step::Add(key) => {
                self.taken += self.bytes[key].unwrap_or(0);
                self.places[key] = Where::Coming(slot);
            }
            Step::Exchange { comes, goes } => {
                self.places[goes] = Where::Away;
                self.places[comes] = Where::Coming(slot);
                self.since = 0;
            }
        }
    }

    /// What was on its way into `slot` is there.
    pub(super) fn arrived(&mut self, slot: usize) {
        for place in &mut self.places {
            if *place == Where::Coming(slot) {
                *place = Where::Here(slot);
            }
        }
    }

    /// The device has no more memory than what is taken: there will be no more slots.
    pub(super) fn full(&mut self) {
        self.room = self.room.min(self.taken);
    }

    /// The least popular expert gives its slot back, and the room for it is gone: the device needs it for something else.
    pub(super) fn shrink(&mut self) -> Option<usize> {
        let here = |key: &usize| matches!(self.places[*key], Where::Here(_));
        let key = (0..self.places.len())
            .filter(here)
            .min_by(|a, b| self.share[*a].total_cmp(&self.share[*b]))?;
        let Where::Here(slot) = std::mem::replace(&mut self.places[key], Where::Away) else {
            unreachable!("only what is here was looked at");
        };
        self.taken -= self.bytes[key].unwrap_or(0);
        self.full();
        Some(slot)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quant::random::Random;

    /// Two layers of four experts of 10 bytes; the device does not run the last one.
    fn placement(room: u64, share: [f32; 8]) -> Placement {
        let mut bytes = vec![Some(10); 8];
        bytes[7] = None;
        Placement::new(4, bytes, share.to_vec(), room)
    }

    /// Does what there is to do; everything arrives at once. Returns who is here.
    fn settle(p: &mut Placement) -> Vec<usize> {
        let mut slot = 100;
        while let Some(step) = p.next() {
            let into = match step {
                Step::Add(_) => slot,
                Step::Exchange { goes, .. } => match p.place(goes) {
                    Where::Here(slot) => slot,
                    other => panic!("{other:?} cannot go"),
                },
            };
            p.begun(step, into);
            assert!(p.taken <= p.room);
            p.arrived(into);
            slot += 1;
        }
        (0..8).filter(|k| p.place(*k) != Where::Away).collect()
    }

    #[test]
    fn the_hottest_come_first_and_layers_in_turn_where_all_are_equal() {
        let mut p = placement(35, [0.1, 0.9, 0.4, 0.6, 0.5, 0.5, 0.5, 0.9]);
        assert_eq!(settle(&mut p), [1, 3, 4], "35 bytes are three slots");
        assert_eq!((p.here(), p.taken()), ((3, 7), 30));
        let mut p = placement(40, [0.5; 8]);
        assert_eq!(settle(&mut p), [0, 1, 4, 5]);
        let mut p = placement(1000, [0.5; 8]);
        assert_eq!(settle(&mut p), [0, 1, 2, 3, 4, 5, 6], "never expert 7");
        let mut p = placement(9, [0.5; 8]);
        assert!(settle(&mut p).is_empty());
    }

    #[test]
    fn what_does_not_fit_leaves_room_for_what_does() {
        let mut p = placement(25, [0.9, 0.5, 0.5, 0.5, 0.1, 0.1, 0.1, 0.1]);
        p.bytes[0] = Some(26);
        assert_eq!(settle(&mut p), [1, 2]);
    }

    #[test]
    fn an_exchange_takes_a_clear_difference_a_pause_and_one_at_a_time() {
        let mut p = placement(20, [0.5; 8]);
        assert_eq!(settle(&mut p), [0, 4]);
        // Layer 0 turns to experts 1 and 2, layer 1 stays even.
        let layer = |p: &mut Placement, n| {
            p.learn(0, &[0, n, n, 0], n);
            p.learn(1, &[n / 2; 4], n);
        };
        layer(&mut p, 32);
        assert_eq!(p.next(), None, "a small difference, and too soon");
        layer(&mut p, 31);
        assert!(p.share[1] > p.share[0] + p.margin());
        assert_eq!(p.next(), None, "too soon");
        layer(&mut p, 200);
        let step = Step::Exchange { comes: 1, goes: 0 };
        assert_eq!(p.next(), Some(step));
        p.begun(step, 5);
        layer(&mut p, 200);
        assert_eq!(p.next(), None, "one is on its way");
        assert_eq!((p.place(0), p.place(1)), (Where::Away, Where::Coming(5)));
        p.arrived(5);
        assert_eq!(p.place(1), Where::Here(5));
        let step = Step::Exchange { comes: 2, goes: 4 };
        assert_eq!(p.next(), Some(step), "other layers' slots are as good");
        p.begun(step, 6);
        p.arrived(6);
        layer(&mut p, 400);
        assert_eq!(p.next(), None, "it does not go back and forth");
    }

    #[test]
    fn even_routing_never_exchanges() {
        let mut p = placement(40, [0.5; 8]);
        settle(&mut p);
        // A token at a time, drawn evenly: the shares move, the set stays.
        let mut random = Random(1);
        for _ in 0..20_000 {
            for layer in 0..2 {
                let drawn = random.next();
                let first = (drawn >> 33) as usize % 4;
                let second = (first + 1 + (drawn >> 40) as usize % 3) % 4;
                let mut counts = [0; 4];
                counts[first] += 1;
                counts[second] += 1;
                p.learn(layer, &counts, 1);
            }
            if let Some(step) = p.next() {
                panic!("{step:?} with shares {:?}", p.share);
            }
        }
    }

    #[test]
    fn a_device_with_less_memory_than_thought_keeps_what_it_has() {
        let mut p = placement(60, [0.1, 0.9, 0.4, 0.6, 0.5, 0.5, 0.5, 0.9]);
        for slot in 0..2 {
            let step = p.next().unwrap();
            p.begun(step, slot);
            p.arrived(slot);
        }
        p.full();
        assert_eq!((p.next(), p.here()), (None, (2, 7)));
        assert_eq!(p.shrink(), Some(1), "the less popular of the two");
        assert_eq!((p.next(), p.taken()), (None, 10));
        assert_eq!((p.shrink(), p.shrink()), (Some(0), None));
        assert_eq!((p.taken(), p.next()), (0, None));
    }
}
