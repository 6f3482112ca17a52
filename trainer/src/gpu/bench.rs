//! `panglot-worker bench-gpu`: LLaMA 2 7B with 260,164 pieces, LoRA on q and v, embeddings and head trained, on one GPU, against
//! `transformers` + PEFT on the same. Each side is measured in processes of its own, in turn, so that each has the whole
//! GPU; what is compared is the median.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use configs::{FullModule, Lora, Precision, Recomputation};
use corpus::RowsDigest;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sharding::cuda;
use sharding::{Stage, Zero};
use tch::{Device, Kind, Tensor};

use super::{absence, llama_7b, plan};
use crate::batch::{Batch, MicroBatch};
use crate::hf::Weights;
use crate::model::{IGNORE, Model, Trains};
use crate::step::Trainer;

/// What is measured.
#[derive(Clone, Debug, clap::Args)]
pub struct Settings {
    /// Layers of the model; fewer fit a smaller GPU.
    #[arg(long, default_value_t = 32)]
    layers: usize,
    /// Tokens in a row.
    #[arg(long, default_value_t = 4096)]
    tokens: usize,
    /// Rows of a step.
    #[arg(long, default_value_t = 1)]
    rows: usize,
    /// Rows of a micro-batch.
    #[arg(long, default_value_t = 1)]
    micro_rows: usize,
    /// Steps that are timed, after three that are not.
    #[arg(long, default_value_t = 10)]
    steps: usize,
    /// none, selective or full; the peer checkpoints every layer unless it is none.
    #[arg(long, default_value = "none")]
    recompute: String,
    /// How often each side is measured.
    #[arg(long, default_value_t = 2)]
    rounds: usize,
    /// A Python with torch, transformers and peft; without it only our side is measured.
    #[arg(long)]
    python: Option<PathBuf>,
    /// Where the results go, as JSON; only when both sides were measured.
    #[arg(long)]
    out: Option<PathBuf>,
    /// Our frozen matrices in FP8; the peer's stay bf16.
    #[arg(long)]
    fp8: bool,
    /// Measures our side in this process and prints a line of JSON: what the program starts itself with.
    #[arg(long, hide = true)]
    ours: bool,
}

/// What a process that measures prints.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Measured {
    seconds_per_step: f64,
    /// Of the GPU, when all steps are made.
    memory_bytes: f64,
    /// The GPU's name; our side tells it.
    #[serde(default)]
    device: String,
}

/// One result, as in the other files of bench/results.
#[derive(Serialize)]
struct Entry {
    name: &'static str,
    ours: f64,
    peer: f64,
    ratio: f64,
    unit: &'static str,
    peer_is: &'static str,
    note: String,
    device: String,
    /// UTC.
    date: String,
}

/// FLOP a token: 35.5 GFLOP with 32 layers, attention at 4,096 tokens counted; of them the head's three products
/// are six a weight.
fn flop_per_token(layers: usize) -> f64 {
    let head = 6.0 * 260_164.0 * 4096.0;
    head + (35.5e9 - head) * layers as f64 / 32.0
}

const PEER: &str = include_str!("../../../bench/peers/train_gpu.py");

