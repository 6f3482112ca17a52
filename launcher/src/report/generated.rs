//! A run in hundreds of languages that nobody trained: its corpus and tokens are made by `panglot prepare` from generated text,
//! its steps and measurements are written here. For the page's tests and the measurement of its size.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use configs::Plan;
use serde_json::{Value, json};

use crate::evaluation::{DocumentResult, Evaluation, LanguageResult};
use crate::events::{HeldOut, StepMetrics};
use crate::families::FAMILIES;
use crate::files;
use crate::history::{Environment, Happening, What};

/// What a language's name is in the corpus; the first is as hostile as a name can be.
pub const HOSTILE: &str = "</script><img src=x onerror=\"document.title='hit'\"> & \u{202e}«name»";

const STEPS: u64 = 300;
const ROWS: u64 = 24;
/// Older codes, and codes of groups, that the families know and an import refuses.
const NOT_IN_ISO_639_3: [&str; 9] = ["ajp", "alb", "ber", "cqu", "hnm", "kar", "mao", "nah", "sit"];
const SCRIPTS: [&str; 8] = ["Latn", "Cyrl", "Arab", "Deva", "Latn", "Ethi", "Thai", "Latn"];

/// Makes the run in `folder`; gives the run's own folder. `panglot` is the program.
pub fn generate(panglot: &Path, folder: &Path, languages: usize) -> Result<PathBuf> {
    let codes = FAMILIES.iter().flat_map(|(_, codes)| codes.split_whitespace());
    let names: Vec<String> = codes
        .filter(|code| !NOT_IN_ISO_639_3.contains(code))
        .zip(SCRIPTS.iter().cycle())
        .map(|(code, script)| format!("{code}_{script}"))
        .take(languages)
        .collect();
    ensure!(
        names.len() == languages,
        "there are no {languages} codes to choose from"
    );
    let text = folder.join("text");
    fs::create_dir_all(&text)?;
    for (at, name) in names.iter().enumerate() {
        // Some languages have ten times as much as others.
        let lines: String = (0..4 + 40 / (1 + at % 13))
            .map(|line| format!("{name} line {line} of text number {at}\n"))
            .collect();
        fs::write(text.join(format!("{name}.txt")), lines)?;
    }
    let config = folder.join("generated.yaml");
    fs::write(&config, CONFIG.replace("FOLDER", &folder.display().to_string()))?;
    let status = Command::new(panglot)
        .arg("prepare")
        .arg(&config)
        .output()
        .context("panglot prepare")?;
    ensure!(status.status.success(), "{}", String::from_utf8_lossy(&status.stderr));
    let plan = configs::load(&config, &[])?;
    give_places(&plan)?;
    let run = plan.folders.run.clone();
    files::write_json(&run.join("plan.json"), &plan)?;
    write_steps(&run, &plan)?;
    for (name, gain) in [("before", 0.0), ("after", 0.3)] {
        let evaluation = evaluation(&names, gain, &plan)?;
        files::write_json(&run.join(format!("evaluations/{name}.json")), &evaluation)?;
    }
    Ok(run)
}

/// Text has no coordinates: they are put into the corpus's manifest, all over the world.
fn give_places(plan: &Plan) -> Result<()> {
    let file = plan.folders.corpus.join("corpus.json");
    let mut corpus: Value = files::read_json(&file)?;
    let languages = corpus["languages"].as_array_mut().context("a corpus has languages")?;
    for (at, language) in languages.iter_mut().enumerate() {
        language["latitude"] = json!(-50.0 + (at * 37 % 120) as f64);
        language["longitude"] = json!(-175.0 + (at * 53 % 350) as f64);
        language["name"] = json!(if at == 0 {
            HOSTILE.to_owned()
        } else {
            format!("Language number {at}")
        });
    }
    files::write_json(&file, &corpus)
}

