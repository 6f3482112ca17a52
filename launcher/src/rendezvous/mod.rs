//! How the ranks of a job meet and watch over each other, beside the collectives: rank 0 is the hub, every other rank keeps
//! one connection to it. All prove that they know the job's secret, show that they run the same, and from then on give signs
//! of life, several a second. Who is gone or silent is named, and everybody stops.
//!
//! A thread of its own does this in every process: it lives on while the training loop computes or waits, and a process that
//! is stopped stops giving signs. Messages are O(n) in all: each rank talks to the hub only.

mod address;
mod hub;
mod member;
pub mod sameness;
pub mod secret;
pub mod watch;
pub mod wire;

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::net::TcpStream;
use tokio::sync::mpsc::UnboundedSender;

pub use address::{AddressError, interfaces, towards};
pub use hub::Hub;
pub use sameness::Report;
pub use secret::{Secret, SecretError};
pub use wire::{MOST_BYTES, fuzz};

use crate::exit;
use crate::pulse::Pulse;

/// What a rank brings to the meeting.
#[derive(Clone, Debug)]
pub struct Settings {
    pub rank: usize,
    pub world: usize,
    /// Whether every rank is on this host, if it is known: loopback will do then, and nobody else can reach it.
    pub one_host: Option<bool>,
    /// Which job; part of every proof.
    pub job: String,
    /// From the environment or a file; without one the hub makes one, and it travels in the invitation's file.
    pub secret: Option<Secret>,
    pub report: Report,
    /// The interface to listen on, if the user names one.
    pub interface: Option<String>,
    /// This host's address on the cluster's network, if it is known.
    pub near: Option<IpAddr>,
    pub timing: Timing,
}

#[derive(Clone, Copy, Debug)]
pub struct Timing {
    /// Between two signs of life.
    pub beat: Duration,
    /// Without a sign for so long, a rank is lost.
    pub silence: Duration,
    /// For a connection to prove itself.
    pub handshake: Duration,
    /// For all ranks to arrive. Containers start slowly on hundreds of nodes.
    pub arrive: Duration,
}

impl Timing {
    /// Where few ranks are, what they last said of themselves is fresher.
    pub fn of(world: usize) -> Timing {
        Timing {
            beat: Duration::from_millis(if world <= 64 { 100 } else { 500 }),
            silence: Duration::from_secs(4),
            handshake: Duration::from_secs(5),
            arrive: Duration::from_secs(300),
        }
    }
}

/// Where the hub is. Without a secret it may be told to anybody; with one it lies in a file of mode 0600.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Invitation {
    pub job: String,
    /// Of this attempt of the job, 16 bytes in hexadecimal digits: a rank of another attempt proves nothing.
    pub attempt: String,
    pub world: usize,
    pub host: String,
    pub interface: String,
    /// Candidates, to be tried in this order.
    pub addresses: Vec<SocketAddr>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secret: Option<String>,
}

impl Invitation {
    /// Finished or invisible, and readable for this user only.
    pub fn publish(&self, file: &Path) -> io::Result<()> {
        if let Some(folder) = file.parent() {
            std::fs::create_dir_all(folder)?;
        }
        secret::write_private(file, &serde_json::to_string_pretty(self)?)
    }

    pub fn read(file: &Path) -> Result<Invitation, MeetError> {
        let text = secret::read_private(file)?;
        serde_json::from_str(&text).map_err(|_| MeetError::NoInvitation { file: file.to_owned() })
    }

    fn attempt(&self) -> Option<wire::Attempt> {
        let mut nonce = [0; 16];
        if self.attempt.len() != 32 || !self.attempt.is_ascii() {
            return None;
        }
        for (byte, digits) in nonce.iter_mut().zip(self.attempt.as_bytes().chunks(2)) {
            *byte = u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?;
        }
        Some(wire::Attempt {
            job: self.job.clone(),
            nonce,
            world: self.world,
        })
    }
}

/// How a member learns where the hub is.
#[derive(Clone, Debug)]
pub enum Invited {
    /// By the world that MPI has already made; its secret, where the environment has none, is in this file.
    Told(Invitation, PathBuf),
    /// By a file that the hub writes; it may be an older attempt's until then.
    ByFile(PathBuf),
}

#[derive(Debug, thiserror::Error)]
pub enum MeetError {
    #[error(transparent)]
    Address(#[from] AddressError),
    #[error(transparent)]
    Secret(#[from] SecretError),
    #[error("the rendezvous: {0}")]
    Io(#[from] io::Error),
    #[error("{} holds no invitation", file.display())]
    NoInvitation { file: PathBuf },
    #[error(
        "{came} of {world} ranks arrived at {host} within {seconds} s; {missing} did not: look at their logs, and whether their \
         hosts reach {addresses} (another interface can be named with PANGLOT_INTERFACE)"
    )]
    Missing {
        came: usize,
        world: usize,
        host: String,
        seconds: u64,
        missing: String,
        addresses: String,
    },
    #[error("rank {rank} did not reach rank 0 within {seconds} s: {why}")]
    Unreached { rank: usize, seconds: u64, why: String },
    #[error("{text}")]
    Refused { code: i32, text: String },
}

impl MeetError {
    /// What the process leaves with.
    pub fn code(&self) -> i32 {
        match self {
            MeetError::Refused { code, .. } => *code,
            MeetError::Io(_) => exit::IO,
            MeetError::Missing { .. } | MeetError::Unreached { .. } => exit::PEER,
            MeetError::Address(_) | MeetError::Secret(_) | MeetError::NoInvitation { .. } => exit::REFUSED,
        }
    }
}

/// Why the job cannot go on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Loss {
    /// What to leave with.
    pub code: i32,
    pub text: String,
    /// The hub has told it, and says it to the user.
    pub told: bool,
}

