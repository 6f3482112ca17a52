//! The collectives a training step needs, as one small trait. Engines implement the first half; the rest is written
//! once on top of them.

use std::sync::atomic::{AtomicU64, Ordering};

use tch::{Device, Kind, Tensor};

use crate::Result;

/// How [`Comm::combine`] combines elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reduce {
    Sum,
    Max,
}

/// The precision in which what is summed travels. The sum itself is always made in f32, from what has travelled.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Wire {
    #[default]
    F32,
    /// Every rank's share is rounded to bf16 once, its own too: half the bytes.
    Bf16,
}

impl Wire {
    pub fn bytes(self) -> usize {
        match self {
            Wire::F32 => 4,
            Wire::Bf16 => 2,
        }
    }
}

/// A collective under way. Its buffers may be read and written again after [`Pending::wait`], not before.
#[must_use = "a collective's result is there only after wait()"]
pub struct Pending(Option<UnderWay>);

struct UnderWay {
    is_over: Box<dyn Fn() -> bool>,
    finish: Box<dyn FnOnce() -> Result<()>>,
}

impl Pending {
    pub fn done() -> Pending {
        Pending(None)
    }

    /// `is_over` says whether `finish` would return at once.
    pub fn until(is_over: impl Fn() -> bool + 'static, finish: impl FnOnce() -> Result<()> + 'static) -> Pending {
        Pending(Some(UnderWay {
            is_over: Box::new(is_over),
            finish: Box::new(finish),
        }))
    }

    /// The same, with `around` making the call that finishes it: for whoever wants to know when a rank waits.
    pub fn around(self, around: impl FnOnce(&mut dyn FnMut() -> Result<()>) -> Result<()> + 'static) -> Pending {
        Pending(self.0.map(|UnderWay { is_over, finish }| UnderWay {
            is_over,
            finish: Box::new(move || {
                let mut finish = Some(finish);
                around(&mut || finish.take().map_or(Ok(()), |finish| finish()))
            }),
        }))
    }

    /// Whether [`Pending::wait`] would return at once. Differs between ranks: no collective may depend on it.
    pub fn is_over(&self) -> bool {
        self.0.as_ref().is_none_or(|under_way| (under_way.is_over)())
    }

    /// Returns when this rank's part is finished and its buffers may be read and written.
    pub fn wait(mut self) -> Result<()> {
        self.0.take().map_or(Ok(()), |under_way| (under_way.finish)())
    }
}

/// Where in its work a rank is. For whoever watches it from outside; it changes nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mark {
    Load,
    Restore,
    /// A step begins, with its batch.
    Batch {
        step: u64,
    },
    /// One of the model's stages runs: 0 embeds, 1 … L are layers, L + 1 is the head.
    Forward {
        stage: usize,
    },
    Backward {
        stage: usize,
    },
    /// From the end of backward to the publication.
    Update,
    /// Ranks compare what they should hold alike.
    Compare,
    /// Metrics are written.
    Report,
    Save,
    Evaluate,
    Export,
}

/// Bytes that this rank has handed to collectives for other ranks, with algorithms that send no element twice: what a
/// reduce-scatter or an all-gather of Ψ elements sends is Ψ·(N − 1)/N, and that is the least there is.
#[derive(Debug, Default)]
pub struct Sent(AtomicU64);

