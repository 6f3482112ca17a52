//! A block of attention by f32 products, whatever the tensors are: on any processor.

use super::{Block, Grads, QUERIES, Room, Sizes, round_row, softmax, softmax_backward};
use crate::model::gemm::{Into, Matrix, product};
use crate::model::kernels::cpu::Element;

/// A head's rows as an f32 matrix: in place, or widened into `room`.
fn head<'a, E: Element>(
    x: &'a [E],
    (first, rows): (usize, usize),
    (head, heads): (usize, usize),
    dim: usize,
    room: &'a mut Vec<f32>,
) -> Matrix<'a> {
    let stride = heads * dim;
    let x = &x[first * stride + head * dim..];
    if let Some(plain) = E::plain(x) {
        return Matrix::new(plain, rows, dim, stride);
    }
    room.clear();
    for row in x.chunks(stride).take(rows) {
        room.extend(row[..dim].iter().map(|x| x.widen()));
    }
    Matrix::new(room, rows, dim, dim)
}

/// Writes head `h` of a block's queries to its places of `out` and `logsumexp`.
pub fn forward<E: Element>(
    [q, k, v]: [&[E]; 3],
    sizes: Sizes,
    block: &Block,
    h: usize,
    room: &mut Room,
    (out, logsumexp): (&mut [E], &mut [f32]),
) {
    let Sizes { heads, dim, .. } = sizes;
    let &Block {
        begin, first, queries, ..
    } = block;
    let keys = first + queries;
    let group = (sizes.group(h), sizes.groups);
    let q = head(q, (begin + first, queries), (h, heads), dim, &mut room.q);
    let k = head(k, (begin, keys), group, dim, &mut room.k);
    let v = head(v, (begin, keys), group, dim, &mut room.v);
    room.scores.resize(queries * keys, 0.0);
    product(q, k.t(), sizes.scale(), fresh(&mut room.scores, keys));
    for (i, scores) in room.scores.chunks_exact_mut(keys).enumerate() {
        logsumexp[i * heads + h] = softmax(scores, first + i + 1);
    }
    room.out.resize(queries * dim, 0.0);
    let p = Matrix::new(&room.scores, queries, keys, keys);
    product(p, v, 1.0, fresh(&mut room.out, dim));
    for (out, row) in out.chunks_exact_mut(heads * dim).zip(room.out.chunks_exact(dim)) {
        round_row(&mut out[h * dim..(h + 1) * dim], row);
    }
}

/// Writes `d_q` [t, d] of head `h` for `length` positions from `begin` on; what it gives to d_k and d_v.
pub fn backward<E: Element>(
    [d_out, q, k, v, out]: [&[E]; 5],
    logsumexp: &[f32],
    sizes: Sizes,
    (begin, length): (usize, usize),
    h: usize,
    (room, d_q): (&mut Room, &mut [E]),
) -> Grads {
    let Sizes { heads, dim, .. } = sizes;
    let [mut d_k, mut d_v] = [(); 2].map(|()| vec![0f32; length * dim]);
    let group = (sizes.group(h), sizes.groups);
    for first in (0..length).step_by(QUERIES) {
        let queries = QUERIES.min(length - first);
        let keys = first + queries;
        let (here, so_far) = ((begin + first, queries), (begin, keys));
        let q = head(q, here, (h, heads), dim, &mut room.q);
        let d_out_m = head(d_out, here, (h, heads), dim, &mut room.d_out);
        let k = head(k, so_far, group, dim, &mut room.k);
        let v = head(v, so_far, group, dim, &mut room.v);
        room.scores.resize(queries * keys, 0.0);
        room.d_scores.resize(queries * keys, 0.0);
        product(q, k.t(), sizes.scale(), fresh(&mut room.scores, keys));
        product(d_out_m, v.t(), 1.0, fresh(&mut room.d_scores, keys));
        let rows = room
            .scores
            .chunks_exact_mut(keys)
            .zip(room.d_scores.chunks_exact_mut(keys));
        for (i, (p, d)) in rows.enumerate() {
            let position = begin + first + i;
            let row = sizes.row(position, h);
            let logsumexp = logsumexp[position * heads + h];
            softmax_backward(p, d, first + i + 1, &out[row.clone()], &d_out[row], logsumexp);
        }
        let p = Matrix::new(&room.scores, queries, keys, keys);
        let d_scores = Matrix::new(&room.d_scores, queries, keys, keys);
        product(p.t(), d_out_m, 1.0, added(&mut d_v[..keys * dim], dim));
        product(d_scores.t(), q, sizes.scale(), added(&mut d_k[..keys * dim], dim));
        room.out.resize(queries * dim, 0.0);
        product(d_scores, k, sizes.scale(), fresh(&mut room.out, dim));
        round_row(&mut d_q[first * dim..keys * dim], &room.out);
    }
    Grads { d_k, d_v, stride: dim }
}

fn fresh(values: &mut [f32], stride: usize) -> Into<'_> {
    Into {
        values,
        stride,
        add: false,
    }
}

fn added(values: &mut [f32], stride: usize) -> Into<'_> {
    Into {
        values,
        stride,
        add: true,
    }
}
