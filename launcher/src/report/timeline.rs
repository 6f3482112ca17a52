//! A run by the clock: attempts, checkpoints, measurements, stalls; and what its time went to. From `history.jsonl`, the
//! steps, and what job scripts noted of attempts.

use std::fs;
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

use super::steps::{Step, Steps};
use super::table::Table;
use crate::attempts::{Attempt, Attempts};
use crate::history::{Happening, What};
use crate::text;

/// A step is a stall if it takes so many times the median,
const SLOW: f64 = 3.0;
/// and so many seconds more.
const SLOW_SECONDS: f64 = 1.0;
/// Of runs without a history: silence of so many median steps, and of so many seconds, is another attempt.
const SILENT_STEPS: f64 = 20.0;
const SILENT_SECONDS: f64 = 60.0;

/// The table, and how many attempts are in it.
pub fn timeline(run: &Path, steps: &Steps, history: &[Happening]) -> (Table, usize) {
    let mut rows: Vec<Row> = Vec::new();
    let attempts = attempts(run, steps, history);
    let n_attempts = attempts.len();
    rows.extend(attempts);
    rows.extend(history.iter().filter_map(of_history));
    rows.extend(checkpoints_without_history(run, history));
    rows.extend(stalls(steps));
    rows.sort_by(|a, b| a.begin.total_cmp(&b.begin));
    let mut table = Table::new("timeline", &["kind", "begin", "end", "step", "text"]);
    for row in rows {
        table.push(vec![
            json!(row.kind),
            json!(row.begin),
            json!(row.end),
            json!(row.step),
            json!(row.text),
        ]);
    }
    (table, n_attempts)
}

/// Something between two moments, seconds since 1970.
struct Row {
    kind: &'static str,
    begin: f64,
    end: f64,
    step: Option<u64>,
    text: String,
}

/// When each attempt began.
fn beginnings(steps: &Steps, history: &[Happening]) -> Vec<f64> {
    let noted = history.iter().filter(|line| matches!(line.what, What::Began { .. }));
    let mut noted: Vec<f64> = noted.map(|line| line.unix_time).collect();
    noted.sort_by(f64::total_cmp);
    if !noted.is_empty() {
        return noted;
    }
    let silence = SILENT_SECONDS.max(SILENT_STEPS * steps.median_seconds().unwrap_or(0.0));
    let first = steps.lines.first().map(Step::began);
    let pairs = steps.lines.windows(2);
    let later = pairs
        .filter(|pair| pair[1].began() - pair[0].unix_time > silence)
        .map(|pair| pair[1].began());
    first.into_iter().chain(later).collect()
}

fn attempts(run: &Path, steps: &Steps, history: &[Happening]) -> Vec<Row> {
    let begins = beginnings(steps, history);
    let reported = Attempts::of(run).all();
    let attempt = |(at, &begin): (usize, &f64)| {
        let next = begins.get(at + 1).copied().unwrap_or(f64::INFINITY);
        let within = |time: f64| (begin..next).contains(&time);
        let lines: Vec<&Happening> = history.iter().filter(|line| within(line.unix_time)).collect();
        let kept: Vec<&Step> = steps.lines.iter().filter(|step| within(step.unix_time)).collect();
        let signs = lines
            .iter()
            .map(|line| line.unix_time)
            .chain(kept.iter().map(|step| step.unix_time));
        let told = reported.iter().find(|attempt| within(attempt.unix_time as f64));
        let ended = lines.iter().find_map(|line| match line.what {
            What::Ended { step } => Some((line.unix_time, step)),
            _ => None,
        });
        // Of one that was killed nobody knows when, but by its last sign.
        let end = match (ended, told) {
            (Some((time, _)), _) => time,
            (None, Some(told)) => told.unix_time as f64,
            (None, None) => signs.fold(begin, f64::max),
        };
        let from = lines.iter().find_map(|line| match &line.what {
            What::Began { step, environment } => Some((*step, environment)),
            _ => None,
        });
        let mut text = format!("attempt {}", at + 1);
        if let Some((step, environment)) = from {
            let ranks = text::counted(environment.ranks, "rank");
            text += &format!(
                " from step {}, {ranks}, first on {}",
                text::count(step),
                environment.host
            );
        }
        if let (Some(first), Some(last)) = (kept.first(), kept.last()) {
            text += &format!(
                "; steps {} to {} stand",
                text::count(first.step),
                text::count(last.step)
            );
        }
        text += &match (ended, told) {
            (Some((_, step)), _) => format!("; ended by itself after step {}", text::count(step)),
            (None, Some(Attempt { code, .. })) => format!("; ended with exit code {code}"),
            (None, None) if next.is_finite() => "; ended without a word: killed, or lost".to_owned(),
            (None, None) => "; no end is noted: it may be going on".to_owned(),
        };
        Row {
            kind: "attempt",
            begin,
            end,
            step: from.map(|(step, _)| step).or(kept.first().map(|step| step.step)),
            text,
        }
    };
    begins.iter().enumerate().map(attempt).collect()
}

