//! Latency against tokens per rank, as SVG: dispatch and combine side by side on the same scales.

use std::collections::BTreeMap;
use std::fmt::{self, Display};

use super::lines::{Measured, Shape, Time};

const WIDTH: f64 = 900.0;
const LEFT: f64 = 78.0;
const RIGHT: f64 = 20.0;
/// Between the panels; the right one's numbers stand there.
const GAP: f64 = 56.0;
const PANEL: (f64, f64) = ((WIDTH - LEFT - RIGHT - GAP) / 2.0, 320.0);
/// Between a panel's frame and its outermost points.
const INSET: f64 = 16.0;
/// Under the panels, for the tokens.
const BELOW: f64 = 62.0;
/// The first row of the legend, and the distance of rows.
const LEGEND: (f64, f64) = (88.0, 24.0);
/// A symbol of the legend with the space behind it, the space behind a label, and the width of one of
/// its characters, which only the reader's font knows: rather too much.
const ENTRY: (f64, f64, f64) = (38.0, 24.0, 8.5);
/// Least distance of two numbers on the axis of tokens.
const NUMBERS: f64 = 38.0;

/// The background is solid, so that a page's own does not matter.
const STYLE: &str = "\
text { font: 14px Helvetica, Arial, sans-serif; fill: #222 }
.title { font-size: 19px; font-weight: bold }
.panel { font-size: 16px; font-weight: bold }
.line { fill: none; stroke-linejoin: round }
.band { fill-opacity: 0.2 }
.grid { stroke: #e2e2e2 }
.frame { fill: none; stroke: #999 }
.floor { fill: none; stroke: #555; stroke-width: 2; stroke-dasharray: 8 5 }
.empty { fill: none; stroke: #555; stroke-dasharray: 2 3 }";

/// Colours that colour-blind readers too tell apart, and as many markers as differ clearly.
const COLOURS: [&str; 7] = [
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a5195",
];
const MARKERS: [&str; 4] = [
    "M-4.5 0a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0-9 0z",
    "M-4-4h8v8h-8z",
    "M0-5.5L5.5 4h-11z",
    "M0-5.5L5.5 0L0 5.5L-5.5 0z",
];

/// Draws what was measured of a shape, which is something.
pub(super) fn draw(shape: &Shape, measured: &[Measured]) -> String {
    let figure = Figure::new(measured);
    let legend = figure.legend();
    let rows = legend.last().map_or(0.0, |entry| entry.row + 1.0);
    let top = LEGEND.0 + rows * LEGEND.1 + 26.0;
    let (bottom, height) = (top + PANEL.1, top + PANEL.1 + BELOW);
    let (middle, shape) = ((top + bottom) / 2.0, Escaped(shape));

    let mut svg = Svg::default();
    svg.add(format_args!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height}\" \
         viewBox=\"0 0 {WIDTH} {height}\" role=\"img\">"
    ));
    svg.add(format_args!("<title>EP latency: {shape}</title>"));
    svg.add(format_args!("<style>\n{STYLE}\n</style>"));
    svg.add("<rect width=\"100%\" height=\"100%\" rx=\"8\" fill=\"#fff\"/>");
    svg.text(
        "title",
        "start",
        (LEFT, 34.0),
        "Latency of dispatch and combine",
    );
    svg.text("shape", "start", (LEFT, 60.0), &shape);
    for entry in &legend {
        entry.draw(&mut svg);
    }
    for (name, time, left) in [
        ("dispatch", (|m| &m.dispatch) as Operation, LEFT),
        ("combine", |m| &m.combine, LEFT + PANEL.0 + GAP),
    ] {
        let panel = Panel {
            time,
            tokens: figure.tokens(left),
            us: figure.us(bottom),
        };
        svg.add(format_args!("<g id=\"{name}\">"));
        svg.text("panel", "start", (left, top - 10.0), name);
        panel.draw(&mut svg, &figure);
        svg.add("</g>");
    }
    svg.add(format_args!(
        "<text transform=\"translate(22 {middle}) rotate(-90)\" text-anchor=\"middle\">\
         µs, median of the slowest rank</text>"
    ));
    svg.add("</svg>");
    svg.0
}

type Operation = fn(&Measured) -> &Time;

/// What was measured, by library and tokens.
struct Figure<'a> {
    /// This one first, the others as they come.
    libs: Vec<Lib<'a>>,
    /// All, by tokens.
    measured: Vec<&'a Measured>,
}

struct Lib<'a> {
    name: &'a str,
    colour: &'static str,
    marker: &'static str,
    measured: Vec<&'a Measured>,
}

