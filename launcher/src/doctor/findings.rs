//! From what all hosts told to sentences: what is wrong, where, and what to do. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::Path;

use serde::Serialize;

use super::{Host, Link, gpus};
use crate::rendezvous::sameness::printable;
use crate::text;

/// Of checkpoints, metrics and logs at the least; a run of billions of parameters needs far more, as `panglot plan` says.
const LEAST_FREE: u64 = 1 << 30;
/// Open MPI and NCCL exchange between ranks of a host through files there.
const LEAST_SHM: u64 = 64 << 20;
const LEAST_OPEN_FILES: u64 = 1024;
/// Between hosts' clocks, before logs and time-outs mislead.
const MOST_CLOCK_SECONDS: f64 = 2.0;
const MOST_WRITE_SECONDS: f64 = 2.0;
/// A host whose ways are so many times slower than the others' slows every collective to its own pace.
const SLOW: f64 = 4.0;

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// A run here would fail or go wrong; what does not refuse is a warning.
    pub refuses: bool,
    pub hosts: Vec<String>,
    pub what: String,
    pub remedy: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = if self.refuses { "refused" } else { "warning" };
        let hosts: Vec<String> = self.hosts.iter().map(|host| printable(host)).collect();
        write!(
            f,
            "{kind}: {}: {}; {}",
            hosts.join(", "),
            printable(&self.what),
            self.remedy
        )
    }
}

/// What rank 0 has in hand.
pub struct Seen<'a> {
    pub world: usize,
    /// The host of each rank, as the launcher placed them; empty where nobody told.
    pub placed: Vec<String>,
    pub hosts: &'a BTreeMap<usize, Host>,
    pub links: &'a BTreeMap<usize, Vec<Link>>,
    pub folder: &'a Path,
    pub on_gpus: bool,
}

/// What refuses first.
pub fn findings(seen: &Seen) -> Vec<Finding> {
    let mut found: Vec<Finding> = missing(seen).into_iter().collect();
    found.extend(different(seen));
    found.extend(wiring(seen));
    found.extend(of_each_host(seen));
    found.extend(gpus::findings(seen.hosts));
    found.extend(unreached(seen));
    found.extend(clocks_and_speeds(seen));
    found.sort_by_key(|finding| !finding.refuses);
    found
}

pub fn finding(refuses: bool, hosts: impl IntoIterator<Item = String>, what: String, remedy: &str) -> Finding {
    let hosts: BTreeSet<String> = hosts.into_iter().collect();
    Finding {
        refuses,
        hosts: hosts.into_iter().collect(),
        what,
        remedy: remedy.to_owned(),
    }
}

/// Hosts of which the same is true share a line.
pub fn add(found: &mut Vec<Finding>, new: Finding) {
    let same =
        |other: &&mut Finding| (other.refuses, &other.what, &other.remedy) == (new.refuses, &new.what, &new.remedy);
    match found.iter_mut().find(same) {
        Some(other) => {
            let others: Vec<String> = new
                .hosts
                .into_iter()
                .filter(|host| !other.hosts.contains(host))
                .collect();
            other.hosts.extend(others);
        }
        None => found.push(new),
    }
}

/// Ranks whose report has not appeared.
fn missing(seen: &Seen) -> Option<Finding> {
    let silent: Vec<usize> = (0..seen.world).filter(|rank| !seen.hosts.contains_key(rank)).collect();
    if silent.is_empty() {
        return None;
    }
    let host = |rank: &usize| {
        seen.placed
            .get(*rank)
            .cloned()
            .unwrap_or_else(|| format!("the host of rank {rank}"))
    };
    let ranks: Vec<String> = silent.iter().map(usize::to_string).collect();
    Some(finding(
        true,
        silent.iter().map(host),
        format!(
            "no report of rank {} appears in {}",
            ranks.join(", "),
            seen.folder.display()
        ),
        "mount the same folder there, writable; lines of that host above say more",
    ))
}

/// Builds and configs: those who differ from the most are accused.
fn different(seen: &Seen) -> Vec<Finding> {
    let mut found = vec![];
    let names: BTreeSet<&String> = seen
        .hosts
        .values()
        .flat_map(|host| &host.runs)
        .map(|(name, _)| name)
        .collect();
    for name in names {
        let mut kinds: BTreeMap<&str, Vec<&Host>> = BTreeMap::new();
        for host in seen.hosts.values() {
            let which = host
                .runs
                .iter()
                .find(|(known, _)| known == name)
                .map_or("none", |(_, which)| which);
            kinds.entry(which).or_default().push(host);
        }
        let mut kinds: Vec<(&str, Vec<&Host>)> = kinds.into_iter().collect();
        // Of two alike, rank 0's is taken for the right one.
        kinds.sort_by_key(|(_, hosts)| (std::cmp::Reverse(hosts.len()), hosts[0].rank));
        let most = kinds[0].0;
        let remedy = match name.as_str() {
            "config" => "give every rank the same config and settings, from the shared folder",
            _ => "install the same build everywhere: one folder, one container",
        };
        for (which, hosts) in &kinds[1..] {
            let what = format!("{name} is {which}, elsewhere {most}");
            found.push(finding(true, hosts.iter().map(|host| host.host.clone()), what, remedy));
        }
    }
    found
}

