//! Results of `panglot eval nll`, two of them compared language by language, and what a vocabulary costs before any step.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use corpus::{Corpus, Split};
use serde::{Deserialize, Serialize};

use crate::families::family;
use crate::measurement::MadeBy;
use crate::statistics::{FEWEST_UNITS, bootstrap, mean};
use crate::{files, text};

/// What is asked of a worker: the held-out documents of a corpus, and how they are scored.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Nll {
    pub corpus: PathBuf,
    /// Empty: all of the corpus.
    pub languages: Vec<String>,
    pub settings: configs::Evaluation,
    /// A special token before every document; context only. Without one the first token of the text is, and its bytes do
    /// not count.
    pub document_start: Option<String>,
    pub residual: configs::Residual,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Evaluation {
    /// The folder that was measured.
    pub model: String,
    pub precision: String,
    pub languages: Vec<LanguageResult>,
    /// Mean over languages, each counting once.
    pub macro_bits_per_byte: f64,
    pub macro_nats_per_document: f64,
    pub tokens: u64,
    pub seconds: f64,
    /// As `macro_bits_per_byte`, by other units.
    #[serde(default)]
    pub macro_bits_per_character: f64,
    #[serde(default)]
    pub macro_nats_per_token: f64,
    /// 95 % of the macro mean of bits per byte, languages drawn again; none of fewer than five.
    #[serde(default)]
    pub macro_interval: Option<[f64; 2]>,
    /// By what was trained on: `high` … `unseen`, see [`resource_group`].
    #[serde(default)]
    pub by_group: BTreeMap<String, Means>,
    #[serde(default)]
    pub by_script: BTreeMap<String, Means>,
    #[serde(default)]
    pub by_family: BTreeMap<String, Means>,
    /// How it was measured; none in results of older versions.
    #[serde(default)]
    pub settings: Option<Nll>,
    #[serde(default)]
    pub made_by: Option<MadeBy>,
}

/// Means over the languages of a group, each counting once.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Means {
    pub languages: usize,
    pub bits_per_byte: f64,
    pub bits_per_character: f64,
    pub nats_per_token: f64,
    pub nats_per_document: f64,
}

/// One document, for comparisons pair by pair.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DocumentResult {
    pub language: String,
    pub key: String,
    /// Of the whole text.
    pub text_bytes: u64,
    /// Of what was scored.
    pub bytes: u64,
    pub characters: u64,
    pub tokens: u64,
    pub nats: f64,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct LanguageResult {
    pub language: String,
    pub documents: u64,
    pub bytes: u64,
    pub characters: u64,
    /// Targets that were scored.
    pub tokens: u64,
    /// Summed negative log-likelihood.
    pub nats: f64,
    pub bits_per_byte: f64,
    #[serde(default)]
    pub bits_per_character: f64,
    #[serde(default)]
    pub nats_per_token: f64,
    #[serde(default)]
    pub nats_per_document: f64,
    /// 95 % of bits per byte, documents drawn again; none of fewer than five.
    #[serde(default)]
    pub interval: Option<[f64; 2]>,
    /// See [`resource_group`].
    #[serde(default)]
    pub group: String,
}

impl LanguageResult {
    /// Of documents of one language, of which there is at least one.
    pub fn of(language: &str, documents: &[DocumentResult]) -> LanguageResult {
        let sum = |of: fn(&DocumentResult) -> u64| documents.iter().map(of).sum::<u64>();
        // In the documents' order, whoever scored them.
        let nats: f64 = documents.iter().map(|document| document.nats).sum();
        let (bytes, characters, tokens) = (sum(|d| d.bytes), sum(|d| d.characters), sum(|d| d.tokens));
        let bits = nats / std::f64::consts::LN_2;
        let interval = bootstrap(documents.len(), |sample| {
            let of = |value: &dyn Fn(&DocumentResult) -> f64| sample.iter().map(|i| value(&documents[*i])).sum::<f64>();
            of(&|d| d.nats) / std::f64::consts::LN_2 / of(&|d| d.bytes as f64)
        });
        LanguageResult {
            language: language.to_owned(),
            documents: documents.len() as u64,
            bytes,
            characters,
            tokens,
            nats,
            bits_per_byte: bits / bytes as f64,
            bits_per_character: bits / characters as f64,
            nats_per_token: nats / tokens as f64,
            nats_per_document: nats / documents.len() as f64,
            interval,
            group: String::new(),
        }
    }
}

