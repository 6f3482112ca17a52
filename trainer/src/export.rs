//! What a run gives away: the merged model and the PEFT adapter, both loadable by `transformers` and PEFT as they are.
//! Written whole or not at all, then read back and checked against the model in memory.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use configs::{FullModule, Lora, Plan, Recompute};
use serde_json::{Value, json};
use sharding::{Comm, Stage};
use tch::{Kind, Tensor};

use crate::checkpoint;
use crate::hf::weights::{TensorFile, write_tensors};
use crate::hf::{ModelConfig, NewFolder, SHARD_BYTES, Weights, write_weights};
use crate::model::{LoraPair, Model, Norm, Trains, Weight};
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
    trainer.zero.arrived(comm)?;
    let mut result = json!({
        "checkpoint": found.folder,
        "step": progress.step,
        "pieces": trainer.model.config.vocab_size,
        "merged": merged,
        "adapter": null,
    });
    if comm.rank() == 0 {
        let model = &trainer.model;
        let tokenizer = &plan.folders.vocabulary;
        let base = &plan.folders.base_model;
        write_merged(
            merged,
            &model.config,
            &model.merged_weights(),
            model.kind,
            tokenizer,
            base,
        )?;
        let difference = logits_difference(model, &plan.folders.base_model, merged)?;
        result["logits_difference"] = json!(difference);
        if let Some(lora) = &plan.train.lora {
            let grows = plan.vocabulary.is_some();
            write_adapter(
                adapter,
                &Adapter::of(model, lora, &plan.train.full, base, grows)?,
                model.kind,
                tokenizer,
            )?;
            result["adapter"] = json!(adapter);
        }
    }
    comm.barrier()?;
    Ok(result)
}

/// Writes a model folder from weights under Hugging Face's names, with the tokenizer's files and what `base` says of generation,
/// and verifies it.
pub fn write_merged(
    dir: &Path,
    config: &ModelConfig,
    weights: &[(String, Tensor)],
    kind: Kind,
    tokenizer: &Path,
    base: &Path,
) -> Result<()> {
    let folder = NewFolder::begin(dir)?;
    folder.copy_tokenizer(tokenizer)?;
    folder.copy_generation_config(base)?;
    write_weights(&folder, config, kind, SHARD_BYTES, &mut |name, _| {
        let found = weights.iter().find(|(known, _)| known == name);
        found
            .map(|(_, value)| value.shallow_clone())
            .with_context(|| format!("the model to export has no {name}"))
    })?;
    let written = config.parameter_shapes().len();
    ensure!(
        weights.len() == written,
        "the model to export has {} tensors but its config describes {written}; some would be left out",
        weights.len()
    );
    let read = Weights::open_with(folder.path(), config)?;
    for (name, value) in weights {
        let same = read.tensor(name, &value.size(), kind)? == value.to_kind(kind);
        ensure!(
            same,
            "{name} read back from {} differs from what was written; is the disk sound?",
            dir.display()
        );
    }
    folder.commit()
}

/// How far the exported model's logits are from `model`'s on a few tokens, both computed in f32: ‖Δ‖ / ‖logits‖. One of
/// the two is in memory at a time.
///
/// # Errors
/// When it is more than the rounding of the stored weights can explain.
pub fn logits_difference(model: &Model, base: &Path, merged: &Path) -> Result<f64> {
    let pieces = model.head.pieces;
    let time = 32.min(model.config.max_position_embeddings as i64);
    let ids_bt = (Tensor::arange(4 * time, (Kind::Int64, tch::Device::Cpu)) * 7919)
        .remainder(pieces)
        .view([4, time]);
    let logits = |model: &Model| {
        let hidden_btd = model.hidden(&ids_bt);
        model
            .head
            .whole_logits(model.head_matrix(), &hidden_btd)
            .to_kind(Kind::Double)
    };
    let ours = logits(&unmerged_f32(model, base)?);
    let open = || {
        Model::load(
            &ModelConfig::open(merged)?,
            &Weights::open(merged)?,
            Kind::Float,
            &Trains::default(),
        )
    };
    let theirs = logits(&open()?);
    let difference = (&theirs - &ours).norm().double_value(&[]) / ours.norm().double_value(&[]);
    // f32: the order of sums. bf16: every W + s·BA is rounded to 8 bits.
    let most = if model.kind == Kind::Float {
        F32_ROUNDING
    } else {
        BF16_ROUNDING
    };
    ensure!(
        difference <= most,
        "the logits of {} differ from the trained model's by {difference:.2e} of their norm, more than rounding can \
         explain ({most:.0e}); this is a defect, do not use the export",
        merged.display()
    );
    Ok(difference)
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

/// Writes an adapter folder and verifies it.
pub fn write_adapter(dir: &Path, adapter: &Adapter, kind: Kind, tokenizer: &Path) -> Result<()> {
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
    folder.commit()
}
