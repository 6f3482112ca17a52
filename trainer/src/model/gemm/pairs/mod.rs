//! Products of small bf16 matrices with f32 sums, on processors whose vectors multiply pairs of bf16 (AVX512-BF16): twice the
//! speed of f32. What is summed over lies in pairs, two bf16 in a u32, the first in its lower half.

pub mod low_rank;
pub mod rows;
#[cfg(target_arch = "x86_64")]
mod vectors;

use half::bf16;

/// Rows and columns that are computed at once: 16 sums of 16 lanes stay in registers.
pub const ROWS: usize = 8;
pub const COLUMNS: usize = 32;

/// Whether this processor has such vectors, and all else that the kernels of this room are compiled for.
pub fn are_there() -> bool {
    #[cfg(target_arch = "x86_64")]
    let there = is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512bf16");
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

/// The left operand, [rows, pairs], whose rows are a multiple of [`ROWS`].
#[derive(Clone, Copy)]
pub struct Left<'a> {
    pairs: &'a [u32],
    rows: usize,
    count: usize,
    /// From a tile's first row to the next tile's, by row.
    step: usize,
    /// Within a tile.
    row_stride: usize,
    pair_stride: usize,
}

impl<'a> Left<'a> {
    /// Row by row, the first `count` pairs of each; rows begin `stride` pairs apart.
    pub fn rows(pairs: &'a [u32], rows: usize, count: usize, stride: usize) -> Left<'a> {
        Left::new(pairs, (rows, count), (stride, stride, 1))
    }

    /// Tile by tile of [`ROWS`] rows, whose first pairs lie side by side, then their second, up to the last of `count`.
    pub fn tiles(pairs: &'a [u32], rows: usize, count: usize) -> Left<'a> {
        Left::new(pairs, (rows, count), (count, 1, ROWS))
    }

    fn new(
        pairs: &'a [u32],
        (rows, count): (usize, usize),
        (step, row_stride, pair_stride): (usize, usize, usize),
    ) -> Left<'a> {
        assert!(
            rows > 0 && rows.is_multiple_of(ROWS) && count > 0,
            "rows come in {ROWS}s"
        );
        let last = (rows - ROWS) * step + (ROWS - 1) * row_stride + (count - 1) * pair_stride;
        assert!(last < pairs.len(), "a matrix lies within its slice");
        Left {
            pairs,
            rows,
            count,
            step,
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

    /// From rows that are summed over, two make the pairs; their width is padded with zeros, as are they to `count` pairs.
    pub fn stacked<'a>(&mut self, mut rows: impl Iterator<Item = &'a [bf16]>, width: usize, count: usize) {
        self.clear(width, count);
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

    fn clear(&mut self, columns: usize, count: usize) {
        self.count = count;
        self.panels.clear();
        self.panels.resize(columns.div_ceil(COLUMNS) * COLUMNS * count, 0);
    }
}

/// What a product is written to, f32.
pub struct Into<'a> {
    values: &'a mut [f32],
    stride: usize,
    /// From one panel of columns to the next.
    panel_stride: usize,
    add: bool,
}

impl<'a> Into<'a> {
    /// Rows of consecutive elements, `stride` apart.
    pub fn rows(values: &'a mut [f32], stride: usize) -> Into<'a> {
        Into {
            values,
            stride,
            panel_stride: COLUMNS,
            add: false,
        }
    }

    /// As [`Into::rows`], and the product is added to what is there.
    pub fn sum(values: &'a mut [f32], stride: usize) -> Into<'a> {
        Into {
            add: true,
            ..Into::rows(values, stride)
        }
    }

    /// `rows` rows of the first [`COLUMNS`] columns one behind the other, then of the next: what is read a row at a time is near, and
    /// neighbouring rows do not fall on the same lines of a cache.
    pub fn panels(values: &'a mut [f32], rows: usize) -> Into<'a> {
        Into {
            values,
            stride: COLUMNS,
            panel_stride: rows * COLUMNS,
            add: false,
        }
    }
}

/// What of a product has to be computed. With causal attention query i of a block sees keys 0 to `first` + i.
#[derive(Clone, Copy)]
pub enum Part {
    #[cfg_attr(
        not(test),
        expect(dead_code, reason = "the formula, which the others are compared with")
    )]
    All,
    /// Rows are queries, columns keys: tiles that no query of theirs sees are left as they are.
    Seen { first: usize },
    /// Rows are queries, sums go over keys: what follows the last key that a tile's queries see is 0.
    OverKeys { first: usize },
    /// Rows are keys, sums go over queries: what precedes the first query that sees one of a tile's keys is 0.
    OverQueries { first: usize },
}

impl Part {
    /// The first row of a panel that begins with this column.
    fn row(self, column: usize) -> usize {
        match self {
            Part::Seen { first } => column.saturating_sub(first) / ROWS * ROWS,
            _ => 0,
        }
    }

    /// Which pairs of `count` the sums of a tile that begins with this row go over.
    fn pairs(self, row: usize, count: usize) -> std::ops::Range<usize> {
        match self {
            Part::OverKeys { first } => 0..(first + row + ROWS).div_ceil(2).min(count),
            Part::OverQueries { first } => (row.saturating_sub(first) / 2).min(count)..count,
            _ => 0..count,
        }
    }
}

/// `scale` · `a` · the first `columns` columns of `b`, of whose pairs as many count as `a` has, on this thread. `columns` is a
/// multiple of [`COLUMNS`].
///
/// # Panics
/// Where the processor has no such vectors, or a matrix is smaller than what is asked of it.
pub fn product(a: Left, b: &Right, columns: usize, scale: f32, part: Part, into: Into) {
    assert!(are_there(), "asked before");
    assert!(
        columns.is_multiple_of(COLUMNS) && a.count <= b.count,
        "b has what is multiplied"
    );
    assert!(columns * b.count <= b.panels.len(), "b has these columns");
    let Into {
        values,
        stride,
        panel_stride,
        add,
    } = into;
    let panels = columns / COLUMNS;
    assert!(
        COLUMNS <= stride && panels.saturating_sub(1) * panel_stride + (a.rows - 1) * stride + COLUMNS <= values.len(),
        "a matrix lies within its slice"
    );
    #[cfg(target_arch = "x86_64")]
    for (index, panel) in b.panels.chunks_exact(b.count * COLUMNS).take(panels).enumerate() {
        for row in (part.row(index * COLUMNS)..a.rows).step_by(ROWS) {
            let pairs = part.pairs(row, a.count);
            // SAFETY: the processor has these vectors; `Left::new` has checked that rows `row` to `row + ROWS` with `count` pairs
            // lie within the slice, `pairs` is within 0 to `count`, the panel has at least as many pairs, and the lines above
            // checked what is written.
            unsafe {
                tile(
                    a.pairs.as_ptr().add(row * a.step + pairs.start * a.pair_stride),
                    (a.row_stride, a.pair_stride),
                    panel.as_ptr().add(pairs.start * COLUMNS),
                    pairs.len(),
                    scale,
                    values.as_mut_ptr().add(index * panel_stride + row * stride),
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
            // SAFETY: as above.
            let a = _mm512_set1_epi32(unsafe { *a.add(row * row_stride + index * pair_stride) } as i32);
            for (sum, b) in sums.iter_mut().zip(b) {
                *sum = vectors::multiply(*sum, a, b);
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
            let by_tiles: Vec<u32> = (0..rows / ROWS * count)
                .flat_map(|at| (0..ROWS).map(move |row| (at / count * ROWS + row, at % count)))
                .map(|(row, p)| by_rows[row * count + p])
                .collect();
            let mut transposed = Right::default();
            transposed.transposed(b.chunks(width), width);
            // The same operand from its transpose.
            let b_t: Vec<bf16> = (0..width * columns)
                .map(|index| b[index % columns * width + index / columns])
                .collect();
            let mut stacked = Right::default();
            stacked.stacked(b_t.chunks(columns), columns, count);
            let padded = columns.next_multiple_of(COLUMNS);
            for left in [
                Left::rows(&by_rows, rows, count, count),
                Left::tiles(&by_tiles, rows, count),
            ] {
                for right in [&transposed, &stacked] {
                    let mut y = vec![1.0f32; rows * padded];
                    product(left, right, padded, 0.5, Part::All, Into::rows(&mut y, padded));
                    product(left, right, padded, 0.5, Part::All, Into::sum(&mut y, padded));
                    let mut panels = vec![1.0f32; rows * padded];
                    product(left, right, padded, 1.0, Part::All, Into::panels(&mut panels, rows));
                    for (row, column) in (0..rows).flat_map(|row| (0..columns).map(move |column| (row, column))) {
                        let in_panel = (column / COLUMNS * rows + row) * COLUMNS + column % COLUMNS;
                        assert_eq!(
                            [y[row * padded + column], panels[in_panel]],
                            [exact(row, column); 2],
                            "{rows} {width} {columns}"
                        );
                    }
                }
            }
        }
    }

    /// Of a block of queries that begins with query `first`: 0 where a query does not see the key.
    #[test]
    fn what_no_query_sees_may_be_left_out() {
        if !are_there() {
            eprintln!("SKIPPED: this processor has no AVX512-BF16");
            return;
        }
        let (queries, dim) = (24usize, 40);
        for first in [0, 24, 40] {
            let keys = (first + queries).next_multiple_of(COLUMNS);
            let mut scores = numbers(queries, keys);
            for (index, score) in scores.iter_mut().enumerate() {
                if index % keys > first + index / keys {
                    *score = bf16::ZERO;
                }
            }
            let along: Vec<u32> = scores.chunks(2).map(|two| pair(two[0], two[1])).collect();
            let across: Vec<u32> = (0..keys / ROWS * queries / 2)
                .flat_map(|at| (0..ROWS).map(move |key| (at / (queries / 2) * ROWS + key, at % (queries / 2))))
                .map(|(key, two)| pair(scores[2 * two * keys + key], scores[(2 * two + 1) * keys + key]))
                .collect();
            let (of_keys, of_queries) = (numbers(keys, dim), numbers(queries, dim));
            let [mut keys_stacked, mut queries_stacked, mut transposed] = [(); 3].map(|()| Right::default());
            keys_stacked.stacked(of_keys.chunks(dim), dim, keys / 2);
            queries_stacked.stacked(of_queries.chunks(dim), dim, queries / 2);
            transposed.transposed(of_keys.chunks(dim), dim);
            let padded = dim.next_multiple_of(COLUMNS);
            let both = |left: Left, right: &Right, part: Part, columns: usize| {
                [part, Part::All].map(|part| {
                    let mut y = vec![0f32; left.rows * columns];
                    product(left, right, columns, 1.0, part, Into::rows(&mut y, columns));
                    y
                })
            };
            let over_keys = Left::rows(&along, queries, keys / 2, keys / 2);
            let [some, all] = both(over_keys, &keys_stacked, Part::OverKeys { first }, padded);
            assert_eq!(some, all, "over keys, from {first}");
            let over_queries = Left::tiles(&across, keys, queries / 2);
            let [some, all] = both(over_queries, &queries_stacked, Part::OverQueries { first }, padded);
            assert_eq!(some, all, "over queries, from {first}");
            let by_dims: Vec<u32> = of_queries.chunks(2).map(|two| pair(two[0], two[1])).collect();
            let left = Left::rows(&by_dims, queries, dim / 2, dim / 2);
            let [some, all] = both(left, &transposed, Part::Seen { first }, keys);
            for (index, (some, all)) in some.iter().zip(&all).enumerate() {
                assert!(
                    some == all || index % keys > first + index / keys,
                    "scores, from {first}"
                );
            }
        }
    }
}
