//! Megatron's indexed format, byte for byte: `.bin` holds token ids end to end, `.idx` says where each sequence lies.
//! The one door to memory mapping; a damaged index is an error here and never a read outside the file.
//!
//! `.idx`, little-endian: magic, u64 version, u8 token type, u64 sequences, u64 document boundaries,
//! i32 size of each sequence in tokens, i64 offset of each in `.bin` in bytes, i64 document boundaries in sequences.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};

use memmap2::Mmap;
use serde::{Deserialize, Serialize};

use crate::{Error, Result};

const MAGIC: &[u8; 9] = b"MMIDIDX\x00\x00";
const VERSION: u64 = 1;
const HEADER_BYTES: u64 = 9 + 8 + 1 + 8 + 8;

/// How wide a token id is on disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TokenType {
    Uint16,
    Int32,
}

impl TokenType {
    /// The narrowest type for ids below `vocabulary_size`.
    pub fn for_size(vocabulary_size: usize) -> TokenType {
        if vocabulary_size <= usize::from(u16::MAX) {
            TokenType::Uint16
        } else {
            TokenType::Int32
        }
    }

    /// Bytes a token takes in `.bin`.
    pub fn width(self) -> u64 {
        match self {
            TokenType::Uint16 => 2,
            TokenType::Int32 => 4,
        }
    }

    /// Megatron's number for it.
    fn code(self) -> u8 {
        match self {
            TokenType::Uint16 => 8,
            TokenType::Int32 => 4,
        }
    }
}

/// Writes sequences one after the other, a document each.
pub(crate) struct IndexedWriter {
    bin: BufWriter<File>,
    bin_path: PathBuf,
    idx_path: PathBuf,
    token_type: TokenType,
    sizes: Vec<i32>,
    digest: blake3::Hasher,
}

impl IndexedWriter {
    /// Starts `PREFIX.bin` and, at the end, `PREFIX.idx`.
    pub fn create(prefix: &Path, token_type: TokenType) -> Result<Self> {
        let (bin_path, idx_path) = paths(prefix);
        let bin = BufWriter::new(File::create(&bin_path).map_err(Error::io("create", &bin_path))?);
        Ok(IndexedWriter {
            bin,
            bin_path,
            idx_path,
            token_type,
            sizes: Vec::new(),
            digest: blake3::Hasher::new(),
        })
    }

    pub fn write_document(&mut self, tokens: &[u32]) -> Result<()> {
        let bytes: Vec<u8> = match self.token_type {
            TokenType::Uint16 => tokens.iter().flat_map(|id| (*id as u16).to_le_bytes()).collect(),
            TokenType::Int32 => tokens.iter().flat_map(|id| id.to_le_bytes()).collect(),
        };
        let reason = || {
            format!(
                "a document has {} tokens, more than the format can say; split it",
                tokens.len()
            )
        };
        let size = i32::try_from(tokens.len()).map_err(|_| Error::BadShards {
            path: self.bin_path.clone(),
            reason: reason(),
        })?;
        self.sizes.push(size);
        self.digest.update(&bytes);
        self.bin.write_all(&bytes).map_err(Error::io("write", &self.bin_path))
    }

    /// Writes the index, syncs both files and returns their digest.
    pub fn finish(mut self) -> Result<String> {
        let n_sequences = self.sizes.len() as u64;
        let mut idx = Vec::with_capacity(idx_bytes(n_sequences, n_sequences + 1) as usize);
        idx.extend_from_slice(MAGIC);
        idx.extend_from_slice(&VERSION.to_le_bytes());
        idx.push(self.token_type.code());
        idx.extend_from_slice(&n_sequences.to_le_bytes());
        idx.extend_from_slice(&(n_sequences + 1).to_le_bytes());
        self.sizes
            .iter()
            .for_each(|size| idx.extend_from_slice(&size.to_le_bytes()));
        let mut pointer = 0i64;
        for size in &self.sizes {
            idx.extend_from_slice(&pointer.to_le_bytes());
            pointer += i64::from(*size) * self.token_type.width() as i64;
        }
        (0..=n_sequences as i64).for_each(|document| idx.extend_from_slice(&document.to_le_bytes()));

        self.digest.update(&idx);
        crate::finished::write_synced(&self.idx_path, &idx)?;
        self.bin
            .flush()
            .and_then(|()| self.bin.get_ref().sync_all())
            .map_err(Error::io("sync", &self.bin_path))?;
        Ok(self.digest.finalize().to_hex().to_string())
    }
}

/// A mapped pair of `.bin` and `.idx`.
pub(crate) struct Indexed {
    bin: Mapped,
    idx: Mapped,
    token_type: TokenType,
    n_sequences: u64,
    n_documents: u64,
}

