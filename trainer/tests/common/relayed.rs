//! A communicator that hands everything on to another, and lets a test step between.

use sharding::{Comm, Mark, Pending, Result, Sent, Wire};
use tch::{Kind, Tensor};

/// What the model's stages exchange.
#[derive(Clone, Copy, Debug)]
pub enum Call {
    Reduce,
    Gather,
}

/// Gets what was started, of which kind of elements, and gives what the caller is to wait for.
type Relay<'a> = dyn Fn(Call, Kind, Pending) -> Result<Pending> + 'a;

pub struct Relayed<'a> {
    inner: &'a dyn Comm,
    relay: Box<Relay<'a>>,
    mark: Box<dyn Fn(Mark) + 'a>,
}

impl<'a> Relayed<'a> {
    pub fn new(
        inner: &'a dyn Comm,
        relay: impl Fn(Call, Kind, Pending) -> Result<Pending> + 'a,
        mark: impl Fn(Mark) + 'a,
    ) -> Relayed<'a> {
        Relayed {
            inner,
            relay: Box::new(relay),
            mark: Box::new(mark),
        }
    }
}

impl Comm for Relayed<'_> {
    fn rank(&self) -> usize {
        self.inner.rank()
    }

    fn world(&self) -> usize {
        self.inner.world()
    }

    fn reduce_scatter(&self, full: &Tensor, mine: &mut Tensor, wire: Wire) -> Result<Pending> {
        (self.relay)(Call::Reduce, full.kind(), self.inner.reduce_scatter(full, mine, wire)?)
    }

    fn all_reduce(&self, values: &mut Tensor, wire: Wire) -> Result<Pending> {
        (self.relay)(Call::Reduce, values.kind(), self.inner.all_reduce(values, wire)?)
    }

    fn all_gather(&self, mine: &Tensor, full: &mut Tensor) -> Result<Pending> {
        (self.relay)(Call::Gather, mine.kind(), self.inner.all_gather(mine, full)?)
    }

    fn all_to_all(
        &self,
        send: &Tensor,
        send_counts: &[usize],
        receive: &mut Tensor,
        receive_counts: &[usize],
    ) -> Result<Pending> {
        self.inner.all_to_all(send, send_counts, receive, receive_counts)
    }

    fn broadcast(&self, values: &mut Tensor, root: usize) -> Result<Pending> {
        self.inner.broadcast(values, root)
    }

    fn barrier(&self) -> Result<()> {
        self.inner.barrier()
    }

    fn sent(&self) -> &Sent {
        self.inner.sent()
    }

    fn engine(&self) -> String {
        self.inner.engine()
    }

    fn at(&self, mark: Mark) {
        (self.mark)(mark);
        self.inner.at(mark);
    }

    fn copies_to_reduce(&self, wire: Wire) -> bool {
        self.inner.copies_to_reduce(wire)
    }

    fn abort(&self, code: i32) -> ! {
        self.inner.abort(code)
    }
}
