//! Figures of a job's life, into `bench/results/cluster.json`: runs the tests that measure them on real processes and collects
//! the lines that they print, a name and a number each. Of what was measured several times the worst is written.
//!
//!   bench_cluster [TEST …]      such as `rendezvous`; all of `TESTS` if left out

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

const RESULTS: &str = "bench/results/cluster.json";

/// Test programs, and what they are told besides.
const TESTS: [(&str, &[&str]); 3] = [
    ("rendezvous", &[]),
    ("lost", &[]),
    ("cluster", &["--ignored", "--exact", "soak::figures"]),
];

/// What may be printed, and its unit. Less is better in all of them.
const FIGURES: [(&str, &str); 8] = [
    ("dead_rank_noticed_s", "s"),
    ("all_stopped_s", "s"),
    ("orphans", "processes"),
    ("hang_named_s", "s"),
    ("strangers_accepted", "connections"),
    ("rendezvous_512_s", "s"),
    ("sbatch_to_first_step_s", "s"),
    ("recovered_s", "s"),
];

fn main() -> Result<()> {
    let asked: Vec<String> = std::env::args().skip(1).collect();
    let mut measured: BTreeMap<String, Vec<f64>> = BTreeMap::new();
    for (test, more) in TESTS {
        if !asked.is_empty() && !asked.iter().any(|name| name == test) {
            continue;
        }
        let mut command = Command::new("cargo");
        // Of the whole workspace, whose features are those that everything is built with already.
        command.args(["test", "--release", "--locked", "--workspace", "--test", test, "--"]);
        // One at a time: what is measured is a job's reaction, not that of several side by side.
        command.args(["--nocapture", "--test-threads=1"]).args(more);
        let running = command.stdout(Stdio::piped()).spawn();
        let mut running = running.with_context(|| format!("cannot run {command:?}"))?;
        let said = BufReader::new(running.stdout.take().expect("a pipe"));
        for line in said.lines() {
            let line = line?;
            println!("{line}");
            if let Some((name, value)) = figure(&line) {
                measured.entry(name.to_owned()).or_default().push(value);
            }
        }
        ensure!(running.wait()?.success(), "{command:?} failed");
    }
    put(&measured)
}

/// "NAME NUMBER", also behind the name of a test that libtest has not ended with a line.
fn figure(line: &str) -> Option<(&'static str, f64)> {
    let line = line.rsplit("... ").next().unwrap_or(line);
    let mut words = line.split_whitespace();
    let name = words.next()?;
    let (name, _) = FIGURES.iter().find(|(known, _)| *known == name)?;
    Some((name, words.next()?.parse().ok()?))
}

/// A figure that was measured again replaces the old one; the others stay.
fn put(measured: &BTreeMap<String, Vec<f64>>) -> Result<()> {
    let path = Path::new(RESULTS);
    let mut entries: Vec<Value> = match fs::read(path) {
        Ok(bytes) => serde_json::from_slice(&bytes).with_context(|| format!("{RESULTS} is not ours"))?,
        Err(_) => Vec::new(),
    };
    for (name, unit) in FIGURES {
        let Some(values) = measured.get(name) else { continue };
        let worst = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        println!("{name:<24}{worst:>10.3} {unit}, the worst of {}", values.len());
        let entry = json!({ "name": name, "ours": worst, "unit": unit, "measured": values.len() });
        match entries.iter_mut().find(|old| old["name"] == name) {
            Some(old) => *old = entry,
            None => entries.push(entry),
        }
    }
    let beside = path.with_extension("json.partial");
    fs::write(&beside, serde_json::to_string_pretty(&entries)? + "\n")?;
    Ok(fs::rename(&beside, path)?)
}
