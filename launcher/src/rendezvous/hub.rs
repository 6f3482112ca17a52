//! Rank 0's side: lets in who proves the job's secret, compares what all run, and watches over them.

use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::mpsc as blocking;
use std::time::{Duration, Instant};

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::mpsc::{self, UnboundedReceiver, UnboundedSender};
use tokio::task::{AbortHandle, JoinHandle};

use super::watch::{Finding, Watch};
use super::wire::{self, Attempt, Message, Receiver, Sender, WireError};
use super::{
    Command, Hooks, Invitation, Loss, MeetError, Meeting, Report, Secret, Settings, Suspicion, Terminate, Timing,
    address, every, runtime, sameness, secret, set_up,
};
use crate::exit;
use crate::pulse::{Phase, Pulse};

/// Connections that wait to be accepted; the kernel bounds it further.
const BACKLOG: u32 = 4096;
/// Before the process ends, the others should have read why.
const FLUSH: Duration = Duration::from_millis(500);

pub struct Hub {
    settings: Settings,
    runtime: tokio::runtime::Runtime,
    listeners: Vec<TcpListener>,
    invitation: Invitation,
    attempt: Attempt,
    secret: Secret,
}

impl Hub {
    /// Listens on one interface, on ports that the kernel chooses.
    pub fn open(settings: Settings) -> Result<Hub, MeetError> {
        // Each rank is a connection; the usual soft limit of 1024 files is few.
        if let Ok((_, hard)) = getrlimit(Resource::RLIMIT_NOFILE) {
            let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
        }
        let host = &settings.report.host;
        let (wanted, near) = (settings.interface.as_deref(), settings.near);
        let interface = address::choose(&address::interfaces()?, host, wanted, settings.one_host, near)?;
        let runtime = runtime()?;
        let listeners: Vec<TcpListener> = runtime.block_on(async {
            // An address that was taken away this moment is no reason to give the others up.
            interface
                .addresses
                .iter()
                .filter_map(|address| listen((*address, 0).into()).ok())
                .collect()
        });
        if listeners.is_empty() {
            let text = format!(
                "{host} cannot listen on any address of its interface {}",
                interface.name
            );
            return Err(io::Error::other(text).into());
        }
        let secret = match &settings.secret {
            Some(secret) => secret.clone(),
            None => Secret::new()?,
        };
        let attempt = Attempt {
            job: settings.job.clone(),
            nonce: secret::random()?,
            world: settings.world,
        };
        let invitation = Invitation {
            job: settings.job.clone(),
            attempt: attempt.nonce.iter().map(|byte| format!("{byte:02x}")).collect(),
            world: settings.world,
            host: host.clone(),
            interface: interface.name.clone(),
            addresses: listeners
                .iter()
                .map(TcpListener::local_addr)
                .collect::<io::Result<_>>()?,
            secret: settings.secret.is_none().then(|| secret.to_hex()),
        };
        Ok(Hub {
            settings,
            runtime,
            listeners,
            invitation,
            attempt,
            secret,
        })
    }

    pub fn invitation(&self) -> &Invitation {
        &self.invitation
    }

    /// Waits until all ranks are there and alike; a thread watches over them from then on.
    pub fn meet(self, pulse: Arc<Pulse>, hooks: Hooks) -> Result<Meeting, MeetError> {
        let (commands, inbox) = mpsc::unbounded_channel();
        let (tell, met) = blocking::channel();
        // Rank 0 gets back what it sends by itself.
        let (_, bytes) = blocking::channel();
        let run = move || {
            let Hub {
                settings,
                runtime,
                listeners,
                invitation,
                attempt,
                secret,
            } = self;
            let mut meeting = Gathering::new(settings, invitation);
            runtime.block_on(async move {
                match meeting.gather(listeners, &attempt, &secret).await {
                    Ok(watching) => {
                        let _ = tell.send(Ok(()));
                        watching.watch(&pulse, hooks, inbox).await;
                    }
                    Err(error) => {
                        let _ = tell.send(Err(error));
                    }
                }
            });
        };
        std::thread::Builder::new().name("hub".into()).spawn(run)?;
        match met.recv() {
            Ok(Ok(())) => Ok(Meeting {
                rank: 0,
                commands,
                bytes,
            }),
            Ok(Err(error)) => Err(error),
            Err(_) => Err(io::Error::other("the watching thread has ended").into()),
        }
    }
}

fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = match address {
        SocketAddr::V4(_) => TcpSocket::new_v4()?,
        SocketAddr::V6(_) => TcpSocket::new_v6()?,
    };
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

