//! Linear maps of few positions: a step of generation reads every weight once for a handful of rows, so memory sets the pace.
//! Each product of a row with a weight's row is summed by itself in one fixed order: what stands beside a position in its
//! batch changes no bit of it.
//! Axes: n position, i input, o output.

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;
use tch::{Kind, Tensor};

use super::kernels::cpu::{Element, by_kind};

/// Outputs that one task makes.
const OUTPUTS: usize = 64;
/// Rows of a weight, and positions, that are multiplied at once: their sums stay in registers.
const BLOCK: usize = 4;

/// x Wᵀ + b for each of the maps (W [o, i], b [o]), f32 or rounded to x's kind: [n, o] each. On the CPU; all contiguous.
pub fn linears(x_ni: &Tensor, maps: &[(&Tensor, Option<&Tensor>)], to: Kind) -> Vec<Tensor> {
    fn each<E: Weights>(x_ni: &Tensor, maps: &[(&Tensor, Option<&Tensor>)], to: Kind) -> Vec<Tensor> {
        let size = x_ni.size();
        let (n, width) = (size[0] as usize, size[1] as usize);
        let laid = E::lay(E::of(x_ni), width);
        let outputs = |weight: &Tensor| weight.size()[0] as usize;
        let mut products: Vec<Vec<f32>> = maps.iter().map(|(w, _)| vec![0.0; outputs(w) * n]).collect();
        let tasks: Vec<(&[E], &mut [f32])> = maps
            .iter()
            .zip(&mut products)
            .flat_map(|((weight, _), product)| {
                let weights = E::of(weight).chunks(OUTPUTS * width);
                weights.zip(product.chunks_mut(OUTPUTS * n))
            })
            .collect();
        tasks.into_par_iter().for_each(|(weights, product_on)| {
            Arch::new().dispatch(Task {
                weights,
                laid: &laid,
                width,
                product_on,
            });
        });
        let turned = |((weight, bias), product_on): (&(&Tensor, Option<&Tensor>), &Vec<f32>)| {
            let o = outputs(weight);
            let mut y_no = Tensor::empty([n as i64, o as i64], (to, x_ni.device()));
            let bias = bias.map(|bias| E::of(bias));
            if to == Kind::Float {
                turn::<f32, E>(product_on, bias, f32::of_mut(&mut y_no), o);
            } else {
                turn::<E, E>(product_on, bias, E::of_mut(&mut y_no), o);
            }
            y_no
        };
        maps.iter().zip(&products).map(turned).collect()
    }
    let x_ni = x_ni.contiguous();
    by_kind!(x_ni, each(&x_ni, maps, to))
}

/// From [o, n] to [n, o], rounded once, after the bias.
fn turn<Y: Element, E: Element>(product_on: &[f32], bias: Option<&[E]>, y_no: &mut [Y], o: usize) {
    let n = y_no.len() / o.max(1);
    let one = |(row, y): (usize, &mut [Y])| {
        for (output, y) in y.iter_mut().enumerate() {
            let bias = bias.map_or(0.0, |bias| bias[output].widen());
            *y = Y::round(product_on[output * n + row] + bias);
        }
    };
    // Logits are wide; all else is done before another thread would wake.
    if o > 1 << 13 {
        y_no.par_chunks_exact_mut(o).enumerate().for_each(one);
    } else {
        y_no.chunks_exact_mut(o.max(1)).enumerate().for_each(one);
    }
}

/// The products of some rows of a weight with all positions, [o, n].
struct Task<'a, E> {
    weights: &'a [E],
    laid: &'a [f32],
    width: usize,
    product_on: &'a mut [f32],
}

impl<E: Weights> WithSimd for Task<'_, E> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Task {
            weights,
            laid,
            width,
            product_on,
        } = self;
        let (n, o) = (laid.len() / width, weights.len() / width);
        let mut output = 0;
        while output < o {
            let w = &weights[output * width..];
            if o - output >= BLOCK {
                rows::<S, E, BLOCK>(simd, w, laid, width, n, &mut product_on[output * n..]);
                output += BLOCK;
            } else {
                rows::<S, E, 1>(simd, w, laid, width, n, &mut product_on[output * n..]);
                output += 1;
            }
        }
    }
}

