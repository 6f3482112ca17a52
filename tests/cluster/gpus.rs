//! GPUs that Slurm believes in: what it gives to a job's ranks is real, what nvidia-smi says of them is written here, and no
//! driver is behind either.

use std::fs;

use crate::doctor::examine_on;
use crate::fixture::Cluster;
use crate::training::{Training, executable};

/// Two GPUs a node, nearly empty; and more that a test has it say.
const NVIDIA_SMI: &str = r#"#!/bin/bash
host=$(hostname)
OTHERS
case "$1" in
  --query-gpu=*) printf '%s\n' "0, GPU-$host-a, Stand-in, 512" "1, GPU-$host-b, Stand-in, ${used:-512}" ;;
  --query-compute-apps=*) printf '%s' "$processes" ;;
esac
"#;

/// What the doctor says on two nodes of two ranks each, with these options of sbatch and what nvidia-smi says besides.
fn examine(training: &Training, options: &[&str], others: &str) -> String {
    let folder = training.run.folder.path().join("bin");
    fs::create_dir_all(&folder).expect("a folder");
    let program = folder.join("nvidia-smi");
    fs::write(&program, NVIDIA_SMI.replace("OTHERS", others)).expect("a script");
    executable(&program);
    let path = format!("export PATH='{}':$PATH", folder.display());
    let options = [&["--nodes", "2", "--ntasks-per-node", "2"][..], options].concat();
    let (said, code, seconds) = examine_on(training, &options, &path, "");
    assert!(seconds < 33.0, "{seconds:.1} s, Slurm's own included\n{said}");
    assert_eq!(code, 77, "{said}");
    said
}

fn check(said: &str, expected: &[&str]) {
    for line in expected {
        assert!(said.contains(line), "{line:?} is not in\n{said}");
    }
}

#[test]
#[ignore = "make test-cluster"]
fn each_rank_takes_the_gpu_that_slurm_gave_it() {
    let Some(cluster) = Cluster::up() else { return };
    let training = Training::new(&cluster, &["train.device=cuda"]);
    let own = [
        "rank 0 on n1 has GPU 0 (Stand-in, GPU-n1-a)",
        "rank 1 on n1 has GPU 1 (Stand-in, GPU-n1-b)",
        "rank 2 on n2 has GPU 0 (Stand-in, GPU-n2-a)",
        "rank 3 on n2 has GPU 1 (Stand-in, GPU-n2-b)",
    ];
    // Every rank sees all of its node's, or its own alone.
    for options in [&["--gpus-per-node=2"][..], &["--gpus-per-task=1"], &["--gres=gpu:2"]] {
        let said = examine(&training, options, "");
        check(&said, &own);
        if !driver_is_there() {
            check(
                &said,
                &[
                    "there is no CUDA driver here",
                    "refused: n1, n2: collectives do not work",
                ],
            );
        }
    }
}

/// A machine whose driver answers would go on to what the tests here only pretend.
fn driver_is_there() -> bool {
    std::path::Path::new("/proc/driver/nvidia/version").exists()
}

#[test]
#[ignore = "make test-cluster"]
fn gpus_that_cannot_be_used_are_one_line_each() {
    let Some(cluster) = Cluster::up() else { return };
    let training = Training::new(&cluster, &["train.device=cuda"]);
    let both = &["--gpus-per-node=2"][..];
    let cases: [(&[&str], &str, &[&str]); 5] = [
        (
            &["--gpus-per-node=1"],
            "",
            &[
                "refused: n1: ranks 0, 1 would share one GPU (GPU-n1-a); start one rank a GPU",
                "refused: n2: ranks 2, 3 would share one GPU (GPU-n2-a)",
            ],
        ),
        (
            &[],
            "",
            &["warning: n1, n2: Slurm gave this job no GPU (CUDA_VISIBLE_DEVICES is not set)"],
        ),
        (
            both,
            "[ $host != n2 ] || { used=40000; processes=\"GPU-n2-b, 711, python3\"; }",
            &["refused: n2: 39.1 GiB of GPU 1 (Stand-in) are taken by process 711 (python3); end what is left there"],
        ),
        (
            both,
            "[ $host != n1 ] || sleep 60",
            &["warning: n1: nvidia-smi gave no answer in 6 s; its driver may hang"],
        ),
        (
            both,
            "[ $host != n1 ] || { echo \"No devices were found\"; exit 6; }",
            &["refused: n1: nvidia-smi fails: No devices were found; see that the driver is loaded"],
        ),
    ];
    for (options, others, expected) in cases {
        let said = examine(&training, options, others);
        check(&said, expected);
        if others.contains("711") {
            assert!(!said.contains("refused: n1"), "{said}");
        }
    }
}
