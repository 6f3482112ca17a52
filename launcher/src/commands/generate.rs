//! `panglot generate`: text behind prompts, as it comes on the terminal, or JSONL in and out.

use std::collections::BTreeMap;
use std::io::{BufRead, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};

use super::App;
use super::measured::{ModelArgs, carry_out};
use launcher::events::Event;
use launcher::files;
use launcher::measurement::{Generate, GenerationResult, Order, Request, Sampling, Task};

#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    pub model: ModelArgs,
    /// A text to go on from; may be given several times
    #[arg(short, long, value_name = "TEXT")]
    pub prompt: Vec<String>,
    /// Prompts, a JSON object a line: {"prompt": …, "id": …, "max_new_tokens": …}; - reads standard input
    #[arg(long, value_name = "JSONL")]
    pub input: Option<PathBuf>,
    /// Where texts are written, a JSON object a line; without it they are printed
    #[arg(long, value_name = "JSONL")]
    pub out: Option<PathBuf>,
    #[command(flatten)]
    pub sampling: SamplingArgs,
    /// Sequences at once; changes no token
    #[arg(long, default_value_t = 8)]
    pub batch: usize,
}

#[derive(Debug, clap::Args)]
pub struct SamplingArgs {
    /// Most tokens of a text
    #[arg(long, value_name = "N")]
    pub max_new_tokens: Option<usize>,
    /// 0: always the likeliest token
    #[arg(long, value_name = "T")]
    pub temperature: Option<f64>,
    /// Only among the K likeliest; 0: among all
    #[arg(long, value_name = "K")]
    pub top_k: Option<usize>,
    /// Only among the likeliest that together have this probability
    #[arg(long, value_name = "P")]
    pub top_p: Option<f64>,
    /// Above 1, tokens that were there before become less likely
    #[arg(long, value_name = "FACTOR")]
    pub repetition_penalty: Option<f64>,
    /// The text ends before this; may be given several times
    #[arg(long, value_name = "TEXT")]
    pub stop: Vec<String>,
    #[arg(long)]
    pub seed: Option<u64>,
    /// Prompts as they are: nothing put around them, special tokens in them read as text
    #[arg(long)]
    pub plain: bool,
    /// Go on beyond the model's own end of a text
    #[arg(long)]
    pub ignore_end: bool,
}

impl SamplingArgs {
    /// What is given, else what `unless` says.
    pub fn over(&self, unless: Sampling) -> anyhow::Result<Sampling> {
        let sampling = Sampling {
            max_new_tokens: self.max_new_tokens.unwrap_or(unless.max_new_tokens),
            temperature: self.temperature.unwrap_or(unless.temperature),
            top_k: self.top_k.unwrap_or(unless.top_k),
            top_p: self.top_p.unwrap_or(unless.top_p),
            repetition_penalty: self.repetition_penalty.unwrap_or(unless.repetition_penalty),
            stop: self.stop.clone(),
            seed: self.seed.unwrap_or(unless.seed),
            special_tokens: !self.plain,
            ignore_end: self.ignore_end,
        };
        let Sampling {
            temperature,
            top_p,
            repetition_penalty,
            ..
        } = sampling;
        ensure!(
            temperature.is_finite() && temperature >= 0.0,
            "--temperature {temperature} is not 0 or above; 0 takes the likeliest token, 1 draws as the model says"
        );
        ensure!(
            top_p > 0.0 && top_p <= 1.0,
            "--top-p {top_p} is not above 0 and at most 1; 1 leaves all tokens"
        );
        ensure!(
            repetition_penalty.is_finite() && repetition_penalty > 0.0,
            "--repetition-penalty {repetition_penalty} is not above 0; 1 changes nothing"
        );
        ensure!(
            sampling.stop.iter().all(|stop| !stop.is_empty()),
            "--stop \"\" would end every text at once; give a text that may come"
        );
        Ok(sampling)
    }
}

