//! What a run gives away: the merged model and the PEFT adapter, both loadable by `transformers` and PEFT as they are.
//! Written whole or not at all, then read back and checked against the model in memory.

use std::collections::BTreeSet;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use configs::{FullModule, Lora, Plan, Recompute};
use serde_json::{Value, json};
use sharding::{Comm, Stage};
use tch::{Kind, Tensor};

use crate::checkpoint;
use crate::hf::weights::{TensorFile, write_tensors};
use crate::hf::{ModelConfig, NewFolder, SHARD_BYTES, Weights, write_weights};
use crate::model::{LoraPair, Merged, Model, Norm, Trains, Weight};
use crate::step::Trainer;
use crate::train;

/// Writes the newest checkpoint's model to both folders and checks them. Without LoRA there is no adapter.
pub fn export_newest(plan: &Plan, comm: &dyn Comm, merged: &Path, adapter: &Path) -> Result<Value> {
    // On the host, wherever the model was trained: nothing here is worth waiting for a GPU. An export needs every parameter
    // whole, and a checkpoint of any ZeRO stage is read at any other.
    let mut building = plan.clone();
    // Nothing is recomputed; what a planner would choose for the run's devices says nothing of this host.
    building.train.recompute = Recompute::Full.into();
    let (mut trainer, identity) = train::build(&building, comm, tch::Device::Cpu, (Stage::OptimizerState, false))?;
    let folder = plan.folders.run.join(launcher::checkpoint::FOLDER);
    let found = launcher::checkpoint::newest(&folder)?
        .with_context(|| format!("{} holds no checkpoint to export; train first", folder.display()))?;
    let different = launcher::checkpoint::differences(&found.manifest.identity, &identity);
    let different: Vec<String> = different.refused.iter().map(ToString::to_string).collect();
    ensure!(
        different.is_empty(),
        "{} was written by a run with other settings:\n  {}\nexport with the plan that trained it",
        found.folder.display(),
        different.join("\n  ")
    );
    let progress = checkpoint::load(&found.folder, &found.manifest, comm, &mut trainer.zero)?;
    trainer.make_whole()?;
    // The optimizer's state and the gradients have no part in it.
    let Trainer { mut model, zero, .. } = trainer;
    drop(zero);
    model.forget_gradients();
    let mut result = json!({
        "checkpoint": found.folder,
        "step": progress.step,
        "pieces": model.config.vocab_size,
        "merged": merged,
        "adapter": null,
    });
    if comm.rank() == 0 {
        let tokenizer = &plan.folders.vocabulary;
        let base = &plan.folders.base_model;
        let logits = Logits::of(&model, base)?;
        let weights = model.merged_weights();
        let folder = write_merged(merged, &model.config, &weights, model.kind, tokenizer, base)?;
        result["logits_difference"] = json!(logits.check_merged(folder.path())?);
        folder.commit()?;
        if let Some(lora) = &plan.train.lora {
            let grows = plan.vocabulary.is_some();
            let parts = Adapter::of(&model, lora, &plan.train.full, base, grows)?;
            let folder = write_adapter(adapter, &parts, model.kind, tokenizer)?;
            result["adapter_logits_difference"] = json!(logits.check_adapter(base, folder.path())?);
            folder.commit()?;
            result["adapter"] = json!(adapter);
        }
    }
    comm.barrier()?;
    Ok(result)
}

