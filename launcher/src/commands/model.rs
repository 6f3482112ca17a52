//! `panglot model …`: the base model's folder, Hugging Face layout.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use configs::Model;
use serde_json::json;

use super::{App, finish, stage};
use launcher::files;
use launcher::inspection::Inspection;
use launcher::stages::Stage;
use launcher::view::View;

#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// Make the model that the config names: imported from GGUF, or initialised; checked if it is a folder already
    Prepare(stage::Args),
    /// Random weights of the config's shape (model.kind: scratch)
    Init(stage::Args),
    /// Show what a model folder holds, kind by kind, and what of it a config trains; names what does not fit
    Inspect {
        /// A model folder, or a config, whose base model is shown with what trains
        #[arg(value_name = "FOLDER|CONFIG")]
        what: PathBuf,
        /// Settings of the config for this time only, such as train.full=[all]
        #[arg(value_name = "KEY=VALUE")]
        overrides: Vec<String>,
    },
    /// Read one GGUF file into a folder, without a config
    Import {
        /// The GGUF file
        #[arg(long, value_name = "FILE")]
        gguf: PathBuf,
        /// The folder to make
        #[arg(long, value_name = "FOLDER")]
        out: PathBuf,
    },
}

pub fn run(app: &App, command: &Command) -> anyhow::Result<()> {
    match command {
        Command::Prepare(args) => prepare(app, args),
        Command::Init(args) => {
            let plan = args.config.load()?;
            ensure!(
                matches!(plan.model, Model::Scratch { .. }),
                "model.kind is not scratch, so there is nothing to initialise; run `panglot model prepare {}`",
                args.config.config.display()
            );
            prepare(app, args)
        }
        Command::Inspect { what, overrides } => inspect(app, what, overrides),
        Command::Import { gguf, out } => {
            ensure!(
                gguf.is_file(),
                "--gguf {} is not a file; name a GGUF file",
                gguf.display()
            );
            ensure!(
                !out.exists(),
                "--out {} exists; name a new folder, or move it away",
                out.display()
            );
            let args = vec![
                "import-gguf".into(),
                "--gguf".into(),
                gguf.into(),
                "--out".into(),
                out.into(),
            ];
            finish(
                "importing the model",
                &app.worker()?.alone(None, args),
                &mut View::new(),
            )?;
            app.print(&json!({ "folder": out }), || {
                format!("The model is in {}", files::shown(out))
            })
        }
    }
}

fn inspect(app: &App, what: &Path, overrides: &[String]) -> anyhow::Result<()> {
    let mut args: Vec<OsString> = vec!["inspect".into(), "--model".into()];
    let is_folder = what.is_dir();
    let mut grows = false;
    if is_folder {
        ensure!(
            overrides.is_empty(),
            "{} is a folder, which has no settings to change; name a config instead",
            what.display()
        );
        args.push(what.into());
    } else {
        let plan = configs::load_for_any_ranks(what, overrides)?;
        grows = plan.vocabulary.is_some();
        let folder = &plan.folders.base_model;
        ensure!(
            folder.is_dir(),
            "{} is not there yet; run `panglot model prepare {}`",
            folder.display(),
            what.display()
        );
        args.push(folder.into());
        let full: Vec<&str> = plan.train.full.iter().map(|module| module.name()).collect();
        if !full.is_empty() {
            args.extend(["--full".into(), full.join(",").into()]);
        }
        if let Some(lora) = &plan.train.lora {
            args.extend(["--lora".into(), lora.targets.join(",").into()]);
            args.extend(["--rank".into(), lora.rank.to_string().into()]);
        }
    }
    let job = app.worker()?.alone(None, args);
    let ended = finish("inspecting the model", &job, &mut View::new())?;
    let result = ended
        .result
        .context("the worker told nothing of the model; is it of another version?")?;
    let inspection: Inspection = serde_json::from_value(result).context("what the worker told of the model")?;
    app.print(&inspection, || {
        let more = "\nwhat the vocabulary adds comes to that, see `panglot plan`";
        inspection.page(!is_folder) + if grows { more } else { "" }
    })
}

fn prepare(app: &App, args: &stage::Args) -> anyhow::Result<()> {
    let plan = args.config.load()?;
    stage::make(app, &plan, &[Stage::Model], args.force)?;
    let folder = &plan.folders.base_model;
    app.print(&json!({ "folder": folder }), || {
        format!("The base model is in {}", files::shown(folder))
    })
}
