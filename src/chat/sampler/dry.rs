//! What DRY looks for: the end of the text so far, somewhere earlier in it.

use crate::chat::tokenizer::Tokenizer;
use std::collections::HashMap;

/// Where a repetition ends for DRY: the tokens that hold a text such as a line break, or the first part of it.
#[derive(Clone, Debug, Default)]
pub struct Breakers {
    /// Token that holds a breaker or begins it, to the tokens that have to follow.
    tails: HashMap<u32, Vec<Vec<u32>>>,
}

impl Breakers {
    /// The tokens of a vocabulary that hold the texts.
    pub fn new(texts: &[String], tokenizer: &Tokenizer) -> Breakers {
        let mut breakers = Breakers::default();
        for id in 0..tokenizer.len() as u32 {
            let piece = tokenizer.piece_bytes(id);
            for text in texts.iter().map(String::as_bytes) {
                let holds = piece.windows(text.len()).any(|part| part == text);
                let ends = (1..text.len()).filter(|&n| piece.ends_with(&text[..n]));
                let rests = match holds {
                    true => vec![Vec::new()],
                    false => ends
                        .filter_map(|n| std::str::from_utf8(&text[n..]).ok())
                        .map(|rest| tokenizer.encode_with(rest, false, true))
                        .collect(),
                };
                if !rests.is_empty() {
                    breakers.tails.entry(id).or_default().extend(rests);
                }
            }
        }
        breakers
    }

    /// How many tokens at the end of `recent` come after the last breaker.
    fn unbroken(&self, recent: &[u32]) -> usize {
        let after = |at: usize| {
            let tails = self.tails.get(&recent[at])?;
            let rest = &recent[at + 1..];
            let complete = tails.iter().filter(|tail| rest.starts_with(tail));
            complete.map(|tail| rest.len() - tail.len()).min()
        };
        (0..recent.len())
            .rev()
            .find_map(after)
            .unwrap_or(recent.len())
    }

    /// Whether a token holds a whole breaker: it is never penalised.
    fn is_breaker(&self, id: u32) -> bool {
        let tails = self.tails.get(&id);
        tails.is_some_and(|tails| tails.iter().any(Vec::is_empty))
    }

    /// The tokens that would make the end of `recent` repeat what came before, each with the length of the repeated
    /// sequence so far, if that is at least `allowed`.
    pub fn repeats(&self, recent: &[u32], allowed: usize) -> HashMap<u32, usize> {
        let mut repeats = HashMap::new();
        let limit = self.unbroken(recent);
        if recent.len() <= allowed || limit < allowed {
            return repeats;
        }
        for (end, length) in (0..).zip(common_suffixes(recent)) {
            let (next, length) = (recent[end], length.min(limit));
            if length >= allowed && !self.is_breaker(next) {
                let longest = repeats.entry(next).or_insert(0);
                *longest = length.max(*longest);
            }
        }
        repeats
    }
}

/// For each place in `text`, how many tokens before it equal the last tokens of `text` (the Z function of the
/// reversed text; Gusfield 1997, chapter 1), in linear time.
fn common_suffixes(text: &[u32]) -> Vec<usize> {
    let n = text.len();
    let back = |i: usize| text[n - 1 - i];
    let mut z = vec![0; n];
    let (mut left, mut right) = (0, 0);
    for i in 1..n {
        let mut len = match i < right {
            true => z[i - left].min(right - i),
            false => 0,
        };
        while i + len < n && back(i + len) == back(len) {
            len += 1;
        }
        z[i] = len;
        if i + len > right {
            (left, right) = (i, i + len);
        }
    }
    // z[i] speaks of what ends just before place n - i.
    (0..n)
        .map(|place| if place == 0 { 0 } else { z[n - place] })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn breakers(ids: &[u32]) -> Breakers {
        Breakers {
            tails: ids.iter().map(|&id| (id, vec![Vec::new()])).collect(),
        }
    }

    #[test]
    fn common_suffixes_are_those_of_comparing() {
        let mut x = 7u32;
        for n in 0..60 {
            let text: Vec<u32> = (0..n)
                .map(|_| {
                    x = x.wrapping_mul(1_103_515_245).wrapping_add(12345);
                    (x >> 16) % 3
                })
                .collect();
            for (place, got) in common_suffixes(&text).into_iter().enumerate() {
                let pairs = text[..place].iter().rev().zip(text.iter().rev());
                assert_eq!(
                    got,
                    pairs.take_while(|(a, b)| a == b).count(),
                    "{text:?} {place}"
                );
            }
        }
    }

    #[test]
    fn repeats_are_those_counted_by_hand() {
        let none = breakers(&[]);
        let repeats = |b: &Breakers, recent: &[u32]| {
            let mut list: Vec<_> = b.repeats(recent, 2).into_iter().collect();
            list.sort_unstable();
            list
        };
        // "1 2 3" came before and was followed by 4.
        assert_eq!(repeats(&none, &[1, 2, 3, 4, 1, 2, 3]), [(4, 3)]);
        // "1 2" was followed by 3 and by 4, once after "5 1 2".
        assert_eq!(
            repeats(&none, &[1, 2, 3, 5, 1, 2, 4, 5, 1, 2]),
            [(3, 2), (4, 3)]
        );
        // A single token repeated overlaps itself.
        assert_eq!(repeats(&none, &[9, 9, 9, 9]), [(9, 3)]);
        assert_eq!(repeats(&none, &[1, 2]), []);
        assert_eq!(repeats(&none, &[]), []);
        // A breaker ends the repeated sequence and is no repetition itself.
        assert_eq!(repeats(&breakers(&[2]), &[1, 2, 3, 4, 1, 2, 3]), []);
        assert_eq!(repeats(&breakers(&[1]), &[1, 2, 3, 4, 1, 2, 3]), [(4, 2)]);
        assert_eq!(repeats(&breakers(&[4]), &[1, 2, 3, 4, 1, 2, 3]), []);
    }

    #[test]
    fn a_breaker_of_several_tokens_counts_when_it_is_complete() {
        let b = Breakers {
            tails: HashMap::from([(7, vec![vec![8, 9]])]),
        };
        assert_eq!(b.unbroken(&[1, 7, 8, 9, 2, 3]), 2);
        assert_eq!(b.unbroken(&[1, 7, 8, 2, 3]), 5);
        assert!(!b.is_breaker(7));
    }
}