impl Means {
    fn of(languages: &[&LanguageResult]) -> Means {
        let over = |of: fn(&LanguageResult) -> f64| mean(languages.iter().map(|language| of(language)));
        Means {
            languages: languages.len(),
            bits_per_byte: over(|l| l.bits_per_byte),
            bits_per_character: over(|l| l.bits_per_character),
            nats_per_token: over(|l| l.nats_per_token),
            nats_per_document: over(|l| l.nats_per_document),
        }
    }
}

/// EMMA-500's groups, by the bytes that a corpus trains on: theirs are whitespace tokens (10⁹, 10⁸, … 10⁵), counted here as
/// six bytes each, so that languages without spaces have a group too.
pub fn resource_group(train_bytes: u64) -> &'static str {
    match train_bytes / 6 {
        1_000_000_000.. => "high",
        100_000_000.. => "medium-high",
        10_000_000.. => "medium",
        1_000_000.. => "medium-low",
        100_000.. => "low",
        _ => "unseen",
    }
}

/// The base and, on the same text, the extended model that no step has trained: once for each start of its new rows, by
/// whose name it goes.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct DayZero {
    pub base: Evaluation,
    pub extended: Vec<Evaluation>,
}

/// One language before and after, in bits per byte: independent of the tokenizer.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Change {
    pub language: String,
    pub before: f64,
    pub after: f64,
}

impl Change {
    pub fn delta(&self) -> f64 {
        self.after - self.before
    }

    pub fn improved(&self) -> bool {
        self.after < self.before
    }
}

/// Two evaluations over the languages that both have.
#[derive(Clone, Debug)]
pub struct Comparison {
    /// From the greatest gain to the greatest loss.
    pub changes: Vec<Change>,
    pub before: f64,
    pub after: f64,
}

impl Evaluation {
    /// Of languages, each of which has documents; groups by the corpus that the plan measures on, if it is given.
    pub fn of(
        model: String,
        precision: String,
        mut languages: Vec<LanguageResult>,
        corpus: Option<&Corpus>,
    ) -> Evaluation {
        if let Some(corpus) = corpus {
            let mut trained: BTreeMap<&str, u64> = BTreeMap::new();
            for entry in &corpus.manifest().languages {
                *trained.entry(entry.language.as_str()).or_default() += entry.counts(Split::Train).bytes;
            }
            for language in &mut languages {
                let bytes = trained.get(language.language.as_str()).copied().unwrap_or(0);
                language.group = resource_group(bytes).to_owned();
            }
        }
        let all: Vec<&LanguageResult> = languages.iter().collect();
        let means = Means::of(&all);
        let by = |key: &dyn Fn(&LanguageResult) -> String| {
            let mut groups: BTreeMap<String, Vec<&LanguageResult>> = BTreeMap::new();
            for language in &languages {
                groups.entry(key(language)).or_default().push(language);
            }
            groups.into_iter().map(|(name, of)| (name, Means::of(&of))).collect()
        };
        Evaluation {
            model,
            precision,
            macro_bits_per_byte: means.bits_per_byte,
            macro_nats_per_document: means.nats_per_document,
            macro_bits_per_character: means.bits_per_character,
            macro_nats_per_token: means.nats_per_token,
            macro_interval: bootstrap(all.len(), |sample| mean(sample.iter().map(|i| all[*i].bits_per_byte))),
            by_group: by(&|language| language.group.clone()),
            by_script: by(&|language| language.language.get(4..8).unwrap_or("unknown").to_owned()),
            by_family: by(&|language| family(language.language.get(..3).unwrap_or_default()).to_owned()),
            tokens: languages.iter().map(|language| language.tokens).sum(),
            seconds: 0.0,
            settings: None,
            made_by: None,
            languages,
        }
    }

    /// Where the documents of the result in `file` are.
    pub fn documents_file(file: &Path) -> PathBuf {
        file.with_extension("documents.jsonl")
    }

    pub fn read(file: &Path) -> anyhow::Result<Evaluation> {
        files::read_json(file)
    }