/// Measures and prints. Where there is no GPU, one line that says so.
pub fn bench(settings: &Settings) -> Result<()> {
    if let Some(line) = absence("bench-gpu") {
        println!("{line}");
        return Ok(());
    }
    if settings.ours {
        println!("{}", serde_json::to_string(&measure(settings, cuda::device(0)?)?)?);
        return Ok(());
    }
    // From here on this process leaves the GPU to those it starts.
    let program = std::env::current_exe().context("finding this program")?;
    let (mut ours, mut peers) = (Vec::new(), Vec::new());
    for round in 0..settings.rounds {
        let mut command = Command::new(&program);
        command.args(["bench-gpu", "--ours", "--recompute", &settings.recompute]);
        if settings.fp8 {
            command.arg("--fp8");
        }
        ours.push(child(command.args(settings.numbers()), "ours", round)?);
        if let Some(python) = &settings.python {
            let mut command = Command::new(python);
            command.args(["-c", PEER, "--recompute", &settings.recompute]);
            peers.push(child(command.args(settings.numbers()), "transformers + PEFT", round)?);
        }
    }
    let tokens = (settings.rows * settings.tokens) as f64;
    let speed = |all: &[Measured]| tokens / median(all.iter().map(|one| one.seconds_per_step).collect());
    let memory = |all: &[Measured]| median(all.iter().map(|one| one.memory_bytes).collect());
    let flop = flop_per_token(settings.layers);
    let gpu = ours.first().context("--rounds must be 1 or more")?.device.clone();
    let peak = peak_of(&gpu);
    let share = |speed: f64| {
        peak.map_or(String::new(), |peak| {
            format!(", {:.1} % of {:.0} TFLOP/s", speed * flop / peak * 100.0, peak / 1e12)
        })
    };
    println!(
        "bench-gpu: {}: ours {:.0} tokens/s{}, {:.1} GiB",
        gpu,
        speed(&ours),
        share(speed(&ours)),
        gib(memory(&ours))
    );
    if peers.is_empty() {
        println!("bench-gpu: no peer was measured; name a Python with torch, transformers and peft by --python");
        return Ok(());
    }
    println!(
        "bench-gpu: {}: transformers + PEFT {:.0} tokens/s{}, {:.1} GiB",
        gpu,
        speed(&peers),
        share(speed(&peers)),
        gib(memory(&peers))
    );
    let note = format!(
        "{}{} layers, {} rows of {} tokens a step, recompute {}{}",
        if settings.fp8 {
            "ours with frozen matrices in FP8, "
        } else {
            ""
        },
        settings.layers,
        settings.rows,
        settings.tokens,
        settings.recompute,
        share(speed(&ours))
    );
    let entry = |name, ours: f64, peer: f64, unit| Entry {
        name,
        ours,
        peer,
        // Above 1 where ours is better.
        ratio: if unit == "GiB" { peer / ours } else { ours / peer },
        unit,
        peer_is: "transformers + PEFT, bf16, SDPA, fused AdamW with bf16 state",
        note: note.clone(),
        device: gpu.clone(),
        date: today(),
    };
    let names = if settings.fp8 {
        ["lora_7b_fp8", "lora_7b_fp8_memory"]
    } else {
        ["lora_7b_bf16", "lora_7b_bf16_memory"]
    };
    let entries = [
        entry(names[0], speed(&ours), speed(&peers), "tokens/s"),
        entry(names[1], gib(memory(&ours)), gib(memory(&peers)), "GiB"),
    ];
    match &settings.out {
        Some(out) => put(out, &entries)?,
        None => println!("{}", serde_json::to_string_pretty(&entries)?),
    }
    Ok(())
}

/// Into a file that may hold other entries.
fn put(out: &Path, entries: &[Entry]) -> Result<()> {
    let mut all: Vec<Value> = launcher::files::read_json_if_there(out)?.unwrap_or_default();
    all.retain(|old| entries.iter().all(|entry| old["name"] != entry.name));
    for entry in entries {
        all.push(serde_json::to_value(entry)?);
    }
    launcher::files::write_json(out, &all)
}

impl Settings {
    /// What both sides' programs take alike.
    fn numbers(&self) -> [String; 10] {
        let of = |name: &str, number: usize| [format!("--{name}"), number.to_string()];
        let pairs = [
            of("layers", self.layers),
            of("tokens", self.tokens),
            of("rows", self.rows),
            of("micro-rows", self.micro_rows),
            of("steps", self.steps),
        ];
        let mut pairs = pairs.into_iter().flatten();
        std::array::from_fn(|_| pairs.next().expect("five pairs"))
    }
}

fn child(command: &mut Command, who: &str, round: usize) -> Result<Measured> {
    let done = command.output().with_context(|| format!("starting {who}"))?;
    ensure!(
        done.status.success(),
        "{who}: {}; where memory was short, measure both sides with --recompute full:\n{}",
        done.status,
        String::from_utf8_lossy(&done.stderr)
    );
    let text = String::from_utf8_lossy(&done.stdout);
    let line = text.lines().last().unwrap_or_default();
    let measured: Measured = serde_json::from_str(line).with_context(|| format!("{who} printed {line:?}"))?;
    let (seconds, memory) = (measured.seconds_per_step, gib(measured.memory_bytes));
    println!("  round {round}: {who}: {seconds:.4} s a step, {memory:.1} GiB");
    Ok(measured)
}

