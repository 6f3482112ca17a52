//! `panglot model …`: the base model's folder, Hugging Face layout.

use std::path::PathBuf;

use anyhow::ensure;
use configs::Model;
use serde_json::json;

use super::{App, finish, stage};
use launcher::files;
use launcher::stages::Stage;
use launcher::view::View;

#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// Make the model that the config names: imported from GGUF, or initialised; checked if it is a folder already
    Prepare(stage::Args),
    /// Random weights of the config's shape (model.kind: scratch)
    Init(stage::Args),
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

fn prepare(app: &App, args: &stage::Args) -> anyhow::Result<()> {
    let plan = args.config.load()?;
    stage::make(app, &plan, &[Stage::Model], args.force)?;
    let folder = &plan.folders.base_model;
    app.print(&json!({ "folder": folder }), || {
        format!("The base model is in {}", files::shown(folder))
    })
}
