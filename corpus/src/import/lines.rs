//! Lines of text files, plain or packed (`.gz`, `.zst`), one at a time: memory is one line, whatever the file's size.
//! A line that cannot be read is an error with its place, and the reading goes on behind it.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use flate2::bufread::MultiGzDecoder;

use crate::{Error, Result};

/// Longer lines are refused: no document is that long, but a file that is no text, or has lost its line breaks, is one.
const MOST_BYTES: usize = 64 << 20;
const BUFFER_BYTES: usize = 256 << 10;

/// How a file is packed, by the end of its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Packing {
    Plain,
    Gzip,
    Zstd,
}

impl Packing {
    /// The packing and what the name says without it: `eng.jsonl.gz` is a packed `eng.jsonl`.
    pub fn of(path: &Path) -> (Packing, PathBuf) {
        let packing = match path.extension().and_then(|ending| ending.to_str()) {
            Some("gz") => Packing::Gzip,
            Some("zst") => Packing::Zstd,
            _ => return (Packing::Plain, path.to_path_buf()),
        };
        (packing, path.with_extension(""))
    }
}

/// One line of a file, without its end (`\n` or `\r\n`) and without a byte-order mark.
pub(crate) struct Line<'a> {
    /// Counted from 1.
    pub number: usize,
    /// Or why it cannot be read: not UTF-8, too long, or the archive is damaged, which is the last line of all.
    pub text: Result<&'a str>,
}

/// A file's lines, read as they are asked for.
pub(crate) struct Lines<'a> {
    path: PathBuf,
    reader: Box<dyn BufRead + 'a>,
    packing: Packing,
    most_bytes: usize,
    line: Vec<u8>,
    /// Of the line read last.
    number: usize,
    ended: bool,
}

impl Lines<'static> {
    /// Opens a file, unpacking it if its name says that it is packed.
    pub fn open(path: &Path) -> Result<Lines<'static>> {
        let file = File::open(path).map_err(Error::io("open", path))?;
        let file = BufReader::with_capacity(BUFFER_BYTES, file);
        let (packing, _) = Packing::of(path);
        let reader: Box<dyn BufRead> = match packing {
            Packing::Plain => Box::new(file),
            // Both read on through archives that were joined from several, as `cat a.gz b.gz` does.
            Packing::Gzip => Box::new(BufReader::with_capacity(BUFFER_BYTES, MultiGzDecoder::new(file))),
            Packing::Zstd => {
                let decoder = zstd::Decoder::with_buffer(file).map_err(Error::io("unpack", path))?;
                Box::new(BufReader::with_capacity(BUFFER_BYTES, decoder))
            }
        };
        Ok(Lines::new(path, reader, packing, MOST_BYTES))
    }
}

