//! Training steps and AdamW against `transformers` + PEFT and torch: both sides in one run, in turns, each in a process of its own,
//! medians of the steps of all rounds. Beside each figure stands its floor: what this machine's GEMMs alone would allow.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::Instant;

use anyhow::Result;
use bench::training::{BODY, LINEARS, PIECES, Panglot, Side, Sides, WIDTH, ensure_alike, grow};
use bench::{Entry, Report, Results, number, peer, report, run};
use clap::{Parser, Subcommand};
use launcher::worker::variables;
use serde_json::json;
use sharding::adamw::{self, AdamW};
use tch::{Device, Kind, Tensor};

/// MaLA-500's.
const GROWN_PIECES: usize = 260_164;
const TIME: usize = 512;

#[derive(Parser)]
#[command(about = "Measures training steps side by side with what people run today")]
struct Arguments {
    #[command(subcommand)]
    alone: Option<Alone>,
    /// The Python that has `transformers` and `peft`.
    #[arg(long, env = "PANGLOT_PYTHON", default_value = ".panglot/venv/bin/python")]
    python: PathBuf,
    /// SmolLM2-135M, as `panglot prepare configs/demo.yaml` leaves it.
    #[arg(long, default_value = "runs/prepared/demo/base_model")]
    base: PathBuf,
    #[arg(long, default_value = "bench/results/model.json")]
    out: PathBuf,
    /// Measures only the entries whose names begin so; the others stay what they are in the results.
    #[arg(long, default_value = "")]
    only: String,
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Steps a round and side; the first warms up and does not count.
    #[arg(long, default_value_t = 4)]
    steps: usize,
}

#[derive(Subcommand)]
enum Alone {
    Adamw { parameters: usize, updates: usize },
}

struct Case {
    name: &'static str,
    precision: &'static str,
    lora: bool,
    full: &'static [&'static str],
    /// The body with 260,164 pieces, embedding and head apart.
    grown: bool,
    rows: usize,
}

impl Case {
    /// GEMM FLOP a token: forward and d_input of every matrix, d_weight of those that train. LoRA's own and attention's are
    /// left out of the floor: under a tenth.
    fn flop_per_token(&self) -> f64 {
        let everything = self.full == ["all"];
        let pieces = if self.grown { GROWN_PIECES as f64 } else { PIECES };
        let times = |trains: bool| if trains { 6.0 } else { 4.0 };
        let head_trains = everything || self.full.contains(&"lm_head");
        times(everything) * BODY + times(head_trains) * pieces * WIDTH
    }

    fn peer_modules(&self) -> &'static [&'static str] {
        if self.full == ["all"] { &[] } else { self.full }
    }
}

const BOTH: &[&str] = &["embed_tokens", "lm_head"];

const CASES: [Case; 5] = [
    Case {
        name: "lora_f32",
        precision: "f32",
        lora: true,
        full: &[],
        grown: false,
        rows: 4,
    },
    Case {
        name: "lora_bf16",
        precision: "bf16",
        lora: true,
        full: &[],
        grown: false,
        rows: 4,
    },
    Case {
        name: "vocab260k_f32",
        precision: "f32",
        lora: true,
        full: BOTH,
        grown: true,
        rows: 2,
    },
    Case {
        name: "vocab260k_bf16",
        precision: "bf16",
        lora: true,
        full: BOTH,
        grown: true,
        rows: 2,
    },
    Case {
        name: "full_f32",
        precision: "f32",
        lora: false,
        full: &["all"],
        grown: false,
        rows: 2,
    },
];

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    if let Some(Alone::Adamw { parameters, updates }) = arguments.alone {
        println!("{}", serde_json::to_string(&update_alone(parameters, updates)?)?);
        return Ok(());
    }
    let folder = tempfile::tempdir()?;
    let bench = Bench {
        panglot: Panglot {
            folder: folder.path().to_path_buf(),
        },
        threads: thread::available_parallelism()?.get(),
        arguments,
    };
    let mut results = Results::open(&bench.arguments.out)?;
    let peak = bench.peer("torch_floor.py", &["gemm", &bench.threads.to_string()])?;
    for case in CASES.iter().filter(|case| bench.wanted(case.name)) {
        bench.training(case, number(&peak, case.precision), &mut results)?;
    }
    if bench.wanted("adamw_100m") {
        bench.adamw(&mut results)?;
    }
    results.print();
    Ok(())
}

struct Bench {
    panglot: Panglot,
    threads: usize,
    arguments: Arguments,
}

impl Bench {
    fn wanted(&self, name: &str) -> bool {
        name.starts_with(&self.arguments.only)
    }

