//! Fused kernels of the model's stages: what libtorch would do in many passes over memory, in one or two. Each function
//! computes where its tensors lie: on the CPU by `cpu.rs`, which has the formulas, on a GPU by `cuda.rs` and `kernels.cu`.

pub(super) mod cpu;
mod cuda;

use configs::Gelu;
use tch::{Device, Kind, Tensor};

use crate::random;

/// Calls the function of this name where the tensor lies.
macro_rules! where_it_lies {
    ($tensor:expr, $function:ident($($argument:expr),*)) => {
        match $tensor.device() {
            Device::Cpu => cpu::$function($($argument),*),
            _ => cuda::$function($($argument),*),
        }
    };
}

/// −ln p(target) of each row of `logits_nv`, nats, f64, on its device; the logits become their gradient, softmax − onehot. Of a
/// row the first `pieces` are logits; what follows is padding, which has no probability and the gradient 0.
pub fn cross_entropy(logits_nv: &mut Tensor, pieces: i64, target_n: &Tensor) -> Tensor {
    where_it_lies!(logits_nv, cross_entropy(logits_nv, pieces, target_n))
}

/// −ln p(target) of the first `pieces` of each row of `logits_nv`, nats, f64, on its device.
pub fn nll(logits_nv: &Tensor, pieces: i64, target_n: &Tensor) -> Tensor {
    where_it_lies!(logits_nv, nll(logits_nv, pieces, target_n))
}

/// RMSNorm of each row (Zhang and Sennrich 2019): x / √(mean(x²) + ε), rounded, times w.
///
/// x is of the residual stream, which may be f32 where all else is bf16: norms read its kind and give that of their weights,
/// and what their derivatives take and give beside d_y is of x's kind.
pub fn rms_norm(x_nd: &Tensor, weight_d: &Tensor, epsilon: f64) -> Tensor {
    where_it_lies!(x_nd, rms_norm(x_nd, weight_d, epsilon))
}

/// `passed_by` + d_x of [`rms_norm`]; `passed_by` is the gradient that reaches x beside the norm.
pub fn rms_norm_backward(
    x_nd: &Tensor,
    weight_d: &Tensor,
    epsilon: f64,
    d_y_nd: &Tensor,
    passed_by_nd: Option<&Tensor>,
) -> Tensor {
    where_it_lies!(x_nd, rms_norm_backward(x_nd, weight_d, epsilon, d_y_nd, passed_by_nd))
}

/// d_w of [`rms_norm`], f32.
pub fn rms_norm_weight_gradient(x_nd: &Tensor, epsilon: f64, d_y_nd: &Tensor) -> Tensor {
    where_it_lies!(x_nd, rms_norm_weight_gradient(x_nd, epsilon, d_y_nd))
}

/// LayerNorm of each row (Ba et al. 2016): (x − mean) / √(variance + ε) · w + b.
pub fn layer_norm(x_nd: &Tensor, weight_d: &Tensor, bias_d: &Tensor, epsilon: f64) -> Tensor {
    where_it_lies!(x_nd, layer_norm(x_nd, weight_d, bias_d, epsilon))
}

/// `passed_by` + d_x of [`layer_norm`]; `passed_by` is the gradient that reaches x beside the norm.
pub fn layer_norm_backward(
    x_nd: &Tensor,
    weight_d: &Tensor,
    epsilon: f64,
    d_y_nd: &Tensor,
    passed_by_nd: Option<&Tensor>,
) -> Tensor {
    where_it_lies!(x_nd, layer_norm_backward(x_nd, weight_d, epsilon, d_y_nd, passed_by_nd))
}

/// (d_w, d_b) of [`layer_norm`], f32: Σ_n d_y · z and Σ_n d_y with z = (x − mean) / √(variance + ε), by libtorch's own operations
/// everywhere.
pub fn layer_norm_weight_gradients(x_nd: &Tensor, epsilon: f64, d_y_nd: &Tensor) -> (Tensor, Tensor) {
    let (x_nd, d_y_nd) = (x_nd.to_kind(Kind::Float), d_y_nd.to_kind(Kind::Float));
    let d = x_nd.size()[1];
    let (z_nd, _, _) = x_nd.native_layer_norm([d], None::<&Tensor>, None, epsilon);
    let d_bias_d = d_y_nd.sum_dim_intlist(0, false, Kind::Float);
    ((d_y_nd * z_nd).sum_dim_intlist(0, false, Kind::Float), d_bias_d)
}

/// GELU (Hendrycks and Gimpel 2016) in one of its two forms.
pub fn gelu(x_nf: &Tensor, form: Gelu) -> Tensor {
    where_it_lies!(x_nf, gelu(x_nf, form))
}

/// d_x of [`gelu`].
pub fn gelu_backward(x_nf: &Tensor, form: Gelu, d_y_nf: &Tensor) -> Tensor {
    where_it_lies!(x_nf, gelu_backward(x_nf, form, d_y_nf))
}

/// SwiGLU (Shazeer 2020): silu(gate) · up.
pub fn swiglu(gate_nf: &Tensor, up_nf: &Tensor) -> Tensor {
    where_it_lies!(gate_nf, swiglu(gate_nf, up_nf))
}

/// (d_gate, d_up) of [`swiglu`].
pub fn swiglu_backward(gate_nf: &Tensor, up_nf: &Tensor, d_y_nf: &Tensor) -> (Tensor, Tensor) {
    where_it_lies!(gate_nf, swiglu_backward(gate_nf, up_nf, d_y_nf))
}

/// Turns pairs (i, i + d/2) of every head in place, by the angles of the position: `cos_th` and `sin_th` hold d/2 values a
/// position, f32; `direction` is 1 or −1. `x_bthd` is contiguous.
pub fn rotate(x_bthd: &mut Tensor, cos_th: &Tensor, sin_th: &Tensor, direction: f32) {
    where_it_lies!(x_bthd, rotate(x_bthd, cos_th, sin_th, direction));
}

/// Fills `mask_nd`: 0 with probability `p`, else 1 / (1 − p). Row n's elements are drawn from `streams[n]`, in order.
pub fn dropout_mask(mask_nd: &mut Tensor, streams: &[random::Stream], p: f64) {
    where_it_lies!(mask_nd, dropout_mask(mask_nd, streams, p));
}

/// 8-bit floating-point rows (E4M3), each with a factor, f32: x ≈ factor · y, and the largest of each row's y is 448.
pub fn quantize_rows(x_nd: &Tensor) -> (Tensor, Tensor) {
    where_it_lies!(x_nd, quantize_rows(x_nd))
}
