//! Causal scaled dot-product attention through libtorch's fused kernels, without autograd.
//! Source: Dao et al. 2022, "FlashAttention": softmax statistics are kept, probabilities are not.

use tch::Tensor;

/// What the backward pass reads.
pub struct Attended {
    pub out_bthd: Tensor,
    logsumexp: Tensor,
}

/// softmax(q kᵀ / √d + causal) v. Keys and values may have fewer heads than queries (GQA, Ainslie et al. 2023).
pub fn attend(q_bthd: &Tensor, k_btgd: &Tensor, v_btgd: &Tensor) -> Attended {
    let heads = q_bthd.size()[2];
    let (k_bthd, v_bthd) = (share_heads(k_btgd, heads), share_heads(v_btgd, heads));
    let (out, logsumexp) = Tensor::internal_scaled_dot_product_flash_attention_for_cpu(
        &q_bthd.transpose(1, 2),
        &k_bthd.transpose(1, 2),
        &v_bthd.transpose(1, 2),
        0.0,
        true,
        None::<&Tensor>,
        None,
    );
    Attended {
        out_bthd: out.transpose(1, 2),
        logsumexp,
    }
}

/// (d_q, d_k, d_v) of [`attend`].
pub fn attend_backward(
    attended: &Attended,
    q_bthd: &Tensor,
    k_btgd: &Tensor,
    v_btgd: &Tensor,
    d_out_bthd: &Tensor,
) -> (Tensor, Tensor, Tensor) {
    let (heads, groups) = (q_bthd.size()[2], k_btgd.size()[2]);
    let (k_bthd, v_bthd) = (share_heads(k_btgd, heads), share_heads(v_btgd, heads));
    let (d_q, d_k, d_v) = Tensor::internal_scaled_dot_product_flash_attention_for_cpu_backward(
        &d_out_bthd.transpose(1, 2),
        &q_bthd.transpose(1, 2),
        &k_bthd.transpose(1, 2),
        &v_bthd.transpose(1, 2),
        &attended.out_bthd.transpose(1, 2),
        &attended.logsumexp,
        0.0,
        true,
        None::<&Tensor>,
        None,
    );
    let sum_shared = |d_bhtd: Tensor| gather_heads(&d_bhtd.transpose(1, 2), groups);
    (d_q.transpose(1, 2), sum_shared(d_k), sum_shared(d_v))
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
