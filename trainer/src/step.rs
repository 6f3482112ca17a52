//! The training step. Read this file first; it follows the symbols of ZeRO (Rajbhandari et al. 2020) and AdamW
//! (Loshchilov and Hutter 2019).

use std::collections::BTreeMap;

use anyhow::Result;
use configs::{Group, Mix, Plan, Rates, Recompute};
use corpus::RowsDigest;
use sharding::Pass::{Backward, Forward};
use sharding::adamw::AdamW;
use sharding::zero::Verdict;
use sharding::{Comm, Mark, Stage, Zero};
use tch::Tensor;

use crate::batch::{Batch, MicroBatch};
use crate::frozen::Frozen;
use crate::guard::{Guard, Why};
use crate::model::{DropoutRows, Model, Pass, embedding_weights};
use crate::random;

/// What a step works on: the same fields for every recipe, world size and kind of hardware.
pub struct Trainer<'a> {
    pub plan: &'a Plan,
    pub comm: &'a dyn Comm,
    pub model: Model,
    pub zero: Zero,
    /// What each layer keeps between its forward and its backward; changes no bit.
    pub recompute: Mix,
    /// Steps taken.
    pub step: u64,
    pub guard: Guard,
    /// Where every rank holds them whole, and ranks are compared.
    pub frozen: Option<Frozen>,
    /// The first step since the weights were loaded, once there was one.
    first: Option<u64>,
    /// The step in which ranks were last found to hold alike what trains.
    alike: Option<u64>,
    /// Digests of this rank's master weights at the beginning of each step since then, that one's too; where [`Trainer::keeps_digests`].
    pub masters: Vec<u64>,
}

/// What a rank no longer holds as all should.
#[derive(Debug, PartialEq)]
pub struct Damage {
    pub rank: usize,
    pub what: &'static str,
    /// The step in which this was last known to be sound: compared, or loaded before it.
    pub sound: u64,
}

const CHANGED: &str = "its master weights changed in the step, while nothing wrote them";

/// What every rank knows alike after a step.
pub struct StepReport {
    /// Nats per target, mean over the global batch, before the update.
    pub loss: f64,
    pub targets: u64,
    /// Digest of the global batch's rows.
    pub rows: RowsDigest,
    pub verdict: Verdict,
    /// Why no rank has moved, if so.
    pub skipped: Option<Why>,
    /// Some rank was asked to save and stop.
    pub stop: bool,
    /// What ranks no longer hold alike, where that was looked at.
    pub damaged: Vec<Damage>,
}

