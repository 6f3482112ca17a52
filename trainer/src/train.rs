//! A training run from start or checkpoint to its last step: everything around the step and nothing of it.

use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::io::Write;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail, ensure};
use configs::{FrozenPrecision, NewRows, Plan, Precision};
use corpus::{Stream, TokenShards, Vocabulary};
use launcher::checkpoint::identity::{Difference, Differences};
use launcher::checkpoint::manifest::planned_bytes;
use launcher::checkpoint::{Found, Identity};
use launcher::events::{Event, HeldOut, StepMetrics};
use launcher::place::SlurmJob;
use launcher::{text, wall_time};
use sharding::{Comm, Mark, Stage, Wire, Zero};
use tch::Device;

use crate::batch::{Batch, rows_of_step};
use crate::checkpoint::{self, Outcome, Progress, Saver};
use crate::during::During;
use crate::evaluate::kind;
use crate::hf::{ModelConfig, Weights};
use crate::model::{Model, Trains, Weight, bucket_of, take_trained};
use crate::planned::{self, Watch};
use crate::step::{StepReport, Trainer, lr_by_group};
use crate::tensorboard::EventWriter;

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    Finished,
    /// Asked to stop by SIGUSR1: a checkpoint is written, the rest is for the next job.
    WantsMoreTime,
}

/// How a plan shards among these ranks: stage, and whether frozen weights are divided as well. One rank has nobody to share
/// with.
pub fn sharding(plan: &Plan, comm: &dyn Comm) -> (Stage, bool) {
    let stage = Stage::ALL[usize::from(plan.train.zero)];
    match comm.world() {
        1 => (stage.min(Stage::OptimizerState), false),
        _ => (stage, plan.train.shard_frozen),
    }
}

/// The model a plan trains, on `device`, sharded as [`sharding`] says and bound to its slices, and what a checkpoint must agree
/// with.
pub fn build<'a>(
    plan: &'a Plan,
    comm: &'a dyn Comm,
    device: Device,
    shards: (Stage, bool),
) -> Result<(Trainer<'a>, Identity)> {
    let vocabulary = Vocabulary::open(&plan.folders.vocabulary)?;
    let shards_of_tokens = TokenShards::open(&plan.folders.tokens)?;
    ensure!(
        shards_of_tokens.manifest().tokenizer_digest == vocabulary.digest,
        "{} was tokenised with another tokenizer than {} holds; run `panglot tokenize` again",
        plan.folders.tokens.display(),
        plan.folders.vocabulary.display()
    );
    let vocabulary_digest = vocabulary.digest.clone();
    let new_rows = plan.vocabulary.as_ref().map(|settings| (vocabulary, settings.new_rows));
    let (trainer, base_model) = build_model(plan, comm, device, new_rows, shards)?;
    let identity = Identity {
        plan: plan.clone(),
        base_model,
        vocabulary: vocabulary_digest,
        tokens: shards_of_tokens.manifest().digest.clone(),
    };
    Ok((trainer, identity))
}

/// As [`build`], of a model whose vocabulary is given; also the base's digest.
pub fn build_model<'a>(
    plan: &'a Plan,
    comm: &'a dyn Comm,
    device: Device,
    vocabulary: Option<(Vocabulary, NewRows)>,
    (stage, shard_frozen): (Stage, bool),
) -> Result<(Trainer<'a>, String)> {
    let base = &plan.folders.base_model;
    let config = ModelConfig::open(base)?;
    let weights = Weights::open(base)?;
    let digest = weights.digest();
    let trains = Trains {
        lora: plan.train.lora.clone(),
        full: plan.train.full.clone(),
        vocabulary,
        seed: plan.seed,
    };
    let fp8 = plan.train.frozen_precision == Some(FrozenPrecision::Fp8) && device != Device::Cpu;
    if fp8 {
        sharding::cuda::check_fp8(device)?;
    }
    let (weights, kind) = (weights.on(device), kind(plan.train.precision));
    let mut zero = Zero::empty(comm, stage, kind);
    if plan.train.offload_optimizer && device != Device::Cpu {
        zero.offload_optimizer();
    }
    zero.reduce_in(match plan.train.reduce {
        Precision::F32 => Wire::F32,
        Precision::Bf16 => Wire::Bf16,
    });
    // A stage at a time: where a rank keeps a slice, it never holds more of the base than one stage.
    let mut take = |stage: &str, mut weights: Vec<&mut Weight>| -> Result<()> {
        let spec = bucket_of(stage, &weights);
        if !spec.params.is_empty() {
            zero.train(
                spec,
                take_trained(weights.iter_mut().map(|weight| &mut **weight).collect()),
            )?;
        }
        if shard_frozen {
            zero.shard_frozen(stage, weights)?;
        }
        Ok(())
    };
    let model = Model::load_by_stages(&config, &weights, kind, &trains, fp8, &mut take)
        .with_context(|| format!("loading {}", base.display()))?
        .with_residual(plan.train.residual);
    model.check_length(plan.train.sequence_length, "train.sequence_length")?;
    zero.check_ranks_agree(comm)?;
    ensure!(
        !zero.layout().buckets.is_empty(),
        "nothing trains: give train.lora, or name modules in train.full"
    );
    let recompute = planned::recomputation(plan, &model.sizes(), comm, device, (stage, shard_frozen))?;
    let mut trainer = Trainer::new(plan, comm, model, zero);
    trainer.recompute = recompute;
    Ok((trainer, digest))
}

