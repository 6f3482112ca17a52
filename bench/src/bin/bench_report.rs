//! How many bytes the page of a run in 534 languages has, beside the most that it may have; into bench/results/eval.json.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use bench::{Entry, Results};
use launcher::report::generated;

const MOST_BYTES: f64 = 3e6;

fn main() -> Result<()> {
    let panglot = std::env::current_exe()?.with_file_name("panglot");
    let folder = tempfile::tempdir()?;
    let run = generated::generate(&panglot, folder.path(), 534)?;
    let done = Command::new(&panglot)
        .arg("report")
        .arg(&run)
        .output()
        .context("panglot report")?;
    ensure!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    let bytes = std::fs::metadata(run.join("report.html"))?.len();
    let mut results = Results::open(Path::new("bench/results/eval.json"))?;
    results.put(
        Entry::of("report_534_bytes", bytes as f64, MOST_BYTES, "bytes").peer_is("the most that the page may have"),
    )?;
    results.print();
    Ok(())
}
