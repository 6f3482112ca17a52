//! What evaluations and generation share on the command line: which model, and the order to the worker.

use std::path::{Path, PathBuf};

use anyhow::{Context, bail, ensure};
use configs::{Device, Plan, Precision};

use super::{App, Failed, RunFolder, watch};
use launcher::checkpoint::{Best, FOLDER};
use launcher::events::Event;
use launcher::measurement::{Generate, ModelRef, Order, Sampling, Task};
use launcher::place::shown_gpus;
use launcher::view::View;
use launcher::{exit, files};

#[derive(Debug, clap::Args)]
pub struct ModelArgs {
    /// A config (--model says which of its models), or a Hugging Face folder of a LLaMA or GPT-2 model
    #[arg(value_name = "CONFIG|FOLDER")]
    pub of: PathBuf,
    /// Settings of the config for this time only, such as train.device=cuda
    #[arg(value_name = "KEY=VALUE")]
    pub overrides: Vec<String>,
    /// Of a config: base (with its own tokenizer), merged (what `panglot export` wrote; the default), checkpoint (the newest),
    /// checkpoint:STEP, best (the checkpoint that was best on held-out text), or a folder
    #[arg(long, value_name = "MODEL")]
    pub model: Option<String>,
    /// f32 or bf16; by default the config's, of a folder f32
    #[arg(long, value_parser = precision)]
    pub precision: Option<Precision>,
    /// Ranks on this machine, instead of the config's launch.ranks as far as it has room for them (of a folder: 1)
    #[arg(short = 'n', long, value_name = "N")]
    pub ranks: Option<usize>,
    /// Threads of a rank; by default the cores are shared
    #[arg(long, value_name = "N")]
    pub threads: Option<usize>,
}

fn precision(name: &str) -> Result<Precision, String> {
    match name {
        "f32" => Ok(Precision::F32),
        "bf16" => Ok(Precision::Bf16),
        other => Err(format!("{other} is neither f32 nor bf16")),
    }
}

/// A model that was chosen, and how it is to be run.
pub struct Chosen {
    pub plan: Option<Plan>,
    pub model: ModelRef,
    /// For results: `before`, `after`, `checkpoint-40`, or the folder's name.
    pub name: String,
    precision: Precision,
    ranks: usize,
    threads: Option<usize>,
}

/// The config's ranks may be a cluster's: here there are not more than GPUs are shown, or cores.
pub fn ranks_here(plan: &Plan) -> usize {
    let room = match plan.train.device {
        Device::Cuda => shown_gpus().map_or(1, |gpus| gpus.len()),
        Device::Cpu => std::thread::available_parallelism().map_or(1, usize::from),
    };
    plan.launch.ranks.min(room).max(1)
}

impl ModelArgs {
    pub fn choose(&self) -> anyhow::Result<Chosen> {
        if self.of.is_dir() {
            ensure!(
                self.model.is_none() && self.overrides.is_empty(),
                "{} is a model folder: --model and KEY=VALUE belong to a config",
                self.of.display()
            );
            let folder = std::path::absolute(&self.of)?;
            return Ok(Chosen {
                name: name_of(&folder),
                model: existing(folder)?,
                plan: None,
                precision: self.precision.unwrap_or(Precision::F32),
                ranks: self.ranks.unwrap_or(1),
                threads: self.threads,
            });
        }
        let plan = configs::load_for_any_ranks(&self.of, &self.overrides)?;
        let (model, name) = self.of_plan(&plan)?;
        Ok(Chosen {
            precision: self.precision.unwrap_or(plan.train.precision),
            ranks: self.ranks.unwrap_or_else(|| ranks_here(&plan)),
            threads: self.threads.or(plan.launch.threads_per_rank),
            plan: Some(plan),
            model,
            name,
        })
    }

