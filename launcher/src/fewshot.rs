//! Few-shot classification: tasks as files describe them, their items, the two published ways of scoring, and results.
//! Sources: Adelani et al. 2024, "SIB-200"; Ma et al. 2023, "Taxi1500"; the evaluations of MaLA-500 and EMMA-500.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail, ensure};
use serde::{Deserialize, Serialize};

use crate::families::family;
use crate::measurement::MadeBy;
use crate::statistics::{bootstrap, macro_f1, mean, wilson};
use crate::text;

/// A task: where its items are, and how they are put to a model. In YAML for tasks of one's own.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TaskFile {
    pub name: String,
    /// Where a language's items lie within the data's folder, in `{language}` and `{split}`: TSV with a header, or JSONL. The
    /// first pattern that fits any file holds for all.
    pub files: Vec<String>,
    /// What `{split}` is for items that are shown, and for items that are asked.
    #[serde(default = "train")]
    pub shots_from: String,
    #[serde(default = "test")]
    pub items_from: String,
    /// Columns (or JSON fields) by the names that the template uses: the first that is there counts.
    pub fields: BTreeMap<String, Vec<String>>,
    /// Text of one item, ending in `{label}`.
    pub template: String,
    /// As the data names them; shown so in the template unless another word is given.
    pub labels: Vec<Label>,
    /// Between shots, and between the last and the item.
    #[serde(default = "newline")]
    pub joined_by: String,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Label {
    Plain(String),
    Shown { name: String, shown: String },
}

impl Label {
    pub fn name(&self) -> &str {
        match self {
            Label::Plain(name) | Label::Shown { name, .. } => name,
        }
    }

    pub fn shown(&self) -> &str {
        match self {
            Label::Plain(shown) | Label::Shown { shown, .. } => shown,
        }
    }
}

fn train() -> String {
    "train".to_owned()
}

fn test() -> String {
    "test".to_owned()
}

fn newline() -> String {
    "\n".to_owned()
}

/// How labels are scored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Protocol {
    /// MaLA-500's: the whole label's log-likelihood behind the prompt, shots by seed 1234.
    Mala,
    /// EMMA-500's: the last sub-token of the label, written after a newline, as the prompt's next token; shots by seed 42.
    Emma,
}

impl Protocol {
    pub fn seed(self) -> u64 {
        match self {
            Protocol::Mala => 1234,
            Protocol::Emma => 42,
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            Protocol::Mala => "mala",
            Protocol::Emma => "emma",
        }
    }
}

/// What is asked of a worker.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct FewShot {
    pub task: TaskFile,
    pub data: PathBuf,
    /// Empty: all that the data has.
    pub languages: Vec<String>,
    pub protocol: Protocol,
    pub shots: usize,
    pub seed: u64,
    /// Of a language; `None`: all.
    pub most_items: Option<usize>,
    /// Tokens of a prompt with its label; longer ones lose their beginning.
    pub context: usize,
    /// New tokens in one forward pass.
    pub tokens_per_batch: usize,
    /// Whether every label's score is written too, beside the result.
    pub scores: bool,
}

