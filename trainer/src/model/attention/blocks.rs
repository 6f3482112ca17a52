//! Causal attention on the CPU, a block of queries at a time: what lies behind the diagonal is never computed, and a block's
//! scores stay in the second-level cache. f32 inside, whatever the tensors are.
//! Source: Dao 2023, "FlashAttention-2", §3.1; here whole rows of scores fit, so that softmax needs no second thought.
//! Axes: b row, t time, h head, g key/value head, d dim.

use rayon::prelude::*;
use tch::{Kind, Tensor};

use super::Stretch;
use crate::model::gemm::{Into, Matrix, product};
use crate::model::kernels::cpu::{Element, by_kind, exp, largest, sum};
use crate::model::kernels::vectors::vectorized;

/// Queries of a block. More make larger products and more of them in vain.
const QUERIES: usize = 64;

/// Sizes of the tensors: rows of q and out lie `heads * dim` apart, rows of k and v `groups * dim`.
#[derive(Clone, Copy)]
struct Sizes {
    time: usize,
    heads: usize,
    groups: usize,
    dim: usize,
}

impl Sizes {
    fn of(q_bthd: &Tensor, k_btgd: &Tensor) -> Sizes {
        let (q, k) = (q_bthd.size(), k_btgd.size());
        let [time, heads, groups, dim] = [q[1], q[2], k[2], q[3]].map(|n| n as usize);
        Sizes {
            time,
            heads,
            groups,
            dim,
        }
    }

    fn scale(&self) -> f32 {
        1.0 / (self.dim as f32).sqrt()
    }

    /// The position of a stretch's first token among all.
    fn first(&self, stretch: &Stretch) -> usize {
        stretch.row as usize * self.time + stretch.start as usize
    }
}

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

/// Blocks of queries: (stretch, first query within it, queries).
fn blocks(stretches: &[Stretch]) -> Vec<(&Stretch, usize, usize)> {
    let of = |stretch| {
        let length = Stretch::length(stretch);
        (0..length)
            .step_by(QUERIES)
            .map(move |first| (stretch, first, QUERIES.min(length - first)))
    };
    stretches.iter().flat_map(of).collect()
}

/// softmax(q kᵀ / √d + causal) v within each stretch, and ln Σ eˣ of the scores, f32 [b, t, h]. Stretches are in order and
/// hold every position once.
pub fn forward(q_bthd: &Tensor, k_btgd: &Tensor, v_btgd: &Tensor, stretches: &[Stretch]) -> (Tensor, Tensor) {
    fn each<E: Element>(q: &Tensor, k: &Tensor, v: &Tensor, stretches: &[Stretch]) -> (Tensor, Tensor) {
        let sizes = Sizes::of(q, k);
        let Sizes { heads, dim, .. } = sizes;
        let size = q.size();
        let (mut out_bthd, mut logsumexp_bth) = (q.empty_like(), Tensor::empty(&size[..3], (Kind::Float, q.device())));
        let (q, k, v) = (E::of(q), E::of(k), E::of(v));
        let mut outs = E::of_mut(&mut out_bthd);
        let mut logsumexps = f32::of_mut(&mut logsumexp_bth);
        let mut tasks = Vec::new();
        for (stretch, first, queries) in blocks(stretches) {
            let out = outs
                .split_off_mut(..queries * heads * dim)
                .expect("stretches hold every position once");
            let logsumexp = logsumexps.split_off_mut(..queries * heads).expect("as above");
            tasks.push((stretch, first, queries, out, logsumexp));
        }
        // Later blocks of a row have more keys: they are begun first.
        tasks
            .into_par_iter()
            .rev()
            .for_each_init(Room::default, |room, (stretch, first, queries, out, logsumexp)| {
                let begin = sizes.first(stretch);
                let keys = first + queries;
                for h in 0..heads {
                    let group = (h / (heads / sizes.groups), sizes.groups);
                    let q = head(q, (begin + first, queries), (h, heads), dim, &mut room.q);
                    let k = head(k, (begin, keys), group, dim, &mut room.k);
                    let v = head(v, (begin, keys), group, dim, &mut room.v);
                    room.scores.resize(queries * keys, 0.0);
                    product(q, k.t(), sizes.scale(), fresh(&mut room.scores, keys));
                    for (i, scores) in room.scores.chunks_exact_mut(keys).enumerate() {
                        logsumexp[i * heads + h] = softmax(scores, first + i + 1);
                    }
                    room.out.resize(queries * dim, 0.0);
                    product(
                        Matrix::new(&room.scores, queries, keys, keys),
                        v,
                        1.0,
                        fresh(&mut room.out, dim),
                    );
                    for (out, row) in out.chunks_exact_mut(heads * dim).zip(room.out.chunks_exact(dim)) {
                        let out = &mut out[h * dim..(h + 1) * dim];
                        out.iter_mut().zip(row).for_each(|(out, x)| *out = E::round(*x));
                    }
                }
            });
        (out_bthd, logsumexp_bth)
    }
    let [q, k, v] = [q_bthd, k_btgd, v_btgd].map(Tensor::contiguous);
    by_kind!(q, each(&q, &k, &v, stretches))
}

