//! `octet man`: manual pages.

use crate::error::{Error, Result};
use clap::Command;
use std::path::{Path, PathBuf};

/// Write manual pages into a folder: octet.1, and one for each command.
#[derive(clap::Args, Clone, Debug)]
#[command(
    after_help = "Where man looks for them: octet man ~/.local/share/man/man1. quantize --man FOLDER writes quantize's."
)]
pub struct Args {
    /// Where the pages go; made if it is not there
    pub folder: PathBuf,
}

/// Runs the command, for a program's definition.
///
/// # Errors
/// See [`write()`].
pub fn run(args: &Args, program: Command) -> Result<()> {
    write(program, &args.folder)
}

/// Writes the pages of a program.
///
/// # Errors
/// If the folder or a file cannot be written.
pub fn write(program: Command, folder: &Path) -> Result<()> {
    std::fs::create_dir_all(folder).map_err(Error::io(folder, "create"))?;
    clap_mangen::generate_to(program, folder).map_err(Error::io(folder, "write to"))
}
