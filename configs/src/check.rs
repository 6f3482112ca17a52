//! From the config as typed to the plan: every rule, once. A broken rule is a sentence with the value, the rule and the
//! next move; all of them are collected, so that one look mends the config.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf, absolute};

use crate::plan::*;
use crate::raw::{self, ModelKind, PiecesKind, Raw, SourceKind};

/// The linear layers of a LLaMA block that LoRA can stand beside.
pub const LORA_TARGETS: [&str; 7] = [
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
];

pub fn plan(raw: Raw) -> Result<Plan, Vec<String>> {
    let mut rules = Rules::default();
    let model = model(&raw.model, &mut rules);
    // What is typed of the optimizer is checked against what is typed of training; each key's complaint comes once.
    let full = full_modules(&raw.train.full, &mut Rules::default());
    let folders = folders(&raw, &mut rules);
    let optimizer = optimizer(raw.optimizer, &raw.train, &full, &mut rules);
    let train = train(raw.train, &mut rules);
    let plan = Plan {
        folders,
        corpus: corpus(raw.corpus, &mut rules),
        optimizer,
        train,
        name: raw.name,
        seed: raw.seed,
        // A placeholder where a rule is broken already; the plan is not handed out then.
        model: model.unwrap_or(Model::Folder),
        vocabulary: raw.vocabulary,
        sampling: raw.sampling,
        checkpoint: raw.checkpoint,
        evaluation: raw.evaluation,
        launch: raw.launch,
        debug: raw.debug.map_or_else(Debug::default, |debug| Debug {
            check_ranks_equal: debug.check_ranks_equal.unwrap_or(false),
            overfit_one_batch: debug.overfit_one_batch.unwrap_or(false),
        }),
    };
    check_name(&plan.name, &mut rules);
    check_vocabulary(&plan, &mut rules);
    check_batch(&plan, &mut rules);
    check_lengths(&plan, &mut rules);
    if rules.broken.is_empty() {
        Ok(plan)
    } else {
        Err(rules.broken)
    }
}

#[derive(Default)]
struct Rules {
    broken: Vec<String>,
}

impl Rules {
    fn require(&mut self, holds: bool, otherwise: impl FnOnce() -> String) {
        if !holds {
            self.broken.push(otherwise());
        }
    }

    fn at_least<T: PartialOrd + std::fmt::Display>(&mut self, key: &str, value: T, least: T) {
        self.require(value >= least, || {
            format!("{key} = {value} is less than {least}; set it to {least} or more")
        });
    }

    fn path(&mut self, key: &str, path: &Path) -> PathBuf {
        self.require(!path.as_os_str().is_empty(), || {
            format!("{key} is empty; name a folder or file")
        });
        absolute(path).unwrap_or_else(|_| path.to_owned())
    }
}

fn check_name(name: &str, rules: &mut Rules) {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    rules.require(
        !name.is_empty() && name.chars().all(plain) && !name.starts_with('.'),
        || format!("name = {name:?} is not a plain name; use letters, digits, `-`, `_` and `.`, such as demo-2"),
    );
}

fn folders(raw: &Raw, rules: &mut Rules) -> Folders {
    let prepared = rules.path("folders.prepared", &raw.folders.prepared);
    let mut place = |key: &str, typed: &Option<PathBuf>| match typed {
        Some(path) => rules.path(&format!("folders.{key}"), path),
        None => prepared.join(key),
    };
    let folders = Folders {
        corpus: place("corpus", &raw.folders.corpus),
        vocabulary: place("vocabulary", &raw.folders.vocabulary),
        tokens: place("tokens", &raw.folders.tokens),
        base_model: match (raw.model.kind, &raw.model.path) {
            (ModelKind::Folder, Some(path)) => absolute(path).unwrap_or_else(|_| path.clone()),
            _ => prepared.join("base_model"),
        },
        run: rules.path("folders.run", &raw.folders.run),
    };
    let named = [
        ("corpus", &folders.corpus),
        ("vocabulary", &folders.vocabulary),
        ("tokens", &folders.tokens),
        ("run", &folders.run),
        ("base_model", &folders.base_model),
    ];
    for (i, (a, path_a)) in named.iter().enumerate() {
        for (b, path_b) in &named[i + 1..] {
            rules.require(!path_a.starts_with(path_b) && !path_b.starts_with(path_a), || {
                format!(
                    "folders.{a} = {} and folders.{b} = {} lie inside each other; give each stage a folder of its own",
                    path_a.display(),
                    path_b.display()
                )
            });
        }
    }
    folders
}

