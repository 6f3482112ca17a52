//! Panglot on a real Slurm cluster: four nodes with addresses and names of their own, on this machine.

mod doctor;
mod faults;
mod fixture;
mod gpus;
mod jobs;
mod places;
mod soak;
mod training;

/// A line that `bench_cluster` collects into bench/results/cluster.json; shown with --nocapture.
fn figure(name: &str, value: f64) {
    println!("{name} {value:.3}");
}
