//! Weights in safetensors files: mapped, checked against `config.json` by name and shape, copied one tensor at a time.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use memmap2::{Mmap, UncheckedAdvice};
use rayon::prelude::*;
use safetensors::tensor::{Dtype, Metadata, SafeTensorError, SafeTensors, TensorInfo};
use serde::Deserialize;
use serde_json::json;
use sharding::memory;
use tch::{Device, Kind, Tensor};

use super::{ModelConfig, NewFolder, Start};
use crate::random;

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// Files of written models stay below this, as those of published models do.
pub const SHARD_BYTES: u64 = 5_000_000_000;

/// The weights of a model folder, all there and of the right shapes. Nothing is copied until [`Weights::tensor`].
pub struct Weights {
    files: Vec<TensorFile>,
    /// Where each tensor of the model lies, ordered by its name in the model.
    place: BTreeMap<String, Place>,
    /// Where copies go.
    device: Device,
    /// There are no files: values are made up.
    made_up: bool,
}

/// A tensor's file and what it is called there, which is not always its name in the model.
struct Place {
    file: usize,
    stored: String,
}

/// Of made-up values, after which they begin again: a prime, so that rows of a matrix differ.
const MADE_UP: usize = 1_048_583;

impl Weights {
    /// Maps `model.safetensors`, or the shards that `model.safetensors.index.json` names, in `dir`, and checks them
    /// against `config.json`.
    ///
    /// # Errors
    /// When a file is truncated or a tensor is missing, extra, or of another shape than the config says; all are named.
    pub fn open(dir: &Path) -> Result<Weights> {
        Weights::open_with(dir, &ModelConfig::open(dir)?)
    }

    /// [`Weights::open`] against a config at hand.
    pub fn open_with(dir: &Path, config: &ModelConfig) -> Result<Weights> {
        let files: Vec<TensorFile> = file_names(dir)?
            .iter()
            .map(|name| TensorFile::open(&dir.join(name)))
            .collect::<Result<_>>()?;
        let prefix = missing_prefix(config, &files);
        let mut place: BTreeMap<String, Place> = BTreeMap::new();
        for (index, file) in files.iter().enumerate() {
            for stored in file.names() {
                let name = match stored.starts_with("lm_head.") {
                    true => stored.clone(),
                    false => format!("{prefix}{stored}"),
                };
                let here = Place { file: index, stored };
                if let Some(before) = place.insert(name.clone(), here) {
                    bail!(
                        "tensor {name} is in both {} and {}; keep the files of one saved model only",
                        files[before.file].path.display(),
                        file.path.display()
                    );
                }
            }
        }
        let mut weights = Weights {
            files,
            place,
            device: Device::Cpu,
            made_up: false,
        };
        weights
            .check(config)
            .with_context(|| format!("the weights in {} do not fit config.json", dir.display()))?;
        Ok(weights)
    }

    /// Weights that look random, the same every time and everywhere, of any shape that is asked for: for measurements and
    /// checks, which need no model's files. Matrices are N(0, 0.02²), norms 1, biases 0.
    pub fn made_up() -> Weights {
        Weights {
            files: Vec::new(),
            place: BTreeMap::new(),
            device: Device::Cpu,
            made_up: true,
        }
    }

    /// The same weights, copied to `device` from here on, one tensor at a time.
    pub fn on(self, device: Device) -> Weights {
        Weights { device, ..self }
    }

    pub fn device(&self) -> Device {
        self.device
    }

    /// A copy of tensor `name` on the device, converted to `kind`. `shape` is what the caller expects it to be.
    pub fn tensor(&self, name: &str, shape: &[i64], kind: Kind) -> Result<Tensor> {
        if self.made_up {
            return Ok(make_up(name, shape, kind, self.device));
        }
        let place = self
            .place
            .get(name)
            .with_context(|| format!("the model has no tensor {name}"))?;
        let tensor = self.files[place.file].tensor(&place.stored)?;
        self.files[place.file].release();
        ensure!(
            tensor.size() == shape,
            "tensor {name} is {:?}, expected {shape:?}; config.json and weights are of different models",
            tensor.size()
        );
        // As it is stored it is the smallest to carry.
        Ok(tensor.to_device(self.device).to_kind(kind))
    }

