//! A faster engine for the tokenizers we meet: BPE, byte-level or in SentencePiece's manner. Its ids are those of the
//! `tokenizers` crate on every string; what it does not understand in a tokenizer.json it leaves to the crate.
//!
//!   text → segments, between added tokens → normalised → words → ids
//!
//! Three things make it fast. Words are cut by hand-written expressions, without offsets into the original. A word met
//! before is looked up. And where there are no words, as in LLaMA's tokenizer, to which a text is one word, they are made:
//! a cut between two characters that stand side by side in no piece changes nothing, because no merge ever crosses it.

mod cache;
mod merging;
mod split;

use std::collections::HashMap;
use std::sync::{LazyLock, Mutex, PoisonError};

use aho_corasick::{AhoCorasick, MatchKind};
use rustc_hash::{FxHashMap, FxHashSet};
use serde::Deserialize;
use serde_json::Value;
use tokenizers::{
    Model, NormalizedString, Normalizer, OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer,
};

use crate::vocabulary::engine::cache::Cache;
use crate::vocabulary::engine::merging::{Merges, Room, merge};
use crate::vocabulary::engine::split::Expression;
use crate::vocabulary::sentencepiece::byte_piece;

type CrateTokenizer = tokenizers::Tokenizer;
type CrateResult<T> = tokenizers::Result<T>;

/// SentencePiece's space.
const SPACE: &str = "▁";

/// Longer words are cut, if there is a safe place, before they are looked up.
const LONG_WORD_BYTES: usize = 48;

/// What we understood of a tokenizer.json.
pub(super) struct Engine {
    added: Option<Added>,
    /// `None`: the crate normalises.
    normalizer: Option<Vec<Change>>,
    words: WordCut,
    alphabet: Alphabet,
    merges: Merges,
    /// With `ignore_merges`: words that are pieces, spelled as the model sees them.
    whole: FxHashMap<Vec<u8>, u32>,
    cuts: Option<Cuts>,
    /// One for each thread that encodes, kept for the next text.
    scratches: Mutex<Vec<Scratch>>,
}

/// What encoding a text needs and the next one can use again.
struct Scratch {
    cache: Cache,
    room: Room,
    symbols: Vec<u32>,
    texts: [String; 2],
}

/// A change that a normaliser makes.
enum Change {
    /// Puts this before a text that is not empty.
    Prepend(String),
    Replace(String, String),
}

/// How a segment is cut into words.
enum WordCut {
    /// Not at all.
    Whole,
    Metaspace {
        replacement: char,
        prepend: Prepend,
        split: bool,
    },
    ByteLevel {
        /// Digits stand apart: one by one, or each run.
        digits: Option<Digits>,
        expression: Option<Expression>,
        add_prefix_space: bool,
    },
    /// As the crate does.
    Crate,
}

#[derive(Clone, Copy, PartialEq)]
enum Prepend {
    Always,
    First,
    Never,
}

#[derive(Clone, Copy)]
enum Digits {
    OneByOne,
    Runs,
}

/// What the symbols are before any merge.
enum Alphabet {
    /// A symbol for each byte; [`ABSENT`] where the vocabulary has none.
    Bytes(Box<[u32; 256]>),
    /// A symbol for each character, or for its bytes if it has none and there is one for every byte.
    Characters {
        characters: Characters,
        bytes: Option<Box<[u32; 256]>>,
    },
}

const ABSENT: u32 = u32::MAX;

/// Character → id, in pages of 256: two looks, and small for the few scripts that a text is in.
struct Characters {
    pages: Vec<u16>,
    ids: Vec<u32>,
}

/// Where a word may be cut without changing its ids.
struct Cuts {
    /// Two characters (or bytes) that stand side by side in a piece that merging makes. One bit each, by a hash: a false
    /// alarm only leaves a cut out.
    together: Vec<u64>,
    /// Before every ▁ that follows something else: true of LLaMA's own pieces, and then nothing need be looked up.
    before_every_space: bool,
}

