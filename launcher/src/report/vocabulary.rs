//! What a vocabulary did for each language, as numbers and as one HTML page: tokens per byte, per character and per word of
//! held-out text, and the share of tokens that are bytes of characters without a piece.

use std::fmt::Write;

use configs::Plan;
use corpus::{Corpus, Tokenizer, Vocabulary};
use serde::Serialize;

use super::chart;
use super::page::escape;
use crate::text;

/// All languages with held-out text, from the greatest gain to the least.
#[derive(Debug, Serialize)]
pub struct Fertility {
    pub languages: Vec<LanguageFertility>,
    /// Tokens per byte, means over languages.
    pub before: f64,
    pub after: f64,
}

/// One language with the base tokenizer and with the extended one.
#[derive(Debug, Serialize)]
pub struct LanguageFertility {
    pub language: String,
    /// Tokens per byte.
    pub before: f64,
    pub after: f64,
    pub per_character: [f64; 2],
    pub per_word: [f64; 2],
    /// Of the tokens.
    pub byte_share: [f64; 2],
    /// The share of documents that both cut alike.
    pub documents_unchanged: f64,
    /// The share of the extended tokenizer's tokens that are the base's.
    pub base_tokens: f64,
    /// The config asks for its segmentation to be preserved.
    pub preserved: bool,
}

impl Fertility {
    pub fn measure(plan: &Plan) -> anyhow::Result<Fertility> {
        let corpus = Corpus::open(&plan.folders.corpus)?;
        let base = Tokenizer::open(&plan.folders.base_model)?;
        let extended = Tokenizer::open(&plan.folders.vocabulary)?;
        let preserve = plan.vocabulary.as_ref().map_or(&[][..], |v| &v.preserve);
        let mut languages: Vec<_> = corpus::fertility(&corpus, &base, &extended)?
            .into_iter()
            .filter(|counts| counts.bytes > 0)
            .map(|counts| LanguageFertility::of(&counts, preserve))
            .collect();
        languages.sort_by(|a, b| (a.after / a.before).total_cmp(&(b.after / b.before)));
        let mean =
            |of: fn(&LanguageFertility) -> f64| languages.iter().map(of).sum::<f64>() / languages.len().max(1) as f64;
        Ok(Fertility {
            before: mean(|l| l.before),
            after: mean(|l| l.after),
            languages,
        })
    }
}

impl LanguageFertility {
    fn of(counts: &corpus::Fertility, preserve: &[String]) -> LanguageFertility {
        let share = |part: u64, whole: u64| part as f64 / whole.max(1) as f64;
        let per = |whole| [share(counts.tokens_before, whole), share(counts.tokens_after, whole)];
        let [before, after] = per(counts.bytes);
        let language = counts.language.to_string();
        LanguageFertility {
            before,
            after,
            per_character: per(counts.characters),
            per_word: per(counts.words),
            byte_share: [
                share(counts.byte_tokens_before, counts.tokens_before),
                share(counts.byte_tokens_after, counts.tokens_after),
            ],
            documents_unchanged: share(counts.documents_unchanged, counts.documents),
            base_tokens: share(counts.base_tokens_after, counts.tokens_after),
            preserved: preserve.contains(&language),
            language,
        }
    }
}

/// For the terminal: the languages at both ends, and what was added.
pub fn table(vocabulary: &Vocabulary, fertility: &Fertility) -> String {
    if vocabulary.pieces.is_empty() {
        let kept = format!("The base's own {} pieces are kept", text::count(vocabulary.base_size));
        return match fertility.languages.len() {
            0 => kept + "; there is no held-out text to measure them on",
            _ => format!("{kept}: {:.3} tokens per byte, mean over languages", fertility.before),
        };
    }
    let rows = fertility.languages.iter().map(row).collect();
    let mut rows = text::ends(rows, COLUMNS.len());
    let (before, after) = (fertility.before, fertility.after);
    let mut mean = vec![
        "mean".to_owned(),
        format!("{before:.3}"),
        format!("{after:.3}"),
        text::change(before, after),
    ];
    mean.resize(COLUMNS.len(), String::new());
    rows.push(mean);
    let mut said = format!(
        "{}\n{} base pieces + {} new = {}, padded to {} rows",
        text::table(&COLUMNS, rows),
        text::count(vocabulary.base_size),
        text::count(vocabulary.pieces.len()),
        text::count(vocabulary.size),
        text::count(vocabulary.padded_size),
    );
    if vocabulary.lowered_scores + vocabulary.unreachable > 0 {
        let _ = write!(
            said,
            "\n{} new scores were lowered by the least step, so that both files cut alike; {} new pieces cannot occur",
            text::count(vocabulary.lowered_scores),
            text::count(vocabulary.unreachable),
        );
    }
    for language in fertility.languages.iter().filter(|language| language.preserved) {
        let _ = write!(
            said,
            "\n{} is preserved: {:.1} % of its held-out documents are cut as before, {:.2} % of their tokens are the base's",
            language.language,
            100.0 * language.documents_unchanged,
            100.0 * language.base_tokens,
        );
    }
    said
}

