//! The one door to TensorBoard's event files: protobuf messages in checksummed frames.
//! Source: tensorflow/core/util/event.proto, framework/summary.proto and lib/io/record_writer.h.

use std::fs::{self, File, OpenOptions};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use prost::Message;

/// Appends scalars to an event file of its own; a run that was resumed has one file an attempt, in one folder.
pub struct EventWriter {
    out: BufWriter<File>,
    path: PathBuf,
    started: bool,
}

impl EventWriter {
    /// Makes a new event file in `dir`, named so that TensorBoard reads it after those that are there.
    pub fn create(dir: &Path) -> Result<EventWriter> {
        fs::create_dir_all(dir).with_context(|| dir.display().to_string())?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let (path, file) = new_file(dir, now.as_secs())?;
        let mut writer = EventWriter {
            out: BufWriter::new(file),
            path,
            started: false,
        };
        let version = What::FileVersion("brain.Event:2".into());
        writer.event(Event {
            wall_time: now.as_secs_f64(),
            step: 0,
            what: Some(version),
        })?;
        writer.flush()?;
        Ok(writer)
    }

    /// `wall_time` in seconds since 1970. The first scalar's step tells TensorBoard where this attempt took over: what
    /// earlier files say of that step and later ones is no longer shown.
    pub fn scalar(&mut self, tag: &str, step: i64, value: f32, wall_time: f64) -> Result<()> {
        if !self.started {
            self.started = true;
            let what = Some(What::SessionLog(SessionLog { status: SESSION_START }));
            self.event(Event { wall_time, step, what })?;
        }
        let value = SummaryValue {
            tag: tag.into(),
            simple_value: Some(value),
        };
        self.event(Event {
            wall_time,
            step,
            what: Some(What::Summary(Summary { value: vec![value] })),
        })
    }

    /// Hands everything to the operating system, where TensorBoard sees it.
    pub fn flush(&mut self) -> Result<()> {
        self.out
            .flush()
            .with_context(|| format!("writing {}", self.path.display()))
    }

    fn event(&mut self, event: Event) -> Result<()> {
        self.out
            .write_all(&frame(&event.encode_to_vec()))
            .with_context(|| format!("writing {}", self.path.display()))
    }
}

/// TensorBoard reads the files of a folder in the order of their names and never goes back.
fn new_file(dir: &Path, seconds: u64) -> Result<(PathBuf, File)> {
    let host = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let host: String = host
        .trim()
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() { c } else { '-' })
        .collect();
    let mut attempt = 0;
    loop {
        let name = format!(
            "events.out.tfevents.{seconds:010}.{attempt:03}.{host}.{}",
            std::process::id()
        );
        let taken = fs::read_dir(dir)?
            .flatten()
            .any(|entry| entry.file_name().to_string_lossy().as_ref() >= name.as_str());
        if taken && attempt < 999 {
            attempt += 1;
            continue;
        }
        let path = dir.join(name);
        let file = OpenOptions::new().write(true).create_new(true).open(&path);
        return Ok((path.clone(), file.with_context(|| path.display().to_string())?));
    }
}

/// Length, its checksum, data, its checksum.
fn frame(data: &[u8]) -> Vec<u8> {
    let length = (data.len() as u64).to_le_bytes();
    [
        &length[..],
        &masked_crc(&length).to_le_bytes(),
        data,
        &masked_crc(data).to_le_bytes(),
    ]
    .concat()
}

fn masked_crc(data: &[u8]) -> u32 {
    crc32c::crc32c(data).rotate_right(15).wrapping_add(0xa282_ead8)
}

const SESSION_START: i32 = 1;

#[derive(Clone, PartialEq, Message)]
struct Event {
    #[prost(double, tag = "1")]
    wall_time: f64,
    #[prost(int64, tag = "2")]
    step: i64,
    #[prost(oneof = "What", tags = "3, 5, 7")]
    what: Option<What>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
enum What {
    #[prost(string, tag = "3")]
    FileVersion(String),
    #[prost(message, tag = "5")]
    Summary(Summary),
    #[prost(message, tag = "7")]
    SessionLog(SessionLog),
}

#[derive(Clone, PartialEq, Message)]
struct Summary {
    #[prost(message, repeated, tag = "1")]
    value: Vec<SummaryValue>,
}

#[derive(Clone, PartialEq, Message)]
struct SummaryValue {
    #[prost(string, tag = "1")]
    tag: String,
    /// Written even when 0.
    #[prost(float, optional, tag = "2")]
    simple_value: Option<f32>,
}

#[derive(Clone, PartialEq, Message)]
struct SessionLog {
    #[prost(int32, tag = "1")]
    status: i32,
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The events of a file, every checksum verified.
    fn read(path: &Path) -> Vec<Event> {
        let bytes = fs::read(path).unwrap();
        let mut rest = &bytes[..];
        let mut events = Vec::new();
        while !rest.is_empty() {
            let length = u64::from_le_bytes(rest[..8].try_into().unwrap()) as usize;
            let word = |at: usize| u32::from_le_bytes(rest[at..at + 4].try_into().unwrap());
            assert_eq!(word(8), masked_crc(&rest[..8]));
            let data = &rest[12..12 + length];
            assert_eq!(word(12 + length), masked_crc(data));
            events.push(Event::decode(data).unwrap());
            rest = &rest[16 + length..];
        }
        events
    }

    #[test]
    fn a_frame_is_as_tensorflow_writes_it() {
        // The first record of any event file that TensorFlow wrote at time 0.
        let event = Event {
            wall_time: 0.0,
            step: 0,
            what: Some(What::FileVersion("brain.Event:2".into())),
        };
        let data = event.encode_to_vec();
        assert_eq!(data, b"\x1a\x0dbrain.Event:2");
        // The masked checksum of RFC 3720's 32 zero bytes, whose CRC-32C is 0x8a9136aa.
        assert_eq!(
            masked_crc(&[0; 32]),
            0x8a91_36aa_u32.rotate_right(15).wrapping_add(0xa282_ead8)
        );
        assert_eq!(frame(&data).len(), data.len() + 16);
    }

    #[test]
    fn what_is_written_is_read_back_one_file_an_attempt() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("tensorboard");
        for attempt in 0..3 {
            let mut writer = EventWriter::create(&dir).unwrap();
            writer.scalar("loss", attempt, 2.5, 10.0).unwrap();
            writer.scalar("lr/lora", attempt, 0.0, 10.0).unwrap();
            writer.flush().unwrap();
        }
        let mut files: Vec<PathBuf> = fs::read_dir(&dir).unwrap().map(|entry| entry.unwrap().path()).collect();
        files.sort();
        assert_eq!(files.len(), 3);
        for (attempt, file) in files.iter().enumerate() {
            let events = read(file);
            assert_eq!(events.len(), 4);
            assert_eq!(
                events[1].what,
                Some(What::SessionLog(SessionLog { status: SESSION_START }))
            );
            assert_eq!((events[2].step, events[2].wall_time), (attempt as i64, 10.0));
            let scalar = |tag: &str, value| {
                let value = vec![SummaryValue {
                    tag: tag.into(),
                    simple_value: Some(value),
                }];
                Some(What::Summary(Summary { value }))
            };
            assert_eq!(
                (&events[2].what, &events[3].what),
                (&scalar("loss", 2.5), &scalar("lr/lora", 0.0))
            );
        }
    }
}
