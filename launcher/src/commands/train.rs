//! `panglot train`: prepares what is missing, then runs the ranks. The worker resumes by itself from the newest checkpoint.

use std::path::Path;

use configs::Plan;
use nix::sys::signal::Signal;

use super::{App, ConfigArgs, Failed, RunFolder, code_of, stage, verify_resume, watch};
use launcher::attempts::{Attempts, Verdict};
use launcher::events::Event;
use launcher::place::{Family, Place, PlaceError, is_wired_for_mpi, shown_gpus};
use launcher::stages::STAGES;
use launcher::status::Sign;
use launcher::supervise::Ended;
use launcher::view::View;
use launcher::{exit, files, gpus, sampling, text};

#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    pub config: ConfigArgs,
    /// Ranks on this machine, instead of the config's launch.ranks
    #[arg(short = 'n', long, value_name = "N")]
    pub ranks: Option<usize>,
    /// When a rank is lost, start all again from the newest checkpoint, up to K times
    #[arg(long, value_name = "K", default_value_t = 0)]
    pub restarts: u32,
}

pub fn run(app: &App, args: &Args) -> anyhow::Result<()> {
    let place = Place::detect();
    let (plan, ended) = match place {
        // Somebody has started us once a rank already: the world is theirs to choose, and this is one rank of it.
        Ok(place) if place.is_rank_of_many() => {
            anyhow::ensure!(
                args.restarts == 0,
                "--restarts = {}, but this is {place}: whoever started the ranks must start them again; leave it out, and let \
                 the job script requeue the job (slurm/train.sbatch does)",
                args.restarts
            );
            let plan = args
                .config
                .load_to_train(Some(format!("launch.ranks={}", place.world)))?;
            anyhow::ensure!(
                plan.debug.verify_resume.is_none(),
                "debug.verify_resume starts three jobs one after the other and this is one rank of a job; start `panglot` once"
            );
            anyhow::ensure!(
                plan.train.device != configs::Device::Cpu || is_wired_for_mpi(),
                "this is {place}, and no MPI launcher has wired the ranks together, which ranks on CPUs need (train.device = \
                 cpu): start them with `srun --mpi=pmix`, `mpirun`, or `panglot train -n {}`",
                place.world
            );
            let ended = as_one_rank(app, &plan, &place);
            let code = ended.as_ref().map_or_else(code_of, |ended| ended.code);
            if code != exit::FINISHED {
                // For the job script: srun gives the highest code of all, which is that of ranks it has terminated.
                let _ = Attempts::of(&plan.folders.run).note_rank(place.rank, code);
            }
            let ended = ended?;
            (plan, ended)
        }
        place => {
            let plan = args
                .config
                .load_to_train(args.ranks.map(|n| format!("launch.ranks={n}")))?;
            match place {
                // In the batch shell, mpirun finds the allocation's nodes itself; one rank alone was not meant.
                Err(PlaceError::BatchShell { .. }) if plan.launch.ranks > 1 => {}
                place => drop(place?),
            }
            stage::make(app, &plan, &STAGES, false)?;
            if let Some(steps) = plan.debug.verify_resume {
                return verify_resume::run(app, &plan, steps);
            }
            let ended = with_restarts(app, &plan, args.restarts)?;
            (plan, ended)
        }
    };
    if ended.code != exit::FINISHED {
        return Err(Failed {
            what: "training",
            code: ended.code,
        }
        .into());
    }
    match ended.result {
        Some(result) => app.print(&result, || finished(&args.config.config, &plan)),
        None => Ok(()),
    }
}

