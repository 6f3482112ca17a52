//! libtorch's flash attention. `tch` has no function for its forward pass, libtorch's C interface has.
//! Source: Dao 2023, "FlashAttention-2".

use std::ffi::c_void;
use std::ptr::{null, null_mut};

use tch::Tensor;

use super::symbol;

/// A tensor as libtorch's C interface takes it: a pointer to an `at::Tensor`, as `tch` holds it.
type Handle = *mut c_void;

/// torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h, libtorch 2.11.0.
type FlashForward = unsafe extern "C" fn(
    query: Handle,
    key: Handle,
    value: Handle,
    cum_seq_q: *const Handle,
    cum_seq_k: *const Handle,
    max_q: i64,
    max_k: i64,
    dropout_p: f64,
    is_causal: i32,
    return_debug_mask: i32,
    scale: *const f64,
    window_size_left: *const i64,
    window_size_right: *const i64,
    seqused_k: *const Handle,
    alibi_slopes: *const Handle,
    out: *mut Handle,
    logsumexp: *mut Handle,
    rng_state: *mut Handle,
    unused: *mut Handle,
    debug_mask: *mut Handle,
) -> i32;

pub(super) const FORWARD: &str = "aoti_torch_cuda__flash_attention_forward";

/// Where sequences begin and end that lie one after the other.
pub struct Sequences {
    /// 0, then the end of each: i32, on the GPU.
    pub ends: Tensor,
    /// Of the longest.
    pub longest: i64,
}

/// What the backward pass needs of the forward pass.
pub struct Flash {
    pub out: Tensor,
    pub logsumexp: Tensor,
    rng_state: Tensor,
    unused: Tensor,
}

/// Causal attention on a GPU: q [b, t, h, d], k and v [b, t, g, d] with g dividing h; with `sequences`, [n, h, d] and
/// [n, g, d]. bf16, d a multiple of 8 up to 256, the last axis dense.
pub fn forward(q: &Tensor, k: &Tensor, v: &Tensor, sequences: Option<&Sequences>) -> Flash {
    let longest = longest(q, sequences);
    let ends = sequences.map(|sequences| handle(&sequences.ends));
    let ends = ends.as_ref().map_or(null(), std::ptr::from_ref);
    let mut made = [null_mut(); 5];
    let [out, logsumexp, rng_state, unused, debug_mask] = &mut made;
    // SAFETY: the type is the header's. Handles are those of tensors borrowed for the call, which only reads them; null
    // pointers are options left out. On success five new tensors are written, which are ours to free.
    let code = unsafe {
        let forward = symbol::<FlashForward>(FORWARD).unwrap_or_else(|e| panic!("{e}"));
        forward(
            handle(q),
            handle(k),
            handle(v),
            ends,
            ends,
            longest,
            longest,
            0.0,
            1,
            0,
            null(),
            null(),
            null(),
            null(),
            null(),
            out,
            logsumexp,
            rng_state,
            unused,
            debug_mask,
        )
    };
    assert_eq!(
        code, 0,
        "libtorch refused flash attention on {:?} {:?}; see its message above",
        q, k
    );
    // SAFETY: each was made by the call above and is owned by one `Tensor` from here on.
    let [out, logsumexp, rng_state, unused, _] = made.map(|handle| unsafe { Tensor::from_ptr(handle.cast()) });
    Flash {
        out,
        logsumexp,
        rng_state,
        unused,
    }
}

/// (d_q, d_k, d_v) of [`forward`].
pub fn backward(
    flash: &Flash,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    d_out: &Tensor,
    sequences: Option<&Sequences>,
) -> (Tensor, Tensor, Tensor) {
    let longest = longest(q, sequences);
    let ends = sequences.map_or_else(Tensor::new, |sequences| sequences.ends.shallow_clone());
    Tensor::internal_flash_attention_backward(
        d_out,
        q,
        k,
        v,
        &flash.out,
        &flash.logsumexp,
        &ends,
        &ends,
        longest,
        longest,
        0.0,
        true,
        &flash.rng_state,
        &flash.unused,
        None,
        None,
        None,
    )
}

fn longest(q: &Tensor, sequences: Option<&Sequences>) -> i64 {
    sequences.map_or_else(|| q.size()[1], |sequences| sequences.longest)
}

fn handle(tensor: &Tensor) -> Handle {
    tensor.as_ptr().cast_mut().cast()
}
