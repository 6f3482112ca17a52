//! Who is at fault: what each rank last said of itself, when, and what follows from that. No clock and no socket is near; the
//! caller tells the time.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use crate::pulse::{Phase, State};

/// Others must have waited so long, and so many times longer than anything did before, for a sentence about who is slow.
const NOTICE_AFTER: Duration = Duration::from_secs(10);
const NOTICE_TIMES: u32 = 5;
/// All wait and none moves: a collective may be as slow as its link, but not for ever.
const ALL_WAIT: Duration = Duration::from_secs(600);

/// One rank as it is seen from the watch.
struct Seen {
    rank: usize,
    /// "rank 3 on n4 (process 711)"
    name: String,
    state: State,
    heard: Instant,
    /// When its marks last grew.
    moved: Instant,
    left: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Finding {
    /// The job cannot go on; the sentence says who and why.
    Over(String),
    /// It goes on; people should know.
    Notice(String),
}

pub struct Watch {
    seen: Vec<Seen>,
    /// Without a sign for so long, a rank is lost.
    silence: Duration,
    last_tick: Instant,
    /// The longest that a point of a step has taken on any rank.
    longest: Duration,
    /// Of this rank at these marks a notice was given.
    noticed: Option<(usize, u64)>,
}

impl Watch {
    /// Ranks with their names. Where one is asked for below, by its place among these.
    pub fn new(names: Vec<(usize, String)>, silence: Duration, now: Instant) -> Watch {
        let seen = names.into_iter().map(|(rank, name)| Seen {
            rank,
            name,
            state: State::default(),
            heard: now,
            moved: now,
            left: false,
        });
        Watch {
            seen: seen.collect(),
            silence,
            last_tick: now,
            longest: Duration::ZERO,
            noticed: None,
        }
    }

    /// A rank said where it is.
    pub fn hear(&mut self, rank: usize, state: State, now: Instant) {
        let seen = &mut self.seen[rank];
        seen.heard = now;
        if state.marks != seen.state.marks {
            if matches!(
                seen.state.phase,
                Phase::Batch | Phase::Forward | Phase::Backward | Phase::Update
            ) {
                self.longest = self.longest.max(now.duration_since(seen.moved));
            }
            seen.moved = now;
        }
        seen.state = state;
    }

    /// A rank has ended well.
    pub fn leave(&mut self, rank: usize) {
        self.seen[rank].left = true;
    }

    pub fn has_left(&self, rank: usize) -> bool {
        self.seen[rank].left
    }

    pub fn all_left_but(&self, rank: usize) -> bool {
        self.seen
            .iter()
            .enumerate()
            .all(|(other, seen)| other == rank || seen.left)
    }

    /// Called a few times a second.
    pub fn tick(&mut self, now: Instant) -> Option<Finding> {
        let late = now.duration_since(self.last_tick);
        self.last_tick = now;
        if late > self.silence / 2 {
            // It is this process that was away (stopped, or its machine was): what others said meanwhile is still to be read.
            for seen in &mut self.seen {
                (seen.heard, seen.moved) = (now, now);
            }
            return None;
        }
        let silent = |seen: &Seen| !seen.left && now.duration_since(seen.heard) > self.silence;
        if let Some(rank) = self.first(silent) {
            let seconds = now.duration_since(self.seen[rank].heard).as_secs_f64();
            let why = format!("gave no sign for {seconds:.1} s: it is stopped, or cut off from the network");
            return Some(Finding::Over(self.sentence(rank, &why)));
        }
        None
    }

