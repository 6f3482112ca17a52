//! SentencePiece-style vocabularies (LLaMA 2: ▁ for the space, byte fallback, a space in front of the text): reads the
//! base, appends pieces, and writes a `tokenizer.model` and a `tokenizer.json` that agree on every string.

pub(crate) mod convert;
pub(crate) mod encoder;
pub(crate) mod proto;
pub(crate) mod text;

use std::collections::{BTreeSet, HashMap, HashSet};
use std::path::Path;

use serde_json::Value;

use crate::vocabulary::NewPiece;
use crate::vocabulary::continued_bpe::{Limits, Symbols, Words, learn};
use crate::vocabulary::sentencepiece::convert::{Merge, agree, tokenizer_json};
use crate::vocabulary::sentencepiece::encoder::{Encoder, SPACE};
use crate::vocabulary::sentencepiece::proto::{
    Kind, ModelProto, ModelType, NormalizerSpec, Piece, SENTENCEPIECE, TrainerSpec,
};
use crate::vocabulary::sentencepiece::text::{covered, in_symbols, occurring, weighted_words};
use crate::vocabulary::settings::{Scores, VocabularySettings};
use crate::{Corpus, Error, Progress, Result};

/// SentencePiece's own way of cutting text, from a `tokenizer.model`: exact, for comparison; [`Tokenizer`](crate::Tokenizer)
/// is the fast one.
pub struct SentencePiece(Encoder);

impl SentencePiece {
    /// Opens the `tokenizer.model` in a folder: a BPE with identity normalisation.
    pub fn open(folder: &Path) -> Result<SentencePiece> {
        let path = folder.join(SENTENCEPIECE);
        let model = ModelProto::read(&path)?;
        check(&model, Growing::No).map_err(|reason| Error::BadTokenizer { path, reason })?;
        Ok(SentencePiece(Encoder::new(&model)))
    }

    /// The ids of a text, without the special tokens a model may want around it.
    pub fn encode(&self, text: &str) -> Vec<u32> {
        self.0.encode(text)
    }
}

/// Whether a folder has a `tokenizer.model`.
pub(crate) fn is_in(folder: &Path) -> bool {
    folder.join(SENTENCEPIECE).is_file()
}

/// The `tokenizer.json` of a folder that has only a `tokenizer.model`.
pub(crate) fn converted(folder: &Path) -> Result<Vec<u8>> {
    let path = folder.join(SENTENCEPIECE);
    let mut model = ModelProto::read(&path)?;
    let bad = |reason| Error::BadTokenizer {
        path: path.clone(),
        reason,
    };
    check(&model, Growing::Yes)
        .and_then(|()| check_characters(&model))
        .map_err(bad)?;
    let n_base = model.pieces.len();
    let agreement = agree(&mut model, n_base).map_err(bad)?;
    serde_json::to_vec_pretty(&tokenizer_json(&model, &agreement.merges, None)).map_err(Error::json(&path))
}

/// [`converted`], of bytes: for [`fuzz`](crate::fuzz). What comes out is what `tokenizers` can open.
pub(crate) fn convert_bytes(bytes: &[u8]) {
    let Ok(mut model) = ModelProto::parse(bytes) else {
        return;
    };
    if check(&model, Growing::Yes).is_err() || check_characters(&model).is_err() {
        return;
    }
    let n_base = model.pieces.len();
    if let Ok(agreement) = agree(&mut model, n_base) {
        let json = tokenizer_json(&model, &agreement.merges, None).to_string();
        let opened = tokenizers::Tokenizer::from_bytes(json).expect("a converted model opens");
        let encoder = Encoder::new(&model);
        let text: String = model.pieces.iter().rev().take(20).map(Piece::text).collect();
        let theirs = opened
            .encode_fast(text.as_str(), false)
            .expect("a converted model encodes");
        // Control pieces in the text are tokens to one and text to the other.
        if !model
            .pieces
            .iter()
            .any(|piece| piece.kind() == Kind::Control && text.contains(piece.text()))
        {
            assert_eq!(theirs.get_ids(), encoder.encode(&text), "{text:?}");
        }
    }
}

