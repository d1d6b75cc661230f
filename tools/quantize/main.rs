//! The `quantize` command: a Hugging Face folder, safetensors or GGUF becomes a GGUF of any usual type.
//!
//! `source.rs` and `import.rs` say what is read, `plan.rs` what will be written, `pipeline.rs` does it; with `journal.rs` it goes on
//! where it was interrupted.

mod import;
mod journal;
mod pipeline;
mod plan;
mod source;

use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::{CommandFactory, Parser};
use clap_complete::Shell;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use octet::cli::load::tier_cap;
use octet::cli::options::{parse_size, tier_values};
use octet::cli::{completions, man};
use octet::error::{Error, Result};
use octet::gguf::Imatrix;
use octet::pool::Pool;
use octet::quant::Format;
use octet::quant::recipe::Recipe;
use octet::readable::{self, one_line};
use octet::simd::encode::Encoder;
use octet::simd::{Tier, best};
use regex::Regex;

use pipeline::{Error2, Errors, Run};
use plan::{ImatrixFile, Kind, Options, Output, Shards};
use source::{Source, type_name};

/// Turns a Hugging Face folder, safetensors or GGUF into a GGUF of any usual type.
#[derive(Parser, Debug)]
#[command(name = "quantize", version, max_term_width = 100, after_help = types())]
struct Args {
    /// A Hugging Face folder, a .safetensors file in one, or a GGUF (of a split one: any part)
    #[arg(required = true)]
    src: Option<PathBuf>,
    /// The file to write; with several types it must contain {type}
    #[arg(required = true)]
    dst: Option<PathBuf>,
    /// What to make: a type, several separated by commas, or COPY to rewrite the container only
    #[arg(value_name = "TYPE", value_delimiter = ',', value_parser = kind_values(), ignore_case = true, hide_possible_values = true, required = true)]
    kinds: Vec<Kind>,

    /// An importance file: columns that matter more are kept more exactly
    #[arg(long, value_name = "FILE")]
    imatrix: Option<PathBuf>,
    /// A format for tensors whose name matches, such as 'ffn_down=Q6_K'; may be repeated, the first
    /// match counts
    #[arg(long, value_name = "REGEX=TYPE", value_parser = parse_by_name)]
    tensor_type: Vec<(Regex, Format)>,
    /// A format for output.weight
    #[arg(long, value_name = "TYPE", value_parser = plan::parse_format)]
    output_tensor_type: Option<Format>,
    /// A format for token_embd.weight
    #[arg(long, value_name = "TYPE", value_parser = plan::parse_format)]
    token_embedding_type: Option<Format>,
    /// No mixture: all matrices in the type's base format
    #[arg(long)]
    pure: bool,
    /// Quantize weights again that are quantized already
    #[arg(long)]
    allow_requantize: bool,
    /// One tensor for each expert, as files of December 2023 have it
    #[arg(long)]
    split_experts: bool,

    /// Write N files of about equal size; 0 for as many as the source has
    #[arg(long, value_name = "N", conflicts_with = "split_size", value_parser = clap::value_parser!(u16))]
    keep_split: Option<u16>,
    /// Write files of at most this size, such as 4G
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    split_size: Option<u64>,

    /// Show what would be written, and write nothing
    #[arg(long)]
    dry_run: bool,
    /// Continue a run that was interrupted
    #[arg(long)]
    resume: bool,
    /// Let weights pass that are no finite numbers
    #[arg(long)]
    force: bool,
    /// CPU threads [default: one for each core]
    #[arg(short, long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
    /// Highest CPU tier to use [default: $OCTET_ISA, else the best there is]
    #[arg(long, value_name = "TIER", value_parser = tier_values())]
    isa: Option<Tier>,
    /// Write a shell's completions of this command to standard output
    #[arg(long, value_name = "SHELL", exclusive = true)]
    completions: Option<Shell>,
    /// Write this command's man page into a folder
    #[arg(long, value_name = "FOLDER", exclusive = true)]
    man: Option<PathBuf>,
}

/// The list of types for the help.
fn types() -> String {
    let mut text = String::from("Types:\n");
    for r in Recipe::ALL {
        text.push_str(&format!("  {:<7} {}\n", r.name(), r.about()));
    }
    text + "  COPY    every tensor as it is; experts with a tensor each become fused ones\n"
}

fn parse_kind(text: &str) -> Result<Kind, String> {
    if text.eq_ignore_ascii_case("COPY") {
        return Ok(Kind::Copy);
    }
    Recipe::from_name(text).map(Kind::Recipe).ok_or_else(|| {
        let names: Vec<_> = Recipe::ALL.iter().map(|r| r.name()).collect();
        format!("expected one of {}, COPY", names.join(", "))
    })
}

/// The names of what can be made.
fn kind_values() -> impl TypedValueParser<Value = Kind> {
    let names = Recipe::ALL.iter().map(|r| r.name());
    PossibleValuesParser::new(names.chain(["COPY"])).try_map(|name| parse_kind(&name))
}

