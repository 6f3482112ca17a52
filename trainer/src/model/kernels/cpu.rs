//! Fused kernels on CPU memory, threaded over rows, vectorised by the compiler for the processor it runs on.
//!
//! Sums go by 16 lanes in a fixed order and products are never contracted, so that a result does not depend on the
//! processor's vector width or on the number of threads. Arithmetic is in f32 whatever the elements are.
//! Axes: n position, d dim, v vocabulary, h head, t time.

use configs::Gelu;
use half::bf16;
use rayon::prelude::*;
use sharding::memory;
use tch::{Kind, Tensor};

use crate::random;
use sharding::vectorized;

/// Partial sums kept side by side: the widest vectors hold as many f32.
pub(in crate::model) const LANES: usize = 16;
/// Terms that are summed in f32 before their sum goes into f64.
const BLOCK: usize = 4096;
/// Elements of one task where rows do not matter: three arrays of them stay in a second-level cache.
const TASK: usize = 1 << 14;

/// What tensors are made of: f32, or bf16, which is rounded to nearest, ties to even.
pub(in crate::model) trait Element: Copy + Send + Sync + 'static {
    fn widen(self) -> f32;
    fn round(x: f32) -> Self;
    /// The values themselves, where they are f32 already.
    fn plain(values: &[Self]) -> Option<&[f32]>;
    /// The values themselves, where they are bf16.
    fn halves(values: &[Self]) -> Option<&[bf16]>;
    fn halves_mut(values: &mut [Self]) -> Option<&mut [bf16]>;
    fn of(tensor: &Tensor) -> &[Self];
    fn of_mut(tensor: &mut Tensor) -> &mut [Self];
}

impl Element for f32 {
    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }

    #[inline(always)]
    fn round(x: f32) -> f32 {
        x
    }

    fn plain(values: &[f32]) -> Option<&[f32]> {
        Some(values)
    }

    fn halves(_: &[f32]) -> Option<&[bf16]> {
        None
    }

    fn halves_mut(_: &mut [f32]) -> Option<&mut [bf16]> {
        None
    }

    fn of(tensor: &Tensor) -> &[f32] {
        memory::f32s(tensor)
    }

    fn of_mut(tensor: &mut Tensor) -> &mut [f32] {
        memory::f32s_mut(tensor)
    }
}

impl Element for bf16 {
    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }

    /// As `bf16::from_f32`, but without a branch.
    #[inline(always)]
    fn round(x: f32) -> bf16 {
        let bits = x.to_bits();
        let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
        let quiet_nan = (bits >> 16) | 0x40;
        bf16::from_bits((if x.is_nan() { quiet_nan } else { rounded }) as u16)
    }

    fn plain(_: &[bf16]) -> Option<&[f32]> {
        None
    }

    fn halves(values: &[bf16]) -> Option<&[bf16]> {
        Some(values)
    }

    fn halves_mut(values: &mut [bf16]) -> Option<&mut [bf16]> {
        Some(values)
    }

    fn of(tensor: &Tensor) -> &[bf16] {
        memory::bf16s(tensor)
    }

    fn of_mut(tensor: &mut Tensor) -> &mut [bf16] {
        memory::bf16s_mut(tensor)
    }
}

/// Calls a generic function with the tensor's element type.
macro_rules! by_kind {
    ($tensor:expr, $function:ident($($argument:expr),*)) => {
        match $tensor.kind() {
            Kind::Float => $function::<f32>($($argument),*),
            Kind::BFloat16 => $function::<half::bf16>($($argument),*),
            kind => unreachable!("stages compute in f32 or bf16, not in {kind:?}"),
        }
    };
}
pub(in crate::model) use by_kind;

/// The same with two types: that of the residual stream, which may be f32 beside bf16, and that of everything else.
macro_rules! by_kinds {
    ($stream:expr, $tensor:expr, $function:ident($($argument:expr),*)) => {
        match ($stream.kind(), $tensor.kind()) {
            (Kind::Float, Kind::Float) => $function::<f32, f32>($($argument),*),
            (Kind::BFloat16, Kind::BFloat16) => $function::<bf16, bf16>($($argument),*),
            (Kind::Float, Kind::BFloat16) => $function::<f32, bf16>($($argument),*),
            kinds => unreachable!("the residual stream is f32 or as the rest, not {kinds:?}"),
        }
    };
}

/// −ln p(target) of each row's first `pieces`, nats, f64; they become their gradient, softmax − onehot, and the rest of the row 0.
pub fn cross_entropy(logits_nv: &mut Tensor, pieces: i64, target_n: &Tensor) -> Tensor {
    fn each<E: Element>(logits_nv: &mut Tensor, pieces: usize, targets: &[i64]) -> Vec<f64> {
        let v = width(logits_nv);
        let rows = E::of_mut(logits_nv).par_chunks_exact_mut(v).zip(targets);
        rows.map_init(Vec::new, |powers, (row, target)| {
            let (row, padding) = row.split_at_mut(pieces);
            padding.fill(E::round(0.0));
            powers.resize(row.len(), 0.0);
            cross_entropy_of_row(row, *target as usize, powers)
        })
        .collect()
    }
    let targets = memory::i64s(target_n);
    Tensor::from_slice(&by_kind!(logits_nv, each(logits_nv, pieces as usize, targets)))
}

