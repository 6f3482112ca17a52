//! `panglot scale`: the same training on several numbers of nodes, by Slurm or on this machine, and what more nodes win.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use configs::Plan;
use configs::planner::{Forecast, Hardware, Place};
use serde::Deserialize;
use serde_json::json;

use super::plan::sizes;
use super::submit::sbatch;
use super::train::train;
use super::{App, Failed, stage};
use launcher::events::StepMetrics;
use launcher::scaling::{Measured, Mode, Point, WARM_UP, csv, points, table};
use launcher::stages::STAGES;
use launcher::submit::{Settings, Submission, script};
use launcher::{exit, files, report};

#[derive(Debug, clap::Args)]
pub struct Args {
    /// The config, a YAML file
    pub config: PathBuf,
    /// nodes=1,2,4,8; the job's settings as for `panglot submit`; settings of the config
    #[arg(value_name = "KEY=VALUE", required = true)]
    pub settings: Vec<String>,
    /// The global batch grows with the nodes; the smallest number of nodes has the config's
    #[arg(long, conflicts_with = "strong")]
    pub weak: bool,
    /// The global batch stays as it is (what is done without --weak)
    #[arg(long)]
    pub strong: bool,
    /// Steps to take on each number of nodes; the first two are not counted
    #[arg(long, value_name = "N", default_value_t = 12, value_parser = clap::value_parser!(u64).range(4..))]
    pub steps: u64,
    /// On this machine, with nodes × ranks_per_node ranks, though there is a Slurm
    #[arg(long)]
    pub local: bool,
    /// Where to write scale.csv, scale.json and scale.svg, instead of beside the run's folder
    #[arg(long, value_name = "FOLDER")]
    pub out: Option<PathBuf>,
}

pub fn run(app: &App, args: &Args) -> anyhow::Result<()> {
    let (numbers, rest) = numbers_of_nodes(&args.settings)?;
    let mode = if args.weak { Mode::Weak } else { Mode::Strong };
    let (settings, overrides) = Settings::take(&rest)?;
    let base = configs::load_for_any_ranks(&args.config, &overrides)?;
    let out = args
        .out
        .clone()
        .unwrap_or_else(|| files::beside(&base.folders.run, "scale"));
    let local = args.local || !has_sbatch();
    // By Slurm nothing is prepared in the job.
    match local {
        true => drop(stage::make(app, &base, &STAGES, false)?),
        false => STAGES.iter().try_for_each(|stage| stage.require(&base))?,
    }
    let mut runs = vec![];
    for &nodes in &numbers {
        let settings = settings.clone().with(&format!("nodes={nodes}"))?;
        let rows = match mode {
            Mode::Strong => base.train.rows_per_step,
            Mode::Weak => grown(base.train.rows_per_step, nodes, numbers[0])?,
        };
        let folder = out.join(format!("{nodes}-nodes"));
        let mut words = overrides.clone();
        words.extend([
            format!("folders.run={}", std::path::absolute(&folder)?.display()),
            format!("train.steps={}", args.steps),
            format!("checkpoint.every_steps={}", args.steps),
            format!("train.rows_per_step={rows}"),
            "debug.timeline=true".to_owned(),
        ]);
        let all: Vec<String> = words
            .iter()
            .cloned()
            .chain([format!("launch.ranks={}", settings.ranks())])
            .collect();
        let plan = configs::load(&args.config, &all)?;
        // A measurement begins anew.
        files::remove_folder(&folder)?;
        match local {
            true => here(app, &plan)?,
            false => by_slurm(app, args, &plan, settings.clone(), words)?,
        }
        let place = match local {
            // This machine's ranks share it, whatever nodes they stand for.
            true => Place {
                nodes: 1,
                ranks_per_node: settings.ranks(),
            },
            false => Place {
                nodes,
                ranks_per_node: settings.ranks_per_node,
            },
        };
        let planned = planned_seconds(&plan, place);
        runs.push(measured(&plan, &settings, planned)?);
        // Each time, so that a sweep which ends early leaves what it has measured.
        write(&out, args, mode, &points(&runs))?;
    }
    let points = points(&runs);
    app.print(&json!({ "mode": mode, "points": points, "folder": out }), || {
        format!(
            "{}\nwritten: scale.csv, scale.json, scale.svg in {}",
            table(&points),
            files::shown(&out)
        )
    })
}

