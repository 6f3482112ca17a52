//! Finding, verifying and reading checkpoints. Everything that is read is checked before it is believed: digests, sizes before
//! memory is allocated, names; what is wrong is told with the file's name.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use rayon::prelude::*;
use safetensors::Dtype;

use super::manifest::{FileEntry, MANIFEST, MOST_MANIFEST_BYTES, Manifest, digest_of_chunks, step_of};

/// Names of the folders in `checkpoints`; none where it is missing.
pub(super) fn folders(checkpoints: &Path) -> Result<Vec<String>> {
    let entries = match fs::read_dir(checkpoints) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.with_context(|| format!("reading {}", checkpoints.display()))?,
    };
    let mut names = Vec::new();
    for entry in entries {
        let entry = entry.with_context(|| format!("reading {}", checkpoints.display()))?;
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            names.extend(entry.file_name().into_string().ok());
        }
    }
    names.sort();
    Ok(names)
}

/// Checkpoints by name, whole or not, oldest first.
pub fn list(checkpoints: &Path) -> Result<Vec<(u64, PathBuf)>> {
    let steps = folders(checkpoints)?.into_iter().filter_map(|name| {
        let step = step_of(&name)?;
        Some((step, checkpoints.join(name)))
    });
    let mut found: Vec<_> = steps.collect();
    found.sort();
    Ok(found)
}

/// What else lies there: under way, damaged, on its way out.
pub fn leftovers(checkpoints: &Path) -> Result<Vec<String>> {
    let mut names = folders(checkpoints)?;
    names.retain(|name| name.starts_with("step-") && step_of(name).is_none());
    Ok(names)
}

/// What [`newest`] found.
pub struct Found {
    pub folder: PathBuf,
    pub manifest: Manifest,
    /// Newer checkpoints that failed verification, each with what is wrong.
    pub rejected: Vec<(PathBuf, String)>,
}

/// The newest checkpoint whose every file verifies. `Ok(None)`: there is none at all.
///
/// # Errors
/// When checkpoints exist but none verifies: starting over in silence would be a different run.
pub fn newest(checkpoints: &Path) -> Result<Option<Found>> {
    let mut rejected = Vec::new();
    for (_, folder) in list(checkpoints)?.into_iter().rev() {
        match verify(&folder) {
            Ok(manifest) => {
                return Ok(Some(Found {
                    folder,
                    manifest,
                    rejected,
                }));
            }
            Err(error) => rejected.push((folder, format!("{error:#}"))),
        }
    }
    none_verifies(checkpoints, &rejected)?;
    Ok(None)
}

/// # Errors
/// Where there were checkpoints.
pub fn none_verifies(checkpoints: &Path, rejected: &[(PathBuf, String)]) -> Result<()> {
    let reasons: Vec<&str> = rejected.iter().map(|(_, why)| why.as_str()).collect();
    ensure!(
        rejected.is_empty(),
        "no checkpoint in {} can be read:\n  {}\nmove them away to start from step 0",
        checkpoints.display(),
        reasons.join("\n  ")
    );
    Ok(())
}

/// Checks the manifest, that its files and no others are there, and every digest.
pub fn verify(checkpoint: &Path) -> Result<Manifest> {
    let manifest = read_manifest(checkpoint)?;
    check_listing(checkpoint, &manifest)?;
    for file in &manifest.files {
        verify_file(checkpoint, file, manifest.chunk_bytes)?;
    }
    Ok(manifest)
}

/// Reads the manifest, which must match its own digest and its folder's name.
pub fn read_manifest(checkpoint: &Path) -> Result<Manifest> {
    let path = checkpoint.join(MANIFEST);
    let in_file = || path.display().to_string();
    let mut file = open_plain(&path)?;
    let length = file.metadata().with_context(in_file)?.len();
    ensure!(
        length <= MOST_MANIFEST_BYTES,
        "{} has {length} bytes, no manifest is that large",
        path.display()
    );
    let mut text = Vec::with_capacity(length as usize);
    file.read_to_end(&mut text).with_context(in_file)?;
    let manifest = Manifest::unseal(&text).with_context(in_file)?;
    let name = checkpoint
        .file_name()
        .and_then(|name| name.to_str())
        .unwrap_or_default();
    if let Some(step) = step_of(name) {
        ensure!(
            step == manifest.step,
            "{} says that it is of step {}; the folder has been renamed",
            path.display(),
            manifest.step
        );
    }
    Ok(manifest)
}

/// The files that the manifest names are there, each of its size, and no others (but hidden ones, which systems leave).
pub fn check_listing(checkpoint: &Path, manifest: &Manifest) -> Result<()> {
    for file in &manifest.files {
        let path = checkpoint.join(&file.name);
        let length = open_plain(&path)?.metadata()?.len();
        ensure!(
            length == file.bytes,
            "{} has {length} bytes, its manifest says {}",
            path.display(),
            file.bytes
        );
    }
    for entry in fs::read_dir(checkpoint).with_context(|| checkpoint.display().to_string())? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let known = name == MANIFEST || name.starts_with('.') || manifest.files.iter().any(|file| *file.name == *name);
        ensure!(known, "{} is not named in its manifest", path.display());
    }
    Ok(())
}

