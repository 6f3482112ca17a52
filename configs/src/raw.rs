//! The config as typed. Mirrors the YAML section by section; unknown keys are errors. What may be left out is an `Option`
//! whose meaning of `None` stands beside it; no other default exists. Sections that run as they are typed are the plan's
//! own. No rule is checked here, see `check.rs`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::error::{ConfigError, sentence};
use crate::plan::{
    Algorithm, Device, Evaluation, FrozenPrecision, Gelu, Group, Guard, Launch, Lora, OnUnreadable, OneDocument,
    Precision, Recomputation, Residual, Sampling, Schedule, Vocabulary, WordRules, maybe_whole,
};
use crate::planner::hardware;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Raw {
    pub name: String,
    pub seed: u64,
    pub folders: Folders,
    pub corpus: Corpus,
    pub model: Model,
    /// None: the base model's own vocabulary is kept.
    pub vocabulary: Option<Vocabulary>,
    pub sampling: Sampling,
    pub train: Train,
    pub optimizer: Optimizer,
    pub checkpoint: Checkpoint,
    pub evaluation: Evaluation,
    pub launch: Launch,
    /// None: everything in it is off.
    pub debug: Option<Debug>,
    /// None: `h100` where train.device is cuda, else `cpu`; in a run, the memory that the device has.
    pub hardware: Option<hardware::Choice>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Folders {
    /// Holds `corpus`, `base_model`, `vocabulary` and `tokens`, unless a line below puts one elsewhere.
    pub prepared: PathBuf,
    pub run: PathBuf,
    pub corpus: Option<PathBuf>,
    pub vocabulary: Option<PathBuf>,
    pub tokens: Option<PathBuf>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Corpus {
    pub sources: Vec<Source>,
    pub held_out: f64,
    /// None: as many as the share gives.
    pub held_out_most: Option<u64>,
    /// None: no; a line may stand in many documents.
    pub deduplicate_lines: Option<bool>,
    /// None: no; characters stay as they are spelled.
    pub nfc: Option<bool>,
    /// None: only equal texts are duplicates.
    pub near_duplicates: Option<f64>,
    /// None: nothing is compared with evaluation texts.
    pub contamination: Option<Contamination>,
    /// None: the first unreadable place ends the import.
    pub on_unreadable: Option<OnUnreadable>,
    /// None: nothing is put before a document.
    pub document_start: Option<String>,
    /// None: nothing is put after a document.
    pub document_end: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Contamination {
    pub files: Vec<PathBuf>,
    /// None: 13, as GPT-3's authors took.
    pub words: Option<usize>,
    /// None: 50.
    pub characters: Option<usize>,
}

/// Which keys a kind needs is checked in `check.rs`, as with `Model`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Source {
    pub name: String,
    pub kind: SourceKind,
    /// None: unknown; the manifest says so too.
    pub licence: Option<String>,
    pub path: Option<PathBuf>,
    pub paths: Option<Vec<PathBuf>>,
    pub language: Option<String>,
    pub language_column: Option<String>,
    /// None: `text`.
    pub text_column: Option<String>,
    /// None: a line.
    pub one_document: Option<OneDocument>,
    pub source_path: Option<PathBuf>,
    pub target_path: Option<PathBuf>,
    pub languages: Option<Vec<String>>,
    pub template: Option<String>,
    /// None: MultiAlpaca's.
    pub prompt: Option<String>,
}

#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
pub enum SourceKind {
    Udhr,
    Folders,
    Files,
    Parallel,
    Instructions,
    Megatron,
}

/// Which keys a kind needs is checked in `check.rs`: the parser's own words for a tagged union help nobody.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Model {
    pub kind: ModelKind,
    pub path: Option<PathBuf>,
    /// None: sizes are known once the folder is there. With kind: folder only.
    pub published: Option<String>,
    pub shape: Option<Shape>,
    pub init_std: Option<f64>,
    pub tokenizer: Option<Pieces>,
}

/// Which keys a family needs is checked in `check.rs`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Shape {
    /// None: `llama`.
    pub family: Option<FamilyName>,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    pub max_position_embeddings: usize,
    pub tie_word_embeddings: bool,
    /// This and the next two are needed with family: llama, and only there.
    pub num_key_value_heads: Option<usize>,
    pub rms_norm_eps: Option<f64>,
    pub rope_theta: Option<f64>,
    /// This and the next are needed with family: gpt2, and only there.
    pub layer_norm_epsilon: Option<f64>,
    pub activation_function: Option<Gelu>,
}

#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
pub enum FamilyName {
    #[default]
    Llama,
    Gpt2,
}

