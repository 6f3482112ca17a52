//! Documents that share a row and do not see each other give what they give alone; positions without a target give nothing.

mod common;

use std::path::Path;

use common::write_tokenizer;
use configs::{Family, Pieces, Plan, Recompute, Shape};
use corpus::{Row, RowsDigest};
use sharding::{Comm, Stage, Zero};
use tch::{Kind, Tensor};
use trainer::batch::{Batch, MicroBatch};
use trainer::hf::{ModelConfig, Weights};
use trainer::model::{IGNORE, Model, Trains};
use trainer::step::Trainer;

const PIECES: usize = 97;

/// RoPE turns by the position in the row, which differs: angles up to 47 radians, whose sines carry f32's 6e-8 relative to
/// the angle, then sums of some hundred terms in another order. Seen: 1e-8, 4e-7.
const LOSS: f64 = 1e-6;
const GRADIENT: f64 = 1e-5;

#[test]
fn documents_in_one_row_give_what_they_give_alone() {
    let root = tempfile::tempdir().unwrap();
    for recompute in [Recompute::None, Recompute::Selective, Recompute::Full] {
        let plan = plan(root.path(), recompute);
        let comm = sharding::join(1).unwrap();
        // 10 + 1 + 20 + 12 tokens and 5 of padding; and a row that is one document.
        let packed = [row(&[10, 1, 20, 12], 48), row(&[48], 48)];
        let n_targets: usize = packed.iter().map(Row::n_targets).sum();
        assert_eq!(n_targets, 9 + 19 + 11 + 47);

        let mut together = trainer(&plan, comm.as_ref());
        let micro = MicroBatch::new(&[0, 1], &packed);
        let nll = together.forward_backward(&micro, n_targets as f64, false).unwrap();

        let mut alone = trainer(&plan, comm.as_ref());
        let mut nll_alone = 0.0;
        for row in &packed {
            for document in documents(row) {
                let micro = MicroBatch::new(&[0], &[document]);
                assert!(micro.documents.is_none(), "one document is a plain row");
                nll_alone += alone.forward_backward(&micro, n_targets as f64, false).unwrap();
            }
        }
        let seen = (nll - nll_alone).abs() / nll_alone;
        println!("{recompute:?}: loss {seen:.1e}");
        assert!(seen < LOSS, "{recompute:?}: loss {nll}, alone {nll_alone}");
        for ((name, ours), (_, theirs)) in gradients(&together).zip(gradients(&alone)) {
            let seen = difference(&ours, &theirs);
            println!("{recompute:?}: {name} {seen:.1e}");
            assert!(
                seen < GRADIENT,
                "{recompute:?}: the gradient of {name} differs by {seen:.1e}"
            );
        }

        // And that the test would see it: with attention over the whole row the loss is another.
        let mut open = trainer(&plan, comm.as_ref());
        let micro = MicroBatch {
            documents: None,
            ..MicroBatch::new(&[0, 1], &packed)
        };
        let other = open.forward_backward(&micro, n_targets as f64, false).unwrap();
        assert!((other - nll).abs() / nll > 100.0 * LOSS, "{other} and {nll}");
    }
}

#[test]
fn a_micro_batch_without_targets_changes_nothing() {
    let root = tempfile::tempdir().unwrap();
    let plan = plan(root.path(), Recompute::None);
    let comm = sharding::join(1).unwrap();
    let learned = || MicroBatch::new(&[0], &[row(&[48], 48)]);
    let read_only = || {
        let mut row = row(&[48], 48);
        row.is_target.fill(false);
        MicroBatch::new(&[1], &[row])
    };
    let step = |micro_batches: Vec<MicroBatch>, n_targets| {
        let batch = Batch {
            micro_batches,
            n_targets,
            digest: RowsDigest::default(),
        };
        let mut trainer = trainer(&plan, comm.as_ref());
        let report = trainer.train_step(&batch, false).unwrap();
        let values: Vec<Tensor> = gradients(&trainer).map(|(_, gradient)| gradient).collect();
        (report, values)
    };
    let (plain, gradient) = step(vec![learned()], 47);
    for micro_batches in [vec![learned(), read_only()], vec![read_only(), learned()]] {
        let (report, same) = step(micro_batches, 47);
        assert_eq!((report.loss, report.targets), (plain.loss, 47));
        assert!(gradient == same);
    }
    // Nor does a whole batch without any break the step.
    let (report, gradient) = step(vec![read_only()], 0);
    assert_eq!((report.loss, report.targets, report.verdict.finite), (0.0, 0, true));
    assert!(
        gradient
            .iter()
            .all(|gradient| gradient.abs().max().double_value(&[]) == 0.0)
    );
}

