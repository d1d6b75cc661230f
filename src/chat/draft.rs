//! Guessing the next tokens, so that one forward pass can check several at once.
//!
//! No second model guesses: what followed the last tokens the last time they stood in the text is taken to follow again
//! (prompt lookup; Saxena 2023), and where a grammar leaves one way only, that way. A pass over the guesses gives the same logits
//! as one pass each (promise 1), the sampler draws from each row as ever, and what it did not draw is
//! taken out of the cache again: an answer has the same bits with drafts and without.
//!
//! Whether a draft pays depends on how often guesses were right, which is counted also while none are made, and on what a pass
//! of several tokens costs. That is more than a pass of one, because each token of a mixture of experts wants experts of its own:
//! the expected bytes are the first estimate, the clock corrects it.

use super::constraint::Constraint;
use crate::moe::Model;
use std::collections::HashMap;
use std::time::Duration;

/// How many tokens to guess.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Draft {
    /// None.
    Off,
    /// Always this many, where anything can be guessed.
    Fixed(usize),
    /// As many as pay.
    #[default]
    Auto,
}

/// Most tokens of a draft that is to pay.
const MOST: usize = 16;
/// The longest repetition that is told from a longer one.
const LONGEST: usize = 32;

/// Guesses and learns from what became of the guesses.
pub(super) struct Drafter {
    /// How many to guess.
    pub(super) mode: Draft,
    lookup: Lookup,
    /// How often a guess was right, by [`class`].
    right: [f64; 5],
    cost: Cost,
}

/// Guesses and why they were made.
#[derive(Default)]
pub(super) struct Guess {
    /// What may follow.
    pub(super) tokens: Vec<u32>,
    /// Where in the sequence it stood before, and how many tokens before it were the same; nothing, if a grammar forces it.
    found: Option<(usize, usize)>,
}

/// Guesses are about as good as those after a repetition of similar length: of 2, to 4, to 8 tokens, longer. The last class
/// is for tokens that a grammar forces.
fn class(repeated: usize) -> usize {
    match repeated {
        0..=2 => 0,
        3..=4 => 1,
        5..=8 => 2,
        _ => 3,
    }
}
const FORCED: usize = 4;
/// How often guesses are right before any was counted.
const RIGHT: [f64; 5] = [0.2, 0.4, 0.6, 0.8, 1.0];

impl Drafter {
    pub(super) fn new(model: &Model) -> Drafter {
        Drafter {
            mode: Draft::default(),
            lookup: Lookup::default(),
            right: RIGHT,
            cost: Cost::new(model),
        }
    }

    /// Begins with another text.
    pub(super) fn begin(&mut self) {
        self.lookup = Lookup::default();
    }

    /// What may follow `sequence`: at most `room` tokens, all of which the grammar allows.
    pub(super) fn guess(
        &mut self,
        sequence: &[u32],
        room: usize,
        constraint: Option<&mut Constraint>,
    ) -> Guess {
        if self.mode == Draft::Off {
            return Guess::default();
        }
        let found = self.lookup.find(sequence);
        let mut guess = Guess {
            tokens: Vec::new(),
            found,
        };
        if room == 0 {
            return guess;
        }
        let mut constraint = constraint;
        let forced = constraint.as_mut().map_or(Vec::new(), |c| c.forced());
        if !forced.is_empty() {
            let n = self.length(room.min(forced.len()), |_| FORCED);
            guess.tokens.extend(&forced[..n]);
            guess.found = None;
        } else if let Some((at, repeated)) = found {
            let n = self.length(room, |i| class(repeated + i));
            for i in at..at + n {
                // What was repeated up to now may go on repeating itself.
                let next = sequence.get(i).copied();
                guess
                    .tokens
                    .push(next.unwrap_or_else(|| guess.tokens[i - sequence.len()]));
            }
            if let Some(c) = constraint.filter(|_| n > 0) {
                let allowed = c.allows(&guess.tokens);
                guess.tokens.truncate(allowed);
            }
        }
        guess
    }

    /// How many tokens to guess, at most `room`, where the guess `i` is of class `class(i)`: the number with the most tokens for
    /// the time.
    fn length(&self, room: usize, class: impl Fn(usize) -> usize) -> usize {
        if let Draft::Fixed(n) = self.mode {
            return n.min(room);
        }
        // What a pass of one token costs must be known.
        if self.cost.one == 0.0 {
            return 0;
        }
        let (mut best, mut best_rate) = (0, 1.0);
        let (mut tokens, mut all_right) = (1.0, 1.0);
        for n in 1..=room.min(MOST) {
            all_right *= self.right[class(n - 1)];
            tokens += all_right;
            let rate = tokens / self.cost.of(n + 1);
            if rate > best_rate {
                (best, best_rate) = (n, rate);
            }
        }
        best
    }

