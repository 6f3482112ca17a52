//! `panglot eval`: bits per byte of held-out text (`nll`), few-shot classification, and the evaluation of written text. Each is
//! dealt to the ranks, keeps what is done, and goes on from there when it was interrupted.

use std::path::PathBuf;

use anyhow::{Context, ensure};
use clap::Subcommand as _;
use configs::Plan;
use corpus::Split;

use super::generate::SamplingArgs;
use super::measured::{Chosen, ModelArgs, carry_out};
use super::{App, RunFolder};
use launcher::evaluation::{Comparison, Evaluation, Nll, Paired};
use launcher::fewshot::{FewShot, FewShotResult, Protocol, TaskFile};
use launcher::measurement::{Generate, GenerationResult, Order, Sampling, Task};
use launcher::writing::{self, WritingResult};
use launcher::{files, stages::Stage};

/// `panglot eval CONFIG` is `panglot eval nll CONFIG`: written out, since a derived optional group is not seen to be given when
/// all that is given belongs to a group within it.
#[derive(Debug)]
pub struct Args(Command);

impl clap::Args for Args {
    fn augment_args(command: clap::Command) -> clap::Command {
        Command::augment_subcommands(NllArgs::augment_args(command))
            .subcommand_required(false)
            .arg_required_else_help(true)
            .args_conflicts_with_subcommands(true)
            .subcommand_negates_reqs(true)
    }

    fn augment_args_for_update(command: clap::Command) -> clap::Command {
        Self::augment_args(command)
    }
}

impl clap::FromArgMatches for Args {
    fn from_arg_matches(given: &clap::ArgMatches) -> Result<Self, clap::Error> {
        match given.subcommand() {
            Some(_) => Command::from_arg_matches(given),
            None => NllArgs::from_arg_matches(given).map(Command::Nll),
        }
        .map(Self)
    }

    fn update_from_arg_matches(&mut self, given: &clap::ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(given)?;
        Ok(())
    }
}

#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// Negative log-likelihood of held-out text, language by language, in bits and nats
    Nll(NllArgs),
    /// Classification with a few examples shown: SIB-200, Taxi1500, or a task of one's own
    #[command(name = "fewshot")]
    FewShot(FewShotArgs),
    /// What a model writes behind prompts: variety, likeness to references, language
    GenerateEval(WritingArgs),
}

#[derive(Debug, clap::Args)]
pub struct NllArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    /// The corpus to measure on, if not the config's: a folder that `panglot corpus` made
    #[arg(long, value_name = "FOLDER")]
    pub corpus: Option<PathBuf>,
    /// Only these languages
    #[arg(long, value_delimiter = ',', value_name = "LANGUAGE")]
    pub languages: Vec<String>,
    /// Documents a language, in the order of their keys
    #[arg(long, value_name = "N")]
    pub documents: Option<usize>,
    /// Tokens of a window; longer documents are scored in several
    #[arg(long, value_name = "TOKENS")]
    pub window: Option<usize>,
    /// Tokens from one window's beginning to the next's
    #[arg(long, value_name = "TOKENS")]
    pub stride: Option<usize>,
    /// A special token put before every document, or `none`
    #[arg(long, value_name = "TOKEN")]
    pub start: Option<String>,
    /// Another result, to be compared with document by document: a name in RUN/evaluations, or a file
    #[arg(long, value_name = "NAME|FILE")]
    pub baseline: Option<String>,
    /// The result's name in RUN/evaluations; by default `before` for base, `after` for merged, else the folder's
    #[arg(long)]
    pub name: Option<String>,
    /// The result's file, instead
    #[arg(long, value_name = "FILE")]
    pub out: Option<PathBuf>,
}

#[derive(Debug, clap::Args)]
pub struct FewShotArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    /// sib200, taxi1500, or a YAML file that describes a task
    #[arg(long)]
    pub task: String,
    /// The folder that holds the languages' files
    #[arg(long, value_name = "FOLDER")]
    pub data: PathBuf,
    /// mala: the whole label's log-likelihood; emma: the label's last sub-token after a newline
    #[arg(long, default_value = "mala", value_parser = protocol)]
    pub protocol: Protocol,
    #[arg(long, default_value_t = 3)]
    pub shots: usize,
    /// By which shots are drawn; by default the protocol's: 1234 (mala), 42 (emma)
    #[arg(long)]
    pub seed: Option<u64>,
    #[arg(long, value_delimiter = ',', value_name = "LANGUAGE")]
    pub languages: Vec<String>,
    /// Only the first items of each language
    #[arg(long, value_name = "N")]
    pub items: Option<usize>,
    /// Tokens of a prompt; longer ones lose their beginning
    #[arg(long, default_value_t = 2048, value_name = "TOKENS")]
    pub context: usize,
    /// Tokens in one forward pass
    #[arg(long, default_value_t = 2048, value_name = "TOKENS")]
    pub tokens_per_batch: usize,
    /// Write every label's score of every item too, beside the result
    #[arg(long)]
    pub scores: bool,
    #[arg(long)]
    pub name: Option<String>,
    #[arg(long, value_name = "FILE")]
    pub out: Option<PathBuf>,
}

