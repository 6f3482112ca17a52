//! Finished or invisible: files and folders are written beside their place, synced, and renamed into it.
//! A reader, or a run killed at any instant, meets either the whole thing or the one that was there before.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;

use crate::{Error, Result};

/// A folder being written; invisible under its name until [`finish`](Self::finish). Dropped before, it is removed, unless
/// the next run is to [`resume`](Self::resume) it.
pub(crate) struct Unfinished {
    partial: PathBuf,
    finished: PathBuf,
    remove: bool,
}

impl Unfinished {
    /// Starts a folder that will stand at `out`. What is there already is replaced only if `marker`, the file that
    /// every such folder holds, says that it is one of ours.
    pub fn begin(out: &Path, marker: &'static str) -> Result<Self> {
        let mut folder = Unfinished::resume(out, marker)?;
        folder.remove = true;
        remove_folder(&folder.partial)?;
        fs::create_dir_all(&folder.partial).map_err(Error::io("create", &folder.partial))?;
        Ok(folder)
    }

    /// Goes on with what an earlier run left, or starts. Dropped before it is finished, the folder stays for the next.
    pub fn resume(out: &Path, marker: &'static str) -> Result<Self> {
        let occupied = out.exists() && fs::read_dir(out).map_or(true, |mut entries| entries.next().is_some());
        if occupied && !out.join(marker).is_file() {
            return Err(Error::Occupied {
                path: out.to_path_buf(),
                marker,
            });
        }
        let partial = beside(out, "partial");
        fs::create_dir_all(&partial).map_err(Error::io("create", &partial))?;
        Ok(Unfinished {
            partial,
            finished: out.to_path_buf(),
            remove: false,
        })
    }

    /// Leaves nothing for the next run.
    pub fn discard(mut self) {
        self.remove = true;
    }

    /// Where to write for now.
    pub fn path(&self) -> &Path {
        &self.partial
    }

    /// Makes the folder visible under its name. Files in it are expected to be synced already.
    pub fn finish(mut self) -> Result<()> {
        sync_folder(&self.partial)?;
        let old = beside(&self.finished, "old");
        remove_folder(&old)?;
        if self.finished.exists() {
            fs::rename(&self.finished, &old).map_err(Error::io("move aside", &self.finished))?;
        }
        fs::rename(&self.partial, &self.finished).map_err(Error::io("rename", &self.partial))?;
        self.remove = false;
        sync_folder(parent(&self.finished))?;
        remove_folder(&old)
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        if self.remove {
            // Best effort: the next run removes what stays.
            let _ = fs::remove_dir_all(&self.partial);
        }
    }
}

/// Reads the manifest of a finished folder; `what` it is and the `command` that makes it are for the sentence where it is not.
pub(crate) fn read_manifest<T: DeserializeOwned>(
    folder: &Path,
    marker: &'static str,
    what: &'static str,
    command: &'static str,
) -> Result<T> {
    let path = folder.join(marker);
    if !path.is_file() {
        return Err(Error::NotFinished {
            path: folder.to_path_buf(),
            what,
            marker,
            command,
        });
    }
    let bytes = fs::read(&path).map_err(Error::io("read", &path))?;
    serde_json::from_slice(&bytes).map_err(Error::json(&path))
}

/// Writes a file and syncs it; for files inside an [`Unfinished`] folder.
pub(crate) fn write_synced(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut file = File::create(path).map_err(Error::io("create", path))?;
    file.write_all(bytes).map_err(Error::io("write", path))?;
    file.sync_all().map_err(Error::io("sync", path))
}

/// Syncs files and folders, many at a time: a file system brings those that wait together to the disk at once.
pub(crate) fn sync_all(paths: &[PathBuf]) -> Result<()> {
    const AT_A_TIME: usize = 32;
    let sync = |paths: &[PathBuf]| paths.iter().try_for_each(|path| sync_folder(path));
    std::thread::scope(|scope| {
        let parts = paths.chunks(paths.len().div_ceil(AT_A_TIME).max(1));
        let threads: Vec<_> = parts.map(|part| scope.spawn(move || sync(part))).collect();
        let mut ends = threads
            .into_iter()
            .map(|thread| thread.join().expect("syncing does not panic"));
        ends.find(Result::is_err).unwrap_or(Ok(()))
    })
}

/// Replaces one file of a folder that others may be reading.
pub(crate) fn replace_file(path: &Path, bytes: &[u8]) -> Result<()> {
    let folder = parent(path);
    fs::create_dir_all(folder).map_err(Error::io("create", folder))?;
    let partial = beside(path, "partial");
    write_synced(&partial, bytes)?;
    fs::rename(&partial, path).map_err(Error::io("rename", &partial))?;
    sync_folder(folder)
}

/// Syncs a folder's entries, so that a rename in it outlives a power cut; or a file that somebody else wrote.
pub(crate) fn sync_folder(path: &Path) -> Result<()> {
    File::open(path)
        .and_then(|folder| folder.sync_all())
        .map_err(Error::io("sync", path))
}

/// `.name.suffix` in the same folder, hence on the same file system, where rename is atomic.
fn beside(path: &Path, suffix: &str) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!(".{name}.{suffix}"))
}

fn parent(path: &Path) -> &Path {
    path.parent()
        .filter(|p| !p.as_os_str().is_empty())
        .unwrap_or(Path::new("."))
}

/// Removes a folder that may not be there.
pub(crate) fn remove_folder(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Error::io("remove", path)(e)),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_is_finished_or_invisible() {
        let root = tempfile::tempdir().unwrap();
        let out = root.path().join("deep/corpus");
        for content in ["first", "second"] {
            let unfinished = Unfinished::begin(&out, "marker").unwrap();
            write_synced(&unfinished.path().join("marker"), content.as_bytes()).unwrap();
            assert_ne!(fs::read_to_string(out.join("marker")).unwrap_or_default(), content);
            unfinished.finish().unwrap();
            assert_eq!(fs::read_to_string(out.join("marker")).unwrap(), content);
        }
        drop(Unfinished::resume(&out, "marker").unwrap());
        assert_eq!(fs::read_dir(out.parent().unwrap()).unwrap().count(), 2, "to go on with");
        drop(Unfinished::begin(&out, "marker").unwrap());
        assert_eq!(
            fs::read_dir(out.parent().unwrap()).unwrap().count(),
            1,
            "nothing is left beside it"
        );
    }

    #[test]
    fn a_folder_of_somebody_else_is_not_replaced() {
        let root = tempfile::tempdir().unwrap();
        fs::write(root.path().join("thesis.tex"), "years of work").unwrap();
        let said = Unfinished::begin(root.path(), "corpus.json").err().unwrap().to_string();
        assert!(said.contains("no corpus.json in it"), "{said}");
        assert!(root.path().join("thesis.tex").exists());
    }
}
