//! What training takes of a rank's memory: what it keeps (weights, gradients, optimizer state), and what comes and goes
//! while a step runs (whole gradients and parameters of a stage, activations, the head's chunk). Pure arithmetic with the rules by
//! which `sharding` and the trainer allocate; `trainer/tests/sharded.rs` and `trainer/tests/planner.rs` compare.

use std::collections::BTreeSet;

use serde::Serialize;

use super::sizes::{Block, Sizes, has_lora};
use super::traffic::{FEW_ROWS, rows_may_travel};
use crate::plan::{Device, FullModule, Mix, Precision, Recompute, Residual, Train};

/// Slices are multiples of this many elements, so that every slice starts on a cache line in f32.
pub const ALIGNMENT: usize = 16;

/// The length of each of `n_slices` slices of `numel` elements, the padding of the last ones counted.
pub fn slice_len(numel: usize, n_slices: usize) -> usize {
    numel.div_ceil(n_slices).next_multiple_of(ALIGNMENT)
}

/// The head's logits of one chunk take at most this much memory; larger chunks make larger GEMMs and fewer passes over
/// d_weight.
const CHUNK_BYTES: usize = 256 << 20;
/// On a GPU, whose GEMMs want more rows: 2,000 of 260,164 pieces in bf16.
const GPU_CHUNK_BYTES: usize = 1 << 30;

/// Positions of a chunk of the head's at most, where a micro-batch has `n`: each has a logit of `width` bytes for each row of the
/// matrix, padding too.
pub fn most_in_chunk(n: usize, matrix_rows: usize, width: usize, device: Device) -> usize {
    let bytes = match device {
        Device::Cpu => CHUNK_BYTES,
        Device::Cuda => GPU_CHUNK_BYTES,
    };
    (bytes / (width * matrix_rows)).min(n).max(1)
}

/// Positions of the head's equal chunks over `n` with a known target, none of more than `most`. Fewer known ones may make larger
/// chunks: of at most 512, 516 are two of 258 and 512 are one.
pub fn equal_chunk(n: usize, most: usize) -> usize {
    n.div_ceil(n.div_ceil(most).max(1)).max(1)
}

/// A product of bf16 matrices that is added to an f32 gradient on the CPU is made a stretch of rows at a time, of about this many
/// bytes: it is still in the cache when it is added.
pub const PRODUCT_BYTES: usize = 16 << 20;

/// Half of what the pieces of a bucket that are under way between MPI's ranks take at most, on each side: enough that a message's
/// latency does not count, and nothing beside a bucket.
pub const STAGING_BYTES: usize = 8 << 20;

/// Rows of the embedding that one rank keeps at most in the compute precision and of its gradient, where it keeps those that a step
/// names and no others: on a CPU, before stage 2, where the matrix trains, and nothing beside it in its stage or with the head.
pub fn named_rows(sizes: &Sizes, train: &Train, division: &Division) -> Option<usize> {
    let alone = sizes.block == Block::Llama || !train.full.contains(&FullModule::Positions);
    let whole = division.world == 1 && division.zero < 2;
    let keeps = whole && train.device == Device::Cpu && !sizes.tied && alone;
    (keeps && sizes.embedding_trains(&train.full)).then(|| sizes.rows.min(train.rows_per_step * train.sequence_length))
}

/// How training is divided.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Division {
    /// ZeRO stage, 0 to 3.
    pub zero: u8,
    pub world: usize,
    /// Bytes of an element in the compute precision.
    pub width: usize,
}

/// What a run asks for that takes memory besides.
#[derive(Clone, Copy, Debug, Default)]
pub struct Besides {
    /// Checkpoints are written beside the steps ([`crate::Plan::saves_on_the_way`]).
    pub saves: bool,
    /// Sums are made in rank order, by the ranks themselves on GPUs too ([`crate::plan::Debug::deterministic`]).
    pub ordered: bool,
}

impl Besides {
    pub fn of(plan: &crate::Plan) -> Besides {
        Besides {
            saves: plan.saves_on_the_way(),
            ordered: plan.debug.deterministic,
        }
    }

