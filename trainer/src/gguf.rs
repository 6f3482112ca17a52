//! The one door to GGUF: a LLaMA-architecture file becomes a Hugging Face folder, its weights dequantised to bf16 and its
//! tokenizer made from the file's own tables. The format is read by candle.
//! Source: ggml's docs/gguf.md; names and row order as llama.cpp's convert_hf_to_gguf.py writes them.

use std::collections::{BTreeSet, HashMap};
use std::fs::File;
use std::io::BufReader;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use candle_core::quantized::gguf_file::{Content, Value};
use serde_json::json;
use tch::{Kind, Tensor};

use crate::hf::{Family, ModelConfig, NewFolder, SHARD_BYTES, write_weights};

/// Makes the model folder `out` of the file `gguf`. `progress` hears (parameters done, of how many).
///
/// # Errors
/// When the file is damaged, or holds a model or tokenizer that would be read wrongly.
pub fn import(gguf: &Path, out: &Path, progress: &mut dyn FnMut(u64, u64)) -> Result<ModelConfig> {
    let mut source = Gguf::open(gguf)?;
    let read = || format!("importing {}", gguf.display());
    let config = source.config().with_context(read)?;
    source.check_names(&config).with_context(read)?;
    let tokenizer = Pieces::read(&source).with_context(read)?;
    let folder = NewFolder::begin(out)?;
    tokenizer.write(&folder, &config)?;
    let count = |shape: &[i64]| shape.iter().product::<i64>() as u64;
    let total = config.parameter_shapes().iter().map(|(_, shape)| count(shape)).sum();
    let mut done = 0;
    write_weights(&folder, &config, Kind::BFloat16, SHARD_BYTES, &mut |name, shape| {
        let tensor = source.tensor(name, shape, &config).with_context(read)?;
        done += count(shape);
        progress(done, total);
        Ok(tensor)
    })?;
    folder.commit()?;
    Ok(config)
}

struct Gguf {
    file: BufReader<File>,
    content: Content,
}

impl Gguf {
    fn open(path: &Path) -> Result<Gguf> {
        let file = File::open(path).with_context(|| path.display().to_string())?;
        let mut file = BufReader::with_capacity(1 << 20, file);
        let content = Content::read(&mut file).with_context(|| {
            format!(
                "{} cannot be read as GGUF; copy it again, or convert the model anew",
                path.display()
            )
        })?;
        Ok(Gguf { file, content })
    }

    fn config(&self) -> Result<ModelConfig> {
        let architecture = self.text("general.architecture")?;
        ensure!(
            architecture == "llama",
            "general.architecture = {architecture:?}, but this program imports \"llama\" models only"
        );
        if let Some(scaling) = self.content.metadata.get("llama.rope.scaling.type") {
            ensure!(
                matches!(scaling, Value::String(kind) if kind == "none"),
                "llama.rope.scaling.type = {scaling:?}, but this program computes unscaled rotary positions only"
            );
        }
        let hidden_size = self.count("llama.embedding_length")?;
        let num_attention_heads = self.count("llama.attention.head_count")?;
        let or = |key: &str, default| {
            if self.content.metadata.contains_key(key) {
                self.count(key)
            } else {
                Ok(default)
            }
        };
        let head_dim = or("llama.attention.key_length", hidden_size / num_attention_heads.max(1))?;
        let rotated = or("llama.rope.dimension_count", head_dim)?;
        ensure!(
            rotated == head_dim,
            "llama.rope.dimension_count = {rotated}, but this program turns whole heads ({head_dim})"
        );
        let rows = self.shape("token_embd.weight")?;
        let config = ModelConfig {
            vocab_size: rows[0],
            hidden_size,
            intermediate_size: self.count("llama.feed_forward_length")?,
            num_hidden_layers: self.count("llama.block_count")?,
            num_attention_heads,
            num_key_value_heads: or("llama.attention.head_count_kv", num_attention_heads)?,
            head_dim,
            norm_epsilon: self.number("llama.attention.layer_norm_rms_epsilon")?,
            max_position_embeddings: self.count("llama.context_length")?,
            tie_word_embeddings: !self.content.tensor_infos.contains_key("output.weight"),
            bos_token_id: self.token("bos")?,
            eos_token_id: self.token("eos")?.into_iter().collect(),
            family: Family::Llama {
                rope_theta: match self.content.metadata.contains_key("llama.rope.freq_base") {
                    true => self.number("llama.rope.freq_base")?,
                    false => 10_000.0,
                },
                rope_scaling: None,
            },
        };
        // The rules of config.json hold here too.
        let written = config.to_json("bfloat16");
        ModelConfig::from_json(written.as_object().expect("an object")).context("the sizes in its metadata")
    }

