//! Builds the model from a Hugging Face folder: tensors one at a time into the compute precision, the vocabulary matrices
//! extended, LoRA pairs beside the linears that the plan names.

use anyhow::{Context, Result, ensure};
use configs::{FullModule, Group, Lora, NewRows, Residual};
use corpus::Vocabulary;
use tch::{Device, Kind, Tensor};

use super::layer::Qkv;
use super::linear::{Linear, LoraPair};
use super::{
    EMBEDDING, HEAD, Head, Layer, Merged, Mlp, Model, Norm, Rotary, Weight, embedding_weights, layer_name, new_rows,
    quantize,
};
use crate::hf::config::LinearShape;
use crate::hf::{Family, ModelConfig, Weights};
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

impl Model {
    /// # Errors
    /// When a tensor is missing or mis-shaped, a LoRA target or a module to train matches nothing, or the vocabulary does not
    /// extend this base.
    pub fn load(config: &ModelConfig, weights: &Weights, kind: Kind, trains: &Trains) -> Result<Model> {
        Model::load_by_stages(config, weights, kind, trains, false, &mut |_, _| Ok(()))
    }

    /// As [`Model::load`]; as soon as a stage is read, `each` gets its name and weights, and may take their values away: the
    /// next stage is read behind it. `fp8`: layers' frozen matrices are kept as [`Model::quantize_frozen`] says.
    pub fn load_by_stages(
        config: &ModelConfig,
        weights: &Weights,
        kind: Kind,
        trains: &Trains,
        fp8: bool,
        each: &mut dyn FnMut(&str, Vec<&mut Weight>) -> Result<()>,
    ) -> Result<Model> {
        check_names(config, trains)?;
        let from = From {
            config,
            weights,
            kind,
            trains,
        };
        let pieces = pieces(config, trains)?;
        let matrix = |name: &str, module| from.vocabulary_matrix(name, trains.group(module));
        let mut embedding = matrix(&format!("{}.weight", config.names().embedding), FullModule::EmbedTokens)?;
        let positions_td = config.names().positions.map(|name| {
            let shape = [config.max_position_embeddings as i64, config.hidden_size as i64];
            let group = trains.group(FullModule::Positions);
            from.read(format!("{name}.weight"), &shape, group)
        });
        let mut positions_td = positions_td.transpose()?;
        let rows = embedding.value.size()[0];
        each(EMBEDDING, embedding_weights(&mut embedding, &mut positions_td))?;
        let mut layers = Vec::with_capacity(config.num_hidden_layers);
        for index in 0..config.num_hidden_layers {
            let mut layer = from.layer(index)?;
            if fp8 {
                quantize(&mut layer)?;
            }
            each(&layer_name(index), layer.weights_mut())?;
            layers.push(layer);
        }
        let mut head = Head {
            norm: from.norm(config.names().final_norm)?,
            pieces: pieces as i64,
            rows,
            room: None,
        };
        let mut head_weight = match config.tie_word_embeddings {
            true => None,
            false => Some(matrix("lm_head.weight", FullModule::LmHead)?),
        };
        each(HEAD, head.norm.weights_mut().chain(&mut head_weight).collect())?;
        let rotary = match config.family {
            Family::Llama {
                rope_theta,
                rope_scaling,
            } => Some(Rotary::new(longest(config), config.head_dim, rope_theta, rope_scaling).on(weights.device())),
            Family::Gpt2 { .. } => None,
        };
        Ok(Model {
            rotary,
            positions_td,
            config: ModelConfig {
                vocab_size: pieces,
                ..config.clone()
            },
            embedding,
            layers,
            head,
            head_weight,
            kind,
            stream: kind,
            device: weights.device(),
        })
    }

    /// The same model with its residual stream kept as the plan says.
    pub fn with_residual(mut self, residual: Residual) -> Model {
        self.stream = match residual {
            Residual::Compute => self.kind,
            Residual::F32 => Kind::Float,
        };
        self
    }