    /// Learns from a pass that began after the first `before` tokens of `sequence` and took `time`.
    pub(super) fn learn(&mut self, guess: &Guess, sequence: &[u32], before: usize, time: Duration) {
        let came = &sequence[before..];
        let mut count = |class: usize, right: bool| {
            let rate = &mut self.right[class];
            *rate += 0.1 * (f64::from(u8::from(right)) - *rate);
        };
        match guess.found {
            Some((at, repeated)) => {
                // The first guess is judged even if it was not made.
                for (i, came) in came.iter().enumerate() {
                    let guessed = match guess.tokens.get(i) {
                        None if i == 0 => sequence[at],
                        None => break,
                        Some(guessed) => *guessed,
                    };
                    count(class(repeated + i), guessed == *came);
                    if guessed != *came {
                        break;
                    }
                }
            }
            None => {
                for (guessed, came) in guess.tokens.iter().zip(came) {
                    count(FORCED, guessed == came);
                }
            }
        }
        self.cost.learn(guess.tokens.len() + 1, time);
    }
}

/// Where the last tokens stood before.
#[derive(Default)]
struct Lookup {
    /// Two and three tokens, to the place behind them where they stood last.
    pairs: HashMap<[u32; 2], usize>,
    triples: HashMap<[u32; 3], usize>,
    /// Places that are in the maps.
    known: usize,
    /// What was found last, and how long the sequence was.
    last: Option<(usize, usize)>,
}

impl Lookup {
    /// The place of the token that followed the last time, and how many tokens before it are those at the end of `sequence`.
    fn find(&mut self, sequence: &[u32]) -> Option<(usize, usize)> {
        let n = sequence.len();
        for end in self.known.max(2)..n {
            self.pairs
                .insert([sequence[end - 2], sequence[end - 1]], end);
            if end > 2 {
                let triple = [sequence[end - 3], sequence[end - 2], sequence[end - 1]];
                self.triples.insert(triple, end);
            }
        }
        self.known = n;
        let pair = sequence.last_chunk().and_then(|pair| self.pairs.get(pair));
        let triple = sequence.last_chunk().and_then(|t| self.triples.get(t));
        // A source that was right up to now is as good as a newer one.
        let followed = self.last.map(|(at, len)| at + n - len).filter(|at| *at < n);
        let repeated = |at: usize| {
            let pairs = sequence[..at].iter().rev().zip(sequence.iter().rev());
            pairs.take(LONGEST).take_while(|(a, b)| a == b).count()
        };
        let places = [pair.copied(), triple.copied(), followed];
        let found = places
            .into_iter()
            .flatten()
            .map(|at| (repeated(at), at))
            .max();
        let found = found.filter(|(repeated, _)| *repeated >= 2);
        self.last = found.map(|(_, at)| (at, n));
        found.map(|(repeated, at)| (at, repeated))
    }
}

/// What passes of several tokens cost, in passes of one.
struct Cost {
    /// The part of a token's bytes that experts have.
    experts: f64,
    n_expert: f64,
    n_used: f64,
    /// Seconds of a pass of one token.
    one: f64,
    /// How much more (or less) than the estimate the rest of a pass has cost.
    factor: f64,
}

impl Cost {
    fn new(model: &Model) -> Cost {
        let (n_expert, n_used) = (model.config.n_expert as f64, model.config.n_used as f64);
        let layers = model.weights.layers.iter();
        let experts = layers.flat_map(|l| &l.experts).map(|e| e.bytes());
        let experts = experts.sum::<u64>() as f64 * n_used / n_expert;
        let dense = model.weights.dense_bytes() as f64;
        Cost {
            experts: experts / (experts + dense),
            n_expert,
            n_used,
            one: 0.0,
            factor: 1.0,
        }
    }

    /// Beyond one pass of one token: the experts that `n` tokens choose evenly and the arithmetic, which is
    /// hidden behind the reading in part.
    fn estimate(&self, n: usize) -> f64 {
        let missed = (1.0 - self.n_used / self.n_expert).max(0.0);
        let distinct = self.n_expert * (1.0 - missed.powi(n as i32));
        let more = n as f64 - 1.0;
        self.experts * (distinct / self.n_used - 1.0) + 0.05 * more
    }

    /// What a pass of `n` tokens costs.
    fn of(&self, n: usize) -> f64 {
        1.0 + self.factor * self.estimate(n)
    }

