//! `panglot report`: runs as one page to look at, and as tables for programs.

use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use configs::Plan;
use serde_json::{Value, json};

use super::{App, RunFolder};
use launcher::report::{self, Asked, Run};
use launcher::{files, text};

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Configs, or runs' folders; several are drawn side by side
    #[arg(value_name = "CONFIG|RUN", required = true)]
    pub of: Vec<PathBuf>,
    /// Where to write the page, instead of RUN/report.html, or compared.html beside it for several
    #[arg(long, value_name = "FILE")]
    pub out: Option<PathBuf>,
    /// Write all that is shown as CSV files too, into RUN/report or this folder
    #[arg(long, value_name = "FOLDER", num_args = 0..=1, require_equals = true)]
    pub csv: Option<Option<PathBuf>>,
    /// The evaluation in RUN/evaluations that others are compared with
    #[arg(long, default_value = "before", value_name = "NAME")]
    pub before: String,
    /// The evaluation in RUN/evaluations of what was trained
    #[arg(long, default_value = "after", value_name = "NAME")]
    pub after: String,
    /// Lines of language<TAB>latitude<TAB>longitude, for a map of languages of which the corpus knows no place
    #[arg(long, value_name = "TSV")]
    pub places: Option<PathBuf>,
}

pub fn run(app: &App, args: &Args) -> anyhow::Result<()> {
    ensure!(
        args.of.len() <= report::MOST_RUNS,
        "{} runs are more than one page compares; name at most {}",
        args.of.len(),
        report::MOST_RUNS
    );
    let places = args.places.as_deref().map(report::read_places).transpose()?;
    let asked = Asked {
        before: args.before.clone(),
        after: args.after.clone(),
        places: places.unwrap_or_default(),
    };
    let mut runs = Vec::new();
    for of in &args.of {
        runs.push(Run::read(&plan_of(of)?, &asked)?);
    }
    report::tell_apart(&mut runs);
    let page = write(&runs, args.out.clone())?;
    let folder = args
        .csv
        .clone()
        .map(|folder| folder.unwrap_or_else(|| beside(&runs[0].folder, &runs)));
    let csv = match &folder {
        Some(folder) => report::write_csv(&runs, folder)?,
        None => Vec::new(),
    };
    let all = || -> Value { runs.iter().map(Run::json).collect() };
    if app.json {
        return app.print(&json!({ "report": page, "csv": csv, "runs": all() }), String::new);
    }
    app.print(&(), || match &folder {
        Some(folder) => format!(
            "The report is in {}, and as {} in {}",
            files::shown(&page),
            text::counted(csv.len(), "CSV file"),
            files::shown(folder)
        ),
        None => format!("The report is in {}", files::shown(&page)),
    })
}

/// The page of one run, at the end of a road that is known to have gone well.
pub fn draw(plan: &Plan) -> anyhow::Result<PathBuf> {
    write(&[Run::read(plan, &Asked::default())?], None)
}

fn write(runs: &[Run], out: Option<PathBuf>) -> anyhow::Result<PathBuf> {
    let first = &runs[0].folder;
    let file = out.unwrap_or_else(|| match runs.len() {
        1 => RunFolder(first).report(),
        _ => first.join("compared.html"),
    });
    files::write_atomically(&file, report::page(runs).as_bytes())?;
    Ok(file)
}

fn beside(run: &Path, runs: &[Run]) -> PathBuf {
    run.join(if runs.len() == 1 { "report" } else { "compared" })
}

/// What was run, as its folder says; the config where nothing was yet. A folder that was moved or copied is read where it is.
fn plan_of(of: &Path) -> anyhow::Result<Plan> {
    if of.is_dir() {
        let mut plan: Plan = files::read_json(&RunFolder(of).plan())
            .with_context(|| format!("{} is no run's folder; name one, or a config", files::shown(of)))?;
        plan.folders.run = std::path::absolute(of)?;
        return Ok(plan);
    }
    let plan = configs::load_for_any_ranks(of, &[])?;
    let ran = RunFolder(&plan.folders.run).plan();
    Ok(match ran.is_file() {
        true => files::read_json(&ran)?,
        false => plan,
    })
}
