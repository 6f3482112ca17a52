//! Causal scaled dot-product attention without autograd: on the CPU a block of queries at a time, on GPUs flash attention in
//! bf16, written out for what that does not take.
//! Source: Dao et al. 2022, "FlashAttention": softmax statistics are kept, probabilities are not.

mod blocks;

pub(in crate::model) use blocks::softmax;

use sharding::cuda::attention::{self as gpu, Flash, Sequences};
use std::borrow::Cow;

use tch::{Device, Kind, Tensor};

/// What the backward pass reads.
pub struct Attended {
    pub out_bthd: Tensor,
    kept: Kept,
}

enum Kept {
    /// ln Σ eˣ of the scores, f32 [b, t, h].
    Blocks(Tensor),
    /// The same [b, h, t]: one tensor for the whole micro-batch, or one a document.
    LogSumExps(Vec<Tensor>),
    Flash(Flash),
}

/// The documents of a micro-batch, where they do not see each other. Between them they hold every position once.
pub struct Documents {
    stretches: Vec<Stretch>,
    /// The same for a GPU.
    sequences: Option<Sequences>,
}

/// Consecutive positions of one row.
#[derive(Clone, Copy)]
struct Stretch {
    row: i64,
    start: i64,
    length: i64,
}

impl Documents {
    /// From the first positions of each row's documents, in order and from 0 on; `None` if each row is one document, for
    /// which plain causal attention is the same.
    pub fn new<'a>(starts_by_row: impl Iterator<Item = &'a [u32]>, sequence_length: usize) -> Option<Documents> {
        let mut stretches = Vec::new();
        let mut alone = true;
        for (row, starts) in (0i64..).zip(starts_by_row) {
            alone &= starts.len() <= 1;
            let starts = if starts.is_empty() { &[0] } else { starts };
            let ends = starts[1..].iter().copied().chain([sequence_length as u32]);
            stretches.extend(starts.iter().zip(ends).map(|(start, end)| Stretch {
                row,
                start: i64::from(*start),
                length: i64::from(end - start),
            }));
        }
        (!alone).then_some(Documents {
            stretches,
            sequences: None,
        })
    }

    /// The same for tensors of `device`.
    pub fn on(self, device: Device) -> Documents {
        let sequences = (device != Device::Cpu).then(|| Sequences {
            ends: Tensor::from_slice(&self.ends()).to_device(device),
            longest: self.stretches.iter().map(|stretch| stretch.length).max().unwrap_or(0),
        });
        Documents { sequences, ..self }
    }

    /// 0, then the end of each document where rows lie one behind the other.
    fn ends(&self) -> Vec<i32> {
        let ends = self.stretches.iter().scan(0, |end, stretch| {
            *end += stretch.length as i32;
            Some(*end)
        });
        std::iter::once(0).chain(ends).collect()
    }
}

impl Stretch {
    fn length(&self) -> usize {
        self.length as usize
    }

    /// The stretch of a tensor [b, t, …], as a view.
    fn of(&self, x_bt: &Tensor) -> Tensor {
        x_bt.narrow(0, self.row, 1).narrow(1, self.start, self.length)
    }
}

