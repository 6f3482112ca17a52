//! The kernels of `kernels.cu` as functions of tensors: shapes, grids and arguments. Like those of `cpu.rs`, which have the
//! formulas.

use configs::Gelu;
use sharding::cuda::kernels::{Argument, Grid, Launch, Source};
use tch::{Kind, Tensor};

use crate::random;

pub static SOURCE: Source = Source {
    file: "kernels.cu",
    text: include_str!("kernels.cu"),
};

/// Threads of a block that has a row of a few thousand elements.
const ROW_BLOCK: usize = 256;
/// Of one that has a row as long as the vocabulary.
const LONG_ROW_BLOCK: usize = 1024;
/// Of blocks that share all elements alike.
const BLOCK: usize = 256;
/// Several such blocks for each of a GPU's hundred-odd processors; each thread takes more than one turn where there is more.
const MOST_BLOCKS: usize = 4096;
/// By how many blocks a column's sum is shared.
const SHARES: usize = 64;

pub fn cross_entropy(logits_nv: &mut Tensor, pieces: i64, target_n: &Tensor) -> Tensor {
    let (n, width) = rows_and_width(logits_nv);
    let mut nll_n = Tensor::empty([n as i64], (Kind::Double, logits_nv.device()));
    let kind = logits_nv.kind();
    start(
        "cross_entropy",
        kind,
        [n, 1],
        LONG_ROW_BLOCK,
        vec![
            Argument::Write(logits_nv),
            Argument::Read(target_n),
            Argument::Write(&mut nll_n),
            Argument::Whole(pieces),
            Argument::Whole(width),
        ],
    );
    nll_n
}

pub fn nll(logits_nv: &Tensor, pieces: i64, target_n: &Tensor) -> Tensor {
    let (n, width) = rows_and_width(logits_nv);
    let mut nll_n = Tensor::empty([n as i64], (Kind::Double, logits_nv.device()));
    start(
        "nll",
        logits_nv.kind(),
        [n, 1],
        LONG_ROW_BLOCK,
        vec![
            Argument::Read(logits_nv),
            Argument::Read(target_n),
            Argument::Write(&mut nll_n),
            Argument::Whole(pieces),
            Argument::Whole(width),
        ],
    );
    nll_n
}

pub fn rms_norm(x_nd: &Tensor, weight_d: &Tensor, epsilon: f64) -> Tensor {
    if x_nd.kind() != weight_d.kind() {
        // An f32 stream beside bf16: in f32, and rounded after.
        return rms_norm(x_nd, &weight_d.to_kind(x_nd.kind()), epsilon).to_kind(weight_d.kind());
    }
    let x_nd = x_nd.contiguous();
    let (n, d) = rows_and_width(&x_nd);
    let mut y_nd = x_nd.empty_like();
    start(
        "rms_norm",
        x_nd.kind(),
        [n, 1],
        ROW_BLOCK,
        vec![
            Argument::Read(&x_nd),
            Argument::Read(weight_d),
            Argument::Write(&mut y_nd),
            Argument::Whole(d),
            Argument::Real(epsilon as f32),
        ],
    );
    y_nd
}

pub fn rms_norm_backward(
    x_nd: &Tensor,
    weight_d: &Tensor,
    epsilon: f64,
    d_y_nd: &Tensor,
    passed_by_nd: Option<&Tensor>,
) -> Tensor {
    norm_backward("rms_norm_backward", x_nd, weight_d, epsilon, d_y_nd, passed_by_nd)
}

