//! What a run will take, computed beforehand: parameters, memory, bytes on the wire, time. Pure arithmetic over the plan and the
//! model's sizes, by the rules with which the run allocates and counts. docs/scaling.md says what is assumed.

pub mod checkpoint;
pub mod forecast;
pub mod hardware;
pub mod memory;
pub mod sizes;
pub mod time;
pub mod traffic;

pub use forecast::{Choice, Forecast};
pub use hardware::Hardware;
pub use memory::{Activations, At, Besides, Budget, Division, Memory};
pub use sizes::{Block, Buckets, Parameters, Sizes};
pub use time::Place;
pub use traffic::Traffic;