impl FewShot {
    /// What changes results, for the protocol's line.
    pub fn protocol_line(&self) -> String {
        let template = &self.task.template;
        format!(
            "{}, {} shots by Python's random.Random({}).sample, context {}, template {template:?}, joined by {:?}, labels {:?}{}",
            match self.protocol {
                Protocol::Mala => "whole-label log-likelihood",
                Protocol::Emma => "last sub-token of the label after a newline",
            },
            self.shots,
            self.seed,
            self.context,
            self.task.joined_by,
            self.task.labels.iter().map(Label::shown).collect::<Vec<_>>(),
            self.most_items
                .map_or(String::new(), |most| format!(", the first {most} items")),
        )
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Item {
    fields: BTreeMap<String, String>,
    /// Index in the task's labels.
    pub label: usize,
}

/// One language's items.
#[derive(Debug)]
pub struct Items {
    pub shown: Vec<Item>,
    pub asked: Vec<Item>,
    /// BLAKE3 over both files.
    pub digest: String,
}

/// Names of the tasks that need no file of their own.
pub const KNOWN: [&str; 2] = ["sib200", "taxi1500"];

impl TaskFile {
    /// SIB-200's and Taxi1500's own forms by name, else a YAML file.
    pub fn open(name: &str) -> anyhow::Result<TaskFile> {
        let task = match name {
            "sib200" => sib200(),
            "taxi1500" => taxi1500(),
            file => {
                let text = fs::read_to_string(file).with_context(|| {
                    format!(
                        "{file} is neither a known task ({}) nor a readable YAML file",
                        KNOWN.join(", ")
                    )
                })?;
                serde_saphyr::from_str(&text).with_context(|| format!("{file} does not describe a task"))?
            }
        };
        task.check().with_context(|| format!("task {}", task.name))?;
        Ok(task)
    }

    fn check(&self) -> anyhow::Result<()> {
        ensure!(
            self.labels.len() >= 2,
            "labels = {:?}: a choice needs two at least; add the others",
            self.labels.iter().map(Label::name).collect::<Vec<_>>()
        );
        ensure!(
            self.template.ends_with("{label}"),
            "template = {:?} does not end in {{label}}: what follows a label would be scored with it; end it there",
            self.template
        );
        for pattern in &self.files {
            ensure!(
                pattern
                    .split('/')
                    .next()
                    .is_some_and(|first| first.matches("{language}").count() == 1),
                "files: {pattern:?} does not name {{language}} once in its first part, so languages cannot be found by it; \
                 write {{language}}/{{split}}.tsv or {{language}}_{{split}}.tsv"
            );
        }
        ensure!(
            !self.files.is_empty(),
            "files is empty; write {{language}}/{{split}}.tsv or another pattern"
        );
        for placeholder in placeholders(&self.template) {
            ensure!(
                self.fields.contains_key(placeholder),
                "the template uses {{{placeholder}}}, which `fields` does not explain; add its column's name there"
            );
        }
        ensure!(
            self.fields.contains_key("label"),
            "`fields` does not say which column holds the label; add label: [COLUMN]"
        );
        Ok(())
    }

    /// The text before the label: without the spaces that part them, and those spaces.
    pub fn prompt(&self, item: &Item) -> (String, &str) {
        let before = self.template.strip_suffix("{label}").unwrap_or(&self.template);
        let trimmed = before.trim_end_matches(' ');
        (self.filled(trimmed, item), &before[trimmed.len()..])
    }

    /// The whole of an item as it is shown.
    pub fn shot(&self, item: &Item) -> String {
        let (prompt, space) = self.prompt(item);
        format!("{prompt}{space}{}", self.labels[item.label].shown())
    }

    /// Every placeholder by its field, in one walk: braces in a text stay what they are.
    fn filled(&self, template: &str, item: &Item) -> String {
        let mut out = String::new();
        let mut rest = template;
        while let Some((before, after)) = rest.split_once('{') {
            out.push_str(before);
            let value = after
                .split_once('}')
                .and_then(|(name, after)| Some((item.fields.get(name)?, after)));
            match value {
                Some((value, after)) => {
                    out.push_str(value);
                    rest = after;
                }
                None => {
                    out.push('{');
                    rest = after;
                }
            }
        }
        out + rest
    }

    /// Languages that have items, and their files of both splits.
    ///
    /// # Errors
    /// When no file fits any pattern, or a named language has none.
    pub fn languages(&self, data: &Path, wanted: &[String]) -> anyhow::Result<Vec<(String, [PathBuf; 2])>> {
        let entries = fs::read_dir(data).with_context(|| format!("cannot read {}", data.display()))?;
        let mut names: Vec<String> = entries
            .filter_map(|entry| Some(entry.ok()?.file_name().to_string_lossy().into_owned()))
            .collect();
        names.sort();
        for pattern in &self.files {
            let first = pattern
                .split('/')
                .next()
                .unwrap_or(pattern)
                .replace("{split}", &self.items_from);
            let Some((before, after)) = first.split_once("{language}") else {
                continue;
            };
            let file = |language: &str, split: &str| {
                data.join(pattern.replace("{language}", language).replace("{split}", split))
            };
            let language = |name: &String| {
                let language = name.strip_prefix(before)?.strip_suffix(after)?;
                let files = [file(language, &self.shots_from), file(language, &self.items_from)];
                let there = !language.is_empty() && files.iter().all(|file| file.is_file());
                there.then(|| (language.to_owned(), files))
            };
            let found: Vec<_> = names.iter().filter_map(language).collect();
            if found.is_empty() {
                continue;
            }
            for wanted in wanted {
                ensure!(
                    found.iter().any(|(language, _)| language == wanted),
                    "{} has no {} and {} of language {wanted}; it has {}",
                    data.display(),
                    self.shots_from,
                    self.items_from,
                    text::shortened(
                        &found.iter().map(|(l, _)| l.as_str()).collect::<Vec<_>>().join(", "),
                        200
                    )
                );
            }
            let is_wanted = |language: &String| wanted.is_empty() || wanted.contains(language);
            return Ok(found.into_iter().filter(|(language, _)| is_wanted(language)).collect());
        }
        bail!(
            "no language of {} has both {} and {} under {} ({}); name the folder that holds the languages",
            self.name,
            self.shots_from,
            self.items_from,
            data.display(),
            self.files.join(", ")
        )
    }

    pub fn items(&self, [shown, asked]: &[PathBuf; 2]) -> anyhow::Result<Items> {
        let mut hasher = blake3::Hasher::new();
        let mut read = |path: &Path| -> anyhow::Result<Vec<Item>> {
            let bytes = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
            hasher.update(&bytes);
            let text = String::from_utf8(bytes).with_context(|| format!("{} is not UTF-8", path.display()))?;
            let jsonl = path.extension().is_some_and(|extension| extension == "jsonl");
            let records = if jsonl {
                json_records(&text)
            } else {
                table_records(&text)
            };
            let records = records.with_context(|| path.display().to_string())?;
            let items = records.iter().map(|(line, record)| {
                self.item(record)
                    .with_context(|| format!("{}, line {line}", path.display()))
            });
            items.collect()
        };
        Ok(Items {
            shown: read(shown)?,
            asked: read(asked)?,
            digest: hasher.finalize().to_hex().to_string(),
        })
    }

    fn item(&self, record: &BTreeMap<String, String>) -> anyhow::Result<Item> {
        let mut fields = BTreeMap::new();
        for (name, columns) in &self.fields {
            let value = columns.iter().find_map(|column| record.get(column)).with_context(|| {
                format!(
                    "no column {} for {{{name}}}; there are {}",
                    columns.join(" or "),
                    record.keys().cloned().collect::<Vec<_>>().join(", ")
                )
            })?;
            fields.insert(name.clone(), value.trim().to_owned());
        }
        let label = &fields["label"];
        let label = self
            .labels
            .iter()
            .position(|known| known.name() == label)
            .with_context(|| {
                format!(
                    "label {label:?} is none of the task's: {}",
                    self.labels.iter().map(Label::name).collect::<Vec<_>>().join(", ")
                )
            })?;
        Ok(Item { fields, label })
    }
}

/// Names in braces, but for the label's.
fn placeholders(template: &str) -> impl Iterator<Item = &str> {
    template
        .split('{')
        .skip(1)
        .filter_map(|part| part.split_once('}').map(|(name, _)| name))
        .filter(|name| *name != "label")
}

type Records = Vec<(usize, BTreeMap<String, String>)>;

fn json_records(text: &str) -> anyhow::Result<Records> {
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    let record = |(number, line): (usize, &str)| {
        let object: serde_json::Map<String, serde_json::Value> =
            serde_json::from_str(line).with_context(|| format!("line {} is not a JSON object", number + 1))?;
        let plain = object.into_iter().map(|(key, value)| match value {
            serde_json::Value::String(text) => (key, text),
            other => (key, other.to_string()),
        });
        Ok((number + 1, plain.collect()))
    };
    lines.map(record).collect()
}

/// A header, then a record a line. A value in quotes is unquoted, as the programs that wrote these files put quotes around
/// what holds some.
fn table_records(text: &str) -> anyhow::Result<Records> {
    let unquoted = |value: &str| {
        let inner = value.strip_prefix('"').and_then(|value| value.strip_suffix('"'));
        inner.map_or_else(|| value.to_owned(), |inner| inner.replace("\"\"", "\""))
    };
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let mut lines = text.split('\n').map(|line| line.trim_end_matches('\r')).enumerate();
    let (_, header) = lines.next().context("there is no header")?;
    let header: Vec<String> = header.split('\t').map(unquoted).collect();
    let record = |(number, line): (usize, &str)| {
        let values: Vec<String> = line.split('\t').map(unquoted).collect();
        ensure!(
            values.len() == header.len(),
            "line {} has {} columns where the header has {}; tabs within a value are not understood",
            number + 1,
            values.len(),
            header.len()
        );
        Ok((number + 1, header.iter().cloned().zip(values).collect()))
    };
    lines.filter(|(_, line)| !line.is_empty()).map(record).collect()
}

fn sib200() -> TaskFile {
    let plain = |name: &str| Label::Plain(name.to_owned());
    TaskFile {
        name: "sib200".to_owned(),
        files: vec!["{language}/{split}.tsv".to_owned(), "{language}_{split}.tsv".to_owned()],
        shots_from: train(),
        items_from: test(),
        fields: fields(&[("sent", &["text", "sentence"]), ("label", &["category", "label"])]),
        template: "The topic of the news \"{sent}\" is {label}".to_owned(),
        labels: [
            "science/technology",
            "travel",
            "politics",
            "sports",
            "health",
            "entertainment",
            "geography",
        ]
        .map(plain)
        .into(),
        joined_by: newline(),
    }
}

fn taxi1500() -> TaskFile {
    let plain = |name: &str| Label::Plain(name.to_owned());
    TaskFile {
        name: "taxi1500".to_owned(),
        files: [
            "{language}/{language}_{split}.tsv",
            "{language}/{split}.tsv",
            "{language}_{split}.tsv",
        ]
        .map(str::to_owned)
        .into(),
        shots_from: train(),
        items_from: test(),
        fields: fields(&[
            ("verse", &["verse", "text"]),
            ("label", &["classification", "category", "label"]),
        ]),
        template: "The topic of the verse \"{verse}\" is {label}".to_owned(),
        labels: ["Recommendation", "Faith", "Description", "Sin", "Grace", "Violence"]
            .map(plain)
            .into(),
        joined_by: newline(),
    }
}

fn fields(of: &[(&str, &[&str])]) -> BTreeMap<String, Vec<String>> {
    let named = of.iter().map(|(name, columns)| {
        let columns = columns.iter().map(|column| (*column).to_owned());
        ((*name).to_owned(), columns.collect())
    });
    named.collect()
}

/// One label's score for one item.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LabelScore {
    /// Summed −ln p of what is scored.
    pub nats: f64,
    /// Tokens that are scored, and the label's bytes: what lengths are divided by.
    pub tokens: usize,
    pub bytes: usize,
}

/// One item: what is true and how every label scored, in the labels' order.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ItemScores {
    pub item: usize,
    pub truth: usize,
    pub labels: Vec<LabelScore>,
}

