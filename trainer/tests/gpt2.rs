//! The GPT-2 family where `transformers` is not needed to judge: from scratch, by its names, in other people's files; and the
//! f32 residual stream, in both families. The numbers are compared in parity.rs.

mod common;

use std::path::Path;

use common::write_tokenizer;
use configs::{Family, FullModule, Gelu, Lora, Pieces, Plan, Precision, Recompute, Residual, Shape};
use corpus::RowsDigest;
use sharding::{Comm, Stage, Zero};
use tch::{Device, Kind, Tensor};
use trainer::batch::{Batch, MicroBatch};
use trainer::hf::weights::{TensorFile, write_tensors};
use trainer::hf::{ModelConfig, Weights};
use trainer::model::{IGNORE, Model, Trains};
use trainer::step::Trainer;

const PIECES: usize = 61;
const TIME: i64 = 24;

#[test]
fn from_scratch_the_loss_falls_on_what_can_be_learned() {
    let root = tempfile::tempdir().unwrap();
    for (precision, residual) in [
        (Precision::F32, Residual::Compute),
        (Precision::Bf16, Residual::Compute),
        (Precision::Bf16, Residual::F32),
    ] {
        let mut plan = plan(root.path(), gpt2(), 3);
        (plan.train.precision, plan.train.residual) = (precision, residual);
        let comm = sharding::join(1).unwrap();
        let mut trainer = trainer(&plan, comm.as_ref());
        let losses: Vec<f64> = (0..30)
            .map(|_| trainer.train_step(&batch(), false).unwrap().loss)
            .collect();
        println!("{precision:?}, {residual:?}: {:.3} → {:.3}", losses[0], losses[29]);
        // Small random weights give all pieces alike: ln 61 = 4.11.
        assert!((losses[0] - (PIECES as f64).ln()).abs() < 0.2, "{losses:?}");
        assert!(losses[29] < 0.5 * losses[0], "{losses:?}");
    }
}

#[test]
fn an_f32_stream_changes_no_bit_in_f32_and_is_nearer_to_it_in_bf16() {
    let root = tempfile::tempdir().unwrap();
    for (name, family) in [("gpt2", gpt2()), ("llama", llama())] {
        // Deep, so that what is rounded away in the stream adds up.
        let mut plan = plan(&root.path().join(name), family, 16);
        let mut gradients = |precision, residual, recompute: Recompute| {
            (plan.train.precision, plan.train.residual, plan.train.recompute) = (precision, residual, recompute.into());
            let comm = sharding::join(1).unwrap();
            let mut trainer = trainer(&plan, comm.as_ref());
            let batch = batch();
            trainer
                .forward_backward(&batch.micro_batches[0], batch.n_targets as f64, false)
                .unwrap();
            (0..trainer.zero.layout().buckets.len())
                .flat_map(|b| (0..trainer.zero.layout().buckets[b].params.len()).map(move |p| (b, p)))
                .map(|(b, p)| trainer.zero.trained(b, p).grad.copy())
                .collect::<Vec<Tensor>>()
        };
        let exact = gradients(Precision::F32, Residual::Compute, Recompute::None);
        assert!(
            exact == gradients(Precision::F32, Residual::F32, Recompute::None),
            "{name}"
        );

        let f32_stream = gradients(Precision::Bf16, Residual::F32, Recompute::None);
        for recompute in [Recompute::Selective, Recompute::Full] {
            let same = gradients(Precision::Bf16, Residual::F32, recompute);
            assert!(f32_stream == same, "{name}: {recompute:?}");
        }
        let bf16_stream = gradients(Precision::Bf16, Residual::Compute, Recompute::None);
        let far = |found: &[Tensor]| {
            let squares = |x: &Tensor| x.to_kind(Kind::Double).square().sum(Kind::Double).double_value(&[]);
            let apart: f64 = found.iter().zip(&exact).map(|(a, b)| squares(&(a - b))).sum();
            (apart / exact.iter().map(squares).sum::<f64>()).sqrt()
        };
        let (with, without) = (far(&f32_stream), far(&bf16_stream));
        println!("{name}: gradients are off by {with:.1e} with an f32 stream, by {without:.1e} without");
        assert!(with < 0.9 * without, "{name}: {with:.1e} with, {without:.1e} without");
    }
}

