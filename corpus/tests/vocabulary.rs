//! An extended vocabulary does what the base does, then merges further; nothing of the base moves.

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use common::{END, byte_level_base, write_folders};
use corpus::{
    Corpus, Scores, Split, TextSampling, Tokenizer, Vocabulary, VocabularySettings, WordRules, extend, fertility,
    import_folders,
};
use proptest::prelude::*;
use serde_json::Value;
use tokenizers::{Model, OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer};

static SETTINGS: LazyLock<VocabularySettings> = LazyLock::new(|| VocabularySettings {
    new_pieces: 150,
    sampling: TextSampling::by_size(0.3),
    max_piece_bytes: 12,
    multiple_of: 64,
    scores: Scores::AfterBase,
    preserve: Vec::new(),
    special: Vec::new(),
    user_defined: Vec::new(),
    words: WordRules::default(),
});

/// Two special tokens, 256 bytes and eight merges.
const BASE_SIZE: usize = 266;

/// A base that knows some English, and an extension for three languages.
struct Fixture {
    _folder: tempfile::TempDir,
    corpus: Corpus,
    base: PathBuf,
    extended: PathBuf,
    vocabulary: Vocabulary,
}

static FIXTURE: LazyLock<Fixture> = LazyLock::new(|| {
    let folder = tempfile::tempdir().unwrap();
    let (base, extended) = (folder.path().join("base"), folder.path().join("extended"));
    let english = [
        "all human beings are born free and equal in dignity and rights",
        "the the then there other",
    ];
    byte_level_base(&base, BASE_SIZE, &english);
    let corpus = small_corpus(folder.path());
    let vocabulary = extend(&corpus, &base, Some(&*SETTINGS), &extended, &mut |_, _| {}).unwrap();
    Fixture {
        _folder: folder,
        corpus,
        base,
        extended,
        vocabulary,
    }
});

fn small_corpus(folder: &Path) -> Corpus {
    let document = |words: &[&str], i: usize| {
        let word = |j: usize| words[(i * 7 + j * j) % words.len()];
        (0..12)
            .map(word)
            .chain([format!("{i}").as_str()])
            .collect::<Vec<_>>()
            .join(" ")
    };
    let documents = |words: &[&str]| (0..40).map(|i| document(words, i)).collect::<Vec<_>>();
    let finnish = [
        "Kaikki",
        "ihmiset",
        "syntyvät",
        "vapaina",
        "ja",
        "tasavertaisina",
        "arvoltaan",
        "oikeuksiltaan",
    ];
    let russian = [
        "Все",
        "люди",
        "рождаются",
        "свободными",
        "и",
        "равными",
        "в",
        "своем",
        "достоинстве",
        "правах",
    ];
    let telugu = ["ప్రతిపత్తిస్వత్వముల", "విషయమున", "మానవులెల్లరును", "జన్మతః", "స్వతంత్రులును"];
    let languages = [
        ("fin_Latn", documents(&finnish)),
        ("rus_Cyrl", documents(&russian)),
        ("tel_Telu", documents(&telugu)),
    ];
    write_folders(&folder.join("text"), &languages);
    import_folders(&folder.join("text"), &folder.join("corpus"), 0.1, 1, &mut |_, _| {}).unwrap();
    Corpus::open(&folder.join("corpus")).unwrap()
}

fn json(folder: &Path) -> Value {
    serde_json::from_slice(&fs::read(folder.join("tokenizer.json")).unwrap()).unwrap()
}

/// A pair of ids and what it becomes.
type Merge = ([u32; 2], u32);

/// The definition: the base's ids word by word, then each new merge in turn, left to right.
fn by_definition(text: &str) -> Vec<u32> {
    static PARTS: LazyLock<(tokenizers::Tokenizer, Vec<Merge>)> = LazyLock::new(|| {
        let file = json(&FIXTURE.extended);
        let id = |piece: &Value| file["model"]["vocab"][piece.as_str().unwrap()].as_u64().unwrap() as u32;
        let merges = file["model"]["merges"].as_array().unwrap();
        let new = &merges[merges.len() - SETTINGS.new_pieces..];
        let base_size = FIXTURE.vocabulary.base_size as u32;
        let new = new
            .iter()
            .zip(base_size..)
            .map(|(pair, new)| ([id(&pair[0]), id(&pair[1])], new))
            .collect();
        (
            tokenizers::Tokenizer::from_file(FIXTURE.base.join("tokenizer.json")).unwrap(),
            new,
        )
    });
    let (base, merges) = &*PARTS;
    let mut words = PreTokenizedString::from(text);
    base.get_pre_tokenizer().unwrap().pre_tokenize(&mut words).unwrap();
    let mut all = Vec::new();
    for (word, _, _) in words.get_splits(OffsetReferential::Normalized, OffsetType::None) {
        let mut ids: Vec<u32> = base
            .get_model()
            .tokenize(word)
            .unwrap()
            .iter()
            .map(|token| token.id)
            .collect();
        for (pair, new) in merges {
            let mut at = 0;
            while at + 1 < ids.len() {
                if ids[at..at + 2] == *pair {
                    ids.splice(at..at + 2, [*new]);
                }
                at += 1;
            }
        }
        all.extend(ids);
    }
    all
}

