//! The lottery for held-out text: which passages are drawn, and the texts that no language may train on because of it.
//! A passage's rank is a function of (seed, passage) alone, so that neither order nor time changes what is held out.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::import::sorted::{Sorted, Sorter};
use crate::{Error, Result};

/// 128 bits of a text's hash: among 10^12 texts the chance of one false equal is 10^-15.
pub(crate) type TextHash = u128;

pub(crate) fn text_hash(text: &str) -> TextHash {
    let hash = blake3::hash(text.as_bytes());
    u128::from_be_bytes(hash.as_bytes()[..16].try_into().expect("a digest has 32 bytes"))
}

/// A passage's place in the lottery for held-out text.
pub(crate) fn rank(seed: u64, passage: &str) -> u64 {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&seed.to_le_bytes()).update(passage.as_bytes());
    u64::from_le_bytes(
        hasher.finalize().as_bytes()[..8]
            .try_into()
            .expect("a digest has 32 bytes"),
    )
}

/// How much is held out.
#[derive(Clone, Copy)]
pub(crate) struct Share {
    pub share: f64,
    /// At most this many passages.
    pub most: Option<u64>,
}

/// Those who take part in one lottery: a language's passages, or all passages of a parallel source.
pub(crate) struct Lottery(Sorter);

impl Lottery {
    /// Spills to `place` beyond `budget` bytes of memory.
    pub fn new(place: &Path, budget: usize) -> Lottery {
        Lottery(Sorter::new(place.to_owned(), budget))
    }

    pub fn enter(&mut self, rank: u64, text: TextHash) -> Result<()> {
        self.0
            .push((u128::from(rank) << 64) | (text >> 64), &text.to_be_bytes())
    }

    pub fn draw(self, share: Share) -> Result<Drawn> {
        let mut sorted = self.0.finish()?;
        let below = threshold(&mut sorted, share)?;
        sorted.rewind()?;
        Ok(Drawn { below, sorted })
    }
}

/// What a lottery drew.
pub(crate) struct Drawn {
    /// A passage is held out if its rank is below this.
    pub below: u64,
    sorted: Sorted,
}

impl Drawn {
    /// The held-out texts, some of them perhaps several times.
    pub fn texts(mut self, mut each: impl FnMut(TextHash) -> Result<()>) -> Result<()> {
        while let Some((key, text)) = self.sorted.next()? {
            if (key >> 64) as u64 >= self.below {
                break;
            }
            each(u128::from_be_bytes(text.try_into().expect("written so")))?;
        }
        Ok(())
    }
}

/// The rank below which the share of the distinct ranks lies: rounded, but at least one where one is left to train on.
fn threshold(sorted: &mut Sorted, share: Share) -> Result<u64> {
    let distinct = count_distinct_ranks(sorted, u64::MAX)?.0;
    if share.share == 0.0 || distinct == 0 {
        return Ok(0);
    }
    let wanted = (share.share * distinct as f64).round() as u64;
    let wanted = wanted.max(1).min(distinct - 1).min(share.most.unwrap_or(u64::MAX));
    sorted.rewind()?;
    Ok(count_distinct_ranks(sorted, wanted)?.1)
}

/// Counts, up to the one with `before` others before it; and that one, or the last.
fn count_distinct_ranks(sorted: &mut Sorted, before: u64) -> Result<(u64, u64)> {
    let (mut count, mut last) = (0, None);
    while let Some((key, _)) = sorted.next()? {
        let rank = (key >> 64) as u64;
        if last == Some(rank) {
            continue;
        }
        count += 1;
        last = Some(rank);
        if count > before {
            break;
        }
    }
    Ok((count, last.unwrap_or(0)))
}

/// The held-out texts of all languages, on disk, in order. What is asked in order reads each block at most once.
pub(crate) struct HeldOutTexts {
    file: File,
    /// The first hash of each block.
    firsts: Vec<TextHash>,
    length: u64,
    /// Over all hashes.
    pub digest: String,
}

/// 64 KiB of hashes.
const BLOCK: u64 = 4096;

