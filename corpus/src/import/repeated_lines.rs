//! Lines that stand in a language more than once: all but the first are left out. Glot500's `yor_Latn` is why: of its
//! 4.5 million lines 1.16 million are different, and one that repeats became a piece of 100 characters.

use std::fs::File;
use std::io::{BufReader, BufWriter, Read, Write};
use std::path::{Path, PathBuf};

use crate::import::held_out::text_hash;
use crate::import::sorted::Sorter;
use crate::{Error, Result};

/// Finds the repeated lines of one language, in bounded memory. Lines are numbered in the order of reading, white
/// space around them does not count, empty ones have no number.
pub(crate) struct LineCensus {
    lines: Sorter,
    next: u64,
    work: PathBuf,
    budget: usize,
}

impl LineCensus {
    pub fn new(work: &Path, budget: usize) -> LineCensus {
        LineCensus {
            lines: Sorter::new(work.with_extension("lines-seen"), budget),
            next: 0,
            work: work.to_owned(),
            budget,
        }
    }

    pub fn document(&mut self, text: &str) -> Result<()> {
        for line in text.lines().map(str::trim).filter(|line| !line.is_empty()) {
            self.lines.push(text_hash(line), &self.next.to_le_bytes())?;
            self.next += 1;
        }
        Ok(())
    }

    /// Writes the numbers of all lines but the first of their kind to `out`, in order.
    pub fn finish(self, out: &Path) -> Result<()> {
        let mut lines = self.lines.finish()?;
        let mut repeated = Sorter::new(self.work.with_extension("lines-repeated"), self.budget);
        let mut last = None;
        while let Some((hash, number)) = lines.next()? {
            if last == Some(hash) {
                let number = u64::from_le_bytes(number.try_into().expect("written so"));
                repeated.push(number.into(), &[])?;
            }
            last = Some(hash);
        }
        drop(lines);
        let mut repeated = repeated.finish()?;
        let mut file = BufWriter::new(File::create(out).map_err(Error::io("create", out))?);
        while let Some((number, _)) = repeated.next()? {
            let number = number as u64;
            file.write_all(&number.to_le_bytes()).map_err(Error::io("write", out))?;
        }
        file.flush().map_err(Error::io("write", out))
    }
}

/// Leaves repeated lines out while documents are read in the same order again.
pub(crate) struct LineFilter {
    repeated: BufReader<File>,
    path: PathBuf,
    next_repeated: Option<u64>,
    next: u64,
    /// Lines left out so far.
    pub dropped: u64,
}

impl LineFilter {
    /// `path`: what [`LineCensus::finish`] wrote.
    pub fn open(path: &Path) -> Result<LineFilter> {
        let mut filter = LineFilter {
            repeated: BufReader::new(File::open(path).map_err(Error::io("open", path))?),
            path: path.to_owned(),
            next_repeated: None,
            next: 0,
            dropped: 0,
        };
        filter.next_repeated = filter.read()?;
        Ok(filter)
    }

    /// What is left of the document; empty if nothing is. Of blank lines around what was left out one stays.
    pub fn document(&mut self, text: String) -> Result<String> {
        let n_lines = text.lines().filter(|line| !line.trim().is_empty()).count() as u64;
        if self
            .next_repeated
            .is_none_or(|repeated| repeated >= self.next + n_lines)
        {
            self.next += n_lines;
            return Ok(text);
        }
        let mut left: Vec<&str> = Vec::new();
        for line in text.lines() {
            if line.trim().is_empty() {
                if left.last().is_some_and(|line| !line.trim().is_empty()) {
                    left.push(line);
                }
                continue;
            }
            if self.next_repeated == Some(self.next) {
                self.next_repeated = self.read()?;
                self.dropped += 1;
            } else {
                left.push(line);
            }
            self.next += 1;
        }
        Ok(left.join("\n").trim().to_owned())
    }

    fn read(&mut self) -> Result<Option<u64>> {
        let mut bytes = [0; 8];
        match self.repeated.read_exact(&mut bytes) {
            Ok(()) => Ok(Some(u64::from_le_bytes(bytes))),
            Err(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => Ok(None),
            Err(e) => Err(Error::io("read", &self.path)(e)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_a_repeated_line_the_first_stays() {
        let temp = tempfile::tempdir().unwrap();
        let texts = ["a\nb\n\nc", "b\n d\na ", "a\nc", "e", "f\n\nb\n\ng"];
        let mut census = LineCensus::new(&temp.path().join("xyz"), 0);
        texts.iter().for_each(|text| census.document(text).unwrap());
        census.finish(&temp.path().join("repeated")).unwrap();
        let mut filter = LineFilter::open(&temp.path().join("repeated")).unwrap();
        let left = texts.map(|text| filter.document(text.to_owned()).unwrap());
        assert_eq!(left, ["a\nb\n\nc", "d", "", "e", "f\n\ng"]);
        assert_eq!(filter.dropped, 5);
    }
}
