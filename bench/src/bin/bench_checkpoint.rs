//! Saves and resumes against torch's asynchronous distributed checkpoint: the same state, the same disk, in turns, each side in
//! a process of its own. What the soak has counted stands beside it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use bench::{Entry, Report, Results, median, number, report, run};
use clap::{Parser, Subcommand};
use launcher::checkpoint::{FOLDER, GuardState, Identity, verify};
use serde_json::json;
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
    /// What `make soak-checkpoint` has printed
    #[arg(long, default_value = "runs/soak-checkpoint.log")]
    counts: PathBuf,
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
    let peer = Path::new("bench/peers/save_checkpoint.py");
    let us = || Command::new(std::env::current_exe().unwrap_or_default());
    let them = || {
        let mut command = Command::new(&arguments.python);
        command.arg(peer);
        command
    };
    let (mut ours, mut theirs, mut our_loads, mut their_loads) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for _ in 0..arguments.rounds {
        ours.push(run(us().args(["save", &elements, &saves]).arg(folder))?);
        theirs.push(run(them().args(["save", &elements, &saves]).arg(folder))?);
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
                "digests, and reading back; verifying alone goes at {:.2} GB/s",
                of(&ours, "verify_gb_per_s")
            )),
    )?;
    results.put(
        Entry::of("resume_s", seconds(&our_loads), seconds(&their_loads), "s")
            .peer_is("torch imported, torch.distributed.checkpoint.load; it verifies nothing")
            .note("from the process's start to the state in memory, ours with every digest compared".into()),
    )?;
    counts(&arguments.counts, &mut results)?;
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

/// Lines "NAME tried WHAT bad" of the soak, as entries of their own.
fn counts(log: &Path, results: &mut Results) -> Result<()> {
    let Ok(text) = fs::read_to_string(log) else {
        eprintln!(
            "{} is not there: run `make soak-checkpoint` for the counts",
            log.display()
        );
        return Ok(());
    };
    for (line_name, entry) in [
        ("syscall_kills", "syscall_kills_unusable"),
        ("random_kills", "random_kills_unequal"),
        ("damages", "flips_undetected"),
        ("frozen_writers", "stale_bytes_accepted"),
        ("power_cuts", "power_cuts_unusable"),
        ("reshard_pairs", "reshard_pairs_equal"),
    ] {
        let named = |line: &'_ str| line.find(&format!("{line_name} ")).map(|at| line[at..].to_owned());
        let Some(line) = text.lines().find_map(named) else {
            continue;
        };
        let words: Vec<&str> = line.split_whitespace().collect();
        let [_, tried, _, counted, ..] = words[..] else {
            bail!("{} has the line {line:?}", log.display())
        };
        let (tried, counted): (f64, f64) = (tried.parse()?, counted.parse()?);
        let target = if entry == "reshard_pairs_equal" { tried } else { 0.0 };
        results.put(
            Entry::of(entry, counted, target, &format!("of {tried}"))
                .peer_is("the target")
                .note(line.clone()),
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
    let (mut stalls, mut copies, mut durables, mut shares, mut bytes) =
        (Vec::new(), Vec::new(), Vec::new(), Vec::new(), 0.0);
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
            targets_so_far: 0,
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
            shares.push((committed.digest + committed.verify) / committed.seconds);
            bytes = committed.bytes as f64;
        }
    }
    let newest = launcher::checkpoint::newest(&ours.join(FOLDER))?.context("some were saved")?;
    let started = Instant::now();
    verify(&newest.folder)?;
    let rate = bytes / 1e9 / started.elapsed().as_secs_f64();
    let middle = |values: &mut Vec<f64>| {
        values.sort_by(f64::total_cmp);
        values[values.len() / 2]
    };
    let more = json!({
        "stall": middle(&mut stalls),
        "copy": middle(&mut copies),
        "verify_share": middle(&mut shares),
        "verify_gb_per_s": rate,
        "bytes": bytes,
    });
    report(middle(&mut durables), more)
}

fn read(elements: usize, folder: &Path) -> Result<Report> {
    let started = Instant::now();
    let mut zero = state(elements)?;
    let comm = sharding::join(1)?;
    let found = choose(&folder.join("ours").join(FOLDER), comm.as_ref())?.context("a checkpoint")?;
    load(&found.folder, &found.manifest, comm.as_ref(), &mut zero)?;
    report(started.elapsed().as_secs_f64(), json!({}))
}