impl Indexed {
    /// Maps `PREFIX.bin` and `PREFIX.idx` and checks everything that can be checked without reading all of them.
    pub fn open(prefix: &Path) -> Result<Indexed> {
        let (bin_path, idx_path) = paths(prefix);
        let (bin, idx) = (Mapped::open(&bin_path)?, Mapped::open(&idx_path)?);
        let bad = |reason: String| Error::BadShards {
            path: idx_path.clone(),
            reason,
        };
        if idx.len() < HEADER_BYTES {
            return Err(bad(format!(
                "{} bytes are too few for the header of {HEADER_BYTES}: the file is truncated",
                idx.len()
            )));
        }
        if idx.bytes()[..9] != *MAGIC {
            return Err(bad(
                "the file does not begin with MMIDIDX: it is not a Megatron index".into()
            ));
        }
        if idx.u64_at(9) != VERSION {
            return Err(bad(format!(
                "index version {} is unknown, expected {VERSION}",
                idx.u64_at(9)
            )));
        }
        let token_type = match idx.bytes()[17] {
            8 => TokenType::Uint16,
            4 => TokenType::Int32,
            code => {
                return Err(bad(format!(
                    "token type {code} is not one that token ids have: 8 (uint16) or 4 (int32)"
                )));
            }
        };
        let (n_sequences, n_boundaries) = (idx.u64_at(18), idx.u64_at(26));
        let expected = u128::from(HEADER_BYTES) + 12 * u128::from(n_sequences) + 8 * u128::from(n_boundaries);
        if expected != u128::from(idx.len()) {
            let cut = if u128::from(idx.len()) < expected {
                "truncated"
            } else {
                "altered"
            };
            let counts =
                format!("{n_sequences} sequences and {n_boundaries} document boundaries take {expected} bytes");
            return Err(bad(format!("{counts}, the file has {}: it is {cut}", idx.len())));
        }
        let Some(n_documents) = n_boundaries.checked_sub(1) else {
            return Err(bad("there are no document boundaries; the first must be 0".into()));
        };
        let indexed = Indexed {
            bin,
            idx,
            token_type,
            n_sequences,
            n_documents,
        };
        indexed.check_end()?;
        Ok(indexed)
    }

    /// The last sequence must end where `.bin` ends.
    fn check_end(&self) -> Result<()> {
        let end = match self.n_sequences.checked_sub(1) {
            Some(last) => {
                i128::from(self.pointer(last)) + i128::from(self.size(last)) * i128::from(self.token_type.width())
            }
            None => 0,
        };
        let found = i128::from(self.bin.len());
        if end == found {
            return Ok(());
        }
        let cut = if found < end { "truncated" } else { "altered" };
        let reason = format!("the index says {end} bytes, the file has {found}: it is {cut}");
        Err(Error::BadShards {
            path: self.bin.path.clone(),
            reason,
        })
    }

    pub fn token_type(&self) -> TokenType {
        self.token_type
    }

    pub fn n_documents(&self) -> u64 {
        self.n_documents
    }

    pub fn n_tokens(&self) -> u64 {
        self.bin.len() / self.token_type.width()
    }

    pub fn bin_path(&self) -> &Path {
        &self.bin.path
    }

    /// The tokens at these positions of `.bin`, appended as i64, which is what an embedding takes.
    pub fn copy_tokens(&self, range: Range<u64>, into: &mut Vec<i64>) {
        let width = self.token_type.width();
        let bytes = &self.bin.bytes()[(range.start * width) as usize..(range.end * width) as usize];
        match self.token_type {
            TokenType::Uint16 => into.extend(
                bytes
                    .chunks_exact(2)
                    .map(|b| i64::from(u16::from_le_bytes([b[0], b[1]]))),
            ),
            TokenType::Int32 => {
                into.extend(
                    bytes
                        .chunks_exact(4)
                        .map(|b| i64::from(i32::from_le_bytes([b[0], b[1], b[2], b[3]]))),
                );
            }
        }
    }

    /// Where a document's tokens lie in `.bin`; an error if the index contradicts itself there.
    pub fn document(&self, document: u64) -> Result<Range<u64>> {
        let boundaries = HEADER_BYTES + 12 * self.n_sequences;
        let (first, end) = (
            self.idx.u64_at(boundaries + 8 * document),
            self.idx.u64_at(boundaries + 8 * (document + 1)),
        );
        let width = self.token_type.width() as i64;
        let range = (first < end && end <= self.n_sequences).then(|| {
            let start = self.pointer(first) / width;
            let last = self.pointer(end - 1) / width;
            (start, last.saturating_add(i64::from(self.size(end - 1))))
        });
        match range {
            Some((start, end)) if 0 <= start && start <= end && end as u64 <= self.n_tokens() => {
                Ok(start as u64..end as u64)
            }
            None if first == end => Ok(0..0),
            _ => {
                let reason = format!("document {document} lies outside of the tokens: the index is damaged");
                Err(Error::BadShards {
                    path: self.idx.path.clone(),
                    reason,
                })
            }
        }
    }

