//! A digest of files as they lie on disk, to learn whether what was made from them is still fresh.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use crate::{Error, Result};

/// Digest of a file, or of a folder's files, by name and size, and by content where they are small, by time of change
/// where they are large: reading 600 GB to learn that nothing has changed would take longer than it saves.
pub fn fingerprint(path: &Path) -> Result<String> {
    let mut found = Vec::new();
    list_files(path, &mut found)?;
    found.sort();
    let mut hasher = blake3::Hasher::new();
    let mut content = Vec::new();
    for file in &found {
        let metadata = fs::metadata(file).map_err(Error::io("read", file))?;
        let name = file.strip_prefix(path).unwrap_or(file).as_os_str().as_encoded_bytes();
        hasher
            .update(&(name.len() as u64).to_le_bytes())
            .update(name)
            .update(&metadata.len().to_le_bytes());
        if metadata.len() <= READ_WHOLE_UP_TO {
            content.clear();
            fs::File::open(file)
                .and_then(|mut file| file.read_to_end(&mut content))
                .map_err(Error::io("read", file))?;
            hasher.update(&content);
        } else {
            let changed = metadata
                .modified()
                .ok()
                .and_then(|time| time.duration_since(UNIX_EPOCH).ok());
            hasher.update(&changed.unwrap_or_default().as_nanos().to_le_bytes());
        }
    }
    Ok(hasher.finalize().to_hex().to_string())
}

const READ_WHOLE_UP_TO: u64 = 1 << 20;

/// Bytes of a file, or of all files in a folder.
pub(crate) fn size(path: &Path) -> Result<u64> {
    let mut found = Vec::new();
    list_files(path, &mut found)?;
    let size = |file: &PathBuf| Ok(fs::metadata(file).map_err(Error::io("read", file))?.len());
    found.iter().map(size).sum()
}

fn list_files(path: &Path, found: &mut Vec<PathBuf>) -> Result<()> {
    if !path.is_dir() {
        found.push(path.to_owned());
        return Ok(());
    }
    for entry in fs::read_dir(path).map_err(Error::io("list", path))? {
        list_files(&entry.map_err(Error::io("list", path))?.path(), found)?;
    }
    Ok(())
}