    /// Best, median and worst languages and the mean.
    pub fn table(&self) -> String {
        let mut languages: Vec<_> = self.languages.iter().collect();
        languages.sort_by(|a, b| a.bits_per_byte.total_cmp(&b.bits_per_byte));
        let row = |place: &str, result: &LanguageResult| {
            vec![
                place.to_owned(),
                result.language.clone(),
                text::count(result.documents),
                text::count(result.bytes),
                text::count(result.tokens),
                format!("{:.3}", result.bits_per_byte),
            ]
        };
        let mut rows = Vec::new();
        let n = languages.len();
        rows.extend(languages.iter().take(3).map(|result| row("best", result)));
        if n > 6 {
            rows.push(row("median", languages[n / 2]));
        }
        rows.extend(
            languages
                .iter()
                .skip(3.max(n.saturating_sub(3)))
                .map(|result| row("worst", result)),
        );
        let mean = format!("{:.3}", self.macro_bits_per_byte);
        rows.push(vec![
            "mean".to_owned(),
            text::counted(n, "language"),
            String::new(),
            String::new(),
            text::count(self.tokens),
            mean,
        ]);
        text::table(
            &["", "language", ">documents", ">bytes", ">tokens", ">bits per byte"],
            rows,
        )
    }
}

/// Two models on the same documents.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Paired {
    pub baseline: String,
    pub model: String,
    pub languages: Vec<PairedLanguage>,
    /// Mean over languages of bits per byte, the model's less the baseline's, and its 95 %, languages drawn again.
    pub difference: f64,
    pub interval: Option<[f64; 2]>,
    /// Languages of which zero lies below, or above, the difference's 95 %.
    pub worse: usize,
    pub better: usize,
    /// Languages of fewer than five documents: nothing is said of them alone.
    pub too_few: usize,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PairedLanguage {
    pub language: String,
    pub documents: usize,
    /// Bits per byte.
    pub baseline: f64,
    pub model: f64,
    /// 95 % of the difference, pairs of documents drawn again.
    pub interval: Option<[f64; 2]>,
}

impl Paired {
    /// Of two results' files, with the documents beside them.
    ///
    /// # Errors
    /// When a file is not there, or the two have no document in common.
    pub fn of(baseline: &Path, model: &Path) -> anyhow::Result<Paired> {
        let (before, after) = (documents(baseline)?, documents(model)?);
        let known: BTreeMap<(&str, &str), &DocumentResult> = before
            .iter()
            .map(|d| ((d.language.as_str(), d.key.as_str()), d))
            .collect();
        let mut pairs: BTreeMap<&str, Vec<Pair>> = BTreeMap::new();
        for document in &after {
            if let Some(before) = known.get(&(document.language.as_str(), document.key.as_str()))
                && before.text_bytes == document.text_bytes
            {
                pairs.entry(&document.language).or_default().push([before, document]);
            }
        }
        ensure!(
            !pairs.is_empty(),
            "{} and {} have no document in common; measure both on one corpus",
            baseline.display(),
            model.display()
        );
        let languages: Vec<PairedLanguage> = pairs
            .into_iter()
            .map(|(name, pairs)| PairedLanguage::of(name, &pairs))
            .collect();
        let difference = |language: &PairedLanguage| language.model - language.baseline;
        let real = |is: fn(f64, f64) -> bool| {
            languages
                .iter()
                .filter(|l| l.interval.is_some_and(|[low, high]| is(low, high)))
                .count()
        };
        Ok(Paired {
            baseline: baseline.display().to_string(),
            model: model.display().to_string(),
            difference: mean(languages.iter().map(difference)),
            interval: bootstrap(languages.len(), |sample| {
                mean(sample.iter().map(|i| difference(&languages[*i])))
            }),
            worse: real(|low, _| low > 0.0),
            better: real(|_, high| high < 0.0),
            too_few: languages.iter().filter(|l| l.documents < FEWEST_UNITS).count(),
            languages,
        })
    }

    pub fn table(&self) -> String {
        let mut languages: Vec<_> = self.languages.iter().collect();
        languages.sort_by(|a, b| (a.model - a.baseline).total_cmp(&(b.model - b.baseline)));
        let row = |l: &&PairedLanguage| {
            let interval = l
                .interval
                .map_or(String::new(), |[low, high]| format!("{low:+.3} … {high:+.3}"));
            let [before, after] = [l.baseline, l.model].map(|bits| format!("{bits:.3}"));
            let difference = format!("{:+.3}", l.model - l.baseline);
            vec![
                l.language.clone(),
                text::count(l.documents),
                before,
                after,
                difference,
                interval,
            ]
        };
        let n = languages.len();
        let rows = languages.iter().take(5).map(row);
        let rows = rows.chain(languages.iter().skip(5.max(n.saturating_sub(5))).map(row));
        let header = ["", ">documents", ">baseline", ">model", ">bits per byte", ">95 %"];
        let interval = self
            .interval
            .map_or(String::new(), |[low, high]| format!(" (95 %: {low:+.3} … {high:+.3})"));
        format!(
            "{}\nMean over {}: {:+.3} bits per byte{interval}. Better in {}, worse in {}, not told apart in {}{}",
            text::table(&header, rows),
            text::counted(n, "language"),
            self.difference,
            self.better,
            self.worse,
            n - self.better - self.worse - self.too_few,
            match self.too_few {
                0 => String::new(),
                few => format!("; {few} with fewer than {FEWEST_UNITS} documents, too few to tell"),
            }
        )
    }
}

