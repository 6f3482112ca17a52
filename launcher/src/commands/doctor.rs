//! `panglot doctor`: looks at the nodes of a job, under the same srun or mpirun line as training.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context, bail};
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::{App, ConfigArgs, Leave, RunFolder};
use launcher::bounded::{self, Limit};
use launcher::doctor::{Examined, Host, examine, limit_of_all_reduces};
use launcher::events::Event;
use launcher::gpus::Gpu;
use launcher::place::Place;
use launcher::worker::Job;
use launcher::{exit, files, text};

#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    pub config: ConfigArgs,
}

/// What `panglot-worker doctor` measured.
#[derive(Debug, Serialize, Deserialize)]
struct Collectives {
    engine: String,
    sizes: Vec<Size>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Size {
    bytes: u64,
    /// The median of several.
    seconds: f64,
    /// The slowest of them.
    worst_seconds: f64,
}

/// Which GPU a rank would take.
#[derive(Debug, Serialize)]
struct OnGpu {
    rank: usize,
    host: String,
    gpu: Gpu,
}

/// All that is looked at before the collectives takes some seconds, also where ranks are missing.
const MOST: Duration = Duration::from_secs(35);

pub fn run(app: &App, args: &Args) -> anyhow::Result<()> {
    let place = match Place::detect() {
        Ok(place) => place,
        Err(error) => {
            eprintln!("refused: {error}");
            return Err(Leave(exit::REFUSED).into());
        }
    };
    let limit = Limit::set(MOST, {
        let (rank, node) = (place.rank, place.node.clone());
        move || {
            eprintln!(
                "refused: {node}: rank {rank} was not through after {} s: a file system does not answer there (the run's folder, the \
                 program's, or /tmp); see `df` on that node, or leave it out",
                MOST.as_secs()
            );
            signal_hook::low_level::exit(exit::REFUSED);
        }
    });
    let plan = args
        .config
        .load_to_train(Some(format!("launch.ranks={}", place.world)))?;
    let worker = app.worker();
    let program = worker.as_ref().ok().map(|worker| worker.program().to_owned());
    let examined = match examine(&plan, &place, program.as_deref()) {
        Ok(examined) => examined,
        Err(error) => {
            eprintln!("refused: {error:#}");
            return Err(Leave(exit::REFUSED).into());
        }
    };
    limit.lift();
    let collectives = if examined.refused {
        None
    } else {
        // Beside the run's own, which a running job reads.
        let file = RunFolder(&plan.folders.run)
            .0
            .join("doctor")
            .join(format!("plan-{}.json", place.rank));
        files::write_json(&file, &plan)?;
        let words = vec!["doctor".into(), "--plan".into(), file.clone().into()];
        let limit = limit_of_all_reduces(plan.train.device);
        let measured = all_reduce(&worker?.one_of_many(plan.launch.threads_per_rank, words), limit);
        let _ = std::fs::remove_file(&file);
        Some(measured)
    };
    let failed = matches!(collectives, Some(Err(_)));
    if place.rank == 0 {
        examined.clean();
        print(app, &examined, &place, collectives)?;
    }
    if examined.refused || failed {
        return Err(Leave(exit::REFUSED).into());
    }
    Ok(())
}

/// Runs the ranks' collectives, for a bounded time.
fn all_reduce(job: &Job, limit: Duration) -> anyhow::Result<Option<Collectives>> {
    let mut command = Command::new(&job.program);
    command
        .args(&job.args)
        .envs(job.env.iter().map(|(name, value)| (name, value)));
    let ended = bounded::output(&mut command, limit);
    let Some((status, said)) = ended.with_context(|| format!("cannot start {}", job.program.display()))? else {
        bail!("the ranks did not meet or finish within {} s", limit.as_secs());
    };
    if !status.success() {
        bail!("a rank ended with {status}");
    }
    let done = said
        .lines()
        .filter_map(|line| serde_json::from_str(line).ok())
        .find_map(|event| match event {
            Event::Done { result } => Some(result),
            _ => None,
        });
    Ok(done.map(serde_json::from_value).transpose()?)
}

fn print(
    app: &App,
    examined: &Examined,
    place: &Place,
    collectives: Option<anyhow::Result<Option<Collectives>>>,
) -> anyhow::Result<()> {
    let error = match &collectives {
        Some(Err(error)) => Some(format!("{error:#}")),
        _ => None,
    };
    let measured = collectives.and_then(Result::ok).flatten();
    let hosts: std::collections::BTreeSet<&String> = examined.hosts.values().map(|host| &host.host).collect();
    let of_rank = |(&rank, host): (&usize, &'_ Host)| {
        let gpu = host.gpu.clone()?.ok()?;
        Some(OnGpu {
            rank,
            host: host.host.clone(),
            gpu,
        })
    };
    let gpus: Vec<OnGpu> = examined.hosts.iter().filter_map(of_rank).collect();
    let seconds = examined.began.elapsed().as_secs_f64();
    let result = json!({ "ranks": place.world, "hosts": hosts, "findings": examined.findings, "links": examined.links,
        "gpus": gpus, "collectives": measured, "collectives_error": error, "seconds": seconds });
    app.print(&result, || {
        let mut lines: Vec<String> = examined.findings.iter().map(ToString::to_string).collect();
        if let Some(error) = &error {
            lines.push(format!(
                "refused: {}: collectives do not work: {error}; look at the lines of these ranks above, and at what carries \
                 them (OMPI_MCA_btl_tcp_if_include, NCCL_SOCKET_IFNAME)",
                hosts.iter().map(|host| host.as_str()).collect::<Vec<_>>().join(", ")
            ));
        }
        lines.extend(gpus.iter().map(|OnGpu { rank, host, gpu }| {
            format!("rank {rank} on {host} has GPU {} ({}, {})", gpu.number, gpu.name, gpu.uuid)
        }));
        if place.world == 1 {
            lines.push(
                "one rank alone: no links and no all-reduces; start `panglot doctor` by srun or mpirun as the run's ranks, to see them"
                    .to_owned(),
            );
        }
        // A rank alone is timed with nothing to send: no pace of anything.
        let between_ranks = measured.iter().filter(|_| place.world > 1);
        for size in between_ranks.flat_map(|measured| &measured.sizes) {
            let late = if size.worst_seconds > 4.0 * size.seconds { ", the worst " } else { "" };
            let worst = if late.is_empty() { String::new() } else { milliseconds(size.worst_seconds) };
            lines.push(format!(
                "all-reduce of {}: {} ({}/s){late}{worst}",
                text::bytes(size.bytes),
                milliseconds(size.seconds),
                text::bytes((size.bytes as f64 / size.seconds) as u64)
            ));
        }
        let count = |refuses| examined.findings.iter().filter(|finding| finding.refuses == refuses).count();
        let refusals = count(true) + usize::from(error.is_some());
        lines.push(format!(
            "{} on {} looked at in {seconds:.1} s: {}, {}",
            text::counted(place.world, "rank"),
            text::counted(hosts.len(), "host"),
            text::counted(refusals, "refusal"),
            text::counted(count(false), "warning"),
        ));
        lines.join("\n")
    })
}

fn milliseconds(seconds: f64) -> String {
    format!("{:.2} ms", 1e3 * seconds)
}
