//! What training state costs a rank in memory, and a step on the wire: pure arithmetic over the sizes of a model's stages. The
//! same rules as `sharding`'s, which allocates by them; `trainer/tests/sharded.rs` compares the two.

use std::collections::BTreeSet;

/// Slices are multiples of this many elements.
const ALIGNMENT: usize = 16;

/// How training is divided.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Division {
    /// ZeRO stage, 0 to 3.
    pub zero: u8,
    pub world: usize,
    /// Bytes of an element in the compute precision.
    pub width: usize,
}

/// Bytes on one rank.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StateBytes {
    /// Kept all the time, in the compute precision.
    pub parameters: u64,
    /// Kept all the time, f32.
    pub gradients: u64,
    /// Master weights and two moments, f32.
    pub optimizer: u64,
    /// Whole gradients and parameters of stages that come and go, at most.
    pub passing: u64,
}

impl StateBytes {
    pub fn total(&self) -> u64 {
        self.parameters + self.gradients + self.optimizer + self.passing
    }
}

/// The length of each of `n_slices` slices of `numel` elements, the padding of the last ones counted.
pub fn slice_len(numel: usize, n_slices: usize) -> usize {
    numel.div_ceil(n_slices).next_multiple_of(ALIGNMENT)
}

impl Division {
    /// Of what trains. `numels`: elements of each bucket; `stages[s]`: the buckets that stage s of the model reads, in forward
    /// order, where a tied head reads the embedding's.
    pub fn of_trained(&self, numels: &[usize], stages: &[Vec<usize>]) -> StateBytes {
        let n_slices = if self.zero == 0 { 1 } else { self.world };
        let slices: Vec<usize> = numels.iter().map(|numel| slice_len(*numel, n_slices)).collect();
        let padded: Vec<usize> = slices.iter().map(|slice| slice * n_slices).collect();
        let (slice, whole): (usize, usize) = (slices.iter().sum(), padded.iter().sum());
        // What is published is cast first, where the compute precision is another.
        let casts = if (1..=2).contains(&self.zero) && self.width != 4 {
            slice
        } else {
            0
        };
        let bytes = |elements: usize, width: usize| (elements * width) as u64;
        StateBytes {
            parameters: if self.zero < 3 { bytes(whole, self.width) } else { 0 },
            gradients: match self.zero {
                0 => bytes(whole, 4),
                1 => bytes(whole + slice, 4),
                _ => bytes(slice, 4),
            },
            optimizer: bytes(slice, 12),
            passing: if self.zero < 2 {
                0
            } else {
                self.most_passing(&padded, stages)
            }
            .max(bytes(casts, self.width)),
        }
    }

    /// Bytes of whole gradients and parameters at the moment when they are most. A gradient under way fills a slice beside the
    /// one that holds the micro-batches' before.
    fn most_passing(&self, padded: &[usize], stages: &[Vec<usize>]) -> u64 {
        let at = |moment: Moment| {
            let parameters = if self.zero >= 3 {
                sum(&moment.parameters, padded)
            } else {
                0
            };
            let arriving = sum(&moment.reducing, padded) / self.world;
            (self.width * parameters + 4 * (sum(&moment.gradients, padded) + arriving)) as u64
        };
        moments(stages).map(at).max().unwrap_or(0)
    }

    /// Of frozen weights, all on every rank or divided; arguments as in [`Division::of_trained`].
    pub fn of_frozen(&self, divided: bool, numels: &[usize], stages: &[Vec<usize>]) -> StateBytes {
        let bytes = |elements: usize| (elements * self.width) as u64;
        if !divided || self.world == 1 {
            return StateBytes {
                parameters: bytes(numels.iter().sum()),
                ..StateBytes::default()
            };
        }
        let slices: Vec<usize> = numels.iter().map(|numel| slice_len(*numel, self.world)).collect();
        let padded: Vec<usize> = slices.iter().map(|slice| slice * self.world).collect();
        StateBytes {
            parameters: bytes(slices.iter().sum()),
            passing: bytes(
                moments(stages)
                    .map(|moment| sum(&moment.parameters, &padded))
                    .max()
                    .unwrap_or(0),
            ),
            ..StateBytes::default()
        }
    }
}

