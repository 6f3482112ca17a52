//! How long a step takes: the work of each of the model's stages by a device's rates, and a walk through the step with one line
//! of collectives beside it, in the order in which `trainer/src/step.rs` and `sharding/src/zero/mod.rs` start and await them.

use serde::Serialize;

use super::hardware::Hardware;
use super::memory::{Besides, Division, most_in_chunk, slice_len};
use super::sizes::{Buckets, Sizes, has_lora};
use super::traffic::{FEW_ROWS, Traffic};
use crate::plan::{Device, FrozenPrecision, Mix, Recompute, Residual, Train};

/// FLOP and bytes of one pass through a stage, of a micro-batch.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Work {
    /// Matrix products in the compute precision.
    gemm: f64,
    /// Of those, with frozen matrices in 8 bits.
    fp8: f64,
    attention: f64,
    /// Read and written by what is no matrix product.
    bytes: f64,
}

impl Work {
    fn plus(self, other: Work) -> Work {
        Work {
            gemm: self.gemm + other.gemm,
            fp8: self.fp8 + other.fp8,
            attention: self.attention + other.attention,
            bytes: self.bytes + other.bytes,
        }
    }

    fn flop(&self) -> f64 {
        self.gemm + self.fp8 + self.attention
    }

    fn seconds(&self, train: &Train, hardware: &Hardware) -> f64 {
        let peak = hardware.flops(train.precision);
        // Hardware without units for 8 bits cannot run such a plan; it is told where the plan is shown.
        let fp8 = if hardware.flops.fp8 > 0.0 {
            hardware.flops.fp8
        } else {
            peak
        };
        self.gemm / (peak * hardware.gemm_share)
            + self.fp8 / (fp8 * hardware.gemm_share)
            + self.attention / (peak * hardware.attention_share)
            + self.bytes / (hardware.bandwidth * hardware.bandwidth_share)
    }
}

/// The work of a model's stages in one micro-batch.
struct Stages {
    forward: Work,
    backward: Work,
    /// Besides, in backward, where a layer kept less.
    selective: Work,
    full: Work,
    head: Work,
}

impl Stages {
    fn of(sizes: &Sizes, train: &Train) -> Stages {
        let n = (train.micro_rows * train.sequence_length) as f64;
        let (width, stream) = (train.precision.bytes() as f64, stream(train));
        let hidden = sizes.hidden as f64;
        let (q, kv) = sizes.q_and_kv();
        let (q, kv, wide, feed_forward) = (q as f64, kv as f64, sizes.wide() as f64, sizes.feed_forward as f64);
        let mut forward = Work::default();
        let mut backward = Work::default();
        let mut last_gemm = Work::default();
        for linear in sizes.linears() {
            let product = 2.0 * n * (linear.input * linear.out) as f64;
            let trains = train.full.contains(&linear.module);
            let in_fp8 = !trains && train.frozen_precision == Some(FrozenPrecision::Fp8);
            let of = |products: f64| match in_fp8 {
                true => Work {
                    fp8: products * product,
                    ..Work::default()
                },
                false => Work {
                    gemm: products * product,
                    ..Work::default()
                },
            };
            forward = forward.plus(of(1.0));
            backward = backward.plus(of(1.0));
            if trains {
                backward.gemm += product;
            }
            last_gemm = of(1.0);
            if has_lora(train.lora.as_ref(), &linear) {
                let lora = train.lora.as_ref().expect("it has one");
                let low = |elements: usize| 2.0 * n * (lora.rank * elements) as f64;
                forward.gemm += low(linear.input + linear.out);
                backward.gemm += 3.0 * low(linear.input) + 2.0 * low(linear.out);
                if lora.dropout > 0.0 {
                    // The mask is drawn and multiplied by, in each pass.
                    forward.bytes += n * 4.0 * linear.input as f64 * width;
                    backward.bytes += n * 8.0 * linear.input as f64 * width;
                }
            }
        }
        // Each position meets half of its row: q kᵀ and p v.
        let attention = 2.0 * n * train.sequence_length as f64 * q;
        forward.attention = attention;
        // q kᵀ again, and the two products' two derivatives.
        backward.attention = 2.5 * attention;
        let norms = n * 2.0 * (stream + width) * hidden;
        let activation = n * (wide + feed_forward) * width;
        // Rotation reads and writes q and k; each part's result is added to the stream.
        forward.bytes += norms + activation + n * (2.0 * (q + kv) * width + 2.0 * (2.0 * stream + width) * hidden);
        backward.bytes += n
            * (2.0 * (3.0 * stream + width) * hidden
                + 2.0 * (wide + feed_forward) * width
                + 4.0 * (q + kv) * width
                + 9.0 * hidden * width);
        let selective = Work {
            bytes: norms + activation,
            ..Work::default()
        };
        // All of forward but its last product.
        let full = Work {
            gemm: forward.gemm - last_gemm.gemm,
            fp8: forward.fp8 - last_gemm.fp8,
            ..forward
        };
        Stages {
            forward,
            backward,
            selective,
            full,
            head: head(sizes, train, n),
        }
    }

