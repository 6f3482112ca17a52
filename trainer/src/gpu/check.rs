//! `panglot-worker gpu-check`: every kernel, attention and training steps on the GPU against the same on the CPU, and training
//! that NCCL divides against training that nothing divides.

use anyhow::{Result, ensure};
use configs::{FullModule, Gelu, Plan, Precision, Rates, Recompute, Residual};
use corpus::RowsDigest;
use sharding::adamw::{self, AdamW};
use sharding::cuda;
use sharding::cuda::nccl::Nccl;
use sharding::zero::Trained;
use sharding::{Comm, Stage, Zero, digest};
use tch::{Device, Kind, Tensor};

use super::{absence, llama_7b, plan};
use crate::batch::{Batch, MicroBatch};
use crate::evaluate::kind;
use crate::hf::{Family, ModelConfig, Weights};
use crate::model::attention::{attend, attend_backward};
use crate::model::fp8::Fp8;
use crate::model::{Documents, IGNORE, Model, Trains, kernels};
use crate::random::Stream;
use crate::step::Trainer;

/// Compares and prints a line a comparison. Where there is no GPU, one line that says so.
///
/// # Errors
/// When the GPU's results are further from the CPU's than rounding explains.
pub fn check() -> Result<()> {
    if let Some(line) = absence("gpu-check") {
        println!("{line}");
        return Ok(());
    }
    let device = cuda::device(0)?;
    let gpu = cuda::gpu(0)?;
    let (major, minor) = gpu.compute_capability;
    println!(
        "gpu-check: {} (compute capability {major}.{minor}, {:.1} GiB) against the CPU",
        gpu.name,
        gpu.memory_bytes as f64 / f64::from(1 << 30)
    );
    let mut table = Table { device, failed: 0 };
    for kind in [Kind::Float, Kind::BFloat16] {
        check_kernels(&mut table, kind);
        check_attention(&mut table, kind);
    }
    check_adamw(&mut table);
    check_digest(&mut table);
    match cuda::check_fp8(device) {
        Ok(()) => check_fp8(&mut table),
        Err(_) => println!("  (no units for FP8 here: its products are not compared)"),
    }
    for precision in [Precision::F32, Precision::Bf16] {
        check_training(&mut table, precision, LLAMA)?;
        let activation = Gelu::Tanh;
        check_training(&mut table, precision, Family::Gpt2 { activation })?;
        check_division(&mut table, precision)?;
    }
    ensure!(
        table.failed == 0,
        "gpu-check: {} comparisons failed; see the lines above",
        table.failed
    );
    println!("gpu-check: all comparisons passed");
    Ok(())
}

/// Prints what is compared.
struct Table {
    device: Device,
    failed: usize,
}

impl Table {
    /// `compute` on both devices. The difference is ‖Δ‖ / ‖CPU's‖, the largest of what is compared.
    fn compare(&mut self, name: &str, kind: Kind, most: f64, compute: impl Fn(Device) -> Vec<Tensor>) {
        let (cpu, gpu) = (compute(Device::Cpu), compute(self.device));
        let seen = cpu
            .iter()
            .zip(&gpu)
            .map(|(cpu, gpu)| difference(cpu, gpu))
            .fold(0.0, larger);
        self.line(&format!("{name} {}", name_of(kind)), seen, most);
    }

    fn line(&mut self, name: &str, seen: f64, most: f64) {
        // What is no number fails.
        let passed = seen <= most;
        self.failed += usize::from(!passed);
        println!(
            "  {name:<44} {seen:9.2e}   at most {most:7.0e}   {}",
            if passed { "ok" } else { "FAILED" }
        );
    }
}

fn difference(cpu: &Tensor, gpu: &Tensor) -> f64 {
    // What nothing divides was computed on the GPU too.
    let [cpu, gpu] = [cpu, gpu].map(|tensor| tensor.to_device(Device::Cpu).to_kind(Kind::Double));
    (&gpu - &cpu).norm().double_value(&[]) / cpu.norm().double_value(&[]).max(1e-30)
}

/// The larger; NaN wins.
fn larger(a: f64, b: f64) -> f64 {
    if a >= b || a.is_nan() { a } else { b }
}