    /// Every tensor we expect is there, and nothing else: what we would leave out might matter.
    fn check_names(&self, config: &ModelConfig) -> Result<()> {
        let expected: BTreeSet<String> = config
            .parameter_shapes()
            .iter()
            .map(|(name, _)| gguf_name(name))
            .collect();
        let found: BTreeSet<String> = self.content.tensor_infos.keys().cloned().collect();
        let missing: Vec<_> = expected.difference(&found).take(5).collect();
        let extra: Vec<_> = found.difference(&expected).take(5).collect();
        ensure!(
            missing.is_empty() && extra.is_empty(),
            "its tensors are not those of a plain LLaMA with {} layers: missing {missing:?}, extra {extra:?}; \
             this program imports models without biases, experts and frequency tables",
            config.num_hidden_layers
        );
        Ok(())
    }

    /// The tensor under Hugging Face's name, f32, its rows in Hugging Face's order.
    fn tensor(&mut self, name: &str, shape: &[i64], config: &ModelConfig) -> Result<Tensor> {
        let gguf_name = gguf_name(name);
        let values = || -> candle_core::Result<(Vec<usize>, Vec<f32>)> {
            let cpu = candle_core::Device::Cpu;
            let tensor = self
                .content
                .tensor(&mut self.file, &gguf_name, &cpu)?
                .dequantize(&cpu)?;
            Ok((tensor.dims().to_vec(), tensor.flatten_all()?.to_vec1()?))
        };
        let (found, values) = { values }()
            .with_context(|| format!("reading tensor {gguf_name}; the file may be truncated: copy it again"))?;
        ensure!(
            found.iter().map(|&size| size as i64).eq(shape.iter().copied()),
            "tensor {gguf_name} is {found:?}, expected {shape:?} by the file's own metadata; convert the model anew"
        );
        let tensor = Tensor::from_slice(&values).view(shape);
        let heads = match name.rsplit('.').nth(1) {
            Some("q_proj") => config.num_attention_heads,
            Some("k_proj") => config.num_key_value_heads,
            _ => return Ok(tensor),
        };
        Ok(half_split_rows(&tensor, heads as i64))
    }

    fn shape(&self, name: &str) -> Result<Vec<usize>> {
        let info = self.content.tensor_infos.get(name);
        let dims = info
            .map(|info| info.shape.dims().to_vec())
            .with_context(|| format!("it has no tensor {name}"))?;
        ensure!(dims.len() == 2, "tensor {name} is {dims:?}, expected two axes");
        Ok(dims)
    }

    fn value(&self, key: &str) -> Result<&Value> {
        self.content
            .metadata
            .get(key)
            .with_context(|| format!("its metadata has no {key}; convert the model anew"))
    }

    fn text(&self, key: &str) -> Result<&str> {
        Ok(self.value(key)?.to_string().with_context(|| key.to_string())?)
    }

    fn count(&self, key: &str) -> Result<usize> {
        let value = self.value(key)?.to_u64().with_context(|| key.to_string())?;
        usize::try_from(value).with_context(|| key.to_string())
    }

    /// GGUF stores f32; its shortest decimal is the number that was meant (1e-5, not 9.999999747378752e-6).
    fn number(&self, key: &str) -> Result<f64> {
        let value = self.value(key)?.to_f32().with_context(|| key.to_string())?;
        Ok(value.to_string().parse()?)
    }

    fn token(&self, which: &str) -> Result<Option<u32>> {
        let key = format!("tokenizer.ggml.{which}_token_id");
        self.content
            .metadata
            .get(&key)
            .map(|value| value.to_u32().with_context(|| key.clone()))
            .transpose()
    }

    fn texts(&self, key: &str) -> Result<Vec<&str>> {
        let values = self.value(key)?.to_vec().with_context(|| key.to_string())?;
        values
            .iter()
            .map(|value| Ok(value.to_string().map(String::as_str)?))
            .collect()
    }
}