    /// Whether GPU ranks exchange shares and add them up themselves. NCCL adds f32, in its own order.
    pub fn gpus_add_up(self, train: &Train) -> bool {
        train.device != Device::Cpu && (train.reduce != Precision::F32 || self.ordered)
    }
}

/// Bytes on one rank.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct StateBytes {
    /// Kept all the time, in the compute precision.
    pub parameters: u64,
    /// Kept all the time, f32.
    pub gradients: u64,
    /// Master weights and two moments, f32.
    pub optimizer: u64,
    /// Whole gradients and parameters of stages that come and go, at most.
    pub passing: u64,
}

impl StateBytes {
    pub fn total(&self) -> u64 {
        self.parameters + self.gradients + self.optimizer + self.passing
    }
}

impl Division {
    /// As a run on `world` ranks divides: one rank has nobody to share with.
    pub fn of(zero: u8, precision: Precision, world: usize) -> Division {
        Division {
            zero: if world == 1 { zero.min(1) } else { zero },
            world,
            width: precision.bytes(),
        }
    }

    fn n_slices(&self) -> usize {
        if self.zero == 0 { 1 } else { self.world }
    }

    /// Elements of each trained bucket's slice, padding counted.
    pub fn slices(&self, numels: &[usize]) -> Vec<usize> {
        numels.iter().map(|numel| slice_len(*numel, self.n_slices())).collect()
    }

    /// Elements of each trained bucket on `world` ranks that each hold a slice, padding counted.
    fn padded(&self, numels: &[usize]) -> Vec<usize> {
        let slices = self.slices(numels).into_iter();
        slices.map(|slice| slice * self.world).collect()
    }

    /// Of what trains. `numels`: elements of each bucket; `stages[s]`: the buckets that stage s of the model reads, in forward
    /// order, where a tied head reads the embedding's.
    pub fn of_trained(&self, numels: &[usize], stages: &[Vec<usize>]) -> StateBytes {
        let slices = self.slices(numels);
        let slice: usize = slices.iter().sum();
        let whole = slice * self.n_slices();
        let bytes = |elements: usize, width: usize| (elements * width) as u64;
        // One rank's f32 weights are its master weights.
        let shares_masters = self.world == 1 && self.width == 4;
        StateBytes {
            parameters: if self.zero < 3 && !shares_masters {
                bytes(whole, self.width)
            } else {
                0
            },
            gradients: match self.zero {
                0 => bytes(whole, 4),
                // With one slice it is the whole sum itself.
                1 if self.world == 1 => bytes(whole, 4),
                1 => bytes(whole + slice, 4),
                _ => bytes(slice, 4),
            },
            optimizer: bytes(slice, 12),
            passing: moments(stages)
                .map(|moment| self.passing_trained(&moment, numels))
                .max()
                .unwrap_or(0)
                .max(self.casts(numels)),
        }
    }

    /// What is published is cast first, where the compute precision is another.
    fn casts(&self, numels: &[usize]) -> u64 {
        let casts = (1..=2).contains(&self.zero) && self.world > 1 && self.width != 4;
        u64::from(casts) * (self.width * self.slices(numels).iter().sum::<usize>()) as u64
    }

    /// Bytes of whole gradients and parameters at a moment. A gradient under way fills a slice beside the one that holds the
    /// micro-batches' before.
    fn passing_trained(&self, moment: &Moment, numels: &[usize]) -> u64 {
        if self.zero < 2 {
            return 0;
        }
        let padded = self.padded(numels);
        let parameters = match self.zero {
            3 => sum(&moment.parameters, &padded),
            _ => 0,
        };
        let arriving = sum(&moment.reducing, &padded) / self.world;
        (self.width * parameters + 4 * (sum(&moment.gradients, &padded) + arriving)) as u64
    }

    /// Bytes of [`Division::passing_trained`] that reductions under way hold: whole gradients that are filled, and slices on
    /// their way.
    fn in_flight(&self, moment: &Moment, numels: &[usize]) -> u64 {
        if self.zero < 2 {
            return 0;
        }
        let padded = self.padded(numels);
        let reducing = sum(&moment.reducing, &padded);
        4 * (reducing + reducing / self.world) as u64
    }

