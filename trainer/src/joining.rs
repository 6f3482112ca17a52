//! How a rank comes together with its peers, by the engine of their collectives and by the rendezvous that watches over them, and
//! what it says and does when one of them is lost.

use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context, Result};
use configs::Plan;
use launcher::bounded::Limit;
use launcher::events::Event;
use launcher::exit;
use launcher::place::{Place, Surroundings, is_wired_for_mpi};
use launcher::pulse::Pulse;
use launcher::rendezvous::{
    Hooks, Invitation, Invited, Loss, MeetError, Meeting, Report, Settings, Timing, sameness, towards,
};
use launcher::text::say;
use sharding::Comm;
use sharding::cuda::nccl::{self, Nccl, UniqueId};
use sharding::staged::{NoHost, Staged};
use tch::Device;

use crate::watched::Watched;

/// Brings this process together with its peers, twice: by the engine of their collectives, and beside it, where they prove that
/// they run the same and watch over each other. MPI makes a world first, if it has started the ranks; else they meet by a file,
/// and NCCL makes the world.
pub fn join(
    place: &Place,
    plan: Option<&Plan>,
    device: Device,
    config_digest: Option<String>,
    arrival: Arrival,
) -> Result<Watched> {
    let pulse = Arc::new(Pulse::default());
    let ordered = plan.is_some_and(|plan| plan.debug.deterministic);
    let (comm, meeting) = match (plan, device) {
        (Some(plan), Device::Cuda(index)) if place.world > 1 && !is_wired_for_mpi() => {
            let engine = nccl::library()?;
            let meeting = meet(engine, By::File, place, plan, config_digest, &pulse, arrival)?;
            let comm = or_tell(Some(&meeting), nccl_alone(&meeting, place, index, ordered))?;
            (comm, Some(meeting))
        }
        _ => {
            arrival.at("waiting in MPI's start for all ranks to get there");
            let host = sharding::join(place.world)?;
            let meeting = match plan {
                Some(plan) if place.world > 1 => {
                    let met = meet(
                        host.engine(),
                        By::Mpi(host.as_ref()),
                        place,
                        plan,
                        config_digest,
                        &pulse,
                        arrival,
                    );
                    Some(met.unwrap_or_else(|error| refuse(host.as_ref(), place, &error)))
                }
                _ => {
                    drop(arrival);
                    None
                }
            };
            let comm: Box<dyn Comm> = match device {
                Device::Cuda(index) if place.world > 1 => match Nccl::join(host, index, ordered) {
                    Ok(nccl) => Box::new(nccl),
                    Err(refused) => {
                        // The others may wait for this rank already, in NCCL or in MPI.
                        say(format_args!("panglot-worker: {place}: {}", refused.error));
                        if let Some(meeting) = &meeting {
                            meeting.fail(exit::PEER, &refused.error.to_string());
                        }
                        refused.abort(exit::PEER)
                    }
                },
                _ => host,
            };
            (comm, meeting)
        }
    };
    if place.world > 1 {
        let engine = comm.engine();
        tracing::info!(%place, ?device, engine, "the ranks have met");
        if comm.rank() == 0 {
            let text = format!("{} ranks over {engine}", place.world);
            Event::Note { text }.emit();
        }
    }
    Ok(Watched::new(comm, pulse, meeting))
}

/// A rank on its way to the others. Before ranks watch over each other nobody would say who is missing, and MPI waits for ever.
pub struct Arrival {
    step: Arc<Mutex<&'static str>>,
    /// Lifted when this is dropped.
    _limit: Option<Limit>,
}

impl Arrival {
    /// Ends the process, and says where it was, when it has not arrived in time.
    pub fn begin(place: &Place) -> Arrival {
        let step = Arc::new(Mutex::new("loading libraries, or the GPU's driver"));
        let most = Timing::of(place.world).arrive + MARGIN;
        let (many, place, at) = (place.world > 1, place.clone(), Arc::clone(&step));
        let over = move || {
            let at = at.lock().map_or("", |at| *at);
            // Those that wait only know that others are missing: one says so. Who is held itself does.
            if !at.starts_with("waiting") || place.rank <= 1 {
                say(format_args!(
                    "panglot-worker: {place}: after {} s still {at}",
                    most.as_secs()
                ));
            }
            signal_hook::low_level::exit(exit::PEER);
        };
        let limit = many.then(|| Limit::set(most, over));
        Arrival { step, _limit: limit }
    }

    fn at(&self, step: &'static str) {
        if let Ok(mut at) = self.step.lock() {
            *at = step;
        }
    }
}

