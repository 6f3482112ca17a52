//! A run as one HTML page that a person opens, and as tables for programs: everything inline, nothing fetched. What is shown
//! is gathered here from the run's folder; `page.rs` and the files in `page/` only draw it.

mod chart;
#[doc(hidden)]
pub mod generated;
mod outline;
mod page;
mod steps;
mod table;
mod timeline;
pub mod vocabulary;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, ensure};
use configs::Plan;
use corpus::{Corpus, Split};
use serde_json::{Map, Value, json};

use crate::evaluation::{Evaluation, LanguageResult, Paired, resource_group};
use crate::families::family;
use crate::history::{Happening, History, What};
use crate::statistics::mean;
use crate::{files, text};

pub use chart::scaling;
pub use page::page;
pub use table::{Table, csv};

use steps::Steps;

/// Colours that can be told apart, and columns that fit a screen.
pub const MOST_RUNS: usize = 6;

/// What is drawn of one run. Parts that the run does not have yet are empty tables.
#[derive(Clone, Debug)]
pub struct Run {
    /// Unlike that of any other run on the page.
    pub label: String,
    pub folder: PathBuf,
    /// (what, value) in words: the figures that one would quote.
    pub figures: Table,
    /// One row a step.
    pub steps: Table,
    /// One row a language: sampling, tokens, bits per byte before and after.
    pub languages: Table,
    /// Means over the languages of a script, a family, a resource group.
    pub groups: Table,
    /// Attempts, checkpoints, measurements, stalls, by the clock.
    pub timeline: Table,
    /// What the time between the first and the last sign of life went to.
    pub time: Table,
    /// The plan, flat.
    pub plan: Table,
    pub environment: Table,
    /// Fewer steps for the page: neighbours together.
    thinned: Table,
}

/// What to show where a run leaves a choice.
#[derive(Clone, Debug)]
pub struct Asked {
    /// The evaluations that are compared, by their names in `RUN/evaluations`.
    pub before: String,
    pub after: String,
    /// Latitude and longitude by language (`lll_Ssss` or `lll`), where the corpus has none.
    pub places: BTreeMap<String, [f64; 2]>,
}

impl Default for Asked {
    fn default() -> Asked {
        Asked {
            before: "before".to_owned(),
            after: "after".to_owned(),
            places: BTreeMap::new(),
        }
    }
}

/// Reads lines of `language<TAB>latitude<TAB>longitude`, degrees.
///
/// # Errors
/// When a line is something else; it is named.
pub fn read_places(file: &Path) -> anyhow::Result<BTreeMap<String, [f64; 2]>> {
    let text = fs::read_to_string(file).with_context(|| format!("cannot read {}", files::shown(file)))?;
    let place = |line: &str| -> Option<(String, [f64; 2])> {
        let [language, latitude, longitude] = line.split('\t').collect::<Vec<_>>().try_into().ok()?;
        let degrees = |text: &str, most: f64| text.trim().parse().ok().filter(|it: &f64| it.abs() <= most);
        Some((
            language.trim().to_owned(),
            [degrees(latitude, 90.0)?, degrees(longitude, 180.0)?],
        ))
    };
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    let places = lines.map(|(at, line)| {
        place(line).with_context(|| {
            format!(
                "{} line {}: {line:?} is not language<TAB>latitude<TAB>longitude in degrees, such as eng_Latn\t53.0\t-1.0",
                files::shown(file),
                at + 1
            )
        })
    });
    places.collect()
}