    /// Of frozen weights, all on every rank or divided; arguments as in [`Division::of_trained`].
    pub fn of_frozen(&self, divided: bool, numels: &[usize], stages: &[Vec<usize>]) -> StateBytes {
        let bytes = |elements: usize| (elements * self.width) as u64;
        if !divided || self.world == 1 {
            return StateBytes {
                parameters: bytes(numels.iter().sum()),
                ..StateBytes::default()
            };
        }
        StateBytes {
            parameters: bytes(numels.iter().map(|numel| slice_len(*numel, self.world)).sum()),
            passing: moments(stages)
                .map(|moment| self.passing_frozen(&moment, numels))
                .max()
                .unwrap_or(0),
            ..StateBytes::default()
        }
    }

    fn passing_frozen(&self, moment: &Moment, numels: &[usize]) -> u64 {
        let whole = |bucket: &usize| slice_len(numels[*bucket], self.world) * self.world;
        (self.width * moment.parameters.iter().map(whole).sum::<usize>()) as u64
    }
}

/// Where in a step, and which buckets are whole then.
struct Moment {
    at: At,
    parameters: BTreeSet<usize>,
    /// Filled now, or by the stage before and on their way.
    gradients: BTreeSet<usize>,
    reducing: BTreeSet<usize>,
}

/// A stage and the way through it. The last stage, the head, goes both ways at once, in backward.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum At {
    Forward(usize),
    Backward(usize),
    /// After the update, before the next step.
    Publication,
}

/// Every stage of a step's second micro-batch. Entering a stage asks for the next one's parameters; the first stage's
/// backward reads none.
fn moments(stages: &[Vec<usize>]) -> impl Iterator<Item = Moment> {
    let last = stages.len() - 1;
    // A bucket is filled from the highest to the lowest stage that reads it.
    let filled = |stage: usize| -> BTreeSet<usize> {
        let reads = |stages: &[Vec<usize>], bucket: &usize| stages.iter().any(|buckets| buckets.contains(bucket));
        let buckets = stages[stage..].iter().flatten().copied();
        buckets.filter(|bucket| reads(&stages[..=stage], bucket)).collect()
    };
    let both = |a: usize, b: usize| stages[a].iter().chain(&stages[b]).copied().collect();
    let forward = (0..last).map(move |stage| {
        // The first micro-batch's last reduction may still be under way.
        let reducing = if stage == 0 { filled(0) } else { BTreeSet::new() };
        Moment {
            at: At::Forward(stage),
            parameters: both(stage, stage + 1),
            gradients: reducing.clone(),
            reducing,
        }
    });
    let backward = (0..=last).map(move |stage| {
        let parameters = match stage {
            0 => BTreeSet::new(),
            1 => both(1, 1),
            _ => both(stage, stage - 1),
        };
        let now = filled(stage);
        let before = if stage == last {
            BTreeSet::new()
        } else {
            filled(stage + 1)
        };
        Moment {
            at: At::Backward(stage),
            parameters,
            gradients: now.union(&before).copied().collect(),
            reducing: before.difference(&now).copied().collect(),
        }
    });
    forward.chain(backward)
}

fn sum(buckets: &BTreeSet<usize>, sizes: &[usize]) -> usize {
    buckets.iter().map(|bucket| sizes[*bucket]).sum()
}

/// What a micro-batch's activations take: sizes as `trainer/src/model` makes them.
#[derive(Clone, Copy, Debug)]
pub struct Activations {
    sizes: Sizes,
    /// Positions of a micro-batch.
    n: usize,
    width: usize,
    /// Bytes of an element of the residual stream.
    stream: usize,
    /// The widest input that a dropout mask is made of; 0 without dropout.
    masked: usize,
    /// Bytes of a product on its way to the gradient of the head's matrix, and of a layer's linear, at most.
    products: [u64; 2],
    device: Device,
}

