//! What became of each attempt at a run, and whether another is worth its node-hours: asked by job scripts between srun's
//! end and their own. Everything is in the run's folder, since a requeued job remembers nothing.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::Context;
use serde::{Deserialize, Serialize};

use crate::checkpoint::FOLDER;
use crate::checkpoint::manifest::{MANIFEST, step_of};
use crate::{exit, files, place};

/// So many attempts in a row that moved no checkpoint, and the run is given up: something is wrong that time does not mend.
pub const MOST_WITHOUT_PROGRESS: usize = 3;

/// Before nodes are tried again on which the last attempt came to nothing: a daemon that Slurm restarts, a mount that comes back.
pub const PAUSE: Duration = Duration::from_secs(20);

/// One line of `attempts.jsonl`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attempt {
    /// What belongs together: a job with its requeues, an array, a chain. Only these count against each other.
    pub series: String,
    pub code: i32,
    /// The step that the newest whole checkpoint holds; 0 without one.
    pub step: u64,
    pub unix_time: u64,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    Finished,
    /// Worth another attempt: at once on the same nodes, or by way of the queue.
    Again {
        here: bool,
        /// How long the job should wait first.
        after: Duration,
        why: String,
    },
    Stop {
        code: i32,
        why: String,
    },
}

/// What the job script should do after `now`, which came after `earlier`. `has_time`: the job has enough left for another to
/// start and to save; one that the limit ended before that would leave nobody to ask for more.
pub fn decide(earlier: &[Attempt], now: &Attempt, has_time: bool) -> Verdict {
    let why = meaning(now.code);
    match now.code {
        exit::FINISHED => return Verdict::Finished,
        exit::USER | exit::REFUSED | CANNOT_RUN..=NOT_FOUND => {
            let why = format!("{why}; another attempt would end alike");
            return Verdict::Stop { code: now.code, why };
        }
        _ => {}
    }
    let in_vain = in_vain(earlier, now);
    if in_vain >= MOST_WITHOUT_PROGRESS {
        let why = format!(
            "{why}; {in_vain} attempts in a row have not got beyond step {}, so no other is made: see the logs, then submit again",
            now.step
        );
        return Verdict::Stop { code: now.code, why };
    }
    let left = MOST_WITHOUT_PROGRESS - in_vain;
    // Who wants more time has used this job's up. Who failed twice on these nodes may be better off on others.
    let here = has_time && now.code != exit::MORE_TIME && in_vain < 2;
    let why = format!(
        "{why}; the next attempt goes on from step {} ({left} left without progress)",
        now.step
    );
    let after = if here && in_vain > 0 { PAUSE } else { Duration::ZERO };
    Verdict::Again { here, after, why }
}

/// The shell's own codes for a program that cannot be started or is not there.
const CANNOT_RUN: i32 = 126;
const NOT_FOUND: i32 = 127;

/// How many attempts of this series, the last ones and this, moved no checkpoint.
fn in_vain(earlier: &[Attempt], now: &Attempt) -> usize {
    let same: Vec<&Attempt> = earlier.iter().filter(|attempt| attempt.series == now.series).collect();
    // A run may have checkpoints from before this series; of its first attempt nobody knows what it began with.
    let mut steps: Vec<u64> = earlier
        .iter()
        .rev()
        .find(|a| a.series != now.series)
        .map(|a| a.step)
        .into_iter()
        .collect();
    steps.extend(same.iter().map(|attempt| attempt.step));
    steps.push(now.step);
    let known = steps.windows(2).rev().take_while(|pair| pair[1] <= pair[0]).count();
    // Of the very first attempt of a run, step 0 says that it saved nothing.
    known + usize::from(known + 1 == steps.len() && steps[0] == 0)
}

fn meaning(code: i32) -> String {
    match code {
        exit::FINISHED => "finished".to_owned(),
        exit::USER => "the config or its files do not fit (2)".to_owned(),
        exit::INTERNAL => "a bug of panglot's ended it (70)".to_owned(),
        exit::IO => "files could not be read or written (74)".to_owned(),
        exit::MORE_TIME => "a checkpoint is written, more time is wanted (75)".to_owned(),
        exit::PEER => "a rank was lost or hung (76)".to_owned(),
        exit::REFUSED => "the pre-flight refused these nodes (77)".to_owned(),
        CANNOT_RUN | NOT_FOUND => format!("the program could not be started ({code})"),
        129.. => format!("a rank was ended by signal {} ({code})", code - 128),
        _ => format!("it ended with exit code {code}"),
    }
}

/// The records of a run's attempts.
pub struct Attempts {
    run: PathBuf,
}

