//! ZeRO: gradients are summed over ranks bucket by bucket, each rank updates its slice of the f32 master weights, and all
//! ranks publish their slices to all.
//! Source: Rajbhandari et al. 2020, "ZeRO", §5.1 (P_os).

use std::ops::Range;

use tch::{Device, Kind, Tensor};

use crate::adamw::{self, AdamW};
use crate::memory::{f32s, f32s_mut};
use crate::{BucketSpec, Comm, Error, Layout, Pending, Result, Wire};

/// How much of the training state is sharded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Every rank holds all optimizer state and makes the same update.
    Replicated,
    /// Each rank holds and updates one slice of the optimizer state.
    OptimizerState,
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

struct BucketState {
    params: Tensor,
    grads: Tensor,
    /// This rank's slice of the summed gradient; all of `grads` when nothing is sharded.
    grads_slice: Tensor,
    slice: Slice,
    reducing: Option<Pending>,
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

/// Parameters, gradients and optimizer state of everything that trains, as this rank holds them.
pub struct Zero {
    layout: Layout,
    /// Which slice of each bucket is this rank's.
    my_slice: usize,
    buckets: Vec<BucketState>,
    /// Updates made since the run began; AdamW's bias correction counts them.
    pub updates: u64,
}

impl Zero {
    /// Allocates what `specs` train. `initial(bucket, param)` gives each parameter's f32 value and must be the same on all
    /// ranks. `kind` is the compute precision.
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
        let (n_slices, my_slice) = match stage {
            Stage::Replicated => (1, 0),
            Stage::OptimizerState => (comm.world(), comm.rank()),
        };
        let layout = Layout::new(specs, n_slices);
        check_ranks_agree(comm, &layout)?;
        let mut buckets = Vec::with_capacity(layout.buckets.len());
        for (b, bucket) in layout.buckets.iter().enumerate() {
            let zeros = |len: usize, kind| Tensor::f_zeros([len as i64], (kind, Device::Cpu));
            let master = zeros(bucket.padded, Kind::Float)?;
            for (p, (range, param)) in bucket.ranges.iter().zip(&bucket.params).enumerate() {
                let value = initial(b, p);
                assert_eq!(
                    value.size(),
                    param.shape,
                    "{}: the initial value has the registered shape",
                    param.name
                );
                view(&master, range.clone()).f_copy_(&value.reshape([-1]))?;
            }
            let mut params = zeros(bucket.padded, kind)?;
            params.f_copy_(&master)?;
            let my_range = my_slice * bucket.slice_len..(my_slice + 1) * bucket.slice_len;
            let theta = if n_slices == 1 {
                master
            } else {
                view(&master, my_range).copy()
            };
            let grads = zeros(bucket.padded, Kind::Float)?;
            let grads_slice = if n_slices == 1 {
                grads.shallow_clone()
            } else {
                zeros(bucket.slice_len, Kind::Float)?
            };
            let slice = Slice {
                theta,
                m: zeros(bucket.slice_len, Kind::Float)?,
                v: zeros(bucket.slice_len, Kind::Float)?,
            };
            buckets.push(BucketState {
                params,
                grads,
                grads_slice,
                slice,
                reducing: None,
            });
        }
        Ok(Zero {
            layout,
            my_slice,
            buckets,
            updates: 0,
        })
    }

    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The views of parameter `param` of bucket `bucket`.
    pub fn trained(&self, bucket: usize, param: usize) -> Trained {
        let range = self.layout.buckets[bucket].ranges[param].clone();
        let shape = &self.layout.buckets[bucket].params[param].shape;
        let state = &self.buckets[bucket];
        Trained {
            value: view(&state.params, range.clone()).view(shape.as_slice()),
            grad: view(&state.grads, range).view(shape.as_slice()),
        }
    }

    /// Zeroes every gradient; called before a step's first backward.
    pub fn clear_gradients(&mut self) {
        for state in &mut self.buckets {
            let _ = state.grads.zero_();
        }
    }

    /// Starts summing a bucket's gradient over ranks. Its last backward of the step has ended.
    pub fn reduce(&mut self, comm: &dyn Comm, bucket: usize) -> Result<()> {
        let sharded = self.layout.n_slices > 1;
        let state = &mut self.buckets[bucket];
        assert!(state.reducing.is_none(), "each bucket is reduced once a step");
        state.reducing = Some(if sharded {
            comm.reduce_scatter(&state.grads, &mut state.grads_slice, Wire::F32)?
        } else {
            comm.all_reduce(&mut state.grads, Wire::F32)?
        });
        Ok(())
    }

    /// Waits for all reductions; then one small reduction tells every rank the gradient's norm, whether everything is
    /// finite, and the sums of `ride_along`.
    pub fn finish(&mut self, comm: &dyn Comm, ride_along: &[f64]) -> Result<Verdict> {
        for state in &mut self.buckets {
            state.reducing.take().expect("every bucket was reduced").wait()?;
        }
        // Unsharded gradients are whole on every rank: each rank counts its share once.
        let share = if self.layout.n_slices > 1 {
            1.0
        } else {
            1.0 / comm.world() as f64
        };
        let squares: f64 = self
            .buckets
            .iter()
            .map(|state| adamw::sum_of_squares(f32s(&state.grads_slice)))
            .sum();
        let mut values = vec![squares * share];
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
    pub fn update(&mut self, groups: &[AdamW]) {
        for (bucket, state) in self.layout.buckets.iter().zip(&mut self.buckets) {
            let grads = f32s(&state.grads_slice);
            let Slice { theta, m, v } = &mut state.slice;
            let (theta, m, v) = (f32s_mut(theta), f32s_mut(m), f32s_mut(v));
            for (part, group) in bucket.groups_in_slice(self.my_slice) {
                let range = || part.clone();
                adamw::update(
                    &groups[group],
                    &mut theta[range()],
                    &mut m[range()],
                    &mut v[range()],
                    &grads[range()],
                );
            }
        }
        self.updates += 1;
    }

    /// Casts this rank's master weights to the compute precision and gives every rank all of them.
    pub fn publish(&mut self, comm: &dyn Comm) -> Result<()> {
        let mut publishing = Vec::with_capacity(self.buckets.len());
        for state in &mut self.buckets {
            if self.layout.n_slices == 1 {
                state.params.f_copy_(&state.slice.theta)?;
            } else {
                let mine = state.slice.theta.f_to_kind(state.params.kind())?;
                publishing.push(comm.all_gather(&mine, &mut state.params)?);
            }
        }
        publishing.into_iter().try_for_each(Pending::wait)
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
        (
            self.layout.buckets[bucket].slice(self.my_slice),
            &mut self.buckets[bucket].slice,
        )
    }

    /// The replicated parameters of `bucket`, flat and padded.
    pub fn params(&self, bucket: usize) -> &Tensor {
        &self.buckets[bucket].params
    }
}

fn view(flat: &Tensor, range: Range<usize>) -> Tensor {
    flat.narrow(0, range.start as i64, range.len() as i64)
}

fn check_ranks_agree(comm: &dyn Comm, layout: &Layout) -> Result<()> {
    let mine = blake3::hash(layout.describe().as_bytes());
    let all = comm.all_gather_bytes(mine.as_bytes())?;
    let ranks: Vec<usize> = (0..all.len()).filter(|&rank| all[rank] != all[0]).collect();
    if ranks.is_empty() {
        Ok(())
    } else {
        Err(Error::LayoutMismatch { ranks })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ParamSpec;

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
        zero.update(&[how, how]);
        zero.publish(comm.as_ref()).unwrap();
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
