//! Readers on what people really have: packed, cut off, of the wrong shape, written by other programs.
//! Each reader hands on what is fine, names what is not with its place, and goes on behind it.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arrow_array::types::Int32Type;
use arrow_array::{
    ArrayRef, BinaryArray, DictionaryArray, Int64Array, LargeStringArray, RecordBatch, StringArray, StringViewArray,
};
use flate2::write::GzEncoder;
use parquet::arrow::ArrowWriter;
use parquet::basic::{Compression, GzipLevel, ZstdLevel};
use parquet::file::properties::WriterProperties;
use proptest::prelude::*;

use crate::import::files::Files;
use crate::import::folders::Folders;
use crate::import::instructions::Instructions;
use crate::import::parallel::Parallel;
use crate::import::texts::OneDocument;
use crate::import::{LanguageOf, Sides, Sink, Source};
use crate::{Document, Error, Language, Result};

/// PolyLM's.
const PROMPT: &str = "<|user|>\n{instruction}\n{input}\n<|assistant|>\n";

/// Everything a source hands on.
#[derive(Default)]
struct Seen {
    documents: Vec<Document>,
    unreadable: Vec<String>,
}

impl Sink for Seen {
    fn document(&mut self, document: Document) -> Result<()> {
        self.documents.push(document);
        Ok(())
    }

    fn unreadable(&mut self, error: Error) -> Result<()> {
        self.unreadable.push(error.to_string());
        Ok(())
    }
}

fn read(source: &dyn Source) -> Seen {
    let mut seen = Seen::default();
    for language in 0..source.languages().len() {
        source.read(language, &mut seen).unwrap();
    }
    seen
}

/// `lll_Ssss: text` of each document.
fn texts(seen: &Seen) -> Vec<String> {
    let said = |d: &Document| format!("{}: {}", d.language, d.text);
    seen.documents.iter().map(said).collect()
}

fn folders(root: &Path) -> Seen {
    read(&Folders::open(root, "text", OneDocument::Line).unwrap())
}

