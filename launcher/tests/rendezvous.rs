//! Ranks that meet in one process, over real sockets: who is let in, who is refused, and who is named when it is gone.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use launcher::exit;
use launcher::pulse::{Collective, Phase, Pulse};
use launcher::rendezvous::wire::{self, Attempt, Message};
use launcher::rendezvous::{
    Hooks, Hub, Invitation, Invited, Loss, MeetError, Meeting, Report, Secret, Settings, Timing,
};

const TIMING: Timing = Timing {
    beat: Duration::from_millis(100),
    silence: Duration::from_millis(1500),
    handshake: Duration::from_secs(1),
    arrive: Duration::from_secs(20),
};

fn report(rank: usize) -> Report {
    Report {
        host: format!("n{}", rank / 2),
        process: 100 + rank as u32,
        runs: vec![("build".into(), "b1".into()), ("config".into(), "c1".into())],
    }
}

fn settings(rank: usize, world: usize) -> Settings {
    Settings {
        rank,
        world,
        one_host: Some(true),
        job: "job 7".into(),
        secret: None,
        report: report(rank),
        interface: None,
        near: None,
        timing: TIMING,
    }
}

fn hooks(losses: &Sender<(usize, Loss)>, rank: usize) -> Hooks {
    let losses = losses.clone();
    Hooks {
        lost: Box::new(move |loss| drop(losses.send((rank, loss)))),
        notice: Box::new(|_| {}),
        beat: Box::new(|| None),
        takes_sigterm: false,
    }
}

/// A folder, and a place for what each rank loses.
struct Scene {
    folder: tempfile::TempDir,
    tell: Sender<(usize, Loss)>,
    losses: Receiver<(usize, Loss)>,
}

impl Scene {
    fn new() -> Scene {
        let (tell, losses) = channel();
        Scene {
            folder: tempfile::tempdir().unwrap(),
            tell,
            losses,
        }
    }

    fn file(&self) -> PathBuf {
        self.folder.path().join("rendezvous.json")
    }

    /// Starts a rank on a thread of its own.
    fn start(&self, settings: Settings, pulse: &Arc<Pulse>) -> std::thread::JoinHandle<Result<Meeting, MeetError>> {
        let (file, hooks, pulse) = (self.file(), hooks(&self.tell, settings.rank), Arc::clone(pulse));
        std::thread::spawn(move || match settings.rank {
            0 => Meeting::host(settings, |invitation| Ok(invitation.publish(&file)?), pulse, hooks),
            _ => Meeting::attend(settings, Invited::ByFile(file), pulse, hooks),
        })
    }

    fn meet(&self, world: usize, pulses: &[Arc<Pulse>]) -> Vec<Result<Meeting, MeetError>> {
        // Members first: the file is not there yet.
        let started: Vec<_> = (0..world)
            .rev()
            .map(|rank| self.start(settings(rank, world), &pulses[rank]))
            .collect();
        started.into_iter().rev().map(|rank| rank.join().unwrap()).collect()
    }

    fn invitation(&self) -> Invitation {
        wait_for(|| Invitation::read(&self.file()).ok())
    }
}

fn pulses(world: usize) -> Vec<Arc<Pulse>> {
    (0..world).map(|_| Arc::new(Pulse::default())).collect()
}

