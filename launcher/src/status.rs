//! Where a run stands, from its files alone, so that a login node can follow a job that runs elsewhere. Besides metrics and
//! checkpoints these are `status/HOST.json`: one small file a host, renewed while its ranks run.

use std::fmt;
use std::fs;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, ensure};
use configs::Plan;
use nix::unistd::{SysconfVar, sysconf};
use serde::{Deserialize, Serialize};

use crate::attempts::{Attempt, Attempts, newest_step};
use crate::checkpoint::FOLDER;
use crate::checkpoint::manifest::{MANIFEST, step_name};
use crate::events::StepMetrics;
use crate::place::{self, Place};
use crate::rendezvous::sameness::printable;
use crate::{files, text};

/// Between two signs of life of a host.
const EVERY: Duration = Duration::from_secs(5);
/// A host that is silent for so long is gone, or its file system is.
const SILENT_SECONDS: f64 = 30.0;
/// Steps whose times give the pace.
const PACE_STEPS: usize = 20;
/// Of `metrics.jsonl` the end is read: a line of a run of 500 languages has some 20 kB.
const TAIL_BYTES: u64 = 2 << 20;

/// What a host's first rank writes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct HostSign {
    pub host: String,
    pub ranks: usize,
    /// Tells this launch's hosts from an earlier one's.
    pub launch: String,
    pub began: f64,
    pub unix_time: f64,
    /// Resident memory of the host's ranks, bytes.
    pub resident_bytes: u64,
    /// Processes that wanted to run, over the last minute.
    pub load: f64,
}

/// While it lives, a thread renews this host's sign.
pub struct Sign {
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
    file: PathBuf,
}

impl Sign {
    pub fn give(run: &Path, place: &Place) -> Sign {
        // A host's name is a file's name only as far as it is plain.
        let plain = |c: char| {
            if c.is_ascii_alphanumeric() || "-_.".contains(c) {
                c
            } else {
                '_'
            }
        };
        let name: String = place.node.chars().map(plain).collect();
        let file = run.join("status").join(format!("{name}.json"));
        let (stop, stopped) = mpsc::channel();
        let (place, to, began) = (place.clone(), file.clone(), now());
        let thread = std::thread::spawn(move || {
            loop {
                // Whoever cannot write here will fail where it matters; this is only for looking at.
                let _ = put(&to, &sign(&place, began));
                if stopped.recv_timeout(EVERY) != Err(RecvTimeoutError::Timeout) {
                    return;
                }
            }
        });
        Sign {
            stop: Some(stop),
            thread: Some(thread),
            file,
        }
    }
}

/// The host's ranks have ended, and it says nothing more.
impl Drop for Sign {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        let _ = fs::remove_file(&self.file);
    }
}

/// By rename, so that a reader sees it whole; not synced, since what a crash loses here is worth nothing.
fn put(file: &Path, sign: &HostSign) -> anyhow::Result<()> {
    fs::create_dir_all(file.parent().unwrap_or(Path::new(".")))?;
    let beside = files::beside(file, "partial");
    fs::write(&beside, serde_json::to_vec(sign)?)?;
    Ok(fs::rename(&beside, file)?)
}

fn sign(place: &Place, began: f64) -> HostSign {
    let load = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    HostSign {
        host: place.node.clone(),
        ranks: place.local_world,
        launch: place::launch_id(),
        began,
        unix_time: now(),
        resident_bytes: resident_of_ranks(),
        load: load
            .split_whitespace()
            .next()
            .and_then(|load| load.parse().ok())
            .unwrap_or(0.0),
    }
}

