//! The distinct words of the training text and what they weigh, counted on all cores in bounded memory.
//! The result depends on the text and the settings alone: not on the number of threads, nor on any hash table's order.

use std::hash::Hasher;
use std::io::{self, Read};

use rayon::prelude::*;
use rustc_hash::FxHasher;
use serde::{Deserialize, Serialize};

use crate::stream::shares::weights;
use crate::vocabulary::continued_bpe::{Word, Words};
use crate::{Corpus, Error, Language, Result, Split, Tokenizer};

/// More text of one language teaches the vocabulary nothing; documents beyond it are left out.
const MOST_BYTES_PER_LANGUAGE: usize = 64 << 20;

/// The weights of all training text together, in fixed point: fine enough for hundreds of languages, far from overflow.
const WHOLE_WEIGHT: u128 = 1 << 48;

/// Past so many distinct words the lightest are dropped: some 60 bytes each, here and in learning.
const MOST_WORDS: usize = 64 << 20;

/// Text counted at a time by one thread, in bytes: large enough that its words repeat, and the unit that fixes the result.
const PART_BYTES: usize = 4 << 20;

/// How languages share the training of a vocabulary: they weigh p_l ∝ clamp(n_l, floor, cap)^alpha, n_l in bytes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TextSampling {
    pub alpha: f64,
    /// A language with less text weighs as if it had so many bytes.
    pub floor_bytes: u64,
    /// A language with more text weighs as if it had only so many bytes.
    pub cap_bytes: u64,
}

impl TextSampling {
    /// No floor, no cap.
    pub fn by_size(alpha: f64) -> TextSampling {
        TextSampling {
            alpha,
            floor_bytes: 0,
            cap_bytes: u64::MAX,
        }
    }

    /// The first value that no sampling can have, with its rule.
    pub(crate) fn check(&self) -> Result<()> {
        let (setting, value, rule) = if !(0.0..=1.0).contains(&self.alpha) {
            let rule = "must lie between 0 and 1; MaLA-500 uses 0.3";
            ("alpha", self.alpha.to_string(), rule)
        } else if self.cap_bytes < self.floor_bytes.max(1) {
            let rule = "must be at least 1 and at least floor_bytes; raise it, or leave it out";
            ("cap_bytes", self.cap_bytes.to_string(), rule)
        } else {
            return Ok(());
        };
        Err(Error::VocabularySetting { setting, value, rule })
    }

    /// Relative weights of languages with so many bytes of text; 0 for those without any.
    fn weights(&self, bytes: &[u64]) -> Vec<u128> {
        let clamped = |n: &u64| match n {
            0 => 0,
            n => (*n).max(self.floor_bytes).min(self.cap_bytes).max(1),
        };
        weights(&bytes.iter().map(clamped).collect::<Vec<_>>(), self.alpha)
    }
}

/// The distinct words of the training text as the base encodes them, in the order of their bytes.
pub(crate) fn encoded_words(corpus: &Corpus, base: &Tokenizer, sampling: &TextSampling) -> Result<Words> {
    let counts = sampled_words(corpus, sampling, &|text, word| base.each_word(text, word))?;
    let encode = |&entry: &u32| -> Result<Word> {
        let (word, weight, count) = counts.get(entry);
        let mut symbols = Vec::new();
        base.spell(word, &mut symbols)?;
        Ok(Word { symbols, weight, count })
    };
    let mut words = Words::default();
    for some in counts.sorted().chunks(1 << 16) {
        words.extend(some.par_iter().map(encode).collect::<Result<Vec<Word>>>()?);
    }
    Ok(words)
}

/// Cuts a text into words and hands each to the second argument.
type Cut<'a> = &'a (dyn Fn(&str, &mut dyn FnMut(&[u8])) -> Result<()> + Sync);