/// Writes a model folder from weights under Hugging Face's names, with the tokenizer's files and what `base` says of generation,
/// and compares what reads back. It stands in its place once it is committed.
pub fn write_merged(
    dir: &Path,
    config: &ModelConfig,
    weights: &[(String, Merged)],
    kind: Kind,
    tokenizer: &Path,
    base: &Path,
) -> Result<NewFolder> {
    let folder = NewFolder::begin(dir)?;
    folder.copy_tokenizer(tokenizer)?;
    folder.copy_generation_config(base)?;
    write_weights(&folder, config, kind, SHARD_BYTES, &mut |name, _| {
        let found = weights.iter().find(|(known, _)| known == name);
        found
            .map(|(_, make)| make())
            .with_context(|| format!("the model to export has no {name}"))
    })?;
    let written = config.parameter_shapes().len();
    ensure!(
        weights.len() == written,
        "the model to export has {} tensors but its config describes {written}; some would be left out",
        weights.len()
    );
    let read = Weights::open_with(folder.path(), config)?;
    for (name, make) in weights {
        let value = make();
        let same = read.tensor(name, &value.size(), kind)? == value.to_kind(kind);
        ensure!(
            same,
            "{name} read back from {} differs from what was written; is the disk sound?",
            dir.display()
        );
    }
    Ok(folder)
}

/// A model's logits on a few tokens, in f32 whatever it was trained in, beside which an export's are held.
pub struct Logits {
    ids_bt: Tensor,
    values: Tensor,
    /// How far others may be: ‖Δ‖ / ‖logits‖.
    most: f64,
}

impl Logits {
    /// `base` is what `model` was made from.
    pub fn of(model: &Model, base: &Path) -> Result<Logits> {
        let time = 32.min(model.config.max_position_embeddings as i64);
        let ids_bt = (Tensor::arange(4 * time, (Kind::Int64, tch::Device::Cpu)) * 7919)
            .remainder(model.head.pieces)
            .view([4, time]);
        Ok(Logits {
            values: logits(&unmerged_f32(model, base)?, &ids_bt),
            ids_bt,
            // f32: the order of sums. bf16: every W + s·BA is rounded to 8 bits.
            most: match model.kind {
                Kind::Float => F32_ROUNDING,
                _ => BF16_ROUNDING,
            },
        })
    }

    /// How far the model in a folder is, as `transformers` loads it.
    ///
    /// # Errors
    /// When it is more than the rounding of the stored weights can explain.
    pub fn check_merged(&self, folder: &Path) -> Result<f64> {
        let (config, weights) = (ModelConfig::open(folder)?, Weights::open(folder)?);
        let model = Model::load(&config, &weights, Kind::Float, &Trains::default())?;
        self.check(&model, folder)
    }

    /// As [`Logits::check_merged`], of an adapter on its base, as PEFT loads it: by what its files say alone.
    pub fn check_adapter(&self, base: &Path, folder: &Path) -> Result<f64> {
        self.check(&with_adapter(base, folder)?, folder)
    }

    fn check(&self, model: &Model, folder: &Path) -> Result<f64> {
        let theirs = logits(model, &self.ids_bt);
        let difference = (&theirs - &self.values).norm().double_value(&[]) / self.values.norm().double_value(&[]);
        ensure!(
            difference <= self.most,
            "the logits of {} differ from the trained model's by {difference:.2e} of their norm, more than rounding can \
             explain ({:.0e}); this is a defect, and nothing is exported",
            folder.display(),
            self.most
        );
        Ok(difference)
    }
}

fn logits(model: &Model, ids_bt: &Tensor) -> Tensor {
    let hidden_btd = model.hidden(ids_bt);
    let logits = model.head.whole_logits(model.head_matrix(), &hidden_btd);
    logits.to_kind(Kind::Double)
}

