//! However training is divided among ranks, it is the same training. Starts itself under mpirun with 2, 3 and 4 ranks; each
//! job runs every case in one program and compares with one rank alone, in the same process.

mod common;
#[path = "../../sharding/tests/mpirun/mod.rs"]
mod mpirun;
#[path = "sharded/recorded.rs"]
mod recorded;
#[path = "common/relayed.rs"]
mod relayed;

use std::cell::{Cell, RefCell};
use std::path::Path;
use std::time::Duration;

use common::write_tokenizer;
use configs::planner::Block;
use configs::{FullModule, Pieces, Plan, Precision, Shape};
use corpus::{Row, RowsDigest};
use mpirun::{Case, memory};
use recorded::{Did, Record};
use relayed::Relayed;
use sharding::{BucketSpec, Comm, Mark, ParamSpec, Pass, Stage, Zero};
use tch::{Device, Kind, Tensor};
use trainer::batch::{Batch, MicroBatch};
use trainer::dispute;
use trainer::step::{Damage, Trainer};

const PIECES: usize = 97;
/// So many that those of a batch are few: rows are fetched ahead, and follow a tied head's gradient.
const MANY_PIECES: usize = 4001;
/// Divides among 1, 2, 3 and 4 ranks with 1 and 3 micro-batches each.
const ROWS: usize = 36;
const TOKENS: usize = 16;
const STEPS: u64 = 4;

/// f32 sums in another order differ in the last of 24 bits; seen after four steps: losses 2e-7, parameters 3e-6 of their
/// norm. A slice updated twice, or a gradient counted by one rank only, moves both by 1e-2 and more.
const LOSS_ROUNDING: f64 = 1e-5;
const PARAMETER_ROUNDING: f64 = 5e-5;
const NORM_ROUNDING: f64 = 1e-5;
/// Each share is rounded to 8 bits.
const BF16_LOSS: f64 = 1e-2;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    // One thread: sums inside of a rank then have one order.
    tch::set_num_threads(1);
    match &arguments[..] {
        [child, world, shared] if child == "--rank-of" => {
            mpirun::end_all_on_panic();
            let comm = sharding::join(world.parse().expect("a number of ranks")).expect("the ranks meet");
            mpirun::run(&CASES, comm.as_ref(), "MPI", Path::new(shared));
        }
        [list, ..] if list == "--list" => mpirun::list(&CASES),
        _ => {
            let folder = tempfile::tempdir().expect("a folder");
            MODELS.iter().for_each(|model| drop(plan(folder.path(), model)));
            (2..=4).for_each(|ranks| mpirun::start("--rank-of", ranks, folder.path()));
        }
    }
}

const CASES: [Case; 17] = [
    // First: what others leave to the allocator would be taken from what this one measures.
    ("a_base_is_divided_as_it_is_read", resident_at_load),
    ("every_stage_gives_the_training_of_one_rank", same_as_one_rank),
    ("ranks_sum_as_one_rank_sums_as_many_micro_batches", as_micro_batches),
    ("every_stage_clips_as_one_rank_does", clipped),
    ("every_stage_computes_with_the_same_bf16_weights", bf16_weights),
    ("bf16_gradients_give_nearly_the_same", bf16_gradients),
    ("collectives_go_on_beside_the_stages", beside_the_stages),
    ("a_slow_rank_changes_no_bit", slow_rank),
    ("deterministic_runs_agree_to_the_bit_on_many_threads", deterministic),
    ("a_nan_on_one_rank_makes_all_skip", nan_on_one_rank),
    ("a_flipped_bit_is_found_and_its_rank_named", flipped_bit),
    (
        "of_two_that_differ_the_one_that_computes_again_is_believed",
        computed_again,
    ),
    ("of_two_the_one_whose_masters_change_in_a_step_is_named", changed_within),
    ("bytes_are_at_the_lower_bound_and_rows_below_it", bytes_sent),
    ("what_a_rank_holds_is_what_was_counted", held_bytes),
    ("rows_are_read_as_the_whole_matrix_would_be", rows_read),
    ("a_rank_that_registers_other_parameters_is_refused", other_parameters),
];

/// What of a tiny model trains.
struct Model {
    name: &'static str,
    block: Block,
    pieces: usize,
    tied: bool,
    /// LoRA's targets.
    lora: &'static [&'static str],
    full: &'static [FullModule],
}

const LINEARS: [&str; 7] = [
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
];

