//! Few-shot scores: what a language's prompts begin with is read once, an item's text once for all its labels, and of a label
//! only what the others do not share. Languages are dealt to the ranks; each is kept when it is done.

use std::collections::BTreeMap;
use std::time::Instant;

use anyhow::{Context, Result};
use launcher::events::Event;
use launcher::fewshot::{FewShot, FewShotResult, Item, ItemScores, Items, LabelScore, LanguageScore, Protocol};
use launcher::files;
use launcher::measurement::{Kept, Order, fingerprint};
use launcher::statistics::python_sample;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use sharding::Comm;
use tch::Tensor;

use crate::measure::phase;
use crate::model::{Cache, Rows, Segment};
use crate::subject::Subject;

/// A language as it is kept.
#[derive(Serialize, Deserialize)]
struct Part {
    score: LanguageScore,
    items: Vec<ItemScores>,
}

/// Scores every language and writes the result; rank 0 gives what to print.
pub fn run(order: &Order, task: &FewShot, subject: &Subject, comm: &dyn Comm) -> Result<Value> {
    let started = Instant::now();
    subject.check_length(
        task.context.min(subject.model.config.max_position_embeddings),
        "context",
    )?;
    let languages = task.task.languages(&task.data, &task.languages)?;
    let items: Vec<Items> = languages
        .iter()
        .map(|(_, files)| task.task.items(files))
        .collect::<Result<_>>()?;
    let digests: BTreeMap<&String, &String> = languages.iter().zip(&items).map(|((l, _), i)| (l, &i.digest)).collect();
    let made_by = subject.made_by(task.protocol_line(), fingerprint(&digests));
    let kept = Kept::open(&order.out, &fingerprint(&made_by));
    let asked = |items: &Items| items.asked.len().min(task.most_items.unwrap_or(usize::MAX)) as u64;
    let total: u64 = items.iter().map(asked).sum();
    phase(comm, "scoring");
    let mut done = 0;
    for (number, ((language, _), items)) in languages.iter().zip(&items).enumerate() {
        if number % comm.world() == comm.rank() && !kept.has(language) {
            let told = |items_done: usize| {
                if comm.rank() == 0 {
                    let unit = "items".to_owned();
                    Event::Progress {
                        done: done + items_done as u64,
                        total,
                        unit,
                    }
                    .emit();
                }
            };
            let part = language_part(task, subject, language, items, &told).with_context(|| language.clone())?;
            kept.put(language, &part)?;
        }
        done += asked(items);
    }
    comm.barrier()?;
    let mut printed = json!({ "written": order.out });
    if comm.rank() == 0 {
        let part = |(language, _): &(String, _)| -> Result<Part> {
            kept.get(language)
                .with_context(|| format!("the scores of {language} are not there"))
        };
        let parts: Vec<Part> = languages.iter().map(part).collect::<Result<_>>()?;
        if task.scores {
            let mut lines = Vec::new();
            for part in &parts {
                for item in &part.items {
                    let line = json!({ "language": part.score.language, "item": item.item, "truth": item.truth,
                                       "labels": item.labels });
                    serde_json::to_writer(&mut lines, &line)?;
                    lines.push(b'\n');
                }
            }
            files::write_atomically(&order.out.with_extension("scores.jsonl"), &lines)?;
        }
        let scores = parts.into_iter().map(|part| part.score).collect();
        let result = FewShotResult::of(task, made_by, scores, started.elapsed().as_secs_f64());
        files::write_json(&order.out, &result)?;
        kept.clear()?;
        printed = json!({ "written": order.out, "items": result.items, "seconds": result.seconds });
    }
    comm.barrier()?;
    Ok(printed)
}

/// The ways an item may go on, as tokens.
struct Ways {
    /// The whole of each, shots and label included.
    ids: Vec<Vec<u32>>,
    /// From this token on it is the label's.
    label_from: Vec<usize>,
    cut: bool,
}