fn protocol(name: &str) -> Result<Protocol, String> {
    match name {
        "mala" => Ok(Protocol::Mala),
        "emma" => Ok(Protocol::Emma),
        other => Err(format!("{other} is neither mala nor emma")),
    }
}

#[derive(Debug, clap::Args)]
pub struct WritingArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    /// Prompts, a JSON object a line: {"language": …, "prompt": …, "references": […]}
    #[arg(long, value_name = "JSONL")]
    pub prompts: PathBuf,
    #[command(flatten)]
    pub sampling: SamplingArgs,
    /// Sequences at once; changes no token
    #[arg(long, default_value_t = 8)]
    pub batch: usize,
    #[arg(long)]
    pub name: Option<String>,
    #[arg(long, value_name = "FILE")]
    pub out: Option<PathBuf>,
}

pub fn run(app: &App, args: &Args) -> anyhow::Result<()> {
    match &args.0 {
        Command::Nll(args) => nll(app, args),
        Command::FewShot(args) => few_shot(app, args),
        Command::GenerateEval(args) => generate_eval(app, args),
    }
}

fn nll(app: &App, args: &NllArgs) -> anyhow::Result<()> {
    let chosen = args.model.choose()?;
    let name = args.name.clone().unwrap_or_else(|| chosen.name.clone());
    let out = chosen.out(args.out.as_deref(), &name)?;
    let task = match (&chosen.plan, &args.corpus) {
        (Some(plan), corpus) => {
            if corpus.is_none() {
                Stage::Corpus.require(plan)?;
                require_held_out(plan)?;
            }
            // Beside the result, the plan that it was measured by.
            files::write_json(&out.with_extension("plan.json"), plan)?;
            of_plan(plan)
        }
        (None, Some(corpus)) => Nll {
            corpus: std::path::absolute(corpus)?,
            languages: Vec::new(),
            settings: configs::Evaluation {
                window: 2048,
                stride: 1024,
                tokens_per_batch: 4096,
                ..Default::default()
            },
            document_start: None,
            residual: configs::Residual::default(),
        },
        (None, None) => anyhow::bail!(
            "a model folder alone has nothing to be measured on; give --corpus FOLDER, one that `panglot corpus` made, or a \
             config with --model FOLDER"
        ),
    };
    let task = args.over(task)?;
    let order = Order {
        task: Task::Nll(task),
        ..chosen.order(&out)
    };
    carry_out(app, "evaluation", &order, &chosen, &mut |_| {})?;
    let result = Evaluation::read(&out).context("the worker finished, but its result cannot be read")?;
    let before = chosen
        .plan
        .as_ref()
        .map(|plan| RunFolder(&plan.folders.run).evaluation("before"));
    if let Some(baseline) = &args.baseline {
        let among = chosen
            .plan
            .as_ref()
            .map(|plan| RunFolder(&plan.folders.run).evaluation(baseline));
        let baseline = among
            .filter(|file| file.is_file())
            .unwrap_or_else(|| PathBuf::from(baseline));
        let paired = Paired::of(&baseline, &out)?;
        files::write_json(&out.with_extension("compared.json"), &paired)?;
        return app.print(&paired, || paired.table());
    }
    app.print(&result, || {
        let before = before
            .filter(|_| name != "before")
            .and_then(|before| Evaluation::read(&before).ok());
        before
            .and_then(|before| Some(Comparison::of(&before, &result)?.table()))
            .unwrap_or_else(|| result.table())
    })
}

