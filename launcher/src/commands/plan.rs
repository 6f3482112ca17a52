//! `panglot plan`: the config with every value that a run would use, and what follows from it.

use anyhow::Context;
use configs::{Family, FullModule, Gelu, Model, Pieces, Plan, Shape};
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::stage::tokens_read;
use super::{App, ConfigArgs};
use launcher::{files, sampling, text};

#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    pub config: ConfigArgs,
}

pub fn run(app: &App, args: &Args) -> anyhow::Result<()> {
    let plan = args.config.load()?;
    let derived = Derived::of(&plan);
    let yaml = serde_saphyr::to_string(&plan).context("the plan does not print")?;
    // Before there are tokens nothing can be said of them; what is wrong with those that are there is said.
    let made = plan.folders.tokens.join("manifest.json").is_file();
    let stream = made.then(|| sampling::stream(&plan)).transpose()?;
    let parts = stream.as_ref().map(|stream| stream.plan());
    app.print(&json!({ "plan": plan, "derived": derived, "parts": parts }), || {
        let table = stream.map(|stream| sampling::table(&plan, &stream, 10));
        page(&yaml, &derived, table.as_deref())
    })
}

/// What the config says, and as comments what follows from it: all of it is YAML again.
fn page(yaml: &str, derived: &Derived, table: Option<&str>) -> String {
    // An empty line stands before the table, where there is one.
    let lines = table.iter().flat_map(|table| std::iter::once("").chain(table.lines()));
    let table: String = lines
        .map(|line| format!("\n{}", format!("# {line}").trim_end()))
        .collect();
    format!("{}\n\n{derived}{table}", yaml.trim_end())
}

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
    /// None until the base model is there, or its shape and pieces are known without.
    parameters: Option<Parameters>,
}

#[derive(Debug, PartialEq, Serialize)]
struct Parameters {
    vocabulary: usize,
    total: u64,
    lora: u64,
    /// Trained in full: the vocabulary matrices, and learned positions.
    embeddings: u64,
    /// Trained in full: the layers' matrices and the norms.
    body: u64,
    trainable: u64,
}

impl Derived {
    fn of(plan: &Plan) -> Derived {
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
        Derived {
            rows_per_rank,
            micro_batches: rows_per_rank / train.micro_rows,
            tokens_per_step: (train.rows_per_step * train.sequence_length) as u64,
            tokens_read: tokens_read(plan),
            targets: train.targets(),
            tokens_in_corpus,
            passes_over_corpus: tokens_in_corpus.map(|tokens| tokens_read(plan) as f64 / tokens.max(1) as f64),
            parameters: base(plan).map(|(shape, pieces)| Parameters::of(plan, &shape, pieces)),
        }
    }
}

