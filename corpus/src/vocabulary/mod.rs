//! Extends a tokenizer with pieces for the corpus's languages, learned on language-sampled training text: a byte-level one
//! here, one of SentencePiece's kind in [`sentencepiece`]. Base ids never move; everything else in the files stays.

mod continued_bpe;
mod engine;
pub(crate) mod from_scratch;
pub(crate) mod llama_pieces;
pub(crate) mod plain_bpe;
pub(crate) mod report;
pub(crate) mod sentencepiece;
pub(crate) mod settings;
pub(crate) mod tokenizer;
pub(crate) mod unigram;
pub(crate) mod words;

use std::collections::HashSet;
use std::fs;
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::finished::{Unfinished, read_manifest, write_synced};
use crate::folder::digest_of;
use crate::vocabulary::continued_bpe::{Limits, Pair, Symbols, learn};
use crate::vocabulary::sentencepiece::proto::SENTENCEPIECE;
use crate::vocabulary::settings::{Scores, VocabularySettings, WordRules};
use crate::vocabulary::tokenizer::{TOKENIZER, tokenizer_file};
use crate::vocabulary::words::encoded_words;
use crate::{Corpus, Error, Progress, Result, Split, Tokenizer};

const VOCABULARY: &str = "vocabulary.json";

/// Describes the tokenizer to `transformers`: its class and its special tokens.
const CONFIG: &str = "tokenizer_config.json";
const SPECIAL_TOKENS: &str = "special_tokens_map.json";
const TEMPLATE: &str = "chat_template.jinja";

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
    /// New pieces whose score was lowered by the least step there is, so that both files cut alike.
    #[serde(default)]
    pub lowered_scores: usize,
    /// New pieces that no text can hold, because other merges come before theirs; only with scores: kept.
    #[serde(default)]
    pub unreachable: usize,
}

/// A piece the base had not.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NewPiece {
    /// As in `tokenizer.json`: in the byte-level alphabet, or with ▁ for the space.
    pub piece: String,
    /// How the base spells it: at least two ids, among them those of bytes.
    pub base_ids: Vec<u32>,
}

impl Vocabulary {
    /// Opens the folder that [`extend`] made.
    pub fn open(folder: &Path) -> Result<Vocabulary> {
        read_manifest(folder, VOCABULARY, "vocabulary", "panglot vocab")
    }
}

/// Writes the folder `out` with the extended tokenizer and `vocabulary.json`; without settings the base is copied as it is.
/// The base must be a BPE, byte-level or of SentencePiece's kind; the latter gets a `tokenizer.model` too. Progress counts
/// pieces.
pub fn extend(
    corpus: &Corpus,
    base_tokenizer_folder: &Path,
    settings: Option<&VocabularySettings>,
    out: &Path,
    progress: Progress,
) -> Result<Vocabulary> {
    let base = Tokenizer::open(base_tokenizer_folder)?;
    let folder = Unfinished::begin(out, VOCABULARY)?;
    let extended = match settings {
        None => as_it_is(&base, base_tokenizer_folder)?,
        Some(settings) => {
            settings.check()?;
            for language in &settings.preserve {
                corpus.check_has(language)?;
            }
            extended(corpus, &base, base_tokenizer_folder, settings, progress)?
        }
    };
    for (name, bytes) in &extended.files {
        write_synced(&folder.path().join(name), bytes)?;
    }
    check_numbers(&base, &Tokenizer::open(folder.path())?, &extended.vocabulary.pieces)?;
    let path = folder.path().join(VOCABULARY);
    write_synced(
        &path,
        &serde_json::to_vec_pretty(&extended.vocabulary).map_err(Error::json(&path))?,
    )?;
    folder.finish()?;
    Ok(extended.vocabulary)
}

