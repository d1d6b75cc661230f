//! `octet profile`: records how a model routes a text, and draws it.

use super::heatmap::{self, Colours};
use super::interrupt::hear_interrupts;
use super::load::load;
use super::options::{MachineOptions, ModelOptions};
use super::report::closing_line;
use super::score::{Chunks, STOPPING, Scorer};
use crate::chat::repl::{put, show};
use crate::disk::WholeFile;
use crate::error::{Error, Result};
use crate::moe::Profile;
use crate::moe::profile::Recorder;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;

/// Record which experts a model's router chooses in a text, or show such a record.
#[derive(clap::Args, Clone, Debug)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
#[command(
    mut_arg("ctx", |arg| arg.help("Tokens of a chunk [default: 512]")),
    after_help = "The file says what is worth keeping in memory where not all experts fit: how often each expert is taken, how \
        often a token takes those of the token before (reuse), and how many choices can be told one layer ahead (recall)."
)]
pub struct Args {
    /// Show a file instead.
    #[command(subcommand)]
    pub show: Option<Command>,
    /// The text, such as what the model will be used for; - is standard input
    #[arg(short, long, value_name = "FILE", required = true)]
    pub file: Option<PathBuf>,
    /// The profile to write
    #[arg(short, long, value_name = "FILE", default_value = "profile.json")]
    pub output: PathBuf,
    /// Read at most this many chunks of --ctx (512) tokens
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub chunks: Option<u32>,
    /// Which model.
    #[command(flatten)]
    pub model: ModelOptions,
    /// What it runs on.
    #[command(flatten)]
    pub machine: MachineOptions,
}

/// What can be done with a profile that is there.
#[derive(clap::Subcommand, Clone, Debug)]
pub enum Command {
    /// Draw a profile: a row for each layer, a column for each expert, the brighter the oftener it is taken
    Show(Show),
}

/// Arguments of `octet profile show`.
#[derive(clap::Args, Clone, Debug)]
pub struct Show {
    /// The profile
    pub file: PathBuf,
    /// Write the picture to this file too
    #[arg(long, value_name = "FILE")]
    pub svg: Option<PathBuf>,
    /// The profile as one JSON document on standard output
    #[arg(long)]
    pub json: bool,
}

/// Runs the command.
///
/// # Errors
/// If the model, the text or the profile cannot be read, the text is shorter than one chunk, or a file cannot be
/// written; [`Error::Interrupted`] after Ctrl-C: then a file of that name is as it was.
pub fn run(args: &Args) -> Result<()> {
    match (&args.show, &args.file) {
        (Some(Command::Show(args)), _) => draw(args),
        (None, Some(text)) => record(args, text),
        (None, None) => Err(Error::Usage("no text (expected --file)".to_string())),
    }
}

fn record(args: &Args, text: &Path) -> Result<()> {
    let loaded = load(&args.model, &args.machine)?;
    if !loaded.model.config.routed {
        let expected = "a model with experts, such as Mixtral";
        let what = "a profile of routing";
        return Err(Error::unsupported(
            &loaded.path,
            what,
            expected,
            "one without",
        ));
    }
    let mut chunks = Chunks::read(text, &loaded, &args.model)?;
    chunks.truncate(args.chunks.map_or(usize::MAX, |n| n as usize));
    let interrupted = hear_interrupts(Some(STOPPING))?;
    let stop = || interrupted.load(Ordering::Relaxed);
    // That it cannot be written is said now, not after an hour's work.
    drop(WholeFile::create(&args.output)?);

    let mut recorder = Recorder::new(&loaded.model);
    let (model, machine) = (&loaded.model, &args.machine);
    let mut scorer = Scorer::new(model, &chunks, &args.model, machine, "recording");
    while scorer.next(false, &mut recorder, stop)? {
        recorder.begin();
    }
    let profile = recorder.profile(&loaded.file);
    profile.write(&args.output)?;
    picture(&profile)?;
    let (n, size) = (chunks.count(), chunks.size);
    show(&format!(
        "{}: {n} chunks of {size} tokens\n",
        args.output.display()
    ))?;
    closing_line(&scorer.stats(), model.machine());
    Ok(())
}

fn draw(args: &Show) -> Result<()> {
    let profile = Profile::read(&args.file)?;
    if let Some(path) = &args.svg {
        let mut file = WholeFile::create(path)?;
        let svg = heatmap::svg(&profile);
        file.write_all(svg.as_bytes())
            .map_err(Error::io(path, "write"))?;
        file.finish()?;
    }
    match args.json {
        true => show(&format!("{}\n", profile.to_json())),
        false => picture(&profile),
    }
}

/// Draws it where the user looks.
fn picture(profile: &Profile) -> Result<()> {
    let (width, colours) = (heatmap::width(), Colours::of_stdout());
    put(&heatmap::terminal(profile, width, colours))
}
