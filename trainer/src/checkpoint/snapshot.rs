//! A rank's optimizer slices in host memory of their own, so that training goes on while they are written. What a save costs
//! the training loop is this copy; its memory is kept for the next one.

use std::thread::JoinHandle;

use anyhow::Result;
use launcher::checkpoint::Part;
use launcher::checkpoint::manifest::STATE;
use sharding::memory::{bytes, f32s_mut};
use sharding::zero::Slice;
use sharding::{Comm, Zero};
use tch::{Device, Kind, Tensor};

pub struct Snapshot {
    /// Which file of how many it becomes.
    pub slice: (usize, usize),
    /// Elements of each bucket, from and to.
    pub ranges: Vec<(u64, u64)>,
    /// Names and lengths without padding; f32 on the host, padded.
    tensors: Vec<(String, usize, Tensor)>,
}

impl Snapshot {
    /// Memory for what this rank saves, made and touched on a thread of its own: page faults cost more than the copy. `None`:
    /// another rank holds the same.
    pub fn prepare(comm: &dyn Comm, zero: &Zero) -> Option<JoinHandle<Snapshot>> {
        let (slice, ranges) = share(comm, zero)?;
        let sizes: Vec<_> = tensors(zero)
            .map(|(name, length, it)| (name, length, it.numel()))
            .collect();
        let make = move |(name, length, padded): (String, usize, usize)| {
            let mut tensor = Tensor::empty([padded as i64], (Kind::Float, Device::Cpu));
            f32s_mut(&mut tensor).fill(0.0);
            (name, length, tensor)
        };
        Some(std::thread::spawn(move || Snapshot {
            slice,
            ranges,
            tensors: sizes.into_iter().map(make).collect(),
        }))
    }

    /// The slices themselves, where they lie on the host: until it is dropped, training must wait. `None` as above.
    pub fn of(comm: &dyn Comm, zero: &Zero) -> Option<Snapshot> {
        let (slice, ranges) = share(comm, zero)?;
        let on_host = |(name, length, it): (String, usize, &Tensor)| (name, length, it.to_device(Device::Cpu));
        Some(Snapshot {
            slice,
            ranges,
            tensors: tensors(zero).map(on_host).collect(),
        })
    }

    /// Copies the state as it is now. When this returns, training may change it.
    pub fn take(&mut self, zero: &Zero) -> Result<()> {
        for ((_, _, from), (_, _, host)) in tensors(zero).zip(&mut self.tensors) {
            host.f_copy_(from)?;
        }
        Ok(())
    }

    pub fn parts(&self) -> Vec<Part<'_>> {
        self.tensors
            .iter()
            .map(|(name, length, host)| Part {
                name: name.clone(),
                elements: *length as u64,
                bytes: &bytes(host)[..4 * length],
            })
            .collect()
    }
}

/// As [`Snapshot::slice`] and [`Snapshot::ranges`].
type Share = ((usize, usize), Vec<(u64, u64)>);

/// Which file this rank writes, and what of each bucket is in it; `None` where another rank holds the same.
fn share(comm: &dyn Comm, zero: &Zero) -> Option<Share> {
    let (rank, layout) = (comm.rank(), zero.layout());
    let range = |bucket| {
        let (range, _) = zero.slice(bucket);
        (range.start as u64, range.end as u64)
    };
    (rank < layout.n_slices).then(|| {
        let ranges = (0..layout.buckets.len()).map(range).collect();
        ((rank, layout.n_slices), ranges)
    })
}

/// What this rank keeps of each bucket, in the order in which it is saved: name, elements without padding, values.
fn tensors(zero: &Zero) -> impl Iterator<Item = (String, usize, &Tensor)> {
    zero.layout().buckets.iter().enumerate().flat_map(|(index, bucket)| {
        let (range, Slice { theta, m, v }) = zero.slice(index);
        let named = STATE.into_iter().zip([theta, m, v]);
        named.map(move |(name, tensor)| (format!("{}.{name}", bucket.name), range.len(), tensor))
    })
}
