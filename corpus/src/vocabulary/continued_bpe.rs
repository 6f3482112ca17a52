//! Continued BPE: learns merges over words that a base vocabulary has already encoded, to be appended after its own.
//!
//! Every new merge ranks behind every base merge. So the extended tokenizer first does exactly what the base does, then
//! applies the new merges: base ids never move, every new piece can be reached, and its spelling in base ids is what
//! the base makes of it.

use std::cmp::Reverse;
use std::collections::{BTreeSet, BinaryHeap, HashMap, HashSet};

/// Two neighbouring symbols, by id.
type Pair = (u32, u32);

/// A distinct pre-token of the training text, as base ids.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Word {
    pub symbols: Vec<u32>,
    /// How often it occurs, weighted by its languages' sampling.
    pub weight: u64,
    /// How often it occurs.
    pub count: u64,
}

/// What may become a piece.
pub(crate) struct Limits {
    pub new_pieces: usize,
    pub max_piece_bytes: usize,
}

/// The symbols of a vocabulary; new ones are appended.
pub(crate) struct Symbols {
    /// By id; in a byte-level vocabulary each `char` stands for a byte.
    strings: Vec<String>,
    n_base: usize,
    /// Strings that a new piece must not repeat.
    taken: HashSet<String>,
    /// The pairs behind the new symbols, in the order they were learned.
    pub merges: Vec<Pair>,
}

impl Symbols {
    /// `strings` by id; `reserved` are other strings no piece may have.
    pub fn new(strings: Vec<String>, reserved: impl Iterator<Item = String>) -> Self {
        let taken = strings.iter().cloned().chain(reserved).collect();
        Symbols {
            n_base: strings.len(),
            strings,
            taken,
            merges: Vec::new(),
        }
    }

    pub fn string(&self, id: u32) -> &str {
        &self.strings[id as usize]
    }

    /// The base's spelling of a symbol.
    pub fn base_ids(&self, id: u32) -> Vec<u32> {
        match (id as usize).checked_sub(self.n_base) {
            None => vec![id],
            Some(new) => {
                let (left, right) = self.merges[new];
                [self.base_ids(left), self.base_ids(right)].concat()
            }
        }
    }

    /// Adds the pair's symbol, unless it would be too long or repeat a piece.
    fn merge(&mut self, pair: Pair, max_bytes: usize) -> Option<u32> {
        let string = format!("{}{}", self.string(pair.0), self.string(pair.1));
        if string.chars().count() > max_bytes || !self.taken.insert(string.clone()) {
            return None;
        }
        self.strings.push(string);
        self.merges.push(pair);
        Some(self.strings.len() as u32 - 1)
    }
}

/// Learns up to `limits.new_pieces` merges, heaviest pair first, ties by the smaller ids: the result depends on the
/// words alone, not on the order of any hash table. A pair seen once is no pattern and never merged.
/// Returns how many were learned; `progress` is called with that number now and then.
pub(crate) fn learn(
    words: &mut [Word],
    symbols: &mut Symbols,
    limits: &Limits,
    progress: &mut dyn FnMut(u64),
) -> usize {
    let mut pairs = Pairs::default();
    for (index, word) in (0..).zip(words.iter()) {
        word.pairs().for_each(|pair| pairs.add(pair, word, index));
    }
    let mut heap: BinaryHeap<(u64, Reverse<Pair>)> = pairs
        .0
        .iter()
        .map(|(pair, seen)| (seen.weight, Reverse(*pair)))
        .collect();
    let mut learned = 0;
    while learned < limits.new_pieces {
        let Some((weight, Reverse(pair))) = heap.pop() else {
            break;
        };
        let Some(seen) = pairs.0.get(&pair).filter(|seen| seen.count >= 2) else {
            continue;
        };
        if seen.weight != weight {
            // Less than when it was pushed, because neighbours were merged away; never more.
            heap.push((seen.weight, Reverse(pair)));
            continue;
        }
        let Some(new) = symbols.merge(pair, limits.max_piece_bytes) else {
            continue;
        };
        let fresh = merge_everywhere(words, &mut pairs, pair, new);
        heap.extend(
            fresh
                .into_iter()
                .filter_map(|pair| Some((pairs.0.get(&pair)?.weight, Reverse(pair)))),
        );
        learned += 1;
        if learned.is_multiple_of(64) {
            progress(learned as u64);
        }
    }
    progress(learned as u64);
    learned
}

