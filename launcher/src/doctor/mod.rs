//! `panglot doctor`: one process a rank looks at its host, tells the others through the run's folder, tries to reach them, and
//! rank 0 says in one line a finding what would spoil a run, on which host, and what to do.

pub mod findings;
mod gpus;
mod host;
mod reach;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use configs::Plan;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::files;
use crate::place::{self, Place};
use findings::{Finding, Seen, findings};

pub use host::Host;
pub use reach::Link;

/// A shared file system shows a new file to other hosts within a few seconds, or it is not shared.
const REPORTS: Duration = Duration::from_secs(8);
const LINKS: Duration = Duration::from_secs(8);
/// The all-reduces; with the two above it stays within 30 s, and where all is sound it takes a second or two.
const ALL_REDUCES: Duration = Duration::from_secs(10);
/// On GPUs: before it come libtorch's CUDA half from a cold file system, contexts, and NCCL's first connections.
const ALL_REDUCES_ON_GPUS: Duration = Duration::from_secs(25);

/// How long the all-reduces may take, all that comes before them counted.
pub fn limit_of_all_reduces(device: configs::Device) -> Duration {
    match device {
        configs::Device::Cpu => ALL_REDUCES,
        configs::Device::Cuda => ALL_REDUCES_ON_GPUS,
    }
}

/// What rank 0 concludes before ranks meet in collectives.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Verdict {
    refused: bool,
}

/// What the ranks found; rank 0 alone has all of it.
pub struct Examined {
    pub findings: Vec<Finding>,
    pub hosts: BTreeMap<usize, Host>,
    pub links: BTreeMap<usize, Vec<Link>>,
    /// Ranks must not meet.
    pub refused: bool,
    pub began: Instant,
    folder: PathBuf,
}

/// Everything but the collectives.
///
/// # Errors
/// When this host cannot even write into the run's folder; nobody else can say so.
pub fn examine(plan: &Plan, place: &Place, worker: Option<&Path>) -> anyhow::Result<Examined> {
    let began = Instant::now();
    files::make_private(&plan.folders.run)?;
    let folder = plan.folders.run.join("doctor").join(place::launch_id());
    let door = reach::Door::open()?;
    let mine = Host::look(plan, place, worker, &door)?;
    files::write_json(&folder.join(format!("host-{}", place.rank)), &mine)?;
    let hosts: BTreeMap<usize, Host> = gather(&folder, "host", place.world, REPORTS);
    let links = reach::try_all(&mine, &hosts);
    let _ = files::write_json(&folder.join(format!("links-{}", place.rank)), &links);
    let mut examined = Examined {
        findings: Vec::new(),
        hosts,
        links: BTreeMap::new(),
        refused: false,
        began,
        folder: folder.clone(),
    };
    if place.rank == 0 {
        // Whoever has not reported has no links either.
        examined.links = gather(&folder, "links", examined.hosts.len(), LINKS);
        let seen = Seen {
            world: place.world,
            placed: place::step_hosts(),
            hosts: &examined.hosts,
            links: &examined.links,
            folder: &plan.folders.run,
            on_gpus: plan.train.device == configs::Device::Cuda,
        };
        examined.findings = findings(&seen);
        examined.refused = examined.findings.iter().any(|finding| finding.refuses);
        files::write_json(
            &folder.join("verdict-0"),
            &Verdict {
                refused: examined.refused,
            },
        )?;
    } else {
        // By listing the folder, as with reports: a file that was looked for before it was there, NFS goes on not to see.
        let verdict: BTreeMap<usize, Verdict> = gather(&folder, "verdict", 1, REPORTS + LINKS);
        // Without a word of rank 0's there is no peer to meet.
        examined.refused = verdict.get(&0).is_none_or(|verdict| verdict.refused);
    }
    Ok(examined)
}

impl Examined {
    /// Rank 0 removes what the ranks have written.
    pub fn clean(&self) {
        if self.refused {
            // The others may be reading the verdict now.
            std::thread::sleep(Duration::from_millis(500));
        }
        let _ = fs::remove_dir_all(&self.folder);
    }
}

/// The files `KIND-RANK` of all ranks, or of those that came in time.
fn gather<T: DeserializeOwned>(folder: &Path, kind: &str, count: usize, limit: Duration) -> BTreeMap<usize, T> {
    let began = Instant::now();
    let mut found = BTreeMap::new();
    loop {
        let entries = fs::read_dir(folder).into_iter().flatten().flatten();
        for entry in entries {
            let name = entry.file_name().to_string_lossy().into_owned();
            let rank = name
                .strip_prefix(kind)
                .and_then(|rest| rest.strip_prefix('-')?.parse().ok());
            let Some(rank) = rank.filter(|rank| !found.contains_key(rank)) else {
                continue;
            };
            if let Ok(value) = files::read_json(&entry.path()) {
                found.insert(rank, value);
            }
        }
        if found.len() >= count || began.elapsed() > limit {
            return found;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}
