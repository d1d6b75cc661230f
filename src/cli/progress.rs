//! A progress bar that fits every terminal.

use crate::chat::session::rate;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::io::IsTerminal;
use std::time::{Duration, Instant};

/// A progress bar for work that may take longer than a second; shown after the first second, on a
/// terminal, on stderr.
pub(super) struct Progress {
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
    pub(super) fn new(what: &'static str) -> Progress {
        Progress::of(what, "tokens")
    }

    /// A bar that counts something else; its speed is what [`Progress::tell`] says. `what` may be empty, where the line is
    /// long.
    pub(super) fn of(what: &'static str, unit: &'static str) -> Progress {
        Progress {
            started: None,
            what,
            unit,
            speed: None,
            bar: None,
        }
    }

    /// `done` of `total` are done; nobody knows how many there are of `usize::MAX`.
    pub(super) fn set(&mut self, done: usize, total: usize) {
        if done >= total {
            return self.clear();
        }
        let (began, first) = *self.started.get_or_insert_with(|| (Instant::now(), done));
        let elapsed = began.elapsed();
        if self.bar.is_none() && std::io::stderr().is_terminal() && elapsed > Duration::from_secs(1)
        {
            self.bar = Some(begin());
        }
        if let Some(bar) = &self.bar {
            let work = Work {
                done,
                total,
                new: done.saturating_sub(first),
                elapsed,
            };
            // One column less: some terminals go on to the next line when one is full.
            let width = terminal_size::terminal_size_of(std::io::stderr());
            let width = width.map_or(80, |(width, _)| usize::from(width.0));
            let width = width.saturating_sub(1);
            bar.set_message(work.line(width, self.what, self.unit, self.speed.as_deref()));
        }
    }

    /// Says how fast it goes, from the next [`Progress::set`] on.
    pub(super) fn tell(&mut self, speed: impl FnOnce() -> String) {
        if self.bar.is_some() {
            self.speed = Some(speed());
        }
    }

    /// Takes the bar away.
    pub(super) fn clear(&mut self) {
        self.started = None;
        self.speed = None;
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }
}

/// A line on stderr that is drawn again and again; what stands in it is ours.
fn begin() -> ProgressBar {
    let style = ProgressStyle::with_template("{msg}").expect("a valid template");
    ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr()).with_style(style)
}

/// How far the work has come: `new` of the `done` in the time `elapsed`.
struct Work {
    done: usize,
    /// `usize::MAX`: nobody knows.
    total: usize,
    new: usize,
    elapsed: Duration,
}

impl Work {
    /// The line for a terminal of `width` columns: what is to be told, a bar, numbers. Where not all of it fits, the bar goes first,
    /// then the words, the speed, the unit and the time that is left.
    fn line(&self, width: usize, what: &str, unit: &str, speed: Option<&str>) -> String {
        /// A shorter bar says nothing.
        const BAR: usize = 5;
        let count = match self.total {
            usize::MAX => self.done.to_string(),
            total => format!("{}/{total}", self.done),
        };
        let speed = self
            .speed(speed)
            .map_or(String::new(), |s| format!(", {s}"));
        let left = self.left().map_or(String::new(), |s| format!(", {s}"));
        let figures = format!("{count} {unit}{speed}{left}");
        let known = self.total != usize::MAX;
        let space = if what.is_empty() { "" } else { " " };
        let words = format!("{what}{space}");
        let taken = words.chars().count() + 1 + figures.chars().count();
        if known && taken + BAR <= width {
            let cells = width - taken;
            let full = (cells as u128 * self.done as u128 / self.total as u128) as usize;
            let (full, empty) = ("█".repeat(full), "░".repeat(cells - full));
            return format!("{words}{full}{empty} {figures}");
        }
        let shorter = [
            format!("{words}{figures}"),
            figures,
            format!("{count} {unit}{left}"),
            format!("{count}{left}"),
        ];
        let fits = |line: &String| line.chars().count() <= width;
        let line = shorter.into_iter().find(fits).unwrap_or(count);
        line.chars().take(width).collect()
    }

    /// How fast it goes.
    fn speed(&self, told: Option<&str>) -> Option<String> {
        match told {
            Some(speed) => Some(speed.to_string()),
            None if self.new > 0 => Some(format!("{:.1}/s", rate(self.new as f64, self.elapsed))),
            None => None,
        }
    }

    /// How long it takes still, where that can be known.
    fn left(&self) -> Option<String> {
        if self.new == 0 || self.total == usize::MAX {
            return None;
        }
        let rate = rate(self.new as f64, self.elapsed);
        let seconds = (self.total - self.done) as f64 / rate;
        let units = [("d", 86_400.0), ("h", 3600.0), ("min", 60.0), ("s", 1.0)];
        // 90 s are more telling than 2 min.
        let unit = units.iter().find(|(_, unit)| seconds >= 2.0 * unit);
        let (name, unit) = unit.unwrap_or(&("s", 1.0));
        Some(format!("{:.0} {name} left", (seconds / unit).ceil()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn work(new: usize, total: usize, done: usize, seconds: u64) -> Work {
        Work {
            done,
            total,
            new,
            elapsed: Duration::from_secs(seconds),
        }
    }

    #[test]
    fn a_pace_is_told_where_it_is_known() {
        let pace = |speed, new, total, done, seconds| {
            let work = work(new, total, done, seconds);
            let parts = [work.speed(speed), work.left()];
            parts.into_iter().flatten().collect::<Vec<_>>().join(", ")
        };
        // Nothing has come yet: nobody knows how long it takes.
        assert_eq!(pace(None, 0, 400, 160, 1), "");
        assert_eq!(pace(Some("9.0 tok/s"), 0, 400, 0, 1), "9.0 tok/s");
        // 10 in 2 seconds; what was done before says nothing.
        assert_eq!(pace(None, 10, 400, 160, 2), "5.0/s, 48 s left");
        assert_eq!(
            pace(Some("9.0 tok/s"), 1, 400, 1, 10),
            "9.0 tok/s, 67 min left"
        );
        assert_eq!(pace(Some("9.0 tok/s"), 5, usize::MAX, 5, 1), "9.0 tok/s");
        assert_eq!(pace(None, 1, 250_001, 1, 1), "1.0/s, 3 d left");
        assert_eq!(pace(None, 4, 5, 4, 1), "4.0/s, 1 s left");
    }

    #[test]
    fn the_line_fits_every_terminal() {
        let line = |width| work(100, 400, 100, 10).line(width, "reading", "tokens", None);
        for (width, want) in [
            (51, "reading ██░░░░░░░ 100/400 tokens, 10.0/s, 30 s left"),
            (47, "reading █░░░░ 100/400 tokens, 10.0/s, 30 s left"),
            (46, "reading 100/400 tokens, 10.0/s, 30 s left"),
            (40, "100/400 tokens, 10.0/s, 30 s left"),
            (30, "100/400 tokens, 30 s left"),
            (20, "100/400, 30 s left"),
            (10, "100/400"),
            (3, "100"),
            (0, ""),
        ] {
            assert_eq!(line(width), want);
            assert!(want.chars().count() <= width);
        }
        // Of a pipe nobody knows how much there is.
        let line = work(7, usize::MAX, 7, 1).line(60, "", "prompts", Some("9.0 tok/s"));
        assert_eq!(line, "7 prompts, 9.0 tok/s");
    }
}
