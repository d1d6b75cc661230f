//! The `octet` command: parses, dispatches, turns an error into one line and an exit code.

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{CommandFactory, Parser, Subcommand};
use octet::cli;
use octet::error::{Error, Result};
use std::ffi::OsString;
use std::process::ExitCode;

/// Strangers' templates have budgets of memory.
#[global_allocator]
static ALLOCATOR: octet::bounded::Allocator = octet::bounded::Allocator;

/// The command line.
#[derive(Parser)]
#[command(
    name = "octet",
    version,
    about,
    max_term_width = 100,
    args_conflicts_with_subcommands = true,
    mut_args(|arg| arg.hide(true)),
    after_help = "Without a command octet is octet chat and takes its options; OCTET_MODEL or --model names a GGUF file, else the \
        demo model answers. octet COMMAND --help lists a command's options. A second program, quantize, makes GGUF files."
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
    Plan(cli::plan::Args),
    Bench(cli::bench::Args),
    Inspect(cli::inspect::Args),
    Tokenize(cli::tokenize::Args),
    Detokenize(cli::detokenize::Args),
    Perplexity(cli::perplexity::Args),
    Imatrix(cli::imatrix::Args),
    Profile(cli::profile::Args),
    Completions(cli::completions::Args),
    Man(cli::man::Args),
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
        Some(Command::Completions(args)) => cli::completions::run(args, Octet::command()),
        Some(Command::Man(args)) => cli::man::run(args, Octet::command()),
    }
}

/// What people ask of other programs to bring a model.
const FETCH: [&str; 4] = ["pull", "download", "fetch", "get"];

/// A usage error with what was probably meant, where an argument stands without its option or in another place. `args`: all
/// that was typed.
fn explained(mut e: clap::Error, args: &[OsString]) -> clap::Error {
    let kind = match e.kind() {
        ErrorKind::InvalidSubcommand => ContextKind::InvalidSubcommand,
        ErrorKind::UnknownArgument => ContextKind::InvalidArg,
        _ => return e,
    };
    let Some(ContextValue::String(argument)) = e.get(kind) else {
        return e;
    };
    let run = args.get(1).is_some_and(|command| command == "run");
    let tip = match argument.as_str() {
        option if option.starts_with('-') => match commands_with(option) {
            commands if commands.is_empty() => return e,
            commands => format!("'{option}' is an option of {}", commands.join(", ")),
        },
        file if file.to_lowercase().ends_with(".gguf") => {
            format!("a model is named with '--model {file}'")
        }
        text if run || text.contains(' ') => {
            "a prompt is given with 'octet run --prompt TEXT'".to_string()
        }
        "version" => "'octet --version' says it".to_string(),
        word if FETCH.contains(&word) => {
            "octet fetches nothing; docs/getting-started.md says where Mixtral can be had as GGUF"
                .to_string()
        }
        _ => return e,
    };
    // What clap has found alike stays.
    if e.get(ContextKind::SuggestedArg).is_none() {
        e.insert(
            ContextKind::Suggested,
            ContextValue::StyledStrs(vec![tip.into()]),
        );
    }
    e
}

/// The commands that have an option, as it is typed.
fn commands_with(option: &str) -> Vec<String> {
    let octet = Octet::command();
    let has = |command: &&clap::Command| {
        command.get_arguments().any(|arg| {
            let long = arg.get_long().map(|long| format!("--{long}"));
            let short = arg.get_short().map(|short| format!("-{short}"));
            [long, short].iter().flatten().any(|name| name == option)
        })
    };
    let commands = octet.get_subcommands().filter(has);
    commands
        .map(|command| format!("'octet {}'", command.get_name()))
        .collect()
}

fn main() -> ExitCode {
    let args = cli::options::long_forms(std::env::args_os().collect());
    let octet = Octet::try_parse_from(&args).unwrap_or_else(|e| explained(e, &args).exit());
    match dispatch(&octet) {
        Ok(()) => ExitCode::SUCCESS,
        // Whoever read our output has seen enough (`octet run … | head -1`).
        Err(Error::Io { source, .. }) if source.kind() == std::io::ErrorKind::BrokenPipe => {
            ExitCode::SUCCESS
        }
        Err(e) => {
            cli::report::note(&e);
            ExitCode::from(e.exit_code())
        }
    }
}