    fn recomputed(&self, mode: Recompute) -> Work {
        match mode {
            Recompute::None => Work::default(),
            Recompute::Selective => self.selective,
            Recompute::Full => self.full,
        }
    }
}

fn stream(train: &Train) -> f64 {
    match train.residual {
        Residual::Compute => train.precision.bytes() as f64,
        Residual::F32 => 4.0,
    }
}

fn head(sizes: &Sizes, train: &Train, n: f64) -> Work {
    let (hidden, pieces, width) = (sizes.hidden as f64, sizes.pieces as f64, train.precision.bytes() as f64);
    let product = 2.0 * n * hidden * pieces;
    let trains = sizes.head_trains(&train.full);
    let most = most_in_chunk(n as usize, sizes.rows, train.precision.bytes(), train.device);
    let chunks = (n / most as f64).ceil();
    // Cross-entropy reads logits twice and writes them once; each chunk adds to d_weight's f32 sums.
    let sums = if trains { chunks * 8.0 * pieces * hidden } else { 0.0 };
    Work {
        gemm: product * if trains { 3.0 } else { 2.0 },
        bytes: 3.0 * n * pieces * width + sums + 12.0 * n * hidden * stream(train),
        ..Work::default()
    }
}

/// FLOP that a token costs.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct FlopPerToken {
    /// The model's own, attention's backward counted twice its forward: what shares of a peak are told by.
    pub model: f64,
    /// What is computed, recomputation and attention's second scores counted.
    pub computed: f64,
}

impl FlopPerToken {
    pub fn of(sizes: &Sizes, train: &Train, mix: &Mix) -> FlopPerToken {
        let n = (train.micro_rows * train.sequence_length) as f64;
        let stages = Stages::of(sizes, train);
        let layers = sizes.layers as f64;
        let once = layers * (stages.forward.flop() + stages.backward.flop()) + stages.head.flop();
        let again: f64 = (0..sizes.layers)
            .map(|layer| stages.recomputed(mix.of_layer(layer)).flop())
            .sum();
        FlopPerToken {
            model: (once - layers * 0.5 * stages.forward.attention) / n,
            computed: (once + again) / n,
        }
    }
}

/// Seconds that a layer's recomputation costs in a micro-batch: (selective, full).
pub fn recomputation(sizes: &Sizes, train: &Train, hardware: &Hardware) -> (f64, f64) {
    let stages = Stages::of(sizes, train);
    (
        stages.selective.seconds(train, hardware),
        stages.full.seconds(train, hardware),
    )
}

/// Where ranks are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Place {
    pub nodes: usize,
    pub ranks_per_node: usize,
}

impl Place {
    pub fn world(&self) -> usize {
        self.nodes * self.ranks_per_node
    }
}

/// Seconds of a step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct StepTime {
    pub total: f64,
    /// Forward, backward, recomputation.
    pub compute: f64,
    pub update: f64,
    /// All collectives, one after the other.
    pub communication: f64,
    /// Of them what the step waits for.
    pub exposed: f64,
}

impl StepTime {
    /// What of the collectives hides behind computing.
    pub fn hidden_share(&self) -> f64 {
        match self.communication {
            0.0 => 1.0,
            all => 1.0 - (self.exposed / all).clamp(0.0, 1.0),
        }
    }
}

