//! Text behind prompts: many sequences at once, each with its own keys and values, a new one begun wherever one ends.
//! What a sequence becomes depends on its prompt, its number and the settings, never on what runs beside it.

mod choose;
mod stream;

use std::collections::VecDeque;

use anyhow::{Result, ensure};
use launcher::measurement::{Finish, Generate, Generated, Request, Sampling};
use rayon::prelude::*;
use sharding::memory;

pub use choose::choose;
pub use stream::TextStream;

use crate::model::{Cache, Rows, Segment};
use crate::random;
use crate::subject::Subject;

/// Prompts up to this length are read together, by the kernel of few rows; longer ones each by itself: which of the two must
/// not depend on the others.
const FEW: usize = 24;

/// What happens while text is written.
pub enum News<'a> {
    /// More of the text of request `index`.
    Text {
        index: usize,
        text: &'a str,
    },
    /// A step has made so many tokens.
    Tokens(usize),
    Finished {
        index: usize,
        generated: Generated,
    },
}

/// A sequence under way.
struct Lane<'a> {
    index: usize,
    /// The prompt's tokens, then the text's.
    ids: Vec<u32>,
    prompt: usize,
    most: usize,
    /// Its first slot in the cache, and the number of its slots.
    at: usize,
    slots: usize,
    random: random::Stream,
    stream: TextStream<'a>,
    /// Bytes of the text that have been told.
    told: usize,
}

/// Writes text for the requests; `numbers` are those by which each draws its random numbers.
///
/// # Errors
/// When a prompt is empty, or it and its text exceed the model's positions.
pub fn generate(
    subject: &Subject,
    task: &Generate,
    numbers: &[usize],
    news: &mut dyn FnMut(News) -> Result<()>,
) -> Result<()> {
    let Generate { requests, sampling, .. } = task;
    let most_positions = subject.model.longest();
    let mut waiting = VecDeque::new();
    for (index, request) in requests.iter().enumerate() {
        let ids = subject.prompt(&request.prompt, sampling.special_tokens)?;
        let most = request.max_new_tokens.unwrap_or(sampling.max_new_tokens);
        ensure!(
            !ids.is_empty() && most > 0,
            "request {}: a prompt needs at least one token and a text too; this prompt has {}, its text {most}",
            request.id,
            ids.len()
        );
        ensure!(
            ids.len() + most <= most_positions,
            "request {}: a prompt of {} tokens and {most} new ones exceed the model's {most_positions} positions; shorten \
             the prompt or lower max_new_tokens to {}",
            request.id,
            ids.len(),
            most_positions.saturating_sub(ids.len())
        );
        waiting.push_back((index, ids, most));
    }
    let slots_of = |ids: &[u32], most: usize| ids.len() + most;
    let widest = waiting
        .iter()
        .map(|(_, ids, most)| slots_of(ids, *most))
        .max()
        .unwrap_or(0);
    let lanes_at_once = task.batch.max(1).min(requests.len());
    let mut cache = Cache::new(&subject.model, widest * lanes_at_once);
    let mut free: Vec<usize> = (0..lanes_at_once).rev().map(|lane| lane * widest).collect();
    let mut lanes: Vec<Lane> = Vec::new();
    let seeds = random::Stream::new(sampling.seed, "generate");

    while !waiting.is_empty() || !lanes.is_empty() {
        let first_new = lanes.len();
        while let Some(at) = free.pop() {
            let Some((index, ids, most)) = waiting.pop_front() else {
                free.push(at);
                break;
            };
            lanes.push(Lane {
                index,
                prompt: ids.len(),
                most,
                at,
                slots: 0,
                random: seeds.fork(numbers[index] as u64),
                stream: TextStream::behind(&subject.tokenizer, &ids)?,
                told: 0,
                ids,
            });
        }
        let mut logits = read(subject, &mut cache, &mut lanes, first_new);
        news(News::Tokens(lanes.len()))?;
        step(&mut lanes, &mut logits, sampling);
        let mut kept = Vec::with_capacity(lanes.len());
        for mut lane in lanes {
            match lane.ended(subject, sampling)? {
                finish @ None => {
                    lane.tell(sampling, finish.is_some(), news)?;
                    kept.push(lane);
                }
                finish @ Some(_) => {
                    lane.tell(sampling, finish.is_some(), news)?;
                    free.push(lane.at);
                    let index = lane.index;
                    news(News::Finished {
                        index,
                        generated: lane.generated(&requests[index], finish.expect("matched")),
                    })?;
                }
            }
        }
        lanes = kept;
    }
    Ok(())
}

