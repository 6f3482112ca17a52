//! What is known of each language, and means over those of a script, a family, a resource group.

use std::collections::BTreeMap;

use configs::Plan;
use corpus::{Corpus, Split};
use serde_json::json;

use super::Evaluations;
use super::steps::Steps;
use super::table::Table;
use crate::evaluation::{LanguageResult, resource_group};
use crate::families::family;
use crate::statistics::mean;

/// All that is known of one language.
#[derive(Clone, Debug, Default)]
pub struct Language {
    name: String,
    group: String,
    pub place: Option<[f64; 2]>,
    corpus_bytes: u64,
    corpus_tokens: Option<u64>,
    /// In the whole run.
    planned_tokens: Option<u64>,
    planned_rows: u64,
    realised_rows: u64,
    pub before: Option<LanguageResult>,
    pub after: Option<LanguageResult>,
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

    pub fn bits(&self) -> Option<[f64; 2]> {
        Some([self.before.as_ref()?.bits_per_byte, self.after.as_ref()?.bits_per_byte])
    }
}

pub fn languages(plan: &Plan, steps: &Steps, evaluations: &Evaluations) -> BTreeMap<String, Language> {
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

pub fn language_table(languages: &BTreeMap<String, Language>) -> Table {
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
pub fn groups(languages: &BTreeMap<String, Language>) -> Table {
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
