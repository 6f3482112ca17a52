//! Frozen weights, which are most of a model that LoRA trains: every rank holds them alike, and nothing writes them again. Their
//! digests are taken when they are loaded and compared among the ranks; later each rank looks at one stage of the model at a
//! time, so that a bit that has flipped is found and its rank is named, also of two.

use anyhow::{Result, bail};
use sharding::{Comm, digest};
use tch::Tensor;

use crate::model::Model;

pub struct Frozen {
    /// By stage of the model; those without frozen weights have the digest of nothing.
    loaded: Vec<u64>,
    /// By stage: the step in which it was last found to be what was loaded, if it was looked at since.
    sound: Vec<Option<u64>>,
    /// To be looked at next.
    stage: usize,
}

impl Frozen {
    /// All ranks call it.
    ///
    /// # Errors
    /// When ranks have loaded different weights.
    pub fn loaded(model: &mut Model, comm: &dyn Comm) -> Result<Frozen> {
        let loaded: Vec<u64> = model.frozen().iter().map(|stage| digest_of(stage)).collect();
        let words: Vec<u8> = loaded.iter().flat_map(|word| word.to_le_bytes()).collect();
        let all = comm.all_gather_bytes(&words)?;
        let different: Vec<String> = (1..all.len())
            .filter(|rank| all[*rank] != all[0])
            .map(|rank| rank.to_string())
            .collect();
        if !different.is_empty() {
            bail!(
                "frozen weights as loaded differ from rank 0's on rank {}: the base model lies there otherwise, or the memory is at \
                 fault; see that all nodes read the same folder",
                different.join(", ")
            );
        }
        Ok(Frozen {
            sound: vec![None; loaded.len()],
            loaded,
            stage: 0,
        })
    }

    /// Looks at the next stage: the ranks where it is not any more what was loaded, and the step in which it last was, if that was
    /// seen. All ranks call it.
    pub fn damaged_ranks(
        &mut self,
        model: &mut Model,
        comm: &dyn Comm,
        step: u64,
    ) -> Result<(Vec<usize>, Option<u64>)> {
        let stage = self.stage;
        self.stage = (stage + 1) % self.loaded.len();
        let differs = digest_of(&model.frozen()[stage]) != self.loaded[stage];
        let all = comm.all_gather_bytes(&[u8::from(differs)])?;
        let damaged: Vec<usize> = (0..all.len()).filter(|rank| all[*rank] == [1]).collect();
        let sound = self.sound[stage];
        if damaged.is_empty() {
            self.sound[stage] = Some(step);
        }
        Ok((damaged, sound))
    }
}

fn digest_of(tensors: &[Tensor]) -> u64 {
    let each = tensors.iter().map(digest::of);
    each.fold(0, digest::mix)
}
