//! Where this process stands among the ranks of a run. The only file that reads the environment, the command line's own
//! options apart: one function decides, in a fixed order, and refuses what is contradictory instead of choosing.

use std::fmt;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::rendezvous::{Secret, SecretError};

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    pub rank: usize,
    pub world: usize,
    /// Rank among this node's ranks: picks the device.
    pub local_rank: usize,
    /// Ranks on this node; all of them where nobody tells, so that cores are never promised twice.
    pub local_world: usize,
    /// The host's name.
    pub node: String,
    pub family: Family,
}

/// Who told us. In the order in which they are believed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Family {
    /// RANK, WORLD_SIZE, LOCAL_RANK: set by hand or by torchrun.
    Explicit,
    OpenMpi,
    /// The mpirun of MPICH, Intel and their kin.
    Hydra,
    Slurm,
    /// srun --mpi=pmi2, and what PALS and Flux set beside their own.
    Pmi,
    Pals,
    Flux,
    /// Nobody: one process.
    Alone,
}

/// What Slurm's variables say of the job that this process belongs to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SlurmJob {
    pub id: Option<String>,
    /// Seconds since 1970; newer Slurms set it.
    pub end_time: Option<String>,
}

impl SlurmJob {
    pub fn detect() -> SlurmJob {
        SlurmJob {
            id: std::env::var("SLURM_JOB_ID").ok(),
            end_time: std::env::var("SLURM_JOB_END_TIME").ok(),
        }
    }
}

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlaceError {
    #[error("{name} = {value:?} is not a whole number; a launcher sets it, so unset it or start through the launcher")]
    NotANumber { name: &'static str, value: String },
    #[error("{set} is set but {missing} is not; set both, or unset {set}")]
    Incomplete { set: &'static str, missing: &'static str },
    #[error("rank {rank} is not below the world size {world} ({family}); check who sets them")]
    OutOfRange { rank: usize, world: usize, family: Family },
    #[error(
        "two launchers disagree: {a} says rank {} of {}, {b} says rank {} of {}; start the ranks through one of them, or unset \
         the variables of the other",
        of_a.0, of_a.1, of_b.0, of_b.1
    )]
    Disagree {
        a: Family,
        of_a: (usize, usize),
        b: Family,
        of_b: (usize, usize),
    },
    #[error(
        "SLURM_JOB_ID = {job} with {tasks} tasks, but no step: you are in the batch shell, and this would be one rank alone; \
         put `srun` before the command"
    )]
    BatchShell { job: String, tasks: usize },
    #[error(
        "srun started {tasks} tasks, but {family} says that this is one rank alone: there would be {tasks} runs of one rank each \
         in the same folder; let srun start the ranks by itself (srun --mpi=pmix panglot train …), or start one mpirun outside of srun"
    )]
    Singletons { tasks: usize, family: Family },
}

/// What the job around this rank says, beside its place.
#[derive(Clone, Debug)]
pub struct Surroundings {
    /// The scheduler's name of the job; "local" without one.
    pub job: String,
    pub secret: Option<Secret>,
    /// PANGLOT_INTERFACE: where rank 0 listens.
    pub interface: Option<String>,
    /// The node that the job was started from, on the cluster's network.
    pub launch_node: Option<IpAddr>,
    /// Whoever started this rank wants signs of life.
    pub beats: bool,
    /// Its socket, where it listens for losses.
    pub ear: Option<PathBuf>,
    /// Whether all ranks are on this host; `None` where nobody tells.
    pub one_host: Option<bool>,
}

/// The job's secret, 64 hexadecimal digits; or a file of mode 0600 that holds them.
pub const SECRET: &str = "PANGLOT_SECRET";
const SECRET_FILE: &str = "PANGLOT_SECRET_FILE";
pub const BEATS: &str = "PANGLOT_BEATS";
pub const EAR: &str = "PANGLOT_EAR";

