//! Seeded chaos: a fault every 30 to 60 seconds while a run goes on, and at the end the weights of an undisturbed run, to the bit.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::json;
use whole_program_tests::{Run, root, text};

use crate::fixture::{Cluster, NODES, signal};
use crate::training::{MINUTE, Training};

/// SplitMix64: the same faults in the same order for the same seed.
struct Chance(u64);

impl Chance {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % n
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Fault {
    RankKilled,
    RankFrozen,
    SrunKilled,
    StepDaemonKilled,
    CableOut,
    NodeFrozen,
    Preempted,
}

const FAULTS: [Fault; 7] = [
    Fault::RankKilled,
    Fault::RankFrozen,
    Fault::SrunKilled,
    Fault::StepDaemonKilled,
    Fault::CableOut,
    Fault::NodeFrozen,
    Fault::Preempted,
];

/// Frozen nodes and pulled cables come back after this.
const OUTAGE: Duration = Duration::from_secs(12);

fn inject(cluster: &Cluster, job: u32, fault: Fault, chance: &mut Chance) -> String {
    let node = NODES[chance.below(NODES.len() as u64) as usize];
    let kill_all = |name: &str, nodes: &[&str], wanted: &dyn Fn(&str) -> bool| {
        let all = nodes.iter().flat_map(|node| cluster.processes(node));
        for process in all.filter(|process| process.name == name && wanted(&process.line)) {
            signal(process.id, Signal::SIGKILL);
        }
    };
    match fault {
        Fault::RankKilled | Fault::RankFrozen => {
            let how = if fault == Fault::RankKilled {
                Signal::SIGKILL
            } else {
                Signal::SIGSTOP
            };
            for rank in cluster.ranks(node) {
                signal(rank.id, how);
            }
        }
        Fault::SrunKilled => kill_all("srun", &NODES, &|_| true),
        Fault::StepDaemonKilled => kill_all("slurmstepd", &[node], &|line| {
            !line.contains("batch") && !line.contains("extern")
        }),
        Fault::CableOut => {
            cluster.link(node, false);
            std::thread::sleep(OUTAGE);
            cluster.link(node, true);
        }
        Fault::NodeFrozen => {
            cluster.freeze(node);
            std::thread::sleep(OUTAGE);
            cluster.thaw(node);
        }
        // As a partition of higher priority does it.
        Fault::Preempted => drop(cluster.said("scontrol", &["requeue", &job.to_string()])),
    }
    format!("{fault:?} on {node}")
}

/// Most of a step is waiting for the network then, as in large jobs: steps are long enough to be hit in each of their parts, and
/// other work on this machine changes their pace little.
const CABLES: &str = "100mbit";
/// More than the share of the time that faults leave: the run is a little longer than the chaos, which has all its minutes.
const SIZED_FOR: f64 = 0.7;

/// Four ranks with these settings, here and on this machine without a cluster.
fn settings(steps: u64) -> Vec<String> {
    let steps = format!("train.steps={steps}");
    let others = ["checkpoint.every_steps=2", "launch.threads_per_rank=1"];
    [&[steps.as_str()], &others[..]]
        .concat()
        .into_iter()
        .map(str::to_owned)
        .collect()
}

const FOUR: [&str; 2] = ["nodes=4", "ranks_per_node=1"];

fn soak(minutes: u64, seed: u64) {
    let Some(cluster) = Cluster::up() else { return };
    NODES.iter().for_each(|node| cluster.slow(node, CABLES));
    let (pace, steps) = sized(&cluster, minutes);
    let settings = settings(steps);
    // Beside the chaos, and out of its reach.
    let undisturbed = std::thread::spawn({
        let settings = settings.clone();
        move || undisturbed(&settings)
    });

    let words: Vec<&str> = settings.iter().map(String::as_str).collect();
    let training = Training::new(&cluster, &words);
    let mut chance = Chance(seed);
    let mut counts: BTreeMap<Fault, usize> = BTreeMap::new();
    let began = Instant::now();
    let mut job = training.submit(&FOUR);
    let mut submissions = 1;
    let is_over = |job: u32| {
        !["PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED"].contains(&cluster.job(job).state.as_str())
    };
    training.wait_for_step(0);
    loop {
        let pause = Duration::from_secs(30 + chance.below(31));
        let until = Instant::now() + pause;
        while Instant::now() < until && !is_over(job) {
            std::thread::sleep(Duration::from_millis(200));
        }
        if is_over(job) {
            let ended = cluster.job(job);
            if ended.state == "COMPLETED" {
                break;
            }
            // A user who finds his job ended by Slurm itself (a killed srun's job may be) submits the same line again.
            submissions += 1;
            eprintln!(
                "{:.0} s: job ended as {} ({}); submitted again",
                began.elapsed().as_secs_f64(),
                ended.state,
                ended.code
            );
            assert!(submissions < 20, "{}", training.said());
            job = training.submit(&FOUR);
            continue;
        }
        assert!(
            began.elapsed() < Duration::from_secs(60 * minutes * 4),
            "{}",
            training.said()
        );
        if began.elapsed() < Duration::from_secs(60 * minutes) {
            let fault = FAULTS[chance.below(FAULTS.len() as u64) as usize];
            let what = inject(&cluster, job, fault, &mut chance);
            *counts.entry(fault).or_default() += 1;
            eprintln!(
                "{:.0} s: {what}, at step {}",
                began.elapsed().as_secs_f64(),
                training.run.metrics().len()
            );
        }
    }
    let disturbed = began.elapsed().as_secs_f64();
    let whole = undisturbed.join().expect("the undisturbed run finishes");
    let faults: usize = counts.values().sum();
    let equal = training.run.losses() == whole.losses() && training.digests(steps) == whole.state(steps);
    let effective = steps as f64 * pace / disturbed;
    eprintln!("{faults} faults {counts:?}; {steps} steps of {pace:.3} s in {disturbed:.0} s; equal: {equal}");
    write_figures(&[
        ("soak_faults", faults as f64, "faults"),
        ("soak_minutes", disturbed / 60.0, "min"),
        ("soak_steps", steps as f64, "steps"),
        ("soak_submissions", submissions as f64, "submissions"),
        ("soak_digest_equal", f64::from(equal), "1 or 0"),
        ("soak_effective_share", effective, "of the time"),
    ]);
    assert!(equal, "{}", training.said());
}

/// Seconds of a step that nothing disturbs, saves included, on this cluster as it is; and how many of them fill so many minutes.
fn sized(cluster: &Cluster, minutes: u64) -> (f64, u64) {
    const STEPS: u64 = 30;
    let settings = settings(STEPS);
    let words: Vec<&str> = settings.iter().map(String::as_str).collect();
    let sample = Training::new(cluster, &words);
    let job = sample.submit(&FOUR);
    sample.check_completed(job, 10 * MINUTE);
    let metrics = sample.run.metrics();
    let at = |step: usize| metrics[step]["unix_time"].as_f64().expect("a time");
    let (first, last) = (10, STEPS as usize - 1);
    let pace = (at(last) - at(first)) / (last - first) as f64;
    let steps = (60.0 * minutes as f64 * SIZED_FOR / pace / 10.0).ceil() as u64 * 10;
    eprintln!("a step takes {pace:.3} s undisturbed; {steps} steps for {minutes} minutes");
    (pace, steps)
}

/// The same steps on as many ranks of this machine. Its time does not count.
fn undisturbed(settings: &[String]) -> Run {
    let run = Run::new();
    let words: Vec<&str> = settings.iter().map(String::as_str).collect();
    let train = run.train(&words);
    // Behind the cluster, whose time counts; and gone with this test.
    let mut patient = std::process::Command::new("setpriv");
    patient
        .args(["--pdeathsig", "KILL", "nice", "-n10"])
        .arg(train.get_program())
        .args(train.get_args());
    patient.args(["train.micro_rows=1", "-n", "4", "--restarts", "9"]);
    let output = patient.current_dir(root()).output().expect("setpriv starts");
    assert!(output.status.success(), "{}", text(&output));
    run
}

/// Into bench/results/cluster.json; figures measured again replace the old ones.
pub fn write_figures(figures: &[(&str, f64, &str)]) {
    let file: &Path = &root().join("bench/results/cluster.json");
    let text = std::fs::read_to_string(file).unwrap_or_else(|_| "[]".to_owned());
    let mut entries: Vec<serde_json::Value> = serde_json::from_str(&text).expect("a list of figures");
    for (name, ours, unit) in figures {
        entries.retain(|entry| entry["name"] != *name);
        entries.push(json!({ "name": name, "ours": (ours * 1000.0).round() / 1000.0, "unit": unit }));
    }
    let text = serde_json::to_string_pretty(&entries).expect("JSON") + "\n";
    std::fs::write(file, text).expect("figures are written");
}

#[test]
#[ignore = "make bench-cluster"]
fn figures() {
    let Some(cluster) = Cluster::up() else { return };
    let (mut first_step, mut recovered) = (vec![], vec![]);
    for _ in 0..3 {
        let training = Training::new(&cluster, &["train.steps=400", "checkpoint.every_steps=10"]);
        let began = Instant::now();
        let job = training.submit(&FOUR);
        training.wait_for_step(0);
        first_step.push(began.elapsed().as_secs_f64());
        training.wait_for_step(25);
        let began = Instant::now();
        for rank in cluster.ranks("n3") {
            signal(rank.id, Signal::SIGKILL);
        }
        // Recovered: the first step that had not been taken before.
        let taken = training.run.metrics().len();
        training.wait_for_words("rank 2 on n3", MINUTE);
        cluster.wait_until("new steps", MINUTE, || {
            training.said().contains("resumed from step ") && training.run.metrics().len() > taken + 1
        });
        recovered.push(began.elapsed().as_secs_f64());
        cluster.must("scancel", &[&job.to_string()]);
        cluster.ended(job, MINUTE);
    }
    let median = |values: &mut Vec<f64>| {
        values.sort_by(f64::total_cmp);
        values[values.len() / 2]
    };
    crate::figure("sbatch_to_first_step_s", median(&mut first_step));
    crate::figure("recovered_s", median(&mut recovered));
}

#[test]
#[ignore = "make soak"]
fn thirty_minutes() {
    soak(30, 7);
}

#[test]
#[ignore = "a first look before make soak"]
fn two_minutes() {
    soak(2, 7);
}
