//! The element-wise parts of a LLaMA layer with their derivatives written out: RMSNorm, rotary positions, SwiGLU.
//! Axes: b row, t time, h head, d dim; n = b·t flattened.

use tch::{Device, Kind, Tensor};

use crate::hf::RopeScaling;

/// RMSNorm (Zhang and Sennrich 2019): y = x / √(mean(x²) + ε) · w, statistics in f32.
pub fn rms_norm(x_nd: &Tensor, weight_d: &Tensor, epsilon: f64) -> Tensor {
    let x = x_nd.to_kind(Kind::Float);
    let inverse_rms = inverse_rms(&x, epsilon);
    (x * inverse_rms).to_kind(x_nd.kind()) * weight_d
}

/// d_x of [`rms_norm`]: with g = d_y·w and r = 1/√(mean(x²) + ε), d_x = r·g − x·r³·mean(g·x).
pub fn rms_norm_backward(x_nd: &Tensor, weight_d: &Tensor, epsilon: f64, d_y_nd: &Tensor) -> Tensor {
    let x = x_nd.to_kind(Kind::Float);
    let r = inverse_rms(&x, epsilon);
    let g = d_y_nd.to_kind(Kind::Float) * weight_d.to_kind(Kind::Float);
    let projection = (&g * &x).mean_dim(-1, true, Kind::Float) * r.pow_tensor_scalar(3);
    (g * r - x * projection).to_kind(x_nd.kind())
}

/// d_w of [`rms_norm`]: Σ_n d_y · x·r, f32.
pub fn rms_norm_weight_gradient(x_nd: &Tensor, epsilon: f64, d_y_nd: &Tensor) -> Tensor {
    let x = x_nd.to_kind(Kind::Float);
    let r = inverse_rms(&x, epsilon);
    (d_y_nd.to_kind(Kind::Float) * x * r).sum_dim_intlist(0, false, Kind::Float)
}

fn inverse_rms(x_nd: &Tensor, epsilon: f64) -> Tensor {
    (x_nd.square().mean_dim(-1, true, Kind::Float) + epsilon).rsqrt()
}

/// Cosines and sines of rotary positions (Su et al. 2021), [t, 1, head_dim / 2].
pub struct Rotary {
    cos_t1d: Tensor,
    sin_t1d: Tensor,
}

impl Rotary {
    /// Angle of position t and pair i: t · θ^(−2i / head_dim), the frequency scaled where the model asks for it.
    pub fn new(length: usize, head_dim: usize, theta: f64, scaling: Option<RopeScaling>, kind: Kind) -> Rotary {
        let frequency = |pair: usize| {
            let plain = theta.powf(-2.0 * pair as f64 / head_dim as f64);
            scaling.map_or(plain, |scaling| scaling.scaled(plain))
        };
        let frequencies: Vec<f64> = (0..head_dim / 2).map(frequency).collect();
        let frequencies = Tensor::from_slice(&frequencies);
        let positions = Tensor::arange(length as i64, (Kind::Double, Device::Cpu));
        let angles = positions.outer(&frequencies).unsqueeze(1);
        Rotary {
            cos_t1d: angles.cos().to_kind(kind),
            sin_t1d: angles.sin().to_kind(kind),
        }
    }

    /// Rotates pairs (i, i + head_dim / 2), the half-split convention of the published weights.
    pub fn apply(&self, x_bthd: &Tensor) -> Tensor {
        self.rotate(x_bthd, 1.0)
    }

    /// The transpose of [`Rotary::apply`]: the rotation by the opposite angle.
    pub fn apply_backward(&self, d_y_bthd: &Tensor) -> Tensor {
        self.rotate(d_y_bthd, -1.0)
    }

    fn rotate(&self, x_bthd: &Tensor, direction: f64) -> Tensor {
        let length = x_bthd.size()[1];
        let cos = self.cos_t1d.narrow(0, 0, length);
        let sin = self.sin_t1d.narrow(0, 0, length) * direction;
        let halves = x_bthd.chunk(2, -1);
        let (first, second) = (&halves[0], &halves[1]);
        Tensor::cat(&[first * &cos - second * &sin, second * &cos + first * &sin], -1)
    }
}

/// SwiGLU (Shazeer 2020): silu(gate) · up.
pub fn swiglu(gate_nf: &Tensor, up_nf: &Tensor) -> Tensor {
    gate_nf.silu() * up_nf
}

/// (d_gate, d_up) of [`swiglu`]; silu′(g) = σ(g)·(1 + g·(1 − σ(g))).
pub fn swiglu_backward(gate_nf: &Tensor, up_nf: &Tensor, d_y_nf: &Tensor) -> (Tensor, Tensor) {
    let sigmoid = gate_nf.sigmoid();
    let silu = gate_nf * &sigmoid;
    let d_up = d_y_nf * &silu;
    // silu′ = σ + silu·(1 − σ)
    let slope = &sigmoid + silu * (1.0 - &sigmoid);
    let d_gate = d_y_nf * up_nf * slope;
    (d_gate, d_up)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Compares a hand-written derivative with autograd's in f64, where only a wrong formula differs by 1e-9.
    fn check(
        inputs: &[Tensor],
        forward: impl Fn(&[Tensor]) -> Tensor,
        backward: impl Fn(&[Tensor], &Tensor) -> Vec<Tensor>,
    ) {
        let leaves: Vec<Tensor> = inputs.iter().map(|x| x.copy().set_requires_grad(true)).collect();
        let y = forward(&leaves);
        let d_y = Tensor::randn(y.size(), (y.kind(), Device::Cpu));
        (y * &d_y).sum(y_kind(&d_y)).backward();
        for (leaf, hand) in leaves.iter().zip(backward(inputs, &d_y)) {
            let difference = f64::try_from((leaf.grad() - hand).abs().max()).unwrap();
            assert!(difference < 2e-5, "difference {difference}");
        }
    }

    fn y_kind(tensor: &Tensor) -> Kind {
        tensor.kind()
    }

    fn random(shape: &[i64]) -> Tensor {
        tch::manual_seed(7);
        Tensor::randn(shape, (Kind::Float, Device::Cpu))
    }

    #[test]
    fn rms_norms_derivative_is_autograds() {
        let weight = random(&[12]) + 1.0;
        let y = |x: &[Tensor]| rms_norm(&x[0], &weight, 1e-5);
        check(&[random(&[5, 12])], y, |x, d_y| {
            vec![rms_norm_backward(&x[0], &weight, 1e-5, d_y)]
        });
        let x = random(&[5, 12]);
        check(
            &[weight],
            |weight| rms_norm(&x, &weight[0], 1e-5),
            |_, d_y| vec![rms_norm_weight_gradient(&x, 1e-5, d_y)],
        );
    }

    #[test]
    fn rotarys_derivative_is_autograds() {
        let rotary = Rotary::new(9, 8, 10_000.0, None, Kind::Float);
        check(
            &[random(&[2, 6, 3, 8])],
            |x| rotary.apply(&x[0]),
            |_, d_y| vec![rotary.apply_backward(d_y)],
        );
    }

    #[test]
    fn swiglus_derivative_is_autograds() {
        let inputs = [random(&[4, 6]), random(&[4, 6]).flip([0])];
        check(
            &inputs,
            |x| swiglu(&x[0], &x[1]),
            |x, d_y| {
                let (d_gate, d_up) = swiglu_backward(&x[0], &x[1], d_y);
                vec![d_gate, d_up]
            },
        );
    }
}
