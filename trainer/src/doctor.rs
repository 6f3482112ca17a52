//! All-reduces at three sizes, timed: whether the ranks' collectives work at all, and at which pace.

use std::time::Instant;

use anyhow::Result;
use serde_json::{Value, json};
use sharding::cuda::wait_for;
use sharding::{Comm, Wire};
use tch::{Device, Kind, Tensor};

/// Latency, a small gradient, a bucket.
const BYTES: [usize; 3] = [1 << 10, 1 << 18, 1 << 22];
const TIMES: usize = 5;

pub fn all_reduces(comm: &dyn Comm, device: Device) -> Result<Value> {
    let mut sizes = vec![];
    for bytes in BYTES {
        let mut values = Tensor::ones([(bytes / 4) as i64], (Kind::Float, device));
        // The first connects.
        comm.all_reduce(&mut values, Wire::F32)?.wait()?;
        let mut seconds = vec![];
        for _ in 0..TIMES {
            let _ = values.fill_(1.0);
            comm.barrier()?;
            // On a GPU to wait is to queue what comes behind.
            wait_for(device);
            let began = Instant::now();
            comm.all_reduce(&mut values, Wire::F32)?.wait()?;
            wait_for(device);
            seconds.push(began.elapsed().as_secs_f64());
            check_sums(&values, comm.world())?;
        }
        seconds.sort_by(f64::total_cmp);
        let slowest_rank = comm.max(&[seconds[TIMES / 2], seconds[TIMES - 1]])?;
        sizes.push(json!({ "bytes": bytes, "seconds": slowest_rank[0], "worst_seconds": slowest_rank[1] }));
    }
    Ok(json!({ "engine": comm.engine(), "sizes": sizes }))
}

/// Ones add up to the world.
fn check_sums(values: &Tensor, world: usize) -> Result<()> {
    let (low, high) = (values.min().double_value(&[]), values.max().double_value(&[]));
    anyhow::ensure!(
        low == world as f64 && high == world as f64,
        "an all-reduce of ones over {world} ranks gave {low} to {high}; memory or network is at fault"
    );
    Ok(())
}
