//! Carries out an order of the command line: opens the model, runs the task with progress, writes the result whole.
//! Ranks take parts in turn and keep each when it is done; rank 0 puts the parts together.

use std::time::Instant;

use anyhow::{Context, Result};
use launcher::events::Event;
use launcher::files;
use launcher::measurement::{Generate, Generated, GenerationResult, Kept, Order, Task, fingerprint};
use serde_json::{Value, json};
use sharding::Comm;
use tch::Device;

use crate::generate::{News, generate};
use crate::subject::Subject;
use crate::{evaluate, fewshot};

/// What `panglot` prints if nothing else is known of the result.
pub fn measure(order: &Order, comm: &dyn Comm, device: Device) -> Result<Value> {
    phase(comm, "loading the model");
    let mut subject = Subject::open(&order.model, order.precision, comm, device)?;
    if let Task::Nll(task) = &order.task {
        subject = subject.with_residual(task.residual);
    }
    match &order.task {
        Task::Generate(task) => texts(order, task, &subject, comm),
        Task::FewShot(task) => fewshot::run(order, task, &subject, comm),
        Task::Nll(task) => evaluate::run(order, task, &subject, comm),
    }
}

pub fn phase(comm: &dyn Comm, name: &str) {
    if comm.rank() == 0 {
        Event::Phase { name: name.to_owned() }.emit();
    }
}

/// Requests of a part: what an interruption costs at most.
const PART: usize = 64;

fn texts(order: &Order, task: &Generate, subject: &Subject, comm: &dyn Comm) -> Result<Value> {
    let started = Instant::now();
    let data_digest = fingerprint(&task.requests);
    let protocol = format!("generation {}", serde_json::to_string(&task.sampling)?);
    let made_by = subject.made_by(protocol, data_digest);
    let kept = Kept::open(&order.out, &fingerprint(&made_by));
    let parts: Vec<&[_]> = task.requests.chunks(PART).collect();
    let most = |request: &launcher::measurement::Request| {
        request.max_new_tokens.unwrap_or(task.sampling.max_new_tokens) as u64
    };
    let total: u64 = task.requests.iter().map(most).sum();
    let mut done = 0;
    phase(comm, "writing");
    for (number, requests) in parts.iter().enumerate() {
        let key = format!("part-{number:06}");
        let of_part: u64 = requests.iter().map(most).sum();
        if number % comm.world() != comm.rank() || kept.has(&key) {
            done += of_part;
            continue;
        }
        let first = number * PART;
        let numbers: Vec<usize> = (first..first + requests.len()).collect();
        let mut written: Vec<Option<Generated>> = vec![None; requests.len()];
        let part = Generate {
            requests: requests.to_vec(),
            ..task.clone()
        };
        let mut tokens = 0;
        generate(subject, &part, &numbers, &mut |news| {
            match news {
                News::Text { index, text } if task.stream && comm.rank() == 0 => Event::Text {
                    index: first + index,
                    text: text.to_owned(),
                    ended: false,
                }
                .emit(),
                News::Text { .. } => {}
                News::Tokens(more) => tokens += more as u64,
                News::Finished { index, generated } => {
                    written[index] = Some(generated);
                    if task.stream && comm.rank() == 0 {
                        let text = String::new();
                        Event::Text {
                            index: first + index,
                            text,
                            ended: true,
                        }
                        .emit();
                    }
                }
            }
            if comm.rank() == 0 && !task.stream {
                let unit = "tokens at most".to_owned();
                Event::Progress {
                    done: done + tokens,
                    total,
                    unit,
                }
                .emit();
            }
            Ok(())
        })?;
        done += of_part;
        kept.put(&key, &written.into_iter().flatten().collect::<Vec<_>>())?;
    }
    comm.barrier()?;
    let mut result = json!({ "written": order.out });
    if comm.rank() == 0 {
        let mut texts: Vec<Generated> = Vec::with_capacity(task.requests.len());
        for number in 0..parts.len() {
            let part: Option<Vec<Generated>> = kept.get(&format!("part-{number:06}"));
            texts.extend(part.with_context(|| format!("part {number} of {} is not there", order.out.display()))?);
        }
        let written = GenerationResult {
            made_by,
            new_tokens: texts.iter().map(|text| text.tokens.len() as u64).sum(),
            seconds: started.elapsed().as_secs_f64(),
            texts,
        };
        files::write_json(&order.out, &written)?;
        kept.clear()?;
        result = json!({ "written": order.out, "new_tokens": written.new_tokens, "seconds": written.seconds });
    }
    comm.barrier()?;
    Ok(result)
}
