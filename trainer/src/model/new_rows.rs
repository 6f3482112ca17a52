//! How the embedding and head rows of new pieces start. Seeded; the same on any rank and world size.

use configs::NewRows;
use corpus::{NewPiece, Vocabulary};
use rayon::prelude::*;
use tch::{Device, Kind, Tensor};

use crate::random;

/// Rows that are made at once on the host.
const AT_ONCE: usize = 8192;

/// `base_vd` (f32) with a row for every new piece and zero rows for padding: [`padded_size`, d], on its device. Of the new
/// rows the host holds some thousands at a time.
pub fn extend(base_vd: &Tensor, vocabulary: &Vocabulary, how: NewRows, seed: u64, name: &str) -> Tensor {
    let (dim, base_size) = (base_vd.size()[1], vocabulary.base_size as i64);
    let options = (Kind::Float, base_vd.device());
    let whole_vd = Tensor::zeros([vocabulary.padded_size as i64, dim], options);
    let base_vd = base_vd.narrow(0, 0, base_size);
    whole_vd.narrow(0, 0, base_size).copy_(&base_vd);
    let base_vd = base_vd.to_device(Device::Cpu).contiguous();
    let make = row_maker(&base_vd, how, seed, name);
    for (portion, pieces) in vocabulary.pieces.chunks(AT_ONCE).enumerate() {
        let first = portion * AT_ONCE;
        let mut rows = vec![0f32; pieces.len() * dim as usize];
        let each = rows.par_chunks_mut(dim as usize).zip(pieces).enumerate();
        each.for_each(|(index, (row, piece))| make(first + index, piece, row));
        let start = base_size + first as i64;
        let rows = Tensor::from_slice(&rows).view([-1, dim]);
        whole_vd.narrow(0, start, pieces.len() as i64).copy_(&rows);
    }
    whole_vd
}

/// Fills the row of the new piece with an index, which is zero before.
type RowMaker<'a> = Box<dyn Fn(usize, &NewPiece, &mut [f32]) + Sync + 'a>;

fn row_maker<'a>(base_vd: &'a Tensor, how: NewRows, seed: u64, name: &str) -> RowMaker<'a> {
    let values = sharding::memory::f32s(base_vd);
    let to_vec = |row: &Tensor| sharding::memory::f32s(row).to_vec();
    match how {
        NewRows::SubwordMean => Box::new(move |_, piece, row| {
            let (dim, share) = (row.len(), 1.0 / piece.base_ids.len() as f32);
            for &id in &piece.base_ids {
                let spelled = &values[id as usize * dim..][..dim];
                row.iter_mut()
                    .zip(spelled)
                    .for_each(|(mean, value)| *mean += value * share);
            }
        }),
        NewRows::Mean => {
            let mean = to_vec(&base_vd.mean_dim(0, false, Kind::Float));
            Box::new(move |_, _, row| row.copy_from_slice(&mean))
        }
        NewRows::NoisyMean => {
            let (spread, mean) = base_vd.std_mean_dim(&[0i64][..], false, false);
            // One σ for all: the root of the mean variance over dimensions.
            let sigma = spread.square().mean(Kind::Double).sqrt().double_value(&[]);
            let mean = to_vec(&mean);
            let stream = random::Stream::new(seed, &format!("noisy rows of {name}"));
            Box::new(move |index, _, row| {
                let stream = stream.fork(index as u64);
                let values = row.iter_mut().zip(&mean).enumerate();
                values.for_each(|(d, (value, mean))| *value = mean + (sigma * stream.normal(d as u64)) as f32);
            })
        }
        NewRows::Normal => {
            let stream = random::Stream::new(seed, &format!("new rows of {name}"));
            Box::new(move |index, _, row| {
                let stream = stream.fork(index as u64);
                row.iter_mut()
                    .enumerate()
                    .for_each(|(d, value)| *value = (0.02 * stream.normal(d as u64)) as f32);
            })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn noisy_rows_lie_around_the_mean_as_the_base_does_and_are_the_same_every_time() {
        // Two dimensions around 3 and −3, with standard deviation 1/2 each.
        let base = Tensor::from_slice(&[2.5f32, -3.5, 3.5, -2.5, 2.5, -2.5, 3.5, -3.5]).view([4, 2]);
        let piece = NewPiece {
            piece: "ab".to_owned(),
            base_ids: vec![0, 1],
        };
        let vocabulary = Vocabulary {
            base_size: 4,
            size: 2004,
            padded_size: 2048,
            pieces: vec![piece; 2000],
            digest: String::new(),
            lowered_scores: 0,
            unreachable: 0,
        };
        let rows = |seed| extend(&base, &vocabulary, NewRows::NoisyMean, seed, "embed_tokens");
        let (first, again, other) = (rows(1), rows(1), rows(2));
        assert_eq!(first, again);
        assert_ne!(first, other);
        let new = first.narrow(0, 4, 2000);
        let (spread, mean) = new.std_mean_dim(&[0i64][..], false, false);
        // 2,000 draws: the mean is within 0.5 / √2000 · 4, the deviation about as close.
        for (dim, expected) in [(0, 3.0), (1, -3.0)] {
            assert!((mean.double_value(&[dim]) - expected).abs() < 0.05, "{mean:?}");
            assert!((spread.double_value(&[dim]) - 0.5).abs() < 0.05, "{spread:?}");
        }
        let padding = first.narrow(0, 2004, 44).abs().sum(Kind::Float).double_value(&[]);
        assert_eq!(padding, 0.0);
    }
}
