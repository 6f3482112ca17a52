//! Training steps and AdamW against `transformers` + PEFT and torch: both sides in one run, in turns, each in a process of its own,
//! medians of the steps of all rounds. Beside each figure stands its floor: what this machine's GEMMs alone would allow.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bench::{Entry, Report, Results, number, report, run};
use clap::{Parser, Subcommand};
use serde_json::{Value, json};
use sharding::adamw::{self, AdamW};

/// SmolLM2-135M's matrices in the layers, and its width; GEMM FLOP follow from them.
const BODY: f64 = 106_168_320.0;
const WIDTH: f64 = 576.0;
const PIECES: f64 = 49_152.0;
/// MaLA-500's.
const GROWN_PIECES: usize = 260_164;
const LINEARS: [&str; 7] = [
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
];
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
        folder: folder.path().to_path_buf(),
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
    folder: PathBuf,
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
        let (mut ours, mut peers) = (Sides::default(), Sides::default());
        for _ in 0..self.arguments.rounds {
            ours.add(self.ours(&overrides)?);
            peers.add(self.theirs(case, &base)?);
        }
        let tokens = (case.rows * TIME) as f64;
        let floor = peak / case.flop_per_token();
        let (ours_speed, peers_speed) = (tokens / ours.seconds(), tokens / peers.seconds());
        let note = format!(
            "GEMM peak {:.0} GFLOP/s; ours at {:.0} % of what it allows, the peer at {:.0} %; last losses {:.3} and {:.3}",
            peak / 1e9,
            100.0 * ours_speed / floor,
            100.0 * peers_speed / floor,
            ours.loss,
            peers.loss,
        );
        let entry = Entry::of(case.name, ours_speed, peers_speed, "tokens/s")
            .peer_is("transformers + PEFT, SDPA, fused AdamW, no recomputation on either side")
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
        let folder = self.folder.join("grown");
        if !folder.is_dir() {
            let status = Command::new(&self.arguments.python)
                .arg(script("grow_model.py"))
                .args([&self.arguments.base, &folder])
                .arg(GROWN_PIECES.to_string())
                .status()?;
            ensure!(status.success(), "grow_model.py failed");
        }
        Ok(folder)
    }

    fn panglot(&self, command: &str, overrides: &[String]) -> Result<Child> {
        let config = Path::new(env!("CARGO_MANIFEST_DIR")).join("model.yaml");
        let mut panglot = Command::new(std::env::current_exe()?.with_file_name("panglot"));
        panglot.args([command, text_of(&config)?, "--json"]).args(overrides);
        Ok(panglot.stdout(Stdio::null()).stderr(Stdio::null()).spawn()?)
    }

    /// The case's words for bench/model.yaml; its corpus, vocabulary and tokens are made.
    fn prepare(&self, case: &Case, base: &Path) -> Result<Vec<String>> {
        let prepared = self.folder.join(if case.grown { "prepared-grown" } else { "prepared" });
        let full = case.full.join(", ");
        let mut overrides = vec![
            format!("folders.prepared={}", text_of(&prepared)?),
            format!("folders.run={}", text_of(&self.folder.join("run"))?),
            format!("model.path={}", text_of(base)?),
            format!("train.steps={}", self.arguments.steps),
            format!("train.precision={}", case.precision),
            format!("train.rows_per_step={}", case.rows),
            format!("train.micro_rows={}", case.rows),
            format!("train.full=[{full}]"),
            format!("launch.threads_per_rank={}", self.threads),
        ];
        if !case.full.is_empty() {
            overrides.push("optimizer.lr_embeddings=1.0e-4".to_owned());
        }
        if !case.lora {
            overrides
                .extend(["train.lora=null", "optimizer.lr_lora=null", "optimizer.lr_body=1.0e-4"].map(String::from));
        }
        let status = self.panglot("prepare", &overrides)?.wait()?;
        ensure!(status.success(), "panglot prepare failed");
        Ok(overrides)
    }

    fn ours(&self, overrides: &[String]) -> Result<Side> {
        let run = self.folder.join("run");
        let _ = fs::remove_dir_all(&run);
        let peak_bytes = watch(self.panglot("train", overrides)?)?;
        let metrics = fs::read_to_string(run.join("metrics.jsonl")).context("the worker wrote no metrics")?;
        let lines: Vec<Value> = metrics.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
        let value = |line: &Value, key: &str| line[key].as_f64().unwrap_or(f64::NAN);
        let side = Side {
            seconds: lines.iter().skip(1).map(|line| value(line, "seconds")).collect(),
            loss: lines.last().map_or(f64::NAN, |line| value(line, "loss")),
            peak_bytes: peak_bytes as f64,
        };
        eprintln!("  ours {:?} s", side.seconds);
        Ok(side)
    }

    fn theirs(&self, case: &Case, base: &Path) -> Result<Side> {
        let lora: &[&str] = if case.lora { &LINEARS } else { &[] };
        let words = json!({
            "model": base, "precision": case.precision, "lora": lora, "full": case.peer_modules(), "rows": case.rows,
            "time": TIME, "steps": self.arguments.steps, "threads": self.threads, "recompute": false,
        });
        let report = self.peer("train_model.py", &[&words.to_string()])?;
        let list = |key: &str| -> Vec<f64> {
            let values = report.more.get(key).and_then(Value::as_array);
            values.map_or(Vec::new(), |values| values.iter().filter_map(Value::as_f64).collect())
        };
        let side = Side {
            seconds: list("steps").split_off(1),
            loss: list("losses").last().copied().unwrap_or(f64::NAN),
            peak_bytes: report.peak_bytes as f64,
        };
        eprintln!("  peer {:?} s", side.seconds);
        Ok(side)
    }

    fn adamw(&self, results: &mut Results) -> Result<()> {
        const PARAMETERS: usize = 100_000_000;
        const UPDATES: usize = 8;
        let (mut ours, mut peers) = (Sides::default(), Sides::default());
        let (threads, parameters, updates) = (self.threads.to_string(), PARAMETERS.to_string(), UPDATES.to_string());
        for _ in 0..self.arguments.rounds {
            ours.add(Side::of(run(Command::new(std::env::current_exe()?).args([
                "adamw",
                &parameters,
                &updates,
            ]))?));
            peers.add(Side::of(
                self.peer("torch_floor.py", &["adamw", &threads, &parameters, &updates])?,
            ));
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
        run(Command::new(&self.arguments.python).arg(script(name)).args(arguments))
    }
}

