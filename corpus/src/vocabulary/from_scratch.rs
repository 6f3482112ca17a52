//! A vocabulary with no base: three special pieces, 256 bytes, and what the corpus teaches, by BPE or as a unigram model.
//! Writes `tokenizer.json` and the `tokenizer.model` that cuts every text alike.

use std::fs;
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::finished::write_synced;
use crate::vocabulary::sentencepiece::proto::{Kind, ModelProto, ModelType, Piece, SENTENCEPIECE};
use crate::vocabulary::sentencepiece::{self, convert};
use crate::vocabulary::settings::{Scores, VocabularySettings, WordRules};
use crate::vocabulary::tokenizer::TOKENIZER;
use crate::vocabulary::unigram::{ScoredPiece, UnigramTraining, train_unigram, unigram_tokenizer_json};
use crate::vocabulary::words::{TextSampling, metaspace_words, sampled_words};
use crate::{Corpus, Error, Progress, Result};

/// What a vocabulary from scratch shall be.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ScratchVocabulary {
    pub algorithm: Algorithm,
    /// All of them: `<unk>`, `<s>`, `</s>`, the 256 bytes, and the learned ones.
    pub pieces: usize,
    /// How languages share the training text.
    pub sampling: TextSampling,
    /// How text is cut before pieces are learned; a unigram model is trained on whole words, and of these rules has the
    /// piece length only.
    pub words: WordRules,
}

/// How pieces are learned.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Algorithm {
    /// Merges of the heaviest pair (Sennrich et al. 2016).
    Bpe,
    /// A unigram language model (Kudo 2018), as PolyLM's.
    Unigram,
}

/// The pieces before the learned ones.
const FIXED: usize = 3 + 256;

/// Writes `tokenizer.json`, `tokenizer.model` and `tokenizer_config.json` into `out`. Progress counts pieces.
pub fn train_vocabulary(corpus: &Corpus, settings: &ScratchVocabulary, out: &Path, progress: Progress) -> Result<()> {
    let Some(learned) = settings.pieces.checked_sub(FIXED).filter(|learned| *learned > 0) else {
        return Err(Error::VocabularySetting {
            setting: "pieces",
            value: settings.pieces.to_string(),
            rule: "must be more than 259: 3 special pieces and 256 bytes come first; try 32000",
        });
    };
    let (model, json) = match settings.algorithm {
        Algorithm::Bpe => bpe(corpus, settings, learned, out, progress)?,
        Algorithm::Unigram => unigram(corpus, settings, learned, progress)?,
    };
    let config = json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": false,
    });
    fs::create_dir_all(out).map_err(Error::io("create", out))?;
    write_synced(&out.join(SENTENCEPIECE), &model.bytes())?;
    for (name, value) in [("tokenizer_config.json", &config), (TOKENIZER, &json)] {
        let path = out.join(name);
        write_synced(&path, &serde_json::to_vec_pretty(value).map_err(Error::json(&path))?)?;
    }
    Ok(())
}

/// An extension of a base that has bytes only.
fn bpe(
    corpus: &Corpus,
    settings: &ScratchVocabulary,
    learned: usize,
    out: &Path,
    progress: Progress,
) -> Result<(ModelProto, Value)> {
    let bare = bare(ModelType::Bpe);
    let file = convert::tokenizer_json(&bare, &[], None);
    let settings = VocabularySettings {
        new_pieces: learned,
        sampling: settings.sampling.clone(),
        // The rules count characters; no character has more bytes.
        max_piece_bytes: 4 * settings.words.max_piece_length,
        multiple_of: 1,
        scores: Scores::AfterBase,
        preserve: Vec::new(),
        special: Vec::new(),
        user_defined: Vec::new(),
        words: settings.words.clone(),
    };
    settings.check()?;
    let extension = sentencepiece::extend(corpus, bare, out, &file, &settings, progress)?;
    Ok((extension.model, extension.json))
}

fn unigram(
    corpus: &Corpus,
    settings: &ScratchVocabulary,
    learned: usize,
    progress: Progress,
) -> Result<(ModelProto, Value)> {
    settings.sampling.check()?;
    let words = sampled_words(corpus, &settings.sampling, &|text, word| {
        let mut room = Vec::new();
        text.lines()
            .for_each(|line| metaspace_words(line, &mut room, &mut *word));
        Ok(())
    })?;
    let training = UnigramTraining {
        pieces: learned,
        max_piece_characters: settings.words.max_piece_length,
    };
    let mut pieces = train_unigram(&words, &training)?;
    // The trainer may leave a few more than it was asked for; the lightest go, but no character does.
    let mut surplus = pieces.len().saturating_sub(learned);
    let is_character = |scored: &ScoredPiece| scored.piece.chars().nth(1).is_none();
    for at in (0..pieces.len()).rev() {
        if surplus > 0 && !is_character(&pieces[at]) {
            pieces.remove(at);
            surplus -= 1;
        }
    }
    progress(learned as u64, learned as u64);
    let json = unigram_tokenizer_json(&pieces);
    let mut model = bare(ModelType::Unigram);
    let learned = json["model"]["vocab"].as_array().into_iter().flatten().skip(FIXED);
    model
        .pieces
        .extend(learned.filter_map(|pair| Some(Piece::new(pair[0].as_str()?, pair[1].as_f64()? as f32, Kind::Normal))));
    if let Some(trainer) = &mut model.trainer {
        trainer.vocab_size = Some(model.pieces.len() as i32);
    }
    Ok((model, json))
}

/// `<unk>`, `<s>`, `</s>` and the bytes.
fn bare(model_type: ModelType) -> ModelProto {
    let special = [
        ("<unk>", Kind::Unknown),
        ("<s>", Kind::Control),
        ("</s>", Kind::Control),
    ];
    let special = special.map(|(text, kind)| Piece::new(text, 0.0, kind));
    let bytes = (0..=255).map(|byte| Piece::new(sentencepiece::byte_piece(byte), 0.0, Kind::Byte));
    let pieces = special.into_iter().chain(bytes).collect();
    sentencepiece::with_bytes(pieces, model_type, "<unk>", [0, 1, 2], true)
}
