//! From people to tokens and back.

pub mod batch;
pub mod constraint;
pub mod conversation;
pub mod draft;
mod gbnf;
pub mod jinja;
mod json;
pub mod message;
pub mod repl;
pub mod request;
pub mod sampler;
pub mod saved;
mod schema;
pub mod session;
pub mod stops;
pub mod template;
pub mod tokenizer;
pub mod tools;

/// A vocabulary of `tests/data/tokenizers`. The published package leaves the largest one out for its size: there, where cargo puts a
/// `Cargo.toml.orig`, and nowhere else, it is nothing.
#[cfg(test)]
fn vocabulary(name: &str) -> Option<std::path::PathBuf> {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    let path = root.join("tests/data/tokenizers").join(name);
    (path.exists() || !root.join("Cargo.toml.orig").exists()).then_some(path)
}
