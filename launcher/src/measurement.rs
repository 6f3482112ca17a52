//! What `panglot` hands to `panglot-worker` for evaluations and generation, as one JSON file, and what comes back: the model to
//! open, the task, and the settings that results are kept under.

use std::path::{Path, PathBuf};

use anyhow::Context;
use configs::{Plan, Precision};
use serde::{Deserialize, Serialize};

use crate::files;

/// One order to a worker.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Order {
    pub model: ModelRef,
    pub precision: Precision,
    pub device: configs::Device,
    /// `None`: the machine's cores shared among local ranks.
    pub threads_per_rank: Option<usize>,
    /// Where ranks log; `None`: to standard error only.
    pub logs: Option<PathBuf>,
    pub task: Task,
    /// The result, written whole when all is done.
    pub out: PathBuf,
}

/// A model as weights and a tokenizer.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ModelRef {
    /// A Hugging Face folder.
    Folder(PathBuf),
    /// The newest checkpoint of a run, or that of a step.
    Checkpoint { plan: Box<Plan>, step: Option<u64> },
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Task {
    Generate(Generate),
    FewShot(Box<crate::fewshot::FewShot>),
    Nll(crate::evaluation::Nll),
}

/// Text to be written behind prompts.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Generate {
    pub requests: Vec<Request>,
    pub sampling: Sampling,
    /// Sequences at once. Changes no token.
    pub batch: usize,
    /// Whether text is told as it comes, as [`Event::Text`](crate::events::Event::Text).
    pub stream: bool,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Request {
    /// As the user names it; comes back with the result.
    pub id: serde_json::Value,
    pub prompt: String,
    /// Instead of the settings' own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_new_tokens: Option<usize>,
}

/// How a token is chosen, and when to stop.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Sampling {
    pub max_new_tokens: usize,
    /// 0: always the likeliest token.
    pub temperature: f64,
    /// Only among so many of the likeliest; 0: among all.
    pub top_k: usize,
    /// Only among the likeliest that together have this probability.
    pub top_p: f64,
    /// Logits of tokens that the prompt or the text holds are divided by it where positive, else multiplied (Keskar et al.
    /// 2019); 1: left alone.
    pub repetition_penalty: f64,
    /// Text ends before the first of these.
    pub stop: Vec<String>,
    pub seed: u64,
    /// Whether prompts get what the tokenizer puts around a text, and special tokens in them are read as such.
    pub special_tokens: bool,
    /// Whether the model's own end token ends nothing.
    #[serde(default)]
    pub ignore_end: bool,
}

impl Default for Sampling {
    fn default() -> Sampling {
        Sampling {
            max_new_tokens: 128,
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            repetition_penalty: 1.0,
            stop: Vec::new(),
            seed: 1,
            special_tokens: true,
            ignore_end: false,
        }
    }
}

/// Why a text ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Finish {
    /// By the model's own end token.
    End,
    /// By a stop string.
    Stop,
    /// All the tokens it was given.
    Length,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Generated {
    pub id: serde_json::Value,
    pub prompt: String,
    pub text: String,
    pub tokens: Vec<u32>,
    pub prompt_tokens: usize,
    pub finish: Finish,
}

/// What generation leaves beside its texts.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct GenerationResult {
    pub made_by: MadeBy,
    pub texts: Vec<Generated>,
    pub new_tokens: u64,
    pub seconds: f64,
}

/// By what a result was made: enough to tell whether two can be compared.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MadeBy {
    pub panglot: String,
    /// The protocol's name and settings that change results.
    pub protocol: String,
    pub model: String,
    /// Over the weights, as they are stored.
    pub model_digest: String,
    pub tokenizer_digest: String,
    /// Over the texts or files that were read.
    pub data_digest: String,
    pub precision: String,
}

/// Parts of a long evaluation, kept until all is done, so that an interruption costs one part. They lie beside the result,
/// in a folder under a fingerprint of everything that they follow from.
pub struct Kept {
    folder: PathBuf,
}

impl Kept {
    /// Of the result in `out`. Parts under other fingerprints are left alone: they may be another's.
    pub fn open(out: &Path, fingerprint: &str) -> Kept {
        let short = fingerprint.get(..16).unwrap_or(fingerprint);
        Kept {
            folder: files::beside(out, &format!("{short}.parts")),
        }
    }

    /// `key` is a plain file name. A part that cannot be read is made again.
    pub fn get<T: serde::de::DeserializeOwned>(&self, key: &str) -> Option<T> {
        files::read_json(&self.file(key)).ok()
    }

    pub fn has(&self, key: &str) -> bool {
        self.file(key).is_file()
    }

    pub fn put(&self, key: &str, part: &impl Serialize) -> anyhow::Result<()> {
        files::write_json(&self.file(key), part).context("keeping a part of the evaluation")
    }

    /// Nothing is kept any more; the result is written.
    pub fn clear(&self) -> anyhow::Result<()> {
        files::remove_folder(&self.folder)
    }

    fn file(&self, key: &str) -> PathBuf {
        self.folder.join(format!("{key}.json"))
    }
}

/// BLAKE3 over the JSON of what a result follows from.
pub fn fingerprint(of: &impl Serialize) -> String {
    let text = serde_json::to_vec(of).expect("plain data");
    blake3::hash(&text).to_hex().to_string()
}
