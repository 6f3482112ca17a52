//! LoRA's products beside a linear map, in bf16 on processors that multiply pairs of bf16: a stretch of positions at a time, so that
//! what several products read stays in the second-level cache.
//! Axes: n position, i input, o output, r rank.

use half::bf16;
use rayon::prelude::*;
use tch::{Device, Kind, Tensor};

use super::LoraPair;
use super::gemm::pairs::are_there;
use super::gemm::pairs::low_rank::{Low, RANK, Thin};
use super::kernels::cpu::Element;

/// Positions of one task. Gradients are summed by task and then in order of tasks, whatever the number of threads.
const POSITIONS: usize = 128;
/// Beyond this rank the operands would be read so often that a GEMM is faster.
const LARGEST: usize = 16;

/// Whether the functions below compute this pair's products with `x_ni`.
pub fn takes(pair: &LoraPair, x_ni: &Tensor) -> bool {
    x_ni.device() == Device::Cpu
        && x_ni.kind() == Kind::BFloat16
        && pair.r() <= LARGEST
        && x_ni.numel() > 0
        && are_there()
}

/// A and Bᵀ by ranks of [`RANK`].
fn thin(pair: &LoraPair) -> Vec<[Thin; 2]> {
    let (a_ri, b_or) = (pair.a_ri.value.contiguous(), pair.b_or.value.contiguous());
    let (a, b) = (bf16::of(&a_ri), bf16::of(&b_or));
    let (rank, inputs, outputs) = (pair.r(), a.len() / pair.r(), b.len() / pair.r());
    let eight = |first: usize| {
        let count = RANK.min(rank - first);
        [
            Thin::new(count, inputs, |row, i| a[(first + row) * inputs + i]),
            Thin::new(count, outputs, |row, o| b[o * rank + first + row]),
        ]
    };
    (0..rank).step_by(RANK).map(eight).collect()
}

/// y += s · x Aᵀ Bᵀ
pub fn forward(pair: &LoraPair, x_ni: &Tensor, y_no: &mut Tensor) {
    let x_ni = x_ni.contiguous();
    let [inputs, outputs] = [&x_ni, y_no].map(|x| x.size()[1] as usize);
    let eights = thin(pair);
    let (x, y, scale) = (bf16::of(&x_ni), bf16::of_mut(y_no), pair.scale as f32);
    let tasks = x
        .par_chunks(POSITIONS * inputs)
        .zip(y.par_chunks_mut(POSITIONS * outputs));
    tasks.for_each_init(Low::default, |low, (x, y)| {
        for [a, b] in &eights {
            a.dots(x, scale, low);
            b.add_product(low, y);
        }
    });
}

