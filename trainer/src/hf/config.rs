//! `config.json` of a LLaMA or GPT-2 model, in the forms that `transformers` 4 and 5 write. What we would compute wrongly is
//! refused here, so that everything behind may trust the sizes.

use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use configs::{FullModule, Gelu};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

/// Sizes and constants of a model, by the names that Hugging Face's `config.json` has for them in LLaMA.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelConfig {
    /// Rows of the embedding and head matrices; a tokenizer may have fewer pieces.
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    pub num_key_value_heads: usize,
    pub head_dim: usize,
    pub norm_epsilon: f64,
    pub max_position_embeddings: usize,
    pub tie_word_embeddings: bool,
    pub bos_token_id: Option<u32>,
    /// Tokens that end a text: none, one or several.
    pub eos_token_id: Vec<u32>,
    pub family: Family,
}

/// What a block is made of.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "model_type", rename_all = "lowercase")]
pub enum Family {
    /// RMSNorm, SwiGLU, rotary positions, no biases (Touvron et al. 2023).
    Llama {
        rope_theta: f64,
        /// `None`: positions as they are.
        rope_scaling: Option<RopeScaling>,
    },
    /// LayerNorm before each part, GELU, learned positions, biases everywhere (Radford et al. 2019). PolyLM is one.
    Gpt2 { activation: Gelu },
}

/// What Hugging Face calls the parts of a family's models, and how it stores them.
pub struct Names {
    pub embedding: &'static str,
    /// Of learned positions.
    pub positions: Option<&'static str>,
    /// Of the list of layers; the other names but `final_norm` are within a layer.
    pub layers: &'static str,
    pub attention_norm: &'static str,
    pub mlp_norm: &'static str,
    pub final_norm: &'static str,
    /// Norms and linears have biases.
    pub biases: bool,
    /// Linears are stored [in, out] (`Conv1D`), not [out, in].
    pub stored_transposed: bool,
}

const LLAMA: Names = Names {
    embedding: "model.embed_tokens",
    positions: None,
    layers: "model.layers",
    attention_norm: "input_layernorm",
    mlp_norm: "post_attention_layernorm",
    final_norm: "model.norm",
    biases: false,
    stored_transposed: false,
};

const GPT2: Names = Names {
    embedding: "transformer.wte",
    positions: Some("transformer.wpe"),
    layers: "transformer.h",
    attention_norm: "ln_1",
    mlp_norm: "ln_2",
    final_norm: "transformer.ln_f",
    biases: true,
    stored_transposed: true,
};

impl Family {
    pub fn names(&self) -> &'static Names {
        match self {
            Family::Llama { .. } => &LLAMA,
            Family::Gpt2 { .. } => &GPT2,
        }
    }
}

/// A linear map of every layer.
pub struct LinearShape {
    /// Within the layer: "self_attn.q_proj".
    pub path: &'static str,
    pub module: FullModule,
    pub out: i64,
    pub input: i64,
}

/// How rotary frequencies are changed for contexts longer than those of the first training.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "rope_type", rename_all = "lowercase")]
pub enum RopeScaling {
    /// Every frequency divided by `factor` (Chen et al. 2023, "position interpolation").
    Linear { factor: f64 },
    /// Llama 3.1's: low frequencies divided by `factor`, high ones kept, those between blended.
    Llama3 {
        factor: f64,
        low_freq_factor: f64,
        high_freq_factor: f64,
        original_max_position_embeddings: usize,
    },
}

impl RopeScaling {
    /// A frequency in radians a position, scaled.
    pub fn scaled(self, frequency: f64) -> f64 {
        match self {
            RopeScaling::Linear { factor } => frequency / factor,
            RopeScaling::Llama3 {
                factor,
                low_freq_factor: low,
                high_freq_factor: high,
                original_max_position_embeddings: length,
            } => {
                // Turns that fit into the first training's context.
                let turns = length as f64 * frequency / std::f64::consts::TAU;
                let kept = ((turns - low) / (high - low)).clamp(0.0, 1.0);
                frequency * (kept + (1.0 - kept) / factor)
            }
        }
    }
}

