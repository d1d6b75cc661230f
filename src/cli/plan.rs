//! `octet plan`: what this machine will do with a file, before anyone waits for it.

use super::bench::{Limits, limits};
use super::gpu::memory_to_plan;
use super::load::{FIRST_TOKENS, machine, memory_to_use, ram};
use super::options::{MachineOptions, RamLimit, kv_values};
use crate::chat::repl::show;
use crate::error::{Error, Result};
use crate::gguf::{Gguf, Source};
use crate::memory;
use crate::moe::budget::{Fit, Parts, Phase, Prediction, Speeds};
use crate::moe::{Config, Kv, KvType, Model, Profile, Ram, Run, Scratch, Want};
use crate::pool::{Background, try_each};
use crate::quant::recipe::Recipe;
use crate::readable::bytes;
use memmap2::MmapMut;
use serde_json::{Value, json};
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// Predict how a model will run on this machine.
#[derive(clap::Args, Clone, Debug)]
#[command(
    after_help = "Says what fits into memory, how fast the model reads and writes, what it will wait for, and what would be \
        better. Measures the disk, the memory and the model's first layer for a few seconds."
)]
pub struct Args {
    /// A Mixtral, Mistral or Llama GGUF file
    pub file: PathBuf,
    /// Tokens of the conversation that memory is kept for [default: 4096, or as many as the model was trained for]
    #[arg(short, long, value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(1..))]
    pub ctx: Option<u32>,
    /// Element type of the KV cache; q8_0 is half as large, a little less exact
    #[arg(long, value_name = "TYPE", value_parser = kv_values(), default_value = "f16")]
    pub kv: KvType,
    /// One JSON document on standard output
    #[arg(long)]
    pub json: bool,
    /// What it runs on.
    #[command(flatten)]
    pub machine: MachineOptions,
}

/// As options mean it.
const GB: u64 = 1_000_000_000;
/// Tokens of the prompt that is predicted.
const PROMPT: usize = 512;
/// Share of the choices that the layer before foresees; a profile knows better. For Mixtral 8x7B 0.85 to 0.96 are
/// published.
const RECALL: f64 = 0.85;

/// A model on a machine.
#[derive(Clone, Copy)]
struct Case<'a> {
    config: &'a Config,
    parts: Parts,
    speeds: Speeds,
    profile: Option<&'a Profile>,
    /// Nothing: all of the model is mapped.
    budget: Option<u64>,
    ctx: usize,
    scratch: u64,
}

/// What becomes of it.
struct Outcome {
    fit: Fit,
    hits: f64,
    prediction: Prediction,
}

impl Case<'_> {
    fn outcome(&self) -> Result<Outcome, u64> {
        let parts = &self.parts;
        let budget = self.budget.unwrap_or(u64::MAX);
        let fit = parts.fit(budget, self.ctx, self.scratch)?;
        let slots = fit.slots as f64 / parts.n_layer as f64;
        let hits = match self.profile {
            Some(profile) => profile.held(slots),
            None => slots / parts.n_expert as f64,
        };
        let recall = self.profile.and_then(Profile::mean_recall);
        let recall = recall.unwrap_or(RECALL);
        let prediction = parts.predict(&self.speeds, fit.slots, hits, recall, PROMPT);
        Ok(Outcome {
            fit,
            hits,
            prediction,
        })
    }
}

impl Outcome {
    fn decode(&self) -> f64 {
        1.0 / self.prediction.decode.seconds
    }

    fn prefill(&self) -> f64 {
        PROMPT as f64 / self.prediction.prefill.seconds
    }
}