fn name_of(kind: Kind) -> &'static str {
    if kind == Kind::Float { "f32" } else { "bf16" }
}

/// f32: sums in another order. bf16: results are rounded to 8 bits, some to the other side.
fn rounding(kind: Kind) -> f64 {
    if kind == Kind::Float { 1e-5 } else { 4e-3 }
}

/// Normal numbers, the same on every device.
fn random(shape: &[i64], kind: Kind, name: &str) -> Tensor {
    let n: i64 = shape.iter().product();
    let stream = Stream::new(1, name);
    let values: Vec<f32> = (0..n as u64).map(|i| stream.normal(i) as f32).collect();
    Tensor::from_slice(&values).view(shape).to_kind(kind)
}

fn check_kernels(table: &mut Table, kind: Kind) {
    let most = rounding(kind);
    let (x, d_y, beside) = (
        random(&[300, 4096], kind, "x"),
        random(&[300, 4096], kind, "d_y"),
        random(&[300, 4096], kind, "p"),
    );
    let w = (random(&[4096], Kind::Float, "w") * 0.1 + 1.0).to_kind(kind);
    table.compare("rms_norm", kind, most, |on| {
        vec![kernels::rms_norm(&x.to_device(on), &w.to_device(on), 1e-5)]
    });
    table.compare("rms_norm_backward", kind, most, |on| {
        let [x, w, d_y, beside] = [&x, &w, &d_y, &beside].map(|tensor| tensor.to_device(on));
        vec![
            kernels::rms_norm_backward(&x, &w, 1e-5, &d_y, None),
            kernels::rms_norm_backward(&x, &w, 1e-5, &d_y, Some(&beside)),
        ]
    });
    table.compare("rms_norm_weight_gradient", kind, most, |on| {
        vec![kernels::rms_norm_weight_gradient(
            &x.to_device(on),
            1e-5,
            &d_y.to_device(on),
        )]
    });

    table.compare("layer_norm", kind, most, |on| {
        let [x, w, d_y, beside] = [&x, &w, &d_y, &beside].map(|tensor| tensor.to_device(on));
        vec![
            kernels::layer_norm(&x, &w, &w, 1e-5),
            kernels::layer_norm_backward(&x, &w, 1e-5, &d_y, None),
            kernels::layer_norm_backward(&x, &w, 1e-5, &d_y, Some(&beside)),
        ]
    });
    table.compare("layer_norm_weight_gradients", kind, most, |on| {
        let (d_weight, d_bias) = kernels::layer_norm_weight_gradients(&x.to_device(on), 1e-5, &d_y.to_device(on));
        vec![d_weight, d_bias]
    });
    table.compare("norms of an f32 stream", kind, most, |on| {
        let stream = x.to_kind(Kind::Float).to_device(on);
        let beside = beside.to_kind(Kind::Float).to_device(on);
        let [w, d_y] = [&w, &d_y].map(|tensor| tensor.to_device(on));
        vec![
            kernels::layer_norm(&stream, &w, &w, 1e-5),
            kernels::layer_norm_backward(&stream, &w, 1e-5, &d_y, Some(&beside)),
            kernels::rms_norm_backward(&stream, &w, 1e-5, &d_y, Some(&beside)),
        ]
    });
    for (name, form) in [("gelu, tanh", Gelu::Tanh), ("gelu, exact", Gelu::Exact)] {
        table.compare(name, kind, most, |on| {
            let [x, d_y] = [&x, &d_y].map(|tensor| tensor.to_device(on));
            vec![kernels::gelu(&x, form), kernels::gelu_backward(&x, form, &d_y)]
        });
    }

    let [gate, up, d_y] = ["gate", "up", "d_y"].map(|name| random(&[100, 11_008], kind, name));
    table.compare("swiglu", kind, most, |on| {
        vec![kernels::swiglu(&gate.to_device(on), &up.to_device(on))]
    });
    table.compare("swiglu_backward", kind, most, |on| {
        let [gate, up, d_y] = [&gate, &up, &d_y].map(|tensor| tensor.to_device(on));
        let (d_gate, d_up) = kernels::swiglu_backward(&gate, &up, &d_y);
        vec![d_gate, d_up]
    });

    let x = random(&[2, 200, 8, 128], kind, "heads");
    table.compare("rotate", kind, most, |on| {
        let rotary = crate::model::Rotary::new(256, 128, 10_000.0, None).on(on);
        let turned = rotary.apply(x.to_device(on).copy());
        vec![rotary.apply_backward(&turned), turned]
    });

    for (rows, pieces, width) in [(24, 260_164, 260_224), (50, 32_001, 32_001)] {
        let logits = random(&[rows, width], Kind::Float, "logits");
        let logits = (logits * 3.0).to_kind(kind);
        let targets: Vec<i64> = (0..rows).map(|row| (row * 7919) % pieces).collect();
        table.compare(&format!("cross_entropy over {pieces}"), kind, most, |on| {
            let (mut d_logits, targets) = (logits.to_device(on).copy(), Tensor::from_slice(&targets).to_device(on));
            let nll = kernels::nll(&d_logits, pieces, &targets);
            vec![kernels::cross_entropy(&mut d_logits, pieces, &targets), nll, d_logits]
        });
    }
    table.compare("dropout", kind, 0.0, |on| {
        let streams: Vec<Stream> = (0..4).map(|row| Stream::new(1, "dropout").fork(row)).collect();
        let mut mask = Tensor::empty([64, 4096], (kind, on));
        kernels::dropout_mask(&mut mask, &streams, 0.1);
        vec![mask]
    });
}