/// Beyond what the rendezvous itself allows.
const MARGIN: Duration = Duration::from_secs(60);

/// Collectives by NCCL only; its id travels where the ranks have met.
fn nccl_alone(meeting: &Meeting, place: &Place, index: usize, ordered: bool) -> Result<Box<dyn Comm>> {
    let id = match place.rank {
        0 => UniqueId::new()?,
        _ => UniqueId::from([0; UniqueId::BYTES]),
    };
    let told = meeting.broadcast(&id.bytes())?;
    let told: [u8; UniqueId::BYTES] = told
        .try_into()
        .ok()
        .context("rank 0 told another thing than NCCL's id")?;
    let host = Box::new(NoHost::new(place.rank, place.world));
    let nccl = Nccl::join_with(&UniqueId::from(told), host, index, ordered).map_err(|refused| refused.error)?;
    Ok(Box::new(Staged::new(Box::new(nccl), Device::Cuda(index))))
}

/// The others wait for what failed here: they are told.
fn or_tell<T>(meeting: Option<&Meeting>, made: Result<T>) -> Result<T> {
    made.inspect_err(|error| {
        if let Some(meeting) = meeting {
            meeting.fail(code_of(error), &format!("{error:#}"));
        }
    })
}

/// The ranks are in MPI's world and wait there for this one.
fn refuse(comm: &dyn Comm, place: &Place, error: &anyhow::Error) -> ! {
    // What rank 0 refuses it has told all; it alone says it.
    let told = matches!(error.downcast_ref(), Some(MeetError::Refused { .. }));
    let (code, text) = (code_of(error), format!("{error:#}"));
    if place.rank == 0 || !told {
        say(format_args!(
            "panglot-worker: rank {} on {}: {text}",
            place.rank, place.node
        ));
    }
    tracing::info!("{text}");
    // MPI takes the ranks down in whatever way; whoever started this one learns the reason first.
    Event::Lost { code, text }.emit();
    if told && place.rank > 0 {
        // Whoever aborts first ends rank 0 too, which may not have said it yet.
        std::thread::sleep(Duration::from_secs(1));
    }
    comm.abort(code)
}

/// How the others learn where rank 0 listens.
enum By<'a> {
    Mpi(&'a dyn Comm),
    /// In the run's folder.
    File,
}

fn meet(
    engine: String,
    by: By,
    place: &Place,
    plan: &Plan,
    config_digest: Option<String>,
    pulse: &Arc<Pulse>,
    arrival: Arrival,
) -> Result<Meeting> {
    let around = Surroundings::detect().map_err(MeetError::from)?;
    let mut runs = vec![
        (
            "build".to_owned(),
            sameness::this_program().context("reading this very program")?,
        ),
        (
            "config".to_owned(),
            config_digest.map_or_else(|| launcher::files::digest_of(plan), Ok)?,
        ),
        ("engine".to_owned(), engine),
    ];
    runs.extend(sameness::loaded(&[
        "libtorch_cpu.so",
        "libtorch_cuda.so",
        "libmpi.so",
        "libnccl.so",
        "libcudart.so",
    ]));
    let settings = Settings {
        rank: place.rank,
        world: place.world,
        one_host: around.one_host,
        job: around.job,
        secret: around.secret,
        report: Report {
            host: place.node.clone(),
            process: std::process::id(),
            runs,
        },
        interface: around.interface,
        near: around.launch_node.and_then(towards),
        timing: Timing::of(place.world),
    };
    // Where the environment has no secret, it is in this file; where the ranks have met by MPI, MPI tells the rest.
    let file = plan.folders.run.join("rendezvous.json");
    let hooks = hooks(place, around.beats, around.ear);
    if place.rank > 0 {
        let invited = match by {
            By::Mpi(comm) => {
                arrival.at("waiting for rank 0 to say where it listens");
                let length = comm.broadcast_bytes(&[0; 8])?;
                let length = u64::from_le_bytes(length.try_into().expect("8 bytes"));
                let told = comm.broadcast_bytes(&vec![0; length as usize])?;
                Invited::Told(serde_json::from_slice(&told).context("rank 0's invitation")?, file)
            }
            By::File => Invited::ByFile(file),
        };
        // Who is missing from here on is named by rank 0.
        drop(arrival);
        return Ok(Meeting::attend(settings, invited, Arc::clone(pulse), hooks)?);
    }
    let publish = |invitation: &Invitation| -> std::result::Result<(), MeetError> {
        if invitation.secret.is_some() || matches!(by, By::File) {
            invitation.publish(&file)?;
        }
        if let By::Mpi(comm) = by {
            let told = Invitation {
                secret: None,
                ..invitation.clone()
            };
            let told = serde_json::to_vec(&told).map_err(std::io::Error::other)?;
            let tell = |bytes: &[u8]| comm.broadcast_bytes(bytes).map_err(std::io::Error::other);
            tell(&(told.len() as u64).to_le_bytes())?;
            tell(&told)?;
        }
        let addresses: Vec<String> = invitation.addresses.iter().map(ToString::to_string).collect();
        tracing::info!(
            interface = invitation.interface,
            addresses = addresses.join(" "),
            "the ranks are watched from here"
        );
        if place.world > place.local_world {
            let text = format!("the ranks meet on {} ({})", invitation.interface, addresses.join(", "));
            Event::Note { text }.emit();
        }
        Ok(())
    };
    drop(arrival);
    let meeting = Meeting::host(settings, publish, Arc::clone(pulse), hooks);
    // All have read it, or nobody will.
    let _ = std::fs::remove_file(&file);
    Ok(meeting?)
}