impl<'a> Figure<'a> {
    fn new(measured: &'a [Measured]) -> Self {
        let mut measured: Vec<&Measured> = measured.iter().collect();
        let mut names: Vec<&str> = Vec::new();
        for one in &measured {
            if !names.contains(&one.lib.as_str()) {
                names.push(&one.lib);
            }
        }
        names.sort_by_key(|&name| name != "ep");
        measured.sort_by_key(|one| one.tokens);
        let lib = |(place, name)| Lib {
            name,
            colour: COLOURS[place % COLOURS.len()],
            marker: MARKERS[place % MARKERS.len()],
            measured: measured
                .iter()
                .copied()
                .filter(|one| one.lib == name)
                .collect(),
        };
        Self {
            libs: names.into_iter().enumerate().map(lib).collect(),
            measured,
        }
    }

    /// What does not depend on the library, from the first line at each number of tokens that has it.
    fn common(&self, value: impl Fn(&Measured) -> Option<f64>) -> Vec<(f64, f64)> {
        let mut values = BTreeMap::new();
        for one in &self.measured {
            // Nothing is nowhere on a logarithmic scale.
            if let Some(value) = value(one).filter(|&value| value > 0.0) {
                values.entry(one.tokens).or_insert(value);
            }
        }
        values
            .into_iter()
            .map(|(tokens, value)| (tokens as f64, value))
            .collect()
    }

    fn legend(&self) -> Vec<Entry<'_>> {
        let libs = self.libs.iter().map(|lib| (lib.name, Symbol::Lib(lib)));
        let times = || self.measured.iter().flat_map(|m| [m.dispatch, m.combine]);
        let band = times().any(|time| time.p99.is_some());
        let floor = times().any(|time| time.floor.is_some());
        let empty = self.measured.iter().any(|m| m.empty_us.is_some());
        let others = [
            (band, "up to p99", Symbol::Band),
            (floor, "wire floor", Symbol::Class("floor")),
            (empty, "empty kernel", Symbol::Class("empty")),
        ];
        let others = others
            .into_iter()
            .filter_map(|(is_there, label, symbol)| is_there.then_some((label, symbol)));
        let (mut x, mut row) = (LEFT, 0.0);
        libs.chain(others)
            .map(|(label, symbol)| {
                let width = ENTRY.0 + ENTRY.2 * label.chars().count() as f64;
                if x + width > WIDTH - RIGHT && x > LEFT {
                    (x, row) = (LEFT, row + 1.0);
                }
                let entry = Entry {
                    label,
                    symbol,
                    x,
                    row,
                };
                x += width + ENTRY.1;
                entry
            })
            .collect()
    }

    /// The scale of tokens in a panel.
    fn tokens(&self, left: f64) -> Scale {
        let tokens = || self.measured.iter().map(|one| one.tokens as f64);
        let (least, most) = range(tokens());
        // A single number of tokens stands in the middle.
        let (least, most) = if least < most {
            (least, most)
        } else {
            (least / 2.0, most * 2.0)
        };
        let mut numbers: Vec<f64> = tokens().collect();
        numbers.dedup();
        Scale {
            values: (least, most),
            pixels: (left + INSET, left + PANEL.0 - INSET),
            numbers,
        }
    }

    /// The scale of times: from a round number to a round number.
    fn us(&self, bottom: f64) -> Scale {
        let times = self.measured.iter().flat_map(|one| {
            let of = |time: Time| [Some(time.median), time.p99];
            [of(one.dispatch), of(one.combine), [one.empty_us, None]]
        });
        let (least, most) = range(times.flatten().flatten().filter(|&us| us > 0.0));
        let round =
            |at: i32| [1.0, 2.0, 5.0][at.rem_euclid(3) as usize] * 10f64.powi(at.div_euclid(3));
        let near = |us: f64| 3 * us.log10().floor() as i32;
        let down = (near(least)..near(least) + 4)
            .rev()
            .find(|&at| round(at) <= least);
        let up = (near(most)..near(most) + 4).find(|&at| round(at) >= most);
        let (down, up) = (down.unwrap_or(near(least)), up.unwrap_or(near(most) + 3));
        let up = up.max(down + 1);
        Scale {
            values: (round(down), round(up)),
            pixels: (bottom, bottom - PANEL.1),
            numbers: (down..=up).map(round).collect(),
        }
    }
}

