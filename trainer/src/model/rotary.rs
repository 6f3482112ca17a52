//! Rotary positions (Su et al. 2021): queries and keys turned by angles that grow with the position.

use tch::{Device, Tensor};

use super::kernels::rotate;
use crate::hf::RopeScaling;

/// Cosines and sines of all angles, head_dim / 2 a position; f32 whatever the model computes in.
pub struct Rotary {
    cos_th: Tensor,
    sin_th: Tensor,
}

impl Rotary {
    /// Angle of position t and pair i: t · θ^(−2i / head_dim), the frequency scaled where the model asks for it.
    pub fn new(length: usize, head_dim: usize, theta: f64, scaling: Option<RopeScaling>) -> Rotary {
        let frequency = |pair: usize| {
            let plain = theta.powf(-2.0 * pair as f64 / head_dim as f64);
            scaling.map_or(plain, |scaling| scaling.scaled(plain))
        };
        let frequencies: Vec<f64> = (0..head_dim / 2).map(frequency).collect();
        let angles = (0..length).flat_map(|t| frequencies.iter().map(move |frequency| t as f64 * frequency));
        let (cos, sin): (Vec<f32>, Vec<f32>) = angles.map(|angle| (angle.cos() as f32, angle.sin() as f32)).unzip();
        let table = |values: &[f32]| Tensor::from_slice(values).view([length as i64, head_dim as i64 / 2]);
        Rotary {
            cos_th: table(&cos),
            sin_th: table(&sin),
        }
    }

    /// The same for tensors of `device`.
    pub fn on(self, device: Device) -> Rotary {
        Rotary {
            cos_th: self.cos_th.to_device(device),
            sin_th: self.sin_th.to_device(device),
        }
    }

    /// Cosines and sines of these positions, [n, head_dim / 2] each.
    pub fn at(&self, positions_n: &Tensor) -> (Tensor, Tensor) {
        (
            self.cos_th.index_select(0, positions_n),
            self.sin_th.index_select(0, positions_n),
        )
    }

    /// Turns pairs (i, i + head_dim / 2), the half-split convention of the published weights.
    pub fn apply(&self, mut x_bthd: Tensor) -> Tensor {
        rotate(&mut x_bthd, &self.cos_th, &self.sin_th, 1.0);
        x_bthd
    }

    /// The transpose of [`Rotary::apply`]: turned by the opposite angle.
    pub fn apply_backward(&self, d_y_bthd: &Tensor) -> Tensor {
        let mut d_x_bthd = d_y_bthd.contiguous();
        // What is contiguous already is handed on as it is, and d_y stays the caller's.
        if d_x_bthd.data_ptr() == d_y_bthd.data_ptr() {
            d_x_bthd = d_x_bthd.copy();
        }
        rotate(&mut d_x_bthd, &self.cos_th, &self.sin_th, -1.0);
        d_x_bthd
    }
}