#[inline(always)]
fn rows<S: Simd, E: Weights, const W: usize>(
    simd: S,
    w: &[E],
    laid: &[f32],
    width: usize,
    n: usize,
    product_on: &mut [f32],
) {
    let mut row = 0;
    while row < n {
        let x = &laid[row * width..];
        let into = &mut product_on[row..];
        match n - row {
            1 => some::<S, E, W, 1>(simd, w, x, width, n, into),
            2 => some::<S, E, W, 2>(simd, w, x, width, n, into),
            3 => some::<S, E, W, 3>(simd, w, x, width, n, into),
            _ => some::<S, E, W, BLOCK>(simd, w, x, width, n, into),
        }
        row += BLOCK;
    }
}

#[inline(always)]
fn some<S: Simd, E: Weights, const W: usize, const X: usize>(
    simd: S,
    w: &[E],
    x: &[f32],
    width: usize,
    n: usize,
    into: &mut [f32],
) {
    let mut ws: [&[E]; W] = [&[]; W];
    let mut xs: [&[f32]; X] = [&[]; X];
    for (o, w_o) in ws.iter_mut().enumerate() {
        *w_o = &w[o * width..(o + 1) * width];
    }
    for (row, x_row) in xs.iter_mut().enumerate() {
        *x_row = &x[row * width..(row + 1) * width];
    }
    let sums = E::dots(simd, ws, xs);
    for (o, sums) in sums.iter().enumerate() {
        into[o * n..o * n + X].copy_from_slice(sums);
    }
}

/// What weights are made of, and how positions lie to be multiplied with them.
trait Weights: Element {
    /// `x` in f32, row by row.
    fn lay(x: &[Self], width: usize) -> Vec<f32>;

    fn dots<S: Simd, const W: usize, const X: usize>(simd: S, w: [&[Self]; W], x: [&[f32]; X]) -> [[f32; X]; W];
}

impl Weights for f32 {
    fn lay(x: &[f32], _: usize) -> Vec<f32> {
        x.to_vec()
    }

    #[inline(always)]
    fn dots<S: Simd, const W: usize, const X: usize>(simd: S, w: [&[f32]; W], x: [&[f32]; X]) -> [[f32; X]; W] {
        let width = w[0].len();
        let whole = width / S::F32_LANES;
        let mut ws: [&[S::f32s]; W] = [&[]; W];
        let mut xs: [&[S::f32s]; X] = [&[]; X];
        for o in 0..W {
            ws[o] = &S::as_simd_f32s(w[o]).0[..whole];
        }
        for row in 0..X {
            xs[row] = &S::as_simd_f32s(x[row]).0[..whole];
        }
        let mut sums = [[simd.splat_f32s(0.0); X]; W];
        for i in 0..whole {
            for o in 0..W {
                for row in 0..X {
                    sums[o][row] = simd.mul_add_f32s(ws[o][i], xs[row][i], sums[o][row]);
                }
            }
        }
        let mut out = [[0.0; X]; W];
        for o in 0..W {
            for row in 0..X {
                let mut sum = simd.reduce_sum_f32s(sums[o][row]);
                for i in whole * S::F32_LANES..width {
                    sum += w[o][i] * x[row][i];
                }
                out[o][row] = sum;
            }
        }
        out
    }
}

/// Two weights are read as one word of 32 bits: its upper half is the f32 of the second, its lower half, shifted up, that of
/// the first. So positions lie with their even elements before their odd ones.
impl Weights for half::bf16 {
    fn lay(x: &[half::bf16], width: usize) -> Vec<f32> {
        let row = |x: &[half::bf16]| -> Vec<f32> {
            let of = |first: usize| x.iter().skip(first).step_by(2).map(|x| x.widen());
            // Of an odd width pairs would straddle rows: elements are multiplied one by one.
            match width.is_multiple_of(2) {
                true => of(0).chain(of(1)).collect(),
                false => x.iter().map(|x| x.widen()).collect(),
            }
        };
        x.chunks_exact(width.max(1)).flat_map(row).collect()
    }