/// A document of the baseline's and of the model's.
type Pair<'a> = [&'a DocumentResult; 2];

impl PairedLanguage {
    fn of(language: &str, pairs: &[Pair]) -> PairedLanguage {
        let all: Vec<usize> = (0..pairs.len()).collect();
        // Each by what it has scored: without a token before a text, tokenizers begin at different places.
        let bits = |sample: &[usize], side: usize| {
            let scored = || sample.iter().map(|i| pairs[*i][side]);
            let bytes: u64 = scored().map(|document| document.bytes).sum();
            scored().map(|document| document.nats).sum::<f64>() / std::f64::consts::LN_2 / bytes as f64
        };
        PairedLanguage {
            language: language.to_owned(),
            documents: pairs.len(),
            baseline: bits(&all, 0),
            model: bits(&all, 1),
            interval: bootstrap(pairs.len(), |sample| bits(sample, 1) - bits(sample, 0)),
        }
    }
}

fn documents(result: &Path) -> anyhow::Result<Vec<DocumentResult>> {
    let file = Evaluation::documents_file(result);
    let text = fs::read_to_string(&file).with_context(|| {
        format!(
            "cannot read {}, the documents of a result; measure that model again with `panglot eval nll`",
            file.display()
        )
    })?;
    let read = |line| serde_json::from_str(line).with_context(|| format!("{} is damaged", file.display()));
    text.lines().map(read).collect()
}

impl DayZero {
    /// Means over languages, each counting once.
    pub fn table(&self) -> String {
        let base = self.base.macro_bits_per_byte;
        let row = |name: String, measured: &Evaluation, change: String| {
            let bits = measured.macro_bits_per_byte;
            let nats = bits * std::f64::consts::LN_2;
            vec![
                name,
                format!("{nats:.3}"),
                format!("{bits:.3}"),
                change,
                text::count(measured.tokens),
            ]
        };
        let mut rows = vec![row("the base, its own pieces".to_owned(), &self.base, String::new())];
        rows.extend(self.extended.iter().map(|measured| {
            let change = text::change(base, measured.macro_bits_per_byte);
            row(format!("extended, new_rows: {}", measured.model), measured, change)
        }));
        let header = [
            "before any step",
            ">nats per byte",
            ">bits per byte",
            ">change",
            ">tokens",
        ];
        let languages = text::counted(self.base.languages.len(), "language");
        let bytes: u64 = self.base.languages.iter().map(|language| language.bytes).sum();
        format!(
            "{}\nMean over {languages}, {} of held-out text",
            text::table(&header, rows),
            text::bytes(bytes)
        )
    }
}

impl Comparison {
    /// `None` where no language is in both.
    pub fn of(before: &Evaluation, after: &Evaluation) -> Option<Comparison> {
        let then: BTreeMap<_, _> = before
            .languages
            .iter()
            .map(|result| (&result.language, result))
            .collect();
        let mut changes: Vec<_> = (after.languages.iter())
            .filter_map(|now| {
                let before = then.get(&now.language)?.bits_per_byte;
                Some(Change {
                    language: now.language.clone(),
                    before,
                    after: now.bits_per_byte,
                })
            })
            .collect();
        changes.sort_by(|a, b| a.delta().total_cmp(&b.delta()));
        let mean = |of: fn(&Change) -> f64| changes.iter().map(of).sum::<f64>() / changes.len() as f64;
        let (before, after) = (mean(|change| change.before), mean(|change| change.after));
        (!changes.is_empty()).then_some(Comparison { changes, before, after })
    }

    pub fn improved(&self) -> usize {
        self.changes.iter().filter(|change| change.improved()).count()
    }