/// The words of all languages' training text, each weighing what its language may give it.
pub(crate) fn sampled_words(corpus: &Corpus, sampling: &TextSampling, cut: Cut) -> Result<WordCounts> {
    let languages = corpus.languages();
    let train_bytes = |language| corpus.entries(language).map(|entry| entry.train.bytes).sum();
    let bytes: Vec<u64> = languages.iter().map(train_bytes).collect();
    let shares = sampling.weights(&bytes);
    let whole: u128 = shares.iter().sum();
    let mut all = WordCounts::default();
    for (language, share) in languages.iter().zip(shares) {
        let texts = sampled(corpus, language)?;
        let sampled_bytes: u128 = texts.iter().map(|text| text.len() as u128).sum();
        // A language's weight is spread over its bytes, so that each word weighs what its language may give it.
        let weight = share * WHOLE_WEIGHT / (whole * sampled_bytes).max(1);
        let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
        for part in parts(&texts)
            .par_iter()
            .map(|part| count(part, cut))
            .collect::<Vec<_>>()
        {
            all.merge(&part?, (weight as u64).max(1));
        }
    }
    Ok(all)
}

/// All of a language's texts, or the first of them where there are too many: a corpus lies in the order of its texts'
/// hashes, so the first are a sample. Each source gives what its size is of the whole.
fn sampled(corpus: &Corpus, language: &Language) -> Result<Vec<String>> {
    let whole: u64 = corpus.entries(language).map(|entry| entry.train.bytes).sum();
    let mut texts = Vec::new();
    for entry in corpus.entries(language) {
        let most = u128::from(entry.train.bytes) * MOST_BYTES_PER_LANGUAGE as u128 / u128::from(whole.max(1));
        let mut bytes = 0;
        for document in corpus.documents(entry, Split::Train)? {
            let text = document?.text;
            bytes += text.len() as u128;
            texts.push(text);
            if bytes >= most {
                break;
            }
        }
    }
    Ok(texts)
}

/// Runs of texts of about [`PART_BYTES`].
fn parts<'t, 's>(texts: &'t [&'s str]) -> Vec<&'t [&'s str]> {
    let mut parts = Vec::new();
    let (mut start, mut bytes) = (0, 0);
    for (index, text) in texts.iter().enumerate() {
        bytes += text.len();
        if bytes >= PART_BYTES {
            parts.push(&texts[start..=index]);
            (start, bytes) = (index + 1, 0);
        }
    }
    parts.push(&texts[start..]);
    parts
}

fn count(texts: &[&str], cut: Cut) -> Result<WordCounts> {
    let mut counts = WordCounts::default();
    for text in texts {
        cut(text, &mut |word| counts.add(word, 1, 1))?;
    }
    Ok(counts)
}

/// Counts the words of a text of any length, read as a stream: what stands between two newlines is a sentence, and its
/// words begin with ▁, which stands for the space before them. Bytes that are no UTF-8 become U+FFFD.
pub fn count_lines(mut text: impl Read) -> io::Result<WordCounts> {
    let mut all = WordCounts::default();
    let mut rest: Vec<u8> = Vec::new();
    let mut ended = false;
    while !ended {
        let mut parts: Vec<Vec<u8>> = Vec::new();
        while !ended && parts.len() < rayon::current_num_threads() {
            let mut part = std::mem::take(&mut rest);
            ended = text.by_ref().take(PART_BYTES as u64).read_to_end(&mut part)? == 0;
            // The last line is finished by the next part; a line longer than a part makes the part longer.
            let lines = if ended { part.len() } else { last_line_end(&part) };
            rest = part.split_off(lines);
            parts.push(part);
        }
        let count = |part: &Vec<u8>| {
            let mut counts = WordCounts::default();
            let mut room = Vec::new();
            for line in String::from_utf8_lossy(part).lines() {
                metaspace_words(line, &mut room, |word| counts.add(word, 1, 1));
            }
            counts
        };
        let counted: Vec<WordCounts> = parts.par_iter().map(count).collect();
        counted.iter().for_each(|part| all.merge(part, 1));
    }
    Ok(all)
}

fn last_line_end(text: &[u8]) -> usize {
    text.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1)
}

/// The words of a sentence as SentencePiece's trainers see them: each begins with ▁, which stands for the space before
/// it, and before the sentence; several spaces count as one. `room` is kept from sentence to sentence.
pub(crate) fn metaspace_words(sentence: &str, room: &mut Vec<u8>, mut word: impl FnMut(&[u8])) {
    for part in sentence.as_bytes().split(|byte| *byte == b' ') {
        // A text may have a ▁ of its own, which is a space too.
        let mut rest = part;
        while !rest.is_empty() {
            let end = rest.windows(SPACE.len()).position(|three| three == SPACE);
            let found = &rest[..end.unwrap_or(rest.len())];
            if !found.is_empty() {
                room.clear();
                room.extend_from_slice(SPACE);
                room.extend_from_slice(found);
                word(room);
            }
            rest = &rest[end.map_or(rest.len(), |end| end + SPACE.len())..];
        }
    }
}

