//! A linear map: frozen, trained in full, or frozen with a trained low-rank term beside it (LoRA).
//! Source: Hu et al. 2021, "LoRA", equation 3.

use tch::Tensor;

use super::fp8::Fp8;
use super::{DropoutRows, Weight, low_rank};

/// y = x Wᵀ + b + s · drop(x) Aᵀ Bᵀ, with s = α / r, or α / √r where it is rank-stabilised.
pub struct Linear {
    /// Path of the module, as Hugging Face names it: "model.layers.0.self_attn.q_proj".
    pub path: String,
    pub weight_oi: Weight,
    /// None in LLaMA.
    pub bias_o: Option<Weight>,
    pub lora: Option<LoraPair>,
    /// W for the two products with it, where it is frozen and kept in FP8.
    pub fp8: Option<Fp8>,
}

pub struct LoraPair {
    pub a_ri: Weight,
    pub b_or: Weight,
    pub scale: f64,
    /// Probability with which an input element of the low-rank term is dropped in training.
    pub dropout: f64,
}

impl LoraPair {
    /// The rank.
    pub fn r(&self) -> usize {
        self.a_ri.value.size()[0] as usize
    }
}

impl Linear {
    pub fn forward(&self, x_ni: &Tensor, dropout: Option<&DropoutRows>) -> Tensor {
        let mut y_no = match (&self.fp8, &self.bias_o) {
            (Some(fp8), None) => fp8.forward(x_ni),
            (Some(fp8), Some(bias_o)) => fp8.forward(x_ni) + &bias_o.value,
            (None, None) => x_ni.matmul(&self.weight_oi.value.tr()),
            (None, Some(bias_o)) => bias_o.value.addmm(x_ni, &self.weight_oi.value.tr()),
        };
        if let Some(lora) = &self.lora {
            let mask_ni = self.mask(lora, x_ni, dropout);
            if mask_ni.is_none() && low_rank::takes(lora, x_ni) {
                low_rank::forward(lora, x_ni, &mut y_no);
                return y_no;
            }
            let dropped = masked(x_ni, mask_ni.as_ref());
            let low_nr = dropped.matmul(&lora.a_ri.value.tr()) * lora.scale;
            let _ = y_no.addmm_(&low_nr, &lora.b_or.value.tr());
        }
        y_no
    }

    /// d_x; adds to the gradients of what trains. `x_ni` and `dropout` are those of the forward pass.
    pub fn backward(&mut self, x_ni: &Tensor, dropout: Option<&DropoutRows>, d_y_no: &Tensor) -> Tensor {
        let mut d_x_ni = match &self.fp8 {
            Some(fp8) => fp8.backward(d_y_no),
            None => d_y_no.matmul(&self.weight_oi.value),
        };
        self.weight_oi.accumulate_product(&d_y_no.tr(), x_ni);
        if let Some(bias_o) = &mut self.bias_o {
            bias_o.accumulate(|| d_y_no.sum_dim_intlist(0, false, tch::Kind::Float));
        }
        let Some(lora) = &self.lora else { return d_x_ni };
        let mask_ni = self.mask(lora, x_ni, dropout);
        if mask_ni.is_none() && low_rank::takes(lora, x_ni) {
            let lora = self.lora.as_mut().expect("checked above");
            low_rank::backward(lora, x_ni, d_y_no, &mut d_x_ni);
            return d_x_ni;
        }
        // Low-rank activations lie transposed, [r, n]: GEMMs this thin run at half the speed or less the other way round.
        let dropped = masked(x_ni, mask_ni.as_ref());
        let low_rn = lora.a_ri.value.matmul(&dropped.tr());
        let d_low_rn = lora.b_or.value.tr().matmul(&d_y_no.tr()) * lora.scale;
        match mask_ni {
            Some(mask_ni) => d_x_ni += d_low_rn.tr().matmul(&lora.a_ri.value) * mask_ni,
            None => {
                let _ = d_x_ni.addmm_(&d_low_rn.tr(), &lora.a_ri.value);
            }
        }
        let scale = lora.scale;
        let lora = self.lora.as_mut().expect("checked above");
        lora.a_ri.accumulate_product(&d_low_rn, &dropped);
        lora.b_or.accumulate(|| (low_rn * scale).matmul(d_y_no).tr());
        d_x_ni
    }

    /// W + s·BA, in f32: what a model without LoRA needs to compute the same.
    pub fn merged(&self) -> Tensor {
        let weight = self.weight_oi.value.to_kind(tch::Kind::Float);
        match &self.lora {
            None => weight,
            Some(lora) => {
                let (a, b) = (
                    lora.a_ri.value.to_kind(tch::Kind::Float),
                    lora.b_or.value.to_kind(tch::Kind::Float),
                );
                weight + b.matmul(&a) * lora.scale
            }
        }
    }

    fn mask(&self, lora: &LoraPair, x_ni: &Tensor, dropout: Option<&DropoutRows>) -> Option<Tensor> {
        let rows = dropout.filter(|_| lora.dropout > 0.0)?;
        Some(rows.mask(&self.path, x_ni.size()[1] as usize, lora.dropout, x_ni.kind()))
    }
}

fn masked(x_ni: &Tensor, mask_ni: Option<&Tensor>) -> Tensor {
    mask_ni.map_or_else(|| x_ni.shallow_clone(), |mask_ni| x_ni * mask_ni)
}
