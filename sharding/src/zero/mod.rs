//! ZeRO: what training keeps is divided among ranks. Gradients are summed over ranks bucket by bucket, each rank updates
//! its slice of the f32 master weights, and all ranks get each other's slices when they need them.
//! Source: Rajbhandari et al. 2020, "ZeRO", §5.
//!
//! ψ trained elements, N ranks, 4-byte gradients and 12 bytes of optimizer state (master, m, v) an element:
//!
//! | stage | a rank keeps                              | a rank sends a step of A micro-batches |
//! |-------|-------------------------------------------|-----------------------------------------|
//! | 0     | params + 4ψ + 12ψ                         | 2ψ(N−1)/N                               |
//! | 1     | params + 4ψ + 16ψ/N                       | 2ψ(N−1)/N                               |
//! | 2     | params + 16ψ/N + two stages' gradients    | (A + 1)ψ(N−1)/N                         |
//! | 3     | 16ψ/N + two stages' gradients and params  | 3Aψ(N−1)/N                              |
//!
//! From stage 2 on a bucket's whole gradient exists from its stage's backward to the end of its reduction, in every
//! micro-batch: kept until the last one, it would be as large as in stage 1. From stage 3 on so do the parameters; frozen
//! weights can be divided in the same way whatever the stage.

mod embedding;
mod inspect;
mod register;

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;

use tch::{Device, Kind, Tensor};

use self::embedding::Embedding;
use crate::adamw::{self, AdamW};
use crate::layout::{Bucket, slice_len};
use crate::{Comm, Layout, Mark, Pending, Result, Wire, rows};

/// How much of the training state is sharded; each stage shards what the one before does as well.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    /// Every rank holds all optimizer state and makes the same update.
    Replicated,
    /// Each rank holds and updates one slice of the optimizer state.
    OptimizerState,
    /// Each rank keeps one slice of the summed gradient.
    Gradients,
    /// Each rank keeps one slice of the parameters.
    Parameters,
}

impl Stage {
    pub const ALL: [Stage; 4] = [
        Stage::Replicated,
        Stage::OptimizerState,
        Stage::Gradients,
        Stage::Parameters,
    ];
}

/// A model's weight, as ZeRO fills and empties it.
pub trait Held {
    /// Unlike any other's, and the same on all ranks.
    fn name(&self) -> &str;
    fn value(&mut self) -> &mut Tensor;
    fn gradient(&mut self) -> &mut Option<Tensor>;
}

/// A trained parameter as the model sees it: two views into its bucket.
#[derive(Debug)]
pub struct Trained {
    /// In the compute precision, the same on all ranks.
    pub value: Tensor,
    /// f32; backward adds to it.
    pub grad: Tensor,
}

/// The state of one slice, in AdamW's symbols. f32, padded.
#[derive(Debug)]
pub struct Slice {
    /// Master weights θ.
    pub theta: Tensor,
    pub m: Tensor,
    pub v: Tensor,
}

/// A bucket's parameters in the compute precision.
#[derive(Default)]
struct Values {
    /// Flat and padded; absent while only slices are kept, and where steps read rows ([`Zero::keep_as_rows`]).
    full: Option<Tensor>,
    /// The all-gather that fills `full`.
    arriving: Option<Pending>,
}

impl Values {
    fn wait(&mut self) -> Result<()> {
        self.arriving.take().map_or(Ok(()), Pending::wait)
    }
}

struct BucketState {
    /// Where parameters and gradients lie; with the optimizer's offload its slice does not.
    device: Device,
    values: Values,
    /// f32, flat and padded. From stage 2 on absent outside of backward; always where the gradient is rows ([`Embedding::only`]).
    grads: Option<Tensor>,
    /// This rank's slice of the summed gradient; all of `grads` when nothing is sharded, nothing where the gradient is rows.
    grads_slice: Tensor,
    reducing: Option<Pending>,
    /// What the reduction under way fills, where `grads_slice` holds earlier micro-batches' sum.
    incoming: Option<Tensor>,
    /// The reduction under way, where it travels as rows, or has rows that follow it.
    rows: Option<rows::Arriving>,
    rows_follow: bool,
    /// `grads_slice` holds something of this step.
    reduced: bool,
    slice: Slice,
}