/// softmax(q kᵀ / √d + causal) v. Keys and values may have fewer heads than queries (GQA, Ainslie et al. 2023).
///
/// With `documents` a position sees those before it in its own document only: the block-diagonal mask, but one kernel call
/// a document (or, with flash attention, one that knows where they end), so that neither the mask nor what it would strike
/// out is ever computed.
pub fn attend(q_bthd: &Tensor, k_btgd: &Tensor, v_btgd: &Tensor, documents: Option<&Documents>) -> Attended {
    if q_bthd.device() == Device::Cpu {
        let (out_bthd, logsumexp) = blocks::forward(q_bthd, k_btgd, v_btgd, &stretches(documents, q_bthd));
        return Attended {
            out_bthd,
            kept: Kept::Blocks(logsumexp),
        };
    }
    if takes_flash(q_bthd) {
        return flash(q_bthd, k_btgd, v_btgd, documents);
    }
    let heads = q_bthd.size()[2];
    let (k_bthd, v_bthd) = (share_heads(k_btgd, heads), share_heads(v_btgd, heads));
    let Some(Documents { stretches, .. }) = documents else {
        let (out_bthd, logsumexp) = written_out([q_bthd, &k_bthd, &v_bthd]);
        return Attended {
            out_bthd,
            kept: Kept::LogSumExps(vec![logsumexp]),
        };
    };
    let out_bthd = q_bthd.empty_like();
    let one = |stretch: &Stretch| {
        let (out, logsumexp) = written_out([q_bthd, &k_bthd, &v_bthd].map(|x| stretch.of(x)).each_ref());
        stretch.of(&out_bthd).copy_(&out);
        logsumexp
    };
    Attended {
        kept: Kept::LogSumExps(stretches.iter().map(one).collect()),
        out_bthd,
    }
}

/// (d_q, d_k, d_v) of [`attend`].
pub fn attend_backward(
    attended: &Attended,
    q_bthd: &Tensor,
    k_btgd: &Tensor,
    v_btgd: &Tensor,
    d_out_bthd: &Tensor,
    documents: Option<&Documents>,
) -> (Tensor, Tensor, Tensor) {
    let Attended { out_bthd, kept } = attended;
    let logsumexps = match kept {
        Kept::Blocks(logsumexp) => {
            let stretches = stretches(documents, q_bthd);
            return blocks::backward(d_out_bthd, q_bthd, k_btgd, v_btgd, out_bthd, logsumexp, &stretches);
        }
        Kept::LogSumExps(logsumexps) => logsumexps,
        Kept::Flash(kept) => return flash_backward(kept, q_bthd, k_btgd, v_btgd, d_out_bthd, documents),
    };
    let (heads, groups) = (q_bthd.size()[2], k_btgd.size()[2]);
    let (k_bthd, v_bthd) = (share_heads(k_btgd, heads), share_heads(v_btgd, heads));
    let [d_q, d_k, d_v] = match documents {
        None => written_out_backward([d_out_bthd, q_bthd, &k_bthd, &v_bthd, out_bthd], &logsumexps[0]),
        Some(Documents { stretches, .. }) => {
            let whole = [q_bthd.empty_like(), k_bthd.empty_like(), v_bthd.empty_like()];
            for (stretch, logsumexp) in stretches.iter().zip(logsumexps) {
                let here = [d_out_bthd, q_bthd, &k_bthd, &v_bthd, out_bthd].map(|x| stretch.of(x));
                let parts = written_out_backward(here.each_ref(), logsumexp);
                whole.iter().zip(parts).for_each(|(d, part)| stretch.of(d).copy_(&part));
            }
            whole
        }
    };
    (d_q, gather_heads(&d_k, groups), gather_heads(&d_v, groups))
}

/// The documents, or whole rows where there are none.
fn stretches<'a>(documents: Option<&'a Documents>, q_bthd: &Tensor) -> Cow<'a, [Stretch]> {
    let size = q_bthd.size();
    let whole = |row| Stretch {
        row,
        start: 0,
        length: size[1],
    };
    match documents {
        Some(documents) => Cow::Borrowed(&documents.stretches),
        None => (0..size[0]).map(whole).collect(),
    }
}

/// Whether flash attention computes this: on a GPU, in bf16, for heads of the widths it is made for.
fn takes_flash(q_bthd: &Tensor) -> bool {
    let dim = q_bthd.size()[3];
    q_bthd.kind() == Kind::BFloat16 && dim % 8 == 0 && dim <= 256
}