vectorized! {
    /// `powers` has room for as many values.
    fn cross_entropy_of_row<E: Element>(row: &mut [E], target: usize, powers: &mut [f32]) -> f64 {
        let (most, at) = (largest(row), row[target].widen());
        let mut total = 0.0;
        for (row, powers) in row.chunks(BLOCK).zip(powers.chunks_mut(BLOCK)) {
            row.iter().zip(&mut *powers).for_each(|(x, power)| *power = exp(x.widen() - most));
            total += f64::from(sum(powers, |x| x));
        }
        let share = (1.0 / total) as f32;
        row.iter_mut().zip(&*powers).for_each(|(x, power)| *x = E::round(power * share));
        row[target] = E::round(powers[target] * share - 1.0);
        f64::from(most) + total.ln() - f64::from(at)
    }
}

/// −ln p(target) of each row's first `pieces`, nats, f64.
pub fn nll(logits_nv: &Tensor, pieces: i64, target_n: &Tensor) -> Tensor {
    fn each<E: Element>(logits_nv: &Tensor, pieces: usize, targets: &[i64]) -> Vec<f64> {
        let rows = E::of(logits_nv).par_chunks_exact(width(logits_nv)).zip(targets);
        rows.map(|(row, target)| nll_of_row(&row[..pieces], *target as usize))
            .collect()
    }
    let targets = memory::i64s(target_n);
    Tensor::from_slice(&by_kind!(logits_nv, each(logits_nv, pieces as usize, targets)))
}

vectorized! {
    fn nll_of_row<E: Element>(row: &[E], target: usize) -> f64 {
        log_sum_exp(row) - f64::from(row[target].widen())
    }
}

/// ln Σ eˣ, by the largest x, so that nothing overflows.
#[inline(always)]
fn log_sum_exp<E: Element>(row: &[E]) -> f64 {
    let most = largest(row);
    let blocks = row.chunks(BLOCK);
    let sum: f64 = blocks.map(|block| f64::from(sum(block, |x| exp(x - most)))).sum();
    f64::from(most) + sum.ln()
}

/// The largest element, by lanes; −∞ of none.
#[inline(always)]
pub(in crate::model) fn largest<E: Element>(row: &[E]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let larger = |lane: &mut f32, x: &E| *lane = if x.widen() > *lane { x.widen() } else { *lane };
    let chunks = row.chunks_exact(LANES);
    chunks
        .remainder()
        .iter()
        .zip(&mut lanes)
        .for_each(|(x, lane)| larger(lane, x));
    for chunk in chunks {
        chunk.iter().zip(&mut lanes).for_each(|(x, lane)| larger(lane, x));
    }
    lanes.iter().copied().fold(f32::NEG_INFINITY, f32::max)
}

/// RMSNorm of each row (Zhang and Sennrich 2019): x / √(mean(x²) + ε), rounded, times w; of w's kind.
pub fn rms_norm(x_nd: &Tensor, weight_d: &Tensor, epsilon: f64) -> Tensor {
    fn each<X: Element, E: Element>(x_nd: &Tensor, weight_d: &Tensor, epsilon: f64) -> Tensor {
        let (d, weight) = (width(x_nd), E::of(weight_d));
        let mut y_nd = Tensor::empty(x_nd.size(), (weight_d.kind(), x_nd.device()));
        let rows = E::of_mut(&mut y_nd)
            .par_chunks_exact_mut(d)
            .zip(X::of(x_nd).par_chunks_exact(d));
        rows.for_each(|(y, x)| rms_norm_of_row(y, x, weight, epsilon));
        y_nd
    }
    let x_nd = x_nd.contiguous();
    by_kinds!(x_nd, weight_d, each(&x_nd, weight_d, epsilon))
}

vectorized! {
    fn rms_norm_of_row<X: Element, E: Element>(y: &mut [E], x: &[X], weight: &[E], epsilon: f64) -> () {
        let r = inverse_rms(x, epsilon);
        for ((y, x), w) in y.iter_mut().zip(x).zip(weight) {
            *y = E::round(E::round(x.widen() * r).widen() * w.widen());
        }
    }
}

/// `passed_by` + d_x of [`rms_norm`]: with g = d_y·w and r = 1/√(mean(x²) + ε), d_x = r·g − x·r³·mean(g·x). `passed_by` is the
/// gradient that reaches x beside the norm; of x's kind, as the result.
pub fn rms_norm_backward(
    x_nd: &Tensor,
    weight_d: &Tensor,
    epsilon: f64,
    d_y_nd: &Tensor,
    passed_by_nd: Option<&Tensor>,
) -> Tensor {
    by_kinds!(
        x_nd,
        weight_d,
        norm_backward(rms_norm_backward_of_row, x_nd, weight_d, epsilon, d_y_nd, passed_by_nd)
    )
}

