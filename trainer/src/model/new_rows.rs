//! How the embedding and head rows of new pieces start. Seeded; the same on any rank and world size.

use configs::NewRows;
use corpus::Vocabulary;
use rayon::prelude::*;
use tch::{Kind, Tensor};

use crate::random;

/// `base_vd` (f32) with a row for every new piece and zero rows for padding: [`padded_size`, d].
pub fn extend(base_vd: &Tensor, vocabulary: &Vocabulary, how: NewRows, seed: u64, name: &str) -> Tensor {
    let dim = base_vd.size()[1] as usize;
    let base = base_vd.narrow(0, 0, vocabulary.base_size as i64).contiguous();
    let values = sharding::memory::f32s(&base);
    let mut new = vec![0f32; (vocabulary.padded_size - vocabulary.base_size) * dim];
    let rows = new.par_chunks_mut(dim).zip(&vocabulary.pieces).enumerate();
    match how {
        NewRows::SubwordMean => rows.for_each(|(_, (row, piece))| {
            let share = 1.0 / piece.base_ids.len() as f32;
            for &id in &piece.base_ids {
                let spelled = &values[id as usize * dim..][..dim];
                row.iter_mut()
                    .zip(spelled)
                    .for_each(|(mean, value)| *mean += value * share);
            }
        }),
        NewRows::Mean => {
            let mean = base.mean_dim(0, false, Kind::Float);
            let mean = sharding::memory::f32s(&mean);
            rows.for_each(|(_, (row, _))| row.copy_from_slice(mean));
        }
        NewRows::NoisyMean => {
            let (spread, mean) = base.std_mean_dim(&[0i64][..], false, false);
            // One σ for all: the root of the mean variance over dimensions.
            let sigma = spread.square().mean(Kind::Double).sqrt().double_value(&[]);
            let mean = sharding::memory::f32s(&mean);
            let stream = random::Stream::new(seed, &format!("noisy rows of {name}"));
            rows.for_each(|(index, (row, _))| {
                let stream = stream.fork(index as u64);
                let values = row.iter_mut().zip(mean).enumerate();
                values.for_each(|(d, (value, mean))| *value = mean + (sigma * stream.normal(d as u64)) as f32);
            });
        }
        NewRows::Normal => {
            let stream = random::Stream::new(seed, &format!("new rows of {name}"));
            rows.for_each(|(index, (row, _))| {
                let stream = stream.fork(index as u64);
                row.iter_mut()
                    .enumerate()
                    .for_each(|(d, value)| *value = (0.02 * stream.normal(d as u64)) as f32);
            });
        }
    }
    let new = Tensor::from_slice(&new).view([-1, dim as i64]);
    Tensor::cat(&[base, new], 0)
}

#[cfg(test)]
mod tests {
    use corpus::NewPiece;

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
