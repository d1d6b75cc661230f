//! `octet bench`: how fast this machine runs a model, and how fast it could.

use super::gpu;
use super::load::{model_path, ram, tier_cap};
use super::machine::{bandwidth, int8_peak};
use super::options::{GpuOptions, ModelOptions, RamLimit, kv_values, parse_ram, tier_values};
use super::progress::Progress;
use super::report::note;
use super::table::{Form, Table};
use crate::chat::repl::show;
use crate::error::{Error, Result};
use crate::gguf::Gguf;
use crate::moe::{Config, Kv, KvType, Machine, Model, Run, Scratch, Want};
use crate::pool::{Threads, default_threads};
use crate::simd::{Tier, best};
use serde_json::{Value, json};
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// Measure prefill and decode speed: median and spread of several rounds.
#[derive(clap::Args, Clone, Debug)]
#[command(
    after_help = "Options take lists (-p 8,32,512 -t 1,2): every combination is measured, after a warm-up. A round begins with \
        --depth tokens in the cache, reads --prompt tokens, --ubatch at a time, and generates --predict tokens one by one."
)]
pub struct Args {
    /// Prompt tokens; 0: no prefill
    #[arg(
        short,
        long,
        value_name = "TOKENS,…",
        value_delimiter = ',',
        default_value = "512"
    )]
    pub prompt: Vec<u32>,
    /// Generated tokens; 0: no decode
    #[arg(
        short = 'n',
        long,
        value_name = "TOKENS,…",
        value_delimiter = ',',
        default_value = "64"
    )]
    pub predict: Vec<u32>,
    /// Tokens that are in the cache before
    #[arg(
        short,
        long,
        value_name = "TOKENS,…",
        value_delimiter = ',',
        default_value = "0"
    )]
    pub depth: Vec<u32>,
    /// Rounds
    #[arg(short, long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub repetitions: u32,
    /// A Mixtral, Mistral or Llama GGUF file; may be repeated [default: $OCTET_MODEL, else the demo model]
    #[arg(short, long, value_name = "FILE")]
    pub model: Vec<PathBuf>,
    /// Element type of the KV cache
    #[arg(long, value_name = "TYPE,…", value_delimiter = ',', value_parser = kv_values(), default_value = "f16")]
    pub kv: Vec<KvType>,
    /// CPU threads [default: one for each large core]
    #[arg(short, long, value_name = "N,…", value_delimiter = ',', value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub threads: Vec<u16>,
    /// CPU threads for prefill; also -tb N,…; 0: as --threads
    #[arg(long, value_name = "N,…", value_delimiter = ',', default_value = "0", value_parser = clap::value_parser!(u16).range(0..=1024))]
    pub threads_batch: Vec<u16>,
    /// Keep each thread on a core of its own, where there are enough
    #[arg(long)]
    pub pin: bool,
    /// Highest CPU tier to use [default: $OCTET_ISA, else the best there is]
    #[arg(long, value_name = "TIER,…", value_delimiter = ',', value_parser = tier_values())]
    pub isa: Vec<Tier>,
    /// Prompt tokens that go through the layers together; also -ub TOKENS,…
    #[arg(long, alias = "ubatch-size", value_name = "TOKENS,…", value_delimiter = ',', default_value = "512", value_parser = clap::value_parser!(u32).range(1..=65536))]
    pub ubatch: Vec<u32>,
    /// Memory to keep within, such as 12G, auto or all
    #[arg(long, value_name = "SIZE", default_value = "auto", value_parser = parse_ram)]
    pub ram: RamLimit,
    /// Measure the machine alone, now: memory bandwidth and int8 peak, without a model
    #[arg(long)]
    pub bandwidth: bool,
    /// One JSON document on standard output
    #[arg(long, conflicts_with_all = ["csv", "markdown"])]
    pub json: bool,
    /// Comma-separated values on standard output
    #[arg(long, conflicts_with = "markdown")]
    pub csv: bool,
    /// A Markdown table on standard output
    #[arg(long)]
    pub markdown: bool,
    /// What else computes.
    #[command(flatten)]
    pub gpu: GpuOptions,
}

impl Args {
    fn form(&self) -> Form {
        match (self.csv, self.markdown) {
            (true, _) => Form::Csv,
            (_, true) => Form::Markdown,
            _ => Form::Plain,
        }
    }
}

/// One combination of the options.
#[derive(Clone, Copy)]
struct Case {
    model: usize,
    tier: Tier,
    threads: Threads,
    ubatch: u32,
    kv: KvType,
    depth: u32,
    p: u32,
    n: u32,
}

/// What a case is made of, as the tables say it.
const SETTINGS: [&str; 7] = [
    "model",
    "isa",
    "threads",
    "threads-batch",
    "ubatch",
    "kv",
    "depth",
];