/// llama.cpp's name of a parameter.
fn gguf_name(name: &str) -> String {
    let parts: Vec<&str> = name.split('.').collect();
    let in_layer = |end: &str| format!("blk.{}.{end}.weight", parts[2]);
    match parts.as_slice() {
        ["model", "embed_tokens", _] => "token_embd.weight".into(),
        ["model", "norm", _] => "output_norm.weight".into(),
        ["lm_head", _] => "output.weight".into(),
        [_, _, _, "input_layernorm", _] => in_layer("attn_norm"),
        [_, _, _, "post_attention_layernorm", _] => in_layer("ffn_norm"),
        [_, _, _, _, "o_proj", _] => in_layer("attn_output"),
        [_, _, _, "self_attn", linear, _] => in_layer(&format!("attn_{}", linear.trim_end_matches("_proj"))),
        [_, _, _, "mlp", linear, _] => in_layer(&format!("ffn_{}", linear.trim_end_matches("_proj"))),
        _ => unreachable!("{name} is no parameter of ours"),
    }
}

/// llama.cpp interleaves the rows of q and k within each head, because its rotary positions turn neighbours (2i, 2i + 1);
/// Hugging Face's turn (i, i + d/2). Undoes its permutation: row 2i + j goes to row i + j·d/2.
fn half_split_rows(weight: &Tensor, heads: i64) -> Tensor {
    let size = weight.size();
    let half = size[0] / heads / 2;
    weight
        .view([heads, half, 2, size[1]])
        .transpose(1, 2)
        .reshape(size.as_slice())
}

/// The file's byte-level BPE, as its tables tell it.
struct Pieces<'a> {
    tokens: Vec<&'a str>,
    /// ggml's types: 1 normal, 3 control, 4 user-defined.
    kinds: Vec<i64>,
    merges: Vec<(&'a str, &'a str)>,
    splits_digits: bool,
    special: Vec<(&'static str, u32)>,
    chat_template: Option<&'a str>,
}

