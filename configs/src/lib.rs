//! The config twice: as typed (YAML, checked against what a run can do) and as run ([`Plan`], complete and immutable).

mod check;
mod error;
mod plan;
pub mod planner;
mod raw;

use std::path::Path;

use serde::Serialize;

use check::Ranks;
pub use error::ConfigError;
pub use plan::*;
pub use planner::memory;

/// Reads `file`, puts `overrides` (`train.steps=5`) over it, checks everything and derives the plan.
/// Relative paths in a config are relative to the working directory, which recipes take to be the repository's root.
pub fn load(file: &Path, overrides: &[String]) -> Result<Plan, ConfigError> {
    load_for(file, overrides, Ranks::AsPlanned)
}

/// As [`load`] for what starts no training: its folders and settings are asked for, and a run that went by another number of
/// ranks than `launch.ranks` may have a global batch that this one does not divide.
pub fn load_for_any_ranks(file: &Path, overrides: &[String]) -> Result<Plan, ConfigError> {
    load_for(file, overrides, Ranks::Any)
}

fn load_for(file: &Path, overrides: &[String], ranks: Ranks) -> Result<Plan, ConfigError> {
    let raw = raw::read(file, overrides)?;
    check::plan(raw, ranks).map_err(|broken| ConfigError::rules(file, broken))
}

/// The name of a value: a digest of its JSON. Equal settings have equal names.
pub fn digest(value: &impl Serialize) -> String {
    let json = serde_json::to_vec(value).expect("settings are plain data");
    blake3::hash(&json).to_hex().to_string()
}