/// Text that meets the new pieces, mixed with any Unicode.
fn text() -> impl Strategy<Value = String> {
    let known =
        "(syntyvät|vapaina| ja tasa|рождаются| своем|люди|విషయమున|స్వతంత్రులును| జన్మ|human| the |12|\n|<.endoftext.>)";
    prop::collection::vec(prop_oneof![3 => known.prop_map(|s| s), 1 => any::<String>()], 0..12).prop_map(|v| v.concat())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn encoding_is_the_bases_and_then_the_new_merges(text in text()) {
        static EXTENDED: LazyLock<Tokenizer> = LazyLock::new(|| Tokenizer::open(&FIXTURE.extended).unwrap());
        let ids = EXTENDED.encode(&text).unwrap();
        prop_assert_eq!(&ids, &by_definition(&text));
        prop_assert_eq!(EXTENDED.decode(&ids).unwrap(), text);
    }
}

#[test]
fn the_base_does_not_move() {
    let (base, extended) = (json(&FIXTURE.base), json(&FIXTURE.extended));
    let n_merges = base["model"]["merges"].as_array().unwrap().len();
    for (piece, id) in base["model"]["vocab"].as_object().unwrap() {
        assert_eq!(&extended["model"]["vocab"][piece], id);
    }
    assert_eq!(
        extended["model"]["merges"].as_array().unwrap()[..n_merges],
        base["model"]["merges"].as_array().unwrap()[..]
    );
    for part in [
        "added_tokens",
        "normalizer",
        "pre_tokenizer",
        "post_processor",
        "decoder",
    ] {
        assert_eq!(extended[part], base[part], "{part}");
    }
    assert!(FIXTURE.extended.join("tokenizer_config.json").is_file());
}

#[test]
fn every_new_piece_is_new_reachable_and_spelled_by_the_base() {
    let Fixture {
        vocabulary,
        base,
        extended,
        ..
    } = &*FIXTURE;
    let (base, extended) = (Tokenizer::open(base).unwrap(), Tokenizer::open(extended).unwrap());
    assert_eq!(
        (vocabulary.base_size, base.size(), vocabulary.pieces.len()),
        (BASE_SIZE, BASE_SIZE, 150)
    );
    assert_eq!(
        (vocabulary.size, extended.size(), vocabulary.padded_size),
        (416, 416, 448)
    );
    let engine = |folder: &Path| tokenizers::Tokenizer::from_file(folder.join("tokenizer.json")).unwrap();
    let (base_engine, extended_engine) = (engine(&FIXTURE.base), engine(&FIXTURE.extended));
    let cut = |engine: &tokenizers::Tokenizer, piece: &str| -> Vec<u32> {
        engine
            .get_model()
            .tokenize(piece)
            .unwrap()
            .iter()
            .map(|token| token.id)
            .collect()
    };
    for (piece, id) in vocabulary.pieces.iter().zip(BASE_SIZE as u32..) {
        assert_eq!((base.id(&piece.piece), extended.id(&piece.piece)), (None, Some(id)));
        assert_eq!(cut(&base_engine, &piece.piece), piece.base_ids);
        assert_eq!(cut(&extended_engine, &piece.piece), [id]);
        let spelled: String = piece.base_ids.iter().map(|id| base.piece(*id).unwrap()).collect();
        assert_eq!(spelled, piece.piece);
        assert!(
            piece.base_ids.len() >= 2 && piece.piece.chars().count() <= SETTINGS.max_piece_bytes,
            "{piece:?}"
        );
    }
    assert_eq!(&Vocabulary::open(&FIXTURE.extended).unwrap(), vocabulary);
    assert_eq!(extended.digest(), vocabulary.digest);
}

#[test]
fn the_same_settings_give_the_same_file() {
    let out = tempfile::tempdir().unwrap();
    let again = extend(
        &FIXTURE.corpus,
        &FIXTURE.base,
        Some(&*SETTINGS),
        &out.path().join("again"),
        &mut |_, _| {},
    )
    .unwrap();
    assert_eq!(again, FIXTURE.vocabulary);
}

