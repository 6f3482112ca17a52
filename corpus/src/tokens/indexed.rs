//! Megatron's indexed format, byte for byte: `.bin` holds token ids end to end, `.idx` says where each sequence lies.
//! The one door to memory mapping; a damaged index is an error here and never a read outside the file.
//!
//! `.idx`, little-endian: magic, u64 version, u8 token type, u64 sequences, u64 document boundaries,
//! i32 size of each sequence in tokens, i64 offset of each in `.bin` in bytes, i64 document boundaries in sequences.

use std::fs::File;
use std::io::{self, BufReader, BufWriter, Read, Seek, SeekFrom, Write};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use memmap2::Mmap;
use serde::{Deserialize, Serialize};

use crate::{Error, Result};

const MAGIC: &[u8; 9] = b"MMIDIDX\x00\x00";
const VERSION: u64 = 1;
const HEADER_BYTES: u64 = 9 + 8 + 1 + 8 + 8;

/// How a token id lies on disk: all of Megatron's number types that can hold ids. We write 16 or 32 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TokenType {
    Uint8,
    Int8,
    Int16,
    Int32,
    Int64,
    Uint16,
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
            TokenType::Uint8 | TokenType::Int8 => 1,
            TokenType::Int16 | TokenType::Uint16 => 2,
            TokenType::Int32 => 4,
            TokenType::Int64 => 8,
        }
    }

    /// Megatron's number for it. 6 and 7 are floating-point types, which hold no ids.
    fn code(self) -> u8 {
        match self {
            TokenType::Uint8 => 1,
            TokenType::Int8 => 2,
            TokenType::Int16 => 3,
            TokenType::Int32 => 4,
            TokenType::Int64 => 5,
            TokenType::Uint16 => 8,
        }
    }

    fn from_code(code: u8) -> Option<TokenType> {
        use TokenType::*;
        [Uint8, Int8, Int16, Int32, Int64, Uint16]
            .into_iter()
            .find(|token_type| token_type.code() == code)
    }
}

/// Writes sequences one after the other, a document each. What it keeps in memory does not grow with them.
pub(crate) struct IndexedWriter {
    bin: BufWriter<File>,
    bin_path: PathBuf,
    /// Sizes, behind room for the header; the rest of the index is made of them.
    idx: BufWriter<File>,
    idx_path: PathBuf,
    token_type: TokenType,
    n_sequences: u64,
    digest: blake3::Hasher,
}

impl IndexedWriter {
    /// Starts `PREFIX.bin` and `PREFIX.idx`.
    pub fn create(prefix: &Path, token_type: TokenType) -> Result<Self> {
        let (bin_path, idx_path) = paths(prefix);
        // The index is read again before it is finished.
        let create = |path: &Path| {
            let file = File::options()
                .read(true)
                .write(true)
                .create(true)
                .truncate(true)
                .open(path);
            Ok(BufWriter::new(file.map_err(Error::io("create", path))?))
        };
        let (bin, mut idx) = (create(&bin_path)?, create(&idx_path)?);
        idx.write_all(&[0; HEADER_BYTES as usize])
            .map_err(Error::io("write", &idx_path))?;
        Ok(IndexedWriter {
            bin,
            bin_path,
            idx,
            idx_path,
            token_type,
            n_sequences: 0,
            digest: blake3::Hasher::new(),
        })
    }

    pub fn write_document(&mut self, tokens: &[u32]) -> Result<()> {
        let width = self.token_type.width() as usize;
        let bytes: Vec<u8> = tokens
            .iter()
            .flat_map(|id| u64::from(*id).to_le_bytes().into_iter().take(width))
            .collect();
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
        self.idx
            .write_all(&size.to_le_bytes())
            .map_err(Error::io("write", &self.idx_path))?;
        self.n_sequences += 1;
        self.digest.update(&bytes);
        self.bin.write_all(&bytes).map_err(Error::io("write", &self.bin_path))
    }

    /// Writes the rest of the index, syncs both files and returns a digest of them, to be gone on with: of what the caller
    /// keeps beside them.
    pub fn finish(mut self) -> Result<blake3::Hasher> {
        self.write_index().map_err(Error::io("write", &self.idx_path))?;
        self.bin
            .flush()
            .and_then(|()| self.bin.get_ref().sync_all())
            .map_err(Error::io("sync", &self.bin_path))?;
        update_with_file(&mut self.digest, &self.idx_path)?;
        Ok(self.digest)
    }

