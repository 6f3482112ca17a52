//! `panglot model inspect`: what a model folder holds, kind by kind, and what of it a config trains. Opening it checks that
//! every tensor is there, whole and of its shape.

use std::path::Path;

use anyhow::Result;
use configs::{FullModule, Group};
use launcher::inspection::{Inspection, TensorKind};

use crate::hf::{ModelConfig, Weights};

/// What a config says of training, as far as it names modules.
#[derive(Clone, Debug, Default)]
pub struct Trained {
    pub full: Vec<FullModule>,
    /// LoRA's targets, and its rank.
    pub lora: Option<(Vec<String>, usize)>,
}

/// # Errors
/// When the folder does not hold a whole model of its config; what is truncated, missing, extra or mis-shaped is named.
pub fn inspect(folder: &Path, trained: &Trained) -> Result<Inspection> {
    let config = ModelConfig::open(folder)?;
    let weights = Weights::open_with(folder, &config)?;
    let mut kinds: Vec<TensorKind> = Vec::new();
    for parameter in config.parameters() {
        let elements: i64 = parameter.shape.iter().product();
        let stored = weights.stored_type(&parameter.name)?;
        let name = without_layer(&parameter.name, config.names().layers);
        let same = |kind: &&mut TensorKind| kind.name == name && kind.stored == stored;
        if let Some(kind) = kinds.iter_mut().find(same) {
            kind.tensors += 1;
            kind.elements += elements as u64;
            continue;
        }
        let module = parameter.module;
        // A tied head is the embedding under another name.
        let as_head = config.tie_word_embeddings && module == FullModule::EmbedTokens;
        let full = trained.full.contains(&module) || as_head && trained.full.contains(&FullModule::LmHead);
        let is_bias = name.ends_with(".bias");
        let group = if is_bias { Group::Norms } else { module.group() };
        let mut lora = trained.lora.iter();
        let lora = lora.find(|(targets, _)| module.is_linear() && targets.iter().any(|name| name == module.name()));
        kinds.push(TensorKind {
            name,
            tensors: 1,
            elements: elements as u64,
            stored,
            group: full.then(|| group.name().to_owned()),
            lora: lora
                .filter(|_| !is_bias)
                .map(|(_, rank)| *rank as u64 * parameter.shape.iter().sum::<i64>() as u64),
            shape: parameter.shape,
        });
    }
    Ok(Inspection {
        folder: folder.to_owned(),
        stored_bytes: weights.stored_bytes(),
        config: serde_json::to_value(&config)?,
        kinds,
    })
}

/// "model.layers.7.mlp.up_proj.weight" as "model.layers.*.mlp.up_proj.weight".
fn without_layer(name: &str, layers: &str) -> String {
    let within = name.strip_prefix(layers).and_then(|rest| rest.strip_prefix('.'));
    match within.and_then(|rest| rest.split_once('.')) {
        Some((_, path)) => format!("{layers}.*.{path}"),
        None => name.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::llama_7b;
    use crate::hf::write_folder;
    use tch::{Kind, Tensor};

    #[test]
    fn a_model_is_told_kind_by_kind_with_what_trains() {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join("model");
        let config = ModelConfig {
            vocab_size: 10,
            hidden_size: 8,
            intermediate_size: 12,
            num_attention_heads: 2,
            num_key_value_heads: 2,
            head_dim: 4,
            ..llama_7b(3)
        };
        write_folder(&folder, &config, Kind::BFloat16, 1 << 20, &mut |_, shape| {
            Ok(Tensor::ones(shape, (Kind::Float, tch::Device::Cpu)))
        })
        .unwrap();
        let trained = Trained {
            full: vec![FullModule::LmHead],
            lora: Some((vec!["up_proj".into()], 2)),
        };
        let found = inspect(&folder, &trained).unwrap();
        assert_eq!(found.kinds.len(), 3 + 9);
        let kind = |name: &str| found.kinds.iter().find(|kind| kind.name == name).unwrap();
        let up = kind("model.layers.*.mlp.up_proj.weight");
        assert_eq!((up.tensors, up.elements, up.stored.as_str()), (3, 3 * 96, "BF16"));
        assert_eq!((up.lora, &up.group), (Some(2 * 20), &None));
        assert_eq!(kind("lm_head.weight").group.as_deref(), Some("head"));
        assert_eq!(kind("model.embed_tokens.weight").group, None);
        let elements: u64 = found.kinds.iter().map(|kind| kind.elements).sum();
        assert_eq!(found.stored_bytes, 2 * elements);

        std::fs::remove_file(folder.join("model.safetensors")).unwrap();
        let said = inspect(&folder, &trained).unwrap_err().to_string();
        assert!(said.contains("holds neither model.safetensors nor"), "{said}");
    }
}
