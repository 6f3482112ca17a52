//! Starts itself under mpirun with 1 … 4 ranks; each job runs every case in one program. `cargo test` alone runs all of it.

mod collectives;
mod zero;

use std::path::Path;
use std::process::Command;

use sharding::Comm;
use sharding::nccl::{self, Nccl};

/// What every rank of a job runs. `shared` is a folder of the job's own.
type Case = (&'static str, fn(comm: &dyn Comm, shared: &Path));

fn cases() -> Vec<Case> {
    [&zero::CASES[..], &collectives::CASES].concat()
}

/// A rank that fails a test must not leave its peers waiting in a collective: mpirun ends them all with it.
fn end_all_on_panic() {
    let print = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        print(info);
        std::process::abort();
    }));
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    tch::set_num_threads(1);
    match &arguments[..] {
        [child, world, shared] if child == "--rank-of" => {
            end_all_on_panic();
            let world = world.parse().expect("a number of ranks");
            let comm = sharding::join_through_mpi(world).expect("the ranks meet");
            run(comm.as_ref(), "MPI", Path::new(shared));
        }
        [child, world, shared] if child == "--gpu-of" => {
            let world = world.parse().expect("a number of ranks");
            let host = match world {
                1 => sharding::join(1),
                _ => sharding::join_through_mpi(world),
            };
            let host = host.expect("the ranks meet");
            nccl::gpus().expect("a GPU");
            // One node: ranks and GPUs have the same numbers.
            let gpu = host.rank();
            collectives::on(tch::Device::Cuda(gpu));
            let comm = Nccl::join(host, gpu, true).expect("the GPUs meet");
            println!("{}", comm.engine());
            run(&comm, "NCCL", Path::new(shared));
        }
        // As libtest answers; its other options choose nothing here.
        [list, ..] if list == "--list" => cases().iter().for_each(|(name, _)| println!("{name}: test")),
        _ => {
            let folder = tempfile::tempdir().expect("a folder");
            run(sharding::join(1).expect("one rank").as_ref(), "alone", folder.path());
            (1..=4).for_each(|ranks| under_mpirun("--rank-of", ranks));
            match nccl::gpus() {
                Ok(gpus) => under_mpirun("--gpu-of", gpus),
                Err(error) => println!("SKIPPED: every case on NCCL: {error}"),
            }
        }
    }
}

fn run(comm: &dyn Comm, engine: &str, shared: &Path) {
    for (name, case) in cases() {
        case(comm, shared);
        comm.barrier().expect("all ranks finish a case");
        if comm.rank() == 0 {
            println!("test {name} ... ok ({engine}, {} ranks)", comm.world());
        }
    }
}

fn under_mpirun(engine: &str, ranks: usize) {
    let folder = tempfile::tempdir().expect("a folder");
    let status = Command::new("mpirun")
        // Memory that is freed then leaves the process at once, and what is held can be measured.
        .env("MALLOC_MMAP_THRESHOLD_", "131072")
        .args([
            "--quiet",
            "--bind-to",
            "none",
            "--oversubscribe",
            "-n",
            &ranks.to_string(),
        ])
        .arg(std::env::current_exe().expect("a test knows where it is"))
        .args([engine, &ranks.to_string()])
        .arg(folder.path())
        .status()
        .expect("mpirun starts; set-up installs it");
    assert!(status.success(), "{ranks} ranks under mpirun ended with {status}");
}
