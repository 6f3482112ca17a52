//! Whole runs that are killed, starved of disk, moved between numbers of ranks and ZeRO stages: what they train is what a run
//! that was left alone trains. The calls of one save are `launcher/tests/system_calls.rs`'s.

use std::collections::BTreeSet;
use std::fs;
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use launcher::checkpoint::{FOLDER, newest};
use launcher::supervise::process_state;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use whole_program_tests::{Run, panglot, prepared, root, succeed, text};

/// So small that a run is nearly all starts, collectives and saves, which is what is tested: some 900 elements train, a step
/// takes milliseconds, and a save is under way for a good part of them.
const TINIEST: [&str; 11] = [
    "model.shape.hidden_size=16",
    "model.shape.intermediate_size=16",
    "model.shape.num_hidden_layers=1",
    "model.shape.num_attention_heads=2",
    "model.shape.num_key_value_heads=1",
    "train.sequence_length=16",
    "train.rows_per_step=2",
    "train.micro_rows=1",
    "train.full=[norms]",
    "optimizer.lr_embeddings=null",
    "optimizer.lr_body=0.005",
];

fn train(run: &Run, ranks: usize, overrides: &[&str]) -> Command {
    let (folder, corpus) = tiniest();
    let mut command = run.train_in(&folder, &TINIEST);
    command.arg(&corpus).args(overrides).args(["-n", &ranks.to_string()]);
    command
}

/// What [`TINIEST`] is prepared in, beside the tiny config's corpus; made once a program.
fn tiniest() -> (PathBuf, String) {
    static PREPARED: OnceLock<(PathBuf, String)> = OnceLock::new();
    let prepare = || {
        let tiny = prepared();
        let folder = tiny.with_file_name("prepared-tiniest");
        let corpus = format!("folders.corpus={}", tiny.join("corpus").display());
        let mut command = panglot(&["prepare", "configs/tiny.yaml"]);
        command.args(TINIEST).arg(&corpus);
        command.arg(format!("folders.prepared={}", folder.display()));
        succeed(command);
        (folder, corpus)
    };
    PREPARED.get_or_init(prepare).clone()
}

fn checkpoints(run: &Run) -> PathBuf {
    run.folder.path().join(FOLDER)
}

/// Steps whose lines are in `metrics.jsonl`; cheaper to ask again and again than [`Run::metrics`].
fn steps_taken(run: &Run) -> u64 {
    let text = fs::read(run.folder.path().join("metrics.jsonl")).unwrap_or_default();
    text.iter().filter(|byte| **byte == b'\n').count() as u64
}

// ---- Random kills -----------------------------------------------------------------------------------------------------------

const INTERVAL: u64 = 10;

/// What came of killing one run again and again.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
struct Kills {
    /// Draws the instants.
    seed: u64,
    ranks: usize,
    /// With `checkpoint.lose_at_most`: training waits rather than be more than the interval ahead.
    #[serde(default)]
    waits: bool,
    kills: usize,
    /// Kills that came before the first step of their attempt, and those that left a save half written.
    while_starting: usize,
    while_saving: usize,
    /// Attempts after which no checkpoint, or a damaged one, was there though a save had been committed.
    unusable: usize,
    /// The most steps between what had been taken and what the next attempt went on from.
    most_steps_lost: u64,
    /// The most steps between the newest save that had begun and what the next attempt went on from.
    most_begun_lost: u64,
    /// Whether losses or the last state are another than the undisturbed run's.
    unequal: bool,
}

