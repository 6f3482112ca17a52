//! What happens to jobs: ranks that die or hang, nodes that freeze, cables that are pulled, daemons that are killed. All of it is
//! noticed and named, nothing stays behind, and the run goes on to the weights of an undisturbed one.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use crate::fixture::{Cluster, NODES, Process, signal};
use crate::training::{MINUTE, SETTINGS, SLOWLY, Training, check_no_orphans, undisturbed};

/// Four ranks under `panglot submit`, some steps on their way.
fn under_way<'a>(cluster: &'a Cluster, nodes: &[&str]) -> (Training<'a>, u32) {
    // First, so that it is not in the way of what is measured.
    undisturbed(cluster);
    let training = Training::new(cluster, &SETTINGS);
    let job = training.submit(&[nodes, &[SLOWLY]].concat());
    training.wait_for_step(6);
    (training, job)
}

const FOUR: [&str; 2] = ["nodes=4", "ranks_per_node=1"];
const TWO_BY_TWO: [&str; 2] = ["nodes=2", "ranks_per_node=2"];

fn goes_on_equal(training: &Training, job: u32) {
    training.check_completed(job, 4 * MINUTE);
    training.check_equals_undisturbed();
    check_no_orphans(training.cluster, Duration::from_secs(10));
}

/// Seconds until none of these processes is left.
fn seconds_until_gone(cluster: &Cluster, ranks: &[Process], limit: Duration) -> f64 {
    let began = Instant::now();
    let is_there = |rank: &Process| Path::new(&format!("/proc/{}/exe", rank.id)).exists();
    cluster.wait_until("the end of these ranks", limit, || !ranks.iter().any(is_there));
    began.elapsed().as_secs_f64()
}

/// What a killed rank leads to: all stopped within seconds, the culprit named, the run gone on and equal to the bit.
fn a_rank_is_killed(kill_on_bad_exit: &str) {
    let Some(cluster) = Cluster::up() else { return };
    undisturbed(&cluster);
    let training = Training::new(&cluster, &SETTINGS);
    let words = [&FOUR[..], &[SLOWLY]].concat();
    let job = training.submit_changed(&words, &[("--kill-on-bad-exit=1", kill_on_bad_exit)]);
    training.wait_for_step(6);
    let ranks = cluster.all_ranks();
    signal(cluster.ranks("n3")[0].id, Signal::SIGKILL);
    let stopped = seconds_until_gone(&cluster, &ranks, Duration::from_secs(10));
    goes_on_equal(&training, job);
    let said = training.said();
    assert!(stopped < 5.0, "all stopped after {stopped:.1} s only: {said}");
    assert!(said.contains("rank 2 on n3"), "the culprit is named: {said}");
    assert!(said.contains("resumed from"), "{said}");
    assert_eq!(cluster.job(job).restarts, 0, "the nodes are kept: {said}");
    crate::figure("all_stopped_under_slurm_s", stopped);
}

#[test]
fn a_killed_rank_is_named_and_the_run_goes_on() {
    a_rank_is_killed("--kill-on-bad-exit=1");
}

#[test]
#[ignore = "make test-cluster"]
fn a_killed_rank_ends_the_others_though_srun_does_not() {
    a_rank_is_killed("--kill-on-bad-exit=0");
}

/// `panglot train -n 4` in the batch shell, which starts mpirun over the job's nodes.
fn under_mpirun(cluster: &Cluster) -> (Training<'_>, u32) {
    let training = Training::new(cluster, &SETTINGS);
    let lines = format!("\"$panglot\" train \"${{settings[@]}}\" -n 4 {SLOWLY}\nexit $?");
    let job = training.sbatch("4", "1", &lines);
    training.wait_for_step(6);
    for node in NODES {
        assert_eq!(cluster.ranks(node).len(), 1, "mpirun gives each node its rank");
    }
    (training, job)
}

#[test]
#[ignore = "make test-cluster"]
fn under_mpirun_a_killed_rank_ends_all() {
    let Some(cluster) = Cluster::up() else { return };
    let (training, job) = under_mpirun(&cluster);
    let ranks = cluster.all_ranks();
    signal(cluster.ranks("n2")[0].id, Signal::SIGKILL);
    let stopped = seconds_until_gone(&cluster, &ranks, Duration::from_secs(10));
    check_no_orphans(&cluster, Duration::from_secs(10));
    training.check_ended(job, MINUTE, ("FAILED", 76));
    let said = training.said();
    assert!(said.contains("rank 1 on n2") && stopped < 5.0, "{stopped:.1} s: {said}");
}