/// What happens on the connections.
enum News {
    Connected(TcpStream),
    /// A connection has proved itself.
    Proved(usize, Sender, Receiver),
    /// Of the rank's connection with this number.
    Said(usize, u64, Message),
    Closed(usize, u64, WireError),
}

/// One rank's connection.
struct Seat {
    number: u64,
    report: Option<Report>,
    out: UnboundedSender<Message>,
    writer: JoinHandle<()>,
}

struct Gathering {
    settings: Settings,
    invitation: Invitation,
    seats: Vec<Option<Seat>>,
    tell: UnboundedSender<News>,
    news: UnboundedReceiver<News>,
    next: u64,
}

impl Gathering {
    fn new(settings: Settings, invitation: Invitation) -> Gathering {
        let (tell, news) = mpsc::unbounded_channel();
        Gathering {
            seats: (0..settings.world).map(|_| None).collect(),
            settings,
            invitation,
            tell,
            news,
            next: 0,
        }
    }

    async fn gather(
        &mut self,
        listeners: Vec<TcpListener>,
        attempt: &Attempt,
        secret: &Secret,
    ) -> Result<Watching, MeetError> {
        let doors: Vec<JoinHandle<()>> = listeners
            .into_iter()
            .map(|listener| tokio::spawn(accept(listener, self.tell.clone())))
            .collect();
        let outcome = self.let_in(attempt, secret).await;
        // Nobody else is expected: from here on a stranger meets no open port.
        doors.iter().for_each(JoinHandle::abort);
        let Timing { arrive, .. } = self.settings.timing;
        let refused = match outcome {
            Ok(()) => sameness::differences(&self.reports()).map(|text| MeetError::Refused {
                code: exit::REFUSED,
                text,
            }),
            Err(_) => Some(self.missing(arrive)),
        };
        if let Some(error) = refused {
            let (code, text) = (error.code(), error.to_string());
            self.tell_all(&Message::Stop { code, text });
            flush(self.seats.iter_mut().flatten()).await;
            return Err(error);
        }
        self.tell_all(&Message::Welcome);
        let reports = self.reports();
        let names = reports
            .iter()
            .enumerate()
            .map(|(rank, report)| (rank, report.name(rank)))
            .collect();
        Ok(Watching {
            watch: Watch::new(names, self.settings.timing.silence, Instant::now()),
            names: reports
                .iter()
                .enumerate()
                .map(|(rank, report)| report.name(rank))
                .collect(),
            timing: self.settings.timing,
            seats: std::mem::take(&mut self.seats),
            // Both ends change owner; this end sends nothing any more.
            news: std::mem::replace(&mut self.news, mpsc::unbounded_channel().1),
        })
    }

    /// Returns when every rank has said what it runs.
    async fn let_in(&mut self, attempt: &Attempt, secret: &Secret) -> Result<(), tokio::time::error::Elapsed> {
        let deadline = tokio::time::Instant::now() + self.settings.timing.arrive;
        // Whoever connects and says nothing is put out when others come, oldest first: ranks prove themselves within
        // milliseconds, so that no number of strangers keeps them out.
        let most = 2 * self.settings.world + 64;
        let mut pending: VecDeque<AbortHandle> = VecDeque::new();
        while !self.is_complete() {
            let Some(news) = tokio::time::timeout_at(deadline, self.news.recv()).await? else {
                continue;
            };
            match news {
                News::Connected(stream) => {
                    pending.retain(|task| !task.is_finished());
                    if pending.len() >= most {
                        pending.pop_front().inspect(AbortHandle::abort);
                    }
                    pending.push_back(self.prove(stream, attempt, secret));
                }
                News::Proved(rank, sender, receiver) => self.seat(rank, sender, receiver),
                News::Said(rank, number, Message::Report(report)) => {
                    if let Some(seat) = self.seats[rank].as_mut().filter(|seat| seat.number == number) {
                        seat.report = Some(report);
                    }
                }
                News::Said(..) => {}
                // It may come again.
                News::Closed(rank, number, _) => {
                    if self.seats[rank].as_ref().is_some_and(|seat| seat.number == number) {
                        self.seats[rank] = None;
                    }
                }
            }
        }
        pending.iter().for_each(AbortHandle::abort);
        Ok(())
    }

    fn is_complete(&self) -> bool {
        self.seats[1..]
            .iter()
            .all(|seat| seat.as_ref().is_some_and(|seat| seat.report.is_some()))
    }

