//! The merge loop of BPE: symbols in, ids out, the lowest rank first and the leftmost of equals.
//! Short words by scanning, long ones with a heap: O(n log n), whatever the text.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use crate::vocabulary::continued_bpe::key;

/// Up to so many symbols a scan for the lowest rank beats a heap.
const SHORT: usize = 40;

/// The rank of a pair that does not merge.
const NEVER: u32 = u32::MAX;

/// Pair of ids → (rank, id): open addressing, half full at most, one cache line a look.
pub(super) struct Merges {
    slots: Vec<(u64, u32, u32)>,
    shift: u32,
}

impl Merges {
    /// From pairs in the order of their ranks; of a pair that is there twice the last counts.
    pub fn new(merges: &[(u32, u32, u32)]) -> Merges {
        let n_slots = (merges.len() * 2).next_power_of_two().max(16);
        let mut table = Merges {
            slots: vec![(u64::MAX, NEVER, 0); n_slots],
            shift: 64 - n_slots.trailing_zeros(),
        };
        for (rank, (left, right, id)) in (0..).zip(merges) {
            let key = key(*left, *right);
            let mut slot = table.first_slot(key);
            while ![key, u64::MAX].contains(&table.slots[slot].0) {
                slot = (slot + 1) & (n_slots - 1);
            }
            table.slots[slot] = (key, rank, *id);
        }
        table
    }

    /// Rank and id of a pair; the rank is [`NEVER`] if it does not merge.
    #[inline]
    fn get(&self, left: u32, right: u32) -> (u32, u32) {
        let key = key(left, right);
        let mut slot = self.first_slot(key);
        loop {
            let (found, rank, id) = self.slots[slot];
            if found == key || found == u64::MAX {
                return (rank, id);
            }
            slot = (slot + 1) & (self.slots.len() - 1);
        }
    }

    #[inline]
    fn first_slot(&self, key: u64) -> usize {
        ((key ^ key >> 29).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> self.shift) as usize
    }
}

/// Room for the loop, kept from word to word.
#[derive(Default)]
pub(super) struct Room {
    /// Short words: rank and id of the pair that begins here.
    pairs: Vec<(u32, u32)>,
    /// Long words: previous and next symbol still there.
    links: Vec<(u32, u32)>,
    /// Rank and place of pairs, some of them gone.
    queue: BinaryHeap<Reverse<u64>>,
}

/// Merges the symbols in place as far as it goes.
pub(super) fn merge(merges: &Merges, symbols: &mut Vec<u32>, room: &mut Room) {
    if symbols.len() <= SHORT {
        merge_short(merges, symbols, &mut room.pairs);
    } else {
        merge_long(merges, symbols, room);
    }
}

fn merge_short(merges: &Merges, symbols: &mut Vec<u32>, pairs: &mut Vec<(u32, u32)>) {
    pairs.clear();
    pairs.extend(symbols.windows(2).map(|two| merges.get(two[0], two[1])));
    while let Some((at, (rank, id))) = pairs
        .iter()
        .copied()
        .enumerate()
        .min_by_key(|(at, (rank, _))| (*rank, *at))
    {
        if rank == NEVER {
            return;
        }
        symbols[at] = id;
        symbols.remove(at + 1);
        pairs.remove(at);
        if at > 0 {
            pairs[at - 1] = merges.get(symbols[at - 1], id);
        }
        if at < pairs.len() {
            pairs[at] = merges.get(id, symbols[at + 1]);
        }
    }
}

/// No symbol on this side, or a symbol that was merged away.
const NONE: u32 = u32::MAX;

fn merge_long(merges: &Merges, symbols: &mut Vec<u32>, room: &mut Room) {
    let Room { links, queue, .. } = room;
    let n = symbols.len() as u32;
    links.clear();
    links.extend((0..n).map(|at| (at.wrapping_sub(1), if at + 1 < n { at + 1 } else { NONE })));
    queue.clear();
    let entry = |rank: u32, at: u32| Reverse(u64::from(rank) << 32 | u64::from(at));
    let ranked = symbols.windows(2).map(|two| merges.get(two[0], two[1]).0);
    queue.extend(
        (0..)
            .zip(ranked)
            .filter(|(_, rank)| *rank != NEVER)
            .map(|(at, rank)| entry(rank, at)),
    );
    while let Some(Reverse(top)) = queue.pop() {
        let (rank, at) = ((top >> 32) as u32, top as u32 as usize);
        let next = links[at].1;
        if symbols[at] == NONE || next == NONE {
            continue;
        }
        // A pair that changed since it was queued has another rank: two pairs that spell the same from the same place
        // are the same pair, because symbols only grow.
        let (now, id) = merges.get(symbols[at], symbols[next as usize]);
        if now != rank {
            continue;
        }
        let after = links[next as usize].1;
        symbols[at] = id;
        symbols[next as usize] = NONE;
        links[at].1 = after;
        if after != NONE {
            links[after as usize].0 = at as u32;
            let (rank, _) = merges.get(id, symbols[after as usize]);
            if rank != NEVER {
                queue.push(entry(rank, at as u32));
            }
        }
        let before = links[at].0;
        if before != NONE {
            let (rank, _) = merges.get(symbols[before as usize], id);
            if rank != NEVER {
                queue.push(entry(rank, before));
            }
        }
    }
    symbols.retain(|symbol| *symbol != NONE);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn short_and_long_words_merge_alike(
            pairs in prop::collection::vec((0u32..12, 0u32..12), 0..30),
            symbols in prop::collection::vec(0u32..3, 0..120),
        ) {
            let mut known = 3;
            let merges: Vec<_> = pairs.into_iter().filter(|(a, b)| *a < 12 && *b < 12).map(|(a, b)| {
                known += 1;
                (a.min(known - 1), b.min(known - 1), known - 1)
            }).collect();
            let merges = Merges::new(&merges);
            let (mut short, mut long) = (symbols.clone(), symbols);
            merge_short(&merges, &mut short, &mut Vec::new());
            merge_long(&merges, &mut long, &mut Room::default());
            prop_assert_eq!(short, long);
        }
    }
}
