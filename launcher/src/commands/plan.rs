//! `panglot plan`: the config with every value that a run would use, and what follows from it: parameters, memory, bytes, time,
//! which ways to divide and to recompute fit. `--scaling` has the same for many numbers of ranks.

use anyhow::{Context, bail, ensure};
use configs::planner::sizes::published;
use configs::planner::{Block, Forecast, Hardware, Parameters, Place, Sizes};
use configs::{Model, Pieces, Plan};
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::stage::tokens_read;
use super::{App, ConfigArgs};
use launcher::{files, planned, sampling, text};

#[derive(Debug, clap::Args)]
pub struct Args {
    /// The config, a YAML file
    pub config: std::path::PathBuf,
    /// Settings for this time only, such as train.zero=3, hardware=a100, and where the ranks are: nodes=4 gpus=8 (of each node)
    #[arg(value_name = "KEY=VALUE")]
    pub overrides: Vec<String>,
    /// The forecast for 8 to 1,024 ranks, eight a node, at 200 and 400 Gb/s a rank between nodes
    #[arg(long)]
    pub scaling: bool,
}

/// Where the ranks are, as far as it was said.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Asked {
    nodes: Option<usize>,
    gpus: Option<usize>,
}

pub fn run(app: &App, args: &Args) -> anyhow::Result<()> {
    let (asked, overrides) = asked(&args.overrides)?;
    let config = ConfigArgs {
        config: args.config.clone(),
        overrides,
    };
    if args.scaling {
        ensure!(
            asked == Asked::default(),
            "--scaling is of 8 to 1,024 ranks, eight a node; leave nodes= and gpus= out, or leave --scaling out"
        );
        let plan = config.load_to_train(None)?;
        let sizes = sizes(&plan).context(UNKNOWN)?;
        let table = Scaling::of(&plan, &sizes)?;
        return app.print(&table, || table.page());
    }
    // The places decide how many ranks there are, and the config is checked with them.
    let hardware = |plan: &Plan| {
        plan.hardware
            .clone()
            .unwrap_or_else(|| Hardware::usual(plan.train.device))
    };
    let place = match asked {
        Asked {
            nodes: None,
            gpus: None,
        } => None,
        Asked { nodes, gpus } => Some(Place {
            nodes: nodes.unwrap_or(1),
            ranks_per_node: gpus.map_or_else(|| anyhow::Ok(hardware(&config.load()?).per_node), anyhow::Ok)?,
        }),
    };
    let ranks = place.map(|place| format!("launch.ranks={}", place.world()));
    let plan = config.load_to_train(ranks)?;
    let hardware = hardware(&plan);
    let place = place.unwrap_or_else(|| usual_place(plan.launch.ranks, &hardware));
    let derived = Derived::of(&plan, place, &hardware)?;
    let yaml = serde_saphyr::to_string(&plan).context("the plan does not print")?;
    // Before there are tokens nothing can be said of them; what is wrong with those that are there is said.
    let made = plan.folders.tokens.join("manifest.json").is_file();
    let stream = made.then(|| sampling::stream(&plan)).transpose()?;
    let parts = stream.as_ref().map(|stream| stream.plan());
    app.print(&json!({ "plan": plan, "derived": derived, "parts": parts }), || {
        let table = stream.map(|stream| sampling::table(&plan, &stream, 10));
        page(&yaml, &derived.page(&plan), table.as_deref())
    })
}

/// `nodes=4` and `gpus=8` among the overrides, and the others.
fn asked(overrides: &[String]) -> anyhow::Result<(Asked, Vec<String>)> {
    let mut asked = Asked::default();
    let mut others = Vec::new();
    for text in overrides {
        let place = match text.split_once('=') {
            Some(("nodes", value)) => (&mut asked.nodes, value),
            // As `panglot submit` calls them, too.
            Some(("gpus" | "gpus_per_node" | "ranks_per_node", value)) => (&mut asked.gpus, value),
            _ => {
                others.push(text.clone());
                continue;
            }
        };
        match place.1.parse() {
            Ok(number) if number > 0 => *place.0 = Some(number),
            _ => bail!(
                "`{text}` is no number of them; write a whole number above 0, such as nodes=4 gpus=8, gpus being of each node"
            ),
        }
    }
    Ok((asked, others))
}