    /// Lets a connection prove itself, beside everything else.
    fn prove(&self, stream: TcpStream, attempt: &Attempt, secret: &Secret) -> AbortHandle {
        let (tell, attempt, secret) = (self.tell.clone(), attempt.clone(), secret.clone());
        let Timing { handshake, silence, .. } = self.settings.timing;
        let world = self.settings.world;
        let task = tokio::spawn(async move {
            if set_up(&stream, silence).is_err() {
                return;
            }
            let proved = tokio::time::timeout(handshake, wire::receive_member(stream, &secret, &attempt)).await;
            if let Ok(Ok((rank, sender, receiver))) = proved
                && (1..world).contains(&rank)
            {
                let _ = tell.send(News::Proved(rank, sender, receiver));
            }
        });
        task.abort_handle()
    }

    fn seat(&mut self, rank: usize, sender: Sender, mut receiver: Receiver) {
        self.next += 1;
        let number = self.next;
        let (out, messages) = mpsc::unbounded_channel();
        let writer = tokio::spawn(write(sender, messages));
        if self.seats[rank].is_some() {
            let text = format!("rank {rank} is there already; two processes were given the same rank");
            let code = exit::REFUSED;
            let _ = out.send(Message::Stop { code, text });
            return;
        }
        let tell = self.tell.clone();
        tokio::spawn(async move {
            loop {
                let news = match receiver.receive().await {
                    Ok(message) => News::Said(rank, number, message),
                    Err(error) => News::Closed(rank, number, error),
                };
                let over = matches!(news, News::Closed(..));
                if tell.send(news).is_err() || over {
                    return;
                }
            }
        });
        self.seats[rank] = Some(Seat {
            number,
            report: None,
            out,
            writer,
        });
    }

    /// By rank; rank 0's is ours.
    fn reports(&self) -> Vec<Report> {
        let theirs = self.seats[1..].iter().flatten().filter_map(|seat| seat.report.clone());
        std::iter::once(self.settings.report.clone()).chain(theirs).collect()
    }

    fn tell_all(&self, message: &Message) {
        for seat in self.seats.iter().flatten() {
            let _ = seat.out.send(message.clone());
        }
    }

    fn missing(&self, within: Duration) -> MeetError {
        let absent = |rank: &usize| self.seats[*rank].as_ref().is_none_or(|seat| seat.report.is_none());
        let missing: Vec<usize> = (1..self.settings.world).filter(absent).collect();
        let addresses: Vec<String> = self.invitation.addresses.iter().map(SocketAddr::to_string).collect();
        MeetError::Missing {
            came: self.settings.world - missing.len(),
            world: self.settings.world,
            host: sameness::printable(&self.invitation.host),
            seconds: within.as_secs(),
            missing: sameness::ranks(&missing),
            addresses: format!("{} ({})", addresses.join(", "), self.invitation.interface),
        }
    }
}

async fn accept(listener: TcpListener, tell: UnboundedSender<News>) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                if tell.send(News::Connected(stream)).is_err() {
                    return;
                }
            }
            // Too many open files, or a connection that is gone already: others may do better in a moment.
            Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
        }
    }
}

/// Sends what is queued, then closes this direction.
async fn write(mut sender: Sender, mut messages: UnboundedReceiver<Message>) {
    while let Some(message) = messages.recv().await {
        if sender.send(&message).await.is_err() {
            return;
        }
    }
    sender.shut().await;
}

/// Waits a moment for everything queued to be sent.
async fn flush(seats: impl Iterator<Item = &mut Seat>) {
    let writers: Vec<&mut JoinHandle<()>> = seats
        .map(|seat| {
            // The writer ends after what is queued.
            seat.out = mpsc::unbounded_channel().0;
            &mut seat.writer
        })
        .collect();
    let all = async {
        for writer in writers {
            let _ = writer.await;
        }
    };
    let _ = tokio::time::timeout(FLUSH, all).await;
}

/// All are there.
struct Watching {
    watch: Watch,
    names: Vec<String>,
    timing: Timing,
    seats: Vec<Option<Seat>>,
    news: UnboundedReceiver<News>,
}

impl Watching {
    async fn watch(mut self, pulse: &Pulse, mut hooks: Hooks, mut commands: UnboundedReceiver<Command>) {
        let lost = match self.until_over(pulse, &mut hooks, &mut commands).await {
            Over::Ended(done) => {
                self.tell_all(&Message::Bye);
                flush(self.seats.iter_mut().flatten()).await;
                let _ = done.send(());
                return;
            }
            Over::Failed(loss, done) => {
                self.stop_all(&loss).await;
                // This rank ends by itself, for its own reason.
                let _ = done.send(());
                return;
            }
            Over::Lost(loss) => loss,
        };
        pulse.end();
        self.stop_all(&lost).await;
        (hooks.lost)(lost);
    }

