//! `octet detokenize`: ids on standard input, text on standard output.

use super::input::read_text;
use super::tokenize::load_tokenizer;
use crate::error::{Error, Result};
use std::io::Write;
use std::path::PathBuf;

/// Turn token ids on standard input back into text.
#[derive(clap::Args, Clone, Debug)]
pub struct Args {
    /// A GGUF file, a tokenizer.model, a tokenizer.json or a folder with one [default: $OCTET_MODEL, else the demo model]
    #[arg(short, long, value_name = "FILE")]
    pub model: Option<PathBuf>,
    /// Show control tokens such as `<s>` instead of leaving them out
    #[arg(long)]
    pub special: bool,
}

/// Runs the command. Ids may be separated by anything that is no digit, as in `[1, 2, 3]`.
///
/// # Errors
/// If the tokenizer cannot be read or an id is outside the vocabulary.
pub fn run(args: &Args) -> Result<()> {
    let tokenizer = load_tokenizer(&args.model)?;
    let text = read_text(None)?;
    let mut ids = Vec::new();
    for word in text
        .split(|c: char| c.is_whitespace() || ",[]".contains(c))
        .filter(|w| !w.is_empty())
    {
        let id = word
            .parse()
            .ok()
            .filter(|id| tokenizer.piece(*id).is_some());
        ids.push(id.ok_or_else(|| {
            let expected = format!("token ids from 0 to {}", tokenizer.len() - 1);
            Error::invalid("<stdin>", "an id", expected, format!("{word:?}"))
        })?);
    }
    let bytes = tokenizer.decode_with(&ids, args.special);
    let mut out = std::io::stdout().lock();
    out.write_all(&bytes)
        .and_then(|()| out.flush())
        .map_err(Error::io("<stdout>", "write"))
}