impl Pieces<'_> {
    fn read(source: &Gguf) -> Result<Pieces<'_>> {
        let model = source.text("tokenizer.ggml.model")?;
        ensure!(
            model == "gpt2",
            "tokenizer.ggml.model = {model:?}, but this program imports byte-level BPE (\"gpt2\") only; \
             use the model's Hugging Face folder instead"
        );
        let pre = source.text("tokenizer.ggml.pre")?;
        let splits_digits = match pre {
            "smollm" => true,
            "gpt-2" => false,
            _ => bail!(
                "tokenizer.ggml.pre = {pre:?}, but this program knows how \"smollm\" and \"gpt-2\" cut text into words; \
                 use the model's Hugging Face folder instead"
            ),
        };
        let tokens = source.texts("tokenizer.ggml.tokens")?;
        let kinds = source.value("tokenizer.ggml.token_type")?.to_vec()?;
        let kind = |value: &Value| {
            value
                .to_i32()
                .map(i64::from)
                .or_else(|_| value.to_u64().map(|kind| kind as i64))
        };
        let kinds: Vec<i64> = kinds.iter().map(kind).collect::<candle_core::Result<_>>()?;
        ensure!(
            kinds.len() == tokens.len() && tokens.len() <= u32::MAX as usize,
            "it has {} tokens but {} token types; convert the model anew",
            tokens.len(),
            kinds.len()
        );
        let ids: HashMap<&str, usize> = tokens.iter().enumerate().map(|(id, token)| (*token, id)).collect();
        ensure!(
            ids.len() == tokens.len(),
            "two of its {} tokens are the same text; convert the model anew",
            tokens.len()
        );
        let mut merges = Vec::new();
        for merge in source.texts("tokenizer.ggml.merges")? {
            let pair = merge.split_once(' ').filter(|(left, right)| {
                let whole = format!("{left}{right}");
                [*left, *right, whole.as_str()]
                    .iter()
                    .all(|piece| ids.contains_key(piece))
            });
            merges.push(pair.with_context(|| {
                format!("its merge {merge:?} does not join two of its tokens to a third; convert the model anew")
            })?);
        }
        let mut special = Vec::new();
        for (name, which) in [
            ("bos_token", "bos"),
            ("eos_token", "eos"),
            ("unk_token", "unknown"),
            ("pad_token", "padding"),
        ] {
            if let Some(id) = source.token(which)? {
                ensure!(
                    (id as usize) < tokens.len(),
                    "its {name} is number {id} of {} tokens",
                    tokens.len()
                );
                special.push((name, id));
            }
        }
        let chat_template = source.content.metadata.get("tokenizer.chat_template");
        let chat_template = chat_template
            .map(|value| value.to_string().map(String::as_str))
            .transpose()?;
        Ok(Pieces {
            tokens,
            kinds,
            merges,
            splits_digits,
            special,
            chat_template,
        })
    }

    fn write(&self, folder: &NewFolder, config: &ModelConfig) -> Result<()> {
        let text = serde_json::to_vec(&self.tokenizer_json())?;
        let read = tokenizers::Tokenizer::from_bytes(&text)
            .map_err(|error| anyhow::anyhow!("the tokenizer made from its tables does not load: {error}"))?;
        ensure!(
            read.get_vocab_size(true) == self.tokens.len(),
            "the tokenizer made from its tables has {} pieces, expected {}",
            read.get_vocab_size(true),
            self.tokens.len()
        );
        folder.write("tokenizer.json", text)?;
        let named: serde_json::Map<_, _> = self
            .special
            .iter()
            .map(|(name, id)| (name.to_string(), json!(self.tokens[*id as usize])))
            .collect();
        folder.write_json("special_tokens_map.json", &named)?;
        let mut settings = json!({
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_prefix_space": false,
            "clean_up_tokenization_spaces": false,
            "model_max_length": config.max_position_embeddings,
        });
        let object = settings.as_object_mut().expect("an object");
        object.extend(named);
        if let Some(template) = self.chat_template {
            object.insert("chat_template".into(), json!(template));
        }
        folder.write_json("tokenizer_config.json", &settings)
    }

    fn tokenizer_json(&self) -> serde_json::Value {
        let vocabulary: serde_json::Map<_, _> = self
            .tokens
            .iter()
            .enumerate()
            .map(|(id, token)| (token.to_string(), json!(id)))
            .collect();
        let added: Vec<_> = (self.tokens.iter().zip(&self.kinds).enumerate())
            .filter(|(_, (_, kind))| **kind == 3 || **kind == 4)
            .map(|(id, (token, kind))| {
                json!({ "id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false,
                    "normalized": false, "special": *kind == 3 })
            })
            .collect();
        let byte_level = |prefix: bool| json!({ "type": "ByteLevel", "add_prefix_space": prefix, "trim_offsets": true, "use_regex": true });
        let pre_tokenizer = match self.splits_digits {
            true => json!({ "type": "Sequence", "pretokenizers": [
                { "type": "Digits", "individual_digits": true }, byte_level(false) ] }),
            false => byte_level(false),
        };
        json!({
            "version": "1.0",
            "truncation": null,
            "padding": null,
            "added_tokens": added,
            "normalizer": null,
            "pre_tokenizer": pre_tokenizer,
            "post_processor": null,
            "decoder": byte_level(true),
            "model": {
                "type": "BPE",
                "dropout": null,
                "unk_token": null,
                "continuing_subword_prefix": null,
                "end_of_word_suffix": null,
                "fuse_unk": false,
                "byte_fallback": false,
                "ignore_merges": false,
                "vocab": vocabulary,
                "merges": self.merges,
            },
        })
    }
}

#[cfg(test)]
mod tests {
    use candle_core::quantized::{GgmlDType, QTensor, gguf_file};

    use super::*;
    use crate::hf::Weights;

    /// A tiny LLaMA with random weights, written as llama.cpp's converter does: rows of q and k interleaved.
    struct Made {
        metadata: Vec<(String, Value)>,
        /// By GGUF's names, in Hugging Face's row order.
        tensors: Vec<(String, Tensor)>,
    }

    const HEADS: i64 = 4;
    const KV_HEADS: i64 = 2;

    fn interleaved_rows(weight: &Tensor, heads: i64) -> Tensor {
        let size = weight.size();
        weight
            .view([heads, 2, size[0] / heads / 2, size[1]])
            .transpose(1, 2)
            .reshape(size.as_slice())
    }

