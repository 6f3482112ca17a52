//! The page itself: numbers first, then charts, then every language in a table.

use std::fmt::Write;

use super::chart::{self, escape};
use super::{Language, Run};
use crate::evaluation::Comparison;
use crate::text;

pub fn page(run: &Run) -> String {
    let name = escape(&run.plan.name);
    let mut out = format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>{name}: Panglot</title>\n\
         <meta name=\"viewport\" content=\"width=device-width\">\n<style>{STYLE}</style></head><body><main>\n\
         <h1>{name}</h1>\n<p class=\"lead\">{}</p>\n",
        escape(&lead(run))
    );
    numbers(&mut out, run);
    if let Some(comparison) = &run.comparison {
        section(
            &mut out,
            "Languages by change",
            "Change of bits per byte of held-out text, one bar a language; below zero is better.",
            &chart::overview(comparison),
        );
    }
    if !run.steps.is_empty() {
        section(
            &mut out,
            "Loss",
            "Nats per target token: dots are steps, the line is their running mean.",
            &chart::loss(&run.steps),
        );
        let why = "Share of rows: the area is what the sampling plans for the whole run, dots are what was drawn.";
        section(&mut out, "Sampling", why, &chart::shares(run.languages.iter()));
    }
    if let Some(comparison) = &run.comparison {
        section(
            &mut out,
            "Language by language",
            "Bits per byte of held-out text: hollow before (the base model with its own tokenizer), filled after. Sorted by change.",
            &chart::languages(run, comparison),
        );
        section(
            &mut out,
            "Numbers",
            "A click on a column's title sorts by it.",
            &table(run, comparison),
        );
        let _ = writeln!(out, "<script>{SORT}</script>");
    }
    out.push_str("</main></body></html>\n");
    out
}

fn lead(run: &Run) -> String {
    let train = &run.plan.train;
    let steps = run.steps.len() as u64;
    let tokens: u64 = steps * (train.rows_per_step * train.sequence_length) as u64;
    format!(
        "{} of {} steps, {} tokens, {} rows × {} tokens a step, {}.",
        text::count(steps),
        text::count(train.steps),
        text::count(tokens),
        train.rows_per_step,
        train.sequence_length,
        text::counted(run.plan.launch.ranks, "rank"),
    )
}

/// The figures that one would quote.
fn numbers(out: &mut String, run: &Run) {
    out.push_str("<div class=\"figures\">\n");
    for (value, what) in figures(run) {
        let _ = writeln!(
            out,
            "<div><b>{}</b><span>{}</span></div>",
            escape(&value),
            escape(&what)
        );
    }
    out.push_str("</div>\n");
}

/// Each with what it is.
fn figures(run: &Run) -> Vec<(String, String)> {
    let mut figures = Vec::new();
    let mut figure = |value: String, what: String| figures.push((value, what));
    if let Some(comparison) = &run.comparison {
        let Comparison { changes, before, after } = comparison;
        figure(
            format!("{before:.3} → {after:.3}"),
            "bits per byte, mean over languages".to_owned(),
        );
        figure(text::change(*before, *after), "change of that mean".to_owned());
        let improved = format!("{} of {} languages improved", comparison.improved(), changes.len());
        figure(
            format!("{:.1} %", 100.0 * comparison.improved() as f64 / changes.len() as f64),
            improved,
        );
        let median = comparison.median();
        for (what, change) in [
            ("best", &changes[0]),
            ("median", median),
            ("worst", &changes[changes.len() - 1]),
        ] {
            figure(
                text::change(change.before, change.after),
                format!("{what}: {}", change.language),
            );
        }
    } else if let Some(evaluation) = &run.before {
        figure(
            format!("{:.3}", evaluation.macro_bits_per_byte),
            "bits per byte, mean over languages".to_owned(),
        );
    }
    if let (Some(first), Some(last)) = (run.steps.first(), run.steps.last()) {
        figure(
            format!("{:.2} → {:.2}", first.loss, last.loss),
            "loss, first and last step".to_owned(),
        );
        let seconds: f64 = run.steps.iter().map(|step| step.seconds).sum();
        let tokens = run
            .steps
            .iter()
            .map(|step| step.tokens_per_second * step.seconds)
            .sum::<f64>();
        figure(
            text::count((tokens / seconds.max(1e-9)) as u64),
            "tokens per second".to_owned(),
        );
        let memory = run.steps.iter().map(|step| step.resident_bytes).max().unwrap_or(0);
        figure(text::bytes(memory), "largest memory of a rank".to_owned());
    }
    figures
}