/// Kills the whole job with SIGKILL again and again, at instants drawn by `found.seed`, until it finishes or `kills` have hit; then
/// it may finish.
fn killed_again_and_again(run: &Run, overrides: &[&str], kills: usize, mut found: Kills) -> Kills {
    let mut dice = Dice(found.seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    let ranks = found.ranks;
    let metrics = run.folder.path().join("metrics.jsonl");
    // An attempt's first act as a run of steps is to put the steps before its own into a new file.
    let file = || fs::metadata(&metrics).map_or(0, |it| it.ino());
    while found.kills < kills {
        let before = file();
        let mut job = train(run, ranks, overrides)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("the program starts");
        // One in five while it starts, meets, chooses and reads; the others while it trains and saves.
        let mut left = Duration::from_millis(match dice.below(5) {
            0 => dice.below(1000),
            _ => 60_000,
        });
        let mut trains = false;
        let mut since = Instant::now();
        while since.elapsed() < left && job.try_wait().expect("a child").is_none() {
            if !trains && file() != before {
                trains = true;
                if left > Duration::from_secs(1) {
                    (left, since) = (Duration::from_micros(dice.below(400_000)), Instant::now());
                }
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        if job.try_wait().expect("a child").is_some() {
            break;
        }
        kill_all(&mut job);
        found.kills += 1;
        found.while_starting += usize::from(file() == before);
        let names = fs::read_dir(checkpoints(run)).into_iter().flatten().flatten();
        let half = names.filter(|entry| entry.file_name().to_string_lossy().ends_with(".partial"));
        found.while_saving += usize::from(half.count() > 0);
        let taken = steps_taken(run);
        let begun = taken.saturating_sub(1) / INTERVAL * INTERVAL;
        match newest(&checkpoints(run)) {
            Ok(newest) => {
                found.unusable += usize::from(newest.as_ref().is_some_and(|it| !it.rejected.is_empty()));
                let from = newest.map_or(0, |it| it.manifest.step);
                found.most_steps_lost = found.most_steps_lost.max(taken.saturating_sub(from));
                found.most_begun_lost = found.most_begun_lost.max(begun.saturating_sub(from));
            }
            Err(_) => found.unusable += 1,
        }
    }
    succeed(train(run, ranks, overrides));
    found
}

/// Runs on 2 ranks and on 1 in turns, each killed up to `per_run` times, until `kills` have hit in all; each must end as the
/// one that was left alone. What is done is kept in `progress`, if there is such a file: whoever is interrupted goes on there.
fn random_kills(kills: usize, per_run: usize, steps: u64, progress: Option<&Path>) {
    let steps_are = format!("train.steps={steps}");
    let every = format!("checkpoint.every_steps={INTERVAL}");
    let promise = format!("checkpoint.lose_at_most={INTERVAL}");
    let overrides = [&steps_are[..], &every];
    let kept = progress
        .and_then(|file| fs::read_to_string(file).ok())
        .unwrap_or_default();
    let mut done: Vec<Kills> = kept
        .lines()
        .map(|line| serde_json::from_str(line).expect("a line of ours"))
        .collect();
    let mut left_alone: [Option<Run>; 2] = [None, None];
    let hit = |done: &[Kills]| done.iter().map(|it| it.kills).sum::<usize>();
    while hit(&done) < kills {
        let seed = done.len() as u64;
        let found = Kills {
            seed,
            ranks: 2 - (seed % 2) as usize,
            waits: seed % 4 < 2,
            ..Kills::default()
        };
        let ranks = found.ranks;
        let whole = left_alone[ranks - 1].get_or_insert_with(|| {
            let whole = Run::new();
            succeed(train(&whole, ranks, &overrides));
            whole
        });
        let run = Run::new();
        let with_promise = [&overrides[..], &[&promise]].concat();
        let overrides = if found.waits { &with_promise[..] } else { &overrides[..] };
        let mut found = killed_again_and_again(&run, overrides, per_run.min(kills - hit(&done)), found);
        found.unequal = run.losses() != whole.losses() || run.state(steps) != whole.state(steps);
        done.push(found);
        let line = serde_json::to_string(&found).expect("plain data");
        println!("  {} of {kills}: {line}", hit(&done));
        if let Some(file) = progress {
            let mut file = fs::OpenOptions::new()
                .create(true)
                .append(true)
                .open(file)
                .expect("a file");
            writeln!(file, "{line}").expect("written");
        }
    }
    if let Some(file) = progress {
        // Whoever starts it again starts anew.
        fs::rename(file, file.with_extension("last.jsonl")).expect("renamed");
    }
    let sum = |of: fn(&Kills) -> usize| done.iter().map(of).sum::<usize>();
    let most = |of: fn(&Kills) -> u64| done.iter().map(of).max().unwrap_or(0);
    let (unequal, unusable) = (sum(|it| usize::from(it.unequal)), sum(|it| it.unusable));
    let (lost, begun) = (most(|it| it.most_steps_lost), most(|it| it.most_begun_lost));
    let waiting = most(|it| if it.waits { it.most_steps_lost } else { 0 });
    println!(
        "random_kills {} unequal {unequal} of {} runs; unusable {unusable}, while starting {}, while saving {}; interval \
         {INTERVAL}, most steps lost {waiting} with lose_at_most, {lost} without",
        hit(&done),
        done.len(),
        sum(|it| it.while_starting),
        sum(|it| it.while_saving)
    );
    assert_eq!((unequal, unusable), (0, 0));
    // Of the saves that have begun all but the one under way are on the disk: the next one waits for it.
    assert!(begun <= INTERVAL, "{begun} steps of saves that had begun were lost");
    assert!(lost <= 2 * INTERVAL, "{lost} steps were lost");
    assert!(
        waiting <= INTERVAL,
        "{waiting} steps were lost where at most {INTERVAL} may be"
    );
}

#[test]
fn thirty_random_kills_of_the_whole_job_change_nothing() {
    random_kills(30, 10, 300, None);
}

#[test]
#[ignore = "make soak-checkpoint"]
fn a_thousand_random_kills_of_the_whole_job_change_nothing() {
    let folder = root().join("runs/soak-checkpoint");
    fs::create_dir_all(&folder).expect("a folder");
    random_kills(1000, 25, 600, Some(&folder.join("random_kills.jsonl")));
}

/// The step that the next attempt goes on from.
fn newest_step(run: &Run) -> u64 {
    let found = newest(&checkpoints(run)).expect("those that are there are whole");
    found.map_or(0, |found| found.manifest.step)
}

/// SIGKILL to the launcher, mpirun and every rank: nobody gets to tidy up. Returns when all are gone.
fn kill_all(job: &mut Child) {
    let mut all: BTreeSet<i32> = BTreeSet::new();
    // Until nothing new is found: a rank may be starting just now.
    loop {
        let before = all.len();
        all.extend(descendants(job.id() as i32));
        for process in &all {
            // It may be gone.
            let _ = kill(Pid::from_raw(*process), Signal::SIGKILL);
        }
        if all.len() == before {
            break;
        }
    }
    job.wait().expect("the launcher is gone");
    let started = Instant::now();
    while all.iter().any(|process| is_alive(*process)) {
        assert!(started.elapsed() < Duration::from_secs(20), "{all:?} outlive SIGKILL");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn is_alive(process: i32) -> bool {
    process_state(process).is_some_and(|state| state != 'Z' && state != 'X')
}

fn descendants(of: i32) -> Vec<i32> {
    let mut found = vec![of];
    let mut next = 0;
    while next < found.len() {
        let tasks = fs::read_dir(format!("/proc/{}/task", found[next]));
        for task in tasks.into_iter().flatten().flatten() {
            let children = fs::read_to_string(task.path().join("children")).unwrap_or_default();
            found.extend(
                children
                    .split_whitespace()
                    .filter_map(|child| child.parse::<i32>().ok()),
            );
        }
        next += 1;
    }
    found
}

struct Dice(u64);

impl Dice {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % n
    }
}

// ---- Other numbers of ranks -------------------------------------------------------------------------------------------------

/// Which state any number of ranks reads of any other's is trainer/tests/elastic.rs's; here are the rows.
#[test]
fn over_four_two_three_one_and_four_ranks_each_row_is_trained_on_once() {
    let whole = Run::new();
    let settings = ["train.steps=10", "train.rows_per_step=12", "checkpoint.every_steps=100"];
    succeed(train(&whole, 1, &settings));
    let run = Run::new();
    let legs = [(4, 0, 2), (2, 3, 4), (3, 1, 6), (1, 2, 8), (4, 3, 10)];
    for (ranks, zero, until) in legs {
        let mut job = train(&run, ranks, &settings);
        job.args([format!("train.zero={zero}"), format!("debug.stop_after={until}")]);
        let output = job.output().expect("the program starts");
        let code = if until == 10 { 0 } else { 75 };
        assert_eq!(output.status.code(), Some(code), "{}", text(&output));
        if until > 2 {
            assert!(
                text(&output).contains(&format!("resumed from step {} ", until - 2)),
                "{}",
                text(&output)
            );
            assert!(
                text(&output).contains("train.zero: "),
                "what differs is said: {}",
                text(&output)
            );
        }
    }
    let rows = |run: &Run| -> Vec<Value> { run.metrics().iter().map(|line| line["rows_digest"].clone()).collect() };
    assert_eq!(rows(&run).len(), 10);
    assert_eq!(
        rows(&run),
        rows(&whole),
        "the digest of a batch's rows is the same for any number of ranks"
    );
    for (step, (a, b)) in run.losses().iter().zip(whole.losses()).enumerate() {
        // The order of sums; see ranks.rs.
        assert!(
            (a - b).abs() < 5e-5,
            "step {step}: {a} over five numbers of ranks, {b} on one"
        );
    }
}

// ---- Disks that take nothing more -------------------------------------------------------------------------------------------

/// A file system in memory of so many KiB at `folder`, until it is dropped; `None`, and said so, where we may not mount.
struct Small<'a>(&'a Path);

impl Small<'_> {
    fn mount(folder: &Path, kib: u64) -> Option<Small<'_>> {
        fs::create_dir_all(folder).expect("a folder");
        let size = format!("size={kib}k");
        if mount(&["-t", "tmpfs", "-o", &size, "tmpfs"], folder) {
            return Some(Small(folder));
        }
        println!("SKIPPED: mounting a small file system takes root");
        None
    }

    fn becomes(&self, options: &str) {
        let started = Instant::now();
        // It is busy while a file is open for writing.
        while !mount(&["-o", &format!("remount,{options}")], self.0) {
            assert!(
                started.elapsed() < Duration::from_secs(10),
                "not remounted with {options}"
            );
        }
    }
}

impl Drop for Small<'_> {
    fn drop(&mut self) {
        // Lazily: whoever still has a file open there is on its way out.
        let _ = Command::new("umount").arg("-l").arg(self.0).status();
    }
}

