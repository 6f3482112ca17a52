//! A run as one HTML page that a person opens: everything inline, nothing fetched.

mod chart;
mod page;
pub mod vocabulary;

use std::collections::BTreeMap;
use std::fs;

use anyhow::{Context, ensure};
use configs::Plan;

use crate::evaluation::{Comparison, Evaluation};
use crate::events::StepMetrics;

pub use chart::scaling;
pub use page::page;

/// What a page is drawn from. Parts that the run does not have yet are left out of the page.
pub struct Run {
    pub plan: Plan,
    /// In order, each step once.
    pub steps: Vec<StepMetrics>,
    pub before: Option<Evaluation>,
    pub comparison: Option<Comparison>,
    pub languages: BTreeMap<String, Language>,
}

#[derive(Clone, Debug, Default, PartialEq)]
pub struct Language {
    /// As the corpus names it, in English.
    pub name: String,
    /// The share of rows that the sampler aims at.
    pub planned: f64,
    /// The share of rows that were trained on.
    pub realised: f64,
    /// Training tokens in the corpus.
    pub tokens: u64,
}

impl Run {
    pub fn read(plan: &Plan) -> anyhow::Result<Run> {
        let run = &plan.folders.run;
        let steps = read_steps(&run.join("metrics.jsonl"))?;
        let evaluation = |name: &str| Evaluation::read(&run.join(format!("evaluations/{name}.json"))).ok();
        let (before, after) = (evaluation("before"), evaluation("after"));
        ensure!(
            !steps.is_empty() || before.is_some() || after.is_some(),
            "{} holds neither metrics.jsonl nor evaluations yet; run `panglot train` first",
            run.display()
        );
        let comparison = before
            .as_ref()
            .zip(after.as_ref())
            .and_then(|(before, after)| Comparison::of(before, after));
        let languages = languages(plan, &steps);
        Ok(Run {
            plan: plan.clone(),
            steps,
            before: after.or(before),
            comparison,
            languages,
        })
    }
}

fn read_steps(file: &std::path::Path) -> anyhow::Result<Vec<StepMetrics>> {
    let Ok(text) = fs::read_to_string(file) else {
        return Ok(Vec::new());
    };
    let mut by_step = BTreeMap::new();
    for (i, line) in text.lines().enumerate() {
        match serde_json::from_str::<StepMetrics>(line) {
            // A step that was taken again after an interruption counts as it was taken last.
            Ok(step) => drop(by_step.insert(step.step, step)),
            // The last line may be half-written: the run may be going on.
            Err(_) if i + 1 == text.lines().count() => {}
            Err(error) => return Err(error).with_context(|| format!("{} line {}", file.display(), i + 1)),
        }
    }
    Ok(by_step.into_values().collect())
}

