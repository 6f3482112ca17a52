//! What travels between rank 0 and the others: a mutual proof that both know the job's secret, then frames that carry a proof
//! each. BLAKE3 with a key is the message authentication code; its comparison takes the same time wherever two differ.
//!
//! ```text
//! member → hub   magic (8) · rank (4) · nonce (32)
//! hub → member   nonce (32) · proof (32)           proof = MAC(secret; role, job, attempt, world, rank, both nonces)
//! member → hub   proof (32)                        as above, with the other role
//! then           length (4) · proof (32) · message   proof = MAC(session; role, number of the frame, message)
//! ```
//!
//! Nonces are fresh on both sides, so nothing that was heard once proves anything again; a frame's number and role make
//! frames that are repeated, left out or sent back worthless. Nothing of a stranger's is read but these fixed lengths.

use std::io;

use serde::{Deserialize, Serialize};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};

use super::sameness::Report;
use super::secret::{Secret, random};
use crate::pulse::State;

/// Of a message; checked before memory is taken for it.
pub const MOST_BYTES: usize = 1 << 20;

const MAGIC: [u8; 8] = *b"PANGLOT1";
const PROOF: usize = 32;
const NONCE: usize = 32;
const HELLO: usize = MAGIC.len() + 4 + NONCE;

#[derive(Debug, thiserror::Error)]
pub enum WireError {
    #[error("the connection broke: {0}")]
    Broken(#[from] io::Error),
    #[error("the other side does not speak this version of the rendezvous")]
    Magic,
    #[error("the other side does not know this job's secret, or belongs to another attempt of it")]
    Stranger,
    #[error("a frame of {0} bytes; the most is {MOST_BYTES}")]
    TooLong(usize),
    #[error("a message that cannot be read")]
    Unreadable,
}

type Result<T> = std::result::Result<T, WireError>;

/// Which attempt of which job a connection belongs to; part of every proof.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attempt {
    pub job: String,
    pub nonce: [u8; 16],
    pub world: usize,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Message {
    /// Member → hub, the first: what it runs.
    Report(Report),
    /// Hub → members: all are there and alike.
    Welcome,
    /// Hub → members: the job cannot start or go on; leave with this code.
    Stop { code: i32, text: String },
    /// Both ways: a sign of life.
    Beat(State),
    /// Hub → members: anything, such as NCCL's unique id.
    #[serde(skip)]
    Bytes(Vec<u8>),
    /// Member → hub: it has failed by itself, and ends.
    Failed { code: i32, text: String },
    /// Both ways: it ends well.
    Bye,
}

const JSON: u8 = 0;
const BYTES: u8 = 1;

impl Message {
    fn encode(&self) -> Vec<u8> {
        match self {
            Message::Bytes(bytes) => [&[BYTES], &bytes[..]].concat(),
            other => [&[JSON][..], &serde_json::to_vec(other).expect("plain data")].concat(),
        }
    }

    pub fn decode(bytes: &[u8]) -> Result<Message> {
        match bytes.split_first() {
            Some((&BYTES, rest)) => Ok(Message::Bytes(rest.to_vec())),
            Some((&JSON, rest)) => serde_json::from_slice(rest).map_err(|_| WireError::Unreadable),
            _ => Err(WireError::Unreadable),
        }
    }
}

#[derive(Clone, Copy)]
enum Role {
    Hub = 1,
    Member = 2,
}

/// Proofs of one direction of a connection, one after the other.
pub struct Seal {
    key: [u8; 32],
    role: Role,
    number: u64,
}

impl Seal {
    fn new(session: [u8; 32], role: Role) -> Seal {
        Seal {
            key: session,
            role,
            number: 0,
        }
    }

    fn proof(&mut self, message: &[u8]) -> blake3::Hash {
        let mut mac = blake3::Hasher::new_keyed(&self.key);
        mac.update(&[self.role as u8])
            .update(&self.number.to_le_bytes())
            .update(message);
        self.number += 1;
        mac.finalize()
    }

    pub fn close(&mut self, message: &Message) -> Result<Vec<u8>> {
        let message = message.encode();
        if message.len() > MOST_BYTES {
            return Err(WireError::TooLong(message.len()));
        }
        let proof = self.proof(&message);
        Ok([&(message.len() as u32).to_le_bytes()[..], proof.as_bytes(), &message].concat())
    }

