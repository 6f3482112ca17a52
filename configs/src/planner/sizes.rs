//! A model's sizes, as far as parameters, memory and work hang on them: counted from its shape alone, without its weights.
//! `trainer/tests/planner.rs` compares what is counted here with what the trainer registers.

use serde::Serialize;

use crate::plan::{Family, FullModule, Lora, Plan, Shape, Vocabulary};

/// What a block is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Block {
    /// RMSNorm, q, k and v apart, SwiGLU, rotary positions, no biases.
    Llama,
    /// LayerNorm, q, k and v in one, GELU, learned positions, biases.
    Gpt2,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Sizes {
    pub block: Block,
    pub layers: usize,
    pub hidden: usize,
    pub feed_forward: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    /// Longest row. Each position is a row of a matrix in [`Block::Gpt2`].
    pub positions: usize,
    /// Embedding and head are one matrix.
    pub tied: bool,
    /// Pieces that can be predicted.
    pub pieces: usize,
    /// Rows of the vocabulary matrices: pieces and padding.
    pub rows: usize,
}

/// A linear map of every layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinearSize {
    pub module: FullModule,
    pub input: usize,
    pub out: usize,
}

/// Elements, and those of them that train.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Parameters {
    /// Rows of the vocabulary matrices.
    pub vocabulary: usize,
    pub total: u64,
    pub trainable: u64,
    pub lora: u64,
    /// Trained in full: the vocabulary matrices, and learned positions.
    pub embeddings: u64,
    /// Trained in full: the layers' matrices, norms and biases.
    pub body: u64,
}

/// Flat buckets of weights, as `sharding` lays them out: one for each of the model's stages that has any.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Buckets {
    /// Elements of each bucket, padding not counted.
    pub numels: Vec<usize>,
    /// The buckets that each stage reads, in forward order. A tied head reads the embedding's.
    pub stages: Vec<Vec<usize>>,
}

/// What of a stage's weights trains and what is frozen, in elements.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Stage {
    trained: usize,
    frozen: usize,
}

impl Stage {
    fn add(&mut self, elements: usize, trains: bool) {
        *if trains { &mut self.trained } else { &mut self.frozen } += elements;
    }
}

impl Sizes {
    /// `base_pieces`: of the base model, whose matrices have as many rows.
    pub fn of(shape: &Shape, base_pieces: usize) -> Sizes {
        let (block, kv_heads) = match shape.family {
            Family::Llama {
                num_key_value_heads, ..
            } => (Block::Llama, num_key_value_heads),
            Family::Gpt2 { .. } => (Block::Gpt2, shape.num_attention_heads),
        };
        Sizes {
            block,
            layers: shape.num_hidden_layers,
            hidden: shape.hidden_size,
            feed_forward: shape.intermediate_size,
            heads: shape.num_attention_heads,
            kv_heads,
            head_dim: shape.hidden_size / shape.num_attention_heads.max(1),
            positions: shape.max_position_embeddings,
            tied: shape.tie_word_embeddings,
            pieces: base_pieces,
            rows: base_pieces,
        }
    }

    /// The same model after its vocabulary was extended. Pieces that the base has already are not foreseen.
    pub fn extended(self, vocabulary: Option<&Vocabulary>) -> Sizes {
        vocabulary.map_or(self, |v| {
            let pieces = self.pieces + v.new_pieces + v.special.len() + v.user_defined.len();
            Sizes {
                pieces,
                rows: pieces.next_multiple_of(v.multiple_of),
                ..self
            }
        })
    }

    fn q(&self) -> usize {
        self.heads * self.head_dim
    }