/// The derivatives of both norms take and give the same.
fn norm_backward(
    kernel: &'static str,
    x_nd: &Tensor,
    weight_d: &Tensor,
    epsilon: f64,
    d_y_nd: &Tensor,
    passed_by_nd: Option<&Tensor>,
) -> Tensor {
    let kind = x_nd.kind();
    let (weight_d, d_y_nd) = (&weight_d.to_kind(kind), d_y_nd.to_kind(kind));
    let (x_nd, d_y_nd) = (x_nd.contiguous(), d_y_nd.contiguous());
    let passed_by_nd = passed_by_nd.map(Tensor::contiguous);
    let (n, d) = rows_and_width(&x_nd);
    let mut d_x_nd = x_nd.empty_like();
    start(
        kernel,
        kind,
        [n, 1],
        ROW_BLOCK,
        vec![
            Argument::Read(&x_nd),
            Argument::Read(weight_d),
            Argument::Read(&d_y_nd),
            passed_by_nd.as_ref().map_or(Argument::Absent, Argument::Read),
            Argument::Write(&mut d_x_nd),
            Argument::Whole(d),
            Argument::Real(epsilon as f32),
        ],
    );
    d_x_nd
}

pub fn rms_norm_weight_gradient(x_nd: &Tensor, epsilon: f64, d_y_nd: &Tensor) -> Tensor {
    let (x_nd, d_y_nd) = (x_nd.contiguous(), d_y_nd.to_kind(x_nd.kind()).contiguous());
    let (n, d) = rows_and_width(&x_nd);
    let empty = |shape: &[i64]| Tensor::empty(shape, (Kind::Float, x_nd.device()));
    let shares = SHARES.min(n.max(1));
    let (mut r_n, mut partial_bd, mut sum_d) = (empty(&[n as i64]), empty(&[shares as i64, d]), empty(&[d]));
    start(
        "inverse_rms_rows",
        x_nd.kind(),
        [n, 1],
        ROW_BLOCK,
        vec![
            Argument::Read(&x_nd),
            Argument::Write(&mut r_n),
            Argument::Whole(d),
            Argument::Real(epsilon as f32),
        ],
    );
    let columns = (d as usize).div_ceil(BLOCK);
    start(
        "rms_norm_weight",
        x_nd.kind(),
        [columns, shares],
        BLOCK,
        vec![
            Argument::Read(&x_nd),
            Argument::Read(&d_y_nd),
            Argument::Read(&r_n),
            Argument::Write(&mut partial_bd),
            Argument::Whole(n as i64),
            Argument::Whole(d),
        ],
    );
    start(
        "column_sums",
        Kind::Float,
        [columns, 1],
        BLOCK,
        vec![
            Argument::Read(&partial_bd),
            Argument::Write(&mut sum_d),
            Argument::Whole(shares as i64),
            Argument::Whole(d),
        ],
    );
    sum_d
}

pub fn layer_norm(x_nd: &Tensor, weight_d: &Tensor, bias_d: &Tensor, epsilon: f64) -> Tensor {
    let kind = x_nd.kind();
    if kind != weight_d.kind() {
        // An f32 stream beside bf16: in f32, and rounded after.
        let [weight, bias] = [weight_d, bias_d].map(|w| w.to_kind(kind));
        return layer_norm(x_nd, &weight, &bias, epsilon).to_kind(weight_d.kind());
    }
    let x_nd = x_nd.contiguous();
    let (n, d) = rows_and_width(&x_nd);
    let mut y_nd = x_nd.empty_like();
    start(
        "layer_norm",
        kind,
        [n, 1],
        ROW_BLOCK,
        vec![
            Argument::Read(&x_nd),
            Argument::Read(weight_d),
            Argument::Read(bias_d),
            Argument::Write(&mut y_nd),
            Argument::Whole(d),
            Argument::Real(epsilon as f32),
        ],
    );
    y_nd
}

pub fn layer_norm_backward(
    x_nd: &Tensor,
    weight_d: &Tensor,
    epsilon: f64,
    d_y_nd: &Tensor,
    passed_by_nd: Option<&Tensor>,
) -> Tensor {
    norm_backward("layer_norm_backward", x_nd, weight_d, epsilon, d_y_nd, passed_by_nd)
}

/// libtorch's own kernel, which is one pass on a GPU as well.
pub fn gelu(x_nf: &Tensor, form: Gelu) -> Tensor {
    x_nf.gelu(approximation(form))
}

