//! What the planner counts beforehand is what training takes: registered elements, bytes handed to collectives, memory held, and
//! resident memory at its fullest. Starts itself under mpirun with 2, 3 and 4 ranks, and runs every case on one rank too.

mod common;
#[path = "../../sharding/tests/mpirun/mod.rs"]
mod mpirun;
#[path = "common/relayed.rs"]
mod relayed;

use std::cell::Cell;
use std::path::Path;

use common::write_tokenizer;
use configs::planner::{Besides, Block, Budget, Division, Sizes, Traffic};
use configs::{FullModule, Gelu, Lora, Mix, Pieces, Plan, Precision, Recompute, Shape};
use corpus::{Row, RowsDigest};
use mpirun::{Case, memory};
use relayed::{Call, Relayed};
use sharding::{Comm, Pending, Stage};
use tch::Device;
use trainer::batch::{Batch, MicroBatch};
use trainer::step::Trainer;

/// What a rank's resident memory at its fullest may differ from the plan's, as a share of the plan. glibc gives back what is freed
/// here; where it may keep it, as in runs, for speed, more is resident than is held.
const PEAK: f64 = 0.05;

const CASES: [Case; 2] = [
    ("elements_and_state_are_those_that_the_trainer_registers", elements),
    ("bytes_sent_are_those_that_were_planned", bytes),
];

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    tch::set_num_threads(1);
    match &arguments[..] {
        [child, world, shared] if child == "--rank-of" || child.starts_with(MEASURE) => {
            mpirun::end_all_on_panic();
            let comm = sharding::join(world.parse().expect("a number of ranks")).expect("the ranks meet");
            match child.strip_prefix(MEASURE) {
                Some(setting) => resident(comm.as_ref(), Path::new(shared), setting),
                None => mpirun::run(&CASES, comm.as_ref(), "MPI", Path::new(shared)),
            }
        }
        [list, ..] if list == "--list" => {
            mpirun::list(&CASES);
            println!("{RESIDENT}: test");
        }
        chosen => {
            let wanted = |name: &str| chosen.iter().all(|part| name.contains(part.as_str()));
            let folder = tempfile::tempdir().expect("a folder");
            write_tokenizer(&folder.path().join("pieces"), PIECES);
            for model in MODELS.iter().chain([&LARGE, &LARGE_GPT2]) {
                let plan = plan(folder.path(), model);
                trainer::scratch::init(&plan, &plan.folders.base_model).expect("a model");
            }
            if CASES.iter().any(|(name, _)| wanted(name)) {
                (1..=4).for_each(|ranks| mpirun::start("--rank-of", ranks, folder.path()));
            }
            if wanted(RESIDENT) {
                for (ranks, setting) in MEASURED {
                    mpirun::start(&format!("{MEASURE}{setting}"), ranks, folder.path());
                }
                println!("test {RESIDENT} ... ok");
            }
        }
    }
}

const RESIDENT: &str = "resident_memory_is_what_was_planned";
/// What a job begins with that measures one of the settings, whose number follows.
const MEASURE: &str = "--resident-in-setting-";

/// What is made and what of it trains.
struct Model {
    name: &'static str,
    block: Block,
    tied: bool,
    hidden: usize,
    layers: usize,
    lora: bool,
    full: &'static [FullModule],
}

const TINY: Model = Model {
    name: "LoRA, embeddings and head",
    block: Block::Llama,
    tied: false,
    hidden: 32,
    layers: 2,
    lora: true,
    full: &[FullModule::EmbedTokens, FullModule::LmHead],
};

