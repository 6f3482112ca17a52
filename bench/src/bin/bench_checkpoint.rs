//! Saves and resumes against torch's distributed checkpoint: the same state, the same disk, in turns, each side in a process of
//! its own. What the soak has counted is put beside it, by `counts` alone at the soak's end.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use bench::{Entry, Report, Results, median, middle, number, peer, report, run, script, text_of};
use clap::{Parser, Subcommand};
use launcher::checkpoint::commit::unix_time;
use launcher::checkpoint::{FOLDER, GuardState, Identity, verify};
use serde_json::{Value, json};
use sharding::memory::{f32s, f32s_mut};
use sharding::{BucketSpec, ParamSpec, Stage, Zero};
use tch::{Device, Kind, Tensor};
use trainer::checkpoint::{Outcome, Progress, Saver, choose, load};

#[derive(Parser)]
#[command(about = "Measures checkpoints side by side with torch.distributed.checkpoint")]
struct Arguments {
    #[command(subcommand)]
    alone: Option<Alone>,
    #[arg(long, env = "PANGLOT_PYTHON", default_value = ".panglot/venv/bin/python")]
    python: PathBuf,
    /// Trained elements: 12 bytes each
    #[arg(long, default_value_t = 32_000_000)]
    elements: usize,
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Saves a round and side; one more warms up and does not count
    #[arg(long, default_value_t = 3)]
    saves: usize,
    /// Where both sides write
    #[arg(long, default_value = "runs/bench-checkpoint")]
    folder: PathBuf,
    /// Where `make soak-checkpoint` leaves what it prints
    #[arg(long, default_value = "runs/soak-checkpoint")]
    soak: PathBuf,
    #[arg(long, default_value = "bench/results/checkpoint.json")]
    out: PathBuf,
}

#[derive(Subcommand)]
enum Alone {
    Save {
        elements: usize,
        saves: usize,
        folder: PathBuf,
    },
    Load {
        elements: usize,
        folder: PathBuf,
    },
    /// Only take over what the soak has counted
    Counts,
}

const PEER: &str = "torch.distributed.checkpoint.async_save, synced files";

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    match &arguments.alone {
        Some(Alone::Save {
            elements,
            saves,
            folder,
        }) => say(&save(*elements, *saves, folder)?),
        Some(Alone::Load { elements, folder }) => say(&read(*elements, folder)?),
        Some(Alone::Counts) => counts(&arguments.soak, &mut Results::open(&arguments.out)?),
        None => side_by_side(&arguments),
    }
}

fn say(report: &Report) -> Result<()> {
    println!("{}", serde_json::to_string(report)?);
    Ok(())
}