    async fn stop_all(&mut self, loss: &Loss) {
        let Loss { code, text, .. } = loss.clone();
        self.tell_all(&Message::Stop { code, text });
        flush(self.seats.iter_mut().flatten()).await;
    }

    fn tell_all(&self, message: &Message) {
        for seat in self.seats.iter().flatten() {
            let _ = seat.out.send(message.clone());
        }
    }

    async fn until_over(
        &mut self,
        pulse: &Pulse,
        hooks: &mut Hooks,
        commands: &mut UnboundedReceiver<Command>,
    ) -> Over {
        let Ok(mut terminate) = Terminate::new(hooks.takes_sigterm) else {
            return Over::Lost(lost("rank 0 cannot listen for SIGTERM".into()));
        };
        let mut beats = every(self.timing.beat);
        let mut suspicion: Option<Suspicion> = None;
        let mut leaving: Option<blocking::Sender<()>> = None;
        loop {
            if leaving.is_some() && self.watch.all_left_but(0) {
                return Over::Ended(leaving.take().expect("just seen"));
            }
            tokio::select! {
                news = self.news.recv() => match news {
                    Some(News::Said(rank, _, message)) => match self.hear(rank, message) {
                        Some(loss) if loss.code == exit::PEER => {
                            suspicion.get_or_insert_with(|| Suspicion::new(loss));
                        }
                        Some(loss) => return Over::Lost(loss),
                        None => {}
                    },
                    Some(News::Closed(rank, _, error)) if !self.watch.has_left(rank) => {
                        self.watch.hear(0, pulse.state(), Instant::now());
                        let why = match error {
                            WireError::Broken(error) if error.kind() == io::ErrorKind::TimedOut => {
                                "cannot be reached any more: its host is down, or cut off from the network".to_owned()
                            }
                            WireError::Broken(_) => "is gone: killed, crashed, or out of memory".to_owned(),
                            other => format!("is not itself any more ({other})"),
                        };
                        return Over::Lost(lost(self.watch.sentence(rank, &why)));
                    }
                    _ => {}
                },
                _ = beats.tick() => {
                    let state = pulse.state();
                    self.watch.hear(0, state, Instant::now());
                    self.tell_all(&Message::Beat(state));
                    if let Some(loss) = (hooks.beat)() {
                        return Over::Lost(loss);
                    }
                    match self.watch.tick(Instant::now()).or_else(|| self.watch.stuck(Instant::now())) {
                        Some(Finding::Over(text)) => return Over::Lost(lost(text)),
                        Some(Finding::Notice(text)) => (hooks.notice)(&text),
                        None => {}
                    }
                }
                Some(command) = commands.recv() => match command {
                    Command::Bytes(bytes) => self.tell_all(&Message::Bytes(bytes)),
                    Command::Fail { code, text, done } => {
                        let loss = Loss {
                            code,
                            text: format!("{}: {text}", self.names[0]),
                            told: false,
                        };
                        if code != exit::PEER {
                            return Over::Failed(loss, done);
                        }
                        // A lost peer is seen here in a moment, if it is one.
                        suspicion.get_or_insert_with(|| Suspicion::new(loss));
                    }
                    Command::Leave(done) => {
                        pulse.at(Phase::End, 0);
                        self.watch.leave(0);
                        leaving = Some(done);
                    }
                },
                () = terminate.recv() => {
                    suspicion.get_or_insert_with(|| Suspicion::of_sigterm(pulse));
                }
                () = Suspicion::over(&suspicion) => {
                    return Over::Lost(suspicion.take().expect("just over").loss);
                }
            }
        }
    }

    /// Takes in what a rank says; a loss, if it has failed.
    fn hear(&mut self, rank: usize, message: Message) -> Option<Loss> {
        match message {
            Message::Beat(state) => self.watch.hear(rank, state, Instant::now()),
            Message::Bye => self.watch.leave(rank),
            Message::Failed { code, text } => {
                let text = format!("{}: {}", self.names[rank], sameness::printable(&text));
                return Some(Loss {
                    code,
                    text,
                    told: false,
                });
            }
            _ => {}
        }
        None
    }
}

fn lost(text: String) -> Loss {
    Loss {
        code: exit::PEER,
        text,
        told: false,
    }
}

enum Over {
    Ended(blocking::Sender<()>),
    Failed(Loss, blocking::Sender<()>),
    Lost(Loss),
}