fn check_attention(table: &mut Table, kind: Kind) {
    // Scores are sums of 128 products, probabilities are rounded in between.
    let most = if kind == Kind::Float { 2e-5 } else { 2e-2 };
    for (heads, groups, name) in [(8, 8, "attention"), (8, 2, "attention of shared heads")] {
        let [q, d_out] = ["q", "d_out"].map(|name| random(&[2, 250, heads, 128], kind, name));
        let [k, v] = ["k", "v"].map(|name| random(&[2, 250, groups, 128], kind, name));
        for whole in [true, false] {
            let name = format!("{name}{}", if whole { "" } else { " by documents" });
            table.compare(&name, kind, most, |on| {
                let [q, k, v, d_out] = [&q, &k, &v, &d_out].map(|tensor| tensor.to_device(on));
                let starts: [&[u32]; 2] = [&[0, 30, 31], &[0, 200]];
                let documents = Documents::new(starts.into_iter(), 250).filter(|_| !whole);
                let documents = documents.map(|documents| documents.on(on));
                let attended = attend(&q, &k, &v, documents.as_ref());
                let (d_q, d_k, d_v) = attend_backward(&attended, &q, &k, &v, &d_out, documents.as_ref());
                vec![attended.out_bthd, d_q, d_k, d_v]
            });
        }
    }
}

fn check_adamw(table: &mut Table) {
    let n = 1_000_003;
    let [theta, m, v, g] = ["theta", "m", "v", "g"].map(|name| random(&[n], Kind::Float, name));
    let how = AdamW {
        lr: 1e-3,
        beta1: 0.9,
        beta2: 0.95,
        epsilon: 1e-8,
        weight_decay: 0.1,
        updates_before: 10,
        gradient_scale: 0.5,
    };
    table.compare("adamw", Kind::Float, 1e-6, |on| {
        let [mut theta, mut m, mut v, g] = [&theta, &m, &v.abs(), &g].map(|tensor| tensor.to_device(on).copy());
        adamw::update(&how, &mut theta, &mut m, &mut v, &g, 3..n as usize);
        vec![theta, m, v]
    });
    table.compare("sum_of_squares", Kind::Float, 1e-12, |on| {
        vec![Tensor::from(adamw::sum_of_squares(&g.to_device(on)))]
    });
}

fn check_digest(table: &mut Table) {
    for kind in [Kind::Float, Kind::BFloat16] {
        let tensor = random(&[1_000_003], kind, "digest");
        let differ = digest::of(&tensor) != digest::of(&tensor.to_device(table.device));
        table.line(&format!("digest {}", name_of(kind)), f64::from(u8::from(differ)), 0.0);
    }
}

