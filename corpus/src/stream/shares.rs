//! Which part a row belongs to, and how many rows of that part came before it: both without walking there.
//!
//!   u_i = offset + i·A  mod 2⁶⁴         a Kronecker sequence: A/2⁶⁴ is the golden ratio, the most evenly spread of all
//!   part(i) = the p whose interval of the cumulated shares holds u_i
//!
//! Unlike random draws, any window of w rows holds s_p·w ± O(log w) rows of a part with share s_p, and the number of its
//! earlier rows is a difference of floor sums, computed in O(log i) like a greatest common divisor.

/// 2⁶⁴, the whole in fixed point.
const ONE: u128 = 1 << 64;

/// 2⁶⁴ divided by the golden ratio; odd, so that the sequence meets every value once.
const STEP: u64 = 0x9E37_79B9_7F4A_7C15;

/// The order of parts over all rows: a pure function of the shares and an offset.
pub(crate) struct PartOrder {
    /// Upper ends of the parts' intervals; the last is 2⁶⁴.
    ends: Vec<u128>,
    offset: u64,
}

impl PartOrder {
    /// Rows must stay below this number, so that the sums below fit into 128 bits. No run gets there.
    pub const MAX_ROWS: u64 = 1 << 62;

    /// `units` sum to 2⁶⁴, as [`fixed_point`] makes them.
    pub fn new(units: &[u128], offset: u64) -> Self {
        let ends: Vec<u128> = units
            .iter()
            .scan(0, |end, units| {
                *end += units;
                Some(*end)
            })
            .collect();
        debug_assert_eq!(ends.last(), Some(&ONE));
        PartOrder { ends, offset }
    }

    /// The part of a row.
    pub fn part(&self, row: u64) -> usize {
        let at = u128::from(self.offset.wrapping_add(row.wrapping_mul(STEP)));
        self.ends.partition_point(|end| *end <= at)
    }

    /// How many of the rows `0..row` are in a part.
    pub fn rows_before(&self, row: u64, part: usize) -> u64 {
        let start = if part == 0 { 0 } else { self.ends[part - 1] };
        self.from(row, start).wrapping_sub(self.from(row, self.ends[part])) as u64
    }

    /// The same for all parts at once, at half the price.
    pub fn all_rows_before(&self, row: u64) -> Vec<u64> {
        let starts = self.ends.iter().scan(self.from(row, 0), |from_start, end| {
            let from_end = self.from(row, *end);
            let count = from_start.wrapping_sub(from_end) as u64;
            *from_start = from_end;
            Some(count)
        });
        starts.collect()
    }

    /// How many of the rows `0..row` have u_i ≥ x, for 0 ≤ x ≤ 2⁶⁴, plus a number that is the same for all x: because
    /// u_i is what c + i·A leaves modulo 2⁶⁴, [u_i ≥ x] = ⌊(c + i·A + 2⁶⁴ − x) / 2⁶⁴⌋ − ⌊(c + i·A) / 2⁶⁴⌋.
    fn from(&self, row: u64, x: u128) -> u128 {
        assert!(row < Self::MAX_ROWS, "row {row} is beyond 2^62");
        floor_sum(row, ONE, u128::from(STEP), u128::from(self.offset) + ONE - x)
    }
}

/// Σ_{i<n} ⌊(a·i + b) / m⌋ modulo 2¹²⁸, exact, in O(log n) steps. Needs n < 2⁶², m ≤ 2⁶⁴, a < 2⁶⁴, b < 2⁶⁶.
fn floor_sum(n: u64, mut m: u128, mut a: u128, mut b: u128) -> u128 {
    let mut n = u128::from(n);
    let mut sum = 0u128;
    loop {
        if n == 0 {
            return sum;
        }
        let (whole_a, whole_b);
        (whole_a, a) = div_rem(a, m);
        (whole_b, b) = div_rem(b, m);
        sum = sum
            .wrapping_add((n * (n - 1) / 2).wrapping_mul(whole_a))
            .wrapping_add(n.wrapping_mul(whole_b));
        // Count the lattice points under the line from the other axis: a and m change places, as in Euclid's algorithm.
        let top = a * n + b;
        if top < m {
            return sum;
        }
        (n, b) = div_rem(top, m);
        (m, a) = (a, m);
    }
}

/// Quotient and remainder; most of these numbers fit 64 bits, where a division takes a tenth of the time.
fn div_rem(a: u128, m: u128) -> (u128, u128) {
    match (u64::try_from(a), u64::try_from(m)) {
        (Ok(a), Ok(m)) => (u128::from(a / m), u128::from(a % m)),
        _ if a < m => (0, a),
        _ => {
            let quotient = a / m;
            (quotient, a - quotient * m)
        }
    }
}

