//! The same state in another number of files: what a run of as many ranks would have written, to the byte. Not needed to
//! resume, which reads any number.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use configs::planner::memory::slice_len;

use super::commit::{Part, make_folder, write_slices};
use super::manifest::{Manifest, STATE};
use super::read::{SliceFile, verify};
use super::{Fence, Nonce, commit};

/// Writes what `checkpoint` holds, verified, into `out` as `n_slices` files; one file's state is in memory at a time.
pub fn reshard(checkpoint: &Path, n_slices: usize, out: &Path) -> Result<PathBuf> {
    ensure!(n_slices > 0, "a checkpoint has at least one file");
    let theirs = verify(checkpoint)?;
    let readers: Vec<SliceFile> = theirs
        .files
        .iter()
        .map(|file| SliceFile::open(&checkpoint.join(&file.name)))
        .collect::<Result<_>>()?;
    make_folder(out)?;
    let nonce = Nonce::new()?;
    // Its own, in a folder of its own: no run is disturbed.
    let fence = Fence::take(out, out, &nonce)?;
    let partial = out.join(super::manifest::partial_name(theirs.step, nonce.as_str(), 0));
    let mut files = Vec::new();
    for slice in 0..n_slices {
        let ranges: Vec<(u64, u64)> = theirs
            .tensors
            .iter()
            .map(|tensor| range(tensor.elements, slice, n_slices))
            .collect();
        let mut values = Vec::new();
        for (index, (tensor, mine)) in theirs.tensors.iter().zip(&ranges).enumerate() {
            for part in STATE {
                let name = format!("{}.{part}", tensor.name);
                let mut bytes = vec![0; 4 * (mine.1 - mine.0) as usize];
                for (file, reader) in theirs.files.iter().zip(&readers) {
                    reader.read_overlap(&name, file.ranges[index], *mine, &mut bytes)?;
                }
                values.push((name, mine.1 - mine.0, bytes));
            }
        }
        let parts: Vec<Part> = values
            .iter()
            .map(|(name, elements, bytes)| Part {
                name: name.clone(),
                elements: *elements,
                bytes,
            })
            .collect();
        files.push(write_slices(&partial, (slice, n_slices), ranges, &parts)?.entry);
    }
    let manifest = Manifest {
        files,
        attempt: nonce.as_str().to_owned(),
        ..theirs
    };
    commit(&partial, &manifest, &fence).context("committing what was cut anew")
}

/// Slice `slice` of a bucket, padding left out, as `sharding::Layout` cuts it.
fn range(elements: u64, slice: usize, n_slices: usize) -> (u64, u64) {
    let length = slice_len(elements as usize, n_slices) as u64;
    let at = |slice: usize| (slice as u64 * length).min(elements);
    (at(slice), at(slice + 1))
}