/// Runs the command.
///
/// # Errors
/// If the file or the profile cannot be read, or the model does not fit into the budget with the fewest experts that
/// will do.
pub fn run(args: &Args) -> Result<()> {
    let gpu_memory = memory_to_plan(&args.machine.gpu)?;
    let file = Gguf::open(&args.file)?;
    let profile = match &args.machine.profile {
        Some(path) => Some(Profile::read_of(path, &file)?),
        None => None,
    };
    let model = Model::open(&file, machine(&args.machine)?)?;
    let config = model.config.clone();
    let ctx = args
        .ctx
        .map_or(FIRST_TOKENS.min(config.n_ctx), |n| n as usize);
    if ctx > config.n_ctx {
        let limit = config.n_ctx;
        return Err(Error::ContextFull { limit, want: ctx });
    }
    // `all` leaves it to the system, which does well where auto finds no reason not to.
    let limit = match args.machine.ram {
        RamLimit::All => RamLimit::Auto,
        limit => limit,
    };
    let budget = match ram(&file, limit, None, args.kv, Some(ctx as u32))? {
        Ram::Mapped => None,
        Ram::Within { bytes, .. } => Some(bytes),
    };
    let program = memory::resident().unwrap_or(0);
    let mut case = Case {
        config: &config,
        parts: Parts::of(&config, &model.weights, args.kv, program),
        speeds: Speeds {
            disk: f64::INFINITY,
            weights: f64::INFINITY,
            macs: f64::INFINITY,
        },
        profile: profile.as_ref(),
        budget,
        ctx,
        scratch: model.scratch_bytes(PROMPT.min(args.machine.ubatch as usize)),
    };
    // Whether it fits is known before anything is measured.
    if let Err(least) = case.outcome() {
        return Err(too_small(args, budget.unwrap_or(0), least));
    }

    let gpu = gpu_memory.filter(|_| config.routed);
    let gpu = gpu.map(|memory| on_gpu(&model, memory, profile.as_ref(), args.ctx));
    let limits = limits(model.machine());
    let at_work = (
        model.machine().kernels.tier().name(),
        model.machine().pool.threads(),
    );
    let largest = file.sources().max_by_key(|source| source.map().len());
    let disk = read_speed(largest.expect("a model has a file"))?;
    let (weights, macs) = trial(model, &file, args.kv)?;
    case.speeds = Speeds {
        disk,
        weights,
        macs,
    };
    let Ok(outcome) = case.outcome() else {
        unreachable!("speeds do not change what fits")
    };
    let available = memory::available();
    let better = better(&case, &outcome);
    let plan = Plan {
        file: &file,
        case: &case,
        outcome,
        better,
        available,
        limits,
        at_work,
        gpu,
    };
    match args.json {
        true => show(&format!("{}\n", plan.document())),
        false => show(&plan.text()),
    }
}

fn too_small(args: &Args, budget: u64, least: u64) -> Error {
    let hint = match args.machine.ram {
        RamLimit::Bytes(_) => "a larger --ram or a smaller --ctx helps",
        _ => "a smaller --ctx, a smaller type or more memory helps",
    };
    Error::invalid(
        &args.file,
        "the memory budget",
        format!("at least {}", bytes(least)),
        format!("{}; {hint}", bytes(budget)),
    )
}

/// Bytes a second that the disk gives of a file, as the store reads: pieces of 1 MiB, eight at once, in runs of 32 MiB all
/// over it. For three seconds, as a disk's seconds differ by a third; or until a small file was read eight times.
fn read_speed(source: &Source) -> Result<f64> {
    const TIME: Duration = Duration::from_secs(3);
    const TIMES: usize = 8;
    const READERS: usize = 8;
    const PIECE: usize = 1 << 20;
    const RUN: usize = 32;
    let len = source.map().len();
    let (pieces, next) = (len.div_ceil(PIECE), AtomicUsize::new(0));
    let read = AtomicUsize::new(0);
    let started = Instant::now();
    let reader = |_| {
        let failed = |e| Error::io(source.path(), "read")(e);
        let mut buffer = MmapMut::map_anon(PIECE).map_err(failed)?;
        loop {
            let i = next.fetch_add(1, Ordering::Relaxed);
            if i >= TIMES * pieces || started.elapsed() >= TIME {
                return Ok(());
            }
            // Fibonacci hashing sends consecutive runs far apart (Knuth, TAOCP 3, 6.4).
            let run = (i / RUN).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
            let at = (run * RUN + i % RUN) % pieces * PIECE;
            let want = PIECE.min(len - at);
            let done = source.read(at as u64, &mut buffer, want);
            done.map_err(failed)?;
            read.fetch_add(want, Ordering::Relaxed);
        }
    };
    let readers = Background::new(READERS, "read")?;
    readers.run(|| try_each((0..READERS).collect(), reader))?;
    Ok(read.into_inner() as f64 / started.elapsed().as_secs_f64())
}

