//! From the config as typed to the plan: every rule, once. A broken rule is a sentence with the value, the rule and the
//! next move; all of them are collected, so that one look mends the config.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf, absolute};

use crate::plan::*;
use crate::planner::Hardware;
use crate::planner::sizes::PUBLISHED;
use crate::raw::{self, FamilyName, ModelKind, PiecesKind, Raw, SourceKind as Kind};

/// Who carries the plan out.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Ranks {
    /// `launch.ranks`, whom the global batch must suit.
    AsPlanned,
    Any,
}

pub fn plan(raw: Raw, ranks: Ranks) -> Result<Plan, Vec<String>> {
    let mut rules = Rules::default();
    let model = model(&raw.model, &mut rules);
    let full = full_modules(&raw.train.full, model.as_ref(), &mut rules);
    let typed_full = raw.train.full.clone();
    let folders = folders(&raw, &mut rules);
    let device = raw.train.device.unwrap_or_default();
    let hardware = raw.hardware.as_ref().and_then(|choice| {
        let chosen = Hardware::choose(choice, device);
        chosen.map_err(|sentence| rules.broken.push(sentence)).ok()
    });
    let optimizer = optimizer(raw.optimizer, &raw.train, &full, &mut rules);
    let train = train(raw.train, full, &mut rules);
    let plan = Plan {
        folders,
        corpus: corpus(raw.corpus, &mut rules),
        optimizer,
        train,
        name: raw.name,
        seed: raw.seed,
        // A placeholder where a rule is broken already; the plan is not handed out then.
        model: model.unwrap_or(Model::Folder { published: None }),
        vocabulary: raw.vocabulary,
        sampling: raw.sampling,
        checkpoint: checkpoint(raw.checkpoint),
        evaluation: raw.evaluation,
        launch: raw.launch,
        debug: raw.debug.map_or_else(Debug::default, |debug| Debug {
            check_ranks_equal: debug.check_ranks_equal.unwrap_or(false),
            overfit_one_batch: debug.overfit_one_batch.unwrap_or(false),
            timeline: debug.timeline.unwrap_or(false),
            deterministic: debug.deterministic.unwrap_or(false),
            verify_resume: debug.verify_resume,
            stop_after: debug.stop_after,
            die_after: debug.die_after,
        }),
        hardware,
    };
    check_name(&plan.name, &mut rules);
    check_modules(&plan, &typed_full, &mut rules);
    check_sampling(&plan.sampling, &mut rules);
    check_vocabulary(&plan, &mut rules);
    check_text(&plan, &mut rules);
    check_launch(&plan, &mut rules);
    if ranks == Ranks::AsPlanned {
        check_batch(&plan, &mut rules);
    }
    check_checkpoint(&plan, &mut rules);
    check_lengths(&plan, &mut rules);
    if let Model::Scratch { shape, .. } = &plan.model
        && let Err(sentence) = plan.train.recompute.check(shape.num_hidden_layers)
    {
        rules.broken.push(sentence);
    }
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
    let sources = sources(&raw.sources, rules);
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
    rules.require(raw.held_out_most != Some(0), || {
        "corpus.held_out_most = 0 holds nothing out; set held_out: 0 for that, or remove the line".to_owned()
    });
    rules.require(raw.near_duplicates.is_none_or(|share| (0.5..=1.0).contains(&share)), || {
        format!(
            "corpus.near_duplicates = {} is not a similarity from 0.5 to 1, the share of word 5-grams in common; try 0.8",
            raw.near_duplicates.unwrap_or_default()
        )
    });
    Corpus {
        sources,
        held_out: raw.held_out,
        held_out_most: raw.held_out_most,
        deduplicate_lines: raw.deduplicate_lines.unwrap_or(false),
        nfc: raw.nfc.unwrap_or(false),
        near_duplicates: raw.near_duplicates,
        contamination: raw.contamination.map(|raw| contamination(&raw, rules)),
        on_unreadable: raw.on_unreadable.unwrap_or(OnUnreadable::Stop),
        document_start: raw.document_start,
        document_end: raw.document_end,
    }
}

fn contamination(raw: &raw::Contamination, rules: &mut Rules) -> Contamination {
    rules.require(!raw.files.is_empty(), || {
        "corpus.contamination.files is empty; name the evaluation files, or remove the section".to_owned()
    });
    let (words, characters) = (raw.words.unwrap_or(13), raw.characters.unwrap_or(50));
    for (key, n) in [("words", words), ("characters", characters)] {
        rules.require(n >= 5, || {
            format!(
                "corpus.contamination.{key} = {n}: so few stand in common by chance; take at least 5, or remove the line"
            )
        });
    }
    let path = |path: &PathBuf| rules.path("corpus.contamination.files", path);
    Contamination {
        files: raw.files.iter().map(path).collect(),
        words,
        characters,
    }
}

