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