fn corpus(raw: raw::Corpus, rules: &mut Rules) -> Corpus {
    let path = rules.path("corpus.source.path", &raw.source.path);
    rules.require((0.0..1.0).contains(&raw.held_out), || {
        format!(
            "corpus.held_out = {} is not a share of the documents, 0 ≤ held_out < 1; try 0.1",
            raw.held_out
        )
    });
    for (key, token) in [
        ("document_start", &raw.document_start),
        ("document_end", &raw.document_end),
    ] {
        rules.require(token.as_deref() != Some(""), || {
            format!("corpus.{key} is empty; name one of the tokenizer's special tokens, or remove the line")
        });
    }
    Corpus {
        source: match raw.source.kind {
            SourceKind::Udhr => Source::Udhr { path },
            SourceKind::Folders => Source::Folders { path },
        },
        held_out: raw.held_out,
        document_start: raw.document_start,
        document_end: raw.document_end,
    }
}

/// None where a rule is broken that leaves nothing to build.
fn model(raw: &raw::Model, rules: &mut Rules) -> Option<Model> {
    let kind = match raw.kind {
        ModelKind::Folder => "folder",
        ModelKind::Gguf => "gguf",
        ModelKind::Scratch => "scratch",
    };
    let scratch = raw.kind == ModelKind::Scratch;
    for (key, typed, wanted) in [
        ("path", raw.path.is_some(), !scratch),
        ("shape", raw.shape.is_some(), scratch),
        ("init_std", raw.init_std.is_some(), scratch),
        ("tokenizer", raw.tokenizer.is_some(), scratch),
    ] {
        rules.require(typed || !wanted, || {
            format!("model.{key} is missing, and kind: {kind} needs it; add it")
        });
        rules.require(wanted || !typed, || {
            format!("model.{key} means nothing with kind: {kind}; remove it")
        });
    }
    if let Some(path) = &raw.path {
        rules.path("model.path", path);
    }
    match raw.kind {
        ModelKind::Folder => Some(Model::Folder),
        ModelKind::Gguf => Some(Model::Gguf {
            path: rules.path("model.path", raw.path.as_deref()?),
        }),
        ModelKind::Scratch => {
            let (shape, init_std, pieces) = (raw.shape.clone()?, raw.init_std?, raw.tokenizer.as_ref()?);
            check_shape(&shape, rules);
            rules.require(init_std > 0.0 && init_std < 1.0, || {
                format!("model.init_std = {init_std} is not a standard deviation between 0 and 1; try 0.02")
            });
            let path = rules.path("model.tokenizer.path", &pieces.path);
            let tokenizer = match pieces.kind {
                PiecesKind::Folder => Pieces::Folder { path },
                PiecesKind::LlamaTokenizerJs => Pieces::LlamaTokenizerJs { path },
            };
            Some(Model::Scratch {
                shape,
                init_std,
                tokenizer,
            })
        }
    }
}

fn check_shape(shape: &Shape, rules: &mut Rules) {
    let (hidden, heads, kv_heads) = (shape.hidden_size, shape.num_attention_heads, shape.num_key_value_heads);
    for (key, value) in [
        ("hidden_size", hidden),
        ("intermediate_size", shape.intermediate_size),
        ("num_hidden_layers", shape.num_hidden_layers),
        ("num_attention_heads", heads),
        ("num_key_value_heads", kv_heads),
        ("max_position_embeddings", shape.max_position_embeddings),
    ] {
        rules.at_least(&format!("model.shape.{key}"), value, 1);
    }
    if hidden == 0 || heads == 0 || kv_heads == 0 {
        return;
    }
    // RoPE turns the two halves of a head, so a head's width is even.
    rules.require(hidden.is_multiple_of(2 * heads), || {
        format!(
            "model.shape.hidden_size = {hidden} is not a multiple of {} (2 × {heads} heads: RoPE turns pairs); try {}",
            2 * heads,
            hidden.next_multiple_of(2 * heads)
        )
    });
    rules.require(heads.is_multiple_of(kv_heads), || {
        format!(
            "model.shape.num_attention_heads = {heads} is not a multiple of num_key_value_heads = {kv_heads}; \
             every key/value head serves the same number of heads; try num_key_value_heads: {heads}"
        )
    });
    rules.require(shape.rms_norm_eps > 0.0, || {
        format!(
            "model.shape.rms_norm_eps = {} must be above 0; LLaMA 2 has 1e-5",
            shape.rms_norm_eps
        )
    });
    rules.require(shape.rope_theta > 1.0, || {
        format!(
            "model.shape.rope_theta = {} must be above 1; LLaMA 2 has 10000",
            shape.rope_theta
        )
    });
}

