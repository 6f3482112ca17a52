//! This rank's rows of the global batch, cut into micro-batches. A pure function of the step.

use configs::Train;
use corpus::{Row, RowsDigest, Stream};
use tch::{Device, Tensor};

use crate::model::{Documents, IGNORE};

pub struct MicroBatch {
    pub ids_bt: Tensor,
    /// The token that follows each position; [`IGNORE`] at the last, and where it is not to be learned.
    pub targets_bt: Tensor,
    /// Global row numbers.
    pub rows: Vec<u64>,
    /// Where documents begin, if they do not see each other.
    pub documents: Option<Documents>,
}

pub struct Batch {
    pub micro_batches: Vec<MicroBatch>,
    /// Positions with a target in this rank's rows; 0 is possible.
    pub n_targets: usize,
    /// Of this rank's rows: sums over ranks to the global batch's.
    pub digest: RowsDigest,
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
        let indices: Vec<u64> = (first..first + mine as u64).collect();
        let (mut n_targets, mut digest) = (0, RowsDigest::default());
        let mut micro_batches = Vec::new();
        for indices in indices.chunks(train.micro_rows) {
            let rows: Vec<Row> = indices.iter().map(|index| stream.row(*index)).collect();
            for (index, row) in indices.iter().zip(&rows) {
                n_targets += row.n_targets();
                digest.add(*index, row);
            }
            micro_batches.push(MicroBatch::new(indices, &rows));
        }
        Batch {
            micro_batches,
            n_targets,
            digest,
        }
    }
}

impl MicroBatch {
    /// Rows of one length, and their global numbers.
    pub fn new(indices: &[u64], rows: &[Row]) -> MicroBatch {
        let length = rows[0].tokens.len();
        let shape = [rows.len() as i64, length as i64];
        let ids: Vec<i64> = rows.iter().flat_map(|row| row.tokens.iter().copied()).collect();
        let targets: Vec<i64> = rows.iter().flat_map(targets).collect();
        MicroBatch {
            ids_bt: Tensor::from_slice(&ids).view(shape),
            targets_bt: Tensor::from_slice(&targets).view(shape),
            rows: indices.to_vec(),
            documents: Documents::new(rows.iter().map(|row| row.document_starts.as_slice()), length),
        }
    }
}

impl Batch {
    /// The same on `device`.
    pub fn on(mut self, device: Device) -> Batch {
        let micro_batches = self.micro_batches.into_iter().map(|micro| micro.on(device));
        self.micro_batches = micro_batches.collect();
        self
    }
}

impl MicroBatch {
    pub fn on(self, device: Device) -> MicroBatch {
        MicroBatch {
            ids_bt: self.ids_bt.to_device(device),
            targets_bt: self.targets_bt.to_device(device),
            documents: self.documents.map(|documents| documents.on(device)),
            ..self
        }
    }
}

fn targets(row: &Row) -> Vec<i64> {
    let following = row.tokens.iter().zip(&row.is_target).skip(1);
    let known = following.map(|(token, is_target)| if *is_target { *token } else { IGNORE });
    known.chain([IGNORE]).collect()
}
