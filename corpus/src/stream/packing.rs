//! A part cut into blocks of T tokens: documents end to end, or rows made of whole documents.
//!
//! For whole documents a part is divided into windows of consecutive documents, some dozens of rows each, and a window is
//! packed when one of its rows is wanted: documents longer than a row give rows of their own, what is left of them and all
//! the others are packed by best-fit decreasing (Ding et al. 2024, "Fewer Truncations Improve Language Modeling").
//! Kept is only the number of rows before each window, 8 bytes for 256 documents or more.

use std::ops::Range;

use rayon::prelude::*;

use crate::stream::Packing;
use crate::{Error, LanguageTokens, Result, TokenShards};

/// A window holds about this many rows, so that the one that is not full costs little, ...
const WINDOW_ROWS: u64 = 32;
/// ... but no fewer and no more documents than this.
const WINDOW_DOCUMENTS: (u64, u64) = (256, 16_384);

/// Documents whose lengths are read together at opening: buffers small enough that the allocator keeps them.
const CHUNK_DOCUMENTS: u64 = 1 << 13;

/// The blocks of one part.
pub(crate) enum Blocks {
    /// ⌈n / T⌉ of them.
    Cut(u64),
    Packed(Windows),
}

/// Windows of documents, and how many rows came before each.
pub(crate) struct Windows {
    documents: Range<u64>,
    /// Documents in a window; the last may have fewer.
    size: u64,
    /// Rows before each window, and of all.
    before: Vec<u64>,
}

/// A stretch of one document in a row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    pub document: u64,
    /// Within the document.
    pub tokens: Range<u64>,
}

impl Blocks {
    /// Reads the lengths of all documents where `documents_matter`, and finds damage in the index on the way.
    pub fn new(
        shards: &TokenShards,
        part: &LanguageTokens,
        packing: Packing,
        sequence_length: u64,
        documents_matter: bool,
    ) -> Result<Blocks> {
        let n_tokens = part.n_tokens();
        let size = window_size(part, sequence_length);
        let mut windows = Vec::new();
        if documents_matter || packing == Packing::Documents {
            // Whole windows a chunk.
            let step = CHUNK_DOCUMENTS.max(size) / size * size;
            let chunks = (part.documents.end - part.documents.start).div_ceil(step);
            let read = |chunk: u64| {
                let start = part.documents.start + chunk * step;
                let mut lengths = Vec::new();
                let begins = shards.lengths(start..part.documents.end.min(start + step), &mut lengths)?;
                let rows: Vec<u64> = match packing {
                    Packing::Cut => Vec::new(),
                    Packing::Documents => {
                        let windows = lengths.chunks(size as usize);
                        windows
                            .map(|lengths| Packed::new(lengths, sequence_length).n_rows())
                            .collect()
                    }
                };
                Ok((begins, lengths.iter().sum::<u64>(), rows))
            };
            let read: Vec<(u64, u64, Vec<u64>)> = (0..chunks).into_par_iter().map(read).collect::<Result<_>>()?;
            let found: u64 = read.iter().map(|(_, tokens, _)| tokens).sum();
            let begins = read.first().map_or(part.tokens.start, |(begins, ..)| *begins);
            if found != n_tokens || begins != part.tokens.start {
                let reason = format!(
                    "the documents of {} have {found} tokens from {begins} on, the manifest says {n_tokens} from {} on",
                    part.language, part.tokens.start
                );
                let path = shards.folder().to_path_buf();
                return Err(Error::BadShards { path, reason });
            }
            windows = read.into_iter().flat_map(|(.., rows)| rows).collect();
        }
        if packing == Packing::Cut {
            return Ok(Blocks::Cut(n_tokens.div_ceil(sequence_length)));
        }
        let mut sum = 0;
        let mut before = vec![0];
        before.extend(windows.into_iter().map(|rows| {
            sum += rows;
            sum
        }));
        Ok(Blocks::Packed(Windows {
            documents: part.documents.clone(),
            size,
            before,
        }))
    }

    pub fn len(&self) -> u64 {
        match self {
            Blocks::Cut(n) => *n,
            Blocks::Packed(windows) => windows.before[windows.before.len() - 1],
        }
    }
}

impl Windows {
    /// What a block holds.
    pub fn pieces(&self, shards: &TokenShards, block: u64, sequence_length: u64) -> Vec<Piece> {
        let window = self.before.partition_point(|before| *before <= block) - 1;
        let first = self.documents.start + window as u64 * self.size;
        let lengths: Vec<u64> = (first..self.documents.end.min(first + self.size))
            .map(|document| {
                let range = shards.document(document).expect("the index was checked at opening");
                range.end - range.start
            })
            .collect();
        let pieces = Packed::new(&lengths, sequence_length).row(block - self.before[window]);
        let piece = |(document, tokens)| Piece {
            document: first + document as u64,
            tokens,
        };
        pieces.into_iter().map(piece).collect()
    }
}

