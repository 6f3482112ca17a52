//! `panglot demo`: the whole road, part by part, each introduced by the line that a user would type for it.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, ensure};
use configs::Plan;
use corpus::Vocabulary;
use nix::sys::signal::Signal;
use serde::Serialize;

use super::stage;
use super::{App, Failed, RunFolder, eval, export, report, train};
use launcher::evaluation::Comparison;
use launcher::events::Event;
use launcher::report::vocabulary::{self as vocabulary_report, Fertility};
use launcher::stages::Stage;
use launcher::{exit, files, text};

#[derive(Debug, clap::Args)]
pub struct Args {
    /// The config to walk with
    #[arg(default_value = "configs/demo.yaml")]
    pub config: PathBuf,
    /// Settings for this time only, such as train.steps=20
    #[arg(value_name = "KEY=VALUE")]
    pub overrides: Vec<String>,
}

/// `RUN/summary.json`.
#[derive(Debug, Serialize)]
struct Summary {
    languages: usize,
    languages_improved: usize,
    /// Macro means over languages.
    bits_per_byte_before: f64,
    bits_per_byte_after: f64,
    new_pieces: usize,
    ranks: usize,
    /// The second attempt's first step followed the first attempt's checkpoint, and every step was taken.
    resumed: bool,
    train_tokens: u64,
    wall_seconds: f64,
    wall_seconds_by_part: Vec<(&'static str, f64)>,
    merged_model: PathBuf,
    adapter: PathBuf,
    report: PathBuf,
}

pub fn run(app: &App, args: &Args) -> anyhow::Result<()> {
    let plan = configs::load(&args.config, &args.overrides)?;
    let worth_interrupting = plan.checkpoint.every_steps + 1 < plan.train.steps;
    ensure!(
        worth_interrupting,
        "checkpoint.every_steps = {} leaves no room for an interruption in {} steps; try {}",
        plan.checkpoint.every_steps,
        plan.train.steps,
        plan.train.steps / 4
    );
    let summary = Demo {
        app,
        plan: &plan,
        typed: typed(args),
        parts: Vec::new(),
    }
    .walk()?;
    app.print(&summary, || farewell(&plan, &summary, &args.config))
}

/// The config and overrides as the user would repeat them.
fn typed(args: &Args) -> String {
    let words = std::iter::once(args.config.display().to_string()).chain(args.overrides.iter().cloned());
    words.collect::<Vec<_>>().join(" ")
}

struct Demo<'a> {
    app: &'a App,
    plan: &'a Plan,
    typed: String,
    parts: Vec<(&'static str, f64)>,
}

impl Demo<'_> {
    fn walk(mut self) -> anyhow::Result<Summary> {
        let (app, plan) = (self.app, self.plan);
        let started = Instant::now();
        set_aside(&plan.folders.run)?;

        self.part("corpus", "corpus", |demo| demo.make(Stage::Corpus))?;
        tell(stage::corpus_table(plan)?);
        self.part("model", "model prepare", |demo| demo.make(Stage::Model))?;
        let vocabulary = self.part("vocabulary", "vocab", |demo| {
            demo.make(Stage::Vocabulary)?;
            let vocabulary = Vocabulary::open(&plan.folders.vocabulary)?;
            tell(vocabulary_report::table(&vocabulary, &Fertility::measure(plan)?));
            Ok(vocabulary)
        })?;
        self.part("tokens", "tokenize", |demo| demo.make(Stage::Tokens))?;
        tell(stage::tokens_line(plan)?);
        let before = self.part("evaluation before", "eval --model base", |_| {
            eval::evaluate(app, plan, plan.folders.base_model.clone(), "before")
        })?;
        tell(before.table());
        let (last_step, interrupted) =
            self.part("training until interrupted", "train", Demo::train_until_interrupted)?;
        let first_step = self.part("training resumed", "train", Demo::train_to_the_end)?;
        self.part("export", "export", |_| export::export(app, plan))?;
        let run = RunFolder(&plan.folders.run);
        let after = self.part("evaluation after", "eval", |_| {
            eval::evaluate(app, plan, run.merged(), "after")
        })?;
        let comparison = Comparison::of(&before, &after).context("the two evaluations have no language in common")?;
        tell(comparison.table());
        let page = self.part("report", "report", |_| report::draw(plan))?;

        let summary = Summary {
            languages: comparison.changes.len(),
            languages_improved: comparison.improved(),
            bits_per_byte_before: comparison.before,
            bits_per_byte_after: comparison.after,
            new_pieces: vocabulary.pieces.len(),
            ranks: plan.launch.ranks,
            resumed: interrupted && first_step > 0 && first_step <= last_step + 1,
            train_tokens: stage::tokens_read(plan),
            wall_seconds: started.elapsed().as_secs_f64(),
            wall_seconds_by_part: self.parts,
            merged_model: run.merged(),
            adapter: run.adapter(),
            report: page,
        };
        files::write_json(&summary_file(plan), &summary)?;
        Ok(summary)
    }

    /// Prints the line that a user would type, does it, and says how long it took.
    fn part<T>(
        &mut self,
        name: &'static str,
        command: &str,
        work: impl FnOnce(&mut Self) -> anyhow::Result<T>,
    ) -> anyhow::Result<T> {
        let (subcommand, options) = command
            .split_once(" --")
            .map_or((command, String::new()), |(a, b)| (a, format!(" --{b}")));
        tell(format!("\n$ panglot {subcommand} {}{options}", self.typed));
        let started = Instant::now();
        let result = work(self)?;
        let time = started.elapsed();
        tell(format!("  ({name}: {})", text::duration(time)));
        self.parts.push((name, time.as_secs_f64()));
        Ok(result)
    }