fn train(raw: raw::Train, rules: &mut Rules) -> Train {
    rules.at_least("train.steps", raw.steps, 1);
    rules.at_least("train.micro_rows", raw.micro_rows, 1);
    rules.at_least("train.rows_per_step", raw.rows_per_step, 1);
    rules.require(raw.sequence_length >= 2, || {
        format!(
            "train.sequence_length = {} leaves no target: a row of T tokens has T - 1; set it to 2 or more",
            raw.sequence_length
        )
    });
    rules.require(raw.zero <= 1, || {
        format!(
            "train.zero = {} is not 0 or 1: this build shards optimizer state only (ZeRO-1), neither gradients (2) nor \
             parameters (3); set it to 1",
            raw.zero
        )
    });
    rules.require(raw.lora.is_some() || !raw.full.is_empty(), || {
        "train.full = [] and there is no train.lora: nothing trains; add a lora section, or name embed_tokens or lm_head \
         in full"
            .to_owned()
    });
    let full = full_modules(&raw.full, rules);
    if let Some(lora) = &raw.lora {
        check_lora(lora, &full, rules);
    }
    Train {
        steps: raw.steps,
        sequence_length: raw.sequence_length,
        rows_per_step: raw.rows_per_step,
        micro_rows: raw.micro_rows,
        precision: raw.precision,
        recompute: raw.recompute,
        zero: raw.zero,
        lora: raw.lora,
        full,
    }
}

/// In the order of [`FullModule::ALL`], whatever the order in the config.
fn full_modules(typed: &[String], rules: &mut Rules) -> Vec<FullModule> {
    if typed == ["all"] {
        return FullModule::ALL.to_vec();
    }
    for (i, name) in typed.iter().enumerate() {
        rules.require(FullModule::ALL.iter().any(|module| module.name() == name), || {
            let known = FullModule::ALL.map(FullModule::name).join(", ");
            format!("train.full names `{name}`, which no LLaMA model has; known: {known}; or [all] alone for every parameter")
        });
        rules.require(!typed[..i].contains(name), || {
            format!("train.full names {name} twice; name each module once")
        });
    }
    let named = |module: &FullModule| typed.iter().any(|name| name == module.name());
    FullModule::ALL.into_iter().filter(named).collect()
}

fn check_lora(lora: &Lora, full: &[FullModule], rules: &mut Rules) {
    rules.at_least("train.lora.rank", lora.rank, 1);
    rules.require(lora.alpha > 0.0, || {
        format!(
            "train.lora.alpha = {} must be above 0: it scales LoRA's output by alpha / rank; try 16",
            lora.alpha
        )
    });
    rules.require((0.0..1.0).contains(&lora.dropout), || {
        format!(
            "train.lora.dropout = {} is not a probability below 1, 0 ≤ dropout < 1; try 0.1 or 0",
            lora.dropout
        )
    });
    rules.require(!lora.targets.is_empty(), || {
        "train.lora.targets is empty: LoRA would stand nowhere; name layers such as q_proj, v_proj, or remove lora"
            .to_owned()
    });
    for (i, target) in lora.targets.iter().enumerate() {
        rules.require(LORA_TARGETS.contains(&target.as_str()), || {
            format!(
                "train.lora.targets names `{target}`, which no LLaMA block has; known: {}",
                LORA_TARGETS.join(", ")
            )
        });
        rules.require(!lora.targets[..i].contains(target), || {
            format!("train.lora.targets names `{target}` twice; name each layer once")
        });
        rules.require(!full.iter().any(|module| module.name() == target), || {
            format!("`{target}` is in train.lora.targets and in train.full: what trains in full needs no LoRA; name it in one")
        });
    }
}