fn languages(plan: &Plan, steps: &[StepMetrics]) -> BTreeMap<String, Language> {
    let mut languages: BTreeMap<String, Language> = BTreeMap::new();
    if let Ok(corpus) = corpus::Corpus::open(&plan.folders.corpus) {
        for entry in &corpus.manifest().languages {
            languages.entry(entry.language.to_string()).or_default().name = entry.name.clone();
        }
    }
    if let Ok(stream) = crate::sampling::stream(plan) {
        for part in stream.plan() {
            let language = languages.entry(part.language.to_string()).or_default();
            language.tokens += part.tokens;
            language.planned += part.rows as f64 / plan.train.rows() as f64;
        }
    }
    let rows: u64 = steps
        .iter()
        .flat_map(|step| step.languages.values())
        .map(|&rows| u64::from(rows))
        .sum();
    for (name, &drawn) in steps.iter().flat_map(|step| &step.languages) {
        languages.entry(name.clone()).or_default().realised += f64::from(drawn) / rows as f64;
    }
    languages
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::evaluation::tests::evaluation;

    fn step(step: u64, loss: f64) -> StepMetrics {
        StepMetrics {
            step,
            steps: 60,
            loss,
            grad_norm: 1.0,
            skipped: false,
            skip_reason: None,
            held_out: None,
            lr: [(configs::Group::Lora, 1e-3)].into(),
            targets: 100,
            targets_so_far: 100 * (step + 1),
            seconds: 1.0,
            tokens_per_second: 100.0,
            resident_bytes: 1 << 30,
            bytes_sent: 0,
            bytes_least: 0,
            rows_digest: String::new(),
            languages: [(language(step as usize), 3), (language(7), 1)].into(),
            parts: BTreeMap::new(),
            unix_time: 0.0,
        }
    }

    fn language(i: usize) -> String {
        let letter = |n: usize| char::from(b'a' + (n % 26) as u8);
        format!("{}{}{}_Latn", letter(i / 676), letter(i / 26), letter(i))
    }

    fn run(n_languages: usize) -> Run {
        let recipe = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs/demo.yaml");
        let plan = configs::load(&recipe, &[]).unwrap();
        let names: Vec<_> = (0..n_languages).map(language).collect();
        let results = |gain: f64| {
            let of = |(i, name)| (name, 2.0 + i as f64 / 200.0 - gain * (1.0 - i as f64 / 500.0));
            evaluation(&names.iter().map(String::as_str).enumerate().map(of).collect::<Vec<_>>())
        };
        let (before, after) = (results(0.0), results(0.8));
        let steps: Vec<_> = (0..60).map(|i| step(i, 4.0 - i as f64 / 30.0)).collect();
        let mut languages = languages(&plan, &steps);
        for name in &names {
            let entry = languages.entry(name.clone()).or_default();
            entry.name = "<Kurdish & others>".to_owned();
            entry.planned = 1.0 / n_languages as f64;
        }
        let comparison = Comparison::of(&before, &after);
        Run {
            plan,
            steps,
            before: Some(before),
            comparison,
            languages,
        }
    }

    #[test]
    fn a_page_of_530_languages_is_whole_and_fetches_nothing() {
        let page = page(&run(530));
        for outside in ["http", "src=", "url(", "<link", "@import", "<script src"] {
            assert!(
                !page.contains(outside),
                "the page refers to something outside: {outside}"
            );
        }
        assert_eq!(page.matches("<svg").count(), page.matches("</svg>").count());
        assert_eq!(page.matches("<svg").count(), 4, "overview, loss, shares, languages");
        for name in (0..530).map(language) {
            assert!(
                page.matches(&name).count() >= 2,
                "{name} is in the chart and in the table"
            );
        }
        assert!(page.contains("&lt;Kurdish &amp; others&gt;") && !page.contains("<Kurdish"));
        assert!(
            page.contains("500 of 530 languages improved"),
            "those after the 500th grew worse or stayed"
        );
        assert!(page.len() < 1_000_000, "{} bytes", page.len());
        for broken in ["\"NaN", ">NaN", "\"inf", ">inf", "-inf"] {
            assert!(!page.contains(broken), "{broken} is no number");
        }
    }

    #[test]
    fn a_run_that_has_only_begun_has_a_page_too() {
        let mut run = run(3);
        (run.comparison, run.before) = (None, None);
        run.steps.truncate(1);
        let page = page(&run);
        assert_eq!(page.matches("<svg").count(), 2, "loss and shares");
    }

    #[test]
    fn a_step_taken_twice_counts_once_and_a_torn_last_line_is_no_error() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("metrics.jsonl");
        let line = |s: &StepMetrics| serde_json::to_string(s).unwrap();
        let text = [
            line(&step(0, 4.0)),
            line(&step(1, 3.0)),
            line(&step(1, 2.0)),
            line(&step(2, 1.0))[..40].to_owned(),
        ];
        fs::write(&file, text.join("\n")).unwrap();
        let losses: Vec<_> = read_steps(&file).unwrap().iter().map(|step| step.loss).collect();
        assert_eq!(losses, [4.0, 2.0]);
        fs::write(&file, "{}\n{}\n").unwrap();
        assert!(read_steps(&file).is_err());
    }
}