/// Of every worker below this process's own parent: the host's ranks are its children, or their launchers' children.
fn resident_of_ranks() -> u64 {
    let here = fs::read_link("/proc/self/ns/net").ok();
    let page = sysconf(SysconfVar::PAGE_SIZE).ok().flatten().unwrap_or(4096) as u64;
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let resident = processes.filter_map(|process| {
        let path = process.path();
        let name = fs::read_to_string(path.join("comm")).ok()?;
        let ours = name.trim() == "panglot-worker" && fs::read_link(path.join("ns/net")).ok() == here;
        let pages = fs::read_to_string(path.join("statm")).ok()?;
        let pages: u64 = pages.split_whitespace().nth(1)?.parse().ok()?;
        ours.then_some(pages * page)
    });
    resident.sum()
}

/// A run as its files show it.
#[derive(Clone, Debug, Serialize)]
pub struct Status {
    pub name: String,
    pub run: PathBuf,
    pub state: State,
    pub steps: u64,
    /// Steps taken.
    pub step: u64,
    pub loss: Option<f64>,
    /// Over the last twenty steps.
    pub tokens_per_second: Option<f64>,
    pub seconds_left: Option<f64>,
    pub seconds_since_step: Option<f64>,
    /// The newest whole checkpoint.
    pub checkpoint: Option<u64>,
    pub seconds_since_checkpoint: Option<f64>,
    pub hosts: Vec<HostSign>,
    pub attempts: Vec<Attempt>,
    /// When this was read.
    pub unix_time: f64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    NotStarted,
    Running,
    /// Hosts were at work, and have been silent for too long.
    Silent,
    Stopped,
    Finished,
}

impl Status {
    /// # Errors
    /// When there is no run in this folder.
    pub fn read(run: &Path) -> anyhow::Result<Status> {
        let plan: Plan = files::read_json(&run.join("plan.json"))
            .with_context(|| format!("{} holds no run yet", files::shown(run)))?;
        ensure!(plan.train.steps > 0, "{} has no steps", files::shown(run));
        let steps = last_steps(&run.join("metrics.jsonl"));
        let checkpoints = run.join(FOLDER);
        let checkpoint = newest_step(&checkpoints);
        let written = checkpoint.and_then(|step| {
            let manifest = checkpoints.join(step_name(step)).join(MANIFEST);
            let modified = fs::metadata(manifest).ok()?.modified().ok()?;
            Some(modified.duration_since(UNIX_EPOCH).ok()?.as_secs_f64())
        });
        let mut status = Status::of(&plan, &steps, signs(&run.join("status")), now());
        status.run = run.to_owned();
        status.checkpoint = checkpoint;
        status.seconds_since_checkpoint = written.map(|written| (status.unix_time - written).max(0.0));
        if checkpoint.is_some_and(|step| step >= plan.train.steps) {
            (status.state, status.seconds_left) = (State::Finished, None);
        }
        status.attempts = Attempts::of(run).all();
        Ok(status)
    }

    /// From the newest steps and the hosts' signs.
    fn of(plan: &Plan, steps: &[StepMetrics], mut hosts: Vec<HostSign>, now: f64) -> Status {
        // An attempt that was killed leaves its signs; the newest launch's are this one's.
        let newest = hosts
            .iter()
            .max_by(|a, b| a.began.total_cmp(&b.began))
            .map(|sign| sign.launch.clone());
        hosts.retain(|sign| Some(&sign.launch) == newest.as_ref());
        let last = steps.last();
        let recent = &steps[steps.len().saturating_sub(PACE_STEPS)..];
        let pace = median(recent.iter().map(|step| step.seconds).collect());
        let taken = last.map_or(0, |step| step.step + 1);
        let since = last.map(|step| (now - step.unix_time).max(0.0));
        let alive = hosts.iter().any(|sign| now - sign.unix_time < SILENT_SECONDS);
        // One process, or ranks of one mpirun, give no sign but their steps.
        let steps_come = since.zip(pace).is_some_and(|(since, pace)| since < 10.0 * pace + 5.0);
        let state = match () {
            () if alive || (hosts.is_empty() && steps_come) => State::Running,
            () if !hosts.is_empty() => State::Silent,
            () if taken == 0 => State::NotStarted,
            () => State::Stopped,
        };
        let left = plan.train.steps - taken.min(plan.train.steps);
        Status {
            name: plan.name.clone(),
            run: plan.folders.run.clone(),
            state,
            steps: plan.train.steps,
            step: taken,
            loss: last.map(|step| step.loss),
            tokens_per_second: pace.map(|pace| (plan.train.rows_per_step * plan.train.sequence_length) as f64 / pace),
            seconds_left: pace.filter(|_| left > 0).map(|pace| pace * left as f64),
            seconds_since_step: since,
            checkpoint: None,
            seconds_since_checkpoint: None,
            hosts,
            attempts: Vec::new(),
            unix_time: now,
        }
    }