impl Surroundings {
    pub fn detect() -> Result<Surroundings, SecretError> {
        Surroundings::from_variables(|name| std::env::var(name).ok())
    }

    fn from_variables(variable: impl Fn(&str) -> Option<String>) -> Result<Surroundings, SecretError> {
        let secret = match (variable(SECRET), variable(SECRET_FILE)) {
            (Some(secret), _) => Some(Secret::from_hex(&secret)?),
            (None, Some(file)) => Some(Secret::from_file(Path::new(&file))?),
            (None, None) => None,
        };
        // What is wrong with the variables of a rank was said when its place was looked for.
        let told = families(&Variables(&variable)).unwrap_or_default();
        let one_host = match &told[..] {
            [] => Some(true),
            [first, ..] => told
                .iter()
                .find_map(|told| told.local_world)
                .map(|local| local == first.world),
        };
        let jobs = ["SLURM_JOB_ID", "PBS_JOBID", "FLUX_JOB_ID", "LSB_JOBID"];
        Ok(Surroundings {
            job: jobs
                .iter()
                .find_map(|name| variable(name))
                .unwrap_or_else(|| "local".into()),
            secret,
            interface: variable("PANGLOT_INTERFACE").filter(|name| !name.is_empty()),
            launch_node: variable("SLURM_LAUNCH_NODE_IPADDR").and_then(|address| address.parse().ok()),
            beats: variable(BEATS).is_some(),
            ear: variable(EAR).map(PathBuf::from),
            one_host,
        })
    }
}

/// What all ranks of one launch have in common and no other launch has; fit for a file's name.
pub fn launch_id() -> String {
    let names = [
        "SLURM_JOB_ID",
        "SLURM_RESTART_COUNT",
        "SLURM_STEP_ID",
        "PMIX_NAMESPACE",
        "PALS_APID",
        "FLUX_JOB_ID",
    ];
    // mpirun starts its daemons on other nodes as a step of its own, which its ranks on the first node are not in.
    let of_mpirun = ["OMPI_COMM_WORLD_RANK", HYDRA]
        .iter()
        .any(|name| std::env::var_os(name).is_some());
    let told = names.iter().filter(|name| !(of_mpirun && **name == "SLURM_STEP_ID"));
    let parts: Vec<String> = told.filter_map(|name| std::env::var(name).ok()).collect();
    let plain = |c: char| if c.is_ascii_alphanumeric() || c == '.' { c } else { '_' };
    let id: String = parts.join(".").chars().map(plain).take(100).collect();
    if id.is_empty() { "local".to_owned() } else { id }
}

/// The name of this attempt at a run, of which the job script and its ranks are told the same: a requeued job keeps its number,
/// a job may make several attempts, and ranks of a node that was frozen meanwhile, or of a killed srun, may still end.
pub fn attempt() -> String {
    let told = |name: &str| std::env::var(name).unwrap_or_default();
    let [job, start, attempt] = ["SLURM_JOB_ID", "SLURM_RESTART_COUNT", "PANGLOT_ATTEMPT"].map(told);
    format!("{job}.{start}.{attempt}")
}

/// The host of each rank of this step, where Slurm tells; in its usual order, node after node.
pub fn step_hosts() -> Vec<String> {
    let told = |name: &str| std::env::var(name).ok();
    let placed = || {
        let hosts = crate::hostlist::parse(&told("SLURM_STEP_NODELIST")?).ok()?;
        let tasks = told("SLURM_STEP_TASKS_PER_NODE")?;
        let of_host = |(node, host)| Some(vec![host; tasks_on_node(&tasks, node)?]);
        hosts.into_iter().enumerate().map(of_host).collect::<Option<Vec<_>>>()
    };
    placed().unwrap_or_default().concat()
}

