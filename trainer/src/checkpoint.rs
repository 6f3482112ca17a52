//! Checkpoints: finished or invisible, readable by any number of ranks. A checkpoint holds the optimizer slices (master
//! weights, m, v); frozen weights are never in it, only their digest.
//!
//! `checkpoints/step-00000020/` holds one safetensors file a slice and `manifest.json`, which is written last; the folder
//! gets its name when everything in it is on disk. 20 steps were taken before it.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use configs::Plan;
use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};
use serde::{Deserialize, Serialize};
use sharding::memory::{bytes, f32s_mut};
use sharding::zero::Slice;
use sharding::{Comm, Layout, Zero};
use tch::Device;

use crate::guard;

const FORMAT: u32 = 1;
const MANIFEST: &str = "manifest.json";

/// What a run must have in common with the one that wrote a checkpoint.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Identity {
    pub plan: Plan,
    /// Digests of what the run reads and a checkpoint does not hold.
    pub base_model: String,
    pub vocabulary: String,
    pub tokens: String,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    pub format: u32,
    /// Steps taken; the next step's number.
    pub step: u64,
    /// Updates made: steps less the skipped ones.
    pub updates: u64,
    pub targets_so_far: u64,
    /// What steps are compared with.
    #[serde(default)]
    pub guard: guard::State,
    pub world: usize,
    pub identity: Identity,
    /// The layout's description: bucket, parameter, shape and group a line.
    pub layout: String,
    pub files: Vec<FileEntry>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FileEntry {
    pub name: String,
    pub bytes: u64,
    pub blake3: String,
    /// Index of the slice, and of how many.
    pub slice: usize,
    pub n_slices: usize,
}

/// Where a run stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    pub step: u64,
    pub targets_so_far: u64,
}

/// Writes a checkpoint; all ranks call it at the same step.
///
/// # Errors
/// When any rank could not write: every rank returns the error and no checkpoint appears.
pub fn save(
    folder: &Path,
    comm: &dyn Comm,
    zero: &Zero,
    identity: &Identity,
    progress: Progress,
    guard: &guard::State,
) -> Result<PathBuf> {
    let target = folder.join(format!("step-{:08}", progress.step));
    // Rank 0 names the attempt, so that ranks of an older attempt that still run cannot write into this one.
    let nonce = comm.broadcast_bytes(&nonce())?;
    let nonce: String = nonce.iter().map(|byte| format!("{byte:02x}")).collect();
    let partial = folder.join(format!("step-{:08}.{nonce}.partial", progress.step));
    let prepared = if comm.rank() == 0 {
        fs::create_dir_all(&partial).map_err(Into::into)
    } else {
        Ok(())
    };
    comm.barrier()?;

    let n_slices = zero.layout().n_slices;
    let writes = comm.rank() < n_slices;
    let written = prepared.and_then(|()| {
        if writes {
            write_slices(&partial, comm.rank(), zero)
        } else {
            Ok(None)
        }
    });
    // Length and digest travel to rank 0; a length of u64::MAX says that this rank failed.
    let report = match &written {
        Ok(Some(entry)) => (entry.bytes, *blake3::Hash::from_hex(&entry.blake3)?.as_bytes()),
        Ok(None) => (0, [0; 32]),
        Err(_) => (u64::MAX, [0; 32]),
    };
    let reports = comm.all_gather_bytes(&[&report.0.to_le_bytes()[..], &report.1[..]].concat())?;
    written.with_context(|| format!("writing the checkpoint {}", partial.display()))?;
    let length = |report: &[u8]| u64::from_le_bytes(report[..8].try_into().expect("8 bytes"));
    if let Some(rank) = reports.iter().position(|report| length(report) == u64::MAX) {
        bail!(
            "rank {rank} could not write its part of {}; see its log",
            partial.display()
        );
    }
    if comm.rank() == 0 {
        let file = |slice: usize| FileEntry {
            name: slice_file(slice, n_slices),
            bytes: length(&reports[slice]),
            blake3: blake3::Hash::from_slice(&reports[slice][8..])
                .expect("32 bytes")
                .to_hex()
                .to_string(),
            slice,
            n_slices,
        };
        let manifest = Manifest {
            format: FORMAT,
            step: progress.step,
            updates: zero.updates,
            targets_so_far: progress.targets_so_far,
            guard: guard.clone(),
            world: comm.world(),
            identity: identity.clone(),
            layout: zero.layout().describe(),
            files: (0..n_slices).map(file).collect(),
        };
        commit(&partial, &target, &manifest).with_context(|| format!("committing {}", target.display()))?;
    }
    Ok(target)
}

