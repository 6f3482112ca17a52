//! A unigram vocabulary (Kudo 2018) from weighted words, through the trainer of `tokenizers`, and its tokenizer.json.
//!
//! `tokenizers` adds scores in 64-bit floats, SentencePiece in 32-bit ones. Both keep the first of equals, starting from the
//! left. So scores are multiples of 2⁻⁶: sums of them are exact in both up to 2¹⁸ nats, which is a text of some hundred
//! thousand characters, and both cut every such text alike.

use std::collections::HashSet;

use serde_json::{Value, json};
use tokenizers::models::unigram::{Unigram, UnigramTrainer};

use crate::vocabulary::sentencepiece::byte_piece;
use crate::vocabulary::words::WordCounts;
use crate::{Error, Result};

/// What [`train_unigram`] shall make.
#[derive(Clone, Debug, PartialEq)]
pub struct UnigramTraining {
    /// Pieces beside the three special ones and the 256 bytes of [`unigram_tokenizer_json`].
    pub pieces: usize,
    /// No piece has more characters.
    pub max_piece_characters: usize,
}

/// A piece and the logarithm of its probability, a multiple of 2⁻⁶.
#[derive(Clone, Debug, PartialEq)]
pub struct ScoredPiece {
    pub piece: String,
    pub score: f64,
}

/// Scores are multiples of one over this.
const STEPS: f64 = 64.0;

/// The pieces that stand before the learned ones: `<unk>`, `<s>`, `</s>`.
const SPECIAL: [&str; 3] = ["<unk>", "<s>", "</s>"];

/// So low that no text takes a special or byte piece for what it spells, as SentencePiece's control and byte pieces are
/// never found in a text.
const OUT_OF_REACH: f64 = -10_000.0;

/// Word counts, times characters, are scaled to this sum: the trainer counts in 32 bits.
const WHOLE_COUNT: u128 = 1 << 31;

/// A longer word is cut; the trainer's time and precision suffer from it, and no piece is nearly as long.
const MOST_CHARACTERS: usize = 256;

/// Sums of floats depend on how many threads each add a part, so there are always so many.
const THREADS: usize = 4;

/// Learns a vocabulary; the same words give the same pieces on any machine of a kind, whatever its cores. Every character
/// of the words and every printing one of ASCII is a piece.
pub fn train_unigram(words: &WordCounts, training: &UnigramTraining) -> Result<Vec<ScoredPiece>> {
    let trainer = UnigramTrainer::builder()
        .show_progress(false)
        .vocab_size(training.pieces as u32)
        .max_piece_length(training.max_piece_characters)
        .initial_alphabet(('!'..='~').collect())
        .build()
        .map_err(|e| failed(&e.to_string()))?;
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(THREADS)
        .build()
        .map_err(|e| failed(&e.to_string()))?;
    let mut model = Unigram::default();
    pool.install(|| trainer.do_train(sentences(words), &mut model))
        .map_err(|e| failed(&e.to_string()))?;
    let pieces = settled(model.iter().cloned().collect());
    if pieces.len() < training.pieces {
        return Err(Error::TooFewPieces {
            wanted: training.pieces,
            found: pieces.len(),
        });
    }
    Ok(pieces)
}

fn failed(reason: &str) -> Error {
    Error::Unigram {
        reason: reason.to_owned(),
    }
}

/// Words and their scaled weights, in the order of their bytes.
fn sentences(words: &WordCounts) -> Vec<(String, u32)> {
    let whole: u128 = words
        .iter()
        .map(|(word, weight, _)| u128::from(weight) * word.len() as u128)
        .sum();
    let mut sentences = Vec::with_capacity(words.len());
    for (word, weight, _) in words.iter_sorted() {
        let scaled = u128::from(weight) * WHOLE_COUNT.min(whole) / whole.max(1);
        let characters: Vec<char> = String::from_utf8_lossy(word).chars().filter(|c| *c != '\0').collect();
        for part in characters.chunks(MOST_CHARACTERS) {
            sentences.push((part.iter().collect(), scaled.max(1) as u32));
        }
    }
    sentences
}

/// Rounds the scores and sorts the pieces by them, then by their strings.
///
/// Characters that the training lost come back with the lowest score and, one after the other in the order of a hash table,
/// 10⁻⁴ more. They all get the lowest score.
fn settled(pieces: Vec<(String, f64)>) -> Vec<ScoredPiece> {
    let lowest = pieces.iter().map(|(_, score)| *score).fold(0.0, f64::min);
    let single = |piece: &str| piece.chars().nth(1).is_none();
    let n_single = pieces.iter().filter(|(piece, _)| single(piece)).count();
    let lost = lowest + 1e-4 * n_single as f64;
    let settle = |(piece, score): (String, f64)| {
        let score = if single(&piece) && score <= lost { lowest } else { score };
        let score = (score * STEPS).round() / STEPS;
        ScoredPiece { piece, score }
    };
    let mut pieces: Vec<ScoredPiece> = pieces.into_iter().map(settle).collect();
    pieces.sort_by(|a, b| b.score.total_cmp(&a.score).then_with(|| a.piece.cmp(&b.piece)));
    pieces
}

/// The tokenizer.json of learned pieces: `<unk>`, `<s>`, `</s>`, the 256 bytes, then the pieces. Spaces are ▁, one stands
/// before the text, characters without a piece are spelled in bytes.
///
/// The SentencePiece model that agrees with it on every string has the same pieces in the same order: `<unk>` UNKNOWN,
/// `<s>` and `</s>` CONTROL, the bytes BYTE, all with score 0, the others NORMAL with their scores; `model_type` UNIGRAM,
/// `byte_fallback`, normaliser `identity` with `add_dummy_prefix`, without `remove_extra_whitespaces`, with
/// `escape_whitespaces`.
pub fn unigram_tokenizer_json(pieces: &[ScoredPiece]) -> Value {
    let bytes = (0..=255u8).map(byte_piece);
    let fixed: Vec<String> = SPECIAL.iter().map(|piece| (*piece).to_owned()).chain(bytes).collect();
    // A word of the text may look like one of them. It is spelled otherwise.
    let known: HashSet<&str> = fixed.iter().map(String::as_str).collect();
    let learned = pieces.iter().filter(|scored| !known.contains(scored.piece.as_str()));
    let vocabulary: Vec<Value> = fixed
        .iter()
        .map(|piece| json!([piece, OUT_OF_REACH]))
        .chain(learned.map(|scored| json!([scored.piece, scored.score])))
        .collect();
    let special = |id: usize| {
        json!({"id": id, "content": SPECIAL[id], "single_word": false, "lstrip": false, "rstrip": false,
               "normalized": false, "special": true})
    };
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": [special(0), special(1), special(2)],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
        "pre_tokenizer": null,
        "post_processor": {"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
                     {"SpecialToken": {"id": "<s>", "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}},
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "Unigram", "unk_id": 0, "byte_fallback": true, "vocab": vocabulary},
    })
}