fn range(values: impl Iterator<Item = f64>) -> (f64, f64) {
    values.fold((f64::INFINITY, 0.0), |(least, most), value| {
        (least.min(value), most.max(value))
    })
}

/// A logarithmic scale.
struct Scale {
    values: (f64, f64),
    pixels: (f64, f64),
    /// Where a line is drawn and a number written.
    numbers: Vec<f64>,
}

impl Scale {
    fn at(&self, value: f64) -> f64 {
        let part = (value / self.values.0).log2() / (self.values.1 / self.values.0).log2();
        self.pixels.0 + part * (self.pixels.1 - self.pixels.0)
    }
}

struct Panel {
    time: Operation,
    tokens: Scale,
    us: Scale,
}

impl Panel {
    fn draw(&self, svg: &mut Svg, figure: &Figure<'_>) {
        let (left, top) = (self.tokens.pixels.0 - INSET, self.us.pixels.1);
        let (right, bottom) = (left + PANEL.0, self.us.pixels.0);
        for &us in &self.us.numbers {
            let y = self.us.at(us);
            svg.add(format_args!(
                "<path class=\"grid\" d=\"M{left} {y:.2}H{right}\"/>"
            ));
            svg.text("us", "end", (left - 8.0, y + 5.0), us);
        }
        let mut free = left;
        for &tokens in &self.tokens.numbers {
            let x = self.tokens.at(tokens);
            svg.add(format_args!(
                "<path class=\"grid\" d=\"M{x:.2} {top}V{bottom}\"/>"
            ));
            if x >= free {
                svg.text("tokens", "middle", (x, bottom + 22.0), tokens);
                free = x + NUMBERS;
            }
        }
        let middle = f64::midpoint(left, right);
        svg.text("axis", "middle", (middle, bottom + 46.0), "tokens per rank");

        // The floor of few tokens is far below any time.
        let (width, height) = PANEL;
        svg.add(format_args!(
            "<svg x=\"{left}\" y=\"{top}\" width=\"{width}\" height=\"{height}\" \
             viewBox=\"{left} {top} {width} {height}\">"
        ));
        let floor = figure.common(|one| (self.time)(one).floor);
        svg.line("class=\"floor\"", &self.points(floor));
        let empty = figure.common(|one| one.empty_us);
        svg.line("class=\"empty\"", &self.points(empty));
        svg.add("</svg>");
        // The first library is drawn last, over the others.
        for lib in figure.libs.iter().rev() {
            self.lib(svg, lib);
        }
        svg.add(format_args!(
            "<rect class=\"frame\" x=\"{left}\" y=\"{top}\" width=\"{width}\" height=\"{height}\"/>"
        ));
    }

    fn lib(&self, svg: &mut Svg, lib: &Lib<'_>) {
        let Lib {
            name,
            colour,
            marker,
            measured,
        } = lib;
        let time = |one: &Measured| (one.tokens as f64, *(self.time)(one));
        let times = || measured.iter().map(|one| time(one));
        let medians: Vec<_> = times()
            .map(|(tokens, time)| (tokens, time.median))
            .collect();
        let p99 = times().filter_map(|(tokens, time)| Some((tokens, time.median, time.p99?)));
        let mut band: Vec<_> = p99
            .clone()
            .map(|(tokens, median, _)| (tokens, median))
            .collect();
        let upper: Vec<_> = p99.map(|(tokens, _, p99)| (tokens, p99)).collect();
        band.extend(upper.into_iter().rev());
        if !band.is_empty() {
            svg.add(format_args!(
                "<polygon class=\"band\" fill=\"{colour}\" points=\"{}\"/>",
                self.points(band)
            ));
        }
        let medians = self.points(medians);
        svg.line(
            format_args!(
                "class=\"line\" data-lib=\"{}\" stroke=\"{colour}\" stroke-width=\"{}\"",
                Escaped(name),
                lib.width()
            ),
            &medians,
        );
        for (x, y) in &medians.0 {
            svg.add(format_args!(
                "<path d=\"{marker}\" transform=\"translate({x:.2} {y:.2})\" fill=\"{colour}\"/>"
            ));
        }
    }