vectorized! {
    fn rms_norm_backward_of_row<X: Element, E: Element>(
        d_x: &mut [X],
        x: &[X],
        d_y: &[E],
        weight: &[E],
        passed_by: Option<&[X]>,
        epsilon: f64,
    ) -> () {
        let r = inverse_rms(x, epsilon);
        let mut lanes = [0f32; LANES];
        for ((x, d_y), w) in x.chunks(LANES).zip(d_y.chunks(LANES)).zip(weight.chunks(LANES)) {
            for (((lane, x), d_y), w) in lanes.iter_mut().zip(x).zip(d_y).zip(w) {
                *lane += d_y.widen() * w.widen() * x.widen();
            }
        }
        let projection = total(lanes) / d_x.len() as f32 * r * r * r;
        let of_norm = |x: X, d_y: E, w: E| d_y.widen() * w.widen() * r - x.widen() * projection;
        write_sum(d_x, x, d_y, weight, passed_by, of_norm);
    }
}

/// What the derivative of a norm does to one row: (d_x, x, d_y, weight, what passed by, ε).
type OfRow<X, E> = fn(&mut [X], &[X], &[E], &[E], Option<&[X]>, f64);

fn norm_backward<X: Element, E: Element>(
    of_row: OfRow<X, E>,
    x_nd: &Tensor,
    weight_d: &Tensor,
    epsilon: f64,
    d_y_nd: &Tensor,
    passed_by_nd: Option<&Tensor>,
) -> Tensor {
    let (x_nd, d_y_nd) = (x_nd.contiguous(), d_y_nd.contiguous());
    let passed_by_nd = passed_by_nd.map(Tensor::contiguous);
    let (d, weight) = (width(&x_nd), E::of(weight_d));
    let mut d_x_nd = x_nd.empty_like();
    let passed_by = passed_by_nd.as_ref().map(X::of);
    let rows = X::of_mut(&mut d_x_nd)
        .par_chunks_exact_mut(d)
        .zip(X::of(&x_nd).par_chunks_exact(d))
        .zip(E::of(&d_y_nd).par_chunks_exact(d));
    rows.enumerate().for_each(|(n, ((d_x, x), d_y))| {
        let passed_by = passed_by.map(|all| &all[n * d..(n + 1) * d]);
        of_row(d_x, x, d_y, weight, passed_by, epsilon);
    });
    d_x_nd
}

/// d_x = passed_by + of_norm(x, d_y, w), element by element.
#[inline(always)]
fn write_sum<X: Element, E: Element>(
    d_x: &mut [X],
    x: &[X],
    d_y: &[E],
    weight: &[E],
    passed_by: Option<&[X]>,
    of_norm: impl Fn(X, E, E) -> f32,
) {
    let outputs = d_x.iter_mut().zip(x).zip(d_y).zip(weight);
    match passed_by {
        None => outputs.for_each(|(((d_x, x), d_y), w)| *d_x = X::round(of_norm(*x, *d_y, *w))),
        // The sum is rounded once.
        Some(passed_by) => outputs
            .zip(passed_by)
            .for_each(|((((d_x, x), d_y), w), p)| *d_x = X::round(p.widen() + of_norm(*x, *d_y, *w))),
    }
}

/// d_w of [`rms_norm`]: Σ_n d_y · x·r, f32.
pub fn rms_norm_weight_gradient(x_nd: &Tensor, epsilon: f64, d_y_nd: &Tensor) -> Tensor {
    let x_nd = x_nd.to_kind(Kind::Float);
    let r_n1 = (x_nd.square().mean_dim(-1, true, Kind::Float) + epsilon).rsqrt();
    (d_y_nd.to_kind(Kind::Float) * x_nd * r_n1).sum_dim_intlist(0, false, Kind::Float)
}

/// LayerNorm of each row (Ba et al. 2016): (x − μ)·r·w + b with r = 1/√(σ² + ε); of w's kind.
pub fn layer_norm(x_nd: &Tensor, weight_d: &Tensor, bias_d: &Tensor, epsilon: f64) -> Tensor {
    fn each<X: Element, E: Element>(x_nd: &Tensor, weight_d: &Tensor, bias_d: &Tensor, epsilon: f64) -> Tensor {
        let (d, weight, bias) = (width(x_nd), E::of(weight_d), E::of(bias_d));
        let mut y_nd = Tensor::empty(x_nd.size(), (weight_d.kind(), x_nd.device()));
        let rows = E::of_mut(&mut y_nd)
            .par_chunks_exact_mut(d)
            .zip(X::of(x_nd).par_chunks_exact(d));
        rows.for_each(|(y, x)| layer_norm_of_row(y, x, weight, bias, epsilon));
        y_nd
    }
    let x_nd = x_nd.contiguous();
    by_kinds!(x_nd, weight_d, each(&x_nd, weight_d, bias_d, epsilon))
}

vectorized! {
    fn layer_norm_of_row<X: Element, E: Element>(y: &mut [E], x: &[X], weight: &[E], bias: &[E], epsilon: f64) -> () {
        let (mean, r) = moments(x, epsilon);
        for (((y, x), w), b) in y.iter_mut().zip(x).zip(weight).zip(bias) {
            *y = E::round((x.widen() - mean) * r * w.widen() + b.widen());
        }
    }
}