impl BucketState {
    /// The slice's master weights as the model computes with them, where it does.
    fn published(&self, kind: Kind) -> Result<Tensor> {
        // Cast first: it is the smaller to carry.
        Ok(self.slice.theta.f_to_kind(kind)?.f_to_device(self.device)?)
    }
}

/// Frozen weights of a stage of which each rank keeps a slice.
struct Frozen {
    bucket: Bucket,
    /// In the compute precision, padded.
    slice: Tensor,
    values: Values,
}

/// Where a weight lies: flat bucket, and parameter in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Flat {
    Trained(usize),
    Frozen(usize),
}

/// What all ranks know alike after a backward pass.
#[derive(Clone, Debug, PartialEq)]
pub struct Verdict {
    /// L2 norm of the summed gradient.
    pub grad_norm: f64,
    /// Neither the gradient nor what rode along held a NaN or an infinity, on any rank.
    pub finite: bool,
    /// What rode along, summed over ranks.
    pub sums: Vec<f64>,
}

impl Verdict {
    /// min(1, c / ‖g‖); 1 without a limit.
    pub fn clip(&self, max_norm: Option<f64>) -> f64 {
        max_norm.map_or(1.0, |c| (c / (self.grad_norm + 1e-6)).min(1.0))
    }
}

/// Which way the step walks through the model's stages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pass {
    Forward,
    /// The last stage goes forward and backward at once, in this pass. `last`: no micro-batch of the step follows.
    Backward {
        last: bool,
    },
}

impl Pass {
    fn is_backward(self) -> bool {
        self != Pass::Forward
    }
}

/// Parameters, gradients and optimizer state of everything that trains, as this rank holds them.
pub struct Zero {
    stage: Stage,
    kind: Kind,
    wire: Wire,
    layout: Layout,
    /// This rank, and how many there are.
    ranks: (usize, usize),
    /// Which slice of each bucket is this rank's.
    my_slice: usize,
    /// Optimizer state lies on the host.
    offload: bool,
    buckets: Vec<BucketState>,
    frozen: Vec<Frozen>,
    places: BTreeMap<String, (Flat, usize)>,
    /// The buckets that each of the model's stages reads, in forward order.
    stages: Vec<Vec<Flat>>,
    /// Buckets whose reductions are under way and hold whole gradients, or copies of them, oldest first; stages 2 and 3, and 1
    /// where reductions make copies.
    reducing: VecDeque<usize>,
    /// Elements of whole gradients that may exist at a time; stages 2 and 3.
    gradient_budget: usize,
    /// Updates were made that the other ranks have not been sent.
    unpublished: bool,
    /// The embedding, where this step may move some of its rows instead of all.
    embedding: Option<Embedding>,
    /// See [`Zero::keep_as_rows`].
    kept_as_rows: Option<String>,
    /// Updates made since the run began; AdamW's bias correction counts them.
    pub updates: u64,
}

impl Zero {
    /// Whether master weights are the model's own: whole, of its precision and place, and with no other rank's to compare
    /// with.
    fn shares(&self, device: Device) -> bool {
        self.ranks.1 == 1 && self.kind == Kind::Float && (!self.offload || device == Device::Cpu)
    }

    /// Gradients travel in this precision from now on.
    pub fn reduce_in(&mut self, wire: Wire) {
        self.wire = wire;
    }

    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    pub fn stage(&self) -> Stage {
        self.stage
    }

    /// Whether anything of the model's weights is away between the stages that read it.
    fn comes_and_goes(&self) -> bool {
        self.stage == Stage::Parameters || !self.frozen.is_empty()
    }

    /// Makes weights what of theirs is here: views into their buckets, or nothing.
    pub fn bind<W: Held>(&self, weights: Vec<&mut W>) {
        for weight in weights {
            if let Some((flat, param)) = self.places.get(weight.name()).copied() {
                *weight.value() = self.value(flat, param).unwrap_or_default();
                if let Flat::Trained(bucket) = flat {
                    *weight.gradient() = self.gradient(bucket, param);
                }
            }
        }
    }

    fn bucket(&self, flat: Flat) -> &Bucket {
        match flat {
            Flat::Trained(b) => &self.layout.buckets[b],
            Flat::Frozen(f) => &self.frozen[f].bucket,
        }
    }

    fn values_mut(&mut self, flat: Flat) -> &mut Values {
        match flat {
            Flat::Trained(b) => &mut self.buckets[b].values,
            Flat::Frozen(f) => &mut self.frozen[f].values,
        }
    }