/// Removes all but the newest `keep` checkpoints, and what earlier attempts left unfinished. Rank 0 only.
pub fn prune(folder: &Path, keep: usize) -> Result<()> {
    for old in list(folder)?.iter().rev().skip(keep) {
        fs::remove_dir_all(old).with_context(|| format!("removing the old checkpoint {}", old.display()))?;
    }
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "partial") {
            fs::remove_dir_all(&path).with_context(|| format!("removing the unfinished {}", path.display()))?;
        }
    }
    Ok(())
}

/// Checkpoint folders, oldest first.
pub fn list(folder: &Path) -> Result<Vec<PathBuf>> {
    if !folder.exists() {
        return Ok(Vec::new());
    }
    let mut found: Vec<(u64, PathBuf)> = Vec::new();
    for entry in fs::read_dir(folder).with_context(|| format!("reading {}", folder.display()))? {
        let path = entry?.path();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        if let Some(step) = name.strip_prefix("step-").and_then(|digits| digits.parse().ok()) {
            found.push((step, path));
        }
    }
    found.sort();
    Ok(found.into_iter().map(|(_, path)| path).collect())
}

/// What [`newest`] found.
pub struct Found {
    pub folder: PathBuf,
    pub manifest: Manifest,
    /// Newer checkpoints that failed verification, each with what is wrong.
    pub rejected: Vec<String>,
}

/// The newest checkpoint whose every file verifies. `Ok(None)`: there is none at all.
///
/// # Errors
/// When checkpoints exist but none verifies: starting over in silence would be a different run.
pub fn newest(folder: &Path) -> Result<Option<Found>> {
    let mut rejected = Vec::new();
    for path in list(folder)?.into_iter().rev() {
        match verify(&path) {
            Ok(manifest) => {
                return Ok(Some(Found {
                    folder: path,
                    manifest,
                    rejected,
                }));
            }
            Err(error) => rejected.push(format!("{error:#}")),
        }
    }
    ensure!(
        rejected.is_empty(),
        "no checkpoint in {} can be read:\n  {}\nmove them away to start from step 0",
        folder.display(),
        rejected.join("\n  ")
    );
    Ok(None)
}

/// Reads the manifest and checks every file's length and digest against it.
pub fn verify(checkpoint: &Path) -> Result<Manifest> {
    let manifest = read_manifest(checkpoint)?;
    for file in &manifest.files {
        ensure!(
            is_plain_name(&file.name),
            "{}: {:?} is not a plain file name",
            checkpoint.display(),
            file.name
        );
        let path = checkpoint.join(&file.name);
        let length = fs::metadata(&path).with_context(|| path.display().to_string())?.len();
        ensure!(
            length == file.bytes,
            "{} has {length} bytes, its manifest says {}",
            path.display(),
            file.bytes
        );
        let mut hasher = blake3::Hasher::new();
        hasher
            .update_reader(File::open(&path)?)
            .with_context(|| format!("reading {}", path.display()))?;
        ensure!(
            hasher.finalize().to_hex().as_str() == file.blake3,
            "{} does not match its digest",
            path.display()
        );
    }
    Ok(manifest)
}

pub fn read_manifest(checkpoint: &Path) -> Result<Manifest> {
    let path = checkpoint.join(MANIFEST);
    let text = fs::read(&path).with_context(|| path.display().to_string())?;
    let manifest: Manifest = serde_json::from_slice(&text).with_context(|| path.display().to_string())?;
    ensure!(
        manifest.format == FORMAT,
        "{} has format {}, this build reads {FORMAT}",
        path.display(),
        manifest.format
    );
    Ok(manifest)
}