fn side_by_side(arguments: &Arguments) -> Result<()> {
    let Arguments {
        elements,
        saves,
        folder,
        ..
    } = arguments;
    if folder.exists() {
        fs::remove_dir_all(folder)?;
    }
    fs::create_dir_all(folder)?;
    let (elements, saves) = (elements.to_string(), saves.to_string());
    let us = || Command::new(std::env::current_exe().unwrap_or_default());
    let them = || {
        let mut command = Command::new(&arguments.python);
        command.arg(script("save_checkpoint.py"));
        command
    };
    let (mut ours, mut theirs, mut our_loads, mut their_loads) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let resumes = Resumes::prepare(folder)?;
    let (mut our_steps, mut their_steps) = (Vec::new(), Vec::new());
    them_train(arguments, &resumes, "save")?;
    // The disk of a shared machine has its moods: more rounds of saves than of the rest, begun by each side in turn.
    for round in 0..2 * arguments.rounds {
        for side in [round % 2, (round + 1) % 2] {
            match side {
                0 => ours.push(run(us().args(["save", &elements, &saves]).arg(folder))?),
                _ => theirs.push(run(them().args(["save", &elements, &saves]).arg(folder))?),
            }
        }
    }
    for round in 0..arguments.rounds {
        our_steps.push(resumes.first_step(1 + round as u64)?);
        their_steps.push(them_train(arguments, &resumes, "resume")?);
        our_loads.push(from_start(us().args(["load", &elements]).arg(folder))?);
        their_loads.push(from_start(them().args(["load", &elements]).arg(folder))?);
    }
    let mut results = Results::open(&arguments.out)?;
    let of = |reports: &[Report], key: &str| median(reports, |it| number(it, key));
    let seconds = |reports: &[Report]| median(reports, |it| it.seconds);
    let bytes = |reports: &[Report]| format!("{:.0} MB", of(reports, "bytes") / 1e6);
    results.put(
        Entry::of("durable_vs_dcp", seconds(&ours), seconds(&theirs), "s")
            .peer_is(PEER)
            .note(format!("{} and {} on the disk", bytes(&ours), bytes(&theirs))),
    )?;
    results.put(
        Entry::of("stall_vs_dcp", of(&ours, "stall"), of(&theirs, "stall"), "s")
            .peer_is(PEER)
            .floor(of(&ours, "copy"), "copying the state once, into memory that is there"),
    )?;
    let stall_over_copy = of(&ours, "stall") / of(&ours, "copy");
    results.put(Entry::of("stall_over_copy", stall_over_copy, 1.1, "×").peer_is("the target"))?;
    let share = of(&ours, "verify_share");
    results.put(
        Entry::of("verify_share_of_save", share, 0.03, "of a save's time")
            .peer_is("the target")
            .note(format!(
                "what digests and reading back add to a save beyond the sync that they go on beside; their thread works {:.0} % \
                 of it. Verifying a checkpoint goes at {:.2} GB/s",
                100.0 * of(&ours, "verify_work"),
                of(&ours, "verify_gb_per_s")
            )),
    )?;
    results.put(
        Entry::of("load_s", seconds(&our_loads), seconds(&their_loads), "s")
            .peer_is("torch imported, torch.distributed.checkpoint.load; it verifies nothing")
            .note("from the process's start to the state in memory, ours with every digest compared".into()),
    )?;
    results.put(
        Entry::of("resume_s", middle(our_steps), middle(their_steps), "s")
            .peer_is("transformers + PEFT with torch.distributed.checkpoint.load, on random ids; it verifies nothing")
            .note(format!(
                "from the process's start to the end of the first step, of the tiny config's model {WIDTH} wide, \
                 {ROWS} rows of {TIME} tokens; ours is `panglot train` with all that it checks"
            )),
    )?;
    counts(&arguments.soak, &mut results)?;
    results.print();
    fs::remove_dir_all(folder)?;
    Ok(())
}

/// As [`run`], from the process's start to its end.
fn from_start(command: &mut Command) -> Result<Report> {
    let started = Instant::now();
    let mut report = run(command)?;
    report.seconds = started.elapsed().as_secs_f64();
    Ok(report)
}

/// Of the model whose runs are resumed; the tiny config's is 64 wide.
const WIDTH: usize = 256;
const ROWS: usize = 4;
const TIME: usize = 64;

/// A run that is stopped after each step and goes on.
struct Resumes {
    folder: PathBuf,
    overrides: Vec<String>,
}

impl Resumes {
    /// Prepares the model and its data, and takes the first step.
    fn prepare(folder: &Path) -> Result<Resumes> {
        let folder = std::path::absolute(folder)?;
        let model = [
            format!("folders.prepared={}", text_of(&folder.join("prepared"))?),
            format!("folders.run={}", text_of(&folder.join("run"))?),
            format!("model.shape.hidden_size={WIDTH}"),
            format!("train.sequence_length={TIME}"),
            format!("train.rows_per_step={ROWS}"),
            format!("train.micro_rows={ROWS}"),
        ];
        // No save on the way, so that a resume is what is measured.
        let run = ["train.steps=1000", "checkpoint.every_steps=1000"].map(str::to_owned);
        let resumes = Resumes {
            folder,
            overrides: model.into_iter().chain(run).collect(),
        };
        let prepared = resumes.panglot("prepare").output()?;
        ensure!(
            prepared.status.success(),
            "{}",
            String::from_utf8_lossy(&prepared.stderr)
        );
        resumes.first_step(0)?;
        Ok(resumes)
    }

