//! Evaluation and generation against what people run today: a length-sorted, batched `transformers` loop, `lm-eval` and
//! `transformers.generate`. Both sides in one run, in turns, each in a process of its own; medians. SmolLM2-135M in f32, on text of the
//! Declaration. Both sides' own timing: loading a model counts for neither.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;

use anyhow::{Context, Result, ensure};
use bench::{Entry, Report, Results, median, number, run, script, text_of};
use clap::Parser;
use serde_json::{Value, json};

const LANGUAGES: usize = 60;
/// Of the few-shot task: of the languages, and of the articles that are asked for.
const TASK_LANGUAGES: usize = 3;
const LABELS: usize = 5;
/// Articles of a language, and characters of each half: about as long as a sentence of SIB-200.
const ARTICLES: usize = 12;
const CHARACTERS: usize = 150;
const NEW_TOKENS: usize = 128;

#[derive(Parser)]
#[command(about = "Measures evaluation and generation side by side with what people run today")]
struct Arguments {
    /// The Python that has `transformers`.
    #[arg(long, env = "PANGLOT_PYTHON", default_value = ".panglot/venv/bin/python")]
    python: PathBuf,
    /// Where `make setup-eval` has put lm-evaluation-harness.
    #[arg(long, default_value = ".panglot/lm-eval")]
    lm_eval: PathBuf,
    /// The demo's corpus and SmolLM2-135M, as `panglot prepare configs/demo.yaml` leaves them.
    #[arg(long, default_value = "runs/prepared/demo")]
    prepared: PathBuf,
    #[arg(long, default_value = "bench/results/eval.json")]
    out: PathBuf,
    /// Measures only the entries whose names begin so.
    #[arg(long, default_value = "")]
    only: String,
    #[arg(long, default_value_t = 3)]
    rounds: usize,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let folder = tempfile::tempdir()?;
    let bench = Bench {
        folder: folder.path().to_path_buf(),
        threads: thread::available_parallelism()?.get().to_string(),
        model: fs::canonicalize(arguments.prepared.join("base_model"))
            .context("run `panglot prepare configs/demo.yaml` first")?,
        corpus: fs::canonicalize(arguments.prepared.join("corpus"))?,
        arguments,
    };
    let mut results = Results::open(&bench.arguments.out)?;
    if bench.wanted("nll_tokens_per_s") {
        bench.nll(&mut results)?;
    }
    if bench.wanted("generate_tokens_per_s") {
        bench.generate(&mut results)?;
    }
    if bench.wanted("fewshot_items_per_s") {
        bench.few_shot(&mut results)?;
    }
    results.print();
    Ok(())
}

struct Bench {
    folder: PathBuf,
    threads: String,
    model: PathBuf,
    corpus: PathBuf,
    arguments: Arguments,
}

impl Bench {
    fn wanted(&self, name: &str) -> bool {
        name.starts_with(&self.arguments.only)
    }

    /// The first languages of the corpus, by name.
    fn languages(&self, most: usize) -> Result<Vec<String>> {
        let mut names: Vec<String> = fs::read_dir(self.corpus.join("udhr"))?
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .filter(|name| !name.starts_with('q'))
            .collect();
        names.sort();
        // Spread over the alphabet, so that scripts mix.
        let step = (names.len() / most).max(1);
        Ok(names.into_iter().step_by(step).take(most).collect())
    }

    fn documents(&self, language: &str, split: &str) -> Result<Vec<Value>> {
        let path = self.corpus.join("udhr").join(language).join(format!("{split}.jsonl"));
        let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        Ok(text.lines().map(serde_json::from_str).collect::<Result<_, _>>()?)
    }

    /// What it prints.
    fn panglot(&self, arguments: &[&str]) -> Result<Vec<u8>> {
        let mut command = Command::new(std::env::current_exe()?.with_file_name("panglot"));
        command
            .args(arguments)
            .args(["--threads", &self.threads, "--precision", "f32"]);
        let output = command.output()?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{command:?} failed: {said}");
        Ok(output.stdout)
    }

    fn peer(&self, arguments: &[&str], lm_eval: Option<&Path>) -> Result<Report> {
        let mut command = Command::new(&self.arguments.python);
        command.arg(script("evaluate_model.py")).args(arguments);
        if let Some(lm_eval) = lm_eval {
            command.env("PANGLOT_LM_EVAL", lm_eval);
        }
        run(&mut command)
    }

