//! Speed of attention by itself: every kind of cache on every tier of this CPU, for one token (decode) and for several (prefill).
//!
//! ```text
//! cargo bench --bench attention                                         # everything, one thread
//! cargo bench --bench attention -- --kv f16 --isa avx512 --depth 8192 --threads 2
//! ```

mod bench_common;

use bench_common::{Common, say};
use clap::Parser;
use octet::error::Result;
use octet::moe::attention::{Place, attend};
use octet::moe::{Config, Kv, KvType, Machine};
use octet::simd::Tier;
use std::time::Instant;

/// Times attention with Mixtral 8x7B's heads: 32 for queries, 8 for keys and values, 128 wide.
#[derive(Parser)]
struct Args {
    /// Kinds of cache
    #[arg(long, value_delimiter = ',', default_value = "f16,q8_0", value_parser = parse_kv)]
    kv: Vec<KvType>,
    /// Tokens in the cache
    #[arg(long, value_delimiter = ',', default_value = "512,8192")]
    depth: Vec<usize>,
    /// Tokens that attend, the last ones in the cache
    #[arg(long, value_delimiter = ',', default_value = "1,16")]
    tokens: Vec<usize>,
    /// MiB of keys and values in all layers: more than the caches hold, so that they come from memory
    #[arg(long, default_value_t = 256)]
    mib: usize,
    #[command(flatten)]
    common: Common,
}

fn parse_kv(text: &str) -> Result<KvType, String> {
    let named = KvType::ALL.iter().find(|kind| kind.name() == text);
    named.copied().ok_or_else(|| {
        let names: Vec<_> = KvType::ALL.iter().map(|kind| kind.name()).collect();
        format!("expected one of {}", names.join(", "))
    })
}

/// Mixtral 8x7B's attention, in so many layers.
fn config(n_layer: usize) -> Config {
    Config {
        n_layer,
        ..Config::MIXTRAL_8X7B
    }
}

/// Numbers from -1 to 1, by position.
fn some(n: usize, pos: usize) -> Vec<f32> {
    (0..n)
        .map(|i| ((i * 37 + pos * 101) % 199) as f32 / 99.0 - 1.0)
        .collect()
}

/// A cache of `depth` tokens in as many layers as `mib` have room for.
fn filled(kind: KvType, depth: usize, mib: usize) -> Result<(Config, Kv)> {
    let layer = Kv::new(&config(1), kind, depth).growth(depth);
    let config = config(((mib << 20) / layer).max(1));
    let mut kv = Kv::new(&config, kind, depth);
    kv.reserve(depth)?;
    let width = config.n_kv * config.d_head;
    for pos in 0..depth {
        let (k, v) = (some(width, pos), some(width, pos + 1));
        for layer in 0..config.n_layer {
            kv.write(layer, pos, &k, &v);
        }
    }
    kv.advance(depth);
    Ok((config, kv))
}

/// Seconds that the last `n_tok` tokens take in a layer.
fn seconds_a_layer(machine: &Machine, config: &Config, kv: &Kv, n_tok: usize) -> f64 {
    let places: Vec<Place<'_>> = (kv.len() - n_tok..kv.len())
        .map(|pos| Place { kv, pos })
        .collect();
    let q = some(n_tok * config.n_head * config.d_head, 7);
    let mut out = vec![0.0; q.len()];
    let mut pass = || {
        let mut seconds = 0.0;
        for layer in 0..config.n_layer {
            let mut q = q.clone();
            let started = Instant::now();
            attend(machine, config, layer, &places, &mut q, &mut out);
            seconds += started.elapsed().as_secs_f64();
        }
        seconds / config.n_layer as f64
    };
    // The fastest is the one that nothing else on the machine disturbed.
    machine
        .pool
        .enter(|| (0..5).map(|_| pass()).fold(f64::INFINITY, f64::min))
}

fn main() -> Result<()> {
    let args = Args::parse();
    let tiers = args.common.tiers();
    let mut settings = Vec::new();
    for kind in &args.kv {
        for depth in &args.depth {
            for tier in &tiers {
                for n in args.tokens.iter().filter(|n| (1..=*depth).contains(*n)) {
                    settings.push((*kind, *depth, *tier, *n));
                }
            }
        }
    }
    let said = |(kind, depth, tier, n): &(KvType, usize, Tier, usize)| {
        vec![
            kind.name().to_string(),
            depth.to_string(),
            tier.name().to_string(),
            n.to_string(),
        ]
    };
    let read = args.common.machine(Tier::Scalar)?.read_bandwidth();
    let names = ["kv", "depth", "isa", "tokens"];
    let figures = ["ms a layer", "GB/s", "of read", "GFMA/s"];
    let settings_said: Vec<_> = settings.iter().map(said).collect();
    let reads = format!("; reads {:.1} GB/s", read / 1e9);
    let table = args.common.table(&reads, &names, &settings_said, &figures);
    let mut cache: Option<(KvType, usize, Config, Kv)> = None;
    for setting in &settings {
        let (kind, depth, tier, n) = *setting;
        if !matches!(&cache, Some((k, d, ..)) if (*k, *d) == (kind, depth)) {
            let (config, kv) = filled(kind, depth, args.mib)?;
            cache = Some((kind, depth, config, kv));
        }
        let (_, _, config, kv) = cache.as_ref().expect("made above");
        let seconds = seconds_a_layer(&args.common.machine(tier)?, config, kv, n);
        // Scores and sums of values; keys and values are read once for these tokens.
        let seen: usize = (depth - n..depth).map(|pos| pos + 1).sum();
        let fmas = 2 * seen * config.n_head * config.d_head;
        let bytes = kv.bytes() / config.n_layer;
        let figures = vec![
            format!("{:.3}", 1e3 * seconds),
            format!("{:.2}", bytes as f64 / seconds / 1e9),
            format!("{:.0}%", 100.0 * bytes as f64 / seconds / read),
            format!("{:.1}", fmas as f64 / seconds / 1e9),
        ];
        say(&table.row([said(setting), figures].concat()));
    }
    Ok(())
}
