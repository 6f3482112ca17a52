//! A block of attention in bf16 by products of pairs: probabilities and their gradient are rounded to bf16 before they are
//! multiplied, as flash attention does on GPUs; sums and softmax are f32.

use half::bf16;

use super::{Block, Grads, QUERIES, Room, Sizes, softmax, softmax_backward};
use crate::model::gemm::Into;
use crate::model::gemm::pairs::{COLUMNS, Left, ROWS, Right, halves_of, pair_across, pair_along, product};

/// Keys and values of one head, laid out for the products; those of a whole stretch, since every block reads them.
#[derive(Default)]
pub struct Packed {
    /// To be summed over dims.
    keys_t: Right,
    values_t: Right,
    /// To be summed over positions.
    keys: Right,
    values: Right,
}

impl Packed {
    /// What [`forward`] reads.
    pub fn for_forward(k: &[bf16], v: &[bf16], sizes: Sizes, stretch: (usize, usize), group: usize) -> Packed {
        let [k, v] = [k, v].map(|x| move || rows(x, stretch, (group, sizes.groups), sizes.dim));
        let mut packed = Packed::default();
        packed.keys_t.transposed(k(), sizes.dim);
        packed.values.stacked(v(), sizes.dim);
        packed
    }

    /// What [`backward`] reads.
    pub fn for_backward(k: &[bf16], v: &[bf16], sizes: Sizes, stretch: (usize, usize), group: usize) -> Packed {
        let [k, v] = [k, v].map(|x| move || rows(x, stretch, (group, sizes.groups), sizes.dim));
        let mut packed = Packed::default();
        packed.keys_t.transposed(k(), sizes.dim);
        packed.values_t.transposed(v(), sizes.dim);
        packed.keys.stacked(k(), sizes.dim);
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
    Left::rows(room, padded, count)
}

/// As in `plain.rs`.
pub fn forward(
    q: &[bf16],
    packed: &Packed,
    sizes: Sizes,
    block: &Block,
    h: usize,
    room: &mut Room,
    logsumexp: &mut [f32],
) -> usize {
    let Sizes { heads, dim, .. } = sizes;
    let &Block {
        begin, first, queries, ..
    } = block;
    let keys = (first + queries).next_multiple_of(COLUMNS);
    let q = left(q, (begin + first, queries), (h, heads), dim, &mut room.left);
    let padded = queries.next_multiple_of(ROWS);
    room.scores.resize(padded * keys, 0.0);
    product(q, &packed.keys_t, keys, sizes.scale(), whole(&mut room.scores, keys));
    // What stands in rows that pad the block is multiplied and not read.
    room.p.resize(padded * keys / 2, 0);
    let rows = room
        .scores
        .chunks_exact_mut(keys)
        .zip(room.p.chunks_exact_mut(keys / 2));
    for (i, (scores, p)) in rows.take(queries).enumerate() {
        logsumexp[i * heads + h] = softmax(scores, first + i + 1);
        pair_along(p, scores);
    }
    let stride = dim.next_multiple_of(COLUMNS);
    room.out.resize(padded * stride, 0.0);
    // The last pairs may be of keys that do not exist, whose values were padded with nothing.
    let p = Left::strided_rows(&room.p, padded, packed.values.count().min(keys / 2), keys / 2);
    product(p, &packed.values, stride, 1.0, whole(&mut room.out, stride));
    stride
}

/// As in `plain.rs`.
pub fn backward(
    [d_out, q, out]: [&[bf16]; 3],
    packed: &Packed,
    logsumexp: &[f32],
    sizes: Sizes,
    (begin, length): (usize, usize),
    h: usize,
    room: &mut Room,
) -> Grads {
    let Sizes { heads, dim, .. } = sizes;
    let stride = dim.next_multiple_of(COLUMNS);
    let [mut d_q, mut d_k, mut d_v] = [(); 3].map(|()| vec![0f32; length.next_multiple_of(COLUMNS) * stride]);
    let (mut q_rows, mut d_out_rows) = (Right::default(), Right::default());
    for first in (0..length).step_by(QUERIES) {
        let queries = QUERIES.min(length - first);
        let padded = queries.next_multiple_of(ROWS);
        let keys = (first + queries).next_multiple_of(COLUMNS);
        let here = (begin + first, queries);
        room.scores.resize(padded * keys, 0.0);
        room.d_scores.resize(padded * keys, 0.0);
        let q_left = left(q, here, (h, heads), dim, &mut room.left);
        product(
            q_left,
            &packed.keys_t,
            keys,
            sizes.scale(),
            whole(&mut room.scores, keys),
        );
        let d_out_left = left(d_out, here, (h, heads), dim, &mut room.left);
        product(d_out_left, &packed.values_t, keys, 1.0, whole(&mut room.d_scores, keys));
        let rows_of_both = room
            .scores
            .chunks_exact_mut(keys)
            .zip(room.d_scores.chunks_exact_mut(keys));
        for (i, (p, d)) in rows_of_both.enumerate() {
            if i >= queries {
                p.fill(0.0);
                d.fill(0.0);
                continue;
            }
            let position = begin + first + i;
            let row = sizes.row(position, h);
            let logsumexp = logsumexp[position * heads + h];
            softmax_backward(p, d, first + i + 1, &out[row.clone()], &d_out[row], logsumexp);
        }

        // d_v = Pᵀ d_out and d_k = d_scoresᵀ q sum over queries, d_q = d_scores k over keys.
        let (scale, half) = (sizes.scale(), padded / 2);
        q_rows.stacked(rows(q, here, (h, heads), dim), dim);
        d_out_rows.stacked(rows(d_out, here, (h, heads), dim), dim);
        let count = queries.div_ceil(2);
        room.p.resize(half * keys, 0);
        for (scores, right, sum, scale) in [
            (&room.scores, &d_out_rows, &mut d_v, 1.0),
            (&room.d_scores, &q_rows, &mut d_k, scale),
        ] {
            for (two, p) in scores.chunks_exact(2 * keys).zip(room.p.chunks_exact_mut(keys)) {
                pair_across(p, &two[..keys], &two[keys..]);
            }
            let into = Into {
                values: &mut sum[..keys * stride],
                stride,
                add: true,
            };
            product(Left::columns(&room.p, keys, count), right, stride, scale, into);
        }
        for (d_scores, p) in room.d_scores.chunks_exact(keys).zip(room.p.chunks_exact_mut(keys / 2)) {
            pair_along(p, d_scores);
        }
        let count = packed.keys.count().min(keys / 2);
        let d_scores = Left::strided_rows(&room.p, padded, count, keys / 2);
        product(
            d_scores,
            &packed.keys,
            stride,
            scale,
            whole(&mut d_q[first * stride..], stride),
        );
    }
    Grads {
        parts: [d_q, d_k, d_v],
        stride,
    }
}

fn whole(values: &mut [f32], stride: usize) -> Into<'_> {
    Into {
        values,
        stride,
        add: false,
    }
}
