//! How panglot-worker is found and started: alone, or as the ranks of one mpirun. Arguments are vectors; no shell is near.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use nix::unistd::Uid;

use crate::place::{BEATS, SECRET};
use crate::rendezvous::Secret;

/// A program to run and supervise.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Job {
    pub program: PathBuf,
    pub args: Vec<OsString>,
    pub env: Vec<(&'static str, String)>,
    /// One process for each, in rank order, with these variables besides; none: one process that is all there is to it.
    pub ranks: Vec<Vec<(&'static str, String)>>,
}

#[derive(Clone, Debug)]
pub struct Worker {
    program: PathBuf,
}

#[derive(Debug, thiserror::Error)]
#[error("no panglot-worker at {}; build it (cargo build --release -p trainer) or name it with --worker FILE", looked_at.display())]
pub struct WorkerMissing {
    looked_at: PathBuf,
}

impl Worker {
    /// The one that is named, or the one beside this very program.
    pub fn find(named: Option<&Path>) -> Result<Worker, WorkerMissing> {
        let program = match named {
            Some(file) => std::path::absolute(file).unwrap_or_else(|_| file.to_owned()),
            None => std::env::current_exe()
                .unwrap_or_default()
                .with_file_name("panglot-worker"),
        };
        if program.is_file() {
            Ok(Worker { program })
        } else {
            Err(WorkerMissing { looked_at: program })
        }
    }

    pub fn program(&self) -> &Path {
        &self.program
    }

    /// `ranks` processes: one needs no mpirun. Without `threads`, the cores are shared among them.
    pub fn job(&self, ranks: usize, threads: Option<usize>, args: Vec<OsString>) -> Job {
        match ranks {
            1 => self.alone(threads, args),
            n => {
                let mut env = variables(Some(threads.unwrap_or((cores() / n).max(1))));
                env.extend(secret());
                mpirun(&self.program, n, args, env, cores(), Uid::effective().is_root())
            }
        }
    }

    /// `n` processes on this machine that find each other without MPI.
    pub fn processes(&self, n: usize, threads: Option<usize>, args: Vec<OsString>) -> Job {
        let mut env = variables(Some(threads.unwrap_or((cores() / n).max(1))));
        env.extend(secret());
        env.push((BEATS, "1".into()));
        let rank = |rank: usize| {
            vec![
                ("RANK", rank.to_string()),
                ("WORLD_SIZE", n.to_string()),
                ("LOCAL_RANK", rank.to_string()),
                ("LOCAL_WORLD_SIZE", n.to_string()),
            ]
        };
        Job {
            ranks: (0..n).map(rank).collect(),
            env,
            ..self.process(threads, args)
        }
    }

    /// A rank that somebody else has started, watched from here.
    pub fn one_of_many(&self, threads: Option<usize>, args: Vec<OsString>) -> Job {
        let mut job = self.process(threads, args);
        job.env.push((BEATS, "1".into()));
        job
    }

    /// One process, the only rank, whatever the job around it is for: in a batch shell of many tasks, too.
    pub fn alone(&self, threads: Option<usize>, args: Vec<OsString>) -> Job {
        let mut job = self.process(threads, args);
        let place = [
            ("RANK", "0"),
            ("WORLD_SIZE", "1"),
            ("LOCAL_RANK", "0"),
            ("LOCAL_WORLD_SIZE", "1"),
        ];
        job.env.extend(place.map(|(name, value)| (name, value.to_owned())));
        job
    }

    fn process(&self, threads: Option<usize>, args: Vec<OsString>) -> Job {
        Job {
            program: self.program.clone(),
            args,
            env: variables(threads),
            ranks: Vec::new(),
        }
    }
}

/// On this machine, or on the machines of the allocation that mpirun finds itself in.
fn mpirun(
    worker: &Path,
    n: usize,
    args: Vec<OsString>,
    env: Vec<(&'static str, String)>,
    cores: usize,
    root: bool,
) -> Job {
    // Quiet: its banner about an exit code says nothing that we do not say better.
    let mut line: Vec<OsString> = vec!["--quiet".into(), "-n".into(), n.to_string().into()];
    // Threads do the pinning they want; bound to one core, a rank's threads would share it.
    line.extend(["--bind-to", "none"].map(OsString::from));
    if n > cores {
        line.push("--oversubscribe".into());
    }
    if root {
        line.push("--allow-run-as-root".into());
    }
    for (name, _) in &env {
        // To other nodes too; by name, since everybody can read arguments.
        line.extend(["-x", name].map(OsString::from));
    }
    line.push(worker.into());
    line.extend(args);
    Job {
        program: "mpirun".into(),
        args: line,
        env,
        ranks: Vec::new(),
    }
}

/// A new one for this job. Where the kernel gives none, rank 0 says why.
fn secret() -> Option<(&'static str, String)> {
    Secret::new().ok().map(|secret| (SECRET, secret.to_hex()))
}

/// What a worker's libraries read when they start.
pub fn variables(threads: Option<usize>) -> Vec<(&'static str, String)> {
    let threads = threads
        .into_iter()
        .flat_map(|n| ["OMP_NUM_THREADS", "RAYON_NUM_THREADS"].map(|name| (name, n.to_string())));
    threads
        .chain(MEMORY_AND_THREADS.map(|(name, value)| (name, value.to_owned())))
        .collect()
}

/// glibc gives every large tensor back to the kernel when it is freed and gets zeroed pages for the next: a seventh of an
/// evaluation's time. With these it keeps them, in one arena (heaps of other threads go back whatever the thresholds say), and asks for
/// huge pages (from glibc 2.35 on). OpenMP's threads spin when they have
/// nothing to do, in the way of our own: passive, they sleep. All three together take a quarter off a step in f32 on two cores.
const MEMORY_AND_THREADS: [(&str, &str); 4] = [
    ("MALLOC_MMAP_MAX_", "0"),
    ("MALLOC_TRIM_THRESHOLD_", "17179869184"),
    ("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1:glibc.malloc.arena_max=1"),
    ("OMP_WAIT_POLICY", "PASSIVE"),
];

fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(n: usize, threads: Option<usize>, cores: usize, root: bool) -> String {
        let env = variables(Some(threads.unwrap_or((cores / n).max(1))));
        let worker = Path::new("/bin/panglot-worker");
        let job = mpirun(worker, n, vec!["train".into()], env, cores, root);
        let args: Vec<_> = job.args.iter().map(|arg| arg.to_str().unwrap()).collect();
        format!(
            "{}={} {} {}",
            job.env[0].0,
            job.env[0].1,
            job.program.display(),
            args.join(" ")
        )
    }

    #[test]
    fn mpirun_s_line_fits_the_machine() {
        let variables = "-x OMP_NUM_THREADS -x RAYON_NUM_THREADS -x MALLOC_MMAP_MAX_ -x MALLOC_TRIM_THRESHOLD_ \
                         -x GLIBC_TUNABLES -x OMP_WAIT_POLICY";
        assert_eq!(
            line(2, None, 8, false),
            format!("OMP_NUM_THREADS=4 mpirun --quiet -n 2 --bind-to none {variables} /bin/panglot-worker train")
        );
        assert_eq!(
            line(3, None, 2, true),
            format!(
                "OMP_NUM_THREADS=1 mpirun --quiet -n 3 --bind-to none --oversubscribe --allow-run-as-root {variables} \
                 /bin/panglot-worker train"
            )
        );
        assert!(line(2, Some(3), 8, false).starts_with("OMP_NUM_THREADS=3 "));
    }

    #[test]
    fn a_job_s_secret_is_fresh_and_no_argument() {
        let worker = Worker {
            program: "/bin/panglot-worker".into(),
        };
        let secret_of = |job: &Job| {
            let named: Vec<_> = job.env.iter().filter(|(name, _)| *name == SECRET).collect();
            assert_eq!(named.len(), 1);
            let secret = named[0].1.clone();
            assert!(secret.len() == 64 && !job.args.iter().any(|arg| arg.to_string_lossy().contains(&secret)));
            secret
        };
        let jobs = [
            worker.job(2, None, vec![]),
            worker.job(2, None, vec![]),
            worker.processes(2, None, vec![]),
        ];
        let secrets: std::collections::BTreeSet<_> = jobs.iter().map(secret_of).collect();
        assert_eq!(secrets.len(), 3);
        assert_eq!(
            jobs[2].ranks[1][..2],
            [("RANK", "1".to_owned()), ("WORLD_SIZE", "2".to_owned())]
        );
        assert!(jobs[0].args.windows(2).any(|pair| pair[0] == "-x" && pair[1] == SECRET));
    }

    #[test]
    fn a_missing_worker_is_told_with_the_remedy() {
        let error = Worker::find(Some(Path::new("/no/worker"))).unwrap_err().to_string();
        assert_eq!(
            error,
            "no panglot-worker at /no/worker; build it (cargo build --release -p trainer) or name it with --worker FILE"
        );
    }
}
