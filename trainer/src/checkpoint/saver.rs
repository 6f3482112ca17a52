//! Saves beside training. A save is a copy to host memory at a step boundary; then every rank's thread writes its file, and
//! when all have, rank 0's thread commits.
//!
//! How ranks stay together: each tells whether its thread is busy in a reduction that every step makes anyway, so all see the
//! same answer at the same boundary, and only where nobody is busy do they enter the small collective that says what came out.
//! No rank waits for a disk, and none enters a collective that another does not. (Report files that rank 0 polls would commit
//! a step earlier, and would hang on what a parallel file system's caches show to whom, when.) At most one save is under way; one
//! that is due meanwhile waits for it, so that checkpoints lie at the steps that were asked for.

use std::path::{Path, PathBuf};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use launcher::checkpoint::commit::unix_time;
use launcher::checkpoint::manifest::{CHUNK_BYTES, FORMAT, partial_name, step_name};
use launcher::checkpoint::read::check_listing;
use launcher::checkpoint::{
    self as files, Best, Fence, FileEntry, GuardState, Identity, Keep, Lost, Manifest, Nonce, Refused, TensorEntry,
    Written,
};
use serde::{Deserialize, Serialize};
use sharding::{Comm, Zero};

use super::{Progress, Snapshot};

/// Saves a run's checkpoints; every rank has one, and all make the same calls.
pub struct Saver<'a> {
    comm: &'a dyn Comm,
    checkpoints: PathBuf,
    identity: Identity,
    nonce: Nonce,
    /// Rank 0's.
    fence: Option<Fence>,
    /// Tries of this attempt.
    number: u64,
    /// Saves go on beside training.
    beside: bool,
    room: Room,
    under_way: UnderWay,
    failures_in_a_row: u32,
    /// Steps of the newest whole checkpoint that this attempt knows of.
    newest: Option<u64>,
    /// Of those that are whole, as far as this attempt knows.
    best: Option<Best>,
}

/// Memory for the next snapshot.
enum Room {
    Making(JoinHandle<Snapshot>),
    Ready(Box<Snapshot>),
    /// None of its own: the slices themselves are written, while training waits.
    Direct,
    /// Lent to the save under way, or this rank saves nothing.
    None,
}

/// Gives back the room of its snapshot, and what it wrote.
type Writer = JoinHandle<(Option<Box<Snapshot>>, Result<Option<Written>>)>;

enum UnderWay {
    Nothing,
    Writing(Box<Save>, Writer),
    /// The thread is rank 0's.
    Committing(Box<Save>, Option<JoinHandle<Result<f64>>>),
}

struct Save {
    partial: PathBuf,
    /// Its files are still missing.
    manifest: Manifest,
    started: Instant,
    /// What the training loop has waited.
    stall: Duration,
    written: Option<Written>,
}

/// A save that is on disk.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Committed {
    pub step: u64,
    pub bytes: u64,
    pub files: usize,
    /// From the step's end to the checkpoint that survives a loss of power.
    pub seconds: f64,
    /// What rank 0's training loop waited of that.
    pub stall: f64,
    /// Of rank 0's file: digesting, writing, syncing, reading back, and what that and the digests took beyond the sync.
    pub digest: f64,
    pub write: f64,
    pub sync: f64,
    pub verify: f64,
    pub waited: f64,
}

#[derive(Clone, Debug)]
pub enum Outcome {
    Committed(Committed),
    /// Training goes on; what went wrong, and how often in a row.
    Failed {
        step: u64,
        why: String,
        in_a_row: u32,
    },
}

/// So many saves failed that going on would only lose more.
#[derive(Debug, thiserror::Error)]
#[error(
    "{in_a_row} checkpoints in a row could not be written, the last of step {step}: {why}; the newest whole one is {newest}. \
     Make room or mend the file system, then start again"
)]
pub struct WritesFailed {
    in_a_row: u32,
    step: u64,
    why: String,
    newest: String,
}

/// What a rank tells the others of its file.
#[derive(Serialize, Deserialize)]
enum Report {
    Wrote(Option<FileEntry>),
    Failed(String),
}

/// What rank 0 tells the others of the commit.
#[derive(Serialize, Deserialize)]
enum Verdict {
    Committed(Committed),
    Failed(String),
    Replaced(String),
}