#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
pub enum ModelKind {
    Folder,
    Gguf,
    Scratch,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pieces {
    pub kind: PiecesKind,
    /// Needed but with kind: train.
    pub path: Option<PathBuf>,
    /// This and the next two are needed with kind: train, and only there.
    pub algorithm: Option<Algorithm>,
    pub pieces: Option<usize>,
    pub alpha: Option<f64>,
    /// None: no floor. This and the next two with kind: train only.
    #[serde(default, deserialize_with = "maybe_whole")]
    pub floor_bytes: Option<u64>,
    /// None: no cap.
    #[serde(default, deserialize_with = "maybe_whole")]
    pub cap_bytes: Option<u64>,
    /// None: SentencePiece's rules.
    pub words: Option<WordRules>,
}

#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
pub enum PiecesKind {
    Folder,
    LlamaTokenizerJs,
    Train,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Train {
    pub steps: u64,
    pub sequence_length: usize,
    pub rows_per_step: usize,
    pub micro_rows: usize,
    pub precision: Precision,
    /// None: as `precision`.
    pub frozen_precision: Option<FrozenPrecision>,
    /// None: `cpu`.
    pub device: Option<Device>,
    pub recompute: Recomputation,
    /// None: `compute`.
    pub residual: Option<Residual>,
    pub zero: u8,
    /// None: every rank keeps all frozen weights.
    pub shard_frozen: Option<bool>,
    /// None: optimizer state lies where the model does.
    pub offload_optimizer: Option<bool>,
    /// None: f32.
    pub reduce: Option<Precision>,
    /// None: a step is skipped only where its loss or gradient is not finite.
    pub guard: Option<Guard>,
    /// None: every 100 steps.
    pub check_ranks_every: Option<u64>,
    /// None: the body has no LoRA and stays as it is.
    pub lora: Option<Lora>,
    /// Names of [`FullModule`](crate::FullModule), or `all`.
    pub full: Vec<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Optimizer {
    /// Needed where `train.lora` is, and only there.
    pub lr_lora: Option<f64>,
    /// Of embed_tokens and lm_head; needed where `train.full` names one of them, and only there.
    pub lr_embeddings: Option<f64>,
    /// Of the layers' matrices and of norms; needed where `train.full` names some, and only there.
    pub lr_body: Option<f64>,
    /// None: every group goes by the lines above and `weight_decay`, but norms do not decay.
    pub groups: Option<BTreeMap<Group, GroupRates>>,
    pub beta1: f64,
    pub beta2: f64,
    pub epsilon: f64,
    pub weight_decay: f64,
    /// None: gradients are not clipped.
    pub max_grad_norm: Option<f64>,
    pub warmup_steps: u64,
    pub schedule: Schedule,
    /// None: the schedule ends at 0.
    pub final_lr_share: Option<f64>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Checkpoint {
    pub every_steps: u64,
    /// None: by steps alone.
    pub every_minutes: Option<f64>,
    /// None: training never waits for a save under way but to begin the next.
    pub lose_at_most: Option<u64>,
    pub keep: usize,
    /// None: only the newest are kept.
    pub keep_every: Option<u64>,
    /// None: 3.
    pub failures_in_a_row: Option<u32>,
    /// None: 60.
    pub safety_seconds: Option<f64>,
    /// None: a run goes on with the settings that it began with.
    pub allow_changed: Option<Vec<String>>,
}

/// What one group has of its own.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GroupRates {
    pub lr: Option<f64>,
    pub weight_decay: Option<f64>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Debug {
    pub check_ranks_equal: Option<bool>,
    pub overfit_one_batch: Option<bool>,
    pub timeline: Option<bool>,
    pub deterministic: Option<bool>,
    /// None: training is training. So with the two below.
    pub verify_resume: Option<u64>,
    pub stop_after: Option<u64>,
    pub die_after: Option<u64>,
}

pub fn read(file: &Path, overrides: &[String]) -> Result<Raw, ConfigError> {
    let yaml = std::fs::read_to_string(file).map_err(|source| ConfigError::Read {
        file: file.to_owned(),
        source,
    })?;
    let mut raw = serde_saphyr::from_str(&yaml).map_err(|error| ConfigError::shape(file, &yaml, &error))?;
    if overrides.is_empty() {
        return Ok(raw);
    }
    let mut tree: serde_json::Value =
        serde_saphyr::from_str(&yaml).map_err(|error| ConfigError::shape(file, &yaml, &error))?;
    for text in overrides {
        // One at a time, so that a complaint is about this one.
        raw = put(&mut tree, text)
            .and_then(|()| {
                let yaml = serde_saphyr::to_string(&tree).map_err(|error| error.to_string())?;
                serde_saphyr::from_str(&yaml).map_err(|error| sentence(&error))
            })
            .map_err(|sentence| ConfigError::Override {
                text: text.clone(),
                sentence,
            })?;
    }
    Ok(raw)
}

/// Puts one `section.key=value` into the tree; the value is YAML.
fn put(tree: &mut serde_json::Value, text: &str) -> Result<(), String> {
    let (path, value) = text
        .split_once('=')
        .ok_or("an override reads section.key=value, such as train.steps=5")?;
    let value = serde_saphyr::from_str(value).map_err(|error| sentence(&error))?;
    let (sections, key) = path
        .rsplit_once('.')
        .map_or((None, path), |(sections, key)| (Some(sections), key));
    let mut place = tree;
    for section in sections.into_iter().flat_map(|sections| sections.split('.')) {
        let entry = match place {
            serde_json::Value::Array(list) => element(list, section)?,
            place => place
                .as_object_mut()
                .ok_or_else(|| format!("`{section}` is inside a plain value"))?
                .entry(section)
                .or_insert(serde_json::Value::Null),
        };
        if entry.is_null() {
            *entry = serde_json::Value::Object(serde_json::Map::new());
        }
        place = entry;
    }
    let object = place
        .as_object_mut()
        .ok_or_else(|| format!("`{key}` is inside a plain value"))?;
    object.insert(key.to_owned(), value);
    Ok(())
}

/// `sources.0` is the first of the list.
fn element<'a>(list: &'a mut [serde_json::Value], place: &str) -> Result<&'a mut serde_json::Value, String> {
    let length = list.len();
    let index = place.parse().ok().filter(|index: &usize| *index < length);
    let index = index.ok_or_else(|| {
        format!("`{place}` is no place in a list of {length}; count from 0, such as corpus.sources.0.path=texts")
    })?;
    Ok(&mut list[index])
}
