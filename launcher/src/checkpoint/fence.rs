//! One attempt at a time may commit. `run.lock` holds the nonce of the newest; whoever finds another's there has been
//! replaced and commits nothing any more, however long it was frozen.
//!
//! A look at the lock and the rename that commits are two steps, and a writer may freeze between them. So a new attempt
//! first puts its nonce into the lock, then takes every partial folder away by a rename, and only then chooses what to resume
//! from. A writer that had looked before has lost its folder, and its rename fails; one that makes its folder later finds the
//! new nonce. What it commits before the folders are taken is there to be chosen. One that froze before it had taken the lock
//! is the newer attempt when it wakes: it takes the run over, chooses anew, and the other ends.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::commit::{make_folder, sync_folder};
use super::read::folders;
use crate::files;

/// Names an attempt: a job's number does not, since a thawed node's ranks run beside the new attempt under the same one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Nonce(String);

/// Hexadecimal digits of a nonce: 64 bits of the kernel's randomness.
pub const NONCE_LENGTH: usize = 16;

impl Nonce {
    pub fn new() -> Result<Nonce> {
        let mut bytes = [0; NONCE_LENGTH / 2];
        File::open("/dev/urandom")
            .and_then(|mut random| random.read_exact(&mut bytes))
            .context("reading /dev/urandom")?;
        Ok(Nonce(bytes.iter().map(|byte| format!("{byte:02x}")).collect()))
    }

    /// As another rank has drawn it.
    pub fn from_text(text: &str) -> Nonce {
        Nonce(text.to_owned())
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// Another attempt holds the run.
#[derive(Debug, thiserror::Error)]
#[error(
    "this attempt ({mine}) has been replaced: {} holds {holder}. It commits no checkpoint any more; let the other one run, or \
     end it and start again",
    lock.display()
)]
pub struct Lost {
    lock: PathBuf,
    mine: String,
    holder: String,
}

#[derive(Serialize, Deserialize)]
struct Lock {
    attempt: String,
    /// For people.
    host: String,
    process: u32,
    unix_time: f64,
}

/// The right to commit, until a newer attempt takes it.
#[derive(Clone, Debug)]
pub struct Fence {
    lock: PathBuf,
    nonce: Nonce,
}

impl Fence {
    /// Takes the run over: from here on no other attempt commits. Rank 0 calls it before it looks for a checkpoint.
    pub fn take(run: &Path, checkpoints: &Path, nonce: &Nonce) -> Result<Fence> {
        make_folder(checkpoints)?;
        let fence = Fence {
            lock: run.join("run.lock"),
            nonce: nonce.clone(),
        };
        let lock = Lock {
            attempt: nonce.0.clone(),
            host: nix::unistd::gethostname()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned(),
            process: std::process::id(),
            unix_time: super::commit::unix_time(),
        };
        files::write_json(&fence.lock, &lock)?;
        sweep(checkpoints)?;
        Ok(fence)
    }

    /// # Errors
    /// [`Lost`] where another attempt holds the run; others where that cannot be told.
    pub fn check(&self) -> Result<()> {
        let lock: Lock = files::read_json(&self.lock)?;
        if lock.attempt != self.nonce.0 {
            return Err(Lost {
                lock: self.lock.clone(),
                mine: self.nonce.0.clone(),
                holder: format!("{} of {} (process {})", lock.attempt, lock.host, lock.process),
            }
            .into());
        }
        Ok(())
    }

    pub fn nonce(&self) -> &Nonce {
        &self.nonce
    }
}

/// Takes away what other attempts have left unfinished: by a rename, which is at once, then bit by bit.
fn sweep(checkpoints: &Path) -> Result<()> {
    for name in folders(checkpoints)? {
        if name.ends_with(".partial") {
            let dead = format!("{name}.removed");
            match fs::rename(checkpoints.join(&name), checkpoints.join(&dead)) {
                // Its writer was quicker.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                moved => moved.with_context(|| format!("taking {name} away"))?,
            }
        }
    }
    sync_folder(checkpoints)?;
    remove_dead(checkpoints)
}

/// Removes what has been taken away.
pub fn remove_dead(checkpoints: &Path) -> Result<()> {
    for name in folders(checkpoints)?.iter().filter(|name| name.ends_with(".removed")) {
        files::remove_folder(&checkpoints.join(name))?;
    }
    Ok(())
}
