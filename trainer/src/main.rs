//! `panglot-worker`: one process a rank. Started by `panglot`, or by `mpirun` or `srun` with the same line.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use configs::{FullModule, NewRows, Plan};
use launcher::events::Event;
use launcher::measurement::Order;
use launcher::place::{Place, cpus_of_rank, shown_gpus};
use launcher::text::say;
use launcher::{exit, gpus};
use sharding::{Comm, Mark};
use tch::Device;
use trainer::inspect::Trained;
use trainer::joining::{Arrival, code_of, join};
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
        // No destructors: this may be any thread, and the libraries' own would wait for peers.
        signal_hook::low_level::exit(exit::INTERNAL);
    }));
    let arguments = Arguments::parse();
    let code = match start(arguments.command) {
        Ok(code) => code,
        Err(error) => {
            say(format_args!("panglot-worker: {error:#}"));
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
    trainer::train::asked_to_stop()?;
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
    let arrival = Arrival::begin(&place);
    // Before the first tensor, and before ranks meet: libtorch asks once whether CUDA is there.
    let device = match (&command, &plan) {
        (Command::Train { .. } | Command::DayZero { .. } | Command::Doctor { .. }, Some(plan)) => {
            device_of(plan.train.device, &place)?
        }
        (Command::Measure { .. }, _) => device_of(order.as_ref().expect("read above").device, &place)?,
        _ => Device::Cpu,
    };
    let own = || match cpus_of_rank() {
        Some(cpus) => cpus.min(cores()),
        None => cores().div_ceil(place.local_world),
    };
    set_threads(threads.unwrap_or_else(own).max(1))?;
    if let Some(plan) = &plan {
        log_to(&plan.folders.run.join("logs").join(format!("rank-{}.log", place.rank)))?;
    }
    if let Some(logs) = order.as_ref().and_then(|order| order.logs.as_ref()) {
        log_to(&logs.join(format!("rank-{}.log", place.rank)))?;
    }
    if plan.as_ref().is_some_and(|plan| plan.debug.deterministic) {
        sharding::cuda::use_deterministic_algorithms();
    }
    let deterministic = sharding::cuda::algorithms_are_deterministic();
    tracing::info!(deterministic, "libtorch's algorithms");
    let digest = match &command {
        Command::Train { config_digest, .. } => config_digest.clone(),
        _ => None,
    };
    let mut comm = join(&place, plan.as_ref(), device, digest, arrival)?;
    let timed = plan
        .as_ref()
        .map_or(Ok(()), |plan| record_timeline(&mut comm, plan, &place));
    match timed.and_then(|()| run(command, plan.as_ref(), order.as_ref(), &comm, device)) {
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
            say(format_args!(
                "panglot-worker: rank {} of {} on {}: {text}",
                place.rank, place.world, place.node
            ));
            tracing::info!("ends with code {code}: {text}");
            if code != exit::PEER {
                comm.fail(code, &text);
            }
            comm.abort(code)
        }
        Err(error) => Err(error),
    }
}

/// Where the plan asks for it. After the ranks have met, so that no other job's files are touched.
fn record_timeline(comm: &mut Watched, plan: &Plan, place: &Place) -> Result<()> {
    if plan.debug.timeline {
        let name = format!("rank-{}.json", place.rank);
        let path = plan.folders.run.join("timeline").join(name);
        let timeline = Timeline::create(&path, place.rank, &place.node);
        comm.record(timeline.with_context(|| path.display().to_string())?);
    }
    Ok(())
}

/// The device that the plan names, this rank's own where it is a GPU.
fn device_of(named: configs::Device, place: &Place) -> Result<Device> {
    Ok(match named {
        configs::Device::Cpu => Device::Cpu,
        configs::Device::Cuda => {
            let visible = sharding::cuda::load()?;
            sharding::cuda::device(gpus::index_of(place, visible, shown_gpus().map(|shown| shown.len()))?)?
        }
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

/// This thread is one of them: handing every loop to another one and waiting for it cost 3 % of a step where four ranks share two
/// cores. So where there is one thread only, no other thread of the process may use rayon: nobody would run what it asks for.
fn set_threads(threads: usize) -> Result<()> {
    tch::set_num_threads(i32::try_from(threads).context("threads")?);
    rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .use_current_thread()
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