/// Tokens that stand outside of the model and are no special ones: text between them is encoded by itself.
struct Added {
    /// Sought in the text as it is, then in the normalised text.
    raw: Option<Sought>,
    normalized: Option<Sought>,
}

struct Sought {
    automaton: AhoCorasick,
    /// By pattern; `None` for a special token, which is found and passed over.
    ids: Vec<Option<u32>>,
}

/// The parts of a tokenizer.json that decide about ids.
#[derive(Deserialize)]
struct File {
    #[serde(default)]
    added_tokens: Vec<AddedToken>,
    normalizer: Option<Value>,
    pre_tokenizer: Option<Value>,
    model: BpeModel,
}

#[derive(Deserialize)]
struct AddedToken {
    id: u32,
    content: String,
    single_word: bool,
    lstrip: bool,
    rstrip: bool,
    normalized: bool,
    special: bool,
}

#[derive(Deserialize)]
struct BpeModel {
    r#type: String,
    dropout: Option<f64>,
    unk_token: Option<String>,
    continuing_subword_prefix: Option<String>,
    end_of_word_suffix: Option<String>,
    #[serde(default)]
    byte_fallback: bool,
    #[serde(default)]
    ignore_merges: bool,
    vocab: HashMap<String, u32>,
    merges: PairTexts,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum PairTexts {
    Pairs(Vec<(String, String)>),
    Lines(Vec<String>),
}

impl Engine {
    /// An engine for the tokenizer.json that the crate has read, or `None` if we do not understand it well enough.
    pub fn understand(file: &[u8], tokenizer: &CrateTokenizer) -> Option<Engine> {
        let File {
            added_tokens,
            normalizer,
            pre_tokenizer,
            model,
        } = serde_json::from_slice(file).ok()?;
        let has = |affix: &Option<String>| affix.as_ref().is_some_and(|affix| !affix.is_empty());
        if model.r#type != "BPE"
            || model.dropout.is_some_and(|dropout| dropout != 0.0)
            || has(&model.continuing_subword_prefix)
            || has(&model.end_of_word_suffix)
        {
            return None;
        }
        let by_id: FxHashMap<u32, &str> = model.vocab.iter().map(|(piece, id)| (*id, piece.as_str())).collect();
        if by_id.len() != model.vocab.len() || model.vocab.contains_key("") {
            return None;
        }
        let normalizer = normalizer.map_or(Some(Vec::new()), |value| changes(&value));
        let words = pre_tokenizer.map_or(WordCut::Whole, |value| word_cut(&value));
        let alphabet = match words {
            WordCut::ByteLevel { .. } => Alphabet::of_bytes(&model.vocab),
            _ => Alphabet::of_characters(&model),
        };
        let merges = merges_of(&model)?;
        let mut whole = FxHashMap::default();
        if model.ignore_merges {
            let spelled = |piece: &str| match alphabet {
                Alphabet::Bytes(_) => bytes_of(piece),
                Alphabet::Characters { .. } => Some(piece.as_bytes().to_vec()),
            };
            whole = model
                .vocab
                .iter()
                .filter_map(|(piece, id)| Some((spelled(piece)?, *id)))
                .collect();
        }
        Some(Engine {
            added: Added::of(&added_tokens, tokenizer)?,
            cuts: Cuts::of(&model, &merges, &by_id, &alphabet),
            merges: Merges::new(&merges),
            normalizer,
            words,
            alphabet,
            whole,
            scratches: Mutex::default(),
        })
    }

    /// The ids of a text.
    pub fn encode(&self, text: &str, tokenizer: &CrateTokenizer) -> CrateResult<Vec<u32>> {
        let mut scratch = self.scratches().pop().unwrap_or_else(|| Scratch {
            cache: Cache::new(),
            room: Room::default(),
            symbols: Vec::new(),
            texts: Default::default(),
        });
        let mut ids = Vec::with_capacity(text.len() / 3);
        let done = self.encode_text(text, tokenizer, &mut scratch, &mut ids);
        self.scratches().push(scratch);
        done.map(|()| ids)
    }

