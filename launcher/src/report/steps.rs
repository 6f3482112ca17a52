//! The steps of a run from `metrics.jsonl`, a line at a time: with 500 languages a line has 20 kB, and a run has many.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;

use anyhow::Context;
use serde_json::{Value, json};

use super::table::Table;
use crate::events::StepMetrics;

/// What is kept of a step.
#[derive(Clone, Debug, PartialEq)]
pub struct Step {
    pub step: u64,
    pub loss: f64,
    /// Bits per byte of the held-out sample, and the seconds it took.
    pub held_out: Option<f64>,
    pub held_out_seconds: f64,
    pub grad_norm: f64,
    pub skipped: bool,
    pub skip_reason: Option<String>,
    /// By parameter group.
    pub lr: BTreeMap<&'static str, f64>,
    pub targets_so_far: u64,
    pub seconds: f64,
    pub tokens_per_second: f64,
    pub resident_bytes: u64,
    pub bytes_sent: u64,
    pub bytes_least: u64,
    pub unix_time: f64,
}

#[derive(Clone, Debug, Default)]
pub struct Steps {
    /// In order, each step once.
    pub lines: Vec<Step>,
    /// Rows that were trained on, by language.
    pub rows: BTreeMap<String, u64>,
}

impl Steps {
    /// No file: no steps.
    ///
    /// # Errors
    /// When a line is damaged that is not the last: the last may be half-written, the run may be going on.
    pub fn read(file: &Path) -> anyhow::Result<Steps> {
        let mut by_step: BTreeMap<u64, (usize, Step)> = BTreeMap::new();
        let mut rows = BTreeMap::new();
        let n_lines = each_line(file, |number, metrics| {
            add_rows(&mut rows, &metrics);
            // A step that was taken again after an interruption counts as it was taken last.
            by_step.insert(metrics.step, (number, Step::of(metrics)));
        })?;
        if n_lines > by_step.len() {
            let last: BTreeSet<usize> = by_step.values().map(|(number, _)| *number).collect();
            rows.clear();
            each_line(file, |number, metrics| {
                if last.contains(&number) {
                    add_rows(&mut rows, &metrics);
                }
            })?;
        }
        Ok(Steps {
            lines: by_step.into_values().map(|(_, step)| step).collect(),
            rows,
        })
    }

    /// The median of the steps' seconds; `None` of no steps.
    pub fn median_seconds(&self) -> Option<f64> {
        let mut seconds: Vec<f64> = self.lines.iter().map(|step| step.seconds).collect();
        seconds.sort_by(f64::total_cmp);
        seconds.get(seconds.len() / 2).copied()
    }

    /// At most `most` rows: neighbours become one with their means, the losses' extremes, and the last one's step.
    pub fn table(&self, most: usize) -> Table {
        let groups: BTreeSet<&str> = self.lines.iter().flat_map(|step| step.lr.keys().copied()).collect();
        let mut columns: Vec<String> = COLUMNS.iter().map(|&name| name.to_owned()).collect();
        columns.extend(groups.iter().map(|group| format!("lr_{group}")));
        let together = self.lines.len().div_ceil(most).max(1);
        let row = |steps: &[Step]| -> Option<Vec<Value>> {
            let last = steps.last()?;
            let over = |of: &dyn Fn(&Step) -> f64| {
                let values = steps.iter().map(of).filter(|value| value.is_finite());
                crate::statistics::mean(values)
            };
            let most = |of: &dyn Fn(&Step) -> f64| steps.iter().map(of).fold(f64::NEG_INFINITY, f64::max);
            let least = |of: &dyn Fn(&Step) -> f64| steps.iter().map(of).fold(f64::INFINITY, f64::min);
            let seconds: f64 = steps.iter().map(|step| step.seconds).sum();
            let tokens: f64 = steps.iter().map(|step| step.tokens_per_second * step.seconds).sum();
            let mut row = vec![
                json!(last.step),
                json!(last.targets_so_far),
                json!(last.unix_time),
                json!(over(&|step| step.loss)),
                json!(least(&|step| step.loss)),
                json!(most(&|step| step.loss)),
                json!(steps.iter().rev().find_map(|step| step.held_out)),
                json!(over(&|step| step.grad_norm)),
                json!(steps.iter().filter(|step| step.skipped).count()),
                json!(seconds / steps.len() as f64),
                json!(tokens / seconds),
                json!(steps.iter().map(|step| step.resident_bytes).max()),
                json!(over(&|step| step.bytes_sent as f64) as u64),
                json!(over(&|step| step.bytes_least as f64) as u64),
            ];
            row.extend(groups.iter().map(|group| json!(last.lr.get(group))));
            Some(row)
        };
        Table {
            name: "steps",
            columns,
            rows: self.lines.chunks(together).filter_map(row).collect(),
        }
    }
}

const COLUMNS: [&str; 14] = [
    "step",
    "target_tokens",
    "unix_time",
    "loss",
    "loss_low",
    "loss_high",
    "held_out_bits_per_byte",
    "grad_norm",
    "skipped",
    "seconds",
    "tokens_per_second",
    "resident_bytes",
    "bytes_sent",
    "bytes_least",
];