/// Fills this rank's slices from a checkpoint written by any number of ranks and publishes them.
pub fn load(checkpoint: &Path, manifest: &Manifest, comm: &dyn Comm, zero: &mut Zero) -> Result<Progress> {
    let written = manifest.files.first().map_or(1, |file| file.n_slices);
    let specs: Vec<_> = zero
        .layout()
        .buckets
        .iter()
        .map(|bucket| sharding::BucketSpec {
            name: bucket.name.clone(),
            params: bucket.params.clone(),
        })
        .collect();
    ensure!(
        manifest.layout == zero.layout().describe(),
        "{} holds other parameters than this run trains; it was made with another model or other targets",
        checkpoint.display()
    );
    let layout = Layout::new(&specs, written);
    for file in &manifest.files {
        let reader = SliceFile::open(&checkpoint.join(&file.name))?;
        for (index, bucket) in layout.buckets.iter().enumerate() {
            let theirs = bucket.slice(file.slice);
            let (mine, slice) = zero.slice_mut(index);
            let Slice { theta, m, v } = slice;
            for (name, tensor) in [("theta", theta), ("m", m), ("v", v)] {
                let mut host = tensor.to_device(Device::Cpu);
                reader.read_overlap(&format!("{}.{name}", bucket.name), &theirs, &mine, f32s_mut(&mut host))?;
                if tensor.device() != Device::Cpu {
                    tensor.copy_(&host);
                }
            }
        }
    }
    zero.updates = manifest.updates;
    zero.publish();
    zero.arrived(comm)?;
    Ok(Progress {
        step: manifest.step,
        targets_so_far: manifest.targets_so_far,
    })
}

/// The settings in which two plans differ and that change what a run computes, as "key: theirs → ours".
pub fn differences(theirs: &Identity, ours: &Identity) -> Vec<String> {
    let essence = |identity: &Identity| -> serde_json::Value {
        let mut value = serde_json::to_value(identity).expect("plain data");
        let plan = value["plan"].as_object_mut().expect("a plan is an object");
        // How a run is spread, watched and kept changes no number beyond the rounding of sums.
        for key in [
            "name",
            "folders",
            "corpus",
            "model",
            "checkpoint",
            "evaluation",
            "launch",
            "debug",
        ] {
            plan.remove(key);
        }
        let train = plan["train"].as_object_mut().expect("train is an object");
        for key in [
            "micro_rows",
            "recompute",
            "zero",
            "shard_frozen",
            "offload_optimizer",
            "check_ranks_every",
            "device",
        ] {
            train.remove(key);
        }
        value
    };
    let mut found = Vec::new();
    compare("", &essence(theirs), &essence(ours), &mut found);
    found
}

fn compare(path: &str, theirs: &serde_json::Value, ours: &serde_json::Value, found: &mut Vec<String>) {
    match (theirs.as_object(), ours.as_object()) {
        (Some(a), Some(b)) => {
            let keys = a.keys().chain(b.keys().filter(|key| !a.contains_key(*key)));
            for key in keys {
                let missing = serde_json::Value::Null;
                let (a, b) = (a.get(key).unwrap_or(&missing), b.get(key).unwrap_or(&missing));
                let path = if path.is_empty() {
                    key.clone()
                } else {
                    format!("{path}.{key}")
                };
                compare(path.strip_prefix("plan.").unwrap_or(&path), a, b, found);
            }
        }
        _ if theirs != ours => found.push(format!("{path}: {theirs} → {ours}")),
        _ => {}
    }
}

fn nonce() -> [u8; 8] {
    let now = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap_or_default();
    let text = format!("{} {}", now.as_nanos(), std::process::id());
    blake3::hash(text.as_bytes()).as_bytes()[..8]
        .try_into()
        .expect("a hash has 32 bytes")
}

fn slice_file(slice: usize, n_slices: usize) -> String {
    format!("slice-{slice:05}-of-{n_slices:05}.safetensors")
}

fn is_plain_name(name: &str) -> bool {
    !name.is_empty() && !name.starts_with('.') && !name.contains(['/', '\\', '\0'])
}