/// Trains until the plan's last step, from the newest checkpoint if there is one.
pub fn train(plan: &Plan, comm: &dyn Comm, device: Device) -> Result<End> {
    let rank_0 = comm.rank() == 0;
    let say = |event: Event| rank_0.then(|| event.emit());
    say(Event::Phase {
        name: "loading model and data".into(),
    });
    comm.at(Mark::Load);
    let stop = Arc::new(AtomicBool::new(false));
    signal_hook::flag::register(signal_hook::consts::SIGUSR1, Arc::clone(&stop)).context("listening for SIGUSR1")?;

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
        saves_on_the_way(plan),
    )?;
    let mut progress = resume(&mut saver, &mut trainer, &identity)?;
    let mut during = During::prepare(plan, comm, progress.step)?;
    let mut log = if rank_0 {
        Some(Log::open(&plan.folders.run, progress.step)?)
    } else {
        None
    };
    let mut clock = Clock::start(plan, rank_0);

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
        };
        let every = plan.train.check_ranks_every;
        let due = every > 0 && trainer.step.is_multiple_of(every) && comm.world() > 1;
        if plan.debug.check_ranks_equal || due {
            comm.at(Mark::Compare);
            check_ranks_equal(&mut trainer)?;
        }
        comm.at(Mark::Report);
        clock.took(started.elapsed());
        let boundary = Boundary::agree(comm, &saver, &clock)?;
        let seconds = started.elapsed().as_secs_f64();
        let held_out = match &mut during {
            Some(during) if during.is_due(trainer.step) => {
                comm.at(Mark::Evaluate);
                Some(during.measure(&mut trainer)?)
            }
            _ => None,
        };
        let is_best = held_out.is_some_and(|(_, is_best)| is_best);
        if let Some(log) = &mut log {
            let measured = Measured {
                seconds,
                held_out: held_out.map(|(held_out, _)| held_out),
                resident_bytes: boundary.resident_bytes,
                bytes_sent,
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
        let done = trainer.step == plan.train.steps;
        let asked = report.stop || trainer.step == last;
        let ends = done || asked || boundary.time_is_short;
        if let Some(during) = during.as_ref().filter(|_| is_best && rank_0) {
            // Before it is saved, so that it is not taken for one of the old.
            if let Err(error) = during.note_best() {
                // A disk that takes nothing costs a note, not the run.
                let text = format!("the best step so far is not noted, and may be pruned: {error:#}");
                say(Event::Note { text });
            }
        }
        if ends {
            comm.at(Mark::Save);
            save_and_wait(&mut saver, &trainer, progress, &mut clock)?;
        } else if boundary.save_is_due || is_best || trainer.step.is_multiple_of(plan.checkpoint.every_steps) {
            comm.at(Mark::Save);
            start_save(&mut saver, &trainer, progress, &mut clock)?;
        }
        if plan.debug.die_after == Some(trainer.step) {
            let outcome = saver.finish()?;
            clock.tell(outcome, &trainer);
            signal_hook::low_level::raise(signal_hook::consts::SIGKILL).context("debug.die_after")?;
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

/// What all ranks know alike at the end of a step, from one small reduction.
struct Boundary {
    /// The most of any rank.
    resident_bytes: u64,
    /// Some rank's thread is at work on a checkpoint.
    writing: bool,
    save_is_due: bool,
    time_is_short: bool,
}

impl Boundary {
    fn agree(comm: &dyn Comm, saver: &Saver, clock: &Clock) -> Result<Boundary> {
        let flag = |it: bool| f64::from(u8::from(it));
        let mine = [
            resident_bytes() as f64,
            flag(saver.is_busy()),
            flag(clock.save_is_due()),
            flag(clock.time_is_short()),
        ];
        let most = comm.max(&mine)?;
        Ok(Boundary {
            resident_bytes: most[0] as u64,
            writing: most[1] > 0.0,
            save_is_due: most[2] > 0.0,
            time_is_short: most[3] > 0.0,
        })
    }
}

/// Rank 0's watch: when the next save is due by the minutes, and whether the job's time is running out. Other ranks' has no
/// opinion; what it says travels in [`Boundary`].
struct Clock {
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

impl Clock {
    fn start(plan: &Plan, rank_0: bool) -> Clock {
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
            longest_save: 0.0,
            saves_told: 0,
            failed: false,
        }
    }

    fn took(&mut self, step: Duration) {
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
    fn tell(&mut self, outcome: Option<Outcome>, trainer: &Trainer) {
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
                    "checkpoint written"
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
            }
        }
    }
}

fn start_save(saver: &mut Saver, trainer: &Trainer, progress: Progress, clock: &mut Clock) -> Result<()> {
    let next_row = rows_of_step(&trainer.plan.train, progress.step).start;
    clock.last_save = Instant::now();
    let earlier = saver.start(&trainer.zero, progress, &trainer.guard.state, next_row)?;
    clock.tell(earlier, trainer);
    Ok(())
}

/// Saves and returns when that is on disk: what would be lost otherwise is the end of the run. What fails is tried again until
/// the plan's number of failures ends the run.
fn save_and_wait(saver: &mut Saver, trainer: &Trainer, progress: Progress, clock: &mut Clock) -> Result<()> {
    loop {
        start_save(saver, trainer, progress, clock)?;
        let outcome = saver.finish()?;
        clock.tell(outcome, trainer);
        if saver.newest == Some(progress.step) {
            return Ok(());
        }
        std::thread::sleep(Duration::from_secs(1));
    }
}

/// Whether a run saves before its last step without being asked. One that does not needs no second copy of its state.
fn saves_on_the_way(plan: &Plan) -> bool {
    plan.checkpoint.every_steps < plan.train.steps
        || plan.checkpoint.every_minutes.is_some()
        || plan.evaluation.every_steps.is_some()
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
    saver.newest = Some(progress.step);
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
fn check_ranks_equal(trainer: &mut Trainer) -> Result<()> {
    let damaged = trainer.zero.damaged_ranks(trainer.comm)?;
    let named: Vec<String> = damaged
        .iter()
        .map(|(rank, what)| format!("rank {rank}: {what}"))
        .collect();
    ensure!(
        named.is_empty(),
        "after step {} ranks differ in what they should hold alike; memory or network is at fault. {}. Take that machine out \
         and start again from the newest checkpoint",
        trainer.step,
        named.join("; ")
    );
    Ok(())
}

/// "eng_Latn 3, swh_Latn 1": languages by rows, most first.
fn languages(stream: &Stream, rows: Range<u64>) -> String {
    let mut counts: BTreeMap<String, u32> = BTreeMap::new();
    for row in rows {
        let language = stream.parts()[stream.part(row)].language.to_string();
        *counts.entry(language).or_insert(0) += 1;
    }
    let mut counts: Vec<_> = counts.into_iter().collect();
    counts.sort_by_key(|(_, rows)| std::cmp::Reverse(*rows));
    let counts: Vec<String> = counts
        .iter()
        .map(|(language, rows)| format!("{language} {rows}"))
        .collect();
    counts.join(", ")
}

/// What a step took, beside what it computed.
struct Measured {
    seconds: f64,
    held_out: Option<HeldOut>,
    resident_bytes: u64,
    bytes_sent: u64,
    bytes_least: u64,
}

fn metrics(
    plan: &Plan,
    stream: &Stream,
    rows: Range<u64>,
    report: &StepReport,
    progress: Progress,
    measured: &Measured,
) -> StepMetrics {
    let step = progress.step - 1;
    let (mut languages, mut parts) = (BTreeMap::new(), BTreeMap::new());
    for row in rows {
        let part = &stream.parts()[stream.part(row)];
        *languages.entry(part.language.to_string()).or_insert(0) += 1;
        // Its name is the language's where there is one source only.
        if part.name != part.language.as_str() {
            *parts.entry(part.name.clone()).or_insert(0) += 1;
        }
    }
    StepMetrics {
        step,
        steps: plan.train.steps,
        loss: report.loss,
        grad_norm: report.verdict.grad_norm,
        skipped: report.skipped.is_some(),
        skip_reason: report.skipped.map(|why| why.to_string()),
        held_out: measured.held_out,
        lr: lr_by_group(plan, step),
        targets: report.targets,
        targets_so_far: progress.targets_so_far,
        seconds: measured.seconds,
        tokens_per_second: (plan.train.rows_per_step * plan.train.sequence_length) as f64 / measured.seconds,
        resident_bytes: measured.resident_bytes,
        bytes_sent: measured.bytes_sent,
        bytes_least: measured.bytes_least,
        rows_digest: report.rows.to_string(),
        languages,
        parts,
        unix_time: SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default()
            .as_secs_f64(),
    }
}

/// Rank 0's records of the run: `metrics.jsonl`, TensorBoard's events, and the launcher's ear. A disk that takes nothing more
/// does not end the run: lines wait in memory.
struct Log {
    run: PathBuf,
    metrics: fs::File,
    /// Bytes of whole lines in `metrics`.
    whole: u64,
    waiting: String,
    behind: bool,
    tensorboard: Option<EventWriter>,
}

impl Log {
    /// Opens the run's records at `step`; lines of steps that will be taken again go.
    fn open(run: &Path, step: u64) -> Result<Log> {
        let path = run.join("metrics.jsonl");
        keep_steps_before(&path, step)?;
        let metrics = OpenOptions::new()
            .create(true)
            .append(true)
            .open(&path)
            .with_context(|| path.display().to_string())?;
        Ok(Log {
            run: run.to_owned(),
            whole: metrics.metadata().with_context(|| path.display().to_string())?.len(),
            metrics,
            waiting: String::new(),
            behind: false,
            tensorboard: None,
        })
    }

    fn write(&mut self, metrics: StepMetrics) -> Result<()> {
        self.waiting += &serde_json::to_string(&metrics)?;
        self.waiting.push('\n');
        let written = self.catch_up().and_then(|()| self.draw(&metrics));
        match written {
            Ok(()) if self.behind => Event::Note {
                text: "metrics.jsonl is written again".into(),
            }
            .emit(),
            Err(ref error) if !self.behind => Event::Note {
                text: format!("metrics cannot be written and wait in memory: {error:#}"),
            }
            .emit(),
            _ => {}
        }
        self.behind = written.is_err();
        Event::Step(metrics).emit();
        Ok(())
    }

    /// Writes what waits, as whole lines or not at all.
    fn catch_up(&mut self) -> Result<()> {
        let written = self.metrics.write_all(self.waiting.as_bytes());
        if let Err(error) = written {
            // A part of a line may be there.
            let _ = self.metrics.set_len(self.whole);
            return Err(error).context("writing metrics.jsonl");
        }
        self.whole += self.waiting.len() as u64;
        self.waiting.clear();
        Ok(())
    }

    /// TensorBoard's events of a step; those of steps that could not be written are in `metrics.jsonl` only.
    fn draw(&mut self, metrics: &StepMetrics) -> Result<()> {
        let mut tensorboard = match self.tensorboard.take() {
            Some(open) => open,
            None => EventWriter::create(&self.run.join("tensorboard"))?,
        };
        let (step, time) = (metrics.step as i64, metrics.unix_time);
        let scalars = [
            ("loss", metrics.loss),
            ("grad_norm", metrics.grad_norm),
            ("tokens_per_second", metrics.tokens_per_second),
            ("resident_gib", metrics.resident_bytes as f64 / (1u64 << 30) as f64),
        ];
        for (tag, value) in scalars {
            tensorboard.scalar(tag, step, value as f32, time)?;
        }
        for (group, lr) in &metrics.lr {
            let tag = format!("lr/{}", group.name());
            tensorboard.scalar(&tag, step, *lr as f32, time)?;
        }
        tensorboard.flush()?;
        // Not after an error: what a torn record holds, nobody knows. The next events go into a new file.
        self.tensorboard = Some(tensorboard);
        Ok(())
    }
}

/// Steps after the checkpoint are taken again: their lines of the attempt before would be doubles.
fn keep_steps_before(path: &PathBuf, step: u64) -> Result<()> {
    let Ok(text) = fs::read_to_string(path) else {
        return Ok(());
    };
    let early = |line: &&str| serde_json::from_str::<StepMetrics>(line).is_ok_and(|metrics| metrics.step < step);
    let kept: String = text.lines().filter(early).flat_map(|line| [line, "\n"]).collect();
    let beside = path.with_extension("jsonl.partial");
    fs::write(&beside, kept)
        .and_then(|()| fs::rename(&beside, path))
        .with_context(|| path.display().to_string())
}

/// Resident memory of this process, bytes.
fn resident_bytes() -> u64 {
    let statm = fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages: u64 = statm
        .split_whitespace()
        .nth(1)
        .and_then(|pages| pages.parse().ok())
        .unwrap_or(0);
    pages * 4096
}
