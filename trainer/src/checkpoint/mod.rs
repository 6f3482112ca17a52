//! Checkpoints of a run: what of the training state goes into one and comes back out, and how the ranks agree on it. The files
//! themselves are `launcher::checkpoint`'s.

mod resume;
mod saver;
mod snapshot;

pub use resume::{choose, load, set_aside};
pub use saver::{Committed, Outcome, Saver, WritesFailed};
pub use snapshot::Snapshot;

use launcher::checkpoint::Best;

/// Where a run stands.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Progress {
    pub step: u64,
    pub targets_so_far: u64,
    /// What did best on held-out text up to here.
    pub best: Option<Best>,
}