fn wiring(seen: &Seen) -> Option<Finding> {
    let unwired: Vec<&Host> = seen.hosts.values().filter(|host| !host.wired_for_mpi).collect();
    (seen.world > 1 && !seen.on_gpus && !unwired.is_empty()).then(|| {
        finding(
            true,
            unwired.iter().map(|host| host.host.clone()),
            format!(
                "{} were started, but MPI would see {} runs of one rank each",
                text::counted(seen.world, "rank"),
                seen.world
            ),
            "start them by `srun --mpi=pmix` (`srun --mpi=list` shows what this Slurm has), or by one mpirun",
        )
    })
}

/// What a host's own report shows.
fn of_each_host(seen: &Seen) -> Vec<Finding> {
    let several = seen
        .hosts
        .values()
        .map(|host| &host.host)
        .collect::<BTreeSet<_>>()
        .len()
        > 1;
    let mut found: Vec<Finding> = vec![];
    let mut say = |refuses: bool, host: &Host, what: String, remedy: &str| {
        add(&mut found, finding(refuses, [host.host.clone()], what, remedy));
    };
    let folder = seen.folder.display();
    for host in seen.hosts.values() {
        if host.free_bytes < LEAST_FREE {
            let what = format!("only {} are free for {folder}", text::bytes(host.free_bytes));
            say(
                true,
                host,
                what,
                "free space or quota there, or set another folders.run",
            );
        }
        if host.write_seconds > MOST_WRITE_SECONDS {
            let what = format!("writing and syncing 4 KiB in {folder} took {:.1} s", host.write_seconds);
            say(
                false,
                host,
                what,
                "ask whether that file system is ill, or set another folders.run",
            );
        }
        if host.shm_free_bytes < LEAST_SHM {
            let what = format!("/dev/shm has {} free", text::bytes(host.shm_free_bytes));
            say(
                true,
                host,
                what,
                "remove what is left there, or give it 64 MiB and more (containers: --shm-size)",
            );
        }
        if host.open_files < LEAST_OPEN_FILES {
            let what = format!("a process may open {} files", host.open_files);
            say(
                true,
                host,
                what,
                "put `ulimit -n 4096` before srun, or raise the limit of slurmd there",
            );
        }
        if !host.leftovers.is_empty() {
            let what = format!(
                "ranks of an earlier run are still there (process {})",
                host.leftovers.join(", ")
            );
            say(seen.on_gpus, host, what, "end them, or exclude the host (exclude=HOST)");
        }
        if several && host.resolves_to.iter().any(|address| address.is_loopback()) {
            let what = format!("its own name resolves to {}", host.resolves_to[0]);
            say(
                false,
                host,
                what,
                "take that line out of its /etc/hosts; libraries would tell peers that address",
            );
        }
        if several && host.addresses.iter().all(|address| address.is_loopback()) {
            say(
                true,
                host,
                "it has no network but its loopback".to_owned(),
                "bring its interface up, or exclude the host",
            );
        }
        // A rank that has CPUs of its own may see no others.
        let (ranks, cores) = match host.cpus_of_rank {
            Some(cpus) => (1, cpus.min(host.cores)),
            None => (host.local_world, host.cores),
        };
        let wanted = host.threads_per_rank.unwrap_or(1) * ranks;
        if wanted > cores {
            let what = format!(
                "{wanted} threads ({}) share {cores} cores",
                text::counted(ranks, "rank")
            );
            say(
                false,
                host,
                what,
                "ask for more with cpus_per_rank=, or start fewer ranks a node",
            );
        }
    }
    found
}

fn unreached(seen: &Seen) -> Vec<Finding> {
    let mut broken: BTreeMap<&str, Vec<&Link>> = BTreeMap::new();
    for link in seen.links.values().flatten().filter(|link| link.measured.is_err()) {
        broken.entry(&link.to).or_default().push(link);
    }
    // A host that reaches nobody is itself at fault: those it fails to reach are not.
    let tried = |from: &str| seen.links.values().flatten().filter(|link| link.from == from).count();
    let failed = |from: &str| broken.values().flatten().filter(|link| link.from == from).count();
    let is_cut_off = |host: &str| tried(host) > 1 && failed(host) == tried(host);
    let mut found = vec![];
    for (to, links) in &broken {
        let fair: Vec<&&Link> = links
            .iter()
            .filter(|link| !is_cut_off(&link.from) || is_cut_off(to))
            .collect();
        let Some(first) = fair.first() else { continue };
        let from: BTreeSet<&str> = fair.iter().map(|link| link.from.as_str()).collect();
        let from: Vec<&str> = from.into_iter().collect();
        let why = first.measured.as_ref().err().map_or("", String::as_str);
        let what = format!("not reached from {} ({why})", from.join(", "));
        let remedy =
            "open the ports between compute nodes, look at its cable and routes, or exclude the host (exclude=HOST)";
        found.push(finding(true, [(*to).to_owned()], what, remedy));
    }
    found
}

