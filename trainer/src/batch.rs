//! This rank's rows of the global batch, cut into micro-batches. A pure function of the step.

use configs::Train;
use corpus::Stream;
use tch::Tensor;

use crate::model::IGNORE;

pub struct MicroBatch {
    pub ids_bt: Tensor,
    /// The token that follows each position; [`IGNORE`] at the last.
    pub targets_bt: Tensor,
    /// Global row numbers.
    pub rows: Vec<u64>,
}

pub struct Batch {
    pub micro_batches: Vec<MicroBatch>,
    /// Positions with a target in this rank's rows.
    pub n_targets: usize,
}

/// Global rows of `step`, all ranks.
pub fn rows_of_step(train: &Train, step: u64) -> std::ops::Range<u64> {
    let rows = train.rows_per_step as u64;
    step * rows..(step + 1) * rows
}

impl Batch {
    /// Rows of a step are dealt to ranks in equal contiguous parts: the same global batch for any number of ranks.
    pub fn new(stream: &Stream, train: &Train, step: u64, rank: usize, world: usize) -> Batch {
        let all = rows_of_step(train, step);
        let mine = train.rows_per_step / world;
        let first = all.start + (rank * mine) as u64;
        let rows: Vec<u64> = (first..first + mine as u64).collect();
        let micro_batches: Vec<MicroBatch> = rows
            .chunks(train.micro_rows)
            .map(|rows| micro_batch(stream, train, rows))
            .collect();
        Batch {
            n_targets: rows.len() * (train.sequence_length - 1),
            micro_batches,
        }
    }
}

fn micro_batch(stream: &Stream, train: &Train, rows: &[u64]) -> MicroBatch {
    let shape = [rows.len() as i64, train.sequence_length as i64];
    let ids: Vec<i64> = rows.iter().flat_map(|&row| stream.row(row).tokens).collect();
    let target = |tokens: &[i64]| tokens[1..].iter().copied().chain([IGNORE]).collect::<Vec<_>>();
    let targets: Vec<i64> = ids.chunks(train.sequence_length).flat_map(target).collect();
    MicroBatch {
        ids_bt: Tensor::from_slice(&ids).view(shape),
        targets_bt: Tensor::from_slice(&targets).view(shape),
        rows: rows.to_vec(),
    }
}
