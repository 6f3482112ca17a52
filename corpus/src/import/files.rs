//! Reads files that hold one language, or rows of many languages in any order with a column that says which.
//! The latter are divided by language once, in one pass, so that their size costs disk and never memory.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::fingerprint::{fingerprint, size};
use crate::finished::replace_file;
use crate::import::records::{Column, Format, read_records};
use crate::import::texts::{OneDocument, hand_on, read_texts};
use crate::import::{LanguageOf, Sink, Source, SourceLanguage};
use crate::{Document, Error, Language, Progress, Result};

/// Files named one by one.
pub(crate) struct Files {
    /// The first, for sentences about all of them.
    path: PathBuf,
    languages: Vec<SourceLanguage>,
    files: Vec<Vec<(PathBuf, Format)>>,
    text_column: String,
    /// The files are [`Spool`]s.
    divided: bool,
}

impl Files {
    /// Text files are read a document a line and have no language column. Rows divided by language go to `scratch`, compressed;
    /// what an earlier call with the same files has left there is used again. Progress counts bytes of files that are divided.
    pub fn open(
        paths: &[PathBuf],
        text_column: &str,
        language: &LanguageOf,
        scratch: &Path,
        progress: Progress,
    ) -> Result<Files> {
        let records = |path: &PathBuf| Ok((path.clone(), Format::of_records(path)?));
        let any = |path: &PathBuf| match Format::of(path) {
            Some(format) => Ok((path.clone(), format)),
            None => records(path),
        };
        let path = paths.first().cloned().unwrap_or_default();
        let (languages, files, divided) = match language {
            LanguageOf::Fixed(language) => {
                let files = paths.iter().map(any).collect::<Result<_>>()?;
                (vec![language.clone()], vec![files], false)
            }
            LanguageOf::Column(name) => {
                let files = paths.iter().map(records).collect::<Result<Vec<_>>>()?;
                let languages = divide(&files, text_column, name, scratch, progress)?;
                let spools = languages
                    .iter()
                    .enumerate()
                    .map(|(number, language)| spools_of(scratch, number, language));
                let spools = spools.collect();
                (languages, spools, true)
            }
        };
        if languages.is_empty() {
            return Err(Error::EmptyCorpus {
                path,
                rule: "no row names a language like eng_Latn in its language column",
            });
        }
        Ok(Files {
            path,
            languages: languages.into_iter().map(SourceLanguage::named_by_its_code).collect(),
            files,
            text_column: text_column.to_owned(),
            divided,
        })
    }
}

impl Source for Files {
    fn name(&self) -> &'static str {
        "files"
    }

    fn languages(&self) -> &[SourceLanguage] {
        &self.languages
    }

    fn read(&self, language: usize, sink: &mut dyn Sink) -> Result<()> {
        let files = &self.files[language];
        let language = &self.languages[language].language;
        files.iter().try_for_each(|(path, format)| {
            if self.divided {
                read_spool(path, language, sink)
            } else {
                read_texts(path, *format, &self.text_column, OneDocument::Line, language, sink)
            }
        })
    }

    fn path(&self) -> &Path {
        &self.path
    }

    fn files(&self, language: usize) -> Option<Vec<PathBuf>> {
        Some(self.files[language].iter().map(|(path, _)| path.clone()).collect())
    }
}

/// Kept in memory before all of it is appended to the languages' files.
const SPOOL_BYTES: usize = 64 << 20;
/// Bytes of text between two words about progress.
const TELL_EVERY: u64 = 1 << 20;
const DIVIDED: &str = "divided.json";

/// Says that a scratch folder is finished, and of what.
#[derive(PartialEq, Serialize, Deserialize)]
struct Divided {
    /// Over the files and the columns.
    input: String,
    languages: Vec<Language>,
}

/// One row, or why there is none, in a language's spool.
#[derive(Serialize)]
#[serde(rename_all = "snake_case")]
enum Row<'a> {
    Text(&'a str),
    Unreadable(String),
}