    /// Digest of both files: reads all of them.
    pub fn digest(&self) -> String {
        let mut hasher = blake3::Hasher::new();
        hasher.update(self.bin.bytes()).update(self.idx.bytes());
        hasher.finalize().to_hex().to_string()
    }

    /// Tokens of a sequence.
    fn size(&self, sequence: u64) -> i32 {
        self.idx.u32_at(HEADER_BYTES + 4 * sequence) as i32
    }

    /// Byte offset of a sequence in `.bin`.
    fn pointer(&self, sequence: u64) -> i64 {
        self.idx.u64_at(HEADER_BYTES + 4 * self.n_sequences + 8 * sequence) as i64
    }
}

/// Bytes of an index.
fn idx_bytes(n_sequences: u64, n_boundaries: u64) -> u64 {
    HEADER_BYTES + 12 * n_sequences + 8 * n_boundaries
}

/// `PREFIX.bin` and `PREFIX.idx`; the prefix may contain dots.
fn paths(prefix: &Path) -> (PathBuf, PathBuf) {
    let with = |suffix: &str| {
        let mut path = prefix.as_os_str().to_owned();
        path.push(suffix);
        PathBuf::from(path)
    };
    (with(".bin"), with(".idx"))
}

/// A whole file in memory, read by the operating system as it is touched.
struct Mapped {
    path: PathBuf,
    /// `None` for an empty file, which cannot be mapped.
    map: Option<Mmap>,
}

impl Mapped {
    fn open(path: &Path) -> Result<Mapped> {
        let file = File::open(path).map_err(Error::io("open", path))?;
        let length = file.metadata().map_err(Error::io("read the size of", path))?.len();
        // SAFETY: the mapping is read only. Token shards are never changed in place (they are written beside and
        // renamed), so the bytes stay what they were for as long as the mapping lives.
        #[allow(unsafe_code)]
        let map = (length > 0).then(|| unsafe { Mmap::map(&file) }).transpose();
        Ok(Mapped {
            path: path.to_path_buf(),
            map: map.map_err(Error::io("map", path))?,
        })
    }

    fn bytes(&self) -> &[u8] {
        self.map.as_deref().unwrap_or_default()
    }

    fn len(&self) -> u64 {
        self.bytes().len() as u64
    }

    fn u64_at(&self, offset: u64) -> u64 {
        let at = offset as usize;
        u64::from_le_bytes(self.bytes()[at..at + 8].try_into().expect("eight bytes"))
    }

