//! Checkpoints as files: names, the manifest, how one is committed, verified, chosen, kept, recut. Bytes only, no tensors and
//! no ranks, so that `panglot checkpoint` does all of it on a login node and the workers call the same functions.
//!
//! ```text
//! RUN/run.lock                                   the attempt that may commit
//! RUN/checkpoints/best.json                      the step that did best on held-out text
//! RUN/checkpoints/step-00000020/                 whole if it has this name; 20 steps were taken before it
//!     slice-00000-of-00004.safetensors           θ, m and v of a range of every bucket, f32
//!     manifest.json                              written last; digests of everything, its own included
//! RUN/checkpoints/step-00000020.NONCE-3.partial/ under way, or left by an attempt that died
//! RUN/checkpoints/step-00000020.NONCE.damaged/   did not verify when a run was resumed
//! RUN/checkpoints/step-00000020.removed/         on its way out
//! ```

pub mod best;
pub mod commit;
pub mod fence;
pub mod identity;
pub mod keep;
pub mod manifest;
pub mod read;
pub mod reshard;

pub use best::Best;
pub use commit::{Part, Refused, Written, commit, write_slices};
pub use fence::{Fence, Lost, Nonce};
pub use identity::{Identity, differences};
pub use keep::Keep;
pub use manifest::{FileEntry, GuardState, Manifest, TensorEntry};
pub use read::{Found, SliceFile, newest, read_manifest, verify};

/// The run's checkpoints lie in this folder of it.
pub const FOLDER: &str = "checkpoints";