/// What this process does when the job is over, and with every beat.
fn hooks(place: &Place, beats: bool, ear: Option<PathBuf>) -> Hooks {
    // Rank 0 says what it finds; what it cannot say, since it is itself the culprit, one rank a host does.
    let says = place.local_rank <= 1;
    let parent = std::os::unix::process::parent_id();
    let mut last_sign = std::time::Instant::now();
    // Nothing that this thread does may wait for a reader: its own signs to the others would.
    let (sign, signs) = std::sync::mpsc::sync_channel(1);
    if beats {
        std::thread::spawn(move || signs.iter().for_each(|()| Event::Beat.emit()));
    }
    Hooks {
        lost: Box::new(move |Loss { code, text, told }| {
            tracing::info!("ends with code {code}: {text}");
            if says && !told {
                let lost = Event::Lost {
                    code,
                    text: text.clone(),
                };
                // mpirun passes nothing on while it ends the ranks, a second long: the launcher is told past it.
                if !ear.is_some_and(|ear| lost.tell(&ear)) {
                    say(format_args!("panglot-worker: {text}"));
                }
                // To whoever reads; a terminal that is held would hold this process, and its peers' end.
                let (said, saying) = std::sync::mpsc::channel();
                std::thread::spawn(move || {
                    lost.emit();
                    let _ = said.send(());
                });
                let _ = saying.recv_timeout(Duration::from_secs(1));
            }
            // No destructors: the training thread may be anywhere, and the libraries' own would wait for peers.
            signal_hook::low_level::exit(code)
        }),
        notice: Box::new(|text| {
            tracing::info!("{text}");
            Event::Note { text: text.to_owned() }.emit();
        }),
        beat: Box::new(move || {
            if beats && last_sign.elapsed() >= Duration::from_secs(1) {
                last_sign = std::time::Instant::now();
                // The one before may still wait for its reader.
                let _ = sign.try_send(());
            }
            (std::os::unix::process::parent_id() != parent).then(|| Loss {
                code: exit::PEER,
                text: "the process that started this rank is gone".into(),
                told: false,
            })
        }),
        takes_sigterm: true,
    }
}

/// What a job script may conclude: files at fault, peers at fault, or the user.
pub fn code_of(error: &anyhow::Error) -> i32 {
    let has = |is: fn(&(dyn std::error::Error + 'static)) -> bool| error.chain().any(is);
    if let Some(error) = error.downcast_ref::<MeetError>() {
        error.code()
    } else if has(|cause| {
        use sharding::Error::{Gone, Mpi, Nccl, NcclAborted};
        matches!(
            cause.downcast_ref(),
            Some(Mpi { .. } | Nccl { .. } | NcclAborted | Gone)
        )
    }) {
        exit::PEER
    } else if has(|cause| {
        // Memory that is short, a driver that fails: nothing that a peer has done.
        use sharding::{Error, cuda};
        matches!(
            cause.downcast_ref(),
            Some(Error::Torch(_) | Error::NoThread | Error::Cuda(cuda::Error::Driver { .. }))
        ) || matches!(cause.downcast_ref(), Some(cuda::Error::Driver { .. }))
    }) {
        exit::INTERNAL
    } else if has(|cause| {
        let missing = |error: &std::io::Error| error.kind() == std::io::ErrorKind::NotFound;
        cause.is::<crate::checkpoint::WritesFailed>() || cause.downcast_ref().is_some_and(|error| !missing(error))
    }) {
        exit::IO
    } else {
        exit::USER
    }
}
