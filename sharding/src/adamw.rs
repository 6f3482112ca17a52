//! AdamW over flat slices: one pass, threaded and in the processor's widest vectors on the CPU, one kernel on a GPU (`adamw.cu`).
//! Source: Loshchilov and Hutter 2019, "Decoupled Weight Decay Regularization", algorithm 2; bias correction as in
//! Kingma and Ba 2015.

use std::ops::Range;

use rayon::prelude::*;
use tch::{Device, Kind, Tensor};

use crate::cuda::kernels::{Argument, Launch, Source};
use crate::memory::{f32s, f32s_mut};
use crate::vectorized;

/// What one update of one parameter group needs.
#[derive(Clone, Copy, Debug)]
pub struct AdamW {
    pub lr: f64,
    pub beta1: f64,
    pub beta2: f64,
    pub epsilon: f64,
    pub weight_decay: f64,
    /// Updates made before this one: 0 in the first.
    pub updates_before: u64,
    /// The gradient is multiplied by this first (clipping).
    pub gradient_scale: f64,
}

/// Elements a task: 16 k × 4 arrays × 4 bytes stay within a core's second-level cache.
const CHUNK: usize = 1 << 14;

/// θ ← θ − lr·(m̂ / (√v̂ + ε) + λθ), with m and v updated in place, for the elements in `range`. Flat f32 tensors of one length
/// on one device.
pub fn update(how: &AdamW, theta: &mut Tensor, m: &mut Tensor, v: &mut Tensor, g: &Tensor, range: Range<usize>) {
    let n = theta.numel();
    assert!(
        [m.numel(), v.numel(), g.numel()] == [n; 3] && range.end <= n,
        "one length, and the range within it"
    );
    match theta.device() {
        Device::Cpu => {
            let g = &f32s(g)[range.clone()];
            let [theta, m, v] = [theta, m, v].map(|tensor| &mut f32s_mut(tensor)[range.clone()]);
            update_slices(how, theta, m, v, g);
        }
        _ => update_on_gpu(how, theta, m, v, g, range),
    }
}

/// A matrix's gradient of which few rows are not zero, on the CPU.
#[derive(Clone, Copy)]
pub struct RowGradient<'a> {
    /// Which rows, ascending.
    pub numbers: &'a [i64],
    /// Those, one behind the other.
    pub values: &'a [f32],
    /// Elements of a row.
    pub width: usize,
}

/// [`update`] of a whole flat matrix on the CPU, to the bit what its gradient with all its zeros would make.
pub fn update_rows(
    how: &AdamW,
    theta: &mut Tensor,
    m: &mut Tensor,
    v: &mut Tensor,
    g: RowGradient,
    range: Range<usize>,
) {
    let [theta, m, v] = [theta, m, v].map(|tensor| &mut f32s_mut(tensor)[range.clone()]);
    let constants = how.constants();
    let chunks = theta
        .par_chunks_mut(CHUNK)
        .zip(m.par_chunks_mut(CHUNK))
        .zip(v.par_chunks_mut(CHUNK));
    chunks.enumerate().for_each_init(
        || vec![0.0; CHUNK],
        |room, (index, ((theta, m), v))| {
            let room = &mut room[..theta.len()];
            g.with_zeros(range.start + index * CHUNK, room);
            update_chunk(&constants, theta, m, v, room);
        },
    );
}

