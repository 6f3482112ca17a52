//! The door to MPI: collectives between CPU ranks. Non-blocking calls through MPI's C interface, because the handles must
//! outlive the borrow of their buffers while the backward pass goes on.
#![allow(unsafe_code)]

use mpi::environment::Universe;
use mpi::ffi;
use mpi::traits::{Communicator, CommunicatorCollectives};
use tch::{Kind, Tensor};

use crate::{Comm, Error, Pending, Reduce, Result};

pub(crate) struct Mpi {
    world: mpi::topology::SimpleCommunicator,
    // Finalises MPI when the run is over; last, so that it is dropped last.
    _universe: Universe,
}

impl Mpi {
    pub(crate) fn join(placed: usize) -> Result<Mpi> {
        let (universe, _) = mpi::initialize_with_threading(mpi::Threading::Funneled)
            .expect("MPI is initialised once, at the worker's start");
        let world = universe.world();
        let size = world.size() as usize;
        if size != placed {
            return Err(Error::WorldMismatch { placed, mpi: size });
        }
        Ok(Mpi {
            world,
            _universe: universe,
        })
    }

    /// Runs `call` with a fresh request and hands back its completion. `buffers` are kept alive until then.
    fn start(
        &self,
        name: &'static str,
        buffers: Vec<Tensor>,
        call: impl FnOnce(*mut ffi::MPI_Request) -> i32,
    ) -> Result<Pending> {
        // SAFETY: a constant of the MPI library, valid after initialisation.
        let mut request = unsafe { ffi::RSMPI_REQUEST_NULL };
        check(name, call(&mut request))?;
        Ok(Pending::until(move || {
            // SAFETY: `request` came from the call above and is waited for once; `buffers` outlive the wait.
            let code = unsafe { ffi::MPI_Wait(&mut request, ffi::RSMPI_STATUS_IGNORE) };
            drop(buffers);
            check(name, code)
        }))
    }
}

fn check(call: &'static str, code: i32) -> Result<()> {
    if code == 0 {
        Ok(())
    } else {
        Err(Error::Mpi { call, code })
    }
}

fn count(call: &'static str, elements: usize) -> Result<i32> {
    i32::try_from(elements).map_err(|_| Error::TooManyElements { call, count: elements })
}

/// MPI's type for elements that are added; elements that are only moved travel as integers of their width.
fn datatype(kind: Kind) -> ffi::MPI_Datatype {
    // SAFETY: constants of the MPI library, valid after initialisation.
    unsafe {
        match kind {
            Kind::Float => ffi::RSMPI_FLOAT,
            Kind::Double => ffi::RSMPI_DOUBLE,
            Kind::BFloat16 | Kind::Half => ffi::RSMPI_UINT16_T,
            Kind::Uint8 => ffi::RSMPI_UINT8_T,
            Kind::Int64 => ffi::RSMPI_INT64_T,
            other => panic!("no collective moves {other:?}"),
        }
    }
}

impl Comm for Mpi {
    fn rank(&self) -> usize {
        self.world.rank() as usize
    }

    fn world(&self) -> usize {
        self.world.size() as usize
    }

    fn reduce_scatter(&self, full: &Tensor, mine: &mut Tensor) -> Result<Pending> {
        assert_eq!((full.kind(), mine.kind()), (Kind::Float, Kind::Float));
        assert_eq!(full.numel(), mine.numel() * self.world());
        assert!(full.is_contiguous() && mine.is_contiguous());
        let each = count("reduce-scatter", mine.numel())?;
        let (from, to) = (full.data_ptr(), mine.data_ptr());
        self.start(
            "reduce-scatter",
            vec![full.shallow_clone(), mine.shallow_clone()],
            |request| {
                // SAFETY: sizes checked above; both buffers are kept by the pending handle until completion.
                unsafe {
                    ffi::MPI_Ireduce_scatter_block(
                        from,
                        to,
                        each,
                        ffi::RSMPI_FLOAT,
                        ffi::RSMPI_SUM,
                        ffi::RSMPI_COMM_WORLD,
                        request,
                    )
                }
            },
        )
    }

    fn all_gather(&self, mine: &Tensor, full: &mut Tensor) -> Result<Pending> {
        assert_eq!(full.kind(), mine.kind());
        assert_eq!(full.numel(), mine.numel() * self.world());
        assert!(full.is_contiguous() && mine.is_contiguous());
        let (each, kind) = (count("all-gather", mine.numel())?, datatype(mine.kind()));
        let (from, to) = (mine.data_ptr(), full.data_ptr());
        self.start(
            "all-gather",
            vec![full.shallow_clone(), mine.shallow_clone()],
            |request| {
                // SAFETY: as in reduce_scatter.
                unsafe { ffi::MPI_Iallgather(from, each, kind, to, each, kind, ffi::RSMPI_COMM_WORLD, request) }
            },
        )
    }

    fn all_reduce(&self, values: &mut Tensor, how: Reduce) -> Result<Pending> {
        assert!(matches!(values.kind(), Kind::Float | Kind::Double) && values.is_contiguous());
        let (elements, kind) = (count("all-reduce", values.numel())?, datatype(values.kind()));
        // rsmpi exports no MPI_IN_PLACE, and its value differs between MPI libraries.
        let input = values.copy();
        let (from, to) = (input.data_ptr(), values.data_ptr());
        self.start("all-reduce", vec![input, values.shallow_clone()], |request| {
            // SAFETY: as in reduce_scatter.
            unsafe {
                let operation = match how {
                    Reduce::Sum => ffi::RSMPI_SUM,
                    Reduce::Max => ffi::RSMPI_MAX,
                };
                ffi::MPI_Iallreduce(from, to, elements, kind, operation, ffi::RSMPI_COMM_WORLD, request)
            }
        })
    }

    fn broadcast(&self, values: &mut Tensor, root: usize) -> Result<Pending> {
        assert!(values.is_contiguous());
        let (elements, kind) = (count("broadcast", values.numel())?, datatype(values.kind()));
        let data = values.data_ptr();
        self.start("broadcast", vec![values.shallow_clone()], |request| {
            // SAFETY: as in reduce_scatter.
            unsafe { ffi::MPI_Ibcast(data, elements, kind, root as i32, ffi::RSMPI_COMM_WORLD, request) }
        })
    }

    fn barrier(&self) -> Result<()> {
        self.world.barrier();
        Ok(())
    }

    fn abort(&self, code: i32) -> ! {
        self.world.abort(code)
    }
}
