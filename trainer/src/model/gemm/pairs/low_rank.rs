//! Products with a matrix of up to eight rows, as LoRA has: too thin for a GEMM's tiles, so that memory sets the pace. Each
//! reads a wide operand once, where it lies.

use half::bf16;

use super::{are_there, pair};

/// Rows of a thin matrix. One of fewer has zeros for the rest.
pub const RANK: usize = 8;
/// Columns that a vector holds.
const CHUNK: usize = 32;

/// A matrix [rank, width], laid out for both products with it.
pub struct Thin {
    width: usize,
    /// Row by row, [`RANK`] of them.
    rows: Vec<bf16>,
    /// Of each [`CHUNK`] of columns the pairs of rows, each as the even columns and then the odd ones: what bf16 become when a
    /// vector is widened by shifting and masking.
    pairs: Vec<u32>,
}

/// Some positions in the low rank: [n, rank].
#[derive(Default)]
pub struct Low {
    n: usize,
    /// Position by position; two ranks make a pair.
    along: Vec<u32>,
    /// Two positions make a pair, and zeros what an odd number lacks.
    across: Vec<u32>,
}

impl Thin {
    /// From `value(row, column)` of `rank` rows.
    ///
    /// # Panics
    /// Where there are more rows than [`RANK`].
    pub fn new(rank: usize, width: usize, value: impl Fn(usize, usize) -> bf16) -> Thin {
        assert!(rank <= RANK, "a thin matrix has up to {RANK} rows");
        let mut rows = vec![bf16::ZERO; RANK * width];
        for (row, values) in rows.chunks_exact_mut(width.max(1)).take(rank).enumerate() {
            for (column, to) in values.iter_mut().enumerate() {
                *to = value(row, column);
            }
        }
        let mut pairs = vec![0; width.div_ceil(CHUNK) * CHUNK * RANK / 2];
        for (index, pairs) in pairs.chunks_exact_mut(CHUNK * RANK / 2).enumerate() {
            let columns = index * CHUNK..width.min((index + 1) * CHUNK);
            for (two, pairs) in pairs.chunks_exact_mut(CHUNK).enumerate() {
                let [upper, lower] = [2 * two, 2 * two + 1].map(|row| &rows[row * width..][columns.clone()]);
                for (column, (upper, lower)) in upper.iter().zip(lower).enumerate() {
                    pairs[column % 2 * CHUNK / 2 + column / 2] = pair(*upper, *lower);
                }
            }
        }
        Thin { width, rows, pairs }
    }

    /// `low` = `scale` · x selfᵀ, of x [n, width].
    ///
    /// # Panics
    /// Where the processor has no such vectors, or x is no such matrix.
    pub fn dots(&self, x: &[bf16], scale: f32, low: &mut Low) {
        assert!(are_there(), "asked before");
        assert!(x.len().is_multiple_of(self.width), "whole rows");
        low.n = x.len() / self.width;
        low.along.resize(low.n.next_multiple_of(2) * RANK / 2, 0);
        low.across.resize(low.n.div_ceil(2) * RANK, 0);
        // SAFETY: the processor has these vectors, and the lines above checked what is read and made room for what is written.
        #[cfg(target_arch = "x86_64")]
        unsafe {
            wide::dots(self, x, scale, low);
        }
    }

    /// y += `low` · self, of y [n, width].
    ///
    /// # Panics
    /// Where the processor has no such vectors, or y is no such matrix.
    pub fn add_product(&self, low: &Low, y: &mut [bf16]) {
        assert!(are_there(), "asked before");
        assert_eq!(y.len(), low.n * self.width, "a row a position");
        // SAFETY: the processor has these vectors, and the line above checked what is read and written.
        #[cfg(target_arch = "x86_64")]
        unsafe {
            wide::add_product(self, low, y);
        }
    }
}

