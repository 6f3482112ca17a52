//! A keyed permutation of 0…n-1 that is computed, not stored: the order of a language's blocks in one epoch.
//! A Feistel network over the next power of four, walked until the result falls below n (Black & Rogaway 2002).

use crate::splitmix;

/// A permutation of `0..n` chosen by a key.
pub(crate) struct Permutation {
    n: u64,
    /// Bits of each half.
    half_bits: u32,
    keys: [u64; Self::ROUNDS],
}

impl Permutation {
    /// Four rounds are a pseudo-random permutation (Luby & Rackoff 1988); halves of a few bits want some more.
    const ROUNDS: usize = 7;

    pub fn new(n: u64, key: u64) -> Self {
        let bits = u64::BITS - n.saturating_sub(1).leading_zeros();
        let mut keys = [0; Self::ROUNDS];
        for (round, slot) in keys.iter_mut().enumerate() {
            *slot = mix(key.wrapping_add(mix(round as u64 + 1)));
        }
        Permutation {
            n,
            half_bits: bits.div_ceil(2).max(1),
            keys,
        }
    }

    /// Where `index` goes. On average at most four walks: the domain is less than four times n.
    pub fn apply(&self, index: u64) -> u64 {
        debug_assert!(index < self.n);
        let mut at = self.encipher(index);
        while at >= self.n {
            at = self.encipher(at);
        }
        at
    }

    fn encipher(&self, block: u64) -> u64 {
        let mask = (1u64 << self.half_bits) - 1;
        let (mut left, mut right) = (block >> self.half_bits, block & mask);
        for key in self.keys {
            (left, right) = (right, left ^ (mix(right ^ key) & mask));
        }
        (left << self.half_bits) | right
    }
}

/// SplitMix64's output for the state `x`: unlike its finalizer alone, it does not leave 0 at 0.
pub(crate) fn mix(x: u64) -> u64 {
    splitmix::mix(x.wrapping_add(0x9E37_79B9_7F4A_7C15))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_index_is_met_once() {
        for n in (1..70).chain([1000, 4096, 4097, 65_537]) {
            let permutation = Permutation::new(n, 7);
            let mut seen = vec![false; n as usize];
            for index in 0..n {
                let at = permutation.apply(index) as usize;
                assert!(!std::mem::replace(&mut seen[at], true), "n = {n}: {at} twice");
            }
        }
    }

    #[test]
    fn keys_give_different_orders_and_large_n_is_quick() {
        let order = |key| {
            (0..100)
                .map(|i| Permutation::new(100, key).apply(i))
                .collect::<Vec<_>>()
        };
        assert_eq!(order(1), order(1));
        assert_ne!(order(1), order(2));
        assert!(Permutation::new(u64::MAX >> 2, 3).apply(12345) < u64::MAX >> 2);
    }

    /// Each place is reached from each index about equally often over many keys.
    #[test]
    fn the_orders_are_spread_evenly() {
        const N: u64 = 12;
        const KEYS: u64 = 12_000;
        let mut counts = [[0u32; N as usize]; N as usize];
        for key in 0..KEYS {
            let permutation = Permutation::new(N, key);
            (0..N).for_each(|i| counts[i as usize][permutation.apply(i) as usize] += 1);
        }
        let expected = (KEYS / N) as f64;
        let chi2: f64 = counts
            .iter()
            .flatten()
            .map(|c| (f64::from(*c) - expected).powi(2) / expected)
            .sum();
        // 11 × 11 degrees of freedom: mean 121, standard deviation 15.6; six of those above is a fault.
        assert!(chi2 < 121.0 + 6.0 * 15.6, "{chi2}");
    }
}
