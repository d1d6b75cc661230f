//! Logits to the next token.
//!
//! The chain, its names, meanings, defaults and order are llama.cpp's, because users bring their settings from there. Each
//! sampler is a small function over the [`Candidates`] and one row of [`STEPS`], with its settings: a new
//! sampler is one more row, and the command line, its help and `/set` know it.
//!
//! The same logits, history, options and seed give the same token on every machine: the random numbers are our own and
//! the sums run in one order.

mod candidates;
mod dry;
mod settings;

pub use candidates::{Candidate, Candidates, logprob, logprobs};
pub use dry::Breakers;
use settings::setting;
pub use settings::{Order, Setting, unescape};

use super::constraint::Constraint;
use super::tokenizer::Tokenizer;
use crate::error::{Error, Result};
use crate::near::did_you_mean;
use std::fmt;
use std::time::{SystemTime, UNIX_EPOCH};

/// How to choose. The defaults are llama.cpp's; what each means stands beside its [`Setting`].
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)]
pub struct SamplerOptions {
    pub samplers: Order,
    pub seed: Option<u64>,
    pub logit_bias: Vec<(u32, f32)>,
    pub repeat_penalty: f32,
    pub repeat_last_n: usize,
    pub presence_penalty: f32,
    pub frequency_penalty: f32,
    pub dry_multiplier: f32,
    pub dry_base: f32,
    pub dry_allowed_length: usize,
    pub dry_penalty_last_n: usize,
    pub dry_sequence_breaker: Vec<String>,
    pub top_n_sigma: f32,
    pub top_k: usize,
    pub typical: f32,
    pub top_p: f32,
    pub min_p: f32,
    pub xtc_probability: f32,
    pub xtc_threshold: f32,
    pub temp: f32,
    pub dynatemp_range: f32,
    pub dynatemp_exp: f32,
    pub mirostat: bool,
    pub mirostat_lr: f32,
    pub mirostat_ent: f32,
}

impl Default for SamplerOptions {
    fn default() -> SamplerOptions {
        SamplerOptions {
            samplers: Order(STEPS.iter().collect()),
            seed: None,
            logit_bias: Vec::new(),
            repeat_penalty: 1.0,
            repeat_last_n: 64,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            dry_multiplier: 0.0,
            dry_base: 1.75,
            dry_allowed_length: 2,
            dry_penalty_last_n: 64,
            dry_sequence_breaker: ["\n", ":", "\"", "*"].map(String::from).into(),
            top_n_sigma: -1.0,
            top_k: 40,
            typical: 1.0,
            top_p: 0.95,
            min_p: 0.05,
            xtc_probability: 0.0,
            xtc_threshold: 0.1,
            temp: 0.8,
            dynatemp_range: 0.0,
            dynatemp_exp: 1.0,
            mirostat: false,
            mirostat_lr: 0.1,
            mirostat_ent: 5.0,
        }
    }
}

/// One sampler of the chain.
pub struct Step {
    /// llama.cpp's name.
    pub name: &'static str,
    /// Other names, with `_`.
    pub aliases: &'static [&'static str],
    /// What a user may set.
    pub settings: &'static [Setting],
    apply: fn(&mut Candidates, &mut Context<'_>),
}

/// What a sampler may look at beside the candidates.
struct Context<'a> {
    options: &'a SamplerOptions,
    /// The tokens so far, oldest first.
    history: &'a [u32],
    breakers: &'a Breakers,
    rng: &'a mut Rng,
}

impl Context<'_> {
    /// The last `n` tokens.
    fn recent(&self, n: usize) -> &[u32] {
        &self.history[self.history.len().saturating_sub(n)..]
    }
}

/// Settings that belong to no single sampler.
static GENERAL: &[Setting] = &[
    setting(
        "samplers",
        "NAMES",
        "The samplers to use, in order, separated by ;",
        |o| &mut o.samplers,
    ),
    setting(
        "seed",
        "N",
        "Seed of the random numbers; the same seed gives the same text; -1 \
         takes one from the clock",
        |o| &mut o.seed,
    ),
    setting(
        "logit-bias",
        "ID±B",
        "Change a token's logit: ID+BIAS or ID-BIAS; may be repeated",
        |o| &mut o.logit_bias,
    ),
    setting(
        "mirostat",
        "V",
        "Aim at a constant surprise instead of --samplers (of which only \
         the temperature stays): 0 off, 2 on",
        |o| &mut o.mirostat,
    ),
    setting(
        "mirostat-lr",
        "X",
        "How quickly mirostat corrects itself",
        |o| &mut o.mirostat_lr,
    )
    .or(&["mirostat-eta"]),
    setting(
        "mirostat-ent",
        "BITS",
        "The surprise that mirostat aims at",
        |o| &mut o.mirostat_ent,
    )
    .or(&["mirostat-tau"]),
];