/// Runs all ranks from here, again and again where one was lost, each time from the newest checkpoint.
fn with_restarts(app: &App, plan: &Plan, restarts: u32) -> anyhow::Result<Ended> {
    let attempts = Attempts::of(&plan.folders.run);
    let series = format!("panglot train, process {}", std::process::id());
    for restart in 1.. {
        let ended = train(app, plan, &mut |_| None)?;
        // More time is the scheduler's to give, and a signal of the user's is no loss.
        if restarts == 0 || ended.asked || matches!(ended.code, exit::FINISHED | exit::MORE_TIME) {
            return Ok(ended);
        }
        match attempts.ended(&series, ended.code, true)? {
            Verdict::Again { why, .. } if restart <= restarts => {
                let lost = ended.lost.map_or(String::new(), |lost| format!("{lost}; "));
                eprintln!("panglot: restart {restart} of {restarts}: {lost}{why}");
            }
            Verdict::Stop { why, .. } => {
                eprintln!("panglot: no restart: {why}");
                return Ok(ended);
            }
            _ => return Ok(ended),
        }
    }
    unreachable!("the loop ends by its number of restarts")
}

/// Runs all ranks from here, to their end whatever it is.
pub fn train(app: &App, plan: &Plan, also: &mut dyn FnMut(&Event) -> Option<Signal>) -> anyhow::Result<Ended> {
    let worker = app.worker()?;
    let args = vec!["train".into(), "--plan".into(), write_plan(plan)?];
    let (ranks, threads) = (plan.launch.ranks, plan.launch.threads_per_rank);
    if plan.train.device == configs::Device::Cuda
        && let Some(shown) = shown_gpus()
    {
        gpus::enough_for(ranks, &shown)?;
    }
    // GPUs have NCCL; ranks on CPUs need MPI.
    let job = match plan.train.device {
        configs::Device::Cuda if ranks > 1 => worker.processes(ranks, threads, args),
        _ => worker.job(ranks, threads, args),
    };
    let mut view = View::new();
    view.say(&format!(
        "{} on {}: {} steps × {} rows × {} tokens",
        plan.name,
        text::counted(plan.launch.ranks, "rank"),
        text::count(plan.train.steps),
        text::count(plan.train.rows_per_step),
        text::count(plan.train.sequence_length),
    ));
    view.say(&sampling::summary(plan, &sampling::stream(plan)?.plan()));
    let here = Place {
        rank: 0,
        world: ranks,
        local_rank: 0,
        local_world: ranks,
        node: nix::unistd::gethostname()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned(),
        family: Family::Alone,
    };
    let _sign = Sign::give(&plan.folders.run, &here);
    watch(&job, &mut view, also)
}

/// Nothing is prepared here: a thousand ranks would all do it. Every rank writes the same plan, each by a rename.
fn as_one_rank(app: &App, plan: &Plan, place: &Place) -> anyhow::Result<Ended> {
    for stage in STAGES {
        stage.require(plan)?;
    }
    // Another rank may have been given another config and write it to the same file: each says which was its own.
    let digest = launcher::files::digest_of(plan)?;
    let args = vec![
        "train".into(),
        "--plan".into(),
        write_plan(plan)?,
        "--config-digest".into(),
        digest.into(),
    ];
    // One rank a host says for all of them that the host lives, and how.
    let _sign = (place.local_rank == 0).then(|| Sign::give(&plan.folders.run, place));
    let job = app.worker()?.one_of_many(plan.launch.threads_per_rank, args);
    let mut view = View::new();
    if place.rank == 0 {
        view.say(&format!(
            "{} on {}; this is {place}",
            plan.name,
            text::counted(place.world, "rank")
        ));
        view.say(&sampling::summary(plan, &sampling::stream(plan)?.plan()));
    }
    watch(&job, &mut view, &mut |_| None)
}

fn write_plan(plan: &Plan) -> anyhow::Result<std::ffi::OsString> {
    files::make_private(&plan.folders.run)?;
    let file = RunFolder(&plan.folders.run).plan();
    files::write_json(&file, plan)?;
    Ok(file.into())
}

fn finished(config: &Path, plan: &Plan) -> String {
    let (config, run) = (config.display(), files::shown(&plan.folders.run));
    format!(
        "{} steps are taken; the run is in {run}\n\
         Next: panglot export {config}; panglot eval {config}; panglot report {config}",
        text::count(plan.train.steps)
    )
}
