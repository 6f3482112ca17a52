//! All-reduces at three sizes, timed: whether the ranks' collectives work at all, and at which pace.

use std::time::Instant;

use anyhow::Result;
use serde_json::{Value, json};
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
            comm.barrier()?;
            let began = Instant::now();
            comm.all_reduce(&mut values, Wire::F32)?.wait()?;
            seconds.push(began.elapsed().as_secs_f64());
        }
        seconds.sort_by(f64::total_cmp);
        let slowest_rank = comm.max(&[seconds[TIMES / 2], seconds[TIMES - 1]])?;
        // Every all-reduce multiplies ones by the world: a transport that adds wrongly is found here.
        let expected = (comm.world() as f64).powi(TIMES as i32 + 1);
        let (low, high) = (values.min().double_value(&[]), values.max().double_value(&[]));
        anyhow::ensure!(
            low == expected && high == expected,
            "all-reduces of ones over {} ranks gave {low} to {high} where {expected} is right; memory or network is at fault",
            comm.world()
        );
        sizes.push(json!({ "bytes": bytes, "seconds": slowest_rank[0], "worst_seconds": slowest_rank[1] }));
    }
    Ok(json!({ "engine": comm.engine(), "sizes": sizes }))
}
