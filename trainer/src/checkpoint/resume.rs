//! Which checkpoint a run goes on from, and how its state comes back. Rank 0 proposes, every rank verifies its share of the
//! files, and all take the same one.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use launcher::checkpoint::manifest::{STATE, step_name};
use launcher::checkpoint::read::{check_listing, list, none_verifies, verify_file};
use launcher::checkpoint::{Found, Manifest, SliceFile, read_manifest};
use sharding::memory::f32s_mut;
use sharding::zero::Slice;
use sharding::{Comm, Zero};
use tch::Device;

use super::Progress;

const NONE_LEFT: u64 = u64::MAX;

/// The newest checkpoint whose every file verifies; the same on all ranks. `Ok(None)`: there is none at all.
///
/// # Errors
/// When checkpoints exist but none verifies.
pub fn choose(checkpoints: &Path, comm: &dyn Comm) -> Result<Option<Found>> {
    let mut candidates: Vec<u64> = match comm.rank() {
        0 => list(checkpoints)?.into_iter().map(|(step, _)| step).collect(),
        _ => Vec::new(),
    };
    let mut rejected: Vec<(PathBuf, String)> = Vec::new();
    loop {
        let proposed = candidates.pop().unwrap_or(NONE_LEFT);
        let step = comm.broadcast_bytes(&proposed.to_le_bytes())?;
        let step = u64::from_le_bytes(step[..].try_into().context("a step is 8 bytes")?);
        if step == NONE_LEFT {
            none_verifies(checkpoints, &rejected)?;
            return Ok(None);
        }
        let folder = checkpoints.join(step_name(step));
        let verified = verify_share(&folder, comm);
        let wrong = verified
            .as_ref()
            .err()
            .map(|error| format!("{error:#}"))
            .unwrap_or_default();
        let wrong = comm.all_gather_texts(wrong.as_bytes())?;
        // What several ranks found alike is said once.
        let mut wrong: Vec<String> = wrong
            .iter()
            .map(|text| String::from_utf8_lossy(text).into_owned())
            .collect();
        wrong.retain(|text| !text.is_empty());
        wrong.dedup();
        match verified {
            Ok(manifest) if wrong.is_empty() => {
                return Ok(Some(Found {
                    folder,
                    manifest,
                    rejected,
                }));
            }
            _ => rejected.push((folder, wrong.join("; "))),
        }
    }
}

/// The manifest, verified, and this rank's share of the files.
fn verify_share(folder: &Path, comm: &dyn Comm) -> Result<Manifest> {
    let manifest = read_manifest(folder)?;
    if comm.rank() == 0 {
        check_listing(folder, &manifest)?;
    }
    for file in manifest.files.iter().skip(comm.rank()).step_by(comm.world()) {
        verify_file(folder, file, manifest.chunk_bytes)?;
    }
    Ok(manifest)
}

/// Makes room for the steps of checkpoints that did not verify: they are taken again. Whoever wants to look at what is left of
/// those finds it under the names that are returned, until a whole checkpoint of a later step is there. Rank 0 only.
pub fn set_aside(rejected: &[(PathBuf, String)], nonce: &str) -> Result<()> {
    for (folder, _) in rejected {
        let name = folder.file_name().unwrap_or_default().to_string_lossy();
        let aside = folder.with_file_name(format!("{name}.{nonce}.damaged"));
        fs::rename(folder, &aside).with_context(|| format!("setting the damaged {} aside", folder.display()))?;
    }
    Ok(())
}

/// Fills this rank's slices from a checkpoint written by any number of ranks at any ZeRO stage, and publishes them.
pub fn load(checkpoint: &Path, manifest: &Manifest, comm: &dyn Comm, zero: &mut Zero) -> Result<Progress> {
    ensure!(
        manifest.layout == zero.layout().describe(),
        "{} holds other parameters than this run trains; it was made with another model or other targets",
        checkpoint.display()
    );
    let names: Vec<String> = zero.layout().buckets.iter().map(|bucket| bucket.name.clone()).collect();
    for file in &manifest.files {
        let reader = SliceFile::open(&checkpoint.join(&file.name))?;
        for (index, bucket) in names.iter().enumerate() {
            let theirs = file.ranges[index];
            let (mine, slice) = zero.slice_mut(index);
            let mine = (mine.start as u64, mine.end as u64);
            if theirs.0.max(mine.0) >= theirs.1.min(mine.1) {
                continue;
            }
            let Slice { theta, m, v } = slice;
            for (name, tensor) in STATE.into_iter().zip([theta, m, v]) {
                let mut host = tensor.to_device(Device::Cpu);
                let values = bytemuck::cast_slice_mut(f32s_mut(&mut host));
                reader.read_overlap(&format!("{bucket}.{name}"), theirs, mine, values)?;
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
        best: manifest.best,
    })
}