impl<'a> Saver<'a> {
    /// Takes the run over from any earlier attempt. Rank 0 draws the attempt's nonce and tells all. `beside`: saves go on beside
    /// training, from memory of their own; else whoever starts one waits for it.
    pub fn begin(comm: &'a dyn Comm, run: &Path, identity: Identity, zero: &Zero, beside: bool) -> Result<Saver<'a>> {
        Saver::begin_as(Nonce::new()?, comm, run, identity, zero, beside)
    }

    /// As [`Saver::begin`], as the attempt that rank 0 names.
    pub fn begin_as(
        mut nonce: Nonce,
        comm: &'a dyn Comm,
        run: &Path,
        identity: Identity,
        zero: &Zero,
        beside: bool,
    ) -> Result<Saver<'a>> {
        let checkpoints = run.join(files::FOLDER);
        // Others hear of the attempt when it has the run: what they write from then on is not taken for an earlier one's.
        let fence = match comm.rank() {
            0 => Some(Fence::take(run, &checkpoints, &nonce)?),
            _ => None,
        };
        let told = comm.broadcast_bytes(nonce.as_str().as_bytes())?;
        if fence.is_none() {
            nonce = Nonce::from_text(std::str::from_utf8(&told).context("rank 0's nonce")?);
        }
        Ok(Saver {
            comm,
            checkpoints,
            identity,
            nonce,
            fence,
            number: 0,
            beside,
            room: match beside {
                true => Snapshot::prepare(comm, zero).map_or(Room::None, Room::Making),
                false => Room::Direct,
            },
            under_way: UnderWay::Nothing,
            failures_in_a_row: 0,
            newest: None,
            best: None,
        })
    }

    /// This attempt goes on from a checkpoint, the same on every rank.
    pub fn resumed(&mut self, from: Progress) -> Result<()> {
        // One that was best then may have given way to a better one since, which has been lost.
        let there = |best: &Best| best.step <= from.step && best.folder(&self.checkpoints).is_dir();
        let best = match self.comm.rank() {
            // Manifests of older builds do not say it.
            0 => from.best.or(Best::read(&self.checkpoints).ok().flatten()).filter(there),
            _ => None,
        };
        let told = self.comm.all_gather_texts(&serde_json::to_vec(&best)?)?;
        self.newest = Some(from.step);
        self.best = serde_json::from_slice(&told[0]).context("rank 0's word on the best checkpoint")?;
        Ok(())
    }

    /// Steps of the newest whole checkpoint that this attempt knows of.
    pub fn newest(&self) -> Option<u64> {
        self.newest
    }

    /// What did best on held-out text of the checkpoints that are whole or under way.
    pub fn best(&self) -> Option<Best> {
        match &self.under_way {
            UnderWay::Nothing => self.best,
            UnderWay::Writing(save, _) | UnderWay::Committing(save, _) => save.manifest.best,
        }
    }

    pub fn checkpoints(&self) -> &Path {
        &self.checkpoints
    }

    pub fn nonce(&self) -> &Nonce {
        &self.nonce
    }

    /// Whether this rank's thread is at work. Differs between ranks.
    pub fn is_busy(&self) -> bool {
        match &self.under_way {
            UnderWay::Nothing => false,
            UnderWay::Writing(_, thread) => !thread.is_finished(),
            UnderWay::Committing(_, thread) => thread.as_ref().is_some_and(|thread| !thread.is_finished()),
        }
    }

