//! `panglot-worker`: one process a rank. Started by `panglot`, or by `mpirun` or `srun` with the same line.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use configs::{FullModule, NewRows, Plan};
use launcher::events::Event;
use launcher::exit;
use launcher::measurement::Order;
use launcher::place::{Place, Surroundings, is_wired_for_mpi};
use launcher::pulse::Pulse;
use launcher::rendezvous::{
    Hooks, Invitation, Invited, Loss, MeetError, Meeting, Report, Settings, Timing, sameness, towards,
};
use sharding::cuda::nccl::{self, Nccl, UniqueId};
use sharding::staged::{NoHost, Staged};
use sharding::{Comm, Mark};
use tch::Device;
use trainer::inspect::Trained;
use trainer::timeline::Timeline;
use trainer::train::End;
use trainer::watched::Watched;

#[derive(Parser)]
#[command(name = "panglot-worker", version, about = "One rank of Panglot; `panglot` starts it")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Make a Hugging Face folder from a GGUF file.
    ImportGguf {
        #[arg(long)]
        gguf: PathBuf,
        #[arg(long)]
        out: PathBuf,
    },
    /// Tell what a model folder holds, and what of it trains if these do.
    Inspect {
        #[arg(long)]
        model: PathBuf,
        /// Modules trained in full.
        #[arg(long, value_delimiter = ',')]
        full: Vec<String>,
        /// LoRA's targets, with --rank.
        #[arg(long, value_delimiter = ',', requires = "rank")]
        lora: Vec<String>,
        #[arg(long)]
        rank: Option<usize>,
    },
    /// Make a model with random weights, as the plan says.
    InitModel {
        #[arg(long)]
        plan: PathBuf,
    },
    /// Train, from the newest checkpoint if there is one.
    Train {
        #[arg(long)]
        plan: PathBuf,
        /// Of the config that this rank was given: another rank may have written another plan into the run's folder.
        #[arg(long)]
        config_digest: Option<String>,
    },
    /// Score a sample of the held-out documents with the base, and with the extended model that no step has trained.
    DayZero {
        #[arg(long)]
        plan: PathBuf,
        /// How new rows start; each in its turn.
        #[arg(long, required = true, value_delimiter = ',')]
        new_rows: Vec<NewRows>,
        /// Of each document.
        #[arg(long)]
        most_bytes: usize,
        #[arg(long)]
        out: PathBuf,
    },
    /// Carry out an evaluation or write text, as the order in a file says.
    Measure {
        #[arg(long)]
        order: PathBuf,
    },
    /// Write the newest checkpoint as a merged model and as a PEFT adapter.
    Export {
        #[arg(long)]
        plan: PathBuf,
        #[arg(long)]
        merged: PathBuf,
        #[arg(long)]
        adapter: PathBuf,
    },
    /// Time all-reduces among the ranks.
    Doctor {
        #[arg(long)]
        plan: PathBuf,
    },
    /// Compare this machine's GPU with its CPU: every kernel, attention, training steps.
    GpuCheck,
    /// Measure each part of a training step by itself, against what this machine's GEMMs or memory allow.
    BenchParts {
        #[command(flatten)]
        settings: trainer::parts::Settings,
    },
    /// Measure training on this machine's GPU, against `transformers` and PEFT where --python names them.
    BenchGpu {
        #[command(flatten)]
        settings: trainer::gpu::Settings,
    },
}

fn main() -> ExitCode {
    // A panic is a bug; it must end this process at once, or its peers would wait for it in a collective.
    let print = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        print(info);
        std::process::exit(exit::INTERNAL);
    }));
    let arguments = Arguments::parse();
    let code = match start(arguments.command) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("panglot-worker: {error:#}");
            code_of(&error)
        }
    };
    ExitCode::from(u8::try_from(code).expect("exit codes are small"))
}