const MODELS: [Model; 7] = [
    Model {
        name: "LoRA, embeddings and head",
        block: Block::Llama,
        pieces: MANY_PIECES,
        tied: false,
        lora: &LINEARS,
        full: &[FullModule::EmbedTokens, FullModule::LmHead],
    },
    Model {
        name: "full",
        block: Block::Llama,
        pieces: PIECES,
        tied: false,
        lora: &[],
        full: &FullModule::ALL,
    },
    Model {
        name: "full and tied",
        block: Block::Llama,
        pieces: PIECES,
        tied: true,
        lora: &[],
        full: &FullModule::ALL,
    },
    Model {
        name: "LoRA and a tied matrix of which few rows are read",
        block: Block::Llama,
        pieces: MANY_PIECES,
        tied: true,
        lora: &LINEARS,
        full: &[FullModule::EmbedTokens, FullModule::LmHead],
    },
    Model {
        name: "LoRA and norms beside a frozen tied matrix",
        block: Block::Llama,
        pieces: PIECES,
        tied: true,
        lora: &LINEARS,
        full: &[FullModule::Norms],
    },
    Model {
        name: "LoRA beside two linears in full",
        block: Block::Llama,
        pieces: PIECES,
        tied: false,
        lora: &["k_proj", "v_proj", "gate_proj"],
        full: &[FullModule::QProj, FullModule::DownProj],
    },
    Model {
        name: "all of a GPT-2",
        block: Block::Gpt2,
        pieces: PIECES,
        tied: true,
        lora: &[],
        full: &FullModule::OF_GPT2,
    },
];

/// What a run of some steps leaves: losses, gradient norms, and the master weights of every bucket.
#[derive(Debug, PartialEq)]
struct Outcome {
    losses: Vec<f64>,
    norms: Vec<f64>,
    theta: Vec<Tensor>,
}

fn same_as_one_rank(comm: &dyn Comm, shared: &Path) {
    let alone = sharding::join(1).expect("one rank");
    for model in &MODELS {
        let plan = plan(shared, model);
        let one = outcome(&plan, alone.as_ref(), (Stage::Replicated, false), 1, |_| ());
        assert!(
            one.losses[3] < one.losses[0],
            "{}: it learns: {:?}",
            model.name,
            one.losses
        );
        // Of any length; the longest once.
        let lengths: &[usize] = if model.tied && model.pieces == MANY_PIECES {
            &[1, 3, 9]
        } else {
            &[1, 3]
        };
        for accumulation in lengths.iter().copied() {
            let at = |stage, shard_frozen| outcome(&plan, comm, (stage, shard_frozen), accumulation, |_| ());
            let outcomes = Stage::ALL.map(|stage| at(stage, stage >= Stage::Gradients));
            for (stage, many) in Stage::ALL.iter().zip(&outcomes) {
                let what = format!("{}, {stage:?}, {accumulation} micro-batches", model.name);
                check_close(&one, many, &what);
            }
            // Sums over ranks are made in rank order in all of them. Stages 2 and 3 sum over ranks in every micro-batch.
            assert_eq!(outcomes[0], outcomes[1], "{}: bits of stages 0 and 1", model.name);
            assert_eq!(outcomes[2], outcomes[3], "{}: bits of stages 2 and 3", model.name);
            if accumulation == 1 {
                assert_eq!(outcomes[1], outcomes[2], "{}: bits of stages 1 and 2", model.name);
            }
            assert_eq!(
                outcomes[1],
                at(Stage::OptimizerState, true),
                "{}: frozen shards",
                model.name
            );
        }
    }
}

/// In bf16 every product is rounded before it is added, so that ranks, in their order, add what one rank adds in as many micro-batches.
/// In f32 a product is added while it is made, and of the embedding's gradient each row by itself: there bits may differ.
fn as_micro_batches(comm: &dyn Comm, shared: &Path) {
    let alone = sharding::join(1).expect("one rank");
    for model in &MODELS {
        let mut plan = plan(shared, model);
        plan.train.precision = Precision::Bf16;
        let step = |comm: &dyn Comm, stage, accumulation| {
            let (mut trainer, _) = trainer::train::build_model(&plan, comm, Device::Cpu, None, (stage, false)).unwrap();
            let before = theta(&trainer);
            let report = trainer.train_step(&batch(comm, 0, accumulation), false).unwrap();
            (report.loss, before, theta(&trainer))
        };
        let (loss, before, one) = step(alone.as_ref(), Stage::OptimizerState, comm.world());
        for stage in Stage::ALL {
            let (same, _, many) = step(comm, stage, 1);
            let what = format!("{}, {stage:?}", model.name);
            assert_eq!(loss, same, "{what}");
            assert_ne!(before[1..], one[1..], "{what}: something was learnt");
            assert_eq!(one[1..], many[1..], "{what}");
        }
    }
}

fn clipped(comm: &dyn Comm, shared: &Path) {
    let alone = sharding::join(1).expect("one rank");
    let mut plan = plan(shared, &MODELS[0]);
    let free = outcome(&plan, alone.as_ref(), (Stage::Replicated, false), 1, |_| ());
    let limit = free.norms.iter().copied().fold(f64::INFINITY, f64::min) / 10.0;
    plan.optimizer.max_grad_norm = Some(limit);
    let one = outcome(&plan, alone.as_ref(), (Stage::Replicated, false), 1, |_| ());
    assert_ne!(
        free.losses, one.losses,
        "norms of {:?} are clipped to {limit}",
        free.norms
    );
    for stage in Stage::ALL {
        let many = outcome(&plan, comm, (stage, stage == Stage::Parameters), 3, |_| ());
        check_close(&one, &many, &format!("clipped to {limit}, {stage:?}"));
    }
}

