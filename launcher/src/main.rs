//! `panglot`: the command line. Small and quick to start; everything that needs libtorch happens in `panglot-worker`.

mod commands;

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use commands::{App, Failed, Leave};
use launcher::{exit, supervise};

/// Teaches a LLaMA-family model hundreds of languages.
#[derive(Debug, Parser)]
#[command(name = "panglot", version, max_term_width = 110, after_help = EXAMPLES, disable_help_subcommand = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
    /// Print the result as JSON on standard output, and nothing else there
    #[arg(long, global = true)]
    json: bool,
    /// The panglot-worker to run, if not the one beside this program
    #[arg(long, global = true, value_name = "FILE", env = "PANGLOT_WORKER")]
    worker: Option<PathBuf>,
}

const EXAMPLES: &str = "\
Examples:
  panglot demo                                  the whole road on real text, in minutes
  panglot plan configs/mala500-7b.yaml          what a config means and what it would take; starts nothing
  panglot prepare configs/demo.yaml             corpus, model, vocabulary, tokens: what is missing or stale
  panglot train configs/demo.yaml -n 2          on two ranks; the same line again resumes
  panglot train configs/demo.yaml -n 2 --restarts 3  again from the newest checkpoint when a rank is lost
  panglot train configs/tiny.yaml train.steps=5 a key of the config, for this time
  panglot submit configs/mala500-7b.yaml nodes=4 ranks_per_node=4 time=1-00:00:00 --dry-run
  panglot corpus verify configs/demo.yaml       is every language still as it was imported?
  panglot vocab configs/demo.yaml --loss=all    which start of the new rows loses least before any step
  panglot model inspect configs/demo.yaml       what the base model holds, and what of it trains
  panglot checkpoint verify configs/demo.yaml   is every byte of the run's checkpoints as it was written?
  panglot rows configs/demo.yaml --decode       what the model will read, and in which language
  panglot report configs/demo.yaml              one page to look at: runs/demo/report.html
  panglot report runs/a runs/b --csv            two runs side by side, and as tables";

#[derive(Debug, Subcommand)]
enum Command {
    /// Make the corpus: documents by language, cleaned, deduplicated, some held out; or verify it
    Corpus(commands::stage::CorpusArgs),
    /// Make the base model's folder: from a GGUF file, or random weights
    #[command(subcommand)]
    Model(commands::model::Command),
    /// Learn new pieces and extend the base tokenizer; with --loss, say what that costs before any step
    Vocab(commands::stage::VocabArgs),
    /// Tokenise the corpus into shards (Megatron's indexed format)
    Tokenize(commands::stage::Args),
    /// Make all four of the above, each unless it is there and its inputs are unchanged
    Prepare(commands::stage::Args),
    /// Train, or go on training from the newest checkpoint; prepares first what is missing
    Train(commands::train::Args),
    /// Measure a model: held-out text language by language, few-shot tasks, written text
    Eval(commands::eval::Args),
    /// List, verify, show, recut or remove a run's checkpoints
    #[command(subcommand)]
    Checkpoint(commands::checkpoint::Command),
    /// Write text behind prompts
    Generate(commands::generate::Args),
    /// Write the newest checkpoint as a merged model and as a PEFT adapter
    Export(commands::export::Args),
    /// Write a job script for the run and submit it to Slurm
    Submit(commands::submit::Args),
    /// Look at the nodes of a job, under the same srun or mpirun line as training: what would spoil a run, where, and the remedy
    Doctor(commands::doctor::Args),
    /// Where a run stands, from its files alone: step, loss, speed, time left, nodes, checkpoints
    Status(commands::status::Args),
    /// Run or submit the same training on several numbers of nodes, and tell what more nodes win
    Scale(commands::scale::Args),
    /// What a job script asks before and after its ranks
    #[command(subcommand)]
    Job(commands::job::Command),
    /// Show what a config means, every value and what follows from it; starts nothing
    Plan(commands::plan::Args),
    /// Show the rows that a run reads, or the table of what it reads of each part; starts nothing
    Rows(commands::rows::Args),
    /// Draw a run, or several side by side, as one self-contained HTML page
    Report(commands::report::Args),
    /// Walk the whole road on real text, interruption and resume included
    Demo(commands::demo::Args),
    #[command(name = supervise::TETHER, hide = true)]
    Tether {
        parent: i32,
        program: PathBuf,
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<OsString>,
    },
}

impl Command {
    /// The name of one that no rank of a job may call: it starts its own ranks, or makes folders.
    fn started_once(&self) -> Option<&'static str> {
        Some(match self {
            Command::Corpus(_) => "corpus",
            Command::Model(_) => "model",
            Command::Vocab(_) => "vocab",
            Command::Tokenize(_) => "tokenize",
            Command::Prepare(_) => "prepare",
            Command::Eval(_) => "eval",
            Command::Generate(_) => "generate",
            Command::Export(_) => "export",
            Command::Scale(_) => "scale",
            Command::Demo(_) => "demo",
            _ => return None,
        })
    }
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let app = App {
        json: cli.json,
        worker: cli.worker,
    };
    // Slurm's "save and stop", to all of a job's processes. It is meant for ranks, and no reason to die on the way to them.
    let _ = signal_hook::flag::register(signal_hook::consts::SIGUSR1, Default::default());
    let once = cli.command.started_once().map_or(Ok(()), commands::once);
    match once.and_then(|()| run(&app, cli.command)) {
        Ok(()) => ExitCode::from(exit::FINISHED as u8),
        Err(error) => ExitCode::from(report(&error) as u8),
    }
}

