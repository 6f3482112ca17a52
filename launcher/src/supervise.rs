//! Runs a worker (or an mpirun of workers) to its end: reads its events, forwards our signals, keeps its exit code, leaves
//! nothing behind. If this process is killed, the job gets SIGTERM from the kernel.

use std::ffi::OsString;
use std::io;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::prctl;
use nix::sys::signal::{Signal, kill, killpg};
use nix::sys::wait::waitpid;
use nix::unistd::{Pid, getppid};
use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::process::{Child, ChildStdout, Command};
use tokio::signal::unix::{SignalKind, signal};

use crate::events::Event;
use crate::worker::Job;

#[derive(Debug)]
pub struct Ended {
    /// As a shell counts: 128 + the signal's number where one ended it.
    pub code: i32,
    /// Of the event `Done`.
    pub result: Option<serde_json::Value>,
}

/// Runs `job`. `watch` sees every event and may answer with a signal for the job.
pub fn supervise(job: &Job, watch: &mut dyn FnMut(&Event) -> Option<Signal>) -> io::Result<Ended> {
    // Ranks that outlive their mpirun become our children, so that they can be found and ended.
    prctl::set_child_subreaper(true)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let ended = runtime.block_on(run(job, watch));
    end_strays();
    ended
}

async fn run(job: &Job, watch: &mut dyn FnMut(&Event) -> Option<Signal>) -> io::Result<Ended> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut user = signal(SignalKind::user_defined1())?;
    let mut child = spawn(job)?;
    let mut lines = BufReader::new(child.stdout.take().expect("piped")).lines();
    let mut group = Group {
        id: child.id(),
        asked_to_end: None,
    };
    let mut result = None;
    let mut listening = true;
    let status = loop {
        tokio::select! {
            line = lines.next_line(), if listening => match line? {
                Some(line) => group.send(hear(&line, &mut result, watch)),
                None => listening = false,
            },
            status = child.wait() => break status?,
            _ = terminate.recv() => group.forward(Signal::SIGTERM),
            _ = interrupt.recv() => group.forward(Signal::SIGINT),
            _ = user.recv() => group.send(Some(Signal::SIGUSR1)),
        }
    };
    // Whatever of the group still holds the pipe must go before its end can be read.
    group.end();
    drain(&mut lines, &mut result, watch).await?;
    Ok(Ended {
        code: group.exit_code(status),
        result,
    })
}

fn spawn(job: &Job) -> io::Result<Child> {
    let mut command = Command::new(std::env::current_exe()?);
    command
        .arg(TETHER)
        .arg(std::process::id().to_string())
        .arg(&job.program)
        .args(&job.args);
    command.envs(job.env.iter().map(|(name, value)| (name, value)));
    // Its own group: Ctrl-C reaches it through us only, once.
    command
        .process_group(0)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .kill_on_drop(true);
    command.spawn()
}

/// Takes in one line of a worker's standard output; gives back what `watch` wants sent.
fn hear(
    line: &str,
    result: &mut Option<serde_json::Value>,
    watch: &mut dyn FnMut(&Event) -> Option<Signal>,
) -> Option<Signal> {
    match serde_json::from_str(line) {
        Ok(event) => {
            if let Event::Done { result: value } = &event {
                *result = Some(value.clone());
            }
            watch(&event)
        }
        // A library's chatter: not ours, but perhaps the only clue.
        Err(_) => {
            eprintln!("{line}");
            None
        }
    }
}

async fn drain(
    lines: &mut Lines<BufReader<ChildStdout>>,
    result: &mut Option<serde_json::Value>,
    watch: &mut dyn FnMut(&Event) -> Option<Signal>,
) -> io::Result<()> {
    // A stray outside the group may hold the pipe open; it is ended after this.
    while let Ok(line) = tokio::time::timeout(Duration::from_secs(1), lines.next_line()).await {
        let Some(line) = line? else { break };
        hear(&line, result, watch);
    }
    Ok(())
}

/// The child's process group; its number is the child's.
struct Group {
    id: Option<u32>,
    asked_to_end: Option<Signal>,
}

impl Group {
    /// To the child only: mpirun passes signals on to its ranks in its own way.
    fn send(&mut self, signal: Option<Signal>) {
        let (Some(id), Some(signal)) = (self.id, signal) else {
            return;
        };
        if matches!(signal, Signal::SIGTERM | Signal::SIGINT) {
            self.asked_to_end = Some(signal);
        }
        // It may have just ended, which is what the signal was for.
        let _ = kill(Pid::from_raw(id as i32), signal);
    }

    /// Who asks twice means it.
    fn forward(&mut self, signal: Signal) {
        if self.asked_to_end.is_none() {
            self.send(Some(signal))
        } else {
            self.end()
        }
    }

    /// mpirun says 1 whatever signal ended its ranks; who reads our code should learn which it was.
    fn exit_code(&self, status: ExitStatus) -> i32 {
        match (exit_code(status), self.asked_to_end) {
            (1, Some(signal)) => 128 + signal as i32,
            (code, _) => code,
        }
    }

    fn end(&self) {
        if let Some(id) = self.id {
            let _ = killpg(Pid::from_raw(id as i32), Signal::SIGKILL);
        }
    }
}

/// Ends what the job left behind: at this point every child of ours is a stray of it.
fn end_strays() {
    for _ in 0..100 {
        let strays = children();
        if strays.is_empty() {
            return;
        }
        for stray in strays {
            let _ = kill(stray, Signal::SIGKILL);
            // Its own children come to us with its end; the next round finds them.
            while waitpid(stray, None) == Err(Errno::EINTR) {}
        }
    }
}

/// As Linux lists them; empty where it does not.
fn children() -> Vec<Pid> {
    let Ok(threads) = std::fs::read_dir("/proc/self/task") else {
        return Vec::new();
    };
    let lists = threads
        .flatten()
        .filter_map(|thread| std::fs::read_to_string(thread.path().join("children")).ok());
    lists
        .flat_map(|list| {
            list.split_whitespace()
                .filter_map(|id| id.parse().ok())
                .map(Pid::from_raw)
                .collect::<Vec<_>>()
        })
        .collect()
}

fn exit_code(status: ExitStatus) -> i32 {
    status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0))
}

/// The hidden subcommand through which every job starts.
pub const TETHER: &str = "tether";

/// Becomes `program`, which gets SIGTERM when the process `parent` ends in whatever way. Returns only if that fails.
pub fn tether(parent: i32, program: &Path, args: &[OsString]) -> io::Error {
    if let Err(error) = prctl::set_pdeathsig(Signal::SIGTERM) {
        return error.into();
    }
    // It may have ended before the line above.
    if getppid() != Pid::from_raw(parent) {
        return io::Error::other("the supervising process is gone");
    }
    std::process::Command::new(program).args(args).exec()
}
