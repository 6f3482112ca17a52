//! A block of attention in bf16 by products of pairs: probabilities and their gradient are rounded to bf16 before they are
//! multiplied, as flash attention does on GPUs; sums and softmax are f32.

use half::bf16;

use std::f32::consts::{LN_2, LOG2_E};

use super::{Block, Grads, QUERIES, Room, Sizes};
use crate::model::gemm::pairs::rows::{Derivatives, Query, derivatives, dot, powers, round};
use crate::model::gemm::pairs::{COLUMNS, Into, Left, Part, ROWS, Right, halves_of, product};

/// Keys and values of one head, laid out for the products; those of a whole stretch, since every block reads them.
#[derive(Default)]
pub struct Packed {
    /// To be summed over dims.
    keys_t: Right,
    values_t: Right,
    /// To be summed over positions, of which there are none beyond the stretch: zeros fill the last block.
    keys: Right,
    values: Right,
}

impl Packed {
    /// What [`forward`] reads.
    pub fn for_forward(k: &[bf16], v: &[bf16], sizes: Sizes, stretch: (usize, usize), group: usize) -> Packed {
        let [k, v] = [k, v].map(|x| move || rows(x, stretch, (group, sizes.groups), sizes.dim));
        let mut packed = Packed::default();
        packed.keys_t.transposed(k(), sizes.dim);
        packed
            .values
            .stacked(v(), sizes.dim, stretch.1.next_multiple_of(COLUMNS) / 2);
        packed
    }

    /// What [`backward`] reads.
    pub fn for_backward(k: &[bf16], v: &[bf16], sizes: Sizes, stretch: (usize, usize), group: usize) -> Packed {
        let [k, v] = [k, v].map(|x| move || rows(x, stretch, (group, sizes.groups), sizes.dim));
        let mut packed = Packed::default();
        packed.keys_t.transposed(k(), sizes.dim);
        packed.values_t.transposed(v(), sizes.dim);
        packed
            .keys
            .stacked(k(), sizes.dim, stretch.1.next_multiple_of(COLUMNS) / 2);
        packed
    }
}

/// A head's rows where they lie: (first, how many), (head, of how many).
fn rows(
    x: &[bf16],
    (first, count): (usize, usize),
    (head, heads): (usize, usize),
    dim: usize,
) -> impl ExactSizeIterator<Item = &[bf16]> {
    let stride = heads * dim;
    x[first * stride + head * dim..]
        .chunks(stride)
        .take(count)
        .map(move |row| &row[..dim])
}

/// The same as a left operand, summed over dims.
fn left<'a>(x: &[bf16], here: (usize, usize), head: (usize, usize), dim: usize, room: &'a mut Vec<u32>) -> Left<'a> {
    let (count, padded) = (dim.div_ceil(2), here.1.next_multiple_of(ROWS));
    room.clear();
    room.resize(padded * count, 0);
    for (pairs, row) in room.chunks_exact_mut(count).zip(rows(x, here, head, dim)) {
        halves_of(pairs)[..dim].copy_from_slice(row);
    }
    Left::rows(room, padded, count, count)
}

/// Writes head `h` of a block's queries to its places of `out` and `logsumexp`. Probabilities are divided by their sum at the very
/// end, where they have become `dim` values.
pub fn forward(
    q: &[bf16],
    packed: &Packed,
    sizes: Sizes,
    block: &Block,
    h: usize,
    room: &mut Room,
    (out, logsumexp): (&mut [bf16], &mut [f32]),
) {
    let Sizes { heads, dim, .. } = sizes;
    let &Block {
        begin, first, queries, ..
    } = block;
    let keys = (first + queries).next_multiple_of(COLUMNS);
    let padded = queries.next_multiple_of(ROWS);
    let q = left(q, (begin + first, queries), (h, heads), dim, &mut room.left);
    room.scores.resize(padded * keys, 0.0);
    let into = Into::panels(&mut room.scores, padded);
    product(
        q,
        &packed.keys_t,
        keys,
        sizes.scale() * LOG2_E,
        Part::Seen { first },
        into,
    );
    // What stands in rows that pad the block is multiplied and not read.
    room.p.resize(padded * keys / 2, 0);
    let mut totals = [0f32; QUERIES];
    for (i, p) in room.p.chunks_exact_mut(keys / 2).take(queries).enumerate() {
        let (largest, total) = powers(p, &room.scores, (i, padded), first + i + 1);
        logsumexp[i * heads + h] = (largest + total.log2()) * LN_2;
        totals[i] = total;
    }
    let stride = dim.next_multiple_of(COLUMNS);
    room.out.resize(padded * stride, 0.0);
    let p = Left::rows(&room.p, padded, keys / 2, keys / 2);
    let into = Into::rows(&mut room.out, stride);
    product(p, &packed.values, stride, 1.0, Part::OverKeys { first }, into);
    let rows = out.chunks_exact_mut(heads * dim).zip(room.out.chunks_exact(stride));
    for ((out, row), total) in rows.zip(totals) {
        round(&mut out[h * dim..(h + 1) * dim], row, 1.0 / total);
    }
}