/// The `tokenizer.model` of a `tokenizer.json` in LLaMA's form.
pub(crate) fn model_of(file: &Value) -> Result<Vec<u8>, String> {
    Ok(rebuilt(file)?.bytes())
}

/// An extended model, as files and as what was added.
pub(crate) struct Extension {
    pub model: ModelProto,
    pub json: Value,
    pub pieces: Vec<NewPiece>,
    pub lowered: usize,
    pub unreachable: usize,
}

/// Appends what the settings ask for. `file` is the base's `tokenizer.json`.
pub(crate) fn extend(
    corpus: &Corpus,
    base: ModelProto,
    path: &Path,
    file: &Value,
    settings: &VocabularySettings,
    progress: Progress,
) -> Result<Extension> {
    let refuse = |reason: String| Error::CannotExtend {
        path: path.to_path_buf(),
        reason,
    };
    let n_base = base.pieces.len();
    let encoder = Encoder::new(&base);
    let mut model = base;
    let learned = match settings.scores {
        Scores::AfterBase => after_base(corpus, &model, &encoder, settings, progress)?,
        Scores::Kept => kept(corpus, &model, &encoder, settings, progress)?,
    };
    model.pieces.extend(learned);
    complete_characters(&mut model);
    let user_defined = add_user_defined(&mut model, &settings.user_defined)?;
    let agreement = agree(&mut model, n_base).map_err(refuse)?;
    add_special(&mut model, &settings.special)?;

    let mut merges = agreement.merges;
    let reached: HashSet<u32> = merges.iter().map(|merge| merge.piece).collect();
    let is_unreachable = |(id, piece): &(usize, &Piece)| {
        piece.kind() == Kind::Normal && piece.text().chars().nth(1).is_some() && !reached.contains(&(*id as u32))
    };
    let unreachable = model
        .pieces
        .iter()
        .enumerate()
        .skip(n_base)
        .filter(is_unreachable)
        .count();
    merges.extend(user_defined);
    if let Some(trainer) = &mut model.trainer {
        trainer.vocab_size = Some(model.pieces.len() as i32);
        trainer
            .user_defined_symbols
            .extend(settings.user_defined.iter().cloned());
        trainer.control_symbols.extend(settings.special.iter().cloned());
    }
    let pieces = model.pieces[n_base..].iter().map(|piece| NewPiece {
        base_ids: spelled(&encoder, piece.text()),
        piece: piece.text().to_owned(),
    });
    Ok(Extension {
        pieces: pieces.collect(),
        json: tokenizer_json(&model, &merges, Some(file)),
        lowered: agreement.lowered.len(),
        unreachable,
        model,
    })
}

/// The base as SentencePiece has it: its `tokenizer.model`, or, where it has none, rebuilt from a `tokenizer.json` in
/// LLaMA's form. Fails where extending it would not mean what this crate promises.
pub(crate) fn base_model(folder: &Path, json_path: &Path, file: &Value) -> Result<ModelProto> {
    let refuse = |path: &Path, reason: String| Error::CannotExtend {
        path: path.to_path_buf(),
        reason,
    };
    let path = folder.join(SENTENCEPIECE);
    if path.is_file() {
        let mut model = ModelProto::read(&path)?;
        check(&model, Growing::Yes).map_err(|reason| refuse(&path, reason))?;
        take_added_tokens(&mut model, file).map_err(|reason| refuse(json_path, reason))?;
        return Ok(model);
    }
    rebuilt(file).map_err(|reason| refuse(json_path, reason))
}

/// What a model is checked for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Growing {
    /// It is extended or converted.
    Yes,
    /// It may have been extended already, with user-defined pieces.
    No,
}

