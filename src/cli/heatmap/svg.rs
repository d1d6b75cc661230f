//! The picture as SVG, with all numbers in it.

use super::{colour, even, heat, hottest, ink, percent};
use crate::moe::Profile;
use crate::readable::for_terminal;
use plotters::coord::Shift;
use plotters::drawing::DrawingArea;
use plotters::element::{DashedPathElement, Rectangle, Text};
use plotters::prelude::{IntoDrawingArea, SVGBackend};
use plotters::style::text_anchor::{HPos, Pos, VPos};
use plotters::style::{BLACK, Color, IntoFont, RGBColor, TextStyle, WHITE};

/// Sizes of letters; plotters makes them a fifth smaller.
const TITLE: i32 = 18;
const TEXT: i32 = 14;

/// Pixels of a cell, of a bar at 100%, of a line of text; of the room left of the cells and above them.
const CELL: i32 = 44;
const BAR: i32 = 120;
const LINE: i32 = 18;
const LEFT: i32 = 56;
const TOP: i32 = 4 * LINE;

const DRAWN: &str = "a picture in memory can always be drawn";

/// The picture of a profile.
pub(in crate::cli) fn svg(profile: &Profile) -> String {
    let mut out = String::new();
    let picture = Picture::new(profile, &mut out);
    picture.names();
    for layer in 0..profile.n_layer {
        picture.layer(layer);
    }
    picture.evenness();
    picture.scale();
    picture.area.present().expect(DRAWN);
    drop(picture);
    out
}

struct Picture<'a> {
    profile: &'a Profile,
    area: DrawingArea<SVGBackend<'a>, Shift>,
    /// Where the bars of reuse and of recall begin.
    bars: [i32; 2],
    /// Where the rows of the layers end.
    bottom: i32,
}

impl<'a> Picture<'a> {
    fn new(profile: &'a Profile, out: &'a mut String) -> Picture<'a> {
        let first = LEFT + profile.n_expert as i32 * CELL + 24;
        // A number stands behind a bar.
        let bars = [first, first + BAR + 56];
        let bottom = TOP + profile.n_layer as i32 * LINE;
        let size = (bars[1] + BAR + 56, bottom + 3 * LINE);
        let backend = SVGBackend::with_string(out, (size.0 as u32, size.1 as u32));
        let area = backend.into_drawing_area();
        area.fill(&WHITE).expect(DRAWN);
        Picture {
            profile,
            area,
            bars,
            bottom,
        }
    }

    fn text(&self, text: impl ToString, at: (i32, i32), h: HPos, size: i32, colour: RGBColor) {
        let style = TextStyle::from(("sans-serif", size).into_font());
        let style = style.color(&colour).pos(Pos::new(h, VPos::Center));
        let text = Text::new(text.to_string(), at, style);
        self.area.draw(&text).expect(DRAWN);
    }

    fn block(&self, from: (i32, i32), to: (i32, i32), colour: RGBColor) {
        let block = Rectangle::new([from, to], colour.filled());
        self.area.draw(&block).expect(DRAWN);
    }

    /// What the picture is of, and the names of its columns.
    fn names(&self) {
        let title = format!(
            "{}: share of {} tokens that take each expert, in percent",
            for_terminal(&self.profile.name),
            self.profile.tokens
        );
        self.text(title, (LEFT, LINE), HPos::Left, TITLE, BLACK);
        let y = TOP - LINE / 2;
        self.text("layer", (LEFT - 8, y), HPos::Right, TEXT, BLACK);
        for e in 0..self.profile.n_expert as i32 {
            let x = LEFT + e * CELL + CELL / 2;
            self.text(e, (x, y), HPos::Center, TEXT, BLACK);
        }
        for (x, name) in self.bars.iter().zip(["reuse", "recall one layer ahead"]) {
            self.text(name, (*x, y), HPos::Left, TEXT, BLACK);
        }
    }

    /// A row: a cell for each expert, and the bars.
    fn layer(&self, layer: usize) {
        let profile = self.profile;
        let y = TOP + layer as i32 * LINE;
        let middle = y + LINE / 2;
        self.text(layer, (LEFT - 8, middle), HPos::Right, TEXT, BLACK);
        for e in 0..profile.n_expert {
            let x = LEFT + e as i32 * CELL;
            let share = f64::from(profile.share(layer, e));
            let heat = heat(profile, share);
            self.block((x, y), (x + CELL - 1, y + LINE - 1), colour(heat));
            let number = format!("{:.1}", 100.0 * share);
            let at = (x + CELL / 2, middle);
            self.text(number, at, HPos::Center, TEXT, ink(heat));
        }
        let shares = [Some(profile.reuse[layer]), profile.recall[layer]];
        for (x, share) in self.bars.into_iter().zip(shares) {
            let Some(share) = share else { continue };
            let end = x + pixels(share);
            self.block((x, y + 3), (end, y + LINE - 4), colour(0.3));
            let at = (end + 4, middle);
            self.text(percent(share), at, HPos::Left, TEXT, BLACK);
        }
    }

    /// How much reuse chance alone gives: a line through the bars.
    fn evenness(&self) {
        let chance = even(self.profile);
        let x = self.bars[0] + pixels(chance);
        let dashes = DashedPathElement::new([(x, TOP), (x, self.bottom)], 3, 3, BLACK);
        self.area.draw(&dashes).expect(DRAWN);
        let text = format!("{} if all are alike", percent(chance));
        let at = (x, self.bottom + LINE / 2);
        self.text(text, at, HPos::Center, TEXT, BLACK);
    }

    /// The colours' meaning.
    fn scale(&self) {
        let steps = self.profile.n_expert as i32 * CELL / 4;
        let (y, end) = (self.bottom + LINE, self.bottom + 2 * LINE - 6);
        for i in 0..steps {
            let x = LEFT + 2 * i;
            let heat = f64::from(i) / f64::from(steps - 1);
            self.block((x, y), (x + 2, end), colour(heat));
        }
        let more = format!("0 to {} or more", percent(hottest(self.profile)));
        let at = (LEFT + 2 * steps + 8, y + LINE / 2 - 3);
        self.text(more, at, HPos::Left, TEXT, BLACK);
    }
}

/// The length of a bar.
fn pixels(share: f64) -> i32 {
    (share * f64::from(BAR)).round() as i32
}
