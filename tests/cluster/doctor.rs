//! `panglot doctor` on a real cluster: a sound one has nothing to say, and each of twelve misconfigurations is one line with
//! what, which host and the remedy, within 30 s.

use std::fs;
use std::time::Instant;

use nix::sys::signal::Signal;

use crate::fixture::{Cluster, signal};
use crate::training::{MINUTE, Training, changed_panglot, other_build};

/// Runs the doctor on four nodes; what it says, and its exit code. `before` are lines of the job script; `panglot` may be
/// replaced there.
fn examine(training: &Training, before: &str, srun: &str) -> (String, i32, f64) {
    examine_on(training, &["--nodes", "4", "--ntasks-per-node", "1"], before, srun)
}

/// As `examine`, with these options of sbatch.
pub fn examine_on(training: &Training, options: &[&str], before: &str, srun: &str) -> (String, i32, f64) {
    let began = Instant::now();
    let lines = format!("{before}\nsrun --mpi=pmix {srun} \"$panglot\" doctor \"${{settings[@]}}\"\nexit $?");
    let already = training.said().len();
    let job = training.sbatch_with(options, &lines);
    let ended = training.cluster.ended(job, MINUTE);
    (
        training.said()[already..].to_owned(),
        ended.code,
        began.elapsed().as_secs_f64(),
    )
}

fn check(training: &Training, what: &str, before: &str, srun: &str, code: i32, expected: &[&str]) {
    let (said, ended, seconds) = examine(training, before, srun);
    let line = said
        .lines()
        .find(|line| expected.iter().all(|part| line.contains(part)));
    assert!(line.is_some(), "{what}: no line has {expected:?}\n{said}");
    assert_eq!(ended, code, "{what}: {said}");
    assert!(seconds < 33.0, "{what}: {seconds:.1} s, Slurm's own included\n{said}");
    eprintln!("{what} ({seconds:.1} s): {}", line.unwrap_or_default());
}

#[test]
fn a_sound_cluster_is_found_sound_and_a_mixed_one_refused() {
    let Some(cluster) = Cluster::up() else { return };
    let training = Training::new(&cluster, &[]);
    let (said, code, seconds) = examine(&training, "", "");
    assert_eq!(code, 0, "{said}");
    assert!(
        said.contains("4 ranks on 4 hosts looked at in") && said.contains(": 0 refusals, "),
        "{said}"
    );
    assert_eq!(said.matches("all-reduce of ").count(), 3, "{said}");
    assert!(seconds < 30.0, "{said}");
    mixed_config(&training);
}

fn mixed_config(training: &Training) {
    let before = changed_panglot(training, "[ \"$SLURM_PROCID\" != 2 ] || set -- \"$@\" seed=99");
    check(
        training,
        "mixed config",
        &before,
        "",
        77,
        &["refused: n3: config is ", "give every rank the same"],
    );
}