#[test]
fn names_of_another_family_are_refused_with_this_familys() {
    let root = tempfile::tempdir().unwrap();
    let plan = plan(root.path(), gpt2(), 1);
    let folder = &plan.folders.base_model;
    let (config, weights) = (ModelConfig::open(folder).unwrap(), Weights::open(folder).unwrap());
    let said = |lora: Option<&str>, full: Vec<FullModule>| {
        let lora = lora.map(|target| Lora {
            rank: 2,
            alpha: 4.0,
            dropout: 0.0,
            targets: vec![target.into()],
            rank_stabilized: None,
        });
        let trains = Trains {
            lora,
            full,
            ..Trains::default()
        };
        Model::load(&config, &weights, Kind::Float, &trains)
            .err()
            .map(|error| error.to_string())
    };
    assert_eq!(
        said(Some("q_proj"), vec![]).unwrap(),
        "train.lora.targets names q_proj, which matches no module of this model; its linears are c_attn, c_proj, c_fc"
    );
    assert_eq!(
        said(None, vec![FullModule::GateProj]).unwrap(),
        "train.full names gate_proj, which matches no module of this model; its modules are embed_tokens, positions, \
         lm_head, c_attn, c_proj, c_fc, norms"
    );
    assert_eq!(said(Some("c_proj"), vec![FullModule::Positions]), None);
}

#[test]
fn a_biass_group_goes_with_its_module() {
    let root = tempfile::tempdir().unwrap();
    let mut plan = plan(root.path(), gpt2(), 1);
    plan.train.full = vec![FullModule::CFc];
    let comm = sharding::join(1).unwrap();
    let trainer = trainer(&plan, comm.as_ref());
    let buckets = &trainer.zero.layout().buckets;
    let names: Vec<&str> = buckets
        .iter()
        .flat_map(|bucket| bucket.params.iter().map(|param| param.name.as_str()))
        .collect();
    assert_eq!(
        names,
        ["transformer.h.0.mlp.c_fc.weight", "transformer.h.0.mlp.c_fc.bias"]
    );
}

#[test]
fn files_without_the_heads_module_around_the_model_are_read_as_they_are() {
    let root = tempfile::tempdir().unwrap();
    let plan = plan(root.path(), gpt2(), 2);
    let folder = &plan.folders.base_model;
    let whole = Weights::open(folder).unwrap();
    let file = TensorFile::open(&folder.join("model.safetensors")).unwrap();
    let bare = root.path().join("bare");
    std::fs::create_dir(&bare).unwrap();
    std::fs::copy(folder.join("config.json"), bare.join("config.json")).unwrap();
    // As GPT-2 was published: shorter names, and attention's mask stored with the weights.
    let mask = [("h.0.attn.bias".to_owned(), vec![1i64, 1, 48, 48])];
    let tensors = file.names().into_iter().map(|name| {
        let short = name.strip_prefix("transformer.").unwrap().to_owned();
        (short, file.tensor(&name).unwrap().size())
    });
    let shapes: Vec<(String, Vec<i64>)> = tensors.chain(mask).collect();
    write_tensors(
        &bare.join("model.safetensors"),
        &shapes,
        Kind::Float,
        &mut |name, shape| match file.tensor(&format!("transformer.{name}")) {
            Ok(tensor) => Ok(tensor),
            Err(_) => Ok(Tensor::ones(shape, (Kind::Float, Device::Cpu))),
        },
    )
    .unwrap();
    let read = Weights::open(&bare).unwrap();
    assert_eq!(read.digest(), whole.digest());
    let config = ModelConfig::open(&bare).unwrap();
    for (name, shape) in config.parameter_shapes() {
        let [ours, theirs] = [&read, &whole].map(|weights| weights.tensor(&name, &shape, Kind::Float).unwrap());
        assert_eq!(ours, theirs, "{name}");
    }
}