/// As many to a node as it has devices; on CPUs all on one, since a machine's ranks share it.
fn usual_place(ranks: usize, hardware: &Hardware) -> Place {
    let per_node = hardware.per_node;
    match hardware.device {
        configs::Device::Cuda if ranks > per_node && ranks.is_multiple_of(per_node) => Place {
            nodes: ranks / per_node,
            ranks_per_node: per_node,
        },
        configs::Device::Cuda if ranks > per_node => Place {
            nodes: ranks,
            ranks_per_node: 1,
        },
        _ => Place {
            nodes: 1,
            ranks_per_node: ranks,
        },
    }
}

/// What the config says, and as comments what follows from it: all of it is YAML again.
fn page(yaml: &str, derived: &str, table: Option<&str>) -> String {
    // An empty line stands before the table, where there is one.
    let lines = table.iter().flat_map(|table| std::iter::once("").chain(table.lines()));
    let table: String = lines
        .map(|line| format!("\n{}", format!("# {line}").trim_end()))
        .collect();
    format!("{}\n\n{derived}{table}", yaml.trim_end())
}

const UNKNOWN: &str = "the model's sizes are known once the base model is there (`panglot model prepare`), or its config.json \
                       alone, or by model.published";

/// What follows from a plan, and from the prepared folders as far as they are there.
#[derive(Debug, PartialEq, Serialize)]
struct Derived {
    rows_per_rank: usize,
    micro_batches: usize,
    tokens_per_step: u64,
    tokens_read: u64,
    targets: u64,
    /// None until `panglot tokenize` has counted.
    tokens_in_corpus: Option<u64>,
    passes_over_corpus: Option<f64>,
    /// None until the base model is there, or its sizes are known without.
    parameters: Option<Parameters>,
    layers: Option<usize>,
    forecast: Option<Forecast>,
}

impl Derived {
    fn of(plan: &Plan, place: Place, hardware: &Hardware) -> anyhow::Result<Derived> {
        let train = &plan.train;
        let rows_per_rank = train.rows_per_step / plan.launch.ranks;
        let tokens_in_corpus = corpus::TokenShards::open(&plan.folders.tokens).ok().map(|shards| {
            shards
                .manifest()
                .languages
                .iter()
                .map(|l| l.tokens.end - l.tokens.start)
                .sum()
        });
        let sizes = sizes(plan);
        let forecast = sizes
            .map(|sizes| Forecast::of(plan, &sizes, place, hardware))
            .transpose();
        Ok(Derived {
            rows_per_rank,
            micro_batches: rows_per_rank / train.micro_rows,
            tokens_per_step: (train.rows_per_step * train.sequence_length) as u64,
            tokens_read: tokens_read(plan),
            targets: train.targets(),
            tokens_in_corpus,
            passes_over_corpus: tokens_in_corpus.map(|tokens| tokens_read(plan) as f64 / tokens.max(1) as f64),
            parameters: sizes.map(|sizes| sizes.parameters_of(plan)),
            layers: sizes.map(|sizes| sizes.layers),
            forecast: forecast.map_err(anyhow::Error::msg)?,
        })
    }

    fn page(&self, plan: &Plan) -> String {
        let forecast = self.forecast.iter().zip(self.layers);
        let lines = forecast.flat_map(|(forecast, layers)| {
            let lines = planned::lines(plan, layers, forecast);
            [String::new(), "What it would take".to_owned()]
                .into_iter()
                .chain(lines)
        });
        let lines: String = lines
            .map(|line| format!("\n{}", format!("# {line}").trim_end()))
            .collect();
        format!("{self}{lines}")
    }
}

