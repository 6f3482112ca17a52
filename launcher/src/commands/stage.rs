//! `panglot corpus`, `vocab`, `tokenize`, `prepare`: the stages before training, and their tables.

use configs::Plan;
use corpus::{Corpus, Tokenizer, Vocabulary};
use serde_json::json;

use super::{App, ConfigArgs, finish};
use launcher::stages::{Maker, Outcome, STAGES, Stage};
use launcher::view::View;
use launcher::{files, text};

#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    pub config: ConfigArgs,
    /// Make it again even if nothing has changed
    #[arg(long)]
    pub force: bool,
}

pub fn corpus(app: &App, args: &Args) -> anyhow::Result<()> {
    let plan = args.config.load()?;
    make(app, &plan, &[Stage::Corpus], args.force)?;
    app.print(Corpus::open(&plan.folders.corpus)?.manifest(), || {
        corpus_table(&plan).unwrap_or_else(|error| error.to_string())
    })
}

pub fn vocab(app: &App, args: &Args) -> anyhow::Result<()> {
    let plan = args.config.load()?;
    make(app, &plan, &[Stage::Vocabulary], args.force)?;
    let vocabulary = Vocabulary::open(&plan.folders.vocabulary)?;
    let fertility = Fertility::measure(&plan)?;
    let result = json!({
        "base_size": vocabulary.base_size,
        "size": vocabulary.size,
        "padded_size": vocabulary.padded_size,
        "new_pieces": vocabulary.pieces.len(),
        "tokens_per_byte_before": fertility.before,
        "tokens_per_byte_after": fertility.after,
        "languages": fertility.languages.iter()
            .map(|(language, before, after)| json!({ "language": language, "before": before, "after": after }))
            .collect::<Vec<_>>(),
    });
    app.print(&result, || vocabulary_table(&vocabulary, &fertility))
}

pub fn tokenize(app: &App, args: &Args) -> anyhow::Result<()> {
    let plan = args.config.load()?;
    make(app, &plan, &[Stage::Tokens], args.force)?;
    let shards = corpus::TokenShards::open(&plan.folders.tokens)?;
    app.print(shards.manifest(), || {
        tokens_line(&plan).unwrap_or_else(|error| error.to_string())
    })
}

pub fn prepare(app: &App, args: &Args) -> anyhow::Result<()> {
    let plan = args.config.load()?;
    let made = make(app, &plan, &STAGES, args.force)?;
    let result: Vec<_> = made
        .iter()
        .map(|(stage, outcome)| json!({ "stage": stage, "folder": stage.folder(&plan), "made": *outcome != Outcome::Kept }))
        .collect();
    app.print(&result, || {
        "Everything is prepared. Next: panglot train, with the same config.".to_owned()
    })
}

/// Makes `stages` in their order, each unless it is fresh, and says which it was.
pub fn make(app: &App, plan: &Plan, stages: &[Stage], force: bool) -> anyhow::Result<Vec<(Stage, Outcome)>> {
    let mut made = Vec::new();
    for &stage in stages {
        // Two views, one for a worker and one for what happens here: only one of them ever draws.
        let (mut ours, mut workers) = (View::new(), View::new());
        let mut maker = Maker {
            plan,
            worker: &|| app.worker(),
            run: &mut |job| finish("making the base model", job, &mut workers).map(drop),
            show: &mut |event| ours.show(event),
            force,
        };
        let outcome = maker.make(stage)?;
        ours.finish();
        ours.say(&format!(
            "{stage:<15} {outcome}  ({})",
            files::shown(&stage.folder(plan))
        ));
        made.push((stage, outcome));
    }
    Ok(made)
}