impl ModelConfig {
    /// Reads `config.json` in `dir`.
    ///
    /// # Errors
    /// When it cannot be read, or describes a model that this program would compute wrongly.
    pub fn open(dir: &Path) -> Result<ModelConfig> {
        let path = dir.join("config.json");
        let text = std::fs::read(&path).with_context(|| {
            format!(
                "{} cannot be read; a model folder holds config.json as `transformers` writes it",
                path.display()
            )
        })?;
        let value: Value = serde_json::from_slice(&text).with_context(|| format!("{} is not JSON", path.display()))?;
        let object = value
            .as_object()
            .with_context(|| format!("{} is not a JSON object", path.display()))?;
        ModelConfig::from_json(object).with_context(|| path.display().to_string())
    }

    /// Reads the fields of a `config.json`. Absent fields take the values that `transformers` gives them.
    pub fn from_json(object: &Map<String, Value>) -> Result<ModelConfig> {
        let fields = Fields(object);
        fields.must_be("model_type", &["llama", "gpt2"], "llama")?;
        ensure!(
            fields.present("quantization_config").is_none(),
            "quantization_config is present, but this program reads f32, bf16 and f16 weights; \
             save the model dequantised (`model.dequantize().save_pretrained(…)`)"
        );
        match fields.present("model_type").and_then(Value::as_str) {
            Some("gpt2") => gpt2(&fields),
            _ => llama(&fields),
        }
    }

    /// `config.json` as both `transformers` 4 (`rope_theta`, `torch_dtype`) and 5 (`rope_parameters`, `dtype`) read it.
    /// `dtype` is that of the stored weights: "float32", "bfloat16" or "float16".
    pub fn to_json(&self, dtype: &str) -> Value {
        let mut all = match self.family {
            Family::Llama {
                rope_theta,
                rope_scaling,
            } => self.llama_json(rope_theta, rope_scaling),
            Family::Gpt2 { activation } => self.gpt2_json(activation),
        };
        let ends = match &self.eos_token_id[..] {
            [] => Value::Null,
            [one] => json!(one),
            several => json!(several),
        };
        let shared = json!({
            "vocab_size": self.vocab_size,
            "tie_word_embeddings": self.tie_word_embeddings,
            "initializer_range": 0.02,
            "use_cache": true,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": ends,
            "torch_dtype": dtype,
            "dtype": dtype,
        });
        if let (Value::Object(all), Value::Object(shared)) = (&mut all, shared) {
            all.extend(shared);
        }
        all
    }

    fn llama_json(&self, rope_theta: f64, rope_scaling: Option<RopeScaling>) -> Value {
        let scaling = rope_scaling.map(|scaling| json!(scaling));
        let mut rope = scaling.clone().unwrap_or_else(|| json!({ "rope_type": "default" }));
        rope["rope_theta"] = json!(rope_theta);
        json!({
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "rms_norm_eps": self.norm_epsilon,
            "rope_theta": rope_theta,
            "rope_scaling": scaling,
            "rope_parameters": rope,
            "max_position_embeddings": self.max_position_embeddings,
            "attention_bias": false,
            "attention_dropout": 0.0,
            "mlp_bias": false,
            "pretraining_tp": 1,
        })
    }

    fn gpt2_json(&self, activation: Gelu) -> Value {
        json!({
            "architectures": ["GPT2LMHeadModel"],
            "model_type": "gpt2",
            "n_embd": self.hidden_size,
            "n_inner": self.intermediate_size,
            "n_layer": self.num_hidden_layers,
            "n_head": self.num_attention_heads,
            "n_positions": self.max_position_embeddings,
            "layer_norm_epsilon": self.norm_epsilon,
            "activation_function": activation.name(),
            "scale_attn_weights": true,
            "scale_attn_by_inverse_layer_idx": false,
            "reorder_and_upcast_attn": false,
            "add_cross_attention": false,
            "attn_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "resid_pdrop": 0.0,
        })
    }

