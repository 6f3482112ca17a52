//! From corpus to token shards: what lies in them, what is taken in from Megatron's tool, and what is refused.

mod common;
#[path = "common/shards.rs"]
mod shards;

use std::fs;
use std::path::Path;

use common::{END, byte_level_base, write_folders};
use corpus::{
    Corpus, Error, MegatronFiles, Split, TokenShards, TokenType, TokenizeSettings, Tokenizer, import_folders, tokenize,
};
use proptest::prelude::*;
use shards::{PartOf, index, write_shards};

const PARTS: [PartOf; 6] = [
    ("", "aaa_Latn", &[40_000]),
    ("", "bbb_Cyrl", &[1_000]),
    ("", "ccc_Latn", &[0]),
    ("", "ddd_Arab", &[7]),
    ("", "eee_Latn", &[333]),
    ("", "fff_Thai", &[16]),
];

#[test]
fn shards_hold_every_training_document_between_its_marks() {
    let temp = tempfile::tempdir().unwrap();
    let path = |name: &str| temp.path().join(name);
    let documents = |of: &str| (0..30).map(|i| format!("{of} {i}")).collect::<Vec<_>>();
    write_folders(
        &path("text"),
        &[
            ("eng_Latn", documents("this is document")),
            ("rus_Cyrl", documents("это документ")),
        ],
    );
    import_folders(&path("text"), &path("corpus"), 0.1, 1, &mut |_, _| {}).unwrap();
    byte_level_base(&path("base"), 300, &["this is a document"]);
    let corpus = Corpus::open(&path("corpus")).unwrap();
    let settings = TokenizeSettings {
        document_start: Some("<|im_start|>".into()),
        document_end: Some(END.into()),
        megatron: Vec::new(),
    };
    let manifest = tokenize(&corpus, &path("base"), &path("tokens"), &settings, &mut |_, _| {}).unwrap();

    let (shards, tokenizer) = (
        TokenShards::open(&path("tokens")).unwrap(),
        Tokenizer::open(&path("base")).unwrap(),
    );
    assert_eq!(
        (shards.manifest(), &manifest.corpus_digest),
        (&manifest, &corpus.digest())
    );
    assert_eq!(
        (manifest.documents, manifest.token_type, manifest.document_end),
        (54, TokenType::Uint16, tokenizer.id(END))
    );
    for language in &manifest.languages {
        let mut texts: Vec<String> = Vec::new();
        for document in language.documents.clone() {
            let range = shards.document(document).unwrap();
            assert!(language.tokens.start <= range.start && range.end <= language.tokens.end);
            let ids: Vec<u32> = shards.tokens(range).into_iter().map(|id| id as u32).collect();
            let text = tokenizer.decode(&ids).unwrap();
            texts.push(
                text.strip_prefix("<|im_start|>")
                    .unwrap()
                    .strip_suffix(END)
                    .unwrap()
                    .to_owned(),
            );
        }
        let entry = corpus.entries(&language.language).next().unwrap();
        let expected = corpus.all_documents(entry, Split::Train).unwrap();
        let mut expected: Vec<String> = expected.into_iter().map(|document| document.text).collect();
        let mut unmixed = expected.clone();
        unmixed.sort();
        assert_ne!(texts, unmixed, "a corpus lies shuffled, and so do its shards");
        assert_eq!(texts, expected, "in the corpus's order");
        texts.sort();
        expected.sort();
        assert_eq!(texts, expected);
    }
    shards.verify().unwrap();
    let settings = TokenizeSettings {
        document_end: Some("</s>".into()),
        ..TokenizeSettings::default()
    };
    let missing = tokenize(&corpus, &path("base"), &path("t"), &settings, &mut |_, _| {})
        .unwrap_err()
        .to_string();
    assert!(
        missing.contains("has no token '</s>', which was asked for as document end"),
        "{missing}"
    );

    let mut bin = fs::read(path("tokens").join("tokens.bin")).unwrap();
    bin[3] ^= 1;
    fs::write(path("tokens").join("tokens.bin"), bin).unwrap();
    let said = TokenShards::open(&path("tokens"))
        .unwrap()
        .verify()
        .unwrap_err()
        .to_string();
    assert!(said.contains("the files were changed"), "{said}");
}

