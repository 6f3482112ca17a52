//! Reads what people have on disk: one folder per `lll_Ssss`, in it `*.txt` (a document a line) or `*.jsonl` (`text`).
//! A line that cannot be read ends the import with its file and number: nothing is skipped unasked.

use std::fs;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::import::{Sink, Source, SourceLanguage};
use crate::{Document, Error, Language, Result, Skipped};

/// A folder of language folders, listed but not yet read.
pub(crate) struct Folders {
    root: PathBuf,
    languages: Vec<SourceLanguage>,
    /// For each language, its files in the order of their names.
    files: Vec<Vec<PathBuf>>,
}

impl Folders {
    /// Lists the languages under `root`. Hidden entries and loose files are no languages; any other folder must be one.
    pub fn open(root: &Path) -> Result<Folders> {
        let mut languages = Vec::new();
        let mut files = Vec::new();
        for folder in sorted_entries(root)?.into_iter().filter(|path| path.is_dir()) {
            let language: Language = name_of(&folder).parse()?;
            let texts: Vec<_> = sorted_entries(&folder)?
                .into_iter()
                .filter(|path| Kind::of(path).is_some())
                .collect();
            if texts.is_empty() {
                return Err(Error::EmptyCorpus {
                    path: folder,
                    rule: "expected files ending in .txt or .jsonl",
                });
            }
            let name = language.to_string();
            languages.push(SourceLanguage {
                language,
                name,
                latitude: None,
                longitude: None,
            });
            files.push(texts);
        }
        if languages.is_empty() {
            let rule = "expected one folder per language, named like eng_Latn";
            return Err(Error::EmptyCorpus {
                path: root.to_path_buf(),
                rule,
            });
        }
        Ok(Folders {
            root: root.to_path_buf(),
            languages,
            files,
        })
    }
}

impl Source for Folders {
    fn name(&self) -> &'static str {
        "folders"
    }

    fn languages(&self) -> &[SourceLanguage] {
        &self.languages
    }

    fn read(&self, language: usize, sink: &mut dyn Sink) -> Result<()> {
        let files = &self.files[language];
        let language = &self.languages[language].language;
        files.iter().try_for_each(|path| read_texts(path, language, sink))
    }

    fn is_parallel(&self) -> bool {
        false
    }

    fn skipped(&self) -> &[Skipped] {
        &[]
    }

    fn path(&self) -> &Path {
        &self.root
    }
}

/// How a file's lines are to be read.
#[derive(Clone, Copy)]
enum Kind {
    Text,
    JsonLines,
}

impl Kind {
    fn of(path: &Path) -> Option<Kind> {
        match path.extension()?.to_str()? {
            "txt" => Some(Kind::Text),
            "jsonl" => Some(Kind::JsonLines),
            _ => None,
        }
    }
}

/// Hands on the documents of one file; empty lines are none.
fn read_texts(path: &Path, language: &Language, sink: &mut dyn Sink) -> Result<()> {
    let bytes = fs::read(path).map_err(Error::io("read", path))?;
    for (line, bytes) in bytes.split(|byte| *byte == b'\n').enumerate() {
        match text_of_line(path, line + 1, bytes) {
            Ok(text) if text.is_empty() => {}
            Ok(text) => sink.document(Document {
                language: language.clone(),
                key: key_of(&text),
                text,
                loss_from: 0,
            })?,
            Err(error) => sink.unreadable(error)?,
        }
    }
    Ok(())
}

fn text_of_line(path: &Path, line: usize, bytes: &[u8]) -> Result<String> {
    #[derive(Deserialize)]
    struct Line {
        text: String,
    }
    let text = utf8(path, line, bytes)?.trim();
    match Kind::of(path) {
        Some(Kind::JsonLines) if !text.is_empty() => {
            let bad = |e: serde_json::Error| Error::BadJsonLine {
                path: path.to_path_buf(),
                line,
                reason: e.to_string(),
            };
            let line: Line = serde_json::from_str(text).map_err(bad)?;
            Ok(line.text.trim().to_owned())
        }
        _ => Ok(text.to_owned()),
    }
}

/// Text, or where it stops being UTF-8. `bytes` starts at `line`.
pub(crate) fn utf8<'a>(path: &Path, line: usize, bytes: &'a [u8]) -> Result<&'a str> {
    std::str::from_utf8(bytes).map_err(|e| {
        let before = &bytes[..e.valid_up_to()];
        let lines_before = before.iter().filter(|byte| **byte == b'\n').count();
        let in_line = before.iter().rev().take_while(|byte| **byte != b'\n').count();
        Error::NotUtf8 {
            path: path.to_path_buf(),
            line: line + lines_before,
            column: in_line + 1,
        }
    })
}

/// Stable under reordering of files: 64 bits of the text's hash.
fn key_of(text: &str) -> String {
    blake3::hash(text.as_bytes()).to_hex()[..16].to_owned()
}

fn sorted_entries(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(folder).map_err(Error::io("list", folder))?;
    let paths = entries
        .map(|entry| entry.map(|entry| entry.path()))
        .collect::<std::io::Result<Vec<_>>>();
    let mut paths = paths.map_err(Error::io("list", folder))?;
    paths.retain(|path| !name_of(path).starts_with('.'));
    paths.sort();
    Ok(paths)
}

fn name_of(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}
