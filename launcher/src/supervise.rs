//! Runs a worker, several, or an mpirun of workers to the end: reads their events, forwards our signals, keeps the exit code,
//! leaves nothing behind. If this process is killed, the kernel ends what it started.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::prctl;
use nix::sys::signal::{Signal, kill, killpg};
use nix::sys::wait::waitpid;
use nix::unistd::{Pid, getppid};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::net::UnixDatagram;
use tokio::process::{Child, Command};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc::{self, UnboundedSender};

use crate::events::Event;
use crate::exit;
use crate::place::{EAR, RANK_VARIABLES};
use crate::rendezvous;
use crate::text::say;
use crate::worker::Job;

#[derive(Debug)]
pub struct Ended {
    /// As a shell counts: 128 + the signal's number where one ended it.
    pub code: i32,
    /// Of the event `Done`.
    pub result: Option<serde_json::Value>,
    /// Of the event `Lost`, or how the first process to fail did.
    pub lost: Option<String>,
    /// This process was asked to end, and asked the job to.
    pub asked: bool,
}

/// Runs `job`. `watch` sees every event and may answer with a signal for the job.
pub fn supervise(job: &Job, watch: &mut dyn FnMut(&Event) -> Option<Signal>) -> io::Result<Ended> {
    // Ranks that outlive their mpirun become our children, so that they can be found and ended.
    prctl::set_child_subreaper(true)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let idle = idle()?;
    idle.store(false, Ordering::SeqCst);
    let ended = runtime.block_on(run(job, watch));
    end_strays();
    idle.store(true, Ordering::SeqCst);
    ended
}

/// True while no job is supervised. Whoever once listens to a signal has taken its own effect away for good: between jobs it is
/// given back.
fn idle() -> io::Result<&'static AtomicBool> {
    static IDLE: OnceLock<Arc<AtomicBool>> = OnceLock::new();
    if IDLE.get().is_none() {
        let idle = Arc::new(AtomicBool::new(true));
        for signal in [Signal::SIGTERM, Signal::SIGINT] {
            let code = 128 + signal as i32;
            signal_hook::flag::register_conditional_shutdown(signal as i32, code, Arc::clone(&idle))?;
        }
        let _ = IDLE.set(idle);
    }
    Ok(IDLE.get().expect("it was set"))
}

/// After one of several ranks has failed, the others find out by themselves and say more about it; then they are ended.
const GRACE: Duration = Duration::from_secs(3);
/// A rank that has given signs of life and gives none for so long is stopped, or its machine is out of memory.
const SILENCE: Duration = Duration::from_secs(6);
/// One whose work is done takes leave of MPI, and gives none meanwhile: that takes a while where many do on one host.
const PARTING: Duration = Duration::from_secs(120);
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// What happens to a process of the job.
enum News {
    Line(String),
    Ended(io::Result<ExitStatus>),
}