pub fn gelu_backward(x_nf: &Tensor, form: Gelu, d_y_nf: &Tensor) -> Tensor {
    x_nf.gelu_backward(&d_y_nf.contiguous(), approximation(form))
}

fn approximation(form: Gelu) -> &'static str {
    match form {
        Gelu::Tanh => "tanh",
        Gelu::Exact => "none",
    }
}

pub fn swiglu(gate_nf: &Tensor, up_nf: &Tensor) -> Tensor {
    let mut y_nf = gate_nf.empty_like();
    start(
        "swiglu",
        gate_nf.kind(),
        share(gate_nf),
        BLOCK,
        vec![
            Argument::Read(gate_nf),
            Argument::Read(up_nf),
            Argument::Write(&mut y_nf),
            Argument::Whole(gate_nf.numel() as i64),
        ],
    );
    y_nf
}

pub fn swiglu_backward(gate_nf: &Tensor, up_nf: &Tensor, d_y_nf: &Tensor) -> (Tensor, Tensor) {
    let d_y_nf = d_y_nf.contiguous();
    let (mut d_gate_nf, mut d_up_nf) = (gate_nf.empty_like(), gate_nf.empty_like());
    start(
        "swiglu_backward",
        gate_nf.kind(),
        share(gate_nf),
        BLOCK,
        vec![
            Argument::Read(gate_nf),
            Argument::Read(up_nf),
            Argument::Read(&d_y_nf),
            Argument::Write(&mut d_gate_nf),
            Argument::Write(&mut d_up_nf),
            Argument::Whole(gate_nf.numel() as i64),
        ],
    );
    (d_gate_nf, d_up_nf)
}

pub fn rotate(x_bthd: &mut Tensor, cos_th: &Tensor, sin_th: &Tensor, direction: f32) {
    let size = x_bthd.size();
    let [rows, time, heads, dim] = size[..] else {
        unreachable!("rotations are of [b, t, h, d]")
    };
    assert!(cos_th.size() == [cos_th.size()[0], dim / 2] && cos_th.size()[0] >= time && cos_th.size() == sin_th.size());
    let (kind, grid) = (x_bthd.kind(), share(x_bthd));
    start(
        "rotate",
        kind,
        grid,
        BLOCK,
        vec![
            Argument::Write(x_bthd),
            Argument::Read(cos_th),
            Argument::Read(sin_th),
            Argument::Whole(rows * time),
            Argument::Whole(time),
            Argument::Whole(heads),
            Argument::Whole(dim / 2),
            Argument::Real(direction),
        ],
    );
}

pub fn dropout_mask(mask_nd: &mut Tensor, streams: &[random::Stream], p: f64) {
    let d = mask_nd.numel() / streams.len().max(1);
    let kind = mask_nd.kind();
    let blocks = d.div_ceil(16 / kind.elt_size_in_bytes() * BLOCK).min(MOST_BLOCKS);
    // A launch a row: its key travels with it, where a copy to the GPU would have to be waited for.
    for (row, stream) in streams.iter().enumerate() {
        start(
            "dropout",
            kind,
            [blocks, 1],
            BLOCK,
            vec![
                Argument::Write(mask_nd),
                Argument::Whole((row * d) as i64),
                Argument::Whole(d as i64),
                Argument::Whole(stream.key() as i64),
                Argument::Whole(random::threshold(p) as i64),
                Argument::Real((1.0 / (1.0 - p)) as f32),
            ],
        );
    }
}

pub fn quantize_rows(x_nd: &Tensor) -> (Tensor, Tensor) {
    let x_nd = x_nd.contiguous();
    let (n, d) = rows_and_width(&x_nd);
    let mut y_nd = Tensor::empty(x_nd.size(), (Kind::Float8e4m3fn, x_nd.device()));
    let mut scale_n = Tensor::empty([n as i64], (Kind::Float, x_nd.device()));
    start(
        "quantize_rows",
        x_nd.kind(),
        [n, 1],
        ROW_BLOCK,
        vec![
            Argument::Read(&x_nd),
            Argument::Write(&mut y_nd),
            Argument::Write(&mut scale_n),
            Argument::Whole(d),
        ],
    );
    (y_nd, scale_n)
}

