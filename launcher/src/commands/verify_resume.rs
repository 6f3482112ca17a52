//! `debug.verify_resume=K`: is a run that is killed and resumed the run that it would have been? Two runs of 2K steps in a
//! folder of their own, one of them killed after K + 1, are compared to the bit. Nothing of the run itself is touched.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use configs::Plan;
use serde_json::json;

use super::train::train;
use super::{App, Failed};
use launcher::checkpoint::manifest::step_name;
use launcher::checkpoint::{FOLDER, Manifest, verify};
use launcher::{exit, files};

/// The two differ: what is resumed is another run.
#[derive(Debug, thiserror::Error)]
#[error("a resumed run is not the run that was left alone: {what}; both are in {}", folder.display())]
pub struct Differs {
    what: String,
    folder: std::path::PathBuf,
}

pub fn run(app: &App, plan: &Plan, steps: u64) -> Result<()> {
    let folder = plan.folders.run.join("verify_resume");
    files::remove_folder(&folder)?;
    let of = |name: &str| {
        let mut plan = plan.clone();
        plan.folders.run = folder.join(name);
        plan.checkpoint.every_steps = steps;
        plan.checkpoint.every_minutes = None;
        plan.debug.verify_resume = None;
        plan.debug.stop_after = Some(2 * steps);
        plan
    };
    let (whole, resumed) = (of("left_alone"), of("killed"));
    ends_well(train(app, &whole, &mut |_| None)?.code, "the run that is left alone")?;
    let mut killed = resumed.clone();
    killed.debug.die_after = Some(steps + 1);
    let code = train(app, &killed, &mut |_| None)?.code;
    ensure!(
        killed_itself(code),
        "the run that kills itself after {} steps ended with code {code} instead; see above",
        steps + 1
    );
    let saved = resumed.folders.run.join(FOLDER).join(step_name(steps));
    verify(&saved)
        .with_context(|| format!("the run that kills itself has not come to step {steps}; nothing would be resumed"))?;
    ends_well(train(app, &resumed, &mut |_| None)?.code, "the resumed run")?;
    compare(&whole.folders.run, &resumed.folders.run, steps).map_err(|what| Differs {
        what: format!("{what:#}"),
        folder: folder.clone(),
    })?;
    let manifest = verify(&whole.folders.run.join(FOLDER).join(step_name(2 * steps)))?;
    files::remove_folder(&folder)?;
    let result = json!({ "steps": 2 * steps, "resumed_after": steps, "files": manifest.files.len(), "equal": true });
    app.print(&result, || {
        format!(
            "Resume is exact: {steps} steps, killed after {}, resumed, {steps} more: {} losses and the digests of {} files are \
             those of a run that was left alone, to the bit",
            steps + 1,
            2 * steps,
            manifest.files.len()
        )
    })
}

/// The last step may be the plan's.
fn ends_well(code: i32, what: &'static str) -> Result<()> {
    if [exit::FINISHED, exit::MORE_TIME].contains(&code) {
        return Ok(());
    }
    Err(Failed { what, code }.into())
}

/// By a signal, as mpirun or a shell tells it, or another rank that found it gone a moment before its own.
fn killed_itself(code: i32) -> bool {
    [137, 9, exit::PEER].contains(&code)
}

/// A plain value of a line of `metrics.jsonl`, as it is spelled: a reader of numbers might round two to one.
fn field<'a>(line: &'a str, key: &str) -> Option<&'a str> {
    let (_, rest) = line.split_once(&format!("\"{key}\":"))?;
    rest.split([',', '}']).next()
}

fn compare(whole: &Path, resumed: &Path, steps: u64) -> Result<()> {
    let lines = |run: &Path| -> Result<Vec<String>> {
        let path = run.join("metrics.jsonl");
        let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        Ok(text.lines().map(str::to_owned).collect())
    };
    let (theirs, ours) = (lines(whole)?, lines(resumed)?);
    ensure!(
        theirs.len() as u64 == 2 * steps && ours.len() == theirs.len(),
        "{} and {} lines of metrics.jsonl, {} were expected",
        theirs.len(),
        ours.len(),
        2 * steps
    );
    for (step, (a, b)) in theirs.iter().zip(&ours).enumerate() {
        for key in ["step", "loss", "grad_norm", "targets_so_far", "rows_digest"] {
            let (a, b) = (field(a, key), field(b, key));
            ensure!(a.is_some() && a == b, "{key} of step {step}: {a:?} and {b:?}");
        }
    }
    let state = |run: &Path| verify(&run.join(FOLDER).join(step_name(2 * steps)));
    let (theirs, ours) = (state(whole)?, state(resumed)?);
    let essence = |it: &Manifest| (it.updates, it.guard.clone(), it.next_row);
    ensure!(essence(&theirs) == essence(&ours), "updates, guard or next row");
    for (a, b) in theirs.files.iter().zip(&ours.files) {
        ensure!(a == b, "the state in {}", a.name);
    }
    ensure!(theirs.files.len() == ours.files.len(), "the number of files");
    Ok(())
}