/// Sizes of the model that will train: from the base's own `config.json`; else from the plan, where the model is yet to be made
/// and its shape and pieces are known; else by the name under which it was published.
pub(super) fn sizes(plan: &Plan) -> Option<Sizes> {
    let config: Option<Config> = files::read_json(&plan.folders.base_model.join("config.json")).ok();
    let base = match (config, &plan.model) {
        (Some(config), Model::Scratch { shape, .. }) => Sizes::of(shape, config.vocab_size),
        (Some(config), _) => config.sizes()?,
        (None, Model::Scratch { shape, tokenizer, .. }) => match tokenizer {
            Pieces::Train { pieces, .. } => Sizes::of(shape, *pieces),
            _ => return None,
        },
        (None, Model::Folder { published: Some(name) }) => published(name)?,
        (None, _) => return None,
    };
    Some(base.extended(plan.vocabulary.as_ref()))
}

/// `config.json`, as far as sizes hang on it; in the names of both families.
#[derive(Deserialize)]
struct Config {
    vocab_size: usize,
    #[serde(alias = "n_embd")]
    hidden_size: usize,
    #[serde(alias = "n_inner")]
    intermediate_size: Option<usize>,
    #[serde(alias = "n_layer")]
    num_hidden_layers: usize,
    #[serde(alias = "n_head")]
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    #[serde(alias = "n_positions")]
    max_position_embeddings: Option<usize>,
    model_type: Option<String>,
    tie_word_embeddings: Option<bool>,
}

impl Config {
    fn sizes(&self) -> Option<Sizes> {
        let is_gpt2 = self.model_type.as_deref() == Some("gpt2");
        let heads = self.num_attention_heads;
        Some(Sizes {
            block: if is_gpt2 { Block::Gpt2 } else { Block::Llama },
            layers: self.num_hidden_layers,
            hidden: self.hidden_size,
            feed_forward: match self.intermediate_size {
                None if is_gpt2 => 4 * self.hidden_size,
                size => size?,
            },
            heads,
            kv_heads: self.num_key_value_heads.unwrap_or(heads),
            head_dim: self.head_dim.unwrap_or(self.hidden_size / heads.max(1)),
            positions: self
                .max_position_embeddings
                .unwrap_or(if is_gpt2 { 1024 } else { 2048 }),
            tied: self.tie_word_embeddings.unwrap_or(is_gpt2),
            pieces: self.vocab_size,
            rows: self.vocab_size,
        })
    }
}

impl std::fmt::Display for Derived {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let n = |number: u64| text::count(number);
        writeln!(f, "# What follows")?;
        writeln!(
            f,
            "# rows a rank         {} in {} micro-batches",
            self.rows_per_rank, self.micro_batches
        )?;
        writeln!(f, "# tokens a step       {}", n(self.tokens_per_step))?;
        write!(
            f,
            "# tokens read         {}, at most {} of them targets",
            n(self.tokens_read),
            n(self.targets)
        )?;
        match (self.tokens_in_corpus, self.passes_over_corpus) {
            (Some(tokens), Some(passes)) => write!(f, "\n# tokens there are    {}, read {passes:.2} times", n(tokens))?,
            _ => write!(f, "\n# tokens there are    known after `panglot tokenize`")?,
        }
        let Some(parameters) = &self.parameters else {
            return write!(
                f,
                "\n# parameters          known once the base model is there (`panglot model prepare`)"
            );
        };
        write!(f, "\n# pieces              {}", n(parameters.vocabulary as u64))?;
        write!(f, "\n# parameters          {}", n(parameters.total))?;
        write!(
            f,
            "\n# of them trainable   {} = {} LoRA + {} embeddings and head + {} body",
            n(parameters.trainable),
            n(parameters.lora),
            n(parameters.embeddings),
            n(parameters.body)
        )
    }
}

/// Links between nodes that the table compares, Gb/s a rank.
const LINKS: [u32; 2] = [200, 400];