impl Activations {
    pub fn of(sizes: &Sizes, train: &Train) -> Activations {
        let width = train.precision.bytes();
        let lora = train.lora.as_ref().filter(|lora| lora.dropout > 0.0);
        let linears = sizes.linears();
        let targets = linears.iter().filter(|linear| has_lora(lora, linear));
        Activations {
            sizes: *sizes,
            n: train.micro_rows * train.sequence_length,
            width,
            stream: match train.residual {
                Residual::Compute => width,
                Residual::F32 => 4,
            },
            masked: targets.map(|linear| linear.input).max().unwrap_or(0),
            products: if train.device == Device::Cpu && width != 4 {
                let trained = linears.iter().filter(|linear| train.full.contains(&linear.module));
                let head = sizes.pieces * sizes.hidden * usize::from(sizes.head_trains(&train.full));
                [head, trained.map(|linear| linear.input * linear.out).max().unwrap_or(0)]
                    .map(|elements| (elements * width).min(PRODUCT_BYTES) as u64)
            } else {
                [0; 2]
            },
            device: train.device,
        }
    }

    /// Bytes of the stream at one place.
    fn x(&self) -> u64 {
        (self.n * self.sizes.hidden * self.stream) as u64
    }

    /// Bytes of so many elements a position, in the compute precision.
    fn of_width(&self, elements: usize) -> u64 {
        (self.n * elements * self.width) as u64
    }

    /// What a layer keeps from its forward to its backward.
    pub fn kept(&self, mode: Recompute) -> u64 {
        let sizes = &self.sizes;
        let (q, kv) = sizes.q_and_kv();
        // q, k, v, attention's result and the logarithms of its sums; x plus that; what the activation reads.
        let gemms = self.of_width(2 * q + 2 * kv + sizes.wide()) + self.x() + (4 * self.n * sizes.heads) as u64;
        let cheap = self.of_width(2 * sizes.hidden + sizes.feed_forward);
        self.x()
            + match mode {
                Recompute::Full => 0,
                Recompute::Selective => gemms,
                Recompute::None => gemms + cheap,
            }
    }

    /// What a layer's forward has in hand at most, its input counted.
    fn forward(&self) -> u64 {
        let masks = 2 * self.of_width(self.masked);
        self.kept(Recompute::None) + (self.of_width(self.sizes.hidden) + self.x()).max(masks)
    }

    /// What a layer's backward has in hand at most, whatever it kept, its input counted: all of forward's results, d_y, and the
    /// derivatives, which live to the layer's end.
    fn backward(&self) -> u64 {
        let sizes = &self.sizes;
        let (hidden, wide) = (sizes.hidden, sizes.wide());
        let (q, kv) = sizes.q_and_kv();
        let cast = u64::from(self.stream != self.width) * self.of_width(hidden);
        // d of the activation and of what it reads, and three of the stream's width.
        let mlp = self.of_width(sizes.feed_forward + wide + 3 * hidden) + self.products[1];
        // From here on the MLP's d_x, d of the middle and of attention's result are there.
        let between = self.of_width(hidden + q) + self.x();
        let heads = match self.device {
            // Each head's d_q, d_k and d_v in f32, before they are summed and rounded; in bf16 keys twice and values, laid out
            // for products.
            Device::Cpu if self.width == 2 => (3 * self.n * q * 4) as u64 + self.of_width(3 * kv),
            Device::Cpu => (3 * self.n * q * 4) as u64,
            Device::Cuda => 0,
        };
        let attention = between + self.of_width(q + 2 * kv) + heads;
        let inputs = between
            + match sizes.block {
                // d_q and d_k before and after their rotation, d_x of each of the three with two sums.
                Block::Llama => self.of_width(2 * q + 3 * kv + 4 * hidden),
                // d_q, d_k and d_v, all three in one, d_x.
                Block::Gpt2 => self.of_width(6 * q + hidden),
            }
            + self.x()
            + self.products[1];
        // LoRA under dropout: d_x, the mask, what it leaves, and d of that before and after the mask.
        let masks = self.of_width(5 * self.masked);
        self.kept(Recompute::None) + self.x() + cast + mlp.max(attention).max(inputs).max(masks)
    }