    /// Hands on the words of a text, as [`spell`](Self::spell) takes them; added tokens are text here.
    pub fn each_word(&self, text: &str, tokenizer: &CrateTokenizer, word: &mut dyn FnMut(&[u8])) -> CrateResult<()> {
        let mut texts = Default::default();
        let segment = self.normalized(text, tokenizer, &mut texts)?;
        self.cut(segment, true, tokenizer, |found| {
            word(found.as_bytes());
            Ok(())
        })
    }

    /// Appends the ids of a word.
    pub fn spell(&self, word: &[u8], tokenizer: &CrateTokenizer, into: &mut Vec<u32>) -> CrateResult<()> {
        self.spell_with(word, tokenizer, &mut Vec::new(), &mut Room::default(), into)
    }

    fn scratches(&self) -> std::sync::MutexGuard<'_, Vec<Scratch>> {
        self.scratches.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn encode_text(
        &self,
        text: &str,
        tokenizer: &CrateTokenizer,
        scratch: &mut Scratch,
        ids: &mut Vec<u32>,
    ) -> CrateResult<()> {
        let Some(added) = &self.added else {
            return self.encode_segment(text, true, None, tokenizer, scratch, ids);
        };
        let by_crate = self.normalizer.is_none() || matches!(self.words, WordCut::Crate);
        if by_crate {
            // Its normalisers and word cutters may look at a segment's place in the text. A segment alone has none.
            ids.extend_from_slice(tokenizer.encode_fast(text, false)?.get_ids());
            return Ok(());
        }
        let normalized = added.normalized.as_ref();
        Sought::split(added.raw.as_ref(), text, &mut |at, part| match part {
            Part::Token(id) => {
                ids.push(id);
                Ok(())
            }
            Part::Text(segment) => self.encode_segment(segment, at == 0, normalized, tokenizer, scratch, ids),
        })
    }

    /// `first`: whether the segment begins the text.
    fn encode_segment(
        &self,
        segment: &str,
        first: bool,
        added: Option<&Sought>,
        tokenizer: &CrateTokenizer,
        scratch: &mut Scratch,
        ids: &mut Vec<u32>,
    ) -> CrateResult<()> {
        let mut texts = std::mem::take(&mut scratch.texts);
        let done = self.normalized(segment, tokenizer, &mut texts).and_then(|normalized| {
            Sought::split(added, normalized, &mut |at, part| match part {
                Part::Token(id) => {
                    ids.push(id);
                    Ok(())
                }
                Part::Text(part) => self.cut(part, first && at == 0, tokenizer, |word| {
                    self.encode_word(word.as_bytes(), tokenizer, scratch, ids)
                }),
            })
        });
        scratch.texts = texts;
        done
    }