/// The forecast over numbers of ranks: with the config's rows a step, as long as they can be dealt, and with its rows a rank.
#[derive(Debug, Serialize)]
struct Scaling {
    hardware: String,
    what: String,
    impossible: Option<String>,
    rows_per_rank: usize,
    rows_per_step: usize,
    lines: Vec<Line>,
}

#[derive(Debug, Serialize)]
struct Line {
    ranks: usize,
    link_gbit: u32,
    /// More ranks read more rows a step, in fewer steps.
    weak: Forecast,
    /// The config's rows a step.
    strong: Option<Forecast>,
    layers: usize,
}

impl Scaling {
    fn of(plan: &Plan, sizes: &Sizes) -> anyhow::Result<Scaling> {
        let hardware = plan
            .hardware
            .clone()
            .unwrap_or_else(|| Hardware::usual(plan.train.device));
        let rows_per_rank = plan.train.rows_per_step / plan.launch.ranks;
        let mut lines = Vec::new();
        for doubled in 3..=10 {
            let ranks: usize = 1 << doubled;
            for link_gbit in LINKS {
                let hardware = Hardware {
                    link_between: f64::from(link_gbit) * 1e9 / 8.0,
                    per_node: 8,
                    ..hardware.clone()
                };
                let place = Place {
                    nodes: ranks / 8,
                    ranks_per_node: 8,
                };
                let mut weak = plan.clone();
                weak.train.rows_per_step = rows_per_rank * ranks;
                // As many tokens in all, so that days compare.
                let rows = plan.train.steps * plan.train.rows_per_step as u64;
                weak.train.steps = rows.div_ceil(weak.train.rows_per_step as u64);
                lines.push(Line {
                    ranks,
                    link_gbit,
                    weak: Forecast::of(&weak, sizes, place, &hardware).map_err(anyhow::Error::msg)?,
                    strong: Forecast::of(plan, sizes, place, &hardware).ok(),
                    layers: sizes.layers,
                });
            }
        }
        Ok(Scaling {
            hardware: hardware.name.clone(),
            what: hardware.what.clone(),
            impossible: lines.iter().find_map(|line| line.weak.impossible.clone()),
            rows_per_rank,
            rows_per_step: plan.train.rows_per_step,
            lines,
        })
    }

    fn page(&self) -> String {
        let header = [
            ">ranks",
            ">Gb/s",
            ">memory",
            "fits",
            ">sent",
            ">step, s",
            ">waiting, s",
            ">tokens/s",
            ">efficiency",
            ">days",
            ">node-hours",
        ];
        let table = |of: fn(&Line) -> Option<&Forecast>| {
            // Of a rank among the first line's.
            let first = |gbit: u32| {
                let line = self.lines.iter().find(|line| line.link_gbit == gbit);
                line.and_then(|line| Some((of(line)?.tokens_per_second, line.ranks)))
            };
            let rows = self.lines.iter().filter_map(|line| {
                let forecast = of(line)?;
                let efficiency = first(line.link_gbit).map(|(speed, ranks)| {
                    100.0 * forecast.tokens_per_second / line.ranks as f64 / (speed / ranks as f64)
                });
                Some(vec![
                    text::count(line.ranks),
                    line.link_gbit.to_string(),
                    text::bytes(forecast.memory.total()),
                    if forecast.fits() { "yes" } else { "NO" }.to_owned(),
                    text::bytes(forecast.traffic.total()),
                    format!("{:.3}", forecast.step.total),
                    format!("{:.3}", forecast.step.exposed),
                    text::count(forecast.tokens_per_second as u64),
                    efficiency.map_or(String::new(), |share| format!("{share:.1} %")),
                    format!("{:.2}", forecast.days),
                    text::count(forecast.node_hours.ceil() as u64),
                ])
            });
            text::table(&header, rows)
        };
        format!(
            "Predicted, not measured: {} ({}), eight ranks a node\n{}\n\
             {} rows a rank, so that more ranks read more rows a step, and as many tokens in all:\n\n{}\n\n\
             {} rows a step, whatever the number of ranks:\n\n{}",
            self.hardware,
            self.what,
            self.impossible
                .as_ref()
                .map_or(String::new(), |why| format!("Impossible: {why}\n")),
            self.rows_per_rank,
            table(|line| Some(&line.weak)),
            self.rows_per_step,
            table(|line| line.strong.as_ref()),
        )
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn recipe(name: &str, overrides: &[&str]) -> Plan {
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("../configs/{name}.yaml"));
        let overrides: Vec<String> = overrides.iter().map(|text| (*text).to_owned()).collect();
        configs::load(&file, &overrides).unwrap()
    }

