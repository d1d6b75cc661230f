//! The `octet` command: parses, dispatches, turns an error into one line and an exit code.

use clap::{Parser, Subcommand};
use octet::cli;
use octet::error::{Error, Result};
use std::process::ExitCode;

/// Strangers' templates have budgets of memory.
#[global_allocator]
static ALLOCATOR: octet::bounded::Allocator = octet::bounded::Allocator;

/// Runs Mixtral from a GGUF file, on the CPU.
#[derive(Parser)]
#[command(
    name = "octet",
    version,
    about,
    max_term_width = 100,
    args_conflicts_with_subcommands = true
)]
struct Octet {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    chat: cli::chat::Args,
}

/// One row per command.
#[derive(Subcommand)]
enum Command {
    Chat(cli::chat::Args),
    Run(cli::run::Args),
    Batch(cli::batch::Args),
    Tokenize(cli::tokenize::Args),
    Detokenize(cli::detokenize::Args),
    Inspect(cli::inspect::Args),
    Perplexity(cli::perplexity::Args),
    Imatrix(cli::imatrix::Args),
    Profile(cli::profile::Args),
    Bench(cli::bench::Args),
    Plan(cli::plan::Args),
}

fn dispatch(octet: &Octet) -> Result<()> {
    match &octet.command {
        None => cli::chat::run(&octet.chat),
        Some(Command::Chat(args)) => cli::chat::run(args),
        Some(Command::Run(args)) => cli::run::run(args),
        Some(Command::Batch(args)) => cli::batch::run(args),
        Some(Command::Tokenize(args)) => cli::tokenize::run(args),
        Some(Command::Detokenize(args)) => cli::detokenize::run(args),
        Some(Command::Inspect(args)) => cli::inspect::run(args),
        Some(Command::Perplexity(args)) => cli::perplexity::run(args),
        Some(Command::Imatrix(args)) => cli::imatrix::run(args),
        Some(Command::Profile(args)) => cli::profile::run(args),
        Some(Command::Bench(args)) => cli::bench::run(args),
        Some(Command::Plan(args)) => cli::plan::run(args),
    }
}

fn main() -> ExitCode {
    let args = cli::options::long_forms(std::env::args_os().collect());
    match dispatch(&Octet::parse_from(args)) {
        Ok(()) => ExitCode::SUCCESS,
        // Whoever read our output has seen enough (`octet run … | head -1`).
        Err(Error::Io { source, .. }) if source.kind() == std::io::ErrorKind::BrokenPipe => {
            ExitCode::SUCCESS
        }
        Err(e) => {
            cli::input::note(&e);
            ExitCode::from(e.exit_code())
        }
    }
}