pub fn run(app: &App, args: &Args) -> anyhow::Result<()> {
    let chosen = args.model.choose()?;
    let requests = requests(args)?;
    let stream = args.out.is_none() && !app.json;
    let scratch = tempfile::tempdir().context("a folder for the worker's order")?;
    let out = match &args.out {
        // Parts lie beside the result, so that an interrupted command goes on.
        Some(out) => files::beside(&std::path::absolute(out)?, "json"),
        None => scratch.path().join("texts.json"),
    };
    let order = Order {
        task: Task::Generate(Generate {
            requests,
            sampling: args.sampling.over(Sampling::default())?,
            batch: args.batch.max(1),
            stream,
        }),
        ..chosen.order(&out)
    };
    let mut in_order = InOrder::default();
    carry_out(app, "generation", &order, &chosen, &mut |event| {
        if let Event::Text { index, text, ended } = event {
            in_order.take(*index, text, *ended);
        }
    })?;
    let result: GenerationResult = files::read_json(&out)?;
    if let Some(file) = &args.out {
        write_lines(file, &result)?;
        std::fs::remove_file(&out).with_context(|| format!("cannot remove {}", out.display()))?;
        return app.print(
            &serde_json::json!({ "written": file, "new_tokens": result.new_tokens }),
            || {
                format!(
                    "{} tokens in {:.1} s, written to {}",
                    result.new_tokens,
                    result.seconds,
                    files::shown(file)
                )
            },
        );
    }
    if app.json {
        app.print(&result, String::new)?;
    }
    Ok(())
}

fn requests(args: &Args) -> anyhow::Result<Vec<Request>> {
    let mut requests: Vec<Request> = Vec::new();
    for prompt in &args.prompt {
        requests.push(Request {
            id: requests.len().into(),
            prompt: prompt.clone(),
            max_new_tokens: None,
        });
    }
    if let Some(input) = &args.input {
        let lines: Box<dyn BufRead> = if input == Path::new("-") {
            Box::new(std::io::stdin().lock())
        } else {
            let file = std::fs::File::open(input).with_context(|| format!("cannot read {}", input.display()))?;
            Box::new(std::io::BufReader::new(file))
        };
        for (number, line) in lines.lines().enumerate() {
            let line = line.with_context(|| format!("reading {}", input.display()))?;
            if line.trim().is_empty() {
                continue;
            }
            let object: Line = serde_json::from_str(&line).with_context(|| {
                format!(
                    "{}, line {}: not an object such as {{\"prompt\": \"…\"}}",
                    input.display(),
                    number + 1
                )
            })?;
            requests.push(Request {
                id: object.id.unwrap_or_else(|| requests.len().into()),
                prompt: object.prompt,
                max_new_tokens: object.max_new_tokens,
            });
        }
    }
    ensure!(
        !requests.is_empty(),
        "there is no prompt; give --prompt TEXT or --input FILE.jsonl"
    );
    Ok(requests)
}

#[derive(serde::Deserialize)]
struct Line {
    prompt: String,
    id: Option<serde_json::Value>,
    max_new_tokens: Option<usize>,
}

fn write_lines(file: &Path, result: &GenerationResult) -> anyhow::Result<()> {
    let mut lines = Vec::new();
    for text in &result.texts {
        serde_json::to_writer(&mut lines, text)?;
        lines.push(b'\n');
    }
    files::write_atomically(&std::path::absolute(file)?, &lines)
}

/// Texts come side by side and are shown one behind the other: the first as it grows, the others when it is their turn.
#[derive(Default)]
struct InOrder {
    turn: usize,
    waiting: BTreeMap<usize, (String, bool)>,
}

impl InOrder {
    fn take(&mut self, index: usize, text: &str, ended: bool) {
        let waiting = self.waiting.entry(index).or_default();
        waiting.0.push_str(text);
        waiting.1 |= ended;
        let mut out = std::io::stdout().lock();
        while let Some((text, ended)) = self.waiting.get_mut(&self.turn) {
            // A closed pipe means that nobody reads any more.
            let _ = write!(out, "{}", std::mem::take(text));
            if !*ended {
                break;
            }
            let _ = writeln!(out);
            self.waiting.remove(&self.turn);
            self.turn += 1;
        }
        let _ = out.flush();
    }
}
