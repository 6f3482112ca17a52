//! What any number of ranks at any ZeRO stage has saved, any other reads, to the bit. Starts itself under mpirun: first every
//! number of ranks writes, then every one reads all of it and writes it again. `--soak`: 1, 2, 3, 4, 6 and 8 ranks.

use std::path::{Path, PathBuf};
use std::process::Command;

use launcher::checkpoint::manifest::step_name;
use launcher::checkpoint::reshard::reshard;
use launcher::checkpoint::{FOLDER, GuardState, Identity, verify};
use sharding::memory::f32s_mut;
use sharding::zero::Slice;
use sharding::{BucketSpec, Comm, ParamSpec, Stage, Zero};
use tch::{Kind, Tensor};
use trainer::checkpoint::{Outcome, Progress, Saver, choose, load};

const STEP: u64 = 7;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    tch::set_num_threads(1);
    match &arguments[..] {
        [child, world, what, worlds, shared] if child == "--rank-of" => {
            let print = std::panic::take_hook();
            std::panic::set_hook(Box::new(move |info| {
                print(info);
                std::process::abort();
            }));
            let comm = sharding::join(world.parse().expect("a number of ranks")).expect("the ranks meet");
            let worlds: Vec<usize> = worlds.split(',').map(|n| n.parse().expect("a number")).collect();
            match &what[..] {
                "write" => write(comm.as_ref(), Path::new(shared)),
                _ => read(comm.as_ref(), &worlds, Path::new(shared)),
            }
        }
        [list, ..] if list == "--list" => println!("any_ranks_and_stage_read_any_other_s: test"),
        _ => {
            let soak = arguments.iter().any(|it| it == "--soak");
            let worlds: &[usize] = if soak { &[1, 2, 3, 4, 6, 8] } else { &[1, 2, 3] };
            let shared = tempfile::tempdir().expect("a folder");
            for what in ["write", "read"] {
                worlds
                    .iter()
                    .for_each(|ranks| under_mpirun(*ranks, what, worlds, shared.path()));
            }
            println!("reshard_pairs {0} equal {0}", worlds.len() * worlds.len());
            println!("test any_ranks_and_stage_read_any_other_s ... ok");
        }
    }
}

fn under_mpirun(ranks: usize, what: &str, worlds: &[usize], shared: &Path) {
    let all: Vec<String> = worlds.iter().map(usize::to_string).collect();
    let mut command = Command::new("mpirun");
    command.args(["--quiet", "--bind-to", "none", "--oversubscribe", "--allow-run-as-root"]);
    command.args(["-n", &ranks.to_string()]);
    command.arg(std::env::current_exe().expect("a test knows where it is"));
    command
        .args(["--rank-of", &ranks.to_string(), what, &all.join(",")])
        .arg(shared);
    let status = command.status().expect("mpirun starts; set-up installs it");
    assert!(status.success(), "{ranks} ranks that {what} ended with {status}");
}

/// Buckets as LoRA, norms and an embedding give them; none divides among 3, 6 or 8 ranks, one is smaller than their number.
fn specs() -> Vec<BucketSpec> {
    let shapes: [(&str, &[&[i64]]); 4] = [
        ("embedding", &[&[1009, 7]]),
        ("layer.0", &[&[4, 33], &[33, 4], &[33]]),
        ("layer.1", &[&[5]]),
        ("head", &[&[1009, 7], &[7]]),
    ];
    let bucket = |(name, shapes): (&str, &[&[i64]])| BucketSpec {
        name: name.to_owned(),
        params: shapes
            .iter()
            .enumerate()
            .map(|(index, shape)| ParamSpec {
                name: format!("{name}.{index}"),
                shape: shape.to_vec(),
                group: index,
            })
            .collect(),
    };
    shapes.into_iter().map(bucket).collect()
}

fn zero(comm: &dyn Comm, stage: Stage) -> Zero {
    let specs = specs();
    let nothing = |bucket: usize, param: usize| {
        Tensor::zeros(&specs[bucket].params[param].shape[..], (Kind::Float, tch::Device::Cpu))
    };
    Zero::new(comm, stage, &specs, Kind::Float, nothing).expect("the ranks register the same")
}

