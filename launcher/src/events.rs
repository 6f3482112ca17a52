//! What a worker tells the launcher: one JSON object a line on its standard output, from rank 0 where nothing else is said.
//! Everything meant for people goes to standard error and to the run's logs.

use std::collections::BTreeMap;
use std::io::Write;
use std::os::unix::net::UnixDatagram;
use std::path::Path;

use configs::Group;
use serde::{Deserialize, Deserializer, Serialize};

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// A new part of the work begins; `name` reads like "loading the base model".
    Phase { name: String },
    /// How far the current phase is.
    Progress { done: u64, total: u64, unit: String },
    /// One optimizer step was taken (or skipped).
    Step(StepMetrics),
    /// More of the text that is written behind prompt `index`, and whether it was the last of it.
    Text { index: usize, text: String, ended: bool },
    /// A sentence the user should see, such as what was resumed from where.
    Note { text: String },
    /// The job cannot go on: who is at fault, and the code that its ranks leave with. From whichever rank noticed.
    Lost { code: i32, text: String },
    /// This rank is alive; from every rank, where whoever started it asks for it.
    Beat,
    /// This rank's work is done; it gives no more signs of life.
    Leaves,
    /// The command finished; `result` is what `--json` prints.
    Done { result: serde_json::Value },
}

/// One line of `metrics.jsonl`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StepMetrics {
    /// 0-based; `steps` in all.
    pub step: u64,
    pub steps: u64,
    /// Nats per target token, mean over the global batch, before the update.
    #[serde(deserialize_with = "number_or_nan")]
    pub loss: f64,
    /// Global L2 norm of the gradient before clipping.
    #[serde(deserialize_with = "number_or_nan")]
    pub grad_norm: f64,
    /// The update was left out on every rank.
    pub skipped: bool,
    /// Why, if it was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub skip_reason: Option<String>,
    /// Held-out text, where it was measured after this step.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub held_out: Option<HeldOut>,
    /// Learning rate by parameter group, of those that train.
    pub lr: BTreeMap<Group, f64>,
    /// Target tokens of the global batch.
    pub targets: u64,
    /// Target tokens since the run's first step.
    pub targets_so_far: u64,
    pub seconds: f64,
    /// Row tokens of the global batch per second of this step.
    pub tokens_per_second: f64,
    /// Largest resident memory over ranks, bytes.
    pub resident_bytes: u64,
    /// Bytes handed to collectives for other ranks in this step, the most of any rank.
    #[serde(default)]
    pub bytes_sent: u64,
    /// The least there is with whole gradients (ZeRO's lower bound); rows of the embedding's may be fewer still.
    #[serde(default)]
    pub bytes_least: u64,
    /// Digest of the global batch's rows, to compare runs by eye.
    pub rows_digest: String,
    /// Rows by language in this step's global batch.
    pub languages: BTreeMap<String, u32>,
    /// Rows by `source/language`, where the text has several sources.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub parts: BTreeMap<String, u32>,
    pub unix_time: f64,
}

/// JSON has no NaN and no infinity: they are written as null, and a step that was skipped because of one must still be read.
fn number_or_nan<'de, D: Deserializer<'de>>(from: D) -> Result<f64, D::Error> {
    Ok(Option::deserialize(from)?.unwrap_or(f64::NAN))
}

/// A fixed sample of held-out text, measured while training.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct HeldOut {
    /// Mean over languages, each counting once.
    #[serde(deserialize_with = "number_or_nan")]
    pub macro_bits_per_byte: f64,
    pub languages: usize,
    pub tokens: u64,
    pub seconds: f64,
}

impl Event {
    /// Tells it to a launcher on this host, whose socket is named `ear`. Whether it could.
    pub fn tell(&self, ear: &Path) -> bool {
        let line = serde_json::to_vec(self).expect("events are plain data");
        let sent = UnixDatagram::unbound().and_then(|socket| {
            socket.set_nonblocking(true)?;
            socket.send_to(&line, ear)
        });
        sent.is_ok()
    }

    /// Writes the event as one line and flushes it, so that a reader sees it now.
    pub fn emit(&self) {
        let line = serde_json::to_string(self).expect("events are plain data");
        let mut out = std::io::stdout().lock();
        // A closed pipe means that nobody listens any more; the work goes on.
        let _ = writeln!(out, "{line}").and_then(|()| out.flush());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(loss: f64) -> StepMetrics {
        StepMetrics {
            step: 3,
            steps: 20,
            loss,
            grad_norm: 0.1 + 0.2,
            skipped: !loss.is_finite(),
            skip_reason: None,
            held_out: None,
            lr: [(Group::Lora, 1e-3), (Group::Embeddings, 2e-3)].into(),
            targets: 4080,
            targets_so_far: 16_320,
            seconds: 1.5,
            tokens_per_second: 2730.0,
            resident_bytes: 1 << 31,
            bytes_sent: 1000,
            bytes_least: 990,
            rows_digest: "ab12".to_owned(),
            languages: [("eng_Latn".to_owned(), 16)].into(),
            parts: [("web/eng_Latn".to_owned(), 16)].into(),
            unix_time: 1.7e9,
        }
    }

    #[test]
    fn events_survive_their_line() {
        for event in [
            Event::Phase {
                name: "loading the base model".to_owned(),
            },
            Event::Progress {
                done: 3,
                total: 10,
                unit: "tensors".to_owned(),
            },
            Event::Step(step(2.345_678_901_234_567)),
            Event::Note {
                text: "two\nlines and \"quotes\"".to_owned(),
            },
            Event::Done {
                result: serde_json::json!({ "steps": 20 }),
            },
        ] {
            let line = serde_json::to_string(&event).unwrap();
            assert!(!line.contains('\n'), "one event, one line: {line}");
            assert_eq!(serde_json::from_str::<Event>(&line).unwrap(), event);
        }
    }

    #[test]
    fn a_step_whose_loss_is_no_number_is_read_too() {
        let line = serde_json::to_string(&Event::Step(step(f64::NAN))).unwrap();
        let Event::Step(read) = serde_json::from_str(&line).unwrap() else {
            panic!("{line}")
        };
        assert!(read.loss.is_nan() && read.skipped);
    }
}