    /// Writes `config.json` into `dir`, synced; see [`ModelConfig::to_json`].
    pub fn write(&self, dir: &Path, dtype: &str) -> Result<()> {
        super::folder::write_json(&dir.join("config.json"), &self.to_json(dtype))
    }

    pub fn names(&self) -> &'static Names {
        self.family.names()
    }

    /// The linears of every layer: those of attention and those of the MLP, in the model's order.
    pub fn linears(&self) -> [Vec<LinearShape>; 2] {
        let (dim, feed_forward) = (self.hidden_size as i64, self.intermediate_size as i64);
        let q = (self.num_attention_heads * self.head_dim) as i64;
        let kv = (self.num_key_value_heads * self.head_dim) as i64;
        let linear = |path, module, out, input| LinearShape {
            path,
            module,
            out,
            input,
        };
        match self.family {
            Family::Llama { .. } => [
                vec![
                    linear("self_attn.q_proj", FullModule::QProj, q, dim),
                    linear("self_attn.k_proj", FullModule::KProj, kv, dim),
                    linear("self_attn.v_proj", FullModule::VProj, kv, dim),
                    linear("self_attn.o_proj", FullModule::OProj, dim, q),
                ],
                vec![
                    linear("mlp.gate_proj", FullModule::GateProj, feed_forward, dim),
                    linear("mlp.up_proj", FullModule::UpProj, feed_forward, dim),
                    linear("mlp.down_proj", FullModule::DownProj, dim, feed_forward),
                ],
            ],
            Family::Gpt2 { .. } => [
                vec![
                    linear("attn.c_attn", FullModule::CAttn, 3 * dim, dim),
                    linear("attn.c_proj", FullModule::CProj, dim, dim),
                ],
                vec![
                    linear("mlp.c_fc", FullModule::CFc, feed_forward, dim),
                    linear("mlp.c_proj", FullModule::CProj, dim, feed_forward),
                ],
            ],
        }
    }

    /// Every parameter by Hugging Face's name with its shape as Hugging Face stores it, in the model's order. A tied head is
    /// not listed.
    pub fn parameter_shapes(&self) -> Vec<(String, Vec<i64>)> {
        let all = self.parameters().into_iter();
        all.map(|Parameter { name, shape, .. }| (name, shape)).collect()
    }

    /// The same with the module that each is of.
    pub fn parameters(&self) -> Vec<Parameter> {
        let (vocabulary, dim) = (self.vocab_size as i64, self.hidden_size as i64);
        let names = self.names();
        let [attention, mlp] = self.linears();
        let parameter = |name: String, shape: Vec<i64>, module| Parameter { name, shape, module };
        let weight = |path: &str, shape, module| parameter(format!("{path}.weight"), shape, module);
        let mut all = vec![weight(names.embedding, vec![vocabulary, dim], FullModule::EmbedTokens)];
        if let Some(positions) = names.positions {
            let shape = vec![self.max_position_embeddings as i64, dim];
            all.push(weight(positions, shape, FullModule::Positions));
        }
        let with_bias = |path: &str, shape: Vec<i64>, out: i64, module| {
            let bias = names
                .biases
                .then(|| parameter(format!("{path}.bias"), vec![out], module));
            std::iter::once(weight(path, shape, module)).chain(bias)
        };
        for layer in 0..self.num_hidden_layers {
            let within = |path: &str| format!("{}.{layer}.{path}", names.layers);
            for (norm, linears) in [(names.attention_norm, &attention), (names.mlp_norm, &mlp)] {
                all.extend(with_bias(&within(norm), vec![dim], dim, FullModule::Norms));
                for linear in linears {
                    let shape = match names.stored_transposed {
                        false => vec![linear.out, linear.input],
                        true => vec![linear.input, linear.out],
                    };
                    all.extend(with_bias(&within(linear.path), shape, linear.out, linear.module));
                }
            }
        }
        all.extend(with_bias(names.final_norm, vec![dim], dim, FullModule::Norms));
        if !self.tie_word_embeddings {
            all.push(weight("lm_head", vec![vocabulary, dim], FullModule::LmHead));
        }
        all
    }
}

