//! The LLaMA and GPT-2 families as a list of stages (embedding, layers, head), each with an explicit forward and backward.
//! Knows nothing of ranks, files' places or schedules.

pub(crate) mod attention;
mod cached;
pub(crate) mod fp8;
mod gemm;
mod head;
pub(crate) mod kernels;
mod layer;
mod linear;
mod load;
mod low_rank;
mod mlp;
mod new_rows;
mod norm;
mod rotary;
mod thin;

use anyhow::{Result, ensure};
use configs::planner::memory::PRODUCT_BYTES;
use configs::planner::{Block, Sizes};
use configs::{Group, Recompute};
use sharding::{BucketSpec, Held, ParamSpec, Zero};
use tch::{Device, Kind, Tensor};

pub use attention::Documents;
pub use cached::{Cache, Rows, Segment};
use fp8::Fp8;
pub use head::{Head, IGNORE, Loss};
pub use layer::{Layer, Saved};
pub use linear::{Linear, LoraPair};
pub use load::Trains;
pub use mlp::Mlp;
pub use norm::Norm;
pub use rotary::Rotary;

use crate::hf::{Family, ModelConfig};
use crate::random;

/// A tensor that may train.
pub struct Weight {
    /// As Hugging Face and PEFT name it, without prefixes of theirs.
    pub name: String,
    pub value: Tensor,
    /// f32, the sum over micro-batches; there when the weight trains and is bound to its slice.
    pub grad: Option<Tensor>,
    /// The parameter group, when it trains.
    pub group: Option<Group>,
}

/// Makes a weight of a model without LoRA.
pub type Merged<'a> = Box<dyn Fn() -> Tensor + 'a>;

impl Weight {
    pub fn frozen(name: String, value: Tensor) -> Weight {
        Weight {
            name,
            value,
            grad: None,
            group: None,
        }
    }

    /// Adds to the gradient, which is f32 whatever `gradient` is; nothing where the weight is frozen.
    fn accumulate(&mut self, gradient: impl FnOnce() -> Tensor) {
        if let Some(grad) = &mut self.grad {
            let _ = grad.g_add_(&gradient());
        }
    }

    /// Adds `a` · `b` to the gradient, without a copy of the product where all are f32.
    pub(crate) fn accumulate_product(&mut self, a: &Tensor, b: &Tensor) {
        if let Some(grad) = &mut self.grad {
            add_product(grad, a, b);
        }
    }
}

impl Held for Weight {
    fn name(&self) -> &str {
        &self.name
    }

    fn value(&mut self) -> &mut Tensor {
        &mut self.value
    }

    fn gradient(&mut self) -> &mut Option<Tensor> {
        &mut self.grad
    }
}

/// `sum` += `a` · `b`, kept in f32 whatever the operands are.
fn add_product(sum: &mut Tensor, a: &Tensor, b: &Tensor) {
    if a.kind() == sum.kind() {
        let _ = sum.addmm_(a, b);
    } else if sum.device() == Device::Cpu {
        // A stretch of rows at a time.
        let rows = (PRODUCT_BYTES as i64 / (a.kind().elt_size_in_bytes() as i64 * b.size()[1])).max(1);
        for start in (0..a.size()[0]).step_by(rows as usize) {
            let rows = rows.min(a.size()[0] - start);
            let _ = sum.narrow(0, start, rows).g_add_(&a.narrow(0, start, rows).matmul(b));
        }
    } else {
        // On a GPU the product stays f32 and goes straight into the sum: neither rounded nor stored between.
        let _ = sum.addmm_dtype_out(&sum.shallow_clone(), a, b, sum.kind());
    }
}

pub struct Model {
    pub config: ModelConfig,
    /// embed_tokens; also the head's matrix when they are tied.
    pub embedding: Weight,
    /// Learned positions, one row each, added after the embedding; none where positions are rotary.
    pub positions_td: Option<Weight>,
    pub layers: Vec<Layer>,
    pub head: Head,
    /// lm_head, when it is not the embedding itself.
    pub head_weight: Option<Weight>,
    pub rotary: Option<Rotary>,
    pub kind: Kind,
    /// In what the residual stream is kept: `kind`, or f32 beside bf16.
    pub stream: Kind,
    /// Where its weights lie and its stages compute.
    pub device: Device,
}

/// What stages need to know of the pass they are in.
#[derive(Clone, Copy)]
pub struct Pass<'a> {
    /// `None`: positions are learned, and in the stream already.
    pub rotary: &'a Option<Rotary>,
    pub recompute: Recompute,
    /// `None`: nothing is dropped.
    pub dropout: Option<&'a DropoutRows>,
    /// `None`: a position sees all that stands before it in its row.
    pub documents: Option<&'a Documents>,
}

