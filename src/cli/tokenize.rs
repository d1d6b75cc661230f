//! `octet tokenize`: text on standard input, ids on standard output.

use super::input::{lines, read_text};
use super::load::model_path;
use super::options::ModelOptions;
use crate::bounded;
use crate::chat::message::{Message, Role};
use crate::chat::repl::show;
use crate::chat::template::Template;
use crate::chat::tokenizer::Tokenizer;
use crate::error::{Error, Result};
use crate::gguf::{Gguf, MAGIC};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

/// Turn text on standard input into token ids.
#[derive(clap::Args, Clone, Debug)]
pub struct Args {
    /// A GGUF file, a tokenizer.model, a tokenizer.json or a folder with one [default: $OCTET_MODEL, else the demo model]
    #[arg(short, long, value_name = "FILE")]
    pub model: Option<PathBuf>,
    /// Each line is a JSON string, each answer a line {"ids":[…]}; with --chat each line is
    /// {"messages":[…],"tools":[…]|null} and the answer may be {"error":"…"}
    #[arg(long)]
    pub json: bool,
    /// Whole chat prompts, as the model sees them
    #[arg(long)]
    pub chat: bool,
    /// Put the begin-of-sequence token in front (chat prompts have it anyway)
    #[arg(long)]
    pub bos: bool,
}

/// The tokenizer of a GGUF or of a file or folder that holds nothing else.
///
/// # Errors
/// If it cannot be read.
pub fn load_tokenizer(model: &Option<PathBuf>) -> Result<Tokenizer> {
    let options = ModelOptions {
        model: model.clone(),
        ctx: None,
        kv: crate::moe::KvType::F16,
    };
    let (path, _) = model_path(&options)?;
    // What is missing, Gguf::open says best.
    if path.is_dir() || path.exists() && !is_gguf(&path) {
        Tokenizer::from_path(&path)
    } else {
        Tokenizer::from_gguf(&Gguf::open(&path)?)
    }
}

/// Whether the file begins like a GGUF, or is named like one (so that a damaged one is reported as such).
fn is_gguf(path: &Path) -> bool {
    let mut magic = [0; 4];
    let read =
        std::fs::File::open(path).and_then(|mut f| std::io::Read::read_exact(&mut f, &mut magic));
    (read.is_ok() && &magic == MAGIC) || path.extension().is_some_and(|e| e == "gguf")
}

/// Runs the command.
///
/// # Errors
/// If the tokenizer or the text cannot be read; after the last line, if a line was no valid JSON.
pub fn run(args: &Args) -> Result<()> {
    let tokenizer = load_tokenizer(&args.model)?;
    let with_bos = |ids: Vec<u32>| -> Vec<u32> {
        tokenizer
            .bos()
            .filter(|_| args.bos)
            .into_iter()
            .chain(ids)
            .collect()
    };
    let template = match args.chat {
        true => Some(Template::choose(&tokenizer, tokenizer.chat_template())?),
        false => None,
    };
    if !args.json {
        let text = read_text(None)?;
        let ids = match &template {
            Some(t) => t.encode(&tokenizer, &[Message::new(Role::User, &text)], None)?,
            None => with_bos(tokenizer.encode(&text)),
        };
        let ids: Vec<_> = ids.iter().map(u32::to_string).collect();
        return show(&format!("{}\n", ids.join(" ")));
    }
    let mut bad = None;
    for (i, line) in lines().enumerate() {
        let line = line?;
        if line.trim().is_empty() {
            continue;
        }
        let invalid = |expected: &str, found: String| {
            Error::invalid("<stdin>", format!("line {}", i + 1), expected, found)
        };
        let result = bounded::json(line.as_bytes())
            .map_err(|e| invalid("JSON", e.to_string()))
            .and_then(|value| match (&template, &value) {
                (Some(t), value) => {
                    let tools = match value.get("tools") {
                        None | Some(Value::Null) => None,
                        Some(Value::Array(tools)) => Some(tools.as_slice()),
                        Some(_) => {
                            return Err(invalid(
                                "\"tools\" to be a list or null",
                                "something else".into(),
                            ));
                        }
                    };
                    let messages = value
                        .get("messages")
                        .ok_or_else(|| invalid("an object with \"messages\"", "none".into()))?;
                    t.encode(&tokenizer, &Message::list_from_json(messages)?, tools)
                }
                (None, Value::String(text)) => Ok(with_bos(tokenizer.encode(text))),
                (None, _) => Err(invalid("a JSON string", "another JSON value".into())),
            });
        let answer = match result {
            Ok(ids) => json!({ "ids": ids }),
            Err(e) => {
                let answer = json!({ "error": e.to_string() });
                // A conversation that the format refuses is an answer; a line that is none is a mistake.
                if !matches!(e, Error::Prompt { .. }) {
                    bad = Some(e);
                }
                answer
            }
        };
        show(&format!("{answer}\n"))?;
    }
    bad.map_or(Ok(()), Err)
}
