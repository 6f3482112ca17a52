//! Whether ranks still hold alike what they should: digests of the replicated parameters, compared slice by slice with what
//! the slice's owner published. So a damaged rank is named even where there are two.

use rayon::prelude::*;
use tch::{Device, Tensor};

use crate::memory::bytes;

/// Bytes a task.
const CHUNK: usize = 1 << 20;

/// A digest of a tensor's elements, wherever it lies.
pub fn of(tensor: &Tensor) -> u64 {
    fold(bytes(&tensor.to_device(Device::Cpu).contiguous()))
}

/// A digest of `bytes` in one pass at the speed of memory. Any change of one 8-byte word changes it, since every step is a
/// bijection in the word; it is no defence against intent.
pub fn fold(bytes: &[u8]) -> u64 {
    let chunks: Vec<u64> = bytes.par_chunks(CHUNK).map(fold_chunk).collect();
    chunks.into_iter().fold(bytes.len() as u64, mix)
}

fn fold_chunk(bytes: &[u8]) -> u64 {
    // Four lanes, so that no step waits for the one before it.
    let mut lanes = [1u64, 2, 3, 4];
    let mut blocks = bytes.chunks_exact(32);
    for block in &mut blocks {
        for (lane, word) in lanes.iter_mut().zip(block.chunks_exact(8)) {
            *lane = mix(*lane, u64::from_le_bytes(word.try_into().expect("8 bytes")));
        }
    }
    let rest = blocks
        .remainder()
        .iter()
        .fold(0, |digest, byte| mix(digest, u64::from(*byte)));
    lanes.into_iter().fold(rest, mix)
}

/// The digest of what `digest` is of, and `word` behind it.
pub fn mix(digest: u64, word: u64) -> u64 {
    (digest.rotate_left(23) ^ word).wrapping_mul(0x9E37_79B9_7F4A_7C15)
}

/// What one rank holds of every slice, and what the slice it owns should be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Digests {
    /// By slice: digest of this rank's copy.
    pub copies: Vec<u64>,
    /// Digest of this rank's master weights, cast to the compute precision: the slice that it owns, or all where nothing is
    /// sharded.
    pub truth: u64,
}

/// What is wrong with each of those that nobody else decides between.
pub const UNDECIDED: &str = "its master weights differ from others', and no majority says whose are right";

/// The ranks whose memory differs from what it should be, each with what is wrong; empty where all is well.
/// `all[r]` is rank r's. With one slice, nothing is sharded: every rank has masters of its own.
pub fn damaged(all: &[Digests]) -> Vec<(usize, &'static str)> {
    let mut found = Vec::new();
    let n_slices = all.first().map_or(0, |digests| digests.copies.len());
    if n_slices == 1 {
        let truths: Vec<u64> = all.iter().map(|digests| digests.truth).collect();
        let usual = majority(&truths);
        for (rank, digests) in all.iter().enumerate() {
            if digests.copies[0] != digests.truth {
                found.push((rank, "its parameters are not what its master weights give"));
            } else if usual.is_some_and(|usual| digests.truth != usual) {
                found.push((rank, "its master weights differ from those of most ranks"));
            } else if usual.is_none() {
                found.push((rank, UNDECIDED));
            }
        }
        return found;
    }
    for slice in 0..n_slices {
        let copies: Vec<u64> = all.iter().map(|digests| digests.copies[slice]).collect();
        let truth = all[slice].truth;
        if copies.iter().all(|copy| *copy == truth) {
            continue;
        }
        if majority(&copies).is_some_and(|usual| usual != truth) {
            found.push((slice, "its master weights are not what it published"));
        }
        let usual = majority(&copies).unwrap_or(truth);
        let others = (0..all.len()).filter(|rank| copies[*rank] != usual);
        found.extend(others.map(|rank| (rank, "its parameters are not what their owner published")));
    }
    found.sort_unstable();
    found.dedup();
    found
}

/// What more than half of them say.
fn majority(values: &[u64]) -> Option<u64> {
    let count = |value| values.iter().filter(|other| **other == value).count();
    values.iter().copied().find(|value| 2 * count(*value) > values.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_flipped_bit_changes_the_digest_wherever_it_lies() {
        for length in [1, 7, 32, 33, 4096, (1 << 20) + 13] {
            let mut bytes: Vec<u8> = (0..length).map(|i| (i * 31 % 251) as u8).collect();
            let whole = fold(&bytes);
            for at in [0, length / 3, length / 2, length - 1] {
                for bit in 0..8 {
                    bytes[at] ^= 1 << bit;
                    assert_ne!(fold(&bytes), whole, "bit {bit} of byte {at} of {length}");
                    bytes[at] ^= 1 << bit;
                }
            }
            assert_eq!(fold(&bytes), whole);
        }
        assert_ne!(fold(&[0; 32]), fold(&[0; 64]), "length counts");
    }

    fn sharded(world: u64) -> Vec<Digests> {
        (0..world)
            .map(|rank| Digests {
                copies: (0..world).map(|slice| 100 + slice).collect(),
                truth: 100 + rank,
            })
            .collect()
    }

    #[test]
    fn the_damaged_rank_is_named_even_of_two() {
        for world in [2, 3, 4] {
            assert_eq!(damaged(&sharded(world)), []);
            for rank in 0..world as usize {
                for slice in 0..world as usize {
                    let mut all = sharded(world);
                    all[rank].copies[slice] ^= 1;
                    let found = damaged(&all);
                    assert_eq!(
                        found,
                        [(rank, "its parameters are not what their owner published")],
                        "of {world}"
                    );
                }
                let mut all = sharded(world);
                all[rank].truth ^= 1;
                assert_eq!(
                    damaged(&all),
                    [(rank, "its master weights are not what it published")],
                    "of {world}"
                );
            }
        }
    }

    #[test]
    fn of_replicated_masters_the_majority_decides_and_of_two_none() {
        let rank = |copy, truth| Digests {
            copies: vec![copy],
            truth,
        };
        assert_eq!(damaged(&[rank(5, 5), rank(5, 5)]), []);
        let found = damaged(&[rank(5, 5), rank(6, 5)]);
        assert_eq!(found, [(1, "its parameters are not what its master weights give")]);
        let found = damaged(&[rank(5, 5), rank(6, 6), rank(5, 5)]);
        assert_eq!(found, [(1, "its master weights differ from those of most ranks")]);
        assert_eq!(damaged(&[rank(5, 5), rank(6, 6)]), [(0, UNDECIDED), (1, UNDECIDED)]);
    }
}
