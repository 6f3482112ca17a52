//! The side of every rank but 0: finds the hub, proves itself, gives signs of life, and watches over the hub.

use std::io;
use std::sync::Arc;
use std::sync::mpsc as blocking;
use std::time::{Duration, Instant};

use tokio::net::TcpStream;
use tokio::sync::mpsc::{self, UnboundedReceiver};

use super::sameness::printable;
use super::watch::{Finding, Watch};
use super::wire::{self, Message, Receiver, Sender, WireError};
use super::{
    Command, Hooks, Invitation, Invited, Loss, MeetError, Meeting, Secret, Settings, Suspicion, Terminate, Timing,
    every, runtime, set_up,
};
use crate::exit;
use crate::pulse::{Phase, Pulse};

const CONNECT: Duration = Duration::from_secs(2);
const TOLD_ARRIVE: Duration = Duration::from_secs(30);
/// Between two looks for the hub: soon at first, and not too often from hundreds of hosts.
const FIRST_PAUSE: Duration = Duration::from_millis(20);
const LONGEST_PAUSE: Duration = Duration::from_millis(500);
/// For the others to read why.
const FLUSH: Duration = Duration::from_millis(500);

pub(super) fn attend(
    settings: Settings,
    invited: Invited,
    pulse: Arc<Pulse>,
    hooks: Hooks,
) -> Result<Meeting, MeetError> {
    let rank = settings.rank;
    let runtime = runtime()?;
    let (commands, inbox) = mpsc::unbounded_channel();
    let (tell, met) = blocking::channel();
    let (give, bytes) = blocking::channel();
    let run = move || {
        runtime.block_on(async move {
            let (hub, sender, receiver) = match arrive(&settings, &invited).await {
                Ok(arrived) => arrived,
                Err(error) => {
                    let _ = tell.send(Err(error));
                    return;
                }
            };
            let _ = tell.send(Ok(()));
            watch(&settings, &hub, sender, receiver, &pulse, hooks, inbox, give).await;
        });
    };
    std::thread::Builder::new().name("member".into()).spawn(run)?;
    match met.recv() {
        Ok(Ok(())) => Ok(Meeting { rank, commands, bytes }),
        Ok(Err(error)) => Err(error),
        Err(_) => Err(io::Error::other("the watching thread has ended").into()),
    }
}

/// The hub's name and the connection to it.
type Hub = (String, Sender, Receiver);

