//! Jobs as users submit them: they run, stop at the wall time, go on, survive lost ranks and nodes, and end with the code they
//! should. Digests are compared with undisturbed runs' on as many ranks.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use whole_program_tests::{Run, prepared, program, root, text};

use crate::fixture::{Cluster, NODES, number, signal};

pub const MINUTE: Duration = Duration::from_secs(60);
const STEPS: u64 = 40;

/// A run of the tiny config on this cluster. `settings` go to every command about it.
pub struct Training<'a> {
    pub cluster: &'a Cluster,
    pub run: Run,
    settings: Vec<String>,
}

impl<'a> Training<'a> {
    pub fn new(cluster: &'a Cluster, settings: &[&str]) -> Training<'a> {
        let run = Run::new();
        let mut all = vec![
            format!("folders.prepared={}", prepared().display()),
            format!("folders.run={}", run.folder.path().display()),
            // 12 rows divide among 4 ranks.
            "train.micro_rows=1".to_owned(),
        ];
        all.extend(settings.iter().map(|setting| (*setting).to_owned()));
        Training {
            cluster,
            run,
            settings: all,
        }
    }

    /// `panglot WORDS configs/tiny.yaml SETTINGS` on the login node.
    pub fn panglot(&self, words: &[&str], more: &[&str]) -> Command {
        let mut command = self.cluster.login(program("panglot"));
        command
            .args(words)
            .arg("configs/tiny.yaml")
            .args(&self.settings)
            .args(more);
        command
    }

    /// Submitted by `panglot submit`.
    pub fn submit(&self, more: &[&str]) -> u32 {
        let output = format!("output={}", self.out().display());
        let mut command = self.panglot(&["submit"], more);
        command.arg(&output).arg("--json");
        let output = command.output().expect("nsenter starts");
        let said: serde_json::Value =
            serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{}", text(&output)));
        said["jobs"][0].as_u64().expect("a job's number") as u32
    }

    /// As `submit`, with something in the script replaced.
    pub fn submit_changed(&self, more: &[&str], changes: &[(&str, &str)]) -> u32 {
        let output = format!("output={}", self.out().display());
        let mut command = self.panglot(&["submit", "--dry-run"], more);
        let output = command.arg(&output).output().expect("nsenter starts");
        assert!(output.status.success(), "{}", text(&output));
        let mut content = String::from_utf8_lossy(&output.stdout).into_owned();
        for (from, to) in changes {
            assert!(content.contains(from), "{content}");
            content = content.replace(from, to);
        }
        let script = self.run.folder.path().join("changed.sbatch");
        fs::write(&script, content).expect("a script");
        self.cluster.sbatch(&[&script.display().to_string()])
    }

    /// A script of the test's own as a job, on `nodes` nodes of `ranks` ranks; `$panglot` and `$settings` are set in it.
    pub fn sbatch(&self, nodes: &str, ranks: &str, lines: &str) -> u32 {
        let script = self.cluster.folder().join("test.sbatch");
        let settings: Vec<String> = self.settings.iter().map(|setting| format!("'{setting}'")).collect();
        let content = format!(
            "#!/bin/bash\npanglot='{}'\nsettings=(configs/tiny.yaml {})\n{lines}\n",
            program("panglot").display(),
            settings.join(" ")
        );
        fs::write(&script, content).expect("a script");
        let out = self.out().display().to_string();
        let script = script.display().to_string();
        self.cluster.sbatch(&[
            "--nodes",
            nodes,
            "--ntasks-per-node",
            ranks,
            "--output",
            &out,
            "--open-mode=append",
            &script,
        ])
    }

    fn out(&self) -> std::path::PathBuf {
        self.run.folder.path().join("job.out")
    }

    pub fn said(&self) -> String {
        fs::read_to_string(self.out()).unwrap_or_default()
    }

    pub fn wait_for_step(&self, step: usize) {
        self.cluster
            .wait_until(&format!("step {step}"), MINUTE, || self.run.metrics().len() > step);
    }

    pub fn check_completed(&self, job: u32, limit: Duration) {
        let ended = self.cluster.ended(job, limit);
        assert_eq!((ended.state.as_str(), ended.code), ("COMPLETED", 0), "{}", self.said());
    }

    /// The digests of the last checkpoint's slices.
    pub fn digests(&self, steps: u64) -> Vec<String> {
        self.run.state(steps)
    }
}

/// The same steps on as many ranks, undisturbed.
fn undisturbed(cluster: &Cluster, nodes: usize, ranks_per_node: usize) -> Training<'_> {
    let training = Training::new(cluster, &settings());
    let job = training.submit(&[&format!("nodes={nodes}"), &format!("ranks_per_node={ranks_per_node}")]);
    training.check_completed(job, 3 * MINUTE);
    training
}