#[test]
fn shards_that_do_not_belong_together_are_refused() {
    let check = |damage: &dyn Fn(&Path), sentence: &str| {
        let folder = tempfile::tempdir().unwrap();
        write_shards(folder.path(), &PARTS);
        damage(folder.path());
        let said = TokenShards::open(folder.path()).err().unwrap().to_string();
        assert!(said.contains(sentence), "{said}");
    };
    let change = |folder: &Path, from: &str, to: &str| {
        let text = fs::read_to_string(folder.join("manifest.json")).unwrap();
        assert!(text.contains(from), "{text}");
        fs::write(folder.join("manifest.json"), text.replacen(from, to, 1)).unwrap();
    };
    check(
        &|folder| fs::remove_file(folder.join("manifest.json")).unwrap(),
        "manifest.json is missing); make it with `panglot tokenize`",
    );
    check(
        &|folder| fs::remove_file(folder.join("tokens.bin")).unwrap(),
        "tokens.bin",
    );
    check(
        &|folder| change(folder, "\"tokens\":41356", "\"tokens\":41357"),
        "the manifest says tokens 41357, the files have 41356",
    );
    check(
        &|folder| change(folder, "uint16", "int32"),
        "the manifest says token type Int32",
    );
    check(
        &|folder| change(folder, "\"documents\":6", "\"documents\":7"),
        "the manifest says documents 7",
    );
    check(
        &|folder| change(folder, "\"end\":41000", "\"end\":40999"),
        "they do not belong together",
    );
    check(&|folder| change(folder, "aaa_Latn", "AAA"), "'AAA' is not a language");
}

#[test]
fn files_of_megatrons_own_tool_open_as_one_language() {
    let folder = tempfile::tempdir().unwrap();
    write_shards(folder.path(), &[("", "aaa_Latn", &[70_000]), ("", "bbb_Latn", &[5])]);
    fs::remove_file(folder.path().join("manifest.json")).unwrap();
    let shards = TokenShards::open_megatron(&folder.path().join("tokens"), "mul_Latn".parse().unwrap()).unwrap();
    assert_eq!(
        (
            shards.manifest().documents,
            shards.manifest().tokens,
            shards.manifest().token_type
        ),
        (2, 70_005, TokenType::Int32)
    );
    assert_eq!(
        shards.tokens(shards.document(1).unwrap()),
        [70_000, 70_001, 70_002, 70_003, 70_004]
    );
}

/// A small corpus with a base tokenizer of 300 pieces.
fn small_corpus(root: &Path) -> Corpus {
    let documents = |of: &str| (0..30).map(|i| format!("{of} {i}")).collect::<Vec<_>>();
    write_folders(&root.join("text"), &[("eng_Latn", documents("this is document"))]);
    import_folders(&root.join("text"), &root.join("corpus"), 0.1, 1, &mut |_, _| {}).unwrap();
    byte_level_base(&root.join("base"), 300, &["this is a document"]);
    Corpus::open(&root.join("corpus")).unwrap()
}

/// Gives every training document of a corpus a prompt: all up to and including its first `marker`.
fn add_prompts(folder: &Path, language: &str, marker: &str) {
    let (file, manifest) = (
        folder.join("folders").join(language).join("train.jsonl"),
        folder.join("corpus.json"),
    );
    let old = fs::read_to_string(&file).unwrap();
    let new: String = old
        .lines()
        .map(|line| {
            let mut line: serde_json::Value = serde_json::from_str(line).unwrap();
            let text = line["text"].as_str().unwrap();
            line["loss_from"] = text.find(marker).map_or(0, |at| at + marker.len()).into();
            line.to_string() + "\n"
        })
        .collect();
    fs::write(&file, &new).unwrap();
    let digest = |text: &str| blake3::hash(text.as_bytes()).to_hex().to_string();
    let text = fs::read_to_string(&manifest).unwrap();
    fs::write(&manifest, text.replace(&digest(&old), &digest(&new))).unwrap();
}

