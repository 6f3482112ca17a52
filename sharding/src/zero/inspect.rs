//! What a rank holds and sends, in bytes, and whether its memory is what it should be.

use tch::{Kind, Tensor};

use super::{Flat, Stage, Values, Zero, view};
use crate::digest::{self, Digests, damaged};
use crate::{Comm, Result};

impl Zero {
    /// Compares what the ranks should hold alike: the ranks whose memory is damaged, each with what is wrong. Called between
    /// [`Zero::finish`] and [`Zero::update`]: there the parameters are what the step was made with, and the master weights what
    /// they were published from; the next publication would write over what is wrong. From stage 3 on nothing is held alike, and
    /// nothing is found.
    pub fn damaged_ranks(&mut self, comm: &dyn Comm) -> Result<Vec<(usize, &'static str)>> {
        assert!(!self.unpublished, "compared before the update");
        self.arrived(comm)?;
        if self.stage == Stage::Parameters {
            return Ok(Vec::new());
        }
        let n_slices = self.layout.n_slices;
        let mut mine = Digests {
            copies: vec![0; n_slices],
            truth: 0,
            masters: None,
        };
        for (bucket, state) in self.layout.buckets.iter().zip(&self.buckets) {
            let Some(full) = &state.values.full else {
                assert_eq!(n_slices, 1, "only one rank reads rows of a matrix that it holds once");
                continue;
            };
            for (slice, copy) in mine.copies.iter_mut().enumerate() {
                let range = slice * bucket.slice_len..(slice + 1) * bucket.slice_len;
                *copy = digest::mix(*copy, digest::of(&view(full, range)));
            }
            let published = state.slice.theta.f_to_kind(full.kind())?;
            mine.truth = digest::mix(mine.truth, digest::of(&published));
        }
        if self.stage == Stage::Replicated {
            mine.masters = Some(match self.kind {
                Kind::Float => mine.truth,
                _ => self.masters(),
            });
        }
        let words = mine.copies.iter().chain([&mine.truth]).chain(&mine.masters);
        let words: Vec<u8> = words.flat_map(|word| word.to_le_bytes()).collect();
        let all = comm.all_gather_bytes(&words)?;
        let read = |words: &Vec<u8>| {
            let mut copies: Vec<u64> = words
                .chunks_exact(8)
                .map(|word| u64::from_le_bytes(word.try_into().expect("8 bytes")))
                .collect();
            let masters = (copies.len() == n_slices + 2).then(|| copies.pop()).flatten();
            let truth = copies.pop().expect("it stands behind the copies");
            Digests { copies, truth, masters }
        };
        Ok(damaged(&all.iter().map(read).collect::<Vec<_>>()))
    }

    /// A digest of this rank's master weights.
    pub fn masters(&self) -> u64 {
        let each = self.buckets.iter().map(|state| digest::of(&state.slice.theta));
        each.fold(0, digest::mix)
    }

    /// The least bytes that a rank sends in a step of so many micro-batches with whole gradients: what `Comm::sent` grows by,
    /// but for padding, a few numbers, and rows where they are fewer.
    pub fn least_bytes(&self, comm: &dyn Comm, micro_batches: usize) -> u64 {
        let world = comm.world();
        let wire = self.wire.bytes();
        let width = self.kind.elt_size_in_bytes();
        // How often a micro-batch gathers a bucket: before forward and before backward, but the head's are one pass and the
        // embedding's backward reads nothing.
        let gathers = |flat: Flat| {
            let last = self.stages.len().saturating_sub(1);
            let visits = self
                .stages
                .iter()
                .enumerate()
                .filter(|(_, flats)| flats.contains(&flat));
            visits
                .map(|(stage, _)| if stage == 0 || stage == last { 1 } else { 2 })
                .sum::<usize>()
        };
        let trained = self.layout.buckets.iter().enumerate().map(|(index, bucket)| {
            let each = match self.stage {
                Stage::Replicated => 2 * wire,
                Stage::OptimizerState => wire + width,
                Stage::Gradients => micro_batches * wire + width,
                Stage::Parameters => micro_batches * (wire + gathers(Flat::Trained(index)) * width),
            };
            bucket.numel * each
        });
        let frozen = self
            .frozen
            .iter()
            .enumerate()
            .map(|(index, frozen)| frozen.bucket.numel * micro_batches * gathers(Flat::Frozen(index)) * width);
        (trained.chain(frozen).sum::<usize>() * (world - 1) / world) as u64
    }

    /// Bytes of what this rank holds now: parameters in the compute precision (frozen ones too where they are divided),
    /// gradients, optimizer state. `configs::memory` counts the same beforehand.
    pub fn held_bytes(&self) -> [u64; 3] {
        let bytes = |tensor: &Tensor| (tensor.numel() * tensor.kind().elt_size_in_bytes()) as u64;
        let whole = |values: &Values| values.full.as_ref().map_or(0, bytes);
        let (mut parameters, mut gradients, mut optimizer) = (0, 0, 0);
        for state in &self.buckets {
            parameters += if self.shares(state.device) {
                0
            } else {
                whole(&state.values)
            };
            let own_slice = self.layout.n_slices > 1 || self.stage >= Stage::Gradients;
            gradients += state.grads.as_ref().map_or(0, bytes);
            gradients += if own_slice { bytes(&state.grads_slice) } else { 0 };
            gradients += state.incoming.as_ref().map_or(0, bytes);
            optimizer += bytes(&state.slice.theta) + bytes(&state.slice.m) + bytes(&state.slice.v);
        }
        if let Some(embedding) = &self.embedding {
            let [of_matrix, of_gradient] = embedding.kept().map(|rows| rows.map_or(0, bytes));
            parameters += of_matrix;
            gradients += of_gradient;
        }
        parameters += self
            .frozen
            .iter()
            .map(|frozen| bytes(&frozen.slice) + whole(&frozen.values))
            .sum::<u64>();
        [parameters, gradients, optimizer]
    }
}