/// A tensor of a model.
pub struct Parameter {
    /// Hugging Face's.
    pub name: String,
    /// As Hugging Face stores it.
    pub shape: Vec<i64>,
    pub module: FullModule,
}

/// What a parameter of this name is before anything is known of it: norms are 1, biases 0, all else is drawn.
pub enum Start {
    Ones,
    Zeros,
    Drawn,
}

impl Start {
    pub fn of(name: &str) -> Start {
        let in_norm = |part: &str| part.ends_with("norm") || part.starts_with("ln_");
        match name.rsplit_once('.') {
            Some((_, "bias")) => Start::Zeros,
            Some((module, "weight")) if module.rsplit('.').next().is_some_and(in_norm) => Start::Ones,
            _ => Start::Drawn,
        }
    }
}

fn llama(fields: &Fields) -> Result<ModelConfig> {
    fields.must_be("hidden_act", &["silu", "swish"], "silu")?;
    for bias in ["attention_bias", "mlp_bias"] {
        ensure!(
            !fields.bool(bias, false)?,
            "{bias} = true, but this program computes LLaMA's linears without biases; use a model without them"
        );
    }
    let pretraining_tp = fields.count("pretraining_tp", Some(1))?;
    ensure!(
        pretraining_tp == 1,
        "pretraining_tp = {pretraining_tp} splits matrices in a way this program does not compute; set it to 1 in \
         config.json (the weights are the same)"
    );
    let hidden_size = fields.count("hidden_size", None)?;
    let num_attention_heads = fields.count("num_attention_heads", None)?;
    let num_key_value_heads = fields.count("num_key_value_heads", Some(num_attention_heads))?;
    let head_dim = match fields.present("head_dim") {
        Some(_) => fields.count("head_dim", None)?,
        None => {
            ensure!(
                hidden_size.is_multiple_of(num_attention_heads),
                "hidden_size = {hidden_size} is not a multiple of num_attention_heads = {num_attention_heads}, \
                 and head_dim is not given; add head_dim"
            );
            hidden_size / num_attention_heads
        }
    };
    ensure!(
        num_attention_heads.is_multiple_of(num_key_value_heads),
        "num_attention_heads = {num_attention_heads} is not a multiple of num_key_value_heads = \
         {num_key_value_heads}, so key/value heads cannot be shared evenly; check config.json against the weights"
    );
    ensure!(
        head_dim.is_multiple_of(2),
        "head_dim = {head_dim} is odd, but rotary positions turn pairs of elements; check config.json"
    );
    Ok(ModelConfig {
        vocab_size: fields.count("vocab_size", None)?,
        hidden_size,
        intermediate_size: fields.count("intermediate_size", None)?,
        num_hidden_layers: fields.count("num_hidden_layers", None)?,
        num_attention_heads,
        num_key_value_heads,
        head_dim,
        norm_epsilon: fields.positive("rms_norm_eps", Some(1e-6))?,
        max_position_embeddings: fields.count("max_position_embeddings", Some(2048))?,
        tie_word_embeddings: fields.bool("tie_word_embeddings", false)?,
        bos_token_id: fields.tokens("bos_token_id")?.first().copied(),
        eos_token_id: fields.tokens("eos_token_id")?,
        family: Family::Llama {
            rope_theta: rope_theta(fields)?,
            rope_scaling: rope_scaling(fields)?,
        },
    })
}