#[test]
fn a_prompt_ends_at_a_token_and_is_counted() {
    let root = tempfile::tempdir().unwrap();
    small_corpus(root.path());
    add_prompts(&root.path().join("corpus"), "eng_Latn", " is ");
    let corpus = Corpus::open(&root.path().join("corpus")).unwrap();
    let settings = TokenizeSettings {
        document_start: Some("<|im_start|>".into()),
        ..TokenizeSettings::default()
    };
    let (base, out) = (root.path().join("base"), root.path().join("tokens"));
    let manifest = tokenize(&corpus, &base, &out, &settings, &mut |_, _| {}).unwrap();
    assert!(manifest.has_prompts);
    let (shards, tokenizer) = (TokenShards::open(&out).unwrap(), Tokenizer::open(&base).unwrap());
    for document in 0..manifest.documents {
        let ids = shards.tokens(shards.document(document).unwrap());
        let ids: Vec<u32> = ids.into_iter().map(|id| id as u32).collect();
        let (prompt, answer) = ids.split_at(shards.prompt(document) as usize);
        assert_eq!(tokenizer.decode(prompt).unwrap(), "<|im_start|>this is ");
        assert!(tokenizer.decode(answer).unwrap().starts_with("document "));
    }
    shards.verify().unwrap();

    // Another count is another digest, and a file of another length is refused.
    let prompts = out.join("tokens.prompts");
    let mut bytes = fs::read(&prompts).unwrap();
    bytes[0] ^= 1;
    fs::write(&prompts, &bytes).unwrap();
    let said = TokenShards::open(&out).unwrap().verify().unwrap_err().to_string();
    assert!(said.contains("the files were changed"), "{said}");
    fs::write(&prompts, &bytes[4..]).unwrap();
    let said = TokenShards::open(&out).err().unwrap().to_string();
    assert!(said.contains("27 documents take 108 bytes, the file has 104"), "{said}");
}

#[test]
fn a_prompt_that_ends_within_a_character_is_refused() {
    let root = tempfile::tempdir().unwrap();
    small_corpus(root.path());
    let file = root.path().join("corpus/folders/eng_Latn/train.jsonl");
    let manifest = root.path().join("corpus/corpus.json");
    let (old, new) = (
        fs::read_to_string(&file).unwrap(),
        "{\"key\":\"k\",\"text\":\"äb\",\"loss_from\":1}\n",
    );
    let digest = |text: &str| blake3::hash(text.as_bytes()).to_hex().to_string();
    let text = fs::read_to_string(&manifest).unwrap();
    let mut described: serde_json::Value = serde_json::from_str(&text).unwrap();
    let train = &mut described["languages"][0]["train"];
    assert_eq!(train["digest"], digest(&old));
    *train = serde_json::json!({"documents": 1, "bytes": 3, "digest": digest(new)});
    fs::write(&manifest, described.to_string()).unwrap();
    fs::write(&file, new).unwrap();
    let corpus = Corpus::open(&root.path().join("corpus")).unwrap();
    let (base, out) = (root.path().join("base"), root.path().join("tokens"));
    let said = tokenize(&corpus, &base, &out, &TokenizeSettings::default(), &mut |_, _| {})
        .unwrap_err()
        .to_string();
    assert!(
        said.contains("document k of eng_Latn: loss_from = 1 is not a place between"),
        "{said}"
    );
}

/// SentencePiece-style tokenizers put a space before every text they are given: the answer must not get one.
#[test]
fn an_answer_behind_a_prompt_is_encoded_as_what_goes_on() {
    let Some(package) = common::fetched("npm/llama-tokenizer-js-1.2.2") else {
        return;
    };
    let root = tempfile::tempdir().unwrap();
    let prompts = (0..30)
        .map(|i| format!("<|user|>How many? <|assistant|>It is {i}."))
        .collect();
    write_folders(&root.path().join("text"), &[("eng_Latn", prompts)]);
    let folder = root.path().join("corpus");
    import_folders(&root.path().join("text"), &folder, 0.1, 1, &mut |_, _| {}).unwrap();
    add_prompts(&folder, "eng_Latn", "<|assistant|>");
    let (base, out) = (root.path().join("base"), root.path().join("tokens"));
    fs::create_dir_all(&base).unwrap();
    corpus::write_llama_tokenizer(&package, &base).unwrap();
    let corpus = Corpus::open(&folder).unwrap();
    tokenize(&corpus, &base, &out, &TokenizeSettings::default(), &mut |_, _| {}).unwrap();
    let (shards, tokenizer) = (TokenShards::open(&out).unwrap(), Tokenizer::open(&base).unwrap());
    let ids = shards.tokens(shards.document(0).unwrap());
    let pieces: Vec<String> = ids.iter().map(|id| tokenizer.piece(*id as u32).unwrap()).collect();
    assert_eq!(pieces[shards.prompt(0) as usize], "It");
    assert_eq!(pieces[0], "▁<", "the prompt has its space");
}

