//! Groups of options that several commands share, each defined once.

use super::input::read_text;
use super::load::Loaded;
use super::report::note;
use crate::chat::constraint::{Compiler, Constraint, Form};
use crate::chat::draft::Draft;
use crate::chat::sampler::{SamplerOptions, Setting, settings, unescape};
use crate::chat::session::Session;
use crate::error::Result;
use crate::moe::KvType;
use crate::near::did_you_mean;
use crate::simd::{TIERS, Tier};
use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::{Arg, ArgAction, ArgMatches, Command};
use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Instant;

/// Which model, and how much of its context.
#[derive(clap::Args, Clone, Debug)]
#[command(next_help_heading = "Model")]
pub struct ModelOptions {
    /// A Mixtral, Mistral or Llama GGUF file [default: $OCTET_MODEL, else the demo model]
    #[arg(short, long, value_name = "FILE")]
    pub model: Option<PathBuf>,
    /// Most tokens of the conversation [default: what the model was trained for]
    #[arg(short, long, value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(1..))]
    pub ctx: Option<u32>,
    /// Element type of the KV cache; q8_0 is half as large, a little less exact
    #[arg(long, value_name = "TYPE", value_parser = kv_values(), default_value = "f16")]
    pub kv: KvType,
}

/// What it runs on.
#[derive(clap::Args, Clone, Debug)]
#[command(next_help_heading = "Machine")]
pub struct MachineOptions {
    /// CPU threads [default: one for each large core]
    #[arg(short, long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub threads: Option<u16>,
    /// CPU threads for several tokens at once, as in prompts; also -tb N [default: as --threads]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(0..=1024))]
    pub threads_batch: Option<u16>,
    /// Keep each thread on a core of its own, where there are enough
    #[arg(long)]
    pub pin: bool,
    /// Highest CPU tier to use [default: $OCTET_ISA, else the best there is]
    #[arg(long, value_name = "TIER", value_parser = tier_values())]
    pub isa: Option<Tier>,
    /// Memory to keep within, such as 12G: of a larger model, experts are read from the disk when they are wanted; auto: what is
    /// free, if the model needs more than that; all: leave it to the system
    #[arg(long, value_name = "SIZE", default_value = "auto", value_parser = parse_ram)]
    pub ram: RamLimit,
    /// What octet profile recorded with this model: the experts to keep in memory, or on a GPU, at first
    #[arg(long, value_name = "FILE")]
    pub profile: Option<PathBuf>,
    /// Prompt tokens that go through the layers together; also -ub TOKENS
    #[arg(long, alias = "ubatch-size", value_name = "TOKENS", default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..=65536))]
    pub ubatch: u32,
    /// Tell more on stderr
    #[arg(short, long)]
    pub verbose: bool,
    /// What else computes.
    #[command(flatten)]
    pub gpu: GpuOptions,
}

/// A GPU beside the CPU.
#[derive(clap::Args, Clone, Debug, Default)]
#[command(next_help_heading = "Machine")]
pub struct GpuOptions {
    /// Memory of an NVIDIA GPU for the experts that are chosen most, such as 8G, which it computes while the CPU computes the
    /// others; auto: what is free; 0: none [default: auto, where octet was built with the feature cuda]
    #[arg(long, value_name = "SIZE", value_parser = parse_gpu_mem)]
    pub gpu_mem: Option<GpuMemory>,
    /// Which GPU, counted from 0
    #[arg(long, value_name = "N")]
    pub gpu: Option<u16>,
}

/// How much memory of a GPU to use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GpuMemory {
    /// What is free.
    Auto,
    /// So many bytes; 0: no GPU.
    Bytes(u64),
}

/// Options that llama.cpp gives a short form of two letters, which clap would take for two options.
const TWO_LETTERS: [(&str, &str); 2] = [("-tb", "--threads-batch"), ("-ub", "--ubatch")];

/// A command line with the long form of every `TWO_LETTERS` that stands before a number: what else looks like one is
/// some other option's text.
pub fn long_forms(mut args: Vec<OsString>) -> Vec<OsString> {
    for i in 1..args.len() {
        let [option, value] = &args[i - 1..=i] else {
            continue;
        };
        let number = value
            .as_encoded_bytes()
            .first()
            .is_some_and(u8::is_ascii_digit);
        let long = TWO_LETTERS.iter().find(|(short, _)| option == short);
        if let Some((_, long)) = long.filter(|_| number) {
            args[i - 1] = long.into();
        }
    }
    args
}

