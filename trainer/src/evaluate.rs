//! Negative log-likelihood of held-out text, language by language, for any Hugging Face folder with its own tokenizer.
//!
//! A document is scored as a whole: its start token, if the plan names one, is context only, and every token after it is a
//! target. Bits per byte divide by the bytes of the text, so that models with different tokenizers compare: also the base
//! and the extended model that no step has trained yet.

use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use configs::{NewRows, Plan, Precision};
use corpus::{Corpus, Document, Language, Tokenizer, Vocabulary};
use launcher::evaluation::{DayZero, Evaluation, LanguageResult};
use launcher::events::Event;
use sharding::Comm;
use tch::{Device, Kind, Tensor};

use crate::hf::{ModelConfig, Weights};
use crate::model::{IGNORE, Model, Trains};

/// A stretch of one document that fits the model; the first `context` positions were scored in the window before.
struct Window {
    language: usize,
    ids: Vec<i64>,
    context: usize,
}

/// What is scored: weights, the tokenizer that its text is cut by, and how the first grows to fit the second.
struct Subject<'a> {
    name: String,
    model: &'a Path,
    tokenizer: &'a Path,
    grows: Trains,
}

/// Scores the held-out documents with the model in `folder`. Every rank returns the same report.
pub fn evaluate(plan: &Plan, folder: &Path, comm: &dyn Comm, device: Device) -> Result<Evaluation> {
    let documents = held_out(plan, comm)?;
    let subject = Subject {
        name: folder.display().to_string(),
        model: folder,
        tokenizer: folder,
        grows: Trains::default(),
    };
    score(plan, &documents, &subject, comm, device)
}

/// The base with its own tokenizer, and the extended model before any step, once for each of these starts of its new rows.
/// All score the same text: the first `most_bytes` bytes of one document a language, drawn by the plan's seed from those
/// that the plan evaluates on.
pub fn day_zero(
    plan: &Plan,
    starts: &[NewRows],
    most_bytes: usize,
    comm: &dyn Comm,
    device: Device,
) -> Result<DayZero> {
    let mut documents = held_out(plan, comm)?;
    for (_, documents) in &mut documents {
        // By the key: of parallel text all languages give the same passage.
        documents.sort_by_key(|document| draw(plan.seed, &document.key));
        documents.truncate(1);
        for document in documents {
            let text = &mut document.text;
            let whole = (0..=most_bytes.min(text.len()))
                .rev()
                .find(|at| text.is_char_boundary(*at));
            text.truncate(whole.unwrap_or(0));
        }
    }
    let folders = &plan.folders;
    let subject = |name: &str, tokenizer, vocabulary| Subject {
        name: name.to_owned(),
        model: &folders.base_model,
        tokenizer,
        grows: Trains {
            vocabulary,
            seed: plan.seed,
            ..Trains::default()
        },
    };
    let base = score(
        plan,
        &documents,
        &subject("base", &folders.base_model, None),
        comm,
        device,
    )?;
    let vocabulary = Vocabulary::open(&folders.vocabulary)?;
    let extended = |start: &NewRows| {
        let grown = Some((vocabulary.clone(), *start));
        score(
            plan,
            &documents,
            &subject(start.name(), &folders.vocabulary, grown),
            comm,
            device,
        )
    };
    Ok(DayZero {
        base,
        extended: starts.iter().map(extended).collect::<Result<_>>()?,
    })
}

/// Where a document stands in the order that the seed draws.
fn draw(seed: u64, key: &str) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&seed.to_le_bytes()).update(key.as_bytes());
    hasher.finalize().into()
}

/// The held-out documents that the plan evaluates on, by language.
fn held_out(plan: &Plan, comm: &dyn Comm) -> Result<Vec<(Language, Vec<Document>)>> {
    if comm.rank() == 0 {
        let name = "reading held-out documents".into();
        Event::Phase { name }.emit();
    }
    let corpus = Corpus::open(&plan.folders.corpus)?;
    let of = |language: Language| {
        let mut documents = corpus.held_out(&language)?;
        documents.sort_by(|a, b| a.key.cmp(&b.key));
        documents.truncate(plan.evaluation.documents_per_language.unwrap_or(usize::MAX));
        Ok((language, documents))
    };
    corpus.languages().into_iter().map(of).collect()
}

