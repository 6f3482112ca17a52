//! Products of small bf16 matrices with f32 sums, on processors whose vectors multiply pairs of bf16 (AVX512-BF16): twice the
//! speed of f32. What is summed over lies in pairs, two bf16 in a u32, the first in its lower half.

use half::bf16;

use super::Into;

/// Rows and columns that are computed at once: 16 sums of 16 lanes stay in registers.
pub const ROWS: usize = 8;
pub const COLUMNS: usize = 32;

/// Whether this processor has such vectors.
pub fn are_there() -> bool {
    #[cfg(target_arch = "x86_64")]
    let there = is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bf16");
    #[cfg(not(target_arch = "x86_64"))]
    let there = false;
    there
}

pub fn pair(first: bf16, second: bf16) -> u32 {
    u32::from(first.to_bits()) | u32::from(second.to_bits()) << 16
}

/// The bf16 that pairs are made of, in order: on the processors that have such vectors the lower half lies first.
pub fn halves_of(pairs: &mut [u32]) -> &mut [bf16] {
    bytemuck::cast_slice_mut(pairs)
}

/// Rounds a row to bf16, to nearest and ties to even; neighbours make pairs. As many as [`COLUMNS`], or a multiple.
///
/// # Panics
/// Where the processor has no such vectors, or the lengths do not fit.
pub fn pair_along(pairs: &mut [u32], row: &[f32]) {
    assert!(are_there(), "asked before");
    assert!(
        row.len().is_multiple_of(COLUMNS) && 2 * pairs.len() == row.len(),
        "rows come in {COLUMNS}s"
    );
    // SAFETY: the processor has these vectors.
    #[cfg(target_arch = "x86_64")]
    unsafe {
        along(pairs, row)
    };
}

/// Rounds two rows to bf16 as [`pair_along`] does; what stands one above the other makes a pair.
///
/// # Panics
/// Where the processor has no such vectors, or the lengths do not fit.
pub fn pair_across(pairs: &mut [u32], upper: &[f32], lower: &[f32]) {
    assert!(are_there(), "asked before");
    let length = pairs.len();
    assert!(
        length.is_multiple_of(COLUMNS) && [upper.len(), lower.len()] == [length; 2],
        "rows come in {COLUMNS}s"
    );
    // SAFETY: the processor has these vectors.
    #[cfg(target_arch = "x86_64")]
    unsafe {
        across(pairs, upper, lower)
    };
}

/// # Safety
/// The processor has these vectors.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn along(pairs: &mut [u32], row: &[f32]) {
    use std::arch::x86_64::*;

    for (pairs, row) in pairs.chunks_exact_mut(16).zip(row.chunks_exact(32)) {
        // SAFETY: 32 values are read and 16 pairs written, as many as the chunks have; bits are bits.
        unsafe {
            let [first, second] = [0, 16].map(|at| _mm512_loadu_ps(row.as_ptr().add(at)));
            let both = std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(second, first));
            _mm512_storeu_si512(pairs.as_mut_ptr().cast(), both);
        }
    }
}

/// # Safety
/// The processor has these vectors.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn across(pairs: &mut [u32], upper: &[f32], lower: &[f32]) {
    use std::arch::x86_64::*;

    let rows = upper.chunks_exact(16).zip(lower.chunks_exact(16));
    for (pairs, (upper, lower)) in pairs.chunks_exact_mut(16).zip(rows) {
        // SAFETY: 16 values of each row are read and 16 pairs written, as many as the chunks have; bits are bits.
        unsafe {
            let [upper, lower] = [upper, lower].map(|row| {
                let halves = _mm512_cvtneps_pbh(_mm512_loadu_ps(row.as_ptr()));
                _mm512_cvtepu16_epi32(std::mem::transmute::<__m256bh, __m256i>(halves))
            });
            let both = _mm512_or_si512(upper, _mm512_slli_epi32::<16>(lower));
            _mm512_storeu_si512(pairs.as_mut_ptr().cast(), both);
        }
    }
}

/// The left operand, [rows, pairs] with any strides. Its rows are a multiple of [`ROWS`].
#[derive(Clone, Copy)]
pub struct Left<'a> {
    pairs: &'a [u32],
    rows: usize,
    count: usize,
    row_stride: usize,
    pair_stride: usize,
}