    fn most_in_chunk(&self) -> usize {
        most_in_chunk(self.n, self.sizes.rows, self.width, self.device)
    }

    /// The head's chunk of logits at most: how many targets a micro-batch knows is its text's.
    fn head_chunk(&self) -> u64 {
        (self.most_in_chunk() * self.sizes.rows * self.width) as u64
    }

    /// The same where its memory stays when the head is done: on CPUs.
    fn chunk_that_stays(&self) -> u64 {
        match self.device {
            Device::Cpu => self.head_chunk(),
            Device::Cuda => 0,
        }
    }

    /// What the head has in hand at most beside other layers' activations and what stays: its input counted, and the chunk.
    fn head(&self) -> u64 {
        let rows = self.most_in_chunk();
        let hidden = self.sizes.hidden;
        // x, the positions with a target of it, normed; d of it chunk by chunk, with a chunk's before and after scaling.
        let chunks = 2 * self.x() + self.of_width(2 * hidden) + (2 * rows * hidden * self.width) as u64;
        // The chunks' d in one, d before the norm, zeros and what is put into them.
        let joined = 5 * self.x() + self.of_width(3 * hidden);
        let chunk = self.head_chunk() - self.chunk_that_stays();
        (chunks + chunk + self.products[0]).max(joined)
    }

    /// What the embedding's backward has in hand.
    fn embedding(&self) -> u64 {
        self.x() + (4 * self.n * self.sizes.hidden) as u64
    }

    /// What activations take at a moment of the step.
    fn at(&self, at: At, mix: &Mix) -> u64 {
        let layers = self.sizes.layers;
        let below = |layer: usize| -> u64 {
            let (full, selective) = (mix.full.min(layer), mix.selective.min(layer.saturating_sub(mix.full)));
            full as u64 * self.kept(Recompute::Full)
                + selective as u64 * self.kept(Recompute::Selective)
                + (layer - full - selective) as u64 * self.kept(Recompute::None)
        };
        let passing = match at {
            At::Forward(0) | At::Publication => 0,
            At::Forward(stage) => below(stage - 1) + self.forward(),
            At::Backward(0) => self.embedding(),
            At::Backward(stage) if stage > layers => below(layers) + self.head(),
            At::Backward(stage) => below(stage - 1) + self.backward(),
        };
        passing + self.chunk_that_stays()
    }
}

/// Bytes on one rank, by kind: what is kept, and what is there at the fullest moment of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Memory {
    /// All weights that are kept, in the compute precision.
    pub weights: u64,
    /// f32.
    pub gradients: u64,
    /// Master weights and two moments, f32.
    pub optimizer: u64,
    /// The other kinds are those of this moment.
    pub fullest: At,
    /// Whole gradients and parameters that come and go, slices on their way, staging of messages.
    pub communication: u64,
    pub activations: u64,
    /// The chunk of logits.
    pub head: u64,
    /// The copy of optimizer state from which checkpoints are written beside the steps, where the device's memory is the host's.
    pub snapshot: u64,
    /// Beside the device's: that copy, and state that is offloaded with what travels to it and from it.
    pub host: u64,
    /// What the total would be at its fullest were every reduction over as soon as it is started. How much of what one under way
    /// holds is there at the fullest moment, links and other ranks decide.
    pub settled: u64,
}

impl Memory {
    /// What is there between steps.
    pub fn kept(&self) -> u64 {
        self.weights + self.gradients + self.optimizer
    }

    pub fn total(&self) -> u64 {
        self.kept() + self.communication + self.activations + self.head + self.snapshot
    }

