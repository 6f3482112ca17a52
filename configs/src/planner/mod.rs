//! What a run will take, computed beforehand: parameters, memory, bytes on the wire, time. Pure arithmetic over the plan and the
//! model's sizes, by the rules with which the run allocates and counts.

pub mod memory;
pub mod sizes;
pub mod traffic;

pub use memory::{Activations, At, Budget, Division, Memory};
pub use sizes::{Block, Buckets, Parameters, Sizes};
pub use traffic::Traffic;