/// Writes `prefix.bin` and `prefix.idx` with documents of these tokens.
fn write_megatron(prefix: &Path, code: u8, documents: &[&[i64]]) {
    let width = [0, 1, 1, 2, 4, 8, 0, 0, 2][usize::from(code)];
    let bin: Vec<u8> = documents
        .iter()
        .copied()
        .flatten()
        .flat_map(|id| id.to_le_bytes().into_iter().take(width))
        .collect();
    let lengths: Vec<u32> = documents.iter().map(|tokens| tokens.len() as u32).collect();
    fs::create_dir_all(prefix.parent().unwrap()).unwrap();
    fs::write(prefix.with_extension("bin"), bin).unwrap();
    fs::write(prefix.with_extension("idx"), index(code, width as u64, &lengths)).unwrap();
}

#[test]
fn megatrons_files_are_taken_in_where_they_lie() {
    let root = tempfile::tempdir().unwrap();
    let corpus = small_corpus(root.path());
    let theirs = root.path().join("theirs");
    write_megatron(&theirs.join("rus_Cyrl_text_document"), 4, &[&[5, 6, 7], &[], &[8]]);
    write_megatron(&theirs.join("eng_Latn"), 8, &[&[9, 258]]);
    let found = MegatronFiles::find(&theirs, "theirs").unwrap();
    let names: Vec<String> = found.iter().map(|files| files.language.to_string()).collect();
    assert_eq!(names, ["eng_Latn", "rus_Cyrl"]);
    let settings = TokenizeSettings {
        megatron: found,
        ..TokenizeSettings::default()
    };
    let (base, out) = (root.path().join("base"), root.path().join("tokens"));
    let mut seen = Vec::new();
    let manifest = tokenize(&corpus, &base, &out, &settings, &mut |done, total| {
        seen.push((done, total))
    })
    .unwrap();
    assert_eq!(seen, [(1, 3), (2, 3), (3, 3)]);
    let parts: Vec<_> = manifest
        .languages
        .iter()
        .map(|part| (part.source.as_str(), part.language.as_str()))
        .collect();
    assert_eq!(
        parts,
        [("folders", "eng_Latn"), ("theirs", "eng_Latn"), ("theirs", "rus_Cyrl")]
    );

    let shards = TokenShards::open(&out).unwrap();
    let read = |part: usize| -> Vec<Vec<i64>> {
        let documents = manifest.languages[part].documents.clone();
        documents
            .map(|document| shards.tokens(shards.document(document).unwrap()))
            .collect()
    };
    assert_eq!(read(1), [vec![9, 258]]);
    assert_eq!(read(2), [vec![5, 6, 7], vec![], vec![8]]);
    assert_eq!(read(0).len(), 27);
    assert_eq!(fs::read_dir(&out).unwrap().count(), 3, "nothing is copied");
    shards.verify().unwrap();

    write_megatron(&theirs.join("rus_Cyrl_text_document"), 4, &[&[5, 6, 7], &[8], &[]]);
    let said = TokenShards::open(&out).unwrap().verify().unwrap_err().to_string();
    assert!(
        said.contains("rus_Cyrl_text_document.idx: the files were changed"),
        "{said}"
    );
    write_megatron(&theirs.join("rus_Cyrl_text_document"), 4, &[&[5, 6, 7]]);
    let said = TokenShards::open(&out).err().unwrap().to_string();
    assert!(
        said.contains("1 documents with 3 tokens of type Int32 now, 3 with 4"),
        "{said}"
    );
}

#[test]
fn every_number_type_that_can_hold_ids_is_read() {
    let root = tempfile::tempdir().unwrap();
    for (code, token_type, ids) in [
        (1, TokenType::Uint8, [0i64, 200, 255]),
        (2, TokenType::Int8, [0, 1, 127]),
        (3, TokenType::Int16, [0, 1, 32_767]),
        (4, TokenType::Int32, [0, 70_000, 2_000_000_000]),
        (5, TokenType::Int64, [0, 70_000, 1 << 40]),
        (8, TokenType::Uint16, [0, 1, 65_535]),
    ] {
        let prefix = root.path().join("some");
        write_megatron(&prefix, code, &[&ids[..1], &ids[1..]]);
        let shards = TokenShards::open_megatron(&prefix, "eng_Latn".parse().unwrap()).unwrap();
        assert_eq!(
            (shards.manifest().token_type, shards.tokens(0..3)),
            (token_type, ids.to_vec())
        );
    }
    write_megatron(&root.path().join("some"), 8, &[&[1]]);
    let mut idx = fs::read(root.path().join("some.idx")).unwrap();
    idx[17] = 6;
    fs::write(root.path().join("some.idx"), idx).unwrap();
    let said = TokenShards::open_megatron(&root.path().join("some"), "eng_Latn".parse().unwrap());
    assert!(
        said.err()
            .unwrap()
            .to_string()
            .contains("token type 6 is not one that token ids have")
    );
}