/// What a step computes with is another tensor than what is updated: published late, or an older one, and stages would differ.
fn bf16_weights(comm: &dyn Comm, shared: &Path) {
    let alone = sharding::join(1).expect("one rank");
    for model in &MODELS {
        let mut plan = plan(shared, model);
        let in_f32 = outcome(&plan, alone.as_ref(), (Stage::OptimizerState, false), 1, |_| ());
        plan.train.precision = Precision::Bf16;
        let one = outcome(&plan, alone.as_ref(), (Stage::OptimizerState, false), 1, |_| ());
        assert_ne!(in_f32.losses, one.losses, "{}: something was rounded", model.name);
        let many = Stage::ALL.map(|stage| outcome(&plan, comm, (stage, stage >= Stage::Gradients), 1, |_| ()));
        for (step, (one, many)) in one.losses.iter().zip(&many[0].losses).enumerate() {
            assert!(
                (one - many).abs() < BF16_LOSS,
                "{}, step {step}: {one} by one rank, {many} by several",
                model.name
            );
        }
        for (stage, each) in Stage::ALL.iter().zip(&many) {
            assert_eq!(&many[0], each, "{}: bits of stage 0 and {stage:?}", model.name);
        }
    }
}

fn bf16_gradients(comm: &dyn Comm, shared: &Path) {
    let alone = sharding::join(1).expect("one rank");
    let mut plan = plan(shared, &MODELS[0]);
    let one = outcome(&plan, alone.as_ref(), (Stage::OptimizerState, false), 1, |_| ());
    plan.train.reduce = Precision::Bf16;
    for stage in Stage::ALL {
        let many = outcome(&plan, comm, (stage, false), 3, |_| ());
        for (step, (one, many)) in one.losses.iter().zip(&many.losses).enumerate() {
            assert!(
                (one - many).abs() < BF16_LOSS,
                "{stage:?}, step {step}: {one}, in bf16 {many}"
            );
        }
        assert_ne!(one.norms, many.norms, "{stage:?}: something was rounded");
    }
}

/// What already holds on CPUs, with libtorch's promise besides: neither timing nor threads that race change a bit.
fn deterministic(comm: &dyn Comm, shared: &Path) {
    sharding::cuda::use_deterministic_algorithms();
    assert!(sharding::cuda::algorithms_are_deterministic());
    tch::set_num_threads(3);
    for (model, stage) in [(&MODELS[0], Stage::OptimizerState), (&MODELS[3], Stage::Parameters)] {
        let plan = plan(shared, model);
        let run = |late: usize| {
            outcome(&plan, comm, (stage, true), 3, |trainer| {
                if comm.rank() == (late + trainer.step as usize) % comm.world() {
                    std::thread::sleep(Duration::from_millis(20));
                }
            })
        };
        assert_eq!(run(0), run(1), "{}, {stage:?}", model.name);
    }
    tch::set_num_threads(1);
}

/// At stage 3 a rank keeps its slices of a base, and holds a stage of it at a time on the way: measured. Alone nothing is
/// divided; more than two ranks would only take longer.
fn resident_at_load(comm: &dyn Comm, shared: &Path) {
    if comm.world() != 2 {
        return;
    }
    let mut plan = plan(shared, &MODELS[1]);
    let configs::Model::Scratch { shape, .. } = &mut plan.model else {
        unreachable!("a model from scratch");
    };
    (shape.hidden_size, shape.intermediate_size, shape.num_hidden_layers) = (512, 1408, 12);
    plan.folders.base_model = shared.join("large");
    if comm.rank() == 0 {
        trainer::scratch::init(&plan, &plan.folders.base_model).unwrap();
    }
    comm.barrier().unwrap();
    for frozen in [false, true] {
        if frozen {
            plan.train.full = vec![FullModule::Norms];
        }
        let before = memory("VmRSS:");
        mpirun::forget_peak();
        let (trainer, _) =
            trainer::train::build_model(&plan, comm, Device::Cpu, None, (Stage::Parameters, true)).unwrap();
        let [resident, peak] = ["VmRSS:", "VmHWM:"].map(|line| memory(line).saturating_sub(before) as f64);
        let counted = trainer.zero.held_bytes().iter().sum::<u64>() as f64;
        // Two heads of four have keys and values of their own.
        let layer = 4.0 * (3 * 512 * 512 + 3 * 512 * 1408) as f64;
        let mb = |bytes: f64| (bytes / 1e6).round();
        let (body, resident_mb) = (if frozen { "frozen" } else { "trained" }, mb(resident));
        println!(
            "{body} at stage 3: {resident_mb} MB resident, {} at most, {} counted",
            mb(peak),
            mb(counted)
        );
        let slack = 0.05 * counted;
        assert!(
            (resident - counted).abs() < slack,
            "{resident} resident, {counted} counted"
        );
        // A layer as it is stored and mapped, and one of its matrices in another form.
        assert!(
            peak < counted + 2.5 * layer + slack,
            "{peak} at most, {counted} counted"
        );
    }
}