/// Replaces a pair by its symbol in all words that hold it; returns the pairs that came to be.
fn merge_everywhere(words: &mut [Word], pairs: &mut Pairs, pair: Pair, new: u32) -> BTreeSet<Pair> {
    let mut touched = pairs.0.get(&pair).map(|seen| seen.words.clone()).unwrap_or_default();
    touched.sort_unstable();
    touched.dedup();
    let mut fresh = BTreeSet::new();
    for index in touched {
        let word = &mut words[index as usize];
        word.pairs().for_each(|pair| pairs.remove(pair, word));
        word.replace(pair, new);
        for pair in word.pairs() {
            let is_fresh = pair.0 == new || pair.1 == new;
            if is_fresh {
                pairs.add(pair, word, index);
                fresh.insert(pair);
            } else {
                pairs.restore(pair, word);
            }
        }
    }
    pairs.0.remove(&pair);
    fresh
}

impl Word {
    fn pairs(&self) -> impl Iterator<Item = Pair> + '_ {
        self.symbols.windows(2).map(|two| (two[0], two[1]))
    }

    /// Left to right, as the tokenizer does.
    fn replace(&mut self, pair: Pair, new: u32) {
        let mut kept = 0;
        let mut at = 0;
        while at < self.symbols.len() {
            let here = self.symbols[at..].starts_with(&[pair.0, pair.1]);
            self.symbols[kept] = if here { new } else { self.symbols[at] };
            at += if here { 2 } else { 1 };
            kept += 1;
        }
        self.symbols.truncate(kept);
    }
}

/// Every pair that stands in some word.
#[derive(Default)]
struct Pairs(HashMap<Pair, Seen>);

/// What is known of a pair.
#[derive(Default)]
struct Seen {
    weight: u64,
    count: u64,
    /// Words it stands in, perhaps some where it only stood once.
    words: Vec<u32>,
}

impl Pairs {
    fn add(&mut self, pair: Pair, word: &Word, index: u32) {
        let seen = self.0.entry(pair).or_default();
        seen.weight += word.weight;
        seen.count += word.count;
        if seen.words.last() != Some(&index) {
            seen.words.push(index);
        }
    }

    fn remove(&mut self, pair: Pair, word: &Word) {
        if let Some(seen) = self.0.get_mut(&pair) {
            seen.weight -= word.weight;
            seen.count -= word.count;
        }
    }

    /// Undoes [`remove`](Self::remove): the word is still in the pair's list.
    fn restore(&mut self, pair: Pair, word: &Word) {
        if let Some(seen) = self.0.get_mut(&pair) {
            seen.weight += word.weight;
            seen.count += word.count;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn symbols(base: &str) -> Symbols {
        Symbols::new(base.chars().map(String::from).collect(), std::iter::empty())
    }

    fn word(symbols: &[u32], count: u64) -> Word {
        Word {
            symbols: symbols.to_vec(),
            weight: count,
            count,
        }
    }

    #[test]
    fn the_heaviest_pair_is_merged_first_and_overlaps_go_left_to_right() {
        let mut known = symbols("ab");
        let mut words = [word(&[0, 0, 0, 1], 5), word(&[0, 1], 1)];
        let limits = Limits {
            new_pieces: 2,
            max_piece_bytes: 16,
        };
        assert_eq!(learn(&mut words, &mut known, &limits, &mut |_| {}), 2);
        // aa stands ten times, overlapping; then aaab is (aa)(a)(b), where (a, b) weighs 5 + 1.
        assert_eq!((known.string(2), known.string(3)), ("aa", "ab"));
        assert_eq!(words[0].symbols, [2, 3]);
        assert_eq!(known.base_ids(3), [0, 1]);
    }

    #[test]
    fn long_repeated_and_lonely_pieces_are_left_out() {
        let mut known = Symbols::new(
            ["a", "b", "c"].map(String::from).to_vec(),
            ["ab".to_owned()].into_iter(),
        );
        let mut words = [word(&[0, 1, 2], 9), word(&[2, 2], 1), word(&[1, 2, 1, 2], 3)];
        let limits = Limits {
            new_pieces: 9,
            max_piece_bytes: 2,
        };
        learn(&mut words, &mut known, &limits, &mut |_| {});
        // "ab" is reserved, "cc" is seen once, "bcbc" has four bytes: only "bc" stays, and "cb" is merged away by it.
        assert_eq!(known.merges, [(1, 2)]);
    }
}
