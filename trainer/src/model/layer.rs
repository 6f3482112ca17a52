//! One transformer layer as an explicit stage: forward keeps what the recompute mode allows, backward is written out.
//! Source: Touvron et al. 2023, "Llama 2", §2.2.
//! Axes: b row, t time, h head, g key/value head, d dim, f feed-forward dim; n = b·t flattened.

use configs::Recompute;
use tch::Tensor;

use super::attention::{Attended, attend, attend_backward};
use super::kernels::{rms_norm, rms_norm_backward, rms_norm_weight_gradient, swiglu, swiglu_backward};
use super::linear::Linear;
use super::{Pass, Weight};

pub struct Layer {
    pub attention_norm_d: Weight,
    pub q: Linear,
    pub k: Linear,
    pub v: Linear,
    pub o: Linear,
    pub mlp_norm_d: Weight,
    pub gate: Linear,
    pub up: Linear,
    pub down: Linear,
    pub heads: i64,
    pub kv_heads: i64,
    pub head_dim: i64,
    pub epsilon: f64,
}

/// What forward leaves for backward. The layer's input always; the rest may be made again from it.
pub struct Saved {
    x_btd: Tensor,
    inner: Option<Inner>,
}

/// What GEMMs and attention made on the way from x to y.
struct Inner {
    q_bthd: Tensor,
    k_btgd: Tensor,
    v_btgd: Tensor,
    attended: Attended,
    /// x plus the attention's output.
    middle_nd: Tensor,
    gate_nf: Tensor,
    up_nf: Tensor,
    /// Norms' and SwiGLU's results: the first to be recomputed, since they cost bandwidth only.
    cheap: Option<Cheap>,
}

struct Cheap {
    normed_1_nd: Tensor,
    normed_2_nd: Tensor,
    activated_nf: Tensor,
}

impl Layer {
    pub fn forward(&self, x_btd: Tensor, pass: &Pass) -> (Tensor, Saved) {
        let mut inner = self.up_to_activation(&x_btd, pass);
        let cheap = inner.cheap.as_ref().expect("forward makes it");
        let out_nd = self.down.forward(&cheap.activated_nf, pass.dropout);
        let y_btd = (&inner.middle_nd + out_nd).view_as(&x_btd);
        let inner = match pass.recompute {
            Recompute::None => Some(inner),
            Recompute::Selective => {
                inner.cheap = None;
                Some(inner)
            }
            Recompute::Full => None,
        };
        (y_btd, Saved { x_btd, inner })
    }

    pub fn backward(&mut self, saved: Saved, d_y_btd: Tensor, pass: &Pass) -> Tensor {
        let Saved { x_btd, inner } = saved;
        let inner = inner.unwrap_or_else(|| self.up_to_activation(&x_btd, pass));
        let Inner {
            q_bthd,
            k_btgd,
            v_btgd,
            attended,
            middle_nd,
            gate_nf,
            up_nf,
            cheap,
        } = inner;
        let size = x_btd.size();
        let dim = *size.last().expect("three axes");
        let x_nd = x_btd.view([-1, dim]);
        let Cheap {
            normed_1_nd,
            normed_2_nd,
            activated_nf,
        } = cheap.unwrap_or_else(|| Cheap {
            normed_1_nd: rms_norm(&x_nd, &self.attention_norm_d.value, self.epsilon),
            normed_2_nd: rms_norm(&middle_nd, &self.mlp_norm_d.value, self.epsilon),
            activated_nf: swiglu(&gate_nf, &up_nf),
        });
        let dropout = pass.dropout;
        let d_y_nd = d_y_btd.view([-1, dim]);

        // MLP: y = middle + down(silu(gate(norm(middle))) · up(norm(middle)))
        let d_activated_nf = self.down.backward(&activated_nf, dropout, &d_y_nd);
        let (d_gate_nf, d_up_nf) = swiglu_backward(&gate_nf, &up_nf, &d_activated_nf);
        let d_normed_2_nd =
            self.gate.backward(&normed_2_nd, dropout, &d_gate_nf) + self.up.backward(&normed_2_nd, dropout, &d_up_nf);
        let epsilon = self.epsilon;
        let d_middle_nd = rms_norm_backward(
            &middle_nd,
            &self.mlp_norm_d.value,
            epsilon,
            &d_normed_2_nd,
            Some(&d_y_nd),
        );
        self.mlp_norm_d
            .accumulate(|| rms_norm_weight_gradient(&middle_nd, epsilon, &d_normed_2_nd));

        // Attention: middle = x + o(attend(rope(q), rope(k), v))
        let attended_nd = attended.out_bthd.reshape([-1, self.heads * self.head_dim]);
        let d_attended_bthd = self
            .o
            .backward(&attended_nd, dropout, &d_middle_nd)
            .view_as(&attended.out_bthd);
        let (d_q, d_k, d_v) = attend_backward(&attended, &q_bthd, &k_btgd, &v_btgd, &d_attended_bthd, pass.documents);
        let flat = |d: Tensor, heads: i64| d.reshape([-1, heads * self.head_dim]);
        let d_q_nd = flat(pass.rotary.apply_backward(&d_q), self.heads);
        let d_k_nd = flat(pass.rotary.apply_backward(&d_k), self.kv_heads);
        let d_v_nd = flat(d_v, self.kv_heads);
        let d_normed_1_nd = self.q.backward(&normed_1_nd, dropout, &d_q_nd)
            + self.k.backward(&normed_1_nd, dropout, &d_k_nd)
            + self.v.backward(&normed_1_nd, dropout, &d_v_nd);
        let d_x_nd = rms_norm_backward(
            &x_nd,
            &self.attention_norm_d.value,
            epsilon,
            &d_normed_1_nd,
            Some(&d_middle_nd),
        );
        self.attention_norm_d
            .accumulate(|| rms_norm_weight_gradient(&x_nd, epsilon, &d_normed_1_nd));
        d_x_nd.view(size.as_slice())
    }

