//! Four ranks of SmolLM2 on one machine against PyTorch's DDP and FSDP over gloo: bytes, speed, memory, scaling; and two ranks
//! in network namespaces with a slow link between them: how much of the communication is hidden. Both sides in one run, in
//! turns, the same rows a rank, one thread a rank.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::thread;

use anyhow::{Context, Result, anyhow, bail, ensure};
use bench::training::{LINEARS, Panglot, Side, Sides, ensure_alike, grow, step_seconds};
use bench::{Entry, Report, Results, middle, number, run, script, text_of};
use clap::{Parser, Subcommand};
use launcher::worker::variables;
use serde_json::json;

/// SmolLM2's pieces.
const PIECES: usize = 49_152;
const RANKS: usize = 4;
/// Tokens of a rank in a step.
const TIME: usize = 256;
const F32_BYTES: f64 = 4.0;
/// Steps between two changes of the link's rate, and how often it is slow.
const TURN: usize = 4;
const TURNS: usize = 24;
/// Turns on the fast link before the first slow one; all but the first, in which memory is still new, say what a step takes.
const FAST_TURNS: usize = 3;

#[derive(Parser)]
#[command(about = "Measures sharded training side by side with what people run today")]
struct Arguments {
    #[command(subcommand)]
    agent: Option<Agent>,
    /// The Python that has `transformers` and `peft`.
    #[arg(long, env = "PANGLOT_PYTHON", default_value = ".panglot/venv/bin/python")]
    python: PathBuf,
    /// SmolLM2-135M, as `panglot prepare configs/demo.yaml` leaves it.
    #[arg(long, default_value = "runs/prepared/demo/base_model")]
    base: PathBuf,
    #[arg(long, default_value = "bench/results/sharding.json")]
    out: PathBuf,
    /// Measures only the cases whose names begin so. The other figures stay what they are in the
    /// results.
    #[arg(long, default_value = "")]
    only: String,
    #[arg(long, default_value_t = 2)]
    rounds: usize,
    /// Steps a round and side; the first warms up and does not count.
    #[arg(long, default_value_t = 6)]
    steps: usize,
}

#[derive(Subcommand)]
enum Agent {
    /// What mpirun starts its daemons by: runs words in the network namespace that has an address.
    Agent {
        address: String,
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        words: Vec<String>,
    },
}

type Case = fn(&Bench, &mut Results) -> Result<()>;

fn main() -> Result<ExitCode> {
    let arguments = Arguments::parse();
    if let Some(Agent::Agent { address, words }) = &arguments.agent {
        return agent(address, words);
    }
    let folder = tempfile::tempdir()?;
    let panglot = Panglot {
        folder: folder.path().to_path_buf(),
    };
    let bench = Bench {
        panglot,
        base: std::fs::canonicalize(&arguments.base).context("no base model; see --base")?,
        arguments,
    };
    let mut results = Results::open(&bench.arguments.out)?;
    let cases: [(&str, Case); 5] = [
        ("zero1", Bench::zero1),
        ("zero3", Bench::zero3),
        ("sparse", Bench::sparse),
        ("hidden", Bench::hidden),
        ("weak", Bench::weak),
    ];
    let only = &bench.arguments.only;
    let wanted: Vec<_> = cases.iter().filter(|(name, _)| name.starts_with(only)).collect();
    ensure!(
        !wanted.is_empty(),
        "--only {only} begins the name of no case: {}",
        cases.map(|(name, _)| name).join(", ")
    );
    for (_, case) in wanted {
        case(&bench, &mut results)?;
    }
    results.print();
    Ok(ExitCode::SUCCESS)
}

struct Bench {
    panglot: Panglot,
    base: PathBuf,
    arguments: Arguments,
}