    /// The segment as the normaliser leaves it.
    fn normalized<'t>(
        &self,
        segment: &'t str,
        tokenizer: &CrateTokenizer,
        texts: &'t mut [String; 2],
    ) -> CrateResult<&'t str> {
        if segment.is_empty() {
            return Ok(segment);
        }
        let Some(changes) = &self.normalizer else {
            let mut normalized = NormalizedString::from(segment);
            if let Some(normalizer) = tokenizer.get_normalizer() {
                normalizer.normalize(&mut normalized)?;
            }
            texts[0].clear();
            texts[0].push_str(normalized.get());
            return Ok(&texts[0]);
        };
        let [now, next] = texts;
        for (index, change) in changes.iter().enumerate() {
            let from = if index == 0 { segment } else { now.as_str() };
            next.clear();
            change.apply(from, next);
            std::mem::swap(now, next);
        }
        Ok(if changes.is_empty() { segment } else { now })
    }

    /// Hands on the words of a normalised segment.
    fn cut(
        &self,
        segment: &str,
        first: bool,
        tokenizer: &CrateTokenizer,
        mut word: impl FnMut(&str) -> CrateResult<()>,
    ) -> CrateResult<()> {
        if segment.is_empty() {
            return Ok(());
        }
        match &self.words {
            WordCut::Whole => word(segment),
            WordCut::Metaspace {
                replacement,
                prepend,
                split,
            } => {
                let mut text = String::with_capacity(segment.len() + segment.len() / 3);
                let wanted = *prepend == Prepend::Always || *prepend == Prepend::First && first;
                if wanted && !segment.starts_with([' ', *replacement]) {
                    text.push(*replacement);
                }
                text.extend(segment.chars().map(|c| if c == ' ' { *replacement } else { c }));
                if !split {
                    return word(&text);
                }
                let mut start = 0;
                for (at, _) in text.match_indices(*replacement).filter(|(at, _)| *at > 0) {
                    word(&text[start..at])?;
                    start = at;
                }
                word(&text[start..])
            }
            WordCut::ByteLevel {
                digits,
                expression,
                add_prefix_space,
            } => {
                let mut part = |part: &str| {
                    let spaced;
                    let part = if *add_prefix_space && !part.starts_with(' ') {
                        spaced = format!(" {part}");
                        &spaced
                    } else {
                        part
                    };
                    match expression {
                        Some(expression) => expression.split(part, &mut word),
                        None => word(part),
                    }
                };
                match digits {
                    None => part(segment),
                    Some(digits) => apart(segment, *digits, part),
                }
            }
            WordCut::Crate => {
                let mut words = PreTokenizedString::from(segment);
                if let Some(pre_tokenizer) = tokenizer.get_pre_tokenizer() {
                    pre_tokenizer.pre_tokenize(&mut words)?;
                }
                let splits = words.get_splits(OffsetReferential::Normalized, OffsetType::None);
                splits.into_iter().try_for_each(|(found, _, _)| word(found))
            }
        }
    }

    /// Appends the ids of a word of any length: cut where that is safe, each part looked up.
    #[inline]
    fn encode_word(
        &self,
        word: &[u8],
        tokenizer: &CrateTokenizer,
        scratch: &mut Scratch,
        ids: &mut Vec<u32>,
    ) -> CrateResult<()> {
        if !self.whole.is_empty()
            && let Some(id) = self.whole.get(word)
        {
            ids.push(*id);
            return Ok(());
        }
        let Some(cuts) = self.cuts.as_ref().filter(|_| word.len() > LONG_WORD_BYTES) else {
            return self.look_up(word, tokenizer, scratch, ids);
        };
        match &self.alphabet {
            Alphabet::Bytes(symbols) => {
                let mut start = 0;
                for at in 1..word.len() {
                    let (left, right) = (word[at - 1], word[at]);
                    let known = symbols[usize::from(left)] != ABSENT && symbols[usize::from(right)] != ABSENT;
                    if known && cuts.allowed(left.into(), right.into()) {
                        self.look_up(&word[start..at], tokenizer, scratch, ids)?;
                        start = at;
                    }
                }
                self.look_up(&word[start..], tokenizer, scratch, ids)
            }
            Alphabet::Characters { characters, bytes } => {
                let text = std::str::from_utf8(word)?;
                let safe = |left: char, right: char| {
                    let known = bytes.is_some() || characters.get(left) != ABSENT && characters.get(right) != ABSENT;
                    known && cuts.allowed(left.into(), right.into())
                };
                let mut start = 0;
                for at in text.match_indices(SPACE).map(|(at, _)| at).filter(|at| *at > 0) {
                    let before = text[..at].chars().next_back();
                    let cut = before.is_some_and(|left| {
                        left != '▁' && (cuts.before_every_space && bytes.is_some() || safe(left, '▁'))
                    });
                    if cut {
                        self.encode_part(&text[start..at], &safe, tokenizer, scratch, ids)?;
                        start = at;
                    }
                }
                self.encode_part(&text[start..], &safe, tokenizer, scratch, ids)
            }
        }
    }

    /// What stands between two spaces, cut further if it is long.
    fn encode_part(
        &self,
        part: &str,
        safe: &impl Fn(char, char) -> bool,
        tokenizer: &CrateTokenizer,
        scratch: &mut Scratch,
        ids: &mut Vec<u32>,
    ) -> CrateResult<()> {
        if part.len() <= LONG_WORD_BYTES {
            return self.look_up(part.as_bytes(), tokenizer, scratch, ids);
        }
        let mut start = 0;
        let mut left = None;
        for (at, right) in part.char_indices() {
            if left.is_some_and(|left| safe(left, right)) {
                self.look_up(&part.as_bytes()[start..at], tokenizer, scratch, ids)?;
                start = at;
            }
            left = Some(right);
        }
        self.look_up(&part.as_bytes()[start..], tokenizer, scratch, ids)
    }

    #[inline]
    fn look_up(
        &self,
        word: &[u8],
        tokenizer: &CrateTokenizer,
        scratch: &mut Scratch,
        ids: &mut Vec<u32>,
    ) -> CrateResult<()> {
        let Err(place) = scratch.cache.get(word, ids) else {
            return Ok(());
        };
        let start = ids.len();
        self.spell_with(word, tokenizer, &mut scratch.symbols, &mut scratch.room, ids)?;
        scratch.cache.put(place, word, &ids[start..]);
        Ok(())
    }

    fn spell_with(
        &self,
        word: &[u8],
        tokenizer: &CrateTokenizer,
        symbols: &mut Vec<u32>,
        room: &mut Room,
        into: &mut Vec<u32>,
    ) -> CrateResult<()> {
        if let Some(id) = self.whole.get(word) {
            into.push(*id);
            return Ok(());
        }
        symbols.clear();
        if self.alphabet.symbols_of(word, symbols)? {
            merge(&self.merges, symbols, room);
            into.extend_from_slice(symbols);
            return Ok(());
        }
        // Something has no symbol: the crate knows what becomes of it.
        let tokens = match &self.alphabet {
            Alphabet::Bytes(_) => {
                let spelled: String = word.iter().map(|byte| BYTE_CHARACTERS[usize::from(*byte)]).collect();
                tokenizer.get_model().tokenize(&spelled)?
            }
            Alphabet::Characters { .. } => tokenizer.get_model().tokenize(std::str::from_utf8(word)?)?,
        };
        into.extend(tokens.iter().map(|token| token.id));
        Ok(())
    }
}