/// The base in f32 with an adapter's pairs beside its linears and its whole weights in their places.
fn with_adapter(base: &Path, folder: &Path) -> Result<Model> {
    let settings: Value = launcher::files::read_json(&folder.join("adapter_config.json"))?;
    let number = |key: &str| {
        settings[key]
            .as_f64()
            .with_context(|| format!("adapter_config.json has no {key}"))
    };
    let (rank, alpha) = (number("r")?, number("lora_alpha")?);
    let scale = match settings["use_rslora"] == true {
        true => alpha / rank.sqrt(),
        false => alpha / rank,
    };
    let tensors = TensorFile::open(&folder.join("adapter_model.safetensors"))?;
    let mut names: BTreeSet<String> = tensors.names().into_iter().collect();
    let mut take = |name: String| -> Result<Option<Tensor>> {
        let name = format!("base_model.model.{name}");
        match names.remove(&name) {
            true => Ok(Some(tensors.tensor(&name)?.to_kind(Kind::Float))),
            false => Ok(None),
        }
    };
    let (config, weights) = (ModelConfig::open(base)?, Weights::open(base)?);
    let mut model = Model::load(&config, &weights, Kind::Float, &Trains::default())?;
    for layer in &mut model.layers {
        for linear in layer.linears_mut() {
            let path = linear.weight_oi.name.trim_end_matches(".weight").to_owned();
            let [a, b] = ["A", "B"].map(|end| take(format!("{path}.lora_{end}.weight")));
            let (Some(a_ri), Some(b_or)) = (a?, b?) else { continue };
            let named = |target: &Value| {
                target
                    .as_str()
                    .is_some_and(|target| path.ends_with(&format!(".{target}")))
            };
            ensure!(
                settings["target_modules"]
                    .as_array()
                    .is_some_and(|targets| targets.iter().any(named)),
                "{path} has a pair, and target_modules does not name it"
            );
            linear.lora = Some(LoraPair {
                a_ri: Weight::frozen(format!("{path}.lora_A"), a_ri),
                b_or: Weight::frozen(format!("{path}.lora_B"), b_or),
                scale,
                dropout: 0.0,
            });
        }
    }
    let head = take("lm_head.weight".to_owned())?;
    let transposed = config.names().stored_transposed;
    let linears: BTreeSet<String> = model
        .layers
        .iter()
        .flat_map(|layer| layer.linears())
        .map(|linear| linear.weight_oi.name.clone())
        .collect();
    for (_, weights) in model.stages() {
        for weight in weights {
            if let Some(value) = take(weight.name.clone())? {
                weight.value = match transposed && linears.contains(&weight.name) {
                    true => value.tr().contiguous(),
                    false => value,
                };
            }
        }
    }
    match (head, &mut model.head_weight) {
        (Some(value), Some(own)) => own.value = value,
        (Some(value), None) => ensure!(value == model.embedding.value, "a tied matrix was written in two forms"),
        (None, _) => {}
    }
    model.head.pieces = model.embedding.value.size()[0].min(model.head_matrix().value.size()[0]);
    ensure!(
        names.is_empty(),
        "adapter_model.safetensors has tensors of no module: {names:?}"
    );
    Ok(model)
}

/// Seen on SmolLM2: 2e-6.
const F32_ROUNDING: f64 = 1e-4;
/// Seen on SmolLM2 with LoRA terms of several sizes: 4e-3 to 6e-3, where leaving them out made 1.5e-2 to 1.5e-1.
const BF16_ROUNDING: f64 = 1.2e-2;

/// The trained model with its LoRA terms beside the base's weights, in f32 whatever it was trained in.
fn unmerged_f32(model: &Model, base: &Path) -> Result<Model> {
    let f32 = |weight: &Weight| Weight::frozen(weight.name.clone(), weight.value.to_kind(Kind::Float));
    let mut copy = Model::load(
        &ModelConfig::open(base)?,
        &Weights::open(base)?,
        Kind::Float,
        &Trains::default(),
    )?;
    copy.stream = Kind::Float;
    copy.embedding = f32(&model.embedding);
    copy.positions_td = model.positions_td.as_ref().map(f32);
    copy.head_weight = model.head_weight.as_ref().map(f32);
    copy.head.pieces = model.head.pieces;
    copy.head.norm = model.head.norm.in_f32();
    for (copy, trained) in copy.layers.iter_mut().zip(&model.layers) {
        for (copy, trained) in copy.norms_mut().into_iter().zip(trained.norms()) {
            *copy = trained.in_f32();
        }
        for (copy, trained) in copy.linears_mut().into_iter().zip(trained.linears()) {
            copy.weight_oi = f32(&trained.weight_oi);
            copy.bias_o = trained.bias_o.as_ref().map(f32);
            copy.lora = trained.lora.as_ref().map(|lora| LoraPair {
                a_ri: f32(&lora.a_ri),
                b_or: f32(&lora.b_or),
                scale: lora.scale,
                dropout: 0.0,
            });
        }
    }
    Ok(copy)
}