    /// A rank that gives signs and does not move; for whoever hears all.
    pub fn stuck(&mut self, now: Instant) -> Option<Finding> {
        let still = |seen: &Seen| now.duration_since(seen.moved);
        let works = |seen: &Seen| !seen.left && seen.state.waits.is_none();
        let slow = (0..self.seen.len())
            .filter(|rank| works(&self.seen[*rank]))
            .max_by_key(|rank| still(&self.seen[*rank]));
        let waited = |seen: &&Seen| !seen.left && seen.state.waits.is_some();
        // The one of those who wait that has waited least.
        let others = self.seen.iter().filter(waited).map(still).min();
        match (slow, others) {
            (Some(rank), Some(others)) => {
                let (seen, time) = (&self.seen[rank], still(&self.seen[rank]));
                if time > seen.state.phase.patience().max(20 * self.longest) && others > NOTICE_AFTER {
                    let why = format!("is stuck: it has not moved for {} s", time.as_secs());
                    return Some(Finding::Over(self.sentence(rank, &why)));
                }
                let usual = matches!(seen.state.phase, Phase::Load | Phase::Start);
                let known = self.noticed == Some((rank, seen.state.marks));
                if !usual && !known && time.min(others) > NOTICE_AFTER.max(NOTICE_TIMES * self.longest) {
                    self.noticed = Some((rank, seen.state.marks));
                    let why = format!("keeps the others waiting for {} s", others.as_secs());
                    return Some(Finding::Notice(self.sentence(rank, &why)));
                }
                None
            }
            (None, Some(others)) if others > ALL_WAIT && self.seen.iter().all(|seen| !seen.left) => {
                let seconds = others.as_secs();
                let all = self.others(None);
                Some(Finding::Over(format!(
                    "all ranks wait and none has moved for {seconds} s: {all}; the network or the engine of collectives is stuck"
                )))
            }
            // Nobody waits in a collective, as ranks see it that wait for their GPU.
            (Some(_), None) => {
                let here = || self.seen.iter().filter(|seen| !seen.left);
                let least = here().map(still).min()?;
                let patience = here().map(|seen| seen.state.phase.patience()).max()?;
                (least > ALL_WAIT.max(patience).max(20 * self.longest)).then(|| {
                    Finding::Over(format!(
                        "no rank has moved for {} s: {}; a device, its driver or the engine of collectives is stuck",
                        least.as_secs(),
                        self.others(None)
                    ))
                })
            }
            _ => None,
        }
    }

    fn first(&self, is: impl Fn(&Seen) -> bool) -> Option<usize> {
        // One that works before one that waits for it: both are silent where a whole node is.
        let found = |waits: bool| {
            self.seen
                .iter()
                .position(|seen| is(seen) && seen.state.waits.is_some() == waits)
        };
        found(false).or_else(|| found(true))
    }

    /// "rank 3 on n4 (process 711) WHY; it was last in backward of stage 9 in step 1200; the 3 others wait in reduce-scatter 31"
    pub fn sentence(&self, rank: usize, why: &str) -> String {
        let seen = &self.seen[rank];
        let others = self.others(Some(rank));
        format!("{} {why}; it was last in {}{others}", seen.name, seen.state)
    }