/// Bytes of weights a second in decode and products a second in prefill, as the model's first layer does them.
fn trial(model: Model, file: &Gguf, kv: KvType) -> Result<(f64, f64)> {
    /// Rounds, of which the median counts.
    const ROUNDS: usize = 5;
    /// Tokens of decode in a round.
    const STEPS: usize = 4;
    let c = &model.config;
    // So many tokens that each expert gets as many as of a whole prompt.
    let n_tok = (PROMPT * c.n_used / c.n_expert).max(1);
    let layer = model.first_layer(file);
    let c = &layer.config;
    let tokens: Vec<u32> = (0..n_tok as u32).map(|t| t % c.n_vocab as u32).collect();
    let mut kv = Kv::new(c, kv, n_tok + STEPS);
    let mut scratch = Scratch::default();
    let mut forward = |kv: &mut Kv, tokens: &[u32]| {
        let started = Instant::now();
        let want = Want::Nothing;
        layer.forward(&mut [Run { kv, tokens, want }], &mut scratch)?;
        Ok::<_, Error>(started.elapsed().as_secs_f64())
    };
    let (mut prefill, mut decode) = (Vec::new(), Vec::new());
    for round in 0..=ROUNDS {
        kv.truncate(0);
        let time = forward(&mut kv, &tokens)?;
        // The first round reads the weights from disk.
        if round > 0 {
            prefill.push(time);
            for _ in 0..STEPS {
                decode.push(forward(&mut kv, &tokens[..1])?);
            }
        }
    }
    let median = |mut times: Vec<f64>| {
        times.sort_by(f64::total_cmp);
        times[times.len() / 2]
    };
    let weights = &layer.weights;
    let experts: u64 = weights.layers[0].experts.iter().map(|e| e.bytes()).sum();
    let read = weights.dense_bytes() - weights.head.bytes.len() as u64 + experts;
    Ok((
        read as f64 / median(decode),
        n_tok as f64 * c.macs() as f64 / median(prefill),
    ))
}

/// A change, and what it would bring.
struct Better {
    change: String,
    outcome: Outcome,
}

/// Changes that would make decode or the first token faster, the best first.
fn better(case: &Case<'_>, now: &Outcome) -> Vec<Better> {
    /// Fewer percent are not worth a change.
    const WORTH: f64 = 1.05;
    /// More tokens a second than anybody reads.
    const ENOUGH: f64 = 10.0;
    /// Tokens of a conversation that is not long.
    const SHORT: usize = 4096;
    /// More are too many to choose from.
    const MOST: usize = 3;
    let mut found = Vec::new();
    let mut consider = |change: String, other: Case<'_>| {
        if let Ok(outcome) = other.outcome()
            && outcome.decode() > WORTH * now.decode()
        {
            found.push(Better { change, outcome });
        }
    };
    let parts = &case.parts;
    let all = parts.n_slots();
    if now.fit.slots < all {
        // What is there and not used; as much as everything takes.
        let fixed = parts.dense + parts.program + now.fit.kv + now.fit.scratch;
        let free = memory_to_use().unwrap_or(0) / GB;
        let needed = (fixed + parts.slot * all as u64).div_ceil(GB);
        let with = |gb: u64| Case {
            budget: Some(gb * GB),
            ..*case
        };
        if Some(free * GB) > case.budget {
            let gb = free.min(needed);
            consider(format!("--ram {gb}G"), with(gb));
        }
        if free < needed {
            consider(format!("{needed} GB of memory"), with(needed));
        }
        if case.ctx > SHORT {
            consider(
                format!("--ctx {SHORT}"),
                Case {
                    ctx: SHORT,
                    ..*case
                },
            );
        }
    }
    if now.decode() < ENOUGH {
        let types = [
            Recipe::Q6_K,
            Recipe::Q5_K_M,
            Recipe::Q4_K_M,
            Recipe::Q3_K_M,
            Recipe::Q2_K,
        ];
        let smaller = types.map(|recipe| (recipe, parts.with(case.config, recipe)));
        let smaller = smaller
            .iter()
            .filter(|(_, p)| p.experts < parts.experts * 9 / 10);
        // The finest that fits, or the next smaller one.
        let with = |parts: &Parts| Case {
            parts: *parts,
            ..*case
        };
        let fits = |p: &&(Recipe, Parts)| with(&p.1).outcome().is_ok_and(|o| o.fit.slots == all);
        let mut smaller = smaller.peekable();
        let next = smaller.peek().copied();
        if let Some((recipe, parts)) = smaller.find(fits).or(next) {
            consider(format!("type {}", recipe.name()), with(parts));
        }
    }
    found.sort_by(|a, b| b.outcome.decode().total_cmp(&a.outcome.decode()));
    found.truncate(MOST);
    found
}

