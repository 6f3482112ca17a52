//! Which of its node's GPUs a rank takes, and what is on it before the rank comes.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::place::Place;
use crate::{bounded, text};

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoGpu {
    #[error(
        "CUDA_VISIBLE_DEVICES shows this process no GPU; ask the scheduler for one (slurm: --gpus-per-node), unset the variable, \
         or set train.device: cpu"
    )]
    Hidden,
    #[error(
        "{ranks} ranks would share {}, all that CUDA_VISIBLE_DEVICES shows; start one rank a GPU (-n {visible})",
        text::counted(*visible, "GPU")
    )]
    Shared { ranks: usize, visible: usize },
    #[error(
        "this rank is number {local_rank} of {local_world} on its node, which shows it {}; start one rank a GPU, or ask for more \
         (slurm: --gpus-per-node)",
        text::counted(*visible, "GPU")
    )]
    TooFew {
        local_rank: usize,
        local_world: usize,
        visible: usize,
    },
}

/// The index of a rank's own among the `visible` GPUs. `shown`: how many CUDA_VISIBLE_DEVICES shows, if it is set; one is the rank's
/// own, from a scheduler that gives each rank another. Of several, and where nobody chose, ranks count them off.
///
/// # Errors
/// When none is left for this rank.
pub fn index_of(place: &Place, visible: usize, shown: Option<usize>) -> Result<usize, NoGpu> {
    let Place {
        local_rank,
        local_world,
        ..
    } = *place;
    match visible {
        0 => Err(NoGpu::Hidden),
        1 if shown == Some(1) => Ok(0),
        _ if local_rank < visible => Ok(local_rank),
        _ => Err(NoGpu::TooFew {
            local_rank,
            local_world,
            visible,
        }),
    }
}

/// Whether ranks that are started here, none of them by a scheduler that gives each its own, have a GPU each.
///
/// # Errors
/// When there are fewer than ranks.
pub fn enough_for(ranks: usize, shown: &[String]) -> Result<(), NoGpu> {
    match shown.len() {
        0 => Err(NoGpu::Hidden),
        visible if visible < ranks => Err(NoGpu::Shared { ranks, visible }),
        _ => Ok(()),
    }
}

/// A rank's GPU as nvidia-smi shows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gpu {
    /// Its number on the node; empty for a part of a GPU (MIG).
    pub number: String,
    pub uuid: String,
    pub name: String,
    pub used_bytes: u64,
    pub processes: Vec<Process>,
    /// CUDA_VISIBLE_DEVICES shows it to the rank; else the rank sees all there are.
    pub shown: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    pub id: String,
    pub name: String,
}

/// Why nothing is known of a rank's GPU.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Trouble {
    /// No rank could work there.
    pub refuses: bool,
    pub what: String,
    pub remedy: String,
}

/// A driver wakes a GPU that nobody used in a second or two.
const ANSWER: Duration = Duration::from_secs(6);

/// What nvidia-smi tells of the rank's GPU. `shown`: what CUDA_VISIBLE_DEVICES shows, if it is set.
///
/// # Errors
/// When there is none for the rank, or nvidia-smi does not tell.
pub fn look(place: &Place, shown: Option<&[String]>) -> Result<Gpu, Trouble> {
    let deadline = Instant::now() + ANSWER;
    let gpus = ask("--query-gpu=index,uuid,name,memory.used", deadline)?;
    let processes = ask("--query-compute-apps=gpu_uuid,pid,process_name", deadline)?;
    own(place, shown, &gpus, &processes)
}

