//! From corpus to rows: what lies in the shards, and that rows are a pure, even and complete function of seed and index.

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use common::{END, byte_level_base, write_folders};
use corpus::{
    Corpus, LanguageTokens, Split, Stream, TokenShards, TokenType, Tokenizer, TokensManifest, import_folders, tokenize,
};

/// Shards whose tokens count up, so that a token tells its place; (language, tokens) each. 16-bit if they fit.
fn counting_shards(folder: &Path, languages: &[(&str, u64)]) {
    let total: u64 = languages.iter().map(|(_, tokens)| tokens).sum();
    let token_type = TokenType::for_size(total as usize);
    let bin: Vec<u8> = match token_type {
        TokenType::Uint16 => (0..total).flat_map(|id| (id as u16).to_le_bytes()).collect(),
        TokenType::Int32 => (0..total).flat_map(|id| (id as u32).to_le_bytes()).collect(),
    };
    fs::create_dir_all(folder).unwrap();
    fs::write(folder.join("tokens.bin"), bin).unwrap();
    // One document per language.
    let n = languages.len() as u64;
    let mut idx = b"MMIDIDX\x00\x00".to_vec();
    idx.extend(1u64.to_le_bytes());
    idx.push(if token_type == TokenType::Uint16 { 8 } else { 4 });
    idx.extend([n.to_le_bytes(), (n + 1).to_le_bytes()].concat());
    languages
        .iter()
        .for_each(|(_, tokens)| idx.extend((*tokens as i32).to_le_bytes()));
    let mut start = 0;
    let mut entries = Vec::new();
    for ((language, tokens), document) in languages.iter().zip(0..) {
        idx.extend((start * token_type.width()).to_le_bytes());
        let (documents, tokens) = (document..document + 1, start..start + tokens);
        start = tokens.end;
        entries.push(LanguageTokens {
            language: language.parse().unwrap(),
            documents,
            tokens,
        });
    }
    (0..=n).for_each(|document| idx.extend(document.to_le_bytes()));
    fs::write(folder.join("tokens.idx"), idx).unwrap();
    let manifest = TokensManifest {
        format: 1,
        languages: entries,
        documents: n,
        tokens: total,
        token_type,
        vocabulary_size: total as usize,
        document_start: None,
        document_end: None,
        tokenizer_digest: String::new(),
        corpus_digest: String::new(),
        digest: String::new(),
    };
    fs::write(folder.join("manifest.json"), serde_json::to_vec(&manifest).unwrap()).unwrap();
}

fn stream(folder: &Path, seed: u64, sequence_length: usize) -> Stream {
    Stream::new(TokenShards::open(folder).unwrap(), seed, 0.3, sequence_length).unwrap()
}

const LANGUAGES: [(&str, u64); 6] = [
    ("aaa_Latn", 40_000),
    ("bbb_Cyrl", 1_000),
    ("ccc_Latn", 0),
    ("ddd_Arab", 7),
    ("eee_Latn", 333),
    ("fff_Thai", 16),
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
    let manifest = tokenize(
        &corpus,
        &path("base"),
        &path("tokens"),
        Some("<|im_start|>"),
        Some(END),
        &mut |_, _| {},
    )
    .unwrap();

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
        let mut expected: Vec<_> = corpus
            .documents(&language.language, Split::Train)
            .unwrap()
            .into_iter()
            .map(|d| d.text)
            .collect();
        assert_ne!(texts, expected, "shuffled");
        texts.sort();
        expected.sort();
        assert_eq!(texts, expected);
    }
    shards.verify().unwrap();
    let missing = tokenize(&corpus, &path("base"), &path("t"), None, Some("</s>"), &mut |_, _| {})
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
        counting_shards(folder.path(), &LANGUAGES);
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
    counting_shards(folder.path(), &[("aaa_Latn", 70_000), ("bbb_Latn", 5)]);
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
    assert_eq!(Stream::new(shards, 1, 0.3, 8).unwrap().row(0).tokens.len(), 8);
}

#[test]
fn a_row_depends_on_seed_and_index_alone() {
    let folder = tempfile::tempdir().unwrap();
    counting_shards(folder.path(), &LANGUAGES);
    let (a, b) = (stream(folder.path(), 5, 16), stream(folder.path(), 5, 16));
    let forwards: Vec<_> = (0..300).map(|index| a.row(index)).collect();
    let mut backwards: Vec<_> = (0..300).rev().map(|index| b.row(index)).collect();
    backwards.reverse();
    assert_eq!(forwards, backwards);
    assert_ne!(a.digest(0, 300), stream(folder.path(), 6, 16).digest(0, 300));
    // Golden: a change that is meant to leave the rows alone leaves this alone.
    assert_eq!(
        a.digest(0, 1000),
        "525152b2a1c3d8f37ecc41c36dc74a4dd4012b509fee61cc385a1b21e6509904"
    );
}