/// Two attempts; in each a checkpoint every fifty steps; one step skipped, one slow.
fn write_steps(run: &Path, plan: &Plan) -> Result<()> {
    let stream = crate::sampling::stream(plan)?;
    let (mut lines, mut history) = (String::new(), Vec::new());
    let environment = || Environment {
        panglot: env!("CARGO_PKG_VERSION").to_owned(),
        host: "nid000123".to_owned(),
        ranks: 8,
        ..Environment::default()
    };
    let mut time = 1.79e9;
    let mut happened = |unix_time: f64, what: What| history.push(Happening { unix_time, what });
    for step in 0..STEPS {
        if step == 0 || step == 150 {
            time += 600.0;
            happened(
                time,
                What::Began {
                    step,
                    environment: environment(),
                },
            );
        }
        let mut languages = std::collections::BTreeMap::new();
        for row in step * ROWS..(step + 1) * ROWS {
            *languages
                .entry(stream.parts()[stream.part(row)].language.to_string())
                .or_insert(0) += 1;
        }
        let wave = (step as f64 * 12.9898).sin();
        let seconds = if step == 77 { 30.0 } else { 2.0 + 0.1 * wave };
        let measured = (step % 50 == 49).then_some(HeldOut {
            macro_bits_per_byte: 2.0 + 1.5 * (-(step as f64) / 90.0).exp(),
            languages: 534,
            tokens: 100_000,
            seconds: 4.0,
        });
        time += seconds + measured.map_or(0.0, |held_out| held_out.seconds);
        let metrics = StepMetrics {
            step,
            steps: STEPS,
            loss: if step == 40 {
                f64::NAN
            } else {
                2.0 + 3.0 * (-(step as f64) / 60.0).exp() + 0.1 * wave
            },
            grad_norm: 1.0 + 0.3 * wave,
            skipped: step == 40,
            skip_reason: None,
            held_out: measured,
            lr: [(configs::Group::Lora, 1e-3), (configs::Group::Embeddings, 5e-4)].into(),
            targets: 24 * 63,
            targets_so_far: (step + 1) * 24 * 63,
            seconds,
            tokens_per_second: 24.0 * 64.0 / seconds,
            resident_bytes: 3 << 29,
            bytes_sent: 30 << 20,
            bytes_least: 29 << 20,
            rows_digest: String::new(),
            languages,
            parts: Default::default(),
            unix_time: time,
        };
        lines += &serde_json::to_string(&metrics)?;
        lines.push('\n');
        if step % 50 == 49 {
            let saved = What::Saved {
                step: step + 1,
                bytes: 120 << 20,
                files: 8,
                seconds: 3.0,
                stall: 0.25,
            };
            happened(time + 3.0, saved);
        }
    }
    happened(time + 1.0, What::Ended { step: STEPS });
    history.sort_by(|a, b| a.unix_time.total_cmp(&b.unix_time));
    let history: Result<Vec<String>, _> = history.iter().map(serde_json::to_string).collect();
    fs::write(run.join("metrics.jsonl"), lines)?;
    fs::write(run.join("history.jsonl"), history?.join("\n") + "\n")?;
    Ok(())
}

/// Languages after the 500th do not get better.
fn evaluation(names: &[String], gain: f64, plan: &Plan) -> Result<Evaluation> {
    let corpus = corpus::Corpus::open(&plan.folders.corpus)?;
    let of = |(at, name): (usize, &String)| {
        let bits = 1.5 + (at * 29 % 300) as f64 / 100.0;
        let bits = bits * (1.0 - gain * (1.0 - at as f64 / 500.0));
        let document = |number: u64| DocumentResult {
            language: name.clone(),
            key: format!("document-{number}"),
            text_bytes: 1000,
            bytes: 1000,
            characters: 800,
            tokens: (300.0 + 40.0 * (at % 9) as f64 - 100.0 * gain) as u64,
            nats: bits * 1000.0 * std::f64::consts::LN_2 * (0.9 + 0.05 * number as f64),
        };
        LanguageResult::of(name, &(0..5).map(document).collect::<Vec<_>>())
    };
    let results = names.iter().enumerate().map(of).collect();
    Ok(Evaluation::of(
        "generated".to_owned(),
        "f32".to_owned(),
        results,
        Some(&corpus),
    ))
}

const CONFIG: &str = "\
name: generated
seed: 1
folders: { prepared: FOLDER/prepared, run: FOLDER/run }
corpus:
  sources: [{ name: text, kind: folders, path: FOLDER/text }]
  held_out: 0.1
model:
  kind: scratch
  shape:
    hidden_size: 16
    intermediate_size: 32
    num_hidden_layers: 1
    num_attention_heads: 2
    num_key_value_heads: 2
    max_position_embeddings: 64
    rms_norm_eps: 1.0e-5
    rope_theta: 10000
    tie_word_embeddings: false
  init_std: 0.02
  tokenizer: { kind: train, algorithm: bpe, pieces: 400, alpha: 0.3 }
sampling: { alpha: 0.3 }
train:
  steps: 300
  sequence_length: 64
  rows_per_step: 24
  micro_rows: 3
  precision: f32
  recompute: none
  zero: 1
  lora: { rank: 2, alpha: 4, dropout: 0, targets: [q_proj] }
  full: [embed_tokens, lm_head]
optimizer:
  lr_lora: 1.0e-3
  lr_embeddings: 5.0e-4
  beta1: 0.9
  beta2: 0.99
  epsilon: 1.0e-8
  weight_decay: 0.0
  max_grad_norm: 1.0
  warmup_steps: 2
  schedule: cosine
  final_lr_share: 0.1
checkpoint: { every_steps: 50, keep: 2 }
evaluation: { documents_per_language: 1, window: 64, stride: 32, tokens_per_batch: 4096 }
launch: { ranks: 8 }
";
