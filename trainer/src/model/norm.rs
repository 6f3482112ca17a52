//! The norms before each part of a layer and before the head: RMSNorm, or LayerNorm where there is a bias.
//! Axes: n position, d dim.

use tch::{Kind, Tensor};

use super::Weight;
use super::kernels::{
    layer_norm, layer_norm_backward, layer_norm_weight_gradients, rms_norm, rms_norm_backward, rms_norm_weight_gradient,
};

pub struct Norm {
    pub weight_d: Weight,
    /// There in LayerNorm, which also takes off the mean; none in RMSNorm.
    pub bias_d: Option<Weight>,
    pub epsilon: f64,
}

impl Norm {
    /// Of the weights' kind, whatever the stream's is.
    pub fn forward(&self, x_nd: &Tensor) -> Tensor {
        match &self.bias_d {
            None => rms_norm(x_nd, &self.weight_d.value, self.epsilon),
            Some(bias_d) => layer_norm(x_nd, &self.weight_d.value, &bias_d.value, self.epsilon),
        }
    }

    /// `passed_by` + d_x, of x's kind; adds to the gradients of what trains. `passed_by` is the gradient that reaches x
    /// beside the norm.
    pub fn backward(&mut self, x_nd: &Tensor, d_y_nd: &Tensor, passed_by_nd: Option<&Tensor>) -> Tensor {
        let Norm {
            weight_d,
            bias_d,
            epsilon,
        } = self;
        let weight = &weight_d.value;
        let Some(bias_d) = bias_d else {
            let d_x_nd = rms_norm_backward(x_nd, weight, *epsilon, d_y_nd, passed_by_nd);
            weight_d.accumulate(|| rms_norm_weight_gradient(x_nd, *epsilon, d_y_nd));
            return d_x_nd;
        };
        let d_x_nd = layer_norm_backward(x_nd, weight, *epsilon, d_y_nd, passed_by_nd);
        if weight_d.grad.is_some() || bias_d.grad.is_some() {
            let (d_weight_d, d_bias_d) = layer_norm_weight_gradients(x_nd, *epsilon, d_y_nd);
            weight_d.accumulate(|| d_weight_d);
            bias_d.accumulate(|| d_bias_d);
        }
        d_x_nd
    }

    pub fn weights(&self) -> impl Iterator<Item = &Weight> {
        std::iter::once(&self.weight_d).chain(&self.bias_d)
    }

    pub fn weights_mut(&mut self) -> impl Iterator<Item = &mut Weight> {
        std::iter::once(&mut self.weight_d).chain(&mut self.bias_d)
    }

    /// The same, frozen and in f32.
    pub fn in_f32(&self) -> Norm {
        let f32 = |weight: &Weight| Weight::frozen(weight.name.clone(), weight.value.to_kind(Kind::Float));
        Norm {
            weight_d: f32(&self.weight_d),
            bias_d: self.bias_d.as_ref().map(f32),
            epsilon: self.epsilon,
        }
    }
}