    /// Starts a save of the state as it is now, after the one under way. Outcomes of both come from [`Saver::advance`] and
    /// [`Saver::finish`]; that of the earlier one is returned here.
    pub fn start(
        &mut self,
        zero: &Zero,
        progress: Progress,
        guard: &GuardState,
        next_row: u64,
    ) -> Result<Option<Outcome>> {
        let started = Instant::now();
        let earlier = self.finish()?;
        let plan = &self.identity.plan;
        let layout = zero.layout();
        let manifest = Manifest {
            format: FORMAT,
            attempt: self.nonce.as_str().to_owned(),
            step: progress.step,
            next_row,
            updates: zero.updates,
            targets_so_far: progress.targets_so_far,
            seed: plan.seed,
            guard: guard.clone(),
            // What was best may have been the earlier one's step, and that have failed.
            best: progress.best.filter(|best| best.step == progress.step).or(self.best),
            world: self.comm.world(),
            zero: zero.stage() as u8,
            unix_time: unix_time(),
            identity: self.identity.clone(),
            config_hash: self.identity.config_hash(),
            layout: layout.describe(),
            tensors: layout
                .buckets
                .iter()
                .map(|bucket| TensorEntry {
                    name: bucket.name.clone(),
                    elements: bucket.numel as u64,
                })
                .collect(),
            chunk_bytes: CHUNK_BYTES,
            files: Vec::new(),
        };
        let partial = self
            .checkpoints
            .join(partial_name(progress.step, self.nonce.as_str(), self.number));
        self.number += 1;
        let mut snapshot = match std::mem::replace(&mut self.room, Room::None) {
            Room::Making(thread) => Some(Box::new(joined(thread))),
            Room::Ready(snapshot) => Some(snapshot),
            Room::Direct => Snapshot::of(self.comm, zero).map(Box::new),
            Room::None => None,
        };
        if let Some(snapshot) = snapshot.as_mut().filter(|_| self.beside) {
            snapshot.take(zero)?;
        }
        let folder = partial.clone();
        let thread = spawn("checkpoint", move || {
            let written = snapshot
                .as_ref()
                .map(|it| files::write_slices(&folder, it.slice, it.ranges.clone(), &it.parts()));
            (snapshot, written.transpose())
        })?;
        let save = Save {
            partial,
            manifest,
            started,
            stall: started.elapsed(),
            written: None,
        };
        self.under_way = UnderWay::Writing(Box::new(save), thread);
        Ok(earlier)
    }

    /// Moves the save under way on as far as it goes without waiting. `busy` is whether any rank's [`Saver::is_busy`] was true:
    /// the same on all.
    pub fn advance(&mut self, busy: bool) -> Result<Option<Outcome>> {
        if busy {
            return Ok(None);
        }
        match std::mem::replace(&mut self.under_way, UnderWay::Nothing) {
            UnderWay::Nothing => Ok(None),
            UnderWay::Writing(save, thread) => self.collect(save, thread),
            UnderWay::Committing(save, thread) => self.conclude(*save, thread).map(Some),
        }
    }

    /// Waits for the save under way.
    pub fn finish(&mut self) -> Result<Option<Outcome>> {
        loop {
            match self.under_way {
                UnderWay::Nothing => return Ok(None),
                _ => {
                    if let Some(outcome) = self.advance(false)? {
                        return Ok(Some(outcome));
                    }
                }
            }
        }
    }

    /// Every rank has written or failed; all learn what the others did.
    fn collect(&mut self, mut save: Box<Save>, thread: Writer) -> Result<Option<Outcome>> {
        let (snapshot, written) = joined(thread);
        self.room = match self.beside {
            true => snapshot.map_or(Room::None, Room::Ready),
            false => Room::Direct,
        };
        let report = match &written {
            Ok(written) => Report::Wrote(written.as_ref().map(|written| written.entry.clone())),
            Err(error) => Report::Failed(format!("{error:#}")),
        };
        let (mut entries, mut failed) = (Vec::new(), Vec::new());
        let reports = self.comm.all_gather_texts(&serde_json::to_vec(&report)?)?;
        for (rank, report) in reports.iter().enumerate() {
            match serde_json::from_slice(report).context("a rank's report of its file")? {
                Report::Wrote(entry) => entries.extend(entry),
                Report::Failed(why) => failed.push(format!("rank {rank}: {why}")),
            }
        }
        if !failed.is_empty() {
            return self.fail(&save, failed.join("; ")).map(Some);
        }
        save.manifest.files = entries;
        save.written = written.unwrap_or_default();
        let thread = match &self.fence {
            Some(fence) => {
                let (partial, manifest, fence) = (save.partial.clone(), save.manifest.clone(), fence.clone());
                let (plan, started) = (&self.identity.plan.checkpoint, save.started);
                let keep = Keep::of(plan);
                Some(spawn("commit", move || {
                    commit(&partial, &manifest, &fence, keep, started)
                })?)
            }
            None => None,
        };
        self.under_way = UnderWay::Committing(save, thread);
        Ok(None)
    }