impl RowGradient<'_> {
    /// What of the rows lies in a range of the matrix: where, and the elements.
    fn within(&self, range: Range<usize>) -> impl Iterator<Item = (Range<usize>, &[f32])> {
        let width = self.width;
        let first = self
            .numbers
            .partition_point(|row| (*row as usize + 1) * width <= range.start);
        let rows = self.numbers.iter().zip(self.values.chunks_exact(width)).skip(first);
        let rows = rows.map(move |(row, values)| (*row as usize * width, values));
        rows.take_while(move |(begin, _)| *begin < range.end)
            .map(move |(begin, values)| {
                let here = begin.max(range.start)..(begin + width).min(range.end);
                (here.clone(), &values[here.start - begin..here.end - begin])
            })
    }

    /// Fills `room` with the gradient from element `start` of the matrix on.
    fn with_zeros(&self, start: usize, room: &mut [f32]) {
        room.fill(0.0);
        for (here, values) in self.within(start..start + room.len()) {
            room[here.start - start..here.end - start].copy_from_slice(values);
        }
    }

    /// To the bit [`sum_of_squares`] of the gradient with all its zeros.
    pub fn sum_of_squares(&self) -> f64 {
        let of_row = |row: &i64| {
            let start = *row as usize * self.width;
            start / CHUNK..(start + self.width).div_ceil(CHUNK)
        };
        // Chunks without a row would add 0.
        let mut chunks: Vec<usize> = self.numbers.iter().flat_map(of_row).collect();
        chunks.dedup();
        let of_chunk = |room: &mut Vec<f32>, chunk: usize| {
            self.with_zeros(chunk * CHUNK, room);
            squares_of_chunk(room)
        };
        let partial = chunks.into_par_iter().map_init(|| vec![0.0; CHUNK], of_chunk);
        partial.collect::<Vec<f64>>().iter().sum()
    }
}

/// Σ g² in f64, in an order that does not change. Any device; returns when it is known.
pub fn sum_of_squares(g: &Tensor) -> f64 {
    match g.device() {
        Device::Cpu => sum_on_cpu(f32s(g)),
        _ => sum_on_gpu(g),
    }
}

/// What an update needs, as the elements' arithmetic takes it.
struct Constants {
    decay: f32,
    step_size: f32,
    v_correction: f32,
    beta1: f32,
    beta2: f32,
    epsilon: f32,
    scale: f32,
}

impl AdamW {
    fn constants(&self) -> Constants {
        let t = (self.updates_before + 1) as f64;
        Constants {
            decay: (1.0 - self.lr * self.weight_decay) as f32,
            step_size: (self.lr / (1.0 - self.beta1.powf(t))) as f32,
            v_correction: (1.0 / (1.0 - self.beta2.powf(t)).sqrt()) as f32,
            beta1: self.beta1 as f32,
            beta2: self.beta2 as f32,
            epsilon: self.epsilon as f32,
            scale: self.gradient_scale as f32,
        }
    }
}

/// [`update`] on the CPU's memory: one pass, threaded and vectorised. All slices are equally long.
fn update_slices(how: &AdamW, theta: &mut [f32], m: &mut [f32], v: &mut [f32], g: &[f32]) {
    let constants = how.constants();
    let chunks = theta
        .par_chunks_mut(CHUNK)
        .zip(m.par_chunks_mut(CHUNK))
        .zip(v.par_chunks_mut(CHUNK));
    chunks
        .zip(g.par_chunks(CHUNK))
        .for_each(|(((theta, m), v), g)| update_chunk(&constants, theta, m, v, g));
}

vectorized! {
    fn update_chunk(constants: &Constants, theta: &mut [f32], m: &mut [f32], v: &mut [f32], g: &[f32]) -> () {
        let &Constants {
            decay,
            step_size,
            v_correction,
            beta1,
            beta2,
            epsilon,
            scale,
        } = constants;
        for (((theta, m), v), g) in theta.iter_mut().zip(m).zip(v).zip(g) {
            let g = g * scale;
            *m = beta1 * *m + (1.0 - beta1) * g;
            *v = beta2 * *v + (1.0 - beta2) * g * g;
            let denominator = v.sqrt() * v_correction + epsilon;
            *theta = *theta * decay - step_size * *m / denominator;
        }
    }
}

/// A chunk's squares are added in so many sums, whatever vectors the processor has: the bits are the same on all.
const LANES: usize = 16;

vectorized! {
    fn squares_of_chunk(g: &[f32]) -> f64 {
        let mut sums = [0.0; LANES];
        let (whole, rest) = g.as_chunks::<LANES>();
        for elements in whole {
            for (sum, x) in sums.iter_mut().zip(elements) {
                *sum += f64::from(*x) * f64::from(*x);
            }
        }
        for (sum, x) in sums.iter_mut().zip(rest) {
            *sum += f64::from(*x) * f64::from(*x);
        }
        sums.iter().sum()
    }
}

