//! What any number of ranks at any ZeRO stage has saved, any other reads, to the bit; ranks under MPI that are killed at a call of
//! their save, or cannot write. Starts itself under mpirun, and there under strace. `--soak`: 1, 2, 3, 4, 6 and 8 ranks, every call.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::time::Instant;

use launcher::checkpoint::manifest::{MANIFEST, partial_name, slice_file, step_name};
use launcher::checkpoint::reshard::reshard;
use launcher::checkpoint::{Best, FOLDER, GuardState, Identity, Nonce, newest, verify};
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
        [child, world, what, with, shared] if child == "--rank-of" => {
            let print = std::panic::take_hook();
            std::panic::set_hook(Box::new(move |info| {
                print(info);
                std::process::abort();
            }));
            let comm = sharding::join(world.parse().expect("a number of ranks")).expect("the ranks meet");
            let shared = Path::new(shared);
            match &what[..] {
                "write" => write(comm.as_ref(), shared),
                "read" => {
                    let worlds: Vec<usize> = with.split(',').map(|n| n.parse().expect("a number")).collect();
                    read(comm.as_ref(), &worlds, shared);
                }
                _ => attempt(comm.as_ref(), shared, with, what),
            }
        }
        [list, ..] if list == "--list" => CASES.iter().for_each(|(name, _)| println!("{name}: test")),
        _ => {
            let soak = arguments.iter().any(|it| it == "--soak");
            let asked = arguments.iter().find(|it| !it.starts_with("--"));
            for (name, case) in CASES {
                if asked.is_none_or(|asked| name.contains(asked.as_str())) {
                    let started = Instant::now();
                    case(soak);
                    println!("test {name} ... ok ({:.1} s)", started.elapsed().as_secs_f64());
                }
            }
        }
    }
}