/// The samplers, in llama.cpp's order.
pub static STEPS: &[Step] = &[
    Step {
        name: "penalties",
        aliases: &[],
        settings: &[
            setting(
                "repeat-penalty",
                "X",
                "Divide the logits of recent tokens by this",
                |o| &mut o.repeat_penalty,
            ),
            setting(
                "repeat-last-n",
                "N",
                "Recent tokens that the penalties look at; -1: all",
                |o| &mut o.repeat_last_n,
            ),
            setting(
                "presence-penalty",
                "X",
                "Subtract this from the logit of every recent token",
                |o| &mut o.presence_penalty,
            ),
            setting(
                "frequency-penalty",
                "X",
                "Subtract this from a recent token's logit once per occurrence",
                |o| &mut o.frequency_penalty,
            ),
        ],
        apply: |list, c| {
            let o = c.options;
            list.penalties(
                c.recent(o.repeat_last_n),
                o.repeat_penalty,
                o.presence_penalty,
                o.frequency_penalty,
            )
        },
    },
    Step {
        name: "dry",
        aliases: &[],
        settings: &[
            setting(
                "dry-multiplier",
                "X",
                "Subtract X·BASE^(n-LENGTH) from the logit of a token that would \
                 go on repeating n tokens (DRY); 0 is off",
                |o| &mut o.dry_multiplier,
            ),
            setting("dry-base", "BASE", "How steeply DRY's penalty grows", |o| {
                &mut o.dry_base
            }),
            setting(
                "dry-allowed-length",
                "LENGTH",
                "Shorter repetitions are free",
                |o| &mut o.dry_allowed_length,
            ),
            setting(
                "dry-penalty-last-n",
                "N",
                "Recent tokens that DRY looks at; -1: all",
                |o| &mut o.dry_penalty_last_n,
            ),
            setting(
                "dry-sequence-breaker",
                "TEXT",
                "A text that ends a repetition; may be repeated, replaces \"\\n\" \
                 \":\" \"\\\"\" \"*\"; none: nothing does",
                |o| &mut o.dry_sequence_breaker,
            ),
        ],
        apply: |list, c| {
            let o = c.options;
            if o.dry_multiplier != 0.0 && o.dry_base >= 1.0 {
                let recent = c.recent(o.dry_penalty_last_n);
                let repeats = c.breakers.repeats(recent, o.dry_allowed_length);
                list.dry(&repeats, o.dry_multiplier, o.dry_base, o.dry_allowed_length);
            }
        },
    },
    Step {
        name: "top_n_sigma",
        aliases: &["top_nsigma"],
        settings: &[setting(
            "top-n-sigma",
            "N",
            "Keep tokens whose logit is within N standard deviations of the \
             best; -1 is off",
            |o| &mut o.top_n_sigma,
        )
        .or(&["top-nsigma"])],
        apply: |list, c| list.top_n_sigma(c.options.top_n_sigma),
    },
    Step {
        name: "top_k",
        aliases: &[],
        settings: &[setting(
            "top-k",
            "N",
            "Keep this many of the likeliest tokens; 0 keeps all",
            |o| &mut o.top_k,
        )],
        apply: |list, c| list.top_k(c.options.top_k),
    },
    Step {
        name: "typ_p",
        aliases: &["typical", "typical_p", "typ"],
        settings: &[setting(
            "typical",
            "P",
            "Keep the tokens that surprise about as much as expected until \
             their probabilities sum to this; 1 is off",
            |o| &mut o.typical,
        )
        .or(&["typical-p"])],
        apply: |list, c| list.typical(c.options.typical),
    },
    Step {
        name: "top_p",
        aliases: &["nucleus"],
        settings: &[setting(
            "top-p",
            "P",
            "Keep the likeliest tokens until their probabilities sum to this; 1 is off",
            |o| &mut o.top_p,
        )],
        apply: |list, c| list.top_p(c.options.top_p),
    },
    Step {
        name: "min_p",
        aliases: &[],
        settings: &[setting(
            "min-p",
            "P",
            "Keep tokens at least this likely relative to the likeliest; 0 is off",
            |o| &mut o.min_p,
        )],
        apply: |list, c| list.min_p(c.options.min_p),
    },
    Step {
        name: "xtc",
        aliases: &[],
        settings: &[
            setting(
                "xtc-probability",
                "P",
                "How often to exclude the top choices: all tokens above the \
                 threshold but the last (XTC); 0 is off",
                |o| &mut o.xtc_probability,
            ),
            setting(
                "xtc-threshold",
                "P",
                "The probability that makes a top choice; above 0.5 XTC is off",
                |o| &mut o.xtc_threshold,
            ),
        ],
        apply: |list, c| {
            let o = c.options;
            let on = o.xtc_probability > 0.0 && o.xtc_threshold <= 0.5 && list.list().len() > 1;
            if on && c.rng.unit() <= f64::from(o.xtc_probability) {
                list.xtc(o.xtc_threshold);
            }
        },
    },
    Step {
        name: "temperature",
        aliases: &["temp"],
        settings: &[
            setting(
                "temp",
                "T",
                "Temperature; 0 always takes the likeliest token",
                |o| &mut o.temp,
            )
            .or(&["temperature"]),
            setting(
                "dynatemp-range",
                "R",
                "Vary the temperature between T-R and T+R: the surer the model, \
                 the lower; 0 is off",
                |o| &mut o.dynatemp_range,
            ),
            setting(
                "dynatemp-exp",
                "X",
                "How the temperature follows the uncertainty: its power",
                |o| &mut o.dynatemp_exp,
            ),
        ],
        apply: |list, c| {
            let o = c.options;
            list.dynamic_temperature(o.temp, o.dynatemp_range, o.dynatemp_exp)
        },
    },
];