/// What a step is made of.
pub struct Step<'a> {
    pub sizes: &'a Sizes,
    pub train: &'a Train,
    pub division: &'a Division,
    pub besides: Besides,
    pub shard_frozen: bool,
    pub micro_batches: usize,
    pub place: Place,
    /// Of one rank.
    pub hardware: &'a Hardware,
}

impl Step<'_> {
    pub fn time(&self, mix: &Mix) -> StepTime {
        let Step {
            sizes, train, hardware, ..
        } = self;
        let stages = Stages::of(sizes, train);
        let layers = sizes.layers;
        let forward = stages.forward.seconds(train, hardware);
        let backward = |layer: usize| {
            let again = stages.recomputed(mix.of_layer(layer));
            stages.backward.plus(again).seconds(train, hardware)
        };
        let head = stages.head.seconds(train, hardware);
        let [trained, frozen] = sizes.buckets(train.lora.as_ref(), &train.full);
        let update = self.update(&trained);

        let mut walk = Walk::new(self, &trained, &frozen);
        for micro_batch in 0..self.micro_batches {
            let last = micro_batch + 1 == self.micro_batches;
            let ends = self.division.zero >= 2 || last;
            for stage in 0..=layers {
                walk.enter(stage, Some(stage + 1));
                walk.now += if stage == 0 { 0.0 } else { forward };
                walk.leave(stage, Some(stage + 1));
            }
            for stage in (0..=layers + 1).rev() {
                // The first stage's backward reads no parameter.
                let below = stage.checked_sub(1).filter(|below| *below > 0);
                if stage > 0 {
                    walk.enter(stage, below);
                }
                walk.open(stage);
                walk.now += match stage {
                    0 => 0.0,
                    stage if stage > layers => head,
                    stage => backward(stage - 1),
                };
                walk.leave(stage, below);
                if ends {
                    walk.reduce(stage);
                }
            }
        }
        walk.finish();
        let compute =
            self.micro_batches as f64 * (layers as f64 * forward + (0..layers).map(backward).sum::<f64>() + head);
        let total = walk.now + update;
        StepTime {
            total,
            compute,
            update,
            communication: walk.spent,
            exposed: (total - compute - update).max(0.0),
        }
    }

    /// AdamW reads and writes θ, m and v and reads g; g is read once more for its norm and set to zero; what is published is
    /// cast. Offloaded state is updated by the host.
    fn update(&self, trained: &Buckets) -> f64 {
        let slice: usize = self.division.slices(&trained.numels).iter().sum();
        let whole: usize = trained.numels.iter().sum();
        let hardware = self.hardware;
        let (slice, width) = (slice as f64, self.division.width as f64);
        let rest = slice * (4.0 + 4.0 + width) + 4.0 * whole as f64;
        let here = |bytes: f64| bytes / (hardware.bandwidth * hardware.bandwidth_share);
        if self.train.offload_optimizer && hardware.host_link > 0.0 && hardware.host_bandwidth > 0.0 {
            // The gradient comes down, the host updates, parameters go up: one after the other.
            let travels = slice * (4.0 + width) / (hardware.host_link * hardware.link_share);
            return here(rest) + travels + slice * 28.0 / (hardware.host_bandwidth * hardware.bandwidth_share);
        }
        here(rest + slice * 28.0)
    }

    /// Seconds of a ring in which each rank sends so many bytes.
    fn collective(&self, bytes: f64) -> f64 {
        let (hardware, place) = (self.hardware, self.place);
        let world = place.world();
        if world == 1 {
            return 0.0;
        }
        let (rate, crossings) = match place.nodes {
            1 => (hardware.link_within, 0),
            // As many rings as a node has links: each rank's share of the traffic leaves by its own.
            nodes => (hardware.link_within.min(hardware.link_between), nodes - 1),
        };
        let messages =
            (world - 1 - crossings) as f64 * hardware.latency_within + crossings as f64 * hardware.latency_between;
        bytes / (rate * hardware.link_share) + messages
    }
}

/// A bucket of trained or of frozen weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Flat {
    Trained(usize),
    Frozen(usize),
}

/// Bytes of the embedding's gradient that travel as rows.
enum Rows {
    Instead(f64),
    /// Behind the tied head's part.
    Behind(f64),
}