impl Bench {
    /// ZeRO-1 against DDP, and its bytes against the least there are.
    fn zero1(&self, results: &mut Results) -> Result<()> {
        let overrides = self.prepare("prepared", &self.base, RANKS)?;
        let ranks = self.ranks(&overrides, RANKS)?;
        let (ours, peers) = self.beside("ddp", &overrides, &ranks)?;
        ensure_alike("zero1_vs_ddp", &ours, &peers.plain)?;
        let trained = peers.trained;
        results.put(
            Entry::of("zero1_vs_ddp", speed(&ours), speed(&peers.plain), "tokens/s")
                .peer_is("DDP over gloo, transformers + PEFT, SDPA, fused AdamW, the same rows; 4 ranks of one thread on both sides")
                .note(format!(
                    "f32, {trained} trained, {TIME} tokens a rank and step; the largest rank's peak resident memory {:.0} MB, the \
                     peer's {:.0} MB; {}",
                    ours.peak_bytes / 1e6,
                    peers.plain.peak_bytes / 1e6,
                    peers.sentence()
                )),
        )?;
        results.put(
            Entry::of("bytes_dense", ours.bytes_sent, least_bytes(trained, RANKS), "bytes").peer_is(
                "ZeRO's lower bound, 2Ψ(N − 1)/N f32 elements; a step and rank, the embedding tied to the head",
            ),
        )
    }

    /// ZeRO-3 with frozen weights divided against FSDP's `fully_shard`.
    fn zero3(&self, results: &mut Results) -> Result<()> {
        let mut overrides = self.prepare("prepared", &self.base, RANKS)?;
        overrides.extend(["train.zero=3", "train.shard_frozen=true"].map(String::from));
        let ranks = self.ranks(&overrides, RANKS)?;
        let (ours, peers) = self.beside("fsdp", &overrides, &ranks)?;
        ensure_alike("zero3_vs_fsdp", &ours, &peers.plain)?;
        results.put(
            Entry::of("zero3_vs_fsdp", speed(&ours), speed(&peers.plain), "tokens/s")
                .peer_is("fully_shard of every layer and the root over gloo; otherwise as zero1_vs_ddp")
                .note(peers.sentence()),
        )?;
        results.put(
            Entry::of(
                "peak_memory_vs_fsdp",
                ours.peak_bytes / 1e6,
                peers.plain.peak_bytes / 1e6,
                "MB",
            )
            .peer_is("the same processes' peak resident memory, loading included; the largest rank's"),
        )
    }

    /// Ours and the peer by turns; the peer as it starts, and with the settings that our workers start with.
    fn beside(&self, how: &str, overrides: &[String], ranks: &Ranks) -> Result<(Sides, Peers)> {
        let (mut ours, mut peers) = (Sides::default(), Peers::default());
        let with_ours = Ranks {
            settings: variables(Some(1)),
            ..ranks.clone()
        };
        for _ in 0..self.arguments.rounds {
            ours.add(self.panglot.train(&[], overrides)?);
            for (side, ranks) in [(&mut peers.plain, ranks), (&mut peers.set, &with_ours)] {
                let report = self.peers(how, ranks)?;
                peers.trained = number(&report, "trained");
                side.add(Side::of_training(&report));
            }
        }
        Ok((ours, peers))
    }

    /// The embedding apart from the head: its gradient travels as rows.
    fn sparse(&self, results: &mut Results) -> Result<()> {
        let apart = self.apart()?;
        let overrides = self.prepare("prepared-apart", &apart, RANKS)?;
        let side = self.panglot.train(&[], &overrides)?;
        let trained = self.trained(&apart)?;
        results.put(
            Entry::of("bytes_sparse", side.bytes_sent, least_bytes(trained, RANKS), "bytes").peer_is(
                "ZeRO's lower bound with whole gradients; a step and rank, the embedding apart from the head, ZeRO-1",
            ),
        )
    }

