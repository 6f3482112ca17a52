//! A model to measure or to write with: its weights for computing only, its tokenizer, and what it is, by digests. From a Hugging
//! Face folder, or from a run's checkpoint as its export would have it.

use std::collections::BTreeSet;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use configs::{Plan, Precision, Recompute, Residual};
use corpus::Tokenizer;
use launcher::checkpoint::differences;
use launcher::checkpoint::manifest::step_name;
use launcher::measurement::{MadeBy, ModelRef};
use serde_json::Value;
use sharding::{Comm, Stage};
use tch::{Device, Kind};

use crate::evaluate::kind;
use crate::hf::folder::GENERATION_CONFIG;
use crate::hf::{ModelConfig, Weights};
use crate::model::{Layer, Model, Trains};
use crate::step::Trainer;
use crate::{checkpoint, train};

pub struct Subject {
    /// What the user calls it.
    pub name: String,
    pub model: Model,
    pub tokenizer: Tokenizer,
    /// Over the weights as stored: of the folder, or of the checkpoint and what it trained from.
    pub digest: String,
    /// Tokens that end a text.
    pub ends: BTreeSet<u32>,
    pub precision: Precision,
}

impl Subject {
    /// # Errors
    /// When the folder or checkpoint is not there, damaged, or of another plan.
    pub fn open(from: &ModelRef, precision: Precision, comm: &dyn Comm, device: Device) -> Result<Subject> {
        match from {
            ModelRef::Folder(folder) => Subject::of_folder(folder, precision, device),
            ModelRef::Checkpoint { plan, step } => Subject::of_checkpoint(plan, *step, precision, comm, device),
        }
    }

    pub fn of_folder(folder: &Path, precision: Precision, device: Device) -> Result<Subject> {
        let config = ModelConfig::open(folder)?;
        let weights = Weights::open(folder)?;
        let digest = weights.digest_with(&config);
        let model = Model::load(&config, &weights.on(device), kind(precision), &Trains::default())
            .with_context(|| format!("loading {}", folder.display()))?;
        Ok(Subject {
            name: folder.display().to_string(),
            tokenizer: Tokenizer::open(folder)?,
            digest,
            ends: ends(folder, &config),
            precision,
            model,
        })
    }

    /// Ranks that are several read their slices and gather them: every rank has the whole model.
    fn of_checkpoint(
        plan: &Plan,
        step: Option<u64>,
        precision: Precision,
        comm: &dyn Comm,
        device: Device,
    ) -> Result<Subject> {
        let mut plan = plan.clone();
        // What the slices hold is f32, whatever the run computed in.
        plan.train.precision = precision;
        // Nothing is recomputed; what a planner would choose is no matter.
        plan.train.recompute = Recompute::Full.into();
        // What is merged below must be there in full.
        plan.train.frozen_precision = None;
        // A GPU that holds the model need not hold what trains it.
        plan.train.offload_optimizer = device != Device::Cpu;
        let (mut trainer, identity) = train::build(&plan, comm, device, (Stage::OptimizerState, false))?;
        let folder = plan.folders.run.join(launcher::checkpoint::FOLDER);
        let (path, manifest) = match step {
            Some(step) => {
                let path = folder.join(step_name(step));
                let manifest = launcher::checkpoint::verify(&path)?;
                (path, manifest)
            }
            None => {
                let found = checkpoint::choose(&folder, comm)?
                    .with_context(|| format!("{} holds no checkpoint to measure; train first", folder.display()))?;
                (found.folder, found.manifest)
            }
        };
        // What was changed above is no part of the model.
        if let Some(refusal) = differences(&manifest.identity, &identity).of_the_model().refusal(&path) {
            bail!(refusal);
        }
        checkpoint::load(&path, &manifest, comm, &mut trainer.zero)?;
        trainer.make_whole()?;
        let Trainer { mut model, .. } = trainer;
        for weight in model.stages().into_iter().flat_map(|(_, weights)| weights) {
            weight.grad = None;
        }
        for linear in model.layers.iter_mut().flat_map(Layer::linears_mut) {
            if linear.lora.is_some() {
                linear.weight_oi.value = linear.merged().to_kind(model.kind);
                linear.lora = None;
            }
        }
        let described = serde_json::to_vec(&manifest).context("a manifest is plain data")?;
        Ok(Subject {
            name: path.display().to_string(),
            tokenizer: Tokenizer::open(&plan.folders.vocabulary)?,
            digest: blake3::hash(&described).to_hex().to_string(),
            ends: ends(&plan.folders.base_model, &model.config),
            precision,
            model,
        })
    }

    /// A prompt's tokens. With `special`, what the tokenizer puts around a text is there, and special tokens in it are read
    /// as such.
    pub fn prompt(&self, text: &str, special: bool) -> Result<Vec<u32>> {
        let ids = if special {
            self.tokenizer.encode_prompt(text)?
        } else {
            self.tokenizer.encode(text)?
        };
        let pieces = self.model.head.pieces;
        if let Some(beyond) = ids.iter().find(|id| i64::from(**id) >= pieces) {
            let piece = self.tokenizer.piece(*beyond).unwrap_or_default();
            anyhow::bail!(
                "the tokenizer of {} gives id {beyond} ({piece:?}), but the model has {pieces} pieces; the folder's \
                 tokenizer belongs to another model",
                self.name
            );
        }
        Ok(ids)
    }

    pub fn made_by(&self, protocol: String, data_digest: String) -> MadeBy {
        MadeBy {
            panglot: env!("CARGO_PKG_VERSION").to_owned(),
            protocol,
            model: self.name.clone(),
            model_digest: self.digest.clone(),
            tokenizer_digest: self.tokenizer.digest().to_owned(),
            data_digest,
            precision: precision_name(self.precision).to_owned(),
        }
    }

    /// The same with its residual stream kept as a plan says.
    pub fn with_residual(self, residual: Residual) -> Subject {
        Subject {
            model: self.model.with_residual(residual),
            ..self
        }
    }

    /// Refuses windows that the model's positions do not reach.
    pub fn check_length(&self, length: usize, what: &str) -> Result<()> {
        ensure!(length > 0, "{what} = 0 holds no token; choose at least 1");
        self.model.check_length(length, what)
    }
}

pub fn precision_name(precision: Precision) -> &'static str {
    match kind(precision) {
        Kind::BFloat16 => "bf16",
        _ => "f32",
    }
}

/// What `generation_config.json`, else `config.json`, names as the end of a text: one token or several.
fn ends(folder: &Path, config: &ModelConfig) -> BTreeSet<u32> {
    let named = |file: &str| -> Option<BTreeSet<u32>> {
        let text = std::fs::read(folder.join(file)).ok()?;
        let json: Value = serde_json::from_slice(&text).ok()?;
        let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
        let ids: BTreeSet<u32> = match json.get("eos_token_id")? {
            Value::Array(ids) => ids.iter().filter_map(id).collect(),
            one => id(one).into_iter().collect(),
        };
        (!ids.is_empty()).then_some(ids)
    };
    named(GENERATION_CONFIG)
        .or_else(|| named("config.json"))
        .unwrap_or_else(|| config.eos_token_id.iter().copied().collect())
}