const MODELS: [Model; 7] = [
    TINY,
    Model {
        name: "all of it",
        lora: false,
        full: &FullModule::OF_LLAMA,
        ..TINY
    },
    Model {
        name: "all of it, tied",
        tied: true,
        lora: false,
        full: &FullModule::OF_LLAMA,
        ..TINY
    },
    Model {
        name: "LoRA and norms beside a frozen tied matrix",
        tied: true,
        full: &[FullModule::Norms],
        ..TINY
    },
    Model {
        name: "the head alone",
        lora: false,
        full: &[FullModule::LmHead],
        ..TINY
    },
    Model {
        name: "all of a GPT-2",
        block: Block::Gpt2,
        tied: true,
        lora: false,
        full: &FullModule::OF_GPT2,
        ..TINY
    },
    Model {
        name: "positions and one linear of a GPT-2",
        block: Block::Gpt2,
        tied: true,
        lora: false,
        full: &[FullModule::Positions, FullModule::CFc],
        ..TINY
    },
];

/// Large enough for megabytes to say something.
const LARGE: Model = Model {
    name: "large",
    hidden: 256,
    layers: 6,
    ..TINY
};
const LARGE_GPT2: Model = Model {
    name: "large GPT-2",
    block: Block::Gpt2,
    tied: true,
    hidden: 256,
    layers: 6,
    lora: false,
    full: &FullModule::OF_GPT2,
};

const PIECES: usize = 4099;
const ROWS: usize = 24;

fn build<'a>(plan: &'a Plan, comm: &'a dyn Comm, stage: Stage, shard_frozen: bool) -> Trainer<'a> {
    let shards = (stage, shard_frozen);
    let (trainer, _) = trainer::train::build_model(plan, comm, Device::Cpu, None, shards).expect("a model");
    trainer
}

fn division(plan: &Plan, comm: &dyn Comm, zero: u8) -> Division {
    Division::of(zero, plan.train.precision, comm.world())
}

/// One rank has nobody to share with.
fn stages(comm: &dyn Comm) -> impl Iterator<Item = (u8, Stage)> {
    let most = if comm.world() == 1 { 2 } else { 4 };
    (0..).zip(Stage::ALL).take(most)
}

fn elements(comm: &dyn Comm, shared: &Path) {
    for model in &MODELS {
        for precision in [Precision::F32, Precision::Bf16] {
            let mut plan = plan(shared, model);
            plan.train.precision = precision;
            for (zero, stage) in stages(comm) {
                let trainer = build(&plan, comm, stage, false);
                let what = format!("{}, {stage:?}, {precision:?}", model.name);
                let sizes = trainer.model.sizes();
                assert_eq!(
                    sizes,
                    Sizes::of(shape(&plan), PIECES),
                    "{what}: from files, and from the config"
                );
                let [trained, frozen] = sizes.buckets(plan.train.lora.as_ref(), &plan.train.full);
                let registered: Vec<usize> = trainer
                    .zero
                    .layout()
                    .buckets
                    .iter()
                    .map(|bucket| bucket.numel)
                    .collect();
                assert_eq!(trained.numels, registered, "{what}");
                let all = sizes.parameters_of(&plan);
                let frozen: usize = frozen.numels.iter().sum();
                assert_eq!(all.total - all.trainable, frozen as u64, "{what}");

                let budget = Budget::new(
                    &sizes,
                    &plan.train,
                    &division(&plan, comm, zero),
                    false,
                    Besides::default(),
                );
                let planned = budget.with(&Mix::default());
                let [parameters, gradients, optimizer] = trainer.zero.held_bytes();
                let frozen = (frozen * precision.bytes()) as u64;
                // Of an embedding kept as rows the plan has those that a step may name; here no step has named any.
                if comm.world() > 1 || model.tied {
                    assert_eq!(planned.gradients, gradients, "{what}");
                    assert_eq!(planned.weights, frozen + parameters, "{what}");
                }
                assert_eq!(planned.optimizer, optimizer, "{what}");
            }
        }
    }
}