/// The dropout probabilities (`attn_pdrop`, `embd_pdrop`, `resid_pdrop`) are not applied: continued pretraining goes
/// without, and what is written has them at 0.
fn gpt2(fields: &Fields) -> Result<ModelConfig> {
    ensure!(
        fields.bool("scale_attn_weights", true)?,
        "scale_attn_weights = false, but this program divides attention's scores by √head_dim; use a model that does"
    );
    for key in [
        "scale_attn_by_inverse_layer_idx",
        "reorder_and_upcast_attn",
        "add_cross_attention",
    ] {
        ensure!(
            !fields.bool(key, false)?,
            "{key} = true, which this program does not compute; use a model without it"
        );
    }
    let hidden_size = fields.count("n_embd", None)?;
    let heads = fields.count("n_head", None)?;
    ensure!(
        hidden_size.is_multiple_of(heads),
        "n_embd = {hidden_size} is not a multiple of n_head = {heads}, so heads have no width; check config.json \
         against the weights"
    );
    let activation = match fields.present("activation_function").map(Value::as_str) {
        None => Some(Gelu::Tanh),
        Some(name) => name.and_then(Gelu::from_name),
    };
    let activation = activation.with_context(|| {
        format!(
            "activation_function = {}, but this program computes gelu_new (also called gelu_fast and gelu_pytorch_tanh) \
             and gelu only; use a model with one of them",
            fields.0["activation_function"]
        )
    })?;
    Ok(ModelConfig {
        vocab_size: fields.count("vocab_size", None)?,
        hidden_size,
        intermediate_size: fields.count("n_inner", Some(4 * hidden_size))?,
        num_hidden_layers: fields.count("n_layer", None)?,
        num_attention_heads: heads,
        num_key_value_heads: heads,
        head_dim: hidden_size / heads,
        norm_epsilon: fields.positive("layer_norm_epsilon", Some(1e-5))?,
        max_position_embeddings: fields.count("n_positions", Some(1024))?,
        tie_word_embeddings: fields.bool("tie_word_embeddings", true)?,
        bos_token_id: fields.tokens("bos_token_id")?.first().copied(),
        eos_token_id: fields.tokens("eos_token_id")?,
        family: Family::Gpt2 { activation },
    })
}

/// RoPE's base, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before).
fn rope_theta(fields: &Fields) -> Result<f64> {
    let mut theta = fields
        .present("rope_theta")
        .map(|_| fields.positive("rope_theta", None))
        .transpose()?;
    for form in ["rope_parameters", "rope_scaling"] {
        let Some(value) = fields.present(form) else { continue };
        let rope = Fields(
            value
                .as_object()
                .with_context(|| format!("{form} = {value} is not an object"))?,
        );
        if rope.present("rope_theta").is_some() {
            let inner = rope.positive("rope_theta", None)?;
            ensure!(
                theta.is_none_or(|outer| outer == inner),
                "rope_theta is {} at the top of the file and {inner} in {form}; make them agree",
                theta.unwrap_or_default()
            );
            theta = Some(inner);
        }
    }
    let share = fields
        .present("partial_rotary_factor")
        .and_then(Value::as_f64)
        .unwrap_or(1.0);
    ensure!(
        share == 1.0,
        "partial_rotary_factor = {share}, but this program turns whole heads; use a model where it is 1"
    );
    Ok(theta.unwrap_or(10_000.0))
}

/// From `rope_parameters` or `rope_scaling`; where a file has both, they must agree.
fn rope_scaling(fields: &Fields) -> Result<Option<RopeScaling>> {
    let mut found: Option<(&str, Option<RopeScaling>)> = None;
    for form in ["rope_parameters", "rope_scaling"] {
        let Some(object) = fields.present(form).and_then(Value::as_object) else {
            continue;
        };
        let rope = Fields(object);
        let kind = rope
            .present("rope_type")
            .or(rope.present("type"))
            .and_then(Value::as_str);
        let read = || -> Result<Option<RopeScaling>> {
            Ok(match kind.unwrap_or("default") {
                "default" => None,
                "linear" => Some(RopeScaling::Linear {
                    factor: rope.positive("factor", None)?,
                }),
                "llama3" => {
                    let (low, high) = (
                        rope.positive("low_freq_factor", None)?,
                        rope.positive("high_freq_factor", None)?,
                    );
                    ensure!(
                        low < high,
                        "low_freq_factor = {low} is not below high_freq_factor = {high}"
                    );
                    Some(RopeScaling::Llama3 {
                        factor: rope.positive("factor", None)?,
                        low_freq_factor: low,
                        high_freq_factor: high,
                        original_max_position_embeddings: rope.count("original_max_position_embeddings", None)?,
                    })
                }
                kind => bail!(
                    "rope_type = \"{kind}\", but this program computes default, linear and llama3; use a model with one of them"
                ),
            })
        };
        let scaling = read().with_context(|| form.to_owned())?;
        match found {
            Some((first, other)) if other != scaling => {
                bail!("{first} and {form} say different things; make them agree")
            }
            _ => found = Some((form, scaling)),
        }
    }
    Ok(found.and_then(|(_, scaling)| scaling))
}

