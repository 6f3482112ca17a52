//! Ranks on GPUs that no MPI has brought together: one engine for everything. What lies on the host (a few numbers, names)
//! goes through the memory of the rank's GPU, copied there and back; it is small and rare.

use tch::{Device, Kind, Tensor};

use crate::comm::{Sent, Wire};
use crate::{Comm, Pending, Result};

pub struct Staged {
    inner: Box<dyn Comm>,
    device: Device,
    /// Tensors that are on the device already are copied as well: for comparing with the engine itself.
    everything: bool,
}

impl Staged {
    /// `inner` moves tensors on `device` only.
    pub fn new(inner: Box<dyn Comm>, device: Device) -> Staged {
        Staged {
            inner,
            device,
            everything: false,
        }
    }

    /// As [`Staged::new`], and copies whatever comes.
    pub fn of_everything(inner: Box<dyn Comm>, device: Device) -> Staged {
        Staged {
            everything: true,
            ..Staged::new(inner, device)
        }
    }

    fn passes(&self, tensor: &Tensor) -> bool {
        !self.everything && tensor.device() == self.device
    }

    fn there(&self, tensor: &Tensor) -> Result<Tensor> {
        // A copy, also where the device is the same.
        let mut copy = Tensor::f_empty(tensor.size(), (tensor.kind(), self.device))?;
        copy.f_copy_(tensor)?;
        Ok(copy)
    }

    /// Runs `call` on a copy of `out` and waits; what it made is copied back, which waits for the GPU.
    fn through(&self, out: &mut Tensor, call: impl FnOnce(&mut Tensor) -> Result<Pending>) -> Result<Pending> {
        let mut copy = self.there(out)?;
        call(&mut copy)?.wait()?;
        out.f_copy_(&copy)?;
        Ok(Pending::done())
    }
}

impl Comm for Staged {
    fn rank(&self) -> usize {
        self.inner.rank()
    }

    fn world(&self) -> usize {
        self.inner.world()
    }

    fn reduce_scatter(&self, full: &Tensor, mine: &mut Tensor, wire: Wire) -> Result<Pending> {
        if self.passes(full) {
            return self.inner.reduce_scatter(full, mine, wire);
        }
        let full = self.there(full)?;
        self.through(mine, |mine| self.inner.reduce_scatter(&full, mine, wire))
    }

    fn all_reduce(&self, values: &mut Tensor, wire: Wire) -> Result<Pending> {
        if self.passes(values) {
            return self.inner.all_reduce(values, wire);
        }
        self.through(values, |values| self.inner.all_reduce(values, wire))
    }

    fn all_gather(&self, mine: &Tensor, full: &mut Tensor) -> Result<Pending> {
        if self.passes(mine) {
            return self.inner.all_gather(mine, full);
        }
        let mine = self.there(mine)?;
        self.through(full, |full| self.inner.all_gather(&mine, full))
    }

    fn all_to_all(
        &self,
        send: &Tensor,
        send_counts: &[usize],
        receive: &mut Tensor,
        receive_counts: &[usize],
    ) -> Result<Pending> {
        if self.passes(send) {
            return self.inner.all_to_all(send, send_counts, receive, receive_counts);
        }
        let send = self.there(send)?;
        self.through(receive, |receive| {
            self.inner.all_to_all(&send, send_counts, receive, receive_counts)
        })
    }

    fn broadcast(&self, values: &mut Tensor, root: usize) -> Result<Pending> {
        if self.passes(values) {
            return self.inner.broadcast(values, root);
        }
        self.through(values, |values| self.inner.broadcast(values, root))
    }

    fn barrier(&self) -> Result<()> {
        let mut one = Tensor::f_ones([1], (Kind::Float, self.device))?;
        self.inner.all_reduce(&mut one, Wire::F32)?.wait()?;
        // Reading it waits for the GPU.
        f64::try_from(&one)?;
        Ok(())
    }

    fn sent(&self) -> &Sent {
        self.inner.sent()
    }

    fn copies_to_reduce(&self, wire: Wire) -> bool {
        self.inner.copies_to_reduce(wire)
    }

    fn engine(&self) -> String {
        self.inner.engine()
    }

    fn abort(&self, code: i32) -> ! {
        self.inner.abort(code)
    }
}

/// Stands where NCCL's ranks have another engine for what is on the host: it knows its place, and moves nothing.
pub struct NoHost {
    rank: usize,
    world: usize,
    sent: Sent,
}

impl NoHost {
    pub fn new(rank: usize, world: usize) -> NoHost {
        NoHost {
            rank,
            world,
            sent: Sent::default(),
        }
    }
}

/// What [`Staged`] never asks for.
const ON_THE_HOST: &str = "tensors on the host are staged on the GPU";

impl Comm for NoHost {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world(&self) -> usize {
        self.world
    }

    fn reduce_scatter(&self, _: &Tensor, _: &mut Tensor, _: Wire) -> Result<Pending> {
        panic!("{ON_THE_HOST}")
    }

    fn all_reduce(&self, _: &mut Tensor, _: Wire) -> Result<Pending> {
        panic!("{ON_THE_HOST}")
    }

    fn all_gather(&self, _: &Tensor, _: &mut Tensor) -> Result<Pending> {
        panic!("{ON_THE_HOST}")
    }

    fn all_to_all(&self, _: &Tensor, _: &[usize], _: &mut Tensor, _: &[usize]) -> Result<Pending> {
        panic!("{ON_THE_HOST}")
    }

    fn broadcast(&self, _: &mut Tensor, _: usize) -> Result<Pending> {
        panic!("{ON_THE_HOST}")
    }

    fn barrier(&self) -> Result<()> {
        panic!("{ON_THE_HOST}")
    }

    fn sent(&self) -> &Sent {
        &self.sent
    }

    fn engine(&self) -> String {
        "nothing".into()
    }

    fn abort(&self, code: i32) -> ! {
        std::process::exit(code)
    }
}
