//! What a worker tells the launcher: one JSON object a line on its standard output, from rank 0 only.
//! Everything meant for people goes to standard error and to the run's logs.

use std::io::Write;

use serde::{Deserialize, Serialize};

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// A new part of the work begins; `name` reads like "loading the base model".
    Phase { name: String },
    /// How far the current phase is.
    Progress { done: u64, total: u64, unit: String },
    /// One optimizer step was taken (or skipped).
    Step(StepMetrics),
    /// A sentence the user should see, such as what was resumed from where.
    Note { text: String },
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
    pub loss: f64,
    /// Global L2 norm of the gradient before clipping.
    pub grad_norm: f64,
    /// The update was left out on every rank because the loss or the gradient was not finite.
    pub skipped: bool,
    pub lr_lora: f64,
    pub lr_embeddings: f64,
    /// Target tokens of the global batch.
    pub targets: u64,
    /// Target tokens since the run's first step.
    pub targets_so_far: u64,
    pub seconds: f64,
    /// Row tokens of the global batch per second of this step.
    pub tokens_per_second: f64,
    /// Largest resident memory over ranks, bytes.
    pub resident_bytes: u64,
    /// Digest of the global batch's rows, to compare runs by eye.
    pub rows_digest: String,
    /// Rows by language in this step's global batch.
    pub languages: std::collections::BTreeMap<String, u32>,
    pub unix_time: f64,
}

impl Event {
    /// Writes the event as one line and flushes it, so that a reader sees it now.
    pub fn emit(&self) {
        let line = serde_json::to_string(self).expect("events are plain data");
        let mut out = std::io::stdout().lock();
        // A closed pipe means that nobody listens any more; the work goes on.
        let _ = writeln!(out, "{line}").and_then(|()| out.flush());
    }
}
