//! BPE training: learns merges over words already cut into symbols, to be appended after a base's own merges, or over
//! plain characters when there is no base.
//!
//! Every new merge ranks behind every base merge. So the extended tokenizer first does exactly what the base does, then
//! applies the new merges: base ids never move, every new piece can be reached, and its spelling in base ids is what
//! the base makes of it.
//!
//! Words lie end to end in one array and shrink in place; a pair knows the words it stood in; pairs seen once are never
//! stored. So memory is some ten bytes a symbol, and a merge touches only the words that hold its pair.

use std::cmp::Reverse;
use std::collections::hash_map::Entry;
use std::collections::{BinaryHeap, HashSet};

use rustc_hash::{FxHashMap, FxHashSet};

/// Two neighbouring symbols, by id.
pub(crate) type Pair = (u32, u32);

/// A distinct pre-token of the training text, as base ids.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Word {
    pub symbols: Vec<u32>,
    /// How often it occurs, weighted by its languages' sampling.
    pub weight: u64,
    /// How often it occurs.
    pub count: u64,
}

/// Says of a string whether it may be a piece.
pub(crate) type Admits = Box<dyn Fn(&str) -> bool>;

/// What may become a piece.
pub(crate) struct Limits {
    pub new_pieces: usize,
    /// Of a piece's string as [`Symbols`] have it: a byte each where the vocabulary is byte-level, else a character.
    pub max_piece_chars: usize,
}

/// The symbols of a vocabulary; new ones are appended.
pub(crate) struct Symbols {
    /// By id; in a byte-level vocabulary each `char` stands for a byte.
    strings: Vec<String>,
    n_base: usize,
    /// Strings that a new piece must not repeat.
    taken: HashSet<String>,
    /// Which other strings may be a piece; all where it is absent.
    pub admits: Option<Admits>,
    /// Pairs that stay apart.
    banned: FxHashSet<Pair>,
    /// The pairs behind the new symbols, in the order they were learned.
    pub merges: Vec<Pair>,
    /// What each of these pairs weighed when it was merged; never rising.
    pub weights: Vec<u64>,
}

impl Symbols {
    /// `strings` by id; `reserved` are other strings no piece may have.
    pub fn new(strings: Vec<String>, reserved: impl Iterator<Item = String>) -> Self {
        let taken = strings.iter().cloned().chain(reserved).collect();
        Symbols {
            n_base: strings.len(),
            strings,
            taken,
            admits: None,
            banned: FxHashSet::default(),
            merges: Vec::new(),
            weights: Vec::new(),
        }
    }

    /// These pairs will never be merged. For text whose cut must stay what it is, banning the pairs that stand in it is
    /// enough: where no pair is merged no new symbol arises, so no other pair ever comes to stand there.
    pub fn ban(&mut self, pairs: impl IntoIterator<Item = Pair>) {
        self.banned.extend(pairs);
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

    /// Adds the pair's symbol, unless it is banned, would be too long, not admitted or repeat a piece.
    fn merge(&mut self, pair: Pair, weight: u64, max_chars: usize) -> Option<u32> {
        if self.banned.contains(&pair) {
            return None;
        }
        let string = format!("{}{}", self.string(pair.0), self.string(pair.1));
        let admitted = self.admits.as_ref().is_none_or(|admits| admits(&string));
        if string.chars().count() > max_chars || !admitted || self.taken.contains(&string) {
            return None;
        }
        self.taken.insert(string.clone());
        self.strings.push(string);
        self.merges.push(pair);
        self.weights.push(weight);
        Some(self.strings.len() as u32 - 1)
    }
}

/// Distinct words, end to end.
#[derive(Default)]
pub(crate) struct Words {
    symbols: Vec<u32>,
    heads: Vec<Head>,
}

/// What is known of a word; side by side, for they are read together and in no order.
#[derive(Clone, Copy)]
struct Head {
    /// Where its symbols begin; they end where the next word's begin, or before the first [`GONE`].
    start: usize,
    weight: u64,
    count: u64,
}

/// Fills the room that a word no longer needs.
const GONE: u32 = u32::MAX;

impl Words {
    /// Room for so many words of so many symbols together.
    pub fn with_capacity(words: usize, symbols: usize) -> Words {
        Words {
            symbols: Vec::with_capacity(symbols),
            heads: Vec::with_capacity(words),
        }
    }

    /// Adds a word; `weight` and `count` as in [`Word`].
    pub fn push(&mut self, symbols: impl IntoIterator<Item = u32>, weight: u64, count: u64) {
        let start = self.symbols.len();
        self.symbols.extend(symbols);
        self.heads.push(Head { start, weight, count });
    }

    pub fn len(&self) -> usize {
        self.heads.len()
    }

