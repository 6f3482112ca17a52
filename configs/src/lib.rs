//! The config twice: as typed (YAML, checked against what a run can do) and as run ([`Plan`], complete and immutable).

mod plan;

pub use plan::*;
