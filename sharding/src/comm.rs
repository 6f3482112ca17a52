//! The collectives a training step needs, as one small trait. Engines implement the first half; the rest is written
//! once on top of them.

use tch::{Device, Kind, Tensor};

use crate::Result;

/// How an all-reduce combines elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reduce {
    Sum,
    Max,
}

/// A collective under way. Dropping it unfinished is a bug: the buffers may still be written to.
#[must_use = "a collective's result is there only after wait()"]
pub struct Pending(Option<Box<dyn FnOnce() -> Result<()>>>);

impl Pending {
    pub fn done() -> Pending {
        Pending(None)
    }

    pub fn until(finish: impl FnOnce() -> Result<()> + 'static) -> Pending {
        Pending(Some(Box::new(finish)))
    }

    /// Returns when this rank's part is finished and its buffers may be read and written.
    pub fn wait(mut self) -> Result<()> {
        self.0.take().map_or(Ok(()), |finish| finish())
    }
}

/// Collectives among the ranks of a run. All ranks make the same calls in the same order.
/// Tensors are contiguous and on the CPU; counts are elements.
pub trait Comm {
    fn rank(&self) -> usize;
    fn world(&self) -> usize;
    /// Sums `full` over ranks and leaves slice `rank()` of the sum in `mine`; `full` is `world()` slices long. f32.
    fn reduce_scatter(&self, full: &Tensor, mine: &mut Tensor) -> Result<Pending>;
    /// Fills `full` with every rank's `mine`, in rank order.
    fn all_gather(&self, mine: &Tensor, full: &mut Tensor) -> Result<Pending>;
    /// Combines `values` element by element over ranks, in place. f32 or f64.
    fn all_reduce(&self, values: &mut Tensor, how: Reduce) -> Result<Pending>;
    /// Gives every rank `root`'s `values`.
    fn broadcast(&self, values: &mut Tensor, root: usize) -> Result<Pending>;
    /// Returns when every rank has called it.
    fn barrier(&self) -> Result<()>;
    /// Ends the whole job at once with this exit code. For errors: peers may be waiting in a collective.
    fn abort(&self, code: i32) -> !;

    /// Element-wise sums over ranks, the same on every rank.
    fn sum(&self, values: &[f64]) -> Result<Vec<f64>> {
        self.combine(values, Reduce::Sum)
    }

    /// Element-wise maxima over ranks, the same on every rank.
    fn max(&self, values: &[f64]) -> Result<Vec<f64>> {
        self.combine(values, Reduce::Max)
    }

    fn combine(&self, values: &[f64], how: Reduce) -> Result<Vec<f64>> {
        let mut tensor = Tensor::from_slice(values);
        self.all_reduce(&mut tensor, how)?.wait()?;
        Ok(Vec::try_from(&tensor)?)
    }

    /// Every rank's `mine`, in rank order; all of the same length.
    fn all_gather_bytes(&self, mine: &[u8]) -> Result<Vec<Vec<u8>>> {
        let length = mine.len();
        let mut full = Tensor::zeros([(length * self.world()) as i64], (Kind::Uint8, Device::Cpu));
        self.all_gather(&Tensor::from_slice(mine), &mut full)?.wait()?;
        let bytes: Vec<u8> = Vec::try_from(&full)?;
        Ok((0..self.world())
            .map(|rank| bytes[rank * length..(rank + 1) * length].to_vec())
            .collect())
    }

    /// Rank 0's `mine` on every rank; `mine` must be as long everywhere.
    fn broadcast_bytes(&self, mine: &[u8]) -> Result<Vec<u8>> {
        let mut tensor = Tensor::from_slice(mine);
        self.broadcast(&mut tensor, 0)?.wait()?;
        Ok(Vec::try_from(&tensor)?)
    }
}
