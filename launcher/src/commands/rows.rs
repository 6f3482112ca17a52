//! `panglot rows`: the rows that a run reads, to look at, and the table of what it reads of each part. Starts nothing.

use corpus::{RowsDigest, Tokenizer};
use serde::Serialize;
use serde_json::json;

use super::{App, ConfigArgs};
use launcher::sampling;

#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    pub config: ConfigArgs,
    /// The first row, counted over all steps and ranks
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub from: u64,
    /// How many rows
    #[arg(long, value_name = "M", default_value_t = 4)]
    pub count: u64,
    /// Show text instead of token ids
    #[arg(long)]
    pub decode: bool,
    /// Show what the run reads of each part, instead of rows
    #[arg(long)]
    pub table: bool,
}

#[derive(Serialize)]
struct Shown {
    row: u64,
    step: u64,
    part: String,
    source: String,
    language: String,
    targets: usize,
    /// Where documents begin, if they do not see each other.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    document_starts: Vec<u32>,
    digest: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    tokens: Option<Vec<i64>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    text: Option<String>,
}

pub fn run(app: &App, args: &Args) -> anyhow::Result<()> {
    let plan = args.config.load()?;
    let stream = sampling::stream(&plan)?;
    if args.table {
        return app.print(&json!({ "stages": stream.stages(), "parts": stream.plan() }), || {
            sampling::table(&plan, &stream, 1 << 20)
        });
    }
    let tokenizer = args
        .decode
        .then(|| Tokenizer::open(&plan.folders.vocabulary))
        .transpose()?;
    // Rows have numbers below 2⁶²; no run gets there.
    let from = args.from.min(1 << 61);
    let rows = from..from + args.count.min(1 << 20);
    let mut whole = RowsDigest::default();
    let mut shown = Vec::new();
    for index in rows.clone() {
        let row = stream.row(index);
        let part = &stream.parts()[row.part];
        let mut digest = RowsDigest::default();
        digest.add(index, &row);
        whole.add(index, &row);
        let ids = || {
            row.tokens
                .iter()
                .map(|id| u32::try_from(*id).unwrap_or(0))
                .collect::<Vec<_>>()
        };
        shown.push(Shown {
            row: index,
            step: index / plan.train.rows_per_step as u64,
            part: part.name.clone(),
            source: part.source.clone(),
            language: part.language.to_string(),
            targets: row.n_targets(),
            digest: digest.to_string(),
            text: tokenizer
                .as_ref()
                .map(|tokenizer| tokenizer.decode(&ids()))
                .transpose()?,
            document_starts: row.document_starts,
            tokens: tokenizer.is_none().then_some(row.tokens),
        });
    }
    app.print(&json!({ "rows": shown, "digest": whole.to_string() }), || {
        let mut lines: Vec<String> = shown.iter().map(describe).collect();
        lines.push(format!(
            "rows {} to {}: digest {whole}",
            rows.start,
            rows.end.saturating_sub(1)
        ));
        lines.join("\n")
    })
}

fn describe(shown: &Shown) -> String {
    let Shown {
        row,
        step,
        part,
        targets,
        digest,
        ..
    } = shown;
    let content = match (&shown.text, &shown.tokens) {
        (Some(text), _) => text.clone(),
        (None, tokens) => {
            let ids = tokens.iter().flatten().map(i64::to_string);
            ids.collect::<Vec<_>>().join(" ")
        }
    };
    format!("row {row} (step {step}): {part}, {targets} targets, digest {digest}\n{content}\n")
}