    /// [`Weights::digest`], and what the config makes of them: with another rotation or another ε the same tensors are another
    /// model. Which tokens begin and end a text is no part of it.
    pub fn digest_with(&self, config: &ModelConfig) -> String {
        let computes = ModelConfig {
            bos_token_id: None,
            eos_token_id: Vec::new(),
            ..config.clone()
        };
        let text = serde_json::to_string(&computes).expect("plain data");
        let mut whole = blake3::Hasher::new();
        whole.update(self.digest().as_bytes()).update(text.as_bytes());
        whole.finalize().to_hex().to_string()
    }

    /// BLAKE3 over every tensor's name, type, shape and bytes, in the order of the names: the same however the model is
    /// cut into files. Reads everything, on all of rayon's threads, and holds some 256 MiB of it at a time.
    pub fn digest(&self) -> String {
        // Pieces of even size keep all threads busy though one matrix may be most of the model.
        const PIECE: usize = 4 << 20;
        const AT_ONCE: usize = 256 << 20;
        let views: Vec<(&str, &TensorInfo, &[u8])> = self
            .place
            .iter()
            .map(|(name, place)| {
                let (info, bytes) = self.view(place).expect("placed at opening");
                (name.as_str(), info, bytes)
            })
            .collect();
        let pieces: Vec<&[u8]> = views.iter().flat_map(|(_, _, bytes)| bytes.chunks(PIECE)).collect();
        let mut hashes: Vec<blake3::Hash> = Vec::with_capacity(pieces.len());
        for some in pieces.chunks(AT_ONCE / PIECE) {
            hashes.par_extend(some.par_iter().map(|piece| blake3::hash(piece)));
            self.files.iter().for_each(TensorFile::release);
        }
        let mut whole = blake3::Hasher::new();
        for (name, info, _) in &views {
            whole.update(format!("{name} {} {:?}\n", info.dtype, info.shape).as_bytes());
        }
        for hash in hashes {
            whole.update(hash.as_bytes());
        }
        whole.finalize().to_hex().to_string()
    }

    /// The type that tensor `name` is stored in, as safetensors calls it: "BF16".
    pub fn stored_type(&self, name: &str) -> Result<String> {
        let place = self.place.get(name);
        let place = place.with_context(|| format!("the model has no tensor {name}"))?;
        Ok(self.view(place)?.0.dtype.to_string())
    }

    /// Bytes of all tensors as they are stored.
    pub fn stored_bytes(&self) -> u64 {
        let length = |place: &Place| self.view(place).map_or(0, |(_, bytes)| bytes.len());
        self.place.values().map(length).sum::<usize>() as u64
    }

    fn view(&self, place: &Place) -> Result<(&TensorInfo, &[u8])> {
        self.files[place.file].view(&place.stored)
    }

    fn check(&mut self, config: &ModelConfig) -> Result<()> {
        let expected = config.parameter_shapes();
        self.drop_what_no_model_reads(config, &expected)?;
        let mut wrong = Vec::new();
        for (name, shape) in &expected {
            let Some(place) = self.place.get(name) else {
                wrong.push(format!("{name} is missing, expected {shape:?}"));
                continue;
            };
            let (info, _) = self.view(place)?;
            if !shape.iter().map(|&size| size as usize).eq(info.shape.iter().copied()) {
                wrong.push(format!("{name} is {:?}, expected {shape:?}", info.shape));
            } else if kind_of(info.dtype).is_none() {
                wrong.push(format!("{name} is stored as {}, expected F32, BF16 or F16", info.dtype));
            }
        }
        let known: HashSet<&str> = expected.iter().map(|(name, _)| name.as_str()).collect();
        for (name, place) in self.place.iter().filter(|(name, _)| !known.contains(name.as_str())) {
            let (info, _) = self.view(place)?;
            wrong.push(format!(
                "{name} {:?} is extra: a model of this config has no such tensor",
                info.shape
            ));
        }
        const SHOWN: usize = 8;
        if let Some(more) = wrong.len().checked_sub(SHOWN + 1) {
            wrong.truncate(SHOWN);
            wrong.push(format!("and {} more", more + 1));
        }
        ensure!(
            wrong.is_empty(),
            "{}; copy config.json and all weight files anew from the same saved model",
            wrong.join("; ")
        );
        Ok(())
    }

