//! Ranks that die, hang or are orphaned on this machine: who is at fault is said at once, everything ends soon, nothing stays
//! behind, and the run goes on from its newest checkpoint.
//!
//! Lines of a name and a number are figures that `bench_cluster` collects.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use launcher::supervise::process_state;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use whole_program_tests::{Run, prepared, program, succeed, text};

/// Many small steps, each with a checkpoint or none.
const STEPS: &str = "train.steps=4000";
const SELDOM: &str = "checkpoint.every_steps=4000";
const OFTEN: &str = "checkpoint.every_steps=1";
/// Saves go on beside the steps, unless no step may be lost.
const WAITING: &str = "checkpoint.lose_at_most=1";

/// `panglot train -n N` on its way, with everything that it says and when.
struct Running {
    child: Child,
    lines: Receiver<(Instant, String)>,
    folder: PathBuf,
}

impl Running {
    fn start(run: &Run, ranks: usize, overrides: &[&str]) -> Running {
        let mut command = run.train(overrides);
        command.args(["-n", &ranks.to_string()]).env("OMP_NUM_THREADS", "1");
        Running::of(command, run.folder.path())
    }

    fn of(mut command: Command, folder: &Path) -> Running {
        command.stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("the program starts");
        let stderr = BufReader::new(child.stderr.take().expect("piped"));
        let (tell, lines) = channel();
        std::thread::spawn(move || {
            for line in stderr.lines().map_while(Result::ok) {
                if tell.send((Instant::now(), line)).is_err() {
                    return;
                }
            }
        });
        Running {
            child,
            lines,
            folder: folder.to_owned(),
        }
    }

    /// Waits until the run has taken `steps` steps.
    fn after_steps(&mut self, run: &Run, steps: usize) {
        wait_for(|| {
            assert!(self.child.try_wait().expect("a child").is_none(), "it ended too soon");
            (run.metrics().len() >= steps).then_some(())
        });
    }

    /// The process of a rank, once it is there.
    fn rank(&self, rank: usize) -> Pid {
        let variable = format!("OMPI_COMM_WORLD_RANK={rank}");
        wait_for(|| {
            self.processes().into_iter().find(|process| {
                let environment = fs::read(format!("/proc/{process}/environ")).unwrap_or_default();
                let program = fs::read_link(format!("/proc/{process}/exe")).unwrap_or_default();
                program.ends_with("panglot-worker")
                    && environment
                        .split(|byte| *byte == 0)
                        .any(|entry| entry == variable.as_bytes())
            })
        })
    }

    fn mpirun(&self) -> Pid {
        wait_for(|| {
            let is = |process: &Pid| {
                let program = fs::read_to_string(format!("/proc/{process}/comm")).unwrap_or_default();
                ["mpirun", "orterun"].contains(&program.trim())
            };
            self.processes().into_iter().find(is)
        })
    }

    /// Every process of this run: who names its folder.
    fn processes(&self) -> Vec<Pid> {
        processes_of(&self.folder)
    }

    /// Its exit code, when the culprit was named, when all had ended, and what was said.
    fn end(mut self, culprit: &str) -> End {
        let status = self.child.wait().expect("it ends");
        let ended = Instant::now();
        let lines: Vec<(Instant, String)> = self.lines.iter().collect();
        let named = lines.iter().find(|(_, line)| line.contains(culprit)).map(|(at, _)| *at);
        End {
            code: status.code(),
            ended,
            named,
            said: lines.into_iter().map(|(_, line)| line).collect(),
        }
    }
}

struct End {
    code: Option<i32>,
    ended: Instant,
    named: Option<Instant>,
    said: Vec<String>,
}

impl End {
    /// The first line of ours after the last of the run's ordinary ones. A rank that was reading from another's memory when that
    /// was killed has Open MPI complain of it, "[host:process] Read -1, …", before anybody can know more.
    fn first_of_the_failure(&self) -> &str {
        let usual = |line: &String| line.starts_with("  ") || line.starts_with("measured after ");
        let last = self.said.iter().rposition(usual).map_or(0, |at| at + 1);
        let ours = |line: &&String| !(line.starts_with('[') && line.contains("] Read -1, expected "));
        self.said[last..].iter().find(ours).map_or("", String::as_str)
    }
}