impl Low {
    /// `sum` [rank, width] += selfᵀ x, of x [n, width].
    ///
    /// # Panics
    /// Where the processor has no such vectors, or a matrix has another shape.
    pub fn add_gradient(&self, x: &[bf16], width: usize, sum: &mut [f32]) {
        assert!(are_there(), "asked before");
        assert!(
            x.len() == self.n * width && sum.len() == RANK * width,
            "a row a position"
        );
        // SAFETY: the processor has these vectors, and the lines above checked what is read and written.
        #[cfg(target_arch = "x86_64")]
        unsafe {
            wide::add_gradient(self, x, width, sum);
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod wide {
    use std::arch::x86_64::*;

    use half::bf16;

    use super::super::vectors::{before, half, multiply, zipped};
    use super::{CHUNK, Low, RANK, Thin};

    /// Positions that are multiplied at once in [`add_product`]: a chunk of the thin matrix is read once for all of them.
    const ROWS: usize = 4;

    /// Lane i is the sum of vector i's lanes.
    #[target_feature(enable = "avx512f")]
    fn sums(v: [__m512; 16]) -> __m512 {
        let mut twos = [_mm512_setzero_ps(); 8];
        for (i, two) in twos.iter_mut().enumerate() {
            let (a, b) = (v[2 * i], v[2 * i + 1]);
            *two = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
        }
        // In each quarter of a vector now the sums of four.
        let mut fours = [_mm512_setzero_ps(); 4];
        for (i, four) in fours.iter_mut().enumerate() {
            let [a, b] = [twos[2 * i], twos[2 * i + 1]].map(|x| _mm512_castps_pd(x));
            let [low, high] = [_mm512_unpacklo_pd(a, b), _mm512_unpackhi_pd(a, b)].map(|x| _mm512_castpd_ps(x));
            *four = _mm512_add_ps(low, high);
        }
        let quarters = |a: __m512, b: __m512| {
            let (even, odd) = (_mm512_shuffle_f32x4::<0x88>(a, b), _mm512_shuffle_f32x4::<0xdd>(a, b));
            _mm512_add_ps(even, odd)
        };
        quarters(quarters(fours[0], fours[1]), quarters(fours[2], fours[3]))
    }

    /// # Safety
    /// The processor has these vectors; x has `low.n` rows of `thin.width`, and `low` has room for them.
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    pub unsafe fn dots(thin: &Thin, x: &[bf16], scale: f32, low: &mut Low) {
        let width = thin.width;
        let scale = _mm512_set1_ps(scale);
        let halves = low.along.chunks_exact_mut(RANK).zip(low.across.chunks_exact_mut(RANK));
        for (two, (along, across)) in halves.enumerate() {
            let first = 2 * two * width;
            let is_whole = 2 * two + 1 < low.n;
            let second = first + if is_whole { width } else { 0 };
            let mut products = [_mm512_setzero_ps(); 2 * RANK];
            for at in (0..width).step_by(CHUNK) {
                let mask = before::<CHUNK>(width, at);
                // SAFETY: only what the mask names is read.
                let load = |values: &[bf16], from: usize| unsafe {
                    _mm512_maskz_loadu_epi16(mask, values.as_ptr().add(from + at).cast())
                };
                let xs = [load(x, first), load(x, second)];
                for rank in 0..RANK {
                    let a = load(&thin.rows, rank * width);
                    for (position, x) in xs.iter().enumerate() {
                        let product = &mut products[position * RANK + rank];
                        *product = multiply(*product, a, *x);
                    }
                }
            }
            let there = if is_whole { !0 } else { (1 << RANK) - 1 };
            let both = half(_mm512_maskz_mul_ps(there, sums(products), scale));
            // SAFETY: chunks have eight pairs.
            unsafe {
                _mm256_storeu_si256(along.as_mut_ptr().cast(), both);
                let [upper, lower] = [_mm256_castsi256_si128(both), _mm256_extracti128_si256::<1>(both)];
                let to = across.as_mut_ptr().cast::<__m128i>();
                _mm_storeu_si128(to, _mm_unpacklo_epi16(upper, lower));
                _mm_storeu_si128(to.add(1), _mm_unpackhi_epi16(upper, lower));
            }
        }
    }

    /// # Safety
    /// The processor has these vectors; y has `low.n` rows of `thin.width`.
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    pub unsafe fn add_product(thin: &Thin, low: &Low, y: &mut [bf16]) {
        let width = thin.width;
        let rows = low
            .along
            .chunks(ROWS * RANK / 2)
            .zip(y.chunks_mut((ROWS * width).max(1)));
        for (pairs, y) in rows {
            // SAFETY: the caller's promise, of these rows.
            unsafe {
                match y.len() / width {
                    ROWS => some::<ROWS>(thin, pairs, y),
                    count => {
                        (0..count).for_each(|row| some::<1>(thin, &pairs[row * RANK / 2..], &mut y[row * width..]))
                    }
                }
            }
        }
    }

    /// # Safety
    /// The processor has these vectors; y has at least `N` rows of `thin.width`, `pairs` as many of four.
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    unsafe fn some<const N: usize>(thin: &Thin, pairs: &[u32], y: &mut [bf16]) {
        let upper = _mm512_set1_epi32(0xffff_0000u32 as i32);
        for (at, thin_pairs) in (0..thin.width)
            .step_by(CHUNK)
            .zip(thin.pairs.chunks_exact(CHUNK * RANK / 2))
        {
            let mask = before::<CHUNK>(thin.width, at);
            let mut sums = [[_mm512_setzero_ps(); 2]; N];
            for (row, sums) in sums.iter_mut().enumerate() {
                // SAFETY: only what the mask names is read.
                let y = unsafe { _mm512_maskz_loadu_epi16(mask, y.as_ptr().add(row * thin.width + at).cast()) };
                *sums = [_mm512_slli_epi32::<16>(y), _mm512_and_si512(y, upper)].map(|x| _mm512_castsi512_ps(x));
            }
            for two in 0..RANK / 2 {
                // SAFETY: a chunk has as many pairs.
                let [even, odd] = [0, 16]
                    .map(|half| unsafe { _mm512_loadu_si512(thin_pairs.as_ptr().add(two * CHUNK + half).cast()) });
                for (row, [even_sum, odd_sum]) in sums.iter_mut().enumerate() {
                    let low = _mm512_set1_epi32(pairs[row * RANK / 2 + two] as i32);
                    *even_sum = multiply(*even_sum, low, even);
                    *odd_sum = multiply(*odd_sum, low, odd);
                }
            }
            for (row, [even, odd]) in sums.into_iter().enumerate() {
                let both = zipped(even, odd);
                // SAFETY: only what the mask names is written.
                unsafe {
                    _mm512_mask_storeu_epi16(y.as_mut_ptr().add(row * thin.width + at).cast(), mask, both);
                }
            }
        }
    }

    /// # Safety
    /// The processor has these vectors; x has `low.n` rows of `width`, `sum` has eight.
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    pub unsafe fn add_gradient(low: &Low, x: &[bf16], width: usize, sum: &mut [f32]) {
        // Interleaving two rows within quarters of a vector leaves columns 0–3, 8–11, 16–19, 24–27 and the others between.
        let [first, second] = [0, 16].map(|from| {
            let mut lanes = [0i32; 16];
            for (index, lane) in lanes.iter_mut().enumerate() {
                let column = from + index as i32;
                *lane = column / 8 * 4 + column % 4 + if column % 8 < 4 { 0 } else { 16 };
            }
            // SAFETY: as many lanes as a vector has.
            unsafe { _mm512_loadu_si512(lanes.as_ptr().cast()) }
        });
        for at in (0..width).step_by(CHUNK) {
            let mask = before::<CHUNK>(width, at);
            let mut products = [[_mm512_setzero_ps(); 2]; RANK];
            for (two, pairs) in low.across.chunks_exact(RANK).enumerate() {
                // SAFETY: only what the mask names is read.
                let row = |row: usize| match row < low.n {
                    true => unsafe { _mm512_maskz_loadu_epi16(mask, x.as_ptr().add(row * width + at).cast()) },
                    false => _mm512_setzero_si512(),
                };
                let (upper, lower) = (row(2 * two), row(2 * two + 1));
                let both = [_mm512_unpacklo_epi16(upper, lower), _mm512_unpackhi_epi16(upper, lower)];
                for (pair, products) in pairs.iter().zip(&mut products) {
                    let pair = _mm512_set1_epi32(*pair as i32);
                    products[0] = multiply(products[0], pair, both[0]);
                    products[1] = multiply(products[1], pair, both[1]);
                }
            }
            for (rank, [low, high]) in products.into_iter().enumerate() {
                for (half, order) in [first, second].into_iter().enumerate() {
                    let mask = (mask >> (16 * half)) as u16;
                    // SAFETY: only what the mask names is read and written.
                    unsafe {
                        let to = sum.as_mut_ptr().add(rank * width + at + 16 * half);
                        let product = _mm512_permutex2var_ps(low, order, high);
                        _mm512_mask_storeu_ps(to, mask, _mm512_add_ps(_mm512_maskz_loadu_ps(mask, to), product));
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Small whole numbers: products and sums are exact, in bf16 too.
    fn numbers(count: usize, seed: usize) -> Vec<bf16> {
        (0..count)
            .map(|index| bf16::from_f32(((index * 7 + seed) % 5) as f32 - 2.0))
            .collect()
    }

    #[test]
    fn the_three_products_are_the_formulas_at_any_size() {
        if !are_there() {
            eprintln!("SKIPPED: this processor has no AVX512-BF16");
            return;
        }
        for (n, width, rank) in [(1, 32, 8), (9, 40, 8), (6, 7, 3), (4, 96, 5)] {
            let (x, a) = (numbers(n * width, 1), numbers(rank * width, 3));
            let at = |values: &[bf16], index: usize| values[index].to_f32();
            let thin = Thin::new(rank, width, |row, column| a[row * width + column]);
            let mut low = Low::default();
            thin.dots(&x, 0.5, &mut low);
            let exact_low = |position: usize, row: usize| -> f32 {
                let dot = (0..width).map(|column| at(&x, position * width + column) * at(&a, row * width + column));
                bf16::from_f32(0.5 * dot.sum::<f32>()).to_f32()
            };
            let mut y = numbers(n * width, 2);
            let before = y.clone();
            thin.add_product(&low, &mut y);
            let mut sum = vec![1f32; RANK * width];
            low.add_gradient(&x, width, &mut sum);
            for column in 0..width {
                for position in 0..n {
                    let index = position * width + column;
                    let product: f32 = (0..rank)
                        .map(|row| exact_low(position, row) * at(&a, row * width + column))
                        .sum();
                    let expected = bf16::from_f32(before[index].to_f32() + product);
                    assert_eq!(y[index], expected, "{n} × {width}, rank {rank}: position {position}");
                }
                for row in 0..RANK {
                    let product: f32 = (0..n)
                        .filter(|_| row < rank)
                        .map(|position| exact_low(position, row) * at(&x, position * width + column))
                        .sum();
                    assert_eq!(
                        sum[row * width + column],
                        1.0 + product,
                        "{n} × {width}, rank {rank}: row {row}"
                    );
                }
            }
        }
    }
}