/// `passed_by` + d_x of [`layer_norm`]: with g = d_y·w and z = (x − μ)·r, d_x = r·(g − mean(g) − z·mean(g·z)). `passed_by` is
/// the gradient that reaches x beside the norm; of x's kind, as the result.
pub fn layer_norm_backward(
    x_nd: &Tensor,
    weight_d: &Tensor,
    epsilon: f64,
    d_y_nd: &Tensor,
    passed_by_nd: Option<&Tensor>,
) -> Tensor {
    by_kinds!(
        x_nd,
        weight_d,
        norm_backward(
            layer_norm_backward_of_row,
            x_nd,
            weight_d,
            epsilon,
            d_y_nd,
            passed_by_nd
        )
    )
}

vectorized! {
    fn layer_norm_backward_of_row<X: Element, E: Element>(
        d_x: &mut [X],
        x: &[X],
        d_y: &[E],
        weight: &[E],
        passed_by: Option<&[X]>,
        epsilon: f64,
    ) -> () {
        let (mean, r) = moments(x, epsilon);
        let (mut sums, mut products) = ([0f32; LANES], [0f32; LANES]);
        for ((x, d_y), w) in x.chunks(LANES).zip(d_y.chunks(LANES)).zip(weight.chunks(LANES)) {
            let lanes = sums.iter_mut().zip(&mut products);
            for ((((sum, product), x), d_y), w) in lanes.zip(x).zip(d_y).zip(w) {
                let g = d_y.widen() * w.widen();
                *sum += g;
                *product += g * ((x.widen() - mean) * r);
            }
        }
        let d = d_x.len() as f32;
        let (mean_g, projection) = (total(sums) / d, total(products) / d);
        let of_norm = |x: X, d_y: E, w: E| (d_y.widen() * w.widen() - mean_g - (x.widen() - mean) * r * projection) * r;
        write_sum(d_x, x, d_y, weight, passed_by, of_norm);
    }
}

/// (μ, 1/√(σ² + ε)), the variance from the differences, in a second pass over what is in the nearest cache by then.
#[inline(always)]
fn moments<E: Element>(x: &[E], epsilon: f64) -> (f32, f32) {
    let d = x.len() as f32;
    let mean = sum(x, |x| x) / d;
    let variance = sum(x, |x| (x - mean) * (x - mean)) / d;
    (mean, 1.0 / (variance + epsilon as f32).sqrt())
}

#[inline(always)]
fn inverse_rms<E: Element>(x: &[E], epsilon: f64) -> f32 {
    let mean_square = sum(x, |x| x * x) / x.len() as f32;
    1.0 / (mean_square + epsilon as f32).sqrt()
}

/// SwiGLU (Shazeer 2020): silu(gate) · up.
pub fn swiglu(gate_nf: &Tensor, up_nf: &Tensor) -> Tensor {
    fn each<E: Element>(gate_nf: &Tensor, up_nf: &Tensor) -> Tensor {
        let mut y_nf = gate_nf.empty_like();
        let tasks = E::of_mut(&mut y_nf)
            .par_chunks_mut(TASK)
            .zip(E::of(gate_nf).par_chunks(TASK))
            .zip(E::of(up_nf).par_chunks(TASK));
        tasks.for_each(|((y, gate), up)| swiglu_of(y, gate, up));
        y_nf
    }
    by_kind!(gate_nf, each(gate_nf, up_nf))
}

vectorized! {
    fn swiglu_of<E: Element>(y: &mut [E], gate: &[E], up: &[E]) -> () {
        for ((y, gate), up) in y.iter_mut().zip(gate).zip(up) {
            *y = E::round(gate.widen() * sigmoid(gate.widen()) * up.widen());
        }
    }
}

/// (d_gate, d_up) of [`swiglu`]: with s = σ(gate), d_up = d_y·gate·s and d_gate = d_y·up·s·(1 + gate·(1 − s)).
pub fn swiglu_backward(gate_nf: &Tensor, up_nf: &Tensor, d_y_nf: &Tensor) -> (Tensor, Tensor) {
    fn each<E: Element>(gate_nf: &Tensor, up_nf: &Tensor, d_y_nf: &Tensor) -> (Tensor, Tensor) {
        let (mut d_gate_nf, mut d_up_nf) = (gate_nf.empty_like(), gate_nf.empty_like());
        let tasks = E::of_mut(&mut d_gate_nf)
            .par_chunks_mut(TASK)
            .zip(E::of_mut(&mut d_up_nf).par_chunks_mut(TASK))
            .zip(E::of(gate_nf).par_chunks(TASK))
            .zip(E::of(up_nf).par_chunks(TASK))
            .zip(E::of(d_y_nf).par_chunks(TASK));
        tasks.for_each(|((((d_gate, d_up), gate), up), d_y)| swiglu_backward_of(d_gate, d_up, gate, up, d_y));
        (d_gate_nf, d_up_nf)
    }
    let d_y_nf = d_y_nf.contiguous();
    by_kind!(gate_nf, each(gate_nf, up_nf, &d_y_nf))
}