fn wait_for<T>(mut found: impl FnMut() -> Option<T>) -> T {
    let started = Instant::now();
    loop {
        if let Some(found) = found() {
            return found;
        }
        assert!(started.elapsed() < Duration::from_secs(20), "waited in vain");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn leave(meetings: Vec<Meeting>) {
    let all: Vec<_> = meetings
        .into_iter()
        .map(|meeting| std::thread::spawn(move || meeting.leave()))
        .collect();
    all.into_iter().for_each(|one| one.join().unwrap());
}

/// A rank of this test's own making, which does as it is told.
fn by_hand(
    invitation: &Invitation,
    secret: &Secret,
    rank: usize,
) -> Result<(wire::Sender, wire::Receiver), wire::WireError> {
    let nonce: Vec<u8> = (0..16)
        .map(|i| u8::from_str_radix(&invitation.attempt[2 * i..2 * i + 2], 16).unwrap())
        .collect();
    let attempt = Attempt {
        job: invitation.job.clone(),
        nonce: nonce.try_into().unwrap(),
        world: invitation.world,
    };
    block(async {
        let stream = tokio::net::TcpStream::connect(invitation.addresses[0]).await?;
        wire::approach_hub(stream, secret, &attempt, rank).await
    })
}

/// One runtime for the whole test program, with a thread of its own: sockets live as long as it does.
fn block<T>(future: impl Future<Output = T>) -> T {
    static RUNTIME: std::sync::OnceLock<tokio::runtime::Handle> = std::sync::OnceLock::new();
    let handle = RUNTIME.get_or_init(|| {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let handle = runtime.handle().clone();
        std::thread::spawn(move || runtime.block_on(std::future::pending::<()>()));
        handle
    });
    handle.block_on(future)
}

#[test]
fn ranks_meet_by_a_file_and_all_get_rank_0s_bytes() {
    let scene = Scene::new();
    let meetings: Vec<Meeting> = scene.meet(4, &pulses(4)).into_iter().map(|met| met.unwrap()).collect();
    let id: Vec<u8> = (0..=255).collect();
    for (rank, meeting) in meetings.iter().enumerate() {
        assert_eq!(meeting.broadcast(if rank == 0 { &id } else { &[] }).unwrap(), id);
    }
    leave(meetings);
    assert!(scene.losses.try_recv().is_err(), "everybody left in peace");
}

#[test]
fn a_rank_that_is_gone_is_named_at_once_with_what_it_did() {
    let scene = Scene::new();
    let pulses = pulses(3);
    pulses[0].at(Phase::Update, 0);
    pulses[0].wait_in(Collective::ReduceScatter, 31);
    let started: Vec<_> = (0..2)
        .map(|rank| scene.start(settings(rank, 3), &pulses[rank]))
        .collect();
    let invitation = scene.invitation();
    let secret = Secret::from_hex(invitation.secret.as_deref().unwrap()).unwrap();
    let (mut sender, receiver) = by_hand(&invitation, &secret, 2).unwrap();
    let state = {
        let pulse = Pulse::default();
        pulse.step(1200);
        pulse.at(Phase::Backward, 9);
        pulse.state()
    };
    block(async { sender.send(&Message::Report(report(2))).await.unwrap() });
    let meetings: Vec<_> = started.into_iter().map(|rank| rank.join().unwrap().unwrap()).collect();
    block(async { sender.send(&Message::Beat(state)).await.unwrap() });
    // All have said where they are.
    std::thread::sleep(Duration::from_millis(300));
    let gone = Instant::now();
    drop((sender, receiver));
    let mut losses: Vec<_> = (0..2)
        .map(|_| scene.losses.recv_timeout(Duration::from_secs(5)).unwrap())
        .collect();
    let took = gone.elapsed();
    assert!(took < Duration::from_secs(1), "{took:?}");
    losses.sort_by_key(|(rank, _)| *rank);
    let [(0, first), (1, second)] = &losses[..] else {
        panic!("{losses:?}")
    };
    assert_eq!(
        first.text,
        "rank 2 on n1 (process 102) is gone: killed, crashed, or out of memory; it was last in backward of stage 9 in step 1200; \
         of the others rank 0 waits in reduce-scatter 31 (the update), rank 1 works at its start"
    );
    assert_eq!((first.code, first.told), (exit::PEER, false));
    assert_eq!(
        (&second.text, second.code, second.told),
        (&first.text, exit::PEER, true)
    );
    drop(meetings);
}

#[test]
fn a_silent_rank_and_a_silent_hub_are_named_by_the_other() {
    let scene = Scene::new();
    let pulses = pulses(2);
    let hub = scene.start(settings(0, 2), &pulses[0]);
    let invitation = scene.invitation();
    let secret = Secret::from_hex(invitation.secret.as_deref().unwrap()).unwrap();
    let (mut sender, _receiver) = by_hand(&invitation, &secret, 1).unwrap();
    block(async { sender.send(&Message::Report(report(1))).await.unwrap() });
    let meeting = hub.join().unwrap().unwrap();
    let silent = Instant::now();
    let (_, loss) = scene.losses.recv_timeout(Duration::from_secs(5)).unwrap();
    let took = silent.elapsed();
    assert!(
        loss.text.starts_with("rank 1 on n0 (process 101) gave no sign for 1."),
        "{loss:?}"
    );
    assert!(took < TIMING.silence + Duration::from_millis(700), "{took:?}");
    drop(meeting);

    // The other way round: a hub that welcomes and falls silent.
    let scene = Scene::new();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let secret = Secret::new().unwrap();
    let invitation = Invitation {
        job: "job 7".into(),
        attempt: "0b".repeat(16),
        world: 2,
        host: "n0".into(),
        interface: "lo".into(),
        addresses: vec![listener.local_addr().unwrap()],
        secret: Some(secret.to_hex()),
    };
    invitation.publish(&scene.file()).unwrap();
    let member = scene.start(settings(1, 2), &pulses[1]);
    let attempt = Attempt {
        job: "job 7".into(),
        nonce: [0x0b; 16],
        world: 2,
    };
    let held = block(async {
        let listener = tokio::net::TcpListener::from_std(listener).unwrap();
        let (stream, _) = listener.accept().await.unwrap();
        let (rank, mut sender, mut receiver) = wire::receive_member(stream, &secret, &attempt).await.unwrap();
        assert_eq!(rank, 1);
        assert_eq!(receiver.receive().await.unwrap(), Message::Report(report(1)));
        sender.send(&Message::Welcome).await.unwrap();
        (sender, receiver)
    });
    let meeting = member.join().unwrap().unwrap();
    let (_, loss) = scene.losses.recv_timeout(Duration::from_secs(5)).unwrap();
    assert!(
        loss.text.starts_with("rank 0 on n0 gave no sign for 1.") && !loss.told,
        "{loss:?}"
    );
    drop((held, meeting));
}

/// Passes bytes on to `hub` until it is cut; then both connections stay open, and nothing comes through any more.
fn cuttable(hub: SocketAddr) -> (SocketAddr, Arc<AtomicBool>) {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let cut = Arc::new(AtomicBool::new(false));
    let is_cut = Arc::clone(&cut);
    std::thread::spawn(move || {
        let (member, _) = listener.accept().unwrap();
        let hub = TcpStream::connect(hub).unwrap();
        let pass = |mut from: TcpStream, mut to: TcpStream, is_cut: Arc<AtomicBool>| {
            std::thread::spawn(move || {
                let mut buffer = [0; 4096];
                while let Ok(n @ 1..) = from.read(&mut buffer) {
                    while is_cut.load(Ordering::Relaxed) {
                        std::thread::park_timeout(Duration::from_secs(1));
                    }
                    to.write_all(&buffer[..n]).unwrap();
                }
            })
        };
        let there = pass(
            member.try_clone().unwrap(),
            hub.try_clone().unwrap(),
            Arc::clone(&is_cut),
        );
        let back = pass(hub, member, is_cut);
        let _ = (there.join(), back.join());
    });
    (address, cut)
}

#[test]
fn of_a_cut_link_both_sides_learn_in_time() {
    let scene = Scene::new();
    let pulses = pulses(2);
    let secret = Some(Secret::new().unwrap());
    let with_secret = |rank| Settings {
        secret: secret.clone(),
        ..settings(rank, 2)
    };
    let hub = scene.start(with_secret(0), &pulses[0]);
    let mut told = scene.invitation();
    assert_eq!(told.secret, None, "the environment's secret is not written down");
    let (through, cut) = cuttable(told.addresses[0]);
    told.addresses = vec![through];
    let invited = Invited::Told(told, scene.file());
    let member = Meeting::attend(with_secret(1), invited, Arc::clone(&pulses[1]), hooks(&scene.tell, 1)).unwrap();
    let hub = hub.join().unwrap().unwrap();
    std::thread::sleep(Duration::from_millis(300));
    assert!(scene.losses.try_recv().is_err());
    let at = Instant::now();
    cut.store(true, Ordering::Relaxed);
    for _ in 0..2 {
        let (rank, loss) = scene.losses.recv_timeout(Duration::from_secs(5)).unwrap();
        let other = if rank == 0 { "rank 1 on n0" } else { "rank 0 on n0" };
        assert!(
            loss.text.starts_with(other) && loss.text.contains("gave no sign for 1."),
            "{loss:?}"
        );
        assert_eq!((loss.code, loss.told), (exit::PEER, false));
    }
    assert!(
        at.elapsed() < TIMING.silence + Duration::from_secs(1),
        "{:?}",
        at.elapsed()
    );
    drop((hub, member));
}

#[test]
fn a_rank_that_fails_is_the_one_that_is_named() {
    let scene = Scene::new();
    let meetings: Vec<Meeting> = scene.meet(3, &pulses(3)).into_iter().map(|met| met.unwrap()).collect();
    meetings[2].fail(exit::IO, "writing checkpoints/step-8: no space left\u{1b}[31m");
    for _ in 0..2 {
        let (rank, loss) = wait_for(|| scene.losses.try_recv().ok());
        assert_ne!(rank, 2, "it ends by itself");
        assert_eq!(loss.code, exit::IO);
        assert_eq!(
            loss.text,
            "rank 2 on n1 (process 102): writing checkpoints/step-8: no space left?[31m"
        );
    }
}

#[test]
fn ranks_that_do_not_run_the_same_are_refused_with_a_table_by_host() {
    for (what, other) in [
        ("build", "b2"),
        ("config", "c2"),
        ("libtorch_cpu.so", "/opt/other/libtorch_cpu.so 1a2b"),
    ] {
        let scene = Scene::new();
        let pulses = pulses(4);
        let ranks: Vec<_> = (0..4)
            .map(|rank| {
                let mut settings = settings(rank, 4);
                if rank == 3 {
                    settings.report.host = "n4".into();
                    settings.report.runs.retain(|(known, _)| known != what);
                    settings.report.runs.push((what.into(), other.into()));
                }
                scene.start(settings, &pulses[rank])
            })
            .collect();
        let started = Instant::now();
        for rank in ranks {
            let refused = rank.join().unwrap().err().expect("refused");
            assert_eq!(refused.code(), exit::REFUSED);
            let text = refused.to_string();
            let first = text.lines().next().unwrap();
            assert!(
                first.starts_with(&format!(
                    "the ranks do not run alike: n4 (rank 3) in {what} differs from the most"
                )),
                "{text}"
            );
            assert!(
                text.contains(other) && text.contains("ranks 0–2") && text.contains("n0, n1"),
                "{text}"
            );
        }
        assert!(started.elapsed() < Duration::from_secs(30));
    }
}

#[test]
fn who_does_not_come_is_listed_and_who_has_no_hub_says_what_it_tried() {
    let short = |rank| Settings {
        timing: Timing {
            arrive: Duration::from_millis(800),
            ..TIMING
        },
        ..settings(rank, 4)
    };
    let scene = Scene::new();
    let pulses = pulses(4);
    let (hub, member) = (
        scene.start(short(0), &pulses[0]),
        scene.start(settings(1, 4), &pulses[1]),
    );
    let said = hub.join().unwrap().err().unwrap().to_string();
    assert!(
        said.starts_with("2 of 4 ranks arrived at n0 within 0 s; ranks 2 and 3 did not"),
        "{said}"
    );
    assert!(said.contains("127.0.0.1:") && said.contains("(lo)"), "{said}");
    assert_eq!(member.join().unwrap().err().unwrap().to_string(), said);

    let lonely = Scene::new();
    let said = lonely
        .start(short(1), &pulses[1])
        .join()
        .unwrap()
        .err()
        .unwrap()
        .to_string();
    assert!(said.starts_with("rank 1 did not reach rank 0 within 0 s: "), "{said}");
    assert!(said.contains("rendezvous.json: No such file"), "{said}");
}

#[test]
fn loopback_is_refused_between_hosts() {
    let wide = |rank| Settings {
        one_host: Some(false),
        interface: Some("lo".into()),
        timing: Timing {
            arrive: Duration::from_millis(500),
            ..TIMING
        },
        ..settings(rank, 2)
    };
    let refused = Hub::open(wide(0)).err().unwrap();
    assert_eq!(refused.code(), exit::REFUSED);
    assert!(
        refused.to_string().starts_with("n0 has no address but its loopback's"),
        "{refused}"
    );
    // An invitation that names it all the same.
    let scene = Scene::new();
    let invitation = Hub::open(settings(0, 2)).unwrap().invitation().clone();
    invitation.publish(&scene.file()).unwrap();
    let mut elsewhere = wide(1);
    elsewhere.report.host = "n9".into();
    let said = scene
        .start(elsewhere, &pulses(1)[0])
        .join()
        .unwrap()
        .err()
        .unwrap()
        .to_string();
    assert!(
        said.contains("is the loopback of n0") && said.contains("PANGLOT_INTERFACE"),
        "{said}"
    );
}

/// Everything a stranger may try, while the ranks are still arriving and while they work.
#[test]
fn strangers_are_not_let_in_and_delay_nobody() {
    let scene = Scene::new();
    let pulses = pulses(3);
    let hub = scene.start(settings(0, 3), &pulses[0]);
    let first = scene.start(settings(1, 3), &pulses[1]);
    let invitation = scene.invitation();
    let address = invitation.addresses[0];
    let secret = Secret::from_hex(invitation.secret.as_deref().unwrap()).unwrap();

    // A thousand that say nothing.
    let mut idle: Vec<TcpStream> = (0..1000).map(|_| TcpStream::connect(address).unwrap()).collect();
    // Garbage, and a frame that announces four gigabytes.
    for garbage in [vec![b'x'; 5000], vec![0xff; 4], b"GET / HTTP/1.1\r\n\r\n".repeat(9)] {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.write_all(&garbage).unwrap();
        assert!(hears_nothing_but_a_challenge(&mut stream));
    }
    // Another secret; the right one, of another attempt, of another job.
    assert!(by_hand(&invitation, &Secret::new().unwrap(), 2).is_err());
    let other = |change: &dyn Fn(&mut Invitation)| {
        let mut invitation = invitation.clone();
        change(&mut invitation);
        by_hand(&invitation, &secret, 2).is_err()
    };
    assert!(other(&|invitation| invitation.attempt = "00".repeat(16)));
    assert!(other(&|invitation| invitation.job = "job 8".into()));
    // A recording of a good rank's whole conversation, played again.
    let recording = record(&invitation, &secret);
    let mut again = TcpStream::connect(address).unwrap();
    again.write_all(&recording).unwrap();
    assert!(hears_nothing_but_a_challenge(&mut again));

    // The ranks meet, within a moment and with the strangers still there.
    let started = Instant::now();
    let last = scene.start(settings(2, 3), &pulses[2]);
    let meetings: Vec<Meeting> = [hub, first, last].map(|rank| rank.join().unwrap().unwrap()).into();
    let took = started.elapsed();
    assert!(took < Duration::from_secs(1), "{took:?}");
    // From now on there is nothing to connect to, and nobody is disturbed.
    assert!(TcpStream::connect(address).is_err());
    for stream in &mut idle {
        let _ = stream.write_all(b"hello?");
    }
    let steps = Instant::now();
    while steps.elapsed() < Duration::from_secs(2) {
        pulses.iter().for_each(|pulse| pulse.at(Phase::Forward, 1));
        std::thread::sleep(Duration::from_millis(20));
    }
    assert!(scene.losses.try_recv().is_err());
    leave(meetings);
    println!("strangers_accepted 0 of 1008");
}

/// The hub answers a hello with its nonce, and then nothing more: the connection ends.
fn hears_nothing_but_a_challenge(stream: &mut TcpStream) -> bool {
    stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    let mut heard: Vec<u8> = Vec::new();
    let mut buffer = [0; 256];
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => return heard.len() <= 64,
            Ok(n) => heard.extend(&buffer[..n]),
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => return heard.len() <= 64,
            Err(error) => panic!("still connected: {error}"),
        }
    }
}