impl<'a> Left<'a> {
    /// Row by row, `count` pairs each, one row behind the other.
    pub fn rows(pairs: &'a [u32], rows: usize, count: usize) -> Left<'a> {
        Left::new(pairs, (rows, count), (count, 1))
    }

    /// Row by row, the first `count` pairs of each; rows begin `stride` pairs apart.
    pub fn strided_rows(pairs: &'a [u32], rows: usize, count: usize, stride: usize) -> Left<'a> {
        Left::new(pairs, (rows, count), (stride, 1))
    }

    /// Pair by pair: the transpose of [count, rows].
    pub fn columns(pairs: &'a [u32], rows: usize, count: usize) -> Left<'a> {
        Left::new(pairs, (rows, count), (1, rows))
    }

    fn new(pairs: &'a [u32], (rows, count): (usize, usize), (row_stride, pair_stride): (usize, usize)) -> Left<'a> {
        assert!(
            rows > 0 && rows.is_multiple_of(ROWS) && count > 0,
            "rows come in {ROWS}s"
        );
        let reach = (rows - 1) * row_stride + (count - 1) * pair_stride + 1;
        assert!(reach <= pairs.len(), "a matrix lies within its slice");
        Left {
            pairs,
            rows,
            count,
            row_stride,
            pair_stride,
        }
    }
}

/// The right operand, [pairs, columns] in panels of [`COLUMNS`]: all pairs of the first columns, then of the next.
#[derive(Default)]
pub struct Right {
    panels: Vec<u32>,
    /// Pairs in a panel.
    count: usize,
}

impl Right {
    /// From rows of which consecutive elements are summed over: the transpose of `rows`, whose number is padded with zeros.
    pub fn transposed<'a>(&mut self, rows: impl ExactSizeIterator<Item = &'a [bf16]>, width: usize) {
        self.clear(rows.len(), width.div_ceil(2));
        for (column, row) in rows.enumerate() {
            let panel = column / COLUMNS * self.count * COLUMNS + column % COLUMNS;
            for (index, two) in row.chunks(2).enumerate() {
                self.panels[panel + index * COLUMNS] = pair(two[0], *two.get(1).unwrap_or(&bf16::ZERO));
            }
        }
    }

    /// From rows that are summed over, two make the pairs; their width is padded with zeros.
    pub fn stacked<'a>(&mut self, rows: impl ExactSizeIterator<Item = &'a [bf16]>, width: usize) {
        self.clear(width, rows.len().div_ceil(2));
        let mut rows = rows;
        for index in 0..self.count {
            let (upper, lower) = (rows.next().unwrap_or_default(), rows.next().unwrap_or_default());
            for (panel, upper) in upper.chunks(COLUMNS).enumerate() {
                let to = &mut self.panels[(panel * self.count + index) * COLUMNS..][..upper.len()];
                match lower.get(panel * COLUMNS..) {
                    Some(lower) if !lower.is_empty() => {
                        for ((to, upper), lower) in to.iter_mut().zip(upper).zip(lower) {
                            *to = pair(*upper, *lower);
                        }
                    }
                    _ => to
                        .iter_mut()
                        .zip(upper)
                        .for_each(|(to, upper)| *to = pair(*upper, bf16::ZERO)),
                }
            }
        }
    }

    /// Pairs that a product may sum over.
    pub fn count(&self) -> usize {
        self.count
    }

    fn clear(&mut self, columns: usize, count: usize) {
        self.count = count;
        self.panels.clear();
        self.panels.resize(columns.div_ceil(COLUMNS) * COLUMNS * count, 0);
    }
}

/// `scale` · `a` · the first `columns` columns of `b`, of whose pairs as many count as `a` has, on this thread. `columns` is a
/// multiple of [`COLUMNS`].
///
/// # Panics
/// Where the processor has no such vectors, or a matrix is smaller than what is asked of it.
pub fn product(a: Left, b: &Right, columns: usize, scale: f32, into: Into) {
    assert!(are_there(), "asked before");
    assert!(
        columns.is_multiple_of(COLUMNS) && a.count <= b.count,
        "b has what is multiplied"
    );
    assert!(columns * b.count <= b.panels.len(), "b has these columns");
    let Into { values, stride, add } = into;
    assert!(
        columns <= stride && (a.rows - 1) * stride + columns <= values.len(),
        "a matrix lies within its slice"
    );
    #[cfg(target_arch = "x86_64")]
    for (panel, first) in b
        .panels
        .chunks_exact(b.count * COLUMNS)
        .zip((0..columns).step_by(COLUMNS))
    {
        for row in (0..a.rows).step_by(ROWS) {
            // SAFETY: the processor has these vectors; `Left::new` has checked that rows `row` to `row + ROWS` with `count` pairs
            // lie within the slice, the panel has at least as many pairs, and the lines above checked what is written.
            unsafe {
                tile(
                    a.pairs.as_ptr().add(row * a.row_stride),
                    (a.row_stride, a.pair_stride),
                    panel.as_ptr(),
                    a.count,
                    scale,
                    values.as_mut_ptr().add(row * stride + first),
                    stride,
                    add,
                );
            }
        }
    }
}

/// One tile of [`ROWS`] rows and [`COLUMNS`] columns.
///
/// # Safety
/// Every pair that the strides reach, `count` · [`COLUMNS`] pairs of the panel and the tile itself can be read or written.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bf16")]
#[expect(clippy::too_many_arguments, reason = "a tile's whole description, used once")]
unsafe fn tile(
    a: *const u32,
    (row_stride, pair_stride): (usize, usize),
    panel: *const u32,
    count: usize,
    scale: f32,
    into: *mut f32,
    stride: usize,
    add: bool,
) {
    use std::arch::x86_64::*;

    let mut sums = [[_mm512_setzero_ps(); 2]; ROWS];
    for index in 0..count {
        // SAFETY: the caller's promise, here and below.
        let b = unsafe {
            let b = panel.add(index * COLUMNS);
            [_mm512_loadu_si512(b.cast()), _mm512_loadu_si512(b.add(16).cast())]
        };
        for (row, sums) in sums.iter_mut().enumerate() {
            // SAFETY: bits are bits; as above.
            unsafe {
                let a = _mm512_set1_epi32(*a.add(row * row_stride + index * pair_stride) as i32);
                sums[0] = _mm512_dpbf16_ps(
                    sums[0],
                    std::mem::transmute::<__m512i, __m512bh>(a),
                    std::mem::transmute::<__m512i, __m512bh>(b[0]),
                );
                sums[1] = _mm512_dpbf16_ps(
                    sums[1],
                    std::mem::transmute::<__m512i, __m512bh>(a),
                    std::mem::transmute::<__m512i, __m512bh>(b[1]),
                );
            }
        }
    }
    let scale = _mm512_set1_ps(scale);
    for (row, sums) in sums.iter().enumerate() {
        for (half, sum) in sums.iter().enumerate() {
            // SAFETY: as above.
            unsafe {
                let into = into.add(row * stride + 16 * half);
                let scaled = _mm512_mul_ps(*sum, scale);
                _mm512_storeu_ps(
                    into,
                    if add {
                        _mm512_add_ps(_mm512_loadu_ps(into), scaled)
                    } else {
                        scaled
                    },
                );
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_rounded_into_pairs_as_one_value_is() {
        if !are_there() {
            eprintln!("SKIPPED: this processor has no AVX512-BF16");
            return;
        }
        // Ties, either way, and what is between.
        let value = |index: usize| (1.0 + index as f32 / 512.0) * if index.is_multiple_of(3) { -1.0 } else { 1e-3 };
        let [upper, lower] = [0, 64].map(|from| -> Vec<f32> { (from..from + 64).map(value).collect() });
        let both = |first: f32, second: f32| pair(bf16::from_f32(first), bf16::from_f32(second));
        let (mut along, mut across) = ([0; 32], [0; 64]);
        pair_along(&mut along, &upper);
        pair_across(&mut across, &upper, &lower);
        let expected: Vec<u32> = upper.chunks(2).map(|two| both(two[0], two[1])).collect();
        assert_eq!(along[..], expected);
        let expected: Vec<u32> = upper
            .iter()
            .zip(&lower)
            .map(|(upper, lower)| both(*upper, *lower))
            .collect();
        assert_eq!(across[..], expected);
        assert_eq!(halves_of(&mut along)[1], bf16::from_f32(upper[1]));
    }

    /// Small whole numbers: products and sums are exact.
    fn numbers(rows: usize, width: usize) -> Vec<bf16> {
        let value = |index: usize| bf16::from_f32((index * 7 % 11) as f32 - 5.0);
        (0..rows * width).map(value).collect()
    }

    #[test]
    fn a_product_of_pairs_is_the_formula_for_both_kinds_of_operands() {
        if !are_there() {
            eprintln!("SKIPPED: this processor has no AVX512-BF16");
            return;
        }
        for (rows, width, columns) in [(8, 64, 32), (16, 5, 64), (24, 2, 40)] {
            let (a, b) = (numbers(rows, width), numbers(columns, width));
            let exact = |row: usize, column: usize| -> f32 {
                let both = a[row * width..(row + 1) * width].iter().zip(&b[column * width..]);
                both.map(|(a, b)| a.to_f32() * b.to_f32()).sum()
            };
            let count = width.div_ceil(2);
            let of_row = |row: &[bf16]| -> Vec<u32> {
                row.chunks(2)
                    .map(|two| pair(two[0], *two.get(1).unwrap_or(&bf16::ZERO)))
                    .collect()
            };
            let by_rows: Vec<u32> = a.chunks(width).flat_map(of_row).collect();
            let by_columns: Vec<u32> = (0..count)
                .flat_map(|p| (0..rows).map(move |row| (row, p)))
                .map(|(row, p)| by_rows[row * count + p])
                .collect();
            let mut transposed = Right::default();
            transposed.transposed(b.chunks(width), width);
            // The same operand from its transpose.
            let b_t: Vec<bf16> = (0..width * columns)
                .map(|index| b[index % columns * width + index / columns])
                .collect();
            let mut stacked = Right::default();
            stacked.stacked(b_t.chunks(columns), columns);
            let padded = columns.next_multiple_of(COLUMNS);
            for left in [
                Left::rows(&by_rows, rows, count),
                Left::columns(&by_columns, rows, count),
            ] {
                for right in [&transposed, &stacked] {
                    let mut y = vec![1.0f32; rows * padded];
                    for add in [false, true] {
                        product(
                            left,
                            right,
                            padded,
                            0.5,
                            Into {
                                values: &mut y,
                                stride: padded,
                                add,
                            },
                        );
                    }
                    for (index, y) in y.iter().enumerate().filter(|(index, _)| index % padded < columns) {
                        assert_eq!(*y, exact(index / padded, index % padded), "{rows} {width} {columns}");
                    }
                }
            }
        }
    }
}
