//! Builds the model from a Hugging Face folder: tensors one at a time into the compute precision, the vocabulary matrices
//! extended, LoRA pairs beside the linears that the plan names.

use anyhow::{Context, Result, ensure};
use configs::{FullModule, Group, Lora, NewRows};
use corpus::Vocabulary;
use tch::{Device, Kind, Tensor};

use super::linear::{Linear, LoraPair};
use super::{Head, Layer, Model, Rotary, Weight, new_rows};
use crate::hf::{ModelConfig, Weights};
use crate::random;

/// What of the model trains, and how its vocabulary grows.
#[derive(Clone, Debug, Default)]
pub struct Trains {
    pub lora: Option<Lora>,
    pub full: Vec<FullModule>,
    /// The extended vocabulary and how its new rows start.
    pub vocabulary: Option<(Vocabulary, NewRows)>,
    pub seed: u64,
}

impl Trains {
    /// The group of a module's weights, if they train.
    fn group(&self, module: FullModule) -> Option<Group> {
        self.full.contains(&module).then(|| module.group())
    }
}

/// A tensor of the base, in the compute precision; what trains keeps f32 until it is bound, since its master weights
/// start from here.
fn read(weights: &Weights, name: String, shape: &[i64], kind: Kind, group: Option<Group>) -> Result<Weight> {
    let kind = if group.is_some() { Kind::Float } else { kind };
    Ok(Weight {
        value: weights.tensor(&name, shape, kind)?,
        name,
        grad: None,
        group,
    })
}

/// Every linear of a layer, with its parent module.
const LINEARS: [(&str, FullModule); 7] = [
    ("self_attn", FullModule::QProj),
    ("self_attn", FullModule::KProj),
    ("self_attn", FullModule::VProj),
    ("self_attn", FullModule::OProj),
    ("mlp", FullModule::GateProj),
    ("mlp", FullModule::UpProj),
    ("mlp", FullModule::DownProj),
];

impl Model {
    /// # Errors
    /// When a tensor is missing or mis-shaped, a LoRA target matches nothing, or the vocabulary does not extend this base.
    pub fn load(config: &ModelConfig, weights: &Weights, kind: Kind, trains: &Trains) -> Result<Model> {
        if let Some(lora) = &trains.lora {
            for target in &lora.targets {
                let known: Vec<&str> = LINEARS.iter().map(|(_, module)| module.name()).collect();
                ensure!(
                    known.contains(&target.as_str()),
                    "train.lora.targets names {target}, which matches no module of this model; its linears are {}",
                    known.join(", ")
                );
            }
        }
        let dim = config.hidden_size as i64;
        let matrices = vocabulary_matrices(config, weights, kind, trains)?;
        let layers = (0..config.num_hidden_layers)
            .map(|index| load_layer(config, weights, kind, trains, index))
            .collect::<Result<_>>()?;
        let head = Head {
            norm_d: read(
                weights,
                "model.norm.weight".into(),
                &[dim],
                kind,
                trains.group(FullModule::Norms),
            )?,
            epsilon: config.rms_norm_eps,
            pieces: matrices.pieces,
        };
        // Positions beyond the longest row are never asked for; the table is small all the same.
        let longest = config.max_position_embeddings.min(1 << 16);
        Ok(Model {
            rotary: Rotary::new(longest, config.head_dim, config.rope_theta, config.rope_scaling).on(weights.device()),
            config: ModelConfig {
                vocab_size: matrices.pieces as usize,
                ..config.clone()
            },
            embedding: matrices.embedding,
            layers,
            head,
            head_weight: matrices.head,
            kind,
            device: weights.device(),
        })
    }

    /// Every weight of an equal model without LoRA, under Hugging Face's names, in its order; f32, padding rows left out.
    pub fn merged_weights(&self) -> Vec<(String, Tensor)> {
        let pieces = |weight: &Weight| weight.value.narrow(0, 0, self.head.pieces).to_kind(Kind::Float);
        let mut all = vec![("model.embed_tokens.weight".to_string(), pieces(&self.embedding))];
        for (index, layer) in self.layers.iter().enumerate() {
            for linear in layer.linears() {
                all.push((format!("{}.weight", linear.path), linear.merged()));
            }
            let norms = [
                ("input_layernorm", &layer.attention_norm_d),
                ("post_attention_layernorm", &layer.mlp_norm_d),
            ];
            for (name, norm) in norms {
                all.push((
                    format!("model.layers.{index}.{name}.weight"),
                    norm.value.to_kind(Kind::Float),
                ));
            }
        }
        all.push((
            "model.norm.weight".to_string(),
            self.head.norm_d.value.to_kind(Kind::Float),
        ));
        if let Some(head) = &self.head_weight {
            all.push(("lm_head.weight".to_string(), pieces(head)));
        }
        all
    }

    /// (module path, A, B) of every LoRA pair, f32.
    pub fn lora_pairs(&self) -> Vec<(String, Tensor, Tensor)> {
        let linears = self.layers.iter().flat_map(|layer| layer.linears());
        let pair = |linear: &Linear| {
            let lora = linear.lora.as_ref()?;
            let value = |weight: &Weight| weight.value.to_kind(Kind::Float);
            Some((linear.path.clone(), value(&lora.a_ri), value(&lora.b_or)))
        };
        linears.filter_map(pair).collect()
    }