/// Typed access to a JSON object; null counts as absent.
struct Fields<'a>(&'a Map<String, Value>);

impl<'a> Fields<'a> {
    fn present(&self, name: &str) -> Option<&'a Value> {
        self.0.get(name).filter(|value| !value.is_null())
    }

    fn must_be(&self, name: &str, known: &[&str], default: &str) -> Result<()> {
        let value = self.present(name).cloned().unwrap_or(json!(default));
        ensure!(
            value.as_str().is_some_and(|text| known.contains(&text)),
            "{name} = {value}, but this program computes {name} = {known:?} only; \
             use a model with it"
        );
        Ok(())
    }

    fn bool(&self, name: &str, default: bool) -> Result<bool> {
        self.present(name)
            .map_or(Ok(default), |value| must(name, value, value.as_bool(), "true or false"))
    }

    /// A positive whole number.
    fn count(&self, name: &str, default: Option<usize>) -> Result<usize> {
        match (self.present(name), default) {
            (Some(value), _) => {
                let count = value
                    .as_u64()
                    .and_then(|count| usize::try_from(count).ok())
                    .filter(|&count| count > 0);
                // Larger sizes than these exist in no model, and would overflow where they are multiplied.
                must(
                    name,
                    value,
                    count.filter(|&count| count < 1 << 31),
                    "a whole number from 1 to 2147483647",
                )
            }
            (None, Some(default)) => Ok(default),
            (None, None) => bail!("{name} is missing; copy it from the model's published config.json"),
        }
    }

    fn positive(&self, name: &str, default: Option<f64>) -> Result<f64> {
        match (self.present(name), default) {
            (Some(value), _) => must(
                name,
                value,
                value.as_f64().filter(|v| v.is_finite() && *v > 0.0),
                "a number above 0",
            ),
            (None, Some(default)) => Ok(default),
            (None, None) => bail!("{name} is missing; copy it from the model's published config.json"),
        }
    }

    fn tokens(&self, name: &str) -> Result<Vec<u32>> {
        let several = match self.present(name) {
            None => &[],
            Some(Value::Array(several)) => &several[..],
            Some(one) => std::slice::from_ref(one),
        };
        let id = |value: &Value| {
            let id = value.as_u64().and_then(|id| u32::try_from(id).ok());
            must(name, value, id, "a token's number, or a list of them")
        };
        several.iter().map(id).collect()
    }
}

