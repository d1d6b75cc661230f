//! Pictures of a routing profile: a row for each layer, a column for each expert, reuse and recall beside them.

mod svg;

use crate::chat::repl::styled;
use crate::moe::Profile;
use crate::readable::for_terminal;
use plotters::style::colors::colormaps::ViridisRGB;
use plotters::style::{BLACK, RGBColor, WHITE};
use std::io::IsTerminal;

pub(super) use svg::svg;

/// What a terminal can show.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Colours {
    /// None, or nobody wants them: characters.
    None,
    /// 256 of them, numbered.
    Palette,
    /// 24 bits.
    True,
}

impl Colours {
    /// What standard output shows.
    pub(super) fn of_stdout() -> Colours {
        let says = |name: &str, words: &[&str]| {
            let value = std::env::var(name).unwrap_or_default();
            words.iter().any(|word| value.contains(word))
        };
        if !styled() {
            Colours::None
        } else if says("COLORTERM", &["truecolor", "24bit"]) || says("TERM", &["direct"]) {
            Colours::True
        } else if says("TERM", &["256color"]) {
            Colours::Palette
        } else {
            Colours::None
        }
    }

    /// A text of one cell on its colour.
    fn cell(self, heat: f64, text: &str) -> String {
        let RGBColor(r, g, b) = colour(heat);
        let dark = ink(heat) == WHITE;
        match self {
            Colours::None => text.to_string(),
            Colours::Palette => {
                // 16 + 36 r + 6 g + b, six levels of each (xterm, ctlseqs.txt).
                let level = |c: u8| (u32::from(c) * 5 + 127) / 255;
                let paper = 16 + 36 * level(r) + 6 * level(g) + level(b);
                let ink = if dark { 231 } else { 16 };
                format!("\x1b[48;5;{paper};38;5;{ink}m{text}\x1b[0m")
            }
            Colours::True => {
                let ink = if dark { "255;255;255" } else { "0;0;0" };
                format!("\x1b[48;2;{r};{g};{b};38;2;{ink}m{text}\x1b[0m")
            }
        }
    }

    /// A bar of at most `width` cells.
    fn bar(self, share: f64, width: usize) -> String {
        /// Eighths of a cell.
        const PARTS: [&str; 8] = ["", "▏", "▎", "▍", "▌", "▋", "▊", "▉"];
        let eighths = (share * width as f64 * 8.0).round() as usize;
        let bar = match self {
            Colours::None => "#".repeat((eighths + 4) / 8),
            _ => "█".repeat(eighths / 8) + PARTS[eighths % 8],
        };
        format!("{bar:<width$}")
    }
}

/// How hot a share of tokens is, 0 to 1: even routing is in the middle, so that pictures of different models compare.
fn heat(profile: &Profile, share: f64) -> f64 {
    (share / hottest(profile)).clamp(0.0, 1.0)
}

/// The share from which on cells have the brightest colour: twice that of even routing.
fn hottest(profile: &Profile) -> f64 {
    (2.0 * even(profile)).min(1.0)
}

/// The share of tokens that an expert gets, and of choices that are repeated, if all are alike.
fn even(profile: &Profile) -> f64 {
    profile.n_used as f64 / profile.n_expert as f64
}

/// Viridis: brighter is more, in every kind of colour blindness too (van der Walt and Smith, 2015).
fn colour(heat: f64) -> RGBColor {
    ViridisRGB::get_color(heat)
}

/// What is readable on it.
fn ink(heat: f64) -> RGBColor {
    if heat < 0.6 { WHITE } else { BLACK }
}

/// Columns of the terminal; 80 where there is none.
pub(super) fn width() -> usize {
    let out = std::io::stdout();
    let size = terminal_size::terminal_size_of(&out).filter(|_| out.is_terminal());
    size.map_or(80, |(width, _)| usize::from(width.0))
}

/// Characters where there are no colours, from never to often.
const SHADES: [char; 10] = [' ', '.', ':', '-', '=', '+', '*', '#', '%', '@'];

/// Columns of a share in numbers.
const NUMBER: usize = 5;

