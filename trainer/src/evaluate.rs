//! Negative log-likelihood of held-out text, language by language, of any model with its own tokenizer.
//!
//! A document is scored as a whole: the special token before it is context only, and every token after it is a target; where
//! none stands before it, its first token is that context.
//! Bits per byte divide by the bytes of the targets, so that models with different tokenizers compare: also the base and the
//! extended model that no step has trained yet.
//!
//! Languages are scored a stretch at a time, in batches that do not depend on how many ranks share them; every window's nats
//! travel by themselves and are added up in the documents' order. So no digit depends on the ranks.

use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use configs::{NewRows, Plan, Precision};
use corpus::{Corpus, Document, Language, Tokenizer, Vocabulary};
use launcher::evaluation::{DayZero, DocumentResult, Evaluation, LanguageResult, Nll};
use launcher::events::Event;
use launcher::files;
use launcher::measurement::{Kept, Order, fingerprint};
use serde_json::{Value, json};
use sharding::Comm;
use tch::{Device, Kind, Tensor};

use crate::hf::{ModelConfig, Weights};
use crate::measure::phase;
use crate::model::{IGNORE, Model, Trains};
use crate::subject::{Subject, precision_name};

/// A stretch of one document that fits the model; the first `context` positions were scored in the window before.
pub struct Window {
    /// Number of its document among those that are scored.
    pub document: usize,
    ids: Vec<i64>,
    context: usize,
}

/// Documents cut into windows; the documents' results wait for their nats.
pub struct Prepared {
    pub documents: Vec<DocumentResult>,
    pub windows: Vec<Window>,
}

type ByLanguage = Vec<(Language, Vec<Document>)>;

/// Carries out an order: scores, keeps what is done, writes the result and the documents beside it. Rank 0 gives what to
/// print.
pub fn run(order: &Order, task: &Nll, subject: &Subject, comm: &dyn Comm) -> Result<Value> {
    phase(comm, "reading held-out documents");
    let corpus = Corpus::open(&task.corpus)?;
    let mut documents = held_out(&corpus, task.settings.documents_per_language)?;
    for wanted in &task.languages {
        ensure!(
            documents.iter().any(|(language, _)| language.as_str() == wanted),
            "--languages names {wanted}, which {} does not have; `panglot rows` shows what it has",
            task.corpus.display()
        );
    }
    documents
        .retain(|(language, _)| task.languages.is_empty() || task.languages.iter().any(|l| l == language.as_str()));
    let protocol = format!(
        "whole documents in windows of {} tokens, stride {}, start {}{}",
        task.settings.window,
        task.settings.stride,
        task.document_start
            .as_deref()
            .unwrap_or("none: the first token is not scored"),
        task.settings
            .documents_per_language
            .map_or(String::new(), |most| format!(", the first {most} by key")),
    );
    let texts: Vec<(&str, Vec<(&str, String)>)> = documents
        .iter()
        .map(|(language, documents)| {
            let digest = |d: &Document| blake3::hash(d.text.as_bytes()).to_hex().to_string();
            (
                language.as_str(),
                documents.iter().map(|d| (d.key.as_str(), digest(d))).collect(),
            )
        })
        .collect();
    let made_by = subject.made_by(protocol, fingerprint(&texts));
    // Batches of another size round otherwise.
    let kept = Kept::open(&order.out, &fingerprint(&(&made_by, task.settings.tokens_per_batch)));
    let of = Scoring {
        settings: &task.settings,
        start: task.document_start.as_deref(),
        kept: Some(&kept),
    };
    let started = Instant::now();
    let scored = score(&documents, subject, &of, comm)?;
    let mut printed = json!({ "written": order.out });
    if comm.rank() == 0 {
        let mut lines = Vec::new();
        for document in scored.iter().flatten() {
            serde_json::to_writer(&mut lines, document)?;
            lines.push(b'\n');
        }
        files::write_atomically(&Evaluation::documents_file(&order.out), &lines)?;
        let mut result = evaluation(subject, &scored, Some(&corpus));
        result.seconds = started.elapsed().as_secs_f64();
        result.settings = Some(task.clone());
        result.made_by = Some(made_by);
        files::write_json(&order.out, &result)?;
        kept.clear()?;
        printed = json!({ "written": order.out, "macro_bits_per_byte": result.macro_bits_per_byte });
    }
    comm.barrier()?;
    Ok(printed)
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
    let documents = sample(plan, most_bytes)?;
    let folders = &plan.folders;
    let score = |name: &str, tokenizer: &Path, vocabulary| {
        phase(comm, &format!("loading the model ({name})"));
        let config = ModelConfig::open(&folders.base_model)?;
        let weights = Weights::open(&folders.base_model)?;
        let grows = Trains {
            vocabulary,
            seed: plan.seed,
            ..Trains::default()
        };
        let subject = Subject {
            name: name.to_owned(),
            digest: weights.digest_with(&config),
            model: Model::load(&config, &weights.on(device), kind(plan.train.precision), &grows)
                .with_context(|| format!("loading {}", folders.base_model.display()))?,
            tokenizer: Tokenizer::open(tokenizer)?,
            ends: Default::default(),
            precision: plan.train.precision,
        };
        measured(plan, &documents, &subject.with_residual(plan.train.residual), comm)
    };
    let base = score("base", &folders.base_model, None)?;
    let vocabulary = Vocabulary::open(&folders.vocabulary)?;
    let extended = |start: &NewRows| score(start.name(), &folders.vocabulary, Some((vocabulary.clone(), *start)));
    Ok(DayZero {
        base,
        extended: starts.iter().map(extended).collect::<Result<_>>()?,
    })
}

