//! From options to a model that is ready to talk.

use super::gpu;
use super::options::{MachineOptions, ModelOptions, RamLimit, parse_tier};
use super::report::note;
use crate::chat::template::Template;
use crate::chat::tokenizer::Tokenizer;
use crate::error::{Error, Result};
use crate::gguf::Gguf;
use crate::memory;
use crate::moe::{Config, Kv, KvType, Machine, Model, Profile, Ram};
use crate::pool::{Threads, apart};
use crate::readable::bytes;
use crate::simd::Tier;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

/// The demo model's file name, in the repository's `models/`.
const DEMO: &str = "demo-Q4_K_M.gguf";

/// A model with its vocabulary and prompt format.
pub struct Loaded {
    /// The file, for messages.
    pub path: PathBuf,
    /// What the file says.
    pub file: Gguf,
    /// Whether it is the demo model because nobody named another.
    pub demo: bool,
    /// The model.
    pub model: Model,
    /// Its vocabulary.
    pub tokenizer: Arc<Tokenizer>,
    /// Its prompt format.
    pub template: Template,
    /// Most tokens of a sequence.
    pub ctx: usize,
}

/// What an environment variable says; nothing, if it is empty.
///
/// Not by clap: it would read the variables of `octet chat` for every command, and refuse empty ones.
fn variable(name: &str) -> Option<OsString> {
    std::env::var_os(name).filter(|value| !value.is_empty())
}

/// The model file to use: the one that was named, here or in `OCTET_MODEL`, or the demo model.
///
/// # Errors
/// If none was named and the demo model is not there.
pub fn model_path(options: &ModelOptions) -> Result<(PathBuf, bool)> {
    let variable = || variable("OCTET_MODEL").map(PathBuf::from);
    match options.model.clone().or_else(variable) {
        Some(path) => Ok((path, false)),
        None => Ok((demo_model()?, true)),
    }
}

/// Looks for the demo model where a checkout has it: below the current folder, above the program
/// (`target/release/octet`), where the program was built.
fn demo_model() -> Result<PathBuf> {
    let exe = std::env::current_exe().ok();
    let above = exe
        .iter()
        .flat_map(|p| p.ancestors().skip(1).take(4).map(Path::to_path_buf));
    [PathBuf::from(".")]
        .into_iter()
        .chain(above)
        .chain([PathBuf::from(env!("CARGO_MANIFEST_DIR"))])
        .map(|dir| dir.join("models").join(DEMO))
        .find(|p| p.is_file())
        .ok_or_else(|| {
            Error::missing(
                Path::new("models").join(DEMO),
                "the demo model",
                "name a GGUF file with --model",
            )
        })
}

/// Opens a model, refusing what is not a GGUF with a hint of what it is.
///
/// # Errors
/// See [`Gguf::open`], [`Model::open`], [`Tokenizer::from_gguf`], [`Template::choose`]; [`Error::Usage`] if the
/// context that is asked for is larger than the model's.
pub fn load(model: &ModelOptions, machine: &MachineOptions) -> Result<Loaded> {
    load_for(1, model, machine)
}

/// The same, for so many conversations at a time.
///
/// # Errors
/// See [`load`].
pub fn load_for(n: usize, model: &ModelOptions, machine: &MachineOptions) -> Result<Loaded> {
    let started = Instant::now();
    let (path, demo) = model_path(model)?;
    let file = Gguf::open(&path)?;
    let shares = match &machine.profile {
        Some(path) => Some(Profile::read_of(path, &file)?.shares()),
        None => None,
    };
    let ram = ram(&file, machine.ram, shares.clone(), model.kv, model.ctx)?;
    if matches!(ram, Ram::Mapped) && memory_to_use().is_some_and(|bytes| file.file_bytes() <= bytes)
    {
        fetch(&file)?;
    }
    let (mut model_opened, tokenizer) = open_parts(&file, machine, ram)?;
    // Several conversations have no one length: few of many become as long as they may.
    let context = model.ctx.map(|tokens| tokens as usize).filter(|_| n == 1);
    let verbose = machine.verbose;
    gpu::offload(&mut model_opened, &machine.gpu, shares, context, verbose)?;
    let template = Template::choose(&tokenizer, tokenizer.chat_template())?;
    for warning in model_opened.config.warnings() {
        note(format!("{}: warning: {warning}", path.display()));
    }
    if let Some((slots, experts)) = model_opened.store().slots()
        && slots < experts
    {
        note(format!(
            "{}: {} in {:.1} GB of memory (--ram): {slots} of {experts} experts stay there, the others are read when they are wanted",
            path.display(),
            bytes(file.file_bytes()),
            model_opened.store().total().unwrap_or(0) as f64 / 1e9,
        ));
    }
    let most = model_opened.config.n_ctx;
    let ctx = model.ctx.map_or(most, |n| n as usize);
    if ctx > most {
        return Err(Error::Usage(format!(
            "--ctx {ctx}: the model was trained for {most} positions (expected at most {most}, found {ctx})"
        )));
    }
    if machine.verbose {
        note(format!(
            "{}: {}, opened in {:.0} ms; prompt format {}; context {ctx}, KV cache {}",
            path.display(),
            bytes(file.file_bytes()),
            started.elapsed().as_secs_f64() * 1e3,
            template.name(),
            model.kv.name(),
        ));
    }
    Ok(Loaded {
        path,
        file,
        demo,
        model: model_opened,
        tokenizer: Arc::new(tokenizer),
        template,
        ctx,
    })
}