/// One side's steps in one round.
struct Side {
    seconds: Vec<f64>,
    loss: f64,
    peak_bytes: f64,
}

impl Side {
    fn of(report: Report) -> Side {
        let steps = report.more.get("steps").and_then(Value::as_array);
        Side {
            seconds: steps.map_or(Vec::new(), |steps| steps.iter().filter_map(Value::as_f64).collect()),
            loss: f64::NAN,
            peak_bytes: report.peak_bytes as f64,
        }
    }
}

/// One side's rounds.
#[derive(Default)]
struct Sides {
    seconds: Vec<f64>,
    loss: f64,
    /// The largest.
    peak_bytes: f64,
}

impl Sides {
    fn add(&mut self, side: Side) {
        self.seconds.extend(side.seconds);
        self.loss = side.loss;
        self.peak_bytes = self.peak_bytes.max(side.peak_bytes);
    }

    /// The median step's.
    fn seconds(&self) -> f64 {
        let mut sorted = self.seconds.clone();
        sorted.sort_by(f64::total_cmp);
        match sorted.len() {
            0 => f64::NAN,
            n => (sorted[(n - 1) / 2] + sorted[n / 2]) / 2.0,
        }
    }
}

fn update_alone(parameters: usize, updates: usize) -> Result<Report> {
    let values = |seed: usize| -> Vec<f32> {
        (0..parameters)
            .map(|i| ((i + seed) % 997) as f32 / 500.0 - 1.0)
            .collect()
    };
    let (mut theta, g) = (values(0), values(3));
    let (mut m, mut v) = (vec![0f32; parameters], vec![0f32; parameters]);
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
        adamw::update_slices(&how, &mut theta, &mut m, &mut v, &g);
        seconds.push(started.elapsed().as_secs_f64());
    }
    // The first one touches the moments' memory for the first time.
    seconds.remove(0);
    report(seconds.iter().sum(), json!({ "steps": seconds }))
}

/// Waits for a process; returns the most memory that it or one below it ever had, in bytes.
fn watch(mut child: Child) -> Result<u64> {
    let mut peak = 0;
    loop {
        // What is seen last before the end is all there is: the mark never falls.
        peak = peak.max(peak_below(child.id()));
        if let Some(status) = child.try_wait()? {
            ensure!(status.success(), "panglot train failed: {status}");
            return Ok(peak);
        }
        thread::sleep(Duration::from_millis(10));
    }
}

/// The largest peak of resident memory among a process and those it started.
fn peak_below(process: u32) -> u64 {
    let of = |name: &str| fs::read_to_string(format!("/proc/{process}/{name}")).unwrap_or_default();
    let status = of("status");
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|line| line.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok());
    let children = of(&format!("task/{process}/children"));
    let below = children
        .split_whitespace()
        .filter_map(|child| child.parse().ok())
        .map(peak_below);
    below.max().unwrap_or(0).max(kib.unwrap_or(0) * 1024)
}

fn script(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("peers").join(name)
}

fn text_of(path: &Path) -> Result<&str> {
    path.to_str()
        .with_context(|| format!("{} is not UTF-8", path.display()))
}
