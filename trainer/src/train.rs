//! A training run from start or checkpoint to its last step: everything around the step and nothing of it.

mod build;
mod log;
mod saving;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use configs::Plan;
use launcher::checkpoint::identity::{Difference, Differences};
use launcher::checkpoint::manifest::step_name;
use launcher::checkpoint::{FOLDER as CHECKPOINTS, Found, Identity};
use launcher::events::Event;
use launcher::history::{Environment, History, What};
use launcher::place::Place;
use launcher::text;
use sharding::{Comm, Mark};
use tch::Device;

pub use self::build::{build, build_model, sharding};
use self::log::{Log, Measured, languages, metrics};
use self::saving::{Boundary, Clock, note, save_and_wait, start_save, wait_rather_than_lose};
use crate::batch::{Batch, rows_of_step};
use crate::checkpoint::{self, Progress, Saver};
use crate::dispute;
use crate::during::During;
use crate::planned::Watch;
use crate::step::{Damage, StepReport, Trainer, lr_by_group};

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    Finished,
    /// Asked to stop by SIGUSR1: a checkpoint is written, the rest is for the next job.
    WantsMoreTime,
}

/// Trains until the plan's last step, from the newest checkpoint if there is one.
pub fn train(plan: &Plan, comm: &dyn Comm, device: Device) -> Result<End> {
    let rank_0 = comm.rank() == 0;
    let say = |event: Event| rank_0.then(|| event.emit());
    say(Event::Phase {
        name: "loading model and data".into(),
    });
    comm.at(Mark::Load);
    let stop = asked_to_stop()?;

    let stream = launcher::sampling::stream(plan)?;
    let shards = sharding(plan, comm);
    let mut watch = Watch::begin(device)?;
    let (mut trainer, identity) = build(plan, comm, device, shards)?;
    comm.at(Mark::Restore);
    // From here on no earlier attempt commits a checkpoint; so what is chosen now stays the newest.
    let mut saver = Saver::begin(
        comm,
        &plan.folders.run,
        identity.clone(),
        &trainer.zero,
        plan.saves_on_the_way(),
    )?;
    let mut progress = resume(&mut saver, &mut trainer, &identity)?;
    let mut during = During::prepare(plan, &trainer.model, comm.rank(), progress.step)?;
    let mut log = if rank_0 {
        Some(Log::open(&plan.folders.run, progress.step)?)
    } else {
        None
    };
    let mut clock = Clock::start(plan, trainer.zero.layout().numel() as u64, rank_0);

    let dispute = dispute::open(&History::of(&plan.folders.run).all(), trainer.step, comm.world());
    note_beginning(&trainer, device);
    say(Event::Note {
        text: watch.plan(&trainer, shards),
    });
    say(Event::Phase {
        name: "training".into(),
    });
    let last = plan
        .debug
        .stop_after
        .map_or(plan.train.steps, |steps| steps.min(plan.train.steps));
    while trainer.step < last {
        let started = Instant::now();
        let step = trainer.step;
        comm.at(Mark::Batch { step });
        let rows_step = if plan.debug.overfit_one_batch { 0 } else { step };
        let batch = Batch::new(&stream, &plan.train, rows_step, comm.rank(), comm.world()).on(device);
        let sent_before = comm.sent().bytes();
        let report = trainer.train_step(&batch, stop.load(Ordering::Relaxed))?;
        let bytes_sent = comm.sent().bytes() - sent_before;
        if let Some(text) = watch.after_step(comm, bytes_sent, trainer.step == plan.train.steps)? {
            say(Event::Note { text });
        }
        progress = Progress {
            step: trainer.step,
            targets_so_far: progress.targets_so_far + report.targets,
            best: saver.best(),
        };
        check_ranks_equal(&trainer, &report)?;
        if let Some(text) = dispute.as_ref().and_then(|dispute| dispute::settled(dispute, &trainer)) {
            let settled = text.clone();
            note(&trainer, What::Settled { step, text: settled });
            say(Event::Note { text });
        }
        comm.at(Mark::Report);
        clock.took(started.elapsed());
        let boundary = Boundary::agree(comm, &saver, &clock, bytes_sent)?;
        let seconds = started.elapsed().as_secs_f64();
        let done = trainer.step == plan.train.steps;
        let hurries = boundary.time_is_short || (report.stop && !done);
        let (held_out, new_best) = match &mut during {
            // Whoever has to end soon saves, and measures nothing.
            Some(during) if during.is_due(trainer.step) && !hurries => {
                comm.at(Mark::Evaluate);
                let (held_out, new_best) = during.measure(&mut trainer, progress.best)?;
                // It stands between a look at the clock and the save as a step does.
                clock.took(started.elapsed());
                (Some(held_out), new_best)
            }
            _ => (None, None),
        };
        progress.best = new_best.or(progress.best);
        if let Some(log) = &mut log {
            let measured = Measured {
                seconds,
                held_out,
                resident_bytes: boundary.resident_bytes,
                bytes_sent: boundary.bytes_sent,
                bytes_least: trainer.zero.least_bytes(comm, batch.micro_batches.len()),
            };
            let rows = rows_of_step(&plan.train, rows_step);
            log.write(metrics(plan, &stream, rows, &report, progress, &measured))?;
        }

        if let Some(why) = &report.skipped {
            let rows = rows_of_step(&plan.train, rows_step);
            say(Event::Note {
                text: format!(
                    "step {step} was skipped on every rank: {why}; its rows: {}",
                    languages(&stream, rows)
                ),
            });
            let in_a_row = trainer.guard.state.skips_in_a_row;
            if in_a_row >= trainer.guard.most_skips() {
                bail!(
                    "{in_a_row} steps in a row were skipped, the last {step}: {why}; \
                     lower the learning rates or clip with optimizer.max_grad_norm"
                );
            }
        }
        let outcome = saver.advance(boundary.writing)?;
        clock.tell(outcome, &trainer);
        let asked = report.stop || trainer.step == last;
        let ends = done || asked || boundary.time_is_short;
        if ends {
            comm.at(Mark::Save);
            save_and_wait(&mut saver, &trainer, progress, &mut clock)?;
        } else if boundary.save_is_due || new_best.is_some() || trainer.step.is_multiple_of(plan.checkpoint.every_steps)
        {
            comm.at(Mark::Save);
            start_save(&mut saver, &trainer, progress, &mut clock)?;
        }
        if let Some(most) = plan.checkpoint.lose_at_most {
            comm.at(Mark::Save);
            wait_rather_than_lose(most, &mut saver, &trainer, &mut clock)?;
        }
        if plan.debug.die_after == Some(trainer.step) {
            let outcome = saver.finish()?;
            clock.tell(outcome, &trainer);
            signal_hook::low_level::raise(signal_hook::consts::SIGKILL).context("debug.die_after")?;
        }
        if ends {
            note(&trainer, What::Ended { step: trainer.step });
        }
        if ends && !done {
            let why = if asked {
                "as asked"
            } else {
                "in time before the job's limit"
            };
            say(Event::Note {
                text: format!("stopped {why} after step {step}; the checkpoint is written"),
            });
            return Ok(End::WantsMoreTime);
        }
    }
    Ok(if trainer.step < plan.train.steps {
        End::WantsMoreTime
    } else {
        End::Finished
    })
}