/// What stands before an answer where the config says nothing: MultiAlpaca's prompt (RECIPES: PolyLM).
const PROMPT: &str = "<|user|>\n{instruction}\n{input}\n<|assistant|>\n";

fn sources(raw: &[raw::Source], rules: &mut Rules) -> Vec<Source> {
    rules.require(!raw.is_empty(), || {
        "corpus.sources is empty; name at least one place that text comes from".to_owned()
    });
    for (index, source) in raw.iter().enumerate() {
        let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
        rules.require(!source.name.is_empty() && source.name.chars().all(plain), || {
            format!(
                "corpus.sources.{index}.name = {:?} is not a plain name; use a-z, 0-9 and `-`, such as glot500",
                source.name
            )
        });
        rules.require(raw[..index].iter().all(|before| before.name != source.name), || {
            format!(
                "corpus.sources names `{}` twice; each source needs a name of its own",
                source.name
            )
        });
    }
    let checked = raw.iter().enumerate().map(|(index, raw)| {
        let kind = source_kind(raw, &format!("corpus.sources.{index}"), rules)?;
        Some(Source {
            name: raw.name.clone(),
            licence: raw.licence.clone(),
            kind,
        })
    });
    checked.flatten().collect()
}

/// None where a rule is broken that leaves nothing to build.
fn source_kind(raw: &raw::Source, at: &str, rules: &mut Rules) -> Option<SourceKind> {
    use Kind::{Files, Folders, Instructions, Megatron, Parallel, Udhr};
    let kind = match raw.kind {
        Udhr => "udhr",
        Folders => "folders",
        Files => "files",
        Parallel => "parallel",
        Instructions => "instructions",
        Megatron => "megatron",
    };
    for (key, typed, kinds) in [
        (
            "path",
            raw.path.is_some(),
            &[Udhr, Folders, Files, Parallel, Instructions, Megatron][..],
        ),
        ("paths", raw.paths.is_some(), &[Files]),
        ("language", raw.language.is_some(), &[Files, Instructions]),
        ("language_column", raw.language_column.is_some(), &[Files]),
        ("text_column", raw.text_column.is_some(), &[Files, Folders]),
        ("one_document", raw.one_document.is_some(), &[Folders]),
        ("source_path", raw.source_path.is_some(), &[Parallel]),
        ("target_path", raw.target_path.is_some(), &[Parallel]),
        ("languages", raw.languages.is_some(), &[Parallel]),
        ("template", raw.template.is_some(), &[Parallel]),
        ("prompt", raw.prompt.is_some(), &[Instructions]),
    ] {
        rules.require(!typed || kinds.contains(&raw.kind), || {
            format!("{at}.{key} means nothing with kind: {kind}; remove it")
        });
    }
    for language in raw.language.iter().chain(raw.languages.iter().flatten()) {
        rules.require(is_language(language), || {
            format!(
                "{at}: `{language}` is not a language: expected ISO 639-3 and ISO 15924 joined by `_`, as in eng_Latn"
            )
        });
    }
    let mut path = |key: &str, typed: &Option<PathBuf>| {
        rules.require(typed.is_some(), || {
            format!("{at}.{key} is missing, and kind: {kind} needs it; add it")
        });
        typed.as_ref().map(|typed| rules.path(&format!("{at}.{key}"), typed))
    };
    match raw.kind {
        Udhr => Some(SourceKind::Udhr {
            path: path("path", &raw.path)?,
        }),
        Folders => Some(SourceKind::Folders {
            path: path("path", &raw.path)?,
            text_column: text_column(raw),
            one_document: raw.one_document.unwrap_or_default(),
        }),
        Megatron => Some(SourceKind::Megatron {
            path: path("path", &raw.path)?,
        }),
        Files => files(raw, at, rules),
        Parallel => parallel(raw, at, rules),
        Instructions => {
            let path = path("path", &raw.path)?;
            let prompt = raw.prompt.clone().unwrap_or_else(|| PROMPT.to_owned());
            rules.require(prompt.contains("{instruction}"), || {
                format!(
                    "{at}.prompt has no {{instruction}}: nothing would be asked; put it where the instruction belongs"
                )
            });
            Some(SourceKind::Instructions {
                path,
                language: raw.language.clone(),
                prompt,
            })
        }
    }
}

fn files(raw: &raw::Source, at: &str, rules: &mut Rules) -> Option<SourceKind> {
    let typed: Vec<&PathBuf> = raw.path.iter().chain(raw.paths.iter().flatten()).collect();
    rules.require(!typed.is_empty(), || {
        format!("{at}.path is missing, and kind: files needs it or paths; add one")
    });
    let paths = typed
        .iter()
        .map(|path| rules.path(&format!("{at}.path"), path))
        .collect();
    let language = match (&raw.language, &raw.language_column) {
        (Some(language), None) => Some(LanguageOf::Fixed(language.clone())),
        (None, Some(column)) => Some(LanguageOf::Column(column.clone())),
        _ => None,
    };
    rules.require(language.is_some(), || {
        format!(
            "{at} needs one of language (all its documents are in it) and language_column (a column that says lll_Ssss)"
        )
    });
    Some(SourceKind::Files {
        paths,
        language: language?,
        text_column: text_column(raw),
    })
}