/// What a PEFT adapter folder holds.
pub struct Adapter<'a> {
    /// The folder it stands on; written into `adapter_config.json`.
    pub base: &'a Path,
    pub lora: &'a Lora,
    /// (module path such as "model.layers.0.self_attn.q_proj", A \[r, in\], B \[out, r\]).
    pub pairs: Vec<(String, Tensor, Tensor)>,
    /// Whole weights, trained or grown, by their names: "model.embed_tokens.weight", "transformer.ln_f.bias", …; as Hugging
    /// Face stores them.
    pub full: Vec<(String, Tensor)>,
    /// Linears are stored transposed.
    pub fan_in_fan_out: bool,
    /// The base ties its head to its embedding.
    pub tied: bool,
    /// Rows of the vocabulary matrices; the base is resized to it where it has others.
    pub pieces: i64,
    /// Rows of the base's.
    pub base_pieces: i64,
}

impl<'a> Adapter<'a> {
    /// `grows`: the vocabulary has pieces that the base's has not, whether or not its matrices have rows to spare for them.
    pub fn of(
        model: &Model,
        lora: &'a Lora,
        trained: &[FullModule],
        base: &'a Path,
        grows: bool,
    ) -> Result<Adapter<'a>> {
        let base_pieces = ModelConfig::open(base)?.vocab_size as i64;
        let pieces = model.head.pieces;
        let grown = grows || pieces != base_pieces;
        let matrix = |weight: &Weight| weight.value.narrow(0, 0, pieces).contiguous();
        let tied = model.head_weight.is_none();
        let mut full = Vec::new();
        // A tied matrix is named in both places, since PEFT's copies of the two modules are separate.
        if grown || trained.contains(&FullModule::EmbedTokens) {
            full.push((model.embedding.name.clone(), matrix(&model.embedding)));
        }
        if grown || trained.contains(&FullModule::LmHead) {
            full.push(("lm_head.weight".to_owned(), matrix(model.head_matrix())));
        }
        let trains = |weight: &&Weight| weight.group.is_some();
        let plain = |weight: &Weight| (weight.name.clone(), weight.value.shallow_clone());
        full.extend(model.positions_td.iter().filter(trains).map(plain));
        for layer in &model.layers {
            full.extend(
                layer
                    .norms()
                    .into_iter()
                    .flat_map(Norm::weights)
                    .filter(trains)
                    .map(plain),
            );
            for linear in layer.linears() {
                let matrix = std::iter::once(&linear.weight_oi).filter(trains);
                full.extend(matrix.map(|weight| (weight.name.clone(), model.stored(&weight.value))));
                full.extend(linear.bias_o.iter().filter(trains).map(plain));
            }
        }
        full.extend(model.head.norm.weights().filter(trains).map(plain));
        Ok(Adapter {
            base,
            lora,
            pairs: model.lora_pairs(),
            full,
            fan_in_fan_out: model.config.names().stored_transposed,
            tied,
            pieces,
            base_pieces,
        })
    }

    /// `adapter_config.json`.
    fn config(&self) -> Value {
        let modules = self.modules();
        // A whole number is written as one: PEFT declares it an int.
        let alpha = self.lora.alpha;
        let alpha = if alpha.fract() == 0.0 {
            json!(alpha as i64)
        } else {
            json!(alpha)
        };
        json!({
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": self.base,
            "r": self.lora.rank,
            "lora_alpha": alpha,
            "lora_dropout": self.lora.dropout,
            "target_modules": self.lora.targets,
            "modules_to_save": if modules.is_empty() { Value::Null } else { json!(modules) },
            "ensure_weight_tying": self.tied && !modules.is_empty(),
            "bias": "none",
            "use_rslora": self.lora.is_rank_stabilized(),
            "use_dora": false,
            "fan_in_fan_out": self.fan_in_fan_out,
            "init_lora_weights": true,
            "inference_mode": true,
        })
    }

    /// The last parts of whole weights' paths, each once: PEFT finds the modules of all layers by them.
    fn modules(&self) -> Vec<&str> {
        let mut modules: Vec<&str> = Vec::new();
        for (name, _) in &self.full {
            let module = name
                .rsplit('.')
                .nth(1)
                .expect("a weight's name has its module before it");
            if !modules.contains(&module) {
                modules.push(module);
            }
        }
        modules
    }

    /// Under PEFT's names.
    fn tensors(&self) -> Vec<(String, Tensor)> {
        let pairs = self.pairs.iter().flat_map(|(path, a, b)| {
            [("A", a), ("B", b)].map(|(end, value)| {
                (
                    format!("base_model.model.{path}.lora_{end}.weight"),
                    value.shallow_clone(),
                )
            })
        });
        let full = self
            .full
            .iter()
            .map(|(name, value)| (format!("base_model.model.{name}"), value.shallow_clone()));
        pairs.chain(full).collect()
    }

    /// How to load it.
    fn readme(&self) -> String {
        let base = serde_json::to_string(&self.base).expect("a path is text");
        let resize = if self.pieces == self.base_pieces {
            String::new()
        } else {
            format!("model.resize_token_embeddings({}, mean_resizing=False)\n", self.pieces)
        };
        format!(
            "# LoRA adapter\n\n\
             Rank {}, alpha {}, on {}.{}\n\n\
             Load it with `transformers` and `peft`, from this folder:\n\n\
             ```python\n\
             from peft import PeftModel\n\
             from transformers import AutoModelForCausalLM, AutoTokenizer\n\n\
             tokenizer = AutoTokenizer.from_pretrained(\".\")\n\
             model = AutoModelForCausalLM.from_pretrained({base}, dtype=\"auto\")\n\
             {resize}\
             model = PeftModel.from_pretrained(model, \".\")\n\
             ```\n\n\
             `model.merge_and_unload()` then gives the model without adapters; the merged folder beside this one is that.\n",
            self.lora.rank,
            self.lora.alpha,
            self.lora.targets.join(", "),
            match self.modules().as_slice() {
                [] => String::new(),
                modules => format!(
                    " Whole: {}; the vocabulary has {} rows.",
                    modules.join(", "),
                    self.pieces
                ),
            },
        )
    }
}

/// Writes an adapter folder and compares what reads back. It stands in its place once it is committed.
pub fn write_adapter(dir: &Path, adapter: &Adapter, kind: Kind, tokenizer: &Path) -> Result<NewFolder> {
    let folder = NewFolder::begin(dir)?;
    folder.copy_tokenizer(tokenizer)?;
    folder.write_json("adapter_config.json", &adapter.config())?;
    folder.write("README.md", adapter.readme())?;
    let tensors = adapter.tensors();
    let shapes: Vec<(String, Vec<i64>)> = tensors
        .iter()
        .map(|(name, value)| (name.clone(), value.size()))
        .collect();
    let path = folder.path().join("adapter_model.safetensors");
    let mut values = tensors.iter();
    write_tensors(&path, &shapes, kind, &mut |_, _| {
        Ok(values.next().expect("asked for each once, in order").1.shallow_clone())
    })?;
    let read = TensorFile::open(&path)?;
    for (name, value) in &tensors {
        let same = read.tensor(name)? == value.to_kind(kind);
        ensure!(
            same,
            "{name} read back from {} differs from what was written; is the disk sound?",
            dir.display()
        );
    }
    Ok(folder)
}