/// What is exchanged is started as soon as it can be, and awaited where it is read.
fn beside_the_stages(comm: &dyn Comm, shared: &Path) {
    let plan = plan(shared, &MODELS[1]);
    let record = Record::default();
    let comm = record.of(comm);
    let of_step = |stage| {
        let (mut trainer, _) =
            trainer::train::build_model(&plan, &comm, Device::Cpu, None, (stage, stage >= Stage::Gradients)).unwrap();
        trainer.train_step(&batch(&comm, 0, 1), false).unwrap();
        record.take();
        trainer.train_step(&batch(&comm, 1, 1), false).unwrap();
        record.take()
    };
    let (forward, backward) = (|stage| Mark::Forward { stage }, |stage| Mark::Backward { stage });
    // Where a stage begins and where the next does.
    let during = |log: &[Did], mark: Mark| {
        let begins = log.iter().position(|did| *did == Did::At(mark)).expect("it was there") + 1;
        let lasts = log[begins..].iter().position(|did| matches!(did, Did::At(_)));
        begins..begins + lasts.expect("another follows")
    };
    let count = |log: &[Did], what: Did| log.iter().filter(|did| **did == what).count();

    for stage in Stage::ALL {
        let log = of_step(stage);
        // The embedding's may travel as rows.
        for mark in [3, 2, 1].map(backward) {
            let starts = count(&log[during(&log, mark)], Did::StartReducing);
            assert!(starts > 0, "{stage:?}: no reduction starts after {mark:?}: {log:?}");
        }
        let awaited = log.iter().position(|did| *did == Did::AwaitReduced);
        let awaited = awaited.expect("whoever updates has waited");
        if stage < Stage::Gradients {
            let started = log.iter().rposition(|did| *did == Did::StartReducing);
            assert!(
                Some(awaited) > started,
                "{stage:?}: backward waits for reductions: {log:?}"
            );
        } else {
            // Two stages' whole gradients are there at a time.
            let started = count(&log[..awaited], Did::StartReducing);
            assert!(
                started > 1,
                "{stage:?}: each stage waits for its own reduction: {log:?}"
            );
        }
    }

    // Embedding, two layers, head, whose backward follows its forward at once.
    let reading = [forward(0), forward(1), forward(2), backward(3)];
    let log = of_step(Stage::OptimizerState);
    for mark in reading {
        let awaited = count(&log[during(&log, mark)], Did::AwaitGathered);
        assert!(
            awaited > 0,
            "its parameters are awaited at {mark:?}, and not before: {log:?}"
        );
    }
    let log = of_step(Stage::Parameters);
    for mark in &reading[..3] {
        let did = during(&log, *mark);
        let waits = log[did.clone()].iter().position(|did| *did == Did::AwaitGathered);
        let before = &log[..did.start + waits.unwrap_or_else(|| panic!("{mark:?} waits for its parameters: {log:?}"))];
        assert!(
            count(before, Did::StartGathering) > count(before, Did::AwaitGathered) + 1,
            "the next stage's are on their way when {mark:?} waits: {log:?}"
        );
    }
}

fn slow_rank(comm: &dyn Comm, shared: &Path) {
    let plan = plan(shared, &MODELS[0]);
    for stage in [Stage::OptimizerState, Stage::Parameters] {
        let plain = outcome(&plan, comm, (stage, true), 1, |_| ());
        let late = outcome(&plan, comm, (stage, true), 1, |trainer| {
            if trainer.step as usize % comm.world() == comm.rank() {
                std::thread::sleep(Duration::from_millis(50));
            }
        });
        assert_eq!(plain, late, "{stage:?}");
    }
}

fn nan_on_one_rank(comm: &dyn Comm, shared: &Path) {
    let plan = plan(shared, &MODELS[1]);
    for stage in Stage::ALL {
        let (mut trainer, _) = trainer::train::build_model(&plan, comm, Device::Cpu, None, (stage, false)).unwrap();
        if comm.rank() == comm.world() - 1 {
            let _ = match stage {
                // Its slice is all that a rank has of its own.
                Stage::Parameters => trainer.zero.slice_mut(1).1.theta.get(0).fill_(f64::NAN),
                _ => trainer.model.embedding.value.get(0).fill_(f64::NAN),
            };
        }
        let before = theta(&trainer);
        let report = trainer.train_step(&batch(comm, 0, 1), false).unwrap();
        assert!(!report.verdict.finite, "{stage:?}, rank {}", comm.rank());
        assert_eq!((trainer.zero.updates, trainer.step), (0, 1));
        // NaN is unlike itself; its bits are not.
        let bits = |theta: Vec<Tensor>| -> Vec<Tensor> { theta.iter().map(|x| x.view_dtype(Kind::Int)).collect() };
        assert_eq!(bits(theta(&trainer)), bits(before), "{stage:?}: no rank moved");
    }
}

