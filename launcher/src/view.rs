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
        }
    }

    pub fn show(&mut self, event: &Event) {
        match event {
            Event::Phase { name } => self.phase(name),
            Event::Progress { done, total, unit } => self.progress(*done, *total, unit),
            Event::Step(step) => self.step(step),
            Event::Note { text } => self.say(text),
            // The worker has said it on standard error, at once.
            Event::Lost { .. } | Event::Beat => {}
            // Whoever asked for text shows it on standard output.
            Event::Text { .. } => {}
            Event::Done { .. } => self.finish(),
        }
    }

    /// A line that stays.
    pub fn say(&self, line: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| eprintln!("{line}")),
            None => eprintln!("{line}"),
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
        match &self.bar {
            Some(bar) => {
                bar.reset();
                bar.set_length(0);
                bar.set_message(name.to_owned());
                bar.enable_steady_tick(Duration::from_millis(200));
            }
            None => eprintln!("  {name}"),
        }
    }

    fn progress(&mut self, done: u64, total: u64, unit: &str) {
        let of_total = match unit {
            "bytes" => format!("{} of {}", text::bytes(done), text::bytes(total)),
            _ => format!("{} of {} {unit}", text::count(done), text::count(total)),
        };
        self.draw(done, total, &format!("{}  {of_total}", self.phase));
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
            eprintln!("  {line}");
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