impl Attempts {
    pub fn of(run: &Path) -> Attempts {
        Attempts { run: run.to_owned() }
    }

    /// Every attempt that a job script has reported, oldest first.
    pub fn all(&self) -> Vec<Attempt> {
        let text = fs::read_to_string(self.file()).unwrap_or_default();
        text.lines()
            .filter_map(|line| serde_json::from_str(line).ok())
            .collect()
    }

    /// A rank leaves its own exit code: srun gives the highest of all, and those that it terminates have the highest.
    pub fn note_rank(&self, rank: usize, code: i32) -> anyhow::Result<()> {
        let note = format!("{code} {}", place::attempt());
        files::write_atomically(&self.notes().join(rank.to_string()), note.as_bytes())
    }

    /// Takes in what the ranks left, adds one attempt to the list and says what is due; `has_time` as in [`decide`].
    pub fn ended(&self, series: &str, srun_code: i32, has_time: bool) -> anyhow::Result<Verdict> {
        let noted = self.take_notes();
        let now = Attempt {
            series: series.to_owned(),
            code: if srun_code == exit::FINISHED {
                exit::FINISHED
            } else {
                most_telling(&noted, srun_code)
            },
            step: newest_step(&self.run.join(FOLDER)).unwrap_or(0),
            unix_time: SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .unwrap_or_default()
                .as_secs(),
        };
        let verdict = decide(&self.all(), &now, has_time);
        let mut line = serde_json::to_string(&now)?;
        line.push('\n');
        let file = self.file();
        let append = || {
            fs::create_dir_all(&self.run)?;
            fs::OpenOptions::new()
                .create(true)
                .append(true)
                .open(&file)?
                .write_all(line.as_bytes())
        };
        append().with_context(|| format!("cannot write {}", file.display()))?;
        Ok(verdict)
    }

    /// Before an attempt: what ranks of another one left says nothing of this.
    pub fn clear_notes(&self) {
        let _ = fs::remove_dir_all(self.notes());
    }

    /// Whether a rank of this attempt has failed. Then all have, or will have in some seconds.
    pub fn has_failed_rank(&self) -> bool {
        !self.noted().is_empty()
    }

    fn take_notes(&self) -> Vec<i32> {
        let codes = self.noted();
        self.clear_notes();
        codes
    }

    /// The codes that ranks of this attempt have left.
    fn noted(&self) -> Vec<i32> {
        let attempt = place::attempt();
        let entries = fs::read_dir(self.notes()).into_iter().flatten().flatten();
        let code = |entry: fs::DirEntry| {
            let note = fs::read_to_string(entry.path()).ok()?;
            let (code, of) = note.split_once(' ')?;
            (of == attempt).then(|| code.parse().ok())?
        };
        entries.filter_map(code).collect()
    }

    fn file(&self) -> PathBuf {
        self.run.join("attempts.jsonl")
    }

    fn notes(&self) -> PathBuf {
        self.run.join("logs/ended")
    }
}

/// Of several ranks' codes the one that says why: those who lost a peer, or were told to end, only followed.
fn most_telling(noted: &[i32], srun_code: i32) -> i32 {
    let order = [
        exit::USER,
        exit::REFUSED,
        exit::INTERNAL,
        exit::IO,
        exit::MORE_TIME,
        exit::PEER,
    ];
    let told = order.into_iter().find(|code| noted.contains(code));
    told.or(noted.iter().copied().find(|code| *code != 128 + 15))
        .unwrap_or(srun_code)
}

