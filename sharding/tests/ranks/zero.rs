//! What ZeRO leaves must not depend on how a gradient travelled.

use std::path::Path;

use sharding::adamw::AdamW;
use sharding::{BucketSpec, Comm, ParamSpec, Stage, Wire, Zero};
use tch::{Device, Kind, Tensor};

use crate::Case;

pub const CASES: [Case; 3] = [
    // First: what others leave to the allocator would be taken from what this one measures.
    ("stage_three_takes_the_memory_it_should", resident),
    ("rows_give_the_bits_of_whole_slices", rows),
    ("a_nan_in_one_rank_s_rows_is_told_to_all", nan),
];

/// A prime number of rows of five: slices begin and end within rows.
const ROWS: i64 = 1009;
const WIDTH: i64 = 5;

const HOW: AdamW = AdamW {
    lr: 0.1,
    beta1: 0.9,
    beta2: 0.99,
    epsilon: 1e-3,
    weight_decay: 0.0,
    updates_before: 0,
    gradient_scale: 1.0,
};

fn zero(comm: &dyn Comm, stage: Stage) -> Zero {
    let specs = [BucketSpec {
        name: "embedding".into(),
        params: vec![ParamSpec {
            name: "embed".into(),
            shape: vec![ROWS, WIDTH],
            group: 0,
        }],
    }];
    let mut zero = Zero::new(comm, stage, &specs, Kind::Float, |_, _| {
        Tensor::ones([ROWS, WIDTH], (Kind::Float, Device::Cpu))
    })
    .unwrap();
    // A head that reads nothing of it.
    zero.schedule(&[vec!["embed".into()], vec![]]);
    zero
}

/// Some rows, others on each rank, with doubles; the first and the last are among them.
fn ids(rank: usize, micro: usize) -> Tensor {
    let ids: Vec<i64> = (0..40)
        .map(|i| (i * i * 17 + rank as i64 * 29 + micro as i64 * 5) % ROWS)
        .collect();
    Tensor::cat(&[Tensor::from_slice(&ids), Tensor::from_slice(&[0, ROWS - 1])], 0)
}

struct Weight(String, Tensor, Option<Tensor>);

impl sharding::Held for Weight {
    fn name(&self) -> &str {
        &self.0
    }

    fn value(&mut self) -> &mut Tensor {
        &mut self.1
    }

    fn gradient(&mut self) -> &mut Option<Tensor> {
        &mut self.2
    }
}

/// Two micro-batches' gradients, an update; this rank's slice, and the bytes that travelled for the gradient.
fn slice(comm: &dyn Comm, stage: Stage, wire: Wire, as_rows: bool) -> (Tensor, u64) {
    let mut zero = zero(comm, stage);
    zero.reduce_in(wire);
    let mut weight = Weight("embed".into(), Tensor::new(), None);
    zero.bind(vec![&mut weight]);
    let batches: Vec<Tensor> = (0..2).map(|micro| ids(comm.rank(), micro)).collect();
    zero.clear_gradients();
    let before = comm.sent().bytes();
    if as_rows {
        zero.choose_rows(comm, "embed", &batches.iter().collect::<Vec<_>>())
            .unwrap();
    }
    for (micro, ids) in batches.iter().enumerate() {
        let pass = sharding::Pass::Backward { last: micro == 1 };
        zero.enter(comm, 0, pass, vec![&mut weight]).unwrap();
        // Sevenths are rounded everywhere.
        let d = (Tensor::arange(ids.numel() as i64 * WIDTH, (Kind::Float, Device::Cpu)) + comm.rank() as f64) / 7.0;
        let _ = weight.2.as_mut().unwrap().index_add_(0, ids, &d.view([-1, WIDTH]));
        zero.leave(comm, 0, pass, vec![&mut weight]).unwrap();
    }
    assert!(zero.finish(comm, &[]).unwrap().finite);
    let sent = comm.sent().bytes() - before;
    zero.update(&[HOW]).unwrap();
    (zero.slice(0).1.theta.copy(), sent)
}