    /// Old LLaMA checkpoints store RoPE's frequencies, old GPT-2 ones attention's causal mask, and some tied ones store the
    /// tied matrix twice.
    fn drop_what_no_model_reads(&mut self, config: &ModelConfig, expected: &[(String, Vec<i64>)]) -> Result<()> {
        const BUFFERS: [&str; 3] = [".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias"];
        self.place
            .retain(|name, _| !BUFFERS.iter().any(|buffer| name.ends_with(buffer)));
        let (embedding, head) = (&expected[0].0, "lm_head.weight");
        let (Some(a), Some(b)) = (self.place.get(embedding), self.place.get(head)) else {
            return Ok(());
        };
        if config.tie_word_embeddings {
            let (first, second) = (self.view(a)?, self.view(b)?);
            ensure!(
                first.0.dtype == second.0.dtype && first.1 == second.1,
                "tie_word_embeddings = true, but {head} and {embedding} are stored with different values; \
                 set it to false to use both, or delete {head}"
            );
            self.place.remove(head);
        }
        Ok(())
    }
}

/// What stands before the model's names of tensors and is left out in these files: GPT-2 as it was published was saved
/// without the head's module around it.
fn missing_prefix(config: &ModelConfig, files: &[TensorFile]) -> &'static str {
    let names = config.names();
    let (prefix, within) = names.embedding.split_once('.').unwrap_or(("", names.embedding));
    let bare = format!("{within}.weight");
    let is_bare = names.stored_transposed && files.iter().flat_map(TensorFile::names).any(|name| name == bare);
    match (is_bare, prefix) {
        (true, "transformer") => "transformer.",
        _ => "",
    }
}

fn make_up(name: &str, shape: &[i64], kind: Kind, device: Device) -> Tensor {
    match Start::of(name) {
        Start::Ones => return Tensor::ones(shape, (kind, device)),
        Start::Zeros => return Tensor::zeros(shape, (kind, device)),
        Start::Drawn => {}
    }
    let stream = random::Stream::new(0, name);
    let values: Vec<f32> = (0..MADE_UP as u64)
        .into_par_iter()
        .map(|index| (0.02 * stream.normal(index)) as f32)
        .collect();
    let n: i64 = shape.iter().product();
    let values = Tensor::from_slice(&values).to_device(device).to_kind(kind);
    let repeated = values.repeat([n.div_euclid(MADE_UP as i64) + 1]);
    repeated.narrow(0, 0, n).copy().view(shape)
}

/// One mapped safetensors file.
pub struct TensorFile {
    path: PathBuf,
    map: Mmap,
    header: Metadata,
    /// Where the tensors' bytes begin.
    start: usize,
}

impl TensorFile {
    /// # Errors
    /// When it cannot be read, is shorter than its header says, or is no safetensors file.
    pub fn open(path: &Path) -> Result<TensorFile> {
        let file = File::open(path).with_context(|| path.display().to_string())?;
        let map = map(&file).with_context(|| format!("mapping {}", path.display()))?;
        let (length, header) = match SafeTensors::read_metadata(&map) {
            Ok(read) => read,
            Err(error) => bail!("{}: {}", path.display(), why_unreadable(&map, &error)),
        };
        Ok(TensorFile {
            path: path.into(),
            map,
            header,
            start: 8 + length,
        })
    }

    /// Names in the order of their bytes.
    pub fn names(&self) -> Vec<String> {
        self.header.offset_keys()
    }

