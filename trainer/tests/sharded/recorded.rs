//! A communicator that writes down when a rank starts and awaits what the model's stages exchange.

use std::sync::{Arc, Mutex};

use sharding::Result;
use sharding::{Comm, Mark, Pending, Sent, Wire};
use tch::{Kind, Tensor};

/// Whole buckets' collectives, and where the rank was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Did {
    At(Mark),
    StartReducing,
    AwaitReduced,
    StartGathering,
    AwaitGathered,
}

pub struct Recorded<'a> {
    inner: &'a dyn Comm,
    log: Arc<Mutex<Vec<Did>>>,
}

impl<'a> Recorded<'a> {
    pub fn new(inner: &'a dyn Comm) -> Recorded<'a> {
        Recorded {
            inner,
            log: Arc::default(),
        }
    }

    /// All since it was last asked.
    pub fn take(&self) -> Vec<Did> {
        std::mem::take(&mut *self.log.lock().unwrap())
    }

    fn record(&self, pending: Pending, starts: Did, awaits: Did) -> Pending {
        self.log.lock().unwrap().push(starts);
        let log = Arc::clone(&self.log);
        pending.around(move |finish| {
            log.lock().unwrap().push(awaits);
            finish()
        })
    }
}

impl Comm for Recorded<'_> {
    fn rank(&self) -> usize {
        self.inner.rank()
    }

    fn world(&self) -> usize {
        self.inner.world()
    }

    fn reduce_scatter(&self, full: &Tensor, mine: &mut Tensor, wire: Wire) -> Result<Pending> {
        let pending = self.inner.reduce_scatter(full, mine, wire)?;
        Ok(self.record(pending, Did::StartReducing, Did::AwaitReduced))
    }

    fn all_reduce(&self, values: &mut Tensor, wire: Wire) -> Result<Pending> {
        let pending = self.inner.all_reduce(values, wire)?;
        Ok(self.record(pending, Did::StartReducing, Did::AwaitReduced))
    }

    fn all_gather(&self, mine: &Tensor, full: &mut Tensor) -> Result<Pending> {
        let pending = self.inner.all_gather(mine, full)?;
        // Counts and small sums are of other kinds.
        if mine.kind() != Kind::Float {
            return Ok(pending);
        }
        Ok(self.record(pending, Did::StartGathering, Did::AwaitGathered))
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
        self.log.lock().unwrap().push(Did::At(mark));
        self.inner.at(mark);
    }

    fn copies_to_reduce(&self, wire: Wire) -> bool {
        self.inner.copies_to_reduce(wire)
    }

    fn abort(&self, code: i32) -> ! {
        self.inner.abort(code)
    }
}