fn start(kernel: &'static str, kind: Kind, grid: Grid, block: usize, arguments: Vec<Argument>) {
    Launch {
        source: &SOURCE,
        kernel,
        kind,
        grid,
        block,
        arguments,
    }
    .start();
}

/// A grid that shares all elements of `tensor`, a wide load's worth a thread at a time.
fn share(tensor: &Tensor) -> Grid {
    let at_once = 16 / tensor.kind().elt_size_in_bytes() * BLOCK;
    [tensor.numel().div_ceil(at_once).min(MOST_BLOCKS), 1]
}

fn rows_and_width(tensor: &Tensor) -> (usize, i64) {
    let width = *tensor.size().last().expect("a matrix has axes");
    (tensor.numel() / (width as usize).max(1), width)
}

/// On the emulator: the same kernels, launches and arguments, against the CPU's functions.
#[cfg(test)]
mod tests {
    use sharding::cuda::kernels::ARCHITECTURES;
    use tch::Device;

    use super::*;
    use crate::model::kernels::cpu;
    use crate::random::operands;

    #[test]
    fn every_kernel_compiles_for_every_architecture() {
        for architecture in ARCHITECTURES {
            SOURCE.compile(architecture).unwrap_or_else(|error| panic!("{error}"));
        }
        assert_eq!(SOURCE.kernels().len(), 27, "{:?}", SOURCE.kernels());
    }

    const KINDS: [Kind; 2] = [Kind::Float, Kind::BFloat16];

    fn random(shape: &[i64], kind: Kind) -> Tensor {
        operands::random(shape).to_kind(kind)
    }

    /// As `random`, but where no wide load may be.
    fn off(shape: &[i64], kind: Kind) -> Tensor {
        let n: i64 = shape.iter().product();
        random(&[n + 1], kind).narrow(0, 1, n).view(shape)
    }

    /// f32: sums in another order, and libm's exponential against ours. bf16: one unit in the last of 8 bits, where the f32
    /// results lie on two sides of a rounding border; few do.
    fn close(ours: &Tensor, exact: &Tensor) {
        assert_eq!((ours.kind(), ours.size()), (exact.kind(), exact.size()));
        let kind = exact.kind();
        let (ours, exact) = (ours.to_kind(Kind::Double), exact.to_kind(Kind::Double));
        let difference = (&ours - &exact).abs();
        let scale = exact.abs().clamp_min(1.0);
        let most = f64::try_from((&difference / scale).max()).expect("a number");
        let others = f64::try_from(difference.greater(1e-12).sum(Kind::Double)).expect("a number");
        let few = 2.0 + 0.03 * exact.numel() as f64;
        match kind {
            Kind::BFloat16 => assert!(most < 8e-3 && others <= few, "{most}, {others} others"),
            _ => assert!(most < 3e-6, "{most}"),
        }
    }

    #[test]
    fn rms_norm_is_the_cpus() {
        for kind in KINDS {
            for (n, d) in [(3, 640), (2, 37), (5, 4104), (70, 8)] {
                let (x, w, d_y, beside) = (
                    random(&[n, d], kind),
                    random(&[d], kind),
                    random(&[n, d], kind),
                    random(&[n, d], kind),
                );
                close(&rms_norm(&x, &w, 1e-5), &cpu::rms_norm(&x, &w, 1e-5));
                for beside in [None, Some(&beside)] {
                    close(
                        &rms_norm_backward(&x, &w, 1e-5, &d_y, beside),
                        &cpu::rms_norm_backward(&x, &w, 1e-5, &d_y, beside),
                    );
                }
                close(
                    &(rms_norm_weight_gradient(&x, 1e-5, &d_y) / 10.0),
                    &(cpu::rms_norm_weight_gradient(&x, 1e-5, &d_y) / 10.0),
                );
            }
            let (x, w) = (random(&[2, 64], kind), off(&[64], kind));
            close(&rms_norm(&x, &w, 1e-5), &cpu::rms_norm(&x, &w, 1e-5));
        }
    }

