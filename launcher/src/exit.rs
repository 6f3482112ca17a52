//! Exit codes: what a job script or a supervisor may conclude from each.

pub const FINISHED: i32 = 0;
/// `panglot job done`: something is left to do.
pub const NOT_DONE: i32 = 1;
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