impl fmt::Debug for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}

impl PartialEq for Step {
    fn eq(&self, other: &Step) -> bool {
        self.name == other.name
    }
}

/// Everything that may be set, in the order of the help.
pub fn settings() -> impl Iterator<Item = &'static Setting> {
    let steps = STEPS.iter().flat_map(|step| step.settings);
    GENERAL.iter().chain(steps)
}

/// [`Error::Usage`]: nothing is called `name`.
pub(crate) fn no_such_setting(name: &str) -> Error {
    let meant = did_you_mean(
        name.trim_start_matches('-'),
        settings().map(|setting| setting.name),
    );
    Error::Usage(format!("{name}: no such setting")).hint(meant)
}

impl SamplerOptions {
    /// Sets what is called `name` (such as `top-k`, `--top-k` or `top_k`) to what `text` says.
    ///
    /// # Errors
    /// [`Error::Usage`]: nothing is called so, or the text is no such value. The options are unchanged then.
    pub fn set(&mut self, name: &str, text: &str) -> Result<()> {
        let setting = settings()
            .find(|setting| setting.is_called(name))
            .ok_or_else(|| no_such_setting(name))?;
        setting
            .set(self, text)
            .map_err(|e| Error::Usage(format!("{} {text}: {e}", setting.name)))
    }

    /// Whether a vocabulary of `n_vocab` tokens has the tokens that are named.
    ///
    /// # Errors
    /// [`Error::Usage`] for the bias of a token that it does not have.
    pub fn check(&self, n_vocab: usize) -> Result<()> {
        let mut ids = self.logit_bias.iter().map(|(id, _)| id);
        match ids.find(|id| **id as usize >= n_vocab) {
            None => Ok(()),
            Some(id) => Err(Error::Usage(format!(
                "--logit-bias {id}: no such token (expected ids below {n_vocab}, found {id})"
            ))),
        }
    }
}

/// The seed that the options give, or one from the clock.
fn seed_of(options: &SamplerOptions) -> u64 {
    let clock = || {
        SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |d| d.as_nanos() as u64)
    };
    options.seed.unwrap_or_else(clock)
}

