//! Causal scaled dot-product attention through libtorch's fused kernels, without autograd.
//! Source: Dao et al. 2022, "FlashAttention": softmax statistics are kept, probabilities are not.

use tch::Tensor;

/// What the backward pass reads.
pub struct Attended {
    pub out_bthd: Tensor,
    /// One for the whole micro-batch, or one a document.
    logsumexps: Vec<Tensor>,
}

/// The documents of a micro-batch, where they do not see each other. Between them they hold every position once.
pub struct Documents(Vec<Stretch>);

/// Consecutive positions of one row.
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
        (!alone).then_some(Documents(stretches))
    }
}

impl Stretch {
    /// The stretch of a tensor [b, t, …], as a view.
    fn of(&self, x_bt: &Tensor) -> Tensor {
        x_bt.narrow(0, self.row, 1).narrow(1, self.start, self.length)
    }
}

/// softmax(q kᵀ / √d + causal) v. Keys and values may have fewer heads than queries (GQA, Ainslie et al. 2023).
///
/// With `documents` a position sees those before it in its own document only: the block-diagonal mask, but as one kernel
/// call a document, so that neither the mask nor what it would strike out is ever computed.
pub fn attend(q_bthd: &Tensor, k_btgd: &Tensor, v_btgd: &Tensor, documents: Option<&Documents>) -> Attended {
    let heads = q_bthd.size()[2];
    let (k_bthd, v_bthd) = (share_heads(k_btgd, heads), share_heads(v_btgd, heads));
    let Some(Documents(stretches)) = documents else {
        let (out_bthd, logsumexp) = causal(q_bthd, &k_bthd, &v_bthd);
        return Attended {
            out_bthd,
            logsumexps: vec![logsumexp],
        };
    };
    let out_bthd = q_bthd.empty_like();
    let one = |stretch: &Stretch| {
        let (out, logsumexp) = causal(&stretch.of(q_bthd), &stretch.of(&k_bthd), &stretch.of(&v_bthd));
        stretch.of(&out_bthd).copy_(&out);
        logsumexp
    };
    Attended {
        logsumexps: stretches.iter().map(one).collect(),
        out_bthd,
    }
}

fn causal(q_bthd: &Tensor, k_bthd: &Tensor, v_bthd: &Tensor) -> (Tensor, Tensor) {
    let (out, logsumexp) = Tensor::internal_scaled_dot_product_flash_attention_for_cpu(
        &q_bthd.transpose(1, 2),
        &k_bthd.transpose(1, 2),
        &v_bthd.transpose(1, 2),
        0.0,
        true,
        None::<&Tensor>,
        None,
    );
    (out.transpose(1, 2), logsumexp)
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
    let (heads, groups) = (q_bthd.size()[2], k_btgd.size()[2]);
    let (k_bthd, v_bthd) = (share_heads(k_btgd, heads), share_heads(v_btgd, heads));
    let Attended { out_bthd, logsumexps } = attended;
    let [d_q, d_k, d_v] = match documents {
        None => causal_backward([d_out_bthd, q_bthd, &k_bthd, &v_bthd, out_bthd], &logsumexps[0]),
        Some(Documents(stretches)) => {
            let whole = [q_bthd.empty_like(), k_bthd.empty_like(), v_bthd.empty_like()];
            for (stretch, logsumexp) in stretches.iter().zip(logsumexps) {
                let here = [d_out_bthd, q_bthd, &k_bthd, &v_bthd, out_bthd].map(|x| stretch.of(x));
                let parts = causal_backward(here.each_ref(), logsumexp);
                whole.iter().zip(parts).for_each(|(d, part)| stretch.of(d).copy_(&part));
            }
            whole
        }
    };
    (d_q, gather_heads(&d_k, groups), gather_heads(&d_v, groups))
}

/// [d_q, d_k, d_v] from d_out, q, k, v and out, all bthd.
fn causal_backward(operands: [&Tensor; 5], logsumexp: &Tensor) -> [Tensor; 3] {
    let [d_out, q, k, v, out] = operands.map(|x_bthd| x_bthd.transpose(1, 2));
    let (d_q, d_k, d_v) = Tensor::internal_scaled_dot_product_flash_attention_for_cpu_backward(
        &d_out,
        &q,
        &k,
        &v,
        &out,
        logsumexp,
        0.0,
        true,
        None::<&Tensor>,
        None,
    );
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