/// Shares in units of 2⁻⁶⁴ that sum to exactly one; every share above 0 has at least one unit. `shares` sum to 1 up to
/// rounding; what is missing or too much the largest takes, which does not feel it. All zero if they are.
pub(crate) fn fixed_point(shares: &[f64]) -> Vec<u128> {
    let mut units: Vec<u128> = shares
        .iter()
        .map(|share| ((share * ONE as f64) as u128).max(u128::from(*share > 0.0)))
        .collect();
    let largest = (0..units.len()).max_by_key(|l| (units[*l], std::cmp::Reverse(*l)));
    if let Some(largest) = largest.filter(|largest| units[*largest] > 0) {
        let others: u128 = units.iter().sum::<u128>() - units[largest];
        units[largest] = ONE - others;
    }
    units
}

/// n^α / max n^α in units of 2⁻⁴⁰, at least one unit where there are tokens. Integers, so that their sum is exact.
pub(crate) fn weights(tokens: &[u64], alpha: f64) -> Vec<u128> {
    let most = tokens.iter().copied().max().unwrap_or(0) as f64;
    let weight = |n: u64| {
        (libm::pow(n as f64 / most, alpha) * (1u64 << 40) as f64)
            .round()
            .max(1.0) as u128
    };
    tokens.iter().map(|n| if *n == 0 { 0 } else { weight(*n) }).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Shares p ∝ n^α in fixed point.
    fn shares(tokens: &[u64], alpha: f64) -> Vec<u128> {
        let weights = weights(tokens, alpha);
        let whole = weights.iter().sum::<u128>() as f64;
        fixed_point(&weights.iter().map(|w| *w as f64 / whole.max(1.0)).collect::<Vec<_>>())
    }

    #[test]
    fn shares_sum_to_one_and_follow_the_power() {
        for alpha in [0.0, 0.3, 1.0] {
            let tokens = [1_000_000_000_000, 1, 0, 37, 4096, 37];
            let units = shares(&tokens, alpha);
            assert_eq!(units.iter().sum::<u128>(), ONE);
            assert_eq!(units[2], 0);
            assert!(units.iter().zip(tokens).all(|(units, n)| n == 0 || *units >= 1));
            let ratio = units[4] as f64 / units[3] as f64;
            // 2⁻⁴⁰ is the resolution: for α = 1 the weights of 37 in 10¹² tokens are about 40 units.
            assert!((ratio / (4096f64 / 37.0).powf(alpha) - 1.0).abs() < 0.02, "{ratio}");
        }
        assert_eq!(shares(&[0, 0], 0.3), [0, 0]);
        assert_eq!(shares(&[5], 0.3), [ONE]);
    }

    proptest! {
        #[test]
        fn shares_always_sum_to_one(tokens in prop::collection::vec(0u64..u64::MAX >> 8, 1..600), alpha in 0.0f64..=1.0) {
            let units = shares(&tokens, alpha);
            let expected = if tokens.iter().any(|n| *n > 0) { ONE } else { 0 };
            prop_assert_eq!(units.iter().sum::<u128>(), expected);
            prop_assert!(units.iter().zip(&tokens).all(|(units, n)| (*n == 0) == (*units == 0)));
        }

        #[test]
        fn a_floor_sum_is_the_sum_of_floors(n in 0u64..300, m in 1u128..5000, a in 0u128..5000, b in 0u128..20_000) {
            let slow: u128 = (0..u128::from(n)).map(|i| (a * i + b) / m).sum();
            prop_assert_eq!(floor_sum(n, m, a, b), slow);
        }

        #[test]
        fn rows_before_counts_them(tokens in prop::collection::vec(0u64..1000, 1..12), offset: u64, rows in 0u64..500) {
            prop_assume!(tokens.iter().any(|n| *n > 0));
            let order = PartOrder::new(&shares(&tokens, 0.3), offset);
            let mut counted = vec![0u64; tokens.len()];
            (0..rows).for_each(|row| counted[order.part(row)] += 1);
            prop_assert_eq!(&order.all_rows_before(rows), &counted);
            for (part, count) in counted.into_iter().enumerate() {
                prop_assert_eq!(order.rows_before(rows, part), count);
            }
        }

        /// What makes the shares hold over any window and not only in expectation.
        #[test]
        fn any_window_holds_its_share(
            tokens in prop::collection::vec(1u64..1_000_000, 2..40), offset: u64, start in 0u64..1 << 40, rows in 1u64..1 << 30,
        ) {
            let units = shares(&tokens, 0.3);
            let order = PartOrder::new(&units, offset);
            for (part, units) in units.iter().enumerate() {
                let found = order.rows_before(start + rows, part) - order.rows_before(start, part);
                let due = *units as f64 / ONE as f64 * rows as f64;
                // The golden ratio's discrepancy is below 0.5·log2(rows) + 2 for one interval; 30 bits of rows.
                prop_assert!((found as f64 - due).abs() < 17.0, "{} rows of {due}", found);
            }
        }
    }
}
