//! Training steps, measured: our program as a user starts it, on bench/model.yaml with a case's overrides, and what a side's
//! steps took.

use std::fs::{self, File};
use std::io::{Read, Seek};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::{Report, middle, numbers, peak_below, script, text_of};

/// LoRA's targets on both sides.
pub const LINEARS: [&str; 7] = [
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
];
/// SmolLM2's matrices in the layers, width and pieces; FLOP and bytes follow from them.
pub const BODY: f64 = 106_168_320.0;
pub const WIDTH: f64 = 576.0;
pub const PIECES: f64 = 49_152.0;

/// `panglot` beside this program, on bench/model.yaml, with all that it writes in `folder`.
pub struct Panglot {
    pub folder: PathBuf,
}

impl Panglot {
    /// Overrides that every case has. `prepared` names the folder of what is prepared of this base.
    pub fn overrides(&self, prepared: &str, base: &Path) -> Result<Vec<String>> {
        Ok(vec![
            format!("folders.prepared={}", text_of(&self.folder.join(prepared))?),
            format!("folders.run={}", text_of(&self.folder.join("run"))?),
            format!("model.path={}", text_of(base)?),
        ])
    }

    /// Corpus, vocabulary and tokens.
    pub fn prepare(&self, overrides: &[String]) -> Result<()> {
        let prepare = spawn(Command::new(self.program()?).args(self.words("prepare", overrides)?))?;
        watch(prepare, || Ok(())).map(drop)
    }

    /// A file of the rows that a run's first steps read, for the peer: ids, a list a row.
    pub fn rows(&self, overrides: &[String], count: usize) -> Result<PathBuf> {
        let mut command = Command::new(self.program()?);
        command.args(self.words("rows", overrides)?);
        let output = command.args(["--count", &count.to_string()]).output()?;
        ensure!(
            output.status.success(),
            "panglot rows: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        let mut shown: Value = serde_json::from_slice(&output.stdout)?;
        let rows = shown["rows"].as_array_mut().context("panglot rows printed none")?;
        let rows: Vec<Value> = rows.iter_mut().map(|row| row["tokens"].take()).collect();
        let file = self.folder.join("rows.json");
        fs::write(&file, serde_json::to_vec(&rows)?)?;
        Ok(file)
    }

    /// A run from its first step, started by `through` and its words where that is not empty.
    pub fn train(&self, through: &[String], overrides: &[String]) -> Result<Side> {
        self.train_seen(through, overrides, |_| Ok(()))
    }

    /// The same, with `see` looking into the run's folder many times a second.
    pub fn train_seen(
        &self,
        through: &[String],
        overrides: &[String],
        mut see: impl FnMut(&Path) -> Result<()>,
    ) -> Result<Side> {
        let run = self.folder.join("run");
        let _ = fs::remove_dir_all(&run);
        let peak_bytes = watch(self.start(through, overrides)?, || see(&run))?;
        Side::of_run(&run, peak_bytes)
    }

    /// So many runs at the same time, each alone in a folder of its own.
    pub fn train_at_once(&self, runs: usize, overrides: &[String]) -> Result<Vec<Side>> {
        let folders: Vec<PathBuf> = (0..runs)
            .map(|index| self.folder.join(format!("run-{index}")))
            .collect();
        let start = |folder: &PathBuf| {
            let _ = fs::remove_dir_all(folder);
            // The last of two overrides holds.
            let own = [overrides, &[format!("folders.run={}", text_of(folder)?)]].concat();
            self.start(&[], &own)
        };
        let started: Vec<Started> = folders.iter().map(start).collect::<Result<_>>()?;
        let sides = started.into_iter().zip(&folders);
        sides
            .map(|(run, folder)| Side::of_run(folder, watch(run, || Ok(()))?))
            .collect()
    }

    fn start(&self, through: &[String], overrides: &[String]) -> Result<Started> {
        let mut command = match through.split_first() {
            None => Command::new(self.program()?),
            Some((first, words)) => {
                let mut command = Command::new(first);
                command.args(words).arg(self.program()?);
                command
            }
        };
        spawn(command.args(self.words("train", overrides)?))
    }

    fn program(&self) -> Result<PathBuf> {
        Ok(std::env::current_exe()?.with_file_name("panglot"))
    }

    fn words(&self, command: &str, overrides: &[String]) -> Result<Vec<String>> {
        let config = Path::new(env!("CARGO_MANIFEST_DIR")).join("model.yaml");
        let words = [command, text_of(&config)?, "--json"].map(String::from);
        Ok([&words[..], overrides].concat())
    }
}

/// A base cut loose from its tied head, with so many pieces.
pub fn grow(python: &Path, base: &Path, to: &Path, pieces: usize) -> Result<()> {
    if to.is_dir() {
        return Ok(());
    }
    let mut command = Command::new(python);
    command
        .arg(script("grow_model.py"))
        .args([base, to])
        .arg(pieces.to_string());
    ensure!(command.status()?.success(), "grow_model.py failed");
    Ok(())
}

/// One side's steps in one round; the first, which warms up, does not count.
pub struct Side {
    pub seconds: Vec<f64>,
    /// Of the first step and of the last.
    pub losses: [f64; 2],
    /// The largest process's.
    pub peak_bytes: f64,
    /// In the last step, by the rank that sent most.
    pub bytes_sent: f64,
}

impl Side {
    fn of_run(run: &Path, peak_bytes: u64) -> Result<Side> {
        let metrics = fs::read_to_string(run.join("metrics.jsonl")).context("the worker wrote no metrics")?;
        let lines: Vec<Value> = metrics.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
        let of = |line: Option<&Value>, key: &str| line.and_then(|line| line[key].as_f64()).unwrap_or(f64::NAN);
        let seconds = lines.iter().skip(1).filter_map(|line| line["seconds"].as_f64());
        let side = Side {
            seconds: seconds.collect(),
            losses: [of(lines.first(), "loss"), of(lines.last(), "loss")],
            peak_bytes: peak_bytes as f64,
            bytes_sent: of(lines.last(), "bytes_sent"),
        };
        eprintln!("  ours {:?} s", side.seconds);
        Ok(side)
    }