/// Reads what each lane has not read: the last token, or from `first_new` on the prompt. Logits of what comes next, by lane.
fn read(subject: &Subject, cache: &mut Cache, lanes: &mut [Lane], first_new: usize) -> Vec<Vec<f32>> {
    let unread = |lane: &mut Lane| {
        let segment = Segment {
            ids: lane.ids[lane.slots..].to_vec(),
            sees: (lane.slots > 0)
                .then(|| lane.at..lane.at + lane.slots)
                .into_iter()
                .collect(),
            at: lane.at + lane.slots,
        };
        lane.slots = lane.ids.len();
        segment
    };
    let segments: Vec<Segment> = lanes.iter_mut().map(unread).collect();
    let is_alone = |lane: &usize| *lane >= first_new && segments[*lane].ids.len() > FEW;
    let (alone, together): (Vec<usize>, Vec<usize>) = (0..segments.len()).partition(is_alone);
    let mut passes: Vec<(Vec<usize>, Rows)> = alone.into_iter().map(|lane| (vec![lane], Rows::Many)).collect();
    if !together.is_empty() {
        passes.push((together, Rows::Few));
    }
    let mut logits = vec![Vec::new(); lanes.len()];
    for (of, rows) in passes {
        let here: Vec<Segment> = of.iter().map(|lane| segments[*lane].clone()).collect();
        let hidden_nd = subject.model.read(cache, &here, rows);
        let mut end = 0;
        let lasts = here.iter().map(|segment| {
            end += segment.ids.len() as i64;
            end - 1
        });
        let lasts = tch::Tensor::from_slice(&lasts.collect::<Vec<i64>>()).to_device(subject.model.device);
        // One row a lane, whichever pass: the head's products are always those of few rows.
        let logits_nv = subject.model.logits(&hidden_nd.index_select(0, &lasts), Rows::Few);
        let logits_nv = logits_nv.to_device(tch::Device::Cpu).contiguous();
        let pieces = subject.model.head.pieces as usize;
        for (lane, row) in of.iter().zip(memory::f32s(&logits_nv).chunks_exact(pieces)) {
            logits[*lane] = row.to_vec();
        }
    }
    logits
}

/// Every lane gets its next token.
fn step(lanes: &mut [Lane], logits: &mut [Vec<f32>], sampling: &Sampling) {
    let histories: Vec<(&[u32], f64)> = lanes
        .iter()
        .map(|lane| {
            (
                lane.ids.as_slice(),
                lane.random.uniform((lane.ids.len() - lane.prompt) as u64),
            )
        })
        .collect();
    let chosen: Vec<u32> = logits
        .par_iter_mut()
        .zip(histories)
        .map(|(logits, (seen, uniform))| choose(logits, seen, sampling, uniform))
        .collect();
    lanes.iter_mut().zip(chosen).for_each(|(lane, id)| lane.ids.push(id));
}

impl Lane<'_> {
    /// Takes up the newest token; why the text ends here, if it does.
    fn ended(&mut self, subject: &Subject, sampling: &Sampling) -> Result<Option<Finish>> {
        let newest = *self.ids.last().expect("a step has given it a token");
        if subject.ends.contains(&newest) && !sampling.ignore_end {
            self.ids.pop();
            self.stream.end()?;
            return Ok(Some(self.cut(sampling).unwrap_or(Finish::End)));
        }
        self.stream.push(newest)?;
        if let Some(stop) = self.cut(sampling) {
            return Ok(Some(stop));
        }
        if self.ids.len() - self.prompt == self.most {
            self.stream.end()?;
            return Ok(Some(self.cut(sampling).unwrap_or(Finish::Length)));
        }
        Ok(None)
    }

    /// Cuts the text before the first stop string in it.
    fn cut(&mut self, sampling: &Sampling) -> Option<Finish> {
        let text = &mut self.stream.text;
        let found = sampling.stop.iter().filter_map(|stop| text.find(stop.as_str())).min()?;
        text.truncate(found);
        Some(Finish::Stop)
    }

    /// Tells what is sure: not yet what may be the beginning of a stop string.
    fn tell(&mut self, sampling: &Sampling, all: bool, news: &mut dyn FnMut(News) -> Result<()>) -> Result<()> {
        let text = &self.stream.text;
        let begun = |stop: &String| {
            let most = stop.len().min(text.len() - self.told.min(text.len()));
            let starts = (1..=most).rev().filter(|n| stop.is_char_boundary(*n));
            starts.into_iter().find(|n| text.ends_with(&stop[..*n])).unwrap_or(0)
        };
        let held = if all {
            0
        } else {
            sampling.stop.iter().map(begun).max().unwrap_or(0)
        };
        let sure = text.len() - held;
        if sure > self.told {
            news(News::Text {
                index: self.index,
                text: &text[self.told..sure],
            })?;
            self.told = sure;
        }
        Ok(())
    }

    fn generated(self, request: &Request, finish: Finish) -> Generated {
        Generated {
            id: request.id.clone(),
            prompt: request.prompt.clone(),
            text: self.stream.text,
            tokens: self.ids[self.prompt..].to_vec(),
            prompt_tokens: self.prompt,
            finish,
        }
    }
}
