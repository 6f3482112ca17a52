//! What ZeRO leaves must not depend on how a gradient travelled.

use std::path::Path;

use configs::Precision;
use configs::memory::{Division, STAGING_BYTES};
use sharding::adamw::AdamW;
use sharding::{BucketSpec, Comm, ParamSpec, Stage, Wire, Zero};
use tch::{Device, Kind, Tensor};

use crate::collectives::device;
use crate::mpirun::{self, Case, memory};

pub const CASES: [Case; 5] = [
    // First: what others leave to the allocator would be taken from what this one measures.
    ("stage_three_takes_the_memory_it_should", resident),
    ("rows_give_the_bits_of_whole_slices", rows),
    (
        "rows_that_follow_a_tied_head_s_part_give_the_bits_of_one_whole",
        rows_behind,
    ),
    ("rows_that_are_fetched_ahead_are_those_that_arrive", rows_ahead),
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

fn zero(comm: &dyn Comm, stage: Stage, kind: Kind, tied: bool) -> Zero {
    let specs = [BucketSpec {
        name: "embedding".into(),
        params: vec![ParamSpec {
            name: "embed".into(),
            shape: vec![ROWS, WIDTH],
            group: 0,
        }],
    }];
    let mut zero = Zero::new(comm, stage, &specs, kind, |_, _| {
        Tensor::ones([ROWS, WIDTH], (Kind::Float, device()))
    })
    .unwrap();
    // A head that reads it too, or nothing of it.
    let head = if tied { vec!["embed".into()] } else { vec![] };
    zero.schedule(&[vec!["embed".into()], head]);
    zero
}

/// Some rows, others on each rank, with doubles; the first and the last are among them.
fn ids(rank: usize, micro: usize) -> Tensor {
    let ids: Vec<i64> = (0..40)
        .map(|i| (i * i * 17 + rank as i64 * 29 + micro as i64 * 5) % ROWS)
        .collect();
    Tensor::cat(&[Tensor::from_slice(&ids), Tensor::from_slice(&[0, ROWS - 1])], 0).to_device(device())
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

/// A rank's gradients of a step, and how they travel.
#[derive(Clone, Copy)]
struct How {
    wire: Wire,
    as_rows: bool,
    tied: bool,
    /// What every element is divided by: by sevenths all are rounded, by 1 none.
    divisor: f64,
}

/// Two micro-batches' gradients, an update; this rank's slice, and the bytes that travelled for the gradient.
fn slice(comm: &dyn Comm, stage: Stage, how: How) -> (Tensor, u64) {
    let mut zero = zero(comm, stage, Kind::Float, how.tied);
    zero.reduce_in(how.wire);
    let mut weight = Weight("embed".into(), Tensor::new(), None);
    zero.bind(vec![&mut weight]);
    let batches: Vec<Tensor> = (0..2).map(|micro| ids(comm.rank(), micro)).collect();
    zero.clear_gradients();
    let before = comm.sent().bytes();
    if how.as_rows {
        zero.begin_step(comm, "embed", &batches.iter().collect::<Vec<_>>())
            .unwrap();
    }
    let numbers = |count: i64| Tensor::arange(count * WIDTH, (Kind::Float, device())).view([-1, WIDTH]);
    let share = |count: i64| (numbers(count).remainder(64.0) + comm.rank() as f64) / how.divisor;
    for (micro, ids) in batches.iter().enumerate() {
        let pass = sharding::Pass::Backward { last: micro == 1 };
        if how.tied {
            zero.enter(comm, 1, pass, vec![&mut weight]).unwrap();
            let _ = weight.2.as_mut().unwrap().g_add_(&share(ROWS));
            zero.leave(comm, 1, pass, vec![&mut weight]).unwrap();
        }
        zero.enter(comm, 0, pass, vec![&mut weight]).unwrap();
        let places = zero.embedding_ids(ids);
        let d = share(ids.numel() as i64);
        let _ = weight.2.as_mut().unwrap().index_add_(0, &places, &d);
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
            let how = |as_rows| How {
                wire,
                as_rows,
                tied: false,
                divisor: 7.0,
            };
            let (whole, dense) = slice(comm, stage, how(false));
            let (same, sparse) = slice(comm, stage, how(true));
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

fn rows_behind(comm: &dyn Comm, _: &Path) {
    let how = |as_rows, divisor| How {
        wire: Wire::F32,
        as_rows,
        tied: true,
        divisor,
    };
    for stage in Stage::ALL {
        // Whole numbers are summed exactly in any order.
        let (whole, dense) = slice(comm, stage, how(false, 1.0));
        let (same, with_rows) = slice(comm, stage, how(true, 1.0));
        assert_eq!(whole, same, "{stage:?}");
        if comm.world() > 1 {
            let more = with_rows as f64 / dense as f64;
            assert!(more > 1.0 && more < 1.3, "{stage:?}: {more} times the bytes");
        }
    }
    // Rounded ones are summed in one order, whoever keeps what; from stage 2 on it is another where there are micro-batches.
    let rounded = |stage| slice(comm, stage, how(true, 7.0)).0;
    assert_eq!(rounded(Stage::Gradients), rounded(Stage::Parameters));
    let whole = rounded(Stage::Replicated);
    let mine = rounded(Stage::OptimizerState);
    let start = comm.rank() as i64 * mine.numel() as i64;
    let length = (whole.numel() as i64 - start).min(mine.numel() as i64);
    if length > 0 {
        assert_eq!(whole.narrow(0, start, length), mine.narrow(0, 0, length));
    }
}

fn rows_ahead(comm: &dyn Comm, _: &Path) {
    for (stage, kind, tied) in [
        (Stage::OptimizerState, Kind::Float, false),
        (Stage::OptimizerState, Kind::BFloat16, true),
        (Stage::Gradients, Kind::BFloat16, false),
        (Stage::Replicated, Kind::Float, true),
    ] {
        let mut zero = zero(comm, stage, kind, tied);
        let mut weight = Weight("embed".into(), Tensor::new(), None);
        zero.bind(vec![&mut weight]);
        // As if an update had been made: every element another number.
        let (range, slice) = zero.slice_mut(0);
        for (at, element) in range.enumerate() {
            let _ = slice.theta.get(at as i64).fill_(element as f64 / 7.0);
        }
        zero.publish();
        let ids = ids(comm.rank(), 0);
        zero.begin_step(comm, "embed", &[&ids]).unwrap();
        zero.enter(comm, 0, sharding::Pass::Forward, vec![&mut weight]).unwrap();
        let expected = (Tensor::arange(ROWS * WIDTH, (Kind::Double, device())) / 7.0)
            .to_kind(Kind::Float)
            .to_kind(kind)
            .view([ROWS, WIDTH]);
        let ahead = comm.world() > 1 && stage != Stage::Replicated;
        assert_eq!(weight.1.size()[0] < ROWS, ahead, "{stage:?}: some rows only");
        let read = weight.1.index_select(0, &zero.embedding_ids(&ids));
        assert_eq!(read, expected.index_select(0, &ids), "{stage:?}, {kind:?}");
        zero.leave(comm, 0, sharding::Pass::Forward, vec![&mut weight]).unwrap();
        zero.arrived(comm).unwrap();
        assert_eq!(weight.1, expected, "{stage:?}, {kind:?}: all of it");
        assert_eq!(zero.embedding_ids(&ids), ids);
    }
}

fn nan(comm: &dyn Comm, _: &Path) {
    let mut zero = zero(comm, Stage::OptimizerState, Kind::Float, false);
    zero.clear_gradients();
    let ids = ids(comm.rank(), 0);
    zero.begin_step(comm, "embed", &[&ids]).unwrap();
    if comm.rank() == comm.world() - 1 {
        let _ = zero.trained(0, 0).grad.get(ROWS - 1).fill_(f64::NAN);
    }
    zero.reduce(comm, 0).unwrap();
    assert!(!zero.finish(comm, &[]).unwrap().finite);
}

/// Two micro-batches through a model of ten stages at stage 3, measured: what a rank's memory grows by, at most, is what is
/// planned. Alone nothing is divided; more than two ranks would only take longer; of a GPU's memory libtorch keeps what it once took.
fn resident(comm: &dyn Comm, _: &Path) {
    if comm.world() != 2 || device() != Device::Cpu {
        return;
    }
    let numels: Vec<usize> = [vec![3_000_000; 9], vec![12_000_000]].concat();
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
    mpirun::forget_peak();
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
    // Every bucket is read by a stage of its own. What MPI's exchanges pass through comes on top, two pieces on each side.
    let stages: Vec<Vec<usize>> = (0..numels.len()).map(|bucket| vec![bucket]).collect();
    let planned = Division::of(3, Precision::F32, comm.world()).of_trained(&numels, &stages);
    let counted = planned.total() as f64 + (4 * STAGING_BYTES) as f64;
    println!("stage 3: {:.0} MB grown, {:.0} MB counted", grown / 1e6, counted / 1e6);
    assert!(
        (grown - counted).abs() < 0.05 * counted,
        "{grown} grown, {counted} counted"
    );
}