impl Case {
    fn settings(&self, models: &[String]) -> Vec<String> {
        vec![
            models[self.model].clone(),
            self.tier.name().to_string(),
            self.threads.n.to_string(),
            self.batch().to_string(),
            self.ubatch.to_string(),
            self.kv.name().to_string(),
            self.depth.to_string(),
        ]
    }

    /// Threads for prefill.
    fn batch(&self) -> usize {
        match self.threads.batch {
            0 => self.threads.n,
            n => n,
        }
    }

    /// Most tokens in the cache.
    fn context(&self) -> usize {
        [self.depth, self.p, self.n]
            .map(|n| n as usize)
            .iter()
            .sum()
    }

    /// Tokens of `rounds`, and of the warm-up.
    fn tokens(&self, rounds: u32) -> usize {
        let once = self.depth as usize;
        once + (rounds as usize + 1) * (self.context() - once)
    }
}

/// All combinations; those of one model and machine follow each other.
fn cases(args: &Args, models: usize) -> Result<Vec<Case>> {
    /// Every case with every value.
    fn each<T: Copy>(cases: &mut Vec<Case>, values: &[T], set: impl Fn(&mut Case, T)) {
        let with = |case: &Case, value: &T| {
            let mut case = *case;
            set(&mut case, *value);
            case
        };
        *cases = cases
            .iter()
            .flat_map(|case| values.iter().map(move |value| (case, value)))
            .map(|(case, value)| with(case, value))
            .collect();
    }
    let mut cases = vec![Case {
        model: 0,
        tier: best(tier_cap(None)?),
        threads: Threads {
            n: default_threads(),
            batch: 0,
            pin: args.pin,
        },
        ubatch: 0,
        kv: KvType::F16,
        depth: 0,
        p: 0,
        n: 0,
    }];
    let models: Vec<_> = (0..models).collect();
    each(&mut cases, &models, |case, model| case.model = model);
    if !args.isa.is_empty() {
        each(&mut cases, &args.isa, |case, isa| {
            case.tier = best(Some(isa))
        });
    }
    if !args.threads.is_empty() {
        each(&mut cases, &args.threads, |case, n| {
            case.threads.n = n.into()
        });
    }
    each(&mut cases, &args.threads_batch, |case, n| {
        case.threads.batch = n.into()
    });
    each(&mut cases, &args.ubatch, |case, n| case.ubatch = n);
    each(&mut cases, &args.kv, |case, kv| case.kv = kv);
    each(&mut cases, &args.depth, |case, n| case.depth = n);
    each(&mut cases, &args.prompt, |case, n| case.p = n);
    each(&mut cases, &args.predict, |case, n| case.n = n);
    cases.retain(|case| case.p > 0 || case.n > 0);
    if cases.is_empty() {
        let what = "nothing to measure (expected --prompt or --predict above 0)";
        return Err(Error::Usage(what.to_string()));
    }
    Ok(cases)
}

/// What a machine can do at most.
#[derive(Clone, Copy)]
pub(super) struct Limits {
    pub(super) read_gb_s: f64,
    pub(super) int8_gmac_s: f64,
}

/// What a case or a machine did.
struct Measured {
    prefill: Option<Phase>,
    decode: Option<Phase>,
}

/// Prefill or decode of a case, in the median round.
struct Phase {
    /// Smallest, median and largest of the rounds.
    tok_s: [f64; 3],
    /// Products of weights and activations, 10⁹ a second.
    gmac_s: f64,
    /// Weights, and in decode the cache, that were read: 10⁹ bytes a second.
    gb_s: f64,
}

/// A phase's figures in the tables.
const FIGURES: [&str; 8] = [
    "test", "tok/s", "min", "max", "GMAC/s", "of int8", "GB/s", "of read",
];

impl Phase {
    /// A phase of so many tokens, products and bytes, which took these times; `None` without tokens.
    fn new(tokens: u32, times: &[Duration], macs: u64, bytes: u64) -> Option<Phase> {
        let mut rates: Vec<f64> = times.iter().map(|t| 1.0 / t.as_secs_f64()).collect();
        rates.sort_by(f64::total_cmp);
        let n = rates.len();
        let median = (rates[(n - 1) / 2] + rates[n / 2]) / 2.0;
        (tokens > 0).then(|| Phase {
            tok_s: [rates[0], median, rates[n - 1]].map(|rate| rate * f64::from(tokens)),
            gmac_s: macs as f64 * median / 1e9,
            gb_s: bytes as f64 * median / 1e9,
        })
    }

