//! Extends a byte-level tokenizer with pieces for the corpus's languages, learned on language-sampled training text.
//! Base ids never move, the base's own segmentation is only ever merged further, everything else in the files stays.

mod continued_bpe;
pub(crate) mod llama_pieces;
pub(crate) mod tokenizer;

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::Path;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokenizers::{
    Model, NormalizedString, Normalizer, OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer,
};

use crate::finished::{Unfinished, write_synced};
use crate::folder::digest_of;
use crate::stream::shares::weights;
use crate::vocabulary::continued_bpe::{Limits, Symbols, Word, learn};
use crate::vocabulary::tokenizer::TOKENIZER;
use crate::{Corpus, Document, Error, Language, LanguageEntry, Progress, Result, Split, Tokenizer};

const VOCABULARY: &str = "vocabulary.json";

/// Files of a tokenizer folder that go along unchanged, where the base has them.
const COMPANIONS: [&str; 3] = [
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
];

/// More text of one language teaches the vocabulary nothing; documents beyond it are left out by hash.
const MOST_BYTES_PER_LANGUAGE: usize = 64 << 20;

/// The weights of all training text together, in fixed point: fine enough for hundreds of languages, far from overflow.
const WHOLE_WEIGHT: u128 = 1 << 48;

/// What the new pieces shall be.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VocabularySettings {
    /// Exactly so many are learned, or it is an error.
    pub new_pieces: usize,
    /// Languages weigh p_l ∝ n_l^alpha, n_l in bytes.
    pub alpha: f64,
    /// No piece is longer: one repeated line must not become a token.
    pub max_piece_bytes: usize,
    /// The embedding has a multiple of so many rows.
    pub multiple_of: usize,
    /// Chooses documents where a language has more text than is needed.
    pub seed: u64,
}

/// `vocabulary.json`: what was added to the base.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Vocabulary {
    /// Ids below it are the base's.
    pub base_size: usize,
    /// Base and new pieces.
    pub size: usize,
    /// Rows of the embedding: `size` rounded up.
    pub padded_size: usize,
    /// Piece i has id `base_size + i`.
    pub pieces: Vec<NewPiece>,
    /// BLAKE3 of `tokenizer.json`.
    pub digest: String,
}

/// A piece the base had not.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NewPiece {
    /// In the byte-level alphabet, as in `tokenizer.json`.
    pub piece: String,
    /// How the base spells it: at least two ids.
    pub base_ids: Vec<u32>,
}

/// Tokens that one language's held-out text takes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fertility {
    pub language: Language,
    /// Of UTF-8 text.
    pub bytes: u64,
    /// With the base tokenizer.
    pub tokens_before: u64,
    /// With the extended one.
    pub tokens_after: u64,
}

impl Vocabulary {
    /// Opens the folder that [`extend`] made.
    pub fn open(folder: &Path) -> Result<Vocabulary> {
        let path = folder.join(VOCABULARY);
        if !path.is_file() {
            let (what, command) = ("vocabulary", "panglot vocab");
            return Err(Error::NotFinished {
                path: folder.to_path_buf(),
                what,
                marker: VOCABULARY,
                command,
            });
        }
        let bytes = fs::read(&path).map_err(Error::io("read", &path))?;
        serde_json::from_slice(&bytes).map_err(Error::json(&path))
    }
}

/// Writes the folder `out` with the extended tokenizer and `vocabulary.json`; without settings the base is copied as it is.
/// The base must be a byte-level BPE. Progress counts pieces.
pub fn extend(
    corpus: &Corpus,
    base_tokenizer_folder: &Path,
    settings: Option<&VocabularySettings>,
    out: &Path,
    progress: Progress,
) -> Result<Vocabulary> {
    let base = Tokenizer::open(base_tokenizer_folder)?;
    let folder = Unfinished::begin(out, VOCABULARY)?;
    let mut vocabulary = Vocabulary {
        base_size: base.size(),
        size: base.size(),
        padded_size: base.size(),
        pieces: Vec::new(),
        digest: base.digest().to_owned(),
    };
    let mut bytes = fs::read(base.path()).map_err(Error::io("read", base.path()))?;
    if let Some(settings) = settings {
        check_settings(settings)?;
        let mut file: Value = serde_json::from_slice(&bytes).map_err(Error::json(base.path()))?;
        check_base(&file).map_err(|reason| Error::CannotExtend {
            path: base.path().to_path_buf(),
            reason,
        })?;
        let learned = learn_pieces(corpus, &base, settings, progress)?;
        append(&mut file, &learned);
        bytes = serde_json::to_vec_pretty(&file).map_err(Error::json(base.path()))?;
        vocabulary.size += learned.len();
        vocabulary.padded_size = vocabulary.size.next_multiple_of(settings.multiple_of);
        vocabulary.pieces = learned.into_iter().map(|learned| learned.piece).collect();
        vocabulary.digest = digest_of(&bytes);
    }
    write_synced(&folder.path().join(TOKENIZER), &bytes)?;
    copy_companions(base_tokenizer_folder, folder.path())?;
    let path = folder.path().join(VOCABULARY);
    write_synced(
        &path,
        &serde_json::to_vec_pretty(&vocabulary).map_err(Error::json(&path))?,
    )?;
    folder.finish()?;
    Ok(vocabulary)
}