fn other_parameters(comm: &dyn Comm, shared: &Path) {
    let mut plan = plan(shared, &MODELS[0]);
    if comm.rank() == 1 {
        plan.train.full = vec![FullModule::EmbedTokens];
    }
    let refused = trainer::train::build_model(&plan, comm, Device::Cpu, None, (Stage::OptimizerState, false))
        .err()
        .unwrap();
    let said = format!("{refused:#}");
    assert!(
        said.contains("ranks [1] registered other parameters than rank 0"),
        "{said}"
    );
    assert!(
        said.contains("only rank 0 has:\n    head lm_head.weight [4001, 32] 2"),
        "{said}"
    );
    assert!(
        said.contains("only rank 1 has:\n    nothing that the other lacks"),
        "{said}"
    );

    let spec = |name: &str| BucketSpec {
        name: "both".into(),
        params: vec![ParamSpec {
            name: name.into(),
            shape: vec![4],
            group: 0,
        }],
    };
    let mut specs = ["a", "b", "c"].map(spec);
    if comm.rank() == 1 {
        specs.swap(1, 2);
    }
    let values = |_, _| Tensor::zeros([4], (Kind::Float, Device::Cpu));
    let refused = Zero::new(comm, Stage::Gradients, &specs, Kind::Float, values)
        .err()
        .unwrap();
    let said = refused.to_string();
    assert!(
        said.contains("only rank 0 has:\n    the same in another order: number 2 is both b [4] 0")
            && said.contains("only rank 1 has:\n    the same in another order: number 2 is both c [4] 0"),
        "{said}"
    );
}

/// The lowest bit of one element's 24.
fn flip(mut element: Tensor) {
    let number = element.double_value(&[]) as f32;
    let _ = element.fill_(f64::from(f32::from_bits(number.to_bits() ^ 1)));
}

fn computed_again(comm: &dyn Comm, shared: &Path) {
    // What is computed with in bf16 does not show the bit.
    for precision in [Precision::F32, Precision::Bf16] {
        let mut plan = plan(shared, &MODELS[1]);
        plan.train.check_ranks_every = 3;
        plan.train.precision = precision;
        let node = format!("n{}", comm.rank());
        // Until ranks are compared in the sixth step. A master weight is changed before the fourth, and published.
        let run = |steps: u64, victim: Option<usize>| {
            let shards = (Stage::Replicated, false);
            let (mut trainer, _) = trainer::train::build_model(&plan, comm, Device::Cpu, None, shards).unwrap();
            let mut last = None;
            for step in 0..steps {
                if step == 3 && victim == Some(comm.rank()) {
                    flip(trainer.zero.slice_mut(1).1.theta.get(7));
                }
                last = Some(trainer.train_step(&batch(comm, step, 1), false).unwrap());
            }
            (trainer, last.unwrap())
        };
        for victim in [0, 1] {
            let (trainer, report) = run(6, Some(victim));
            let damaged: Vec<usize> = report.damaged.iter().map(|damage| damage.rank).collect();
            let dispute = dispute::shown(&trainer, &report, &node).unwrap();
            if comm.world() > 2 {
                assert_eq!((dispute, damaged), (None, vec![victim]), "{precision:?}: most agree");
                continue;
            }
            assert_eq!(damaged, [0, 1], "{precision:?}: {:?}", report.damaged);
            let dispute = dispute.unwrap();
            assert_eq!(dispute.step, 3, "{precision:?}");
            assert_eq!(dispute::settled(&dispute, &run(3, None).0), None);
            let said = dispute::settled(&dispute, &run(4, None).0).unwrap();
            let expected = format!(
                "those of rank {} on n{0}, so rank {victim} on n{victim} was damaged",
                1 - victim
            );
            assert!(said.contains(&expected), "{precision:?}: {said}");
        }
    }
}