fn of_history(line: &Happening) -> Option<Row> {
    let end = line.unix_time;
    match &line.what {
        What::Saved {
            step,
            bytes,
            files,
            seconds,
            stall,
        } => Some(Row {
            kind: "checkpoint",
            begin: end - seconds,
            end,
            step: Some(*step),
            text: format!(
                "step {}: {} in {}, on disk after {seconds:.2} s, of which training waited {stall:.2} s",
                text::count(*step),
                text::bytes(*bytes),
                text::counted(*files, "file"),
            ),
        }),
        What::NotSaved { step, why } => Some(Row {
            kind: "not saved",
            begin: end,
            end,
            step: Some(*step),
            text: format!(
                "the checkpoint of step {} could not be written: {why}",
                text::count(*step)
            ),
        }),
        What::Differed(dispute) => Some(Row {
            kind: "ranks differ",
            begin: end,
            end,
            step: Some(dispute.step),
            text: format!(
                "ranks began step {} with different master weights, on {}",
                text::count(dispute.step),
                dispute.nodes.join(", ")
            ),
        }),
        What::Settled { step, text } => Some(Row {
            kind: "ranks differ",
            begin: end,
            end,
            step: Some(*step),
            text: text.clone(),
        }),
        What::Began { .. } | What::Ended { .. } => None,
    }
}

/// Checkpoints that are there and that no history tells of, by their manifests.
fn checkpoints_without_history(run: &Path, history: &[Happening]) -> Vec<Row> {
    let known = |step: u64| {
        history
            .iter()
            .any(|line| matches!(line.what, What::Saved { step: of, .. } if of == step))
    };
    let entries = fs::read_dir(run.join("checkpoints")).into_iter().flatten().flatten();
    let row = |entry: fs::DirEntry| -> Option<Row> {
        let step: u64 = entry.file_name().to_str()?.strip_prefix("step-")?.parse().ok()?;
        if known(step) {
            return None;
        }
        let manifest: Value = crate::files::read_json(&entry.path().join("manifest.json")).ok()?;
        let time = manifest["unix_time"].as_f64()?;
        Some(Row {
            kind: "checkpoint",
            begin: time,
            end: time,
            step: Some(step),
            text: format!("step {} is kept", text::count(step)),
        })
    };
    entries.filter_map(row).collect()
}

/// Measurements, skipped steps and slow ones.
fn stalls(steps: &Steps) -> Vec<Row> {
    let median = steps.median_seconds().unwrap_or(0.0);
    let mut rows = Vec::new();
    for step in &steps.lines {
        let number = text::count(step.step);
        if let Some(bits) = step.held_out {
            rows.push(Row {
                kind: "held-out text",
                begin: step.unix_time - step.held_out_seconds,
                end: step.unix_time,
                step: Some(step.step),
                text: format!(
                    "after {}: {bits:.4} bits per byte, measured in {:.1} s",
                    text::counted(step.step as usize + 1, "step"),
                    step.held_out_seconds
                ),
            });
        }
        let stall = |kind, text| Row {
            kind,
            begin: step.began(),
            end: step.unix_time - step.held_out_seconds,
            step: Some(step.step),
            text,
        };
        if step.skipped {
            let why = step.skip_reason.as_deref().unwrap_or("its numbers were not finite");
            rows.push(stall("skipped step", format!("step {number} was skipped: {why}")));
        }
        if step.seconds > SLOW * median && step.seconds > median + SLOW_SECONDS {
            let text = format!("step {number} took {:.1} s, the median is {median:.2} s", step.seconds);
            rows.push(stall("slow step", text));
        }
    }
    rows
}

/// What the time from the first step's beginning to the last one's end went to, in seconds.
pub fn where_time_went(steps: &Steps, history: &[Happening]) -> Table {
    let mut table = Table::new("time", &["what", "seconds", "share", "more"]);
    let (Some(first), Some(last)) = (steps.lines.first(), steps.lines.last()) else {
        return table;
    };
    let begins = beginnings(steps, history);
    let wall = last.unix_time - first.began();
    let in_steps: f64 = steps.lines.iter().map(|step| step.seconds).sum();
    let measuring: f64 = steps.lines.iter().map(|step| step.held_out_seconds).sum();
    let (mut starting_again, mut restarts) = (0.0, 0);
    for pair in steps.lines.windows(2) {
        let (from, to) = (pair[0].unix_time, pair[1].began());
        let between = begins.iter().filter(|&&begin| from < begin && begin <= to).count();
        if between > 0 {
            starting_again += (to - from - waited(history, from, to)).max(0.0);
            restarts += between;
        }
    }
    let waiting = waited(history, first.began(), last.unix_time);
    let other = wall - in_steps - measuring - starting_again - waiting;
    let parts = [
        (
            "training steps",
            in_steps,
            format!("{} of them", text::count(steps.lines.len())),
        ),
        ("measuring held-out text", measuring, String::new()),
        (
            "waiting for checkpoints",
            waiting,
            "what training waited, not what writing took".to_owned(),
        ),
        (
            "starting again",
            starting_again,
            format!(
                "{}: steps taken twice, the queue, loading",
                text::counted(restarts, "restart")
            ),
        ),
        (
            "between steps",
            other,
            "rows, records, and what nobody measured".to_owned(),
        ),
    ];
    for (what, seconds, more) in parts {
        let seconds = seconds.max(0.0);
        table.push(vec![
            json!(what),
            json!(seconds),
            json!(if wall > 0.0 { seconds / wall } else { 0.0 }),
            json!(match more.is_empty() {
                true => text::duration(Duration::from_secs_f64(seconds)),
                false => format!("{}; {more}", text::duration(Duration::from_secs_f64(seconds))),
            }),
        ]);
    }
    table
}