fn clocks_and_speeds(seen: &Seen) -> Vec<Finding> {
    let mut found = vec![];
    let measured = || {
        seen.links
            .values()
            .flatten()
            .filter_map(|link| Some((link, link.measured.as_ref().ok()?)))
    };
    let first = seen.hosts.get(&0).map_or("", |host| &host.host);
    for (link, measured) in measured().filter(|(link, _)| link.from == first) {
        let ahead = measured.clock_ahead_seconds;
        if ahead.abs() > MOST_CLOCK_SECONDS {
            let side = if ahead > 0.0 { "ahead of" } else { "behind" };
            let what = format!("its clock is {:.1} s {side} {first}'s", ahead.abs());
            found.push(finding(
                false,
                [link.to.clone()],
                what,
                "start its time service (chrony, ntpd)",
            ));
        }
    }
    // Each host by the median of its ways in, or out where that is less: a slow one spoils its peers' slowest, not their medians.
    let names: BTreeSet<&str> = measured()
        .flat_map(|(link, _)| [link.from.as_str(), link.to.as_str()])
        .collect();
    let speed_of = |name: &str| {
        let side = |end: fn(&Link) -> &str| -> Vec<f64> {
            let own = measured().filter(|(link, _)| end(link) == name);
            own.map(|(_, measured)| measured.bytes_per_second).collect()
        };
        let sides = [side(|link| &link.from), side(|link| &link.to)];
        sides
            .into_iter()
            .filter(|side| !side.is_empty())
            .map(median)
            .fold(f64::INFINITY, f64::min)
    };
    let speeds: Vec<(&str, f64)> = names.iter().map(|name| (*name, speed_of(name))).collect();
    let typical = median(speeds.iter().map(|(_, speed)| *speed).collect());
    for (name, speed) in speeds
        .iter()
        .filter(|(_, speed)| speeds.len() > 2 && speed * SLOW < typical)
    {
        let what = format!(
            "its network gives {}/s where the others have {}/s",
            text::bytes(*speed as u64),
            text::bytes(typical as u64)
        );
        let remedy = "every step waits for it: look at its interface and cable, or exclude the host (exclude=HOST)";
        found.push(finding(false, [(*name).to_owned()], what, remedy));
    }
    found
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(0.0)
}

#[cfg(test)]
mod tests {
    use super::super::reach::Measured;
    use super::*;

    const FAST: f64 = 1e9;

    /// Four sound hosts, and links between all of them; `spoil` makes something of it unsound.
    fn check(spoil: impl Fn(&mut BTreeMap<usize, Host>, &mut BTreeMap<usize, Vec<Link>>), expected: &[&str]) {
        let mut hosts: BTreeMap<usize, Host> = (0..4).map(|rank| (rank, sound(rank))).collect();
        let mut links: BTreeMap<usize, Vec<Link>> = (0..4).map(|rank| (rank, ways(rank))).collect();
        spoil(&mut hosts, &mut links);
        let placed = (1..=4).map(|n| format!("n{n}")).collect();
        let seen = Seen {
            world: 4,
            placed,
            hosts: &hosts,
            links: &links,
            folder: Path::new("runs/a"),
            on_gpus: false,
        };
        let said: Vec<String> = findings(&seen).iter().map(ToString::to_string).collect();
        assert_eq!(said.len(), expected.len(), "{said:?}");
        for (said, expected) in said.iter().zip(expected) {
            assert!(said.contains(expected), "{said}\nlacks {expected}");
        }
    }

    fn sound(rank: usize) -> Host {
        Host {
            rank,
            local_world: 1,
            host: format!("n{}", rank + 1),
            runs: vec![
                ("config".to_owned(), "c".to_owned()),
                ("panglot".to_owned(), "b".to_owned()),
            ],
            addresses: vec![[10, 0, 0, rank as u8 + 1].into()],
            free_bytes: 1 << 40,
            shm_free_bytes: 1 << 30,
            open_files: 4096,
            cores: 2,
            wired_for_mpi: true,
            ..Host::default()
        }
    }