vectorized! {
    fn swiglu_backward_of<E: Element>(d_gate: &mut [E], d_up: &mut [E], gate: &[E], up: &[E], d_y: &[E]) -> () {
        let outputs = d_gate.iter_mut().zip(d_up);
        for (((outputs, gate), up), d_y) in outputs.zip(gate).zip(up).zip(d_y) {
            let (gate, up, d_y) = (gate.widen(), up.widen(), d_y.widen());
            let s = sigmoid(gate);
            *outputs.0 = E::round(d_y * up * (s * (1.0 + gate * (1.0 - s))));
            *outputs.1 = E::round(d_y * (gate * s));
        }
    }
}

/// GELU. The form with tanh is x·σ(2u) with u = √(2/π)·(x + 0.044715 x³); the other is libtorch's own kernel.
pub fn gelu(x_nf: &Tensor, form: Gelu) -> Tensor {
    fn each<E: Element>(x_nf: &Tensor) -> Tensor {
        let mut y_nf = x_nf.empty_like();
        let tasks = E::of_mut(&mut y_nf)
            .par_chunks_mut(TASK)
            .zip(E::of(x_nf).par_chunks(TASK));
        tasks.for_each(|(y, x)| gelu_of(y, x));
        y_nf
    }
    match form {
        Gelu::Tanh => by_kind!(x_nf, each(x_nf)),
        Gelu::Exact => x_nf.gelu("none"),
    }
}

vectorized! {
    fn gelu_of<E: Element>(y: &mut [E], x: &[E]) -> () {
        for (y, x) in y.iter_mut().zip(x) {
            let x = x.widen();
            *y = E::round(x * sigmoid(x * (TWICE_ROOT + CUBIC * x * x)));
        }
    }
}

/// d_x of [`gelu`]: with s = σ(2u), d_y·s·(1 + x·(1 − s)·2u′).
pub fn gelu_backward(x_nf: &Tensor, form: Gelu, d_y_nf: &Tensor) -> Tensor {
    fn each<E: Element>(x_nf: &Tensor, d_y_nf: &Tensor) -> Tensor {
        let mut d_x_nf = x_nf.empty_like();
        let tasks = E::of_mut(&mut d_x_nf)
            .par_chunks_mut(TASK)
            .zip(E::of(x_nf).par_chunks(TASK))
            .zip(E::of(d_y_nf).par_chunks(TASK));
        tasks.for_each(|((d_x, x), d_y)| gelu_backward_of(d_x, x, d_y));
        d_x_nf
    }
    let d_y_nf = d_y_nf.contiguous();
    match form {
        Gelu::Tanh => by_kind!(x_nf, each(x_nf, &d_y_nf)),
        Gelu::Exact => x_nf.gelu_backward(&d_y_nf, "none"),
    }
}

vectorized! {
    fn gelu_backward_of<E: Element>(d_x: &mut [E], x: &[E], d_y: &[E]) -> () {
        for ((d_x, x), d_y) in d_x.iter_mut().zip(x).zip(d_y) {
            let (x, d_y) = (x.widen(), d_y.widen());
            let s = sigmoid(x * (TWICE_ROOT + CUBIC * x * x));
            let slope = TWICE_ROOT + 3.0 * CUBIC * x * x;
            *d_x = E::round(d_y * (s * (1.0 + x * (1.0 - s) * slope)));
        }
    }
}

/// 2·√(2/π)
const TWICE_ROOT: f32 = 1.595_769;
const CUBIC: f32 = TWICE_ROOT * 0.044_715;

/// Turns pairs (i, i + d/2) of every head in place, by the angles of the position: `cos_th` and `sin_th` hold d/2 values a
/// position, `direction` is 1 or −1. `x_bthd` is contiguous.
pub fn rotate(x_bthd: &mut Tensor, cos_th: &Tensor, sin_th: &Tensor, direction: f32) {
    fn each<E: Element>(x_bthd: &mut Tensor, cos_td: &[f32], sin_td: &[f32], direction: f32) {
        let size = x_bthd.size();
        let [time, heads, dim] = [1, 2, 3].map(|axis| size[axis] as usize);
        let half = dim / 2;
        let positions = E::of_mut(x_bthd).par_chunks_exact_mut(heads * dim);
        positions.enumerate().for_each(|(position, x)| {
            let t = position % time;
            let (cos, sin) = (&cos_td[t * half..(t + 1) * half], &sin_td[t * half..(t + 1) * half]);
            rotate_heads(x, cos, sin, direction);
        });
    }
    let (cos, sin) = (memory::f32s(cos_th), memory::f32s(sin_th));
    by_kind!(x_bthd, each(x_bthd, cos, sin, direction));
}

vectorized! {
    fn rotate_heads<E: Element>(x_hd: &mut [E], cos: &[f32], sin: &[f32], direction: f32) -> () {
        for head in x_hd.chunks_exact_mut(2 * cos.len()) {
            let (first, second) = head.split_at_mut(cos.len());
            for (((first, second), cos), sin) in first.iter_mut().zip(second).zip(cos).zip(sin) {
                let (a, b, sin) = (first.widen(), second.widen(), sin * direction);
                *first = E::round(a * cos - b * sin);
                *second = E::round(b * cos + a * sin);
            }
        }
    }
}

