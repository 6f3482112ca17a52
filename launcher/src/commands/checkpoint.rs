//! `panglot checkpoint`: a run's checkpoints listed, verified, shown, recut, removed. Starts no worker: it runs at once, on a
//! login node, beside a run that goes on.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::Subcommand;
use serde::Serialize;
use serde_json::json;

use super::App;
use launcher::checkpoint::commit::unix_time;
use launcher::checkpoint::read::{check_listing, leftovers, list};
use launcher::checkpoint::{FOLDER, Keep, Manifest, newest, read_manifest, reshard::reshard, verify};
use launcher::{files, text};

#[derive(Debug, Subcommand)]
pub enum Command {
    /// List the checkpoints of a run: sizes and names are compared with the manifests, digests are not
    Ls(Which),
    /// Read every byte and compare it with its digest; names the file that is damaged
    Verify(One),
    /// Show what a checkpoint holds and what wrote it; the newest, unless --step says which
    Show(One),
    /// Write a checkpoint as another number of files, as a run of so many ranks would have. Resuming does not need it
    Reshard {
        #[command(flatten)]
        one: One,
        /// Files to write
        #[arg(long, value_name = "N")]
        into: usize,
        /// A new folder, to hold step-…
        #[arg(long, value_name = "FOLDER")]
        out: PathBuf,
    },
    /// Remove all but the newest, once the newest has verified
    Prune {
        #[command(flatten)]
        which: Which,
        /// The newest this many stay, at least 2; the config's checkpoint.keep if left out
        #[arg(long, value_name = "N")]
        keep: Option<usize>,
        /// Those whose step is a multiple of this stay too; the config's checkpoint.keep_every if left out
        #[arg(long, value_name = "STEPS")]
        keep_every: Option<u64>,
        /// Say what would go
        #[arg(long)]
        dry_run: bool,
    },
}

#[derive(Debug, clap::Args)]
pub struct Which {
    /// A config, or a run's folder
    pub what: PathBuf,
    /// Settings for this time only, such as folders.run=runs/other
    #[arg(value_name = "KEY=VALUE")]
    pub overrides: Vec<String>,
}

#[derive(Debug, clap::Args)]
pub struct One {
    #[command(flatten)]
    pub which: Which,
    /// The checkpoint of this step
    #[arg(long, value_name = "STEP")]
    pub step: Option<u64>,
}

pub fn run(app: &App, command: &Command) -> Result<()> {
    match command {
        Command::Ls(which) => ls(app, which),
        Command::Verify(one) => verify_some(app, one),
        Command::Show(one) => show(app, one),
        Command::Reshard { one, into, out } => recut(app, one, *into, out),
        Command::Prune {
            which,
            keep,
            keep_every,
            dry_run,
        } => {
            let place = which.place()?;
            let keep = Keep {
                newest: keep.unwrap_or(place.keep.newest),
                every: keep_every.or(place.keep.every),
            };
            ensure!(
                keep.newest >= 2,
                "--keep {} is less than 2: should the newest turn out damaged, nothing would be left",
                keep.newest
            );
            prune(app, &place.checkpoints, keep, *dry_run)
        }
    }
}

/// Where a run's checkpoints lie, and which stay.
struct Place {
    checkpoints: PathBuf,
    keep: Keep,
}

impl Which {
    fn place(&self) -> Result<Place> {
        let (run, keep) = if self.what.is_dir() {
            ensure!(
                self.overrides.is_empty(),
                "{} is a folder, which has no settings to change; name a config instead",
                self.what.display()
            );
            (self.what.clone(), None)
        } else {
            let plan = configs::load_for_any_ranks(&self.what, &self.overrides)?;
            let keep = Keep::of(&plan.checkpoint);
            (plan.folders.run, Some(keep))
        };
        let below = run.join(FOLDER);
        // The folder of the checkpoints themselves will do, too.
        let checkpoints = if below.is_dir() { below } else { run };
        let keep = keep.unwrap_or_else(|| kept_by_the_run(&checkpoints));
        Ok(Place { checkpoints, keep })
    }
}