    /// (name, bytes), in the order in which they are shown.
    pub fn kinds(&self) -> [(&'static str, u64); 7] {
        [
            ("weights", self.weights),
            ("gradients", self.gradients),
            ("optimizer", self.optimizer),
            ("communication", self.communication),
            ("activations", self.activations),
            ("head chunk", self.head),
            ("checkpoint's copy", self.snapshot),
        ]
    }
}

/// A rank's memory, ready to be asked what each mix of recomputation takes.
#[derive(Clone, Debug)]
pub struct Budget {
    kept: [u64; 3],
    snapshot: u64,
    host: u64,
    activations: Activations,
    /// Each moment of a step, what communication takes then, and what of it is in flight.
    moments: Vec<(At, u64, u64)>,
}

impl Budget {
    pub fn new(sizes: &Sizes, train: &Train, division: &Division, shard_frozen: bool, besides: Besides) -> Budget {
        let [trained, frozen] = sizes.buckets(train.lora.as_ref(), &train.full);
        let divides = shard_frozen && division.world > 1;
        let of_trained = division.of_trained(&trained.numels, &trained.stages);
        let of_frozen = division.of_frozen(divides, &frozen.numels, &frozen.stages);
        // MPI's ranks sum what they exchange in pieces: what is sent and what is received, of one large bucket's or of several small
        // ones', while reductions are under way. Before stage 2 those of all stages above may be, since nothing waits
        // for them.
        let staging = |moment: &Moment| -> u64 {
            let gpus_add_up = besides.gpus_add_up(train);
            if division.world == 1 || (train.device != Device::Cpu && !gpus_add_up) {
                return 0;
            }
            if gpus_add_up {
                // What is sent, if it is not the gradient itself, and what is received; before stage 1 a padded copy and the sum besides.
                // So long before their sum is wanted no more than two are under way, and one that begins.
                let (under_way, width) = match (division.zero, train.reduce) {
                    (0, Precision::F32) => (1, 12),
                    (0, _) => (1, 8),
                    _ => (3, 4),
                };
                let above = match moment.at {
                    At::Backward(stage) => trained.stages[stage..].concat(),
                    _ => Vec::new(),
                };
                let elements: usize = above.iter().take(under_way).map(|bucket| trained.numels[*bucket]).sum();
                return (width * elements) as u64;
            }
            let above = match moment.at {
                At::Backward(stage) if division.zero < 2 => trained.stages[stage + 1..].concat(),
                _ => moment.reducing.iter().copied().collect(),
            };
            let elements: usize = above.iter().map(|bucket| trained.numels[*bucket]).sum();
            2 * (elements * train.reduce.bytes()).min(2 * STAGING_BYTES) as u64
        };
        // Of the embedding's gradient, when it goes: what is sent, and what is received, at most as much as of the whole matrix.
        let rows = |moment: &Moment| -> u64 {
            if moment.at != At::Backward(0) || division.world == 1 || !rows_may_travel(sizes, train, division) {
                return 0;
            }
            let all = train.rows_per_step / division.world;
            let texts = if division.zero < 2 && !sizes.tied {
                all
            } else {
                train.micro_rows
            };
            let most = if sizes.tied { sizes.rows / FEW_ROWS } else { sizes.rows };
            let named = (texts * train.sequence_length).min(most);
            let copies = if division.zero == 0 { division.world } else { 1 };
            let received = (named * division.world).min(sizes.rows * copies);
            ((named * copies + received) * sizes.hidden * train.reduce.bytes()) as u64
        };
        let frozen_moments: Vec<Moment> = moments(&frozen.stages).collect();
        let each = moments(&trained.stages)
            .zip(&frozen_moments)
            .map(|(moment, of_frozen)| {
                let frozen = u64::from(divides) * division.passing_frozen(of_frozen, &frozen.numels);
                let passing = division.passing_trained(&moment, &trained.numels) + frozen;
                let staging = staging(&moment) + rows(&moment);
                (
                    moment.at,
                    passing + staging,
                    division.in_flight(&moment, &trained.numels) + staging,
                )
            });
        let publication = (At::Publication, division.casts(&trained.numels), 0);
        let on_gpu = train.device != Device::Cpu;
        let snapshot = u64::from(besides.saves) * of_trained.optimizer;
        // A bucket's gradient comes down, and its parameters go up, one bucket at a time.
        let unnamed = named_rows(sizes, train, division).map_or(0, |rows| {
            let whole: usize = division.slices(&trained.numels[..1]).iter().sum();
            (whole - rows * sizes.hidden) as u64
        });
        // In f32 the master weights are read.
        let uncopied = if division.width == 4 { 0 } else { unnamed };
        let travels = division.slices(&trained.numels).into_iter().max().unwrap_or(0) * (4 + division.width);
        let offloaded = u64::from(train.offload_optimizer) * (of_trained.optimizer + travels as u64);
        // One rank's f32 weights are its master weights, unless those lie on the host.
        let apart =
            train.offload_optimizer && on_gpu && division.world == 1 && division.width == 4 && division.zero < 3;
        let own: usize = division.slices(&trained.numels).iter().sum();
        Budget {
            kept: [
                of_trained.parameters + of_frozen.parameters + 4 * u64::from(apart) * own as u64
                    - division.width as u64 * uncopied,
                of_trained.gradients - 4 * unnamed,
                if train.offload_optimizer {
                    0
                } else {
                    of_trained.optimizer
                },
            ],
            snapshot: if on_gpu { 0 } else { snapshot },
            host: if on_gpu { snapshot + offloaded } else { 0 },
            activations: Activations::of(sizes, train),
            moments: each.chain([publication]).collect(),
        }
    }