    fn learn(&mut self, n: usize, time: Duration) {
        let time = time.as_secs_f64();
        if n == 1 {
            let part = if self.one == 0.0 { 1.0 } else { 0.2 };
            self.one += part * (time - self.one);
            // An unlucky measurement is forgotten slowly, or drafts would never be tried again.
            self.factor += 0.01 * (1.0 - self.factor);
        } else if self.one > 0.0 {
            // A machine that was busy with something else says nothing about passes.
            let more = (time / self.one - 1.0).clamp(0.0, 2.0 * (n - 1) as f64);
            self.factor += 0.2 * (more / self.estimate(n) - self.factor);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As for a model of 8 experts of which each token uses 2, or for one without experts.
    fn drafter(n_expert: f64) -> Drafter {
        Drafter {
            mode: Draft::Auto,
            lookup: Lookup::default(),
            right: RIGHT,
            cost: Cost {
                experts: 0.86,
                n_expert,
                n_used: n_expert.min(2.0),
                one: 0.1,
                factor: 1.0,
            },
        }
    }

    /// Tokens guessed at each step while `text` comes to be, where a pass of n tokens takes `time(n)` seconds.
    fn guesses(
        d: &mut Drafter,
        text: &[u32],
        start: usize,
        time: impl Fn(usize) -> f64,
    ) -> Vec<usize> {
        let (mut at, mut lengths) = (start, Vec::new());
        while at < text.len() {
            let guess = d.guess(&text[..at], text.len() - at - 1, None);
            let pairs = guess.tokens.iter().zip(&text[at..]);
            let right = pairs.take_while(|(a, b)| a == b).count();
            let n = guess.tokens.len();
            d.learn(
                &guess,
                &text[..at + right + 1],
                at,
                Duration::from_secs_f64(time(n + 1)),
            );
            lengths.push(n);
            at += right + 1;
        }
        lengths
    }

    fn story(n: u32) -> Vec<u32> {
        (0..n).map(|i| 10 + i * 7919 % 4001).collect()
    }

    #[test]
    fn what_stood_there_before_is_found() {
        let mut lookup = Lookup::default();
        let text = [5, 6, 7, 1, 9, 6, 7, 2, 5, 6, 7];
        // Three tokens are better than two that came later.
        assert_eq!(lookup.find(&text), Some((3, 3)));
        assert_eq!(lookup.find(&[&text[..], &[1]].concat()), Some((4, 4)));
        assert_eq!(lookup.find(&[&text[..], &[1, 4]].concat()), None);
        assert_eq!(Lookup::default().find(&[1]), None);
        assert_eq!(Lookup::default().find(&[]), None);
    }

    #[test]
    fn a_repetition_goes_on_repeating_itself() {
        let mut d = drafter(1.0);
        d.mode = Draft::Fixed(5);
        assert_eq!(
            d.guess(&[1, 2, 1, 2, 1, 2], 9, None).tokens,
            [1, 2, 1, 2, 1]
        );
        assert_eq!(d.guess(&[1, 2, 1, 2, 1, 2], 2, None).tokens, [1, 2]);
    }

    #[test]
    fn guesses_are_made_where_they_pay() {
        // A pass of n tokens as the expected bytes have it.
        let by_bytes = |n: usize| 0.1 * drafter(8.0).cost.of(n);
        // A copy of a long text: soon as many as may be, and few passes.
        let copy = story(300).repeat(2);
        let lengths = guesses(&mut drafter(8.0), &copy, 302, by_bytes);
        assert!(
            lengths.len() < 40 && lengths[10..18].iter().all(|n| *n == MOST),
            "{lengths:?}"
        );
        // Nothing repeats: nothing is guessed.
        let lengths = guesses(&mut drafter(8.0), &story(300), 10, by_bytes);
        assert!(lengths.iter().all(|n| *n == 0));
        // Pairs of tokens repeat, but what follows is new each time: guessing ends.
        let traps: Vec<u32> = story(300).iter().flat_map(|&i| [3, 4, i]).collect();
        let lengths = guesses(&mut drafter(8.0), &traps, 30, by_bytes);
        assert!(lengths[50..].iter().all(|n| *n == 0), "{lengths:?}");
        // Without experts a pass of several tokens is cheap, so that less certain guesses pay too.
        let class = |d: &Drafter| d.length(16, |_| 1);
        assert!(class(&drafter(8.0)) == 0 && class(&drafter(1.0)) > 0);
        // Of guesses that would pay one by one, no more are made than save what their experts cost.
        let fair = |n_expert| {
            let mut d = drafter(n_expert);
            d.right[3] = 0.72;
            d.length(16, |_| 3)
        };
        assert!(fair(8.0) == 1 && fair(1.0) > 3);
    }

    #[test]
    fn the_clock_has_the_last_word() {
        // Several tokens cost more than one by one, whatever the estimate: guessing ends even for a copy, and is tried
        // again now and then.
        let copy = story(600).repeat(2);
        let dear = |n: usize| if n == 1 { 0.1 } else { 0.12 * n as f64 };
        let lengths = guesses(&mut drafter(1.0), &copy, 602, dear);
        let after = &lengths[lengths.len() / 2..];
        let share = after.iter().filter(|n| **n > 0).count() as f64 / after.len() as f64;
        assert!(lengths.len() > 40, "{lengths:?}");
        assert!(share < 0.5, "{lengths:?}");
    }
}