    /// The symbols of a word as they stand now.
    pub fn symbols(&self, word: usize) -> &[u32] {
        let all = &self.symbols[self.heads[word].start..self.end(word)];
        &all[..all.iter().position(|symbol| *symbol == GONE).unwrap_or(all.len())]
    }

    fn end(&self, word: usize) -> usize {
        self.heads.get(word + 1).map_or(self.symbols.len(), |next| next.start)
    }

    /// Gives back the room that growing left over.
    fn shrink(&mut self) {
        self.symbols.shrink_to_fit();
        self.heads.shrink_to_fit();
    }
}

impl Extend<Word> for Words {
    fn extend<I: IntoIterator<Item = Word>>(&mut self, words: I) {
        words
            .into_iter()
            .for_each(|word| self.push(word.symbols, word.weight, word.count));
    }
}

impl FromIterator<Word> for Words {
    fn from_iter<I: IntoIterator<Item = Word>>(words: I) -> Words {
        let mut all = Words::default();
        all.extend(words);
        all
    }
}

/// Learns up to `limits.new_pieces` merges, heaviest pair first, ties by the smaller ids: the result depends on the
/// words alone, not on the order of any hash table. A pair seen once is no pattern and never merged.
/// Returns how many were learned; `progress` is called with that number now and then.
pub(crate) fn learn(words: &mut Words, symbols: &mut Symbols, limits: &Limits, progress: &mut dyn FnMut(u64)) -> usize {
    words.shrink();
    let mut pairs = Pairs::of(words);
    let mut heap: BinaryHeap<(u64, Reverse<u64>)> = pairs
        .0
        .iter()
        .map(|(pair, seen)| (seen.weight, Reverse(*pair)))
        .collect();
    let mut learned = 0;
    while learned < limits.new_pieces {
        let Some((weight, Reverse(key))) = heap.pop() else {
            break;
        };
        let Some(seen) = pairs.0.get(&key) else {
            continue;
        };
        if seen.weight != weight {
            // Less than when it was pushed, because neighbours were merged away; never more.
            heap.push((seen.weight, Reverse(key)));
            continue;
        }
        // Merged or refused, the pair is done with: it never comes to stand anywhere again.
        let touched = pairs.0.remove(&key).map(|seen| seen.words).unwrap_or_default();
        let Some(new) = symbols.merge(pair_of(key), weight, limits.max_piece_chars) else {
            continue;
        };
        let Changes { gone, fresh } = words.replace(&touched, pair_of(key), new);
        pairs.take(gone);
        pairs.extend(fresh, &words.heads, |pair, weight| heap.push((weight, Reverse(pair))));
        learned += 1;
        if learned.is_multiple_of(64) {
            progress(learned as u64);
        }
    }
    progress(learned as u64);
    learned
}

/// What replacing a pair by its symbol changed.
#[derive(Default)]
struct Changes {
    /// How much weight and count pairs lost: few pairs, each many times, so they are summed up here first.
    gone: FxHashMap<u64, (u64, u64)>,
    /// Pairs that came to be, and their words.
    fresh: Vec<(u64, u32)>,
}

impl Words {
    /// Replaces a pair by its symbol in these words, which ascend.
    fn replace(&mut self, touched: &[u32], pair: Pair, new: u32) -> Changes {
        replace_in(&self.heads, &mut self.symbols, 0, touched, pair, new)
    }
}

/// Of so many words the halves are worth a core each.
const MANY_WORDS: usize = 512;

/// `symbols` are those from `from` on.
fn replace_in(heads: &[Head], symbols: &mut [u32], from: usize, touched: &[u32], pair: Pair, new: u32) -> Changes {
    if touched.len() > MANY_WORDS {
        let (left, right) = touched.split_at(touched.len() / 2);
        let middle = heads[right[0] as usize].start;
        let (left_symbols, right_symbols) = symbols.split_at_mut(middle - from);
        let (mut all, more) = rayon::join(
            || replace_in(heads, left_symbols, from, left, pair, new),
            || replace_in(heads, right_symbols, middle, right, pair, new),
        );
        for (pair, (weight, count)) in more.gone {
            let gone = all.gone.entry(pair).or_default();
            *gone = (gone.0 + weight, gone.1 + count);
        }
        all.fresh.extend(more.fresh);
        return all;
    }
    let mut changes = Changes::default();
    for word in touched {
        let head = &heads[*word as usize];
        let end = heads
            .get(*word as usize + 1)
            .map_or(symbols.len(), |next| next.start - from);
        replace_in_word(
            &mut symbols[head.start - from..end],
            *word,
            head,
            pair,
            new,
            &mut changes,
        );
    }
    changes
}

/// Left to right, as the tokenizer does.
fn replace_in_word(symbols: &mut [u32], word: u32, head: &Head, pair: Pair, new: u32, changes: &mut Changes) {
    let Changes { gone, fresh } = changes;
    let mut lost = |left, right| {
        let (weight, count) = gone.entry(key(left, right)).or_default();
        *weight += head.weight;
        *count += head.count;
    };
    let (mut kept, mut at) = (0usize, 0usize);
    let mut after_new = false;
    while at < symbols.len() && symbols[at] != GONE {
        let symbol = symbols[at];
        if symbol == pair.0 && symbols.get(at + 1) == Some(&pair.1) {
            if let Some(left) = kept.checked_sub(1) {
                // After a new symbol, the pair of old ones that stood here was lost as that one's right side.
                if !after_new {
                    lost(symbols[left], symbol);
                }
                fresh.push((key(symbols[left], new), word));
            }
            if let Some(right) = symbols.get(at + 2).filter(|right| **right != GONE) {
                lost(pair.1, *right);
            }
            symbols[kept] = new;
            after_new = true;
            at += 2;
        } else {
            if after_new {
                fresh.push((key(new, symbol), word));
            }
            symbols[kept] = symbol;
            after_new = false;
            at += 1;
        }
        kept += 1;
    }
    symbols[kept..at].fill(GONE);
}

/// A pair in 64 bits; they sort alike.
pub(crate) fn key(left: u32, right: u32) -> u64 {
    u64::from(left) << 32 | u64::from(right)
}

fn pair_of(key: u64) -> Pair {
    ((key >> 32) as u32, key as u32)
}

/// Every pair that stands in the words at least twice.
struct Pairs(FxHashMap<u64, Seen>);

/// What is known of a pair.
struct Seen {
    weight: u64,
    count: u64,
    /// Words it stands in, ascending, perhaps some where it only stood once.
    words: Box<[u32]>,
}

impl Pairs {
    /// Counts first and lists then, so that no list is longer than it must be.
    fn of(words: &Words) -> Pairs {
        let pairs_in = |word: usize| words.symbols(word).windows(2).map(|two| key(two[0], two[1]));
        let mut totals: FxHashMap<u64, (u64, u64, u32)> = FxHashMap::default();
        for (word, head) in words.heads.iter().enumerate() {
            for pair in pairs_in(word) {
                let (weight, count, places) = totals.entry(pair).or_default();
                *weight += head.weight;
                *count += head.count;
                *places += 1;
            }
        }
        totals.retain(|_, (_, count, _)| *count >= 2);
        let mut lists: FxHashMap<u64, Vec<u32>> = FxHashMap::with_capacity_and_hasher(totals.len(), Default::default());
        for (pair, (_, _, places)) in &totals {
            lists.insert(*pair, Vec::with_capacity(*places as usize));
        }
        for word in 0..words.len() {
            for pair in pairs_in(word) {
                if let Some(list) = lists.get_mut(&pair)
                    && list.last() != Some(&(word as u32))
                {
                    list.push(word as u32);
                }
            }
        }
        let mut pairs: FxHashMap<u64, Seen> = FxHashMap::with_capacity_and_hasher(totals.len(), Default::default());
        for (pair, list) in lists {
            let (weight, count, _) = totals[&pair];
            let words = list.into_boxed_slice();
            pairs.insert(pair, Seen { weight, count, words });
        }
        Pairs(pairs)
    }