    /// `frame`: what follows the length.
    pub fn open(&mut self, frame: &[u8]) -> Result<Message> {
        let Some((proof, message)) = frame.split_first_chunk::<PROOF>() else {
            return Err(WireError::Unreadable);
        };
        if self.proof(message) != blake3::Hash::from_bytes(*proof) {
            return Err(WireError::Stranger);
        }
        Message::decode(message)
    }
}

/// The length that a frame announces, with its proof; refused before anything is read or allocated.
pub fn frame_length(announced: [u8; 4]) -> Result<usize> {
    match u32::from_le_bytes(announced) as usize {
        length if length <= MOST_BYTES => Ok(length + PROOF),
        length => Err(WireError::TooLong(length)),
    }
}

/// One direction of a connection whose other end has proved itself.
pub struct Sender {
    stream: OwnedWriteHalf,
    seal: Seal,
}

impl Sender {
    pub async fn send(&mut self, message: &Message) -> Result<()> {
        let frame = self.seal.close(message)?;
        Ok(self.stream.write_all(&frame).await?)
    }

    /// After the last message: the other side reads it, then the end.
    pub async fn shut(&mut self) {
        let _ = self.stream.shutdown().await;
    }
}

pub struct Receiver {
    stream: OwnedReadHalf,
    seal: Seal,
}

impl Receiver {
    pub async fn receive(&mut self) -> Result<Message> {
        let mut announced = [0; 4];
        self.stream.read_exact(&mut announced).await?;
        let mut frame = vec![0; frame_length(announced)?];
        self.stream.read_exact(&mut frame).await?;
        self.seal.open(&frame)
    }
}

/// The hub's side of a new connection: who it is, once proved.
pub async fn receive_member(
    mut stream: TcpStream,
    secret: &Secret,
    attempt: &Attempt,
) -> Result<(usize, Sender, Receiver)> {
    let mut hello = [0; HELLO];
    stream.read_exact(&mut hello).await?;
    let (rank, theirs) = read_hello(&hello)?;
    let ours = random()?;
    let proofs = Proofs {
        secret,
        attempt,
        rank,
        member: theirs,
        hub: ours,
    };
    stream
        .write_all(&[&ours[..], proofs.of(Role::Hub).as_bytes()].concat())
        .await?;
    let mut answer = [0; PROOF];
    stream.read_exact(&mut answer).await?;
    if proofs.of(Role::Member) != blake3::Hash::from_bytes(answer) {
        return Err(WireError::Stranger);
    }
    let (sender, receiver) = proofs.session(stream, Role::Hub);
    Ok((rank as usize, sender, receiver))
}

/// A member's side.
pub async fn approach_hub(
    mut stream: TcpStream,
    secret: &Secret,
    attempt: &Attempt,
    rank: usize,
) -> Result<(Sender, Receiver)> {
    let ours: [u8; NONCE] = random()?;
    let rank = rank as u32;
    stream
        .write_all(&[&MAGIC[..], &rank.to_le_bytes(), &ours].concat())
        .await?;
    let (mut theirs, mut proof) = ([0; NONCE], [0; PROOF]);
    stream.read_exact(&mut theirs).await?;
    stream.read_exact(&mut proof).await?;
    let proofs = Proofs {
        secret,
        attempt,
        rank,
        member: ours,
        hub: theirs,
    };
    if proofs.of(Role::Hub) != blake3::Hash::from_bytes(proof) {
        return Err(WireError::Stranger);
    }
    stream.write_all(proofs.of(Role::Member).as_bytes()).await?;
    Ok(proofs.session(stream, Role::Member))
}

fn read_hello(hello: &[u8; HELLO]) -> Result<(u32, [u8; NONCE])> {
    let (magic, rest) = hello.split_at(MAGIC.len());
    if magic != MAGIC {
        return Err(WireError::Magic);
    }
    let (rank, nonce) = rest.split_at(4);
    Ok((
        u32::from_le_bytes(rank.try_into().expect("4 bytes")),
        nonce.try_into().expect("the rest is the nonce"),
    ))
}

/// What both sides prove, and what the session's key is made of.
struct Proofs<'a> {
    secret: &'a Secret,
    attempt: &'a Attempt,
    rank: u32,
    member: [u8; NONCE],
    hub: [u8; NONCE],
}