/// CPUs that a step of Slurm's gives each of its ranks, where that was asked for. With more than one rank a node, what this process
/// may run on is then its own share or, unbound, all of theirs.
pub fn cpus_of_rank() -> Option<usize> {
    let told = |name: &str| std::env::var(name).ok();
    told("SLURM_STEP_ID").and(told("SLURM_CPUS_PER_TASK"))?.parse().ok()
}

/// The GPUs that whoever started this process shows it, in their order; `None` where nobody chose among the node's.
pub fn shown_gpus() -> Option<Vec<String>> {
    Some(gpus_in(&std::env::var("CUDA_VISIBLE_DEVICES").ok()?))
}

/// CUDA ends the list at the first word that names none; Slurm writes "NoDevFiles" for a job without GPUs.
fn gpus_in(variable: &str) -> Vec<String> {
    let names_one = |word: &&str| word.parse::<u32>().is_ok() || word.starts_with("GPU-") || word.starts_with("MIG-");
    let words = variable.split(',').map(str::trim);
    words.take_while(names_one).map(str::to_owned).collect()
}

/// Only Hydra sets it: the mpirun of MPICH, Intel and their kin.
const HYDRA: &str = "MPI_LOCALRANKID";

const MPI_WIRES: [&str; 4] = ["OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK", "PMI_FD"];

/// Whether this process was started so that MPI finds its peers.
pub fn is_wired_for_mpi() -> bool {
    MPI_WIRES.iter().any(|name| std::env::var_os(name).is_some())
}

/// By which launchers tell a process its place, and by which MPI finds its peers; without them it is nobody's rank.
pub const RANK_VARIABLES: [&str; 14] = [
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    MPI_WIRES[0],
    MPI_WIRES[1],
    MPI_WIRES[2],
    MPI_WIRES[3],
    HYDRA,
    "PMIX_NAMESPACE",
    "SLURM_STEP_ID",
    "SLURM_PROCID",
    "SLURM_LOCALID",
    "PALS_RANKID",
    "FLUX_TASK_RANK",
];

impl Place {
    pub fn detect() -> Result<Place, PlaceError> {
        let host = nix::unistd::gethostname().unwrap_or_default();
        Place::from_variables(|name| std::env::var(name).ok(), &host.to_string_lossy())
    }

    /// `detect` over any source of variables.
    pub fn from_variables(variable: impl Fn(&str) -> Option<String>, host: &str) -> Result<Place, PlaceError> {
        let variables = Variables(&variable);
        let found = families(&variables)?;
        let Some(first) = found.first() else {
            return alone(&variables, host);
        };
        if let Some(tasks) = found
            .iter()
            .find(|told| told.family == Family::Slurm)
            .map(|told| told.world)
            && tasks > 1
            && first.world == 1
        {
            let family = first.family;
            return Err(PlaceError::Singletons { tasks, family });
        }
        for other in &found[1..] {
            // An mpirun starts its daemons on other nodes by srun, so its ranks there see Slurm's numbers of the daemons.
            if matches!(first.family, Family::OpenMpi | Family::Hydra) && other.family == Family::Slurm {
                continue;
            }
            if (first.rank, first.world) != (other.rank, other.world) {
                return Err(PlaceError::Disagree {
                    a: first.family,
                    of_a: (first.rank, first.world),
                    b: other.family,
                    of_b: (other.rank, other.world),
                });
            }
        }
        if first.rank >= first.world {
            return Err(PlaceError::OutOfRange {
                rank: first.rank,
                world: first.world,
                family: first.family,
            });
        }
        Ok(Place {
            rank: first.rank,
            world: first.world,
            local_rank: first.local_rank,
            // Of those that agree, the first to know it.
            local_world: found.iter().find_map(|told| told.local_world).unwrap_or(first.world),
            node: host.to_owned(),
            family: first.family,
        })
    }

