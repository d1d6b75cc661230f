//! `octet imatrix`: measures which columns of the weights matter, for `quantize --imatrix`.

use super::interrupt::hear_interrupts;
use super::load::load;
use super::options::{GpuMemory, GpuOptions, MachineOptions, ModelOptions};
use super::report::{closing_line, note};
use super::score::{Chunks, STOPPING, Scorer};
use crate::chat::repl::show;
use crate::disk::WholeFile;
use crate::error::Result;
use crate::gguf::imatrix::Form;
use crate::moe::{Collector, Config};
use std::path::PathBuf;
use std::sync::atomic::Ordering;

/// Measure which columns of the weights matter, for `quantize --imatrix`.
#[derive(clap::Args, Clone, Debug)]
#[command(
    mut_arg("ctx", |arg| arg.help("Tokens of a chunk [default: 512]")),
    after_help = "The mean square of what each column is multiplied with while the model reads a text. llama.cpp's tools read the \
        file, too."
)]
pub struct Args {
    /// The text, such as what the model will be used for; - is standard input
    #[arg(short, long, value_name = "FILE")]
    pub file: PathBuf,
    /// The importance file to write
    #[arg(short, long, value_name = "FILE", default_value = "imatrix.gguf")]
    pub output: PathBuf,
    /// gguf, or dat, the older form [default: dat if the file is named so]
    #[arg(long, value_name = "FORM", value_parser = parse_form)]
    pub output_format: Option<Form>,
    /// Write the file every N chunks, not only at the end
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub output_frequency: Option<u32>,
    /// Read at most this many chunks of --ctx (512) tokens
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub chunks: Option<u32>,
    /// Measure output.weight too
    #[arg(long)]
    pub process_output: bool,
    /// Which model.
    #[command(flatten)]
    pub model: ModelOptions,
    /// What it runs on.
    #[command(flatten)]
    pub machine: MachineOptions,
}

/// An expert with fewer tokens than this was hardly seen: from so few its mean squares are mostly chance.
const HARDLY: u64 = 128;

fn parse_form(text: &str) -> Result<Form, String> {
    match text {
        "gguf" => Ok(Form::Gguf),
        "dat" => Ok(Form::Dat),
        _ => Err("expected gguf or dat".to_string()),
    }
}

/// Runs the command.
///
/// # Errors
/// If the model or the text cannot be read, the text is shorter than one chunk, or the file cannot be
/// written; [`crate::error::Error::Interrupted`] after Ctrl-C: then a file of that name is as it was.
pub fn run(args: &Args) -> Result<()> {
    // What a GPU multiplies with is not seen.
    let gpu_mem = Some(GpuMemory::Bytes(0));
    let gpu = GpuOptions { gpu_mem, gpu: None };
    let machine = MachineOptions {
        gpu,
        ..args.machine.clone()
    };
    let loaded = load(&args.model, &machine)?;
    let mut chunks = Chunks::read(&args.file, &loaded, &args.model)?;
    chunks.truncate(args.chunks.map_or(usize::MAX, |n| n as usize));
    let interrupted = hear_interrupts(Some(STOPPING))?;
    let stop = || interrupted.load(Ordering::Relaxed);
    // That it cannot be written is said now, not after an hour's work.
    drop(WholeFile::create(&args.output)?);

    let config = &loaded.model.config;
    let mut collector = Collector::new(config);
    let mut scorer = Scorer::new(
        &loaded.model,
        &chunks,
        &args.model,
        &args.machine,
        "measuring",
    );
    let mut read = 0;
    while scorer.next(args.process_output, &mut collector, stop)? {
        read += 1;
        let now = |every: u32| read % every == 0 && (read as usize) < chunks.count();
        if args.output_frequency.is_some_and(now) {
            write(args, &collector, read, chunks.size)?;
        }
    }
    write(args, &collector, read, chunks.size)?;
    let stats = scorer.stats();
    show(&report(config, &collector, stats.prompt_tokens))?;
    show(&format!(
        "{}: {read} chunks of {} tokens; perplexity {:.4}\n",
        args.output.display(),
        chunks.size,
        scorer.nll().exp(),
    ))?;
    tell_hardly_seen(config, &collector, stats.prompt_tokens);
    closing_line(&stats, loaded.model.machine());
    Ok(())
}

fn write(args: &Args, collector: &Collector, chunks: u32, size: usize) -> Result<()> {
    let mut found = collector.imatrix(args.process_output);
    found.datasets = vec![args.file.display().to_string()];
    found.chunks = chunks;
    found.chunk_size = size as u32;
    let named_dat = || args.output.extension().is_some_and(|e| e == "dat");
    let form = args.output_format.unwrap_or(match named_dat() {
        true => Form::Dat,
        false => Form::Gguf,
    });
    let mut file = WholeFile::create(&args.output)?;
    found.write(form, &args.output, &mut file)?;
    file.finish()
}

/// How many tokens each expert of each layer saw; nothing for a dense model.
fn report(config: &Config, collector: &Collector, tokens: usize) -> String {
    if !config.routed {
        return String::new();
    }
    let wide = tokens.to_string().len().max(6);
    let cells = |cells: Vec<String>| -> String {
        cells.iter().map(|cell| format!(" {cell:>wide$}")).collect()
    };
    let names = (0..config.n_expert).map(|e| e.to_string()).collect();
    let mut text = format!("tokens that each expert saw\nlayer{}\n", cells(names));
    for layer in 0..config.n_layer {
        let counts = collector.tokens(layer).map(|n| n.to_string()).collect();
        text += &format!("{layer:>5}{}\n", cells(counts));
    }
    text
}

/// Names the experts whose importance is worth little.
fn tell_hardly_seen(config: &Config, collector: &Collector, tokens: usize) {
    if !config.routed {
        return;
    }
    /// The table has them all.
    const NAMED: usize = 8;
    let layers = 0..config.n_layer;
    let all = layers.flat_map(|l| (collector.tokens(l).enumerate()).map(move |(e, n)| (l, e, n)));
    let mut hardly: Vec<_> = all.filter(|(_, _, n)| *n < HARDLY).collect();
    hardly.sort_by_key(|(_, _, n)| *n);
    let mut named: Vec<_> = (hardly.iter().take(NAMED))
        .map(|(layer, expert, n)| format!("layer {layer} expert {expert} ({n})"))
        .collect();
    if hardly.len() > NAMED {
        named.push(format!("{} more", hardly.len() - NAMED));
    }
    if !hardly.is_empty() {
        note(format!(
            "note: of {tokens} tokens fewer than {HARDLY} reached {}; a longer or more varied text helps, and \
             where none came, columns count as equally important",
            named.join(", ")
        ));
    }
}
