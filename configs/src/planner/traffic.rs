//! Bytes that a rank hands to collectives in a step, counted as `sharding::Comm::sent` counts them: no element is sent twice.
//! `trainer/tests/planner.rs` compares the two to the byte.

use serde::Serialize;

use super::memory::{Division, slice_len};
use super::sizes::{Buckets, Sizes};
use crate::plan::{FullModule, Train};

/// Numbers of eight bytes that every rank tells every other in a step: its targets; the squares of its gradient, its loss,
/// whether it was asked to stop, and the digest of its rows.
const NUMBERS: usize = 1 + 3 + ROWS_DIGEST;
/// Of a batch's rows: `corpus::RowsDigest`.
const ROWS_DIGEST: usize = 4;

/// Of one rank, in one step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Traffic {
    /// Gradients, to where they are summed.
    pub gradients: u64,
    /// Trained parameters, from where they were updated.
    pub parameters: u64,
    /// Frozen weights, where they are divided.
    pub frozen: u64,
    /// Loss, norm, digests, counts.
    pub numbers: u64,
    /// Rows of the embedding that may travel beside all that, at most: those of a tied head's gradient behind it, and those
    /// that the first micro-batch needs before the publication.
    pub rows: u64,
    /// Whether rows of the embedding, or of its gradient, may travel. Then the figures are what ranks send at most on average.
    pub rows_may_travel: bool,
}

impl Traffic {
    pub fn of(sizes: &Sizes, train: &Train, division: &Division, shard_frozen: bool, micro_batches: usize) -> Traffic {
        let [trained, frozen] = sizes.buckets(train.lora.as_ref(), &train.full);
        let world = division.world;
        if world == 1 {
            return Traffic::default();
        }
        let wire = train.reduce.bytes();
        let (mut gradients, mut parameters) = (0, 0);
        for (bucket, numel) in trained.numels.iter().enumerate() {
            let [reductions, gathers] = division.exchanges(&trained, bucket, micro_batches);
            // What is not cut beforehand is cut for the exchange.
            let slice = match division.zero {
                0 => slice_len(*numel, 1).div_ceil(world),
                _ => slice_len(*numel, world),
            };
            gradients += reductions * slice * wire;
            parameters += gathers * slice * division.width;
        }
        let of_frozen = frozen.numels.iter().enumerate().map(|(bucket, numel)| {
            let visits = visits(&frozen, bucket) * micro_batches;
            usize::from(shard_frozen) * visits * slice_len(*numel, world) * division.width
        });
        let rows_may_travel = rows_may_travel(sizes, train, division);
        // Of each reduction of the embedding, each rank's rows and elements to each.
        let reductions = match (rows_may_travel, division.zero) {
            (false, _) => 0,
            (true, 2..) => micro_batches,
            (true, _) => 1,
        };
        // Who wants which of the rows that are fetched ahead of the publication is told as well.
        let fetched = usize::from(rows_may_travel && (1..=2).contains(&division.zero));
        let counts = reductions * world * 2 + fetched * world;
        let others = |elements: usize| (elements * (world - 1)) as u64;
        Traffic {
            gradients: others(gradients),
            parameters: others(parameters),
            frozen: others(of_frozen.sum()),
            numbers: others(8 * (NUMBERS + counts)),
            rows: match rows_may_travel {
                true => rows_beside(sizes, division, wire, reductions, fetched) as u64,
                false => 0,
            },
            rows_may_travel,
        }
    }

    pub fn total(&self) -> u64 {
        self.gradients + self.parameters + self.frozen + self.numbers + self.rows
    }
}

impl Division {
    /// How often a step of so many micro-batches reduces a trained bucket, and gathers it: [2, 0] of an all-reduce, which
    /// sends each slice there and back.
    pub fn exchanges(&self, trained: &Buckets, bucket: usize, micro_batches: usize) -> [usize; 2] {
        match self.zero {
            0 => [2, 0],
            1 => [1, 1],
            2 => [micro_batches, 1],
            _ => [micro_batches, micro_batches * visits(trained, bucket)],
        }
    }
}

/// How often a micro-batch wants a bucket that is away in between: before forward and before backward of each stage that reads
/// it, but the head's are one pass and the embedding's backward reads nothing.
pub fn visits(buckets: &Buckets, bucket: usize) -> usize {
    let last = buckets.stages.len().saturating_sub(1);
    let stages = buckets.stages.iter().enumerate();
    let reads = stages.filter(|(_, reads)| reads.contains(&bucket));
    reads
        .map(|(stage, _)| if stage == 0 || stage == last { 1 } else { 2 })
        .sum()
}

/// Rows are sent beside a whole matrix where they are at most this share of it.
pub const FEW_ROWS: usize = 16;

/// Bytes of the rows that a rank sends beside whole matrices in a step, at most; values, and 8 bytes of number each.
fn rows_beside(sizes: &Sizes, division: &Division, wire: usize, reductions: usize, fetched: usize) -> usize {
    let rows = sizes.rows / FEW_ROWS;
    // With one slice a row goes to all ranks.
    let copies = if division.zero == 0 { division.world } else { 1 };
    let behind = usize::from(sizes.tied) * reductions * copies * rows * (sizes.hidden * wire + 8);
    behind + fetched * rows * (sizes.hidden * division.width + 8)
}

/// Where the embedding trains alone in its bucket; with one slice only where the head is tied, since all ranks' rows
/// would go to all.
pub(super) fn rows_may_travel(sizes: &Sizes, train: &Train, division: &Division) -> bool {
    let alone = !(sizes.block == super::Block::Gpt2 && train.full.contains(&FullModule::Positions));
    let trains = sizes.embedding_trains(&train.full);
    trains && alone && (sizes.tied || division.zero > 0)
}