    #[inline(always)]
    fn dots<S: Simd, const W: usize, const X: usize>(simd: S, w: [&[half::bf16]; W], x: [&[f32]; X]) -> [[f32; X]; W] {
        let width = w[0].len();
        let mut out = [[0.0; X]; W];
        if !width.is_multiple_of(2) {
            for o in 0..W {
                for row in 0..X {
                    out[o][row] = w[o].iter().zip(x[row]).map(|(w, x)| w.widen() * x).sum();
                }
            }
            return out;
        }
        let pairs = width / 2;
        let whole = pairs / S::F32_LANES;
        let mut words: [&[u32]; W] = [&[]; W];
        let mut ws: [&[S::u32s]; W] = [&[]; W];
        let mut evens: [&[S::f32s]; X] = [&[]; X];
        let mut odds: [&[S::f32s]; X] = [&[]; X];
        for o in 0..W {
            words[o] = bytemuck::cast_slice(w[o]);
            ws[o] = &S::as_simd_u32s(words[o]).0[..whole];
        }
        for row in 0..X {
            evens[row] = &S::as_simd_f32s(&x[row][..pairs]).0[..whole];
            odds[row] = &S::as_simd_f32s(&x[row][pairs..]).0[..whole];
        }
        let (up, upper) = (simd.splat_u32s(16), simd.splat_u32s(0xffff_0000));
        let mut sums = [[simd.splat_f32s(0.0); X]; W];
        for i in 0..whole {
            for o in 0..W {
                let word = ws[o][i];
                let even = simd.transmute_f32s_u32s(simd.wrapping_dyn_shl_u32s(word, up));
                let odd = simd.transmute_f32s_u32s(simd.and_u32s(word, upper));
                for row in 0..X {
                    let sum = simd.mul_add_f32s(even, evens[row][i], sums[o][row]);
                    sums[o][row] = simd.mul_add_f32s(odd, odds[row][i], sum);
                }
            }
        }
        for o in 0..W {
            for row in 0..X {
                let mut sum = simd.reduce_sum_f32s(sums[o][row]);
                for i in whole * S::F32_LANES..pairs {
                    let word = words[o][i];
                    sum += f32::from_bits(word << 16) * x[row][i];
                    sum += f32::from_bits(word & 0xffff_0000) * x[row][pairs + i];
                }
                out[o][row] = sum;
            }
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::operands;

    #[test]
    fn few_positions_give_what_a_matrix_product_gives_and_the_same_bits_in_any_company() {
        for (kind, bound) in [(Kind::Float, 1e-5), (Kind::BFloat16, 1e-2)] {
            for (width, outputs, n) in [(64, 70, 8), (33, 5, 3), (40, 129, 6), (7, 1, 1), (576, 192, 13)] {
                let random = |shape: &[i64]| operands::random(shape).to_kind(kind);
                let (x, w, bias) = (random(&[n, width]), random(&[outputs, width]), random(&[outputs]));
                let ours = linears(&x, &[(&w, Some(&bias)), (&w, None)], kind);
                let exact = x.to_kind(Kind::Double).matmul(&w.to_kind(Kind::Double).tr());
                for (ours, exact) in ours.iter().zip([&exact + &bias, exact.shallow_clone()]) {
                    let off = (ours - &exact).abs().max().double_value(&[]) / exact.abs().max().double_value(&[]);
                    assert!(off < bound, "{kind:?} {width} × {outputs}, {n} positions: {off}");
                }
                for row in 0..n {
                    let alone = linears(&x.narrow(0, row, 1), &[(&w, Some(&bias))], kind);
                    assert_eq!(alone[0], ours[0].narrow(0, row, 1), "{kind:?}, row {row} of {n}");
                }
            }
        }
    }
}