/// Names the rows of a micro-batch, so that dropout is a function of (seed, step, row, module) and the same again in
/// recomputation, after a resume and on any number of ranks.
pub struct DropoutRows {
    pub stream: random::Stream,
    /// Global row numbers.
    pub rows: Vec<u64>,
    pub sequence_length: usize,
    /// Where masks are made.
    pub device: Device,
}

impl DropoutRows {
    /// 0 with probability `p`, else 1 / (1 − p): [rows · sequence_length, width].
    fn mask(&self, module: &str, width: usize, p: f64, kind: Kind) -> Tensor {
        let word = blake3::hash(module.as_bytes());
        let module = u64::from_le_bytes(word.as_bytes()[..8].try_into().expect("a hash has 32 bytes"));
        let rows = self.rows.iter();
        let streams: Vec<random::Stream> = rows.map(|&row| self.stream.fork(row).fork(module)).collect();
        let shape = [(self.rows.len() * self.sequence_length) as i64, width as i64];
        let mut mask = Tensor::empty(shape, (kind, self.device));
        kernels::dropout_mask(&mut mask, &streams, p);
        mask
    }
}

fn quantize(layer: &mut Layer) -> Result<()> {
    for linear in layer.linears_mut() {
        if linear.weight_oi.group.is_some() {
            continue;
        }
        let size = linear.weight_oi.value.size();
        ensure!(
            size.iter().all(|side| side % 16 == 0),
            "train.frozen_precision = fp8, but {} is {size:?} and FP8's GEMMs take multiples of 16; leave it out",
            linear.path
        );
        linear.fp8 = Some(Fp8::of(&linear.weight_oi.value));
        linear.weight_oi.value = Tensor::new();
    }
    Ok(())
}

/// What the stages are called.
const EMBEDDING: &str = "embedding";
const HEAD: &str = "head";

fn layer_name(index: usize) -> String {
    format!("layers.{index}")
}

/// What the embedding stage reads.
pub fn embedding_weights<'a>(matrix: &'a mut Weight, positions: &'a mut Option<Weight>) -> Vec<&'a mut Weight> {
    std::iter::once(matrix).chain(positions).collect()
}

impl Model {
    /// Embedding and layers, without keeping anything for backward.
    pub fn hidden(&self, ids_bt: &Tensor) -> Tensor {
        let pass = Pass {
            rotary: &self.rotary,
            recompute: Recompute::Full,
            dropout: None,
            documents: None,
        };
        let embedded = self.embed(ids_bt);
        self.layers
            .iter()
            .fold(embedded, |x_btd, layer| layer.forward(x_btd, &pass).0)
    }

    pub fn embed(&self, ids_bt: &Tensor) -> Tensor {
        let x_btd = Tensor::embedding(&self.embedding.value, ids_bt, -1, false, false).to_kind(self.stream);
        match &self.positions_td {
            None => x_btd,
            Some(positions_td) => x_btd + positions_td.value.narrow(0, 0, ids_bt.size()[1]),
        }
    }

    /// Adds d_x to the rows of the embedding that `ids_bt` named, and to those of the positions they stood at.
    pub fn embed_backward(&mut self, ids_bt: &Tensor, d_x_btd: &Tensor) {
        if let Some(grad) = self.positions_td.as_ref().and_then(|positions| positions.grad.as_ref()) {
            let d_td = d_x_btd.sum_dim_intlist(0, false, Kind::Float);
            let _ = grad.narrow(0, 0, d_td.size()[0]).g_add_(&d_td);
        }
        if let Some(grad) = &mut self.embedding.grad {
            let dim = grad.size()[1];
            let d_x_nd = d_x_btd.reshape([-1, dim]).to_kind(Kind::Float);
            let _ = grad.index_add_(0, &ids_bt.view([-1]), &d_x_nd);
        }
    }

    /// Keeps the layers' frozen matrices in FP8 from here on, and no longer in the compute precision: a model for training
    /// steps, which can be neither merged nor exported.
    ///
    /// # Errors
    /// When a side of a matrix is no multiple of 16.
    pub fn quantize_frozen(&mut self) -> Result<()> {
        self.layers.iter_mut().try_for_each(quantize)
    }

    /// lm_head, or the embedding that stands for it.
    pub fn head_matrix(&self) -> &Weight {
        self.head_weight.as_ref().unwrap_or(&self.embedding)
    }