/// What must hold of a model that this file understands.
pub(crate) fn check(model: &ModelProto, growing: Growing) -> Result<(), String> {
    let trainer = model.trainer.clone().unwrap_or_default();
    let normalizer = model.normalizer.clone().unwrap_or_default();
    match trainer.model_type.and_then(|kind| ModelType::try_from(kind).ok()) {
        Some(ModelType::Bpe) => {}
        other => {
            return Err(format!(
                "its model_type is {:?}, and only BPE can grow",
                other.unwrap_or(ModelType::Unigram)
            ));
        }
    }
    if normalizer.precompiled_charsmap.is_some_and(|map| !map.is_empty()) {
        return Err(
            "it normalises text by a character map (precompiled_charsmap), and only identity can grow".to_owned(),
        );
    }
    if normalizer.remove_extra_whitespaces.unwrap_or(true) {
        return Err("it removes extra spaces (remove_extra_whitespaces), which loses text".to_owned());
    }
    if !normalizer.escape_whitespaces.unwrap_or(true) {
        return Err("it does not write spaces as ▁ (escape_whitespaces is off)".to_owned());
    }
    if trainer.treat_whitespace_as_suffix.unwrap_or(false) {
        return Err("it puts the space behind words (treat_whitespace_as_suffix)".to_owned());
    }
    let mut seen = HashSet::new();
    let mut bytes = Vec::new();
    let mut n_unknown = 0;
    for piece in &model.pieces {
        let (text, kind) = (piece.text(), piece.kind());
        if text.is_empty() || !seen.insert(text) {
            return Err(format!("its piece '{text}' is empty or stands twice"));
        }
        if !piece.score_or_zero().is_finite() {
            return Err(format!("the score of its piece '{text}' is not a number"));
        }
        match kind {
            Kind::Byte => bytes.push(text),
            Kind::Unknown => n_unknown += 1,
            Kind::Unused => {
                return Err(format!(
                    "its piece '{text}' is UNUSED, which tokenizer.json cannot express"
                ));
            }
            Kind::UserDefined if growing == Growing::Yes => {
                return Err(format!(
                    "its piece '{text}' is USER_DEFINED, which tokenizer.json expresses only for new pieces"
                ));
            }
            Kind::Control if text.chars().nth(1).is_none() => {
                return Err(format!(
                    "its control piece '{text}' is a single character, which text could spell"
                ));
            }
            Kind::Control | Kind::Normal | Kind::UserDefined => {}
        }
    }
    let all_bytes = bytes.len() == 256 && (0..=255u8).zip(&bytes).all(|(byte, text)| *text == byte_piece(byte));
    if !all_bytes || !trainer.byte_fallback.unwrap_or(false) {
        return Err("it has no byte fallback, so that unknown characters would be lost".to_owned());
    }
    if n_unknown != 1 {
        return Err(format!("it has {n_unknown} unknown pieces instead of one"));
    }
    Ok(())
}

/// How SentencePiece writes a byte that stands for itself: `<0x00>` … `<0xFF>`.
pub(crate) fn byte_piece(byte: u8) -> String {
    format!("<0x{byte:02X}>")
}

/// The special tokens that `tokenizer.json` has behind the model's pieces become control pieces.
fn take_added_tokens(model: &mut ModelProto, file: &Value) -> Result<(), String> {
    let vocabulary = file["model"]["vocab"]
        .as_object()
        .ok_or("its model has no vocabulary")?;
    for (id, piece) in model.pieces.iter().enumerate() {
        let found = vocabulary.get(piece.text()).and_then(Value::as_u64);
        let found = found.or_else(|| added_tokens(file).find(|token| token["content"] == piece.text())?["id"].as_u64());
        if found != Some(id as u64) {
            return Err(format!(
                "its piece '{}' has not the id {id} that {SENTENCEPIECE} beside it says",
                piece.text()
            ));
        }
    }
    for token in added_tokens(file) {
        let id = token["id"].as_u64().unwrap_or(u64::MAX) as usize;
        let content = token["content"].as_str().unwrap_or_default();
        if id < model.pieces.len() {
            continue;
        }
        if id != model.pieces.len() || token["special"] != Value::Bool(true) {
            return Err(format!(
                "its added token '{content}' is not special or leaves ids free before it, which {SENTENCEPIECE} cannot express"
            ));
        }
        model.pieces.push(Piece::new(content, 0.0, Kind::Control));
    }
    Ok(())
}