fn text_column(raw: &raw::Source) -> String {
    raw.text_column.clone().unwrap_or_else(|| "text".to_owned())
}

fn parallel(raw: &raw::Source, at: &str, rules: &mut Rules) -> Option<SourceKind> {
    let sides = match (&raw.path, &raw.source_path, &raw.target_path) {
        (Some(path), None, None) => Some(Sides::Tsv(rules.path(&format!("{at}.path"), path))),
        (None, Some(source), Some(target)) => Some(Sides::Files {
            source: rules.path(&format!("{at}.source_path"), source),
            target: rules.path(&format!("{at}.target_path"), target),
        }),
        _ => None,
    };
    rules.require(sides.is_some(), || {
        format!("{at} needs source_path and target_path (aligned line by line), or path alone (source, tab, target)")
    });
    let languages = raw
        .languages
        .as_deref()
        .and_then(|two| <[String; 2]>::try_from(two.to_vec()).ok());
    rules.require(languages.is_some(), || {
        format!("{at}.languages must name two, of the source and of the target side, such as [eng_Latn, fra_Latn]")
    });
    let template = raw.template.clone().unwrap_or_default();
    rules.require(template.contains("{source}") && template.contains("{target}"), || {
        format!(
            "{at}.template = {template:?} does not hold both sides; write {{source}} and {{target}}, such as \
             \"{{source}}\\n{{target}}\""
        )
    });
    Some(SourceKind::Parallel {
        sides: sides?,
        languages: languages?,
        template,
    })
}

/// The form alone; whether the codes exist is known when the source is opened.
fn is_language(name: &str) -> bool {
    let lower = |text: &str| text.bytes().all(|byte| byte.is_ascii_lowercase());
    name.len() == 8
        && name.is_ascii()
        && lower(&name[..3])
        && &name[3..4] == "_"
        && name[4..5].bytes().all(|byte| byte.is_ascii_uppercase())
        && lower(&name[5..])
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
    rules.require(raw.published.is_none() || raw.kind == ModelKind::Folder, || {
        format!("model.published means nothing with kind: {kind}; remove it")
    });
    if let Some(path) = &raw.path {
        rules.path("model.path", path);
    }
    match raw.kind {
        ModelKind::Folder => {
            let published = raw.published.clone();
            rules.require(published.as_ref().is_none_or(|name| PUBLISHED.contains(&name.as_str())), || {
                format!(
                    "model.published = {} is none that the planner knows; known: {}; or remove the line: sizes are read from \
                     model.path's config.json once it is there",
                    published.clone().unwrap_or_default(),
                    PUBLISHED.join(", ")
                )
            });
            Some(Model::Folder { published })
        }
        ModelKind::Gguf => Some(Model::Gguf {
            path: rules.path("model.path", raw.path.as_deref()?),
        }),
        ModelKind::Scratch => {
            let (shape, init_std, pieces) = (raw.shape.as_ref()?, raw.init_std?, raw.tokenizer.as_ref()?);
            let shape = shape_of(shape, rules)?;
            check_shape(&shape, rules);
            rules.require(init_std > 0.0 && init_std < 1.0, || {
                format!("model.init_std = {init_std} is not a standard deviation between 0 and 1; try 0.02")
            });
            Some(Model::Scratch {
                shape,
                init_std,
                tokenizer: tokenizer(pieces, rules)?,
            })
        }
    }
}