/// What a good rank sends, as somebody on the network hears it.
fn record(invitation: &Invitation, secret: &Secret) -> Vec<u8> {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let through: SocketAddr = listener.local_addr().unwrap();
    let hub = invitation.addresses[0];
    let heard = Arc::new(Mutex::new(Vec::new()));
    let tape = Arc::clone(&heard);
    std::thread::spawn(move || {
        let (mut member, _) = listener.accept().unwrap();
        let mut hub = TcpStream::connect(hub).unwrap();
        let (mut back_from, mut back_to) = (hub.try_clone().unwrap(), member.try_clone().unwrap());
        std::thread::spawn(move || std::io::copy(&mut back_from, &mut back_to));
        let mut buffer = [0; 1024];
        while let Ok(n @ 1..) = member.read(&mut buffer) {
            tape.lock().unwrap().extend(&buffer[..n]);
            hub.write_all(&buffer[..n]).unwrap();
        }
        let _ = hub.shutdown(std::net::Shutdown::Both);
    });
    let mut invitation = invitation.clone();
    invitation.addresses = vec![through];
    let (mut sender, receiver) = by_hand(&invitation, secret, 2).expect("a good rank is let in");
    block(async { sender.send(&Message::Beat(Pulse::default().state())).await.unwrap() });
    std::thread::sleep(Duration::from_millis(100));
    drop((sender, receiver));
    std::thread::sleep(Duration::from_millis(100));
    let heard = heard.lock().unwrap().clone();
    assert!(heard.len() > 76, "a hello, a proof and a frame");
    heard
}