impl Run {
    /// Reads what there is in the plan's run folder.
    ///
    /// # Errors
    /// When there is nothing to draw, or metrics are damaged other than by a torn last line.
    pub fn read(plan: &Plan, asked: &Asked) -> anyhow::Result<Run> {
        let run = &plan.folders.run;
        let steps = Steps::read(&run.join("metrics.jsonl"))?;
        let evaluation = |name: &str| -> anyhow::Result<Option<Evaluation>> {
            let file = run.join(format!("evaluations/{name}.json"));
            file.is_file().then(|| Evaluation::read(&file)).transpose()
        };
        let (before, after) = (evaluation(&asked.before)?, evaluation(&asked.after)?);
        ensure!(
            !steps.lines.is_empty() || before.is_some() || after.is_some(),
            "{} holds neither metrics.jsonl nor evaluations yet; run `panglot train` first",
            files::shown(run)
        );
        let history = History::of(run).all();
        let evaluations = Evaluations {
            before: before.as_ref(),
            after: after.as_ref(),
            paired: files::read_json(&run.join(format!("evaluations/{}.compared.json", asked.after))).ok(),
        };
        let mut languages = languages(plan, &steps, &evaluations);
        for (code, language) in &mut languages {
            let given = || asked.places.get(code).or(asked.places.get(code.get(..3)?)).copied();
            language.place = language.place.or_else(given);
        }
        let (timeline, attempts) = timeline::timeline(run, &steps, &history);
        Ok(Run {
            label: plan.name.clone(),
            folder: run.clone(),
            figures: figures(plan, &steps, &languages, &evaluations, &history, attempts),
            groups: groups(&languages),
            languages: language_table(&languages),
            time: timeline::where_time_went(&steps, &history),
            timeline,
            plan: plan_table(plan),
            environment: environment(&history, &evaluations),
            thinned: steps.table(page::MOST_STEPS),
            steps: steps.table(usize::MAX),
        })
    }

    /// In the order in which they are shown.
    pub fn tables(&self) -> [&Table; 8] {
        [
            &self.figures,
            &self.steps,
            &self.languages,
            &self.groups,
            &self.timeline,
            &self.time,
            &self.plan,
            &self.environment,
        ]
    }

    /// Everything shown, for programs.
    pub fn json(&self) -> Value {
        let mut all = Map::new();
        all.insert("name".to_owned(), json!(self.label));
        all.insert("folder".to_owned(), json!(self.folder));
        for table in self.tables() {
            all.insert(table.name.to_owned(), table.objects());
        }
        Value::Object(all)
    }
}

/// Runs that bear one name get their folders' names, or a number.
pub fn tell_apart(runs: &mut [Run]) {
    let doubled = |runs: &[Run], label: &str| runs.iter().filter(|run| run.label == label).count() > 1;
    for at in 0..runs.len() {
        if doubled(runs, &runs[at].label) {
            let folder = runs[at]
                .folder
                .file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned();
            runs[at].label = if folder.is_empty() {
                runs[at].label.clone()
            } else {
                folder
            };
        }
    }
    for at in 0..runs.len() {
        if doubled(runs, &runs[at].label) {
            runs[at].label = format!("{} ({})", runs[at].label, at + 1);
        }
    }
}

/// Writes one CSV file a table into `folder`; the files.
pub fn write_csv(runs: &[Run], folder: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let Some(first) = runs.first() else {
        return Ok(Vec::new());
    };
    let mut written = Vec::new();
    for (at, table) in first.tables().into_iter().enumerate() {
        let file = folder.join(format!("{}.csv", table.name));
        let text = csv(runs.iter().map(|run| (run.label.as_str(), run.tables()[at])));
        files::write_atomically(&file, text.as_bytes())?;
        written.push(file);
    }
    Ok(written)
}

struct Evaluations<'a> {
    before: Option<&'a Evaluation>,
    after: Option<&'a Evaluation>,
    /// Document by document, if `panglot eval nll --baseline` made it.
    paired: Option<Paired>,
}

/// All that is known of one language.
#[derive(Clone, Debug, Default)]
struct Language {
    name: String,
    group: String,
    place: Option<[f64; 2]>,
    corpus_bytes: u64,
    corpus_tokens: Option<u64>,
    /// In the whole run.
    planned_tokens: Option<u64>,
    planned_rows: u64,
    realised_rows: u64,
    before: Option<LanguageResult>,
    after: Option<LanguageResult>,
    sequence_length: u64,
}