/// `full` is `train.full`, read.
fn optimizer(raw: raw::Optimizer, train: &raw::Train, full: &[FullModule], rules: &mut Rules) -> Optimizer {
    let groups = groups(&raw, train, full, rules);
    for (key, beta, usual) in [("beta1", raw.beta1, 0.9), ("beta2", raw.beta2, 0.999)] {
        rules.require((0.0..1.0).contains(&beta), || {
            format!("optimizer.{key} = {beta} is not a decay, 0 ≤ {key} < 1; try {usual}")
        });
    }
    rules.require(raw.epsilon > 0.0, || {
        format!(
            "optimizer.epsilon = {} must be above 0, or a row without gradient divides by zero; try 1e-8",
            raw.epsilon
        )
    });
    if let Some(norm) = raw.max_grad_norm {
        rules.require(norm > 0.0, || {
            format!("optimizer.max_grad_norm = {norm} must be above 0; try 1.0, or remove the line to leave gradients as they are")
        });
    }
    rules.require(raw.warmup_steps < train.steps || train.steps == 0, || {
        format!(
            "optimizer.warmup_steps = {} is not less than train.steps = {}: the peak would never be reached; try {}",
            raw.warmup_steps,
            train.steps,
            train.steps / 10
        )
    });
    let final_lr_share = raw.final_lr_share.unwrap_or(0.0);
    rules.require((0.0..=1.0).contains(&final_lr_share), || {
        format!("optimizer.final_lr_share = {final_lr_share} is not a share of the peak, 0 to 1; try 0.1")
    });
    rules.require(
        raw.schedule != Schedule::Constant || raw.final_lr_share.is_none(),
        || format!("optimizer.final_lr_share = {final_lr_share} means nothing with schedule: constant; remove it"),
    );
    Optimizer {
        groups,
        beta1: raw.beta1,
        beta2: raw.beta2,
        epsilon: raw.epsilon,
        max_grad_norm: raw.max_grad_norm,
        warmup_steps: raw.warmup_steps,
        schedule: raw.schedule,
        final_lr_share,
    }
}

/// Learning rate and weight decay of every group that trains.
fn groups(raw: &raw::Optimizer, train: &raw::Train, full: &[FullModule], rules: &mut Rules) -> BTreeMap<Group, Rates> {
    let trains = |group: Group| match group {
        Group::Lora => train.lora.is_some(),
        _ => full.iter().any(|module| module.group() == group),
    };
    let own = raw.groups.clone().unwrap_or_default();
    for (typed, key, of, groups) in [
        (raw.lr_lora, "lr_lora", "train.lora", &[Group::Lora][..]),
        (
            raw.lr_embeddings,
            "lr_embeddings",
            "train.full",
            &[Group::Embeddings, Group::Head],
        ),
        (raw.lr_body, "lr_body", "train.full", &[Group::Body, Group::Norms]),
    ] {
        let any = groups.iter().any(|group| trains(*group));
        let all_have_own = groups
            .iter()
            .filter(|group| trains(**group))
            .all(|group| own.get(group).is_some_and(|own| own.lr.is_some()));
        rules.require(typed.is_some() || !any || all_have_own, || {
            format!("optimizer.{key} is missing, and {of} trains; add it")
        });
        rules.require(any || typed.is_none(), || {
            format!("optimizer.{key} is set, but {of} names nothing that goes by it; remove it, or fill {of}")
        });
        rules.require(!any || typed.is_none_or(|lr| lr > 0.0 && lr < 1.0), || {
            format!(
                "optimizer.{key} = {} is not a learning rate between 0 and 1; try 3e-4",
                typed.unwrap_or(0.0)
            )
        });
    }
    let decay = |key: String, decay: f64, rules: &mut Rules| {
        rules.require(decay >= 0.0, || {
            format!("optimizer.{key} = {decay} is negative; try 0.1, or 0 for none")
        });
    };
    decay("weight_decay".into(), raw.weight_decay, rules);
    for (group, own) in &own {
        let name = group.name();
        rules.require(trains(*group), || {
            format!("optimizer.groups.{name} is set, but nothing of this group trains; remove it, or add to train.full or train.lora")
        });
        rules.require(own.lr.is_none_or(|lr| (0.0..1.0).contains(&lr)), || {
            format!(
                "optimizer.groups.{name}.lr = {} is not a learning rate, 0 ≤ lr < 1; try 3e-4",
                own.lr.unwrap_or(0.0)
            )
        });
        if let Some(own) = own.weight_decay {
            decay(format!("groups.{name}.weight_decay"), own, rules);
        }
    }
    let rates = |group: Group| {
        let own = own.get(&group).copied().unwrap_or_default();
        let (lr, weight_decay) = match group {
            Group::Lora => (raw.lr_lora, raw.weight_decay),
            Group::Embeddings | Group::Head => (raw.lr_embeddings, raw.weight_decay),
            Group::Body => (raw.lr_body, raw.weight_decay),
            // A scale that decays towards zero is no regulariser; `transformers` leaves norms out as well.
            Group::Norms => (raw.lr_body, 0.0),
        };
        Rates {
            // A placeholder where the rule above is broken; the plan is not handed out then.
            lr: own.lr.or(lr).unwrap_or(0.0),
            weight_decay: own.weight_decay.unwrap_or(weight_decay),
        }
    };
    Group::ALL
        .into_iter()
        .filter(|group| trains(*group))
        .map(|group| (group, rates(group)))
        .collect()
}