impl Parameters {
    fn of(plan: &Plan, shape: &Shape, base_pieces: usize) -> Parameters {
        let vocabulary = plan.vocabulary.as_ref().map_or(base_pieces, |v| {
            let tokens = v.special.len() + v.user_defined.len();
            (base_pieces + v.new_pieces + tokens).next_multiple_of(v.multiple_of)
        });
        let (hidden, mlp, layers) = (shape.hidden_size, shape.intermediate_size, shape.num_hidden_layers);
        // (module, inputs, outputs) of each linear of a block; whether linears and norms have biases; rows of positions
        let (linears, has_biases, positions) = match shape.family {
            Family::Llama {
                num_key_value_heads, ..
            } => {
                let kv = hidden / shape.num_attention_heads * num_key_value_heads;
                let linears = vec![
                    (FullModule::QProj, hidden, hidden),
                    (FullModule::KProj, hidden, kv),
                    (FullModule::VProj, hidden, kv),
                    (FullModule::OProj, hidden, hidden),
                    (FullModule::GateProj, hidden, mlp),
                    (FullModule::UpProj, hidden, mlp),
                    (FullModule::DownProj, mlp, hidden),
                ];
                (linears, 0, 0)
            }
            Family::Gpt2 { .. } => {
                let linears = vec![
                    (FullModule::CAttn, hidden, 3 * hidden),
                    (FullModule::CProj, hidden, hidden),
                    (FullModule::CFc, hidden, mlp),
                    (FullModule::CProj, mlp, hidden),
                ];
                (linears, 1, shape.max_position_embeddings)
            }
        };
        let of_body = |modules: &[FullModule]| -> usize {
            let of_layer = linears.iter().filter(|(module, ..)| modules.contains(module));
            let of_linears: usize = of_layer.map(|(_, a, b)| a * b + has_biases * b).sum();
            let norms = usize::from(modules.contains(&FullModule::Norms)) * (2 * layers + 1);
            layers * of_linears + norms * (1 + has_biases) * hidden
        };
        let matrix = vocabulary * hidden;
        let matrices = if shape.tie_word_embeddings { 1 } else { 2 };
        let lora = plan.train.lora.as_ref().map_or(0, |lora| {
            let named = |module: &FullModule| lora.targets.iter().any(|target| target == module.name());
            let pairs = linears.iter().filter(|(module, ..)| named(module));
            layers * pairs.map(|(_, a, b)| lora.rank * (a + b)).sum::<usize>()
        });
        // A tied matrix trains once, under whichever of its names.
        let of_vocabulary = |module: &&FullModule| matches!(module, FullModule::EmbedTokens | FullModule::LmHead);
        let full = &plan.train.full;
        let trained_positions = usize::from(full.contains(&FullModule::Positions)) * positions * hidden;
        let embeddings = full.iter().filter(of_vocabulary).count().min(matrices) * matrix + trained_positions;
        let body = of_body(full);
        Parameters {
            vocabulary,
            total: (of_body(&FullModule::ALL) + matrices * matrix + positions * hidden + lora) as u64,
            lora: lora as u64,
            embeddings: embeddings as u64,
            body: body as u64,
            trainable: (lora + embeddings + body) as u64,
        }
    }
}

/// Shape and pieces of the base model: from the model's own `config.json`, or from the plan where the model is yet to be made
/// and both are known.
fn base(plan: &Plan) -> Option<(Shape, usize)> {
    let config: Option<Config> = files::read_json(&plan.folders.base_model.join("config.json")).ok();
    match (config, &plan.model) {
        (Some(config), Model::Scratch { shape, .. }) => Some((shape.clone(), config.vocab_size)),
        (Some(config), _) => Some((config.shape()?, config.vocab_size)),
        (None, Model::Scratch { shape, tokenizer, .. }) => match tokenizer {
            Pieces::Train { pieces, .. } => Some((shape.clone(), *pieces)),
            _ => None,
        },
        (None, _) => None,
    }
}

/// `config.json`, as far as parameters hang on it; in the names of both families.
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
    n_positions: Option<usize>,
    model_type: Option<String>,
    tie_word_embeddings: Option<bool>,
}

