//! Nodes that are not as they should be: other builds, configs or libraries, interfaces that lead nowhere, no name service, ports
//! that are taken. What cannot work is refused in a sentence, what can works.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use crate::fixture::{Cluster, NODES};
use crate::training::{MINUTE, SETTINGS, Training, changed_panglot, copy_of, other_build};

/// Four ranks by srun, with these lines before; how the job ended, and what was said.
fn check(training: &Training, before: &str, expected: (&str, i32), says: &[&str]) -> f64 {
    let began = Instant::now();
    let lines = format!(
        "{before}\nsrun --mpi=pmix --kill-on-bad-exit=1 \"$panglot\" train \"${{settings[@]}}\"\ncode=$?\n\
         \"$panglot\" job ended --code $code --series \"$SLURM_JOB_ID\" \"${{settings[@]}}\"\nexit $?"
    );
    let job = training.sbatch("4", "1", &lines);
    training.check_ended(job, 2 * MINUTE, expected);
    let said = training.said();
    for words in says {
        assert!(said.contains(words), "{words:?} is not in\n{said}");
    }
    began.elapsed().as_secs_f64()
}

/// On the rank with this number only.
fn on_rank(training: &Training, rank: usize, line: &str) -> String {
    changed_panglot(training, &format!("[ \"$SLURM_PROCID\" != {rank} ] || {line}"))
}

#[test]
#[ignore = "make test-cluster"]
fn ranks_that_do_not_run_alike_are_refused_by_host() {
    let Some(cluster) = Cluster::up() else { return };
    let few = ["train.steps=3"];

    let training = Training::new(&cluster, &few);
    let worker = other_build(&training);
    let before = on_rank(&training, 1, &format!("export PANGLOT_WORKER='{}'", worker.display()));
    check(
        &training,
        &before,
        ("FAILED", 77),
        &["the ranks do not run alike: n2 (rank 1) in build"],
    );
    assert!(training.run.metrics().is_empty(), "no step was taken");

    let training = Training::new(&cluster, &few);
    let before = on_rank(&training, 2, "set -- \"$@\" optimizer.weight_decay=0.25");
    check(
        &training,
        &before,
        ("FAILED", 77),
        &["the ranks do not run alike: n3 (rank 2) in config"],
    );
    assert!(training.run.metrics().is_empty(), "no step was taken");

    let training = Training::new(&cluster, &few);
    let library = training.run.folder.path().join("libmpi.so.40");
    copy_of(&mpi(), &library);
    let before = on_rank(&training, 3, &format!("export LD_PRELOAD='{}'", library.display()));
    check(
        &training,
        &before,
        ("FAILED", 77),
        &["the ranks do not run alike: n4 (rank 3) in libmpi.so"],
    );
    assert!(training.run.metrics().is_empty(), "no step was taken");
}

fn mpi() -> PathBuf {
    let folders = [
        "/usr/lib/x86_64-linux-gnu",
        "/usr/lib/aarch64-linux-gnu",
        "/usr/lib64",
        "/usr/lib",
    ];
    let mut files = folders.iter().map(|folder| Path::new(folder).join("libmpi.so.40"));
    files.find(|file| file.is_file()).expect("Open MPI's library")
}