    fn others(&self, but: Option<usize>) -> String {
        let mut doing: BTreeMap<(bool, String), Vec<usize>> = BTreeMap::new();
        for (place, seen) in self.seen.iter().enumerate() {
            if Some(place) == but || seen.left {
                continue;
            }
            let what = match seen.state.waits {
                Some((collective, number)) => (
                    true,
                    format!("in {} {number} ({})", collective.name(), seen.state.phase.name()),
                ),
                None => (false, format!("at {}", seen.state)),
            };
            doing.entry(what).or_default().push(seen.rank);
        }
        let mut groups: Vec<_> = doing.into_iter().collect();
        // Those who wait tell most.
        groups.sort_by_key(|((waits, _), ranks)| std::cmp::Reverse((*waits, ranks.len())));
        let said = |((waits, what), ranks): &((bool, String), Vec<usize>)| {
            let verb = match (waits, ranks.len()) {
                (true, 1) => "waits",
                (true, _) => "wait",
                (false, 1) => "works",
                (false, _) => "work",
            };
            format!("{} {verb} {what}", super::sameness::ranks(ranks))
        };
        let shown: Vec<String> = groups.iter().take(3).map(said).collect();
        match (shown.is_empty(), but) {
            (true, _) => String::new(),
            (false, Some(_)) => format!("; of the others {}", shown.join(", ")),
            (false, None) => shown.join(", "),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pulse::Collective;

    const SILENCE: Duration = Duration::from_secs(4);

    fn state(phase: Phase, stage: u32, waits: Option<(Collective, u64)>, marks: u64) -> State {
        State {
            phase,
            stage,
            step: 1200,
            waits,
            marks,
        }
    }

    /// Three ranks; time goes by quarters of a second, and every half second those of `alive` say `states(rank, second)`.
    fn run(seconds: u64, alive: &[usize], states: impl Fn(usize, f64) -> State) -> Vec<(f64, Finding)> {
        let start = Instant::now();
        let names = (0..3).map(|rank| (rank, format!("rank {rank} on n{rank}"))).collect();
        let mut watch = Watch::new(names, SILENCE, start);
        let mut found = Vec::new();
        for quarter in 0..seconds * 4 {
            let at = quarter as f64 / 4.0;
            let now = start + Duration::from_millis(250 * quarter);
            for rank in 0..3 {
                // The first second, all are there.
                if quarter % 2 == 0 && (at < 1.0 || alive.contains(&rank)) {
                    watch.hear(rank, states(rank, at), now);
                }
            }
            if let Some(finding) = watch.tick(now).or_else(|| watch.stuck(now)) {
                let over = matches!(finding, Finding::Over(_));
                found.push((at, finding));
                if over {
                    break;
                }
            }
        }
        found
    }

    fn waiting(rank: usize) -> State {
        match rank {
            1 => state(Phase::Backward, 9, None, 7),
            _ => state(Phase::Update, 0, Some((Collective::ReduceScatter, 31)), 8),
        }
    }

    #[test]
    fn a_silent_rank_is_named_with_what_the_others_wait_in() {
        let found = run(20, &[0, 2], |rank, _| waiting(rank));
        let [(at, Finding::Over(text))] = &found[..] else {
            panic!("{found:?}")
        };
        assert!(*at < 5.5, "{at}");
        assert!(text.starts_with("rank 1 on n1 gave no sign for 4."), "{text}");
        assert!(
            text.ends_with(
                "it was last in backward of stage 9 in step 1200; of the others ranks 0 and 2 wait in reduce-scatter 31 (the update)"
            ),
            "{text}"
        );
    }

    #[test]
    fn long_work_is_no_alarm_and_is_told_once() {
        // Every 30 s rank 1 moves, and the others wait meanwhile, for ten minutes.
        let found = run(600, &[0, 1, 2], |rank, at| State {
            marks: (at / 30.0) as u64,
            ..waiting(rank)
        });
        assert!(
            matches!(&found[..], [(_, Finding::Notice(text))] if text.starts_with("rank 1 on n1 keeps the others waiting")),
            "{found:?}"
        );
    }

    #[test]
    fn loading_for_minutes_is_no_alarm() {
        let found = run(1500, &[0, 1, 2], |rank, _| match rank {
            1 => state(Phase::Load, 0, None, 1),
            _ => state(Phase::Load, 0, Some((Collective::Barrier, 1)), 2),
        });
        assert_eq!(found, []);
    }

    #[test]
    fn who_gives_signs_but_does_not_move_is_stuck_in_the_end() {
        let found = run(600, &[0, 1, 2], |rank, _| waiting(rank));
        let [(notice, Finding::Notice(_)), (over, Finding::Over(text))] = &found[..] else {
            panic!("{found:?}")
        };
        assert!((10.0..11.0).contains(notice) && (300.0..301.0).contains(over));
        assert!(
            text.starts_with("rank 1 on n1 is stuck: it has not moved for 300 s; it was last in backward"),
            "{text}"
        );
    }

    #[test]
    fn all_waiting_for_ever_is_told() {
        let found = run(700, &[0, 1, 2], |rank, _| {
            state(Phase::Update, 0, Some((Collective::AllGather, 30 + rank as u64 / 2)), 1)
        });
        let [(_, Finding::Over(text))] = &found[..] else {
            panic!("{found:?}")
        };
        assert!(
            text.contains(
                "ranks 0 and 1 wait in all-gather 30 (the update), rank 2 waits in all-gather 31 (the update)"
            ),
            "{text}"
        );
    }

    #[test]
    fn all_still_and_none_waiting_is_told() {
        // As on GPUs, whose collectives are waited for where a number is read.
        let found = run(700, &[0, 1, 2], |_, _| state(Phase::Backward, 9, None, 1));
        let [(at, Finding::Over(text))] = &found[..] else {
            panic!("{found:?}")
        };
        assert!((600.0..602.0).contains(at), "{at}");
        assert!(
            text.starts_with("no rank has moved for 600 s: ranks 0–2 work at backward of stage 9 in step 1200"),
            "{text}"
        );
        // One that moves is enough, and so is work that takes long.
        assert_eq!(
            run(700, &[0, 1, 2], |rank, at| state(
                Phase::Backward,
                9,
                None,
                at as u64 / 20 * (rank as u64 % 2)
            )),
            []
        );
        assert_eq!(run(1700, &[0, 1, 2], |_, _| state(Phase::Save, 0, None, 1)), []);
    }

    #[test]
    fn a_watch_that_was_away_accuses_nobody() {
        let start = Instant::now();
        let mut watch = Watch::new(vec![(0, "a".into()), (1, "b".into())], SILENCE, start);
        let away = start + Duration::from_secs(60);
        assert_eq!(watch.tick(away), None);
        assert_eq!(watch.tick(away + Duration::from_secs(1)), None);
        assert!(watch.tick(away + Duration::from_millis(2_900)).is_none());
        assert!(watch.tick(away + Duration::from_millis(4_100)).is_some());
    }
}