fn score(
    plan: &Plan,
    documents: &[(Language, Vec<Document>)],
    subject: &Subject,
    comm: &dyn Comm,
    device: Device,
) -> Result<Evaluation> {
    let started = Instant::now();
    let rank_0 = comm.rank() == 0;
    let short = Path::new(&subject.name).file_name().unwrap_or_default().display();
    let say = |name: String| rank_0.then(|| Event::Phase { name }.emit());
    let tokenizer = Tokenizer::open(subject.tokenizer)?;
    let (mut scores, windows) = windows(plan, documents, &tokenizer)?;
    ensure!(
        !windows.is_empty(),
        "the corpus {} has no held-out documents",
        plan.folders.corpus.display()
    );

    say(format!("loading the model ({short})"));
    let config = ModelConfig::open(subject.model)?;
    let model = Model::load(
        &config,
        &Weights::open(subject.model)?.on(device),
        kind(plan.train.precision),
        &subject.grows,
    )
    .with_context(|| format!("loading {}", subject.model.display()))?
    .with_residual(plan.train.residual);
    model.check_length(plan.evaluation.window, "evaluation.window")?;

    say(format!("scoring held-out documents ({short})"));
    let batches = batches(&windows, plan.evaluation.tokens_per_batch);
    let total: u64 = windows.iter().map(|window| (window.ids.len() - 1) as u64).sum();
    let mut nats = vec![0.0; scores.len()];
    let mut done = 0;
    for (index, batch) in batches.iter().enumerate() {
        done += batch
            .iter()
            .map(|&window| (windows[window].ids.len() - 1) as u64)
            .sum::<u64>();
        if index % comm.world() != comm.rank() {
            continue;
        }
        add_nats(&model, &windows, batch, &mut nats);
        if rank_0 {
            Event::Progress {
                done,
                total,
                unit: "tokens".into(),
            }
            .emit();
        }
    }
    let nats = comm.sum(&nats)?;

    for (score, nats) in scores.iter_mut().zip(nats) {
        score.nats = nats;
        score.bits_per_byte = nats / std::f64::consts::LN_2 / score.bytes as f64;
    }
    let mean = |of: &dyn Fn(&LanguageResult) -> f64| scores.iter().map(of).sum::<f64>() / scores.len() as f64;
    Ok(Evaluation {
        model: subject.name.clone(),
        precision: precision_name(plan.train.precision),
        macro_bits_per_byte: mean(&|score| score.bits_per_byte),
        macro_nats_per_document: mean(&|score| score.nats / score.documents as f64),
        tokens: scores.iter().map(|score| score.tokens).sum(),
        seconds: started.elapsed().as_secs_f64(),
        languages: scores,
    })
}

pub fn kind(precision: Precision) -> Kind {
    match precision {
        Precision::F32 => Kind::Float,
        Precision::Bf16 => Kind::BFloat16,
    }
}

fn precision_name(precision: Precision) -> String {
    match precision {
        Precision::F32 => "f32".into(),
        Precision::Bf16 => "bf16".into(),
    }
}

/// The documents to score, cut into windows, and an empty score for every language that has any.
fn windows(
    plan: &Plan,
    documents: &[(Language, Vec<Document>)],
    tokenizer: &Tokenizer,
) -> Result<(Vec<LanguageResult>, Vec<Window>)> {
    let start = match &plan.corpus.document_start {
        None => None,
        Some(token) => Some(tokenizer.id(token).with_context(|| {
            format!("corpus.document_start = {token} is not a piece of the model's tokenizer; name one of its special tokens")
        })?),
    };
    let (mut scores, mut windows) = (Vec::new(), Vec::new());
    for (language, documents) in documents {
        let mut score = LanguageResult {
            language: language.to_string(),
            documents: 0,
            bytes: 0,
            characters: 0,
            tokens: 0,
            nats: 0.0,
            bits_per_byte: 0.0,
        };
        for document in documents {
            let encoded = tokenizer.encode(&document.text)?;
            let ids: Vec<i64> = start.into_iter().chain(encoded).map(i64::from).collect();
            if ids.len() < 2 {
                continue;
            }
            score.documents += 1;
            score.bytes += document.text.len() as u64;
            score.characters += document.text.chars().count() as u64;
            score.tokens += (ids.len() - 1) as u64;
            windows.extend(cut(&plan.evaluation, scores.len(), &ids));
        }
        if score.documents > 0 {
            scores.push(score);
        }
    }
    Ok((scores, windows))
}