impl HeldOutTexts {
    /// Writes each hash once.
    pub fn write(path: &Path, mut sorted: Sorted) -> Result<HeldOutTexts> {
        let mut out = BufWriter::new(File::create(path).map_err(Error::io("create", path))?);
        let mut hasher = blake3::Hasher::new();
        let (mut firsts, mut length, mut last) = (Vec::new(), 0, None);
        while let Some((hash, _)) = sorted.next()? {
            if last == Some(hash) {
                continue;
            }
            last = Some(hash);
            if length % BLOCK == 0 {
                firsts.push(hash);
            }
            length += 1;
            hasher.update(&hash.to_be_bytes());
            out.write_all(&hash.to_be_bytes()).map_err(Error::io("write", path))?;
        }
        out.flush().map_err(Error::io("write", path))?;
        drop(out);
        Ok(HeldOutTexts {
            file: File::open(path).map_err(Error::io("open", path))?,
            firsts,
            length,
            digest: hasher.finalize().to_hex().to_string(),
        })
    }

    pub fn questions<'a>(&'a self, path: &'a Path) -> Questions<'a> {
        Questions {
            texts: self,
            path,
            number: None,
            block: Vec::new(),
        }
    }
}

/// One reader's place among the held-out texts.
pub(crate) struct Questions<'a> {
    texts: &'a HeldOutTexts,
    path: &'a Path,
    number: Option<usize>,
    block: Vec<TextHash>,
}

impl Questions<'_> {
    pub fn contains(&mut self, hash: TextHash) -> Result<bool> {
        let after = self.texts.firsts.partition_point(|first| *first <= hash);
        let Some(number) = after.checked_sub(1) else {
            return Ok(false);
        };
        if self.number != Some(number) {
            let start = number as u64 * BLOCK;
            let mut bytes = vec![0; 16 * BLOCK.min(self.texts.length - start) as usize];
            let read = self.texts.file.read_exact_at(&mut bytes, 16 * start);
            read.map_err(Error::io("read", self.path))?;
            let hashes = bytes.chunks_exact(16);
            self.block = hashes
                .map(|b| u128::from_be_bytes(b.try_into().expect("16 bytes")))
                .collect();
            self.number = Some(number);
        }
        Ok(self.block.binary_search(&hash).is_ok())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn draw(ranks: impl Iterator<Item = u64>, share: f64, most: Option<u64>) -> Vec<TextHash> {
        let temp = tempfile::tempdir().unwrap();
        let mut lottery = Lottery::new(&temp.path().join("runs"), 0);
        ranks.for_each(|rank| lottery.enter(rank, rank.into()).unwrap());
        let mut texts = Vec::new();
        let drawn = lottery.draw(Share { share, most }).unwrap();
        drawn
            .texts(|text| {
                texts.push(text);
                Ok(())
            })
            .unwrap();
        texts
    }

    #[test]
    fn the_share_is_rounded_and_one_stays_to_train_on() {
        for (passages, share, most, held_out) in [
            (0, 0.5, None, 0),
            (1, 0.9, None, 0),
            (2, 0.01, None, 1),
            (3, 0.99, None, 2),
            (31, 0.1, None, 3),
            (31, 0.1, Some(2), 2),
            (31, 0.1, Some(9), 3),
            (31, 0.0, None, 0),
            (100_000, 0.1, None, 10_000),
        ] {
            // Each passage twice, as with two translations.
            let ranks = (0..passages).rev().flat_map(|i| [i * 7, i * 7]);
            let mut drawn = draw(ranks, share, most);
            drawn.dedup();
            let expected: Vec<_> = (0..held_out).map(|i| i * 7).collect();
            assert_eq!(drawn, expected, "{passages} passages, share {share}, most {most:?}");
        }
    }

    #[test]
    fn held_out_texts_answer_in_any_order() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("texts");
        for n in [0u128, 1, 4096, 10_000] {
            let mut sorter = Sorter::new(temp.path().join("runs"), 0);
            (0..n).for_each(|i| sorter.push((i * 2 + 1) << 90, &[]).unwrap());
            let texts = HeldOutTexts::write(&path, sorter.finish().unwrap()).unwrap();
            let mut questions = texts.questions(&path);
            for i in (0..2 * n + 2).rev().chain([0, n, 3]) {
                assert_eq!(
                    questions.contains(i << 90).unwrap(),
                    i % 2 == 1 && i < 2 * n,
                    "{i} of {n}"
                );
            }
        }
    }
}