    fn derived(plan: &Plan) -> Derived {
        let hardware = plan
            .hardware
            .clone()
            .unwrap_or_else(|| Hardware::usual(plan.train.device));
        Derived::of(plan, usual_place(plan.launch.ranks, &hardware), &hardware).unwrap()
    }

    #[test]
    fn an_empty_line_stands_before_the_table_and_nowhere_else() {
        let plan = recipe("tiny", &["folders.prepared=no/such/folder"]);
        let derived = derived(&plan).page(&plan);
        let lines = |table: Option<&str>| -> Vec<String> {
            let shown = page("name: tiny\n", &derived, table);
            let lines = shown.lines().skip_while(|line| !line.starts_with("# tokens there are"));
            lines.skip(1).map(str::to_owned).collect()
        };
        let unknown = "# parameters          known once the base model is there (`panglot model prepare`)";
        assert_eq!(lines(None), [unknown]);
        assert_eq!(lines(Some("part  \n  a")), [unknown, "#", "# part", "#   a"]);
    }

    #[test]
    fn mala_500_has_the_parameters_that_its_paper_counts() {
        // The released figure counts 260,164 rows; padding is ours.
        let plan = recipe("mala500-7b", &["vocabulary.multiple_of=1"]);
        let parameters = sizes(&plan).unwrap().parameters_of(&plan);
        assert_eq!((parameters.trainable, parameters.lora), (2_135_457_792, 4_194_304));
        assert_eq!(parameters.total, 8_607_535_104 + parameters.lora);
    }

    #[test]
    fn a_gpt2_folder_is_counted_by_its_own_names() {
        let config = serde_json::json!({ "model_type": "gpt2", "vocab_size": 50_257, "n_embd": 768, "n_layer": 12,
            "n_head": 12, "n_positions": 1024, "n_inner": null });
        let config: Config = serde_json::from_value(config).unwrap();
        let parameters = config.sizes().unwrap().parameters(None, &configs::FullModule::ALL);
        // GPT-2 small, as published.
        assert_eq!((parameters.total, parameters.trainable), (124_439_808, 124_439_808));
    }

    #[test]
    fn places_are_asked_for_in_nodes_and_gpus_of_each() {
        let of = |texts: &[&str]| {
            let texts: Vec<String> = texts.iter().map(|text| (*text).to_owned()).collect();
            asked(&texts)
        };
        let (found, others) = of(&["nodes=4", "train.zero=3", "gpus=8"]).unwrap();
        assert_eq!(
            (found.nodes, found.gpus, &others[..]),
            (Some(4), Some(8), &["train.zero=3".to_owned()][..])
        );
        let said = of(&["nodes=four"]).unwrap_err().to_string();
        assert!(
            said.starts_with("`nodes=four` is no number of them; write a whole number above 0"),
            "{said}"
        );

        let h100 = Hardware::usual(configs::Device::Cuda);
        let place = |ranks| {
            let Place { nodes, ranks_per_node } = usual_place(ranks, &h100);
            (nodes, ranks_per_node)
        };
        assert_eq!(
            [place(3), place(8), place(16), place(12)],
            [(1, 3), (1, 8), (2, 8), (12, 1)]
        );
    }
}