    fn kv(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// Elements of a position's queries, and of its keys.
    pub fn q_and_kv(&self) -> (usize, usize) {
        (self.q(), self.kv())
    }

    /// Elements of a position that the MLP's activation reads.
    pub fn wide(&self) -> usize {
        match self.block {
            Block::Llama => 2 * self.feed_forward,
            Block::Gpt2 => self.feed_forward,
        }
    }

    /// The linears of every layer, in the model's order.
    pub fn linears(&self) -> Vec<LinearSize> {
        let (hidden, wide, q, kv) = (self.hidden, self.feed_forward, self.q(), self.kv());
        let linear = |(module, input, out)| LinearSize { module, input, out };
        match self.block {
            Block::Llama => [
                (FullModule::QProj, hidden, q),
                (FullModule::KProj, hidden, kv),
                (FullModule::VProj, hidden, kv),
                (FullModule::OProj, q, hidden),
                (FullModule::GateProj, hidden, wide),
                (FullModule::UpProj, hidden, wide),
                (FullModule::DownProj, wide, hidden),
            ]
            .map(linear)
            .into(),
            Block::Gpt2 => [
                (FullModule::CAttn, hidden, 3 * hidden),
                (FullModule::CProj, hidden, hidden),
                (FullModule::CFc, hidden, wide),
                (FullModule::CProj, wide, hidden),
            ]
            .map(linear)
            .into(),
        }
    }

    /// Elements of LoRA's two matrices, in every layer.
    fn lora_of_layer(&self, lora: Option<&Lora>) -> usize {
        let Some(lora) = lora else { return 0 };
        let targets = self.linears().into_iter().filter(|linear| has_lora(Some(lora), linear));
        targets.map(|linear| lora.rank * (linear.input + linear.out)).sum()
    }

    /// Elements of a norm.
    fn norm(&self) -> usize {
        self.hidden * (1 + usize::from(self.block == Block::Gpt2))
    }

    fn matrix(&self) -> usize {
        self.rows * self.hidden
    }

    fn position_rows(&self) -> usize {
        match self.block {
            Block::Llama => 0,
            Block::Gpt2 => self.positions * self.hidden,
        }
    }

    /// Whether the embedding's matrix trains; a tied one does under both of its names.
    pub fn embedding_trains(&self, full: &[FullModule]) -> bool {
        full.contains(&FullModule::EmbedTokens) || self.tied && full.contains(&FullModule::LmHead)
    }

    /// Whether the head's matrix trains.
    pub fn head_trains(&self, full: &[FullModule]) -> bool {
        match self.tied {
            true => self.embedding_trains(full),
            false => full.contains(&FullModule::LmHead),
        }
    }

    fn stages(&self, lora: Option<&Lora>, full: &[FullModule]) -> Vec<Stage> {
        let trains = |module| full.contains(&module);
        let (mut embedding, mut layer, mut head) = (Stage::default(), Stage::default(), Stage::default());
        embedding.add(self.matrix(), self.embedding_trains(full));
        embedding.add(self.position_rows(), trains(FullModule::Positions));
        layer.add(2 * self.norm(), trains(FullModule::Norms));
        for linear in self.linears() {
            let bias = linear.out * usize::from(self.block == Block::Gpt2);
            layer.add(linear.input * linear.out + bias, trains(linear.module));
        }
        layer.add(self.lora_of_layer(lora), true);
        head.add(self.norm(), trains(FullModule::Norms));
        if !self.tied {
            head.add(self.matrix(), trains(FullModule::LmHead));
        }
        let layers = std::iter::repeat_n(layer, self.layers);
        std::iter::once(embedding).chain(layers).chain([head]).collect()
    }

    /// What trains, and what is frozen.
    pub fn buckets(&self, lora: Option<&Lora>, full: &[FullModule]) -> [Buckets; 2] {
        let stages = self.stages(lora, full);
        let of = |elements: fn(&Stage) -> usize| {
            let mut buckets = Buckets::default();
            for stage in &stages {
                let own = (elements(stage) > 0).then_some(buckets.numels.len());
                buckets.numels.extend(own.map(|_| elements(stage)));
                buckets.stages.push(own.into_iter().collect());
            }
            buckets
        };
        let [mut trained, mut frozen] = [of(|stage| stage.trained), of(|stage| stage.frozen)];
        if self.tied {
            let matrix = if self.embedding_trains(full) {
                &mut trained
            } else {
                &mut frozen
            };
            let last = matrix.stages.len() - 1;
            matrix.stages[last].push(0);
        }
        [trained, frozen]
    }

    pub fn parameters(&self, lora: Option<&Lora>, full: &[FullModule]) -> Parameters {
        let stages = self.stages(lora, full);
        let total: usize = stages.iter().map(|stage| stage.trained + stage.frozen).sum();
        let trainable: usize = stages.iter().map(|stage| stage.trained).sum();
        let lora = self.layers * self.lora_of_layer(lora);
        let of_head = !self.tied && full.contains(&FullModule::LmHead);
        let matrices = usize::from(self.embedding_trains(full)) + usize::from(of_head);
        let positions = usize::from(full.contains(&FullModule::Positions)) * self.position_rows();
        let embeddings = matrices * self.matrix() + positions;
        Parameters {
            vocabulary: self.rows,
            total: total as u64,
            trainable: trainable as u64,
            lora: lora as u64,
            embeddings: embeddings as u64,
            body: (trainable - lora - embeddings) as u64,
        }
    }

    /// As the plan trains it.
    pub fn parameters_of(&self, plan: &Plan) -> Parameters {
        self.parameters(plan.train.lora.as_ref(), &plan.train.full)
    }
}

/// Published models by the names that `model.published` takes.
pub const PUBLISHED: [&str; 3] = ["llama-2-7b", "llama-2-13b", "llama-2-70b"];

/// Sizes of a published model, for planning before its folder is there.
/// Source: Touvron et al. 2023, "Llama 2", and the released `config.json`s.
pub fn published(name: &str) -> Option<Sizes> {
    let llama_2 = |layers, hidden, feed_forward, heads, kv_heads| Sizes {
        block: Block::Llama,
        layers,
        hidden,
        feed_forward,
        heads,
        kv_heads,
        head_dim: hidden / heads,
        positions: 4096,
        tied: false,
        pieces: 32_000,
        rows: 32_000,
    };
    match name {
        "llama-2-7b" => Some(llama_2(32, 4096, 11_008, 32, 32)),
        "llama-2-13b" => Some(llama_2(40, 5120, 13_824, 40, 40)),
        "llama-2-70b" => Some(llama_2(80, 8192, 28_672, 64, 8)),
        _ => None,
    }
}

/// Whether LoRA stands beside a linear.
pub fn has_lora(lora: Option<&Lora>, linear: &LinearSize) -> bool {
    lora.is_some_and(|lora| lora.targets.iter().any(|target| target == linear.module.name()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn llama_2_has_the_parameters_that_are_published() {
        for (name, elements) in PUBLISHED.iter().zip([6_738_415_616, 13_015_864_320, 68_976_648_192]) {
            let parameters = published(name).unwrap().parameters(None, &FullModule::ALL);
            assert_eq!((parameters.total, parameters.trainable), (elements, elements), "{name}");
        }
    }

    #[test]
    fn polylm_has_the_parameters_of_its_shape() {
        for (hidden, layers, written) in [(2048, 24, 1_737_084_928), (5120, 40, 13_906_790_400)] {
            let sizes = Sizes {
                block: Block::Gpt2,
                layers,
                hidden,
                feed_forward: 4 * hidden,
                heads: hidden / 128,
                kv_heads: hidden / 128,
                head_dim: 128,
                positions: 2048,
                tied: true,
                pieces: 256_000,
                rows: 256_000,
            };
            // A layer of 12 d² + 13 d, the last norm.
            let expected = (256_000 + 2048) * hidden + layers * (12 * hidden * hidden + 13 * hidden) + 2 * hidden;
            let parameters = sizes.parameters(None, &FullModule::ALL);
            assert_eq!((parameters.total, parameters.trainable), (expected as u64, written));
        }
    }

    #[test]
    fn mala_500_trains_what_its_release_trains() {
        let lora = Lora {
            rank: 8,
            alpha: 32.0,
            dropout: 0.1,
            targets: vec!["q_proj".into(), "v_proj".into()],
            rank_stabilized: None,
        };
        let full = [FullModule::EmbedTokens, FullModule::LmHead];
        let sizes = Sizes {
            pieces: 260_164,
            rows: 260_164,
            ..published("llama-2-7b").unwrap()
        };
        let parameters = sizes.parameters(Some(&lora), &full);
        assert_eq!((parameters.trainable, parameters.lora), (2_135_457_792, 4_194_304));
        assert_eq!(parameters.total - parameters.lora, 8_607_535_104);
        assert_eq!((parameters.embeddings, parameters.body), (2 * 260_164 * 4096, 0));

        let [trained, frozen] = sizes.buckets(Some(&lora), &full);
        assert_eq!(trained.numels.iter().sum::<usize>() as u64, parameters.trainable);
        assert_eq!(
            (trained.numels.len(), frozen.numels.len()),
            (34, 33),
            "the embedding has nothing frozen"
        );
        assert_eq!((&trained.stages[33], &frozen.stages[33]), (&vec![33], &vec![32]));
    }

    #[test]
    fn gpt2_small_and_a_tied_head_are_counted_once() {
        let gpt2 = Sizes {
            block: Block::Gpt2,
            layers: 12,
            hidden: 768,
            feed_forward: 3072,
            heads: 12,
            kv_heads: 12,
            head_dim: 64,
            positions: 1024,
            tied: true,
            pieces: 50_257,
            rows: 50_257,
        };
        let parameters = gpt2.parameters(None, &FullModule::ALL);
        assert_eq!((parameters.total, parameters.trainable), (124_439_808, 124_439_808));
        let [trained, frozen] = gpt2.buckets(None, &FullModule::ALL);
        assert_eq!((&trained.stages[13], frozen.numels.len()), (&vec![13, 0], 0));
        // Positions train beside a frozen matrix: the head reads what is frozen.
        let [trained, frozen] = gpt2.buckets(None, &[FullModule::Positions]);
        assert_eq!((trained.numels, &trained.stages[13]), (vec![1024 * 768], &vec![]));
        assert_eq!(frozen.stages[13], [13, 0]);
    }
}