/// Fills `mask_nd`: 0 with probability `p`, else 1 / (1 − p). Row n's elements are drawn from `streams[n]`, in order.
pub fn dropout_mask(mask_nd: &mut Tensor, streams: &[random::Stream], p: f64) {
    fn each<E: Element>(mask_nd: &mut Tensor, streams: &[random::Stream], p: f64) {
        let (threshold, kept) = (random::threshold(p), E::round((1.0 / (1.0 - p)) as f32));
        let d = mask_nd.numel() / streams.len().max(1);
        let rows = E::of_mut(mask_nd).par_chunks_exact_mut(d.max(1)).zip(streams);
        rows.for_each(|(row, stream)| {
            for (index, value) in row.iter_mut().enumerate() {
                let dropped = stream.bits(index as u64) < threshold;
                *value = if dropped { E::round(0.0) } else { kept };
            }
        });
    }
    by_kind!(mask_nd, each(mask_nd, streams, p));
}

/// 8-bit floating-point rows (E4M3), each with a factor, f32: x ≈ factor · y, and the largest of each row's y is 448. For
/// checks: libtorch's own operations, of which none multiplies such rows on a CPU.
pub fn quantize_rows(x_nd: &Tensor) -> (Tensor, Tensor) {
    let x_nd = x_nd.to_kind(Kind::Float);
    let most_n1 = x_nd.abs().amax([-1i64], true);
    let factor_n1 = (&most_n1 / 448.0).where_self(&most_n1.not_equal(0.0), &most_n1.ones_like());
    (
        (x_nd / &factor_n1).to_kind(Kind::Float8e4m3fn),
        factor_n1.squeeze_dim(-1),
    )
}

fn width(tensor: &Tensor) -> usize {
    *tensor.size().last().expect("a matrix has axes") as usize
}

/// Σ f(x), by lanes.
#[inline(always)]
pub(in crate::model) fn sum<E: Element>(row: &[E], f: impl Fn(f32) -> f32) -> f32 {
    let mut lanes = [0f32; LANES];
    let chunks = row.chunks_exact(LANES);
    chunks
        .remainder()
        .iter()
        .zip(&mut lanes)
        .for_each(|(x, lane)| *lane += f(x.widen()));
    for chunk in chunks {
        for (x, lane) in chunk.iter().zip(&mut lanes) {
            *lane += f(x.widen());
        }
    }
    total(lanes)
}

/// Σ a·b, by lanes.
#[inline(always)]
pub(in crate::model) fn dot<A: Element, B: Element>(a: &[A], b: &[B]) -> f32 {
    let mut lanes = [0f32; LANES];
    let (a, b) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let rest = a.remainder().iter().zip(b.remainder());
    for (a, b) in a.zip(b) {
        for ((lane, a), b) in lanes.iter_mut().zip(a).zip(b) {
            *lane += a.widen() * b.widen();
        }
    }
    for (lane, (a, b)) in lanes.iter_mut().zip(rest) {
        *lane += a.widen() * b.widen();
    }
    total(lanes)
}

#[inline(always)]
fn total(mut lanes: [f32; LANES]) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            lanes[lane] += lanes[lane + width];
        }
        width /= 2;
    }
    lanes[0]
}

