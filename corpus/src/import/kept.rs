//! What an interrupted import leaves for the next: results beside the unfinished corpus, each under the fingerprint of
//! everything it was made from. Nothing is synced before the end: a result carries its files' digests, and is believed if
//! they are right, so that a cut of power costs no more than the languages it tore.

use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// Inside the unfinished corpus folder.
const FOLDER: &str = ".import";

/// The folder of results; locked, so that two imports do not write one corpus.
pub(crate) struct Kept {
    folder: PathBuf,
    _lock: File,
}

#[derive(Serialize, Deserialize)]
struct Entry<T> {
    fingerprint: String,
    result: T,
}

impl Kept {
    /// Opens what an import with the same settings left in `partial`; what one with others left, or, `afresh`, anything, is
    /// removed.
    pub fn open(partial: &Path, settings: &str, afresh: bool) -> Result<Kept> {
        let folder = partial.join(FOLDER);
        fs::create_dir_all(&folder).map_err(Error::io("create", &folder))?;
        let path = folder.join("lock");
        let lock = File::create(&path).map_err(Error::io("create", &path))?;
        // Some file systems have no locks; then nobody is kept out.
        if let Err(TryLockError::WouldBlock) = lock.try_lock() {
            return Err(Error::ImportRuns {
                path: partial.to_path_buf(),
            });
        }
        let kept = Kept { folder, _lock: lock };
        if afresh || kept.get::<()>("settings", settings).is_none() {
            kept.remove_others(partial)?;
            kept.put("settings", settings, &())?;
        }
        Ok(kept)
    }

    /// Where an import puts what it needs until it ends.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    pub fn get<T: DeserializeOwned>(&self, name: &str, fingerprint: &str) -> Option<T> {
        let bytes = fs::read(self.file(name)).ok()?;
        let entry: Entry<T> = serde_json::from_slice(&bytes).ok()?;
        (entry.fingerprint == fingerprint).then_some(entry.result)
    }

    /// A torn result is no JSON, and its language is done again.
    pub fn put<T: Serialize>(&self, name: &str, fingerprint: &str, result: &T) -> Result<()> {
        let (fingerprint, path) = (fingerprint.to_owned(), self.file(name));
        let bytes = serde_json::to_vec(&Entry { fingerprint, result }).map_err(Error::json(&path))?;
        let beside = path.with_extension("partial");
        fs::write(&beside, bytes).map_err(Error::io("write", &beside))?;
        fs::rename(&beside, &path).map_err(Error::io("rename", &beside))
    }

    /// Whether any language's work is here.
    pub fn is_worth_keeping(&self) -> bool {
        let entries = fs::read_dir(&self.folder).into_iter().flatten().flatten();
        let mut names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
        names.any(|name| name.ends_with(".json") && name != "settings.json")
    }

    /// The corpus is complete.
    pub fn remove(self) -> Result<()> {
        fs::remove_dir_all(&self.folder).map_err(Error::io("remove", &self.folder))
    }

    fn file(&self, name: &str) -> PathBuf {
        self.folder.join(format!("{name}.json"))
    }

    fn remove_others(&self, partial: &Path) -> Result<()> {
        for folder in [partial, &self.folder] {
            for entry in fs::read_dir(folder).map_err(Error::io("list", folder))? {
                let path = entry.map_err(Error::io("list", folder))?.path();
                if path == self.folder || path == self.folder.join("lock") {
                    continue;
                }
                let removed = match path.is_dir() {
                    true => fs::remove_dir_all(&path),
                    false => fs::remove_file(&path),
                };
                removed.map_err(Error::io("remove", &path))?;
            }
        }
        Ok(())
    }
}