    fn make(&mut self, stage: Stage) -> anyhow::Result<()> {
        stage::make(self.app, self.plan, &[stage], false).map(drop)
    }

    /// Trains half the way and a little beyond a checkpoint, then ends the job as a scheduler would, with SIGTERM.
    /// Gives the last step seen, and whether the job ended because of it.
    fn train_until_interrupted(&mut self) -> anyhow::Result<(u64, bool)> {
        let (steps, every) = (self.plan.train.steps, self.plan.checkpoint.every_steps);
        // At least one step past a checkpoint, so that steps are lost and taken again: the harder case.
        let stop_after = (steps / 2).max(every) + 1;
        let mut last_step = 0;
        let ended = train::train(self.app, self.plan, &mut |event| {
            let Event::Step(step) = event else { return None };
            last_step = step.step;
            let now = step.step + 1 == stop_after;
            now.then(|| {
                tell(format!(
                    "  Half-way, on purpose: SIGTERM to the job after step {stop_after} of {steps}, as a cluster does."
                ));
                Signal::SIGTERM
            })
        })?;
        let interrupted = ended.code != exit::FINISHED && last_step + 1 >= stop_after;
        if !interrupted && ended.code != exit::FINISHED {
            return Err(Failed {
                what: "training",
                code: ended.code,
            }
            .into());
        }
        tell(format!(
            "  The job is gone (exit code {}). The same line again:",
            ended.code
        ));
        Ok((last_step, interrupted))
    }

    /// Gives the first step taken.
    fn train_to_the_end(&mut self) -> anyhow::Result<u64> {
        let mut first_step = None;
        let ended = train::train(self.app, self.plan, &mut |event| {
            if let Event::Step(step) = event {
                first_step.get_or_insert(step.step);
            }
            None
        })?;
        ensure!(
            ended.code == exit::FINISHED,
            Failed {
                what: "training",
                code: ended.code
            }
        );
        Ok(first_step.unwrap_or(0))
    }
}

/// What is meant for people goes to standard error while work goes on, as all progress does.
fn tell(line: String) {
    eprintln!("{line}");
}

/// The demo trains afresh; the run before is kept, once.
fn set_aside(run: &Path) -> anyhow::Result<()> {
    if !run.exists() {
        return Ok(());
    }
    let previous = files::beside(run, "previous");
    files::remove_folder(&previous)?;
    fs::rename(run, &previous).with_context(|| format!("cannot move {} aside", run.display()))?;
    tell(format!(
        "The run before is now in {}; prepared stages are kept.",
        files::shown(&previous)
    ));
    Ok(())
}

fn summary_file(plan: &Plan) -> PathBuf {
    plan.folders.run.join("summary.json")
}

fn farewell(plan: &Plan, summary: &Summary, config: &Path) -> String {
    let config = config.display();
    let run = files::shown(&plan.folders.run);
    let rows = summary.wall_seconds_by_part.iter().map(|(name, seconds)| {
        vec![
            (*name).to_owned(),
            text::duration(std::time::Duration::from_secs_f64(*seconds)),
        ]
    });
    format!(
        "\n{}\n\n\
         {} of {} languages improved; bits per byte {:.3} → {:.3} ({}), on text never trained on.\n\
         Interrupted and resumed: {}.\n\n\
         Look at   {run}/report.html\n\
         Model     {run}/exports/merged    (transformers loads it as it is)\n\
         Adapter   {run}/exports/adapter   (PEFT)\n\
         Numbers   {run}/summary.json, {run}/metrics.jsonl, {run}/evaluations/\n\n\
         Next:\n  \
         panglot plan {config}                      every setting, and what follows from it\n  \
         panglot train {config} -n 2 train.steps=200 folders.run=runs/longer\n  \
         panglot plan configs/mala500-7b.yaml       the recipe for a cluster",
        text::table(&["part", ">time"], rows),
        text::count(summary.languages_improved),
        text::count(summary.languages),
        summary.bits_per_byte_before,
        summary.bits_per_byte_after,
        text::change(summary.bits_per_byte_before, summary.bits_per_byte_after),
        if summary.resumed { "yes" } else { "no" },
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_demo_s_own_config_leaves_room_for_the_interruption() {
        let recipe = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs/demo.yaml");
        let plan = configs::load(&recipe, &[]).unwrap();
        assert!(plan.checkpoint.every_steps < plan.train.steps / 2);
        assert_eq!(plan.launch.ranks, 2);
        assert!(plan.train.rows_per_step.is_multiple_of(2 * plan.train.micro_rows));
    }

    #[test]
    fn an_earlier_run_is_set_aside_once() {
        let folder = tempfile::tempdir().unwrap();
        let run = folder.path().join("demo");
        for content in ["first", "second"] {
            fs::create_dir_all(&run).unwrap();
            fs::write(run.join("plan.json"), content).unwrap();
            set_aside(&run).unwrap();
            assert!(!run.exists());
            let kept = fs::read_to_string(folder.path().join("demo.previous/plan.json")).unwrap();
            assert_eq!(kept, content);
        }
    }
}
