//! Fused kernels of the model's stages: what libtorch would do in many passes over memory, in one or two.

mod cpu;

pub use cpu::{
    cross_entropy, nll, rms_norm, rms_norm_backward, rms_norm_weight_gradient, rotate, swiglu, swiglu_backward,
};