    /// Two ranks, a namespace each, and a link on which communication takes half as long as the step's computation. Ours is one
    /// run under which the link is slow and fast by turns, so that what else changes on this machine counts for both.
    fn hidden(&self, results: &mut Results) -> Result<()> {
        let link = Link::new(&self.arguments.python)?;
        let mut overrides = self.prepare("prepared", &self.base, link::RANKS)?;
        overrides.push(format!("train.steps={}", (FAST_TURNS + 2 * TURNS) * TURN));
        let bytes = least_bytes(self.trained(&self.base)?, link::RANKS);
        let (mut rate, mut turn) = (0.0, 0);
        // Steps that were over when the link was asked what it had carried, and the bytes.
        let mut carried: Vec<(usize, f64)> = Vec::new();
        let ours = self.panglot.train_seen(&link.mpirun()?, &overrides, |run| {
            // Nothing is parsed while steps are measured.
            let metrics = fs::read_to_string(run.join("metrics.jsonl")).unwrap_or_default();
            let now = metrics.lines().count() / TURN;
            if now > turn {
                turn = now;
                if turn == FAST_TURNS {
                    rate = bytes / (middle(step_seconds(run)[TURN..].to_vec()) / 2.0);
                }
                link.shape((turn >= FAST_TURNS && turn % 2 == FAST_TURNS % 2).then_some(rate))?;
                carried.push((metrics.lines().count(), link.carried()?));
            }
            Ok(())
        })?;
        // The run's first step is not among these. A turn's first saw the link change; the first turns found the rate.
        let of = |parity: usize| {
            let steps = (1..).zip(&ours.seconds).filter(|(step, _)| {
                let turn = step / TURN;
                turn >= FAST_TURNS && step % TURN > 0 && turn % 2 == parity
            });
            middle(steps.map(|(_, seconds)| *seconds).collect())
        };
        let bytes_sent = ours.bytes_sent;
        let carried = match &carried[..] {
            [first, .., last] => (last.1 - first.1) / (last.0 - first.0) as f64,
            _ => bail!("the run was over before the link was asked twice"),
        };
        ensure!(
            (carried / bytes_sent - 1.0).abs() < 0.05,
            "the link carried {carried:.0} bytes a step and rank, and {bytes_sent:.0} are counted"
        );
        let ours = [of(0), of(1)];

        let ranks = Ranks {
            on_link: true,
            ..self.ranks(&overrides, link::RANKS)?
        };
        let mut peers = [Sides::default(), Sides::default()];
        for _ in 0..self.arguments.rounds {
            for (side, rate) in peers.iter_mut().zip([None, Some(rate)]) {
                link.shape(rate)?;
                side.add(Side::of_training(&self.peers("ddp", &ranks)?));
            }
        }
        let peers = peers.map(|sides| sides.seconds());
        let hidden = |[free, shaped]: [f64; 2]| (1.0 - (shaped - free) / (bytes / rate)).max(0.0);
        let note = format!(
            "ZeRO-1, tied; {:.0} Mbit/s, so {:.2} s of communication a step; ours {:.2} s unshaped and {:.2} s shaped, medians of {} steps \
             each, {TURN} by turns in one run; the peer {:.2} and {:.2}; hidden = 1 − (shaped − unshaped) / (bytes / rate); the link carried \
             {:.1} MB a step and rank, of which {:.1} MB are counted",
            8.0 * rate / 1e6,
            bytes / rate,
            ours[0],
            ours[1],
            TURNS * (TURN - 1),
            peers[0],
            peers[1],
            carried / 1e6,
            bytes_sent / 1e6,
        );
        results.put(
            Entry::of("hidden_share", hidden(ours), hidden(peers), "share of communication")
                .peer_is("DDP over gloo on the same link")
                .note(note),
        )
    }

    /// Four ranks together against four runs of one rank at the same time: the cores are shared alike, so what is left is the
    /// cost of being many.
    fn weak(&self, results: &mut Results) -> Result<()> {
        let together = self.prepare("prepared", &self.base, RANKS)?;
        let alone = self.prepare("prepared", &self.base, 1)?;
        let ranks = self.ranks(&together, RANKS)?;
        let mut seconds = [Sides::default(), Sides::default(), Sides::default(), Sides::default()];
        for _ in 0..self.arguments.rounds {
            for side in self.panglot.train_at_once(RANKS, &alone)? {
                seconds[0].add(side);
            }
            seconds[1].add(self.panglot.train(&[], &together)?);
            for report in self.each_peer("alone", &ranks)? {
                seconds[2].add(Side::of_training(&report));
            }
            seconds[3].add(Side::of_training(&self.peers("ddp", &ranks)?));
        }
        let [alone, together, peers_alone, peers_together] = seconds.map(|sides| sides.seconds());
        let note = format!(
            "a step alone {alone:.2} s and together {together:.2} s, the peer {peers_alone:.2} and {peers_together:.2}"
        );
        results.put(
            Entry::of(
                "weak_scaling_4",
                alone / together,
                peers_alone / peers_together,
                "share of the speed alone",
            )
            .peer_is("DDP over gloo; four runs of one rank each, at once, against four ranks on the same two cores")
            .note(note),
        )
    }

    fn apart(&self) -> Result<PathBuf> {
        let folder = self.panglot.folder.join("apart");
        grow(&self.arguments.python, &self.base, &folder, PIECES)?;
        Ok(folder)
    }