fn mount(options: &[&str], folder: &Path) -> bool {
    let mut command = Command::new("mount");
    command.args(options).arg(folder).stderr(Stdio::null());
    command.status().is_ok_and(|status| status.success())
}

fn step_folders(run: &Run) -> Vec<String> {
    let entries = fs::read_dir(checkpoints(run)).expect("checkpoints");
    let mut names: Vec<String> = entries
        .map(|entry| entry.expect("an entry").file_name().into_string().expect("a name"))
        .collect();
    names.sort();
    names
}

#[test]
fn a_full_disk_is_said_and_after_three_failures_ends_the_run_with_what_was_there() {
    let run = Run::new();
    let folder = checkpoints(&run);
    // One checkpoint's three files take 24 KiB of pages.
    let Some(disk) = Small::mount(&folder, 40) else { return };
    let settings = ["train.steps=40", "checkpoint.every_steps=5"];
    let output = train(&run, 2, &settings).output().expect("the program starts");
    let said = text(&output);
    assert_eq!(output.status.code(), Some(74), "{said}");
    assert!(
        said.contains("the checkpoint of step 10 could not be written (1 in a row, 3 end the run); training goes on"),
        "{said}"
    );
    assert!(said.contains("No space left on device"), "{said}");
    assert!(
        said.contains("3 checkpoints in a row could not be written, the last of step 20"),
        "{said}"
    );
    let taken = steps_taken(&run);
    // What came of a save is agreed on at the end of a later step.
    assert!((20..30).contains(&taken), "the steps went on meanwhile: {taken}");
    assert_eq!(step_folders(&run), ["step-00000005"], "nothing half-written is left");

    disk.becomes("size=8m");
    let said = text(&succeed(train(&run, 2, &settings)));
    assert!(said.contains("resumed from step 5 "), "{said}");
    assert_eq!(run.losses().len(), 40);
    drop(disk);
}