fn write(out: &Path, args: &Args, mode: Mode, points: &[Point]) -> anyhow::Result<()> {
    files::write_json(
        &out.join("scale.json"),
        &json!({ "config": args.config, "mode": mode, "points": points }),
    )?;
    files::write_atomically(&out.join("scale.csv"), csv(points).as_bytes())?;
    files::write_atomically(&out.join("scale.svg"), report::scaling(points).as_bytes())
}

/// `nodes=1,2,4` taken out of the words, ascending.
fn numbers_of_nodes(words: &[String]) -> anyhow::Result<(Vec<usize>, Vec<String>)> {
    let (nodes, rest): (Vec<String>, Vec<String>) = words.iter().cloned().partition(|word| word.starts_with("nodes="));
    let list = nodes
        .last()
        .and_then(|word| word.strip_prefix("nodes="))
        .unwrap_or_default();
    let numbers: Result<Vec<usize>, _> = list.split(',').map(str::parse).collect();
    let mut numbers = numbers
        .ok()
        .filter(|numbers| numbers.iter().all(|n| *n > 0))
        .with_context(|| {
            format!("nodes = {list:?} is not a list of whole numbers above 0; write it such as nodes=1,2,4,8")
        })?;
    numbers.sort_unstable();
    numbers.dedup();
    Ok((numbers, rest))
}

fn grown(rows: usize, nodes: usize, first: usize) -> anyhow::Result<usize> {
    ensure!(
        (rows * nodes).is_multiple_of(first),
        "--weak: {rows} rows on {first} nodes give no whole number on {nodes}; take a multiple of {first} for \
         train.rows_per_step"
    );
    Ok(rows * nodes / first)
}

fn has_sbatch() -> bool {
    let mut asked = Command::new("sbatch");
    asked
        .arg("--version")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    asked.status().is_ok_and(|status| status.success())
}

fn here(app: &App, plan: &Plan) -> anyhow::Result<()> {
    let ended = train(app, plan, &mut |_| None)?;
    if ended.code == exit::FINISHED {
        return Ok(());
    }
    let what = "training";
    Err(Failed { what, code: ended.code }.into())
}

/// One job after the other: side by side they would share the network that is measured.
fn by_slurm(app: &App, args: &Args, plan: &Plan, settings: Settings, overrides: Vec<String>) -> anyhow::Result<()> {
    let output = plan.folders.run.join("job.out");
    let output_word = format!("output={}", output.display());
    let settings = settings.with(&output_word)?;
    let job = Submission {
        settings,
        config: args
            .config
            .to_str()
            .context("the config's path is not UTF-8; rename it")?
            .to_owned(),
        overrides,
        name: format!("{}-scale", plan.name),
        panglot: std::env::current_exe()?
            .to_str()
            .context("this program's path is not UTF-8")?
            .to_owned(),
        device: Some(plan.train.device),
        ..Submission::default()
    };
    let file = plan.folders.run.join("job.sbatch");
    files::write_atomically(&file, script(&job)?.as_bytes())?;
    let id = sbatch(&file)?;
    if !app.json {
        eprintln!("job {id} on {} nodes; {}", job.settings.nodes, files::shown(&output));
    }
    while is_queued(id)? {
        std::thread::sleep(Duration::from_secs(2));
    }
    Ok(())
}

