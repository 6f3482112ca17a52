//! How a checkpoint comes to be, in the order in which it does: each rank writes its slices into the partial folder, digests
//! them from memory, syncs and reads them back; then rank 0 writes the manifest, syncs, looks at the fence, renames. Until the
//! rename there is no checkpoint, after it there is a whole one.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};

use super::Fence;
use super::manifest::{CHUNK_BYTES, FileEntry, MANIFEST, Manifest, digest_of_chunks, slice_file, step_name};
use super::read::{read_manifest, verify_file};

/// A tensor of a slice: its name, the elements of the bucket that it covers, and their f32 bytes.
pub struct Part<'a> {
    pub name: String,
    pub elements: u64,
    pub bytes: &'a [u8],
}

/// A file that is on disk, and what that took.
#[derive(Clone, Debug)]
pub struct Written {
    pub entry: FileEntry,
    pub seconds: Seconds,
}

/// Where a save's time went.
#[derive(Clone, Copy, Debug, Default)]
pub struct Seconds {
    pub digest: f64,
    pub write: f64,
    pub sync: f64,
    /// Reading back what was written.
    pub verify: f64,
}

/// A checkpoint of this step is there already and is not this attempt's.
#[derive(Debug, thiserror::Error)]
#[error("{} is there already and was written by attempt {attempt}; this is {mine}", target.display())]
pub struct Refused {
    target: PathBuf,
    attempt: String,
    mine: String,
}

/// Writes one rank's slices as a safetensors file of `folder`, which is made unless it is there; syncs it and reads it back.
/// Digests are of `parts`, not of what a disk gave back. `ranges`: see [`FileEntry`].
///
/// # Errors
/// Where the file cannot be written, or does not hold what was written.
pub fn write_slices(
    folder: &Path,
    (slice, n_slices): (usize, usize),
    ranges: Vec<(u64, u64)>,
    parts: &[Part],
) -> Result<Written> {
    match fs::create_dir(folder) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            return Err(error).with_context(|| format!("making {}", folder.display()));
        }
        _ => {}
    }
    let header = header(parts)?;
    let pieces: Vec<&[u8]> = [&header[..]]
        .into_iter()
        .chain(parts.iter().map(|part| part.bytes))
        .collect();
    let name = slice_file(slice, n_slices);
    let path = folder.join(&name);
    let (chunks, mut seconds) = write_synced(&path, &pieces)?;
    let entry = FileEntry {
        bytes: pieces.iter().map(|piece| piece.len() as u64).sum(),
        blake3: digest_of_chunks(&chunks).to_hex().to_string(),
        chunks: chunks.iter().map(|chunk| chunk.to_hex().to_string()).collect(),
        name,
        ranges,
    };
    let started = std::time::Instant::now();
    verify_file(folder, &entry, CHUNK_BYTES).context("read back at once")?;
    seconds.verify = started.elapsed().as_secs_f64();
    Ok(Written { entry, seconds })
}

/// safetensors' header: its length, and JSON padded so that the values are aligned.
fn header(parts: &[Part]) -> Result<Vec<u8>> {
    let mut end = 0;
    let infos = parts.iter().map(|part| {
        let start = end;
        end += part.bytes.len();
        let info = TensorInfo {
            dtype: Dtype::F32,
            shape: vec![part.elements as usize],
            data_offsets: (start, end),
        };
        (part.name.clone(), info)
    });
    let mut json = serde_json::to_vec(&Metadata::new(None, infos.collect())?)?;
    json.resize(json.len().next_multiple_of(8), b' ');
    Ok([&(json.len() as u64).to_le_bytes()[..], &json].concat())
}

/// Makes the files of `partial` the checkpoint of its step, and returns its folder. Every file that the manifest names is
/// written, synced and read back by now.
///
/// # Errors
/// [`super::Lost`] and [`Refused`] where another attempt has the run; others where files could not be written.
pub fn commit(partial: &Path, manifest: &Manifest, fence: &Fence) -> Result<PathBuf> {
    let checkpoints = partial.parent().context("checkpoints lie in a folder")?;
    let target = checkpoints.join(step_name(manifest.step));
    let text = manifest.seal()?;
    let path = partial.join(MANIFEST);
    write_synced(&path, &[&text])?;
    let read = fs::read(&path).with_context(|| path.display().to_string())?;
    ensure!(read == text, "{} does not hold what was written", path.display());
    sync_folder(partial)?;
    fence.check()?;
    if target.exists() {
        // A try of this attempt's that failed after its rename; what is there is as whole as this.
        let there = read_manifest(&target)?;
        if there.attempt != manifest.attempt {
            return Err(Refused {
                target,
                attempt: there.attempt,
                mine: manifest.attempt.clone(),
            }
            .into());
        }
    } else {
        fs::rename(partial, &target).with_context(|| format!("committing {}", target.display()))?;
    }
    sync_folder(checkpoints)?;
    Ok(target)
}

/// Writes a new file of these pieces, straight from where they lie, and syncs it. The digests are of memory, chunk by chunk.
fn write_synced(path: &Path, pieces: &[&[u8]]) -> Result<(Vec<blake3::Hash>, Seconds)> {
    let in_file = || format!("writing {}", path.display());
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .open(path)
        .with_context(in_file)?;
    let mut seconds = Seconds::default();
    let (mut chunks, mut hasher, mut room) = (Vec::new(), blake3::Hasher::new(), CHUNK_BYTES as usize);
    for piece in pieces {
        let mut rest = *piece;
        while !rest.is_empty() {
            let (now, later) = rest.split_at(rest.len().min(room));
            rest = later;
            // On this thread alone: the others belong to the step that goes on meanwhile.
            seconds.digest += timed(|| {
                hasher.update(now);
            });
            room -= now.len();
            if room == 0 {
                chunks.push(hasher.finalize());
                hasher.reset();
                room = CHUNK_BYTES as usize;
            }
            let mut result = Ok(());
            seconds.write += timed(|| result = file.write_all(now));
            result.with_context(in_file)?;
        }
    }
    if room < CHUNK_BYTES as usize {
        chunks.push(hasher.finalize());
    }
    let mut result = Ok(());
    seconds.sync += timed(|| result = file.sync_all());
    result.with_context(|| format!("syncing {}", path.display()))?;
    let (expected, found) = (
        pieces.iter().map(|piece| piece.len() as u64).sum::<u64>(),
        file.metadata()?.len(),
    );
    ensure!(
        found == expected,
        io::Error::other(format!(
            "{} has {found} bytes of the {expected} that were written; the file system loses writes",
            path.display()
        ))
    );
    Ok((chunks, seconds))
}

fn timed(work: impl FnOnce()) -> f64 {
    let started = std::time::Instant::now();
    work();
    started.elapsed().as_secs_f64()
}

/// Makes a folder and what is missing above it, and syncs what has changed.
pub(super) fn make_folder(folder: &Path) -> Result<()> {
    fs::create_dir_all(folder).with_context(|| format!("making {}", folder.display()))?;
    folder.parent().map_or(Ok(()), sync_folder)
}

pub(super) fn sync_folder(folder: &Path) -> Result<()> {
    File::open(folder)
        .and_then(|file| file.sync_all())
        .with_context(|| format!("syncing {}", folder.display()))
}

/// Seconds since 1970.
pub fn unix_time() -> f64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs_f64()
}