/// The step of the newest whole checkpoint: those still being written have another name.
pub fn newest_step(checkpoints: &Path) -> Option<u64> {
    let entries = fs::read_dir(checkpoints).ok()?.flatten();
    let whole = entries.filter(|entry| entry.path().join(MANIFEST).is_file());
    whole.filter_map(|entry| step_of(entry.file_name().to_str()?)).max()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attempt(series: &str, code: i32, step: u64) -> Attempt {
        Attempt {
            series: series.to_owned(),
            code,
            step,
            unix_time: 0,
        }
    }

    /// Attempts of job 7, (code, newest step) each; what is said of the last.
    fn check(attempts: &[(i32, u64)], expected: &str) {
        let all: Vec<Attempt> = attempts.iter().map(|&(code, step)| attempt("7", code, step)).collect();
        let (now, earlier) = all.split_last().unwrap();
        let said = match decide(earlier, now, true) {
            Verdict::Finished => "finished".to_owned(),
            Verdict::Again { here: true, .. } => "again here".to_owned(),
            Verdict::Again { here: false, .. } => "requeue".to_owned(),
            Verdict::Stop { code, .. } => format!("stop {code}"),
        };
        assert_eq!(said, expected, "{attempts:?}");
    }

    #[test]
    fn an_attempt_is_repeated_while_it_helps() {
        check(&[(0, 20)], "finished");
        check(&[(75, 5)], "requeue");
        check(&[(137, 0)], "again here");
        check(&[(137, 0), (137, 0)], "requeue");
        check(&[(137, 0), (137, 0), (137, 0)], "stop 137");
        check(&[(137, 0), (76, 0), (75, 5)], "requeue");
        check(&[(76, 5), (76, 5)], "again here");
        check(&[(76, 5), (76, 5), (76, 5)], "requeue");
        check(&[(76, 5), (76, 5), (76, 5), (76, 5)], "stop 76");
        check(&[(76, 5), (76, 5), (76, 5), (76, 10)], "again here");
        check(&[(75, 5), (75, 10), (75, 15), (75, 20)], "requeue");
    }

    #[test]
    fn what_came_to_nothing_is_not_repeated_at_once() {
        let pause = |step| match decide(&[attempt("7", 76, 5)], &attempt("7", 76, step), true) {
            Verdict::Again { here: true, after, .. } => after,
            verdict => panic!("{verdict:?}"),
        };
        assert_eq!((pause(5), pause(10)), (PAUSE, Duration::ZERO));
    }

    #[test]
    fn a_job_whose_time_is_nearly_up_goes_by_way_of_the_queue() {
        let verdict = |has_time| decide(&[attempt("7", 76, 5)], &attempt("7", 76, 10), has_time);
        for has_time in [true, false] {
            assert!(
                matches!(verdict(has_time), Verdict::Again { here, after: Duration::ZERO, .. } if here == has_time)
            );
        }
    }

    #[test]
    fn what_would_fail_again_is_not_repeated() {
        for code in [exit::USER, exit::REFUSED, 127] {
            check(&[(code, 5)], &format!("stop {code}"));
        }
    }

    #[test]
    fn who_submits_again_has_all_attempts_again() {
        let earlier = [
            attempt("7", 76, 5),
            attempt("7", 76, 5),
            attempt("7", 76, 5),
            attempt("7", 76, 5),
        ];
        assert!(matches!(
            decide(&earlier, &attempt("8", 76, 5), true),
            Verdict::Again { .. }
        ));
    }

    #[test]
    fn the_rank_at_fault_speaks_for_all() {
        for (noted, srun, expected) in [
            (vec![143, 2, 143], 143, 2),
            (vec![143, 137, 143], 143, 137),
            (vec![76, 137, 76], 137, 76),
            (vec![143, 143], 143, 143),
            (vec![], 137, 137),
            (vec![75, 75], 75, 75),
        ] {
            assert_eq!(most_telling(&noted, srun), expected, "{noted:?}");
        }
    }

    #[test]
    fn ranks_leave_their_codes_and_the_script_takes_them() {
        let run = tempfile::tempdir().unwrap();
        let attempts = Attempts::of(run.path());
        attempts.note_rank(0, 143).unwrap();
        attempts.note_rank(1, 2).unwrap();
        assert!(attempts.has_failed_rank());
        assert!(matches!(
            attempts.ended("7", 143, true).unwrap(),
            Verdict::Stop { code: 2, .. }
        ));
        assert!(!attempts.has_failed_rank());
        // A thawed node's ranks speak of another start, those of a killed srun of an earlier attempt.
        files::write_atomically(&run.path().join("logs/ended/1"), b"76 7.1.").unwrap();
        files::write_atomically(&run.path().join("logs/ended/2"), b"143 ..1").unwrap();
        assert!(!attempts.has_failed_rank());
        // Taken: the next attempt is not told by this one's ranks.
        assert!(matches!(attempts.ended("7", 143, true).unwrap(), Verdict::Again { .. }));
        let codes: Vec<i32> = attempts.all().iter().map(|attempt| attempt.code).collect();
        assert_eq!(codes, [2, 143]);
    }

    #[test]
    fn only_a_whole_checkpoint_counts() {
        let folder = tempfile::tempdir().unwrap();
        for (name, whole) in [
            ("step-00000005", true),
            ("step-00000010", false),
            ("step-00000015.ab.partial", true),
        ] {
            fs::create_dir(folder.path().join(name)).unwrap();
            if whole {
                fs::write(folder.path().join(name).join("manifest.json"), "{}").unwrap();
            }
        }
        assert_eq!(newest_step(folder.path()), Some(5));
    }
}