/// As in `plain.rs`.
pub fn backward(
    [d_out, q, out]: [&[bf16]; 3],
    packed: &Packed,
    logsumexp: &[f32],
    sizes: Sizes,
    (begin, length): (usize, usize),
    h: usize,
    (room, d_q): (&mut Room, &mut [bf16]),
) -> Grads {
    let Sizes { heads, dim, .. } = sizes;
    let (scale, stride) = (sizes.scale(), dim.next_multiple_of(COLUMNS));
    let [mut d_k, mut d_v] = [(); 2].map(|()| vec![0f32; length.next_multiple_of(COLUMNS) * stride]);
    for first in (0..length).step_by(QUERIES) {
        let queries = QUERIES.min(length - first);
        let padded = queries.next_multiple_of(ROWS);
        let keys = (first + queries).next_multiple_of(COLUMNS);
        let here = (begin + first, queries);
        for (x, keys_or_values, scale, scores) in [
            (q, &packed.keys_t, scale * LOG2_E, &mut room.scores),
            (d_out, &packed.values_t, 1.0, &mut room.d_scores),
        ] {
            scores.resize(padded * keys, 0.0);
            let x = left(x, here, (h, heads), dim, &mut room.left);
            let into = Into::panels(scores, padded);
            product(x, keys_or_values, keys, scale, Part::Seen { first }, into);
        }
        let [p_across, d_across, d_along] = [&mut room.p, &mut room.d_across, &mut room.d_along].map(|pairs| {
            pairs.resize(padded / 2 * keys, 0);
            &mut pairs[..]
        });
        let mut into = Derivatives {
            p_across,
            d_across,
            d_along,
        };
        let query = |i: usize| {
            if i >= queries {
                return Query::default();
            }
            let position = begin + first + i;
            let row = sizes.row(position, h);
            Query {
                seen: first + i + 1,
                log_sum: logsumexp[position * heads + h] * LOG2_E,
                row_sum: dot(&out[row.clone()], &d_out[row]),
            }
        };
        for two in 0..padded / 2 {
            let both = [2 * two, 2 * two + 1].map(query);
            derivatives(&mut into, [&room.scores, &room.d_scores], (two, padded), keys, both);
        }

        // d_v = Pᵀ d_out and d_k = d_scoresᵀ q sum over queries, d_q = d_scores k over keys.
        for (x, across, sum, scale) in [(d_out, &room.p, &mut d_v, 1.0), (q, &room.d_across, &mut d_k, scale)] {
            room.right.stacked(rows(x, here, (h, heads), dim), dim, padded / 2);
            let across = Left::tiles(across, keys, padded / 2);
            let into = Into::sum(&mut sum[..keys * stride], stride);
            product(across, &room.right, stride, scale, Part::OverQueries { first }, into);
        }
        let along = Left::rows(&room.d_along, padded, keys / 2, keys / 2);
        room.out.resize(padded * stride, 0.0);
        let into = Into::rows(&mut room.out, stride);
        product(along, &packed.keys, stride, scale, Part::OverKeys { first }, into);
        let d_q = d_q[first * dim..].chunks_exact_mut(dim);
        for (d_q, row) in d_q.zip(room.out.chunks_exact(stride)).take(queries) {
            round(d_q, row, 1.0);
        }
    }
    Grads { d_k, d_v, stride }
}
