//! What attention does between two products of pairs, a vector at a time and in one pass: scores become probabilities or their
//! gradient and are rounded to bf16 where the next product reads them.
//!
//! Scores are powers of two here, log₂ e folded into the scale of the product that made them: 2ˣ needs no more than its
//! exponent and a polynomial.

use half::bf16;

use super::{COLUMNS, ROWS, are_there};

/// One row of scores in panels becomes 2^(score − largest) in bf16 from key 0 up to `seen`, and 0 from there on: row `row` of a left
/// operand, which `p` [keys / 2] is. Returns the largest score and the sum of all powers.
///
/// # Panics
/// Where the processor has no such vectors, or the lengths do not fit.
pub fn powers(p: &mut [u32], scores: &[f32], (row, rows): (usize, usize), seen: usize) -> (f32, f32) {
    let keys = 2 * p.len();
    check(scores, (row, rows), keys);
    assert!(0 < seen && seen <= keys, "a query sees itself");
    // SAFETY: the processor has these vectors, and the lines above checked what is read and written.
    #[cfg(target_arch = "x86_64")]
    unsafe {
        wide::powers(p, scores, (row, rows), seen)
    }
    #[cfg(not(target_arch = "x86_64"))]
    unreachable!("asked before")
}

/// What two neighbouring queries bring to [`derivatives`]; of one that pads a block `seen` is 0.
#[derive(Clone, Copy, Default)]
pub struct Query {
    /// Keys that it sees.
    pub seen: usize,
    /// log₂ Σ 2^score.
    pub log_sum: f32,
    /// d_out · out.
    pub row_sum: f32,
}

/// Where probabilities and their gradient go, as pairs.
pub struct Derivatives<'a> {
    /// Pᵀ as a left operand: what stands one above the other makes a pair.
    pub p_across: &'a mut [u32],
    pub d_across: &'a mut [u32],
    /// d_scores as a left operand: neighbours make a pair.
    pub d_along: &'a mut [u32],
}

/// Rows 2·`two` and the next of scores and of d_p, both in panels of `rows` rows and for `keys` keys in all, become P = 2^(score − log_sum)
/// and d_scores = P · (d_p − row_sum), 0 where a query does not see the key.
///
/// # Panics
/// Where the processor has no such vectors, or the lengths do not fit.
pub fn derivatives(
    into: &mut Derivatives,
    [scores, d_p]: [&[f32]; 2],
    (two, rows): (usize, usize),
    keys: usize,
    queries: [Query; 2],
) {
    for panels in [scores, d_p] {
        check(panels, (2 * two + 1, rows), keys);
    }
    let across = rows / 2 * keys;
    assert!(
        rows.is_multiple_of(2)
            && into.p_across.len() >= across
            && into.d_across.len() >= across
            && into.d_along.len() >= across
            && queries.iter().all(|query| query.seen <= keys),
        "there is room for {rows} rows of {keys}"
    );
    // SAFETY: the processor has these vectors, and the lines above checked what is read and written.
    #[cfg(target_arch = "x86_64")]
    unsafe {
        wide::derivatives(into, [scores, d_p], (two, rows), keys, queries);
    }
}

/// Σ a · b of bf16, with f32 sums.
///
/// # Panics
/// Where the processor has no such vectors, or the lengths differ.
pub fn dot(a: &[bf16], b: &[bf16]) -> f32 {
    assert!(are_there(), "asked before");
    assert_eq!(a.len(), b.len(), "a product of equals");
    // SAFETY: the processor has these vectors.
    #[cfg(target_arch = "x86_64")]
    unsafe {
        wide::dot(a, b)
    }
    #[cfg(not(target_arch = "x86_64"))]
    unreachable!("asked before")
}

/// `scale` · the first values of `row`, rounded to nearest and ties to even.
///
/// # Panics
/// Where the processor has no such vectors, or `row` is shorter than what it fills.
pub fn round(rounded: &mut [bf16], row: &[f32], scale: f32) {
    assert!(are_there(), "asked before");
    assert!(rounded.len() <= row.len(), "a row has what is rounded");
    // SAFETY: the processor has these vectors.
    #[cfg(target_arch = "x86_64")]
    unsafe {
        wide::round(rounded, row, scale);
    }
}

fn check(panels: &[f32], (row, rows): (usize, usize), keys: usize) {
    assert!(are_there(), "asked before");
    assert!(
        keys.is_multiple_of(COLUMNS) && row < rows && panels.len() >= rows * keys,
        "row {row} of {rows} with {keys} keys lies within the panels"
    );
}

#[cfg(target_arch = "x86_64")]
mod wide {
    use std::arch::x86_64::*;
    use std::f32::consts::LN_2;

    use half::bf16;

    use super::super::vectors::{self, half, multiply, rounded, zipped};
    use super::{COLUMNS, Derivatives, Query, ROWS};

    /// Lanes of a vector of f32.
    const LANES: usize = 16;

    /// ln 2 to the power of k, by k!: 2ˣ = Σ cₖ xᵏ. Between −½ and ½ what is left out is 1.2e-7.
    const SERIES: [f32; 7] = {
        let mut series = [1.0; 7];
        let mut k = 1;
        while k < 7 {
            series[k] = series[k - 1] * LN_2 / k as f32;
            k += 1;
        }
        series
    };