fn settings() -> [&'static str; 2] {
    ["train.steps=40", "checkpoint.every_steps=4"]
}

/// Steps that come slowly enough to be disturbed; the rows, and so the losses, are the same.
const SLOWLY: &str = "debug.check_ranks_equal=true";

fn check_equal(disturbed: &Training, whole: &Training) {
    assert_eq!(disturbed.run.losses(), whole.run.losses(), "{}", disturbed.said());
    assert_eq!(disturbed.digests(STEPS), whole.digests(STEPS));
}

/// After whatever happened nothing of ours may be left on any node.
fn check_no_orphans(cluster: &Cluster, within: Duration) {
    cluster.wait_until("no process of ours is left", within, || cluster.ours().is_empty());
}

#[test]
fn sbatch_runs_four_nodes_of_one_rank_and_two_nodes_of_two() {
    let Some(cluster) = Cluster::up() else { return };
    for (nodes, ranks) in [("4", "1"), ("2", "2")] {
        let training = Training::new(&cluster, &["train.steps=6"]);
        let out = training.out().display().to_string();
        let words = [
            "--nodes",
            nodes,
            "--ntasks-per-node",
            ranks,
            "--output",
            &out,
            "slurm/train.sbatch",
            "configs/tiny.yaml",
        ];
        let settings: Vec<&str> = training.settings.iter().map(String::as_str).collect();
        let job = cluster.sbatch(&[&words[..], &settings].concat());
        training.check_completed(job, 2 * MINUTE);
        assert_eq!(training.run.losses().len(), 6, "{}", training.said());
    }
    check_no_orphans(&cluster, Duration::from_secs(10));
}

#[test]
fn submitted_stopped_for_time_and_gone_on_equals_undisturbed() {
    let Some(cluster) = Cluster::up() else { return };
    let whole = undisturbed(&cluster, 2, 2);
    let training = Training::new(&cluster, &settings());
    let job = training.submit(&["nodes=2", "ranks_per_node=2", SLOWLY]);
    training.wait_for_step(6);
    // What Slurm does before the wall time, by the script's own --signal=USR1@120.
    cluster.must("scancel", &["--signal=USR1", &format!("{job}.0")]);
    cluster.wait_until("the requeue", MINUTE, || cluster.job(job).restarts == 1);
    assert!(
        training
            .said()
            .contains("a checkpoint is written, more time is wanted (75)"),
        "{}",
        training.said()
    );
    assert!((training.run.metrics().len() as u64) < STEPS, "it was stopped in time");
    training.check_completed(job, 3 * MINUTE);
    check_equal(&training, &whole);

    // A finished run's job ends at once, and says why.
    let began = Instant::now();
    let again = training.submit(&["nodes=2", "ranks_per_node=2"]);
    training.check_completed(again, MINUTE);
    assert!(
        training
            .said()
            .contains("all 40 steps are taken; nothing is left to do"),
        "{}",
        training.said()
    );
    assert!(began.elapsed() < Duration::from_secs(20));
}

#[test]
fn a_config_that_does_not_fit_is_not_tried_again() {
    let Some(cluster) = Cluster::up() else { return };
    let training = Training::new(&cluster, &settings());
    // On this rank's node only: the launcher of rank 1 is given another config than the others, by a script of its own.
    let job = training.sbatch(
        "2",
        "1",
        "srun --mpi=pmix --kill-on-bad-exit=1 \"$panglot\" train \"${settings[@]}\" train.sequence_length=100000\n\
         code=$?\n\
         \"$panglot\" job ended --code $code --series \"$SLURM_JOB_ID\" \"${settings[@]}\"\n\
         exit $?",
    );
    let ended = cluster.ended(job, MINUTE);
    assert_eq!(
        (ended.state.as_str(), ended.code, ended.restarts),
        ("FAILED", 2, 0),
        "{}",
        training.said()
    );
}