    /// Takes weight and count from pairs; one that stands only once more is forgotten, for it never gets more.
    fn take(&mut self, gone: FxHashMap<u64, (u64, u64)>) {
        for (pair, (weight, count)) in gone {
            if let Entry::Occupied(mut entry) = self.0.entry(pair) {
                let seen = entry.get_mut();
                seen.weight -= weight;
                seen.count -= count;
                if seen.count < 2 {
                    entry.remove();
                }
            }
        }
    }

    /// Adds pairs that came to be, and says each and its weight; those seen once are left out.
    fn extend(&mut self, mut fresh: Vec<(u64, u32)>, heads: &[Head], mut said: impl FnMut(u64, u64)) {
        fresh.sort_unstable();
        for alike in fresh.chunk_by(|a, b| a.0 == b.0) {
            let (mut weight, mut count, mut n_words) = (0, 0, 0);
            for same in alike.chunk_by(|a, b| a.1 == b.1) {
                let head = &heads[same[0].1 as usize];
                weight += head.weight * same.len() as u64;
                count += head.count * same.len() as u64;
                n_words += 1;
            }
            if count < 2 {
                continue;
            }
            let mut words = Vec::with_capacity(n_words);
            words.extend(alike.chunk_by(|a, b| a.1 == b.1).map(|same| same[0].1));
            let (pair, words) = (alike[0].0, words.into_boxed_slice());
            self.0.insert(pair, Seen { weight, count, words });
            said(pair, weight);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

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

    const FEW: Limits = Limits {
        new_pieces: 9,
        max_piece_chars: 16,
    };

    #[test]
    fn the_heaviest_pair_is_merged_first_and_overlaps_go_left_to_right() {
        let mut known = symbols("ab");
        let mut words = Words::from_iter([word(&[0, 0, 0, 1], 5), word(&[0, 1], 1)]);
        let limits = Limits { new_pieces: 2, ..FEW };
        assert_eq!(learn(&mut words, &mut known, &limits, &mut |_| {}), 2);
        // aa stands ten times, overlapping; then aaab is (aa)(a)(b), where (a, b) weighs 5 + 1.
        assert_eq!((known.string(2), known.string(3)), ("aa", "ab"));
        assert_eq!(known.weights, [10, 6]);
        assert_eq!((words.symbols(0), words.symbols(1)), (&[2, 3][..], &[3][..]));
        assert_eq!(known.base_ids(3), [0, 1]);
    }

    #[test]
    fn long_repeated_and_lonely_pieces_are_left_out() {
        let mut known = Symbols::new(
            ["a", "b", "c"].map(String::from).to_vec(),
            ["ab".to_owned()].into_iter(),
        );
        let mut words = Words::from_iter([word(&[0, 1, 2], 9), word(&[2, 2], 1), word(&[1, 2, 1, 2], 3)]);
        let limits = Limits {
            max_piece_chars: 2,
            ..FEW
        };
        learn(&mut words, &mut known, &limits, &mut |_| {});
        // "ab" is reserved, "cc" is seen once, "bcbc" has four bytes: only "bc" stays, and "cb" is merged away by it.
        assert_eq!(known.merges, [(1, 2)]);
    }

    #[test]
    fn banned_pairs_stay_apart_and_so_does_text_made_of_them() {
        let mut known = symbols("abc");
        let mut words = Words::from_iter([word(&[0, 1, 2], 9), word(&[0, 1], 5), word(&[1, 2, 2], 2)]);
        known.ban([(0, 1)]);
        learn(&mut words, &mut known, &FEW, &mut |_| {});
        assert_eq!(words.symbols(1), [0, 1]);
        let learned: Vec<_> = (3..3 + known.merges.len() as u32).map(|id| known.string(id)).collect();
        assert_eq!(learned, ["bc", "abc", "bcc"]);
    }

    /// The definition: count every pair anew before each merge.
    fn learn_slowly(words: &mut [Word], symbols: &mut Symbols, limits: &Limits) {
        let mut refused = HashSet::new();
        while symbols.merges.len() < limits.new_pieces {
            let mut pairs: BTreeMap<Pair, (u64, u64)> = BTreeMap::new();
            for word in words.iter() {
                for two in word.symbols.windows(2) {
                    let (weight, count) = pairs.entry((two[0], two[1])).or_default();
                    *weight += word.weight;
                    *count += word.count;
                }
            }
            let heaviest = pairs
                .into_iter()
                .filter(|(pair, (_, count))| *count >= 2 && !refused.contains(pair))
                .max_by_key(|(pair, (weight, _))| (*weight, Reverse(*pair)));
            let Some((pair, (weight, _))) = heaviest else { return };
            let Some(new) = symbols.merge(pair, weight, limits.max_piece_chars) else {
                refused.insert(pair);
                continue;
            };
            for word in words.iter_mut() {
                let mut at = 0;
                while at + 1 < word.symbols.len() {
                    if (word.symbols[at], word.symbols[at + 1]) == pair {
                        word.symbols.splice(at..at + 2, [new]);
                    }
                    at += 1;
                }
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(300))]

        #[test]
        fn learning_is_what_its_definition_says(
            words in prop::collection::vec((prop::collection::vec(0u32..4, 0..14), 0u64..5, 1u64..4), 0..12),
            banned in prop::collection::vec((0u32..4, 0u32..4), 0..3),
            max_piece_chars in 2usize..7,
        ) {
            let words: Vec<Word> = words.into_iter().map(|(symbols, weight, count)| Word { symbols, weight, count }).collect();
            let limits = Limits { new_pieces: 20, max_piece_chars };
            let start = || {
                let mut known = symbols("abcd");
                known.ban(banned.iter().copied());
                known
            };
            let (mut slow_words, mut slow) = (words.clone(), start());
            learn_slowly(&mut slow_words, &mut slow, &limits);
            let (mut fast_words, mut fast) = (Words::from_iter(words), start());
            let learned = learn(&mut fast_words, &mut fast, &limits, &mut |_| {});
            prop_assert_eq!((&fast.merges, &fast.weights, learned), (&slow.merges, &slow.weights, slow.merges.len()));
            for (word, slow) in slow_words.iter().enumerate() {
                prop_assert_eq!(fast_words.symbols(word), &slow.symbols[..]);
            }
        }
    }
}