    /// Started as one of several ranks by somebody else: starting more ranks from here would be wrong.
    pub fn is_rank_of_many(&self) -> bool {
        self.world > 1
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Family::Explicit => "RANK/WORLD_SIZE",
            Family::OpenMpi => "Open MPI (OMPI_COMM_WORLD_*)",
            Family::Hydra => "Hydra's mpirun (PMI_RANK)",
            Family::Slurm => "Slurm (SLURM_PROCID)",
            Family::Pmi => "PMI (PMI_RANK)",
            Family::Pals => "PALS (PALS_RANKID)",
            Family::Flux => "Flux (FLUX_TASK_RANK)",
            Family::Alone => "nobody",
        })
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.world == 1 {
            return f.write_str("one process");
        }
        let Place {
            rank,
            world,
            local_rank,
            local_world,
            node,
            family,
        } = self;
        write!(
            f,
            "rank {rank} of {world}, {local_rank} of {local_world} on {node}, told by {family}"
        )
    }
}

/// Every family that says something, in the order in which they are believed.
fn families(variables: &Variables) -> Result<Vec<Told>, PlaceError> {
    let all = [explicit, open_mpi, hydra, slurm, pmi, pals, flux];
    all.iter().filter_map(|family| family(variables).transpose()).collect()
}

/// What one family of variables says.
struct Told {
    rank: usize,
    world: usize,
    local_rank: usize,
    local_world: Option<usize>,
    family: Family,
}

type Found = Result<Option<Told>, PlaceError>;

struct Variables<'a>(&'a dyn Fn(&str) -> Option<String>);

impl Variables<'_> {
    fn number(&self, name: &'static str) -> Result<Option<usize>, PlaceError> {
        match (self.0)(name) {
            None => Ok(None),
            Some(value) => match value.trim().parse() {
                Ok(number) => Ok(Some(number)),
                Err(_) => Err(PlaceError::NotANumber { name, value }),
            },
        }
    }

    /// What must be there once `set` is.
    fn with(&self, set: &'static str, missing: &'static str) -> Result<usize, PlaceError> {
        self.number(missing)?.ok_or(PlaceError::Incomplete { set, missing })
    }

    /// A family with its rank, size and local rank in these variables.
    fn family(&self, family: Family, rank: &'static str, world: &'static str, local: &'static str) -> Found {
        let Some(value) = self.number(rank)? else {
            return Ok(None);
        };
        let (world, local_rank) = (self.with(rank, world)?, self.with(rank, local)?);
        Ok(Some(Told {
            rank: value,
            world,
            local_rank,
            local_world: None,
            family,
        }))
    }
}

fn explicit(variables: &Variables) -> Found {
    let Some(told) = variables.family(Family::Explicit, "RANK", "WORLD_SIZE", "LOCAL_RANK")? else {
        return Ok(None);
    };
    Ok(Some(Told {
        local_world: variables.number("LOCAL_WORLD_SIZE")?,
        ..told
    }))
}

/// Before Slurm: in sbatch + mpirun, SLURM_PROCID is 0 for everyone.
fn open_mpi(variables: &Variables) -> Found {
    let (rank, size) = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE");
    let Some(told) = variables.family(Family::OpenMpi, rank, size, "OMPI_COMM_WORLD_LOCAL_RANK")? else {
        return Ok(None);
    };
    Ok(Some(Told {
        local_world: variables.number("OMPI_COMM_WORLD_LOCAL_SIZE")?,
        ..told
    }))
}

/// Only inside a step: the batch shell has SLURM_PROCID too.
fn slurm(variables: &Variables) -> Found {
    if (variables.0)("SLURM_STEP_ID").is_none() {
        return Ok(None);
    }
    let world = if variables.number("SLURM_STEP_NUM_TASKS")?.is_some() {
        "SLURM_STEP_NUM_TASKS"
    } else {
        "SLURM_NTASKS"
    };
    let Some(told) = variables.family(Family::Slurm, "SLURM_PROCID", world, "SLURM_LOCALID")? else {
        return Ok(None);
    };
    let node = variables.number("SLURM_NODEID")?;
    let per_node = (variables.0)("SLURM_STEP_TASKS_PER_NODE");
    let local_world = node.zip(per_node).and_then(|(node, list)| tasks_on_node(&list, node));
    Ok(Some(Told { local_world, ..told }))
}