fn check_fp8(table: &mut Table) {
    let [w, x, d_y] = [("w", [1024, 4096]), ("x", [500, 4096]), ("d_y", [500, 1024])]
        .map(|(name, shape)| random(&shape, Kind::BFloat16, name));
    // The same 8-bit rows on both sides but for values on a border; the GPU sums in less than f32.
    table.compare("fp8 products", Kind::BFloat16, 2e-2, |on| {
        let fp8 = Fp8::of(&w.to_device(on));
        vec![fp8.forward(&x.to_device(on)), fp8.backward(&d_y.to_device(on))]
    });
}

fn check_training(table: &mut Table, precision: Precision, family: Family) -> Result<()> {
    let (cpu, gpu) = (
        training(Device::Cpu, precision, family)?,
        training(table.device, precision, family)?,
    );
    let block = if is_gpt2(family) { "gpt2" } else { "llama" };
    for (what, most) in bounds(precision) {
        let (seen, name) = worst(what, &cpu, &gpu);
        table.line(
            &format!("training {block}: {name} {}", name_of(kind(precision))),
            seen,
            most,
        );
    }
    Ok(())
}

/// Each stage of ZeRO through NCCL, optimizer state on the GPU and on the host. With one rank NCCL moves everything from one place to
/// another of this GPU, behind the events that keep the order.
fn check_division(table: &mut Table, precision: Precision) -> Result<()> {
    let alone = sharding::join(1)?;
    let plain = divided(alone.as_ref(), table.device, precision, Stage::OptimizerState, false)?;
    for ordered in [true, false] {
        let nccl = Nccl::join(sharding::join(1)?, 0, ordered).map_err(|refused| refused.error)?;
        for stage in Stage::ALL {
            for offload in [false, true] {
                let found = divided(&nccl, table.device, precision, stage, offload)?;
                for (what, most) in BOUNDS_OF_DIVISION {
                    let (seen, _) = worst(what, &plain, &found);
                    let sums = if ordered { ", sums in rank order" } else { "" };
                    let lies = if offload { ", offloaded" } else { "" };
                    let name = format!("{stage:?} by NCCL{sums}{lies}: {what} {}", name_of(kind(precision)));
                    table.line(&name, seen, most);
                }
            }
        }
    }
    Ok(())
}

/// On one device all is the same but for the order in which equal ids' rows are added to the embedding's gradient.
const BOUNDS_OF_DIVISION: [(&str, f64); 3] = [("loss", 1e-5), ("gradient norm", 1e-4), ("value", 1e-3)];

/// Losses and gradient norms of three steps of two micro-batches each, and master weights by bucket after them.
fn divided(
    comm: &dyn Comm,
    device: Device,
    precision: Precision,
    stage: Stage,
    offload: bool,
) -> Result<Vec<(String, Tensor)>> {
    let (mut plan, config) = small(precision, LLAMA)?;
    // Above a gradient's rounding, so that AdamW does not divide rounding by itself.
    plan.optimizer.epsilon = 1e-4;
    let mut trainer = trainer(&plan, &config, comm, device, stage, offload)?;
    let whole = batch(&config, plan.train.sequence_length).on(device);
    let mut again = batch(&config, plan.train.sequence_length).on(device);
    for micro in &mut again.micro_batches {
        micro.ids_bt = micro.ids_bt.flip([1]);
    }
    let batch = Batch {
        n_targets: whole.n_targets + again.n_targets,
        micro_batches: whole.micro_batches.into_iter().chain(again.micro_batches).collect(),
        digest: RowsDigest::default(),
    };
    let mut found = steps(&mut trainer, &batch)?;
    for (index, bucket) in trainer.zero.layout().buckets.iter().enumerate() {
        let (_, slice) = trainer.zero.slice(index);
        found.push((format!("value of {}", bucket.name), slice.theta.copy()));
    }
    Ok(found)
}

const LLAMA: Family = Family::Llama {
    rope_theta: 10_000.0,
    rope_scaling: None,
};

fn is_gpt2(family: Family) -> bool {
    matches!(family, Family::Gpt2 { .. })
}

