//! What every run says on stderr: progress while a long prompt is read, and the closing line.

use super::input::note;
use crate::chat::batch::Totals;
use crate::chat::session::{LogitsHash, Stats, rate};
use crate::moe::Machine;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::io::IsTerminal;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// A progress bar for work that may take longer than a second; shown after the first second, on a
/// terminal, on stderr.
pub struct Progress {
    /// When the work began that is told of, and what was done then; none before that, and after its end.
    started: Option<(Instant, usize)>,
    what: &'static str,
    unit: &'static str,
    /// What [`Progress::tell`] was told.
    speed: Option<String>,
    bar: Option<ProgressBar>,
}

impl Progress {
    /// A bar for `what`, such as "reading the prompt", that counts tokens.
    pub fn new(what: &'static str) -> Progress {
        Progress::of(what, "tokens")
    }

    /// A bar that counts something else; its speed is what [`Progress::tell`] says. `what` may be empty, where the line is
    /// long.
    pub fn of(what: &'static str, unit: &'static str) -> Progress {
        Progress {
            started: None,
            what,
            unit,
            speed: None,
            bar: None,
        }
    }

    /// `done` of `total` are done; nobody knows how many there are of `usize::MAX`.
    pub fn set(&mut self, done: usize, total: usize) {
        if done >= total {
            return self.clear();
        }
        let (began, first) = *self.started.get_or_insert_with(|| (Instant::now(), done));
        let elapsed = began.elapsed();
        if self.bar.is_none() && std::io::stderr().is_terminal() && elapsed > Duration::from_secs(1)
        {
            self.bar = Some(self.begin(total));
        }
        if let Some(bar) = &self.bar {
            bar.set_position(done as u64);
            let new = done.saturating_sub(first);
            bar.set_message(pace(self.speed.as_deref(), new, total, done, elapsed));
        }
    }

    /// Says how fast it goes, from the next [`Progress::set`] on.
    pub fn tell(&mut self, speed: impl FnOnce() -> String) {
        if self.bar.is_some() {
            self.speed = Some(speed());
        }
    }

    fn begin(&self, total: usize) -> ProgressBar {
        let of = if total == usize::MAX { "" } else { "/{len}" };
        let (what, unit) = (self.what, self.unit);
        let template = format!("{what} {{wide_bar}} {{pos}}{of} {unit}{{msg}}");
        let style = ProgressStyle::with_template(template.trim_start()).expect("a valid template");
        ProgressBar::with_draw_target(Some(total as u64), ProgressDrawTarget::stderr())
            .with_style(style)
    }

    /// Takes the bar away.
    pub fn clear(&mut self) {
        self.started = None;
        self.speed = None;
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }
}

/// How fast it goes, and how long it takes still, where that can be known: `new` of the `done` have come in the time `elapsed`.
fn pace(speed: Option<&str>, new: usize, total: usize, done: usize, elapsed: Duration) -> String {
    let rate = rate(new as f64, elapsed);
    let mut pace = match speed {
        Some(speed) => format!(", {speed}"),
        None if new > 0 => format!(", {rate:.1}/s"),
        None => String::new(),
    };
    if new > 0 && total != usize::MAX {
        let seconds = (total - done) as f64 / rate;
        let units = [("d", 86_400.0), ("h", 3600.0), ("min", 60.0), ("s", 1.0)];
        // 90 s are more telling than 2 min.
        let unit = units.iter().find(|(_, unit)| seconds >= 2.0 * unit);
        let (name, unit) = unit.unwrap_or(&("s", 1.0));
        pace += &format!(", {:.0} {name} left", (seconds / unit).ceil());
    }
    pace
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

/// Bytes per second that the machine's threads read from memory: measured once per machine and thread
/// count (about 0.2 s), then remembered in the user's cache folder. `seen`: what was just reached; more
/// than is remembered means that the machine was busy when it was measured, so it is measured again.
pub fn bandwidth(machine: &Machine, seen: f64) -> f64 {
    let name = format!("bandwidth-{}", machine.pool.threads());
    remembered(&name, seen, || machine.read_bandwidth())
}

/// Products of int8 per second ([`Machine::int8_peak`]), remembered like [`bandwidth`].
pub fn int8_peak(machine: &Machine, seen: f64) -> f64 {
    let (tier, threads) = (machine.kernels.tier().name(), machine.pool.batch_threads());
    let name = format!("int8-{tier}-{threads}");
    remembered(&name, seen, || machine.int8_peak())
}

/// What is known under `name`, measured anew if nothing is or if more than it was seen.
fn remembered(name: &str, seen: f64, measure: impl FnOnce() -> f64) -> f64 {
    let file = cache_folder().map(|dir| dir.join(name));
    let known = file
        .as_ref()
        .and_then(|f| std::fs::read_to_string(f).ok())
        .and_then(|text| text.trim().parse().ok())
        .filter(|b: &f64| b.is_finite() && *b > 0.0);
    if let Some(known) = known.filter(|known| *known >= seen) {
        return known;
    }
    let best = measure().max(known.unwrap_or(0.0));
    if let Some(file) = file {
        // Without a cache folder it is measured again next time; no reason to trouble the user.
        let _ = file.parent().map(std::fs::create_dir_all);
        let _ = std::fs::write(file, format!("{best}\n"));
    }
    best
}

/// `$XDG_CACHE_HOME/octet` or `~/.cache/octet`.
pub(super) fn cache_folder() -> Option<PathBuf> {
    user_folder("XDG_CACHE_HOME", ".cache")
}

/// `$XDG_STATE_HOME/octet` or `~/.local/state/octet`, where the history of the chat lies.
pub fn state_folder() -> Option<PathBuf> {
    user_folder("XDG_STATE_HOME", ".local/state")
}

fn user_folder(variable: &str, below_home: &str) -> Option<PathBuf> {
    let set = |name: &str| {
        std::env::var_os(name)
            .filter(|v| !v.is_empty())
            .map(PathBuf::from)
    };
    let base = set(variable).filter(|p| p.is_absolute());
    let home = || set("HOME").or_else(|| set("USERPROFILE"));
    Some(
        base.or_else(|| Some(home()?.join(below_home)))?
            .join("octet"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pace_is_told_where_it_is_known() {
        let second = Duration::from_secs(1);
        // Nothing has come yet: nobody knows how long it takes.
        assert_eq!(pace(None, 0, 400, 160, second), "");
        assert_eq!(pace(Some("9.0 tok/s"), 0, 400, 0, second), ", 9.0 tok/s");
        // 10 in 2 seconds; what was done before says nothing.
        assert_eq!(pace(None, 10, 400, 160, 2 * second), ", 5.0/s, 48 s left");
        assert_eq!(
            pace(Some("9.0 tok/s"), 1, 400, 1, 10 * second),
            ", 9.0 tok/s, 67 min left"
        );
        assert_eq!(
            pace(Some("9.0 tok/s"), 5, usize::MAX, 5, second),
            ", 9.0 tok/s"
        );
        assert_eq!(pace(None, 1, 250_001, 1, second), ", 1.0/s, 3 d left");
        assert_eq!(pace(None, 4, 5, 4, second), ", 4.0/s, 1 s left");
    }
}