fn sum_on_cpu(g: &[f32]) -> f64 {
    // Chunks are summed in order, so that the result does not depend on which thread was first.
    let partial: Vec<f64> = g.par_chunks(CHUNK).map(squares_of_chunk).collect();
    partial.iter().sum()
}

/// The kernels of this file.
pub static SOURCE: Source = Source {
    file: "adamw.cu",
    text: include_str!("adamw.cu"),
};

const BLOCK: usize = 256;
/// Blocks that share a slice: several for each of a GPU's hundred-odd processors, and the same on every GPU, since the order
/// of a sum depends on them.
const MOST_BLOCKS: usize = 2048;

fn update_on_gpu(how: &AdamW, theta: &mut Tensor, m: &mut Tensor, v: &mut Tensor, g: &Tensor, range: Range<usize>) {
    let constants = how.constants();
    Launch {
        source: &SOURCE,
        kernel: "adamw",
        kind: theta.kind(),
        grid: [range.len().div_ceil(4 * BLOCK).min(MOST_BLOCKS), 1],
        block: BLOCK,
        arguments: vec![
            Argument::Write(theta),
            Argument::Write(m),
            Argument::Write(v),
            Argument::Read(g),
            Argument::Whole(range.start as i64),
            Argument::Whole(range.len() as i64),
            Argument::Real(constants.decay),
            Argument::Real(constants.step_size),
            Argument::Real(constants.v_correction),
            Argument::Real(constants.beta1),
            Argument::Real(constants.beta2),
            Argument::Real(constants.epsilon),
            Argument::Real(constants.scale),
        ],
    }
    .start();
}