    fn made(tied: bool) -> Made {
        let tokens = ["<|end|>", "a", "b", "c", "Ġ", "ab", "Ġab", "1"];
        let texts = |all: &[&str]| Value::Array(all.iter().map(|text| Value::String(text.to_string())).collect());
        let kinds = tokens
            .iter()
            .map(|token| Value::I32(if token.starts_with('<') { 3 } else { 1 }))
            .collect();
        let text = |text: &str| Value::String(text.into());
        let metadata = [
            ("general.architecture", text("llama")),
            ("llama.block_count", Value::U32(1)),
            ("llama.context_length", Value::U32(64)),
            ("llama.embedding_length", Value::U32(32)),
            ("llama.feed_forward_length", Value::U32(64)),
            ("llama.attention.head_count", Value::U32(HEADS as u32)),
            ("llama.attention.head_count_kv", Value::U32(KV_HEADS as u32)),
            ("llama.rope.freq_base", Value::F32(100_000.0)),
            ("llama.attention.layer_norm_rms_epsilon", Value::F32(1e-5)),
            ("llama.rope.dimension_count", Value::U32(8)),
            ("tokenizer.ggml.model", text("gpt2")),
            ("tokenizer.ggml.pre", text("smollm")),
            ("tokenizer.ggml.tokens", texts(&tokens)),
            ("tokenizer.ggml.token_type", Value::Array(kinds)),
            ("tokenizer.ggml.merges", texts(&["a b", "Ġ ab"])),
            ("tokenizer.ggml.eos_token_id", Value::U32(0)),
        ];
        let mut shapes = vec![
            ("token_embd", vec![8, 32]),
            ("output_norm", vec![32]),
            ("blk.0.attn_norm", vec![32]),
            ("blk.0.ffn_norm", vec![32]),
            ("blk.0.attn_q", vec![32, 32]),
            ("blk.0.attn_k", vec![16, 32]),
            ("blk.0.attn_v", vec![16, 32]),
            ("blk.0.attn_output", vec![32, 32]),
            ("blk.0.ffn_gate", vec![64, 32]),
            ("blk.0.ffn_up", vec![64, 32]),
            ("blk.0.ffn_down", vec![32, 64]),
        ];
        if !tied {
            shapes.push(("output", vec![8, 32]));
        }
        let value = |index: usize, shape: &[i64]| {
            let n: i64 = shape.iter().product();
            // Exact in bf16 and different in every row.
            ((Tensor::arange(n, (Kind::Float, tch::Device::Cpu)) * 7 + index as i64).remainder(127.0) - 63.0)
                .view(shape)
        };
        let tensor =
            |(index, (name, shape)): (usize, (&str, Vec<i64>))| (format!("{name}.weight"), value(index, &shape));
        Made {
            metadata: metadata.map(|(key, value)| (key.to_string(), value)).to_vec(),
            tensors: shapes.into_iter().enumerate().map(tensor).collect(),
        }
    }

    impl Made {
        fn write(&self, path: &Path) {
            let stored = |(name, tensor): &(String, Tensor)| {
                let tensor = match name.as_str() {
                    "blk.0.attn_q.weight" => interleaved_rows(tensor, HEADS),
                    "blk.0.attn_k.weight" => interleaved_rows(tensor, KV_HEADS),
                    _ => tensor.shallow_clone(),
                };
                let shape: Vec<usize> = tensor.size().iter().map(|&size| size as usize).collect();
                let values: Vec<f32> = Vec::try_from(tensor.contiguous().view([-1])).unwrap();
                let tensor = candle_core::Tensor::from_vec(values, shape, &candle_core::Device::Cpu).unwrap();
                (name.clone(), QTensor::quantize(&tensor, GgmlDType::F32).unwrap())
            };
            let tensors: Vec<(String, QTensor)> = self.tensors.iter().map(stored).collect();
            let tensors: Vec<(&str, &QTensor)> = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
            let metadata: Vec<(&str, &Value)> =
                self.metadata.iter().map(|(key, value)| (key.as_str(), value)).collect();
            gguf_file::write(&mut File::create(path).unwrap(), &metadata, &tensors).unwrap();
        }

        fn set(&mut self, key: &str, value: Value) {
            self.metadata.retain(|(known, _)| known != key);
            self.metadata.push((key.into(), value));
        }
    }

