//! The corpus on disk: `<lll_Ssss>/train.jsonl` and `held_out.jsonl`, one `{"key", "text"}` a line, and `corpus.json`.
//! The manifest carries counts and digests, so that a missing or altered language is named, never trained on.

use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::finished::write_synced;
use crate::{Document, Error, Language, Result, Split};

/// The file that says a corpus folder is finished.
pub(crate) const MANIFEST: &str = "corpus.json";

/// `corpus.json`: what the import kept, language by language, in the order of their names.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CorpusManifest {
    /// Version of this layout.
    pub format: u32,
    /// The reader that made it: `udhr` or `folders`.
    pub source: String,
    pub seed: u64,
    pub held_out_share: f64,
    /// Over every language's digest: the corpus's identity.
    pub digest: String,
    pub languages: Vec<LanguageEntry>,
    /// What the source had and the corpus has not, each with its reason.
    pub skipped: Vec<Skipped>,
}

impl CorpusManifest {
    /// Documents and bytes of one half, over all languages.
    pub fn total(&self, split: Split) -> (u64, u64) {
        let counts = self.languages.iter().map(|entry| entry.counts(split));
        counts.fold((0, 0), |(documents, bytes), c| {
            (documents + c.documents, bytes + c.bytes)
        })
    }
}

/// One language of a corpus.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LanguageEntry {
    pub language: Language,
    /// For people to read, as the source names it.
    pub name: String,
    pub train: Counts,
    pub held_out: Counts,
    /// Documents dropped because an earlier one of the language has the same text.
    pub duplicates: u64,
    /// Training documents dropped because some language holds out the same text.
    pub contaminated: u64,
    /// Where the language is at home, in degrees, if the source says so.
    pub latitude: Option<f64>,
    pub longitude: Option<f64>,
    /// Over both files.
    pub digest: String,
}

impl LanguageEntry {
    pub fn counts(&self, split: Split) -> &Counts {
        match split {
            Split::Train => &self.train,
            Split::HeldOut => &self.held_out,
        }
    }
}

/// The size of one file of documents.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counts {
    pub documents: u64,
    /// Of UTF-8 text, without keys and JSON.
    pub bytes: u64,
    /// BLAKE3 of the file.
    pub digest: String,
}

/// Something the source had that could not be used.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Skipped {
    pub what: String,
    pub why: String,
}

/// A corpus folder, opened. Only the manifest is read until documents are asked for.
#[derive(Clone, Debug)]
pub struct Corpus {
    folder: PathBuf,
    manifest: CorpusManifest,
}

/// One line of a `.jsonl`.
#[derive(Serialize, Deserialize)]
struct Line<'a> {
    #[serde(borrow)]
    key: std::borrow::Cow<'a, str>,
    #[serde(borrow)]
    text: std::borrow::Cow<'a, str>,
    /// Left out where it is 0, which is nearly everywhere.
    #[serde(default, skip_serializing_if = "is_zero")]
    loss_from: usize,
}

fn is_zero(n: &usize) -> bool {
    *n == 0
}

impl Corpus {
    /// Opens a finished corpus folder.
    pub fn open(folder: &Path) -> Result<Corpus> {
        let path = folder.join(MANIFEST);
        if !path.is_file() {
            let (what, command) = ("corpus", "panglot corpus");
            return Err(Error::NotFinished {
                path: folder.to_path_buf(),
                what,
                marker: MANIFEST,
                command,
            });
        }
        let bytes = fs::read(&path).map_err(Error::io("read", &path))?;
        let manifest = serde_json::from_slice(&bytes).map_err(Error::json(&path))?;
        Ok(Corpus {
            folder: folder.to_path_buf(),
            manifest,
        })
    }

    pub fn manifest(&self) -> &CorpusManifest {
        &self.manifest
    }

    /// The corpus's identity: changes when any document does.
    pub fn digest(&self) -> String {
        self.manifest.digest.clone()
    }

    /// One half of a language, in the order of the file; checked against the manifest's digest.
    pub fn documents(&self, language: &Language, split: Split) -> Result<Vec<Document>> {
        let entry = self.manifest.languages.iter().find(|entry| entry.language == *language);
        let Some(entry) = entry else {
            return Err(Error::NoSuchLanguage {
                language: language.clone(),
                path: self.folder.clone(),
            });
        };
        let path = self.folder.join(language.as_str()).join(split.file_name());
        let bytes = fs::read(&path).map_err(Error::io("read", &path))?;
        let (found, expected) = (digest_of(&bytes), entry.counts(split).digest.clone());
        if found != expected {
            return Err(Error::AlteredCorpus { path, expected, found });
        }
        let lines = bytes.split(|byte| *byte == b'\n').filter(|line| !line.is_empty());
        lines
            .map(|line| {
                let line: Line<'_> = serde_json::from_slice(line).map_err(Error::json(&path))?;
                let (key, text, loss_from) = (line.key.into_owned(), line.text.into_owned(), line.loss_from);
                Ok(Document {
                    language: language.clone(),
                    key,
                    text,
                    loss_from,
                })
            })
            .collect()
    }
}

/// Writes one half of a language into an unfinished corpus folder.
pub(crate) fn write_documents<'a>(
    folder: &Path,
    split: Split,
    documents: impl Iterator<Item = &'a Document>,
) -> Result<Counts> {
    let mut counts = Counts::default();
    let mut file = Vec::new();
    for document in documents {
        counts.documents += 1;
        counts.bytes += document.text.len() as u64;
        let line = Line {
            key: document.key.as_str().into(),
            text: document.text.as_str().into(),
            loss_from: document.loss_from,
        };
        serde_json::to_writer(&mut file, &line).expect("strings are JSON, and a Vec takes every byte");
        file.push(b'\n');
    }
    counts.digest = digest_of(&file);
    write_synced(&folder.join(split.file_name()), &file)?;
    Ok(counts)
}

/// Digest of several digests, in order: a language's over its files, a corpus's over its languages.
pub(crate) fn digest_of_digests<'a>(parts: impl IntoIterator<Item = &'a str>) -> String {
    let mut hasher = blake3::Hasher::new();
    for part in parts {
        hasher.update(part.as_bytes()).update(b"\n");
    }
    hasher.finalize().to_hex().to_string()
}

/// BLAKE3 in hexadecimal.
pub(crate) fn digest_of(bytes: &[u8]) -> String {
    blake3::hash(bytes).to_hex().to_string()
}