/// As the plan has it that wrote the newest checkpoint.
fn kept_by_the_run(checkpoints: &Path) -> Keep {
    let all = list(checkpoints).unwrap_or_default();
    let newest = all.iter().rev().find_map(|(_, folder)| read_manifest(folder).ok());
    let two = Keep { newest: 2, every: None };
    newest.map_or(two, |manifest| Keep::of(&manifest.identity.plan.checkpoint))
}

impl One {
    /// The checkpoint of the step, or else the newest by name.
    fn folder(&self) -> Result<PathBuf> {
        let checkpoints = self.which.place()?.checkpoints;
        let mut all = list(&checkpoints)?;
        let Some(step) = self.step else {
            let newest = all.pop().with_context(|| nothing(&checkpoints))?;
            return Ok(newest.1);
        };
        let steps: Vec<String> = all.iter().map(|(step, _)| step.to_string()).collect();
        let found = all.into_iter().find(|(known, _)| *known == step);
        found.map(|(_, folder)| folder).with_context(|| {
            format!(
                "{} has no checkpoint of step {step}; there are those of {}",
                checkpoints.display(),
                if steps.is_empty() {
                    "none".into()
                } else {
                    steps.join(", ")
                }
            )
        })
    }
}

fn nothing(checkpoints: &Path) -> String {
    format!(
        "{} holds no checkpoint; `panglot train` writes them",
        checkpoints.display()
    )
}

#[derive(Serialize)]
struct Line {
    step: u64,
    folder: PathBuf,
    /// What is wrong with it.
    #[serde(skip_serializing_if = "Option::is_none")]
    damaged: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    bytes: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    files: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    world: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    attempt: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    unix_time: Option<f64>,
}

fn ls(app: &App, which: &Which) -> Result<()> {
    let checkpoints = which.place()?.checkpoints;
    let line = |(step, folder): (u64, PathBuf)| {
        let read = read_manifest(&folder).and_then(|manifest| {
            check_listing(&folder, &manifest)?;
            Ok(manifest)
        });
        let manifest = read.as_ref().ok();
        Line {
            step,
            damaged: read.as_ref().err().map(|error| format!("{error:#}")),
            bytes: manifest.map(Manifest::bytes),
            files: manifest.map(|it| it.files.len()),
            world: manifest.map(|it| it.world),
            attempt: manifest.map(|it| it.attempt.clone()),
            unix_time: manifest.map(|it| it.unix_time),
            folder,
        }
    };
    let lines: Vec<Line> = list(&checkpoints)?.into_iter().map(line).collect();
    let others = leftovers(&checkpoints)?;
    app.print(&json!({ "checkpoints": lines, "unfinished": others }), || {
        let mut page: Vec<String> = lines.iter().map(shown).collect();
        if lines.is_empty() {
            page.push(nothing(&checkpoints));
        }
        page.extend(others.iter().map(|name| format!("{name}: {}", kind_of(name))));
        page.join("\n")
    })
}

fn shown(line: &Line) -> String {
    let name = files::shown(&line.folder);
    match (&line.damaged, line.bytes, line.files, line.world, line.unix_time) {
        (None, Some(bytes), Some(n), Some(world), Some(time)) => {
            let age = Duration::from_secs_f64((unix_time() - time).max(0.0));
            format!(
                "{name}  {} in {} by {}, {} ago",
                text::bytes(bytes),
                text::counted(n, "file"),
                text::counted(world, "rank"),
                text::duration(age)
            )
        }
        (damaged, ..) => format!("{name}  damaged: {}", damaged.as_deref().unwrap_or("unreadable")),
    }
}

fn kind_of(name: &str) -> &'static str {
    match name.rsplit('.').next() {
        Some("partial") => "under way, or left by an attempt that died; the next attempt removes it",
        Some("damaged") => "did not verify when the run was resumed; goes when a newer checkpoint is whole",
        Some("removed") => "on its way out",
        _ => "none of ours",
    }
}