/// With L = s · x Aᵀ and M = s · d_y B: d_x += M A, d_A += Mᵀ x, d_B += d_yᵀ L.
pub fn backward(pair: &mut LoraPair, x_ni: &Tensor, d_y_no: &Tensor, d_x_ni: &mut Tensor) {
    let (x_ni, d_y_no) = (x_ni.contiguous(), d_y_no.contiguous());
    let [inputs, outputs] = [&x_ni, &d_y_no].map(|x| x.size()[1] as usize);
    let eights = thin(pair);
    let (x, d_y, d_x) = (bf16::of(&x_ni), bf16::of(&d_y_no), bf16::of_mut(d_x_ni));
    let scale = pair.scale as f32;
    let tasks = x
        .par_chunks(POSITIONS * inputs)
        .zip(d_y.par_chunks(POSITIONS * outputs))
        .zip(d_x.par_chunks_mut(POSITIONS * inputs));
    let of_tasks: Vec<Vec<[Vec<f32>; 2]>> = tasks
        .map_init(Default::default, |(low, d_low): &mut (Low, Low), ((x, d_y), d_x)| {
            let eight = |[a, b]: &[Thin; 2]| {
                a.dots(x, scale, low);
                b.dots(d_y, scale, d_low);
                a.add_product(d_low, d_x);
                let mut sums = [inputs, outputs].map(|width| vec![0f32; RANK * width]);
                d_low.add_gradient(x, inputs, &mut sums[0]);
                low.add_gradient(d_y, outputs, &mut sums[1]);
                sums
            };
            eights.iter().map(eight).collect()
        })
        .collect();
    let rank = pair.r();
    for eight in 0..eights.len() {
        let ranks = eight * RANK..rank.min((eight + 1) * RANK);
        if let Some(grad) = &mut pair.a_ri.grad {
            let grad = &mut f32::of_mut(grad)[ranks.start * inputs..ranks.end * inputs];
            for task in &of_tasks {
                grad.iter_mut()
                    .zip(&task[eight][0])
                    .for_each(|(grad, sum)| *grad += sum);
            }
        }
        if let Some(grad) = &mut pair.b_or.grad {
            let mut whole = vec![0f32; RANK * outputs];
            for task in &of_tasks {
                whole
                    .iter_mut()
                    .zip(&task[eight][1])
                    .for_each(|(whole, sum)| *whole += sum);
            }
            let grad = f32::of_mut(grad);
            for (o, grad) in grad.chunks_exact_mut(rank).enumerate() {
                for (row, grad) in grad[ranks.clone()].iter_mut().enumerate() {
                    *grad += whole[row * outputs + o];
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Linear, Weight};
    use crate::random::operands::operand;

    fn random(which: u64, shape: &[i64]) -> Tensor {
        operand(which, shape).to_kind(Kind::BFloat16)
    }

    /// A linear map in bf16 and, of the same values, in f32, where LoRA's products are GEMMs.
    #[test]
    fn a_linear_map_with_lora_is_that_in_f32_rounded() {
        if !are_there() {
            eprintln!("SKIPPED: this processor has no AVX512-BF16");
            return;
        }
        // More positions than a task has, an odd number of them, and ranks that fill no eight, one and a half, two.
        for (n, inputs, outputs, rank) in [(300, 48, 80, 8), (7, 33, 20, 3), (129, 64, 40, 12), (40, 32, 32, 16)] {
            let trained = |which, shape: &[i64], kind: Kind| {
                let mut weight = Weight::frozen(String::new(), random(which, shape).to_kind(kind));
                weight.grad = Some(Tensor::ones(shape, (Kind::Float, Device::Cpu)));
                weight
            };
            let (x, d_y) = (random(4, &[n, inputs]), random(5, &[n, outputs]));
            let all = |kind: Kind| {
                let mut linear = Linear {
                    path: String::new(),
                    weight_oi: Weight::frozen(String::new(), random(1, &[outputs, inputs]).to_kind(kind)),
                    bias_o: None,
                    lora: Some(LoraPair {
                        a_ri: trained(2, &[rank, inputs], kind),
                        b_or: trained(3, &[outputs, rank], kind),
                        scale: 0.5,
                        dropout: 0.0,
                    }),
                    fp8: None,
                };
                let (x, d_y) = (x.to_kind(kind), d_y.to_kind(kind));
                assert_eq!(takes(linear.lora.as_ref().unwrap(), &x), kind == Kind::BFloat16);
                let y = linear.forward(&x, None);
                let d_x = linear.backward(&x, None, &d_y);
                let pair = linear.lora.unwrap();
                [y, d_x, pair.a_ri.grad.unwrap(), pair.b_or.grad.unwrap()]
            };
            let names = ["y", "d_x", "d_A", "d_B"];
            for ((name, rounded), exact) in names.iter().zip(all(Kind::BFloat16)).zip(all(Kind::Float)) {
                let difference = (rounded.to_kind(Kind::Float) - &exact).abs().max().double_value(&[]);
                let largest = exact.abs().max().double_value(&[]);
                // W's product is rounded before and after what is added to it: two halves of a unit in the last of 8 bits.
                assert!(
                    difference < 8e-3 * largest,
                    "{name} of {n} × {inputs} × {outputs}, rank {rank}: {difference} of {largest}"
                );
            }
        }
    }
}