impl NllArgs {
    /// The task with what the command line says of it.
    fn over(&self, mut task: Nll) -> anyhow::Result<Nll> {
        if let Some(corpus) = &self.corpus {
            task.corpus = std::path::absolute(corpus)?;
        }
        task.languages.clone_from(&self.languages);
        let settings = &mut task.settings;
        settings.documents_per_language = self.documents.or(settings.documents_per_language);
        settings.window = self.window.unwrap_or(settings.window);
        settings.stride = self
            .stride
            .unwrap_or(settings.stride.min(settings.window.saturating_sub(1)));
        settings.tokens_per_batch = settings.tokens_per_batch.max(settings.window);
        ensure!(
            settings.window >= 2 && (1..settings.window).contains(&settings.stride),
            "--window {} and --stride {}: a window holds two tokens at least and windows overlap by one at least; try --stride {}",
            settings.window,
            settings.stride,
            (settings.window / 2).max(1)
        );
        if let Some(start) = &self.start {
            task.document_start = (start != "none").then(|| start.clone());
        }
        Ok(task)
    }
}

fn of_plan(plan: &Plan) -> Nll {
    Nll {
        corpus: plan.folders.corpus.clone(),
        languages: Vec::new(),
        settings: plan.evaluation.clone(),
        document_start: plan.before_document().map(str::to_owned),
        residual: plan.train.residual,
    }
}

fn few_shot(app: &App, args: &FewShotArgs) -> anyhow::Result<()> {
    let task = TaskFile::open(&args.task)?;
    let data = std::path::absolute(&args.data)?;
    // Before a model is loaded for it.
    task.languages(&data, &args.languages)?;
    let chosen = args.model.choose()?;
    let default = format!("{}-{}-{}", chosen.name, task.name, args.protocol.name());
    let out = chosen.out(args.out.as_deref(), args.name.as_ref().unwrap_or(&default))?;
    let order = Order {
        task: Task::FewShot(Box::new(FewShot {
            task,
            data,
            languages: args.languages.clone(),
            protocol: args.protocol,
            shots: args.shots,
            seed: args.seed.unwrap_or(args.protocol.seed()),
            most_items: args.items,
            context: args.context,
            tokens_per_batch: args.tokens_per_batch.max(1),
            scores: args.scores,
        })),
        ..chosen.order(&out)
    };
    carry_out(app, "few-shot evaluation", &order, &chosen, &mut |_| {})?;
    let result: FewShotResult = files::read_json(&out)?;
    app.print(&result, || result.table())
}

/// PolyWrite's settings.
const WRITING: Sampling = Sampling {
    max_new_tokens: 512,
    temperature: 0.6,
    top_k: 0,
    top_p: 0.9,
    repetition_penalty: 1.0,
    stop: Vec::new(),
    seed: 1,
    special_tokens: true,
    ignore_end: false,
};

fn generate_eval(app: &App, args: &WritingArgs) -> anyhow::Result<()> {
    let prompts = writing::prompts(&args.prompts)?;
    let chosen = args.model.choose()?;
    let default = format!("{}-writing", chosen.name);
    let out = chosen.out(args.out.as_deref(), args.name.as_ref().unwrap_or(&default))?;
    // The texts stay: whoever doubts a number reads them.
    let texts = out.with_extension("texts.json");
    let sampling = args.sampling.over(WRITING)?;
    let order = Order {
        task: Task::Generate(Generate {
            requests: writing::requests(&prompts),
            sampling: sampling.clone(),
            batch: args.batch.max(1),
            stream: false,
        }),
        ..chosen.order(&texts)
    };
    carry_out(app, "writing", &order, &chosen, &mut |_| {})?;
    let written: GenerationResult = files::read_json(&texts)?;
    ensure!(
        written.texts.len() == prompts.len(),
        "{} has {} texts for {} prompts; remove it and measure again",
        files::shown(&texts),
        written.texts.len(),
        prompts.len()
    );
    let result = WritingResult::of(&prompts, &written.texts, sampling, written.made_by, written.seconds);
    files::write_json(&out, &result)?;
    app.print(&result, || result.table())
}

/// Measures the model in `folder` and leaves the result in the run's `evaluations`.
pub fn evaluate(app: &App, plan: &Plan, folder: PathBuf, name: &str) -> anyhow::Result<Evaluation> {
    ensure!(
        folder.join("config.json").is_file(),
        "{} holds no model (no config.json); `panglot export` writes merged, `panglot model prepare` base",
        files::shown(&folder)
    );
    require_held_out(plan)?;
    let chosen = Chosen::folder_of(plan, folder, name);
    let out = chosen.out(None, name)?;
    files::write_json(&out.with_extension("plan.json"), plan)?;
    let order = Order {
        task: Task::Nll(of_plan(plan)),
        ..chosen.order(&out)
    };
    carry_out(app, "evaluation", &order, &chosen, &mut |_| {})?;
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