/// Which buckets are whole while a stage runs.
struct Moment {
    parameters: BTreeSet<usize>,
    /// Filled now, or by the stage before and on their way.
    gradients: BTreeSet<usize>,
    reducing: BTreeSet<usize>,
}

/// Every stage of a step's second micro-batch. Entering a stage asks for the next one's parameters; the first stage's
/// backward reads none.
fn moments(stages: &[Vec<usize>]) -> impl Iterator<Item = Moment> {
    let last = stages.len() - 1;
    // A bucket is filled from the highest to the lowest stage that reads it.
    let filled = |stage: usize| -> BTreeSet<usize> {
        let reads = |stages: &[Vec<usize>], bucket: &usize| stages.iter().any(|buckets| buckets.contains(bucket));
        let buckets = stages[stage..].iter().flatten().copied();
        buckets.filter(|bucket| reads(&stages[..=stage], bucket)).collect()
    };
    let both = |a: usize, b: usize| stages[a].iter().chain(&stages[b]).copied().collect();
    let forward = (0..last).map(move |stage| {
        // The first micro-batch's last reduction may still be under way.
        let reducing = if stage == 0 { filled(0) } else { BTreeSet::new() };
        (both(stage, stage + 1), reducing.clone(), reducing)
    });
    let backward = (0..=last).map(move |stage| {
        let parameters = match stage {
            0 => BTreeSet::new(),
            1 => both(1, 1),
            _ => both(stage, stage - 1),
        };
        let now = filled(stage);
        let before = if stage == last {
            BTreeSet::new()
        } else {
            filled(stage + 1)
        };
        let reducing = before.difference(&now).copied().collect();
        (parameters, now.union(&before).copied().collect(), reducing)
    });
    let all: Vec<_> = forward.chain(backward).collect();
    all.into_iter().map(|(parameters, gradients, reducing)| Moment {
        parameters,
        gradients,
        reducing,
    })
}

fn sum(buckets: &BTreeSet<usize>, sizes: &[usize]) -> usize {
    buckets.iter().map(|bucket| sizes[*bucket]).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_stage_of_zero_keeps_less() {
        // Embedding, two layers, head: 2,560 elements, which four divide without padding.
        let (numels, stages) = ([1024, 256, 256, 1024], [vec![0], vec![1], vec![2], vec![3]]);
        let at = |zero| {
            Division {
                zero,
                world: 4,
                width: 2,
            }
            .of_trained(&numels, &stages)
        };
        let all = 2560;
        let bytes = |zero| {
            let StateBytes {
                parameters,
                gradients,
                optimizer,
                passing,
            } = at(zero);
            [parameters, gradients, optimizer, passing]
        };
        assert_eq!(bytes(0), [2 * all, 4 * all, 12 * all, 0]);
        assert_eq!(bytes(1), [2 * all, 5 * all, 3 * all, all / 4 * 2]);
        // The last layer's gradient, and the head's on its way to a slice.
        assert_eq!(bytes(2), [2 * all, all, 3 * all, 4 * (1280 + 1024 / 4)]);
        // In the next forward: embedding and first layer, and the embedding's gradient on its way; or 4 · 1024 + 2 · 1280 at
        // the head; or 4 · (1280 + 1024 / 4) + 2 · 512 in the last layer.
        assert_eq!(bytes(3), [0, all, 3 * all, 4 * (1024 + 1024 / 4) + 2 * 1280]);
        assert!((0..3).all(|zero| at(zero).total() > at(zero + 1).total()));
    }

    #[test]
    fn frozen_weights_are_whole_or_divided() {
        let division = Division {
            zero: 1,
            world: 3,
            width: 2,
        };
        let stages = [vec![0], vec![1], vec![]];
        assert_eq!(division.of_frozen(false, &[100, 50], &stages).total(), 300);
        // Slices of 34 and 17 elements are padded to 48 and 32.
        let divided = division.of_frozen(true, &[100, 50], &stages);
        assert_eq!((divided.parameters, divided.passing), (160, 2 * 3 * (48 + 32)));
    }
}
