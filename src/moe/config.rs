//! From a file's metadata to the shape of the model.

use super::kv::{KvType, QUANT};
use crate::error::{Error, Result};
use crate::gguf::Gguf;
use std::fmt::Display;

/// An architecture that the forward pass runs, as GGUF names it.
pub struct Arch {
    /// `general.architecture`, and the prefix of its metadata keys.
    pub name: &'static str,
    /// What it is called by people.
    pub title: &'static str,
    /// RoPE base when the file does not say.
    pub rope_base: f32,
}

/// One row per architecture. Mixtral has no name of its own: it is `llama` with experts.
pub const ARCHS: &[Arch] = &[Arch {
    name: "llama",
    title: "Mixtral, Mistral and Llama",
    rope_base: 10_000.0,
}];

/// The architecture that a file names.
fn arch_of(file: &Gguf) -> Result<&'static Arch> {
    let name = file
        .get_str("general.architecture")?
        .ok_or_else(|| Error::missing(file.path(), "metadata key general.architecture", ""))?;
    ARCHS.iter().find(|a| a.name == name).ok_or_else(|| {
        let known: Vec<_> = ARCHS
            .iter()
            .map(|a| format!("{} ({})", a.name, a.title))
            .collect();
        Error::unsupported(
            file.path(),
            "this architecture",
            known.join(", "),
            format!("{name:?}"),
        )
    })
}

/// The metadata keys of a file that begin with its architecture.
struct Keys<'a> {
    file: &'a Gguf,
    arch: &'static Arch,
}

impl Keys<'_> {
    fn name(&self, suffix: &str) -> String {
        format!("{}.{suffix}", self.arch.name)
    }

    fn wrong(&self, suffix: &str, expected: impl Display, found: impl Display) -> Error {
        let what = format!("metadata key {}", self.name(suffix));
        Error::invalid(self.file.path(), what, expected, found)
    }

    fn optional(&self, suffix: &str) -> Result<Option<usize>> {
        Ok(self.file.get_u32(&self.name(suffix))?.map(|n| n as usize))
    }

    /// A number of 1 or more.
    fn number(&self, suffix: &str) -> Result<usize> {
        match self.optional(suffix)? {
            Some(0) => Err(self.wrong(suffix, "at least 1", 0)),
            Some(n) => Ok(n),
            None => {
                let what = format!("metadata key {}", self.name(suffix));
                Err(Error::missing(self.file.path(), what, ""))
            }
        }
    }

    fn positive(&self, suffix: &str, default: f32) -> Result<f32> {
        let x = self.file.get_f32(&self.name(suffix))?.unwrap_or(default);
        match x.is_finite() && x > 0.0 {
            true => Ok(x),
            false => Err(self.wrong(suffix, "a positive number", x)),
        }
    }
}

/// The shape of a model.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// Transformer layers.
    pub n_layer: usize,
    /// Width of the residual stream.
    pub d_model: usize,
    /// Query heads.
    pub n_head: usize,
    /// Key/value heads; each serves `n_head / n_kv` query heads (GQA).
    pub n_kv: usize,
    /// Width of a head.
    pub d_head: usize,
    /// Width of the feed-forward part (of one expert).
    pub d_ff: usize,
    /// Experts in a layer; 1 in a dense model.
    pub n_expert: usize,
    /// Experts that a token takes.
    pub n_used: usize,
    /// Whether a router chooses the experts; false in a dense model.
    pub routed: bool,
    /// Tokens in the vocabulary.
    pub n_vocab: usize,
    /// Positions that the model was trained for.
    pub n_ctx: usize,
    /// Added to the mean square in RMSNorm.
    pub rms_eps: f32,
    /// RoPE's theta.
    pub rope_base: f32,
    /// Dimensions of a head that RoPE rotates.
    pub n_rot: usize,
}

impl Config {
    /// Mixtral 8x7B's (Jiang et al., "Mixtral of Experts", 2024, table 1; the rest is of its own `config.json`).
    pub const MIXTRAL_8X7B: Config = Config {
        n_layer: 32,
        d_model: 4096,
        n_head: 32,
        n_kv: 8,
        d_head: 128,
        d_ff: 14336,
        n_expert: 8,
        n_used: 2,
        routed: true,
        n_vocab: 32000,
        n_ctx: 32768,
        rms_eps: 1e-5,
        rope_base: 1e6,
        n_rot: 128,
    };