#[test]
#[ignore = "make test-cluster"]
fn twelve_misconfigurations_are_one_line_each() {
    let Some(cluster) = Cluster::up() else { return };
    let training = Training::new(&cluster, &[]);
    let run = training.run.folder.path().to_owned();
    let on = |node: &str, words: &[&str]| {
        let output = cluster
            .on(node, words[0])
            .args(&words[1..])
            .output()
            .expect("nsenter starts");
        assert!(
            output.status.success(),
            "{words:?}: {}",
            whole_program_tests::text(&output)
        );
    };

    // 1: another config on one rank.
    mixed_config(&training);

    // 2: another build on one node.
    let worker = other_build(&training);
    let other = format!(
        "[ \"$SLURM_PROCID\" != 1 ] || export PANGLOT_WORKER='{}'",
        worker.display()
    );
    let before = changed_panglot(&training, &other);
    check(
        &training,
        "mixed build",
        &before,
        "",
        77,
        &["refused: n2: panglot-worker is ", "install the same build"],
    );

    // 3: a node that sees another folder.
    on("n4", &["mount", "-t", "tmpfs", "own", &run.display().to_string()]);
    check(
        &training,
        "folder not shared",
        "",
        "",
        77,
        &["refused: n4: no report of rank 3", "mount the same folder"],
    );
    on("n4", &["umount", &run.display().to_string()]);

    // 4: a node that may not write.
    on(
        "n3",
        &[
            "mount",
            "--bind",
            &run.display().to_string(),
            &run.display().to_string(),
        ],
    );
    on("n3", &["mount", "-o", "remount,bind,ro", &run.display().to_string()]);
    check(
        &training,
        "read-only folder",
        "",
        "",
        77,
        &["refused: n3: the run's folder cannot be written", "make it writable"],
    );
    on("n3", &["umount", &run.display().to_string()]);

    // 5: a full file system.
    let small = cluster.folder().join("small");
    fs::create_dir(&small).expect("a folder");
    for node in crate::fixture::NODES {
        on(node, &["mount", "-t", "tmpfs", "-o", "size=1m", "small", "/mnt"]);
    }
    let full = Training::new(&cluster, &[]);
    // Not shared either, but each sees its own lack of space first: a file system of one node's own is what can be made here.
    let (said, code, _) = examine(&full, "settings+=(folders.run=/mnt/run)", "-N1 -n1");
    assert!(
        code == 77 && said.contains("refused: n1: only ") && said.contains("free space or quota"),
        "{said}"
    );
    eprintln!(
        "no space: {}",
        said.lines().find(|line| line.contains("only ")).unwrap_or_default()
    );

    // 6: few open files.
    check(
        &training,
        "open files",
        "ulimit -n 256",
        "",
        77,
        &[
            "refused: n1, n2, n3, n4: a process may open 256 files",
            "ulimit -n 4096",
        ],
    );

    // 7: no shared memory.
    on("n2", &["mount", "-o", "remount,size=1m", "/dev/shm"]);
    check(
        &training,
        "/dev/shm",
        "",
        "",
        77,
        &["refused: n2: /dev/shm has 1.0 MiB free", "--shm-size"],
    );
    on("n2", &["mount", "-o", "remount,size=1g", "/dev/shm"]);

    // 8: a rank that nobody waits for any more.
    let left = cluster.folder().join("left");
    fs::create_dir(&left).expect("a folder");
    let sleeper = left.join("panglot-worker");
    fs::copy("/bin/sleep", &sleeper).expect("a copy");
    let mut orphan = cluster.on("n3", "setsid");
    orphan.args(["--fork"]).arg(&sleeper).arg("600");
    assert!(orphan.status().expect("nsenter starts").success());
    check(
        &training,
        "leftover rank",
        "",
        "",
        0,
        &["warning: n3: ranks of an earlier run are still there", "end them"],
    );
    for process in cluster.ranks("n3") {
        signal(process.id, Signal::SIGKILL);
    }

    // 9: a way that is closed between two nodes. Not n1's: srun runs there.
    on("n2", &["ip", "route", "add", "blackhole", "10.77.0.4/32"]);
    check(
        &training,
        "closed way",
        "",
        "",
        77,
        &["refused: n4: not reached from n2", "open the ports"],
    );
    on("n2", &["ip", "route", "del", "blackhole", "10.77.0.4/32"]);

    // 10: a name that resolves to the host's own loopback, as Debian's installer writes it.
    let hosts = cluster.folder().join("hosts-n2");
    fs::write(&hosts, "127.0.0.1 localhost\n127.0.1.1 n2\n10.77.0.254 login\n").expect("a file");
    on("n2", &["mount", "--bind", &hosts.display().to_string(), "/etc/hosts"]);
    check(
        &training,
        "127.0.1.1",
        "",
        "",
        0,
        &["warning: n2: its own name resolves to 127.0.1.1", "/etc/hosts"],
    );
    on("n2", &["umount", "/etc/hosts"]);

    // 11: N runs of one rank each.
    check(
        &training,
        "singletons",
        "",
        "--mpi=none",
        77,
        &["refused", "4 r", "--mpi=pmix"],
    );

    // 12: a slow cable.
    cluster.slow("n3", "100mbit");
    check(
        &training,
        "slow link",
        "",
        "",
        0,
        &["warning: n3: its network gives ", "look at its interface"],
    );
}
