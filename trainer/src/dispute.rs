//! Two ranks that each have all master weights, and hold different ones: nobody there can say whose are right. The run ends; the
//! attempt that goes on from before computes the same steps again. Until the step that they began with different ones both had the same
//! gradients, so that it arrives there with what the sound rank had.

use anyhow::Result;
use launcher::history::{Dispute, Happening, What};
use sharding::digest::UNDECIDED;

use crate::step::{StepReport, Trainer};

/// What the last step, whose report this is, has shown. All ranks call it.
pub fn shown(trainer: &Trainer, report: &StepReport, node: &str) -> Result<Option<Dispute>> {
    if report.damaged.iter().all(|damage| damage.what != UNDECIDED) {
        return Ok(None);
    }
    let digests: Vec<u8> = trainer.masters.iter().flat_map(|digest| digest.to_le_bytes()).collect();
    let all = trainer.comm.all_gather_bytes(&digests)?;
    let nodes = trainer.comm.all_gather_texts(node.as_bytes())?;
    let begun_with = |at: usize| -> Vec<u64> {
        let digest = |rank: &Vec<u8>| u64::from_le_bytes(rank[8 * at..8 * (at + 1)].try_into().expect("8 bytes"));
        all.iter().map(digest).collect()
    };
    let first = trainer.step - trainer.masters.len() as u64;
    let each = (0..trainer.masters.len()).map(|at| (first + at as u64, begun_with(at)));
    let differ = |(_, masters): &(u64, Vec<u64>)| masters.iter().any(|other| *other != masters[0]);
    Ok(each.into_iter().find(differ).map(|(step, masters)| Dispute {
        step,
        masters,
        nodes: nodes
            .iter()
            .map(|node| String::from_utf8_lossy(node).into_owned())
            .collect(),
    }))
}

/// The last one of a run's history, where an attempt of so many ranks that goes on from step `first` gets there again.
pub fn open(history: &[Happening], first: u64, world: usize) -> Option<Dispute> {
    let last = history.iter().rev().find_map(|line| match &line.what {
        What::Differed(dispute) => Some(Some(dispute.clone())),
        What::Settled { .. } => Some(None),
        _ => None,
    });
    last?.filter(|dispute| first < dispute.step && dispute.masters.len() == world)
}

/// Who was right, where the last step was the one in dispute.
pub fn settled(dispute: &Dispute, trainer: &Trainer) -> Option<String> {
    let again = trainer.masters.last().filter(|_| trainer.step == dispute.step + 1)?;
    Some(settle(dispute, *again))
}

/// `again`: the digest of what the step was begun with when it was reached again.
fn settle(dispute: &Dispute, again: u64) -> String {
    let Dispute { step, masters, nodes } = dispute;
    let began = format!("ranks began step {step} with different master weights; computed again they are those of");
    let (right, wrong): (Vec<usize>, Vec<usize>) = (0..masters.len()).partition(|rank| masters[*rank] == again);
    if right.is_empty() {
        return format!("{began} neither: the config is another now, or both were damaged");
    }
    let named = |ranks: &[usize]| -> String {
        let node = |rank: usize| nodes.get(rank).map_or("an unknown node", String::as_str);
        let named: Vec<String> = ranks
            .iter()
            .map(|rank| format!("rank {rank} on {}", node(*rank)))
            .collect();
        named.join(", ")
    };
    format!(
        "{began} {}, so {} was damaged: take that machine out",
        named(&right),
        named(&wrong)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn differed(step: u64) -> Happening {
        let what = What::Differed(Dispute {
            step,
            masters: vec![5, 6],
            nodes: ["n1", "n7"].map(String::from).to_vec(),
        });
        Happening { unix_time: 0.0, what }
    }

    #[test]
    fn who_had_what_is_computed_again_was_right() {
        let dispute = open(&[differed(19)], 5, 2).unwrap();
        for (again, expected) in [
            (5, "those of rank 0 on n1, so rank 1 on n7 was damaged"),
            (6, "those of rank 1 on n7, so rank 0 on n1 was damaged"),
            (7, "those of neither"),
        ] {
            let said = settle(&dispute, again);
            assert!(said.contains(expected), "{said}");
        }
    }

    #[test]
    fn only_what_is_reached_again_is_open() {
        assert!(open(&[differed(19)], 18, 2).is_some());
        assert_eq!(open(&[differed(19)], 19, 2), None, "what was saved then is one of both");
        assert_eq!(open(&[differed(19)], 5, 4), None, "four ranks sum in another order");
        let what = What::Settled {
            step: 19,
            text: String::new(),
        };
        let settled = [differed(19), Happening { unix_time: 1.0, what }];
        assert_eq!(open(&settled, 5, 2), None);
        assert_eq!(open(&[differed(9), differed(19)], 5, 2).unwrap().step, 19);
        assert_eq!(open(&[], 0, 2), None);
    }
}