/// Before Slurm, as Open MPI: MPICH's and Intel's mpirun speak PMI and add the local rank.
fn hydra(variables: &Variables) -> Found {
    if variables.number(HYDRA)?.is_none() {
        return Ok(None);
    }
    let Some(told) = variables.family(Family::Hydra, "PMI_RANK", "PMI_SIZE", HYDRA)? else {
        return Ok(None);
    };
    Ok(Some(Told {
        local_world: variables.number("MPI_LOCALNRANKS")?,
        ..told
    }))
}

fn pmi(variables: &Variables) -> Found {
    let Some(rank) = variables.number("PMI_RANK")?.filter(|_| (variables.0)(HYDRA).is_none()) else {
        return Ok(None);
    };
    let world = variables.with("PMI_RANK", "PMI_SIZE")?;
    // PMI need not tell the local rank; srun --mpi=pmi2, PALS and Flux have their own.
    let local = [
        "PMI_LOCAL_RANK",
        "SLURM_LOCALID",
        "PALS_LOCAL_RANKID",
        "FLUX_TASK_LOCAL_ID",
    ];
    let local = local
        .iter()
        .find_map(|&name| variables.number(name).transpose())
        .transpose()?;
    let local_rank = match local {
        Some(local) => local,
        None if world == 1 => 0,
        None => {
            return Err(PlaceError::Incomplete {
                set: "PMI_RANK",
                missing: "PMI_LOCAL_RANK",
            });
        }
    };
    Ok(Some(Told {
        rank,
        world,
        local_rank,
        local_world: variables.number("PMI_LOCAL_SIZE")?,
        family: Family::Pmi,
    }))
}

fn pals(variables: &Variables) -> Found {
    variables.family(Family::Pals, "PALS_RANKID", "PMI_SIZE", "PALS_LOCAL_RANKID")
}

fn flux(variables: &Variables) -> Found {
    variables.family(Family::Flux, "FLUX_TASK_RANK", "FLUX_JOB_SIZE", "FLUX_TASK_LOCAL_ID")
}

fn alone(variables: &Variables, host: &str) -> Result<Place, PlaceError> {
    let tasks = variables.number("SLURM_NTASKS")?.unwrap_or(1);
    match (variables.0)("SLURM_JOB_ID") {
        Some(job) if tasks > 1 => Err(PlaceError::BatchShell { job, tasks }),
        _ => {
            let node = host.to_owned();
            Ok(Place {
                rank: 0,
                world: 1,
                local_rank: 0,
                local_world: 1,
                node,
                family: Family::Alone,
            })
        }
    }
}