#[test]
fn an_invitation_that_others_could_have_written_or_read_is_not_taken() {
    use std::os::unix::fs::PermissionsExt;
    let scene = Scene::new();
    let invitation = Hub::open(settings(0, 2)).unwrap().invitation().clone();
    invitation.publish(&scene.file()).unwrap();
    assert_eq!(mode(&scene.file()), 0o600);
    assert_eq!(Invitation::read(&scene.file()).unwrap(), invitation);
    std::fs::set_permissions(scene.file(), std::fs::Permissions::from_mode(0o644)).unwrap();
    assert!(Invitation::read(&scene.file()).is_err());
}

fn mode(file: &Path) -> u32 {
    use std::os::unix::fs::PermissionsExt;
    std::fs::metadata(file).unwrap().permissions().mode() & 0o777
}

#[test]
fn five_hundred_and_twelve_ranks_meet_within_five_seconds() {
    let scene = Scene::new();
    let pulses = pulses(512);
    let started = Instant::now();
    let meetings: Vec<Meeting> = scene.meet(512, &pulses).into_iter().map(|met| met.unwrap()).collect();
    let took = started.elapsed();
    // All watch, and nobody is accused.
    std::thread::sleep(TIMING.silence + Duration::from_millis(500));
    assert!(scene.losses.try_recv().is_err());
    leave(meetings);
    println!("rendezvous_512_s {:.3}", took.as_secs_f64());
    assert!(took < Duration::from_secs(5), "{took:?}");
}