/// None where a rule is broken that leaves nothing to build.
fn tokenizer(raw: &raw::Pieces, rules: &mut Rules) -> Option<Pieces> {
    let trains = raw.kind == PiecesKind::Train;
    let kind = match raw.kind {
        PiecesKind::Folder => "folder",
        PiecesKind::LlamaTokenizerJs => "llama_tokenizer_js",
        PiecesKind::Train => "train",
    };
    for (key, typed, wanted, optional) in [
        ("path", raw.path.is_some(), !trains, false),
        ("algorithm", raw.algorithm.is_some(), trains, false),
        ("pieces", raw.pieces.is_some(), trains, false),
        ("alpha", raw.alpha.is_some(), trains, false),
        ("floor_bytes", raw.floor_bytes.is_some(), trains, true),
        ("cap_bytes", raw.cap_bytes.is_some(), trains, true),
        ("words", raw.words.is_some(), trains, true),
    ] {
        rules.require(typed || optional || !wanted, || {
            format!("model.tokenizer.{key} is missing, and kind: {kind} needs it; add it")
        });
        rules.require(wanted || !typed, || {
            format!("model.tokenizer.{key} means nothing with kind: {kind}; remove it")
        });
    }
    if !trains {
        let path = rules.path("model.tokenizer.path", raw.path.as_deref()?);
        return Some(match raw.kind {
            PiecesKind::LlamaTokenizerJs => Pieces::LlamaTokenizerJs { path },
            _ => Pieces::Folder { path },
        });
    }
    let (algorithm, pieces, alpha) = (raw.algorithm?, raw.pieces?, raw.alpha?);
    rules.require(pieces > 259, || {
        format!("model.tokenizer.pieces = {pieces} is not more than 259, which 3 special pieces and 256 bytes take; try 32000")
    });
    check_alpha("model.tokenizer.alpha", alpha, rules);
    check_bytes("model.tokenizer", raw.floor_bytes, raw.cap_bytes, rules);
    let words = raw.words.clone().unwrap_or_default();
    Some(Pieces::Train {
        algorithm,
        pieces,
        alpha,
        floor_bytes: raw.floor_bytes,
        cap_bytes: raw.cap_bytes,
        words,
    })
}

/// None where a key of the family is missing.
fn shape_of(raw: &raw::Shape, rules: &mut Rules) -> Option<Shape> {
    let family = raw.family.unwrap_or_default();
    let is_llama = family == FamilyName::Llama;
    let name = if is_llama { "llama" } else { "gpt2" };
    for (key, typed, wanted) in [
        ("num_key_value_heads", raw.num_key_value_heads.is_some(), is_llama),
        ("rms_norm_eps", raw.rms_norm_eps.is_some(), is_llama),
        ("rope_theta", raw.rope_theta.is_some(), is_llama),
        ("layer_norm_epsilon", raw.layer_norm_epsilon.is_some(), !is_llama),
        ("activation_function", raw.activation_function.is_some(), !is_llama),
    ] {
        rules.require(typed || !wanted, || {
            format!("model.shape.{key} is missing, and family: {name} needs it; add it")
        });
        rules.require(wanted || !typed, || {
            format!("model.shape.{key} means nothing with family: {name}; remove it")
        });
    }
    Some(Shape {
        hidden_size: raw.hidden_size,
        intermediate_size: raw.intermediate_size,
        num_hidden_layers: raw.num_hidden_layers,
        num_attention_heads: raw.num_attention_heads,
        max_position_embeddings: raw.max_position_embeddings,
        tie_word_embeddings: raw.tie_word_embeddings,
        family: match family {
            FamilyName::Llama => Family::Llama {
                num_key_value_heads: raw.num_key_value_heads?,
                rms_norm_eps: raw.rms_norm_eps?,
                rope_theta: raw.rope_theta?,
            },
            FamilyName::Gpt2 => Family::Gpt2 {
                layer_norm_epsilon: raw.layer_norm_epsilon?,
                activation_function: raw.activation_function?,
            },
        },
    })
}

fn check_shape(shape: &Shape, rules: &mut Rules) {
    let (hidden, heads) = (shape.hidden_size, shape.num_attention_heads);
    for (key, value) in [
        ("hidden_size", hidden),
        ("intermediate_size", shape.intermediate_size),
        ("num_hidden_layers", shape.num_hidden_layers),
        ("num_attention_heads", heads),
        ("max_position_embeddings", shape.max_position_embeddings),
    ] {
        rules.at_least(&format!("model.shape.{key}"), value, 1);
    }
    match shape.family {
        Family::Llama {
            num_key_value_heads: kv_heads,
            rms_norm_eps,
            rope_theta,
        } => {
            rules.at_least("model.shape.num_key_value_heads", kv_heads, 1);
            rules.require(rms_norm_eps > 0.0, || {
                format!("model.shape.rms_norm_eps = {rms_norm_eps} must be above 0; LLaMA 2 has 1e-5")
            });
            rules.require(rope_theta > 1.0, || {
                format!("model.shape.rope_theta = {rope_theta} must be above 1; LLaMA 2 has 10000")
            });
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
        }
        Family::Gpt2 { layer_norm_epsilon, .. } => {
            rules.require(layer_norm_epsilon > 0.0, || {
                format!("model.shape.layer_norm_epsilon = {layer_norm_epsilon} must be above 0; GPT-2 has 1e-5")
            });
            rules.require(heads == 0 || hidden.is_multiple_of(heads), || {
                format!(
                    "model.shape.hidden_size = {hidden} is not a multiple of num_attention_heads = {heads}; try {}",
                    hidden.next_multiple_of(heads)
                )
            });
        }
    }
}