/// What the watching thread calls.
pub struct Hooks {
    /// The job is over. In a worker it does not return.
    pub lost: Box<dyn FnOnce(Loss) + Send>,
    /// Something people should know.
    pub notice: Box<dyn FnMut(&str) + Send>,
    /// Called with every beat; may end the job, as when whoever started this process is gone.
    pub beat: Box<dyn FnMut() -> Option<Loss> + Send>,
    /// SIGTERM is waited for: peers may be dead, so the culprit gets a moment to be found before the process leaves.
    pub takes_sigterm: bool,
}

/// Commands to the watching thread.
enum Command {
    Bytes(Vec<u8>),
    Fail {
        code: i32,
        text: String,
        done: mpsc::Sender<()>,
    },
    Leave(mpsc::Sender<()>),
}

/// The ranks have met, and are watched over until [`Meeting::leave`].
pub struct Meeting {
    rank: usize,
    commands: UnboundedSender<Command>,
    bytes: mpsc::Receiver<Vec<u8>>,
}

impl Meeting {
    /// Rank 0: opens, publishes through `publish`, and waits for all.
    pub fn host(
        settings: Settings,
        publish: impl FnOnce(&Invitation) -> Result<(), MeetError>,
        pulse: Arc<Pulse>,
        hooks: Hooks,
    ) -> Result<Meeting, MeetError> {
        let hub = Hub::open(settings)?;
        publish(hub.invitation())?;
        hub.meet(pulse, hooks)
    }

    /// Every other rank.
    pub fn attend(settings: Settings, invited: Invited, pulse: Arc<Pulse>, hooks: Hooks) -> Result<Meeting, MeetError> {
        member::attend(settings, invited, pulse, hooks)
    }

    /// Rank 0's `mine` on every rank, up to [`MOST_BYTES`] less one. `mine` counts on rank 0 only.
    pub fn broadcast(&self, mine: &[u8]) -> Result<Vec<u8>, MeetError> {
        let gone = || MeetError::Io(io::Error::other("the watching thread has ended"));
        if self.rank == 0 {
            self.commands.send(Command::Bytes(mine.to_vec())).map_err(|_| gone())?;
            return Ok(mine.to_vec());
        }
        self.bytes.recv().map_err(|_| gone())
    }

    /// Tells everybody that this rank has failed, so that they need not guess; returns when it is sent.
    pub fn fail(&self, code: i32, text: &str) {
        let (done, told) = mpsc::channel();
        let text = text.to_owned();
        if self.commands.send(Command::Fail { code, text, done }).is_ok() {
            let _ = told.recv_timeout(Duration::from_secs(1));
        }
    }

    /// This rank has done its part. Rank 0 watches on until all have.
    pub fn leave(self) {
        let (done, left) = mpsc::channel();
        if self.commands.send(Command::Leave(done)).is_ok() {
            let _ = left.recv();
        }
    }
}

/// What every connection of ours is set to: small messages at once, and an error instead of silence when the other side has not
/// acknowledged anything for `silence`.
fn set_up(stream: &TcpStream, silence: Duration) -> io::Result<()> {
    stream.set_nodelay(true)?;
    nix::sys::socket::setsockopt(
        stream,
        nix::sys::socket::sockopt::TcpUserTimeout,
        &(silence.as_millis() as u32),
    )?;
    Ok(())
}

fn runtime() -> io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()
}

/// Beats; those that were missed while this process was away are not made up for.
fn every(beat: Duration) -> tokio::time::Interval {
    let mut beats = tokio::time::interval(beat);
    beats.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    beats
}

/// SIGTERM, where it is ours to take.
struct Terminate(Option<tokio::signal::unix::Signal>);

impl Terminate {
    fn new(take: bool) -> io::Result<Terminate> {
        let kind = tokio::signal::unix::SignalKind::terminate();
        Ok(Terminate(match take {
            true => Some(tokio::signal::unix::signal(kind)?),
            false => None,
        }))
    }

    async fn recv(&mut self) {
        match &mut self.0 {
            Some(signal) => {
                signal.recv().await;
            }
            None => std::future::pending().await,
        }
    }
}

/// How long a suspicion waits for the real culprit: who is told to end, or sees a collective fail, is rarely at fault.
const DOUBT: Duration = Duration::from_millis(300);

/// What will be the loss, unless somebody turns out to be its cause.
struct Suspicion {
    loss: Loss,
    until: tokio::time::Instant,
}

impl Suspicion {
    fn new(loss: Loss) -> Suspicion {
        Suspicion {
            loss,
            until: tokio::time::Instant::now() + DOUBT,
        }
    }

    fn of_sigterm(pulse: &Pulse) -> Suspicion {
        pulse.end();
        Suspicion::new(Loss {
            code: 128 + nix::sys::signal::Signal::SIGTERM as i32,
            text: "was told to end (SIGTERM)".into(),
            told: true,
        })
    }

    async fn over(suspicion: &Option<Suspicion>) {
        match suspicion {
            Some(suspicion) => tokio::time::sleep_until(suspicion.until).await,
            None => std::future::pending().await,
        }
    }
}