    #[test]
    fn layer_norm_is_the_cpus() {
        for kind in KINDS {
            for (n, d) in [(3, 640), (2, 37), (5, 4104), (70, 8)] {
                let (x, d_y, beside) = (random(&[n, d], kind), random(&[n, d], kind), random(&[n, d], kind));
                let (w, b) = (random(&[d], kind), random(&[d], kind));
                close(&layer_norm(&x, &w, &b, 1e-5), &cpu::layer_norm(&x, &w, &b, 1e-5));
                for beside in [None, Some(&beside)] {
                    close(
                        &layer_norm_backward(&x, &w, 1e-5, &d_y, beside),
                        &cpu::layer_norm_backward(&x, &w, 1e-5, &d_y, beside),
                    );
                }
            }
            let (x, w) = (random(&[2, 64], kind), off(&[64], kind));
            close(&layer_norm(&x, &w, &w, 1e-5), &cpu::layer_norm(&x, &w, &w, 1e-5));
        }
    }

    #[test]
    fn an_f32_stream_beside_bf16_is_the_cpus() {
        let (x, beside) = (random(&[9, 72], Kind::Float), random(&[9, 72], Kind::Float));
        let [w, b] = [random(&[72], Kind::BFloat16), random(&[72], Kind::BFloat16)];
        let d_y = random(&[9, 72], Kind::BFloat16);
        close(&layer_norm(&x, &w, &b, 1e-5), &cpu::layer_norm(&x, &w, &b, 1e-5));
        close(
            &layer_norm_backward(&x, &w, 1e-5, &d_y, Some(&beside)),
            &cpu::layer_norm_backward(&x, &w, 1e-5, &d_y, Some(&beside)),
        );
        close(
            &rms_norm_backward(&x, &w, 1e-5, &d_y, Some(&beside)),
            &cpu::rms_norm_backward(&x, &w, 1e-5, &d_y, Some(&beside)),
        );
        close(
            &rms_norm_weight_gradient(&x, 1e-5, &d_y),
            &cpu::rms_norm_weight_gradient(&x, 1e-5, &d_y),
        );
        // The CPU's is rounded twice, as in bf16 alone: by 2⁻⁸ of the value at most, beside the GPU's one time.
        let (ours, theirs) = (rms_norm(&x, &w, 1e-5), cpu::rms_norm(&x, &w, 1e-5));
        let [wide, theirs] = [&ours, &theirs].map(|y| y.to_kind(Kind::Float));
        let difference = ((wide - &theirs) / theirs.abs().clamp_min(1e-6)).abs().max();
        assert!(ours.kind() == Kind::BFloat16 && f64::try_from(difference).expect("a number") < 3.1 / 256.0);
    }

    #[test]
    fn swiglu_is_the_cpus() {
        for kind in KINDS {
            let whole = [
                random(&[7, 304], kind) * 3.0,
                random(&[7, 304], kind),
                random(&[7, 304], kind),
            ];
            let odd = [off(&[3, 37], kind), off(&[3, 37], kind), off(&[3, 37], kind)];
            for [gate, up, d_y] in [whole, odd] {
                close(&swiglu(&gate, &up), &cpu::swiglu(&gate, &up));
                let (ours, exact) = (
                    swiglu_backward(&gate, &up, &d_y),
                    cpu::swiglu_backward(&gate, &up, &d_y),
                );
                close(&ours.0, &exact.0);
                close(&ours.1, &exact.1);
            }
        }
    }

