//! `octet completions`: what a shell needs to complete the command line.

use crate::chat::repl::show;
use crate::error::{Error, Result};
use clap::Command;
use clap_complete::Shell;

/// Write a shell's completions to standard output.
#[derive(clap::Args, Clone, Debug)]
#[command(
    after_help = "For bash: octet completions bash > ~/.local/share/bash-completion/completions/octet. For fish: octet completions \
        fish > ~/.config/fish/completions/octet.fish. For zsh: into a file _octet in a folder of $fpath. quantize --completions \
        SHELL writes those of quantize."
)]
pub struct Args {
    /// Which shell
    pub shell: Shell,
}

/// Runs the command, for a program's definition.
///
/// # Errors
/// If standard output cannot be written.
pub fn run(args: &Args, program: Command) -> Result<()> {
    show(&of(program, args.shell)?)
}

/// A shell's completions of a program.
///
/// # Errors
/// [`Error::Invalid`] if they are no text.
pub fn of(mut program: Command, shell: Shell) -> Result<String> {
    let name = program.get_name().to_string();
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut program, name, &mut script);
    String::from_utf8(script)
        .map_err(|e| Error::invalid("<stdout>", "the completions", "UTF-8 text", e))
}