pub(super) fn section(out: &mut String, title: &str, why: &str, content: &str) {
    let _ = write!(
        out,
        "<section><h2>{}</h2>\n<p>{}</p>\n{content}</section>\n",
        escape(title),
        escape(why)
    );
}

fn table(run: &Run, comparison: &Comparison) -> String {
    let mut out = String::from("<table><thead><tr>");
    for title in [
        "language",
        "name",
        "before",
        "after",
        "difference",
        "change",
        "tokens",
        "planned",
        "realised",
    ] {
        let _ = write!(out, "<th>{title}</th>");
    }
    out.push_str("</tr></thead><tbody>\n");
    let unknown = Language::default();
    for change in &comparison.changes {
        let language = run.languages.get(&change.language).unwrap_or(&unknown);
        let cells = [
            format!("{:.3}", change.before),
            format!("{:.3}", change.after),
            format!("{:+.3}", change.delta()),
            text::change(change.before, change.after),
            text::count(language.tokens),
            format!("{:.3} %", 100.0 * language.planned),
            format!("{:.3} %", 100.0 * language.realised),
        ];
        let _ = write!(
            out,
            "<tr><td>{}<td>{}",
            escape(&change.language),
            escape(&language.name)
        );
        for cell in cells {
            let _ = write!(out, "<td>{cell}");
        }
        out.push_str("</tr>\n");
    }
    out.push_str("</tbody></table>\n");
    out
}

pub(super) const STYLE: &str = "
:root { --ink: #1c2430; --soft: #667085; --grid: #e4e7ec; --paper: #fff; --card: #f7f8fa; --blue: #2563eb; --good: #0f8a5f; --bad: #c2410c }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ef; --soft: #98a2b3; --grid: #2a3140; --paper: #12161d; --card: #1a202a;
  --blue: #6ea0ff; --good: #3ecf9b; --bad: #ff8a5b } }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif }
main { max-width: 980px; margin: 0 auto; padding: 32px 16px 64px }
h1 { margin: 0; font-size: 28px } h2 { margin: 40px 0 0; font-size: 19px } p { margin: 2px 0 12px; color: var(--soft) }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(180px, 1fr)); gap: 10px; margin-top: 20px }
.figures div { background: var(--card); border-radius: 8px; padding: 12px 14px }
.figures b { display: block; font-size: 20px; font-variant-numeric: tabular-nums } .figures span { color: var(--soft); font-size: 13px }
svg { width: 100%; height: auto; display: block } svg text { fill: var(--soft); font-size: 11px }
svg .label { fill: var(--ink) } .end { text-anchor: end } .middle { text-anchor: middle }
.grid { stroke: var(--grid) } .zero { stroke: var(--soft) } .faint { fill: var(--blue); opacity: .35 }
.line { fill: none; stroke: var(--blue); stroke-width: 2 } .area { fill: var(--blue); opacity: .18 } .dot { fill: var(--blue); opacity: .8 }
.better { fill: var(--good); stroke: var(--good) } .worse { fill: var(--bad); stroke: var(--bad) } line.better, line.worse { stroke-width: 2 }
rect.better, rect.worse { stroke: none } .before { fill: var(--paper); stroke: var(--soft); stroke-width: 1.4 }
table { border-collapse: collapse; width: 100%; font-size: 13px; font-variant-numeric: tabular-nums }
th { text-align: right; cursor: pointer; position: sticky; top: 0; background: var(--paper) }
td, th { padding: 2px 8px; border-bottom: 1px solid var(--grid) } td { text-align: right }
td:nth-child(-n+2), th:nth-child(-n+2) { text-align: left }
";

/// Numbers sort as numbers, whatever sign, comma or percent they carry.
pub(super) const SORT: &str = "
document.querySelectorAll('th').forEach((title, column) => title.onclick = () => {
  const body = document.querySelector('tbody'), sign = title.dataset.up ? -1 : 1;
  const value = row => { const text = row.cells[column].textContent, n = parseFloat(text.replace(/[,%\\s]/g, '')); return column < 2 || isNaN(n) ? text : n };
  title.dataset.up = sign > 0 ? 1 : '';
  [...body.rows].sort((a, b) => (value(a) > value(b) ? 1 : value(a) < value(b) ? -1 : 0) * sign).forEach(row => body.append(row));
});
";