fn changed_within(comm: &dyn Comm, shared: &Path) {
    if comm.world() != 2 {
        return;
    }
    let mut plan = plan(shared, &MODELS[1]);
    plan.train.check_ranks_every = 3;
    for precision in [Precision::F32, Precision::Bf16] {
        plan.train.precision = precision;
        for victim in [0, 1] {
            let (theta, step) = (RefCell::new(Tensor::new()), Cell::new(0));
            let during = |mark| {
                if step.get() == 5 && mark == (Mark::Backward { stage: 1 }) && comm.rank() == victim {
                    flip(theta.borrow().get(7));
                }
            };
            let comm = Relayed::new(comm, |_, _, pending| Ok(pending), during);
            let shards = (Stage::Replicated, false);
            let (mut trainer, _) = trainer::train::build_model(&plan, &comm, Device::Cpu, None, shards).unwrap();
            *theta.borrow_mut() = trainer.zero.slice(1).1.theta.shallow_clone();
            let mut found = Vec::new();
            for number in 0..6 {
                step.set(number);
                found.extend(trainer.train_step(&batch(&comm, number, 1), false).unwrap().damaged);
            }
            let damage = Damage {
                rank: victim,
                what: "its master weights changed in the step, while nothing wrote them",
                sound: 2,
            };
            assert_eq!(found, [damage], "{precision:?}");
        }
    }
}

fn flipped_bit(comm: &dyn Comm, shared: &Path) {
    let victim = comm.world() - 1;
    let flip = |value: &Tensor| flip(value.get(3).get(5));
    let found = |trainer: &mut Trainer, step| trainer.train_step(&batch(comm, step, 1), false).unwrap().damaged;
    let mut plan_of_all = plan(shared, &MODELS[1]);
    plan_of_all.train.check_ranks_every = 1;
    for stage in [Stage::Replicated, Stage::OptimizerState, Stage::Gradients] {
        let (mut trainer, _) =
            trainer::train::build_model(&plan_of_all, comm, Device::Cpu, None, (stage, false)).unwrap();
        assert_eq!(found(&mut trainer, 0), [], "{stage:?}");
        // While a step computes with it: what is not there yet is written over.
        trainer.zero.arrived(comm).unwrap();
        if comm.rank() == victim {
            flip(&trainer.model.layers[1].o.weight_oi.value);
        }
        let found = found(&mut trainer, 1);
        assert_eq!(found.len(), 1, "{stage:?}: {found:?}");
        assert_eq!((found[0].rank, found[0].sound), (victim, 0), "{stage:?}: {found:?}");
    }
    let mut plan_of_lora = plan(shared, &MODELS[0]);
    plan_of_lora.train.check_ranks_every = 1;
    for stage in [Stage::OptimizerState, Stage::Parameters] {
        let (mut trainer, _) =
            trainer::train::build_model(&plan_of_lora, comm, Device::Cpu, None, (stage, false)).unwrap();
        assert_eq!(found(&mut trainer, 0), [], "{stage:?}");
        if comm.rank() == victim {
            let frozen = &mut trainer.model.layers[1].o.weight_oi.value;
            *frozen = frozen.copy();
            flip(frozen);
        }
        // Embedding, two layers, head: one a step; this one has not been looked at since it was loaded.
        let found: Vec<_> = (1..5).flat_map(|step| found(&mut trainer, step)).collect();
        let damage = Damage {
            rank: victim,
            what: "its frozen weights are not what it loaded",
            sound: 0,
        };
        assert_eq!(found, [damage], "{stage:?}");
    }
}

fn bytes_sent(comm: &dyn Comm, shared: &Path) {
    for model in &MODELS {
        let plan = plan(shared, model);
        for stage in Stage::ALL {
            for accumulation in [1, 3] {
                let shard_frozen = stage == Stage::Parameters;
                let (mut trainer, _) =
                    trainer::train::build_model(&plan, comm, Device::Cpu, None, (stage, shard_frozen)).unwrap();
                let batch = batch(comm, 0, accumulation);
                trainer.train_step(&batch, false).unwrap();
                trainer.zero.arrived(comm).unwrap();
                let before = comm.sent().bytes();
                trainer.train_step(&batch, false).unwrap();
                trainer.zero.arrived(comm).unwrap();
                let sent = (comm.sent().bytes() - before) as f64;
                let least = trainer.zero.least_bytes(comm, accumulation) as f64;
                let what = format!(
                    "{}, {stage:?}, {accumulation}: {sent} bytes, at least {least}",
                    model.name
                );
                // These buckets are tiny: slices are padded to 16 elements, and a few numbers travel besides.
                assert!(sent < 1.05 * least + 2500.0 * accumulation as f64, "{what}");
                // Of few pieces all rows are touched in one micro-batch; of many few are.
                assert!(sent > 0.5 * least, "{what}");
            }
        }
    }
}

fn held_bytes(comm: &dyn Comm, shared: &Path) {
    held_by(comm, shared);
    if comm.world() == 2 {
        held_by(sharding::join(1).expect("one rank").as_ref(), shared);
    }
}

