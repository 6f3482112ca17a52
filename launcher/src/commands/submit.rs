//! `panglot submit`: writes the run's job script and hands it to sbatch.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context, bail, ensure};
use configs::planner::{Forecast, Hardware, Place};
use configs::{Device, Plan};
use serde_json::json;

use super::plan::sizes;
use super::{App, RunFolder};
use launcher::stages::STAGES;
use launcher::submit::{Settings, Submission, script};
use launcher::{files, text};

#[derive(Debug, clap::Args)]
pub struct Args {
    /// The config, a YAML file
    pub config: PathBuf,
    /// The job: nodes=, ranks_per_node=, cpus_per_rank=, gpus_per_node=, memory=, time=, account=, partition=, qos=, constraint=,
    /// reservation=, exclude=, gres=, mail_user=, job_name=, output=, mpi=; and settings of the config, such as train.steps=5
    #[arg(value_name = "KEY=VALUE")]
    pub settings: Vec<String>,
    /// Print the script; submit nothing
    #[arg(long)]
    pub dry_run: bool,
    /// Where jobs may not be requeued: an array of N jobs, one at a time
    #[arg(long, value_name = "N", conflicts_with = "chain")]
    pub array: Option<u32>,
    /// Where jobs may not be requeued: N jobs of one name, each waiting for the one before
    #[arg(long, value_name = "N")]
    pub chain: Option<u32>,
    /// Load this module first; may be given several times
    #[arg(long, value_name = "NAME")]
    pub module: Vec<String>,
    /// Read this file of variables first, such as slurm/nccl.env
    #[arg(long, value_name = "FILE")]
    pub env_file: Option<String>,
    /// Run panglot inside this image, with Apptainer
    #[arg(long, value_name = "IMAGE")]
    pub apptainer: Option<String>,
    /// A folder to show inside the image; may be given several times
    #[arg(long, value_name = "FOLDER", requires = "apptainer")]
    pub bind: Vec<String>,
    /// What the job calls panglot, if not this program's own path; inside an image it is on the PATH
    #[arg(long, value_name = "PROGRAM")]
    pub program: Option<String>,
    /// Run `panglot doctor` on the job's nodes first, each time the job starts
    #[arg(long)]
    pub doctor: bool,
}

pub fn run(app: &App, args: &Args) -> anyhow::Result<()> {
    let (settings, overrides) = Settings::take(&args.settings)?;
    let asked = configs::load_for_any_ranks(&args.config, &overrides)?.launch.ranks;
    ensure!(
        asked == 1 || Settings::say_where(&args.settings),
        "launch.ranks = {asked}, and nothing says where so many run; name nodes and ranks of a node, such as nodes={} \
         ranks_per_node={}",
        asked.div_ceil(4),
        asked.min(4)
    );
    let ranks = format!("launch.ranks={}", settings.ranks());
    let all: Vec<String> = overrides.iter().cloned().chain([ranks]).collect();
    let plan = configs::load(&args.config, &all)?;
    if let Some(warning) = misfit(&plan, &settings) {
        eprintln!("panglot: warning: {warning}");
    }
    let job = Submission {
        settings,
        config: plain(args.config.as_os_str())?,
        overrides,
        name: plan.name.clone(),
        panglot: program(args)?,
        device: Some(plan.train.device),
        array: args.array,
        chain: args.chain,
        nonce: format!("{:x}", std::process::id() ^ now()),
        modules: args.module.clone(),
        environment_file: args.env_file.clone(),
        apptainer: args.apptainer.clone(),
        binds: args.bind.clone(),
        doctor: args.doctor,
    };
    let script = script(&job)?;
    if args.dry_run {
        print!("{script}");
        return Ok(());
    }
    for stage in STAGES {
        stage
            .require(&plan)
            .context("nothing is prepared in the job: run `panglot prepare` here first")?;
    }
    // What `panglot status` reads of a run that waits in the queue.
    files::make_private(&plan.folders.run)?;
    let ran = RunFolder(&plan.folders.run).plan();
    if !ran.exists() {
        files::write_json(&ran, &plan)?;
    }
    let file = plan.folders.run.join("job.sbatch");
    files::write_atomically(&file, script.as_bytes())?;
    let times = args.chain.unwrap_or(1);
    let mut jobs: Vec<u64> = Vec::new();
    let numbers = |jobs: &[u64]| {
        let numbers: Vec<String> = jobs.iter().map(u64::to_string).collect();
        numbers.join(", ")
    };
    for _ in 0..times {
        let job = sbatch(&file).with_context(|| match jobs.is_empty() {
            true => "nothing is submitted".to_owned(),
            false => format!(
                "of a chain of {times} only {} submitted (job {}), and will run",
                text::counted(jobs.len(), "job"),
                numbers(&jobs)
            ),
        })?;
        jobs.push(job);
    }
    app.print(&json!({ "jobs": jobs, "script": file }), || {
        format!(
            "Submitted job {} on {} × {}; the script is {}\nNext: panglot status {}",
            numbers(&jobs),
            text::counted(job.settings.nodes, "node"),
            text::counted(job.settings.ranks_per_node, "rank"),
            files::shown(&file),
            files::shown(&plan.folders.run),
        )
    })
}