    #[test]
    fn an_imported_model_has_the_weights_it_was_converted_from() {
        let root = tempfile::tempdir().unwrap();
        for tied in [true, false] {
            let (file, out) = (root.path().join("model.gguf"), root.path().join("model"));
            let made = made(tied);
            made.write(&file);
            let mut heard = Vec::new();
            let config = import(&file, &out, &mut |done, total| heard.push((done, total))).unwrap();
            assert!(
                heard.is_sorted() && heard.last().is_some_and(|(done, total)| done == total),
                "{heard:?}"
            );
            let family = Family::Llama {
                rope_theta: 1e5,
                rope_scaling: None,
            };
            assert_eq!((config.norm_epsilon, config.family), (1e-5, family));
            assert_eq!((config.tie_word_embeddings, &config.eos_token_id[..]), (tied, &[0][..]));
            assert_eq!(ModelConfig::open(&out).unwrap(), config);
            let weights = Weights::open(&out).unwrap();
            for (name, shape) in config.parameter_shapes() {
                let original = &made
                    .tensors
                    .iter()
                    .find(|(known, _)| *known == gguf_name(&name))
                    .unwrap()
                    .1;
                assert_eq!(&weights.tensor(&name, &shape, Kind::Float).unwrap(), original, "{name}");
            }
        }
    }

    #[test]
    fn the_tokenizer_is_that_of_the_file() {
        let root = tempfile::tempdir().unwrap();
        made(true).write(&root.path().join("model.gguf"));
        import(
            &root.path().join("model.gguf"),
            &root.path().join("model"),
            &mut |_, _| {},
        )
        .unwrap();
        let tokenizer = tokenizers::Tokenizer::from_file(root.path().join("model/tokenizer.json")).unwrap();
        let ids = |text: &str| tokenizer.encode(text, false).unwrap().get_ids().to_vec();
        assert_eq!(ids("ab ab"), [5, 6]);
        assert_eq!(ids("ab<|end|>11"), [5, 0, 7, 7]);
        assert_eq!(tokenizer.decode(&[5, 6, 3], false).unwrap(), "ab abc");
    }

    #[test]
    fn what_would_be_imported_wrongly_is_refused() {
        let root = tempfile::tempdir().unwrap();
        let text = |text: &str| Value::String(text.into());
        let check = |spoil: &dyn Fn(&mut Made), sentence: &str| {
            let (file, out) = (root.path().join("model.gguf"), root.path().join("model"));
            let mut made = made(true);
            spoil(&mut made);
            made.write(&file);
            let said = format!("{:#}", import(&file, &out, &mut |_, _| {}).unwrap_err());
            assert!(said.contains(sentence), "{said}");
            assert!(!out.exists());
        };
        check(
            &|made| made.set("general.architecture", text("gpt2")),
            "general.architecture = \"gpt2\"",
        );
        check(
            &|made| made.set("tokenizer.ggml.model", text("llama")),
            "tokenizer.ggml.model = \"llama\"",
        );
        check(
            &|made| made.set("tokenizer.ggml.pre", text("qwen2")),
            "tokenizer.ggml.pre = \"qwen2\"",
        );
        check(
            &|made| made.set("llama.rope.scaling.type", text("yarn")),
            "llama.rope.scaling.type",
        );
        check(
            &|made| made.set("llama.rope.dimension_count", Value::U32(4)),
            "turns whole heads (8)",
        );
        check(
            &|made| made.set("llama.block_count", Value::U32(2)),
            "missing [\"blk.1.attn_k.weight\"",
        );
        check(
            &|made| made.set("llama.feed_forward_length", Value::U32(65)),
            "blk.0.ffn_gate.weight is [64, 32]",
        );
        check(
            &|made| {
                made.tensors.push((
                    "rope_freqs.weight".into(),
                    Tensor::ones([4], (Kind::Float, tch::Device::Cpu)),
                ))
            },
            "extra [\"rope_freqs.weight\"]",
        );
        let merges = Value::Array(vec![text("a c")]);
        check(
            &|made| made.set("tokenizer.ggml.merges", merges.clone()),
            "its merge \"a c\"",
        );

        let file = root.path().join("model.gguf");
        let bytes = std::fs::read(&file).unwrap();
        made(true).write(&file);
        for (length, sentence) in [
            (bytes.len() / 2, "truncated: copy it again"),
            (100, "cannot be read as GGUF"),
        ] {
            std::fs::write(&file, &std::fs::read(&file).unwrap()[..length]).unwrap();
            let said = format!(
                "{:#}",
                import(&file, &root.path().join("model"), &mut |_, _| {}).unwrap_err()
            );
            assert!(said.contains(sentence), "{said}");
        }
    }
}