#[test]
fn a_disk_that_turns_read_only_for_a_while_costs_saves_and_not_the_run() {
    let whole = Run::new();
    // Slow enough that the disk can change on the way.
    let settings = [
        "train.steps=500",
        "checkpoint.every_steps=20",
        "checkpoint.failures_in_a_row=1000",
    ];
    succeed(train(&whole, 2, &settings));
    let run = Run::new();
    let folder = checkpoints(&run);
    let Some(disk) = Small::mount(&folder, 8192) else {
        return;
    };
    let mut job = train(&run, 2, &settings);
    job.arg("debug.check_ranks_equal=true")
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    let mut job = job.spawn().expect("the program starts");
    wait_for(&mut job, || steps_taken(&run) > 40);
    disk.becomes("ro");
    let broken = steps_taken(&run);
    wait_for(&mut job, || steps_taken(&run) > broken + 60);
    disk.becomes("rw");
    let output = job.wait_with_output().expect("the program ends");
    let said = text(&output);
    assert!(output.status.success(), "{said}");
    assert!(said.contains("Read-only file system"), "{said}");
    assert!(said.contains("checkpoints can be written again: step "), "{said}");
    assert_eq!(run.losses(), whole.losses());
    assert_eq!(run.state(500), whole.state(500));
    drop(disk);
}