/// By the beginning of what is compared.
fn bounds(precision: Precision) -> [(&'static str, f64); 3] {
    match precision {
        Precision::F32 => [("loss", 2e-6), ("gradient", 1e-4), ("value", 1e-2)],
        // Activations are rounded to 8 bits in every layer. AdamW divides a gradient by its own size, so that an element whose
        // gradient is all rounding moves by a whole learning rate either way, and B of LoRA starts at 0.
        Precision::Bf16 => [("loss", 2e-3), ("gradient", 6e-2), ("value", 4e-1)],
    }
}

/// The largest difference of those whose names begin with `what`, and its name.
fn worst<'a>(what: &str, cpu: &'a [(String, Tensor)], gpu: &[(String, Tensor)]) -> (f64, &'a str) {
    let pairs = cpu.iter().zip(gpu).filter(|((name, _), _)| name.starts_with(what));
    let seen = pairs.map(|((name, cpu), (_, gpu))| (difference(cpu, gpu), name.as_str()));
    seen.max_by(|a, b| a.0.total_cmp(&b.0)).unwrap_or((f64::NAN, "nothing"))
}

/// A small model of all that training has: grouped heads, LoRA with dropout, trained vocabulary matrices and norms, documents.
fn small(precision: Precision, family: Family) -> Result<(Plan, ModelConfig)> {
    let config = ModelConfig {
        family,
        vocab_size: 3001,
        hidden_size: 256,
        intermediate_size: 688,
        num_attention_heads: 4,
        num_key_value_heads: if is_gpt2(family) { 4 } else { 2 },
        head_dim: 64,
        max_position_embeddings: 256,
        ..llama_7b(3)
    };
    let mut plan = plan(include_str!("../../../configs/tiny.yaml"))?;
    plan.train.precision = precision;
    plan.train.recompute = Recompute::Selective.into();
    plan.train.sequence_length = 96;
    plan.train.steps = 3;
    plan.train.full = vec![FullModule::EmbedTokens, FullModule::LmHead, FullModule::Norms];
    // The stream in both of its kinds.
    plan.train.residual = match is_gpt2(family) {
        true => Residual::F32,
        false => Residual::Compute,
    };
    if let Some(lora) = &mut plan.train.lora {
        lora.dropout = 0.1;
        if is_gpt2(family) {
            lora.targets = ["c_attn", "c_proj", "c_fc"].map(String::from).to_vec();
        }
    }
    let rates = Rates {
        lr: 1e-3,
        weight_decay: 0.1,
    };
    plan.optimizer.groups = configs::Group::ALL.map(|group| (group, rates)).into();
    plan.optimizer.warmup_steps = 0;
    Ok((plan, config))
}

fn trainer<'a>(
    plan: &'a Plan,
    config: &ModelConfig,
    comm: &'a dyn Comm,
    device: Device,
    stage: Stage,
    offload: bool,
) -> Result<Trainer<'a>> {
    let trains = Trains {
        lora: plan.train.lora.clone(),
        full: plan.train.full.clone(),
        vocabulary: None,
        seed: 1,
    };
    let weights = Weights::made_up().on(device);
    let model = Model::load(config, &weights, kind(plan.train.precision), &trains)?;
    let mut model = model.with_residual(plan.train.residual);
    let mut zero = Zero::empty(comm, stage, model.kind);
    if offload {
        zero.offload_optimizer();
    }
    let specs = model.register();
    for (spec, values) in specs.into_iter().zip(model.take_initial_values()) {
        zero.train(spec, values)?;
    }
    Ok(Trainer::new(plan, comm, model, zero))
}

/// The loss and the gradients by name of a small model's first micro-batch, losses and gradient norms of three steps, and values by
/// name after them.
fn training(device: Device, precision: Precision, family: Family) -> Result<Vec<(String, Tensor)>> {
    let (plan, config) = small(precision, family)?;
    let comm = sharding::join(1)?;
    let mut trainer = trainer(&plan, &config, comm.as_ref(), device, Stage::OptimizerState, false)?;
    let batch = batch(&config, plan.train.sequence_length).on(device);
    let mut found = Vec::new();
    let micro = &batch.micro_batches[0];
    let nll = trainer.forward_backward(micro, batch.n_targets as f64, false)?;
    found.push(("loss".to_owned(), Tensor::from(nll)));
    let gradients = trained(&trainer).map(|(name, trained)| (format!("gradient of {name}"), trained.grad.copy()));
    found.extend(gradients);
    found.extend(steps(&mut trainer, &batch)?);
    found.extend(trained(&trainer).map(|(name, trained)| (format!("value of {name}"), trained.value.copy())));
    Ok(found)
}

