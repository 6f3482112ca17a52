//! Starts itself under mpirun with 1 … 4 ranks; each job runs every case in one program. `cargo test` alone runs all of it.

mod collectives;
#[path = "../mpirun/mod.rs"]
mod mpirun;
mod zero;

use std::path::Path;

use mpirun::Case;
use sharding::cuda::nccl::{Nccl, UniqueId};
use sharding::staged::Staged;
use sharding::{Comm, cuda};

fn cases() -> Vec<Case> {
    [&zero::CASES[..], &collectives::CASES].concat()
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    tch::set_num_threads(1);
    match &arguments[..] {
        [child, world, shared] if child == "--rank-of" => {
            mpirun::end_all_on_panic();
            let world = world.parse().expect("a number of ranks");
            let comm = sharding::join_through_mpi(world).expect("the ranks meet");
            if cuda::driver_is_there() {
                println!("SKIPPED: a GPU that is not there is refused: a driver is here");
            } else {
                no_gpu(world);
            }
            mpirun::run(&cases(), comm.as_ref(), "MPI", Path::new(shared));
            // What goes through another memory and back; that it goes on beside other work is not asked of it.
            if world == 3 {
                let staged = Staged::of_everything(comm, tch::Device::Cpu);
                let cases: Vec<Case> = collectives::CASES
                    .into_iter()
                    .filter(|(name, _)| !name.contains("goes_on"))
                    .collect();
                mpirun::run(&cases, &staged, "staged MPI", Path::new(shared));
            }
        }
        [child, world, shared] if child == "--gpu-of" => {
            mpirun::end_all_on_panic();
            // Before the first tensor, so before the ranks meet.
            cuda::load().expect("a GPU");
            let world = world.parse().expect("a number of ranks");
            let host = match world {
                1 => sharding::join(1),
                _ => sharding::join_through_mpi(world),
            };
            let host = host.expect("the ranks meet");
            // One node: ranks and GPUs have the same numbers.
            let gpu = host.rank();
            collectives::on(cuda::device(gpu).expect("a GPU a rank"));
            let comm = Nccl::join(host, gpu, true).unwrap_or_else(|refused| panic!("{}", refused.error));
            println!("{}", comm.engine());
            mpirun::run(&cases(), &comm, "NCCL", Path::new(shared));
        }
        // As libtest answers; its other options choose nothing here.
        [list, ..] if list == "--list" => mpirun::list(&cases()),
        _ => {
            let folder = tempfile::tempdir().expect("a folder");
            let alone = sharding::join(1).expect("one rank");
            mpirun::run(&cases(), alone.as_ref(), "alone", folder.path());
            let start = |kind, ranks| mpirun::start(kind, ranks, tempfile::tempdir().expect("a folder").path());
            (1..=4).for_each(|ranks| start("--rank-of", ranks));
            match cuda::load() {
                Ok(gpus) => start("--gpu-of", gpus),
                Err(error) => println!("SKIPPED: every case on NCCL: {error}"),
            }
        }
    }
}

/// Without a driver every rank refuses to join through NCCL by itself: none is left waiting for the others, whoever brought
/// the id.
fn no_gpu(world: usize) {
    let id = UniqueId::from([7; UniqueId::BYTES]);
    let host = sharding::join(1).expect("one rank");
    let refused = Nccl::join_with(&id, host, 0, false).err().expect("no driver");
    let said = refused.error.to_string();
    assert!(said.contains("no CUDA driver here"), "{world} ranks: {said}");
}
