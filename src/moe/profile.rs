//! How a model routed the tokens of a text, and the file that keeps it: what to have in memory when not all
//! experts fit, and how well the next ones can be told in advance. `profile/recorder.rs` makes it while a model reads.

mod recorder;

use crate::bounded;
use crate::disk::{self, WholeFile};
use crate::error::{Error, Result};
use crate::gguf::{Gguf, hex};
pub use recorder::Recorder;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::io::Write;
use std::path::Path;

/// What the file says it is.
const FORMAT: &str = "octet-profile";
/// Changes when an older octet would misread the file.
const VERSION: u64 = 1;
/// No profile is longer: a hundred layers of a hundred experts take 100 KB.
const MOST_BYTES: u64 = 64 << 20;

/// How a model routed a text.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Profile {
    format: String,
    version: u64,
    /// [`Gguf::identity`] in hexadecimal.
    pub model: String,
    /// What the model's file was called, for people.
    pub name: String,
    /// Layers.
    pub n_layer: usize,
    /// Experts in a layer.
    pub n_expert: usize,
    /// Experts that a token takes.
    pub n_used: usize,
    /// Tokens that were read.
    pub tokens: u64,
    /// How many of them took an expert: `counts[layer][expert]`.
    pub counts: Vec<Vec<u64>>,
    /// For each layer the share of choices that the token before had made too, 0 to 1. Even routing gives
    /// `n_used / n_expert`.
    pub reuse: Vec<f64>,
    /// For each layer the share of choices that its router also makes when it is shown what enters the feed-forward part
    /// of the layer before, 0 to 1; nothing for the first layer.
    pub recall: Vec<Option<f64>>,
}

impl Profile {
    /// Reads a profile of any model.
    ///
    /// # Errors
    /// If the file cannot be read, is no profile, is of a later version, or its numbers contradict each other.
    pub fn read(path: &Path) -> Result<Profile> {
        let bytes = disk::read(path, MOST_BYTES)?;
        let bad = |expected: &str, found: String| {
            Err(Error::invalid(path, "the routing profile", expected, found))
        };
        let document = match bounded::json(&bytes) {
            Ok(document) => document,
            Err(e) => return bad("JSON", e.to_string()),
        };
        if document["format"] != FORMAT {
            return bad("a file of octet profile", "another kind of JSON".into());
        }
        if document["version"] != VERSION {
            let expected = format!("version {VERSION}");
            return bad(&expected, format!("version {}", document["version"]));
        }
        let profile: Profile = match serde_json::from_value(document) {
            Ok(profile) => profile,
            Err(e) => return bad("the fields of version 1", e.to_string()),
        };
        match profile.contradiction() {
            None => Ok(profile),
            Some((expected, found)) => bad(&expected, found),
        }
    }

    /// Reads the profile of this model.
    ///
    /// # Errors
    /// As for [`Profile::read`], and if it is another model's.
    pub fn read_of(path: &Path, file: &Gguf) -> Result<Profile> {
        let (profile, model) = (Profile::read(path)?, hex(&file.identity()));
        if profile.model == model {
            return Ok(profile);
        }
        let (name, model) = (file.path().display(), short(&model));
        Err(Error::invalid(
            path,
            "the routing profile",
            format!("one of {name}, model {model}"),
            format!("one of model {}", short(&profile.model)),
        ))
    }

    /// What is expected and found where the numbers cannot be true.
    fn contradiction(&self) -> Option<(String, String)> {
        let (layers, experts) = (self.n_layer, self.n_expert);
        if layers == 0 {
            return Some(("at least 1 layer".into(), "none".into()));
        }
        if self.n_used == 0 || self.n_used > experts {
            let expected = format!("1 to {experts} experts for a token");
            return Some((expected, self.n_used.to_string()));
        }
        let lists = [
            ("counts", self.counts.len()),
            ("reuse", self.reuse.len()),
            ("recall", self.recall.len()),
        ];
        if let Some((name, n)) = lists.iter().find(|(_, n)| *n != layers) {
            return Some((format!("{name} of {layers} layers"), format!("of {n}")));
        }
        for (i, counts) in self.counts.iter().enumerate() {
            let sum = counts.iter().try_fold(0u64, |sum, n| sum.checked_add(*n));
            let all = self.tokens.checked_mul(self.n_used as u64);
            if counts.len() != experts || sum.is_none() || sum != all {
                let expected = format!(
                    "counts of {experts} experts in layer {i} that add up to {} for each of {} tokens",
                    self.n_used, self.tokens
                );
                return Some((expected, format!("{counts:?}")));
            }
            if let Some(n) = counts.iter().find(|n| **n > self.tokens) {
                let expected = format!("counts up to {} in layer {i}", self.tokens);
                return Some((expected, n.to_string()));
            }
        }
        let shares = self.reuse.iter().chain(self.recall.iter().flatten());
        let mut odd = shares.filter(|share| !(0.0..=1.0).contains(*share));
        odd.next()
            .map(|x| ("shares from 0 to 1".into(), x.to_string()))
    }

    /// Writes the file: whole, or not at all.
    ///
    /// # Errors
    /// If the system refuses.
    pub fn write(&self, path: &Path) -> Result<()> {
        let mut file = WholeFile::create(path)?;
        let text = format!("{}\n", self.to_json());
        file.write_all(text.as_bytes())
            .map_err(Error::io(path, "write"))?;
        file.finish()
    }

    /// The document.
    pub fn to_json(&self) -> Value {
        serde_json::to_value(self).expect("numbers and strings")
    }

    /// How often, 0 to 1, a token takes the expert. A layer's shares sum to `n_used`.
    pub fn share(&self, layer: usize, expert: usize) -> f32 {
        (self.counts[layer][expert] as f64 / self.tokens.max(1) as f64) as f32
    }