async fn run(job: &Job, watch: &mut dyn FnMut(&Event) -> Option<Signal>) -> io::Result<Ended> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut user = signal(SignalKind::user_defined1())?;
    let (tell, mut news) = mpsc::unbounded_channel();
    // Without one, ranks say their losses by themselves.
    let ear = [std::env::temp_dir(), "/tmp".into()]
        .iter()
        .find_map(|folder| Ear::open(folder).ok());
    let alone = [Vec::new()];
    let ranks = if job.ranks.is_empty() { &alone[..] } else { &job.ranks };
    let mut group = Group {
        members: Vec::new(),
        asked_to_end: None,
    };
    for (index, env) in ranks.iter().enumerate() {
        match spawn(job, env, ear.as_ref()) {
            Ok(child) => {
                group.members.push(Member {
                    id: child.id(),
                    alive: true,
                    heard: None,
                });
                follow(child, index, tell.clone());
            }
            Err(error) => {
                group.end();
                return Err(error);
            }
        }
    }
    let mut heard = Heard::default();
    let mut first: Option<ExitStatus> = None;
    let mut grace: Option<Instant> = None;
    let mut looks = tokio::time::interval(LOOK_EVERY);
    looks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut last_look = Instant::now();
    while group.members.iter().any(|member| member.alive) {
        tokio::select! {
            Some((index, news)) = news.recv() => match news {
                News::Line(line) => {
                    if line.contains(BEAT) {
                        group.members[index].heard = Some((Instant::now(), SILENCE));
                    } else if line.contains(LEAVES) {
                        // mpirun speaks for all its ranks, and is not watched.
                        let heard = &mut group.members[index].heard;
                        *heard = heard.map(|_| (Instant::now(), PARTING));
                    } else {
                        group.send(heard.take(&line, watch));
                    }
                }
                News::Ended(status) => {
                    let status = status?;
                    let member = &mut group.members[index];
                    member.alive = false;
                    if !status.success() && first.is_none() {
                        first = Some(status);
                        if !job.ranks.is_empty() {
                            heard.failed(index, member.id, status, group.asked_to_end);
                        }
                        grace = Some(Instant::now() + GRACE);
                    }
                }
            },
            text = Ear::listen(ear.as_ref()) => heard.told(&text),
            _ = looks.tick() => {
                let now = Instant::now();
                // Where this process itself was stopped meanwhile, the beats are still in the pipe.
                let was_away = now.duration_since(last_look) > SILENCE / 2;
                last_look = now;
                for (index, member) in group.members.iter_mut().enumerate() {
                    let Some((since, patience)) = member.heard.filter(|_| member.alive) else { continue };
                    if was_away {
                        member.heard = Some((now, patience));
                    } else if now.duration_since(since) > patience {
                        heard.silent(index, member.id, patience);
                        member.end();
                    }
                }
                if grace.is_some_and(|until| now > until) {
                    group.end();
                }
            }
            _ = terminate.recv() => group.forward(Signal::SIGTERM),
            _ = interrupt.recv() => group.forward(Signal::SIGINT),
            _ = user.recv() => group.send(Some(Signal::SIGUSR1)),
        }
    }
    while let Some(text) = ear.as_ref().and_then(Ear::rest) {
        heard.told(&text);
    }
    // Whatever of the groups still holds a pipe must go before its end can be read.
    group.end();
    drop(tell);
    // A stray outside the groups may hold a pipe open; it is ended after this.
    while let Ok(Some((_, last))) = tokio::time::timeout(Duration::from_secs(1), news.recv()).await {
        if let News::Line(line) = last
            && !line.contains(BEAT)
        {
            heard.take(&line, watch);
        }
    }
    let code = match (first, heard.code) {
        (None, _) => 0,
        // The ranks agreed on a code; what the first of them, or mpirun, ended with may be the consequence.
        (Some(_), Some(code)) => code,
        (Some(status), None) => group.exit_code(status),
    };
    Ok(Ended {
        code,
        result: heard.result,
        lost: heard.lost,
        asked: group.asked_to_end.is_some(),
    })
}

/// As `Event::Beat` is written. There are many; none is parsed.
const BEAT: &str = r#"{"event":"beat"}"#;
/// As `Event::Leaves` is.
const LEAVES: &str = r#"{"event":"leaves"}"#;