    fn panglot(&self, what: &str) -> Command {
        let program = std::env::current_exe().unwrap_or_default().with_file_name("panglot");
        let mut command = Command::new(program);
        command.args([what, "configs/tiny.yaml"]).args(&self.overrides);
        command
    }

    /// Seconds from the start of `panglot train` until `step` has been taken, the first of this attempt.
    fn first_step(&self, step: u64) -> Result<f64> {
        let started = unix_time();
        let mut command = self.panglot("train");
        let output = command.arg(format!("debug.stop_after={}", step + 1)).output()?;
        // It wants more time.
        let said = String::from_utf8_lossy(&output.stdout);
        ensure!(
            output.status.code() == Some(75),
            "{said}{}",
            String::from_utf8_lossy(&output.stderr)
        );
        let lines = fs::read_to_string(self.folder.join("run/metrics.jsonl"))?;
        let line: Value = serde_json::from_str(lines.lines().last().context("a step was taken")?)?;
        ensure!(line["step"] == step, "it took step {}, not {step}", line["step"]);
        Ok(line["unix_time"].as_f64().context("a step's time")? - started)
    }
}

/// As [`Resumes::first_step`], theirs.
fn them_train(arguments: &Arguments, resumes: &Resumes, what: &str) -> Result<f64> {
    let (rows, time) = (ROWS.to_string(), TIME.to_string());
    let (model, saved) = (
        resumes.folder.join("prepared/base_model"),
        resumes.folder.join("theirs"),
    );
    let started = unix_time().to_string();
    let words = [what, text_of(&model)?, text_of(&saved)?, &rows, &time, &started];
    Ok(peer(&arguments.python, "resume_training.py", &words)?.seconds)
}

/// Lines "NAME tried WHAT bad" that the soak has left, the last of each name, as entries of their own.
fn counts(soak: &Path, results: &mut Results) -> Result<()> {
    let mut text = String::new();
    for entry in fs::read_dir(soak).into_iter().flatten() {
        let file = entry?.path();
        if file.extension().is_some_and(|extension| extension == "log") {
            text += &fs::read_to_string(&file)?;
        }
    }
    for (line_name, entry) in [
        ("syscall_kills", "syscall_kills_unusable"),
        ("rank_kills", "rank_kills_unusable"),
        ("failing_calls", "failing_calls_unusable"),
        ("random_kills", "random_kills_unequal"),
        ("damages", "flips_undetected"),
        ("frozen_writers", "stale_bytes_accepted"),
        ("power_cuts", "power_cuts_unusable"),
        ("reshard_pairs", "reshard_pairs_equal"),
    ] {
        let Some(line) = text.lines().rfind(|line| line.starts_with(&format!("{line_name} "))) else {
            eprintln!(
                "{} has no line of {line_name}: run `make soak-checkpoint`",
                soak.display()
            );
            continue;
        };
        let words: Vec<&str> = line.split_whitespace().collect();
        let [_, tried, _, counted, ..] = words[..] else {
            bail!("{} has the line {line:?}", soak.display())
        };
        let (tried, counted): (f64, f64) = (tried.parse()?, counted.trim_end_matches(';').parse()?);
        let target = if entry == "reshard_pairs_equal" { tried } else { 0.0 };
        results.put(
            Entry::of(entry, counted, target, &format!("of {tried}"))
                .peer_is("the target")
                .note(line.to_owned()),
        )?;
    }
    Ok(())
}