fn added_tokens(file: &Value) -> impl Iterator<Item = &Value> {
    file["added_tokens"].as_array().into_iter().flatten()
}

/// The score of LLaMA's pieces of 2 to 16 spaces: its converted merges have them behind all others, in an order that only a
/// common score explains.
const RUN_OF_SPACES: f32 = -1e9;

/// LLaMA's scores are 0, −1, −2, … in the order of its ids behind the bytes, but for runs of spaces. Fails where the file's
/// merges do not rank in the order of these scores.
fn rebuilt(file: &Value) -> Result<ModelProto, String> {
    let vocabulary = file["model"]["vocab"]
        .as_object()
        .ok_or("its model has no vocabulary")?;
    let unknown = file["model"]["unk_token"].as_str().unwrap_or("<unk>");
    let special: HashMap<&str, &Value> = added_tokens(file)
        .filter_map(|token| Some((token["content"].as_str()?, token)))
        .collect();
    let bytes: HashSet<String> = (0..=255).map(byte_piece).collect();
    let added = special.iter().map(|(content, token)| (*content, token["id"].as_u64()));
    let mut by_id: Vec<(&str, Option<u64>)> = vocabulary
        .iter()
        .map(|(piece, id)| (piece.as_str(), id.as_u64()))
        .chain(added.filter(|(content, _)| !vocabulary.contains_key(*content)))
        .collect();
    by_id.sort_by_key(|(_, id)| *id);
    let first = vocabulary
        .get(&byte_piece(255))
        .and_then(Value::as_u64)
        .map_or(0, |id| id + 1);
    let mut pieces = Vec::with_capacity(by_id.len());
    for (expected, (text, id)) in (0..).zip(by_id) {
        if id != Some(expected) {
            return Err(format!("its ids leave {expected} free"));
        }
        let (kind, score) = if text == unknown {
            (Kind::Unknown, 0.0)
        } else if bytes.contains(text) {
            (Kind::Byte, 0.0)
        } else if let Some(token) = special.get(text) {
            if token["special"] != Value::Bool(true) {
                return Err(format!(
                    "its added token '{text}' is not special, which {SENTENCEPIECE} cannot express"
                ));
            }
            (Kind::Control, 0.0)
        } else if text.chars().all(|c| c == SPACE) && text.chars().nth(1).is_some() {
            (Kind::Normal, RUN_OF_SPACES)
        } else {
            (Kind::Normal, -(expected.saturating_sub(first) as f32))
        };
        pieces.push(Piece::new(text, score, kind));
    }
    let prepends = file["normalizer"].to_string().contains("\"Prepend\"")
        || file["pre_tokenizer"]
            .to_string()
            .contains("\"prepend_scheme\":\"always\"")
        || file["pre_tokenizer"]
            .to_string()
            .contains("\"prepend_scheme\":\"first\"");
    let id_of = |token: &str| vocabulary.get(token).and_then(Value::as_i64).map_or(-1, |id| id as i32);
    let ids = [unknown, "<s>", "</s>"].map(id_of);
    let mut model = with_bytes(pieces, ModelType::Bpe, unknown, ids, prepends);
    check(&model, Growing::Yes)?;
    check_merges(&mut model, file)?;
    Ok(model)
}