/// Digits apart from what is none, as `char` understands them, for that is how the crate does.
fn apart(segment: &str, digits: Digits, mut part: impl FnMut(&str) -> CrateResult<()>) -> CrateResult<()> {
    let mut rest = segment;
    while let Some(first) = rest.chars().next() {
        let length = match (first.is_numeric(), digits) {
            (true, Digits::OneByOne) => first.len_utf8(),
            (true, Digits::Runs) => rest.find(|c: char| !c.is_numeric()).unwrap_or(rest.len()),
            // ASCII is looked at first: `is_numeric` searches a table.
            (false, _) => rest
                .find(|c: char| {
                    if c.is_ascii() {
                        c.is_ascii_digit()
                    } else {
                        c.is_numeric()
                    }
                })
                .unwrap_or(rest.len()),
        };
        part(&rest[..length])?;
        rest = &rest[length..];
    }
    Ok(())
}

impl Change {
    fn apply(&self, from: &str, into: &mut String) {
        into.reserve(from.len() + from.len() / 2);
        match self {
            Change::Prepend(prefix) => {
                into.push_str(prefix);
                into.push_str(from);
            }
            Change::Replace(pattern, content) => {
                let mut start = 0;
                for (at, found) in from.match_indices(pattern.as_str()) {
                    into.push_str(&from[start..at]);
                    into.push_str(content);
                    start = at + found.len();
                }
                into.push_str(&from[start..]);
            }
        }
    }
}

/// The changes that a normaliser makes, if they are of the kinds we know.
fn changes(normalizer: &Value) -> Option<Vec<Change>> {
    match normalizer["type"].as_str()? {
        "Prepend" => Some(vec![Change::Prepend(normalizer["prepend"].as_str()?.to_owned())]),
        "Replace" => {
            let pattern = normalizer["pattern"]["String"].as_str().filter(|p| !p.is_empty())?;
            Some(vec![Change::Replace(
                pattern.to_owned(),
                normalizer["content"].as_str()?.to_owned(),
            )])
        }
        "Sequence" => {
            let parts = normalizer["normalizers"].as_array()?.iter();
            Some(
                parts
                    .map(changes)
                    .collect::<Option<Vec<_>>>()?
                    .into_iter()
                    .flatten()
                    .collect(),
            )
        }
        _ => None,
    }
}

