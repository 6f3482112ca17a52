//! Starts itself under mpirun with 1 … 4 ranks; each job runs every case in one program. `cargo test` alone runs all of it.

mod collectives;
#[path = "../mpirun/mod.rs"]
mod mpirun;
mod zero;

use std::path::Path;

use mpirun::Case;
use sharding::cuda::nccl::{Nccl, Refused, UniqueId};
use sharding::staged::{NoHost, Staged};
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
                    .filter(|(name, _)| !name.contains("goes_on") && !name.contains("overtakes"))
                    .collect();
                mpirun::run(&cases, &staged, "staged MPI", Path::new(shared));
            }
        }
        [child, world, shared] if GPU.contains(&child.as_str()) => {
            mpirun::end_all_on_panic();
            // Before the first tensor, so before the ranks meet.
            cuda::load().expect("a GPU");
            on_gpus(child, world.parse().expect("a number of ranks"), Path::new(shared));
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
                Ok(gpus) => GPU.into_iter().for_each(|kind| start(kind, gpus)),
                Err(error) => println!("SKIPPED: every case on NCCL: {error}"),
            }
        }
    }
}

/// NCCL with sums in rank order, with its own sums, and without MPI beside it.
const GPU: [&str; 3] = ["--gpu-in-order-of", "--gpu-of", "--gpu-alone-of"];

fn on_gpus(kind: &str, world: usize, shared: &Path) {
    let host = match world {
        1 => sharding::join(1),
        _ => sharding::join_through_mpi(world),
    };
    let host = host.expect("the ranks meet");
    // One node: ranks and GPUs have the same numbers.
    let gpu = host.rank();
    let device = cuda::device(gpu).expect("a GPU a rank");
    collectives::on(device);
    let joined = |comm: Result<Nccl, Refused>| comm.unwrap_or_else(|refused| panic!("{}", refused.error));
    let (comm, cases): (Box<dyn Comm>, Vec<Case>) = match kind {
        "--gpu-in-order-of" => (Box::new(joined(Nccl::join(host, gpu, true))), cases()),
        "--gpu-of" => {
            // NCCL adds in an order of its own.
            let ordered = [
                "sums_are_made_in_rank_order",
                "an_all_reduce_is_the_same_bits_everywhere",
            ];
            let cases = collectives::CASES
                .into_iter()
                .filter(|(name, _)| !ordered.contains(name));
            (Box::new(joined(Nccl::join(host, gpu, false))), cases.collect())
        }
        _ => {
            let id = if host.rank() == 0 {
                UniqueId::new().expect("an id")
            } else {
                UniqueId::from([0; UniqueId::BYTES])
            };
            let told = host.broadcast_bytes(&id.bytes()).expect("rank 0 tells it");
            let id = UniqueId::from(<[u8; UniqueId::BYTES]>::try_from(told).expect("as many as were sent"));
            let nowhere = Box::new(NoHost::new(host.rank(), host.world()));
            let nccl = joined(Nccl::join_with(&id, nowhere, gpu, true));
            // All goes one way, in one order.
            let cases = collectives::CASES.into_iter();
            let cases = cases.filter(|(name, _)| !name.contains("overtakes"));
            (Box::new(Staged::new(Box::new(nccl), device)), cases.collect())
        }
    };
    println!("{}", comm.engine());
    mpirun::run(&cases, comm.as_ref(), &kind["--".len()..], shared);
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
