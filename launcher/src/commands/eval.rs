//! `panglot eval`: bits per byte of held-out text, documents dealt to the ranks.

use std::path::PathBuf;

use anyhow::{Context, ensure};
use configs::Plan;
use corpus::Split;

use super::{App, ConfigArgs, RunFolder, finish};
use launcher::evaluation::{Comparison, Evaluation};
use launcher::view::View;
use launcher::{files, stages::Stage};

#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    pub config: ConfigArgs,
    /// base (with its own tokenizer), merged (what `panglot export` wrote), or a folder
    #[arg(long, default_value = "merged", value_name = "base|merged|FOLDER")]
    pub model: String,
    /// The result's name in RUN/evaluations; by default `before` for base, `after` for merged, else the folder's
    #[arg(long)]
    pub name: Option<String>,
    /// Ranks on this machine, instead of the config's launch.ranks
    #[arg(short = 'n', long, value_name = "N")]
    pub ranks: Option<usize>,
}

pub fn run(app: &App, args: &Args) -> anyhow::Result<()> {
    let plan = args.config.load_with(args.ranks.map(|n| format!("launch.ranks={n}")))?;
    Stage::Corpus.require(&plan)?;
    let run = RunFolder(&plan.folders.run);
    let (model, name) = match args.model.as_str() {
        "base" => (plan.folders.base_model.clone(), "before".to_owned()),
        "merged" => (run.merged(), "after".to_owned()),
        folder => {
            let folder = PathBuf::from(folder);
            let name = folder.file_name().unwrap_or_default().to_string_lossy().into_owned();
            (folder, name)
        }
    };
    let name = args.name.clone().unwrap_or(name);
    ensure!(
        !name.is_empty() && !name.contains(['/', '\\', '\0']) && !name.starts_with('.'),
        "--name {name:?} is not a plain file name; try `after`"
    );
    let result = evaluate(app, &plan, model, &name)?;
    let before = run.evaluation("before");
    app.print(&result, || {
        match Evaluation::read(&before).ok().filter(|_| name != "before") {
            Some(before) => {
                Comparison::of(&before, &result).map_or_else(|| result.table(), |comparison| comparison.table())
            }
            None => result.table(),
        }
    })
}

/// Measures the model in `folder` and leaves the result in the run's `evaluations`.
pub fn evaluate(app: &App, plan: &Plan, folder: PathBuf, name: &str) -> anyhow::Result<Evaluation> {
    ensure!(
        folder.join("config.json").is_file(),
        "{} holds no model (no config.json); `panglot export` writes merged, `panglot model prepare` base",
        files::shown(&folder)
    );
    require_held_out(plan)?;
    let out = RunFolder(&plan.folders.run).evaluation(name);
    // Beside the result, the plan that it was measured by.
    let plan_file = out.with_extension("plan.json");
    files::write_json(&plan_file, plan)?;
    let args = vec![
        "eval".into(),
        "--plan".into(),
        plan_file.into(),
        "--model".into(),
        folder.into(),
        "--out".into(),
        out.clone().into(),
    ];
    finish(
        "evaluation",
        &app.worker()?.job(plan.launch.ranks, plan.launch.threads_per_rank, args),
        &mut View::new(),
    )?;
    Evaluation::read(&out).context("the worker finished, but its result cannot be read")
}

/// Fails where there is nothing to measure on, before a model is loaded for it.
pub fn require_held_out(plan: &Plan) -> anyhow::Result<()> {
    let corpus = corpus::Corpus::open(&plan.folders.corpus)?;
    ensure!(
        corpus.manifest().total(Split::HeldOut).0 > 0,
        "{} holds no held-out text to measure on; add a source with text and set corpus.held_out above 0",
        files::shown(&plan.folders.corpus)
    );
    Ok(())
}