/// (d_q, d_k, d_v) of [`forward`]. With P the probabilities: d_v = Pᵀ d_out, d_P = d_out vᵀ,
/// d_scores = P · (d_P − rowsum(d_out · out)); keys and values sum over the query heads that share them.
pub fn backward(
    d_out_bthd: &Tensor,
    q_bthd: &Tensor,
    k_btgd: &Tensor,
    v_btgd: &Tensor,
    out_bthd: &Tensor,
    logsumexp_bth: &Tensor,
    stretches: &[Stretch],
) -> (Tensor, Tensor, Tensor) {
    fn each<E: Element>(
        [d_out, q, k, v, out]: &[Tensor; 5],
        logsumexp: &Tensor,
        stretches: &[Stretch],
    ) -> (Tensor, Tensor, Tensor) {
        let sizes = Sizes::of(q, k);
        let Sizes { heads, groups, dim, .. } = sizes;
        let (mut d_q, mut d_k, mut d_v) = (q.empty_like(), k.empty_like(), v.empty_like());
        let operands = [d_out, q, k, v, out].map(|x| E::of(x));
        let logsumexp = f32::of(logsumexp);
        let tasks: Vec<(&Stretch, usize)> = stretches
            .iter()
            .flat_map(|stretch| (0..heads).map(move |h| (stretch, h)))
            .collect();
        let of_heads: Vec<[Vec<f32>; 3]> = tasks
            .into_par_iter()
            .map_init(Room::default, |room, (stretch, h)| {
                backward_of_head(operands, logsumexp, sizes, stretch, h, room)
            })
            .collect();
        // Stretches lie one behind the other in memory, and so do what their heads gave.
        let mut rest = (E::of_mut(&mut d_q), E::of_mut(&mut d_k), E::of_mut(&mut d_v));
        let mut parts = Vec::new();
        for (stretch, of_heads) in stretches.iter().zip(of_heads.chunks_exact(heads)) {
            let length = stretch.length();
            let whole = "stretches hold every position once";
            let d_q = rest.0.split_off_mut(..length * heads * dim).expect(whole);
            let d_k = rest.1.split_off_mut(..length * groups * dim).expect(whole);
            let d_v = rest.2.split_off_mut(..length * groups * dim).expect(whole);
            let rows = d_q
                .chunks_exact_mut(heads * dim)
                .zip(d_k.chunks_exact_mut(groups * dim))
                .zip(d_v.chunks_exact_mut(groups * dim));
            parts.extend(rows.enumerate().map(|(t, rows)| (t, rows, of_heads)));
        }
        parts
            .into_par_iter()
            .with_min_len(64)
            .for_each(|(t, ((d_q, d_k), d_v), of_heads)| {
                let of = |h: usize, which: usize| &of_heads[h][which][t * dim..(t + 1) * dim];
                for (h, d_q) in d_q.chunks_exact_mut(dim).enumerate() {
                    d_q.iter_mut().zip(of(h, 0)).for_each(|(d, x)| *d = E::round(*x));
                }
                let shared = heads / groups;
                for (which, d) in [(1, d_k), (2, d_v)] {
                    for (group, d) in d.chunks_exact_mut(dim).enumerate() {
                        for (i, d) in d.iter_mut().enumerate() {
                            *d = E::round((group * shared..(group + 1) * shared).map(|h| of(h, which)[i]).sum());
                        }
                    }
                }
            });
        (d_q, d_k, d_v)
    }
    let operands = [d_out_bthd, q_bthd, k_btgd, v_btgd, out_bthd].map(Tensor::contiguous);
    by_kind!(q_bthd, each(&operands, logsumexp_bth, stretches))
}

