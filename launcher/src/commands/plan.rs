//! `panglot plan`: the config with every value that a run would use, and what follows from it.

use std::path::Path;

use anyhow::Context;
use configs::{FullModule, Group, Model, Plan, Shape};
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
    /// None until the base model is there.
    parameters: Option<Parameters>,
}

#[derive(Debug, PartialEq, Serialize)]
struct Parameters {
    vocabulary: usize,
    total: u64,
    lora: u64,
    /// Trained in full: the vocabulary matrices.
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
        let kv = hidden / shape.num_attention_heads * shape.num_key_value_heads;
        // (inputs, outputs) of each linear layer of a block
        let linear = |name: &str| match name {
            "q_proj" | "o_proj" => (hidden, hidden),
            "k_proj" | "v_proj" => (hidden, kv),
            "down_proj" => (mlp, hidden),
            _ => (hidden, mlp),
        };
        let of_modules = |modules: &[FullModule]| -> usize {
            let of_layer = modules.iter().filter(|module| module.group() == Group::Body);
            let matrices: usize = of_layer.map(|module| linear(module.name())).map(|(a, b)| a * b).sum();
            let norms = modules.contains(&FullModule::Norms);
            layers * matrices + if norms { (2 * layers + 1) * hidden } else { 0 }
        };
        let matrix = vocabulary * hidden;
        let matrices = if shape.tie_word_embeddings { 1 } else { 2 };
        let lora = plan.train.lora.as_ref().map_or(0, |lora| {
            let pairs = lora.targets.iter().map(|name| linear(name));
            layers * pairs.map(|(a, b)| lora.rank * (a + b)).sum::<usize>()
        });
        // A tied matrix trains once, under whichever of its names.
        let of_vocabulary = |module: &&FullModule| matches!(module, FullModule::EmbedTokens | FullModule::LmHead);
        let embeddings = plan.train.full.iter().filter(of_vocabulary).count().min(matrices) * matrix;
        let body = of_modules(&plan.train.full);
        Parameters {
            vocabulary,
            total: (of_modules(&FullModule::ALL) + matrices * matrix + lora) as u64,
            lora: lora as u64,
            embeddings: embeddings as u64,
            body: body as u64,
            trainable: (lora + embeddings + body) as u64,
        }
    }
}

/// Shape and pieces of the base model, from the plan or from the model's own `config.json`.
fn base(plan: &Plan) -> Option<(Shape, usize)> {
    #[derive(Deserialize)]
    struct Config {
        vocab_size: usize,
        hidden_size: usize,
        intermediate_size: usize,
        num_hidden_layers: usize,
        num_attention_heads: usize,
        num_key_value_heads: Option<usize>,
        #[serde(default)]
        tie_word_embeddings: bool,
    }
    let read = |folder: &Path| files::read_json::<Config>(&folder.join("config.json")).ok();
    let config = read(&plan.folders.base_model)?;
    let shape = match &plan.model {
        Model::Scratch { shape, .. } => shape.clone(),
        _ => Shape {
            hidden_size: config.hidden_size,
            intermediate_size: config.intermediate_size,
            num_hidden_layers: config.num_hidden_layers,
            num_attention_heads: config.num_attention_heads,
            num_key_value_heads: config.num_key_value_heads.unwrap_or(config.num_attention_heads),
            tie_word_embeddings: config.tie_word_embeddings,
            // No parameters hang on these.
            max_position_embeddings: 0,
            rms_norm_eps: 0.0,
            rope_theta: 0.0,
        },
    };
    Some((shape, config.vocab_size))
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
        let llama_2_7b = Shape {
            hidden_size: 4096,
            intermediate_size: 11_008,
            num_hidden_layers: 32,
            num_attention_heads: 32,
            num_key_value_heads: 32,
            max_position_embeddings: 4096,
            rms_norm_eps: 1e-5,
            rope_theta: 10_000.0,
            tie_word_embeddings: false,
        };
        let parameters = Parameters::of(&plan, &llama_2_7b, 32_000);
        assert_eq!((parameters.trainable, parameters.lora), (2_135_457_792, 4_194_304));
        assert_eq!(parameters.total, 8_607_535_104 + parameters.lora);

        let mut whole = plan.clone();
        (whole.train.lora, whole.train.full) = (None, FullModule::ALL.to_vec());
        let parameters = Parameters::of(&whole, &llama_2_7b, 32_000);
        assert_eq!((parameters.trainable, parameters.total), (8_607_535_104, 8_607_535_104));
    }
}
