//! What every run says on stderr, the closing line above all.

use super::machine::bandwidth;
use crate::chat::batch::Totals;
use crate::chat::session::{LogitsHash, Stats};
use crate::moe::Machine;
use std::io::Write;

/// Tells the user something on standard error. Where nobody can read it, nothing is lost: `eprintln!`
/// would panic there.
pub fn note(text: impl std::fmt::Display) {
    let _ = writeln!(std::io::stderr().lock(), "octet: {text}");
}

/// What came of the guesses.
pub fn draft_line(stats: &Stats) {
    note(format!(
        "{} of {} guesses right; {} in {} passes",
        stats.accepted,
        stats.drafted,
        tokens(stats.steps),
        stats.passes
    ));
}

/// The closing line: what the machine did. Nothing, where nothing can be written: the work is done.
pub fn closing_line(stats: &Stats, machine: &Machine) {
    let mut parts = Vec::new();
    if stats.prompt_tokens > 0 {
        parts.push(format!(
            "prompt {} at {:.1} tok/s",
            tokens(stats.prompt_tokens),
            stats.prompt_rate()
        ));
    }
    match stats.steps {
        // Perplexity reads and answers nothing.
        0 if stats.scored_tokens > 0 => {
            parts.push(format!("scored {}", tokens(stats.scored_tokens)))
        }
        0 => parts.push(format!("answer {}", tokens(stats.answer_tokens))),
        _ => parts.push(format!(
            "answer {} at {:.1} tok/s",
            tokens(stats.answer_tokens),
            stats.answer_rate()
        )),
    }
    parts.extend(stats.reads.told());
    closing(parts, machine, stats.bandwidth(), &stats.hash);
}

/// The same for a batch.
pub fn batch_closing_line(lines: &str, totals: &Totals, machine: &Machine) {
    let shared = match totals.shared_tokens {
        0 => String::new(),
        n => format!(" and {n} shared"),
    };
    let mut parts = vec![
        format!("{lines} in {:.1} s", totals.time.as_secs_f64()),
        format!("prompts {}{shared}", tokens(totals.prompt_tokens)),
        format!(
            "answers {} at {:.1} tok/s",
            tokens(totals.answer_tokens),
            totals.answer_rate()
        ),
    ];
    parts.extend(totals.reads.told());
    closing(parts, machine, totals.bandwidth(), &totals.hash);
}

/// What all closing lines end with: the machine's bandwidth and `used` of it, tier, threads, logits.
fn closing(mut parts: Vec<String>, machine: &Machine, used: f64, hash: &LogitsHash) {
    let limit = bandwidth(machine, used) / 1e9;
    let used = used / 1e9;
    parts.push(format!(
        "{used:.1} GB/s of weights ({:.0}% of {limit:.1})",
        100.0 * used / limit
    ));
    parts.push(format!(
        "{}, {} threads",
        machine.kernels.tier().name(),
        machine.pool.threads()
    ));
    parts.push(format!("logits {hash}"));
    note(parts.join("; "));
}

fn tokens(n: usize) -> String {
    if n == 1 {
        "1 token".to_string()
    } else {
        format!("{n} tokens")
    }
}
