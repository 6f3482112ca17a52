//! `panglot-worker bench-parts`: every part of a training step by itself, on a CPU or a GPU, beside the least time that this
//! machine's own GEMMs or its memory allow for it. What docs/performance.md shows.

use std::time::Instant;

use anyhow::{Result, ensure};
use configs::Group;
use sharding::adamw::{self, AdamW};
use sharding::cuda;
use tch::{Device, Kind, Tensor};

use crate::model::attention::{attend, attend_backward};
use crate::model::fp8::Fp8;
use crate::model::{Linear, LoraPair, Rotary, Weight, kernels};

/// What is measured.
#[derive(Clone, Debug, clap::Args)]
pub struct Settings {
    /// smollm2 (135M, 4 rows of 512 tokens, LoRA on all linears) or llama-7b (one row of 4,096, LoRA on q and v, 260,164 pieces)
    #[arg(long, default_value = "smollm2")]
    shape: String,
    /// f32 or bf16
    #[arg(long, default_value = "bf16")]
    precision: String,
    /// Measure on this machine's GPU.
    #[arg(long)]
    gpu: bool,
    /// How often each part runs between two looks at the clock; the median of five such is printed.
    #[arg(long, default_value_t = 3)]
    runs: usize,
}

/// A model and a micro-batch of it.
struct Shape {
    rows: i64,
    time: i64,
    layers: usize,
    dim: i64,
    wide: i64,
    heads: i64,
    groups: i64,
    head_dim: i64,
    pieces: i64,
    /// Rank of LoRA on all linears, or on q and v only.
    rank: i64,
    everywhere: bool,
}

impl Shape {
    fn named(name: &str) -> Option<Shape> {
        match name {
            "smollm2" => Some(Shape {
                rows: 4,
                time: 512,
                layers: 30,
                dim: 576,
                wide: 1536,
                heads: 9,
                groups: 3,
                head_dim: 64,
                pieces: 49_152,
                rank: 8,
                everywhere: true,
            }),
            "llama-7b" => Some(Shape {
                rows: 1,
                time: 4096,
                layers: 32,
                dim: 4096,
                wide: 11_008,
                heads: 32,
                groups: 32,
                head_dim: 128,
                // 260,164 and padding.
                pieces: 260_224,
                rank: 8,
                everywhere: false,
            }),
            _ => None,
        }
    }
}

/// What bounds a part from below.
#[derive(Clone, Copy)]
enum Work {
    Flop(f64),
    Bytes(f64),
}

/// Measures and prints the table.
///
/// # Errors
/// When a name is not known, or a GPU is asked for and not there.
pub fn bench(settings: &Settings) -> Result<()> {
    let device = match settings.gpu {
        true => cuda::device(0)?,
        false => Device::Cpu,
    };
    let kind = match settings.precision.as_str() {
        "f32" => Kind::Float,
        "bf16" => Kind::BFloat16,
        other => anyhow::bail!("--precision {other} is neither f32 nor bf16"),
    };
    let shape = Shape::named(&settings.shape);
    ensure!(
        shape.is_some(),
        "--shape {} is neither smollm2 nor llama-7b",
        settings.shape
    );
    let table = Table::begin(device, kind, settings.runs);
    parts(&table, &shape.expect("checked above"));
    Ok(())
}

