//! What a rank can tell of its own host without asking anybody.

use std::fs;
use std::net::{IpAddr, ToSocketAddrs};
use std::path::Path;
use std::sync::mpsc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::Context;
use configs::Plan;
use nix::sys::resource::{Resource, getrlimit};
use nix::sys::statvfs::statvfs;
use serde::{Deserialize, Serialize};

use super::reach::Door;
use crate::gpus::{Gpu, Trouble};
use crate::place::{Place, SlurmJob, cpus_of_rank, is_wired_for_mpi, shown_gpus};
use crate::rendezvous::{interfaces, sameness};
use crate::{files, gpus};

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Host {
    pub rank: usize,
    pub local_rank: usize,
    pub local_world: usize,
    pub host: String,
    /// What must be alike everywhere, as (what, which).
    pub runs: Vec<(String, String)>,
    pub addresses: Vec<IpAddr>,
    pub port: u16,
    /// Shown by whoever connects: reading it needs the run's folder.
    pub token: String,
    /// What its own name resolves to; empty where nothing answers within two seconds.
    pub resolves_to: Vec<IpAddr>,
    /// Seconds to write, sync and rename a small file in the run's folder.
    pub write_seconds: f64,
    pub free_bytes: u64,
    pub shm_free_bytes: u64,
    pub open_files: u64,
    pub cores: usize,
    pub threads_per_rank: Option<usize>,
    /// That Slurm gives to each rank.
    pub cpus_of_rank: Option<usize>,
    /// Ranks that nobody waits for any more.
    pub leftovers: Vec<String>,
    pub wired_for_mpi: bool,
    /// The rank belongs to a job of Slurm's.
    pub in_slurm: bool,
    /// This rank's own, if the run is on GPUs.
    pub gpu: Option<Result<Gpu, Trouble>>,
}

impl Host {
    pub fn look(plan: &Plan, place: &Place, worker: Option<&Path>, door: &Door) -> anyhow::Result<Host> {
        let write_seconds = try_folder(&plan.folders.run, place)?;
        let (open_files, _) = getrlimit(Resource::RLIMIT_NOFILE).unwrap_or((u64::MAX, u64::MAX));
        let mut addresses = Vec::new();
        for interface in interfaces().unwrap_or_default() {
            addresses.extend(interface.addresses);
        }
        Ok(Host {
            rank: place.rank,
            local_rank: place.local_rank,
            local_world: place.local_world,
            host: place.node.clone(),
            runs: runs(plan, worker),
            addresses,
            port: door.port,
            token: door.token.clone(),
            resolves_to: resolve(&place.node),
            write_seconds,
            free_bytes: free(&plan.folders.run),
            shm_free_bytes: free(Path::new("/dev/shm")),
            open_files,
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            threads_per_rank: plan.launch.threads_per_rank,
            cpus_of_rank: cpus_of_rank(),
            leftovers: if place.local_rank == 0 { leftovers() } else { Vec::new() },
            wired_for_mpi: is_wired_for_mpi(),
            in_slurm: SlurmJob::detect().id.is_some(),
            gpu: (plan.train.device == configs::Device::Cuda).then(|| gpus::look(place, shown_gpus().as_deref())),
        })
    }
}

/// Seconds for what a checkpoint does: write beside, sync, rename, sync the folder.
fn try_folder(run: &Path, place: &Place) -> anyhow::Result<f64> {
    let file = run.join("doctor").join(format!("probe-{}", place.rank));
    let began = Instant::now();
    let tried = files::write_atomically(&file, &[0; 4096]);
    let seconds = began.elapsed().as_secs_f64();
    tried.with_context(|| {
        let host = &place.node;
        format!("{host}: the run's folder cannot be written; make it writable there, free space, or mount it")
    })?;
    let _ = fs::remove_file(&file);
    Ok(seconds)
}

/// Build ids by content: two builds of the same source may differ in what they compute.
fn runs(plan: &Plan, worker: Option<&Path>) -> Vec<(String, String)> {
    let digest = |read: anyhow::Result<String>| read.unwrap_or_else(|error| format!("unreadable ({error:#})"));
    vec![
        (
            "panglot".to_owned(),
            digest(sameness::this_program().map_err(Into::into)),
        ),
        (
            "panglot-worker".to_owned(),
            digest(worker.context("not found").and_then(digest_of)),
        ),
        (
            "config".to_owned(),
            digest(files::digest_of(plan)).chars().take(16).collect(),
        ),
    ]
}

fn digest_of(file: &Path) -> anyhow::Result<String> {
    let mut hasher = blake3::Hasher::new();
    hasher.update_reader(fs::File::open(file)?)?;
    Ok(hasher.finalize().to_hex()[..16].to_owned())
}

/// A name service that is not there keeps one waiting for many seconds.
fn resolve(host: &str) -> Vec<IpAddr> {
    let (tell, told) = mpsc::channel();
    let host = host.to_owned();
    std::thread::spawn(move || {
        let found: Vec<IpAddr> = (host.as_str(), 0)
            .to_socket_addrs()
            .into_iter()
            .flatten()
            .map(|address| address.ip())
            .collect();
        let _ = tell.send(found);
    });
    told.recv_timeout(Duration::from_secs(2)).unwrap_or_default()
}

fn free(folder: &Path) -> u64 {
    statvfs(folder).map_or(0, |stat| stat.blocks_available() * stat.fragment_size())
}

/// Workers of this machine whose launcher is gone. No rank runs while the doctor does, but another job's may, under its own.
fn leftovers() -> Vec<String> {
    let here = fs::read_link("/proc/self/ns/net").ok();
    let ids = fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| {
            let id: u32 = entry.file_name().to_str()?.parse().ok()?;
            let stat = fs::read_to_string(entry.path().join("stat")).ok()?;
            // "711 (panglot-worker) S 1 …": state and parent stand behind the name, which may hold anything.
            let mut behind = stat.rsplit_once(')')?.1.split_whitespace();
            let (state, parent) = (behind.next()?, behind.next()?);
            let name = fs::read_to_string(entry.path().join("comm")).ok()?;
            let is_here = fs::read_link(entry.path().join("ns/net")).ok() == here;
            (name.trim() == "panglot-worker" && state != "Z" && parent == "1" && is_here).then_some(id.to_string())
        });
    ids.collect()
}

pub fn unix_time() -> f64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs_f64()
}