/// Opens a regular file; a link could point anywhere.
fn open_plain(path: &Path) -> Result<File> {
    let kind = fs::symlink_metadata(path).with_context(|| path.display().to_string())?;
    ensure!(kind.is_file(), "{} is not a plain file", path.display());
    File::open(path).with_context(|| path.display().to_string())
}

/// Checks one file's length and digests, several chunks at a time.
pub fn verify_file(folder: &Path, entry: &FileEntry, chunk_bytes: u64) -> Result<()> {
    let path = folder.join(&entry.name);
    let file = open_plain(&path)?;
    let length = file.metadata().with_context(|| path.display().to_string())?.len();
    ensure!(
        length == entry.bytes,
        "{} has {length} bytes, its manifest says {}",
        path.display(),
        entry.bytes
    );
    let largest = entry.bytes.min(chunk_bytes) as usize;
    let chunk = |buffer: &mut Vec<u8>, index: usize| -> Result<blake3::Hash> {
        let start = index as u64 * chunk_bytes;
        let part = &mut buffer[..(entry.bytes - start).min(chunk_bytes) as usize];
        file.read_exact_at(part, start)
            .with_context(|| format!("reading {}", path.display()))?;
        let found = blake3::hash(part);
        ensure!(
            found.to_hex().as_str() == entry.chunks[index],
            "{} does not match its digest in bytes {start} to {}",
            path.display(),
            start + part.len() as u64
        );
        Ok(found)
    };
    let chunks: Vec<blake3::Hash> = (0..entry.chunks.len())
        .into_par_iter()
        .map_init(|| vec![0; largest], chunk)
        .collect::<Result<_>>()?;
    ensure!(
        digest_of_chunks(&chunks).to_hex().as_str() == entry.blake3,
        "{} does not match its digest",
        path.display()
    );
    Ok(())
}

/// A safetensors file's header, and where its values begin. `size`: of the whole file.
fn header(from: &mut impl Read, size: u64) -> Result<(safetensors::tensor::Metadata, u64)> {
    let mut length = [0; 8];
    from.read_exact(&mut length)?;
    let length = u64::from_le_bytes(length);
    ensure!(
        length <= size.saturating_sub(8),
        "its header claims {length} bytes in a file of {size}"
    );
    let mut text = vec![0; length as usize];
    from.read_exact(&mut text)?;
    let header: safetensors::tensor::Metadata = serde_json::from_slice(&text)?;
    // As many values as the file has room for, so that no place that is read overflows.
    ensure!(
        header.data_len() as u64 <= size - 8 - length,
        "its header claims {} bytes of values in a file of {size}",
        header.data_len()
    );
    Ok((header, 8 + length))
}

/// For the fuzz target: no bytes make it panic, and values lie where they say.
pub fn fuzz(mut bytes: &[u8]) {
    let size = bytes.len() as u64;
    if let Ok((header, data_start)) = header(&mut bytes, size) {
        for info in header.tensors().values() {
            let (start, end) = info.data_offsets;
            assert!(start <= end && data_start + end as u64 <= size);
        }
    }
}

/// Reads ranges of tensors of a safetensors file without reading the rest.
pub struct SliceFile {
    file: File,
    path: PathBuf,
    header: safetensors::tensor::Metadata,
    data_start: u64,
}

impl SliceFile {
    pub fn open(path: &Path) -> Result<SliceFile> {
        let mut file = open_plain(path)?;
        let size = file.metadata().with_context(|| path.display().to_string())?.len();
        let (header, data_start) = header(&mut file, size).with_context(|| path.display().to_string())?;
        Ok(SliceFile {
            file,
            path: path.into(),
            header,
            data_start,
        })
    }

    /// Copies the elements of tensor `name` that lie both in `theirs`, which it covers, and in `mine` to their place in `out`,
    /// which is the f32 bytes of `mine`.
    pub fn read_overlap(&self, name: &str, theirs: (u64, u64), mine: (u64, u64), out: &mut [u8]) -> Result<()> {
        let (start, end) = (theirs.0.max(mine.0), theirs.1.min(mine.1));
        if start >= end {
            return Ok(());
        }
        let Some(info) = self.header.info(name) else {
            bail!("{} lacks {name}", self.path.display())
        };
        let elements = theirs.1 - theirs.0;
        ensure!(
            info.dtype == Dtype::F32 && info.shape == [elements as usize],
            "{}: {name} is {:?} {:?}, expected F32 [{elements}]",
            self.path.display(),
            info.dtype,
            info.shape,
        );
        let offset = self.data_start + info.data_offsets.0 as u64 + 4 * (start - theirs.0);
        let part = &mut out[4 * (start - mine.0) as usize..4 * (end - mine.0) as usize];
        self.file
            .read_exact_at(part, offset)
            .with_context(|| format!("reading {name} of {}", self.path.display()))
    }
}