/// The entry for `node` in Slurm's "2(x3),1".
fn tasks_on_node(list: &str, node: usize) -> Option<usize> {
    let mut before = 0;
    for run in list.split(',') {
        let (tasks, times) = match run.split_once("(x") {
            Some((tasks, times)) => (tasks, times.strip_suffix(')')?.parse().ok()?),
            None => (run, 1),
        };
        before += times;
        if node < before {
            return tasks.parse().ok();
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXPLICIT: &str = "RANK=3 WORLD_SIZE=4 LOCAL_RANK=1";
    const OPEN_MPI: &str =
        "OMPI_COMM_WORLD_RANK=3 OMPI_COMM_WORLD_SIZE=4 OMPI_COMM_WORLD_LOCAL_RANK=1 OMPI_COMM_WORLD_LOCAL_SIZE=2";
    const OF_HYDRA: &str = "PMI_RANK=3 PMI_SIZE=4 MPI_LOCALRANKID=1 MPI_LOCALNRANKS=2";
    const STEP: &str = "SLURM_JOB_ID=7 SLURM_STEP_ID=0 SLURM_PROCID=3 SLURM_NTASKS=4 SLURM_LOCALID=1 SLURM_NODEID=1 \
                        SLURM_STEP_TASKS_PER_NODE=2(x2)";

    fn place(variables: &str) -> Result<Place, PlaceError> {
        let table: Vec<_> = variables
            .split_whitespace()
            .map(|pair| pair.split_once('=').unwrap())
            .collect();
        Place::from_variables(
            |name| {
                table
                    .iter()
                    .find(|(known, _)| *known == name)
                    .map(|(_, v)| (*v).to_owned())
            },
            "n1",
        )
    }

    fn check(variables: &str, family: Family, rank_world_local: (usize, usize, usize), local_world: usize) {
        let found = place(variables).unwrap_or_else(|error| panic!("{variables}: {error}"));
        assert_eq!(found.family, family, "{variables}");
        assert_eq!(
            (found.rank, found.world, found.local_rank),
            rank_world_local,
            "{variables}"
        );
        assert_eq!(
            (found.node.as_str(), found.local_world),
            ("n1", local_world),
            "{variables}"
        );
    }

    #[test]
    fn each_launcher_is_understood() {
        let here = (3, 4, 1);
        check(EXPLICIT, Family::Explicit, here, 4);
        check(OPEN_MPI, Family::OpenMpi, here, 2);
        check(STEP, Family::Slurm, here, 2);
        check(OF_HYDRA, Family::Hydra, here, 2);
        check(
            "PMI_RANK=3 PMI_SIZE=4 PMI_LOCAL_RANK=1 PMI_LOCAL_SIZE=2",
            Family::Pmi,
            here,
            2,
        );
        check(
            "PALS_RANKID=3 PMI_SIZE=4 PALS_LOCAL_RANKID=1 PALS_NODEID=5",
            Family::Pals,
            here,
            4,
        );
        check(
            "FLUX_TASK_RANK=3 FLUX_JOB_SIZE=4 FLUX_TASK_LOCAL_ID=1",
            Family::Flux,
            here,
            4,
        );
        // As its own plugin sets them beside.
        check(
            "FLUX_TASK_RANK=3 FLUX_JOB_SIZE=4 FLUX_TASK_LOCAL_ID=1 PMI_RANK=3 PMI_SIZE=4 PMI_LOCAL_SIZE=2",
            Family::Pmi,
            here,
            2,
        );
        check("", Family::Alone, (0, 1, 0), 1);
    }

    #[test]
    fn whether_all_ranks_are_here_is_not_guessed() {
        let one_host = |variables: &str| {
            let table: Vec<_> = variables
                .split_whitespace()
                .map(|pair| pair.split_once('=').unwrap())
                .collect();
            let value = |name: &str| {
                table
                    .iter()
                    .find(|(known, _)| *known == name)
                    .map(|(_, value)| (*value).to_owned())
            };
            Surroundings::from_variables(value).unwrap().one_host
        };
        assert_eq!(one_host(OPEN_MPI), Some(false));
        assert_eq!(one_host(EXPLICIT), None);
        assert_eq!(one_host(&format!("{EXPLICIT} LOCAL_WORLD_SIZE=4")), Some(true));
        assert_eq!(one_host(&format!("{STEP} {EXPLICIT}")), Some(false));
        assert_eq!(one_host(""), Some(true));
    }

    #[test]
    fn the_first_family_wins_where_they_agree_and_the_others_fill_in() {
        check(&format!("{STEP} {EXPLICIT}"), Family::Explicit, (3, 4, 1), 2);
        check(&format!("{STEP} PMI_RANK=3 PMI_SIZE=4"), Family::Slurm, (3, 4, 1), 2);
    }

    #[test]
    fn under_mpirun_slurm_speaks_of_something_else() {
        let sbatch = "SLURM_JOB_ID=7 SLURM_PROCID=0 SLURM_NTASKS=4 SLURM_LOCALID=0";
        check(&format!("{sbatch} {OPEN_MPI}"), Family::OpenMpi, (3, 4, 1), 2);
        let daemon = "SLURM_JOB_ID=7 SLURM_STEP_ID=0 SLURM_PROCID=1 SLURM_NTASKS=2 SLURM_LOCALID=0";
        check(&format!("{daemon} {OPEN_MPI}"), Family::OpenMpi, (3, 4, 1), 2);
        check(&format!("{sbatch} {OF_HYDRA}"), Family::Hydra, (3, 4, 1), 2);
        check(&format!("{daemon} {OF_HYDRA}"), Family::Hydra, (3, 4, 1), 2);
    }

    #[test]
    fn what_is_contradictory_is_refused() {
        let refused = |variables: &str| place(variables).unwrap_err().to_string();
        assert_eq!(
            refused(&format!("{STEP} RANK=0 WORLD_SIZE=2 LOCAL_RANK=0")),
            "two launchers disagree: RANK/WORLD_SIZE says rank 0 of 2, Slurm (SLURM_PROCID) says rank 3 of 4; start the ranks \
             through one of them, or unset the variables of the other"
        );
        for alone in [
            "RANK=0 WORLD_SIZE=1 LOCAL_RANK=0",
            "OMPI_COMM_WORLD_RANK=0 OMPI_COMM_WORLD_SIZE=1 OMPI_COMM_WORLD_LOCAL_RANK=0",
            "PMI_RANK=0 PMI_SIZE=1 MPI_LOCALRANKID=0 MPI_LOCALNRANKS=1",
        ] {
            let said = refused(&format!("{STEP} {alone}"));
            assert!(
                said.starts_with("srun started 4 tasks, but ") && said.contains("--mpi=pmix"),
                "{said}"
            );
        }
        assert_eq!(
            refused("RANK=1"),
            "RANK is set but WORLD_SIZE is not; set both, or unset RANK"
        );
        assert!(refused("RANK=one").starts_with("RANK = \"one\" is not a whole number"));
        assert!(refused("RANK=4 WORLD_SIZE=4 LOCAL_RANK=0").starts_with("rank 4 is not below the world size 4"));
        assert!(refused("SLURM_JOB_ID=7 SLURM_PROCID=0 SLURM_NTASKS=4").contains("you are in the batch shell"));
    }

    #[test]
    fn a_batch_shell_of_one_task_is_one_process() {
        check(
            "SLURM_JOB_ID=7 SLURM_PROCID=0 SLURM_NTASKS=1",
            Family::Alone,
            (0, 1, 0),
            1,
        );
    }

    #[test]
    fn slurm_s_short_list_of_tasks_is_read() {
        let on = |list, node| tasks_on_node(list, node);
        assert_eq!(
            [on("2(x3),1", 0), on("2(x3),1", 2), on("2(x3),1", 3), on("2(x3),1", 4)],
            [Some(2), Some(2), Some(1), None]
        );
        assert_eq!([on("4", 0), on("x", 0), on("2(x", 0)], [Some(4), None, None]);
    }

    #[test]
    fn gpus_are_shown_as_cuda_reads_the_variable() {
        for (variable, expected) in [
            ("0", &["0"][..]),
            ("2, 3", &["2", "3"]),
            ("GPU-8932f937-d72c,1", &["GPU-8932f937-d72c", "1"]),
            ("MIG-41b3,MIG-41b4", &["MIG-41b3", "MIG-41b4"]),
            ("0,-1,1", &["0"]),
            ("", &[]),
            ("NoDevFiles", &[]),
        ] {
            assert_eq!(gpus_in(variable), expected, "{variable:?}");
        }
    }
}