fn language(name: &str) -> Language {
    name.parse().unwrap()
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

fn zstandard(bytes: &[u8]) -> Vec<u8> {
    // With a checksum, as the command-line tool writes it.
    let mut encoder = zstd::Encoder::new(Vec::new(), 3).unwrap();
    encoder.include_checksum(true).unwrap();
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// Lines that do not pack to nothing.
fn many_lines() -> String {
    (0..20_000)
        .map(|i| format!("Line {i} with {}\n", blake3::hash(&[i as u8, (i >> 8) as u8])))
        .collect()
}

fn check_one(seen: &[String], sentence: &str) {
    assert!(seen.len() == 1 && seen[0].contains(sentence), "{seen:?}");
}

#[test]
fn packed_text_is_read_like_plain_text() {
    let temp = tempfile::tempdir().unwrap();
    let root = temp.path();
    let json = b"{\"text\": \"from json\"}\n";
    write(&root.join("eng_Latn/a.txt"), b"one\r\ntwo\r\n");
    // Archives joined end to end are one archive.
    write(
        &root.join("eng_Latn/b.txt.gz"),
        &[gzip(b"three\n"), gzip(b"four\n")].concat(),
    );
    write(
        &root.join("eng_Latn/c.txt.zst"),
        &[zstandard(b"five\nsi"), zstandard(b"x\n")].concat(),
    );
    write(&root.join("eng_Latn/d.jsonl.gz"), &gzip(json));
    write(&root.join("eng_Latn/e.jsonl.zst"), &zstandard(json));
    let seen = folders(root);
    let all: Vec<_> = seen.documents.iter().map(|d| d.text.as_str()).collect();
    assert_eq!(
        all,
        ["one", "two", "three", "four", "five", "six", "from json", "from json"]
    );
    assert_eq!(seen.unreadable.len(), 0);
}

#[test]
fn a_truncated_archive_names_its_file_and_last_good_line() {
    let text = many_lines();
    for (name, packed) in [
        ("a.txt.gz", gzip(text.as_bytes())),
        ("a.txt.zst", zstandard(text.as_bytes())),
    ] {
        let temp = tempfile::tempdir().unwrap();
        write(&temp.path().join("eng_Latn").join(name), &packed[..packed.len() / 2]);
        write(&temp.path().join("eng_Latn/b.txt"), b"the next file");
        let seen = folders(temp.path());
        let n = seen.documents.len() - 1;
        assert!(n > 5_000 && n < 15_000, "about half is there: {n}");
        check_one(
            &seen.unreadable,
            &format!("{name}: the archive is damaged or cut off behind line {n} ("),
        );
        assert_eq!(seen.documents[n].text, "the next file");

        let mut flipped = packed.clone();
        flipped[packed.len() / 2] ^= 0x55;
        write(&temp.path().join("eng_Latn").join(name), &flipped);
        let seen = folders(temp.path());
        check_one(&seen.unreadable, "the archive is damaged or cut off behind line");
    }
    let temp = tempfile::tempdir().unwrap();
    write(&temp.path().join("eng_Latn/a.txt.gz"), b"not packed at all\n");
    check_one(
        &folders(temp.path()).unreadable,
        "a.txt.gz: the archive is damaged or cut off behind line 0",
    );
}

#[test]
fn lines_that_are_no_text_are_named_and_the_next_is_read() {
    let temp = tempfile::tempdir().unwrap();
    write(
        &temp.path().join("eng_Latn/a.txt"),
        b"fine\nnot \xff fine\nfine again\n",
    );
    write(
        &temp.path().join("eng_Latn/b.jsonl"),
        b"{\"text\": \"fine\"}\n{\"text\": 1}\n{\"words\": \"x\"}\n{\"text\": \"\xff\"}\n{\"text\": null}\n{\"text\": \"fine again\"}",
    );
    let seen = folders(temp.path());
    assert_eq!(seen.documents.len(), 4);
    let said: Vec<_> = seen
        .unreadable
        .iter()
        .map(|said| said.rsplit_once('/').unwrap().1)
        .collect();
    assert!(
        said[0].starts_with("a.txt:2: the text is not UTF-8 (first bad byte at column 5)"),
        "{said:?}"
    );
    assert!(said[1].starts_with("b.jsonl:2: invalid type: integer `1`"), "{said:?}");
    assert!(
        said[2].starts_with("b.jsonl:3: missing field `text` among `words`; each line must be"),
        "{said:?}"
    );
    assert!(
        said[3].starts_with("b.jsonl:4: the text is not UTF-8 (first bad byte at column 11)"),
        "{said:?}"
    );
    assert!(said[4].starts_with("b.jsonl:5: `text` is null"), "{said:?}");
}

#[test]
fn a_document_is_a_line_a_paragraph_or_a_file() {
    let temp = tempfile::tempdir().unwrap();
    write(
        &temp.path().join("eng_Latn/a.txt"),
        "\u{feff}one\r\n  two\r\n\r\n \t\nthree\n".as_bytes(),
    );
    write(&temp.path().join("eng_Latn/b.txt"), b"four\n\nfi\xffve\nsix\n\nseven");
    let all = |one_document| {
        let seen = read(&Folders::open(temp.path(), "text", one_document).unwrap());
        check_one(&seen.unreadable, "b.txt:3: the text is not UTF-8");
        seen.documents.into_iter().map(|d| d.text).collect::<Vec<_>>()
    };
    assert_eq!(all(OneDocument::Line), ["one", "two", "three", "four", "six", "seven"]);
    // What is left of a paragraph with an unreadable line is not a document.
    assert_eq!(all(OneDocument::BlankLine), ["one\n  two", "three", "four", "seven"]);
    assert_eq!(all(OneDocument::File), ["one\n  two\n\n \t\nthree"]);
}

#[test]
fn languages_are_folders_at_any_depth_or_files_whole_and_in_parts() {
    let temp = tempfile::tempdir().unwrap();
    let root = temp.path();
    let json = |text: &str| format!("{{\"text\": \"{text}\", \"original_code\": \"x\"}}\n");
    // As EMMA-500 has it.
    write(&root.join("aar_Latn/train.jsonl"), json("train").as_bytes());
    write(&root.join("aar_Latn/validation.jsonl"), json("validation").as_bytes());
    write(&root.join("abk_Cyrl/abk_Cyrl_part_1.jsonl"), json("part 1").as_bytes());
    write(&root.join("abk_Cyrl/abk_Cyrl_part_0.jsonl"), json("part 0").as_bytes());
    // As Glot500-c has it, in the stream format that Hugging Face datasets writes.
    let batch = RecordBatch::try_from_iter([("text", strings(&[Some("deep")]))]).unwrap();
    let arrow = write(&root.join("ace_Latn/train/data-00000-of-00001.arrow"), b"");
    write_stream(&arrow, std::slice::from_ref(&batch));
    write(&root.join("ace_Latn/train/dataset_info.json"), b"{}");
    write(&root.join("ace_Latn/train/.cache/x.jsonl"), b"hidden");
    // Flat.
    write(&root.join("ban_Latn.txt"), b"flat");
    write(&root.join("bik_Latn-00001-of-00002.jsonl"), json("second").as_bytes());
    write(&root.join("bik_Latn-00000-of-00002.jsonl"), json("first").as_bytes());
    write(&root.join("README.md"), b"read me");
    let source = Folders::open(root, "text", OneDocument::Line).unwrap();
    assert_eq!(
        texts(&read(&source)),
        [
            "aar_Latn: train",
            "aar_Latn: validation",
            "abk_Cyrl: part 0",
            "abk_Cyrl: part 1",
            "ace_Latn: deep",
            "ban_Latn: flat",
            "bik_Latn: first",
            "bik_Latn: second"
        ]
    );
    let skipped: Vec<_> = source.skipped().iter().map(|skipped| skipped.what.as_str()).collect();
    assert_eq!(skipped, ["README.md", "ace_Latn/train/dataset_info.json"]);

    let refused = |name: &str, sentence: &str| {
        let path = write(&root.join(name), b"x");
        let said = Folders::open(root, "text", OneDocument::Line)
            .err()
            .unwrap()
            .to_string();
        assert!(said.contains(sentence), "{said}");
        fs::remove_file(path).unwrap();
    };
    refused("english.txt", "english.txt names no language");
    refused("ban_Latnx.txt", "ban_Latnx.txt names no language");
    refused("ban_Latn.txt.gz", "language ban_Latn is there twice, as ");
    refused("aar_Latn.jsonl", "language aar_Latn is there twice, as ");
}

fn strings(values: &[Option<&str>]) -> ArrayRef {
    Arc::new(StringArray::from(values.to_vec()))
}

fn write_stream(path: &Path, batches: &[RecordBatch]) {
    let file = File::create(path).unwrap();
    let mut writer = arrow_ipc::writer::StreamWriter::try_new(file, &batches[0].schema()).unwrap();
    batches.iter().for_each(|batch| writer.write(batch).unwrap());
    writer.finish().unwrap();
}

fn write_file(path: &Path, batches: &[RecordBatch]) {
    let file = File::create(path).unwrap();
    let mut writer = arrow_ipc::writer::FileWriter::try_new(file, &batches[0].schema()).unwrap();
    batches.iter().for_each(|batch| writer.write(batch).unwrap());
    writer.finish().unwrap();
}

fn write_parquet(path: &Path, batches: &[RecordBatch], compression: Compression) {
    let properties = WriterProperties::builder()
        .set_compression(compression)
        .set_data_page_row_count_limit(500)
        .set_dictionary_page_size_limit(1000)
        .build();
    let file = File::create(path).unwrap();
    let mut writer = ArrowWriter::try_new(file, batches[0].schema(), Some(properties)).unwrap();
    batches.iter().for_each(|batch| writer.write(batch).unwrap());
    writer.close().unwrap();
}

/// Every way to store strings, in every table format and with every codec that writers use by default.
#[test]
fn text_columns_of_every_kind_and_format_are_read() {
    let values = ["eins", "zwei ✓", "drei", "eins"];
    let some: Vec<_> = values.iter().map(|value| Some(*value)).collect();
    let columns: [(&str, ArrayRef); 5] = [
        ("utf8", strings(&some)),
        ("large", Arc::new(LargeStringArray::from(values.to_vec()))),
        ("view", Arc::new(StringViewArray::from(values.to_vec()))),
        (
            "dictionary",
            Arc::new(values.into_iter().collect::<DictionaryArray<Int32Type>>()),
        ),
        ("binary", Arc::new(BinaryArray::from_iter_values(values))),
    ];
    let number: ArrayRef = Arc::new(Int64Array::from(vec![1, 2, 3, 4]));
    let batch = RecordBatch::try_from_iter([("number", number)].into_iter().chain(columns.clone())).unwrap();
    let temp = tempfile::tempdir().unwrap();
    let at = |name: &str| temp.path().join(name);
    let both = [batch.clone(), batch];
    write_stream(&at("stream.arrow"), &both);
    write_file(&at("file.arrow"), &both);
    for (name, codec) in [
        ("plain.parquet", Compression::UNCOMPRESSED),
        ("snappy.parquet", Compression::SNAPPY),
        ("gzip.parquet", Compression::GZIP(GzipLevel::default())),
        ("zstd.parquet", Compression::ZSTD(ZstdLevel::default())),
        ("lz4.parquet", Compression::LZ4_RAW),
    ] {
        write_parquet(&at(name), &both, codec);
    }
    let deu = language("deu_Latn");
    for file in fs::read_dir(temp.path()).unwrap() {
        let path = file.unwrap().path();
        for (column, _) in &columns {
            let source = Files::open(
                std::slice::from_ref(&path),
                column,
                &LanguageOf::Fixed(deu.clone()),
                Path::new(""),
                &mut |_, _| {},
            )
            .unwrap();
            let seen = read(&source);
            let all: Vec<_> = seen.documents.iter().map(|d| d.text.as_str()).collect();
            assert_eq!(
                all,
                [values, values].concat(),
                "{column} of {}: {:?}",
                path.display(),
                seen.unreadable
            );
        }
    }
    assert_eq!(fs::read_dir(temp.path()).unwrap().count(), 7);
}

#[test]
fn a_wrong_column_is_told_which_there_are() {
    let temp = tempfile::tempdir().unwrap();
    let path = temp.path().join("a.parquet");
    let number: ArrayRef = Arc::new(Int64Array::from(vec![1]));
    let batch = RecordBatch::try_from_iter([("content", strings(&[Some("x")])), ("number", number)]).unwrap();
    write_parquet(&path, &[batch], Compression::SNAPPY);
    let eng = language("eng_Latn");
    let said = |column: &str| {
        let source = Files::open(
            std::slice::from_ref(&path),
            column,
            &LanguageOf::Fixed(eng.clone()),
            Path::new(""),
            &mut |_, _| {},
        )
        .unwrap();
        read(&source).unreadable
    };
    check_one(
        &said("text"),
        "a.parquet has no column 'text'; its columns are: content, number",
    );
    check_one(&said("number"), "a.parquet: column 'number' holds Int64, not text");
    assert_eq!(said("content").len(), 0);
    let odd = write(&temp.path().join("a.csv"), b"text\n");
    let said = Files::open(
        &[odd],
        "text",
        &LanguageOf::Fixed(eng.clone()),
        Path::new(""),
        &mut |_, _| {},
    )
    .err()
    .unwrap()
    .to_string();
    assert!(
        said.contains("a.csv does not hold records by its name; expected .jsonl"),
        "{said}"
    );
}

#[test]
fn a_truncated_table_names_its_file_and_last_good_row() {
    let text = many_lines();
    let rows: Vec<_> = text.lines().collect();
    let batches: Vec<_> = rows
        .chunks(1000)
        .map(|rows| {
            RecordBatch::try_from_iter([("text", Arc::new(StringArray::from(rows.to_vec())) as ArrayRef)]).unwrap()
        })
        .collect();
    let temp = tempfile::tempdir().unwrap();
    let path = |name: &str| temp.path().join("eng_Latn").join(name);
    write(&path("z.txt"), b"the next file");
    write_parquet(&path("a.parquet"), &batches, Compression::SNAPPY);
    let whole = fs::read(path("a.parquet")).unwrap();
    let check = |name: &str, bytes: &[u8], expected_rows: std::ops::RangeInclusive<usize>| {
        write(&path(name), bytes);
        let seen = folders(temp.path());
        let n = seen.documents.len() - 1;
        assert!(expected_rows.contains(&n), "{n} rows");
        check_one(
            &seen.unreadable,
            &format!("{name}: the table is damaged or cut off behind row {n} ("),
        );
        fs::remove_file(path(name)).unwrap();
    };
    // Parquet's directory is at its end, so nothing of a cut-off file can be read.
    check("a.parquet", &whole[..whole.len() / 2], 0..=0);
    check("a.parquet", b"", 0..=0);
    let mut flipped = whole.clone();
    flipped[whole.len() / 2..whole.len() / 2 + 2000].fill(0xff);
    check("a.parquet", &flipped, 5_000..=15_000);

    write_stream(&path("a.arrow"), &batches);
    let whole = fs::read(path("a.arrow")).unwrap();
    check("a.arrow", &whole[..whole.len() / 2], 9_000..=10_000);
    check("a.arrow", &whole[..3], 0..=0);
}

#[test]
fn dividing_files_says_how_far_it_is() {
    let temp = tempfile::tempdir().unwrap();
    let line = |i: usize| format!(r#"{{"lang": "eng_Latn", "text": "{}"}}"#, format!("{i} ").repeat(200));
    let many: Vec<String> = (0..8000).map(line).collect();
    let files = [
        write(&temp.path().join("a.jsonl"), many.join("\n").as_bytes()),
        write(
            &temp.path().join("b.jsonl.gz"),
            &gzip(many[..4000].join("\n").as_bytes()),
        ),
    ];
    let sizes = [&files[0], &files[1]].map(|file| fs::metadata(file).unwrap().len());
    let (scratch, column) = (temp.path().join("scratch"), LanguageOf::Column("lang".into()));
    let mut told = Vec::new();
    let mut open = || {
        told.clear();
        Files::open(&files, "text", &column, &scratch, &mut |done, total| {
            told.push((done, total))
        })
        .unwrap();
        told.clone()
    };
    let first = open();
    assert!(first.len() > 6, "{first:?}");
    assert!(first.is_sorted() && first.iter().all(|(_, total)| *total == sizes[0] + sizes[1]));
    assert!(first.iter().any(|(done, _)| *done == sizes[0]), "{first:?}");
    assert_eq!(first.last().unwrap().0, sizes[0] + sizes[1]);
    assert_eq!(open(), [], "they are divided already");
}

#[test]
fn rows_of_many_languages_are_divided_by_language() {
    let temp = tempfile::tempdir().unwrap();
    let jsonl = write(
        &temp.path().join("a.jsonl.gz"),
        &gzip(
            [
                r#"{"lang": "eng_Latn", "text": "one"}"#,
                r#"{"lang": "deu_Latn", "text": "eins"}"#,
                r#"{"lang": "english", "text": "lost"}"#,
                r#"{"lang": "eng_Latn", "text": " "}"#,
                r#"{"lang": "eng_Latn", "text": null}"#,
                r#"{"lang": "eng_Latn", "text": "two\nlines"}"#,
            ]
            .join("\n")
            .as_bytes(),
        ),
    );
    let languages: DictionaryArray<Int32Type> = ["deu_Latn", "amh_Ethi", "deu_Latn"].into_iter().collect();
    let columns: [(&str, ArrayRef); 2] = [
        ("lang", Arc::new(languages)),
        ("text", strings(&[Some("zwei"), Some("አንድ"), None])),
    ];
    let parquet = temp.path().join("b.parquet");
    write_parquet(
        &parquet,
        &[RecordBatch::try_from_iter(columns).unwrap()],
        Compression::SNAPPY,
    );
    let files = [jsonl.clone(), parquet];
    let scratch = temp.path().join("scratch");
    let column = LanguageOf::Column("lang".into());
    let open = || Files::open(&files, "text", &column, &scratch, &mut |_, _| {}).unwrap();
    let source = open();
    let seen = read(&source);
    let expected = [
        "amh_Ethi: አንድ",
        "deu_Latn: eins",
        "deu_Latn: zwei",
        "eng_Latn: one",
        "eng_Latn: two\nlines",
    ];
    assert_eq!(texts(&seen), expected);
    let said: Vec<_> = seen
        .unreadable
        .iter()
        .map(|said| said.rsplit_once('/').unwrap().1)
        .collect();
    assert!(
        said[0].starts_with("a.jsonl.gz:3: 'english' is not a language"),
        "{said:?}"
    );
    assert!(said[1].starts_with("a.jsonl.gz:5: `text` is null"), "{said:?}");
    assert!(
        said[2].starts_with("b.parquet: row 3: column 'text' is null"),
        "{said:?}"
    );
    assert_eq!(said.len(), 3);

    // Divided once: what is there is used again, unless the files have changed.
    let written = || fs::metadata(scratch.join("divided.json")).unwrap().modified().unwrap();
    let first = written();
    assert_eq!((texts(&read(&open())), written()), (texts(&seen), first));
    write(&jsonl, &gzip(br#"{"lang": "fra_Latn", "text": "un"}"#));
    assert_eq!(texts(&read(&open()))[2..], ["fra_Latn: un"]);

    write(&jsonl, b"");
    let said = Files::open(&files[..1], "text", &column, &scratch, &mut |_, _| {});
    let said = said.err().unwrap().to_string();
    assert!(
        said.contains("a.jsonl.gz holds no text: no row names a language"),
        "{said}"
    );
}

#[test]
fn aligned_sides_become_bilingual_documents() {
    let temp = tempfile::tempdir().unwrap();
    let (eng, fra) = (language("eng_Latn"), language("fra_Latn"));
    let side = |name: &str, text: &str| write(&temp.path().join(name), &zstandard(text.as_bytes()));
    let sides = |source: &PathBuf, target: &PathBuf| Sides::Files {
        source: source.clone(),
        target: target.clone(),
    };
    let source = side("en.zst", "Hello\n\nempty\nGood {day}\n");
    let target = side("fr.zst", "Bonjour\n\n\nBonne journée\n");
    let template = "[{source_language}] {source}\n[{target_language}] {target}";
    let pair = Parallel::open(&sides(&source, &target), &[eng.clone(), fra.clone()], template).unwrap();
    let seen = read(&pair);
    assert_eq!(
        texts(&seen),
        [
            "fra_Latn: [eng_Latn] Hello\n[fra_Latn] Bonjour",
            "fra_Latn: [eng_Latn] Good {day}\n[fra_Latn] Bonne journée"
        ]
    );
    check_one(&seen.unreadable, "en.zst:3: the fra_Latn side of the pair is empty");

    // The other direction, from one file of two columns: other documents of another language, and the same keys.
    let columns = write(
        &temp.path().join("pairs.tsv"),
        b"Bonjour\tHello\n\nBonne journ\xc3\xa9e\tGood {day}\nno tab\na\tb\tc\n",
    );
    let back = Parallel::open(&Sides::Tsv(columns), &[fra.clone(), eng.clone()], "{source} = {target}").unwrap();
    let turned = read(&back);
    assert_eq!(
        texts(&turned),
        ["eng_Latn: Bonjour = Hello", "eng_Latn: Bonne journée = Good {day}"]
    );
    let keys = |seen: &Seen| seen.documents.iter().map(|d| d.key.clone()).collect::<Vec<_>>();
    assert_eq!(keys(&seen), keys(&turned));
    assert!(
        turned.unreadable[0].contains("pairs.tsv:4: 1 columns; each line must be"),
        "{:?}",
        turned.unreadable
    );
    assert!(turned.unreadable[1].contains("pairs.tsv:5: 3 columns"));

    let refused = |target_text: &str, template: &str| {
        let target = side("bad.zst", target_text);
        match Parallel::open(&sides(&source, &target), &[eng.clone(), fra.clone()], template) {
            Ok(pair) => pair.read(0, &mut Seen::default()).unwrap_err().to_string(),
            Err(error) => error.to_string(),
        }
    };
    let said = refused("a\nb\n", "{source} {target}");
    assert!(
        said.contains("en.zst has 4 lines and ") && said.contains("bad.zst has 2; the two sides"),
        "{said}"
    );
    let said = refused(&"x\n".repeat(7), "{source} {target}");
    assert!(
        said.contains("en.zst has 4 lines and ") && said.contains("bad.zst has 7; the two sides"),
        "{said}"
    );
    assert!(refused("", "{source}").ends_with("{target} must stand in it"));
}

#[test]
fn instructions_are_read_and_only_answers_are_learned() {
    let temp = tempfile::tempdir().unwrap();
    let records = [
        r#"{"instruction": "Add.", "input": "1 + 1", "output": "2"}"#,
        r#"{"instruction": "Salut ?", "input": null, "output": " Bonjour é "}"#,
        r#"{"output": "b", "instruction": "a"}"#,
        r#"{"instruction": "a", "input": "", "output": ""}"#,
        r#"{"instruction": "a"}"#,
    ];
    let path = write(&temp.path().join("fr.json"), records.join("\n").as_bytes());
    let source = Instructions::open(&path, Some(&language("fra_Latn")), PROMPT).unwrap();
    let seen = read(&source);
    let parts: Vec<_> = seen.documents.iter().map(|d| d.text.split_at(d.loss_from)).collect();
    assert_eq!(
        parts,
        [
            ("<|user|>\nAdd.\n1 + 1\n<|assistant|>\n", "2"),
            ("<|user|>\nSalut ?\n<|assistant|>\n", "Bonjour é"),
            ("<|user|>\na\n<|assistant|>\n", "b")
        ]
    );
    assert!(
        seen.unreadable[0].contains("fr.json:4: `output` is empty"),
        "{:?}",
        seen.unreadable
    );
    assert!(seen.unreadable[1].contains("fr.json:5: missing field `output` among `instruction`; each line must be a JSON object with string fields \"instruction\" and \"output\""));

    let root = temp.path().join("alpaca");
    write(&root.join("fra_Latn.jsonl"), records[2].as_bytes());
    write(&root.join("deu_Latn/x.jsonl"), records[0].as_bytes());
    let seen = read(&Instructions::open(&root, None, "{instruction}|{input}|").unwrap());
    assert_eq!(texts(&seen), ["deu_Latn: Add.|1 + 1|2", "fra_Latn: a||b"]);
    write(&root.join("spa_Latn.txt"), b"x");
    let said = Instructions::open(&root, None, PROMPT).err().unwrap().to_string();
    assert!(
        said.contains("spa_Latn.txt does not hold records by its name"),
        "{said}"
    );
}

/// A file of each table format, to be damaged.
fn tables() -> [(&'static str, Vec<u8>); 3] {
    let temp = tempfile::tempdir().unwrap();
    let words = strings(&[Some("one"), None, Some("three")]);
    let dictionary: DictionaryArray<Int32Type> = ["a", "b", "a"].into_iter().collect();
    let columns: [(&str, ArrayRef); 2] = [("text", words), ("lang", Arc::new(dictionary))];
    let batch = RecordBatch::try_from_iter(columns).unwrap();
    let path = temp.path().join("table");
    write_stream(&path, std::slice::from_ref(&batch));
    let stream = fs::read(&path).unwrap();
    write_file(&path, std::slice::from_ref(&batch));
    let file = fs::read(&path).unwrap();
    write_parquet(&path, &[batch], Compression::SNAPPY);
    [
        ("a.arrow", stream),
        ("b.arrow", file),
        ("c.parquet", fs::read(&path).unwrap()),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_text_written_as_json_lines_comes_back(
        texts in prop::collection::vec(any::<String>(), 0..20),
        packing in 0usize..3,
        extra in any::<String>(),
    ) {
        let lines: String = texts
            .iter()
            .map(|text| format!("{}\n", serde_json::json!({"a": [extra], "text": text, "z": {"text": 1}})))
            .collect();
        let temp = tempfile::tempdir().unwrap();
        let (ending, bytes) = match packing {
            0 => ("jsonl", lines.into_bytes()),
            1 => ("jsonl.gz", gzip(lines.as_bytes())),
            _ => ("jsonl.zst", zstandard(lines.as_bytes())),
        };
        let path = write(&temp.path().join(format!("x.{ending}")), &bytes);
        let eng = language("eng_Latn");
        let seen = read(&Files::open(&[path], "text", &LanguageOf::Fixed(eng.clone()), Path::new(""), &mut |_, _| {}).unwrap());
        let read: Vec<_> = seen.documents.into_iter().map(|d| d.text).collect();
        let expected: Vec<_> = texts.iter().map(|text| text.trim()).filter(|text| !text.is_empty()).collect();
        prop_assert_eq!(read, expected);
        prop_assert_eq!(seen.unreadable.len(), 0);
    }

    #[test]
    fn arbitrary_bytes_are_read_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        crate::fuzz::jsonl(&bytes);
    }

    #[test]
    fn nearly_json_is_read_or_refused(text in r#"(\{("instruction"|"output"|"in\\u0070ut"): ?("[a-z\\"]*"|null|1|\[*),?\}?\n?){0,6}"#) {
        crate::fuzz::jsonl(text.as_bytes());
    }
}

/// Each byte in turn takes seconds; one in eleven, with changing values, meets every part of the formats too.
#[test]
fn a_damaged_table_is_refused_or_read_but_never_a_panic() {
    let temp = tempfile::tempdir().unwrap();
    let eng = language("eng_Latn");
    let mut refused = 0;
    for (name, bytes) in tables() {
        let path = temp.path().join(name);
        for (turn, at) in (0..bytes.len()).step_by(11).enumerate() {
            let mut damaged = bytes.clone();
            damaged[at] = [0x00, 0x7f, 0xff, bytes[at] ^ 1][turn % 4];
            fs::write(&path, &damaged).unwrap();
            let column = ["text", "lang"][turn / 4 % 2];
            let source = Files::open(
                std::slice::from_ref(&path),
                column,
                &LanguageOf::Fixed(eng.clone()),
                Path::new(""),
                &mut |_, _| {},
            )
            .unwrap();
            refused += usize::from(!read(&source).unreadable.is_empty());
        }
    }
    assert!(refused > 20, "{refused}");
}

/// What reading and hygiene cost. `cargo test --release -p corpus --lib speed_of -- --ignored --nocapture`
#[test]
#[ignore = "a measurement"]
fn speed_of_readers_and_hygiene() {
    let words: Vec<String> = (0..5000u64).map(|i| format!("word{:x}", i * i)).collect();
    let line = |i: u64| -> String {
        let word = |j: u64| words[(crate::splitmix::mix(i * 100 + j) % 5000) as usize].as_str();
        (0..25).map(word).collect::<Vec<_>>().join(" ")
    };
    let lines: Vec<String> = (0..200_000).map(line).collect();
    let text = lines.join("\n");
    let megabytes = text.len() as f64 / 1e6;
    let temp = tempfile::tempdir().unwrap();
    let json: String = lines
        .iter()
        .map(|line| format!("{{\"text\": \"{line}\", \"n\": 1}}\n"))
        .collect();
    write(&temp.path().join("a/eng_Latn/a.txt"), text.as_bytes());
    write(&temp.path().join("b/eng_Latn/a.txt.gz"), &gzip(text.as_bytes()));
    write(&temp.path().join("c/eng_Latn/a.txt.zst"), &zstandard(text.as_bytes()));
    write(&temp.path().join("d/eng_Latn/a.jsonl"), json.as_bytes());
    write(&temp.path().join("e/eng_Latn/x"), b"");
    let batches: Vec<_> = lines
        .chunks(1000)
        .map(|rows| {
            RecordBatch::try_from_iter([("text", Arc::new(StringArray::from(rows.to_vec())) as ArrayRef)]).unwrap()
        })
        .collect();
    write_parquet(&temp.path().join("e/eng_Latn/a.parquet"), &batches, Compression::SNAPPY);
    let timed = |what: &str, work: &mut dyn FnMut()| {
        let begin = std::time::Instant::now();
        work();
        let seconds = begin.elapsed().as_secs_f64();
        let each = seconds / lines.len() as f64 * 1e6;
        println!(
            "{what:28} {:7.0} MB/s of text, {each:6.2} µs a document of {:.0} bytes",
            megabytes / seconds,
            text.len() as f64 / lines.len() as f64
        );
    };
    struct Count(usize);
    impl Sink for Count {
        fn document(&mut self, _: Document) -> Result<()> {
            self.0 += 1;
            Ok(())
        }
        fn unreadable(&mut self, error: Error) -> Result<()> {
            Err(error)
        }
    }
    for (what, folder) in [
        ("txt", "a"),
        ("txt.gz", "b"),
        ("txt.zst", "c"),
        ("jsonl", "d"),
        ("parquet (snappy)", "e"),
    ] {
        let source = Folders::open(&temp.path().join(folder), "text", OneDocument::Line).unwrap();
        let mut count = Count(0);
        timed(what, &mut || source.read(0, &mut count).unwrap());
        assert_eq!(count.0, lines.len());
    }
    timed("nfc (ascii)", &mut || {
        assert!(
            lines
                .iter()
                .all(|line| crate::import::normalise::nfc(line, 0).is_none())
        )
    });
    let similarity = crate::import::near_duplicates::Similarity::new(0.8).unwrap();
    for (what, memory_bytes) in [
        ("near duplicates, in memory", 1 << 30),
        ("near duplicates, spilled", 16 << 20),
    ] {
        timed(what, &mut || {
            let scratch = temp.path().join("near");
            let mut near = crate::import::near_duplicates::NearDuplicates::new(
                &similarity,
                crate::import::units::Unit::Word,
                memory_bytes,
                &scratch,
            );
            for line in &lines {
                near.add(line, false).unwrap();
            }
            assert_eq!(near.finish().unwrap().len(), 0);
        });
    }
    let evaluation = write(
        &temp.path().join("e.txt"),
        (0..20_000)
            .map(|i| line(i + 1_000_000) + "\n")
            .collect::<String>()
            .as_bytes(),
    );
    let n_grams = crate::import::contamination::NGrams::default();
    let evaluations = crate::import::contamination::Evaluations::read(&[evaluation], n_grams).unwrap();
    let eng = language("eng_Latn");
    timed("contamination, 260k n-grams", &mut || {
        let clean = |line: &String| evaluations.matches(&eng, line).is_empty();
        assert!(lines.iter().all(clean));
    });
}