#[test]
fn a_floor_and_a_cap_decide_what_languages_weigh() {
    let pieces = |sampling: TextSampling| {
        let settings = VocabularySettings {
            sampling,
            ..SETTINGS.clone()
        };
        let out = tempfile::tempdir().unwrap();
        let out = out.path().join("v");
        let vocabulary = extend(&FIXTURE.corpus, &FIXTURE.base, Some(&settings), &out, &mut |_, _| {}).unwrap();
        vocabulary.pieces
    };
    let by_size = pieces(TextSampling::by_size(1.0));
    let alike = pieces(TextSampling::by_size(0.0));
    assert_ne!(by_size, alike);
    let floor = pieces(TextSampling {
        floor_bytes: 1 << 30,
        ..TextSampling::by_size(1.0)
    });
    let cap = pieces(TextSampling {
        cap_bytes: 1,
        ..TextSampling::by_size(1.0)
    });
    assert!(
        floor == alike && cap == alike,
        "above all sizes, or below, they weigh all alike"
    );
}

#[test]
fn a_preserved_language_is_cut_as_before_and_tokens_of_their_own_are_found() {
    let settings = VocabularySettings {
        new_pieces: 60,
        preserve: vec!["fin_Latn".parse().unwrap()],
        special: vec!["<|user|>".to_owned()],
        user_defined: vec!["<table>".to_owned()],
        ..SETTINGS.clone()
    };
    let out = tempfile::tempdir().unwrap();
    let out = out.path().join("v");
    let vocabulary = extend(&FIXTURE.corpus, &FIXTURE.base, Some(&settings), &out, &mut |_, _| {}).unwrap();
    assert_eq!((vocabulary.pieces.len(), vocabulary.size), (62, BASE_SIZE + 62));
    let (base, extended) = (Tokenizer::open(&FIXTURE.base).unwrap(), Tokenizer::open(&out).unwrap());
    for document in FIXTURE
        .corpus
        .entries(&settings.preserve[0])
        .flat_map(|entry| FIXTURE.corpus.all_documents(entry, Split::Train).unwrap())
    {
        assert_eq!(
            base.encode(&document.text).unwrap(),
            extended.encode(&document.text).unwrap()
        );
    }
    let report = fertility(&FIXTURE.corpus, &base, &extended).unwrap();
    for language in report {
        let preserved = language.language == settings.preserve[0];
        assert_eq!(
            language.tokens_after == language.tokens_before,
            preserved,
            "{language:?}"
        );
        assert_eq!(
            language.documents_unchanged == language.documents,
            preserved,
            "{language:?}"
        );
    }
    let table = extended.id("<table>").unwrap();
    assert!(extended.encode("a<table>b").unwrap().contains(&table));
    let user = extended.id("<|user|>").unwrap();
    assert!(!extended.encode("<|user|>").unwrap().contains(&user));
    assert_eq!((table, user), (BASE_SIZE as u32 + 60, BASE_SIZE as u32 + 61));
}

#[test]
fn held_out_text_takes_fewer_tokens() {
    let (base, extended) = (
        Tokenizer::open(&FIXTURE.base).unwrap(),
        Tokenizer::open(&FIXTURE.extended).unwrap(),
    );
    let report = fertility(&FIXTURE.corpus, &base, &extended).unwrap();
    assert_eq!(report.len(), 3);
    for language in report {
        assert!(language.tokens_after * 2 < language.tokens_before, "{language:?}");
    }
}

#[test]
fn without_settings_the_base_is_copied() {
    let out = tempfile::tempdir().unwrap();
    let vocabulary = extend(
        &FIXTURE.corpus,
        &FIXTURE.base,
        None,
        &out.path().join("v"),
        &mut |_, _| {},
    )
    .unwrap();
    assert_eq!(
        (vocabulary.base_size, vocabulary.size, vocabulary.padded_size),
        (BASE_SIZE, BASE_SIZE, BASE_SIZE)
    );
    let bytes = |folder: &Path| fs::read(folder.join("tokenizer.json")).unwrap();
    assert_eq!(bytes(&FIXTURE.base), bytes(&out.path().join("v")));
}

#[test]
fn text_that_spells_a_special_token_is_text() {
    let base = Tokenizer::open(&FIXTURE.base).unwrap();
    let ids = base.encode(END).unwrap();
    assert!(ids.len() > 1 && !ids.contains(&base.id(END).unwrap()));
}