#[test]
fn a_folder_that_vanishes_ends_the_run_as_a_disk_s_fault() {
    let run = Run::new();
    let settings = ["train.steps=100000", "checkpoint.every_steps=20"];
    let mut job = train(&run, 1, &settings);
    let mut job = job
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the program starts");
    wait_for(&mut job, || steps_taken(&run) > 25);
    fs::rename(checkpoints(&run), run.folder.path().join("elsewhere")).expect("renamed");
    let output = job.wait_with_output().expect("the program ends");
    let said = text(&output);
    assert_eq!(output.status.code(), Some(74), "{said}");
    assert!(said.contains("3 checkpoints in a row could not be written"), "{said}");
    assert!(said.contains("No such file or directory"), "{said}");
}

fn wait_for(job: &mut Child, mut there: impl FnMut() -> bool) {
    let started = Instant::now();
    while !there() {
        assert!(started.elapsed() < Duration::from_secs(120), "it took too long");
        assert!(job.try_wait().expect("a child").is_none(), "the run ended too early");
        std::thread::sleep(Duration::from_millis(5));
    }
}

// ---- Attempts, limits, settings ---------------------------------------------------------------------------------------------

#[test]
fn an_attempt_that_was_replaced_commits_nothing_and_says_by_whom() {
    let run = Run::new();
    let settings = ["train.steps=100000", "checkpoint.every_steps=20"];
    let mut old = train(&run, 1, &settings);
    let mut old = old
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the program starts");
    wait_for(&mut old, || steps_taken(&run) > 25);
    for process in descendants(old.id() as i32) {
        kill(Pid::from_raw(process), Signal::SIGSTOP).expect("it is there");
    }
    let mut new = train(&run, 1, &settings);
    new.arg("debug.stop_after=70");
    assert_eq!(new.output().expect("the program starts").status.code(), Some(75));
    let before = run.state(70);
    for process in descendants(old.id() as i32) {
        kill(Pid::from_raw(process), Signal::SIGCONT).expect("it is there");
    }
    let output = old.wait_with_output().expect("the program ends");
    assert_eq!(output.status.code(), Some(2), "{}", text(&output));
    assert!(text(&output).contains("has been replaced: "), "{}", text(&output));
    assert_eq!(step_folders(&run), ["step-00000060", "step-00000070"]);
    assert_eq!(run.state(70), before);
    assert_eq!(run.losses().len(), 70, "nor does it write to the new attempt's metrics");
}