fn rows(comm: &dyn Comm, _: &Path) {
    for stage in [Stage::OptimizerState, Stage::Gradients, Stage::Parameters] {
        for wire in [Wire::F32, Wire::Bf16] {
            let (whole, dense) = slice(comm, stage, wire, false);
            let (same, sparse) = slice(comm, stage, wire, true);
            assert_eq!(whole, same, "{stage:?}, {wire:?}");
            if comm.world() > 1 {
                assert!(
                    sparse < dense / 2,
                    "{stage:?}, {wire:?}: {sparse} bytes as rows, {dense} whole"
                );
            }
        }
    }
}

fn nan(comm: &dyn Comm, _: &Path) {
    let mut zero = zero(comm, Stage::OptimizerState);
    zero.clear_gradients();
    let ids = ids(comm.rank(), 0);
    zero.choose_rows(comm, "embed", &[&ids]).unwrap();
    if comm.rank() == comm.world() - 1 {
        let _ = zero.trained(0, 0).grad.get(ROWS - 1).fill_(f64::NAN);
    }
    zero.reduce(comm, 0).unwrap();
    assert!(!zero.finish(comm, &[]).unwrap().finite);
}

/// Two micro-batches through a model of ten stages at stage 3, measured: what a rank's memory grows by, at most, is what is
/// counted. Alone nothing is divided; more than two ranks would only take longer.
fn resident(comm: &dyn Comm, _: &Path) {
    if comm.world() != 2 {
        return;
    }
    let numels: Vec<usize> = [vec![12_000_000], vec![3_000_000; 8], vec![12_000_000]].concat();
    let names: Vec<String> = (0..numels.len()).map(|stage| format!("stage {stage}")).collect();
    let specs: Vec<BucketSpec> = names
        .iter()
        .zip(&numels)
        .map(|(name, numel)| BucketSpec {
            name: name.clone(),
            params: vec![ParamSpec {
                name: name.clone(),
                shape: vec![*numel as i64],
                group: 0,
            }],
        })
        .collect();
    let before = memory("VmRSS:");
    let mut zero = Zero::new(comm, Stage::Parameters, &specs, Kind::Float, |bucket, _| {
        Tensor::ones([numels[bucket] as i64], (Kind::Float, Device::Cpu))
    })
    .unwrap();
    zero.schedule(&names.iter().map(|name| vec![name.clone()]).collect::<Vec<_>>());
    let mut weights: Vec<Weight> = names
        .iter()
        .map(|name| Weight(name.clone(), Tensor::new(), None))
        .collect();
    // Peaks of before do not count.
    std::fs::write("/proc/self/clear_refs", "5").unwrap();
    zero.clear_gradients();
    for micro in 0..2 {
        let backward = sharding::Pass::Backward { last: micro == 1 };
        let forward = (0..numels.len() - 1).map(|stage| (stage, sharding::Pass::Forward));
        let stages: Vec<_> = forward
            .chain((0..numels.len()).rev().map(|stage| (stage, backward)))
            .collect();
        for (stage, pass) in stages {
            zero.enter(comm, stage, pass, vec![&mut weights[stage]]).unwrap();
            if let Some(grad) = &mut weights[stage].2 {
                let _ = grad.g_add_scalar_(1.0);
            }
            zero.leave(comm, stage, pass, vec![&mut weights[stage]]).unwrap();
        }
    }
    zero.finish(comm, &[]).unwrap();
    zero.update(&[HOW]).unwrap();
    let grown = (memory("VmHWM:") - before) as f64;
    let all: usize = numels.iter().sum();
    let (largest, layer) = (12_000_000, 3_000_000);
    let kept = 16 * all / 2;
    // At the last stage: its parameters, those of the stage below that are on their way, and its whole gradient. What
    // `configs::memory` counts besides is allocated, but not touched before an exchange ahead of it is over.
    let passing = 4 * (largest + layer) + 4 * largest + STAGING;
    let counted = (kept + passing) as f64;
    println!("stage 3: {:.0} MB grown, {:.0} MB counted", grown / 1e6, counted / 1e6);
    assert!(
        (grown - counted).abs() < 0.05 * counted,
        "{grown} grown, {counted} counted"
    );
}

/// What MPI's exchanges pass through: two at a time, 8 MiB on each side.
const STAGING: usize = 4 * (8 << 20);

/// A line of /proc/self/status, bytes.
fn memory(line: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let found = status.lines().find_map(|text| text.strip_prefix(line)).unwrap();
    let kib: u64 = found.trim().trim_end_matches(" kB").parse().unwrap();
    kib * 1024
}