/// The first `most_bytes` bytes of one document a language, drawn by the plan's seed from those that it evaluates on.
pub fn sample(plan: &Plan, most_bytes: usize) -> Result<ByLanguage> {
    let mut documents = of_plan(plan)?;
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
    Ok(documents)
}

/// Where a document stands in the order that the seed draws.
fn draw(seed: u64, key: &str) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&seed.to_le_bytes()).update(key.as_bytes());
    hasher.finalize().into()
}

fn of_plan(plan: &Plan) -> Result<ByLanguage> {
    held_out(
        &Corpus::open(&plan.folders.corpus)?,
        plan.evaluation.documents_per_language,
    )
}

/// The held-out documents, by language, in the order of their keys.
fn held_out(corpus: &Corpus, most: Option<usize>) -> Result<ByLanguage> {
    let of = |language: Language| {
        let mut documents = corpus.held_out(&language)?;
        documents.sort_by(|a, b| a.key.cmp(&b.key));
        documents.truncate(most.unwrap_or(usize::MAX));
        Ok((language, documents))
    };
    corpus.languages().into_iter().map(of).collect()
}

fn measured(plan: &Plan, documents: &ByLanguage, subject: &Subject, comm: &dyn Comm) -> Result<Evaluation> {
    let started = Instant::now();
    let of = Scoring {
        settings: &plan.evaluation,
        start: plan.before_document(),
        kept: None,
    };
    let scored = score(documents, subject, &of, comm)?;
    let mut result = evaluation(subject, &scored, None);
    result.seconds = started.elapsed().as_secs_f64();
    Ok(result)
}

fn evaluation(subject: &Subject, scored: &[Vec<DocumentResult>], corpus: Option<&Corpus>) -> Evaluation {
    let of = |documents: &Vec<DocumentResult>| LanguageResult::of(&documents[0].language, documents);
    let languages = scored.iter().map(of).collect();
    let precision = precision_name(subject.precision).to_owned();
    Evaluation::of(subject.name.clone(), precision, languages, corpus)
}

/// How documents are scored.
struct Scoring<'a> {
    settings: &'a configs::Evaluation,
    start: Option<&'a str>,
    /// Where languages that are done are kept; `None`: nowhere.
    kept: Option<&'a Kept>,
}

/// The documents' nats, by language, of the languages that have any; the same on every rank.
fn score(documents: &ByLanguage, subject: &Subject, of: &Scoring, comm: &dyn Comm) -> Result<Vec<Vec<DocumentResult>>> {
    let short = Path::new(&subject.name).file_name().unwrap_or_default().display();
    subject.check_length(of.settings.window, "evaluation.window")?;
    let prepared = documents
        .iter()
        .map(|(language, documents)| prepare(language, documents, &subject.tokenizer, of.settings, of.start))
        .collect::<Result<Vec<_>>>()?;
    let prepared: Vec<Prepared> = prepared.into_iter().filter(|p| !p.documents.is_empty()).collect();
    ensure!(
        !prepared.is_empty(),
        "there are no held-out documents to measure on; set corpus.held_out above 0"
    );
    phase(comm, &format!("scoring held-out documents ({short})"));
    let total: u64 = prepared.iter().map(Prepared::targets).sum();
    let mut done = 0;
    let mut scored = Vec::new();
    let mut rest = prepared.into_iter().peekable();
    while rest.peek().is_some() {
        // Enough for batches of like lengths, and not more, since what is under way is lost when it is interrupted.
        let (mut stretch, mut targets) = (Vec::new(), 0);
        while let Some(next) = rest.next_if(|_| targets < (STRETCH * of.settings.tokens_per_batch) as u64) {
            targets += next.targets();
            stretch.push(next);
        }
        let name = |prepared: &Prepared| prepared.documents[0].language.clone();
        let known = |prepared: &Prepared| of.kept.and_then(|kept| kept.get(&name(prepared)));
        // Rank 0 looks, and all do as it says: a file may appear between two ranks' looks.
        let found: Option<Vec<Vec<DocumentResult>>> = stretch.iter().map(known).collect();
        let is_known = comm.broadcast_bytes(&[u8::from(found.is_some())])? == [1];
        match (is_known, found) {
            (true, found) => scored.extend(found.context("a part that rank 0 has read is not there for another rank")?),
            (false, _) => {
                let told = |tokens: u64| {
                    if comm.rank() == 0 {
                        let unit = "tokens".to_owned();
                        Event::Progress {
                            done: done + tokens,
                            total,
                            unit,
                        }
                        .emit();
                    }
                };
                let nll = |ids: &Tensor, targets: &Tensor| {
                    let model = &subject.model;
                    Ok(model.head.nll(model.head_matrix(), &model.hidden(ids), targets))
                };
                let (tokens, device) = (of.settings.tokens_per_batch, subject.model.device);
                add_nats(&mut stretch, tokens, device, comm, &mut { nll }, Passes::OwnOnly, &told)?;
                for prepared in stretch {
                    if let Some(kept) = of.kept.filter(|_| comm.rank() == 0) {
                        kept.put(&name(&prepared), &prepared.documents)?;
                    }
                    scored.push(prepared.documents);
                }
            }
        }
        done += targets;
    }
    Ok(scored)
}