/// Everything that is said.
struct Plan<'a> {
    file: &'a Gguf,
    case: &'a Case<'a>,
    outcome: Outcome,
    better: Vec<Better>,
    available: Option<u64>,
    limits: Limits,
    /// CPU tier and threads.
    at_work: (&'static str, usize),
    /// What would lie on a GPU.
    gpu: Option<OnGpu>,
}

/// What would lie on a GPU: for people, and as JSON. How fast that is, nobody has measured.
struct OnGpu {
    lines: Vec<(String, String)>,
    figures: Value,
}

#[cfg(feature = "cuda")]
fn on_gpu(model: &Model, memory: u64, profile: Option<&Profile>, ctx: Option<u32>) -> OnGpu {
    use crate::moe::offload::forecast::forecast;
    let shares = profile.map(Profile::shares);
    let context = ctx.map(|tokens| tokens as usize);
    let told = forecast(&model.config, &model.weights, memory, shares, context);
    let size = |n: u64| format!("{:>10}", bytes(n));
    let mut lines = vec![
        ("to compute with".to_string(), size(told.scratch)),
        ("everything but experts".to_string(), size(told.dense)),
        (
            format!("{} of {} experts", told.experts, told.of),
            size(told.bytes),
        ),
        (
            "a token's experts there".to_string(),
            format!("{:.0}%", 100.0 * told.hits),
        ),
        (
            "left to the CPU".to_string(),
            format!("{} a token", bytes(told.left as u64)),
        ),
    ];
    if told.kv > 0 {
        let what = format!("KV cache, {} tokens", told.kv_tokens);
        lines.insert(1, (what, size(told.kv)));
    }
    let figures = json!({
        "memory": memory, "scratch": told.scratch, "kv": told.kv, "kv_tokens": told.kv_tokens, "dense": told.dense,
        "experts": told.experts, "experts_bytes": told.bytes, "hit_rate": told.hits, "cpu_bytes_token": told.left,
    });
    lines.insert(0, ("memory".to_string(), size(memory)));
    OnGpu { lines, figures }
}

#[cfg(not(feature = "cuda"))]
fn on_gpu(_: &Model, _: u64, _: Option<&Profile>, _: Option<u32>) -> OnGpu {
    unreachable!("without the feature no memory of a GPU is planned with")
}