    fn training(&self, case: &Case, peak: f64, results: &mut Results) -> Result<()> {
        let base = if case.grown {
            self.grown()?
        } else {
            fs::canonicalize(&self.arguments.base)?
        };
        let overrides = self.prepare(case, &base)?;
        let rows = self.panglot.rows(&overrides, self.arguments.steps * case.rows)?;
        let (mut ours, mut peers) = (Sides::default(), Sides::default());
        for _ in 0..self.arguments.rounds {
            ours.add(self.panglot.train(&[], &overrides)?);
            peers.add(self.theirs(case, &base, &rows)?);
        }
        ensure_alike(case.name, &ours, &peers)?;
        let [[first, last], [peers_first, peers_last]] = [ours.losses, peers.losses];
        let tokens = (case.rows * TIME) as f64;
        let floor = peak / case.flop_per_token();
        let (ours_speed, peers_speed) = (tokens / ours.seconds(), tokens / peers.seconds());
        let note = format!(
            "GEMM peak {:.0} GFLOP/s; ours at {:.0} % of what it allows, the peer at {:.0} %; losses of the first \
             step {first:.3} and {peers_first:.3}, of the last {last:.3} and {peers_last:.3}",
            peak / 1e9,
            100.0 * ours_speed / floor,
            100.0 * peers_speed / floor,
        );
        let entry = Entry::of(case.name, ours_speed, peers_speed, "tokens/s")
            .peer_is("transformers + PEFT, SDPA, fused AdamW, the same rows, no recomputation on either side")
            .floor(floor, "GEMM FLOP at this machine's measured peak")
            .note(note);
        results.put(entry)?;
        if case.grown {
            let name = format!("{}_memory", case.name);
            let entry = Entry::of(&name, ours.peak_bytes / 1e6, peers.peak_bytes / 1e6, "MB")
                .peer_is("the same two processes' peak resident memory; ours with f32 master weights and moments");
            results.put(entry)?;
        }
        Ok(())
    }

    fn grown(&self) -> Result<PathBuf> {
        let folder = self.panglot.folder.join("grown");
        grow(&self.arguments.python, &self.arguments.base, &folder, GROWN_PIECES)?;
        Ok(folder)
    }

    /// The case's words for bench/model.yaml; its corpus, vocabulary and tokens are made.
    fn prepare(&self, case: &Case, base: &Path) -> Result<Vec<String>> {
        let prepared = if case.grown { "prepared-grown" } else { "prepared" };
        let mut overrides = self.panglot.overrides(prepared, base)?;
        let full = case.full.join(", ");
        overrides.extend([
            format!("train.steps={}", self.arguments.steps),
            format!("train.precision={}", case.precision),
            format!("train.rows_per_step={}", case.rows),
            format!("train.micro_rows={}", case.rows),
            format!("train.full=[{full}]"),
            format!("launch.threads_per_rank={}", self.threads),
        ]);
        if !case.full.is_empty() {
            overrides.push("optimizer.lr_embeddings=1.0e-4".to_owned());
        }
        if !case.lora {
            overrides
                .extend(["train.lora=null", "optimizer.lr_lora=null", "optimizer.lr_body=1.0e-4"].map(String::from));
        }
        self.panglot.prepare(&overrides)?;
        Ok(overrides)
    }

    fn theirs(&self, case: &Case, base: &Path, rows: &Path) -> Result<Side> {
        let lora: &[&str] = if case.lora { &LINEARS } else { &[] };
        let words = json!({
            "model": base, "precision": case.precision, "lora": lora, "full": case.peer_modules(),
            "rows_file": rows, "rows": case.rows, "threads": self.threads, "recompute": false,
        });
        let report = self.peer("train_model.py", &[&words.to_string()])?;
        Ok(Side::of_training(&report))
    }

    fn adamw(&self, results: &mut Results) -> Result<()> {
        const PARAMETERS: usize = 100_000_000;
        const UPDATES: usize = 8;
        let (mut ours, mut peers) = (Sides::default(), Sides::default());
        let (threads, parameters, updates) = (self.threads.to_string(), PARAMETERS.to_string(), UPDATES.to_string());
        for _ in 0..self.arguments.rounds {
            let update = ["adamw", &parameters, &updates];
            // With what `panglot` gives its workers.
            let mut worker = Command::new(std::env::current_exe()?);
            worker.args(update).envs(variables(Some(self.threads)));
            ours.add(Side::of(&run(&mut worker)?));
            let update = ["adamw", &threads, &parameters, &updates];
            peers.add(Side::of(&self.peer("torch_floor.py", &update)?));
        }
        // θ, m and v are read and written, g is read: 28 bytes a parameter.
        let bytes = 28.0 * PARAMETERS as f64;
        let note = format!(
            "ours {:.1} GB/s, the peer {:.1} GB/s",
            bytes / ours.seconds() / 1e9,
            bytes / peers.seconds() / 1e9
        );
        let entry = Entry::of("adamw_100m", 1.0 / ours.seconds(), 1.0 / peers.seconds(), "updates/s")
            .peer_is("torch.optim.AdamW(fused=True)")
            .note(note);
        results.put(entry)
    }

    fn peer(&self, name: &str, arguments: &[&str]) -> Result<Report> {
        peer(&self.arguments.python, name, arguments)
    }
}

fn update_alone(parameters: usize, updates: usize) -> Result<Report> {
    // As a run has them: memory that begins on a cache line.
    let size = [parameters as i64];
    let [mut theta, g] = [(); 2].map(|()| Tensor::randn(size, (Kind::Float, Device::Cpu)));
    let [mut m, mut v] = [(); 2].map(|()| Tensor::zeros(size, (Kind::Float, Device::Cpu)));
    let mut seconds = Vec::new();
    for update in 0..=updates {
        let how = AdamW {
            lr: 1e-4,
            beta1: 0.9,
            beta2: 0.99,
            epsilon: 1e-8,
            weight_decay: 0.01,
            updates_before: update as u64,
            gradient_scale: 1.0,
        };
        let started = Instant::now();
        adamw::update(&how, &mut theta, &mut m, &mut v, &g, 0..parameters);
        seconds.push(started.elapsed().as_secs_f64());
    }
    // The first one touches the moments' memory for the first time.
    seconds.remove(0);
    report(seconds.iter().sum(), json!({ "steps": seconds }))
}