fn spawn(job: &Job, rank: &[(&'static str, String)], ear: Option<&Ear>) -> io::Result<Child> {
    let mut command = Command::new(std::env::current_exe()?);
    command
        .arg(TETHER)
        .arg(std::process::id().to_string())
        .arg(&job.program)
        .args(&job.args);
    if !rank.is_empty() {
        // This process may be a rank of somebody else's, alone: its ranks are not.
        for name in RANK_VARIABLES {
            command.env_remove(name);
        }
    }
    command.envs(job.env.iter().chain(rank).map(|(name, value)| (name, value)));
    command.envs(ear.map(|ear| (EAR, &ear.path)));
    // Its own group: Ctrl-C reaches it through us only, once.
    command
        .process_group(0)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .kill_on_drop(true);
    command.spawn()
}

/// Tells what a process says and how it ends, the one beside the other: a stray may hold the pipe.
fn follow(mut child: Child, index: usize, tell: UnboundedSender<(usize, News)>) {
    let stdout = child.stdout.take().map(BufReader::new);
    let said = tell.clone();
    tokio::spawn(async move {
        let Some(mut stdout) = stdout else { return };
        let mut bytes = Vec::new();
        // Libraries print there too, in whatever bytes.
        while let Ok(1..) = stdout.read_until(b'\n', &mut bytes).await {
            let line = String::from_utf8_lossy(&bytes)
                .trim_end_matches(['\n', '\r'])
                .to_owned();
            bytes.clear();
            if said.send((index, News::Line(line))).is_err() {
                return;
            }
        }
    });
    tokio::spawn(async move {
        let status = child.wait().await;
        let _ = tell.send((index, News::Ended(status)));
    });
}

/// What the job's processes have said that outlives them.
#[derive(Default)]
struct Heard {
    result: Option<serde_json::Value>,
    lost: Option<String>,
    code: Option<i32>,
    /// A loss was said here, and not by the rank that found it.
    said: bool,
}

impl Heard {
    /// Takes in one line of a worker's standard output; gives back what `watch` wants sent.
    fn take(&mut self, line: &str, watch: &mut dyn FnMut(&Event) -> Option<Signal>) -> Option<Signal> {
        match serde_json::from_str(line) {
            Ok(event) => {
                match &event {
                    Event::Done { result } => self.result = Some(result.clone()),
                    Event::Lost { code, text } => {
                        self.code.get_or_insert(*code);
                        self.lost.get_or_insert_with(|| text.clone());
                    }
                    _ => {}
                }
                watch(&event)
            }
            // A library's chatter: not ours, but perhaps the only clue.
            Err(_) => {
                say(line);
                None
            }
        }
    }

    /// Told past mpirun, by a rank that leaves the saying to us.
    fn told(&mut self, event: &str) {
        let Ok(Event::Lost { code, text }) = serde_json::from_str(event) else {
            return;
        };
        if !std::mem::replace(&mut self.said, true) {
            say(format_args!("panglot: {text}"));
        }
        self.code.get_or_insert(code);
        self.lost.get_or_insert(text);
    }

    /// The first of several ranks to fail has ended like this.
    fn failed(&mut self, rank: usize, id: Option<u32>, status: ExitStatus, asked: Option<Signal>) {
        let Some(signal) = status.signal().filter(|_| asked.is_none()) else {
            return;
        };
        let name = Signal::try_from(signal).map_or_else(|_| signal.to_string(), |signal| signal.to_string());
        let text = format!("rank {rank} (process {}) was ended by {name}", id.unwrap_or(0));
        say(format_args!("panglot: {text}"));
        self.lost.get_or_insert(text);
        self.code.get_or_insert(exit::PEER);
    }

    fn silent(&mut self, rank: usize, id: Option<u32>, patience: Duration) {
        let id = id.unwrap_or(0);
        let why = match process_state(id) {
            Some('T') => "it is stopped by a signal",
            _ => "it does not run",
        };
        let seconds = patience.as_secs();
        let text = format!(
            "the rank in process {id} ({rank} of this launcher's) gave no sign for {seconds} s: {why}; it is killed"
        );
        say(format_args!("panglot: {text}"));
        self.lost.get_or_insert(text);
        self.code.get_or_insert(exit::PEER);
    }
}

/// The kernel's letter for what a process does (proc(5)): T is stopped by a signal, Z has ended and nobody has asked for its
/// code. None if there is none of that number.
pub fn process_state(process: impl std::fmt::Display) -> Option<char> {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
    // Its name, in parentheses, may hold anything.
    stat.rsplit_once(") ")?.1.chars().next()
}

const MOST_TOLD: usize = 16 << 10;

const EARS: &str = "panglot-";
const SOCKET: &str = "ear";

/// What killed supervisors of this user left in a folder: sockets that nobody listens to.
fn remove_deaf(folder: &Path) {
    let Ok(unbound) = std::os::unix::net::UnixDatagram::unbound() else {
        return;
    };
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path().join(SOCKET);
        let is_ours = entry.file_name().to_str().is_some_and(|name| name.starts_with(EARS));
        if is_ours
            && unbound
                .connect(&path)
                .is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused)
        {
            let _ = std::fs::remove_file(&path);
            let _ = std::fs::remove_dir(entry.path());
        }
    }
}