fn parse_by_name(text: &str) -> Result<(Regex, Format), String> {
    let (pattern, format) = text.rsplit_once('=').ok_or("expected REGEX=TYPE")?;
    if pattern.is_empty() {
        return Err("expected REGEX=TYPE".to_string());
    }
    // On one line, as errors are here.
    let regex = Regex::new(pattern).map_err(|e| {
        let why = e.to_string();
        let why = why.lines().last().unwrap_or_default().to_string();
        format!("{pattern} is no regular expression: {why}")
    })?;
    Ok((regex, plan::parse_format(format)?))
}

fn open(args: &Args, path: &Path) -> Result<Source> {
    let is_safetensors = || path.extension().is_some_and(|e| e == "safetensors");
    let mut source = if path.is_dir() || is_safetensors() {
        import::open(path)?
    } else {
        Source::gguf(path)?
    };
    if args.split_experts {
        source.split_experts();
    }
    Ok(source)
}

/// Where an output goes.
fn target(args: &Args, dst: &Path, kind: Kind) -> Result<PathBuf> {
    let text = dst.to_str().unwrap_or_default();
    let path = match text.contains("{type}") {
        true => PathBuf::from(text.replace("{type}", kind.name())),
        false if args.kinds.len() > 1 => {
            return Err(Error::Usage(format!(
                "{}: several types need several files (expected {{type}} in the name, as in \
                 out-{{type}}.gguf)",
                dst.display()
            )));
        }
        false => dst.to_path_buf(),
    };
    if path.is_dir() {
        let expected = "the name of a file";
        return Err(Error::invalid(
            &path,
            "the destination",
            expected,
            "a folder",
        ));
    }
    Ok(path)
}

/// Decides what each output will be.
fn outputs(
    args: &Args,
    dst: &Path,
    source: &Source,
    imatrix: Option<&ImatrixFile>,
) -> Result<Vec<Output>> {
    let options = Options {
        by_name: args.tensor_type.clone(),
        output: args.output_tensor_type,
        embedding: args.token_embedding_type,
        pure: args.pure,
        requantize: args.allow_requantize,
        shards: match (args.keep_split, args.split_size) {
            (Some(0), _) => Shards::Count(source.shards),
            (Some(n), _) => Shards::Count(n.into()),
            (_, Some(bytes)) => Shards::Bytes(bytes),
            (None, None) => Shards::One,
        },
    };
    let mut outputs = Vec::new();
    for &kind in &args.kinds {
        if outputs.iter().any(|o: &Output| o.kind == kind) {
            let what = format!("{} is there twice (expected each type once)", kind.name());
            return Err(Error::Usage(what));
        }
        let path = target(args, dst, kind)?;
        outputs.push(plan::output(source, kind, &path, imatrix, &options)?);
    }
    Ok(outputs)
}

fn run(args: &Args) -> Result<()> {
    if let Some(shell) = args.completions {
        return print(&completions::of(Args::command(), shell)?);
    }
    if let Some(folder) = &args.man {
        return man::write(Args::command(), folder);
    }
    let started = Instant::now();
    // Without these two the command line has not been accepted.
    let (Some(src), Some(dst)) = (&args.src, &args.dst) else {
        return Err(Error::Usage("SRC and DST are missing".to_string()));
    };
    let source = open(args, src)?;
    let imatrix = match &args.imatrix {
        Some(path) => Some(ImatrixFile {
            path: path.clone(),
            data: Imatrix::read(path)?,
        }),
        None => None,
    };
    let outputs = outputs(args, dst, &source, imatrix.as_ref())?;
    tell_notes(&source, &outputs, imatrix.as_ref());
    if args.dry_run {
        return print(&table(&source, &outputs, None));
    }

    let pool = Pool::new(args.threads.map_or(0, usize::from))?;
    let tier = best(tier_cap(args.isa)?);
    let stop = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&stop);
    // Without a handler Ctrl-C ends the program at once, which is safe too.
    let _ = ctrlc::set_handler(move || flag.store(true, Ordering::Relaxed));
    let bytes: u64 = source.tensors.iter().map(|t| t.bytes()).sum();
    let bar = progress_bar(bytes);
    let work = Run {
        source: &source,
        outputs: &outputs,
        imatrix: imatrix.as_ref(),
        force: args.force,
        resume: args.resume,
        pool: &pool,
        encoder: Encoder::of(tier),
        stop: &stop,
        progress: &|n| bar.inc(n),
    };
    let result = work.write();
    bar.finish_and_clear();
    let (errors, resumed) = match result {
        Err(e @ (Error::Interrupted | Error::Io { .. })) => {
            if journal::resumable(&outputs) {
                eprintln!(
                    "quantize: what is done is kept: the same command with --resume continues"
                );
            }
            return Err(e);
        }
        other => other?,
    };
    print(&table(&source, &outputs, Some(&errors)))?;
    let seconds = started.elapsed().as_secs_f64();
    let again = match resumed {
        0 => String::new(),
        n => format!("; {n} tensors of an earlier run"),
    };
    eprintln!(
        "quantize: {} in {seconds:.1} s, {:.0} MB/s read; {}, {} threads{again}",
        readable::bytes(bytes),
        bytes as f64 / 1e6 / seconds,
        tier.name(),
        pool.threads(),
    );
    Ok(())
}