#[test]
fn host_lists_are_written_out_as_scontrol_does() {
    let Some(cluster) = Cluster::up() else { return };
    let lists = [
        "n1",
        "gpu[001-003,010],rack[1-2]n[01-02]",
        "n[9-11]",
        "n[098-101]",
        "b,a,b",
        "x[2,1]",
        "nid[000007]",
        "a[1-2]b[3-4]c[5-6]",
        "a[1-2]b[3-4]c[5-6]d[7-8]",
        "login,n[1-4],n[0010-0012]",
    ];
    for list in lists {
        let output = cluster
            .login("scontrol")
            .args(["show", "hostnames", list])
            .output()
            .expect("nsenter starts");
        let theirs: Vec<String> = String::from_utf8_lossy(&output.stdout)
            .lines()
            .map(str::to_owned)
            .collect();
        assert_eq!(launcher::hostlist::parse(list).expect(list), theirs, "{list}");
    }
}

#[test]
fn names_that_mean_harm_are_names() {
    let Some(cluster) = Cluster::up() else { return };
    let training = Training::new(&cluster, &["train.steps=3"]);
    let touched = training.run.folder.path().join("touched");
    // The run's folder has the worst of names; the job script meets it as a word.
    let hostile = format!(
        "{}/a b'c\"d$(touch touched)`touch touched`;#\\",
        training.run.folder.path().display()
    );
    let job = training.submit(&["nodes=2", "ranks_per_node=1", &format!("folders.run={hostile}")]);
    training.check_completed(job, MINUTE);
    assert!(
        Path::new(&hostile).join("metrics.jsonl").is_file(),
        "{}",
        training.said()
    );
    assert!(
        !root().join("touched").exists() && !touched.exists(),
        "a name was executed"
    );
    // What Slurm itself would have to quote is refused.
    let output = training
        .panglot(&["submit"], &["job_name=$(touch touched)"])
        .output()
        .expect("nsenter starts");
    assert_eq!(output.status.code(), Some(2), "{}", text(&output));
}