    /// LoRA, embedding and head, f32, one row a rank.
    fn prepare(&self, prepared: &str, base: &Path, ranks: usize) -> Result<Vec<String>> {
        let mut overrides = self.panglot.overrides(prepared, base)?;
        overrides.extend([
            format!("train.steps={}", self.arguments.steps),
            format!("train.sequence_length={TIME}"),
            format!("train.rows_per_step={ranks}"),
            format!("launch.ranks={ranks}"),
        ]);
        let same = [
            "train.micro_rows=1",
            "train.full=[embed_tokens, lm_head]",
            "optimizer.lr_embeddings=1.0e-4",
            "launch.threads_per_rank=1",
        ];
        overrides.extend(same.map(String::from));
        self.panglot.prepare(&overrides)?;
        Ok(overrides)
    }

    /// The peer's side of our run of so many ranks.
    fn ranks(&self, overrides: &[String], world: usize) -> Result<Ranks> {
        Ok(Ranks {
            world,
            rows: self.panglot.rows(overrides, self.arguments.steps * world)?,
            on_link: false,
            settings: Vec::new(),
        })
    }

    /// Elements that train on such a base, as `panglot model inspect` counts them.
    fn trained(&self, base: &Path) -> Result<f64> {
        let worker = std::env::current_exe()?.with_file_name("panglot-worker");
        let output = Command::new(worker)
            .args(["inspect", "--model", text_of(base)?, "--full", "embed_tokens,lm_head"])
            .args(["--lora", &LINEARS.join(","), "--rank", "8"])
            .output()?;
        let said = String::from_utf8(output.stdout)?;
        let found = said.lines().find_map(|line| {
            let event: serde_json::Value = serde_json::from_str(line).ok()?;
            let trained = |kind: &serde_json::Value| {
                let number = |key: &str| kind[key].as_f64().unwrap_or(0.0);
                let full = if kind["group"].is_null() {
                    0.0
                } else {
                    number("elements")
                };
                full + number("lora") * number("tensors")
            };
            Some(event["result"]["kinds"].as_array()?.iter().map(trained).sum())
        });
        found.with_context(|| format!("panglot-worker inspect says nothing of what trains: {said}"))
    }

    /// Rank 0's report, with the largest rank's peak.
    fn peers(&self, how: &str, ranks: &Ranks) -> Result<Report> {
        let mut reports = self.each_peer(how, ranks)?;
        let peak = reports.iter().map(|report| report.peak_bytes).max();
        let mut report = reports.swap_remove(0);
        report.peak_bytes = peak.unwrap_or(0);
        Ok(report)
    }

    /// A process a rank, all at once.
    fn each_peer(&self, how: &str, ranks: &Ranks) -> Result<Vec<Report>> {
        let words = json!({ "how": how, "model": self.base, "rows_file": ranks.rows, "threads": 1, "lora": LINEARS });
        let words = words.to_string();
        let rank = |rank: usize| {
            let python = [text_of(&self.arguments.python)?];
            let prefix = if ranks.on_link { link::PREFIXES[rank] } else { &[] };
            let line = [prefix, &python].concat();
            let mut command = Command::new(line[0]);
            command.args(&line[1..]).arg(script("train_sharded.py")).arg(&words);
            command.envs([
                ("MASTER_ADDR", "127.0.0.1"),
                ("MASTER_PORT", "29617"),
                ("OMP_NUM_THREADS", "1"),
            ]);
            if ranks.on_link {
                command.envs(link::VARIABLES);
            }
            command.envs(ranks.settings.iter().map(|(name, value)| (name, value)));
            command
                .env("RANK", rank.to_string())
                .env("WORLD_SIZE", ranks.world.to_string());
            run(&mut command)
        };
        thread::scope(|scope| {
            let rank = &rank;
            let ranks: Vec<_> = (0..ranks.world).map(|index| scope.spawn(move || rank(index))).collect();
            let join = |rank: thread::ScopedJoinHandle<Result<Report>>| rank.join().map_err(|_| anyhow!("a panic"))?;
            ranks.into_iter().map(join).collect()
        })
    }
}