fn progress_bar(bytes: u64) -> ProgressBar {
    let style = ProgressStyle::with_template(
        "quantizing {wide_bar} {bytes}/{total_bytes}, {bytes_per_sec}, {eta} left",
    )
    .expect("a valid template");
    let target = match std::io::stderr().is_terminal() {
        true => ProgressDrawTarget::stderr(),
        false => ProgressDrawTarget::hidden(),
    };
    ProgressBar::with_draw_target(Some(bytes), target).with_style(style)
}

fn tell_notes(source: &Source, outputs: &[Output], imatrix: Option<&ImatrixFile>) {
    let say = |path: &Path, note: &str| {
        eprintln!("quantize: {}: note: {}", path.display(), one_line(note));
    };
    for note in &source.notes {
        say(&source.path, note);
    }
    if let Some(file) = imatrix {
        // Per layer and expert, not per matrix: the three see the same inputs.
        let mut unseen: Vec<String> = file
            .data
            .unseen()
            .map(|(name, expert)| {
                let layer = octet::quant::recipe::layer(name);
                layer.map_or(name.to_string(), |l| format!("layer {l} expert {expert}"))
            })
            .collect();
        unseen.dedup();
        unseen.sort();
        unseen.dedup();
        if !unseen.is_empty() {
            let note = format!(
                "its text never reached {}: their columns count as equally important",
                unseen.join(", ")
            );
            say(&file.path, &note);
        }
    }
    for output in outputs {
        for note in &output.notes {
            say(&output.files[0].path, note);
        }
    }
}

/// The tensors and what became (or will become) of them, one table for each output.
fn table(source: &Source, outputs: &[Output], errors: Option<&Errors>) -> String {
    let mut text = String::new();
    for (o, output) in outputs.iter().enumerate() {
        let names: Vec<&str> = source.tensors.iter().map(|t| t.name.as_str()).collect();
        let wide = names
            .iter()
            .map(|n| n.len())
            .max()
            .unwrap_or(0)
            .clamp(6, 40);
        let error = if errors.is_some() {
            "  error RMS   relative"
        } else {
            ""
        };
        text += &format!(
            "{:<wide$}  {:<6}  {:<6}  {:>10}{error}\n",
            "tensor", "from", "to", "size"
        );
        let mut all = Error2::default();
        for (i, t) in source.tensors.iter().enumerate() {
            let from = t.type_id().map_or("mixed", type_name);
            let mut line = format!(
                "{:<wide$}  {from:<6}  {:<6}  {:>10}",
                one_line(&t.name),
                type_name(output.types[i]),
                readable::bytes(output.tensor_bytes(i)),
            );
            if let Some(error) = errors.map(|e| &e[i][o]) {
                // Each weight counts the same, whether all of a tensor's were measured or some.
                let share = t.elements() as f64 / error.count.max(1) as f64;
                all.add(&Error2 {
                    error: error.error * share,
                    energy: error.energy * share,
                    count: if error.count > 0 { t.elements() } else { 0 },
                });
                if let (Some(rms), Some(relative)) = (error.rms(), error.relative()) {
                    line += &format!("  {rms:>9.3e}  {:>8.3}%", 100.0 * relative);
                }
            }
            text += line.trim_end();
            text.push('\n');
        }
        let tensors = || output.files.iter().flat_map(|f| &f.plan.tensors);
        text += &format!(
            "{}: {} tensors, {}, {:.2} bits per weight",
            output.kind.name(),
            names.len(),
            readable::bytes(output.bytes()),
            plan::bits_per_weight(tensors()),
        );
        if let (Some(rms), Some(relative)) = (all.rms(), all.relative()) {
            text += &format!(", error RMS {rms:.3e} ({:.3}%)", 100.0 * relative);
        }
        text.push('\n');
        for file in &output.files {
            let n = file.plan.tensors.len();
            let bytes = file.plan.file_bytes;
            text += &format!("{}: {n} tensors, {bytes} bytes\n", file.path.display());
        }
    }
    text
}

/// Writes to standard output.
fn print(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes())
        .and_then(|()| out.flush())
        .map_err(Error::io("<stdout>", "write"))
}

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        // Whoever read our output has seen enough (`quantize … | head -1`).
        Err(Error::Io { source, .. }) if source.kind() == std::io::ErrorKind::BrokenPipe => {
            ExitCode::SUCCESS
        }
        Err(e) => {
            eprintln!("quantize: {e}");
            ExitCode::from(e.exit_code())
        }
    }
}