fn run(app: &App, command: Command) -> anyhow::Result<()> {
    match command {
        Command::Corpus(args) => commands::stage::corpus(app, &args),
        Command::Model(command) => commands::model::run(app, &command),
        Command::Vocab(args) => commands::stage::vocab(app, &args),
        Command::Tokenize(args) => commands::stage::tokenize(app, &args),
        Command::Prepare(args) => commands::stage::prepare(app, &args),
        Command::Train(args) => commands::train::run(app, &args),
        Command::Eval(args) => commands::eval::run(app, &args),
        Command::Checkpoint(command) => commands::checkpoint::run(app, &command),
        Command::Generate(args) => commands::generate::run(app, &args),
        Command::Export(args) => commands::export::run(app, &args),
        Command::Submit(args) => commands::submit::run(app, &args),
        Command::Doctor(args) => commands::doctor::run(app, &args),
        Command::Status(args) => commands::status::run(app, &args),
        Command::Scale(args) => commands::scale::run(app, &args),
        Command::Job(command) => commands::job::run(app, &command),
        Command::Plan(args) => commands::plan::run(app, &args),
        Command::Rows(args) => commands::rows::run(app, &args),
        Command::Report(args) => commands::report::run(app, &args),
        Command::Demo(args) => commands::demo::run(app, &args),
        Command::Tether { parent, program, args } => {
            let error = supervise::tether(parent, &program, &args);
            let what = format!("cannot start {} (is it installed and on the PATH?)", program.display());
            Err(anyhow::Error::new(error).context(what))
        }
    }
}

/// Prints what went wrong, unless the worker has; gives the code to leave with.
fn report(error: &anyhow::Error) -> i32 {
    if error.downcast_ref::<Leave>().is_none() {
        match error.is::<Failed>() {
            true => eprintln!("panglot: {error}"),
            false => eprintln!("panglot: {error:#}"),
        }
    }
    commands::code_of(error)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;
    use crate::commands::ConfigArgs;

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn the_examples_in_the_help_parse() {
        for line in EXAMPLES.lines().skip(1) {
            let words: Vec<_> = line.trim().split("  ").next().unwrap().split_whitespace().collect();
            // One example is longer than its column.
            let end = words.iter().position(|word| *word == "a").unwrap_or(words.len());
            Cli::try_parse_from(&words[..end]).unwrap_or_else(|error| panic!("{line}: {error}"));
        }
    }

    #[test]
    fn a_corpus_is_made_or_verified() {
        let parsed = |line: &str| {
            let Command::Corpus(args) = Cli::try_parse_from(line.split(' ')).unwrap().command else {
                panic!("corpus")
            };
            args
        };
        let made = parsed("panglot corpus c.yaml");
        assert_eq!(
            (made.config.unwrap().config.to_str(), made.force),
            (Some("c.yaml"), false)
        );
        let made = parsed("panglot corpus c.yaml seed=3 --force");
        assert_eq!(
            (made.config.unwrap().overrides, made.force),
            (vec!["seed=3".to_owned()], true)
        );
        let Some(commands::stage::CorpusCommand::Verify(config)) =
            parsed("panglot corpus verify c.yaml seed=3 --json").command
        else {
            panic!("verify")
        };
        assert_eq!(config.config.to_str(), Some("c.yaml"));
        assert!(
            Cli::try_parse_from(["panglot", "corpus"]).is_err(),
            "a config is needed"
        );
    }

    #[test]
    fn the_loss_of_a_vocabulary_is_asked_for_by_name() {
        let loss = |line: &str| {
            let Command::Vocab(args) = Cli::try_parse_from(line.split(' ')).unwrap().command else {
                panic!("vocab")
            };
            (args.loss, args.stage.config.overrides)
        };
        let some = |names: &[&str]| Some(names.iter().map(|name| (*name).to_owned()).collect());
        assert_eq!(loss("panglot vocab c.yaml"), (None, vec![]));
        assert_eq!(
            loss("panglot vocab c.yaml --loss seed=3"),
            (some(&[""]), vec!["seed=3".to_owned()])
        );
        assert_eq!(
            loss("panglot vocab c.yaml --loss=mean,normal").0,
            some(&["mean", "normal"])
        );
    }

    #[test]
    fn overrides_follow_the_config() {
        let cli = Cli::try_parse_from([
            "panglot",
            "train",
            "c.yaml",
            "-n",
            "2",
            "train.steps=5",
            "seed=3",
            "--json",
        ])
        .unwrap();
        let Command::Train(args) = cli.command else {
            panic!("train")
        };
        let ConfigArgs { config, overrides } = &args.config;
        assert_eq!((config.to_str(), args.ranks, cli.json), (Some("c.yaml"), Some(2), true));
        assert_eq!(overrides, &["train.steps=5", "seed=3"]);
    }
}