/// A model with byte fallback and identity normalisation, as LLaMA's; `ids` are those of unknown, start and end, −1 for none.
pub(crate) fn with_bytes(
    pieces: Vec<Piece>,
    model_type: ModelType,
    unknown: &str,
    [unk_id, bos_id, eos_id]: [i32; 3],
    dummy_prefix: bool,
) -> ModelProto {
    ModelProto {
        trainer: Some(TrainerSpec {
            model_type: Some(model_type as i32),
            vocab_size: Some(pieces.len() as i32),
            byte_fallback: Some(true),
            unk_id: Some(unk_id),
            unk_piece: Some(unknown.to_owned()),
            bos_id: Some(bos_id),
            eos_id: Some(eos_id),
            pad_id: Some(-1),
            ..Default::default()
        }),
        normalizer: Some(NormalizerSpec {
            name: Some("identity".to_owned()),
            precompiled_charsmap: Some(Vec::new()),
            add_dummy_prefix: Some(dummy_prefix),
            remove_extra_whitespaces: Some(false),
            ..Default::default()
        }),
        pieces,
        self_test: None,
        denormalizer: None,
    }
}

/// Whether the file's merges do what the rebuilt scores say: each piece's own pair is listed, and ranks follow scores.
fn check_merges(model: &mut ModelProto, file: &Value) -> Result<(), String> {
    let n_base = model.pieces.len();
    let needed = agree(model, n_base)?.merges;
    let text = |id: u32| model.pieces[id as usize].text();
    let mut listed = HashSet::new();
    let mut before = f32::INFINITY;
    for merge in file["model"]["merges"].as_array().into_iter().flatten() {
        let pair = match merge {
            Value::String(pair) => pair.split_once(' '),
            _ => merge[0].as_str().zip(merge[1].as_str()),
        };
        let (left, right) = pair.ok_or("its merges are not pairs")?;
        let id = file["model"]["vocab"][[left, right].concat()].as_u64();
        let piece = id
            .and_then(|id| model.pieces.get(id as usize))
            .ok_or("a merge makes no piece")?;
        if piece.score_or_zero() > before {
            return Err(format!(
                "it has no {SENTENCEPIECE} beside it, and its merges are not in the order of their ids (at '{left}' + \
                 '{right}'), from which the scores could be told; put the base's {SENTENCEPIECE} there"
            ));
        }
        before = piece.score_or_zero();
        listed.insert((left, right));
    }
    match needed.iter().find(|m| !listed.contains(&(text(m.left), text(m.right)))) {
        None => Ok(()),
        Some(merge) => Err(format!(
            "it has no {SENTENCEPIECE} beside it, and its merges lack '{}' + '{}', which SentencePiece would merge; put the \
             base's {SENTENCEPIECE} there",
            text(merge.left),
            text(merge.right)
        )),
    }
}

/// How the base writes a string that stands alone, without a space in front.
fn spelled(base: &Encoder, text: &str) -> Vec<u32> {
    let mut ids = Vec::new();
    for span in base.merged(text, 0) {
        match base.known(&text[span.clone()]) {
            Some(id) => ids.push(id),
            None => base.fall_back(&text[span], &mut ids),
        }
    }
    ids
}

/// Scores below all that are there: −1, −2, … from the lowest on.
fn falling(model: &ModelProto) -> impl Iterator<Item = f32> + use<> {
    let normal = model.pieces.iter().filter(|piece| piece.kind() == Kind::Normal);
    let lowest = normal.map(Piece::score_or_zero).fold(0.0, f32::min).floor();
    // Beyond 2^24 the step is no longer 1.
    std::iter::successors(Some(lowest), |score| Some((score - 1.0).min(score.next_down()))).skip(1)
}

/// Characters that some piece has and that are no pieces: SentencePiece would merge them, `tokenizers` could not.
fn missing_characters(model: &ModelProto) -> BTreeSet<char> {
    let encoder = Encoder::new(model);
    let normal = model.pieces.iter().filter(|piece| piece.kind() == Kind::Normal);
    normal
        .flat_map(|piece| piece.text().chars())
        .filter(|c| encoder.known(c.encode_utf8(&mut [0; 4])).is_none())
        .collect()
}

/// A model that is not to grow must have them all.
fn check_characters(model: &ModelProto) -> Result<(), String> {
    match missing_characters(model).first() {
        None => Ok(()),
        Some(c) => Err(format!(
            "its pieces hold '{c}', which is no piece itself, and tokenizer.json cannot merge what it does not know"
        )),
    }
}

