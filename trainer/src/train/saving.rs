//! When a run saves: after so many steps or minutes, at its end, and in time before the job's; and what people are told of it.

use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

use anyhow::Result;
use configs::Plan;
use launcher::checkpoint::manifest::planned_bytes;
use launcher::events::Event;
use launcher::history::{Happening, History, What};
use launcher::place::SlurmJob;
use launcher::{text, wall_time};
use sharding::Comm;

use crate::batch::rows_of_step;
use crate::checkpoint::{Outcome, Progress, Saver};
use crate::memory::Resident;
use crate::step::Trainer;

/// What all ranks know alike at the end of a step, from one small reduction.
pub struct Boundary {
    /// The most of any rank.
    pub resident_bytes: u64,
    /// The most that any rank handed to collectives in the step.
    pub bytes_sent: u64,
    /// Some rank's thread is at work on a checkpoint.
    pub writing: bool,
    pub save_is_due: bool,
    pub time_is_short: bool,
}

impl Boundary {
    /// `bytes_sent`: by this rank, in the step.
    pub fn agree(comm: &dyn Comm, saver: &Saver, clock: &Clock, bytes_sent: u64) -> Result<Boundary> {
        let flag = |it: bool| f64::from(u8::from(it));
        let mine = [
            Resident::now().bytes as f64,
            bytes_sent as f64,
            flag(saver.is_busy()),
            flag(clock.save_is_due()),
            flag(clock.time_is_short()),
        ];
        let most = comm.max(&mine)?;
        Ok(Boundary {
            resident_bytes: most[0] as u64,
            bytes_sent: most[1] as u64,
            writing: most[2] > 0.0,
            save_is_due: most[3] > 0.0,
            time_is_short: most[4] > 0.0,
        })
    }
}

/// Rank 0's watch: when the next save is due by the minutes, and whether the job's time is running out. Other ranks' has no
/// opinion; what it says travels in [`Boundary`].
pub struct Clock {
    rank_0: bool,
    every: Option<Duration>,
    safety: f64,
    /// When the job will be ended.
    end: Option<SystemTime>,
    last_save: Instant,
    /// Seconds.
    longest_step: f64,
    longest_save: f64,
    saves_told: u64,
    failed: bool,
}

/// Bytes a second that a busy file system of many users still takes.
const SLOW_DISK: f64 = 500e6;

/// Seconds of an attempt's first save: as long as the slowest of the run's before, or as a slow disk takes. An attempt that is
/// ended before its first save is due must still save in time.
fn expected_save(run: &Path, elements: u64) -> f64 {
    let of = |happening: Happening| match happening.what {
        What::Saved { seconds, .. } => Some(seconds),
        _ => None,
    };
    let before = History::of(run).all().into_iter().filter_map(of).reduce(f64::max);
    before.unwrap_or(planned_bytes(elements) as f64 / SLOW_DISK)
}

impl Clock {
    /// `elements`: parameters that train.
    pub fn start(plan: &Plan, elements: u64, rank_0: bool) -> Clock {
        let end = match rank_0.then(|| wall_time::job_end(&SlurmJob::detect())) {
            Some(Err(error)) => {
                let text = format!("nothing is saved in time before the job's limit, which is not known: {error:#}");
                Event::Note { text }.emit();
                None
            }
            Some(Ok(end)) => end,
            None => None,
        };
        let minutes = plan.checkpoint.every_minutes.filter(|_| rank_0);
        Clock {
            rank_0,
            every: minutes.map(|minutes| Duration::from_secs_f64(60.0 * minutes)),
            safety: plan.checkpoint.safety_seconds,
            end,
            last_save: Instant::now(),
            longest_step: 0.0,
            longest_save: if rank_0 {
                expected_save(&plan.folders.run, elements)
            } else {
                0.0
            },
            saves_told: 0,
            failed: false,
        }
    }

    pub fn took(&mut self, step: Duration) {
        self.longest_step = self.longest_step.max(step.as_secs_f64());
    }

    fn save_is_due(&self) -> bool {
        self.every.is_some_and(|every| self.last_save.elapsed() >= every)
    }