    /// Every weight of an equal model without LoRA, under Hugging Face's names and as it stores them, in its order; f32,
    /// padding rows left out. Each is made when it is asked for: together they are twice the model.
    pub fn merged_weights<'a>(&'a self) -> Vec<(String, Merged<'a>)> {
        let plain = |weight: &'a Weight| -> (String, Merged<'a>) {
            let value = &weight.value;
            (weight.name.clone(), Box::new(move || value.to_kind(Kind::Float)))
        };
        let pieces = |weight: &'a Weight| -> (String, Merged<'a>) {
            let (value, pieces) = (&weight.value, self.head.pieces);
            let make = move || value.narrow(0, 0, pieces).to_kind(Kind::Float);
            (weight.name.clone(), Box::new(make))
        };
        let mut all = vec![pieces(&self.embedding)];
        all.extend(self.positions_td.iter().map(plain));
        for layer in &self.layers {
            for linear in layer.linears() {
                let make = move || self.stored(&linear.merged());
                all.push((linear.weight_oi.name.clone(), Box::new(make)));
                all.extend(linear.bias_o.iter().map(plain));
            }
            all.extend(layer.norms().into_iter().flat_map(Norm::weights).map(plain));
        }
        all.extend(self.head.norm.weights().map(plain));
        all.extend(self.head_weight.iter().map(pieces));
        all
    }

    /// A linear's matrix [out, in] as Hugging Face stores it for this family.
    pub fn stored(&self, weight_oi: &Tensor) -> Tensor {
        stored(&self.config, weight_oi)
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
            length <= self.longest(),
            "{what} = {length} exceeds the model's {} positions ({}); choose at most that many",
            self.longest(),
            match self.longest() < self.config.max_position_embeddings {
                true => "as many as this program has a table for",
                false => "max_position_embeddings",
            }
        );
        Ok(())
    }

    /// Positions of the longest row.
    pub fn longest(&self) -> usize {
        longest(&self.config)
    }
}

/// The table of a model for a million positions would be half a gigabyte, and nobody trains on such rows here.
const MOST_POSITIONS: usize = 1 << 18;

fn longest(config: &ModelConfig) -> usize {
    config.max_position_embeddings.min(MOST_POSITIONS)
}

/// [out, in] to how Hugging Face stores it and back: the two differ by a transposition, or not at all.
fn stored(config: &ModelConfig, weight: &Tensor) -> Tensor {
    match config.names().stored_transposed {
        false => weight.shallow_clone(),
        true => weight.tr().contiguous(),
    }
}

/// What a config names must be there: a target that matches nothing would train nothing, in silence.
fn check_names(config: &ModelConfig, trains: &Trains) -> Result<()> {
    let mut linears: Vec<&str> = Vec::new();
    for name in config.linears().iter().flatten().map(|linear| linear.module.name()) {
        // GPT-2 has two of one name.
        if !linears.contains(&name) {
            linears.push(name);
        }
    }
    for target in trains.lora.iter().flat_map(|lora| &lora.targets) {
        ensure!(
            linears.contains(&target.as_str()),
            "train.lora.targets names {target}, which matches no module of this model; its linears are {}",
            linears.join(", ")
        );
    }
    // All modules of all families stand for every parameter.
    if trains.full.len() == FullModule::ALL.len() {
        return Ok(());
    }
    let modules: &[FullModule] = match config.family {
        Family::Llama { .. } => &FullModule::OF_LLAMA,
        Family::Gpt2 { .. } => &FullModule::OF_GPT2,
    };
    for module in &trains.full {
        let names: Vec<&str> = modules.iter().map(|module| module.name()).collect();
        ensure!(
            modules.contains(module),
            "train.full names {}, which matches no module of this model; its modules are {}",
            module.name(),
            names.join(", ")
        );
    }
    Ok(())
}

/// Where a model is read from.
struct From<'a> {
    config: &'a ModelConfig,
    weights: &'a Weights,
    kind: Kind,
    trains: &'a Trains,
}