    pub fn median(&self) -> &Change {
        &self.changes[self.changes.len() / 2]
    }

    /// Greatest gains, median, least gains, mean.
    pub fn table(&self) -> String {
        let numbers = |before: f64, after: f64| {
            [
                format!("{before:.3}"),
                format!("{after:.3}"),
                format!("{:+.3}", after - before),
                text::change(before, after),
            ]
        };
        let row = |place: &str, language: String, before, after| {
            [place.to_owned(), language]
                .into_iter()
                .chain(numbers(before, after))
                .collect::<Vec<_>>()
        };
        let of = |place, change: &Change| row(place, change.language.clone(), change.before, change.after);
        let n = self.changes.len();
        let mut rows: Vec<_> = self.changes.iter().take(4).map(|change| of("best", change)).collect();
        if n > 8 {
            rows.push(of("median", self.median()));
        }
        rows.extend(
            self.changes
                .iter()
                .skip(4.max(n.saturating_sub(4)))
                .map(|change| of("worst", change)),
        );
        rows.push(row("mean", text::counted(n, "language"), self.before, self.after));
        text::table(
            &["", "language", ">before", ">after", ">bits per byte", ">change"],
            rows,
        )
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub fn evaluation(bits_per_byte: &[(&str, f64)]) -> Evaluation {
        let languages: Vec<_> = bits_per_byte
            .iter()
            .map(|&(language, bits_per_byte)| LanguageResult {
                language: language.to_owned(),
                documents: 3,
                bytes: 1000,
                characters: 900,
                tokens: 300,
                nats: bits_per_byte * 1000.0 * std::f64::consts::LN_2,
                bits_per_byte,
                bits_per_character: bits_per_byte / 0.9,
                nats_per_token: bits_per_byte,
                nats_per_document: 100.0 * bits_per_byte,
                interval: None,
                group: String::new(),
            })
            .collect();
        Evaluation::of("base".to_owned(), "f32".to_owned(), languages, None)
    }

    #[test]
    fn languages_are_compared_by_name_and_sorted_by_gain() {
        let before = evaluation(&[("eng_Latn", 1.0), ("yor_Latn", 4.0), ("gone_Latn", 9.0)]);
        let after = evaluation(&[("yor_Latn", 3.0), ("eng_Latn", 1.5), ("new_Latn", 9.0)]);
        let comparison = Comparison::of(&before, &after).unwrap();
        assert_eq!(
            comparison
                .changes
                .iter()
                .map(|c| c.language.as_str())
                .collect::<Vec<_>>(),
            ["yor_Latn", "eng_Latn"]
        );
        assert_eq!(
            (comparison.before, comparison.after, comparison.improved()),
            (2.5, 2.25, 1)
        );
        assert!(comparison.table().contains("-25.0 %"), "{}", comparison.table());
        assert!(Comparison::of(&before, &evaluation(&[("new_Latn", 1.0)])).is_none());
    }

    #[test]
    fn a_difference_is_real_where_documents_agree_on_it() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, nats: &dyn Fn(&str, u64) -> f64| {
            let file = folder.path().join(name);
            let mut lines = String::new();
            for language in ["aaa_Latn", "bbb_Latn", "ccc_Latn"] {
                for i in 0..if language == "ccc_Latn" { 2 } else { 30 } {
                    let document = DocumentResult {
                        language: language.to_owned(),
                        key: format!("article-{i}"),
                        text_bytes: 250,
                        // Their tokenizers begin at different places.
                        bytes: if name == "after.json" { 100 } else { 200 },
                        characters: 90,
                        tokens: 30,
                        nats: nats(language, i),
                    };
                    lines += &(serde_json::to_string(&document).unwrap() + "\n");
                }
            }
            fs::write(Evaluation::documents_file(&file), lines).unwrap();
            file
        };
        let before = write("before.json", &|_, i| 2.0 * (100.0 + i as f64));
        // Of the first every document gains; of the second as many gain as lose.
        let after = write("after.json", &|language, i| match language {
            "aaa_Latn" => 95.0 + i as f64,
            _ => 100.0 + i as f64 + if i % 2 == 0 { 5.0 } else { -5.0 },
        });
        let paired = Paired::of(&before, &after).unwrap();
        assert_eq!(
            (paired.better, paired.worse, paired.too_few),
            (1, 0, 1),
            "{}",
            paired.table()
        );
        assert!(Paired::of(&before, &folder.path().join("none.json")).is_err());
    }
}