/// SentencePiece's space.
const SPACE: &[u8] = "▁".as_bytes();

/// Distinct words with their counts and weights, in a table without one allocation a word.
#[derive(Default)]
pub struct WordCounts {
    bytes: Vec<u8>,
    entries: Vec<Entry>,
    /// Half of a word's hash, which spares most looks into `entries`, above its index in them, plus one; 0 is free. A power
    /// of two long, at most 3/4 full.
    slots: Vec<u64>,
}

#[derive(Clone, Copy)]
struct Entry {
    /// Where the word begins in `bytes`, above its length.
    place: u64,
    weight: u64,
    count: u64,
}

/// Bits of a word's length. A longer word is no word, and is not counted.
const LENGTH_BITS: u32 = 24;

impl WordCounts {
    /// Counts a word.
    pub fn add(&mut self, word: &[u8], weight: u64, count: u64) {
        self.put(word, weight, count);
        if self.entries.len() > MOST_WORDS {
            self.prune(MOST_WORDS / 2);
        }
    }

    /// Adds another's words, each weighing `weight` times what it weighed there.
    pub fn merge(&mut self, other: &WordCounts, weight: u64) {
        for entry in &other.entries {
            self.put(other.word(entry), entry.weight * weight, entry.count);
        }
        if self.entries.len() > MOST_WORDS {
            self.prune(MOST_WORDS / 2);
        }
    }

    /// How many distinct words there are.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether nothing was counted.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Each word with its weight and count, in the order in which they were first met.
    pub fn iter(&self) -> impl Iterator<Item = (&[u8], u64, u64)> {
        (0..self.entries.len() as u32).map(|entry| self.get(entry))
    }

    /// Each word with its weight and count, in the order of their bytes.
    pub fn iter_sorted(&self) -> impl Iterator<Item = (&[u8], u64, u64)> {
        self.sorted().into_iter().map(|entry| self.get(entry))
    }

    /// The entries in the order of their words' bytes.
    pub(crate) fn sorted(&self) -> Vec<u32> {
        let mut order: Vec<u32> = (0..self.entries.len() as u32).collect();
        order.par_sort_unstable_by_key(|entry| self.word(&self.entries[*entry as usize]));
        order
    }

    /// A word, its weight and its count.
    pub(crate) fn get(&self, entry: u32) -> (&[u8], u64, u64) {
        let entry = &self.entries[entry as usize];
        (self.word(entry), entry.weight, entry.count)
    }

    fn word(&self, entry: &Entry) -> &[u8] {
        let length = entry.place & ((1 << LENGTH_BITS) - 1);
        &self.bytes[(entry.place >> LENGTH_BITS) as usize..][..length as usize]
    }

    fn put(&mut self, word: &[u8], weight: u64, count: u64) {
        if word.len() >= 1 << LENGTH_BITS {
            return;
        }
        if self.entries.len() * 4 >= self.slots.len() * 3 {
            self.grow();
        }
        let hash = hash_of(word);
        let mask = self.slots.len() - 1;
        let mut slot = hash as usize & mask;
        while self.slots[slot] != 0 {
            let taken = self.slots[slot];
            if taken >> 32 == hash >> 32 {
                let index = taken as u32 as usize - 1;
                if self.word(&self.entries[index]) == word {
                    self.entries[index].weight += weight;
                    self.entries[index].count += count;
                    return;
                }
            }
            slot = (slot + 1) & mask;
        }
        let place = (self.bytes.len() as u64) << LENGTH_BITS | word.len() as u64;
        self.bytes.extend_from_slice(word);
        self.entries.push(Entry { place, weight, count });
        self.slots[slot] = hash >> 32 << 32 | self.entries.len() as u64;
    }

    fn grow(&mut self) {
        let n_slots = (self.slots.len() * 2).max(1024);
        self.slots = Vec::new();
        self.slots.resize(n_slots, 0);
        for (index, entry) in (1..).zip(&self.entries) {
            let hash = hash_of(self.word(entry));
            let mut slot = hash as usize & (n_slots - 1);
            while self.slots[slot] != 0 {
                slot = (slot + 1) & (n_slots - 1);
            }
            self.slots[slot] = hash >> 32 << 32 | index;
        }
    }