/// The clock of the device and that of the line of collectives.
struct Walk<'a> {
    step: &'a Step<'a>,
    trained: &'a Buckets,
    frozen: &'a Buckets,
    now: f64,
    /// When the line is free.
    line: f64,
    /// All the time that it was busy.
    spent: f64,
    /// When what is here, or on its way, is here.
    arrives: std::collections::BTreeMap<Flat, f64>,
    /// Ends of reductions, in order.
    reductions: Vec<f64>,
}

impl<'a> Walk<'a> {
    /// Begins with the publication of what the step before has updated.
    fn new(step: &'a Step<'a>, trained: &'a Buckets, frozen: &'a Buckets) -> Walk<'a> {
        let mut walk = Walk {
            step,
            trained,
            frozen,
            now: 0.0,
            line: 0.0,
            spent: 0.0,
            arrives: Default::default(),
            reductions: Vec::new(),
        };
        if (1..=2).contains(&step.division.zero) {
            for bucket in 0..trained.numels.len() {
                walk.gather(Flat::Trained(bucket));
            }
        }
        walk
    }

    /// What one reduction, or one gathering, of a bucket has each rank send.
    fn sends(&self, flat: Flat, width: usize) -> f64 {
        let world = self.step.division.world;
        let numel = match flat {
            Flat::Trained(bucket) => self.trained.numels[bucket],
            Flat::Frozen(bucket) => self.frozen.numels[bucket],
        };
        (slice_len(numel, world) * (world - 1) * width) as f64
    }

    fn start(&mut self, bytes: f64) -> f64 {
        let seconds = self.step.collective(bytes);
        self.line = self.line.max(self.now) + seconds;
        self.spent += seconds;
        self.line
    }

    fn gather(&mut self, flat: Flat) {
        if !self.arrives.contains_key(&flat) {
            let there = self.start(self.sends(flat, self.step.division.width));
            self.arrives.insert(flat, there);
        }
    }

    fn reads(&self, stage: usize) -> impl Iterator<Item = Flat> + use<> {
        let trained = self.trained.stages[stage].clone().into_iter().map(Flat::Trained);
        trained.chain(self.frozen.stages[stage].clone().into_iter().map(Flat::Frozen))
    }

    /// Whether a bucket goes when no stage reads it.
    fn goes(&self, flat: Flat) -> bool {
        match flat {
            Flat::Trained(_) => self.step.division.zero == 3,
            Flat::Frozen(_) => self.step.shard_frozen && self.step.division.world > 1,
        }
    }

    fn enter(&mut self, stage: usize, next: Option<usize>) {
        for stage in std::iter::once(stage).chain(next) {
            let away: Vec<Flat> = self.reads(stage).filter(|flat| self.goes(*flat)).collect();
            away.into_iter().for_each(|flat| self.gather(flat));
        }
        for flat in self.reads(stage) {
            self.now = self.now.max(self.arrives.get(&flat).copied().unwrap_or(0.0));
        }
    }

    fn leave(&mut self, stage: usize, next: Option<usize>) {
        let kept: Vec<Flat> = next.map_or(Vec::new(), |next| self.reads(next).collect());
        for flat in self.reads(stage) {
            if self.goes(flat) && !kept.contains(&flat) {
                self.arrives.remove(&flat);
            }
        }
    }

    /// From stage 2 on a stage's whole gradient waits for those before the last to be gone.
    fn open(&mut self, _stage: usize) {
        if self.step.division.zero >= 2
            && let [.., before, _] = self.reductions[..]
        {
            self.now = self.now.max(before);
        }
    }

    /// Of the buckets that no lower stage reads; and of a tied matrix when the head is left, where only rows follow.
    fn reduce(&mut self, stage: usize) {
        let below = |bucket: usize| self.trained.stages[..stage].iter().any(|reads| reads.contains(&bucket));
        let rows = self.rows();
        for bucket in self.trained.stages[stage].clone() {
            let ways = if self.step.division.zero == 0 { 2.0 } else { 1.0 };
            let whole = self.sends(Flat::Trained(bucket), self.step.train.reduce.bytes()) * ways;
            let bytes = match rows {
                Some(Rows::Instead(rows)) if bucket == 0 => rows.min(whole),
                Some(Rows::Behind(_)) if bucket == 0 && stage > 0 => whole,
                Some(Rows::Behind(rows)) if bucket == 0 => rows,
                _ if below(bucket) => continue,
                _ => whole,
            };
            let end = self.start(bytes);
            self.reductions.push(end);
            // Two exchanges with a sum between them, for which a GPU's other work waits.
            if self.step.division.zero == 0 && self.step.besides.gpus_add_up(self.step.train) {
                self.now = end;
            }
        }
    }

    /// Of the embedding's gradient, were each of the micro-batches' tokens another. On GPUs, of which there are many, it is counted
    /// whole: how much the owner of the frequent pieces receives then is the text's.
    fn rows(&self) -> Option<Rows> {
        let Step {
            sizes, train, division, ..
        } = self.step;
        if train.device != Device::Cpu || !Traffic::of(sizes, train, division, false, 1).rows_may_travel {
            return None;
        }
        // Before stage 2 a tied head's part goes with the rows of all micro-batches but the last.
        let reductions = if division.zero >= 2 || sizes.tied {
            1
        } else {
            self.step.micro_batches
        };
        let tokens = (train.micro_rows * train.sequence_length * reductions).min(sizes.rows);
        // With one slice all ranks' rows go to all.
        let copies = if division.zero == 0 { division.world } else { 1 };
        let others = (division.world - 1) as f64 / division.world as f64;
        let bytes = (tokens * copies * (8 + sizes.hidden * train.reduce.bytes())) as f64 * others;
        match sizes.tied {
            false => Some(Rows::Instead(bytes)),
            true => (tokens <= sizes.rows / FEW_ROWS).then_some(Rows::Behind(bytes)),
        }
    }

    /// All reductions, and the one small one by which ranks agree.
    fn finish(&mut self) {
        let numbers = self.start(0.0);
        self.now = self.now.max(numbers);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::{FullModule, Precision};
    use crate::planner::sizes::published;

    fn plan() -> crate::Plan {
        let recipe = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("mala500-7b.yaml");
        crate::load(&recipe, &["vocabulary.multiple_of=1".into(), "train.device=cpu".into()]).unwrap()
    }

    fn llama_2_7b() -> Sizes {
        published("llama-2-7b").unwrap().extended(plan().vocabulary.as_ref())
    }

    fn time(train: &Train, nodes: usize, link_between: f64, mix: &Mix) -> StepTime {
        let place = Place {
            nodes,
            ranks_per_node: 8,
        };
        let hardware = Hardware {
            link_between,
            ..Hardware::usual(Device::Cuda)
        };
        let step = Step {
            sizes: &llama_2_7b(),
            train,
            division: &Division::of(train.zero, train.precision, place.world()),
            besides: Besides::default(),
            shard_frozen: train.shard_frozen,
            micro_batches: 8,
            place,
            hardware: &hardware,
        };
        step.time(mix)
    }

    #[test]
    fn a_token_of_mala_500_costs_what_its_recipe_says() {
        let flop = FlopPerToken::of(&llama_2_7b(), &plan().train, &Mix::default());
        assert!((flop.model / 35.5e9 - 1.0).abs() < 0.005, "{flop:?}");
        let full = FlopPerToken::of(&llama_2_7b(), &plan().train, &Mix { full: 32, selective: 0 });
        assert_eq!(full.model, flop.model);
        // Forward once more but for the last product of each layer: 2 · (6.476 G − 1.443 G), and attention's 1.07 G.
        assert!(
            ((full.computed - flop.computed) / 11.14e9 - 1.0).abs() < 0.01,
            "{full:?}"
        );

        // Everything trained, no LoRA: six a parameter of the layers and of the head, and attention's.
        let mut train = plan().train;
        (train.lora, train.full) = (None, FullModule::ALL.to_vec());
        let flop = FlopPerToken::of(&llama_2_7b(), &train, &Mix::default()).model;
        let matrices = 32.0 * 202_375_168.0 + 260_164.0 * 4096.0;
        let attention = 3.0 * 2.0 * 32.0 * 4096.0 * 4096.0;
        assert!((flop / (6.0 * matrices + attention) - 1.0).abs() < 1e-9, "{flop}");
    }

    #[test]
    fn a_step_is_its_parts_and_what_is_not_hidden() {
        let train = plan().train;
        let full = Mix { full: 32, selective: 0 };
        let fast = time(&train, 4, 50e9, &full);
        assert!(
            fast.exposed < 0.05 * fast.total && fast.hidden_share() > 0.5,
            "{fast:?}"
        );
        let slow = time(&train, 4, 0.5e9, &full);
        assert!(slow.exposed > 0.2 * slow.total, "{slow:?}");
        for step in [fast, slow] {
            let sum = step.compute + step.update + step.exposed;
            assert!((sum / step.total - 1.0).abs() < 1e-9, "{step:?}");
            // Nothing hides behind the update and nothing is faster than its bytes: 2 · 2.135 G · 31/32 elements of 4 and 2 bytes.
            assert!(step.total >= step.communication, "one line carries it all: {step:?}");
        }
        assert_eq!(fast.compute, slow.compute);
        let alone = time(&train, 1, 50e9, &Mix::default());
        assert!(alone.compute < fast.compute, "recomputation takes time");
    }

    #[test]
    fn what_gpus_add_up_in_between_hides_nothing_at_stage_0() {
        let full = Mix { full: 32, selective: 0 };
        let at = |device, reduce| {
            let train = Train {
                zero: 0,
                device,
                reduce,
                ..plan().train
            };
            time(&train, 4, 50e9, &full)
        };
        let (cpu, gpu) = (at(Device::Cpu, Precision::Bf16), at(Device::Cuda, Precision::Bf16));
        assert!(cpu.hidden_share() > 0.5, "{cpu:?}");
        assert!(gpu.hidden_share() < 0.01, "{gpu:?}");
        assert!(
            at(Device::Cuda, Precision::F32).hidden_share() > 0.5,
            "NCCL's own sums go on beside"
        );
    }

    #[test]
    fn each_stage_of_zero_sends_what_its_traffic_says() {
        // Without latency, and with one rate, the line's time is the bytes'.
        let mut hardware = Hardware::usual(Device::Cuda);
        (hardware.latency_within, hardware.latency_between, hardware.link_share) = (0.0, 0.0, 1.0);
        hardware.link_within = hardware.link_between;
        for zero in 0..=3 {
            for (shard_frozen, micro_batches, precision) in [(false, 1, Precision::Bf16), (true, 3, Precision::F32)] {
                let mut train = plan().train;
                (train.zero, train.shard_frozen, train.reduce) = (zero, shard_frozen, precision);
                train.device = Device::Cpu;
                let place = Place {
                    nodes: 2,
                    ranks_per_node: 8,
                };
                let division = Division::of(zero, train.precision, place.world());
                let sizes = llama_2_7b();
                let step = Step {
                    sizes: &sizes,
                    train: &train,
                    division: &division,
                    besides: Besides::default(),
                    shard_frozen,
                    micro_batches,
                    place,
                    hardware: &hardware,
                };
                for tied in [false, true] {
                    let sizes = Sizes { tied, ..llama_2_7b() };
                    let step = Step { sizes: &sizes, ..step };
                    let traffic = Traffic::of(&sizes, &train, &division, shard_frozen, micro_batches);
                    let bytes = step.time(&Mix::default()).communication * hardware.link_between;
                    let whole = (traffic.total() - traffic.numbers - traffic.rows) as f64;
                    // Rows travel instead of the matrix, or behind a tied one.
                    let said = format!("ZeRO-{zero}, tied {tied}: {bytes}, {traffic:?}");
                    assert!(
                        bytes <= traffic.total() as f64 && (tied || bytes <= whole * (1.0 + 1e-6)),
                        "{said}"
                    );
                    assert!(!tied || bytes >= whole * (1.0 - 1e-6), "{said}");
                }
                train_on_gpu(&step, |step| {
                    let traffic = Traffic::of(&sizes, step.train, &division, shard_frozen, micro_batches);
                    let bytes = step.time(&Mix::default()).communication * hardware.link_between;
                    // Counted whole.
                    let expected = (traffic.total() - traffic.numbers - traffic.rows) as f64;
                    assert!(
                        (bytes / expected - 1.0).abs() < 1e-6,
                        "ZeRO-{zero}: {bytes}, {traffic:?}"
                    );
                });
            }
        }
    }

    fn train_on_gpu(step: &Step, check: impl Fn(&Step)) {
        let train = Train {
            device: Device::Cuda,
            ..step.train.clone()
        };
        check(&Step { train: &train, ..*step });
    }
}