fn flash(q_bthd: &Tensor, k_btgd: &Tensor, v_btgd: &Tensor, documents: Option<&Documents>) -> Attended {
    let sequences = documents.and_then(|documents| documents.sequences.as_ref());
    let [q, k, v] = [q_bthd, k_btgd, v_btgd].map(|x| rows_or_sequences(x, sequences));
    let kept = gpu::forward(&q, &k, &v, sequences);
    Attended {
        out_bthd: kept.out.view_as(q_bthd),
        kept: Kept::Flash(kept),
    }
}

fn flash_backward(
    kept: &Flash,
    q_bthd: &Tensor,
    k_btgd: &Tensor,
    v_btgd: &Tensor,
    d_out_bthd: &Tensor,
    documents: Option<&Documents>,
) -> (Tensor, Tensor, Tensor) {
    let sequences = documents.and_then(|documents| documents.sequences.as_ref());
    let [q, k, v, d_out] = [q_bthd, k_btgd, v_btgd, d_out_bthd].map(|x| rows_or_sequences(x, sequences));
    let (d_q, d_k, d_v) = gpu::backward(kept, &q, &k, &v, &d_out, sequences);
    (d_q.view_as(q_bthd), d_k.view_as(k_btgd), d_v.view_as(v_btgd))
}

/// [b, t, h, d] as it is, or as [b · t, h, d] where sequences are told by their ends.
fn rows_or_sequences(x_bthd: &Tensor, sequences: Option<&Sequences>) -> Tensor {
    let size = x_bthd.size();
    match sequences {
        None => x_bthd.contiguous(),
        Some(_) => x_bthd.contiguous().view([size[0] * size[1], size[2], size[3]]),
    }
}

/// What the scores of the heads computed at once may take.
const SCORES_BYTES: i64 = 256 << 20;

/// (row, first head, heads) that are computed at once.
fn portions(q_bhtd: &Tensor) -> impl Iterator<Item = (i64, i64, i64)> + use<> {
    let size = q_bhtd.size();
    let (rows, heads, time) = (size[0], size[1], size[2]);
    let most = (SCORES_BYTES / (4 * time * time).max(1)).clamp(1, heads.max(1));
    let firsts = move |row| (0..heads).step_by(most as usize).map(move |head| (row, head));
    (0..rows)
        .flat_map(firsts)
        .map(move |(row, head)| (row, head, most.min(heads - head)))
}

/// softmax(q kᵀ / √d + causal) of some heads: f32 [h, t, t], from scores and, if it is known, their logsumexp [h, t].
fn probabilities(q_htd: &Tensor, k_htd: &Tensor, logsumexp_ht: Option<&Tensor>) -> (Tensor, Tensor) {
    let (time, dim) = (q_htd.size()[1], q_htd.size()[2]);
    let later = Tensor::ones([time, time], (Kind::Bool, q_htd.device())).triu(1);
    let scores = q_htd.matmul(&k_htd.transpose(1, 2)) * (1.0 / (dim as f64).sqrt());
    let scores = scores.masked_fill(&later, f64::NEG_INFINITY);
    let logsumexp = logsumexp_ht.map_or_else(|| scores.logsumexp([-1i64], false), Tensor::shallow_clone);
    ((scores - logsumexp.unsqueeze(-1)).exp(), logsumexp)
}

fn some_heads(x_bhtd: &Tensor, (row, head, heads): (i64, i64, i64)) -> Tensor {
    x_bhtd.get(row).narrow(0, head, heads)
}

/// Attention by the formula, in f32, from q, k and v: (out, logsumexp [b, h, t]).
fn written_out(operands_bthd: [&Tensor; 3]) -> (Tensor, Tensor) {
    let [q, k, v] = operands_bthd.map(|x| x.transpose(1, 2));
    let out_bhtd = q.empty_like();
    let size = q.size();
    let logsumexps = Tensor::empty(&size[..3], (Kind::Float, q.device()));
    for portion in portions(&q) {
        let [q, k, v] = [&q, &k, &v].map(|x| some_heads(x, portion).to_kind(Kind::Float));
        let (p, logsumexp) = probabilities(&q, &k, None);
        some_heads(&out_bhtd, portion).copy_(&p.matmul(&v));
        some_heads(&logsumexps, portion).copy_(&logsumexp);
    }
    (out_bhtd.transpose(1, 2), logsumexps)
}