/// How a pre-tokenizer cuts, if it is of a kind we know.
fn word_cut(pre_tokenizer: &Value) -> WordCut {
    metaspace(pre_tokenizer)
        .or_else(|| byte_level(pre_tokenizer))
        .unwrap_or(WordCut::Crate)
}

fn metaspace(value: &Value) -> Option<WordCut> {
    if value["type"] != "Metaspace" {
        return None;
    }
    let mut replacement = value["replacement"].as_str()?.chars();
    // The older `add_prefix_space` comes beside a scheme that says the same, or the crate does not open the file.
    let prepend = match value["prepend_scheme"].as_str() {
        _ if value["add_prefix_space"] == false => Prepend::Never,
        None | Some("always") => Prepend::Always,
        Some("first") => Prepend::First,
        Some("never") => Prepend::Never,
        Some(_) => return None,
    };
    let (replacement, nothing) = (replacement.next()?, replacement.next());
    (nothing.is_none() && replacement != ' ').then(|| WordCut::Metaspace {
        replacement,
        prepend,
        split: value["split"].as_bool().unwrap_or(true),
    })
}

/// `ByteLevel`, alone or last of a sequence after digits or an expression.
fn byte_level(value: &Value) -> Option<WordCut> {
    let parts = match value["type"].as_str()? {
        "Sequence" => value["pretokenizers"].as_array()?.as_slice(),
        _ => std::slice::from_ref(value),
    };
    let (last, earlier) = parts.split_last()?;
    if last["type"] != "ByteLevel" {
        return None;
    }
    let add_prefix_space = last["add_prefix_space"].as_bool()?;
    let uses_its_own = last["use_regex"].as_bool().unwrap_or(true);
    let mut expression = uses_its_own.then_some(Expression::Gpt2);
    let mut digits = None;
    match earlier {
        [] => {}
        [only] if only["type"] == "Digits" => {
            let one_by_one = only["individual_digits"].as_bool()?;
            digits = Some(if one_by_one { Digits::OneByOne } else { Digits::Runs });
        }
        [only] if only["type"] == "Split" && !uses_its_own && !add_prefix_space => {
            if only["behavior"] != "Isolated" || only["invert"] != false {
                return None;
            }
            expression = Some(Expression::of(only["pattern"]["Regex"].as_str()?)?);
        }
        _ => return None,
    }
    Some(WordCut::ByteLevel {
        digits,
        expression,
        add_prefix_space,
    })
}

/// Merges as (left, right, result), in the order of their ranks; `None` if they are not what the crate would read.
fn merges_of(model: &BpeModel) -> Option<Vec<(u32, u32, u32)>> {
    let id = |piece: &str| model.vocab.get(piece).copied();
    let mut joined = String::new();
    let mut merge = |left: &str, right: &str| {
        joined.clear();
        joined.push_str(left);
        joined.push_str(right);
        Some((id(left)?, id(right)?, id(&joined)?))
    };
    match &model.merges {
        PairTexts::Pairs(pairs) => pairs.iter().map(|(left, right)| merge(left, right)).collect(),
        PairTexts::Lines(lines) => lines
            .iter()
            .filter(|line| !line.starts_with("#version"))
            .map(|line| {
                let (left, right) = line.split_once(' ')?;
                merge(left, right)
            })
            .collect(),
    }
}

impl Alphabet {
    fn of_bytes(vocabulary: &HashMap<String, u32>) -> Alphabet {
        let id = |byte: usize| {
            let piece = BYTE_CHARACTERS[byte].to_string();
            vocabulary.get(&piece).copied().unwrap_or(ABSENT)
        };
        Alphabet::Bytes(Box::new(std::array::from_fn(id)))
    }