/// What is left to other programs when a model takes what it can get.
const RESERVE: u64 = 1 << 30;
/// Tokens of a conversation that the cache is sure to have memory for.
pub const FIRST_TOKENS: usize = 4096;

/// The memory that the model gets. `shares (n_layer, n_expert)`: how often a token takes each expert, if that is known.
///
/// # Errors
/// See [`Config::read`].
pub fn ram(
    file: &Gguf,
    limit: RamLimit,
    shares: Option<Vec<f32>>,
    kv: KvType,
    ctx: Option<u32>,
) -> Result<Ram> {
    let config = Config::read(file)?;
    config.check_kv(kv)?;
    Ok(match limit {
        RamLimit::All => Ram::Mapped,
        RamLimit::Bytes(bytes) => Ram::Within { bytes, shares },
        RamLimit::Auto => {
            let tokens = ctx.map_or(config.n_ctx, |n| n as usize).min(FIRST_TOKENS);
            let cache = Kv::new(&config, kv, tokens).growth(tokens) as u64;
            match memory_to_use() {
                Some(bytes) if config.routed && file.file_bytes() + cache > bytes => {
                    Ram::Within { bytes, shares }
                }
                _ => Ram::Mapped,
            }
        }
    })
}

/// What this process may take of the memory, when nobody says: what is free, but for a reserve. Nothing, if the system does
/// not tell.
pub fn memory_to_use() -> Option<u64> {
    let free = memory::available()?.saturating_sub(RESERVE);
    Some(free + memory::resident().unwrap_or(0))
}

/// Has the file read into the page cache while everything else begins, and while the first prompt is typed.
fn fetch(file: &Gguf) -> Result<()> {
    let sources: Vec<_> = file.sources().cloned().collect();
    apart("octet-fetch", move || {
        sources.iter().for_each(|s| s.fetch())
    })
}

/// The model and the tokenizer, made at the same time: the vocabulary of 32k tokens takes longer than
/// everything else.
fn open_parts(file: &Gguf, options: &MachineOptions, ram: Ram) -> Result<(Model, Tokenizer)> {
    std::thread::scope(|scope| {
        let tokenizer = scope.spawn(|| Tokenizer::from_gguf(file));
        let model = machine(options).and_then(|m| Model::open_in(file, m, ram));
        let tokenizer = tokenizer
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        let (model, tokenizer) = (model?, tokenizer?);
        if tokenizer.len() > model.config.n_vocab {
            return Err(Error::invalid(
                file.path(),
                "the vocabulary",
                format!(
                    "at most {} tokens, the rows of token_embd.weight",
                    model.config.n_vocab
                ),
                tokenizer.len(),
            ));
        }
        Ok((model, tokenizer))
    })
}

/// Threads and kernels as the options and `OCTET_ISA` say.
///
/// # Errors
/// See [`tier_cap`] and [`Machine::new`].
pub fn machine(options: &MachineOptions) -> Result<Machine> {
    let threads = Threads {
        n: options.threads.map_or(0, usize::from),
        batch: options.threads_batch.map_or(0, usize::from),
        pin: options.pin,
    };
    Machine::with(threads, tier_cap(options.isa)?)
}

/// The highest tier to use: what the option says, else what `OCTET_ISA` says.
///
/// # Errors
/// [`Error::Usage`] if the variable names no tier.
pub fn tier_cap(isa: Option<Tier>) -> Result<Option<Tier>> {
    match (isa, variable("OCTET_ISA")) {
        (None, Some(name)) => {
            let name = name.to_string_lossy();
            let tier = parse_tier(&name);
            tier.map(Some)
                .map_err(|e| Error::Usage(format!("OCTET_ISA={name}: {e}")))
        }
        (isa, _) => Ok(isa),
    }
}