    fn nll(&self, results: &mut Results) -> Result<()> {
        let languages = self.languages(LANGUAGES)?;
        let mut lines = Vec::new();
        for language in &languages {
            let mut documents = self.documents(language, "held_out")?;
            // As `panglot eval nll --documents 1` takes them.
            documents.sort_by_key(|document| document["key"].as_str().map(str::to_owned));
            for document in documents.iter().take(1) {
                writeln!(lines, "{}", json!({ "text": document["text"] }))?;
            }
        }
        let texts = self.folder.join("texts.jsonl");
        fs::write(&texts, lines)?;
        let out = self.folder.join("nll.json");
        let (model, names) = (text_of(&self.model)?, languages.join(","));
        let (mut ours, mut peers) = (Vec::new(), Vec::new());
        for _ in 0..self.arguments.rounds {
            let own = [
                "eval",
                "nll",
                model,
                "--corpus",
                text_of(&self.corpus)?,
                "--out",
                text_of(&out)?,
                "--languages",
                &names,
            ];
            self.panglot(
                &[
                    &own[..],
                    &[
                        "--documents",
                        "1",
                        "--window",
                        "1024",
                        "--stride",
                        "512",
                        "--start",
                        "<|endoftext|>",
                    ],
                ]
                .concat(),
            )?;
            ours.push(result(&out)?);
            peers.push(self.peer(&["nll", model, text_of(&texts)?, &self.threads], None)?);
        }
        let nats: f64 = ours[0].more["languages"]
            .as_array()
            .context("languages")?
            .iter()
            .filter_map(|l| l["nats"].as_f64())
            .sum();
        let speed = |side: &[Report]| median(side, |report| number(report, "tokens") / report.seconds);
        let entry = Entry::of("nll_tokens_per_s", speed(&ours), speed(&peers), "tokens/s")
            .peer_is("transformers, SDPA, length-sorted batches of 4096 tokens, cross-entropy of whole logits; documents cut at 1024 tokens")
            .note(format!(
                "one held-out document in each of {} languages, {} tokens, ours to their ends; nats {nats:.2} and {:.2}",
                languages.len(),
                number(&ours[0], "tokens"),
                number(&peers[0], "nats")
            ));
        results.put(entry)
    }

    fn generate(&self, results: &mut Results) -> Result<()> {
        let prompts = [
            "The capital of France is",
            "Once upon a time there was a small village by the sea, where",
            "def fibonacci(n):",
            "Alle Menschen sind frei und",
            "Water boils at",
            "The three primary colours are red,",
            "In 1969, the first",
            "My favourite book is",
        ];
        let mut lines = Vec::new();
        for prompt in prompts {
            writeln!(lines, "{}", json!({ "prompt": prompt }))?;
        }
        let input = self.folder.join("prompts.jsonl");
        fs::write(&input, lines)?;
        let (model, new) = (text_of(&self.model)?, NEW_TOKENS.to_string());
        let batch = prompts.len().to_string();
        let (mut ours, mut peers) = (Vec::new(), Vec::new());
        for _ in 0..self.arguments.rounds {
            let own = ["generate", model, "--input", text_of(&input)?, "--max-new-tokens", &new];
            let said = self.panglot(&[&own[..], &["--ignore-end", "--batch", &batch, "--json"]].concat())?;
            // Its seconds are without loading, as the peer's are.
            ours.push(serde_json::from_slice(&said)?);
            peers.push(self.peer(&["generate", model, text_of(&input)?, &self.threads, &new], None)?);
        }
        let speed = |side: &[Report], key: &str| median(side, |report| number(report, key) / report.seconds);
        let entry = Entry::of(
            "generate_tokens_per_s",
            speed(&ours, "new_tokens"),
            speed(&peers, "tokens"),
            "tokens/s",
        )
        .peer_is("transformers.generate, greedy, batch 8, its own cache")
        .note(format!(
            "8 prompts of unequal length, {NEW_TOKENS} new tokens each, f32"
        ));
        results.put(entry)
    }