/// Windows of at most `window` tokens, each starting `stride` after the one before; every target is scored once, in the
/// first window that holds it.
fn cut(evaluation: &configs::Evaluation, language: usize, ids: &[i64]) -> Vec<Window> {
    let mut windows = Vec::new();
    let mut start = 0;
    let mut scored = 1;
    while scored < ids.len() {
        let end = (start + evaluation.window).min(ids.len());
        windows.push(Window {
            language,
            ids: ids[start..end].to_vec(),
            context: scored - start,
        });
        scored = end;
        // The next target needs at least the token before it as context.
        start = (start + evaluation.stride).min(scored - 1);
    }
    windows
}

/// Windows of similar length together, padded batches of at most `tokens_per_batch`; longest first, so that a shortage of
/// memory shows at once.
fn batches(windows: &[Window], tokens_per_batch: usize) -> Vec<Vec<usize>> {
    let mut order: Vec<usize> = (0..windows.len()).collect();
    order.sort_by_key(|&window| (std::cmp::Reverse(windows[window].ids.len()), window));
    let mut batches: Vec<Vec<usize>> = Vec::new();
    for window in order {
        match batches.last_mut() {
            Some(batch) if (batch.len() + 1) * windows[batch[0]].ids.len() <= tokens_per_batch => batch.push(window),
            _ => batches.push(vec![window]),
        }
    }
    batches
}

/// Adds each window's nats to its language.
fn add_nats(model: &Model, windows: &[Window], batch: &[usize], nats: &mut [f64]) {
    let length = windows[batch[0]].ids.len();
    let shape = [batch.len() as i64, length as i64];
    let (mut ids, mut targets) = (vec![0; batch.len() * length], vec![IGNORE; batch.len() * length]);
    for (row, &window) in batch.iter().enumerate() {
        let Window {
            ids: window_ids,
            context,
            ..
        } = &windows[window];
        // Attention is causal: what stands behind a window cannot change its scores.
        ids[row * length..][..window_ids.len()].copy_from_slice(window_ids);
        let first = row * length + context - 1;
        targets[first..][..window_ids.len() - context].copy_from_slice(&window_ids[*context..]);
    }
    let (ids_bt, targets_bt) = (
        Tensor::from_slice(&ids).view(shape).to_device(model.device),
        Tensor::from_slice(&targets).view(shape).to_device(model.device),
    );
    let nll_bt = model.head.nll(model.head_matrix(), &model.hidden(&ids_bt), &targets_bt);
    let sums: Vec<f64> = Vec::try_from(nll_bt.sum_dim_intlist(-1, false, Kind::Double)).expect("one sum a row, in f64");
    for (&window, sum) in batch.iter().zip(sums) {
        nats[windows[window].language] += sum;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_target_is_scored_once_whatever_the_windows() {
        let ids: Vec<i64> = (0..23).collect();
        for (window, stride) in [(5, 5), (8, 3), (23, 1), (100, 50), (6, 5)] {
            let evaluation = configs::Evaluation {
                documents_per_language: None,
                window,
                stride,
                tokens_per_batch: 64,
            };
            let targets: Vec<i64> = cut(&evaluation, 0, &ids)
                .iter()
                .flat_map(|window| window.ids[window.context..].to_vec())
                .collect();
            assert_eq!(
                targets,
                (1..23).collect::<Vec<i64>>(),
                "window {window}, stride {stride}"
            );
        }
    }
}
