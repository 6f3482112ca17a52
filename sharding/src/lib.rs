//! Who owns which slice of what trains, and how ranks exchange it: collectives behind one small trait, ZeRO's flat
//! padded slices, and AdamW over them.

pub mod adamw;
pub mod comm;
pub mod cuda;
pub mod digest;
pub mod layout;
pub mod memory;
#[cfg(feature = "mpi")]
mod mpi;
mod rows;
mod solo;
pub mod staged;
mod vectors;
pub mod zero;

pub use comm::{Comm, Mark, Pending, Reduce, Sent, Wire};
pub use layout::{BucketSpec, Layout, ParamSpec};
/// What [`vectorized!`] expands to names it.
#[doc(hidden)]
pub use pulp;
pub use zero::{Held, Pass, Stage, Zero};

/// What can go wrong between ranks.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(
        "{call} failed with MPI error {code}: a peer is gone or the network broke; look at the first rank that stopped"
    )]
    Mpi { call: &'static str, code: i32 },
    #[error(
        "{call} over {count} elements exceeds MPI's limit of {limit} a call; use more ranks or fewer trained parameters in one module",
        limit = i32::MAX
    )]
    TooManyElements { call: &'static str, count: usize },
    #[error(
        "the launcher started {placed} ranks but MPI sees {mpi}; start the workers with `mpirun` or `srun --mpi=pmix`"
    )]
    WorldMismatch { placed: usize, mpi: usize },
    #[error("{world} ranks were started but this worker was built without MPI; build it with the feature `mpi`")]
    NoMpi { world: usize },
    #[error(
        "ranks {ranks:?} registered other parameters than rank 0; start all ranks with the same binary, config and base model\n  \
         only rank 0 has:{rank_0_only}\n  only rank {first} has:{first_only}"
    )]
    LayoutMismatch {
        ranks: Vec<usize>,
        /// The first of `ranks`, whose lines are shown.
        first: usize,
        rank_0_only: String,
        first_only: String,
    },
    #[error("no thread could be started for collectives; the machine is out of processes or memory")]
    NoThread,
    #[error("the thread that makes the collectives is gone; look at this rank's log for what ended it")]
    Gone,
    #[error(
        "{call} failed with NCCL error {code} ({text}); look at the first rank that stopped, or set NCCL_DEBUG=INFO"
    )]
    Nccl {
        call: &'static str,
        code: i32,
        text: String,
    },
    #[error(
        "NCCL cannot be loaded ({0}); let LD_LIBRARY_PATH name the folder of the libnccl.so.2 that libtorch was built with"
    )]
    NoNccl(String),
    #[error(
        "NCCL's communicator was aborted after an error of a peer or the network; look at the first rank that stopped"
    )]
    NcclAborted,
    #[error(transparent)]
    Cuda(#[from] cuda::Error),
    #[error(transparent)]
    Torch(#[from] tch::TchError),
}

pub type Result<T> = std::result::Result<T, Error>;

/// Joins the run's ranks: MPI when the launcher placed more than one, else alone.
///
/// # Errors
/// When MPI does not see as many ranks as the launcher placed, which happens when `srun` starts N singletons.
pub fn join(world: usize) -> Result<Box<dyn Comm>> {
    if world == 1 {
        return Ok(Box::new(solo::Solo::default()));
    }
    #[cfg(feature = "mpi")]
    return Ok(Box::new(mpi::Mpi::join(world)?));
    #[cfg(not(feature = "mpi"))]
    return Err(Error::NoMpi { world });
}

/// Joins through MPI even when there is one rank only; [`join`] needs no MPI then.
#[cfg(feature = "mpi")]
pub fn join_through_mpi(world: usize) -> Result<Box<dyn Comm>> {
    Ok(Box::new(mpi::Mpi::join(world)?))
}