/// By what a label is chosen.
#[derive(Clone, Copy)]
enum By {
    Nats,
    PerToken,
    PerByte,
}

impl ItemScores {
    /// The first of the best.
    fn predicted(&self, by: By) -> usize {
        let score = |label: &LabelScore| match by {
            By::Nats => label.nats,
            By::PerToken => label.nats / label.tokens.max(1) as f64,
            By::PerByte => label.nats / label.bytes.max(1) as f64,
        };
        let scores = self.labels.iter().map(score).enumerate();
        scores.min_by(|a, b| a.1.total_cmp(&b.1)).map_or(0, |(label, _)| label)
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LanguageScore {
    pub language: String,
    pub items: usize,
    pub accuracy: f64,
    /// 95 %, Wilson's.
    pub accuracy_interval: [f64; 2],
    /// By log-likelihood a token, and a byte, of the label.
    pub accuracy_per_token: f64,
    pub accuracy_per_byte: f64,
    pub macro_f1: f64,
    /// Rows are the truth, columns what was said, in the labels' order.
    pub confusion: Vec<Vec<u64>>,
    /// Rows of the file that were shown, from 0, in their order.
    pub shots: Vec<usize>,
    /// Items whose prompt lost its beginning.
    pub cut: usize,
    pub data_digest: String,
}

impl LanguageScore {
    pub fn of(
        language: &str,
        n_labels: usize,
        items: &[ItemScores],
        shots: Vec<usize>,
        cut: usize,
        data_digest: String,
    ) -> Self {
        let share = |by: By| {
            let right = items.iter().filter(|item| item.predicted(by) == item.truth).count();
            right as f64 / items.len().max(1) as f64
        };
        let mut confusion = vec![vec![0; n_labels]; n_labels];
        for item in items {
            confusion[item.truth][item.predicted(By::Nats)] += 1;
        }
        let accuracy = share(By::Nats);
        LanguageScore {
            language: language.to_owned(),
            items: items.len(),
            accuracy,
            accuracy_interval: wilson(accuracy, items.len()),
            accuracy_per_token: share(By::PerToken),
            accuracy_per_byte: share(By::PerByte),
            macro_f1: macro_f1(&confusion),
            confusion,
            shots,
            cut,
            data_digest,
        }
    }
}

/// Means over languages, each counting once.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Means {
    pub languages: usize,
    pub accuracy: f64,
    /// 95 %, languages drawn again; none of fewer than five.
    pub accuracy_interval: Option<[f64; 2]>,
    pub accuracy_per_token: f64,
    pub accuracy_per_byte: f64,
    pub macro_f1: f64,
}

impl Means {
    fn of(scores: &[&LanguageScore]) -> Means {
        let over = |of: fn(&LanguageScore) -> f64| mean(scores.iter().map(|score| of(score)));
        Means {
            languages: scores.len(),
            accuracy: over(|score| score.accuracy),
            accuracy_interval: bootstrap(scores.len(), |sample| mean(sample.iter().map(|i| scores[*i].accuracy))),
            accuracy_per_token: over(|score| score.accuracy_per_token),
            accuracy_per_byte: over(|score| score.accuracy_per_byte),
            macro_f1: over(|score| score.macro_f1),
        }
    }
}

/// The result, as it is written.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct FewShotResult {
    pub made_by: MadeBy,
    pub task: String,
    pub protocol: Protocol,
    pub shots: usize,
    pub seed: u64,
    /// As shown to the model, in the order of `confusion`.
    pub labels: Vec<String>,
    /// Over all languages.
    pub all: Means,
    pub by_script: BTreeMap<String, Means>,
    pub by_family: BTreeMap<String, Means>,
    pub languages: Vec<LanguageScore>,
    pub items: usize,
    pub seconds: f64,
}

