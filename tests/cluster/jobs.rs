//! Jobs as users submit them: they run, stop when their time is up, go on, and end with the code they should; what `status` and
//! `scale` show of them.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use launcher::attempts::newest_step;
use whole_program_tests::{program, root, text};

use crate::fixture::Cluster;
use crate::training::{MINUTE, SETTINGS, SLOWLY, STEPS, Training, check_no_orphans, copied_script, undisturbed};

#[test]
fn sbatch_runs_four_nodes_of_one_rank_and_two_nodes_of_two_alike() {
    let Some(cluster) = Cluster::up() else { return };
    undisturbed(&cluster);
    let training = Training::new(&cluster, &SETTINGS);
    let job = copied_script(&training, "2", "2");
    training.check_completed(job, 2 * MINUTE);
    training.check_equals_undisturbed();
    check_no_orphans(&cluster, Duration::from_secs(10));
}

#[test]
fn submitted_stopped_for_time_and_gone_on_equals_undisturbed() {
    let Some(cluster) = Cluster::up() else { return };
    let training = Training::new(&cluster, &SETTINGS);
    let job = training.submit(&["nodes=2", "ranks_per_node=2", SLOWLY]);
    training.wait_for_step(6);
    // It is written beside the steps.
    let checkpoints = training.run.folder.path().join(launcher::checkpoint::FOLDER);
    cluster.wait_until("the first checkpoint", MINUTE, || newest_step(&checkpoints).is_some());
    check_status(&training);
    // What Slurm does before the wall time, by the script's own --signal=USR1@120.
    cluster.must("scancel", &["--signal=USR1", &format!("{job}.0")]);
    cluster.wait_until("the requeue", MINUTE, || cluster.job(job).restarts == 1);
    let said = training.said();
    assert!(
        said.contains("a checkpoint is written, more time is wanted (75)"),
        "{said}"
    );
    assert!((training.run.metrics().len() as u64) < STEPS, "it was stopped in time");
    training.check_completed(job, 3 * MINUTE);
    training.check_equals_undisturbed();

    // A finished run's job ends at once, and says why.
    let began = Instant::now();
    let again = training.submit(&["nodes=2", "ranks_per_node=2"]);
    training.check_completed(again, MINUTE);
    let said = training.said();
    assert!(said.contains("all 40 steps are taken; nothing is left to do"), "{said}");
    assert!(began.elapsed() < Duration::from_secs(20));
}

/// From the login node, of a job that runs on n1 and n2: by its files alone.
fn check_status(training: &Training) {
    // Nobody can be asked: neither Slurm nor another program is found.
    let mut status = training.cluster.login("env");
    status.arg("PATH=/nonexistent").arg(program("panglot"));
    status.arg("status").arg(training.run.folder.path()).arg("--json");
    let output = status.output().expect("nsenter starts");
    let seen: serde_json::Value =
        serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{}", text(&output)));
    assert_eq!(seen["state"], "running", "{seen}");
    let hosts = seen["hosts"].as_array().expect("hosts").iter();
    let hosts: Vec<&str> = hosts.filter_map(|host| host["host"].as_str()).collect();
    assert_eq!(hosts, ["n1", "n2"]);
    let (step, checkpoint) = (seen["step"].as_u64(), seen["checkpoint"].as_u64());
    assert!(step >= Some(5) && checkpoint >= Some(4), "{seen}");
}