/// Counts the tokens of every language's held-out text with both tokenizers. Languages without such text are left out.
pub fn fertility(corpus: &Corpus, base: &Tokenizer, extended: &Tokenizer) -> Result<Vec<Fertility>> {
    let measure = |entry: &LanguageEntry| -> Result<Fertility> {
        let documents = corpus.documents(&entry.language, Split::HeldOut)?;
        let count = |tokenizer: &Tokenizer| -> Result<u64> {
            documents
                .iter()
                .map(|document| Ok(tokenizer.encode(&document.text)?.len() as u64))
                .sum()
        };
        let (tokens_before, tokens_after) = (count(base)?, count(extended)?);
        Ok(Fertility {
            language: entry.language.clone(),
            bytes: entry.held_out.bytes,
            tokens_before,
            tokens_after,
        })
    };
    corpus
        .manifest()
        .languages
        .par_iter()
        .filter(|entry| entry.held_out.documents > 0)
        .map(measure)
        .collect()
}

fn check_settings(settings: &VocabularySettings) -> Result<()> {
    let wrong = |setting, value: String, rule| Err(Error::VocabularySetting { setting, value, rule });
    if settings.new_pieces == 0 {
        return wrong(
            "new_pieces",
            "0".into(),
            "must be at least 1; to keep the base's vocabulary leave `vocabulary` out",
        );
    }
    if !(0.0..=1.0).contains(&settings.alpha) {
        return wrong(
            "alpha",
            settings.alpha.to_string(),
            "must lie between 0 and 1; MaLA-500 uses 0.3",
        );
    }
    if settings.max_piece_bytes < 2 {
        return wrong(
            "max_piece_bytes",
            settings.max_piece_bytes.to_string(),
            "must be at least 2; try 32",
        );
    }
    if settings.multiple_of == 0 {
        return wrong("multiple_of", "0".into(), "must be at least 1; 64 suits GPUs");
    }
    Ok(())
}

/// Whether appending merges means what this file promises.
fn check_base(file: &Value) -> Result<(), String> {
    let model = &file["model"];
    if !model["vocab"].is_object() || !model["merges"].is_array() {
        return Err(format!("its model is {}, not BPE", model["type"]));
    }
    if model["byte_fallback"] == json!(true) {
        return Err(
            "it falls back to bytes in the manner of SentencePiece, and only byte-level BPE can grow for now".into(),
        );
    }
    if model["ignore_merges"] == json!(true) {
        return Err("`ignore_merges` is on, so its merges do not decide how words are cut".into());
    }
    for option in ["continuing_subword_prefix", "end_of_word_suffix"] {
        if model[option].as_str().is_some_and(|affix| !affix.is_empty()) {
            return Err(format!("it uses {option}"));
        }
    }
    if model["dropout"].as_f64().is_some_and(|dropout| dropout > 0.0) {
        return Err("its merges drop out at random".into());
    }
    let pre_tokenizer = &file["pre_tokenizer"];
    let parts = pre_tokenizer["pretokenizers"]
        .as_array()
        .map_or(std::slice::from_ref(pre_tokenizer), Vec::as_slice);
    if !parts.iter().any(|part| part["type"] == "ByteLevel") {
        return Err("it is not byte-level".into());
    }
    Ok(())
}

/// A new piece and the two pieces it is merged from.
struct Learned {
    piece: NewPiece,
    pair: [String; 2],
    id: u32,
}

fn learn_pieces(
    corpus: &Corpus,
    base: &Tokenizer,
    settings: &VocabularySettings,
    progress: Progress,
) -> Result<Vec<Learned>> {
    let mut words = encoded_words(corpus, base, settings)?;
    // Ids that the base leaves free keep an empty string; no word holds them.
    let strings = (0..base.size() as u32)
        .map(|id| base.piece(id).unwrap_or_default())
        .collect();
    let added = base
        .engine()
        .get_added_tokens_decoder()
        .into_values()
        .map(|token| token.content);
    let mut symbols = Symbols::new(strings, added);
    let limits = Limits {
        new_pieces: settings.new_pieces,
        max_piece_bytes: settings.max_piece_bytes,
    };
    let wanted = settings.new_pieces;
    let found = learn(&mut words, &mut symbols, &limits, &mut |done| {
        progress(done, wanted as u64)
    });
    if found < wanted {
        return Err(Error::TooFewPieces { wanted, found });
    }
    let learned = (base.size() as u32..)
        .zip(&symbols.merges)
        .map(|(id, (left, right))| Learned {
            piece: NewPiece {
                piece: symbols.string(id).to_owned(),
                base_ids: symbols.base_ids(id),
            },
            pair: [symbols.string(*left).to_owned(), symbols.string(*right).to_owned()],
            id,
        });
    Ok(learned.collect())
}

