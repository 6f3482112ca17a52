//! The page's charts as inline SVG. Colours are CSS classes, so that they follow the reader's light or dark setting.

use std::fmt::Write;

use super::page::escape;
use crate::scaling::Point;
use crate::text;

const WIDTH: f64 = 960.0;

/// Maps values to pixels, and knows round values to mark.
struct Axis {
    low: f64,
    high: f64,
    from: f64,
    to: f64,
    /// Between marks.
    step: f64,
}

impl Axis {
    /// From `low` to `high`, widened to round marks.
    fn round(low: f64, high: f64, from: f64, to: f64) -> Axis {
        let high = if high > low { high } else { low + 1.0 };
        let step = round_step(high - low);
        Axis {
            low: (low / step).floor() * step,
            high: (high / step).ceil() * step,
            from,
            to,
            step,
        }
    }

    /// Exactly from `low` to `high`.
    fn exact(low: f64, high: f64, from: f64, to: f64) -> Axis {
        Axis {
            low,
            high,
            from,
            to,
            step: round_step(high - low),
        }
    }

    fn at(&self, value: f64) -> f64 {
        self.from + (value - self.low) / (self.high - self.low) * (self.to - self.from)
    }

    fn marks(&self) -> Vec<f64> {
        let count = ((self.high - self.low) / self.step).round() as usize;
        (0..=count).map(|i| self.low + i as f64 * self.step).collect()
    }

    /// As many decimals as the marks differ in.
    fn label(&self, value: f64) -> String {
        let decimals = (-self.step.log10()).ceil().max(0.0) as usize;
        format!("{value:.decimals$}")
    }
}

/// 1, 2 or 5 times a power of ten; about six of them in `span`.
fn round_step(span: f64) -> f64 {
    let rough = span / 6.0;
    let power = 10f64.powf(rough.log10().floor());
    [1.0, 2.0, 5.0]
        .into_iter()
        .map(|factor| factor * power)
        .find(|step| *step >= rough)
        .unwrap_or(10.0 * power)
}

fn svg(height: f64, label: &str, content: &str) -> String {
    format!(
        "<svg viewBox=\"0 0 {WIDTH} {height:.0}\" role=\"img\" aria-label=\"{}\">\n{content}</svg>\n",
        escape(label)
    )
}

fn line(out: &mut String, class: &str, (x1, y1): (f64, f64), (x2, y2): (f64, f64)) {
    let _ = writeln!(
        out,
        "<line class=\"{class}\" x1=\"{x1:.1}\" y1=\"{y1:.1}\" x2=\"{x2:.1}\" y2=\"{y2:.1}\"/>"
    );
}

fn dot(out: &mut String, class: &str, (x, y): (f64, f64), radius: f64) {
    let _ = writeln!(
        out,
        "<circle class=\"{class}\" cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"{radius}\"/>"
    );
}

fn words(out: &mut String, class: &str, (x, y): (f64, f64), text: &str) {
    let _ = writeln!(
        out,
        "<text class=\"{class}\" x=\"{x:.1}\" y=\"{y:.1}\">{}</text>",
        escape(text)
    );
}

fn path(out: &mut String, class: &str, points: impl Iterator<Item = (f64, f64)>) {
    let points: Vec<_> = points.map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
    let _ = writeln!(out, "<polyline class=\"{class}\" points=\"{}\"/>", points.join(" "));
}

/// Horizontal grid lines with their values at the left.
fn grid(out: &mut String, y: &Axis, left: f64, right: f64, unit: &str) {
    for mark in y.marks() {
        let height = y.at(mark);
        line(out, "grid", (left, height), (right, height));
        words(
            out,
            "mark end",
            (left - 6.0, height + 3.5),
            &format!("{}{unit}", y.label(mark)),
        );
    }
}