type Case = (&'static str, fn(bool));

const CASES: [Case; 3] = [
    ("any_ranks_and_stage_read_any_other_s", any_reads_any),
    ("a_rank_killed_at_a_call_of_a_save_leaves_something_whole", killed_ranks),
    ("a_rank_that_cannot_write_costs_a_save_and_all_agree", one_cannot_write),
];

/// The ranks of a job, each started behind these words: none, or strace's.
fn under_mpirun(behind: &[Vec<OsString>], what: &str, with: &str, shared: &Path) -> ExitStatus {
    let mut command = Command::new("mpirun");
    command.args(["--quiet", "--bind-to", "none", "--oversubscribe", "--allow-run-as-root"]);
    for (rank, words) in behind.iter().enumerate() {
        if rank > 0 {
            command.arg(":");
        }
        command.args(["-n", "1"]).args(words);
        command.arg(std::env::current_exe().expect("a test knows where it is"));
        command
            .args(["--rank-of", &behind.len().to_string(), what, with])
            .arg(shared);
    }
    command.stdin(Stdio::null());
    command.status().expect("mpirun starts; set-up installs it")
}

// ---- N → M ------------------------------------------------------------------------------------------------------------------

fn any_reads_any(soak: bool) {
    let worlds: &[usize] = if soak { &[1, 2, 3, 4, 6, 8] } else { &[1, 2, 3] };
    let shared = tempfile::tempdir().expect("a folder");
    let all: Vec<String> = worlds.iter().map(usize::to_string).collect();
    for what in ["write", "read"] {
        for ranks in worlds {
            let status = under_mpirun(&vec![Vec::new(); *ranks], what, &all.join(","), shared.path());
            assert!(status.success(), "{ranks} ranks that {what} ended with {status}");
        }
    }
    // Each reader has ended well, having compared every element of every writer's; none ends well that has not.
    println!("reshard_pairs {0} equal {0}", worlds.len() * worlds.len());
}

// ---- Ranks that are killed, and one that cannot write -----------------------------------------------------------------------

/// The calls by which a save reaches the disk.
const CALLS: [&str; 5] = ["openat", "write", "fsync", "rename", "mkdir"];
const RANKS: usize = 2;

/// As if every step were better than the one before.
fn best(step: u64) -> Best {
    Best {
        step,
        macro_bits_per_byte: 1.0 / step as f64,
    }
}

/// One attempt of some ranks: goes on from what is there, to the bit, and saves steps. `what`: `until N` steps are saved;
/// `fails`: the next save fails on rank 1, all hear the same of it, and the one after it is well.
fn attempt(comm: &dyn Comm, run: &Path, nonce: &str, what: &str) {
    let mut zero = zero(comm, Stage::Gradients);
    let nonce = Nonce::from_text(nonce);
    let mut saver = Saver::begin_as(nonce, comm, run, identity(), &zero, true).expect("the run is taken");
    let mut step = 0;
    if let Some(found) = choose(saver.checkpoints(), comm).expect("something whole") {
        assert!(found.rejected.is_empty(), "{:?}", found.rejected);
        let progress = load(&found.folder, &found.manifest, comm, &mut zero).expect("it is read");
        step = progress.step;
        saver.resumed(progress).expect("all hear of it");
        assert_eq!(saver.best(), Some(best(step)));
        let of_step = |value: f32| (value + step as f32).to_bits();
        each(&mut zero, |value, it| {
            assert_eq!(it.to_bits(), of_step(value), "of step {step}")
        });
    }
    let mut save = |step: u64| {
        each(&mut zero, |value, it| *it = value + step as f32);
        let progress = Progress {
            step,
            targets_so_far: 1,
            best: Some(best(step)),
        };
        let earlier = saver
            .start(&zero, progress, &GuardState::default(), 12 * step)
            .expect("it starts");
        assert!(earlier.is_none(), "{earlier:?}");
        assert_eq!(saver.best(), progress.best, "it is under way");
        let outcome = saver.finish().expect("it ends");
        let committed = matches!(outcome, Some(Outcome::Committed(_)));
        let kept = if committed {
            Some(step)
        } else {
            step.checked_sub(1).filter(|step| *step > 0)
        };
        assert_eq!(saver.best(), kept.map(best), "{outcome:?}");
        outcome
    };
    let mut until = step + 1;
    match what.strip_prefix("until ") {
        Some(steps) => until = steps.parse().expect("a number of steps"),
        None => {
            let outcome = save(step + 1);
            let Some(Outcome::Failed { why, in_a_row: 1, .. }) = outcome else {
                panic!("rank 1 cannot write, and the save is {outcome:?}")
            };
            assert!(why.starts_with("rank 1: ") && !why.contains("rank 0: "), "{why}");
            let heard = comm.all_gather_texts(why.as_bytes()).expect("the ranks go on");
            assert!(
                heard.iter().all(|it| it == why.as_bytes()),
                "all hear the same: {heard:?}"
            );
        }
    }
    for step in step + 1..=until {
        let outcome = save(step);
        assert!(matches!(outcome, Some(Outcome::Committed(_))), "{outcome:?}");
    }
}

/// A run of [`RANKS`] ranks whose every attempt goes on from what the one before has left.
struct Chain {
    run: tempfile::TempDir,
    attempts: u64,
}

impl Chain {
    /// Three steps are saved, of which two are kept.
    fn begin() -> Chain {
        let mut chain = Chain {
            run: tempfile::tempdir().expect("a folder"),
            attempts: 0,
        };
        assert!(chain.next(None, "until 3").success());
        chain
    }

    /// The newest step, and everything that is there is whole.
    fn step(&self) -> u64 {
        let found = newest(&self.run.path().join(FOLDER)).expect("something whole");
        let found = found.expect("something was saved");
        assert!(found.rejected.is_empty(), "{:?}", found.rejected);
        found.manifest.step
    }

    fn nonce(&self) -> String {
        format!("{:016x}", self.attempts)
    }

    /// What the next attempt's save of the next step has to do with on the disk; the same places in every attempt's list.
    fn paths(&self) -> [PathBuf; 10] {
        let run = fs::canonicalize(self.run.path()).expect("a folder");
        let (checkpoints, step) = (run.join(FOLDER), self.step() + 1);
        let partial = checkpoints.join(partial_name(step, &self.nonce(), 0));
        let whole = checkpoints.join(step_name(step));
        [
            partial.join(slice_file(0, RANKS)),
            partial.join(slice_file(1, RANKS)),
            partial.join(MANIFEST),
            partial,
            whole.join(slice_file(0, RANKS)),
            whole.join(MANIFEST),
            whole,
            checkpoints.join(step_name(step - 2)),
            run.join("run.lock"),
            checkpoints,
        ]
    }

    /// Runs an attempt, one of its ranks behind strace with these options.
    fn next(&mut self, strace: Option<(usize, Vec<OsString>)>, what: &str) -> ExitStatus {
        let mut behind = vec![Vec::new(); RANKS];
        if let Some((rank, options)) = strace {
            behind[rank] = ["strace", "-f", "-qq"].map(OsString::from).to_vec();
            behind[rank].extend(options);
            behind[rank].push("--".into());
        }
        let status = under_mpirun(&behind, what, &self.nonce(), self.run.path());
        self.attempts += 1;
        status
    }
}

fn options(paths: &[PathBuf], out: &Path, inject: Option<String>) -> Vec<OsString> {
    let mut options: Vec<OsString> = vec!["-y".into(), "-o".into(), out.into()];
    for path in paths {
        options.extend(["-P".into(), path.into()]);
    }
    options.extend(["-e".into(), format!("trace={}", CALLS.join(",")).into()]);
    options.extend(
        inject
            .into_iter()
            .flat_map(|inject| ["-e".into(), format!("inject={inject}").into()]),
    );
    options
}

/// In a save of rank `rank`'s that nothing disturbs: each place of [`Chain::paths`], each call that concerns it, and the most
/// times that one thread makes it.
fn every_call(chain: &mut Chain, rank: usize) -> Vec<(usize, &'static str, usize)> {
    let trace = tempfile::NamedTempFile::new().expect("a file");
    let paths = chain.paths();
    let until = format!("until {}", chain.step() + 1);
    let status = chain.next(Some((rank, options(&paths, trace.path(), None))), &until);
    assert!(status.success(), "rank {rank} saves under strace: {status}");
    let text = fs::read_to_string(trace.path()).expect("a trace");
    let mut found = Vec::new();
    for (place, path) in paths.iter().enumerate() {
        let (named, opened) = (format!("\"{}\"", path.display()), format!("<{}>", path.display()));
        for call in CALLS {
            let mut by_thread = BTreeMap::new();
            for (thread, made) in text.lines().filter_map(|line| line.split_once(' ')) {
                let made = made
                    .trim_start()
                    .strip_prefix(call)
                    .and_then(|rest| rest.strip_prefix('('));
                let concerns = |made: &str| match call {
                    // strace tells a call's place by the first name only.
                    "rename" | "mkdir" => made.starts_with(&named),
                    "openat" => made.contains(&named),
                    _ => made.contains(&opened),
                };
                if made.is_some_and(concerns) {
                    *by_thread.entry(thread).or_insert(0) += 1;
                }
            }
            found.extend(by_thread.into_values().max().map(|most| (place, call, most)));
        }
    }
    found
}

fn killed_ranks(soak: bool) {
    let mut chain = Chain::begin();
    let trace = tempfile::NamedTempFile::new().expect("a file");
    let mut tried = [0; RANKS];
    for rank in (0..RANKS).rev() {
        let calls = every_call(&mut chain, rank);
        let kinds = |call: &str| calls.iter().filter(|(_, known, _)| *known == call).count();
        let least: [usize; 5] = if rank == 0 { [5, 2, 4, 2, 1] } else { [1, 1, 1, 0, 1] };
        for (call, least) in CALLS.into_iter().zip(least) {
            assert!(
                kinds(call) >= least,
                "rank {rank} calls {call} in {} places: {calls:?}",
                kinds(call)
            );
        }
        let all = calls
            .iter()
            .flat_map(|(place, call, most)| (1..=*most).map(move |number| (*place, *call, number)));
        let all: Vec<_> = all.collect();
        // The short form takes a few of each rank's.
        for (place, call, number) in all.iter().step_by(if soak { 1 } else { all.len().div_ceil(3) }) {
            let (before, paths) = (chain.step(), chain.paths());
            let inject = format!("{call}:signal=SIGKILL:when={number}");
            let options = options(&paths[*place..=*place], trace.path(), Some(inject));
            let status = chain.next(Some((rank, options)), &format!("until {}", before + 1));
            let shown = format!("rank {rank} at {call} {number} of {}", paths[*place].display());
            assert!(!status.success(), "{shown}: it was not killed");
            let after = chain.step();
            assert!(
                (before..=before + 1).contains(&after),
                "{shown}: step {before} became {after}"
            );
            tried[rank] += 1;
            if soak {
                println!("  {} of {}: {shown}", tried[rank], all.len());
            }
        }
    }
    // What the last has left is read like that of all before it.
    let until = format!("until {}", chain.step() + 1);
    assert!(chain.next(None, &until).success());
    println!(
        "rank_kills {} unusable 0; rank 0 {}, rank 1 {}",
        tried[0] + tried[1],
        tried[0],
        tried[1]
    );
}

fn one_cannot_write(_: bool) {
    let mut chain = Chain::begin();
    let trace = tempfile::NamedTempFile::new().expect("a file");
    let faults = [
        "openat:error=EACCES:when=1",
        "write:error=ENOSPC:when=2+",
        "fsync:error=EIO",
        "write:retval=1:when=3",
    ];
    for fault in faults {
        let before = chain.step();
        let mine = &chain.paths()[1..2];
        let status = chain.next(Some((1, options(mine, trace.path(), Some(fault.into())))), "fails");
        assert!(status.success(), "{fault}: {status}");
        assert_eq!(chain.step(), before + 1, "{fault}");
        let left = fs::read_dir(chain.run.path().join(FOLDER)).expect("a folder");
        let left: Vec<_> = left.map(|entry| entry.expect("an entry").file_name()).collect();
        // The two that are kept, and which did best.
        assert_eq!(left.len(), 3, "{fault}: {left:?}");
    }
    println!("one_rank_cannot_write {} disagreements 0", faults.len());
}

// ---- State ------------------------------------------------------------------------------------------------------------------

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
        best: None,
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
