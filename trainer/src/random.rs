//! Random numbers as pure functions: the value at index i of the stream named by a key. Nothing is saved or restored, and
//! no rank, world size or order of calls can change them.
//! Source: Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators" (SplitMix64's finaliser).

/// A stream of random numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stream(u64);

fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

impl Stream {
    /// The stream for `purpose` under the run's seed: "new rows", "lora model.layers.3.self_attn.q_proj", …
    pub fn new(seed: u64, purpose: &str) -> Stream {
        let name = blake3::hash(purpose.as_bytes());
        let word = u64::from_le_bytes(name.as_bytes()[..8].try_into().expect("a hash has 32 bytes"));
        Stream(mix(mix(seed.wrapping_add(GOLDEN)) ^ word))
    }

    /// A stream of its own for each `key`.
    pub fn fork(self, key: u64) -> Stream {
        Stream(mix(self.0 ^ mix(key.wrapping_add(GOLDEN))))
    }

    /// What the values are a function of, with their index: for generators elsewhere that compute the same.
    pub fn key(self) -> u64 {
        self.0
    }

    pub fn bits(self, index: u64) -> u64 {
        mix(self.0.wrapping_add(index.wrapping_add(1).wrapping_mul(GOLDEN)))
    }

    /// Uniform in [0, 1), 53 bits.
    pub fn uniform(self, index: u64) -> f64 {
        (self.bits(index) >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Standard normal, by Box and Muller's transform of two uniforms.
    pub fn normal(self, index: u64) -> f64 {
        let radius = (-2.0 * (1.0 - self.uniform(2 * index)).ln()).sqrt();
        radius * (std::f64::consts::TAU * self.uniform(2 * index + 1)).cos()
    }
}

/// [`Stream::bits`] are below it with probability `p`.
pub fn threshold(p: f64) -> u64 {
    (p * u64::MAX as f64) as u64
}

/// What tests multiply: normally distributed, and the same in every run. Torch's own generator is shared by all tests of a process.
#[cfg(test)]
pub mod operands {
    use std::cell::Cell;

    use tch::Tensor;

    use super::Stream;

    thread_local! {
        static NEXT: Cell<u64> = const { Cell::new(0) };
    }

    /// A test's operand number `which`, in f32.
    pub fn operand(which: u64, shape: &[i64]) -> Tensor {
        let stream = Stream::new(1, "operands").fork(which);
        let count = shape.iter().product::<i64>() as u64;
        let values: Vec<f32> = (0..count).map(|index| stream.normal(index) as f32).collect();
        Tensor::from_slice(&values).view(shape)
    }

    /// One after the other; a test has a thread of its own.
    pub fn random(shape: &[i64]) -> Tensor {
        operand(NEXT.replace(NEXT.get() + 1), shape)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_are_those_of_the_distribution() {
        let stream = Stream::new(1, "test");
        let n = 100_000;
        let mean = |f: &dyn Fn(u64) -> f64| (0..n).map(f).sum::<f64>() / n as f64;
        assert!((mean(&|i| stream.uniform(i)) - 0.5).abs() < 0.005);
        assert!(mean(&|i| stream.normal(i)).abs() < 0.02);
        assert!((mean(&|i| stream.normal(i).powi(2)) - 1.0).abs() < 0.02);
    }

    #[test]
    fn streams_differ_by_seed_purpose_and_key() {
        let first = Stream::new(1, "a").bits(0);
        let others = [Stream::new(2, "a"), Stream::new(1, "b"), Stream::new(1, "a").fork(0)];
        assert!(others.iter().all(|other| other.bits(0) != first));
        assert_eq!(Stream::new(1, "a").bits(0), first);
    }
}