    /// A copy of tensor `name`, as it is stored.
    pub fn tensor(&self, name: &str) -> Result<Tensor> {
        let (info, bytes) = self.view(name)?;
        let kind = kind_of(info.dtype).with_context(|| {
            format!(
                "{}: {name} is stored as {}, expected F32, BF16, F16 or I64",
                self.path.display(),
                info.dtype
            )
        })?;
        let shape: Vec<i64> = info.shape.iter().map(|&size| size as i64).collect();
        if bytes.is_empty() {
            return Ok(Tensor::zeros(shape, (kind, tch::Device::Cpu)));
        }
        Tensor::f_from_data_size(bytes, &shape, kind).with_context(|| format!("copying {name}"))
    }

    /// Gives the pages that were read back to the page cache, so that a loaded model is not held twice.
    fn release(&self) {
        release(&self.map);
    }

    fn view(&self, name: &str) -> Result<(&TensorInfo, &[u8])> {
        let info = self
            .header
            .info(name)
            .with_context(|| format!("{} holds no tensor {name}", self.path.display()))?;
        let (start, end) = info.data_offsets;
        Ok((info, &self.map[self.start + start..self.start + end]))
    }
}

/// The door to mapped memory.
#[allow(unsafe_code)]
fn map(file: &File) -> std::io::Result<Mmap> {
    // SAFETY: the map is read-only and we never write weight files in place: they are written beside and renamed, so the
    // mapped inode keeps its bytes. Truncation by another program would end this process with SIGBUS, as it would any
    // reader that maps, and cannot be turned into a wrong result.
    unsafe { Mmap::map(file) }
}

#[allow(unsafe_code)]
fn release(map: &Mmap) {
    // SAFETY: pages of a read-only map of a file are read from it again when they are next touched, with the same bytes.
    // That it could not be done costs memory only.
    let _ = unsafe { map.unchecked_advise(UncheckedAdvice::DontNeed) };
}

fn kind_of(dtype: Dtype) -> Option<Kind> {
    match dtype {
        Dtype::F32 => Some(Kind::Float),
        Dtype::BF16 => Some(Kind::BFloat16),
        Dtype::F16 => Some(Kind::Half),
        Dtype::I64 => Some(Kind::Int64),
        _ => None,
    }
}

fn dtype_of(kind: Kind) -> Result<(Dtype, &'static str)> {
    Ok(match kind {
        Kind::Float => (Dtype::F32, "float32"),
        Kind::BFloat16 => (Dtype::BF16, "bfloat16"),
        Kind::Half => (Dtype::F16, "float16"),
        Kind::Int64 => (Dtype::I64, "int64"),
        other => bail!("tensors are written as float32, bfloat16, float16 or int64, not {other:?}"),
    })
}

fn why_unreadable(bytes: &[u8], error: &SafeTensorError) -> String {
    let claimed = bytes.first_chunk::<8>().map(|length| u64::from_le_bytes(*length));
    let header = claimed.and_then(|length| bytes[8..].get(..usize::try_from(length).ok()?));
    let described: Option<Metadata> = header.and_then(|header| serde_json::from_slice(header).ok());
    match (claimed, header, described) {
        (Some(length), Some(_), Some(described)) => {
            let expected = 8 + length + described.data_len() as u64;
            let word = if expected > bytes.len() as u64 {
                "truncated"
            } else {
                "too long"
            };
            format!(
                "it has {} bytes, its header says {expected}: it is {word}; copy it again",
                bytes.len()
            )
        }
        (Some(length), None, _) if length < 100_000_000 => {
            let found = bytes.len();
            format!("it has {found} bytes, its header alone should have {length}: it is truncated; copy it again")
        }
        _ => format!("it is no safetensors file ({error}); save the model with `save_pretrained`"),
    }
}

/// What `model.safetensors.index.json` says.
#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

fn file_names(dir: &Path) -> Result<Vec<String>> {
    if dir.join(SINGLE).is_file() {
        return Ok(vec![SINGLE.into()]);
    }
    let index = dir.join(INDEX);
    ensure!(
        index.is_file(),
        "{} holds neither {SINGLE} nor {INDEX}; a model folder holds one of them, as `save_pretrained` writes it",
        dir.display()
    );
    let text = std::fs::read(&index).with_context(|| index.display().to_string())?;
    let Index { weight_map } =
        serde_json::from_slice(&text).with_context(|| format!("{} is not an index of weights", index.display()))?;
    let mut names: Vec<String> = weight_map.into_values().collect();
    names.sort();
    names.dedup();
    for name in &names {
        ensure!(
            !name.contains(['/', '\\', '\0']) && name.ends_with(".safetensors"),
            "{} names the file {name:?}; its files must be *.safetensors beside it",
            index.display()
        );
        ensure!(
            dir.join(name).is_file(),
            "{} names {name}, which is not in {}; copy the missing file",
            index.display(),
            dir.display()
        );
    }
    Ok(names)
}