impl Config {
    fn shape(&self) -> Option<Shape> {
        let is_gpt2 = self.model_type.as_deref() == Some("gpt2");
        // No parameters hang on ε, θ and the like.
        let family = match is_gpt2 {
            false => Family::Llama {
                num_key_value_heads: self.num_key_value_heads.unwrap_or(self.num_attention_heads),
                rms_norm_eps: 0.0,
                rope_theta: 0.0,
            },
            true => Family::Gpt2 {
                layer_norm_epsilon: 0.0,
                activation_function: Gelu::Tanh,
            },
        };
        Some(Shape {
            hidden_size: self.hidden_size,
            intermediate_size: match self.intermediate_size {
                None if is_gpt2 => 4 * self.hidden_size,
                size => size?,
            },
            num_hidden_layers: self.num_hidden_layers,
            num_attention_heads: self.num_attention_heads,
            max_position_embeddings: if is_gpt2 { self.n_positions.unwrap_or(1024) } else { 0 },
            tie_word_embeddings: self.tie_word_embeddings.unwrap_or(is_gpt2),
            family,
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

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn an_empty_line_stands_before_the_table_and_nowhere_else() {
        let recipe = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs/tiny.yaml");
        let plan = configs::load(&recipe, &["folders.prepared=no/such/folder".to_owned()]).unwrap();
        let derived = Derived::of(&plan);
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
        let recipe = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs/mala500-7b.yaml");
        // The released figure counts 260,164 rows; padding is ours.
        let plan = configs::load(&recipe, &["vocabulary.multiple_of=1".to_owned()]).unwrap();
        let llama_2_7b = llama(4096, 11_008, 32, 32, 32);
        let parameters = Parameters::of(&plan, &llama_2_7b, 32_000);
        assert_eq!((parameters.trainable, parameters.lora), (2_135_457_792, 4_194_304));
        assert_eq!(parameters.total, 8_607_535_104 + parameters.lora);

        let mut whole = plan.clone();
        (whole.train.lora, whole.train.full) = (None, FullModule::ALL.to_vec());
        let parameters = Parameters::of(&whole, &llama_2_7b, 32_000);
        assert_eq!((parameters.trainable, parameters.total), (8_607_535_104, 8_607_535_104));
    }

    fn llama(hidden: usize, mlp: usize, layers: usize, heads: usize, kv_heads: usize) -> Shape {
        Shape {
            hidden_size: hidden,
            intermediate_size: mlp,
            num_hidden_layers: layers,
            num_attention_heads: heads,
            max_position_embeddings: 4096,
            tie_word_embeddings: false,
            family: Family::Llama {
                num_key_value_heads: kv_heads,
                rms_norm_eps: 1e-5,
                rope_theta: 10_000.0,
            },
        }
    }

    #[test]
    fn llama_2_has_the_parameters_that_are_published() {
        let recipe = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs/emma500-7b.yaml");
        let plan = configs::load(&recipe, &[]).unwrap();
        for (shape, published) in [
            (llama(4096, 11_008, 32, 32, 32), 6_738_415_616),
            (llama(5120, 13_824, 40, 40, 40), 13_015_864_320),
            (llama(8192, 28_672, 80, 64, 8), 68_976_648_192),
        ] {
            let parameters = Parameters::of(&plan, &shape, 32_000);
            assert_eq!((parameters.total, parameters.trainable), (published, published));
        }
    }

    #[test]
    fn polylm_has_the_parameters_of_its_shape() {
        for (recipe, hidden, layers) in [("polylm-1.7b", 2048u64, 24), ("polylm-13b", 5120, 40)] {
            let file = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("../configs/{recipe}.yaml"));
            let plan = configs::load(&file, &["folders.prepared=no/such/folder".to_owned()]).unwrap();
            // Before there is any file: 256,000 pieces and 2,048 positions; a layer of 12 d² + 13 d, the last norm.
            let expected = (256_000 + 2048) * hidden + layers * (12 * hidden * hidden + 13 * hidden) + 2 * hidden;
            let parameters = Derived::of(&plan).parameters.unwrap();
            assert_eq!((parameters.total, parameters.trainable), (expected, expected));
            let written = match recipe {
                "polylm-1.7b" => 1_737_084_928,
                _ => 13_906_790_400,
            };
            assert_eq!(parameters.total, written, "{recipe}");
        }
    }

    #[test]
    fn a_gpt2_folder_is_counted_by_its_own_names() {
        let config = serde_json::json!({ "model_type": "gpt2", "vocab_size": 50_257, "n_embd": 768, "n_layer": 12,
            "n_head": 12, "n_positions": 1024, "n_inner": null });
        let config: Config = serde_json::from_value(config).unwrap();
        let recipe = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs/emma500-7b.yaml");
        let plan = configs::load(&recipe, &[]).unwrap();
        let parameters = Parameters::of(&plan, &config.shape().unwrap(), config.vocab_size);
        // GPT-2 small, as published.
        assert_eq!((parameters.total, parameters.trainable), (124_439_808, 124_439_808));
    }
}