    fn value(&self, flat: Flat, param: usize) -> Option<Tensor> {
        if let (Flat::Trained(bucket), Some(embedding)) = (flat, &self.embedding)
            && let Some(rows) = embedding.early_of(bucket)
        {
            return Some(rows.values.shallow_clone());
        }
        let full = match flat {
            Flat::Trained(b) => self.buckets[b].values.full.as_ref()?,
            Flat::Frozen(f) => self.frozen[f].values.full.as_ref()?,
        };
        Some(shaped(full, self.bucket(flat), param))
    }

    fn gradient(&self, bucket: usize, param: usize) -> Option<Tensor> {
        if let Some(rows) = self.embedding.as_ref().and_then(|embedding| embedding.late_of(bucket)) {
            return Some(rows.values.shallow_clone());
        }
        let grads = self.buckets[bucket].grads.as_ref()?;
        Some(shaped(grads, &self.layout.buckets[bucket], param))
    }

    /// The views of parameter `param` of bucket `bucket`. Stages 0 and 1, where both are always there but of what is kept as rows.
    pub fn trained(&self, bucket: usize, param: usize) -> Trained {
        let present = "whole parameters and gradients are kept in stages 0 and 1";
        Trained {
            value: self.value(Flat::Trained(bucket), param).expect(present),
            grad: self.gradient(bucket, param).expect(present),
        }
    }

    /// Forgets the last step's gradient; called before a step's first backward.
    pub fn clear_gradients(&mut self) {
        for state in &mut self.buckets {
            if let Some(grads) = &mut state.grads {
                let _ = grads.zero_();
            }
            state.reduced = false;
        }
    }

    /// Called before a model's stage runs: its parameters are there on return, those of the next stage on their way. In
    /// backward its gradients are there as well.
    pub fn enter<W: Held>(&mut self, comm: &dyn Comm, stage: usize, pass: Pass, weights: Vec<&mut W>) -> Result<()> {
        self.start_publishing(comm)?;
        comm.at(match pass {
            Pass::Forward => Mark::Forward { stage },
            Pass::Backward { .. } => Mark::Backward { stage },
        });
        let reads = self.reads(stage, pass);
        if self.comes_and_goes() {
            let next = self.next(stage, pass).map(|(stage, pass)| self.reads(stage, pass));
            for flat in reads.iter().chain(next.iter().flatten()) {
                self.call_for(comm, *flat)?;
            }
        }
        let early = self.early_bucket().filter(|_| stage == 0);
        for flat in reads {
            if early.is_none_or(|bucket| flat != Flat::Trained(bucket)) {
                self.values_mut(flat).wait()?;
            }
        }
        let mut rebind = self.comes_and_goes() || early.is_some();
        if let Some(embedding) = self.embedding.as_mut().filter(|_| stage == 0 && pass.is_backward()) {
            rebind |= embedding.open_only();
        }
        if pass.is_backward() {
            let buckets: Vec<usize> = trained(&self.stages[stage]).collect();
            for bucket in buckets {
                let sends = self.stage >= Stage::Gradients || matches!(pass, Pass::Backward { last: true });
                if stage == 0 && sends && self.rows_follow(bucket) {
                    self.open_late_rows(bucket)?;
                    rebind = true;
                } else if self.stage >= Stage::Gradients {
                    self.open_gradients(bucket)?;
                    rebind = true;
                }
            }
        }
        if rebind {
            self.bind(weights);
        }
        Ok(())
    }

