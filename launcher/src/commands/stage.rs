//! `panglot corpus`, `vocab`, `tokenize`, `prepare`: the stages before training, and their tables.

use configs::{NewRows, Plan};
use corpus::{Corpus, Vocabulary};
use serde_json::json;

use super::measured::ranks_here;
use super::{App, ConfigArgs, finish};
use launcher::evaluation::DayZero;
use launcher::events::Event;
use launcher::report::vocabulary::{self as report, Fertility};
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

#[derive(Debug, clap::Args)]
pub struct VocabArgs {
    #[command(flatten)]
    pub stage: Args,
    /// Measure the loss on a sample of held-out text before any step, base against extended; =all, or =mean,normal,
    /// compares starts of the new rows
    #[arg(long, value_name = "NEW_ROWS", num_args = 0..=1, require_equals = true, default_missing_value = "",
          value_delimiter = ',')]
    pub loss: Option<Vec<String>>,
}

/// `panglot corpus CONFIG` makes it, `panglot corpus verify CONFIG` looks after it.
#[derive(Debug, clap::Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub struct CorpusArgs {
    #[command(subcommand)]
    pub command: Option<CorpusCommand>,
    #[command(flatten)]
    pub config: Option<ConfigArgs>,
    /// Make it again even if nothing has changed
    #[arg(long)]
    pub force: bool,
}

#[derive(Debug, clap::Subcommand)]
pub enum CorpusCommand {
    /// Read every file of the corpus again and name each language that is missing or altered
    Verify(ConfigArgs),
}

pub fn corpus(app: &App, args: &CorpusArgs) -> anyhow::Result<()> {
    match (&args.command, &args.config) {
        (Some(CorpusCommand::Verify(config)), _) => verify_corpus(app, config),
        (None, Some(config)) => make_corpus(app, config, args.force),
        (None, None) => anyhow::bail!("name a config, such as configs/demo.yaml"),
    }
}

fn verify_corpus(app: &App, config: &ConfigArgs) -> anyhow::Result<()> {
    let plan = config.load()?;
    let corpus = Corpus::open(&plan.folders.corpus)?;
    let mut view = View::new();
    view.show(&Event::Phase {
        name: "verifying the corpus".to_owned(),
    });
    let damages = corpus.verify(&mut |done, total| {
        view.show(&Event::Progress {
            done,
            total,
            unit: "languages".to_owned(),
        });
    })?;
    view.finish();
    let n_languages = corpus.languages().len();
    let result = json!({ "languages": n_languages, "digest": corpus.digest(), "damages": damages });
    app.print(&result, || match damages.len() {
        0 => format!("{} as imported", text::counted(n_languages, "language")),
        _ => {
            let row =
                |damage: &corpus::Damage| vec![damage.source.clone(), damage.language.to_string(), damage.what.clone()];
            text::table(&["source", "language", "what is wrong"], damages.iter().map(row))
        }
    })?;
    let mut harmed: Vec<_> = damages.iter().map(|damage| damage.language.to_string()).collect();
    harmed.dedup();
    anyhow::ensure!(
        harmed.is_empty(),
        "{} of the corpus in {} missing or altered: {}; run `panglot corpus` with --force to import it again",
        text::counted(harmed.len(), "language"),
        files::shown(&plan.folders.corpus),
        harmed.join(", ")
    );
    Ok(())
}

fn make_corpus(app: &App, config: &ConfigArgs, force: bool) -> anyhow::Result<()> {
    let plan = config.load()?;
    make(app, &plan, &[Stage::Corpus], force)?;
    app.print(Corpus::open(&plan.folders.corpus)?.manifest(), || {
        corpus_table(&plan).unwrap_or_else(|error| error.to_string())
    })
}

pub fn vocab(app: &App, args: &VocabArgs) -> anyhow::Result<()> {
    let plan = args.stage.config.load()?;
    let starts = args.loss.as_ref().map(|names| starts(&plan, names)).transpose()?;
    make(app, &plan, &[Stage::Vocabulary], args.stage.force)?;
    let day_zero = starts.map(|starts| measure_day_zero(app, &plan, &starts)).transpose()?;
    let vocabulary = Vocabulary::open(&plan.folders.vocabulary)?;
    let fertility = Fertility::measure(&plan)?;
    let page = plan.folders.vocabulary.join("report.html");
    let drawn = report::page(&plan.name, &vocabulary, &fertility);
    files::write_atomically(&page, drawn.as_bytes())?;
    let result = json!({
        "base_size": vocabulary.base_size,
        "size": vocabulary.size,
        "padded_size": vocabulary.padded_size,
        "new_pieces": vocabulary.pieces.len(),
        "lowered_scores": vocabulary.lowered_scores,
        "unreachable": vocabulary.unreachable,
        "tokens_per_byte_before": fertility.before,
        "tokens_per_byte_after": fertility.after,
        "report": page,
        "languages": fertility.languages,
        "day_zero": day_zero,
    });
    app.print(&result, || {
        let table = report::table(&vocabulary, &fertility);
        let loss = day_zero
            .map(|measured| format!("\n\n{}", measured.table()))
            .unwrap_or_default();
        format!("{table}\nEvery language, with a plot: {}{loss}", files::shown(&page))
    })
}

