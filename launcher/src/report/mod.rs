//! A run as one HTML page that a person opens, and as tables for programs: everything inline, nothing fetched. What is shown
//! is gathered here from the run's folder; `page.rs` and the files in `page/` only draw it.

mod chart;
mod circumstances;
mod figures;
#[doc(hidden)]
pub mod generated;
mod languages;
mod outline;
mod page;
mod steps;
mod table;
mod timeline;
pub mod vocabulary;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use configs::Plan;
use serde_json::{Map, Value, json};

use crate::evaluation::{Evaluation, Paired};
use crate::files;
use crate::history::History;

pub use chart::scaling;
pub use page::page;
pub use table::{Table, csv};

use circumstances::{environment, plan_table};
use figures::figures;
use languages::{groups, language_table, languages};
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
