//! A BPE vocabulary from nothing but words: characters first, then merges, in SentencePiece's manner.

use rustc_hash::FxHashMap;

use crate::Progress;
use crate::vocabulary::continued_bpe::{Limits, Symbols, Words, learn};
use crate::vocabulary::words::{WordCounts, covering_characters};

/// What [`train_bpe`] shall make.
#[derive(Clone, Debug, PartialEq)]
pub struct BpeTraining {
    /// Characters and merges together.
    pub pieces: usize,
    /// No piece has more characters.
    pub max_piece_characters: usize,
    /// The share of the text that the characters must spell; 1 keeps every one, which suits many languages.
    pub character_coverage: f64,
}

/// What [`train_bpe`] made: the characters have the ids from 0 on, the merges follow.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BpePieces {
    /// Most frequent first.
    pub characters: Vec<char>,
    pub merges: Vec<LearnedMerge>,
}

/// A piece and what it is merged from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LearnedMerge {
    pub piece: String,
    pub left: u32,
    pub right: u32,
    /// What the pair weighed in the training text when it was merged.
    pub weight: u64,
}

/// Learns a vocabulary. Fewer merges than asked for come back if no more pairs are seen twice. The words are consumed:
/// learning needs the memory. Progress counts pieces.
pub fn train_bpe(words: WordCounts, training: &BpeTraining, progress: Progress) -> BpePieces {
    let mut counts: FxHashMap<char, u64> = FxHashMap::default();
    let mut n_symbols = 0;
    for (word, weight, _) in words.iter() {
        for character in characters_of(word) {
            *counts.entry(character).or_default() += weight;
            n_symbols += 1;
        }
    }
    let characters = covering_characters(&counts.into_iter().collect::<Vec<_>>(), training.character_coverage);
    let ids: FxHashMap<char, u32> = characters.iter().copied().zip(0..).collect();
    let mut spelled = spelled(&words, &ids, n_symbols);
    drop(words);

    let mut symbols = Symbols::new(characters.iter().map(char::to_string).collect(), std::iter::empty());
    let limits = Limits {
        new_pieces: training.pieces.saturating_sub(characters.len()),
        max_piece_chars: training.max_piece_characters,
    };
    learn(&mut spelled, &mut symbols, &limits, &mut |done| {
        progress(characters.len() as u64 + done, training.pieces as u64)
    });
    let learned = (characters.len() as u32..).zip(symbols.merges.iter().zip(&symbols.weights));
    let merges = learned.map(|(id, ((left, right), weight))| LearnedMerge {
        piece: symbols.string(id).to_owned(),
        left: *left,
        right: *right,
        weight: *weight,
    });
    BpePieces {
        merges: merges.collect(),
        characters,
    }
}

/// The words in ids; a character that has none ends a word, for no piece may span it.
fn spelled(words: &WordCounts, ids: &FxHashMap<char, u32>, n_symbols: usize) -> Words {
    let mut all = Words::with_capacity(words.len(), n_symbols);
    let mut some = Vec::new();
    for (word, weight, count) in words.iter() {
        for id in characters_of(word).map(|c| ids.get(&c)).chain([None]) {
            match id {
                Some(id) => some.push(*id),
                // A single symbol has no pair.
                None => {
                    if some.len() > 1 {
                        all.push(some.drain(..), weight, count);
                    }
                    some.clear();
                }
            }
        }
    }
    all
}

/// Bytes that are no UTF-8 are no characters.
fn characters_of(word: &[u8]) -> impl Iterator<Item = char> {
    word.utf8_chunks().flat_map(|chunk| chunk.valid().chars())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vocabulary::words::count_lines;

    fn train(text: &str, pieces: usize, character_coverage: f64) -> BpePieces {
        let training = BpeTraining {
            pieces,
            max_piece_characters: 16,
            character_coverage,
        };
        train_bpe(count_lines(text.as_bytes()).unwrap(), &training, &mut |_, _| {})
    }

    #[test]
    fn merges_follow_characters_and_the_heaviest_comes_first() {
        let made = train("low low low lower\nnewest newest", 11, 1.0);
        assert_eq!(made.characters, ['w', '▁', 'e', 'l', 'o', 'n', 's', 't', 'r']);
        let merges: Vec<_> = made
            .merges
            .iter()
            .map(|merge| (merge.piece.as_str(), merge.weight))
            .collect();
        assert_eq!(merges, [("▁l", 4), ("ow", 4)]);
        assert_eq!((made.merges[0].left, made.merges[0].right), (1, 3));
    }

    #[test]
    fn no_piece_spans_a_character_left_out() {
        let made = train(&"aaxaa aaxaa bbb ".repeat(9), 40, 0.8);
        assert!(!made.characters.contains(&'x'), "{made:?}");
        assert!(made.merges.iter().all(|merge| !merge.piece.contains('x')));
        assert!(made.merges.iter().any(|merge| merge.piece == "▁aa"));
    }
}