/// Chooses tokens by its options; holds the random numbers and the scratch memory.
#[derive(Clone, Debug)]
pub struct Sampler {
    options: SamplerOptions,
    breakers: Breakers,
    rng: Rng,
    seed: u64,
    /// Mirostat's state: the surprise that it lets pass, in bits.
    mu: f64,
    /// The form that answers must have.
    constraint: Option<Constraint>,
    candidates: Candidates,
}

impl Sampler {
    /// A sampler; without a seed in the options it takes one from the clock ([`Sampler::seed`] tells which).
    /// It knows no texts, so that nothing breaks a repetition for DRY: see [`Sampler::for_text`].
    pub fn new(options: SamplerOptions) -> Sampler {
        let seed = seed_of(&options);
        Sampler {
            breakers: Breakers::default(),
            rng: Rng::new(seed),
            seed,
            mu: f64::from(2.0 * options.mirostat_ent),
            constraint: None,
            candidates: Candidates::default(),
            options,
        }
    }

    /// Gives every answer from the next on a form that it must have, or none.
    pub fn constrain(&mut self, constraint: Option<Constraint>) {
        self.constraint = constraint;
    }

    /// Takes other options. The random numbers go on unless the seed is another.
    pub fn configure(&mut self, options: SamplerOptions, tokenizer: &Tokenizer) {
        let keeps = options.seed == self.options.seed;
        let mut sampler = Sampler::for_text(options, tokenizer);
        if keeps {
            (sampler.rng, sampler.seed) = (self.rng.clone(), self.seed);
        }
        sampler.constraint = self.constraint.take();
        *self = sampler;
    }

    /// Begins the random numbers again, from the seed of the options.
    pub fn reseed(&mut self) {
        self.seed = seed_of(&self.options);
        self.rng = Rng::new(self.seed);
    }

    /// A sampler for the tokens of a vocabulary.
    pub fn for_text(options: SamplerOptions, tokenizer: &Tokenizer) -> Sampler {
        let breakers = match options.dry_multiplier != 0.0 {
            true => Breakers::new(&options.dry_sequence_breaker, tokenizer),
            false => Breakers::default(),
        };
        Sampler {
            breakers,
            ..Sampler::new(options)
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

    /// Begins another answer: what was learned about the last one is forgotten, the random numbers go on.
    pub fn begin(&mut self) {
        self.mu = f64::from(2.0 * self.options.mirostat_ent);
        if let Some(constraint) = &mut self.constraint {
            constraint.begin();
        }
    }

    /// Where the answer stands in the form that it must have, if there is one.
    pub fn constraint(&mut self) -> Option<&mut Constraint> {
        self.constraint.as_mut()
    }

    /// The next token. `logits`: one per token of the vocabulary; `history`: the tokens so far, oldest first (the
    /// penalties look at its end). NaN is taken as minus infinity. Without any logits the answer is 0.
    ///
    /// # Errors
    /// If the answer must have a form that cannot be followed (see [`Constraint::mask`]).
    pub fn sample(&mut self, logits: &[f32], history: &[u32]) -> Result<u32> {
        let (options, candidates) = (&self.options, &mut self.candidates);
        match &mut self.constraint {
            None => candidates.fill(logits, |_| true),
            Some(constraint) => {
                let mask = constraint.mask()?;
                candidates.fill(logits, |id| {
                    (id as usize) < mask.len() && mask.is_allowed(id)
                });
            }
        }
        candidates.bias(&options.logit_bias);
        if options.mirostat {
            candidates.temperature(options.temp);
            candidates.mirostat(self.mu);
        } else {
            let mut context = Context {
                options,
                history,
                breakers: &self.breakers,
                rng: &mut self.rng,
            };
            for step in &options.samplers.0 {
                (step.apply)(candidates, &mut context);
            }
        }
        // What is certain needs no luck.
        let luck = match candidates.list().len() {
            0 | 1 => 0.0,
            _ => self.rng.unit(),
        };
        let Some((id, probability)) = candidates.draw(luck) else {
            return Ok(0);
        };
        if options.mirostat {
            let error = -libm::log2(probability) - f64::from(options.mirostat_ent);
            self.mu -= f64::from(options.mirostat_lr) * error;
        }
        if let Some(constraint) = &mut self.constraint {
            constraint.accept(id)?;
        }
        Ok(id)
    }
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
mod tests;