/// Makes pieces of the missing characters.
fn complete_characters(model: &mut ModelProto) {
    let new: Vec<Piece> = missing_characters(model)
        .into_iter()
        .zip(falling(model))
        .map(|(c, score)| Piece::new(c, score, Kind::Normal))
        .collect();
    model.pieces.extend(new);
}

/// Continued BPE: pieces learned over the base's own symbols, scored below all of the base's.
fn after_base(
    corpus: &Corpus,
    base: &ModelProto,
    encoder: &Encoder,
    settings: &VocabularySettings,
    progress: Progress,
) -> Result<Vec<Piece>> {
    let words = weighted_words(corpus, encoder, settings)?;
    let kept = occurring(corpus, encoder, settings)?;
    let is_new = |c: &char| encoder.known(c.encode_utf8(&mut [0; 4])).is_none() && !kept.characters.contains(c);
    let characters: Vec<char> = covered(&words, &settings.words).into_iter().filter(is_new).collect();
    let wanted = room_for(&characters, settings)?;

    let mut with_characters = base.clone();
    let scores = falling(base);
    with_characters.pieces.extend(
        characters
            .iter()
            .zip(scores)
            .map(|(c, score)| Piece::new(*c, score, Kind::Normal)),
    );
    let known = Encoder::new(&with_characters);
    let is_piece = |c: char| known.known(c.encode_utf8(&mut [0; 4])).is_some();
    let mut words = in_symbols(&words, is_piece, |run| spelled(&known, run));

    let strings = with_characters
        .pieces
        .iter()
        .map(|piece| piece.text().to_owned())
        .collect();
    let mut symbols = Symbols::new(strings, kept.pairs.into_iter().chain(settings.tokens()));
    learn_admitted(&mut words, &mut symbols, wanted, settings, progress);
    let first = with_characters.pieces.len();
    let found = symbols.merges.len();
    if found < wanted {
        return Err(Error::TooFewPieces {
            wanted: settings.new_pieces,
            found: found + characters.len(),
        });
    }
    let merged = (first..first + found)
        .zip(falling(&with_characters))
        .map(|(id, score)| Piece::new(symbols.string(id as u32), score, Kind::Normal));
    let characters = with_characters.pieces[base.pieces.len()..].to_vec();
    Ok(characters.into_iter().chain(merged).collect())
}

/// MaLA-500's merge: a model of its own is learned from characters; its pieces that the base lacks are appended in its
/// order, with its scores.
fn kept(
    corpus: &Corpus,
    base: &ModelProto,
    encoder: &Encoder,
    settings: &VocabularySettings,
    progress: Progress,
) -> Result<Vec<Piece>> {
    let words = weighted_words(corpus, encoder, settings)?;
    let characters = covered(&words, &settings.words);
    let ids: HashMap<char, u32> = characters.iter().copied().zip(0..).collect();
    let is_piece = |c: char| ids.contains_key(&c);
    let mut words = in_symbols(&words, is_piece, |run| run.chars().map(|c| ids[&c]).collect());

    let in_base: HashSet<&str> = base.pieces.iter().map(Piece::text).collect();
    let lacks = |piece: &str| !in_base.contains(piece);
    let strings: Vec<String> = characters.iter().map(char::to_string).collect();
    let new_characters: Vec<char> = characters
        .iter()
        .filter(|c| lacks(c.encode_utf8(&mut [0; 4])))
        .copied()
        .collect();
    let wanted = room_for(&new_characters, settings)?;
    let mut symbols = Symbols::new(strings, settings.tokens());
    // At worst every piece of the base is learned again.
    learn_admitted(&mut words, &mut symbols, wanted + base.pieces.len(), settings, progress);

    // The model that was learned is as long as it must be for the wanted number of new pieces.
    let mut pieces = Vec::with_capacity(settings.new_pieces);
    let mut n_merges = 0;
    for id in (characters.len()..).take(symbols.merges.len()) {
        if pieces.len() == wanted {
            break;
        }
        let piece = symbols.string(id as u32);
        if lacks(piece) {
            pieces.push(Piece::new(piece, -(n_merges as f32), Kind::Normal));
        }
        n_merges += 1;
    }
    if pieces.len() < wanted {
        return Err(Error::TooFewPieces {
            wanted: settings.new_pieces,
            found: pieces.len() + new_characters.len(),
        });
    }
    let of_characters = (n_merges..)
        .zip(&characters)
        .filter(|(_, c)| lacks(c.encode_utf8(&mut [0; 4])))
        .map(|(place, c)| Piece::new(*c, -(place as f32), Kind::Normal));
    pieces.extend(of_characters);
    Ok(pieces)
}

