//! Every shipped recipe loads; every wrong config fails with the sentence that stands in its first line.

use std::fs;
use std::path::{Path, PathBuf};

use configs::{
    Algorithm, FullModule, Group, LanguageOf, Mix, Model, NewRows, OnUnreadable, Optimizer, Pieces, Plan,
    Recomputation, Recompute, Residual, Schedule, Sides, SourceKind, WordRules, load,
};
use proptest::prelude::*;

fn here() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn yaml_files(folder: &Path) -> Vec<PathBuf> {
    let mut files: Vec<_> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    files.retain(|file| file.extension().is_some_and(|extension| extension == "yaml"));
    files.sort();
    assert!(!files.is_empty(), "no YAML in {}", folder.display());
    files
}

fn tiny(overrides: &[&str]) -> Result<Plan, String> {
    let overrides: Vec<_> = overrides.iter().map(|&text| text.to_owned()).collect();
    load(&here().join("tiny.yaml"), &overrides).map_err(|error| error.to_string())
}

#[test]
fn every_recipe_loads_and_its_plan_survives_json() {
    for file in yaml_files(here()) {
        let plan = load(&file, &[]).unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(
            Some(plan.name.as_str()),
            file.file_stem().unwrap().to_str(),
            "a recipe is named as its file"
        );
        let json = serde_json::to_string(&plan).unwrap();
        assert_eq!(plan, serde_json::from_str::<Plan>(&json).unwrap());
        assert!(plan.folders.run.is_absolute() && plan.folders.base_model.is_absolute());
    }
}

