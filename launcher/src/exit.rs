//! Exit codes: what a job script or a supervisor may conclude from each.

pub const FINISHED: i32 = 0;
/// `panglot job is-finished`: something is left to do.
pub const NOT_DONE: i32 = 1;
/// `panglot job ended`: another attempt is due, at once on the same nodes. No code of a run's own, so that no end is taken for it.
pub const AGAIN_HERE: i32 = 3;
/// `panglot job ended`: another attempt is due, by way of the queue.
pub const AGAIN_LATER: i32 = 4;
/// The user or the config is at fault: never retry.
pub const USER: i32 = 2;
/// A bug of ours.
pub const INTERNAL: i32 = 70;
/// Files could not be read or written.
pub const IO: i32 = 74;
/// A checkpoint is written and the run wants more time.
pub const MORE_TIME: i32 = 75;
/// A peer was lost or hangs.
pub const PEER: i32 = 76;
/// Looked at before the start and refused, such as ranks that do not run the same.
pub const REFUSED: i32 = 77;
