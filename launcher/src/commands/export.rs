//! `panglot export`: the newest checkpoint as what `transformers` and PEFT load.

use configs::Plan;
use serde_json::json;

use super::{App, ConfigArgs, RunFolder, finish};
use launcher::files;
use launcher::view::View;

#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    pub config: ConfigArgs,
}

pub fn run(app: &App, args: &Args) -> anyhow::Result<()> {
    let plan = args.config.load()?;
    export(app, &plan)?;
    let run = RunFolder(&plan.folders.run);
    let (merged, adapter) = (run.merged(), run.adapter());
    app.print(&json!({ "merged": merged, "adapter": adapter }), || {
        format!(
            "merged model  {}\nPEFT adapter  {}",
            files::shown(&merged),
            files::shown(&adapter)
        )
    })
}

pub fn export(app: &App, plan: &Plan) -> anyhow::Result<()> {
    let run = RunFolder(&plan.folders.run);
    let plan_file = plan.folders.run.join("exports/plan.json");
    files::write_json(&plan_file, plan)?;
    let args = vec![
        "export".into(),
        "--plan".into(),
        plan_file.into(),
        "--merged".into(),
        run.merged().into(),
        "--adapter".into(),
        run.adapter().into(),
    ];
    finish("the export", &app.worker()?.alone(None, args), &mut View::new())?;
    Ok(())
}