    /// The same for all experts, `(n_layer, n_expert)`.
    pub fn shares(&self) -> Vec<f32> {
        let all = |l| (0..self.n_expert).map(move |e| self.share(l, e));
        (0..self.n_layer).flat_map(all).collect()
    }

    /// The share of choices that find their expert where each layer keeps `slots` experts; a fraction of a slot counts as it
    /// does on average. The experts that are taken most often are there, or those that were taken last, whichever is more.
    pub fn held(&self, slots: f64) -> f64 {
        let popular = |counts: &[u64]| -> f64 {
            let mut counts = counts.to_vec();
            counts.sort_by(|a, b| b.cmp(a));
            let kept = |(i, n): (usize, &u64)| *n as f64 * (slots - i as f64).clamp(0.0, 1.0);
            let found: f64 = counts.iter().enumerate().map(kept).sum();
            found / counts.iter().sum::<u64>().max(1) as f64
        };
        let layers = self.counts.iter().zip(&self.reuse);
        let held = layers.map(|(counts, reuse)| popular(counts).max(self.recent(slots, *reuse)));
        held.sum::<f64>() / self.n_layer.max(1) as f64
    }

    /// The share of choices among the `slots` experts that a layer took last. With as many slots as a token takes it is the
    /// layer's reuse, with slots for all experts 1, and between them each slot brings as much as the next, as it
    /// does where experts are drawn by chance.
    fn recent(&self, slots: f64, reuse: f64) -> f64 {
        let (used, all) = (self.n_used as f64, self.n_expert as f64);
        match slots < used || used == all {
            true => reuse * (slots / used).min(1.0),
            false => reuse + (1.0 - reuse) * ((slots - used) / (all - used)).min(1.0),
        }
    }

    /// The mean of the layers' reuse.
    pub fn mean_reuse(&self) -> f64 {
        mean(self.reuse.iter())
    }

    /// The mean of the layers' recall; nothing where there is one layer.
    pub fn mean_recall(&self) -> Option<f64> {
        (self.n_layer > 1).then(|| mean(self.recall.iter().flatten()))
    }
}

fn mean<'a>(shares: impl Iterator<Item = &'a f64> + Clone) -> f64 {
    shares.clone().sum::<f64>() / shares.count().max(1) as f64
}

/// Enough of an identity to tell two apart.
fn short(model: &str) -> String {
    model.chars().take(12).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two layers of four experts, two for each of ten tokens.
    fn profile() -> Profile {
        Profile {
            format: FORMAT.to_string(),
            version: VERSION,
            model: "ab".repeat(32),
            name: "a.gguf".to_string(),
            n_layer: 2,
            n_expert: 4,
            n_used: 2,
            tokens: 10,
            counts: vec![vec![1, 9, 4, 6], vec![5, 5, 5, 5]],
            reuse: vec![0.5, 0.75],
            recall: vec![None, Some(0.875)],
        }
    }

    #[test]
    fn shares_and_what_is_held() {
        let p = profile();
        assert_eq!(p.share(0, 1), 0.9);
        let sum: f32 = (0..4).map(|e| p.share(0, e)).sum();
        assert!((sum - 2.0).abs() < 1e-6);
        let close = |slots: f64, held: f64| assert!((p.held(slots) - held).abs() < 1e-12);
        close(0.0, 0.0);
        // The most popular one of layer 0 has 9 of 20 choices, the next one 6; of layer 1 they are as good as each other, but
        // three quarters of a token's choices are the last one's.
        close(1.0, (9.0 / 20.0 + 0.375) / 2.0);
        close(2.0, (15.0 / 20.0 + 0.75) / 2.0);
        close(3.0, (19.0 / 20.0 + 0.875) / 2.0);
        close(4.0, 1.0);
        close(9.0, 1.0);
        assert_eq!((p.mean_reuse(), p.mean_recall()), (0.625, Some(0.875)));
    }

    #[test]
    fn read_back_or_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("p.json");
        let good = profile();
        good.write(&path).unwrap();
        assert_eq!(Profile::read(&path).unwrap(), good);

        let refused = |change: &dyn Fn(&mut Value), why: &str| {
            let mut document = good.to_json();
            change(&mut document);
            std::fs::write(&path, document.to_string()).unwrap();
            let error = Profile::read(&path).unwrap_err().to_string();
            assert!(error.contains(why) && !error.contains('\n'), "{error}");
        };
        refused(&|d| d["format"] = "x".into(), "another kind of JSON");
        refused(&|d| *d = 1.into(), "another kind of JSON");
        refused(&|d| d["version"] = 2.into(), "found version 2");
        refused(&|d| d["model"] = 7.into(), "expected the fields");
        refused(&|d| d["n_used"] = 0.into(), "1 to 4 experts");
        refused(&|d| d["n_used"] = 5.into(), "1 to 4 experts");
        refused(&|d| d["n_layer"] = 3.into(), "counts of 3 layers");
        refused(&|d| d["reuse"] = [0.5].into(), "reuse of 2 layers");
        refused(&|d| d["reuse"][0] = 1.5.into(), "shares from 0 to 1");
        refused(&|d| d["counts"][1][0] = 6.into(), "in layer 1");
        refused(&|d| d["counts"][1] = [20].into(), "counts of 4 experts");
        refused(&|d| d["counts"][1] = [20, 0, 0, 0].into(), "up to 10");
        refused(&|d| d["counts"][0][0] = u64::MAX.into(), "in layer 0");
        refused(&|d| d["tokens"] = u64::MAX.into(), "in layer 0");
        std::fs::write(&path, "{").unwrap();
        let error = Profile::read(&path).unwrap_err().to_string();
        assert!(error.contains("expected JSON"), "{error}");
    }
}