/// Waiting, held or running; Slurm forgets a job some minutes after its end.
fn is_queued(id: u64) -> anyhow::Result<bool> {
    let output = Command::new("squeue")
        .args(["-h", "-o", "%T", "-j", &id.to_string()])
        .stdin(Stdio::null())
        .output()
        .context("cannot start squeue")?;
    let said = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
    Ok(match output.status.success() {
        true => !said(&output.stdout).is_empty(),
        // A controller that is busy answers another time.
        false => !said(&output.stderr).contains("Invalid job id"),
    })
}

/// What the plan says of a step's time; on the hardware that the config names, else on the usual of its device.
fn planned_seconds(plan: &Plan, place: Place) -> Option<f64> {
    let usual = || Hardware::usual(plan.train.device);
    let hardware = plan.hardware.clone().unwrap_or_else(usual);
    let forecast = Forecast::of(plan, &sizes(plan)?, place, &hardware).ok()?;
    Some(forecast.step.total)
}

fn measured(plan: &Plan, settings: &Settings, planned_step_seconds: Option<f64>) -> anyhow::Result<Measured> {
    let run = &plan.folders.run;
    let text = fs::read_to_string(run.join("metrics.jsonl")).unwrap_or_default();
    let steps: Vec<StepMetrics> = text
        .lines()
        .filter_map(|line| serde_json::from_str(line).ok())
        .collect();
    if (steps.len() as u64) < plan.train.steps {
        bail!(
            "on {} nodes only {} of {} steps were taken; see {} and its logs",
            settings.nodes,
            steps.len(),
            plan.train.steps,
            files::shown(run)
        );
    }
    Ok(Measured {
        nodes: settings.nodes,
        ranks: settings.ranks(),
        rows_per_step: plan.train.rows_per_step,
        tokens_per_step: plan.train.rows_per_step * plan.train.sequence_length,
        waiting_share: waiting_share(&run.join("timeline"), &steps),
        steps,
        planned_step_seconds,
    })
}

/// One event of a timeline.
#[derive(Deserialize)]
struct Span {
    ts: f64,
    dur: f64,
    tid: u32,
}

/// Ranks wait for others in this row of their timelines.
const WAITING: u32 = 2;

/// The share of the counted steps' time that ranks waited in collectives, mean over ranks: communication that no computing hid.
fn waiting_share(folder: &Path, steps: &[StepMetrics]) -> Option<f64> {
    let (from, to) = (steps.get(WARM_UP - 1)?.unix_time * 1e6, steps.last()?.unix_time * 1e6);
    let ranks: Vec<PathBuf> = fs::read_dir(folder).ok()?.flatten().map(|entry| entry.path()).collect();
    let waited = |file: &PathBuf| -> Option<f64> {
        let lines = BufReader::new(fs::File::open(file).ok()?).lines().map_while(Result::ok);
        let spans = lines.filter_map(|line| serde_json::from_str::<Span>(line.trim_end_matches(',')).ok());
        Some(
            spans
                .filter(|span| span.tid == WAITING && span.ts >= from && span.ts < to)
                .map(|span| span.dur)
                .sum(),
        )
    };
    let waited: Vec<f64> = ranks.iter().filter_map(waited).collect();
    (!waited.is_empty()).then(|| waited.iter().sum::<f64>() / waited.len() as f64 / (to - from))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(line: &str) -> Vec<String> {
        line.split_whitespace().map(str::to_owned).collect()
    }

    #[test]
    fn numbers_of_nodes_are_a_list() {
        let (numbers, rest) = numbers_of_nodes(&words("nodes=4,1,2,2 time=30 seed=3")).unwrap();
        assert_eq!((numbers, rest), (vec![1, 2, 4], words("time=30 seed=3")));
        for wrong in ["nodes=", "nodes=0,1", "time=30", "nodes=1;2"] {
            assert!(numbers_of_nodes(&words(wrong)).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_weak_sweep_keeps_the_rows_of_a_rank() {
        assert_eq!((grown(12, 4, 1).unwrap(), grown(12, 4, 2).unwrap()), (48, 24));
        assert!(grown(3, 3, 2).is_err());
    }
}