/// PANGLOT_BLESS=1 writes the first lines anew; read the difference before committing it.
#[test]
fn every_wrong_config_fails_with_its_sentence() {
    let folder = here().join("tests/wrong");
    let bless = std::env::var_os("PANGLOT_BLESS").is_some();
    let mut wrong = Vec::new();
    for file in yaml_files(&folder) {
        let text = fs::read_to_string(&file).unwrap();
        let said = match load(&file, &[]) {
            Ok(_) => panic!("{} loads", file.display()),
            Err(error) => error
                .to_string()
                .replace(&format!("{}/", folder.display()), "")
                .replace(&std::env::current_dir().unwrap().display().to_string(), "$PWD"),
        };
        let said = format!("# {}", said.replace('\n', "\n# "));
        let expected: Vec<_> = text.lines().take_while(|line| line.starts_with('#')).collect();
        if bless {
            let body: Vec<_> = text.lines().filter(|line| !line.starts_with('#')).collect();
            fs::write(&file, format!("{said}\n{}\n", body.join("\n"))).unwrap();
        } else if expected.join("\n") != said {
            wrong.push(format!(
                "{}\n  expected {}\n  said     {said}",
                file.display(),
                expected.join("\n")
            ));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn hygiene_is_off_unless_asked_for() {
    let plan = tiny(&[]).unwrap();
    assert!(!plan.corpus.nfc && plan.corpus.near_duplicates.is_none() && plan.corpus.contamination.is_none());
    let plan = tiny(&[
        "corpus.nfc=true",
        "corpus.near_duplicates=0.8",
        "corpus.contamination.files=[evaluation/flores.tsv]",
        "corpus.contamination.words=10",
    ]);
    let corpus = plan.unwrap().corpus;
    assert!(corpus.nfc && corpus.near_duplicates == Some(0.8));
    let contamination = corpus.contamination.unwrap();
    assert_eq!((contamination.words, contamination.characters), (10, 50));
    assert!(contamination.files[0].is_absolute() && contamination.files[0].ends_with("evaluation/flores.tsv"));
    for (wrong, sentence) in [
        (
            "corpus.near_duplicates=0.3",
            "corpus.near_duplicates = 0.3 is not a similarity from 0.5 to 1",
        ),
        ("corpus.contamination.files=[]", "corpus.contamination.files is empty"),
        (
            "corpus.contamination={files: [x.txt], words: 2}",
            "corpus.contamination.words = 2: so few",
        ),
        (
            "corpus.sources.0.one_document=file",
            "corpus.sources.0.one_document means nothing with kind: udhr",
        ),
    ] {
        let said = tiny(&[wrong]).unwrap_err();
        assert!(said.contains(sentence), "{said}");
    }
}

#[test]
fn an_override_changes_one_value_and_is_checked_like_the_file() {
    let plan = tiny(&[
        "train.steps=5",
        "train.lora.targets=[q_proj]",
        "name=other",
        "vocabulary=null",
    ])
    .unwrap();
    assert_eq!((plan.train.steps, plan.name.as_str()), (5, "other"));
    assert_eq!(plan.train.lora.unwrap().targets, ["q_proj"]);
    let sentence = |text: &str| tiny(&[text]).unwrap_err();
    assert_eq!(
        sentence("train.stpes=5"),
        "`train.stpes=5` on the command line: unknown key `stpes`; the nearest known key is `steps`"
    );
    assert!(sentence("train.steps").contains("an override reads section.key=value"));
    assert!(sentence("train.steps.more=5").contains("`more` is inside a plain value"));
    assert!(sentence("launch.ranks=5").contains("is not a multiple of 10 (5 ranks × 2 micro_rows); try 20"));
}

#[test]
fn each_group_has_a_rate_and_a_decay() {
    let whole = [
        "train.lora=null",
        "optimizer.lr_lora=null",
        "train.full=[all]",
        "optimizer.lr_body=1e-4",
        "optimizer.weight_decay=0.1",
    ];
    let plan = tiny(&whole).unwrap();
    assert_eq!(plan.train.full, FullModule::OF_LLAMA);
    let rates = |plan: &Plan, group| {
        plan.optimizer
            .groups
            .get(&group)
            .map(|rates| (rates.lr, rates.weight_decay))
    };
    assert_eq!(rates(&plan, Group::Lora), None);
    assert_eq!(rates(&plan, Group::Head), Some((5e-3, 0.1)));
    assert_eq!(rates(&plan, Group::Body), Some((1e-4, 0.1)));
    assert_eq!(rates(&plan, Group::Norms), Some((1e-4, 0.0)), "norms do not decay");

    let and = |more: &'static str| tiny(&[&whole[..], &[more]].concat());
    let plan = and("optimizer.groups={norms: {lr: 2e-4, weight_decay: 0.2}, head: {weight_decay: 0}}").unwrap();
    assert_eq!(rates(&plan, Group::Norms), Some((2e-4, 0.2)));
    assert_eq!(rates(&plan, Group::Head), Some((5e-3, 0.0)));

    for (more, sentence) in [
        (
            "optimizer.groups={lora: {lr: 1e-3}}",
            "optimizer.groups.lora is set, but nothing of this group trains",
        ),
        (
            "optimizer.groups={norms: {weight_decay: -1}}",
            "optimizer.groups.norms.weight_decay = -1 is negative",
        ),
        (
            "optimizer.groups={body: {lr: 2}}",
            "optimizer.groups.body.lr = 2 is not a learning rate",
        ),
        (
            "optimizer.lr_body=null",
            "optimizer.lr_body is missing, and train.full trains",
        ),
        (
            "train.full=[embed_tokens, k_projection]",
            "train.full names `k_projection`, which no model has; known: embed_tokens",
        ),
        ("train.full=[embed_tokens, all]", "train.full names `all`"),
        ("train.full=[norms, norms]", "train.full names norms twice"),
    ] {
        let said = and(more).unwrap_err();
        assert!(said.contains(sentence), "{more}: {said}");
    }
    let said = tiny(&["train.full=[embed_tokens, q_proj]", "optimizer.lr_body=1e-4"]).unwrap_err();
    assert!(
        said.contains("`q_proj` is in train.lora.targets and in train.full"),
        "{said}"
    );
}

#[test]
fn a_tokenizer_from_scratch_says_how_it_is_learned() {
    let plan = tiny(&["model.tokenizer={kind: train, algorithm: unigram, pieces: 4000, alpha: 0.3}"]).unwrap();
    let Model::Scratch { tokenizer, .. } = plan.model else {
        panic!("{:?}", plan.model)
    };
    assert_eq!(
        tokenizer,
        Pieces::Train {
            algorithm: Algorithm::Unigram,
            pieces: 4000,
            alpha: 0.3,
            floor_bytes: None,
            cap_bytes: None,
            words: WordRules::default(),
        }
    );
    for (typed, sentence) in [
        (
            "{kind: train, pieces: 4000, alpha: 0.3}",
            "model.tokenizer.algorithm is missing, and kind: train needs it",
        ),
        (
            "{kind: train, algorithm: bpe, pieces: 9, alpha: 0.3}",
            "model.tokenizer.pieces = 9 is not more than 259",
        ),
        (
            "{kind: train, algorithm: bpe, pieces: 900, alpha: 0.3, floor_bytes: 2e6, cap_bytes: 1e6}",
            "model.tokenizer.floor_bytes = 2000000 is above cap_bytes = 1000000",
        ),
        (
            "{kind: folder, path: x, cap_bytes: 1e6}",
            "model.tokenizer.cap_bytes means nothing with kind: folder",
        ),
        (
            "{kind: folder, path: x, alpha: 1}",
            "model.tokenizer.alpha means nothing with kind: folder",
        ),
    ] {
        let said = tiny(&[&format!("model.tokenizer={typed}")]).unwrap_err();
        assert!(said.contains(sentence), "{typed}: {said}");
    }
}

#[test]
fn a_missing_config_is_named_with_a_way_out() {
    let error = load(Path::new("no/such.yaml"), &[]).unwrap_err().to_string();
    assert!(
        error.starts_with("cannot read the config no/such.yaml: No such file"),
        "{error}"
    );
    assert!(error.ends_with("a ready one is configs/tiny.yaml"), "{error}");
}

#[test]
fn the_mala_recipe_has_the_released_sizes() {
    let plan = load(&here().join("mala500-7b.yaml"), &[]).unwrap();
    let vocabulary = plan.vocabulary.unwrap();
    assert_eq!(32_000 + vocabulary.new_pieces, 260_164);
    assert_eq!(
        (32_000 + vocabulary.new_pieces).next_multiple_of(vocabulary.multiple_of),
        260_224
    );
    assert_eq!(vocabulary.new_rows, NewRows::Normal);
    let published = Some("llama-2-7b".to_owned());
    assert_eq!(plan.model, Model::Folder { published });
    assert_eq!(
        plan.train.rows_per_step / plan.launch.ranks,
        8,
        "8 rows a GPU, accumulated one by one"
    );
}

#[test]
fn the_polylm_recipes_have_the_released_numbers() {
    for (name, rows, warmup) in [("polylm-1.7b.yaml", 512, 2_000), ("polylm-13b.yaml", 2048, 2_500)] {
        let plan = load(&here().join(name), &[]).unwrap();
        let train = &plan.train;
        assert_eq!((train.rows_per_step, plan.optimizer.warmup_steps), (rows, warmup));
        let tokens = train.steps * (train.rows_per_step * train.sequence_length) as u64;
        assert_eq!(tokens / 100_000_000, 6_396, "639.6 G tokens");
        assert_eq!(
            (train.residual, &train.full[..]),
            (Residual::F32, &FullModule::OF_GPT2[..])
        );
        let rates = &plan.optimizer.groups;
        assert_eq!((rates[&Group::Body].lr, rates[&Group::Norms].weight_decay), (6e-5, 0.0));
        let english: Vec<_> = plan
            .sampling
            .stages
            .iter()
            .map(|stage| stage.shares["eng_Latn"].ends()[0])
            .collect();
        assert_eq!(english, [0.7, 0.4]);
    }
}

#[test]
fn a_module_with_a_bias_has_a_rate_for_it() {
    let file = here().join("tiny-gpt2.yaml");
    let plan = load(
        &file,
        &["train.full=[c_fc]".into(), "optimizer.lr_embeddings=null".into()],
    )
    .unwrap();
    let groups: Vec<Group> = plan.optimizer.groups.keys().copied().collect();
    assert_eq!(groups, [Group::Body, Group::Norms]);
}

#[test]
fn sampling_may_be_typed_short_and_is_complete_in_the_plan() {
    let plan = tiny(&[
        "sampling.floor=1e5",
        "sampling.sources={web: 0.9, code: 0.1}",
        "sampling.max_epochs=4",
        "sampling.stages=[{tokens: 4.48e11, shares: {eng_Latn: 0.7}}, {alpha: 0.5, shares: {eng_Latn: [0.7, 0.4]}}]",
        "sampling.packing=documents",
        "sampling.attention=document",
    ])
    .unwrap();
    let sampling = &plan.sampling;
    assert_eq!(
        (sampling.floor, sampling.leave_out_below, sampling.warn_epochs()),
        (Some(100_000), None, 4.0)
    );
    assert_eq!(sampling.stages[0].tokens, Some(448_000_000_000));
    assert_eq!(sampling.stages[0].shares["eng_Latn"].ends(), [0.7, 0.7]);
    assert_eq!(sampling.stages[1].shares["eng_Latn"].ends(), [0.7, 0.4]);
    let json = serde_json::to_string(&plan).unwrap();
    assert_eq!(plan, serde_json::from_str::<Plan>(&json).unwrap());
}

#[test]
fn a_guard_says_what_it_guards() {
    let plan = tiny(&["train.guard={window: 128, loss_sigmas: 6, skips_in_a_row: 3}"]).unwrap();
    let guard = plan.train.guard.unwrap();
    assert_eq!(
        (guard.loss_sigmas, guard.norm_sigmas, guard.skips_in_a_row),
        (Some(6.0), None, 3)
    );
    assert_eq!(tiny(&[]).unwrap().train.guard, None);
    for (wrong, sentence) in [
        (
            "{window: 128, skips_in_a_row: 3}",
            "names neither loss_sigmas nor norm_sigmas",
        ),
        (
            "{window: 2, loss_sigmas: 6, skips_in_a_row: 3}",
            "train.guard.window = 2: so few",
        ),
        (
            "{window: 128, norm_sigmas: 1, skips_in_a_row: 3}",
            "train.guard.norm_sigmas = 1 would skip",
        ),
        (
            "{window: 128, norm_sigmas: 6, skips_in_a_row: 0}",
            "train.guard.skips_in_a_row = 0",
        ),
    ] {
        let said = tiny(&[&format!("train.guard={wrong}")]).unwrap_err();
        assert!(said.contains(sentence), "{said}");
    }
}

#[test]
fn all_broken_rules_are_told_at_once() {
    let error = tiny(&["train.zero=4", "checkpoint.keep=1"]).unwrap_err();
    assert!(error.contains("2 settings cannot run:\n  - train.zero = 4"), "{error}");
    assert!(error.contains("\n  - checkpoint.keep = 1"), "{error}");
}

fn optimizer(schedule: Schedule, warmup_steps: u64, final_lr_share: f64) -> Optimizer {
    Optimizer {
        schedule,
        warmup_steps,
        final_lr_share,
        ..tiny(&[]).unwrap().optimizer
    }
}

#[test]
fn the_learning_rate_follows_its_formula() {
    let at =
        |optimizer: &Optimizer, steps: &[u64]| steps.iter().map(|&s| optimizer.lr_factor_at(s, 10)).collect::<Vec<_>>();
    let half = 0.5f64;
    assert_eq!(
        at(&optimizer(Schedule::Linear, 2, 0.0), &[0, 1, 2, 6, 10]),
        [half, 1.0, 1.0, half, 0.0]
    );
    assert_eq!(
        at(&optimizer(Schedule::Constant, 4, 0.0), &[0, 3, 4, 9]),
        [0.25, 1.0, 1.0, 1.0]
    );
    let cosine = at(&optimizer(Schedule::Cosine, 2, 0.1), &[2, 6, 10, 99]);
    // Half-way down the cosine is half-way between the peak and the end.
    for (got, expected) in cosine.iter().zip([1.0, 0.55, 0.1, 0.1]) {
        assert!((got - expected).abs() < 1e-12, "{cosine:?}");
    }
}

proptest! {
    #[test]
    fn the_learning_rate_rises_to_the_peak_and_never_rises_again(
        warmup in 0u64..50, more in 1u64..500, share in 0.0f64..=1.0, linear: bool,
    ) {
        let schedule = if linear { Schedule::Linear } else { Schedule::Cosine };
        let (optimizer, steps) = (optimizer(schedule, warmup, share), warmup + more);
        let factors: Vec<_> = (0..=steps).map(|step| optimizer.lr_factor_at(step, steps)).collect();
        prop_assert!(factors.iter().all(|&f| f > 0.0 - 1e-12 && f <= 1.0));
        let (rising, falling) = factors.split_at(warmup as usize);
        prop_assert!(rising.is_sorted());
        prop_assert!(falling.is_sorted_by(|a, b| *a >= *b - 1e-12));
        prop_assert_eq!(falling[0], 1.0);
        prop_assert!((factors[steps as usize] - share).abs() < 1e-12);
    }
}

#[test]
fn every_kind_of_source_becomes_a_plan() {
    let plan = tiny(&["corpus.sources=[
        {name: a, kind: folders, path: a, licence: CC0-1.0},
        {name: b, kind: files, path: b.jsonl, language: eng_Latn},
        {name: c, kind: files, paths: [c0.parquet, c1.parquet], language_column: lang, text_column: content},
        {name: d, kind: parallel, path: d.tsv, languages: [eng_Latn, fra_Latn], template: '{source} = {target}'},
        {name: e, kind: parallel, source_path: e.en, target_path: e.fr, languages: [eng_Latn, fra_Latn], template: '{target}{source}'},
        {name: f, kind: instructions, path: f},
        {name: g, kind: megatron, path: g}]"])
    .unwrap();
    let kinds: Vec<_> = plan.corpus.sources.iter().map(|source| &source.kind).collect();
    assert_eq!(plan.corpus.sources[0].licence.as_deref(), Some("CC0-1.0"));
    assert!(
        kinds
            .iter()
            .all(|kind| kind.paths().iter().all(|path| path.is_absolute()))
    );
    let language = |kind: &SourceKind| match kind {
        SourceKind::Files {
            language, text_column, ..
        } => (language.clone(), text_column.clone()),
        _ => panic!("files"),
    };
    let (column, fixed) = (
        LanguageOf::Column("lang".to_owned()),
        LanguageOf::Fixed("eng_Latn".to_owned()),
    );
    assert_eq!(language(kinds[1]), (fixed, "text".to_owned()));
    assert_eq!(language(kinds[2]), (column, "content".to_owned()));
    assert!(matches!(
        kinds[3],
        SourceKind::Parallel {
            sides: Sides::Tsv(_),
            ..
        }
    ));
    assert!(matches!(
        kinds[4],
        SourceKind::Parallel {
            sides: Sides::Files { .. },
            ..
        }
    ));
    assert!(matches!(kinds[5], SourceKind::Instructions { language: None, prompt, .. } if prompt.contains("{input}")));
    assert_eq!(
        plan,
        serde_json::from_str::<Plan>(&serde_json::to_string(&plan).unwrap()).unwrap()
    );

    let plan = tiny(&[
        "corpus.sources.0.path=elsewhere",
        "corpus.on_unreadable=skip",
        "corpus.held_out_most=9",
    ])
    .unwrap();
    assert!(plan.corpus.sources[0].kind.paths()[0].ends_with("elsewhere"));
    assert_eq!(
        (plan.corpus.on_unreadable, plan.corpus.held_out_most),
        (OnUnreadable::Skip, Some(9))
    );
    let said = tiny(&["corpus.sources.7.path=elsewhere"]).unwrap_err();
    assert!(said.contains("`7` is no place in a list of 1; count from 0"), "{said}");
}

#[test]
fn recomputation_is_one_mode_or_the_first_layers_or_left_to_the_planner() {
    let typed = |value: &str| tiny(&[&format!("train.recompute={value}")]).map(|plan| plan.train.recompute);
    let first = |full, selective| Recomputation::First(Mix { full, selective });
    assert_eq!(typed("selective").unwrap(), Recompute::Selective.into());
    assert_eq!(typed("auto").unwrap(), Recomputation::Auto);
    assert_eq!(typed("{full: 1, selective: 1}").unwrap(), first(1, 1));
    assert_eq!(typed("{selective: 1}").unwrap(), first(0, 1));
    for recompute in ["full", "auto", "{full: 1}"] {
        let json = serde_json::to_string(&tiny(&[&format!("train.recompute={recompute}")]).unwrap()).unwrap();
        let plan: Plan = serde_json::from_str(&json).unwrap();
        assert_eq!(plan.train.recompute, typed(recompute).unwrap(), "{json}");
    }
    for (wrong, sentence) in [
        ("all", "nearest known"),
        ("{full: 1, some: 2}", "unknown key `some`"),
        (
            "{full: 2, selective: 1}",
            "names more layers than the model's 2; name at most 2 in all",
        ),
        (
            "3",
            "none, selective, full, auto, or the first layers of each as {full: 12, selective: 8}",
        ),
    ] {
        let said = typed(wrong).unwrap_err();
        assert!(said.contains(sentence), "{wrong}: {said}");
    }
    let modes: Vec<Recompute> = (0..4)
        .map(|layer| Mix { full: 1, selective: 2 }.of_layer(layer))
        .collect();
    use Recompute::{Full, None, Selective};
    assert_eq!(modes, [Full, Selective, Selective, None]);
}
