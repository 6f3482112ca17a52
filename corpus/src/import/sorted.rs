//! Sorts more records than memory holds: runs sorted in memory go to one file without a name and are merged from there.
//! Deduplication, the shuffle of a language and the lottery for held-out text all rest on it.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::{Error, Result};

/// What one run reads ahead while it is merged.
const WINDOW_BYTES: usize = 64 << 10;
/// Before a record in a run: its key, little end first, and its payload's length.
const HEADER_BYTES: usize = 16 + 4;

/// Takes records of a key and some bytes; gives them back by key, equal keys in the order of their arrival.
pub(crate) struct Sorter {
    /// Where runs go if there are any. The file is unlinked as soon as it is open: a killed import leaves nothing.
    place: PathBuf,
    /// Bytes of memory, here and in the merge.
    budget: usize,
    payloads: Vec<u8>,
    entries: Vec<Entry>,
    runs: Option<Runs>,
}

/// 24 bytes, where a `u128` would make it 32.
#[derive(Clone, Copy)]
pub(crate) struct Entry {
    key: [u64; 2],
    start: u32,
    length: u32,
}

impl Entry {
    fn key(&self) -> u128 {
        (u128::from(self.key[0]) << 64) | u128::from(self.key[1])
    }
}

/// Sorted runs, one after the other, in the order of their records' arrival.
struct Runs {
    file: File,
    /// Where each run ends.
    ends: Vec<u64>,
}

impl Sorter {
    pub fn new(place: PathBuf, budget: usize) -> Sorter {
        Sorter {
            place,
            // Places in the payloads are 32 bits.
            budget: budget.clamp(4 * WINDOW_BYTES, 1 << 31),
            payloads: Vec::new(),
            entries: Vec::new(),
            runs: None,
        }
    }

    pub fn push(&mut self, key: u128, payload: &[u8]) -> Result<()> {
        // Vectors double: what they have reserved counts, and so does the copy while they grow.
        let entries = 2 * (self.entries.len() + 1) * size_of::<Entry>();
        let full = entries + 2 * (self.payloads.len() + payload.len()) > self.budget;
        if full && !self.entries.is_empty() {
            self.write_run()?;
        }
        let length = u32::try_from(payload.len()).map_err(|_| self.too_long(payload.len()))?;
        self.entries.push(Entry {
            key: [(key >> 64) as u64, key as u64],
            start: self.payloads.len() as u32,
            length,
        });
        self.payloads.extend_from_slice(payload);
        Ok(())
    }

    /// All that came, in order.
    pub fn finish(mut self) -> Result<Sorted> {
        if self.runs.is_none() {
            self.sort();
            return Ok(Sorted::Memory {
                payloads: self.payloads,
                entries: self.entries,
                next: 0,
            });
        }
        self.write_run()?;
        let most = (self.budget / WINDOW_BYTES).clamp(2, 1024);
        let mut runs = self.runs.take().expect("there are some");
        while runs.ends.len() > most {
            runs = merge_some(runs, most, &self.place)?;
        }
        let place = std::mem::take(&mut self.place);
        drop(self);
        Ok(Sorted::Files(Merge::new(runs, place)?))
    }

    fn sort(&mut self) {
        self.entries.sort_unstable_by_key(|entry| (entry.key, entry.start));
    }

    fn write_run(&mut self) -> Result<()> {
        self.sort();
        let write = Error::io("write", &self.place);
        if self.runs.is_none() {
            self.runs = Some(Runs::create(&self.place)?);
        }
        let runs = self.runs.as_mut().expect("just made");
        let (payloads, entries) = (&self.payloads, &self.entries);
        runs.append(
            entries
                .iter()
                .map(|e| (e.key(), &payloads[e.start as usize..][..e.length as usize])),
        )
        .map_err(write)?;
        self.entries.clear();
        self.payloads.clear();
        Ok(())
    }

    fn too_long(&self, length: usize) -> Error {
        let reason = format!("a record of {length} bytes; the most is 4 GiB");
        Error::io("sort into", &self.place)(io::Error::other(reason))
    }
}

impl Runs {
    fn create(place: &Path) -> Result<Runs> {
        let mut options = OpenOptions::new();
        let file = options.read(true).write(true).create(true).truncate(true).open(place);
        let file = file.map_err(Error::io("create", place))?;
        fs::remove_file(place).map_err(Error::io("unlink", place))?;
        Ok(Runs { file, ends: Vec::new() })
    }