    /// Rank 0 has committed or failed; all learn which.
    fn conclude(&mut self, save: Save, thread: Option<JoinHandle<Result<f64>>>) -> Result<Outcome> {
        let verdict = thread.map(|thread| verdict(&save, joined(thread)));
        let told = verdict.as_ref().map(serde_json::to_vec).transpose()?;
        let all = self.comm.all_gather_texts(&told.unwrap_or_default())?;
        let verdict = serde_json::from_slice(&all[0]).context("rank 0's word on the commit")?;
        match verdict {
            Verdict::Committed(committed) => {
                self.failures_in_a_row = 0;
                self.newest = Some(committed.step);
                self.best = save.manifest.best;
                Ok(Outcome::Committed(committed))
            }
            Verdict::Failed(why) => self.fail(&save, format!("rank 0: {why}")),
            Verdict::Replaced(why) => {
                self.clear(&save);
                self.comm.barrier()?;
                bail!(why)
            }
        }
    }

    /// Removes what is there of a save that came to nothing.
    fn clear(&self, save: &Save) {
        if self.comm.rank() == 0
            && let Err(error) = launcher::files::remove_folder(&save.partial)
        {
            tracing::warn!("{error:#}");
        }
    }

    /// Counts a failure and removes what is there of the save.
    fn fail(&mut self, save: &Save, why: String) -> Result<Outcome> {
        self.failures_in_a_row += 1;
        let (step, in_a_row) = (save.manifest.step, self.failures_in_a_row);
        self.clear(save);
        if in_a_row >= self.identity.plan.checkpoint.failures_in_a_row {
            // The first rank to end takes the others with it, rank 0 while it clears.
            self.comm.barrier()?;
            let newest = self.newest.map_or("none".into(), step_name);
            return Err(WritesFailed {
                in_a_row,
                step,
                why,
                newest,
            }
            .into());
        }
        Ok(Outcome::Failed { step, why, in_a_row })
    }
}

/// Rank 0's part, on a thread: commits, looks at what is there now, and makes room. Seconds since the save began.
fn commit(partial: &Path, manifest: &Manifest, fence: &Fence, keep: Keep, started: Instant) -> Result<f64> {
    let folder = files::commit(partial, manifest, fence)?;
    let seconds = started.elapsed().as_secs_f64();
    // Its files were each read back by who wrote them.
    check_listing(&folder, &files::read_manifest(&folder)?)?;
    let checkpoints = folder.parent().context("checkpoints lie in a folder")?;
    if let Err(error) = make_room(checkpoints, manifest, fence, keep) {
        tracing::warn!("old checkpoints stay: {error:#}");
    }
    Ok(seconds)
}

fn make_room(checkpoints: &Path, manifest: &Manifest, fence: &Fence, keep: Keep) -> Result<()> {
    fence.check()?;
    // First, so that the one that was best until now goes with the old, and this one never does.
    Best::note(manifest.best, checkpoints)?;
    keep.prune(checkpoints, manifest.step)?;
    Ok(())
}

fn verdict(save: &Save, committed: Result<f64>) -> Verdict {
    match committed {
        Ok(seconds) => {
            let of_file = save.written.as_ref().map(|written| written.seconds).unwrap_or_default();
            Verdict::Committed(Committed {
                step: save.manifest.step,
                bytes: save.manifest.bytes(),
                files: save.manifest.files.len(),
                seconds,
                stall: save.stall.as_secs_f64(),
                digest: of_file.digest,
                write: of_file.write,
                sync: of_file.sync,
                verify: of_file.verify,
                waited: of_file.waited,
            })
        }
        Err(error) if error.is::<Lost>() || error.is::<Refused>() => Verdict::Replaced(format!("{error:#}")),
        Err(error) => Verdict::Failed(format!("{error:#}")),
    }
}

fn spawn<T: Send + 'static>(name: &str, work: impl FnOnce() -> T + Send + 'static) -> Result<JoinHandle<T>> {
    std::thread::Builder::new()
        .name(name.to_owned())
        .spawn(work)
        .context("starting a thread that writes the checkpoint")
}

fn joined<T>(thread: JoinHandle<T>) -> T {
    thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}
