//! Causal attention on the CPU, a block of queries at a time: what lies behind the diagonal is never computed, and a block's
//! scores stay in the second-level cache. Sums and softmax are f32, whatever the tensors are; products are of f32, or of bf16
//! where the tensors are and the processor multiplies it.
//! Source: Dao 2023, "FlashAttention-2", §3.1; here whole rows of scores fit, so that softmax needs no second thought.
//! Axes: b row, t time, h head, g key/value head, d dim.

mod paired;
mod plain;

use std::ops::Range;

use half::bf16;
use paired::Packed;
use rayon::prelude::*;
use tch::{Kind, Tensor};

use super::Stretch;
use crate::model::gemm::pairs::{self, Right};
use crate::model::kernels::cpu::{Element, LANES, by_kind, dot, exp, largest, sum};
use sharding::vectorized;

/// Queries of a block. More make larger products and more of them in vain.
const QUERIES: usize = 64;

/// Sizes of the tensors: rows of q and out lie `heads * dim` apart, rows of k and v `groups * dim`.
#[derive(Clone, Copy)]
pub struct Sizes {
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

    /// The key/value head of query head `h`.
    fn group(&self, h: usize) -> usize {
        h / (self.heads / self.groups)
    }

    /// Where head `h` of a position lies in q, out and their gradients.
    fn row(&self, position: usize, h: usize) -> Range<usize> {
        let at = (position * self.heads + h) * self.dim;
        at..at + self.dim
    }

    /// The position of a stretch's first token among all.
    fn first(&self, stretch: &Stretch) -> usize {
        stretch.row as usize * self.time + stretch.start as usize
    }
}

/// Some queries of a stretch; they see the keys from its begin up to their own places.
pub struct Block {
    /// Which stretch.
    stretch: usize,
    /// The position of its first token among all.
    begin: usize,
    /// The block's first query within it.
    first: usize,
    queries: usize,
}

fn blocks(stretches: &[Stretch], sizes: Sizes) -> Vec<Block> {
    let of = |(stretch, it): (usize, &Stretch)| {
        let (begin, length) = (sizes.first(it), it.length());
        (0..length).step_by(QUERIES).map(move |first| Block {
            stretch,
            begin,
            first,
            queries: QUERIES.min(length - first),
        })
    };
    stretches.iter().enumerate().flat_map(of).collect()
}

/// What a query head gives to d_k and d_v, not yet summed over heads: rows of a stretch `stride` apart.
pub struct Grads {
    d_k: Vec<f32>,
    d_v: Vec<f32>,
    stride: usize,
}

vectorized! {
    /// Row `t` of d_k or d_v, summed over heads.
    fn round_sum<E: Element>(sum: &mut [E], heads: &[(Vec<E>, Grads)], which: fn(&Grads) -> &[f32], t: usize) -> () {
        for (index, sum) in sum.chunks_mut(LANES).enumerate() {
            let mut lanes = [0f32; LANES];
            for (_, grads) in heads {
                let row = &which(grads)[t * grads.stride + index * LANES..];
                lanes.iter_mut().zip(row).for_each(|(lane, x)| *lane += x);
            }
            sum.iter_mut().zip(lanes).for_each(|(sum, x)| *sum = E::round(x));
        }
    }
}

vectorized! {
    fn round_row<E: Element>(rounded: &mut [E], row: &[f32]) -> () {
        rounded.iter_mut().zip(row).for_each(|(to, x)| *to = E::round(*x));
    }
}

/// Lays out (keys, values) of one group within (first position, length).
type Make = fn(&[bf16], &[bf16], Sizes, (usize, usize), usize) -> Packed;

/// Keys and values by stretch and group as `make` lays them out; `None` where blocks go by plain products.
fn packed<E: Element>([k, v]: [&[E]; 2], sizes: Sizes, stretches: &[Stretch], make: Make) -> Option<Vec<Packed>> {
    let (k, v) = (E::halves(k)?, E::halves(v)?);
    if !pairs::are_there() {
        return None;
    }
    let one = |index: usize| {
        let stretch = &stretches[index / sizes.groups];
        make(
            k,
            v,
            sizes,
            (sizes.first(stretch), stretch.length()),
            index % sizes.groups,
        )
    };
    Some((0..stretches.len() * sizes.groups).into_par_iter().map(one).collect())
}