#[inline(always)]
fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// eˣ to 2 units in the last place, without branches: 2ⁿ by the exponent's bits, the rest by Cephes' polynomial (Moshier 1989).
/// Beyond ±87 it stays at the border's value; NaN stays NaN.
#[inline(always)]
pub(in crate::model) fn exp(x: f32) -> f32 {
    const SHIFT: f32 = 12_582_912.0;
    let x = x.clamp(-87.0, 87.0);
    // Adding 1.5·2²³ leaves the nearest whole number in the last bits.
    let shifted = x * std::f32::consts::LOG2_E + SHIFT;
    let n = shifted - SHIFT;
    // ln 2 in two parts: n times the first is exact.
    let r = x - n * 0.693_359_4 + n * 2.121_944_4e-4;
    let mut p = 1.987_569_2e-4;
    for coefficient in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 0.166_666_65, 0.5] {
        p = p * r + coefficient;
    }
    let power = f32::from_bits(shifted.to_bits().wrapping_sub(SHIFT.to_bits()).wrapping_add(127) << 23);
    (p * r * r + r + 1.0) * power
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::operands::random;

    /// Ours against the formula in libtorch's operations: the value, and the derivatives by autograd.
    fn check(
        inputs: &[Tensor],
        formula: impl Fn(&[Tensor]) -> Tensor,
        forward: impl Fn(&[Tensor]) -> Tensor,
        backward: impl Fn(&[Tensor], &Tensor) -> Vec<Tensor>,
    ) {
        let leaves: Vec<Tensor> = inputs.iter().map(|x| x.copy().set_requires_grad(true)).collect();
        let y = formula(&leaves);
        close(&forward(inputs), &y.detach());
        let d_y = random(&y.size());
        (y * &d_y).sum(Kind::Float).backward();
        for (leaf, ours) in leaves.iter().zip(backward(inputs, &d_y)) {
            close(&ours, &leaf.grad());
        }
    }

    /// f32 sums of some hundred terms, in two orders.
    fn close(ours: &Tensor, exact: &Tensor) {
        let difference = f64::try_from((ours - exact).abs().max()).unwrap();
        assert!(difference < 2e-5, "difference {difference}");
    }

    /// Widths that are no multiple of the lanes, and more than one block.
    const WIDTHS: [i64; 4] = [5, 16, 300, 5000];

    #[test]
    fn rms_norm_and_its_derivatives_are_the_formulas() {
        for width in WIDTHS {
            let formula = |x: &[Tensor]| {
                let mean_square = x[0].square().mean_dim(-1, true, Kind::Float);
                &x[0] * (mean_square + 1e-5f64).rsqrt() * &x[1]
            };
            let backward = |x: &[Tensor], d_y: &Tensor| {
                let alone = rms_norm_backward(&x[0], &x[1], 1e-5, d_y, None);
                let beside = random(&alone.size());
                close(
                    &rms_norm_backward(&x[0], &x[1], 1e-5, d_y, Some(&beside)),
                    &(&alone + beside),
                );
                vec![alone, rms_norm_weight_gradient(&x[0], 1e-5, d_y)]
            };
            let inputs = [random(&[7, width]), random(&[width]) + 1.0];
            check(&inputs, formula, |x| rms_norm(&x[0], &x[1], 1e-5), backward);
        }
    }

    #[test]
    fn swiglu_and_its_derivatives_are_the_formulas() {
        let inputs = [random(&[40, 600]) * 3.0, random(&[40, 600])];
        check(
            &inputs,
            |x| x[0].silu() * &x[1],
            |x| swiglu(&x[0], &x[1]),
            |x, d_y| {
                let (d_gate, d_up) = swiglu_backward(&x[0], &x[1], d_y);
                vec![d_gate, d_up]
            },
        );
    }

    #[test]
    fn layer_norm_and_its_derivatives_are_the_formulas() {
        for width in WIDTHS {
            let formula = |x: &[Tensor]| {
                let centred = &x[0] - x[0].mean_dim(-1, true, Kind::Float);
                let variance = centred.square().mean_dim(-1, true, Kind::Float);
                centred * (variance + 1e-5f64).rsqrt() * &x[1] + &x[2]
            };
            let backward = |x: &[Tensor], d_y: &Tensor| {
                let alone = layer_norm_backward(&x[0], &x[1], 1e-5, d_y, None);
                let beside = random(&alone.size());
                close(
                    &layer_norm_backward(&x[0], &x[1], 1e-5, d_y, Some(&beside)),
                    &(&alone + beside),
                );
                let (d_weight, d_bias) = crate::model::kernels::layer_norm_weight_gradients(&x[0], 1e-5, d_y);
                vec![alone, d_weight, d_bias]
            };
            // Off centre, as streams are.
            let inputs = [random(&[7, width]) + 0.5, random(&[width]) + 1.0, random(&[width])];
            check(&inputs, formula, |x| layer_norm(&x[0], &x[1], &x[2], 1e-5), backward);
        }
    }

    #[test]
    fn both_gelus_and_their_derivatives_are_the_formulas() {
        for (form, name) in [(Gelu::Tanh, "tanh"), (Gelu::Exact, "none")] {
            check(
                &[random(&[40, 600]) * 4.0],
                |x| x[0].gelu(name),
                |x| gelu(&x[0], form),
                |x, d_y| vec![gelu_backward(&x[0], form, d_y)],
            );
        }
        // Where tanh has no more to give.
        let far = Tensor::from_slice(&[-1e4f32, -40.0, 40.0, 1e4]);
        let expected = Tensor::from_slice(&[0f32, 0.0, 40.0, 1e4]);
        close(&gelu(&far, Gelu::Tanh), &expected);
    }

    #[test]
    fn norms_of_an_f32_stream_beside_bf16_round_only_what_is_bf16() {
        let x = random(&[3, 50]);
        let [weight, bias] = [random(&[50]), random(&[50])].map(|x| x.to_kind(Kind::BFloat16));
        let (d_y, beside) = (random(&[3, 50]).to_kind(Kind::BFloat16), random(&[3, 50]));
        let wide = |x: &Tensor| x.to_kind(Kind::Float);
        let y = layer_norm(&x, &weight, &bias, 1e-5);
        let exact = layer_norm(&x, &wide(&weight), &wide(&bias), 1e-5);
        assert_eq!(y, exact.to_kind(Kind::BFloat16));
        let d_x = layer_norm_backward(&x, &weight, 1e-5, &d_y, Some(&beside));
        let exact = layer_norm_backward(&x, &wide(&weight), 1e-5, &wide(&d_y), Some(&beside));
        assert_eq!((d_x.kind(), &d_x), (Kind::Float, &exact));
        let y = rms_norm(&x, &weight, 1e-5);
        assert_eq!(y.kind(), Kind::BFloat16);
        // Rounded twice, as in bf16 alone, each time by 2⁻⁸ of the value at most.
        let exact = rms_norm(&x, &wide(&weight), 1e-5);
        let difference = ((wide(&y) - &exact) / exact.abs().clamp_min(1e-6)).abs().max();
        assert!(f64::try_from(difference).unwrap() < 1.01 / 128.0);
        let d_x = rms_norm_backward(&x, &weight, 1e-5, &d_y, Some(&beside));
        let exact = rms_norm_backward(&x, &wide(&weight), 1e-5, &wide(&d_y), Some(&beside));
        assert_eq!((d_x.kind(), &d_x), (Kind::Float, &exact));
    }

    #[test]
    fn cross_entropy_and_its_derivative_are_the_formulas() {
        for width in WIDTHS {
            let targets: Vec<i64> = (0..9).map(|row| (row * 31) % width).collect();
            let targets_n = Tensor::from_slice(&targets);
            let ours = |x: &[Tensor]| {
                let mut logits = x[0].copy();
                let nll = cross_entropy(&mut logits, width, &targets_n);
                (nll.to_kind(Kind::Float), logits)
            };
            let formula = |x: &[Tensor]| {
                -x[0]
                    .log_softmax(-1, Kind::Float)
                    .gather(1, &targets_n.unsqueeze(1), false)
                    .squeeze_dim(1)
            };
            let inputs = [random(&[9, width]) * 6.0];
            check(
                &inputs,
                formula,
                |x| ours(x).0,
                |x, d_y| vec![ours(x).1 * d_y.unsqueeze(1)],
            );
            close(
                &nll(&inputs[0], width, &targets_n).to_kind(Kind::Float),
                &ours(&inputs).0,
            );

            // Padding has no probability, whatever is computed there.
            let padding = Tensor::full([9, 5], 50.0, (Kind::Float, tch::Device::Cpu));
            let mut padded = Tensor::cat(&[&inputs[0], &padding], 1);
            assert_eq!(nll(&padded, width, &targets_n), nll(&inputs[0], width, &targets_n));
            assert_eq!(
                cross_entropy(&mut padded, width, &targets_n).to_kind(Kind::Float),
                ours(&inputs).0
            );
            assert_eq!(padded.narrow(1, 0, width), ours(&inputs).1);
            assert_eq!(padded.narrow(1, width, 5), padding.zeros_like());
        }
        // What cannot be computed must be seen: the step skips on a loss that is no number.
        let mut spoilt = Tensor::from_slice(&[1.0f32, f32::NAN, 2.0]).view([1, 3]);
        let found = cross_entropy(&mut spoilt, 3, &Tensor::from_slice(&[0i64]));
        assert!(found.double_value(&[0]).is_nan());
    }

    #[test]
    fn bf16_is_f32_rounded() {
        let (gate, up) = (
            random(&[3, 50]).to_kind(Kind::BFloat16),
            random(&[3, 50]).to_kind(Kind::BFloat16),
        );
        let exact = swiglu(&gate.to_kind(Kind::Float), &up.to_kind(Kind::Float));
        assert_eq!(swiglu(&gate, &up), exact.to_kind(Kind::BFloat16));
        let weight = random(&[50]).to_kind(Kind::BFloat16);
        let exact = rms_norm(
            &gate.to_kind(Kind::Float),
            &weight.ones_like().to_kind(Kind::Float),
            1e-5,
        );
        assert_eq!(rms_norm(&gate, &weight, 1e-5), exact.to_kind(Kind::BFloat16) * &weight);
    }

    #[test]
    fn a_rotation_is_the_formula_and_turns_back() {
        let rotary = crate::model::Rotary::new(9, 8, 10_000.0, None);
        let x = random(&[2, 6, 3, 8]);
        let y = rotary.apply(x.copy());
        close(&rotary.apply_backward(&y), &x);
        // Position 5, pair 1: by 5 · 10000^(−2/8) = 0.5 radians.
        let (a, b) = (x.double_value(&[1, 5, 2, 1]), x.double_value(&[1, 5, 2, 5]));
        let turned = [a * 0.5f64.cos() - b * 0.5f64.sin(), b * 0.5f64.cos() + a * 0.5f64.sin()];
        let found = [y.double_value(&[1, 5, 2, 1]), y.double_value(&[1, 5, 2, 5])];
        assert!((turned[0] - found[0]).abs() + (turned[1] - found[1]).abs() < 1e-6);
    }

    #[test]
    fn the_exponential_is_right_to_two_units_in_the_last_place() {
        for i in -87_000..=87_000 {
            let x = i as f32 / 1000.0;
            let (ours, exact) = (f64::from(exp(x)), f64::from(x).exp());
            assert!((ours / exact - 1.0).abs() < 2.4e-7, "exp({x}) = {ours}, not {exact}");
        }
        assert!(exp(f32::NAN).is_nan() && exp(f32::NEG_INFINITY) < 1.7e-38 && exp(0.0) == 1.0);
    }

    #[test]
    fn rounding_to_bf16_is_the_librarys() {
        for bits in (0..=u32::MAX).step_by(7919) {
            let x = f32::from_bits(bits);
            let (ours, theirs) = (<bf16 as Element>::round(x), bf16::from_f32(x));
            assert!(
                ours.to_bits() == theirs.to_bits() || (x.is_nan() && ours.is_nan()),
                "{x}"
            );
        }
    }
}
