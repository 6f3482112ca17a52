//! One transformer layer as an explicit stage: forward keeps what the recompute mode allows, backward is written out.
//! Sources: Touvron et al. 2023, "Llama 2", §2.2; Radford et al. 2019, "Language Models are Unsupervised Multitask
//! Learners", §2.3.
//! Axes: b row, t time, h head, g key/value head, d dim, f feed-forward dim; n = b·t flattened.
//!
//! x, its sum with attention's output and y are of the residual stream, whose kind may be f32 where all else is bf16: norms
//! read it, and what the two parts give is added to it.

use configs::Recompute;
use tch::Tensor;

use super::attention::{Attended, attend, attend_backward};
use super::fp8::Fp8;
use super::linear::Linear;
use super::mlp::{Mlp, Wide};
use super::norm::Norm;
use super::{DropoutRows, Pass, Weight};

pub struct Layer {
    pub attention_norm: Norm,
    pub qkv: Qkv,
    pub o: Linear,
    pub mlp_norm: Norm,
    pub mlp: Mlp,
    pub heads: i64,
    pub kv_heads: i64,
    pub head_dim: i64,
}

/// How queries, keys and values are made.
#[expect(clippy::large_enum_variant, reason = "one a layer, beside megabytes of weights")]
pub enum Qkv {
    Apart {
        q: Linear,
        k: Linear,
        v: Linear,
    },
    /// By one matrix: its outputs are all of q, then k, then v.
    Fused(Linear),
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
    wide: Wide,
    /// Norms' and activations' results: the first to be recomputed, since they cost bandwidth only.
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
        let out_nd = self.mlp.down(&cheap.activated_nf, pass.dropout);
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
            wide,
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
            normed_1_nd: self.attention_norm.forward(&x_nd),
            normed_2_nd: self.mlp_norm.forward(&middle_nd),
            activated_nf: self.mlp.activate(&wide),
        });
        let dropout = pass.dropout;
        let d_y_nd = d_y_btd.view([-1, dim]);
        // What the linears multiply is not of the stream.
        let kind = normed_1_nd.kind();

        // MLP: y = middle + mlp(norm(middle))
        let d_out_nd = d_y_nd.to_kind(kind);
        let d_normed_2_nd = self
            .mlp
            .backward(&normed_2_nd, &wide, &activated_nf, dropout, &d_out_nd);
        let d_middle_nd = self.mlp_norm.backward(&middle_nd, &d_normed_2_nd, Some(&d_y_nd));

        // Attention: middle = x + o(attend(positioned(q), positioned(k), v))
        let attended_nd = attended.out_bthd.reshape([-1, self.heads * self.head_dim]);
        let d_attended_bthd = self
            .o
            .backward(&attended_nd, dropout, &d_middle_nd.to_kind(kind))
            .view_as(&attended.out_bthd);
        let (d_q, d_k, d_v) = attend_backward(&attended, &q_bthd, &k_btgd, &v_btgd, &d_attended_bthd, pass.documents);
        let (d_q, d_k) = match pass.rotary {
            Some(rotary) => (rotary.apply_backward(&d_q), rotary.apply_backward(&d_k)),
            None => (d_q, d_k),
        };
        let flat = |d: Tensor, heads: i64| d.reshape([-1, heads * self.head_dim]);
        let d_qkv = [
            flat(d_q, self.heads),
            flat(d_k, self.kv_heads),
            flat(d_v, self.kv_heads),
        ];
        let d_normed_1_nd = self.qkv.backward(&normed_1_nd, dropout, d_qkv);
        let d_x_nd = self.attention_norm.backward(&x_nd, &d_normed_1_nd, Some(&d_middle_nd));
        d_x_nd.view(size.as_slice())
    }

    /// All of the layer but the last GEMM, whose result backward does not read.
    fn up_to_activation(&self, x_btd: &Tensor, pass: &Pass) -> Inner {
        let size = x_btd.size();
        let (rows, time, dim) = (size[0], size[1], size[2]);
        let x_nd = x_btd.view([-1, dim]);
        let dropout = pass.dropout;

        let normed_1_nd = self.attention_norm.forward(&x_nd);
        let [q, k, v] = self.qkv.forward(&normed_1_nd, dropout);
        let by_head = |x: Tensor, heads: i64| x.view([rows, time, heads, self.head_dim]);
        let positioned = |x_bthd: Tensor| match pass.rotary {
            Some(rotary) => rotary.apply(x_bthd),
            None => x_bthd,
        };
        let q_bthd = positioned(by_head(q, self.heads));
        let k_btgd = positioned(by_head(k, self.kv_heads));
        let v_btgd = by_head(v, self.kv_heads);
        let attended = attend(&q_bthd, &k_btgd, &v_btgd, pass.documents);
        let attended_nd = attended.out_bthd.reshape([-1, self.heads * self.head_dim]);
        let middle_nd = x_nd + self.o.forward(&attended_nd, dropout);

        let normed_2_nd = self.mlp_norm.forward(&middle_nd);
        let wide = self.mlp.up(&normed_2_nd, dropout);
        let activated_nf = self.mlp.activate(&wide);
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
            wide,
            cheap,
        }
    }

    pub fn norms(&self) -> [&Norm; 2] {
        [&self.attention_norm, &self.mlp_norm]
    }

    pub fn norms_mut(&mut self) -> [&mut Norm; 2] {
        [&mut self.attention_norm, &mut self.mlp_norm]
    }

    /// In registration order.
    pub fn linears(&self) -> Vec<&Linear> {
        let mut all = self.qkv.linears();
        all.push(&self.o);
        all.extend(self.mlp.linears());
        all
    }

    pub fn linears_mut(&mut self) -> Vec<&mut Linear> {
        let mut all = self.qkv.linears_mut();
        all.push(&mut self.o);
        all.extend(self.mlp.linears_mut());
        all
    }

    /// Matrices that are kept in 8 bits, with their factors.
    pub fn frozen_eights(&mut self) -> Vec<Tensor> {
        let linears = self.linears_mut().into_iter();
        let eights = linears.filter_map(|linear| linear.fp8.as_ref());
        eights.flat_map(Fp8::tensors).collect()
    }

    /// Everything that may train, in registration order.
    pub fn weights_mut(&mut self) -> Vec<&mut Weight> {
        let Layer {
            attention_norm,
            qkv,
            o,
            mlp_norm,
            mlp,
            ..
        } = self;
        let mut linears = qkv.linears_mut();
        linears.push(o);
        linears.extend(mlp.linears_mut());
        let linears = linears.into_iter().flat_map(|linear| {
            let pair = linear.lora.as_mut().map(|pair| [&mut pair.a_ri, &mut pair.b_or]);
            std::iter::once(&mut linear.weight_oi)
                .chain(&mut linear.bias_o)
                .chain(pair.into_iter().flatten())
        });
        let norms = attention_norm.weights_mut().chain(mlp_norm.weights_mut());
        norms.chain(linears).collect()
    }
}