#[test]
#[ignore = "make test-cluster"]
fn a_job_whose_time_is_up_goes_on_in_the_next() {
    let Some(cluster) = Cluster::up() else { return };
    let training = Training::new(&cluster, &SETTINGS);
    // Forty steps of some two seconds do not fit into a minute. Without Slurm's signal the ranks' own watch is what is left.
    cluster.slow("n2", "50mbit");
    let began = Instant::now();
    let words = ["nodes=4", "time=1", "checkpoint.safety_seconds=15"];
    let job = training.submit_changed(&words, &[("#SBATCH --signal=USR1@120\n", "")]);
    cluster.wait_until("the requeue", 2 * MINUTE, || cluster.job(job).restarts == 1);
    let stopped = began.elapsed().as_secs_f64();
    assert!(stopped < 62.0, "it stopped by itself: after {stopped:.1} s");
    let said = training.said();
    assert!(
        said.contains("a checkpoint is written, more time is wanted (75)"),
        "{said}"
    );
    cluster.wait_until("the end", 6 * MINUTE, || cluster.job(job).state == "COMPLETED");
    assert!(!training.said().contains("TIME LIMIT"), "{}", training.said());
    training.check_equals_undisturbed();
}

#[test]
fn a_config_that_does_not_fit_is_not_tried_again() {
    let Some(cluster) = Cluster::up() else { return };
    let training = Training::new(&cluster, &SETTINGS);
    let job = training.submit_changed(&["nodes=2"], &[("'train.steps=40'", "'train.sequence_length=100000'")]);
    training.check_ended(job, MINUTE, ("FAILED", 2));
    assert_eq!(cluster.job(job).restarts, 0, "{}", training.said());
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
    let folder = training.run.folder.path();
    // The run's folder, the host and the job have the worst of names; whoever meets them meets a word.
    let hostile = format!("{}/a b'c\"d$(touch touched)`touch touched`;#\\", folder.display());
    let host = "../../n2 $(touch touched)`touch touched`';\"\\";
    set_host_name(&cluster, "n2", host);
    let run = format!("folders.run={hostile}");
    let script = training.write_script(&["nodes=2", "ranks_per_node=1", &run], &[]);
    let job = cluster.sbatch(&[
        "--job-name",
        "$(touch touched)`touch touched`;'\"",
        &script.display().to_string(),
    ]);
    training.check_completed(job, MINUTE);
    set_host_name(&cluster, "n2", "n2");
    let run = Path::new(&hostile);
    assert!(run.join("metrics.jsonl").is_file(), "{}", training.said());
    // Its first rank's sign has lain in the run's folder, and nowhere above it.
    assert!(!run.join("n2").exists() && !folder.join("n2 $").exists());
    for place in [root(), folder, run, cluster.folder()] {
        assert!(
            !place.join("touched").exists(),
            "a name was executed in {}",
            place.display()
        );
    }
    // What Slurm itself would have to quote is refused.
    let output = training
        .panglot(&["submit"], &["job_name=$(touch touched)"])
        .output()
        .expect("nsenter starts");
    assert_eq!(output.status.code(), Some(2), "{}", text(&output));
}

/// By the kernel's own file: `hostname` takes plain names only.
fn set_host_name(cluster: &Cluster, node: &str, name: &str) {
    let file = cluster.folder().join("host-name");
    fs::write(&file, format!("{name}\n")).expect("a file");
    let copied = cluster
        .on(node, "cp")
        .arg(&file)
        .arg("/proc/sys/kernel/hostname")
        .status();
    assert!(copied.expect("nsenter starts").success(), "{name}");
}

#[test]
#[ignore = "make test-cluster"]
fn fifty_jobs_on_one_node_do_not_meet() {
    let Some(cluster) = Cluster::up() else { return };
    let trainings: Vec<Training> = (0..50).map(|_| Training::new(&cluster, &["train.steps=3"])).collect();
    let options = ["--partition=crowd", "--nodelist=n1", "-n1", "--oversubscribe"];
    let lines = "srun --mpi=pmix --overcommit -n 2 \"$panglot\" train \"${settings[@]}\"\nexit $?";
    let jobs: Vec<u32> = trainings
        .iter()
        .map(|training| training.sbatch_with(&options, lines))
        .collect();
    let mut most = 0;
    cluster.wait_until("the end of fifty jobs", 9 * MINUTE, || {
        let states = cluster.said("squeue", &["-h", "-o", "%T"]);
        most = most.max(states.lines().filter(|state| *state == "RUNNING").count());
        states.trim().is_empty()
    });
    for (training, job) in trainings.iter().zip(jobs) {
        training.check_completed(job, MINUTE);
        assert_eq!(training.run.losses().len(), 3);
    }
    eprintln!("{most} jobs ran at once");
    assert!(most > 25, "{most} ran at once: they are to get in each other's way");
}