#[test]
fn every_block_is_met_once_an_epoch_and_no_token_is_lost() {
    const T: u64 = 16;
    let folder = tempfile::tempdir().unwrap();
    counting_shards(folder.path(), &LANGUAGES);
    let stream = stream(folder.path(), 5, T as usize);
    let mut blocks: BTreeMap<usize, Vec<Vec<i64>>> = BTreeMap::new();
    for index in 0..30_000 {
        let row = stream.row(index);
        blocks.entry(row.language).or_default().push(row.tokens);
    }
    for (language, rows) in blocks {
        let range = &stream.shards().manifest().languages[language].tokens;
        let (first, n) = (range.start, range.end - range.start);
        let expected: Vec<Vec<i64>> = (0..n.div_ceil(T))
            .map(|block| (block * T..(block + 1) * T).map(|at| (first + at % n) as i64).collect())
            .collect();
        let mut orders = Vec::new();
        for epoch in rows.chunks_exact(expected.len()) {
            let mut sorted = epoch.to_vec();
            sorted.sort_by_key(|tokens| tokens[0]);
            assert_eq!(sorted, expected, "{}", LANGUAGES[language].0);
            orders.push(epoch.to_vec());
        }
        assert!(orders.len() > 1, "{} was seen more than once", LANGUAGES[language].0);
        assert!(expected.len() < 4 || orders[0] != orders[1], "another order each epoch");
    }
}

#[test]
fn shares_hold_over_any_window() {
    let folder = tempfile::tempdir().unwrap();
    counting_shards(folder.path(), &LANGUAGES);
    let stream = stream(folder.path(), 9, 16);
    let weight = |tokens: u64| if tokens == 0 { 0.0 } else { (tokens as f64).powf(0.3) };
    let whole: f64 = LANGUAGES.iter().map(|(_, tokens)| weight(*tokens)).sum();
    for ((_, tokens), share) in LANGUAGES.iter().zip(stream.shares()) {
        assert!((weight(*tokens) / whole - share).abs() < 1e-9);
    }
    for (start, rows) in [(0, 64), (12_345, 1_000), (1 << 40, 10_000)] {
        let mut counts = [0u64; LANGUAGES.len()];
        (start..start + rows).for_each(|index| counts[stream.row(index).language] += 1);
        let mut chi2 = 0.0;
        for (count, share) in counts.iter().zip(stream.shares()) {
            let due = share * rows as f64;
            // Random draws would miss by √due, here 50 rows of 2,500.
            assert!((*count as f64 - due).abs() < 8.0, "{count} rows of {due:.1} in {rows}");
            chi2 += if due > 0.0 {
                (*count as f64 - due).powi(2) / due
            } else {
                0.0
            };
        }
        // Four degrees of freedom: random draws exceed 18.5 once in a thousand.
        assert!(chi2 < 18.5, "{chi2}");
    }
    assert_eq!(
        stream.rows_before(1 << 40, 2),
        0,
        "a language without tokens has no rows"
    );
}

#[test]
fn any_row_is_found_at_once() {
    let folder = tempfile::tempdir().unwrap();
    counting_shards(folder.path(), &LANGUAGES);
    let stream = stream(folder.path(), 5, 16);
    let hundred_seeks = || {
        let start = Instant::now();
        (0..100).for_each(|i| assert_eq!(stream.row(1_000_000_000 + i).tokens.len(), 16));
        start.elapsed()
    };
    // A hundred seeks in the time allowed for one, the best of five tries, so that a busy machine does not fail it.
    let best = (0..5).map(|_| hundred_seeks()).min().unwrap();
    assert!(best < Duration::from_millis(10), "{best:?}");
}

#[test]
fn impossible_streams_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    counting_shards(folder.path(), &LANGUAGES);
    let said = |alpha, length| {
        let shards = TokenShards::open(folder.path()).unwrap();
        Stream::new(shards, 1, alpha, length).err().unwrap().to_string()
    };
    assert!(said(1.1, 16).contains("sampling.alpha = 1.1 is not between 0"));
    assert!(said(f64::NAN, 16).contains("sampling.alpha = NaN"));
    assert!(said(0.3, 0).contains("sequence_length = 0 must be at least 1"));
    counting_shards(folder.path(), &[("aaa_Latn", 0)]);
    assert!(said(0.3, 16).contains("hold no tokens"));
}