impl Plan<'_> {
    fn text(&self) -> String {
        let (case, fit, parts) = (self.case, &self.outcome.fit, &self.case.parts);
        let (now, limits) = (&self.outcome.prediction, self.limits);
        let line = |name: &str, text: String| format!("  {name:<26}{text}\n");
        let size = |name: &str, n: u64| line(name, format!("{:>10}", bytes(n)));
        let all = parts.n_slots();

        let mut out = format!(
            "{}: {}, {}\n\nThis machine\n",
            self.file.path().display(),
            bytes(self.file.file_bytes()),
            match case.config.routed {
                true => format!(
                    "{} layers of {} experts, {} for each token",
                    parts.n_layer, parts.n_expert, parts.n_used
                ),
                false => format!("{} layers without experts", parts.n_layer),
            }
        );
        if let Some(available) = self.available {
            out += &line("memory", format!("{} available", bytes(available)));
        }
        out += &line("reading memory", format!("{:.1} GB/s", limits.read_gb_s));
        out += &line(
            "reading the file",
            format!("{:.2} GB/s", case.speeds.disk / 1e9),
        );
        let (tier, threads) = self.at_work;
        let int8 = limits.int8_gmac_s;
        let what = format!("{int8:.0} GMAC/s of int8 ({tier}, {threads} threads)");
        out += &line("arithmetic", what);

        out += &match case.budget {
            Some(budget) => format!("\nMemory, of {}\n", bytes(budget)),
            None => "\nMemory\n".to_string(),
        };
        out += &size("the program", parts.program);
        out += &size("everything but experts", parts.dense);
        out += &size(&format!("KV cache, {} tokens", case.ctx), fit.kv);
        out += &size("scratch", fit.scratch);
        out += &match fit.slots == all {
            true => size(&format!("all {all} experts"), parts.experts),
            false => size(
                &format!("{} of {all} experts", fit.slots),
                parts.slot * fit.slots as u64,
            ),
        };

        if let Some(gpu) = &self.gpu {
            out += "\nOn the GPU\n";
            for (name, text) in &gpu.lines {
                out += &line(name, text.clone());
            }
        }

        let disk = |phase: &Phase| {
            let read = bytes(phase.bytes as u64);
            format!("waits for the disk, {read}")
        };
        let decode = match now.decode.waits() {
            true => disk(&now.decode) + " a token",
            false => {
                let read = bytes(parts.dense_read + parts.used() as u64);
                format!("as fast as memory gives {read} a token")
            }
        };
        let prefill = match now.prefill.waits() {
            true => disk(&now.prefill),
            false => "as fast as the arithmetic".to_string(),
        };

        let cold = match now.first.seconds > 1.05 * now.prefill.seconds {
            true => format!(
                "; {:.1} s while nothing of the file is in memory yet",
                now.first.seconds
            ),
            false => String::new(),
        };

        out += match self.gpu {
            Some(_) => "\nPrediction, for the CPU alone\n",
            None => "\nPrediction\n",
        };
        if fit.slots < all {
            let hits = format!("{:.0}% of a token's experts", 100.0 * self.outcome.hits);
            out += &line("found in memory", hits);
        }
        out += &line(
            "decode",
            format!("{:.2} tok/s; {decode}", self.outcome.decode()),
        );
        out += &line(
            &format!("prefill of {PROMPT}"),
            format!("{:.1} tok/s; {prefill}", self.outcome.prefill()),
        );
        out += &line(
            &format!("first token after {PROMPT}"),
            format!("{:.1} s{cold}", now.prefill.seconds),
        );
        if !self.better.is_empty() {
            out += "\nBetter\n";
        }
        for Better { change, outcome } in &self.better {
            let fits = if outcome.fit.slots == all {
                "all in memory; "
            } else {
                ""
            };
            out += &line(
                change,
                format!(
                    "{fits}decode {:.2} tok/s, prefill {:.1} tok/s",
                    outcome.decode(),
                    outcome.prefill()
                ),
            );
        }
        out
    }

    fn document(&self) -> Value {
        let (case, fit, now) = (self.case, &self.outcome.fit, &self.outcome.prediction);
        let parts = &case.parts;
        let better: Vec<Value> = (self.better.iter())
            .map(|b| json!({ "change": b.change, "prediction": figures(&b.outcome) }))
            .collect();
        let mut document = json!({
            "machine": {
                "available": self.available, "disk_gb_s": case.speeds.disk / 1e9,
                "read_gb_s": self.limits.read_gb_s, "int8_gmac_s": self.limits.int8_gmac_s,
                "isa": self.at_work.0, "threads": self.at_work.1,
            },
            "memory": {
                "budget": case.budget, "program": parts.program, "dense": parts.dense, "kv": fit.kv, "ctx": case.ctx,
                "scratch": fit.scratch, "slot": parts.slot, "slots": fit.slots, "experts": parts.n_slots(),
            },
            "prediction": figures(&self.outcome),
            "limited_by": {
                "decode": if now.decode.waits() { "disk" } else { "memory" },
                "prefill": if now.prefill.waits() { "disk" } else { "arithmetic" },
            },
            "better": better,
        });
        if let Some(gpu) = &self.gpu {
            document["gpu"] = gpu.figures.clone();
        }
        document
    }
}

fn figures(outcome: &Outcome) -> Value {
    let Prediction {
        decode,
        prefill,
        first,
    } = &outcome.prediction;
    json!({
        "slots": outcome.fit.slots, "hit_rate": outcome.hits,
        "decode_tok_s": outcome.decode(), "prefill_tok_s": outcome.prefill(),
        "first_token_s": prefill.seconds,
        "first_token_cold_s": first.seconds,
        "disk_bytes_token": decode.bytes, "disk_bytes_prompt": prefill.bytes,
    })
}