/// Where the model's family is known before the model is: every named module is one of its own.
fn check_modules(plan: &Plan, typed: &[String], rules: &mut Rules) {
    let Model::Scratch { shape, .. } = &plan.model else {
        return;
    };
    let modules = shape.family.modules();
    let targets = plan.train.lora.iter().flat_map(|lora| &lora.targets);
    let named = typed
        .iter()
        .filter(|name| *name != "all")
        .map(|name| ("train.full", name))
        .chain(targets.map(|name| ("train.lora.targets", name)));
    for (key, name) in named {
        // A name that no family has is refused elsewhere.
        let known = FullModule::ALL.iter().any(|module| module.name() == name);
        rules.require(!known || modules.iter().any(|module| module.name() == name), || {
            let linears_only = key == "train.lora.targets";
            let possible = modules.iter().filter(|module| !linears_only || module.is_linear());
            let names: Vec<&str> = possible.map(|module| module.name()).collect();
            format!(
                "{key} names `{name}`, which no model of model.shape.family has; it has {}",
                names.join(", ")
            )
        });
    }
}

/// `full` is `train.full`, read.
fn train(raw: raw::Train, full: Vec<FullModule>, rules: &mut Rules) -> Train {
    rules.at_least("train.steps", raw.steps, 1);
    rules.at_least("train.micro_rows", raw.micro_rows, 1);
    rules.at_least("train.rows_per_step", raw.rows_per_step, 1);
    rules.require(raw.sequence_length >= 2, || {
        format!(
            "train.sequence_length = {} leaves no target: a row of T tokens has T - 1; set it to 2 or more",
            raw.sequence_length
        )
    });
    rules.require(raw.zero <= 3, || {
        format!(
            "train.zero = {} is no stage of ZeRO: 0 shards nothing, 1 optimizer state, 2 gradients too, 3 parameters too; \
             set it to 1, or higher where memory is short",
            raw.zero
        )
    });
    rules.require(raw.lora.is_some() || !raw.full.is_empty(), || {
        "train.full = [] and there is no train.lora: nothing trains; add a lora section, or name embed_tokens or lm_head \
         in full"
            .to_owned()
    });
    rules.require(
        raw.frozen_precision.is_none() || (raw.device == Some(Device::Cuda) && raw.precision == Precision::Bf16),
        || {
            "train.frozen_precision = fp8 is for train.device: cuda and train.precision: bf16, since only GPUs have units \
             that multiply 8-bit numbers; set both, or leave frozen_precision out"
                .to_owned()
        },
    );
    rules.require(
        raw.frozen_precision.is_none() || raw.shard_frozen != Some(true),
        || {
            "train.shard_frozen = true divides the frozen matrices among ranks, but train.frozen_precision = fp8 has each rank keep \
             its own in 8 bits, whole; leave out one of them"
                .to_owned()
        },
    );
    rules.require(
        raw.offload_optimizer != Some(true) || raw.device == Some(Device::Cuda),
        || {
            "train.offload_optimizer = true moves optimizer state from a GPU to its host, but train.device is cpu, where it \
             lies in the host's memory already; leave it out, or set train.device: cuda"
                .to_owned()
        },
    );
    if let Some(lora) = &raw.lora {
        check_lora(lora, &full, rules);
    }
    if let Some(guard) = &raw.guard {
        check_guard(guard, rules);
    }
    Train {
        steps: raw.steps,
        sequence_length: raw.sequence_length,
        rows_per_step: raw.rows_per_step,
        micro_rows: raw.micro_rows,
        precision: raw.precision,
        frozen_precision: raw.frozen_precision,
        device: raw.device.unwrap_or_default(),
        recompute: raw.recompute,
        residual: raw.residual.unwrap_or_default(),
        zero: raw.zero,
        shard_frozen: raw.shard_frozen.unwrap_or(false),
        offload_optimizer: raw.offload_optimizer.unwrap_or(false),
        reduce: raw.reduce.unwrap_or(Precision::F32),
        guard: raw.guard,
        check_ranks_every: raw.check_ranks_every.unwrap_or(100),
        lora: raw.lora,
        full,
    }
}

fn check_guard(guard: &Guard, rules: &mut Rules) {
    rules.require(guard.window >= 8, || {
        format!(
            "train.guard.window = {}: so few steps say nothing of how losses vary; try 128",
            guard.window
        )
    });
    rules.at_least("train.guard.skips_in_a_row", guard.skips_in_a_row, 1);
    for (name, sigmas) in [("loss_sigmas", guard.loss_sigmas), ("norm_sigmas", guard.norm_sigmas)] {
        rules.require(sigmas.is_none_or(|sigmas| sigmas >= 2.0), || {
            format!(
                "train.guard.{name} = {} would skip steps that are as usual; set it to 2 or more, such as 6",
                sigmas.unwrap_or_default()
            )
        });
    }
    rules.require(guard.loss_sigmas.is_some() || guard.norm_sigmas.is_some(), || {
        "train.guard names neither loss_sigmas nor norm_sigmas and guards nothing; give one, such as 6, or leave the section out"
            .to_owned()
    });
}

