//! Numbers about numbers: confidence by resampling, scores of classifications, and Python's way of drawing a sample, so that
//! the shots of a published protocol are the same ones here.

/// A sequence of random numbers (SplitMix64), the same everywhere.
struct Draws(u64);

impl Draws {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^= z >> 31;
        // The upper half of a 128-bit product: even to 1 in 2⁶⁴ / n.
        ((u128::from(z) * n as u128) >> 64) as usize
    }
}

const RESAMPLES: usize = 1000;
/// Fewer units say too little about how they vary.
pub const FEWEST_UNITS: usize = 5;

/// The middle 95 % of what `of` gives for samples of `n` units, drawn with replacement (Efron 1979); `None` of too few units.
pub fn bootstrap(n: usize, of: impl Fn(&[usize]) -> f64) -> Option<[f64; 2]> {
    if n < FEWEST_UNITS {
        return None;
    }
    let mut draws = Draws(0x5eed);
    let mut sample = vec![0; n];
    let mut values: Vec<f64> = (0..RESAMPLES)
        .map(|_| {
            sample.iter_mut().for_each(|unit| *unit = draws.below(n));
            of(&sample)
        })
        .filter(|value| value.is_finite())
        .collect();
    values.sort_by(f64::total_cmp);
    let at = |share: f64| {
        values
            .get(((values.len() as f64 - 1.0) * share).round() as usize)
            .copied()
    };
    Some([at(0.025)?, at(0.975)?])
}

/// 95 % of a share of `n` trials (Wilson 1927): holds for few trials and shares near 0 or 1 too.
pub fn wilson(share: f64, n: usize) -> [f64; 2] {
    const Z: f64 = 1.959_963_984_540_054;
    if n == 0 {
        return [0.0, 1.0];
    }
    let n = n as f64;
    let middle = (share + Z * Z / (2.0 * n)) / (1.0 + Z * Z / n);
    let half = Z / (1.0 + Z * Z / n) * (share * (1.0 - share) / n + Z * Z / (4.0 * n * n)).sqrt();
    [(middle - half).max(0.0), (middle + half).min(1.0)]
}

/// Mean of the labels' F1, of those that occur as truth or prediction; rows of `confusion` are the truth.
pub fn macro_f1(confusion: &[Vec<u64>]) -> f64 {
    let of = |label: usize| {
        let right = confusion[label][label];
        let truth: u64 = confusion[label].iter().sum();
        let said: u64 = confusion.iter().map(|row| row[label]).sum();
        (truth + said > 0).then(|| 2.0 * right as f64 / (truth + said) as f64)
    };
    mean((0..confusion.len()).filter_map(of))
}

/// NaN of nothing.
pub fn mean(values: impl Iterator<Item = f64>) -> f64 {
    let (sum, n) = values.fold((0.0, 0), |(sum, n), value| (sum + value, n + 1));
    sum / f64::from(n)
}

/// What Python's `random.Random(seed).sample(range(n), k)` gives; fewer where there are fewer. The generator is MT19937
/// (Matsumoto and Nishimura 1998), seeded by an array of the seed's words.
pub fn python_sample(seed: u64, n: usize, k: usize) -> Vec<usize> {
    let k = k.min(n);
    let mut random = Mersenne::new(seed);
    // Python keeps a set of what was drawn, or a list of what was not, whichever is smaller.
    let mut set_size = 21;
    if k > 5 {
        set_size += 4usize.pow((3.0 * k as f64).log(4.0).ceil() as u32);
    }
    if n <= set_size {
        let mut pool: Vec<usize> = (0..n).collect();
        return (0..k)
            .map(|i| {
                let j = random.below(n - i);
                let drawn = pool[j];
                pool[j] = pool[n - i - 1];
                drawn
            })
            .collect();
    }
    let mut drawn: Vec<usize> = Vec::with_capacity(k);
    while drawn.len() < k {
        let j = random.below(n);
        if !drawn.contains(&j) {
            drawn.push(j);
        }
    }
    drawn
}

struct Mersenne {
    state: Vec<u32>,
    at: usize,
}