    /// Of a peer whose first step warms up.
    pub fn of_training(report: &Report) -> Side {
        let mut seconds = numbers(report, "steps");
        seconds.remove(0);
        let losses = numbers(report, "losses");
        let of = |loss: Option<&f64>| loss.copied().unwrap_or(f64::NAN);
        let side = Side {
            seconds,
            losses: [of(losses.first()), of(losses.last())],
            peak_bytes: report.peak_bytes as f64,
            bytes_sent: f64::NAN,
        };
        eprintln!("  peer {:?} s", side.seconds);
        side
    }

    /// Of a report whose every step counts.
    pub fn of(report: &Report) -> Side {
        Side {
            seconds: numbers(report, "steps"),
            losses: [f64::NAN; 2],
            peak_bytes: report.peak_bytes as f64,
            bytes_sent: f64::NAN,
        }
    }
}

/// One side's rounds.
#[derive(Default)]
pub struct Sides {
    pub steps: Vec<f64>,
    pub losses: [f64; 2],
    /// The largest.
    pub peak_bytes: f64,
    pub bytes_sent: f64,
}

impl Sides {
    pub fn add(&mut self, side: Side) {
        self.steps.extend(side.seconds);
        self.losses = side.losses;
        self.peak_bytes = self.peak_bytes.max(side.peak_bytes);
        self.bytes_sent = side.bytes_sent;
    }

    /// The median step's.
    pub fn seconds(&self) -> f64 {
        middle(self.steps.clone())
    }
}

/// # Errors
/// Where the losses of the first step say that the sides do not do the same work.
pub fn ensure_alike(name: &str, ours: &Sides, peers: &Sides) -> Result<()> {
    let [first, peers_first] = [ours, peers].map(|side| side.losses[0]);
    ensure!(
        (first - peers_first).abs() < 0.01 * first,
        "{name}: the same rows and weights have losses of {first} and {peers_first}: the sides do not do the same work"
    );
    Ok(())
}

/// A program of ours that runs.
struct Started {
    child: Child,
    /// Where its errors go.
    errors: File,
}

fn spawn(command: &mut Command) -> Result<Started> {
    let errors = tempfile::tempfile()?;
    let child = command.stdout(Stdio::null()).stderr(errors.try_clone()?).spawn();
    let child = child.with_context(|| format!("cannot run {command:?}"))?;
    Ok(Started { child, errors })
}

impl Started {
    /// # Errors
    /// When it has ended badly: what it said.
    fn has_ended(&mut self) -> Result<bool> {
        let Some(status) = self.child.try_wait()? else {
            return Ok(false);
        };
        let mut said = String::new();
        self.errors.rewind()?;
        self.errors.read_to_string(&mut said)?;
        ensure!(status.success(), "panglot ended with {status}:\n{said}");
        Ok(true)
    }
}

/// Of the steps that a run has written whole lines of.
pub fn step_seconds(run: &Path) -> Vec<f64> {
    let metrics = fs::read_to_string(run.join("metrics.jsonl")).unwrap_or_default();
    let lines = metrics.lines().filter_map(|line| serde_json::from_str(line).ok());
    lines.filter_map(|line: Value| line["seconds"].as_f64()).collect()
}

/// Waits for a process, with `see` looking on; returns the most memory that it or one below it ever had, in bytes.
fn watch(mut run: Started, mut see: impl FnMut() -> Result<()>) -> Result<u64> {
    let mut peak = 0;
    loop {
        see()?;
        // What is seen last before the end is all there is: the mark never falls.
        peak = peak.max(peak_below(run.child.id()));
        if run.has_ended()? {
            return Ok(peak);
        }
        thread::sleep(Duration::from_millis(10));
    }
}
