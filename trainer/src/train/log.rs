//! Rank 0's records of a run: a line of metrics a step, TensorBoard's events, and the launcher's ear.

use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::io::Write;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use configs::Plan;
use corpus::Stream;
use launcher::events::{Event, HeldOut, StepMetrics};
use launcher::files;

use crate::checkpoint::Progress;
use crate::step::{StepReport, lr_by_group};
use crate::tensorboard::EventWriter;

/// "eng_Latn 3, swh_Latn 1": languages by rows, most first.
pub fn languages(stream: &Stream, rows: Range<u64>) -> String {
    let mut counts: BTreeMap<String, u32> = BTreeMap::new();
    for row in rows {
        let language = stream.parts()[stream.part(row)].language.to_string();
        *counts.entry(language).or_insert(0) += 1;
    }
    let mut counts: Vec<_> = counts.into_iter().collect();
    counts.sort_by_key(|(_, rows)| std::cmp::Reverse(*rows));
    let counts: Vec<String> = counts
        .iter()
        .map(|(language, rows)| format!("{language} {rows}"))
        .collect();
    counts.join(", ")
}

/// What a step took, beside what it computed.
pub struct Measured {
    pub seconds: f64,
    pub held_out: Option<HeldOut>,
    pub resident_bytes: u64,
    pub bytes_sent: u64,
    pub bytes_least: u64,
}

pub fn metrics(
    plan: &Plan,
    stream: &Stream,
    rows: Range<u64>,
    report: &StepReport,
    progress: Progress,
    measured: &Measured,
) -> StepMetrics {
    let step = progress.step - 1;
    let (mut languages, mut parts) = (BTreeMap::new(), BTreeMap::new());
    for row in rows {
        let part = &stream.parts()[stream.part(row)];
        *languages.entry(part.language.to_string()).or_insert(0) += 1;
        // Its name is the language's where there is one source only.
        if part.name != part.language.as_str() {
            *parts.entry(part.name.clone()).or_insert(0) += 1;
        }
    }
    StepMetrics {
        step,
        steps: plan.train.steps,
        loss: report.loss,
        grad_norm: report.verdict.grad_norm,
        skipped: report.skipped.is_some(),
        skip_reason: report.skipped.map(|why| why.to_string()),
        held_out: measured.held_out,
        lr: lr_by_group(plan, step),
        targets: report.targets,
        targets_so_far: progress.targets_so_far,
        seconds: measured.seconds,
        tokens_per_second: (plan.train.rows_per_step * plan.train.sequence_length) as f64 / measured.seconds,
        resident_bytes: measured.resident_bytes,
        bytes_sent: measured.bytes_sent,
        bytes_least: measured.bytes_least,
        rows_digest: report.rows.to_string(),
        languages,
        parts,
        unix_time: SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default()
            .as_secs_f64(),
    }
}

/// Rank 0's records of the run: `metrics.jsonl`, TensorBoard's events, and the launcher's ear. A disk that takes nothing more
/// does not end the run: lines wait in memory.
pub struct Log {
    run: PathBuf,
    metrics: fs::File,
    /// Bytes of whole lines in `metrics`.
    whole: u64,
    waiting: String,
    behind: bool,
    tensorboard: Option<EventWriter>,
}

impl Log {
    /// Opens the run's records at `step`; lines of steps that will be taken again go.
    pub fn open(run: &Path, step: u64) -> Result<Log> {
        let path = run.join("metrics.jsonl");
        // Steps after the checkpoint are taken again: their lines would be doubles.
        files::keep_steps_before(&path, step)?;
        let metrics = OpenOptions::new()
            .create(true)
            .append(true)
            .open(&path)
            .with_context(|| path.display().to_string())?;
        Ok(Log {
            run: run.to_owned(),
            whole: metrics.metadata().with_context(|| path.display().to_string())?.len(),
            metrics,
            waiting: String::new(),
            behind: false,
            tensorboard: None,
        })
    }

    pub fn write(&mut self, metrics: StepMetrics) -> Result<()> {
        self.waiting += &serde_json::to_string(&metrics)?;
        self.waiting.push('\n');
        let written = self.catch_up().and_then(|()| self.draw(&metrics));
        match written {
            Ok(()) if self.behind => Event::Note {
                text: "metrics.jsonl is written again".into(),
            }
            .emit(),
            Err(ref error) if !self.behind => Event::Note {
                text: format!("metrics cannot be written and wait in memory: {error:#}"),
            }
            .emit(),
            _ => {}
        }
        self.behind = written.is_err();
        Event::Step(metrics).emit();
        Ok(())
    }

    /// Writes what waits, as whole lines or not at all.
    fn catch_up(&mut self) -> Result<()> {
        let written = self.metrics.write_all(self.waiting.as_bytes());
        if let Err(error) = written {
            // A part of a line may be there.
            let _ = self.metrics.set_len(self.whole);
            return Err(error).context("writing metrics.jsonl");
        }
        self.whole += self.waiting.len() as u64;
        self.waiting.clear();
        Ok(())
    }

    /// TensorBoard's events of a step; those of steps that could not be written are in `metrics.jsonl` only.
    fn draw(&mut self, metrics: &StepMetrics) -> Result<()> {
        let mut tensorboard = match self.tensorboard.take() {
            Some(open) => open,
            None => EventWriter::create(&self.run.join("tensorboard"))?,
        };
        let (step, time) = (metrics.step as i64, metrics.unix_time);
        let scalars = [
            ("loss", metrics.loss),
            ("grad_norm", metrics.grad_norm),
            ("tokens_per_second", metrics.tokens_per_second),
            ("resident_gib", metrics.resident_bytes as f64 / (1u64 << 30) as f64),
        ];
        for (tag, value) in scalars {
            tensorboard.scalar(tag, step, value as f32, time)?;
        }
        for (group, lr) in &metrics.lr {
            let tag = format!("lr/{}", group.name());
            tensorboard.scalar(&tag, step, *lr as f32, time)?;
        }
        tensorboard.flush()?;
        // Not after an error: what a torn record holds, nobody knows. The next events go into a new file.
        self.tensorboard = Some(tensorboard);
        Ok(())
    }
}
