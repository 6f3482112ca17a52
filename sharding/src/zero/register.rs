//! What a run trains and divides, told once before its first step.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use tch::{Device, Kind, Tensor};

use super::{BucketState, Flat, Frozen, Held, Slice, Stage, Values, Zero, trained, view};
use crate::layout::{Bucket, most_gradients};
use crate::{BucketSpec, Comm, Error, Layout, ParamSpec, Result, Wire};

impl Zero {
    /// Allocates what `specs` train. `initial(bucket, param)` gives each parameter's f32 value and must be the same on all
    /// ranks; a bucket lies on the device of its first. `kind` is the compute precision.
    ///
    /// # Errors
    /// When a rank registers other parameters than rank 0.
    pub fn new(
        comm: &dyn Comm,
        stage: Stage,
        specs: &[BucketSpec],
        kind: Kind,
        mut initial: impl FnMut(usize, usize) -> Tensor,
    ) -> Result<Zero> {
        let mut zero = Zero::empty(comm, stage, kind);
        for (b, spec) in specs.iter().enumerate() {
            zero.train(spec.clone(), (0..spec.params.len()).map(|p| initial(b, p)).collect())?;
        }
        zero.check_ranks_agree(comm)?;
        Ok(zero)
    }

    /// Nothing yet, to be filled a stage of the model at a time, so that no more than one is whole where each rank keeps a
    /// slice: [`Zero::train`] and [`Zero::shard_frozen`], the same on all ranks; [`Zero::check_ranks_agree`] comes last.
    pub fn empty(comm: &dyn Comm, stage: Stage, kind: Kind) -> Zero {
        let (n_slices, my_slice) = match stage {
            Stage::Replicated => (1, 0),
            _ => (comm.world(), comm.rank()),
        };
        Zero {
            stage,
            kind,
            wire: Wire::F32,
            places: BTreeMap::new(),
            ranks: (comm.rank(), comm.world()),
            my_slice,
            offload: false,
            buckets: Vec::new(),
            frozen: Vec::new(),
            stages: Vec::new(),
            reducing: VecDeque::new(),
            gradient_budget: 0,
            layout: Layout::new(&[], n_slices),
            unpublished: false,
            embedding: None,
            kept_as_rows: None,
            updates: 0,
        }
    }

    /// Optimizer state of what is added from now on lies in the host's memory, and is updated there, wherever gradients and
    /// parameters lie.
    pub fn offload_optimizer(&mut self) {
        self.offload = true;
    }

    /// Adds a bucket that trains, from its parameters' f32 values.
    pub fn train(&mut self, spec: BucketSpec, values: Vec<Tensor>) -> Result<()> {
        let bucket = Bucket::new(spec, self.layout.n_slices);
        let device = values.first().map_or(Device::Cpu, Tensor::device);
        let host = if self.offload { Device::Cpu } else { device };
        let zeros = |len: usize, kind, device| Tensor::f_zeros([len as i64], (kind, device));
        let as_rows = match &bucket.params[..] {
            [matrix] => device == Device::Cpu && self.kept_as_rows.as_ref() == Some(&matrix.name),
            _ => false,
        };
        let theta = slice_of(&bucket, self.my_slice, &values, Kind::Float, host)?;
        let full = if self.stage == Stage::Parameters {
            None
        } else if self.shares(device) {
            Some(theta.shallow_clone())
        } else if as_rows {
            None
        } else {
            let whole = zeros(bucket.padded, self.kind, device)?;
            for (range, value) in bucket.ranges.iter().zip(&values) {
                view(&whole, range.clone()).f_copy_(&value.reshape([-1]))?;
            }
            Some(whole)
        };
        let grads = if self.stage < Stage::Gradients && !as_rows {
            Some(zeros(bucket.padded, Kind::Float, device)?)
        } else {
            None
        };
        let grads_slice = match &grads {
            Some(grads) if self.layout.n_slices == 1 => grads.shallow_clone(),
            _ => zeros(if as_rows { 0 } else { bucket.slice_len }, Kind::Float, device)?,
        };
        let index = self.buckets.len();
        for (p, param) in bucket.params.iter().enumerate() {
            self.places.insert(param.name.clone(), (Flat::Trained(index), p));
        }
        self.buckets.push(BucketState {
            device,
            values: Values { full, arriving: None },
            grads,
            grads_slice,
            reducing: None,
            incoming: None,
            rows: None,
            rows_follow: false,
            reduced: false,
            slice: Slice {
                theta,
                m: zeros(bucket.slice_len, Kind::Float, host)?,
                v: zeros(bucket.slice_len, Kind::Float, host)?,
            },
        });
        self.gradient_budget += bucket.padded;
        self.layout.buckets.push(bucket);
        Ok(())
    }