    /// 2ˣ.
    #[target_feature(enable = "avx512f")]
    fn power(x: __m512) -> __m512 {
        let whole = _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(x);
        let rest = _mm512_sub_ps(x, whole);
        let mut sum = _mm512_set1_ps(SERIES[6]);
        for coefficient in SERIES[..6].iter().rev() {
            sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(*coefficient));
        }
        _mm512_scalef_ps(sum, whole)
    }

    /// Which of the lanes from `at` on come before `end`.
    fn before(end: usize, at: usize) -> __mmask16 {
        vectors::before::<LANES>(end, at) as __mmask16
    }

    /// # Safety
    /// The processor has these vectors; the panels of `scores` have `rows` rows and 2 · `p.len()` columns.
    #[target_feature(enable = "avx512f,avx512bf16")]
    pub unsafe fn powers(p: &mut [u32], scores: &[f32], (row, rows): (usize, usize), seen: usize) -> (f32, f32) {
        let load = |at: usize| {
            let panel = at / COLUMNS * rows + row;
            // SAFETY: the caller's promise.
            unsafe { _mm512_loadu_ps(scores.as_ptr().add(panel * COLUMNS + at % COLUMNS)) }
        };
        let least = _mm512_set1_ps(f32::NEG_INFINITY);
        let mut most = least;
        for at in (0..seen).step_by(LANES) {
            most = _mm512_max_ps(most, _mm512_mask_mov_ps(least, before(seen, at), load(at)));
        }
        let largest = _mm512_reduce_max_ps(most);
        let most = _mm512_set1_ps(largest);
        let mut total = _mm512_setzero_ps();
        for (p, at) in p.chunks_exact_mut(LANES).zip((0..).step_by(COLUMNS)) {
            let [first, second] = [at, at + LANES].map(|at| match before(seen, at) {
                0 => _mm512_setzero_ps(),
                mask => _mm512_maskz_mov_ps(mask, power(_mm512_sub_ps(load(at), most))),
            });
            total = _mm512_add_ps(total, _mm512_add_ps(first, second));
            // SAFETY: a chunk has as many pairs as a vector.
            unsafe { _mm512_storeu_si512(p.as_mut_ptr().cast(), rounded(first, second)) };
        }
        (largest, _mm512_reduce_add_ps(total))
    }

    /// # Safety
    /// The processor has these vectors; the panels have `rows` rows and `keys` columns, what is written half as many pairs.
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    pub unsafe fn derivatives(
        into: &mut Derivatives,
        [scores, d_p]: [&[f32]; 2],
        (two, rows): (usize, usize),
        keys: usize,
        queries: [Query; 2],
    ) {
        let across = |to: &mut [u32], at: usize, upper: __m512, lower: __m512| {
            let pairs = zipped(upper, lower);
            // SAFETY: the caller's promise: of each tile of keys the pairs of all queries lie together.
            unsafe {
                let to = to.as_mut_ptr().add(at * (rows / 2) + two * ROWS);
                _mm256_storeu_si256(to.cast(), _mm512_castsi512_si256(pairs));
                let next = to.add(ROWS * (rows / 2));
                _mm256_storeu_si256(next.cast(), _mm512_extracti64x4_epi64::<1>(pairs));
            }
        };
        let [log_sums, row_sums] =
            [queries.map(|it| it.log_sum), queries.map(|it| it.row_sum)].map(|x| x.map(|x| _mm512_set1_ps(x)));
        for at in (0..keys).step_by(COLUMNS) {
            let panel = (at / COLUMNS * rows + 2 * two) * COLUMNS;
            let (mut p, mut d) = ([[_mm512_setzero_ps(); 2]; 2], [[_mm512_setzero_ps(); 2]; 2]);
            for query in 0..2 {
                for half in 0..2 {
                    let mask = before(queries[query].seen, at + half * LANES);
                    if mask == 0 {
                        continue;
                    }
                    // SAFETY: the caller's promise.
                    let [score, d_p] = unsafe {
                        let here = panel + query * COLUMNS + half * LANES;
                        [scores, d_p].map(|x| _mm512_loadu_ps(x.as_ptr().add(here)))
                    };
                    p[query][half] = _mm512_maskz_mov_ps(mask, power(_mm512_sub_ps(score, log_sums[query])));
                    let off = _mm512_sub_ps(d_p, row_sums[query]);
                    d[query][half] = _mm512_maskz_mul_ps(mask, p[query][half], off);
                }
                // SAFETY: the caller's promise.
                unsafe {
                    let to = (2 * two + query) * (keys / 2) + at / 2;
                    let both = rounded(d[query][0], d[query][1]);
                    _mm512_storeu_si512(into.d_along.as_mut_ptr().add(to).cast(), both);
                }
            }
            for half in 0..2 {
                across(into.p_across, at + half * LANES, p[0][half], p[1][half]);
                across(into.d_across, at + half * LANES, d[0][half], d[1][half]);
            }
        }
    }

    /// # Safety
    /// The processor has these vectors.
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    pub unsafe fn dot(a: &[bf16], b: &[bf16]) -> f32 {
        let mut sum = _mm512_setzero_ps();
        for at in (0..a.len()).step_by(2 * LANES) {
            let mask = vectors::before::<{ 2 * LANES }>(a.len(), at);
            // SAFETY: only what the mask names is read.
            let [a, b] = [a, b].map(|x| unsafe { _mm512_maskz_loadu_epi16(mask, x.as_ptr().add(at).cast()) });
            sum = multiply(sum, a, b);
        }
        _mm512_reduce_add_ps(sum)
    }

    /// # Safety
    /// The processor has these vectors, and `row` is as long as `to`.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    pub unsafe fn round(to: &mut [bf16], row: &[f32], scale: f32) {
        let scale = _mm512_set1_ps(scale);
        for at in (0..to.len()).step_by(LANES) {
            let mask = before(to.len(), at);
            // SAFETY: only what the mask names is read and written.
            unsafe {
                let x = _mm512_maskz_loadu_ps(mask, row.as_ptr().add(at));
                let halves = half(_mm512_mul_ps(x, scale));
                _mm256_mask_storeu_epi16(to.as_mut_ptr().add(at).cast(), mask, halves);
            }
        }
    }
}