    /// Refuses rows that the position table does not reach.
    pub fn check_length(&self, length: usize, what: &str) -> Result<()> {
        ensure!(
            length <= self.config.max_position_embeddings,
            "{what} = {length} exceeds the model's {} positions (max_position_embeddings); choose at most that many",
            self.config.max_position_embeddings
        );
        Ok(())
    }
}

struct Matrices {
    embedding: Weight,
    head: Option<Weight>,
    pieces: i64,
}

fn vocabulary_matrices(config: &ModelConfig, weights: &Weights, kind: Kind, trains: &Trains) -> Result<Matrices> {
    let shape = [config.vocab_size as i64, config.hidden_size as i64];
    let mut pieces = config.vocab_size;
    if let Some((vocabulary, _)) = &trains.vocabulary {
        ensure!(
            vocabulary.base_size <= config.vocab_size,
            "the vocabulary extends a base of {} pieces but this model has {}; make the vocabulary again from this base",
            vocabulary.base_size,
            config.vocab_size
        );
        // A base may have more rows than its tokenizer has pieces; new pieces take the first unused ones.
        pieces = vocabulary.size.max(if vocabulary.pieces.is_empty() {
            config.vocab_size
        } else {
            0
        });
    }
    let load = |name: &str, group: Option<Group>| -> Result<Weight> {
        let base = weights.tensor(name, &shape, Kind::Float)?;
        let value = match &trains.vocabulary {
            Some((vocabulary, how)) if !vocabulary.pieces.is_empty() => {
                new_rows::extend(&base, vocabulary, *how, trains.seed, name)
            }
            _ => base,
        };
        // What trains keeps f32 until it is bound: its master weights start from here.
        let value = if group.is_some() { value } else { value.to_kind(kind) };
        Ok(Weight {
            name: name.into(),
            value,
            grad: None,
            group,
        })
    };
    let tied = config.tie_word_embeddings;
    let (embed, head) = (trains.group(FullModule::EmbedTokens), trains.group(FullModule::LmHead));
    ensure!(
        !tied || embed.is_some() == head.is_some(),
        "the base ties lm_head to embed_tokens, but train.full names only one of them; name both or neither"
    );
    Ok(Matrices {
        embedding: load("model.embed_tokens.weight", embed)?,
        head: if tied {
            None
        } else {
            Some(load("lm_head.weight", head)?)
        },
        pieces: pieces as i64,
    })
}

fn load_layer(config: &ModelConfig, weights: &Weights, kind: Kind, trains: &Trains, index: usize) -> Result<Layer> {
    let dim = config.hidden_size as i64;
    let (heads, kv_heads) = (config.num_attention_heads as i64, config.num_key_value_heads as i64);
    let (head_dim, feed_forward) = (config.head_dim as i64, config.intermediate_size as i64);
    let linear = |which: usize, out: i64, input: i64| -> Result<Linear> {
        let (parent, module) = LINEARS[which];
        let name = module.name();
        let path = format!("model.layers.{index}.{parent}.{name}");
        let weight_oi = read(
            weights,
            format!("{path}.weight"),
            &[out, input],
            kind,
            trains.group(module),
        )?;
        let wanted = trains
            .lora
            .as_ref()
            .filter(|lora| lora.targets.iter().any(|target| target == name));
        let lora = wanted.map(|lora| lora_pair(&path, lora, out, input, trains.seed, weights.device()));
        Ok(Linear {
            path,
            weight_oi,
            lora,
            fp8: None,
        })
    };
    let norms = trains.group(FullModule::Norms);
    let norm = |name: &str| {
        read(
            weights,
            format!("model.layers.{index}.{name}.weight"),
            &[dim],
            kind,
            norms,
        )
    };
    let layer = || -> Result<Layer> {
        Ok(Layer {
            attention_norm_d: norm("input_layernorm")?,
            q: linear(0, heads * head_dim, dim)?,
            k: linear(1, kv_heads * head_dim, dim)?,
            v: linear(2, kv_heads * head_dim, dim)?,
            o: linear(3, dim, heads * head_dim)?,
            mlp_norm_d: norm("post_attention_layernorm")?,
            gate: linear(4, feed_forward, dim)?,
            up: linear(5, feed_forward, dim)?,
            down: linear(6, dim, feed_forward)?,
            heads,
            kv_heads,
            head_dim,
            epsilon: config.rms_norm_eps,
        })
    };
    layer().with_context(|| format!("layer {index}"))
}

/// A uniform in ±1/√in (Kaiming's with a = √5, as PEFT starts it), B zero: the model starts as the base.
fn lora_pair(path: &str, lora: &Lora, out: i64, input: i64, seed: u64, device: Device) -> LoraPair {
    let rank = lora.rank as i64;
    let stream = random::Stream::new(seed, &format!("lora {path}"));
    let bound = 1.0 / (input as f64).sqrt();
    let a: Vec<f32> = (0..(rank * input) as u64)
        .map(|i| ((2.0 * stream.uniform(i) - 1.0) * bound) as f32)
        .collect();
    let trained = |end: &str, value: Tensor| Weight {
        name: format!("{path}.{end}.weight"),
        value,
        grad: None,
        group: Some(Group::Lora),
    };
    LoraPair {
        a_ri: trained("lora_A", Tensor::from_slice(&a).view([rank, input]).to_device(device)),
        b_or: trained("lora_B", Tensor::zeros([out, rank], (Kind::Float, device))),
        scale: lora.scale(),
        dropout: lora.dropout,
    }
}