impl FewShotResult {
    pub fn of(order: &FewShot, made_by: MadeBy, languages: Vec<LanguageScore>, seconds: f64) -> FewShotResult {
        let by = |key: &dyn Fn(&str) -> String| {
            let mut groups: BTreeMap<String, Vec<&LanguageScore>> = BTreeMap::new();
            for score in &languages {
                groups.entry(key(&score.language)).or_default().push(score);
            }
            groups
                .into_iter()
                .map(|(name, scores)| (name, Means::of(&scores)))
                .collect()
        };
        FewShotResult {
            task: order.task.name.clone(),
            protocol: order.protocol,
            shots: order.shots,
            seed: order.seed,
            labels: order.task.labels.iter().map(|label| label.shown().to_owned()).collect(),
            all: Means::of(&languages.iter().collect::<Vec<_>>()),
            by_script: by(&|language| language.get(4..8).unwrap_or("unknown").to_owned()),
            by_family: by(&|language| family(language.get(..3).unwrap_or_default()).to_owned()),
            items: languages.iter().map(|score| score.items).sum(),
            seconds,
            made_by,
            languages,
        }
    }

    pub fn table(&self) -> String {
        let percent = |share: f64| format!("{:.1}", 100.0 * share);
        let mut languages: Vec<_> = self.languages.iter().collect();
        languages.sort_by(|a, b| b.accuracy.total_cmp(&a.accuracy));
        let row = |score: &LanguageScore| {
            let [low, high] = score.accuracy_interval;
            vec![
                score.language.clone(),
                text::count(score.items),
                percent(score.accuracy),
                format!("{} … {}", percent(low), percent(high)),
                percent(score.macro_f1),
            ]
        };
        let n = languages.len();
        let mut rows: Vec<_> = languages.iter().take(5).map(|score| row(score)).collect();
        rows.extend(
            languages
                .iter()
                .skip(5.max(n.saturating_sub(5)))
                .map(|score| row(score)),
        );
        let interval = |of: Option<[f64; 2]>| {
            of.map_or(String::new(), |[low, high]| {
                format!("{} … {}", percent(low), percent(high))
            })
        };
        rows.push(vec![
            format!("mean of {}", text::counted(n, "language")),
            text::count(self.items),
            percent(self.all.accuracy),
            interval(self.all.accuracy_interval),
            percent(self.all.macro_f1),
        ]);
        let header = ["", ">items", ">accuracy %", ">95 %", ">macro F1 %"];
        format!(
            "{}\n{}, {}-shot, {} protocol; by log-likelihood a token {} %, a byte {} %; chance {} %",
            text::table(&header, rows),
            self.task,
            self.shots,
            self.protocol.name(),
            percent(self.all.accuracy_per_token),
            percent(self.all.accuracy_per_byte),
            percent(1.0 / self.labels.len() as f64),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn published_forms_are_found_and_read() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| {
            let path = folder.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        let items = "index_id\tcategory\ttext\r\n1\tsports\t\"He said \"\"go\"\" {sent}\"\r\n2\ttravel\tBy train\r\n";
        write("eng_Latn/train.tsv", items);
        write("eng_Latn/test.tsv", items);
        write("yor_Latn/test.tsv", items);
        write("labels.txt", "no language");
        let task = TaskFile::open("sib200").unwrap();
        let found = task.languages(folder.path(), &[]).unwrap();
        assert_eq!(found.len(), 1, "a language needs both files: {found:?}");
        let items = task.items(&found[0].1).unwrap();
        assert_eq!(
            task.shot(&items.shown[0]),
            "The topic of the news \"He said \"go\" {sent}\" is sports"
        );
        assert_eq!(
            task.prompt(&items.asked[1]),
            ("The topic of the news \"By train\" is".to_owned(), " ")
        );
        let none = task
            .languages(folder.path(), &["xho_Latn".to_owned()])
            .unwrap_err()
            .to_string();
        assert!(none.contains("xho_Latn") && none.contains("it has eng_Latn"), "{none}");

        write("eng_Latn/test.tsv", "index_id\tcategory\ttext\n1\tcooking\tSoup\n");
        let wrong = format!("{:#}", task.items(&found[0].1).unwrap_err());
        assert!(wrong.contains("line 2") && wrong.contains("cooking"), "{wrong}");
    }

    #[test]
    fn wrong_tasks_are_refused_with_the_remedy() {
        let refused = |change: &dyn Fn(&mut TaskFile), sentence: &str| {
            let mut task = sib200();
            change(&mut task);
            let said = task.check().unwrap_err().to_string();
            assert!(said.contains(sentence), "{said}");
        };
        refused(&|task| task.template.push('.'), "end it there");
        refused(
            &|task| task.files = vec!["{split}.tsv".to_owned()],
            "languages cannot be found",
        );
        refused(&|task| drop(task.fields.remove("sent")), "add its column's name");
        refused(&|task| task.labels.truncate(1), "add the others");
    }

    #[test]
    fn labels_are_chosen_by_whole_and_by_length() {
        let label = |nats, tokens, bytes| LabelScore { nats, tokens, bytes };
        let item = ItemScores {
            item: 0,
            truth: 1,
            labels: vec![label(2.0, 1, 4), label(3.0, 2, 5)],
        };
        let score = LanguageScore::of("eng_Latn", 2, &[item], vec![0], 0, String::new());
        assert_eq!(
            (score.accuracy, score.accuracy_per_token, score.accuracy_per_byte),
            (0.0, 1.0, 0.0)
        );
        assert_eq!(score.confusion, [[0, 0], [1, 0]]);
    }
}