fn check_vocabulary(plan: &Plan, rules: &mut Rules) {
    let mut alpha = |key: &str, alpha: f64| {
        rules.require((0.0..=1.0).contains(&alpha), || {
            format!("{key} = {alpha} is not in 0 … 1 (0: all languages alike, 1: as much as there is); try 0.3")
        });
    };
    alpha("sampling.alpha", plan.sampling.alpha);
    let Some(vocabulary) = &plan.vocabulary else { return };
    alpha("vocabulary.alpha", vocabulary.alpha);
    rules.require(vocabulary.new_pieces >= 1, || {
        "vocabulary.new_pieces = 0 extends nothing; remove the vocabulary section to keep the base's own pieces"
            .to_owned()
    });
    rules.at_least("vocabulary.max_piece_bytes", vocabulary.max_piece_bytes, 2);
    rules.at_least("vocabulary.multiple_of", vocabulary.multiple_of, 1);
    // Untrained new rows are noise for ever; that is never what was meant.
    rules.require(plan.train.full.contains(&FullModule::EmbedTokens), || {
        format!(
            "vocabulary.new_pieces = {} adds rows to the embedding, but train.full does not name embed_tokens: they would \
             never learn; add embed_tokens to train.full",
            vocabulary.new_pieces
        )
    });
}

/// The global batch is dealt to ranks in whole micro-batches.
fn check_batch(plan: &Plan, rules: &mut Rules) {
    rules.at_least("launch.ranks", plan.launch.ranks, 1);
    if let Some(threads) = plan.launch.threads_per_rank {
        rules.at_least("launch.threads_per_rank", threads, 1);
    }
    let (rows, micro, ranks) = (plan.train.rows_per_step, plan.train.micro_rows, plan.launch.ranks);
    let unit = ranks.saturating_mul(micro);
    if rows == 0 || unit == 0 {
        return;
    }
    rules.require(rows.is_multiple_of(unit), || {
        let fitting = rows.next_multiple_of(unit);
        let mut sentence = format!(
            "train.rows_per_step = {rows} is not a multiple of {unit} ({ranks} {} × {micro} micro_rows); try {fitting}",
            if ranks == 1 { "rank" } else { "ranks" },
        );
        if rows.is_multiple_of(ranks) {
            let per_rank = rows / ranks;
            let micro = (1..=micro).rev().find(|m| per_rank.is_multiple_of(*m)).unwrap_or(1);
            sentence += &format!(", or train.micro_rows = {micro}");
        }
        sentence
    });
}

fn check_lengths(plan: &Plan, rules: &mut Rules) {
    rules.at_least("checkpoint.every_steps", plan.checkpoint.every_steps, 1);
    rules.require(plan.checkpoint.keep >= 2, || {
        format!(
            "checkpoint.keep = {} is less than 2: should the newest turn out damaged, nothing would be left; set it to 2",
            plan.checkpoint.keep
        )
    });
    let Evaluation {
        documents_per_language,
        window,
        stride,
        tokens_per_batch,
    } = plan.evaluation;
    rules.at_least("evaluation.window", window, 2);
    rules.require(documents_per_language != Some(0), || {
        "evaluation.documents_per_language = 0 measures nothing; remove the line to measure all held-out documents"
            .to_owned()
    });
    rules.require((1..window.max(2)).contains(&stride), || {
        format!(
            "evaluation.stride = {stride} is not in 1 … {} (window - 1): windows overlap by at least the one token that \
             predicts; try {}",
            window.saturating_sub(1),
            (window / 2).max(1)
        )
    });
    rules.require(tokens_per_batch >= window, || {
        format!(
            "evaluation.tokens_per_batch = {tokens_per_batch} does not hold one window of {window}; try {}",
            4 * window
        )
    });
    if let Model::Scratch { shape, .. } = &plan.model {
        for (key, tokens) in [
            ("train.sequence_length", plan.train.sequence_length),
            ("evaluation.window", window),
        ] {
            rules.require(tokens <= shape.max_position_embeddings, || {
                format!(
                    "{key} = {tokens} is more than model.shape.max_position_embeddings = {}; shorten one or lengthen the other",
                    shape.max_position_embeddings
                )
            });
        }
    }
}