impl Step {
    fn of(metrics: StepMetrics) -> Step {
        Step {
            step: metrics.step,
            loss: metrics.loss,
            held_out: metrics
                .held_out
                .map(|held_out| held_out.macro_bits_per_byte)
                .filter(|bits| bits.is_finite()),
            held_out_seconds: metrics.held_out.map_or(0.0, |held_out| held_out.seconds),
            grad_norm: metrics.grad_norm,
            skipped: metrics.skipped,
            skip_reason: metrics.skip_reason,
            lr: metrics.lr.iter().map(|(group, lr)| (group.name(), *lr)).collect(),
            targets_so_far: metrics.targets_so_far,
            seconds: metrics.seconds,
            tokens_per_second: metrics.tokens_per_second,
            resident_bytes: metrics.resident_bytes,
            bytes_sent: metrics.bytes_sent,
            bytes_least: metrics.bytes_least,
            unix_time: metrics.unix_time,
        }
    }

    /// When its work began.
    pub fn began(&self) -> f64 {
        self.unix_time - self.seconds - self.held_out_seconds
    }
}

fn add_rows(rows: &mut BTreeMap<String, u64>, metrics: &StepMetrics) {
    for (language, &count) in &metrics.languages {
        match rows.get_mut(language) {
            Some(rows) => *rows += u64::from(count),
            None => drop(rows.insert(language.clone(), u64::from(count))),
        }
    }
}

/// Calls `take` with each line and its number from 0; how many there were.
fn each_line(file: &Path, mut take: impl FnMut(usize, StepMetrics)) -> anyhow::Result<usize> {
    let Ok(opened) = File::open(file) else {
        return Ok(0);
    };
    let mut lines = BufReader::with_capacity(1 << 20, opened)
        .split(b'\n')
        .enumerate()
        .peekable();
    let mut taken = 0;
    while let Some((number, line)) = lines.next() {
        let line = line.with_context(|| format!("cannot read {}", file.display()))?;
        match serde_json::from_slice(&line) {
            Ok(metrics) => take(number, metrics),
            Err(_) if lines.peek().is_none() => break,
            Err(error) => {
                return Err(error).with_context(|| {
                    format!(
                        "{} line {} is no step; take the line out, or mend it",
                        file.display(),
                        number + 1
                    )
                });
            }
        }
        taken += 1;
    }
    Ok(taken)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn metrics(step: u64, loss: f64) -> StepMetrics {
        StepMetrics {
            step,
            steps: 60,
            loss,
            grad_norm: 1.0,
            skipped: !loss.is_finite(),
            skip_reason: None,
            held_out: None,
            lr: [(configs::Group::Lora, 1e-3)].into(),
            targets: 100,
            targets_so_far: 100 * (step + 1),
            seconds: 1.0,
            tokens_per_second: 100.0,
            resident_bytes: 1 << 30,
            bytes_sent: 0,
            bytes_least: 0,
            rows_digest: String::new(),
            languages: [("eng_Latn".to_owned(), step as u32 + 1)].into(),
            parts: BTreeMap::new(),
            unix_time: 1e9 + step as f64,
        }
    }

    fn line(metrics: &StepMetrics) -> String {
        serde_json::to_string(metrics).unwrap() + "\n"
    }

    #[test]
    fn a_step_taken_twice_counts_once_and_a_torn_last_line_is_no_error() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("metrics.jsonl");
        let torn = &line(&metrics(2, 1.0))[..40];
        let text = line(&metrics(0, 4.0)) + &line(&metrics(1, 3.0)) + &line(&metrics(1, 2.0)) + torn;
        fs::write(&file, text).unwrap();
        let steps = Steps::read(&file).unwrap();
        assert_eq!(steps.lines.iter().map(|step| step.loss).collect::<Vec<_>>(), [4.0, 2.0]);
        assert_eq!(
            steps.rows["eng_Latn"],
            1 + 2,
            "the step that was taken again is counted once"
        );
        fs::write(&file, "{}\n{}\n").unwrap();
        assert!(Steps::read(&file).is_err());
        assert!(Steps::read(&folder.path().join("none")).unwrap().lines.is_empty());
    }

    #[test]
    fn many_steps_become_few_rows_that_keep_the_extremes() {
        let lines: Vec<Step> = (0..1000)
            .map(|i| Step::of(metrics(i, if i == 500 { f64::NAN } else { i as f64 })))
            .collect();
        let steps = Steps {
            lines,
            rows: BTreeMap::new(),
        };
        let table = steps.table(100);
        assert_eq!(table.rows.len(), 100);
        let of = |name: &str| table.column(name).cloned().collect::<Vec<_>>();
        assert_eq!((&of("step")[0], &of("step")[99]), (&json!(9), &json!(999)));
        assert_eq!(
            (&of("loss_low")[50], &of("loss_high")[50]),
            (&json!(501.0), &json!(509.0))
        );
        assert_eq!((&of("loss")[50], &of("skipped")[50]), (&json!(505.0), &json!(1)));
        assert_eq!(steps.table(usize::MAX).rows.len(), 1000);
    }
}
