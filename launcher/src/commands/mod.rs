//! One file a subcommand; here what they share.

pub mod checkpoint;
pub mod demo;
pub mod doctor;
pub mod eval;
pub mod export;
pub mod generate;
pub mod job;
pub mod measured;
pub mod model;
pub mod plan;
pub mod report;
pub mod rows;
pub mod scale;
pub mod stage;
pub mod status;
pub mod submit;
pub mod train;
pub mod verify_resume;

use std::path::{Path, PathBuf};

use configs::Plan;
use nix::sys::signal::Signal;
use serde::Serialize;

use launcher::events::Event;
use launcher::exit;
use launcher::place::Place;
use launcher::supervise::{Ended, supervise};
use launcher::view::View;
use launcher::worker::{Job, Worker};

/// What holds for every subcommand.
pub struct App {
    pub json: bool,
    pub worker: Option<PathBuf>,
}

#[derive(Debug, clap::Args)]
pub struct ConfigArgs {
    /// The config, a YAML file
    pub config: PathBuf,
    /// Settings for this time only, such as train.steps=5
    #[arg(value_name = "KEY=VALUE")]
    pub overrides: Vec<String>,
}

impl ConfigArgs {
    /// For what starts no training.
    pub fn load(&self) -> anyhow::Result<Plan> {
        Ok(configs::load_for_any_ranks(&self.config, &self.overrides)?)
    }

    /// For training by `launch.ranks`.
    pub fn load_to_train(&self, more: Option<String>) -> anyhow::Result<Plan> {
        let overrides: Vec<_> = self.overrides.iter().cloned().chain(more).collect();
        Ok(configs::load(&self.config, &overrides)?)
    }
}

/// Of a command that starts its own ranks, or none: as every rank of a job it would do the same work many times, in one folder.
pub fn once(command: &str) -> anyhow::Result<()> {
    match Place::detect() {
        Ok(place) if place.is_rank_of_many() => anyhow::bail!(
            "this is {place}, but `panglot {command}` is started once and starts its ranks itself; leave srun and mpirun out, or \
             use srun --ntasks=1"
        ),
        _ => Ok(()),
    }
}

/// A worker ended with another code than 0; it has said why on standard error.
#[derive(Debug, thiserror::Error)]
#[error("{what} ended with exit code {code}: {}", meaning(*code))]
pub struct Failed {
    pub what: &'static str,
    pub code: i32,
}

/// All is said: leave with this code.
#[derive(Debug, thiserror::Error)]
#[error("exit code {0}")]
pub struct Leave(pub i32);

/// What the process leaves with.
pub fn code_of(error: &anyhow::Error) -> i32 {
    if let Some(Leave(code)) = error.downcast_ref() {
        return *code;
    }
    if let Some(failed) = error.downcast_ref::<Failed>() {
        return failed.code;
    }
    if error.is::<verify_resume::Differs>() {
        return exit::INTERNAL;
    }
    let is = |kind: fn(&std::io::Error) -> bool| error.chain().any(|cause| cause.downcast_ref().is_some_and(kind));
    // A file that is not there was named wrongly; one that cannot be read or written is the machine's matter.
    let files = is(|error| error.kind() != std::io::ErrorKind::NotFound) && !error.is::<configs::ConfigError>();
    if files { exit::IO } else { exit::USER }
}

fn meaning(code: i32) -> &'static str {
    match code {
        exit::USER => "the config or its files do not fit, see above",
        exit::IO => "files could not be read or written, see above",
        exit::MORE_TIME => "a checkpoint is written; the same command goes on from it",
        exit::REFUSED => "the ranks could not start together, see above",
        exit::PEER => "a rank was lost; the same command goes on from the newest checkpoint",
        127 => "the program could not be started",
        137 => {
            "a rank was killed, for example because memory ran out; the same command goes on from the newest checkpoint"
        }
        129.. => "it was ended by a signal; the same command goes on from the newest checkpoint",
        _ => "see above; the run's logs have more",
    }
}

impl App {
    pub fn worker(&self) -> anyhow::Result<Worker> {
        Ok(Worker::find(self.worker.as_deref())?)
    }

    /// The result: for a program if `--json`, else for a person.
    pub fn print(&self, result: &impl Serialize, for_people: impl FnOnce() -> String) -> anyhow::Result<()> {
        if self.json {
            println!("{}", serde_json::to_string_pretty(result)?);
        } else {
            println!("{}", for_people());
        }
        Ok(())
    }
}

/// Runs a job to its end under `view`; any exit code but 0 is an error.
pub fn finish(what: &'static str, job: &Job, view: &mut View) -> anyhow::Result<Ended> {
    let ended = watch(job, view, &mut |_| None)?;
    if ended.code == exit::FINISHED {
        Ok(ended)
    } else {
        Err(Failed { what, code: ended.code }.into())
    }
}

/// Runs a job to its end under `view`, whatever its exit code; `also` may answer events with signals.
pub fn watch(job: &Job, view: &mut View, also: &mut dyn FnMut(&Event) -> Option<Signal>) -> anyhow::Result<Ended> {
    let ended = supervise(job, &mut |event| {
        view.show(event);
        also(event)
    });
    view.finish();
    Ok(ended?)
}

/// Where a run leaves its parts.
pub struct RunFolder<'a>(pub &'a Path);

impl RunFolder<'_> {
    pub fn plan(&self) -> PathBuf {
        self.0.join("plan.json")
    }

    pub fn evaluation(&self, name: &str) -> PathBuf {
        self.0.join("evaluations").join(format!("{name}.json"))
    }

    pub fn merged(&self) -> PathBuf {
        self.0.join("exports/merged")
    }

    pub fn adapter(&self) -> PathBuf {
        self.0.join("exports/adapter")
    }

    pub fn report(&self) -> PathBuf {
        self.0.join("report.html")
    }
}
