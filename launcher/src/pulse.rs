//! Where a rank is in its work: a few numbers that the training loop writes without locks or system calls, and that whoever
//! watches reads from outside.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::sync::Notify;

/// What a rank works at. `stage` in [`State`] says where in the model, where that is meant.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[repr(u8)]
pub enum Phase {
    #[default]
    Start,
    Load,
    Restore,
    Batch,
    Forward,
    Backward,
    Update,
    Compare,
    Report,
    Save,
    Evaluate,
    Export,
    End,
}

impl Phase {
    pub const ALL: [Phase; 13] = [
        Phase::Start,
        Phase::Load,
        Phase::Restore,
        Phase::Batch,
        Phase::Forward,
        Phase::Backward,
        Phase::Update,
        Phase::Compare,
        Phase::Report,
        Phase::Save,
        Phase::Evaluate,
        Phase::Export,
        Phase::End,
    ];

    /// As a noun, for "was in …".
    pub fn name(self) -> &'static str {
        match self {
            Phase::Start => "its start",
            Phase::Load => "loading",
            Phase::Restore => "reading the checkpoint",
            Phase::Batch => "making the batch",
            Phase::Forward => "forward",
            Phase::Backward => "backward",
            Phase::Update => "the update",
            Phase::Compare => "comparing ranks",
            Phase::Report => "writing metrics",
            Phase::Save => "saving",
            Phase::Evaluate => "evaluation",
            Phase::Export => "the export",
            Phase::End => "its end",
        }
    }

    /// How long a rank that still gives signs may stay at one point of this phase while others wait for it. A step's stages take
    /// seconds at most; files are as slow as a busy file system, and a model's compilation as slow as its compiler.
    pub fn patience(self) -> Duration {
        Duration::from_secs(match self {
            Phase::Batch | Phase::Forward | Phase::Backward | Phase::Update | Phase::Compare => 300,
            Phase::Start | Phase::Load | Phase::Restore | Phase::Save | Phase::Report => 1800,
            Phase::Evaluate | Phase::Export | Phase::End => 7200,
        })
    }

    /// Not part of every step.
    fn is_rare(self) -> bool {
        !matches!(
            self,
            Phase::Batch | Phase::Forward | Phase::Backward | Phase::Update | Phase::Report
        )
    }

    /// Whether `step` says anything in this phase.
    fn is_of_a_step(self) -> bool {
        !matches!(self, Phase::Start | Phase::Load | Phase::Restore | Phase::End)
    }
}

/// What a rank waits for others in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[repr(u8)]
pub enum Collective {
    ReduceScatter = 1,
    AllReduce,
    AllGather,
    AllToAll,
    Broadcast,
    Barrier,
}

impl Collective {
    const ALL: [Collective; 6] = [
        Collective::ReduceScatter,
        Collective::AllReduce,
        Collective::AllGather,
        Collective::AllToAll,
        Collective::Broadcast,
        Collective::Barrier,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Collective::ReduceScatter => "reduce-scatter",
            Collective::AllReduce => "all-reduce",
            Collective::AllGather => "all-gather",
            Collective::AllToAll => "all-to-all",
            Collective::Broadcast => "broadcast",
            Collective::Barrier => "barrier",
        }
    }
}

/// A rank's place in its work, at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    pub phase: Phase,
    /// Of the model, in [`Phase::Forward`] and [`Phase::Backward`]: 0 embeds, 1 … L are layers, L + 1 is the head.
    pub stage: u32,
    pub step: u64,
    /// Which collective it waits in, and its number since the ranks met.
    pub waits: Option<(Collective, u64)>,
    /// Grows with everything that it does.
    pub marks: u64,
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.phase.name())?;
        if matches!(self.phase, Phase::Forward | Phase::Backward) {
            write!(f, " of stage {}", self.stage)?;
        }
        if self.phase.is_of_a_step() {
            write!(f, " in step {}", self.step)?;
        }
        if let Some((collective, number)) = self.waits {
            write!(f, ", waiting in {} {number}", collective.name())?;
        }
        Ok(())
    }
}

/// Written by the thread that trains, read by the one that watches. Each mark is two or three stores.
#[derive(Debug, Default)]
pub struct Pulse {
    /// Phase in the lowest byte, then the stage in three.
    place: AtomicU64,
    step: AtomicU64,
    /// Kind in the lowest byte (0: it does not wait), then the number.
    waits: AtomicU64,
    marks: AtomicU64,
    ending: AtomicBool,
    /// A phase has begun that is told at once.
    news: Notify,
}

impl Pulse {
    pub fn at(&self, phase: Phase, stage: usize) {
        let stage = (stage as u64) & 0xff_ffff;
        self.place.store(phase as u64 | stage << 8, Ordering::Relaxed);
        self.mark();
        if phase.is_rare() {
            self.news.notify_one();
        }
    }

    /// Returns when the rank has begun something that is rare, such as saving.
    pub async fn news(&self) {
        self.news.notified().await;
    }

    pub fn step(&self, step: u64) {
        self.step.store(step, Ordering::Relaxed);
    }

    pub fn wait_in(&self, collective: Collective, number: u64) {
        self.waits.store(collective as u64 | number << 8, Ordering::Relaxed);
        self.mark();
    }

    pub fn waited(&self) {
        self.waits.store(0, Ordering::Relaxed);
        self.mark();
    }

    fn mark(&self) {
        self.marks.fetch_add(1, Ordering::Relaxed);
    }

    /// The job is ending: no collective may be started any more.
    pub fn end(&self) {
        self.ending.store(true, Ordering::Relaxed);
    }

    pub fn is_ending(&self) -> bool {
        self.ending.load(Ordering::Relaxed)
    }

    pub fn state(&self) -> State {
        let (place, waits) = (self.place.load(Ordering::Relaxed), self.waits.load(Ordering::Relaxed));
        let kind = (waits & 0xff) as usize;
        State {
            phase: Phase::ALL.get((place & 0xff) as usize).copied().unwrap_or_default(),
            stage: (place >> 8) as u32,
            step: self.step.load(Ordering::Relaxed),
            waits: kind
                .checked_sub(1)
                .and_then(|kind| Some((*Collective::ALL.get(kind)?, waits >> 8))),
            marks: self.marks.load(Ordering::Relaxed),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let pulse = Pulse::default();
        assert_eq!(pulse.state().to_string(), "its start");
        pulse.step(1200);
        pulse.at(Phase::Backward, 9);
        assert_eq!(pulse.state().to_string(), "backward of stage 9 in step 1200");
        for collective in Collective::ALL {
            pulse.wait_in(collective, 31);
            assert_eq!(pulse.state().waits, Some((collective, 31)));
        }
        assert_eq!(
            pulse.state().to_string(),
            "backward of stage 9 in step 1200, waiting in barrier 31"
        );
        pulse.waited();
        assert_eq!(pulse.state().waits, None);
        assert_eq!(pulse.state().marks, 8);
        for phase in Phase::ALL {
            pulse.at(phase, 0);
            assert_eq!(pulse.state().phase, phase);
        }
    }
}