#[test]
#[ignore = "make test-cluster"]
fn under_mpirun_nothing_outlives_mpirun() {
    let Some(cluster) = Cluster::up() else { return };
    let (training, job) = under_mpirun(&cluster);
    let mpirun = named(&cluster, "n1", |process| {
        ["mpirun", "orterun"].contains(&process.name.as_str())
    });
    assert_eq!(mpirun.len(), 1, "{mpirun:?}");
    signal(mpirun[0].id, Signal::SIGKILL);
    check_no_orphans(&cluster, Duration::from_secs(10));
    let ended = cluster.ended(job, MINUTE);
    assert_eq!(ended.state, "FAILED", "{}", training.said());
}

fn named(cluster: &Cluster, node: &str, is: impl Fn(&Process) -> bool) -> Vec<Process> {
    cluster.processes(node).into_iter().filter(is).collect()
}

#[test]
#[ignore = "make test-cluster"]
fn a_hung_rank_is_named_in_step_load_and_save() {
    let Some(cluster) = Cluster::up() else { return };
    undisturbed(&cluster);
    for (when, said_of_it) in [("step", "in step "), ("load", "loading"), ("save", "saving")] {
        let training = Training::new(&cluster, &["train.steps=40"]);
        let saves: &[&str] = match when {
            // Saves go on beside the steps, unless no step may be lost.
            "save" => &["checkpoint.every_steps=1", "checkpoint.lose_at_most=1"],
            _ => &["checkpoint.every_steps=4"],
        };
        let job = training.submit(&[&FOUR[..], &[SLOWLY], saves].concat());
        match when {
            "step" => training.wait_for_step(6),
            "load" => {
                let log = training.run.folder.path().join("logs/rank-1.log");
                let met = || fs::read_to_string(&log).is_ok_and(|log| log.contains("the ranks have met"));
                quickly(met);
            }
            _ => {
                training.wait_for_step(6);
                quickly(|| is_saving(&training));
            }
        }
        let began = Instant::now();
        signal(cluster.ranks("n2")[0].id, Signal::SIGSTOP);
        training.wait_for_words("rank 1 on n2", Duration::from_secs(30));
        let named = began.elapsed().as_secs_f64();
        let said = training.said();
        let line = said
            .lines()
            .find(|line| line.contains("rank 1 on n2"))
            .unwrap_or_default();
        eprintln!("in {when}, after {named:.1} s: {line}");
        assert!(
            named < 10.0 && line.contains("gave no sign for "),
            "{named:.1} s: {said}"
        );
        assert!(line.contains(said_of_it), "stopped in {when}: {line}");
        goes_on_equal(&training, job);
        crate::figure("hang_named_under_slurm_s", named);
    }
}