/// How much memory a model may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RamLimit {
    /// What is free, if the model needs more than that.
    Auto,
    /// No limit of our own.
    All,
    /// So many bytes.
    Bytes(u64),
}

/// What every command takes that writes answers.
#[derive(clap::Args, Clone, Debug)]
#[command(next_help_heading = "Answer")]
pub struct AnswerOptions {
    /// System text: how the model should behave
    #[arg(short, long, value_name = "TEXT")]
    pub system: Option<String>,
    /// Most tokens of an answer [default: as many as the context holds]
    #[arg(short = 'n', long, value_name = "TOKENS", value_parser = count, allow_negative_numbers = true)]
    pub predict: Option<u32>,
    /// The form of the answers.
    #[command(flatten)]
    pub form: FormOptions,
    /// Which model.
    #[command(flatten)]
    pub model: ModelOptions,
    /// What it runs on.
    #[command(flatten)]
    pub machine: MachineOptions,
    /// How tokens are chosen.
    #[command(flatten)]
    pub sampling: SamplingOptions,
}

/// Where an answer to one prompt ends, and what the prompt is.
#[derive(clap::Args, Clone, Debug)]
#[command(next_help_heading = "Answer")]
pub struct PromptOptions {
    /// End the answer before this text (\n is a line break); may be repeated
    #[arg(long, value_name = "TEXT", value_parser = stop, allow_hyphen_values = true)]
    pub stop: Vec<String>,
    /// Go on where the model would end its answer
    #[arg(long, conflicts_with = "form")]
    pub ignore_eos: bool,
    /// Continue the text itself, without the model's chat format
    #[arg(long, conflicts_with = "system")]
    pub raw: bool,
}

/// How the next token is chosen: an option for each of the sampler's settings.
#[derive(Clone, Debug, Default)]
pub struct SamplingOptions(SamplerOptions);

impl SamplingOptions {
    /// As the sampler wants them, for a vocabulary of `n_vocab` tokens.
    ///
    /// # Errors
    /// See [`SamplerOptions::check`].
    pub fn sampler(&self, n_vocab: usize) -> Result<SamplerOptions> {
        self.0.check(n_vocab)?;
        Ok(self.0.clone())
    }
}

impl clap::Args for SamplingOptions {
    fn augment_args(command: Command) -> Command {
        let defaults = SamplerOptions::default();
        let option = |setting: &'static Setting| {
            // What is wrong with a value is said where it was written.
            let valid = |text: &str| {
                let text = text.to_string();
                let set = setting.set(&mut SamplerOptions::default(), &text);
                set.map(|()| text)
            };
            let arg = Arg::new(setting.name)
                .long(setting.name)
                .aliases(setting.aliases)
                .value_name(setting.value)
                .help(match setting.is_list() {
                    true => setting.help.to_string(),
                    false => format!("{} [default: {}]", setting.help, setting.get(&defaults)),
                })
                .allow_hyphen_values(true)
                .value_parser(valid);
            match setting.is_list() {
                true => arg.action(ArgAction::Append),
                false => arg,
            }
        };
        command
            .next_help_heading("Sampling")
            .args(settings().map(option))
            .mut_arg("logit-bias", |arg| arg.short('l'))
    }

    fn augment_args_for_update(command: Command) -> Command {
        SamplingOptions::augment_args(command)
    }
}

impl clap::FromArgMatches for SamplingOptions {
    fn from_arg_matches(matches: &ArgMatches) -> Result<SamplingOptions, clap::Error> {
        let mut options = SamplingOptions::default();
        options.update_from_arg_matches(matches)?;
        Ok(options)
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        for setting in settings() {
            let Some(values) = matches.get_many::<String>(setting.name) else {
                continue;
            };
            // What is given replaces a list's default.
            let first = setting.is_list().then_some("none");
            for text in first.into_iter().chain(values.map(String::as_str)) {
                setting
                    .set(&mut self.0, text)
                    .map_err(|e| clap::Error::raw(clap::error::ErrorKind::InvalidValue, e))?;
            }
        }
        Ok(())
    }
}

