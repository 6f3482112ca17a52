//! What the benchmarks share: a side run as a process of its own, its report, and the file of results. Training steps have a
//! module of their own.

pub mod training;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// What one side reports.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Report {
    pub seconds: f64,
    #[serde(default)]
    pub peak_bytes: u64,
    #[serde(flatten)]
    pub more: serde_json::Map<String, Value>,
}

/// Runs one side; its last line is its report.
pub fn run(command: &mut Command) -> Result<Report> {
    let output = command.output().with_context(|| format!("cannot run {command:?}"))?;
    let said = String::from_utf8_lossy(&output.stdout);
    if !output.status.success() {
        bail!("{command:?} failed: {}", String::from_utf8_lossy(&output.stderr));
    }
    let report: Report = serde_json::from_str(said.lines().last().unwrap_or_default())?;
    eprintln!(
        "  {} → {:.3} s",
        command.get_args().next().unwrap_or_default().display(),
        report.seconds
    );
    Ok(report)
}

/// A side's report; its peak memory is noted when it ends.
pub fn report(seconds: f64, more: Value) -> Result<Report> {
    let more = serde_json::from_value(more)?;
    Ok(Report {
        seconds,
        peak_bytes: 0,
        more,
    })
}

/// The most memory this process ever had, in bytes.
pub fn peak_bytes() -> Result<u64> {
    peak_of("self").context("the kernel does not say VmHWM")
}

/// The largest peak of resident memory among a process and those it started, in bytes.
pub fn peak_below(process: u32) -> u64 {
    let children = fs::read_to_string(format!("/proc/{process}/task/{process}/children")).unwrap_or_default();
    let below = children
        .split_whitespace()
        .filter_map(|child| child.parse().ok())
        .map(peak_below);
    let own = peak_of(&process.to_string()).unwrap_or(0);
    below.max().unwrap_or(0).max(own)
}

fn peak_of(process: &str) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{process}/status")).ok()?;
    let kib = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(kib.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok()? * 1024)
}

/// Runs a program of bench/peers.
pub fn peer(python: &Path, name: &str, arguments: &[&str]) -> Result<Report> {
    run(Command::new(python).arg(script(name)).args(arguments))
}

/// A program of bench/peers.
pub fn script(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("peers").join(name)
}

pub fn text_of(path: &Path) -> Result<&str> {
    path.to_str()
        .with_context(|| format!("{} is not UTF-8", path.display()))
}

/// One line of the results.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Entry {
    name: String,
    ours: f64,
    peer: f64,
    /// How many times better ours is; `None` beside nothing.
    ratio: Option<f64>,
    unit: String,
    #[serde(default)]
    peer_is: String,
    /// What cannot be beaten, in the same unit, and what it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    floor: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    floor_is: Option<String>,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    note: String,
}

impl Entry {
    /// The ratio is above 1 where ours is better: more of what is per second and of a share, less of anything else.
    pub fn of(name: &str, ours: f64, peer: f64, unit: &str) -> Entry {
        let less_is_better = !unit.ends_with("/s") && !unit.starts_with("share");
        Entry {
            name: name.to_owned(),
            ours,
            peer,
            ratio: Some(if less_is_better { peer / ours } else { ours / peer }).filter(|ratio| ratio.is_finite()),
            unit: unit.to_owned(),
            peer_is: String::new(),
            floor: None,
            floor_is: None,
            note: String::new(),
        }
    }

    pub fn peer_is(mut self, peer_is: &str) -> Entry {
        self.peer_is = peer_is.to_owned();
        self
    }

    pub fn floor(mut self, floor: f64, floor_is: &str) -> Entry {
        (self.floor, self.floor_is) = (Some(floor), Some(floor_is.to_owned()));
        self
    }

    pub fn note(mut self, note: String) -> Entry {
        self.note = note;
        self
    }
}

/// The results file; an entry measured again replaces the old one.
pub struct Results {
    path: PathBuf,
    entries: Vec<Entry>,
}

impl Results {
    pub fn open(path: &Path) -> Result<Results> {
        let entries = match fs::read(path) {
            Ok(bytes) => serde_json::from_slice(&bytes).with_context(|| format!("{} is not ours", path.display()))?,
            Err(_) => Vec::new(),
        };
        Ok(Results {
            path: path.to_path_buf(),
            entries,
        })
    }

    /// Written at once: a long run that is cut off keeps what it has.
    pub fn put(&mut self, entry: Entry) -> Result<()> {
        eprintln!(
            "{}: ours {:.4}, peer {:.4} {}",
            entry.name, entry.ours, entry.peer, entry.unit
        );
        match self.entries.iter_mut().find(|old| old.name == entry.name) {
            Some(old) => *old = entry,
            None => self.entries.push(entry),
        }
        if let Some(folder) = self.path.parent() {
            fs::create_dir_all(folder)?;
        }
        let beside = self.path.with_extension("json.partial");
        fs::write(&beside, serde_json::to_string_pretty(&self.entries)? + "\n")?;
        Ok(fs::rename(&beside, &self.path)?)
    }

    pub fn print(&self) {
        println!(
            "{:<18}{:>14}{:>14}{:>9}{:>14}  unit",
            "", "ours", "peer", "ratio", "floor"
        );
        for entry in &self.entries {
            let floor = entry.floor.map_or(String::new(), |floor| format!("{floor:.3}"));
            let ratio = entry.ratio.map_or("—".to_owned(), |ratio| format!("{ratio:.2}×"));
            println!(
                "{:<18}{:>14.3}{:>14.3}{:>9}{:>14}  {}",
                entry.name, entry.ours, entry.peer, ratio, floor, entry.unit
            );
        }
    }
}

/// The middle of what the rounds report.
pub fn median(reports: &[Report], of: impl Fn(&Report) -> f64) -> f64 {
    middle(reports.iter().map(of).collect())
}

/// The median; NaN of nothing.
pub fn middle(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    match values.len() {
        0 => f64::NAN,
        n => (values[(n - 1) / 2] + values[n / 2]) / 2.0,
    }
}

/// The numbers that a report lists as `key`; none where it does not say.
pub fn numbers(report: &Report, key: &str) -> Vec<f64> {
    let values = report.more.get(key).and_then(Value::as_array);
    values.map_or(Vec::new(), |values| values.iter().filter_map(Value::as_f64).collect())
}

/// What a report calls `key`; NaN where it does not say.
pub fn number(report: &Report, key: &str) -> f64 {
    report.more.get(key).and_then(Value::as_f64).unwrap_or(f64::NAN)
}