    fn time_is_short(&self) -> bool {
        self.end.is_some_and(|end| {
            let left = end.duration_since(SystemTime::now()).unwrap_or_default();
            wall_time::is_short(left.as_secs_f64(), self.safety, self.longest_step, self.longest_save)
        })
    }

    /// Notes what came of a save, and says what people should see of it.
    pub fn tell(&mut self, outcome: Option<Outcome>, trainer: &Trainer) {
        let Some(outcome) = outcome.filter(|_| self.rank_0) else {
            return;
        };
        match outcome {
            Outcome::Committed(it) => {
                self.longest_save = self.longest_save.max(it.seconds);
                tracing::info!(
                    step = it.step,
                    bytes = it.bytes,
                    files = it.files,
                    seconds = it.seconds,
                    stall = it.stall,
                    digest = it.digest,
                    write = it.write,
                    sync = it.sync,
                    verify = it.verify,
                    waited = it.waited,
                    "checkpoint written"
                );
                note(
                    trainer,
                    What::Saved {
                        step: it.step,
                        bytes: it.bytes,
                        files: it.files,
                        seconds: it.seconds,
                        stall: it.stall,
                    },
                );
                let planned = planned_bytes(trainer.zero.layout().numel() as u64);
                if self.saves_told == 0 || self.failed {
                    let again = if self.failed {
                        "checkpoints can be written again: "
                    } else {
                        ""
                    };
                    let text = format!(
                        "{again}step {} is on disk after {:.1} s, of which training waited {:.2} s: {} in {} file{} (planned: {})",
                        it.step,
                        it.seconds,
                        it.stall,
                        text::bytes(it.bytes),
                        it.files,
                        if it.files == 1 { "" } else { "s" },
                        text::bytes(planned),
                    );
                    Event::Note { text }.emit();
                }
                self.saves_told += 1;
                self.failed = false;
            }
            Outcome::Failed { step, why, in_a_row } => {
                self.failed = true;
                let text = format!(
                    "the checkpoint of step {step} could not be written ({in_a_row} in a row, {} end the run); training goes \
                     on from memory: {why}",
                    trainer.plan.checkpoint.failures_in_a_row
                );
                tracing::warn!("{text}");
                Event::Note { text }.emit();
                note(trainer, What::NotSaved { step, why });
            }
        }
    }
}

/// For the run's page, from rank 0. A disk that takes nothing costs a line in the log, not the run.
pub fn note(trainer: &Trainer, what: What) {
    if trainer.comm.rank() == 0
        && let Err(error) = History::of(&trainer.plan.folders.run).note(what)
    {
        tracing::warn!("{error:#}");
    }
}

pub fn start_save(saver: &mut Saver, trainer: &Trainer, progress: Progress, clock: &mut Clock) -> Result<()> {
    let next_row = rows_of_step(&trainer.plan.train, progress.step).start;
    clock.last_save = Instant::now();
    let earlier = saver.start(&trainer.zero, progress, &trainer.guard.state, next_row)?;
    clock.tell(earlier, trainer);
    Ok(())
}

/// Waits for the save under way if another step would be one more than `most` after the newest on the disk. What fails is
/// told as ever, and the next save that is due tries again.
pub fn wait_rather_than_lose(most: u64, saver: &mut Saver, trainer: &Trainer, clock: &mut Clock) -> Result<()> {
    if trainer.step - saver.newest().unwrap_or(0) >= most {
        let outcome = saver.finish()?;
        clock.tell(outcome, trainer);
    }
    Ok(())
}

/// Saves and returns when that is on disk: what would be lost otherwise is the end of the run. What fails is tried again until
/// the plan's number of failures ends the run.
pub fn save_and_wait(saver: &mut Saver, trainer: &Trainer, progress: Progress, clock: &mut Clock) -> Result<()> {
    loop {
        start_save(saver, trainer, progress, clock)?;
        let outcome = saver.finish()?;
        clock.tell(outcome, trainer);
        if saver.newest() == Some(progress.step) {
            return Ok(());
        }
        std::thread::sleep(Duration::from_secs(1));
    }
}
