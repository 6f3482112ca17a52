//! The collectives of a run as they are watched: each is numbered, and the rank's pulse says where it is and what it waits in.
//! What the training loop pays is a few stores a stage; with a timeline, two readings of the clock besides.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use launcher::events::Event;
use launcher::pulse::{Collective, Phase, Pulse};
use launcher::rendezvous::Meeting;
use sharding::{Comm, Mark, Pending, Result, Sent, Wire};
use tch::Tensor;

use crate::timeline::Timeline;

pub struct Watched {
    inner: Box<dyn Comm>,
    pulse: Arc<Pulse>,
    timeline: Option<Arc<Timeline>>,
    /// None: a rank alone.
    meeting: Option<Meeting>,
    /// Collectives so far; the same on all ranks, which all make the same calls.
    number: AtomicU64,
}

impl Watched {
    pub fn new(inner: Box<dyn Comm>, pulse: Arc<Pulse>, meeting: Option<Meeting>) -> Watched {
        Watched {
            inner,
            pulse,
            timeline: None,
            meeting,
            number: AtomicU64::new(0),
        }
    }

    /// Draws all that follows on a timeline too.
    pub fn record(&mut self, timeline: Timeline) {
        self.timeline = Some(Arc::new(timeline));
    }

    /// The work is done, on this rank; rank 0 watches on until it is on all.
    pub fn leave(&mut self) {
        if let Some(meeting) = self.meeting.take() {
            meeting.leave();
            Event::Leaves.emit();
        }
    }

    /// Tells the others that this rank has failed. Where a peer's end is the reason, this process is ended with the culprit's
    /// name before this returns, if it is found in time.
    pub fn fail(&self, code: i32, text: &str) {
        self.pulse.end();
        if let Some(meeting) = &self.meeting {
            meeting.fail(code, text);
            if code == launcher::exit::PEER {
                std::thread::sleep(Duration::from_secs(1));
            }
        }
    }

    /// A collective's number. After the end of the job was announced none is started: peers may be dead.
    fn next(&self) -> u64 {
        while self.pulse.is_ending() {
            std::thread::park_timeout(Duration::from_secs(1));
        }
        self.number.fetch_add(1, Ordering::Relaxed) + 1
    }

    fn start(&self, collective: Collective, call: impl FnOnce() -> Result<Pending>) -> Result<Pending> {
        let number = self.next();
        // An engine may wait here already: for the host's copies, or where its own queue is full.
        let pending = waiting(&self.pulse, None, collective, number, call)?;
        let (pulse, timeline) = (Arc::clone(&self.pulse), self.timeline.clone());
        Ok(pending.around(move |finish| waiting(&pulse, timeline.as_deref(), collective, number, finish)))
    }
}

fn waiting<T>(
    pulse: &Pulse,
    timeline: Option<&Timeline>,
    collective: Collective,
    number: u64,
    finish: impl FnOnce() -> T,
) -> T {
    pulse.wait_in(collective, number);
    let started = timeline.map(|_| std::time::Instant::now());
    let done = finish();
    if let (Some(timeline), Some(started)) = (timeline, started) {
        timeline.waited(collective.name(), number, started);
    }
    pulse.waited();
    done
}

impl Comm for Watched {
    fn rank(&self) -> usize {
        self.inner.rank()
    }

    fn world(&self) -> usize {
        self.inner.world()
    }

    fn reduce_scatter(&self, full: &Tensor, mine: &mut Tensor, wire: Wire) -> Result<Pending> {
        self.start(Collective::ReduceScatter, || {
            self.inner.reduce_scatter(full, mine, wire)
        })
    }

    fn all_reduce(&self, values: &mut Tensor, wire: Wire) -> Result<Pending> {
        self.start(Collective::AllReduce, || self.inner.all_reduce(values, wire))
    }

    fn all_gather(&self, mine: &Tensor, full: &mut Tensor) -> Result<Pending> {
        self.start(Collective::AllGather, || self.inner.all_gather(mine, full))
    }

    fn all_to_all(
        &self,
        send: &Tensor,
        send_counts: &[usize],
        receive: &mut Tensor,
        receive_counts: &[usize],
    ) -> Result<Pending> {
        self.start(Collective::AllToAll, || {
            self.inner.all_to_all(send, send_counts, receive, receive_counts)
        })
    }

    fn broadcast(&self, values: &mut Tensor, root: usize) -> Result<Pending> {
        self.start(Collective::Broadcast, || self.inner.broadcast(values, root))
    }

    fn barrier(&self) -> Result<()> {
        let number = self.next();
        let timeline = self.timeline.as_deref();
        waiting(&self.pulse, timeline, Collective::Barrier, number, || {
            self.inner.barrier()
        })
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

    fn at(&self, mark: Mark) {
        let (phase, stage) = match mark {
            Mark::Load => (Phase::Load, 0),
            Mark::Restore => (Phase::Restore, 0),
            Mark::Batch { step } => {
                self.pulse.step(step);
                (Phase::Batch, 0)
            }
            Mark::Forward { stage } => (Phase::Forward, stage),
            Mark::Backward { stage } => (Phase::Backward, stage),
            Mark::Update => (Phase::Update, 0),
            Mark::Compare => (Phase::Compare, 0),
            Mark::Report => (Phase::Report, 0),
            Mark::Save => (Phase::Save, 0),
            Mark::Evaluate => (Phase::Evaluate, 0),
            Mark::Export => (Phase::Export, 0),
        };
        self.pulse.at(phase, stage);
        if let Some(timeline) = &self.timeline {
            timeline.at(&self.pulse.state());
        }
    }

    fn abort(&self, code: i32) -> ! {
        self.inner.abort(code)
    }
}