impl From<'_> {
    /// A tensor of the base, in the compute precision; what trains keeps f32 until it is bound, since its master weights
    /// start from here.
    fn read(&self, name: String, shape: &[i64], group: Option<Group>) -> Result<Weight> {
        let kind = if group.is_some() { Kind::Float } else { self.kind };
        Ok(Weight {
            value: self.weights.tensor(&name, shape, kind)?,
            name,
            grad: None,
            group,
        })
    }

    /// The embedding or the head, with rows for new pieces.
    fn vocabulary_matrix(&self, name: &str, group: Option<Group>) -> Result<Weight> {
        let shape = [self.config.vocab_size as i64, self.config.hidden_size as i64];
        let grown = self.trains.vocabulary.as_ref();
        let Some((vocabulary, how)) = grown.filter(|(vocabulary, _)| !vocabulary.pieces.is_empty()) else {
            return self.read(name.to_owned(), &shape, group);
        };
        let base = self.weights.tensor(name, &shape, Kind::Float)?;
        let value = new_rows::extend(&base, vocabulary, *how, self.trains.seed, name);
        Ok(Weight {
            name: name.to_owned(),
            value: if group.is_some() {
                value
            } else {
                value.to_kind(self.kind)
            },
            grad: None,
            group,
        })
    }

    /// The bias of a module, where the family has them; in the norms' group, whichever module it is of.
    fn bias(&self, path: &str, size: i64, trains: bool) -> Result<Option<Weight>> {
        let has = self.config.names().biases;
        has.then(|| self.read(format!("{path}.bias"), &[size], trains.then_some(Group::Norms)))
            .transpose()
    }

    fn norm(&self, path: &str) -> Result<Norm> {
        let (dim, group) = (self.config.hidden_size as i64, self.trains.group(FullModule::Norms));
        Ok(Norm {
            weight_d: self.read(format!("{path}.weight"), &[dim], group)?,
            bias_d: self.bias(path, dim, group.is_some())?,
            epsilon: self.config.norm_epsilon,
        })
    }

    /// `within` is the layer's path.
    fn linear(&self, within: &str, shape: &LinearShape) -> Result<Linear> {
        let LinearShape {
            path,
            module,
            out,
            input,
        } = *shape;
        let path = format!("{within}.{path}");
        let group = self.trains.group(module);
        let size = match self.config.names().stored_transposed {
            false => [out, input],
            true => [input, out],
        };
        let mut weight_oi = self.read(format!("{path}.weight"), &size, group)?;
        weight_oi.value = stored(self.config, &weight_oi.value);
        let lora = self.trains.lora.as_ref();
        let lora = lora.filter(|lora| lora.targets.iter().any(|target| target == module.name()));
        let lora = lora.map(|lora| lora_pair(&path, lora, out, input, self.trains.seed, self.weights.device()));
        Ok(Linear {
            bias_o: self.bias(&path, out, group.is_some())?,
            path,
            weight_oi,
            lora,
            fp8: None,
        })
    }

    fn layer(&self, index: usize) -> Result<Layer> {
        let (config, names) = (self.config, self.config.names());
        let within = format!("{}.{index}", names.layers);
        let layer = || -> Result<Layer> {
            let read = |shapes: Vec<LinearShape>| -> Result<Vec<Linear>> {
                shapes.iter().map(|shape| self.linear(&within, shape)).collect()
            };
            let [attention, mlp] = config.linears();
            let (mut attention, mut mlp) = (read(attention)?.into_iter(), read(mlp)?.into_iter());
            let mut in_attention = || attention.next().expect("as many as the family has");
            let mut in_mlp = || mlp.next().expect("as many as the family has");
            Ok(Layer {
                attention_norm: self.norm(&format!("{within}.{}", names.attention_norm))?,
                qkv: match config.family {
                    Family::Llama { .. } => Qkv::Apart {
                        q: in_attention(),
                        k: in_attention(),
                        v: in_attention(),
                    },
                    Family::Gpt2 { .. } => Qkv::Fused(in_attention()),
                },
                o: in_attention(),
                mlp_norm: self.norm(&format!("{within}.{}", names.mlp_norm))?,
                mlp: match config.family {
                    Family::Llama { .. } => Mlp::SwiGlu {
                        gate: in_mlp(),
                        up: in_mlp(),
                        down: in_mlp(),
                    },
                    Family::Gpt2 { activation } => Mlp::Gelu {
                        fc: in_mlp(),
                        proj: in_mlp(),
                        form: activation,
                    },
                },
                heads: config.num_attention_heads as i64,
                kv_heads: config.num_key_value_heads as i64,
                head_dim: config.head_dim as i64,
            })
        };
        layer().with_context(|| format!("layer {index}"))
    }
}

/// Rows of the vocabulary matrices.
fn pieces(config: &ModelConfig, trains: &Trains) -> Result<usize> {
    let (embed, head) = (trains.group(FullModule::EmbedTokens), trains.group(FullModule::LmHead));
    ensure!(
        !config.tie_word_embeddings || embed.is_some() == head.is_some(),
        "the base ties lm_head to embed_tokens, but train.full names only one of them; name both or neither"
    );
    let Some((vocabulary, _)) = &trains.vocabulary else {
        return Ok(config.vocab_size);
    };
    ensure!(
        vocabulary.base_size <= config.vocab_size,
        "the vocabulary extends a base of {} pieces but this model has {}; make the vocabulary again from this base",
        vocabulary.base_size,
        config.vocab_size
    );
    // A base may have more rows than its tokenizer has pieces; new pieces take the first unused ones.
    Ok(match vocabulary.pieces.is_empty() {
        true => vocabulary.size.max(config.vocab_size),
        false => vocabulary.size,
    })
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
