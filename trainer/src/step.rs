//! The training step. Read this file first; it follows the symbols of ZeRO (Rajbhandari et al. 2020) and AdamW
//! (Loshchilov and Hutter 2019).

use std::collections::BTreeMap;

use anyhow::Result;
use configs::{Group, Plan, Rates};
use corpus::RowsDigest;
use sharding::adamw::AdamW;
use sharding::zero::Verdict;
use sharding::{Comm, Zero};

use crate::batch::{Batch, MicroBatch};
use crate::model::{DropoutRows, Model, Pass};
use crate::random;

/// What a step works on: the same fields for every recipe, world size and kind of hardware.
pub struct Trainer<'a> {
    pub plan: &'a Plan,
    pub comm: &'a dyn Comm,
    pub model: Model,
    pub zero: Zero,
    /// Steps taken.
    pub step: u64,
}

/// What every rank knows alike after a step.
pub struct StepReport {
    /// Nats per target, mean over the global batch, before the update.
    pub loss: f64,
    pub targets: u64,
    /// Digest of the global batch's rows.
    pub rows: RowsDigest,
    pub verdict: Verdict,
    /// Some rank was asked to save and stop.
    pub stop: bool,
}

impl Trainer<'_> {
    /// One optimizer step over the global batch.
    ///
    ///   N    = target tokens in the global batch, over all ranks
    ///   g    = Σ ranks, micro-batches  ∇ (Σ nll) / N
    ///   g_r  = this rank's slice of g                  reduce-scatter, bucket by bucket, during backward
    ///   g_r ← g_r · min(1, c / ‖g‖)
    ///   θ_r ← AdamW(θ_r, g_r, lr(step))
    ///   θ    = θ_0 ‖ θ_1 ‖ …                           all-gather
    ///
    /// `stop` says that this rank was asked to save and stop; the ranks agree on it in the step's one small reduction.
    pub fn train_step(&mut self, batch: &Batch, stop: bool) -> Result<StepReport> {
        let n_targets = self.comm.sum(&[batch.n_targets as f64])?[0];
        // A batch without any has no gradient and no loss; dividing by one keeps them 0.
        let divisor = n_targets.max(1.0);
        let mut nll = 0.0;

        self.zero.clear_gradients();
        let last = batch.micro_batches.len() - 1;
        for (index, micro) in batch.micro_batches.iter().enumerate() {
            nll += self.forward_backward(micro, divisor, index == last)?;
        }

        let mut ride_along = vec![nll, f64::from(stop)];
        ride_along.extend(batch.digest.limbs());
        let verdict = self.zero.finish(self.comm, &ride_along)?;
        if verdict.finite {
            self.zero.update(&self.groups(&verdict));
            self.zero.publish(self.comm)?;
        }
        self.step += 1;
        let (nll, stop) = (verdict.sums[0], verdict.sums[1] > 0.0);
        let limbs = std::array::from_fn(|limb| verdict.sums[2 + limb]);
        Ok(StepReport {
            loss: nll / divisor,
            targets: n_targets as u64,
            rows: RowsDigest::from_limbs(limbs),
            verdict,
            stop,
        })
    }

    /// Adds a micro-batch's gradient; returns its Σ nll. After the `last` one each stage's reduction starts at once.
    pub fn forward_backward(&mut self, micro: &MicroBatch, n_targets: f64, last: bool) -> Result<f64> {
        let dropout = self.dropout(micro);
        let train = &self.plan.train;
        let model = &mut self.model;
        let pass = Pass {
            rotary: &model.rotary,
            recompute: train.recompute,
            dropout: dropout.as_ref(),
            documents: micro.documents.as_ref(),
        };

        let mut hidden_btd = model.embed(&micro.ids_bt);
        let mut trace = Vec::with_capacity(model.layers.len());
        for layer in &model.layers {
            let (out_btd, saved) = layer.forward(hidden_btd, &pass);
            hidden_btd = out_btd;
            trace.push(saved);
        }

        let head_weight = model.head_weight.as_mut().unwrap_or(&mut model.embedding);
        let head = model.head.loss(head_weight, &hidden_btd, &micro.targets_bt, n_targets);
        drop(hidden_btd);
        let mut reduce = |bucket: Option<usize>| match bucket {
            Some(bucket) if last => self.zero.reduce(self.comm, bucket),
            _ => Ok(()),
        };
        reduce(model.buckets.head)?;

        let mut d_btd = head.d_hidden_btd;
        for ((layer, saved), bucket) in model.layers.iter_mut().zip(trace).zip(&model.buckets.layers).rev() {
            d_btd = layer.backward(saved, d_btd, &pass);
            reduce(*bucket)?;
        }
        let embedding_bucket = model.buckets.embedding;
        model.embed_backward(&micro.ids_bt, &d_btd);
        reduce(embedding_bucket)?;
        Ok(head.nll)
    }

    fn dropout(&self, micro: &MicroBatch) -> Option<DropoutRows> {
        let drops = self.plan.train.lora.as_ref().is_some_and(|lora| lora.dropout > 0.0);
        drops.then(|| DropoutRows {
            stream: random::Stream::new(self.plan.seed, "dropout").fork(self.step),
            rows: micro.rows.clone(),
            sequence_length: self.plan.train.sequence_length,
            device: self.model.device,
        })
    }

    /// AdamW's numbers for this step by parameter group, in the order of the groups' indices.
    fn groups(&self, verdict: &Verdict) -> [AdamW; Group::ALL.len()] {
        let optimizer = &self.plan.optimizer;
        let factor = optimizer.lr_factor_at(self.step, self.plan.train.steps);
        Group::ALL.map(|group| {
            // A group that the plan does not name has no parameters.
            let Rates { lr, weight_decay } = optimizer.groups.get(&group).copied().unwrap_or(NO_CHANGE);
            AdamW {
                lr: lr * factor,
                beta1: optimizer.beta1,
                beta2: optimizer.beta2,
                epsilon: optimizer.epsilon,
                weight_decay,
                updates_before: self.zero.updates,
                gradient_scale: verdict.clip(optimizer.max_grad_norm),
            }
        })
    }
}

const NO_CHANGE: Rates = Rates {
    lr: 0.0,
    weight_decay: 0.0,
};

/// Learning rates in `step` by parameter group, of those that train.
pub fn lr_by_group(plan: &Plan, step: u64) -> BTreeMap<Group, f64> {
    let factor = plan.optimizer.lr_factor_at(step, plan.train.steps);
    let groups = plan.optimizer.groups.iter();
    groups.map(|(group, rates)| (*group, rates.lr * factor)).collect()
}