#[test]
fn it_saves_and_ends_in_time_before_the_job_s_limit() {
    let run = Run::new();
    let mut job = train(
        &run,
        2,
        &[
            "train.steps=100000",
            "checkpoint.every_steps=100000",
            "checkpoint.safety_seconds=8",
        ],
    );
    let now = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .expect("after 1970");
    // Half of it for the start and some steps, half for the end, on a machine that is busy with other tests.
    let end = now.as_secs() + 16;
    job.env("SLURM_JOB_END_TIME", end.to_string());
    let output = job.output().expect("the program starts");
    let now = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .expect("after 1970");
    assert_eq!(output.status.code(), Some(75), "{}", text(&output));
    assert!(now.as_secs() < end, "in time");
    assert!(
        text(&output).contains("in time before the job's limit"),
        "{}",
        text(&output)
    );
    assert_eq!(newest_step(&run), steps_taken(&run));
}

#[test]
fn resume_is_verified_on_request() {
    let run = Run::new();
    let said = text(&succeed(train(&run, 2, &["train.steps=20", "debug.verify_resume=3"])));
    assert!(
        said.contains("Resume is exact: 3 steps, killed after 4, resumed, 3 more: 6 losses"),
        "{said}"
    );
    assert!(
        !run.folder.path().join("verify_resume").exists() && run.metrics().is_empty(),
        "nothing is left of it"
    );
}

#[test]
fn the_commands_say_what_is_there_and_what_is_damaged() {
    let run = Run::new();
    succeed(train(
        &run,
        2,
        &[
            "train.steps=8",
            "checkpoint.every_steps=2",
            "checkpoint.keep=9",
            "checkpoint.keep_every=4",
        ],
    ));
    let folder = run.folder.path().display().to_string();
    let ours = |words: &[&str]| {
        let mut all = vec!["checkpoint", words[0], &folder];
        all.extend(&words[1..]);
        panglot(&all).output().expect("the program starts")
    };
    let listed = text(&ours(&["ls"]));
    assert_eq!(listed.matches(" in 2 files by 2 ranks, ").count(), 4, "{listed}");
    let shown = text(&ours(&["show", "--step", "4"]));
    assert!(
        shown.contains("4 steps taken, 4 updates") && shown.contains("next row 8"),
        "{shown}"
    );
    assert!(text(&ours(&["show", "--step", "5"])).contains("there are those of 2, 4, 6, 8"));
    let slice = checkpoints(&run).join("step-00000004/slice-00001-of-00002.safetensors");
    let mut bytes = fs::read(&slice).expect("a slice");
    *bytes.last_mut().expect("some") ^= 1;
    fs::write(&slice, bytes).expect("written");
    let verified = ours(&["verify"]);
    assert_eq!(verified.status.code(), Some(74));
    let said = text(&verified);
    assert!(
        said.contains("step-00000004/slice-00001-of-00002.safetensors does not match its digest in bytes 0 to "),
        "{said}"
    );
    assert_eq!(said.matches(" is whole").count(), 3, "{said}");
    assert!(text(&ours(&["prune", "--keep", "2", "--dry-run"])).contains("step-00000002 would go"));
    assert_eq!(ours(&["prune", "--keep", "1"]).status.code(), Some(2));
    succeed(panglot(&[
        "checkpoint",
        "prune",
        &folder,
        "--keep",
        "2",
        "--keep-every",
        "4",
    ]));
    assert_eq!(step_folders(&run), ["step-00000004", "step-00000006", "step-00000008"]);
}