/// The distinct words of the training text as the base encodes them, in the order of their strings.
fn encoded_words(corpus: &Corpus, base: &Tokenizer, settings: &VocabularySettings) -> Result<Vec<Word>> {
    let entries = &corpus.manifest().languages;
    let bytes: Vec<u64> = entries.iter().map(|entry| entry.train.bytes).collect();
    let shares = weights(&bytes, settings.alpha);
    let whole: u128 = shares.iter().sum();
    let mut words: BTreeMap<String, (u64, u64)> = BTreeMap::new();
    for (entry, share) in entries.iter().zip(shares) {
        let documents = sampled(corpus.documents(&entry.language, Split::Train)?, settings.seed);
        let sampled_bytes: u128 = documents.iter().map(|document| document.text.len() as u128).sum();
        // A language's weight is spread over its bytes, so that each word weighs what its language may give it.
        let weight = share * WHOLE_WEIGHT / (whole * sampled_bytes).max(1);
        for (word, count) in count_words(&documents, base)? {
            let (total_weight, total_count) = words.entry(word).or_default();
            *total_weight += count * (weight as u64).max(1);
            *total_count += count;
        }
    }
    let words: Vec<_> = words.into_iter().collect();
    let encode = |(word, (weight, count)): &(String, (u64, u64))| -> Result<Word> {
        let tokens = base.engine().get_model().tokenize(word).map_err(|e| base.bad(e))?;
        Ok(Word {
            symbols: tokens.iter().map(|token| token.id).collect(),
            weight: *weight,
            count: *count,
        })
    };
    words.par_iter().map(encode).collect()
}

/// All of a language's documents, or those that the seed picks where there are too many.
fn sampled(mut documents: Vec<Document>, seed: u64) -> Vec<Document> {
    documents.sort_by_cached_key(|document| {
        *blake3::Hasher::new()
            .update(&seed.to_le_bytes())
            .update(document.key.as_bytes())
            .finalize()
            .as_bytes()
    });
    let mut bytes = 0;
    documents
        .into_iter()
        .take_while(|document| {
            let room = bytes < MOST_BYTES_PER_LANGUAGE;
            bytes += document.text.len();
            room
        })
        .collect()
}

/// How often each pre-token stands in the documents.
fn count_words(documents: &[Document], base: &Tokenizer) -> Result<HashMap<String, u64>> {
    let count = |mut counts: HashMap<String, u64>, document: &Document| -> tokenizers::Result<_> {
        for word in words_of(&document.text, base)? {
            *counts.entry(word).or_default() += 1;
        }
        Ok(counts)
    };
    let merge = |mut all: HashMap<String, u64>, part: HashMap<String, u64>| {
        part.into_iter()
            .for_each(|(word, count)| *all.entry(word).or_default() += count);
        Ok(all)
    };
    let counts = documents
        .par_iter()
        .try_fold(HashMap::new, count)
        .try_reduce(HashMap::new, merge);
    counts.map_err(|e| base.bad(e))
}

/// The pre-tokens of a text in the byte-level alphabet, as the base's model will see them.
fn words_of(text: &str, base: &Tokenizer) -> tokenizers::Result<Vec<String>> {
    let mut normalized = NormalizedString::from(text);
    if let Some(normalizer) = base.engine().get_normalizer() {
        normalizer.normalize(&mut normalized)?;
    }
    let mut words = PreTokenizedString::from(normalized);
    if let Some(pre_tokenizer) = base.engine().get_pre_tokenizer() {
        pre_tokenizer.pre_tokenize(&mut words)?;
    }
    let splits = words.get_splits(OffsetReferential::Normalized, OffsetType::None);
    Ok(splits.into_iter().map(|(word, _, _)| word.to_owned()).collect())
}

/// Puts the pieces behind the base's vocabulary and their merges behind its merges, in the base's own notation.
fn append(file: &mut Value, learned: &[Learned]) {
    let as_text = file["model"]["merges"][0].is_string();
    for Learned { piece, pair, id } in learned {
        file["model"]["vocab"][&piece.piece] = json!(id);
        let merge = if as_text { json!(pair.join(" ")) } else { json!(pair) };
        if let Some(merges) = file["model"]["merges"].as_array_mut() {
            merges.push(merge);
        }
    }
}

fn copy_companions(from: &Path, to: &Path) -> Result<()> {
    for name in COMPANIONS {
        let path = from.join(name);
        if path.is_file() {
            write_synced(&to.join(name), &fs::read(&path).map_err(Error::io("read", &path))?)?;
        }
    }
    Ok(())
}