    pub fn is_over(&self) -> bool {
        self.state == State::Finished
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let time = |seconds: f64| text::duration(Duration::try_from_secs_f64(seconds).unwrap_or_default());
        let state = match self.state {
            State::NotStarted => "not started",
            State::Running => "running",
            State::Silent => "silent: no host has given a sign for half a minute",
            State::Stopped => "stopped",
            State::Finished => "finished",
        };
        write!(
            f,
            "{}  {state}\nstep        {} of {}",
            self.name,
            text::count(self.step),
            text::count(self.steps)
        )?;
        write!(f, " ({:.1} %)", 100.0 * self.step as f64 / self.steps as f64)?;
        if let Some(loss) = self.loss {
            write!(f, ", loss {loss:.3}")?;
        }
        if let Some(since) = self.seconds_since_step {
            write!(f, ", {} ago", time(since))?;
        }
        if let Some(speed) = self.tokens_per_second {
            write!(f, "\nspeed       {} tokens/s", text::count(speed.round() as u64))?;
        }
        if let Some(left) = self.seconds_left {
            write!(f, ", {} left", time(left))?;
        }
        match (self.checkpoint, self.seconds_since_checkpoint) {
            (Some(step), Some(since)) => write!(f, "\ncheckpoint  step {}, {} ago", text::count(step), time(since))?,
            _ => write!(f, "\ncheckpoint  none yet")?,
        }
        if let Some(last) = self.attempts.last() {
            let before = text::counted(self.attempts.len(), "attempt");
            write!(
                f,
                "\nbefore      {before}; the last ended with {} at step {}",
                last.code,
                text::count(last.step)
            )?;
        }
        if self.hosts.is_empty() {
            return Ok(());
        }
        let row = |sign: &HostSign| {
            let silent = self.unix_time - sign.unix_time;
            let seen = format!(
                "{} ago{}",
                time(silent.max(0.0)),
                if silent > SILENT_SECONDS { " (!)" } else { "" }
            );
            let memory = text::bytes(sign.resident_bytes);
            vec![
                printable(&sign.host),
                sign.ranks.to_string(),
                seen,
                memory,
                format!("{:.2}", sign.load),
            ]
        };
        let rows = self.hosts.iter().map(row);
        write!(
            f,
            "\n{}",
            text::table(&["host", "ranks", "seen", "memory", "load"], rows)
        )
    }
}

/// The last lines that are whole. What is not a step's line is passed over: another rank may be writing the last one.
fn last_steps(file: &Path) -> Vec<StepMetrics> {
    let read = || -> std::io::Result<Vec<u8>> {
        let mut file = fs::File::open(file)?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(TAIL_BYTES)))?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    let bytes = read().unwrap_or_default();
    bytes
        .split(|byte| *byte == b'\n')
        .filter_map(|line| serde_json::from_slice(line).ok())
        .collect()
}

fn signs(folder: &Path) -> Vec<HostSign> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let paths = entries.map(|entry| entry.path());
    // Not those that are being written.
    let whole = paths.filter(|path| path.extension().is_some_and(|extension| extension == "json"));
    let mut signs: Vec<HostSign> = whole.filter_map(|path| files::read_json(&path).ok()).collect();
    signs.sort_by(|a, b| a.host.cmp(&b.host));
    signs
}

fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied()
}

fn now() -> f64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs_f64()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan() -> Plan {
        let recipe = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs/tiny.yaml");
        configs::load(&recipe, &[]).unwrap()
    }

    fn step(step: u64, seconds: f64, unix_time: f64) -> StepMetrics {
        serde_json::from_value(serde_json::json!({
            "step": step, "steps": 20, "loss": 10.0 - step as f64, "grad_norm": 1.0, "skipped": false, "lr": {}, "targets": 1,
            "targets_so_far": 1, "seconds": seconds, "tokens_per_second": 1.0, "resident_bytes": 1, "rows_digest": "",
            "languages": {}, "unix_time": unix_time
        }))
        .unwrap()
    }

    fn sign(host: &str, launch: &str, began: f64, unix_time: f64) -> HostSign {
        let (host, launch) = (host.to_owned(), launch.to_owned());
        HostSign {
            host,
            ranks: 2,
            launch,
            began,
            unix_time,
            resident_bytes: 3 << 30,
            load: 2.0,
        }
    }

    #[test]
    fn a_running_run_is_shown_with_its_pace_and_its_hosts() {
        let steps: Vec<_> = (0..8)
            .map(|i| step(i, if i == 0 { 60.0 } else { 2.0 }, 1000.0 + i as f64))
            .collect();
        let hosts = vec![
            sign("n1", "7.0", 990.0, 1005.0),
            sign("n2", "7.0", 990.0, 970.0),
            sign("n9", "6.0", 1.0, 900.0),
        ];
        let status = Status::of(&plan(), &steps, hosts, 1010.0);
        assert_eq!(
            (status.state, status.step, status.seconds_left),
            (State::Running, 8, Some(24.0))
        );
        let said = status.to_string();
        for expected in [
            "tiny  running\nstep        8 of 20 (40.0 %), loss 3.000, 3.0 s ago",
            "speed       384 tokens/s, 24 s left",
            "checkpoint  none yet",
            "40 s ago (!)",
            "3.0 GiB",
        ] {
            assert!(said.contains(expected), "{said}\nlacks {expected}");
        }
        assert!(!said.contains("n9"), "an earlier launch's: {said}");
    }

    #[test]
    fn silence_is_told_from_an_end() {
        let steps = [step(0, 2.0, 1000.0)];
        let state = |steps: &[StepMetrics], hosts, now| Status::of(&plan(), steps, hosts, now).state;
        assert_eq!(state(&[], vec![], 1000.0), State::NotStarted);
        assert_eq!(
            state(&[], vec![sign("n1", "7", 1.0, 999.0)], 1000.0),
            State::Running,
            "it loads"
        );
        assert_eq!(state(&steps, vec![sign("n1", "7", 1.0, 999.0)], 1100.0), State::Silent);
        assert_eq!(state(&steps, vec![], 1100.0), State::Stopped);
        assert_eq!(
            state(&steps, vec![], 1003.0),
            State::Running,
            "one process gives no signs"
        );
        assert_eq!(
            state(&[step(19, 2.0, 1000.0)], vec![], 1e6),
            State::Stopped,
            "the last step is not what finishes a run: its checkpoint is"
        );
    }

    #[test]
    fn a_host_gives_signs_while_it_lives() {
        let run = tempfile::tempdir().unwrap();
        let place = Place {
            node: "n1".to_owned(),
            ..Place::detect().unwrap()
        };
        let sign = Sign::give(run.path(), &place);
        let file = run.path().join("status/n1.json");
        for _ in 0..100 {
            if file.is_file() {
                break;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        assert_eq!(signs(&run.path().join("status"))[0].host, "n1");
        drop(sign);
        assert!(!file.exists());
    }
}