/// Where a tenth of a second would be too late.
fn quickly(mut there: impl FnMut() -> bool) {
    let began = Instant::now();
    while !there() {
        assert!(began.elapsed() < MINUTE, "waited in vain");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn is_saving(training: &Training) -> bool {
    let checkpoints = fs::read_dir(training.run.folder.path().join("checkpoints"));
    let mut entries = checkpoints.into_iter().flatten().flatten();
    entries.any(|entry| entry.file_name().to_string_lossy().ends_with(".partial"))
}

#[test]
#[ignore = "make test-cluster"]
fn a_cut_cable_stops_both_sides_and_the_run_goes_on() {
    let Some(cluster) = Cluster::up() else { return };
    let (training, job) = under_way(&cluster, &TWO_BY_TWO);
    let ranks = cluster.all_ranks();
    cluster.link("n2", false);
    let stopped = seconds_until_gone(&cluster, &ranks, Duration::from_secs(30));
    cluster.link("n2", true);
    eprintln!("both sides stopped after {stopped:.1} s");
    assert!(stopped < 10.0, "{stopped:.1} s: {}", training.said());
    goes_on_equal(&training, job);
}

#[test]
#[ignore = "make test-cluster"]
fn a_thawed_node_writes_nothing() {
    let Some(cluster) = Cluster::up() else { return };
    let (training, job) = under_way(&cluster, &TWO_BY_TWO);
    let stale = cluster.ranks("n2");
    assert_eq!(stale.len(), 2);
    // The second node: the batch script runs on the first.
    cluster.freeze("n2");
    cluster.wait_until("the requeue", 2 * MINUTE, || cluster.job(job).restarts >= 1);
    cluster.wait_until("steps of the next attempt", 2 * MINUTE, || {
        cluster.job(job).state == "RUNNING" && training.run.metrics().len() > 8
    });
    let names = names_in(&training.run.folder.path().join("checkpoints"));
    cluster.thaw("n2");
    seconds_until_gone(&cluster, &stale, Duration::from_secs(15));
    goes_on_equal(&training, job);
    assert!(!names.is_empty());
    // One job, two attempts, and of the first nothing but what the second resumed from.
    let lock = fs::read_to_string(training.run.folder.path().join("run.lock")).expect("the fence");
    let partial = names_in(&training.run.folder.path().join("checkpoints"));
    assert!(
        !partial.iter().any(|name| name.contains(".partial")),
        "{partial:?}, {lock}"
    );
}

fn names_in(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect()
}

#[test]
#[ignore = "make test-cluster"]
fn whatever_of_slurm_s_is_killed_no_rank_stays() {
    let Some(cluster) = Cluster::up() else { return };
    for victim in ["srun", "slurmstepd"] {
        let (training, job) = under_way(&cluster, &FOUR);
        // The step's daemons, and not the batch script's.
        let is_victim = |process: &Process| process.name == victim && !process.line.contains("batch");
        let found: Vec<Process> = NODES.iter().flat_map(|node| named(&cluster, node, is_victim)).collect();
        assert!(!found.is_empty(), "no {victim} to kill");
        let ranks = cluster.all_ranks();
        for process in &found {
            signal(process.id, Signal::SIGKILL);
        }
        let gone = seconds_until_gone(&cluster, &ranks, Duration::from_secs(10));
        eprintln!("{} × {victim} killed: no rank is left after {gone:.1} s", found.len());
        let left = cluster
            .all_ranks()
            .into_iter()
            .filter(|rank| ranks.iter().any(|old| old.id == rank.id));
        let left = left.count();
        crate::figure("orphans", left as f64);
        assert_eq!(left, 0, "{}", training.said());
        // The script notices that srun waits in vain, and the run goes on.
        goes_on_equal(&training, job);
    }
}

#[test]
#[ignore = "make test-cluster"]
fn a_slow_link_is_slow_and_no_alarm() {
    let Some(cluster) = Cluster::up() else { return };
    undisturbed(&cluster);
    let training = Training::new(&cluster, &SETTINGS);
    cluster.slow("n3", "100mbit");
    let job = training.submit(&FOUR);
    training.check_completed(job, 4 * MINUTE);
    let said = training.said();
    assert!(
        !said.contains("gave no sign") && !said.contains("resumed from"),
        "{said}"
    );
    let seconds = training
        .run
        .metrics()
        .iter()
        .map(|step| step["seconds"].as_f64().unwrap_or(0.0))
        .sum::<f64>();
    eprintln!("{seconds:.1} s for 40 steps");
    training.check_equals_undisturbed();
}

/// Strangers knock at rank 0's port while a job is under way: it was closed when all ranks had met.
#[test]
#[ignore = "make test-cluster"]
fn of_a_thousand_strangers_none_gets_in() {
    let Some(cluster) = Cluster::up() else { return };
    let (training, job) = under_way(&cluster, &FOUR);
    let said = training.said();
    // "the ranks meet on eth0 (10.77.0.1:41035)"
    let address = said
        .split("the ranks meet on ")
        .nth(1)
        .and_then(|rest| rest.split(['(', ')', ',']).nth(1));
    let address = address.unwrap_or_else(|| panic!("no address: {said}"));
    let mut knock = cluster.login(whole_program_tests::program("test-cluster"));
    let output = knock.args(["knock", address, "1000"]).output().expect("nsenter starts");
    let accepted = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    assert_eq!(accepted, "0", "{address}: {}", whole_program_tests::text(&output));
    goes_on_equal(&training, job);
    assert!(
        !training.said().contains("resumed from"),
        "it went on undisturbed: {}",
        training.said()
    );
}