impl Proofs<'_> {
    fn of(&self, role: Role) -> blake3::Hash {
        self.mac(b"panglot rendezvous 1: who is there", role as u8)
    }

    fn mac(&self, purpose: &[u8], role: u8) -> blake3::Hash {
        let Attempt { job, nonce, world } = self.attempt;
        let mut mac = blake3::Hasher::new_keyed(self.secret.bytes());
        // Lengths before what varies: no two contents read alike.
        mac.update(&(purpose.len() as u64).to_le_bytes())
            .update(purpose)
            .update(&[role]);
        mac.update(&(job.len() as u64).to_le_bytes())
            .update(job.as_bytes())
            .update(nonce);
        mac.update(&(*world as u64).to_le_bytes())
            .update(&self.rank.to_le_bytes());
        mac.update(&self.member).update(&self.hub);
        mac.finalize()
    }

    fn session(&self, stream: TcpStream, role: Role) -> (Sender, Receiver) {
        let key = *self.mac(b"panglot rendezvous 1: frames", 0).as_bytes();
        let (read, write) = stream.into_split();
        let theirs = match role {
            Role::Hub => Role::Member,
            Role::Member => Role::Hub,
        };
        let sender = Sender {
            stream: write,
            seal: Seal::new(key, role),
        };
        let receiver = Receiver {
            stream: read,
            seal: Seal::new(key, theirs),
        };
        (sender, receiver)
    }
}

/// Entry point for fuzzing: bytes as a hello, as frames of an unknown key, and as a message whose proof was right. They may be
/// refused, never panic, and never ask for more memory than a frame may have.
pub fn fuzz(bytes: &[u8]) {
    if let Some(hello) = bytes.first_chunk() {
        let _ = read_hello(hello);
    }
    let mut rest = bytes;
    while let Some((announced, after)) = rest.split_first_chunk() {
        let Ok(length) = frame_length(*announced) else { break };
        assert!(length <= MOST_BYTES + PROOF);
        let Some(frame) = after.get(..length) else { break };
        let opened = Seal::new([7; 32], Role::Hub).open(frame);
        assert!(opened.is_err(), "nobody who lacks the key can prove anything");
        rest = &after[length..];
    }
    if let Ok(message) = Message::decode(bytes) {
        let mut there = Seal::new([7; 32], Role::Hub);
        if let Ok(frame) = there.close(&message) {
            let again = Seal::new([7; 32], Role::Hub)
                .open(&frame[4..])
                .expect("what was sealed is opened");
            assert_eq!(again.encode(), message.encode());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_is_opened_once_in_its_place_and_by_the_other_side() {
        let seal = |role| Seal::new([1; 32], role);
        let (mut hub, mut member) = (seal(Role::Hub), seal(Role::Hub));
        let frames = [Message::Welcome, Message::Bytes(vec![0, 1, 255])].map(|message| hub.close(&message).unwrap());
        let open = |seal: &mut Seal, frame: &[u8]| seal.open(&frame[4..]);
        assert_eq!(open(&mut member, &frames[0]).unwrap(), Message::Welcome);
        // Again; out of order; back to its sender; of another session; changed.
        assert!(matches!(open(&mut member, &frames[0]), Err(WireError::Stranger)));
        assert!(matches!(
            open(&mut seal(Role::Hub), &frames[1]),
            Err(WireError::Stranger)
        ));
        assert!(matches!(
            open(&mut seal(Role::Member), &frames[0]),
            Err(WireError::Stranger)
        ));
        assert!(open(&mut Seal::new([2; 32], Role::Hub), &frames[0]).is_err());
        for at in 4..frames[0].len() {
            let mut changed = frames[0].clone();
            changed[at] ^= 1;
            assert!(open(&mut seal(Role::Hub), &changed).is_err(), "byte {at}");
        }
    }

    #[test]
    fn what_is_too_long_is_refused_before_it_is_read() {
        assert!(frame_length([0xff; 4]).is_err());
        assert_eq!(
            frame_length((MOST_BYTES as u32).to_le_bytes()).unwrap(),
            MOST_BYTES + PROOF
        );
        let long = Message::Bytes(vec![0; MOST_BYTES]);
        assert!(matches!(
            Seal::new([1; 32], Role::Hub).close(&long),
            Err(WireError::TooLong(_))
        ));
    }
}
