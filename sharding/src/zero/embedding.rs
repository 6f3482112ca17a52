//! The embedding, of which a step names few rows: they travel instead of the whole matrix or behind it, are fetched ahead of it, or are
//! all that there is of it beside its master weights. `crate::rows` has the arithmetic.

use std::collections::VecDeque;

use tch::{Device, Tensor};

use super::{BucketState, Flat, Stage, Zero};
use crate::adamw::RowGradient;
use crate::rows::{self, RowPlan, Rows, When};
use crate::{Comm, Result};

/// A trained matrix of which a step's first stage reads, and gives a gradient to, the rows that its ids name.
pub(super) struct Embedding {
    bucket: usize,
    /// The last stage reads it too and gives every row a gradient. Its part is reduced when that stage is left, behind
    /// the whole backward; the first stage's rows follow.
    tied: bool,
    /// How the rows travel in each reduction of this step still to come.
    plans: VecDeque<Option<RowPlan>>,
    /// What the first stage reads instead of the whole matrix: in the first micro-batch, while that is on its way; always, where there
    /// is none.
    early: Option<Rows>,
    /// The gradient of the rows that follow, or of `only`, while the first stage adds to it.
    late: Option<Rows>,
    /// The whole gradient ([`Zero::keep_as_rows`]).
    only: Option<Rows>,
}

impl Embedding {
    /// What the first stage reads now instead of this bucket.
    pub(super) fn early_of(&self, bucket: usize) -> Option<&Rows> {
        self.early.as_ref().filter(|_| self.bucket == bucket)
    }

    /// What the first stage adds to now instead of this bucket's whole gradient.
    pub(super) fn late_of(&self, bucket: usize) -> Option<&Rows> {
        self.late.as_ref().filter(|_| self.bucket == bucket)
    }

    /// The bucket's whole gradient, where it is kept as rows.
    pub(super) fn gradient_of(&self, bucket: usize) -> Option<RowGradient<'_>> {
        let rows = self.only.as_ref().filter(|_| self.bucket == bucket);
        rows.map(Rows::gradient)
    }

    /// Rows that are kept: of the matrix in the compute precision, and of its gradient.
    pub(super) fn kept(&self) -> [Option<&Tensor>; 2] {
        [&self.early, &self.only].map(|rows| rows.as_ref().map(|rows| &rows.values))
    }

    /// The first stage's backward begins, and adds to the gradient's only rows, if there are such; whether there are.
    pub(super) fn open_only(&mut self) -> bool {
        let only = self.only.take();
        let opened = only.is_some();
        self.late = only.or(self.late.take());
        opened
    }

    /// The first stage's backward is over on one rank, where nothing follows anything; whether it had rows to add to.
    pub(super) fn close_only(&mut self) -> bool {
        let late = self.late.take();
        let closed = late.is_some();
        self.only = late.or(self.only.take());
        closed
    }

    /// Early rows go where the whole matrix can be read from here on; whether there were any.
    pub(super) fn drop_early(&mut self, buckets: &[BucketState]) -> bool {
        buckets[self.bucket].values.full.is_some() && self.early.take().is_some()
    }

    /// The rows that now follow the rest of this bucket's gradient, and how they travel.
    pub(super) fn take_late(&mut self, bucket: usize) -> Option<(RowPlan, Rows)> {
        let rows = self.late.take_if(|_| self.bucket == bucket)?;
        let plan = self.plans.pop_front().flatten();
        Some((plan.expect("its rows follow"), rows))
    }

    /// How this bucket's gradient travels in the reduction that starts now, if as rows that are all of it.
    pub(super) fn next_plan(&mut self, bucket: usize) -> Option<RowPlan> {
        // Where the matrix is tied, rows that are few enough to follow wait for theirs.
        let follows = self.tied && self.plans.front() != Some(&None);
        if self.bucket != bucket || follows {
            return None;
        }
        self.plans.pop_front().flatten()
    }
}

impl Zero {
    /// Of `matrix`, to be added, only the first stage reads and gives a gradient to some rows. On one rank, with the CPU, its gradient
    /// is kept as those, and where its master weights are not the model's own, steps read rows made from them: of 260,164 pieces a step
    /// names a few thousand. [`Zero::make_whole`] is for whoever reads it outside of a step.
    pub fn keep_as_rows(&mut self, matrix: &str) {
        if self.ranks.1 == 1 && self.stage < Stage::Gradients {
            self.kept_as_rows = Some(matrix.to_owned());
        }
    }