/// Writes each language's rows to a file of its own. Returns the languages in the order of their names.
fn divide(
    files: &[(PathBuf, Format)],
    text_column: &str,
    language_column: &str,
    scratch: &Path,
    progress: Progress,
) -> Result<Vec<Language>> {
    let input = input_of(files, text_column, language_column)?;
    let done = scratch.join(DIVIDED);
    if let Ok(bytes) = fs::read(&done)
        && let Ok(divided) = serde_json::from_slice::<Divided>(&bytes)
        && divided.input == input
    {
        return Ok(divided.languages);
    }
    match fs::remove_dir_all(scratch) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(Error::io("remove", scratch)(e)),
        _ => fs::create_dir_all(scratch).map_err(Error::io("create", scratch))?,
    }
    let columns = [Column::required(text_column), Column::required(language_column)];
    let mut spool = Spool {
        folder: scratch,
        rows: BTreeMap::new(),
        without_language: Vec::new(),
        held_bytes: 0,
    };
    let sizes = files.iter().map(|(path, _)| size(path)).collect::<Result<Vec<u64>>>()?;
    let total = sizes.iter().sum();
    let mut before = 0;
    for ((path, format), size) in files.iter().zip(sizes) {
        // Of packed files the text is longer: the bar waits for the next file.
        let (mut text_bytes, mut told) = (0, 0);
        read_records(path, *format, &columns, &mut spool, &mut |record, sink| {
            let text = record.text(0).trim();
            text_bytes += text.len() as u64;
            if text_bytes - told >= TELL_EVERY {
                told = text_bytes;
                progress(before + text_bytes.min(size), total);
            }
            match record.text(1).parse() {
                Ok(_) if text.is_empty() => Ok(()),
                Ok(language) => sink.document(Document {
                    language,
                    key: String::new(),
                    text: text.to_owned(),
                    loss_from: 0,
                }),
                Err(error) => sink.unreadable(record.place.error(error.to_string())),
            }
        })?;
        before += size;
        progress(before, total);
    }
    spool.flush()?;
    let languages: Vec<_> = spool.rows.into_keys().collect();
    let divided = Divided { input, languages };
    replace_file(&done, &serde_json::to_vec(&divided).map_err(Error::json(&done))?)?;
    Ok(divided.languages)
}

fn input_of(files: &[(PathBuf, Format)], text_column: &str, language_column: &str) -> Result<String> {
    let mut hasher = blake3::Hasher::new();
    hasher.update(format!("{text_column:?} {language_column:?}").as_bytes());
    for (path, _) in files {
        hasher.update(format!("\n{path:?} {}", fingerprint(path)?).as_bytes());
    }
    Ok(hasher.finalize().to_hex().to_string())
}

/// The files that hold a language's rows. The first language also has the places of which no language is known.
fn spools_of(scratch: &Path, number: usize, language: &Language) -> Vec<(PathBuf, Format)> {
    let without = (number == 0)
        .then(|| without_language(scratch))
        .filter(|path| path.exists());
    let own = spool_of(scratch, language);
    without
        .into_iter()
        .chain([own])
        .map(|path| (path, Format::JsonLines))
        .collect()
}

fn spool_of(scratch: &Path, language: &Language) -> PathBuf {
    scratch.join(format!("{language}.jsonl.zst"))
}

fn without_language(scratch: &Path) -> PathBuf {
    scratch.join("without-language.jsonl.zst")
}

/// Collects rows and appends them to their languages' files. Only one file is open at a time, whatever the number of
/// languages; each append is a zstd frame of its own, and a reader takes the frames as one.
struct Spool<'a> {
    folder: &'a Path,
    rows: BTreeMap<Language, Vec<u8>>,
    without_language: Vec<u8>,
    held_bytes: usize,
}

impl Spool<'_> {
    fn flush(&mut self) -> Result<()> {
        for (language, rows) in &mut self.rows {
            append(&spool_of(self.folder, language), rows)?;
        }
        self.held_bytes = 0;
        append(&without_language(self.folder), &mut self.without_language)
    }

    fn after(&mut self, bytes: usize) -> Result<()> {
        self.held_bytes += bytes;
        if self.held_bytes >= SPOOL_BYTES {
            self.flush()
        } else {
            Ok(())
        }
    }
}

impl Sink for Spool<'_> {
    fn document(&mut self, document: Document) -> Result<()> {
        let rows = self.rows.entry(document.language).or_default();
        let before = rows.len();
        push(rows, &Row::Text(&document.text));
        let bytes = rows.len() - before;
        self.after(bytes)
    }

    fn unreadable(&mut self, error: Error) -> Result<()> {
        let before = self.without_language.len();
        push(&mut self.without_language, &Row::Unreadable(error.to_string()));
        let bytes = self.without_language.len() - before;
        self.after(bytes)
    }
}

fn push(rows: &mut Vec<u8>, row: &Row) {
    serde_json::to_writer(&mut *rows, row).expect("strings are JSON, and a Vec takes every byte");
    rows.push(b'\n');
}

fn append(path: &Path, rows: &mut Vec<u8>) -> Result<()> {
    if rows.is_empty() {
        return Ok(());
    }
    // The fastest level: the rows are read twice and then removed.
    let packed = zstd::bulk::compress(rows, 1).map_err(Error::io("pack", path))?;
    let file: Result<File, _> = OpenOptions::new().create(true).append(true).open(path);
    file.and_then(|mut file| file.write_all(&packed))
        .map_err(Error::io("write", path))?;
    rows.clear();
    rows.shrink_to(SPOOL_BYTES / 64);
    Ok(())
}

fn read_spool(path: &Path, language: &Language, sink: &mut dyn Sink) -> Result<()> {
    let columns = [Column::optional("text"), Column::optional("unreadable")];
    read_records(
        path,
        Format::JsonLines,
        &columns,
        sink,
        &mut |record, sink| match &record.values[1] {
            Some(sentence) => sink.unreadable(Error::Unreadable {
                sentence: sentence.to_string(),
            }),
            None => hand_on(record.text(0), language, sink),
        },
    )
}
