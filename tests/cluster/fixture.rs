//! A real Slurm cluster, in namespaces of its own and gone with this process whatever becomes of it; the tests use it one after
//! the other. Processes, links and daemons of its nodes can be killed, frozen, cut and slowed.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use whole_program_tests::{program, root, text};

pub const NODES: [&str; 4] = ["n1", "n2", "n3", "n4"];

pub struct Cluster {
    /// `unshare`, whose one child is the keeper; its standard input is the cluster's life.
    outside: Child,
    /// The keeper, by its number out here.
    keeper: i32,
    /// Each node's own first process, by its number out here.
    nodes: BTreeMap<String, i32>,
    /// The keeper removes it: it outlives this process in every case.
    folder: PathBuf,
}

static SHARED: Mutex<Option<Cluster>> = Mutex::new(None);

/// The cluster while one test has it.
pub struct Up(MutexGuard<'static, Option<Cluster>>);

impl Deref for Up {
    type Target = Cluster;

    fn deref(&self) -> &Cluster {
        self.0.as_ref().expect("it was brought up")
    }
}

/// A job as `scontrol show job` has it.
#[derive(Clone, Debug, Default)]
pub struct Job {
    pub state: String,
    /// Of the batch script.
    pub code: i32,
    pub restarts: u32,
}

#[derive(Clone, Debug)]
pub struct Process {
    pub id: i32,
    /// The program's own name, at most 15 characters.
    pub name: String,
    pub line: String,
}

impl Cluster {
    /// Four nodes with 2 CPUs each, as good as new. None where this machine cannot have them, which is said.
    pub fn up() -> Option<Up> {
        let mut shared = SHARED.lock().unwrap_or_else(|poisoned| {
            // A test has failed in it: what it left there goes with the cluster.
            SHARED.clear_poison();
            let mut shared = poisoned.into_inner();
            *shared = None;
            shared
        });
        match &*shared {
            Some(cluster) => cluster.settle(),
            None => match impossible() {
                Some(why) => {
                    skip(&why);
                    return None;
                }
                None => *shared = Some(Cluster::begin()),
            },
        }
        Some(Up(shared))
    }

    /// After a test: no jobs, sound links, nobody frozen.
    fn settle(&self) {
        self.said("scancel", &["--user=root"]);
        for node in NODES {
            self.thaw(node);
            self.link(node, true);
            // There may be none.
            self.said("tc", &["qdisc", "del", "dev", &format!("to-{node}"), "root"]);
        }
        self.wait_until("an empty queue", Duration::from_secs(60), || {
            self.said("squeue", &["-h"]).trim().is_empty() && self.ours().is_empty()
        });
        self.wait_until_idle();
    }

    fn wait_until_idle(&self) {
        self.wait_until("four idle nodes", Duration::from_secs(30), || {
            let said = self.said("sinfo", &["-h", "-N", "-p", "main", "-o", "%T"]);
            said.lines().filter(|state| *state == "idle").count() == NODES.len()
        });
    }

    fn begin() -> Cluster {
        let folder = tempfile::Builder::new()
            .prefix("panglot-cluster-")
            .tempdir()
            .expect("a folder")
            .keep();
        let mut outside = Command::new("unshare")
            .args([
                "--pid",
                "--fork",
                "--kill-child",
                "--mount-proc",
                "--mount",
                "--net",
                "--uts",
                "--ipc",
                "--",
            ])
            .arg(program("test-cluster"))
            .arg("cluster")
            .arg(&folder)
            .args(NODES)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(fs::File::create(folder.join("keeper.log")).expect("a log"))
            .spawn()
            .expect("unshare starts");
        let mut line = String::new();
        BufReader::new(outside.stdout.take().expect("piped"))
            .read_line(&mut line)
            .expect("the keeper's line");
        let log = || fs::read_to_string(folder.join("keeper.log")).unwrap_or_default();
        assert!(
            line.starts_with("up "),
            "the cluster did not come up: {line:?}\n{}",
            log()
        );
        let keeper = children(outside.id() as i32)[0];
        let inside: BTreeMap<i32, i32> = children(keeper).iter().map(|&id| (inner(id), id)).collect();
        let numbered = |pair: &str| {
            let (name, id) = pair.split_once('=').expect("NAME=NUMBER");
            Some((name.to_owned(), *inside.get(&id.parse().ok()?)?))
        };
        let nodes = line
            .split_whitespace()
            .skip(1)
            .filter_map(numbered)
            .filter(|(name, _)| name != "munged")
            .collect();
        let cluster = Cluster {
            outside,
            keeper,
            nodes,
            folder,
        };
        assert_eq!(cluster.nodes.len(), NODES.len(), "{line}");
        cluster.wait_until_idle();
        cluster
    }

    /// A folder that every node sees, as they see all of this machine's files.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// `program` on the login node, from the repository's root.
    pub fn login(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        self.within(self.keeper, program)
    }

    /// `program` on a node, outside of any job.
    pub fn on(&self, node: &str, program: impl AsRef<std::ffi::OsStr>) -> Command {
        self.within(self.nodes[node], program)
    }

    fn within(&self, process: i32, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new("nsenter");
        command.args([
            "--target",
            &process.to_string(),
            "--mount",
            "--net",
            "--uts",
            "--ipc",
            "--pid",
        ]);
        command
            .arg(format!("--wdns={}", root().display()))
            .arg("--")
            .arg(program);
        command.stdin(Stdio::null());
        command
    }

    /// What a command on the login node says.
    pub fn said(&self, program: &str, arguments: &[&str]) -> String {
        let output = self.login(program).args(arguments).output().expect("nsenter starts");
        text(&output)
    }

    /// Submits; the job's number.
    pub fn sbatch(&self, arguments: &[&str]) -> u32 {
        let output = self
            .login("sbatch")
            .arg("--parsable")
            .args(arguments)
            .output()
            .expect("nsenter starts");
        number(&output)
    }

    pub fn job(&self, id: u32) -> Job {
        let said = self.said("scontrol", &["-o", "show", "job", &id.to_string()]);
        let field = |name: &str| {
            let at = said.find(&format!(" {name}="))? + name.len() + 2;
            said[at..].split_whitespace().next().map(str::to_owned)
        };
        Job {
            state: field("JobState").unwrap_or_default(),
            code: field("ExitCode")
                .and_then(|code| code.split(':').next()?.parse().ok())
                .unwrap_or(-1),
            restarts: field("Restarts").and_then(|n| n.parse().ok()).unwrap_or(0),
        }
    }

    /// Waits for the job's end.
    pub fn ended(&self, id: u32, limit: Duration) -> Job {
        let mut last = Job::default();
        let over = [
            "COMPLETED",
            "FAILED",
            "TIMEOUT",
            "CANCELLED",
            "NODE_FAIL",
            "BOOT_FAIL",
            "OUT_OF_MEMORY",
        ];
        self.wait_until(&format!("the end of job {id}"), limit, || {
            last = self.job(id);
            over.contains(&last.state.as_str())
        });
        last
    }

    /// Polls; a test that waits in vain says what the cluster looks like.
    pub fn wait_until(&self, what: &str, limit: Duration, mut there: impl FnMut() -> bool) {
        let began = Instant::now();
        while !there() {
            if began.elapsed() > limit {
                let queue = self.said("squeue", &["--all", "-o", "%i %j %T %r %N %M"]);
                let nodes = self.said("sinfo", &["-N", "-o", "%N %T %E"]);
                panic!(
                    "{what}: not in {} s\n{queue}\n{nodes}\n{}",
                    limit.as_secs(),
                    self.logs()
                );
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    fn logs(&self) -> String {
        let tail = |name: &str| {
            let text = fs::read_to_string(self.folder().join(name)).unwrap_or_default();
            let lines: Vec<&str> = text.lines().collect();
            format!("{name}:\n{}\n", lines[lines.len().saturating_sub(15)..].join("\n"))
        };
        ["slurmctld.log", "slurmd_n1.log", "keeper.log"].map(tail).concat()
    }

    /// Every process of a node, Slurm's daemons among them.
    pub fn processes(&self, node: &str) -> Vec<Process> {
        let Ok(network) = fs::read_link(format!("/proc/{}/ns/net", self.nodes[node])) else {
            return Vec::new();
        };
        let ids = fs::read_dir("/proc")
            .expect("/proc")
            .flatten()
            .filter_map(|e| e.file_name().to_str()?.parse().ok());
        let of_node = |id: &i32| fs::read_link(format!("/proc/{id}/ns/net")).is_ok_and(|other| other == network);
        let read = |id: i32| {
            let line = fs::read(format!("/proc/{id}/cmdline")).ok()?;
            let name = fs::read_to_string(format!("/proc/{id}/comm")).ok()?;
            let line = String::from_utf8_lossy(&line).replace('\0', " ");
            Some(Process {
                id,
                name: name.trim().to_owned(),
                line,
            })
        };
        ids.filter(of_node).filter_map(read).collect()
    }

    /// The ranks of a node. A zombie has no command line and is none.
    pub fn ranks(&self, node: &str) -> Vec<Process> {
        let is_rank = |process: &Process| process.name == "panglot-worker" && !process.line.is_empty();
        self.processes(node).into_iter().filter(is_rank).collect()
    }

    pub fn all_ranks(&self) -> Vec<Process> {
        NODES.iter().flat_map(|node| self.ranks(node)).collect()
    }

    /// Everything of ours on any node: `panglot`, its workers, mpirun and its daemons.
    pub fn ours(&self) -> Vec<(String, Process)> {
        let ours = ["panglot", "panglot-worker", "mpirun", "orted", "prted"];
        let on = |node: &&str| {
            self.processes(node)
                .into_iter()
                .map(|p| ((*node).to_owned(), p))
                .collect::<Vec<_>>()
        };
        let all = NODES.iter().flat_map(on);
        all.filter(|(_, process)| ours.contains(&process.name.as_str()) && !process.line.is_empty())
            .collect()
    }

    /// Stops every process of a node, its slurmd too: the machine has frozen.
    pub fn freeze(&self, node: &str) {
        for process in self.processes(node) {
            signal(process.id, Signal::SIGSTOP);
        }
    }

    pub fn thaw(&self, node: &str) {
        for process in self.processes(node) {
            signal(process.id, Signal::SIGCONT);
        }
    }

    /// Pulls the node's cable, or plugs it in again, at the switch.
    pub fn link(&self, node: &str, up: bool) {
        self.must(
            "ip",
            &["link", "set", &format!("to-{node}"), if up { "up" } else { "down" }],
        );
    }

    /// Everything to this node goes at `rate` (as tc writes it, such as 10mbit).
    pub fn slow(&self, node: &str, rate: &str) {
        let cable = format!("to-{node}");
        let bucket = ["tbf", "rate", rate, "burst", "256kb", "latency", "400ms"];
        self.must(
            "tc",
            &[&["qdisc", "replace", "dev", &cable, "root"][..], &bucket].concat(),
        );
    }

    pub fn must(&self, program: &str, arguments: &[&str]) {
        let output = self.login(program).args(arguments).output().expect("nsenter starts");
        assert!(output.status.success(), "{program} {arguments:?}: {}", text(&output));
    }
}

/// The keeper ends when its standard input does, and all of the cluster with it. At this process's end nothing of this is run,
/// and the kernel closes the pipe.
impl Drop for Cluster {
    fn drop(&mut self) {
        drop(self.outside.stdin.take());
        let _ = self.outside.wait();
    }
}

pub fn signal(process: i32, signal: Signal) {
    // It may have just ended.
    let _ = kill(Pid::from_raw(process), signal);
}

/// The number that `sbatch --parsable` answered.
pub fn number(output: &Output) -> u32 {
    let said = String::from_utf8_lossy(&output.stdout);
    let last = said.lines().last().unwrap_or_default();
    last.trim()
        .parse()
        .unwrap_or_else(|_| panic!("no job number: {}", text(output)))
}

fn children(process: i32) -> Vec<i32> {
    let list = fs::read_to_string(format!("/proc/{process}/task/{process}/children")).unwrap_or_default();
    list.split_whitespace().filter_map(|id| id.parse().ok()).collect()
}

/// A process's number as it is known inside the cluster.
fn inner(process: i32) -> i32 {
    let status = fs::read_to_string(format!("/proc/{process}/status")).unwrap_or_default();
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("NSpid:"))
        .unwrap_or_default();
    line.split_whitespace()
        .last()
        .and_then(|id| id.parse().ok())
        .unwrap_or(-1)
}

/// Why this machine cannot have a cluster.
fn impossible() -> Option<String> {
    let found = |name: &str| {
        let folders = [
            "/usr/sbin",
            "/sbin",
            "/usr/bin",
            "/bin",
            "/usr/local/sbin",
            "/usr/local/bin",
        ];
        folders.iter().any(|folder| PathBuf::from(folder).join(name).is_file())
    };
    if !nix::unistd::Uid::effective().is_root() {
        return Some("only root makes network namespaces".to_owned());
    }
    let needed = [
        "slurmctld",
        "slurmd",
        "sbatch",
        "munged",
        "ip",
        "tc",
        "unshare",
        "nsenter",
        "mount",
    ];
    if let Some(missing) = needed.iter().find(|name| !found(name)) {
        return Some(format!("{missing} is not installed (make setup-test)"));
    }
    let tried = Command::new("unshare")
        .args(["--pid", "--fork", "--mount", "--net", "--uts", "--ipc", "true"])
        .output();
    match tried {
        Ok(output) if output.status.success() => None,
        Ok(output) => Some(format!("namespaces cannot be made: {}", text(&output).trim())),
        Err(error) => Some(format!("unshare: {error}")),
    }
}

/// Not by a print macro: those are kept back when a test passes.
fn skip(why: &str) {
    static SKIPPED: AtomicUsize = AtomicUsize::new(0);
    let count = SKIPPED.fetch_add(1, Ordering::Relaxed) + 1;
    let _ = writeln!(
        std::io::stderr(),
        "\nSKIPPED, number {count}: no Slurm cluster on this machine: {why}"
    );
}