fn must<T>(name: &str, value: &Value, read: Option<T>, rule: &str) -> Result<T> {
    read.with_context(|| format!("{name} = {value} is not {rule}; correct it in config.json"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn llama() -> Value {
        json!({ "model_type": "llama", "vocab_size": 40, "hidden_size": 8, "intermediate_size": 12,
            "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_act": "silu", "rms_norm_eps": 1e-5 })
    }

    fn gpt2() -> Value {
        json!({ "model_type": "gpt2", "vocab_size": 40, "n_embd": 8, "n_layer": 2, "n_head": 4, "n_positions": 16,
            "hidden_size": null, "num_hidden_layers": null })
    }

    fn read(changes: Value) -> Result<ModelConfig> {
        read_over(llama(), changes)
    }

    fn read_over(mut value: Value, changes: Value) -> Result<ModelConfig> {
        let object = value.as_object_mut().unwrap();
        object.extend(changes.as_object().unwrap().clone());
        ModelConfig::from_json(object)
    }

    #[test]
    fn both_forms_of_rope_are_read() {
        let rope = |theta| Family::Llama {
            rope_theta: theta,
            rope_scaling: None,
        };
        assert_eq!(read(json!({})).unwrap().family, rope(10_000.0));
        let forms = [
            json!({ "rope_theta": 5e5 }),
            json!({ "rope_theta": 5e5, "rope_scaling": null }),
            json!({ "rope_parameters": { "rope_type": "default", "rope_theta": 5e5 } }),
            json!({ "rope_theta": 5e5, "rope_parameters": { "rope_type": "default", "rope_theta": 5e5 } }),
        ];
        for form in forms {
            assert_eq!(read(form.clone()).unwrap().family, rope(5e5), "{form}");
        }
    }

    #[test]
    fn what_is_written_is_read_back() {
        let config = read(
            json!({ "num_key_value_heads": 2, "head_dim": 6, "tie_word_embeddings": true,
            "bos_token_id": 1, "eos_token_id": [2, 3], "rope_theta": 123_456.5 }),
        )
        .unwrap();
        assert_eq!(config.eos_token_id, [2, 3]);
        assert_eq!(config.to_json("float32")["eos_token_id"], json!([2, 3]));
        let written = config.to_json("bfloat16");
        assert_eq!(ModelConfig::from_json(written.as_object().unwrap()).unwrap(), config);
    }

    #[test]
    fn shapes_are_those_of_the_architecture() {
        let shapes = |changes| read(changes).unwrap().parameter_shapes();
        let untied = shapes(json!({ "num_key_value_heads": 2, "head_dim": 6 }));
        assert_eq!(untied.len(), 3 + 2 * 9);
        let shape = |name: &str| untied.iter().find(|(n, _)| n == name).unwrap().1.clone();
        assert_eq!(shape("model.layers.1.self_attn.q_proj.weight"), [24, 8]);
        assert_eq!(shape("model.layers.1.self_attn.v_proj.weight"), [12, 8]);
        assert_eq!(shape("model.layers.0.self_attn.o_proj.weight"), [8, 24]);
        assert_eq!(shape("lm_head.weight"), [40, 8]);
        assert!(
            !shapes(json!({ "tie_word_embeddings": true }))
                .iter()
                .any(|(name, _)| name == "lm_head.weight")
        );
    }

    #[test]
    fn what_would_be_computed_wrongly_is_refused() {
        let wrong = [
            (json!({ "model_type": "bloom" }), "model_type = \"bloom\""),
            (json!({ "hidden_act": "gelu" }), "hidden_act = \"gelu\""),
            (json!({ "attention_bias": true }), "attention_bias = true"),
            (json!({ "mlp_bias": true }), "mlp_bias = true"),
            (
                json!({ "rope_scaling": { "type": "yarn", "factor": 2 } }),
                "rope_scaling: rope_type = \"yarn\"",
            ),
            (
                json!({ "rope_parameters": { "rope_type": "llama3", "rope_theta": 1e4 } }),
                "rope_parameters: low_freq_factor is missing",
            ),
            (
                json!({ "rope_scaling": { "type": "linear", "factor": 2 }, "rope_parameters": { "rope_type": "default" } }),
                "say different things",
            ),
            (
                json!({ "rope_theta": 1e4, "rope_parameters": { "rope_theta": 2e4 } }),
                "make them agree",
            ),
            (json!({ "num_key_value_heads": 3 }), "num_key_value_heads = 3"),
            (json!({ "hidden_size": 9 }), "hidden_size = 9 is not a multiple"),
            (json!({ "head_dim": 3 }), "head_dim = 3 is odd"),
            (json!({ "num_hidden_layers": 0 }), "num_hidden_layers = 0"),
            (json!({ "vocab_size": null }), "vocab_size is missing"),
            (json!({ "vocab_size": -5 }), "vocab_size = -5"),
            (json!({ "rms_norm_eps": "small" }), "rms_norm_eps = \"small\""),
            (json!({ "quantization_config": {} }), "quantization_config is present"),
            (json!({ "pretraining_tp": 2 }), "pretraining_tp = 2"),
            (json!({ "partial_rotary_factor": 0.5 }), "partial_rotary_factor = 0.5"),
        ];
        let wrong = wrong.map(|(changes, sentence)| (llama(), changes, sentence));
        let wrong_gpt2 = [
            (json!({ "scale_attn_weights": false }), "scale_attn_weights = false"),
            (
                json!({ "scale_attn_by_inverse_layer_idx": true }),
                "scale_attn_by_inverse_layer_idx = true",
            ),
            (
                json!({ "reorder_and_upcast_attn": true }),
                "reorder_and_upcast_attn = true",
            ),
            (json!({ "add_cross_attention": true }), "add_cross_attention = true"),
            (
                json!({ "activation_function": "relu" }),
                "activation_function = \"relu\"",
            ),
            (json!({ "n_head": 3 }), "n_embd = 8 is not a multiple of n_head = 3"),
            (json!({ "n_embd": null }), "n_embd is missing"),
            (json!({ "quantization_config": {} }), "quantization_config is present"),
        ];
        let wrong_gpt2 = wrong_gpt2.map(|(changes, sentence)| (gpt2(), changes, sentence));
        for (base, changes, sentence) in wrong.into_iter().chain(wrong_gpt2) {
            let said = format!("{:#}", read_over(base, changes.clone()).unwrap_err());
            assert!(said.contains(sentence), "{changes}: {said}");
        }
    }

    #[test]
    fn gpt2_is_read_with_its_defaults_and_written_back() {
        let plain = read_over(gpt2(), json!({})).unwrap();
        assert_eq!((plain.intermediate_size, plain.norm_epsilon), (32, 1e-5));
        assert!(plain.tie_word_embeddings);
        for (name, activation) in [
            ("gelu", Gelu::Exact),
            ("gelu_fast", Gelu::Tanh),
            ("gelu_new", Gelu::Tanh),
        ] {
            let changes = json!({ "activation_function": name, "n_inner": 20, "tie_word_embeddings": false });
            let config = read_over(gpt2(), changes).unwrap();
            assert_eq!(config.family, Family::Gpt2 { activation });
            let written = config.to_json("bfloat16");
            assert_eq!(ModelConfig::from_json(written.as_object().unwrap()).unwrap(), config);
        }
        let shapes = plain.parameter_shapes();
        assert_eq!(shapes.len(), 2 + 2 * 12 + 2);
        let shape = |name: &str| shapes.iter().find(|(n, _)| n == name).unwrap().1.clone();
        assert_eq!(shape("transformer.wpe.weight"), [16, 8]);
        assert_eq!(shape("transformer.h.1.attn.c_attn.weight"), [8, 24]);
        assert_eq!(shape("transformer.h.1.attn.c_attn.bias"), [24]);
        assert_eq!(shape("transformer.h.0.mlp.c_proj.weight"), [32, 8]);
        assert_eq!(shape("transformer.ln_f.bias"), [8]);
    }

    #[test]
    fn norms_start_at_one_and_biases_at_zero() {
        for (config, ones, zeros) in [
            (read(json!({})).unwrap(), 5, 0),
            (read_over(gpt2(), json!({})).unwrap(), 5, 5 + 2 * 4),
        ] {
            let starts: Vec<Start> = config
                .parameter_shapes()
                .iter()
                .map(|(name, _)| Start::of(name))
                .collect();
            assert_eq!(starts.iter().filter(|start| matches!(start, Start::Ones)).count(), ones);
            assert_eq!(
                starts.iter().filter(|start| matches!(start, Start::Zeros)).count(),
                zeros
            );
        }
    }
}
