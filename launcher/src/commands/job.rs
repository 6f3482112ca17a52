//! `panglot job`: what a job script asks before and after its ranks. People need it only in scripts of their own.

use std::time::{Duration, Instant, SystemTime};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::{App, ConfigArgs, Leave};
use launcher::attempts::{Attempts, Verdict, newest_step};
use launcher::checkpoint::FOLDER;
use launcher::place::SlurmJob;
use launcher::supervise::process_state;
use launcher::{exit, wall_time};

#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// Succeeds if nothing is left of the run; clears what ranks of an earlier attempt left
    IsFinished(ConfigArgs),
    /// While srun runs: waits for its end, and ends it where a rank has failed and srun waits for a node that will not answer
    Watch {
        #[command(flatten)]
        config: ConfigArgs,
        /// srun's process
        #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(u32).range(2..))]
        process: u32,
    },
    /// After srun: exits with 3 where another attempt is due on the same nodes, with 4 where it is by way of the queue, and else
    /// with what the attempt was really about
    Ended {
        #[command(flatten)]
        config: ConfigArgs,
        /// What srun or mpirun ended with
        #[arg(long, value_name = "CODE", allow_negative_numbers = true)]
        code: i32,
        /// What counts as attempts of one kind: the job's number, the array's, a chain's name
        #[arg(long, value_name = "NAME")]
        series: String,
    },
}

pub fn run(_: &App, command: &Command) -> anyhow::Result<()> {
    match command {
        Command::IsFinished(config) => is_finished(config),
        Command::Watch { config, process } => watch(config, *process),
        Command::Ended { config, code, series } => ended(config, *code, series),
    }
}

fn is_finished(config: &ConfigArgs) -> anyhow::Result<()> {
    let plan = config.load()?;
    Attempts::of(&plan.folders.run).clear_notes();
    let step = newest_step(&plan.folders.run.join(FOLDER)).unwrap_or(0);
    if step >= plan.train.steps {
        eprintln!("panglot: all {step} steps are taken; nothing is left to do");
        return Ok(());
    }
    Err(Leave(exit::NOT_DONE).into())
}

/// Ranks end within 5 s of the first, and srun, when all have, in some seconds more. Where the daemon of its step died on a node,
/// it waits for that node's ranks until the job's end, though they are long gone.
const GRACE: Duration = Duration::from_secs(15);
const LOOK_EVERY: Duration = Duration::from_millis(500);

fn watch(config: &ConfigArgs, process: u32) -> anyhow::Result<()> {
    let attempts = Attempts::of(&config.load()?.folders.run);
    let srun = Pid::from_raw(process.try_into()?);
    let mut failed: Option<Instant> = None;
    while is_running(process) {
        if failed.is_none() && attempts.has_failed_rank() {
            failed = Some(Instant::now());
        }
        if failed.is_some_and(|failed| failed.elapsed() > GRACE) {
            eprintln!(
                "panglot: a rank failed {} s ago and srun still waits for a node that does not answer; srun is ended",
                GRACE.as_secs()
            );
            // Asked to end it would wait on. It may have just ended.
            let _ = kill(srun, Signal::SIGKILL);
            break;
        }
        std::thread::sleep(LOOK_EVERY);
    }
    Ok(())
}

/// A process that has ended stays, as a zombie, until the job script asks for its code.
fn is_running(process: u32) -> bool {
    process_state(process).is_some_and(|state| state != 'Z')
}

fn ended(config: &ConfigArgs, code: i32, series: &str) -> anyhow::Result<()> {
    let plan = config.load()?;
    let has_time = match wall_time::job_end(&SlurmJob::detect()) {
        Ok(None) => true,
        Ok(Some(end)) => {
            let left = end.duration_since(SystemTime::now()).unwrap_or_default();
            // It starts, and saves in time before the limit.
            left.as_secs_f64() > 2.0 * plan.checkpoint.safety_seconds
        }
        Err(error) => {
            eprintln!("panglot: how much time the job has left is not known: {error:#}");
            true
        }
    };
    match Attempts::of(&plan.folders.run).ended(series, code, has_time)? {
        Verdict::Finished => Ok(()),
        Verdict::Again { here, after, why } => {
            eprintln!("panglot: {why}");
            if !after.is_zero() {
                eprintln!("panglot: it begins in {} s", after.as_secs());
                std::thread::sleep(after);
            }
            Err(Leave(if here { exit::AGAIN_HERE } else { exit::AGAIN_LATER }).into())
        }
        Verdict::Stop { code, why } => {
            eprintln!("panglot: {why}");
            Err(Leave(code).into())
        }
    }
}