fn verify_some(app: &App, one: &One) -> Result<()> {
    let started = Instant::now();
    let folders = match one.step {
        Some(_) => vec![one.folder()?],
        None => {
            let checkpoints = one.which.place()?.checkpoints;
            let all = list(&checkpoints)?;
            ensure!(!all.is_empty(), "{}", nothing(&checkpoints));
            all.into_iter().map(|(_, folder)| folder).collect()
        }
    };
    let (mut whole, mut damaged, mut bytes) = (Vec::new(), Vec::new(), 0);
    for folder in folders {
        match verify(&folder) {
            Ok(manifest) => {
                bytes += manifest.bytes();
                whole.push(folder);
            }
            Err(error) => damaged.push(format!("{error:#}")),
        }
    }
    let seconds = started.elapsed().as_secs_f64();
    let result = json!({ "whole": whole, "damaged": damaged, "bytes": bytes, "seconds": seconds });
    app.print(&result, || {
        let names: Vec<String> = whole
            .iter()
            .map(|folder| format!("{} is whole", files::shown(folder)))
            .collect();
        let rate = text::bytes((bytes as f64 / seconds.max(1e-9)) as u64);
        format!("{}\n{} at {rate}/s", names.join("\n"), text::bytes(bytes))
    })?;
    if !damaged.is_empty() {
        // As a file that cannot be read: the machine's matter, and not the config's.
        let lines = damaged.join("\n  ");
        return Err(std::io::Error::other(format!("damaged:\n  {lines}")).into());
    }
    Ok(())
}

fn show(app: &App, one: &One) -> Result<()> {
    let folder = one.folder()?;
    let manifest = read_manifest(&folder)?;
    app.print(&manifest, || {
        let elements: u64 = manifest.tensors.iter().map(|tensor| tensor.elements).sum();
        let identity = &manifest.identity;
        let mut page = vec![
            format!("{}", files::shown(&folder)),
            format!(
                "  {} steps taken, {} updates, {} targets; next row {}",
                text::count(manifest.step),
                text::count(manifest.updates),
                text::count(manifest.targets_so_far),
                text::count(manifest.next_row)
            ),
            format!(
                "  {} trained elements × (θ, m, v) in f32: {} in {}",
                text::count(elements),
                text::bytes(manifest.bytes()),
                text::counted(manifest.files.len(), "file")
            ),
            format!(
                "  written by {} at ZeRO stage {}, attempt {}",
                text::counted(manifest.world, "rank"),
                manifest.zero,
                manifest.attempt
            ),
            format!(
                "  run {}, seed {}, config {}",
                identity.plan.name, manifest.seed, manifest.config_hash
            ),
            format!("  base model {} (not in it)", identity.base_model),
            format!("  vocabulary {}", identity.vocabulary),
            format!("  tokens     {}", identity.tokens),
        ];
        page.extend(
            manifest
                .files
                .iter()
                .map(|file| format!("  {}  {}  {}", file.name, text::bytes(file.bytes), file.blake3)),
        );
        page.join("\n")
    })
}

fn recut(app: &App, one: &One, into: usize, out: &Path) -> Result<()> {
    let folder = one.folder()?;
    let is_new = std::fs::read_dir(out).map_or(true, |mut entries| entries.next().is_none());
    ensure!(is_new, "--out {} is not empty; name a new folder", out.display());
    let written = reshard(&folder, into, out)?;
    app.print(&json!({ "from": folder, "files": into, "written": written }), || {
        format!("{} is written from {}", files::shown(&written), files::shown(&folder))
    })
}

fn prune(app: &App, checkpoints: &Path, keep: Keep, dry_run: bool) -> Result<()> {
    let Some(found) = newest(checkpoints)? else {
        bail!("{}", nothing(checkpoints))
    };
    let verified = found.manifest.step;
    let gone = if dry_run {
        let names = keep.goes(checkpoints, verified)?.into_iter();
        names.map(|name| checkpoints.join(name)).collect()
    } else {
        keep.prune(checkpoints, verified)?
    };
    app.print(
        &json!({ "verified": found.folder, "removed": gone, "dry_run": dry_run }),
        || {
            let what = if dry_run { "would go" } else { "is removed" };
            let mut lines = vec![format!("{} is whole", files::shown(&found.folder))];
            lines.extend(gone.iter().map(|folder| format!("{} {what}", files::shown(folder))));
            if gone.is_empty() {
                lines.push("nothing is superfluous".to_owned());
            }
            lines.join("\n")
        },
    )
}