    #[test]
    fn rotations_are_the_cpus() {
        for kind in KINDS {
            for (rows, time, heads, dim) in [(2, 6, 3, 16), (1, 9, 2, 6), (2, 3, 1, 128)] {
                let angles = Tensor::rand([time + 4, dim / 2], (Kind::Float, Device::Cpu)) * 6.0;
                let (cos, sin) = (angles.cos(), angles.sin());
                for direction in [1.0, -1.0] {
                    let x = random(&[rows, time, heads, dim], kind);
                    let (mut ours, mut exact) = (x.copy(), x.copy());
                    rotate(&mut ours, &cos, &sin, direction);
                    cpu::rotate(&mut exact, &cos, &sin, direction);
                    close(&ours, &exact);
                }
            }
        }
    }

    #[test]
    fn cross_entropy_is_the_cpus() {
        for kind in KINDS {
            // Rows that begin at any multiple of 2 bytes; shorter than a wide load; more than one turn of every thread.
            for (n, v, padding) in [
                (5, 1003, 0),
                (3, 3, 0),
                (2, 9001, 0),
                (4, 512, 0),
                (5, 1003, 21),
                (3, 3, 5),
                (2, 100, 900),
            ] {
                let logits = random(&[n, v + padding], kind) * 6.0;
                let targets: Vec<i64> = (0..n).map(|row| (row * 31 + v - 1) % v).collect();
                let targets = Tensor::from_slice(&targets);
                let (mut ours, mut exact) = (logits.copy(), logits.copy());
                close(
                    &cross_entropy(&mut ours, v, &targets),
                    &cpu::cross_entropy(&mut exact, v, &targets),
                );
                close(&ours, &exact);
                close(&nll(&logits, v, &targets), &cpu::nll(&logits, v, &targets));
            }
            // What cannot be computed must be seen.
            let spoilt = Tensor::from_slice(&[1.0f32, f32::NAN, 2.0, 1.0, 2.0, 3.0])
                .view([2, 3])
                .to_kind(kind);
            let found = Vec::<f64>::try_from(nll(&spoilt, 3, &Tensor::from_slice(&[0i64, 3]))).unwrap();
            assert!(
                found.iter().all(|nll| nll.is_nan()),
                "a logit and a target that are none: {found:?}"
            );
        }
    }

    #[test]
    fn dropout_is_the_cpus() {
        for kind in KINDS {
            let streams: Vec<_> = (0..3).map(|row| random::Stream::new(7, "test").fork(row)).collect();
            let mut masks = [(); 2].map(|()| random(&[6, 250], kind));
            let [ours, exact] = &mut masks;
            dropout_mask(ours, &streams, 0.3);
            cpu::dropout_mask(exact, &streams, 0.3);
            assert_eq!(ours, exact);
        }
    }

    #[test]
    fn quantised_rows_are_libtorchs_conversion_of_what_is_scaled() {
        for kind in KINDS {
            for (n, d) in [(4, 320), (3, 37)] {
                let x = random(&[n, d], kind)
                    * Tensor::from_slice(&[1e-3f32, 1.0, 50.0, 7.0])
                        .narrow(0, 0, n)
                        .unsqueeze(1);
                // A zero row has a factor all the same; small values fall among the subnormal.
                let _ = x.get(0).zero_();
                let _ = x.get(1).narrow(0, 0, 20).g_mul_scalar_(1e-3);
                let x = x.to_kind(kind);
                let (y, scale) = quantize_rows(&x);
                let (exact_y, exact_scale) = cpu::quantize_rows(&x);
                close(&scale, &exact_scale);
                // An f32 factor may differ in its last bit, and a value on the border then goes the other way.
                let different = y.to_kind(Kind::Float).not_equal_tensor(&exact_y.to_kind(Kind::Float));
                let different = different.to_kind(Kind::Float).mean(Kind::Double).double_value(&[]);
                assert!(different < 2e-3, "{different}");
                let exact = (x.to_kind(Kind::Float) / scale.unsqueeze(1)).to_kind(Kind::Float8e4m3fn);
                assert_eq!(y.to_kind(Kind::Float), exact.to_kind(Kind::Float));
            }
        }
    }
}