/// The peer's ranks: how many, what they read, whether each runs at its end of the slow link, and what their libraries are told.
#[derive(Clone)]
struct Ranks {
    world: usize,
    rows: PathBuf,
    on_link: bool,
    settings: Vec<(&'static str, String)>,
}

/// The peer.
#[derive(Default)]
struct Peers {
    /// As its users start it: what counts.
    plain: Sides,
    /// With the settings of glibc and OpenMP that our workers start with.
    set: Sides,
    trained: f64,
}

impl Peers {
    fn sentence(&self) -> String {
        format!(
            "the peer with our workers' settings of glibc and OpenMP: {:.0} tokens/s, {:.0} MB",
            speed(&self.set),
            self.set.peak_bytes / 1e6
        )
    }
}

/// Tokens a second of all ranks.
fn speed(sides: &Sides) -> f64 {
    (RANKS * TIME) as f64 / sides.seconds()
}

/// What a rank sends at least for so many trained elements in f32: a reduce-scatter and an all-gather.
fn least_bytes(trained: f64, ranks: usize) -> f64 {
    2.0 * trained * F32_BYTES * (ranks - 1) as f64 / ranks as f64
}

/// Two network namespaces with a veth pair between them; they go when this does.
struct Link;

mod link {
    pub const RANKS: usize = 2;
    pub const SPACES: [&str; RANKS] = ["panglot-a", "panglot-b"];
    pub const DEVICE: &str = "panglot0";
    pub const ADDRESSES: [&str; RANKS] = ["10.91.7.1", "10.91.7.2"];
    pub const NETWORK: &str = "10.91.7.0/24";
    /// Bytes; no more than a burst.
    pub const PACKET: &str = "250000";
    pub const BURST: &str = "512kb";
    /// A peer's rank runs behind its own.
    pub const PREFIXES: [&[&str]; RANKS] = [
        &["nsenter", "--net=/run/netns/panglot-a"],
        &["nsenter", "--net=/run/netns/panglot-b"],
    ];
    pub const VARIABLES: [(&str, &str); 2] = [("MASTER_ADDR", ADDRESSES[0]), ("GLOO_SOCKET_IFNAME", DEVICE)];
}

impl Link {
    fn new(python: &Path) -> Result<Link> {
        // What an earlier run that was killed has left.
        drop(Link);
        let [a, b] = link::SPACES;
        let made = [a, b].iter().try_for_each(|space| done("ip", &["netns", "add", space]));
        made.context("network namespaces want root and iproute2")?;
        let link = Link;
        let device = link::DEVICE;
        done(
            "ip",
            &[
                "link", "add", device, "netns", a, "type", "veth", "peer", "name", device, "netns", b,
            ],
        )?;
        for (end, (space, address)) in link::SPACES.iter().zip(link::ADDRESSES).enumerate() {
            done(
                "ip",
                &["-n", space, "addr", "add", &format!("{address}/24"), "dev", device],
            )?;
            done("ip", &["-n", space, "link", "set", "lo", "up"])?;
            done("ip", &["-n", space, "link", "set", device, "up"])?;
            // tbf sets a timer for every packet, on the cores that are to compute: with packets of 64 kB, which are the default, these
            // alone took 3 % of a step. A network card has its own.
            let large = script("large_packets.py");
            let python = [link::PREFIXES[end], &[text_of(python)?]].concat();
            done(
                python[0],
                &[&python[1..], &[text_of(&large)?, device, link::PACKET]].concat(),
            )?;
            // BBR takes a link that was fast a moment ago to have a round trip of microseconds, and paces by timers on the cores
            // that are to compute; most systems send as CUBIC does.
            let route = ["-n", space, "route", "replace", link::NETWORK, "dev", device];
            done("ip", &[&route[..], &["src", address, "congctl", "cubic"]].concat())?;
        }
        Ok(link)
    }

    /// Bytes a second each way; `None`: as fast as it goes.
    fn shape(&self, rate: Option<f64>) -> Result<()> {
        for space in link::SPACES {
            let tc = |words: &[&str]| done("tc", &[&["-n", space, "qdisc"], words].concat());
            match rate {
                Some(rate) => {
                    let rate = format!("{:.0}bit", 8.0 * rate);
                    let words = ["replace", "dev", link::DEVICE, "root", "tbf", "rate", &rate];
                    tc(&[&words[..], &["burst", link::BURST, "latency", "100ms"]].concat())?;
                }
                // There is none the first time.
                None => drop(tc(&["del", "dev", link::DEVICE, "root"])),
            }
        }
        Ok(())
    }

