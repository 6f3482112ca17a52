//! Panglot on a real Slurm cluster: four nodes with addresses and names of their own, on this machine.

mod fixture;
mod jobs;