/// Languages by bytes: the largest, the smallest, the sum.
pub fn corpus_table(plan: &Plan) -> anyhow::Result<String> {
    let corpus = Corpus::open(&plan.folders.corpus)?;
    let mut languages: Vec<_> = corpus.manifest().languages.iter().collect();
    languages.sort_by_key(|entry| std::cmp::Reverse(entry.train.bytes));
    let mut sums = [0u64; 5];
    let rows: Vec<_> = languages
        .iter()
        .map(|entry| {
            let numbers = [
                entry.train.documents,
                entry.train.bytes,
                entry.held_out.documents,
                entry.held_out.bytes,
                entry.duplicates,
            ];
            sums.iter_mut().zip(numbers).for_each(|(sum, number)| *sum += number);
            let names = [entry.language.to_string(), text::shortened(&entry.name, 40)];
            names.into_iter().chain(numbers.map(text::count)).collect()
        })
        .collect();
    let total = vec![text::counted(rows.len(), "language"), String::new()];
    let mut rows = text::ends(rows, 5);
    rows.push(total.into_iter().chain(sums.map(text::count)).collect());
    let header = [
        "language",
        "name",
        ">documents",
        ">bytes",
        ">held out",
        ">its bytes",
        ">duplicates",
    ];
    Ok(text::table(&header, rows))
}

/// Tokens per byte of held-out text, with the base tokenizer and with the extended one.
pub struct Fertility {
    /// From the greatest gain to the least.
    pub languages: Vec<(String, f64, f64)>,
    /// Means over languages.
    pub before: f64,
    pub after: f64,
}

impl Fertility {
    pub fn measure(plan: &Plan) -> anyhow::Result<Fertility> {
        let corpus = Corpus::open(&plan.folders.corpus)?;
        let base = Tokenizer::open(&plan.folders.base_model)?;
        let extended = Tokenizer::open(&plan.folders.vocabulary)?;
        let mut languages: Vec<_> = corpus::fertility(&corpus, &base, &extended)?
            .into_iter()
            .filter(|counts| counts.bytes > 0)
            .map(|counts| {
                let per_byte = |tokens| tokens as f64 / counts.bytes as f64;
                (
                    counts.language.to_string(),
                    per_byte(counts.tokens_before),
                    per_byte(counts.tokens_after),
                )
            })
            .collect();
        languages.sort_by(|a, b| (a.2 / a.1).total_cmp(&(b.2 / b.1)));
        let mean =
            |of: fn(&(String, f64, f64)) -> f64| languages.iter().map(of).sum::<f64>() / languages.len().max(1) as f64;
        let (before, after) = (mean(|row| row.1), mean(|row| row.2));
        Ok(Fertility {
            languages,
            before,
            after,
        })
    }
}

pub fn vocabulary_table(vocabulary: &Vocabulary, fertility: &Fertility) -> String {
    if vocabulary.pieces.is_empty() {
        let pieces = text::count(vocabulary.base_size);
        return format!(
            "The base's own {pieces} pieces are kept: {:.3} tokens per byte, mean over languages",
            fertility.before
        );
    }
    let row = |name: String, before: f64, after: f64| {
        vec![
            name,
            format!("{before:.3}"),
            format!("{after:.3}"),
            text::change(before, after),
        ]
    };
    let rows = fertility
        .languages
        .iter()
        .map(|(language, before, after)| row(language.clone(), *before, *after))
        .collect();
    let mut rows = text::ends(rows, 4);
    rows.push(row("mean".to_owned(), fertility.before, fertility.after));
    format!(
        "{}\n{} base pieces + {} new = {}, padded to {} rows",
        text::table(&["language", ">tokens per byte before", ">after", ">change"], rows),
        text::count(vocabulary.base_size),
        text::count(vocabulary.pieces.len()),
        text::count(vocabulary.size),
        text::count(vocabulary.padded_size),
    )
}

pub fn tokens_line(plan: &Plan) -> anyhow::Result<String> {
    let shards = corpus::TokenShards::open(&plan.folders.tokens)?;
    let languages = &shards.manifest().languages;
    let tokens: u64 = languages
        .iter()
        .map(|language| language.tokens.end - language.tokens.start)
        .sum();
    Ok(format!(
        "{} tokens of {}; the run reads {} of them, {:.2} times",
        text::count(tokens),
        text::counted(languages.len(), "language"),
        text::count(tokens_read(plan)),
        tokens_read(plan) as f64 / tokens.max(1) as f64,
    ))
}

/// Steps × rows × T.
pub fn tokens_read(plan: &Plan) -> u64 {
    plan.train.steps * plan.train.rows_per_step as u64 * plan.train.sequence_length as u64
}