    fn of_plan(&self, plan: &Plan) -> anyhow::Result<(ModelRef, String)> {
        let run = RunFolder(&plan.folders.run);
        let checkpoint = |step: Option<u64>| ModelRef::Checkpoint {
            plan: Box::new(plan.clone()),
            step,
        };
        Ok(match self.model.as_deref().unwrap_or("merged") {
            "base" => (existing(plan.folders.base_model.clone())?, "before".to_owned()),
            "merged" => (existing(run.merged())?, "after".to_owned()),
            "checkpoint" => (checkpoint(None), "checkpoint".to_owned()),
            "best" => {
                let best = Best::read(&plan.folders.run.join(FOLDER))?.context(
                    "this run knows no best checkpoint; set evaluation.every_steps, or name one with checkpoint:STEP",
                )?;
                (checkpoint(Some(best.step)), "best".to_owned())
            }
            other => match other.strip_prefix("checkpoint:") {
                Some(step) => {
                    let step = step
                        .parse()
                        .with_context(|| format!("--model {other}: {step:?} is not a step"))?;
                    (checkpoint(Some(step)), format!("checkpoint-{step}"))
                }
                None => {
                    let folder = std::path::absolute(other)?;
                    (existing(folder.clone())?, name_of(&folder))
                }
            },
        })
    }
}

fn name_of(folder: &Path) -> String {
    folder.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

fn existing(folder: PathBuf) -> anyhow::Result<ModelRef> {
    ensure!(
        folder.join("config.json").is_file(),
        "{} holds no model (no config.json); `panglot export` writes merged, `panglot model prepare` base",
        files::shown(&folder)
    );
    Ok(ModelRef::Folder(folder))
}

impl Chosen {
    /// A folder measured as a plan says.
    pub fn folder_of(plan: &Plan, folder: PathBuf, name: &str) -> Chosen {
        Chosen {
            model: ModelRef::Folder(folder),
            name: name.to_owned(),
            precision: plan.train.precision,
            ranks: ranks_here(plan),
            threads: plan.launch.threads_per_rank,
            plan: Some(plan.clone()),
        }
    }

    /// An order for this model; its task is to be put in.
    pub fn order(&self, out: &Path) -> Order {
        let nothing = Generate {
            requests: Vec::new(),
            sampling: Sampling::default(),
            batch: 1,
            stream: false,
        };
        let run = self.plan.as_ref().map(|plan| &plan.folders.run);
        Order {
            model: self.model.clone(),
            precision: self.precision,
            device: self
                .plan
                .as_ref()
                .map_or(configs::Device::Cpu, |plan| plan.train.device),
            threads_per_rank: self.threads,
            logs: run.map(|run| run.join("logs")),
            task: Task::Generate(nothing),
            out: out.to_owned(),
        }
    }

    /// Where a result goes: as named, or among the run's evaluations, or in `evaluations/` here.
    pub fn out(&self, named: Option<&Path>, name: &str) -> anyhow::Result<PathBuf> {
        ensure!(
            !name.is_empty() && !name.contains(['/', '\\', '\0']) && !name.starts_with('.'),
            "--name {name:?} is not a plain file name; try `after`"
        );
        Ok(match (named, &self.plan) {
            (Some(file), _) => std::path::absolute(file)?,
            (None, Some(plan)) => {
                files::make_private(&plan.folders.run)?;
                RunFolder(&plan.folders.run).evaluation(name)
            }
            (None, None) => std::path::absolute(Path::new("evaluations"))?.join(format!("{name}.json")),
        })
    }
}

/// Hands the order to a worker, beside the result's place, and waits for it.
pub fn carry_out(
    app: &App,
    what: &'static str,
    order: &Order,
    chosen: &Chosen,
    also: &mut dyn FnMut(&Event),
) -> anyhow::Result<()> {
    let file = files::beside(&order.out, "order.json");
    files::write_json(&file, order)?;
    let args = vec!["measure".into(), "--order".into(), file.clone().into()];
    let job = app.worker()?.job(chosen.ranks, chosen.threads, args);
    let ended = watch(&job, &mut View::new(), &mut |event| {
        also(event);
        None
    })?;
    if ended.code != exit::FINISHED {
        return Err(Failed { what, code: ended.code }.into());
    }
    if let Err(error) = std::fs::remove_file(&file) {
        bail!("cannot remove {}: {error}", file.display());
    }
    Ok(())
}