/// Batches of a stretch of languages.
const STRETCH: usize = 16;

impl Prepared {
    /// Tokens of the longest window.
    pub fn longest(&self) -> usize {
        self.windows.iter().map(|window| window.ids.len()).max().unwrap_or(0)
    }

    fn targets(&self) -> u64 {
        self.documents.iter().map(|document| document.tokens).sum()
    }
}

/// −ln p of every target of `ids_bt`, 0 where there is none: [b, t].
pub type NllOf<'a> = &'a mut dyn FnMut(&Tensor, &Tensor) -> Result<Tensor>;

/// How many passes a rank makes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Passes {
    OwnOnly,
    /// Where passes are collectives: a rank that has no batch left computes one of another's again, in vain.
    AsManyOnAllRanks,
}

/// Scores the windows of a stretch and adds their nats to their documents: batches are dealt to the ranks in turn.
pub fn add_nats(
    stretch: &mut [Prepared],
    tokens_per_batch: usize,
    device: Device,
    comm: &dyn Comm,
    nll: NllOf,
    passes: Passes,
    told: &dyn Fn(u64),
) -> Result<()> {
    let windows: Vec<&Window> = stretch.iter().flat_map(|prepared| &prepared.windows).collect();
    let mut nats = vec![0.0; windows.len()];
    let mut done = 0;
    let batches = batches(&windows, tokens_per_batch);
    for (index, batch) in batches.iter().enumerate() {
        done += batch
            .iter()
            .map(|window| windows[*window].targets() as u64)
            .sum::<u64>();
        if index % comm.world() != comm.rank() {
            continue;
        }
        let here: Vec<&Window> = batch.iter().map(|window| windows[*window]).collect();
        for (window, sum) in batch.iter().zip(nats_of(&here, device, nll)?) {
            nats[*window] = sum;
        }
        told(done);
    }
    let left_over = batches.len() % comm.world();
    if passes == Passes::AsManyOnAllRanks && left_over > 0 && comm.rank() >= left_over {
        let here: Vec<&Window> = batches[0].iter().map(|window| windows[*window]).collect();
        nats_of(&here, device, nll)?;
    }
    // One rank has a window's nats, the others 0: the sum is exact.
    let nats = comm.sum(&nats)?;
    let mut nats = nats.into_iter();
    for Prepared { documents, windows } in stretch {
        for (window, nats) in windows.iter().zip(&mut nats) {
            documents[window.document].nats += nats;
        }
    }
    Ok(())
}

/// −ln p of each window's targets together.
fn nats_of(windows: &[&Window], device: Device, nll: NllOf) -> Result<Vec<f64>> {
    let length = windows.iter().map(|window| window.ids.len()).max().unwrap_or(0);
    let shape = [windows.len() as i64, length as i64];
    let (mut ids, mut targets) = (vec![0; windows.len() * length], vec![IGNORE; windows.len() * length]);
    for (row, window) in windows.iter().enumerate() {
        // Attention is causal: what stands behind a window cannot change its scores.
        ids[row * length..][..window.ids.len()].copy_from_slice(&window.ids);
        let first = row * length + window.context - 1;
        targets[first..][..window.targets()].copy_from_slice(&window.ids[window.context..]);
    }
    let on = |values: &[i64]| Tensor::from_slice(values).view(shape).to_device(device);
    let nll_bt = nll(&on(&ids), &on(&targets))?;
    Ok(Vec::try_from(nll_bt.sum_dim_intlist(-1, false, Kind::Double))?)
}