fn sum_on_gpu(g: &Tensor) -> f64 {
    let blocks = g.numel().div_ceil(4 * BLOCK).clamp(1, MOST_BLOCKS);
    let mut partial_b = Tensor::empty([blocks as i64], (Kind::Double, g.device()));
    let mut sum_1 = Tensor::empty([1], (Kind::Double, g.device()));
    fn launch(kernel: &'static str, blocks: usize, block: usize, arguments: Vec<Argument>) {
        Launch {
            source: &SOURCE,
            kernel,
            kind: Kind::Float,
            grid: [blocks, 1],
            block,
            arguments,
        }
        .start();
    }
    let n = Argument::Whole(g.numel() as i64);
    launch(
        "squares",
        blocks,
        BLOCK,
        vec![Argument::Read(g), n, Argument::Write(&mut partial_b)],
    );
    let n = Argument::Whole(blocks as i64);
    launch(
        "total",
        1,
        1024,
        vec![Argument::Read(&partial_b), n, Argument::Write(&mut sum_1)],
    );
    sum_1.double_value(&[0])
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOW: AdamW = AdamW {
        lr: 0.01,
        beta1: 0.9,
        beta2: 0.99,
        epsilon: 1e-3,
        weight_decay: 0.1,
        updates_before: 4,
        gradient_scale: 0.7,
    };

    #[test]
    fn the_first_update_moves_by_the_learning_rate_against_the_gradients_sign() {
        let how = AdamW {
            lr: 0.1,
            beta1: 0.9,
            beta2: 0.999,
            epsilon: 1e-8,
            weight_decay: 0.5,
            updates_before: 0,
            gradient_scale: 1.0,
        };
        let (mut theta, mut m, mut v) = (vec![1.0f32, -2.0], vec![0.0; 2], vec![0.0; 2]);
        update_slices(&how, &mut theta, &mut m, &mut v, &[3.0, -0.5]);
        // θ(1 − 0.1·0.5) ∓ 0.1
        assert!(
            (theta[0] - 0.85).abs() < 1e-6 && (theta[1] + 1.8).abs() < 1e-6,
            "{theta:?}"
        );
        assert!((m[0] - 0.3).abs() < 1e-6 && (v[0] - 0.009).abs() < 1e-6);
    }

    #[test]
    fn a_scaled_gradient_is_a_scaled_gradient() {
        let how = |gradient_scale| AdamW {
            lr: 0.01,
            beta1: 0.9,
            beta2: 0.99,
            epsilon: 1e-3,
            weight_decay: 0.0,
            updates_before: 4,
            gradient_scale,
        };
        let g: Vec<f32> = (0..40_000).map(|i| (i % 17) as f32 - 8.0).collect();
        let halves: Vec<f32> = g.iter().map(|x| x / 2.0).collect();
        let run = |how: AdamW, g: &[f32]| {
            let (mut theta, mut m, mut v) = (vec![1.0f32; g.len()], vec![0.1; g.len()], vec![0.2; g.len()]);
            update_slices(&how, &mut theta, &mut m, &mut v, g);
            theta
        };
        assert_eq!(run(how(0.5), &g), run(how(1.0), &halves));
    }

    #[test]
    fn a_gradient_of_rows_is_the_gradient_with_its_zeros() {
        // Rows that end and begin within chunks, the first and the last of all, and neighbours.
        let (rows, width) = (700, 50);
        let numbers = [0i64, 5, 6, 327, 328, 655, 699];
        let of_rows = Tensor::randn([numbers.len() as i64, width], (Kind::Float, Device::Cpu));
        let whole = Tensor::zeros([rows, width], (Kind::Float, Device::Cpu));
        let whole = whole.index_copy(0, &Tensor::from_slice(&numbers), &of_rows).view([-1]);
        let g = RowGradient {
            numbers: &numbers,
            values: f32s(&of_rows),
            width: width as usize,
        };
        assert_eq!(g.sum_of_squares(), sum_of_squares(&whole));
        let state = [(); 3].map(|()| Tensor::randn([rows * width], (Kind::Float, Device::Cpu)).abs());
        for range in [0..(rows * width) as usize, 260..33_000] {
            let [mut dense, mut sparse] = [(); 2].map(|()| state.each_ref().map(Tensor::copy));
            let [theta, m, v] = &mut dense;
            update(&HOW, theta, m, v, &whole, range.clone());
            let [theta, m, v] = &mut sparse;
            update_rows(&HOW, theta, m, v, g, range);
            assert_eq!(dense, sparse);
        }
    }

    #[test]
    fn the_gpus_kernels_compile_for_every_architecture() {
        for architecture in crate::cuda::kernels::ARCHITECTURES {
            SOURCE.compile(architecture).unwrap_or_else(|error| panic!("{error}"));
        }
        assert_eq!(SOURCE.kernels(), ["adamw_f32", "squares_f32", "total_f32"]);
    }

    #[test]
    fn the_gpus_kernels_do_what_the_cpus_do() {
        let random = |n: i64| Tensor::randn([n], (Kind::Float, Device::Cpu));
        // Whole and partial packs and blocks; a start that is no multiple of 16 bytes; nothing at all.
        for (n, range) in [(2600, 0..2600), (2600, 5..2003), (7, 3..6), (7, 2..2)] {
            let state = [random(n), random(n), random(n).abs()];
            let g = random(n);
            let run = |update: fn(&AdamW, &mut Tensor, &mut Tensor, &mut Tensor, &Tensor, Range<usize>)| {
                let [mut theta, mut m, mut v] = state.each_ref().map(Tensor::copy);
                update(&HOW, &mut theta, &mut m, &mut v, &g, range.clone());
                [theta, m, v]
            };
            for (gpu, cpu) in run(update_on_gpu).iter().zip(run(update)) {
                // The same operations in the same order; the compiler may fuse a product and a sum.
                let difference = (gpu - cpu).abs().max().double_value(&[]);
                assert!(difference < 5e-7, "{n}, {range:?}: {difference}");
            }
            let (gpu, cpu) = (sum_on_gpu(&g), sum_of_squares(&g));
            assert!((gpu / cpu - 1.0).abs() < 1e-12, "{gpu}, not {cpu}");
        }
    }
}