    /// Called by all ranks before a step. `ids` are the micro-batches' rows of `matrix`, which the model's first stage reads:
    /// whatever of it can, travels as rows, by counts that all ranks share. The gradient does where that is fewer bytes; where
    /// the head is tied to the matrix and gives every row a gradient, the rows follow the head's part, which then need not
    /// wait for them. And if the first stage would have to wait for the whole matrix, its rows are fetched ahead.
    pub fn begin_step(&mut self, comm: &dyn Comm, matrix: &str, ids: &[&Tensor]) -> Result<()> {
        self.embedding = self.row_matrix(comm, matrix);
        let Some(mut embedding) = self.embedding.take() else {
            return self.start_publishing(comm);
        };
        if comm.world() == 1 {
            let wanted = rows::unique(ids);
            embedding.early = self.read_rows(embedding.bucket, &wanted)?;
            embedding.only = Some(Rows::zeros(
                &self.layout.buckets[embedding.bucket],
                wanted,
                Device::Cpu,
            )?);
            self.embedding = Some(embedding);
            return self.start_publishing(comm);
        }
        let (index, state) = (embedding.bucket, &self.buckets[embedding.bucket]);
        let bucket = &self.layout.buckets[index];
        if let (true, Some(first)) = (self.unpublished && self.layout.n_slices > 1, ids.first()) {
            let wanted = rows::unique(&[first]);
            embedding.early = rows::fetch(comm, bucket, &state.slice.theta, (self.kind, state.device), wanted)?;
        }
        let each_apart = self.stage >= Stage::Gradients;
        let rows = match (each_apart, embedding.tied) {
            (true, _) => ids.chunks(1).map(rows::unique).collect(),
            (false, false) => vec![rows::unique(ids)],
            // Micro-batches before the last one add to the part that goes first.
            (false, true) => vec![rows::unique(&ids[ids.len().saturating_sub(1)..])],
        };
        let when = match embedding.tied {
            true => When::Behind,
            false => When::Instead(self.wire),
        };
        // With one slice, all ranks' rows would go to all.
        if embedding.tied || self.layout.n_slices > 1 {
            embedding.plans = rows::plan(comm, bucket, when, rows)?.into();
        }
        self.embedding = Some(embedding);
        self.start_publishing(comm)
    }

    /// As [`Zero::begin_step`], where the first stage reads `matrix` forward and no step is made of it.
    pub fn begin_reading(&mut self, comm: &dyn Comm, matrix: &str, ids: &Tensor) -> Result<()> {
        if comm.world() == 1
            && let Some(mut embedding) = self.row_matrix(comm, matrix)
            && let Some(rows) = self.read_rows(embedding.bucket, &rows::unique(&[ids]))?
        {
            embedding.early = Some(rows);
            self.embedding = Some(embedding);
        }
        Ok(())
    }

    /// Of a matrix of which there is no copy in the compute precision these rows; `None` where there is one.
    fn read_rows(&self, bucket: usize, wanted: &[i64]) -> Result<Option<Rows>> {
        let state = &self.buckets[bucket];
        let read = || Rows::read(&self.layout.buckets[bucket], &state.slice.theta, self.kind, wanted);
        state.values.full.is_none().then(read).transpose()
    }

    /// The matrix that the first stage reads, where it can travel as rows.
    fn row_matrix(&self, comm: &dyn Comm, matrix: &str) -> Option<Embedding> {
        let (Flat::Trained(index), _) = *self.places.get(matrix)? else {
            return None;
        };
        let reads = |stage: &&Vec<Flat>| stage.contains(&Flat::Trained(index));
        let readers = self.stages.iter().filter(reads).count();
        let tied = readers == 2 && self.stages.last().is_some_and(|last| reads(&last));
        let first = self.stages.first().is_some_and(|first| reads(&first));
        let alone = self.layout.buckets[index].params.len() == 1;
        let is_kept_so = self.kept_as_rows.as_deref() == Some(matrix) && self.buckets[index].device == Device::Cpu;
        let pays = comm.world() > 1 || is_kept_so;
        (pays && first && alone && (readers == 1 || tied)).then(|| Embedding {
            bucket: index,
            tied,
            plans: VecDeque::new(),
            early: None,
            late: None,
            only: None,
        })
    }

    /// `ids`, as the first stage is to use them now: where it has some of the matrix's rows only, their places among them.
    pub fn embedding_ids(&self, ids: &Tensor) -> Tensor {
        let rows = self.embedding.as_ref();
        let rows = rows.and_then(|embedding| embedding.early.as_ref().or(embedding.late.as_ref()));
        rows.map_or_else(|| ids.shallow_clone(), |rows| rows.places(ids))
    }

    /// Whether the rows of this bucket's gradient follow the rest of it in the next reduction.
    pub(super) fn rows_follow(&self, bucket: usize) -> bool {
        self.embedding.as_ref().is_some_and(|embedding| {
            embedding.bucket == bucket && embedding.tied && matches!(embedding.plans.front(), Some(Some(_)))
        })
    }

    /// The bucket of which the first stage has some rows early.
    pub(super) fn early_bucket(&self) -> Option<usize> {
        let embedding = self.embedding.as_ref()?;
        embedding.early.as_ref().map(|_| embedding.bucket)
    }

    pub(super) fn open_late_rows(&mut self, bucket: usize) -> Result<()> {
        let embedding = self.embedding.as_mut().expect("its rows follow");
        let Some(Some(plan)) = embedding.plans.front() else {
            unreachable!("its rows follow");
        };
        let (place, device) = (&self.layout.buckets[bucket], self.buckets[bucket].device);
        embedding.late = Some(Rows::zeros(place, plan.rows().to_vec(), device)?);
        Ok(())
    }

    /// The bucket's whole gradient, where it is kept as rows.
    pub(super) fn only_rows(&self, bucket: usize) -> Option<RowGradient<'_>> {
        self.embedding.as_ref()?.gradient_of(bucket)
    }

    /// Starts sending the rows that follow the rest of a bucket's gradient.
    pub(super) fn reduce_late_rows(
        &mut self,
        comm: &dyn Comm,
        bucket: usize,
        plan: &RowPlan,
        late: &Rows,
    ) -> Result<()> {
        let state = &mut self.buckets[bucket];
        let place = &self.layout.buckets[bucket];
        state.rows = Some(rows::start(comm, place, plan, &late.values, true, self.wire)?);
        state.rows_follow = true;
        self.sent(comm, bucket)
    }
}