fn gpt2() -> Family {
    Family::Gpt2 {
        layer_norm_epsilon: 1e-5,
        activation_function: Gelu::Tanh,
    }
}

fn llama() -> Family {
    Family::Llama {
        num_key_value_heads: 2,
        rms_norm_eps: 1e-5,
        rope_theta: 10_000.0,
    }
}

/// Everything of a small model trains, from random weights.
fn plan(root: &Path, family: Family, layers: usize) -> Plan {
    let recipe = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs/tiny.yaml");
    let mut plan = configs::load(&recipe, &[]).unwrap();
    let pieces = root.join("pieces");
    write_tokenizer(&pieces, PIECES);
    plan.model = configs::Model::Scratch {
        shape: Shape {
            hidden_size: 32,
            intermediate_size: 80,
            num_hidden_layers: layers,
            num_attention_heads: 4,
            max_position_embeddings: 48,
            tie_word_embeddings: true,
            family,
        },
        init_std: 0.05,
        tokenizer: Pieces::Folder { path: pieces },
    };
    plan.train.lora = None;
    plan.train.full = family.modules().to_vec();
    plan.train.sequence_length = TIME as usize;
    let rates = configs::Rates {
        lr: 5e-3,
        weight_decay: 0.0,
    };
    plan.optimizer.groups = configs::Group::ALL.into_iter().map(|group| (group, rates)).collect();
    plan.optimizer.schedule = configs::Schedule::Constant;
    plan.optimizer.warmup_steps = 0;
    plan.folders.base_model = root.join("base");
    if !plan.folders.base_model.exists() {
        trainer::scratch::init(&plan, &plan.folders.base_model).unwrap();
    }
    plan
}

fn trainer<'a>(plan: &'a Plan, comm: &'a dyn Comm) -> Trainer<'a> {
    let folder = &plan.folders.base_model;
    let trains = Trains {
        lora: plan.train.lora.clone(),
        full: plan.train.full.clone(),
        ..Trains::default()
    };
    let (config, weights) = (ModelConfig::open(folder).unwrap(), Weights::open(folder).unwrap());
    let kind = trainer::evaluate::kind(plan.train.precision);
    let mut model = Model::load(&config, &weights, kind, &trains)
        .unwrap()
        .with_residual(plan.train.residual);
    let specs = model.register();
    let initial = model.take_initial_values();
    let zero = Zero::new(comm, Stage::OptimizerState, &specs, kind, |bucket, param| {
        initial[bucket][param].copy()
    })
    .unwrap();
    let mut trainer = Trainer::new(plan, comm, model, zero);
    trainer.zero.clear_gradients();
    trainer
}

/// Four rows in which each piece follows from the one before.
fn batch() -> Batch {
    let rows = (0..4).map(|row: i64| {
        let next = |piece: &mut i64| {
            *piece = (*piece * 7 + 3) % PIECES as i64;
            Some(*piece)
        };
        let ids: Vec<i64> = (0..TIME).scan(row * 11, |piece, _| next(piece)).collect();
        Tensor::from_slice(&ids)
    });
    let ids_bt = Tensor::stack(&rows.collect::<Vec<_>>(), 0);
    let targets_bt = ids_bt.roll(-1, 1);
    let _ = targets_bt.narrow(1, TIME - 1, 1).fill_(IGNORE);
    Batch {
        micro_batches: vec![MicroBatch {
            ids_bt,
            targets_bt,
            rows: (0..4).collect(),
            documents: None,
        }],
        n_targets: 4 * (TIME as usize - 1),
        digest: RowsDigest::default(),
    }
}