    fn u32_at(&self, offset: u64) -> u32 {
        let at = offset as usize;
        u32::from_le_bytes(self.bytes()[at..at + 4].try_into().expect("four bytes"))
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use proptest::prelude::*;

    use super::*;

    /// Megatron's reader, from the description of the format: sizes, pointers, boundaries, then each document's tokens.
    fn reference_read(prefix: &Path) -> Vec<Vec<i64>> {
        let (bin, idx) = paths(prefix);
        let (bin, idx) = (fs::read(bin).unwrap(), fs::read(idx).unwrap());
        assert_eq!(&idx[..9], b"MMIDIDX\x00\x00");
        let u64_at = |at: usize| u64::from_le_bytes(idx[at..at + 8].try_into().unwrap()) as usize;
        let (width, n, boundaries) = (if idx[17] == 8 { 2 } else { 4 }, u64_at(18), u64_at(26));
        assert_eq!(
            (u64_at(9), boundaries, idx.len()),
            (1, n + 1, 34 + 12 * n + 8 * (n + 1))
        );
        let sequence = |i: usize| {
            let size = u32::from_le_bytes(idx[34 + 4 * i..][..4].try_into().unwrap()) as usize;
            let bytes = &bin[u64_at(34 + 4 * n + 8 * i)..][..size * width];
            bytes
                .chunks(width)
                .map(|b| b.iter().rev().fold(0, |id, byte| id << 8 | i64::from(*byte)))
                .collect()
        };
        (0..n)
            .inspect(|i| assert_eq!(u64_at(34 + 12 * n + 8 * i), *i))
            .map(sequence)
            .collect()
    }

    fn write(prefix: &Path, token_type: TokenType, documents: &[Vec<u32>]) {
        let mut writer = IndexedWriter::create(prefix, token_type).unwrap();
        documents
            .iter()
            .for_each(|tokens| writer.write_document(tokens).unwrap());
        let digest = writer.finish().unwrap();
        assert_eq!(Indexed::open(prefix).unwrap().digest(), digest);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn what_is_written_is_read(
            documents in prop::collection::vec(prop::collection::vec(0u32..65_535, 0..20), 0..12), wide: bool,
        ) {
            let folder = tempfile::tempdir().unwrap();
            let prefix = folder.path().join("some.tokens");
            write(&prefix, if wide { TokenType::Int32 } else { TokenType::Uint16 }, &documents);
            let expected: Vec<Vec<i64>> = documents.iter().map(|d| d.iter().map(|id| i64::from(*id)).collect()).collect();
            prop_assert_eq!(&reference_read(&prefix), &expected);
            let ours = Indexed::open(&prefix).unwrap();
            prop_assert_eq!(ours.n_tokens() as usize, expected.iter().map(Vec::len).sum::<usize>());
            for (document, expected) in (0..).zip(expected) {
                let mut tokens = Vec::new();
                ours.copy_tokens(ours.document(document).unwrap(), &mut tokens);
                prop_assert_eq!(tokens, expected);
            }
        }
    }

    #[test]
    fn ids_are_as_narrow_as_the_vocabulary_allows() {
        for (size, token_type) in [
            (65_535, TokenType::Uint16),
            (65_536, TokenType::Int32),
            (260_164, TokenType::Int32),
        ] {
            assert_eq!(TokenType::for_size(size), token_type);
        }
    }

    #[test]
    fn a_damaged_index_says_what_is_wrong() {
        let check = |damage: &dyn Fn(&mut Vec<u8>, &mut Vec<u8>), sentence: &str| {
            let folder = tempfile::tempdir().unwrap();
            let prefix = folder.path().join("tokens");
            write(&prefix, TokenType::Uint16, &[vec![1, 2, 3], vec![4]]);
            let (bin_path, idx_path) = paths(&prefix);
            let (mut bin, mut idx) = (fs::read(&bin_path).unwrap(), fs::read(&idx_path).unwrap());
            damage(&mut bin, &mut idx);
            fs::write(&bin_path, bin).unwrap();
            fs::write(&idx_path, idx).unwrap();
            let said = Indexed::open(&prefix).err().unwrap().to_string();
            assert!(said.contains(sentence), "{said}");
        };
        check(
            &|_, idx| idx.truncate(20),
            "too few for the header of 34: the file is truncated",
        );
        check(
            &|_, idx| idx.truncate(60),
            "take 82 bytes, the file has 60: it is truncated",
        );
        check(&|_, idx| idx.push(0), "the file has 83: it is altered");
        check(&|_, idx| idx[0] = b'X', "does not begin with MMIDIDX");
        check(&|_, idx| idx[9] = 2, "index version 2 is unknown, expected 1");
        check(&|_, idx| idx[17] = 7, "token type 7 is not one that token ids have");
        check(&|_, idx| idx[25] = 0xff, "it is truncated");
        check(
            &|bin, _| bin.truncate(5),
            "the index says 8 bytes, the file has 5: it is truncated",
        );
        check(&|bin, _| bin.clear(), "the file has 0: it is truncated");
        check(&|bin, _| bin.push(0), "the file has 9: it is altered");
    }

    #[test]
    fn a_document_outside_of_the_file_is_an_error_and_no_read() {
        let folder = tempfile::tempdir().unwrap();
        let prefix = folder.path().join("tokens");
        write(&prefix, TokenType::Uint16, &[vec![1, 2, 3], vec![4]]);
        let mut idx = fs::read(paths(&prefix).1).unwrap();
        idx[34..38].copy_from_slice(&100i32.to_le_bytes());
        fs::write(paths(&prefix).1, idx).unwrap();
        let said = Indexed::open(&prefix).unwrap().document(0).unwrap_err().to_string();
        assert!(said.contains("document 0 lies outside"), "{said}");
    }

    #[test]
    fn a_document_of_several_sequences_is_read_as_one() {
        let folder = tempfile::tempdir().unwrap();
        let prefix = folder.path().join("tokens");
        write(&prefix, TokenType::Uint16, &[vec![1, 2, 3], vec![4], vec![5, 6]]);
        let mut idx = fs::read(paths(&prefix).1).unwrap();
        // Two documents: sequences 0 and 1, then 2.
        idx[26..34].copy_from_slice(&3u64.to_le_bytes());
        idx.truncate(34 + 36);
        [0u64, 2, 3]
            .iter()
            .for_each(|boundary| idx.extend_from_slice(&boundary.to_le_bytes()));
        fs::write(paths(&prefix).1, idx).unwrap();
        let indexed = Indexed::open(&prefix).unwrap();
        assert_eq!(
            (indexed.document(0).unwrap(), indexed.document(1).unwrap()),
            (0..4, 4..6)
        );
    }
}
