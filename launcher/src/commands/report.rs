//! `panglot report`: a run as one page to look at.

use std::path::PathBuf;

use configs::Plan;
use serde_json::json;

use super::{App, RunFolder};
use launcher::{files, report};

#[derive(Debug, clap::Args)]
pub struct Args {
    /// The config, or the run's folder
    #[arg(value_name = "CONFIG|RUN")]
    pub of: PathBuf,
    /// Where to write it, instead of RUN/report.html
    #[arg(long, value_name = "FILE")]
    pub out: Option<PathBuf>,
}

pub fn run(app: &App, args: &Args) -> anyhow::Result<()> {
    let plan = if args.of.is_dir() {
        files::read_json(&RunFolder(&args.of).plan())?
    } else {
        configs::load(&args.of, &[])?
    };
    let file = draw(&plan, args.out.clone())?;
    app.print(&json!({ "report": file }), || {
        format!("The report is in {}", files::shown(&file))
    })
}

pub fn draw(plan: &Plan, out: Option<PathBuf>) -> anyhow::Result<PathBuf> {
    let file = out.unwrap_or_else(|| RunFolder(&plan.folders.run).report());
    let run = report::Run::read(plan)?;
    files::write_atomically(&file, report::page(&run).as_bytes())?;
    Ok(file)
}
