//! What a rank did when, as a file that opens in Perfetto (ui.perfetto.dev) and in Chrome's about:tracing: Chrome's trace
//! events, a JSON array with one complete event a line. A process a rank; one row for its work, one for its waiting.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::Path;
use std::sync::Mutex;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use launcher::pulse::{Phase, State};

/// A long run's timeline ends here: no viewer opens more.
const MOST_BYTES: u64 = 256 << 20;
const WORK: u32 = 1;
const WAITING: u32 = 2;

pub struct Timeline {
    rank: usize,
    /// Ranks' clocks are compared by the wall clock at the start, and count by the monotonic one from there.
    start: Instant,
    start_micros: f64,
    inner: Mutex<Inner>,
}

struct Inner {
    out: BufWriter<File>,
    written: u64,
    /// What the rank does now, and since when.
    now: Option<(State, Instant)>,
}

impl Timeline {
    /// A new file; what an earlier attempt left under this name goes.
    pub fn create(path: &Path, rank: usize, host: &str) -> io::Result<Timeline> {
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder)?;
        }
        let mut out = BufWriter::new(File::create(path)?);
        let name = serde_json::json!({ "name": format!("rank {rank} on {host}") });
        write!(
            out,
            "[\n{{\"name\":\"process_name\",\"ph\":\"M\",\"pid\":{rank},\"args\":{name}}}"
        )?;
        for (thread, name) in [(WORK, "work"), (WAITING, "waiting for ranks")] {
            let thread_name = "{\"name\":\"thread_name\",\"ph\":\"M\"";
            write!(
                out,
                ",\n{thread_name},\"pid\":{rank},\"tid\":{thread},\"args\":{{\"name\":\"{name}\"}}}}"
            )?;
        }
        let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Ok(Timeline {
            rank,
            start: Instant::now(),
            start_micros: since_epoch.as_secs_f64() * 1e6,
            inner: Mutex::new(Inner {
                out,
                written: 0,
                now: None,
            }),
        })
    }

    /// The rank begins something, and so ends what it did before.
    pub fn at(&self, state: &State) {
        let now = Instant::now();
        let Ok(mut inner) = self.inner.lock() else { return };
        if let Some((before, since)) = inner.now.replace((*state, now)) {
            self.write(&mut inner, &name_of(&before), WORK, since, now, ("step", before.step));
        }
        // A killed rank's timeline lacks its last step only.
        if state.phase == Phase::Batch {
            let _ = inner.out.flush();
        }
    }

    /// It has waited for others, from `started` until now.
    pub fn waited(&self, collective: &str, number: u64, started: Instant) {
        let now = Instant::now();
        let Ok(mut inner) = self.inner.lock() else { return };
        self.write(&mut inner, collective, WAITING, started, now, ("number", number));
    }

    fn write(&self, inner: &mut Inner, name: &str, row: u32, from: Instant, to: Instant, (key, value): (&str, u64)) {
        if inner.written > MOST_BYTES {
            return;
        }
        let at = self.start_micros + from.duration_since(self.start).as_secs_f64() * 1e6;
        let took = to.duration_since(from).as_secs_f64() * 1e6;
        let rank = self.rank;
        let line = format!(
            ",\n{{\"name\":\"{name}\",\"ph\":\"X\",\"ts\":{at:.1},\"dur\":{took:.1},\"pid\":{rank},\"tid\":{row},\
             \"args\":{{\"{key}\":{value}}}}}"
        );
        inner.written += line.len() as u64;
        // A full disk must not end a run that only wanted to be looked at.
        let _ = inner.out.write_all(line.as_bytes());
    }
}

/// Viewers read a file without its last bracket too.
impl Drop for Timeline {
    fn drop(&mut self) {
        let now = Instant::now();
        if let Ok(mut inner) = self.inner.lock() {
            if let Some((last, since)) = inner.now.take() {
                self.write(&mut inner, &name_of(&last), WORK, since, now, ("step", last.step));
            }
            let _ = inner.out.write_all(b"\n]\n").and_then(|()| inner.out.flush());
        }
    }
}

fn name_of(state: &State) -> String {
    match state.phase {
        Phase::Forward | Phase::Backward => format!("{} {}", state.phase.name(), state.stage),
        phase => phase.name().to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;

    #[test]
    fn spans_follow_each_other_and_waits_lie_beside_them() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("timeline/rank-3.json");
        let timeline = Timeline::create(&path, 3, "n\"1").unwrap();
        let state = |phase, stage| State {
            phase,
            stage,
            step: 12,
            ..State::default()
        };
        let phases = [
            (Phase::Batch, 0),
            (Phase::Forward, 0),
            (Phase::Forward, 1),
            (Phase::Backward, 1),
        ];
        for (phase, stage) in phases {
            timeline.at(&state(phase, stage));
            std::thread::sleep(std::time::Duration::from_millis(2));
        }
        timeline.waited("reduce-scatter", 31, Instant::now());
        drop(timeline);
        let events: Vec<Value> = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
        let spans: Vec<&Value> = events.iter().filter(|event| event["ph"] == "X").collect();
        let work: Vec<&Value> = spans.iter().copied().filter(|span| span["tid"] == WORK).collect();
        let names: Vec<&str> = work.iter().map(|span| span["name"].as_str().unwrap()).collect();
        assert_eq!(names, ["making the batch", "forward 0", "forward 1", "backward 1"]);
        for (span, next) in work.iter().zip(&work[1..]) {
            let end = span["ts"].as_f64().unwrap() + span["dur"].as_f64().unwrap();
            assert!((end - next["ts"].as_f64().unwrap()).abs() < 1.0, "microseconds");
            assert!(span["dur"].as_f64().unwrap() > 1900.0 && span["pid"] == 3 && span["args"]["step"] == 12);
        }
        assert_eq!(spans.last().unwrap()["name"], "backward 1");
        let waits: Vec<&Value> = spans.iter().copied().filter(|span| span["tid"] == WAITING).collect();
        assert!(waits.len() == 1 && waits[0]["name"] == "reduce-scatter" && waits[0]["args"]["number"] == 31);
        assert_eq!(events[0]["args"]["name"], "rank 3 on n\"1");
    }
}
