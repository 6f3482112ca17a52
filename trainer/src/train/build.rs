//! From a plan to a trainer: the model loaded stage by stage, and what trains bound to its slices.

use anyhow::{Context, Result, ensure};
use configs::{FrozenPrecision, FullModule, NewRows, Plan, Precision};
use corpus::{TokenShards, Vocabulary};
use launcher::checkpoint::Identity;
use sharding::{Comm, Stage, Wire, Zero};
use tch::Device;

use crate::evaluate::kind;
use crate::frozen::Frozen;
use crate::hf::{ModelConfig, Weights};
use crate::model::{Model, Trains, Weight, bucket_of, take_trained};
use crate::planned;
use crate::step::Trainer;

/// How a plan shards among these ranks: stage, and whether frozen weights are divided as well. One rank has nobody to share
/// with.
pub fn sharding(plan: &Plan, comm: &dyn Comm) -> (Stage, bool) {
    let stage = Stage::ALL[usize::from(plan.train.zero)];
    match comm.world() {
        1 => (stage.min(Stage::OptimizerState), false),
        _ => (stage, plan.train.shard_frozen),
    }
}

/// The model a plan trains, on `device`, sharded as [`sharding`] says and bound to its slices, and what a checkpoint must agree
/// with.
pub fn build<'a>(
    plan: &'a Plan,
    comm: &'a dyn Comm,
    device: Device,
    shards: (Stage, bool),
) -> Result<(Trainer<'a>, Identity)> {
    let vocabulary = Vocabulary::open(&plan.folders.vocabulary)?;
    let shards_of_tokens = TokenShards::open(&plan.folders.tokens)?;
    ensure!(
        shards_of_tokens.manifest().tokenizer_digest == vocabulary.digest,
        "{} was tokenised with another tokenizer than {} holds; run `panglot tokenize` again",
        plan.folders.tokens.display(),
        plan.folders.vocabulary.display()
    );
    let vocabulary_digest = vocabulary.digest.clone();
    let new_rows = plan.vocabulary.as_ref().map(|settings| (vocabulary, settings.new_rows));
    let (trainer, base_model) = build_model(plan, comm, device, new_rows, shards)?;
    let identity = Identity {
        plan: plan.clone(),
        base_model,
        vocabulary: vocabulary_digest,
        tokens: shards_of_tokens.manifest().digest.clone(),
    };
    check_ranks_read_alike(&identity, comm)?;
    Ok((trainer, identity))
}

/// # Errors
/// Where a rank's folders hold something else than rank 0's: copies on nodes' own disks grow old.
fn check_ranks_read_alike(identity: &Identity, comm: &dyn Comm) -> Result<()> {
    let folders = &identity.plan.folders;
    let read = [
        ("base model", &identity.base_model, &folders.base_model),
        ("vocabulary", &identity.vocabulary, &folders.vocabulary),
        ("tokens", &identity.tokens, &folders.tokens),
    ];
    for (what, digest, folder) in read {
        let all = comm.all_gather_texts(digest.as_bytes())?;
        let others: Vec<String> = (1..all.len())
            .filter(|rank| all[*rank] != all[0])
            .map(|rank| rank.to_string())
            .collect();
        ensure!(
            others.is_empty(),
            "rank {} reads another {what} than rank 0 in {}; give all nodes the same folder",
            others.join(", "),
            folder.display()
        );
    }
    Ok(())
}

/// As [`build`], of a model whose vocabulary is given; also the base's digest.
pub fn build_model<'a>(
    plan: &'a Plan,
    comm: &'a dyn Comm,
    device: Device,
    vocabulary: Option<(Vocabulary, NewRows)>,
    (stage, shard_frozen): (Stage, bool),
) -> Result<(Trainer<'a>, String)> {
    let base = &plan.folders.base_model;
    let config = ModelConfig::open(base)?;
    let grows = vocabulary.as_ref().map_or(0, |(vocabulary, _)| vocabulary.pieces.len());
    // Untrained new rows are noise for ever; that is never what was meant.
    ensure!(
        grows == 0 || config.tie_word_embeddings || plan.train.full.contains(&FullModule::LmHead),
        "the vocabulary adds {grows} rows to lm_head, which this base does not tie to embed_tokens, but train.full does not name \
         it: they would never learn; add lm_head to train.full"
    );
    let weights = Weights::open(base)?;
    let digest = weights.digest_with(&config);
    let trains = Trains {
        lora: plan.train.lora.clone(),
        full: plan.train.full.clone(),
        vocabulary,
        seed: plan.seed,
    };
    let fp8 = plan.train.frozen_precision == Some(FrozenPrecision::Fp8) && device != Device::Cpu;
    if fp8 {
        sharding::cuda::check_fp8(device)?;
    }
    let (weights, kind) = (weights.on(device), kind(plan.train.precision));
    let mut zero = Zero::empty(comm, stage, kind);
    if plan.train.offload_optimizer && device != Device::Cpu {
        zero.offload_optimizer();
    }
    zero.reduce_in(match plan.train.reduce {
        Precision::F32 => Wire::F32,
        Precision::Bf16 => Wire::Bf16,
    });
    if !config.tie_word_embeddings {
        zero.keep_as_rows(&format!("{}.weight", config.names().embedding));
    }
    // A stage at a time: where a rank keeps a slice, it never holds more of the base than one stage.
    let mut take = |stage: &str, mut weights: Vec<&mut Weight>| -> Result<()> {
        let spec = bucket_of(stage, &weights);
        if !spec.params.is_empty() {
            zero.train(
                spec,
                take_trained(weights.iter_mut().map(|weight| &mut **weight).collect()),
            )?;
        }
        if shard_frozen {
            zero.shard_frozen(stage, weights)?;
        }
        Ok(())
    };
    let model = Model::load_by_stages(&config, &weights, kind, &trains, fp8, &mut take)
        .with_context(|| format!("loading {}", base.display()))?
        .with_residual(plan.train.residual);
    model.check_length(plan.train.sequence_length, "train.sequence_length")?;
    zero.check_ranks_agree(comm)?;
    ensure!(
        !zero.layout().buckets.is_empty(),
        "nothing trains: give train.lora, or name modules in train.full"
    );
    let recompute = planned::recomputation(plan, &model.sizes(), comm, device, (stage, shard_frozen))?;
    let mut trainer = Trainer::new(plan, comm, model, zero);
    sharding::memory::give_back();
    trainer.recompute = recompute;
    // Divided, nobody has another's to compare with.
    if comm.world() > 1 && !shard_frozen && (plan.train.check_ranks_every > 0 || plan.debug.check_ranks_equal) {
        trainer.frozen = Some(Frozen::loaded(&mut trainer.model, comm)?);
    }
    Ok((trainer, digest))
}
