//! A checkpoint's manifest and the names of its files: pure data. The manifest ends with a digest of itself.

use std::collections::{BTreeSet, VecDeque};

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};

use super::{Best, Identity};

pub const FORMAT: u32 = 2;
pub const MANIFEST: &str = "manifest.json";
/// A larger one is none of ours: looked at before memory is allocated.
pub const MOST_MANIFEST_BYTES: u64 = 256 << 20;
/// Files are digested in pieces of this size, so that they can be verified by several threads, and damage be found in place.
pub const CHUNK_BYTES: u64 = 16 << 20;
/// θ, m and v: 12 bytes for every element that trains.
pub const STATE: [&str; 3] = ["theta", "m", "v"];
pub const STATE_BYTES: u64 = 4 * STATE.len() as u64;

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    pub format: u32,
    /// The nonce of the attempt that wrote it.
    pub attempt: String,
    /// Steps taken; the next step's number.
    pub step: u64,
    /// The first row that has not been trained on.
    pub next_row: u64,
    /// Updates made: steps less the skipped ones.
    pub updates: u64,
    pub targets_so_far: u64,
    /// What rows, dropout and first values follow from.
    pub seed: u64,
    /// What steps are compared with.
    pub guard: GuardState,
    /// Of the run's checkpoints up to this one, where held-out text was measured.
    #[serde(default)]
    pub best: Option<Best>,
    pub world: usize,
    /// ZeRO's stage.
    pub zero: u8,
    pub unix_time: f64,
    pub identity: Identity,
    /// blake3 of the identity's plan, to compare by eye.
    pub config_hash: String,
    /// The layout's description: bucket, parameter, shape and group a line.
    pub layout: String,
    /// What there is of each bucket: the tensors `NAME.theta`, `NAME.m` and `NAME.v`, cut over the files.
    pub tensors: Vec<TensorEntry>,
    pub chunk_bytes: u64,
    pub files: Vec<FileEntry>,
}

/// A bucket: flat, f32.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TensorEntry {
    pub name: String,
    /// Elements, padding not counted.
    pub elements: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileEntry {
    pub name: String,
    pub bytes: u64,
    /// blake3 of the chunks' digests, one after the other.
    pub blake3: String,
    /// blake3 of every `chunk_bytes` of the file.
    pub chunks: Vec<String>,
    /// Which elements of each bucket lie here, from and to; as many as there are buckets.
    pub ranges: Vec<(u64, u64)>,
}

/// The numbers that steps are compared with, oldest first: bits, so that a checkpoint gives back exactly what it was given.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuardState {
    pub losses: VecDeque<u64>,
    pub norms: VecDeque<u64>,
    pub skips_in_a_row: u32,
}

/// Stands before the manifest's own digest; nothing but the digest and [`SEAL_END`] follows.
const SEAL: &str = "\n  \"blake3_of_all_above\": \"";
const SEAL_END: &str = "\"\n}\n";

impl Manifest {
    /// Of files and manifest, bytes.
    pub fn bytes(&self) -> u64 {
        let sizes = self.files.iter().map(|file| file.bytes);
        sizes.fold(0, u64::saturating_add)
    }

    /// The file's text. Its digest is of bytes and not of values: numbers need not survive a reader to be checked.
    pub fn seal(&self) -> Result<Vec<u8>> {
        let text = serde_json::to_string_pretty(self)?;
        let open = text.strip_suffix("\n}").context("a manifest is an object")?;
        let covered = format!("{open},{SEAL}");
        let digest = blake3::hash(covered.as_bytes());
        Ok(format!("{covered}{}{SEAL_END}", digest.to_hex()).into_bytes())
    }

    /// Reads what [`Manifest::seal`] wrote.
    ///
    /// # Errors
    /// When a byte of it has changed, or it is no manifest of this format, or names files it should not.
    pub fn unseal(text: &[u8]) -> Result<Manifest> {
        let damaged = "does not match its own digest";
        let covered = text.len().checked_sub(64 + SEAL_END.len()).context(damaged)?;
        let (covered, seal) = text.split_at(covered);
        let format = || serde_json::from_slice::<Format>(text).ok().map(|it| it.format);
        let matches = covered.ends_with(SEAL.as_bytes())
            && seal.ends_with(SEAL_END.as_bytes())
            && seal.starts_with(blake3::hash(covered).to_hex().as_bytes());
        match format() {
            Some(format) if format != FORMAT => bail!(
                "has format {format}, this build reads {FORMAT}; go on with the build that wrote it, or start a new run"
            ),
            _ => ensure!(matches, damaged),
        }
        let manifest: Manifest = serde_json::from_slice(text)?;
        manifest.check()?;
        Ok(manifest)
    }