fn state(elements: usize) -> Result<Zero> {
    let specs = [BucketSpec {
        name: "state".into(),
        params: vec![ParamSpec {
            name: "state".into(),
            shape: vec![elements as i64],
            group: 0,
        }],
    }];
    let comm = sharding::join(1)?;
    let zeros = |_, _| Tensor::full([elements as i64], 0.5, (Kind::Float, Device::Cpu));
    Ok(Zero::new(
        comm.as_ref(),
        Stage::OptimizerState,
        &specs,
        Kind::Float,
        zeros,
    )?)
}

fn identity() -> Result<Identity> {
    Ok(Identity {
        plan: configs::load(Path::new("configs/tiny.yaml"), &[])?,
        base_model: String::new(),
        vocabulary: String::new(),
        tokens: String::new(),
    })
}

fn save(elements: usize, saves: usize, folder: &Path) -> Result<Report> {
    let zero = state(elements)?;
    let comm = sharding::join(1)?;
    let ours = folder.join("ours");
    if ours.exists() {
        fs::remove_dir_all(&ours)?;
    }
    let mut saver = Saver::begin(comm.as_ref(), &ours, identity()?, &zero, true)?;
    // What a copy costs at the least: three tensors into memory that is there.
    let mut room: Vec<Tensor> = (0..3)
        .map(|_| Tensor::zeros([elements as i64], (Kind::Float, Device::Cpu)))
        .collect();
    room.iter_mut().for_each(|tensor| f32s_mut(tensor).fill(1.0));
    let (mut stalls, mut copies, mut durables) = (Vec::new(), Vec::new(), Vec::new());
    let (mut shares, mut works, mut bytes) = (Vec::new(), Vec::new(), 0.0);
    for step in 0..=saves as u64 {
        let started = Instant::now();
        let (_, slice) = zero.slice(0);
        for (from, to) in [&slice.theta, &slice.m, &slice.v].into_iter().zip(&mut room) {
            to.f_copy_(from)?;
        }
        let copy = started.elapsed().as_secs_f64();
        ensure!(f32s(&room[0])[0] == 0.5, "the copy has been made");
        let progress = Progress {
            step,
            ..Progress::default()
        };
        let started = Instant::now();
        ensure!(
            saver.start(&zero, progress, &GuardState::default(), 0)?.is_none(),
            "nothing was under way"
        );
        let stall = started.elapsed().as_secs_f64();
        // As training would: it looks in now and then.
        let committed = loop {
            match saver.advance(saver.is_busy())? {
                Some(Outcome::Committed(committed)) => break committed,
                Some(failed) => bail!("{failed:?}"),
                None => std::thread::sleep(Duration::from_millis(2)),
            }
        };
        if step > 0 {
            stalls.push(stall);
            copies.push(copy);
            durables.push(committed.seconds);
            shares.push(committed.waited / committed.seconds);
            works.push((committed.digest + committed.verify) / committed.seconds);
            bytes = committed.bytes as f64;
        }
    }
    let newest = launcher::checkpoint::newest(&ours.join(FOLDER))?.context("some were saved")?;
    let started = Instant::now();
    verify(&newest.folder)?;
    let rate = bytes / 1e9 / started.elapsed().as_secs_f64();
    let more = json!({
        "stall": middle(stalls),
        "copy": middle(copies),
        "verify_share": middle(shares),
        "verify_work": middle(works),
        "verify_gb_per_s": rate,
        "bytes": bytes,
    });
    report(middle(durables), more)
}

fn read(elements: usize, folder: &Path) -> Result<Report> {
    let started = Instant::now();
    let mut zero = state(elements)?;
    let comm = sharding::join(1)?;
    let found = choose(&folder.join("ours").join(FOLDER), comm.as_ref())?.context("a checkpoint")?;
    load(&found.folder, &found.manifest, comm.as_ref(), &mut zero)?;
    report(started.elapsed().as_secs_f64(), json!({}))
}
