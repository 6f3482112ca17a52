//! Panglot on a real Slurm cluster: four nodes with addresses and names of their own, on this machine.

mod doctor;
mod fixture;
mod jobs;
mod soak;

/// A figure for bench/results/cluster.json, printed where tests run with --nocapture.
fn figure(name: &str, value: f64) {
    eprintln!("figure {name} = {value:.2}");
}