impl Qkv {
    /// q, k and v, each dense: [n, heads · dim].
    fn forward(&self, x_nd: &Tensor, dropout: Option<&DropoutRows>) -> [Tensor; 3] {
        match self {
            Qkv::Apart { q, k, v } => [q, k, v].map(|linear| linear.forward(x_nd, dropout)),
            Qkv::Fused(linear) => {
                let all = linear.forward(x_nd, dropout);
                let third = all.size()[1] / 3;
                [0, 1, 2].map(|which| all.narrow(1, which * third, third).contiguous())
            }
        }
    }

    /// d_x; adds to the gradients of what trains.
    fn backward(&mut self, x_nd: &Tensor, dropout: Option<&DropoutRows>, d_qkv: [Tensor; 3]) -> Tensor {
        match self {
            Qkv::Apart { q, k, v } => {
                let [d_q, d_k, d_v] = d_qkv;
                q.backward(x_nd, dropout, &d_q) + k.backward(x_nd, dropout, &d_k) + v.backward(x_nd, dropout, &d_v)
            }
            Qkv::Fused(linear) => linear.backward(x_nd, dropout, &Tensor::cat(&d_qkv, 1)),
        }
    }

    fn linears(&self) -> Vec<&Linear> {
        match self {
            Qkv::Apart { q, k, v } => vec![q, k, v],
            Qkv::Fused(linear) => vec![linear],
        }
    }

    fn linears_mut(&mut self) -> Vec<&mut Linear> {
        match self {
            Qkv::Apart { q, k, v } => vec![q, k, v],
            Qkv::Fused(linear) => vec![linear],
        }
    }
}