/// The starts of new rows that `--loss` names: none are the config's own.
fn starts(plan: &Plan, names: &[String]) -> anyhow::Result<Vec<NewRows>> {
    let Some(vocabulary) = &plan.vocabulary else {
        anyhow::bail!(
            "--loss compares the base with its extension, but the config has no vocabulary section: nothing is extended; \
             `panglot eval --model base` measures the base"
        );
    };
    match names {
        [none] if none.is_empty() => Ok(vec![vocabulary.new_rows]),
        [all] if all == "all" => Ok(NewRows::ALL.to_vec()),
        names => {
            let start = |name: &String| {
                name.parse()
                    .map_err(|error| anyhow::anyhow!("--loss: {error}, or all for each of them"))
            };
            names.iter().map(start).collect()
        }
    }
}

/// Bytes of text a language: the mean over hundreds of languages is steady with little of each.
const DAY_ZERO_BYTES: usize = 256;

/// Lets a worker measure, and keeps its result beside the vocabulary.
fn measure_day_zero(app: &App, plan: &Plan, starts: &[NewRows]) -> anyhow::Result<DayZero> {
    super::eval::require_held_out(plan)?;
    let out = plan.folders.vocabulary.join("day_zero.json");
    let plan_file = out.with_extension("plan.json");
    files::write_json(&plan_file, plan)?;
    let names: Vec<_> = starts.iter().map(|start| start.name()).collect();
    let args = vec![
        "day-zero".into(),
        "--plan".into(),
        plan_file.into(),
        "--new-rows".into(),
        names.join(",").into(),
        "--most-bytes".into(),
        DAY_ZERO_BYTES.to_string().into(),
        "--out".into(),
        out.clone().into(),
    ];
    let job = app.worker()?.job(ranks_here(plan), plan.launch.threads_per_rank, args);
    finish("measuring the loss before any step", &job, &mut View::new())?;
    files::read_json(&out)
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
        let loss = match plan.vocabulary {
            Some(_) if plan.corpus.held_out > 0.0 => {
                " `panglot vocab --loss` says what the new pieces cost before any step."
            }
            _ => "",
        };
        format!("Everything is prepared. Next: panglot train, with the same config.{loss}")
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

/// Languages by bytes: the largest, the smallest, the sum; what could not be read.
pub fn corpus_table(plan: &Plan) -> anyhow::Result<String> {
    let corpus = Corpus::open(&plan.folders.corpus)?;
    let manifest = corpus.manifest();
    let mut entries: Vec<_> = manifest.languages.iter().collect();
    entries.sort_by_key(|entry| std::cmp::Reverse(entry.train.bytes));
    let mut sums = [0u64; 6];
    let rows: Vec<_> = entries
        .iter()
        .map(|entry| {
            let numbers = [
                entry.train.documents,
                entry.train.bytes,
                entry.held_out.documents,
                entry.held_out.bytes,
                entry.dropped(),
                entry.lines_dropped,
            ];
            sums.iter_mut().zip(numbers).for_each(|(sum, number)| *sum += number);
            let names = [
                entry.source.clone(),
                entry.language.to_string(),
                text::shortened(&entry.name, 32),
            ];
            names.into_iter().chain(numbers.map(text::count)).collect()
        })
        .collect();
    let total = vec![
        text::counted(manifest.sources.len(), "source"),
        text::counted(corpus.languages().len(), "language"),
        String::new(),
    ];
    let mut rows = text::ends(rows, 5);
    rows.push(total.into_iter().chain(sums.map(text::count)).collect());
    let header = [
        "source",
        "language",
        "name",
        ">documents",
        ">bytes",
        ">held out",
        ">its bytes",
        ">dropped",
        ">lines dropped",
    ];
    let mut table = text::table(&header, rows);
    if manifest.unreadable.places > 0 {
        let places = text::counted(manifest.unreadable.places as usize, "place");
        table += &format!("\n{places} could not be read; skipped as the config says, the first of them:");
        for place in &manifest.unreadable.first {
            table += &format!("\n  {place}");
        }
    }
    Ok(table)
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