/// Finds this process's place, joins its peers and runs the command. Once the ranks have met, an error on one ends all.
fn start(command: Command) -> Result<i32> {
    match &command {
        Command::GpuCheck => {
            set_threads(cores())?;
            return trainer::gpu::check().map(|()| exit::FINISHED);
        }
        Command::BenchParts { settings } => {
            set_threads(cores())?;
            return trainer::parts::bench(settings).map(|()| exit::FINISHED);
        }
        Command::BenchGpu { settings } => {
            set_threads(cores())?;
            return trainer::gpu::bench(settings).map(|()| exit::FINISHED);
        }
        _ => {}
    }
    let place = Place::detect()?;
    let plan = match &command {
        Command::ImportGguf { .. }
        | Command::Inspect { .. }
        | Command::Measure { .. }
        | Command::GpuCheck
        | Command::BenchParts { .. }
        | Command::BenchGpu { .. } => None,
        Command::InitModel { plan }
        | Command::Train { plan, .. }
        | Command::DayZero { plan, .. }
        | Command::Doctor { plan }
        | Command::Export { plan, .. } => Some(read_plan(plan)?),
    };
    let order: Option<Order> = match &command {
        Command::Measure { order } => Some(launcher::files::read_json(order)?),
        _ => None,
    };
    let threads = match (&order, &plan) {
        (Some(order), _) => order.threads_per_rank,
        (None, plan) => plan.as_ref().and_then(|plan| plan.launch.threads_per_rank),
    };
    // Before the first tensor, and before ranks meet: libtorch asks once whether CUDA is there.
    let device = match (&command, &plan) {
        (Command::Train { .. } | Command::DayZero { .. } | Command::Doctor { .. }, Some(plan)) => {
            device_of(plan.train.device, &place)?
        }
        (Command::Measure { .. }, _) => device_of(order.as_ref().expect("read above").device, &place)?,
        _ => Device::Cpu,
    };
    set_threads(threads.unwrap_or_else(|| cores().div_ceil(place.local_world).max(1)))?;
    if let Some(plan) = &plan {
        log_to(&plan.folders.run.join("logs").join(format!("rank-{}.log", place.rank)))?;
    }
    if let Some(logs) = order.as_ref().and_then(|order| order.logs.as_ref()) {
        log_to(&logs.join(format!("rank-{}.log", place.rank)))?;
    }
    if plan.as_ref().is_some_and(|plan| plan.debug.deterministic) {
        sharding::cuda::use_deterministic_algorithms();
    }
    let digest = match &command {
        Command::Train { config_digest, .. } => config_digest.clone(),
        _ => None,
    };
    let mut comm = join(&place, plan.as_ref(), device, digest)?;
    match run(command, plan.as_ref(), order.as_ref(), &comm, device) {
        Ok(code) => {
            comm.leave();
            Ok(code)
        }
        Err(error) if comm.world() > 1 => {
            let code = code_of(&error);
            let text = format!("{error:#}");
            // A lost peer is the first to be named, by whoever watches; then what followed from it.
            if code == exit::PEER {
                comm.fail(code, &text);
            }
            eprintln!(
                "panglot-worker: rank {} of {} on {}: {text}",
                place.rank, place.world, place.node
            );
            tracing::info!("ends with code {code}: {text}");
            if code != exit::PEER {
                comm.fail(code, &text);
            }
            comm.abort(code)
        }
        Err(error) => Err(error),
    }
}