    /// Called after a model's stage ran: what it alone read goes. In backward its gradient is complete but for the
    /// micro-batches to come: after the step's last one its reduction over ranks starts now; from stage 2 on after each.
    pub fn leave<W: Held>(&mut self, comm: &dyn Comm, stage: usize, pass: Pass, weights: Vec<&mut W>) -> Result<()> {
        let keeps_slices = self.stage >= Stage::Gradients;
        let mut rebind = keeps_slices || self.comes_and_goes();
        if let Some(embedding) = self.embedding.as_mut().filter(|_| comm.world() == 1) {
            rebind |= embedding.close_only();
        }
        if matches!(pass, Pass::Backward { last } if last || keeps_slices) {
            // Backward goes down: a bucket is complete at the lowest stage that reads it, but for rows that follow.
            let below = |bucket| {
                self.stages[..stage]
                    .iter()
                    .any(|flats| flats.contains(&Flat::Trained(bucket)))
            };
            let complete = |bucket: &usize| !below(*bucket) || self.rows_follow(*bucket);
            let complete: Vec<usize> = trained(&self.stages[stage]).filter(complete).collect();
            for bucket in complete {
                let late = self
                    .embedding
                    .as_mut()
                    .and_then(|embedding| embedding.take_late(bucket));
                rebind |= late.is_some();
                match late {
                    Some((plan, rows)) => self.reduce_late_rows(comm, bucket, &plan, &rows)?,
                    None => self.reduce(comm, bucket)?,
                }
            }
        }
        let kept = self.next(stage, pass).map(|(stage, pass)| self.reads(stage, pass));
        for flat in self.reads(stage, pass) {
            let away = matches!(flat, Flat::Frozen(_)) || self.stage == Stage::Parameters;
            if away && !kept.as_ref().is_some_and(|kept| kept.contains(&flat)) {
                *self.values_mut(flat) = Values::default();
            }
        }
        if let Some(embedding) = &mut self.embedding {
            rebind |= embedding.drop_early(&self.buckets);
        }
        if rebind {
            self.bind(weights);
        }
        Ok(())
    }

    /// Starts summing a bucket's gradient over ranks.
    pub fn reduce(&mut self, comm: &dyn Comm, bucket: usize) -> Result<()> {
        if self.stage >= Stage::Gradients {
            // An earlier micro-batch's, long done.
            self.settle(bucket)?;
        }
        if self.only_rows(bucket).is_some() {
            self.buckets[bucket].reduced = true;
            return Ok(());
        }
        let rows = self
            .embedding
            .as_mut()
            .and_then(|embedding| embedding.next_plan(bucket));
        let state = &mut self.buckets[bucket];
        assert!(
            state.reducing.is_none() && state.rows.is_none(),
            "each bucket is reduced once a micro-batch"
        );
        let grads = state.grads.as_mut().expect("gradients are there in backward");
        if let Some(plan) = rows {
            state.rows = Some(rows::start(
                comm,
                &self.layout.buckets[bucket],
                &plan,
                grads,
                false,
                self.wire,
            )?);
            // Sums are made where the rows arrive.
            if state.reduced {
                state.incoming = Some(state.grads_slice.f_zeros_like()?);
            } else {
                let _ = state.grads_slice.zero_();
            }
            return self.sent(comm, bucket);
        }
        state.reducing = Some(match self.stage {
            Stage::Replicated => comm.all_reduce(grads, self.wire)?,
            _ if !state.reduced => comm.reduce_scatter(grads, &mut state.grads_slice, self.wire)?,
            _ => {
                let mut incoming = state.grads_slice.f_zeros_like()?;
                let pending = comm.reduce_scatter(grads, &mut incoming, self.wire)?;
                state.incoming = Some(incoming);
                pending
            }
        });
        self.sent(comm, bucket)
    }

    /// A bucket's reduction has started.
    fn sent(&mut self, comm: &dyn Comm, bucket: usize) -> Result<()> {
        let state = &mut self.buckets[bucket];
        state.reduced = true;
        if self.stage >= Stage::Gradients {
            // The exchange keeps the memory as long as it needs it; `settle` is when it is gone.
            state.grads = None;
            if !self.reducing.contains(&bucket) {
                self.reducing.push_back(bucket);
            }
            // What is over need not keep its memory.
            let is_over = |bucket: &usize| {
                let state = &self.buckets[*bucket];
                state.reducing.as_ref().is_none_or(Pending::is_over)
                    && state.rows.as_ref().is_none_or(rows::Arriving::is_over)
            };
            let over: Vec<usize> = self.reducing.iter().copied().filter(is_over).collect();
            over.into_iter().try_for_each(|bucket| self.settle(bucket))?;
        } else if self.stage == Stage::OptimizerState && comm.copies_to_reduce(self.wire) {
            // Copies as large as the gradient would be there until the end of the step.
            self.reducing.push_back(bucket);
            while self.reducing.len() > MOST_COPIED {
                self.settle(self.reducing[0])?;
            }
        }
        Ok(())
    }

