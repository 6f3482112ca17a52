//! The training text of a SentencePiece-style vocabulary: weighted words, and which characters become pieces.
//! Source: google/sentencepiece, trainer_interface.cc (`LoadSentences`, `SplitSentencesByWhitespace`).

use std::collections::{BTreeMap, HashSet};

use rayon::prelude::*;

use crate::vocabulary::continued_bpe::Words;
use crate::vocabulary::sentencepiece::encoder::{Encoder, SPACE};
use crate::vocabulary::settings::{VocabularySettings, WordRules};
use crate::vocabulary::words::{WordCounts, covering_characters, sampled_words};
use crate::{Corpus, Document, Result, Split};

/// The distinct words of all languages' training text, with ▁ for the space; cut line by line, as SentencePiece reads its
/// input.
pub(crate) fn weighted_words(corpus: &Corpus, encoder: &Encoder, settings: &VocabularySettings) -> Result<WordCounts> {
    sampled_words(corpus, &settings.sampling, &|text, word| {
        for line in text.lines() {
            let line = encoder.normalized(line);
            settings
                .words
                .words(&line)
                .into_iter()
                .for_each(|found| word(found.as_bytes()));
        }
        Ok(())
    })
}

/// The words in ids, in the order of their strings; a character that is no piece ends a word, for no piece may span it.
pub(crate) fn in_symbols(
    words: &WordCounts,
    is_piece: impl Fn(char) -> bool,
    spell: impl Fn(&str) -> Vec<u32>,
) -> Words {
    let mut all = Words::default();
    for (word, weight, count) in words.iter_sorted() {
        for run in text_of(word).split(|c| !is_piece(c)) {
            let symbols = spell(run);
            // A single symbol has no pair.
            if symbols.len() > 1 {
                all.push(symbols, weight, count);
            }
        }
    }
    all
}

/// The characters that shall be pieces, the heaviest first: enough of them to spell the wanted share of the text, and those
/// that are required.
pub(crate) fn covered(words: &WordCounts, rules: &WordRules) -> Vec<char> {
    let mut weights: BTreeMap<char, u64> = BTreeMap::new();
    for (word, weight, _) in words.iter() {
        for c in text_of(word).chars() {
            *weights.entry(c).or_default() += weight;
        }
    }
    // Neither can be in a SentencePiece piece.
    weights.remove(&'\0');
    weights.remove(&'\t');
    let weights: Vec<(char, u64)> = weights.into_iter().collect();
    let mut characters = covering_characters(&weights, rules.character_coverage);
    for required in [SPACE].into_iter().chain(rules.required_characters.chars()) {
        if !characters.contains(&required) {
            characters.push(required);
        }
    }
    characters
}

fn text_of(word: &[u8]) -> &str {
    std::str::from_utf8(word).expect("words are cut from text")
}

/// What text shall not lose: the strings of neighbouring symbols, and the characters that fall back to bytes, in all
/// training text of the languages to preserve. A piece that is none of these strings and has none of these characters
/// cannot be merged there, for its last two parts would have to be neighbours first.
pub(crate) fn occurring(corpus: &Corpus, base: &Encoder, settings: &VocabularySettings) -> Result<Occurring> {
    let mut all = Occurring::default();
    for entry in settings.preserve.iter().flat_map(|language| corpus.entries(language)) {
        let in_document = |mut occurring: Occurring, document: &Document| {
            let text = base.normalized(&document.text);
            let symbols = base.merged(&text, 0);
            for two in symbols.windows(2) {
                let pair = &text[two[0].start..two[1].end];
                if !occurring.pairs.contains(pair) {
                    occurring.pairs.insert(pair.to_owned());
                }
            }
            let symbols = symbols.into_iter().map(|span| &text[span]);
            occurring
                .characters
                .extend(symbols.filter(|s| base.known(s).is_none()).flat_map(str::chars));
            occurring
        };
        corpus
            .documents(entry, Split::Train)?
            .for_each_batch(&mut |documents| {
                let documents = documents.par_iter().fold(Occurring::default, in_document);
                let found = documents.reduce(Occurring::default, Occurring::and);
                all = std::mem::take(&mut all).and(found);
                Ok(())
            })?;
    }
    Ok(all)
}

#[derive(Default)]
pub(crate) struct Occurring {
    pub pairs: HashSet<String>,
    pub characters: HashSet<char>,
}

impl Occurring {
    fn and(mut self, other: Occurring) -> Occurring {
        self.pairs.extend(other.pairs);
        self.characters.extend(other.characters);
        self
    }
}