impl<'a> Trainer<'a> {
    /// Before the first step; `model` is bound to the memory that `zero` allocated for what it registered. Where the plan
    /// leaves recomputation to the planner, everything is recomputed until it has chosen.
    pub fn new(plan: &'a Plan, comm: &'a dyn Comm, mut model: Model, mut zero: Zero) -> Trainer<'a> {
        model.bind(&mut zero);
        let all = Mix {
            full: model.layers.len(),
            selective: 0,
        };
        Trainer {
            recompute: plan.train.recompute.mix(model.layers.len()).unwrap_or(all),
            plan,
            comm,
            model,
            zero,
            step: 0,
            guard: Guard::new(plan.train.guard),
            frozen: None,
            first: None,
            alike: None,
            masters: Vec::new(),
        }
    }

    /// Makes the model's weights whole, for whoever reads them outside of a step. Before stage 3; all ranks call it.
    pub fn make_whole(&mut self) -> Result<()> {
        self.zero.make_whole(self.comm)?;
        self.model.bind(&mut self.zero);
        Ok(())
    }

    /// Whether ranks are compared in a step.
    pub fn compares(&self, step: u64) -> bool {
        let every = self.plan.train.check_ranks_every;
        let due = every > 0 && (step + 1).is_multiple_of(every) && self.comm.world() > 1;
        due || self.plan.debug.check_ranks_equal
    }

    /// Whether two ranks are compared that each have all master weights: where those differ no majority says whose are right.
    fn keeps_digests(&self) -> bool {
        let are_compared = self.plan.train.check_ranks_every > 0 || self.plan.debug.check_ranks_equal;
        are_compared && self.zero.stage() == Stage::Replicated && self.comm.world() == 2
    }

    /// What ranks no longer hold alike. Between the step's gradient and its update.
    fn damaged(&mut self, first: u64) -> Result<Vec<Damage>> {
        self.comm.at(Mark::Compare);
        let differ = self.zero.damaged_ranks(self.comm)?.into_iter();
        let sound = self.alike.unwrap_or(first);
        let mut found: Vec<Damage> = differ.map(|(rank, what)| Damage { rank, what, sound }).collect();
        if found.is_empty() {
            self.alike = Some(self.step);
            self.masters.drain(..self.masters.len().saturating_sub(1));
        } else if let Some(begun_with) = self.masters.last() {
            // Nothing writes them before the update: whose are not as they were needs no majority.
            let changed = self.zero.masters() != *begun_with;
            let all = self.comm.all_gather_bytes(&[u8::from(changed)])?;
            let changed = |rank: usize| all[rank] == [1];
            if (0..all.len()).any(changed) {
                found.retain(|damage| changed(damage.rank));
                found.iter_mut().for_each(|damage| damage.what = CHANGED);
            }
        }
        if let Some(frozen) = &mut self.frozen {
            let (ranks, sound) = frozen.damaged_ranks(&mut self.model, self.comm, self.step)?;
            found.extend(ranks.into_iter().map(|rank| Damage {
                rank,
                what: "its frozen weights are not what it loaded",
                sound: sound.unwrap_or(first),
            }));
        }
        Ok(found)
    }

    /// One optimizer step over the global batch.
    ///
    ///   N    = target tokens in the global batch, over all ranks
    ///   g    = Σ ranks, micro-batches  ∇ (Σ nll) / N
    ///   g_r  = this rank's slice of g                  reduce-scatter, bucket by bucket, during backward
    ///   g_r ← g_r · min(1, c / ‖g‖)
    ///   θ_r ← AdamW(θ_r, g_r, lr(step))
    ///   θ    = θ_0 ‖ θ_1 ‖ …                           all-gather, stage by stage, during the next forward
    ///
    /// `stop` says that this rank was asked to save and stop; the ranks agree on it in the step's one small reduction.
    pub fn train_step(&mut self, batch: &Batch, stop: bool) -> Result<StepReport> {
        let first = *self.first.get_or_insert(self.step);
        if self.keeps_digests() {
            self.masters.push(self.zero.masters());
        }
        let n_targets = self.comm.sum(&[batch.n_targets as f64])?[0];
        // A batch without any has no gradient and no loss; dividing by one keeps them 0.
        let divisor = n_targets.max(1.0);
        let mut nll = 0.0;

        self.zero.clear_gradients();
        let ids: Vec<&Tensor> = batch.micro_batches.iter().map(|micro| &micro.ids_bt).collect();
        self.zero.begin_step(self.comm, &self.model.embedding.name, &ids)?;
        let last = batch.micro_batches.len() - 1;
        for (index, micro) in batch.micro_batches.iter().enumerate() {
            nll += self.forward_backward(micro, divisor, index == last)?;
        }

        let mut ride_along = vec![nll, f64::from(stop)];
        ride_along.extend(batch.digest.limbs());
        let verdict = self.zero.finish(self.comm, &ride_along)?;
        let loss = verdict.sums[0] / divisor;
        let damaged = if self.compares(self.step) {
            self.damaged(first)?
        } else {
            Vec::new()
        };
        let skipped = self.guard.judge(loss, verdict.grad_norm, verdict.finite);
        if skipped.is_none() {
            self.zero.update(&self.groups(&verdict))?;
            self.zero.publish();
        }
        self.step += 1;
        let limbs = std::array::from_fn(|limb| verdict.sums[2 + limb]);
        Ok(StepReport {
            loss,
            targets: n_targets as u64,
            rows: RowsDigest::from_limbs(limbs),
            stop: verdict.sums[1] > 0.0,
            skipped,
            verdict,
            damaged,
        })
    }

    /// Adds a micro-batch's gradient; returns its Σ nll. After the `last` one each stage's reduction starts at once.
    ///
    /// The model's stages: 0 embeds, 1 … L are layers, L + 1 is the head. Each is entered, runs and is left. ZeRO has its
    /// parameters there in between, and those of the next stage on their way; leaving a backward starts the reduction.
    pub fn forward_backward(&mut self, micro: &MicroBatch, n_targets: f64, last: bool) -> Result<f64> {
        let dropout = self.dropout(micro);
        let recompute = self.recompute;
        let model = &mut self.model;
        let pass = Pass {
            rotary: &model.rotary,
            // Each layer's own in forward; backward goes by what was kept.
            recompute: Recompute::Full,
            dropout: dropout.as_ref(),
            documents: micro.documents.as_ref(),
        };

        let (zero, comm) = (&mut self.zero, self.comm);
        let (forward, backward) = (Forward, Backward { last });
        let head_stage = model.layers.len() + 1;

        zero.enter(
            comm,
            0,
            forward,
            embedding_weights(&mut model.embedding, &mut model.positions_td),
        )?;
        let mut hidden_btd = model.embed(&zero.embedding_ids(&micro.ids_bt));
        zero.leave(
            comm,
            0,
            forward,
            embedding_weights(&mut model.embedding, &mut model.positions_td),
        )?;
        let mut trace = Vec::with_capacity(model.layers.len());
        for (layer, stage) in model.layers.iter_mut().zip(1..head_stage) {
            zero.enter(comm, stage, forward, layer.weights_mut())?;
            let pass = Pass {
                recompute: recompute.of_layer(stage - 1),
                ..pass
            };
            let (out_btd, saved) = layer.forward(hidden_btd, &pass);
            zero.leave(comm, stage, forward, layer.weights_mut())?;
            hidden_btd = out_btd;
            trace.push(saved);
        }

        let matrix = model.head_weight.as_mut().unwrap_or(&mut model.embedding);
        zero.enter(comm, head_stage, backward, model.head.weights_mut(matrix))?;
        let head = model.head.loss(matrix, &hidden_btd, &micro.targets_bt, n_targets);
        zero.leave(comm, head_stage, backward, model.head.weights_mut(matrix))?;
        drop(hidden_btd);

        let mut d_btd = head.d_hidden_btd;
        for ((layer, saved), stage) in model.layers.iter_mut().zip(trace).zip(1..head_stage).rev() {
            zero.enter(comm, stage, backward, layer.weights_mut())?;
            d_btd = layer.backward(saved, d_btd, &pass);
            zero.leave(comm, stage, backward, layer.weights_mut())?;
        }
        zero.enter(
            comm,
            0,
            backward,
            embedding_weights(&mut model.embedding, &mut model.positions_td),
        )?;
        model.embed_backward(&zero.embedding_ids(&micro.ids_bt), &d_btd);
        zero.leave(
            comm,
            0,
            backward,
            embedding_weights(&mut model.embedding, &mut model.positions_td),
        )?;
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