    /// Its sizes, as the planner counts with them.
    pub fn sizes(&self) -> Sizes {
        let config = &self.config;
        Sizes {
            block: match config.family {
                Family::Llama { .. } => Block::Llama,
                Family::Gpt2 { .. } => Block::Gpt2,
            },
            layers: config.num_hidden_layers,
            hidden: config.hidden_size,
            feed_forward: config.intermediate_size,
            heads: config.num_attention_heads,
            kv_heads: config.num_key_value_heads,
            head_dim: config.head_dim,
            positions: config.max_position_embeddings,
            tied: config.tie_word_embeddings,
            pieces: self.head.pieces as usize,
            rows: self.head.rows as usize,
        }
    }

    /// Every weight, by the stage that it belongs to, in registration order. A tied head reads the embedding's.
    pub fn stages(&mut self) -> Vec<(String, Vec<&mut Weight>)> {
        let embedding = embedding_weights(&mut self.embedding, &mut self.positions_td);
        let mut stages = vec![(EMBEDDING.to_string(), embedding)];
        for (index, layer) in self.layers.iter_mut().enumerate() {
            stages.push((layer_name(index), layer.weights_mut()));
        }
        let head = self.head.norm.weights_mut().chain(&mut self.head_weight);
        stages.push((HEAD.to_string(), head.collect()));
        stages
    }

    /// Lets go of what [`bind`](Self::bind) gave for gradients.
    pub fn forget_gradients(&mut self) {
        let stages = self.stages().into_iter();
        stages
            .flat_map(|(_, weights)| weights)
            .for_each(|weight| weight.grad = None);
    }

    /// The frozen weights of each stage, as the model computes with them.
    pub fn frozen(&mut self) -> Vec<Vec<Tensor>> {
        let eights: Vec<Vec<Tensor>> = self.layers.iter_mut().map(Layer::frozen_eights).collect();
        let is_there = |weight: &&mut Weight| weight.group.is_none() && weight.value.numel() > 0;
        let wide = |weights: Vec<&mut Weight>| -> Vec<Tensor> {
            let frozen = weights.into_iter().filter(is_there);
            frozen.map(|weight| weight.value.shallow_clone()).collect()
        };
        let mut stages: Vec<Vec<Tensor>> = self.stages().into_iter().map(|(_, weights)| wide(weights)).collect();
        // The first stage is the embedding.
        for (stage, eights) in stages[1..].iter_mut().zip(eights) {
            stage.extend(eights);
        }
        stages
    }

    /// What trains, as buckets in registration order.
    pub fn register(&mut self) -> Vec<BucketSpec> {
        let specs = self
            .stages()
            .into_iter()
            .map(|(name, weights)| bucket_of(&name, &weights));
        specs.filter(|spec| !spec.params.is_empty()).collect()
    }

    /// Takes the f32 values of what trains out of the model, in registration order: [`bind`](Self::bind) gives it others.
    pub fn take_initial_values(&mut self) -> Vec<Vec<Tensor>> {
        let values = self.stages().into_iter().map(|(_, weights)| take_trained(weights));
        values.filter(|values| !values.is_empty()).collect()
    }

    /// Makes every trained weight a view of its bucket's memory, and tells which weights each stage reads.
    pub fn bind(&mut self, zero: &mut Zero) {
        let tied = self.head_weight.is_none();
        let names =
            |(_, weights): (String, Vec<&mut Weight>)| weights.iter().map(|weight| weight.name.clone()).collect();
        let mut reads: Vec<Vec<String>> = self.stages().into_iter().map(names).collect();
        if tied {
            let matrix = self.embedding.name.clone();
            reads.last_mut().expect("stages end with the head").push(matrix);
        }
        zero.schedule(&reads);
        self.stages().into_iter().for_each(|(_, weights)| zero.bind(weights));
    }
}

/// What of a stage's weights trains; perhaps nothing.
pub fn bucket_of(stage: &str, weights: &[&mut Weight]) -> BucketSpec {
    let param = |weight: &&mut Weight| {
        Some(ParamSpec {
            name: weight.name.clone(),
            shape: weight.value.size(),
            group: weight.group? as usize,
        })
    };
    BucketSpec {
        name: stage.to_owned(),
        params: weights.iter().filter_map(param).collect(),
    }
}

/// The f32 values of those that train, taken out of them.
pub fn take_trained(weights: Vec<&mut Weight>) -> Vec<Tensor> {
    let trained = weights.into_iter().filter(|weight| weight.group.is_some());
    trained
        .map(|weight| std::mem::replace(&mut weight.value, Tensor::new()).to_kind(Kind::Float))
        .collect()
}