    pub fn with(&self, mix: &Mix) -> Memory {
        let taken = |(at, communication, _): &(At, u64, u64)| communication + self.activations.at(*at, mix);
        let fullest = self.moments.iter().max_by_key(|moment| taken(moment));
        let (at, communication, _) = *fullest.expect("a step has moments");
        let settled = self.moments.iter().map(|moment| taken(moment) - moment.2).max();
        let activations = self.activations.at(at, mix);
        let is_head = matches!(at, At::Backward(stage) if stage > self.activations.sizes.layers);
        let head = if is_head {
            self.activations.head_chunk().min(activations)
        } else {
            self.activations.chunk_that_stays()
        };
        let [weights, gradients, optimizer] = self.kept;
        Memory {
            weights,
            gradients,
            optimizer,
            fullest: at,
            communication,
            activations: activations - head,
            head,
            snapshot: self.snapshot,
            host: self.host,
            settled: weights + gradients + optimizer + self.snapshot + settled.expect("a step has moments"),
        }
    }

    /// The mix that costs least of those whose memory is at most `most` bytes: a layer of selective recomputation costs
    /// `selective`, one of full recomputation `full`, in any unit. `None` where not even full recomputation fits.
    pub fn cheapest(&self, most: u64, selective: f64, full: f64) -> Option<Mix> {
        let layers = self.activations.sizes.layers;
        let mixes = (0..=layers).flat_map(|of_full| {
            (0..=layers - of_full).map(move |of_selective| Mix {
                full: of_full,
                selective: of_selective,
            })
        });
        let cost = |mix: &Mix| mix.selective as f64 * selective + mix.full as f64 * full;
        let fits = mixes.filter(|mix| self.with(mix).total() <= most);
        fits.min_by(|a, b| cost(a).total_cmp(&cost(b)).then(a.full.cmp(&b.full)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_stage_of_zero_keeps_less() {
        // Embedding, two layers, head: 2,560 elements, which four divide without padding.
        let (numels, stages) = ([1024, 256, 256, 1024], [vec![0], vec![1], vec![2], vec![3]]);
        let at = |zero| {
            Division {
                zero,
                world: 4,
                width: 2,
            }
            .of_trained(&numels, &stages)
        };
        let all = 2560;
        let bytes = |zero| {
            let StateBytes {
                parameters,
                gradients,
                optimizer,
                passing,
            } = at(zero);
            [parameters, gradients, optimizer, passing]
        };
        assert_eq!(bytes(0), [2 * all, 4 * all, 12 * all, 0]);
        assert_eq!(bytes(1), [2 * all, 5 * all, 3 * all, all / 4 * 2]);
        // The last layer's gradient, and the head's on its way to a slice.
        assert_eq!(bytes(2), [2 * all, all, 3 * all, 4 * (1280 + 1024 / 4)]);
        // In the next forward: embedding and first layer, and the embedding's gradient on its way; or 4 · 1024 + 2 · 1280 at
        // the head; or 4 · (1280 + 1024 / 4) + 2 · 512 in the last layer.
        assert_eq!(bytes(3), [0, all, 3 * all, 4 * (1024 + 1024 / 4) + 2 * 1280]);
        assert!((0..3).all(|zero| at(zero).total() > at(zero + 1).total()));
    }

    #[test]
    fn what_gpus_add_up_themselves_is_counted() {
        let recipe = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("mala500-7b.yaml");
        let plan = crate::load(&recipe, &[]).unwrap();
        let sizes = super::super::sizes::published("llama-2-7b").unwrap();
        let communication = |reduce, ordered| {
            let train = Train {
                device: Device::Cuda,
                reduce,
                ..plan.train.clone()
            };
            let besides = Besides { saves: false, ordered };
            let budget = Budget::new(&sizes, &train, &Division::of(1, Precision::Bf16, 8), false, besides);
            budget.with(&Mix::default()).communication
        };
        let by_nccl = communication(Precision::F32, false);
        let in_order = communication(Precision::F32, true);
        // f32 that is received, or bf16 that is sent and received; NCCL adds f32 where it lies.
        assert_eq!(in_order, communication(Precision::Bf16, false));
        let head = 4 * (sizes.rows * sizes.hidden) as u64;
        assert!(in_order >= by_nccl + head, "{in_order} bytes, {by_nccl} by NCCL");
    }

    #[test]
    fn offloaded_state_is_the_hosts_and_so_is_a_gpus_copy_for_checkpoints() {
        let recipe = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("mala500-7b.yaml");
        let plan = crate::load(&recipe, &[]).unwrap();
        let sizes = super::super::sizes::published("llama-2-7b").unwrap();
        let of = |device, offload_optimizer, saves| {
            let train = Train {
                device,
                offload_optimizer,
                ..plan.train.clone()
            };
            let besides = Besides { saves, ordered: false };
            Budget::new(&sizes, &train, &Division::of(1, Precision::Bf16, 8), false, besides).with(&Mix::default())
        };
        let (gpu, cpu) = (of(Device::Cuda, false, true), of(Device::Cpu, false, true));
        assert_eq!((gpu.snapshot, gpu.host), (0, gpu.optimizer));
        assert_eq!((cpu.snapshot, cpu.host), (cpu.optimizer, 0));
        let offloaded = of(Device::Cuda, true, false);
        assert_eq!(offloaded.optimizer, 0);
        assert_eq!(gpu.total() - offloaded.total(), gpu.optimizer);
        // Embedding and head, 32,000 × 4,096 each, are the largest: an eighth of either comes down in f32 and goes up in bf16.
        assert_eq!(offloaded.host - gpu.optimizer, 32_000 * 4096 / 8 * 6);
        assert_eq!(of(Device::Cuda, true, true).host, offloaded.host + gpu.optimizer);
    }

    #[test]
    fn however_few_targets_are_known_no_chunk_is_larger_than_counted() {
        let of_pieces = |n| most_in_chunk(n, 260_164, 2, Device::Cpu);
        assert_eq!(of_pieces(8192), 515);
        let most = of_pieces(516);
        assert_eq!((equal_chunk(516, most), equal_chunk(512, most)), (258, 512));
        for n in 1..1200 {
            let most = of_pieces(n);
            assert!((0..=n).all(|known| equal_chunk(known, most) <= most && most <= n));
        }
    }

    #[test]
    fn frozen_weights_are_whole_or_divided() {
        let division = Division {
            zero: 1,
            world: 3,
            width: 2,
        };
        let stages = [vec![0], vec![1], vec![]];
        assert_eq!(division.of_frozen(false, &[100, 50], &stages).total(), 300);
        // Slices of 34 and 17 elements are padded to 48 and 32.
        let divided = division.of_frozen(true, &[100, 50], &stages);
        assert_eq!((divided.parameters, divided.passing), (160, 2 * 3 * (48 + 32)));
    }
}