fn processes_of(folder: &Path) -> Vec<Pid> {
    let folder = folder.to_str().expect("UTF-8");
    let entries = fs::read_dir("/proc").expect("proc");
    let processes = entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let names_it = |process: &i32| {
        let line = fs::read(format!("/proc/{process}/cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&line).contains(folder) && process_state(process) != Some('Z')
    };
    processes.filter(names_it).map(Pid::from_raw).collect()
}

fn wait_for<T>(mut found: impl FnMut() -> Option<T>) -> T {
    let started = Instant::now();
    loop {
        if let Some(found) = found() {
            return found;
        }
        assert!(started.elapsed() < Duration::from_secs(120), "waited in vain");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// How many processes of the run are left `within` so long.
fn orphans(folder: &Path, within: Duration) -> usize {
    let started = Instant::now();
    loop {
        let left = processes_of(folder).len();
        if left == 0 || started.elapsed() > within {
            return left;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn a_killed_rank_is_named_at_once_and_all_ends_within_five_seconds() {
    prepared();
    for rank in [1, 0] {
        let run = Run::new();
        let mut running = Running::start(&run, 2, &[STEPS, SELDOM]);
        running.after_steps(&run, 3);
        let killed = running.rank(rank);
        let at = Instant::now();
        kill(killed, Signal::SIGKILL).expect("it is there");
        let end = running.end(&format!("rank {rank} on "));
        let said = end.said.join("\n");
        let noticed = end.named.unwrap_or_else(|| panic!("nobody was named:\n{said}")) - at;
        let stopped = end.ended - at;
        let orphans = orphans(run.folder.path(), Duration::from_secs(5));
        println!("dead_rank_noticed_s {:.3}", noticed.as_secs_f64());
        println!("all_stopped_s {:.3}", stopped.as_secs_f64());
        println!("orphans {orphans}");
        assert_eq!(end.code, Some(76), "{said}");
        assert!(
            said.contains("is gone: killed, crashed, or out of memory; it was last in "),
            "{said}"
        );
        assert!(
            end.first_of_the_failure().contains(&format!("rank {rank} on ")),
            "{said}"
        );
        assert!(
            noticed < Duration::from_secs(1) && stopped < Duration::from_secs(5),
            "{noticed:?}, {stopped:?}\n{said}"
        );
        assert_eq!(orphans, 0);
    }
}

#[test]
fn a_stopped_rank_is_named_within_ten_seconds_whatever_it_did() {
    prepared();
    for (when, rank) in [("load", 1), ("step", 0), ("save", 1)] {
        let run = Run::new();
        let saves: &[&str] = if when == "save" { &[OFTEN, WAITING] } else { &[SELDOM] };
        let mut running = Running::start(&run, 2, &[&[STEPS], saves].concat());
        let process = running.rank(rank);
        match when {
            // Both have just met.
            "load" => wait_for(|| log(&run, 0).contains("the ranks have met").then_some(())),
            "step" => running.after_steps(&run, 3),
            _ => {
                running.after_steps(&run, 3);
                wait_for(|| is_saving(&run).then_some(()));
            }
        }
        let at = Instant::now();
        kill(process, Signal::SIGSTOP).expect("it is there");
        let end = running.end(&format!("rank {rank} on "));
        let said = end.said.join("\n");
        let named = end
            .named
            .unwrap_or_else(|| panic!("nobody was named ({when}):\n{said}"))
            - at;
        let ended = end.ended - at;
        println!("hang_named_s {:.3}", named.as_secs_f64());
        println!(
            "in {when}: {}",
            said.lines().find(|line| line.contains("gave no sign")).unwrap_or("?")
        );
        assert_eq!(end.code, Some(76), "{said}");
        let line = said
            .lines()
            .find(|line| line.contains("gave no sign for "))
            .unwrap_or_default();
        assert!(line.contains("; it was last in "), "{said}");
        // Of itself a rank tells what it is at a few times a second, so that what the others wait for may be fresher.
        let work = match when {
            "load" => "loading",
            "step" => "in step ",
            _ => "saving",
        };
        assert!(line.contains(work), "stopped in {when}: {line}");
        assert!(named < Duration::from_secs(10), "{named:?}");
        assert!(ended - named < Duration::from_secs(5), "{ended:?}");
        assert_eq!(orphans(run.folder.path(), Duration::from_secs(5)), 0);
    }
}

fn is_saving(run: &Run) -> bool {
    let entries = fs::read_dir(run.folder.path().join("checkpoints"))
        .into_iter()
        .flatten()
        .flatten();
    entries
        .into_iter()
        .any(|entry| entry.file_name().to_string_lossy().contains(".partial"))
}

fn log(run: &Run, rank: usize) -> String {
    fs::read_to_string(run.folder.path().join(format!("logs/rank-{rank}.log"))).unwrap_or_default()
}

#[test]
fn whoever_started_the_ranks_takes_them_along() {
    prepared();
    for who in ["mpirun", "panglot", "both"] {
        let run = Run::new();
        let mut running = Running::start(&run, 2, &[STEPS, SELDOM]);
        running.after_steps(&run, 2);
        let (panglot, mpirun) = (Pid::from_raw(running.child.id() as i32), running.mpirun());
        let victims = match who {
            "mpirun" => vec![mpirun],
            "panglot" => vec![panglot],
            _ => vec![panglot, mpirun],
        };
        let at = Instant::now();
        for victim in victims {
            kill(victim, Signal::SIGKILL).expect("it is there");
        }
        let folder = run.folder.path();
        let left = orphans(folder, Duration::from_secs(10));
        println!("orphans {left}");
        assert_eq!(left, 0, "{who} was killed; left: {:?}", running.processes());
        assert!(at.elapsed() < Duration::from_secs(5), "{who}: {:?}", at.elapsed());
        let _ = running.child.wait();
    }
}

#[test]
fn a_run_that_loses_ranks_goes_on_by_itself_to_the_same_end() {
    prepared();
    let settings = [
        "train.steps=60",
        "checkpoint.every_steps=4",
        "debug.check_ranks_equal=true",
    ];
    let whole = Run::new();
    let mut command = whole.train(&settings);
    command.args(["-n", "2"]);
    succeed(command);
    let run = Run::new();
    let mut command = run.train(&settings);
    command.args(["-n", "2", "--restarts", "3"]);
    let mut running = Running::of(command, run.folder.path());
    for (steps, rank) in [(10, 1), (30, 0)] {
        running.after_steps(&run, steps);
        kill(running.rank(rank), Signal::SIGKILL).expect("it is there");
        // Its end, before the next attempt's steps are counted.
        wait_for(|| {
            (run.metrics().len() < steps || running.child.try_wait().expect("a child").is_some()).then_some(())
        });
    }
    let end = running.end("restart 1 of 3");
    let said = end.said.join("\n");
    assert_eq!(end.code, Some(0), "{said}");
    assert!(
        end.named.is_some() && said.contains("panglot: restart 2 of 3: ") && said.contains("goes on from step "),
        "{said}"
    );
    assert_eq!(run.losses(), whole.losses());
    assert_eq!(run.state(60), whole.state(60));
}

#[test]
fn attempts_that_come_to_nothing_are_given_up() {
    let run = Run::new();
    prepared();
    let mut command = run.train(&["train.steps=10"]);
    command.args(["--restarts", "9"]);
    // A file where the run's checkpoints should be: each attempt ends with code 74.
    fs::write(run.folder.path().join("checkpoints"), "in the way").expect("written");
    let output = command.output().expect("starts");
    let said = text(&output);
    assert_eq!(output.status.code(), Some(74), "{said}");
    assert_eq!(said.matches("panglot: restart ").count(), 2, "{said}");
    assert!(
        said.contains("no restart: ") && said.contains("3 attempts in a row have not got beyond step 0"),
        "{said}"
    );
}

#[test]
fn what_one_rank_cannot_write_once_they_have_met_ends_all_at_once() {
    prepared();
    let run = Run::new();
    // A folder where one rank's timeline should be.
    fs::create_dir_all(run.folder.path().join("timeline/rank-1.json")).expect("created");
    let running = Running::start(&run, 2, &["debug.timeline=true"]);
    let started = Instant::now();
    let end = running.end("rank-1.json");
    assert_eq!(end.code, Some(74), "{:?}", end.said);
    assert!(
        end.named.is_some() && end.said.iter().any(|line| line.contains("rank 1 of 2 on ")),
        "{:?}",
        end.said
    );
    assert!(started.elapsed() < Duration::from_secs(30));
}

#[test]
fn two_configs_in_one_job_are_refused_with_a_table() {
    prepared();
    let run = Run::new();
    let mut command = Command::new("mpirun");
    command
        .current_dir(whole_program_tests::root())
        .args(["--allow-run-as-root", "--oversubscribe"]);
    for (index, steps) in ["train.steps=5", "train.steps=6"].iter().enumerate() {
        if index > 0 {
            command.arg(":");
        }
        command
            .args(["-n", "1"])
            .arg(program("panglot"))
            .args(["train", "configs/tiny.yaml", steps]);
        command.arg(format!("folders.prepared={}", prepared().display()));
        command.arg(format!("folders.run={}", run.folder.path().display()));
    }
    let started = Instant::now();
    let output = command.output().expect("mpirun starts");
    let said = text(&output);
    assert_eq!(output.status.code(), Some(77), "{said}");
    assert!(
        said.contains("the ranks do not run alike: ") && said.contains("(rank 1) in config"),
        "{said}"
    );
    assert!(started.elapsed() < Duration::from_secs(30));
    assert!(run.metrics().is_empty(), "no step was taken");
    assert!(
        !run.folder.path().join("rendezvous.json").exists(),
        "the secret's file is gone"
    );
}

#[test]
fn ranks_on_cpus_that_nobody_wired_together_are_refused_with_the_remedy() {
    prepared();
    let run = Run::new();
    let mut command = run.train(&[]);
    command.envs([("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0")]);
    let output = command.output().expect("starts");
    let said = text(&output);
    assert_eq!(output.status.code(), Some(2), "{said}");
    assert!(
        said.contains("srun --mpi=pmix") && said.contains("panglot train -n 2"),
        "{said}"
    );
}

#[test]
fn a_timeline_has_every_rank_s_stages_and_waits() {
    prepared();
    let run = Run::new();
    let mut command = run.train(&["train.steps=3", "debug.timeline=true"]);
    command.args(["-n", "2"]);
    succeed(command);
    for rank in 0..2 {
        let path = run.folder.path().join(format!("timeline/rank-{rank}.json"));
        let text = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let events: Vec<serde_json::Value> = serde_json::from_str(&text).expect("one JSON array");
        let named = |name: &str| events.iter().filter(|event| event["name"] == name).count();
        let micro_batches = named("forward 0");
        assert!(
            micro_batches >= 3 && named("backward 0") == micro_batches,
            "{micro_batches}"
        );
        for name in [
            "loading",
            "making the batch",
            "the update",
            "writing metrics",
            "saving",
            "all-gather",
            "reduce-scatter",
        ] {
            assert!(named(name) > 0, "{name} is missing in {}", path.display());
        }
        assert!(
            events
                .iter()
                .filter(|event| event["ph"] == "X")
                .all(|event| event["pid"] == rank)
        );
    }
    // Off, there is none.
    let run = Run::new();
    succeed(run.train(&["train.steps=3"]));
    assert!(!run.folder.path().join("timeline").exists());
}
