//! Whether hosts reach each other: a small authenticated exchange between the first ranks of all hosts, with its time, the
//! other's clock and the speed of half a mebibyte.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use serde::{Deserialize, Serialize};

use super::host::{Host, unix_time};

const CONNECT: Duration = Duration::from_millis(1500);
const ANSWER: Duration = Duration::from_secs(3);
const BYTES: usize = 512 << 10;
const MOST_AT_ONCE: usize = 256;
/// With more hosts than this each tries those 1, 2, 4, … further on: everything is still reached from somewhere.
const MOST_PEERS: usize = 64;

/// One host's way to another.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Link {
    pub from: String,
    pub to: String,
    pub measured: Result<Measured, String>,
}

#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Measured {
    pub address: IpAddr,
    pub round_trip_seconds: f64,
    pub bytes_per_second: f64,
    /// The other's clock minus ours.
    pub clock_ahead_seconds: f64,
}

/// Where the others try us. What it answers is the time, and only to who has read the token.
pub struct Door {
    pub port: u16,
    pub token: String,
}

impl Door {
    pub fn open() -> anyhow::Result<Door> {
        let listener = TcpListener::bind(("0.0.0.0", 0)).context("no port can be opened")?;
        let port = listener.local_addr()?.port();
        let mut token = [0; 32];
        std::fs::File::open("/dev/urandom").and_then(|mut random| random.read_exact(&mut token))?;
        let busy = Arc::new(AtomicUsize::new(0));
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let busy = busy.clone();
                if busy.fetch_add(1, Ordering::Relaxed) < MOST_AT_ONCE {
                    std::thread::spawn(move || {
                        let _ = answer(stream, &token);
                        busy.fetch_sub(1, Ordering::Relaxed);
                    });
                } else {
                    busy.fetch_sub(1, Ordering::Relaxed);
                }
            }
        });
        Ok(Door {
            port,
            token: blake3::Hash::from_bytes(token).to_hex().to_string(),
        })
    }
}

/// nonce, MAC of it → MAC of the MAC, the time; then `BYTES` → one byte
fn answer(mut stream: TcpStream, token: &[u8; 32]) -> anyhow::Result<()> {
    stream.set_read_timeout(Some(ANSWER))?;
    stream.set_write_timeout(Some(ANSWER))?;
    let (mut nonce, mut shown) = ([0; 32], [0; 32]);
    stream.read_exact(&mut nonce)?;
    stream.read_exact(&mut shown)?;
    let expected = blake3::keyed_hash(token, &nonce);
    // Hashes compare in constant time.
    ensure!(expected == blake3::Hash::from_bytes(shown), "a stranger");
    let mut reply = blake3::keyed_hash(token, expected.as_bytes()).as_bytes().to_vec();
    reply.extend(unix_time().to_le_bytes());
    stream.write_all(&reply)?;
    stream.read_exact(&mut vec![0; BYTES])?;
    Ok(stream.write_all(&[1])?)
}

/// From this host to the others, by its first rank; all at once, then their speeds one after the other.
pub fn try_all(mine: &Host, hosts: &BTreeMap<usize, Host>) -> Vec<Link> {
    if mine.local_rank != 0 {
        return Vec::new();
    }
    let firsts: Vec<&Host> = hosts.values().filter(|host| host.local_rank == 0).collect();
    let n = firsts.len();
    let Some(here) = firsts.iter().position(|host| host.rank == mine.rank) else {
        return Vec::new();
    };
    let steps: Vec<usize> = match n {
        0..=MOST_PEERS => (1..n).collect(),
        _ => std::iter::successors(Some(1), |step| Some(step * 2))
            .take_while(|step| *step < n)
            .collect(),
    };
    let peers: Vec<&Host> = steps.iter().map(|step| firsts[(here + step) % n]).collect();
    std::thread::scope(|scope| {
        let tries: Vec<_> = peers.iter().map(|peer| scope.spawn(|| reach(peer))).collect();
        let results = tries
            .into_iter()
            .map(|tried| tried.join().unwrap_or_else(|_| Err("a bug".to_owned())));
        let link = |(peer, measured): (&&Host, _)| Link {
            from: mine.host.clone(),
            to: peer.host.clone(),
            measured,
        };
        peers.iter().zip(results).map(link).collect()
    })
}

/// The first of its addresses that answers and is it.
fn reach(peer: &Host) -> Result<Measured, String> {
    let outer = peer
        .addresses
        .iter()
        .filter(|address| !address.is_loopback() && address.is_ipv4());
    let mut why = "it has no address but its loopback's".to_owned();
    for address in outer {
        match measure(peer, *address) {
            Ok(measured) => return Ok(measured),
            Err(error) => why = format!("{address}: {error:#}"),
        }
    }
    Err(why)
}

fn measure(peer: &Host, address: IpAddr) -> anyhow::Result<Measured> {
    let token = *blake3::Hash::from_hex(&peer.token).context("its token")?.as_bytes();
    let mut stream = TcpStream::connect_timeout(&SocketAddr::new(address, peer.port), CONNECT)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(ANSWER))?;
    stream.set_write_timeout(Some(ANSWER))?;
    let nonce = *blake3::hash(format!("{:?} {}", stream.local_addr()?, unix_time()).as_bytes()).as_bytes();
    let shown = blake3::keyed_hash(&token, &nonce);
    let began = Instant::now();
    stream.write_all(&[nonce, *shown.as_bytes()].concat())?;
    let mut reply = [0; 40];
    stream.read_exact(&mut reply).context("no answer")?;
    let round_trip_seconds = began.elapsed().as_secs_f64();
    let now = unix_time();
    let (mac, time) = reply.split_at(32);
    if blake3::keyed_hash(&token, shown.as_bytes()).as_bytes() != mac {
        bail!("another program answers there");
    }
    let theirs = f64::from_le_bytes(time.try_into().context("8 bytes")?);
    let began = Instant::now();
    stream.write_all(&vec![0; BYTES])?;
    stream.read_exact(&mut [0])?;
    Ok(Measured {
        address,
        round_trip_seconds,
        bytes_per_second: BYTES as f64 / began.elapsed().as_secs_f64(),
        clock_ahead_seconds: theirs + round_trip_seconds / 2.0 - now,
    })
}