#[test]
#[ignore = "make test-cluster"]
fn a_chain_goes_on_where_requeue_is_forbidden() {
    let Some(cluster) = Cluster::up() else { return };
    for chain in [["--chain", "3"], ["--array", "3"]] {
        let training = Training::new(&cluster, &SETTINGS);
        let output = format!("output={}", training.out().display());
        let mut submit = training.panglot(&["submit"], &["nodes=2", "ranks_per_node=2", SLOWLY, &output]);
        let output = submit.args(chain).output().expect("nsenter starts");
        assert!(output.status.success(), "{}", text(&output));
        training.wait_for_step(4);
        let running = cluster.said("squeue", &["-h", "-t", "RUNNING", "-o", "%A"]);
        cluster.must("scancel", &["--signal=USR1", &format!("{}.0", running.trim())]);
        cluster.wait_until("the end of all jobs", 3 * MINUTE, || {
            cluster.said("squeue", &["-h"]).trim().is_empty()
        });
        training.check_equals_undisturbed();
        // The third job was taken out of the queue by the second, which finished.
        let said = training.said();
        assert_eq!(said.matches("resumed from step ").count(), 1, "{said}");
        assert!(
            !said.contains("nothing is left to do"),
            "{chain:?}: the third job did run: {said}"
        );
    }
}

#[test]
fn scale_measures_what_more_nodes_win() {
    let Some(cluster) = Cluster::up() else { return };
    scale(&cluster, "--weak", "nodes=1,2");
}

#[test]
#[ignore = "make test-cluster"]
fn scale_measures_four_nodes_with_a_batch_that_stays() {
    let Some(cluster) = Cluster::up() else { return };
    scale(&cluster, "--strong", "nodes=1,2,4");
}

fn scale(cluster: &Cluster, mode: &str, nodes: &str) {
    let training = Training::new(cluster, &[]);
    let out = training.run.folder.path().join("scale");
    let folder = format!("--out={}", out.display());
    let words = ["scale", mode, "--steps=5", "--json", &folder];
    let scaled = training.panglot(&words, &[nodes]).output().expect("nsenter starts");
    let seen: serde_json::Value =
        serde_json::from_slice(&scaled.stdout).unwrap_or_else(|_| panic!("{}", text(&scaled)));
    let points = seen["points"].as_array().expect("points");
    assert_eq!(points.len(), nodes.split(',').count(), "{seen}");
    for point in points {
        let number = |name: &str| point[name].as_f64().unwrap_or_else(|| panic!("no {name}: {seen}"));
        let rows = if mode == "--weak" { 12.0 * number("nodes") } else { 12.0 };
        assert_eq!((number("ranks"), number("rows_per_step")), (number("nodes"), rows));
        // Three steps are counted, and give an interval.
        assert_eq!(number("steps"), 3.0);
        let pm = number("tokens_per_second_pm");
        assert!(pm > 0.0 && pm.is_finite() && number("efficiency") > 0.0, "{seen}");
        assert!(
            number("planned_step_seconds") > 0.0 && number("resident_bytes") > 0.0,
            "{seen}"
        );
        assert!(number("nodes") == 1.0 || number("waiting_share") > 0.0, "{seen}");
    }
    assert_eq!(points[0]["efficiency"], 1.0);
    let csv = fs::read_to_string(out.join("scale.csv")).expect("a table");
    assert_eq!(csv.lines().count(), 1 + points.len(), "{csv}");
    let plot = fs::read_to_string(out.join("scale.svg")).expect("a plot");
    assert_eq!(
        plot.matches("class=\"bar\"").count(),
        points.len(),
        "each point has its interval"
    );
    assert!(out.join("scale.json").is_file());
}