#[test]
#[ignore = "make test-cluster"]
fn an_interface_that_leads_nowhere_is_named() {
    let Some(cluster) = Cluster::up() else { return };
    let few = ["train.steps=3"];
    let training = Training::new(&cluster, &few);
    check(
        &training,
        "export PANGLOT_INTERFACE=hsn7",
        ("FAILED", 77),
        &["PANGLOT_INTERFACE = \"hsn7\" is no interface of n1; it has ", "eth0"],
    );
    let training = Training::new(&cluster, &few);
    check(
        &training,
        "export PANGLOT_INTERFACE=lo",
        ("FAILED", 77),
        &["n1 has no address but its loopback's"],
    );
    // One that n1 has and nobody else reaches.
    let on_n1 = |words: &[&str]| {
        let status = cluster.on("n1", "ip").args(words).status().expect("nsenter starts");
        assert!(status.success(), "{words:?}");
    };
    on_n1(&["link", "add", "side0", "type", "veth", "peer", "name", "side1"]);
    on_n1(&["address", "add", "10.99.0.1/24", "dev", "side0"]);
    on_n1(&["link", "set", "side0", "up"]);
    on_n1(&["link", "set", "side1", "up"]);
    let training = Training::new(&cluster, &few);
    let seconds = check(
        &training,
        "export PANGLOT_INTERFACE=side0",
        // Another attempt is due; this script makes none.
        ("FAILED", 3),
        &[
            "rank 0 on n1 listens on its interface side0: 10.99.0.1:",
            "name one that all hosts reach with PANGLOT_INTERFACE",
        ],
    );
    eprintln!("an interface that nobody reaches: told after {seconds:.0} s");
    // Left to itself it takes the one on the way to the others.
    let training = Training::new(&cluster, &few);
    check(&training, "", ("COMPLETED", 0), &["the ranks meet on eth0 (10.77.0.1:"]);
    on_n1(&["link", "delete", "side0"]);
}

#[test]
#[ignore = "make test-cluster"]
fn no_name_is_looked_up() {
    let Some(cluster) = Cluster::up() else { return };
    let nobody = cluster.folder().join("no-hosts");
    let nowhere = cluster.folder().join("no-resolver");
    fs::write(&nobody, "127.0.0.1 localhost\n").expect("a file");
    fs::write(&nowhere, "nameserver 10.77.0.99\n").expect("a file");
    let files = [(&nobody, "/etc/hosts"), (&nowhere, "/etc/resolv.conf")];
    for node in NODES {
        for (own, place) in files {
            let mounted = cluster.on(node, "mount").arg("--bind").arg(own).arg(place).status();
            assert!(mounted.expect("nsenter starts").success());
        }
    }
    let training = Training::new(&cluster, &["train.steps=3"]);
    let seconds = check(&training, "", ("COMPLETED", 0), &["the ranks meet on eth0"]);
    eprintln!("without a name service: {seconds:.1} s");
    for node in NODES {
        for (_, place) in files {
            let unmounted = cluster.on(node, "umount").arg(place).status();
            assert!(unmounted.expect("nsenter starts").success());
        }
    }
}

#[test]
#[ignore = "make test-cluster"]
fn ports_that_are_taken_are_left_to_their_owners() {
    let Some(cluster) = Cluster::up() else { return };
    // Rank 0's node: new sockets get one of 400 ports, and 300 of them are taken.
    let mut owner = cluster.on("n1", whole_program_tests::program("test-cluster"));
    let mut owner = owner
        .args(["take-ports", "41000", "41399"])
        .stdout(Stdio::piped())
        .spawn()
        .expect("nsenter starts");
    let mut line = String::new();
    let _ = BufReader::new(owner.stdout.take().expect("piped")).read_line(&mut line);
    assert!(line.starts_with("holds 3") || line.starts_with("holds 2"), "{line}");
    let training = Training::new(&cluster, &SETTINGS);
    check(
        &training,
        "",
        ("COMPLETED", 0),
        &["the ranks meet on eth0 (10.77.0.1:41"],
    );
    training.check_equals_undisturbed();
    let _ = owner.kill();
    let _ = owner.wait();
    for process in cluster
        .processes("n1")
        .iter()
        .filter(|process| process.line.contains("take-ports"))
    {
        crate::fixture::signal(process.id, nix::sys::signal::Signal::SIGKILL);
    }
    let range = cluster.folder().join("range");
    fs::write(&range, "32768 60999\n").expect("a file");
    let copied = cluster
        .on("n1", "cp")
        .arg(&range)
        .arg("/proc/sys/net/ipv4/ip_local_port_range")
        .status();
    assert!(copied.expect("nsenter starts").success());
    std::thread::sleep(Duration::from_millis(100));
}
