//! Which of a run's checkpoints did best on held-out text. Every manifest says which it was when it was written, so that a run
//! that goes on from there compares with it; `best.json` says it of the newest, for pruning and for people.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::manifest::step_name;
use crate::files;

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Best {
    pub step: u64,
    pub macro_bits_per_byte: f64,
}

impl Best {
    /// `None`: no checkpoint was measured.
    ///
    /// # Errors
    /// When that cannot be told: nothing may be pruned then.
    pub fn read(checkpoints: &Path) -> Result<Option<Best>> {
        files::read_json_if_there(&Best::file(checkpoints))
    }

    /// Makes `best.json` say what a manifest says.
    pub fn note(best: Option<Best>, checkpoints: &Path) -> Result<()> {
        // Where it cannot be read, the manifest is right.
        if Best::read(checkpoints).is_ok_and(|noted| noted == best) {
            return Ok(());
        }
        let file = Best::file(checkpoints);
        match best {
            Some(best) => files::write_json(&file, &best),
            None => fs::remove_file(&file).with_context(|| format!("removing {}", file.display())),
        }
    }

    /// Where its checkpoint lies.
    pub fn folder(&self, checkpoints: &Path) -> PathBuf {
        checkpoints.join(step_name(self.step))
    }

    fn file(checkpoints: &Path) -> PathBuf {
        checkpoints.join("best.json")
    }
}