/// [d_q, d_k, d_v] from d_out, q, k, v and out. With P the probabilities: d_v = Pᵀ d_out, d_P = d_out vᵀ,
/// d_scores = P · (d_P − rowsum(d_out · out)).
fn written_out_backward(operands_bthd: [&Tensor; 5], logsumexp_bht: &Tensor) -> [Tensor; 3] {
    let operands = operands_bthd.map(|x| x.transpose(1, 2));
    let [_, q, k, v, _] = &operands;
    let [d_q, d_k, d_v] = [q, k, v].map(Tensor::empty_like);
    let scale = 1.0 / (q.size()[3] as f64).sqrt();
    for portion in portions(q) {
        let [d_out, q, k, v, out] = operands.each_ref().map(|x| some_heads(x, portion).to_kind(Kind::Float));
        let (p, _) = probabilities(&q, &k, Some(&some_heads(logsumexp_bht, portion)));
        let row_sums = (&d_out * out).sum_dim_intlist(-1, true, Kind::Float);
        let d_scores = &p * (d_out.matmul(&v.transpose(1, 2)) - row_sums) * scale;
        some_heads(&d_q, portion).copy_(&d_scores.matmul(&k));
        some_heads(&d_k, portion).copy_(&d_scores.transpose(1, 2).matmul(&q));
        some_heads(&d_v, portion).copy_(&p.transpose(1, 2).matmul(&d_out));
    }
    [d_q, d_k, d_v].map(|d_bhtd| d_bhtd.transpose(1, 2))
}

/// Repeats each key/value head for the query heads that share it.
fn share_heads(x_btgd: &Tensor, heads: i64) -> Tensor {
    let size = x_btgd.size();
    let (rows, time, groups, dim) = (size[0], size[1], size[2], size[3]);
    if groups == heads {
        return x_btgd.shallow_clone();
    }
    x_btgd
        .unsqueeze(3)
        .expand([rows, time, groups, heads / groups, dim], false)
        .reshape([rows, time, heads, dim])
}

