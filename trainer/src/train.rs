//! A training run from start or checkpoint to its last step: everything around the step and nothing of it.

use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::io::Write;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail, ensure};
use configs::{FrozenPrecision, NewRows, Plan, Precision};
use corpus::{Stream, TokenShards, Vocabulary};
use launcher::events::{Event, HeldOut, StepMetrics};
use sharding::{Comm, Mark, Stage, Wire, Zero};
use tch::Device;

use crate::batch::{Batch, rows_of_step};
use crate::checkpoint::{self, Identity, Progress};
use crate::during::During;
use crate::evaluate::kind;
use crate::hf::{ModelConfig, Weights};
use crate::model::{Model, Trains, Weight, bucket_of, take_trained};
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
    Ok((Trainer::new(plan, comm, model, zero), digest))
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
    let (mut trainer, identity) = build(plan, comm, device, sharding(plan, comm))?;
    let folder = plan.folders.run.join("checkpoints");
    comm.at(Mark::Restore);
    let mut progress = resume(&folder, &mut trainer, &identity)?;
    let mut during = During::prepare(plan, comm, progress.step)?;
    let mut log = if rank_0 {
        Some(Log::open(&plan.folders.run, progress.step)?)
    } else {
        None
    };

    say(Event::Phase {
        name: "training".into(),
    });
    while trainer.step < plan.train.steps {
        let started = Instant::now();
        let step = trainer.step;
        comm.at(Mark::Batch { step });
        let rows_step = if plan.debug.overfit_one_batch { 0 } else { step };
        let batch = Batch::new(&stream, &plan.train, rows_step, comm.rank(), comm.world()).on(device);
        let sent_before = comm.sent().bytes();
        let report = trainer.train_step(&batch, stop.load(Ordering::Relaxed))?;
        let bytes_sent = comm.sent().bytes() - sent_before;
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
        let resident = comm.max(&[resident_bytes() as f64])?[0] as u64;
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
                resident_bytes: resident,
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
        let done = trainer.step == plan.train.steps;
        if let Some(during) = during.as_ref().filter(|_| is_best && rank_0) {
            // Before it is saved, so that it is not taken for one of the old.
            during.note_best()?;
        }
        if done || report.stop || is_best || trainer.step.is_multiple_of(plan.checkpoint.every_steps) {
            comm.at(Mark::Save);
            save(&folder, &trainer, &identity, progress)?;
        }
        if report.stop && !done {
            say(Event::Note {
                text: format!("stopped as asked after step {step}; the checkpoint is written"),
            });
            return Ok(End::WantsMoreTime);
        }
    }
    Ok(End::Finished)
}

/// Rank 0 chooses the checkpoint and tells all; every rank reads its part.
fn resume(folder: &Path, trainer: &mut Trainer, identity: &Identity) -> Result<Progress> {
    let started = Instant::now();
    let comm = trainer.comm;
    let chosen = if comm.rank() == 0 {
        fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
        checkpoint::newest(folder)?
    } else {
        None
    };
    let step = chosen.as_ref().map_or(u64::MAX, |found| found.manifest.step);
    let step = u64::from_le_bytes(comm.broadcast_bytes(&step.to_le_bytes())?.try_into().expect("8 bytes"));
    if step == u64::MAX {
        return Ok(Progress::default());
    }
    let path = folder.join(format!("step-{step:08}"));
    let manifest = checkpoint::read_manifest(&path)?;
    let different = checkpoint::differences(&manifest.identity, identity);
    ensure!(
        different.is_empty(),
        "{} was written by a run with other settings:\n  {}\nrestore them, or set another folders.run for a new run",
        path.display(),
        different.join("\n  ")
    );
    let progress = checkpoint::load(&path, &manifest, comm, &mut trainer.zero)?;
    trainer.step = progress.step;
    trainer.guard.state = manifest.guard.clone();
    if let Some(found) = chosen {
        for rejected in &found.rejected {
            Event::Note {
                text: format!("passed over a damaged checkpoint: {rejected}"),
            }
            .emit();
        }
        let lr = lr_by_group(trainer.plan, step).into_iter();
        let lr: Vec<String> = lr.map(|(group, lr)| format!("{lr:.2e} ({})", group.name())).collect();
        let text = format!(
            "resumed from step {step} ({}), written by {} rank{}, read by {} in {:.1} s; next row {}, \
             learning rate {}",
            found.folder.display(),
            manifest.world,
            if manifest.world == 1 { "" } else { "s" },
            comm.world(),
            started.elapsed().as_secs_f64(),
            rows_of_step(&trainer.plan.train, step).start,
            lr.join(", "),
        );
        Event::Note { text }.emit();
    }
    Ok(progress)
}

fn save(folder: &Path, trainer: &Trainer, identity: &Identity, progress: Progress) -> Result<()> {
    let started = Instant::now();
    let path = checkpoint::save(
        folder,
        trainer.comm,
        &trainer.zero,
        identity,
        progress,
        &trainer.guard.state,
    )?;
    if trainer.comm.rank() == 0 {
        checkpoint::prune(folder, trainer.plan.checkpoint.keep)?;
        let seconds = started.elapsed().as_secs_f64();
        tracing::info!(checkpoint = %path.display(), seconds, "checkpoint written");
    }
    Ok(())
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

/// Rank 0's records of the run: `metrics.jsonl`, TensorBoard's events, and the launcher's ear.
struct Log {
    metrics: fs::File,
    tensorboard: EventWriter,
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
            metrics,
            tensorboard: EventWriter::create(&run.join("tensorboard"))?,
        })
    }

    fn write(&mut self, metrics: StepMetrics) -> Result<()> {
        let mut line = serde_json::to_string(&metrics)?;
        line.push('\n');
        self.metrics
            .write_all(line.as_bytes())
            .context("writing metrics.jsonl")?;
        let (step, time) = (metrics.step as i64, metrics.unix_time);
        let scalars = [
            ("loss", metrics.loss),
            ("grad_norm", metrics.grad_norm),
            ("tokens_per_second", metrics.tokens_per_second),
            ("resident_gib", metrics.resident_bytes as f64 / (1u64 << 30) as f64),
        ];
        for (tag, value) in scalars {
            self.tensorboard.scalar(tag, step, value as f32, time)?;
        }
        for (group, lr) in &metrics.lr {
            let tag = format!("lr/{}", group.name());
            self.tensorboard.scalar(&tag, step, *lr as f32, time)?;
        }
        self.tensorboard.flush()?;
        Event::Step(metrics).emit();
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