/// Whether SIGUSR1 has come since this was first called, which is the first thing that a worker does: one that is asked while it
/// loads stops after a step.
pub fn asked_to_stop() -> Result<&'static AtomicBool> {
    static ASKED: OnceLock<Arc<AtomicBool>> = OnceLock::new();
    if ASKED.get().is_none() {
        let asked = Arc::new(AtomicBool::new(false));
        signal_hook::flag::register(signal_hook::consts::SIGUSR1, Arc::clone(&asked))
            .context("listening for SIGUSR1")?;
        let _ = ASKED.set(asked);
    }
    Ok(ASKED.get().expect("it was set"))
}

/// For the run's page: when this attempt begins to train, from which step, and where.
fn note_beginning(trainer: &Trainer, device: Device) {
    let comm = trainer.comm;
    if comm.rank() == 0 {
        let environment = Environment::here(comm.world(), comm.engine(), format!("{device:?}"));
        note(
            trainer,
            What::Began {
                step: trainer.step,
                environment,
            },
        );
    }
}

/// Goes on from the newest checkpoint that verifies, the same on every rank, if there is one.
fn resume(saver: &mut Saver, trainer: &mut Trainer, identity: &Identity) -> Result<Progress> {
    let started = Instant::now();
    let comm = trainer.comm;
    let Some(found) = checkpoint::choose(saver.checkpoints(), comm)? else {
        return Ok(Progress::default());
    };
    let verified = started.elapsed();
    let manifest = &found.manifest;
    let different = launcher::checkpoint::differences(&manifest.identity, identity);
    if let Some(refusal) = different.refusal(&found.folder) {
        bail!(refusal);
    }
    let progress = checkpoint::load(&found.folder, manifest, comm, &mut trainer.zero)?;
    trainer.step = progress.step;
    trainer.guard.state = manifest.guard.clone();
    saver.resumed(progress)?;
    if comm.rank() == 0 {
        checkpoint::set_aside(&found.rejected, saver.nonce().as_str())?;
        for (_, rejected) in &found.rejected {
            Event::Note {
                text: format!("passed over a damaged checkpoint: {rejected}"),
            }
            .emit();
        }
        let text = resumed_line(&found, &different, trainer, (verified, started.elapsed()));
        Event::Note { text }.emit();
    }
    Ok(progress)
}