const COLUMNS: [&str; 10] = [
    "language",
    ">tokens per byte before",
    ">after",
    ">change",
    ">per character",
    ">after",
    ">per word",
    ">after",
    ">bytes",
    ">after",
];

fn row(language: &LanguageFertility) -> Vec<String> {
    let [characters, words] = [language.per_character, language.per_word].map(|pair| pair.map(|n| format!("{n:.2}")));
    let bytes = language.byte_share.map(|share| format!("{:.1} %", 100.0 * share));
    [
        language.language.clone(),
        format!("{:.3}", language.before),
        format!("{:.3}", language.after),
        text::change(language.before, language.after),
    ]
    .into_iter()
    .chain(characters)
    .chain(words)
    .chain(bytes)
    .collect()
}

/// The page: a chart of all languages, then all numbers in a table that sorts.
pub fn page(name: &str, vocabulary: &Vocabulary, fertility: &Fertility) -> String {
    let name = escape(name);
    let mut out = format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>{name}: vocabulary</title>\n\
         <meta name=\"viewport\" content=\"width=device-width\">\n<style>{STYLE}</style></head><body><main>\n\
         <h1>{name}: vocabulary</h1>\n<p class=\"lead\">{} base pieces + {} new; {:.3} → {:.3} tokens per byte, mean over {}</p>\n",
        text::count(vocabulary.base_size),
        text::count(vocabulary.pieces.len()),
        fertility.before,
        fertility.after,
        text::counted(fertility.languages.len(), "language"),
    );
    let rows: Vec<_> = fertility
        .languages
        .iter()
        .map(|l| (l.language.as_str(), l.before, l.after))
        .collect();
    section(
        &mut out,
        "Language by language",
        "Tokens per byte of held-out text: hollow with the base tokenizer, filled with the extended one. Sorted by change.",
        &chart::fertility(&rows),
    );
    let mut table = String::from("<table><thead><tr>");
    for title in COLUMNS {
        let _ = write!(table, "<th>{}</th>", title.trim_start_matches('>'));
    }
    table.push_str("<th>documents unchanged</th></tr></thead><tbody>\n");
    for language in &fertility.languages {
        table.push_str("<tr>");
        for cell in row(language) {
            let _ = write!(table, "<td>{}</td>", escape(&cell));
        }
        let _ = writeln!(table, "<td>{:.1} %</td></tr>", 100.0 * language.documents_unchanged);
    }
    table.push_str("</tbody></table>\n");
    section(&mut out, "Numbers", "A click on a column's title sorts by it.", &table);
    let _ = writeln!(out, "<script>{SORT}</script></main></body></html>");
    out
}

fn section(out: &mut String, title: &str, why: &str, content: &str) {
    let _ = write!(
        out,
        "<section><h2>{}</h2>\n<p>{}</p>\n{content}</section>\n",
        escape(title),
        escape(why)
    );
}

const STYLE: &str = "
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
const SORT: &str = "
document.querySelectorAll('th').forEach((title, column) => title.onclick = () => {
  const body = document.querySelector('tbody'), sign = title.dataset.up ? -1 : 1;
  const value = row => { const text = row.cells[column].textContent, n = parseFloat(text.replace(/[,%\\s]/g, '')); return column < 2 || isNaN(n) ? text : n };
  title.dataset.up = sign > 0 ? 1 : '';
  [...body.rows].sort((a, b) => (value(a) > value(b) ? 1 : value(a) < value(b) ? -1 : 0) * sign).forEach(row => body.append(row));
});
";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_holds_every_language_and_fetches_nothing() {
        let language = |language: &str, after: f64| LanguageFertility {
            language: language.to_owned(),
            before: 0.5,
            after,
            per_character: [1.0, 2.0 * after],
            per_word: [4.0, 8.0 * after],
            byte_share: [0.25, 0.0],
            documents_unchanged: 0.0,
            base_tokens: 0.5,
            preserved: language == "eng_Latn",
        };
        let fertility = Fertility {
            languages: vec![language("tel_Telu", 0.2), language("eng_Latn", 0.5)],
            before: 0.5,
            after: 0.35,
        };
        let vocabulary = Vocabulary {
            base_size: 10,
            size: 11,
            padded_size: 64,
            pieces: vec![corpus::NewPiece {
                piece: "ab".to_owned(),
                base_ids: vec![1, 2],
            }],
            digest: String::new(),
            lowered_scores: 1,
            unreachable: 0,
        };
        let page = page("a <b>", &vocabulary, &fertility);
        for part in [
            "a &lt;b&gt;: vocabulary",
            "tel_Telu",
            "eng_Latn",
            "25.0 %",
            "0.500 → 0.350",
            "<svg",
        ] {
            assert!(page.contains(part), "{part}");
        }
        assert!(!page.contains("http"), "nothing is fetched");
        let said = table(&vocabulary, &fertility);
        assert!(
            said.contains("eng_Latn is preserved") && said.contains("1 new scores were lowered"),
            "{said}"
        );
    }
}