fn language_part(
    task: &FewShot,
    subject: &Subject,
    language: &str,
    items: &Items,
    told: &dyn Fn(usize),
) -> Result<Part> {
    let shots = python_sample(task.seed, items.shown.len(), task.shots);
    let shown: Vec<String> = shots.iter().map(|row| task.task.shot(&items.shown[*row])).collect();
    let begin: String = shown
        .iter()
        .flat_map(|shot| [shot, &task.task.joined_by])
        .map(String::as_str)
        .collect();
    let asked = &items.asked[..items.asked.len().min(task.most_items.unwrap_or(usize::MAX))];
    let limit = task.context.min(subject.model.config.max_position_embeddings);
    let ways: Vec<Ways> = match task.protocol {
        Protocol::Mala => asked
            .iter()
            .map(|item| whole_labels(task, subject, &begin, item, limit))
            .collect::<Result<_>>()?,
        Protocol::Emma => asked
            .iter()
            .map(|item| last_pieces(task, subject, &begin, item, limit))
            .collect::<Result<_>>()?,
    };

    // What all of them begin with, but for the last token before a label: its logits are wanted.
    let whole: Vec<&Ways> = ways.iter().filter(|way| !way.cut).collect();
    let shared = shared_beginning(whole.iter().flat_map(|way| &way.ids));
    let earliest = whole.iter().flat_map(|way| &way.label_from).min();
    let prefix = shared.min(earliest.map_or(0, |first| first.saturating_sub(1)));
    let longest = ways.iter().map(|way| new_tokens(way, 0)).max().unwrap_or(0);
    let room = task.tokens_per_batch.max(longest);
    let mut cache = Cache::new(&subject.model, prefix + room);
    if prefix > 0 {
        let first = Segment {
            ids: whole[0].ids[0][..prefix].to_vec(),
            sees: Vec::new(),
            at: 0,
        };
        let _ = subject.model.read(&mut cache, &[first], Rows::Many);
    }

    let mut scored = Vec::with_capacity(ways.len());
    while scored.len() < ways.len() {
        let first = scored.len();
        let mut tokens = 0;
        let fits = |way: &&Ways| {
            tokens += new_tokens(way, if way.cut { 0 } else { prefix });
            tokens <= room
        };
        let here: Vec<&Ways> = ways[first..].iter().take_while(fits).collect();
        for (offset, nats) in batch(subject, &mut cache, prefix, &here)?.into_iter().enumerate() {
            let (way, item) = (&ways[first + offset], &asked[first + offset]);
            let label = |(label, nats): (usize, f64)| LabelScore {
                nats,
                tokens: way.ids[label].len() - way.label_from[label],
                bytes: match task.protocol {
                    Protocol::Mala => task.task.labels[label].shown().len(),
                    // Of a label only one token is scored: there is no length to divide by.
                    Protocol::Emma => 1,
                },
            };
            scored.push(ItemScores {
                item: first + offset,
                truth: item.label,
                labels: nats.into_iter().enumerate().map(label).collect(),
            });
        }
        told(scored.len());
    }
    let cut = ways.iter().filter(|way| way.cut).count();
    let n_labels = task.task.labels.len();
    Ok(Part {
        score: LanguageScore::of(language, n_labels, &scored, shots, cut, items.digest.clone()),
        items: scored,
    })
}

/// MaLA's: prompt and label are encoded together; the label's tokens are those beyond the prompt's own.
fn whole_labels(task: &FewShot, subject: &Subject, begin: &str, item: &Item, limit: usize) -> Result<Ways> {
    let (prompt, space) = task.task.prompt(item);
    let prompt = format!("{begin}{prompt}");
    let before = subject.prompt(&prompt, false)?.len();
    let mut ids: Vec<Vec<u32>> = Vec::new();
    for label in &task.task.labels {
        ids.push(subject.prompt(&format!("{prompt}{space}{}", label.shown()), false)?);
    }
    let label_from = ids
        .iter()
        .map(|ids| before.min(ids.len().saturating_sub(1)).max(1))
        .collect();
    Ok(within(
        Ways {
            ids,
            label_from,
            cut: false,
        },
        limit,
    ))
}

/// EMMA's: of a label only the last token counts that it has when written after a newline, as what comes next.
fn last_pieces(task: &FewShot, subject: &Subject, begin: &str, item: &Item, limit: usize) -> Result<Ways> {
    let (prompt, _) = task.task.prompt(item);
    let prompt = subject.prompt(&format!("{begin}{prompt}"), false)?;
    let mut ids = Vec::new();
    for label in &task.task.labels {
        let written = subject.prompt(&format!("\n{}", label.shown()), false)?;
        let last = *written.last().context("a label has no token")?;
        ids.push(prompt.iter().copied().chain([last]).collect());
    }
    let label_from = vec![prompt.len(); ids.len()];
    Ok(within(
        Ways {
            ids,
            label_from,
            cut: false,
        },
        limit,
    ))
}

/// What is too long loses its beginning, as much for every label.
fn within(mut ways: Ways, limit: usize) -> Ways {
    let longest = ways.ids.iter().map(Vec::len).max().unwrap_or(0);
    let beyond = longest.saturating_sub(limit);
    if beyond > 0 {
        ways.ids.iter_mut().for_each(|ids| drop(ids.drain(..beyond)));
        ways.label_from
            .iter_mut()
            .for_each(|from| *from = from.saturating_sub(beyond).max(1));
        ways.cut = true;
    }
    ways
}