/// What training waited for the checkpoints that were on disk between two moments.
fn waited(history: &[Happening], from: f64, to: f64) -> f64 {
    let stall = |line: &Happening| match line.what {
        What::Saved { stall, .. } if (from..=to).contains(&line.unix_time) => stall,
        _ => 0.0,
    };
    history.iter().map(stall).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::history::Environment;

    fn step(step: u64, unix_time: f64, seconds: f64) -> Step {
        Step {
            step,
            loss: 1.0,
            held_out: (step == 1).then_some(2.5),
            held_out_seconds: if step == 1 { 3.0 } else { 0.0 },
            grad_norm: 1.0,
            skipped: step == 2,
            skip_reason: None,
            lr: [("lora", 1e-3)].into(),
            targets_so_far: 10,
            seconds,
            tokens_per_second: 10.0,
            resident_bytes: 1,
            bytes_sent: 0,
            bytes_least: 0,
            unix_time,
        }
    }

    fn began(unix_time: f64, step: u64) -> Happening {
        Happening {
            unix_time,
            what: What::Began {
                step,
                environment: Environment {
                    host: "n1".to_owned(),
                    ranks: 2,
                    ..Environment::default()
                },
            },
        }
    }

    fn saved(unix_time: f64, step: u64) -> Happening {
        Happening {
            unix_time,
            what: What::Saved {
                step,
                bytes: 1 << 20,
                files: 2,
                seconds: 1.5,
                stall: 0.5,
            },
        }
    }

    /// Two attempts: the first is killed after 1,020 s, steps 0 and 1 stand; the second takes 2 to 4.
    fn two_attempts() -> (Steps, Vec<Happening>) {
        let lines = vec![
            step(0, 1002.0, 2.0),
            step(1, 1007.0, 2.0),
            step(2, 1102.0, 2.0),
            step(3, 1104.0, 2.0),
            step(4, 1114.0, 9.5),
        ];
        let steps = Steps {
            lines,
            ..Steps::default()
        };
        let ended = Happening {
            unix_time: 1115.0,
            what: What::Ended { step: 5 },
        };
        let history = vec![
            began(1000.0, 0),
            saved(1009.0, 2),
            began(1100.0, 2),
            saved(1106.0, 4),
            ended,
        ];
        (steps, history)
    }

    #[test]
    fn a_killed_attempt_and_the_next_are_told_apart() {
        let (steps, history) = two_attempts();
        let folder = tempfile::tempdir().unwrap();
        let (table, attempts) = timeline(folder.path(), &steps, &history);
        assert_eq!(attempts, 2);
        let kinds: Vec<&str> = table.column("kind").filter_map(Value::as_str).collect();
        let expected = [
            "attempt",
            "held-out text",
            "checkpoint",
            "attempt",
            "skipped step",
            "checkpoint",
            "slow step",
        ];
        assert_eq!(kinds, expected);
        let texts: Vec<&str> = table.column("text").filter_map(Value::as_str).collect();
        assert_eq!(
            texts[0],
            "attempt 1 from step 0, 2 ranks, first on n1; steps 0 to 1 stand; ended without a word: killed, or lost"
        );
        assert!(
            texts[3].ends_with("steps 2 to 4 stand; ended by itself after step 5"),
            "{}",
            texts[3]
        );
        assert_eq!(texts[6], "step 4 took 9.5 s, the median is 2.00 s");
        assert_eq!(table.rows[0][2], json!(1009.0), "its last sign is a checkpoint");
    }

    #[test]
    fn the_time_of_a_run_adds_up() {
        let (steps, history) = two_attempts();
        let table = where_time_went(&steps, &history);
        let seconds: Vec<f64> = table.column("seconds").filter_map(Value::as_f64).collect();
        assert_eq!(seconds, [17.5, 3.0, 1.0, 92.5, 0.0]);
        assert_eq!(
            seconds.iter().sum::<f64>(),
            114.0,
            "from the first step's beginning to the last one's end"
        );
        assert!(where_time_went(&Steps::default(), &[]).rows.is_empty());
    }

    #[test]
    fn without_a_history_silence_parts_attempts() {
        let (steps, _) = two_attempts();
        let folder = tempfile::tempdir().unwrap();
        let (table, attempts) = timeline(folder.path(), &steps, &[]);
        assert_eq!(attempts, 2);
        assert_eq!(table.rows[0][1], json!(1000.0));
    }
}