impl Language {
    /// Of the rows that were drawn: rows of whole documents are not full.
    fn realised_tokens(&self) -> u64 {
        match (self.planned_rows, self.planned_tokens) {
            (1.., Some(tokens)) => {
                (tokens as f64 * self.realised_rows as f64 / self.planned_rows as f64).round() as u64
            }
            _ => self.realised_rows * self.sequence_length,
        }
    }

    fn bits(&self) -> Option<[f64; 2]> {
        Some([self.before.as_ref()?.bits_per_byte, self.after.as_ref()?.bits_per_byte])
    }
}

fn languages(plan: &Plan, steps: &Steps, evaluations: &Evaluations) -> BTreeMap<String, Language> {
    let mut languages: BTreeMap<String, Language> = BTreeMap::new();
    if let Ok(corpus) = Corpus::open(&plan.folders.corpus) {
        for entry in &corpus.manifest().languages {
            let language = languages.entry(entry.language.to_string()).or_default();
            language.corpus_bytes += entry.counts(Split::Train).bytes;
            if language.name.is_empty() {
                language.name = entry.name.clone();
            }
            language.place = language
                .place
                .or(entry.latitude.zip(entry.longitude).map(|(a, b)| [a, b]));
        }
        for language in languages.values_mut() {
            language.group = resource_group(language.corpus_bytes).to_owned();
        }
    }
    if let Ok(stream) = crate::sampling::stream(plan) {
        for part in stream.plan() {
            let language = languages.entry(part.language.to_string()).or_default();
            *language.corpus_tokens.get_or_insert(0) += part.tokens;
            *language.planned_tokens.get_or_insert(0) += part.expected_tokens;
            language.planned_rows += part.rows;
            // The config's own groups, where it has some, are what its author thinks in.
            if let Some(group) = part.group {
                language.group = group;
            }
        }
    }
    for (name, &rows) in &steps.rows {
        languages.entry(name.clone()).or_default().realised_rows = rows;
    }
    for (is_after, evaluation) in [(false, evaluations.before), (true, evaluations.after)] {
        for result in evaluation.into_iter().flat_map(|evaluation| &evaluation.languages) {
            let language = languages.entry(result.language.clone()).or_default();
            if language.group.is_empty() {
                language.group.clone_from(&result.group);
            }
            let place = if is_after {
                &mut language.after
            } else {
                &mut language.before
            };
            *place = Some(result.clone());
        }
    }
    for language in languages.values_mut() {
        language.sequence_length = plan.train.sequence_length as u64;
    }
    languages
}

fn language_table(languages: &BTreeMap<String, Language>) -> Table {
    let mut table = Table::new(
        "languages",
        &[
            "language",
            "name",
            "script",
            "family",
            "group",
            "latitude",
            "longitude",
            "corpus_tokens",
            "planned_tokens",
            "realised_tokens",
            "epochs",
            "documents",
            "bits_per_byte_before",
            "bits_per_byte_after",
            "difference",
            "after_low",
            "after_high",
            "nats_per_document_before",
            "nats_per_document_after",
            "tokens_per_byte_before",
            "tokens_per_byte_after",
        ],
    );
    for (code, language) in languages {
        let (before, after) = (language.before.as_ref(), language.after.as_ref());
        let tokens_per_byte = |result: &LanguageResult| result.tokens as f64 / result.bytes as f64;
        let realised = language.realised_tokens();
        let interval = after.and_then(|after| after.interval);
        table.push(vec![
            json!(code),
            json!(language.name),
            json!(script(code)),
            json!(family(code.get(..3).unwrap_or(code))),
            json!(language.group),
            json!(language.place.map(|place| place[0])),
            json!(language.place.map(|place| place[1])),
            json!(language.corpus_tokens),
            json!(language.planned_tokens),
            json!(realised),
            json!(
                language
                    .corpus_tokens
                    .map(|tokens| realised as f64 / tokens as f64)
                    .filter(|it| it.is_finite())
            ),
            json!(after.or(before).map(|result| result.documents)),
            json!(before.map(|result| result.bits_per_byte)),
            json!(after.map(|result| result.bits_per_byte)),
            json!(language.bits().map(|[before, after]| after - before)),
            json!(interval.map(|interval| interval[0])),
            json!(interval.map(|interval| interval[1])),
            json!(before.map(|result| result.nats_per_document)),
            json!(after.map(|result| result.nats_per_document)),
            json!(before.map(tokens_per_byte)),
            json!(after.map(tokens_per_byte)),
        ]);
    }
    table
}

