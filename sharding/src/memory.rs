//! The door to a CPU tensor's memory. Everything else in this workspace sees tensors or slices, never pointers.
#![allow(unsafe_code)]

use half::bf16;
use tch::{Device, Kind, Tensor};

/// Gives the system back what was freed and lies between what is in use: loading leaves holes as large as a vocabulary matrix, which
/// steps would not fill.
pub fn give_back() {
    // SAFETY: it takes no pointer, and touches what nobody uses.
    #[cfg(target_env = "gnu")]
    unsafe {
        libc::malloc_trim(0);
    }
}

fn check(tensor: &Tensor) -> usize {
    assert!(
        tensor.device() == Device::Cpu && tensor.is_contiguous(),
        "memory is read from contiguous CPU tensors only"
    );
    tensor.numel()
}

/// The elements of an f32 tensor.
pub fn f32s(tensor: &Tensor) -> &[f32] {
    assert_eq!(tensor.kind(), Kind::Float);
    let numel = check(tensor);
    if numel == 0 {
        return &[];
    }
    // SAFETY: contiguous f32 storage of `numel` elements on the CPU; it lives as long as `tensor`, which is borrowed.
    // Nothing here runs on other threads that write to it: torch's CPU operations return when they are finished.
    unsafe { std::slice::from_raw_parts(tensor.data_ptr().cast(), numel) }
}

/// The elements of an f32 tensor, to write. Views of the same storage must not be read through another slice
/// meanwhile: the callers hold the one handle to each slice.
pub fn f32s_mut(tensor: &mut Tensor) -> &mut [f32] {
    assert_eq!(tensor.kind(), Kind::Float);
    let numel = check(tensor);
    if numel == 0 {
        return &mut [];
    }
    // SAFETY: as in `f32s`; `tensor` is borrowed mutably.
    unsafe { std::slice::from_raw_parts_mut(tensor.data_ptr().cast(), numel) }
}

/// The elements of a bf16 tensor.
pub fn bf16s(tensor: &Tensor) -> &[bf16] {
    assert_eq!(tensor.kind(), Kind::BFloat16);
    let numel = check(tensor);
    if numel == 0 {
        return &[];
    }
    // SAFETY: as in `f32s`; `bf16` is a transparent u16 of the same layout.
    unsafe { std::slice::from_raw_parts(tensor.data_ptr().cast(), numel) }
}

/// The elements of a bf16 tensor, to write; as with [`f32s_mut`].
pub fn bf16s_mut(tensor: &mut Tensor) -> &mut [bf16] {
    assert_eq!(tensor.kind(), Kind::BFloat16);
    let numel = check(tensor);
    if numel == 0 {
        return &mut [];
    }
    // SAFETY: as in `bf16s`; `tensor` is borrowed mutably.
    unsafe { std::slice::from_raw_parts_mut(tensor.data_ptr().cast(), numel) }
}

/// The elements of a tensor of whole numbers.
pub fn i64s(tensor: &Tensor) -> &[i64] {
    assert_eq!(tensor.kind(), Kind::Int64);
    let numel = check(tensor);
    if numel == 0 {
        return &[];
    }
    // SAFETY: as in `f32s`.
    unsafe { std::slice::from_raw_parts(tensor.data_ptr().cast(), numel) }
}

/// The raw bytes of a tensor of any kind, little-endian as on every machine we run on.
pub fn bytes(tensor: &Tensor) -> &[u8] {
    let numel = check(tensor);
    if numel == 0 {
        return &[];
    }
    // SAFETY: as in `f32s`; any initialised memory may be read as bytes.
    unsafe { std::slice::from_raw_parts(tensor.data_ptr().cast(), numel * tensor.kind().elt_size_in_bytes()) }
}