/// How an answer is found, one at a time.
#[derive(clap::Args, Clone, Debug)]
#[command(next_help_heading = "Answer")]
pub struct DraftOptions {
    /// Guess this many tokens ahead from repetitions in the text and check them in one pass: auto (as many as pay), a number
    /// or off; the answer is the same
    #[arg(long, value_name = "N", value_parser = parse_draft, default_value = "auto")]
    pub draft: Draft,
}

/// The form that an answer must have.
#[derive(clap::Args, Clone, Debug)]
#[command(next_help_heading = "Answer")]
pub struct FormOptions {
    /// Answer with JSON that this schema accepts: a file, or the schema itself
    #[arg(
        long,
        alias = "json-schema-file",
        value_name = "SCHEMA",
        group = "form"
    )]
    pub json_schema: Option<String>,
    /// Answer with a text of this grammar: a file in Lark's notation, or llama.cpp's GBNF
    #[arg(long, alias = "grammar-file", value_name = "FILE", group = "form")]
    pub grammar: Option<PathBuf>,
    /// Answer with a text that this regular expression matches as a whole
    #[arg(long, value_name = "REGEX", group = "form", allow_hyphen_values = true)]
    pub regex: Option<String>,
}

impl DraftOptions {
    /// An empty session of a model.
    pub fn session<'m>(&self, loaded: &'m Loaded, answer: &AnswerOptions) -> Session<'m> {
        let ubatch = answer.machine.ubatch as usize;
        let mut session = Session::new(&loaded.model, answer.model.kv, loaded.ctx, ubatch);
        session.set_draft(self.draft);
        session
    }
}

impl FormOptions {
    /// The form that was asked for, where it was, and its text.
    ///
    /// # Errors
    /// If a file cannot be read.
    pub fn read(&self) -> Result<Option<(Form, PathBuf, String)>> {
        Ok(Some(
            match (&self.json_schema, &self.grammar, &self.regex) {
                (Some(schema), _, _) if schema.trim_start().starts_with('{') => {
                    (Form::JsonSchema, "--json-schema".into(), schema.clone())
                }
                (Some(file), _, _) => {
                    let file = PathBuf::from(file);
                    let text = read_text(Some(&file))?;
                    (Form::JsonSchema, file, text)
                }
                (_, Some(file), _) => (Form::Grammar, file.clone(), read_text(Some(file))?),
                (_, _, Some(regex)) => (Form::Regex, "--regex".into(), regex.clone()),
                (None, None, None) => return Ok(None),
            },
        ))
    }

    /// What holds the answers of a model to the form; nothing if none was asked for. `continuing`: see
    /// [`Compiler::compile`].
    ///
    /// # Errors
    /// If a file cannot be read; see [`Compiler::compile`].
    pub fn constraint(
        &self,
        loaded: &Loaded,
        continuing: bool,
        verbose: bool,
    ) -> Result<Option<Constraint>> {
        let Some((form, source, text)) = self.read()? else {
            return Ok(None);
        };
        let started = Instant::now();
        let stop = loaded.tokenizer.stop_ids();
        let compiler = Compiler::new(&loaded.tokenizer, &stop)?;
        let constraint = compiler.compile(form, source, &text, continuing)?;
        if verbose {
            let ms = started.elapsed().as_secs_f64() * 1e3;
            note(format!("the form of the answer was compiled in {ms:.0} ms"));
        }
        Ok(Some(constraint))
    }
}

/// A number of tokens; -1 is "all there are" in llama.cpp, and here.
///
/// # Errors
/// If the text is neither.
pub fn count(text: &str) -> std::result::Result<u32, String> {
    match text {
        "-1" => Ok(u32::MAX),
        _ => text
            .parse()
            .map_err(|_| "expected a number of tokens, or -1 for all".to_string()),
    }
}

/// A text that ends an answer.
fn stop(text: &str) -> std::result::Result<String, String> {
    match unescape(text) {
        Some(text) if !text.is_empty() => Ok(text),
        Some(_) => Err("expected a text, found none".into()),
        None => Err("expected only \\n, \\r, \\t, \\\" and \\\\ with a backslash".into()),
    }
}