fn script(language: &str) -> &str {
    language.get(4..8).unwrap_or("unknown")
}

/// Means over languages, each counting once; over those that were measured both times where some were.
fn groups(languages: &BTreeMap<String, Language>) -> Table {
    let mut table = Table::new(
        "groups",
        &[
            "by",
            "of",
            "languages",
            "bits_per_byte_before",
            "bits_per_byte_after",
            "difference",
        ],
    );
    let both = languages.values().any(|language| language.bits().is_some());
    for by in ["group", "script", "family"] {
        let mut groups: BTreeMap<&str, Vec<&Language>> = BTreeMap::new();
        for (code, language) in languages {
            let measured = match both {
                true => language.bits().is_some(),
                false => language.before.is_some() || language.after.is_some(),
            };
            let of = match by {
                "group" => language.group.as_str(),
                "script" => script(code),
                _ => family(code.get(..3).unwrap_or(code)),
            };
            if measured {
                groups.entry(of).or_default().push(language);
            }
        }
        for (of, languages) in groups {
            let over = |one: fn(&Language) -> Option<f64>| mean(languages.iter().filter_map(|language| one(language)));
            let before = over(|language| Some(language.before.as_ref()?.bits_per_byte));
            let after = over(|language| Some(language.after.as_ref()?.bits_per_byte));
            table.push(vec![
                json!(by),
                json!(of),
                json!(languages.len()),
                json!(before),
                json!(after),
                json!(after - before),
            ]);
        }
    }
    table
}