/// Writes this rank's slices, padding left out; the digest is of the buffer in memory, not of what a disk gave back.
fn write_slices(partial: &Path, slice: usize, zero: &Zero) -> Result<Option<FileEntry>> {
    // On the host; where they are there already, the same memory.
    let mut slices = Vec::new();
    for (index, bucket) in zero.layout().buckets.iter().enumerate() {
        let (range, Slice { theta, m, v }) = zero.slice(index);
        for (name, tensor) in [("theta", theta), ("m", m), ("v", v)] {
            let name = format!("{}.{name}", bucket.name);
            slices.push((name, range.len(), tensor.to_device(Device::Cpu)));
        }
    }
    let mut end = 0;
    let infos = slices.iter().map(|(name, length, _)| {
        let start = end;
        end += 4 * length;
        let info = TensorInfo {
            dtype: Dtype::F32,
            shape: vec![*length],
            data_offsets: (start, end),
        };
        (name.clone(), info)
    });
    let mut header = serde_json::to_vec(&Metadata::new(None, infos.collect())?)?;
    header.resize(header.len().next_multiple_of(8), b' ');
    let length = (header.len() as u64).to_le_bytes();
    let values = slices.iter().map(|(_, length, tensor)| &bytes(tensor)[..4 * length]);
    let parts: Vec<&[u8]> = [&length[..], &header].into_iter().chain(values).collect();

    let name = slice_file(slice, zero.layout().n_slices);
    let digest = write_synced(&partial.join(&name), &parts)?;
    Ok(Some(FileEntry {
        name,
        bytes: parts.iter().map(|part| part.len() as u64).sum(),
        blake3: digest.to_hex().to_string(),
        slice,
        n_slices: zero.layout().n_slices,
    }))
}

/// Writes a new file of these parts, straight from where they lie, and syncs it. The digest is of memory, not of what was
/// written.
fn write_synced(path: &Path, parts: &[&[u8]]) -> Result<blake3::Hash> {
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .open(path)
        .with_context(|| path.display().to_string())?;
    let mut hasher = blake3::Hasher::new();
    for part in parts {
        hasher.update_rayon(part);
        file.write_all(part).with_context(|| path.display().to_string())?;
    }
    file.sync_all().with_context(|| path.display().to_string())?;
    Ok(hasher.finalize())
}

fn commit(partial: &Path, target: &Path, manifest: &Manifest) -> Result<()> {
    write_synced(&partial.join(MANIFEST), &[&serde_json::to_vec_pretty(manifest)?])?;
    sync_folder(partial)?;
    if target.exists() {
        // Only a damaged checkpoint's steps are taken again. It makes room first; pruning removes it.
        fs::rename(target, partial.with_extension("damaged.partial"))?;
    }
    fs::rename(partial, target)?;
    sync_folder(target.parent().expect("checkpoints lie in a folder"))
}

fn sync_folder(folder: &Path) -> Result<()> {
    File::open(folder)
        .and_then(|file| file.sync_all())
        .with_context(|| format!("syncing {}", folder.display()))
}

/// Reads ranges of tensors of a safetensors file without reading the rest.
struct SliceFile {
    file: File,
    path: PathBuf,
    header: safetensors::tensor::Metadata,
    data_start: u64,
}

impl SliceFile {
    fn open(path: &Path) -> Result<SliceFile> {
        let in_file = || path.display().to_string();
        let mut file = File::open(path).with_context(in_file)?;
        let mut length = [0; 8];
        file.read_exact(&mut length).with_context(in_file)?;
        let size = file.metadata()?.len();
        let length = u64::from_le_bytes(length);
        ensure!(
            length <= size,
            "{}: its header claims {length} bytes in a file of {size}",
            path.display()
        );
        let mut header = vec![0; length as usize];
        file.read_exact(&mut header).with_context(in_file)?;
        let header = serde_json::from_slice(&header).with_context(in_file)?;
        Ok(SliceFile {
            file,
            path: path.into(),
            header,
            data_start: 8 + length,
        })
    }

    /// Copies the part of tensor `name`, which covers `theirs`, that lies in `mine` to its place in `out`.
    fn read_overlap(&self, name: &str, theirs: &Range<usize>, mine: &Range<usize>, out: &mut [f32]) -> Result<()> {
        let (start, end) = (theirs.start.max(mine.start), theirs.end.min(mine.end));
        if start >= end {
            return Ok(());
        }
        let info = self
            .header
            .info(name)
            .with_context(|| format!("{} lacks {name}", self.path.display()))?;
        ensure!(
            info.dtype == Dtype::F32 && info.shape == [theirs.len()],
            "{}: {name} is {:?} {:?}, expected F32 [{}]",
            self.path.display(),
            info.dtype,
            info.shape,
            theirs.len()
        );
        let offset = self.data_start + info.data_offsets.0 as u64 + 4 * (start - theirs.start) as u64;
        let part = &mut out[start - mine.start..end - mine.start];
        self.file
            .read_exact_at(bytemuck::cast_slice_mut(part), offset)
            .with_context(|| format!("reading {name} of {}", self.path.display()))
    }
}