#[test]
fn megatrons_files_of_another_vocabulary_are_refused() {
    let root = tempfile::tempdir().unwrap();
    let corpus = small_corpus(root.path());
    let said = |code, documents: &[&[i64]], idx: &dyn Fn(&mut Vec<u8>)| {
        let prefix = root.path().join("theirs/deu_Latn");
        write_megatron(&prefix, code, documents);
        let mut bytes = fs::read(prefix.with_extension("idx")).unwrap();
        idx(&mut bytes);
        fs::write(prefix.with_extension("idx"), bytes).unwrap();
        let settings = TokenizeSettings {
            megatron: MegatronFiles::find(&root.path().join("theirs"), "theirs").unwrap(),
            ..TokenizeSettings::default()
        };
        let (base, out) = (root.path().join("base"), root.path().join("tokens"));
        tokenize(&corpus, &base, &out, &settings, &mut |_, _| {}).unwrap_err()
    };
    let error = said(4, &[&[1, 2], &[3, 4, 300]], &|_| {});
    assert!(
        matches!(
            error,
            Error::IdOutside {
                id: 300,
                document: 1,
                token: 2,
                vocabulary_size: 259,
                ..
            }
        ),
        "{error}"
    );
    assert!(matches!(
        said(4, &[&[1, -1]], &|_| {}),
        Error::IdOutside {
            id: -1,
            document: 0,
            token: 1,
            ..
        }
    ));
    // The middle of the index, which opening does not look at.
    let error = said(4, &[&[1, 2], &[3], &[4]], &|idx| idx[38] = 2).to_string();
    assert!(
        error.contains("sequence 2 does not begin where the one before it ends"),
        "{error}"
    );
}

#[test]
fn a_folder_of_megatrons_files_says_what_it_lacks() {
    let root = tempfile::tempdir().unwrap();
    let said = || MegatronFiles::find(root.path(), "theirs").unwrap_err().to_string();
    assert!(said().contains("has <lll_Ssss>.bin and <lll_Ssss>.idx"), "{}", said());
    write_megatron(&root.path().join("eng_Latn"), 4, &[&[1]]);
    write_megatron(&root.path().join("eng_Latn_text_document"), 4, &[&[1]]);
    assert!(said().contains("are both of eng_Latn"), "{}", said());
    write_megatron(&root.path().join("english"), 4, &[&[1]]);
    assert!(said().contains("english.bin: the name says no language"), "{}", said());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]
    /// Whatever bytes a damaged file has, an error at most.
    #[test]
    fn damaged_files_never_panic(
        lengths in prop::collection::vec(0u32..6, 0..8),
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
        numbers in prop::collection::vec((any::<prop::sample::Index>(), 0u64..20), 0..3),
        cut in 0usize..3, code in prop::sample::select(vec![1u8, 2, 3, 4, 5, 8]),
    ) {
        let width = [0u64, 1, 1, 2, 4, 8, 0, 0, 2][usize::from(code)];
        let bin = vec![1u8; (lengths.iter().sum::<u32>() as u64 * width) as usize];
        let mut idx = index(code, width, &lengths);
        for (at, byte) in damage {
            let at = at.index(idx.len());
            idx[at] = byte;
        }
        // Small numbers in the places of numbers do more harm than noise.
        for (at, number) in numbers {
            let at = at.index((idx.len() - 18) / 4) * 4 + 18;
            let end = idx.len().min(at + 8);
            idx[at..end].copy_from_slice(&number.to_le_bytes()[..end - at]);
        }
        idx.truncate(idx.len() - cut);
        corpus::fuzz::indexed_files(&bin, &idx);
    }

    #[test]
    fn noise_never_panics(bin in prop::collection::vec(any::<u8>(), 0..40), idx in prop::collection::vec(any::<u8>(), 0..120)) {
        corpus::fuzz::indexed_files(&bin, &idx);
        let mut idx = idx;
        for (at, byte) in b"MMIDIDX\x00\x00\x01\x00\x00\x00\x00\x00\x00\x00\x04".iter().enumerate().take(idx.len()) {
            idx[at] = *byte;
        }
        corpus::fuzz::indexed_files(&bin, &idx);
    }
}
