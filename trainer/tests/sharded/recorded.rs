//! When a rank starts and awaits what the model's stages exchange, and where it is meanwhile.

use std::sync::{Arc, Mutex};

use sharding::{Comm, Mark, Pending};
use tch::Kind;

use crate::relayed::{Call, Relayed};

/// Whole buckets' collectives, and where the rank was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Did {
    At(Mark),
    StartReducing,
    AwaitReduced,
    StartGathering,
    AwaitGathered,
}

/// What was done since it was last taken.
#[derive(Clone, Default)]
pub struct Record(Arc<Mutex<Vec<Did>>>);

impl Record {
    pub fn take(&self) -> Vec<Did> {
        std::mem::take(&mut *self.0.lock().unwrap())
    }

    fn add(&self, did: Did) {
        self.0.lock().unwrap().push(did);
    }

    /// A communicator that writes down here what is done with it.
    pub fn of<'a>(&self, inner: &'a dyn Comm) -> Relayed<'a> {
        let (here, marks) = (self.clone(), self.clone());
        let relay = move |call, kind, pending: Pending| {
            // Counts and small sums are of other kinds.
            if kind != Kind::Float {
                return Ok(pending);
            }
            let (starts, awaits) = match call {
                Call::Reduce => (Did::StartReducing, Did::AwaitReduced),
                Call::Gather => (Did::StartGathering, Did::AwaitGathered),
            };
            here.add(starts);
            let here = here.clone();
            Ok(pending.around(move |finish| {
                here.add(awaits);
                finish()
            }))
        };
        Relayed::new(inner, relay, move |mark| marks.add(Did::At(mark)))
    }
}