    /// Reads and checks the metadata.
    ///
    /// # Errors
    /// If the architecture is not supported, a key is missing or has the wrong type, or numbers
    /// contradict each other.
    pub fn read(file: &Gguf) -> Result<Config> {
        let keys = Keys {
            file,
            arch: arch_of(file)?,
        };
        let d_model = keys.number("embedding_length")?;
        let n_head = keys.number("attention.head_count")?;
        let n_kv = keys.optional("attention.head_count_kv")?.unwrap_or(n_head);
        let d_head = match keys.optional("attention.key_length")? {
            Some(d) => d,
            None if d_model.is_multiple_of(n_head) => d_model / n_head,
            None => {
                let expected = format!("a divisor of the embedding length {d_model}");
                return Err(keys.wrong("attention.head_count", expected, n_head));
            }
        };
        let n_expert = keys.optional("expert_count")?.unwrap_or(0);
        let embedding = file
            .tensor("token_embd.weight")
            .ok_or_else(|| Error::missing(file.path(), "tensor token_embd.weight", ""))?;
        let config = Config {
            n_layer: keys.number("block_count")?,
            d_model,
            n_head,
            n_kv,
            d_head,
            d_ff: keys.number("feed_forward_length")?,
            n_expert: n_expert.max(1),
            n_used: if n_expert > 0 {
                keys.number("expert_used_count")?
            } else {
                1
            },
            routed: n_expert > 0,
            // A trailing dimension of 1 may be left out.
            n_vocab: embedding.shape.get(1).copied().unwrap_or(1) as usize,
            n_ctx: keys.number("context_length")?,
            rms_eps: keys.positive("attention.layer_norm_rms_epsilon", 1e-5)?,
            rope_base: keys.positive("rope.freq_base", keys.arch.rope_base)?,
            n_rot: keys.optional("rope.dimension_count")?.unwrap_or(d_head),
        };
        config.check(&keys)?;
        Ok(config)
    }

    /// Refuses numbers that contradict each other, and settings that would silently change the answer.
    fn check(&self, keys: &Keys<'_>) -> Result<()> {
        let file = keys.file;
        let bad =
            |what: &str, expected: String, found: usize| Err(keys.wrong(what, expected, found));
        if self.n_kv == 0 || !self.n_head.is_multiple_of(self.n_kv) {
            return bad(
                "attention.head_count_kv",
                format!("a divisor of {} heads", self.n_head),
                self.n_kv,
            );
        }
        if self.d_head == 0 {
            return bad("attention.key_length", "at least 1".into(), 0);
        }
        if self.n_rot == 0 || self.n_rot > self.d_head || !self.n_rot.is_multiple_of(2) {
            return bad(
                "rope.dimension_count",
                format!("an even number from 2 to {}", self.d_head),
                self.n_rot,
            );
        }
        if self.n_used > self.n_expert {
            return bad(
                "expert_used_count",
                format!("at most {} experts", self.n_expert),
                self.n_used,
            );
        }
        let values = keys.optional("attention.value_length")?;
        if let Some(d) = values.filter(|d| *d != self.d_head) {
            let expected = format!("{} as for keys", self.d_head);
            return bad("attention.value_length", expected, d);
        }
        let scaling = file
            .get_str(&keys.name("rope.scaling.type"))?
            .unwrap_or("none");
        if scaling != "none" {
            return Err(Error::unsupported(
                file.path(),
                "this RoPE scaling",
                "none",
                format!("{scaling:?}"),
            ));
        }
        // The reference scales linearly by these where the type is not given; "none" turns them off.
        let untyped = file.get(&keys.name("rope.scaling.type")).is_none();
        for suffix in ["rope.scaling.factor", "rope.scale_linear"] {
            let factor = file.get_f32(&keys.name(suffix))?;
            // It takes 0 as "not set", too.
            if let Some(factor) = factor.filter(|f| untyped && *f != 0.0 && *f != 1.0) {
                return Err(Error::unsupported(
                    file.path(),
                    format!("metadata key {}", keys.name(suffix)),
                    "no RoPE scaling, a factor of 1",
                    factor,
                ));
            }
        }
        Ok(())
    }

    /// Products of weights and activations that a token takes, without the output head.
    pub fn macs(&self) -> u64 {
        let (d, heads, kv) = (
            self.d_model,
            self.n_head * self.d_head,
            self.n_kv * self.d_head,
        );
        let attention = d * (2 * heads + 2 * kv);
        let router = if self.routed { d * self.n_expert } else { 0 };
        let experts = self.n_used * 3 * d * self.d_ff;
        (self.n_layer * (attention + router + experts)) as u64
    }

    /// Whether a cache of this type can hold the model's heads.
    ///
    /// # Errors
    /// [`Error::Usage`] if not.
    pub fn check_kv(&self, kind: KvType) -> Result<()> {
        if kind == KvType::Q8 && !self.d_head.is_multiple_of(QUANT) {
            return Err(Error::Usage(format!(
                "--kv q8_0: this model's heads have {} elements (expected a multiple of {QUANT}); --kv f16 will do",
                self.d_head
            )));
        }
        Ok(())
    }

    /// Things that are probably mistakes of whoever made the file, one sentence each.
    pub fn warnings(&self) -> Vec<String> {
        let mut warnings = Vec::new();
        if self.routed && self.rope_base == 10_000.0 {
            warnings.push(
                "rope.freq_base is 10000, but Mixtral was trained with 1000000: answers will be poor".to_string(),
            );
        }
        let is_8x22b = self.routed && self.d_model == 6144 && self.n_layer == 56;
        if is_8x22b && self.n_ctx == 32768 {
            warnings.push(
                "context_length is 32768, but Mixtral 8x22B was trained with 65536".to_string(),
            );
        }
        warnings
    }
}