fn ask(query: &str, deadline: Instant) -> Result<String, Trouble> {
    let trouble = |refuses, what: String, remedy: &str| {
        let remedy = remedy.to_owned();
        Err(Trouble { refuses, what, remedy })
    };
    let mut command = Command::new("nvidia-smi");
    command
        .args([query, "--format=csv,noheader,nounits"])
        .stderr(Stdio::null());
    match bounded::output(&mut command, deadline.saturating_duration_since(Instant::now())) {
        Ok(Some((status, said))) if status.success() => Ok(said),
        Ok(Some((status, said))) => {
            let why = said.lines().find(|line| !line.trim().is_empty());
            let why = why.map_or_else(|| status.to_string(), |line| line.trim().to_owned());
            let remedy = "see that the driver is loaded and fits its libraries, or exclude the host (exclude=HOST)";
            trouble(true, format!("nvidia-smi fails: {why}"), remedy)
        }
        Ok(None) => {
            let what = format!("nvidia-smi gave no answer in {} s", ANSWER.as_secs());
            let remedy = "its driver may hang: where collectives do not end either, exclude the host (exclude=HOST); else have its \
                          driver stay awake (nvidia-persistenced)";
            trouble(false, what, remedy)
        }
        Err(error) => trouble(
            false,
            format!("nvidia-smi cannot be started ({error}), so that nobody knows who else uses its GPUs"),
            "put it on the PATH there; in a container, pass the driver in (apptainer --nv)",
        ),
    }
}

/// The rank's GPU in nvidia-smi's answers, lines of "0, GPU-a1…, NVIDIA H100, 17" (MiB) and "GPU-a1…, 711, python3".
fn own(place: &Place, shown: Option<&[String]>, gpus: &str, processes: &str) -> Result<Gpu, Trouble> {
    let refused = |what: String, remedy: &str| Trouble {
        refuses: true,
        what,
        remedy: remedy.to_owned(),
    };
    let gpus: Vec<Gpu> = gpus.lines().filter_map(|line| gpu(line, processes)).collect();
    let visible = shown.map_or(gpus.len(), <[String]>::len);
    let index = index_of(place, visible, shown.map(<[String]>::len)).map_err(|error| {
        let error = error.to_string();
        let (what, remedy) = error.split_once("; ").unwrap_or((&error, ""));
        refused(what.to_owned(), remedy)
    })?;
    let Some(name) = shown.map(|shown| shown[index].as_str()) else {
        return Ok(gpus[index].clone());
    };
    if name.starts_with("MIG-") {
        return Ok(Gpu {
            number: String::new(),
            uuid: name.to_owned(),
            name: "a part of a GPU".to_owned(),
            used_bytes: 0,
            processes: Vec::new(),
            shown: true,
        });
    }
    // As CUDA does, which takes the beginning of a UUID where it is clear.
    let named = |gpu: &&Gpu| gpu.number == name || (name.starts_with("GPU-") && gpu.uuid.starts_with(name));
    let found = gpus.iter().find(named);
    found
        .map(|gpu| Gpu {
            shown: true,
            ..gpu.clone()
        })
        .ok_or_else(|| {
            let there: Vec<&str> = gpus.iter().map(|gpu| gpu.number.as_str()).collect();
            refused(
                format!(
                    "CUDA_VISIBLE_DEVICES names GPU {name}, but nvidia-smi shows {}",
                    if there.is_empty() {
                        "none".to_owned()
                    } else {
                        there.join(", ")
                    }
                ),
                "see who sets the variable, or exclude the host (exclude=HOST)",
            )
        })
}