/// The picture for a terminal of `width` columns: with numbers in the cells if they fit.
pub(super) fn terminal(profile: &Profile, width: usize, colours: Colours) -> String {
    let cells = 5 + (1 + NUMBER) * profile.n_expert;
    let bar = width.saturating_sub(cells + 2 * (3 + NUMBER)) / 2;
    let mut picture = match bar {
        0..=2 => narrow(profile, width, colours),
        bar => wide(profile, bar.min(20), colours),
    };
    if bar <= 2 || colours != Colours::None {
        picture += &format!("\n{}", scale(profile, width, colours));
    }
    let name = for_terminal(&profile.name);
    let head = format!(
        "{name}: {} layers of {} experts, {} for each token; {} tokens",
        profile.n_layer, profile.n_expert, profile.n_used, profile.tokens
    );
    let chance = percent(even(profile));
    let recall = match profile.mean_recall() {
        Some(share) => format!(
            ". Recall: choices foreseen one layer ahead; {} on average",
            percent(share)
        ),
        None => String::new(),
    };
    let reuse = percent(profile.mean_reuse());
    let foot = format!(
        "Cells: tokens that take the expert; {chance} if all are alike. Reuse: choices that the token before made too; \
         {reuse} on average, {chance} if all are alike{recall}."
    );
    let (head, foot) = (wrapped(&head, width), wrapped(&foot, width));
    format!("{head}\n{picture}\n{foot}")
}

/// With numbers, and bars of `bar` columns.
fn wide(profile: &Profile, bar: usize, colours: Colours) -> String {
    let names: String = (0..profile.n_expert)
        .map(|e| format!(" {e:>NUMBER$}"))
        .collect();
    let side = bar + 1 + NUMBER;
    let mut out = format!("layer{names}  {:side$}  recall\n", "reuse");
    for layer in 0..profile.n_layer {
        let cell = |e| {
            let share = f64::from(profile.share(layer, e));
            let number = format!("{:>NUMBER$.1}", 100.0 * share);
            format!(" {}", colours.cell(heat(profile, share), &number))
        };
        let cells: String = (0..profile.n_expert).map(cell).collect();
        let shares = [Some(profile.reuse[layer]), profile.recall[layer]];
        let side = |share: f64| {
            let number = percent(share);
            format!("  {} {number:<NUMBER$}", colours.bar(share, bar))
        };
        let sides: String = shares.into_iter().flatten().map(side).collect();
        out += &format!("{layer:>5}{cells}{}\n", sides.trim_end_matches(' '));
    }
    out
}

/// With cells of one or two characters. Experts that do not fit beside each other stand below each other.
fn narrow(profile: &Profile, width: usize, colours: Colours) -> String {
    let label = (profile.n_layer - 1).to_string().len().max(2);
    let room = width.saturating_sub(label + 1 + 8).max(1);
    let n = profile.n_expert;
    let cell = if 2 * n <= room { 2 } else { 1 };
    let experts: Vec<usize> = (0..n).collect();
    let mut out = String::new();
    for experts in experts.chunks(room / cell) {
        let names = experts.iter().map(|e| format!("{:<cell$}", e % 10));
        let names: String = names.collect();
        out += &format!("{:label$} {names} use rec\n", "");
        for layer in 0..profile.n_layer {
            let one = |e: &usize| {
                let heat = heat(profile, f64::from(profile.share(layer, *e)));
                let shade = match colours {
                    Colours::None => SHADES[(9.0 * heat).round() as usize],
                    _ => ' ',
                };
                colours.cell(heat, &shade.to_string().repeat(cell))
            };
            let cells: String = experts.iter().map(one).collect();
            let shares = [Some(profile.reuse[layer]), profile.recall[layer]];
            let number = |share: f64| format!(" {:>3.0}", 100.0 * share);
            let sides: String = shares.into_iter().flatten().map(number).collect();
            out += &format!("{layer:>label$} {cells}{sides}\n");
        }
    }
    out
}

