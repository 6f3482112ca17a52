//! What became of a run, by the clock: `history.jsonl` in its folder. Rank 0 adds a line when it begins, when a checkpoint
//! is on disk or could not be written, and when it ends; an attempt that was killed leaves no end.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::Context;
use serde::{Deserialize, Serialize};

use crate::checkpoint::commit::unix_time;
use crate::place::{Place, Surroundings};
use crate::rendezvous::sameness;

/// One line.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Happening {
    pub unix_time: f64,
    #[serde(flatten)]
    pub what: What,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "what", rename_all = "snake_case")]
pub enum What {
    /// The ranks are ready; the next step is `step`.
    Began {
        step: u64,
        environment: Environment,
    },
    /// The state after `step` steps survives from now on.
    Saved {
        step: u64,
        bytes: u64,
        files: usize,
        /// From the step's end until now.
        seconds: f64,
        /// What training waited of that.
        stall: f64,
    },
    NotSaved {
        step: u64,
        why: String,
    },
    /// Ranks that each have all master weights held different ones, and no majority says whose are right.
    Differed(Dispute),
    /// That step was reached again.
    Settled {
        step: u64,
        text: String,
    },
    /// After `step` steps, of its own will.
    Ended {
        step: u64,
    },
}

/// Whose master weights are right?
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Dispute {
    /// The first step that ranks began with different ones.
    pub step: u64,
    /// By rank: the digest of what it began it with.
    pub masters: Vec<u64>,
    pub nodes: Vec<String>,
}

/// What rank 0 knows of where it runs.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Environment {
    pub panglot: String,
    pub host: String,
    /// The scheduler's name of the job; "local" without one.
    pub job: String,
    pub ranks: usize,
    pub ranks_on_this_host: usize,
    /// What carries collectives.
    pub engine: String,
    pub device: String,
    pub processor: String,
    pub cores: usize,
    /// Of the host.
    pub memory_bytes: u64,
    pub kernel: String,
    /// (what, which) of those that matter.
    pub libraries: Vec<(String, String)>,
}

impl Environment {
    /// Of the process that asks. What cannot be found out is left empty: this is only for looking at.
    pub fn here(ranks: usize, engine: String, device: String) -> Environment {
        let place = Place::detect().ok();
        let text_of = |file: &str| fs::read_to_string(file).unwrap_or_default().trim().to_owned();
        Environment {
            panglot: env!("CARGO_PKG_VERSION").to_owned(),
            host: place.as_ref().map(|place| place.node.clone()).unwrap_or_default(),
            job: Surroundings::detect().map(|around| around.job).unwrap_or_default(),
            ranks,
            ranks_on_this_host: place.map_or(ranks, |place| place.local_world),
            engine,
            device,
            processor: line_of("/proc/cpuinfo", "model name").unwrap_or_default(),
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            memory_bytes: line_of("/proc/meminfo", "MemTotal")
                .and_then(|kib| kib.strip_suffix(" kB")?.trim().parse::<u64>().ok())
                .unwrap_or(0)
                * 1024,
            kernel: text_of("/proc/sys/kernel/osrelease"),
            libraries: sameness::loaded(&["libtorch_cpu.so", "libtorch_cuda.so", "libmpi.so", "libnccl.so"]),
        }
    }
}

/// The value of the first `name: value` in one of the kernel's tables.
fn line_of(file: &str, name: &str) -> Option<String> {
    let text = fs::read_to_string(file).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    Some(line.trim_start().strip_prefix(':')?.trim().to_owned())
}

/// A run's history.
pub struct History(PathBuf);

impl History {
    pub fn of(run: &Path) -> History {
        History(run.join("history.jsonl"))
    }

    /// Adds a line, now. One write, so that lines of two attempts never mix.
    pub fn note(&self, what: What) -> anyhow::Result<()> {
        let happening = Happening {
            unix_time: unix_time(),
            what,
        };
        let mut line = serde_json::to_string(&happening)?;
        line.push('\n');
        let append = || {
            fs::create_dir_all(self.0.parent().unwrap_or(Path::new(".")))?;
            let mut file = OpenOptions::new().create(true).append(true).open(&self.0)?;
            file.write_all(line.as_bytes())
        };
        append().with_context(|| format!("cannot write {}", self.0.display()))
    }

    /// Oldest first; lines that are not whole are passed over.
    pub fn all(&self) -> Vec<Happening> {
        let text = fs::read_to_string(&self.0).unwrap_or_default();
        text.lines()
            .filter_map(|line| serde_json::from_str(line).ok())
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_come_back_and_a_torn_one_is_passed_over() {
        let folder = tempfile::tempdir().unwrap();
        let history = History::of(&folder.path().join("run"));
        let environment = Environment::here(2, "solo".to_owned(), "cpu".to_owned());
        assert!(environment.memory_bytes > 1 << 20 && !environment.host.is_empty());
        let saved = What::Saved {
            step: 5,
            bytes: 1000,
            files: 1,
            seconds: 0.5,
            stall: 0.1,
        };
        for what in [What::Began { step: 0, environment }, saved, What::Ended { step: 5 }] {
            history.note(what).unwrap();
        }
        let file = folder.path().join("run/history.jsonl");
        let torn = fs::read_to_string(&file).unwrap() + "{\"unix_time\":1,\"what\":\"en";
        fs::write(&file, torn).unwrap();
        let all = history.all();
        assert_eq!(all.len(), 3);
        assert!(matches!(&all[0].what, What::Began { step: 0, environment } if environment.ranks == 2));
        assert_eq!(all[2].what, What::Ended { step: 5 });
    }
}