/// What was resumed, from where, how long it took, and what is not as it was.
fn resumed_line(
    found: &Found,
    different: &Differences,
    trainer: &Trainer,
    (verified, all): (Duration, Duration),
) -> String {
    let manifest = &found.manifest;
    let step = manifest.step;
    let lr = lr_by_group(trainer.plan, step).into_iter();
    let lr: Vec<String> = lr.map(|(group, lr)| format!("{lr:.2e} ({})", group.name())).collect();
    let row = rows_of_step(&trainer.plan.train, step).start;
    let mut text = format!(
        "resumed from step {step} ({}), written by {}, read by {} in {:.1} s ({:.1} s of it to verify {}); next row {row}, \
         learning rate {}",
        found.folder.display(),
        text::counted(manifest.world, "rank"),
        trainer.comm.world(),
        all.as_secs_f64(),
        verified.as_secs_f64(),
        text::bytes(manifest.bytes()),
        lr.join(", "),
    );
    let list = |differences: &[Difference]| {
        let lines: Vec<String> = differences.iter().map(Difference::to_string).collect();
        lines.join(", ")
    };
    if !different.harmless.is_empty() {
        text += &format!("; changed: {}", list(&different.harmless));
    }
    if !different.allowed.is_empty() {
        text += &format!("; changed and allowed: {}", list(&different.allowed));
    }
    if row != manifest.next_row {
        text += &format!("; the next row was {}", manifest.next_row);
    }
    text
}

/// Ends the run where ranks no longer hold alike what they should.
fn check_ranks_equal(trainer: &Trainer, report: &StepReport) -> Result<()> {
    let Some(sound) = report.damaged.iter().map(|damage| damage.sound).min() else {
        return Ok(());
    };
    let named = report.damaged.iter();
    let named: Vec<String> = named
        .map(|Damage { rank, what, .. }| format!("rank {rank}: {what}"))
        .collect();
    let (next, sound) = match dispute::shown(trainer, report, &Place::detect()?.node)? {
        Some(dispute) => {
            let began = dispute.step;
            note(trainer, What::Differed(dispute));
            // Whoever fails first ends the others: rank 0 writes before.
            trainer.comm.barrier()?;
            let next = format!(
                "Step {began} was the first that they began so: start again on as many ranks, and it says who was right"
            );
            (next, began.saturating_sub(1))
        }
        None => ("Take that machine out and start again".to_owned(), sound),
    };
    bail!(
        "in step {} ranks differ in what they should hold alike; memory or network is at fault. {}. {next}; what was saved since this was \
         last known to be sound may be spoilt: remove {CHECKPOINTS}/{} and what follows it first",
        trainer.step - 1,
        named.join("; "),
        step_name(sound + 1),
    );
}