impl Mersenne {
    const N: usize = 624;

    fn new(seed: u64) -> Mersenne {
        let mut key = vec![seed as u32];
        if seed >> 32 != 0 {
            key.push((seed >> 32) as u32);
        }
        let mut state = vec![19_650_218u32];
        for i in 1..Self::N {
            let before = state[i - 1];
            state.push(
                1_812_433_253u32
                    .wrapping_mul(before ^ (before >> 30))
                    .wrapping_add(i as u32),
            );
        }
        let (mut i, mut j) = (1, 0);
        let mixed =
            |state: &[u32], i: usize, by: u32| state[i] ^ (state[i - 1] ^ (state[i - 1] >> 30)).wrapping_mul(by);
        for _ in 0..Self::N.max(key.len()) {
            state[i] = mixed(&state, i, 1_664_525).wrapping_add(key[j]).wrapping_add(j as u32);
            i += 1;
            j = (j + 1) % key.len();
            if i == Self::N {
                state[0] = state[Self::N - 1];
                i = 1;
            }
        }
        for _ in 1..Self::N {
            state[i] = mixed(&state, i, 1_566_083_941).wrapping_sub(i as u32);
            i += 1;
            if i == Self::N {
                state[0] = state[Self::N - 1];
                i = 1;
            }
        }
        state[0] = 0x8000_0000;
        Mersenne { state, at: Self::N }
    }

    fn next(&mut self) -> u32 {
        if self.at == Self::N {
            for i in 0..Self::N {
                let y = (self.state[i] & 0x8000_0000) | (self.state[(i + 1) % Self::N] & 0x7fff_ffff);
                let odd = if y & 1 == 1 { 0x9908_b0df } else { 0 };
                self.state[i] = self.state[(i + 397) % Self::N] ^ (y >> 1) ^ odd;
            }
            self.at = 0;
        }
        let mut y = self.state[self.at];
        self.at += 1;
        y ^= y >> 11;
        y ^= (y << 7) & 0x9d2c_5680;
        y ^= (y << 15) & 0xefc6_0000;
        y ^ (y >> 18)
    }

    /// As Python's `_randbelow`: bits as many as n has, again until they are below it.
    fn below(&mut self, n: usize) -> usize {
        let bits = usize::BITS - n.leading_zeros();
        loop {
            let drawn = (self.next() >> (32 - bits)) as usize;
            if drawn < n {
                return drawn;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_are_python_s() {
        // python3 -c "import random; print(random.Random(1234).sample(range(701), 3))", and so on.
        assert_eq!(python_sample(1234, 701, 3), PYTHON_701);
        assert_eq!(python_sample(42, 10, 3), [1, 0, 4]);
        assert_eq!(python_sample(42, 10, 99).len(), 10);
    }

    const PYTHON_701: [usize; 3] = [451, 119, 7];

    #[test]
    fn a_bootstrap_holds_the_mean_and_narrows_with_more_units() {
        let width = |n: usize| {
            let values: Vec<f64> = (0..n).map(|i| (i % 10) as f64).collect();
            let [low, high] = bootstrap(n, |units| mean(units.iter().map(|u| values[*u]))).unwrap();
            assert!(low < 4.5 && 4.5 < high, "{low} … {high}");
            high - low
        };
        // 1 / √n: a hundred times the units, a tenth of the width.
        let ratio = width(50) / width(5000);
        assert!((7.0..14.0).contains(&ratio), "{ratio}");
        assert_eq!(bootstrap(4, |_| 0.0), None);
    }

    #[test]
    fn scores_are_the_textbook_s() {
        let [low, high] = wilson(0.9, 10);
        assert!(
            (low - 0.5958).abs() < 1e-3 && (high - 0.9821).abs() < 1e-3,
            "{low} {high}"
        );
        // F1: 2·2/(3 + 2) and 2·1/(1 + 2); the third label never occurs.
        let confusion = [vec![2, 1, 0], vec![0, 1, 0], vec![0, 0, 0]];
        assert!((macro_f1(&confusion) - (0.8 + 2.0 / 3.0) / 2.0).abs() < 1e-12);
    }
}