/// Why the planner would not start this job, where it knows what the job runs on.
fn misfit(plan: &Plan, settings: &Settings) -> Option<String> {
    // Nodes' own memory is anybody's guess.
    if plan.train.device == Device::Cpu && plan.hardware.is_none() {
        return None;
    }
    let hardware = plan
        .hardware
        .clone()
        .unwrap_or_else(|| Hardware::usual(plan.train.device));
    let place = Place {
        nodes: settings.nodes,
        ranks_per_node: settings.ranks_per_node,
    };
    let forecast = Forecast::of(plan, &sizes(plan)?, place, &hardware).ok()?;
    let more = format!(
        "see `panglot plan` with nodes={} gpus={}, and say what they are by hardware=",
        place.nodes, place.ranks_per_node
    );
    match &forecast.impossible {
        Some(why) => Some(format!("{why}; {more}")),
        None if !forecast.fits() => Some(format!(
            "a rank takes {} by the plan, and has {} to plan with on {}; {more}",
            text::bytes(forecast.memory.total()),
            text::bytes(forecast.usable),
            hardware.name
        )),
        None => None,
    }
}

/// Hands a script to Slurm; the job's number.
pub fn sbatch(file: &std::path::Path) -> anyhow::Result<u64> {
    let output = Command::new("sbatch")
        .arg("--parsable")
        .arg(file)
        .stdin(Stdio::null())
        .output()
        .context("cannot start sbatch; is this a login node of a Slurm cluster? --dry-run prints the script")?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.success(),
        "sbatch refused {}: {}",
        file.display(),
        said.trim()
    );
    // NUMBER, or NUMBER;CLUSTER
    let answer = String::from_utf8_lossy(&output.stdout);
    let number = answer
        .lines()
        .last()
        .and_then(|line| line.split(';').next())
        .unwrap_or_default();
    number
        .trim()
        .parse()
        .with_context(|| format!("sbatch answered {answer:?} where a job's number was due"))
}

fn program(args: &Args) -> anyhow::Result<String> {
    match (&args.program, &args.apptainer) {
        (Some(program), _) => Ok(program.clone()),
        (None, Some(_)) => Ok("panglot".to_owned()),
        (None, None) => plain(std::env::current_exe().context("where this program is")?.as_os_str()),
    }
}

fn plain(name: &std::ffi::OsStr) -> anyhow::Result<String> {
    match OsString::from(name).into_string() {
        Ok(name) => Ok(name),
        Err(name) => bail!("{} is not UTF-8, and a job script is; rename it", name.display()),
    }
}

fn now() -> u32 {
    let since = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap_or_default();
    since.as_secs() as u32
}