    /// Waits for a bucket's reduction, if there is one under way.
    fn settle(&mut self, bucket: usize) -> Result<()> {
        let state = &mut self.buckets[bucket];
        let (pending, rows) = (state.reducing.take(), state.rows.take());
        if pending.is_some() || rows.is_some() {
            pending.map_or(Ok(()), Pending::wait)?;
            // Rows that follow are added last, whether the rest has been waited for before or not: no timing changes a bit.
            let (instead, behind) = match std::mem::take(&mut state.rows_follow) {
                true => (None, rows),
                false => (rows, None),
            };
            let place = &self.layout.buckets[bucket];
            if let Some(rows) = instead {
                let sums = state.incoming.as_ref().unwrap_or(&state.grads_slice);
                rows.add_to(place, self.my_slice, sums)?;
            }
            if let Some(incoming) = state.incoming.take() {
                let _ = state.grads_slice.f_add_(&incoming)?;
            }
            if let Some(rows) = behind {
                rows.add_to(place, self.my_slice, &state.grads_slice)?;
            }
            self.reducing.retain(|reducing| *reducing != bucket);
        }
        Ok(())
    }

    /// Room for a bucket's whole gradient, zeroed. Others' reductions are waited for as long as it would be too much.
    fn open_gradients(&mut self, bucket: usize) -> Result<()> {
        if self.buckets[bucket].grads.is_some() {
            return Ok(());
        }
        let sizes: Vec<usize> = self.layout.buckets.iter().map(|bucket| bucket.padded).collect();
        while let Some(oldest) = self.reducing.front().copied() {
            let open = (0..self.buckets.len()).filter(|b| self.buckets[*b].grads.is_some());
            let live: usize = open.chain(self.reducing.iter().copied()).map(|b| sizes[b]).sum();
            if live + sizes[bucket] <= self.gradient_budget {
                break;
            }
            self.settle(oldest)?;
        }
        let (len, device) = (self.layout.buckets[bucket].padded, self.buckets[bucket].device);
        self.buckets[bucket].grads = Some(Tensor::f_zeros([len as i64], (Kind::Float, device))?);
        Ok(())
    }

    /// Starts gathering what is not here.
    fn call_for(&mut self, comm: &dyn Comm, flat: Flat) -> Result<()> {
        if self.values_mut(flat).full.is_some() {
            return Ok(());
        }
        let mine = match flat {
            Flat::Trained(b) => self.buckets[b].published(self.kind)?,
            Flat::Frozen(f) => self.frozen[f].slice.shallow_clone(),
        };
        let padded = self.bucket(flat).padded as i64;
        let mut full = Tensor::f_empty([padded], (mine.kind(), mine.device()))?;
        let arriving = comm.all_gather(&mine, &mut full)?;
        *self.values_mut(flat) = Values {
            full: Some(full),
            arriving: Some(arriving),
        };
        Ok(())
    }

    /// What a stage reads in a pass. The first stage's backward adds rows to a gradient and reads no parameter.
    fn reads(&self, stage: usize, pass: Pass) -> Vec<Flat> {
        if stage == 0 && pass.is_backward() {
            Vec::new()
        } else {
            self.stages.get(stage).cloned().unwrap_or_default()
        }
    }

    fn next(&self, stage: usize, pass: Pass) -> Option<(usize, Pass)> {
        let last = self.stages.len() - 1;
        match pass {
            Pass::Forward if stage + 1 == last => Some((last, Pass::Backward { last: false })),
            Pass::Forward => Some((stage + 1, Pass::Forward)),
            Pass::Backward { .. } => stage.checked_sub(1).map(|below| (below, pass)),
        }
    }

    /// Waits for all reductions; then one small reduction tells every rank the gradient's norm, whether everything is
    /// finite, and the sums of `ride_along`.
    pub fn finish(&mut self, comm: &dyn Comm, ride_along: &[f64]) -> Result<Verdict> {
        comm.at(Mark::Update);
        for bucket in 0..self.buckets.len() {
            self.settle(bucket)?;
            assert!(self.buckets[bucket].reduced, "every bucket was reduced");
        }
        let squares_of = |index: usize| {
            if let Some(rows) = self.only_rows(index) {
                return rows.sum_of_squares();
            }
            let (state, bucket) = (&self.buckets[index], &self.layout.buckets[index]);
            match self.stage {
                // Whole on every rank: each counts the slice that would be its own.
                Stage::Replicated => {
                    let length = slice_len(bucket.numel, comm.world());
                    let start = (comm.rank() * length).min(bucket.numel);
                    let end = (start + length).min(bucket.numel);
                    adamw::sum_of_squares(&view(&state.grads_slice, start..end))
                }
                _ => adamw::sum_of_squares(&state.grads_slice),
            }
        };
        let squares: f64 = (0..self.buckets.len()).map(squares_of).sum();
        let mut values = vec![squares];
        values.extend_from_slice(ride_along);
        let mut sums = comm.sum(&values)?;
        let squares = sums.remove(0);
        let finite = squares.is_finite() && sums.iter().all(|sum| sum.is_finite());
        Ok(Verdict {
            grad_norm: squares.sqrt(),
            finite,
            sums,
        })
    }