impl<'a> Lines<'a> {
    /// Lines of something already unpacked; `path` names it in errors.
    pub fn of_bytes(path: &Path, bytes: &'a [u8]) -> Lines<'a> {
        Lines::new(path, Box::new(bytes), Packing::Plain, MOST_BYTES)
    }

    fn new(path: &Path, reader: Box<dyn BufRead + 'a>, packing: Packing, most_bytes: usize) -> Lines<'a> {
        Lines {
            path: path.to_path_buf(),
            reader,
            packing,
            most_bytes,
            line: Vec::new(),
            number: 0,
            ended: false,
        }
    }

    /// The next line; `None` behind the last. An error is one of the operating system.
    pub fn next_line(&mut self) -> Result<Option<Line<'_>>> {
        if self.ended {
            return Ok(None);
        }
        self.line.clear();
        let fits = match read_line(&mut *self.reader, &mut self.line, self.most_bytes) {
            Ok(_) if self.line.is_empty() => {
                self.ended = true;
                return Ok(None);
            }
            Ok(fits) => fits,
            // What the operating system reports has its number; what remains is the archive's own complaint.
            Err(e) if self.packing != Packing::Plain && e.raw_os_error().is_none() => {
                self.ended = true;
                let (path, last_line, reason) = (self.path.clone(), self.number, e.to_string());
                let text = Err(Error::DamagedArchive {
                    path,
                    last_line,
                    reason,
                });
                let number = self.number + 1;
                return Ok(Some(Line { number, text }));
            }
            Err(e) => return Err(Error::io("read", &self.path)(e)),
        };
        self.number += 1;
        let text = if fits {
            let is_first = self.number == 1;
            let text = utf8(&self.path, self.number, without_end(&self.line));
            text.map(|text| text.strip_prefix('\u{feff}').filter(|_| is_first).unwrap_or(text))
        } else {
            Err(Error::LineTooLong {
                path: self.path.clone(),
                line: self.number,
                most_mebibytes: MOST_BYTES >> 20,
            })
        };
        let number = self.number;
        Ok(Some(Line { number, text }))
    }

    /// Reads to the end. Returns how many lines the file has, as far as it can be read.
    pub fn count(mut self) -> Result<usize> {
        while self.next_line()?.is_some() {}
        Ok(self.number)
    }
}

/// Appends a line with its end. False: it is longer than `most_bytes`; the rest of it is passed over.
fn read_line(reader: &mut dyn BufRead, line: &mut Vec<u8>, most_bytes: usize) -> io::Result<bool> {
    let mut limited = reader.take(most_bytes as u64);
    limited.read_until(b'\n', line)?;
    let fits = line.len() < most_bytes || line.ends_with(b"\n");
    if !fits {
        reader.skip_until(b'\n')?;
    }
    Ok(fits)
}

fn without_end(line: &[u8]) -> &[u8] {
    let line = line.strip_suffix(b"\n").unwrap_or(line);
    line.strip_suffix(b"\r").unwrap_or(line)
}

/// Text, or where it stops being UTF-8. `bytes` starts at `line`.
pub(crate) fn utf8<'a>(path: &Path, line: usize, bytes: &'a [u8]) -> Result<&'a str> {
    std::str::from_utf8(bytes).map_err(|e| {
        let before = &bytes[..e.valid_up_to()];
        let lines_before = before.iter().filter(|byte| **byte == b'\n').count();
        let in_line = before.iter().rev().take_while(|byte| **byte != b'\n').count();
        Error::NotUtf8 {
            path: path.to_path_buf(),
            line: line + lines_before,
            column: in_line + 1,
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(bytes: &[u8], most_bytes: usize) -> Vec<(usize, String)> {
        let mut lines = Lines::new(Path::new("x.txt"), Box::new(bytes), Packing::Plain, most_bytes);
        let mut all = Vec::new();
        while let Some(line) = lines.next_line().unwrap() {
            all.push((line.number, line.text.map_or_else(|e| e.to_string(), str::to_owned)));
        }
        all
    }

    #[test]
    fn lines_lose_their_ends_and_the_byte_order_mark() {
        let all = read("\u{feff}one\r\n\ntwo \u{feff}\r\r\nthree".as_bytes(), 100);
        let all: Vec<_> = all.iter().map(|(number, text)| (*number, text.as_str())).collect();
        assert_eq!(all, [(1, "one"), (2, ""), (3, "two \u{feff}\r"), (4, "three")]);
        assert_eq!(read(b"", 100), []);
        assert_eq!(read(b"\n", 100), [(1, String::new())]);
    }

    #[test]
    fn a_line_beyond_the_limit_is_passed_over_not_kept() {
        let all = read(b"short\nmuch too long for that\nshort\n1234567\n12345678", 8);
        assert_eq!(all.len(), 5);
        assert!(all[1].1.starts_with("x.txt:2: the line is longer than"), "{}", all[1].1);
        assert_eq!((all[2].1.as_str(), all[3].1.as_str()), ("short", "1234567"));
        assert!(all[4].1.starts_with("x.txt:5: the line is longer than"), "{}", all[4].1);
    }

    #[test]
    fn the_lines_behind_bytes_that_are_no_text_are_read() {
        let all = read(b"fine\nnot \xff fine\nfine again", 100);
        assert_eq!(all[2], (3, "fine again".to_owned()));
        assert!(
            all[1]
                .1
                .contains("x.txt:2: the text is not UTF-8 (first bad byte at column 5)"),
            "{}",
            all[1].1
        );
    }
}