    /// Which article is this? Halves of articles are shown and asked for.
    fn few_shot(&self, results: &mut Results) -> Result<()> {
        let lm_eval = fs::canonicalize(&self.arguments.lm_eval).context("run `make setup-eval` first")?;
        let data = self.folder.join("articles");
        let tasks = self.folder.join("tasks");
        fs::create_dir_all(&tasks)?;
        let labels: Vec<String> = (0..LABELS).map(|label| format!("part {}", label + 1)).collect();
        let languages = self.languages(TASK_LANGUAGES)?;
        for language in &languages {
            let mut articles = Vec::new();
            for split in ["train", "held_out"] {
                for document in self.documents(language, split)? {
                    let number = document["key"]
                        .as_str()
                        .and_then(|key| key.strip_prefix("article-")?.parse::<usize>().ok());
                    let text = document["text"]
                        .as_str()
                        .map(|text| text.replace(['\t', '\n', '"'], " "));
                    articles.extend(number.zip(text));
                }
            }
            articles.sort();
            articles.truncate(ARTICLES);
            fs::create_dir_all(data.join(language))?;
            for (split, second) in [("train", false), ("test", true)] {
                let mut tsv = "index_id\tcategory\ttext\n".to_owned();
                let mut jsonl = String::new();
                for (number, text) in &articles {
                    let middle = text
                        .char_indices()
                        .nth(text.chars().count() / 2)
                        .map_or(0, |(at, _)| at);
                    let half = if second { &text[middle..] } else { &text[..middle] };
                    let half: String = half.trim().chars().take(CHARACTERS).collect();
                    let label = number % LABELS;
                    tsv += &format!("{number}\t{}\t{half}\n", labels[label]);
                    jsonl += &(json!({ "text": half, "label": label }).to_string() + "\n");
                }
                fs::write(data.join(language).join(format!("{split}.tsv")), tsv)?;
                fs::write(data.join(language).join(format!("{split}.jsonl")), jsonl)?;
            }
            let of = |split: &str| data.join(language).join(format!("{split}.jsonl"));
            let yaml = json!({
                "task": format!("articles_{language}"), "dataset_path": "json",
                "dataset_kwargs": { "data_files": { "train": of("train"), "test": of("test") } },
                "output_type": "multiple_choice", "training_split": "train", "fewshot_split": "train", "test_split": "test",
                "doc_to_text": "The text \"{{text}}\" is of", "doc_to_target": "label", "doc_to_choice": labels,
                "target_delimiter": " ", "fewshot_delimiter": "\n", "num_fewshot": 3,
                "fewshot_config": { "sampler": "first_n" },
                "metric_list": [{ "metric": "acc", "aggregation": "mean", "higher_is_better": true }],
            });
            fs::write(
                tasks.join(format!("articles_{language}.yaml")),
                serde_json::to_vec(&yaml)?,
            )?;
        }
        let task = self.folder.join("task.yaml");
        let fields = json!({ "text": ["text"], "label": ["category"] });
        fs::write(
            &task,
            serde_json::to_vec(
                &json!({ "name": "articles", "files": ["{language}/{split}.tsv"], "fields": fields,
            "template": "The text \"{text}\" is of {label}", "labels": labels }),
            )?,
        )?;
        let (model, out) = (text_of(&self.model)?, self.folder.join("fewshot.json"));
        let (mut ours, mut peers) = (Vec::new(), Vec::new());
        for _ in 0..self.arguments.rounds.min(2) {
            self.panglot(&[
                "eval",
                "fewshot",
                model,
                "--task",
                text_of(&task)?,
                "--data",
                text_of(&data)?,
                "--out",
                text_of(&out)?,
            ])?;
            ours.push(result(&out)?);
            peers.push(self.peer(&["fewshot", model, text_of(&tasks)?, &self.threads], Some(&lm_eval))?);
        }
        let items = |side: &[Report]| median(side, |report| number(report, "items") / report.seconds);
        ensure!(
            number(&ours[0], "items") == number(&peers[0], "items"),
            "both sides have the same items"
        );
        let accuracy = ours[0].more["all"]["accuracy"].as_f64().unwrap_or(f64::NAN);
        let entry = Entry::of("fewshot_items_per_s", items(&ours), items(&peers), "items/s")
            .peer_is("lm-eval, its HFLM on the CPU, batches of 16, a local multiple-choice task of the same items")
            .note(format!(
                "{} items in {} languages, {LABELS} labels, 3 shots; accuracy {accuracy:.3} and {:.3} (other shots)",
                number(&ours[0], "items"),
                languages.len(),
                number(&peers[0], "accuracy"),
            ));
        results.put(entry)
    }
}

/// Our results have `seconds` too.
fn result(file: &Path) -> Result<Report> {
    let text = fs::read(file).with_context(|| file.display().to_string())?;
    fs::remove_file(file)?;
    Ok(serde_json::from_slice(&text)?)
}