    /// One AdamW update of this rank's slices; `groups[g]` is the learning rate and so on of parameter group g.
    pub fn update(&mut self, groups: &[AdamW]) -> Result<()> {
        let embedding = self.embedding.as_ref();
        for (index, (bucket, state)) in self.layout.buckets.iter().zip(&mut self.buckets).enumerate() {
            // An embedding of which only rows were read; what is being published may not change.
            state.values.wait()?;
            let Slice { theta, m, v } = &mut state.slice;
            if let Some(rows) = embedding.and_then(|embedding| embedding.gradient_of(index)) {
                for (part, group) in bucket.groups_in_slice(self.my_slice) {
                    adamw::update_rows(&groups[group], theta, m, v, rows, part);
                }
                continue;
            }
            // The same tensor where both lie in one place.
            let g = state.grads_slice.f_to_device(theta.device())?;
            for (part, group) in bucket.groups_in_slice(self.my_slice) {
                adamw::update(&groups[group], theta, m, v, &g, part);
            }
        }
        self.updates += 1;
        Ok(())
    }

    /// Tells that the update is made: every rank is to have all of it, in the compute precision. It starts on its way with
    /// the next step, which knows what it needs first; each of the model's stages waits for its own when it is entered. From
    /// stage 3 on there is nothing to publish.
    pub fn publish(&mut self) {
        self.unpublished = self.stage < Stage::Parameters;
    }

    /// Casts this rank's master weights to the compute precision and starts giving every rank all of them.
    fn start_publishing(&mut self, comm: &dyn Comm) -> Result<()> {
        if !std::mem::take(&mut self.unpublished) {
            return Ok(());
        }
        // In the order of the stages that read them; a matrix whose first rows are here is wanted last.
        let early = self.early_bucket();
        let mut order: Vec<usize> = (0..self.buckets.len()).collect();
        order.sort_by_key(|bucket| early == Some(*bucket));
        for index in order {
            let shares = self.shares(self.buckets[index].device);
            let state = &mut self.buckets[index];
            state.values.wait()?;
            let mine = (self.layout.n_slices > 1)
                .then(|| state.published(self.kind))
                .transpose()?;
            match (&mut state.values.full, mine) {
                (Some(full), Some(mine)) => state.values.arriving = Some(comm.all_gather(&mine, full)?),
                (Some(full), None) if !shares => full.f_copy_(&state.slice.theta)?,
                (None, Some(_)) => unreachable!("slices are put together before stage 3"),
                // The same memory, or none: rows are read of the master weights.
                (_, None) => {}
            }
        }
        Ok(())
    }

    /// Waits until all that was published has arrived. For whoever reads the model outside of a step, after [`Zero::make_whole`] where
    /// steps read rows; all ranks call it.
    pub fn arrived(&mut self, comm: &dyn Comm) -> Result<()> {
        self.start_publishing(comm)?;
        self.buckets.iter_mut().try_for_each(|state| state.values.wait())
    }

    /// As [`Zero::arrived`], of matrices too that steps read rows of. The model is to be bound again. Before stage 3.
    pub fn make_whole(&mut self, comm: &dyn Comm) -> Result<()> {
        assert!(
            self.stage < Stage::Parameters,
            "a rank that keeps only its slices of parameters has nothing to make whole"
        );
        self.arrived(comm)?;
        // What it has of the matrix is older.
        self.embedding = None;
        for state in &mut self.buckets {
            if state.values.full.is_none() {
                state.values.full = Some(state.published(self.kind)?);
            }
        }
        Ok(())
    }

