//! A rank's optimizer slices in host memory of their own, so that training goes on while they are written. What a save costs
//! the training loop is this copy; its memory is kept for the next one.

use std::thread::JoinHandle;

use anyhow::Result;
use launcher::checkpoint::Part;
use rayon::prelude::*;
use sharding::memory::{bytes, f32s, f32s_mut};
use sharding::zero::Slice;
use sharding::{Comm, Zero};
use tch::{Device, Kind, Tensor};

/// Elements that a task copies.
const TASK: usize = 1 << 18;

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
        let n_slices = zero.layout().n_slices;
        if comm.rank() >= n_slices {
            return None;
        }
        let (mut sizes, mut ranges) = (Vec::new(), Vec::new());
        for (index, bucket) in zero.layout().buckets.iter().enumerate() {
            let (range, Slice { theta, m, v }) = zero.slice(index);
            ranges.push((range.start as u64, range.end as u64));
            for (name, tensor) in [("theta", theta), ("m", m), ("v", v)] {
                sizes.push((format!("{}.{name}", bucket.name), range.len(), tensor.numel()));
            }
        }
        let slice = (comm.rank(), n_slices);
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
        let n_slices = zero.layout().n_slices;
        if comm.rank() >= n_slices {
            return None;
        }
        let (mut tensors, mut ranges) = (Vec::new(), Vec::new());
        for (index, bucket) in zero.layout().buckets.iter().enumerate() {
            let (range, Slice { theta, m, v }) = zero.slice(index);
            ranges.push((range.start as u64, range.end as u64));
            for (name, tensor) in [("theta", theta), ("m", m), ("v", v)] {
                tensors.push((
                    format!("{}.{name}", bucket.name),
                    range.len(),
                    tensor.to_device(Device::Cpu),
                ));
            }
        }
        Some(Snapshot {
            slice: (comm.rank(), n_slices),
            ranges,
            tensors,
        })
    }

    /// Copies the state as it is now. When this returns, training may change it.
    pub fn take(&mut self, zero: &Zero) -> Result<()> {
        let mut hosts = self.tensors.iter_mut().map(|(_, _, host)| host);
        for index in 0..zero.layout().buckets.len() {
            let (_, Slice { theta, m, v }) = zero.slice(index);
            for tensor in [theta, m, v] {
                copy(tensor, hosts.next().expect("as many as were prepared"))?;
            }
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

fn copy(from: &Tensor, to: &mut Tensor) -> Result<()> {
    if from.device() == Device::Cpu {
        let tasks = f32s_mut(to).par_chunks_mut(TASK).zip(f32s(from).par_chunks(TASK));
        tasks.for_each(|(to, from)| to.copy_from_slice(from));
    } else {
        to.f_copy_(from)?;
    }
    Ok(())
}