fn held_by(comm: &dyn Comm, shared: &Path) {
    for model in &MODELS {
        for precision in [Precision::F32, Precision::Bf16] {
            let mut plan = plan(shared, model);
            plan.train.precision = precision;
            for (zero, stage) in Stage::ALL.into_iter().enumerate() {
                let (mut trainer, _) =
                    trainer::train::build_model(&plan, comm, Device::Cpu, None, (stage, false)).unwrap();
                let check = |trainer: &Trainer, rows: usize| {
                    let buckets = &trainer.zero.layout().buckets;
                    let numels: Vec<usize> = buckets.iter().map(|bucket| bucket.numel).collect();
                    // Every bucket trains in a stage of its own, but that the tied matrix is read by the head too; what
                    // passes is gone between steps.
                    let stages: Vec<Vec<usize>> = (0..numels.len()).map(|bucket| vec![bucket]).collect();
                    let division = configs::memory::Division {
                        zero: zero as u8,
                        world: comm.world(),
                        width: if precision == Precision::F32 { 4 } else { 2 },
                    };
                    let counted = division.of_trained(&numels, &stages);
                    let what = format!("{}, {stage:?}, {precision:?}", model.name);
                    let mut counted = [counted.parameters, counted.gradients, counted.optimizer];
                    // Of the embedding and its gradient one rank keeps the rows that a step named.
                    if configs::memory::named_rows(&trainer.model.sizes(), &plan.train, &division).is_some() {
                        let unnamed = (buckets[0].padded - rows * trainer.model.sizes().hidden) as u64;
                        if precision == Precision::Bf16 {
                            counted[0] -= 2 * unnamed;
                        }
                        counted[1] -= 4 * unnamed;
                    }
                    assert_eq!(trainer.zero.held_bytes(), counted, "{what}");
                };
                check(&trainer, 0);
                let batch = batch(comm, 0, 3);
                trainer.train_step(&batch, false).unwrap();
                let ids = batch.micro_batches.iter().map(|micro| micro.ids_bt.view([-1]));
                let (named, ..) = Tensor::cat(&ids.collect::<Vec<_>>(), 0).unique_dim(0, true, false, false);
                check(&trainer, named.numel());
            }
        }
    }
}

/// One rank in bf16 has no copy of the embedding; only then are ranks alone.
fn rows_read(comm: &dyn Comm, shared: &Path) {
    if comm.world() != 2 {
        return;
    }
    let alone = sharding::join(1).expect("one rank");
    let mut plan = plan(shared, &MODELS[0]);
    plan.train.precision = Precision::Bf16;
    for accumulation in [1, 3] {
        let run = |whole_from: u64| {
            let (comm, shards) = (alone.as_ref(), (Stage::OptimizerState, false));
            let (mut trainer, _) = trainer::train::build_model(&plan, comm, Device::Cpu, None, shards).unwrap();
            let (mut losses, mut read) = (Vec::new(), Vec::new());
            for step in 0..STEPS {
                assert_eq!(trainer.zero.params(0).is_some(), step > whole_from);
                if step == whole_from {
                    trainer.make_whole().unwrap();
                }
                let batch = batch(comm, step, accumulation);
                losses.push(trainer.train_step(&batch, false).unwrap().loss);
                // Between steps, as held-out text is measured.
                let (zero, model, ids) = (&mut trainer.zero, &mut trainer.model, &batch.micro_batches[0].ids_bt);
                zero.begin_reading(comm, &model.embedding.name, ids).unwrap();
                zero.enter(comm, 0, Pass::Forward, vec![&mut model.embedding]).unwrap();
                read.push(model.embed(&zero.embedding_ids(ids)));
                zero.leave(comm, 0, Pass::Forward, vec![&mut model.embedding]).unwrap();
            }
            (losses, read, theta(&trainer))
        };
        let rows = run(STEPS);
        assert_eq!(run(0), rows, "{accumulation} micro-batches, the matrix whole");
        assert_eq!(run(2), rows, "{accumulation} micro-batches, whole from the third step");
    }
}

/// Some steps of training; `before` is called before each.
fn outcome(
    plan: &Plan,
    comm: &dyn Comm,
    shards: (Stage, bool),
    accumulation: usize,
    mut before: impl FnMut(&Trainer),
) -> Outcome {
    let (mut trainer, _) = trainer::train::build_model(plan, comm, Device::Cpu, None, shards).unwrap();
    let (mut losses, mut norms) = (Vec::new(), Vec::new());
    for step in 0..STEPS {
        before(&trainer);
        let report = trainer.train_step(&batch(comm, step, accumulation), false).unwrap();
        losses.push(report.loss);
        norms.push(report.verdict.grad_norm);
    }
    Outcome {
        losses,
        norms,
        theta: theta(&trainer),
    }
}