/// Writes a whole model folder: config and weights, atomically. See [`write_weights`].
pub fn write_folder(
    dir: &Path,
    config: &ModelConfig,
    kind: Kind,
    max_shard_bytes: u64,
    tensor: &mut dyn FnMut(&str, &[i64]) -> Result<Tensor>,
) -> Result<()> {
    let folder = NewFolder::begin(dir)?;
    write_weights(&folder, config, kind, max_shard_bytes, tensor)?;
    folder.commit()
}

/// Writes `config.json` and the weights of the model that `config` describes, in files of at most `max_shard_bytes` (a
/// larger tensor has a file of its own). `tensor` is asked for each parameter once, by name and shape, and only one of
/// them is held at a time.
pub fn write_weights(
    folder: &NewFolder,
    config: &ModelConfig,
    kind: Kind,
    max_shard_bytes: u64,
    tensor: &mut dyn FnMut(&str, &[i64]) -> Result<Tensor>,
) -> Result<()> {
    let (_, dtype) = dtype_of(kind)?;
    let shards = cut(config.parameter_shapes(), kind, max_shard_bytes);
    let mut weight_map = serde_json::Map::new();
    let mut total_size = 0;
    for (index, shard) in shards.iter().enumerate() {
        let name = match shards.len() {
            1 => SINGLE.to_string(),
            n => format!("model-{:05}-of-{n:05}.safetensors", index + 1),
        };
        total_size += write_tensors(&folder.path().join(&name), shard, kind, tensor)?;
        weight_map.extend(shard.iter().map(|(tensor, _)| (tensor.clone(), json!(name))));
    }
    if shards.len() > 1 {
        folder.write_json(
            INDEX,
            &json!({ "metadata": { "total_size": total_size }, "weight_map": weight_map }),
        )?;
    }
    config.write(folder.path(), dtype)
}

/// Consecutive parameters, as many in a file as fit.
fn cut(shapes: Vec<(String, Vec<i64>)>, kind: Kind, max_bytes: u64) -> Vec<Vec<(String, Vec<i64>)>> {
    let mut shards: Vec<Vec<(String, Vec<i64>)>> = vec![Vec::new()];
    let mut filled = 0;
    for (name, shape) in shapes {
        let bytes = byte_length(&shape, kind);
        let shard = shards.last_mut().expect("begins with one");
        if filled + bytes > max_bytes && !shard.is_empty() {
            shards.push(vec![(name, shape)]);
            filled = bytes;
        } else {
            shard.push((name, shape));
            filled += bytes;
        }
    }
    shards
}

fn byte_length(shape: &[i64], kind: Kind) -> u64 {
    shape.iter().product::<i64>() as u64 * kind.elt_size_in_bytes() as u64
}