    fn figures(&self, limits: Limits) -> Vec<String> {
        let share = |x: f64, of: f64| format!("{:.1}%", 100.0 * x / of);
        let [min, median, max] = self.tok_s;
        vec![
            format!("{median:.2}"),
            format!("{min:.2}"),
            format!("{max:.2}"),
            format!("{:.1}", self.gmac_s),
            share(self.gmac_s, limits.int8_gmac_s),
            format!("{:.2}", self.gb_s),
            share(self.gb_s, limits.read_gb_s),
        ]
    }
}

/// Runs the command.
///
/// # Errors
/// If a model cannot be loaded or its context is too short.
pub fn run(args: &Args) -> Result<()> {
    if args.bandwidth {
        return machines(args);
    }
    let mut paths = args.model.clone();
    if paths.is_empty() {
        let options = ModelOptions {
            model: None,
            ctx: None,
            kv: KvType::F16,
        };
        paths.push(model_path(&options)?.0);
    }
    let files: Vec<Gguf> = paths.iter().map(|p| Gguf::open(p)).collect::<Result<_>>()?;
    let name = |path: &PathBuf| path.file_name().unwrap_or(path.as_os_str()).to_owned();
    let names: Vec<String> = paths
        .iter()
        .map(|path| name(path).to_string_lossy().into_owned())
        .collect();

    let cases = cases(args, files.len())?;
    for case in &cases {
        let limit = Config::read(&files[case.model])?.n_ctx;
        let want = case.context();
        if want > limit {
            return Err(Error::ContextFull { limit, want });
        }
    }
    let settings: Vec<_> = cases.iter().map(|case| case.settings(&names)).collect();
    let table = Table::new(args.form(), &SETTINGS, &settings, &FIGURES);
    if !args.json {
        show(table.head())?;
    }
    let mut documents = Vec::new();
    let mut progress = Progress::new("measuring");
    let total = cases.iter().map(|c| c.tokens(args.repetitions)).sum();
    let mut done = 0;
    let same = |a: &Case, b: &Case| (a.model, a.tier, a.threads) == (b.model, b.tier, b.threads);
    for cases in cases.chunk_by(same) {
        let machine = Machine::with(cases[0].threads, Some(cases[0].tier))?;
        let limits = limits(&machine);
        let file = &files[cases[0].model];
        let ram = ram(file, args.ram, None, cases[0].kv, None)?;
        let mut model = Model::open_in(file, machine, ram)?;
        gpu::offload(&mut model, &args.gpu, None, None, false)?;
        model.settle();
        for case in cases {
            model.config.check_kv(case.kv)?;
            let measured = measure(&model, case, args.repetitions, |tokens| {
                done += tokens;
                progress.set(done, total);
            })?;
            progress.clear();
            let gpu = model.store().reads().gpu.told();
            if args.json {
                let mut document = document(case, &names, limits, &measured);
                if let Some(told) = gpu {
                    document["gpu"] = json!(told);
                }
                documents.push(document);
                continue;
            }
            gpu.into_iter().for_each(note);
            let phases = [
                ("prefill", case.p, &measured.prefill),
                ("decode", case.n, &measured.decode),
            ];
            for (name, n, phase) in phases {
                if let Some(phase) = phase {
                    let test = vec![format!("{name} {n}")];
                    let cells = [case.settings(&names), test, phase.figures(limits)];
                    show(&table.row(cells.concat()))?;
                }
            }
        }
    }
    if let Some(first) = documents.first() {
        let of = |key: &str| (key.to_string(), first[key].clone());
        let machine = ["isa", "threads", "read_gb_s", "int8_gmac_s"].map(of);
        let machine: Value = machine.into_iter().collect();
        let document = json!({ "machine": machine, "results": documents });
        show(&format!("{document}\n"))?;
    }
    Ok(())
}

/// What the machine can do at most: measured now, or more if more is remembered.
pub(super) fn limits(machine: &Machine) -> Limits {
    Limits {
        read_gb_s: bandwidth(machine, f64::INFINITY) / 1e9,
        int8_gmac_s: int8_peak(machine, f64::INFINITY) / 1e9,
    }
}

/// `--bandwidth`.
fn machines(args: &Args) -> Result<()> {
    let mut cases = cases(args, 1)?;
    // Both are of the same threads: those of --threads.
    for case in &mut cases {
        case.threads.batch = 0;
    }
    cases.dedup_by_key(|case| (case.tier, case.threads));
    let settings = |case: &Case| vec![case.tier.name().to_string(), case.threads.n.to_string()];
    let all: Vec<_> = cases.iter().map(settings).collect();
    let table = Table::new(
        args.form(),
        &["isa", "threads"],
        &all,
        &["read GB/s", "int8 GMAC/s"],
    );
    if !args.json {
        show(table.head())?;
    }
    let mut documents = Vec::new();
    for case in &cases {
        let machine = Machine::with(case.threads, Some(case.tier))?;
        let read = machine.read_bandwidth() / 1e9;
        let int8 = machine.int8_peak() / 1e9;
        if args.json {
            documents.push(json!({
                "isa": case.tier.name(), "threads": case.threads.n,
                "read_gb_s": read, "int8_gmac_s": int8,
            }));
        } else {
            let figures = vec![format!("{read:.1}"), format!("{int8:.1}")];
            show(&table.row([settings(case), figures].concat()))?;
        }
    }
    match documents.first() {
        Some(first) => {
            let document = json!({ "machine": first, "results": [], "machines": documents });
            show(&format!("{document}\n"))
        }
        None => Ok(()),
    }
}