/// Documents in a window, from the mean length.
fn window_size(part: &LanguageTokens, sequence_length: u64) -> u64 {
    let n_documents = part.documents.end - part.documents.start;
    let wanted =
        u128::from(WINDOW_ROWS * sequence_length) * u128::from(n_documents) / u128::from(part.n_tokens().max(1));
    (wanted as u64).clamp(WINDOW_DOCUMENTS.0, WINDOW_DOCUMENTS.1)
}

/// A window, packed.
struct Packed<'a> {
    lengths: &'a [u64],
    sequence_length: u64,
    /// Rows that are full of one document.
    n_full: u64,
    /// (document, the shared row that what is left of it is in).
    placed: Vec<(u32, u32)>,
    n_shared: u64,
}

impl<'a> Packed<'a> {
    fn new(lengths: &'a [u64], sequence_length: u64) -> Packed<'a> {
        let mut rests: Vec<(u32, u32)> = Vec::with_capacity(lengths.len());
        let mut n_full = 0;
        for (length, document) in lengths.iter().zip(0u32..) {
            n_full += length / sequence_length;
            let rest = length % sequence_length;
            if rest > 0 {
                rests.push((rest as u32, document));
            }
        }
        // Longest first; of the rows with room the fullest, of equally full ones the first.
        rests.sort_unstable_by_key(|(rest, document)| (std::cmp::Reverse(*rest), *document));
        let mut room: Vec<u32> = Vec::new();
        let placed = rests.iter().map(|(rest, document)| {
            let fitting = room.iter().enumerate().filter(|(_, room)| **room >= *rest);
            let row = match fitting.min_by_key(|(_, room)| **room) {
                Some((row, _)) => row,
                None => {
                    room.push(sequence_length as u32);
                    room.len() - 1
                }
            };
            room[row] -= *rest;
            (*document, row as u32)
        });
        let placed = placed.collect();
        Packed {
            lengths,
            sequence_length,
            n_full,
            placed,
            n_shared: room.len() as u64,
        }
    }

    fn n_rows(&self) -> u64 {
        self.n_full + self.n_shared
    }

    /// (document of the window, its tokens) in the order of the documents.
    fn row(&self, row: u64) -> Vec<(usize, Range<u64>)> {
        let length = self.sequence_length;
        if row < self.n_full {
            let mut before = 0;
            for (document, tokens) in self.lengths.iter().enumerate() {
                let rows = tokens / length;
                if row < before + rows {
                    let start = (row - before) * length;
                    return vec![(document, start..start + length)];
                }
                before += rows;
            }
        }
        let shared = (row - self.n_full) as u32;
        let here = self.placed.iter().filter(|(_, row)| *row == shared);
        let mut pieces: Vec<(usize, Range<u64>)> = here
            .map(|(document, _)| {
                let tokens = self.lengths[*document as usize];
                (*document as usize, tokens / length * length..tokens)
            })
            .collect();
        pieces.sort_unstable_by_key(|(document, _)| *document);
        pieces
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_window_holds_every_token_once_and_no_row_too_many(
            lengths in prop::collection::vec(0u64..200, 0..80), sequence_length in 1u64..70,
        ) {
            let packed = Packed::new(&lengths, sequence_length);
            let mut seen: Vec<Vec<bool>> = lengths.iter().map(|n| vec![false; *n as usize]).collect();
            for row in 0..packed.n_rows() {
                let pieces = packed.row(row);
                let tokens: u64 = pieces.iter().map(|(_, tokens)| tokens.end - tokens.start).sum();
                prop_assert!(0 < tokens && tokens <= sequence_length);
                for (document, tokens) in pieces {
                    prop_assert!(tokens.start.is_multiple_of(sequence_length), "cut at whole rows only");
                    tokens.for_each(|at| assert!(!std::mem::replace(&mut seen[document][at as usize], true)));
                }
            }
            prop_assert!(seen.iter().flatten().all(|seen| *seen));
            // Best fit leaves at most one shared row half empty.
            let half_empty = (packed.n_full..packed.n_rows())
                .filter(|row| 2 * packed.row(*row).iter().map(|(_, t)| t.end - t.start).sum::<u64>() < sequence_length);
            prop_assert!(half_empty.count() <= 1);
        }
    }
}