    fn write_index(&mut self) -> io::Result<()> {
        self.idx.flush()?;
        let mut sizes = BufReader::new(SizesOf {
            file: self.idx.get_ref(),
            at: HEADER_BYTES,
            end: HEADER_BYTES + 4 * self.n_sequences,
        });
        let mut rest = BufWriter::new(self.idx.get_ref());
        let mut pointer = 0i64;
        for _ in 0..self.n_sequences {
            let mut size = [0; 4];
            sizes.read_exact(&mut size)?;
            rest.write_all(&pointer.to_le_bytes())?;
            pointer += i64::from(i32::from_le_bytes(size)) * self.token_type.width() as i64;
        }
        for document in 0..=self.n_sequences {
            rest.write_all(&document.to_le_bytes())?;
        }
        rest.flush()?;
        let header = [
            &MAGIC[..],
            &VERSION.to_le_bytes(),
            &[self.token_type.code()],
            &self.n_sequences.to_le_bytes(),
            &(self.n_sequences + 1).to_le_bytes(),
        ];
        self.idx.get_ref().write_all_at(&header.concat(), 0)?;
        self.idx.get_ref().sync_all()
    }
}

/// A stretch of a file that is written to behind it meanwhile.
struct SizesOf<'a> {
    file: &'a File,
    at: u64,
    end: u64,
}

impl Read for SizesOf<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let most = into.len().min((self.end - self.at) as usize);
        let read = self.file.read_at(&mut into[..most], self.at)?;
        self.at += read as u64;
        Ok(read)
    }
}

/// Goes on with a digest by a file's bytes.
pub(crate) fn update_with_file(digest: &mut blake3::Hasher, path: &Path) -> Result<()> {
    let file = File::open(path).map_err(Error::io("open", path))?;
    digest.update_reader(file).map_err(Error::io("read", path))?;
    Ok(())
}

/// Writes a file of little-endian u32, one a document, once one of them is not 0; most corpora have none.
pub(crate) struct CountsWriter {
    path: PathBuf,
    file: Option<BufWriter<File>>,
    n: u64,
}

impl CountsWriter {
    pub fn new(path: PathBuf) -> CountsWriter {
        CountsWriter { path, file: None, n: 0 }
    }

    pub fn push(&mut self, count: u32) -> Result<()> {
        if self.file.is_none() && count > 0 {
            let file = File::create(&self.path).map_err(Error::io("create", &self.path))?;
            // A hole reads as zeros.
            file.set_len(4 * self.n).map_err(Error::io("write", &self.path))?;
            let mut file = BufWriter::new(file);
            file.seek(SeekFrom::End(0)).map_err(Error::io("write", &self.path))?;
            self.file = Some(file);
        }
        self.n += 1;
        match &mut self.file {
            Some(file) => file
                .write_all(&count.to_le_bytes())
                .map_err(Error::io("write", &self.path)),
            None => Ok(()),
        }
    }

    /// Syncs the file and gives its path; `None` if there is none.
    pub fn finish(self) -> Result<Option<PathBuf>> {
        let Some(mut file) = self.file else { return Ok(None) };
        file.flush()
            .and_then(|()| file.get_ref().sync_all())
            .map_err(Error::io("sync", &self.path))?;
        Ok(Some(self.path))
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
        Indexed::check(Mapped::open(&bin_path)?, Mapped::open(&idx_path)?)
    }

    /// The same over bytes in memory.
    pub fn from_bytes(bin: &[u8], idx: &[u8]) -> Result<Indexed> {
        Indexed::check(Mapped::of_bytes("bytes.bin", bin), Mapped::of_bytes("bytes.idx", idx))
    }