    fn of_characters(model: &BpeModel) -> Alphabet {
        let mut characters = Characters {
            pages: vec![0; (char::MAX as usize >> 8) + 1],
            // Page 0 is for all characters of which no neighbour is a piece either.
            ids: vec![ABSENT; 256],
        };
        for (piece, id) in &model.vocab {
            let mut of_piece = piece.chars();
            if let (Some(only), None) = (of_piece.next(), of_piece.next()) {
                characters.insert(only, *id);
            }
        }
        let ids: Option<Vec<u32>> = (0..=255u8)
            .map(|byte| model.vocab.get(&byte_piece(byte)).copied())
            .collect();
        Alphabet::Characters {
            characters,
            bytes: ids
                .filter(|_| model.byte_fallback)
                .and_then(|ids| ids.into_boxed_slice().try_into().ok()),
        }
    }

    /// Appends the symbols that a word begins as; false if something in it has none.
    fn symbols_of(&self, word: &[u8], symbols: &mut Vec<u32>) -> CrateResult<bool> {
        match self {
            Alphabet::Bytes(ids) => {
                symbols.extend(word.iter().map(|byte| ids[usize::from(*byte)]));
                Ok(!symbols.contains(&ABSENT))
            }
            Alphabet::Characters { characters, bytes } => {
                let mut buffer = [0; 4];
                for character in std::str::from_utf8(word)?.chars() {
                    match (characters.get(character), bytes) {
                        (ABSENT, None) => return Ok(false),
                        (ABSENT, Some(ids)) => {
                            let utf8 = character.encode_utf8(&mut buffer).bytes();
                            symbols.extend(utf8.map(|byte| ids[usize::from(byte)]));
                        }
                        (id, _) => symbols.push(id),
                    }
                }
                Ok(true)
            }
        }
    }
}

impl Characters {
    #[inline]
    fn get(&self, character: char) -> u32 {
        let code = character as usize;
        self.ids[usize::from(self.pages[code >> 8]) << 8 | code & 0xFF]
    }

    fn insert(&mut self, character: char, id: u32) {
        let code = character as usize;
        if self.pages[code >> 8] == 0 {
            self.pages[code >> 8] = (self.ids.len() >> 8) as u16;
            self.ids.resize(self.ids.len() + 256, ABSENT);
        }
        self.ids[usize::from(self.pages[code >> 8]) << 8 | code & 0xFF] = id;
    }
}

impl Cuts {
    /// `None` if a symbol that does not spell its own text takes part in a merge: then nothing is known of its neighbours.
    fn of(
        model: &BpeModel,
        merges: &[(u32, u32, u32)],
        by_id: &FxHashMap<u32, &str>,
        alphabet: &Alphabet,
    ) -> Option<Cuts> {
        let stands_for_another = |id: &u32| match alphabet {
            Alphabet::Bytes(_) => false,
            Alphabet::Characters { bytes, .. } => bytes.as_ref().is_some_and(|ids| ids.contains(id)),
        };
        let unknown = model.unk_token.as_ref().and_then(|token| model.vocab.get(token));
        let parts: FxHashSet<u32> = merges.iter().flat_map(|(left, right, _)| [*left, *right]).collect();
        if parts.iter().any(|id| stands_for_another(id) || Some(id) == unknown) {
            return None;
        }
        let mut cuts = Cuts {
            together: vec![0; (1 << 22) / 64],
            before_every_space: true,
        };
        for result in merges.iter().map(|(_, _, result)| by_id[result]) {
            match alphabet {
                Alphabet::Bytes(_) => {
                    let bytes = bytes_of(result)?;
                    bytes
                        .windows(2)
                        .for_each(|two| cuts.forbid(two[0].into(), two[1].into()));
                }
                Alphabet::Characters { .. } => {
                    for (left, right) in result.chars().zip(result.chars().skip(1)) {
                        cuts.forbid(left.into(), right.into());
                        cuts.before_every_space &= right != '▁' || left == '▁';
                    }
                }
            }
        }
        Some(cuts)
    }

