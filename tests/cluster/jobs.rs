//! Jobs as users submit them: they run, go on and end with the code they should.

use std::time::{Duration, Instant};

use whole_program_tests::{Run, prepared};

use crate::fixture::Cluster;

const MINUTE: Duration = Duration::from_secs(60);

fn folders(run: &Run) -> [String; 2] {
    [
        format!("folders.prepared={}", prepared().display()),
        format!("folders.run={}", run.folder.path().display()),
    ]
}

#[test]
fn sbatch_runs_four_nodes_of_one_rank_and_two_nodes_of_two() {
    let Some(cluster) = Cluster::up() else { return };
    for (nodes, ranks) in [("4", "1"), ("2", "2")] {
        let run = Run::new();
        let [prepared, folder] = folders(&run);
        let out = cluster.folder().join("job.out");
        let began = Instant::now();
        let job = cluster.sbatch(&[
            "--nodes",
            nodes,
            "--ntasks-per-node",
            ranks,
            "--output",
            out.to_str().expect("plain"),
            "slurm/train.sbatch",
            "configs/tiny.yaml",
            &prepared,
            &folder,
            "train.steps=6",
            "train.micro_rows=1",
        ]);
        let ended = cluster.ended(job, 2 * MINUTE);
        let said = std::fs::read_to_string(&out).unwrap_or_default();
        assert_eq!((ended.state.as_str(), ended.code), ("COMPLETED", 0), "{said}");
        assert_eq!(run.losses().len(), 6, "{said}");
        eprintln!("{nodes} × {ranks}: {:.1} s", began.elapsed().as_secs_f64());
    }
}