/// Speed by number of nodes: measured with its 95 % interval, and what the smallest number promises. A file of its own, so it
/// brings its colours.
pub fn scaling(points: &[Point]) -> String {
    let (left, right, top, bottom) = (84.0, WIDTH - 40.0, 14.0, 330.0);
    let Some(first) = points.first() else {
        return svg(bottom, "no points", "");
    };
    let promised = |p: &Point| first.tokens_per_second * p.nodes as f64 / first.nodes as f64;
    let (_, high) = bounds(points.iter().flat_map(|p| [promised(p), p.tokens_per_second]));
    let y = Axis::round(0.0, high, bottom, top);
    let x = Axis::exact(0.0, points.last().map_or(1, |p| p.nodes) as f64 * 1.05, left, right);
    let at = |p: &Point, speed: f64| (x.at(p.nodes as f64), y.at(speed));
    let mut out = String::from(SCALING_STYLE);
    grid(&mut out, &y, left, right, "");
    path(&mut out, "ideal", points.iter().map(|p| at(p, promised(p))));
    path(&mut out, "line", points.iter().map(|p| at(p, p.tokens_per_second)));
    for p in points {
        let pm = if p.tokens_per_second_pm.is_finite() {
            p.tokens_per_second_pm
        } else {
            0.0
        };
        line(
            &mut out,
            "bar",
            at(p, p.tokens_per_second - pm),
            at(p, p.tokens_per_second + pm),
        );
        dot(&mut out, "dot", at(p, p.tokens_per_second), 3.5);
        let (middle, height) = at(p, p.tokens_per_second);
        words(
            &mut out,
            "label middle",
            (middle, height + 20.0),
            &format!("{:.1} %", 100.0 * p.efficiency),
        );
        words(&mut out, "mark middle", (middle, bottom + 16.0), &p.nodes.to_string());
    }
    words(
        &mut out,
        "mark end",
        (right, bottom + 34.0),
        "nodes; tokens per second, measured and promised by the smallest number",
    );
    let drawn = svg(bottom + 44.0, "Tokens per second by number of nodes", &out);
    drawn.replacen("<svg ", "<svg xmlns=\"http://www.w3.org/2000/svg\" ", 1)
}

const SCALING_STYLE: &str = "<style>text { fill: #667085; font: 12px system-ui, sans-serif } .end { text-anchor: end } \
    .middle { text-anchor: middle } .label { fill: #1c2430 } .grid { stroke: #e4e7ec } .bar { stroke: #1c2430 } .dot { fill: #2563eb } \
    .line { fill: none; stroke: #2563eb; stroke-width: 2 } .ideal { fill: none; stroke: #667085; stroke-dasharray: 5 4 }</style>\n";

/// One row a language: tokens per byte with the base tokenizer and with the extended one.
pub fn fertility(rows: &[(&str, f64, f64)]) -> String {
    let rows: Vec<_> = rows
        .iter()
        .map(|(language, before, after)| {
            let class = if after <= before { "better" } else { "worse" };
            ((*language).to_owned(), *before, *after, class)
        })
        .collect();
    before_and_after(&rows, "Tokens per byte by language, base and extended")
}

/// Rows of (label, before, after, class), the first on top.
fn before_and_after(rows: &[(String, f64, f64, &str)], title: &str) -> String {
    const ROW: f64 = 16.0;
    let (left, right, top) = (300.0, WIDTH - 70.0, 30.0);
    let (_, high) = bounds(rows.iter().flat_map(|(_, before, after, _)| [*before, *after]));
    let x = Axis::round(0.0, high, left, right);
    let bottom = top + ROW * rows.len() as f64;
    let mut out = String::new();
    for mark in x.marks() {
        line(&mut out, "grid", (x.at(mark), top - 6.0), (x.at(mark), bottom));
        for height in [top - 12.0, bottom + 14.0] {
            words(&mut out, "mark middle", (x.at(mark), height), &x.label(mark));
        }
    }
    for (i, (label, before, after, class)) in rows.iter().enumerate() {
        let y = top + ROW * (i as f64 + 0.5);
        words(&mut out, "label end", (left - 10.0, y + 3.5), label);
        line(&mut out, class, (x.at(*before), y), (x.at(*after), y));
        dot(&mut out, "before", (x.at(*before), y), 3.0);
        dot(&mut out, class, (x.at(*after), y), 3.6);
        words(
            &mut out,
            "label end",
            (WIDTH - 8.0, y + 3.5),
            &text::change(*before, *after),
        );
    }
    svg(bottom + 24.0, title, &out)
}

fn bounds(values: impl Iterator<Item = f64>) -> (f64, f64) {
    let (low, high) = values.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), v| {
        (low.min(v), high.max(v))
    });
    if low <= high { (low, high) } else { (0.0, 1.0) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn axes_mark_round_values_around_the_data() {
        let labels = |low, high| {
            let axis = Axis::round(low, high, 0.0, 100.0);
            axis.marks()
                .into_iter()
                .map(|mark| axis.label(mark))
                .collect::<Vec<_>>()
                .join(" ")
        };
        assert_eq!(labels(0.0, 6.2), "0 2 4 6 8");
        assert_eq!(
            labels(2.3, 2.3),
            "2.2 2.4 2.6 2.8 3.0 3.2 3.4",
            "one value alone gets an axis too"
        );
        assert_eq!(labels(-0.031, 0.004), "-0.04 -0.03 -0.02 -0.01 0.00 0.01");
    }
}