fn parts(table: &Table, shape: &Shape) {
    let &Shape {
        rows,
        time,
        dim,
        wide,
        heads,
        groups,
        head_dim,
        pieces,
        ..
    } = shape;
    let (n, layers) = (rows * time, shape.layers);
    let (q_dim, k_dim) = (heads * head_dim, groups * head_dim);
    let element = table.kind.elt_size_in_bytes() as f64;
    let gemm = |m: i64, n: i64, k: i64| 2.0 * m as f64 * n as f64 * k as f64;
    let bytes = |tensors: f64, columns: i64| Work::Bytes(tensors * (n * columns) as f64 * element);
    table.head();

    // (name, how many in a layer, inputs, outputs, whether LoRA adapts it)
    let linears = [
        ("q", 1, dim, q_dim, true),
        ("k", 1, dim, k_dim, shape.everywhere),
        ("v", 1, dim, k_dim, true),
        ("o", 1, q_dim, dim, shape.everywhere),
        ("gate and up", 2, dim, wide, shape.everywhere),
        ("down", 1, wide, dim, shape.everywhere),
    ];
    for (name, count, inputs, outputs, adapted) in linears {
        let mut linear = table.linear(outputs, inputs, adapted.then_some(shape.rank));
        let (x, d_y) = (table.random(&[n, inputs]), table.random(&[n, outputs]));
        let lora = if adapted { " with LoRA" } else { "" };
        let work = Work::Flop(gemm(n, outputs, inputs));
        table.line(&format!("{name}{lora}"), count * layers, work, &mut || {
            drop(linear.forward(&x, None))
        });
        table.line(&format!("{name}{lora}, backward"), count * layers, work, &mut || {
            drop(linear.backward(&x, None, &d_y))
        });
    }
    if table.device != Device::Cpu && cuda::check_fp8(table.device).is_ok() {
        let (x, fp8) = (table.random(&[n, dim]), Fp8::of(&table.random(&[wide, dim])));
        let work = Work::Flop(gemm(n, wide, dim));
        // Instead of the same in bf16, if wanted: no part of the sum.
        table.line("gate in FP8, with quantising", 0, work, &mut || drop(fp8.forward(&x)));
        table.line("rows to FP8", 0, Work::Bytes((n * dim) as f64 * 3.0), &mut || {
            drop(kernels::quantize_rows(&x))
        });
    }

    let (x, norm) = (table.random(&[n, dim]), table.random(&[dim]));
    table.line("RMSNorm", 2 * layers + 1, bytes(2.0, dim), &mut || {
        drop(kernels::rms_norm(&x, &norm, 1e-5))
    });
    table.line("RMSNorm, backward", 2 * layers + 1, bytes(4.0, dim), &mut || {
        drop(kernels::rms_norm_backward(&x, &norm, 1e-5, &x, Some(&x)))
    });
    table.line("sums of the stream", 2 * layers, bytes(3.0, dim), &mut || drop(&x + &x));
    let (gate, up) = (table.random(&[n, wide]), table.random(&[n, wide]));
    table.line("SwiGLU", layers, bytes(3.0, wide), &mut || {
        drop(kernels::swiglu(&gate, &up))
    });
    table.line("SwiGLU, backward", layers, bytes(5.0, wide), &mut || {
        drop(kernels::swiglu_backward(&gate, &up, &gate))
    });
    let rotary = Rotary::new(time as usize, head_dim as usize, 10_000.0, None).on(table.device);
    let mut turned = Some(table.random(&[rows, time, heads + groups, head_dim]));
    table.line("rotary positions", 2 * layers, bytes(2.0, q_dim + k_dim), &mut || {
        turned = turned.take().map(|x| rotary.apply(x));
    });

    let q = table.random(&[rows, time, heads, head_dim]);
    let [k, v] = [(); 2].map(|()| table.random(&[rows, time, groups, head_dim]));
    // Half of all pairs are causal.
    let attention = 2.0 * rows as f64 * gemm(time, time, q_dim) / 2.0;
    table.line("attention", layers, Work::Flop(attention), &mut || {
        drop(attend(&q, &k, &v, None).out_bthd)
    });
    let attended = attend(&q, &k, &v, None);
    table.line("attention, backward", layers, Work::Flop(2.5 * attention), &mut || {
        drop(attend_backward(&attended, &q, &k, &v, &q, None))
    });

    // The head goes by chunks; one that is large enough stands for all.
    let chunk = n.min(1024);
    let chunks = (n / chunk) as usize;
    let (h, matrix) = (table.random(&[chunk, dim]), table.random(&[pieces, dim]));
    let mut logits = h.matmul(&matrix.tr());
    let targets = Tensor::randint(pieces, [chunk], (Kind::Int64, table.device));
    let work = Work::Flop(gemm(chunk, pieces, dim));
    table.line("head: logits", chunks, work, &mut || drop(h.matmul(&matrix.tr())));
    let traffic = Work::Bytes(3.0 * (chunk * pieces) as f64 * element);
    table.line("head: cross-entropy and its gradient", chunks, traffic, &mut || {
        drop(kernels::cross_entropy(&mut logits, pieces, &targets))
    });
    table.line("head: d_hidden", chunks, work, &mut || drop(logits.matmul(&matrix)));
    table.total();

    println!("\n  where a vocabulary matrix trains, besides:");
    let mut weight = table.weight(pieces, dim, true);
    table.line("head: d_weight", chunks, work, &mut || {
        weight.accumulate_product(&logits.tr(), &h)
    });
    let count = pieces * dim;
    let mut state = [(); 3].map(|()| Tensor::zeros([count], (Kind::Float, table.device)));
    let gradient = weight.grad.as_ref().expect("it trains").view([count]);
    let how = AdamW {
        lr: 1e-4,
        beta1: 0.9,
        beta2: 0.95,
        epsilon: 1e-8,
        weight_decay: 0.0,
        updates_before: 3,
        gradient_scale: 1.0,
    };
    let all = |per_element: f64| Work::Bytes(count as f64 * per_element);
    table.line("AdamW of one matrix", 2, all(28.0), &mut || {
        let [theta, m, v] = &mut state;
        adamw::update(&how, theta, m, v, &gradient, 0..count as usize);
    });
    table.line("sum of squares of its gradient", 2, all(4.0), &mut || {
        adamw::sum_of_squares(&gradient);
    });
}