    fn points(&self, values: Vec<(f64, f64)>) -> Points {
        let place = |(tokens, us)| (self.tokens.at(tokens), self.us.at(us));
        Points(values.into_iter().map(place).collect())
    }
}

impl Lib<'_> {
    fn width(&self) -> f64 {
        if self.name == "ep" { 3.0 } else { 2.0 }
    }
}

struct Entry<'a> {
    label: &'a str,
    symbol: Symbol<'a>,
    x: f64,
    row: f64,
}

#[derive(Clone, Copy)]
enum Symbol<'a> {
    Lib(&'a Lib<'a>),
    Band,
    /// A line.
    Class(&'static str),
}

impl Entry<'_> {
    fn draw(&self, svg: &mut Svg) {
        let (x, y) = (self.x, LEGEND.0 + self.row * LEGEND.1);
        let line = Points(vec![(x, y), (x + 30.0, y)]);
        match self.symbol {
            Symbol::Lib(lib) => {
                let (colour, width, marker) = (lib.colour, lib.width(), lib.marker);
                svg.line(
                    format_args!("stroke=\"{colour}\" stroke-width=\"{width}\""),
                    &line,
                );
                svg.add(format_args!(
                    "<path d=\"{marker}\" transform=\"translate({} {y})\" fill=\"{colour}\"/>",
                    x + 15.0
                ));
            }
            Symbol::Band => svg.add(format_args!(
                "<rect class=\"band\" x=\"{x}\" y=\"{}\" width=\"30\" height=\"12\"/>",
                y - 6.0
            )),
            Symbol::Class(class) => svg.line(format_args!("class=\"{class}\""), &line),
        }
        svg.text(
            "label",
            "start",
            (x + ENTRY.0, y + 5.0),
            Escaped(self.label),
        );
    }
}

/// Elements, one a line.
#[derive(Default)]
struct Svg(String);

impl Svg {
    fn add(&mut self, element: impl Display) {
        self.0.push_str(&element.to_string());
        self.0.push('\n');
    }

    fn text(&mut self, class: &str, anchor: &str, (x, y): (f64, f64), content: impl Display) {
        self.add(format_args!(
            "<text class=\"{class}\" text-anchor=\"{anchor}\" x=\"{x:.2}\" y=\"{y:.2}\">{content}</text>"
        ));
    }

    fn line(&mut self, attributes: impl Display, points: &Points) {
        if !points.0.is_empty() {
            self.add(format_args!("<polyline {attributes} points=\"{points}\"/>"));
        }
    }
}

struct Points(Vec<(f64, f64)>);

impl Display for Points {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, (x, y)) in self.0.iter().enumerate() {
            let space = if at == 0 { "" } else { " " };
            write!(f, "{space}{x:.2},{y:.2}")?;
        }
        Ok(())
    }
}

/// As text or the value of an attribute.
struct Escaped<T>(T);

