//! `panglot job`: what a job script asks before and after its ranks. People need it only in scripts of their own.

use super::{App, ConfigArgs, Leave};
use launcher::attempts::{Attempts, Verdict, newest_step};
use launcher::checkpoint::FOLDER;
use launcher::exit;

#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// Succeeds if nothing is left of the run; clears what ranks of an earlier attempt left
    IsFinished(ConfigArgs),
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

fn ended(config: &ConfigArgs, code: i32, series: &str) -> anyhow::Result<()> {
    let plan = config.load()?;
    match Attempts::of(&plan.folders.run).ended(series, code)? {
        Verdict::Finished => Ok(()),
        Verdict::Again { here, why } => {
            eprintln!("panglot: {why}");
            Err(Leave(if here { exit::AGAIN_HERE } else { exit::AGAIN_LATER }).into())
        }
        Verdict::Stop { code, why } => {
            eprintln!("panglot: {why}");
            Err(Leave(code).into())
        }
    }
}