fn document(case: &Case, names: &[String], limits: Limits, measured: &Measured) -> Value {
    let mut document = json!({
        "model": names[case.model], "isa": case.tier.name(), "threads": case.threads.n,
        "threads_batch": case.batch(), "ubatch": case.ubatch, "kv": case.kv.name(),
        "p": case.p, "n": case.n, "depth": case.depth,
        "read_gb_s": limits.read_gb_s, "int8_gmac_s": limits.int8_gmac_s,
    });
    let phases = [("prefill", &measured.prefill), ("decode", &measured.decode)];
    for (name, phase) in phases {
        let Some(phase) = phase else { continue };
        let [min, median, max] = phase.tok_s;
        let figures = [
            ("tok_s", median),
            ("min", min),
            ("max", max),
            ("gmac_s", phase.gmac_s),
            ("gb_s", phase.gb_s),
            ("of_int8", phase.gmac_s / limits.int8_gmac_s),
            ("of_read", phase.gb_s / limits.read_gb_s),
        ];
        for (key, figure) in figures {
            document[format!("{name}_{key}")] = json!(figure);
        }
    }
    if let Some(decode) = &measured.decode {
        document["gb_s"] = json!(decode.gb_s);
    }
    document
}

/// Measures a case; `tell` is told of every round's tokens.
fn measure(
    model: &Model,
    case: &Case,
    rounds: u32,
    mut tell: impl FnMut(usize),
) -> Result<Measured> {
    let c = &model.config;
    let (depth, p, n) = (case.depth as usize, case.p as usize, case.n as usize);
    // Spread over the vocabulary, so that every expert gets its share; what they mean does not matter.
    // Fibonacci hashing: consecutive numbers land far apart (Knuth, TAOCP 3, 6.4).
    let token =
        |i: usize| ((i as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 33) as u32 % c.n_vocab as u32;
    let tokens: Vec<u32> = (0..case.context()).map(token).collect();
    let mut kv = Kv::new(c, case.kv, case.context());
    let mut scratch = Scratch::default();
    let read = |kv: &mut Kv, scratch: &mut Scratch, tokens: &[u32], want: Want| {
        model
            .forward(&mut [Run { kv, tokens, want }], scratch)
            .map(drop)
    };
    let prefill = |kv: &mut Kv, scratch: &mut Scratch, tokens: &[u32], last: Want| {
        let pass = model.pass_tokens(case.ubatch as usize);
        let mut batches = tokens.chunks(pass).peekable();
        while let Some(batch) = batches.next() {
            let want = if batches.peek().is_some() {
                Want::Nothing
            } else {
                last
            };
            read(kv, scratch, batch, want)?;
        }
        Ok::<_, Error>(())
    };

    prefill(&mut kv, &mut scratch, &tokens[..depth], Want::Nothing)?;
    tell(depth);
    let (mut prefill_times, mut decode_times) = (Vec::new(), Vec::new());
    let (mut prefill_bytes, mut decode_bytes) = (0, 0);
    for round in 0..=rounds {
        kv.truncate(depth);
        scratch.weight_bytes = 0;
        let started = Instant::now();
        prefill(&mut kv, &mut scratch, &tokens[depth..depth + p], Want::Last)?;
        let prefill_time = started.elapsed();
        prefill_bytes = std::mem::take(&mut scratch.weight_bytes);
        let started = Instant::now();
        for token in &tokens[depth + p..] {
            read(&mut kv, &mut scratch, &[*token], Want::Last)?;
        }
        decode_bytes = scratch.weight_bytes + (n * kv.bytes()) as u64;
        // The first round is the warm-up.
        if round > 0 {
            prefill_times.push(prefill_time);
            decode_times.push(started.elapsed());
        }
        tell(p + n);
    }
    let head = (c.d_model * c.n_vocab) as u64;
    let prefill_macs = case.p as u64 * c.macs() + head;
    let decode_macs = case.n as u64 * (c.macs() + head);
    Ok(Measured {
        prefill: Phase::new(case.p, &prefill_times, prefill_macs, prefill_bytes),
        decode: Phase::new(case.n, &decode_times, decode_macs, decode_bytes),
    })
}