/// `4G`, `500M`: powers of 1000, as llama.cpp has them.
///
/// # Errors
/// If the text is no such size, or 0.
pub fn parse_size(text: &str) -> std::result::Result<u64, String> {
    let bad = || "expected a size such as 4G or 500M".to_string();
    let (digits, unit) = match text.char_indices().last().ok_or_else(bad)? {
        (at, 'K' | 'k') => (&text[..at], 1_000),
        (at, 'M' | 'm') => (&text[..at], 1_000_000),
        (at, 'G' | 'g') => (&text[..at], 1_000_000_000),
        _ => (text, 1),
    };
    let plain = |c: char| c.is_ascii_digit() || c == '.';
    let n: f64 = digits.parse().map_err(|_| bad())?;
    let bytes = n * unit as f64;
    let valid = digits.chars().all(plain) && (1.0..9e18).contains(&bytes);
    valid.then_some(bytes as u64).ok_or_else(bad)
}

/// A limit of memory.
///
/// # Errors
/// If the text is none.
pub fn parse_ram(text: &str) -> std::result::Result<RamLimit, String> {
    match text {
        "auto" => Ok(RamLimit::Auto),
        "all" => Ok(RamLimit::All),
        _ => parse_size(text)
            .map(RamLimit::Bytes)
            .map_err(|e| format!("{e}, auto or all")),
    }
}

/// Memory of a GPU.
///
/// # Errors
/// If the text is no size.
fn parse_gpu_mem(text: &str) -> std::result::Result<GpuMemory, String> {
    match text {
        "auto" => Ok(GpuMemory::Auto),
        "0" => Ok(GpuMemory::Bytes(0)),
        _ => parse_size(text)
            .map(GpuMemory::Bytes)
            .map_err(|e| format!("{e}, auto or 0")),
    }
}

fn parse_draft(text: &str) -> std::result::Result<Draft, String> {
    match text {
        "auto" => Ok(Draft::Auto),
        "off" | "0" => Ok(Draft::Off),
        _ => match text.parse() {
            Ok(n) if n <= 64 => Ok(Draft::Fixed(n)),
            _ => Err("expected auto, off or a number up to 64".to_string()),
        },
    }
}

/// The names of a cache's element types, for options.
pub fn kv_values() -> impl TypedValueParser<Value = KvType> {
    PossibleValuesParser::new(KvType::ALL.map(KvType::name)).try_map(|name| parse_kv(&name))
}

/// The names of the CPU tiers, for options.
pub fn tier_values() -> impl TypedValueParser<Value = Tier> {
    PossibleValuesParser::new(TIERS.iter().map(|row| row.name)).try_map(|name| parse_tier(&name))
}

/// A cache's element type.
///
/// # Errors
/// If no type has this name.
fn parse_kv(text: &str) -> std::result::Result<KvType, String> {
    let mut named = KvType::ALL.into_iter().filter(|kv| kv.name() == text);
    named.next().ok_or_else(|| {
        let names = KvType::ALL.map(KvType::name).join(", ");
        format!("expected one of {names}")
    })
}

/// A tier's name.
///
/// # Errors
/// If no tier has this name.
pub fn parse_tier(text: &str) -> std::result::Result<Tier, String> {
    let names: Vec<_> = TIERS.iter().map(|row| row.name).collect();
    TIERS
        .iter()
        .find(|row| row.name == text)
        .map(|row| row.tier)
        .ok_or_else(|| {
            let meant = did_you_mean(text, names.iter().copied());
            let meant = meant.map_or(String::new(), |meant| format!("; {meant}"));
            format!("expected one of {}{meant}", names.join(", "))
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_letters_before_a_number() {
        let long = |args: &[&str]| long_forms(args.iter().map(OsString::from).collect());
        assert_eq!(
            long(&["octet", "-tb", "4", "-ub", "8,16", "-p", "-tb", "-n", "-ub"]),
            [
                "octet",
                "--threads-batch",
                "4",
                "--ubatch",
                "8,16",
                "-p",
                "-tb",
                "-n",
                "-ub"
            ]
        );
        assert!(long(&[]).is_empty());
    }
}