    fn check(bin: Mapped, idx: Mapped) -> Result<Indexed> {
        let bad = |reason: String| Error::BadShards {
            path: idx.path.clone(),
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
        let code = idx.bytes()[17];
        let Some(token_type) = TokenType::from_code(code) else {
            return Err(bad(format!(
                "token type {code} is not one that token ids have: 1 (uint8), 2 (int8), 3 (int16), 4 (int32), 5 (int64) or 8 (uint16)"
            )));
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
        indexed.check_ends()?;
        Ok(indexed)
    }

    /// The first document must begin with the first sequence, the last end with the last, and that where `.bin` ends.
    fn check_ends(&self) -> Result<()> {
        let (first, last) = (self.boundary(0), self.boundary(self.n_documents));
        if (first, last) != (0, self.n_sequences) {
            let counts = format!("the documents take sequences {first} to {last} of {}", self.n_sequences);
            return Err(self.bad(format!("{counts}, not all: the index is altered")));
        }
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

    pub fn idx_path(&self) -> &Path {
        &self.idx.path
    }

    /// The tokens at these positions of `.bin`, appended as i64, which is what an embedding takes.
    pub fn copy_tokens(&self, range: Range<u64>, into: &mut Vec<i64>) {
        let width = self.token_type.width();
        let bytes = &self.bin.bytes()[(range.start * width) as usize..(range.end * width) as usize];
        match self.token_type {
            TokenType::Uint8 => into.extend(bytes.iter().map(|b| i64::from(*b))),
            TokenType::Int8 => into.extend(bytes.iter().map(|b| i64::from(*b as i8))),
            TokenType::Int16 => into.extend(each(bytes).map(|b| i64::from(i16::from_le_bytes(b)))),
            TokenType::Int32 => into.extend(each(bytes).map(|b| i64::from(i32::from_le_bytes(b)))),
            TokenType::Int64 => into.extend(each(bytes).map(i64::from_le_bytes)),
            TokenType::Uint16 => into.extend(each(bytes).map(|b| i64::from(u16::from_le_bytes(b)))),
        }
    }

    /// Where a document's tokens lie in `.bin`; an error if the index contradicts itself there.
    pub fn document(&self, document: u64) -> Result<Range<u64>> {
        let (first, end) = (self.boundary(document), self.boundary(document + 1));
        let width = self.token_type.width() as i64;
        let start = self.position(first);
        if first == end && first <= self.n_sequences && start <= self.n_tokens() {
            return Ok(start..start);
        }
        let range = (first < end && end <= self.n_sequences).then(|| {
            let (first, last) = (self.pointer(first), self.pointer(end - 1));
            let aligned = first % width == 0 && last % width == 0;
            let end = (last / width).saturating_add(i64::from(self.size(end - 1)));
            (if aligned { first / width } else { -1 }, end)
        });
        match range {
            Some((start, end)) if 0 <= start && start <= end && end as u64 <= self.n_tokens() => {
                Ok(start as u64..end as u64)
            }
            _ => Err(self.bad(format!(
                "document {document} lies outside of the tokens: the index is damaged"
            ))),
        }
    }

    /// The document that holds a position of `.bin`, among those of a range that [`lengths`](Self::lengths) has checked.
    pub fn document_at(&self, token: u64, documents: Range<u64>) -> u64 {
        let (mut low, mut high) = (documents.start, documents.end);
        // The last document that begins at or before the token; of empty ones at the same place, the one behind them.
        while high - low > 1 {
            let middle = low + (high - low) / 2;
            if self.position(self.boundary(middle)) <= token {
                low = middle;
            } else {
                high = middle;
            }
        }
        low
    }

    /// Tokens of each of these documents, appended; returns where the first begins. Checks on the way that sequences lie end to end and documents hold
    /// whole sequences, as Megatron writes them; after that no position in the index can lead astray.
    /// Reads the file and never touches the mapping, so that an index of 200 MB does not become resident.
    pub fn lengths(&self, documents: Range<u64>, into: &mut Vec<u64>) -> Result<u64> {
        let mut reader = self.idx.reader()?;
        let boundaries = reader.u64s(
            self.boundaries_at() + 8 * documents.start,
            documents.end + 1 - documents.start,
        )?;
        let damaged = |what: String| Err(self.bad(format!("{what}: the index is damaged")));
        if let Some(at) = boundaries
            .windows(2)
            .position(|pair| pair[0] > pair[1] || pair[1] > self.n_sequences)
        {
            return damaged(format!(
                "document {} ends before it begins or outside",
                documents.start + at as u64
            ));
        }
        let (first, end) = (boundaries[0], boundaries[boundaries.len() - 1]);
        if first > self.n_sequences {
            return damaged(format!("document {} begins outside", documents.start));
        }
        // The sequence before says where the first must begin.
        let from = first.saturating_sub(1);
        let sizes = reader.u32s(HEADER_BYTES + 4 * from, end - from)?;
        let pointers = reader.u64s(HEADER_BYTES + 4 * self.n_sequences + 8 * from, end - from)?;
        let width = self.token_type.width();
        let mut expected = if from == 0 { 0 } else { pointers[0] };
        let mut begins = expected / width;
        for ((size, pointer), sequence) in sizes.iter().zip(&pointers).zip(from..) {
            if *size > i32::MAX as u32 || *pointer != expected {
                return damaged(format!(
                    "sequence {sequence} does not begin where the one before it ends"
                ));
            }
            expected = expected.saturating_add(u64::from(*size) * width);
            if sequence < first {
                begins = expected / width;
            }
        }
        if expected > self.bin.len() {
            return damaged(format!("sequence {end} begins outside of the tokens"));
        }
        into.extend(boundaries.windows(2).map(|pair| {
            let of = |sequence: u64| (sequence - from) as usize;
            sizes[of(pair[0])..of(pair[1])]
                .iter()
                .map(|size| u64::from(*size))
                .sum::<u64>()
        }));
        Ok(begins)
    }

    /// BLAKE3 of both files: reads all of them.
    pub fn digest(&self, more: &[u8]) -> String {
        let mut hasher = blake3::Hasher::new();
        hasher.update(self.bin.bytes()).update(self.idx.bytes()).update(more);
        hasher.finalize().to_hex().to_string()
    }

    /// BLAKE3 of the index alone.
    pub fn idx_digest(&self) -> String {
        crate::folder::digest_of(self.idx.bytes())
    }

    fn bad(&self, reason: String) -> Error {
        Error::BadShards {
            path: self.idx.path.clone(),
            reason,
        }
    }

    /// Token position at which a sequence begins; the end for the one after the last. 0 where the index is damaged.
    fn position(&self, sequence: u64) -> u64 {
        if sequence >= self.n_sequences {
            return self.n_tokens();
        }
        u64::try_from(self.pointer(sequence)).unwrap_or(0) / self.token_type.width()
    }

    /// Tokens of a sequence.
    fn size(&self, sequence: u64) -> i32 {
        self.idx.u32_at(HEADER_BYTES + 4 * sequence) as i32
    }

    /// Byte offset of a sequence in `.bin`.
    fn pointer(&self, sequence: u64) -> i64 {
        self.idx.u64_at(HEADER_BYTES + 4 * self.n_sequences + 8 * sequence) as i64
    }

    /// The first sequence of a document; the number of sequences for the one after the last.
    fn boundary(&self, document: u64) -> u64 {
        self.idx.u64_at(self.boundaries_at() + 8 * document)
    }

    fn boundaries_at(&self) -> u64 {
        HEADER_BYTES + 12 * self.n_sequences
    }
}

/// A file of little-endian u32, one a document, mapped.
pub(crate) struct Counts(Mapped);

impl Counts {
    /// Must hold `n` numbers.
    pub fn open(path: &Path, n: u64) -> Result<Counts> {
        let map = Mapped::open(path)?;
        if map.len() != 4 * n {
            let reason = format!(
                "{n} documents take {} bytes, the file has {}: it does not belong here",
                4 * n,
                map.len()
            );
            return Err(Error::BadShards {
                path: path.to_path_buf(),
                reason,
            });
        }
        Ok(Counts(map))
    }

    pub fn get(&self, document: u64) -> u32 {
        self.0.u32_at(4 * document)
    }

    pub fn bytes(&self) -> &[u8] {
        self.0.bytes()
    }
}

fn each<const N: usize>(bytes: &[u8]) -> impl Iterator<Item = [u8; N]> + '_ {
    bytes.chunks_exact(N).map(|b| b.try_into().expect("chunks of N"))
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
    content: Content,
}

enum Content {
    /// `None` for an empty file, which cannot be mapped.
    File(Option<Mmap>),
    Bytes(Vec<u8>),
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
            content: Content::File(map.map_err(Error::io("map", path))?),
        })
    }

    fn of_bytes(name: &str, bytes: &[u8]) -> Mapped {
        Mapped {
            path: name.into(),
            content: Content::Bytes(bytes.to_vec()),
        }
    }

    fn bytes(&self) -> &[u8] {
        match &self.content {
            Content::File(map) => map.as_deref().unwrap_or_default(),
            Content::Bytes(bytes) => bytes,
        }
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

    /// Opened when it is needed: a corpus may have more files than a process may have open.
    fn reader(&self) -> Result<Reader<'_>> {
        let file = match &self.content {
            Content::File(_) => Some(File::open(&self.path).map_err(Error::io("open", &self.path))?),
            Content::Bytes(_) => None,
        };
        Ok(Reader {
            of: self,
            file,
            buffer: Vec::new(),
        })
    }
}