    fn append<'a>(&mut self, records: impl Iterator<Item = (u128, &'a [u8])>) -> io::Result<()> {
        let mut end = self.ends.last().copied().unwrap_or(0);
        let mut out = BufWriter::with_capacity(WINDOW_BYTES, &self.file);
        for (key, payload) in records {
            end += write_record(&mut out, key, payload)?;
        }
        out.flush()?;
        self.ends.push(end);
        Ok(())
    }
}

fn write_record(out: &mut impl Write, key: u128, payload: &[u8]) -> io::Result<u64> {
    out.write_all(&key.to_le_bytes())?;
    out.write_all(&(payload.len() as u32).to_le_bytes())?;
    out.write_all(payload)?;
    Ok((HEADER_BYTES + payload.len()) as u64)
}

/// Neighbouring runs become one, so that fewer stay to be merged at a time.
fn merge_some(runs: Runs, at_a_time: usize, place: &Path) -> Result<Runs> {
    let mut merged = Runs::create(place)?;
    let mut start = 0;
    for ends in runs.ends.chunks(at_a_time) {
        let file = runs.file.try_clone().map_err(Error::io("share", place))?;
        let mut some = Merge::starting_at(start, file, ends.to_vec(), place.to_owned())?;
        let mut end = merged.ends.last().copied().unwrap_or(0);
        let mut out = BufWriter::with_capacity(WINDOW_BYTES, &merged.file);
        while let Some((key, payload)) = some.next()? {
            end += write_record(&mut out, key, payload).map_err(Error::io("write", place))?;
        }
        out.flush().map_err(Error::io("write", place))?;
        drop(out);
        merged.ends.push(end);
        start = *ends.last().expect("a chunk is not empty");
    }
    Ok(merged)
}

/// Sorted records, to be read once or, after [`rewind`](Self::rewind), again.
pub(crate) enum Sorted {
    Memory {
        payloads: Vec<u8>,
        entries: Vec<Entry>,
        next: usize,
    },
    Files(Merge),
}

impl Sorted {
    pub fn next(&mut self) -> Result<Option<(u128, &[u8])>> {
        match self {
            Sorted::Memory {
                payloads,
                entries,
                next,
            } => {
                let entry = entries.get(*next).copied();
                *next += usize::from(entry.is_some());
                Ok(entry.map(|e| (e.key(), &payloads[e.start as usize..][..e.length as usize])))
            }
            Sorted::Files(merge) => merge.next(),
        }
    }

    pub fn rewind(&mut self) -> Result<()> {
        match self {
            Sorted::Memory { next, .. } => {
                *next = 0;
                Ok(())
            }
            Sorted::Files(merge) => merge.rewind(),
        }
    }
}

/// Reads several runs as one.
pub(crate) struct Merge {
    file: File,
    place: PathBuf,
    start: u64,
    ends: Vec<u64>,
    runs: Vec<Run>,
    heads: BinaryHeap<Reverse<(u128, usize)>>,
    /// The run whose head was handed out last: it moves on with the next call.
    current: Option<usize>,
    /// Holds a payload longer than a window.
    long: Vec<u8>,
}

impl Merge {
    fn new(runs: Runs, place: PathBuf) -> Result<Merge> {
        Merge::starting_at(0, runs.file, runs.ends, place)
    }

    fn starting_at(start: u64, file: File, ends: Vec<u64>, place: PathBuf) -> Result<Merge> {
        let mut merge = Merge {
            file,
            place,
            start,
            ends,
            runs: Vec::new(),
            heads: BinaryHeap::new(),
            current: None,
            long: Vec::new(),
        };
        merge.rewind()?;
        Ok(merge)
    }

    fn rewind(&mut self) -> Result<()> {
        self.heads.clear();
        self.runs.clear();
        self.current = None;
        let mut start = self.start;
        for (number, end) in self.ends.iter().enumerate() {
            let mut run = Run::new(start, *end);
            if run.advance(&self.file).map_err(Error::io("read", &self.place))? {
                self.heads.push(Reverse((run.key, number)));
            }
            self.runs.push(run);
            start = *end;
        }
        Ok(())
    }

    fn next(&mut self) -> Result<Option<(u128, &[u8])>> {
        let read = Error::io("read", &self.place);
        let mut step = || -> io::Result<Option<usize>> {
            if let Some(number) = self.current.take()
                && self.runs[number].advance(&self.file)?
            {
                self.heads.push(Reverse((self.runs[number].key, number)));
            }
            let Some(Reverse((_, number))) = self.heads.pop() else {
                return Ok(None);
            };
            self.current = Some(number);
            self.runs[number].load(&self.file, &mut self.long)?;
            Ok(Some(number))
        };
        let number = step().map_err(read)?;
        Ok(number.map(|number| (self.runs[number].key, self.runs[number].payload(&self.long))))
    }
}