fn bytes(comm: &dyn Comm, shared: &Path) {
    for model in &MODELS {
        for (precision, reduce) in [(Precision::F32, Precision::F32), (Precision::Bf16, Precision::Bf16)] {
            let mut plan = plan(shared, model);
            (plan.train.precision, plan.train.reduce) = (precision, reduce);
            for (zero, stage) in stages(comm) {
                for (accumulation, shard_frozen) in [(1, false), (3, true)] {
                    let mut trainer = build(&plan, comm, stage, shard_frozen);
                    let sizes = trainer.model.sizes();
                    let division = division(&plan, comm, zero);
                    let planned = Traffic::of(&sizes, &plan.train, &division, shard_frozen, accumulation);
                    let batch = batch(comm, accumulation, 16);
                    for step in 0..3 {
                        let before = comm.sent().bytes();
                        trainer.train_step(&batch, false).expect("a step");
                        let sent = comm.sent().bytes() - before;
                        if step == 0 {
                            // A step publishes what the one before has updated.
                            continue;
                        }
                        let what = format!(
                            "{}, {stage:?}, {accumulation} micro-batches, step {step}: {sent} bytes, planned {planned:?}",
                            model.name
                        );
                        if planned.rows_may_travel && comm.world() > 1 {
                            // 4,099 rows, of which these batches touch few: they do travel as rows.
                            let all = comm.sum(&[sent as f64]).expect("a sum")[0];
                            assert!(all < (planned.total() * comm.world() as u64) as f64, "{what}");
                            assert!(sent > planned.total() / 4, "{what}");
                        } else {
                            assert_eq!(sent, planned.total(), "{what}");
                        }
                    }
                    let least = trainer.zero.least_bytes(comm, accumulation);
                    assert!(planned.total() >= least, "{}: {least} of {planned:?}", model.name);
                }
            }
        }
    }
}