    /// What must hold of any manifest, whoever wrote it.
    fn check(&self) -> Result<()> {
        ensure!(self.chunk_bytes > 0, "has chunks of no bytes");
        let mut names = BTreeSet::new();
        for file in &self.files {
            let name = &file.name;
            ensure!(
                is_plain_name(name) && name != MANIFEST,
                "{name:?} is not a plain file name"
            );
            ensure!(names.insert(name), "names {name} twice");
            ensure!(
                file.chunks.len() as u64 == file.bytes.div_ceil(self.chunk_bytes),
                "gives {} digests for the {} bytes of {name}",
                file.chunks.len(),
                file.bytes
            );
            ensure!(
                file.ranges.len() == self.tensors.len(),
                "gives {} ranges of {name}, there are {} tensors",
                file.ranges.len(),
                self.tensors.len()
            );
        }
        for (index, tensor) in self.tensors.iter().enumerate() {
            let mut ranges: Vec<_> = self.files.iter().map(|file| file.ranges[index]).collect();
            ranges.retain(|(start, end)| start < end);
            ranges.sort_unstable();
            let mut next = 0;
            for (start, end) in ranges {
                ensure!(
                    start == next,
                    "has elements {next} to {start} of {} nowhere or twice",
                    tensor.name
                );
                next = end;
            }
            ensure!(
                next == tensor.elements,
                "has {next} of the {} elements of {}",
                tensor.elements,
                tensor.name
            );
        }
        Ok(())
    }
}

/// For the fuzz target: no bytes make it panic, also those of somebody who can compute a digest, and what is accepted names
/// plain files that hold every element once.
pub fn fuzz(bytes: &[u8]) {
    let accepted = |manifest: &Manifest| {
        assert!(manifest.files.iter().all(|file| is_plain_name(&file.name)));
        for (index, tensor) in manifest.tensors.iter().enumerate() {
            let lengths = manifest.files.iter().map(|file| file.ranges[index]);
            let held: u64 = lengths.map(|(start, end)| end.saturating_sub(start)).sum();
            assert_eq!(held, tensor.elements);
        }
    };
    if let Ok(manifest) = Manifest::unseal(bytes) {
        accepted(&manifest);
    }
    let resealed = serde_json::from_slice::<Manifest>(bytes).map(|manifest| manifest.seal());
    if let Ok(Ok(text)) = resealed
        && let Ok(manifest) = Manifest::unseal(&text)
    {
        accepted(&manifest);
    }
}

#[derive(Deserialize)]
struct Format {
    format: u32,
}

/// blake3 of chunks' digests, as [`FileEntry::blake3`].
pub fn digest_of_chunks(chunks: &[blake3::Hash]) -> blake3::Hash {
    let mut hasher = blake3::Hasher::new();
    for chunk in chunks {
        hasher.update(chunk.as_bytes());
    }
    hasher.finalize()
}

/// What a checkpoint of so many trained elements takes, but for headers of a few KB a file.
pub fn planned_bytes(elements: u64) -> u64 {
    STATE_BYTES * elements
}

pub fn step_name(step: u64) -> String {
    format!("step-{step:08}")
}

/// The step of a whole checkpoint's folder.
pub fn step_of(name: &str) -> Option<u64> {
    let digits = name.strip_prefix("step-")?;
    let plain = digits.len() >= 8 && digits.bytes().all(|byte| byte.is_ascii_digit());
    digits.parse().ok().filter(|step| plain && step_name(*step) == name)
}

/// The folder in which try number `number` of an attempt writes.
pub fn partial_name(step: u64, attempt: &str, number: u64) -> String {
    format!("{}.{attempt}-{number}.partial", step_name(step))
}

