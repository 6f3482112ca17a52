//! Whether ranks still hold alike what they should: digests of the replicated parameters, compared slice by slice with what
//! the slice's owner published. So a damaged rank is named even where there are two.

use rayon::prelude::*;
use tch::{Device, Kind, Tensor};

use crate::cuda::kernels::{Argument, Launch, Source};
use crate::memory::bytes;

/// Bytes that are read as one word.
const WORD: usize = 8;
/// Bytes a task.
const CHUNK: usize = 1 << 20;

/// A digest of a tensor's elements, the same wherever it lies, made there in one pass at the speed of memory. Any change of one
/// 8-byte word changes it, since every word is scattered by a bijection of its own; it is no defence against intent.
pub fn of(tensor: &Tensor) -> u64 {
    let tensor = tensor.contiguous();
    let n_bytes = tensor.numel() * tensor.kind().elt_size_in_bytes();
    let sum = match (tensor.device(), tensor.kind()) {
        (Device::Cuda(_), Kind::Float | Kind::BFloat16) => sum_on_gpu(&tensor),
        _ => sum_of(bytes(&tensor.to_device(Device::Cpu))),
    };
    mix(n_bytes as u64, sum)
}

/// Σ over words, modulo 2⁶⁴: the same in any order.
fn sum_of(bytes: &[u8]) -> u64 {
    let of_chunk = |(chunk, bytes): (usize, &[u8])| {
        let first = (chunk * (CHUNK / WORD)) as u64;
        let words = bytes.chunks_exact(WORD);
        let mut rest = [0; WORD];
        rest[..words.remainder().len()].copy_from_slice(words.remainder());
        let rest = (!words.remainder().is_empty()).then_some(u64::from_le_bytes(rest));
        let words = words.map(|word| u64::from_le_bytes(word.try_into().expect("8 bytes")));
        let scattered = (first..)
            .zip(words.chain(rest))
            .map(|(number, word)| scatter(number, word));
        scattered.fold(0, u64::wrapping_add)
    };
    let chunks = bytes.par_chunks(CHUNK).enumerate();
    chunks.map(of_chunk).reduce(|| 0, u64::wrapping_add)
}

/// A bijection of words, another one for each place.
/// Source: Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators", with Stafford's constants (variant 13).
fn scatter(number: u64, word: u64) -> u64 {
    let mut x = word.wrapping_add(number.wrapping_mul(0x9E37_79B9_7F4A_7C15));
    x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}

/// As [`sum_of`], on a GPU.
pub static SOURCE: Source = Source {
    file: "digest.cu",
    text: include_str!("digest.cu"),
};

const BLOCK: usize = 256;
/// Several for each of a GPU's hundred-odd processors.
const MOST_BLOCKS: usize = 2048;

fn sum_on_gpu(tensor: &Tensor) -> u64 {
    let words = (tensor.numel() * tensor.kind().elt_size_in_bytes()).div_ceil(WORD);
    let blocks = words.div_ceil(BLOCK).min(MOST_BLOCKS);
    let mut partial_b = Tensor::zeros([blocks as i64], (Kind::Int64, tensor.device()));
    Launch {
        source: &SOURCE,
        kernel: "digest",
        kind: tensor.kind(),
        grid: [blocks, 1],
        block: BLOCK,
        arguments: vec![
            Argument::Read(tensor),
            Argument::Whole(tensor.numel() as i64),
            Argument::Write(&mut partial_b),
        ],
    }
    .start();
    let partial_b = Vec::<i64>::try_from(partial_b).expect("whole numbers");
    partial_b
        .into_iter()
        .fold(0, |sum, of_block| sum.wrapping_add(of_block as u64))
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
    /// Where nothing is sharded: digest of this rank's master weights as they are. What is cast shows fewer of their bits.
    pub masters: Option<u64>,
}

/// What is wrong with each of those that nobody else decides between.
pub const UNDECIDED: &str = "its master weights differ from others', and no majority says whose are right";