    /// Keeps at most so many words: all those heavier than some weight. What is rare in all languages teaches no merge.
    fn prune(&mut self, most: usize) {
        let mut weights: Vec<u64> = self.entries.iter().map(|entry| entry.weight).collect();
        let last = weights.len() - most - 1;
        let threshold = *weights.select_nth_unstable(last).1;
        let mut kept = WordCounts::default();
        for entry in self.entries.iter().filter(|entry| entry.weight > threshold) {
            kept.put(self.word(entry), entry.weight, entry.count);
        }
        *self = kept;
    }
}

fn hash_of(word: &[u8]) -> u64 {
    let mut hasher = FxHasher::default();
    hasher.write(word);
    hasher.finish()
}

/// The characters that a vocabulary must spell: the most frequent ones that make up the share `coverage` of all text, by
/// SentencePiece's rule (trainer_interface.cc): most frequent first, ties by code point, until the share is reached.
/// With a coverage of 1 that is every character.
pub fn covering_characters(counts: &[(char, u64)], coverage: f64) -> Vec<char> {
    let mut counts = counts.to_vec();
    counts.sort_unstable_by_key(|(character, count)| (std::cmp::Reverse(*count), *character));
    let whole: u128 = counts.iter().map(|(_, count)| u128::from(*count)).sum();
    let mut covered: u128 = 0;
    counts
        .into_iter()
        .take_while(|(_, count)| {
            let wanted = coverage >= 1.0 || (covered as f64) < coverage * whole as f64;
            covered += u128::from(*count);
            wanted
        })
        .map(|(character, _)| character)
        .collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn as_map(counts: &WordCounts) -> BTreeMap<String, (u64, u64)> {
        let text = |word: &[u8]| String::from_utf8(word.to_vec()).unwrap();
        counts
            .iter_sorted()
            .map(|(word, weight, count)| (text(word), (weight, count)))
            .collect()
    }

    #[test]
    fn lines_are_counted_alike_however_they_are_cut_into_parts() {
        // Some 20 MB: three parts, one line longer than a part.
        let long = "ja ".repeat(PART_BYTES / 2);
        let text = format!("{}{long}\n{}", "ein  Satz\n".repeat(300_000), "kein ▁Satz".repeat(30));
        let mut expected: BTreeMap<String, (u64, u64)> = BTreeMap::new();
        for line in text.lines() {
            metaspace_words(line, &mut Vec::new(), |word| {
                let word = String::from_utf8(word.to_vec()).unwrap();
                let (weight, count) = expected.entry(word).or_default();
                (*weight, *count) = (*weight + 1, *count + 1);
            });
        }
        assert_eq!(expected["▁Satz"].1, 300_001);
        for threads in [1, 3] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let counts = pool.install(|| count_lines(text.as_bytes())).unwrap();
            assert_eq!(as_map(&counts), expected);
        }
    }

    #[test]
    fn pruning_keeps_the_heavy_words() {
        let mut counts = WordCounts::default();
        (0..5000u64).for_each(|i| counts.add(format!("w{i}").as_bytes(), i / 2, 1));
        counts.prune(100);
        assert_eq!(counts.len(), 100);
        assert!(counts.iter_sorted().all(|(_, weight, _)| weight > 2449));
        counts.add(b"w4999", 1, 1);
        assert_eq!(as_map(&counts)["w4999"], (2500, 2));
    }

    #[test]
    fn coverage_takes_the_most_frequent_characters() {
        let counts = [('a', 50), ('c', 20), ('b', 20), ('z', 9), ('q', 1)];
        assert_eq!(covering_characters(&counts, 0.9), ['a', 'b', 'c']);
        assert_eq!(covering_characters(&counts, 0.91), ['a', 'b', 'c', 'z']);
        assert_eq!(covering_characters(&counts, 1.0).len(), 5);
    }

    #[test]
    fn a_floor_lifts_and_a_cap_lowers_what_a_language_weighs() {
        let sampling = TextSampling {
            alpha: 1.0,
            floor_bytes: 100,
            cap_bytes: 400,
        };
        let weights = sampling.weights(&[0, 1, 200, 4000]);
        assert_eq!(weights[0], 0);
        assert_eq!((weights[1] * 4, weights[2] * 2), (weights[3], weights[3]));
    }
}