fn figures(
    plan: &Plan,
    steps: &Steps,
    languages: &BTreeMap<String, Language>,
    evaluations: &Evaluations,
    history: &[Happening],
    attempts: usize,
) -> Table {
    let mut table = Table::new("figures", &["what", "value", "more"]);
    let mut figure = |what: &str, value: String, more: String| table.push(vec![json!(what), json!(value), json!(more)]);
    let bits: Vec<(&String, [f64; 2])> = languages
        .iter()
        .filter_map(|(code, language)| Some((code, language.bits()?)))
        .collect();
    if bits.is_empty() {
        if let Some(evaluation) = evaluations.after.or(evaluations.before) {
            figure(
                "Bits per byte",
                format!("{:.3}", evaluation.macro_bits_per_byte),
                format!("mean over {}", text::counted(evaluation.languages.len(), "language")),
            );
        }
    } else {
        let over = |at: usize| mean(bits.iter().map(|(_, bits)| bits[at]));
        figure(
            "Bits per byte",
            format!("{:.3} → {:.3}", over(0), over(1)),
            format!(
                "{}, mean over {}",
                text::change(over(0), over(1)),
                text::counted(bits.len(), "language")
            ),
        );
        let better = bits.iter().filter(|(_, [before, after])| after < before).count();
        let change =
            |(code, [before, after]): &(&String, [f64; 2])| format!("{code} {}", text::change(*before, *after));
        let relative = |(_, [before, after]): &(&String, [f64; 2])| (after - before) / before;
        let best = bits.iter().min_by(|a, b| relative(a).total_cmp(&relative(b)));
        let worst = bits.iter().max_by(|a, b| relative(a).total_cmp(&relative(b)));
        let ends: Vec<String> = best.into_iter().chain(worst).map(change).collect();
        figure(
            "Languages better",
            format!("{} of {}", text::count(better), text::count(bits.len())),
            ends.join(", "),
        );
        if let Some(paired) = &evaluations.paired {
            figure(
                "Differences that are real",
                format!(
                    "{} better, {} worse",
                    text::count(paired.better),
                    text::count(paired.worse)
                ),
                format!("95 % a language, against {}", file_stem(&paired.baseline)),
            );
        }
        let per_byte = |result: &Option<LanguageResult>| result.as_ref().map(|it| it.tokens as f64 / it.bytes as f64);
        let over = |one: fn(&Language) -> &Option<LanguageResult>| {
            let both = languages.values().filter(|language| language.bits().is_some());
            mean(both.filter_map(|language| per_byte(one(language))))
        };
        let (before, after) = (over(|language| &language.before), over(|language| &language.after));
        figure(
            "Tokens per byte",
            format!("{before:.3} → {after:.3}"),
            format!("{}: fewer is cheaper", text::change(before, after)),
        );
    }
    if let (Some(first), Some(last)) = (steps.lines.first(), steps.lines.last()) {
        figure(
            "Loss",
            format!("{:.2} → {:.2}", first.loss, last.loss),
            "first and last step, nats per token".to_owned(),
        );
        let best = steps.lines.iter().filter_map(|step| Some((step.held_out?, step.step)));
        if let Some((bits, step)) = best.min_by(|a, b| a.0.total_cmp(&b.0)) {
            figure(
                "Best while training",
                format!("{bits:.3}"),
                format!(
                    "bits per byte of held-out text, after {}",
                    text::counted(step as usize + 1, "step")
                ),
            );
        }
        let taken = last.step + 1;
        figure(
            "Steps",
            match taken >= plan.train.steps {
                true => text::count(taken),
                false => format!("{} of {}", text::count(taken), text::count(plan.train.steps)),
            },
            format!(
                "{} tokens, {} a step",
                text::count(taken * (plan.train.rows_per_step * plan.train.sequence_length) as u64),
                text::count(plan.train.rows_per_step * plan.train.sequence_length)
            ),
        );
        let seconds: f64 = steps.lines.iter().map(|step| step.seconds).sum();
        let tokens: f64 = steps
            .lines
            .iter()
            .map(|step| step.tokens_per_second * step.seconds)
            .sum();
        let ranks = last_environment(history).map_or(plan.launch.ranks, |environment| environment.ranks);
        figure(
            "Tokens per second",
            text::count((tokens / seconds.max(1e-9)) as u64),
            format!("in training steps, {}", text::counted(ranks, "rank")),
        );
        figure(
            "Memory",
            text::bytes(steps.lines.iter().map(|step| step.resident_bytes).max().unwrap_or(0)),
            "of the largest rank, at most".to_owned(),
        );
        let wall = last.unix_time - (first.unix_time - first.seconds);
        figure(
            "Time",
            text::duration(Duration::from_secs_f64(wall.max(0.0))),
            match attempts {
                0 | 1 => "from the first step to the last, in one attempt".to_owned(),
                n => format!("from the first step to the last, in {n} attempts"),
            },
        );
    }
    let saves = history.iter().filter_map(|line| match &line.what {
        What::Saved { bytes, stall, .. } => Some((*bytes, *stall)),
        _ => None,
    });
    let saves: Vec<(u64, f64)> = saves.collect();
    if let Some((bytes, _)) = saves.last() {
        let stall: f64 = saves.iter().map(|(_, stall)| stall).sum();
        figure(
            "Checkpoints",
            text::count(saves.len()),
            format!("{} each; training waited {stall:.2} s for all", text::bytes(*bytes)),
        );
    }
    table
}

fn file_stem(path: &str) -> String {
    Path::new(path)
        .file_stem()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned()
}

fn last_environment(history: &[Happening]) -> Option<&crate::history::Environment> {
    history.iter().rev().find_map(|line| match &line.what {
        What::Began { environment, .. } => Some(environment),
        _ => None,
    })
}