    #[inline]
    fn allowed(&self, left: u32, right: u32) -> bool {
        let bit = Self::bit(left, right);
        self.together[bit / 64] & 1 << (bit % 64) == 0
    }

    fn forbid(&mut self, left: u32, right: u32) {
        let bit = Self::bit(left, right);
        self.together[bit / 64] |= 1 << (bit % 64);
    }

    #[inline]
    fn bit(left: u32, right: u32) -> usize {
        ((u64::from(left) << 32 | u64::from(right)).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 42) as usize
    }
}

/// A stretch of a text.
enum Part<'t> {
    Text(&'t str),
    Token(u32),
}

impl Added {
    /// `Some(None)` if there are none but special tokens, which are text here; `None` if they are sought in ways we do not
    /// know.
    fn of(tokens: &[AddedToken], tokenizer: &CrateTokenizer) -> Option<Option<Added>> {
        if tokens.iter().all(|token| token.special) {
            return Some(None);
        }
        let strange = |token: &&AddedToken| !token.special && (token.single_word || token.lstrip || token.rstrip);
        if tokens.iter().any(|token| strange(&token) || token.content.is_empty()) {
            return None;
        }
        let sought = |normalized: bool| {
            let chosen: Vec<&AddedToken> = tokens.iter().filter(|token| token.normalized == normalized).collect();
            let pattern = |token: &&AddedToken| -> Option<String> {
                let mut content = NormalizedString::from(token.content.as_str());
                if let Some(normalizer) = tokenizer.get_normalizer().filter(|_| normalized) {
                    normalizer.normalize(&mut content).ok()?;
                }
                Some(content.get().to_owned())
            };
            let patterns = chosen.iter().map(pattern).collect::<Option<Vec<_>>>()?;
            if patterns.is_empty() {
                return Some(None);
            }
            let automaton = AhoCorasick::builder()
                .match_kind(MatchKind::LeftmostLongest)
                .build(patterns)
                .ok()?;
            // The crate finds the id by the content, should the file say another.
            let ids = chosen
                .iter()
                .map(|token| (!token.special).then_some(token.id))
                .collect();
            Some(Some(Sought { automaton, ids }))
        };
        let agree = |token: &AddedToken| tokenizer.token_to_id(&token.content) == Some(token.id);
        if !tokens.iter().all(agree) {
            return None;
        }
        Some(Some(Added {
            raw: sought(false)?,
            normalized: sought(true)?,
        }))
    }
}

impl Sought {
    /// Hands on each stretch of the text and where it begins.
    fn split<'t>(
        sought: Option<&Sought>,
        text: &'t str,
        part: &mut dyn FnMut(usize, Part<'t>) -> CrateResult<()>,
    ) -> CrateResult<()> {
        let mut start = 0;
        if let Some(Sought { automaton, ids }) = sought {
            for found in automaton.find_iter(text) {
                let Some(id) = ids[found.pattern().as_usize()] else {
                    continue;
                };
                if start < found.start() {
                    part(start, Part::Text(&text[start..found.start()]))?;
                }
                part(found.start(), Part::Token(id))?;
                start = found.end();
            }
        }
        if start < text.len() {
            part(start, Part::Text(&text[start..]))?;
        }
        Ok(())
    }
}

/// The character that stands for each byte in byte-level vocabularies (GPT-2's encoder.py): itself where it prints, else
/// the next from U+0100 on.
static BYTE_CHARACTERS: LazyLock<[char; 256]> = LazyLock::new(|| {
    let mut others = '\u{100}'..;
    std::array::from_fn(|byte| match byte as u8 {
        prints @ (b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF) => char::from(prints),
        _ => others.next().expect("there are more than 256 characters"),
    })
});

/// The bytes that a piece of a byte-level vocabulary spells, if each of its characters stands for one.
fn bytes_of(piece: &str) -> Option<Vec<u8>> {
    static BYTES: LazyLock<FxHashMap<char, u8>> =
        LazyLock::new(|| BYTE_CHARACTERS.iter().copied().zip(0..=255).collect());
    piece.chars().map(|character| BYTES.get(&character).copied()).collect()
}