/// Every bucket's master weights, gathered from the ranks' slices.
fn theta(trainer: &Trainer) -> Vec<Tensor> {
    let layout = trainer.zero.layout();
    let whole = |(index, bucket): (usize, &sharding::layout::Bucket)| {
        let (_, slice) = trainer.zero.slice(index);
        let mut full = Tensor::zeros([bucket.padded as i64], (Kind::Float, tch::Device::Cpu));
        if layout.n_slices == 1 {
            full.copy_(&slice.theta);
        } else {
            trainer
                .comm
                .all_gather(&slice.theta, &mut full)
                .unwrap()
                .wait()
                .unwrap();
        }
        full.narrow(0, 0, bucket.numel as i64).copy()
    };
    layout.buckets.iter().enumerate().map(whole).collect()
}

fn check_close(one: &Outcome, many: &Outcome, what: &str) {
    for (step, (a, b)) in one.losses.iter().zip(&many.losses).enumerate() {
        assert!(
            (a - b).abs() < LOSS_ROUNDING,
            "{what}, step {step}: {a} on one rank, {b} here"
        );
    }
    for (step, (a, b)) in one.norms.iter().zip(&many.norms).enumerate() {
        assert!(
            (a / b - 1.0).abs() < NORM_ROUNDING,
            "{what}, step {step}: a gradient of {a} on one rank, of {b} here"
        );
    }
    for (bucket, (a, b)) in one.theta.iter().zip(&many.theta).enumerate() {
        let norm = |x: &Tensor| x.to_kind(Kind::Double).norm().double_value(&[]);
        let difference = norm(&(a - b)) / norm(a);
        assert!(
            difference < PARAMETER_ROUNDING,
            "{what}: bucket {bucket} differs by {difference:.1e}"
        );
    }
}

/// This rank's part of a step's global batch. Rows have targets left out, as many in each as its number says.
fn batch(comm: &dyn Comm, step: u64, accumulation: usize) -> Batch {
    let mine = ROWS / comm.world();
    let first = step as usize * ROWS + comm.rank() * mine;
    let rows: Vec<Row> = (first..first + mine).map(row).collect();
    let numbers: Vec<u64> = (first as u64..).take(mine).collect();
    let micro_rows = mine / accumulation;
    let parts = numbers.chunks(micro_rows).zip(rows.chunks(micro_rows));
    Batch {
        micro_batches: parts.map(|(numbers, rows)| MicroBatch::new(numbers, rows)).collect(),
        n_targets: rows.iter().map(Row::n_targets).sum(),
        digest: RowsDigest::default(),
    }
}

fn row(number: usize) -> Row {
    let token = |at: usize| ((number * 13 + at * at * 7 + at * (number % 5)) % PIECES) as i64;
    Row {
        part: 0,
        tokens: (0..TOKENS).map(token).collect(),
        is_target: (0..TOKENS).map(|at| at > number % 4).collect(),
        document_starts: vec![0],
    }
}

/// Two layers, grouped heads.
fn plan(root: &Path, model: &Model) -> Plan {
    let recipe = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs/tiny.yaml");
    let mut plan = configs::load(&recipe, &[]).unwrap();
    let pieces = root.join(format!("{} pieces", model.pieces));
    if !pieces.exists() {
        write_tokenizer(&pieces, model.pieces);
    }
    plan.model = configs::Model::Scratch {
        shape: Shape {
            hidden_size: 32,
            intermediate_size: 48,
            num_hidden_layers: 2,
            num_attention_heads: 4,
            max_position_embeddings: 64,
            tie_word_embeddings: model.tied,
            family: match model.block {
                Block::Llama => configs::Family::Llama {
                    num_key_value_heads: 2,
                    rms_norm_eps: 1e-5,
                    rope_theta: 10_000.0,
                },
                Block::Gpt2 => configs::Family::Gpt2 {
                    layer_norm_epsilon: 1e-5,
                    activation_function: configs::Gelu::Tanh,
                },
            },
        },
        init_std: 0.2,
        tokenizer: Pieces::Folder { path: pieces },
    };
    plan.vocabulary = None;
    plan.train.full = model.full.to_vec();
    if model.lora.is_empty() {
        plan.train.lora = None;
    } else if let Some(lora) = &mut plan.train.lora {
        lora.targets = model.lora.iter().copied().map(String::from).collect();
    }
    plan.train.sequence_length = TOKENS;
    plan.train.steps = STEPS;
    // The norm is summed slice by slice: clipping would carry its rounding into every bit.
    plan.optimizer.max_grad_norm = None;
    plan.optimizer.warmup_steps = 0;
    // Above the rounding of a gradient, so that AdamW does not divide rounding by itself.
    plan.optimizer.epsilon = 1e-4;
    let rates = configs::Rates {
        lr: 1e-2,
        weight_decay: 0.01,
    };
    plan.optimizer.groups = configs::Group::ALL.map(|group| (group, rates)).into();
    let tied = if model.tied { "tied" } else { "untied" };
    plan.folders.base_model = root.join(format!("{:?} {tied} {}", model.block, model.pieces));
    if !plan.folders.base_model.exists() {
        trainer::scratch::init(&plan, &plan.folders.base_model).unwrap();
    }
    plan
}