pub fn slice_file(slice: usize, n_slices: usize) -> String {
    format!("slice-{slice:05}-of-{n_slices:05}.safetensors")
}

fn is_plain_name(name: &str) -> bool {
    !name.is_empty() && !name.starts_with('.') && !name.contains(['/', '\\', '\0'])
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Of two files; its digests are made up.
    pub fn example() -> Manifest {
        let plan = crate::checkpoint::identity::tests::plan();
        let file = |slice: u64| FileEntry {
            name: slice_file(slice as usize, 2),
            bytes: 100,
            blake3: blake3::hash(b"chunks").to_hex().to_string(),
            chunks: vec![blake3::hash(b"file").to_hex().to_string()],
            ranges: vec![(4 * slice, 4 + 3 * slice)],
        };
        Manifest {
            format: FORMAT,
            attempt: "00".into(),
            step: 20,
            next_row: 240,
            updates: 20,
            targets_so_far: 1000,
            seed: 1,
            guard: GuardState::default(),
            best: Some(Best {
                step: 15,
                macro_bits_per_byte: 0.1 + 0.7,
            }),
            world: 2,
            zero: 1,
            unix_time: 0.1 + 0.2,
            identity: Identity {
                plan,
                base_model: "a".into(),
                vocabulary: "b".into(),
                tokens: "c".into(),
            },
            config_hash: "d".into(),
            layout: "head w [7] 0\n".into(),
            tensors: vec![TensorEntry {
                name: "head".into(),
                elements: 7,
            }],
            chunk_bytes: CHUNK_BYTES,
            files: vec![file(0), file(1)],
        }
    }

    #[test]
    fn a_manifest_survives_its_seal_and_is_json() {
        let text = example().seal().unwrap();
        assert_eq!(Manifest::unseal(&text).unwrap(), example());
        serde_json::from_slice::<serde_json::Value>(&text).unwrap();
    }

    #[test]
    fn every_flipped_bit_and_every_truncation_is_noticed() {
        let text = example().seal().unwrap();
        for at in 0..text.len() {
            let mut flipped = text.clone();
            flipped[at] ^= 1 << (at % 8);
            assert!(Manifest::unseal(&flipped).is_err(), "byte {at}");
            assert!(Manifest::unseal(&text[..at]).is_err(), "{at} bytes");
        }
        assert!(Manifest::unseal(&[&text[..], b" "].concat()).is_err());
    }

    #[test]
    fn what_no_run_writes_is_refused_even_with_a_right_digest() {
        let refused = |change: fn(&mut Manifest)| {
            let mut manifest = example();
            change(&mut manifest);
            Manifest::unseal(&manifest.seal().unwrap()).unwrap_err().to_string()
        };
        for name in ["../x", "a/b", "", ".hidden", "a\0b", "a\\b", MANIFEST] {
            let mut manifest = example();
            manifest.files[0].name = name.into();
            assert!(Manifest::unseal(&manifest.seal().unwrap()).is_err(), "{name:?}");
        }
        assert!(refused(|it| it.files[1].name = it.files[0].name.clone()).contains("twice"));
        assert!(refused(|it| it.files[1].ranges[0] = (5, 7)).contains("elements 4 to 5 of head nowhere"));
        assert!(refused(|it| drop(it.files.pop())).contains("has 4 of the 7 elements of head"));
        assert!(refused(|it| it.files[0].bytes = u64::MAX).contains("digests for the"));
        assert!(refused(|it| it.format = 9).contains("has format 9, this build reads"));
        assert!(refused(|it| it.files[0].ranges.clear()).contains("0 ranges"));
    }

    #[test]
    fn only_whole_checkpoints_have_their_name() {
        assert_eq!(step_of(&step_name(20)), Some(20));
        assert_eq!(step_of(&step_name(1_234_567_890)), Some(1_234_567_890));
        for name in [
            partial_name(20, "ab", 0),
            "step-20".into(),
            "step-00000020.old".into(),
            "step-+0000020".into(),
            "step-0000000020".into(),
        ] {
            assert_eq!(step_of(&name), None, "{name}");
        }
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_are_refused_quietly(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
            prop_assert!(Manifest::unseal(&bytes).is_err());
        }
    }
}
