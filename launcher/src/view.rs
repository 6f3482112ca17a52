//! Shows events while work goes on: a progress bar on a terminal, a plain line every few seconds elsewhere. On standard
//! error, so that standard output holds results only.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

use crate::events::{Event, StepMetrics};
use crate::text;

/// Between two plain lines, so that a log of a long run stays readable.
const LINE_EVERY: Duration = Duration::from_secs(5);

pub struct View {
    bar: Option<ProgressBar>,
    last_line: Option<Instant>,
    phase: String,
    pace: Pace,
    rate: Rate,
}

impl View {
    pub fn new() -> View {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::new(0);
            bar.set_style(
                ProgressStyle::with_template(BAR)
                    .expect("a constant")
                    .progress_chars("━━─"),
            );
            bar
        });
        View {
            bar,
            last_line: None,
            phase: String::new(),
            pace: Pace::default(),
            rate: Rate::default(),
        }
    }

    pub fn show(&mut self, event: &Event) {
        match event {
            Event::Phase { name } => self.phase(name),
            Event::Progress { done, total, unit } => self.progress(*done, *total, unit),
            Event::Step(step) => self.step(step),
            Event::Note { text } => self.say(text),
            // The worker has said it on standard error, at once.
            Event::Lost { .. } | Event::Beat | Event::Leaves => {}
            // Whoever asked for text shows it on standard output.
            Event::Text { .. } => {}
            Event::Done { .. } => self.finish(),
        }
    }

    /// A line that stays.
    pub fn say(&self, line: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| text::say(line)),
            None => text::say(line),
        }
    }

    pub fn finish(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }

    fn phase(&mut self, name: &str) {
        self.phase = name.to_owned();
        self.last_line = None;
        self.rate = Rate::default();
        match &self.bar {
            Some(bar) => {
                bar.reset();
                bar.set_length(0);
                bar.set_message(name.to_owned());
                bar.enable_steady_tick(Duration::from_millis(200));
            }
            None => text::say(format_args!("  {name}")),
        }
    }

    fn progress(&mut self, done: u64, total: u64, unit: &str) {
        let of_total = match unit {
            "bytes" => format!("{} of {}", text::bytes(done), text::bytes(total)),
            _ => format!("{} of {} {unit}", text::count(done), text::count(total)),
        };
        let left = self.rate.left(done, total, Instant::now());
        let left = left.map_or(String::new(), |left| format!("  {} left", text::duration(left)));
        self.draw(done, total, &format!("{}  {of_total}{left}", self.phase));
    }

    fn step(&mut self, step: &StepMetrics) {
        let left = self.pace.left(step);
        let skipped = if step.skipped { "  skipped" } else { "" };
        let line = format!(
            "step {}/{}  loss {:.3}  {} tokens/s  {} left  {}{skipped}",
            step.step + 1,
            step.steps,
            step.loss,
            text::count(step.tokens_per_second.round() as u64),
            text::duration(left),
            text::bytes(step.resident_bytes),
        );
        self.draw(step.step + 1, step.steps, &line);
    }

    fn draw(&mut self, done: u64, total: u64, line: &str) {
        if let Some(bar) = &self.bar {
            bar.set_length(total);
            bar.set_position(done);
            bar.set_message(line.to_owned());
        } else if done == total || self.last_line.is_none_or(|last| last.elapsed() >= LINE_EVERY) {
            text::say(format_args!("  {line}"));
            self.last_line = Some(Instant::now());
        }
    }
}

impl Default for View {
    fn default() -> View {
        View::new()
    }
}

/// A view that is dropped on the way out of an error leaves a clean terminal too.
impl Drop for View {
    fn drop(&mut self) {
        self.finish();
    }
}

const BAR: &str = "  {bar:28.green/dim} {msg}";

/// Seconds a step, smoothed over about ten: the first steps of a run are slow.
#[derive(Default)]
struct Pace {
    seconds: Option<f64>,
}

impl Pace {
    fn left(&mut self, step: &StepMetrics) -> Duration {
        let seconds = self
            .seconds
            .map_or(step.seconds, |mean| 0.9 * mean + 0.1 * step.seconds);
        self.seconds = Some(seconds);
        Duration::try_from_secs_f64(seconds * (step.steps - (step.step + 1).min(step.steps)) as f64).unwrap_or_default()
    }
}

/// How fast a phase goes, from its first word of progress on: what was kept from an interrupted attempt took no time.
#[derive(Default)]
struct Rate {
    first: Option<(Instant, u64)>,
}

impl Rate {
    /// `None` until a second has shown how fast it goes, and at the end.
    fn left(&mut self, done: u64, total: u64, now: Instant) -> Option<Duration> {
        let (since, before) = match self.first {
            Some((since, before)) if before <= done => (since, before),
            _ => *self.first.insert((now, done)),
        };
        let elapsed = now.duration_since(since);
        if elapsed < Duration::from_secs(1) || done == before || done >= total {
            return None;
        }
        let share = (total - done) as f64 / (done - before) as f64;
        Duration::try_from_secs_f64(elapsed.as_secs_f64() * share).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_follows_from_what_was_done_since_the_first_word() {
        let start = Instant::now();
        let at = |seconds: f64| start + Duration::from_secs_f64(seconds);
        let mut rate = Rate::default();
        // 500 were kept from an interrupted attempt: 100 in two seconds leave 400 for eight.
        assert_eq!(rate.left(500, 1000, start), None);
        assert_eq!(rate.left(510, 1000, at(0.2)), None, "too soon to tell");
        assert_eq!(rate.left(600, 1000, at(2.0)), Some(Duration::from_secs(8)));
        assert_eq!(rate.left(1000, 1000, at(10.0)), None, "done");
        assert_eq!(rate.left(10, 1000, at(11.0)), None, "something else begins");
        assert_eq!(rate.left(109, 1000, at(12.0)), Some(Duration::from_secs(9)));
    }
}