#[test]
fn what_cannot_be_extended_says_why() {
    let check = |settings: VocabularySettings, change: &dyn Fn(&mut Value), sentence: &str| {
        let folder = tempfile::tempdir().unwrap();
        let base = folder.path().join("base");
        fs::create_dir(&base).unwrap();
        let mut file = json(&FIXTURE.base);
        change(&mut file);
        fs::write(base.join("tokenizer.json"), file.to_string()).unwrap();
        let out = folder.path().join("out");
        let said = extend(&FIXTURE.corpus, &base, Some(&settings), &out, &mut |_, _| {})
            .unwrap_err()
            .to_string();
        assert!(said.contains(sentence), "{said}");
        assert!(!out.exists());
    };
    let same = |_: &mut Value| ();
    check(
        VocabularySettings {
            new_pieces: 100_000,
            ..SETTINGS.clone()
        },
        &same,
        "new_pieces = 100000, but the corpus yields only ",
    );
    check(
        VocabularySettings {
            new_pieces: 0,
            ..SETTINGS.clone()
        },
        &same,
        "vocabulary.new_pieces = 0: must be at least 1",
    );
    check(
        VocabularySettings {
            sampling: TextSampling::by_size(1.5),
            ..SETTINGS.clone()
        },
        &same,
        "vocabulary.alpha = 1.5: must lie between 0 and 1",
    );
    check(
        VocabularySettings {
            sampling: TextSampling {
                floor_bytes: 9,
                cap_bytes: 8,
                ..TextSampling::by_size(0.3)
            },
            ..SETTINGS.clone()
        },
        &same,
        "vocabulary.cap_bytes = 8: must be at least 1 and at least floor_bytes",
    );
    check(
        VocabularySettings {
            max_piece_bytes: 1,
            ..SETTINGS.clone()
        },
        &same,
        "vocabulary.max_piece_bytes = 1: must be at least 2",
    );
    check(
        VocabularySettings {
            multiple_of: 0,
            ..SETTINGS.clone()
        },
        &same,
        "vocabulary.multiple_of = 0: must be at least 1",
    );
    check(
        SETTINGS.clone(),
        &|file| file["model"]["byte_fallback"] = true.into(),
        "keep the base's vocabulary by leaving `vocabulary` out",
    );
    check(
        SETTINGS.clone(),
        &|file| file["model"]["ignore_merges"] = true.into(),
        "`ignore_merges` is on",
    );
    check(
        SETTINGS.clone(),
        &|file| file["model"]["dropout"] = 0.1.into(),
        "drop out at random",
    );
    check(
        SETTINGS.clone(),
        &|file| file["pre_tokenizer"] = Value::Null,
        "it is not byte-level",
    );
    check(
        SETTINGS.clone(),
        &|file| file["model"] = serde_json::json!({"type": "WordLevel", "vocab": {}, "unk_token": "x"}),
        "not BPE",
    );
    check(
        VocabularySettings {
            scores: Scores::Kept,
            ..SETTINGS.clone()
        },
        &same,
        "has no scores to keep",
    );
    check(
        VocabularySettings {
            scores: Scores::Kept,
            preserve: vec!["fin_Latn".parse().unwrap()],
            ..SETTINGS.clone()
        },
        &same,
        "vocabulary.preserve = fin_Latn: cannot hold with scores: kept",
    );
    check(
        VocabularySettings {
            special: vec![END.to_owned()],
            ..SETTINGS.clone()
        },
        &same,
        "is a token already",
    );
    check(
        VocabularySettings {
            user_defined: vec!["a b".to_owned()],
            ..SETTINGS.clone()
        },
        &same,
        "has a space in it",
    );
    check(SETTINGS.clone(), &|file| file["version"] = "9".into(), "cannot be used");
}

#[test]
fn added_tokens_that_the_vocabulary_does_not_name_keep_their_numbers() {
    let folder = tempfile::tempdir().unwrap();
    let base = folder.path().join("base");
    byte_level_base(&base, BASE_SIZE, &["all human beings are born free"]);
    // As many byte-level files have it: the last number is in `added_tokens` alone.
    let mut file = json(&base);
    let id = file["model"]["vocab"].as_object().unwrap().len();
    file["added_tokens"]
        .as_array_mut()
        .unwrap()
        .push(serde_json::json!({ "id": id, "content": "<|turn|>",
        "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true }));
    fs::write(base.join("tokenizer.json"), file.to_string()).unwrap();
    let before = Tokenizer::open(&base).unwrap();
    assert_eq!(before.id("<|turn|>"), Some(id as u32));

    let extended = folder.path().join("extended");
    let settings = VocabularySettings {
        special: vec!["<|new|>".into()],
        ..SETTINGS.clone()
    };
    let vocabulary = extend(&FIXTURE.corpus, &base, Some(&settings), &extended, &mut |_, _| {}).unwrap();
    let after = Tokenizer::open(&extended).unwrap();
    for id in 0..before.size() as u32 {
        assert_eq!(after.piece(id), before.piece(id));
    }
    for (place, piece) in vocabulary.pieces.iter().enumerate() {
        assert_eq!(after.piece((before.size() + place) as u32).as_ref(), Some(&piece.piece));
    }
    assert_eq!(after.id("<|turn|>"), Some(id as u32));
    assert_eq!(after.id("<|new|>"), Some((after.size() - 1) as u32));
}