/// [d_q, d_k, d_v] of one head within one stretch: f32 [t, d] each, d_k and d_v not yet summed over heads.
fn backward_of_head<E: Element>(
    [d_out, q, k, v, out]: [&[E]; 5],
    logsumexp: &[f32],
    sizes: Sizes,
    stretch: &Stretch,
    h: usize,
    room: &mut Room,
) -> [Vec<f32>; 3] {
    let Sizes { heads, dim, .. } = sizes;
    let (begin, length) = (sizes.first(stretch), stretch.length());
    let [mut d_q, mut d_k, mut d_v] = [(); 3].map(|()| vec![0f32; length * dim]);
    let group = (h / (heads / sizes.groups), sizes.groups);
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
            let row = (position * heads + h) * dim..(position * heads + h + 1) * dim;
            let logsumexp = logsumexp[position * heads + h];
            softmax_backward(p, d, first + i + 1, &out[row.clone()], &d_out[row], logsumexp);
        }
        let p = Matrix::new(&room.scores, queries, keys, keys);
        let d_scores = Matrix::new(&room.d_scores, queries, keys, keys);
        product(p.t(), d_out_m, 1.0, added(&mut d_v[..keys * dim], dim));
        product(d_scores.t(), q, sizes.scale(), added(&mut d_k[..keys * dim], dim));
        product(
            d_scores,
            k,
            sizes.scale(),
            fresh(&mut d_q[first * dim..keys * dim], dim),
        );
    }
    [d_q, d_k, d_v]
}

vectorized! {
    /// The scores of one query become its probabilities, 0 from key `seen` on; ln Σ eˣ.
    fn softmax(scores: &mut [f32], seen: usize) -> f32 {
        let (seen, later) = scores.split_at_mut(seen);
        let most = largest(seen);
        seen.iter_mut().for_each(|x| *x = exp(*x - most));
        let total = sum(seen, |x| x);
        seen.iter_mut().for_each(|x| *x *= 1.0 / total);
        later.fill(0.0);
        most + total.ln()
    }
}

vectorized! {
    /// The scores of one query become its probabilities `p`, and d_p becomes d_scores; 0 from key `seen` on.
    fn softmax_backward<E>(p: &mut [f32], d: &mut [f32], seen: usize, out: &[E], d_out: &[E], logsumexp: f32) -> () {
        let both = out.iter().zip(d_out);
        let row_sum: f32 = both.map(|(out, d_out)| out.widen() * d_out.widen()).sum();
        for (p, d) in p[..seen].iter_mut().zip(&mut d[..seen]) {
            *p = exp(*p - logsumexp);
            *d = *p * (*d - row_sum);
        }
        p[seen..].fill(0.0);
        d[seen..].fill(0.0);
    }
}

/// What a thread keeps from task to task.
#[derive(Default)]
struct Room {
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    d_out: Vec<f32>,
    scores: Vec<f32>,
    d_scores: Vec<f32>,
    out: Vec<f32>,
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
