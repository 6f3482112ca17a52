//! What is wrong with the GPUs of a run's ranks. Pure.

use std::collections::BTreeMap;

use super::Host;
use super::findings::{Finding, add, finding};
use crate::gpus::Gpu;
use crate::text;

/// A driver keeps some hundred MB of every GPU for itself.
const LEAST_USE: u64 = 1 << 30;

/// GPUs that ranks cannot use, that others use, and that two ranks would share.
pub fn findings(hosts: &BTreeMap<usize, Host>) -> Vec<Finding> {
    let mut found = vec![];
    let mut ranks_on: BTreeMap<(&str, &str), Vec<usize>> = BTreeMap::new();
    for (rank, host) in hosts {
        match &host.gpu {
            None => {}
            Some(Err(trouble)) => {
                let what = trouble.what.clone();
                add(
                    &mut found,
                    finding(trouble.refuses, [host.host.clone()], what, &trouble.remedy),
                );
            }
            Some(Ok(gpu)) => {
                if host.in_slurm && !gpu.shown {
                    let what = "Slurm gave this job no GPU (CUDA_VISIBLE_DEVICES is not set): the ranks would take what may be \
                                another job's";
                    let remedy = "ask for them (slurm: --gpus-per-node, panglot submit: gpus_per_node=)";
                    add(&mut found, finding(false, [host.host.clone()], what.to_owned(), remedy));
                }
                let ranks = ranks_on.entry((&host.host, &gpu.uuid)).or_default();
                ranks.push(*rank);
                if ranks.len() == 1 {
                    found.extend(in_use(host, gpu));
                }
            }
        }
    }
    for ((host, uuid), ranks) in ranks_on.iter().filter(|(_, ranks)| ranks.len() > 1) {
        let ranks: Vec<String> = ranks.iter().map(usize::to_string).collect();
        found.push(finding(
            true,
            [(*host).to_owned()],
            format!("ranks {} would share one GPU ({uuid})", ranks.join(", ")),
            "start one rank a GPU, and let each be shown its own or all of the node's (slurm: --gpus-per-node)",
        ));
    }
    found
}

fn in_use(host: &Host, gpu: &Gpu) -> Option<Finding> {
    if gpu.processes.is_empty() && gpu.used_bytes < LEAST_USE {
        return None;
    }
    let by: Vec<String> = gpu
        .processes
        .iter()
        .map(|process| format!("process {} ({})", process.id, process.name))
        .collect();
    let by = match &by[..] {
        [] => "a process that it does not show (another container's, or one that is half gone)".to_owned(),
        some => some.join(", "),
    };
    Some(finding(
        gpu.used_bytes >= LEAST_USE,
        [host.host.clone()],
        format!(
            "{} of GPU {} ({}) are taken by {by}",
            text::bytes(gpu.used_bytes),
            gpu.number,
            gpu.name
        ),
        "end what is left there, or exclude the host (exclude=HOST)",
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpus::{Process, Trouble};

    /// Two hosts with two ranks each, which have a GPU each; `spoil` makes something of it unsound.
    fn check(spoil: impl Fn(&mut BTreeMap<usize, Host>), expected: &[&str]) {
        let sound = |rank: usize| Host {
            rank,
            host: format!("n{}", rank / 2 + 1),
            gpu: Some(Ok(Gpu {
                number: (rank % 2).to_string(),
                uuid: format!("GPU-{rank}"),
                name: "H100".into(),
                used_bytes: 600 << 20,
                processes: vec![],
                shown: true,
            })),
            in_slurm: true,
            ..Host::default()
        };
        let mut hosts: BTreeMap<usize, Host> = (0..4).map(|rank| (rank, sound(rank))).collect();
        spoil(&mut hosts);
        let said: Vec<String> = findings(&hosts).iter().map(ToString::to_string).collect();
        assert_eq!(said, expected);
    }

    fn gpu(hosts: &mut BTreeMap<usize, Host>, rank: usize) -> &mut Gpu {
        hosts.get_mut(&rank).unwrap().gpu.as_mut().unwrap().as_mut().unwrap()
    }

    #[test]
    fn each_fault_is_one_line_with_its_host_and_the_remedy() {
        check(|_| {}, &[]);
        check(|hosts| hosts.values_mut().for_each(|host| host.gpu = None), &[]);
        let left = |bytes| {
            move |hosts: &mut BTreeMap<usize, Host>| {
                let (id, name) = ("711".into(), "python3".into());
                let gpu = gpu(hosts, 3);
                (gpu.used_bytes, gpu.processes) = (bytes, vec![Process { id, name }]);
            }
        };
        check(
            left(38 << 30),
            &[
                "refused: n2: 38.0 GiB of GPU 1 (H100) are taken by process 711 (python3); end what is left there, or exclude the host (exclude=HOST)",
            ],
        );
        check(
            left(30 << 20),
            &[
                "warning: n2: 30.0 MiB of GPU 1 (H100) are taken by process 711 (python3); end what is left there, or exclude the host (exclude=HOST)",
            ],
        );
        check(
            |hosts| gpu(hosts, 0).used_bytes = 2 << 30,
            &[
                "refused: n1: 2.0 GiB of GPU 0 (H100) are taken by a process that it does not show (another container's, or one \
               that is half gone); end what is left there, or exclude the host (exclude=HOST)",
            ],
        );
        check(
            |hosts| gpu(hosts, 1).uuid = "GPU-0".into(),
            &[
                "refused: n1: ranks 0, 1 would share one GPU (GPU-0); start one rank a GPU, and let each be shown its own or \
               all of the node's (slurm: --gpus-per-node)",
            ],
        );
        check(
            |hosts| (0..4).for_each(|rank| gpu(hosts, rank).shown = false),
            &[
                "warning: n1, n2: Slurm gave this job no GPU (CUDA_VISIBLE_DEVICES is not set): the ranks would take what may be \
               another job's; ask for them (slurm: --gpus-per-node, panglot submit: gpus_per_node=)",
            ],
        );
        let silent = |hosts: &mut BTreeMap<usize, Host>| {
            for rank in [0, 1] {
                hosts.get_mut(&rank).unwrap().gpu = Some(Err(Trouble {
                    refuses: true,
                    what: "nvidia-smi gave no answer in 6 s".into(),
                    remedy: "exclude the host".into(),
                }));
            }
        };
        check(
            silent,
            &["refused: n1: nvidia-smi gave no answer in 6 s; exclude the host"],
        );
    }
}