impl Sent {
    pub(crate) fn add(&self, bytes: usize) {
        self.0.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    pub fn bytes(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Collectives among the ranks of a run. All ranks make the same calls in the same order, with equal counts where nothing
/// else is said. Tensors are contiguous; counts are elements. A call starts the exchange, which goes on beside whatever
/// the caller does until it waits.
pub trait Comm {
    fn rank(&self) -> usize;
    fn world(&self) -> usize;
    /// Sums `full` (f32) over ranks and leaves slice `rank()` of the sum in `mine` (f32); `full` is `world()` slices long.
    /// Sums are made in rank order, whatever came first.
    fn reduce_scatter(&self, full: &Tensor, mine: &mut Tensor, wire: Wire) -> Result<Pending>;
    /// Sums `values` (f32) over ranks, in place, in rank order; the same bits on every rank.
    fn all_reduce(&self, values: &mut Tensor, wire: Wire) -> Result<Pending>;
    /// Fills `full` with every rank's `mine`, in rank order; any one kind.
    fn all_gather(&self, mine: &Tensor, full: &mut Tensor) -> Result<Pending>;
    /// Sends the r-th of the parts that `send_counts` cuts `send` into to rank r, and fills `receive` with what the ranks
    /// send here, in rank order; `receive_counts` must say how much that is. Any one kind.
    fn all_to_all(
        &self,
        send: &Tensor,
        send_counts: &[usize],
        receive: &mut Tensor,
        receive_counts: &[usize],
    ) -> Result<Pending>;
    /// Gives every rank `root`'s `values`; any kind.
    fn broadcast(&self, values: &mut Tensor, root: usize) -> Result<Pending>;
    /// Returns when every rank has called it.
    fn barrier(&self) -> Result<()>;
    /// What has been sent since the ranks met.
    fn sent(&self) -> &Sent;
    /// The libraries that carry the bytes: names, versions, files.
    fn engine(&self) -> String;
    /// Tells where this rank is; costs nothing worth counting. An engine has nothing to do with it.
    fn at(&self, _mark: Mark) {}
    /// Whether a reduction under way holds copies as large as what it reduces.
    fn copies_to_reduce(&self, _wire: Wire) -> bool {
        false
    }
    /// Ends the whole job at once with this exit code. For errors: peers may be waiting in a collective.
    fn abort(&self, code: i32) -> !;

    /// Element-wise sums over ranks, the same on every rank.
    fn sum(&self, values: &[f64]) -> Result<Vec<f64>> {
        self.combine(values, Reduce::Sum)
    }

    /// Element-wise maxima over ranks, the same on every rank; a NaN anywhere is a NaN everywhere.
    fn max(&self, values: &[f64]) -> Result<Vec<f64>> {
        self.combine(values, Reduce::Max)
    }

    /// A few numbers: every rank gets all of them and combines them in rank order.
    fn combine(&self, values: &[f64], how: Reduce) -> Result<Vec<f64>> {
        if self.world() == 1 || values.is_empty() {
            return Ok(values.to_vec());
        }
        let mut all = Tensor::zeros([(values.len() * self.world()) as i64], (Kind::Double, Device::Cpu));
        self.all_gather(&Tensor::from_slice(values), &mut all)?.wait()?;
        let all: Vec<f64> = Vec::try_from(&all)?;
        let mut ranks = all.chunks_exact(values.len());
        let mut combined = ranks.next().expect("at least one rank").to_vec();
        for theirs in ranks {
            for (mine, theirs) in combined.iter_mut().zip(theirs) {
                *mine = match how {
                    Reduce::Sum => *mine + theirs,
                    Reduce::Max if mine.is_nan() || theirs.is_nan() => f64::NAN,
                    Reduce::Max => mine.max(*theirs),
                };
            }
        }
        Ok(combined)
    }

    /// Every rank's `mine`, in rank order; all of the same length.
    fn all_gather_bytes(&self, mine: &[u8]) -> Result<Vec<Vec<u8>>> {
        let length = mine.len();
        if length == 0 {
            return Ok(vec![Vec::new(); self.world()]);
        }
        let mut full = Tensor::zeros([(length * self.world()) as i64], (Kind::Uint8, Device::Cpu));
        self.all_gather(&Tensor::from_slice(mine), &mut full)?.wait()?;
        let bytes: Vec<u8> = Vec::try_from(&full)?;
        Ok(bytes.chunks_exact(length).map(<[u8]>::to_vec).collect())
    }

    /// Every rank's `mine`, in rank order, of any lengths.
    fn all_gather_texts(&self, mine: &[u8]) -> Result<Vec<Vec<u8>>> {
        let lengths = self.all_gather_bytes(&(mine.len() as u64).to_le_bytes())?;
        let lengths: Vec<usize> = lengths
            .iter()
            .map(|bytes| u64::from_le_bytes(bytes[..].try_into().expect("8 bytes")) as usize)
            .collect();
        let longest = lengths.iter().copied().max().unwrap_or(0);
        let mut padded = mine.to_vec();
        padded.resize(longest, 0);
        let mut all = self.all_gather_bytes(&padded)?;
        all.iter_mut()
            .zip(lengths)
            .for_each(|(text, length)| text.truncate(length));
        Ok(all)
    }

    /// Rank 0's `mine` on every rank; `mine` must be as long everywhere.
    fn broadcast_bytes(&self, mine: &[u8]) -> Result<Vec<u8>> {
        let mut tensor = Tensor::from_slice(mine);
        self.broadcast(&mut tensor, 0)?.wait()?;
        Ok(Vec::try_from(&tensor)?)
    }
}