/// How many pieces are left for merges when the new characters are in.
fn room_for(characters: &[char], settings: &VocabularySettings) -> Result<usize> {
    settings
        .new_pieces
        .checked_sub(characters.len())
        .ok_or(Error::TooManyCharacters {
            wanted: settings.new_pieces,
            characters: characters.len(),
        })
}

fn learn_admitted(
    words: &mut Words,
    symbols: &mut Symbols,
    new_pieces: usize,
    settings: &VocabularySettings,
    progress: Progress,
) {
    let (rules, max_bytes) = (settings.words.clone(), settings.max_piece_bytes);
    symbols.admits = Some(Box::new(move |piece| rules.admit(piece, max_bytes)));
    let limits = Limits {
        new_pieces,
        // Bytes are the rules' business.
        max_piece_chars: settings.words.max_piece_length,
    };
    learn(words, symbols, &limits, &mut |done| {
        progress(done.min(settings.new_pieces as u64), settings.new_pieces as u64)
    });
}

/// Appends user-defined pieces, and returns the merges by which `tokenizers` makes them.
///
/// SentencePiece cuts them out of the text before anything else; `tokenizer.json` does so with a Split, after the space in
/// front was put there (an added token would be cut out before). What is left is a part of text that is the piece and
/// nothing else, which its last merges make one token. They need what lies between to be pieces too: ordinary ones, with
/// the lowest scores, in both files.
fn add_user_defined(model: &mut ModelProto, strings: &[String]) -> Result<Vec<Merge>> {
    let mut merges = Vec::new();
    for string in strings {
        refuse_known(model, string, "user_defined")?;
        let (left, right) = loop {
            let encoder = Encoder::new(model);
            let unknown = string
                .chars()
                .find(|c| encoder.known(c.encode_utf8(&mut [0; 4])).is_none());
            let next = match (unknown, &encoder.merged(string, 0)[..]) {
                (Some(c), _) => c.to_string(),
                (None, [left, right]) => {
                    break (
                        encoder.known(&string[left.clone()]),
                        encoder.known(&string[right.clone()]),
                    );
                }
                (None, spans) => string[..spans[1].end].to_owned(),
            };
            let score = falling(model).next().expect("scores fall without end");
            model.pieces.push(Piece::new(next, score, Kind::Normal));
        };
        let (Some(left), Some(right)) = (left, right) else {
            unreachable!("all characters of the string are pieces")
        };
        merges.push((left, right, string));
    }
    Ok(merges
        .into_iter()
        .map(|(left, right, string)| {
            model.pieces.push(Piece::new(string, 0.0, Kind::UserDefined));
            let piece = model.pieces.len() as u32 - 1;
            Merge { left, right, piece }
        })
        .collect())
}

fn add_special(model: &mut ModelProto, strings: &[String]) -> Result<()> {
    for string in strings {
        refuse_known(model, string, "special")?;
        model.pieces.push(Piece::new(string, 0.0, Kind::Control));
    }
    Ok(())
}

fn refuse_known(model: &ModelProto, string: &str, setting: &'static str) -> Result<()> {
    match model.pieces.iter().any(|piece| piece.text() == string) {
        false => Ok(()),
        true => Err(Error::VocabularySetting {
            setting,
            value: string.to_owned(),
            rule: "is a piece already; leave it out",
        }),
    }
}
