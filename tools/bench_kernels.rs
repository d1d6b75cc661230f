//! Speed of the products of weights and activations: every format on every tier of this CPU, for one token and
//! for several, so that a regression has an address.
//!
//! ```text
//! cargo bench --bench kernels                                    # everything, one thread
//! cargo bench --bench kernels -- Q4_K Q6_K --isa avx512 --tokens 1,64 --threads 2
//! cargo bench --bench kernels -- Q4_K --columns 14336 --tokens 128 --threads 2    # an expert's `ffn_down` in a prompt
//! ```

mod bench_common;

use bench_common::{Common, say};
use clap::Parser;
use octet::error::{Error, Result};
use octet::gguf::{Gguf, Writer};
use octet::moe::Machine;
use octet::moe::linear::{Input, Job, Weight, matmul};
use octet::quant::Format;
use octet::quant::search::Plain;
use octet::simd::Tier;
use std::fs::File;
use std::path::Path;
use std::time::Instant;

/// Times products of weights and activations.
#[derive(Parser)]
struct Args {
    /// Formats [default: all]
    #[arg(value_parser = parse_format)]
    formats: Vec<Format>,
    /// Tokens that a row is multiplied with
    #[arg(long, value_delimiter = ',', default_value = "1,8,64")]
    tokens: Vec<usize>,
    /// Length of a row, a multiple of 256
    #[arg(long, default_value_t = 4096)]
    columns: usize,
    /// Tokens picked at random from four times as many, as an expert's are where they are few (AMX leaves these to AVX-512)
    #[arg(long)]
    scattered: bool,
    /// MiB of weights: more than the caches hold, so that they come from memory
    #[arg(long, default_value_t = 128)]
    mib: usize,
    #[command(flatten)]
    common: Common,
}

fn parse_format(text: &str) -> Result<Format, String> {
    let all = Format::ALL.iter().copied();
    let mut named = all.filter(|f| f.name().eq_ignore_ascii_case(text));
    named.next().ok_or_else(|| {
        let names: Vec<_> = Format::ALL.iter().map(|f| f.name()).collect();
        format!("expected one of {}", names.join(", "))
    })
}

/// Numbers from -1 up to 1, always the same.
fn random() -> impl FnMut() -> f32 {
    let mut state = 1u64;
    move || {
        state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    }
}

/// A file of `mib` of weights in rows of `k`, in the mapped file as they are when a model runs.
fn weights(dir: &Path, format: Format, k: usize, mib: usize) -> Result<Weight> {
    // Some real rows, again and again: speed does not depend on what the weights are.
    let mut random = random();
    let x: Vec<f32> = (0..ROWS * k).map(|_| random()).collect();
    let mut some = vec![0; ROWS * format.row_bytes(k)];
    format.encode::<Plain>(&x, None, &mut some);
    let times = ((mib << 20) / some.len()).max(1);

    let path = dir.join(format.name());
    let mut writer = Writer::new();
    writer.tensor("w", format as u32, &[k as u64, (times * ROWS) as u64]);
    let file = File::create(&path).map_err(Error::io(&path, "create"))?;
    let mut stream = writer.start(&path, file)?;
    for _ in 0..times {
        stream.write(&some)?;
    }
    stream.finish()?;
    let file = Gguf::open(&path)?;
    Ok(Weight {
        name: "random".into(),
        format,
        n_in: k,
        n_out: times * ROWS,
        bytes: file.bytes(&file.tensors()[0]),
    })
}

/// Rows that are made; a file repeats them.
const ROWS: usize = 16;

/// `n` tokens of so many, in their order.
fn picked(n: usize, of: usize) -> Vec<u32> {
    let mut random = random();
    let mut left = n;
    let mut pick = Vec::new();
    for token in 0..of {
        // As many of those that follow as are still wanted.
        if (random() + 1.0) / 2.0 * ((of - token) as f32) < left as f32 {
            pick.push(token as u32);
            left -= 1;
        }
    }
    pick
}

/// Seconds that a row of `w` takes with `n_tok` tokens.
fn seconds_a_row(machine: &Machine, w: &Weight, n_tok: usize, scattered: bool) -> f64 {
    let of = if scattered { 4 * n_tok } else { n_tok };
    let x: Vec<f32> = (0..of * w.n_in).map(|i| (i % 17) as f32 - 8.0).collect();
    let mut input = Input::default();
    input.prepare(machine, &x, w.n_in, [w]);
    let pick = picked(n_tok, of);
    let row_bytes = w.format.row_bytes(w.n_in);
    let (mut y, mut at) = (Vec::new(), 0);
    let mut pass = |rows: usize| {
        if at + rows > w.n_out {
            at = 0;
        }
        let bytes = w.bytes.slice(at * row_bytes..(at + rows) * row_bytes);
        at += rows;
        y.resize(n_tok * rows, 0.0);
        let part = Weight {
            bytes,
            n_out: rows,
            ..w.clone()
        };
        let mut jobs = [Job {
            w: &part,
            x: &input,
            pick: &pick,
            y: &mut y,
        }];
        let started = Instant::now();
        matmul(machine, &mut jobs);
        started.elapsed().as_secs_f64()
    };
    machine.pool.enter(|| {
        // As many rows as take some milliseconds, each time others than before.
        let mut rows = w.n_out.min(64);
        while pass(rows) < 5e-3 && 2 * rows <= w.n_out {
            rows *= 2;
        }
        // The fastest is the one that nothing else on the machine disturbed.
        (0..15).map(|_| pass(rows)).fold(f64::INFINITY, f64::min) / rows as f64
    })
}

fn main() -> Result<()> {
    let args = Args::parse();
    let formats = match args.formats.as_slice() {
        [] => Format::ALL,
        some => some,
    };
    let tiers = args.common.tiers();
    let mut settings = Vec::new();
    for format in formats {
        for tier in &tiers {
            for n in &args.tokens {
                settings.push(vec![
                    format.name().to_string(),
                    tier.name().to_string(),
                    n.to_string(),
                ]);
            }
        }
    }
    let read = args.common.machine(Tier::Scalar)?.read_bandwidth();
    let mut peaks = Vec::new();
    for tier in &tiers {
        peaks.push(args.common.machine(*tier)?.int8_peak());
    }
    let said = format!(", {} columns; reads {:.1} GB/s", args.columns, read / 1e9);
    let names = ["format", "isa", "tokens"];
    let figures = ["GB/s", "of read", "GMAC/s", "of int8"];
    let table = args.common.table(&said, &names, &settings, &figures);
    let mut settings = settings.into_iter();
    let dir = tempfile::tempdir().map_err(Error::io(std::env::temp_dir(), "write to"))?;
    for &format in formats {
        let w = weights(dir.path(), format, args.columns, args.mib)?;
        for (tier, peak) in tiers.iter().zip(&peaks) {
            let machine = args.common.machine(*tier)?;
            for &n in &args.tokens {
                let seconds = seconds_a_row(&machine, &w, n, args.scattered);
                let bytes = format.row_bytes(w.n_in) as f64 / seconds;
                let macs = (n * w.n_in) as f64 / seconds;
                let figures = vec![
                    format!("{:.2}", bytes / 1e9),
                    format!("{:.0}%", 100.0 * bytes / read),
                    format!("{:.1}", macs / 1e9),
                    format!("{:.0}%", 100.0 * macs / peak),
                ];
                let settings = settings.next().expect("one for each row");
                say(&table.row([settings, figures].concat()));
            }
        }
    }
    Ok(())
}