pub fn kind(precision: Precision) -> Kind {
    match precision {
        Precision::F32 => Kind::Float,
        Precision::Bf16 => Kind::BFloat16,
    }
}

impl Window {
    fn targets(&self) -> usize {
        self.ids.len() - self.context
    }
}

/// A language's documents as tokens, cut into windows; documents that have no target are left out.
pub fn prepare(
    language: &Language,
    documents: &[Document],
    tokenizer: &Tokenizer,
    settings: &configs::Evaluation,
    start: Option<&str>,
) -> Result<Prepared> {
    let start = match start {
        None => None,
        Some(token) => Some(tokenizer.id(token).with_context(|| {
            format!("{token}, which stands before documents (corpus.document_start, else corpus.document_end), is not a piece of the model's \
                 tokenizer; name another for this time with --start TOKEN, or none with --start none")
        })?),
    };
    let texts: Vec<&str> = documents.iter().map(|document| document.text.as_str()).collect();
    let mut prepared = Prepared {
        documents: Vec::new(),
        windows: Vec::new(),
    };
    // What nothing stands before cannot be predicted.
    let unscored: Vec<usize> = match start {
        Some(_) => vec![0; texts.len()],
        None => tokenizer.ends_of_first_tokens(&texts)?,
    };
    let encoded = tokenizer.encode_batch(&texts)?;
    for ((document, encoded), unscored) in documents.iter().zip(encoded).zip(unscored) {
        let ids: Vec<i64> = start.into_iter().chain(encoded).map(i64::from).collect();
        if ids.len() < 2 {
            continue;
        }
        let text = &document.text;
        let scored = &text[unscored..];
        prepared.windows.extend(cut(settings, prepared.documents.len(), &ids));
        prepared.documents.push(DocumentResult {
            language: language.to_string(),
            key: document.key.clone(),
            text_bytes: text.len() as u64,
            bytes: scored.len() as u64,
            characters: scored.chars().count() as u64,
            tokens: (ids.len() - 1) as u64,
            nats: 0.0,
        });
    }
    Ok(prepared)
}

/// Windows of at most `window` tokens, each starting `stride` after the one before; every target is scored once, in the
/// first window that holds it.
fn cut(evaluation: &configs::Evaluation, document: usize, ids: &[i64]) -> Vec<Window> {
    let mut windows = Vec::new();
    let mut start = 0;
    let mut scored = 1;
    while scored < ids.len() {
        let end = (start + evaluation.window).min(ids.len());
        windows.push(Window {
            document,
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
/// memory shows at once. A batch that is large enough for its products takes none that is much shorter: what is padded is
/// computed in vain.
fn batches(windows: &[&Window], tokens_per_batch: usize) -> Vec<Vec<usize>> {
    let mut order: Vec<usize> = (0..windows.len()).collect();
    order.sort_by_key(|&window| (std::cmp::Reverse(windows[window].ids.len()), window));
    let mut batches: Vec<Vec<usize>> = Vec::new();
    for window in order {
        let joins = |batch: &Vec<usize>| {
            let (longest, here) = (windows[batch[0]].ids.len(), windows[window].ids.len());
            let is_small = batch.len() * longest < tokens_per_batch / 4;
            (batch.len() + 1) * longest <= tokens_per_batch && (is_small || 10 * here >= 9 * longest)
        };
        match batches.last_mut() {
            Some(batch) if joins(batch) => batch.push(window),
            _ => batches.push(vec![window]),
        }
    }
    batches
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_hold_like_lengths_unless_they_are_small() {
        let lengths = [100, 30, 99, 89, 91, 12, 11, 10, 9];
        let windows = lengths.map(|length| Window {
            document: 0,
            ids: vec![0; length],
            context: 1,
        });
        let windows: Vec<&Window> = windows.iter().collect();
        let of = |tokens| -> Vec<Vec<usize>> {
            let batches = batches(&windows, tokens).into_iter();
            batches
                .map(|batch| batch.into_iter().map(|window| lengths[window]).collect())
                .collect()
        };
        assert_eq!(of(320), [vec![100, 99, 91], vec![89], vec![30, 12, 11], vec![10, 9]]);
        assert_eq!(of(100)[4..], [vec![30], vec![12, 11, 10], vec![9]]);
    }

    #[test]
    fn every_target_is_scored_once_whatever_the_windows() {
        let ids: Vec<i64> = (0..23).collect();
        for (window, stride) in [(5, 5), (8, 3), (23, 1), (100, 50), (6, 5)] {
            let evaluation = configs::Evaluation {
                documents_per_language: None,
                window,
                stride,
                tokens_per_batch: 64,
                ..configs::Evaluation::default()
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
