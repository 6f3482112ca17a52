//! How a checkpoint comes to be, in the order in which it does: each rank writes its slices into the partial folder, syncs them, and
//! meanwhile digests them from memory and compares what reads back; then rank 0 writes the manifest, syncs, looks at the fence, renames. Until the
//! rename there is no checkpoint, after it there is a whole one.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};

use super::Fence;
use super::manifest::{CHUNK_BYTES, FileEntry, MANIFEST, Manifest, digest_of_chunks, slice_file, step_name};
use super::read::read_manifest;

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
    /// What digesting and reading back took beyond the sync that they go on beside.
    pub waited: f64,
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
    let (chunks, seconds) = write_synced(&path, &pieces)?;
    let entry = FileEntry {
        bytes: pieces.iter().map(|piece| piece.len() as u64).sum(),
        blake3: digest_of_chunks(&chunks).to_hex().to_string(),
        chunks: chunks.iter().map(|chunk| chunk.to_hex().to_string()).collect(),
        name,
        ranges,
    };
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
    write_synced(&partial.join(MANIFEST), &[&text])?;
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
        // The same bytes once more. Should they not go, they are swept with what dead attempts leave.
        let _ = fs::remove_dir_all(partial);
    } else {
        fs::rename(partial, &target).with_context(|| format!("committing {}", target.display()))?;
    }
    sync_folder(checkpoints)?;
    Ok(target)
}

/// Writes a new file of these pieces, straight from where they lie, and syncs it. While the disk is at it, one more thread
/// digests what lies in memory, chunk by chunk, and compares it with what reads back: most saves wait for their disk, so
/// that costs them next to nothing. The other cores belong to the step that goes on meanwhile.
fn write_synced(path: &Path, pieces: &[&[u8]]) -> Result<(Vec<blake3::Hash>, Seconds)> {
    let in_file = || format!("writing {}", path.display());
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .open(path)
        .with_context(in_file)?;
    let mut seconds = Seconds::default();
    let mut result = Ok(());
    seconds.write = timed(|| result = pieces.iter().try_for_each(|piece| file.write_all(piece)));
    result.with_context(in_file)?;
    let started = Instant::now();
    let (synced, checked) = std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("checkpoint-check".into());
        let thread = thread.spawn_scoped(scope, || check(&file, pieces))?;
        let synced = file.sync_all();
        seconds.sync = started.elapsed().as_secs_f64();
        let checked = thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        io::Result::Ok((synced, checked))
    })
    .context("starting a thread that reads the checkpoint back")?;
    seconds.waited = started.elapsed().as_secs_f64() - seconds.sync;
    synced.with_context(|| format!("syncing {}", path.display()))?;
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
    let checked = checked.with_context(|| format!("reading {} back at once", path.display()))?;
    (seconds.digest, seconds.verify) = (checked.digest, checked.verify);
    Ok((checked.chunks, seconds))
}

struct Checked {
    chunks: Vec<blake3::Hash>,
    digest: f64,
    verify: f64,
}

/// Digests of the pieces as they lie in memory, and whether the file holds the same.
fn check(file: &File, pieces: &[&[u8]]) -> io::Result<Checked> {
    const BUFFER_BYTES: usize = 1 << 20;
    let mut found = Checked {
        chunks: Vec::new(),
        digest: 0.0,
        verify: 0.0,
    };
    let (mut hasher, mut room, mut place) = (blake3::Hasher::new(), CHUNK_BYTES as usize, 0);
    let mut buffer = vec![0; BUFFER_BYTES];
    for piece in pieces {
        let mut rest = *piece;
        while !rest.is_empty() {
            let (now, later) = rest.split_at(rest.len().min(room).min(BUFFER_BYTES));
            rest = later;
            found.digest += timed(|| {
                hasher.update(now);
            });
            room -= now.len();
            if room == 0 {
                found.chunks.push(hasher.finalize());
                hasher.reset();
                room = CHUNK_BYTES as usize;
            }
            let mut result = Ok(true);
            found.verify += timed(|| {
                let read = &mut buffer[..now.len()];
                result = file.read_exact_at(read, place).map(|()| read == now);
            });
            if !result? {
                let bytes = format!("bytes {place} to {} are not what was written", place + now.len() as u64);
                return Err(io::Error::other(bytes));
            }
            place += now.len() as u64;
        }
    }
    if room < CHUNK_BYTES as usize {
        found.chunks.push(hasher.finalize());
    }
    Ok(found)
}

fn timed(work: impl FnOnce()) -> f64 {
    let started = Instant::now();
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