/// Losses and gradient norms of the plan's steps, all over one batch.
fn steps(trainer: &mut Trainer, batch: &Batch) -> Result<Vec<(String, Tensor)>> {
    let mut found = Vec::new();
    for _ in 0..trainer.plan.train.steps {
        let report = trainer.train_step(batch, false)?;
        found.push(("loss of a step".to_owned(), Tensor::from(report.loss)));
        let norm = Tensor::from(report.verdict.grad_norm);
        found.push(("gradient norm of a step".to_owned(), norm));
    }
    Ok(found)
}

/// What trains, by name.
fn trained<'a>(trainer: &'a Trainer) -> impl Iterator<Item = (&'a str, Trained)> + 'a {
    let buckets = trainer.zero.layout().buckets.iter().enumerate();
    buckets.flat_map(move |(b, bucket)| {
        let params = bucket.params.iter().enumerate();
        params.map(move |(p, param)| (param.name.as_str(), trainer.zero.trained(b, p)))
    })
}

/// Two rows of made-up tokens, of several documents each, some of which are no targets.
fn batch(config: &ModelConfig, length: usize) -> Batch {
    let length_i = length as i64;
    let ids = (Tensor::arange(2 * length_i, (Kind::Int64, Device::Cpu)) * 7919).remainder(config.vocab_size as i64);
    let ids_bt = ids.view([2, length_i]);
    let targets_bt = ids_bt.roll(-1, 1);
    let _ = targets_bt.narrow(1, length_i - 1, 1).fill_(IGNORE);
    let _ = targets_bt.narrow(1, 10, 5).fill_(IGNORE);
    let starts: [&[u32]; 2] = [&[0, 40, 41], &[0]];
    Batch {
        n_targets: 2 * (length - 6),
        micro_batches: vec![MicroBatch {
            ids_bt,
            targets_bt,
            rows: vec![0, 1],
            documents: Documents::new(starts.into_iter(), length),
        }],
        digest: RowsDigest::default(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bounds_hold_between_f32_and_bf16_and_not_between_different_steps() {
        let exact = training(Device::Cpu, Precision::F32, LLAMA).unwrap();
        let rounded = training(Device::Cpu, Precision::Bf16, LLAMA).unwrap();
        for (what, most) in bounds(Precision::Bf16) {
            let (seen, name) = worst(what, &exact, &rounded);
            println!("{name}: {seen:.2e}");
            assert!(seen < most, "{name}: {seen:.2e}");
        }
        // A value that is off in one place shows.
        let mut spoilt: Vec<(String, Tensor)> = exact.iter().map(|(name, x)| (name.clone(), x.copy())).collect();
        let (_, gradient) = spoilt
            .iter_mut()
            .find(|(name, _)| name.ends_with("norm.weight"))
            .unwrap();
        let _ = gradient.narrow(0, 0, 1).g_add_scalar_(1.0);
        let (seen, _) = worst("gradient", &exact, &spoilt);
        assert!(seen > bounds(Precision::F32)[1].1, "{seen:.2e}");
    }

    #[test]
    fn whatever_stage_divides_it_one_rank_s_training_is_the_same() {
        let alone = sharding::join(1).unwrap();
        for precision in [Precision::F32, Precision::Bf16] {
            let by = |stage| divided(alone.as_ref(), Device::Cpu, precision, stage, false).unwrap();
            let [plain, others @ ..] = Stage::ALL.map(by);
            assert_ne!(plain[0].1, plain[4].1, "{precision:?}: it learns");
            for (stage, other) in Stage::ALL[1..].iter().zip(others) {
                assert_eq!(plain, other, "{precision:?}, {stage:?}");
            }
        }
    }
}