/// What a killed rank leads to: all stopped within seconds, the culprit named, the run gone on and equal to the bit.
fn a_rank_is_killed(kill_on_bad_exit: &str) {
    let Some(cluster) = Cluster::up() else { return };
    let whole = undisturbed(&cluster, 4, 1);
    let training = Training::new(&cluster, &settings());
    let job = training.submit_changed(&["nodes=4", SLOWLY], &[("--kill-on-bad-exit=1", kill_on_bad_exit)]);
    training.wait_for_step(6);
    let ranks = cluster.all_ranks();
    let began = Instant::now();
    signal(cluster.ranks("n3")[0].id, Signal::SIGKILL);
    let is_there = |id: i32| Path::new(&format!("/proc/{id}/exe")).exists();
    cluster.wait_until("all ranks gone", Duration::from_secs(10), || {
        !ranks.iter().any(|rank| is_there(rank.id))
    });
    let stopped = began.elapsed().as_secs_f64();
    let steps = training.run.metrics().len();
    cluster.wait_until("the next attempt's steps", MINUTE, || {
        training.said().contains("resumed from") && training.run.metrics().len() > steps.min(8)
    });
    let recovered = began.elapsed().as_secs_f64();
    training.check_completed(job, 3 * MINUTE);
    let said = training.said();
    assert!(stopped < 5.0, "all stopped after {stopped:.1} s only: {said}");
    assert!(said.contains("rank 2 on n3"), "the culprit is named: {said}");
    assert_eq!(cluster.job(job).restarts, 0, "the nodes are kept: {said}");
    check_equal(&training, &whole);
    check_no_orphans(&cluster, Duration::from_secs(10));
    crate::figure("all_stopped_under_slurm_s", stopped);
    crate::figure("recovered_s", recovered);
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

#[test]
#[ignore = "make test-cluster"]
fn under_mpirun_a_killed_rank_ends_all() {
    let Some(cluster) = Cluster::up() else { return };
    let training = Training::new(&cluster, &settings());
    let lines = format!(
        "export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1\n\"$panglot\" train \"${{settings[@]}}\" -n 4 {SLOWLY}\nexit $?"
    );
    let job = training.sbatch("4", "1", &lines);
    training.wait_for_step(6);
    signal(cluster.ranks("n2")[0].id, Signal::SIGKILL);
    check_no_orphans(&cluster, Duration::from_secs(10));
    let ended = cluster.ended(job, MINUTE);
    assert_eq!(ended.state, "FAILED", "{}", training.said());
    assert!(training.said().contains("on n2"), "{}", training.said());
}

#[test]
#[ignore = "make test-cluster"]
fn a_hung_rank_is_named_and_the_run_goes_on() {
    let Some(cluster) = Cluster::up() else { return };
    let whole = undisturbed(&cluster, 4, 1);
    let training = Training::new(&cluster, &settings());
    let job = training.submit(&["nodes=4", "ranks_per_node=1", SLOWLY]);
    training.wait_for_step(6);
    let began = Instant::now();
    signal(cluster.ranks("n2")[0].id, Signal::SIGSTOP);
    cluster.wait_until("the hang is named", Duration::from_secs(30), || {
        training.said().contains("rank 1 on n2")
    });
    let named = began.elapsed().as_secs_f64();
    training.check_completed(job, 3 * MINUTE);
    check_equal(&training, &whole);
    crate::figure("hang_named_under_slurm_s", named);
}

#[test]
#[ignore = "make test-cluster"]
fn a_cut_cable_stops_both_sides_and_the_run_goes_on() {
    let Some(cluster) = Cluster::up() else { return };
    let whole = undisturbed(&cluster, 2, 2);
    let training = Training::new(&cluster, &settings());
    let job = training.submit(&["nodes=2", "ranks_per_node=2", SLOWLY]);
    training.wait_for_step(6);
    cluster.link("n2", false);
    let ranks = cluster.all_ranks();
    let is_there = |id: i32| Path::new(&format!("/proc/{id}/exe")).exists();
    cluster.wait_until("both sides have stopped", Duration::from_secs(30), || {
        !ranks.iter().any(|rank| is_there(rank.id))
    });
    cluster.link("n2", true);
    training.check_completed(job, 4 * MINUTE);
    check_equal(&training, &whole);
}

#[test]
#[ignore = "make test-cluster"]
fn a_thawed_node_writes_nothing() {
    let Some(cluster) = Cluster::up() else { return };
    let whole = undisturbed(&cluster, 2, 2);
    let training = Training::new(&cluster, &settings());
    let job = training.submit(&["nodes=2", "ranks_per_node=2", SLOWLY]);
    training.wait_for_step(6);
    // The second node: the batch script runs on the first.
    cluster.freeze("n2");
    cluster.wait_until("the requeue", 2 * MINUTE, || cluster.job(job).restarts >= 1);
    training
        .cluster
        .wait_until("steps of the next attempt", 2 * MINUTE, || {
            cluster.job(job).state == "RUNNING" && training.run.metrics().len() > 8
        });
    cluster.thaw("n2");
    training.check_completed(job, 4 * MINUTE);
    check_equal(&training, &whole);
    check_no_orphans(&cluster, Duration::from_secs(15));
}

#[test]
#[ignore = "make test-cluster"]
fn whatever_of_slurm_s_is_killed_no_rank_stays() {
    let Some(cluster) = Cluster::up() else { return };
    for victim in ["srun", "slurmstepd"] {
        let training = Training::new(&cluster, &settings());
        let job = training.submit(&["nodes=4", "ranks_per_node=1", SLOWLY]);
        training.wait_for_step(4);
        let is_victim = |name: &str, line: &str| match victim {
            // The step's daemon, and not the batch script's.
            "slurmstepd" => {
                name == victim && line.contains(".0]")
                    || (name == victim && line.contains("[") && !line.contains("batch"))
            }
            _ => name == victim,
        };
        let found: Vec<i32> = NODES
            .iter()
            .flat_map(|node| cluster.processes(node))
            .filter(|process| is_victim(&process.name, &process.line))
            .map(|process| process.id)
            .collect();
        assert!(!found.is_empty(), "no {victim} to kill");
        for id in found {
            signal(id, Signal::SIGKILL);
        }
        check_no_orphans(&cluster, Duration::from_secs(10));
        cluster.said("scancel", &[&job.to_string()]);
    }
}

#[test]
#[ignore = "make test-cluster"]
fn fifty_jobs_on_one_node_do_not_meet() {
    let Some(cluster) = Cluster::up() else { return };
    let trainings: Vec<Training> = (0..50).map(|_| Training::new(&cluster, &["train.steps=3"])).collect();
    let jobs: Vec<u32> = trainings
        .iter()
        .map(|training| {
            let lines = "srun --mpi=pmix --overcommit -n 2 \"$panglot\" train \"${settings[@]}\"\nexit $?";
            let script = cluster.folder().join("fifty.sbatch");
            let settings: Vec<String> = training.settings.iter().map(|setting| format!("'{setting}'")).collect();
            let panglot = program("panglot");
            let content = format!(
                "#!/bin/bash\npanglot='{}'\nsettings=(configs/tiny.yaml {})\n{lines}\n",
                panglot.display(),
                settings.join(" ")
            );
            fs::write(&script, content).expect("a script");
            let out = training.out().display().to_string();
            let script = script.display().to_string();
            cluster.sbatch(&["--nodelist=n1", "-n1", "--oversubscribe", "--output", &out, &script])
        })
        .collect();
    for (training, job) in trainings.iter().zip(jobs) {
        training.check_completed(job, 10 * MINUTE);
        assert_eq!(training.run.losses().len(), 3);
    }
}

#[test]
#[ignore = "make test-cluster"]
fn a_chain_goes_on_where_requeue_is_forbidden() {
    let Some(cluster) = Cluster::up() else { return };
    for chain in [["--chain", "3"], ["--array", "3"]] {
        let training = Training::new(&cluster, &settings());
        let output = training.panglot(
            &["submit"],
            &["nodes=2", SLOWLY, &format!("output={}", training.out().display())],
        );
        let mut output = output;
        let output = output.args(chain).output().expect("nsenter starts");
        assert!(output.status.success(), "{}", text(&output));
        training.wait_for_step(4);
        let running = cluster.said("squeue", &["-h", "-t", "RUNNING", "-o", "%A"]);
        cluster.must("scancel", &["--signal=USR1", &format!("{}.0", running.trim())]);
        cluster.wait_until("the end of all jobs", 3 * MINUTE, || {
            cluster.said("squeue", &["-h"]).trim().is_empty()
        });
        assert_eq!(training.run.losses().len() as u64, STEPS, "{}", training.said());
        // The third job was taken out of the queue by the second, which finished.
        assert_eq!(
            training.said().matches("resumed from step ").count(),
            1,
            "{}",
            training.said()
        );
    }
}

#[test]
fn status_follows_a_job_and_scale_measures_it() {
    let Some(cluster) = Cluster::up() else { return };
    let training = Training::new(&cluster, &settings());
    let began = Instant::now();
    let job = training.submit(&["nodes=2", "ranks_per_node=2", SLOWLY]);
    training.wait_for_step(0);
    crate::figure("sbatch_to_first_step_s", began.elapsed().as_secs_f64());
    training.wait_for_step(5);
    let mut status = cluster.login(program("panglot"));
    status.arg("status").arg(training.run.folder.path()).arg("--json");
    let output = status.output().expect("nsenter starts");
    let seen: serde_json::Value =
        serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{}", text(&output)));
    assert_eq!(seen["state"], "running", "{seen}");
    let hosts: Vec<&str> = seen["hosts"]
        .as_array()
        .expect("hosts")
        .iter()
        .filter_map(|host| host["host"].as_str())
        .collect();
    assert_eq!(hosts, ["n1", "n2"]);
    assert!(
        seen["step"].as_u64() >= Some(5) && seen["checkpoint"].as_u64() >= Some(4),
        "{seen}"
    );
    training.check_completed(job, 2 * MINUTE);

    let scaled = training
        .panglot(&["scale", "--weak", "--steps", "5", "--json"], &["nodes=1,2"])
        .output()
        .expect("nsenter starts");
    let seen: serde_json::Value =
        serde_json::from_slice(&scaled.stdout).unwrap_or_else(|_| panic!("{}", text(&scaled)));
    let points = seen["points"].as_array().expect("points");
    assert_eq!(points.len(), 2, "{seen}");
    assert_eq!(
        (&points[1]["ranks"], &points[1]["rows_per_step"]),
        (&2.into(), &24.into())
    );
    assert!(
        points[1]["efficiency"].as_f64() > Some(0.0) && points[1]["waiting_share"].as_f64() > Some(0.0),
        "{seen}"
    );
    let folder = Path::new(seen["folder"].as_str().expect("a folder"));
    for file in ["scale.csv", "scale.json", "scale.svg"] {
        assert!(folder.join(file).is_file(), "{file}");
    }
    let _ = fs::remove_dir_all(folder);
}

#[test]
fn sbatch_answers_a_number() {
    let output = std::process::Output {
        status: std::process::ExitStatus::default(),
        stdout: b"7\n".to_vec(),
        stderr: vec![],
    };
    assert_eq!(number(&output), 7);
    assert!(root().is_dir());
}
