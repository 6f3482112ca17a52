//! Files that others read: finished or invisible.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use anyhow::Context;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::rendezvous::secret::random;

/// Writes beside, syncs, renames. What is random in the name beside keeps ranks that write the same file apart: processes of two
/// hosts may have one number.
pub fn write_atomically(file: &Path, content: &[u8]) -> anyhow::Result<()> {
    let write = || -> io::Result<()> {
        let folder = file.parent().unwrap_or(Path::new("."));
        fs::create_dir_all(folder)?;
        let name: [u8; 8] = random()?;
        let partial = beside(file, &format!("{:016x}.partial", u64::from_le_bytes(name)));
        let mut out = File::create_new(&partial)?;
        out.write_all(content)?;
        out.sync_all()?;
        fs::rename(&partial, file)?;
        File::open(folder)?.sync_all()
    };
    write().with_context(|| format!("cannot write {}", file.display()))
}

pub fn write_json(file: &Path, value: &impl Serialize) -> anyhow::Result<()> {
    let mut text = serde_json::to_vec_pretty(value)?;
    text.push(b'\n');
    write_atomically(file, &text)
}

/// Of a file of JSON objects, one a line, the whole lines whose `step` is before this one stay; the others, and what a death
/// left of the last, go. A file that is not there is well.
pub fn keep_steps_before(file: &Path, step: u64) -> anyhow::Result<()> {
    let Ok(text) = fs::read_to_string(file) else {
        return Ok(());
    };
    let early = |line: &&str| {
        let line: Option<serde_json::Value> = serde_json::from_str(line).ok();
        line.and_then(|line| line["step"].as_u64()).is_some_and(|of| of < step)
    };
    let kept: String = text.lines().filter(early).flat_map(|line| [line, "\n"]).collect();
    write_atomically(file, kept.as_bytes())
}

/// Of the value as JSON, in hexadecimal digits.
pub fn digest_of(value: &impl Serialize) -> anyhow::Result<String> {
    Ok(blake3::hash(&serde_json::to_vec(value)?).to_hex().to_string())
}

pub fn read_json<T: DeserializeOwned>(file: &Path) -> anyhow::Result<T> {
    let text = fs::read(file).with_context(|| format!("cannot read {}", file.display()))?;
    serde_json::from_slice(&text).with_context(|| format!("{} is not what it should be", file.display()))
}

/// Makes a folder that only its owner may look into: a run's holds the secret by which its ranks meet. One that is there stays as
/// it is, so that whoever means to share a run makes its folder first.
pub fn make_private(folder: &Path) -> anyhow::Result<()> {
    let make = || {
        folder.parent().map_or(Ok(()), fs::create_dir_all)?;
        match fs::DirBuilder::new().mode(0o700).create(folder) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            made => made,
        }
    };
    make().with_context(|| format!("cannot create {}", folder.display()))
}

/// As [`read_json`]; `None` where there is no such file.
///
/// # Errors
/// Also where it cannot be told whether there is one: what a file system does not show now is not gone.
pub fn read_json_if_there<T: DeserializeOwned>(file: &Path) -> anyhow::Result<Option<T>> {
    match read_json(file) {
        Ok(value) => Ok(Some(value)),
        Err(error) => match error.downcast_ref::<std::io::Error>() {
            Some(cause) if cause.kind() == std::io::ErrorKind::NotFound => Ok(None),
            _ => Err(error),
        },
    }
}

/// `runs/demo` with `old` → `runs/demo.old`: on the same file system, so that a rename is enough.
pub fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".");
    name.push(suffix);
    path.with_file_name(name)
}

/// As the user would type it: relative to the working directory where it lies inside.
pub fn shown(path: &Path) -> String {
    let here = std::env::current_dir().unwrap_or_default();
    path.strip_prefix(&here).unwrap_or(path).display().to_string()
}

pub fn remove_folder(folder: &Path) -> anyhow::Result<()> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", folder.display()))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_private_folder_is_its_owner_s_and_one_that_is_there_stays_as_it_is() {
        let root = tempfile::tempdir().unwrap();
        let mode = |folder: &Path| fs::metadata(folder).unwrap().permissions().mode() & 0o777;
        let made = root.path().join("runs/mine");
        make_private(&made).unwrap();
        make_private(&made).unwrap();
        assert_eq!(mode(&made), 0o700);
        let shared = root.path().join("shared");
        fs::create_dir(&shared).unwrap();
        fs::set_permissions(&shared, fs::Permissions::from_mode(0o750)).unwrap();
        make_private(&shared).unwrap();
        assert_eq!(mode(&shared), 0o750);
        let file = root.path().join("file");
        fs::write(&file, "").unwrap();
        assert!(make_private(&file.join("below")).is_err());
    }
}
