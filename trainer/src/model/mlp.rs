//! The second part of a layer, position by position: up to a wider dimension, through an activation, and down again.
//! Axes: n position, d dim, f feed-forward dim.

use configs::Gelu;
use tch::Tensor;

use super::DropoutRows;
use super::kernels::{gelu, gelu_backward, swiglu, swiglu_backward};
use super::linear::Linear;

#[expect(clippy::large_enum_variant, reason = "one a layer, beside megabytes of weights")]
pub enum Mlp {
    /// LLaMA's: y = down(silu(gate(x)) · up(x)).
    SwiGlu { gate: Linear, up: Linear, down: Linear },
    /// GPT-2's: y = proj(gelu(fc(x))).
    Gelu { fc: Linear, proj: Linear, form: Gelu },
}

/// What the activation reads.
pub enum Wide {
    SwiGlu { gate_nf: Tensor, up_nf: Tensor },
    Gelu { fc_nf: Tensor },
}

impl Mlp {
    pub fn up(&self, x_nd: &Tensor, dropout: Option<&DropoutRows>) -> Wide {
        match self {
            Mlp::SwiGlu { gate, up, .. } => Wide::SwiGlu {
                gate_nf: gate.forward(x_nd, dropout),
                up_nf: up.forward(x_nd, dropout),
            },
            Mlp::Gelu { fc, .. } => Wide::Gelu {
                fc_nf: fc.forward(x_nd, dropout),
            },
        }
    }

    pub fn activate(&self, wide: &Wide) -> Tensor {
        match (self, wide) {
            (Mlp::SwiGlu { .. }, Wide::SwiGlu { gate_nf, up_nf }) => swiglu(gate_nf, up_nf),
            (Mlp::Gelu { form, .. }, Wide::Gelu { fc_nf }) => gelu(fc_nf, *form),
            _ => unreachable!("an MLP reads what it made itself"),
        }
    }

    pub fn down(&self, activated_nf: &Tensor, dropout: Option<&DropoutRows>) -> Tensor {
        match self {
            Mlp::SwiGlu { down, .. } => down.forward(activated_nf, dropout),
            Mlp::Gelu { proj, .. } => proj.forward(activated_nf, dropout),
        }
    }

    /// d_x; adds to the gradients of what trains. The operands are those of the forward pass.
    pub fn backward(
        &mut self,
        x_nd: &Tensor,
        wide: &Wide,
        activated_nf: &Tensor,
        dropout: Option<&DropoutRows>,
        d_y_nd: &Tensor,
    ) -> Tensor {
        match (self, wide) {
            (Mlp::SwiGlu { gate, up, down }, Wide::SwiGlu { gate_nf, up_nf }) => {
                let d_activated_nf = down.backward(activated_nf, dropout, d_y_nd);
                let (d_gate_nf, d_up_nf) = swiglu_backward(gate_nf, up_nf, &d_activated_nf);
                gate.backward(x_nd, dropout, &d_gate_nf) + up.backward(x_nd, dropout, &d_up_nf)
            }
            (Mlp::Gelu { fc, proj, form }, Wide::Gelu { fc_nf }) => {
                let d_activated_nf = proj.backward(activated_nf, dropout, d_y_nd);
                let d_fc_nf = gelu_backward(fc_nf, *form, &d_activated_nf);
                fc.backward(x_nd, dropout, &d_fc_nf)
            }
            _ => unreachable!("an MLP reads what it made itself"),
        }
    }

    /// In registration order.
    pub fn linears(&self) -> Vec<&Linear> {
        match self {
            Mlp::SwiGlu { gate, up, down } => vec![gate, up, down],
            Mlp::Gelu { fc, proj, .. } => vec![fc, proj],
        }
    }

    pub fn linears_mut(&mut self) -> Vec<&mut Linear> {
        match self {
            Mlp::SwiGlu { gate, up, down } => vec![gate, up, down],
            Mlp::Gelu { fc, proj, .. } => vec![fc, proj],
        }
    }
}