/// Writes and syncs one safetensors file; `tensor` is asked for each in order. Returns the bytes of the tensors.
pub fn write_tensors(
    path: &Path,
    shapes: &[(String, Vec<i64>)],
    kind: Kind,
    tensor: &mut dyn FnMut(&str, &[i64]) -> Result<Tensor>,
) -> Result<u64> {
    let (dtype, _) = dtype_of(kind)?;
    let mut end = 0;
    let infos = shapes.iter().map(|(name, shape)| {
        let start = end;
        end += byte_length(shape, kind) as usize;
        let shape = shape.iter().map(|&size| size as usize).collect();
        (
            name.clone(),
            TensorInfo {
                dtype,
                shape,
                data_offsets: (start, end),
            },
        )
    });
    // `transformers` refuses files that do not say which framework's layout they have.
    let metadata = HashMap::from([("format".to_string(), "pt".to_string())]);
    let header = Metadata::new(Some(metadata), infos.collect()).context("laying out the tensors")?;
    let mut header = serde_json::to_vec(&header)?;
    header.resize(header.len().next_multiple_of(8), b' ');

    let file = File::create(path).with_context(|| path.display().to_string())?;
    let mut out = BufWriter::with_capacity(1 << 20, file);
    let mut write = |bytes: &[u8]| {
        out.write_all(bytes)
            .with_context(|| format!("writing {}", path.display()))
    };
    write(&(header.len() as u64).to_le_bytes())?;
    write(&header)?;
    for (name, shape) in shapes {
        let value = tensor(name, shape)?;
        ensure!(
            value.size() == *shape,
            "tensor {name} to be written is {:?}, expected {shape:?}; the config describes another model",
            value.size()
        );
        let value = value.to_device(tch::Device::Cpu).to_kind(kind).contiguous();
        write(memory::bytes(&value))?;
    }
    let file = out.into_inner().map_err(|error| error.into_error());
    file.and_then(|file| file.sync_all())
        .with_context(|| format!("writing {}", path.display()))?;
    Ok(end as u64)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::hf::Family;

    fn config(tied: bool) -> ModelConfig {
        ModelConfig {
            vocab_size: 12,
            hidden_size: 8,
            intermediate_size: 10,
            num_hidden_layers: 2,
            num_attention_heads: 2,
            num_key_value_heads: 1,
            head_dim: 4,
            norm_epsilon: 1e-5,
            max_position_embeddings: 32,
            tie_word_embeddings: tied,
            bos_token_id: None,
            eos_token_id: vec![],
            family: Family::Llama {
                rope_theta: 1e4,
                rope_scaling: None,
            },
        }
    }

    /// Different everywhere, and exact in bf16.
    fn value(name: &str, shape: &[i64]) -> Tensor {
        let n: i64 = shape.iter().product();
        (Tensor::arange(n, (Kind::Float, tch::Device::Cpu)).remainder(64.0) + name.len() as f64).view(shape)
    }

    fn write(dir: &Path, config: &ModelConfig, kind: Kind, max: u64) {
        write_folder(dir, config, kind, max, &mut |name, shape| Ok(value(name, shape))).unwrap();
    }

    #[test]
    fn what_is_written_is_read_in_any_kind_and_any_number_of_files() {
        let root = tempfile::tempdir().unwrap();
        for (tied, kind, max) in [
            (true, Kind::BFloat16, SHARD_BYTES),
            (false, Kind::Float, 500),
            (false, Kind::Half, 1),
            (true, Kind::Float, 1),
        ] {
            let (dir, config) = (root.path().join(format!("{tied}-{kind:?}-{max}")), config(tied));
            write(&dir, &config, kind, max);
            assert_eq!(ModelConfig::open(&dir).unwrap(), config);
            let weights = Weights::open(&dir).unwrap();
            assert_eq!(dir.join(INDEX).exists(), max != SHARD_BYTES);
            for (name, shape) in config.parameter_shapes() {
                let read = weights.tensor(&name, &shape, Kind::Float).unwrap();
                assert_eq!((read.kind(), &read), (Kind::Float, &value(&name, &shape)), "{name}");
            }
        }
    }

    #[test]
    fn the_digest_is_of_the_weights_and_not_of_their_files() {
        let root = tempfile::tempdir().unwrap();
        let digest = |name: &str, max: u64, change: f64| {
            let dir = root.path().join(name);
            let value = |name: &str, shape: &[i64]| {
                let value = value(name, shape);
                if name == "model.norm.weight" {
                    let _ = value.get(7).fill_(change);
                }
                Ok(value)
            };
            write_folder(&dir, &config(false), Kind::Float, max, &mut { value }).unwrap();
            Weights::open(&dir).unwrap().digest()
        };
        let whole = digest("whole", SHARD_BYTES, 1.0);
        assert_eq!(digest("cut", 300, 1.0), whole);
        assert_ne!(digest("changed", SHARD_BYTES, 2.0), whole);

        let weights = Weights::open(&root.path().join("cut")).unwrap();
        let with = |change: &dyn Fn(&mut ModelConfig)| {
            let mut config = config(false);
            change(&mut config);
            weights.digest_with(&config)
        };
        let model = with(&|_| ());
        assert_eq!(with(&|config| config.eos_token_id = vec![2, 3]), model);
        assert_ne!(with(&|config| config.norm_epsilon = 1e-6), model);
    }

    #[test]
    fn what_is_wrong_with_weights_is_named() {
        let root = tempfile::tempdir().unwrap();
        let check = |case: &str, spoil: &dyn Fn(&Path), sentences: &[&str]| {
            let dir = root.path().join(case);
            write(&dir, &config(true), Kind::Float, 700);
            spoil(&dir);
            let said = format!("{:#}", Weights::open(&dir).err().expect(case));
            for sentence in sentences {
                assert!(said.contains(sentence), "{case}: {said}");
            }
        };
        let with_config = |change: &'static str, to: &'static str| {
            move |dir: &Path| {
                let path = dir.join("config.json");
                let text = fs::read_to_string(&path).unwrap();
                assert!(text.contains(change), "{text}");
                fs::write(&path, text.replace(change, to)).unwrap();
            }
        };
        let last = |dir: &Path| {
            let mut names: Vec<_> = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect();
            names.retain(|path| path.extension().is_some_and(|extension| extension == "safetensors"));
            names.sort();
            names.pop().unwrap()
        };
        check(
            "shape",
            &with_config("\"vocab_size\": 12", "\"vocab_size\": 13"),
            &["model.embed_tokens.weight is [12, 8], expected [13, 8]"],
        );
        check(
            "missing",
            &with_config("\"num_hidden_layers\": 2", "\"num_hidden_layers\": 3"),
            &[
                "model.layers.2.input_layernorm.weight is missing, expected [8]",
                "and 1 more",
            ],
        );
        check(
            "extra",
            &with_config("\"num_hidden_layers\": 2", "\"num_hidden_layers\": 1"),
            &["model.layers.1.mlp.gate_proj.weight [10, 8] is extra"],
        );
        check(
            "untied",
            &with_config("\"tie_word_embeddings\": true", "\"tie_word_embeddings\": false"),
            &["lm_head.weight is missing, expected [12, 8]"],
        );
        check(
            "truncated",
            &|dir| {
                let path = last(dir);
                let bytes = fs::read(&path).unwrap();
                fs::write(&path, &bytes[..bytes.len() - 3]).unwrap();
            },
            &["its header says", "truncated; copy it again"],
        );
        check(
            "header",
            &|dir| fs::write(last(dir), [200, 0, 0, 0, 0, 0, 0, 0, b'{']).unwrap(),
            &["it has 9 bytes, its header alone should have 200"],
        );
        check(
            "noise",
            &|dir| fs::write(last(dir), b"<!DOCTYPE html><html>").unwrap(),
            &["no safetensors file"],
        );
        check(
            "empty",
            &|dir| fs::write(last(dir), b"").unwrap(),
            &["no safetensors file"],
        );
        check(
            "gone",
            &|dir| fs::remove_file(last(dir)).unwrap(),
            &["copy the missing file"],
        );
        check(
            "nothing",
            &|dir| fs::remove_file(dir.join(INDEX)).unwrap(),
            &["holds neither model.safetensors nor"],
        );
    }

    #[test]
    fn a_tied_head_stored_twice_must_be_equal() {
        let root = tempfile::tempdir().unwrap();
        for (factor, good) in [(1.0, true), (2.0, false)] {
            write_folder(
                root.path().join("m").as_path(),
                &config(false),
                Kind::Float,
                SHARD_BYTES,
                &mut |name, shape| {
                    let factor = if name == "lm_head.weight" { factor } else { 1.0 };
                    Ok(value("one name", shape) * factor)
                },
            )
            .unwrap();
            config(true).write(&root.path().join("m"), "float32").unwrap();
            assert_eq!(Weights::open(&root.path().join("m")).is_ok(), good);
        }
    }
}
