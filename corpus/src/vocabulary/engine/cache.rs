//! Words that were encoded before, and their ids: most of any text is the same few thousand words.
//! Bounded: a full cache is emptied and fills again. Exact: a word is compared byte by byte, not only by its hash.

use std::hash::Hasher;

use rustc_hash::FxHasher;

/// Words longer than this many bytes hardly come again.
const MOST_WORD_BYTES: usize = 128;

/// About 8 MiB a thread altogether.
const N_SLOTS: usize = 1 << 17;
const MOST_BYTES: usize = 3 << 20;
const MOST_IDS: usize = 3 << 18;

#[derive(Clone, Copy, Default)]
struct Slot {
    hash: u32,
    word_at: u32,
    /// The id itself where there is only one.
    ids_at: u32,
    /// 0 in a free slot.
    word_length: u16,
    n_ids: u16,
}

/// Word → ids.
pub(super) struct Cache {
    slots: Vec<Slot>,
    n_words: usize,
    bytes: Vec<u8>,
    ids: Vec<u32>,
}

/// Where a word may be put after it was not found.
pub(super) struct Place {
    hash: u32,
    slot: usize,
}

impl Cache {
    pub fn new() -> Cache {
        Cache {
            slots: vec![Slot::default(); N_SLOTS],
            n_words: 0,
            bytes: Vec::new(),
            ids: Vec::new(),
        }
    }

    /// Appends the word's ids, or says where to put them once they are known.
    pub fn get(&self, word: &[u8], into: &mut Vec<u32>) -> Result<(), Place> {
        let mut hasher = FxHasher::default();
        hasher.write(word);
        let hash = hasher.finish() as u32;
        let mut slot = hash as usize & (N_SLOTS - 1);
        loop {
            let found = &self.slots[slot];
            if found.word_length == 0 {
                return Err(Place { hash, slot });
            }
            if found.hash == hash
                && usize::from(found.word_length) == word.len()
                && &self.bytes[found.word_at as usize..][..word.len()] == word
            {
                match found.n_ids {
                    1 => into.push(found.ids_at),
                    n => into.extend_from_slice(&self.ids[found.ids_at as usize..][..usize::from(n)]),
                }
                return Ok(());
            }
            slot = (slot + 1) & (N_SLOTS - 1);
        }
    }

    /// Remembers a word that [`get`](Self::get) has just not found.
    pub fn put(&mut self, place: Place, word: &[u8], ids: &[u32]) {
        if word.is_empty() || word.len() > MOST_WORD_BYTES || ids.len() > MOST_WORD_BYTES {
            return;
        }
        let full = self.n_words * 4 > N_SLOTS * 3;
        if full || self.bytes.len() + word.len() > MOST_BYTES || self.ids.len() + ids.len() > MOST_IDS {
            self.slots.fill(Slot::default());
            (self.n_words, self.bytes, self.ids) = (0, Vec::new(), Vec::new());
            return;
        }
        self.n_words += 1;
        self.slots[place.slot] = Slot {
            hash: place.hash,
            word_at: self.bytes.len() as u32,
            ids_at: match ids {
                [id] => *id,
                _ => self.ids.len() as u32,
            },
            word_length: word.len() as u16,
            n_ids: ids.len() as u16,
        };
        self.bytes.extend_from_slice(word);
        if ids.len() != 1 {
            self.ids.extend_from_slice(ids);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cache_that_overflows_forgets_and_never_lies() {
        let mut cache = Cache::new();
        let ids_of = |i: u32| (0..i % 4).map(|j| i * 7 + j).collect::<Vec<u32>>();
        for round in 0..3 {
            for i in 0..200_000u32 {
                let word = format!("word {i}");
                let mut ids = vec![9];
                match cache.get(word.as_bytes(), &mut ids) {
                    Ok(()) => assert_eq!(ids[1..], ids_of(i)),
                    Err(place) => cache.put(place, word.as_bytes(), &ids_of(i)),
                }
                assert!(round > 0 || ids == [9]);
            }
            assert!(cache.bytes.len() <= MOST_BYTES && cache.n_words <= N_SLOTS);
        }
        assert!(cache.get(b"word 199999", &mut Vec::new()).is_ok());
    }
}