/// The ranks whose memory differs from what it should be, each with what is wrong; empty where all is well.
/// `all[r]` is rank r's. Where nothing is sharded every rank has masters of its own, and one slice.
pub fn damaged(all: &[Digests]) -> Vec<(usize, &'static str)> {
    let mut found = Vec::new();
    let masters: Option<Vec<u64>> = all.iter().map(|digests| digests.masters).collect();
    if let Some(masters) = masters {
        let usual = majority(&masters);
        for (rank, digests) in all.iter().enumerate() {
            if digests.copies[0] != digests.truth {
                found.push((rank, "its parameters are not what its master weights give"));
            } else if usual.is_some_and(|usual| masters[rank] != usual) {
                found.push((rank, "its master weights differ from those of most ranks"));
            } else if usual.is_none() {
                found.push((rank, UNDECIDED));
            }
        }
        return found;
    }
    for slice in 0..all.first().map_or(0, |digests| digests.copies.len()) {
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
            let bytes: Vec<u8> = (0..length).map(|i| (i * 31 % 251) as u8).collect();
            let bytes = Tensor::from_slice(&bytes);
            let whole = of(&bytes);
            for at in [0, length / 3, length / 2, length - 1] {
                let mut byte = bytes.get(at);
                for bit in 0..8 {
                    let _ = byte.bitwise_xor_(1 << bit);
                    assert_ne!(of(&bytes), whole, "bit {bit} of byte {at} of {length}");
                    let _ = byte.bitwise_xor_(1 << bit);
                }
            }
            assert_eq!(of(&bytes), whole);
        }
        let zeros = |length| of(&Tensor::zeros([length], (Kind::Uint8, Device::Cpu)));
        assert_ne!(zeros(31), zeros(32), "length counts");
        let words = Tensor::from_slice(&[1i64, 2, 3]);
        assert_ne!(of(&words), of(&words.flip([0])), "places count");
    }

    #[test]
    fn the_gpus_kernels_give_the_same_digest() {
        for architecture in crate::cuda::kernels::ARCHITECTURES {
            SOURCE.compile(architecture).unwrap_or_else(|error| panic!("{error}"));
        }
        for kind in [Kind::Float, Kind::BFloat16] {
            // Whole and partial words and blocks, more words than threads, nothing, and a start that is no multiple of 8 bytes.
            let numbers = Tensor::randn([2 * 256 * 2048 + 7], (Kind::Float, Device::Cpu)).to_kind(kind);
            for (start, length) in [
                (0, 0),
                (0, 1),
                (0, 3),
                (0, 2600),
                (1, 2601),
                (0, numbers.numel() as i64),
            ] {
                let some = numbers.narrow(0, start, length);
                assert_eq!(
                    sum_on_gpu(&some),
                    sum_of(bytes(&some)),
                    "{kind:?}, {length} from {start}"
                );
            }
        }
    }

    fn sharded(world: u64) -> Vec<Digests> {
        (0..world)
            .map(|rank| Digests {
                copies: (0..world).map(|slice| 100 + slice).collect(),
                truth: 100 + rank,
                masters: None,
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
            masters: Some(truth),
        };
        assert_eq!(damaged(&[rank(5, 5), rank(5, 5)]), []);
        let found = damaged(&[rank(5, 5), rank(6, 5)]);
        assert_eq!(found, [(1, "its parameters are not what its master weights give")]);
        let found = damaged(&[rank(5, 5), rank(6, 6), rank(5, 5)]);
        assert_eq!(found, [(1, "its master weights differ from those of most ranks")]);
        assert_eq!(damaged(&[rank(5, 5), rank(6, 6)]), [(0, UNDECIDED), (1, UNDECIDED)]);
        // A bit that the compute precision does not have.
        let low = Digests {
            masters: Some(7),
            ..rank(5, 5)
        };
        assert_eq!(damaged(&[low.clone(), rank(5, 5)]), [(0, UNDECIDED), (1, UNDECIDED)]);
        let found = damaged(&[rank(5, 5), rank(5, 5), low]);
        assert_eq!(found, [(2, "its master weights differ from those of most ranks")]);
    }
}