/// A socket in a folder that only this user can enter, gone with this.
struct Ear {
    path: PathBuf,
    socket: UnixDatagram,
}

impl Ear {
    /// # Errors
    /// When the folder cannot be written, or its name is longer than a socket's may be.
    fn open(folder: &Path) -> io::Result<Ear> {
        remove_deaf(folder);
        let nonce: [u8; 8] = rendezvous::secret::random()?;
        let folder = folder.join(format!("{EARS}{:016x}", u64::from_le_bytes(nonce)));
        std::fs::DirBuilder::new().mode(0o700).create(&folder)?;
        let path = folder.join(SOCKET);
        let socket = UnixDatagram::bind(&path).inspect_err(|_| drop(std::fs::remove_dir(&folder)))?;
        Ok(Ear { path, socket })
    }

    async fn listen(ear: Option<&Ear>) -> String {
        let Some(ear) = ear else {
            return std::future::pending().await;
        };
        let mut text = vec![0; MOST_TOLD];
        match ear.socket.recv(&mut text).await {
            Ok(length) => String::from_utf8_lossy(&text[..length]).into_owned(),
            Err(_) => std::future::pending().await,
        }
    }

    /// What was told and not yet heard.
    fn rest(&self) -> Option<String> {
        let mut text = vec![0; MOST_TOLD];
        let length = self.socket.try_recv(&mut text).ok()?;
        Some(String::from_utf8_lossy(&text[..length]).into_owned())
    }
}

impl Drop for Ear {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
        let _ = self.path.parent().map(std::fs::remove_dir);
    }
}

/// A process that we started, with its process group, whose number is its own.
struct Member {
    id: Option<u32>,
    alive: bool,
    /// Its last sign of life, if it gives any, and how long the next may take.
    heard: Option<(Instant, Duration)>,
}

impl Member {
    fn end(&self) {
        if let Some(id) = self.id {
            let _ = killpg(Pid::from_raw(id as i32), Signal::SIGKILL);
        }
    }
}

struct Group {
    members: Vec<Member>,
    asked_to_end: Option<Signal>,
}

impl Group {
    /// To the processes that we started only: mpirun passes signals on to its ranks in its own way.
    fn send(&mut self, signal: Option<Signal>) {
        let Some(signal) = signal else { return };
        if matches!(signal, Signal::SIGTERM | Signal::SIGINT) {
            self.asked_to_end = Some(signal);
        }
        for id in self
            .members
            .iter()
            .filter(|member| member.alive)
            .filter_map(|member| member.id)
        {
            // It may have just ended, which is what the signal was for.
            let _ = kill(Pid::from_raw(id as i32), signal);
        }
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
        self.members.iter().for_each(Member::end);
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

/// Becomes `program`, which gets a signal when the process `parent` ends in whatever way: SIGTERM for mpirun, which has ranks to
/// end; else SIGKILL, which a worker that is stopped gets too. Returns only if that fails.
pub fn tether(parent: i32, program: &Path, args: &[OsString]) -> io::Error {
    let signal = match program.file_name() == Some(OsStr::new("mpirun")) {
        true => Signal::SIGTERM,
        false => Signal::SIGKILL,
    };
    if let Err(error) = prctl::set_pdeathsig(signal) {
        return error.into();
    }
    // It may have ended before the line above.
    if getppid() != Pid::from_raw(parent) {
        return io::Error::other("the supervising process is gone");
    }
    std::process::Command::new(program).args(args).exec()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_ear_removes_those_of_the_dead_and_no_other() {
        let folder = tempfile::tempdir().unwrap();
        let alive = Ear::open(folder.path()).unwrap();
        let (dead, foreign) = (folder.path().join("panglot-0"), folder.path().join("other-0"));
        for left in [&dead, &foreign] {
            std::fs::create_dir(left).unwrap();
            drop(std::os::unix::net::UnixDatagram::bind(left.join(SOCKET)).unwrap());
        }
        let next = Ear::open(folder.path()).unwrap();
        assert!(alive.path.exists() && next.path.exists() && foreign.exists() && !dead.exists());
        drop((alive, next));
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }
}