/// Reads stretches of a file without touching its mapping.
struct Reader<'a> {
    of: &'a Mapped,
    /// `None` where the bytes are in memory anyway.
    file: Option<File>,
    buffer: Vec<u8>,
}

impl Reader<'_> {
    fn u64s(&mut self, offset: u64, n: u64) -> Result<Vec<u64>> {
        Ok(each(self.read(offset, 8 * n)?).map(u64::from_le_bytes).collect())
    }

    fn u32s(&mut self, offset: u64, n: u64) -> Result<Vec<u32>> {
        Ok(each(self.read(offset, 4 * n)?).map(u32::from_le_bytes).collect())
    }

    fn read(&mut self, offset: u64, bytes: u64) -> Result<&[u8]> {
        let Some(file) = &self.file else {
            return Ok(&self.of.bytes()[offset as usize..(offset + bytes) as usize]);
        };
        self.buffer.resize(bytes as usize, 0);
        file.read_exact_at(&mut self.buffer, offset)
            .map_err(Error::io("read", &self.of.path))?;
        Ok(&self.buffer)
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
        let width = match idx[17] {
            1 | 2 => 1,
            3 | 8 => 2,
            4 => 4,
            5 => 8,
            other => panic!("type {other} holds no ids"),
        };
        let (n, boundaries) = (u64_at(18), u64_at(26));
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
        let mut digest = writer.finish().unwrap();
        let digest = digest.update(b"more").finalize().to_hex().to_string();
        assert_eq!(Indexed::open(prefix).unwrap().digest(b"more"), digest);
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