/// Tries until all are there, or time is up.
async fn arrive(settings: &Settings, invited: &Invited) -> Result<Hub, MeetError> {
    let began = tokio::time::Instant::now();
    let all_there = settings.timing.arrive;
    // Who was told where rank 0 listens was told when it did: there is nothing to wait for but the network. Then for the others.
    let mut limit = match invited {
        Invited::Told(..) => all_there.min(TOLD_ARRIVE),
        Invited::ByFile(_) => all_there,
    };
    let mut pause = FIRST_PAUSE;
    let mut why = "rank 0 has not said where it is".to_owned();
    loop {
        let trouble = match tokio::time::timeout_at(began + limit, reach(settings, invited)).await {
            Ok(Ok(hub)) => {
                limit = all_there;
                why = "rank 0 still waits for others".to_owned();
                match tokio::time::timeout_at(began + limit, wait_for_all(settings, hub)).await {
                    Ok(Ok(hub)) => return Ok(hub),
                    waited => waited.ok().and_then(Result::err),
                }
            }
            reached => reached.ok().and_then(Result::err),
        };
        match trouble {
            Some(Trouble::Final(error)) => return Err(error),
            Some(Trouble::Again(text)) => why = text,
            None => {}
        }
        if began.elapsed() + pause >= limit {
            let (rank, seconds) = (settings.rank, limit.as_secs());
            return Err(MeetError::Unreached { rank, seconds, why });
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

/// Why one attempt failed.
enum Trouble {
    Again(String),
    Final(MeetError),
}

/// Looks for the hub once.
async fn reach(settings: &Settings, invited: &Invited) -> Result<Hub, Trouble> {
    let again = |error: &dyn std::fmt::Display| Trouble::Again(error.to_string());
    let invitation = match invited {
        Invited::Told(invitation, _) => invitation.clone(),
        Invited::ByFile(file) => Invitation::read(file).map_err(|error| again(&error))?,
    };
    let attempt = invitation.attempt().filter(|attempt| attempt.world == settings.world);
    let attempt = attempt.ok_or_else(|| again(&"the invitation is another world's"))?;
    let secret = secret_for(settings, invited, &invitation)?;
    let elsewhere = invitation.host != settings.report.host;
    let mut tried = Vec::new();
    for address in &invitation.addresses {
        if address.ip().is_loopback() && elsewhere && settings.one_host != Some(true) {
            tried.push(format!("{address} is the loopback of {}", printable(&invitation.host)));
            continue;
        }
        match tokio::time::timeout(CONNECT, TcpStream::connect(address)).await {
            Ok(Ok(stream)) => {
                let Timing { silence, handshake, .. } = settings.timing;
                set_up(&stream, silence).map_err(|error| again(&error))?;
                let proved = wire::approach_hub(stream, &secret, &attempt, settings.rank);
                match tokio::time::timeout(handshake, proved).await {
                    Ok(Ok((sender, receiver))) => {
                        let hub = format!("rank 0 on {}", printable(&invitation.host));
                        return Ok((hub, sender, receiver));
                    }
                    Ok(Err(error)) => tried.push(format!("{address}: {error}")),
                    Err(_) => tried.push(format!("{address}: no answer")),
                }
            }
            Ok(Err(error)) => tried.push(format!("{address}: {error}")),
            Err(_) => tried.push(format!("{address}: no answer")),
        }
    }
    let (host, interface) = (printable(&invitation.host), printable(&invitation.interface));
    Err(Trouble::Again(format!(
        "rank 0 on {host} listens on its interface {interface}: {}; name one that all hosts reach with PANGLOT_INTERFACE",
        tried.join("; ")
    )))
}

/// The environment's, else the one in the invitation's file, which must be of the same attempt.
fn secret_for(settings: &Settings, invited: &Invited, invitation: &Invitation) -> Result<Secret, Trouble> {
    if let Some(secret) = &settings.secret {
        return Ok(secret.clone());
    }
    let in_file = match invited {
        Invited::ByFile(_) => invitation.clone(),
        Invited::Told(told, file) => {
            let found = Invitation::read(file).map_err(|error| Trouble::Again(error.to_string()))?;
            if found.attempt != told.attempt {
                return Err(Trouble::Again(format!("{} is another attempt's", file.display())));
            }
            found
        }
    };
    let secret = in_file
        .secret
        .ok_or_else(|| Trouble::Again("the invitation brings no secret".into()))?;
    Secret::from_hex(&secret).map_err(|error| Trouble::Final(error.into()))
}

async fn wait_for_all(settings: &Settings, (hub, mut sender, mut receiver): Hub) -> Result<Hub, Trouble> {
    let broken = |error: WireError| Trouble::Again(error.to_string());
    sender
        .send(&Message::Report(settings.report.clone()))
        .await
        .map_err(broken)?;
    loop {
        match receiver.receive().await.map_err(broken)? {
            Message::Welcome => return Ok((hub, sender, receiver)),
            Message::Stop { code, text } => return Err(Trouble::Final(MeetError::Refused { code, text })),
            _ => {}
        }
    }
}

#[allow(clippy::too_many_arguments)]
async fn watch(
    settings: &Settings,
    hub: &str,
    mut sender: Sender,
    mut receiver: Receiver,
    pulse: &Pulse,
    mut hooks: Hooks,
    mut commands: UnboundedReceiver<Command>,
    give: blocking::Sender<Vec<u8>>,
) {
    // Reading is a task of its own: a frame that is half read may not be given up.
    let (tell, mut heard) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        loop {
            let message = receiver.receive().await;
            let over = message.is_err();
            if tell.send(message).is_err() || over {
                return;
            }
        }
    });
    let Timing { beat, silence, .. } = settings.timing;
    let names = vec![
        (0, hub.to_owned()),
        (settings.rank, settings.report.name(settings.rank)),
    ];
    let mut watch = Watch::new(names, silence, Instant::now());
    let Ok(mut terminate) = Terminate::new(hooks.takes_sigterm) else {
        return;
    };
    let mut beats = every(beat);
    let mut suspicion: Option<Suspicion> = None;
    let lost = |text: String| Loss {
        code: exit::PEER,
        text,
        told: false,
    };
    let loss = loop {
        tokio::select! {
            message = heard.recv(), if !watch.has_left(0) => match message {
                Some(Ok(Message::Beat(state))) => watch.hear(0, state, Instant::now()),
                Some(Ok(Message::Bytes(bytes))) => {
                    let _ = give.send(bytes);
                }
                Some(Ok(Message::Stop { code, text })) => break Loss { code, text, told: true },
                Some(Ok(Message::Bye)) => watch.leave(0),
                Some(Ok(_)) => {}
                Some(Err(error)) => {
                    watch.hear(1, pulse.state(), Instant::now());
                    let why = match error {
                        WireError::Broken(error) if error.kind() == io::ErrorKind::TimedOut => {
                            "cannot be reached any more: its host is down, or this one is cut off from the network".to_owned()
                        }
                        WireError::Broken(_) => "is gone: killed, crashed, or out of memory".to_owned(),
                        other => format!("is not itself any more ({other})"),
                    };
                    break lost(watch.sentence(0, &why));
                }
                None => break lost(watch.sentence(0, "is gone")),
            },
            _ = beats.tick() => {
                let state = pulse.state();
                watch.hear(1, state, Instant::now());
                // An error shows on the reading side too, with its reason.
                let _ = tokio::time::timeout(silence, sender.send(&Message::Beat(state))).await;
                if let Some(loss) = (hooks.beat)() {
                    break loss;
                }
                if let Some(Finding::Over(text)) = watch.tick(Instant::now()) {
                    break lost(text);
                }
            }
            () = pulse.news() => {
                let _ = tokio::time::timeout(silence, sender.send(&Message::Beat(pulse.state()))).await;
            }
            Some(command) = commands.recv() => match command {
                // The hub's to send.
                Command::Bytes(_) => {}
                Command::Fail { code, text, done } => {
                    let _ = tokio::time::timeout(FLUSH, sender.send(&Message::Failed { code, text })).await;
                    let _ = done.send(());
                    // It ends by itself, for its own reason; where that is a lost peer, the hub may know which.
                    if code != exit::PEER {
                        return;
                    }
                }
                Command::Leave(done) => {
                    pulse.at(Phase::End, 0);
                    let _ = tokio::time::timeout(FLUSH, sender.send(&Message::Bye)).await;
                    sender.shut().await;
                    let _ = done.send(());
                    return;
                }
            },
            () = terminate.recv() => {
                suspicion.get_or_insert_with(|| Suspicion::of_sigterm(pulse));
            }
            () = Suspicion::over(&suspicion) => break suspicion.take().expect("just over").loss,
        }
    };
    pulse.end();
    // Said before the connection closes, so that the hub does not take this rank for the culprit.
    let Loss { code, text, .. } = loss.clone();
    let _ = tokio::time::timeout(FLUSH, sender.send(&Message::Failed { code, text })).await;
    (hooks.lost)(loss);
}