    /// This rank's slice of `bucket` and where it lies in the unpadded bucket.
    pub fn slice(&self, bucket: usize) -> (Range<usize>, &Slice) {
        (
            self.layout.buckets[bucket].slice(self.my_slice),
            &self.buckets[bucket].slice,
        )
    }

    /// As [`Zero::slice`], to fill from a checkpoint; [`Zero::publish`] makes what was filled the model's.
    pub fn slice_mut(&mut self, bucket: usize) -> (Range<usize>, &mut Slice) {
        let state = &mut self.buckets[bucket];
        assert!(
            state.values.arriving.is_none(),
            "what is being published may not change"
        );
        (self.layout.buckets[bucket].slice(self.my_slice), &mut state.slice)
    }

    /// The replicated parameters of `bucket`, flat and padded; `None` from stage 3 on, and where steps read rows.
    pub fn params(&self, bucket: usize) -> Option<&Tensor> {
        self.buckets[bucket].values.full.as_ref()
    }
}

fn trained(flats: &[Flat]) -> impl Iterator<Item = usize> {
    flats.iter().filter_map(|flat| match flat {
        Flat::Trained(bucket) => Some(*bucket),
        Flat::Frozen(_) => None,
    })
}

fn view(flat: &Tensor, range: Range<usize>) -> Tensor {
    flat.narrow(0, range.start as i64, range.len() as i64)
}

fn shaped(flat: &Tensor, bucket: &Bucket, param: usize) -> Tensor {
    view(flat, bucket.ranges[param].clone()).view(bucket.params[param].shape.as_slice())
}

/// Reductions under way at a time, where each holds copies of a whole gradient.
const MOST_COPIED: usize = 2;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{BucketSpec, ParamSpec};

    fn specs() -> Vec<BucketSpec> {
        let param = |name: &str, shape: &[i64], group| ParamSpec {
            name: name.into(),
            shape: shape.to_vec(),
            group,
        };
        vec![
            BucketSpec {
                name: "embedding".into(),
                params: vec![param("embed", &[7, 3], 0)],
            },
            BucketSpec {
                name: "layer".into(),
                params: vec![param("a", &[2, 5], 1), param("b", &[4, 2], 1)],
            },
        ]
    }

    #[test]
    fn an_update_follows_the_gradients_that_the_views_received() {
        let comm = crate::join(1).unwrap();
        let mut zero = Zero::new(comm.as_ref(), Stage::OptimizerState, &specs(), Kind::Float, |b, p| {
            Tensor::ones(specs()[b].params[p].shape.as_slice(), (Kind::Float, Device::Cpu))
        })
        .unwrap();
        let mut b_grad = zero.trained(1, 1).grad;
        let _ = b_grad.fill_(3.0);
        (0..2).for_each(|bucket| zero.reduce(comm.as_ref(), bucket).unwrap());
        let verdict = zero.finish(comm.as_ref(), &[2.5]).unwrap();
        assert!((verdict.grad_norm - (8.0f64 * 9.0).sqrt()).abs() < 1e-9);
        assert!(verdict.finite && verdict.sums == [2.5]);
        let how = AdamW {
            lr: 0.25,
            beta1: 0.9,
            beta2: 0.99,
            epsilon: 1e-8,
            weight_decay: 0.0,
            updates_before: 0,
            gradient_scale: 1.0,
        };
        zero.update(&[how, how]).unwrap();
        zero.publish();
        zero.arrived(comm.as_ref()).unwrap();
        let value = |bucket, param| f64::try_from(zero.trained(bucket, param).value.mean(Kind::Float)).unwrap();
        assert!((value(1, 1) - 0.75).abs() < 1e-6);
        assert_eq!((value(0, 0), value(1, 0)), (1.0, 1.0));
    }

    #[test]
    fn a_gradient_that_is_not_finite_is_told_to_all() {
        let comm = crate::join(1).unwrap();
        let mut zero = Zero::new(comm.as_ref(), Stage::Replicated, &specs(), Kind::BFloat16, |b, p| {
            Tensor::zeros(specs()[b].params[p].shape.as_slice(), (Kind::Float, Device::Cpu))
        })
        .unwrap();
        let _ = zero.trained(0, 0).grad.fill_(f64::NAN);
        (0..2).for_each(|bucket| zero.reduce(comm.as_ref(), bucket).unwrap());
        assert!(!zero.finish(comm.as_ref(), &[]).unwrap().finite);
    }
}
