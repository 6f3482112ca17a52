//! Process 1 of a Slurm cluster on one machine: a login node and compute nodes, each with its own network, host name and
//! /dev/shm, joined by a bridge. Started by fixture.rs inside fresh namespaces, so that the kernel takes all of it down with it.
//!
//!   test-cluster cluster FOLDER NODE…     the login node: munge, slurmctld, the bridge; starts the others
//!   test-cluster node FOLDER NAME ADDR    one compute node: slurmd, started again when it ends
//!   test-cluster take-ports FIRST LAST    on a node: new connections get these ports only, and of four three are taken
//!   test-cluster knock ADDRESS COUNT      a stranger: says garbage to it on so many connections, and how many were opened

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;

/// The login node's address on the bridge; node k has 10.77.0.k.
const LOGIN: &str = "10.77.0.254";
const CPUS: usize = 2;
/// Of each node, as far as Slurm knows.
const GPUS: usize = 2;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().collect();
    let words: Vec<&str> = arguments[1..].iter().map(String::as_str).collect();
    let done = match words[..] {
        ["cluster", folder, ref nodes @ ..] => cluster(Path::new(folder), nodes),
        ["node", folder, name, address] => node(Path::new(folder), name, address),
        ["take-ports", first, last] => take_ports(first, last),
        ["knock", address, count] => knock(address, count),
        _ => Err(anyhow::anyhow!("see the head of tests/cluster/keeper.rs")),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("test-cluster: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Brings everything up, says `up` and the nodes' process numbers on standard output, and lives until its standard input ends.
fn cluster(folder: &Path, nodes: &[&str]) -> Result<()> {
    die_with_standard_input(folder);
    for name in ["etc", "state", "tmp"] {
        std::fs::create_dir_all(folder.join(name))?;
    }
    write_configuration(folder, nodes)?;
    must("hostname", &["login"])?;
    for (own, place) in [("etc", "/etc/slurm"), ("hosts", "/etc/hosts")] {
        must("mount", &["--bind", path(&folder.join(own)), place])?;
    }
    bridge()?;
    let socket = folder.join("munge.socket");
    let munge = |option: &str, name: &str| format!("--{option}={}", folder.join(name).display());
    let munged = Command::new("munged")
        .args(["--foreground", "--force", &format!("--socket={}", socket.display())])
        .args([munge("key-file", "munge.key"), munge("pid-file", "munge.pid")])
        .args([munge("log-file", "munge.log"), munge("seed-file", "munge.seed")])
        .stdin(Stdio::null())
        .spawn()
        .context("munged")?;
    wait_for(&socket)?;
    let mut numbers = vec![];
    for (i, name) in nodes.iter().enumerate() {
        numbers.push(format!("{name}={}", start_node(folder, name, i + 1)?));
    }
    let slurmctld = Command::new("slurmctld").arg("-D").stdin(Stdio::null()).spawn();
    slurmctld.context("slurmctld")?;
    println!("up {} munged={}", numbers.join(" "), munged.id());
    std::io::stdout().flush()?;
    reap_for_ever()
}

/// Whoever started us holds the other end of this pipe, and may end in whatever way. With process 1 gone the kernel ends every
/// process of the cluster, and with the last of them its networks and mounts are gone; its folder goes before.
fn die_with_standard_input(folder: &Path) {
    let folder = folder.to_owned();
    std::thread::spawn(move || {
        let _ = std::io::stdin().read_to_end(&mut Vec::new());
        // Everybody but this process: who writes into the folder now would keep it from going.
        let _ = kill(Pid::from_raw(-1), Signal::SIGKILL);
        for _ in 0..20 {
            if std::fs::remove_dir_all(&folder).is_ok() || !folder.exists() {
                break;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        std::process::exit(0);
    });
}

/// Daemons and their steps leave orphans, and orphans come to process 1.
fn reap_for_ever() -> ! {
    loop {
        match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            Ok(status) if status.pid().is_some() => {}
            Ok(_) | Err(Errno::ECHILD | Errno::EINTR) => std::thread::sleep(Duration::from_millis(50)),
            Err(error) => panic!("waiting for children: {error}"),
        }
    }
}

fn bridge() -> Result<()> {
    must("ip", &["link", "set", "lo", "up"])?;
    must("ip", &["link", "add", "br0", "type", "bridge"])?;
    must("ip", &["address", "add", &format!("{LOGIN}/24"), "dev", "br0"])?;
    must("ip", &["link", "set", "br0", "up"])
}

/// A node begins in namespaces of its own and waits there for its cable.
fn start_node(folder: &Path, name: &str, number: usize) -> Result<u32> {
    let mut node = Command::new("unshare")
        .args(["--net", "--uts", "--mount", "--ipc", "--"])
        .arg(std::env::current_exe()?)
        .args(["node", path(folder), name, &format!("10.77.0.{number}")])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .context("unshare")?;
    // unshare becomes the node, so this is the node's number.
    let (id, cable) = (node.id().to_string(), format!("to-{name}"));
    expect(&mut node, "ready")?;
    must(
        "ip",
        &[
            "link", "add", &cable, "type", "veth", "peer", "name", "eth0", "netns", &id,
        ],
    )?;
    must("ip", &["link", "set", &cable, "master", "br0", "up"])?;
    writeln!(node.stdin.take().context("piped")?, "go")?;
    Ok(node.id())
}

fn expect(child: &mut Child, word: &str) -> Result<()> {
    let mut line = String::new();
    BufReader::new(child.stdout.take().context("piped")?).read_line(&mut line)?;
    ensure!(line.trim() == word, "a node said {line:?} where {word:?} was due");
    Ok(())
}

fn node(folder: &Path, name: &str, address: &str) -> Result<()> {
    println!("ready");
    std::io::stdout().flush()?;
    std::io::stdin().read_line(&mut String::new())?;
    must("hostname", &[name])?;
    must("ip", &["link", "set", "lo", "up"])?;
    must("ip", &["address", "add", &format!("{address}/24"), "dev", "eth0"])?;
    must("ip", &["link", "set", "eth0", "up"])?;
    must("mount", &["-t", "tmpfs", "-o", "size=1g,mode=1777", "shm", "/dev/shm"])?;
    std::fs::create_dir_all(folder.join("tmp").join(name))?;
    loop {
        let slurmd = Command::new("slurmd")
            .args(["-D", "-N", name])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .status();
        slurmd.context("slurmd")?;
        std::thread::sleep(Duration::from_millis(200));
    }
}

fn write_configuration(folder: &Path, nodes: &[&str]) -> Result<()> {
    let at = folder.display();
    let mut conf = format!(
        "ClusterName=test\n\
         SlurmctldHost=login({LOGIN})\n\
         SlurmUser=root\n\
         AuthType=auth/munge\n\
         # A requeued job is held for as long as its old credential is valid: 120 s would be Slurm's own choice.\n\
         AuthInfo=socket={at}/munge.socket,cred_expire=10\n\
         StateSaveLocation={at}/state\n\
         SlurmdSpoolDir={at}/spool_%n\n\
         TmpFS={at}/tmp/%n\n\
         SlurmctldPidFile={at}/slurmctld.pid\n\
         SlurmdPidFile={at}/slurmd_%n.pid\n\
         SlurmctldLogFile={at}/slurmctld.log\n\
         SlurmdLogFile={at}/slurmd_%n.log\n\
         ProctrackType=proctrack/linuxproc\n\
         TaskPlugin=task/none\n\
         SelectType=select/cons_tres\n\
         SelectTypeParameters=CR_CPU\n\
         GresTypes=gpu\n\
         MpiDefault=pmix\n\
         SlurmdTimeout=6\n\
         KillWait=3\n\
         MessageTimeout=5\n\
         InactiveLimit=0\n\
         ReturnToService=2\n\
         SlurmdParameters=config_overrides\n\
         SchedulerParameters=sched_interval=1,sched_min_interval=100000,bf_interval=1\n"
    );
    let mut hosts = format!("127.0.0.1 localhost\n{LOGIN} login\n");
    for (i, name) in nodes.iter().enumerate() {
        let address = format!("10.77.0.{}", i + 1);
        conf += &format!(
            "NodeName={name} NodeAddr={address} NodeHostname={name} CPUs={CPUS} Gres=gpu:{GPUS} State=UNKNOWN\n"
        );
        hosts += &format!("{address} {name}\n");
    }
    conf += "PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP\n";
    // Where jobs share CPUs: 50 of them on one node at once.
    conf += &format!(
        "PartitionName=crowd Nodes={} OverSubscribe=FORCE:25 MaxTime=INFINITE State=UP\n",
        nodes[0]
    );
    std::fs::write(folder.join("etc/slurm.conf"), conf)?;
    // Slurm wants a device to each and does not look into it.
    for gpu in 0..GPUS {
        std::os::unix::fs::symlink("/dev/null", folder.join(format!("gpu{gpu}")))?;
    }
    std::fs::write(
        folder.join("etc/gres.conf"),
        format!("Name=gpu File={at}/gpu[0-{}]\n", GPUS - 1),
    )?;
    std::fs::write(folder.join("hosts"), hosts)?;
    // Not a secret: nobody outside this machine's test ever meets it.
    std::fs::write(folder.join("munge.key"), [7; 128])?;
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(folder.join("munge.key"), std::fs::Permissions::from_mode(0o600))?;
    Ok(())
}

/// Holds them until it is killed.
fn take_ports(first: &str, last: &str) -> Result<()> {
    std::fs::write("/proc/sys/net/ipv4/ip_local_port_range", format!("{first} {last}"))?;
    let (first, last): (u16, u16) = (first.parse()?, last.parse()?);
    let wanted = (first..=last).filter(|port| port % 4 != 0);
    let held: Vec<TcpListener> = wanted
        .filter_map(|port| TcpListener::bind(("0.0.0.0", port)).ok())
        .collect();
    println!("holds {}", held.len());
    std::io::stdout().flush()?;
    loop {
        std::thread::park();
    }
}

fn knock(address: &str, count: &str) -> Result<()> {
    let address = address.parse()?;
    let connect = |_| {
        let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(1)).ok()?;
        let _ = stream.write_all(&[7; 512]);
        Some(stream)
    };
    let opened: Vec<TcpStream> = (0..count.parse::<usize>()?).filter_map(connect).collect();
    println!("{}", opened.len());
    Ok(())
}

fn wait_for(file: &Path) -> Result<()> {
    for _ in 0..200 {
        if file.exists() {
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(25));
    }
    bail!("{} did not appear in 5 s", file.display())
}

fn must(program: &str, arguments: &[&str]) -> Result<()> {
    let status = Command::new(program).args(arguments).stdin(Stdio::null()).status();
    let status = status.with_context(|| program.to_owned())?;
    ensure!(
        status.success(),
        "{program} {} ended with {status}",
        arguments.join(" ")
    );
    Ok(())
}

fn path(path: &Path) -> &str {
    path.to_str().expect("a test's folder is plain text")
}