    /// All of the layer but the last GEMM, whose result backward does not read.
    fn up_to_activation(&self, x_btd: &Tensor, pass: &Pass) -> Inner {
        let size = x_btd.size();
        let (rows, time, dim) = (size[0], size[1], size[2]);
        let x_nd = x_btd.view([-1, dim]);
        let dropout = pass.dropout;

        let normed_1_nd = rms_norm(&x_nd, &self.attention_norm_d.value, self.epsilon);
        let by_head = |linear: &Linear, heads: i64| {
            linear
                .forward(&normed_1_nd, dropout)
                .view([rows, time, heads, self.head_dim])
        };
        let q_bthd = pass.rotary.apply(by_head(&self.q, self.heads));
        let k_btgd = pass.rotary.apply(by_head(&self.k, self.kv_heads));
        let v_btgd = by_head(&self.v, self.kv_heads);
        let attended = attend(&q_bthd, &k_btgd, &v_btgd, pass.documents);
        let attended_nd = attended.out_bthd.reshape([-1, self.heads * self.head_dim]);
        let middle_nd = x_nd + self.o.forward(&attended_nd, dropout);

        let normed_2_nd = rms_norm(&middle_nd, &self.mlp_norm_d.value, self.epsilon);
        let gate_nf = self.gate.forward(&normed_2_nd, dropout);
        let up_nf = self.up.forward(&normed_2_nd, dropout);
        let activated_nf = swiglu(&gate_nf, &up_nf);
        let cheap = Some(Cheap {
            normed_1_nd,
            normed_2_nd,
            activated_nf,
        });
        Inner {
            q_bthd,
            k_btgd,
            v_btgd,
            attended,
            middle_nd,
            gate_nf,
            up_nf,
            cheap,
        }
    }

    /// The seven linears in registration order.
    pub fn linears(&self) -> [&Linear; 7] {
        [&self.q, &self.k, &self.v, &self.o, &self.gate, &self.up, &self.down]
    }

    /// Everything that may train, in registration order.
    pub fn weights_mut(&mut self) -> Vec<&mut Weight> {
        let Layer {
            attention_norm_d,
            q,
            k,
            v,
            o,
            mlp_norm_d,
            gate,
            up,
            down,
            ..
        } = self;
        let linears = [q, k, v, o, gate, up, down].into_iter().flat_map(|linear| {
            let pair = linear.lora.as_mut().map(|pair| [&mut pair.a_ri, &mut pair.b_or]);
            std::iter::once(&mut linear.weight_oi).chain(pair.into_iter().flatten())
        });
        [attention_norm_d, mlp_norm_d].into_iter().chain(linears).collect()
    }

    /// The base's own weights, norms first.
    pub fn base_weights(&self) -> Vec<&Weight> {
        let linears = self.linears().into_iter().map(|linear| &linear.weight_oi);
        [&self.attention_norm_d, &self.mlp_norm_d]
            .into_iter()
            .chain(linears)
            .collect()
    }

    pub fn linears_mut(&mut self) -> [&mut Linear; 7] {
        [
            &mut self.q,
            &mut self.k,
            &mut self.v,
            &mut self.o,
            &mut self.gate,
            &mut self.up,
            &mut self.down,
        ]
    }
}