/// What element `element` of a bucket's θ, m or v is.
fn value(bucket: usize, slot: usize, element: usize) -> f32 {
    let mixed = (element as u32 ^ (bucket as u32) << 20 ^ (slot as u32) << 24).wrapping_mul(2_654_435_761);
    mixed as f32 / 1e9
}

/// Calls `with` for every element that this rank keeps, padding left out.
fn each(zero: &mut Zero, mut with: impl FnMut(f32, &mut f32)) {
    for bucket in 0..zero.layout().buckets.len() {
        let (range, Slice { theta, m, v }) = zero.slice_mut(bucket);
        for (slot, tensor) in [theta, m, v].into_iter().enumerate() {
            for (element, it) in range.clone().zip(f32s_mut(tensor)) {
                with(value(bucket, slot, element), it);
            }
        }
    }
}

fn identity() -> Identity {
    let tiny = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs/tiny.yaml");
    Identity {
        plan: configs::load(&tiny, &[]).expect("a shipped config"),
        base_model: "base".into(),
        vocabulary: "vocabulary".into(),
        tokens: "tokens".into(),
    }
}

fn stages(comm: &dyn Comm) -> Vec<Stage> {
    // One rank has nobody to share with.
    let least = |stage: &Stage| comm.world() > 1 || *stage <= Stage::OptimizerState;
    Stage::ALL.into_iter().filter(least).collect()
}

fn folder(shared: &Path, world: usize, stage: Stage) -> PathBuf {
    shared.join(format!("{world}-{}", stage as u8))
}

fn save(comm: &dyn Comm, zero: &Zero, run: &Path) {
    let mut saver = Saver::begin(comm, run, identity(), zero, true).expect("the run is taken");
    let progress = Progress {
        step: STEP,
        targets_so_far: 1,
    };
    let guard = GuardState::default();
    assert!(saver.start(zero, progress, &guard, 84).expect("it starts").is_none());
    let outcome = saver.finish().expect("it ends");
    assert!(matches!(outcome, Some(Outcome::Committed(_))), "{outcome:?}");
}

fn write(comm: &dyn Comm, shared: &Path) {
    for stage in stages(comm) {
        let mut zero = zero(comm, stage);
        each(&mut zero, |value, it| *it = value);
        zero.updates = 5;
        save(comm, &zero, &folder(shared, comm.world(), stage));
    }
}

fn read(comm: &dyn Comm, worlds: &[usize], shared: &Path) {
    for (index, writers) in worlds.iter().enumerate() {
        for theirs in Stage::ALL {
            let run = folder(shared, *writers, theirs);
            if !run.exists() {
                continue;
            }
            for stage in stages(comm) {
                let checkpoints = run.join(FOLDER);
                let found = choose(&checkpoints, comm).expect("it verifies").expect("one is there");
                let mut zero = zero(comm, stage);
                let progress = load(&found.folder, &found.manifest, comm, &mut zero).expect("it is read");
                zero.arrived(comm).expect("it is published");
                assert_eq!((progress.step, zero.updates), (STEP, 5));
                let mut wrong = 0;
                each(&mut zero, |value, it| {
                    wrong += usize::from(it.to_bits() != value.to_bits())
                });
                assert_eq!(
                    wrong,
                    0,
                    "{writers} ranks at {theirs:?}, read by {} at {stage:?}",
                    comm.world()
                );
                // Written again it is the same, too; one pair of stages shows it.
                if theirs as usize == index % 4 || *writers == 1 {
                    let again = shared.join(format!(
                        "again-{}-{}-{writers}-{}",
                        comm.world(),
                        stage as u8,
                        theirs as u8
                    ));
                    save(comm, &zero, &again);
                    if comm.rank() == 0 {
                        let one = |run: &Path| {
                            let from = run.join(FOLDER).join(step_name(STEP));
                            let out = tempfile::tempdir().expect("a folder");
                            let whole = reshard(&from, 1, out.path()).expect("cut anew");
                            verify(&whole).expect("whole").files[0].blake3.clone()
                        };
                        assert_eq!(one(&run), one(&again));
                    }
                }
                comm.barrier().expect("all ranks finish");
            }
        }
    }
}