/// In the order of [`FullModule::ALL`], whatever the order in the config.
/// `all` is every module of the model's family, or of any where that is not known yet.
fn full_modules(typed: &[String], model: Option<&Model>, rules: &mut Rules) -> Vec<FullModule> {
    let of_model = match model {
        Some(Model::Scratch { shape, .. }) => shape.family.modules(),
        _ => &FullModule::ALL,
    };
    if typed == ["all"] {
        return of_model.to_vec();
    }
    for (i, name) in typed.iter().enumerate() {
        rules.require(FullModule::ALL.iter().any(|module| module.name() == name), || {
            let known = FullModule::ALL.map(FullModule::name).join(", ");
            format!("train.full names `{name}`, which no model has; known: {known}; or [all] alone for every parameter")
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
        let mut linears = FullModule::ALL.into_iter().filter(|module| module.is_linear());
        rules.require(linears.any(|linear| linear.name() == target), || {
            let linears = FullModule::ALL.into_iter().filter(|module| module.is_linear());
            let known: Vec<&str> = linears.map(FullModule::name).collect();
            format!(
                "train.lora.targets names `{target}`, which no block has; known: {}",
                known.join(", ")
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
        _ => full.iter().any(|module| module.fills(group)),
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

/// What can be said without the tokens; the rest when the stream is opened.
fn check_sampling(sampling: &Sampling, rules: &mut Rules) {
    check_alpha("sampling.alpha", sampling.alpha, rules);
    if let Some(sources) = &sampling.sources {
        check_weights(
            "sampling.sources",
            sources.iter().map(|(name, weight)| (name.as_str(), *weight)),
            rules,
        );
    }
    let mut epochs = |key: &str, epochs: Option<f64>| {
        rules.require(epochs.is_none_or(|epochs| epochs > 0.0), || {
            format!(
                "sampling.{key} = {} is not above 0; try 4, or remove the line",
                epochs.unwrap_or_default()
            )
        });
    };
    epochs("max_epochs", sampling.max_epochs);
    epochs("warn_epochs", sampling.warn_epochs);
    check_groups(sampling, rules);
    let last = sampling.stages.len().saturating_sub(1);
    for (index, stage) in sampling.stages.iter().enumerate() {
        let key = |name: &str| format!("sampling.stages[{index}].{name}");
        rules.require(index == last || stage.tokens.is_some_and(|tokens| tokens > 0), || {
            format!(
                "{} is missing or 0: every stage but the last says how long it is; add it",
                key("tokens")
            )
        });
        rules.require(index != last || stage.tokens.is_none(), || {
            format!(
                "{} is set, but the last stage goes to the run's end; remove it, or add a stage",
                key("tokens")
            )
        });
        if let Some(alpha) = stage.alpha {
            check_alpha(&key("alpha"), alpha, rules);
        }
        if let Some(sources) = &stage.sources {
            check_weights(
                &key("sources"),
                sources.iter().map(|(name, weight)| (name.as_str(), *weight)),
                rules,
            );
        }
        for (end, name) in ["start", "end"].iter().enumerate() {
            let sum: f64 = stage.shares.values().map(|share| share.ends()[end]).sum();
            rules.require(sum < 1.0 + SUM_TOLERANCE, || {
                format!(
                    "{} sum to {sum} at the stage's {name}, more than there is; lower some",
                    key("shares")
                )
            });
        }
        for (language, share) in &stage.shares {
            rules.require(share.ends().iter().all(|share| *share > 0.0 && *share <= 1.0), || {
                let typed = serde_json::to_string(share).unwrap_or_default();
                format!(
                    "{} = {typed} is not a share above 0 and at most 1; try 0.5",
                    key(&format!("shares.{language}"))
                )
            });
        }
    }
}

fn check_groups(sampling: &Sampling, rules: &mut Rules) {
    let groups = &sampling.groups;
    for (i, group) in groups.iter().enumerate() {
        rules.require(groups[..i].iter().all(|other| other.name != group.name), || {
            format!("sampling.groups names {} twice; name each group once", group.name)
        });
        rules.require(
            groups[..i].iter().all(|other| other.from_tokens != group.from_tokens),
            || {
                format!(
                    "sampling.groups has two groups from_tokens: {}; give each its own threshold",
                    group.from_tokens
                )
            },
        );
    }
    let weights: Vec<(&str, f64)> = groups
        .iter()
        .filter_map(|group| Some((group.name.as_str(), group.weight?)))
        .collect();
    if weights.is_empty() {
        return;
    }
    rules.require(weights.len() == groups.len(), || {
        format!(
            "sampling.groups: {} of {} have a weight; give every group one, or none",
            weights.len(),
            groups.len()
        )
    });
    let sources = sampling.sources.is_some() || sampling.stages.iter().any(|stage| stage.sources.is_some());
    rules.require(!sources, || {
        "sampling.groups have weights and sampling.sources too, and both cannot hold; remove the weights of one"
            .to_owned()
    });
    if weights.len() == groups.len() {
        check_weights("sampling.groups", weights.into_iter(), rules);
    }
}

/// Weights that sum to one up to this are meant to.
const SUM_TOLERANCE: f64 = 1e-6;

fn check_weights<'a>(key: &str, weights: impl Iterator<Item = (&'a str, f64)>, rules: &mut Rules) {
    let mut sum = 0.0;
    for (name, weight) in weights {
        sum += weight;
        rules.require((0.0..=1.0).contains(&weight), || {
            format!("{key}: the weight of {name} is {weight}, not in 0 … 1; weights are shares of the rows")
        });
    }
    rules.require((sum - 1.0).abs() < SUM_TOLERANCE, || {
        format!("{key}: the weights sum to {sum:.6}, not to 1; divide each by {sum:.6}")
    });
}

fn check_alpha(key: &str, alpha: f64, rules: &mut Rules) {
    rules.require((0.0..=1.0).contains(&alpha), || {
        format!("{key} = {alpha} is not in 0 … 1 (0: all languages alike, 1: as much as there is); try 0.3")
    });
}

/// Between which sizes languages are told apart where pieces are learned.
fn check_bytes(section: &str, floor: Option<u64>, cap: Option<u64>, rules: &mut Rules) {
    for (key, bytes) in [("floor_bytes", floor), ("cap_bytes", cap)] {
        rules.require(bytes != Some(0), || {
            format!("{section}.{key} = 0 is no size of a text; set it to 1 or more, or remove the line")
        });
    }
    if let (Some(floor), Some(cap)) = (floor, cap) {
        rules.require(floor <= cap, || {
            format!(
                "{section}.floor_bytes = {floor} is above cap_bytes = {cap}: no language could weigh both; lower the \
                 floor, or set alpha: 0 for languages that all weigh alike"
            )
        });
    }
}

fn check_vocabulary(plan: &Plan, rules: &mut Rules) {
    let Some(vocabulary) = &plan.vocabulary else { return };
    check_alpha("vocabulary.alpha", vocabulary.alpha, rules);
    check_bytes("vocabulary", vocabulary.floor_bytes, vocabulary.cap_bytes, rules);
    rules.require(vocabulary.new_pieces >= 1, || {
        "vocabulary.new_pieces = 0 extends nothing; remove the vocabulary section to keep the base's own pieces"
            .to_owned()
    });
    rules.at_least("vocabulary.max_piece_bytes", vocabulary.max_piece_bytes, 2);
    rules.at_least("vocabulary.multiple_of", vocabulary.multiple_of, 1);
    rules.at_least(
        "vocabulary.words.max_piece_length",
        vocabulary.words.max_piece_length,
        2,
    );
    let coverage = vocabulary.words.character_coverage;
    rules.require(coverage > 0.9 && coverage <= 1.0, || {
        format!("vocabulary.words.character_coverage = {coverage} is not above 0.9 and at most 1; try 0.9995")
    });
    rules.require(vocabulary.scores == Scores::AfterBase || vocabulary.preserve.is_empty(), || {
        format!(
            "vocabulary.preserve = {} cannot hold with vocabulary.scores = kept, where new pieces come before the base's; \
             use scores: after_base",
            vocabulary.preserve.join(", ")
        )
    });
    // Untrained new rows are noise for ever; that is never what was meant.
    rules.require(plan.train.full.contains(&FullModule::EmbedTokens), || {
        format!(
            "vocabulary.new_pieces = {} adds rows to the embedding, but train.full does not name embed_tokens: they would \
             never learn; add embed_tokens to train.full",
            vocabulary.new_pieces
        )
    });
}

/// Where every source is tokenised already there is no text: what only text can answer to is refused, since a run
/// without it would not be the one that was asked for.
fn check_text(plan: &Plan, rules: &mut Rules) {
    let corpus = &plan.corpus;
    if corpus.sources.is_empty() || corpus.has_text() {
        return;
    }
    let why = "all of corpus.sources are tokenised already (kind: megatron), so there is no text";
    rules.require(plan.vocabulary.is_none(), || {
        format!("vocabulary learns new pieces from text, but {why}; add a source with text, or remove the section")
    });
    let learns = matches!(
        &plan.model,
        Model::Scratch {
            tokenizer: Pieces::Train { .. },
            ..
        }
    );
    rules.require(!learns, || {
        format!(
            "model.tokenizer.kind: train learns pieces from text, but {why}; name the tokenizer that made the files"
        )
    });
    rules.require(corpus.held_out == 0.0, || {
        format!(
            "corpus.held_out = {} holds text out, but {why}; set it to 0",
            corpus.held_out
        )
    });
    for (key, is_set) in [
        ("held_out_most", corpus.held_out_most.is_some()),
        ("deduplicate_lines", corpus.deduplicate_lines),
        ("nfc", corpus.nfc),
        ("near_duplicates", corpus.near_duplicates.is_some()),
        ("contamination", corpus.contamination.is_some()),
        ("document_start", corpus.document_start.is_some()),
        ("document_end", corpus.document_end.is_some()),
    ] {
        rules.require(!is_set, || {
            format!("corpus.{key} is about text, but {why}; remove it: documents are read as they lie in the files")
        });
    }
}

fn check_launch(plan: &Plan, rules: &mut Rules) {
    rules.at_least("launch.ranks", plan.launch.ranks, 1);
    if let Some(threads) = plan.launch.threads_per_rank {
        rules.at_least("launch.threads_per_rank", threads, 1);
    }
}

/// The global batch is dealt to ranks in whole micro-batches.
fn check_batch(plan: &Plan, rules: &mut Rules) {
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

fn checkpoint(typed: raw::Checkpoint) -> Checkpoint {
    Checkpoint {
        every_steps: typed.every_steps,
        every_minutes: typed.every_minutes,
        lose_at_most: typed.lose_at_most,
        keep: typed.keep,
        keep_every: typed.keep_every,
        failures_in_a_row: typed.failures_in_a_row.unwrap_or(3),
        safety_seconds: typed.safety_seconds.unwrap_or(60.0),
        allow_changed: typed.allow_changed.unwrap_or_default(),
    }
}

fn check_checkpoint(plan: &Plan, rules: &mut Rules) {
    let Checkpoint {
        every_steps,
        every_minutes,
        lose_at_most,
        keep,
        keep_every,
        failures_in_a_row,
        safety_seconds,
        allow_changed,
    } = &plan.checkpoint;
    rules.at_least("checkpoint.every_steps", *every_steps, 1);
    rules.require(*keep >= 2, || {
        format!(
            "checkpoint.keep = {keep} is less than 2: should the newest turn out damaged, nothing would be left; set it to 2"
        )
    });
    if let Some(minutes) = every_minutes {
        rules.require(*minutes > 0.0 && *minutes <= 525_600.0, || {
            format!(
                "checkpoint.every_minutes = {minutes} is not above 0 and at most a year (525600); remove the line to save by steps \
                 alone"
            )
        });
    }
    if let Some(most) = lose_at_most {
        rules.require(most >= every_steps, || {
            format!(
                "checkpoint.lose_at_most = {most} is less than checkpoint.every_steps = {every_steps}: so many steps lie between \
                 two saves; save every {most} steps, or allow {every_steps}"
            )
        });
    }
    if let Some(every) = keep_every {
        rules.require(*every > 0 && every.is_multiple_of(*every_steps.max(&1)), || {
            format!(
                "checkpoint.keep_every = {every} is not a multiple of checkpoint.every_steps = {every_steps}: no checkpoint of \
                 those steps need ever exist; try {}",
                (*every).max(1).next_multiple_of(*every_steps.max(&1))
            )
        });
    }
    rules.require(*failures_in_a_row > 0, || {
        "checkpoint.failures_in_a_row = 0 would end the run before its first save; 1 ends it at the first that fails".to_owned()
    });
    rules.require(safety_seconds.is_finite() && *safety_seconds >= 0.0, || {
        format!("checkpoint.safety_seconds = {safety_seconds} is not a time; it is added to what a save takes, 60 if left out")
    });
    for key in allow_changed {
        rules.require(!matches!(key.as_str(), "base_model" | "model"), || {
            format!(
                "checkpoint.allow_changed names {key}: a checkpoint holds what was trained on top of its base and is nothing on \
                 another; set another folders.run for a new run"
            )
        });
    }
    if let Some(steps) = plan.debug.verify_resume {
        rules.require(steps > 1 && 2 * steps <= plan.train.steps, || {
            format!(
                "debug.verify_resume = {steps} is not in 2 … {}: as many steps are taken before the kill as after it, of \
                 train.steps = {}",
                plan.train.steps / 2,
                plan.train.steps
            )
        });
    }
}

fn check_lengths(plan: &Plan, rules: &mut Rules) {
    let Evaluation {
        documents_per_language,
        window,
        stride,
        tokens_per_batch,
        every_steps,
        sample_bytes,
    } = plan.evaluation;
    rules.require(every_steps != Some(0), || {
        "evaluation.every_steps = 0 would measure between no steps; remove the line to measure only when asked"
            .to_owned()
    });
    rules.require(every_steps.is_none() || sample_bytes >= 16, || {
        format!(
            "evaluation.sample_bytes = {sample_bytes} is less than 16: a few bytes of a document say nothing; the default is 256"
        )
    });
    rules.require(every_steps.is_none() || plan.corpus.has_text(), || {
        "evaluation.every_steps is set, but no source has text to hold out; remove the line or add a source with text"
            .to_owned()
    });
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