    fn ways(rank: usize) -> Vec<Link> {
        let measured = Measured {
            address: [10, 0, 0, 1].into(),
            round_trip_seconds: 1e-4,
            bytes_per_second: FAST,
            clock_ahead_seconds: 0.01,
        };
        let to = (0..4).filter(|other| *other != rank);
        to.map(|to| Link {
            from: format!("n{}", rank + 1),
            to: format!("n{}", to + 1),
            measured: Ok(measured),
        })
        .collect()
    }

    fn spoil_links(links: &mut BTreeMap<usize, Vec<Link>>, host: &str, spoil: impl Fn(&mut Result<Measured, String>)) {
        for link in links
            .values_mut()
            .flatten()
            .filter(|link| link.from == host || link.to == host)
        {
            spoil(&mut link.measured);
        }
    }

    #[test]
    fn four_sound_hosts_have_no_findings() {
        check(|_, _| {}, &[]);
    }

    #[test]
    fn each_fault_is_one_line_with_its_host_and_the_remedy() {
        check(
            |hosts, links| drop((hosts.remove(&3), links.remove(&3))),
            &["refused: n4: no report of rank 3 appears in runs/a; mount"],
        );
        check(
            |hosts, _| hosts.get_mut(&1).unwrap().runs[1].1 = "x".into(),
            &["refused: n2: panglot is x, elsewhere b; install"],
        );
        check(
            |hosts, _| hosts.get_mut(&2).unwrap().runs[0].1 = "x".into(),
            &["refused: n3: config is x, elsewhere c; give"],
        );
        check(
            |hosts, _| hosts.get_mut(&2).unwrap().free_bytes = 5 << 20,
            &["refused: n3: only 5.0 MiB are free for runs/a; free"],
        );
        check(
            |hosts, _| hosts.get_mut(&0).unwrap().shm_free_bytes = 0,
            &["refused: n1: /dev/shm has 0 B free; remove"],
        );
        check(
            |hosts, _| hosts.get_mut(&3).unwrap().open_files = 64,
            &["refused: n4: a process may open 64 files; put `ulimit"],
        );
        check(
            |hosts, _| hosts.get_mut(&3).unwrap().leftovers.push("711".into()),
            &["warning: n4: ranks of an earlier run are still there (process 711); end"],
        );
        check(
            |hosts, _| hosts.get_mut(&1).unwrap().resolves_to.push([127, 0, 1, 1].into()),
            &["warning: n2: its own name resolves to 127.0.1.1; take"],
        );
        check(
            |hosts, _| hosts.values_mut().for_each(|host| host.wired_for_mpi = false),
            &["refused: n1, n2, n3, n4: 4 ranks were started, but MPI would see 4 runs"],
        );
        check(
            |hosts, _| hosts.get_mut(&1).unwrap().local_world = 3,
            &["warning: n2: 3 threads (3 ranks) share 2 cores; ask"],
        );
        check(
            |hosts, _| {
                let host = hosts.get_mut(&1).unwrap();
                (host.local_world, host.cpus_of_rank) = (3, Some(2));
            },
            &[],
        );
        check(
            |hosts, _| {
                let host = hosts.get_mut(&1).unwrap();
                (host.threads_per_rank, host.cpus_of_rank) = (Some(4), Some(2));
            },
            &["warning: n2: 4 threads (1 rank) share 2 cores; ask"],
        );
    }

    #[test]
    fn who_is_cut_off_is_named_and_not_those_it_cannot_reach() {
        check(
            |_, links| spoil_links(links, "n3", |way| *way = Err("timed out".into())),
            &["refused: n3: not reached from n1, n2, n4 (timed out); open"],
        );
        // One way between two hosts: the one that is not reached is named.
        check(
            |_, links| links.get_mut(&0).unwrap()[0].measured = Err("refused".into()),
            &["refused: n2: not reached from n1 (refused)"],
        );
    }

    #[test]
    fn a_slow_link_and_a_wrong_clock_are_named() {
        let slow = |way: &mut Result<Measured, String>| way.as_mut().unwrap().bytes_per_second = FAST / 100.0;
        check(
            |_, links| spoil_links(links, "n2", slow),
            &["warning: n2: its network gives 9.5 MiB/s where the others have 953.7 MiB/s; every"],
        );
        let ahead = |way: &mut Result<Measured, String>| way.as_mut().unwrap().clock_ahead_seconds = 90.0;
        check(
            |_, links| spoil_links(links, "n4", ahead),
            &["warning: n4: its clock is 90.0 s ahead of n1's; start"],
        );
    }

    #[test]
    fn a_hostile_host_is_shown_harmlessly() {
        check(
            |hosts, _| {
                let host = hosts.get_mut(&1).unwrap();
                (host.host, host.open_files) = ("n2\u{1b}[2J$(reboot)".into(), 3);
            },
            &["refused: n2?[2J$(reboot): a process may open 3 files"],
        );
    }
}