fn shared_beginning<'a>(of: impl Iterator<Item = &'a Vec<u32>>) -> usize {
    let mut first: Option<(&Vec<u32>, usize)> = None;
    for ids in of {
        first = Some(match first {
            None => (ids, ids.len()),
            Some((known, length)) => {
                let same = known[..length].iter().zip(ids).take_while(|(a, b)| a == b).count();
                (known, same)
            }
        });
    }
    first.map_or(0, |(_, length)| length)
}

/// Where the ways of an item part: what stands before is read once. The last token of a way is never read.
fn fork(ways: &Ways) -> usize {
    let shortest = ways.ids.iter().map(|ids| ids.len() - 1).min().unwrap_or(0);
    shared_beginning(ways.ids.iter()).min(shortest)
}

/// Tokens that are read for an item behind `prefix`.
fn new_tokens(ways: &Ways, prefix: usize) -> usize {
    let fork = fork(ways);
    (fork - prefix.min(fork)) + ways.ids.iter().map(|ids| ids.len() - 1 - fork).sum::<usize>()
}

/// Nats of every label of some items, in one pass: an item's text as one segment, and one for each way it goes on.
fn batch(subject: &Subject, cache: &mut Cache, prefix: usize, items: &[&Ways]) -> Result<Vec<Vec<f64>>> {
    let mut segments: Vec<Segment> = Vec::new();
    // Position within the pass of every segment's first token.
    let mut row = 0;
    let mut at = prefix;
    let mut wanted: Vec<Wanted> = Vec::new();
    for (item, ways) in items.iter().enumerate() {
        let begin = if ways.cut { 0 } else { prefix };
        let fork = fork(ways);
        let seen = (begin > 0).then_some(0..begin);
        let (text_at, text_row) = (at, row);
        if fork > begin {
            segments.push(Segment {
                ids: ways.ids[0][begin..fork].to_vec(),
                sees: seen.clone().into_iter().collect(),
                at,
            });
            at += fork - begin;
            row += fork - begin;
        }
        for (label, ids) in ways.ids.iter().enumerate() {
            let own_row = row;
            if ids.len() - 1 > fork {
                let own = ids[fork..ids.len() - 1].to_vec();
                let length = own.len();
                let text = (fork > begin).then_some(text_at..text_at + fork - begin);
                segments.push(Segment {
                    ids: own,
                    sees: seen.clone().into_iter().chain(text).collect(),
                    at,
                });
                at += length;
                row += length;
            }
            for (target, id) in ids.iter().enumerate().skip(ways.label_from[label]) {
                let from = target - 1;
                wanted.push(Wanted {
                    row: if from < fork {
                        text_row + from - begin
                    } else {
                        own_row + from - fork
                    },
                    id: *id,
                    item,
                    label,
                });
            }
        }
    }
    let hidden_nd = subject.model.read(cache, &segments, Rows::Many);
    let mut nats: Vec<Vec<f64>> = items.iter().map(|ways| vec![0.0; ways.ids.len()]).collect();
    // In order, so that of a row's targets the logits are made once.
    wanted.sort_by_key(|wanted| wanted.row);
    let mut rows: Vec<i64> = wanted.iter().map(|wanted| wanted.row as i64).collect();
    rows.dedup();
    let pieces = subject.model.head.pieces as usize;
    let most_rows = (LOGITS_BYTES / (4 * pieces)).max(1);
    for rows in rows.chunks(most_rows) {
        let of = Tensor::from_slice(rows).to_device(subject.model.device);
        let logits_nv = subject.model.logits(&hidden_nd.index_select(0, &of), Rows::Many);
        let here = wanted.iter().filter_map(|wanted| {
            let place = rows.binary_search(&(wanted.row as i64)).ok()?;
            Some((place, wanted))
        });
        let here: Vec<(usize, &Wanted)> = here.collect();
        let indices = |of: &dyn Fn(&(usize, &Wanted)) -> i64| {
            let values: Vec<i64> = here.iter().map(of).collect();
            Tensor::from_slice(&values).to_device(subject.model.device)
        };
        let (places, ids) = (indices(&|(place, _)| *place as i64), indices(&|(_, w)| i64::from(w.id)));
        let logsumexp_n = logits_nv.logsumexp([-1i64], false).index_select(0, &places);
        let flat = &places * pieces as i64 + ids;
        let chosen_n = logits_nv.view([-1]).index_select(0, &flat);
        let nll: Vec<f64> = Vec::try_from((logsumexp_n - chosen_n).to_kind(tch::Kind::Double))?;
        for ((_, wanted), nll) in here.iter().zip(nll) {
            nats[wanted.item][wanted.label] += nll;
        }
    }
    Ok(nats)
}

/// Logits that exist at once.
const LOGITS_BYTES: usize = 128 << 20;

/// A token to be scored by the logits of a row.
struct Wanted {
    row: usize,
    id: u32,
    item: usize,
    label: usize,
}