fn gpu(line: &str, processes: &str) -> Option<Gpu> {
    let mut fields = line.split(',').map(str::trim);
    let (number, uuid, name, used) = (fields.next()?, fields.next()?, fields.next()?, fields.next()?);
    let on_it = |line: &str| {
        let mut fields = line.splitn(3, ',').map(str::trim);
        let (gpu, id, name) = (fields.next()?, fields.next()?, fields.next()?);
        (gpu == uuid).then(|| Process {
            id: id.to_owned(),
            name: name.to_owned(),
        })
    };
    Some(Gpu {
        number: number.to_owned(),
        uuid: uuid.to_owned(),
        name: name.to_owned(),
        // "[N/A]" on GPUs that share the host's memory.
        used_bytes: used.parse::<u64>().unwrap_or(0) << 20,
        processes: processes.lines().filter_map(on_it).collect(),
        shown: false,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::place::Family;

    fn rank(local_rank: usize, local_world: usize) -> Place {
        Place {
            rank: local_rank,
            world: local_world,
            local_rank,
            local_world,
            node: "n1".into(),
            family: Family::Slurm,
        }
    }

    #[test]
    fn a_rank_takes_the_one_it_was_given_or_counts_them_off() {
        assert_eq!(index_of(&rank(3, 4), 4, Some(4)), Ok(3));
        assert_eq!(index_of(&rank(3, 4), 4, None), Ok(3));
        // Given to this rank alone.
        assert_eq!(index_of(&rank(3, 4), 1, Some(1)), Ok(0));
        // One of two that were shown has fallen off: rank 1 must not take rank 0's.
        assert!(index_of(&rank(1, 2), 1, Some(2)).is_err());
        // Nobody chose: all ranks would take the same one.
        let too_few = index_of(&rank(1, 2), 1, None).unwrap_err().to_string();
        assert!(
            too_few.starts_with("this rank is number 1 of 2 on its node, which shows it 1 GPU; start one rank a GPU"),
            "{too_few}"
        );
        assert!(index_of(&rank(2, 4), 2, Some(2)).is_err());
        assert_eq!(index_of(&rank(0, 1), 0, Some(0)), Err(NoGpu::Hidden));
    }

    const GPUS: &str = "0, GPU-aa11, NVIDIA H100 80GB HBM3, 17\n1, GPU-bb22, NVIDIA H100 80GB HBM3, 38912\n";
    const PROCESSES: &str = "GPU-bb22, 711, python3, of somebody\nGPU-cc33, 9, other\n";

    fn found(place: &Place, variable: Option<&str>) -> Result<Gpu, Trouble> {
        let shown: Option<Vec<String>> = variable.map(|names| names.split(',').map(str::to_owned).collect());
        own(place, shown.as_deref(), GPUS, PROCESSES)
    }

    #[test]
    fn the_rank_s_own_is_found_by_number_or_uuid_with_those_who_use_it() {
        let second = found(&rank(1, 2), None).unwrap();
        assert_eq!((second.number.as_str(), second.used_bytes), ("1", 38912 << 20));
        assert_eq!(second.processes.len(), 1);
        assert_eq!(
            (second.processes[0].id.as_str(), second.processes[0].name.as_str()),
            ("711", "python3, of somebody")
        );
        assert_eq!(found(&rank(1, 2), Some("1,0")).unwrap().number, "0");
        assert!(!second.shown);
        let second = Gpu { shown: true, ..second };
        assert_eq!(found(&rank(1, 2), Some("1")).unwrap(), second);
        assert_eq!(found(&rank(0, 1), Some("GPU-bb")).unwrap(), second);
        assert!(found(&rank(0, 1), Some("0")).unwrap().processes.is_empty());
        assert_eq!(found(&rank(0, 1), Some("MIG-1")).unwrap().uuid, "MIG-1");
        // No GPUs, no lines: nobody's index is looked up.
        assert!(own(&rank(0, 1), None, "", "").is_err());
    }

    #[test]
    fn a_gpu_that_is_not_there_is_trouble_with_a_remedy() {
        let trouble = found(&rank(0, 1), Some("7")).unwrap_err();
        assert_eq!(
            trouble.what,
            "CUDA_VISIBLE_DEVICES names GPU 7, but nvidia-smi shows 0, 1"
        );
        let trouble = found(&rank(2, 4), Some("0,1")).unwrap_err();
        assert!(
            trouble.refuses && trouble.remedy.starts_with("start one rank a GPU"),
            "{trouble:?}"
        );
        let trouble = own(&rank(0, 1), Some(&[]), GPUS, PROCESSES).unwrap_err();
        assert!(trouble.what.contains("shows this process no GPU"), "{trouble:?}");
    }
}
