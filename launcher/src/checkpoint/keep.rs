//! Which checkpoints are kept: the newest few, and every Nth for good. Nothing goes before a newer one has verified.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::Best;
use super::fence::remove_dead;
use super::manifest::{step_name, step_of};
use super::read::{leftovers, list};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Keep {
    /// The newest this many; at least 2.
    pub newest: usize,
    /// Those whose step is a multiple of this as well.
    pub every: Option<u64>,
}

impl Keep {
    pub fn of(settings: &configs::Checkpoint) -> Keep {
        Keep {
            newest: settings.keep,
            every: settings.keep_every,
        }
    }

    /// Of steps in rising order, those that go.
    pub fn superfluous(self, steps: &[u64]) -> Vec<u64> {
        let old = steps.len().saturating_sub(self.newest.max(2));
        let kept = |step: &u64| self.every.is_some_and(|every| step.is_multiple_of(every));
        steps[..old].iter().copied().filter(|step| !kept(step)).collect()
    }

    /// Names of what goes once the newest whole checkpoint, of step `verified`, has verified: what is superfluous, and damaged
    /// checkpoints of steps up to that. Newer ones count for nothing. What is best on held-out text stays.
    pub fn goes(self, checkpoints: &Path, verified: u64) -> Result<Vec<String>> {
        let best = Best::read(checkpoints)?.map(|best| best.step);
        let steps = list(checkpoints)?.into_iter().map(|(step, _)| step);
        let steps: Vec<u64> = steps.filter(|step| *step <= verified).collect();
        let old = self.superfluous(&steps).into_iter();
        let mut names: Vec<String> = old.filter(|step| Some(*step) != best).map(step_name).collect();
        names.extend(leftovers(checkpoints)?.into_iter().filter(|name| {
            let step = name.strip_suffix(".damaged").and_then(|name| name.split('.').next());
            step.and_then(step_of).is_some_and(|step| step <= verified)
        }));
        Ok(names)
    }

    /// Removes what [`Keep::goes`] names.
    pub fn prune(self, checkpoints: &Path, verified: u64) -> Result<Vec<PathBuf>> {
        let gone = self.goes(checkpoints, verified)?;
        // What an attempt before left under these names would be in the way.
        remove_dead(checkpoints)?;
        for name in &gone {
            // At once, so that whoever is killed here leaves nothing that looks like a checkpoint and is none.
            let dead = checkpoints.join(format!("{name}.removed"));
            fs::rename(checkpoints.join(name), &dead).with_context(|| format!("removing {name}"))?;
        }
        remove_dead(checkpoints)?;
        Ok(gone.into_iter().map(|name| checkpoints.join(name)).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(newest: usize, every: Option<u64>, steps: &[u64], gone: &[u64]) {
        assert_eq!(
            Keep { newest, every }.superfluous(steps),
            gone,
            "{newest} {every:?} {steps:?}"
        );
    }

    #[test]
    fn the_newest_and_every_nth_stay() {
        check(2, None, &[5, 10, 15, 20], &[5, 10]);
        check(2, Some(10), &[5, 10, 15, 20, 25], &[5, 15]);
        check(3, None, &[5, 10], &[]);
        // One alone is never relied on.
        check(0, None, &[5, 10, 15], &[5]);
    }

    #[test]
    fn pruning_leaves_what_is_under_way_and_what_has_not_verified() {
        let folder = tempfile::tempdir().unwrap();
        let names = [
            "step-00000005",
            "step-00000010",
            "step-00000015",
            "step-00000020",
            "step-00000025.ab-1.partial",
            "step-00000010.ab.damaged",
            "step-00000025.ab.damaged",
            "step-00000001.removed",
        ];
        for name in names {
            fs::create_dir(folder.path().join(name)).unwrap();
            fs::write(folder.path().join(name).join("file"), "x").unwrap();
        }
        let keep = Keep { newest: 2, every: None };
        let planned = keep.goes(folder.path(), 15).unwrap();
        let gone = keep.prune(folder.path(), 15).unwrap();
        assert_eq!(
            gone.iter()
                .map(|path| path.file_name().unwrap().to_str().unwrap())
                .collect::<Vec<_>>(),
            planned
        );
        let mut left: Vec<_> = fs::read_dir(folder.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        left.sort();
        let stay = [names[1], names[2], names[3], names[4], names[6]];
        let mut stay: Vec<_> = stay.iter().map(std::ffi::OsString::from).collect();
        stay.sort();
        assert_eq!(left, stay);
    }

    #[test]
    fn the_best_on_held_out_text_stays_and_none_goes_while_that_is_not_known() {
        let folder = tempfile::tempdir().unwrap();
        for step in 1..=5 {
            fs::create_dir(folder.path().join(step_name(step))).unwrap();
        }
        let keep = Keep { newest: 2, every: None };
        let goes = || keep.goes(folder.path(), 5);
        let best = |step| Best {
            step,
            macro_bits_per_byte: 1.5,
        };
        assert_eq!(goes().unwrap(), [1, 2, 3].map(step_name));
        Best::note(Some(best(2)), folder.path()).unwrap();
        assert_eq!(goes().unwrap(), [1, 3].map(step_name));
        assert_eq!(Best::read(folder.path()).unwrap(), Some(best(2)));
        fs::write(folder.path().join("best.json"), "{").unwrap();
        assert!(goes().is_err());
        fs::remove_file(folder.path().join("best.json")).unwrap();
        Best::note(None, folder.path()).unwrap();
        assert_eq!(goes().unwrap().len(), 3);
    }
}