/// The transpose of [`share_heads`]: sums over the query heads that share a key/value head.
fn gather_heads(d_bthd: &Tensor, groups: i64) -> Tensor {
    let size = d_bthd.size();
    let (rows, time, heads, dim) = (size[0], size[1], size[2], size[3]);
    if groups == heads {
        return d_bthd.shallow_clone();
    }
    d_bthd
        .reshape([rows, time, groups, heads / groups, dim])
        .sum_dim_intlist(3, false, d_bthd.kind())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::operands::operand;

    /// Blocks of queries, and the formula written out, against libtorch's attention and its autograd.
    fn check(heads: i64, groups: i64, time: i64, dim: i64, documents: Option<&[u32]>) {
        let random = |which, heads| operand(which, &[2, time, heads, dim]) * 2.0;
        let operands = [random(0, heads), random(1, groups), random(2, groups)];
        let d_out = random(3, heads);
        let documents = documents.map(|starts| Documents::new([starts, &[0, 3]].into_iter(), time as usize).unwrap());
        let stretches = stretches(documents.as_ref(), &d_out);

        let leaves = operands.each_ref().map(|x| x.copy().set_requires_grad(true));
        let [q, k, v] = leaves.each_ref().map(|x| share_heads(x, heads).transpose(1, 2));
        let sees = Tensor::zeros([2, 1, time, time], (Kind::Bool, Device::Cpu));
        for stretch in stretches.iter() {
            let block = Tensor::ones([stretch.length; 2], (Kind::Bool, Device::Cpu)).tril(0);
            let mut here = sees.narrow(0, stretch.row, 1);
            for axis in [2, 3] {
                here = here.narrow(axis, stretch.start, stretch.length);
            }
            here.copy_(&block);
        }
        let out =
            Tensor::scaled_dot_product_attention(&q, &k, &v, Some(&sees), 0.0, false, None, false).transpose(1, 2);
        (&out * &d_out).sum(Kind::Float).backward();
        let expected = [out.detach(), leaves[0].grad(), leaves[1].grad(), leaves[2].grad()];

        let [q, k, v] = operands.each_ref();
        let attended = attend(q, k, v, documents.as_ref());
        let (d_q, d_k, d_v) = attend_backward(&attended, q, k, v, &d_out, documents.as_ref());
        close("blocks", &expected, &[attended.out_bthd, d_q, d_k, d_v]);
        if documents.is_none() {
            let (k, v) = (&share_heads(k, heads), &share_heads(v, heads));
            let (out, logsumexp) = written_out([q, k, v]);
            let [d_q, d_k, d_v] = written_out_backward([&d_out, q, k, v, &out], &logsumexp);
            let gathered = [out, d_q, gather_heads(&d_k, groups), gather_heads(&d_v, groups)];
            close("written out", &expected, &gathered);
        }
    }

    /// f32 sums of up to some hundred terms in another order.
    fn close(what: &str, expected: &[Tensor; 4], ours: &[Tensor; 4]) {
        for (name, (expected, ours)) in ["out", "d_q", "d_k", "d_v"].iter().zip(expected.iter().zip(ours)) {
            let difference = (expected - ours).abs().max().double_value(&[]);
            assert!(difference < 5e-5, "{what}, {name}: {difference}");
        }
    }

    #[test]
    fn attention_is_libtorchs() {
        check(3, 3, 11, 8, None);
        check(4, 2, 130, 16, None);
        check(6, 1, 64, 5, None);
        check(4, 2, 150, 16, Some(&[0, 1, 70]));
    }

    #[test]
    fn attention_in_bf16_is_that_in_f32_rounded() {
        let operands = [0, 1, 2, 3].map(|which| operand(which, &[1, 90, 2, 16]).to_kind(Kind::BFloat16));
        let all = |[q, k, v, d_out]: [&Tensor; 4]| {
            let attended = attend(q, k, v, None);
            let (d_q, d_k, d_v) = attend_backward(&attended, q, k, v, d_out, None);
            [attended.out_bthd, d_q, d_k, d_v]
        };
        let wide = operands.each_ref().map(|x| x.to_kind(Kind::Float));
        for (rounded, exact) in all(operands.each_ref()).iter().zip(all(wide.each_ref())) {
            let difference = (rounded.to_kind(Kind::Float) - &exact).abs().max().double_value(&[]);
            let largest = exact.abs().max().double_value(&[]);
            // Half a unit in the last of 8 bits; backward also reads `out` rounded. Not so for any operands: up to 0.0115 was seen in
            // others, and up to 0.0107 in torch's own attention.
            assert!(difference < 6e-3 * largest, "{difference} of {largest}");
        }
    }

    #[test]
    fn documents_of_all_rows_follow_each_other() {
        let starts: [&[u32]; 3] = [&[0, 30, 31], &[], &[0, 200]];
        let documents = Documents::new(starts.into_iter(), 250).expect("several");
        assert_eq!(documents.ends(), [0, 30, 31, 250, 500, 700, 750]);
        assert!(documents.on(Device::Cpu).sequences.is_none());
    }

    #[test]
    fn long_rows_are_computed_some_heads_at_a_time() {
        let long = Tensor::empty([2, 5, 4096, 4], (Kind::Float, Device::Cpu));
        let found: Vec<_> = portions(&long).collect();
        assert_eq!(found, [(0, 0, 4), (0, 4, 1), (1, 0, 4), (1, 4, 1)]);
    }
}