    /// Bytes that the end which sent more has sent since the link was made, headers and acknowledgements among them.
    fn carried(&self) -> Result<f64> {
        let of = |space: &&str| -> Result<f64> {
            let words = ["-n", space, "-s", "-j", "link", "show", "dev", link::DEVICE];
            let output = Command::new("ip").args(words).output().context("cannot run ip")?;
            let said: serde_json::Value = serde_json::from_slice(&output.stdout).context("ip said something else")?;
            said[0]["stats64"]["tx"]["bytes"].as_f64().context("ip counts no bytes")
        };
        let ends: Vec<f64> = link::SPACES.iter().map(of).collect::<Result<_>>()?;
        Ok(ends.into_iter().fold(0.0, f64::max))
    }

    /// What starts one rank in each.
    fn mpirun(&self) -> Result<Vec<String>> {
        let agent = format!("{} agent", text_of(&std::env::current_exe()?)?);
        let hosts = link::ADDRESSES.map(|address| format!("{address}:1")).join(",");
        let words = [
            &[
                link::PREFIXES[0],
                &["mpirun", "--quiet", "--bind-to", "none", "-n", "2", "--host", &hosts],
            ]
            .concat()[..],
            &["--mca", "plm_rsh_agent", &agent, "--mca", "btl", "tcp,self"],
            &[
                "--mca",
                "btl_tcp_if_include",
                link::NETWORK,
                "--mca",
                "oob_tcp_if_include",
                link::NETWORK,
            ],
        ];
        Ok(words.concat().into_iter().map(String::from).collect())
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        for space in link::SPACES {
            // One that is not there needs no removal.
            let _ = done("ip", &["netns", "del", space]);
        }
    }
}

fn done(program: &str, words: &[&str]) -> Result<()> {
    let output = Command::new(program).args(words).output();
    let output = output.with_context(|| format!("cannot run {program}"))?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{program} {} failed: {said}", words.join(" "));
    Ok(())
}

/// As `ssh` would: mpirun hands over the words of a command line.
fn agent(address: &str, words: &[String]) -> Result<ExitCode> {
    let Some(index) = link::ADDRESSES.iter().position(|known| known == &address) else {
        bail!("{address} is no end of the link");
    };
    // A name of its own each, so that MPI takes them for two machines.
    let line = format!("hostname {}; exec {}", link::SPACES[index], words.join(" "));
    let prefix = link::PREFIXES[index];
    let status = Command::new(prefix[0])
        .args(&prefix[1..])
        .args(["unshare", "--uts", "sh", "-c", &line])
        .status()?;
    Ok(status
        .code()
        .and_then(|code| u8::try_from(code).ok())
        .map_or(ExitCode::FAILURE, ExitCode::from))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_on_sharding_shows_what_was_measured() {
        let repository = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let page = fs::read_to_string(repository.join("docs/sharding.md")).unwrap();
        let results = fs::read_to_string(repository.join("bench/results/sharding.json")).unwrap();
        let results: Vec<serde_json::Value> = serde_json::from_str(&results).unwrap();
        let of = |name: &str| {
            let entry = results.iter().find(|entry| entry["name"] == name).unwrap();
            ["ours", "peer"].map(|side| entry[side].as_f64().unwrap())
        };
        let line = |name: &str| -> String {
            let [ours, peer] = of(name);
            let (mb, gb) = ([ours / 1e6, peer / 1e6], [ours / 1e3, peer / 1e3]);
            match name {
                "bytes_dense" => format!(
                    "| {:.1} MB | {:.1} MB, the lower bound 2Ψ(N − 1)/N | {:.4} of it |",
                    mb[0],
                    mb[1],
                    ours / peer
                ),
                "bytes_sparse" => format!(
                    "| {:.1} MB | {:.1} MB, the lower bound with whole gradients | {:.2} of it |",
                    mb[0],
                    mb[1],
                    ours / peer
                ),
                "peak_memory_vs_fsdp" => format!("| {:.2} GB | {:.2} GB | {:.2} × less |", gb[0], gb[1], peer / ours),
                "hidden_share" => format!("| {:.1} % | DDP: {:.0} % | |", 100.0 * ours, 100.0 * peer),
                "weak_scaling_4" => format!("| {ours:.2} | DDP: {peer:.2} | |"),
                _ => format!("| {ours:.0} tokens/s | {peer:.0} tokens/s | {:.2} × |", ours / peer),
            }
        };
        for entry in &results {
            let name = entry["name"].as_str().unwrap();
            let expected = line(name);
            assert!(
                page.lines().any(|line| line.ends_with(&expected)),
                "docs/sharding.md has no line that ends in {expected:?} ({name})"
            );
        }
    }
}