/// The plan by paths of keys.
fn plan_table(plan: &Plan) -> Table {
    let mut table = Table::new("plan", &["key", "value"]);
    if let Ok(value) = serde_json::to_value(plan) {
        flatten(String::new(), &value, &mut table);
    }
    table
}

fn flatten(path: String, value: &Value, table: &mut Table) {
    let below = |key: &str| {
        if path.is_empty() {
            key.to_owned()
        } else {
            format!("{path}.{key}")
        }
    };
    match value {
        Value::Object(fields) if !fields.is_empty() => {
            for (key, value) in fields {
                flatten(below(key), value, table);
            }
        }
        Value::Array(items) if items.iter().any(|item| item.is_object()) => {
            for (at, item) in items.iter().enumerate() {
                flatten(below(&at.to_string()), item, table);
            }
        }
        Value::Array(items) => {
            let items: Vec<String> = items.iter().map(words).collect();
            table.push(vec![json!(path), json!(items.join(", "))]);
        }
        Value::Null => {}
        other => table.push(vec![json!(path), json!(words(other))]),
    }
}

fn words(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

/// Where it ran and how it was measured. What differed between attempts is listed once each.
fn environment(history: &[Happening], evaluations: &Evaluations) -> Table {
    let mut seen: Vec<(String, BTreeSet<String>)> = Vec::new();
    let mut say = |key: &str, value: String| {
        if value.is_empty() {
            return;
        }
        match seen.iter_mut().find(|(known, _)| known == key) {
            Some((_, values)) => drop(values.insert(value)),
            None => seen.push((key.to_owned(), BTreeSet::from([value]))),
        }
    };
    for line in history {
        let What::Began { environment: it, .. } = &line.what else {
            continue;
        };
        say("panglot", it.panglot.clone());
        say("first rank's host", it.host.clone());
        say("job", it.job.clone());
        say(
            "ranks",
            format!("{}, {} of them on the first host", it.ranks, it.ranks_on_this_host),
        );
        say("collectives", it.engine.clone());
        say("device", it.device.clone());
        say("processor", it.processor.clone());
        say("cores", it.cores.to_string());
        say("memory of the host", text::bytes(it.memory_bytes));
        say("kernel", it.kernel.clone());
        for (name, which) in &it.libraries {
            say(name, which.clone());
        }
    }
    for (which, evaluation) in [("before", evaluations.before), ("after", evaluations.after)] {
        let Some(evaluation) = evaluation else { continue };
        let mut say = |what: &str, value: &str| say(&format!("measured {which}: {what}"), value.to_owned());
        say("model", &evaluation.model);
        say("precision", &evaluation.precision);
        if let Some(made) = &evaluation.made_by {
            say("protocol", &made.protocol);
            say("model's digest", &made.model_digest);
            say("tokenizer's digest", &made.tokenizer_digest);
            say("data's digest", &made.data_digest);
            say("panglot", &made.panglot);
        }
    }
    let mut table = Table::new("environment", &["key", "value"]);
    for (key, values) in seen {
        let values: Vec<String> = values.into_iter().collect();
        table.push(vec![json!(key), json!(values.join("; "))]);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_read_and_a_wrong_line_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("places.tsv");
        fs::write(&file, "eng\t53\t-1.5\n\nyor_Latn\t8.0\t4.3\n").unwrap();
        let places = read_places(&file).unwrap();
        assert_eq!((places["eng"], places["yor_Latn"]), ([53.0, -1.5], [8.0, 4.3]));
        for wrong in ["eng\t53", "eng\tnorth\t1", "eng\t91\t0", "eng 53 1"] {
            fs::write(&file, format!("yor\t8\t4\n{wrong}\n")).unwrap();
            let said = read_places(&file).unwrap_err().to_string();
            assert!(said.contains("line 2") && said.contains("latitude"), "{said}");
        }
    }
}