/// Times parts and prints a line for each.
struct Table {
    device: Device,
    kind: Kind,
    runs: usize,
    /// Of a large GEMM in this kind, FLOP/s.
    peak: f64,
    /// Of a copy, bytes read and written a second.
    bandwidth: f64,
    /// Milliseconds of a step, so far: measured, and the least.
    sums: std::cell::Cell<(f64, f64)>,
}

impl Table {
    /// Measures what the machine gives at best.
    fn begin(device: Device, kind: Kind, runs: usize) -> Table {
        let mut table = Table {
            device,
            kind,
            runs,
            peak: f64::NAN,
            bandwidth: f64::NAN,
            sums: Default::default(),
        };
        let side = if device == Device::Cpu { 2048 } else { 8192 };
        let (a, b) = (table.random(&[side, side]), table.random(&[side, side]));
        table.peak = 2.0 * (side as f64).powi(3) / table.time(&mut || drop(a.matmul(&b)));
        // Far more than caches hold.
        let from = Tensor::zeros([64 << 20], (Kind::Float, device));
        let mut to = from.zeros_like();
        table.bandwidth = 8.0 * from.numel() as f64 / table.time(&mut || to.copy_(&from));
        table
    }

    fn head(&self) {
        println!(
            "{:?}, {:?}: GEMM {:.3} TFLOP/s, memory {:.1} GB/s",
            self.device,
            self.kind,
            self.peak / 1e12,
            self.bandwidth / 1e9
        );
        println!(
            "  {:<40} {:>7} {:>10} {:>11} {:>9} {:>7}",
            "part", "times", "ms", "ms a step", "floor", "share"
        );
    }

    /// Runs `part`; `times` is how often a step does.
    fn line(&self, name: &str, times: usize, work: Work, part: &mut dyn FnMut()) {
        let took = self.time(part) * 1e3;
        let least = match work {
            Work::Flop(flop) => flop / self.peak * 1e3,
            Work::Bytes(bytes) => bytes / self.bandwidth * 1e3,
        };
        let of_step = times as f64;
        println!(
            "  {name:<40} {times:>7} {took:>10.3} {:>11.1} {:>9.1} {:>6.0}%",
            took * of_step,
            least * of_step,
            least / took * 100.0
        );
        let (measured, floor) = self.sums.get();
        self.sums.set((measured + took * of_step, floor + least * of_step));
    }

    fn total(&self) {
        let (measured, least) = self.sums.get();
        println!(
            "  {:<40} {:>7} {:>10} {measured:>11.1} {least:>9.1} {:>6.0}%",
            "all of it",
            "",
            "",
            least / measured * 100.0
        );
    }

    /// Seconds of one run, the median of five batches of runs, after one that is not counted.
    fn time(&self, part: &mut dyn FnMut()) -> f64 {
        let mut batch = || {
            self.wait();
            let began = Instant::now();
            (0..self.runs).for_each(|_| part());
            self.wait();
            began.elapsed().as_secs_f64() / self.runs as f64
        };
        batch();
        let mut seconds: [f64; 5] = std::array::from_fn(|_| batch());
        seconds.sort_by(f64::total_cmp);
        seconds[2]
    }

    fn wait(&self) {
        if self.device != Device::Cpu {
            cuda::wait_for(self.device);
        }
    }

    fn random(&self, shape: &[i64]) -> Tensor {
        Tensor::randn(shape, (Kind::Float, self.device)).to_kind(self.kind)
    }

    fn weight(&self, rows: i64, columns: i64, trains: bool) -> Weight {
        let mut weight = Weight::frozen(String::new(), self.random(&[rows, columns]));
        if trains {
            weight.group = Some(Group::Lora);
            weight.grad = Some(Tensor::zeros([rows, columns], (Kind::Float, self.device)));
        }
        weight
    }

    fn linear(&self, outputs: i64, inputs: i64, rank: Option<i64>) -> Linear {
        Linear {
            path: String::new(),
            weight_oi: self.weight(outputs, inputs, false),
            bias_o: None,
            lora: rank.map(|rank| LoraPair {
                a_ri: self.weight(rank, inputs, true),
                b_or: self.weight(outputs, rank, true),
                scale: 2.0,
                dropout: 0.0,
            }),
            fp8: None,
        }
    }
}