/// Our side: the trainer's own step.
fn measure(settings: &Settings, device: Device) -> Result<Measured> {
    let config = llama_7b(settings.layers);
    let mut plan = plan(include_str!("../../../configs/tiny.yaml"))?;
    plan.train.precision = Precision::Bf16;
    plan.train.recompute = serde_json::from_value::<Recomputation>(settings.recompute.as_str().into())
        .with_context(|| format!("--recompute {} is not none, selective or full", settings.recompute))?;
    plan.train.sequence_length = settings.tokens;
    plan.train.rows_per_step = settings.rows;
    plan.train.micro_rows = settings.micro_rows;
    plan.train.full = vec![FullModule::EmbedTokens, FullModule::LmHead];
    plan.train.lora = Some(Lora {
        rank: 8,
        alpha: 16.0,
        dropout: 0.0,
        targets: vec!["q_proj".into(), "v_proj".into()],
        rank_stabilized: None,
    });
    for rates in plan.optimizer.groups.values_mut() {
        rates.lr = 1e-4;
    }
    let comm = sharding::join(1)?;
    let trains = Trains {
        lora: plan.train.lora.clone(),
        full: plan.train.full.clone(),
        vocabulary: None,
        seed: 1,
    };
    let mut model = Model::load(&config, &Weights::made_up().on(device), Kind::BFloat16, &trains)?;
    if settings.fp8 {
        cuda::check_fp8(device)?;
        model.quantize_frozen()?;
    }
    let specs = model.register();
    let mut initial = model.take_initial_values();
    let zero = Zero::new(
        comm.as_ref(),
        Stage::OptimizerState,
        &specs,
        model.kind,
        |bucket, param| std::mem::replace(&mut initial[bucket][param], Tensor::new()),
    )?;
    let mut trainer = Trainer::new(&plan, comm.as_ref(), model, zero);
    let micro = |first: usize| {
        let shape = [settings.micro_rows as i64, settings.tokens as i64];
        let ids_bt = Tensor::randint(config.vocab_size as i64, shape, (Kind::Int64, device));
        let targets_bt = ids_bt.roll(-1, 1);
        let _ = targets_bt.narrow(1, shape[1] - 1, 1).fill_(IGNORE);
        MicroBatch {
            ids_bt,
            targets_bt,
            rows: (first as u64..(first + settings.micro_rows) as u64).collect(),
            documents: None,
        }
    };
    let batch = Batch {
        micro_batches: (0..settings.rows).step_by(settings.micro_rows).map(micro).collect(),
        n_targets: settings.rows * (settings.tokens - 1),
        digest: RowsDigest::default(),
    };
    let mut seconds = Vec::new();
    for step in 0..settings.steps + 3 {
        cuda::wait_for(device);
        let began = Instant::now();
        let report = trainer.train_step(&batch, false)?;
        cuda::wait_for(device);
        ensure!(report.verdict.finite, "the loss of step {step} is not finite");
        if step >= 3 {
            seconds.push(began.elapsed().as_secs_f64());
        }
    }
    Ok(Measured {
        seconds_per_step: median(seconds),
        memory_bytes: cuda::memory_used(0)? as f64,
        device: cuda::gpu(0)?.name,
    })
}

/// Dense bf16 peak by NVIDIA's data sheets, FLOP/s.
fn peak_of(gpu: &str) -> Option<f64> {
    let known = [
        ("H100 PCIe", 756e12),
        ("H100", 989e12),
        ("H200", 989e12),
        ("A100", 312e12),
        ("B200", 2250e12),
    ];
    known.iter().find(|(name, _)| gpu.contains(name)).map(|(_, peak)| *peak)
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() % 2 {
        0 => (values[middle - 1] + values[middle]) / 2.0,
        _ => values[middle],
    }
}

fn gib(bytes: f64) -> f64 {
    bytes / f64::from(1 << 30)
}

/// Year-month-day of the Gregorian calendar, from the days since 1970-01-01.
fn today() -> String {
    let seconds = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs();
    let mut days = seconds / 86_400;
    let mut year = 1970;
    let leap = |year: u64| year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
    while days >= 365 + u64::from(leap(year)) {
        days -= 365 + u64::from(leap(year));
        year += 1;
    }
    let lengths = [31, 28 + u64::from(leap(year)), 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
    let mut month = 0;
    while days >= lengths[month] {
        days -= lengths[month];
        month += 1;
    }
    format!("{year}-{:02}-{:02}", month + 1, days + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_are_in_the_middle() {
        assert_eq!(
            (median(vec![3.0, 1.0, 2.0]), median(vec![4.0, 1.0, 2.0, 3.0])),
            (2.0, 2.5)
        );
    }

    #[test]
    fn where_there_is_no_gpu_both_programs_say_so_and_succeed() {
        if cuda::driver_is_there() {
            return;
        }
        assert!(absence("bench-gpu").is_some_and(|line| line.contains("SKIPPED: no CUDA driver here")));
        assert!(super::super::check().is_ok());
    }
}
