//! Whole runs that are killed, starved of disk, moved between numbers of ranks and ZeRO stages: what they train is what a run
//! that was left alone trains. The calls of one save are `launcher/tests/checkpoints.rs`'s.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use whole_program_tests::{Run, panglot, succeed, text};

/// Ten thousand elements train: a run is nearly all start and saves, which is what is tested.
const TINY: [&str; 4] = [
    "train.sequence_length=16",
    "train.full=[norms]",
    "optimizer.lr_embeddings=null",
    "optimizer.lr_body=0.005",
];

fn train(run: &Run, ranks: usize, overrides: &[&str]) -> Command {
    let mut command = run.train(&TINY);
    command.args(overrides).args(["-n", &ranks.to_string()]);
    command
}

// ---- Random kills -----------------------------------------------------------------------------------------------------------

/// Kills the whole job with SIGKILL again and again, at instants drawn by `seed`, until it finishes or `kills` are spent; then
/// it may finish. Returns how many kills hit, and the most steps that one of them cost beside the interval and what was under
/// way.
fn killed_again_and_again(run: &Run, ranks: usize, overrides: &[&str], seed: u64, kills: usize) -> (usize, u64) {
    let mut dice = Dice(seed);
    let (mut hit, mut most_lost) = (0, 0);
    while hit < kills {
        let mut job = train(run, ranks, overrides)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("the program starts");
        // From before the ranks meet to some intervals later.
        let wait = Duration::from_millis(600 + dice.below(1500));
        let started = Instant::now();
        while started.elapsed() < wait && job.try_wait().expect("a child").is_none() {
            std::thread::sleep(Duration::from_millis(2));
        }
        if job.try_wait().expect("a child").is_some() {
            break;
        }
        kill_all(&mut job);
        hit += 1;
        let taken = run.metrics().len() as u64;
        let resumes_from = newest_step(run);
        most_lost = most_lost.max(taken.saturating_sub(resumes_from));
    }
    succeed(train(run, ranks, overrides));
    (hit, most_lost)
}

/// The step that the next attempt goes on from.
fn newest_step(run: &Run) -> u64 {
    let listed = succeed(panglot(&[
        "checkpoint",
        "ls",
        &run.folder.path().display().to_string(),
        "--json",
    ]));
    let listed: Value = serde_json::from_slice(&listed.stdout).expect("JSON");
    let lines = listed["checkpoints"].as_array().expect("a list");
    let whole = lines.iter().filter(|line| line["damaged"].is_null());
    whole.filter_map(|line| line["step"].as_u64()).max().unwrap_or(0)
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
    let stat = fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
    let state = stat.rsplit(") ").next().and_then(|rest| rest.chars().next());
    state.is_some_and(|state| state != 'Z' && state != 'X')
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

/// `rounds` runs are killed until `kills` have hit in all; each must end as the one that was left alone.
fn random_kills(kills: usize, per_run: usize) {
    let overrides = ["train.steps=400", "checkpoint.every_steps=20"];
    let (mut hit, mut unequal, mut most_lost) = (0, 0, 0);
    for ranks in [2, 1].into_iter().cycle() {
        let whole = Run::new();
        succeed(train(&whole, ranks, &overrides));
        let run = Run::new();
        let (kills_here, lost) = killed_again_and_again(&run, ranks, &overrides, hit as u64, per_run.min(kills - hit));
        let same = run.losses() == whole.losses() && run.state(400) == whole.state(400);
        if !same {
            println!("another run on {ranks} ranks after {kills_here} kills, seed {hit}");
        }
        unequal += usize::from(!same);
        hit += kills_here;
        most_lost = most_lost.max(lost);
        if hit >= kills {
            break;
        }
    }
    println!("random_kills {hit} unequal {unequal} most_steps_lost {most_lost} interval 20");
    assert_eq!(unequal, 0);
    // An interval, and what is taken while a save is on its way to the disk: it is not there yet, and waited for by the next.
    assert!(most_lost <= 2 * 20, "{most_lost} steps were lost");
}

#[test]
fn thirty_random_kills_of_the_whole_job_change_nothing() {
    random_kills(30, 15);
}

#[test]
#[ignore = "make soak-checkpoint"]
fn a_thousand_random_kills_of_the_whole_job_change_nothing() {
    random_kills(1000, 50);
}

// ---- Other numbers of ranks -------------------------------------------------------------------------------------------------

/// Which state any number of ranks reads of any other's is trainer/tests/elastic.rs's; here are the rows.
#[test]
fn over_four_two_three_one_and_four_ranks_each_row_is_trained_on_once() {
    let whole = Run::new();
    let settings = ["train.steps=10", "train.micro_rows=1", "checkpoint.every_steps=100"];
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
    let entries = fs::read_dir(run.folder.path().join("checkpoints")).expect("checkpoints");
    let mut names: Vec<String> = entries
        .map(|entry| entry.expect("an entry").file_name().into_string().expect("a name"))
        .collect();
    names.sort();
    names
}

#[test]
fn a_full_disk_is_said_and_after_three_failures_ends_the_run_with_what_was_there() {
    let run = Run::new();
    let folder = run.folder.path().join("checkpoints");
    // One checkpoint of LoRA's and the norms' state takes about 130 KiB.
    let Some(disk) = Small::mount(&folder, 200) else { return };
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
    let taken = run.metrics().len();
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
        "train.steps=300",
        "checkpoint.every_steps=20",
        "checkpoint.failures_in_a_row=1000",
    ];
    succeed(train(&whole, 2, &settings));
    let run = Run::new();
    let folder = run.folder.path().join("checkpoints");
    let Some(disk) = Small::mount(&folder, 8192) else {
        return;
    };
    let mut job = train(&run, 2, &settings);
    job.arg("debug.check_ranks_equal=true")
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    let mut job = job.spawn().expect("the program starts");
    wait_for(&mut job, || run.metrics().len() > 40);
    disk.becomes("ro");
    let broken = run.metrics().len();
    wait_for(&mut job, || run.metrics().len() > broken + 60);
    disk.becomes("rw");
    let output = job.wait_with_output().expect("the program ends");
    let said = text(&output);
    assert!(output.status.success(), "{said}");
    assert!(said.contains("Read-only file system"), "{said}");
    assert!(said.contains("checkpoints can be written again: step "), "{said}");
    assert_eq!(run.losses(), whole.losses());
    assert_eq!(run.state(300), whole.state(300));
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
    wait_for(&mut job, || run.metrics().len() > 25);
    fs::rename(
        run.folder.path().join("checkpoints"),
        run.folder.path().join("elsewhere"),
    )
    .expect("renamed");
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
    wait_for(&mut old, || run.metrics().len() > 25);
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
            "checkpoint.safety_seconds=2",
        ],
    );
    let now = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .expect("after 1970");
    let end = now.as_secs() + 12;
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
    assert_eq!(newest_step(&run), run.metrics().len() as u64);
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
        shown.contains("4 steps taken, 4 updates") && shown.contains("next row 48"),
        "{shown}"
    );
    assert!(text(&ours(&["show", "--step", "5"])).contains("there are those of 2, 4, 6, 8"));
    let slice = run
        .folder
        .path()
        .join("checkpoints/step-00000004/slice-00001-of-00002.safetensors");
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