/// A tokenizer's folder, to be written.
struct Extended {
    files: Vec<(&'static str, Vec<u8>)>,
    vocabulary: Vocabulary,
}

/// Files of a tokenizer folder that go along unchanged, where the base has them.
fn companions(folder: &Path, names: &[&'static str]) -> Result<Vec<(&'static str, Vec<u8>)>> {
    let mut files = Vec::new();
    for name in names {
        let path = folder.join(name);
        if path.is_file() {
            files.push((*name, fs::read(&path).map_err(Error::io("read", &path))?));
        }
    }
    Ok(files)
}

fn as_it_is(base: &Tokenizer, folder: &Path) -> Result<Extended> {
    let mut files = companions(folder, &[SENTENCEPIECE, CONFIG, SPECIAL_TOKENS, TEMPLATE])?;
    files.push((TOKENIZER, tokenizer_file(folder)?));
    Ok(Extended {
        files,
        vocabulary: Vocabulary {
            base_size: base.size(),
            size: base.size(),
            padded_size: base.size(),
            pieces: Vec::new(),
            digest: base.digest().to_owned(),
            lowered_scores: 0,
            unreachable: 0,
        },
    })
}

fn extended(
    corpus: &Corpus,
    base: &Tokenizer,
    folder: &Path,
    settings: &VocabularySettings,
    progress: Progress,
) -> Result<Extended> {
    let mut file: Value = serde_json::from_slice(&tokenizer_file(folder)?).map_err(Error::json(base.path()))?;
    let mut files = companions(folder, &[TEMPLATE])?;
    let (mut lowered_scores, mut unreachable) = (0, 0);
    let is_sentencepiece = file["model"]["byte_fallback"] == json!(true) || sentencepiece::is_in(folder);
    let pieces = if is_sentencepiece {
        let model = sentencepiece::base_model(folder, base.path(), &file)?;
        let extension = sentencepiece::extend(corpus, model, base.path(), &file, settings, progress)?;
        files.push((SENTENCEPIECE, extension.model.bytes()));
        (lowered_scores, unreachable) = (extension.lowered, extension.unreachable);
        file = extension.json;
        extension.pieces
    } else {
        check_byte_level(&file, settings).map_err(|reason| Error::CannotExtend {
            path: base.path().to_path_buf(),
            reason,
        })?;
        let learned = learn_pieces(corpus, base, settings, progress)?;
        number_added_tokens(&mut file, base);
        append(&mut file, &learned);
        let mut pieces: Vec<NewPiece> = learned.into_iter().map(|learned| learned.piece).collect();
        pieces.extend(add_tokens(&mut file, base, pieces.len(), settings)?);
        pieces
    };
    let bytes = serde_json::to_vec_pretty(&file).map_err(Error::json(base.path()))?;
    let size = base.size() + pieces.len();
    let vocabulary = Vocabulary {
        base_size: base.size(),
        size,
        padded_size: size.next_multiple_of(settings.multiple_of),
        pieces,
        digest: digest_of(&bytes),
        lowered_scores,
        unreachable,
    };
    files.push((TOKENIZER, bytes));
    for (name, bytes) in companions(folder, &[CONFIG, SPECIAL_TOKENS])? {
        let path = folder.join(name);
        let described: Value = serde_json::from_slice(&bytes).map_err(Error::json(&path))?;
        let described = describe(described, name == CONFIG && is_sentencepiece, &settings.special);
        files.push((name, serde_json::to_vec_pretty(&described).map_err(Error::json(&path))?));
    }
    Ok(Extended { files, vocabulary })
}

/// What `transformers` reads beside `tokenizer.json`, with the new special tokens. Its class for LLaMA would put its own
/// way of cutting in place of the file's and lose a space in front of the text, so the class that takes the file as it is
/// is named instead.
fn describe(mut described: Value, names_the_class: bool, special: &[String]) -> Value {
    if names_the_class {
        described["tokenizer_class"] = json!("PreTrainedTokenizerFast");
    }
    if !special.is_empty() {
        let mut all = described["additional_special_tokens"]
            .as_array()
            .cloned()
            .unwrap_or_default();
        all.extend(special.iter().map(|token| json!(token)));
        described["additional_special_tokens"] = json!(all);
    }
    described
}

/// Whether appending merges means what this file promises.
fn check_byte_level(file: &Value, settings: &VocabularySettings) -> Result<(), String> {
    let model = &file["model"];
    if settings.scores == Scores::Kept {
        return Err(
            "it is byte-level and has no scores to keep: scores: kept is for SentencePiece bases, use after_base"
                .into(),
        );
    }
    if settings.words != WordRules::default() {
        return Err("it is byte-level and cuts words its own way, so that `words` cannot be set".into());
    }
    if !model["vocab"].is_object() || !model["merges"].is_array() {
        return Err(format!("its model is {}, not BPE", model["type"]));
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
    let mut words = encoded_words(corpus, base, &settings.sampling)?;
    // Ids that the base leaves free keep an empty string; no word holds them.
    let strings = (0..base.size() as u32)
        .map(|id| base.piece(id).unwrap_or_default())
        .collect();
    let added = base
        .inner()
        .get_added_tokens_decoder()
        .into_values()
        .map(|token| token.content);
    let mut symbols = Symbols::new(strings, added.chain(settings.tokens()));
    symbols.ban(occurring(corpus, base, settings)?);
    let limits = Limits {
        new_pieces: settings.new_pieces,
        max_piece_chars: settings.max_piece_bytes,
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

/// The pairs of neighbouring symbols in all training text of the languages to preserve.
fn occurring(corpus: &Corpus, base: &Tokenizer, settings: &VocabularySettings) -> Result<HashSet<Pair>> {
    let mut pairs = HashSet::new();
    let mut symbols = Vec::new();
    for entry in settings.preserve.iter().flat_map(|language| corpus.entries(language)) {
        for document in corpus.documents(entry, Split::Train)? {
            let mut spelled = Ok(());
            base.each_word(&document?.text, &mut |word| {
                symbols.clear();
                if let Err(error) = base.spell(word, &mut symbols) {
                    spelled = Err(error);
                }
                pairs.extend(symbols.windows(2).map(|two| (two[0], two[1])));
            })?;
            spelled?;
        }
    }
    Ok(pairs)
}

/// Has the vocabulary name the base's added tokens too: those that it does not name, `tokenizers` numbers behind it when the file
/// is read, whatever their entries say, and new pieces would move them.
fn number_added_tokens(file: &mut Value, base: &Tokenizer) {
    for (id, token) in base.inner().get_added_tokens_decoder() {
        let vocabulary = &mut file["model"]["vocab"];
        if vocabulary[&token.content].is_null() {
            vocabulary[&token.content] = json!(id);
        }
    }
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

/// Puts user-defined and special tokens behind all pieces; `tokenizers` cuts them out of the text before anything else.
fn add_tokens(
    file: &mut Value,
    base: &Tokenizer,
    n_learned: usize,
    settings: &VocabularySettings,
) -> Result<Vec<NewPiece>> {
    let user_defined = settings.user_defined.iter().map(|token| (token, false, "user_defined"));
    let special = settings.special.iter().map(|token| (token, true, "special"));
    let mut pieces = Vec::new();
    for (id, (token, is_special, setting)) in (base.size() + n_learned..).zip(user_defined.chain(special)) {
        if base.id(token).is_some() {
            let (value, rule) = (token.clone(), "is a token already; leave it out");
            return Err(Error::VocabularySetting { setting, value, rule });
        }
        if let Some(tokens) = file["added_tokens"].as_array_mut() {
            tokens.push(
                json!({"id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": is_special}),
            );
        }
        file["model"]["vocab"][token] = json!(id);
        pieces.push(NewPiece {
            piece: token.clone(),
            base_ids: base.encode(token)?,
        });
    }
    Ok(pieces)
}

/// Every piece of the base keeps its number, and the new ones follow: rows of the model's matrices go by it.
fn check_numbers(base: &Tokenizer, extended: &Tokenizer, pieces: &[NewPiece]) -> Result<()> {
    let old = (0..base.size() as u32).filter_map(|id| Some((id, base.piece(id)?)));
    let new = (base.size() as u32..).zip(pieces.iter().map(|piece| piece.piece.clone()));
    for (id, piece) in old.chain(new) {
        if extended.piece(id).as_ref() != Some(&piece) {
            return Err(Error::CannotExtend {
                path: base.path().to_path_buf(),
                reason: format!("its piece {piece:?} would not keep the number {id}"),
            });
        }
    }
    Ok(())
}
