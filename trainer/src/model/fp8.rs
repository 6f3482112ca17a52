//! Frozen matrices in 8-bit floating point (E4M3), multiplied by the GPU's FP8 units: twice the arithmetic of bf16, at the
//! price of 4 significant bits. Weights are quantised once, inputs as they come; each row has a factor of its own.
//! Source: Micikevicius et al. 2022, "FP8 Formats for Deep Learning", §3.

use tch::{Device, Kind, Tensor};

use super::kernels::quantize_rows;

/// A frozen W [o, i] as its two products read it. FP8's units want both operands along the axis that is summed, so that the
/// transpose is kept too: together as many bytes as W in bf16.
pub struct Fp8 {
    weight_oi: Rows,
    weight_io: Rows,
}

/// x ≈ factor · value, row by row.
struct Rows {
    value: Tensor,
    factor_n: Tensor,
}

impl Rows {
    fn of(x_nd: &Tensor) -> Rows {
        let (value, factor_n) = quantize_rows(x_nd);
        Rows { value, factor_n }
    }

    /// x · yᵀ, in bf16. `fast`: the units' own sums, of fewer bits than f32, at twice the speed of exact ones.
    fn times_transpose(&self, other: &Rows, fast: bool) -> Tensor {
        let (a_n1, b_1m) = (self.factor_n.unsqueeze(1), other.factor_n.unsqueeze(0));
        if self.value.device() == Device::Cpu {
            // What it means; for checks.
            let wide = |rows: &Rows| rows.value.to_kind(Kind::Float);
            let product = wide(self).matmul(&wide(other).tr()) * a_n1 * b_1m;
            return product.to_kind(Kind::BFloat16);
        }
        let none = None::<&Tensor>;
        self.value
            .internal_scaled_mm(&other.value.tr(), &a_n1, &b_1m, none, none, Kind::BFloat16, fast)
    }
}

impl Fp8 {
    /// From a matrix whose sides are multiples of 16, which FP8's units ask for.
    pub fn of(weight_oi: &Tensor) -> Fp8 {
        Fp8 {
            weight_oi: Rows::of(weight_oi),
            weight_io: Rows::of(&weight_oi.tr().contiguous()),
        }
    }

    /// What it is kept as.
    pub fn tensors(&self) -> [Tensor; 4] {
        let Fp8 { weight_oi, weight_io } = self;
        [
            &weight_oi.value,
            &weight_oi.factor_n,
            &weight_io.value,
            &weight_io.factor_n,
        ]
        .map(Tensor::shallow_clone)
    }

    /// x Wᵀ
    pub fn forward(&self, x_ni: &Tensor) -> Tensor {
        Rows::of(x_ni).times_transpose(&self.weight_oi, true)
    }

    /// d_x = d_y W. Exact sums: errors of all layers above add up in it.
    pub fn backward(&self, d_y_no: &Tensor) -> Tensor {
        Rows::of(d_y_no).times_transpose(&self.weight_io, false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::operands;

    #[test]
    fn products_are_those_of_the_matrix_but_for_rounding() {
        let random = |shape: &[i64]| operands::random(shape).to_kind(Kind::BFloat16);
        let (w, x, d_y) = (random(&[96, 320]), random(&[50, 320]), random(&[50, 96]));
        let fp8 = Fp8::of(&w);
        let relative = |ours: Tensor, exact: Tensor| {
            let exact = exact.to_kind(Kind::Float);
            (ours.to_kind(Kind::Float) - &exact).norm().double_value(&[]) / exact.norm().double_value(&[])
        };
        let seen = [
            relative(fp8.forward(&x), x.matmul(&w.tr())),
            relative(fp8.backward(&d_y), d_y.matmul(&w)),
        ];
        // Two operands with 4 significant bits each: a relative error of 2⁻⁵/√3 each, were they uniform.
        assert!(seen.iter().all(|seen| (0.01..0.05).contains(seen)), "{seen:?}");
    }
}