/// A place in one run: a record's header and the window of the file around it.
struct Run {
    key: u128,
    payload_at: u64,
    length: usize,
    next_at: u64,
    end: u64,
    window: Vec<u8>,
    window_at: u64,
}

impl Run {
    fn new(start: u64, end: u64) -> Run {
        Run {
            key: 0,
            payload_at: start,
            length: 0,
            next_at: start,
            end,
            window: Vec::new(),
            window_at: start,
        }
    }

    /// Moves to the next record; false behind the last.
    fn advance(&mut self, file: &File) -> io::Result<bool> {
        if self.next_at == self.end {
            self.window = Vec::new();
            return Ok(false);
        }
        self.show(file, self.next_at, HEADER_BYTES)?;
        let header = self.in_window(self.next_at, HEADER_BYTES).expect("shown");
        let key = u128::from_le_bytes(header[..16].try_into().expect("16 bytes"));
        let length = u32::from_le_bytes(header[16..].try_into().expect("4 bytes"));
        (self.key, self.length) = (key, length as usize);
        self.payload_at = self.next_at + HEADER_BYTES as u64;
        self.next_at = self.payload_at + self.length as u64;
        Ok(true)
    }

    /// Brings the payload into memory: into the window, or, if it is longer, into `long`.
    fn load(&mut self, file: &File, long: &mut Vec<u8>) -> io::Result<()> {
        if self.length <= WINDOW_BYTES {
            return self.show(file, self.payload_at, self.length);
        }
        long.resize(self.length, 0);
        file.read_exact_at(long, self.payload_at)
    }

    fn payload<'a>(&'a self, long: &'a [u8]) -> &'a [u8] {
        self.in_window(self.payload_at, self.length)
            .unwrap_or_else(|| &long[..self.length])
    }

    /// Moves the window so that it shows `length` bytes from `at` on.
    fn show(&mut self, file: &File, at: u64, length: usize) -> io::Result<()> {
        if self.in_window(at, length).is_none() {
            self.window.resize(WINDOW_BYTES.min((self.end - at) as usize), 0);
            self.window_at = at;
            file.read_exact_at(&mut self.window, at)?;
        }
        Ok(())
    }

    fn in_window(&self, at: u64, length: usize) -> Option<&[u8]> {
        let start = usize::try_from(at.checked_sub(self.window_at)?).ok()?;
        self.window.get(start..start + length)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sorted(budget: usize, records: &[(u128, Vec<u8>)]) -> (Vec<(u128, Vec<u8>)>, bool) {
        let temp = tempfile::tempdir().unwrap();
        let mut sorter = Sorter::new(temp.path().join("runs"), budget);
        for (key, payload) in records {
            sorter.push(*key, payload).unwrap();
        }
        let mut sorted = sorter.finish().unwrap();
        assert_eq!(fs::read_dir(temp.path()).unwrap().count(), 0, "no file is left");
        let all = |sorted: &mut Sorted| {
            let mut all = Vec::new();
            while let Some((key, payload)) = sorted.next().unwrap() {
                all.push((key, payload.to_vec()));
            }
            all
        };
        let first = all(&mut sorted);
        sorted.rewind().unwrap();
        assert_eq!(first, all(&mut sorted), "the same again");
        (first, matches!(sorted, Sorted::Files(_)))
    }

    #[test]
    fn records_come_back_by_key_and_equal_keys_as_they_came() {
        let key = |i: usize| ((i as u128 * 0x9e37_79b9_7f4a_7c15_f39c_c060_5ced_c834) % 997) << 100;
        let length = |i: usize| match i % 1000 {
            0 => 3 * WINDOW_BYTES, // longer than a window, and longer than the budget leaves room for
            _ => i % 50,
        };
        let records: Vec<_> = (0..20_000)
            .map(|i| (key(i), [&i.to_le_bytes()[..], &vec![7; length(i)]].concat()))
            .collect();
        let mut expected = records.clone();
        expected.sort_by_key(|(key, _)| *key);
        for (budget, spills) in [(64 << 20, false), (1 << 20, true), (0, true)] {
            let (found, spilled) = sorted(budget, &records);
            assert_eq!(spilled, spills, "{budget}");
            assert!(found == expected, "budget {budget}");
        }
        assert_eq!(sorted(0, &[]).0, []);
    }
}