/// What is measured in processes of its own, since an allocator keeps what it once had: model, precision, ZeRO stage, recomputation.
type Setting = (&'static Model, Precision, u8, Mix);

fn settings() -> [Setting; 6] {
    let mix = |full, selective| Mix { full, selective };
    [
        (&LARGE, Precision::F32, 1, mix(0, 0)),
        (&LARGE, Precision::F32, 3, mix(6, 0)),
        (&LARGE_GPT2, Precision::F32, 2, mix(2, 2)),
        (&LARGE, Precision::Bf16, 0, mix(0, 6)),
        (&LARGE, Precision::Bf16, 3, mix(0, 6)),
        (&LARGE_GPT2, Precision::Bf16, 1, mix(6, 0)),
    ]
}

/// Ranks, and the setting. Together all stages, on 1 to 4 ranks, in both precisions.
const MEASURED: [(usize, usize); 9] = [(1, 0), (1, 3), (2, 1), (2, 3), (2, 4), (3, 2), (3, 5), (4, 0), (4, 1)];

fn resident(comm: &dyn Comm, shared: &Path, setting: &str) {
    let (model, precision, zero, mix) = settings()[setting.parse::<usize>().expect("the number of a setting")];
    // Else links and other ranks decide what of an exchange is still there at the fullest moment.
    let at_once = Cell::new(true);
    let relay = |call, _, pending: Pending| match call {
        Call::Reduce if at_once.get() => pending.wait().map(|()| Pending::done()),
        _ => Ok(pending),
    };
    let comm = &Relayed::new(comm, relay, |_| ());
    let mut plan = plan(shared, model);
    plan.train.precision = precision;
    plan.train.micro_rows = 4;
    plan.train.sequence_length = 256;
    let divides = zero == 3 && comm.world() > 1;
    let stage = if comm.world() == 1 { zero.min(1) } else { zero };
    let batch = batch_of(comm, 2, 4, 256);
    let step = |trainer: &mut Trainer| {
        trainer.train_step(&batch, false).expect("a step");
        trainer.zero.arrived(trainer.comm).expect("published");
    };
    let fresh = || {
        let mut trainer = build(&plan, comm, Stage::ALL[usize::from(stage)], divides);
        trainer.recompute = mix;
        step(&mut trainer);
        trainer
    };
    // What libtorch, MPI and the threads set up once and keep is the program's own: it is there after a first trainer's life.
    drop(fresh());
    let before = memory("VmRSS:");
    let mut trainer = fresh();
    let sizes = trainer.model.sizes();
    let planned = Budget::new(
        &sizes,
        &plan.train,
        &division(&plan, comm, zero),
        divides,
        Besides::default(),
    )
    .with(&mix);
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    let mut peak_of_step = |least: u64, most: u64| {
        mpirun::forget_peak();
        step(&mut trainer);
        let peak = memory("VmHWM:").saturating_sub(before);
        let what = format!(
            "{}, ZeRO-{zero}, {precision:?}, {}, rank {} of {}: {:.1} MiB, planned {:.1} to {:.1}",
            model.name,
            mix.sentence(6),
            comm.rank(),
            comm.world(),
            mib(peak),
            mib(least),
            mib(most),
        );
        println!("  {what}");
        let bounds = least as f64 * (1.0 - PEAK)..most as f64 * (1.0 + PEAK);
        assert!(bounds.contains(&(peak as f64)), "{what}: {planned:?}");
    };
    peak_of_step(planned.settled, planned.settled);
    at_once.set(false);
    peak_of_step(planned.settled, planned.total());
}

/// This rank's part of a step's rows, in so many micro-batches of equal size.
fn batch(comm: &dyn Comm, accumulation: usize, tokens: usize) -> Batch {
    batch_of(comm, accumulation, ROWS / comm.world() / accumulation, tokens)
}

fn batch_of(comm: &dyn Comm, accumulation: usize, micro_rows: usize, tokens: usize) -> Batch {
    let mine = accumulation * micro_rows;
    let first = comm.rank() * mine;
    let rows: Vec<Row> = (first..first + mine).map(|number| row(number, tokens)).collect();
    let numbers: Vec<u64> = (first as u64..).take(mine).collect();
    let parts = numbers.chunks(micro_rows).zip(rows.chunks(micro_rows));
    Batch {
        micro_batches: parts.map(|(numbers, rows)| MicroBatch::new(numbers, rows)).collect(),
        n_targets: rows.iter().map(Row::n_targets).sum(),
        digest: RowsDigest::default(),
    }
}

fn row(number: usize, tokens: usize) -> Row {
    let token = |at: usize| ((number * 1013 + at * at * 7 + at * (number % 5)) % PIECES) as i64;
    Row {
        part: 0,
        tokens: (0..tokens).map(token).collect(),
        is_target: (0..tokens).map(|at| at > 0).collect(),
        document_starts: vec![0],
    }
}

fn shape(plan: &Plan) -> &Shape {
    match &plan.model {
        configs::Model::Scratch { shape, .. } => shape,
        other => panic!("{other:?}"),
    }
}

fn plan(root: &Path, model: &Model) -> Plan {
    let recipe = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs/tiny.yaml");
    let mut plan = configs::load(&recipe, &[]).expect("a shipped recipe");
    plan.model = configs::Model::Scratch {
        shape: Shape {
            hidden_size: model.hidden,
            intermediate_size: 3 * model.hidden,
            num_hidden_layers: model.layers,
            num_attention_heads: 4,
            max_position_embeddings: 256,
            tie_word_embeddings: model.tied,
            family: match model.block {
                Block::Llama => configs::Family::Llama {
                    num_key_value_heads: 2,
                    rms_norm_eps: 1e-5,
                    rope_theta: 10_000.0,
                },
                Block::Gpt2 => configs::Family::Gpt2 {
                    layer_norm_epsilon: 1e-5,
                    activation_function: Gelu::Tanh,
                },
            },
        },
        init_std: 0.02,
        tokenizer: Pieces::Folder {
            path: root.join("pieces"),
        },
    };
    plan.vocabulary = None;
    plan.train.recompute = Recompute::None.into();
    plan.train.full = model.full.to_vec();
    plan.train.lora = model.lora.then(|| Lora {
        rank: 4,
        alpha: 8.0,
        dropout: 0.0,
        targets: vec!["q_proj".into(), "down_proj".into()],
        rank_stabilized: None,
    });
    let rates = configs::Rates {
        lr: 1e-4,
        weight_decay: 0.0,
    };
    plan.optimizer.groups = configs::Group::ALL.map(|group| (group, rates)).into();
    plan.folders.base_model = root.join(model.name.replace([' ', ','], "-"));
    plan
}