    /// Takes a stage's frozen weights away and keeps this rank's slice of them.
    pub fn shard_frozen<W: Held>(&mut self, stage_name: &str, weights: Vec<&mut W>) -> Result<()> {
        let (rank, world) = self.ranks;
        let mut weights: Vec<_> = weights
            .into_iter()
            .filter(|weight| !self.places.contains_key(weight.name()))
            .collect();
        if weights.is_empty() || world == 1 {
            return Ok(());
        }
        let values: Vec<Tensor> = weights
            .iter_mut()
            .map(|weight| weight.value().shallow_clone())
            .collect();
        let (kind, device) = (values[0].kind(), values[0].device());
        let params = weights.iter().zip(&values).map(|(weight, value)| ParamSpec {
            name: weight.name().to_owned(),
            shape: value.size(),
            group: 0,
        });
        let spec = BucketSpec {
            name: stage_name.to_owned(),
            params: params.collect(),
        };
        let bucket = Bucket::new(spec, world);
        let slice = slice_of(&bucket, rank, &values, kind, device)?;
        let index = self.frozen.len();
        for (p, weight) in weights.into_iter().enumerate() {
            self.places.insert(weight.name().to_owned(), (Flat::Frozen(index), p));
            *weight.value() = Tensor::new();
        }
        self.frozen.push(Frozen {
            bucket,
            slice,
            values: Values::default(),
        });
        Ok(())
    }

    /// # Errors
    /// When a rank trains other parameters than rank 0, or divides other frozen ones: the lines in which they differ, of both.
    pub fn check_ranks_agree(&self, comm: &dyn Comm) -> Result<()> {
        let frozen = self.frozen.iter().map(|frozen| frozen.bucket.describe());
        let frozen: String = frozen.collect();
        let frozen = frozen.lines().map(|line| format!("frozen {line}\n"));
        let description = self.layout.describe() + &frozen.collect::<String>();
        check_ranks_agree(comm, &description)
    }

    /// Tells which weights each of the model's stages reads, in forward order, by name. A weight may be read by several.
    pub fn schedule(&mut self, stages: &[Vec<String>]) {
        self.stages = stages
            .iter()
            .map(|names| {
                let mut flats: Vec<Flat> = Vec::new();
                for (flat, _) in names.iter().filter_map(|name| self.places.get(name)) {
                    if !flats.contains(flat) {
                        flats.push(*flat);
                    }
                }
                flats
            })
            .collect();
        let trained: Vec<Vec<usize>> = self.stages.iter().map(|flats| trained(flats).collect()).collect();
        let sizes: Vec<usize> = self.layout.buckets.iter().map(|bucket| bucket.padded).collect();
        self.gradient_budget = most_gradients(&trained, &sizes);
    }
}

/// Slice `index` of the bucket that `values` fill, padded with zeros.
fn slice_of(bucket: &Bucket, index: usize, values: &[Tensor], kind: Kind, device: Device) -> Result<Tensor> {
    let slice = Tensor::f_zeros([bucket.slice_len as i64], (kind, device))?;
    let mine = bucket.slice(index);
    for ((range, param), value) in bucket.ranges.iter().zip(&bucket.params).zip(values) {
        assert_eq!(
            value.size(),
            param.shape,
            "{}: the value has the registered shape",
            param.name
        );
        let (start, end) = (range.start.max(mine.start), range.end.min(mine.end));
        if start < end {
            let part = view(&value.reshape([-1]), start - range.start..end - range.start);
            view(&slice, start - mine.start..end - mine.start).f_copy_(&part)?;
        }
    }
    Ok(slice)
}

/// # Errors
/// When a rank describes other parameters than rank 0: the lines in which they differ, of both.
fn check_ranks_agree(comm: &dyn Comm, description: &str) -> Result<()> {
    let mine = blake3::hash(description.as_bytes());
    let all = comm.all_gather_bytes(mine.as_bytes())?;
    let ranks: Vec<usize> = (0..all.len()).filter(|&rank| all[rank] != all[0]).collect();
    let Some(&first) = ranks.first() else {
        return Ok(());
    };
    let texts = comm.all_gather_texts(description.as_bytes())?;
    let [zero, other] = [0, first].map(|rank| String::from_utf8_lossy(&texts[rank]));
    let (rank_0_only, first_only) = match (only(&zero, &other), only(&other, &zero)) {
        (None, None) => {
            let mut places = (1..).zip(zero.lines().zip(other.lines()));
            let differs = places.find(|(_, (a, b))| a != b);
            let (place, (a, b)) = differs.expect("texts of the same lines differ in their order");
            let at = |line| format!("\n    the same in another order: number {place} is {line}");
            (at(a), at(b))
        }
        (rank_0_only, first_only) => {
            let nothing = || "\n    nothing that the other lacks".to_owned();
            (rank_0_only.unwrap_or_else(nothing), first_only.unwrap_or_else(nothing))
        }
    };
    Err(Error::LayoutMismatch {
        ranks,
        first,
        rank_0_only,
        first_only,
    })
}

/// The first lines of `a` that `b` lacks.
fn only(a: &str, b: &str) -> Option<String> {
    let known: BTreeSet<&str> = b.lines().collect();
    let lines: Vec<&str> = a.lines().filter(|line| !known.contains(line)).collect();
    let shown: String = lines
        .iter()
        .take(LINES_SHOWN)
        .map(|line| format!("\n    {line}"))
        .collect();
    match lines.len() {
        0 => None,
        n if n > LINES_SHOWN => Some(format!("{shown}\n    and {} more", n - LINES_SHOWN)),
        _ => Some(shown),
    }
}

const LINES_SHOWN: usize = 12;