/// softmax(q kᵀ / √d + causal) v within each stretch, and ln Σ eˣ of the scores, f32 [b, t, h]. Stretches are in order and
/// hold every position once.
pub fn forward(q_bthd: &Tensor, k_btgd: &Tensor, v_btgd: &Tensor, stretches: &[Stretch]) -> (Tensor, Tensor) {
    fn each<E: Element>(q: &Tensor, k: &Tensor, v: &Tensor, stretches: &[Stretch]) -> (Tensor, Tensor) {
        let sizes = Sizes::of(q, k);
        let Sizes { heads, dim, .. } = sizes;
        let size = q.size();
        let (mut out_bthd, mut logsumexp_bth) = (q.empty_like(), Tensor::empty(&size[..3], (Kind::Float, q.device())));
        let [q, k, v] = [q, k, v].map(|x| E::of(x));
        let packed = packed([k, v], sizes, stretches, Packed::for_forward);
        let mut outs = E::of_mut(&mut out_bthd);
        let mut logsumexps = f32::of_mut(&mut logsumexp_bth);
        let mut tasks = Vec::new();
        for block in blocks(stretches, sizes) {
            let out = outs.split_off_mut(..block.queries * heads * dim).expect(WHOLE);
            let logsumexp = logsumexps.split_off_mut(..block.queries * heads).expect(WHOLE);
            tasks.push((block, out, logsumexp));
        }
        // Later blocks of a row have more keys: they are begun first.
        tasks
            .into_par_iter()
            .rev()
            .for_each_init(Room::default, |room, (block, out, logsumexp)| {
                for h in 0..heads {
                    match (&packed, E::halves(q)) {
                        (Some(packed), Some(q)) => {
                            let packed = &packed[block.stretch * sizes.groups + sizes.group(h)];
                            let out = E::halves_mut(out).expect("as q is");
                            paired::forward(q, packed, sizes, &block, h, room, (out, logsumexp));
                        }
                        _ => plain::forward([q, k, v], sizes, &block, h, room, (&mut *out, logsumexp)),
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
        let [d_out, q, k, v, out] = [d_out, q, k, v, out].map(|x| E::of(x));
        let packed = packed([k, v], sizes, stretches, Packed::for_backward);
        let logsumexp = f32::of(logsumexp);
        let of_head = |room: &mut Room, index: usize| {
            let (stretch, h) = (index / heads, index % heads);
            let it = &stretches[stretch];
            let positions = (sizes.first(it), it.length());
            let mut d_q = vec![E::round(0.0); it.length() * dim];
            let halves = [d_out, q, out].map(E::halves);
            let grads = match (&packed, halves, E::halves_mut(&mut d_q)) {
                (Some(packed), [Some(d_out), Some(q), Some(out)], Some(d_q)) => {
                    let packed = &packed[stretch * groups + sizes.group(h)];
                    paired::backward([d_out, q, out], packed, logsumexp, sizes, positions, h, (room, d_q))
                }
                _ => plain::backward([d_out, q, k, v, out], logsumexp, sizes, positions, h, (room, &mut d_q)),
            };
            (d_q, grads)
        };
        let tasks = (0..stretches.len() * heads).into_par_iter();
        let of_heads: Vec<(Vec<E>, Grads)> = tasks.map_init(Room::default, of_head).collect();
        // Stretches lie one behind the other in memory, and so do what their heads gave.
        let mut rest = (E::of_mut(&mut d_q), E::of_mut(&mut d_k), E::of_mut(&mut d_v));
        let mut parts = Vec::new();
        for (stretch, of_heads) in stretches.iter().zip(of_heads.chunks_exact(heads)) {
            let length = stretch.length();
            let d_q = rest.0.split_off_mut(..length * heads * dim).expect(WHOLE);
            let d_k = rest.1.split_off_mut(..length * groups * dim).expect(WHOLE);
            let d_v = rest.2.split_off_mut(..length * groups * dim).expect(WHOLE);
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
                for (d_q, (of_head, _)) in d_q.chunks_exact_mut(dim).zip(of_heads) {
                    d_q.copy_from_slice(&of_head[t * dim..(t + 1) * dim]);
                }
                let of_groups = d_k.chunks_exact_mut(dim).zip(d_v.chunks_exact_mut(dim));
                for ((d_k, d_v), sharing) in of_groups.zip(of_heads.chunks_exact(heads / groups)) {
                    round_sum(d_k, sharing, |grads| &grads.d_k, t);
                    round_sum(d_v, sharing, |grads| &grads.d_v, t);
                }
            });
        (d_q, d_k, d_v)
    }
    let operands = [d_out_bthd, q_bthd, k_btgd, v_btgd, out_bthd].map(Tensor::contiguous);
    by_kind!(q_bthd, each(&operands, logsumexp_bth, stretches))
}

const WHOLE: &str = "stretches hold every position once";

vectorized! {
    /// The scores of one query become its probabilities, 0 from key `seen` on; ln Σ eˣ.
    pub(in crate::model) fn softmax(scores: &mut [f32], seen: usize) -> f32 {
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
    fn softmax_backward<E: Element>(p: &mut [f32], d: &mut [f32], seen: usize, out: &[E], d_out: &[E], logsumexp: f32) -> () {
        let row_sum = dot(out, d_out);
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
pub struct Room {
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    d_out: Vec<f32>,
    scores: Vec<f32>,
    d_scores: Vec<f32>,
    out: Vec<f32>,
    /// Operands of the products of pairs: a block's rows, and probabilities and their gradient.
    left: Vec<u32>,
    right: Right,
    p: Vec<u32>,
    d_across: Vec<u32>,
    d_along: Vec<u32>,
}