/// What the colours, or the characters, mean.
fn scale(profile: &Profile, width: usize, colours: Colours) -> String {
    let top = format!(
        "{}{}",
        percent(hottest(profile)),
        if hottest(profile) < 1.0 { "+" } else { "" }
    );
    let steps = width.saturating_sub(2 + 1 + 1 + top.len()).clamp(1, 40);
    let step = |i: usize| {
        let heat = i as f64 / (steps - 1).max(1) as f64;
        let shade = match colours {
            Colours::None => SHADES[(9.0 * heat).round() as usize],
            _ => ' ',
        };
        colours.cell(heat, &shade.to_string())
    };
    let steps: String = (0..steps).map(step).collect();
    format!("0% {steps} {top}\n")
}

fn percent(share: f64) -> String {
    format!("{:.0}%", 100.0 * share)
}

/// Lines of at most `width` characters, broken between words.
fn wrapped(text: &str, width: usize) -> String {
    let mut out = String::new();
    let mut column = 0;
    for word in text.split(' ') {
        let n = word.chars().count();
        if column > 0 && column + 1 + n > width {
            out.push('\n');
            column = 0;
        } else if column > 0 {
            out.push(' ');
            column += 1;
        }
        out += word;
        column += n;
    }
    out + "\n"
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn profile(n_layer: usize, n_expert: usize) -> Profile {
        let counts: Vec<u64> = (0..n_expert).map(|e| 2 * u64::from(e == 1)).collect();
        let recall = (0..n_layer).map(|l| (l > 0).then_some(1.0));
        let document = json!({
            "format": "octet-profile", "version": 1, "model": "", "name": "a\x1b[31m<b>.gguf",
            "n_layer": n_layer, "n_expert": n_expert, "n_used": 1, "tokens": 2, "counts": vec![counts; n_layer],
            "reuse": vec![0.5; n_layer], "recall": recall.collect::<Vec<_>>(),
        });
        serde_json::from_value(document).unwrap()
    }

    /// A text without the codes of its colours.
    fn plain(text: &str) -> String {
        let mut parts = text.split("\x1b[");
        let first = parts.next().unwrap().to_string();
        parts.fold(first, |out, part| out + part.split_once('m').unwrap().1)
    }

    #[test]
    fn it_fits_every_terminal() {
        for (n_layer, n_expert) in [(1, 2), (4, 8), (32, 8), (120, 8), (3, 64)] {
            let profile = profile(n_layer, n_expert);
            for width in 1..200 {
                for colours in [Colours::None, Colours::Palette, Colours::True] {
                    let text = terminal(&profile, width, colours);
                    assert_eq!(text.contains('\x1b'), colours != Colours::None);
                    let text = plain(&text);
                    let widest = text.lines().map(|l| l.chars().count()).max();
                    // Words of the explanation are not cut.
                    assert!(width < 20 || widest <= Some(width), "{width}:\n{text}");
                    let rows = |layer: usize| {
                        let lines = text.lines().map(str::trim_start);
                        lines.filter(move |l| l.starts_with(&format!("{layer} ")))
                    };
                    assert!(rows(n_layer - 1).count() > 0, "{width}:\n{text}");
                }
            }
        }
    }

    #[test]
    fn colours_and_characters() {
        let profile = profile(2, 8);
        let narrow = terminal(&profile, 20, Colours::None);
        assert!(
            narrow.contains("\n   01234567 use rec\n 0  @        50\n 1  @        50 100\n"),
            "{narrow}"
        );
        let wide = terminal(&profile, 80, Colours::Palette);
        // Viridis ends in (253, 231, 37) and begins with (68, 1, 84).
        assert!(
            wide.contains("\x1b[48;5;227;38;5;16m100.0\x1b[0m"),
            "{wide:?}"
        );
        assert!(
            wide.contains("\x1b[48;5;54;38;5;231m  0.0\x1b[0m"),
            "{wide:?}"
        );
        let exact = terminal(&profile, 80, Colours::True);
        assert!(exact.contains("\x1b[48;2;68;1;84;38;2;255;255;255m  0.0\x1b[0m"));
        assert!(
            exact.starts_with("a\\u{1b}[31m<b>.gguf: 2 layers"),
            "{exact:?}"
        );
        assert!(svg(&profile).contains("&lt;b&gt;"));
    }
}