/// Brings this process together with its peers, twice: by the engine of their collectives, and beside it, where they prove that
/// they run the same and watch over each other. MPI makes a world first, if it has started the ranks; else they meet by a file,
/// and NCCL makes the world.
fn join(place: &Place, plan: Option<&Plan>, device: Device, config_digest: Option<String>) -> Result<Watched> {
    let pulse = Arc::new(Pulse::default());
    let ordered = plan.is_some_and(|plan| plan.debug.deterministic);
    let (comm, meeting) = match (plan, device) {
        (Some(plan), Device::Cuda(index)) if place.world > 1 && !is_wired_for_mpi() => {
            let engine = nccl::library()?;
            let meeting = meet(engine, By::File, place, plan, config_digest, &pulse)?;
            let comm = or_tell(Some(&meeting), nccl_alone(&meeting, place, index, ordered))?;
            (comm, Some(meeting))
        }
        _ => {
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
                    );
                    Some(met.unwrap_or_else(|error| refuse(host.as_ref(), place, &error)))
                }
                _ => None,
            };
            let comm: Box<dyn Comm> = match device {
                Device::Cuda(index) if place.world > 1 => match Nccl::join(host, index, ordered) {
                    Ok(nccl) => Box::new(nccl),
                    Err(refused) => {
                        // The others may wait for this rank already, in NCCL or in MPI.
                        eprintln!("panglot-worker: {place}: {}", refused.error);
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
    let timeline = match plan {
        Some(plan) if plan.debug.timeline => {
            let path = plan
                .folders
                .run
                .join("timeline")
                .join(format!("rank-{}.json", place.rank));
            let timeline = Timeline::create(&path, place.rank, &place.node);
            Some(Arc::new(timeline.with_context(|| path.display().to_string())?))
        }
        _ => None,
    };
    Ok(Watched::new(comm, pulse, meeting, timeline))
}

/// Collectives by NCCL only; its id travels where the ranks have met.
fn nccl_alone(meeting: &Meeting, place: &Place, index: usize, ordered: bool) -> Result<Box<dyn Comm>> {
    let id = match place.rank {
        0 => UniqueId::new()?,
        _ => UniqueId::from([0; UniqueId::BYTES]),
    };
    let told = meeting.broadcast(id.bytes())?;
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
    if place.rank == 0 || !told {
        eprintln!("panglot-worker: rank {} on {}: {error:#}", place.rank, place.node);
    }
    tracing::info!("{error:#}");
    comm.abort(code_of(error))
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
                let length = comm.broadcast_bytes(&[0; 8])?;
                let length = u64::from_le_bytes(length.try_into().expect("8 bytes"));
                let told = comm.broadcast_bytes(&vec![0; length as usize])?;
                Invited::Told(serde_json::from_slice(&told).context("rank 0's invitation")?, file)
            }
            By::File => Invited::ByFile(file),
        };
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
                    eprintln!("panglot-worker: {text}");
                }
                lost.emit();
            }
            // No destructors: the training thread may be anywhere, and the libraries' own would wait for peers.
            signal_hook::low_level::exit(code)
        }),
        notice: Box::new(|text| {
            tracing::info!("{text}");
            Event::Note { text: text.to_owned() }.emit();
        }),
        beat: Box::new(move || {
            if beats && last_sign.elapsed() >= std::time::Duration::from_secs(1) {
                last_sign = std::time::Instant::now();
                Event::Beat.emit();
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

/// The device that the plan names, this rank's own where it is a GPU.
fn device_of(named: configs::Device, place: &Place) -> Result<Device> {
    Ok(match named {
        configs::Device::Cpu => Device::Cpu,
        configs::Device::Cuda => sharding::cuda::device(place.local_rank)?,
    })
}

fn run(command: Command, plan: Option<&Plan>, order: Option<&Order>, comm: &dyn Comm, device: Device) -> Result<i32> {
    let plan = || plan.expect("every command but import-gguf and inspect reads a plan");
    let progress = &mut |done: u64, total: u64| {
        Event::Progress {
            done,
            total,
            unit: "bytes".into(),
        }
        .emit()
    };
    let done = |result: serde_json::Value| {
        if comm.rank() == 0 {
            Event::Done { result }.emit();
        }
        Ok(exit::FINISHED)
    };
    match &command {
        Command::Measure { .. } | Command::DayZero { .. } => comm.at(Mark::Evaluate),
        Command::Export { .. } => comm.at(Mark::Export),
        _ => {}
    }
    match command {
        Command::ImportGguf { gguf, out } => {
            let config = trainer::gguf::import(&gguf, &out, progress)?;
            done(serde_json::to_value(config)?)
        }
        Command::Inspect {
            model,
            full,
            lora,
            rank,
        } => {
            let named = |module: &FullModule| full.iter().any(|name| name == module.name());
            let trained = Trained {
                full: FullModule::ALL.into_iter().filter(named).collect(),
                lora: rank.map(|rank| (lora, rank)),
            };
            done(serde_json::to_value(trainer::inspect::inspect(&model, &trained)?)?)
        }
        Command::InitModel { .. } => {
            let config = trainer::scratch::init(plan(), &plan().folders.base_model)?;
            done(serde_json::to_value(config)?)
        }
        Command::Train { .. } => match trainer::train::train(plan(), comm, device)? {
            End::Finished => done(serde_json::json!({ "run": plan().folders.run, "steps": plan().train.steps })),
            End::WantsMoreTime => Ok(exit::MORE_TIME),
        },
        Command::DayZero {
            new_rows,
            most_bytes,
            out,
            ..
        } => {
            let measured = trainer::evaluate::day_zero(plan(), &new_rows, most_bytes, comm, device)?;
            if comm.rank() == 0 {
                launcher::files::write_json(&out, &measured)?;
            }
            done(serde_json::json!({ "written": out }))
        }
        Command::Measure { .. } => {
            let order = order.expect("read before ranks meet");
            done(trainer::measure::measure(order, comm, device)?)
        }
        Command::GpuCheck | Command::BenchParts { .. } | Command::BenchGpu { .. } => {
            unreachable!("run before ranks meet")
        }
        Command::Doctor { .. } => done(trainer::doctor::all_reduces(comm, device)?),
        Command::Export { merged, adapter, .. } => {
            done(trainer::export::export_newest(plan(), comm, &merged, &adapter)?)
        }
    }
}

fn read_plan(path: &Path) -> Result<Plan> {
    let text = std::fs::read(path).with_context(|| path.display().to_string())?;
    serde_json::from_slice(&text).with_context(|| format!("{} is not a plan of this version", path.display()))
}

fn set_threads(threads: usize) -> Result<()> {
    tch::set_num_threads(i32::try_from(threads).context("threads")?);
    rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .build_global()
        .context("starting the worker's threads")
}

fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Everything goes to the rank's own log; warnings also to standard error.
fn log_to(path: &Path) -> Result<()> {
    use tracing_subscriber::prelude::*;
    let folder = path.parent().context("a log lies in a folder")?;
    std::fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
    let file = std::fs::OpenOptions::new()
        .create(true)
        .append(true)
        .open(path)
        .with_context(|| path.display().to_string())?;
    let to_file = tracing_subscriber::fmt::layer()
        .with_ansi(false)
        .with_writer(std::sync::Mutex::new(file));
    let to_stderr = tracing_subscriber::fmt::layer()
        .without_time()
        .with_writer(std::io::stderr)
        .with_filter(tracing_subscriber::filter::LevelFilter::WARN);
    let to_file = to_file.with_filter(tracing_subscriber::filter::LevelFilter::INFO);
    tracing_subscriber::registry().with(to_file).with(to_stderr).init();
    Ok(())
}

/// What a job script may conclude: files at fault, peers at fault, or the user.
fn code_of(error: &anyhow::Error) -> i32 {
    let has = |is: fn(&(dyn std::error::Error + 'static)) -> bool| error.chain().any(is);
    if let Some(error) = error.downcast_ref::<MeetError>() {
        error.code()
    } else if has(|cause| cause.is::<sharding::Error>()) {
        exit::PEER
    } else if has(|cause| cause.is::<trainer::checkpoint::WritesFailed>()) {
        exit::IO
    } else if has(|cause| {
        cause
            .downcast_ref::<std::io::Error>()
            .is_some_and(|e| e.kind() != std::io::ErrorKind::NotFound)
    }) {
        exit::IO
    } else {
        exit::USER
    }
}