#[test]
fn targets_are_the_following_tokens_that_are_to_be_learned() {
    let mut row = row(&[4, 3], 9);
    row.is_target[2] = false;
    let micro = MicroBatch::new(&[7], std::slice::from_ref(&row));
    let targets: Vec<i64> = Vec::try_from(micro.targets_bt.view([-1])).unwrap();
    let t = &row.tokens;
    assert_eq!(
        targets,
        [t[1], IGNORE, t[3], IGNORE, t[5], t[6], IGNORE, IGNORE, IGNORE]
    );
    assert_eq!(
        targets.iter().filter(|target| **target != IGNORE).count(),
        row.n_targets()
    );
}

/// A row of documents of these lengths, then padding, all different from row to row.
fn row(lengths: &[u32], sequence_length: usize) -> Row {
    let total: u32 = lengths.iter().sum();
    let mut document_starts: Vec<u32> = lengths
        .iter()
        .scan(0, |at, n| {
            *at += n;
            Some(*at - n)
        })
        .collect();
    if (total as usize) < sequence_length {
        document_starts.push(total);
    }
    let token = |at: usize| {
        if at < total as usize {
            (at * at * 31 + 7 * lengths.len() + at) as i64 % PIECES as i64
        } else {
            0
        }
    };
    Row {
        part: 0,
        tokens: (0..sequence_length).map(token).collect(),
        is_target: (0..sequence_length)
            .map(|at| at < total as usize && !document_starts.contains(&(at as u32)))
            .collect(),
        document_starts,
    }
}

/// Each document of a row as a row of its own.
fn documents(row: &Row) -> Vec<Row> {
    let ends = row.document_starts[1..]
        .iter()
        .copied()
        .chain([row.tokens.len() as u32]);
    let pieces = row
        .document_starts
        .iter()
        .zip(ends)
        .map(|(start, end)| *start as usize..end as usize);
    pieces
        .map(|piece| Row {
            part: 0,
            tokens: row.tokens[piece.clone()].to_vec(),
            is_target: row.is_target[piece].to_vec(),
            document_starts: vec![0],
        })
        .collect()
}

/// Two layers, grouped heads, LoRA and both matrices in training.
fn plan(root: &Path, recompute: Recompute) -> Plan {
    let recipe = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs/tiny.yaml");
    let mut plan = configs::load(&recipe, &[]).unwrap();
    let pieces = root.join("pieces");
    write_tokenizer(&pieces, PIECES);
    plan.model = configs::Model::Scratch {
        shape: Shape {
            hidden_size: 32,
            intermediate_size: 48,
            num_hidden_layers: 2,
            num_attention_heads: 4,
            max_position_embeddings: 64,
            tie_word_embeddings: false,
            family: Family::Llama {
                num_key_value_heads: 2,
                rms_norm_eps: 1e-5,
                rope_theta: 10_000.0,
            },
        },
        // Large, so that attention is far from uniform.
        init_std: 0.3,
        tokenizer: Pieces::Folder { path: pieces },
    };
    plan.train.recompute = recompute.into();
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
        vocabulary: None,
        seed: 1,
    };
    let (config, weights) = (ModelConfig::open(folder).unwrap(), Weights::open(folder).unwrap());
    let mut model = Model::load(&config, &weights, Kind::Float, &trains).unwrap();
    let specs = model.register();
    let initial = model.take_initial_values();
    // LoRA's B starts at zero, which would leave A without a gradient.
    let zero = Zero::new(comm, Stage::OptimizerState, &specs, Kind::Float, |bucket, param| {
        let value = &initial[bucket][param];
        value + 0.01 * (value.ones_like().cumsum(0, Kind::Float) * 0.7).sin()
    })
    .unwrap();
    let mut trainer = Trainer::new(plan, comm, model, zero);
    trainer.zero.clear_gradients();
    trainer
}

/// (name, gradient) of everything that trains.
fn gradients<'a>(trainer: &'a Trainer) -> impl Iterator<Item = (String, Tensor)> + 'a {
    let buckets = trainer.zero.layout().buckets.iter().enumerate();
    buckets.flat_map(move |(b, bucket)| {
        let params = bucket.params.iter().enumerate();
        params.map(move |(p, param)| (param.name.clone(), trainer.zero.trained(b, p).grad.copy()))
    })
}

fn difference(ours: &Tensor, theirs: &Tensor) -> f64 {
    let norm = |x: &Tensor| x.to_kind(Kind::Double).norm().double_value(&[]);
    norm(&(ours - theirs)) / norm(theirs)
}