impl<T: Display> Display for Escaped<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = self.0.to_string();
        f.write_str(
            &text
                .replace('&', "&amp;")
                .replace('<', "&lt;")
                .replace('"', "&quot;"),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::super::lines;
    use super::super::lines::tests::{PEER, US};
    use super::*;

    /// A line like `line`, at other tokens and with other times.
    fn at(line: &str, tokens: u64, dispatch_us: f64, p99_us: f64) -> String {
        line.replace("\"tokens\":8", &format!("\"tokens\":{tokens}"))
            .replace("\"tokens\": 8", &format!("\"tokens\":{tokens}"))
            .replace("11.8", &dispatch_us.to_string())
            .replace("40.1", &dispatch_us.to_string())
            .replace("12.2", &p99_us.to_string())
    }

    fn drawn(lines: &[String]) -> String {
        let measured = lines::read("test", &lines.join("\n")).unwrap();
        draw(&measured[0].shape, &measured)
    }

    fn panel<'a>(svg: &'a str, id: &str) -> &'a str {
        let (_, rest) = svg.split_once(&format!("<g id=\"{id}\">")).unwrap();
        rest.split_once("</g>").unwrap().0
    }

    fn attribute<'a>(element: &'a str, name: &str) -> &'a str {
        let (_, rest) = element.split_once(&format!(" {name}=\"")).unwrap();
        rest.split_once('"').unwrap().0
    }

    fn number(element: &str, name: &str) -> f64 {
        attribute(element, name).parse().unwrap()
    }

    /// The points of the element that has `what` in it, if it is there.
    fn points(svg: &str, what: &str) -> Option<Vec<(f64, f64)>> {
        let element = svg.lines().find(|element| element.contains(what))?;
        let point = |point: &str| {
            let (x, y) = point.split_once(',').unwrap();
            (x.parse().unwrap(), y.parse().unwrap())
        };
        Some(attribute(element, "points").split(' ').map(point).collect())
    }

    /// Each number on an axis, and where it stands.
    fn numbers(panel: &str, axis: &str) -> Vec<(f64, f64)> {
        let class = format!("<text class=\"{axis}\"");
        let numbers = panel.lines().filter(|element| element.starts_with(&class));
        numbers
            .map(|element| {
                let (_, rest) = element.split_once('>').unwrap();
                let value = rest.split_once('<').unwrap().0.parse().unwrap();
                match axis {
                    "tokens" => (value, number(element, "x")),
                    // The line that the text is written on is below the middle of a number.
                    _ => (value, number(element, "y") - 5.0),
                }
            })
            .collect()
    }

    /// What stands at a place, read off an axis whose numbers are powers of their neighbours.
    fn read_off(numbers: &[(f64, f64)], place: f64) -> f64 {
        let ((value, from), (other, to)) = (numbers[0], numbers[numbers.len() - 1]);
        value * (other / value).powf((place - from) / (to - from))
    }

    fn assert_near(value: f64, expected: f64) {
        assert!((value / expected - 1.0).abs() < 2e-3, "{value} {expected}");
    }

    #[test]
    fn points_can_be_read_off_the_axes() {
        let times = [(1, 11.1), (8, 11.8), (96, 14.0), (512, 34.3)];
        // Not in their order.
        let mut lines: Vec<_> = times.map(|(t, us)| at(US, t, us, us + 1.0)).to_vec();
        lines.reverse();
        lines.push(at(PEER, 64, 40.0, 0.0));
        let svg = drawn(&lines);
        let dispatch = panel(&svg, "dispatch");
        let (tokens, us) = (numbers(dispatch, "tokens"), numbers(dispatch, "us"));
        let ours = points(dispatch, "data-lib=\"ep\"").unwrap();
        assert_eq!(ours.len(), times.len());
        for ((x, y), (expected, time)) in ours.iter().zip(times) {
            assert_near(read_off(&tokens, *x), expected as f64);
            assert_near(read_off(&us, *y), time);
        }
        let (x, y) = points(dispatch, "data-lib=\"deepep_v2\"").unwrap()[0];
        assert_near(read_off(&tokens, x), 64.0);
        assert_near(read_off(&us, y), 40.0);
        let combine = panel(&svg, "combine");
        let tokens = numbers(combine, "tokens");
        for ((x, y), (expected, _)) in points(combine, "data-lib=\"ep\"")
            .unwrap()
            .iter()
            .zip(times)
        {
            assert_near(read_off(&tokens, *x), expected as f64);
            assert_near(read_off(&us, *y), 9.7);
        }
    }

    #[test]
    fn twice_the_tokens_are_always_as_far_apart() {
        let svg = drawn(&[1, 2, 4, 64, 1024].map(|t| at(US, t, 20.0, 21.0)));
        for id in ["dispatch", "combine"] {
            let panel = panel(&svg, id);
            let x: Vec<f64> = points(panel, "data-lib")
                .unwrap()
                .iter()
                .map(|p| p.0)
                .collect();
            let step = x[1] - x[0];
            assert!(step > 10.0, "{step}");
            for (doublings, x_at) in [0.0, 1.0, 2.0, 6.0, 10.0].into_iter().zip(&x) {
                assert!((x_at - x[0] - doublings * step).abs() < 0.1, "{x:?}");
            }
            let (tokens, us) = (numbers(panel, "tokens"), numbers(panel, "us"));
            assert!(tokens.is_sorted_by(|a, b| a.0 < b.0 && a.1 + NUMBERS <= b.1));
            assert!(us.is_sorted_by(|a, b| a.0 < b.0 && a.1 > b.1));
            // 4.6 to 21 µs.
            assert_eq!((us[0].0, us[us.len() - 1].0), (2.0, 50.0));
        }
    }

    #[test]
    fn the_band_is_between_median_and_p99() {
        let svg = drawn(&[
            at(US, 1, 10.0, 20.0),
            at(US, 8, 10.0, 40.0),
            at(PEER, 8, 10.0, 0.0),
        ]);
        let dispatch = panel(&svg, "dispatch");
        let us = numbers(dispatch, "us");
        let band: Vec<f64> = points(dispatch, "class=\"band\"")
            .unwrap()
            .iter()
            .map(|&(_, y)| read_off(&us, y))
            .collect();
        for (value, expected) in band.iter().zip([10.0, 10.0, 40.0, 20.0]) {
            assert_near(*value, expected);
        }
        assert_eq!(dispatch.matches("class=\"band\"").count(), 1);
        let svg = drawn(&[at(PEER, 8, 10.0, 0.0)]);
        assert!(!svg.contains("class=\"band\""));
        assert!(!svg.contains("p99"));
    }

    #[test]
    fn floors_and_the_empty_kernel_have_their_own_lines() {
        let no_floor = at(US, 1, 11.0, 11.0).replace("0.42", "0.0");
        let svg = drawn(&[no_floor, at(US, 8, 11.8, 12.0), at(US, 64, 20.0, 21.0)]);
        let dispatch = panel(&svg, "dispatch");
        let us = numbers(dispatch, "us");
        let floor = points(dispatch, "class=\"floor\"").unwrap();
        assert_eq!(floor.len(), 2);
        assert_near(read_off(&us, floor[0].1), 0.42);
        let combined = points(panel(&svg, "combine"), "class=\"floor\"").unwrap();
        assert_eq!(combined.len(), 3);
        assert_near(read_off(&us, combined[0].1), 0.8);
        for (_, y) in points(dispatch, "class=\"empty\"").unwrap() {
            assert_near(read_off(&us, y), 4.6);
        }
        let svg = drawn(&[PEER.to_owned()]);
        assert!(!svg.contains("class=\"floor\"") && !svg.contains("class=\"empty\""));
    }

    #[test]
    fn the_legend_names_everything_once_without_overlap() {
        let peers = [
            "x",
            "deepep_v2_expand",
            "<&\\\">",
            "a_library_with_a_long_name",
            "y",
            "nccl",
        ];
        let mut lines = peers.map(|name| PEER.replace("deepep_v2", name)).to_vec();
        lines.push(US.to_owned());
        let measured = lines::read("test", &lines.join("\n")).unwrap();
        let figure = Figure::new(&measured);
        let legend = figure.legend();
        let labels: Vec<_> = legend.iter().map(|entry| entry.label).collect();
        assert_eq!(labels[..3], ["ep", "x", "deepep_v2_expand"]);
        assert_eq!(labels[7..], ["up to p99", "wire floor", "empty kernel"]);
        let end = |entry: &Entry<'_>| entry.x + ENTRY.0 + ENTRY.2 * entry.label.len() as f64;
        assert!(legend.iter().all(|entry| end(entry) <= WIDTH - RIGHT));
        for pair in legend.windows(2) {
            let next_row = pair[1].row == pair[0].row + 1.0 && pair[1].x == LEFT;
            let beside = pair[1].row == pair[0].row && pair[1].x > end(&pair[0]);
            assert!(next_row || beside, "{} {}", pair[0].label, pair[1].label);
        }
        let svg = draw(&measured[0].shape, &measured);
        assert!(svg.contains("data-lib=\"&lt;&amp;&quot;>\""));
        let first_panel = number(
            svg.lines().find(|e| e.contains("class=\"panel\"")).unwrap(),
            "y",
        );
        let last_row = LEGEND.0 + legend[9].row * LEGEND.1;
        assert!(first_panel - 16.0 > last_row + 8.0);
    }

    #[test]
    fn a_single_number_of_tokens_stands_in_the_middle() {
        let svg = drawn(&[US.to_owned()]);
        let (x, y) = points(panel(&svg, "dispatch"), "data-lib").unwrap()[0];
        assert_eq!(x, LEFT + PANEL.0 / 2.0);
        assert!(y.is_finite());
    }
}
